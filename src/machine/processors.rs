//! CPU time of this machine, by the kernel's counters since boot.

/// The counters at one moment, in ticks, summed over all cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processors {
    total: u64,
    idle: u64,
    stolen: u64,
}

impl Processors {
    /// The current counters; `None` if the kernel does not provide them.
    pub fn now() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/stat").ok()?)
    }

    /// Fields by proc(5): user, nice, system, idle, iowait, irq, softirq, steal. Later fields are included in the first
    /// two.
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
        Some(Self {
            total: ticks.iter().take(8).sum(),
            idle: ticks.get(3)? + ticks.get(4)?,
            stolen: *ticks.get(7)?,
        })
    }

    /// The fractions of CPU time since an earlier count, each 0 to 1: used on this machine, and used by other virtual
    /// machines. `None` if no time has passed.
    pub fn shares_since(self, before: Self) -> Option<(f64, f64)> {
        let passed = self.total.saturating_sub(before.total);
        let share = |now: u64, before: u64| now.saturating_sub(before) as f64 / passed as f64;
        let (idle, stolen) = (share(self.idle, before.idle), share(self.stolen, before.stolen));
        (passed > 0).then_some(((1.0 - idle - stolen).max(0.0), stolen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_time_between_counts() {
        let before = Processors::parse("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3\n").unwrap();
        let after = Processors::parse("cpu  150 0 60 820 60 0 0 10 7 0\n").unwrap();
        let (busy, stolen) = after.shares_since(before).unwrap();
        assert!(
            (busy - 0.6).abs() < 1e-9 && (stolen - 0.1).abs() < 1e-9,
            "{busy} {stolen}"
        );
        assert_eq!(before.shares_since(before), None);
        assert_eq!(Processors::parse("intr 5"), None);
    }

    #[test]
    fn this_machine_tells() {
        assert!(Processors::now().is_some());
    }
}
