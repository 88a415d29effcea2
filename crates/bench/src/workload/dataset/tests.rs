//! Against what the real classes of vLLM 0.32 make of the same files (`tests/fixtures/bench/datasets`, by `tests/real/datasets.py`).

use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use super::super::Prompt;
use super::*;
use crate::RangeRatio;
use crate::fixtures::{fixture, tokenizer};

#[derive(Deserialize)]
struct Case {
    tokenizer: String,
    settings: Map<String, Value>,
    prompts: Option<Vec<Value>>,
    fold: String,
    lengths: Vec<u64>,
    outputs: Vec<u32>,
    times: Vec<Option<f64>>,
}

impl Case {
    fn number(&self, name: &str) -> Option<u32> {
        self.settings.get(name)?.as_i64()?.try_into().ok()
    }

    fn is(&self, name: &str) -> bool {
        self.settings.get(name) == Some(&json!(true))
    }

    fn dataset(&self, source: Source) -> Dataset {
        Dataset {
            source,
            prompt_count: self.number("count").unwrap() as usize,
            seed: self.number("seed").unwrap(),
            shuffle: !self.is("disable_shuffle") && self.settings.get("shuffle") != Some(&json!(false)),
            oversample: !self.is("no_oversample"),
        }
    }
}

fn input(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/bench/datasets");
    folder.join(name)
}

/// 64-bit FNV-1a over all prompts, each with a zero byte after it; lists are written as Python's JSON.
fn fold(prompts: &[Value]) -> String {
    let mut value = 0xcbf2_9ce4_8422_2325_u64;
    for prompt in prompts {
        let text = match prompt {
            Value::String(text) => text.clone(),
            list => list.to_string().replace(',', ", "),
        };
        for byte in text.bytes().chain([0]) {
            value = (value ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{value:016x}")
}

fn holds(vectors: &str, source: impl Fn(&Case) -> Source) {
    let cases: Vec<Case> = serde_json::from_str(vectors).unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let tokenizer = tokenizer(&case.tokenizer);
        let about = format!("{} {:?}", case.tokenizer, case.settings);
        let dataset = case.dataset(source(&case));
        let items = dataset.make(Ok(&tokenizer), &|_, _| Ok(())).unwrap().items;
        let prompts: Vec<Value> = items
            .iter()
            .map(|item| serde_json::to_value(item.prompt.as_completion()).unwrap())
            .collect();
        if let Some(expected) = &case.prompts {
            assert_eq!(prompts, *expected, "{about}");
        }
        assert_eq!(fold(&prompts), case.fold, "{about}");
        let lengths: Vec<u64> = items.iter().map(|item| item.prompt.token_count()).collect();
        assert_eq!(lengths, case.lengths, "{about}");
        let outputs: Vec<u32> = items.iter().map(|item| item.output_length).collect();
        assert_eq!(outputs, case.outputs, "{about}");
        for (item, expected) in items.iter().zip(&case.times) {
            assert_eq!(
                item.release.map(|release| (release.as_secs_f64() * 1e6).round()),
                expected.map(|seconds| (seconds * 1e6).round()),
                "{about}"
            );
        }
    }
}

#[test]
fn random_prompts_are_those_of_vllm_byte_for_byte() {
    holds(fixture!("datasets/random.json"), |case| {
        let ratio = case.settings.get("range_ratio");
        let part = |name: &str| ratio.and_then(|ratio| ratio.as_f64().or_else(|| ratio[name].as_f64()));
        Source::Random(Random {
            input_length: case.number("input_len").unwrap(),
            output_length: case.number("output_len").unwrap(),
            range_ratio: RangeRatio {
                input: part("input").unwrap_or(0.0),
                output: part("output").unwrap_or(0.0),
            },
            prefix_length: case.number("prefix_len").unwrap_or(0),
            vocabulary_size: 0x7fff,
            prompt_count: case.number("count").unwrap() as usize,
            seed: case.number("seed").unwrap(),
        })
    });
}

#[test]
fn repeated_prefixes_are_those_of_vllm_byte_for_byte() {
    holds(fixture!("datasets/prefix_repetition.json"), |case| {
        Source::PrefixRepetition(PrefixRepetition {
            prefix_length: case.number("prefix_len").unwrap(),
            suffix_length: case.number("suffix_len").unwrap(),
            prefix_count: case.number("num_prefixes").unwrap() as usize,
            output_length: case.number("output_len").unwrap(),
        })
    });
}

#[test]
fn conversations_are_filtered_shuffled_and_repeated_as_by_vllm() {
    holds(fixture!("datasets/sharegpt.json"), |case| {
        Source::ShareGpt(ShareGpt {
            path: input("sharegpt_input.json"),
            output_length: case.number("output_len"),
        })
    });
}

#[test]
fn custom_prompts_go_through_the_chat_template_as_by_vllm() {
    holds(fixture!("datasets/custom.json"), |case| {
        let settings = case.settings.get("chat_template_kwargs").and_then(Value::as_object);
        Source::Custom(Custom {
            path: input("custom_input.jsonl"),
            output_length: case.number("output_len"),
            chat_template: !case.is("skip_chat_template"),
            template_settings: settings.cloned().unwrap_or_default(),
        })
    });
}

#[test]
fn rows_of_burstgpt_are_drawn_as_pandas_draws_them() {
    holds(fixture!("datasets/burstgpt.json"), |_| {
        Source::BurstGpt(BurstGpt {
            path: input("burstgpt_input.csv"),
        })
    });
}

#[test]
fn blocks_of_a_trace_are_those_of_vllm_with_a_hash_seed_of_0() {
    holds(fixture!("datasets/timed_trace.json"), |case| {
        Source::TimedTrace(TimedTrace {
            path: input("trace_input.jsonl"),
            chunk_length: case.number("chunk").unwrap(),
            seconds_per_unit: case.settings["multiplier"].as_f64().unwrap(),
            time_field: "timestamp".to_owned(),
            input_field: "input_length".to_owned(),
            output_field: "output_length".to_owned(),
            hashes_field: "hash_ids".to_owned(),
            self_timed: true,
            hash_seed: 0,
        })
    });
}

#[test]
fn only_some_datasets_need_a_tokenizer() {
    let dataset = |source: Source| Dataset {
        source,
        prompt_count: 3,
        seed: 0,
        shuffle: true,
        oversample: true,
    };
    let custom = dataset(Source::Custom(Custom {
        path: input("custom_input.jsonl"),
        output_length: None,
        chat_template: true,
        template_settings: Map::new(),
    }));
    let product = custom.make(Err("it was skipped"), &|_, _| Ok(())).unwrap();
    assert!(matches!(&product.items[0].prompt, Prompt::Text { text, .. } if text.starts_with("Ünder ")));
    let burstgpt = dataset(Source::BurstGpt(BurstGpt {
        path: input("burstgpt_input.csv"),
    }));
    let error = burstgpt.make(Err("it was skipped"), &|_, _| Ok(())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the dataset `burstgpt` needs a tokenizer: it was skipped"
    );
}
