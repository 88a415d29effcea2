//! Tests of event reading, parsed and scanned.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::record::ServerTimings;

fn milliseconds(value: u64) -> Duration {
    Duration::from_millis(value)
}

fn read_with(texts: TextPolicy, events: &[(&str, u64)]) -> Result<Answer, String> {
    let is_chat = events.iter().any(|(event, _)| event.contains("\"delta\""));
    let backend = if is_chat { Backend::Chat } else { Backend::Completions };
    let scanner = Scanner::new(texts, backend);
    let mut read = Events::default();
    let outcome = events
        .iter()
        .try_for_each(|(event, at)| read.take(&scanner, b"", event.as_bytes(), milliseconds(*at)));
    outcome
        .and_then(|()| read.finish(&scanner))
        .map_err(|error| xpyd_base::report::one_line(&error))
}

/// The answer, which must be the same under every text policy, except for the text.
fn read(events: &[(&str, u64)]) -> Result<Answer, String> {
    let kept = read_with(TextPolicy::Keep, events);
    let text = kept.as_ref().map(|answer| answer.text.clone()).unwrap_or_default();
    let scanned = read_with(TextPolicy::Drop, events).map(|answer| Answer { text, ..answer });
    assert_eq!(scanned, kept);
    let counted = read_with(TextPolicy::Count, events);
    let tells = kept.as_ref().is_ok_and(|answer| answer.completion_tokens.is_some());
    let expected = kept.clone().map(|answer| Answer {
        text: if tells { String::new() } else { answer.text },
        ..answer
    });
    assert_eq!(counted, expected);
    kept
}

