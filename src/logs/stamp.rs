//! Parses the prefix of a log line: timestamp, level, and process.
//!
//! The formats: vLLM `INFO 11-23 01:20:25`, without a year and in local time; LMCache and Python's logging
//! `2026-11-22 22:20:27,158`, local as well; xpyd `2026-11-22T22:20:27.158Z`. uvicorn, tracebacks and progress bars have no
//! timestamp, so a line without one has the time of the line before it. Written by hand instead of with regular expressions, because
//! a log can have millions of lines.

use jiff::civil::{Date, date};
use jiff::tz::TimeZone;

/// Microseconds since 1970.
pub type Micros = i64;

/// Names of levels in the loggers of Python and Rust.
const LEVELS: [&[u8]; 8] = [
    b"TRACE",
    b"DEBUG",
    b"INFO",
    b"WARN",
    b"WARNING",
    b"ERROR",
    b"CRITICAL",
    b"FATAL",
];

/// The prefix of a line, as slices of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Head<'line> {
    /// The process, such as `EngineCore pid=9311`.
    pub process: Option<&'line [u8]>,
    /// The level, such as `INFO`.
    pub level: Option<&'line [u8]>,
    stamp: Option<Stamp>,
}

/// An hour as written: the year if it is known, month, day, hour, and whether it is UTC.
type Hour = (Option<i16>, [i8; 3], bool);

/// A timestamp as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    year: Option<i16>,
    /// Month, day, hour.
    hour: [i8; 3],
    /// Microseconds since that hour began.
    micros: i64,
    is_utc: bool,
}

impl<'line> Head<'line> {
    /// Parses the prefix of `line`, with or without colours.
    pub fn of(line: &'line [u8]) -> Self {
        let mut rest = Cursor(line);
        let process = rest.process();
        rest.skip_decoration();
        let before = rest;
        if let Some(level) = rest.level() {
            // vLLM, or a line of uvicorn's, which has nothing after the colon.
            let stamp = if rest.skip(b':') {
                None
            } else {
                rest.stamp_without_year()
            };
            let is_level = stamp.is_some() || rest.0.first().is_none_or(|byte| *byte == b' ');
            return Self {
                process,
                level: Some(level).filter(|_| is_level),
                stamp,
            };
        }
        rest = before;
        rest.skip(b'[');
        let stamp = rest.stamp_with_year();
        // LMCache has its own name, and Python's default a dash, between time and level.
        let level = stamp.and_then(|_| {
            rest.skip_decoration();
            rest.skip_word(b"LMCache");
            rest.level()
        });
        Self { process, level, stamp }
    }
}

/// The rest of a line.
#[derive(Debug, Clone, Copy)]
struct Cursor<'line>(&'line [u8]);

impl<'line> Cursor<'line> {
    fn skip(&mut self, byte: u8) -> bool {
        let is_next = self.0.first() == Some(&byte);
        if is_next {
            self.0 = &self.0[1..];
        }
        is_next
    }

    fn skip_word(&mut self, word: &[u8]) {
        if let Some(rest) = self.0.strip_prefix(word) {
            self.0 = rest;
            self.skip_decoration();
        }
    }

    /// Skips colours, blanks and the separators between the parts of a prefix.
    fn skip_decoration(&mut self) {
        loop {
            match self.0 {
                [b' ' | b']' | b'-', rest @ ..] => self.0 = rest,
                [0x1b, b'[', rest @ ..] => {
                    let Some(end) = rest.iter().position(|byte| matches!(byte, b'@'..=b'~')) else {
                        return;
                    };
                    self.0 = &rest[end + 1..];
                }
                _ => return,
            }
        }
    }

