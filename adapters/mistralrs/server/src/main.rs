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
    serve: Option<Serve>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Compare policies on a model, as `kvpolicy compare` does; tasks are those whose names end in -aware, and benchmarks.
    Compare(Box<CompareArgs>),
}

#[derive(Debug, clap::Args)]
struct Serve {
    #[command(flatten)]
    options: Options,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let done = match Arguments::parse() {
        Arguments { command: Some(Command::Compare(args)), .. } => compare(args).await,
        Arguments { serve: Some(serve), .. } => run(&serve).await.map_err(|error| error.to_string()),
        Arguments { serve: None, .. } => Err("--model is missing".into()),
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

async fn run(arguments: &Serve) -> Result<()> {
    initialize_logging();
    let listener = TcpListener::bind(&arguments.listen).await?;
    let served = Served::load(&arguments.options).await?;
    println!("http://{} serves {}", listener.local_addr()?, served.names().join(", "));
    let stop = async { _ = tokio::signal::ctrl_c().await };
    Ok(axum::serve(listener, router(served)).with_graceful_shutdown(stop).await?)
}
