//! Tokens per second.

use super::{Contender, Excerpts, HostError, Log, Sample, Task, summary::median};
use crate::error::Result;
use std::time::Instant;

/// Tokens generated for a timing.
pub(super) const GENERATED: usize = 32;

pub(super) fn run(texts: &Excerpts, log: &mut Log) -> Result<()> {
    let context = texts.context();
    for sample in 0..texts.plan.samples {
        let contenders = log.lacking(texts, Task::Speed, sample, 0);
        let Some(first) = contenders.first() else { continue };
        let (tokens, excerpt) = texts.cut(&mut texts.rng(sample), context - GENERATED)?;
        warm_up(texts, first, &tokens)?;
        let mut sequences = vec![];
        for contender in contenders {
            log.unit(texts, Task::Speed, contender);
            let mut sequence = texts.subject.open(&contender.policy)?;
            let (next, seconds) = timed(|| sequence.prefill(&tokens, true))?;
            sequences.push((contender, sequence, tokens.len() as f64 / seconds, next, vec![]));
        }
        // In turns, so that what else the machine does falls on all alike.
        for _ in 0..GENERATED {
            for (_, sequence, _, next, rates) in &mut sequences {
                let token = next.most_likely()?;
                let (after, seconds) = timed(|| sequence.decode(token))?;
                *next = after;
                rates.push(1.0 / seconds);
            }
        }
        for (contender, sequence, prefill, _, rates) in sequences {
            log.add(Sample {
                prompt: excerpt.clone(),
                prefill_tokens_per_s: Some(prefill),
                decode_tokens_per_s: median(rates),
                kv: Some(sequence.stats()),
                ..Sample::new(Task::Speed, contender, context, sample)
            })?;
        }
    }
    Ok(())
}

fn timed<T>(work: impl FnOnce() -> std::result::Result<T, HostError>) -> Result<(T, f64)> {
    let start = Instant::now();
    let done = work()?;
    Ok((done, start.elapsed().as_secs_f64()))
}

/// The first contender does not pay for cold memory.
fn warm_up(texts: &Excerpts, first: &Contender, tokens: &[u32]) -> Result<()> {
    texts.subject.open(&first.policy)?.prefill(&tokens[..tokens.len().min(64)], true)?;
    Ok(())
}