    /// Parses the process: `(APIServer pid=9311)`.
    fn process(&mut self) -> Option<&'line [u8]> {
        let mut ahead = *self;
        ahead.skip_decoration();
        if !ahead.skip(b'(') {
            return None;
        }
        // The longest known one, `EngineCore_DP0 pid=4194304`, is much shorter.
        let end = ahead.0.iter().take(80).position(|byte| *byte == b')')?;
        let (name, rest) = (&ahead.0[..end], &ahead.0[end + 1..]);
        if !name.windows(5).any(|window| window == b" pid=") {
            return None;
        }
        self.0 = rest;
        Some(name)
    }

    fn level(&mut self) -> Option<&'line [u8]> {
        let length = self.0.iter().take(9).position(|byte| !byte.is_ascii_uppercase());
        let (word, rest) = self.0.split_at(length.unwrap_or(self.0.len().min(9)));
        if !LEVELS.contains(&word) {
            return None;
        }
        self.0 = rest;
        Some(word)
    }

    /// Parses `11-22 21:50:42`.
    fn stamp_without_year(&mut self) -> Option<Stamp> {
        self.skip_decoration();
        self.rest_of_stamp(None)
    }

    /// Parses `2026-11-22 22:20:27,158` or `2026-11-22T22:20:27.158234Z`.
    fn stamp_with_year(&mut self) -> Option<Stamp> {
        let high = self.two_digits()?;
        let low = self.two_digits()?;
        self.skip(b'-').then_some(())?;
        self.rest_of_stamp(Some(i16::from(high) * 100 + i16::from(low)))
    }

    fn rest_of_stamp(&mut self, year: Option<i16>) -> Option<Stamp> {
        let month = self.two_digits()?;
        self.skip(b'-').then_some(())?;
        let day = self.two_digits()?;
        (self.skip(b' ') || self.skip(b'T')).then_some(())?;
        let hour = self.two_digits()?;
        self.skip(b':').then_some(())?;
        let minute = self.two_digits()?;
        self.skip(b':').then_some(())?;
        let second = self.two_digits()?;
        let mut fraction = 0;
        if self.skip(b',') || self.skip(b'.') {
            let mut unit = 1_000_000;
            while let [digit @ b'0'..=b'9', rest @ ..] = self.0 {
                unit /= 10;
                fraction += i64::from(digit - b'0') * unit;
                self.0 = rest;
            }
        }
        Some(Stamp {
            year,
            hour: [month, day, hour],
            micros: (i64::from(minute) * 60 + i64::from(second)) * 1_000_000 + fraction,
            is_utc: self.skip(b'Z'),
        })
    }

    fn two_digits(&mut self) -> Option<i8> {
        let [high @ b'0'..=b'9', low @ b'0'..=b'9', rest @ ..] = self.0 else {
            return None;
        };
        self.0 = rest;
        i8::try_from((high - b'0') * 10 + (low - b'0')).ok()
    }
}

/// Converts the timestamps of one log in the order of its lines. Time never goes back, although processes write timestamps of
/// different precision and clocks can be set.
#[derive(Debug, Clone)]
pub struct Clock {
    zone: TimeZone,
    /// A time near the next timestamp, to infer its year.
    reference: Micros,
    /// The last converted hour, and its beginning.
    hour: Option<(Hour, Option<Micros>)>,
    latest: Option<Micros>,
}

impl Clock {
    /// A clock for a log that was last written at about `reference`. `zone` is the time zone of its timestamps.
    pub fn new(reference: Micros, zone: TimeZone) -> Self {
        Self {
            zone,
            reference,
            hour: None,
            latest: None,
        }
    }

    /// The time of the line with this prefix; `None` before the first timestamp.
    pub fn read(&mut self, head: &Head<'_>) -> Option<Micros> {
        if let Some(stamp) = self.stamp(head) {
            self.latest = self.latest.max(Some(stamp));
        }
        self.latest
    }

    /// The line's own timestamp.
    pub fn stamp(&mut self, head: &Head<'_>) -> Option<Micros> {
        let stamp = head.stamp?;
        let key = (stamp.year, stamp.hour, stamp.is_utc);
        let began = match self.hour {
            Some((known, began)) if known == key => began,
            _ => {
                let began = self.hour_began(&stamp);
                self.hour = Some((key, began));
                began
            }
        }?;
        let time = began + stamp.micros;
        self.reference = time;
        Some(time)
    }

    fn hour_began(&self, stamp: &Stamp) -> Option<Micros> {
        let [month, day, hour] = stamp.hour;
        let zone = if stamp.is_utc { &TimeZone::UTC } else { &self.zone };
        let in_year = |year: i16| {
            let date = Date::new(year, month, day).ok()?;
            let began = date.at(hour.min(23), 0, 0, 0).to_zoned(zone.clone()).ok()?;
            Some(began.timestamp().as_microsecond())
        };
        if let Some(year) = stamp.year {
            return in_year(year);
        }
        let near = jiff::Timestamp::from_microsecond(self.reference)
            .map_or(date(1970, 1, 1), |time| time.to_zoned(self.zone.clone()).date())
            .year();
        [near - 1, near, near + 1]
            .into_iter()
            .filter_map(in_year)
            .min_by_key(|began| began.abs_diff(self.reference))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: Option<&[u8]>) -> Option<&str> {
        bytes.map(|bytes| std::str::from_utf8(bytes).unwrap())
    }

