//! `kvpolicy plan`: what fits a GPU and how fast it can be at best, before anything is bought or run.

use crate::{
    model::{Float, KvType, bytes},
    table,
};
use anyhow::{Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use kvpolicy_candle::{Config, Page, Shape};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A config.json or a folder with one, a GGUF file, a hub id (org/name), or a known shape such as llama-3.1-8b or qwen3-8b.
    #[arg(long)]
    model: String,
    /// Memory of the GPU, such as 80GB.
    #[arg(long, value_parser = bytes)]
    gpu_memory: u64,
    /// Tokens of a sequence, prompt and answer.
    #[arg(long)]
    context: u64,
    /// Entries a dense cache would hold for one that is held.
    #[arg(long, default_value_t = 8.0)]
    compression: f64,
    /// Type of the weights; those of a GGUF file are as they are.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: Float,
    /// Type of stored keys and values.
    #[arg(long, value_enum, default_value = "bf16")]
    kv_dtype: KvType,
    /// Memory bandwidth of the GPU, bytes per second [default: that of an H100 SXM].
    #[arg(long, value_parser = bytes, default_value = "3350GB")]
    bandwidth: u64,
    /// Dense bf16 operations of the GPU, TFLOP/s [default: that of an H100 SXM].
    #[arg(long, default_value_t = 989.0)]
    tflops: f64,
    /// What the GPU costs in an hour.
    #[arg(long)]
    price_per_hour: Option<f64>,
}

/// Longer sequences than this are not planned for.
const LONGEST: u64 = 1 << 40;
/// Of the GPU's memory that is not the weights', left for activations and buffers.
const SPARE: f64 = 0.1;

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!((1..=LONGEST).contains(&args.context), "context={}: 1 to {LONGEST} tokens", args.context);
    ensure!(args.price_per_hour.is_none_or(|price| price >= 0.0), "price-per-hour: 0 or more");
    ensure!(args.compression.is_finite() && args.compression >= 1.0, "compression={}: 1 or more", args.compression);
    ensure!(args.bandwidth > 0 && args.tflops > 0.0, "bandwidth and tflops must be more than 0");
    let shape = Shape::of(&args.model)?;
    let model = Model::new(&shape, args.dtype.dtype().size_in_bytes() as u64, args.kv_dtype);
    let gpu = Gpu { memory: args.gpu_memory, bandwidth: args.bandwidth as f64, flops: args.tflops * 1e12 };
    ensure!(
        model.weights < gpu.memory,
        "gpu-memory={} holds no {} of weights: take a larger GPU or a smaller type",
        table::bytes(gpu.memory as f64),
        table::bytes(model.weights as f64)
    );
    if args.context > shape.config.max_context as u64 {
        eprintln!(
            "note: context={} exceeds the {} tokens the model was made for",
            args.context, shape.config.max_context
        );
    }
    let dense = Fit::new(&model, &gpu, args.context, 1.0);
    let compressed = Fit::new(&model, &gpu, args.context, args.compression);
    println!("{}", page(args, &model, &[dense, compressed]));
    Ok(())
}

/// What a step of decode reads and does.
#[derive(Debug, Clone)]
struct Model {
    layers: u64,
    windows: Option<(u64, u64)>, // layers of them with a sliding window, and its tokens
    q_heads: u64,
    kv_heads: u64,
    head_dim: u64,
    kv_bytes: u64,   // of an entry's key and value, on a GPU
    weights: u64,    // bytes
    read: u64,       // of them, bytes that every step reads: all but an embedding of its own
    multiplied: u64, // parameters that a token is multiplied with
}

