//! Samples the GPUs periodically during a measurement, on a thread of its own.
//!
//! It only keeps sums, so a run of a day needs as much memory as one of a minute.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use nvml_wrapper::Nvml;
use tokio::time::Instant;

use super::Gpu;
use super::gpu;

/// Sampling interval. NVML itself averages over 1/6 s to 1 s (`nvmlDeviceGetUtilizationRates`).
const PERIOD: Duration = Duration::from_millis(200);

/// How long the last sample can take.
const PATIENCE: Duration = Duration::from_secs(2);

/// One sample of a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuReading {
    /// NVML's index.
    pub index: u32,
    /// Percentage of time in which a kernel ran.
    pub utilisation: f64,
    /// Power, in watts.
    pub power: f64,
    /// Memory in use, in bytes.
    pub memory: f64,
}

/// The samples of a GPU, summed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GpuTotals {
    /// NVML's index.
    pub index: u32,
    /// Product name.
    pub name: String,
    /// Number of samples.
    pub samples: u64,
    /// Sum and maximum of the utilisation, in percent.
    pub utilisation: (f64, f64),
    /// Sum and maximum of the power, in watts.
    pub power: (f64, f64),
    /// Sum and maximum of the memory in use, in bytes.
    pub memory: (f64, f64),
    /// Energy, from the power over the time between samples, in joules.
    pub energy: f64,
}

impl GpuTotals {
    fn add(&mut self, reading: GpuReading, since_last: Duration) {
        let add = |(sum, most): &mut (f64, f64), value: f64| {
            *sum += value;
            *most = most.max(value);
        };
        self.samples += 1;
        add(&mut self.utilisation, reading.utilisation);
        add(&mut self.power, reading.power);
        add(&mut self.memory, reading.memory);
        self.energy += reading.power * since_last.as_secs_f64();
    }
}

/// A thread that samples GPUs until this value is finished or dropped.
#[derive(Debug)]
pub struct GpuWatch {
    /// A message resets the sums. The end of the channel ends the thread.
    reset: Sender<()>,
    totals: Receiver<Vec<GpuTotals>>,
}

impl GpuWatch {
    /// Starts sampling the GPUs that xpyd can use; `None` if there are none, or no thread can be started.
    pub fn begin() -> Option<Self> {
        let nvml = gpu::open().ok()?;
        let gpus = gpu::usable(&nvml).ok()?;
        // Slices have no utilisation and no power of their own.
        let mut indices: Vec<u32> = gpus.iter().map(|gpu| gpu.parent.unwrap_or(gpu.index)).collect();
        indices.dedup();
        (!gpus.is_empty()).then(|| Self::over(&gpus, move || read(&nvml, &indices)))?
    }

    /// Samples by calling `read`.
    fn over(gpus: &[Gpu], read: impl FnMut() -> Vec<GpuReading> + Send + 'static) -> Option<Self> {
        let names = gpus.iter().map(|gpu| (gpu.index, gpu.name.clone())).collect();
        let (reset, orders) = channel();
        let (told, totals) = channel();
        let look = move || drop(told.send(watch(read, &names, &orders)));
        std::thread::Builder::new().name("gpus".to_owned()).spawn(look).ok()?;
        Some(Self { reset, totals })
    }

    /// Resets the sums when the measured part begins.
    pub fn reset(&self) {
        // A thread that has ended has no sums to reset.
        let _ = self.reset.send(());
    }

    /// Stops, and returns the sums.
    pub fn finish(self) -> Vec<GpuTotals> {
        drop(self.reset);
        self.totals.recv_timeout(PATIENCE).unwrap_or_default()
    }
}

/// Samples until the channel is closed.
fn watch(
    mut read: impl FnMut() -> Vec<GpuReading>,
    names: &BTreeMap<u32, String>,
    orders: &Receiver<()>,
) -> Vec<GpuTotals> {
    let mut totals: BTreeMap<u32, GpuTotals> = BTreeMap::new();
    let mut last = Instant::now();
    loop {
        let order = orders.recv_timeout(PERIOD);
        let since_last = last.elapsed();
        last = Instant::now();
        if order == Ok(()) {
            totals.clear();
            continue;
        }
        for reading in read() {
            let total = totals.entry(reading.index).or_insert_with(|| GpuTotals {
                index: reading.index,
                name: names.get(&reading.index).cloned().unwrap_or_default(),
                ..GpuTotals::default()
            });
            total.add(reading, since_last);
        }
        if order == Err(RecvTimeoutError::Disconnected) {
            return totals.into_values().collect();
        }
    }
}

/// Queries NVML. A GPU that does not answer is missing in this sample.
fn read(nvml: &Nvml, indices: &[u32]) -> Vec<GpuReading> {
    let look = |index: &u32| {
        let device = nvml.device_by_index(*index).ok()?;
        Some(GpuReading {
            index: *index,
            utilisation: f64::from(device.utilization_rates().ok()?.gpu),
            power: f64::from(device.power_usage().ok()?) / 1000.0,
            memory: device.memory_info().ok()?.used as f64,
        })
    };
    indices.iter().filter_map(look).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_and_maxima_are_computed() {
        let reading = |utilisation, power| GpuReading {
            index: 0,
            utilisation,
            power,
            memory: 1e9,
        };
        let mut totals = GpuTotals::default();
        totals.add(reading(50.0, 100.0), Duration::from_millis(500));
        totals.add(reading(100.0, 300.0), Duration::from_millis(500));
        assert_eq!(
            (totals.samples, totals.utilisation, totals.power),
            (2, (150.0, 100.0), (400.0, 300.0))
        );
        assert!((totals.energy - 200.0).abs() < 1e-9);
    }

    #[test]
    fn samples_before_the_measurement_are_dropped() {
        let gpu = Gpu {
            index: 3,
            name: "H100".to_owned(),
            uuid: "GPU-3".to_owned(),
            ..Gpu::default()
        };
        let (seen, looks) = channel();
        let mut power = 1000.0;
        let read = move || {
            seen.send(()).ok();
            power /= 10.0;
            vec![GpuReading {
                index: 3,
                utilisation: 1.0,
                power,
                memory: 2.0,
            }]
        };
        let watch = GpuWatch::over(&[gpu], read).unwrap();
        looks.recv().unwrap();
        watch.reset();
        let totals = watch.finish();
        assert_eq!((totals[0].index, totals[0].name.as_str()), (3, "H100"));
        assert!(totals[0].power.1 < 100.0, "{totals:?}");
    }
}
