//! Budgets at which policies hold the same number of entries.

use super::{Task, check_context, likelihood::scored_tokens, problems::Problem, retrieval, speed::GENERATED};
use crate::{
    error::{Error, Result},
    policy::{Budget, Evict, LayerCx, NewTokens, Policy},
    registry::Registry,
    spec::ModelSpec,
};
use candle_core::{DType, Device, Tensor};
use rand::{SeedableRng, rngs::StdRng};
use std::sync::Arc;

/// The policy `text` with its budget (or window size) set so that its mean number of live entries over the steps of a
/// task at this context is the dense mean divided by `ratio`, as near as whole entries allow. A budget that is given is
/// replaced; the parameter is the one without a default (`budget`, `size`).
///
/// # Errors
/// [`Error::Policy`] for a text that does not parse, or a policy without such a parameter (DMS follows its gates: move it
/// by `bias`); [`Error::OutOfReach`] for one that cannot hold so few.
pub fn fit(
    registry: &Registry,
    text: &str,
    spec: &ModelSpec,
    task: Task,
    context: usize,
    ratio: f64,
) -> Result<Arc<dyn Policy>> {
    let refuse = |what: String| Error::Policy { text: text.to_string(), reasons: vec![what] };
    check_context(context)?;
    if !(ratio.is_finite() && ratio >= 1.0) {
        return Err(refuse(format!("a compression of {ratio} is not accepted: 1 or more")));
    }
    let run = Run::of(task, context);
    let target = run.dense() / ratio;
    let parameter = parameter(registry, text).map_err(refuse)?;
    let with = |n: usize| -> Result<(String, f64)> {
        let text = set(text, parameter, n);
        let policy = registry.parse(&text)?;
        let live = run.live(&*policy, spec).map_err(|e| refuse(e.to_string()))?;
        Ok((text, live))
    };
    let accepts = |n: usize| registry.parse(&set(text, parameter, n)).is_ok();
    // The mean rises with the budget, from the smallest the policy accepts.
    let (mut low, mut high) = (smallest_accepted(1, context, accepts), context);
    if low > context {
        return Err(registry
            .parse(&set(text, parameter, context))
            .err()
            .unwrap_or_else(|| refuse("no budget fits".into())));
    }
    let smallest = with(low)?.1;
    if smallest > target * 1.02 {
        let (smallest, target) = (smallest.ceil(), target.floor());
        return Err(Error::OutOfReach(format!(
            "holds {smallest} entries a head at the least, {ratio}x allows {target}"
        )));
    }
    while high - low > 1 {
        let middle = (low + high) / 2;
        if with(middle)?.1 <= target { low = middle } else { high = middle }
    }
    let (below, above) = (with(low)?, with(high)?);
    registry.parse(if target - below.1 <= above.1 - target { &below.0 } else { &above.0 })
}

/// Whether [`fit`] can set the policy's budget. One that has none is compared as it is.
pub fn sweepable(registry: &Registry, text: &str) -> bool {
    parameter(registry, text).is_ok()
}

