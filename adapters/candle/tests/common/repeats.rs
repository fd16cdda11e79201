//! What small models are trained on in tests.

use kvpolicy_candle::retrofit::{Sequence, Source};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

/// Random tokens that repeat after a while, so that far tokens matter.
pub(crate) struct Repeats {
    /// How many there are.
    pub(crate) vocab: u32,
}

impl Source for Repeats {
    fn sequence(&self, number: u64, length: usize) -> kvpolicy_candle::Result<Sequence> {
        let mut rng = StdRng::seed_from_u64(number);
        let first: Vec<u32> = (0..length / 2).map(|_| rng.random_range(0..self.vocab)).collect();
        let tokens: Vec<u32> = first.iter().cycle().take(length).copied().collect();
        Ok(Sequence { weights: vec![1.0; tokens.len()], tokens })
    }

    fn check(&self, _: usize) -> kvpolicy_candle::Result<()> {
        Ok(())
    }

    fn settings(&self) -> Value {
        json!("repeats")
    }
}
