//! One (layer, sequence, KV head): an unordered bag of entries in pages.

use super::{
    element::Element,
    pool::{Entry, Full, Page, Pool},
};
use crate::policy::{Budget, Protect};
use std::collections::VecDeque;

#[derive(Debug, Default)]
pub(super) struct Row {
    pages: Vec<u32>,
    len: usize,
    /// Marked entries that a window still protects, oldest first: (position, slot). Those below `sinks` never die and
    /// are left out. The front is the next to die, so a decode step finds its victim at once.
    pending: VecDeque<(u32, usize)>,
    /// The newest entry: (position, slot).
    newest: Option<(u32, usize)>,
}

impl Row {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The row's entries, page by page, in slot order.
    pub(super) fn pages<'a, E: Element>(&'a self, pool: &'a Pool<E>) -> impl Iterator<Item = Page<'a, E>> {
        self.pages.iter().enumerate().map(|(i, _)| self.page(pool, i))
    }

    pub(super) fn page<'a, E: Element>(&self, pool: &'a Pool<E>, i: usize) -> Page<'a, E> {
        pool.page(self.pages[i], pool.page_size.min(self.len - i * pool.page_size))
    }

    pub(super) fn page_count(&self) -> usize {
        self.pages.len()
    }

    fn at<E: Element>(&self, pool: &Pool<E>, slot: usize) -> (u32, usize) {
        (self.pages[slot / pool.page_size], slot % pool.page_size)
    }

    pub(super) fn position<E: Element>(&self, pool: &Pool<E>, slot: usize) -> u32 {
        let (page, offset) = self.at(pool, slot);
        pool.page(page, offset + 1).pos[offset]
    }

    /// A row with the same entries: in the same pages, or in copies.
    pub(super) fn fork<E: Element>(&self, pool: &mut Pool<E>, share: bool) -> Result<Self, Full> {
        let mut fork = Self { pages: vec![], len: self.len, pending: self.pending.clone(), newest: self.newest };
        for &page in &self.pages {
            let page = if share {
                pool.share(page);
                page
            } else {
                match pool.copy_of(page) {
                    Ok(copy) => copy,
                    Err(full) => {
                        fork.free(pool);
                        return Err(full);
                    }
                }
            };
            fork.pages.push(page);
        }
        Ok(fork)
    }

    /// Copies every page that other rows hold, too.
    pub(super) fn unshare<E: Element>(&mut self, pool: &mut Pool<E>) -> Result<(), Full> {
        self.pages.iter_mut().try_for_each(|page| pool.own(page))
    }

    /// Where a slot is, in a page that no other row holds.
    fn own<E: Element>(&mut self, pool: &mut Pool<E>, slot: usize) -> Result<(u32, usize), Full> {
        pool.own(&mut self.pages[slot / pool.page_size])?;
        Ok(self.at(pool, slot))
    }

    /// Marks the newest entry.
    pub(super) fn mark_newest<E: Element>(&mut self, pool: &mut Pool<E>, protect: Protect) -> Result<(), Full> {
        let Some((pos, slot)) = self.newest else { return Ok(()) };
        let (page, offset) = self.own(pool, slot)?;
        if pool.page(page, offset + 1).mark[offset] {
            return Ok(()); // already waiting for its end
        }
        pool.set_mark(page, offset);
        if pos >= protect.sinks {
            self.pending.push_back((pos, slot));
        }
        Ok(())
    }

    /// Writes an entry, over one that is dead to every query from `now` on if there is one.
    pub(super) fn write<E: Element>(
        &mut self,
        pool: &mut Pool<E>,
        entry: &Entry,
        now: u32,
        protect: Protect,
    ) -> Result<(), Full> {
        let slot = match self.pending.front() {
            Some(&(pos, slot)) if !protect.covers(pos, now) => {
                self.pending.pop_front();
                slot
            }
            _ => self.grow(pool)?,
        };
        let (page, offset) = self.own(pool, slot)?;
        pool.write(page, offset, entry);
        self.newest = Some((entry.pos, slot));
        if entry.mark && entry.pos >= protect.sinks {
            self.pending.push_back((entry.pos, slot));
        }
        Ok(())
    }

    fn grow<E: Element>(&mut self, pool: &mut Pool<E>) -> Result<usize, Full> {
        if self.len == self.pages.len() * pool.page_size {
            self.pages.push(pool.take()?);
        }
        self.len += 1;
        Ok(self.len - 1)
    }

    /// Drops marked entries that a query at `now` no longer sees.
    pub(super) fn expire<E: Element>(&mut self, pool: &mut Pool<E>, now: u32, protect: Protect) {
        let dead = self.pending.iter().take_while(|(pos, _)| !protect.covers(*pos, now));
        let slots: Vec<usize> = dead.map(|&(_, slot)| slot).collect();
        self.remove(pool, &slots);
    }

    /// Drops the entries in `slots`.
    pub(super) fn remove<E: Element>(&mut self, pool: &mut Pool<E>, slots: &[usize]) {
        if slots.is_empty() {
            return;
        }
        // Which entry is in each slot, and where each entry ends up: nowhere if it is dropped.
        let mut entries: Vec<usize> = (0..self.len).collect();
        let mut places: Vec<Option<usize>> = (0..self.len).map(Some).collect();
        slots.iter().for_each(|&slot| places[slot] = None);
        let mut slots = slots.to_vec();
        slots.sort_unstable_by(|a, b| b.cmp(a)); // from the back, so that no doomed entry is moved
        for slot in slots {
            let last = self.swap_remove(pool, slot);
            if last != slot {
                entries[slot] = entries[last];
                places[entries[slot]] = Some(slot);
            }
        }
        let follow = |(pos, slot): (u32, usize)| Some((pos, places[slot]?));
        self.pending = std::mem::take(&mut self.pending).into_iter().filter_map(follow).collect();
        self.newest = self.newest.and_then(follow);
    }

    /// The last entry takes the place of the dropped one; returns the place it had.
    fn swap_remove<E: Element>(&mut self, pool: &mut Pool<E>, slot: usize) -> usize {
        let last = self.len - 1;
        if slot != last {
            pool.copy(self.at(pool, last), self.at(pool, slot));
        }
        self.len = last;
        if self.len.is_multiple_of(pool.page_size)
            && let Some(page) = self.pages.pop()
        {
            pool.give(page);
        }
        last
    }

    pub(super) fn free<E: Element>(self, pool: &mut Pool<E>) {
        self.pages.into_iter().for_each(|page| pool.give(page));
    }

    /// Slots, oldest entry first.
    pub(super) fn by_age<E: Element>(&self, pool: &Pool<E>) -> Vec<usize> {
        let positions: Vec<u32> = self.pages(pool).flat_map(|page| page.pos.iter().copied()).collect();
        let mut slots: Vec<usize> = (0..self.len).collect();
        slots.sort_unstable_by_key(|&slot| positions[slot]);
        slots
    }

    /// `values`, given oldest entry first, in slot order.
    pub(super) fn by_slot<E: Element>(&self, pool: &Pool<E>, values: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.len];
        self.by_age(pool).into_iter().zip(values).for_each(|(slot, &value)| out[slot] = value);
        out
    }

    /// `score = fade * score + mass`, in slot order.
    pub(super) fn add_scores<E: Element>(&mut self, pool: &mut Pool<E>, fade: f32, mass: &[f32]) {
        for (slot, &mass) in mass.iter().enumerate().take(self.len) {
            let (page, offset) = self.at(pool, slot);
            let score = pool.score_mut(page, offset);
            *score = fade * *score + mass;
        }
    }
}

