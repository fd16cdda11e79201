//! Device memory of the store: the pool, the tables beside it, and the buffers a step fills.

use super::{driver, element};
use crate::{
    error::{Error, Result},
    spec::ModelSpec,
};
use candle_core::{DType, Device, Storage, Tensor};
use cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice, ValidAsZeroBits, result,
};
use kvpolicy_kernels::{self as kernels, Address, Counters, Kernels, PositionsParams, Store};
use std::sync::Arc;

/// Position, mark and score of an entry.
const LANE_BYTES: usize = 8;
/// Pages are numbered by 32 bits.
const MOST_PAGES: u64 = 1 << 31;

/// Address of a slice, for kernels on its own stream.
pub(super) fn address<T>(slice: &CudaSlice<T>) -> Address {
    slice.device_ptr(slice.stream()).0
}

/// Address of a tensor's first element, whatever its type.
pub(crate) fn tensor_address(tensor: &Tensor) -> Result<Address> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::Config("a tensor is not on the cache's CUDA device".into()));
    };
    let (first, bytes) = (layout.start_offset(), tensor.dtype().size_in_bytes());
    let base = match tensor.dtype() {
        DType::F32 => address(storage.as_cuda_slice::<f32>()?),
        DType::F16 => address(storage.as_cuda_slice::<half::f16>()?),
        DType::BF16 => address(storage.as_cuda_slice::<half::bf16>()?),
        DType::U32 => address(storage.as_cuda_slice::<u32>()?),
        DType::U8 => address(storage.as_cuda_slice::<u8>()?),
        other => return Err(Error::Config(format!("a kernel takes no tensor of type {other:?}"))),
    };
    Ok(base + (first * bytes) as u64)
}

/// An uninitialised tensor that a kernel writes in full.
pub(crate) fn output(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: the caller's kernel writes every element before anything reads one.
    Ok(unsafe { Tensor::empty(shape, dtype, device) }?)
}

/// The pool and its tables.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) store: Store,
    pub(super) page_bytes: u64,
    /// Of an entry's key and value, their factors included.
    pub(super) vector_bytes: usize,
    pub(super) limit: u64,
    counters: CudaSlice<Counters>,
    failed: CudaSlice<u64>,
    len: CudaSlice<u32>,
    // Kept for their memory alone: kernels know the addresses.
    _planes: [CudaSlice<u8>; 2],
    _score: CudaSlice<f32>,
    _factor: Option<CudaSlice<u16>>,
    _rows: [CudaSlice<u32>; 3],
    _tables: [CudaSlice<u32>; 2], // pages of the rows, tags
    _free_pages: CudaSlice<u32>,
}

/// What `Memory` is made from, checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) page_size: usize,
    pub(super) limit: u64,
    pub(super) seats: usize,
    pub(super) max_entries: usize,
    pub(super) dtype: DType,
}

