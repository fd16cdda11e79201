//! Kernels alone: what a step launches, each on its own.

mod prompt;
mod ragged;
mod rig;
mod step;

use super::{
    Time,
    ceilings::Ceilings,
    timer::{time, time_graph},
};
use crate::model::KvType;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use comfy_table::{Cell, CellAlignment, Table, presets};
use cudarc::driver::CudaStream;
use kvpolicy_kernels::Dtype;
use ragged::{Pages, Ragged, Tuning};
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to time.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "decode,schedule")]
    kernels: Vec<Kernel>,
    /// Query heads, KV heads and head size, such as 32x8x64; several with commas.
    #[arg(long, value_delimiter = ',', default_value = "32x8x64,12x2x128,32x8x128")]
    heads: Vec<String>,
    /// Tokens of context.
    #[arg(long, value_delimiter = ',', default_value = "8192,32768")]
    context: Vec<usize>,
    /// Sequences; kernels of a prompt take one.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    batch: Vec<usize>,
    /// Tokens of context for one that is held, mean over the rows; decode attention draws lengths around it, lognormal with
    /// sigma 0.5.
    #[arg(long, default_value_t = 8.0)]
    compression: f64,
    /// Entries of a page.
    #[arg(long, default_value_t = 32)]
    page_size: usize,
    /// Also time each kernel on the same layer again and again, so that a small one finds it in the cache.
    #[arg(long)]
    hot: bool,
    /// Type of the keys and values that decode attention reads: bf16, fp8 or int8.
    #[arg(long, value_enum, default_value = "bf16")]
    kv_dtype: KvType,
    #[command(flatten)]
    tuning: Tuning,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kernel {
    /// Every one.
    All,
    /// Decode attention over ragged rows.
    Decode,
    /// Cutting decode attention into equal runs, once a step.
    Schedule,
    /// Room for a step's tokens, once a step.
    Plan,
    /// Writing a step's tokens, and a prompt's chunk.
    Append,
    /// Dense causal attention of a prompt.
    Prefill,
    /// The mass that queries put on entries, of a step and of a prompt.
    Mass,
    /// Dropping one entry of each row, and most of a prompt.
    Trim,
    /// A policy's view of what is held: the order of entries, and their keys.
    Held,
    /// Remembering a step's queries.
    Observe,
    /// Decision logits.
    Gate,
}

/// Heads of a model: query heads, KV heads, components of a head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) q: usize,
    pub(crate) kv: usize,
    pub(crate) dim: usize,
}

/// What a launch does, and so which ceiling it is held against.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// Bytes that are read, and hardly any written.
    Reads(f64),
    /// Bytes that are read and written.
    Moves(f64),
    /// Floating point operations.
    Computes(f64),
}

/// A launch, and how long it takes.
#[derive(Debug, Serialize)]
struct Timed {
    /// MB, or GFLOP.
    amount: f64,
    time: Time,
    /// GB/s, or TFLOP/s.
    rate: f64,
    of_ceiling: f64,
}

#[derive(Debug, Serialize)]
struct Row {
    kernel: String,
    heads: String,
    context: usize,
    batch: usize,
    unit: &'static str,
    /// Layers in turn.
    cold: Timed,
    /// One layer again and again.
    hot: Option<Timed>,
}

/// What is timed now, and what was timed before.
struct Bench<'a> {
    args: &'a Args,
    stream: Arc<CudaStream>,
    ceilings: Ceilings,
    rows: Vec<Row>,
    text: String,
    heads: Heads,
    context: usize,
    batch: usize,
}

/// As kernels know a type.
fn kernel_dtype(kv: KvType) -> Result<Dtype> {
    match kv {
        KvType::Bf16 => Ok(Dtype::Bf16),
        KvType::Fp8 => Ok(Dtype::Fp8),
        KvType::Int8 => Ok(Dtype::Int8),
        other => bail!("kv-dtype {other:?}: kernels are timed on bf16, fp8 and int8"),
    }
}

