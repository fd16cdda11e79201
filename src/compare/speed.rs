//! Tokens per second.

use super::{Excerpts, HostError, Metrics, Progress, Row, Sample, Task, argmax, report::Runs};
use crate::error::Result;
use std::time::Instant;

/// Tokens generated for a timing.
pub(super) const GENERATED: usize = 32;

pub(super) fn run(texts: &Excerpts, progress: &mut dyn Progress) -> Result<Vec<Row>> {
    let (contenders, context) = (texts.contenders(), texts.context());
    let mut prefill = vec![vec![]; contenders.len()];
    let mut decode = vec![vec![]; contenders.len()];
    let mut runs = vec![Runs::default(); contenders.len()];
    for sample in 0..texts.plan.samples {
        let (tokens, excerpt) = texts.cut(&mut texts.rng(sample), context - GENERATED)?;
        warm_up(texts, &tokens)?;
        let mut sequences = vec![];
        for (contender, rates) in contenders.iter().zip(&mut prefill) {
            progress.unit(&format!("speed {} at {context}", contender.label));
            let mut sequence = texts.subject.open(&contender.policy)?;
            let (logits, seconds) = timed(|| sequence.prefill(&tokens, true))?;
            rates.push(tokens.len() as f64 / seconds);
            sequences.push((sequence, logits, vec![]));
        }
        // In turns, so that what else the machine does falls on all alike.
        for _ in 0..GENERATED {
            for (sequence, logits, rates) in &mut sequences {
                let (next, seconds) = timed(|| sequence.decode(argmax(logits)))?;
                *logits = next;
                rates.push(1.0 / seconds);
            }
        }
        for (i, (sequence, _, mut rates)) in sequences.into_iter().enumerate() {
            decode[i].push(median(&mut rates));
            runs[i].add(&sequence.stats());
            progress.sample(&Sample {
                prompt: excerpt.clone(),
                prefill_tokens_per_s: prefill[i].last().copied(),
                decode_tokens_per_s: decode[i].last().copied(),
                ..Sample::new("speed", &contenders[i], context, sample)
            })?;
        }
    }
    let timings = prefill.iter_mut().zip(&mut decode);
    let rows = contenders.iter().zip(timings).zip(&runs).map(|((contender, (prefill, decode)), runs)| {
        let metrics = Metrics {
            prefill_tokens_per_s: Some(median(prefill)),
            decode_tokens_per_s: Some(median(decode)),
            ..Metrics::default()
        };
        Row::new(contender, Task::Speed, texts, metrics, runs)
    });
    Ok(rows.collect())
}

fn timed<T>(work: impl FnOnce() -> std::result::Result<T, HostError>) -> Result<(T, f64)> {
    let start = Instant::now();
    let done = work()?;
    Ok((done, start.elapsed().as_secs_f64()))
}

/// The first contender does not pay for cold memory.
fn warm_up(texts: &Excerpts, tokens: &[u32]) -> Result<()> {
    if let Some(first) = texts.contenders().first() {
        texts.subject.open(&first.policy)?.prefill(&tokens[..tokens.len().min(64)], true)?;
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] }
}
