//! The published source, through cargo.

use crate::{
    error::{At, Error, Result},
    hosts::Host,
    tree,
};
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use toml_edit::DocumentMut;

/// Whether cargo may use the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// What cargo has already, or a download.
    Allowed,
    /// Only what cargo has already.
    Denied,
}

/// Has cargo fetch a host's source, and checks it. Returns the folder that cargo keeps it in; not to be changed.
///
/// # Errors
/// [`Error::Cargo`] if cargo cannot be run or cannot fetch it, [`Error::Source`] if it is not what was published.
pub fn source(host: &Host, network: Network) -> Result<PathBuf> {
    // Outside the project, whose own patches would answer instead.
    let scratch = tempfile::tempdir().at(&std::env::temp_dir())?;
    let manifest = scratch.path().join("Cargo.toml");
    let (name, version) = (host.package, host.version);
    let text = format!(
        "[package]\nname = \"fetch\"\nversion = \"0.0.0\"\nedition = \"2021\"\n[lib]\npath = \"lib.rs\"\n[workspace]\n\
         [dependencies]\n{name} = {{ version = \"={version}\", default-features = false }}\n"
    );
    tree::write(&manifest, text.as_bytes())?;
    tree::write(&scratch.path().join("lib.rs"), b"")?;
    let offline = metadata(&manifest, &["--offline"]);
    let found = match (offline, network) {
        (Err(_), Network::Allowed) => metadata(&manifest, &[]),
        (found, _) => found,
    };
    let folder = found
        .and_then(|json| folder_of(&json, host).ok_or_else(|| "its metadata does not name the package".to_string()))
        .map_err(|what| Error::Cargo { package: host.id(), what })?;
    check_lock(&scratch.path().join("Cargo.lock"), host)?;
    tree::verify(&folder, &host.id(), host.tree_sha256)?;
    Ok(folder)
}

fn metadata(manifest: &Path, options: &[&str]) -> std::result::Result<serde_json::Value, String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(&cargo);
    command.args(["metadata", "--format-version", "1", "--manifest-path"]).arg(manifest).args(options);
    command.current_dir(manifest.parent().unwrap_or(manifest)); // cargo reads the configuration of where it runs
    let output = command.output().map_err(|error| format!("{}: {error}", cargo.to_string_lossy()))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_string());
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("its metadata: {error}"))
}

fn folder_of(metadata: &serde_json::Value, host: &Host) -> Option<PathBuf> {
    let is_host = |package: &&serde_json::Value| package["name"] == host.package && package["version"] == host.version;
    let package = metadata["packages"].as_array()?.iter().find(is_host)?;
    Path::new(package["manifest_path"].as_str()?).parent().map(Path::to_path_buf)
}

/// cargo checks what it downloads against this sum; it must be the one that the patch was made for.
fn check_lock(path: &Path, host: &Host) -> Result<()> {
    let text = fs::read_to_string(path).at(path)?;
    let lock: DocumentMut = text.parse().map_err(|error| Error::project(path, error))?;
    let packages = lock.get("package").and_then(|packages| packages.as_array_of_tables());
    let is_host = |table: &&toml_edit::Table| table.get("name").and_then(|name| name.as_str()) == Some(host.package);
    let sum = packages.and_then(|packages| packages.iter().find(is_host)).and_then(|table| table.get("checksum"));
    match sum.and_then(|sum| sum.as_str()) {
        Some(sum) if sum == host.crate_sha256 => Ok(()),
        sum => {
            let what = format!("the registry's SHA-256 is {}, not {}", sum.unwrap_or("missing"), host.crate_sha256);
            Err(Error::Source { path: path.into(), package: host.id(), what })
        }
    }
}
