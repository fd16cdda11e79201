//! Hard eviction on text: how far from the dense model, and how much it holds.

use super::{
    pass::Pass,
    trainee::{Batch, Trainee, rows_at_a_time},
};
use crate::{
    error::{Error, Result},
    model::Model,
};
use candle_core::{DType, Tensor};
use kvpolicy::retrofit::{HIDDEN, Named, hard_keep, losses};
use serde::Serialize;

/// What stays, in an evaluation.
#[derive(Debug, Clone, Copy)]
pub enum Judged<'a> {
    /// Everything.
    Dense,
    /// What gates with these parameters keep.
    Gates(&'a Named),
    /// The newest tokens and the first ones.
    Window {
        /// The newest.
        size: usize,
        /// The first.
        sinks: usize,
    },
}

/// Means over the tokens of an evaluation; of the last quarter of each sequence in `tail`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Evaluation {
    /// KL divergence of the evicting model from the dense one, KL(dense || evicting), nats per token.
    pub kl: f64,
    /// Negative log-likelihood of the text, nats per token.
    pub nll: f64,
    /// That of the dense model.
    pub dense_nll: f64,
    /// [`Evaluation::kl`] over the last quarter of each sequence.
    pub tail_kl: f64,
    /// [`Evaluation::nll`] over the last quarter of each sequence.
    pub tail_nll: f64,
    /// That of the dense model.
    pub tail_dense_nll: f64,
    /// Live entries at the end of a sequence over its tokens: of each layer, of each KV head.
    pub live: Vec<Vec<f64>>,
    /// Tokens over live entries, all heads together.
    pub compression: f64,
    /// Tokens judged.
    pub tokens: usize,
}

impl Evaluation {
    /// Perplexity over that of the dense model, minus 1.
    pub fn perplexity_change(&self) -> f64 {
        (self.nll - self.dense_nll).exp() - 1.0
    }

    /// The same over the last quarter of each sequence.
    pub fn tail_perplexity_change(&self) -> f64 {
        (self.tail_nll - self.tail_dense_nll).exp() - 1.0
    }
}

