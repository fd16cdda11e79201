//! Wrong calls give typed errors and change nothing; none panics.

use crate::common::{
    DECODE, LAST, MORE, Rng, Stream, assert_close, cases, complete, dense,
    play::Play,
    policies::{EVERY_POLICY, Misshapen},
    policy,
};
use candle_core::{DType, Device, Tensor};
use kvpolicy::{CpuConfig, Error, KvCache, ModelSpec, NewTokens, Phase, SeqId, Step, cpu};
use proptest::{prelude::*, sample::select};
use std::sync::Arc;

fn spec() -> ModelSpec {
    complete(2, 4, 2, 8)
}

fn cache(text: &str) -> KvCache {
    KvCache::new(spec(), policy(text), cpu(&spec(), &CpuConfig::default()).unwrap()).unwrap()
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// Tensors of the right shapes.
fn tokens(step: &Step) -> NewTokens {
    let n = step.len();
    step.tokens(zeros(&[n, 4, 8]), zeros(&[n, 2, 8]), zeros(&[n, 2, 8]), Some(zeros(&[n, 2])))
}

/// The reason why a step cannot begin.
#[track_caller]
fn refused(cache: &mut KvCache, work: &[(SeqId, usize, Phase)]) -> String {
    match cache.begin(work) {
        Err(error @ Error::Sequence { .. }) => error.to_string(),
        other => panic!("{work:?} gave {other:?}"),
    }
}

#[test]
fn begin_refuses_what_the_life_of_a_sequence_does_not_allow() {
    let mut cache = cache("full");
    let (a, b, gone) = (cache.open(), cache.open(), cache.open());
    cache.release(gone);
    assert!(
        refused(&mut cache, &[(a, 4, LAST), (gone, 4, LAST)]).contains("unknown to this cache or already released")
    );
    assert!(refused(&mut cache, &[(a, 0, LAST)]).contains("no new token"));
    assert!(refused(&mut cache, &[(a, 0, DECODE)]).contains("no new token"));
    assert!(refused(&mut cache, &[(a, 2, DECODE)]).contains("one token a step"));
    assert!(refused(&mut cache, &[(a, 1, LAST), (b, 1, LAST), (a, 1, DECODE)]).contains("twice"));
    assert!(refused(&mut cache, &[(a, 1 << 31, LAST)]).contains("2^31"));
    // Nothing has changed: both can still be in a step.
    let step = cache.begin(&[(a, 3, LAST), (b, 1, LAST)]).unwrap();
    assert!(refused(&mut cache, &[(a, 1, DECODE)]).contains("did not end"));
    assert!(cache.end(step).is_empty());
    assert_eq!((cache.seen(a).unwrap(), cache.seen(b).unwrap()), (3, 1));
    assert!(matches!(cache.seen(gone), Err(Error::Sequence { .. })));
}

#[test]
fn begin_refuses_a_length_that_overflows() {
    let mut cache = cache("full");
    let seq = cache.open();
    let step = cache.begin(&[(seq, 3, LAST)]).unwrap();
    cache.end(step);
    assert!(refused(&mut cache, &[(seq, usize::MAX, LAST)]).contains("2^31"));
}

#[test]
fn a_sequence_in_a_step_that_never_ended_can_only_be_released() {
    let mut cache = cache("full");
    let seq = cache.open();
    let step = cache.begin(&[(seq, 3, LAST)]).unwrap();
    cache.attend(0, &step, &tokens(&step)).unwrap();
    drop(step);
    assert!(refused(&mut cache, &[(seq, 1, DECODE)]).contains("release it"));
    cache.release(seq);
    assert_eq!((cache.usage().live_entries, cache.usage().pages_in_use), (0, 0));
}

#[test]
fn every_tensor_of_a_wrong_shape_is_named_with_both_shapes() {
    let mut cache = cache("dms");
    let seq = cache.open();
    let step = cache.begin(&[(seq, 3, LAST)]).unwrap();
    let good = tokens(&step);
    let wrong = [
        ("q", vec![3, 4, 8], vec![vec![2, 4, 8], vec![3, 2, 8], vec![3, 4, 9], vec![3, 32], vec![1, 3, 4, 8]]),
        ("k", vec![3, 2, 8], vec![vec![4, 2, 8], vec![3, 4, 8], vec![3, 2, 16], vec![48]]),
        ("v", vec![3, 2, 8], vec![vec![4, 2, 8], vec![3, 4, 8], vec![3, 2, 4], vec![]]),
        ("evict_logits", vec![3, 2], vec![vec![3], vec![2, 3], vec![3, 2, 1], vec![3, 4]]),
    ];
    for (name, want, shapes) in wrong {
        for shape in shapes {
            let mut new = good.clone();
            match name {
                "q" => new.q = zeros(&shape),
                "k" => new.k = zeros(&shape),
                "v" => new.v = zeros(&shape),
                _ => new.evict_logits = Some(zeros(&shape)),
            }
            match cache.attend(0, &step, &new) {
                Err(Error::Shape { what, expected, got }) => {
                    assert_eq!((what, &expected, got), (name, &want, shape));
                }
                other => panic!("{name} {shape:?} gave {other:?}"),
            }
        }
    }
    assert_eq!(cache.usage().written, 0);
    cache.attend(0, &step, &good).unwrap();
}

#[test]
fn positions_that_do_not_fit_the_step_are_refused() {
    for text in ["random:budget=4", "random-gate:rate=0.5", "full"] {
        let mut cache = cache(text);
        let seq = cache.open();
        let step = cache.begin(&[(seq, 3, LAST)]).unwrap();
        let mut new = tokens(&step);
        new.positions = Tensor::new(&[0u32, 1], &Device::Cpu).unwrap();
        let got = cache.attend(0, &step, &new);
        assert!(matches!(got, Err(Error::Shape { what: "positions", .. })), "{text} gave {got:?}");
    }
}

#[test]
fn a_policy_whose_answers_have_wrong_shapes_is_told_so() {
    let good = Misshapen { heads: vec![2, 2], ..Misshapen::default() };
    let wrong = [
        Misshapen { bits: Some(vec![3]), ..good.clone() },
        Misshapen { bits: Some(vec![1, 2]), ..good.clone() },
        Misshapen { first_score: Some(vec![3, 1]), ..good.clone() },
        Misshapen { first_score: Some(vec![6]), ..good.clone() },
        Misshapen { score: Some(vec![1, 3]), ..good.clone() },
        Misshapen { score: Some(vec![2, 2]), ..good.clone() },
        Misshapen { score: Some(vec![6]), ..good.clone() },
        Misshapen { heads: vec![2], ..good.clone() },
    ];
    let attend = |policy: Misshapen| {
        let store = cpu(&spec(), &CpuConfig::default()).unwrap();
        let mut cache = KvCache::new(spec(), Arc::new(policy), store).unwrap();
        let seq = cache.open();
        let step = cache.begin(&[(seq, 3, LAST)]).unwrap();
        cache.attend(0, &step, &tokens(&step))
    };
    attend(good).unwrap();
    for policy in wrong {
        assert!(attend(policy.clone()).is_err(), "{policy:?}");
    }
}

#[test]
fn a_layer_that_does_not_exist_is_refused() {
    let mut cache = cache("full");
    let seq = cache.open();
    let step = cache.begin(&[(seq, 3, LAST)]).unwrap();
    for layer in [2, 3, usize::MAX] {
        let error = cache.attend(layer, &step, &tokens(&step)).unwrap_err();
        assert!(matches!(error, Error::Config(_)) && error.to_string().contains("2 layers"), "{error}");
    }
    assert!(cache.held_positions(2, seq, 0).is_empty() && cache.held_positions(0, seq, 2).is_empty());
}

#[test]
fn dms_without_logits_is_refused() {
    let mut cache = cache("dms");
    let seq = cache.open();
    let step = cache.begin(&[(seq, 3, LAST)]).unwrap();
    let new = NewTokens { evict_logits: None, ..tokens(&step) };
    let error = cache.attend(0, &step, &new).unwrap_err();
    assert!(matches!(error, Error::Config(_)) && error.to_string().contains("decision logits"), "{error}");
}

#[test]
fn a_sequence_of_another_cache_is_unknown() {
    let (mut one, mut other) = (cache("full"), cache("full"));
    let foreign = (0..5).map(|_| other.open()).last().unwrap();
    assert!(refused(&mut one, &[(foreign, 1, LAST)]).contains("unknown"));
    one.release(foreign);
    assert!(one.held_positions(0, foreign, 0).is_empty());
}

#[test]
fn a_sequence_released_amid_its_step_leaves_nothing_behind() {
    let mut cache = cache("full");
    let (gone, stays) = (cache.open(), cache.open());
    let step = cache.begin(&[(gone, 3, LAST), (stays, 2, LAST)]).unwrap();
    cache.attend(0, &step, &tokens(&step)).unwrap();
    cache.release(gone);
    let attended = cache.attend(1, &step, &tokens(&step));
    assert!(attended.is_ok() || matches!(attended, Err(Error::Sequence { seq, .. }) if seq == gone));
    cache.end(step);
    cache.release(stays);
    assert_eq!((cache.usage().live_entries, cache.usage().pages_in_use), (0, 0));
}

#[test]
fn a_step_that_ended_is_over() {
    let mut cache = cache("full");
    let seq = cache.open();
    let step = cache.begin(&[(seq, 3, LAST)]).unwrap();
    let (old, new) = (step.clone(), tokens(&step));
    (0..2).for_each(|layer| _ = cache.attend(layer, &step, &new).unwrap());
    cache.end(step);
    let again = cache.attend(0, &old, &new);
    assert!(matches!(again, Err(Error::Sequence { .. })), "{again:?}");
    cache.end(old);
    assert_eq!(cache.seen(seq).unwrap(), 3);
    assert_eq!(cache.held_positions(0, seq, 0), [0, 1, 2]);
}

#[test]
fn a_layer_has_one_turn_in_a_step() {
    let mut cache = cache("full");
    let seq = cache.open();
    let step = cache.begin(&[(seq, 3, LAST)]).unwrap();
    let new = tokens(&step);
    (0..2).for_each(|layer| _ = cache.attend(layer, &step, &new).unwrap());
    for layer in 0..2 {
        assert!(matches!(cache.attend(layer, &step, &new), Err(Error::Sequence { .. })), "layer {layer}");
    }
    assert!(cache.end(step).is_empty());
    assert_eq!(cache.held_positions(0, seq, 0), [0, 1, 2]);
}

#[test]
fn a_step_that_was_given_up_takes_its_sequences_and_no_others() {
    let mut cache = cache("full");
    let (lost, stays) = (cache.open(), cache.open());
    let step = cache.begin(&[(stays, 2, LAST)]).unwrap();
    (0..2).for_each(|layer| _ = cache.attend(layer, &step, &tokens(&step)).unwrap());
    cache.end(step);
    let step = cache.begin(&[(lost, 3, LAST)]).unwrap();
    cache.attend(0, &step, &tokens(&step)).unwrap();
    cache.abort(step);
    assert!(refused(&mut cache, &[(lost, 1, DECODE)]).contains("dropped"));
    assert_eq!(cache.usage().live_entries, 2 * 2 * 2);
    cache.release(lost);
    let step = cache.begin(&[(stays, 1, DECODE)]).unwrap();
    (0..2).for_each(|layer| _ = cache.attend(layer, &step, &tokens(&step)).unwrap());
    assert!(cache.end(step).is_empty());
    assert_eq!(cache.held_positions(1, stays, 1), [0, 1, 2]);
}

#[test]
fn a_store_made_for_another_model_is_refused() {
    for other in [complete(3, 4, 2, 8), complete(2, 2, 2, 8), complete(2, 4, 4, 8), complete(2, 4, 2, 16)] {
        let store = cpu(&other, &CpuConfig::default()).unwrap();
        assert!(matches!(KvCache::new(spec(), policy("full"), store), Err(Error::Refused { .. })), "{other:?}");
    }
}

#[test]
fn a_step_of_nobody_is_a_step() {
    for text in EVERY_POLICY {
        let mut cache = cache(text);
        let seq = cache.open();
        let step = cache.begin(&[]).unwrap();
        assert!(step.is_empty() && step.last_tokens().is_empty());
        assert_eq!(cache.attend(0, &step, &tokens(&step)).unwrap().dims(), [0, 4, 8], "{text}");
        assert!(cache.end(step).is_empty());
        assert_eq!(cache.seen(seq).unwrap(), 0);
    }
}

#[test]
fn release_may_come_twice_or_for_nobody() {
    let mut cache = cache("full");
    let seq = cache.open();
    cache.release(seq);
    cache.release(seq);
    let next = cache.open();
    assert_ne!(next, seq);
    assert_eq!(cache.seen(next).unwrap(), 0);
}

#[test]
fn a_refused_call_amid_a_run_leaves_the_run_as_it_was() {
    let mut play = Play::new(&spec(), policy("full"), 3).with(&[Stream::random(&spec(), 20, 6)]);
    let seq = play.actors[0].seq;
    for (len, phase) in [(7, MORE), (5, LAST), (1, DECODE), (7, LAST)] {
        for bad in [(seq, 0, phase), (seq, 2, DECODE)] {
            assert!(play.cache.begin(&[bad]).is_err());
        }
        play.run(&[vec![(0, len, phase)]]);
    }
    let want = dense::attention(&spec(), &play.actors[0].stream.layers[1], 0..20, |_, _, _| true);
    assert_close(&play.actors[0].y[1], &want, 2e-5, "layer 1");
}

#[test]
fn stores_and_models_that_make_no_sense_are_refused() {
    let store = |page_size, limit_bytes, dtype| cpu(&spec(), &CpuConfig { page_size, limit_bytes, dtype }).unwrap_err();
    for (error, reason) in [
        (store(0, None, DType::F32), "page_size=0"),
        (store(16, None, DType::U32), "U32"),
        (store(16, None, DType::F64), "F64"),
        (store(16, Some(16 * 73 - 1), DType::F32), "holds no page of 1168 bytes"),
        (store(16, Some(0), DType::F32), "holds no page"),
    ] {
        assert!(matches!(error, Error::Config(_)) && error.to_string().contains(reason), "{error}");
    }
    let spec = ModelSpec { layers: 0, q_heads: 3, ..spec() };
    let error =
        KvCache::new(spec.clone(), policy("full"), cpu(&self::spec(), &CpuConfig::default()).unwrap()).unwrap_err();
    let Error::Refused { reasons, .. } = &error else { panic!("{error}") };
    assert_eq!(reasons.len(), 3, "{error}");
    assert!(reasons[0].contains("layers=0") && reasons[1].contains("q_heads=3 is no multiple of kv_heads=2"));
    assert!(reasons[2].contains("key_range has 32 exponents for 0 components"));
}

/// A call picked at random, right or wrong.
fn any_call(cache: &mut KvCache, known: &mut Vec<SeqId>, steps: &mut Vec<Step>, rng: &mut Rng) {
    let seq = known[rng.below(known.len())];
    match rng.below(8) {
        0 => known.push(cache.open()),
        1 => cache.release(seq),
        2..=4 => {
            let phases = [DECODE, LAST, MORE];
            let n = rng.below(4);
            let work: Vec<_> = (0..n).map(|_| (rng.pick(known), rng.below(4), rng.pick(&phases))).collect();
            match cache.begin(&work) {
                Ok(step) => steps.push(step),
                Err(error) => assert!(matches!(error, Error::Sequence { .. }), "{error}"),
            }
        }
        5 | 6 if !steps.is_empty() => {
            let step = &steps[rng.below(steps.len())];
            let _ = cache.attend(rng.below(3), step, &tokens(step));
        }
        _ if !steps.is_empty() => {
            let step = steps.swap_remove(rng.below(steps.len()));
            cache.end(step);
        }
        _ => assert!(cache.held_positions(rng.below(3), seq, rng.below(3)).len() <= 1_000),
    }
}

proptest! {
    #![proptest_config(cases(120))]

    #[test]
    fn no_order_of_calls_panics(text in select(EVERY_POLICY), seed: u64) {
        let mut rng = Rng(seed);
        let mut cache = cache(text);
        let (mut known, mut steps) = (vec![cache.open()], vec![]);
        for _ in 0..60 {
            any_call(&mut cache, &mut known, &mut steps, &mut rng);
        }
        known.into_iter().for_each(|seq| cache.release(seq));
        prop_assert_eq!(cache.usage().pages_in_use, 0);
    }
}
