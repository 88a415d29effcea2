//! A `libnvidia-ml.so` that reports the contents of a file. Tests build it with `rustc` and let xpyd load it.
//!
//! `XPYD_FAKE_NVML` names the file, a subset of TOML: `[sections]`, and `key = value` with numbers, `true` and `"texts"`.
//! `[gpu.0]`, `[gpu.0.process.0]` and `[gpu.0.mig.0]` describe GPUs. With `[engines]`, workers of running engines use memory
//! on the GPUs of their `CUDA_VISIBLE_DEVICES`. `fail = "nvmlName,…"` makes calls fail.
#![allow(non_snake_case, clippy::missing_safety_doc)]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_ulonglong, c_void};
use std::sync::Mutex;
use std::time::{Duration, Instant};

const SUCCESS: c_uint = 0;
const INVALID_ARGUMENT: c_uint = 2;
const NOT_SUPPORTED: c_uint = 3;
const NOT_FOUND: c_uint = 6;
const INSUFFICIENT_SIZE: c_uint = 7;
const UNKNOWN: c_uint = 999;

/// The contents of the file: section and key, with the value as text.
type Script = BTreeMap<(String, String), String>;

fn script() -> Script {
    let path = std::env::var("XPYD_FAKE_NVML").unwrap_or_default();
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let (mut script, mut section) = (Script::new(), String::new());
    for line in text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
    {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name.to_owned();
            script.insert((section.clone(), String::new()), String::new());
        } else if let Some((key, value)) = line.split_once('=') {
            let value = value.trim().trim_matches('"').to_owned();
            script.insert((section.clone(), key.trim().to_owned()), value);
        }
    }
    script
}

fn text(section: &str, key: &str) -> Option<String> {
    script().remove(&(section.to_owned(), key.to_owned()))
}

fn number(section: &str, key: &str) -> Option<u64> {
    text(section, key)?.parse().ok()
}

fn exists(section: &str) -> bool {
    script().contains_key(&(section.to_owned(), String::new()))
}

/// The error code of a call that must fail.
fn failure(call: &str) -> Option<c_uint> {
    let fails = text("", "fail")?.split(',').any(|name| name.trim() == call);
    fails.then(|| number("", "fail_with").map_or(UNKNOWN, |code| code as c_uint))
}

/// A GPU or a MIG slice. Its handle is its number plus one.
#[derive(Clone, Copy, PartialEq)]
struct Device {
    card: usize,
    slice: Option<usize>,
}

impl Device {
    fn of(handle: *mut c_void) -> Self {
        let number = handle as usize - 1;
        Self {
            card: number % 1000,
            slice: (number / 1000).checked_sub(1),
        }
    }

    fn handle(self) -> *mut c_void {
        (self.card + 1 + self.slice.map_or(0, |slice| (slice + 1) * 1000)) as *mut c_void
    }

    fn section(self) -> String {
        match self.slice {
            Some(slice) => format!("gpu.{}.mig.{slice}", self.card),
            None => format!("gpu.{}", self.card),
        }
    }

    fn uuid(self) -> String {
        let kind = if self.slice.is_some() { "MIG" } else { "GPU" };
        let slice = self.slice.map_or(0, |slice| slice + 1);
        text(&self.section(), "uuid").unwrap_or_else(|| format!("{kind}-{:08x}-0000-0000-0000-{slice:012x}", self.card))
    }

    fn node(self) -> u64 {
        number(&format!("gpu.{}", self.card), "numa").unwrap_or(0)
    }

    fn lists(self, key: &str, other: Self) -> bool {
        let peers = text(&self.section(), key).unwrap_or_default();
        peers.split(',').any(|peer| peer.trim().parse() == Ok(other.card))
    }
}

fn cards() -> usize {
    (0..).take_while(|card| exists(&format!("gpu.{card}"))).count()
}

fn devices() -> Vec<Device> {
    let slices = |card| {
        (0..7)
            .map(move |slice| Device {
                card,
                slice: Some(slice),
            })
            .filter(|device| exists(&device.section()))
    };
    (0..cards())
        .flat_map(|card| std::iter::once(Device { card, slice: None }).chain(slices(card)))
        .collect()
}

/// A worker of an engine, and the time of its end.
struct Worker {
    uuid: String,
    gone: Option<Instant>,
}

