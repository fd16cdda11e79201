//! Questions about what was read once: the frame of every [`Ask`].

use super::{
    Ask, Contender, Excerpts, Log, Next, Sample, Sequence, Setting, Task, common_words, needle, needles, state,
    variable_tracking, word_key,
};
use crate::{
    error::{Error, Result},
    stats::Stats,
};
use std::ops::RangeInclusive;

/// A prompt in two parts, and what to make of its answer.
pub(super) struct Prompt {
    context: Vec<u32>,
    question: Vec<u32>,
    text: String,
    expected: Expected,
    most: usize,
}

/// A right answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expected {
    /// Its first number.
    Number(String),
    /// All of these anywhere in it, in any case of letters; some of them are worth their share. RULER's `string_match_all`.
    All(Vec<String>),
    /// Its last line, which nothing follows.
    LastLine(String),
}

impl Expected {
    /// The share of the answer that is right, 0 to 1.
    fn score(&self, answer: &str) -> f64 {
        match self {
            Self::Number(number) => (first_number(answer) == Some(number)) as u8 as f64,
            Self::All(parts) => {
                let answer = answer.to_lowercase();
                let found = parts.iter().filter(|part| answer.contains(&part.to_lowercase())).count();
                found as f64 / parts.len() as f64
            }
            Self::LastLine(line) => (last_line(answer).trim() == line) as u8 as f64,
        }
    }

    /// Whether nothing more is to come.
    fn is_whole(&self, answer: &str) -> bool {
        let start = |line: &str| line.chars().next();
        match self {
            Self::LastLine(line) => answer.ends_with('\n') && start(last_line(answer)) == start(line),
            Self::Number(_) | Self::All(_) => false,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Number(text) | Self::LastLine(text) => text.clone(),
            Self::All(parts) => parts.join(" "),
        }
    }
}

impl Prompt {
    /// Cuts a text where its question begins for the last time. An answer may have `most` tokens.
    ///
    /// # Errors
    /// [`Error::Config`] for a text without the question, and those of the host.
    pub(super) fn new(texts: &Excerpts, text: String, question: &str, expected: Expected, most: usize) -> Result<Self> {
        let at = text.rfind(question);
        let at = at.ok_or_else(|| Error::Config("the chat template drops the user's message".into()))?;
        let [context, question] = texts.parted(&text, at)?;
        Ok(Self { context, question, text, expected, most })
    }

    /// What is read before the question, and the question.
    pub(super) fn into_parts(self) -> [Vec<u32>; 2] {
        [self.context, self.question]
    }
}

/// The prompt of a sample, the same for every contender.
///
/// # Errors
/// [`Error::Config`] for a context that has no room for it, and those of the host.
pub(super) fn prompt(texts: &Excerpts, ask: Ask, sample: usize) -> Result<Prompt> {
    match ask {
        Ask::Needle => needle::prompt(texts, sample),
        Ask::NeedleMultikey | Ask::NeedleMultivalue | Ask::NeedleMultiquery => needles::prompt(texts, ask, sample),
        Ask::WordKey => word_key::prompt(texts, sample),
        Ask::VariableTracking => variable_tracking::prompt(texts, sample),
        Ask::CommonWords => common_words::prompt(texts, sample),
        Ask::State => state::prompt(texts, sample),
    }
}

/// Steps that end in a token after the prompt, at the most.
pub(super) fn decoded(ask: Ask, context: usize) -> usize {
    match ask {
        Ask::Needle => needle::ANSWER,
        Ask::NeedleMultikey | Ask::NeedleMultivalue | Ask::NeedleMultiquery => needles::ANSWER,
        Ask::WordKey => word_key::ANSWER,
        Ask::VariableTracking => variable_tracking::ANSWER,
        Ask::CommonWords => common_words::ANSWER,
        Ask::State => state::decoded(context),
    }
}

pub(super) fn run(texts: &Excerpts, ask: Ask, setting: Setting, log: &mut Log) -> Result<()> {
    let task = Task::Ask(ask, setting);
    for sample in 0..texts.plan.samples {
        let contenders = log.lacking(texts, task, sample, 0);
        if contenders.is_empty() {
            continue;
        }
        let prompt = prompt(texts, ask, sample)?;
        for contender in contenders {
            log.unit(texts, task, contender);
            let (answer, stats) = answer(texts, setting, contender, &prompt)?;
            let score = prompt.expected.score(&answer);
            log.add(Sample {
                prompt: prompt.text.clone(),
                expected: Some(prompt.expected.text()),
                correct: Some(score == 1.0),
                score: matches!(prompt.expected, Expected::All(_)).then_some(score),
                answer: Some(answer),
                kv: Some(stats),
                ..Sample::new(task, contender, texts.context(), sample)
            })?;
        }
    }
    Ok(())
}

