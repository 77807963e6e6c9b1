//! TLS before the test API server: certificates made by openssl, and a proxy that ends TLS.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

use crate::exec::run;

/// A certificate with its key, in files.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
}

/// An authority of its own, in a directory of the test's.
#[derive(Debug)]
pub struct Authority {
    directory: PathBuf,
    name: String,
    own: Identity,
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a test's paths are UTF-8")
}

impl Authority {
    /// Makes one.
    ///
    /// # Errors
    /// openssl refuses, or is missing.
    pub fn new(directory: &Path, name: &str) -> Result<Self> {
        let file = |end: &str| directory.join(format!("{name}.{end}"));
        let own = Identity { certificate: file("crt"), key: file("key") };
        let subject = format!("/CN={name}");
        let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        let mut args = vec!["req", "-x509", "-days", "2", "-subj", &subject];
        args.extend(curve);
        args.extend(["-keyout", text(&own.key), "-out", text(&own.certificate)]);
        run("openssl", &args)?;
        Ok(Self { directory: directory.to_owned(), name: name.to_owned(), own })
    }

    /// The authority's own certificate.
    pub fn certificate(&self) -> &Path {
        &self.own.certificate
    }

    /// Signs a certificate with a name and an address.
    ///
    /// # Errors
    /// openssl refuses.
    pub fn sign(&self, name: &str, address: &str) -> Result<Identity> {
        let file = |end: &str| self.directory.join(format!("{}-{name}.{end}", self.name));
        let identity = Identity { certificate: file("crt"), key: file("key") };
        let (request, extensions) = (file("csr"), file("ext"));
        std::fs::write(&extensions, format!("subjectAltName=IP:{address}\n"))
            .context("writing extensions")?;
        let subject = format!("/CN={name}");
        let mut args = vec!["req", "-new", "-subj", &subject, "-newkey", "ec", "-pkeyopt"];
        args.extend(["ec_paramgen_curve:prime256v1", "-nodes"]);
        args.extend(["-keyout", text(&identity.key), "-out", text(&request)]);
        run("openssl", &args)?;
        let mut args = vec!["x509", "-req", "-days", "2", "-CAcreateserial", "-in", text(&request)];
        args.extend(["-CA", text(&self.own.certificate), "-CAkey", text(&self.own.key)]);
        args.extend(["-extfile", text(&extensions), "-out", text(&identity.certificate)]);
        run("openssl", &args)?;
        Ok(identity)
    }
}

/// Ends TLS and passes on what is inside; it ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// Serves on a listener in front of a server. With `clients`, who connects has to show a certificate of that authority.
    ///
    /// # Errors
    /// The certificates are unusable, or the system refuses.
    pub fn start(
        listener: TcpListener,
        server: SocketAddr,
        identity: &Identity,
        clients: Option<&Authority>,
    ) -> Result<Self> {
        let acceptor = acceptor(identity, clients)?;
        let address = listener.local_addr().context("asking a listener for its address")?;
        listener.set_nonblocking(true).context("preparing a listener")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("tls".to_owned()).spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                tokio::select! {
                    () = accept(&listener, &acceptor, server) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        })?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the TLS proxy panicked");
        }
    }
}

fn acceptor(identity: &Identity, clients: Option<&Authority>) -> Result<TlsAcceptor> {
    let chain = CertificateDer::pem_file_iter(&identity.certificate).context("reading a certificate")?;
    let chain: Vec<_> = chain.collect::<Result<_, _>>().context("reading a certificate")?;
    let key = PrivateKeyDer::from_pem_file(&identity.key).context("reading a key")?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?;
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            roots.add(
                CertificateDer::from_pem_file(authority.certificate()).context("reading an authority")?,
            )?;
            builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?,
            )
        }
    };
    Ok(TlsAcceptor::from(Arc::new(builder.with_single_cert(chain, key)?)))
}

async fn accept(listener: &tokio::net::TcpListener, acceptor: &TlsAcceptor, server: SocketAddr) {
    while let Ok((plain, _)) = listener.accept().await {
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            // A client that does not trust us goes away: that is its test's affair.
            let Ok(mut inside) = acceptor.accept(plain).await else { return };
            let Ok(mut outside) = tokio::net::TcpStream::connect(server).await else { return };
            let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
        });
    }
}
