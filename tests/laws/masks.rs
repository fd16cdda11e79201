//! Policies that only mark are dense attention under a mask, and hold what the mask leaves alive.

use crate::common::{DECODE, LAST, Rng, Stream, assert_close, cases, complete, dense, life, play::Play, policy, weave};
use kvpolicy::{GateSpec, Lag, ModelSpec, PerGate};
use proptest::{prelude::*, sample::select};

/// A batch of random sequences and how they are passed.
#[derive(Debug, Clone)]
struct Batch {
    spec: ModelSpec,
    page_size: usize,
    lens: Vec<usize>,
    longest: usize,
    seed: u64,
}

fn batch() -> impl Strategy<Value = Batch> {
    let shape = (1..=2usize, 1..=3usize, 1..=2usize, select(vec![8, 16]));
    let page_size = select(vec![1, 3, 16, 64]);
    let lens = prop::collection::vec(1..=60usize, 1..=3);
    (shape, page_size, lens, select(vec![1, 5, 60]), any::<u64>()).prop_map(
        |((layers, kv_heads, group, head_dim), page_size, lens, longest, seed)| {
            let spec = complete(layers, kv_heads * group, kv_heads, head_dim);
            Batch { spec, page_size, lens, longest, seed }
        },
    )
}

/// `visible(stream, layer, kv_head, query, key)` for `key <= query` is the mask.
fn equals_mask(text: &str, batch: &Batch, visible: impl Fn(&Stream, usize, usize, usize, usize) -> bool) {
    let Batch { spec, page_size, lens, longest, seed } = batch;
    let mut rng = Rng(*seed);
    let streams: Vec<_> = lens.iter().map(|&len| Stream::random(spec, len, rng.draw())).collect();
    let lives = lens.iter().map(|&len| life(&mut rng, len, *longest)).collect();
    let mut play = Play::new(spec, policy(text), *page_size).with(&streams);
    for work in weave(&mut rng, lives) {
        play.run(std::slice::from_ref(&work));
        for (who, ..) in work {
            let newest = play.actors[who].at - 1;
            for (layer, head) in (0..spec.layers).flat_map(|l| (0..spec.kv_heads).map(move |h| (l, h))) {
                let live = (0..=newest).filter(|&key| visible(&streams[who], layer, head, newest, key));
                let held = play.held(who, layer, head);
                assert_eq!(held, Vec::from_iter(live), "sequence {who}, layer {layer}, head {head}, at {newest}");
            }
        }
    }
    for (who, actor) in play.actors.iter().enumerate() {
        for (layer, y) in actor.y.iter().enumerate() {
            let mask = |head, query, key| visible(&streams[who], layer, head, query, key);
            let want = dense::attention(spec, &streams[who].layers[layer], 0..lens[who], mask);
            assert_close(y, &want, 2e-5, &format!("sequence {who}, layer {layer}"));
        }
    }
}

proptest! {
    #![proptest_config(cases(80))]

    #[test]
    fn window_and_sinks_equal_their_mask(batch in batch(), size in 1..=20usize, sinks in 0..=6usize) {
        equals_mask(&format!("window:size={size},sinks={sinks}"), &batch, |_, _, _, query, key| {
            key < sinks || query - key < size
        });
    }

    /// In both dialects, with parameters given or taken from the checkpoint.
    #[test]
    fn dms_equals_its_mask(
        mut batch in batch(),
        window in 0..=12u32,
        lag in select(vec![Lag::Own, Lag::Previous]),
        per in select(vec![PerGate::Head, PerGate::Layer]),
        bias in select(vec![-1.5, -0.5, 0.0, 0.5, 1.0]),
        from_checkpoint: bool,
    ) {
        let text = if from_checkpoint {
            batch.spec.gates = Some(GateSpec { window, lag, per, disable: false });
            format!("dms:bias={bias}")
        } else {
            format!("dms:window={window},lag={lag},per={per},bias={bias}")
        };
        let heads = batch.spec.kv_heads;
        equals_mask(&text, &batch, |stream, layer, head, query, key| {
            let head = if per == PerGate::Layer { 0 } else { head };
            let judge = if lag == Lag::Own { key } else { key + 1 };
            // The verdict on a key is open until its judge has come.
            let marked = judge <= query && stream.layers[layer].logits[judge * heads + head] as f64 + bias > 0.0;
            !marked || query - key <= window as usize
        });
    }

    #[test]
    fn dms_that_is_disabled_keeps_everything(mut batch in batch(), by_checkpoint: bool) {
        if let Some(gates) = &mut batch.spec.gates {
            gates.disable = by_checkpoint;
        }
        let text = if by_checkpoint { "dms:window=1" } else { "dms:window=1,disable=true" };
        equals_mask(text, &batch, |_, _, _, _, _| true);
    }

    /// The gate's decisions are read off what it holds with a window of 0; they hang on the position alone.
    #[test]
    fn random_gate_equals_the_mask_of_its_decisions(batch in batch(), rate in 0.0..=1.0f64, window in 0..=9usize) {
        let spec = &batch.spec;
        let longest = batch.lens.iter().max().unwrap() + 1;
        let kept = decisions(spec, &format!("random-gate:rate={rate},seed=7,window=0"), longest);
        equals_mask(&format!("random-gate:rate={rate},seed=7,window={window}"), &batch, |_, layer, head, query, key| {
            kept[layer * spec.kv_heads + head].contains(&key) || query - key <= window
        });
    }
}

