//! The `kv-host` program.

use clap::{Parser, Subcommand};
use kv_host::{Change, Host, MISTRALRS, Network, Result, install, undo};
use std::{path::PathBuf, process::ExitCode};

/// Prepares a cargo project so that the runtime it uses can hand its KV cache to a policy.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    runtime: Runtime,
}

#[derive(Debug, Subcommand)]
enum Runtime {
    /// mistral.rs 0.8.1: adds the feature `kv-policy` to mistralrs-core.
    Mistralrs(Options),
}

#[derive(Debug, clap::Args)]
struct Options {
    /// The project's folder, with its Cargo.toml.
    #[arg(long, default_value = ".")]
    project: PathBuf,
    /// Take the patch out again.
    #[arg(long)]
    undo: bool,
}

fn main() -> ExitCode {
    let Runtime::Mistralrs(options) = Arguments::parse().runtime;
    match run(&options, &MISTRALRS) {
        Ok(message) => {
            println!("{message}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kv-host: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, host: &Host) -> Result<String> {
    let (project, id) = (options.project.display(), host.id());
    if options.undo {
        return Ok(match undo(&options.project, host)? {
            Change::Made => format!("{project} uses {id} as published"),
            Change::None => format!("{project} had no patch of {id}"),
        });
    }
    Ok(match install(&options.project, host, Network::Allowed)? {
        Change::Made => format!("{project} uses {id} with the feature `kv-policy`"),
        Change::None => format!("{project} used {id} with the feature `kv-policy` already"),
    })
}
