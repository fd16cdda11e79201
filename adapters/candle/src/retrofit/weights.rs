//! A model's weights by name, to be trained: out of it in f32, and into it in its own type.

use super::dense;
use crate::{
    config::Config,
    error::{Error, Result},
    model::Model,
    ops::Heads,
    weights::Matrix,
};
use candle_core::{DType, Tensor};
use kvpolicy::{RopeLayout, retrofit::Named};

impl Config {
    /// Rows of q, k and v, `[(q_heads + 2 kv_heads) * head_dim, ..]`, in the order of Hugging Face.
    pub(super) fn half_split(&self, qkv: &Tensor) -> Result<Tensor> {
        let Config { q_heads, kv_heads, head_dim, .. } = *self;
        if self.rope.layout == RopeLayout::HalfSplit {
            return Ok(qkv.clone());
        }
        let rotated = (q_heads + kv_heads) * head_dim;
        let (rows, others) = (qkv.narrow(0, 0, rotated)?, qkv.narrow(0, rotated, kv_heads * head_dim)?);
        // [heads, pair, which of the two, ..] to [heads, which of the two, pair, ..]
        let pairs = rows.reshape((q_heads + kv_heads, head_dim / 2, 2, ()))?.transpose(1, 2)?.contiguous()?;
        Ok(Tensor::cat(&[pairs.reshape(rows.shape())?, others], 0)?)
    }
}

impl Config {
    /// A norm's weight as safetensors have it.
    fn as_in_safetensors(&self, weight: &Tensor) -> Result<Tensor> {
        if self.norms_from_one() { Ok((weight - 1.0)?) } else { Ok(weight.clone()) }
    }
}

impl Model {
    /// Its weights, f32, by their place: `embedding`, `norm`, `output` (unless it is the embedding) and
    /// `layers.N.PART`, projections of the same input joined.
    ///
    /// # Errors
    /// [`Error::Model`] if they are quantized.
    pub fn parameters(&mut self) -> Result<Named> {
        self.parameters_of(|_| true)
    }

    /// Those whose names are wanted.
    pub(super) fn parameters_of(&mut self, is_wanted: impl Fn(&str) -> bool) -> Result<Named> {
        let wanted = self.slots()?.into_iter().filter(|(name, _)| is_wanted(name));
        wanted.map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?))).collect()
    }

    /// Takes weights over, those that are named.
    ///
    /// # Errors
    /// [`Error::Model`] if one is of another shape, or the model's are quantized.
    pub fn set_parameters(&mut self, named: &Named) -> Result<()> {
        for (name, slot) in self.slots()? {
            let Some(new) = named.get(&name) else { continue };
            if new.dims() != slot.dims() {
                return Err(Error::Model(format!("weights `{name}`: {:?} instead of {:?}", new.dims(), slot.dims())));
            }
            *slot = new.to_dtype(slot.dtype())?.to_device(slot.device())?;
        }
        if self.config().tied {
            self.output.matrix = Matrix::Dense(self.embedding.clone());
        }
        Ok(())
    }

    fn slots(&mut self) -> Result<Vec<(String, &mut Tensor)>> {
        let tied = self.config().tied;
        let mut all: Vec<(String, &mut Tensor)> = vec![];
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            let mut add = |part: &str, tensor| all.push((format!("layers.{layer}.{part}"), tensor));
            add("attention_norm", &mut block.attention_norm);
            add("mlp_norm", &mut block.mlp_norm);
            for (part, tensor) in [("after_attention", &mut block.after_attention), ("after_mlp", &mut block.after_mlp)]
            {
                tensor.iter_mut().for_each(|tensor| add(part, tensor));
            }
            add("qkv", dense_mut(&mut block.qkv)?);
            let Heads { bias, q_norm, k_norm, .. } = &mut block.heads;
            for (part, tensor) in [("qkv_bias", bias), ("q_norm", q_norm), ("k_norm", k_norm)] {
                tensor.iter_mut().for_each(|tensor| add(part, tensor));
            }
            for (part, bias_part, linear) in [
                ("o", "o_bias", &mut block.o),
                ("gate_up", "gate_up_bias", &mut block.gate_up),
                ("down", "down_bias", &mut block.down),
            ] {
                add(part, dense_mut(&mut linear.matrix)?);
                linear.bias.iter_mut().for_each(|bias| add(bias_part, bias));
            }
        }
        all.push(("embedding".into(), &mut self.embedding));
        all.push(("norm".into(), &mut self.norm));
        if !tied {
            all.push(("output".into(), dense_mut(&mut self.output.matrix)?));
        }
        Ok(all)
    }

    /// Its weights by the names of Hugging Face, and in its order: the rows of q and k that RoPE turns together, which llama
    /// files of GGUF have side by side, are half a head apart.
    ///
    /// # Errors
    /// [`Error::Model`] if they are quantized.
    pub fn hf_tensors(&self) -> Result<Named> {
        let [qkv, o, gate_up, down] = self.config().projections().map(|projection| projection.parts);
        let mut all = Named::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let mut split = |tensor: &Tensor, ending: &str, parts: &[(&str, usize)]| -> Result<()> {
                let mut from = 0;
                for (part, rows) in parts {
                    all.insert(name(&format!("{part}.{ending}")), tensor.narrow(0, from, *rows)?.contiguous()?);
                    from += rows;
                }
                Ok(())
            };
            split(&self.config().half_split(dense(&block.qkv)?)?, "weight", &qkv)?;
            for (linear, parts) in [(&block.gate_up, &gate_up), (&block.o, &o), (&block.down, &down)] {
                split(dense(&linear.matrix)?, "weight", parts)?;
                linear.bias.iter().try_for_each(|bias| split(bias, "bias", parts))?;
            }
            block.heads.bias.iter().try_for_each(|bias| split(&self.config().half_split(bias)?, "bias", &qkv))?;
            let (norms, own) = (self.config().norms(), |weight: &Tensor| self.config().as_in_safetensors(weight));
            let q_norm = block.heads.q_norm.as_ref().map(|weight| weight / self.config().query_scale).transpose()?;
            for (part, weight) in [
                (Some("self_attn.q_norm"), q_norm.as_ref()),
                (Some("self_attn.k_norm"), block.heads.k_norm.as_ref()),
                (Some(norms.attention), Some(&block.attention_norm)),
                (norms.after_attention, block.after_attention.as_ref()),
                (Some(norms.mlp), Some(&block.mlp_norm)),
                (norms.after_mlp, block.after_mlp.as_ref()),
            ] {
                let (Some(part), Some(weight)) = (part, weight) else { continue };
                split(&own(weight)?, "weight", &[(part, weight.dims()[0])])?;
            }
        }
        all.insert("model.embed_tokens.weight".into(), self.embedding.clone());
        all.insert("model.norm.weight".into(), self.config().as_in_safetensors(&self.norm)?);
        if !self.config().tied {
            all.insert("lm_head.weight".into(), dense(&self.output.matrix)?.clone());
        }
        Ok(all)
    }
}

fn dense_mut(matrix: &mut Matrix) -> Result<&mut Tensor> {
    match matrix {
        Matrix::Dense(weight) => Ok(weight),
        Matrix::Quantized(_) => Err(Error::Model("quantized weights cannot be trained: load them dequantized".into())),
    }
}
