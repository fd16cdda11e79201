//! Keeping everything is dense attention.

use crate::common::{
    DECODE, LAST, Rng, Stream, assert_close, cases, dense, gather, life, play::Play, play::store, policy, uneven_keys,
    weave, worst,
};
use candle_core::{DType, Device, Tensor};
use kvpolicy::{CpuConfig, KeyRange, KvCache, ModelSpec, cpu};
use proptest::{prelude::*, sample::select};

fn shape() -> impl Strategy<Value = ModelSpec> {
    let head_dim = select(vec![8, 16, 64, 80, 96, 128, 256]);
    (1..=2usize, 1..=4usize, 1..=4usize, head_dim, any::<bool>()).prop_map(
        |(layers, kv_heads, group, head_dim, uneven)| ModelSpec {
            key_range: uneven.then(|| uneven_keys(layers, kv_heads, head_dim)),
            ..ModelSpec::new(layers, kv_heads * group, kv_heads, head_dim)
        },
    )
}

/// Every sequence of a random batch against the oracle, whose keys and values are rounded as the store rounds them.
fn equals_dense(spec: &ModelSpec, dtype: DType, page_size: usize, lens: &[usize], longest: usize, seed: u64) {
    let mut rng = Rng(seed);
    let streams: Vec<_> = lens.iter().map(|&len| Stream::random(spec, len, rng.draw())).collect();
    let lives = lens.iter().map(|&len| life(&mut rng, len, longest)).collect();
    let mut play = Play::on(store(spec, page_size, dtype), spec, policy("full")).with(&streams);
    play.run(&weave(&mut rng, lives));
    for (who, actor) in play.actors.iter().enumerate() {
        for (layer, y) in actor.y.iter().enumerate() {
            let data = actor.stream.layers[layer].stored_as(dtype, spec, layer);
            let want = dense::attention(spec, &data, 0..lens[who], |_, _, _| true);
            assert_close(y, &want, 2e-5, &format!("sequence {who}, layer {layer}"));
            for head in 0..spec.kv_heads {
                assert_eq!(play.held(who, layer, head), Vec::from_iter(0..lens[who]));
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(96))]

    /// Chunks, decode, turns and batch mates in mixed phases are all in the random lives.
    #[test]
    fn keeping_everything_is_dense_attention(
        spec in shape(),
        dtype in select(vec![DType::F32, DType::F32, DType::F16, DType::BF16, DType::F8E4M3, DType::U8]),
        page_size in select(vec![1, 3, 16, 64]),
        lens in prop::collection::vec(1..=70usize, 1..=3),
        longest in select(vec![1, 4, 30, 70]),
        seed: u64,
    ) {
        equals_dense(&spec, dtype, page_size, &lens, longest, seed);
    }
}

#[test]
fn a_long_prompt_in_one_piece_is_dense_attention() {
    // Several tiles of queries and keys, more pages than one allocation holds.
    for (page_size, group) in [(1, 1), (16, 3), (64, 8)] {
        let spec = ModelSpec::new(1, 2 * group, 2, 16);
        equals_dense(&spec, DType::F32, page_size, &[230], 230, 5);
    }
}

#[test]
fn decode_over_a_row_of_several_splits_is_dense_attention() {
    let spec = ModelSpec::new(1, 4, 2, 8);
    let (prompt, tokens) = (1_300, 1_304);
    for page_size in [1, 7, 16, 1_024] {
        let mut play = Play::new(&spec, policy("full"), page_size).with(&[Stream::random(&spec, tokens, 3)]);
        play.run(&[vec![(0, prompt, LAST)]]);
        (prompt..tokens).for_each(|_| play.run(&[vec![(0, 1, DECODE)]]));
        let actor = &play.actors[0];
        let want = dense::attention(&spec, &actor.stream.layers[0], prompt..tokens, |_, _, _| true);
        assert_close(&actor.y[0][prompt * 4 * 8..], &want, 2e-5, &format!("page size {page_size}"));
    }
}

#[test]
fn smaller_types_of_storage_cost_no_more_than_its_rounding() {
    let spec = ModelSpec::new(1, 4, 2, 64);
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2), (DType::F8E4M3, 0.1), (DType::U8, 3e-2)] {
        let mut play = Play::on(store(&spec, 16, dtype), &spec, policy("full")).with(&[Stream::random(&spec, 60, 9)]);
        play.run(&[vec![(0, 50, LAST)]]);
        (50..60).for_each(|_| play.run(&[vec![(0, 1, DECODE)]]));
        let want = dense::attention(&spec, &play.actors[0].stream.layers[0], 0..60, |_, _, _| true);
        assert_close(&play.actors[0].y[0], &want, tolerance, &format!("{dtype:?}"));
    }
}

