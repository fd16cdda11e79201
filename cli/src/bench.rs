//! `kvpolicy bench`: kernels and whole models on a GPU, with random weights of the exact shape.

mod candle;
mod ceilings;
mod decode;
mod kernels;
mod model;
mod prefill;
mod timer;

use anyhow::Result;
use ceilings::Ceilings;
use clap::Subcommand;
use comfy_table::Table;
use kvpolicy::{Policy, Registry};
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Kernels alone: decode attention over ragged rows, as an evicting policy makes them, and what else a step launches.
    Kernels(kernels::Args),
    /// Decode of a whole model, each step one CUDA graph.
    Decode(decode::Args),
    /// Attention of a prompt, with append and eviction.
    Prefill(prefill::Args),
}

pub(crate) fn run(args: &Args, registry: &Registry) -> Result<()> {
    match &args.what {
        What::Kernels(args) => kernels::run(args),
        What::Decode(args) => decode::run(args, registry),
        What::Prefill(args) => prefill::run(args, registry),
    }
}

/// Policies separated by `;`.
pub(crate) fn policies(text: &str, registry: &Registry) -> Result<Vec<Arc<dyn Policy>>> {
    Registry::split_list(text)?.into_iter().map(|text| Ok(registry.parse(text)?)).collect()
}

/// Prints what was measured: as JSON, or the ceilings and a table.
pub(crate) fn print<R: Serialize>(json: bool, ceilings: &Ceilings, rows: &[R], table: fn(&[R]) -> Table) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "ceilings": ceilings, "rows": rows }))?);
    } else {
        println!("{ceilings}\n{}", table(rows));
    }
    Ok(())
}

/// Median and quartiles of a time.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Time {
    /// Microseconds.
    pub(crate) median_us: f64,
    pub(crate) low_us: f64,
    pub(crate) high_us: f64,
}

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} ({:.1}-{:.1})", self.median_us, self.low_us, self.high_us)
    }
}
