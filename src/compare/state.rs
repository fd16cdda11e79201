//! A state that changes over many steps. The model writes down what each step makes of it, and at the end what a register held
//! early on: every line needs the last one about its register, the last line one from near the start. Long reasoning in small.

use super::{
    Excerpts,
    retrieval::{Expected, Prompt, largest_fitting},
};
use crate::error::{Error, Result};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

const INTRODUCTION: &str = "Registers hold numbers, and numbered steps change them.\n\n";
const REGISTERS: [&str; 5] = ["amber", "birch", "cobalt", "dune", "ember"];
/// Steps among the first of which is the one that is asked for: one of so many.
const EARLY: usize = 4;
/// Tokens an answer may have, of those of a right one, in tenths.
const MOST: usize = 13;

pub(super) fn prompt(texts: &Excerpts, sample: usize) -> Result<Prompt> {
    let seed = texts.rng(sample);
    let steps = |count: usize| Steps::new(&mut seed.clone(), count);
    let text = |steps: &Steps| Ok::<_, Error>(texts.subject.chat(&steps.message())? + BEGUN);
    let answer = |steps: &Steps| Ok::<_, Error>(texts.subject.encode(&steps.answer())?.len() * MOST / 10);
    let tokens = |count: usize| {
        let steps = steps(count);
        Ok(texts.subject.encode(&text(&steps)?)?.len() + answer(&steps)?)
    };
    let count = largest_fitting(texts, EARLY..=texts.context(), tokens)?
        .ok_or_else(|| Error::Config(format!("context={} leaves no room for {EARLY} steps", texts.context())))?;
    let steps = steps(count);
    Prompt::new(texts, text(&steps)?, QUESTION, Expected::LastLine(steps.last_line()), answer(&steps)?)
}

/// Tokens of a typical answer in a context.
pub(super) fn decoded(context: usize) -> usize {
    let fits = |steps: &Steps| steps.message().len() + steps.answer().len() * MOST / 10 <= context * BYTES;
    let steps = |count: usize| Steps::new(&mut StdRng::seed_from_u64(0), count);
    let (mut fitting, mut too_many) = (EARLY, context.max(EARLY + 1));
    while too_many - fitting > 1 {
        let middle = (fitting + too_many) / 2;
        if fits(&steps(middle)) { fitting = middle } else { too_many = middle }
    }
    steps(fitting).answer().len() / BYTES
}

/// Of a token, about: of words it has more, of numbers fewer.
const BYTES: usize = 3;

const QUESTION: &str = "Carry out the steps, in order.";
const BEGUN: &str = "1.";

struct Steps {
    start: [i32; REGISTERS.len()],
    changes: Vec<(usize, i32)>, // of which register, by how much; never to below 0 or above 99
    asked: usize,               // a step
}

impl Steps {
    fn new(rng: &mut StdRng, count: usize) -> Self {
        let start = REGISTERS.map(|_| rng.random_range(10..90));
        let asked = rng.random_range(0..count.div_ceil(EARLY));
        let (mut state, mut changes) = (start, vec![]);
        for _ in 0..count {
            let register = rng.random_range(0..REGISTERS.len());
            let possible: Vec<i32> =
                (-9..=9).filter(|by| *by != 0 && (0..=99).contains(&(state[register] + by))).collect();
            let by = possible.choose(rng).copied().unwrap_or(1);
            state[register] += by;
            changes.push((register, by));
        }
        Self { start, changes, asked }
    }

    fn message(&self) -> String {
        let start: Vec<String> = REGISTERS.iter().zip(self.start).map(|(name, n)| format!("{name}={n}")).collect();
        let sign = |by: i32| if by < 0 { '-' } else { '+' };
        let steps = self.changes.iter().enumerate();
        let steps = steps.map(|(i, &(r, by))| format!("{}. {} {} {}\n", i + 1, REGISTERS[r], sign(by), by.abs()));
        let (start, steps, asked) = (start.join(" "), steps.collect::<String>(), self.asked + 1);
        format!(
            "{INTRODUCTION}{start}\n{steps}\n{QUESTION} Write a line for each: its number, the register and what it holds \
             after the step, as in `7. amber=35`. In the last line write `=` and what the register of step {asked} held \
             after it, as in `= 35`."
        )
    }

    /// A right answer, after the number that was begun.
    fn answer(&self) -> String {
        let lines = self.held().into_iter().enumerate().map(|(i, (register, value))| {
            let number = if i == 0 { String::new() } else { format!("{}.", i + 1) };
            format!("{number} {}={value}\n", REGISTERS[register])
        });
        lines.collect::<String>() + &self.last_line() + "\n"
    }

    fn last_line(&self) -> String {
        format!("= {}", self.held()[self.asked].1)
    }

    /// The register of each step with what it holds after it.
    fn held(&self) -> Vec<(usize, i32)> {
        let mut state = self.start;
        let after = |&(register, by): &(usize, i32)| {
            state[register] += by;
            (register, state[register])
        };
        self.changes.iter().map(after).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Reads a message as its reader would.
    fn carry_out(message: &str) -> (Vec<String>, String) {
        let lines: Vec<&str> = message.lines().collect();
        let pair = |text: &str| text.split_once('=').map(|(name, n)| (name.to_string(), n.parse::<i32>().unwrap()));
        let mut state: HashMap<String, i32> = lines[2].split(' ').filter_map(pair).collect();
        let mut written = vec![];
        for line in lines[3..].iter().take_while(|line| !line.is_empty()) {
            let [number, register, sign, by] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let by: i32 = by.parse().unwrap();
            let held = state.get_mut(register).unwrap();
            *held += if sign == "-" { -by } else { by };
            assert!((0..=99).contains(held));
            written.push(format!("{number} {register}={held}"));
        }
        let asked: usize =
            message.rsplit("register of step ").next().unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!((asked - 1) * EARLY < written.len(), "step {asked} of {} is not early", written.len());
        let last = format!("= {}", written[asked - 1].split('=').nth(1).unwrap());
        (written, last)
    }

    #[test]
    fn an_answer_is_what_the_steps_make_and_its_last_line_is_of_an_early_one() {
        for seed in 0..100 {
            let steps = Steps::new(&mut StdRng::seed_from_u64(seed), EARLY + seed as usize * 3);
            let (mut lines, last) = carry_out(&steps.message());
            assert_eq!(last, steps.last_line());
            lines.push(last);
            assert_eq!(format!("{BEGUN}{}", steps.answer()), lines.join("\n") + "\n");
        }
    }

    #[test]
    fn the_last_line_cannot_be_told_from_the_end() {
        // What the register holds at the end is another number, mostly.
        let other = |seed| {
            let steps = Steps::new(&mut StdRng::seed_from_u64(seed), 60);
            let held = steps.held();
            let (register, value) = held[steps.asked];
            held.iter().rev().find(|(r, _)| *r == register).is_some_and(|(_, last)| *last != value)
        };
        assert!((0..100).filter(|&seed| other(seed)).count() > 85);
    }

    #[test]
    fn a_typical_answer_is_about_half_of_a_context() {
        for context in [512, 1024, 8192] {
            assert!((0.25..0.55).contains(&(decoded(context) as f64 / context as f64)), "{}", decoded(context));
        }
    }
}
