//! Sliding windows that belong to a model, and the policies that can run beside them.

use super::Config;
use crate::error::{Error, Result};
use kvpolicy::{KvCache, LayerCx, Policy, Protect, Step, compose::PerLayer, policies::Window};
use std::{ops::RangeInclusive, sync::Arc};

impl Config {
    /// The sliding window of a layer: newest tokens that a query sees, its own included.
    pub fn window(&self, layer: usize) -> Option<u32> {
        if self.is_other(layer) { self.others.as_ref()?.window } else { None }
    }

    /// How many layers have a sliding window, and its size.
    pub fn windows(&self) -> Option<(usize, u32)> {
        let others = self.others.as_ref()?;
        Some((others.which.iter().filter(|&&other| other).count(), others.window?))
    }

    /// A policy as a cache for sequences of up to `max_tokens` takes it: a layer with a sliding window holds exactly that,
    /// whatever the policy is, and the policy rules the others. Where each layer has a window, it rules all of them as
    /// long as no window ends within `max_tokens`.
    ///
    /// # Errors
    /// [`Error::Model`] for a policy other than `full` where each layer has a window that ends within `max_tokens`: what
    /// it evicts inside the window cannot be told apart from what the window evicts.
    pub fn policy(&self, asked: Arc<dyn Policy>, max_tokens: usize) -> Result<Arc<dyn Policy>> {
        let Some((ranges, size)) = self.window_ranges() else { return Ok(asked) };
        let window: Arc<dyn Policy> = Arc::new(Window { size, sinks: 0 });
        if ranges == [0..=self.layers - 1] {
            return match asked.to_string().as_str() {
                _ if max_tokens <= size as usize => Ok(asked),
                "full" => Ok(window),
                other => Err(Error::Model(format!(
                    "{other}: every layer of the model has a sliding window of {size} tokens, beside which only `full` runs \
                     in a context of {max_tokens}: ask for {size} tokens or fewer"
                ))),
            };
        }
        let ranges = ranges.into_iter().map(|range| (range, window.clone())).collect();
        Ok(Arc::new(PerLayer { ranges, rest: asked }))
    }

    /// The layers with a window, and its size.
    fn window_ranges(&self) -> Option<(Vec<RangeInclusive<usize>>, u32)> {
        let others = self.others.as_ref()?;
        let (mut ranges, mut next) = (vec![], 0);
        for run in others.which.chunk_by(|a, b| a == b) {
            let first = next;
            next += run.len();
            if run[0] {
                ranges.push(first..=next - 1);
            }
        }
        Some((ranges, others.window?))
    }

    /// Whether a cache knows of the windows that a step reaches beyond: without, a layer would see too much and nobody
    /// would notice.
    ///
    /// # Errors
    /// [`Error::Model`] naming the first layer of which it does not.
    pub(crate) fn check_windows(&self, step: &Step, cache: &KvCache) -> Result<()> {
        let seen = step.spans().iter().map(|span| span.start as usize + span.len).max().unwrap_or(0);
        let shows_more = |&layer: &usize| {
            self.window(layer).is_some_and(|window| {
                let cx = LayerCx { layer, spec: cache.spec() };
                seen > window as usize && cache.policy().protect(&cx) != Protect { sinks: 0, recent: window }
            })
        };
        match (0..self.layers).find(shows_more) {
            None => Ok(()),
            Some(layer) => Err(Error::Model(format!(
                "layer {layer} has a sliding window that the cache does not know of: make its policy with Config::policy"
            ))),
        }
    }
}
