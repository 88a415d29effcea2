//! Checks the GPUs of a run with NVML: memory in use before it, on which GPUs its engines run, and whether they free their memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::fleet::EngineId;
use crate::machine::{Baseline, GpuProcess, Meter, Release};
use crate::plan::EngineSpec;
use crate::report::one_line;
use crate::supervisor::{HookFuture, Leftover, ports};
use crate::ui::time_span;

/// Time between two NVML queries while waiting for memory.
const POLL: Duration = Duration::from_millis(250);

/// Polls in a row that must find the memory free.
const STEADY_POLLS: u32 = 2;

/// Longest time a driver was seen to take to free a dead process's memory; after that a process holds it.
const RELEASE_DEADLINE: Duration = Duration::from_mins(1);

/// After this wait the user is informed.
const NOTE_AFTER: Duration = Duration::from_secs(2);

/// Memory in use before the run, by GPU UUID; kept for an xpyd that attaches.
const BASELINE_FILE: &str = "gpu-baseline.json";

/// `0, 1` for GPUs 0 and 1.
fn comma_separated(gpus: &[u32]) -> String {
    gpus.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

/// The GPUs of a run, and what is known of them.
struct GpuWatch {
    meter: Meter,
    file: PathBuf,
    known: Mutex<GpuState>,
    notes: mpsc::Sender<String>,
}

#[derive(Debug, Default)]
struct GpuState {
    baselines: BTreeMap<String, Baseline>,
    /// Processes that NVML showed on the GPUs, by engine. The ids are NVML's.
    seen: BTreeMap<EngineId, BTreeSet<u32>>,
    /// Whether the user was informed that placement cannot be checked.
    is_told: bool,
    /// Engines that were started, and their GPUs.
    running: BTreeMap<EngineId, Vec<String>>,
}

/// The GPU checks of a run; none if no engine has GPUs or NVML cannot be loaded.
pub(super) struct GpuChecks(Option<Arc<GpuWatch>>);

impl GpuChecks {
    /// Loads NVML only if an engine has GPUs. Messages for the user go to `notes`.
    pub(super) fn new(engines: &[EngineSpec], run_dir: &Path, notes: mpsc::Sender<String>) -> Self {
        if engines.iter().all(|engine| engine.gpu_uuids.is_empty()) {
            return Self(None);
        }
        match Meter::open() {
            Ok(meter) => Self(Some(Arc::new(GpuWatch::new(meter, engines, run_dir, notes)))),
            Err(reason) => {
                tracing::warn!(reason, "GPUs are not checked");
                Self(None)
            }
        }
    }

    /// Waits until the memory of earlier processes on the engine's GPUs is free.
    pub(super) fn await_memory(&self, engine: EngineSpec) -> HookFuture<Result<(), String>> {
        match self.0.clone() {
            Some(watch) => Box::pin(watch.before_start(engine)),
            None => Box::pin(std::future::ready(Ok(()))),
        }
    }

    /// Checks that NVML shows the engine on its planned GPUs.
    pub(super) fn check_placement(&self, engine: EngineSpec, leader: u32) -> HookFuture<Result<(), String>> {
        let Some(watch) = self.0.clone() else {
            return Box::pin(std::future::ready(Ok(())));
        };
        Box::pin(async move {
            let found = tokio::task::spawn_blocking(move || watch.placed(&engine, leader)).await;
            found.unwrap_or(Ok(()))
        })
    }

    /// Waits until the memory of all engines is free; returns what is still held.
    pub(super) fn await_release(
        &self,
        engines: Vec<EngineSpec>,
        force_exit: CancellationToken,
    ) -> HookFuture<Vec<Leftover>> {
        match self.0.clone() {
            Some(watch) => Box::pin(watch.released(engines, force_exit)),
            None => Box::pin(std::future::ready(Vec::new())),
        }
    }
}

impl GpuWatch {
    fn new(meter: Meter, engines: &[EngineSpec], run_dir: &Path, notes: mpsc::Sender<String>) -> Self {
        let file = run_dir.join(BASELINE_FILE);
        let kept: Option<BTreeMap<String, Baseline>> = fs_err::read(&file)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        // If an earlier xpyd wrote the file, it has started these engines.
        let running = engines.iter().filter(|_| kept.is_some());
        let running = running
            .map(|engine| (engine.id.clone(), engine.gpu_uuids.clone()))
            .collect();
        Self {
            meter,
            file,
            known: Mutex::new(GpuState {
                baselines: kept.unwrap_or_default(),
                running,
                ..GpuState::default()
            }),
            notes,
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, GpuState> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, text: String) {
        tracing::warn!(text, "gpus");
        // A reporter that is gone or busy must not delay engines.
        drop(self.notes.try_send(text));
    }

    /// Records the baseline of GPUs without an engine so far, and waits for the memory of the others.
    async fn before_start(self: Arc<Self>, engine: EngineSpec) -> Result<(), String> {
        let (is_first, earlier, fresh) = {
            let mut known = self.known();
            let is_first = known
                .running
                .insert(engine.id.clone(), engine.gpu_uuids.clone())
                .is_none();
            let is_new = |uuid: &&String| !known.baselines.contains_key(*uuid);
            let fresh: Vec<String> = engine.gpu_uuids.iter().filter(is_new).cloned().collect();
            (is_first, known.seen.remove(&engine.id).unwrap_or_default(), fresh)
        };
        if !fresh.is_empty() {
            let watch = Arc::clone(&self);
            // If NVML does not answer, these GPUs have no baseline and are not judged.
            drop(tokio::task::spawn_blocking(move || watch.take_baselines(&fresh)).await);
        }
        if is_first {
            return Ok(());
        }
        let (never, name) = (CancellationToken::new(), engine.id.to_string());
        let held = Arc::clone(&self).wait(vec![engine], earlier, &name, &never).await;
        if held.is_empty() {
            return Ok(());
        }
        let held: Vec<String> = held.iter().map(ToString::to_string).collect();
        Err(format!(
            "cannot start again: GPU memory is still in use after {} s: {}",
            RELEASE_DEADLINE.as_secs(),
            held.join(", ")
        ))
    }

    fn take_baselines(&self, uuids: &[String]) {
        for uuid in uuids {
            if let Some(usage) = self.meter.usage(uuid) {
                self.known().baselines.insert(uuid.clone(), Baseline::of(&usage));
            }
        }
        let text = serde_json::to_vec(&self.known().baselines).unwrap_or_default();
        if let Err(error) = crate::private::write(&self.file, text) {
            tracing::warn!(
                error = one_line(&error),
                "cannot write `gpu-baseline.json`: an xpyd that attaches will not know the memory in use before the run"
            );
        }
    }

    /// Whether NVML shows the engine on its planned GPUs.
    fn placed(&self, engine: &EngineSpec, leader: u32) -> Result<(), String> {
        let everywhere = self.meter.everywhere();
        let is_own = |process: &&GpuProcess| {
            process
                .local
                .as_ref()
                .is_some_and(|local| ports::belongs(local.pid, leader))
        };
        let mut on: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for (uuid, processes) in &everywhere {
            let own: Vec<u32> = processes.iter().filter(is_own).map(|process| process.pid).collect();
            if !own.is_empty() {
                on.insert(uuid, own);
            }
        }
        self.known()
            .seen
            .insert(engine.id.clone(), on.values().flatten().copied().collect());
        let mut listed = everywhere.iter().flat_map(|(_, processes)| processes).peekable();
        let blind = if listed.peek().is_none() {
            Some("NVML lists no process, as in most containers")
        } else if listed.any(|process| process.local.is_none()) {
            Some("NVML reports process ids of the host, and this is a container")
        } else {
            None
        };
        let expected = Expected {
            id: engine.id.clone(),
            uuids: engine.gpu_uuids.clone(),
        };
        match judge_placement(&expected, &on.keys().copied().collect(), blind) {
            Placement::AsPlanned => {
                tracing::info!(engine = %engine.id, gpus = comma_separated(&engine.gpus), "NVML shows the engine on its GPUs");
                Ok(())
            }
            Placement::WrongGpus(reason) => Err(reason),
            Placement::Incomplete(reason) => {
                self.note(format!("warn  gpu: {reason}"));
                Ok(())
            }
            Placement::Unknown(reason) => {
                if !std::mem::replace(&mut self.known().is_told, true) {
                    self.note(format!("warn  gpu: {reason}"));
                }
                Ok(())
            }
        }
    }

    async fn released(self: Arc<Self>, engines: Vec<EngineSpec>, force_exit: CancellationToken) -> Vec<Leftover> {
        let ours = {
            let mut known = self.known();
            known.running.clear();
            known.seen.values().flatten().copied().collect()
        };
        self.wait(engines, ours, "the fleet", &force_exit).await
    }

    /// Waits until the memory of these engines is free. Returns what is still held.
    async fn wait(
        self: Arc<Self>,
        engines: Vec<EngineSpec>,
        ours: BTreeSet<u32>,
        whose: &str,
        force_exit: &CancellationToken,
    ) -> Vec<Leftover> {
        let (began, engines, ours) = (Instant::now(), Arc::new(engines), Arc::new(ours));
        let (mut steady, mut is_told) = (0, false);
        loop {
            let (watch, asked, known) = (Arc::clone(&self), Arc::clone(&engines), Arc::clone(&ours));
            let found = tokio::task::spawn_blocking(move || watch.held_memory(&asked, &known)).await;
            let Ok((held, unknown)) = found else {
                return Vec::new();
            };
            let waited = began.elapsed();
            if held.is_empty() {
                steady += 1;
                if steady >= STEADY_POLLS {
                    tracing::info!(whose, "GPU memory is back after {}", time_span(waited));
                    if let Some(reason) = unknown {
                        self.note(format!(
                            "warn  gpu_memory: cannot tell whether {whose} freed its memory: {reason}"
                        ));
                    }
                    return Vec::new();
                }
            } else {
                steady = 0;
                if waited >= RELEASE_DEADLINE || force_exit.is_cancelled() {
                    return held;
                }
                if waited >= NOTE_AFTER && !is_told {
                    is_told = true;
                    let held: Vec<String> = held.iter().map(ToString::to_string).collect();
                    self.note(format!("waiting for the GPU memory of {whose}: {}", held.join(", ")));
                }
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = force_exit.cancelled(), if !force_exit.is_cancelled() => {}
            }
        }
    }

    /// The engines' memory that is still held, and why that is unknown for some GPUs.
    fn held_memory(&self, engines: &[EngineSpec], ours: &BTreeSet<u32>) -> (Vec<Leftover>, Option<&'static str>) {
        let (mut held, mut unknown) = (Vec::new(), None);
        let mut asked = BTreeSet::new();
        for engine in engines {
            for (index, uuid) in engine.gpus.iter().zip(&engine.gpu_uuids) {
                if !asked.insert(uuid) {
                    continue;
                }
                let (baseline, others) = {
                    let known = self.known();
                    let is_other = |(id, gpus): (&EngineId, &Vec<String>)| *id != engine.id && gpus.contains(uuid);
                    (known.baselines.get(uuid).cloned(), known.running.iter().any(is_other))
                };
                let usage = self.meter.usage(uuid);
                match baseline
                    .zip(usage)
                    .map(|(baseline, usage)| baseline.compare(&usage, ours, others))
                {
                    Some(Release::Back) => {}
                    Some(Release::Held { bytes, by }) => held.push(Leftover::GpuMemory {
                        gpu: *index,
                        bytes,
                        by: by.iter().map(ToString::to_string).collect(),
                    }),
                    Some(Release::Unknown(reason)) => unknown = Some(reason),
                    None => unknown = Some("NVML did not report its memory before the start, or does not now"),
                }
            }
        }
        (held, unknown)
    }
}

/// On which GPUs an engine runs.
#[derive(Debug, PartialEq, Eq)]
enum Placement {
    /// On all of its planned GPUs, and on no other.
    AsPlanned,
    /// On other GPUs. Holds a clause for the error.
    WrongGpus(String),
    /// Not on all of them. Holds a warning.
    Incomplete(String),
    /// NVML cannot show it. Holds a warning.
    Unknown(String),
}

/// An engine and its planned GPUs.
struct Expected {
    id: EngineId,
    uuids: Vec<String>,
}

/// Judges the placement by the GPUs on which NVML shows the engine. PURE.
fn judge_placement(engine: &Expected, on: &BTreeSet<&str>, blind: Option<&str>) -> Placement {
    let planned: BTreeSet<&str> = engine.uuids.iter().map(String::as_str).collect();
    let strange: Vec<&str> = on.difference(&planned).copied().collect();
    let missing: Vec<&str> = planned.difference(on).copied().collect();
    let id = &engine.id;
    if !strange.is_empty() {
        return Placement::WrongGpus(format!(
            "runs on {} and was planned on {}: something changed CUDA_VISIBLE_DEVICES or the order of GPUs",
            strange.join(", "),
            engine.uuids.join(", ")
        ));
    }
    if missing.is_empty() {
        return Placement::AsPlanned;
    }
    if let Some(reason) = blind.filter(|_| on.is_empty()) {
        return Placement::Unknown(format!("cannot tell on which GPUs engines run: {reason}"));
    }
    Placement::Incomplete(format!(
        "NVML shows no process of {id} on {}, where it was planned",
        missing.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placement_is_correct_only_on_the_planned_gpus() {
        let (third, fourth) = ("GPU-00000002", "GPU-00000003");
        let engine = &Expected {
            id: EngineId::named("decoder1"),
            uuids: vec![third.to_owned(), fourth.to_owned()],
        };
        let judged = |on: &[&str], blind| judge_placement(engine, &on.iter().copied().collect(), blind);
        assert_eq!(judged(&[third, fourth], None), Placement::AsPlanned);
        assert!(
            matches!(judged(&[third, "GPU-other"], Some("host")), Placement::WrongGpus(reason) if reason.contains("GPU-other"))
        );
        assert!(matches!(judged(&[third], None), Placement::Incomplete(reason) if reason.contains(fourth)));
        assert!(matches!(judged(&[], Some("a container")), Placement::Unknown(reason) if reason.contains("container")));
        assert!(matches!(judged(&[], None), Placement::Incomplete(reason) if reason.contains("no process")));
    }
}
