//! Files that cannot be used are refused with their reason.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/tiny.rs"]
mod tiny;

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use kvpolicy::Registry;
use kvpolicy_candle::{Gates, Lm, LoadOptions, Model, SessionOptions};
use serde_json::json;
use std::path::Path;
use tiny::{HEADS, HIDDEN, Tiny};

fn tiny(arch: &'static str) -> Tiny {
    Tiny::new(arch, 2, HIDDEN / HEADS, false, json!({}))
}

fn assert_says(error: impl std::fmt::Display, words: &[&str]) {
    let text = error.to_string();
    words.iter().for_each(|word| assert!(text.contains(word), "`{text}` does not say `{word}`"));
}

fn gguf(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("model.gguf");
    tiny("llama").write_gguf(&path, GgmlDType::F32);
    path
}

#[test]
fn a_gguf_file_that_is_cut_off_names_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = gguf(dir.path());
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 3, 4, 20, 100, 3000, whole.len() / 2, whole.len() - 100] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = Model::from_gguf(&path, &LoadOptions::default()).unwrap_err();
        assert_says(error, &["model.gguf", "cut off"]);
    }
}

/// Lengths that candle would allocate, recurse into or divide by.
#[test]
fn a_damaged_gguf_header_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let header = |entries: u64, body: &[u8]| {
        [&b"GGUF"[..], &3u32.to_le_bytes(), &0u64.to_le_bytes(), &entries.to_le_bytes(), body].concat()
    };
    let entry = |key: &str, kind: u32, value: &[u8]| {
        [&(key.len() as u64).to_le_bytes()[..], key.as_bytes(), &kind.to_le_bytes(), value].concat()
    };
    let array = |kind: u32, length: u64| [&kind.to_le_bytes()[..], &length.to_le_bytes()].concat();
    for (bytes, word) in [
        (header(1, &u64::MAX.to_le_bytes()), "announced"),
        (header(u64::MAX, &[]), "announced"),
        (header(1, &entry("a", 9, &array(0, 1 << 40))), "announced"),
        (header(1, &entry("a", 9, &array(10, u64::MAX))), "overflows"),
        (header(1, &entry("a", 9, &array(9, 1).repeat(50))), "nested"),
        (header(1, &entry("general.alignment", 4, &[0; 4])), "power of two"),
        (header(1, &entry("a", 77, &[])), "77"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        assert_says(Model::from_gguf(&path, &LoadOptions::default()).unwrap_err(), &["model.gguf", "damaged", word]);
    }
    // One byte wrong, anywhere in the header: whatever comes of it, it comes as a result.
    let mut whole = std::fs::read(gguf(dir.path())).unwrap();
    for at in (0..2000).step_by(3) {
        let byte = std::mem::replace(&mut whole[at], 0xFF);
        std::fs::write(&path, &whole).unwrap();
        let _ = Lm::load(path.to_str().unwrap(), &LoadOptions::default());
        whole[at] = byte;
    }
}

#[test]
fn a_file_of_another_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, "this is no model at all, but long enough to be one").unwrap();
    assert_says(Lm::load(path.to_str().unwrap(), &LoadOptions::default()).unwrap_err(), &["is no GGUF file"]);
    assert_says(Lm::load("", &LoadOptions::default()).unwrap_err(), &["no model named"]);
    assert_says(Lm::load("./nothing/here", &LoadOptions::default()).unwrap_err(), &["no such file"]);
}

#[test]
fn a_missing_tensor_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = tiny("qwen2");
    model.tensors.remove("model.layers.1.self_attn.k_proj.bias").unwrap();
    model.write_dir(dir.path());
    let error = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap_err();
    assert_says(error, &["model.layers.1.self_attn.k_proj.bias"]);
    let path = dir.path().join("model.gguf");
    model.write_gguf(&path, GgmlDType::F32);
    assert_says(Model::from_gguf(&path, &LoadOptions::default()).unwrap_err(), &["blk.1.attn_k.bias"]);
}

