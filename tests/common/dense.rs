//! The oracle of everything that is visible or not: dense attention in f64 with the mask written out.

use super::LayerData;
use kvpolicy::ModelSpec;
use std::ops::Range;

/// Attention of some queries over every earlier key and their own that `visible(kv_head, query, key)` admits:
/// `[queries, q_heads, head_dim]`.
pub(crate) fn attention(
    spec: &ModelSpec,
    data: &LayerData,
    queries: Range<usize>,
    visible: impl Fn(usize, usize, usize) -> bool,
) -> Vec<f64> {
    let (d, group) = (spec.head_dim, spec.q_heads / spec.kv_heads);
    let mut out = vec![];
    for query in queries {
        for q_head in 0..spec.q_heads {
            let head = q_head / group;
            let keys: Vec<usize> = (0..=query).filter(|&key| visible(head, query, key)).collect();
            let weights = softmax(keys.iter().map(|&key| logit(spec, data, q_head, query, key)).collect());
            let value = |key: usize, i: usize| data.v[(key * spec.kv_heads + head) * d + i] as f64;
            out.extend((0..d).map(|i| keys.iter().zip(&weights).map(|(&key, w)| w * value(key, i)).sum::<f64>()));
        }
    }
    out
}

/// Scaled product of a query with a key of its group's KV head.
pub(crate) fn logit(spec: &ModelSpec, data: &LayerData, q_head: usize, query: usize, key: usize) -> f64 {
    let (d, head) = (spec.head_dim, q_head / (spec.q_heads / spec.kv_heads));
    let q = &data.q[(query * spec.q_heads + q_head) * d..][..d];
    let k = &data.k[(key * spec.kv_heads + head) * d..][..d];
    q.iter().zip(k).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>() / (d as f64).sqrt()
}

pub(crate) fn softmax(logits: Vec<f64>) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.into_iter().map(|x| (x - top).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}
