//! Who may see what policies say.
//!
//! Names, labels and addresses of a whole cluster's pods, and who can reach whom, are worth something to an intruder. So
//! by default only clients on the node's loopback see them: who is there is on the node, or was let in by Kubernetes
//! (`kubectl port-forward` ends on loopback). A browser on loopback is not its user alone: a page of a stranger can have
//! its own name lead to 127.0.0.1, so the name that was asked for must be loopback's own; and a proxy on loopback speaks
//! for others.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, FORWARDED, HOST};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::config::value::DebugAccess;

/// Who sent a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Client {
    /// Its address, as the kernel has it.
    pub(super) address: IpAddr,
}

/// What a proxy says of whom it speaks for, beside `Forwarded`.
const FORWARDED_FOR: &str = "x-forwarded-for";

/// Why somebody is not shown something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// Nobody is.
    #[error("not found")]
    Off,
    /// It is not on loopback.
    #[error(
        "for clients on this node's loopback only: forward the port (kubectl port-forward, ssh -L), or set debug-access"
    )]
    Remote,
    /// It asked for another name than loopback's.
    #[error("for requests to localhost or 127.0.0.1 only, not by another name")]
    Name,
    /// It speaks for somebody else.
    #[error("for direct clients only, not through a proxy")]
    Proxy,
}

impl Refusal {
    fn code(self) -> StatusCode {
        match self {
            Self::Off => StatusCode::NOT_FOUND,
            Self::Remote | Self::Name | Self::Proxy => StatusCode::FORBIDDEN,
        }
    }
}

/// Whether a request is shown what policies say.
///
/// # Errors
/// It is not.
pub(super) fn admit(
    access: DebugAccess,
    client: Option<&Client>,
    headers: &HeaderMap,
) -> Result<(), Refusal> {
    match access {
        DebugAccess::Nobody => return Err(Refusal::Off),
        DebugAccess::Anyone => return Ok(()),
        DebugAccess::Loopback => {}
    }
    if !client.is_some_and(|client| client.address.to_canonical().is_loopback()) {
        return Err(Refusal::Remote);
    }
    if headers.contains_key(FORWARDED) || headers.contains_key(FORWARDED_FOR) {
        return Err(Refusal::Proxy);
    }
    let mut names = headers.get_all(HOST).iter();
    match (names.next().map(|name| name.to_str()), names.next()) {
        (Some(Ok(name)), None) if is_loopback(name) => Ok(()),
        (Some(_) | None, _) => Err(Refusal::Name),
    }
}

/// Whether a `Host` is loopback: `localhost`, or an address of it, with or without a port.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, _)) => name,
            None => return false,
        },
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// Lets through what [`admit`] does.
pub(super) async fn guard(State(access): State<DebugAccess>, request: Request, next: Next) -> Response {
    match admit(access, request.extensions().get(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            let headers = [(CONTENT_TYPE, "text/plain; charset=utf-8"), (CACHE_CONTROL, "no-store")];
            (refusal.code(), headers, format!("{refusal}\n")).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(of: &[(&'static str, &str)]) -> HeaderMap {
        of.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn from(access: DebugAccess, address: &str, of: &[(&'static str, &str)]) -> Result<(), Refusal> {
        admit(access, Some(&Client { address: address.parse().unwrap() }), &headers(of))
    }

    #[test]
    fn by_default_only_loopback_is_admitted() {
        let ask = |address| from(DebugAccess::default(), address, &[("host", "localhost:10091")]);
        for address in ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(ask(address), Ok(()), "{address}");
        }
        for address in ["10.0.0.1", "0.0.0.0", "128.0.0.1", "fe80::1", "::ffff:10.0.0.1", "::", "::127.0.0.1"]
        {
            assert_eq!(ask(address), Err(Refusal::Remote), "{address}");
        }
        // A handler that was not told who asks shows nothing.
        assert_eq!(
            admit(DebugAccess::Loopback, None, &headers(&[("host", "localhost")])),
            Err(Refusal::Remote)
        );
    }

    #[test]
    fn a_strangers_page_in_a_browser_on_loopback_sees_nothing() {
        let ask = |host| from(DebugAccess::Loopback, "127.0.0.1", &[("host", host)]);
        for host in ["localhost", "LocalHost:1", "127.0.0.1", "127.0.0.1:10091", "[::1]", "[::1]:10091"] {
            assert_eq!(ask(host), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example:10091",
            "10.0.0.1",
            "",
            "[::1",
            "[fe80::1]:1",
            "127.0.0.1.nip.io",
        ] {
            assert_eq!(ask(host), Err(Refusal::Name), "{host}");
        }
        assert_eq!(from(DebugAccess::Loopback, "127.0.0.1", &[]), Err(Refusal::Name));
        let mut two = headers(&[("host", "localhost")]);
        two.append(HOST, "evil.example".parse().unwrap());
        let client = Client { address: "::1".parse().unwrap() };
        assert_eq!(admit(DebugAccess::Loopback, Some(&client), &two), Err(Refusal::Name));
    }

    #[test]
    fn a_proxy_on_loopback_is_not_its_clients() {
        for name in ["forwarded", "x-forwarded-for"] {
            let of = [("host", "localhost"), (name, "10.0.0.1")];
            assert_eq!(from(DebugAccess::Loopback, "127.0.0.1", &of), Err(Refusal::Proxy), "{name}");
        }
    }

    #[test]
    fn the_configuration_opens_it_to_anyone_or_closes_it_to_all() {
        assert_eq!(from(DebugAccess::Anyone, "10.0.0.1", &[("host", "node-1")]), Ok(()));
        assert_eq!(from(DebugAccess::Nobody, "127.0.0.1", &[("host", "localhost")]), Err(Refusal::Off));
    }
}
