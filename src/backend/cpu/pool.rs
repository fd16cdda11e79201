//! Fixed-size pages of one KV head, and the lanes beside their keys and values.

use super::element::Element;
use crate::error::{Error, Result};
use std::ops::Range;

/// Entries of the largest page.
const MOST_ENTRIES: usize = 1 << 16;
/// Pages per allocation.
const SLAB_PAGES: usize = 64;

/// The pool has no page left.
#[derive(Debug)]
pub(super) struct Full {
    pub(super) limit: u64,
}

/// One entry to be written.
pub(super) struct Entry<'a> {
    pub(super) k: &'a [f32], // [head_dim]
    pub(super) v: &'a [f32],
    pub(super) pos: u32,
    pub(super) mark: bool,
    pub(super) score: f32,
}

#[derive(Debug)]
struct Slab<E> {
    k: Vec<E>, // [pages, page_size, head_dim]
    v: Vec<E>,
    k_factor: Vec<f32>, // [pages, page_size], or none
    v_factor: Vec<f32>,
    pos: Vec<u32>, // [pages, page_size]
    mark: Vec<bool>,
    score: Vec<f32>,
}

/// The first entries of a page.
pub(super) struct Page<'a, E> {
    k: Vectors<'a, E>,
    v: Vectors<'a, E>,
    pub(super) pos: &'a [u32],
    pub(super) mark: &'a [bool],
    pub(super) score: &'a [f32],
}

impl<'a, E: Element> Page<'a, E> {
    /// `[entries, head_dim]`, converted into `buffer` if they are not stored as f32.
    pub(super) fn keys(&self, entries: Range<usize>, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        self.k.widen(entries, buffer)
    }

    /// As [`keys`](Self::keys).
    pub(super) fn values(&self, entries: Range<usize>, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        self.v.widen(entries, buffer)
    }
}

/// Keys or values of some entries.
struct Vectors<'a, E> {
    numbers: &'a [E],   // [entries, head_dim]
    factors: &'a [f32], // [entries], or none
    dim: usize,
}

impl<'a, E: Element> Vectors<'a, E> {
    fn new(numbers: &'a [E], factors: &'a [f32], dim: usize, entries: Range<usize>) -> Self {
        let factors = if E::SCALED { &factors[entries.clone()] } else { &[] };
        Self { numbers: &numbers[entries.start * dim..entries.end * dim], factors, dim }
    }

    fn widen(&self, entries: Range<usize>, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        let factors = if E::SCALED { &self.factors[entries.clone()] } else { &[] };
        E::widen(&self.numbers[entries.start * self.dim..entries.end * self.dim], factors, self.dim, buffer)
    }
}

#[derive(Debug)]
pub(super) struct Pool<E> {
    pub(super) page_size: usize,
    pub(super) head_dim: usize,
    slabs: Vec<Slab<E>>,
    owners: Vec<u32>, // rows that hold each page
    free: Vec<u32>,
    reserved: usize,
    peak: usize,
    max_pages: usize,
    limit: Option<u64>,
}

impl<E: Element> Pool<E> {
    pub(super) fn new(head_dim: usize, page_size: usize, limit: Option<u64>) -> Result<Self> {
        if !(1..=MOST_ENTRIES).contains(&page_size) {
            return Err(Error::Config(format!("page_size={page_size} is not accepted: 1..={MOST_ENTRIES} entries")));
        }
        let mut pool = Self {
            page_size,
            head_dim,
            slabs: vec![],
            owners: vec![],
            free: vec![],
            reserved: 0,
            peak: 0,
            max_pages: u32::MAX as usize,
            limit,
        };
        if let Some(limit) = limit {
            pool.max_pages = pool.max_pages.min((limit / pool.page_bytes()) as usize);
            if pool.max_pages == 0 {
                let page = pool.page_bytes();
                return Err(Error::Config(format!("a limit of {limit} bytes holds no page of {page} bytes")));
            }
        }
        Ok(pool)
    }

    /// Bytes of an entry's key and value, their factors included.
    pub(super) fn vector_bytes(&self) -> usize {
        2 * (self.head_dim * size_of::<E>() + if E::SCALED { size_of::<f32>() } else { 0 })
    }

    /// Bytes of a page: keys, values, and 9 bytes an entry for position, mark and score.
    pub(super) fn page_bytes(&self) -> u64 {
        let lanes = size_of::<u32>() + size_of::<bool>() + size_of::<f32>();
        (self.page_size * (self.vector_bytes() + lanes)) as u64
    }

    pub(super) fn limit(&self) -> Option<u64> {
        self.limit
    }

    pub(super) fn pages_reserved(&self) -> u64 {
        self.reserved as u64
    }

    pub(super) fn pages_in_use(&self) -> u64 {
        (self.reserved - self.free.len()) as u64
    }

    pub(super) fn pages_peak(&self) -> u64 {
        self.peak as u64
    }

