//! The `kvpolicy` program as a library, so that a user's own policies can run in it:
//!
//! ```no_run
//! # use kvpolicy::Registry;
//! let registry = Registry::standard(); // registry.add::<MyPolicy>();
//! kvpolicy_cli::run(registry);
//! ```

#[cfg(feature = "cuda")]
mod bench;
mod compare;
mod export;
mod generate;
mod inspect;
mod join;
mod model;
mod plan;
#[cfg(feature = "plot")]
mod plot;
mod policies;
mod report;
mod results;
mod retrofit;
mod route;
mod table;
mod train_demo;

pub use compare::{About, Args as CompareArgs, Compared, compare};
pub use model::{Float, KvType, ModelArgs, Place, bytes, device_name};

use clap::{Parser, Subcommand};
use kvpolicy::Registry;
use std::process::ExitCode;

/// Which tokens stay in the KV cache: policies side by side.
#[derive(Debug, Parser)]
#[command(name = "kvpolicy", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the policies with their parameters and papers.
    Policies(policies::Args),
    /// Generate text under a policy.
    Generate(generate::Args),
    /// Compare policies on a model: quality, memory, speed.
    Compare(compare::Args),
    /// Answer requests, each under a policy by its key: an online A/B.
    Route(route::Args),
    /// Print the table of one or more results.json as one.
    Table(join::Args),
    /// What fits a GPU, dense and compressed, and how fast it can be at best.
    Plan(plan::Args),
    /// Write the report of a comparison anew, from its folder.
    Report(report::Args),
    /// Train DMS gates into a model, whose weights stay or learn as well.
    Retrofit(retrofit::Args),
    /// Write a model with its gates as a folder of Hugging Face's, or the gates alone.
    Export(export::Args),
    /// What is in a checkpoint: model, tensors, gates, and the policy they imply.
    Inspect(inspect::Args),
    /// Train the embedded model from nothing, and its gates.
    TrainDemo(train_demo::Args),
    /// Draw the curves of trainings.
    #[cfg(feature = "plot")]
    Plot(plot::Args),
    /// Measure kernels and whole models of random weights on a GPU.
    #[cfg(feature = "cuda")]
    Bench(bench::Args),
}

/// Runs the program on the process's arguments with the policies of a registry.
pub fn run(registry: Registry) -> ExitCode {
    let result = match Cli::parse().command {
        Command::Policies(args) => policies::run(&args, &registry),
        Command::Generate(args) => generate::run(&args, &registry),
        Command::Compare(args) => compare::run(&args, &registry),
        Command::Route(args) => route::run(&args, &registry),
        Command::Table(args) => join::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Retrofit(args) => retrofit::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::TrainDemo(args) => train_demo::run(&args),
        #[cfg(feature = "plot")]
        Command::Plot(args) => plot::run(&args),
        #[cfg(feature = "cuda")]
        Command::Bench(args) => bench::run(&args, &registry),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
