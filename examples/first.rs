//! What stays in the cache: a tiny model with random weights reads a prompt and generates under three policies.
//!
//! `cargo run --release --example first`, or with policies of your own:
//! `cargo run --release --example first -- "tova:budget=12; every(8, snapkv:budget=16,window=4)"`

use candle_core::{D, Device, Tensor};
use kvpolicy::{CpuConfig, KvCache, ModelSpec, Phase, Registry, Result, SeqId, Step, cpu};

const LAYERS: usize = 2;
const Q_HEADS: usize = 4;
const KV_HEADS: usize = 2; // two query heads share a KV head
const HEAD_DIM: usize = 16;
const VOCABULARY: usize = 64;
const PROMPT: usize = 40;
const GENERATED: usize = 20;
const POLICIES: &str = "window:size=8,sinks=2; h2o:budget=12,recent=4; random-gate:rate=0.7,window=6";

fn main() -> Result<()> {
    let list = std::env::args().nth(1).unwrap_or_else(|| POLICIES.to_string());
    let model = Model::random()?;
    println!("{PROMPT} tokens of prompt, {GENERATED} generated; # is held, . was evicted\n");
    for (name, policy) in Registry::standard().parse_list(&list)? {
        let spec = ModelSpec::new(LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM);
        let pages = cpu(&spec, &CpuConfig { page_size: 4, ..CpuConfig::default() })?;
        let mut cache = KvCache::new(spec, policy, pages)?;
        let seq = cache.open();

        let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i * 7 % VOCABULARY as u32).collect();
        let mut next = model.forward(&mut cache, seq, &prompt, Phase::Prefill { last: true })?;
        for _ in 0..GENERATED {
            next = model.forward(&mut cache, seq, &[next], Phase::Decode)?;
        }
        println!("{name}");
        show(&cache, seq)?;
    }
    Ok(())
}

/// A line for each layer and KV head, then the sums.
fn show(cache: &KvCache, seq: SeqId) -> Result<()> {
    let seen = cache.seen(seq)?;
    for (layer, head) in (0..LAYERS).flat_map(|layer| (0..KV_HEADS).map(move |head| (layer, head))) {
        let held = cache.held_positions(layer, seq, head);
        let row: String = (0..seen as u32).map(|pos| if held.contains(&pos) { '#' } else { '.' }).collect();
        println!("  layer {layer} head {head}  {row}  {}", held.len());
    }
    let usage = cache.usage();
    let dense = seen as u64 * usage.dense_bytes_per_token;
    let (held, evicted, bytes) = (usage.live_entries, usage.evicted, usage.bytes_in_use);
    println!("  {held} entries held, {evicted} evicted; {bytes} bytes, a dense cache would take {dense}\n");
    Ok(())
}

/// Attention layers only: enough to have queries, keys and values.
struct Model {
    embedding: Tensor,        // [vocabulary, width]
    layers: Vec<[Tensor; 4]>, // q, k, v and output, each [in, out]
}

impl Model {
    fn random() -> Result<Self> {
        let width = Q_HEADS * HEAD_DIM;
        let mut seed = 1;
        let mut weight = |rows: usize, columns: usize| random(&mut seed, rows, columns);
        let layers = (0..LAYERS).map(|_| {
            let kv = KV_HEADS * HEAD_DIM;
            Ok([weight(width, width)?, weight(width, kv)?, weight(width, kv)?, weight(width, width)?])
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self { embedding: weight(VOCABULARY, width)?, layers })
    }

    /// Runs new tokens of a sequence through the model. Returns the token it finds most likely to come next.
    fn forward(&self, cache: &mut KvCache, seq: SeqId, tokens: &[u32], phase: Phase) -> Result<u32> {
        let step = cache.begin(&[(seq, tokens.len(), phase)])?;
        let mut x = self.embedding.embedding(&Tensor::new(tokens, &Device::Cpu)?)?;
        for layer in 0..LAYERS {
            x = (&x + self.attention(cache, layer, &step, &x)?)?;
        }
        cache.end(step); // an unlimited pool drops no sequence
        let last = x.narrow(0, tokens.len() - 1, 1)?;
        Ok(last.matmul(&self.embedding.t()?)?.argmax(D::Minus1)?.squeeze(0)?.to_scalar()?)
    }

    fn attention(&self, cache: &mut KvCache, layer: usize, step: &Step, x: &Tensor) -> Result<Tensor> {
        let [q, k, v, output] = &self.layers[layer];
        let x = x.broadcast_div(&x.sqr()?.mean_keepdim(D::Minus1)?.sqrt()?)?;
        let project = |w: &Tensor, heads| x.matmul(w)?.reshape((step.len(), heads, HEAD_DIM));
        let new = step.tokens(project(q, Q_HEADS)?, project(k, KV_HEADS)?, project(v, KV_HEADS)?, None);
        let y = cache.attend(layer, step, &new)?; // [tokens, q_heads, head_dim]
        Ok(y.flatten_from(1)?.matmul(output)?)
    }
}

/// Numbers of variance 1 / rows, the same on every run.
fn random(seed: &mut u64, rows: usize, columns: usize) -> Result<Tensor> {
    let mut uniform = || {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let scale = (12.0 / rows as f32).sqrt();
    let numbers: Vec<f32> = (0..rows * columns).map(|_| uniform() * scale).collect();
    Ok(Tensor::from_vec(numbers, (rows, columns), &Device::Cpu)?)
}
