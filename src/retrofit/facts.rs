//! Small facts in many wordings, to be planted in training text and asked for later. Gates that only see running text
//! never learn to keep what will be asked for.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

/// Something that a text states once and a question asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// A sentence or line of the text.
    pub statement: String,
    /// Asks for it.
    pub question: String,
    /// A whole answer to the question.
    pub answer: String,
}

/// A sort of fact with the wordings that state it, ask for it and answer: all facts of a kind look alike.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    wordings: &'static Wordings,
    statement: &'static str,
    question: &'static str,
    answer: &'static str,
}

impl Kind {
    /// A random one.
    pub fn random(rng: &mut StdRng) -> Self {
        let wordings = &KINDS[rng.random_range(0..KINDS.len())];
        let mut one = |list: &'static [&'static str]| list[rng.random_range(0..list.len())];
        let (statement, question) = (one(wordings.statements), one(wordings.questions));
        Self { wordings, statement, question, answer: one(wordings.answers) }
    }

    /// A fact of this kind.
    pub fn fact(self, rng: &mut StdRng) -> Fact {
        let key = fill(self.wordings.subject, rng);
        // A value that the question would give away teaches nothing.
        let value = loop {
            let value = fill(self.wordings.value, rng);
            if words(&value).any(|word| words(&key).all(|known| !known.eq_ignore_ascii_case(word))) {
                break value;
            }
        };
        let say = |wording: &str| wording.replace("{key}", &key).replace("{value}", &value);
        Fact { statement: say(self.statement), question: say(self.question), answer: say(self.answer) }
    }
}

/// What one sort of fact can look like. `{key}` and `{value}` stand for what was drawn from the patterns.
#[derive(Debug)]
struct Wordings {
    subject: &'static str,
    value: &'static str,
    statements: &'static [&'static str],
    questions: &'static [&'static str],
    answers: &'static [&'static str],
}

const KINDS: &[Wordings] = &[
    Wordings {
        subject: "<name>",
        value: "<digits>",
        statements: &[
            "The locker of {key} opens with {value}.",
            "{key} was given badge number {value}.",
            "Please remember that {key}'s extension is {value}.",
            "For {key} the reference reads {value}.",
        ],
        questions: &[
            "Which number goes with {key}?",
            "What number was noted for {key}?",
            "I need the number of {key}. What was it?",
        ],
        answers: &["{value}", "It is {value}.", "{key}: {value}"],
    },
    Wordings {
        subject: "<name>",
        value: "<city>",
        statements: &[
            "{key} moved to {value} some years ago.",
            "Nobody knew that {key} came from {value}.",
            "In those days {key} kept a house in {value}.",
        ],
        questions: &[
            "Which place is {key} connected with?",
            "Where does {key} belong?",
            "What town is named with {key}?",
        ],
        answers: &["{value}", "{key} and {value} belong together.", "It was {value}."],
    },
    Wordings {
        subject: "the <adjective> <object>",
        value: "<name>",
        statements: &[
            "It turned out that {key} belonged to {value}.",
            "{value} had left {key} behind.",
            "Somebody said {key} was a gift from {value}.",
        ],
        questions: &["Whose was {key}?", "Who is named together with {key}?", "To whom does {key} go back?"],
        answers: &["{value}", "{value}'s.", "That was {value}."],
    },
    Wordings {
        subject: "<identifier>",
        value: "<digits>",
        statements: &[
            "{key} = {value}",
            "let {key} = {value};",
            "export {key}={value}",
            "{key}: {value}",
            "#define {key} {value}",
            "set {key} to {value}",
        ],
        questions: &["What is {key} set to?", "Value of {key}?", "print({key}) gives"],
        answers: &["{value}", "{key} = {value}", "`{value}`"],
    },
    Wordings {
        subject: "<identifier>",
        value: "<word>",
        statements: &[
            "def {key}(): return '{value}'",
            "{key}() answers with \"{value}\"",
            "the call {key} yields {value}",
            "id \"{key}\", tag \"{value}\"",
        ],
        questions: &["What comes back from {key}?", "Which word belongs to {key}?", "{key}() returns"],
        answers: &["{value}", "\"{value}\"", "{key} gives {value}."],
    },
    Wordings {
        subject: "<code>",
        value: "<digits>",
        statements: &[
            "Parcel {key} weighs {value} grams.",
            "| {key} | {value} |",
            "order {key}, amount {value}",
            "Ticket {key} was closed after {value} minutes.",
        ],
        questions: &["Which figure stands beside {key}?", "{key}: how much?", "Look up {key}."],
        answers: &["{value}", "{key} has {value}.", "The figure is {value}."],
    },
    Wordings {
        subject: "<adjective> <object>",
        value: "<code>",
        statements: &[
            "Shelf mark of {key}: {value}",
            "- {key} ({value})",
            "entry \"{key}\" carries the code {value}",
            "The {key} can be found under {value}.",
        ],
        questions: &["Under which code is the {key} listed?", "Code of the {key}?", "Give me the mark of the {key}."],
        answers: &["{value}", "The {key} has {value}.", "Code {value}."],
    },
    Wordings {
        subject: "<city>",
        value: "<digits> <object>s",
        statements: &[
            "The depot in {key} holds {value}.",
            "{key} reported {value} this week.",
            "From {key} they sent {value}.",
        ],
        questions: &["What does {key} have?", "What was counted in {key}?", "Which stock is named for {key}?"],
        answers: &["{value}", "{value} in {key}.", "There are {value}."],
    },
];

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty())
}

