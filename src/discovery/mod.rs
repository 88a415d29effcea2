//! Engines that come and go, for `xpyd proxy`: which ones exist, and which of them have proven that they work.
//!
//! `listing` reads what a source says (pure), `roster` decides (pure), and this module reads, verifies and publishes.

mod listing;
mod roster;

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::fleet::{EngineId, FleetView, Role};
use listing::{ListedEngine, Listing};
use roster::Roster;

/// Interval between two looks at the source.
const LOOK: Duration = Duration::from_secs(1);

/// How long a name server has to answer.
const DNS_DEADLINE: Duration = Duration::from_secs(5);

/// A prefill engine and a decode engine.
pub type Pair = (EngineId, EngineId);

/// Where the list of engines comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file in llm-d's format.
    File(PathBuf),
    /// Host names, each of which stands for the engines of a role at all its addresses, such as a headless Service of Kubernetes.
    Dns(Vec<DnsName>),
}

/// A host name, and the engines for which it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsName {
    role: Role,
    host: String,
    port: u16,
}

/// The text names no source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("write `file:PATH` or `dns:prefill=HOST:PORT,decode=HOST:PORT`")]
pub struct NoSource;

impl FromStr for Source {
    type Err = NoSource;

    fn from_str(text: &str) -> Result<Self, NoSource> {
        if let Some(path) = text.strip_prefix("file:").filter(|path| !path.is_empty()) {
            return Ok(Self::File(path.into()));
        }
        let names = text.strip_prefix("dns:").ok_or(NoSource)?;
        names
            .split(',')
            .map(dns_name)
            .collect::<Option<_>>()
            .map(Self::Dns)
            .ok_or(NoSource)
    }
}

/// `prefill=HOST:PORT`.
fn dns_name(text: &str) -> Option<DnsName> {
    let (role, address) = text.split_once('=')?;
    let role = match role {
        "prefill" => Role::Prefill,
        "decode" => Role::Decode,
        _ => return None,
    };
    let (host, port) = address.rsplit_once(':').filter(|(host, _)| !host.is_empty())?;
    let host = host.trim_matches(['[', ']']).to_owned();
    let port = port.parse().ok().filter(|port| *port > 0)?;
    Some(DnsName { role, host, port })
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(formatter, "`{}`", path.display()),
            Self::Dns(names) => {
                let names: Vec<String> = names.iter().map(|name| format!("`{}`", name.host)).collect();
                formatter.write_str(&names.join(" and "))
            }
        }
    }
}

impl Source {
    /// What the source says now. The error is one line.
    async fn read(&self) -> Result<Listing, String> {
        match self {
            Self::Dns(names) => {
                let mut engines = Vec::new();
                for name in names {
                    engines.extend(resolved(name).await?);
                }
                Ok(listing::limited(engines))
            }
            Self::File(path) => {
                let text = read_file(path).map_err(|error| error.to_string())?;
                listing::parse(&text).map_err(|error| format!("`{}`: {error}", path.display()))
            }
        }
    }
}

/// The engines at all addresses of the name.
async fn resolved(name: &DnsName) -> Result<Vec<ListedEngine>, String> {
    let lookup = timeout(DNS_DEADLINE, lookup_host((name.host.as_str(), name.port))).await;
    let found = lookup
        .map_err(|_| format!("the name server does not answer for `{}`", name.host))?
        .map_err(|error| format!("`{}`: {error}", name.host))?;
    // Name servers answer in any order.
    let addresses: BTreeSet<SocketAddr> = found.collect();
    let engine = |address: SocketAddr| ListedEngine {
        name: format!("{}-{}", name.role, address.ip()),
        role: name.role,
        host: address.ip().to_string(),
        port: address.port(),
    };
    Ok(addresses.into_iter().map(engine).collect())
}

/// The beginning of the file, which is enough to see that it is too large. A pipe would never end.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    if !fs_err::metadata(path)?.is_file() {
        return Err(io::Error::other(format!("`{}` is no file", path.display())));
    }
    let mut text = Vec::new();
    let limit = u64::try_from(listing::MAX_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    fs_err::File::open(path)?.take(limit).read_to_end(&mut text)?;
    Ok(text)
}

/// Follows the source, until it is dropped. `verify` sends a canary through each pair, and returns why one failed. `report`
/// gets a line for people about everything that changes.
pub async fn follow<V>(
    source: Source,
    view: watch::Sender<Arc<FleetView>>,
    verify: impl Fn(Vec<Pair>) -> V,
    report: impl Fn(String),
) where
    V: Future<Output = Vec<Result<(), String>>>,
{
    let mut roster = Roster::default();
    let (mut last, mut verification) = (None, None);
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            now = async { look.tick().await; source.read().await } => {
                if last.as_ref() != Some(&now) {
                    match &now {
                        Ok(listing) => {
                            listing.problems.iter().for_each(|problem| report(format!("warn  {problem}")));
                            roster.update(&listing.engines).into_iter().for_each(&report);
                        }
                        // The engines that are known go on.
                        Err(error) => report(format!("warn  cannot read the engines: {error}")),
                    }
                    last = Some(now);
                }
                roster.remove_idle().into_iter().for_each(&report);
            }
            results = async { verification.as_mut().expect("checked below").await }, if verification.is_some() => {
                verification = None;
                roster.verified(results, Instant::now()).into_iter().for_each(&report);
            }
        }
        if let Some(changed) = roster.changed_view() {
            view.send_replace(Arc::new(changed));
        }
        if verification.is_none() {
            let pairs = roster.pairs_to_verify(Instant::now());
            if !pairs.is_empty() {
                let results = verify(pairs.iter().map(roster::NumberedPair::names).collect());
                verification = Some(Box::pin(async move { pairs.into_iter().zip(results.await).collect() }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_files_and_names() {
        assert_eq!("file:a b.yaml".parse(), Ok(Source::File("a b.yaml".into())));
        let name = |role, host: &str, port| DnsName {
            role,
            host: host.to_owned(),
            port,
        };
        let names = [name(Role::Prefill, "p.ns.svc", 8000), name(Role::Decode, "::1", 1)];
        assert_eq!(
            "dns:prefill=p.ns.svc:8000,decode=[::1]:1".parse(),
            Ok(Source::Dns(names.into()))
        );
        for wrong in [
            "",
            "file:",
            "dns:",
            "dns:p=h:1",
            "dns:prefill=h",
            "dns:prefill=:1",
            "dns:decode=h:0",
            "e.yaml",
        ] {
            assert_eq!(wrong.parse::<Source>(), Err(NoSource), "{wrong}");
        }
    }
}
