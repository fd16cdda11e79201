//! Perplexity and KL divergence with the policy active.

use super::{Excerpts, Log, Sample, Sequence, Task, log_softmax};
use crate::{error::Result, policies::Full, policy::Policy};
use std::sync::Arc;

/// Tokens that are scored: the last quarter of the context, this many at most. The rest is the prompt.
const MOST_SCORED: usize = 256;

pub(super) fn scored_tokens(context: usize) -> usize {
    (context / 4).min(MOST_SCORED)
}

pub(super) fn run(texts: &Excerpts, log: &mut Log) -> Result<()> {
    let wants_kl = texts.contest.tasks.contains(&Task::Kl);
    for sample in 0..texts.plan.samples {
        let contenders = log.lacking(texts, Task::Ppl, sample, 0);
        if contenders.is_empty() {
            continue;
        }
        let (tokens, excerpt) = texts.cut(&mut texts.rng(sample), texts.context())?;
        let mut reference = vec![];
        if wants_kl {
            let full: Arc<dyn Policy> = Arc::new(Full {});
            let mut sequence = texts.subject.open(&full)?;
            walk(&mut *sequence, &tokens, |logits, _| reference.push(narrow(&log_softmax(logits))))?;
        }
        for contender in contenders {
            log.unit(texts, Task::Ppl, contender);
            let mut sequence = texts.subject.open(&contender.policy)?;
            let (mut nll, mut divergence) = (vec![], vec![]);
            walk(&mut *sequence, &tokens, |logits, next| {
                let log_p = log_softmax(logits);
                divergence.extend(reference.get(nll.len()).map(|full| kl(full, &log_p)));
                nll.push(-log_p[next as usize]);
            })?;
            log.add(Sample {
                nll: Some(mean(&nll)),
                kl: wants_kl.then(|| mean(&divergence)),
                kl_by_token: narrow(&divergence),
                prompt: excerpt.clone(),
                kv: Some(sequence.stats()),
                ..Sample::new(Task::Ppl, contender, texts.context(), sample)
            })?;
        }
    }
    Ok(())
}

fn mean(figures: &[f64]) -> f64 {
    figures.iter().sum::<f64>() / figures.len() as f64
}

/// Reads the prompt, then the scored tokens one by one as if they were generated; each is told with the logits before it.
fn walk(sequence: &mut dyn Sequence, tokens: &[u32], mut score: impl FnMut(&[f32], u32)) -> Result<()> {
    let (prompt, scored) = tokens.split_at(tokens.len() - scored_tokens(tokens.len()));
    let mut logits = sequence.prefill(prompt, true)?;
    for (i, &token) in scored.iter().enumerate() {
        score(&logits, token);
        if i + 1 < scored.len() {
            logits = sequence.decode(token)?;
        }
    }
    Ok(())
}

/// Half the memory: one number for each scored token and vocabulary entry is kept.
fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// KL(p || q) in nats, of log-probabilities.
fn kl(log_p: &[f32], log_q: &[f64]) -> f64 {
    log_p.iter().zip(log_q).map(|(&p, q)| (p as f64).exp() * (p as f64 - q)).sum()
}
