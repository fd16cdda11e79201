//! Made-up problems whose answers lie far back in what was read. A model that was trained on them, and on nothing else, shows
//! what a policy forgets: text before the question cannot be guessed from text near it.
//!
//! Everything is printable ASCII and newlines. The same `rng` makes the same problem.

use rand::{
    Rng,
    rngs::StdRng,
    seq::{IndexedRandom, SliceRandom},
};
use std::ops::RangeInclusive;

/// The shortest problem, in bytes: fewer are not enough for a fact and a question.
pub const MIN_BYTES: usize = 128;

/// A text that is read, then questions with their answers, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Read before any question is known.
    pub context: String,
    /// At least one.
    pub turns: Vec<Turn>,
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Begins with a newline.
    pub question: String,
    /// Follows the question at once and ends with a newline.
    pub answer: String,
}

impl Problem {
    /// The whole of it: the context, then each question with its answer.
    pub fn text(&self) -> String {
        self.turns.iter().fold(self.context.clone(), |text, turn| text + &turn.question + &turn.answer)
    }

    /// What comes before the answer of a turn, earlier turns included.
    pub fn before_answer(&self, turn: usize) -> String {
        let earlier = Self { context: self.context.clone(), turns: self.turns[..turn].to_vec() };
        earlier.text() + &self.turns[turn].question
    }
}

/// Simple sentences with 4 to 10 facts among them, and 2 to 4 questions about these:
///
/// ```text
/// ... code amber 4821. a boat waits near the mill. ...
/// code amber
/// ```
///
/// with the answer ` 4821` and a newline. The whole has at most `bytes` bytes and little less; below 500 there are fewer
/// facts and questions. A `bytes` under [`MIN_BYTES`] counts as that.
pub fn recall(rng: &mut StdRng, bytes: usize) -> Problem {
    let bytes = bytes.max(MIN_BYTES);
    let fitting = bytes / FACT_ROOM;
    let facts = facts(rng, up_to(FACTS, fitting));
    let asked = rng.random_range(up_to(ASKED, facts.len()));
    let turns: Vec<Turn> = facts.choose_multiple(rng, asked).map(Fact::turn).collect();
    let statements: Vec<String> = facts.iter().map(Fact::statement).collect();
    let taken: usize = turns.iter().map(|turn| turn.question.len() + turn.answer.len()).sum();
    let stated: usize = statements.iter().map(|statement| statement.len() + 1).sum();
    let mut sentences = filler(rng, bytes.saturating_sub(taken + stated));
    for statement in statements {
        sentences.insert(rng.random_range(0..=sentences.len()), statement);
    }
    Problem { context: sentences.join(" "), turns }
}

/// Roads between places, all on one round trip, in random order; the answer is the walk along them, a line a step, with the
/// number of steps that are left, so that nothing far away says where it ends:
///
/// ```text
/// ka-mo lu-re mo-lu ...
///
/// from ka, 21 steps.
/// 21. ka-mo and then along the road
/// 20. mo-lu and then along the road
/// ...
/// = xy
/// ```
///
/// No place is visited twice, so that each step must look up its road, ever further back. The whole has at most `bytes`
/// bytes, 22 to 25 steps at 1024, and never more than 80 places (3,100 bytes). A `bytes` under [`MIN_BYTES`] counts as that.
pub fn chain(rng: &mut StdRng, bytes: usize) -> Problem {
    let bytes = bytes.max(MIN_BYTES);
    let most = (1..CONSONANTS.len() * VOWELS.len()).take_while(|&steps| chain_bytes(steps, steps + 1) <= bytes).count();
    let steps = most.saturating_sub(rng.random_range(0..=3)).max(1);
    let spare = (0..=rng.random_range(0..=2)).rev().find(|spare| chain_bytes(steps, steps + 1 + spare) <= bytes);
    let places = round_trip(rng, steps + 1 + spare.unwrap_or(0));
    let mut roads: Vec<String> =
        places.iter().zip(places.iter().cycle().skip(1)).map(|(from, to)| format!("{from}-{to}")).collect();
    roads.shuffle(rng);
    let question = format!("\nfrom {}, {steps} steps.\n", places[0]);
    let walk = (0..steps).map(|i| format!("{}. {}-{}{STEP}\n", steps - i, places[i], places[i + 1]));
    let answer = walk.collect::<String>() + &format!("= {}\n", places[steps]);
    Problem { context: roads.join(" ") + "\n", turns: vec![Turn { question, answer }] }
}

/// What each step of a walk ends with: words, so that the map is soon far away.
const STEP: &str = " and then along the road";

/// Bytes of a chain of this many steps among so many places.
fn chain_bytes(steps: usize, places: usize) -> usize {
    let digits = |n: usize| n.to_string().len();
    let lines: usize = (1..=steps).map(|i| digits(i) + ". ka-mo\n".len() + STEP.len()).sum();
    places * "ka-mo ".len() + "\nfrom ka,  steps.\n".len() + digits(steps) + lines + "= mo\n".len()
}

