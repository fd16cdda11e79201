//! Perplexity, KL divergence and matching tokens with the policy active.

use super::{Excerpts, Log, Sample, Sequence, Task};
use crate::{
    error::Result,
    logits::{argmax, kl, log_softmax},
};

/// Tokens that are scored: the last quarter of the context, this many at most. The rest is the prompt.
const MOST_SCORED: usize = 256;

pub(super) fn scored_tokens(context: usize) -> usize {
    (context / 4).min(MOST_SCORED)
}

pub(super) fn run(texts: &Excerpts, log: &mut Log) -> Result<()> {
    let is_measured = |task: &Task| matches!(task, Task::Kl | Task::TokenMatch);
    let wants_full = texts.contest.tasks.iter().any(is_measured);
    for sample in 0..texts.plan.samples {
        let contenders = log.lacking(texts, Task::Ppl, sample, 0);
        if contenders.is_empty() {
            continue;
        }
        let (tokens, excerpt) = texts.cut(&mut texts.rng(sample), texts.context())?;
        let mut reference: Vec<Reference> = vec![];
        if wants_full {
            let mut sequence = texts.subject.reference()?;
            walk(&mut *sequence, &tokens, |logits, _| reference.push(Reference::new(logits)))?;
        }
        for contender in contenders {
            log.unit(texts, Task::Ppl, contender);
            let mut sequence = texts.subject.open(&contender.policy)?;
            let (mut nll, mut divergence, mut same) = (vec![], vec![], vec![]);
            walk(&mut *sequence, &tokens, |logits, next| {
                let log_p = log_softmax(logits);
                if let Some(full) = reference.get(nll.len()) {
                    divergence.push(kl(&full.log_p, &log_p));
                    same.push((full.top == argmax(logits)) as u8 as f64);
                }
                nll.push(-log_p[next as usize]);
            })?;
            log.add(Sample {
                nll: Some(mean(&nll)),
                kl: wants_full.then(|| mean(&divergence)),
                token_match: wants_full.then(|| mean(&same)),
                kl_by_token: narrow(&divergence),
                prompt: excerpt.clone(),
                kv: Some(sequence.stats()),
                ..Sample::new(Task::Ppl, contender, texts.context(), sample)
            })?;
        }
    }
    Ok(())
}

/// What `full` makes of a place.
struct Reference {
    log_p: Vec<f32>, // half the memory of f64: there is one for each scored token and vocabulary entry
    top: u32,
}

impl Reference {
    fn new(logits: &[f32]) -> Self {
        Self { log_p: narrow(&log_softmax(logits)), top: argmax(logits) }
    }
}

fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len() as f64
}

/// Reads the prompt, then the scored tokens one by one as if they were generated; each is told with the logits before it.
fn walk(sequence: &mut dyn Sequence, tokens: &[u32], mut score: impl FnMut(&[f32], u32)) -> Result<()> {
    let (prompt, scored) = tokens.split_at(tokens.len() - scored_tokens(tokens.len()));
    let mut next = sequence.prefill(prompt, true)?;
    for (i, &token) in scored.iter().enumerate() {
        score(next.logits()?, token);
        if i + 1 < scored.len() {
            next = sequence.decode(token)?;
        }
    }
    Ok(())
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_is_narrow_and_divergence_a_mean() {
        let full = Reference::new(&[0.0, 2f32.ln(), 0.0]);
        assert_eq!(full.top, 1);
        assert!(kl(&full.log_p, &log_softmax(&[5.0, 5.0 + 2f32.ln(), 5.0])).abs() < 1e-6, "the same");
        assert_eq!(mean(&[1.0, 2.0, 6.0]), 3.0);
    }
}
