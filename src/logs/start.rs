//! Finds where to begin to read a log: at its last lines, or at a time. A log can have gigabytes, so the last lines are searched from
//! the end, and a time by bisection.

use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::UNIX_EPOCH;

use fs_err::File;
use jiff::tz::TimeZone;

use super::lines::LineSplitter;
use super::rotation::{self, LogFilePart};
use super::stamp::{Clock, Head, Micros};

/// The size in bytes of the first search window from the end. Doubled until it has enough lines. Bisection ends at this size.
const WINDOW: u64 = 64 * 1024;

/// The distance in bytes within which a timestamp is searched: a traceback or a table between two timestamps is shorter.
const STAMP_WITHIN: u64 = 1024 * 1024;

/// By how much timestamps of one log's processes can be out of order: the precision of the coarsest, and a little more.
const DISORDER: Micros = 2_000_000;

/// The length of a line's prefix with its timestamp, colours included.
const HEAD_BYTES: usize = 256;

/// A line in a log.
#[derive(Debug)]
pub struct ReadStart {
    pub(super) part: LogFilePart,
    /// The offset in bytes of the beginning of a line.
    pub(super) offset: u64,
    /// Lines to skip from there.
    pub(super) skip: usize,
}

impl ReadStart {
    /// Finds the first line that is not older than `since`, or the last `tail` lines, or the later of both. `None` without a file.
    /// Unfinished lines do not count.
    pub fn find(log: &Path, since: Option<Micros>, tail: Option<usize>, zone: &TimeZone) -> io::Result<Option<Self>> {
        let mut parts = rotation::all(log)?;
        let mut floor = 0;
        if let Some(since) = since {
            let (index, offset) = first_since(&mut parts, since, zone)?;
            parts.drain(..index);
            floor = offset;
        }
        if let Some(count) = tail {
            return last_lines(parts, floor, count);
        }
        Ok(parts.into_iter().next().map(|part| Self {
            part,
            offset: floor,
            skip: 0,
        }))
    }
}

/// When a file was last written, to infer the year of timestamps.
pub(super) fn written(file: &File) -> Micros {
    let since = |time: std::time::SystemTime| time.duration_since(UNIX_EPOCH).ok();
    let age = file
        .metadata()
        .and_then(|metadata| metadata.modified())
        .ok()
        .and_then(since);
    age.and_then(|age| Micros::try_from(age.as_micros()).ok()).unwrap_or(0)
}

/// File index and offset of the first line since then; the end of the last file if there is none.
fn first_since(parts: &mut [LogFilePart], since: Micros, zone: &TimeZone) -> io::Result<(usize, u64)> {
    for (index, part) in parts.iter_mut().enumerate() {
        let written = written(&part.file);
        if written < since {
            continue;
        }
        let mut clock = Clock::new(written, zone.clone());
        if let Some(offset) = first_since_in(&mut part.file, since, &mut clock)? {
            return Ok((index, offset));
        }
    }
    let end = match parts.last() {
        Some(last) => last.file.metadata()?.len(),
        None => 0,
    };
    Ok((parts.len().saturating_sub(1), end))
}

fn first_since_in(file: &mut File, since: Micros, clock: &mut Clock) -> io::Result<Option<u64>> {
    let length = file.metadata()?.len();
    let (mut low, mut high) = (0, length);
    // Lines before `low` are too old. Without a near timestamp an earlier start is correct, only slower.
    while high - low > WINDOW {
        let middle = low + (high - low) / 2;
        let mut found = None;
        let until = high.min(middle + STAMP_WITHIN);
        scan(file, middle..until, true, |offset, head| {
            found = clock.stamp(&Head::of(head)).map(|time| (offset, time));
            found.is_none()
        })?;
        match found {
            Some((offset, time)) if time < since - DISORDER => low = offset,
            _ => high = middle,
        }
    }
    let mut found = None;
    let mut has_stamps = low > 0;
    scan(file, low..length, false, |offset, head| {
        let time = clock.stamp(&Head::of(head));
        has_stamps |= time.is_some();
        found = time.filter(|time| *time >= since).map(|_| offset);
        found.is_none()
    })?;
    // A file without any timestamp was written since then.
    Ok(found.or((!has_stamps).then_some(0)))
}

/// Calls `visit` with the beginning and the offset of each line in these bytes, until it returns false.
fn scan(
    file: &mut File,
    bytes: std::ops::Range<u64>,
    mut is_within_line: bool,
    mut visit: impl FnMut(u64, &[u8]) -> bool,
) -> io::Result<()> {
    file.seek(SeekFrom::Start(bytes.start))?;
    let mut reader = BufReader::with_capacity(1 << 16, file.take(bytes.end - bytes.start));
    let mut head = Vec::with_capacity(HEAD_BYTES);
    let (mut begin, mut position) = (bytes.start, bytes.start);
    loop {
        let chunk = reader.fill_buf()?;
        if chunk.is_empty() {
            return Ok(());
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let line = &chunk[..end.unwrap_or(chunk.len())];
        head.extend_from_slice(&line[..line.len().min(HEAD_BYTES - head.len())]);
        let taken = end.map_or(chunk.len(), |end| end + 1);
        reader.consume(taken);
        position += taken as u64;
        if end.is_some() {
            if !std::mem::take(&mut is_within_line) && !visit(begin, &head) {
                return Ok(());
            }
            head.clear();
            begin = position;
        }
    }
}

/// The beginning of the last `count` lines that are not before the byte `floor` of the first file.
fn last_lines(mut parts: Vec<LogFilePart>, floor: u64, count: usize) -> io::Result<Option<ReadStart>> {
    let mut missing = count;
    while let Some(mut part) = parts.pop() {
        let floor = if parts.is_empty() { floor } else { 0 };
        let end = part.file.metadata()?.len();
        let mut window = WINDOW;
        loop {
            let from = end.saturating_sub(window).max(floor);
            if let Some((offset, lines)) = count_lines(&mut part.file, from..end, from > floor)? {
                if lines >= missing || (from == floor && parts.is_empty()) {
                    let skip = lines.saturating_sub(missing);
                    return Ok(Some(ReadStart { part, offset, skip }));
                }
                if from == floor {
                    missing -= lines;
                    break;
                }
            }
            window = window.saturating_mul(2);
        }
    }
    Ok(None)
}

/// The offset of the first line that begins in these bytes, and how many lines end in them. `None` if none begins.
fn count_lines(
    file: &mut File,
    bytes: std::ops::Range<u64>,
    mut is_within_line: bool,
) -> io::Result<Option<(u64, usize)>> {
    file.seek(SeekFrom::Start(bytes.start))?;
    let mut rest = file.take(bytes.end.saturating_sub(bytes.start));
    let mut splitter = LineSplitter::default();
    let mut chunk = vec![0; 1 << 16];
    let (mut begin, mut lines) = (bytes.start, 0);
    loop {
        let read = rest.read(&mut chunk)?;
        if read == 0 {
            return Ok((!is_within_line).then_some((begin, lines)));
        }
        let mut new = &chunk[..read];
        if is_within_line {
            let Some(end) = new.iter().position(|byte| *byte == b'\n') else {
                begin += read as u64;
                continue;
            };
            new = &new[end + 1..];
            begin += end as u64 + 1;
            is_within_line = false;
        }
        splitter.feed(new, |_| lines += 1);
    }
}