impl Trainee<'_> {
    /// Evaluates batches of the same length, at least 4 tokens. The first token of a sequence is predicted by none, the last
    /// predicts none.
    ///
    /// Where neurons are borrowed, the dense model does without them too, so that their loss is not counted
    /// ([`Trainee::borrowing`]).
    ///
    /// # Errors
    /// [`Error::Model`] if there is nothing to judge, and those of the tensor library.
    pub fn evaluate(&self, batches: &[Batch], judged: Judged) -> Result<Evaluation> {
        if batches.is_empty() || batches.iter().any(|batch| batch.length < 4) {
            return Err(Error::Model("nothing to judge: at least one held-out sequence, of 4 tokens or more".into()));
        }
        let config = self.model().config();
        let mut sum = Evaluation { live: vec![vec![0.0; config.kv_heads]; config.layers], ..Evaluation::default() };
        let (mut count, mut tail_count, mut sequences) = (0.0, 0.0, 0.0);
        for batch in batches {
            let [kl, nll, dense_nll] = self.judge(batch, judged, &mut sum.live)?;
            sequences += batch.sequences as f64;
            sum.tokens += batch.sequences * batch.length;
            for i in (0..kl.len()).filter(|i| (i + 1) % batch.length != 0) {
                count += 1.0;
                sum.kl += kl[i] as f64;
                sum.nll += nll[i] as f64;
                sum.dense_nll += dense_nll[i] as f64;
                if i % batch.length >= batch.length - batch.length / 4 {
                    tail_count += 1.0;
                    sum.tail_kl += kl[i] as f64;
                    sum.tail_nll += nll[i] as f64;
                    sum.tail_dense_nll += dense_nll[i] as f64;
                }
            }
        }
        [&mut sum.kl, &mut sum.nll, &mut sum.dense_nll].into_iter().for_each(|x| *x /= count);
        [&mut sum.tail_kl, &mut sum.tail_nll, &mut sum.tail_dense_nll].into_iter().for_each(|x| *x /= tail_count);
        sum.live.iter_mut().flatten().for_each(|live| *live /= sequences);
        let heads = (config.layers * config.kv_heads) as f64;
        sum.compression = heads / sum.live.iter().flatten().sum::<f64>();
        Ok(sum)
    }

    /// Divergence, and negative log-likelihoods of the next token without and with eviction, of each token.
    fn judge(&self, batch: &Batch, judged: Judged, live: &mut [Vec<f64>]) -> Result<[Vec<f32>; 3]> {
        let window = match judged {
            Judged::Dense => batch.length,
            Judged::Gates(_) => self.gates.window as usize,
            Judged::Window { size, .. } => size.saturating_sub(1),
        };
        let teacher = self.dense(batch)?;
        let student = match judged {
            Judged::Gates(params) => self.student(params)?,
            Judged::Dense | Judged::Window { .. } => self.model().clone(),
        };
        let pass = Pass::new(&student, batch.sequences, batch.length, window, self.donors())?;
        let mut x = pass.embed(&batch.tokens)?;
        for (layer, live) in live.iter_mut().enumerate() {
            let keep = self.keep(&student, batch, judged, layer, &x)?;
            count_live(batch, keep.as_ref(), window, live)?;
            x = pass.forward(layer, &x, keep.as_ref())?.0;
        }
        self.compare(&pass, &pass.finish(&x)?, &teacher, batch)
    }

    fn keep(&self, student: &Model, batch: &Batch, judged: Judged, layer: usize, x: &Tensor) -> Result<Option<Tensor>> {
        let (tokens, heads) = (batch.sequences * batch.length, self.model().config().kv_heads);
        match judged {
            Judged::Dense => Ok(None),
            Judged::Gates(params) => {
                let logits = self.logits(student, params, layer, x)?;
                Ok(Some(hard_keep(&logits, batch.sequences, self.gates.lag, self.gates.per)?))
            }
            Judged::Window { sinks, .. } => {
                let one: Vec<f32> = (0..batch.length).map(|i| if i < sinks { 0.0 } else { HIDDEN as f32 }).collect();
                let all = Tensor::from_vec(one, (1, batch.length, 1), x.device())?;
                Ok(Some(
                    all.broadcast_as((batch.sequences, batch.length, heads))?.contiguous()?.reshape((tokens, heads))?,
                ))
            }
        }
    }

    fn compare(&self, pass: &Pass, student: &Tensor, teacher: &Tensor, batch: &Batch) -> Result<[Vec<f32>; 3]> {
        let (rows, tokens) = (rows_at_a_time(self.model().config().vocab), student.dim(0)?);
        let next = batch.next_tokens()?;
        let mut all: [Vec<f32>; 3] = Default::default();
        for start in (0..tokens).step_by(rows) {
            let part = |x: &Tensor| -> Result<Tensor> { Ok(x.narrow(0, start, rows.min(tokens - start))?) };
            let (student, teacher) = (pass.logits(&part(student)?)?, pass.logits(&part(teacher)?)?);
            let (next, weights) = (part(&next)?, part(&batch.weights)?);
            let kl = losses::distil_teacher(student.copy()?, &teacher, &weights)?.0;
            let nll = losses::cross_entropy(student, &next, &weights)?.0;
            let dense_nll = losses::cross_entropy(teacher, &next, &weights)?.0;
            for (all, part) in all.iter_mut().zip([kl, nll, dense_nll]) {
                all.extend(part.to_vec1::<f32>()?);
            }
        }
        Ok(all)
    }
}

/// Adds the live entries at each sequence's end over its tokens.
fn count_live(batch: &Batch, keep: Option<&Tensor>, window: usize, live: &mut [f64]) -> Result<()> {
    let (length, recent) = (batch.length, (window + 1).min(batch.length));
    let kept = match keep {
        None => vec![(length - recent) as f32 * batch.sequences as f32; live.len()],
        Some(keep) => {
            let kept = keep.ge(HIDDEN / 2.0)?.to_dtype(DType::F32)?;
            let kept = kept.reshape((batch.sequences, length, live.len()))?.narrow(1, 0, length - recent)?;
            if length == recent { vec![0.0; live.len()] } else { kept.sum((0, 1))?.to_vec1::<f32>()? }
        }
    };
    for (live, kept) in live.iter_mut().zip(kept) {
        *live += (kept as f64 + (batch.sequences * recent) as f64) / length as f64;
    }
    Ok(())
}
