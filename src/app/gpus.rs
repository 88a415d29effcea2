//! Watches the GPUs of a run: what was in use before it, where its engines are, and what they give back.

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
use crate::supervisor::{GpuChecks, Leftover, ports};
use crate::ui::time_span;

/// How often NVML is asked while memory is waited for.
const POLL: Duration = Duration::from_millis(250);

/// Polls in a row that must find the memory back.
const STEADY_POLLS: u32 = 2;

/// How long drivers have been seen to take apart what a process left; beyond, somebody holds it.
const CAP: Duration = Duration::from_mins(1);

/// After which wait it is told.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was in use before the run, by UUID; kept for an xpyd that takes its engines over.
const BASELINE_FILE: &str = "gpu-baseline.json";

/// `0, 1` for GPUs 0 and 1.
fn in_a_row(gpus: &[u32]) -> String {
    gpus.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

/// What is known of the GPUs of a run.
struct Watch {
    meter: Meter,
    file: PathBuf,
    known: Mutex<Known>,
    notes: mpsc::Sender<String>,
}

#[derive(Debug, Default)]
struct Known {
    baselines: BTreeMap<String, Baseline>,
    /// Processes that NVML showed on the GPUs, by engine, as NVML calls them.
    seen: BTreeMap<EngineId, BTreeSet<u32>>,
    /// Whether it was said that places cannot be told.
    is_told: bool,
    /// Engines that may run, and the GPUs that they are on.
    running: BTreeMap<EngineId, Vec<String>>,
}

/// Answers the supervisor's questions. Loads NVML only if an engine has GPUs. What people should know goes to `notes`.
pub(super) fn checks(engines: &[EngineSpec], run_dir: &Path, notes: mpsc::Sender<String>) -> GpuChecks {
    if engines.iter().all(|engine| engine.gpu_uuids.is_empty()) {
        return GpuChecks::none();
    }
    let meter = match Meter::open() {
        Ok(meter) => meter,
        Err(reason) => {
            tracing::warn!(reason, "GPUs are not watched");
            return GpuChecks::none();
        }
    };
    let file = run_dir.join(BASELINE_FILE);
    let kept: Option<BTreeMap<String, Baseline>> = fs_err::read(&file)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    // Where an earlier xpyd left it, that one has started these engines.
    let running = engines.iter().filter(|_| kept.is_some());
    let running = running
        .map(|engine| (engine.id.clone(), engine.gpu_uuids.clone()))
        .collect();
    let watch = Arc::new(Watch {
        meter,
        file,
        known: Mutex::new(Known {
            baselines: kept.unwrap_or_default(),
            running,
            ..Known::default()
        }),
        notes,
    });
    let (starts, places) = (Arc::clone(&watch), Arc::clone(&watch));
    GpuChecks {
        before_start: Box::new(move |engine| {
            let watch = Arc::clone(&starts);
            Box::pin(async move { watch.before_start(engine).await })
        }),
        placed: Box::new(move |engine, leader| {
            let watch = Arc::clone(&places);
            Box::pin(async move {
                let found = tokio::task::spawn_blocking(move || watch.placed(&engine, leader)).await;
                found.unwrap_or(Ok(()))
            })
        }),
        released: Box::new(move |engines, hurry| {
            let watch = Arc::clone(&watch);
            Box::pin(async move { watch.released(engines, hurry).await })
        }),
    }
}

impl Watch {
    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, text: String) {
        tracing::warn!(text, "gpus");
        // A reporter that is not there any more, or has much to tell, does not hold up engines.
        drop(self.notes.try_send(text));
    }

    /// Notes what is in use on GPUs that no engine was on yet, and waits for the others.
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
            // An answer that never comes back leaves these without a baseline, and nothing is claimed of them.
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
            "cannot start again: after {} s, {} is not given back",
            CAP.as_secs(),
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
                "an xpyd that takes over will not know what was in use before"
            );
        }
    }

    /// Whether NVML shows the engine where it was planned.
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
            Some("NVML lists no process at all, as in most containers")
        } else if listed.any(|process| process.local.is_none()) {
            Some("NVML tells process ids of the host, and this is a container")
        } else {
            None
        };
        let expected = Expected {
            id: engine.id.clone(),
            uuids: engine.gpu_uuids.clone(),
        };
        match judge(&expected, &on.keys().copied().collect(), blind) {
            Place::Right => {
                tracing::info!(engine = %engine.id, gpus = in_a_row(&engine.gpus), "NVML shows the engine on its GPUs");
                Ok(())
            }
            Place::Wrong(reason) => Err(reason),
            Place::Doubtful(reason) => {
                self.note(format!("warn  gpu: {reason}"));
                Ok(())
            }
            Place::Untold(reason) => {
                if !std::mem::replace(&mut self.known().is_told, true) {
                    self.note(format!("warn  gpu: {reason}"));
                }
                Ok(())
            }
        }
    }

    async fn released(self: Arc<Self>, engines: Vec<EngineSpec>, hurry: CancellationToken) -> Vec<Leftover> {
        let ours = {
            let mut known = self.known();
            known.running.clear();
            known.seen.values().flatten().copied().collect()
        };
        self.wait(engines, ours, "the fleet", &hurry).await
    }

    /// Waits until the memory of these engines is back; what is held if it is not.
    async fn wait(
        self: Arc<Self>,
        engines: Vec<EngineSpec>,
        ours: BTreeSet<u32>,
        whose: &str,
        hurry: &CancellationToken,
    ) -> Vec<Leftover> {
        let (began, engines, ours) = (Instant::now(), Arc::new(engines), Arc::new(ours));
        let (mut steady, mut is_told) = (0, false);
        loop {
            let (watch, asked, known) = (Arc::clone(&self), Arc::clone(&engines), Arc::clone(&ours));
            let standing = tokio::task::spawn_blocking(move || watch.standing(&asked, &known)).await;
            let Ok((held, unknown)) = standing else {
                return Vec::new();
            };
            let waited = began.elapsed();
            if held.is_empty() {
                steady += 1;
                if steady >= STEADY_POLLS {
                    tracing::info!(whose, "GPU memory is back after {}", time_span(waited));
                    if let Some(reason) = unknown {
                        self.note(format!(
                            "warn  gpu_memory: whether {whose} gave its memory back cannot be told: {reason}"
                        ));
                    }
                    return Vec::new();
                }
            } else {
                steady = 0;
                if waited >= CAP || hurry.is_cancelled() {
                    return held;
                }
                if waited >= PATIENCE && !is_told {
                    is_told = true;
                    let held: Vec<String> = held.iter().map(ToString::to_string).collect();
                    self.note(format!("waiting for the GPU memory of {whose}: {}", held.join(", ")));
                }
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = hurry.cancelled(), if !hurry.is_cancelled() => {}
            }
        }
    }

    /// What of the engines' memory is held, and why nothing can be said about it where nothing can.
    fn standing(&self, engines: &[EngineSpec], ours: &BTreeSet<u32>) -> (Vec<Leftover>, Option<&'static str>) {
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
                    None => unknown = Some("NVML did not tell its memory before the start, or does not now"),
                }
            }
        }
        (held, unknown)
    }
}

