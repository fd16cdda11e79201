//! A model for tests: it reads bytes, and knows every answer or none.

use super::{
    Contender, Contest, HostError, Next, Plan, Progress, Row, Sample, Sequence, Subject, Task, TextModel, run,
};
use crate::{error::Result, policies::Full, policy::Policy, spec::ModelSpec, stats::Stats};
use std::{cell::RefCell, sync::Arc};

type Hosted<T> = std::result::Result<T, HostError>;
const BOS: u32 = 256;

pub(super) struct Oracle {
    knows: bool,
    /// Tokens of the longest sequence.
    pub(super) most: RefCell<usize>,
    /// What had been read wherever a prompt or a question ended.
    pub(super) compressed: RefCell<Vec<String>>,
}

impl Oracle {
    pub(super) fn new(knows: bool) -> Self {
        Self { knows, most: RefCell::default(), compressed: RefCell::default() }
    }
}

struct Reader<'a> {
    oracle: &'a Oracle,
    text: String,
}

impl TextModel for Oracle {
    fn spec(&self) -> ModelSpec {
        ModelSpec::new(1, 1, 1, 8)
    }

    fn max_context(&self) -> usize {
        1100
    }

    fn encode(&self, text: &str) -> Hosted<Vec<u32>> {
        Ok(std::iter::once(BOS).chain(text.bytes().map(u32::from)).collect())
    }

    fn decode(&self, tokens: &[u32]) -> Hosted<String> {
        Ok(tokens.iter().filter(|&&t| t != BOS).map(|&t| t as u8 as char).collect())
    }

    fn is_end(&self, token: u32) -> bool {
        token == BOS
    }

    fn chat(&self, user: &str) -> Hosted<String> {
        Ok(user.to_string() + "\n")
    }
}

impl Subject for Oracle {
    fn open(&self, _: &Arc<dyn Policy>) -> Hosted<Box<dyn Sequence + '_>> {
        Ok(Box::new(Reader { oracle: self, text: String::new() }))
    }
}

impl Reader<'_> {
    fn read(&mut self, tokens: &[u32]) -> Hosted<Next> {
        assert_eq!(tokens.contains(&BOS), self.text.is_empty());
        self.text += &self.oracle.decode(tokens)?;
        let mut most = self.oracle.most.borrow_mut();
        *most = (*most).max(self.text.len() + 1);
        let next = if self.oracle.knows { right(&self.text).unwrap_or(b'?') } else { b'1' };
        Ok(Next::Logits((0..=BOS).map(|token| (token == next as u32) as u8 as f32).collect()))
    }
}

impl Sequence for Reader<'_> {
    fn prefill(&mut self, tokens: &[u32], last: bool) -> Hosted<Next> {
        let logits = self.read(tokens)?;
        if last {
            self.oracle.compressed.borrow_mut().push(self.text.clone());
        }
        Ok(logits)
    }

    fn decode(&mut self, token: u32) -> Hosted<Next> {
        self.read(&[token])
    }

    fn held(&self, _: usize) -> Vec<Vec<u32>> {
        vec![(0..self.text.len() as u32).collect()]
    }

    fn stats(&self) -> Stats {
        Stats { mean_dense_entries: 2.0, mean_live_entries: 1.0, ..Stats::default() }
    }
}

/// The byte that goes on with the answer to the last question.
fn right(text: &str) -> Option<u8> {
    let (answer, said) = match text.rsplit_once("\nThe <REGISTER_CONTENT> in line ") {
        Some((context, begun)) => in_register(context, begun)?,
        None => in_problem(text)?,
    };
    answer.as_bytes().get(said.len()).copied()
}

/// The answer in a register of lines, and what was said of it.
fn in_register<'a>(context: &str, begun: &'a str) -> Option<(String, &'a str)> {
    let (key, said) = begun.split_once(" is <")?;
    let value = context.split_once(&format!("\nline {key}: REGISTER_CONTENT is <"))?.1.get(..5)?;
    Some((format!("{value}>."), said))
}

/// The answer to the last question of a problem, and what was said of it.
fn in_problem(text: &str) -> Option<(String, &str)> {
    match text.split_once("\nfrom ") {
        None => {
            let context = text.split('\n').next()?;
            let asked = text.rsplit("\ncode ").next()?;
            let (subject, said) = asked.split_at(asked.find(' ').unwrap_or(asked.len()));
            let value = context.split_once(&format!("code {subject} "))?.1.get(..4)?;
            Some((format!(" {value}\n"), said))
        }
        Some((context, asked)) => {
            let (asked, said) = asked.split_once(" steps.\n")?;
            let (start, steps) = asked.split_once(", ")?;
            let road = |from: &str| context.split_once(&format!("{from}-")).map(|(_, rest)| rest[..2].to_string());
            let (mut at, mut walk) = (start.to_string(), String::new());
            for i in (1..=steps.parse::<usize>().ok()?).rev() {
                let to = road(&at)?;
                walk += &format!("{i}. {at}-{to} and then along the road\n");
                at = to;
            }
            Some((walk + &format!("= {at}\n"), said))
        }
    }
}

#[derive(Default)]
pub(super) struct Notes(pub(super) Vec<Sample>);

impl Progress for Notes {
    fn start(&mut self, _: u64) {}

    fn unit(&mut self, _: &str) {}

    fn sample(&mut self, sample: &Sample) -> Result<()> {
        self.0.push(sample.clone());
        Ok(())
    }
}

/// Three samples of every task at every context under `full`.
pub(super) fn play(oracle: &Oracle, tasks: &[Task], contexts: &[usize]) -> Result<(Vec<Row>, Vec<Sample>)> {
    let contenders = vec![Contender { label: "full".into(), policy: Arc::new(Full {}) }];
    let contest = |context, task| Contest { context, tasks: vec![task], contenders: contenders.clone() };
    let contests = contexts.iter().flat_map(|&context| tasks.iter().map(move |&task| (context, task)));
    let contests = contests.map(|(context, task)| contest(context, task)).collect();
    let mut notes = Notes::default();
    let rows = run(
        oracle,
        &Plan { contests, samples: 3, seed: 7, text: None, exams: vec![], sampling: Default::default() },
        vec![],
        &mut notes,
    )?;
    Ok((rows, notes.0))
}
