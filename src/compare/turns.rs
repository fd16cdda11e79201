//! Problems that are read, compressed, and then asked about.

use super::{
    Contender, Excerpts, Log, Sample, Sequence, Task,
    problems::Problem,
    retrieval::{at_line_ends, first_number, greedy, last_line},
};
use crate::{
    error::{Error, Result},
    stats::Stats,
};

pub(super) fn run(texts: &Excerpts, task: Task, log: &mut Log) -> Result<()> {
    for sample in 0..texts.plan.samples {
        let contenders = log.lacking(texts, task, sample, 0);
        if contenders.is_empty() {
            continue;
        }
        let asked = Asked::new(texts, task, sample)?;
        for contender in contenders {
            log.unit(texts, task, contender);
            let (said, stats) = asked.ask(texts, contender)?;
            let last = said.len() - 1;
            for (i, (ask, Said { prompt, answer })) in asked.turns.iter().zip(said).enumerate() {
                log.add(Sample {
                    prompt,
                    expected: Some(ask.expected.clone()),
                    correct: Some(is_right(task, &ask.expected, &answer)),
                    answer: Some(answer),
                    kv: (i == last).then_some(stats),
                    ..Sample::new(task, contender, texts.context(), sample)
                })?;
            }
        }
    }
    Ok(())
}

/// A problem in tokens.
struct Asked {
    task: Task,
    text: String, // that the context's tokens stand for
    context: Vec<u32>,
    turns: Vec<Ask>,
}

struct Ask {
    /// What is read: the newline that ends the answer before, and the question.
    text: String,
    tokens: Vec<u32>,
    /// The answer, without the newline at its end.
    expected: String,
    /// Tokens it may have.
    most: usize,
}

/// A turn as it went.
struct Said {
    prompt: String,
    answer: String,
}

impl Asked {
    fn new(texts: &Excerpts, task: Task, sample: usize) -> Result<Self> {
        let problem = fitting(texts, task, sample)?;
        let encode = |text: &str| texts.subject.encode(text);
        // What a wrong answer may take beyond a right one, in a context that may have no room left.
        let room = texts.subject.max_context().max(texts.context()) - encode(&problem.text())?.len();
        let room = room / problem.turns.len();
        let (mut context, mut turns, mut said) = (encode(&problem.context)?, vec![], problem.context.clone());
        for (i, turn) in problem.turns.iter().enumerate() {
            let text = format!("{}{}", if i == 0 { "" } else { "\n" }, turn.question);
            let expected = turn.answer.trim_end_matches('\n').to_string();
            let [front, tokens] = texts.parted(&format!("{said}{text}"), said.len())?;
            let before_answer = front.len() + tokens.len();
            if i == 0 {
                context = front;
            }
            said = format!("{said}{text}{expected}");
            let answer = encode(&format!("{said}\n"))?.len().saturating_sub(before_answer);
            let more = if task == Task::Chain { answer * 3 / 10 } else { MORE };
            turns.push(Ask { tokens, text, expected, most: answer + more.min(room) });
        }
        Ok(Self { task, text: problem.context, context, turns })
    }

    /// The answers of one policy, in one sequence: it compresses the context before it reads a question.
    fn ask(&self, texts: &Excerpts, contender: &Contender) -> Result<(Vec<Said>, Stats)> {
        let mut sequence = texts.subject.open(&contender.policy)?;
        sequence.prefill(&self.context, true)?;
        let (mut text, mut turns) = (self.text.clone(), vec![]);
        for ask in &self.turns {
            text += &ask.text;
            let answer = self.answer(texts, &mut *sequence, ask)?;
            turns.push(Said { prompt: text.clone(), answer: answer.clone() });
            text += answer.trim_end_matches('\n');
        }
        Ok((turns, sequence.stats()))
    }

    /// Greedy, to the newline that ends the answer, which is not fed: the next question brings its own.
    fn answer(&self, texts: &Excerpts, sequence: &mut dyn Sequence, ask: &Ask) -> Result<String> {
        let is_whole = at_line_ends(texts, |answer| is_whole(self.task, answer));
        greedy(texts, sequence, &ask.tokens, ask.most, is_whole)
    }
}

/// Tokens of an answer to `recall` beyond those of a right one.
const MORE: usize = 8;

