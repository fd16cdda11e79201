//! Benchmarks whose files the user has: questions with known answers, which a model reasons about at length.

pub mod answer;
pub mod program;
mod read;

use super::{Excerpts, Log, Next, Sample, Task, retrieval::generate};
use crate::{
    error::{Error, Result},
    params::Param,
    spec::keyword_param,
};
use program::{Limits, Tests};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::fmt;

/// A published benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Benchmark {
    /// Word problems of primary school, arXiv 2110.14168: `question`, `answer` with `#### 42` at its end.
    Gsm8k,
    /// 500 problems of MATH, arXiv 2103.03874: `problem`, `answer` in LaTeX.
    Math500,
    /// American Invitational Mathematics Examination: `problem`, `answer`, 0 to 999.
    Aime,
    /// Questions of graduate science with four choices, arXiv 2311.12022: `Question`, `Correct Answer`, `Incorrect Answer 1` to 3.
    GpqaDiamond,
    /// Python functions with tests, arXiv 2107.03374: `prompt`, `entry_point`, `test`.
    HumanEval,
    /// Contest problems, arXiv 2403.07974: `question_content`, `starter_code`, `public_test_cases`, `private_test_cases`,
    /// `metadata`.
    LiveCodeBench,
}
keyword_param!(
    Benchmark: Gsm8k = "gsm8k", Math500 = "math-500", Aime = "aime", GpqaDiamond = "gpqa-diamond",
    HumanEval = "humaneval", LiveCodeBench = "livecodebench"
);

impl Benchmark {
    /// The benchmark of a name, as `gsm8k`.
    ///
    /// # Errors
    /// [`Error::Config`] with the names that are known.
    pub fn named(name: &str) -> Result<Self> {
        let unknown = || Error::Config(format!("unknown benchmark `{name}` (known: {})", Self::names()));
        Self::read(name).ok_or_else(unknown)
    }

    pub(super) fn names() -> String {
        Self::KIND.trim().replace(' ', ", ")
    }

    /// Whether answers are programs, which have to be run.
    pub fn is_code(self) -> bool {
        matches!(self, Self::HumanEval | Self::LiveCodeBench)
    }
}

/// A benchmark's file.
#[derive(Debug, Clone, PartialEq)]
pub struct Exam {
    /// Whose.
    pub benchmark: Benchmark,
    /// In the order of the file.
    pub questions: Vec<Question>,
    /// SHA-256 of the file, for the report.
    pub sha256: String,
}

impl Exam {
    /// Reads a file's text; `seed` orders the choices of each question.
    ///
    /// # Errors
    /// [`Error::Config`] naming the line and the field that is missing or wrong, or for a file without questions.
    pub fn read(benchmark: Benchmark, text: &str, seed: u64, sha256: String) -> Result<Self> {
        Ok(Self { benchmark, questions: read::questions(benchmark, text, seed)?, sha256 })
    }
}

/// What the user says, and what is known of the answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// A message, without the model's chat template.
    pub prompt: String,
    /// The right answer.
    pub key: Key,
}

/// A right answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Key {
    /// A number: [`answer::number`].
    Number(f64),
    /// An expression in LaTeX: [`answer::boxed`], [`answer::same_math`].
    Math(String),
    /// A whole number: [`answer::integer`].
    Integer(u32),
    /// A letter: [`answer::choice`].
    Choice(char),
    /// A program that passes these.
    Program(Tests),
}

impl Key {
    /// Whether an answer is right. A program is run.
    ///
    /// # Errors
    /// Those of [`Tests::pass`].
    pub fn accepts(&self, text: &str) -> Result<bool> {
        Ok(match self {
            Self::Number(known) => answer::number(text).is_some_and(|number| answer::same_number(number, *known)),
            Self::Math(known) => answer::boxed(text).is_some_and(|content| answer::same_math(content, known)),
            Self::Integer(known) => answer::integer(text) == Some(*known),
            Self::Choice(known) => answer::choice(text) == Some(*known),
            Self::Program(tests) => tests.pass(text, Limits::default())?,
        })
    }

    /// As answers are judged by it: unpacked once for all of them.
    fn unpacked(&self) -> Result<Self> {
        Ok(match self {
            Self::Program(tests) => Self::Program(tests.unpacked()?),
            key => key.clone(),
        })
    }

    /// For people to read; nothing for programs.
    fn text(&self) -> Option<String> {
        match self {
            Self::Number(known) => Some(known.to_string()),
            Self::Math(known) => Some(known.clone()),
            Self::Integer(known) => Some(known.to_string()),
            Self::Choice(known) => Some(known.to_string()),
            Self::Program(_) => None,
        }
    }
}

/// How answers to benchmarks are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Answers to each question.
    pub repeats: usize,
    /// Of the distribution that tokens are drawn from; 0 takes the most likely one.
    pub temperature: f64,
    /// Whether programs that a model wrote may be run.
    pub allow_exec: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { repeats: 1, temperature: 0.0, allow_exec: false }
    }
}

