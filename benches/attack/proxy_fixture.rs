//! `xpyd proxy` in front of one prefill and one decode engine that answer at once.

use std::path::Path;
use std::process::Command;

use crate::tree::{Tree, free_port, serves};

/// A proxy and its two engines.
pub(crate) struct ProxyFixture {
    pub(crate) port: u16,
    /// Ports of the engines.
    pub(crate) prefill: u16,
    pub(crate) decode: u16,
    proxy: Tree,
    _engines: [Tree; 2],
}

impl ProxyFixture {
    /// `engine` returns the command of an engine for a port.
    pub(crate) async fn start(folder: &Path, engine: impl Fn(u16) -> Command) -> Result<Self, String> {
        let text = |error: std::io::Error| error.to_string();
        let (port, prefill, decode) = (
            free_port().map_err(text)?,
            free_port().map_err(text)?,
            free_port().map_err(text)?,
        );
        let start = |command: Command, name: &str| Tree::start(command, &folder.join(name)).map_err(text);
        let engines = [
            start(engine(prefill), "prefill.log")?,
            start(engine(decode), "decode.log")?,
        ];
        if !(serves(prefill).await && serves(decode).await) {
            return Err("the engines do not serve".to_owned());
        }
        let proxy = start(proxy(port, prefill, decode), "proxy.log")?;
        if !serves(port).await {
            return Err("xpyd does not serve".to_owned());
        }
        Ok(Self {
            port,
            prefill,
            decode,
            proxy,
            _engines: engines,
        })
    }

    /// The process of xpyd.
    pub(crate) fn pid(&self) -> u32 {
        self.proxy.root()
    }
}

fn proxy(port: u16, prefill: u16, decode: u16) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xpyd"));
    command.args(["proxy", "--connector", "nixl", "--port", &port.to_string()]);
    for (role, engine) in [("prefiller", prefill), ("decoder", decode)] {
        command.args([&format!("--{role}-host"), "127.0.0.1"]);
        command.args([&format!("--{role}-port"), &engine.to_string()]);
    }
    command.args(["--max-in-flight", "16384"]);
    command
}

/// A null engine of xpyd.
pub(crate) fn null_engine(port: u16) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xpyd"));
    command.args(["sim", "null", "--null", "--port", &port.to_string()]);
    command
}
