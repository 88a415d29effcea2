//! Machines for tests. Plans and checks are pure, so a machine is just a value.

use super::huggingface::{CacheState, Hub, Model};
use super::{
    FilesystemSpace, Gpu, GpuDriver, GpuMemory, Gpus, HuggingFace, Installation, Limit, Machine, Nodes, Pcie,
    PythonEnvironment, System, Token, TokenSource, Version,
};

impl Machine {
    /// A machine with `gpus` H100s, the model in the cache, and these versions of vLLM and LMCache.
    pub fn fixture(gpus: u32, vllm: &str, lmcache: Option<&str>) -> Self {
        let gpu = |index| Gpu {
            index,
            name: "NVIDIA H100 80GB HBM3".to_owned(),
            uuid: format!("GPU-{index:08x}"),
            memory: Some(GpuMemory {
                total: 80 << 30,
                free: 79 << 30,
                used: 1 << 29,
            }),
            processes: Some(Vec::new()),
            ..Gpu::default()
        };
        Self {
            gpus: Gpus::Found((0..gpus).map(gpu).collect()),
            driver: GpuDriver::default(),
            hugging_face: HuggingFace {
                token: Some(Token {
                    source: TokenSource::Environment("HF_TOKEN"),
                    well_formed: true,
                }),
                model: Model {
                    state: CacheState::Complete,
                    folder: Some("/hub/snapshot".into()),
                },
                hub: Hub::NotAsked("the model is in the cache".to_owned()),
                endpoint: "https://huggingface.co".to_owned(),
                cache: "/hub".into(),
                free_bytes: Some(1 << 40),
                leftovers: Vec::new(),
                similar: Vec::new(),
            },
            model: None,
            engine: Installation::Found {
                program: "/opt/venv/bin/vllm".into(),
                vllm: Version::parse(vllm),
                lmcache: lmcache.and_then(Version::parse),
                nixl: Version::parse("1.5.1"),
                has_shutdown_timeout: true,
                has_device_ids: Version::parse(vllm).is_some_and(|version| version.at_least(0, 30)),
                has_numa_bind: true,
                environment: Box::new(PythonEnvironment {
                    python: Some("/opt/venv/bin/python".into()),
                    python_version: Version::parse("3.12.3"),
                    has_lmcache_program: lmcache.is_some(),
                    ..PythonEnvironment::default()
                }),
            },
            binds_numa: false,
            cores: 16,
            available_memory_bytes: 128 << 30,
            system: System {
                open_files: Limit {
                    soft: 65_535,
                    hard: 1 << 20,
                },
                file_size: Limit {
                    soft: u64::MAX,
                    hard: u64::MAX,
                },
                locked_memory: Limit {
                    soft: u64::MAX,
                    hard: u64::MAX,
                },
                shared_memory: Some(FilesystemSpace {
                    total: 64 << 30,
                    free: 64 << 30,
                }),
                listeners: Vec::new(),
                pcie: Pcie::default(),
                has_rdma: false,
                unix_seconds: 1_790_000_000,
            },
            inherited: std::collections::BTreeMap::new(),
            xpyd: "/usr/bin/xpyd".into(),
            nodes: Nodes::default(),
        }
    }
}
