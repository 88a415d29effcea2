//! Engines on other nodes of a Slurm allocation, with programs in place of Slurm's. `tests/slurm` uses the real one.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::support::{MODEL, Run, TestEnv, completion, kill_process, wait_for, with_requests_meanwhile};

/// Slurm's programs, for the nodes n1 (127.0.0.1) and n2 (127.0.0.2). A step is a process of this machine.
const PROGRAMS: [(&str, &str); 2] = [
    (
        "scontrol",
        "if [ \"$2\" = hostnames ]; then printf 'n1\\nn2\\n'; else\n\
         printf 'NodeName=n1 NodeAddr=127.0.0.1 State=MIXED\\nNodeName=n2 NodeAddr=127.0.0.2 State=MIXED\\n'; fi",
    ),
    (
        "srun",
        "node=; while [ \"$1\" != -- ]; do case $1 in --nodelist=*) node=${1#*=};; esac; shift; done; shift\n\
         [ -e down-$node ] && { echo \"srun: error: Node $node is down\" >&2; exit 1; }\nexec \"$@\"",
    ),
];

/// A test environment in an allocation of two nodes.
struct Allocation {
    env: TestEnv,
    path: String,
}

impl Allocation {
    fn new() -> Self {
        let env = TestEnv::new();
        let folder = env.path().join("slurm");
        std::fs::create_dir(&folder).unwrap();
        for (name, script) in PROGRAMS {
            let file = folder.join(name);
            std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
        Self { env, path }
    }

    /// A command on the first node.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.env.command(arguments);
        command
            .env("PATH", &self.path)
            .env("SLURM_JOB_ID", "7")
            .env("SLURM_JOB_NODELIST", "n[1-2]")
            .env("SLURMD_NODENAME", "n1");
        command
    }

    fn up(&self) -> Run<'_> {
        let arguments = self.env.up_arguments(&["--profile", "2p2d-nixl"]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut run = Run::start_command(&self.env, self.command(&arguments));
        run.wait_until_ready();
        run
    }