#[test]
fn a_tensor_of_the_wrong_shape_is_named_with_both_shapes() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = tiny("llama");
    let wrong = Tensor::zeros((96, 32), DType::F32, &Device::Cpu).unwrap();
    model.tensors.insert("model.layers.0.mlp.up_proj.weight".into(), wrong);
    model.write_dir(dir.path());
    let error = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap_err();
    assert_says(error, &["model.layers.0.mlp.up_proj.weight", "[96, 32]", "[96, 64]"]);
    let path = dir.path().join("model.gguf");
    model.write_gguf(&path, GgmlDType::F32);
    assert_says(Model::from_gguf(&path, &LoadOptions::default()).unwrap_err(), &["up_proj", "[96, 32]", "[96, 64]"]);
}

#[test]
fn a_folder_without_its_files_says_which() {
    let dir = tempfile::tempdir().unwrap();
    let load = || Model::from_dir(dir.path(), &LoadOptions::default()).unwrap_err();
    assert_says(load(), &["config.json"]);
    std::fs::write(dir.path().join("config.json"), tiny("llama").config().to_string()).unwrap();
    assert_says(load(), &["model.safetensors"]);
    std::fs::write(dir.path().join("model.safetensors"), b"\xff\xff\xff\xff\xff\xff\xff\xffrubbish").unwrap();
    assert_says(load(), &["model.safetensors"]);
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert_says(load(), &["config.json"]);
}

#[test]
fn gates_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    tiny("llama").write_dir(dir.path());
    let (model, none) = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap();
    assert!(none.is_none());
    let load = |path: &Path| Gates::load(path, model.config(), DType::F32, &Device::Cpu).unwrap_err();
    assert_says(load(dir.path()), &["no description of gates"]);
    assert_says(load(&dir.path().join("nothing.safetensors")), &["nothing.safetensors"]);
    let config = json!({"dms_separate_alpha": true, "dms_window_size": 8});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    assert_says(load(dir.path()), &["model.layers.0.self_attn.dms_proj_alpha"]);
    std::fs::write(dir.path().join("config.json"), json!({"dms_separate_alpha": true}).to_string()).unwrap();
    assert_says(load(dir.path()), &["dms_window_size"]);
}

#[test]
fn a_session_refuses_what_it_cannot_do() {
    let dir = tempfile::tempdir().unwrap();
    let lm = Lm::load(gguf(dir.path()).to_str().unwrap(), &LoadOptions::default()).unwrap();
    let session = |policy: &str, options: &SessionOptions| {
        let policy = Registry::standard().parse(policy).unwrap();
        lm.session(policy, options)
    };
    assert_says(session("dms", &SessionOptions::default()).unwrap_err(), &["gates", "weights="]);
    let mut full = session("full", &SessionOptions::default()).unwrap();
    assert_says(full.prefill(&[], true).unwrap_err(), &["empty"]);
    assert_says(full.prefill(&[100_000], true).unwrap_err(), &["100000", "vocabulary"]);
    assert_says(full.prefill(&[65; 600], true).unwrap_err(), &["600", "512", "--allow-long"]);
    assert!(full.prefill(&[65; 20], true).is_ok(), "what was refused changed nothing");
    let long = SessionOptions { max_tokens: Some(600), ..SessionOptions::default() };
    let mut full = session("full", &long).unwrap();
    assert!(full.prefill(&[65; 599], true).is_ok() && full.has_room());
    assert!(full.decode(65).is_ok() && !full.has_room());
    assert_says(full.decode(65).unwrap_err(), &["601", "600", "max_tokens"]);
    let small = SessionOptions { kv_bytes: Some(100_000), ..SessionOptions::default() };
    let mut full = session("full", &small).unwrap();
    assert_says(full.prefill(&[65; 400], true).unwrap_err(), &["exhausted", "100000"]);
    let mut window = session("window:size=32", &small).unwrap();
    for _ in 0..100 {
        window.prefill(&[65; 5], false).unwrap();
    }
}
