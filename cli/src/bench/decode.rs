//! Decode of a whole model: greedy, each step one CUDA graph.

use super::{
    Time,
    candle::Dense,
    ceilings::Ceilings,
    model::{ModelArgs, weight_bytes},
    timer::quartiles,
};
use anyhow::{Result, ensure};
use candle_core::Tensor;
use comfy_table::{Cell, CellAlignment, Table, presets};
use cudarc::driver::{CudaEvent, CudaStream, sys};
use kvpolicy::{DecodeGraph, KvCache, Phase, Policy, Registry, SeqId, Step};
use kvpolicy_candle::Model;
use serde::Serialize;
use std::{sync::Arc, time::Instant};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Steps that are timed.
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// Launch each kernel by itself instead of one graph a step.
    #[arg(long)]
    eager: bool,
    /// Batches at which candle-transformers' dense model is timed as well (llama only); its prefill needs memory that
    /// grows with the square of the context.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    baseline: Vec<usize>,
}

#[derive(Debug, Serialize)]
struct Row {
    policy: String,
    context: usize,
    batch: usize,
    graph: bool,
    step: Time,
    tokens_per_s: f64,
    prefill_tokens_per_s: f64,
    /// Entries of a KV head, mean.
    live_per_head: f64,
    kv_bytes: u64,
    /// Bytes held for one of a live entry's keys and values.
    kv_overhead: f64,
    /// Weights and live entries over the read ceiling, us.
    floor_us: f64,
}

const WARM_UP: usize = 3;

pub(crate) fn run(args: &Args, registry: &Registry) -> Result<()> {
    let policies = super::policies(&args.model.policies, registry)?;
    ensure!(args.steps > 0, "steps=0: there is nothing to time");
    let device = kvpolicy::cuda_device(0)?;
    let ceilings = Ceilings::measure(&device)?;
    let model = args.model.load(&device)?;
    let mut rows = vec![];
    for &context in &args.model.context {
        for &batch in &args.model.batch {
            for policy in &policies {
                rows.push(measure(args, &model, policy, context, batch, &ceilings)?);
            }
        }
    }
    drop(model);
    for &context in &args.model.context {
        for &batch in args.baseline.iter().filter(|batch| args.model.batch.contains(batch)) {
            rows.extend(baseline(args, &device, context, batch, &ceilings)?);
        }
    }
    super::print(args.model.json, &ceilings, &rows, table)
}

/// A decode loop whose tokens never leave the device.
struct Loop<'a> {
    model: &'a Model,
    cache: KvCache,
    sequences: Vec<SeqId>,
    tokens: Tensor, // u32 [sequences]
    graph: Option<DecodeGraph>,
}

impl Loop<'_> {
    fn forward(model: &Model, tokens: &Tensor, step: &Step, cache: &mut KvCache) -> Result<()> {
        let next = model.greedy(tokens, step, cache, None)?;
        Ok(tokens.slice_set(&next, 0, 0)?)
    }

    fn step(&mut self) -> Result<()> {
        let failures = match &self.graph {
            Some(graph) => self.cache.replay(graph)?,
            None => {
                let work: Vec<_> = self.sequences.iter().map(|&seq| (seq, 1, Phase::Decode)).collect();
                let step = self.cache.begin(&work)?;
                Self::forward(self.model, &self.tokens, &step, &mut self.cache)?;
                self.cache.end(step)
            }
        };
        failures.into_iter().next().map_or(Ok(()), |(_, error)| Err(error.into()))
    }

    fn record(&mut self) -> Result<()> {
        let (model, tokens) = (self.model, &self.tokens);
        let captured = self.cache.capture(&self.sequences, |step, cache| Self::forward(model, tokens, step, cache))?;
        self.graph = Some(captured.0);
        Ok(())
    }
}

