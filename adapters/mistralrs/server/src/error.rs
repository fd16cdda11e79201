/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What `--model` names cannot be served.
    #[error(transparent)]
    Model(#[from] kvpolicy_mistralrs::Error),
    /// A policy that does not parse.
    #[error(transparent)]
    Policy(#[from] kvpolicy::Error),
    /// An option that makes no sense.
    #[error("{0}")]
    Option(String),
    /// mistral.rs refuses the model: why.
    #[error("{0}")]
    Host(String),
    /// The network.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
