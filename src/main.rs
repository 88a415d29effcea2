//! The `xpyd` program: everything is in the library.

fn main() -> std::process::ExitCode {
    xpyd::cli::main()
}
