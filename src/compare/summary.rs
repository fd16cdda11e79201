//! Rows of a report, from its samples.

use super::{
    Contender, Contest, Metrics, Plan, Row, Sample, Task,
    report::wilson_of_share,
    significance::{Against, Measure, Pair, paired},
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
            let others = contest.contenders.iter().filter(|other| other.label != contender.label);
            let measures = others.filter_map(|other| Some((other, Measure::of(&*other.policy)?)));
            let differences = measures.filter_map(|(other, measure)| {
                let (difference, interval, p, pairs) = difference(task, &own, &cell(other, task), plan.seed)?;
                Some(Against { policy: other.label.clone(), measure: Some(measure), difference, interval, p, pairs })
            });
            rows.push(row(contender, contest, task, &own, differences.collect()));
        }
    }
    rows
}

fn row(contender: &Contender, contest: &Contest, task: Task, own: &[&Sample], against: Vec<Against>) -> Row {
    let kv = all_runs(own.iter().filter_map(|sample| sample.kv.as_ref()));
    Row {
        policy: contender.label.clone(),
        policy_full: contender.policy.to_string(),
        task: task.to_string(),
        context: contest.context,
        samples: by_sample(task, own).len(),
        metrics: metrics(task, own),
        kv,
        compression: kv.compression(),
        against,
    }
}

fn metrics(task: Task, own: &[&Sample]) -> Metrics {
    let mean = |figure: fn(&Sample) -> Option<f64>| {
        let figures: Vec<f64> = own.iter().filter_map(|sample| figure(sample)).collect();
        figures.iter().sum::<f64>() / figures.len() as f64
    };
    let middle = |figure: fn(&Sample) -> Option<f64>| median(own.iter().filter_map(|sample| figure(sample)).collect());
    match task {
        Task::Ppl => Metrics { ppl: Some(mean(|s| s.nll).exp()), ..Metrics::default() },
        Task::Kl => Metrics { kl: Some(mean(|s| s.kl)), ..Metrics::default() },
        Task::TokenMatch => Metrics { token_match: Some(mean(|s| s.token_match)), ..Metrics::default() },
        Task::Speed => Metrics {
            prefill_tokens_per_s: middle(|s| s.prefill_tokens_per_s),
            decode_tokens_per_s: middle(|s| s.decode_tokens_per_s),
            ..Metrics::default()
        },
        _ => {
            let right = own.iter().filter(|sample| sample.correct == Some(true)).count();
            // Answers to one question are no more independent than the parts of one answer.
            let gives_parts = own.iter().any(|sample| sample.score.is_some() || sample.repeat > 0);
            let samples = by_sample(task, own);
            let share = samples.values().map(|(sum, count)| sum / *count as f64).sum::<f64>() / samples.len() as f64;
            Metrics {
                score: gives_parts.then_some(share),
                score_interval: wilson_of_share(share, samples.len() as u64).filter(|_| gives_parts),
                ..Metrics::of_answers(right as u64, own.len() as u64)
            }
        }
    }
}

/// How the figures of two policies at the same samples differ, the interval of that, its p-value and how many pairs there are;
/// `None` of fewer than two.
fn difference(task: Task, own: &[&Sample], its: &[&Sample], seed: u64) -> Option<(f64, [f64; 2], f64, usize)> {
    let (own, its) = (by_sample(task, own), by_sample(task, its));
    let pairs: Vec<Pair> = own
        .iter()
        .filter_map(|(sample, &(a, count))| its.get(sample).map(|&(b, _)| Pair { a, b, count: count as f64 }))
        .collect();
    let (difference, interval, p) = paired(&pairs, seed)?;
    Some((difference, interval, p, pairs.len()))
}

