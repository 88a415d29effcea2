//! The participants: how each is started in front of one prefill and one decode engine, and how its process tree is
//! measured and stopped.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::tree::{Tree, found, free_port};

/// A null engine.
pub(crate) fn null_engine(folder: &Path, port: u16, events: u32, interval: Duration) -> std::io::Result<Tree> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xpyd"));
    command.args(["sim", "null", "--null", "--port", &port.to_string()]);
    command.args(["--null-events", &events.to_string()]);
    command.args(["--null-interval", &format!("{}ms", interval.as_millis())]);
    Tree::start(command, &folder.join(format!("engine-{port}.log")))
}

/// The participants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Participant {
    /// The decode engine without a proxy.
    Base,
    Xpyd,
    /// A plain reverse proxy in front of the decode engine.
    Nginx,
    VllmRouter,
    SglangRouter,
}

impl Participant {
    pub(crate) const ALL: [Self; 5] = [
        Self::Base,
        Self::Nginx,
        Self::Xpyd,
        Self::VllmRouter,
        Self::SglangRouter,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Xpyd => "xpyd",
            Self::Nginx => "nginx (1 hop)",
            Self::VllmRouter => "vllm-router",
            Self::SglangRouter => "sglang-router",
        }
    }

    /// Whether each request must also reach the prefill engine.
    pub(crate) fn prefills(self) -> bool {
        !matches!(self, Self::Base | Self::Nginx)
    }

    /// The command that serves on `port`, or why it is unavailable.
    pub(crate) fn command(
        self,
        folder: &Path,
        port: u16,
        prefill: u16,
        decode: u16,
    ) -> Result<Option<Command>, String> {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let here = port.to_string();
        let metrics = free_port().map_err(|error| error.to_string())?.to_string();
        Ok(Some(match self {
            Self::Base => return Ok(None),
            Self::Xpyd => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_xpyd"));
                command.args([
                    "proxy",
                    "--connector",
                    "nixl",
                    "--port",
                    &here,
                    "--max-in-flight",
                    "4096",
                ]);
                command.args([
                    "--prefiller-host",
                    "127.0.0.1",
                    "--prefiller-port",
                    &prefill.to_string(),
                ]);
                command.args(["--decoder-host", "127.0.0.1", "--decoder-port", &decode.to_string()]);
                command
            }
            Self::Nginx => {
                let mut command = found("nginx")?;
                let file = folder.join("nginx.conf");
                fs::write(&file, nginx_file(folder, port, decode)).map_err(|error| error.to_string())?;
                command.arg("-c").arg(file).arg("-p").arg(folder);
                command
            }
            Self::VllmRouter => {
                let mut command = found("vllm-router")?;
                command.args([
                    "--vllm-pd-disaggregation",
                    "--prefill",
                    &url(prefill),
                    "--decode",
                    &url(decode),
                ]);
                command.args([
                    "--policy",
                    "round_robin",
                    "--port",
                    &here,
                    "--prometheus-port",
                    &metrics,
                ]);
                command.args(["--log-level", "warning", "--max-concurrent-requests", "4096"]);
                command
            }
            Self::SglangRouter => {
                let mut command = found("sglang-router")?;
                command.args(["launch", "--pd-disaggregation", "--prefill", &url(prefill), "none"]);
                command.args(["--decode", &url(decode), "--policy", "round_robin", "--port", &here]);
                command.args(["--prometheus-port", &metrics, "--log-level", "warn"]);
                command
            }
        }))
    }
}

fn nginx_file(folder: &Path, port: u16, engine: u16) -> String {
    let folder = folder.display();
    format!(
        "daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;\n\
         events {{ worker_connections 8192; }}\n\
         http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n\
         fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;\n\
         client_body_buffer_size 128k; keepalive_requests 10000000;\n\
         upstream engine {{ server 127.0.0.1:{engine}; keepalive 128; keepalive_requests 10000000; }}\n\
         server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://engine; proxy_http_version 1.1;\n\
         proxy_set_header Connection \"\"; proxy_buffering off; }} }} }}\n"
    )
}
