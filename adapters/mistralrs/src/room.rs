//! How many pages sequences will take. A row of the store is one KV head of one layer; pages belong to rows.

use kvpolicy::{Budget, KvCache, LayerCx};

/// Whether so many pages may still be taken.
pub(crate) fn suffices(cache: &KvCache, pages: u64) -> bool {
    cache.usage().pages_left().is_none_or(|left| pages <= left)
}

/// Pages for a sequence to grow by before it needs others: one a row.
pub(crate) fn growth(cache: &KvCache) -> u64 {
    (cache.spec().layers * cache.spec().kv_heads) as u64
}

/// The most pages of a prompt while it is read. A layer holds all of it until it has attended, the layers before what the
/// policy keeps: that is taken to be what it protects, or its budget, or the share that it kept of what it has seen so far,
/// whichever is the most, or all if `cautious`.
pub(crate) fn prompt(cache: &KvCache, tokens: usize, cautious: bool) -> u64 {
    let spec = cache.spec();
    let share = if cautious { 1.0 } else { cache.stats().compression().recip().min(1.0) };
    let known = (0..spec.layers).map(|layer| known(cache, &LayerCx { layer, spec }, tokens)).max();
    let kept = known.unwrap_or(0).max((tokens as f64 * share).ceil() as u64);
    let pages = |entries: u64| entries.div_ceil(cache.usage().page_entries);
    let layers = pages(tokens as u64) + (spec.layers as u64 - 1) * pages(kept);
    spec.kv_heads as u64 * layers
}

/// Entries a KV head that the policy says it keeps of a prompt: what it protects, and its budget if it has one.
fn known(cache: &KvCache, cx: &LayerCx, tokens: usize) -> u64 {
    let shield = cache.policy().protect(cx);
    let heads = cx.spec.kv_heads.max(1);
    let budget = match cache.policy().budget(cx, tokens) {
        Budget::Unlimited => 0,
        Budget::PerHead(entries) => entries as usize,
        Budget::Heads(entries) => entries.iter().sum::<usize>().div_ceil(heads),
        Budget::Pooled { total, .. } => total.div_ceil(heads),
    };
    tokens.min(budget.max((shield.sinks + shield.recent) as usize)) as u64
}
