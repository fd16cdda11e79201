//! The entry in a project's `.cargo/config.toml`, and what a project may not ask for.

use crate::{
    error::{At, Error, Result},
    hosts::Host,
};
use semver::{Version, VersionReq};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};
use toml_edit::{DocumentMut, InlineTable, Item, Table, TableLike, Value};

/// Where patched copies are, relative to the project.
pub(crate) const FOLDER: &str = ".kv-host";

/// A project's `.cargo/config.toml`, which need not exist.
#[derive(Debug)]
pub(crate) struct Config {
    path: PathBuf,
    text: String,
    document: DocumentMut,
}

impl Config {
    /// Reads it, and refuses one that patches the host already, by other means.
    pub(crate) fn read(project: &Path, host: &Host) -> Result<Self> {
        let old = project.join(".cargo/config");
        if old.exists() {
            return Err(Error::project(&old, "cargo reads this file before config.toml: rename it to that"));
        }
        let path = project.join(".cargo/config.toml");
        let text = if path.exists() { fs::read_to_string(&path).at(&path)? } else { String::new() };
        let document = text.parse().map_err(|error| Error::project(&path, error))?;
        let config = Self { path, text, document };
        if config.entry(host).is_some() && !config.is_ours(host) {
            let what = format!("patches {} already; take that entry out first", host.package);
            return Err(Error::project(&config.path, what));
        }
        Ok(config)
    }

    fn entry(&self, host: &Host) -> Option<&Item> {
        self.document.get("patch")?.get("crates-io")?.get(host.package)
    }

    /// Whether the entry was made by this program.
    fn is_ours(&self, host: &Host) -> bool {
        let path = self.entry(host).and_then(|entry| entry.get("path")).and_then(|path| path.as_str());
        path.is_some_and(|path| path.starts_with(&format!("{FOLDER}/{}", host.prefix())))
    }

    /// Names the patched copy.
    pub(crate) fn set(&mut self, host: &Host) -> Result<()> {
        let mut entry = InlineTable::new();
        entry.insert("path", format!("{FOLDER}/{}", host.folder()).into());
        let patch = subtable(self.document.as_table_mut(), "patch").and_then(|t| subtable(t, "crates-io"));
        let patch = patch.ok_or_else(|| Error::project(&self.path, "`patch.crates-io` is no table"))?;
        patch.insert(host.package, Item::Value(Value::InlineTable(entry)));
        Ok(())
    }

    /// Takes the entry out, with tables that it leaves empty.
    pub(crate) fn unset(&mut self, host: &Host) {
        let root = self.document.as_table_mut();
        let Some(patch) = root.get_mut("patch").and_then(Item::as_table_like_mut) else { return };
        let Some(crates) = patch.get_mut("crates-io").and_then(Item::as_table_like_mut) else { return };
        crates.remove(host.package);
        if crates.is_empty() {
            patch.remove("crates-io");
        }
        if patch.is_empty() {
            root.remove("patch");
        }
    }

    /// Writes what changed, at once or not at all. A file without content is removed.
    pub(crate) fn save(&self) -> Result<bool> {
        let text = self.document.to_string();
        if text == self.text {
            return Ok(false);
        }
        let folder = self.path.parent().unwrap_or(Path::new("."));
        if text.trim().is_empty() {
            fs::remove_file(&self.path).at(&self.path)?;
            remove_if_empty(folder)?;
            return Ok(true);
        }
        fs::create_dir_all(folder).at(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder).at(folder)?;
        file.write_all(text.as_bytes()).at(file.path())?;
        if let Ok(old) = fs::metadata(&self.path) {
            file.as_file().set_permissions(old.permissions()).at(&self.path)?;
        } else {
            readable(file.as_file()).at(file.path())?;
        }
        file.persist(&self.path).map_err(|error| error.error).at(&self.path)?;
        Ok(true)
    }
}

