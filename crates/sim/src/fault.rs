//! Faults of a simulated engine: `--fault NAME[=VALUE]`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// One fault from the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The start takes this much longer.
    SlowStart(Duration),
    /// The start fails with exit code 1 at the beginning of this phase.
    DieAt(Phase),
    /// The start fails with exit code 1 at once and prints this file as its log. Without the file nothing happens, so
    /// that a later start can be made to fail.
    DieSaying(PathBuf),
    /// The start hangs at this phase without using CPU.
    FreezeAt(Phase),
    /// SIGTERM and SIGINT have no effect.
    IgnoreSigterm,
    /// Every nth transfer sends no LMCache notification, although its KV arrived.
    DropNotification(u64),
    /// Every nth transfer sends its LMCache notification twice.
    RepeatNotification(u64),
    /// Every nth transfer delays its LMCache notification by this time.
    DelayNotification(Duration, u64),
    /// Every nth KV transfer fails.
    FailTransfer(u64),
    /// A plain request does not kill an LMCache sender, as in LMCache's sync mode.
    SurvivePlainRequests,
    /// Every nth received KV is corrupted.
    GarbleKv(u64),
    /// Every nth sequence takes the other one of two equally likely tokens as its second token and continues from
    /// there. Real engines do this when other requests share a step and change the order of additions.
    Drift(u64),
    /// A sequence stops generating after this many tokens and never ends.
    StallDecode(usize),
    /// After this many requests the worker hangs. Running requests are counted per step, so the next request is in no
    /// metric until the core gives the worker up.
    Hang(u64),
    /// `EngineCore` and workers ignore SIGTERM and outlive the API server.
    Orphans,
    /// A daemon in its own session ignores SIGTERM and keeps the log and a file in `/dev/shm` open.
    Stray,
}

/// A phase of a start at which an engine can fail or hang.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Reading the model's configuration.
    Config,
    /// Starting the engine core.
    Engine,
    /// Joining the workers.
    Workers,
    /// Loading the weights.
    Weights,
    /// Sizing the KV cache.
    KvCache,
    /// Starting the connector and warming up.
    Warmup,
    /// Starting the HTTP server.
    Server,
}

impl Phase {
    /// All phases with their names on the command line, in order.
    pub(crate) const NAMES: [(&'static str, Self); 7] = [
        ("config", Self::Config),
        ("engine", Self::Engine),
        ("workers", Self::Workers),
        ("weights", Self::Weights),
        ("kv-cache", Self::KvCache),
        ("warmup", Self::Warmup),
        ("server", Self::Server),
    ];
}

/// The list of faults for error messages.
const KNOWN: &str = "slow-start=DURATION, die-at=PHASE, freeze-at=PHASE, die-saying=FILE, ignore-sigterm, \
                     drop-notification[=EVERY_NTH], repeat-notification[=EVERY_NTH], \
                     delay-notification=DURATION[/EVERY_NTH], fail-transfer[=EVERY_NTH], garble-kv[=EVERY_NTH], drift[=EVERY_NTH], \
                     survive-plain-requests, stall-decode=TOKENS, hang=REQUESTS, orphans, stray";

/// Why a `--fault` is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// Unknown name.
    #[error("unknown fault `{0}`; known are {KNOWN}")]
    Unknown(String),
    /// The value is missing or invalid.
    #[error("fault `{name}` needs {expected}")]
    Value {
        /// The fault.
        name: &'static str,
        /// The expected value.
        expected: String,
    },
}

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let (name, value) = text
            .split_once('=')
            .map_or((text, None), |(name, value)| (name, Some(value)));
        match name {
            "slow-start" => value
                .and_then(|value| humantime::parse_duration(value).ok())
                .map(Self::SlowStart)
                .ok_or_else(|| bad_value("slow-start", "a duration such as `10s`")),
            "die-at" => phase("die-at", value).map(Self::DieAt),
            "freeze-at" => phase("freeze-at", value).map(Self::FreezeAt),
            "die-saying" => value
                .map(|path| Self::DieSaying(path.into()))
                .ok_or_else(|| bad_value("die-saying", "a file with a log")),
            "ignore-sigterm" => Ok(Self::IgnoreSigterm),
            "drop-notification" => every("drop-notification", value).map(Self::DropNotification),
            "repeat-notification" => every("repeat-notification", value).map(Self::RepeatNotification),
            "delay-notification" => delay(value)
                .map(|(time, nth)| Self::DelayNotification(time, nth))
                .ok_or_else(|| {
                    bad_value(
                        "delay-notification",
                        "a duration such as `1s`, or `1s/3` for every third one",
                    )
                }),
            "fail-transfer" => every("fail-transfer", value).map(Self::FailTransfer),
            "garble-kv" => every("garble-kv", value).map(Self::GarbleKv),
            "drift" => every("drift", value).map(Self::Drift),
            "survive-plain-requests" => Ok(Self::SurvivePlainRequests),
            "stall-decode" => value
                .and_then(|value| value.parse().ok())
                .map(Self::StallDecode)
                .ok_or_else(|| bad_value("stall-decode", "a number of tokens")),
            "hang" => value
                .and_then(|value| value.parse().ok())
                .map(Self::Hang)
                .ok_or_else(|| bad_value("hang", "a number of requests")),
            "orphans" => Ok(Self::Orphans),
            "stray" => Ok(Self::Stray),
            other => Err(FaultError::Unknown(other.to_owned())),
        }
    }
}

