//! Tests that the flags and clock readings of vLLM's client give the same table, file and file name.
//!
//! `tests/real/bench_capture.py` ran `vllm bench serve` 0.32.0 and kept its output and files; see the README beside the
//! captures.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::arguments::tests::{parse, server};
use crate::bench::record::{Answer, Record};
use crate::bench::{Diffusion, Extras, Probes, Report, Spec, Speculation};

struct Capture {
    name: String,
    spec: Spec,
    is_detailed: bool,
    file_name: String,
    printed: String,
    saved: Value,
    saved_text: String,
}

fn captures() -> Vec<Capture> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bench/captures");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "flags") {
            let flags = std::fs::read_to_string(&path).unwrap();
            // Python writes an infinite burstiness as invalid JSON. Both clients write an infinite rate as a string.
            let saved_text = std::fs::read_to_string(path.with_extension("json")).unwrap();
            let saved_text = saved_text.replace(": Infinity", ": \"inf\"");
            let (line, file_name) = flags.trim().split_once('\n').unwrap();
            found.push(Capture {
                name: path.file_stem().unwrap().to_str().unwrap().to_owned(),
                spec: spec(line, &saved_text),
                is_detailed: line.contains("--save-detailed"),
                file_name: file_name.to_owned(),
                printed: std::fs::read_to_string(path.with_extension("txt")).unwrap(),
                saved: serde_json::from_str(&saved_text).unwrap(),
                saved_text,
            });
        }
    }
    assert!(found.len() > 15, "only {} captures", found.len());
    found
}

/// The settings of the flags, with the server's model if they name none.
fn spec(line: &str, saved: &str) -> Spec {
    let arguments = parse(line).unwrap();
    let mut spec = arguments.spec(server()).unwrap();
    let saved: Value = serde_json::from_str(saved).unwrap();
    spec.naming.model_id = saved["model_id"].as_str().map(str::to_owned);
    spec.options.is_without_tokenizer = line.contains("--skip-tokenizer-init");
    spec.naming.tokenizer_id = saved["tokenizer_id"].as_str().map(str::to_owned);
    spec
}

fn seconds(value: &Value) -> Duration {
    Duration::try_from_secs_f64(value.as_f64().unwrap()).unwrap()
}

/// One request, as far as the file has it.
fn record(saved: &Value, index: usize) -> Record {
    let text = |key: &str| saved[key][index].as_str().unwrap_or_default().to_owned();
    let instant = |key: &str| saved[key].get(index).map_or(Duration::ZERO, seconds);
    let gaps = saved["itls"][index].as_array();
    let answer = Answer {
        first_token: instant("ttfts"),
        gaps: gaps.into_iter().flatten().map(seconds).collect(),
        latency: instant("latencies"),
        prompt_tokens: saved["input_lens"][index].as_u64(),
        completion_tokens: saved["output_lens"][index].as_u64(),
        text: text("generated_texts"),
        ..Answer::default()
    };
    let waited = instant("queue_times");
    let started = instant("start_times").max(waited);
    let released = started.saturating_sub(waited);
    let error = text("errors");
    Record {
        index,
        scheduled: released,
        released,
        admitted: started,
        started,
        result: if error.is_empty() { Ok(answer) } else { Err(error) },
    }
}

fn report(capture: &Capture) -> Report {
    let saved = &capture.saved;
    let count = saved["latencies"].as_array().unwrap().len();
    let records = (0..count).map(|index| record(saved, index)).collect();
    let lengths = (0..count).map(|index| saved["input_lens"][index].as_u64().unwrap_or(17));
    let mut report = Report::of_records(&capture.spec, lengths.collect(), records, seconds(&saved["duration"]));
    report.date = saved["date"].as_str().unwrap().to_owned();
    report.extras = Extras {
        started_at: Some(jiff::Zoned::now()),
        speculation: speculation(saved),
        diffusion: diffusion(saved),
        probes: probes(saved),
        ..Extras::default()
    };
    report
}

fn speculation(saved: &Value) -> Option<Speculation> {
    let whole = |key: &str| saved[key].as_i64().unwrap();
    let positions = saved.get("spec_decode_per_position_acceptance_rates")?.as_array()?;
    Some(Speculation {
        drafts: whole("spec_decode_num_drafts"),
        draft_tokens: whole("spec_decode_draft_tokens"),
        accepted_tokens: whole("spec_decode_accepted_tokens"),
        acceptance_rate: saved["spec_decode_acceptance_rate"].as_f64()?,
        acceptance_length: saved["spec_decode_acceptance_length"].as_f64()?,
        acceptance_by_position: positions.iter().map(|rate| rate.as_f64().unwrap()).collect(),
    })
}

fn diffusion(saved: &Value) -> Option<Diffusion> {
    Some(Diffusion {
        committed_throughput: saved["diffusion_committed_throughput"].as_f64()?,
        steps_per_canvas: saved["diffusion_steps_per_canvas"].as_f64()?,
        committed_per_step: saved["diffusion_committed_per_step"].as_f64()?,
        committed_tokens: saved["diffusion_committed_tokens"].as_i64()?,
        denoising_steps: saved["diffusion_denoising_steps"].as_f64()?,
        canvas_positions: saved["diffusion_canvas_positions"].as_i64()?,
    })
}

