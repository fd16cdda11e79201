//! Several numbers hidden in text, after RULER (arXiv 2404.06654): what it calls multi-key, multi-value and multi-query NIAH. As
//! there four needles stand at four of forty depths, keys are words, values numbers of seven digits, and the answer is begun
//! for the model; the text around them is the user's, the wording ours.

use super::{
    Ask, Excerpts,
    needle::{hay, sentence_end},
    retrieval::{Expected, Prompt},
    word_key::{KEYS, key},
};
use crate::error::Result;
use rand::{Rng, rngs::StdRng, seq::index};

const INTRODUCTION: &str =
    "Some secret numbers are hidden in the text below. Keep them in mind: I will ask you about them.\n\n";
/// Tokens an answer may have: four numbers whose digits are tokens, with their keys.
pub(super) const ANSWER: usize = 96;
const NEEDLES: usize = 4;
/// Places that needles may have, from the start of the text to its end.
const DEPTHS: usize = 40;

pub(super) fn prompt(texts: &Excerpts, ask: Ask, sample: usize) -> Result<Prompt> {
    let mut rng = texts.rng(sample);
    let hidden = Hidden::new(&mut rng, ask);
    let frame = texts.subject.chat(&hidden.message(""))? + &hidden.begun_answer();
    let hay = hay(texts, &mut rng, &frame, ANSWER)?;
    let text = texts.subject.chat(&hidden.message(&hay))? + &hidden.begun_answer();
    Prompt::new(texts, text, &hidden.question(), Expected::All(hidden.values()), ANSWER)
}

/// Needles, and those that are asked for.
struct Hidden {
    needles: Vec<Needle>, // from the top of the text
    asked: Vec<String>,   // keys
}

struct Needle {
    key: String,
    value: u32,
    depth: f64, // 0 to 1
}

impl Hidden {
    fn new(rng: &mut StdRng, ask: Ask) -> Self {
        let keys: Vec<String> = index::sample(rng, KEYS, NEEDLES).into_iter().map(key).collect();
        let mut depths = index::sample(rng, DEPTHS, NEEDLES).into_vec();
        depths.sort();
        // Distinct, or one would be found where the other is meant.
        let values = index::sample(rng, 9_000_000, NEEDLES).into_iter().map(|value| value as u32 + 1_000_000);
        let needles = depths.into_iter().zip(values).enumerate().map(|(i, (depth, value))| Needle {
            key: keys[if ask == Ask::NeedleMultivalue { 0 } else { i }].clone(),
            value,
            depth: depth as f64 / (DEPTHS - 1) as f64,
        });
        let asked = match ask {
            Ask::NeedleMultiquery => keys.clone(),
            Ask::NeedleMultivalue => vec![keys[0].clone()],
            _ => vec![keys[rng.random_range(0..NEEDLES)].clone()],
        };
        Self { needles: needles.collect(), asked }
    }

    fn message(&self, hay: &str) -> String {
        let (mut text, mut from) = (INTRODUCTION.to_string(), 0);
        for Needle { key, value, depth } in &self.needles {
            let at = sentence_end(hay, (hay.len() as f64 * depth) as usize).max(from);
            text += &format!("{} The secret number of {key} is {value}.", &hay[from..at]);
            from = at;
        }
        format!("{text}{}\n\n{}", &hay[from..], self.question())
    }

    fn question(&self) -> String {
        format!("Which secret numbers does the text give for {}? Name every one.", self.asked.join(", "))
    }

    fn begun_answer(&self) -> String {
        format!("The text gives for {}:", self.asked.join(", "))
    }

    /// What is asked for.
    fn values(&self) -> Vec<String> {
        let asked = self.needles.iter().filter(|needle| self.asked.contains(&needle.key));
        asked.map(|needle| needle.value.to_string()).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use std::collections::HashSet;

    fn hay() -> String {
        (0..300).map(|i| format!("Sentence {i} says nothing. ")).collect()
    }

    #[test]
    fn four_needles_stand_whole_at_four_depths() {
        let hay = hay();
        let mut tops = HashSet::new();
        for seed in 0..50 {
            for ask in [Ask::NeedleMultikey, Ask::NeedleMultivalue, Ask::NeedleMultiquery] {
                let hidden = Hidden::new(&mut StdRng::seed_from_u64(seed), ask);
                let message = hidden.message(&hay);
                let places: Vec<usize> = hidden
                    .needles
                    .iter()
                    .map(|n| message.find(&format!(" The secret number of {} is {}.", n.key, n.value)).unwrap())
                    .collect();
                assert!(
                    places.is_sorted() && places.windows(2).all(|two| two[1] - two[0] > hay.len() / 50),
                    "{places:?}"
                );
                tops.insert(places[0] * 10 / message.len());
                // The text around them is whole, and no sentence is cut.
                let rest = hidden.needles.iter().fold(message.clone(), |text, n| {
                    text.replace(&format!(" The secret number of {} is {}.", n.key, n.value), "")
                });
                assert!(rest.contains(&hay));
                assert!(hidden.needles.iter().all(|n| n.value.to_string().len() == 7));
            }
        }
        assert!(tops.len() > 3, "they move");
    }

    #[test]
    fn what_is_asked_for_is_what_the_variant_says() {
        for seed in 0..50 {
            let hidden = |ask| Hidden::new(&mut StdRng::seed_from_u64(seed), ask);
            let keys = |hidden: &Hidden| hidden.needles.iter().map(|n| n.key.clone()).collect::<HashSet<_>>().len();
            let (key, value, query) =
                (hidden(Ask::NeedleMultikey), hidden(Ask::NeedleMultivalue), hidden(Ask::NeedleMultiquery));
            assert_eq!((keys(&key), key.asked.len(), key.values().len()), (4, 1, 1));
            assert_eq!((keys(&value), value.asked.len(), value.values().len()), (1, 1, 4));
            assert_eq!((keys(&query), query.asked.len(), query.values().len()), (4, 4, 4));
            for hidden in [key, value, query] {
                assert!(hidden.asked.iter().all(|key| hidden.question().contains(key)));
                assert_eq!(hidden.values().iter().collect::<HashSet<_>>().len(), hidden.values().len());
            }
        }
    }
}
