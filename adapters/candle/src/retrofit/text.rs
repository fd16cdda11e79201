//! What gates are trained on: running text, conversations, and facts planted in text that are asked for at its end.

use crate::{
    chat::Message,
    error::{Error, Result},
    loader::Lm,
    retrofit::trainee::Batch,
    tokenizer::Tokenizer,
};
use candle_core::{Device, Tensor};
use kvpolicy::retrofit::facts::{Fact, Kind};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::{collections::HashSet, ops::Range};

/// Where training sequences come from. One depends on its number alone, so that training can go on anywhere.
pub trait Source {
    /// Tokens of sequence `number`, and the weight of each position.
    ///
    /// # Errors
    /// As [`Source::check`].
    fn sequence(&self, number: u64, length: usize) -> Result<Sequence>;

    /// Whether sequences of this length can be made.
    ///
    /// # Errors
    /// [`Error::Model`] if not: why.
    fn check(&self, length: usize) -> Result<()>;

    /// What decides about the sequences: a training goes on only with the same.
    fn settings(&self) -> Value;

    /// Sequences `numbers` of a length, where a model is.
    ///
    /// # Errors
    /// As [`Source::check`].
    fn batch(&self, numbers: Range<u64>, length: usize, device: &Device) -> Result<Batch> {
        self.check(length)?;
        let sequences = (numbers.end - numbers.start) as usize;
        let mut all = Sequence::default();
        for number in numbers {
            let one = self.sequence(number, length)?;
            all.tokens.extend(one.tokens);
            all.weights.extend(one.weights);
        }
        let sum: f32 = all.weights.iter().sum();
        let weights: Vec<f32> = all.weights.iter().map(|weight| weight / sum).collect();
        let tokens = Tensor::new(all.tokens.as_slice(), device)?;
        Ok(Batch { tokens, weights: Tensor::new(weights.as_slice(), device)?, sequences, length })
    }

    /// The same in portions of up to `at_a_time` sequences, at least 1.
    ///
    /// # Errors
    /// As [`Source::check`].
    fn batches(&self, numbers: Range<u64>, at_a_time: usize, length: usize, device: &Device) -> Result<Vec<Batch>> {
        let step = at_a_time.max(1);
        let portion = |start: u64| self.batch(start..(start + step as u64).min(numbers.end), length, device);
        numbers.clone().step_by(step).map(portion).collect()
    }
}

/// Random numbers of a sequence's own.
pub(super) fn numbers(seed: u64, sequence: u64) -> StdRng {
    StdRng::seed_from_u64(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(sequence))
}

/// Text for a model. A sequence depends on the seed and its number.
#[derive(Debug)]
pub struct Corpus<'a> {
    lm: &'a Lm,
    text: Vec<u32>,
    conversations: Vec<Sequence>,
    /// Whether a sentence or line can end with a token, by its id.
    ends: Vec<bool>,
    /// Shares of sequences and weights of their tokens.
    pub mixture: Mixture,
    /// Chooses sequences.
    pub seed: u64,
}

/// How much of what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mixture {
    /// Share of sequences with planted facts and questions.
    pub facts: f64,
    /// Share of sequences of conversations, if there are any.
    pub conversations: f64,
    /// Weight of an answer's tokens in the divergence; others have 1.
    pub answers: f32,
}

impl Default for Mixture {
    fn default() -> Self {
        Self { facts: 0.35, conversations: 0.25, answers: 4.0 }
    }
}

impl Mixture {
    fn check(&self) -> Result<()> {
        let Self { facts, conversations, answers } = *self;
        let share = |x: f64| (0.0..=1.0).contains(&x);
        if share(facts) && share(conversations) && share(facts + conversations) && answers.is_finite() && answers > 0.0
        {
            return Ok(());
        }
        Err(Error::Model(format!(
            "facts={facts}, conversations={conversations}, answer-weight={answers} are not accepted: shares of 0 \
             to 1 and a weight above 0"
        )))
    }
}

/// Tokens with the weights of their positions in the loss: what follows a token counts with its weight.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sequence {
    /// Tokens.
    pub tokens: Vec<u32>,
    /// As many.
    pub weights: Vec<f32>,
}

impl Sequence {
    fn add(&mut self, tokens: &[u32], weight: f32) {
        self.tokens.extend(tokens);
        self.weights.resize(self.tokens.len(), weight);
    }

    fn truncate(&mut self, length: usize) {
        self.tokens.truncate(length);
        self.weights.truncate(length);
    }
}

/// Characters that no text has: where the body of a prompt, an answer's begin and its end will be.
const BODY: char = '\u{E000}';
const ANSWER: char = '\u{E001}';
const ANSWERED: char = '\u{E002}';

/// Words before a text that will be asked about.
const OPENINGS: &[&str] =
    &["", "Read this.\n\n", "Here are my notes.\n\n", "Text:\n", "Keep the following in mind.\n\n", "Log\n---\n"];

