//! A number in one of many lines, each with a key of two words.

use super::{
    Excerpts,
    retrieval::{Expected, Prompt, largest_fitting},
};
use crate::error::{Error, Result};
use rand::{Rng, rngs::StdRng, seq::index};

const INTRODUCTION: &str = "Below is a register of many lines. Every line has a name of two words and, between < and >, its \
                            REGISTER_CONTENT, a number. Read all of them: I will ask you for the content of one.\n\n";
/// Tokens an answer may have: those of five digits, and a few that close it.
pub(super) const ANSWER: usize = 8;
/// No tokenizer writes a line in fewer: its words, signs and number are apart from each other.
const LEAST_LINE: usize = 8;

pub(super) fn prompt(texts: &Excerpts, sample: usize) -> Result<Prompt> {
    let mut rng = texts.rng(sample);
    let register = Register::new(&mut rng, texts.context() / LEAST_LINE);
    let text = filled(texts, &register)?;
    let expected = Expected::Number(register.asked.value.to_string());
    Prompt::new(texts, text, &register.question(), expected, ANSWER)
}

/// The prompt with as many lines as the context has room for.
fn filled(texts: &Excerpts, register: &Register) -> Result<String> {
    let context = texts.context();
    let refuse = |what: String| Err(Error::Config(format!("context={context} {what}")));
    let text = |others: usize| -> Result<String> {
        Ok(texts.subject.chat(&register.message(others))? + &register.begun_answer())
    };
    let tokens = |others: usize| Ok(texts.subject.encode(&text(others)?)?.len() + ANSWER);
    // Beside another line, or nothing is to be told apart.
    match largest_fitting(texts, 1..=register.others.len(), tokens)? {
        None => refuse("leaves no room for lines around the question".into()),
        Some(others) if others + 1 == KEYS => {
            refuse(format!("is too long: all {KEYS} keys of word-key do not fill it"))
        }
        Some(others) => text(others),
    }
}

/// Lines, one of which is asked for.
struct Register {
    asked: Line,
    others: Vec<Line>,
    /// How far down the line that is asked for stands, from 0 to below 1.
    depth: f64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    key: String,
    value: u32, // of five digits
}

impl Register {
    /// A register of up to `lines` lines, two at the least; no key comes twice.
    fn new(rng: &mut StdRng, lines: usize) -> Self {
        let mut keys = index::sample(rng, KEYS, lines.clamp(2, KEYS)).into_iter().map(key);
        let mut line = |key| Line { key, value: rng.random_range(10_000..100_000) };
        let asked = line(keys.next().unwrap_or_default());
        Self { asked, others: keys.map(line).collect(), depth: rng.random_range(0.0..1.0) }
    }

    /// What the user says, with this many of the lines beside the one that is asked for.
    fn message(&self, others: usize) -> String {
        let above = (self.depth * (others + 1) as f64) as usize;
        let (above, below) = self.others[..others].split_at(above.min(others));
        let lines = above.iter().chain([&self.asked]).chain(below).map(Line::text);
        format!("{INTRODUCTION}{}\n{}", lines.collect::<String>(), self.question())
    }

    fn question(&self) -> String {
        format!("Tell me what is the <REGISTER_CONTENT> in line {}?", self.asked.key)
    }

    /// So that a small model, too, says the number and nothing else.
    fn begun_answer(&self) -> String {
        format!("The <REGISTER_CONTENT> in line {} is <", self.asked.key)
    }
}

impl Line {
    fn text(&self) -> String {
        format!("line {}: REGISTER_CONTENT is <{}>\n", self.key, self.value)
    }
}

pub(super) const KEYS: usize = ADJECTIVES.len() * NOUNS.len();

/// One of [`KEYS`] different ones.
pub(super) fn key(number: usize) -> String {
    format!("{}-{}", ADJECTIVES[number % ADJECTIVES.len()], NOUNS[number / ADJECTIVES.len()])
}