/// Where an engine is.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// On all of its GPUs, and nowhere else.
    Right,
    /// On others. Holds the end of a sentence.
    Wrong(String),
    /// Not on all of them. Holds a sentence.
    Doubtful(String),
    /// It cannot be told, of this engine or of any. Holds a sentence.
    Untold(String),
}

/// An engine and where it should be.
struct Expected {
    id: EngineId,
    uuids: Vec<String>,
}

/// Judges by the GPUs on which NVML shows the engine. PURE.
fn judge(engine: &Expected, on: &BTreeSet<&str>, blind: Option<&str>) -> Place {
    let planned: BTreeSet<&str> = engine.uuids.iter().map(String::as_str).collect();
    let strange: Vec<&str> = on.difference(&planned).copied().collect();
    let missing: Vec<&str> = planned.difference(on).copied().collect();
    let id = &engine.id;
    if !strange.is_empty() {
        return Place::Wrong(format!(
            "runs on {} and was planned on {}: something changed CUDA_VISIBLE_DEVICES or the order of GPUs",
            strange.join(", "),
            engine.uuids.join(", ")
        ));
    }
    if missing.is_empty() {
        return Place::Right;
    }
    if let Some(reason) = blind.filter(|_| on.is_empty()) {
        return Place::Untold(format!("on which GPUs engines run cannot be told: {reason}"));
    }
    Place::Doubtful(format!(
        "NVML shows no process of {id} on {}, where it was planned",
        missing.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_right_on_its_own_gpus_only() {
        let (third, fourth) = ("GPU-00000002", "GPU-00000003");
        let engine = &Expected {
            id: EngineId::named("decoder1"),
            uuids: vec![third.to_owned(), fourth.to_owned()],
        };
        let judged = |on: &[&str], blind| judge(engine, &on.iter().copied().collect(), blind);
        assert_eq!(judged(&[third, fourth], None), Place::Right);
        assert!(
            matches!(judged(&[third, "GPU-other"], Some("host")), Place::Wrong(reason) if reason.contains("GPU-other"))
        );
        assert!(matches!(judged(&[third], None), Place::Doubtful(reason) if reason.contains(fourth)));
        assert!(matches!(judged(&[], Some("a container")), Place::Untold(reason) if reason.contains("container")));
        assert!(matches!(judged(&[], None), Place::Doubtful(reason) if reason.contains("no process")));
    }
}
