//! Models with gates, exported and loaded again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/tiny.rs"]
mod tiny;

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use kvpolicy::{Registry, RopeLayout, Stats};
use kvpolicy_candle::{
    Arch, Export, Exported, GateLayout, Lm, LoadOptions, Merged, SessionOptions, demo, extract_gates,
};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use tiny::{HEADS, HIDDEN, LAYERS, Tiny};

const HEAD_DIM: usize = HIDDEN / HEADS;
const TEMPLATE: &str = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}";

fn tiny(arch: &'static str, tied: bool) -> Tiny {
    // SmolLM3's fourth layer is the first that differs, Gemma's sixth.
    let extra = match arch {
        "smollm3" => json!({"num_hidden_layers": 4}),
        "gemma3_text" => {
            json!({"num_hidden_layers": 6, "sliding_window": 32, "rope_local_base_freq": 10000.0, "rope_theta": 500.0})
        }
        _ => json!({}),
    };
    Tiny::new(arch, 2, HEAD_DIM, tied, extra).in_bf16()
}

/// A place with a model folder, its gates beside it, and room for what is exported.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn folder(&self, tiny: &Tiny) -> Lm {
        let dir = self.path("model");
        std::fs::create_dir_all(&dir).unwrap();
        tiny.write_dir(&dir);
        tiny.write_gates(&self.path("gates"));
        std::fs::write(dir.join("tokenizer.json"), demo::TOKENIZER).unwrap();
        let config = json!({"chat_template": TEMPLATE, "eos_token": "<|end|>"});
        std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        load(&dir)
    }

    fn gguf(&self, tiny: &Tiny) -> Lm {
        tiny.write_gguf(&self.path("m.gguf"), GgmlDType::F32);
        tiny.write_gates(&self.path("gates"));
        load(&self.path("m.gguf"))
    }

    fn export(&self, lm: &Lm, layout: Option<GateLayout>) -> kvpolicy_candle::Result<Exported> {
        Export { gates: Some(self.path("gates")), layout, out: self.path("out") }.run(lm)
    }

    /// And leaves nothing behind.
    fn refuses(&self, lm: &Lm, words: &[&str]) {
        assert_says(self.export(lm, None).unwrap_err(), words);
        assert!(!self.path("out").exists());
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    fn tensors(&self, name: &str) -> HashMap<String, Tensor> {
        candle_core::safetensors::load(self.path(name), &Device::Cpu).unwrap()
    }
}

fn load(path: &Path) -> Lm {
    Lm::load(path.to_str().unwrap(), &LoadOptions { dequantize: true, ..LoadOptions::default() }).unwrap()
}

fn assert_says(error: impl std::fmt::Display, words: &[&str]) {
    let text = error.to_string();
    words.iter().for_each(|word| assert!(text.contains(word), "`{text}` does not say `{word}`"));
}

/// Logits along a text, and what its cache held.
fn walk(lm: &Lm, policy: &str) -> (Vec<Vec<f32>>, Stats) {
    let mut session = lm.session(Registry::standard().parse(policy).unwrap(), &SessionOptions::default()).unwrap();
    let tokens: Vec<u32> = (0..90u32).map(|i| (i * i * 31 + i * 7) % 256).collect();
    let mut all = vec![session.prefill(&tokens[..60], true).unwrap().to_vec1().unwrap()];
    all.extend(tokens[60..].iter().map(|&token| session.decode(token).unwrap().to_vec1().unwrap()));
    (all, session.stats())
}

fn dms(gates: &Path) -> String {
    format!("dms:weights={}", gates.join("gates.safetensors").display())
}

fn furthest(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
    tensor.to_dtype(DType::F32).unwrap().to_vec2().unwrap()
}

#[test]
fn a_folder_with_gates_is_the_same_model_again() {
    for (arch, tied) in [
        ("llama", true),
        ("llama", false),
        ("mistral", false),
        ("phi3", true),
        ("qwen2", false),
        ("qwen3", true),
        ("smollm3", true),
        ("gemma3_text", true),
    ] {
        let place = Place::new();
        let lm = place.folder(&tiny(arch, tied));
        let done = place.export(&lm, Some(GateLayout::Nvidia)).unwrap();
        assert_eq!(
            (done.layout, done.gate_tensors, done.merged),
            (GateLayout::Nvidia, 2 * lm.model().config().layers, Merged::Nothing)
        );
        let again = load(&place.path("out"));
        assert_eq!(again.model().config(), lm.model().config());
        assert_eq!(again.chat("hello").unwrap(), "<user>hello");
        assert_eq!(again.tokenizer().eos(), lm.tokenizer().eos());
        assert_eq!(walk(&again, "full"), walk(&lm, "full"), "{arch}");
        let (logits, stats) = walk(&again, "dms");
        assert_eq!((logits, stats), walk(&lm, &dms(&place.path("gates"))), "{arch}");
        assert!(stats.compression() > 1.2 && stats.compression() < 5.0, "{stats:?}");
    }
}

