//! `<engine>.spawn.json`: how an engine was started, for later debugging. Without secrets.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::Serialize;

use crate::fleet::Incarnation;
use crate::plan::{EngineSpec, redacted_argv, redacted_env};
use crate::private;

#[derive(Debug, Serialize)]
struct SpawnRecord<'a> {
    engine: &'a str,
    incarnation: Incarnation,
    pid: u32,
    time: String,
    run: &'a str,
    argv: Vec<String>,
    env: BTreeMap<String, String>,
    gpus: &'a [u32],
    log: &'a Path,
}

/// Writes the record of one start into the folder `folder`.
pub(super) fn write(folder: &Path, run: &str, spec: &EngineSpec, incarnation: Incarnation, pid: u32) -> io::Result<()> {
    let record = SpawnRecord {
        engine: spec.id.as_str(),
        incarnation,
        pid,
        time: jiff::Timestamp::now().to_string(),
        run,
        argv: redacted_argv(&spec.argv),
        env: redacted_env(&spec.env),
        gpus: &spec.gpus,
        log: &spec.log_file,
    };
    let mut text = serde_json::to_vec_pretty(&record)?;
    text.push(b'\n');
    private::write(&folder.join(format!("{}.spawn.json", spec.id)), text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::state::tests::engine;

    #[test]
    fn no_secret_reaches_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut spec = engine("decoder1", &[3]);
        let argv = [
            "vllm",
            "--api-key",
            "swordfish",
            "--api-key=swordfish",
            "hf_swordfish",
            "--port",
            "7200",
        ];
        spec.argv = argv.map(str::to_owned).to_vec();
        for (name, value) in [
            ("HF_TOKEN", "swordfish"),
            ("OPENAI_API_KEY", "swordfish"),
            ("my_secret", "swordfish"),
            ("HARMLESS", "hf_swordfish"),
            ("CUDA_VISIBLE_DEVICES", "3"),
        ] {
            spec.env.insert(name.to_owned(), value.to_owned());
        }
        write(folder.path(), "run", &spec, Incarnation::FIRST, 7).unwrap();
        let text = std::fs::read_to_string(folder.path().join("decoder1.spawn.json")).unwrap();
        assert!(!text.contains("swordfish"), "{text}");
        let record: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(record["env"]["CUDA_VISIBLE_DEVICES"], "3");
        assert_eq!(record["argv"][6], "7200");
        assert_eq!(record["pid"], 7);
    }
}
