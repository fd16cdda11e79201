//! What a layer asks of its cache: to keep new keys and values and read all of them in one call, and before that to look
//! at what decides on them.

use candle_core::{Result, Tensor};

use super::KvCache;
use crate::{
    attention::SdpaParams, layers::Sdpa, pipeline::text_models_inputs_processor::FlashParams,
};

impl KvCache {
    /// `q`, `k`, `v`: `[batch, heads, tokens, head_dim]`, RoPE applied; returns the shape of `q`. `offsets`: the position
    /// of each sequence's first new token, which only a policy asks for; the mask is for everyone else.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attend(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: Option<&Tensor>,
        #[cfg_attr(not(feature = "kv-policy"), allow(unused_variables))] offsets: &[usize],
        flash_params: Option<&FlashParams>,
        sdpa_params: &SdpaParams,
    ) -> Result<Tensor> {
        #[cfg(feature = "kv-policy")]
        if let Self::Policy(layer) = self {
            return layer.attend(q, k, v, offsets, sdpa_params);
        }
        let (k, v) = self.append(k, v)?;
        Sdpa.run_attention(q, &k, &v, mask, flash_params, sdpa_params)
    }

    /// Shows a policy what enters the layer, before its norm: `[batch, tokens, hidden]`.
    #[cfg_attr(not(feature = "kv-policy"), allow(unused_variables))]
    pub(crate) fn observe_hidden(&mut self, hidden: &Tensor) -> Result<()> {
        #[cfg(feature = "kv-policy")]
        if let Self::Policy(layer) = self {
            return layer.observe_hidden(hidden);
        }
        Ok(())
    }

    /// The queries to go on with: `[batch, heads, tokens, head_dim]`, any norm of heads applied, RoPE not.
    pub(crate) fn prepare_queries(&mut self, q: Tensor) -> Result<Tensor> {
        #[cfg(feature = "kv-policy")]
        if let Self::Policy(layer) = self {
            return layer.prepare_queries(q);
        }
        Ok(q)
    }
}
