//! The clean-up that a hand-off needs when it ends early, by how its KV moves, how far it came and how it ended.
//!
//! Pure. It follows what real engines did: vLLM 0.32.0 with NIXL 1.5.1 and LMCache 0.5.6.

/// How KV moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransferMode {
    /// The decode engine fetches it from the prefill engine, which keeps it under a lease.
    Pulled,
    /// The prefill engine writes it into the decode engine's buffer, which only a decode of the same prompt empties.
    Pushed,
}

/// How far a hand-off came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransferProgress {
    /// The decode engine is reserved; nothing was sent.
    Reserved,
    /// The prefill leg was sent.
    Prefilling,
    /// The KV waits for the decode leg.
    Delivered,
    /// The decode leg was sent.
    Sent,
    /// The decode engine refused the request.
    Refused,
}

/// How a hand-off ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransferEnd {
    /// The client left.
    Left,
    /// The leg never reached its engine.
    Unsent,
    /// The engine answered with an error, or broke off.
    Failed,
    /// A deadline passed.
    Late,
    /// The prefill engine has ended.
    PrefillGone,
    /// The decode engine has ended.
    DecodeGone,
}

/// The clean-up that a hand-off needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CleanupAction {
    /// Nothing to do.
    Nothing,
    /// Free the prefill engine's blocks.
    Release,
    /// Empty the decode engine's buffer.
    Consume,
    /// Empty the buffer once the KV has arrived: its notification came, its sender is gone, or it is overdue.
    ConsumeOnArrival,
    /// Empty the buffer at once, because the notification could be lost, and again if it comes after all.
    ConsumeNowAndOnArrival,
}

/// The table of clean-ups.
pub(crate) fn cleanup_for(mode: TransferMode, progress: TransferProgress, end: TransferEnd) -> CleanupAction {
    use TransferProgress::{Delivered, Prefilling, Refused, Reserved, Sent};
    match (mode, progress, end) {
        // No engine holds KV. A prefill engine whose client leaves aborts, and keeps nothing.
        (_, Reserved, _) | (TransferMode::Pulled, Prefilling, _) | (_, Prefilling, TransferEnd::Unsent) => {
            CleanupAction::Nothing
        }
        // The KV is gone with the engine that held it.
        (TransferMode::Pulled, _, TransferEnd::PrefillGone) | (TransferMode::Pushed, _, TransferEnd::DecodeGone) => {
            CleanupAction::Nothing
        }
        // A decode engine whose client leaves notifies the prefill engine itself.
        (TransferMode::Pulled, Sent, TransferEnd::Left) => CleanupAction::Nothing,
        // A decode engine that has not seen the parameters, or that could be frozen, does not.
        (TransferMode::Pulled, Delivered | Sent | Refused, _) => CleanupAction::Release,
        (TransferMode::Pushed, Prefilling, TransferEnd::Late) => CleanupAction::ConsumeNowAndOnArrival,
        // LMCache counts pages as present from their allocation, so those of a dead engine must go as well.
        (TransferMode::Pushed, Prefilling, _) => CleanupAction::ConsumeOnArrival,
        (TransferMode::Pushed, Delivered | Sent | Refused, _) => CleanupAction::Consume,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table, a letter a cell: `-` nothing, `R` release, `C` consume, `A` consume on arrival, `B` consume
    /// now and on arrival.
    #[test]
    fn every_cell_of_the_table() {
        let ends = [
            TransferEnd::Left,
            TransferEnd::Unsent,
            TransferEnd::Failed,
            TransferEnd::Late,
            TransferEnd::PrefillGone,
            TransferEnd::DecodeGone,
        ];
        let rows = [
            (TransferMode::Pulled, TransferProgress::Reserved, "------"),
            (TransferMode::Pulled, TransferProgress::Prefilling, "------"),
            (TransferMode::Pulled, TransferProgress::Delivered, "RRRR-R"),
            (TransferMode::Pulled, TransferProgress::Sent, "-RRR-R"),
            (TransferMode::Pulled, TransferProgress::Refused, "RRRR-R"),
            (TransferMode::Pushed, TransferProgress::Reserved, "------"),
            (TransferMode::Pushed, TransferProgress::Prefilling, "A-ABA-"),
            (TransferMode::Pushed, TransferProgress::Delivered, "CCCCC-"),
            (TransferMode::Pushed, TransferProgress::Sent, "CCCCC-"),
            (TransferMode::Pushed, TransferProgress::Refused, "CCCCC-"),
        ];
        for (mode, progress, expected) in rows {
            let cells: String = ends
                .iter()
                .map(|end| match cleanup_for(mode, progress, *end) {
                    CleanupAction::Nothing => '-',
                    CleanupAction::Release => 'R',
                    CleanupAction::Consume => 'C',
                    CleanupAction::ConsumeOnArrival => 'A',
                    CleanupAction::ConsumeNowAndOnArrival => 'B',
                })
                .collect();
            assert_eq!(cells, expected, "{mode:?} {progress:?}");
        }
    }
}