static WORKERS: Mutex<BTreeMap<u32, Worker>> = Mutex::new(BTreeMap::new());

/// The process ids on the device and their memory in MiB.
fn processes(device: Device) -> Vec<(u32, u64)> {
    let named = (0..)
        .map(|process| format!("{}.process.{process}", device.section()))
        .take_while(|section| exists(section))
        .map(|section| {
            (
                number(&section, "pid").unwrap_or(1) as u32,
                number(&section, "mib").unwrap_or(u64::MAX),
            )
        });
    let mut found: Vec<(u32, u64)> = named.collect();
    let Some(size) = number("engines", "mib") else {
        return found;
    };
    let offset = number("engines", "pid_offset").unwrap_or(0) as u32;
    let lag = Duration::from_millis(number("engines", "lag_ms").unwrap_or(0));
    let mut workers = WORKERS.lock().unwrap();
    remember(&mut workers);
    workers.retain(|_, worker| worker.gone.is_none_or(|gone| gone.elapsed() < lag));
    let uuid = device.uuid();
    found.extend(
        workers
            .iter()
            .filter(|(_, worker)| worker.uuid == uuid)
            .map(|(pid, _)| (pid + offset, size)),
    );
    found
}

fn remember(workers: &mut BTreeMap<u32, Worker>) {
    let own = std::env::var("XPYD_FAKE_NVML").unwrap_or_default();
    let (all, shift) = (devices(), number("engines", "shift").unwrap_or(0) as usize);
    let mut turns: BTreeMap<String, usize> = BTreeMap::new();
    let mut alive = Vec::new();
    let mut pids: Vec<u32> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    for pid in pids {
        let read = |file: &str| {
            let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        if !read("cmdline").contains("--child\0worker") {
            continue;
        }
        let environment = read("environ");
        let variable = |name: &str| {
            environment
                .split('\0')
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        };
        if variable("XPYD_FAKE_NVML") != Some(own.as_str()) {
            continue;
        }
        let visible = variable("CUDA_VISIBLE_DEVICES").unwrap_or_default().to_owned();
        let parent = read("stat")
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split(' ').nth(1).unwrap_or("").to_owned());
        let turn = turns.entry(parent.unwrap_or_default()).or_default();
        let entry = visible.split(',').nth(*turn).unwrap_or_default();
        *turn += 1;
        let position = all
            .iter()
            .position(|device| device.uuid() == entry || device.card.to_string() == entry);
        if let Some(position) = position {
            alive.push(pid);
            let uuid = all[(position + shift) % all.len()].uuid();
            workers.entry(pid).or_insert(Worker { uuid, gone: None });
        }
    }
    for (pid, worker) in workers.iter_mut() {
        if !alive.contains(pid) {
            worker.gone.get_or_insert_with(Instant::now);
        }
    }
}

/// Runs a call, unless it must fail.
fn answer(call: &str, work: impl FnOnce() -> Result<(), c_uint>) -> c_uint {
    match failure(call) {
        Some(code) => code,
        None => work().err().unwrap_or(SUCCESS),
    }
}