/// The positions each row holds after a prompt of `tokens`.
fn decisions(spec: &ModelSpec, text: &str, tokens: usize) -> Vec<Vec<usize>> {
    let mut play = Play::new(spec, policy(text), 16).with(&[Stream::random(spec, tokens, 0)]);
    play.run(&[vec![(0, tokens, LAST)]]);
    play.rows(0)
}

#[test]
fn random_gate_marks_its_share_and_differs_between_rows_and_seeds() {
    let spec = complete(2, 2, 2, 8);
    let kept = |rate: f64, seed: u64| decisions(&spec, &format!("random-gate:rate={rate},seed={seed},window=0"), 2_000);
    let rows = [0, 1, 2].map(|seed| kept(0.3, seed)).concat();
    for (i, row) in rows.iter().enumerate() {
        let share = 1.0 - row.len() as f64 / 2_000.0;
        assert!((share - 0.3).abs() < 0.05, "row {i} marks {share}");
        assert!(rows[..i].iter().all(|other| other != row), "row {i} repeats another");
    }
    assert_eq!(kept(0.3, 1), kept(0.3, 1));
    assert!(kept(0.0, 1).iter().all(|row| row.len() == 2_000));
    assert!(kept(1.0, 1).iter().all(|row| *row == [1_999]));
}

#[test]
fn a_long_prompt_in_one_piece_equals_its_mask() {
    // Long enough for whole tiles of keys that are older than every query of a tile.
    let batch = Batch { spec: complete(1, 4, 2, 16), page_size: 16, lens: vec![230], longest: 230, seed: 3 };
    equals_mask("window:size=20,sinks=3", &batch, |_, _, _, query, key| key < 3 || query - key < 20);
    equals_mask("dms:window=20,lag=own", &batch, |stream, layer, head, query, key| {
        stream.layers[layer].logits[key * 2 + head] <= 0.0 || query - key <= 20
    });
}

#[test]
fn a_marked_token_is_seen_for_the_last_time_at_the_end_of_its_window() {
    // One marked key among kept ones; both dialects, so that an off-by-one in either shows by itself.
    let mut spec = complete(1, 1, 1, 8);
    spec.gates = Some(GateSpec { window: 3, lag: Lag::Own, per: PerGate::Head, disable: false });
    for (lag, judge) in [("own", 4), ("previous", 5)] {
        let mut stream = Stream::random(&spec, 12, 8);
        stream.layers[0].logits = (0..12).map(|t| if t == judge { 0.5 } else { 0.0 }).collect(); // 0 keeps
        let mut play = Play::new(&spec, policy(&format!("dms:lag={lag}")), 4).with(&[stream]);
        play.run(&[vec![(0, 2, LAST)]]);
        for query in 2..12 {
            play.run(&[vec![(0, 1, DECODE)]]);
            assert_eq!(play.held(0, 0, 0).contains(&4), (4..=7).contains(&query), "lag {lag}, query {query}");
            assert_eq!(play.held(0, 0, 0).len(), query + 1 - (query > 7) as usize);
        }
    }
}