impl Memory {
    pub(super) fn new(stream: &Arc<CudaStream>, spec: &ModelSpec, layout: Layout) -> Result<Self> {
        let scaled = layout.dtype.size_in_bytes() == 1;
        let plane_bytes = spec.head_dim * layout.dtype.size_in_bytes(); // of an entry
        let vector_bytes = element(layout.dtype).entry_bytes(spec.head_dim);
        let page_bytes = (layout.page_size * (vector_bytes + LANE_BYTES)) as u64;
        let rows = spec.layers * layout.seats * spec.kv_heads;
        let max_pages = layout.max_entries.div_ceil(layout.page_size);
        let pages = (layout.limit / page_bytes).min(MOST_PAGES).min((rows * max_pages) as u64) as usize;
        if pages == 0 {
            return Err(Error::Config(format!(
                "a limit of {} bytes holds no page of {page_bytes} bytes",
                layout.limit
            )));
        }
        let entries = pages * layout.page_size;
        let plane = || alloc::<u8>(stream, entries * plane_bytes);
        // Zeros, so that the factor of an entry that is not there is a number.
        let factor = if scaled { Some(zeros::<u16>(stream, entries)?) } else { None };
        let (planes, tag, score) = ([plane()?, plane()?], alloc(stream, entries)?, alloc::<f32>(stream, entries)?);
        let per_row = || alloc::<u32>(stream, rows);
        let (len, row_lanes) = (per_row()?, [per_row()?, per_row()?, per_row()?]);
        let table = alloc(stream, rows * max_pages)?;
        let (free_pages, failed, counters) = (alloc(stream, pages)?, alloc(stream, layout.seats)?, alloc(stream, 1)?);
        let store = Store {
            k: address(&planes[0]),
            v: address(&planes[1]),
            tag: address(&tag),
            score: address(&score),
            factor: factor.as_ref().map_or(0, address),
            len: address(&len),
            owned: address(&row_lanes[0]),
            newest: address(&row_lanes[1]),
            target: address(&row_lanes[2]),
            table: address(&table),
            free_pages: address(&free_pages),
            failed: address(&failed),
            counters: address(&counters),
            layers: spec.layers as u32,
            seats: layout.seats as u32,
            heads: spec.kv_heads as u32,
            head_dim: spec.head_dim as u32,
            page_shift: layout.page_size.ilog2(),
            max_pages: max_pages as u32,
            pages: pages as u32,
        };
        Ok(Self {
            store,
            page_bytes,
            vector_bytes,
            limit: layout.limit,
            counters,
            failed,
            len,
            _tables: [table, tag],
            _planes: planes,
            _score: score,
            _factor: factor,
            _rows: row_lanes,
            _free_pages: free_pages,
        })
    }

    /// Entries of `n` rows from the first on, see [`Store::row_index`]. Waits for the device.
    pub(super) fn row_lens(&self, stream: &Arc<CudaStream>, first: usize, n: usize) -> Result<Vec<u32>> {
        stream.clone_dtoh(&self.len.slice(first..first + n)).map_err(driver("reading the store"))
    }

    /// Positions of a row in slot order. Waits for the device.
    pub(super) fn row_positions(&self, kernels: &Kernels, stream: &Arc<CudaStream>, row: usize) -> Result<Vec<u32>> {
        let len = self.row_lens(stream, row, 1)?[0];
        if len == 0 {
            return Ok(vec![]);
        }
        let out = alloc::<u32>(stream, len as usize)?;
        let params = PositionsParams { store: self.store, out: address(&out), row: row as u32, len };
        // SAFETY: the row has `len` entries, and there is room for as many.
        unsafe { kernels.positions(stream, &params) }.map_err(driver("reading the store"))?;
        stream.clone_dtoh(&out).map_err(driver("reading the store"))
    }
}

fn alloc<T: DeviceRepr>(stream: &Arc<CudaStream>, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: `Kernels::clear` or the first kernel that uses it writes what is read.
    unsafe { stream.alloc(len.max(1)) }.map_err(driver("allocating the store"))
}

/// Zeroed memory that outlives every step.
pub(super) fn zeros<T: DeviceRepr + ValidAsZeroBits>(stream: &Arc<CudaStream>, len: usize) -> Result<CudaSlice<T>> {
    stream.alloc_zeros(len.max(1)).map_err(driver("allocating tables"))
}

/// Uninitialised memory that outlives every step.
pub(super) fn scratch<T: DeviceRepr>(stream: &Arc<CudaStream>, len: usize) -> Result<CudaSlice<T>> {
    alloc(stream, len)
}

/// What the kernels of a step read and leave for each other, at addresses that do not change from step to step, so that a captured step can be
/// replayed: `[spans * 4 | singles | span of each token | position of each token | prefill tiles * 2]`, all u32.
#[derive(Debug)]
pub(super) struct Control {
    tensor: Tensor,
    lse: Tensor, // f32 [tokens, q_heads]
    base: Address,
    most_spans: usize,
    most_tokens: usize,
}