    pub(super) fn take(&mut self) -> std::result::Result<u32, Full> {
        if self.free.is_empty() {
            self.grow();
        }
        let page = self.free.pop().ok_or(Full { limit: self.limit.unwrap_or(u64::MAX) })?;
        self.owners[page as usize] = 1;
        self.peak = self.peak.max(self.reserved - self.free.len());
        Ok(page)
    }

    /// One row less holds a page.
    pub(super) fn give(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        *owners -= 1;
        if *owners == 0 {
            self.free.push(page);
        }
    }

    /// One row more holds a page.
    pub(super) fn share(&mut self, page: u32) {
        self.owners[page as usize] += 1;
    }

    /// Puts a copy that one row alone holds in the place of a page that others hold too.
    pub(super) fn own(&mut self, page: &mut u32) -> std::result::Result<(), Full> {
        if self.owners[*page as usize] > 1 {
            let copy = self.copy_of(*page)?;
            self.give(*page);
            *page = copy;
        }
        Ok(())
    }

    /// A new page with the entries of another.
    pub(super) fn copy_of(&mut self, page: u32) -> std::result::Result<u32, Full> {
        let copy = self.take()?;
        (0..self.page_size).for_each(|offset| self.copy((page, offset), (copy, offset)));
        Ok(copy)
    }

    fn grow(&mut self) {
        let pages = SLAB_PAGES.min(self.max_pages - self.reserved);
        if pages == 0 {
            return;
        }
        let (entries, first) = (pages * self.page_size, self.reserved as u32);
        self.slabs.push(Slab {
            k: vec![E::default(); entries * self.head_dim],
            v: vec![E::default(); entries * self.head_dim],
            k_factor: vec![0.0; if E::SCALED { entries } else { 0 }],
            v_factor: vec![0.0; if E::SCALED { entries } else { 0 }],
            pos: vec![0; entries],
            mark: vec![false; entries],
            score: vec![0.0; entries],
        });
        self.reserved += pages;
        self.owners.resize(self.reserved, 0);
        self.free.extend((first..first + pages as u32).rev());
    }

    /// The first `entries` entries of a page.
    pub(super) fn page(&self, page: u32, entries: usize) -> Page<'_, E> {
        let (slab, at) = self.locate(page, 0);
        let (slab, d) = (&self.slabs[slab], self.head_dim);
        Page {
            k: Vectors::new(&slab.k, &slab.k_factor, d, at..at + entries),
            v: Vectors::new(&slab.v, &slab.v_factor, d, at..at + entries),
            pos: &slab.pos[at..][..entries],
            mark: &slab.mark[at..][..entries],
            score: &slab.score[at..][..entries],
        }
    }

    pub(super) fn write(&mut self, page: u32, offset: usize, entry: &Entry) {
        let (slab, at) = self.locate(page, offset);
        let (slab, d) = (&mut self.slabs[slab], self.head_dim);
        let factors = [E::narrow(entry.k, &mut slab.k[at * d..][..d]), E::narrow(entry.v, &mut slab.v[at * d..][..d])];
        if E::SCALED {
            [slab.k_factor[at], slab.v_factor[at]] = factors;
        }
        (slab.pos[at], slab.mark[at], slab.score[at]) = (entry.pos, entry.mark, entry.score);
    }

    /// Copies an entry with everything that belongs to it.
    pub(super) fn copy(&mut self, from: (u32, usize), to: (u32, usize)) {
        let d = self.head_dim;
        let ((from_slab, from), (to_slab, to)) = (self.locate(from.0, from.1), self.locate(to.0, to.1));
        if from_slab == to_slab {
            let slab = &mut self.slabs[from_slab];
            slab.k.copy_within(from * d..(from + 1) * d, to * d);
            slab.v.copy_within(from * d..(from + 1) * d, to * d);
            (slab.pos[to], slab.mark[to], slab.score[to]) = (slab.pos[from], slab.mark[from], slab.score[from]);
            if E::SCALED {
                (slab.k_factor[to], slab.v_factor[to]) = (slab.k_factor[from], slab.v_factor[from]);
            }
        } else if let Ok([source, target]) = self.slabs.get_disjoint_mut([from_slab, to_slab]) {
            target.k[to * d..][..d].copy_from_slice(&source.k[from * d..][..d]);
            target.v[to * d..][..d].copy_from_slice(&source.v[from * d..][..d]);
            (target.pos[to], target.mark[to], target.score[to]) =
                (source.pos[from], source.mark[from], source.score[from]);
            if E::SCALED {
                (target.k_factor[to], target.v_factor[to]) = (source.k_factor[from], source.v_factor[from]);
            }
        }
    }

    pub(super) fn set_mark(&mut self, page: u32, offset: usize) {
        let (slab, at) = self.locate(page, offset);
        self.slabs[slab].mark[at] = true;
    }

    pub(super) fn score_mut(&mut self, page: u32, offset: usize) -> &mut f32 {
        let (slab, at) = self.locate(page, offset);
        &mut self.slabs[slab].score[at]
    }

    fn locate(&self, page: u32, offset: usize) -> (usize, usize) {
        let page = page as usize;
        (page / SLAB_PAGES, page % SLAB_PAGES * self.page_size + offset)
    }
}