#[test]
fn the_configuration_is_the_folders_own_with_the_gates() {
    let place = Place::new();
    let lm = place.folder(&tiny("qwen3", false));
    let mut before = place.json("model/config.json");
    before["dms_window_size"] = json!(99); // of gates the folder had
    before["kvpolicy_context"] = json!(7);
    std::fs::write(place.path("model/config.json"), before.to_string()).unwrap();
    place.export(&lm, None).unwrap();
    let after = place.json("out/config.json");
    for (name, value) in [
        ("sliding_window", json!(512)),
        ("torch_dtype", json!("bfloat16")),
        ("architectures", json!(["Qwen3ForCausalLM"])),
        ("dms_window_size", json!(8)),
        ("dms_separate_alpha", json!(true)),
        ("dms_alpha_scale", json!(50.0)),
        ("dms_tau", json!(0.1)),
        ("dms_paged_attention_block_size", json!(4)),
        ("kvpolicy_model", json!("tiny")),
        ("kvpolicy_context", Value::Null),
        ("kvpolicy_evaluation", Value::Null),
        ("kvpolicy_command", Value::Null),
    ] {
        assert_eq!(after[name], value, "{name}");
    }
    assert_eq!(after["auto_map"]["AutoModelForCausalLM"], "modeling_qwen3_dms.Qwen3ForCausalLMDMS");
    let tensors = place.tensors("out/model.safetensors");
    assert!(tensors.values().all(|tensor| tensor.dtype() == DType::BF16));
    assert_eq!(tensors["model.layers.1.self_attn.dms_proj_alpha.weight"].dims(), [2, HIDDEN]);
    let bytes = std::fs::read(place.path("out/model.safetensors")).unwrap();
    assert!(String::from_utf8_lossy(&bytes[..4096]).contains(r#""format":"pt""#));
}

#[test]
fn pages_are_shorter_than_the_window() {
    for (window, page, expected) in [
        (8, Value::Null, json!(4)),
        (9, Value::Null, json!(8)),
        (256, Value::Null, json!(128)),
        (512, Value::Null, Value::Null),
        (1, Value::Null, Value::Null),
        (256, json!(64), json!(64)),
        (32, json!(64), json!(16)),
    ] {
        let place = Place::new();
        let lm = place.folder(&tiny("llama", true));
        let mut fields = place.json("gates/config.json");
        fields["dms_window_size"] = json!(window);
        fields["dms_paged_attention_block_size"] = page;
        std::fs::write(place.path("gates/config.json"), fields.to_string()).unwrap();
        place.export(&lm, None).unwrap();
        assert_eq!(place.json("out/config.json")["dms_paged_attention_block_size"], expected, "{window}");
    }
}

#[test]
fn a_gguf_file_becomes_a_folder() {
    for arch in ["llama", "phi3", "qwen2", "qwen3", "smollm3", "gemma3_text"] {
        let place = Place::new();
        let lm = place.gguf(&tiny(arch, matches!(arch, "qwen3" | "gemma3_text")));
        place.export(&lm, None).unwrap();
        let again = load(&place.path("out"));
        assert_eq!(again.model().config().rope.layout, RopeLayout::HalfSplit);
        assert_eq!(again.model().config().rope.inv_freq, lm.model().config().rope.inv_freq);
        assert_eq!(again.model().config().others, lm.model().config().others);
        assert_eq!(again.tokenizer().eos(), lm.tokenizer().eos());
        assert_eq!(again.chat("hello").unwrap(), lm.chat("hello").unwrap());
        let text = "<|im_start|>user\nabab naïve café<|im_end|>";
        assert_eq!(again.tokenizer().encode(text).unwrap(), lm.tokenizer().encode(text).unwrap());
        // Sums over the components of a head are taken in another order where they were interleaved.
        let tolerance = if matches!(lm.model().config().arch, Arch::Llama | Arch::SmolLm3) { 2e-4 } else { 0.0 };
        for (policy, before) in [("full", "full"), ("dms", &dms(&place.path("gates")))] {
            let ((logits, stats), (expected, held)) = (walk(&again, policy), walk(&lm, before));
            let off = furthest(&logits, &expected);
            assert!(off <= tolerance, "{arch} {policy}: {off}");
            assert_eq!(stats, held, "{arch} {policy}");
        }
    }
}

/// What RoPE turns together is side by side in one order and half a head apart in the other.
#[test]
fn interleaved_rows_are_put_half_a_head_apart() {
    let place = Place::new();
    let tiny = tiny("llama", true);
    let lm = place.gguf(&tiny);
    place.export(&lm, None).unwrap();
    let tensors = place.tensors("out/model.safetensors");
    for (part, heads) in [("q_proj", HEADS), ("k_proj", 2)] {
        let name = format!("model.layers.1.self_attn.{part}.weight");
        let (before, after) = (rows(&tiny.tensors[&name]), rows(&tensors[&name]));
        assert_eq!(after.len(), heads * HEAD_DIM);
        for (row, after) in after.iter().enumerate() {
            let (head, at) = (row / HEAD_DIM, row % HEAD_DIM);
            let from = head * HEAD_DIM + 2 * (at % (HEAD_DIM / 2)) + at / (HEAD_DIM / 2);
            assert_eq!(after, &before[from], "{part} {row}");
        }
    }
    let name = "model.layers.1.self_attn.v_proj.weight";
    assert_eq!(rows(&tensors[name]), rows(&tiny.tensors[name]));
}

/// Biases turn with their rows. Hugging Face's llama has them on all four projections or on none.
#[test]
fn biases_are_put_in_order_or_refused() {
    let mut tiny = tiny("llama", true);
    for (part, rows) in [("q_proj", HIDDEN), ("k_proj", 2 * HEAD_DIM), ("v_proj", 2 * HEAD_DIM)] {
        let numbers: Vec<f32> = (0..rows).map(|i| ((i * 29 + 5) % 32) as f32 / 16.0 - 1.0).collect();
        let bias = Tensor::new(numbers, &Device::Cpu).unwrap();
        let name = |layer| format!("model.layers.{layer}.self_attn.{part}.bias");
        tiny.tensors.extend((0..LAYERS).map(|layer| (name(layer), bias.clone())));
    }
    let place = Place::new();
    place.refuses(&place.gguf(&tiny), &["no words", "q, k and v: true", "output: false"]);

    let ones = Tensor::ones(HIDDEN, DType::F32, &Device::Cpu).unwrap();
    let name = |layer| format!("model.layers.{layer}.self_attn.o_proj.bias");
    tiny.tensors.extend((0..LAYERS).map(|layer| (name(layer), ones.clone())));
    let lm = place.gguf(&tiny);
    place.export(&lm, None).unwrap();
    let off = furthest(&walk(&load(&place.path("out")), "full").0, &walk(&lm, "full").0);
    assert!(off < 2e-4, "{off}");
}

#[test]
fn scaled_frequencies_are_written_as_they_were_scaled() {
    let place = Place::new();
    let mut tiny = tiny("llama", true);
    let frequencies: Vec<f32> = (0..HEAD_DIM / 2).map(|i| 10000f32.powf(-2.0 * i as f32 / HEAD_DIM as f32)).collect();
    let divisor = |frequency: &f32| {
        let wave = 2.0 * std::f32::consts::PI / frequency;
        match wave {
            short if short < 8192.0 / 4.0 => 1.0,
            long if long > 8192.0 => 32.0,
            wave => {
                let smooth = (8192.0 / wave - 1.0) / 3.0;
                1.0 / ((1.0 - smooth) / 32.0 + smooth)
            }
        }
    };
    let divisors: Vec<f32> = frequencies.iter().map(divisor).collect();
    assert!(divisors[0] == 1.0 && divisors[HEAD_DIM / 2 - 1] == 32.0, "{divisors:?}");
    let factors = |numbers: &[f32]| Tensor::new(numbers, &Device::Cpu).unwrap();
    tiny.tensors.insert("rope_freqs.weight".into(), factors(&divisors));
    let lm = place.gguf(&tiny);
    place.export(&lm, None).unwrap();
    let scaling = place.json("out/config.json")["rope_scaling"].clone();
    assert_eq!((&scaling["rope_type"], &scaling["factor"]), (&json!("llama3"), &json!(32.0)));
    assert!(furthest(&walk(&load(&place.path("out")), "full").0, &walk(&lm, "full").0) < 1e-3);

    let place = Place::new();
    tiny.tensors.insert("rope_freqs.weight".into(), factors(&[1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]));
    place.refuses(&place.gguf(&tiny), &["RoPE"]);
}

#[test]
fn the_embedded_model_is_its_folder_again() {
    let place = Place::new();
    let lm = Lm::embedded(&LoadOptions::default()).unwrap();
    let done = Export { gates: None, layout: None, out: place.path("out") }.run(&lm).unwrap();
    assert_eq!((done.layout, done.merged), (GateLayout::Nvidia, Merged::Nothing));
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let (before, after) = (demo.join("model.safetensors"), place.path("out/model.safetensors"));
    let read = |path: &Path| candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let (before, after) = (read(&before), read(&after));
    assert_eq!((before.len(), done.tensors), (after.len(), after.len()));
    for (name, tensor) in &before {
        let numbers = |tensor: &Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>();
        assert_eq!(numbers(tensor).unwrap(), numbers(&after[name]).unwrap(), "{name}");
    }
    let again = load(&place.path("out"));
    for policy in ["full", "dms"] {
        assert_eq!(walk(&again, policy), walk(&lm, policy));
    }
}

#[test]
fn trained_weights_take_the_place_of_the_models() {
    let place = Place::new();
    let mut tiny = tiny("qwen2", false);
    let lm = place.folder(&tiny);
    let name = "model.layers.0.self_attn.q_proj.weight";
    let trained = (&tiny.tensors[name] * 0.5).unwrap();
    candle_core::safetensors::save(&HashMap::from([(name, trained.clone())]), place.path("gates/weights.safetensors"))
        .unwrap();
    assert_eq!(place.export(&lm, None).unwrap().merged, Merged::Weights(1));
    let untrained = walk(&lm, "full");
    tiny.tensors.insert(name.into(), trained);
    let expected = walk(&place.folder(&tiny), "full");
    assert_eq!(walk(&load(&place.path("out")), "full"), expected);
    assert_ne!(expected, untrained);
}

fn adapter(place: &Place, tensors: &[(&str, Tensor)], config: Value) {
    let tensors: HashMap<&str, Tensor> = tensors.iter().cloned().collect();
    candle_core::safetensors::save(&tensors, place.path("gates/adapter_model.safetensors")).unwrap();
    std::fs::write(place.path("gates/adapter_config.json"), config.to_string()).unwrap();
}

const A: &str = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight";

fn low_rank(shape: (usize, usize)) -> Tensor {
    let numbers: Vec<f32> = (0..shape.0 * shape.1).map(|i| ((i * 37 + 11) % 23) as f32 / 23.0 - 0.5).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

#[test]
fn an_adapter_is_added() {
    let place = Place::new();
    let tiny = tiny("llama", true);
    let lm = place.folder(&tiny);
    let (a, b) = (low_rank((3, HIDDEN)), low_rank((2 * HEAD_DIM, 3)));
    let off = json!({"r": 3, "lora_alpha": 12, "peft_type": "LORA", "bias": "none", "use_rslora": false,
        "rank_pattern": {}, "target_modules": ["k_proj"], "modules_to_save": null});
    adapter(&place, &[(A, a.clone()), (B, b.clone())], off);
    assert_eq!(place.export(&lm, None).unwrap().merged, Merged::Adapter(1));
    let name = "model.layers.1.self_attn.k_proj.weight";
    let (a, b, before) = (rows(&a), rows(&b), rows(&tiny.tensors[name]));
    let tensors = place.tensors("out/model.safetensors");
    for (i, row) in rows(&tensors[name]).iter().enumerate() {
        for (j, after) in row.iter().enumerate() {
            let change: f32 = (0..3).map(|k| b[i][k] * a[k][j]).sum();
            let expected = before[i][j] + 12.0 / 3.0 * change;
            assert!((after - expected).abs() <= expected.abs() / 256.0 + 1e-6, "{after} {expected}");
        }
    }
    let name = "model.layers.0.self_attn.k_proj.weight";
    assert_eq!(rows(&tensors[name]), rows(&tiny.tensors[name]), "where there is none, nothing is added");
}

#[test]
fn what_a_training_left_and_does_not_fit_is_named() {
    let place = Place::new();
    let lm = place.folder(&tiny("llama", true));
    let plain = json!({"r": 3, "lora_alpha": 12});
    let (a, b) = (low_rank((3, HIDDEN)), low_rank((2 * HEAD_DIM, 3)));
    let unknown = "base_model.model.model.layers.9.self_attn.k_proj";
    let (ua, ub) = (format!("{unknown}.lora_A.weight"), format!("{unknown}.lora_B.weight"));
    for (tensors, config, words) in [
        (vec![(A, a.clone())], plain.clone(), [B, "no tensor"]),
        (vec![(B, b.clone())], plain.clone(), [B, "adapter_model"]),
        (vec![(&*ua, a.clone()), (&*ub, b.clone())], plain.clone(), [unknown, "no tensor of the model"]),
        (vec![(A, b.clone()), (B, b.clone())], plain.clone(), ["[32, 3]", "[3, 64]"]),
        (vec![(A, a.clone()), (B, b.clone())], json!({"r": 4, "lora_alpha": 12}), ["[3, 64]", "[4, 64]"]),
        (vec![(A, a.clone()), (B, b.clone())], json!({"r": 0, "lora_alpha": 12}), ["adapter_config.json", "r=0"]),
        (vec![(A, a.clone()), (B, b.clone())], json!({"r": 3}), ["adapter_config.json", "lora_alpha"]),
        (vec![], json!({"r": 3, "lora_alpha": 1, "use_dora": true, "bias": "all"}), ["use_dora", "bias"]),
        (vec![], json!({"r": 3, "lora_alpha": 1, "rank_pattern": {"q": 1}}), ["adapter_config.json", "rank_pattern"]),
    ] {
        adapter(&place, &tensors, config);
        place.refuses(&lm, &words);
    }
    let weights = place.path("gates/weights.safetensors");
    let save = |name: &str| candle_core::safetensors::save(&HashMap::from([(name, a.clone())]), &weights).unwrap();
    save("model.norm.weight");
    place.refuses(&lm, &["both"]);
    std::fs::remove_file(place.path("gates/adapter_model.safetensors")).unwrap();
    place.refuses(&lm, &["model.norm.weight", "[3, 64]", "[64]"]);
    save("lm_head.weight");
    place.refuses(&lm, &["lm_head.weight", "no tensor of the model"]);
}

#[test]
fn a_model_without_gates_is_not_exported() {
    let place = Place::new();
    let lm = place.folder(&tiny("llama", true));
    let export = |gates: &str| Export { gates: Some(gates.into()), layout: None, out: place.path("out") };
    let none = Export { gates: None, ..export("") };
    assert_says(none.run(&lm).unwrap_err(), &["model", "no gates", "kvpolicy retrofit"]);
    let brought = "smollm2-135m-instruct-w256-8x";
    assert_says(export(brought).run(&lm).unwrap_err(), &[brought, "another model"]);
    assert_says(export("nowhere/gates").run(&lm).unwrap_err(), &["nowhere/gates"]);
    assert!(!place.path("out").exists());

    let other = Tiny::new("llama", 1, HEAD_DIM, true, json!({}));
    other.write_gates(&place.path("gates"));
    place.refuses(&lm, &["dms_proj_alpha", "[1, 64]", "[2, 64]"]);
}

#[test]
fn a_folder_with_files_is_left_alone() {
    let place = Place::new();
    let lm = place.folder(&tiny("llama", true));
    std::fs::create_dir(place.path("out")).unwrap();
    place.export(&lm, None).unwrap(); // an empty one is taken
    let before = std::fs::read(place.path("out/config.json")).unwrap();
    assert_says(place.export(&lm, None).unwrap_err(), &["out", "not empty"]);
    assert_eq!(std::fs::read(place.path("out/config.json")).unwrap(), before);
    let file = Export { gates: None, layout: None, out: place.path("out/config.json") };
    assert_says(file.check().unwrap_err(), &["config.json"]);
}

#[test]
fn quantized_weights_are_refused() {
    let place = Place::new();
    place.gguf(&tiny("llama", true));
    let lm = Lm::load(place.path("m.gguf").to_str().unwrap(), &LoadOptions::default()).unwrap();
    place.refuses(&lm, &["quantized", "dequantized"]);
}

/// A checkpoint whose gates are neurons of its queries, described by this file.
fn borrowed(place: &Place, file: &str, fields: Value) -> Lm {
    place.folder(&tiny("llama", true));
    let mut all = if file == "config.json" { place.json("model/config.json") } else { json!({}) };
    all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    std::fs::write(place.path("model").join(file), all.to_string()).unwrap();
    load(&place.path("model"))
}

#[test]
fn borrowed_neurons_stay_in_their_own_layout() {
    let nvidia = json!({"dms_window_size": 8, "dms_alpha_scale": 3.0, "dms_initial_alpha_offset": 0.5});
    let shisa = json!({"window_size": 8, "alpha_scale": 3.0, "alpha_offset": 0.5, "target_cr": 8.0});
    for (file, fields, layout, other) in [
        ("config.json", nvidia, GateLayout::Nvidia, GateLayout::Shisa),
        ("dms_metadata.json", shisa.clone(), GateLayout::Shisa, GateLayout::Nvidia),
    ] {
        let place = Place::new();
        let lm = borrowed(&place, file, fields);
        let export = |layout| Export { gates: None, layout: Some(layout), out: place.path("out") };
        assert_says(export(other).run(&lm).unwrap_err(), &["judge", "own", &layout.to_string()]);
        let done = export(layout).run(&lm).unwrap();
        assert_eq!((done.layout, done.gate_tensors), (layout, 0));
        assert_eq!(place.path("out/dms_metadata.json").exists(), layout == GateLayout::Shisa);
        let again = load(&place.path("out"));
        let (logits, stats) = walk(&again, "dms");
        assert!(stats.evicted > 0);
        assert_eq!((logits, stats), walk(&lm, "dms"), "{layout}");
    }

    let place = Place::new();
    let lm = place.folder(&tiny("llama", true));
    assert_says(place.export(&lm, Some(GateLayout::Shisa)).unwrap_err(), &["adapter", "neuron", "nvidia"]);
    // Weights trained to have the neuron, and no tensors of gates.
    std::fs::remove_file(place.path("gates/gates.safetensors")).unwrap();
    std::fs::write(place.path("gates/dms_metadata.json"), shisa.to_string()).unwrap();
    let norm = HashMap::from([("model.norm.weight", Tensor::ones(HIDDEN, DType::F32, &Device::Cpu).unwrap())]);
    candle_core::safetensors::save(&norm, place.path("gates/weights.safetensors")).unwrap();
    let done = place.export(&lm, Some(GateLayout::Shisa)).unwrap();
    assert_eq!((done.layout, done.gate_tensors, done.merged), (GateLayout::Shisa, 0, Merged::Weights(1)));
    assert!(walk(&load(&place.path("out")), "dms").1.evicted > 0);
}

#[test]
fn gates_taken_out_of_a_folder_are_the_same_to_the_bit() {
    let place = Place::new();
    let lm = place.folder(&tiny("qwen3", true));
    place.export(&lm, Some(GateLayout::Nvidia)).unwrap();
    let (out, alone) = (place.path("out"), place.path("alone"));
    assert_eq!(extract_gates(out.to_str().unwrap(), &alone).unwrap(), 2 * LAYERS);
    let (before, after) = (place.tensors("gates/gates.safetensors"), place.tensors("alone/gates.safetensors"));
    assert_eq!(before.len(), after.len());
    for (name, tensor) in &before {
        assert_eq!(after[name].dtype(), DType::BF16);
        let numbers = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>();
        assert_eq!(numbers(tensor).unwrap(), numbers(&after[name]).unwrap(), "{name}");
    }
    let fields = place.json("alone/config.json");
    assert_eq!((&fields["dms_window_size"], &fields["model_type"]), (&json!(8), &Value::Null));
    for weights in [alone.clone(), alone.join("gates.safetensors")] {
        let policy = format!("dms:weights={}", weights.display());
        assert_eq!(walk(&lm, &policy), walk(&load(&out), "dms"));
    }
    assert_says(extract_gates(out.to_str().unwrap(), &alone).unwrap_err(), &["alone", "not empty"]);

    let none = place.path("none");
    assert_says(extract_gates(place.path("model").to_str().unwrap(), &none).unwrap_err(), &["model", "no description"]);
    let lacking = json!({"dms_window_size": 8, "dms_separate_alpha": true});
    let mut config = place.json("model/config.json");
    config.as_object_mut().unwrap().extend(lacking.as_object().unwrap().clone());
    std::fs::write(place.path("model/config.json"), config.to_string()).unwrap();
    assert_says(extract_gates(place.path("model").to_str().unwrap(), &none).unwrap_err(), &["dms_proj_alpha.weight"]);
    config["dms_separate_alpha"] = json!(false);
    std::fs::write(place.path("model/config.json"), config.to_string()).unwrap();
    assert_says(extract_gates(place.path("model").to_str().unwrap(), &none).unwrap_err(), &["neurons", "whole model"]);
    assert!(!none.exists());
}
