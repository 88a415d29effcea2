//! Chooses the GPUs of each engine. PURE: the same GPUs and engines give the same placement.
//!
//! The criteria, in this order: no broken GPU; enough free memory for the engine; the ranks of one engine on GPUs of one
//! size; large GPUs before small ones; as few engines as possible on one GPU; ranks of one engine close to each other;
//! prefill engines close to decode engines; then the lowest indices. The search tries every promising first move,
//! continues greedily, and then exchanges GPUs until no exchange improves the score.

use std::cmp::Reverse;

use crate::fleet::Role;
use crate::machine::{Gpu, GpuPath};

/// The highest sum of memory fractions on one GPU: each engine has a CUDA context that its fraction does not include.
const MOST: f64 = 0.96;

/// Up to this many sets of GPUs for one engine are all tried; beyond, sets are grown around each GPU.
const MOST_SETS: usize = 20_000;

/// Number of first moves that are tried.
const MOST_STARTS: usize = 16;

/// Limit on exchanges, so that the search ends.
const MOST_EXCHANGES: usize = 200;

/// An engine that needs GPUs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PlacementRequest {
    /// The engine's role.
    pub(super) role: Role,
    /// Number of GPUs that it needs.
    pub(super) ranks: usize,
    /// Indices of the GPUs that the profile names; empty to choose.
    pub(super) fixed: Vec<u32>,
    /// The fraction of each GPU's memory that it uses, 0 to 1.
    pub(super) share: f64,
}

/// The GPUs of every engine, by index. If the machine has too few, the result has indices that do not exist, so that the
/// plan can be printed and the preflight can report the missing GPUs.
pub(super) fn place(gpus: &[Gpu], groups: &[PlacementRequest]) -> Vec<Vec<u32>> {
    let search = Search::new(gpus, groups);
    let best = search.best();
    let named = gpus.iter().map(|gpu| gpu.index);
    let named = named.chain(groups.iter().flat_map(|group| group.fixed.iter().copied()));
    let mut next = named.max().map_or(0, |index| index + 1);
    let mut places = Vec::new();
    for (group, chosen) in groups.iter().zip(&best) {
        let mut place = group.fixed.clone();
        if place.is_empty() {
            place.extend(chosen.iter().map(|position| gpus[*position].index));
            while place.len() < group.ranks {
                place.push(next);
                next += 1;
            }
        }
        places.push(place);
    }
    places
}

/// For each engine, the positions of its GPUs in the list.
type Placement = Vec<Vec<usize>>;

/// The score of a placement; larger is better.
type Score = (Reverse<[usize; 5]>, Nearness, Nearness);

/// Number of GPU pairs per kind of connection, the fastest kind first.
type Nearness = [usize; 6];

struct Search<'input> {
    gpus: &'input [Gpu],
    groups: &'input [PlacementRequest],
    /// The connection between every two GPUs, as an index into [`Nearness`].
    ways: Vec<Vec<usize>>,
    /// GPUs with clearly less memory than the largest.
    is_small: Vec<bool>,
    /// Whether engines can share a GPU.
    sharing: bool,
    /// The engines to place, in placement order.
    order: Vec<usize>,
}

impl<'input> Search<'input> {
    fn new(gpus: &'input [Gpu], groups: &'input [PlacementRequest]) -> Self {
        let way = |path: GpuPath| match path {
            GpuPath::Same | GpuPath::NvLink => 0,
            GpuPath::Switch => 1,
            GpuPath::Numa => 2,
            GpuPath::System => 3,
            GpuPath::Unknown => 4,
            GpuPath::Network => 5,
        };
        let ways = gpus
            .iter()
            .map(|gpu| gpus.iter().map(|other| way(gpu.path(other.index))).collect());
        let largest = gpus
            .iter()
            .filter_map(|gpu| gpu.memory)
            .map(|memory| memory.total)
            .max();
        let is_small = |gpu: &Gpu| {
            let total = gpu.memory.map(|memory| memory.total);
            total
                .zip(largest)
                .is_some_and(|(total, largest)| total / 9 < largest / 10)
        };
        let mut seen = [0, 0];
        let mut order: Vec<(Reverse<usize>, usize, usize)> = Vec::new();
        for (index, group) in groups.iter().enumerate() {
            let turn = &mut seen[usize::from(group.role == Role::Decode)];
            // Large engines first, because they are hard to place; then the roles in turns, so that partners are close.
            order.push((Reverse(group.ranks), *turn, index));
            *turn += 1;
        }
        order.sort_unstable();
        let order = order.into_iter().map(|(_, _, index)| index);
        let search = Self {
            gpus,
            groups,
            ways: ways.collect(),
            is_small: gpus.iter().map(is_small).collect(),
            sharing: false,
            order: order.filter(|index| groups[*index].fixed.is_empty()).collect(),
        };
        let needed: usize = search.order.iter().map(|index| groups[*index].ranks).sum();
        let fixed = search.fixed();
        let free = (0..gpus.len()).filter(|position| search.load(&fixed, *position) == 0.0);
        Self {
            sharing: free.count() < needed,
            ..search
        }
    }