/// Replaces `<name>` and the like by random choices.
fn fill(pattern: &str, rng: &mut StdRng) -> String {
    let mut text = String::new();
    let mut rest = pattern;
    while let Some((before, (word, after))) = rest.split_once('<').and_then(|(b, a)| Some((b, a.split_once('>')?))) {
        text.push_str(before);
        text.push_str(&draw(word, rng));
        rest = after;
    }
    text + rest
}

fn draw(what: &str, rng: &mut StdRng) -> String {
    let one = |list: &[&str], rng: &mut StdRng| list.choose(rng).copied().unwrap_or_default().to_string();
    let string = |alphabet: &[u8], n: usize, rng: &mut StdRng| -> String {
        (0..n).map(|_| alphabet[rng.random_range(0..alphabet.len())] as char).collect()
    };
    match what {
        "name" => format!("{} {}", one(FIRST, rng), one(LAST, rng)),
        "city" => one(CITIES, rng),
        "adjective" => one(ADJECTIVES, rng),
        "object" => one(OBJECTS, rng),
        "word" => match rng.random_range(0..3) {
            0 => string(b"abcdefghijklmnopqrstuvwxyz", rng.random_range(4..9), rng),
            1 => one(OBJECTS, rng),
            _ => format!("{}{}", one(ADJECTIVES, rng), one(OBJECTS, rng)),
        },
        "identifier" => {
            // No hyphen: evaluations ask for keys of that form.
            let joint = ["_", "", "."][rng.random_range(0..3)];
            let name = format!("{}{joint}{}", one(ADJECTIVES, rng), one(OBJECTS, rng));
            if rng.random_bool(0.3) { name.to_uppercase() } else { name }
        }
        "code" => match rng.random_range(0..3) {
            0 => string(b"0123456789abcdef", rng.random_range(6..11), rng),
            1 => format!("{}-{}", string(b"ABCDEFGHJKLMNPQRSTUVWXYZ", 2, rng), string(b"0123456789", 4, rng)),
            _ => string(b"ABCDEFGHJKLMNPQRSTUVWXYZ23456789", rng.random_range(5..9), rng),
        },
        _ => {
            let digits = rng.random_range(2..9);
            let first = string(b"123456789", 1, rng);
            first + &string(b"0123456789", digits - 1, rng)
        }
    }
}

