//! Benchmark files, a JSON object a line, in the fields they are published with.

use super::{
    Benchmark, Key, Question,
    answer::{boxed, number},
    invalid,
    program::{Case, Tests},
};
use crate::error::{Error, Result};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde::Deserialize;
use serde_json::Value;

/// The questions of a file; `seed` orders the choices of each.
///
/// # Errors
/// [`Error::Config`] naming the line and the field that is missing or wrong, or for a file without questions.
pub(super) fn questions(benchmark: Benchmark, text: &str, seed: u64) -> Result<Vec<Question>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let questions: Vec<Question> = lines
        .map(|(i, line)| {
            question(benchmark, line, seed.wrapping_add(i as u64))
                .map_err(|e| invalid(&format!("line {} of {benchmark}", i + 1), &e))
        })
        .collect::<Result<_>>()?;
    match questions.is_empty() {
        true => Err(Error::Config(format!("the file of {benchmark} has no questions"))),
        false => Ok(questions),
    }
}

fn question(benchmark: Benchmark, line: &str, seed: u64) -> std::result::Result<Question, serde_json::Error> {
    match benchmark {
        Benchmark::Gsm8k => serde_json::from_str::<Gsm8k>(line)?.question(),
        Benchmark::Math500 => serde_json::from_str::<Math>(line)?.question(),
        Benchmark::Aime => serde_json::from_str::<Aime>(line)?.question(),
        Benchmark::GpqaDiamond => Ok(serde_json::from_str::<Gpqa>(line)?.question(seed)),
        Benchmark::HumanEval => Ok(serde_json::from_str::<HumanEval>(line)?.question()),
        Benchmark::LiveCodeBench => serde_json::from_str::<LiveCodeBench>(line)?.question(),
    }
}

fn wrong(field: &str, what: &str) -> serde_json::Error {
    serde::de::Error::custom(format!("field `{field}` {what}"))
}

const IN_A_BOX: &str = "Think step by step, and put the answer in \\boxed{}.";

#[derive(Deserialize)]
struct Gsm8k {
    question: String,
    answer: String,
}

impl Gsm8k {
    fn question(self) -> std::result::Result<Question, serde_json::Error> {
        let known = self.answer.rsplit_once("####").and_then(|(_, known)| number(known));
        let known = known.ok_or_else(|| wrong("answer", "has no number behind `####`"))?;
        let prompt =
            format!("{}\n\nThink step by step, and end with a line `#### ` and the answer, a number.", self.question);
        Ok(Question { prompt, key: Key::Number(known) })
    }
}

#[derive(Deserialize)]
struct Math {
    problem: String,
    answer: Option<String>,
    solution: Option<String>,
}

impl Math {
    fn question(self) -> std::result::Result<Question, serde_json::Error> {
        let solved = self.solution.as_deref().and_then(boxed).map(String::from);
        let known = self.answer.or(solved).ok_or_else(|| wrong("answer", "is missing, and `solution` has no box"))?;
        Ok(Question { prompt: format!("{}\n\n{IN_A_BOX}", self.problem), key: Key::Math(known) })
    }
}

/// Two collections of AIME differ in the case of their fields.
#[derive(Deserialize)]
struct Aime {
    #[serde(alias = "Problem", alias = "question")]
    problem: String,
    #[serde(alias = "Answer")]
    answer: Value,
}

impl Aime {
    fn question(self) -> std::result::Result<Question, serde_json::Error> {
        let text = self.answer.as_str().map_or_else(|| self.answer.to_string(), String::from);
        let known = text.trim().parse().ok().filter(|known| *known < 1000);
        let known = known.ok_or_else(|| wrong("answer", "is no whole number from 0 to 999"))?;
        Ok(Question { prompt: format!("{}\n\n{IN_A_BOX}", self.problem), key: Key::Integer(known) })
    }
}

#[derive(Deserialize)]
struct Gpqa {
    #[serde(rename = "Question")]
    question: String,
    #[serde(rename = "Correct Answer")]
    right: String,
    #[serde(rename = "Incorrect Answer 1")]
    wrong1: String,
    #[serde(rename = "Incorrect Answer 2")]
    wrong2: String,
    #[serde(rename = "Incorrect Answer 3")]
    wrong3: String,
}

impl Gpqa {
    /// The right choice stands first in the file, so that the order has to be drawn.
    fn question(self, seed: u64) -> Question {
        let mut choices = [(self.right, true), (self.wrong1, false), (self.wrong2, false), (self.wrong3, false)];
        choices.shuffle(&mut StdRng::seed_from_u64(seed));
        let listed: Vec<String> =
            ('A'..='D').zip(&choices).map(|(letter, (text, _))| format!("{letter}) {}", text.trim())).collect();
        let known = ('A'..='D').zip(&choices).find(|(_, (_, right))| *right).map_or('A', |(letter, _)| letter);
        let prompt = format!(
            "{}\n\n{}\n\nThink step by step, and end with a line `Answer: ` and the letter of the right choice.",
            self.question.trim(),
            listed.join("\n")
        );
        Question { prompt, key: Key::Choice(known) }
    }
}

#[derive(Deserialize)]
struct HumanEval {
    prompt: String,
    test: String,
    entry_point: String,
}

impl HumanEval {
    fn question(self) -> Question {
        let prompt = format!(
            "Complete this Python function. Answer with a code block that has the whole of it.\n\n```python\n{}```",
            self.prompt
        );
        let tests = Tests::Around { before: self.prompt, entry: self.entry_point, behind: self.test };
        Question { prompt, key: Key::Program(tests) }
    }
}

