//! Running moments of the queries before RoPE.

use crate::{policy::QueryMoments, spec::ModelSpec};

/// Sums over the queries of one layer of one sequence, f64 so that the covariance survives the subtraction.
#[derive(Debug, Clone)]
pub(super) struct Accumulator {
    asked: QueryMoments,
    count: u64,
    sum: Vec<f64>,   // [q_heads, head_dim]
    outer: Vec<f64>, // [q_heads, head_dim, head_dim]; empty without covariance
}

impl Accumulator {
    pub(super) fn new(spec: &ModelSpec, asked: QueryMoments) -> Self {
        let width = spec.q_heads * spec.head_dim;
        let outer = if asked.covariance { width * spec.head_dim } else { 0 };
        Self { asked, count: 0, sum: vec![0.0; width], outer: vec![0.0; outer] }
    }

    /// Adds rotated queries `[tokens, q_heads, head_dim]` of positions `start..`.
    pub(super) fn add(&mut self, spec: &ModelSpec, start: u32, queries: &[f32]) {
        let d = spec.head_dim;
        for (i, token) in queries.chunks(spec.q_heads * d).enumerate() {
            let pos = start + i as u32;
            if pos < self.asked.skip {
                continue;
            }
            self.count += 1;
            for (head, q) in token.chunks(d).enumerate() {
                let q = unrotate(spec, pos, q);
                self.sum[head * d..][..d].iter_mut().zip(&q).for_each(|(s, x)| *s += x);
                if self.asked.covariance {
                    let outer = &mut self.outer[head * d * d..][..d * d];
                    for (row, x) in outer.chunks_mut(d).zip(&q) {
                        row.iter_mut().zip(&q).for_each(|(s, y)| *s += x * y);
                    }
                }
            }
        }
    }

    /// Mean `[group, head_dim]` and covariance `[group, head_dim, head_dim]` of one KV head's queries.
    pub(super) fn of_head(&self, spec: &ModelSpec, head: usize) -> (Vec<f32>, Option<Vec<f32>>) {
        let (d, group, n) = (spec.head_dim, spec.group(), self.count.max(1) as f64);
        let mean: Vec<f64> = self.sum[head * group * d..][..group * d].iter().map(|s| s / n).collect();
        let covariance = self.asked.covariance.then(|| {
            let outer = &self.outer[head * group * d * d..][..group * d * d];
            let at = |i: usize| (i / (d * d), i / d % d, i % d);
            let centred = outer.iter().enumerate().map(|(i, s)| {
                let (g, r, c) = at(i);
                (s / n - mean[g * d + r] * mean[g * d + c]) as f32
            });
            centred.collect()
        });
        (mean.into_iter().map(|m| m as f32).collect(), covariance)
    }
}

/// The query as it was before RoPE.
fn unrotate(spec: &ModelSpec, pos: u32, q: &[f32]) -> Vec<f64> {
    let mut out: Vec<f64> = q.iter().map(|&x| x as f64).collect();
    let Some(rope) = &spec.rope else { return out };
    for (i, &freq) in rope.inv_freq.iter().enumerate() {
        // The model took the angle in f32.
        let (sin, cos) = ((pos as f32 * freq) as f64).sin_cos();
        let (a, b) = rope.pair(i, q.len());
        (out[a], out[b]) = (cos * out[a] + sin * out[b], cos * out[b] - sin * out[a]);
    }
    out
}
