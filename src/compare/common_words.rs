//! The words of a long list that come most often, after RULER's common words extraction (arXiv 2404.06654): ten words come 30
//! times, the others 3 times, in random order and numbered; as many others as the context has room for. Below 4,096 tokens
//! the common ones come 6 times and the others once. Ours are made of an adjective and a noun.

use super::{
    Excerpts,
    retrieval::{Expected, Prompt, largest_fitting},
    word_key::{KEYS, key},
};
use crate::error::{Error, Result};
use rand::{
    Rng, SeedableRng,
    rngs::StdRng,
    seq::{SliceRandom, index},
};

const INTRODUCTION: &str = "The numbered list below has some words far more often than the others. Find out which.\n\n";
/// Tokens an answer may have.
pub(super) const ANSWER: usize = 120;
const COMMON: usize = 10;
/// The shortest context with RULER's own numbers.
const LONG: usize = 4096;

pub(super) fn prompt(texts: &Excerpts, sample: usize) -> Result<Prompt> {
    let context = texts.context();
    let words = Words::new(&mut texts.rng(sample), if context < LONG { [6, 1] } else { [30, 3] });
    let text = |others: usize| Ok::<_, Error>(texts.subject.chat(&words.message(others))? + BEGUN);
    let tokens = |others: usize| Ok(texts.subject.encode(&text(others)?)?.len() + ANSWER);
    let others = largest_fitting(texts, 1..=words.others.len().min(context), tokens)?.ok_or_else(|| {
        Error::Config(format!("context={context} leaves no room for a list with {COMMON} common words"))
    })?;
    Prompt::new(texts, text(others)?, QUESTION, Expected::All(words.common), ANSWER)
}

const QUESTION: &str = "Which 10 words come most often in the list?";
const BEGUN: &str = "The 10 words that come most often are:";

struct Words {
    common: Vec<String>,
    others: Vec<String>,
    times: [usize; 2], // of a common word, of another one
    order: u64,        // a seed
}

impl Words {
    fn new(rng: &mut StdRng, times: [usize; 2]) -> Self {
        let mut words = index::sample(rng, KEYS, KEYS).into_iter().map(key);
        Self { common: words.by_ref().take(COMMON).collect(), others: words.collect(), times, order: rng.random() }
    }

    /// What the user says, with this many words beside the common ones.
    fn message(&self, others: usize) -> String {
        let repeated = |words: &[String], times| {
            words.iter().flat_map(move |word| std::iter::repeat_n(word.clone(), times)).collect::<Vec<_>>()
        };
        let mut all = repeated(&self.common, self.times[0]);
        all.extend(repeated(&self.others[..others], self.times[1]));
        all.shuffle(&mut StdRng::seed_from_u64(self.order));
        let list: Vec<String> = all.iter().enumerate().map(|(i, word)| format!("{}. {word}", i + 1)).collect();
        format!("{INTRODUCTION}{}\n\n{QUESTION}", list.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn ten_words_come_more_often_than_all_others() {
        for (seed, times) in [(0, [6, 1]), (1, [30, 3])] {
            let words = Words::new(&mut StdRng::seed_from_u64(seed), times);
            let message = words.message(40);
            let list: Vec<&str> = message.lines().nth(2).unwrap_or_default().split(' ').collect();
            let (numbers, listed): (Vec<_>, Vec<_>) = list.chunks(2).map(|pair| (pair[0].to_string(), pair[1])).unzip();
            assert_eq!(numbers, (1..=listed.len()).map(|i| format!("{i}.")).collect::<Vec<_>>());
            let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
            listed.iter().for_each(|word| *counts.entry(word).or_default() += 1);
            assert_eq!(counts.len(), COMMON + 40);
            for (word, count) in counts {
                assert_eq!(count, times[!words.common.iter().any(|common| common == word) as usize], "{word}");
            }
            // They are spread: each quarter of the list has some of every common word's kind.
            let quarter = listed.len() / 4;
            let common = |part: &[&str]| part.iter().filter(|w| words.common.iter().any(|c| c == **w)).count();
            assert!(listed.chunks(quarter).take(4).all(|part| common(part) > quarter / 4));
        }
    }
}