    /// Process, level and time of a line of a log that was written last at the end of November 2026.
    fn read(line: &str) -> (Option<&str>, Option<&str>, Option<String>) {
        let head = Head::of(line.as_bytes());
        let reference: jiff::Timestamp = "2026-11-30T00:00:00Z".parse().unwrap();
        let zone = TimeZone::fixed(jiff::tz::offset(1));
        let time = Clock::new(reference.as_microsecond(), zone).stamp(&head);
        let time = time.map(|time| jiff::Timestamp::from_microsecond(time).unwrap().to_string());
        (text(head.process), text(head.level), time)
    }

    #[test]
    fn the_stamps_of_all_writers_are_read() {
        let at = |time: &str| Some(time.to_owned());
        assert_eq!(
            read("(EngineCore pid=9311) WARNING 11-22 21:50:42 [entry.py:136] slow"),
            (Some("EngineCore pid=9311"), Some("WARNING"), at("2026-11-22T20:50:42Z"))
        );
        assert_eq!(
            read("\x1b[0;36m(APIServer pid=1)\x1b[0;0m \x1b[32mINFO\x1b[0m 12-31 23:00:00 [a.py:1] b"),
            (Some("APIServer pid=1"), Some("INFO"), at("2026-12-31T22:00:00Z"))
        );
        assert_eq!(
            read("\x1b[32;20m[2026-11-22 22:20:27,158] LMCache INFO:\x1b[0m Created"),
            (None, Some("INFO"), at("2026-11-22T21:20:27.158Z"))
        );
        assert_eq!(
            read("(Worker pid=7) 2026-11-22 22:20:27,158 - ERROR - broken"),
            (Some("Worker pid=7"), Some("ERROR"), at("2026-11-22T21:20:27.158Z"))
        );
        assert_eq!(
            read("2026-11-22T22:20:27.158234Z  INFO xpyd::app: ready"),
            (None, Some("INFO"), at("2026-11-22T22:20:27.158234Z"))
        );
    }

    #[test]
    fn lines_without_a_stamp_have_none() {
        assert_eq!(
            read("INFO:     Started server process [9311]"),
            (None, Some("INFO"), None)
        );
        assert_eq!(
            read("(EngineCore pid=1) Traceback (most recent call last):"),
            (Some("EngineCore pid=1"), None, None)
        );
        for line in [
            "",
            "INFORMATION",
            "(a)",
            "11-22 21:50:42",
            "2026-11",
            "[2026-13-45 99:99:99,1] x",
            "\x1b[",
            "100%|##| 4/4",
        ] {
            assert_eq!(read(line), (None, None, None), "{line}");
        }
    }

    #[test]
    fn stamps_without_year_cross_new_year() {
        let reference: jiff::Timestamp = "2026-12-31T20:00:00Z".parse().unwrap();
        let mut clock = Clock::new(reference.as_microsecond(), TimeZone::UTC);
        let mut time = |line: &str| {
            let time = clock.read(&Head::of(line.as_bytes()))?;
            Some(jiff::Timestamp::from_microsecond(time).unwrap().to_string())
        };
        assert_eq!(time("INFO: first"), None);
        assert_eq!(time("INFO 12-31 23:59:59 [a.py:1] a").unwrap(), "2026-12-31T23:59:59Z");
        assert_eq!(time("INFO 01-01 00:00:01 [a.py:1] a").unwrap(), "2027-01-01T00:00:01Z");
        assert_eq!(
            time("INFO 01-01 00:00:00 [a.py:1] back").unwrap(),
            "2027-01-01T00:00:01Z"
        );
        assert_eq!(time("INFO: none").unwrap(), "2027-01-01T00:00:01Z");
    }

    proptest::proptest! {
        #[test]
        fn no_line_makes_it_panic(line in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..60)) {
            Head::of(&line);
        }

        #[test]
        fn no_digits_make_it_panic(line in "(INFO )?[0-9]{2,4}-[0-9]{2}-?[0-9]{0,2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2}[.,]?[0-9]{0,12}Z?") {
            Clock::new(0, TimeZone::UTC).read(&Head::of(line.as_bytes()));
        }
    }
}