impl<'a> Corpus<'a> {
    /// Running text, documents one after the other, for a model.
    ///
    /// # Errors
    /// [`Error::Model`] for a mixture that is none, or a tokenizer with tokens that the model has not.
    pub fn new(lm: &'a Lm, documents: &[String], mixture: Mixture, seed: u64) -> Result<Self> {
        mixture.check()?;
        let tokenizer = lm.tokenizer();
        let mut text = vec![];
        for document in documents {
            text.extend(encode_long(tokenizer, document)?);
            text.extend(tokenizer.eos().first());
        }
        let vocab = lm.model().config().vocab as u32;
        let ends = (0..vocab).map(|id| ends_something(tokenizer, id)).collect();
        let corpus = Self { lm, text, conversations: vec![], ends, mixture, seed };
        corpus.known(&corpus.text)?;
        Ok(corpus)
    }

    /// Whether the model has all tokens that its tokenizer made.
    fn known(&self, tokens: &[u32]) -> Result<()> {
        let unknown = |error| Error::Model(format!("the tokenizer and the model do not belong together: {error}"));
        self.lm.model().check_tokens(tokens).map_err(unknown)
    }

    /// Adds conversations, each a list of messages; answers of the assistant have the weight of answers.
    ///
    /// # Errors
    /// [`Error::Template`] for one that the model's template refuses or makes nothing of, or a model without a template.
    pub fn add_conversations(&mut self, conversations: &[Vec<Message>]) -> Result<()> {
        for messages in conversations {
            let marked: Vec<Message> = messages.iter().map(mark_answer).collect();
            let template = self.lm.template();
            let template =
                template.ok_or_else(|| Error::Template("the model has none, and conversations need it".into()))?;
            let sequence = self.read(&template.render(&marked, false)?, &[])?;
            if sequence.tokens.is_empty() {
                return Err(Error::Template("it makes nothing of a conversation".into()));
            }
            self.conversations.push(sequence);
        }
        Ok(())
    }

    /// Tokens of running text.
    pub fn text_tokens(&self) -> usize {
        self.text.len()
    }

    fn excerpt(&self, rng: &mut StdRng, length: usize) -> &[u32] {
        let start = rng.random_range(0..=self.text.len() - length);
        &self.text[start..start + length]
    }

    fn talk(&self, rng: &mut StdRng, length: usize) -> Sequence {
        let mut all = Sequence::default();
        while all.tokens.len() < length {
            let Some(next) = self.conversations.choose(rng) else { break };
            all.tokens.extend(&next.tokens);
            all.weights.extend(&next.weights);
        }
        all.truncate(length);
        all
    }

    fn plain(&self, rng: &mut StdRng, length: usize) -> Sequence {
        let mut plain = Sequence::default();
        plain.add(self.excerpt(rng, length), 1.0);
        plain
    }

    /// Text with facts, then questions and answers.
    fn with_facts(&self, rng: &mut StdRng, length: usize) -> Result<Sequence> {
        // A third are lists of nothing but facts of one kind; the others hold few, each of its own kind.
        let list = rng.random_bool(0.33).then(|| Kind::random(rng));
        let most = if list.is_some() { length / 12 } else { 16 };
        let planned = if list.is_some() { most } else { rng.random_range(1..=most) };
        let (mut facts, mut keys, mut statements) = (vec![], HashSet::new(), vec![]);
        let (frame_room, mut used) = (length / 8 + 64, 0);
        for _ in 0..planned {
            let fact = list.unwrap_or_else(|| Kind::random(rng)).fact(rng);
            if !keys.insert(fact.question.clone()) {
                continue;
            }
            let statement = self.lm.tokenizer().encode_within(&format!(
                "{}{}",
                ["\n", " "][list.is_none() as usize],
                fact.statement
            ))?;
            if used + statement.len() + frame_room > length {
                break;
            }
            used += statement.len();
            statements.push(statement);
            facts.push(fact);
        }
        if facts.is_empty() {
            return Ok(self.plain(rng, length)); // too short for one
        }
        let mut asked = facts;
        for i in 0..asked.len().min(12) {
            let other = rng.random_range(i..asked.len());
            asked.swap(i, other);
        }
        asked.truncate(rng.random_range(1..=12));
        let mut sequence = loop {
            let frame = self.frame(rng, &asked)?;
            let taken = self.read(&frame, &[])?.tokens.len() + used;
            if taken <= length || asked.len() <= 1 {
                let room = length.saturating_sub(taken);
                break self.read(&frame, &self.plant(rng, statements, room))?;
            }
            asked.pop();
        };
        let missing = length.saturating_sub(sequence.tokens.len());
        sequence.add(self.excerpt(rng, missing), 1.0);
        sequence.truncate(length);
        Ok(sequence)
    }

    /// `room` tokens of text with statements in it, at ends of sentences where there are some.
    fn plant(&self, rng: &mut StdRng, statements: Vec<Vec<u32>>, room: usize) -> Vec<u32> {
        let hay = self.excerpt(rng, room);
        let mut places: Vec<usize> = statements.iter().map(|_| rng.random_range(0..=room)).collect();
        places.sort_unstable();
        let (mut body, mut from) = (Vec::with_capacity(room * 2), 0);
        for (place, statement) in places.into_iter().zip(statements) {
            let end = hay[place..].iter().take(60).position(|&token| self.ends[token as usize]);
            let place = end.map_or(place, |after| place + after + 1).max(from);
            body.extend(&hay[from..place]);
            body.extend(statement);
            from = place;
        }
        body.extend(&hay[from..]);
        body
    }