impl Control {
    pub(super) fn new(device: &Device, most_spans: usize, most_tokens: usize, q_heads: usize) -> Result<Self> {
        // Each part begins at a multiple of 16 bytes: kernels read several words at a time.
        let (most_spans, most_tokens) = (most_spans.next_multiple_of(4), most_tokens.next_multiple_of(4));
        let most_tiles = most_tokens; // a tile has a token
        let tensor = Tensor::zeros(5 * most_spans + 2 * most_tokens + 2 * most_tiles, DType::U32, device)?;
        let lse = output(&[most_tokens, q_heads], DType::F32, device)?;
        Ok(Self { base: tensor_address(&tensor)?, tensor, lse, most_spans, most_tokens })
    }

    pub(super) fn fits(&self, spans: usize, tokens: usize) -> bool {
        spans <= self.most_spans && tokens <= self.most_tokens
    }

    fn at(&self, words: usize) -> Address {
        self.base + 4 * words as u64
    }
    pub(super) fn spans(&self) -> Address {
        self.at(0)
    }
    pub(super) fn singles(&self) -> Address {
        self.at(4 * self.most_spans)
    }
    pub(super) fn span_of(&self) -> Address {
        self.at(5 * self.most_spans)
    }
    pub(super) fn positions(&self) -> Address {
        self.at(5 * self.most_spans + self.most_tokens)
    }
    pub(super) fn tiles(&self) -> Address {
        self.at(5 * self.most_spans + 2 * self.most_tokens)
    }

    /// Where attention leaves the log-sum-exp of each query, f32 `[tokens, q_heads]`.
    pub(super) fn lse(&self) -> Result<Address> {
        tensor_address(&self.lse)
    }

    /// The positions as the model sees them.
    pub(super) fn positions_tensor(&self, tokens: usize) -> Result<Tensor> {
        Ok(self.tensor.narrow(0, 5 * self.most_spans + self.most_tokens, tokens)?)
    }

    /// Everything as one array of words, in the layout above.
    pub(super) fn words(&self, spans: &[kernels::Span], tiles: &[[u32; 2]]) -> Vec<u32> {
        let (s, t) = (self.most_spans, self.most_tokens);
        let mut words = vec![0; 5 * s + 2 * t];
        let mut single = 0;
        for (i, span) in spans.iter().enumerate() {
            words[4 * i..4 * i + 4].copy_from_slice(&[span.seat, span.start, span.len, span.first]);
            if span.len == 1 {
                words[4 * s + single] = i as u32;
                single += 1;
            }
            let (first, len) = (span.first as usize, span.len as usize);
            words[5 * s + first..][..len].fill(i as u32);
            let positions = words[5 * s + t + first..][..len].iter_mut();
            positions.zip(span.start..).for_each(|(word, position)| *word = position);
        }
        words.extend(tiles.iter().flatten());
        words
    }
}

/// Page-locked buffers through which the host writes to the device without waiting for it.
#[derive(Debug)]
pub(super) struct Staging {
    buffers: Vec<(PinnedHostSlice<u32>, CudaEvent)>,
    next: usize,
    stream: Arc<CudaStream>,
}

/// Uploads that may be under way at a time; a host further ahead waits.
const STAGES: usize = 8;

impl Staging {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Self {
        Self { buffers: vec![], next: 0, stream: stream.clone() }
    }

    /// Copies words to an address, in the stream's order.
    pub(super) fn upload(&mut self, words: &[u32], to: Address) -> Result<()> {
        self.upload_with(words, to).map_err(driver("uploading a step"))
    }

    fn upload_with(&mut self, words: &[u32], to: Address) -> std::result::Result<(), cudarc::driver::DriverError> {
        if self.buffers.len() < STAGES {
            self.buffers.push(self.buffer(words.len())?);
            self.next = self.buffers.len() - 1;
        }
        self.buffers[self.next].1.synchronize()?; // its last copy is done
        if self.buffers[self.next].0.len() < words.len() {
            self.buffers[self.next] = self.buffer(words.len().next_power_of_two())?;
        }
        let (buffer, done) = &mut self.buffers[self.next];
        let buffer = &mut buffer.as_mut_slice()?[..words.len()];
        buffer.copy_from_slice(words);
        // SAFETY: the words fit the control block they are for, and the buffer is not touched before `done`.
        unsafe { result::memcpy_htod_async(to, buffer, self.stream.cu_stream()) }?;
        done.record(&self.stream)?;
        self.next = (self.next + 1) % STAGES;
        Ok(())
    }

