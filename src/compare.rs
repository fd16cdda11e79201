//! Policies side by side on one model: the same texts, the same prompts, the same machine.
//!
//! A host implements [`Subject`] for its models, or a [`Runtime`](crate::runtime::Runtime) is one by way of [`Generating`];
//! [`run`] does the rest. The schema of [`Report`] is documented in
//! `docs/results.md`.
//!
//! | task | what |
//! |---|---|
//! | `ppl` | perplexity of the last tokens of a text, generated one by one with the policy active |
//! | `kl` | KL divergence from `full` at the same tokens, in nats per token |
//! | `token-match` | the share of these tokens at which the most likely next one is that of `full` |
//! | `needle` | a number hidden in text; the policy compresses the text before it sees the question |
//! | `needle-multikey` | the same with four numbers, each with a key of its own, one of which is asked for |
//! | `needle-multivalue` | four numbers under one key, all asked for |
//! | `needle-multiquery` | four numbers, each with a key of its own, all asked for |
//! | `word-key` | a number in one of many lines, each with a key of two words |
//! | `variable-tracking` | the five names that are bound to a value by way of each other |
//! | `common-words` | the ten words of a long list that come most often |
//! | `state` | a state that changes over many steps, which are written down one by one; an early one is asked for |
//! | `recall` | facts among sentences, asked for one after the other once the policy has compressed the text |
//! | `chain` | a walk along a map that was compressed before it begins: every step looks back |
//! | `gsm8k`, `math-500`, `aime`, `gpqa-diamond`, `humaneval`, `livecodebench` | a [`benchmark`] from a file of the user's |
//! | `speed` | tokens per second of prefill and decode |
//!
//! From `needle` to `state` each has a second setting, `needle-aware` and so on: the question is part of the prompt that is
//! compressed. All but `ppl`, `kl`, `token-match`, the needles and the benchmarks make up their own text.

pub mod benchmark;
mod common_words;
mod generating;
mod likelihood;
mod log;
mod needle;
mod needles;
#[cfg(test)]
mod oracle;
pub mod problems;
mod report;
mod retrieval;
pub mod significance;
mod speed;
mod state;
mod summary;
mod sweep;
mod trace;
mod turns;
mod variable_tracking;
mod word_key;

pub use generating::Generating;
pub use report::{Asked, Host, Metrics, Planned, Report, Row, SCHEMA, Sample, wilson};
pub use significance::{Against, Measure};
pub use sweep::{fit, sweepable};
pub use trace::{Trace, trace};

use crate::{
    error::{Error, Result},
    logits::argmax,
    params::Param,
    policies::Full,
    policy::Policy,
    runtime::{HostError, TextModel},
    spec::keyword_param,
    stats::Stats,
};
use benchmark::{Benchmark, Exam, Sampling};
use log::Log;
use problems::Problem;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{fmt, sync::Arc};

/// A model under comparison.
pub trait Subject: TextModel {
    /// A new sequence under a policy. Those before need not be gone, unless the subject [only
    /// generates](Self::only_generates).
    fn open(&self, policy: &Arc<dyn Policy>) -> std::result::Result<Box<dyn Sequence + '_>, HostError>;
    /// What [`Task::Kl`] and [`Task::TokenMatch`] measure against: a new sequence that keeps everything. A subject that stores
    /// keys and values in 8 bits does not here, so that `full` shows what they cost.
    fn reference(&self) -> std::result::Result<Box<dyn Sequence + '_>, HostError> {
        let full: Arc<dyn Policy> = Arc::new(Full {});
        self.open(&full)
    }

    /// Whether it gives tokens in place of logits, and reads the prompt of a sequence once and as a whole. Then only tasks
    /// that [generate](Task::generates) can be run.
    fn only_generates(&self) -> bool {
        false
    }
}

/// One sequence of a model.
pub trait Sequence {
    /// Reads tokens; `last` ends the prompt. What comes after the last one.
    fn prefill(&mut self, tokens: &[u32], last: bool) -> std::result::Result<Next, HostError>;
    /// Goes on from a token. What comes after it.
    fn decode(&mut self, token: u32) -> std::result::Result<Next, HostError>;
    /// What the cache held so far.
    fn stats(&self) -> Stats;
    /// Positions that each KV head of a layer holds now, in order.
    fn held(&self, layer: usize) -> Vec<Vec<u32>>;
}

