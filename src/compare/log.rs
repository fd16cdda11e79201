//! The samples of a run: those of an earlier one that was stopped, and what is added to them.

use super::{Contender, Excerpts, Plan, Progress, Sample, Task};
use crate::error::{Error, Result};
use std::collections::HashSet;

pub(super) struct Log<'a> {
    samples: Vec<Sample>,
    done: HashSet<Run>,
    progress: &'a mut dyn Progress,
}

/// A sample of a policy: one sequence of the model, with a line for each of its questions.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Run {
    task: String,
    policy: String,
    context: usize,
    sample: usize,
    repeat: usize,
}

impl Run {
    fn of(sample: &Sample) -> Self {
        let Sample { task, policy, context, sample, repeat, .. } = sample;
        Self { task: task.clone(), policy: policy.clone(), context: *context, sample: *sample, repeat: *repeat }
    }
}

impl<'a> Log<'a> {
    pub(super) fn new(plan: &Plan, done: Vec<Sample>, progress: &'a mut dyn Progress) -> Self {
        let runs: HashSet<Run> = done.iter().filter(|sample| sample.kv.is_some()).map(Run::of).collect();
        let all: usize = plan.contests.iter().map(|contest| contest.contenders.len() * plan.runs(contest)).sum();
        progress.start(all.saturating_sub(runs.len()) as u64);
        Self { samples: done, done: runs, progress }
    }

    /// The contenders that have not run this sample yet, or this repeat of it.
    pub(super) fn lacking<'c>(
        &self,
        texts: &Excerpts<'c>,
        task: Task,
        sample: usize,
        repeat: usize,
    ) -> Vec<&'c Contender> {
        let run =
            |contender: &Contender| Run { repeat, ..Run::of(&Sample::new(task, contender, texts.context(), sample)) };
        texts.contest.contenders.iter().filter(|contender| !self.done.contains(&run(contender))).collect()
    }

    /// A contender's turn.
    pub(super) fn unit(&mut self, texts: &Excerpts, task: Task, contender: &Contender) {
        self.progress.unit(&format!("{task} {} at {}", contender.label, texts.context()));
    }

    pub(super) fn add(&mut self, sample: Sample) -> Result<()> {
        check_finite(&sample)?;
        self.progress.sample(&sample)?;
        self.samples.push(sample);
        Ok(())
    }

    pub(super) fn samples(self) -> Vec<Sample> {
        self.samples
    }
}

/// What is no number can be neither compared nor written as JSON.
fn check_finite(sample: &Sample) -> Result<()> {
    let figures = [sample.nll, sample.kl].into_iter().flatten();
    if figures.chain(sample.kl_by_token.iter().map(|&kl| kl as f64)).all(f64::is_finite) {
        return Ok(());
    }
    let Sample { task, policy, context, sample, .. } = sample;
    Err(Error::Config(format!(
        "{task} of {policy} at context {context}, sample {sample}: the model's logits are no finite numbers; take a wider \
         type, such as f32"
    )))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Log;
    use crate::{
        compare::{
            Ask, Contender, Contest, Plan, Progress, Sample, Setting, Task,
            oracle::{Notes, Oracle},
            run,
        },
        error::Result,
        policies::Full,
    };
    use std::sync::Arc;

    /// Counts what lies ahead, too.
    #[derive(Default)]
    struct Told {
        units: u64,
        begun: u64,
        notes: Notes,
    }

    impl Progress for Told {
        fn start(&mut self, units: u64) {
            self.units = units;
        }

        fn unit(&mut self, _: &str) {
            self.begun += 1;
        }

        fn sample(&mut self, sample: &Sample) -> Result<()> {
            self.notes.sample(sample)
        }
    }

    #[test]
    fn figures_that_are_no_numbers_are_refused() {
        let (plan, mut notes) = (
            Plan { contests: vec![], samples: 1, seed: 0, text: None, exams: vec![], sampling: Default::default() },
            Notes::default(),
        );
        let mut log = Log::new(&plan, vec![], &mut notes);
        let sample = |nll, kl_by_token| Sample { task: "kl".into(), nll: Some(nll), kl_by_token, ..Sample::default() };
        log.add(sample(0.5, vec![0.0, 1.0])).unwrap();
        for bad in [sample(f64::NAN, vec![]), sample(0.5, vec![0.0, f32::INFINITY])] {
            assert!(log.add(bad).unwrap_err().to_string().contains("no finite numbers"));
        }
        assert_eq!(log.samples().len(), 1);
    }

    #[test]
    fn what_is_done_is_not_measured_again_and_counts() {
        let contenders = ["a", "b"].map(|label| Contender { label: label.into(), policy: Arc::new(Full {}) });
        let tasks = [Task::Ask(Ask::WordKey, Setting::Before), Task::Recall, Task::Speed];
        let contest = |task| Contest { context: 512, tasks: vec![task], contenders: contenders.to_vec() };
        let contests = tasks.map(contest).to_vec();
        let plan = Plan { contests, samples: 3, seed: 7, text: None, exams: vec![], sampling: Default::default() };
        let measure = |done: Vec<Sample>| {
            let mut told = Told::default();
            let rows = run(&Oracle::new(true), &plan, done, &mut told).unwrap();
            (rows, told)
        };
        let (rows, all) = measure(vec![]);
        assert_eq!((all.units, all.begun), (18, 18));
        let ends: Vec<usize> =
            all.notes.0.iter().enumerate().filter(|(_, s)| s.kv.is_some()).map(|(i, _)| i + 1).collect();
        assert_eq!(ends.len(), 18, "a run has one line with its cache");
        for (runs, &lines) in ends.iter().enumerate() {
            let (again, told) = measure(all.notes.0[..lines].to_vec());
            assert_eq!((told.units, told.begun), (17 - runs as u64, 17 - runs as u64));
            assert_eq!(told.notes.0.len(), all.notes.0.len() - lines);
            // What speed measures differs from run to run.
            let differences = |row: &crate::compare::Row| (row.task != "speed").then(|| row.against.clone());
            let figures = |row: &crate::compare::Row| (row.metrics.correct, row.samples, row.kv, differences(row));
            assert!(again.iter().zip(&rows).all(|(a, b)| figures(a) == figures(b)));
        }
    }
}
