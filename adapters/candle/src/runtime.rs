//! A model as a [`kvpolicy::runtime::Runtime`]: a session at a time.

use crate::{gates::Gates, session::Session, subject::Hosted};
use async_trait::async_trait;
use futures_util::stream;
use kvpolicy::{
    ModelSpec, Policy, Stats,
    runtime::{HostError, Runtime, TextModel, Tokens},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Result<T> = std::result::Result<T, HostError>;

/// A model that generates where it is asked for a token: nothing runs beside.
#[derive(Debug)]
pub struct CandleRuntime {
    hosted: Hosted,
    loaded: Mutex<Option<Loaded>>,
}

/// The policy loaded last.
#[derive(Debug, Clone)]
struct Loaded {
    policy: Arc<dyn Policy>,
    gates: Option<Arc<Gates>>,
    /// What the cache has held over the last generation.
    stats: Stats,
}

impl CandleRuntime {
    /// A model that is loaded under no policy yet.
    pub fn new(hosted: Hosted) -> Self {
        Self { hosted, loaded: Mutex::default() }
    }

    fn loaded(&self) -> MutexGuard<'_, Option<Loaded>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self, loaded: &Loaded) -> Result<Session<'_>> {
        let (gates, policy) = (loaded.gates.clone(), loaded.policy.clone());
        Ok(Session::new(self.hosted.lm.model(), gates, policy, &self.hosted.options)?)
    }
}

impl TextModel for CandleRuntime {
    fn spec(&self) -> ModelSpec {
        self.hosted.spec()
    }

    fn max_context(&self) -> usize {
        self.hosted.max_context()
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.hosted.encode(text)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.hosted.decode(tokens)
    }

    fn is_end(&self, token: u32) -> bool {
        self.hosted.is_end(token)
    }

    fn chat(&self, user: &str) -> Result<String> {
        self.hosted.chat(user)
    }
}

#[async_trait]
impl Runtime for CandleRuntime {
    async fn load(&self, policy: &Arc<dyn Policy>) -> Result<()> {
        let (policy, gates) = (policy.clone(), self.hosted.lm.gates_for(&**policy)?);
        let loaded = Loaded { policy, gates, stats: Stats::default() };
        self.session(&loaded)?; // what cannot run is told now
        *self.loaded() = Some(loaded);
        Ok(())
    }

    async fn generate<'a>(&'a self, prompt: &[u32], most: usize) -> Result<Tokens<'a>> {
        let session = self.session(&self.loaded().clone().ok_or("no policy is loaded")?)?;
        let generation = Generation { runtime: self, session, new: prompt.to_vec(), read: 0, left: most };
        Ok(Box::pin(stream::iter(generation)))
    }

    async fn stats(&self) -> Stats {
        self.loaded().as_ref().map_or_else(Stats::default, |loaded| loaded.stats)
    }
}

struct Generation<'a> {
    runtime: &'a CandleRuntime,
    session: Session<'a>,
    /// What the model has not read: the prompt, or the token before.
    new: Vec<u32>,
    read: usize,
    left: usize,
}

impl Generation<'_> {
    fn token(&mut self) -> Result<u32> {
        let logits = match (self.read, &self.new[..]) {
            (1.., &[token]) => self.session.decode(token),
            (_, prompt) => self.session.prefill(prompt, true),
        };
        let logits: Vec<f32> = logits?.to_vec1()?;
        self.read += self.new.len();
        if let Some(loaded) = self.runtime.loaded().as_mut() {
            loaded.stats = self.session.stats();
        }
        Ok(kvpolicy::compare::Next::Logits(logits).most_likely()?)
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let token = self.token();
        match &token {
            Ok(token) if !self.runtime.is_end(*token) => self.new = vec![*token],
            _ => self.left = 0,
        }
        Some(token)
    }
}
