//! The bodies of answers: whole, or as they come, or broken off.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::sync::mpsc;

/// A body that a task writes. An error in it closes the connection amid the answer.
pub(super) struct Written(mpsc::Receiver<io::Result<Bytes>>);

/// The writing end. The answer ends when it is dropped.
#[derive(Clone)]
pub(super) struct Writer(mpsc::Sender<io::Result<Bytes>>);

/// Makes a body and its writer.
pub(super) fn written() -> (Writer, Written) {
    let (sender, receiver) = mpsc::channel(4);
    (Writer(sender), Written(receiver))
}

/// A body that is there already.
pub(super) fn whole(bytes: impl Into<Bytes>) -> Written {
    let (writer, body) = written();
    // The channel has room for it.
    let _ = writer.0.try_send(Ok(bytes.into()));
    body
}

/// A body that breaks off after these bytes.
pub(super) fn broken_off(bytes: impl Into<Bytes>) -> Written {
    let (writer, body) = written();
    let _ = writer.0.try_send(Ok(bytes.into()));
    let _ = writer.0.try_send(Err(broken()));
    body
}

fn broken() -> io::Error {
    io::Error::other("planted")
}

impl Writer {
    /// Writes; false: nobody reads any more.
    pub(super) async fn write(&self, bytes: impl Into<Bytes>) -> bool {
        self.0.send(Ok(bytes.into())).await.is_ok()
    }

    /// Closes the connection.
    pub(super) async fn break_off(&self) {
        // Who has gone needs no breaking.
        let _ = self.0.send(Err(broken())).await;
    }

    /// Waits until nobody reads any more.
    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }
}

impl Body for Written {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(context).map(|part| part.map(|part| part.map(Frame::data)))
    }
}
