//! Layers that differ, beside policies: sliding windows of the model, and RoPE.
#![allow(clippy::unwrap_used)]

#[path = "common/tiny.rs"]
mod tiny;

use candle_core::{DType, Device, quantized::GgmlDType};
use kvpolicy::{CpuConfig, KvCache, Phase, Registry, cpu};
use kvpolicy_candle::{Config, Gates, LoadOptions, Model, Session, SessionOptions};
use serde_json::json;
use std::sync::Arc;
use tiny::Tiny;

const WINDOW: usize = 8;

/// Every layer has a window.
fn mistral() -> Model {
    let tiny = Tiny::new("mistral", 2, 16, false, json!({ "sliding_window": WINDOW }));
    let dir = tempfile::tempdir().unwrap();
    tiny.write_dir(dir.path());
    Model::from_dir(dir.path(), &LoadOptions::default()).unwrap().0
}

fn session<'a>(model: &'a Model, policy: &str, max_tokens: usize) -> Result<Session<'a>, String> {
    let policy = Registry::standard().parse(policy).unwrap();
    let options = SessionOptions { max_tokens: Some(max_tokens), ..SessionOptions::default() };
    Session::new(model, None, policy, &options).map_err(|error| error.to_string())
}

#[test]
fn a_policy_rules_where_no_window_ends() {
    let model = mistral();
    for policy in ["h2o:budget=4,recent=2", "window:size=3,sinks=1", "expected-attention:budget=5"] {
        let refused = session(&model, policy, WINDOW + 1).unwrap_err();
        assert!(refused.contains(policy) && refused.contains("window of 8"), "{refused}");
        let mut short = session(&model, policy, WINDOW).unwrap();
        short.prefill(&[1, 2, 3, 4, 5, 6], true).unwrap();
        assert!(short.cache().live(0, short.seq()).iter().all(|live| *live < 6), "{policy}");
        assert!(short.prefill(&[7, 8, 9], true).is_err(), "beyond the window");
    }
    assert!(session(&model, "full", 512).is_ok());
}

/// The first of two layers has a window.
fn gemma() -> Tiny {
    let extra = json!({ "sliding_window": WINDOW, "sliding_window_pattern": 2 });
    Tiny::new("gemma3_text", 2, 16, true, extra)
}

#[test]
fn beside_layers_with_a_window_a_policy_rules_the_others() {
    let dir = tempfile::tempdir().unwrap();
    gemma().write_dir(dir.path());
    let model = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap().0;
    for (policy, held) in
        [("full", 30), ("h2o:budget=12,recent=2", 12), ("window:size=3,sinks=1", 4), ("tova:budget=50%", 15)]
    {
        for max_tokens in [30, 512] {
            let mut session = session(&model, policy, max_tokens).unwrap();
            session.prefill(&[5; 20], true).unwrap();
            (0..10).for_each(|token| _ = session.decode(token).unwrap());
            let live = |layer| session.cache().live(layer, session.seq());
            assert_eq!((live(0), live(1)), (vec![WINDOW; 2], vec![held; 2]), "{policy}");
            let name = session.cache().policy().to_string();
            assert!(name.starts_with("per-layer(0=window:size=8,sinks=0; rest=") && name.contains(policy), "{name}");
            assert!(Registry::standard().parse(&name).is_ok());
        }
    }
    assert!(session(&model, "expected-attention:budget=5", 64).unwrap_err().contains("not the same in each layer"));
}

#[test]
fn gates_decide_where_the_policy_rules() {
    let dir = tempfile::tempdir().unwrap();
    gemma().write_dir(dir.path());
    gemma().write_gates(&dir.path().join("gates"));
    let model = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap().0;
    let gates = Gates::load(&dir.path().join("gates"), model.config(), DType::F32, &Device::Cpu).unwrap();
    let policy = Registry::standard().parse("dms").unwrap();
    let mut session = Session::new(&model, Some(Arc::new(gates)), policy, &SessionOptions::default()).unwrap();
    session.prefill(&(0..60).collect::<Vec<_>>(), true).unwrap();
    assert_eq!(session.cache().live(0, session.seq()), vec![WINDOW; 2]);
    let live = session.cache().live(1, session.seq());
    assert!(live.iter().all(|live| (9..60).contains(live)), "{live:?}");
}

#[test]
fn a_cache_that_knows_of_no_window_is_refused_where_it_would_be_wrong() {
    let (model, policy) = (mistral(), Registry::standard().parse("full").unwrap());
    let spec = model.config().spec();
    let mut cache = KvCache::new(spec.clone(), policy, cpu(&spec, &CpuConfig::default()).unwrap()).unwrap();
    let seq = cache.open();
    let step = cache.begin(&[(seq, WINDOW, Phase::Prefill { last: true })]).unwrap();
    model.forward(&[1; WINDOW], &step, &mut cache, None).unwrap();
    cache.end(step);
    let step = cache.begin(&[(seq, 1, Phase::Decode)]).unwrap();
    let error = model.forward(&[1], &step, &mut cache, None).unwrap_err().to_string();
    assert!(error.contains("layer 0") && error.contains("Config::policy"), "{error}");
}

#[test]
fn a_gguf_file_has_its_window() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (window, told) in [(json!(WINDOW), Some(WINDOW as u32)), (json!(512), None), (json!(null), None)] {
        Tiny::new("phi3", 2, 16, false, json!({ "sliding_window": window })).write_gguf(&path, GgmlDType::F32);
        let model = Model::from_gguf(&path, &LoadOptions::default()).unwrap();
        assert_eq!((model.config().window(0), model.config().window(1)), (told, told));
    }
    Tiny::new("llama", 2, 16, false, json!({ "sliding_window": WINDOW })).write_gguf(&path, GgmlDType::F32);
    assert_eq!(Model::from_gguf(&path, &LoadOptions::default()).unwrap().config().window(0), None);
}

/// What undoes RoPE must know the one of each layer.
#[test]
fn a_policy_that_undoes_rope_is_refused_where_layers_differ_in_it() {
    for (interval, runs) in [(4, true), (2, false)] {
        let tiny = Tiny::new("smollm3", 2, 16, true, json!({ "no_rope_layer_interval": interval }));
        let dir = tempfile::tempdir().unwrap();
        tiny.write_dir(dir.path());
        let model = Model::from_dir(dir.path(), &LoadOptions::default()).unwrap().0;
        match session(&model, "expected-attention:budget=5", 64) {
            Ok(_) => assert!(runs),
            Err(error) => assert!(!runs && error.contains("no RoPE to average, or not the same"), "{error}"),
        }
        assert!(session(&model, "keydiff:budget=5", 64).is_ok());
    }
}

#[test]
fn a_window_of_nothing_is_refused() {
    let config = |window: u64| {
        let tiny = Tiny::new("mistral", 2, 16, false, json!({ "sliding_window": window }));
        Config::from_json(&tiny.config().to_string())
    };
    assert!(config(0).unwrap_err().to_string().contains("sliding_window=0"));
    assert_eq!(config(1).unwrap().window(0), Some(1));
    assert_eq!(config(512).unwrap().window(0), None, "as long as the context");
}