    fn buffer(
        &self,
        words: usize,
    ) -> std::result::Result<(PinnedHostSlice<u32>, CudaEvent), cudarc::driver::DriverError> {
        let context = self.stream.context();
        // SAFETY: written before it is read.
        Ok((unsafe { context.alloc_pinned(words.max(64)) }?, context.new_event(None)?))
    }
}

/// Counters and failures as of the last step whose readback has arrived.
#[derive(Debug)]
pub(super) struct Readback {
    buffer: PinnedHostSlice<u64>,
    done: CudaEvent,
    under_way: bool,
    pub(super) counters: Counters,
    pub(super) failed: Vec<u64>,
    stream: Arc<CudaStream>,
}

const COUNTER_WORDS: usize = size_of::<Counters>() / 8;

impl Readback {
    pub(super) fn new(stream: &Arc<CudaStream>, memory: &Memory) -> Result<Self> {
        let (context, seats) = (stream.context(), memory.store.seats as usize);
        // SAFETY: read only after a copy has filled it. Not write-combined: the host reads it.
        let buffer = unsafe { context.alloc_pinned_with_flags(COUNTER_WORDS + seats, 0) };
        Ok(Self {
            buffer: buffer.map_err(driver("allocating page-locked memory"))?,
            done: context.new_event(None).map_err(driver("creating an event"))?,
            under_way: false,
            counters: Counters { free: memory.store.pages, least_free: memory.store.pages, ..Counters::default() },
            failed: vec![0; seats],
            stream: stream.clone(),
        })
    }

    /// Asks for the state as of now, unless an earlier question is still under way.
    pub(super) fn request(&mut self, memory: &Memory) -> Result<()> {
        if self.under_way {
            return Ok(());
        }
        let (stream, buffer) = (self.stream.cu_stream(), self.buffer.as_mut_slice());
        let (counters, failed) = buffer.map_err(driver("page-locked memory"))?.split_at_mut(COUNTER_WORDS);
        let mut read = || {
            // SAFETY: both ends are alive as long as this, and the host looks only once `done` has passed.
            unsafe { result::memcpy_dtoh_async(counters, address(&memory.counters), stream) }?;
            // SAFETY: as above.
            unsafe { result::memcpy_dtoh_async(failed, address(&memory.failed), stream) }?;
            self.done.record(&self.stream)
        };
        read().map_err(driver("reading counters"))?;
        self.under_way = true;
        Ok(())
    }

    /// Takes over what has arrived; returns whether anything had been asked for and has.
    pub(super) fn poll(&mut self) -> Result<bool> {
        if !self.under_way || !self.done.try_is_complete().map_err(driver("an earlier kernel"))? {
            return Ok(false);
        }
        let words = self.buffer.as_slice().map_err(driver("page-locked memory"))?;
        self.counters = Counters {
            live: words[0],
            written: words[1],
            evicted: words[2],
            free: words[3] as u32,
            least_free: (words[3] >> 32) as u32,
        };
        self.failed.copy_from_slice(&words[COUNTER_WORDS..]);
        self.under_way = false;
        Ok(true)
    }

    /// Waits until the state as of now has arrived.
    pub(super) fn wait(&mut self, memory: &Memory) -> Result<()> {
        self.finish()?;
        self.request(memory)?;
        self.finish()
    }

    fn finish(&mut self) -> Result<()> {
        if self.under_way {
            self.done.synchronize().map_err(driver("waiting for the device"))?;
            self.poll()?;
        }
        Ok(())
    }
}
