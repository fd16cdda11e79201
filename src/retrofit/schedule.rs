//! How much is to be evicted, and how fast gates learn, at each step.

use crate::error::{Error, Result};

/// The compression that training asks for. A ratio is *effective*: tokens over live entries at the end of a context, the
/// window counted, every head alike.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Tokens of a training sequence.
    pub context: usize,
    /// The gates' window.
    pub window: usize,
    /// The ratio to reach.
    pub target: f64,
    /// Steps over which the ratio grows from 1 to the target, linearly (NVIDIA's annealing).
    pub anneal: u64,
}

/// How fast parameters learn: a linear start, then constant, the last fifth a linear descent to a tenth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// The highest learning rate.
    pub peak: f64,
    /// Steps of the start.
    pub warmup: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Rate {
    /// The learning rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        let up = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let descent = (self.steps as f64 / 5.0).max(1.0);
        let down = (self.steps.saturating_sub(step) as f64 / descent).min(1.0);
        self.peak * up * (0.1 + 0.9 * down)
    }

    /// Refuses what teaches nothing.
    ///
    /// # Errors
    /// [`Error::Config`] for no steps, or a rate that is not above 0.
    pub fn check(&self) -> Result<()> {
        let Self { peak, steps, .. } = *self;
        if steps > 0 && peak.is_finite() && peak > 0.0 {
            return Ok(());
        }
        Err(Error::Config(format!("steps={steps}, rate={peak}: at least one step, at a rate above 0")))
    }
}

impl Schedule {
    /// Refuses what cannot be reached.
    ///
    /// # Errors
    /// [`Error::Config`] with every fault: a target below 1 or more than the window alone allows, a window that leaves
    /// nothing to evict.
    pub fn check(&self) -> Result<()> {
        let Self { context, window, target, anneal } = *self;
        let mut faults = vec![];
        if !(target.is_finite() && target >= 1.0) {
            faults.push(format!("target-cr={target} is not accepted: 1 or more"));
        }
        if window + 1 >= context {
            faults
                .push(format!("window={window} leaves nothing to evict of a context of {context}: take a longer one"));
        } else if target * (window + 1) as f64 >= context as f64 {
            let most = context as f64 / (window + 1) as f64;
            faults.push(format!(
                "target-cr={target} cannot be reached: the window of {window} alone is a compression of {most:.2} at \
                 {context} tokens; take a shorter window or a longer context"
            ));
        }
        if anneal == 0 {
            faults.push("anneal=0: the ratio needs at least one step to grow".into());
        }
        if faults.is_empty() { Ok(()) } else { Err(Error::Config(faults.join("; "))) }
    }

    /// The ratio asked for at a step.
    pub fn ratio(&self, step: u64) -> f64 {
        1.0 + (self.target - 1.0) * (step as f64 / self.anneal as f64).min(1.0)
    }

    /// The share of decisions to evict that makes the ratio of a step: the window holds its tokens whatever is decided.
    pub fn evicted(&self, step: u64) -> f64 {
        let (context, shielded) = (self.context as f64, (self.window + 1) as f64);
        let kept = (context / self.ratio(step) - shielded) / (context - shielded);
        1.0 - kept.min(1.0)
    }

    /// The ratio that a share of decisions to evict makes: the inverse of [`Schedule::evicted`].
    pub fn reached(&self, evicted: f64) -> f64 {
        let (context, shielded) = (self.context as f64, (self.window + 1) as f64);
        context / (shielded + (1.0 - evicted) * (context - shielded))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GOOD: Schedule = Schedule { context: 4096, window: 256, target: 8.0, anneal: 100 };

    #[test]
    fn the_evicted_share_makes_the_ratio() {
        for step in [0, 10, 50, 100, 199] {
            let live = 257.0 + (1.0 - GOOD.evicted(step)) * (4096.0 - 257.0);
            assert!((4096.0 / live - GOOD.ratio(step)).abs() < 1e-9);
            assert!((GOOD.reached(GOOD.evicted(step)) - GOOD.ratio(step)).abs() < 1e-9);
        }
        assert_eq!((GOOD.ratio(0), GOOD.ratio(100), GOOD.ratio(150)), (1.0, 8.0, 8.0));
    }

    #[test]
    fn the_rate_rises_stays_and_falls() {
        let rate = Rate { peak: 1e-3, warmup: 10, steps: 200 };
        assert!(rate.at(0) < rate.at(9));
        assert_eq!((rate.at(9), rate.at(100)), (1e-3, 1e-3));
        assert!(rate.at(199) < 0.2e-3);
        for bad in [Rate { steps: 0, ..rate }, Rate { peak: 0.0, ..rate }, Rate { peak: f64::NAN, ..rate }] {
            assert!(bad.check().is_err() && rate.check().is_ok());
        }
    }

    #[test]
    fn names_every_fault() {
        for (schedule, word) in [
            (Schedule { target: 0.5, ..GOOD }, "target-cr=0.5"),
            (Schedule { target: f64::NAN, ..GOOD }, "target-cr=NaN"),
            (Schedule { target: 16.0, ..GOOD }, "15.94"),
            (Schedule { window: 4096, ..GOOD }, "window=4096"),
            (Schedule { anneal: 0, ..GOOD }, "anneal=0"),
        ] {
            let error = schedule.check().unwrap_err().to_string();
            assert!(error.contains(word), "{error} does not name {word}");
        }
        assert!(GOOD.check().is_ok());
    }
}
