//! How many pages sequences will take. A row of the store is one KV head of one layer; pages belong to rows.

use kvpolicy::{KvCache, LayerCx, SeqId};

/// Whether so many pages may still be taken.
pub(crate) fn suffices(cache: &KvCache, pages: u64) -> bool {
    cache.usage().pages_left().is_none_or(|left| pages <= left)
}

/// The most pages that one more token of each of these sequences takes: one for every row whose pages are full.
pub(crate) fn next_tokens(cache: &KvCache, sequences: impl Iterator<Item = SeqId>) -> u64 {
    let (layers, page) = (cache.spec().layers, cache.usage().page_entries);
    let rows = sequences.flat_map(|seq| (0..layers).flat_map(move |layer| cache.live(layer, seq)));
    rows.filter(|&held| (held as u64).is_multiple_of(page)).count() as u64
}

/// Pages for a sequence to grow by before it needs others: one a row.
pub(crate) fn growth(cache: &KvCache) -> u64 {
    (cache.spec().layers * cache.spec().kv_heads) as u64
}

/// The most pages of a prompt while it is read. A layer holds all of it until it has attended, the layers before what the
/// policy keeps: that is taken to be what it protects, or the share that it kept of what it has seen so far, or all if
/// `cautious`.
pub(crate) fn prompt(cache: &KvCache, tokens: usize, cautious: bool) -> u64 {
    let spec = cache.spec();
    let share = if cautious { 1.0 } else { cache.stats().compression().recip().min(1.0) };
    let protect = |layer| cache.policy().protect(&LayerCx { layer, spec });
    let protected = (0..spec.layers).map(protect).map(|shield| shield.sinks as u64 + shield.recent as u64).max();
    let protected = (tokens as u64).min(protected.unwrap_or(0));
    let kept = protected.max((tokens as f64 * share).ceil() as u64);
    let pages = |entries: u64| entries.div_ceil(cache.usage().page_entries);
    let layers = pages(tokens as u64) + (spec.layers as u64 - 1) * pages(kept);
    spec.kv_heads as u64 * layers
}