/// The sum of the scores of each sample, and how many it has.
fn by_sample(task: Task, own: &[&Sample]) -> BTreeMap<usize, (f64, usize)> {
    let mut sums: BTreeMap<usize, (f64, usize)> = BTreeMap::new();
    for sample in own {
        let score = match task {
            Task::Ppl => sample.nll,
            Task::Kl => sample.kl,
            Task::TokenMatch => sample.token_match,
            Task::Speed => sample.decode_tokens_per_s,
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        compare::{Ask, Setting},
        policies::Full,
        registry::Registry,
    };
    use std::sync::Arc;

    const SHARED: Task = Task::Ask(Ask::VariableTracking, Setting::Before);

    fn plan(task: Task) -> Plan {
        let window = Registry::standard().parse("window:size=9").unwrap();
        let contenders = vec![
            Contender { label: "full".into(), policy: Arc::new(Full {}) },
            Contender { label: "window @2x".into(), policy: window },
        ];
        let contests = vec![Contest { context: 512, tasks: vec![task], contenders }];
        Plan { contests, samples: 2, seed: 1, text: None, exams: vec![], sampling: Default::default() }
    }

    fn sample(plan: &Plan, policy: usize, sample: usize, more: Sample) -> Sample {
        let contest = &plan.contests[0];
        let named = Sample::new(contest.tasks[0], &contest.contenders[policy], 512, sample);
        let kv = Some(Stats { mean_bytes: 10.0 * (sample + 1) as f64, peak_bytes: 7, written: 3, ..Stats::default() });
        Sample { task: named.task, policy: named.policy, context: 512, sample, kv, ..more }
    }

    #[test]
    fn questions_of_a_sample_stay_together_in_a_difference() {
        let plan = plan(Task::Recall);
        let answer =
            |policy, at, right| sample(&plan, policy, at, Sample { correct: Some(right), ..Sample::default() });
        // Of four questions on two texts, the second policy misses two on the first text.
        let samples = [
            (0, 0, true),
            (0, 0, true),
            (0, 0, true),
            (1, 0, false),
            (1, 0, false),
            (1, 0, true),
            (0, 1, true),
            (1, 1, true),
        ];
        let samples: Vec<Sample> = samples.into_iter().map(|(policy, at, right)| answer(policy, at, right)).collect();
        let rows = rows(&plan, &samples);
        assert_eq!((rows[1].metrics.correct, rows[1].metrics.questions, rows[1].samples), (Some(2), Some(4), 2));
        assert!(rows[0].against.is_empty(), "itself is no measure");
        let against = &rows[1].against[0];
        assert_eq!((against.policy.as_str(), against.difference, against.pairs), ("full", -0.5, 2));
        assert_eq!(against.interval, [-2.0 / 3.0, 0.0], "the first text twice, the second twice");
        assert_eq!((rows[1].kv.written, rows[1].kv.peak_bytes), (12, 7));
    }

    #[test]
    fn parts_of_an_answer_make_a_mean_with_an_interval_and_pairs() {
        let plan = plan(SHARED);
        let scores = [[1.0, 0.5], [0.2, 0.8]];
        let part = |policy: usize, at: usize| {
            let score = scores[policy][at];
            sample(&plan, policy, at, Sample { correct: Some(score == 1.0), score: Some(score), ..Sample::default() })
        };
        let rows = rows(&plan, &[part(0, 0), part(1, 0), part(0, 1), part(1, 1)]);
        assert_eq!(
            (rows[0].metrics.score, rows[0].metrics.accuracy, rows[1].metrics.score),
            (Some(0.75), Some(0.5), Some(0.5))
        );
        let [low, high] = rows[1].metrics.score_interval.unwrap();
        assert!(0.05 < low && low < 0.2 && 0.8 < high && high < 0.95, "two samples say little: {low} to {high}");
        assert!((rows[1].against[0].difference + 0.25).abs() < 1e-12);
        assert_eq!(rows[1].kv.mean_bytes, 15.0);
    }

    #[test]
    fn several_answers_to_a_question_are_one_sample() {
        let plan = plan(Task::Exam(crate::compare::benchmark::Benchmark::Gsm8k));
        let answer =
            |at, repeat, right| sample(&plan, 0, at, Sample { correct: Some(right), repeat, ..Sample::default() });
        let rows = rows(&plan, &[answer(0, 0, true), answer(0, 1, false), answer(1, 0, true), answer(1, 1, true)]);
        let metrics = &rows[0].metrics;
        assert_eq!((metrics.score, metrics.questions, rows[0].samples), (Some(0.75), Some(4), 2));
        assert_eq!(metrics.score_interval, wilson_of_share(0.75, 2));
    }

    #[test]
    fn speed_is_a_median_and_differs_by_pairs() {
        let plan = plan(Task::Speed);
        let timed = |policy, at, rate| {
            sample(&plan, policy, at, Sample { decode_tokens_per_s: Some(rate), ..Sample::default() })
        };
        let samples = [
            timed(0, 0, 5.0),
            timed(0, 1, 1.0),
            timed(0, 2, 9.0),
            timed(1, 0, 7.0),
            timed(1, 1, 3.0),
            timed(1, 2, 11.0),
        ];
        let rows = rows(&plan, &samples);
        assert_eq!(rows[0].metrics.decode_tokens_per_s, Some(5.0));
        assert_eq!(rows[1].metrics.decode_tokens_per_s, Some(7.0));
        // Tokens per second vary more between texts than between policies: pairs see that each is faster by 2.
        let Against { difference, interval, p, pairs, .. } = rows[1].against[0];
        assert_eq!((difference, interval, p, pairs), (2.0, [2.0, 2.0], 0.25, 3));
        assert_eq!(rows[1].against[0].measure, Some(Measure::Full));
        assert_eq!(median(vec![]), None);
    }
}
