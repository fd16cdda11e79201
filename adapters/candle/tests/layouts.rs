//! Every published layout of gates, as its folder is: the files unchanged, logits and live counts compared.
//!
//! What NVIDIA writes is held against golden vectors of its reference. Shisa's dialect has none: its oracle is the dense
//! model with the mask written out, in plain loops, which must also give NVIDIA's vectors when it is told NVIDIA's rules.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/tiny.rs"]
mod tiny;

use candle_core::{DType, Device, Tensor};
use kvpolicy::{CpuConfig, KvCache, Lag, Phase, Registry, cpu};
use kvpolicy_candle::{Gates, LoadOptions, Model};
use serde_json::{Map, Value, json};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use tiny::{HEADS, HIDDEN, Tiny};

type Tensors = HashMap<String, Tensor>;

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

fn tensors(path: &Path) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn object(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Writes a folder in bf16, in two shards with their index, as `transformers` cuts large models.
fn sharded(config: &Map<String, Value>, tensors: &Tensors) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    let mut map = Map::new();
    let halves = names.split_at(names.len() / 2);
    for (part, names) in [(1, halves.0), (2, halves.1)] {
        let file = format!("model-0000{part}-of-00002.safetensors");
        let shard: Tensors =
            names.iter().map(|&name| (name.clone(), tensors[name].to_dtype(DType::BF16).unwrap())).collect();
        map.extend(shard.keys().map(|name| (name.clone(), json!(file))));
        candle_core::safetensors::save(&shard, dir.path().join(file)).unwrap();
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::write(dir.path().join("config.json"), Value::Object(config.clone()).to_string()).unwrap();
    dir
}

/// Logits of every token, and the positions that each layer's heads hold in the end.
type Seen = (Vec<Vec<f32>>, Vec<Vec<Vec<usize>>>);

/// Reads half of the tokens as a prompt, decodes the rest.
fn walk(dir: &Path, tokens: &[u32]) -> Seen {
    let (model, gates) = Model::from_dir(dir, &LoadOptions::default()).unwrap();
    let gates: Gates = gates.expect("gates");
    let mut spec = model.config().spec();
    spec.gates = Some(gates.spec());
    let store = cpu(&spec, &CpuConfig { page_size: 3, ..CpuConfig::default() }).unwrap();
    let mut cache = KvCache::new(spec.clone(), Registry::standard().parse("dms").unwrap(), store).unwrap();
    let seq = cache.open();
    let (prompt, rest) = tokens.split_at(tokens.len() / 2);
    let mut logits = vec![];
    for (chunk, phase) in
        std::iter::once((prompt, Phase::Prefill { last: true })).chain(rest.chunks(1).map(|one| (one, Phase::Decode)))
    {
        let step = cache.begin(&[(seq, chunk.len(), phase)]).unwrap();
        let hidden = model.hidden(chunk, &step, &mut cache, Some(&gates)).unwrap();
        logits.extend(model.logits(&hidden).unwrap().to_vec2::<f32>().unwrap());
        assert!(cache.end(step).is_empty());
    }
    let held = |layer, head| {
        let positions = cache.held_positions(layer, seq, head).into_iter();
        positions.map(|position| position as usize).collect()
    };
    let layer = |layer| (0..spec.kv_heads).map(|head| held(layer, head)).collect();
    (logits, (0..spec.layers).map(layer).collect())
}

fn assert_near(logits: &[Vec<f32>], expected: &[Vec<f32>], what: &str) {
    for (at, (got, expected)) in logits.iter().zip(expected).enumerate() {
        let off = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(off < 2e-4, "{what}: logits of token {at} are off by {off}");
    }
    assert_eq!(logits.len(), expected.len());
}

/// The first row of a golden case: tokens, logits of all, live counts after the last.
struct Expected {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
    live: Vec<Vec<u32>>,
}

impl Expected {
    fn read(case: &str) -> Self {
        let tensors = tensors(&golden(case).join("expected.safetensors"));
        let row = |name: &str| tensors[name].get(0).unwrap();
        let live = &tensors["prefill_full.live_counts"];
        Self {
            tokens: row("input_ids").to_dtype(DType::U32).unwrap().to_vec1().unwrap(),
            logits: row("prefill_full.logits").to_vec2().unwrap(),
            live: live.narrow(1, 0, 1).unwrap().squeeze(1).unwrap().to_dtype(DType::U32).unwrap().to_vec2().unwrap(),
        }
    }

    fn check(&self, (logits, held): Seen, what: &str) {
        assert_near(&logits, &self.logits, what);
        let live: Vec<Vec<u32>> =
            held.iter().map(|heads| heads.iter().map(|held| held.len() as u32).collect()).collect();
        assert_eq!(live, self.live, "{what}");
    }
}

/// NVIDIA's trainer: adapters among the model's tensors, every field of its configuration class, no `architectures`.
#[test]
fn what_nvidias_trainer_writes() {
    for case in ["a_adapter_head_s1", "a_adapter_head_bias_s3", "c_layer_adapter_s7"] {
        let mut config = object(&golden(case).join("config.json"));
        config.remove("architectures");
        config.insert("torch_dtype".into(), json!("bfloat16"));
        let tensors = tensors(&golden(case).join("model.safetensors"));
        assert!(tensors.contains_key("model.layers.0.self_attn.dms_proj_alpha_norm.weight"));
        let dir = sharded(&config, &tensors);
        let expected = Expected::read(case);
        expected.check(walk(dir.path(), &expected.tokens), case);
    }
}

/// `nvidia/Qwen3-8B-DMS-8x`: the fields that its own Python files read, no tensors but Qwen3's.
#[test]
fn the_checkpoint_that_nvidia_published() {
    let case = "b_borrowed_head_s5";
    let whole = object(&golden(case).join("config.json"));
    let tensors = tensors(&golden(case).join("model.safetensors"));
    assert!(tensors.keys().all(|name| !name.contains("dms")));
    let expected = Expected::read(case);
    for fields in [
        vec!["dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset"],
        vec!["dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset", "dms_separate_alpha"],
    ] {
        let mut config = whole.clone();
        config.retain(|name, _| !name.starts_with("dms_") || fields.contains(&name.as_str()));
        config.insert("architectures".into(), json!(["Qwen3ForCausalLM"]));
        config.insert("dtype".into(), json!("bfloat16"));
        let dir = sharded(&config, &tensors);
        expected.check(walk(dir.path(), &expected.tokens), &format!("{fields:?}"));
    }
}

/// The rules of a dialect whose gate is a neuron of the queries.
#[derive(Clone, Copy)]
struct Dialect {
    lag: Lag,
    zero_after_rope: bool,
    window: usize,
    scale: f64,
    offset: f64,
}

/// A model in plain loops.
struct Oracle {
    weights: HashMap<String, Vec<Vec<f64>>>, // rows; a vector is one row
    config: Value,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Oracle {
    fn new(weights: &Tensors, config: Value) -> Self {
        let rows = |tensor: &Tensor| {
            let tensor = if tensor.rank() == 1 { tensor.unsqueeze(0).unwrap() } else { tensor.clone() };
            tensor.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
        };
        Self { weights: weights.iter().map(|(name, tensor)| (name.clone(), rows(tensor))).collect(), config }
    }

    fn number(&self, name: &str) -> f64 {
        self.config[name].as_f64().unwrap()
    }

    fn product(&self, name: &str, x: &[f64]) -> Vec<f64> {
        self.weights[name].iter().map(|row| dot(row, x)).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let Some(weight) = self.weights.get(name) else { return x.to_vec() }; // llama has none of its heads
        let size = (dot(x, x) / x.len() as f64 + self.number("rms_norm_eps")).sqrt();
        x.iter().zip(&weight[0]).map(|(x, w)| x / size * w).collect()
    }

    fn rope(&self, x: &[f64], position: usize) -> Vec<f64> {
        let half = x.len() / 2;
        let mut turned = x.to_vec();
        for i in 0..half {
            let (sin, cos) = (position as f64 * self.number("rope_theta").powf(-(i as f64) / half as f64)).sin_cos();
            turned[i] = x[i] * cos - x[i + half] * sin;
            turned[i + half] = x[i + half] * cos + x[i] * sin;
        }
        turned
    }

    /// Logits of every token, and what each layer's heads hold after the last.
    fn walk(&self, tokens: &[u32], dialect: Dialect) -> Seen {
        let (heads, kv_heads) =
            (self.number("num_attention_heads") as usize, self.number("num_key_value_heads") as usize);
        let (d, group) = (self.number("head_dim") as usize, heads / kv_heads);
        let embedding = &self.weights["model.embed_tokens.weight"];
        let mut stream: Vec<Vec<f64>> = tokens.iter().map(|&token| embedding[token as usize].clone()).collect();
        let (last, mut all_held) = (tokens.len() - 1, vec![]);
        for layer in 0..self.number("num_hidden_layers") as usize {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let (mut q, mut k, mut v, mut evicted) =
                (vec![], vec![], vec![], vec![vec![false; tokens.len()]; kv_heads]);
            for (t, x) in stream.iter().enumerate() {
                let h = self.norm(&name("input_layernorm"), x);
                let split = |part: &str| -> Vec<Vec<f64>> {
                    self.product(&name(part), &h).chunks(d).map(<[f64]>::to_vec).collect()
                };
                let mut queries: Vec<Vec<f64>> = vec![];
                for (j, head) in split("self_attn.q_proj").into_iter().enumerate() {
                    let mut head = self.norm(&name("self_attn.q_norm"), &head);
                    if j % group == 0 {
                        let z = dialect.scale * head[d - 1] - dialect.offset;
                        assert!(z.abs() > 1e-3, "a decision near 0 would prove nothing");
                        let judged = if dialect.lag == Lag::Own { Some(t) } else { t.checked_sub(1) };
                        judged.into_iter().for_each(|k| evicted[j / group][k] = z > 0.0);
                        head[d - 1] = 0.0;
                    }
                    let mut head = self.rope(&head, t);
                    if j % group == 0 && dialect.zero_after_rope {
                        head[d - 1] = 0.0;
                    }
                    queries.push(head);
                }
                let key = |head: &Vec<f64>| self.rope(&self.norm(&name("self_attn.k_norm"), head), t);
                k.push(split("self_attn.k_proj").iter().map(key).collect::<Vec<_>>());
                v.push(split("self_attn.v_proj"));
                q.push(queries);
            }
            let sees = |head: usize, q: usize, k: usize| !evicted[head][k] || q - k <= dialect.window;
            for t in 0..tokens.len() {
                let attended = (0..heads).flat_map(|j| {
                    let seen: Vec<usize> = (0..=t).filter(|&k| sees(j / group, t, k)).collect();
                    let weights: Vec<f64> =
                        seen.iter().map(|&at| (dot(&q[t][j], &k[at][j / group]) / (d as f64).sqrt()).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    let component = |i: usize| -> f64 {
                        seen.iter().zip(&weights).map(|(&at, w)| w / sum * v[at][j / group][i]).sum()
                    };
                    (0..d).map(component).collect::<Vec<_>>()
                });
                let y = self.product(&name("self_attn.o_proj"), &attended.collect::<Vec<_>>());
                stream[t].iter_mut().zip(y).for_each(|(x, y)| *x += y);
                let h = self.norm(&name("post_attention_layernorm"), &stream[t]);
                let (gate, up) = (self.product(&name("mlp.gate_proj"), &h), self.product(&name("mlp.up_proj"), &h));
                let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                let y = self.product(&name("mlp.down_proj"), &inner);
                stream[t].iter_mut().zip(y).for_each(|(x, y)| *x += y);
            }
            let held = |head: usize| (0..=last).filter(|&k| sees(head, last, k)).collect();
            all_held.push((0..kv_heads).map(held).collect());
        }
        let output = if self.weights.contains_key("lm_head.weight") { "lm_head" } else { "model.embed_tokens" };
        let logits = |x: &Vec<f64>| {
            let logits = self.product(&format!("{output}.weight"), &self.norm("model.norm.weight", x));
            logits.into_iter().map(|logit| logit as f32).collect()
        };
        (stream.iter().map(logits).collect(), all_held)
    }
}

#[test]
fn the_oracle_gives_nvidias_vectors() {
    for case in ["b_borrowed_head_s5", "b_borrowed_head_s6"] {
        let config = Value::Object(object(&golden(case).join("config.json")));
        let dialect = Dialect {
            lag: Lag::Previous,
            zero_after_rope: true,
            window: config["dms_window_size"].as_u64().unwrap() as usize,
            scale: config["dms_alpha_scale"].as_f64().unwrap(),
            offset: config["dms_initial_alpha_offset"].as_f64().unwrap(),
        };
        let oracle = Oracle::new(&tensors(&golden(case).join("model.safetensors")), config);
        let expected = Expected::read(case);
        expected.check(oracle.walk(&expected.tokens, dialect), case);
    }
}

/// `shisa-ai/Llama-3.2-1B-DMS-8x`: a plain Llama, and a file beside it.
#[test]
fn the_checkpoint_that_shisa_published() {
    let tiny = Tiny::new("llama", 2, HIDDEN / HEADS, true, json!({"architectures": ["LlamaForCausalLM"]})).in_bf16();
    let mut config = tiny.config().as_object().unwrap().clone();
    config.insert("torch_dtype".into(), json!("bfloat16"));
    let oracle = Oracle::new(&tiny.tensors, tiny.config());
    let shisa = |window, scale, offset| Dialect { lag: Lag::Own, zero_after_rope: false, window, scale, offset };
    for (metadata, dialect, tokens) in [
        (
            json!({"window_size": 256, "alpha_scale": 100.0, "alpha_offset": 5.0, "target_cr": 8}),
            shisa(256, 100.0, 5.0),
            300,
        ),
        (json!({"config": {"compression_mode": "dms", "context_len": 4096}}), shisa(256, 100.0, 5.0), 270),
        (
            json!({"config": {"dms_window_size": 8, "dms_alpha_scale": 50, "dms_initial_alpha_offset": 2.5}}),
            shisa(8, 50.0, 2.5),
            60,
        ),
        (json!({"window_size": 4, "dms_window_size": 9, "dms_alpha_offset": 3}), shisa(4, 100.0, 3.0), 40),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let weights: Tensors =
            tiny.tensors.iter().map(|(name, t)| (name.clone(), t.to_dtype(DType::BF16).unwrap())).collect();
        candle_core::safetensors::save(&weights, dir.path().join("model.safetensors")).unwrap();
        std::fs::write(dir.path().join("config.json"), Value::Object(config.clone()).to_string()).unwrap();
        std::fs::write(dir.path().join("dms_metadata.json"), metadata.to_string()).unwrap();
        let tokens: Vec<u32> = (0..tokens).map(|i| (i * i * 31 + i * 7 + 3) % 256).collect();
        let (logits, held) = walk(dir.path(), &tokens);
        let (expected, expected_held) = oracle.walk(&tokens, dialect);
        assert_near(&logits, &expected, &metadata.to_string());
        assert_eq!(held, expected_held, "{metadata}");
        assert!(held.iter().flatten().any(|held| held.len() < tokens.len() - 10), "something is evicted: {metadata}");
    }
}

#[test]
fn descriptions_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::new("llama", 2, HIDDEN / HEADS, true, json!({}));
    let refused = |words: &[&str]| {
        let error = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "`{error}` does not say `{word}`"));
    };
    for (fields, word) in [
        (json!({"dms_window_size": -1}), "dms_window_size=-1"),
        (json!({"dms_window_size": 1u64 << 40}), "dms_window_size=1099511627776"),
        (json!({"dms_window_size": 8, "dms_alpha_scale": "100"}), "dms_alpha_scale=\"100\""),
        (json!({"dms_window_size": 8, "dms_initial_alpha_offset": [5]}), "dms_initial_alpha_offset=[5]"),
        (json!({"dms_window_size": 8, "dms_separate_alpha": "yes"}), "dms_separate_alpha=\"yes\""),
        (json!({"dms_window_size": 8, "dms_disable_eviction": 1}), "dms_disable_eviction=1"),
        (json!({"dms_window_size": 8, "dms_alpha_per": "token"}), "head or layer"),
        (json!({"dms_window_size": 8, "dms_separate_alpha": true}), "dms_proj_alpha"),
    ] {
        Tiny::new("llama", 2, HIDDEN / HEADS, true, fields).write_dir(dir.path());
        refused(&[word]);
    }
    tiny.write_dir(dir.path());
    for (metadata, word) in [
        ("{\"window_size\": 1.5}", "window_size=1.5"),
        ("{\"config\": {\"window_size\": \"256\"}}", "window_size=\"256\""),
        ("{\"alpha_offset\": true}", "alpha_offset=true"),
        ("{\"schema_version\": 2, \"sidecar\": {\"path\": \"a.safetensors\"}}", "sidecar"),
        ("[]", "dms_metadata.json"),
        ("{", "dms_metadata.json"),
    ] {
        std::fs::write(dir.path().join("dms_metadata.json"), metadata).unwrap();
        refused(&["dms_metadata.json", word]);
    }
}