/// What a model says of the next token.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// How likely each is.
    Logits(Vec<f32>),
    /// The most likely one.
    Token(u32),
    /// Nothing: the prompt has not ended.
    Unknown,
}

impl Next {
    /// The most likely token; the first of equals.
    ///
    /// # Errors
    /// [`Error::Config`] in the middle of a prompt.
    pub fn most_likely(&self) -> Result<u32> {
        match self {
            Self::Logits(logits) => Ok(argmax(logits)),
            Self::Token(token) => Ok(*token),
            Self::Unknown => Err(Error::Config("a runtime was asked to go on in the middle of a prompt".into())),
        }
    }

    /// As [`logits`](Self::logits), taken out.
    #[cfg(feature = "router")]
    pub(crate) fn into_logits(self) -> Result<Vec<f32>> {
        match self {
            Self::Logits(logits) => Ok(logits),
            _ => Err(Error::Config("this runtime gives no logits".into())),
        }
    }

    /// The logits.
    ///
    /// # Errors
    /// [`Error::Config`] where there are none.
    pub fn logits(&self) -> Result<&[f32]> {
        match self {
            Self::Logits(logits) => Ok(logits),
            _ => Err(Error::Config("this runtime gives no logits".into())),
        }
    }
}

impl From<HostError> for Error {
    fn from(error: HostError) -> Self {
        Self::Host(error)
    }
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Task {
    /// Perplexity.
    Ppl,
    /// KL divergence from `full`.
    Kl,
    /// Tokens that `full` would have chosen as well.
    TokenMatch,
    /// A question about what was read.
    Ask(Ask, Setting),
    /// Retrieval of several facts in turns, compressed before the questions are known.
    Recall,
    /// A walk along a map that is compressed before it begins.
    Chain,
    /// A benchmark of the user's own file.
    Exam(Benchmark),
    /// Tokens per second.
    Speed,
}

/// What is read and asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ask {
    /// A number hidden in text.
    Needle,
    /// One of several numbers hidden in text, by its key.
    NeedleMultikey,
    /// Several numbers hidden in text under one key.
    NeedleMultivalue,
    /// Several numbers hidden in text, each under its key.
    NeedleMultiquery,
    /// A number in one of many lines.
    WordKey,
    /// Names bound to a value by way of each other.
    VariableTracking,
    /// The words of a list that come most often.
    CommonWords,
    /// A state that changes over many steps, all of which are written down.
    State,
}
keyword_param!(
    Ask: Needle = "needle", NeedleMultikey = "needle-multikey", NeedleMultivalue = "needle-multivalue",
    NeedleMultiquery = "needle-multiquery", WordKey = "word-key", VariableTracking = "variable-tracking",
    CommonWords = "common-words", State = "state"
);

/// When a policy compresses what it has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Setting {
    /// Before the question is seen.
    Before,
    /// With the question, at once.
    Aware,
}

/// Ends the names of tasks that are [`Setting::Aware`].
const AWARE: &str = "-aware";

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ppl => f.write_str("ppl"),
            Self::Kl => f.write_str("kl"),
            Self::TokenMatch => f.write_str("token-match"),
            Self::Ask(ask, Setting::Before) => write!(f, "{ask}"),
            Self::Ask(ask, Setting::Aware) => write!(f, "{ask}{AWARE}"),
            Self::Recall => f.write_str("recall"),
            Self::Chain => f.write_str("chain"),
            Self::Exam(benchmark) => write!(f, "{benchmark}"),
            Self::Speed => f.write_str("speed"),
        }
    }
}

impl Task {
    fn read(name: &str) -> Option<Self> {
        if let Some(task) = [Self::Ppl, Self::Kl, Self::TokenMatch, Self::Recall, Self::Chain, Self::Speed]
            .into_iter()
            .find(|task| task.to_string() == name)
        {
            return Some(task);
        }
        if let Some(benchmark) = Benchmark::read(name) {
            return Some(Self::Exam(benchmark));
        }
        match name.strip_suffix(AWARE) {
            Some(name) => Ask::read(name).map(|ask| Self::Ask(ask, Setting::Aware)),
            None => Ask::read(name).map(|ask| Self::Ask(ask, Setting::Before)),
        }
    }