impl Bench<'_> {
    fn wants(&self, kernel: Kernel) -> bool {
        self.args.kernels.iter().any(|&wanted| wanted == kernel || wanted == Kernel::All)
    }

    /// Entries of a row that are held, mean.
    fn mean(&self) -> f64 {
        self.context as f64 / self.args.compression
    }

    /// Times one launch a layer, in turn.
    fn add(&mut self, kernel: &str, work: Work, layers: usize, launch: impl Fn(usize) -> Result<()>) -> Result<()> {
        self.add_unlike(kernel, [work, work], layers, launch)
    }

    /// The same where a launch on the first layer does other `work` than one on all layers in the mean.
    fn add_unlike(
        &mut self,
        kernel: &str,
        [cold, hot]: [Work; 2],
        layers: usize,
        launch: impl Fn(usize) -> Result<()>,
    ) -> Result<()> {
        // Launches that compute last long enough.
        let launches = if let Work::Computes(_) = cold { 2 } else { layers.max(16) };
        let time = |period: usize| {
            time_graph(&self.stream, (3, 30), launches, || (0..launches).try_for_each(|i| launch(i % period)))
        };
        let cold = (cold, time(layers)?);
        let hot = if self.args.hot { Some((hot, time(1)?)) } else { None };
        self.push(kernel, cold, hot);
        Ok(())
    }

    fn push(&mut self, kernel: &str, cold: (Work, Time), hot: Option<(Work, Time)>) {
        self.rows.push(Row {
            kernel: kernel.into(),
            heads: self.text.clone(),
            context: self.context,
            batch: self.batch,
            unit: cold.0.unit(),
            cold: cold.0.timed(cold.1, &self.ceilings),
            hot: hot.map(|(work, time)| work.timed(time, &self.ceilings)),
        });
    }

    /// Kernels whose time depends on the lengths of rows.
    fn ragged(&mut self) -> Result<()> {
        if !self.wants(Kernel::Decode) && !self.wants(Kernel::Schedule) {
            return Ok(());
        }
        let Args { page_size, kv_dtype, tuning, .. } = *self.args;
        let pages = Pages { size: page_size, dtype: kernel_dtype(kv_dtype)? };
        let ragged = Ragged::new(&self.stream, self.heads, self.batch, self.mean(), pages, tuning)?;
        let schedule = time(&self.stream, (3, 20), 1, || ragged.schedule())?;
        if self.wants(Kernel::Decode) {
            let work = [ragged.layers, 1].map(|layers| Work::Reads(ragged.bytes(layers)));
            self.add_unlike("decode attention", work, ragged.layers, |layer| ragged.attend(layer))?;
        }
        if self.wants(Kernel::Schedule) {
            let kernel = format!("schedule, {} layers", ragged.layers);
            self.push(&kernel, (Work::Moves(ragged.schedule_bytes()), schedule), None);
        }
        Ok(())
    }
}

impl Work {
    fn unit(self) -> &'static str {
        match self {
            Self::Reads(_) => "MB read",
            Self::Moves(_) => "MB moved",
            Self::Computes(_) => "GFLOP",
        }
    }

    fn timed(self, time: Time, ceilings: &Ceilings) -> Timed {
        // Units of the amount, and of the rate from a microsecond.
        let (all, units, per, ceiling) = match self {
            Self::Reads(bytes) => (bytes, 1e6, 1e3, ceilings.read_gb_s),
            Self::Moves(bytes) => (bytes, 1e6, 1e3, ceilings.copy_gb_s),
            Self::Computes(flops) => (flops, 1e9, 1e6, ceilings.matmul_tflop_s),
        };
        let rate = all / time.median_us / per;
        Timed { amount: all / units, time, rate, of_ceiling: rate / ceiling }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let device = kvpolicy::cuda_device(0)?;
    let mut bench = Bench {
        args,
        stream: device.as_cuda_device()?.cuda_stream(),
        ceilings: Ceilings::measure(&device)?,
        rows: vec![],
        text: String::new(),
        heads: Heads { q: 1, kv: 1, dim: 1 },
        context: 0,
        batch: 0,
    };
    for text in &args.heads {
        (bench.text, bench.heads) = (text.clone(), heads(text)?);
        for &context in &args.context {
            bench.context = context;
            for &batch in &args.batch {
                bench.batch = batch;
                bench.ragged()?;
                bench.step()?;
            }
            bench.batch = 1;
            bench.prompt()?;
        }
    }
    super::print(args.json, &bench.ceilings, &bench.rows, table)
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
    let hot = rows.iter().any(|row| row.hot.is_some());
    let mut header = vec!["kernel", "heads", "context", "batch", "amount", "us", "GB/s or TFLOP/s", "of the ceiling"];
    header.extend(["hot us", "hot GB/s or TFLOP/s"].iter().filter(|_| hot));
    table.set_header(header);
    for row in rows {
        let mut cells = vec![
            row.kernel.clone(),
            row.heads.clone(),
            row.context.to_string(),
            row.batch.to_string(),
            format!("{:.3} {}", row.cold.amount, row.unit),
            row.cold.time.to_string(),
            format!("{:.0}", row.cold.rate),
            format!("{:.0}%", row.cold.of_ceiling * 100.0),
        ];
        if hot {
            let cell = |text: fn(&Timed) -> String| row.hot.as_ref().map_or(String::new(), text);
            cells.extend([cell(|hot| hot.time.to_string()), cell(|hot| format!("{:.0}", hot.rate))]);
        }
        table.add_row(cells.into_iter().map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
    }
    table
}