const FIRST: &[&str] = &[
    "Ada", "Amir", "Anke", "Bela", "Berit", "Carlos", "Chen", "Dagny", "Dario", "Edda", "Emeka", "Farid", "Freya",
    "Gita", "Goran", "Hana", "Henrik", "Ines", "Ivo", "Jorge", "Jun", "Kaja", "Karim", "Lena", "Luca", "Mara", "Milan",
    "Nadia", "Nils", "Olga", "Omar", "Paolo", "Petra", "Quinn", "Rania", "Rolf", "Sanna", "Stefan", "Tamar", "Teo",
    "Ulla", "Viktor", "Wanda", "Yara", "Yusuf", "Zoltan",
];
const LAST: &[&str] = &[
    "Abbott", "Almeida", "Baker", "Bergman", "Castillo", "Costa", "Dahl", "Demir", "Eriksen", "Farkas", "Fischer",
    "Gruber", "Haddad", "Horvat", "Ito", "Jansen", "Kaya", "Kowalski", "Larsen", "Lombardi", "Mbeki", "Moreau",
    "Nakamura", "Novak", "Okafor", "Olsen", "Park", "Petrov", "Quist", "Rossi", "Santos", "Schmidt", "Silva", "Tanaka",
    "Toth", "Usman", "Varga", "Weber", "Yamada", "Zeller",
];
const CITIES: &[&str] = &[
    "Aarhus", "Bilbao", "Cork", "Dakar", "Essen", "Fez", "Ghent", "Haifa", "Izmir", "Jena", "Kyoto", "Lima", "Malmo",
    "Nantes", "Oslo", "Porto", "Quito", "Riga", "Sofia", "Turin", "Umea", "Vigo", "Windhoek", "Xiamen", "Yerevan",
    "Zagreb",
];
const ADJECTIVES: &[&str] = &[
    "amber",
    "broken",
    "brass",
    "carved",
    "cobalt",
    "dusty",
    "early",
    "faded",
    "folded",
    "gilded",
    "hollow",
    "ivory",
    "jagged",
    "knotted",
    "lacquered",
    "late",
    "mended",
    "narrow",
    "oblong",
    "painted",
    "plain",
    "quilted",
    "rusty",
    "scarlet",
    "second",
    "silver",
    "spare",
    "striped",
    "tall",
    "tin",
    "upper",
    "velvet",
    "woven",
    "yellow",
];
const OBJECTS: &[&str] = &[
    "anchor", "basket", "bell", "candle", "chair", "clock", "compass", "drawer", "engine", "fiddle", "flask", "globe",
    "hammer", "harp", "jar", "kettle", "ladder", "lamp", "lantern", "mirror", "needle", "oar", "organ", "parcel",
    "pump", "quill", "ribbon", "saddle", "sail", "shelf", "spoon", "stove", "table", "tent", "trunk", "valve", "wagon",
    "whistle",
];

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn facts_say_what_they_are_asked_for() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..2000 {
            let kind = Kind::random(&mut rng);
            let fact = kind.fact(&mut rng);
            for text in [&fact.statement, &fact.question, &fact.answer] {
                assert!(!text.contains(['<', '>']) && !text.contains("{key}") && !text.contains("{value}"), "{text}");
            }
            // Some word of the answer is in the statement and not in the question: it can be answered from the text only.
            let has = |text: &str, word: &str| words(text).any(|known| known == word);
            let new = |word: &str| has(&fact.statement, word) && !has(&fact.question, word);
            assert!(words(&fact.answer).any(new), "{fact:?}");
        }
    }

    #[test]
    fn a_seed_draws_the_same_facts() {
        let draw = || Kind::random(&mut StdRng::seed_from_u64(7)).fact(&mut StdRng::seed_from_u64(8));
        assert_eq!(draw(), draw());
    }
}
