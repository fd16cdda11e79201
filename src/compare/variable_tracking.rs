//! Names bound to a value by way of each other, after RULER's variable tracking (arXiv 2404.06654), with its one chain of four
//! hops: the first name gets a number, each further one the name before it, in this order but far apart in the same few
//! sentences over and over. All five are asked for.

use super::{
    Excerpts,
    retrieval::{Expected, Prompt, largest_fitting},
};
use crate::error::{Error, Result};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::index};

const INTRODUCTION: &str = "The text below binds variables to values, now and then. Keep track of all of them.\n\n";
const NOISE: &str = "Rain falls on the roof. The clock strikes nine. Bread is in the oven. Nobody comes, nobody goes.";
/// Tokens an answer may have: five names, whose letters may be tokens.
pub(super) const ANSWER: usize = 48;
/// Bindings of one name to another.
const HOPS: usize = 4;
const LETTERS: usize = 5;

pub(super) fn prompt(texts: &Excerpts, sample: usize) -> Result<Prompt> {
    let chain = Chain::new(&mut texts.rng(sample));
    let text = |lines: usize| Ok::<_, Error>(texts.subject.chat(&chain.message(lines))? + &chain.begun_answer());
    let tokens = |lines: usize| Ok(texts.subject.encode(&text(lines)?)?.len() + ANSWER);
    let lines = largest_fitting(texts, chain.names.len()..=texts.context(), tokens)?.ok_or_else(|| {
        Error::Config(format!("context={} leaves no room for text between the variables", texts.context()))
    })?;
    Prompt::new(texts, text(lines)?, &chain.question(), Expected::All(chain.names.clone()), ANSWER)
}

struct Chain {
    names: Vec<String>, // in the order of their bindings
    value: u32,         // of five digits
    places: u64,        // a seed
}

impl Chain {
    fn new(rng: &mut StdRng) -> Self {
        let mut names: Vec<String> = vec![];
        while names.len() <= HOPS {
            let name: String = (0..LETTERS).map(|_| rng.random_range(b'A'..=b'Z') as char).collect();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Self { names, value: rng.random_range(10_000..100_000), places: rng.random() }
    }

    fn bindings(&self) -> Vec<String> {
        let values = std::iter::once(self.value.to_string()).chain(self.names.iter().map(|name| format!("VAR {name}")));
        self.names.iter().zip(values).map(|(name, value)| format!("VAR {name} = {value}")).collect()
    }

    /// What the user says, with this many lines of noise, at least one a name.
    fn message(&self, lines: usize) -> String {
        let mut rng = StdRng::seed_from_u64(self.places);
        let mut before = index::sample(&mut rng, lines, self.names.len()).into_vec();
        before.sort();
        let mut all = vec![NOISE.to_string(); lines];
        // From below, so that places above stay where they are.
        for (place, binding) in before.into_iter().zip(self.bindings()).rev() {
            all.insert(place, binding);
        }
        format!("{INTRODUCTION}{}\n\n{}", all.join("\n"), self.question())
    }

    fn question(&self) -> String {
        format!("Which variables have the value {}? Name all {} of them.", self.value, self.names.len())
    }

    fn begun_answer(&self) -> String {
        format!("The {} variables with the value {} are:", self.names.len(), self.value)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_name_leads_back_to_the_value() {
        for seed in 0..100 {
            let chain = Chain::new(&mut StdRng::seed_from_u64(seed));
            assert!(chain.names.len() == 5 && chain.names.iter().all(|name| name.len() == 5));
            let message = chain.message(5 + seed as usize);
            let bound: HashMap<&str, &str> = message
                .lines()
                .filter_map(|line| line.strip_prefix("VAR ")?.split_once(" = "))
                .map(|(name, value)| (name, value.trim_start_matches("VAR ")))
                .collect();
            let hops = |name: &str| {
                let (mut at, mut hops) = (name, 0);
                while let Some(next) = bound.get(at) {
                    (at, hops) = (next, hops + 1);
                }
                (at.to_string(), hops)
            };
            let found: Vec<_> = chain.names.iter().map(|name| hops(name)).collect();
            let value = chain.value.to_string();
            assert_eq!(found, (1..=5).map(|hops| (value.clone(), hops)).collect::<Vec<_>>());
            // In their order, each once, and never two without noise between them.
            let lines: Vec<&str> = message.lines().collect();
            let places: Vec<usize> =
                chain.bindings().iter().map(|b| lines.iter().position(|line| line == b).unwrap()).collect();
            assert!(places.windows(2).all(|two| two[0] + 1 < two[1]), "{places:?}");
            assert_eq!(message.matches("VAR ").count(), 5 + 4);
            assert_eq!(message.matches(NOISE).count(), 5 + seed as usize);
        }
    }
}
