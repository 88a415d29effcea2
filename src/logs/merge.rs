//! Merges several logs by time.
//!
//! Lines of one log keep their order. Between logs the earlier line comes first, and of two with the same time the one of the log
//! that was named first. New lines are merged among the new lines of the same poll.

use std::collections::VecDeque;
use std::io;
use std::path::Path;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::follow::Follower;
use super::stamp::{Clock, Head, Micros};
use super::start::{ReadStart, written};

/// The most bytes that one call of [`Merge::read_new`] returns; the last line can exceed it.
const BATCH_BYTES: usize = 1024 * 1024;

/// The least number of lines of a log that are read to find its first timestamp.
const LINES_TO_STAMP: usize = 10_000;

/// A line of one of several logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Index of the log.
    pub log: usize,
    /// Its timestamp, or that of the last line before it that has one. `None` without any.
    pub time: Option<Micros>,
    /// The bytes of the line, without its end.
    pub line: Vec<u8>,
}

/// Reads several logs, now and as they grow.
#[derive(Debug)]
pub struct Merge {
    sources: Vec<Source>,
}

#[derive(Debug)]
struct Source {
    log: usize,
    follower: Follower,
    clock: Clock,
    waiting: VecDeque<Record>,
}

impl Merge {
    /// Merges these logs. Each begins with its first line that is not older than `since`, or with its last `tail` lines, whichever is
    /// later. `zone` is the time zone of timestamps without one.
    pub fn open<'log>(
        logs: impl IntoIterator<Item = &'log Path>,
        since: Option<Micros>,
        tail: Option<usize>,
        zone: &TimeZone,
    ) -> io::Result<Self> {
        let open = |(index, path): (usize, &Path)| {
            let follower = match (since, tail) {
                (None, None) => Follower::from_start(path),
                _ => Follower::from_line(path, ReadStart::find(path, since, tail, zone)?)?,
            };
            // A file that does not exist yet will contain only new lines.
            let written =
                fs_err::File::open(path).map_or_else(|_| Timestamp::now().as_microsecond(), |file| written(&file));
            Ok(Source {
                log: index,
                follower,
                clock: Clock::new(written, zone.clone()),
                waiting: VecDeque::new(),
            })
        };
        let sources: io::Result<Vec<Source>> = logs.into_iter().enumerate().map(open).collect();
        Ok(Self { sources: sources? })
    }

    /// The new lines since the last call, up to about a megabyte. Empty only if there are none now.
    pub fn read_new(&mut self) -> io::Result<Vec<Record>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        // A log without more lines is not polled again in this call, so that a growing one does not make it endless.
        let mut is_read = vec![false; self.sources.len()];
        while bytes < BATCH_BYTES {
            for (source, is_read) in self.sources.iter_mut().zip(&mut is_read) {
                if source.waiting.is_empty() && !*is_read {
                    *is_read = !source.refill()?;
                }
            }
            let Some((first, until)) = self.earliest() else {
                break;
            };
            let source = &mut self.sources[first];
            while bytes < BATCH_BYTES
                && let Some(record) = source
                    .waiting
                    .pop_front_if(|record| until.is_none_or(|until| record.key() < until))
            {
                bytes += record.line.len() + 1;
                batch.push(record);
            }
        }
        Ok(batch)
    }

    /// The unfinished lines at the ends, if the logs are complete.
    pub fn finish(&mut self) -> Vec<Record> {
        let mut records: Vec<Record> = self
            .sources
            .iter_mut()
            .filter_map(|source| {
                let line = source.follower.finish()?;
                Some(source.record(line))
            })
            .collect();
        records.sort_by_key(Record::key);
        records
    }

    /// The log whose next line is the earliest, and the key of the earliest line of the others.
    fn earliest(&self) -> Option<(usize, Option<Key>)> {
        let mut earliest: Option<(usize, Key)> = None;
        let mut next: Option<Key> = None;
        for (index, source) in self.sources.iter().enumerate() {
            let Some(key) = source.waiting.front().map(Record::key) else {
                continue;
            };
            match earliest {
                Some((_, other)) if other < key => next = Some(next.map_or(key, |next| next.min(key))),
                _ => {
                    next = earliest.map(|(_, other)| other);
                    earliest = Some((index, key));
                }
            }
        }
        earliest.map(|(index, _)| (index, next))
    }
}

/// The sort key of records.
type Key = (Option<Micros>, usize);

impl Record {
    fn key(&self) -> Key {
        (self.time, self.log)
    }
}

impl Source {
    /// Reads more lines. Returns false if there are none now.
    fn refill(&mut self) -> io::Result<bool> {
        // The first timestamp can be a file or two away, but a log without any must not be read to its end.
        while self.waiting.len() < LINES_TO_STAMP && self.waiting.back().is_none_or(|last| last.time.is_none()) {
            let lines = self.follower.read_new()?;
            if lines.is_empty() {
                break;
            }
            for line in lines {
                let record = self.record(line);
                self.waiting.push_back(record);
            }
        }
        // Lines before the first timestamp get that timestamp.
        let undated = self.waiting.iter().take_while(|record| record.time.is_none()).count();
        let first = self.waiting.get(undated).and_then(|record| record.time);
        for record in self.waiting.iter_mut().take(undated) {
            record.time = first;
        }
        Ok(!self.waiting.is_empty())
    }

    fn record(&mut self, line: Vec<u8>) -> Record {
        Record {
            log: self.log,
            time: self.clock.read(&Head::of(&line)),
            line,
        }
    }
}
