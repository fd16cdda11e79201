//! Runtimes that generate text under a policy, whoever wrote them.
//!
//! A runtime need not let anyone at its logits, or read on after it has generated. What can be compared without that,
//! [`compare`](crate::compare) compares over any [`Runtime`]: see [`Generating`](crate::compare::Generating).

use crate::{policy::Policy, spec::ModelSpec, stats::Stats};
use async_trait::async_trait;
use futures_core::Stream;
use std::{pin::Pin, sync::Arc};

/// What a host's own errors become.
pub type HostError = Box<dyn std::error::Error + Send + Sync>;

/// A language model as seen by who writes its prompts and reads its answers.
pub trait TextModel {
    /// Shape of its attention.
    fn spec(&self) -> ModelSpec;
    /// The longest context it was made for, in tokens.
    fn max_context(&self) -> usize;
    /// Text to tokens, as at the start of a prompt.
    fn encode(&self, text: &str) -> Result<Vec<u32>, HostError>;
    /// Tokens to text, special tokens left out.
    fn decode(&self, tokens: &[u32]) -> Result<String, HostError>;
    /// Whether a token ends an answer.
    fn is_end(&self, token: u32) -> bool;
    /// A user's message in the model's chat template, the answer about to begin.
    fn chat(&self, user: &str) -> Result<String, HostError>;
}

/// A model in a runtime that keeps its cache under a policy.
#[async_trait]
pub trait Runtime: TextModel + Send + Sync {
    /// Gets the model ready to run under a policy.
    ///
    /// # Errors
    /// Every reason why the policy cannot run on this model.
    async fn load(&self, policy: &Arc<dyn Policy>) -> Result<(), HostError>;

    /// Reads a prompt under the policy loaded last, with an empty cache, and goes on with the most likely tokens: `most` of
    /// them, or up to one that ends a text, which is the last then. One generation at a time: those before are dropped. The
    /// model reads no token before the next one is asked for, so a generation that is dropped has done no more than it has
    /// told.
    ///
    /// # Errors
    /// If no policy was loaded. What keeps the prompt from being read may come here or as the first token.
    async fn generate<'a>(&'a self, prompt: &[u32], most: usize) -> Result<Tokens<'a>, HostError>;

    /// What the cache has held over the generation begun last.
    async fn stats(&self) -> Stats;
}

/// Tokens as they are generated. An error is the last.
pub type Tokens<'a> = Pin<Box<dyn Stream<Item = Result<u32, HostError>> + Send + 'a>>;