    /// The placement of the engines whose GPUs the profile names.
    fn fixed(&self) -> Placement {
        let position = |index: &u32| self.gpus.iter().position(|gpu| gpu.index == *index);
        let groups = self.groups.iter();
        groups
            .map(|group| group.fixed.iter().filter_map(position).collect())
            .collect()
    }

    fn best(&self) -> Placement {
        let fixed = self.fixed();
        let Some((first, rest)) = self.order.split_first() else {
            return fixed;
        };
        let mut starts: Vec<Placement> = self.choices(&fixed, *first).collect();
        starts.sort_by_cached_key(|places| Reverse(self.score(places)));
        // A large machine has many equivalent first moves.
        starts.truncate(if self.gpus.len() > 16 { 1 } else { MOST_STARTS });
        let finished = starts.into_iter().map(|start| {
            let places = rest.iter().fold(start, |places, group| self.next(places, *group));
            self.exchanged(places)
        });
        finished
            .max_by(|one, other| {
                let scores = self.score(one).cmp(&self.score(other));
                scores.then_with(|| other.cmp(one))
            })
            .unwrap_or(fixed)
    }

    /// Every way to place one more engine.
    fn choices<'places>(
        &'places self,
        places: &'places Placement,
        group: usize,
    ) -> impl Iterator<Item = Placement> + 'places {
        let ranks = self.groups[group].ranks;
        let possible: Vec<usize> = (0..self.gpus.len())
            .filter(|position| self.has_room(places, *position, group))
            .collect();
        let sets = if count_of_sets(possible.len(), ranks) <= MOST_SETS {
            sets(&possible, ranks)
        } else {
            self.grown_sets(&possible, ranks)
        };
        // An engine runs on one node.
        let sets = sets.into_iter().filter(|set| self.is_on_one_node(set));
        sets.map(move |set| {
            let mut places = places.clone();
            places[group] = set;
            places
        })
    }

    /// The best way to place one more engine; unchanged if there is none.
    fn next(&self, places: Placement, group: usize) -> Placement {
        let best = self.choices(&places, group).max_by(|one, other| {
            let scores = self.score(one).cmp(&self.score(other));
            scores.then_with(|| other[group].cmp(&one[group]))
        });
        best.unwrap_or(places)
    }

    /// For each GPU, the `ranks` GPUs closest to it.
    fn grown_sets(&self, possible: &[usize], ranks: usize) -> Vec<Vec<usize>> {
        let around = possible.iter().map(|start| {
            let mut others = possible.to_vec();
            others.sort_by_key(|other| (other != start, self.ways[*start][*other], *other));
            others.truncate(ranks);
            others.sort_unstable();
            others
        });
        around.collect()
    }

    /// Exchanges GPUs between engines, and with free ones, as long as that improves the score.
    fn exchanged(&self, mut places: Placement) -> Placement {
        for _ in 0..MOST_EXCHANGES {
            let better = |other: &Placement| {
                let scores = self.score(other).cmp(&self.score(&places));
                scores.then_with(|| places.cmp(other)).is_gt()
            };
            let Some(next) = self.exchanges(&places).find(better) else {
                break;
            };
            places = next;
        }
        places
    }

    fn exchanges<'places>(&'places self, places: &'places Placement) -> impl Iterator<Item = Placement> + 'places {
        let slots: Vec<(usize, usize)> = self
            .order
            .iter()
            .flat_map(|group| (0..places[*group].len()).map(move |slot| (*group, slot)))
            .collect();
        let swaps = slots.clone().into_iter().enumerate().flat_map({
            let slots = slots.clone();
            move |(number, (group, slot))| {
                let others = slots.clone().into_iter().skip(number + 1);
                others.filter_map(move |(other, other_slot)| {
                    let (mine, theirs) = (places[group][slot], places[other][other_slot]);
                    let is_new = group != other && !places[group].contains(&theirs) && !places[other].contains(&mine);
                    is_new.then(|| {
                        let mut places = places.clone();
                        places[group][slot] = theirs;
                        places[other][other_slot] = mine;
                        places[group].sort_unstable();
                        places[other].sort_unstable();
                        places
                    })
                })
            }
        });
        let moves = slots.into_iter().flat_map(move |(group, slot)| {
            (0..self.gpus.len())
                .filter(move |position| self.has_room(places, *position, group))
                .map(move |position| {
                    let mut places = places.clone();
                    places[group][slot] = position;
                    places[group].sort_unstable();
                    places
                })
        });
        swaps.chain(moves).filter(|places| self.fits(places))
    }

    /// Whether no GPU is overloaded.
    fn fits(&self, places: &Placement) -> bool {
        if !places.iter().all(|place| self.is_on_one_node(place)) {
            return false;
        }
        let most = if self.sharing { MOST } else { 1.0 };
        (0..self.gpus.len()).all(|position| {
            let engines = places.iter().filter(|place| place.contains(&position)).count();
            engines <= 1 || self.load(places, position) <= most
        })
    }

    fn is_on_one_node(&self, place: &[usize]) -> bool {
        let mut nodes = place.iter().map(|position| self.gpus[*position].node_name());
        let first = nodes.next();
        nodes.all(|node| Some(node) == first)
    }

    /// Whether this GPU has room for one more engine.
    fn has_room(&self, places: &Placement, position: usize, group: usize) -> bool {
        let load = self.load(places, position);
        let is_own = places[group].contains(&position);
        !is_own && (load == 0.0 || (self.sharing && load + self.groups[group].share <= MOST))
    }

    /// The sum of the memory fractions on this GPU.
    fn load(&self, places: &Placement, position: usize) -> f64 {
        let on_it = places
            .iter()
            .zip(self.groups)
            .filter(|(place, _)| place.contains(&position));
        on_it.map(|(_, group)| group.share.max(f64::EPSILON)).sum()
    }

    fn score(&self, places: &Placement) -> Score {
        let mut faults = [0; 5];
        let (mut tight, mut near) = (Nearness::default(), Nearness::default());
        let mut engines = vec![0usize; self.gpus.len()];
        for (place, group) in places.iter().zip(self.groups) {
            for (number, position) in place.iter().enumerate() {
                engines[*position] += 1;
                let gpu = &self.gpus[*position];
                faults[0] += usize::from(gpu.health.is_broken());
                faults[1] += usize::from(lacks_memory(gpu, group.share));
                faults[3] += usize::from(self.is_small[*position]);
                for other in &place[..number] {
                    tight[self.ways[*position][*other]] += 1;
                    faults[2] += usize::from(gpu.name != self.gpus[*other].name);
                }
            }
        }
        faults[4] = engines.iter().map(|engines| engines.saturating_sub(1)).sum();
        let of = |role: Role| {
            let pairs = places.iter().zip(self.groups);
            pairs
                .filter(move |(_, group)| group.role == role)
                .map(|(place, _)| place)
        };
        for prefill in of(Role::Prefill) {
            for decode in of(Role::Decode) {
                for position in prefill {
                    for other in decode {
                        near[self.ways[*position][*other]] += 1;
                    }
                }
            }
        }
        (Reverse(faults), tight, near)
    }
}

/// Whether another process uses so much of the GPU's memory that this fraction is not free.
fn lacks_memory(gpu: &Gpu, share: f64) -> bool {
    gpu.memory
        .is_some_and(|memory| (memory.free as f64) < share * memory.total as f64)
}

/// Number of sets of this size, up to the limit that matters.
fn count_of_sets(of: usize, size: usize) -> usize {
    (0..size).fold(1usize, |count, step| {
        count.saturating_mul(of.saturating_sub(step)) / (step + 1)
    })
}

/// Every set of this size, in order.
fn sets(of: &[usize], size: usize) -> Vec<Vec<usize>> {
    if size == 0 {
        return vec![Vec::new()];
    }
    let mut found = Vec::new();
    for (number, first) in of.iter().enumerate() {
        for mut rest in sets(&of[number + 1..], size - 1) {
            rest.insert(0, *first);
            found.push(rest);
        }
    }
    found
}

#[cfg(test)]
mod tests;
