//! Checks of the repository itself: its sources, documents and hints.

mod clocks;
mod documents;
mod hints;
mod tidy;
