use crate::step::SeqId;

/// Everything that can go wrong in this crate: what, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A policy string that does not parse or contradicts itself; every reason at once.
    #[error("policy `{text}`: {}", reasons.join("; "))]
    Policy {
        /// The string as it was given.
        text: String,
        /// Every fault found.
        reasons: Vec<String>,
    },
    /// A policy this model or backend cannot run; every reason at once.
    #[error("policy `{policy}` cannot run here: {}", reasons.join("; "))]
    Refused {
        /// The policy, printed.
        policy: String,
        /// Every reason found.
        reasons: Vec<String>,
    },
    /// A model shape or backend configuration that makes no sense.
    #[error("{0}")]
    Config(String),
    /// A tensor of the wrong shape.
    #[error("{what}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// Which tensor.
        what: &'static str,
        /// What the model and the step call for.
        expected: Vec<usize>,
        /// What was given.
        got: Vec<usize>,
    },
    /// A call that the life of a sequence does not allow.
    #[error("sequence {seq}: {what}")]
    Sequence {
        /// Which sequence.
        seq: SeqId,
        /// What is wrong and what to do.
        what: String,
    },
    /// The pool has no page left for this sequence. Its pages were given back and only `release` is left for it;
    /// every other sequence goes on.
    #[error(
        "sequence {seq}: the KV pool of {limit} bytes is exhausted at layer {layer}, position {position}; \
         release sequences, raise the limit or take a smaller budget"
    )]
    PoolExhausted {
        /// Which sequence was dropped.
        seq: SeqId,
        /// The layer that needed a page.
        layer: usize,
        /// The first position that did not fit.
        position: u32,
        /// The pool's limit in bytes.
        limit: u64,
    },
    /// A compression that a policy cannot reach: what it holds at the least.
    #[error("{0}")]
    OutOfReach(String),
    /// An error of a model under comparison.
    #[error("{0}")]
    Host(Box<dyn std::error::Error + Send + Sync>),
    /// An error of the CUDA driver.
    #[cfg(feature = "cuda")]
    #[error("CUDA, {what}: {source}")]
    Cuda {
        /// What was being done.
        what: &'static str,
        /// What the driver says.
        source: cudarc::driver::DriverError,
    },
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
