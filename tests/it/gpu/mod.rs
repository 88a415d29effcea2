//! GPUs as a fake NVML reports them: plans, memory, and placement of running engines.

mod machine;
mod memory;
mod placement;
mod plan;