    /// The text around a body: a conversation, or plain questions and answers.
    fn frame(&self, rng: &mut StdRng, asked: &[Fact]) -> Result<String> {
        let opening = OPENINGS.choose(rng).copied().unwrap_or_default();
        let answer = |fact: &Fact| format!("{ANSWER}{}{ANSWERED}", fact.answer);
        if let Some(template) = self.lm.template().filter(|_| rng.random_bool(0.7)) {
            let mut messages = vec![];
            for (i, fact) in asked.iter().enumerate() {
                let before = if i == 0 { format!("{opening}{BODY}\n\n") } else { String::new() };
                messages.push(Message::new("user", format!("{before}{}", fact.question)));
                messages.push(Message::new("assistant", answer(fact)));
            }
            return template.render(&messages, false);
        }
        let style = rng.random_range(0..3);
        let ask = |fact: &Fact| match style {
            0 => format!("\nQ: {}\nA: {}", fact.question, answer(fact)),
            1 => format!("\n{} {}", fact.question, answer(fact)),
            // Said again: whoever has read it can go on after the first words.
            _ => {
                let half =
                    fact.statement.char_indices().nth(fact.statement.chars().count() / 2).map_or(0, |(at, _)| at);
                let half = fact.statement[..half].rfind(' ').unwrap_or(half);
                format!("\n{}{ANSWER}{}{ANSWERED}", &fact.statement[..half], &fact.statement[half..])
            }
        };
        Ok(format!("{opening}{BODY}\n{}", asked.iter().map(ask).collect::<String>()))
    }

    /// Tokens of a text with marks: its body is put in, answers get their weight.
    fn read(&self, marked: &str, body: &[u32]) -> Result<Sequence> {
        let mut all = Sequence::default();
        let mut weight = 1.0;
        for (i, piece) in marked.split_inclusive([BODY, ANSWER, ANSWERED]).enumerate() {
            let text = piece.trim_end_matches([BODY, ANSWER, ANSWERED]);
            let tokenizer = self.lm.tokenizer();
            let tokens = if i == 0 { tokenizer.encode(text)? } else { tokenizer.encode_within(text)? };
            all.add(&tokens, weight);
            weight = 1.0;
            match piece.chars().last() {
                Some(BODY) => all.add(body, 1.0),
                Some(ANSWER) => {
                    weight = self.mixture.answers;
                    // The token before an answer predicts its first one.
                    all.weights.iter_mut().last().into_iter().for_each(|last| *last = weight);
                }
                _ => {}
            }
        }
        Ok(all)
    }
}

impl Source for Corpus<'_> {
    fn sequence(&self, number: u64, length: usize) -> Result<Sequence> {
        let mut rng = numbers(self.seed, number);
        let draw: f64 = rng.random();
        let sequence = if draw < self.mixture.facts {
            self.with_facts(&mut rng, length)?
        } else if draw < self.mixture.facts + self.mixture.conversations && !self.conversations.is_empty() {
            self.talk(&mut rng, length)
        } else {
            self.plain(&mut rng, length)
        };
        self.known(&sequence.tokens)?;
        Ok(sequence)
    }

    fn check(&self, length: usize) -> Result<()> {
        if self.text.len() > length {
            return Ok(());
        }
        Err(Error::Model(format!(
            "the text is too short: {} tokens, and a sequence has {length}; give more text or a shorter context",
            self.text.len()
        )))
    }

    fn settings(&self) -> Value {
        let Mixture { facts, conversations, answers } = self.mixture;
        json!({
            "mixture": [facts, conversations, answers as f64], "text-tokens": self.text.len(),
            "conversations": self.conversations.len(), "text-seed": self.seed,
        })
    }
}

fn mark_answer(message: &Message) -> Message {
    match message.role.as_str() {
        "assistant" => Message::new("assistant", format!("{ANSWER}{}{ANSWERED}", message.content)),
        _ => message.clone(),
    }
}

fn ends_something(tokenizer: &Tokenizer, id: u32) -> bool {
    let text = tokenizer.decode(&[id]).unwrap_or_default();
    text.ends_with(['.', '\n', '!', '?'])
}

/// A long text is encoded in pieces that end with a line, on all cores: tokenizers slow down with length.
fn encode_long(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    const PIECE: usize = 1 << 16;
    let (mut pieces, mut rest) = (vec![], text);
    while !rest.is_empty() {
        let least = (PIECE..).find(|&at| at >= rest.len() || rest.is_char_boundary(at)).unwrap_or(rest.len());
        let cut = rest.get(least..).and_then(|after| after.find('\n')).map_or(rest.len(), |at| least + at + 1);
        let (piece, after) = rest.split_at(cut);
        pieces.push(piece);
        rest = after;
    }
    let encoded: Vec<Vec<u32>> =
        pieces.into_par_iter().map(|piece| tokenizer.encode_within(piece)).collect::<Result<_>>()?;
    Ok(encoded.concat())
}