impl Model {
    fn new(shape: &Shape, weight_size: u64, kv: KvType) -> Self {
        let Config { layers, q_heads, kv_heads, head_dim, vocab, hidden, tied, .. } = shape.config;
        let parameters = shape.config.parameters() as u64;
        let embedding = if tied { 0 } else { (vocab * hidden) as u64 };
        let multiplied = parameters - embedding;
        let weights = shape.weight_bytes.unwrap_or(parameters * weight_size);
        Self {
            layers: layers as u64,
            windows: shape.config.windows().map(|(layers, window)| (layers as u64, window as u64)),
            q_heads: q_heads as u64,
            kv_heads: kv_heads as u64,
            head_dim: head_dim as u64,
            kv_bytes: kv.entry_bytes(head_dim) as u64,
            weights,
            read: (weights as f64 * multiplied as f64 / parameters as f64) as u64,
            multiplied,
        }
    }

    /// Keys and values of one token.
    fn token_bytes(&self) -> u64 {
        self.layers * self.kv_heads * self.kv_bytes
    }

    /// Layers that hold what their window shows of a context, and entries of each of their KV heads. Where every layer has a
    /// window, they count as such only beyond it.
    fn windowed(&self, context: u64) -> (u64, u64) {
        match self.windows {
            Some((layers, size)) if layers < self.layers || context > size => (layers, context.min(size)),
            _ => (0, 0),
        }
    }

    /// Entries of all layers, one KV head of each, where a policy leaves `entries` of a context in the layers it rules.
    fn entries(&self, entries: u64, context: u64) -> u64 {
        let (layers, window) = self.windowed(context);
        (self.layers - layers) * entries + layers * window
    }

    /// Of the pages that hold them.
    fn pool_bytes(&self, entries: u64, context: u64, page: Page) -> u64 {
        let (layers, window) = self.windowed(context);
        let bytes = |layers: u64, entries: u64| layers * self.kv_heads * page.bytes_of_head(entries, self.kv_bytes);
        bytes(self.layers - layers, entries) + bytes(layers, window)
    }

    /// Entries of a KV head that fit, in the layers without a window; `None` if there are none.
    fn longest(&self, room: u64) -> Option<u64> {
        let windows = self.pool_bytes(0, u64::MAX, Page::GPU);
        let page = self.pool_bytes(Page::GPU.entries, u64::MAX, Page::GPU) - windows;
        (page > 0).then(|| room.saturating_sub(windows) / page * Page::GPU.entries)
    }

    /// Operations of a token that looks at so many entries, of all layers.
    fn operations(&self, entries: u64) -> f64 {
        (2 * self.multiplied + 4 * self.q_heads * self.head_dim * entries) as f64
    }
}

/// What a GPU has.
#[derive(Debug, Clone, Copy)]
struct Gpu {
    memory: u64,    // bytes
    bandwidth: f64, // bytes per second
    flops: f64,
}

/// Sequences of one length on a GPU.
#[derive(Debug, Clone, PartialEq)]
struct Fit {
    entries: u64,            // of one KV head, at the end of a sequence
    sequence_bytes: u64,     // of its pages then
    sequences: u64,          // that fit beside the weights
    longest: Option<u64>,    // tokens of a single sequence; any number where all layers have a window
    steps: Vec<(u64, Step)>, // by batch: one sequence, and all that fit
}

/// A step of decode at its bounds.
#[derive(Debug, Clone, PartialEq)]
struct Step {
    kv_share: f64, // of what is read
    memory_bound: bool,
    tokens_per_s: f64, // of all sequences
}

impl Fit {
    fn new(model: &Model, gpu: &Gpu, context: u64, compression: f64) -> Self {
        let held = |context: u64| (context as f64 / compression).ceil() as u64;
        let room = ((gpu.memory - model.weights) as f64 * (1.0 - SPARE)) as u64;
        let entries = held(context);
        let sequence_bytes = model.pool_bytes(entries, context, Page::GPU);
        let sequences = room / sequence_bytes;
        let of_all_layers = model.entries(entries, context);
        let step = |batch: u64| {
            let kv = (batch * of_all_layers * model.kv_heads * model.kv_bytes) as f64;
            let read = model.read as f64 + kv;
            let (memory, compute) = (read / gpu.bandwidth, batch as f64 * model.operations(of_all_layers) / gpu.flops);
            Step {
                kv_share: kv / read,
                memory_bound: memory >= compute,
                tokens_per_s: batch as f64 / memory.max(compute),
            }
        };
        let batches = if sequences > 1 { vec![1, sequences] } else { vec![1] };
        let steps = batches.into_iter().filter(|batch| *batch <= sequences).map(|batch| (batch, step(batch))).collect();
        Self {
            entries,
            sequence_bytes,
            sequences,
            longest: model.longest(room).map(|most| (most as f64 * compression) as u64),
            steps,
        }
    }
}

