//! A model folder: on a disk, or inside the program.

use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

/// Where the files of a model are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Folder<'a> {
    Disk(&'a Path),
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// A file that is there, as far as is known.
#[derive(Debug, Clone)]
pub(crate) enum Blob {
    Disk(PathBuf),
    Embedded(&'static str, &'static [u8]),
}

impl Folder<'_> {
    /// For messages.
    pub(crate) fn path(self, name: &str) -> PathBuf {
        match self {
            Self::Disk(dir) => dir.join(name),
            Self::Embedded(_) => Path::new(EMBEDDED).join(name),
        }
    }

    /// The file of this name, which may be missing on a disk.
    fn blob(self, name: &str) -> Option<Blob> {
        match self {
            Self::Disk(dir) => Some(Blob::Disk(dir.join(name))),
            Self::Embedded(files) => {
                files.iter().find(|(known, _)| *known == name).map(|(name, bytes)| Blob::Embedded(name, bytes))
            }
        }
    }

    pub(crate) fn read(self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        self.blob(name).map_or(Ok(None), |blob| blob.read())
    }

    /// `None` where there is no such file.
    ///
    /// # Errors
    /// [`Error::File`] for one that cannot be read or is no UTF-8.
    pub(crate) fn text(self, name: &str) -> Result<Option<String>> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let text = String::from_utf8(bytes.into_owned());
        text.map(Some).map_err(|_| Error::file(self.path(name), "is not UTF-8 text"))
    }

    /// # Errors
    /// [`Error::File`] where there is no such file, too.
    pub(crate) fn required(self, name: &str) -> Result<Cow<'static, [u8]>> {
        self.read(name)?.ok_or_else(|| Error::file(self.path(name), "no such file"))
    }

    /// `model.safetensors`, or the shards its index names.
    ///
    /// # Errors
    /// [`Error::File`] if there is neither, or the index is damaged.
    pub(crate) fn weights(self) -> Result<Vec<Blob>> {
        let single = self.blob("model.safetensors").filter(Blob::exists);
        if let Some(single) = single {
            return Ok(vec![single]);
        }
        const INDEX: &str = "model.safetensors.index.json";
        let neither = || Error::file(self.path(""), format!("has neither model.safetensors nor {INDEX}"));
        let text = self.text(INDEX)?.ok_or_else(neither)?;
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let parsed: Index = serde_json::from_str(&text).map_err(|e| Error::file(self.path(INDEX), e))?;
        let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
        let missing = |name: &str| Error::file(self.path(name), "no such file");
        names.iter().map(|name| self.blob(name).ok_or_else(|| missing(name))).collect()
    }
}

/// What messages call the folder inside the program.
const EMBEDDED: &str = "(embedded)";

impl Blob {
    fn exists(&self) -> bool {
        match self {
            Self::Disk(path) => path.is_file(),
            Self::Embedded(..) => true,
        }
    }

    /// For messages.
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Self::Disk(path) => path.clone(),
            Self::Embedded(name, _) => Path::new(EMBEDDED).join(name),
        }
    }

    /// `None` where there is no such file.
    pub(crate) fn read(&self) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Self::Disk(path) => match std::fs::read(path) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(Error::file(path, error)),
            },
            Self::Embedded(_, bytes) => Ok(Some(Cow::Borrowed(bytes))),
        }
    }

    /// Adds its bytes, without holding all of them.
    pub(crate) fn digest(&self, hash: &mut Sha256) -> Result<()> {
        let path = match self {
            Self::Disk(path) => path,
            Self::Embedded(_, bytes) => {
                hash.update(bytes);
                return Ok(());
            }
        };
        let mut file = std::fs::File::open(path).map_err(|e| Error::file(path, e))?;
        let mut buffer = vec![0u8; 1 << 20];
        loop {
            match file.read(&mut buffer).map_err(|e| Error::file(path, e))? {
                0 => return Ok(()),
                n => hash.update(&buffer[..n]),
            }
        }
    }
}
