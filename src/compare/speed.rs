//! Tokens per second.

use super::{Excerpts, Metrics, Progress, Row, Sample, Task, argmax, report::Runs};
use crate::error::Result;
use std::time::Instant;

/// Tokens generated for a timing.
pub(super) const GENERATED: usize = 32;

pub(super) fn run(texts: &Excerpts, progress: &mut dyn Progress) -> Result<Vec<Row>> {
    let plan = texts.plan;
    let mut prefill = vec![vec![]; texts.contenders().len()];
    let mut decode = vec![vec![]; texts.contenders().len()];
    let mut runs = vec![Runs::default(); texts.contenders().len()];
    for sample in 0..plan.samples {
        let (tokens, excerpt) = texts.cut(&mut texts.rng(sample), texts.context() - GENERATED)?;
        warm_up(texts, &tokens)?;
        for (i, contender) in texts.contenders().iter().enumerate() {
            progress.unit(&format!("speed {} at {}", contender.label, texts.context()));
            let mut sequence = texts.subject.open(&contender.policy)?;
            let start = Instant::now();
            let mut logits = sequence.prefill(&tokens, true)?;
            let read = start.elapsed().as_secs_f64();
            let start = Instant::now();
            for _ in 0..GENERATED {
                logits = sequence.decode(argmax(&logits))?;
            }
            let wrote = start.elapsed().as_secs_f64();
            prefill[i].push(tokens.len() as f64 / read);
            decode[i].push(GENERATED as f64 / wrote);
            runs[i].add(&sequence.stats());
            progress.sample(&Sample {
                prompt: excerpt.clone(),
                prefill_tokens_per_s: prefill[i].last().copied(),
                decode_tokens_per_s: decode[i].last().copied(),
                ..Sample::new("speed", contender, texts.context(), sample)
            })?;
        }
    }
    let timings = prefill.iter_mut().zip(&mut decode);
    let rows = texts.contenders().iter().zip(timings).zip(&runs).map(|((contender, (prefill, decode)), runs)| {
        let metrics = Metrics {
            prefill_tokens_per_s: Some(median(prefill)),
            decode_tokens_per_s: Some(median(decode)),
            ..Metrics::default()
        };
        Row::new(contender, Task::Speed, texts, metrics, runs)
    });
    Ok(rows.collect())
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
