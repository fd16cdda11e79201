//! What a comparison writes down.

use super::{Contender, Contest, Plan, Task, significance::Against};
use crate::stats::Stats;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the schema of [`Report`]; raised when a field changes its meaning or goes.
pub const SCHEMA: u32 = 1;

/// A comparison: `results.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Version of this program.
    pub version: String,
    /// Seconds since 1970 at the start.
    pub started: u64,
    /// The command line.
    pub command: Vec<String>,
    /// The model's name.
    pub model: String,
    /// SHA-256 of its weights.
    pub model_sha256: String,
    /// Type of its activations.
    pub dtype: String,
    /// Whether its matrices are quantized.
    #[serde(default)]
    pub quantized: bool,
    /// SHA-256 of its tokenizer and chat template.
    #[serde(default)]
    pub tokenizer_sha256: String,
    /// SHA-256 of the gates of each policy that has any, by the policy with every parameter.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gates: BTreeMap<String, String>,
    /// Type of stored keys and values.
    pub kv_dtype: String,
    /// SHA-256 of the text; empty without one.
    pub text_sha256: String,
    /// Chooses texts, numbers and depths.
    pub seed: u64,
    /// Samples of each policy, task and context.
    #[serde(default)]
    pub samples: usize,
    /// The benchmarks that were asked, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exams: BTreeMap<String, Asked>,
    /// Answers to each of their questions.
    #[serde(default)]
    pub repeats: usize,
    /// What these were drawn at.
    #[serde(default)]
    pub temperature: f64,
    /// What was to be measured.
    #[serde(default)]
    pub contests: Vec<Planned>,
    /// The machine.
    pub host: Host,
    /// One per policy, task and context; none while the run has not ended.
    pub rows: Vec<Row>,
}

/// The policies at one context length in tasks that share their runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// Context length in tokens.
    pub context: usize,
    /// Names of tasks.
    pub tasks: Vec<String>,
    /// Labels of policies, each with the policy with every parameter.
    pub policies: Vec<[String; 2]>,
}

impl Planned {
    /// All of a plan.
    pub fn of(plan: &Plan) -> Vec<Self> {
        let policy = |contender: &Contender| [contender.label.clone(), contender.policy.to_string()];
        let contest = |contest: &Contest| Self {
            context: contest.context,
            tasks: contest.tasks.iter().map(ToString::to_string).collect(),
            policies: contest.contenders.iter().map(policy).collect(),
        };
        plan.contests.iter().map(contest).collect()
    }
}

impl Report {
    /// Why the samples of one run cannot stand beside those of another: each fact of the plans that differs, as `seed was 1
    /// and is 2`. Empty for the same plan.
    pub fn departures(&self, now: &Self) -> Vec<String> {
        let facts = |report: &Self| {
            [
                ("version", report.version.clone()),
                ("model_sha256", report.model_sha256.clone()),
                ("dtype", report.dtype.clone()),
                ("quantized", report.quantized.to_string()),
                ("tokenizer_sha256", report.tokenizer_sha256.clone()),
                ("gates", gates(report)),
                ("kv_dtype", report.kv_dtype.clone()),
                ("text_sha256", report.text_sha256.clone()),
                ("seed", report.seed.to_string()),
                ("samples", report.samples.to_string()),
                ("exams", exams(report)),
                ("device", report.host.device.clone()),
                ("cpu", report.host.cpu.clone()),
                ("repeats", report.repeats.to_string()),
                ("temperature", report.temperature.to_string()),
                ("contexts", list(report, |contest| vec![contest.context.to_string()])),
                ("tasks", list(report, |contest| contest.tasks.clone())),
                ("policies", list(report, |contest| contest.policies.iter().map(|[_, full]| full.clone()).collect())),
            ]
        };
        let pairs = facts(self).into_iter().zip(facts(now));
        let differ = pairs.filter(|((_, was), (_, is))| was != is);
        let mut departures: Vec<String> =
            differ.map(|((name, was), (_, is))| format!("{name} was `{was}` and is `{is}`")).collect();
        if departures.is_empty() && self.contests != now.contests {
            departures.push("the order or the labels of its policies, tasks or contexts were others".into());
        }
        departures
    }
}

fn exams(report: &Report) -> String {
    let asked = |(name, Asked { sha256, questions }): (&String, &Asked)| format!("{questions} of {name} {sha256}");
    report.exams.iter().map(asked).collect::<Vec<_>>().join(";")
}

fn gates(report: &Report) -> String {
    report.gates.iter().map(|(policy, sha256)| format!("{policy} {sha256}")).collect::<Vec<_>>().join(";")
}

/// What is named anywhere in the contests, once each.
fn list(report: &Report, named: impl Fn(&Planned) -> Vec<String>) -> String {
    let mut all: Vec<String> = vec![];
    for name in report.contests.iter().flat_map(named) {
        if !all.contains(&name) {
            all.push(name);
        }
    }
    all.join(";")
}

/// What was asked of a benchmark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Of its file.
    pub sha256: String,
    /// The first so many of the file.
    pub questions: usize,
}

/// The machine a comparison ran on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Host {
    /// Operating system and processor architecture.
    pub platform: String,
    /// Name of the processor; empty if unknown.
    pub cpu: String,
    /// Threads used.
    pub threads: usize,
    /// Where the model ran.
    pub device: String,
}

