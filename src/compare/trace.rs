//! Which tokens of an example each policy holds, over time.

use super::{Contender, Excerpts, Plan, Subject, Task, retrieval, turns};
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// What one policy held of an example: a line of `trace.jsonl`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// The policy's label.
    pub policy: String,
    /// Context length of the contest, in tokens.
    pub context: usize,
    /// The text of each token.
    pub pieces: Vec<String>,
    /// Tokens that were read as a prompt; the others came one by one, as if generated.
    pub prompt: usize,
    /// Tokens seen at each moment, the last of which is the end.
    pub seen: Vec<usize>,
    /// At each moment, for each token seen, the number of KV heads of all layers that held it.
    pub held: Vec<Vec<usize>>,
    /// Entries held at the end, by layer and KV head.
    pub live: Vec<Vec<usize>>,
}

/// Moments while the prompt is read, and while tokens come one by one.
const MOMENTS: [usize; 2] = [12, 6];
/// Longer examples are not looked at: there is a number for every token and moment.
pub(super) const LONGEST: usize = 4096;

/// The contenders of the contest with the shortest context at the same example, the first part of it read in pieces as a prompt
/// and the rest token by token: of `recall` and `chain` the first sample with its right answers, of tasks with a question the
/// first prompt, else an excerpt of the text, a quarter of which is the rest. Empty where that context is longer than 4,096
/// tokens, and for a subject that only generates.
///
/// # Errors
/// Those of the host.
pub fn trace(subject: &dyn Subject, plan: &Plan) -> Result<Vec<Trace>> {
    if subject.only_generates() {
        return Ok(vec![]);
    }
    let contests = plan.contests.iter().filter(|contest| contest.context <= LONGEST);
    let Some(contest) = contests.min_by_key(|contest| contest.context) else { return Ok(vec![]) };
    let texts = Excerpts { subject, plan, contest };
    let parts = example(&texts)?;
    let pieces = parts.iter().flatten().map(|token| Ok(subject.decode(&[*token])?)).collect::<Result<Vec<_>>>()?;
    contest.contenders.iter().map(|contender| follow(&texts, contender, &parts, &pieces)).collect()
}

/// What is read as a prompt, and what comes token by token.
fn example(texts: &Excerpts) -> Result<[Vec<u32>; 2]> {
    match texts.contest.tasks.first() {
        Some(&task @ (Task::Recall | Task::Chain)) => turns::example(texts, task),
        Some(Task::Ask(ask, _)) => Ok(retrieval::prompt(texts, *ask, 0)?.into_parts()),
        _ => {
            let (mut tokens, _) = texts.cut(&mut texts.rng(0), texts.context())?;
            let rest = tokens.split_off(tokens.len() * 3 / 4);
            Ok([tokens, rest])
        }
    }
}

fn follow(texts: &Excerpts, contender: &Contender, parts: &[Vec<u32>; 2], pieces: &[String]) -> Result<Trace> {
    let (spec, mut sequence) = (texts.subject.spec(), texts.subject.open(&contender.policy)?);
    let [prompt, rest] = parts;
    let mut trace = Trace {
        policy: contender.label.clone(),
        context: texts.context(),
        pieces: pieces.to_vec(),
        prompt: prompt.len(),
        ..Trace::default()
    };
    let mut seen = 0;
    let mut look = |held: Vec<Vec<Vec<u32>>>, new: usize| {
        seen += new;
        let mut counts = vec![0; seen];
        held.iter().flatten().flatten().for_each(|&position| counts[position as usize] += 1);
        trace.live = held.iter().map(|layer| layer.iter().map(Vec::len).collect()).collect();
        trace.seen.push(seen);
        trace.held.push(counts);
    };
    let pieces = prompt.chunks(prompt.len().div_ceil(MOMENTS[0]).max(1));
    let count = pieces.len();
    for (i, piece) in pieces.enumerate() {
        sequence.prefill(piece, i + 1 == count)?;
        look((0..spec.layers).map(|layer| sequence.held(layer)).collect(), piece.len());
    }
    for piece in rest.chunks(rest.len().div_ceil(MOMENTS[1]).max(1)) {
        for &token in piece {
            sequence.decode(token)?;
        }
        look((0..spec.layers).map(|layer| sequence.held(layer)).collect(), piece.len());
    }
    Ok(trace)
}
