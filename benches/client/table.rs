//! The table: a row for each client and load, printed when ready, and the goals as ratios to the other clients of the
//! same run.

use crate::ground_truth::Comparison;
use crate::participants::Participant;

/// One client under one load.
#[derive(Debug, Clone)]
pub(crate) struct ClientRow {
    pub(crate) participant: Participant,
    /// Requests/s that were asked for.
    pub(crate) rate: f64,
    /// Events/s that the server wrote.
    pub(crate) events: f64,
    /// Microseconds per event.
    pub(crate) cpu: f64,
    /// Cores that the client used on average.
    pub(crate) cores: f64,
    /// MiB.
    pub(crate) rss: f64,
    pub(crate) compared: Comparison,
}

/// Everything measured.
#[derive(Debug, Default)]
pub(crate) struct ClientTable {
    pub(crate) rows: Vec<ClientRow>,
    failed: Vec<String>,
}

/// Server lateness in milliseconds above which ITL tails are not comparable.
const LATE_SERVER: f64 = 5.0;

impl ClientTable {
    pub(crate) fn print_head() {
        println!(
            "\n{:<12} {:>6} {:>9} {:>9} {:>6} {:>8}   {:>25}   {:>14}   {:>13}",
            "",
            "req/s",
            "events/s",
            "CPU us/ev",
            "cores",
            "RSS MiB",
            "TTFT ms true/client/off",
            "P99 TTFT ms",
            "P99 ITL ms"
        );
    }

    pub(crate) fn add(&mut self, row: ClientRow) {
        let Comparison {
            true_ttft,
            client_ttft,
            ttft_error,
            true_itl,
            client_itl,
            server_lateness,
        } = row.compared;
        let note = if server_lateness.p99 > LATE_SERVER {
            format!("  (the server was up to {:.0} ms late)", server_lateness.p99)
        } else {
            String::new()
        };
        println!(
            "{:<12} {:>6} {:>9.0} {:>9.2} {:>6.2} {:>8.1}   {:>8.2}{:>9.2}{:>8.2}   {:>6.1}{:>8.1}   {:>6.1}{:>7.1}{note}",
            row.participant.name(),
            row.rate,
            row.events,
            row.cpu,
            row.cores,
            row.rss,
            true_ttft.mean,
            client_ttft.mean,
            ttft_error.mean,
            true_ttft.p99,
            client_ttft.p99,
            true_itl.p99,
            client_itl.p99,
        );
        self.rows.push(row);
    }

    pub(crate) fn add_failed(&mut self, reason: &str) {
        println!("INVALID: {reason}");
        self.failed.push(reason.to_owned());
    }

    pub(crate) fn is_valid(&self) -> bool {
        self.failed.is_empty() && !self.rows.is_empty()
    }

    fn row(&self, participant: Participant, rate: f64) -> Option<&ClientRow> {
        let mut rows = self.rows.iter();
        rows.find(|row| row.participant == participant && row.rate.total_cmp(&rate).is_eq())
    }

    /// The row with the most events/s whose time to first token is correct to 5 %.
    fn most(&self, participant: Participant) -> Option<&ClientRow> {
        let rows = self
            .rows
            .iter()
            .filter(|row| row.participant == participant && row.compared.is_true());
        rows.max_by(|left, right| left.events.total_cmp(&right.events))
    }

    /// The goals of xpyd with its results. Missing participants are left out.
    pub(crate) fn print_goals(&self) {
        println!();
        let verdict = |is_reached: bool| if is_reached { "reached" } else { "missed" };
        for participant in Participant::ALL {
            if let Some(row) = self.most(participant) {
                println!(
                    "{}: true to 5 % up to {:.0} events/s of those tried, at {:.0} events per second of one core",
                    participant.name(),
                    row.events,
                    row.events / row.cores
                );
            }
        }
        let Some(most) = self.most(Participant::Xpyd) else {
            return;
        };
        let reached = most.events / most.cores;
        println!(
            "events per second of one core: {reached:.0} (goal 200000: {})",
            verdict(reached >= 200_000.0)
        );
        if let Some(peer) = self.most(Participant::Vllm) {
            let ratio = reached / (peer.events / peer.cores);
            println!(
                "the same, xpyd / vLLM: {ratio:.1} (goal 10.0: {})",
                verdict(ratio >= 10.0)
            );
        }
        if let Some(row) = self.row(Participant::Xpyd, 100.0) {
            let off = (row.compared.client_ttft.mean - row.compared.true_ttft.mean).abs();
            let peer = self.row(Participant::Vllm, 100.0);
            let peer = peer.map(|row| (row.compared.client_ttft.mean - row.compared.true_ttft.mean).abs());
            let peer = peer.map(|off| format!(", vLLM's {off:.2}")).unwrap_or_default();
            println!(
                "mean TTFT at 100 req/s is off by {off:.2} ms{peer} (goal 1.00: {})",
                verdict(off < 1.0)
            );
        }
    }
}
