//! Tests of the placement: on common machines, and rules that hold on every machine.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::machine::{GpuHealth, GpuMemory, slice_number};

/// `count` GPUs of 80 GiB, with `way` as the connection between any two of them.
fn machine(count: u32, way: impl Fn(u32, u32) -> GpuPath) -> Vec<Gpu> {
    let gpu = |index| Gpu {
        index,
        name: "H100".to_owned(),
        memory: Some(GpuMemory {
            total: 80 << 30,
            free: 79 << 30,
            used: 1 << 29,
        }),
        paths: (0..count)
            .filter(|other| *other != index)
            .map(|other| (other, way(index.min(other), index.max(other))))
            .collect(),
        ..Gpu::default()
    };
    (0..count).map(gpu).collect()
}

/// NVLink bridges between 0 and 1, 2 and 3, …; the first half on one NUMA node.
fn nvlink_pairs() -> Vec<Gpu> {
    machine(8, |one, other| match (one / 2 == other / 2, one / 4 == other / 4) {
        (true, _) => GpuPath::NvLink,
        (false, true) => GpuPath::Numa,
        (false, false) => GpuPath::System,
    })
}

/// No NVLink; two GPUs behind each switch, which are not neighbours by index.
fn pcie() -> Vec<Gpu> {
    machine(8, |one, other| match (one % 4 == other % 4, one % 2 == other % 2) {
        (true, _) => GpuPath::Switch,
        (false, true) => GpuPath::Numa,
        (false, false) => GpuPath::System,
    })
}

fn fleet(prefill: usize, decode: usize, ranks: usize) -> Vec<PlacementRequest> {
    let group = |role| PlacementRequest {
        role,
        ranks,
        fixed: Vec::new(),
        share: 0.92,
    };
    let roles = std::iter::repeat_n(Role::Prefill, prefill).chain(std::iter::repeat_n(Role::Decode, decode));
    roles.map(group).collect()
}

#[test]
fn prefill_and_decode_share_an_nvlink_bridge() {
    assert_eq!(place(&nvlink_pairs(), &fleet(1, 1, 1)), [[0], [1]]);
    assert_eq!(place(&nvlink_pairs(), &fleet(2, 2, 1)), [[0], [2], [1], [3]]);
    assert_eq!(place(&nvlink_pairs(), &fleet(1, 3, 1)), [[0], [1], [2], [3]]);
}

#[test]
fn ranks_take_the_bridge_before_roles_do() {
    assert_eq!(place(&nvlink_pairs(), &fleet(1, 1, 2)), [[0, 1], [2, 3]]);
    assert_eq!(place(&nvlink_pairs(), &fleet(1, 1, 4)), [[0, 1, 2, 3], [4, 5, 6, 7]]);
}

#[test]
fn without_nvlink_a_switch_is_next_and_then_the_numa_node() {
    assert_eq!(place(&pcie(), &fleet(1, 1, 1)), [[0], [4]]);
    assert_eq!(place(&pcie(), &fleet(1, 1, 2)), [[0, 4], [2, 6]]);
}

#[test]
fn a_later_bridge_is_found() {
    let gpus = machine(4, |one, other| {
        if (one, other) == (2, 3) {
            GpuPath::NvLink
        } else {
            GpuPath::System
        }
    });
    assert_eq!(place(&gpus, &fleet(1, 1, 1)), [[2], [3]]);
}

#[test]
fn equal_gpus_are_taken_in_order() {
    for path in [GpuPath::NvLink, GpuPath::Unknown] {
        assert_eq!(place(&machine(8, |_, _| path), &fleet(2, 2, 1)), [[0], [1], [2], [3]]);
    }
    assert_eq!(place(&[], &fleet(1, 2, 2)), [[0, 1], [2, 3], [4, 5]]);
}

#[test]
fn explicit_gpus_stay() {
    let mut groups = fleet(2, 2, 1);
    groups[2].fixed = vec![7];
    groups[3].fixed = vec![5];
    assert_eq!(place(&nvlink_pairs(), &groups), [[4], [6], [7], [5]]);
}

#[test]
fn busy_broken_and_small_cards_come_last() {
    let mut gpus = nvlink_pairs();
    if let Some(memory) = &mut gpus[0].memory {
        memory.free = 10 << 30;
    }
    gpus[2].health = GpuHealth {
        repair_failed: Some(true),
        ..GpuHealth::default()
    };
    gpus[4].name = "L4".to_owned();
    if let Some(memory) = &mut gpus[4].memory {
        memory.total = 24 << 30;
        memory.free = 24 << 30;
    }
    assert_eq!(place(&gpus, &fleet(1, 1, 1)), [[6], [7]]);
    assert_eq!(place(&gpus, &fleet(1, 1, 2)), [[1, 3], [6, 7]]);
}

