//! Facts about the operating system that decide whether engines can start: limits, shared memory, ports, the clock, PCIe.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::statvfs;

/// Facts about the operating system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct System {
    /// Number of file descriptors that a process can open.
    pub open_files: Limit,
    /// Size of a file that a process can write, in bytes.
    pub file_size: Limit,
    /// Memory that a process can lock, in bytes.
    pub locked_memory: Limit,
    /// The file system of `/dev/shm`; `None` if there is none.
    pub shared_memory: Option<FilesystemSpace>,
    /// TCP ports in use.
    pub listeners: Vec<Listener>,
    /// PCIe between two GPUs.
    pub pcie: Pcie,
    /// Whether there is an RDMA device.
    pub has_rdma: bool,
    /// The current time, in seconds since 1970.
    pub unix_seconds: i64,
}

/// A limit of this process, which its children inherit. `u64::MAX` means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// The effective limit.
    pub soft: u64,
    /// The highest value to which a process can raise it.
    pub hard: u64,
}

/// The size of a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilesystemSpace {
    /// Total size.
    pub total: u64,
    /// Bytes that this user can write.
    pub free: u64,
}

/// A TCP port in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// The port number.
    pub port: u16,
    /// Process id and name of the listener, if this user can see it.
    pub process: Option<(u32, String)>,
}

/// PCIe between two devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pcie {
    /// Whether an IOMMU is active.
    pub has_iommu: bool,
    /// Number of bridges that redirect traffic between devices through the root (ACS); `None` if only root can read that.
    pub redirecting_bridges: Option<usize>,
}

/// Reads all facts.
pub(super) fn survey() -> System {
    System {
        open_files: limit(Resource::RLIMIT_NOFILE),
        file_size: limit(Resource::RLIMIT_FSIZE),
        locked_memory: limit(Resource::RLIMIT_MEMLOCK),
        shared_memory: shared_memory(Path::new("/dev/shm")),
        listeners: listeners(),
        pcie: pcie(Path::new("/sys")),
        has_rdma: !entries(Path::new("/sys/class/infiniband")).is_empty(),
        unix_seconds: jiff::Timestamp::now().as_second(),
    }
}

fn limit(resource: Resource) -> Limit {
    let (soft, hard) = getrlimit(resource).unwrap_or((u64::MAX, u64::MAX));
    Limit { soft, hard }
}

fn shared_memory(folder: &Path) -> Option<FilesystemSpace> {
    let space = statvfs(folder).ok()?;
    Some(FilesystemSpace {
        total: space.blocks() * space.fragment_size(),
        free: space.blocks_available() * space.fragment_size(),
    })
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs_err::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// The listeners, in port order.
fn listeners() -> Vec<Listener> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let mut sockets: Vec<(u16, u64)> = tables
        .iter()
        .filter_map(|path| fs_err::read_to_string(path).ok())
        .flat_map(|table| table.lines().filter_map(listening).collect::<Vec<_>>())
        .collect();
    sockets.sort_unstable();
    sockets.dedup_by_key(|(port, _)| *port);
    let owners = owners(&sockets);
    sockets
        .into_iter()
        .map(|(port, inode)| Listener {
            port,
            process: owners.get(&inode).cloned(),
        })
        .collect()
}

/// Port and inode of a listening socket (state `0A`; proc(5)) in a line of `/proc/net/tcp`.
fn listening(line: &str) -> Option<(u16, u64)> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let port = u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok()?;
    let inode = fields.get(9)?.parse().ok()?;
    (*fields.get(3)? == "0A").then_some((port, inode))
}