#[derive(Deserialize)]
struct LiveCodeBench {
    question_content: String,
    #[serde(default)]
    starter_code: String,
    public_test_cases: Value,
    #[serde(default)]
    private_test_cases: Value,
    #[serde(default)]
    metadata: Value,
}

impl LiveCodeBench {
    fn question(self) -> std::result::Result<Question, serde_json::Error> {
        let mut cases: Vec<Case> = nested(&self.public_test_cases)?;
        // Plain in some collections, packed in the published one.
        let packed = match (nested::<Vec<Case>>(&self.private_test_cases), &self.private_test_cases) {
            (Ok(more), _) => {
                cases.extend(more);
                String::new()
            }
            (Err(_), Value::String(packed)) => packed.clone(),
            (Err(_), Value::Null) => String::new(),
            (Err(error), _) => return Err(error),
        };
        if cases.is_empty() && packed.is_empty() {
            return Err(wrong("public_test_cases", "has no cases"));
        }
        let metadata: Value = nested(&self.metadata).unwrap_or_default();
        let function = metadata["func_name"].as_str().map(String::from);
        let how = match &function {
            Some(_) => format!("Complete this code:\n\n```python\n{}\n```", self.starter_code),
            None => "Write a Python program that reads standard input and writes standard output.".into(),
        };
        let prompt = format!("{}\n\n{how} Answer with a code block that has the whole of it.", self.question_content);
        Ok(Question { prompt, key: Key::Program(Tests::Cases { function, cases, packed }) })
    }
}

/// JSON, or JSON in a string.
fn nested<T: serde::de::DeserializeOwned>(value: &Value) -> std::result::Result<T, serde_json::Error> {
    match value {
        Value::String(text) => serde_json::from_str(text),
        value => serde_json::from_value(value.clone()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    fn one(benchmark: Benchmark, line: Value) -> Question {
        questions(benchmark, &format!("\n{line}\n"), 1).unwrap().remove(0)
    }

    #[test]
    fn every_benchmark_is_read_in_its_own_fields() {
        let gsm8k = one(Benchmark::Gsm8k, json!({"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 1,004"}));
        assert!(gsm8k.prompt.starts_with("How many?") && gsm8k.key == Key::Number(1004.0));
        let math =
            json!({"problem": "Half?", "solution": "So $\\boxed{\\frac{1}{2}}$", "answer": "\\frac{1}{2}", "level": 2});
        assert_eq!(one(Benchmark::Math500, math).key, Key::Math("\\frac{1}{2}".into()));
        let solved = json!({"problem": "Half?", "solution": "So $\\boxed{\\frac{1}{2}}$"});
        assert_eq!(one(Benchmark::Math500, solved).key, Key::Math("\\frac{1}{2}".into()));
        for answer in [json!("025"), json!(25), json!("25")] {
            assert_eq!(one(Benchmark::Aime, json!({"problem": "n?", "answer": answer})).key, Key::Integer(25));
        }
        assert_eq!(one(Benchmark::Aime, json!({"Problem": "n?", "Answer": 7})).key, Key::Integer(7));
        let eval = json!({"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": "def check(c): pass"});
        assert!(
            matches!(one(Benchmark::HumanEval, eval).key, Key::Program(Tests::Around { entry, .. }) if entry == "f")
        );
        let cases = "[{\"input\": \"1\", \"output\": \"2\", \"testtype\": \"stdin\"}]";
        let code = |private: Value, metadata: &str| json!({"question_content": "Double it.", "starter_code": "", "public_test_cases": cases, "private_test_cases": private, "metadata": metadata});
        let read = |line: Value| match one(Benchmark::LiveCodeBench, line).key {
            Key::Program(Tests::Cases { function, cases, packed }) => (function, cases.len(), packed),
            key => panic!("{key:?}"),
        };
        assert_eq!(read(code(json!("eJxr"), "{}")), (None, 1, "eJxr".into()));
        assert_eq!(read(code(json!(cases), "{\"func_name\": \"twice\"}")), (Some("twice".into()), 2, String::new()));
    }

    #[test]
    fn choices_are_shuffled_alike_for_a_seed() {
        let line = json!({"Question": "Which?", "Correct Answer": "right\n", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2", "Incorrect Answer 3": "w3", "Subdomain": "x"});
        let text = format!("{line}\n").repeat(40);
        let of = |seed| questions(Benchmark::GpqaDiamond, &text, seed).unwrap();
        let mut letters: Vec<char> = of(1)
            .iter()
            .map(|question| {
                let Key::Choice(letter) = question.key else { panic!() };
                assert!(question.prompt.contains(&format!("\n{letter}) right\n")), "{}", question.prompt);
                letter
            })
            .collect();
        assert_eq!(of(1), of(1));
        letters.sort();
        letters.dedup();
        assert_eq!(letters, ['A', 'B', 'C', 'D']);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (benchmark, text, words) in [
            (Benchmark::Gsm8k, "{\"question\": \"?\", \"answer\": \"4\"}", &["line 1 of gsm8k", "####"][..]),
            (Benchmark::Gsm8k, "\n{\"answer\": \"#### 4\"}", &["line 2", "question"]),
            (Benchmark::Aime, "{\"problem\": \"?\", \"answer\": \"1000\"}", &["999"]),
            (Benchmark::Math500, "{\"problem\": \"?\"}", &["answer"]),
            (Benchmark::HumanEval, "no json", &["line 1 of humaneval"]),
            (Benchmark::LiveCodeBench, "{\"question_content\": \"?\", \"public_test_cases\": []}", &["no cases"]),
            (Benchmark::GpqaDiamond, "\n\n", &["gpqa-diamond", "no questions"]),
        ] {
            let error = questions(benchmark, text, 0).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
