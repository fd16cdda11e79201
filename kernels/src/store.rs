//! The structures of `cuda/store.cuh`, field by field.

/// A device address.
pub type Address = u64;

/// What the store counts on the device.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Entries held.
    pub live: u64,
    /// Entries written since the store was made.
    pub written: u64,
    /// Entries dropped by the policy since the store was made.
    pub evicted: u64,
    /// Pages on the free stack.
    pub free: u32,
    /// The fewest there ever were.
    pub least_free: u32,
}

/// Addresses and shape of a store.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)] // see store.cuh
pub struct Store {
    pub k: Address,
    pub v: Address,
    pub tag: Address,
    pub score: Address,
    pub factor: Address,
    pub len: Address,
    pub owned: Address,
    pub newest: Address,
    pub target: Address,
    pub table: Address,
    pub free_pages: Address,
    pub failed: Address,
    pub counters: Address,
    pub layers: u32,
    pub seats: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub page_shift: u32,
    pub max_pages: u32,
    pub pages: u32,
}

impl Store {
    /// Index of a row.
    pub fn row_index(&self, layer: usize, seat: u32, head: usize) -> usize {
        (layer * self.seats as usize + seat as usize) * self.heads as usize + head
    }
}

/// Pages that several sequences hold; all 0 while there are none.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)] // see shared.cuh
pub struct Sharing {
    pub more: Address,
    pub own: Address,
    pub copies: Address,
    pub copy_count: Address,
}

/// Where the newest positions of a layer's rows are.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)] // see store.cuh
pub struct Ring {
    pub slots: Address,
    pub size: u32,
}

/// The new tokens of one sequence in a step.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span {
    /// Index of the sequence in everything that is kept per sequence.
    pub seat: u32,
    /// Position of the first token.
    pub start: u32,
    /// Number of tokens.
    pub len: u32,
    /// Index of the first in the step's tokens.
    pub first: u32,
}

/// Entries no rule may evict.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Protect {
    /// Positions below this.
    pub sinks: u32,
    /// This many positions up to the newest.
    pub recent: u32,
}

/// Structures that kernels take by value or read from memory: plain numbers, laid out as C lays out the structure of the
/// same name in `cuda/`.
macro_rules! device_repr {
    ($($name:ty),+ $(,)?) => {$(
        // SAFETY: `#[repr(C)]`, numbers only, no padding that is read.
        unsafe impl cudarc::driver::DeviceRepr for $name {}
    )+};
}
pub(crate) use device_repr;

device_repr!(Counters, Span);
// SAFETY: all zeros is a value.
unsafe impl cudarc::driver::ValidAsZeroBits for Counters {}