fn answer(texts: &Excerpts, setting: Setting, contender: &Contender, prompt: &Prompt) -> Result<(String, Stats)> {
    let mut sequence = texts.subject.open(&contender.policy)?;
    // With `last` the policy compresses what it has read before the question comes.
    sequence.prefill(&prompt.context, setting == Setting::Before)?;
    let is_whole = at_line_ends(texts, |answer| prompt.expected.is_whole(answer));
    let answer = greedy(texts, &mut *sequence, &prompt.question, prompt.most, is_whole)?;
    Ok((answer, sequence.stats()))
}

/// The largest of `counts` whose prompt and answer take no more tokens than the context has, of a `text` that grows with its
/// count and has `answer(count)` tokens to answer it; `None` if the smallest takes more.
pub(super) fn largest_fitting(
    texts: &Excerpts,
    counts: RangeInclusive<usize>,
    tokens: impl Fn(usize) -> Result<usize>,
) -> Result<Option<usize>> {
    let (context, least) = (texts.context(), *counts.start());
    let (mut fitting, mut too_many) = (least, counts.end() + 1);
    let first = tokens(least)?;
    if first > context {
        return Ok(None);
    }
    let mut a_unit = (first as f64 / least.max(1) as f64).max(1.0);
    while too_many - fitting > 1 {
        // By what a unit has taken so far: a long prompt is encoded a few times only.
        let guess = least + ((context - first) as f64 / a_unit) as usize;
        let guess = guess.clamp(fitting + 1, too_many - 1);
        let taken = tokens(guess)?;
        if taken <= context {
            fitting = guess
        } else {
            too_many = guess
        }
        a_unit = taken.saturating_sub(first).max(1) as f64 / (guess - least) as f64;
    }
    Ok(Some(fitting))
}

/// Asks whether an answer is whole after each token that ends a line.
pub(super) fn at_line_ends(texts: &Excerpts, is_whole: impl Fn(&str) -> bool) -> impl Fn(&[u32]) -> Result<bool> {
    move |answer| {
        let last = &answer[answer.len().saturating_sub(1)..];
        Ok(texts.subject.decode(last)?.contains('\n') && is_whole(&texts.subject.decode(answer)?))
    }
}

/// The most likely answer to a question: to a token that ends a text, to one after which it is whole, or to `most` tokens. The
/// last one is not fed.
pub(super) fn greedy(
    texts: &Excerpts,
    sequence: &mut dyn Sequence,
    question: &[u32],
    most: usize,
    is_whole: impl Fn(&[u32]) -> Result<bool>,
) -> Result<String> {
    Ok(texts.subject.decode(&generate(texts, sequence, question, most, Next::most_likely, is_whole)?)?)
}

/// The same, with tokens that are picked.
pub(super) fn generate(
    texts: &Excerpts,
    sequence: &mut dyn Sequence,
    question: &[u32],
    most: usize,
    mut pick: impl FnMut(&Next) -> Result<u32>,
    is_whole: impl Fn(&[u32]) -> Result<bool>,
) -> Result<Vec<u32>> {
    let mut next = sequence.prefill(question, true)?;
    let mut answer = vec![];
    while answer.len() < most {
        let token = pick(&next)?;
        if texts.subject.is_end(token) {
            break;
        }
        answer.push(token);
        if is_whole(&answer)? {
            break;
        }
        if answer.len() < most {
            next = sequence.decode(token)?;
        }
    }
    Ok(answer)
}

/// The last line that says something.
pub(super) fn last_line(text: &str) -> &str {
    text.trim_end_matches('\n').rsplit('\n').next().unwrap_or_default()
}

