//! A model as [`kvpolicy::compare`] sees it.

use crate::{
    loader::Lm,
    session::{Session, SessionOptions},
};
use candle_core::Tensor;
use kvpolicy::{
    ModelSpec, Policy, Stats,
    compare::{Next, Sequence, Subject},
    policies::Full,
    runtime::{HostError, TextModel},
};
use std::sync::Arc;

type Result<T> = std::result::Result<T, HostError>;

/// A model with what its sessions keep.
#[derive(Debug)]
pub struct Hosted {
    /// The model.
    pub lm: Lm,
    /// For every session.
    pub options: SessionOptions,
}

impl TextModel for Hosted {
    fn spec(&self) -> ModelSpec {
        let mut spec = self.lm.model().config().spec();
        spec.gates = self.lm.gates().map(|gates| gates.spec());
        spec
    }

    fn max_context(&self) -> usize {
        self.lm.model().config().max_context
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.lm.tokenizer().encode(text)?)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        Ok(self.lm.tokenizer().decode(tokens)?)
    }

    fn is_end(&self, token: u32) -> bool {
        self.lm.tokenizer().is_eos(token)
    }

    fn chat(&self, user: &str) -> Result<String> {
        Ok(self.lm.chat(user)?)
    }
}

impl Subject for Hosted {
    fn open(&self, policy: &Arc<dyn Policy>) -> Result<Box<dyn Sequence + '_>> {
        Ok(Box::new(self.lm.session(policy.clone(), &self.options)?))
    }

    fn reference(&self) -> Result<Box<dyn Sequence + '_>> {
        let eight_bits = self.options.kv_dtype.is_some_and(|dtype| dtype.size_in_bytes() == 1);
        let kv_dtype = if eight_bits { None } else { self.options.kv_dtype };
        Ok(Box::new(self.lm.session(Arc::new(Full {}), &SessionOptions { kv_dtype, ..self.options.clone() })?))
    }
}

fn numbers(logits: Tensor) -> Result<Next> {
    Ok(Next::Logits(logits.to_vec1()?))
}

impl Sequence for Session<'_> {
    fn prefill(&mut self, tokens: &[u32], last: bool) -> Result<Next> {
        numbers(Session::prefill(self, tokens, last)?)
    }

    fn decode(&mut self, token: u32) -> Result<Next> {
        numbers(Session::decode(self, token)?)
    }

    fn stats(&self) -> Stats {
        Session::stats(self)
    }

    fn held(&self, layer: usize) -> Vec<Vec<u32>> {
        let heads = 0..self.cache().spec().kv_heads;
        heads.map(|head| self.cache().held_positions(layer, self.seq(), head)).collect()
    }
}