/// One policy at one task and context.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// As the user wrote it, or as a sweep made it.
    pub policy: String,
    /// The policy with every parameter.
    pub policy_full: String,
    /// The task's name.
    pub task: String,
    /// Context length in tokens.
    pub context: usize,
    /// Samples behind the figures.
    pub samples: usize,
    /// The task's figures.
    pub metrics: Metrics,
    /// The cache over all samples: the largest peaks, means of means, sums of counts.
    pub kv: Stats,
    /// Entries a dense cache would have held for one that was held, over all samples.
    pub compression: f64,
    /// How the figure differs from those of `full` and of `dms`, where they were compared too and it is one of quality.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub against: Vec<Against>,
}

/// Figures of a task; those of other tasks are absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Perplexity per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ppl: Option<f64>,
    /// KL(full || policy), nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Share of tokens before which the most likely token is that of `full`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_match: Option<f64>,
    /// Right answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correct: Option<u64>,
    /// Questions asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub questions: Option<u64>,
    /// Their ratio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// What the ratio may be of all such questions: [`wilson`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_interval: Option<[f64; 2]>,
    /// Mean share that is right, of a task that gives part of the mark.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Its 95% interval: Wilson's, with samples for questions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_interval: Option<[f64; 2]>,
    /// Median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_s: Option<f64>,
    /// Median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<f64>,
}

impl Metrics {
    /// Figures of a task that counts right answers.
    pub(super) fn of_answers(correct: u64, questions: u64) -> Self {
        Self {
            correct: Some(correct),
            questions: Some(questions),
            accuracy: Some(correct as f64 / questions as f64),
            accuracy_interval: wilson(correct, questions),
            ..Self::default()
        }
    }
}

/// Wilson's 95% interval of a share, from its least to its most within 0 to 1, as if the questions were independent; `None`
/// for no questions, or more right answers than those.
pub fn wilson(correct: u64, questions: u64) -> Option<[f64; 2]> {
    wilson_of_share(correct as f64 / questions as f64, questions)
}

/// The same for a mean of figures from 0 to 1, one a sample: these vary no more than answers that are right or wrong, so that it
/// is rather too wide.
pub(super) fn wilson_of_share(share: f64, samples: u64) -> Option<[f64; 2]> {
    const Z: f64 = 1.959_963_984_540_054; // 97.5% of the standard normal distribution lie below
    if samples == 0 || !(0.0..=1.0).contains(&share) {
        return None;
    }
    let n = samples as f64;
    let centre = share + Z * Z / (2.0 * n);
    let reach = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let bound = |x: f64| (x / (1.0 + Z * Z / n)).clamp(0.0, 1.0);
    Some([bound(centre - reach), bound(centre + reach)])
}

/// One prompt and what came of it: a line of `samples.jsonl`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// The task's name; `ppl` also stands for `kl`.
    pub task: String,
    /// The policy's label.
    pub policy: String,
    /// Context length in tokens.
    pub context: usize,
    /// Number of the sample; of a benchmark, of the question.
    pub sample: usize,
    /// Number of the answer, of a benchmark with several to a question.
    #[serde(skip_serializing_if = "is_zero")]
    pub repeat: usize,
    /// The whole prompt, with the turns before it as they went, or the text that was scored.
    pub prompt: String,
    /// What a right answer contains.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// What the model said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Tokens of it, of a benchmark.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generated: Option<usize>,
    /// The verdict.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correct: Option<bool>,
    /// The share that is right, of a task that gives part of the mark.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Negative log-likelihood per token, nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nll: Option<f64>,
    /// KL(full || policy), nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Share of scored tokens before which the most likely token is that of `full`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_match: Option<f64>,
    /// KL at each scored token, the last of which is the last of the context.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kl_by_token: Vec<f32>,
    /// Of this repetition.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_s: Option<f64>,
    /// Of this repetition.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<f64>,
    /// The cache over the whole run; absent in all but the last line of a run that has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv: Option<Stats>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Sample {
    pub(super) fn new(task: Task, contender: &Contender, context: usize, sample: usize) -> Self {
        Self {
            task: task.sampled_as().to_string(),
            policy: contender.label.clone(),
            context,
            sample,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_that_of_wilson() {
        // For none right it is 0 to z^2 / (n + z^2); the others are Newcombe's (1998) examples of the method.
        let z2 = 1.959_963_984_540_054_f64.powi(2);
        let known = [
            (0, 10, 0.0, z2 / (10.0 + z2)),
            (10, 10, 10.0 / (10.0 + z2), 1.0),
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ];
        for (correct, questions, least, most) in known {
            let found = wilson(correct, questions);
            let near = |[low, high]: [f64; 2]| (low - least).abs() < 6e-5 && (high - most).abs() < 6e-5;
            assert!(found.is_some_and(near), "{correct}/{questions}: {found:?}");
        }
        assert_eq!((wilson(0, 0), wilson(3, 2)), (None, None));
        assert_eq!((wilson_of_share(0.25, 8), wilson_of_share(f64::NAN, 8)), (wilson(2, 8), None));
    }
}
