//! Temporary: only `xpyd sim`.

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Runs a simulated engine
    Sim(xpyd::cli::sim::Arguments),
}

#[tokio::main]
async fn main() -> std::process::ExitCode {
    let Verb::Sim(arguments) = Command::parse().verb;
    let options = match arguments.into_options() {
        Ok(options) => options,
        Err(failure) => {
            anstream::eprintln!("{failure}");
            return failure.status.code().into();
        }
    };
    match xpyd::sim::run(options).await {
        Ok(status) => status.code().into(),
        Err(error) => {
            anstream::eprintln!("error: {}", xpyd::report::one_line(&error));
            1.into()
        }
    }
}