/// A temporary file is its owner's alone; a configuration is everyone's to read.
#[cfg(unix)]
fn readable(file: &fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn readable(_file: &fs::File) -> std::io::Result<()> {
    Ok(())
}

pub(crate) fn remove_if_empty(folder: &Path) -> Result<()> {
    let empty = fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    if empty { fs::remove_dir(folder).at(folder) } else { Ok(()) }
}

fn subtable<'a>(table: &'a mut dyn TableLike, name: &str) -> Option<&'a mut dyn TableLike> {
    let implicit = || {
        let mut table = Table::new();
        table.set_implicit(true); // `[patch.crates-io]` without a `[patch]` of its own
        Item::Table(table)
    };
    table.entry(name).or_insert_with(implicit).as_table_like_mut()
}

/// Refuses a project that asks for another version of the host, or patches it in its manifest.
pub(crate) fn check_project(project: &Path, host: &Host) -> Result<()> {
    let manifest = project.join("Cargo.toml");
    if !manifest.exists() {
        return Err(Error::project(&manifest, "there is no such file: name the folder of a cargo project"));
    }
    let document = read(&manifest)?;
    if document.get("patch").and_then(|p| p.get("crates-io")).and_then(|p| p.get(host.package)).is_some() {
        return Err(Error::project(&manifest, format!("patches {} already; take that entry out first", host.package)));
    }
    dependency_tables(&document).into_iter().try_for_each(|table| check_dependencies(table, &manifest, host))?;
    let lock = project.join("Cargo.lock");
    if lock.exists() { check_lock(&read(&lock)?, &lock, host) } else { Ok(()) }
}

fn read(path: &Path) -> Result<DocumentMut> {
    fs::read_to_string(path).at(path)?.parse().map_err(|error| Error::project(path, error))
}

fn dependency_tables(document: &DocumentMut) -> Vec<&dyn TableLike> {
    const KINDS: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];
    let targets = document.get("target").and_then(Item::as_table_like);
    let targets = targets.into_iter().flat_map(|targets| targets.iter().map(|(_, target)| target));
    let places = std::iter::once(document.as_item()).chain(document.get("workspace")).chain(targets);
    places.flat_map(|place| KINDS.iter().filter_map(|kind| place.get(kind)?.as_table_like())).collect()
}

fn check_dependencies(table: &dyn TableLike, manifest: &Path, host: &Host) -> Result<()> {
    for (key, item) in table.iter() {
        let field = |name: &str| item.get(name).and_then(Item::as_str);
        let package = field("package").unwrap_or(key);
        if package != host.package && !host.siblings.contains(&package) {
            continue;
        }
        let found = match (item.as_str().or(field("version")), field("git").or(field("path"))) {
            (_, Some(place)) => place, // a patch of crates.io does not reach it
            (Some(asked), None) if accepts(asked, host.version) => continue,
            (Some(asked), None) => asked,
            (None, None) => continue, // the workspace says
        };
        return Err(other_version(manifest, package, found, host));
    }
    Ok(())
}

fn accepts(requirement: &str, version: &str) -> bool {
    matches!((VersionReq::parse(requirement), Version::parse(version)), (Ok(asked), Ok(is)) if asked.matches(&is))
}

fn check_lock(lock: &DocumentMut, path: &Path, host: &Host) -> Result<()> {
    let packages = lock.get("package").and_then(Item::as_array_of_tables);
    for package in packages.into_iter().flat_map(|packages| packages.iter()) {
        let field = |name: &str| package.get(name).and_then(Item::as_str);
        if let (Some(name), Some(version)) = (field("name"), field("version"))
            && (name == host.package || host.siblings.contains(&name))
            && version != host.version
        {
            return Err(other_version(path, name, version, host));
        }
    }
    Ok(())
}

fn other_version(path: &Path, package: &str, found: &str, host: &Host) -> Error {
    let (package, found, wanted) = (package.into(), found.into(), host.version.into());
    Error::Version { path: path.into(), package, found, wanted }
}