// None of these words occurs in what `retrofit` plants, or trained gates would know what to keep.
const ADJECTIVES: &[&str] = &[
    "agile", "ample", "arid", "avid", "blunt", "brisk", "bumpy", "candid", "cheeky", "chilly", "chubby", "clever",
    "clumsy", "cosmic", "cozy", "crafty", "creamy", "crisp", "curious", "daring", "dazed", "deft", "dizzy", "drowsy",
    "eager", "earnest", "elegant", "exotic", "fancy", "feisty", "fierce", "flimsy", "fluffy", "foggy", "frosty",
    "frugal", "fuzzy", "gentle", "giddy", "glossy", "graceful", "grumpy", "gusty", "hasty", "hefty", "honest",
    "humble", "icy", "jolly", "jovial", "lavish", "lazy", "limber", "lively", "lofty", "loyal", "lucid", "lucky",
    "mellow", "merry", "mighty", "misty", "modest", "muddy", "nimble", "noble", "oily", "peppy", "perky", "placid",
    "playful", "plucky", "polite", "prickly", "proud", "quaint", "quirky", "radiant", "ragged", "rapid", "robust",
    "rowdy", "rugged", "rustic", "salty", "savvy", "serene", "shaggy", "shiny", "shy", "silent", "silky", "sleek",
    "sleepy", "sly", "snappy", "snug", "soggy", "solemn", "spicy", "spry", "stark", "stout", "sturdy", "subtle",
    "sunny", "swift", "tangy", "tender", "thrifty", "tidy", "timid", "tiny", "tranquil", "urban", "vivid", "wary",
    "weary", "wild", "witty", "wobbly", "zany", "zesty",
];
const NOUNS: &[&str] = &[
    "acorn", "airport", "almanac", "apron", "atlas", "avocado", "bakery", "balcony", "banjo", "barrel", "beacon",
    "beaver", "biscuit", "blanket", "blossom", "bonfire", "bottle", "bucket", "buffalo", "button", "cabin", "cactus",
    "camel", "canoe", "canyon", "carpet", "carrot", "castle", "ceiling", "cello", "chimney", "cinema", "circus",
    "cobweb", "coconut", "comet", "cottage", "cousin", "cricket", "crystal", "cushion", "dolphin", "donkey", "dragon",
    "eagle", "elbow", "emblem", "falafel", "feather", "ferry", "fossil", "fountain", "galaxy", "garage", "gecko",
    "glacier", "glove", "goblet", "gorilla", "hamster", "harbor", "helmet", "hermit", "igloo", "island", "jacket",
    "jigsaw", "jungle", "kangaroo", "kayak", "kitchen", "koala", "lagoon", "lemonade", "library", "lizard", "lobster",
    "mango", "marathon", "meadow", "melon", "monsoon", "muffin", "museum", "napkin", "notebook", "oasis", "octopus",
    "ostrich", "oyster", "paddle", "pancake", "panther", "parrot", "pebble", "pelican", "pencil", "penguin", "picnic",
    "pillow", "pirate", "planet", "pretzel", "puppet", "pyramid", "rabbit", "raccoon", "radish", "raincoat", "rocket",
    "sandal", "scarf", "sparrow", "spatula", "spider", "squid", "stadium", "tadpole", "teapot", "tortoise", "trumpet",
    "turnip", "tuxedo", "umbrella", "vampire", "volcano", "walrus", "yogurt",
];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        compare::{
            Ask, Sample, Setting, Task,
            oracle::{Oracle, play},
        },
        retrofit::facts::Kind,
    };
    use rand::SeedableRng;
    use std::collections::HashSet;

    fn register(seed: u64, lines: usize) -> Register {
        Register::new(&mut StdRng::seed_from_u64(seed), lines)
    }

    fn letters(text: &str) -> impl Iterator<Item = String> {
        text.split(|c: char| !c.is_ascii_alphabetic()).map(str::to_lowercase)
    }

    #[test]
    fn no_key_comes_twice() {
        assert!(ADJECTIVES.len() >= 60 && NOUNS.len() >= 60);
        assert_eq!((0..KEYS).map(key).collect::<HashSet<_>>().len(), KEYS);
        for (seed, lines) in [(0, 2), (1, 100), (2, KEYS), (3, KEYS + 9)] {
            let register = register(seed, lines);
            let keys: HashSet<_> = register.others.iter().chain([&register.asked]).map(|line| &line.key).collect();
            assert_eq!(keys.len(), lines.min(KEYS));
            assert!(register.others.iter().all(|line| line.value.to_string().len() == 5));
        }
    }

    #[test]
    fn the_asked_line_stands_once_and_anywhere() {
        let mut above = HashSet::new();
        for seed in 0..200 {
            let register = register(seed, 10);
            for others in [1, 9] {
                let message = register.message(others);
                let lines: Vec<&str> = message.lines().filter(|line| line.starts_with("line ")).collect();
                assert_eq!(lines.len(), others + 1);
                let at = lines.iter().position(|line| *line == register.asked.text().trim_end()).unwrap();
                above.insert((others, at));
            }
        }
        assert_eq!(above.len(), 2 + 10); // every place of both lengths
    }

    #[test]
    fn training_never_sees_its_words_or_lines() {
        let mut rng = StdRng::seed_from_u64(4);
        let own: HashSet<String> = ADJECTIVES.iter().chain(NOUNS).map(|word| word.to_string()).collect();
        let mut trained = HashSet::new();
        for _ in 0..20_000 {
            let fact = Kind::random(&mut rng).fact(&mut rng);
            for text in [fact.statement, fact.question, fact.answer] {
                assert!(!text.contains(['<', '>']) && !text.to_lowercase().contains("register_content"), "{text}");
                assert!(!text.contains("line "), "{text}");
                trained.extend(letters(&text));
            }
        }
        // That it saw all there is to draw: the first and last words of every list.
        for word in ["ada", "zoltan", "abbott", "zeller", "aarhus", "zagreb", "amber", "yellow", "anchor", "whistle"] {
            assert!(trained.contains(word), "{word}");
        }
        assert_eq!(own.intersection(&trained).collect::<Vec<_>>(), Vec::<&String>::new());
    }

    const BOTH: [Task; 2] = [Task::Ask(Ask::WordKey, Setting::Before), Task::Ask(Ask::WordKey, Setting::Aware)];

    #[test]
    fn a_model_that_knows_answers_everything_right() {
        let oracle = Oracle::new(true);
        let (rows, samples) = play(&oracle, &BOTH, &[450, 1024, 1100]).unwrap();
        assert!(rows.len() == 6 && rows.iter().all(|row| row.metrics.accuracy == Some(1.0)), "{rows:?}");
        assert!(samples.len() == 18 && samples.iter().all(|sample| sample.correct == Some(true)));
        for sample in &samples {
            let (tokens, spare) = (1 + sample.prompt.len() + ANSWER, 60); // bytes, and more than a line
            assert!(tokens <= sample.context && tokens + spare > sample.context, "{tokens} of {}", sample.context);
            assert!(sample.prompt.ends_with(" is <"), "{}", sample.prompt);
        }
        assert!(*oracle.most.borrow() <= 1100);
    }

    #[test]
    fn a_model_that_does_not_know_answers_nothing_right() {
        let (rows, samples) = play(&Oracle::new(false), &BOTH, &[450, 1024]).unwrap();
        assert!(rows.iter().all(|row| row.metrics.correct == Some(0) && row.metrics.questions == Some(3)), "{rows:?}");
        assert!(samples.iter().all(|sample| sample.answer.as_ref().unwrap().len() == ANSWER));
    }

    #[test]
    fn a_policy_compresses_before_the_question_unless_it_is_aware_of_it() {
        for task in BOTH {
            let oracle = Oracle::new(true);
            play(&oracle, &[task], &[1024]).unwrap();
            let compressed = oracle.compressed.borrow();
            let (with, without): (Vec<_>, Vec<_>) = compressed.iter().partition(|text| text.contains("Tell me"));
            assert_eq!((with.len(), without.len()), (3, if task == BOTH[0] { 3 } else { 0 }), "{task}");
            assert!(without.iter().all(|text| text.ends_with(">\n\n")));
        }
    }

    #[test]
    fn a_seed_makes_the_same_prompts() {
        let prompts = || {
            let (_, samples) = play(&Oracle::new(true), &BOTH, &[1024]).unwrap();
            samples.into_iter().map(|Sample { prompt, .. }| prompt).collect::<Vec<_>>()
        };
        let first = prompts();
        assert_eq!(first, prompts());
        assert_eq!(first[..3], first[3..]); // aware or not, the same is asked
        assert_eq!(first.iter().collect::<HashSet<_>>().len(), 3);
    }

    #[test]
    fn a_context_that_cannot_be_filled_is_refused_before_anything_runs() {
        let oracle = Oracle::new(true);
        for (contexts, why) in [([1024, 200], "no room"), ([1024, 1_200_000], "too long")] {
            let error = play(&oracle, &BOTH[..1], &contexts).unwrap_err().to_string();
            assert!(error.contains(&contexts[1].to_string()) && error.contains(why), "{error}");
        }
        assert_eq!(*oracle.most.borrow(), 0);
    }
}
