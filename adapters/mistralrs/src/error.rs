use std::path::PathBuf;

/// Everything that keeps a model of mistral.rs from running under a policy. mistral.rs hands it on as its own error: of
/// the loader, or of the sequences that were in the step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A model that cannot run under any policy here: why.
    #[error("{0}")]
    Model(String),
    /// What is to be loaded is no model.
    #[error("{}: {what}", path.display())]
    Path {
        /// As it was given.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// mistral.rs does not load a model: why.
    #[error("{0}")]
    Loading(String),
    /// A call that does not fit what came before: a fault of the host, or of its patch.
    #[error("the host {0}")]
    Host(String),
    /// A sequence that does not fit although it is alone.
    #[error("{TOO_LARGE}: {0}")]
    TooLarge(kvpolicy::Error),
    /// A model that was to start anew serves sequences.
    #[error("{running} sequences are running: the model goes under another policy when they have ended")]
    Busy {
        /// How many.
        running: u64,
    },
    /// A model description that cannot be read.
    #[error(transparent)]
    Description(#[from] kvpolicy_candle::Error),
    /// An error of the cache.
    #[error(transparent)]
    Cache(#[from] kvpolicy::Error),
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

const TOO_LARGE: &str = "the sequence needs more than all memory for keys and values";

impl Error {
    /// Whether an error of mistral.rs, which hands on text, is [`Error::TooLarge`].
    pub fn is_too_large(message: &str) -> bool {
        message.contains(TOO_LARGE)
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