    /// A list separated by commas.
    ///
    /// # Errors
    /// [`Error::Config`] naming what is no task, or for an empty list.
    pub fn parse_list(list: &str) -> Result<Vec<Self>> {
        let names = list.split(',').map(str::trim).filter(|name| !name.is_empty());
        let asks = Ask::KIND.trim().replace(' ', ", ");
        let unknown = |name: &str| {
            let (count, exams) = (asks.split(',').count(), Benchmark::names());
            format!(
                "unknown task `{name}` (known: ppl, kl, token-match, {asks}, the last {count} also with {AWARE}; recall, chain, {exams}, speed)"
            )
        };
        let read = |name| Self::read(name).ok_or_else(|| Error::Config(unknown(name)));
        let mut tasks = names.map(read).collect::<Result<Vec<_>>>()?;
        tasks.sort();
        tasks.dedup();
        if tasks.is_empty() { Err(Error::Config("the list names no task".into())) } else { Ok(tasks) }
    }

    /// The task that its samples are written down as: tasks that share their runs share these.
    fn sampled_as(self) -> Self {
        if self.is_likelihood() { Self::Ppl } else { self }
    }

    /// Whether it scores the tokens of a text.
    fn is_likelihood(self) -> bool {
        matches!(self, Self::Ppl | Self::Kl | Self::TokenMatch)
    }

    /// Whether its prompts are cut from a text that somebody gives.
    pub fn cuts_text(self) -> bool {
        match self {
            Self::Ppl | Self::Kl | Self::TokenMatch => true,
            Self::Ask(ask, _) => ask.is_needle(),
            Self::Recall | Self::Chain | Self::Exam(_) | Self::Speed => false,
        }
    }

    /// Whether it can do with a model that only generates: it reads one prompt, and the answer is all it looks at.
    pub fn generates(self) -> bool {
        matches!(self, Self::Ask(_, Setting::Aware) | Self::Exam(_))
    }

    /// A problem of the task's own, of up to this many bytes; `None` for a task that has none.
    fn problem(self, rng: &mut StdRng, bytes: usize) -> Option<Problem> {
        match self {
            Self::Recall => Some(problems::recall(rng, bytes)),
            Self::Chain => Some(problems::chain(rng, bytes)),
            _ => None,
        }
    }
}

impl Ask {
    /// Whether it is hidden in a text that somebody gives.
    fn is_needle(self) -> bool {
        matches!(self, Self::Needle | Self::NeedleMultikey | Self::NeedleMultivalue | Self::NeedleMultiquery)
    }
}

/// Whether the tasks can do with this text, or without one.
///
/// # Errors
/// [`Error::Config`] naming the task that needs a text.
pub fn check_text(tasks: &[Task], text: Option<&str>) -> Result<()> {
    match tasks.iter().find(|task| task.cuts_text()) {
        Some(task) if text.is_none() => Err(Error::Config(format!(
            "the task {task} cuts its prompts from a text: give one by --text, or take --tasks \
             word-key,recall,chain,speed, which need none"
        ))),
        _ => Ok(()),
    }
}

/// A policy with the text that names it in tables.
#[derive(Debug, Clone)]
pub struct Contender {
    /// As the user wrote it, or as a sweep made it.
    pub label: String,
    /// The policy.
    pub policy: Arc<dyn Policy>,
}

/// The policies to compare at one context length in tasks that share their runs.
#[derive(Debug, Clone)]
pub struct Contest {
    /// Context length in tokens.
    pub context: usize,
    /// One element of [`task_groups`].
    pub tasks: Vec<Task>,
    /// The policies.
    pub contenders: Vec<Contender>,
}

/// What to compare.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What to measure.
    pub contests: Vec<Contest>,
    /// Texts per context, prompts per context, repetitions of a timing.
    pub samples: usize,
    /// Chooses texts, numbers and depths.
    pub seed: u64,
    /// The text that prompts are cut from, for tasks that do ([`Task::cuts_text`]); `speed` takes it if there is one.
    pub text: Option<String>,
    /// The files of the benchmarks among the tasks.
    pub exams: Vec<Exam>,
    /// How their answers are drawn.
    pub sampling: Sampling,
}

impl Plan {
    /// Sequences of a contender in a contest.
    fn runs(&self, contest: &Contest) -> usize {
        match contest.tasks.first() {
            Some(Task::Exam(benchmark)) => {
                let exam = self.exams.iter().find(|exam| exam.benchmark == *benchmark);
                exam.map_or(0, |exam| exam.questions.len()) * self.sampling.repeats
            }
            _ => self.samples,
        }
    }
}

