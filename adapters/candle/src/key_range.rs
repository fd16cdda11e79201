//! How large the components of a model's keys become, as a store of 8 bits wants to know.

use crate::{
    config::Config,
    error::{Error, Result},
    model::Model,
    session::{Session, SessionOptions},
};
use kvpolicy::{Error as CacheError, KeyRange, LayerCx, NewTokens, Policy, Verdict};
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

/// Tokens read for it, spread over the vocabulary: ranges are the weights' matter, not the text's.
const TOKENS: usize = 128;

/// Keeps everything, and notes the largest absolute value of each component of a layer's keys.
#[derive(Debug)]
struct Watch {
    largest: Mutex<Vec<Vec<f32>>>, // [layers], then [kv_heads * head_dim]
}

impl fmt::Display for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("watch")
    }
}

impl Policy for Watch {
    fn on_write(&self, _: &LayerCx, new: &NewTokens) -> std::result::Result<Verdict, CacheError> {
        let largest = new.k.abs()?.max(0)?.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?;
        self.largest.lock().unwrap_or_else(PoisonError::into_inner).push(largest);
        Ok(Verdict::KEEP)
    }
}

/// The range of a model's keys over some tokens.
pub(crate) fn key_range(model: &Model) -> Result<KeyRange> {
    let (spec, vocab) = (model.config().spec(), model.config().vocab);
    let watch = Arc::new(Watch { largest: Mutex::default() });
    // No window ends: every layer is under the watch.
    let window = model.config().windows().map_or(TOKENS, |(_, window)| window as usize);
    let tokens = TOKENS.min(window).min(model.config().max_context);
    let options = SessionOptions { max_tokens: Some(tokens), ..SessionOptions::default() };
    let text: Vec<u32> = (0..tokens).map(|i| (i * 7919 % vocab) as u32).collect();
    Session::under(model, None, watch.clone(), &options)?.prefill(&text, true)?;
    let layers = watch.largest.lock().unwrap_or_else(PoisonError::into_inner);
    if layers.len() != spec.layers {
        return Err(Error::Model(format!("keys of {} layers were seen of {}", layers.len(), spec.layers)));
    }
    let largest: Vec<f32> = layers.iter().flat_map(|layer| over_pairs(model.config(), layer)).collect();
    Ok(KeyRange::of_largest(&largest))
}

/// Each component with the one that RoPE turns it into at other positions; layers differ in how far, not in the pairs.
fn over_pairs(config: &Config, largest: &[f32]) -> Vec<f32> {
    let (mut out, d) = (largest.to_vec(), config.head_dim);
    for head in out.chunks_mut(d) {
        for i in 0..d / 2 {
            let (a, b) = config.rope.pair(i, d);
            let both = head[a].max(head[b]);
            (head[a], head[b]) = (both, both);
        }
    }
    out
}
