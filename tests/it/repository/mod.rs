//! Checks of the repository itself: sources, documents and hints.

mod clocks;
mod documents;
mod hints;
mod tidy;
