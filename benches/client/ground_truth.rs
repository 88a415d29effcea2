//! The server's record of a run, compared with the result of a client.

use serde::{Deserialize, Serialize};

/// The record of all requests since the last query.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct GroundTruth {
    pub(crate) requests: Vec<Request>,
}

/// One answer; times in seconds.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) id: String,
    /// The largest lateness of an event.
    pub(crate) lateness: f64,
    /// Write time of each event since the arrival of the request.
    pub(crate) written: Vec<f64>,
}

/// The progress of the server.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) requests: u64,
    pub(crate) events: u64,
}

/// The result of a client: vLLM's result file with details.
#[derive(Debug, Deserialize)]
pub(crate) struct ClientResult {
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    /// Per request, in order of their numbers, in seconds.
    pub(crate) ttfts: Vec<f64>,
    pub(crate) itls: Vec<Vec<f64>>,
}

impl Request {
    /// The number at the end of its id: its index in the client's lists.
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
    /// The summary of values in seconds.
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

/// A client's numbers and the server's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Comparison {
    pub(crate) true_ttft: Summary,
    pub(crate) client_ttft: Summary,
    /// The errors of single times to first token.
    pub(crate) ttft_error: Summary,
    pub(crate) true_itl: Summary,
    pub(crate) client_itl: Summary,
    /// The mean of each request's worst lateness at the server.
    pub(crate) server_lateness: Summary,
}

impl Comparison {
    /// # Errors
    /// When the two have different requests.
    pub(crate) fn new(ground_truth: &GroundTruth, client: &ClientResult) -> Result<Self, String> {
        if client.failed > 0
            || client.completed != client.ttfts.len() as u64
            || ground_truth.requests.len() != client.ttfts.len()
        {
            return Err(format!(
                "{} answers, {} of them good to the client, {} failed",
                ground_truth.requests.len(),
                client.completed,
                client.failed
            ));
        }
        let pair = |request: &Request| Some((request.first(), *client.ttfts.get(request.number()?)?));
        let pairs: Option<Vec<(f64, f64)>> = ground_truth.requests.iter().map(pair).collect();
        let pairs = pairs.ok_or("a request of another number")?;
        Ok(Self {
            true_ttft: Summary::of(pairs.iter().map(|pair| pair.0)),
            client_ttft: Summary::of(pairs.iter().map(|pair| pair.1)),
            ttft_error: Summary::of(pairs.iter().map(|(actual, measured)| (measured - actual).abs())),
            true_itl: Summary::of(ground_truth.requests.iter().flat_map(Request::gaps)),
            client_itl: Summary::of(client.itls.iter().flatten().copied()),
            server_lateness: Summary::of(ground_truth.requests.iter().map(|request| request.lateness)),
        })
    }

    /// Whether the client's mean time to first token is within 5 % of the true one.
    pub(crate) fn is_true(&self) -> bool {
        (self.client_ttft.mean - self.true_ttft.mean).abs() <= 0.05 * self.true_ttft.mean
    }
}