/// Places in the order of the road that joins them.
fn round_trip(rng: &mut StdRng, places: usize) -> Vec<String> {
    let names = CONSONANTS.chars().flat_map(|first| VOWELS.chars().map(move |second| format!("{first}{second}")));
    let mut names: Vec<String> = names.collect();
    names.shuffle(rng);
    names.truncate(places);
    names
}

const CONSONANTS: &str = "bdfghjklmnprstvz";
const VOWELS: &str = "aeiou";

/// How many facts a context states, and how many of them are asked for.
const FACTS: RangeInclusive<usize> = 4..=10;
const ASKED: RangeInclusive<usize> = 2..=4;
/// Bytes that a fact and a question about it take at the most.
const FACT_ROOM: usize = 60;

#[derive(Debug)]
struct Fact {
    subject: &'static str,
    value: String,
}

impl Fact {
    fn statement(&self) -> String {
        format!("code {} {}.", self.subject, self.value)
    }

    fn turn(&self) -> Turn {
        Turn { question: format!("\ncode {}", self.subject), answer: format!(" {}\n", self.value) }
    }
}

fn facts(rng: &mut StdRng, count: RangeInclusive<usize>) -> Vec<Fact> {
    let count = rng.random_range(count);
    let subjects: Vec<&'static str> = SUBJECTS.choose_multiple(rng, count).copied().collect();
    let value = |rng: &mut StdRng| format!("{:04}", rng.random_range(0..10_000));
    subjects.into_iter().map(|subject| Fact { subject, value: value(rng) }).collect()
}

/// The range, cut off at `most` but never empty.
fn up_to(range: RangeInclusive<usize>, most: usize) -> RangeInclusive<usize> {
    let most = most.max(1);
    *range.start().min(&most)..=*range.end().min(&most)
}

/// Sentences that take up to `room` bytes, each with a space.
fn filler(rng: &mut StdRng, mut room: usize) -> Vec<String> {
    let mut sentences = vec![];
    while let Some(sentence) = (0..TRIES).map(|_| sentence(rng)).find(|sentence| sentence.len() < room) {
        room -= sentence.len() + 1;
        sentences.push(sentence);
    }
    sentences
}

/// Sentences that are tried before what room is left stays empty.
const TRIES: usize = 40;

