//! A number that was read once and is asked for: the frame of `needle` and `word-key`.

use super::{Contender, Excerpts, Progress, Row, Sample, Sequence, Task, argmax, needle, report::Tally, word_key};
use crate::{
    error::{Error, Result},
    stats::Stats,
};

/// A prompt in two parts.
pub(super) struct Prompt {
    context: Vec<u32>,
    question: Vec<u32>,
    text: String,
    number: String,
    most: usize,
}

impl Prompt {
    /// Cuts a text where its question begins for the last time. The right answer is `number`; an answer may have `most`
    /// tokens.
    ///
    /// # Errors
    /// [`Error::Config`] for a text without the question, and those of the host.
    pub(super) fn new(texts: &Excerpts, text: String, question: &str, number: String, most: usize) -> Result<Self> {
        let at = text.rfind(question);
        let at = at.ok_or_else(|| Error::Config("the chat template drops the user's message".into()))?;
        // One encoding, so that nothing a tokenizer does at the start of a text happens in the middle of the prompt.
        let (all, front) = (texts.subject.encode(&text)?, texts.subject.encode(&text[..at])?);
        let split = all.iter().zip(&front).take_while(|(a, b)| a == b).count();
        Ok(Self { context: all[..split].to_vec(), question: all[split..].to_vec(), text, number, most })
    }
}

/// The prompt of a sample, the same for every contender.
///
/// # Errors
/// [`Error::Config`] for a context that has no room for it, and those of the host.
pub(super) fn prompt(texts: &Excerpts, task: Task, sample: usize) -> Result<Prompt> {
    match task {
        Task::WordKey | Task::WordKeyAware => word_key::prompt(texts, sample),
        _ => needle::prompt(texts, sample),
    }
}

pub(super) fn run(texts: &Excerpts, task: Task, progress: &mut dyn Progress) -> Result<Vec<Row>> {
    let plan = texts.plan;
    let mut tallies = vec![Tally::default(); texts.contenders().len()];
    for sample in 0..plan.samples {
        let prompt = prompt(texts, task, sample)?;
        for (contender, tally) in texts.contenders().iter().zip(&mut tallies) {
            progress.unit(&format!("{task} {} at {}", contender.label, texts.context()));
            let (answer, stats) = answer(texts, task, contender, &prompt)?;
            let right = first_number(&answer) == Some(prompt.number.as_str());
            tally.run(&stats);
            tally.answer(right);
            progress.sample(&Sample {
                prompt: prompt.text.clone(),
                expected: Some(prompt.number.clone()),
                answer: Some(answer),
                correct: Some(right),
                ..Sample::new(&task.to_string(), contender, texts.context(), sample)
            })?;
        }
    }
    Ok(texts.contenders().iter().zip(&tallies).map(|(contender, tally)| tally.row(contender, task, texts)).collect())
}

fn answer(texts: &Excerpts, task: Task, contender: &Contender, prompt: &Prompt) -> Result<(String, Stats)> {
    let mut sequence = texts.subject.open(&contender.policy)?;
    // With `last` the policy compresses what it has read before the question comes.
    sequence.prefill(&prompt.context, matches!(task, Task::Needle | Task::WordKey))?;
    let answer = greedy(texts, &mut *sequence, &prompt.question, prompt.most, |_| Ok(false))?;
    Ok((answer, sequence.stats()))
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
    let mut logits = sequence.prefill(question, true)?;
    let mut answer = vec![];
    while answer.len() < most {
        let token = argmax(&logits);
        if texts.subject.is_end(token) {
            break;
        }
        answer.push(token);
        if is_whole(&answer)? {
            break;
        }
        if answer.len() < most {
            logits = sequence.decode(token)?;
        }
    }
    Ok(texts.subject.decode(&answer)?)
}

/// The first run of digits.
pub(super) fn first_number(text: &str) -> Option<&str> {
    text.split(|c: char| !c.is_ascii_digit()).find(|part| !part.is_empty())
}
