//! The oracle of everything that ranks: one layer of one sequence as plain lists in f64, entries dropped one at a time.

use super::{LayerData, dense};
use kvpolicy::{ModelSpec, Phase};

/// A held entry.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) pos: usize,
    /// Attention it drew from every query since it was written, summed over the group.
    pub(crate) sum: f64,
    /// Attention it drew from the newest query, summed over the group.
    pub(crate) last: f64,
}

#[derive(Debug)]
pub(crate) struct Lists<'a> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) data: &'a LayerData,
    /// The entries of each KV head, oldest first.
    pub(crate) heads: Vec<Vec<Entry>>,
    /// Tokens so far.
    pub(crate) seen: usize,
    decoded: usize,
    /// False once two scores at the edge of a budget were too close for f32 to tell them apart.
    pub(crate) clear: bool,
}

/// The scores of one head's entries, oldest first; higher stays.
pub(crate) type Rank<'a> = Box<dyn Fn(&Lists, usize) -> Vec<f64> + 'a>;

/// A method: what it keeps, when, and how it ranks.
pub(crate) struct Method<'a> {
    pub(crate) keep: Box<dyn Fn(usize) -> usize + 'a>,
    pub(crate) sinks: usize,
    pub(crate) recent: usize,
    pub(crate) every: Option<usize>,
    /// Whether scores that are equal in f64 are also equal in f32, so that the older has to go.
    pub(crate) ties: bool,
    pub(crate) rank: Rank<'a>,
}

impl<'a> Lists<'a> {
    pub(crate) fn new(spec: &'a ModelSpec, data: &'a LayerData) -> Self {
        Self { spec, data, heads: vec![vec![]; spec.kv_heads], seen: 0, decoded: 0, clear: true }
    }

    pub(crate) fn group(&self) -> usize {
        self.spec.q_heads / self.spec.kv_heads
    }

    pub(crate) fn positions(&self, head: usize) -> Vec<usize> {
        self.heads[head].iter().map(|e| e.pos).collect()
    }

    /// What a query pays to each entry its head holds now; nothing to later ones.
    pub(crate) fn weights(&self, q_head: usize, query: usize) -> Vec<f64> {
        let held = &self.heads[q_head / self.group()];
        let logit = |e: &Entry| match e.pos <= query {
            true => dense::logit(self.spec, self.data, q_head, query, e.pos),
            false => f64::NEG_INFINITY,
        };
        dense::softmax(held.iter().map(logit).collect())
    }

    pub(crate) fn key(&self, head: usize, pos: usize) -> Vec<f64> {
        let d = self.spec.head_dim;
        self.data.k[(pos * self.spec.kv_heads + head) * d..][..d].iter().map(|&x| x as f64).collect()
    }

    /// Writes, attends, trims when due; returns the outputs `[len, q_heads, head_dim]`.
    pub(crate) fn step(&mut self, len: usize, phase: Phase, method: &Method) -> Vec<f64> {
        let new = self.seen..self.seen + len;
        for head in &mut self.heads {
            head.extend(new.clone().map(|pos| Entry { pos, sum: 0.0, last: 0.0 }));
        }
        self.seen = new.end;
        let y = new.flat_map(|query| self.attend(query)).collect();
        self.decoded = if phase == Phase::Decode { self.decoded + 1 } else { 0 };
        let due = match phase {
            Phase::Prefill { last } => last,
            Phase::Decode => method.every.is_some_and(|n| self.decoded.is_multiple_of(n)),
        };
        if due {
            let ranks: Vec<Vec<f64>> = (0..self.heads.len()).map(|head| (method.rank)(self, head)).collect();
            ranks.into_iter().enumerate().for_each(|(head, ranks)| self.trim(head, ranks, method));
        }
        y
    }

    fn attend(&mut self, query: usize) -> Vec<f64> {
        let (d, group, heads) = (self.spec.head_dim, self.group(), self.spec.kv_heads);
        self.heads.iter_mut().flatten().for_each(|e| e.last = 0.0);
        let mut y = vec![];
        for q_head in 0..self.spec.q_heads {
            let (weights, head) = (self.weights(q_head, query), q_head / group);
            let value = |pos: usize, i: usize| self.data.v[(pos * heads + head) * d + i] as f64;
            let held = &mut self.heads[head];
            y.extend((0..d).map(|i| held.iter().zip(&weights).map(|(e, w)| w * value(e.pos, i)).sum::<f64>()));
            for (e, w) in held.iter_mut().zip(weights) {
                e.sum += w;
                e.last += w;
            }
        }
        y
    }

    /// Drops the lowest, of equal ones the oldest, until the budget holds or everything left is protected.
    fn trim(&mut self, head: usize, ranks: Vec<f64>, method: &Method) {
        let (keep, newest) = ((method.keep)(self.seen), self.seen - 1);
        let free = |pos: usize| pos >= method.sinks && newest - pos >= method.recent;
        let mut rows: Vec<(f64, Entry)> = ranks.into_iter().zip(self.heads[head].drain(..)).collect();
        let mut dropped = f64::NEG_INFINITY;
        // `min_by` takes the first of equal ones, and rows are oldest first.
        let lowest = |rows: &[(f64, Entry)]| {
            let candidates = rows.iter().enumerate().filter(|(_, (_, e))| free(e.pos));
            candidates.min_by(|a, b| a.1.0.total_cmp(&b.1.0)).map(|(i, row)| (i, row.0))
        };
        while rows.len() > keep
            && let Some((i, score)) = lowest(&rows)
        {
            rows.remove(i);
            dropped = score;
        }
        let gap = lowest(&rows).map_or(f64::INFINITY, |(_, score)| score - dropped);
        let tied = gap == 0.0 && method.ties;
        if !tied && gap < 1e-5 * dropped.abs().max(1e-3) {
            self.clear = false;
        }
        self.heads[head] = rows.into_iter().map(|(_, e)| e).collect();
    }
}
