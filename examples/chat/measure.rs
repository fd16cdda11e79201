//! A long generation on random weights: the bytes of the cache beside those that `kvpolicy plan` counts.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use kvpolicy::{Budget, Evict, LayerCx, ModelSpec, NewTokens, Policy};
use kvpolicy_candle::{Config, LoadOptions, Model, Page, Session, SessionOptions};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{sync::Arc, time::Instant};

/// Numbers of tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lengths {
    pub(super) prompt: usize,
    pub(super) generated: usize,
    /// From one line of the table to the next.
    pub(super) every: usize,
}

pub(super) fn run(
    shape: &str,
    load: &LoadOptions,
    policy: Arc<dyn Policy>,
    Lengths { prompt, generated, every }: Lengths,
    seed: u64,
) -> Result<()> {
    ensure!(prompt > 0, "prompt-tokens=0: at least one");
    let model = Model::random(Config::preset(shape)?, load.dtype, &load.device, seed)?;
    let options = SessionOptions { max_tokens: Some(prompt + generated), ..SessionOptions::default() };
    let entry_bytes = (2 * model.config().head_dim * options.kv_dtype(&model).size_in_bytes()) as u64;
    let page = if load.device.is_cuda() { Page::GPU } else { Page::CPU };
    let spec = model.config().spec();
    let marked = share_marked(&*policy, &spec)?;
    let mut session = Session::new(&model, None, policy.clone(), &options)?;
    let mut random = StdRng::seed_from_u64(seed);
    let tokens: Vec<u32> = (0..prompt).map(|_| random.random_range(0..model.config().vocab as u32)).collect();
    let mut logits = session.prefill(&tokens, true)?;
    println!("{shape}, {policy}, {prompt} tokens of prompt, {generated} generated");
    println!("| tokens | held a head | KV bytes | plan | measured / plan | dense | tok/s |");
    println!("|--:|--:|--:|--:|--:|--:|--:|");
    let mut start = Instant::now();
    for done in 1..=generated {
        let token = logits.argmax(0)?.to_scalar::<u32>()?;
        logits = session.decode(token)?;
        if done % every == 0 || done == generated {
            let (usage, seen) = (session.cache().usage(), session.seen());
            let plan = planned(&*policy, &spec, seen, marked, page, entry_bytes);
            let since = if done % every == 0 { every } else { done % every };
            println!(
                "| {seen} | {:.0} | {} | {plan} | {:.3} | {} | {:.1} |",
                usage.live_entries as f64 / (spec.layers * spec.kv_heads) as f64,
                usage.bytes_in_use,
                usage.bytes_in_use as f64 / plan as f64,
                seen as u64 * usage.dense_bytes_per_token,
                since as f64 / start.elapsed().as_secs_f64(),
            );
            start = Instant::now();
        }
    }
    Ok(())
}

/// Bytes of the entries that the policy's parameters allow, in pages as `kvpolicy plan` counts them.
fn planned(policy: &dyn Policy, spec: &ModelSpec, seen: usize, marked: f64, page: Page, entry_bytes: u64) -> u64 {
    let layer = |layer| {
        let cx = LayerCx { layer, spec };
        let protect = policy.protect(&cx);
        let shielded = (protect.sinks as usize).saturating_add(protect.recent as usize).min(seen);
        let kept = shielded as f64 + (seen - shielded) as f64 * (1.0 - marked);
        let entries = match policy.budget(&cx, seen) {
            Budget::Unlimited => kept,
            Budget::PerHead(n) => kept.min(n.floor()),
            Budget::Heads(n) => kept.min(n.iter().sum::<usize>() as f64 / n.len().max(1) as f64),
            Budget::Pooled { total, .. } => kept.min(total as f64 / spec.kv_heads as f64),
        };
        spec.kv_heads as u64 * page.bytes_of_head(entries.ceil() as u64, entry_bytes)
    };
    (0..spec.layers).map(layer).sum()
}

/// The share of tokens that the policy marks, of some.
fn share_marked(policy: &dyn Policy, spec: &ModelSpec) -> Result<f64> {
    const TOKENS: usize = 4096;
    let random = |heads| Tensor::randn(0f32, 1.0, (TOKENS, heads, spec.head_dim), &Device::Cpu);
    let positions = Tensor::arange(0u32, TOKENS as u32, &Device::Cpu)?;
    let (q, k, v) = (random(spec.q_heads)?, random(spec.kv_heads)?, random(spec.kv_heads)?);
    let new = NewTokens { q, k, v, evict_logits: None, positions };
    Ok(match policy.on_write(&LayerCx { layer: 0, spec }, &new)?.evict {
        Evict::Never => 0.0,
        Evict::Always => 1.0,
        Evict::Bits { bits, .. } => bits.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()? as f64,
    })
}
