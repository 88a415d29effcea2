//! Against what transformers says of the same files (`tests/fixtures/bench/tokenizers.json`, by `tests/real/datasets.py`).

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Known {
    tokenizer: String,
    vocabulary_size: u32,
    special_ids: Vec<u32>,
    added_to_text: usize,
    encoded: Vec<(String, Vec<u32>, Vec<u32>)>,
    decoded: Vec<(Vec<u32>, String)>,
    vocabulary_values: usize,
}

#[test]
fn a_tokenizer_is_what_transformers_makes_of_its_files() {
    let all: Vec<Known> = serde_json::from_str(crate::fixtures::fixture!("tokenizers.json")).unwrap();
    assert_eq!(all.len(), 4);
    for known in all {
        let tokenizer = crate::fixtures::tokenizer(&known.tokenizer);
        let name = &known.tokenizer;
        assert_eq!(tokenizer.vocabulary_size(), known.vocabulary_size, "{name}");
        let mut specials: Vec<u32> = tokenizer.special_ids.iter().copied().collect();
        specials.sort_unstable();
        assert_eq!(specials, known.special_ids, "{name}");
        assert_eq!(tokenizer.added_to_text(), known.added_to_text, "{name}");
        for (text, ids, with_specials) in known.encoded {
            assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(
                tokenizer.count(&text).unwrap(),
                with_specials.len() as u64,
                "{name}: {text:?}"
            );
        }
        for (ids, text) in known.decoded {
            assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{name}: {ids:?}");
        }
        assert_eq!(tokenizer.plain_ids().len(), known.vocabulary_values, "{name}");
    }
}

#[test]
fn invalid_tokenizer_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let reason = |folder: &Path| Tokenizer::load("some", folder).unwrap_err().to_string();
    assert!(reason(folder.path()).contains("has no `tokenizer.json`"));
    std::fs::write(folder.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    assert!(reason(folder.path()).contains("tokenizer.json: "));
    std::fs::write(folder.path().join("tokenizer.json"), "[]").unwrap();
    assert!(reason(folder.path()).contains("tokenizer.json: invalid type: sequence"));
}
