//! The table: a row for each measurement, printed when ready, and the goals as ratios to the other participants of the
//! same run.

use crate::participants::Participant;

/// Whole answers of one participant. Each list has one value per repeat; medians count.
pub(crate) struct WholeAnswers {
    pub(crate) participant: Participant,
    pub(crate) prompt: usize,
    pub(crate) connections: usize,
    /// Requests/s.
    pub(crate) rate: Vec<f64>,
    /// Microseconds per request.
    pub(crate) cpu: Vec<f64>,
    /// Microseconds.
    pub(crate) p50: Vec<f64>,
    pub(crate) p99: Vec<f64>,
    /// MiB.
    pub(crate) rss: Vec<f64>,
    pub(crate) invalid: Vec<String>,
}

/// Streams of one participant, all open at once.
pub(crate) struct Streams {
    pub(crate) participant: Participant,
    pub(crate) prompt: usize,
    pub(crate) count: usize,
    /// Microseconds per event.
    pub(crate) cpu: Vec<f64>,
    /// Memory growth per stream in KiB. Later repeats reuse memory, so the maximum counts.
    pub(crate) memory: Vec<f64>,
    pub(crate) p50: Vec<f64>,
    pub(crate) p99: Vec<f64>,
    pub(crate) invalid: Vec<String>,
}

/// Everything measured.
#[derive(Default)]
pub(crate) struct ProxyTable {
    pub(crate) whole: Vec<WholeAnswers>,
    pub(crate) streams: Vec<Streams>,
}

/// The output for an invalid row.
fn mark(invalid: &[String]) -> String {
    invalid
        .first()
        .map(|why| format!("  INVALID: {why}"))
        .unwrap_or_default()
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn most(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

impl WholeAnswers {
    pub(crate) fn new(participant: Participant, prompt: usize, connections: usize) -> Self {
        Self {
            participant,
            prompt,
            connections,
            rate: Vec::new(),
            cpu: Vec::new(),
            p50: Vec::new(),
            p99: Vec::new(),
            rss: Vec::new(),
            invalid: Vec::new(),
        }
    }

    pub(crate) fn print_head() {
        println!(
            "{:<14} {:>6} {:>5} {:>9} {:>10} {:>9} {:>9} {:>8}",
            "", "prompt", "conn", "req/s", "CPU us/req", "p50 us", "p99 us", "RSS MiB"
        );
    }
}

impl Streams {
    pub(crate) fn new(participant: Participant, prompt: usize, count: usize) -> Self {
        Self {
            participant,
            prompt,
            count,
            cpu: Vec::new(),
            memory: Vec::new(),
            p50: Vec::new(),
            p99: Vec::new(),
            invalid: Vec::new(),
        }
    }

    pub(crate) fn print_head() {
        println!(
            "\n{:<14} {:>6} {:>7} {:>12} {:>12} {:>9} {:>9}",
            "", "prompt", "streams", "CPU us/event", "KiB/stream", "p50 us", "p99 us"
        );
    }
}

impl ProxyTable {
    /// Prints a row and keeps it. Latency is the addition to the base, which comes first.
    pub(crate) fn add_whole(&mut self, row: WholeAnswers) {
        let [p50, p99] = [&row.p50, &row.p99].map(|times| median(times));
        let base = self.whole(Participant::Base, row.prompt, row.connections);
        let [under50, under99] = base.map_or([0.0; 2], |base| [median(&base.p50), median(&base.p99)]);
        println!(
            "{:<14} {:>6} {:>5} {:>9.0} {:>10.1} {:>9.0} {:>9.0} {:>8.1}{}",
            row.participant.name(),
            row.prompt,
            row.connections,
            median(&row.rate),
            median(&row.cpu),
            p50 - under50,
            p99 - under99,
            median(&row.rss),
            mark(&row.invalid)
        );
        self.whole.push(row);
    }

    pub(crate) fn add_streams(&mut self, row: Streams) {
        println!(
            "{:<14} {:>6} {:>7} {:>12.2} {:>12.1} {:>9.0} {:>9.0}{}",
            row.participant.name(),
            row.prompt,
            row.count,
            median(&row.cpu),
            most(&row.memory),
            median(&row.p50),
            median(&row.p99),
            mark(&row.invalid)
        );
        self.streams.push(row);
    }

    /// Why rows are invalid.
    pub(crate) fn invalid(&self) -> impl Iterator<Item = &String> {
        let whole = self.whole.iter().flat_map(|row| &row.invalid);
        whole.chain(self.streams.iter().flat_map(|row| &row.invalid))
    }

    fn whole(&self, participant: Participant, prompt: usize, connections: usize) -> Option<&WholeAnswers> {
        let mut rows = self.whole.iter();
        rows.find(|row| (row.participant, row.prompt, row.connections) == (participant, prompt, connections))
    }

    /// The goals of xpyd with its results. Missing participants are left out.
    pub(crate) fn print_goals(&self) {
        println!();
        let goal = |what: &str, reached: f64, goal: f64| {
            let verdict = if reached <= goal { "reached" } else { "missed" };
            println!("{what:<66} {reached:>7.2} (goal {goal:.2}: {verdict})");
        };
        for row in self.whole.iter().filter(|row| row.participant == Participant::Xpyd) {
            let peer = |participant| self.whole(participant, row.prompt, row.connections);
            let load = format!("{} bytes, {} connections", row.prompt, row.connections);
            if let Some(router) = peer(Participant::VllmRouter) {
                let ratio = median(&row.cpu) / median(&router.cpu);
                goal(&format!("{load}: CPU, xpyd / vllm-router"), ratio, 0.25);
            }
            if let Some(nginx) = peer(Participant::Nginx) {
                let ratio = median(&row.cpu) / (2.0 * median(&nginx.cpu));
                goal(&format!("{load}: CPU, xpyd / two nginx hops"), ratio, 1.5);
            }
            if let (1, Some(router), Some(base)) =
                (row.connections, peer(Participant::VllmRouter), peer(Participant::Base))
            {
                let added = |row: &WholeAnswers| median(&row.p50) - median(&base.p50);
                goal(
                    &format!("{load}: added p50, xpyd / vllm-router"),
                    added(row) / added(router),
                    1.0 / 3.0,
                );
            }
        }
        for row in self.streams.iter().filter(|row| row.participant == Participant::Xpyd) {
            let load = format!("{} bytes, {} streams", row.prompt, row.count);
            goal(&format!("{load}: KiB per open stream"), most(&row.memory), 24.0);
            goal(&format!("{load}: CPU us per event"), median(&row.cpu), 6.0);
            let mut rows = self.streams.iter();
            let nginx = rows.find(|other| (other.participant, other.prompt) == (Participant::Nginx, row.prompt));
            if let Some(nginx) = nginx {
                let ratio = median(&row.cpu) / median(&nginx.cpu);
                println!("{load}: CPU per event, xpyd / nginx{ratio:>30.2}");
            }
        }
    }
}
