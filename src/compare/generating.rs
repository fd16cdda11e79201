//! A [`Runtime`] as a subject of comparison: it gives tokens in place of logits, and reads each sequence's prompt once.

use super::{HostError, Next, Sequence, Subject};
use crate::{
    policy::Policy,
    runtime::{Runtime, TextModel, Tokens},
    spec::ModelSpec,
    stats::Stats,
};
use std::{future::poll_fn, sync::Arc};

type Result<T> = std::result::Result<T, HostError>;

/// A runtime under comparison.
#[derive(Debug)]
pub struct Generating<R>(pub R);

impl<R: Runtime> TextModel for Generating<R> {
    fn spec(&self) -> ModelSpec {
        self.0.spec()
    }

    fn max_context(&self) -> usize {
        self.0.max_context()
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.0.encode(text)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.0.decode(tokens)
    }

    fn is_end(&self, token: u32) -> bool {
        self.0.is_end(token)
    }

    fn chat(&self, user: &str) -> Result<String> {
        self.0.chat(user)
    }
}

impl<R: Runtime> Subject for Generating<R> {
    fn open(&self, policy: &Arc<dyn Policy>) -> Result<Box<dyn Sequence + '_>> {
        pollster::block_on(self.0.load(policy))?;
        Ok(Box::new(Generation { runtime: &self.0, prompt: vec![], tokens: None }))
    }

    fn only_generates(&self) -> bool {
        true
    }
}

struct Generation<'a> {
    runtime: &'a dyn Runtime,
    prompt: Vec<u32>,
    /// Once the prompt has ended.
    tokens: Option<Tokens<'a>>,
}

impl Generation<'_> {
    fn next(&mut self) -> Result<Next> {
        let tokens = self.tokens.as_mut().ok_or("the prompt has not ended")?;
        match pollster::block_on(poll_fn(|cx| tokens.as_mut().poll_next(cx))) {
            Some(token) => Ok(Next::Token(token?)),
            None => Err("the runtime ended before its time".into()),
        }
    }
}

impl Sequence for Generation<'_> {
    fn prefill(&mut self, tokens: &[u32], last: bool) -> Result<Next> {
        if self.tokens.is_some() {
            return Err("the runtime reads the prompt of a sequence once".into());
        }
        self.prompt.extend(tokens);
        if !last {
            return Ok(Next::Unknown);
        }
        let most = self.runtime.max_context().saturating_sub(self.prompt.len()).max(1);
        self.tokens = Some(pollster::block_on(self.runtime.generate(&self.prompt, most))?);
        self.next()
    }

    fn decode(&mut self, _: u32) -> Result<Next> {
        self.next()
    }

    fn stats(&self) -> Stats {
        pollster::block_on(self.runtime.stats())
    }

    fn held(&self, _: usize) -> Vec<Vec<u32>> {
        vec![]
    }
}
