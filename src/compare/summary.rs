//! Rows of a report, from its samples.

use super::{
    Contender, Contest, Metrics, Plan, Row, Sample, Task,
    significance::{Against, Pair, mean_interval, paired},
};
use crate::stats::Stats;
use std::collections::BTreeMap;

/// One row per contender and task of every contest.
pub(super) fn rows(plan: &Plan, samples: &[Sample]) -> Vec<Row> {
    plan.contests.iter().flat_map(|contest| contest_rows(plan, contest, samples)).collect()
}

fn contest_rows(plan: &Plan, contest: &Contest, samples: &[Sample]) -> Vec<Row> {
    let cell = |contender: &Contender, task: Task| -> Vec<&Sample> {
        let (name, label) = (task.sampled_as().to_string(), &contender.label);
        let is_own = |s: &&Sample| s.task == name && s.policy == *label && s.context == contest.context;
        samples.iter().filter(is_own).collect()
    };
    let mut rows = vec![];
    for contender in &contest.contenders {
        for &task in &contest.tasks {
            let own = cell(contender, task);
            let others = contest.contenders.iter().filter(|other| is_measure(other) && other.label != contender.label);
            let against = others.filter_map(|other| against(task, &own, &cell(other, task), other, plan.seed));
            rows.push(row(contender, contest, task, &own, against.collect(), plan.seed));
        }
    }
    rows
}

/// Policies that the others are measured by.
fn is_measure(contender: &Contender) -> bool {
    let text = contender.policy.to_string();
    ["full", "dms"].contains(&text.split(':').next().unwrap_or_default())
}

fn row(contender: &Contender, contest: &Contest, task: Task, own: &[&Sample], against: Vec<Against>, seed: u64) -> Row {
    let kv = all_runs(own.iter().filter_map(|sample| sample.kv.as_ref()));
    Row {
        policy: contender.label.clone(),
        policy_full: contender.policy.to_string(),
        task: task.to_string(),
        context: contest.context,
        samples: by_sample(task, own).len(),
        metrics: metrics(task, own, seed),
        kv,
        compression: kv.compression(),
        against,
    }
}

fn metrics(task: Task, own: &[&Sample], seed: u64) -> Metrics {
    let mean = |figure: fn(&Sample) -> Option<f64>| {
        let figures: Vec<f64> = own.iter().filter_map(|sample| figure(sample)).collect();
        figures.iter().sum::<f64>() / figures.len() as f64
    };
    let middle = |figure: fn(&Sample) -> Option<f64>| median(own.iter().filter_map(|sample| figure(sample)).collect());
    match task {
        Task::Ppl => Metrics { ppl: Some(mean(|s| s.nll).exp()), ..Metrics::default() },
        Task::Kl => Metrics { kl: Some(mean(|s| s.kl)), ..Metrics::default() },
        Task::Speed => Metrics {
            prefill_tokens_per_s: middle(|s| s.prefill_tokens_per_s),
            decode_tokens_per_s: middle(|s| s.decode_tokens_per_s),
            ..Metrics::default()
        },
        _ => {
            let right = own.iter().filter(|sample| sample.correct == Some(true)).count();
            // Answers to one question are no more independent than the parts of one answer.
            let gives_parts = own.iter().any(|sample| sample.score.is_some() || sample.repeat > 0);
            let sums = by_sample(task, own).into_values();
            let sums: Vec<Pair> = sums.map(|(a, count)| Pair { a, b: 0.0, count: count as f64 }).collect();
            Metrics {
                score: gives_parts.then(|| mean(score)),
                score_interval: mean_interval(&sums, seed).filter(|_| gives_parts),
                ..Metrics::of_answers(right as u64, own.len() as u64)
            }
        }
    }
}

/// What two policies made of the same samples; `None` for a task without a figure of quality.
fn against(task: Task, own: &[&Sample], its: &[&Sample], other: &Contender, seed: u64) -> Option<Against> {
    let (own, its) = (by_sample(task, own), by_sample(task, its));
    let pairs: Vec<Pair> = own
        .iter()
        .filter_map(|(sample, &(a, count))| its.get(sample).map(|&(b, _)| Pair { a, b, count: count as f64 }))
        .collect();
    let (difference, interval, p) = paired(&pairs, seed)?;
    Some(Against { policy: other.label.clone(), difference, interval, p, pairs: pairs.len() })
}

/// The sum of the scores of each sample, and how many it has.
fn by_sample(task: Task, own: &[&Sample]) -> BTreeMap<usize, (f64, usize)> {
    let mut sums: BTreeMap<usize, (f64, usize)> = BTreeMap::new();
    for sample in own {
        let score = match task {
            Task::Ppl => sample.nll,
            Task::Kl => sample.kl,
            Task::Speed => None,
            _ => score(sample),
        };
        let (sum, count) = sums.entry(sample.sample).or_default();
        *sum += score.unwrap_or(0.0);
        *count += score.is_some() as usize;
    }
    sums
}

/// The share of an answer that is right.
fn score(sample: &Sample) -> Option<f64> {
    sample.score.or(sample.correct.map(|right| right as u8 as f64))
}

/// Peaks are the largest, means are means over runs, counts are sums.
fn all_runs<'a>(runs: impl Iterator<Item = &'a Stats>) -> Stats {
    let (mut all, mut count) = (Stats::default(), 0.0);
    for run in runs {
        count += 1.0;
        let fold = |mean: &mut f64, x: f64| *mean += (x - *mean) / count;
        fold(&mut all.mean_bytes, run.mean_bytes);
        fold(&mut all.mean_live_entries, run.mean_live_entries);
        fold(&mut all.mean_dense_entries, run.mean_dense_entries);
        all.sampled_steps += run.sampled_steps;
        all.peak_bytes = all.peak_bytes.max(run.peak_bytes);
        all.dense_peak_bytes = all.dense_peak_bytes.max(run.dense_peak_bytes);
        all.written += run.written;
        all.evicted += run.evicted;
    }
    all
}

/// `None` of nothing.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len().is_multiple_of(2) { (values[middle - 1] + upper) / 2.0 } else { upper })
}