unsafe fn write_text(text: &str, buffer: *mut c_char, length: c_uint) -> Result<(), c_uint> {
    if text.len() >= length as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, text.len());
        *buffer.add(text.len()) = 0;
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> c_uint {
    answer("nvmlInit_v2", || Ok(()))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInitWithFlags(_flags: c_uint) -> c_uint {
    answer("nvmlInit_v2", || Ok(()))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> c_uint {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(buffer: *mut c_char, length: c_uint) -> c_uint {
    answer("nvmlSystemGetDriverVersion", || unsafe {
        write_text(
            &text("", "driver").unwrap_or_else(|| "570.86.15".to_owned()),
            buffer,
            length,
        )
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetCudaDriverVersion_v2(version: *mut c_int) -> c_uint {
    answer("nvmlSystemGetCudaDriverVersion_v2", || {
        unsafe { *version = number("", "cuda").unwrap_or(12_080) as c_int };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> c_uint {
    answer("nvmlDeviceGetCount_v2", || {
        unsafe { *count = cards() as c_uint };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut *mut c_void) -> c_uint {
    answer("nvmlDeviceGetHandleByIndex_v2", || {
        let found = Device {
            card: index as usize,
            slice: None,
        };
        if let Some(code) = number(&found.section(), "lost") {
            return Err(code as c_uint);
        }
        unsafe { *device = found.handle() };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, device: *mut *mut c_void) -> c_uint {
    answer("nvmlDeviceGetHandleByUUID", || {
        let wanted = unsafe { CStr::from_ptr(uuid) }.to_string_lossy().into_owned();
        let found = devices()
            .into_iter()
            .find(|device| device.uuid() == wanted)
            .ok_or(NOT_FOUND)?;
        unsafe { *device = found.handle() };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(device: *mut c_void, buffer: *mut c_char, length: c_uint) -> c_uint {
    answer("nvmlDeviceGetName", || {
        let name = text(&Device::of(device).section(), "name").unwrap_or_else(|| "NVIDIA H100 80GB HBM3".to_owned());
        unsafe { write_text(&name, buffer, length) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: *mut c_void, buffer: *mut c_char, length: c_uint) -> c_uint {
    answer("nvmlDeviceGetUUID", || unsafe {
        write_text(&Device::of(device).uuid(), buffer, length)
    })
}

/// `nvmlMemory_v2_t`.
#[repr(C)]
pub struct Memory {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: *mut c_void, memory: *mut Memory) -> c_uint {
    answer("nvmlDeviceGetMemoryInfo_v2", || {
        let device = Device::of(device);
        let held: u64 = processes(device)
            .iter()
            .map(|(_, mib)| if *mib == u64::MAX { 0 } else { *mib })
            .sum();
        let total = number(&device.section(), "total_mib").unwrap_or(81_559) << 20;
        let reserved = 600 << 20;
        let used = (number(&device.section(), "used_mib").unwrap_or(4) + held) << 20;
        let memory = unsafe { &mut *memory };
        (memory.total, memory.reserved, memory.used) = (total, reserved, used);
        memory.free = total.saturating_sub(used + reserved);
        Ok(())
    })
}

/// `nvmlProcessInfo_v2_t`, which is also what `_v3` of the call fills in.
#[repr(C)]
pub struct Process {
    pid: c_uint,
    memory: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: *mut c_void,
    count: *mut c_uint,
    into: *mut Process,
) -> c_uint {
    answer("nvmlDeviceGetComputeRunningProcesses_v3", || {
        let found = processes(Device::of(device));
        let room = unsafe { std::mem::replace(&mut *count, found.len() as c_uint) } as usize;
        if found.len() > room || into.is_null() {
            return if found.is_empty() {
                Ok(())
            } else {
                Err(INSUFFICIENT_SIZE)
            };
        }
        for (position, (pid, mib)) in found.into_iter().enumerate() {
            let memory = if mib == u64::MAX { mib } else { mib << 20 };
            let process = Process {
                pid,
                memory,
                gpu_instance: c_uint::MAX,
                compute_instance: c_uint::MAX,
            };
            unsafe { into.add(position).write(process) };
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMPSComputeRunningProcesses_v3(
    _device: *mut c_void,
    count: *mut c_uint,
    _into: *mut Process,
) -> c_uint {
    answer("nvmlDeviceGetMPSComputeRunningProcesses_v3", || {
        unsafe { *count = 0 };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(device: *mut c_void, now: *mut c_uint, pending: *mut c_uint) -> c_uint {
    answer("nvmlDeviceGetMigMode", || {
        let is_on = exists(&format!("gpu.{}.mig.0", Device::of(device).card));
        unsafe { (*now, *pending) = (is_on.into(), is_on.into()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxMigDeviceCount(_device: *mut c_void, count: *mut c_uint) -> c_uint {
    unsafe { *count = 7 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    device: *mut c_void,
    slice: c_uint,
    into: *mut *mut c_void,
) -> c_uint {
    let found = Device {
        slice: Some(slice as usize),
        ..Device::of(device)
    };
    if !exists(&found.section()) {
        return NOT_FOUND;
    }
    unsafe { *into = found.handle() };
    SUCCESS
}

/// `nvmlPciInfo_t`.
#[repr(C)]
pub struct Pci {
    legacy_id: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    device_id: c_uint,
    subsystem_id: c_uint,
    id: [c_char; 32],
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(device: *mut c_void, place: *mut Pci) -> c_uint {
    answer("nvmlDeviceGetPciInfo_v3", || unsafe {
        write_place(Device::of(device), place)
    })
}

unsafe fn write_place(device: Device, place: *mut Pci) -> Result<(), c_uint> {
    let id = format!("00000000:{:02X}:00.0", 0x10 + device.card);
    unsafe { write_text(&id, (*place).id.as_mut_ptr(), 32) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryAffinity(
    device: *mut c_void,
    size: c_uint,
    mask: *mut c_ulong,
    _scope: c_uint,
) -> c_uint {
    answer("nvmlDeviceGetMemoryAffinity", || {
        unsafe { std::slice::from_raw_parts_mut(mask, size as usize)[0] = 1 << Device::of(device).node() };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCpuAffinityWithinScope(
    device: *mut c_void,
    size: c_uint,
    mask: *mut c_ulong,
    _scope: c_uint,
) -> c_uint {
    answer("nvmlDeviceGetCpuAffinityWithinScope", || {
        let mask = unsafe { std::slice::from_raw_parts_mut(mask, size as usize) };
        // 32 CPUs per NUMA node.
        mask[Device::of(device).node() as usize / 2] = 0xffff_ffff << (Device::of(device).node() % 2 * 32);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEccErrors(
    device: *mut c_void,
    kind: c_uint,
    _counter: c_uint,
    count: *mut c_ulonglong,
) -> c_uint {
    answer("nvmlDeviceGetTotalEccErrors", || {
        let errors = number(&Device::of(device).section(), "uncorrected_errors").unwrap_or(0);
        unsafe { *count = if kind == 1 { errors } else { 0 } };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetRetiredPagesPendingStatus(_device: *mut c_void, pending: *mut c_uint) -> c_uint {
    unsafe { *pending = 0 };
    SUCCESS
}

/// `nvmlFieldValue_t`.
#[repr(C)]
pub struct Field {
    id: c_uint,
    scope: c_uint,
    timestamp: i64,
    latency: i64,
    kind: c_uint,
    result: c_uint,
    value: c_ulonglong,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetFieldValues(device: *mut c_void, count: c_int, fields: *mut Field) -> c_uint {
    answer("nvmlDeviceGetFieldValues", || {
        for field in unsafe { std::slice::from_raw_parts_mut(fields, count as usize) } {
            let key = match field.id {
                144 => "repair_pending",
                145 => "repair_failed",
                _ => {
                    field.result = NOT_SUPPORTED;
                    continue;
                }
            };
            let value = number(&Device::of(device).section(), key).unwrap_or(0);
            // An unsigned int, in the first half of the union.
            (field.kind, field.result, field.value) = (1, SUCCESS, value);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTopologyCommonAncestor(
    one: *mut c_void,
    other: *mut c_void,
    level: *mut c_uint,
) -> c_uint {
    answer("nvmlDeviceGetTopologyCommonAncestor", || {
        let (one, other) = (Device::of(one), Device::of(other));
        let found = if one.lists("switch", other) {
            10
        } else if one.node() == other.node() {
            40
        } else {
            50
        };
        unsafe { *level = found };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetP2PStatus(
    one: *mut c_void,
    other: *mut c_void,
    kind: c_uint,
    status: *mut c_uint,
) -> c_uint {
    answer("nvmlDeviceGetP2PStatus", || {
        let linked = Device::of(one).lists("nvlink", Device::of(other));
        // Kind 2 is NVLink. Status 5 means not supported.
        unsafe { *status = if kind == 2 && linked { 0 } else { 5 } };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkState(device: *mut c_void, link: c_uint, state: *mut c_uint) -> c_uint {
    let peers = text(&Device::of(device).section(), "nvlink").unwrap_or_default();
    if link as usize >= peers.split(',').filter(|peer| !peer.is_empty()).count() {
        return INVALID_ARGUMENT;
    }
    unsafe { *state = 1 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkRemotePciInfo_v2(
    device: *mut c_void,
    link: c_uint,
    place: *mut Pci,
) -> c_uint {
    let peers = text(&Device::of(device).section(), "nvlink").unwrap_or_default();
    let peer = peers
        .split(',')
        .nth(link as usize)
        .and_then(|peer| peer.trim().parse().ok());
    match peer {
        Some(card) => unsafe { write_place(Device { card, slice: None }, place) }
            .err()
            .unwrap_or(SUCCESS),
        None => INVALID_ARGUMENT,
    }
}
