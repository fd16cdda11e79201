//! Attention of a prompt as a layer of a model sees it: append, attend, and let go of what the policy does not keep.

use super::{Time, ceilings::Ceilings, kernels::heads, timer::time};
use crate::model::KvType;
use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use comfy_table::{Cell, CellAlignment, Table, presets};
use kvpolicy::{CudaConfig, KvCache, ModelSpec, Phase, Policy, Registry, cuda};
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Query heads, KV heads and head size, such as 32x8x64; several with commas.
    #[arg(long, value_delimiter = ',', default_value = "32x8x64,12x2x128,32x8x128")]
    heads: Vec<String>,
    /// Tokens of the prompt.
    #[arg(long, value_delimiter = ',', default_value = "4096,8192,32768")]
    context: Vec<usize>,
    /// Policies, separated by `;`.
    #[arg(long, default_value = "full;random-gate:rate=0.875,window=256")]
    policies: String,
    /// Tokens of a prompt that are appended at a time by a policy that evicts; `full` takes the whole prompt.
    #[arg(long, value_delimiter = ',', default_value = "1024")]
    chunk: Vec<usize>,
    /// Type of stored keys and values: bf16, f16, f32, fp8 or int8.
    #[arg(long, value_enum, default_value = "bf16")]
    kv_dtype: KvType,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    heads: String,
    context: usize,
    policy: String,
    chunk: usize,
    time: Time,
    /// Of dense causal attention over the prompt, whatever was evicted.
    dense_tflop_s: f64,
}

pub(crate) fn run(args: &Args, registry: &Registry) -> Result<()> {
    let policies = super::policies(&args.policies, registry)?;
    ensure!(args.chunk.iter().all(|&chunk| chunk > 0), "chunk=0: a prompt is appended in pieces of at least one token");
    let device = kvpolicy::cuda_device(0)?;
    let ceilings = Ceilings::measure(&device)?;
    let mut rows = vec![];
    for text in &args.heads {
        for &context in &args.context {
            for policy in &policies {
                let whole = [context];
                let chunks = if policy.to_string() == "full" { &whole[..] } else { &args.chunk };
                for &chunk in chunks {
                    let time = measure(&device, text, policy, context, chunk, args.kv_dtype)?;
                    let head = heads(text)?;
                    let flops = 2.0 * (context as f64).powi(2) * (head.q * head.dim) as f64;
                    let dense_tflop_s = flops / time.median_us / 1e6;
                    rows.push(Row {
                        heads: text.clone(),
                        context,
                        policy: policy.to_string(),
                        chunk,
                        time,
                        dense_tflop_s,
                    });
                }
            }
        }
    }
    super::print(args.json, &ceilings, &rows, table)
}

fn measure(
    device: &Device,
    text: &str,
    policy: &Arc<dyn Policy>,
    context: usize,
    chunk: usize,
    kv: KvType,
) -> Result<Time> {
    let head = heads(text)?;
    let spec = ModelSpec::new(1, head.q, head.kv, head.dim);
    let config = CudaConfig { dtype: kv.dtype(), max_sequences: 1, max_entries: context, ..CudaConfig::default() };
    let mut cache = KvCache::new(spec.clone(), policy.clone(), cuda(&spec, &config, device)?)?;
    let random = |heads| Tensor::randn(0f32, 1.0, (context, heads, head.dim), device)?.to_dtype(DType::BF16);
    let (q, k, v) = (random(head.q)?, random(head.kv)?, random(head.kv)?);
    let stream = device.as_cuda_device()?.cuda_stream();
    time(&stream, (3, 10), 1, || {
        let seq = cache.open();
        for from in (0..context).step_by(chunk) {
            let len = chunk.min(context - from);
            let step = cache.begin(&[(seq, len, Phase::Prefill { last: from + len == context })])?;
            let cut = |x: &Tensor| x.narrow(0, from, len);
            cache.attend(0, &step, &step.tokens(cut(&q)?, cut(&k)?, cut(&v)?, None))?;
            let failures = cache.end(step);
            ensure!(failures.is_empty(), "the pool is too small");
        }
        cache.release(seq);
        Ok(())
    })
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["heads", "context", "policy", "chunk", "us", "dense TFLOP/s"]);
    for row in rows {
        let cells = [
            row.heads.clone(),
            row.context.to_string(),
            row.policy.clone(),
            row.chunk.to_string(),
            row.time.to_string(),
            format!("{:.0}", row.dense_tflop_s),
        ];
        table.add_row(cells.map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
    }
    table
}