/// Told of progress.
pub trait Progress {
    /// This many units of work, samples of one policy, lie ahead.
    fn start(&mut self, units: u64);
    /// A unit begins.
    fn unit(&mut self, what: &str);
    /// A sample is done; a unit may have several.
    fn sample(&mut self, sample: &Sample) -> Result<()>;
}

/// Measures every contender at every task and context. `done`: samples of the same plan that a run which was stopped has left
/// behind, in their order up to the last that has [`Sample::kv`]; these are not measured again.
///
/// # Errors
/// [`Error::Config`] for a plan that cannot be met (naming what to change), else whatever stops the host.
pub fn run(subject: &dyn Subject, plan: &Plan, done: Vec<Sample>, progress: &mut dyn Progress) -> Result<Vec<Row>> {
    check(plan)?;
    check_subject(subject, plan)?;
    let contests = plan.contests.iter().map(|contest| Excerpts { subject, plan, contest });
    let contests = contests.map(|texts| Ok((foresee(&texts)?, texts))).collect::<Result<Vec<_>>>()?;
    let mut log = Log::new(plan, done, progress);
    for (prompts, texts) in contests {
        let contest = texts.contest;
        match contest.tasks.first() {
            Some(Task::Ppl | Task::Kl | Task::TokenMatch) => likelihood::run(&texts, &mut log)?,
            Some(Task::Ask(ask, setting)) => retrieval::run(&texts, *ask, *setting, &mut log)?,
            Some(task @ (Task::Recall | Task::Chain)) => turns::run(&texts, *task, &mut log)?,
            Some(Task::Exam(benchmark)) => benchmark::run(&texts, *benchmark, &prompts, &mut log)?,
            Some(Task::Speed) => speed::run(&texts, &mut log)?,
            None => {}
        }
    }
    Ok(summary::rows(plan, &log.samples()))
}

/// A text that is too short, or a context that cannot be filled, is told before the first run. The prompts of a benchmark, none
/// of other tasks.
fn foresee(texts: &Excerpts) -> Result<Vec<Vec<u32>>> {
    let Some(&task) = texts.contest.tasks.first() else { return Ok(vec![]) };
    let prompts = match task {
        Task::Exam(benchmark) => benchmark::prompts(texts, benchmark::exam(texts, benchmark)?)?,
        _ => vec![],
    };
    if let Task::Ask(ask, _) = task
        && !ask.is_needle()
    {
        retrieval::prompt(texts, ask, 0)?;
    }
    // A text that is there is what speed is measured on, and what the trace of a benchmark shows.
    let may_cut = task == Task::Speed || (matches!(task, Task::Exam(_)) && texts.context() <= trace::LONGEST);
    if task.cuts_text() || (texts.plan.text.is_some() && may_cut) {
        texts.cut(&mut texts.rng(0), texts.context())?;
    }
    Ok(prompts)
}

fn check(plan: &Plan) -> Result<()> {
    let refuse = |what: &str| Err(Error::Config(what.to_string()));
    if plan.samples == 0 {
        return refuse("samples=0: at least one");
    }
    plan.sampling.check()?;
    let tasks: Vec<Task> = plan.contests.iter().flat_map(|contest| contest.tasks.clone()).collect();
    benchmark::check_exams(&tasks, &plan.exams, &plan.sampling)?;
    let empty = plan.contests.is_empty() || plan.contests.iter().any(|contest| contest.contenders.is_empty());
    if empty {
        return refuse("nothing to compare: name policies, tasks and contexts");
    }
    for (i, contest) in plan.contests.iter().enumerate() {
        let is_same = |other: &Contest| other.context == contest.context && other.tasks == contest.tasks;
        if plan.contests[..i].iter().any(is_same) {
            return refuse(&format!("context={} is there twice: name it once", contest.context));
        }
        check_text(&contest.tasks, plan.text.as_deref())?;
        check_context(contest.context)?;
        check_labels(contest)?;
    }
    Ok(())
}

