//! The command line of the tools.

use std::path::PathBuf;
use std::time::Duration;

/// What Cargo passes to every bench and to no test.
pub(crate) const BENCH: &str = "--bench";

pub(crate) const USAGE: &str = "\
usage: cargo bench --bench attack -- TOOL [OPTIONS]

growth   time and memory of one request over its size, in many shapes
           --max BYTES      largest request [67000000]
           --only SHAPES    shapes whose names begin so, separated by commas
storm    faults under load against a fleet of simulated engines
           --minutes M      how long [15]
           --seed N         which faults, and when [1]
           --connector C    nixl or lmcache [nixl]
           --clients N      clients that ask all the time [24]
           --only FAULTS    faults whose names begin so, separated by commas
           --set KEY=VALUE  passed on to `xpyd up`; may be repeated
           --keep FOLDER    where to keep the run's logs, and what happened when
fuzz     hostile input over raw sockets
           --count N        inputs [22000]
           --seed N         which ones [1]
           --clients N      inputs at once [40]
load     streams at once
           --clients N      streams [1000]
           --events N       tokens of each [60]
           --interval MS    time between two tokens [1000]
soak     the storm's load without faults
           --minutes, --seed, --connector, --clients, --set as for storm";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    Growth,
    Storm,
    Fuzz,
    Load,
    Soak,
}

#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) tool: Tool,
    pub(crate) seed: u64,
    pub(crate) duration: Duration,
    pub(crate) connector: String,
    pub(crate) clients: usize,
    /// Inputs of `fuzz`.
    pub(crate) count: u64,
    /// Tokens of a stream of `load`, and the time between two of them.
    pub(crate) events: usize,
    pub(crate) interval: Duration,
    /// Largest request of `growth`, in bytes.
    pub(crate) max: usize,
    /// Prefixes of shape or fault names. Empty selects all.
    pub(crate) only: Vec<String>,
    /// `KEY=VALUE` settings for `xpyd up`.
    pub(crate) settings: Vec<String>,
    /// Most faults of a storm.
    pub(crate) most: u32,
    /// Where logs are kept.
    pub(crate) keep: Option<PathBuf>,
    /// Whether to include faults that need a private mount namespace.
    pub(crate) private: bool,
}

impl Options {
    pub(crate) fn of(tool: Tool) -> Self {
        Self {
            tool,
            seed: 1,
            duration: Duration::from_mins(15),
            connector: "nixl".to_owned(),
            clients: match tool {
                Tool::Growth | Tool::Storm | Tool::Soak => 24,
                Tool::Fuzz => 40,
                Tool::Load => 1000,
            },
            count: 22_000,
            events: 60,
            interval: Duration::from_secs(1),
            max: 67_000_000,
            only: Vec::new(),
            settings: Vec::new(),
            most: u32::MAX,
            keep: None,
            private: true,
        }
    }

    pub(crate) fn read(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut words = words.filter(|word| word != BENCH);
        let tool = match words.next().as_deref() {
            Some("growth") => Tool::Growth,
            Some("storm") => Tool::Storm,
            Some("fuzz") => Tool::Fuzz,
            Some("load") => Tool::Load,
            Some("soak") => Tool::Soak,
            Some(other) => return Err(format!("`{other}` is not a tool")),
            None => return Err("no tool is given".to_owned()),
        };
        let mut options = Self::of(tool);
        while let Some(word) = words.next() {
            let value = words.next().ok_or_else(|| format!("`{word}` needs a value"))?;
            match word.as_str() {
                "--seed" => options.seed = number(&word, &value)?,
                "--minutes" => options.duration = Duration::from_secs_f64(number::<f64>(&word, &value)? * 60.0),
                "--connector" => options.connector = value,
                "--clients" => options.clients = number(&word, &value)?,
                "--count" => options.count = number(&word, &value)?,
                "--events" => options.events = number(&word, &value)?,
                "--interval" => options.interval = Duration::from_millis(number(&word, &value)?),
                "--max" => options.max = number(&word, &value)?,
                "--only" => options.only = value.split(',').map(str::to_owned).collect(),
                "--keep" => options.keep = Some(value.into()),
                "--set" => options.settings.push(value),
                _ => return Err(format!("`{word}` is not an option")),
            }
        }
        Ok(options)
    }

    /// Whether a shape or fault of this name is selected.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|beginning| name.starts_with(beginning.as_str()))
    }
}

fn number<T: std::str::FromStr>(option: &str, value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("`{option}` takes a number, not `{value}`"))
}