    fn status(&self) -> serde_json::Value {
        let output = self.command(&["status", "--json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn engine(&self, name: &str) -> serde_json::Value {
        let status = self.status();
        let engines = status["engines"].as_array().unwrap();
        engines.iter().find(|engine| engine["id"] == name).unwrap().clone()
    }

    /// Waits until a later start of the engine serves.
    fn wait_for_restart(&self, name: &str) {
        wait_for("another start", || {
            let engine = self.engine(name);
            let is_back = engine["state"] == "ready" && engine["incarnation"].as_i64() > Some(1);
            if is_back { Ok(()) } else { Err(engine.to_string()) }
        });
    }

    /// The processes with these words in their command line.
    fn processes(&self, words: &str) -> Vec<i32> {
        let found = self.env.processes().into_iter();
        found
            .filter(|(_, line)| line.contains(words))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// The engine behind this port.
    fn server(&self, base: u16) -> i32 {
        let port = format!("--port {} ", base + self.env.offset);
        let servers: Vec<i32> = self.processes(&port);
        *servers.iter().min().unwrap()
    }

    fn stop(&self, run: Run<'_>) {
        run.signal(Signal::SIGINT);
        let (code, text) = run.end();
        assert_eq!(code, 0, "{text}");
        self.env.wait_until_empty();
        self.env.assert_no_listener();
    }
}

#[test]
fn a_fleet_runs_over_two_nodes() {
    let allocation = Allocation::new();
    let run = allocation.up();
    let places: Vec<(String, String, String)> = allocation.status()["engines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|engine| {
            let text = |key: &str| engine[key].as_str().unwrap_or("-").to_owned();
            (text("id"), text("node"), text("host"))
        })
        .collect();
    let expected = [
        ("prefiller1", "-", "127.0.0.1"),
        ("prefiller2", "n2", "127.0.0.2"),
        ("decoder1", "-", "127.0.0.1"),
        ("decoder2", "n2", "127.0.0.2"),
    ];
    assert_eq!(
        places,
        expected.map(|(id, node, host)| (id.into(), node.into(), host.into()))
    );
    let port = allocation.env.proxy_port();
    let alone = allocation.env.decode_alone(MODEL, "over two nodes");
    for _ in 0..8 {
        assert_eq!(completion(port, MODEL, "over two nodes"), alone);
    }
    assert!(
        allocation.env.log("decoder2.log").contains("127.0.0.2"),
        "its output crosses the nodes"
    );
    allocation.stop(run);
}

#[test]
fn an_engine_of_another_node_that_fails_starts_again() {
    let allocation = Allocation::new();
    let run = allocation.up();
    with_requests_meanwhile(&allocation.env, MODEL, || {
        kill_process(allocation.server(7201));
        allocation.wait_for_restart("decoder2");
    });
    let reason = allocation.env.log("xpyd.log");
    assert!(reason.contains("SIGKILL"), "it fails as the engine did: {reason}");
    allocation.stop(run);
}

#[test]
fn an_engine_whose_step_ends_starts_again() {
    let allocation = Allocation::new();
    let run = allocation.up();
    let agents = allocation.processes("node agent");
    assert_eq!(agents.len(), 2);
    for agent in agents {
        kill_process(agent);
    }
    for engine in ["prefiller2", "decoder2"] {
        allocation.wait_for_restart(engine);
    }
    let log = allocation.env.log("decoder2.log");
    assert!(log.contains("the Slurm step on node n2 ended"), "{log}");
    allocation.stop(run);
}

#[test]
fn no_engine_survives_its_relay() {
    let allocation = Allocation::new();
    let run = allocation.up();
    let engine = allocation.server(7201);
    for relay in allocation.processes("node relay") {
        kill_process(relay);
    }
    wait_for("its end", || {
        let is_there = PathBuf::from(format!("/proc/{engine}")).exists();
        if is_there { Err(String::new()) } else { Ok(()) }
    });
    allocation.wait_for_restart("decoder2");
    allocation.stop(run);
}

#[test]
fn a_node_that_does_not_answer_is_named_before_the_start() {
    let allocation = Allocation::new();
    std::fs::write(allocation.env.path().join("down-n2"), "").unwrap();
    let arguments = allocation.env.up_arguments(&["--profile", "2p2d-nixl"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = allocation.command(&arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.contains("node: n2 does not answer: srun: error: Node n2 is down"),
        "{text}"
    );
    assert_eq!(allocation.env.processes(), []);
}

/// A container inherits the variables of the job, but has no programs of Slurm.
#[test]
fn without_slurms_programs_a_node_is_a_machine() {
    let env = TestEnv::new();
    for (list, node) in [("n1", Some("n1")), ("n[1-2]", Some("n1")), ("n[1-2]", None)] {
        let mut command = env.command(&["plan", "--engine", "sim"]);
        command
            .env("PATH", env.path())
            .env("SLURM_JOB_ID", "7")
            .env("SLURM_JOB_NODELIST", list);
        node.map(|node| command.env("SLURMD_NODENAME", node));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{list}: {output:?}");
    }
}

#[test]
fn copies_of_xpyd_are_refused() {
    let allocation = Allocation::new();
    let output = allocation
        .command(&["plan"])
        .env("SLURM_STEP_NUM_TASKS", "2")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("`srun` started 2 copies of xpyd"), "{text}");
}

#[test]
fn the_batch_script_is_short() {
    let allocation = Allocation::new();
    let words = [
        "slurm",
        "render",
        "2p2d-tp2",
        "--nodes",
        "2",
        "--time",
        "4:00:00",
        "--partition=gpu",
        "--set",
        "model=a b",
        "--sbatch",
        "--exclusive",
        "--setup",
        "module load cuda",
        "--",
        "--seed",
        "1",
    ];
    let output = allocation.env.run(&words);
    let script = String::from_utf8(output.stdout).unwrap();
    let program = env!("CARGO_BIN_EXE_xpyd");
    insta::assert_snapshot!(script.replace(program, "/opt/bin/xpyd"), @r"
    #!/bin/bash
    #SBATCH --job-name=xpyd-2p2d-tp2
    #SBATCH --nodes=2
    #SBATCH --ntasks-per-node=1
    #SBATCH --gpus-per-node=4
    #SBATCH --time=4:00:00
    #SBATCH --partition=gpu
    #SBATCH --signal=B:TERM@120
    #SBATCH --output=xpyd-%j.out
    #SBATCH --exclusive
    module load cuda
    # xpyd runs on the first node, and starts engines on all of them.
    exec /opt/bin/xpyd up 2p2d-tp2 --set 'model=a b' -- --seed 1
    ");
}