#[test]
fn latencies_end_at_the_last_chunk_with_a_choice() {
    let answer = read(&[
        (r#"{"choices":[{"text":"a"}]}"#, 100),
        (r#"{"choices":[{"text":""}],"usage":null}"#, 110),
        (r#"{"choices":[{"text":"b","finish_reason":"length"}]}"#, 125),
        (
            r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}"#,
            500,
        ),
        ("[DONE]", 600),
    ]);
    let expected = Answer {
        first_token: milliseconds(100),
        gaps: vec![milliseconds(10), milliseconds(15)],
        latency: milliseconds(125),
        prompt_tokens: Some(7),
        completion_tokens: Some(5),
        text: "ab".to_owned(),
        timings: ServerTimings::default(),
        ..Answer::default()
    };
    assert_eq!(answer, Ok(expected));
}

#[test]
fn a_chat_chunk_that_only_names_the_role_is_no_token() {
    let chunk = |delta: &str| format!(r#"{{"choices":[{{"delta":{delta}}}]}}"#);
    let deltas = [
        r#"{"role":"assistant","content":""}"#,
        r#"{"reasoning":"hm"}"#,
        r#"{"content":""}"#,
        r#"{"content":"hi"}"#,
        r#"{"role":"assistant","content":""}"#,
        r#"{"content":[{"type":"text","text":" you"}]}"#,
        r#"{"tool_calls":[{}]}"#,
        "{}",
    ]
    .map(chunk);
    let mut events: Vec<(&str, u64)> = deltas.iter().map(String::as_str).zip(1..).collect();
    events.push(("[DONE]", 20));
    let answer = read(&events[1..]).unwrap();
    assert_eq!((answer.first_token.as_millis(), answer.gaps.len()), (2, 4));
    let answer = read_with(TextPolicy::Keep, &events).unwrap();
    assert_eq!((answer.first_token.as_millis(), answer.latency.as_millis()), (2, 7));
    assert_eq!((answer.gaps.len(), answer.text.as_str()), (4, "hi you"));
    let only_a_role = read(&[events[0], ("[DONE]", 20)]);
    assert_eq!(only_a_role.unwrap_err(), "the stream ended without a token");
}

#[test]
fn failure_finish_reasons_fail_the_request() {
    let token = (r#"{"choices":[{"text":"a","finish_reason":null}]}"#, 1);
    for reason in [
        r#""error""#,
        r#""abort""#,
        r#""Cancelled""#,
        r#"{"type":"abort","message":"x"}"#,
    ] {
        let end = format!(r#"{{"choices":[{{"text":"","finish_reason":{reason}}}]}}"#);
        let second =
            format!(r#"{{"choices":[{{"text":"b","finish_reason":null}},{{"text":"","finish_reason":{reason}}}]}}"#);
        for last in [&end, &second] {
            let error = read(&[token, (last, 2), ("[DONE]", 3)]).unwrap_err();
            assert!(
                error.starts_with("the server ended the answer with `finish_reason` `"),
                "{error}"
            );
        }
    }
    let mut named = Events::default();
    let scanner = Scanner::new(TextPolicy::Drop, Backend::Completions);
    let error = named
        .take(&scanner, b"error", b"out of luck", milliseconds(1))
        .unwrap_err();
    assert_eq!(error.to_string(), "the server failed during the stream: out of luck");
}

#[test]
fn an_answer_is_complete_with_a_finish_reason_or_done() {
    let token = (r#"{"choices":[{"text":"a"}]}"#, 1);
    for reason in ["stop", "length", "eos_token", "content_filter", "tool_calls"] {
        let end = format!(r#"{{"choices":[{{"text":"b","finish_reason":"{reason}"}}]}}"#);
        assert_eq!(read(&[token, (&end, 2)]).unwrap().gaps.len(), 1);
    }
    read(&[token, ("[DONE]", 2)]).unwrap();
}

#[test]
fn tokens_of_a_chunk_are_counted_by_their_ids() {
    let answer = read(&[
        (r#"{"choices":[{"text":"a","token_ids":[5]}]}"#, 1),
        (r#"{"choices":[{"text":"b c d","token_ids":[6, 7,8]}]}"#, 2),
        (r#"{"choices":[{"text":"","token_ids":[ ]}]}"#, 3),
        ("[DONE]", 3),
    ]);
    assert_eq!(answer.unwrap().chunk_tokens, [1, 3, 0]);
}

#[test]
fn tokens_of_a_chunk_are_counted_by_continuous_usage() {
    let answer = read(&[
        (
            r#"{"choices":[{"text":"a"}],"usage":{"prompt_tokens":7,"completion_tokens":1}}"#,
            1,
        ),
        (
            r#"{"choices":[{"text":"b c"}],"usage":{"prompt_tokens":7,"completion_tokens":3}}"#,
            2,
        ),
        (r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}"#, 3),
        ("[DONE]", 3),
    ]);
    let answer = answer.unwrap();
    assert_eq!((answer.chunk_tokens, answer.completion_tokens), (vec![1, 2], Some(3)));
}

#[test]
fn a_partial_token_count_is_ignored() {
    let answer = read(&[
        (r#"{"choices":[{"text":"a","token_ids":[5]}]}"#, 1),
        (r#"{"choices":[{"text":"b"}]}"#, 2),
        (r#"{"choices":[{"text":"c","token_ids":[5]}]}"#, 3),
        ("[DONE]", 3),
    ]);
    assert!(answer.unwrap().chunk_tokens.is_empty());
}

#[test]
fn an_incomplete_stream_fails_with_the_reason() {
    let token = (r#"{"choices":[{"text":"a"}]}"#, 1);
    assert_eq!(read(&[("[DONE]", 1)]).unwrap_err(), "the stream ended without a token");
    assert_eq!(read(&[token]).unwrap_err(), "the stream ended early, without `[DONE]`");
    let error = (r#"{"error":{"message":"decoder1 died","code":502}}"#, 2);
    assert_eq!(
        read(&[token, error]).unwrap_err(),
        "the server failed during the stream: decoder1 died"
    );
    assert!(
        read(&[token, ("{", 1)])
            .unwrap_err()
            .starts_with("the stream contains an event that is not a completion chunk: ")
    );
}

#[test]
fn late_reads_are_counted_apart_from_times() {
    let scanner = Scanner::new(TextPolicy::Drop, Backend::Completions);
    let started = Instant::now();
    let mut reader = ResponseReader::new(&scanner, started);
    for (at, waited) in [(10, 4), (20, 1)] {
        let timestamp = RxTimestamp {
            at: started + milliseconds(at),
            waited: Some(milliseconds(waited)),
        };
        reader
            .feed(b"data: {\"choices\":[{\"text\":\"a\"}]}\n\n", timestamp)
            .unwrap();
    }
    let timestamp = RxTimestamp {
        at: started + milliseconds(30),
        waited: None,
    };
    reader.feed(b"data: [DONE]\n\n", timestamp).unwrap();
    let answer = reader.finish().unwrap();
    assert_eq!(
        (answer.first_token, answer.latency),
        (milliseconds(10), milliseconds(20))
    );
    let read_delay = answer.read_delay;
    assert_eq!((read_delay.reads, read_delay.unknown), (2, 1));
    assert_eq!((read_delay.total, read_delay.most), (milliseconds(5), milliseconds(4)));
}

proptest! {
    /// Texts with the names that the scanner looks for, quotes and braces.
    #[test]
    fn scanning_equals_parsing(
        texts in prop::collection::vec(
            prop_oneof![
                "[a-z\"\\\\:{}\\[\\], ]{0,12}",
                Just("\"error\":{\"message\":1}".to_owned()),
                Just("\\\"usage\":{}".to_owned()),
                Just("\"choices\":[]".to_owned()),
                Just("\"token_ids\":[1,2]".to_owned()),
            ],
            1..8,
        ),
        is_spaced: bool,
        has_ids: bool,
        usage in prop::sample::select(vec![None, Some(json!(null)), Some(json!({"completion_tokens": 4}))]),
    ) {
        let events: Vec<String> = texts.iter().enumerate().map(|(index, text)| {
            let mut choice = json!({"index": 0, "text": text, "finish_reason": null});
            if has_ids {
                choice["token_ids"] = json!(vec![7; index % 3]);
            }
            let mut event = json!({"id": "cmpl-1", "choices": [choice]});
            if let Some(usage) = &usage {
                event["usage"] = usage.clone();
            }
            if is_spaced {
                let spaced = serde_json::to_string_pretty(&event).unwrap();
                spaced.replace('\n', " ")
            } else {
                event.to_string()
            }
        }).collect();
        let mut events: Vec<(&str, u64)> = events.iter().map(String::as_str).zip(1..).collect();
        events.push(("[DONE]", 99));
        read(&events).unwrap();
    }
}