impl Sampling {
    /// # Errors
    /// [`Error::Config`] naming what makes no sense.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(Error::Config(what));
        if self.repeats == 0 {
            return refuse("repeats=0: at least one".into());
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return refuse(format!("temperature={} is not accepted: 0 or more", self.temperature));
        }
        if self.repeats > 1 && self.temperature == 0.0 {
            return refuse(format!("repeats={} at temperature=0 are all the same: give a temperature", self.repeats));
        }
        Ok(())
    }
}

/// Whether the tasks have their files, and may do what they have to.
///
/// # Errors
/// [`Error::Config`] for a benchmark without a file or with two, a file without a task, and programs that may not be run.
pub fn check_exams(tasks: &[Task], exams: &[Exam], sampling: &Sampling) -> Result<()> {
    let refuse = |what: String| Err(Error::Config(what));
    for task in tasks {
        let Task::Exam(benchmark) = task else { continue };
        if benchmark.is_code() && !sampling.allow_exec {
            return refuse(format!(
                "the task {benchmark} runs Python programs that the model wrote, with the rights of the user: allow it by \
                 --allow-exec"
            ));
        }
        if !exams.iter().any(|exam| exam.benchmark == *benchmark) {
            return refuse(format!("the task {benchmark} needs its questions: --file {benchmark}=FILE.jsonl"));
        }
    }
    let is_second = |(i, exam): &(usize, &Exam)| exams[..*i].iter().any(|other| other.benchmark == exam.benchmark);
    if let Some((_, exam)) = exams.iter().enumerate().find(is_second) {
        return refuse(format!("{} has two files; give one", exam.benchmark));
    }
    match exams.iter().find(|exam| !tasks.contains(&Task::Exam(exam.benchmark))) {
        Some(Exam { benchmark, .. }) => refuse(format!("a file of {benchmark} is given, which is not among the tasks")),
        None => Ok(()),
    }
}

/// The exam of a task.
pub(super) fn exam<'a>(texts: &Excerpts<'a>, benchmark: Benchmark) -> Result<&'a Exam> {
    let exam = texts.plan.exams.iter().find(|exam| exam.benchmark == benchmark);
    exam.ok_or_else(|| Error::Config(format!("the task {benchmark} has no questions")))
}

/// Prompts of an exam, in tokens.
///
/// # Errors
/// [`Error::Config`] naming a question that leaves no room for an answer, and those of the host.
pub(super) fn prompts(texts: &Excerpts, exam: &Exam) -> Result<Vec<Vec<u32>>> {
    let prompts = exam.questions.iter().enumerate().map(|(i, question)| {
        let prompt = texts.subject.encode(&texts.subject.chat(&question.prompt)?)?;
        let (context, taken) = (texts.context(), prompt.len());
        if taken < context {
            return Ok(prompt);
        }
        Err(Error::Config(format!(
            "context={context} leaves no room for an answer: question {} of {} has {taken} tokens",
            i + 1,
            exam.benchmark
        )))
    });
    prompts.collect()
}

/// `prompts`: of the exam's questions.
pub(super) fn run(texts: &Excerpts, benchmark: Benchmark, prompts: &[Vec<u32>], log: &mut Log) -> Result<()> {
    let (exam, task) = (exam(texts, benchmark)?, Task::Exam(benchmark));
    let Sampling { repeats, temperature, .. } = texts.plan.sampling;
    for (sample, (question, prompt)) in exam.questions.iter().zip(prompts).enumerate() {
        let lacking: Vec<_> = (0..repeats).map(|repeat| log.lacking(texts, task, sample, repeat)).collect();
        if lacking.iter().all(Vec::is_empty) {
            continue;
        }
        let key = question.key.unpacked()?;
        for (repeat, contenders) in lacking.into_iter().enumerate() {
            for contender in contenders {
                log.unit(texts, task, contender);
                let mut sequence = texts.subject.open(&contender.policy)?;
                // The same numbers for every contender.
                let mut rng = StdRng::seed_from_u64(texts.rng(sample).random::<u64>().wrapping_add(repeat as u64));
                let pick = |next: &Next| draw(next, temperature, &mut rng);
                let most = texts.context() - prompt.len();
                let answer = generate(texts, &mut *sequence, prompt, most, pick, |_| Ok(false))?;
                let text = texts.subject.decode(&answer)?;
                log.add(Sample {
                    prompt: question.prompt.clone(),
                    expected: key.text(),
                    correct: Some(key.accepts(&text)?),
                    answer: Some(text),
                    generated: Some(answer.len()),
                    repeat,
                    kv: Some(sequence.stats()),
                    ..Sample::new(task, contender, texts.context(), sample)
                })?;
            }
        }
    }
    Ok(())
}

/// A token of the distribution at a temperature; the most likely one at 0.
fn draw(next: &Next, temperature: f64, rng: &mut StdRng) -> Result<u32> {
    if temperature == 0.0 {
        return next.most_likely();
    }
    let logits = next.logits()?;
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let weights: Vec<f64> = logits.iter().map(|&x| ((x as f64 - top) / temperature).exp()).collect();
    let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
    let drawn = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    // Rounding may leave nothing to draw from.
    drawn.map_or_else(|| next.most_likely(), |token| Ok(token as u32))
}