/// The first run of digits.
pub(super) fn first_number(text: &str) -> Option<&str> {
    text.split(|c: char| !c.is_ascii_digit()).find(|part| !part.is_empty())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        compare::{
            Contest, Plan,
            oracle::{Notes, Oracle},
            run,
        },
        policies::Full,
    };
    use std::sync::Arc;

    const ASKS: [Ask; 8] = [
        Ask::Needle,
        Ask::NeedleMultikey,
        Ask::NeedleMultivalue,
        Ask::NeedleMultiquery,
        Ask::WordKey,
        Ask::VariableTracking,
        Ask::CommonWords,
        Ask::State,
    ];

    /// Two samples of a task by a model that knows nothing and reads bytes.
    fn play(oracle: &Oracle, ask: Ask, setting: Setting, context: usize) -> Result<Vec<Sample>> {
        let contenders = vec![Contender { label: "full".into(), policy: Arc::new(Full {}) }];
        let contests = vec![Contest { context, tasks: vec![Task::Ask(ask, setting)], contenders }];
        let text = (0..2000).map(|i| format!("Sentence {i} says nothing. ")).collect();
        let mut notes = Notes::default();
        run(
            oracle,
            &Plan { contests, samples: 2, seed: 3, text: Some(text), exams: vec![], sampling: Default::default() },
            vec![],
            &mut notes,
        )?;
        Ok(notes.0)
    }

    #[test]
    fn every_task_fills_its_context_and_compresses_as_its_setting_says() {
        for ask in ASKS {
            let samples = [Setting::Before, Setting::Aware].map(|setting| {
                let oracle = Oracle::new(false);
                let samples = play(&oracle, ask, setting, 3000).unwrap();
                let most = *oracle.most.borrow();
                // A byte a token; a step of `state` takes a few lines, and its wrong answer stops where a right one has 10/13.
                assert!(most <= 3000 && most > if ask == Ask::State { 2400 } else { 2800 }, "{ask}: {most}");
                let compressed = oracle.compressed.borrow();
                assert_eq!(compressed.len(), if setting == Setting::Before { 4 } else { 2 }, "{ask}");
                let (wholes, fronts): (Vec<_>, Vec<_>) =
                    compressed.iter().partition(|text| samples.iter().any(|s| s.prompt == **text));
                let ends_before = |text: &str, s: &Sample| s.prompt.starts_with(text) && text.ends_with("\n\n");
                assert!(wholes.len() == 2, "{ask}");
                assert!(fronts.iter().all(|text| samples.iter().any(|s| ends_before(text, s))), "{ask}");
                samples
            });
            let prompts = |samples: &[Sample]| samples.iter().map(|s| s.prompt.clone()).collect::<Vec<_>>();
            assert_eq!(prompts(&samples[0]), prompts(&samples[1]), "the same is asked in both settings");
            assert_ne!(samples[0][0].prompt, samples[0][1].prompt);
            assert!(samples[0].iter().all(|s| s.correct == Some(false)), "{ask}");
            // All but what has to be worked out was read.
            let read = |s: &Sample| s.expected.as_ref().unwrap().split(' ').all(|part| s.prompt.contains(part));
            assert!(ask == Ask::State || samples[0].iter().all(read), "{ask}");
            assert!(play(&Oracle::new(false), ask, Setting::Before, 200).is_err(), "{ask} has no room");
        }
    }

    #[test]
    fn parts_count_and_numbers_and_last_lines_do_not() {
        let all = Expected::All(vec!["QWERT".into(), "ASDFG".into(), "1234567".into(), "7654321".into()]);
        for (answer, share) in [
            ("QWERT, ASDFG, 1234567 and 7654321.", 1.0),
            ("7654321 asdfg", 0.5),
            ("QWERTASDFG", 0.5),
            ("123456 and 765432", 0.0),
            ("", 0.0),
        ] {
            assert_eq!(all.score(answer), share, "{answer}");
        }
        let number = Expected::Number("48213".into());
        for (answer, right) in [
            (" 48213.", true),
            ("It is 48213, not 48214", true),
            ("48,213", false),
            ("482135", false),
            ("7 or 48213", false),
        ] {
            assert_eq!(number.score(answer) == 1.0, right, "{answer}");
        }
        let last = Expected::LastLine("= 35".into());
        for (answer, right) in [
            ("1. amber=35\n= 35\n", true),
            ("= 35", true),
            ("= 35 \n\n", true),
            ("= 35\n2. amber=3\n", false),
            ("= 3", false),
            ("35", false),
        ] {
            assert_eq!(last.score(answer) == 1.0, right, "{answer}");
        }
        assert!(
            last.is_whole("1. amber=35\n= 3\n") && !last.is_whole("1. amber=35\n= 3") && !last.is_whole("1. a=3\n")
        );
    }
}
