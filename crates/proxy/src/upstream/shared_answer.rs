//! Shares one answer of the engines among all clients that ask for it at about the same time.

use std::time::Duration;

use tokio::time::Instant;

/// Minimum time between two calls to engines, however many clients ask.
const SPACING: Duration = Duration::from_millis(200);

/// An answer that everyone shares who asked before its call began. It is never older than the request, because a
/// benchmark compares the engines' counts before and after its requests.
#[derive(Debug)]
pub(crate) struct SharedAnswer<T>(tokio::sync::Mutex<Option<(Instant, T)>>);

impl<T> Default for SharedAnswer<T> {
    fn default() -> Self {
        Self(tokio::sync::Mutex::new(None))
    }
}

impl<T: Clone> SharedAnswer<T> {
    pub(crate) async fn get(&self, make: impl Future<Output = T>) -> T {
        let asked = Instant::now();
        let mut last = self.0.lock().await;
        if let Some((begun, answer)) = &*last {
            if *begun >= asked {
                return answer.clone();
            }
            tokio::time::sleep_until(*begun + SPACING).await;
        }
        let begun = Instant::now();
        let answer = make.await;
        *last = Some((begun, answer.clone()));
        answer
    }

    /// The same, but the answer can be as old as `SPACING`, so that a client that asks repeatedly does not wait each
    /// time.
    pub(crate) async fn recent(&self, make: impl Future<Output = T>) -> T {
        let mut last = self.0.lock().await;
        if let Some((ended, answer)) = &*last
            && ended.elapsed() < SPACING
        {
            return answer.clone();
        }
        let answer = make.await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
}
