//! Which sequences of a model under a policy are in the next step.
//!
//! Every running sequence decodes, whatever its length. Prompts begin in the order of their requests, those of one length
//! together, as soon as the policy has room for them. What a sequence needs is not known when it begins, so room may run
//! out: then the youngest sequences are set aside, wait, and start over from all of their tokens. The oldest always runs,
//! so that every sequence ends, if only with the policy's error that it fits nowhere.

use std::{
    collections::VecDeque,
    sync::{atomic::Ordering, Arc},
};

use tokio::sync::Mutex;

use super::{policy_of, set_aside, state_of, KvPolicy, State};
use crate::{
    engine::{IntervalLogger, TERMINATE_ALL_NEXT_STEP},
    paged_attention::KVCacheManager,
    pipeline::EitherCache,
    scheduler::{
        DefaultSchedulerMethod, DefaultSchedulerOutput, Scheduler, SchedulerConfig, SchedulerOutput,
    },
    sequence::{Sequence, SequenceState, StopReason},
};

struct PolicyScheduler {
    policy: Arc<dyn KvPolicy>,
    /// The most sequences that run at a time.
    most: usize,
    /// Oldest first.
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
}

/// The scheduler of a model with this cache: the host's own, unless it runs under a policy.
pub(crate) fn scheduler(cache: &EitherCache, config: SchedulerConfig) -> Arc<Mutex<dyn Scheduler>> {
    let Some(policy) = policy_of(cache) else {
        return config.into_scheduler();
    };
    let most = match config {
        SchedulerConfig::DefaultScheduler { method: DefaultSchedulerMethod::Fixed(most) } => most.get(),
        SchedulerConfig::PagedAttentionMeta { max_num_seqs, .. } => max_num_seqs,
    };
    Arc::new(Mutex::new(PolicyScheduler { policy, most, running: vec![], waiting: VecDeque::new() }))
}

impl PolicyScheduler {
    /// Lets go of sequences that are over, that nobody listens to, or that were set aside within the last pass.
    fn sort_out(&mut self) {
        let mut running = std::mem::take(&mut self.running);
        for mut sequence in running.drain(..).filter(wanted) {
            // Decoding failed before it in the step in which it was to begin.
            if state_of(&mut sequence).is_none() && !sequence.is_waiting() {
                set_aside(&mut sequence);
            }
            if sequence.is_waiting() {
                self.waiting.push_back(sequence);
            } else {
                self.running.push(sequence);
            }
        }
        self.waiting.retain(|sequence| !sequence.responder().is_closed());
    }

    /// Returns how many sequences were set aside for that.
    fn make_room(&mut self) -> usize {
        let before = self.waiting.len();
        while self.running.len() > 1 && !self.policy.can_decode(&states(&mut self.running)) {
            if let Some(mut youngest) = self.running.pop() {
                set_aside(&mut youngest);
                self.waiting.push_back(youngest);
            }
        }
        self.waiting.len() - before
    }

    /// The waiting sequences that begin now: all of one length, since the host pads what is shorter.
    fn begin(&mut self) -> Vec<Sequence> {
        self.waiting.make_contiguous().sort_by_key(|sequence| *sequence.id());
        let running = states(&mut self.running);
        let mut prompts: Vec<Sequence> = vec![];
        while let Some(next) = self.waiting.front() {
            let tokens = next.get_toks().len();
            let beside = prompts.first().or(self.running.first());
            let may = self.running.len() + prompts.len() < self.most
                && prompts.first().is_none_or(|prompt| prompt.get_toks().len() == tokens)
                && beside.is_none_or(|other| other.return_raw_logits == next.return_raw_logits)
                && (beside.is_none() || self.policy.can_begin(&running, prompts.len() + 1, tokens));
            if !may {
                break;
            }
            next.set_state(SequenceState::RunningPrompt);
            prompts.extend(self.waiting.pop_front());
        }
        prompts
    }
}

/// Whether a sequence is under way and someone waits for it.
fn wanted(sequence: &Sequence) -> bool {
    (sequence.is_running() || sequence.is_waiting()) && !sequence.responder().is_closed()
}

fn states(running: &mut [Sequence]) -> Vec<State> {
    running.iter_mut().filter_map(|sequence| state_of(sequence).cloned()).collect()
}

impl Scheduler for PolicyScheduler {
    fn schedule(&mut self, logger: &IntervalLogger) -> SchedulerOutput<'_> {
        self.sort_out();
        let set_aside = self.make_room();
        if TERMINATE_ALL_NEXT_STEP.swap(false, Ordering::SeqCst) {
            let cancel = |sequence: &Sequence| sequence.set_state(SequenceState::Done(StopReason::Canceled));
            self.running.iter().for_each(cancel);
        }
        // Where one had to go, nobody comes: who runs is about to need the room.
        if set_aside == 0 {
            let prompts = self.begin();
            self.running.extend(prompts);
        }
        self.running.sort_by_key(|sequence| *sequence.id());
        logger.set_num_running(self.running.len());
        logger.set_num_waiting(self.waiting.len());
        let (prompt, completion): (Vec<_>, Vec<_>) =
            self.running.iter_mut().partition(|sequence| sequence.is_prompt());
        let (prompt, completion) = (prompt.into(), completion.into());
        SchedulerOutput::DefaultScheduler { output: DefaultSchedulerOutput { prompt, completion } }
    }

    fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    fn running_len(&self) -> usize {
        self.running.len()
    }

    fn add_seq(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    fn free_finished_sequence_groups(&mut self) {
        self.running.retain(|sequence| !sequence.is_finished_paged_attn());
    }

    /// For caches of another kind.
    fn get_finished_recurrent_indices(&self) -> Vec<usize> {
        vec![]
    }

    fn block_size(&self) -> Option<usize> {
        None
    }

    fn kv_cache_manager(&self) -> Option<Arc<Mutex<KVCacheManager>>> {
        None
    }

    fn set_prefix_caching_enabled(&mut self, _enabled: bool) {}
}