/// An entry that may go: lowest score first, then the oldest, then by head.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    score: f32,
    pos: u32,
    head: usize,
    slot: usize,
}

impl Candidate {
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let by_score = self.score.total_cmp(&other.score);
        by_score.then(self.pos.cmp(&other.pos)).then(self.head.cmp(&other.head))
    }
}

/// One row as a trim sees it.
struct Census {
    dead: Vec<usize>,
    live: usize,
    candidates: Vec<Candidate>,
}

impl Census {
    /// `ranks` in slot order replace the carried scores.
    fn new<E: Element>(
        pool: &Pool<E>,
        row: &Row,
        head: usize,
        ranks: Option<&[f32]>,
        now: u32,
        protect: Protect,
    ) -> Self {
        let entries = row.pages(pool).flat_map(|page| {
            let lanes = page.pos.iter().zip(page.mark).zip(page.score);
            lanes.map(|((&pos, &mark), &score)| (pos, mark, score))
        });
        let (mut dead, mut candidates) = (vec![], vec![]);
        for (slot, (pos, mark, carried)) in entries.enumerate().filter(|(_, e)| !protect.covers(e.0, now)) {
            if mark {
                dead.push(slot);
            } else {
                let score = ranks.map_or(carried, |ranks| ranks[slot]) + 0.0; // -0 ties with 0
                candidates.push(Candidate { score, pos, head, slot });
            }
        }
        Self { live: row.len() - dead.len(), dead, candidates }
    }

    /// The candidates that go if `keep` entries may stay.
    fn beyond(&mut self, keep: usize) -> Vec<Candidate> {
        let over = self.live.saturating_sub(keep);
        let mut all = std::mem::take(&mut self.candidates);
        if over < all.len() {
            all.select_nth_unstable_by(over, Candidate::order);
            all.truncate(over);
        }
        all
    }
}

/// The slots to drop from each row of one sequence in one layer so that the budget holds; entries that are dead already
/// are among them. `ranks`, one per row in slot order, replace the carried scores.
pub(super) fn over_budget<E: Element>(
    pool: &Pool<E>,
    rows: &[Row],
    ranks: Option<&[Vec<f32>]>,
    budget: &Budget,
    now: u32,
    protect: Protect,
) -> Vec<Vec<usize>> {
    let census = |(head, row)| Census::new(pool, row, head, ranks.map(|r| r[head].as_slice()), now, protect);
    let mut rows: Vec<Census> = rows.iter().enumerate().map(census).collect();
    let going: Vec<Candidate> = match budget {
        Budget::Unlimited => vec![],
        Budget::PerHead(keep) => rows.iter_mut().flat_map(|row| row.beyond(*keep as usize)).collect(),
        Budget::Heads(keep) => rows.iter_mut().zip(keep).flat_map(|(row, &keep)| row.beyond(keep)).collect(),
        Budget::Pooled { total, floor } => {
            let over = rows.iter().map(|row| row.live).sum::<usize>().saturating_sub(*total);
            // A head gives up to its floor at most, so only that many of its lowest compete.
            let mut all: Vec<Candidate> = rows.iter_mut().flat_map(|row| row.beyond(*floor)).collect();
            all.sort_unstable_by(Candidate::order);
            all.truncate(over);
            all
        }
    };
    let mut doomed: Vec<Vec<usize>> = rows.into_iter().map(|row| row.dead).collect();
    going.into_iter().for_each(|c| doomed[c.head].push(c.slot));
    doomed
}