/// Latencies that have the numbers of the file: the median for all but the last two, from which P99 and the maximum
/// follow.
fn probes(saved: &Value) -> Option<Probes> {
    let completed = usize::try_from(saved["probe_completed"].as_u64()?).unwrap();
    let number = |key: &str| saved[key].as_f64().unwrap() / 1000.0;
    let (most, p99) = (number("probe_max_e2el_ms"), number("probe_p99_e2el_ms"));
    let place = ((completed - 1) as f64 * 0.99).fract();
    let mut latencies = vec![number("probe_median_e2el_ms"); completed];
    latencies[completed - 2] = (p99 - most * place) / (1.0 - place);
    latencies[completed - 1] = most;
    Some(Probes {
        failed: usize::try_from(saved["probe_failed"].as_u64()?).unwrap(),
        latencies,
    })
}

#[test]
fn the_same_clock_readings_give_the_same_table() {
    for capture in captures().iter().filter(|capture| capture.is_detailed) {
        let report = report(capture);
        let mut ours = report.failure_lines().join("\n");
        if !ours.is_empty() {
            ours.push('\n');
        }
        ours.push_str(&report.table());
        let is_result = |line: &&str| line.starts_with("Failed requests during") || line.starts_with("====");
        let is_output = |line: &&str| !line.starts_with("tip: install termplotlib");
        let lines: Vec<&str> = capture.printed.lines().filter(is_output).collect();
        let start = lines.iter().position(is_result).unwrap();
        assert_eq!(ours, lines[start..].join("\n"), "{}", capture.name);
    }
}

/// Asserts equality, with numbers equal to the nanosecond that a record keeps.
fn assert_close(path: &str, ours: &Value, theirs: &Value) {
    match (ours, theirs) {
        (Value::Number(ours), Value::Number(theirs)) => {
            assert_eq!(ours.is_f64(), theirs.is_f64(), "{path}: {ours}, not {theirs}");
            let (ours, theirs) = (ours.as_f64().unwrap(), theirs.as_f64().unwrap());
            let tolerance = 2e-6_f64.max(theirs.abs() * 1e-8);
            assert!((ours - theirs).abs() < tolerance, "{path}: {ours}, not {theirs}");
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(ours.len(), theirs.len(), "{path}");
            for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                assert_close(&format!("{path}[{index}]"), ours, theirs);
            }
        }
        (Value::Object(ours), Value::Object(theirs)) => {
            assert_eq!(keys(ours), keys(theirs), "{path}");
            for (key, theirs) in theirs.iter().filter(|(key, _)| *key != "timestamp") {
                assert_close(&format!("{path}.{key}"), &ours[key], theirs);
            }
        }
        _ => assert_eq!(ours, theirs, "{path}"),
    }
}

fn keys(entries: &serde_json::Map<String, Value>) -> Vec<&str> {
    entries.keys().map(String::as_str).collect()
}

#[test]
fn the_same_clock_readings_give_the_same_file() {
    for capture in &captures() {
        let mut ours = report(capture).to_json(capture.is_detailed);
        let entries = ours.as_object_mut().unwrap();
        assert_eq!(entries.keys().next_back().unwrap(), "xpyd", "{}", capture.name);
        entries.shift_remove("xpyd");
        if !capture.is_detailed {
            // The file only has latencies and waits, which do not give these numbers.
            for key in keys(capture.saved.as_object().unwrap()) {
                let is_measured = ["_ms", "_tokens", "_throughput", "_requests", "_per_s"]
                    .iter()
                    .any(|end| key.ends_with(end));
                if is_measured {
                    entries.insert(key.to_owned(), capture.saved[key].clone());
                }
            }
        }
        // The times only differ in their origin.
        if let Some(starts) = entries.get_mut("start_times") {
            *starts = capture.saved["start_times"].clone();
        }
        assert_close(&capture.name, &ours, &capture.saved);
    }
}

#[test]
fn python_writes_the_file_in_the_same_way() {
    for capture in &captures() {
        // serde_json does not read the last bit of numbers exactly, so they are compared separately.
        let mut plain = String::new();
        for (place, piece) in capture
            .saved_text
            .split_inclusive([' ', '[', ']', ',', '}'])
            .enumerate()
        {
            let word = piece.trim_end_matches([' ', '[', ']', ',', '}']);
            match word.parse::<f64>() {
                Ok(number) if word.contains(['.', 'e']) => {
                    assert_eq!(crate::bench::python_number(number), word, "{}", capture.name);
                    plain.push_str(&piece.replacen(word, &format!("{place}.5"), 1));
                }
                _ => plain.push_str(piece),
            }
        }
        let value = serde_json::from_str(&plain).unwrap();
        assert_eq!(crate::bench::python_json(&value), plain, "{}", capture.name);
    }
}

#[test]
fn the_file_has_the_same_name() {
    for capture in &captures() {
        assert_eq!(report(capture).file_name(), capture.file_name);
    }
}
