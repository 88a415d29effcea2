//! What really happened, as the server noted it, beside what a client says.

use serde::{Deserialize, Serialize};

/// Of all requests since it was asked last.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Truth {
    pub(crate) requests: Vec<Request>,
}

/// One answer. Seconds.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) id: String,
    /// The most that an event was written after its time.
    pub(crate) lateness: f64,
    /// When each event was written, since the request arrived.
    pub(crate) written: Vec<f64>,
}

/// How far the server is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) requests: u64,
    pub(crate) events: u64,
}

/// What a client says: vLLM's result file with details.
#[derive(Debug, Deserialize)]
pub(crate) struct Told {
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    /// Of each request, in the order of their numbers. Seconds.
    pub(crate) ttfts: Vec<f64>,
    pub(crate) itls: Vec<Vec<f64>>,
}

impl Request {
    /// The number at the end of its id, which is its place in the client's lists.
    pub(crate) fn number(&self) -> Option<usize> {
        self.id.rsplit('-').next()?.parse().ok()
    }

    pub(crate) fn first(&self) -> f64 {
        self.written.first().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn gaps(&self) -> impl Iterator<Item = f64> + '_ {
        self.written.windows(2).map(|pair| pair[1] - pair[0])
    }
}

/// A mean and a tail, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Summary {
    pub(crate) mean: f64,
    pub(crate) p99: f64,
}

impl Summary {
    /// Of seconds.
    pub(crate) fn of(seconds: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = seconds.map(|value| value * 1e3).collect();
        values.sort_by(f64::total_cmp);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index of the list"
        )]
        let tail = (values.len().saturating_sub(1) as f64 * 0.99).round() as usize;
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p99: values.get(tail).copied().unwrap_or(f64::NAN),
        }
    }
}

/// A client's numbers beside the true ones.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Compared {
    pub(crate) true_ttft: Summary,
    pub(crate) told_ttft: Summary,
    /// By how much single times to first token are off.
    pub(crate) ttft_error: Summary,
    pub(crate) true_itl: Summary,
    pub(crate) told_itl: Summary,
    /// The mean of each request's worst lateness at the server.
    pub(crate) server_lateness: Summary,
}

impl Compared {
    /// # Errors
    /// When the two are not about the same requests.
    pub(crate) fn new(truth: &Truth, told: &Told) -> Result<Self, String> {
        if told.failed > 0 || told.completed != told.ttfts.len() as u64 || truth.requests.len() != told.ttfts.len() {
            return Err(format!(
                "{} answers, {} of them good to the client, {} failed",
                truth.requests.len(),
                told.completed,
                told.failed
            ));
        }
        let pair = |request: &Request| Some((request.first(), *told.ttfts.get(request.number()?)?));
        let pairs: Option<Vec<(f64, f64)>> = truth.requests.iter().map(pair).collect();
        let pairs = pairs.ok_or("a request of another number")?;
        Ok(Self {
            true_ttft: Summary::of(pairs.iter().map(|pair| pair.0)),
            told_ttft: Summary::of(pairs.iter().map(|pair| pair.1)),
            ttft_error: Summary::of(pairs.iter().map(|(truth, told)| (told - truth).abs())),
            true_itl: Summary::of(truth.requests.iter().flat_map(Request::gaps)),
            told_itl: Summary::of(told.itls.iter().flatten().copied()),
            server_lateness: Summary::of(truth.requests.iter().map(|request| request.lateness)),
        })
    }

    /// Whether the client's mean time to first token is within 5 % of the true one.
    pub(crate) fn is_true(&self) -> bool {
        (self.told_ttft.mean - self.true_ttft.mean).abs() <= 0.05 * self.true_ttft.mean
    }
}
