//! A number hidden in text.

use super::{
    Excerpts, floor_boundary,
    retrieval::{Expected, Prompt},
};
use crate::error::{Error, Result};
use rand::{Rng, rngs::StdRng};

const INTRODUCTION: &str =
    "There is an important pass key hidden inside a lot of text. Find it and memorize it. I will ask you about it.\n\n";
const QUESTION: &str = "What is the pass key? Answer with the number only.";
/// Tokens an answer may have.
pub(super) const ANSWER: usize = 16;

pub(super) fn prompt(texts: &Excerpts, sample: usize) -> Result<Prompt> {
    let mut rng = texts.rng(sample);
    let number = rng.random_range(10_000..100_000u32).to_string();
    let needle = format!(" The pass key is {number}. Remember it. {number} is the pass key. ");
    let frame = texts.subject.chat(&format!("{INTRODUCTION}{needle}\n\n{QUESTION}"))?;
    let hay = hay(texts, &mut rng, &frame, ANSWER)?;
    let depth = sentence_end(&hay, (hay.len() as f64 * rng.random_range(0.05..0.95)) as usize);
    let body = format!("{INTRODUCTION}{}{needle}{}\n\n", &hay[..depth], &hay[depth..]);
    let text = texts.subject.chat(&format!("{body}{QUESTION}"))?;
    Prompt::new(texts, text, QUESTION, Expected::Number(number), ANSWER)
}

/// Text for the room that a frame, and an answer of up to `answer` tokens, leave in the context.
///
/// # Errors
/// [`Error::Config`] if they leave none, or for a text that is too short, and those of the host.
pub(super) fn hay(texts: &Excerpts, rng: &mut StdRng, frame: &str, answer: usize) -> Result<String> {
    let room = texts.context().checked_sub(texts.subject.encode(frame)?.len() + answer);
    let room = room.filter(|&room| room > 0).ok_or_else(|| {
        Error::Config(format!("context={} leaves no room for text around the question", texts.context()))
    })?;
    Ok(texts.cut(rng, room)?.1)
}

/// The end of the sentence around a byte, or the nearest character boundary if there is none.
pub(super) fn sentence_end(text: &str, near: usize) -> usize {
    let near = floor_boundary(text, near);
    let reach = floor_boundary(text, near + 300);
    text[near..reach].find(". ").map_or(near, |at| near + at + 1)
}