fn page(args: &Args, model: &Model, fits: &[Fit; 2]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(["", "dense", &format!("{}x", args.compression)]);
    let mut line = |name: &str, figure: &dyn Fn(&Fit) -> String| {
        table.add_row([name.to_string(), figure(&fits[0]), figure(&fits[1])]);
    };
    line("entries a KV head, at the end of the context", &|fit| fit.entries.to_string());
    line("KV of a sequence", &|fit| table::bytes(fit.sequence_bytes as f64));
    line("sequences that fit", &|fit| fit.sequences.to_string());
    line("longest single sequence, tokens", &|fit| fit.longest.map_or("any".into(), |longest| longest.to_string()));
    for (which, name) in [(0, "one sequence"), (1, "all that fit")] {
        let step = |fit: &Fit, figure: &dyn Fn(&Step) -> String| {
            let step = if which == 0 { fit.steps.first() } else { fit.steps.last() };
            step.map_or("-".into(), |(_, step)| figure(step))
        };
        line(&format!("{name}: share of KV in what a step reads"), &|fit| {
            step(fit, &|s| format!("{:.0}%", 100.0 * s.kv_share))
        });
        line(&format!("{name}: bound by"), &|fit| {
            step(fit, &|s| if s.memory_bound { "memory".into() } else { "compute".into() })
        });
        line(&format!("{name}: tokens/s then, at most"), &|fit| step(fit, &|s| format!("{:.0}", s.tokens_per_s)));
        if let Some(price) = args.price_per_hour {
            let cost = |s: &Step| format!("{:.3}", price / 3600.0 / s.tokens_per_s * 1e6);
            line(&format!("{name}: cost of a million tokens then, at least"), &|fit| step(fit, &cost));
        }
    }
    table.column_iter_mut().skip(1).for_each(|column| {
        column.set_cell_alignment(CellAlignment::Right);
    });
    let windows = model.windows.map_or(String::new(), |(layers, size)| {
        format!("; {layers} of {} layers hold no more than their window of {size} tokens", model.layers)
    });
    format!(
        "{}: {} of weights, {} of keys and values a token{windows}; {} of memory, a tenth of what weights leave kept free\n\n{table}\n\n\
         Bounds of a decode step at the end of the context, from bandwidth and operations alone: real steps take longer. A policy \
         that trims at the end of a prompt holds all of the prompt until then.",
        args.model,
        table::bytes(model.weights as f64),
        table::bytes(model.token_bytes() as f64),
        table::bytes(args.gpu_memory as f64),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kvpolicy::Registry;
    use kvpolicy_candle::{Lm, LoadOptions, SessionOptions};

    fn preset(name: &str) -> Model {
        Model::new(&Shape::of(name).unwrap(), 2, KvType::Bf16)
    }

    #[test]
    fn bytes_are_those_of_the_measured_pool() {
        let lm = Lm::embedded(&LoadOptions::default()).unwrap();
        let shape = Shape { config: lm.model().config().clone(), weight_bytes: None };
        let model = Model::new(&shape, 4, KvType::F32);
        for (tokens, policy, held) in
            [(1, "full", 1), (200, "full", 200), (208, "full", 208), (300, "window:size=36,sinks=4", 40)]
        {
            let policy = Registry::standard().parse(policy).unwrap();
            let mut session = lm.session(policy, &SessionOptions::default()).unwrap();
            session.prefill(&vec![97; tokens], true).unwrap();
            let usage = session.cache().usage();
            assert_eq!(usage.bytes_in_use, model.pool_bytes(held, tokens as u64, Page::CPU), "{tokens} tokens");
            assert_eq!(usage.dense_bytes_per_token, model.token_bytes());
        }
    }

    #[test]
    fn a_known_model_has_known_figures() {
        let model = preset("llama-3.1-8b");
        assert_eq!(model.token_bytes(), 131_072, "32 layers of 8 heads of 128, keys and values, 2 bytes");
        assert!((15.9e9..16.1e9).contains(&(model.weights as f64)), "{}", model.weights);
        assert!((14.9e9..15.1e9).contains(&(model.read as f64)), "without the embedding: {}", model.read);
        let gpu = Gpu { memory: 80_000_000_000, bandwidth: 3.35e12, flops: 989e12 };
        let (dense, compressed) = (Fit::new(&model, &gpu, 32_768, 1.0), Fit::new(&model, &gpu, 32_768, 8.0));
        // 57.5 GB in pieces of 4.44 GB: keys and values with 8 bytes beside every 512.
        assert_eq!((dense.sequences, compressed.sequences, compressed.entries), (13, 105, 4096));
        assert!((7.9..8.1).contains(&(compressed.longest.unwrap() as f64 / dense.longest.unwrap() as f64)));
        let step = |fit: &Fit| fit.steps[0].1.clone();
        // One sequence: the weights, and 4.3 GB or an eighth of that, at 3.35 TB/s.
        assert!((172.0..175.0).contains(&step(&dense).tokens_per_s), "{:?}", step(&dense));
        assert!((213.0..217.0).contains(&step(&compressed).tokens_per_s), "{:?}", step(&compressed));
        assert!(step(&dense).memory_bound && (0.2..0.25).contains(&step(&dense).kv_share));
        assert!(compressed.steps[1].1.tokens_per_s > 7.0 * dense.steps[1].1.tokens_per_s);
    }

    #[test]
    fn layers_with_a_window_hold_no_more_than_it() {
        let model = preset("gemma-3-1b");
        assert_eq!((model.windows, model.token_bytes()), (Some((22, 512)), 26_624));
        let gpu = Gpu { memory: 80_000_000_000, bandwidth: 3.35e12, flops: 989e12 };
        let of = |context| Fit::new(&model, &gpu, context, 4.0);
        let head = |entries| Page::GPU.bytes_of_head(entries, model.kv_bytes);
        assert_eq!(of(256).sequence_bytes, 4 * head(64) + 22 * head(256));
        assert_eq!(of(32_768).sequence_bytes, 4 * head(8192) + 22 * head(512));
        assert!(of(32_768).longest.is_some());
        let all = Model { windows: Some((26, 512)), ..model.clone() };
        let of = |context| Fit::new(&all, &gpu, context, 4.0);
        assert_eq!((of(512).sequence_bytes, of(513).sequence_bytes), (26 * head(128), 26 * head(512)));
        assert_eq!(of(513).longest, None);
    }

    #[test]
    fn enough_sequences_of_a_short_context_are_bound_by_compute() {
        let gpu = Gpu { memory: 80_000_000_000, bandwidth: 3.35e12, flops: 50e12 };
        let fit = Fit::new(&preset("llama-3.2-1b"), &gpu, 256, 8.0);
        assert!(fit.steps[0].1.memory_bound && !fit.steps[1].1.memory_bound, "{fit:?}");
        let tight = Gpu { memory: preset("llama-3.1-8b").weights + 1_000_000, ..gpu };
        let none = Fit::new(&preset("llama-3.1-8b"), &tight, 32_768, 1.0);
        assert!(none.sequences == 0 && none.steps.is_empty());
    }
}