fn invalid(what: &str, error: &serde_json::Error) -> Error {
    Error::Config(format!("{what}: {error}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        compare::{
            Contender, Contest, Plan, Row,
            oracle::{Notes, Oracle},
            run,
        },
        policies::Full,
    };
    use std::sync::Arc;

    #[test]
    fn a_temperature_draws_by_the_softmax() {
        let logits = [1.0f32, 2.0, 0.0, 2.0];
        let next = Next::Logits(logits.to_vec());
        let share = |temperature: f64| {
            let mut rng = StdRng::seed_from_u64(1);
            let mut counts = [0.0; 4];
            (0..20_000).for_each(|_| counts[draw(&next, temperature, &mut rng).unwrap() as usize] += 1.0 / 20_000.0);
            counts
        };
        for temperature in [0.5, 1.0, 2.0] {
            let weights = logits.map(|x| (x as f64 / temperature).exp());
            let sum: f64 = weights.iter().sum();
            for (found, weight) in share(temperature).iter().zip(weights) {
                assert!((found - weight / sum).abs() < 0.015, "{found} {}", weight / sum);
            }
        }
        assert!((share(0.0)[1] - 1.0).abs() < 1e-9, "the first of the most likely");
    }

    #[test]
    fn keys_accept_by_their_benchmarks_conventions() {
        let accepts = |key: Key, text: &str| key.accepts(text).unwrap();
        assert!(accepts(Key::Number(72.0), "... #### 72") && !accepts(Key::Number(72.0), "#### 71"));
        assert!(accepts(Key::Math("\\frac{1}{2}".into()), "so $\\boxed{0.5}$"));
        assert!(!accepts(Key::Math("5".into()), "it is 5"), "MATH asks for the box");
        assert!(accepts(Key::Integer(25), "\\boxed{025}") && !accepts(Key::Integer(25), "\\boxed{26}"));
        assert!(accepts(Key::Choice('B'), "Answer: B") && !accepts(Key::Choice('B'), "Answer: A"));
    }

    fn play(file: &str, sampling: Sampling, context: usize) -> Result<(Vec<Row>, Vec<Sample>)> {
        let contenders = vec![Contender { label: "full".into(), policy: Arc::new(Full {}) }];
        let contests = vec![Contest { context, tasks: vec![Task::Exam(Benchmark::Gsm8k)], contenders }];
        let exams = vec![Exam::read(Benchmark::Gsm8k, file, 0, String::new())?];
        let plan = Plan { contests, samples: 1, seed: 7, text: None, exams, sampling };
        let mut notes = Notes::default();
        let rows = run(&Oracle::new(false), &plan, vec![], &mut notes)?;
        Ok((rows, notes.0))
    }

    /// The model says `1` for ever.
    #[test]
    fn an_exam_asks_every_question_as_often_as_it_is_told() {
        let ones = "1".repeat(20);
        let file = format!(
            "{{\"question\": \"a?\", \"answer\": \"#### {ones}\"}}\n{{\"question\": \"b?\", \"answer\": \"#### 2\"}}\n"
        );
        let (rows, samples) = play(&file, Sampling::default(), 140).unwrap();
        assert_eq!((rows[0].samples, rows[0].metrics.questions, rows[0].metrics.score), (2, Some(2), None));
        // To the end of the budget, beside the token that begins a text and the template's newline.
        assert!(samples.iter().all(|s| s.prompt.len() + 2 + s.generated.unwrap() == 140), "{samples:?}");
        let drawn = Sampling { repeats: 3, temperature: 0.7, allow_exec: false };
        let (rows, samples) = play(&file, drawn, 300).unwrap();
        let named: Vec<_> = samples.iter().map(|s| (s.sample, s.repeat)).collect();
        assert_eq!(named, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
        assert!(rows[0].metrics.questions == Some(6) && rows[0].metrics.score.is_some());
        let answers = |samples: &[Sample]| samples.iter().map(|s| s.answer.clone().unwrap()).collect::<Vec<_>>();
        assert_ne!(samples[0].answer, samples[1].answer);
        assert_eq!(answers(&samples), answers(&play(&file, drawn, 300).unwrap().1));
    }

    #[test]
    fn what_cannot_be_asked_is_refused_first() {
        let file = format!("{{\"question\": \"{}\", \"answer\": \"#### 2\"}}", "x".repeat(300));
        let refused = |sampling, context, words: &[&str]| {
            let error = play(&file, sampling, context).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        refused(Sampling::default(), 200, &["context=200", "question 1 of gsm8k"]);
        refused(Sampling { repeats: 0, ..Sampling::default() }, 900, &["repeats=0"]);
        refused(Sampling { repeats: 2, ..Sampling::default() }, 900, &["temperature=0", "repeats=2"]);
        refused(Sampling { temperature: f64::NAN, ..Sampling::default() }, 900, &["temperature=NaN"]);
    }
}
