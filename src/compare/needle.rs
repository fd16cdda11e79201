//! A number hidden in text.

use super::{Contender, Excerpts, Metrics, Progress, Row, Sample, Task, argmax, report::Runs};
use crate::error::{Error, Result};
use rand::Rng;

const INTRODUCTION: &str =
    "There is an important pass key hidden inside a lot of text. Find it and memorize it. I will ask you about it.\n\n";
const QUESTION: &str = "What is the pass key? Answer with the number only.";
/// Tokens an answer may have.
pub(super) const ANSWER: usize = 16;

/// A prompt in two parts.
struct Prompt {
    context: Vec<u32>,
    question: Vec<u32>,
    text: String,
    number: String,
}

pub(super) fn run(texts: &Excerpts, task: Task, progress: &mut dyn Progress) -> Result<Vec<Row>> {
    let plan = texts.plan;
    let mut correct = vec![0usize; texts.contenders().len()];
    let mut runs = vec![Runs::default(); texts.contenders().len()];
    for sample in 0..plan.samples {
        let prompt = prompt(texts, sample)?;
        for (i, contender) in texts.contenders().iter().enumerate() {
            progress.unit(&format!("{task} {} at {}", contender.label, texts.context()));
            let (answer, stats) = answer(texts, task, contender, &prompt)?;
            let right = first_number(&answer) == Some(prompt.number.as_str());
            correct[i] += right as usize;
            runs[i].add(&stats);
            progress.sample(&Sample {
                prompt: prompt.text.clone(),
                expected: Some(prompt.number.clone()),
                answer: Some(answer),
                correct: Some(right),
                ..Sample::new(&task.to_string(), contender, texts.context(), sample)
            })?;
        }
    }
    let rows = texts.contenders().iter().zip(correct).zip(&runs).map(|((contender, correct), runs)| {
        Row::new(contender, task, texts, Metrics::of_answers(correct as u64, plan.samples as u64), runs)
    });
    Ok(rows.collect())
}

fn prompt(texts: &Excerpts, sample: usize) -> Result<Prompt> {
    let mut rng = texts.rng(sample);
    let number = rng.random_range(10_000..100_000u32).to_string();
    let needle = format!(" The pass key is {number}. Remember it. {number} is the pass key. ");
    let frame = texts.subject.chat(&format!("{INTRODUCTION}{needle}\n\n{QUESTION}"))?;
    let room = texts.context().checked_sub(texts.subject.encode(&frame)?.len() + ANSWER);
    let room = room.filter(|&room| room > 0).ok_or_else(|| {
        Error::Config(format!("context={} leaves no room for text around the question", texts.context()))
    })?;
    let (_, hay) = texts.cut(&mut rng, room)?;
    let depth = sentence_end(&hay, (hay.len() as f64 * rng.random_range(0.05..0.95)) as usize);
    let body = format!("{INTRODUCTION}{}{needle}{}\n\n", &hay[..depth], &hay[depth..]);
    let text = texts.subject.chat(&format!("{body}{QUESTION}"))?;
    let at = text.rfind(QUESTION).ok_or_else(|| Error::Config("the chat template drops the user's message".into()))?;
    // One encoding, so that nothing a tokenizer does at the start of a text happens in the middle of the prompt.
    let (all, front) = (texts.subject.encode(&text)?, texts.subject.encode(&text[..at])?);
    let split = all.iter().zip(&front).take_while(|(a, b)| a == b).count();
    let (context, question) = (all[..split].to_vec(), all[split..].to_vec());
    Ok(Prompt { context, question, text, number })
}

/// The end of the sentence around a byte, or the nearest character boundary if there is none.
fn sentence_end(text: &str, near: usize) -> usize {
    let near = super::floor_boundary(text, near);
    let reach = super::floor_boundary(text, near + 300);
    text[near..reach].find(". ").map_or(near, |at| near + at + 1)
}

fn answer(
    texts: &Excerpts,
    task: Task,
    contender: &Contender,
    prompt: &Prompt,
) -> Result<(String, crate::stats::Stats)> {
    let mut sequence = texts.subject.open(&contender.policy)?;
    // With `last` the policy compresses what it has read before the question comes.
    sequence.prefill(&prompt.context, task == Task::Needle)?;
    let mut logits = sequence.prefill(&prompt.question, true)?;
    let mut answer = vec![];
    while answer.len() < ANSWER {
        let token = argmax(&logits);
        if texts.subject.is_end(token) {
            break;
        }
        answer.push(token);
        if answer.len() < ANSWER {
            logits = sequence.decode(token)?;
        }
    }
    Ok((texts.subject.decode(&answer)?, sequence.stats()))
}

/// The first run of digits.
pub(super) fn first_number(text: &str) -> Option<&str> {
    text.split(|c: char| !c.is_ascii_digit()).find(|part| !part.is_empty())
}
