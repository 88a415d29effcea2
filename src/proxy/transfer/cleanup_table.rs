//! What a hand-off that ended early owes, by how its KV moves, how far it came and how it ended.
//!
//! Pure. What real engines did is vLLM 0.32.0 with NIXL 1.5.1 and LMCache 0.5.6.

/// How KV moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// The decode engine fetches it from the prefill engine, which keeps it under a lease.
    Pulled,
    /// The prefill engine writes it into the decode engine's buffer, which only a decode of the same prompt empties.
    Pushed,
}

/// How far a hand-off came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The decode engine is reserved, nothing was sent.
    Reserved,
    /// The prefill leg was sent.
    Prefilling,
    /// The KV waits for the decode leg.
    Handed,
    /// The decode leg was sent.
    Sent,
    /// The decode engine refused the request.
    Refused,
}

/// How a hand-off ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The client left.
    Left,
    /// The leg never reached its engine.
    Unsent,
    /// The engine answered with an error, or broke off.
    Failed,
    /// A deadline passed.
    Late,
    /// The prefill engine has gone.
    PrefillGone,
    /// The decode engine has gone.
    DecodeGone,
}

/// What is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Debt {
    /// Nothing.
    Nothing,
    /// The prefill engine's blocks are to be freed.
    Release,
    /// The decode engine's buffer is to be emptied.
    Consume,
    /// The same once the KV has come: its notification is there, or nobody is left to send it, or it is overdue.
    ConsumeOnceThere,
    /// The same at once, because the notification may have been lost, and again if it comes after all.
    ConsumeNowAndLater,
}

/// The table.
pub(crate) fn owed(way: Way, progress: Progress, end: End) -> Debt {
    use Progress::{Handed, Prefilling, Refused, Reserved, Sent};
    match (way, progress, end) {
        // No KV is anywhere. A prefill engine whose client leaves aborts, and keeps nothing.
        (_, Reserved, _) | (Way::Pulled, Prefilling, _) | (_, Prefilling, End::Unsent) => Debt::Nothing,
        // The KV went with the engine that held it.
        (Way::Pulled, _, End::PrefillGone) | (Way::Pushed, _, End::DecodeGone) => Debt::Nothing,
        // A decode engine whose client leaves tells the prefill engine by itself.
        (Way::Pulled, Sent, End::Left) => Debt::Nothing,
        // One that has not seen the parameters, or may be frozen, does not.
        (Way::Pulled, Handed | Sent | Refused, _) => Debt::Release,
        (Way::Pushed, Prefilling, End::Late) => Debt::ConsumeNowAndLater,
        // Pages count as there from the moment they are allocated, so those of a dead engine must go as well.
        (Way::Pushed, Prefilling, _) => Debt::ConsumeOnceThere,
        (Way::Pushed, Handed | Sent | Refused, _) => Debt::Consume,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table, a letter a cell: `-` nothing, `R` release, `C` consume, `A` consume once there, `B` now and later.
    #[test]
    fn every_cell_of_the_table() {
        let ends = [
            End::Left,
            End::Unsent,
            End::Failed,
            End::Late,
            End::PrefillGone,
            End::DecodeGone,
        ];
        let rows = [
            (Way::Pulled, Progress::Reserved, "------"),
            (Way::Pulled, Progress::Prefilling, "------"),
            (Way::Pulled, Progress::Handed, "RRRR-R"),
            (Way::Pulled, Progress::Sent, "-RRR-R"),
            (Way::Pulled, Progress::Refused, "RRRR-R"),
            (Way::Pushed, Progress::Reserved, "------"),
            (Way::Pushed, Progress::Prefilling, "A-ABA-"),
            (Way::Pushed, Progress::Handed, "CCCCC-"),
            (Way::Pushed, Progress::Sent, "CCCCC-"),
            (Way::Pushed, Progress::Refused, "CCCCC-"),
        ];
        for (way, progress, expected) in rows {
            let cells: String = ends
                .iter()
                .map(|end| match owed(way, progress, *end) {
                    Debt::Nothing => '-',
                    Debt::Release => 'R',
                    Debt::Consume => 'C',
                    Debt::ConsumeOnceThere => 'A',
                    Debt::ConsumeNowAndLater => 'B',
                })
                .collect();
            assert_eq!(cells, expected, "{way:?} {progress:?}");
        }
    }
}
