/// Everything that keeps a model of mistral.rs from running under a policy. mistral.rs hands it on as its own error: of
/// the loader, or of the sequences that were in the step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A model that cannot run under any policy here: why.
    #[error("{0}")]
    Model(String),
    /// A call that does not fit what came before: a fault of the host, or of its patch.
    #[error("the host {0}")]
    Host(String),
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

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
