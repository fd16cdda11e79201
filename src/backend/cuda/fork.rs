//! Sequences that begin alike: pages that several rows hold, and their copies where the sequences part.

use super::{Cuda, address, driver, scratch, zeros};
use crate::{
    backend::Storage,
    error::{Error, Result},
    step::{SeqId, Span},
};
use cudarc::driver::{CudaSlice, CudaStream, result};
use kvpolicy_kernels::{CopyPagesParams, ForkParams, Sharing, Store, TrimParams, UnshareParams};
use std::sync::Arc;

/// What is kept of shared pages, from the first fork on.
#[derive(Debug)]
pub(super) struct Shared {
    more: CudaSlice<u32>,   // [pages]
    own: CudaSlice<u32>,    // [rows, 2]
    copies: CudaSlice<u32>, // [pages, 2]
    copy_count: CudaSlice<u32>,
    missing: CudaSlice<u32>,
}

impl Shared {
    fn new(stream: &Arc<CudaStream>, store: &Store) -> Result<Self> {
        let (pages, rows) = (store.pages as usize, (store.layers * store.seats * store.heads) as usize);
        Ok(Self {
            more: zeros(stream, pages)?,
            own: scratch(stream, 2 * rows)?,
            copies: scratch(stream, 2 * pages)?,
            copy_count: zeros(stream, 1)?,
            missing: zeros(stream, 1)?,
        })
    }

    fn addresses(&self) -> Sharing {
        Sharing {
            more: address(&self.more),
            own: address(&self.own),
            copies: address(&self.copies),
            copy_count: address(&self.copy_count),
        }
    }
}

impl Cuda {
    /// Nothing while no two sequences share a page, so that kernels need not look.
    pub(super) fn sharing(&self) -> Sharing {
        match &self.shared {
            Some(shared) if self.seats.values().any(|seat| seat.shares) => shared.addresses(),
            _ => Sharing::default(),
        }
    }

    /// One sequence alone shares with nobody.
    pub(super) fn forget_last_sharer(&mut self) {
        let mut sharers = self.seats.values_mut().filter(|seat| seat.shares);
        if let (Some(last), None) = (sharers.next(), sharers.next()) {
            last.shares = false;
        }
    }

    /// Copies the pages that a kernel has just replaced.
    pub(super) fn copy_pages(&self) -> Result<()> {
        let sharing = self.sharing();
        if sharing.more == 0 {
            return Ok(());
        }
        let vector_bytes = TrimParams::vector_bytes(self.element(), self.spec.head_dim as u32);
        let params = CopyPagesParams { store: self.memory.store, sharing, vector_bytes };
        // SAFETY: addresses of memory that this owns.
        unsafe { self.kernels.copy_pages(&self.stream, &params) }.map_err(driver("copying shared pages"))
    }

    pub(super) fn unshare_layer(&mut self, layer: usize, spans: &[Span]) -> Result<()> {
        let shares = |span: &Span| self.seats.get(&span.seq).is_some_and(|seat| seat.shares);
        if !spans.iter().any(shares) {
            return Ok(());
        }
        let list = self.list_of(spans)?;
        let params = UnshareParams {
            store: self.memory.store,
            sharing: self.sharing(),
            spans: self.control().spans(),
            listed: list.len() as u32,
            list: self.upload(layer, |asked| &mut asked.list, list)?,
            layer: layer as u32,
        };
        // SAFETY: the step's spans and the list are on the device.
        unsafe { self.kernels.unshare(&self.stream, &params) }.map_err(driver("copying shared pages"))?;
        self.copy_pages()
    }

    pub(super) fn fork_sequence(&mut self, from: SeqId, to: SeqId, share: &[bool]) -> Result<()> {
        if self.seat_of(from).is_none() {
            return Ok(()); // it holds nothing
        }
        self.sit(to)?;
        let forked = self.fork_rows(from, to, share).and_then(|()| self.fork_rest(from, to));
        if forked.is_err() {
            self.release(to);
        }
        forked
    }

    /// Pages, lengths and what else is known of the rows. Waits for the device.
    fn fork_rows(&mut self, from: SeqId, to: SeqId, share: &[bool]) -> Result<()> {
        if self.shared.is_none() {
            self.shared = Some(Shared::new(&self.stream, &self.memory.store)?);
        }
        for seq in [from, to] {
            if let Some(seat) = self.seats.get_mut(&seq) {
                seat.shares = true;
            }
        }
        let (Some(parent), Some(fork)) = (self.seats.get(&from), self.seats.get(&to)) else { return Ok(()) };
        let Some(shared) = &self.shared else { return Ok(()) };
        let words: Vec<u32> = share.iter().map(|&share| share as u32).collect();
        let words = self.stream.clone_htod(&words).map_err(driver("uploading a fork"))?;
        let params = ForkParams {
            store: self.memory.store,
            sharing: shared.addresses(),
            share: address(&words),
            missing: address(&shared.missing),
            from: parent.index,
            to: fork.index,
        };
        // SAFETY: both are seats of the store, and a flag a layer is on the device.
        unsafe { self.kernels.fork(&self.stream, &params) }.map_err(driver("forking a sequence"))?;
        self.copy_pages()?;
        if self.stream.clone_dtoh(&shared.missing).map_err(driver("forking a sequence"))? == [0] {
            return Ok(());
        }
        let layer = share.iter().position(|share| !share).unwrap_or(0);
        let (position, limit) = (parent.bounds[layer], self.memory.limit);
        Err(Error::PoolExhausted { seq: from, layer, position, limit })
    }

    /// What is kept beside the rows.
    fn fork_rest(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        let (Some(parent), Some(fork)) = (self.seats.get(&from), self.seats.get(&to)) else { return Ok(()) };
        let (parent, fork) = (parent.index as usize, fork.index as usize);
        let width = self.spec.q_heads * self.spec.head_dim;
        for layer in &self.layers {
            if let Some(ring) = &layer.ring {
                self.copy_place(ring, self.spec.kv_heads * layer.plan.ring.size as usize, parent, fork)?;
            }
            if let Some(queries) = &layer.queries {
                self.copy_place(&queries.data, queries.size * width, parent, fork)?;
            }
        }
        let Some(parent) = self.seats.get(&from) else { return Ok(()) };
        let (bounds, observed) = (parent.bounds.clone(), parent.observed.clone());
        if let Some(fork) = self.seats.get_mut(&to) {
            (fork.bounds, fork.observed) = (bounds, observed);
        }
        Ok(())
    }

    /// Copies one seat's `words` words of 4 bytes to another's.
    fn copy_place<T>(&self, all: &CudaSlice<T>, words: usize, from: usize, to: usize) -> Result<()> {
        let (base, bytes) = (address(all), 4 * words);
        let at = |seat: usize| base + (seat * bytes) as u64;
        // SAFETY: both places are within the slice, which has one for every seat.
        unsafe { result::memcpy_dtod_async(at(to), at(from), bytes, self.stream.cu_stream()) }
            .map_err(driver("forking a sequence"))
    }
}
