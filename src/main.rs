//! The `xpyd` program: everything is in the library.

use std::process::ExitCode;

use xpyd::supervisor::guardian;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("guardian") => ExitCode::from(guardian::process::run().code()),
        Some(_) | None => ExitCode::SUCCESS,
    }
}
