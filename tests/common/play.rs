//! Drives a cache as a model would, for several sequences whose tokens are known in advance.

use super::{Stream, Work, gather};
use candle_core::DType;
use kvpolicy::{CpuConfig, Error, KvCache, ModelSpec, NewTokens, Policy, SeqId, Step, backend::Backend, cpu};
use std::{ops::Range, sync::Arc};

#[derive(Debug)]
pub(crate) struct Actor {
    pub(crate) seq: SeqId,
    pub(crate) stream: Stream,
    /// Tokens passed so far.
    pub(crate) at: usize,
    /// Each layer's outputs so far: `[tokens, q_heads, head_dim]`.
    pub(crate) y: Vec<Vec<f32>>,
}

#[derive(Debug)]
pub(crate) struct Play {
    pub(crate) spec: ModelSpec,
    pub(crate) cache: KvCache,
    pub(crate) actors: Vec<Actor>,
}

pub(crate) fn store(spec: &ModelSpec, page_size: usize, dtype: DType) -> Box<dyn Backend> {
    cpu(spec, &CpuConfig { page_size, dtype, limit_bytes: None }).unwrap()
}

impl Play {
    /// On the CPU backend with f32 storage.
    pub(crate) fn new(spec: &ModelSpec, policy: Arc<dyn Policy>, page_size: usize) -> Self {
        Self::on(store(spec, page_size, DType::F32), spec, policy)
    }

    pub(crate) fn on(backend: Box<dyn Backend>, spec: &ModelSpec, policy: Arc<dyn Policy>) -> Self {
        let cache = KvCache::new(spec.clone(), policy, backend).unwrap();
        Self { spec: spec.clone(), cache, actors: vec![] }
    }

    pub(crate) fn with(mut self, streams: &[Stream]) -> Self {
        streams.iter().for_each(|stream| _ = self.add(stream.clone()));
        self
    }

    /// Opens a sequence; returns its index.
    pub(crate) fn add(&mut self, stream: Stream) -> usize {
        let actor = Actor { seq: self.cache.open(), stream, at: 0, y: vec![vec![]; self.spec.layers] };
        self.actors.push(actor);
        self.actors.len() - 1
    }

    /// Forks a sequence, which goes on as `stream` does; returns its index.
    pub(crate) fn fork(&mut self, who: usize, stream: Stream) -> Result<usize, Error> {
        let parent = &self.actors[who];
        let (seq, at, y) = (self.cache.fork(parent.seq)?, parent.at, parent.y.clone());
        self.actors.push(Actor { seq, stream, at, y });
        Ok(self.actors.len() - 1)
    }

    /// One step: (index, tokens, phase) of each sequence in it. Returns what `end` returns.
    pub(crate) fn step(&mut self, work: &[(usize, usize, kvpolicy::Phase)]) -> Vec<(SeqId, Error)> {
        let named: Vec<_> = work.iter().map(|&(who, len, phase)| (self.actors[who].seq, len, phase)).collect();
        let ranges: Vec<_> =
            work.iter().map(|&(who, len, _)| (who, self.actors[who].at..self.actors[who].at + len)).collect();
        let step = self.cache.begin(&named).unwrap();
        for layer in 0..self.spec.layers {
            let new = self.tokens(&step, layer, &ranges);
            let y = self.cache.attend(layer, &step, &new).unwrap();
            let y: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
            let mut rest = y.as_slice();
            for (who, range) in &ranges {
                let (own, others) = rest.split_at(range.len() * self.spec.q_heads * self.spec.head_dim);
                self.actors[*who].y[layer].extend(own);
                rest = others;
            }
            assert!(rest.is_empty());
        }
        ranges.into_iter().for_each(|(who, range)| self.actors[who].at = range.end);
        self.cache.end(step)
    }

    /// Every step of a script, none of which may fail.
    pub(crate) fn run(&mut self, script: &[Work]) {
        script.iter().for_each(|work| assert!(self.step(work).is_empty()));
    }

    /// The tensors of one layer of a step.
    pub(crate) fn tokens(&self, step: &Step, layer: usize, ranges: &[(usize, Range<usize>)]) -> NewTokens {
        let ModelSpec { q_heads, kv_heads, head_dim, .. } = self.spec;
        let cut = |field: fn(&super::LayerData) -> &[f32], heads, width| {
            let parts: Vec<_> = ranges
                .iter()
                .map(|(who, range)| (field(&self.actors[*who].stream.layers[layer]), range.clone()))
                .collect();
            gather(&parts, heads, width).to_device(step.positions().device()).unwrap()
        };
        let logits = cut(|data| &data.logits, kv_heads, 1).squeeze(2).unwrap();
        step.tokens(
            cut(|data| &data.q, q_heads, head_dim),
            cut(|data| &data.k, kv_heads, head_dim),
            cut(|data| &data.v, kv_heads, head_dim),
            Some(logits),
        )
    }

    /// Positions one row holds, sorted.
    pub(crate) fn held(&self, who: usize, layer: usize, head: usize) -> Vec<usize> {
        let held = self.cache.held_positions(layer, self.actors[who].seq, head);
        held.into_iter().map(|pos| pos as usize).collect()
    }

    /// Positions of every row of a sequence: `[layers * kv_heads]`.
    pub(crate) fn rows(&self, who: usize) -> Vec<Vec<usize>> {
        let rows = (0..self.spec.layers).flat_map(|layer| (0..self.spec.kv_heads).map(move |head| (layer, head)));
        rows.map(|(layer, head)| self.held(who, layer, head)).collect()
    }

    pub(crate) fn release(&mut self, who: usize) {
        self.cache.release(self.actors[who].seq);
    }
}