fn measure(
    args: &Args,
    model: &Model,
    policy: &Arc<dyn Policy>,
    context: usize,
    batch: usize,
    ceilings: &Ceilings,
) -> Result<Row> {
    let stream = model.device().as_cuda_device()?.cuda_stream();
    let most = context + args.steps + 2 * WARM_UP + 1;
    let mut cache = args.model.cache(model, policy.clone(), batch, most)?;
    let sequences: Vec<SeqId> = (0..batch).map(|_| cache.open()).collect();
    let started = Instant::now();
    let first: Vec<Tensor> =
        sequences.iter().map(|&seq| args.model.prefill(model, &mut cache, seq, context)).collect::<Result<_>>()?;
    stream.synchronize()?;
    let prefill = (batch * context) as f64 / started.elapsed().as_secs_f64();
    let tokens = Tensor::cat(&first, 0)?;
    let mut decode = Loop { model, cache, sequences, tokens, graph: None };
    for _ in 0..WARM_UP {
        decode.step()?;
    }
    if !args.eager {
        decode.record()?;
    }
    for _ in 0..WARM_UP {
        decode.step()?;
    }
    let step = time_steps(&stream, args.steps, || decode.step())?;
    let failures = decode.cache.wait()?;
    ensure!(failures.is_empty(), "the pool ran out while decoding");

    let (spec, usage) = (model.config().spec(), decode.cache.usage());
    let entry_bytes = usage.dense_bytes_per_token as f64 / (spec.layers * spec.kv_heads) as f64;
    let live_bytes = usage.live_entries as f64 * entry_bytes;
    Ok(Row {
        policy: policy.to_string(),
        context,
        batch,
        graph: !args.eager,
        step,
        tokens_per_s: batch as f64 / step.median_us * 1e6,
        prefill_tokens_per_s: prefill,
        live_per_head: usage.live_entries as f64 / (spec.layers * spec.kv_heads * batch) as f64,
        kv_bytes: usage.bytes_in_use,
        kv_overhead: usage.bytes_in_use as f64 / live_bytes,
        floor_us: (weight_bytes(model.config()) + live_bytes) / ceilings.read_gb_s / 1e3,
    })
}

/// The times from step to step.
fn time_steps(stream: &Arc<CudaStream>, steps: usize, mut step: impl FnMut() -> Result<()>) -> Result<Time> {
    let event = || -> Result<CudaEvent> { Ok(stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT))?) };
    let mut events = vec![event()?];
    for _ in 0..steps {
        step()?;
        events.push(event()?);
    }
    let times = events.windows(2).map(|pair| Ok(pair[0].elapsed_ms(&pair[1])? as f64 * 1e3));
    Ok(quartiles(times.collect::<Result<_>>()?))
}

fn baseline(
    args: &Args,
    device: &candle_core::Device,
    context: usize,
    batch: usize,
    ceilings: &Ceilings,
) -> Result<Option<Row>> {
    let config = kvpolicy_candle::Config::preset(&args.model.preset)?;
    let Some(mut dense) = Dense::random(&config, device)? else { return Ok(None) };
    let stream = device.as_cuda_device()?.cuda_stream();
    let started = Instant::now();
    if let Err(error) = dense.prefill(batch, context) {
        eprintln!("candle-transformers cannot prefill {batch} x {context}: {}", first_line(&error));
        return Ok(None);
    }
    let prefill = (batch * context) as f64 / started.elapsed().as_secs_f64();
    for _ in 0..WARM_UP {
        dense.step()?;
    }
    let step = time_steps(&stream, args.steps.min(20), || dense.step())?;
    let entries = (config.layers * config.kv_heads * batch * context) as f64;
    let kv_bytes = entries * (2 * 2 * config.head_dim) as f64;
    Ok(Some(Row {
        policy: "candle-transformers, dense".into(),
        context,
        batch,
        graph: false,
        step,
        tokens_per_s: batch as f64 / step.median_us * 1e6,
        prefill_tokens_per_s: prefill,
        live_per_head: context as f64,
        kv_bytes: kv_bytes as u64,
        kv_overhead: 1.0,
        floor_us: (weight_bytes(&config) + kv_bytes) / ceilings.read_gb_s / 1e3,
    }))
}

fn first_line(error: &anyhow::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let header = [
        "policy",
        "context",
        "batch",
        "step us",
        "tok/s",
        "floor us",
        "live a head",
        "KV MiB",
        "over live",
        "prefill tok/s",
    ];
    table.set_header(header);
    for row in rows {
        let cells = [
            row.policy.clone(),
            row.context.to_string(),
            row.batch.to_string(),
            row.step.to_string(),
            format!("{:.0}", row.tokens_per_s),
            format!("{:.0}", row.floor_us),
            format!("{:.0}", row.live_per_head),
            format!("{:.1}", row.kv_bytes as f64 / (1 << 20) as f64),
            format!("{:.3}x", row.kv_overhead),
            format!("{:.0}", row.prefill_tokens_per_s),
        ];
        table.add_row(cells.map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
    }
    table
}
