//! The GPUs within an inherited `CUDA_VISIBLE_DEVICES`. PURE.

use super::Gpu;

/// The GPUs in the list, in its order. As in CUDA, an entry without a GPU hides itself and all entries after it. A number
/// is the GPU at this position on the bus, and for a GPU with MIG its first slice.
pub(super) fn within(gpus: &[Gpu], visible: &str) -> Vec<Gpu> {
    let mut found: Vec<Gpu> = Vec::new();
    for entry in visible.split(',').map(str::trim) {
        let Some(gpu) = gpus.iter().find(|gpu| names(entry, gpu)) else {
            break;
        };
        // CUDA shows no GPU for a list with duplicates; here each GPU counts once.
        if !found.iter().any(|known| known.index == gpu.index) {
            found.push(gpu.clone());
        }
    }
    found
}

fn names(entry: &str, gpu: &Gpu) -> bool {
    if let Ok(number) = entry.parse::<u32>() {
        return gpu.parent.unwrap_or(gpu.index) == number;
    }
    let is_uuid = entry.starts_with("GPU-") || entry.starts_with("MIG-");
    is_uuid && gpu.uuid.starts_with(entry)
}

#[cfg(test)]
mod tests {
    use super::super::slice_number;
    use super::*;

    fn gpu(index: u32) -> Gpu {
        Gpu {
            index,
            uuid: format!("GPU-{index}{index}{index}"),
            ..Gpu::default()
        }
    }

    fn seen(gpus: &[Gpu], visible: &str) -> Vec<u32> {
        within(gpus, visible).iter().map(|gpu| gpu.index).collect()
    }

    #[test]
    fn an_inherited_list_limits_the_gpus() {
        let gpus: Vec<Gpu> = (0..4).map(gpu).collect();
        assert_eq!(seen(&gpus, "2,0"), [2, 0]);
        assert_eq!(seen(&gpus, "GPU-333, 1"), [3, 1]);
        assert_eq!(seen(&gpus, "1,9,2"), [1]);
        assert_eq!(seen(&gpus, "1,1,2"), [1, 2]);
        for none in ["", "-1", "NoDevFiles"] {
            assert_eq!(seen(&gpus, none), [0u32; 0], "{none}");
        }
    }

    #[test]
    fn a_number_means_the_first_slice() {
        let slice = |slice| Gpu {
            index: slice_number(1, slice),
            parent: Some(1),
            uuid: format!("MIG-{slice}aaa"),
            ..Gpu::default()
        };
        let gpus = [gpu(0), slice(0), slice(1)];
        assert_eq!(seen(&gpus, "MIG-1aaa,MIG-0aaa"), [1011, 1010]);
        assert_eq!(seen(&gpus, "1,0"), [1010, 0]);
    }
}
