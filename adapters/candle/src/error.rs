use std::path::PathBuf;

/// Everything that can go wrong between a model file and its logits.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that cannot be used: which and why.
    #[error("{path}: {what}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A model that cannot be used: why, and what to do.
    #[error("{0}")]
    Model(String),
    /// A tokenizer that cannot be built or used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template that cannot be compiled or rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// The model hub could not serve a model.
    #[error("hub: {0}")]
    Hub(String),
    /// An error of the cache.
    #[error(transparent)]
    Cache(#[from] kvpolicy::Error),
    /// An error of the tensor library.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>, what: impl ToString) -> Self {
        Self::File { path: path.into(), what: what.to_string() }
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
