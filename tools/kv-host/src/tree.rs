//! Folders of a package: their hash, their copy.

use crate::{
    edits::FileEdits,
    error::{At, Error, Result},
};
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What cargo adds to a package when it unpacks it; not part of what was published.
const CARGOS: [&str; 3] = [".cargo-ok", ".cargo_vcs_info.json", ".cargo-checksum.json"];

/// Files of a package, relative to `root`, sorted; without what cargo added.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (vec![], vec![root.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).at(&folder)? {
            let entry = entry.at(&folder)?;
            if entry.file_type().at(&entry.path())?.is_dir() {
                folders.push(entry.path());
            } else if let Ok(relative) = entry.path().strip_prefix(root)
                && !CARGOS.iter().any(|name| relative == Path::new(name))
            {
                found.push(relative.to_path_buf());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// SHA-256 over the names and contents of a package's files, in hexadecimal.
///
/// # Errors
/// [`Error::Io`] for what cannot be read.
pub fn digest(root: &Path) -> Result<String> {
    let mut all = Sha256::new();
    for file in files(root)? {
        let path = root.join(&file);
        let content = fs::read(&path).at(&path)?;
        let name: Vec<_> = file.iter().map(|part| part.to_string_lossy()).collect();
        all.update(format!("{} {}\n", hex(&Sha256::digest(content)), name.join("/")));
    }
    Ok(hex(&all.finalize()))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Copies a package into an existing folder.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    for file in files(from)? {
        let content = fs::read(from.join(&file)).at(&from.join(&file))?;
        write(&to.join(&file), &content)?; // not `fs::copy`: a registry may be read-only, the copy may not
    }
    Ok(())
}

/// Writes a file, with the folders it is in.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).at(folder)?;
    }
    fs::write(path, content).at(path)
}

/// Applies edits to the files of a package.
pub(crate) fn edit(root: &Path, edits: &[FileEdits]) -> Result<()> {
    for file in edits {
        let path = root.join(&file.file);
        let text = fs::read_to_string(&path).at(&path)?;
        write(&path, file.apply(&text)?.as_bytes())?;
    }
    Ok(())
}

/// Refuses a folder whose digest is another.
pub(crate) fn verify(root: &Path, package: &str, expected: &str) -> Result<()> {
    let found = digest(root)?;
    if found == expected {
        return Ok(());
    }
    let what =
        format!("its files have the SHA-256 {found}, not {expected}; remove the folder, cargo will unpack it again");
    Err(Error::Source { path: root.into(), package: package.into(), what })
}