fn phase(name: &'static str, value: Option<&str>) -> Result<Phase, FaultError> {
    value
        .and_then(|value| Phase::NAMES.iter().find(|(name, _)| *name == value))
        .map(|(_, phase)| *phase)
        .ok_or_else(|| {
            let names: Vec<&str> = Phase::NAMES.iter().map(|(name, _)| *name).collect();
            bad_value(name, &format!("one of {}", names.join(", ")))
        })
}

fn every(name: &'static str, value: Option<&str>) -> Result<u64, FaultError> {
    value
        .map_or(Some(1), |value| value.parse().ok().filter(|nth| *nth > 0))
        .ok_or_else(|| bad_value(name, "a number from 1, or none for every one"))
}

fn delay(value: Option<&str>) -> Option<(Duration, u64)> {
    let value = value?;
    let (time, nth) = value.split_once('/').unwrap_or((value, "1"));
    let nth = nth.parse().ok().filter(|nth| *nth > 0)?;
    Some((humantime::parse_duration(time).ok()?, nth))
}

fn bad_value(name: &'static str, expected: &str) -> FaultError {
    FaultError::Value {
        name,
        expected: expected.to_owned(),
    }
}

/// Counts events and selects every nth.
#[derive(Debug)]
pub(crate) struct EveryNth {
    nth: Option<u64>,
    seen: u64,
}

impl EveryNth {
    /// Selects every `nth` event; none without a number.
    pub(crate) fn new(nth: Option<u64>) -> Self {
        Self { nth, seen: 0 }
    }

    /// Counts one event. True if it is selected.
    pub(crate) fn hits(&mut self) -> bool {
        self.seen += 1;
        self.nth.is_some_and(|nth| self.seen.is_multiple_of(nth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_with_and_without_values() {
        assert_eq!("drop-notification".parse(), Ok(Fault::DropNotification(1)));
        let delay = |nth| Ok(Fault::DelayNotification(Duration::from_secs(1), nth));
        assert_eq!("delay-notification=1s".parse(), delay(1));
        assert_eq!("delay-notification=1s/3".parse(), delay(3));
        assert_eq!("fail-transfer=3".parse(), Ok(Fault::FailTransfer(3)));
        assert_eq!("slow-start=2s".parse(), Ok(Fault::SlowStart(Duration::from_secs(2))));
        assert_eq!("die-at=kv-cache".parse(), Ok(Fault::DieAt(Phase::KvCache)));
        assert_eq!("freeze-at=engine".parse(), Ok(Fault::FreezeAt(Phase::Engine)));
    }

    #[test]
    fn invalid_faults_name_the_valid_ones() {
        let unknown = "slow-strat=1s".parse::<Fault>().expect_err("unknown").to_string();
        assert!(unknown.contains("slow-start=DURATION"), "{unknown}");
        let phase = "die-at=lunch".parse::<Fault>().expect_err("no phase").to_string();
        assert!(phase.contains("weights"), "{phase}");
        assert!("fail-transfer=0".parse::<Fault>().is_err());
        assert!("stall-decode".parse::<Fault>().is_err());
        assert!("delay-notification=1s/0".parse::<Fault>().is_err());
    }

    #[test]
    fn every_second_event_is_hit() {
        let mut events = EveryNth::new(Some(2));
        let hits: Vec<bool> = (0..4).map(|_| events.hits()).collect();
        assert_eq!(hits, [false, true, false, true]);
        assert!(!EveryNth::new(None).hits());
    }
}