fn owners(sockets: &[(u16, u64)]) -> HashMap<u64, (u32, String)> {
    let mut found = HashMap::new();
    if sockets.is_empty() {
        return found;
    }
    let wanted: HashMap<String, u64> = sockets
        .iter()
        .map(|(_, inode)| (format!("socket:[{inode}]"), *inode))
        .collect();
    let processes = entries(Path::new("/proc"));
    for (pid, folder) in processes
        .iter()
        .filter_map(|path| Some((path.file_name()?.to_str()?.parse().ok()?, path)))
    {
        for descriptor in std::fs::read_dir(folder.join("fd")).into_iter().flatten().flatten() {
            let target = std::fs::read_link(descriptor.path()).ok();
            let inode = target.and_then(|target| wanted.get(target.to_str()?).copied());
            if let Some(inode) = inode {
                let name = std::fs::read_to_string(folder.join("comm")).unwrap_or_default();
                found.entry(inode).or_insert((pid, name.trim().to_owned()));
            }
        }
    }
    found
}

fn pcie(sys: &Path) -> Pcie {
    let bridges: Vec<PathBuf> = entries(&sys.join("bus/pci/devices"))
        .into_iter()
        // Class 0604: a bridge from PCI to PCI.
        .filter(|device| fs_err::read_to_string(device.join("class")).is_ok_and(|class| class.starts_with("0x0604")))
        .collect();
    let redirects: Vec<Option<bool>> = bridges
        .iter()
        .map(|bridge| redirects(&fs_err::read(bridge.join("config")).unwrap_or_default()))
        .collect();
    let is_known = redirects.iter().all(Option::is_some);
    Pcie {
        has_iommu: !entries(&sys.join("class/iommu")).is_empty(),
        redirecting_bridges: is_known.then(|| redirects.iter().filter(|redirects| **redirects == Some(true)).count()),
    }
}

/// Whether a bridge's ACS redirects requests or completions between its ports to the root. Extended capabilities begin at
/// 256, each with its number and the offset of the next; ACS is number 13, its control register at 6 (PCI Express Base
/// Specification, 7.7.11). Users other than root can read the first 64 bytes only.
fn redirects(config: &[u8]) -> Option<bool> {
    const ACS: u32 = 13;
    const REQUEST_OR_COMPLETION: u8 = 0b1100;
    if config.len() <= 64 {
        return None;
    }
    let word = |offset: usize| {
        let bytes = config.get(offset..offset + 4)?;
        Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let mut offset = 256;
    // The maximum number of capabilities, so that a cycle ends.
    for _ in 0..480 {
        let Some(header) = word(offset).filter(|header| *header != 0 && *header != u32::MAX) else {
            break;
        };
        if header & 0xffff == ACS {
            return Some(
                config
                    .get(offset + 6)
                    .is_some_and(|control| control & REQUEST_OR_COMPLETION != 0),
            );
        }
        offset = (header >> 20) as usize;
        if offset < 256 {
            break;
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_sockets_are_read() {
        let listen =
            "   0: 0100007F:238C 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 4711 1 0 100 0 0 10 0";
        assert_eq!(listening(listen), Some((9100, 4711)));
        assert_eq!(listening(&listen.replace(" 0A ", " 01 ")), None);
        assert_eq!(listening("  sl  local_address rem_address   st"), None);
    }

    #[test]
    fn an_own_listener_is_found_with_its_process() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = socket.local_addr().expect("an address").port();
        let found = listeners();
        let own = found.iter().find(|listener| listener.port == port).expect("a listener");
        assert_eq!(own.process.as_ref().map(|(pid, _)| *pid), Some(std::process::id()));
    }

    #[test]
    fn a_redirecting_bridge_is_recognised() {
        let mut config = vec![0_u8; 4096];
        assert_eq!(redirects(&config), Some(false));
        // Advanced error reporting at 256, then ACS at 512.
        config[256..260].copy_from_slice(&0x2001_0001_u32.to_le_bytes());
        config[512..516].copy_from_slice(&0x0001_000d_u32.to_le_bytes());
        assert_eq!(redirects(&config), Some(false));
        config[518] = 0b1_1101;
        assert_eq!(redirects(&config), Some(true));
        assert_eq!(redirects(&config[..64]), None, "not readable");
    }
}
