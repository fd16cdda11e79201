//! The `kvpolicy-serve` program.

use clap::Parser;
use kvpolicy_serve::{Options, Result, Served, router};
use mistralrs_core::initialize_logging;
use std::process::ExitCode;
use tokio::net::TcpListener;

/// Serves a model over the OpenAI API, under one or several KV cache policies.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: String,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    initialize_logging();
    match run(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvpolicy-serve: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<()> {
    let listener = TcpListener::bind(&arguments.listen).await?;
    let served = Served::load(&arguments.options).await?;
    println!("http://{} serves {}", listener.local_addr()?, served.names().join(", "));
    let stop = async { _ = tokio::signal::ctrl_c().await };
    Ok(axum::serve(listener, router(served)).with_graceful_shutdown(stop).await?)
}
