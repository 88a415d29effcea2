//! `--write-endpoints`: the engines that serve, in a file in llm-d's format, for other proxies (llm-d-router, docs/discovery.md).

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::watch;

use crate::fleet::{FleetView, Role};

/// Keeps the file equal to the view. Dropped, it removes the file.
#[derive(Debug)]
pub(super) struct EndpointsFile(PathBuf);

impl Drop for EndpointsFile {
    fn drop(&mut self) {
        // It does not exist before the first engine serves.
        let _ = fs_err::remove_file(&self.0);
    }
}

impl EndpointsFile {
    pub(super) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Writes the file with each change, until the fleet has ended.
    pub(super) async fn follow(self, mut view: watch::Receiver<Arc<FleetView>>) {
        let mut written = String::new();
        loop {
            let text = text(&view.borrow_and_update());
            if text != written {
                if let Err(error) = replace(&self.0, &text) {
                    tracing::warn!(%error, "the list of engines is not written");
                }
                written = text;
            }
            if view.changed().await.is_err() {
                return;
            }
        }
    }
}

/// The file's content. Names are plain words, and addresses are quoted: those of IPv6 have colons.
fn text(view: &FleetView) -> String {
    let mut text = String::from("endpoints:\n");
    for role in [Role::Prefill, Role::Decode] {
        for engine in view.serving(role).filter(|_| view.stage.serves()) {
            let (host, port) = (&engine.endpoint.host, engine.endpoint.port);
            // Writing to a string does not fail.
            let _ = write!(
                text,
                "  - name: {}\n    address: \"{host}\"\n    port: \"{port}\"\n    labels: {{llm-d.ai/role: {role}}}\n",
                engine.id
            );
        }
    }
    text
}

/// Replaces the file at once, so that a reader never sees half of it.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    fs_err::write(&new, text)?;
    fs_err::rename(new, path)
}
