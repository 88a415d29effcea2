//! The `xpyd` program. All code is in the library.

fn main() -> std::process::ExitCode {
    xpyd::cli::main()
}
