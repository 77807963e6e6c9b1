//! Large answers, of which few are in memory at once, however many clients there are and however slowly they read.
//!
//! Clients that want the same share one body. A body takes a place until the last client has read it (or has been cut
//! off); who comes while no place is free waits, and all who wait share the next one.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

/// The bodies of one kind; `K` says what a body is of.
#[derive(Debug)]
pub(super) struct Shelf<K> {
    places: Arc<Semaphore>,
    newest: Mutex<Option<(K, Weak<Body>)>>,
}

/// A body, in memory for as long as a client reads it.
#[derive(Debug)]
struct Body {
    text: String,
    _place: OwnedSemaphorePermit,
}

/// One client's share.
struct Share(Arc<Body>);

impl AsRef<[u8]> for Share {
    fn as_ref(&self) -> &[u8] {
        self.0.text.as_bytes()
    }
}

impl<K: Send + 'static> Shelf<K> {
    /// A shelf of so many places.
    pub(super) fn new(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)), newest: Mutex::new(None) }
    }

    /// A body that `fits`: one that others are reading, or what `render` makes, on a thread where it may take its time.
    /// `None`: it can't be made, as when the process ends.
    pub(super) async fn body(
        &self,
        fits: impl Fn(&K) -> bool,
        render: impl FnOnce() -> (K, String) + Send + 'static,
    ) -> Option<Bytes> {
        let mut newest = self.newest.lock().await;
        if let Some((key, body)) = &*newest
            && fits(key)
            && let Some(body) = body.upgrade()
        {
            return Some(Bytes::from_owner(Share(body)));
        }
        let place = Arc::clone(&self.places).acquire_owned().await.ok()?;
        let (key, text) = tokio::task::spawn_blocking(render).await.ok()?;
        let body = Arc::new(Body { text, _place: place });
        *newest = Some((key, Arc::downgrade(&body)));
        Some(Bytes::from_owner(Share(body)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_wants_the_same_shares_it_and_few_are_alive() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let shelf: Shelf<u32> = Shelf::new(2);
            let get = async |wanted: u32| {
                let made = shelf.body(move |key| *key == wanted, move || (wanted, format!("body {wanted}")));
                tokio::time::timeout(Duration::from_millis(200), made).await.ok().flatten()
            };
            let first = get(1).await.unwrap();
            let shared = get(1).await.unwrap();
            assert_eq!(first.as_ptr(), shared.as_ptr(), "two renderings for two clients");
            let second = get(2).await.unwrap();
            assert_eq!(&second[..], b"body 2");
            assert_eq!(get(3).await, None, "a third body while two are being read");
            drop(first);
            assert_eq!(get(3).await, None, "the first is still being read by another");
            drop(shared);
            let third = get(3).await.unwrap();
            drop((second, third));
            assert_eq!(shelf.places.available_permits(), 2, "nothing is kept that nobody reads");
        });
    }
}
