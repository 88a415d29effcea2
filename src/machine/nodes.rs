//! The other nodes of a Slurm allocation, on which engines can run too. Each reports its own facts, in a step of its own.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use serde::{Deserialize, Serialize};

use super::gpu::{self, GpuNode, Gpus, Path as GpuPath};
use super::{Machine, joined};
use crate::slurm::{self, Node};

/// The nodes on which engines run. By default, only this machine.
#[derive(Debug, Clone, Default)]
pub struct Nodes {
    /// This node, if there are others.
    pub this: Option<Node>,
    /// The others, with their facts.
    pub others: Vec<OtherNode>,
}

/// Another node.
#[derive(Debug, Clone)]
pub struct OtherNode {
    /// Its name and address.
    pub node: Node,
    /// Its facts, or why there are none.
    pub facts: Result<NodeFacts, String>,
}

/// What a node is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeQuestion {
    /// Whether GPUs are needed.
    pub gpus: bool,
    /// The engine's program; `None` for the simulated engine.
    pub program: Option<String>,
    /// A file that every node must see at the same path.
    pub shared_file: PathBuf,
}

/// What a node reports of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// The version of xpyd there.
    pub xpyd: String,
    /// Its GPUs, with their indices on that node.
    pub gpus: Gpus,
    /// The version of the engine, if its program was found.
    pub engine: Option<String>,
    /// Whether it sees the shared file.
    pub sees_shared_file: bool,
}

/// The facts about the node on which this runs.
pub fn facts(question: &NodeQuestion) -> NodeFacts {
    NodeFacts {
        xpyd: env!("CARGO_PKG_VERSION").to_owned(),
        gpus: if question.gpus { gpu::survey().0 } else { Gpus::NotAsked },
        engine: question.program.as_deref().and_then(super::vllm_version),
        sees_shared_file: question.shared_file.exists(),
    }
}

/// Asks all nodes at the same time.
pub fn survey(program: &Path, this: Node, others: Vec<Node>, question: &NodeQuestion) -> Nodes {
    let question = serde_json::to_string(question).unwrap_or_default();
    let others = thread::scope(|scope| {
        let asked: Vec<_> = others
            .into_iter()
            .map(|node| {
                let question = &question;
                scope.spawn(move || {
                    let facts = ask(program, &node.name, question).map_err(|error| error.to_string());
                    OtherNode { node, facts }
                })
            })
            .collect();
        asked.into_iter().map(joined).collect()
    });
    Nodes {
        this: Some(this),
        others,
    }
}

fn ask(program: &Path, node: &str, question: &str) -> io::Result<NodeFacts> {
    let words = ["node", "survey", question].map(OsStr::new);
    let argv: Vec<OsString> = slurm::step(node, &[&[program.as_os_str()], &words[..]].concat());
    let step = Command::new(&argv[0]).args(&argv[1..]).stdin(Stdio::null()).output()?;
    if !step.status.success() {
        return Err(io::Error::other(slurm::last_line(&step.stderr)));
    }
    serde_json::from_slice(&step.stdout).map_err(io::Error::from)
}

impl Machine {
    /// Adds the nodes, and their GPUs after those of this machine.
    #[must_use]
    pub fn with_nodes(mut self, nodes: Nodes) -> Self {
        let mut all = self.gpus.found().to_vec();
        for other in &nodes.others {
            let Ok(facts) = &other.facts else { continue };
            let first = all.iter().map(|gpu| gpu.index + 1).max().unwrap_or(0);
            for gpu in facts.gpus.found() {
                let mut gpu = gpu.clone();
                gpu.node = Some(GpuNode {
                    name: other.node.name.clone(),
                    index: gpu.index,
                });
                gpu.index += first;
                gpu.parent = gpu.parent.map(|parent| parent + first);
                gpu.paths = gpu.paths.into_iter().map(|(peer, path)| (peer + first, path)).collect();
                all.push(gpu);
            }
        }
        let places: Vec<(u32, Option<String>)> = all
            .iter()
            .map(|gpu| (gpu.index, gpu.node_name().map(str::to_owned)))
            .collect();
        for gpu in &mut all {
            let own = gpu.node_name().map(str::to_owned);
            let far = places.iter().filter(|(_, node)| *node != own);
            gpu.paths.extend(far.map(|(index, _)| (*index, GpuPath::Network)));
        }
        if !all.is_empty() {
            self.gpus = Gpus::Found(all);
        }
        self.nodes = nodes;
        self
    }
}
