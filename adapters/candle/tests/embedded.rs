//! The model inside the program.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvpolicy::Registry;
use kvpolicy_candle::{Lm, LoadOptions, SessionOptions};
use std::path::Path;

fn embedded() -> Lm {
    Lm::embedded(&LoadOptions::default()).unwrap()
}

fn logits(lm: &Lm, policy: &str) -> Vec<f32> {
    let mut session = lm.session(Registry::standard().parse(policy).unwrap(), &SessionOptions::default()).unwrap();
    session.prefill(&lm.tokenizer().encode(&"ka-mo lu-re ".repeat(20)).unwrap(), true).unwrap().to_vec1().unwrap()
}

#[test]
fn the_embedded_model_is_its_folder() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let (inside, outside) = (embedded(), Lm::load(dir.to_str().unwrap(), &LoadOptions::default()).unwrap());
    assert_eq!((inside.name(), outside.name()), ("demo", "demo"));
    assert_eq!(inside.sha256().unwrap(), outside.sha256().unwrap());
    assert_eq!(inside.model().config(), outside.model().config());
    for policy in ["full", "dms"] {
        let of = [logits(&inside, policy), logits(&outside, policy)];
        assert!(of[0] == of[1] && of[0].iter().all(|x| x.is_finite()), "{policy}");
    }
}

#[test]
fn the_embedded_model_has_gates_and_room() {
    let lm = embedded();
    let config = lm.model().config();
    assert!(lm.gates().is_some() && config.max_context >= 1024 && config.vocab == lm.tokenizer().vocab_size());
    assert_eq!(config.eos, [256]);
}

#[test]
fn the_hash_of_a_tokenizer_is_of_its_template_too() {
    let dir = tempfile::tempdir().unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(demo.join(name), dir.path().join(name)).unwrap();
    }
    let hash = || Lm::load(dir.path().to_str().unwrap(), &LoadOptions::default()).unwrap().tokenizer_sha256().unwrap();
    let first = hash();
    assert_eq!((&first, first.len()), (&embedded().tokenizer_sha256().unwrap(), 64));
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    let with_template = hash();
    let tokenizer = std::fs::read_to_string(dir.path().join("tokenizer.json")).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.replace("<|end|>", "<|stop|>")).unwrap();
    let renamed = hash();
    assert!(first != with_template && with_template != renamed && renamed != first);
}

/// What is published with the crate.
#[test]
fn the_embedded_files_are_small() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let sizes = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
    let all: u64 = sizes.sum();
    assert!(all <= 8_000_000, "{all} bytes");
}

#[test]
fn tokens_of_the_embedded_model_are_bytes() {
    let lm = embedded();
    let tokenizer = lm.tokenizer();
    let ascii: String = (0..128u8).map(char::from).collect();
    let wide: String = ('\u{80}'..'\u{3000}').step_by(7).chain(['\u{1F600}', '\u{10FFFF}']).collect();
    for text in ["", " ", "  a  b ", "\n\n", "the code of amber is 4821.", "Grüße, 世界!", &ascii, &wide] {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(ids, text.bytes().map(u32::from).collect::<Vec<_>>(), "{text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    for byte in 0..=255u32 {
        let two_times = tokenizer.decode(&[byte, byte]).unwrap();
        assert_eq!(byte < 128, two_times.chars().all(|c| c as u32 == byte), "{byte}");
    }
    assert_eq!(tokenizer.encode("a<|end|>b").unwrap(), [97, 256, 98]);
    assert_eq!((tokenizer.eos(), tokenizer.vocab_size()), (&[256][..], 257));
    assert_eq!(tokenizer.decode(&[97, 256, 98]).unwrap(), "ab");
}