/// The first sample as it is answered right: what is read before the first question, and the rest.
pub(super) fn example(texts: &Excerpts, task: Task) -> Result<[Vec<u32>; 2]> {
    let problem = fitting(texts, task, 0)?;
    texts.parted(&problem.text(), problem.context.len())
}

/// The last problem of those tried that fills the context.
fn fitting(texts: &Excerpts, task: Task, sample: usize) -> Result<Problem> {
    let context = texts.context();
    let refuse = |what: String| Error::Config(format!("context={context}: {what}"));
    let mut bytes = context;
    for _ in 0..TRIES {
        let problem = task.problem(&mut texts.rng(sample), bytes);
        let problem = problem.ok_or_else(|| refuse(format!("{task} has no problems")))?;
        let text = problem.text();
        let tokens = texts.subject.encode(&text)?.len().max(1);
        // Bytes of which there would be `context` tokens.
        let wanted = context * text.len() / tokens;
        if tokens > context {
            bytes = wanted.min(bytes - bytes / 64);
        } else if wanted > bytes + bytes / 64 && text.len() * 10 > bytes * 7 {
            bytes = wanted;
        } else {
            return Ok(problem);
        }
    }
    Err(refuse(format!("no {task} of so few tokens could be made; give a longer context")))
}

const TRIES: usize = 12;

/// Whether an answer that ends in a newline has nothing more to say.
fn is_whole(task: Task, answer: &str) -> bool {
    task != Task::Chain || last_line(answer).starts_with('=')
}

fn is_right(task: Task, expected: &str, answer: &str) -> bool {
    match task {
        Task::Chain => last_line(answer).trim_end() == last_line(expected),
        _ => first_number(answer) == first_number(expected),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        compare::{
            Contest, Plan,
            oracle::{Notes, Oracle, play},
            run,
        },
        policies::Full,
    };
    use std::sync::Arc;

    const BOTH: [Task; 2] = [Task::Recall, Task::Chain];
    const CONTEXTS: [usize; 4] = [128, 400, 1024, 1100];

    #[test]
    fn a_model_that_knows_answers_everything_right() {
        let oracle = Oracle::new(true);
        let (rows, samples) = play(&oracle, &BOTH, &CONTEXTS).unwrap();
        assert_eq!(rows.len(), 8);
        assert!(rows.iter().all(|row| row.metrics.accuracy == Some(1.0) && row.samples == 3), "{rows:?}");
        assert_eq!(rows.iter().map(|row| row.metrics.questions.unwrap()).sum::<u64>(), samples.len() as u64);
        assert!(
            samples.iter().all(|s| s.answer.as_ref().unwrap().trim_end_matches('\n') == s.expected.as_ref().unwrap())
        );
        assert!(samples.iter().all(|s| s.prompt.len() < s.context && s.correct == Some(true)));
        // The second question follows the first answer.
        let turns = samples.iter().filter(|s| s.task == "recall" && s.prompt.matches("\ncode ").count() == 2);
        assert!(turns.clone().count() > 0 && turns.clone().all(|s| s.prompt.contains("\n\ncode ")));
        assert!(*oracle.most.borrow() <= 1100);
    }

    #[test]
    fn a_model_that_never_ends_is_cut_off() {
        let oracle = Oracle::new(false);
        let (rows, samples) = play(&oracle, &BOTH, &CONTEXTS).unwrap();
        assert!(rows.iter().all(|row| row.metrics.correct == Some(0)));
        for sample in samples.iter().filter(|s| s.context == 1024) {
            let (said, right) = (sample.answer.as_ref().unwrap().len(), sample.expected.as_ref().unwrap().len());
            assert!(said > right && said <= right + right / 3 + 9, "{said} for {right}");
        }
        assert!(*oracle.most.borrow() <= 1100);
    }

    #[test]
    fn a_task_that_cuts_text_says_that_it_needs_one() {
        let oracle = Oracle::new(true);
        let contenders = vec![Contender { label: "full".into(), policy: Arc::new(Full {}) }];
        let contests = vec![Contest { context: 256, tasks: vec![Task::Ppl, Task::Kl], contenders }];
        let plan = Plan { contests, samples: 1, seed: 0, text: None, exams: vec![], sampling: Default::default() };
        let error = run(&oracle, &plan, vec![], &mut Notes::default()).unwrap_err().to_string();
        assert!(error.contains("ppl") && error.contains("--text"), "{error}");
    }
}
