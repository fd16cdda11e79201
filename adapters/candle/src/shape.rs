//! What is known of a model before its weights are loaded.

use crate::{
    config::Config,
    error::{Error, Result},
    loader::{gguf_config, locate},
    weights::GgufFile,
};
use candle_core::Device;
use std::path::Path;

/// A model's configuration, and the size of its weights where that is settled.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// The configuration.
    pub config: Config,
    /// Bytes of a GGUF file, whose weights stay as they are; `None` for others, which are loaded in any type.
    pub weight_bytes: Option<u64>,
}

impl Shape {
    /// Of a published shape ([`Config::preset`]), a `config.json` or a folder with one, a GGUF file, or (with the feature
    /// `hub`) a model of the hub, of which only `config.json` is fetched unless the id names a GGUF file.
    ///
    /// # Errors
    /// Whatever keeps the configuration from being read, naming the file or the field.
    pub fn of(source: &str) -> Result<Self> {
        let path = Path::new(source);
        if !path.exists() {
            if let Ok(config) = Config::preset(source) {
                return Ok(Self { config, weight_bytes: None });
            }
            #[cfg(feature = "hub")]
            if !source.starts_with(['.', '/', '~'])
                && crate::hub::is_id(source)
                && !source.to_lowercase().contains(".gguf")
            {
                return Self::of_json(&crate::hub::fetch_config(source)?);
            }
            if !source.contains('/') {
                // Most likely a preset was meant.
                return Config::preset(source).map(|config| Self { config, weight_bytes: None });
            }
        }
        let path = locate(source)?;
        if path.is_dir() {
            return Self::of_json(&path.join("config.json"));
        }
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
            return Self::of_json(&path);
        }
        let config = gguf_config(&mut GgufFile::open(&path, &Device::Cpu, None)?)?;
        let bytes = std::fs::metadata(&path).map_err(|e| Error::file(&path, e))?.len();
        Ok(Self { config, weight_bytes: Some(bytes) })
    }

    fn of_json(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        Ok(Self { config: Config::from_json(&text)?, weight_bytes: None })
    }
}

/// A page of the pool: entries of one KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Entries of it.
    pub entries: u64,
    /// Bytes of an entry beside its key and value: position, mark, score.
    pub beside: u64,
}

impl Page {
    /// Of the pool in main memory, as it is by default.
    pub const CPU: Self = Self { entries: 16, beside: 9 };
    /// Of the pool on a GPU, as it is by default.
    pub const GPU: Self = Self { entries: 32, beside: 8 };

    /// Bytes of the pages that a KV head with so many entries has; `entry_bytes`: those of a key and
    /// its value.
    pub fn bytes_of_head(self, entries: u64, entry_bytes: u64) -> u64 {
        entries.div_ceil(self.entries) * self.entries * (entry_bytes + self.beside)
    }
}