/// Whether every task of a plan can be run over a subject.
///
/// # Errors
/// [`Error::Config`] naming the task that cannot, and why.
pub fn check_subject(subject: &dyn Subject, plan: &Plan) -> Result<()> {
    if !subject.only_generates() {
        return Ok(());
    }
    let mut tasks = plan.contests.iter().flat_map(|contest| &contest.tasks);
    if let Some(task) = tasks.find(|task| !task.generates()) {
        return Err(Error::Config(format!(
            "the task {task} cannot run here: the runtime gives no logits, and reads a prompt once and as a whole; take tasks \
             whose names end in {AWARE}, or benchmarks"
        )));
    }
    if plan.sampling.temperature > 0.0 {
        let temperature = plan.sampling.temperature;
        return Err(Error::Config(format!(
            "temperature={temperature} cannot be had here: the runtime gives no logits"
        )));
    }
    Ok(())
}

/// Samples are told apart by the labels of their policies.
fn check_labels(contest: &Contest) -> Result<()> {
    let labels: Vec<&str> = contest.contenders.iter().map(|contender| contender.label.as_str()).collect();
    match labels.iter().enumerate().find(|(i, label)| labels[..*i].contains(label)) {
        Some((_, label)) => Err(Error::Config(format!("the policy {label} is named twice: once is enough"))),
        None => Ok(()),
    }
}

fn check_context(context: usize) -> Result<()> {
    if context >= MIN_CONTEXT {
        return Ok(());
    }
    Err(Error::Config(format!("context={context} is too short: {MIN_CONTEXT} or more")))
}

/// Bytes of a page of made-up sentences.
const PAGE: usize = 1024;
/// The shortest context in which every task has room.
const MIN_CONTEXT: usize = 128;

/// The tasks in groups that share their runs.
pub fn task_groups(tasks: &[Task]) -> Vec<Vec<Task>> {
    let (likelihood, others): (Vec<Task>, Vec<Task>) = tasks.iter().partition(|task| task.is_likelihood());
    let groups = std::iter::once(likelihood).chain(others.into_iter().map(|task| vec![task]));
    groups.filter(|group| !group.is_empty()).collect()
}

/// Excerpts of the text at one context length.
struct Excerpts<'a> {
    subject: &'a dyn Subject,
    plan: &'a Plan,
    contest: &'a Contest,
}

impl Excerpts<'_> {
    fn context(&self) -> usize {
        self.contest.context
    }

    /// Random numbers of one sample, the same for every contender.
    fn rng(&self, sample: usize) -> StdRng {
        StdRng::seed_from_u64(
            self.plan.seed.wrapping_mul(1_000_003).wrapping_add((self.context() * 4099 + sample) as u64),
        )
    }

    /// A text in tokens, parted at a byte. It is encoded as one, so that nothing a tokenizer does at the start of a text happens in
    /// the middle; where it goes on from its front otherwise than that ends, the second part begins earlier.
    fn parted(&self, text: &str, at: usize) -> Result<[Vec<u32>; 2]> {
        let (mut all, front) = (self.subject.encode(text)?, self.subject.encode(&text[..at])?);
        let split = all.iter().zip(&front).take_while(|(a, b)| a == b).count();
        let behind = all.split_off(split);
        Ok([all, behind])
    }

    /// `tokens` consecutive tokens of the text from a random place, with their text. Without a text, of made-up sentences.
    fn cut(&self, rng: &mut StdRng, tokens: usize) -> Result<(Vec<u32>, String)> {
        let made_up: String;
        let text = match &self.plan.text {
            Some(text) => text,
            None => {
                // In pages, or facts would lie far between.
                let pages = (0..tokens.div_ceil(PAGE / 16)).map(|_| problems::recall(rng, PAGE).context);
                made_up = pages.collect::<Vec<_>>().join(" ");
                &made_up
            }
        };
        // English has about 4 bytes a token; 12 leave room for any text without encoding all of it.
        let reach = (tokens * 12).min(text.len());
        let start = floor_boundary(text, rng.random_range(0..=text.len() - reach));
        let end = floor_boundary(text, start + reach);
        let mut encoded = self.subject.encode(&text[start..end])?;
        if encoded.len() < tokens {
            let (bytes, have) = (reach, encoded.len());
            return Err(Error::Config(format!(
                "the text is too short: {bytes} bytes of it are {have} tokens, and {tokens} are needed; give a longer --text"
            )));
        }
        encoded.truncate(tokens);
        let excerpt = self.subject.decode(&encoded)?;
        Ok((encoded, excerpt))
    }
}

fn floor_boundary(text: &str, mut at: usize) -> usize {
    at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}
