//! Training DMS gates into a model (arXiv 2506.05345), its weights frozen or not ([`Trains`]).
//!
//! Each KV head of each layer gets an adapter: an RMS norm and a linear map of the residual stream that enters the layer to
//! one decision logit. They learn to evict as much as a schedule asks for while the model keeps to its own dense answers
//! (KL divergence); see [`kvpolicy::retrofit`] for the parts that depend on no model. [`run`] is the whole training,
//! [`Trainee`] one step of it.

mod demo;
mod donors;
mod evaluate;
mod heads;
mod pass;
mod run;
mod save;
mod scratch;
mod student;
mod text;
mod trainee;
mod weights;

pub use demo::{CONFIG as DEMO_CONFIG, DemoConfig, Problems, save_demo, train_demo};
pub use evaluate::{Evaluation, Judged};
pub use run::{Observer, RunConfig, StepRecord, finish, run};
pub(crate) use save::write_model;
pub use save::{Checkpoint, dms_fields, save_gates, save_weights};
pub use scratch::next_token_gradients;
pub use student::Trains;
pub use text::{Corpus, Mixture, Sequence, Source};
pub use trainee::{Batch, Divergence, Losses, Objective, Trainee};

use crate::{
    config::{Arch, Config},
    error::{Error, Result},
    weights::Matrix,
};
use candle_core::Tensor;

impl Config {
    /// Whether the decoder of a training is this model's, on sequences of `length` tokens.
    ///
    /// # Errors
    /// [`Error::Model`] naming the family and what of it the training does not have.
    fn check_trainable(&self, length: usize) -> Result<()> {
        if self.arch == Arch::Gemma3 {
            return Err(Error::Model(
                "Gemma3 cannot be trained yet: the training has neither its norms after attention and feed-forward layer \
                 nor its GELU"
                    .into(),
            ));
        }
        match self.windows() {
            None => Ok(()),
            Some((_, window)) if window as usize >= length => Ok(()),
            Some((_, window)) => Err(Error::Model(format!(
                "{:?} cannot be trained on sequences of {length} tokens: it has layers with a sliding window of {window}",
                self.arch
            ))),
        }
    }
}

fn dense(matrix: &Matrix) -> Result<&Tensor> {
    match matrix {
        Matrix::Dense(weight) => Ok(weight),
        Matrix::Quantized(_) => {
            Err(Error::Model("quantized weights cannot be trained with or exported: load them dequantized".into()))
        }
    }
}
