//! Finds the engines at fault when hand-offs fail, from the canary results per pair. PURE.
//!
//! A hand-off has two ends, so one failure does not show which end is broken. The engine that fails with the majority of its peers
//! is at fault; the others are judged again without it. If no engine stands out, as with one engine of each role, the caller
//! chooses the end of the pair to restart first, and restarts the other end if that did not help.

use std::collections::BTreeMap;

/// The result of a canary through one pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PairOutcome {
    /// The prefill engine, by index.
    pub(super) prefill: usize,
    /// The decode engine, by index.
    pub(super) decode: usize,
    /// The error, if it failed.
    pub(super) failure: Option<String>,
}

impl PairOutcome {
    pub(super) fn has(&self, engine: usize) -> bool {
        self.prefill == engine || self.decode == engine
    }

    fn peer_of(&self, engine: usize) -> usize {
        if self.prefill == engine {
            self.decode
        } else {
            self.prefill
        }
    }
}

/// An engine to restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Guilty {
    pub(super) engine: usize,
    /// The pair, if the results do not show which of its ends is broken.
    pub(super) either_of: Option<(usize, usize)>,
}

/// The fewest engines without which no pair fails, the most likely first. `first` chooses an end of a pair (prefill, decode) if the
/// results do not show which is broken.
pub(super) fn guilty(tried: &[PairOutcome], first: impl Fn(usize, usize) -> usize) -> Vec<Guilty> {
    let mut open: Vec<&PairOutcome> = tried.iter().collect();
    let mut found = Vec::new();
    while let Some(failing) = open.iter().find(|tried| tried.failure.is_some()) {
        let (prefill, decode) = (failing.prefill, failing.decode);
        let next = majority(&open).map_or_else(
            || Guilty {
                engine: first(prefill, decode),
                either_of: Some((prefill, decode)),
            },
            |engine| Guilty {
                engine,
                either_of: None,
            },
        );
        open.retain(|tried| !tried.has(next.engine));
        found.push(next);
    }
    found
}

/// The engine that fails with a larger share of its peers than any other, and with most of them. Of equal shares the one with more
/// peers wins, because it has more results.
fn majority(tried: &[&PairOutcome]) -> Option<usize> {
    let mut counts: BTreeMap<usize, (usize, usize)> = BTreeMap::new();
    for one in tried {
        for engine in [one.prefill, one.decode] {
            let (failed, all) = counts.entry(engine).or_default();
            *failed += usize::from(one.failure.is_some());
            *all += 1;
        }
    }
    // Shares are compared without division: a / b > c / d where a * d > c * b.
    let compare = |(_, (failed, all)): &(usize, (usize, usize)),
                   (_, (other_failed, other_all)): &(usize, (usize, usize))| {
        (failed * other_all)
            .cmp(&(other_failed * all))
            .then(failed.cmp(other_failed))
    };
    let mut ranked: Vec<_> = counts.into_iter().filter(|(_, (failed, _))| *failed > 0).collect();
    ranked.sort_by(|one, other| compare(other, one));
    let (engine, (failed, all)) = *ranked.first()?;
    let is_alone = ranked.get(1).is_none_or(|second| compare(&ranked[0], second).is_gt());
    (is_alone && 2 * failed > all).then_some(engine)
}

/// The reason for restarting `engine`: the peers with which it fails, and the first error.
pub(super) fn reason(tried: &[PairOutcome], engine: usize, name: impl Fn(usize) -> String) -> String {
    let failing = tried
        .iter()
        .filter(|tried| tried.failure.is_some() && tried.has(engine));
    let peers: Vec<String> = failing.clone().map(|tried| name(tried.peer_of(engine))).collect();
    let mut failing = failing;
    let cause = failing.find_map(|tried| tried.failure.as_deref()).unwrap_or_default();
    format!("its hand-offs with {} fail: {cause}", peers.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const P1: usize = 0;
    const P2: usize = 1;
    const D1: usize = 2;
    const D2: usize = 3;
    const D3: usize = 4;

    fn judge(pairs: &[(usize, usize, bool)]) -> Vec<(usize, bool)> {
        let tried: Vec<PairOutcome> = pairs
            .iter()
            .map(|(prefill, decode, works)| PairOutcome {
                prefill: *prefill,
                decode: *decode,
                failure: (!works).then(|| "no KV moved".to_owned()),
            })
            .collect();
        let found = guilty(&tried, |prefill, _| prefill);
        found
            .into_iter()
            .map(|guilty| (guilty.engine, guilty.either_of.is_some()))
            .collect()
    }

    #[test]
    fn the_engine_that_fails_with_most_of_its_peers_is_to_blame() {
        let wedged = [(P1, D1, true), (P1, D2, true), (P2, D1, false), (P2, D2, false)];
        assert_eq!(judge(&wedged), [(P2, false)]);
        let wedged = [(P1, D1, false), (P1, D2, true), (P2, D1, false), (P2, D2, true)];
        assert_eq!(judge(&wedged), [(D1, false)]);
        let most = [
            (P1, D1, false),
            (P1, D2, false),
            (P1, D3, true),
            (P2, D1, true),
            (P2, D2, true),
            (P2, D3, true),
        ];
        assert_eq!(judge(&most), [(P1, false)]);
    }

    #[test]
    fn a_new_engine_that_fails_with_one_peer_alone_convicts_that_peer() {
        assert_eq!(judge(&[(P1, D1, true), (P2, D1, false)]), [(P2, false)]);
        // The result of a third engine confirms that, or clears the peer.
        assert_eq!(
            judge(&[(P1, D1, true), (P2, D1, false), (P2, D2, false)]),
            [(P2, false)]
        );
        assert_eq!(judge(&[(P1, D1, true), (P2, D1, false), (P2, D2, true)]), [(P2, true)]);
    }

    #[test]
    fn one_pair_alone_tells_nothing_about_its_ends() {
        assert_eq!(judge(&[(P1, D1, false)]), [(P1, true)]);
        assert_eq!(judge(&[(P1, D1, true)]), []);
    }

    #[test]
    fn one_prefill_engine_of_several_decode_engines_is_told_from_one_of_them() {
        assert_eq!(judge(&[(P1, D1, false), (P1, D2, false)]), [(P1, false)]);
        assert_eq!(judge(&[(P1, D1, false), (P1, D2, true)]), [(D1, false)]);
    }

    #[test]
    fn two_guilty_ones_are_found_one_after_the_other() {
        let both = [(P1, D1, true), (P1, D2, false), (P2, D1, false), (P2, D2, false)];
        let found: Vec<usize> = judge(&both).into_iter().map(|(engine, _)| engine).collect();
        assert_eq!(found.len(), 2);
        let all = [(P1, D1, false), (P1, D2, false), (P2, D1, false), (P2, D2, false)];
        assert_eq!(judge(&all), [(P1, true), (P2, false)]);
    }

    #[test]
    fn the_reason_names_the_peers_and_the_first_failure() {
        let failed = |decode| PairOutcome {
            prefill: P2,
            decode,
            failure: Some(format!("nothing came to {decode}")),
        };
        let text = reason(&[failed(D1), failed(D2)], P2, |index| format!("engine{index}"));
        assert_eq!(text, "its hand-offs with engine2 and engine3 fail: nothing came to 2");
    }
}
