//! Several answers to one prompt against as many sessions that each read it.
#![allow(clippy::unwrap_used)]

use kvpolicy::Registry;
use kvpolicy_candle::{Error, Lm, LoadOptions, Session, SessionOptions};

fn embedded() -> Lm {
    Lm::embedded(&LoadOptions::default()).unwrap()
}

fn session<'a>(lm: &'a Lm, policy: &str, options: &SessionOptions) -> Session<'a> {
    lm.session(Registry::standard().parse(policy).unwrap(), options).unwrap()
}

fn prompt(lm: &Lm) -> Vec<u32> {
    lm.tokenizer().encode(&"ka-mo lu-re ".repeat(30)).unwrap()
}

/// The t-th token of a chain.
fn token(chain: usize, t: usize) -> u32 {
    (65 + (7 * chain + 3 * t) % 26) as u32
}

#[test]
fn chains_say_what_sessions_of_their_own_would() {
    let lm = embedded();
    for policy in ["full", "dms", "window:size=40,sinks=2", "h2o:budget=60,recent=8", "snapkv:budget=60,window=8"] {
        let mut first = session(&lm, policy, &SessionOptions::default());
        first.prefill(&prompt(&lm), true).unwrap();
        let mut chains = first.chains(3).unwrap();
        let mut alone: Vec<Session> = (0..3).map(|_| session(&lm, policy, &SessionOptions::default())).collect();
        alone.iter_mut().for_each(|session| _ = session.prefill(&prompt(&lm), true).unwrap());
        for t in 0..25 {
            // In another order each time, and the second ends before the others.
            let mut living = vec![2, 0];
            if t < 12 {
                living.insert(t % 3, 1);
            } else {
                chains.end(1);
            }
            let tokens: Vec<(usize, u32)> = living.iter().map(|&chain| (chain, token(chain, t))).collect();
            let (logits, lost) = chains.decode(&tokens).unwrap();
            assert!(lost.is_empty());
            for (row, &(chain, token)) in tokens.iter().enumerate() {
                let got: Vec<f32> = logits.get(row).unwrap().to_vec1().unwrap();
                let want: Vec<f32> = alone[chain].decode(token).unwrap().to_vec1().unwrap();
                let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap();
                assert!(off <= 1e-3, "{policy}: chain {chain} at {t} is off by {off}");
            }
        }
        let refused = chains.decode(&[(1, 65)]).unwrap_err().to_string();
        assert!(refused.contains("chain 1 has ended"), "{refused}");
        assert!(chains.has_room(0) && !chains.has_room(1) && !chains.has_room(3));
    }
}

/// What `n` chains hold after a token each.
fn bytes_with_a_token(lm: &Lm, n: usize) -> u64 {
    let mut session = session(lm, "full", &SessionOptions::default());
    session.prefill(&prompt(lm), true).unwrap();
    let mut chains = session.chains(n).unwrap();
    chains.decode(&(0..n).map(|chain| (chain, 65)).collect::<Vec<_>>()).unwrap();
    chains.cache().usage().bytes_in_use
}

#[test]
fn the_prompt_is_held_once() {
    let lm = embedded();
    let ratio = bytes_with_a_token(&lm, 8) as f64 / bytes_with_a_token(&lm, 1) as f64;
    assert!(ratio < 1.5, "eight hold {ratio} times what one does"); // a prompt of some 20 pages a row
}

#[test]
fn a_chain_without_room_ends_alone() {
    let lm = embedded();
    let options = SessionOptions { kv_bytes: Some(bytes_with_a_token(&lm, 1) * 3 / 2), ..SessionOptions::default() };
    let mut first = session(&lm, "full", &options);
    first.prefill(&prompt(&lm), true).unwrap();
    let mut chains = first.chains(3).unwrap();
    let mut living = vec![0, 1, 2];
    let mut told = vec![];
    while !living.is_empty() && told.is_empty() {
        living.retain(|&chain| chains.has_room(chain));
        let tokens: Vec<(usize, u32)> = living.iter().map(|&chain| (chain, 65)).collect();
        told = chains.decode(&tokens).unwrap().1;
    }
    let (gone, error) = told.remove(0);
    assert!(error.to_string().contains("exhausted"), "{error}");
    assert!(!chains.has_room(gone));
    let others: Vec<(usize, u32)> = (0..3).filter(|&chain| chain != gone).map(|chain| (chain, 65)).collect();
    assert!(chains.decode(&others).unwrap().1.is_empty(), "what one gave back serves the others");
}

#[test]
fn no_chains_are_refused() {
    let lm = embedded();
    let refused = session(&lm, "full", &SessionOptions::default()).chains(0).unwrap_err();
    assert!(matches!(&refused, Error::Model(what) if what.contains("chains=0")), "{refused}");
}