/// The first number of `from..=to` for which `accepts` holds, `to + 1` if none; `accepts` is monotone.
fn smallest_accepted(from: usize, to: usize, accepts: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (from, to + 1);
    while low < high {
        let middle = (low + high) / 2;
        if accepts(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// The byte range of the innermost policy of a text.
fn innermost(text: &str) -> std::ops::Range<usize> {
    let start = text.rfind('(').map_or(0, |at| at + 1);
    let end = text[start..].find(')').map_or(text.len(), |at| start + at);
    // `every(n, policy)`: the number is not part of it.
    let number = text[start..end].split_once(',').filter(|(first, _)| first.trim().parse::<u32>().is_ok());
    (start + number.map_or(0, |(first, _)| first.len() + 1))..end
}

fn parameter(registry: &Registry, text: &str) -> std::result::Result<&'static str, String> {
    if text.contains("per-layer") {
        return Err("per-layer cannot be swept: it has a budget for each range".into());
    }
    let inner = &text[innermost(text)];
    let name = inner.split(':').next().unwrap_or_default().trim();
    let entry = registry.entries().iter().find(|e| e.info.name == name);
    let required = |e: &crate::registry::Entry| e.info.params.iter().find(|p| p.default.is_none()).map(|p| p.name);
    let found = entry.and_then(required).filter(|name| ["budget", "size"].contains(name));
    found.ok_or_else(|| format!("`{name}` has no budget to sweep"))
}

/// The text with `parameter=n` in its innermost policy.
fn set(text: &str, parameter: &str, n: usize) -> String {
    let range = innermost(text);
    let inner = text[range.clone()].trim();
    let (name, params) = inner.split_once(':').unwrap_or((inner, ""));
    let is_other = |p: &&str| !p.is_empty() && p.split('=').next().map(str::trim) != Some(parameter);
    let others: String = params.split(',').map(str::trim).filter(is_other).map(|p| format!(",{p}")).collect();
    let space = if text[..range.start].ends_with(',') { " " } else { "" };
    format!("{}{space}{name}:{parameter}={n}{others}{}", &text[..range.start], &text[range.end..])
}

/// The shape of a run: the steps that end in a token.
struct Run {
    steps: Vec<Step>,
}

/// One of them. Prefills are ends of a prompt or of a question.
#[derive(Debug, Clone, Copy)]
enum Step {
    Prefill(usize),
    Decode,
}

impl Step {
    fn tokens(self) -> usize {
        match self {
            Self::Prefill(tokens) => tokens,
            Self::Decode => 1,
        }
    }
}

impl Run {
    fn of(task: Task, context: usize) -> Self {
        match task {
            Task::Ppl | Task::Kl | Task::TokenMatch => Self::of_prompt(context, scored_tokens(context) - 1), // the last is scored, not fed
            Task::Ask(ask, _) => Self::of_prompt(context, retrieval::decoded(ask, context)),
            Task::Exam(_) => Self::of_prompt(context, context - (context / 4).min(QUESTION)),
            Task::Speed => Self::of_prompt(context, GENERATED),
            Task::Recall | Task::Chain => Self::of_problems(task, context),
        }
    }

    fn of_prompt(context: usize, decoded: usize) -> Self {
        let decoded = decoded.min(context - 1);
        Self { steps: prompt_and_answer(context - decoded, decoded).collect() }
    }

    /// The middle one of some problems of a byte a token. Where a token has more bytes the parts of a problem are longer,
    /// and in about the same proportions.
    fn of_problems(task: Task, context: usize) -> Self {
        let problem = |seed| task.problem(&mut StdRng::seed_from_u64(seed), context);
        let mut runs: Vec<Self> = (0..PROBLEMS).filter_map(problem).map(|problem| Self::of_problem(&problem)).collect();
        runs.sort_by(|a, b| a.dense().total_cmp(&b.dense()));
        let middle = runs.len() / 2;
        runs.swap_remove(middle)
    }

    fn of_problem(problem: &Problem) -> Self {
        let turns = problem.turns.iter().enumerate().flat_map(|(i, turn)| {
            let newline = (i > 0) as usize; // that of the answer before
            prompt_and_answer(newline + turn.question.len(), turn.answer.len() - 1)
        });
        Self { steps: std::iter::once(Step::Prefill(problem.context.len())).chain(turns).collect() }
    }

    /// Mean entries of a dense row over the steps.
    fn dense(&self) -> f64 {
        let seen = self.steps.iter().scan(0, |seen, step| {
            *seen += step.tokens();
            Some(*seen)
        });
        seen.sum::<usize>() as f64 / self.steps.len() as f64
    }

    /// Mean entries of a row under the policy: counted, not run.
    fn live(&self, policy: &dyn Policy, spec: &ModelSpec) -> Result<f64> {
        let layers = (0..spec.layers).map(|layer| self.live_in_layer(policy, &LayerCx { layer, spec }));
        Ok(layers.collect::<Result<Vec<f64>>>()?.iter().sum::<f64>() / spec.layers as f64)
    }

    fn live_in_layer(&self, policy: &dyn Policy, cx: &LayerCx) -> Result<f64> {
        let (when, protect) = (policy.when(cx), policy.protect(cx));
        let marks_all = matches!(policy.on_write(cx, &one_token(cx.spec)?)?.evict, Evict::Always);
        let shielded = |seen: usize| seen.min(protect.sinks as usize + protect.recent as usize) as f64;
        let trimmed = |live: f64, seen: usize| match policy.budget(cx, seen) {
            Budget::Unlimited => live,
            Budget::PerHead(n) => live.min(n.floor().max(shielded(seen))),
            Budget::Heads(n) => live.min(n.iter().sum::<usize>() as f64 / n.len().max(1) as f64),
            Budget::Pooled { total, .. } => live.min((total as f64 / cx.spec.kv_heads as f64).max(shielded(seen))),
        };
        let (mut live, mut seen, mut decoded, mut sum) = (0.0, 0, 0, 0.0);
        for step in &self.steps {
            seen += step.tokens();
            live = if marks_all { shielded(seen) } else { live + step.tokens() as f64 };
            let trims = match step {
                Step::Prefill(_) => when.prefill_end,
                Step::Decode => {
                    decoded += 1;
                    when.every.is_some_and(|n| usize::is_multiple_of(decoded, n.get() as usize))
                }
            };
            if trims {
                live = trimmed(live, seen);
            }
            sum += live;
        }
        Ok(sum / self.steps.len() as f64)
    }
}

/// Tokens of a benchmark's question, about; the rest of the context is for the answer.
const QUESTION: usize = 256;

/// Problems of which the middle one stands for all.
const PROBLEMS: u64 = 15;

fn prompt_and_answer(prompt: usize, decoded: usize) -> impl Iterator<Item = Step> {
    std::iter::once(Step::Prefill(prompt)).chain(std::iter::repeat_n(Step::Decode, decoded))
}

/// A token to ask a policy what it marks.
fn one_token(spec: &ModelSpec) -> Result<NewTokens> {
    let zeros = |heads| Tensor::zeros((1, heads, spec.head_dim), DType::F32, &Device::Cpu);
    Ok(NewTokens {
        q: zeros(spec.q_heads)?,
        k: zeros(spec.kv_heads)?,
        v: zeros(spec.kv_heads)?,
        evict_logits: None,
        positions: Tensor::zeros(1, DType::U32, &Device::Cpu)?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::compare::{Ask, Setting};

    #[test]
    fn a_run_has_the_shape_of_its_problems() {
        let run = Run::of(Task::Chain, 1024);
        assert!((640..1024).contains(&run.steps.len()), "{}", run.steps.len()); // 22 steps of 29 bytes and more
        assert!((0.5..0.7).contains(&(run.dense() / 1024.0)), "{}", run.dense()); // half of the walk, after the map
        let run = Run::of(Task::Recall, 1024);
        let prefills = run.steps.iter().filter(|step| matches!(step, Step::Prefill(_))).count();
        assert!((3..=5).contains(&prefills) && run.steps.len() == prefills + (prefills - 1) * " 0000".len());
        assert!((0.9..1.0).contains(&(run.dense() / 1024.0)), "{}", run.dense());
    }

    #[test]
    fn an_answer_to_a_benchmark_fills_its_budget() {
        let steps = |context| Run::of(Task::Exam(crate::compare::benchmark::Benchmark::Aime), context).steps.len();
        assert_eq!((steps(16_384), steps(400)), (16_384 - 256 + 1, 301));
    }

    #[test]
    fn a_budget_is_found_for_every_task() {
        let (registry, spec) = (Registry::standard(), ModelSpec::new(2, 8, 4, 32));
        let asks =
            [Ask::Needle, Ask::NeedleMultivalue, Ask::WordKey, Ask::VariableTracking, Ask::CommonWords, Ask::State];
        let asks = asks.into_iter().map(|ask| Task::Ask(ask, Setting::Before));
        for task in asks.chain([Task::Ppl, Task::Recall, Task::Chain, Task::Speed]) {
            for text in ["window:sinks=4", "h2o:recent=16", "tova"] {
                let policy = fit(&registry, text, &spec, task, 1024, 4.0).unwrap();
                let run = Run::of(task, 1024);
                let ratio = run.dense() / run.live(&*policy, &spec).unwrap();
                assert!((ratio / 4.0 - 1.0).abs() < 0.03, "{task} {text}: {ratio}");
            }
        }
        // It trims where a prompt or a question ends: a walk outgrows the memory, short answers do not.
        let snapkv = |task| fit(&registry, "snapkv:window=8", &spec, task, 1024, 4.0);
        assert!(snapkv(Task::Recall).is_ok() && matches!(snapkv(Task::Chain), Err(Error::OutOfReach(_))));
    }
}