#[test]
fn engines_share_a_gpu_only_if_they_must() {
    let one = machine(1, |_, _| GpuPath::Unknown);
    let mut groups = fleet(1, 1, 1);
    assert_eq!(place(&one, &groups), [[0], [1]], "GPU 1 is missing");
    for group in &mut groups {
        group.share = 0.45;
    }
    assert_eq!(place(&one, &groups), [[0], [0]]);
    assert_eq!(place(&nvlink_pairs(), &groups), [[0], [1]]);
    groups[1].share = 0.6;
    assert_eq!(place(&one, &groups), [[0], [1]]);
}

#[test]
fn many_slices_are_placed_quickly() {
    let slices = (0..8).flat_map(|parent| (0..7).map(move |slice| slice_number(parent, slice)));
    let gpus: Vec<Gpu> = slices
        .map(|index| Gpu {
            index,
            ..Gpu::default()
        })
        .collect();
    let places = place(&gpus, &fleet(28, 28, 1));
    assert_eq!(places.iter().collect::<BTreeSet<_>>().len(), 56);
    let large = machine(16, |one, other| {
        if one / 8 == other / 8 {
            GpuPath::NvLink
        } else {
            GpuPath::System
        }
    });
    assert_eq!(place(&large, &fleet(1, 1, 8)).concat(), (0..16).collect::<Vec<_>>());
}

/// A machine of up to eight GPUs with any connections between them.
fn machines() -> impl Strategy<Value = Vec<Gpu>> {
    let ways = proptest::collection::vec(0usize..4, 64);
    (1u32..=8, ways).prop_map(|(count, ways)| {
        let paths = [GpuPath::NvLink, GpuPath::Switch, GpuPath::Numa, GpuPath::System];
        machine(count, |one, other| paths[ways[(one * 8 + other) as usize]])
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn enough_gpus_are_used_once_each(
        gpus in machines(), prefill in 1usize..3, decode in 1usize..3, ranks in 1usize..3,
    ) {
        let groups = fleet(prefill, decode, ranks);
        let places = place(&gpus, &groups);
        let used: Vec<u32> = places.concat();
        prop_assert_eq!(used.len(), (prefill + decode) * ranks);
        prop_assert_eq!(used.iter().collect::<BTreeSet<_>>().len(), used.len());
        if used.len() <= gpus.len() {
            prop_assert!(used.iter().all(|index| gpus.iter().any(|gpu| gpu.index == *index)));
        }
        prop_assert_eq!(places, place(&gpus, &groups), "the same again");
    }

    #[test]
    fn a_pair_gets_the_best_connection(gpus in machines()) {
        prop_assume!(gpus.len() > 1);
        let places = place(&gpus, &fleet(1, 1, 1));
        let best = gpus.iter().flat_map(|gpu| gpu.paths.values()).min();
        prop_assert_eq!(Some(&gpus[places[0][0] as usize].path(places[1][0])), best);
    }

    #[test]
    fn ranks_are_as_close_as_possible(gpus in machines()) {
        prop_assume!(gpus.len() >= 2);
        let mut groups = fleet(1, 0, 2);
        groups[0].role = Role::Decode;
        let places = place(&gpus, &groups);
        let best = gpus.iter().flat_map(|gpu| gpu.paths.values()).min();
        prop_assert_eq!(Some(&gpus[places[0][0] as usize].path(places[0][1])), best);
    }

    #[test]
    fn shares_never_exceed_a_gpu(gpus in machines(), shares in proptest::collection::vec(0.1f64..0.9, 2..7)) {
        let groups: Vec<PlacementRequest> = shares
            .iter()
            .enumerate()
            .map(|(number, share)| PlacementRequest {
                role: if number % 2 == 0 { Role::Prefill } else { Role::Decode },
                ranks: 1,
                fixed: Vec::new(),
                share: *share,
            })
            .collect();
        let places = place(&gpus, &groups);
        for gpu in &gpus {
            let on_it: Vec<f64> =
                places.iter().zip(&shares).filter(|(place, _)| place.contains(&gpu.index)).map(|(_, share)| *share).collect();
            prop_assert!(on_it.len() <= 1 || on_it.iter().sum::<f64>() <= MOST + 1e-9, "{on_it:?}");
        }
    }
}
