//! The `kvpolicy-serve` program.

use clap::{Parser, Subcommand};
use kvpolicy::Registry;
use kvpolicy_serve::{
    Options, Result, Served,
    compare::{self, CompareArgs},
    router,
};
use mistralrs_core::initialize_logging;
use std::process::ExitCode;
use tokio::net::TcpListener;

/// Serves a model over the OpenAI API, under one or several KV cache policies.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    arg_required_else_help = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Option<Options>, // as given, not within another struct: clap sees only a group's own arguments
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare policies on a model, as `kvpolicy compare` does; tasks are those whose names end in -aware, and benchmarks.
    Compare(Box<CompareArgs>),
}

#[tokio::main]
async fn main() -> ExitCode {
    let done = match Arguments::parse() {
        Arguments { command: Some(Command::Compare(args)), .. } => compare(args).await,
        Arguments { options: Some(options), listen, .. } => {
            serve(&options, &listen).await.map_err(|error| error.to_string())
        }
        Arguments { options: None, .. } => Err("--model is missing".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvpolicy-serve: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn compare(args: Box<CompareArgs>) -> std::result::Result<(), String> {
    let compared = tokio::task::spawn_blocking(move || compare::run(&args, &Registry::standard())).await;
    compared.map_err(|error| error.to_string())?.map_err(|error| format!("{error:#}"))
}

async fn serve(options: &Options, listen: &str) -> Result<()> {
    initialize_logging();
    let listener = TcpListener::bind(listen).await?;
    let served = Served::load(options).await?;
    println!("http://{} serves {}", listener.local_addr()?, served.names().join(", "));
    let stop = async { _ = tokio::signal::ctrl_c().await };
    Ok(axum::serve(listener, router(served)).with_graceful_shutdown(stop).await?)
}
