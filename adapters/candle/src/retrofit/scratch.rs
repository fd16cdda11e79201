//! Training every weight of a small model on next tokens: how the embedded model is made.

use super::{
    pass::{Pass, embedding_gradient},
    trainee::Batch,
};
use crate::{error::Result, model::Model, ops};
use candle_core::{DType, Tensor};
use kvpolicy::retrofit::{Named, losses};

/// Negative log-likelihood of each sequence's next tokens, an f32 scalar, and its gradients with respect to
/// [`Model::parameters`]. The weight of a position is that of predicting what follows it;
/// a sequence's last one should have none.
///
/// # Errors
/// Those of the tensor library; quantized weights.
pub fn next_token_gradients(model: &Model, batch: &Batch) -> Result<(Named, Tensor)> {
    let config = model.config();
    let pass = Pass::new(model, batch.sequences, batch.length, batch.length, None)?;
    let mut x = pass.embed(&batch.tokens)?;
    let mut inputs = vec![];
    for layer in 0..config.layers {
        let after = pass.forward(layer, &x, None)?.0;
        inputs.push(std::mem::replace(&mut x, after));
    }
    let normed = pass.finish(&x)?;
    let (nll, logits) = losses::cross_entropy(pass.logits(&normed)?, &batch.next_tokens()?, &batch.weights)?;
    let loss = (nll * &batch.weights)?.sum_all()?;

    let mut gradients = Named::new();
    let output = logits.t()?.matmul(&normed)?.to_dtype(DType::F32)?;
    let normed = pass.logits_backward(&logits)?;
    gradients.insert("norm".into(), ops::rms_norm_weight_gradient(&x, config.rms_eps, &normed)?);
    let mut x_grad = pass.finish_backward(&x, &normed)?;
    for (layer, x) in inputs.into_iter().enumerate().rev() {
        let (_, on_the_way) = pass.forward(layer, &x, None)?;
        let block = pass.backward(layer, &x, None, &on_the_way, &x_grad, true)?;
        gradients.extend(block.weights);
        x_grad = block.x;
    }
    let embedding = embedding_gradient(&batch.tokens, &x_grad, config.vocab)?;
    if config.tied {
        gradients.insert("embedding".into(), (embedding + output)?);
    } else {
        gradients.insert("embedding".into(), embedding);
        gradients.insert("output".into(), output);
    }
    Ok((gradients, loss))
}