fn sentence(rng: &mut StdRng) -> String {
    let mut word = |list: &[&'static str]| list.choose(rng).copied().unwrap_or_default();
    let (noun, verb) = (word(NOUNS), word(VERBS));
    match word(&["plain", "where", "when", "two"]) {
        "plain" => format!("the {noun} {verb}."),
        "where" => format!("the {} {noun} {verb} {} the {}.", word(ADJECTIVES), word(PREPOSITIONS), word(NOUNS)),
        "when" => format!("{} the {noun} {verb} {}.", word(TIMES), word(ADVERBS)),
        _ => format!("a {noun} {verb} and a {} {} {}.", word(NOUNS), word(VERBS), word(ADVERBS)),
    }
}

// What can be asked for does not occur in the sentences around it.
const SUBJECTS: &[&str] = &[
    "agate", "alder", "almond", "amber", "aspen", "badger", "barley", "basil", "beryl", "birch", "cedar", "cherry",
    "clover", "cobalt", "copper", "coral", "cotton", "crane", "cypress", "daisy", "ebony", "falcon", "fennel",
    "ferret", "garnet", "ginger", "hazel", "heron", "indigo", "iris", "ivory", "jade", "jasmine", "juniper", "laurel",
    "lemon", "lilac", "lotus", "magpie", "maple", "marble", "mint", "myrtle", "nettle", "nutmeg", "olive", "onyx",
    "opal", "orchid", "osprey", "otter", "pearl", "pepper", "poppy", "quartz", "quince", "raven", "ruby", "saffron",
    "salmon", "sesame", "silver", "sorrel", "spruce", "thistle", "topaz", "tulip", "velvet", "violet", "walnut",
    "willow", "zinc",
];

const NOUNS: &[&str] = &[
    "baker", "barn", "bell", "bird", "boat", "boy", "bridge", "cart", "cat", "cloud", "cook", "cow", "dog", "door",
    "farmer", "field", "fire", "fish", "fox", "garden", "gate", "girl", "goat", "guest", "hill", "horse", "house",
    "lamp", "man", "mill", "moon", "mouse", "owl", "path", "river", "road", "ship", "shop", "singer", "stone", "storm",
    "sun", "teacher", "tower", "train", "tree", "wagon", "wall", "wind", "woman", "wood",
];
const VERBS: &[&str] = &[
    "ages", "breaks", "calls", "climbs", "comes", "falls", "grows", "hides", "jumps", "leaves", "listens", "moves",
    "rests", "returns", "rises", "runs", "shines", "sings", "sleeps", "stands", "stays", "stops", "turns", "waits",
    "walks", "wakes",
];
const ADJECTIVES: &[&str] = &[
    "big", "black", "blue", "bright", "brown", "calm", "cold", "dark", "dry", "early", "green", "grey", "happy",
    "kind", "little", "lonely", "long", "new", "old", "pale", "quiet", "red", "round", "slow", "small", "strong",
    "tall", "warm", "white", "young",
];
const PREPOSITIONS: &[&str] = &["above", "behind", "below", "beside", "beyond", "near", "over", "past", "under"];
const ADVERBS: &[&str] = &[
    "again", "alone", "apart", "away", "badly", "deeply", "early", "gladly", "here", "late", "gently", "once",
    "outside", "slowly", "softly", "there", "twice", "well",
];
const TIMES: &[&str] = &[
    "at dawn",
    "at night",
    "at noon",
    "at times",
    "by day",
    "every day",
    "in autumn",
    "in spring",
    "in summer",
    "in winter",
    "later",
    "now",
    "often",
    "soon",
    "then",
    "today",
];

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use std::collections::{HashMap, HashSet};

    fn many(make: fn(&mut StdRng, usize) -> Problem) -> Vec<(usize, Problem)> {
        let sizes = [0, 128, 200, 256, 512, 777, 1024, 2048, 5000];
        let seeds = sizes.iter().flat_map(|&bytes| (0..40).map(move |seed| (bytes, seed)));
        seeds.map(|(bytes, seed)| (bytes, make(&mut StdRng::seed_from_u64(seed), bytes))).collect()
    }

    fn assert_shape(bytes: usize, problem: &Problem) {
        let text = problem.text();
        assert!(text.len() <= bytes.max(MIN_BYTES), "{} bytes for {bytes}: {text}", text.len());
        assert!(text.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{text}");
        assert!(!problem.context.is_empty() && !problem.turns.is_empty());
        for turn in &problem.turns {
            assert!(turn.question.starts_with('\n') && turn.answer.ends_with('\n'), "{turn:?}");
        }
        let last = problem.turns.len() - 1;
        assert_eq!(problem.before_answer(last) + &problem.turns[last].answer, text);
    }

    #[test]
    fn what_recall_asks_for_was_stated_once() {
        for (bytes, problem) in many(recall) {
            assert_shape(bytes, &problem);
            let sentences = problem.context.split_terminator('.').map(str::trim);
            let facts = sentences.filter_map(|s| s.strip_prefix("code ")?.split_once(" "));
            let facts: Vec<(&str, &str)> = facts.collect();
            let known: HashMap<&str, &str> = facts.iter().copied().collect();
            assert_eq!(known.len(), facts.len(), "a subject twice");
            let mut asked = HashSet::new();
            for Turn { question, answer } in &problem.turns {
                let subject = question.strip_prefix("\ncode ").unwrap();
                assert_eq!(answer, &format!(" {}\n", known[subject]));
                assert!(answer.len() == 6 && asked.insert(subject));
            }
            if bytes >= 1000 {
                assert!(FACTS.contains(&facts.len()) && ASKED.contains(&problem.turns.len()));
                assert!(problem.text().len() * 100 >= bytes * 98, "{} of {bytes}", problem.text().len());
            }
        }
    }

    #[test]
    fn a_chain_walks_the_roads_of_its_map() {
        for (bytes, problem) in many(chain) {
            assert_shape(bytes, &problem);
            let roads: Vec<(&str, &str)> =
                problem.context.split_whitespace().map(|road| road.split_once('-').unwrap()).collect();
            let map: HashMap<&str, &str> = roads.iter().copied().collect();
            assert_eq!((map.len(), map.values().collect::<HashSet<_>>().len()), (roads.len(), roads.len()));
            let Turn { question, answer } = &problem.turns[0];
            let (start, steps) = question.trim().strip_prefix("from ").unwrap().split_once(", ").unwrap();
            let steps: usize = steps.strip_suffix(" steps.").unwrap().parse().unwrap();
            let (mut at, mut expected) = (start, String::new());
            for i in (1..=steps).rev() {
                expected += &format!("{i}. {at}-{} and then along the road\n", map[at]);
                at = map[at];
            }
            assert_eq!(*answer, expected + &format!("= {at}\n"));
            assert!(steps < roads.len());
            if bytes == 1024 {
                assert!((22..=25).contains(&steps) && (23..=28).contains(&roads.len()), "{steps}, {}", roads.len());
            }
        }
    }

    #[test]
    fn a_seed_makes_the_same_problem() {
        let make = |seed| [recall, chain].map(|make| make(&mut StdRng::seed_from_u64(seed), 1024));
        assert_eq!(make(3), make(3));
        assert_ne!(make(3), make(4));
    }

    #[test]
    fn sentences_never_speak_of_what_can_be_asked_for() {
        assert!(SUBJECTS.len() >= 60 && SUBJECTS.iter().collect::<HashSet<_>>().len() == SUBJECTS.len());
        let lists = [NOUNS, VERBS, ADJECTIVES, PREPOSITIONS, ADVERBS, TIMES];
        assert!(lists.iter().flat_map(|list| list.iter()).all(|word| !SUBJECTS.contains(word)));
        let longest = SUBJECTS.iter().map(|subject| subject.len()).max().unwrap();
        assert!(2 * longest + "code  0000. \ncode  0000\n".len() <= FACT_ROOM);
    }
}
