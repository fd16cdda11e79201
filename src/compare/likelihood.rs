//! Perplexity and KL divergence with the policy active.

use super::{Excerpts, Metrics, Progress, Row, Sample, Sequence, Task, log_softmax, report::Runs};
use crate::{error::Result, policies::Full, policy::Policy};
use std::sync::Arc;

/// Tokens that are scored: the last quarter of the context, this many at most. The rest is the prompt.
const MOST_SCORED: usize = 256;

pub(super) fn scored_tokens(context: usize) -> usize {
    (context / 4).min(MOST_SCORED)
}

pub(super) fn run(texts: &Excerpts, progress: &mut dyn Progress) -> Result<Vec<Row>> {
    let plan = texts.plan;
    let wants_kl = texts.contest.tasks.contains(&Task::Kl);
    let mut scores = vec![Scores::default(); texts.contenders().len()];
    let mut runs = vec![Runs::default(); texts.contenders().len()];
    for sample in 0..plan.samples {
        let (tokens, excerpt) = texts.cut(&mut texts.rng(sample), texts.context())?;
        let mut reference = vec![];
        if wants_kl {
            let full: Arc<dyn Policy> = Arc::new(Full {});
            let mut sequence = texts.subject.open(&full)?;
            walk(&mut *sequence, &tokens, |logits, _| reference.push(narrow(&log_softmax(logits))))?;
        }
        for (i, contender) in texts.contenders().iter().enumerate() {
            progress.unit(&format!("ppl {} at {}", contender.label, texts.context()));
            let mut sequence = texts.subject.open(&contender.policy)?;
            let mut own = Scores::default();
            walk(&mut *sequence, &tokens, |logits, next| {
                let log_p = log_softmax(logits);
                let divergence = reference.get(own.count).map_or(0.0, |full| kl(full, &log_p));
                own.add(-log_p[next as usize], divergence);
            })?;
            runs[i].add(&sequence.stats());
            scores[i].merge(&own);
            progress.sample(&Sample {
                nll: Some(own.nll / own.count as f64),
                kl: wants_kl.then_some(own.kl / own.count as f64),
                prompt: excerpt.clone(),
                ..Sample::new("ppl", contender, texts.context(), sample)
            })?;
        }
    }
    let mut rows = vec![];
    for ((contender, scores), runs) in texts.contenders().iter().zip(&scores).zip(&runs) {
        let n = scores.count as f64;
        for &task in &texts.contest.tasks {
            let metrics = match task {
                Task::Kl => Metrics { kl: Some(scores.kl / n), ..Metrics::default() },
                _ => Metrics { ppl: Some((scores.nll / n).exp()), ..Metrics::default() },
            };
            rows.push(Row::new(contender, task, texts, metrics, runs));
        }
    }
    Ok(rows)
}

/// Sums over scored tokens.
#[derive(Debug, Clone, Default)]
struct Scores {
    count: usize,
    nll: f64,
    kl: f64,
}

impl Scores {
    fn add(&mut self, nll: f64, kl: f64) {
        self.count += 1;
        self.nll += nll;
        self.kl += kl;
    }

    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.nll += other.nll;
        self.kl += other.kl;
    }
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
