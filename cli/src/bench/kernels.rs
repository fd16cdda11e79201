//! Decode attention alone.

use super::{
    Time,
    ceilings::Ceilings,
    ragged::{Heads, Ragged, Tuning},
    timer::{time, time_graph},
};
use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Query heads, KV heads and head size, such as 32x8x64; several with commas.
    #[arg(long, value_delimiter = ',', default_value = "32x8x64,12x2x128,32x8x128")]
    heads: Vec<String>,
    /// Tokens of context.
    #[arg(long, value_delimiter = ',', default_value = "8192,32768")]
    context: Vec<usize>,
    /// Sequences.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    batch: Vec<usize>,
    /// Tokens of context for one that is held, mean over the rows; lengths are lognormal with sigma 0.5.
    #[arg(long, default_value_t = 8.0)]
    compression: f64,
    /// Entries of a page.
    #[arg(long, default_value_t = 32)]
    page_size: usize,
    #[command(flatten)]
    tuning: Tuning,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    heads: String,
    context: usize,
    batch: usize,
    mean_len: f64,
    megabytes: f64,
    attention: Time,
    gb_s: f64,
    of_read_ceiling: f64,
    /// One launch for all layers.
    schedule: Time,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let device = kvpolicy::cuda_device(0)?;
    let stream = device.as_cuda_device()?.cuda_stream();
    let ceilings = Ceilings::measure(&device)?;
    let mut rows = vec![];
    for text in &args.heads {
        let heads = heads(text)?;
        for &context in &args.context {
            for &batch in &args.batch {
                let mean = context as f64 / args.compression;
                let ragged = Ragged::new(&stream, heads, batch, mean, args.page_size, args.tuning)?;
                let schedule = time(&stream, (3, 20), 1, || ragged.schedule())?;
                let launches = ragged.layers.max(16);
                let attention = time_graph(&stream, (3, 30), launches, || {
                    (0..launches).try_for_each(|i| ragged.attend(i % ragged.layers))
                })?;
                let gb_s = ragged.bytes() / attention.median_us / 1e3;
                rows.push(Row {
                    heads: text.clone(),
                    context,
                    batch,
                    mean_len: mean,
                    megabytes: ragged.bytes() / 1e6,
                    attention,
                    gb_s,
                    of_read_ceiling: gb_s / ceilings.read_gb_s,
                    schedule,
                });
            }
        }
    }
    super::print(args.json, &ceilings, &rows, table)
}

pub(crate) fn heads(text: &str) -> Result<Heads> {
    let numbers: Option<Vec<usize>> = text.split('x').map(|n| n.parse().ok()).collect();
    match numbers.as_deref() {
        Some(&[q, kv, dim]) if kv > 0 && q % kv == 0 => Some(Heads { q, kv, dim }),
        _ => None,
    }
    .with_context(|| format!("heads `{text}` are not of the form 32x8x64: query heads, KV heads, head size"))
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["heads", "context", "batch", "MB", "attention us", "GB/s", "of read", "schedule us"]);
    for row in rows {
        let cells = [
            row.heads.clone(),
            row.context.to_string(),
            row.batch.to_string(),
            format!("{:.1}", row.megabytes),
            row.attention.to_string(),
            format!("{:.0}", row.gb_s),
            format!("{:.0}%", row.of_read_ceiling * 100.0),
            row.schedule.to_string(),
        ];
        table.add_row(cells.map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
    }
    table
}
