//! The tensors of a safetensors file, read one by one.

use crate::error::{Error, Result};
use candle_core::{Device, Tensor, safetensors::Load};
use safetensors::tensor::{Dtype, Metadata, TensorInfo, TensorView};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// Bytes of a header's length.
const LENGTH: u64 = 8;

/// A file whose header was read, and is of this file's length.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    file: File,
    size: u64,
    /// Where data begins.
    start: u64,
    metadata: Metadata,
}

/// A tensor as the file has it.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Raw {
    pub(crate) fn view(&self) -> std::result::Result<TensorView<'_>, safetensors::SafeTensorError> {
        TensorView::new(self.dtype, self.shape.clone(), &self.bytes)
    }
}

impl TensorFile {
    /// # Errors
    /// [`Error::File`] for a file that is no safetensors file or is cut off.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |e: std::io::Error| Error::file(path, e);
        let damaged = |what: &str| Error::file(path, format!("is no safetensors file, or damaged: {what}"));
        let mut file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let mut length = [0; LENGTH as usize];
        file.read_exact(&mut length).map_err(|_| damaged("it has no header"))?;
        let start = u64::from_le_bytes(length).checked_add(LENGTH).filter(|start| *start <= size);
        let start = start.ok_or_else(|| damaged("its header is longer than the file"))?;
        let mut header = vec![0; (start - LENGTH) as usize];
        file.read_exact(&mut header).map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| damaged(&e.to_string()))?;
        let end = start + metadata.data_len() as u64;
        if end != size {
            return Err(damaged(&format!("its tensors end at byte {end} of {size}")));
        }
        Ok(Self { path: path.to_path_buf(), file, size, start, metadata })
    }

    /// Without its folder.
    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// Names and what is known of them, in order of the names.
    pub(crate) fn tensors(&self) -> Vec<(String, &TensorInfo)> {
        let mut all: Vec<_> = self.metadata.tensors().into_iter().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    pub(crate) fn raw(&mut self, name: &str) -> Result<Raw> {
        let missing = || Error::file(&self.path, format!("has no tensor `{name}`"));
        let TensorInfo { dtype, shape, data_offsets } = self.metadata.info(name).ok_or_else(missing)?.clone();
        let mut bytes = vec![0; data_offsets.1 - data_offsets.0];
        let from = SeekFrom::Start(self.start + data_offsets.0 as u64);
        let read = self.file.seek(from).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|e| Error::file(&self.path, format!("tensor `{name}`: {e}")))?;
        Ok(Raw { dtype, shape, bytes })
    }

    /// In main memory, of the file's type.
    pub(crate) fn tensor(&mut self, name: &str) -> Result<Tensor> {
        let raw = self.raw(name)?;
        let view = raw.view().map_err(|e| Error::file(&self.path, format!("tensor `{name}`: {e}")))?;
        Ok(view.load(&Device::Cpu)?)
    }
}
