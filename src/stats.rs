//! What a cache holds, held and would have held.

use serde::{Deserialize, Serialize};

/// The store at this moment. Entries are (layer, KV head, token) triples; bytes count keys, values and the
/// position, mark and score beside them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Entries held.
    pub live_entries: u64,
    /// Pages that belong to a row.
    pub pages_in_use: u64,
    /// Bytes of those pages.
    pub bytes_in_use: u64,
    /// The most that were in use at any moment since the store was made.
    pub bytes_peak: u64,
    /// Bytes taken from the system so far, free pages included.
    pub bytes_reserved: u64,
    /// The most that may be reserved; `None` for no limit.
    pub bytes_limit: Option<u64>,
    /// Entries of one page, all of one row.
    pub page_entries: u64,
    /// Bytes of one page.
    pub page_bytes: u64,
    /// Entries written since the store was made.
    pub written: u64,
    /// Entries dropped by the policy since the store was made (not by the end of a sequence).
    pub evicted: u64,
    /// Bytes of one token's keys and values over all layers and KV heads: what a dense cache grows by.
    pub dense_bytes_per_token: u64,
}

impl Usage {
    /// Pages that may still be taken, reserved or not; `None` for no limit.
    pub fn pages_left(&self) -> Option<u64> {
        let limit = self.bytes_limit?.checked_div(self.page_bytes)?;
        Some(limit.saturating_sub(self.pages_in_use))
    }
}

/// A run: figures over the steps that end in a token (the last chunk of a prefill, and each decode step).
/// Peaks count every moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Steps over which the means are taken.
    pub sampled_steps: u64,
    /// The most bytes in use at any moment, within steps too.
    pub peak_bytes: u64,
    /// Mean of `bytes_in_use`.
    pub mean_bytes: f64,
    /// Mean of `live_entries`.
    pub mean_live_entries: f64,
    /// Mean of the entries a dense cache would have held.
    pub mean_dense_entries: f64,
    /// The largest number of bytes of keys and values that a dense cache would have held.
    pub dense_peak_bytes: u64,
    /// Entries written so far.
    pub written: u64,
    /// Entries the policy dropped so far: proof that it ran.
    pub evicted: u64,
}

impl Stats {
    /// Entries a dense cache would hold for one that is held: mean over the run, 1 where nothing was sampled.
    pub fn compression(&self) -> f64 {
        if self.mean_live_entries == 0.0 { 1.0 } else { self.mean_dense_entries / self.mean_live_entries }
    }

    pub(crate) fn record(&mut self, usage: &Usage, dense_tokens: u64, entries_per_token: u64, sampled: bool) {
        self.peak_bytes = usage.bytes_peak;
        self.dense_peak_bytes = self.dense_peak_bytes.max(dense_tokens * usage.dense_bytes_per_token);
        (self.written, self.evicted) = (usage.written, usage.evicted);
        if sampled {
            self.sampled_steps += 1;
            let n = self.sampled_steps as f64;
            let fold = |mean: &mut f64, x: f64| *mean += (x - *mean) / n;
            fold(&mut self.mean_bytes, usage.bytes_in_use as f64);
            fold(&mut self.mean_live_entries, usage.live_entries as f64);
            fold(&mut self.mean_dense_entries, (dense_tokens * entries_per_token) as f64);
        }
    }
}