#[test]
fn attention_survives_logits_far_beyond_the_range_of_exp() {
    let spec = ModelSpec::new(1, 2, 1, 8);
    let mut stream = Stream::random(&spec, 90, 21);
    stream.layers[0].q.iter_mut().for_each(|q| *q *= 300.0);
    let mut play = Play::new(&spec, policy("h2o:budget=90"), 16).with(&[stream]);
    play.run(&[vec![(0, 80, LAST)]]);
    (80..90).for_each(|_| play.run(&[vec![(0, 1, DECODE)]]));
    let want = dense::attention(&spec, &play.actors[0].stream.layers[0], 0..90, |_, _, _| true);
    // The logits reach some hundreds, so that their own rounding shows.
    assert_close(&play.actors[0].y[0], &want, 2e-3, "large logits");
}

#[test]
fn the_output_has_the_type_of_the_queries() {
    let spec = ModelSpec::new(1, 4, 2, 16);
    let stream = Stream::random(&spec, 12, 4);
    let data = &stream.layers[0];
    let want = dense::attention(&spec, &data.stored_as(DType::BF16, &spec, 0), 0..12, |_, _, _| true);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut cache = KvCache::new(spec.clone(), policy("full"), cpu(&spec, &CpuConfig::default()).unwrap()).unwrap();
        let seq = cache.open();
        let step = cache.begin(&[(seq, 12, LAST)]).unwrap();
        let tensor = |x: &[f32], heads| gather(&[(x, 0..12)], heads, 16).to_dtype(dtype).unwrap();
        let new = step.tokens(tensor(&data.q, 4), tensor(&data.k, 2), tensor(&data.v, 2), None);
        let y = cache.attend(0, &step, &new).unwrap();
        assert_eq!((y.dtype(), y.dims()), (dtype, [12, 4, 16].as_slice()));
        let y: Vec<f32> = y.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_close(&y, &want, 5e-2, &format!("{dtype:?}"));
    }
}

#[test]
fn tensors_need_not_be_contiguous() {
    let spec = ModelSpec::new(1, 4, 2, 16);
    let stream = Stream::random(&spec, 12, 4);
    let data = &stream.layers[0];
    let mut cache = KvCache::new(spec.clone(), policy("full"), cpu(&spec, &CpuConfig::default()).unwrap()).unwrap();
    let seq = cache.open();
    let step = cache.begin(&[(seq, 12, LAST)]).unwrap();
    // Laid out [heads, tokens, head_dim], as attention layers have them at hand.
    let tensor = |x: &[f32], heads| -> Tensor {
        let by_head = gather(&[(x, 0..12)], heads, 16).transpose(0, 1).unwrap().contiguous().unwrap();
        by_head.to_device(&Device::Cpu).unwrap().transpose(0, 1).unwrap()
    };
    let new = step.tokens(tensor(&data.q, 4), tensor(&data.k, 2), tensor(&data.v, 2), None);
    assert!(!new.q.is_contiguous());
    let y: Vec<f32> = cache.attend(0, &step, &new).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    assert_close(&y, &dense::attention(&spec, data, 0..12, |_, _, _| true), 2e-5, "transposed");
}

/// Components a hundred times the others, the same in every key: a vector's one factor would leave the others no bits.
#[test]
fn large_components_cost_the_small_ones_no_bits_where_the_store_knows_of_them() {
    let error = |known: bool| {
        let mut spec = ModelSpec::new(1, 4, 2, 64);
        let mut stream = Stream::random(&spec, 80, 31);
        let large = |i: usize| if i % 64 % 9 == 4 { 100.0 } else { 1.0 };
        stream.layers[0].k.iter_mut().enumerate().for_each(|(i, k)| *k *= large(i));
        stream.layers[0].q.iter_mut().enumerate().for_each(|(i, q)| *q /= large(i));
        let largest: Vec<f32> = (0..2 * 64).map(|i| 2.0 * large(i)).collect();
        spec.key_range = known.then(|| KeyRange::of_largest(&largest));
        let mut play = Play::on(store(&spec, 16, DType::U8), &spec, policy("full")).with(&[stream]);
        play.run(&[vec![(0, 80, LAST)]]);
        let want = dense::attention(&spec, &play.actors[0].stream.layers[0], 0..80, |_, _, _| true);
        worst(&play.actors[0].y[0], &want)
    };
    let (known, unknown) = (error(true), error(false));
    assert!(known < 0.03 && unknown > 5.0 * known, "{known} and {unknown}");
}
