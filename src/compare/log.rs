//! The samples of a run: those of an earlier one that was stopped, and what is added to them.

use super::{Contender, Excerpts, Plan, Progress, Sample, Task};
use crate::error::Result;
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
        self.progress.sample(&sample)?;
        self.samples.push(sample);
        Ok(())
    }

    pub(super) fn samples(self) -> Vec<Sample> {
        self.samples
    }
}
