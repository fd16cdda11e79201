//! A project with the patch, and without it again.

use crate::{
    config::{self, Config, FOLDER},
    error::{At, Result},
    fetch::{self, Network},
    hosts::Host,
    tree,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What folders are called in which a copy is being made; one that is left was interrupted.
const UNFINISHED: &str = ".new-";

/// What a call changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The project is now as asked.
    Made,
    /// It was already.
    None,
}

/// Prepares a project: a patched copy of the host's source in `.kv-host`, and the entry in `.cargo/config.toml` that
/// makes cargo use it. The entry is written last, in one piece, so that an interruption leaves the project without the
/// patch or with all of it.
///
/// # Errors
/// [`Error::Version`](crate::Error::Version) if the project asks for another version of the host,
/// [`Error::Project`](crate::Error::Project) if it is no cargo project or patches the host by other means, and those of
/// [`source`](crate::source). Nothing has changed then.
pub fn install(project: &Path, host: &Host, network: Network) -> Result<Change> {
    install_from(project, host, || fetch::source(host, network))
}

fn install_from(project: &Path, host: &Host, source: impl FnOnce() -> Result<PathBuf>) -> Result<Change> {
    config::check_project(project, host)?;
    let mut config = Config::read(project, host)?;
    config.set(host)?;
    let published = source()?;
    let copies = project.join(FOLDER);
    fs::create_dir_all(&copies).at(&copies)?;
    let made = place_copy(&published, &copies, host).and_then(|copied| Ok(config.save()? | copied));
    let made = made.inspect_err(|_| _ = config::remove_if_empty(&copies))?;
    remove_copies(&copies, host, Some(&host.folder()))?;
    Ok(if made { Change::Made } else { Change::None })
}

/// Builds the patched copy aside and moves it to its place, unless it is there.
fn place_copy(published: &Path, copies: &Path, host: &Host) -> Result<bool> {
    let scratch = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(copies).at(copies)?;
    let (fresh, stale) = (scratch.path().join("fresh"), scratch.path().join("stale"));
    patch(published, &fresh, host)?;
    let place = copies.join(host.folder());
    if place.exists() {
        if tree::digest(&place)? == tree::digest(&fresh)? {
            return Ok(false);
        }
        fs::rename(&place, &stale).at(&place)?; // someone changed it
    }
    fs::rename(&fresh, &place).at(&place)?;
    Ok(true)
}

/// A patched copy of a host's published source, in a new folder.
fn patch(published: &Path, to: &Path, host: &Host) -> Result<()> {
    tree::copy(published, to)?;
    tree::edit(to, &host.edits()?)?;
    host.added.iter().try_for_each(|(path, text)| tree::write(&to.join(path), text.as_bytes()))
}

/// Takes the patch out of a project: first the entry, then the copies. Needs no network, and no cargo.
///
/// # Errors
/// [`Error::Project`](crate::Error::Project) if the host is patched by other means.
pub fn undo(project: &Path, host: &Host) -> Result<Change> {
    let mut config = Config::read(project, host)?;
    config.unset(host);
    let changed = config.save()?;
    let removed = remove_copies(&project.join(FOLDER), host, None)?;
    Ok(if changed || removed { Change::Made } else { Change::None })
}

/// Removes the host's copies but one, and the folder if nothing is left in it.
fn remove_copies(copies: &Path, host: &Host, keep: Option<&str>) -> Result<bool> {
    let mut removed = false;
    if !copies.exists() {
        return Ok(false);
    }
    for entry in fs::read_dir(copies).at(copies)? {
        let entry = entry.at(copies)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let unfinished = name.starts_with(UNFINISHED);
        if unfinished || name.starts_with(&host.prefix()) && Some(name.as_str()) != keep {
            fs::remove_dir_all(entry.path()).at(&entry.path())?;
            removed = true;
        }
    }
    config::remove_if_empty(copies)?;
    Ok(removed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::Error;
    use tempfile::TempDir;

    const HOST: Host = Host {
        package: "runtime",
        version: "1.2.3",
        siblings: &["facade"],
        crate_sha256: "",
        tree_sha256: "",
        script: "file src/lib.rs\nreplace 2\n| two",
        added: &[("src/added/new.rs", "new\n")],
    };
    const MANIFEST: &str = "[package]\nname = \"p\"\n[dependencies]\nruntime = \"1.2\"\n";

    fn published() -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        tree::write(&folder.path().join("src/lib.rs"), b"1\n2\n3\n").unwrap();
        tree::write(&folder.path().join(".cargo-ok"), b"").unwrap();
        folder
    }

    fn project(manifest: &str) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("Cargo.toml"), manifest).unwrap();
        folder
    }

    fn installed(project: &TempDir, host: &Host, source: &TempDir) -> Result<Change> {
        install_from(project.path(), host, || Ok(source.path().into()))
    }

    /// Every file of a folder with its content.
    fn all(folder: &Path) -> Vec<(String, String)> {
        let mut found = vec![];
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(all(&path));
            } else {
                found.push((path.display().to_string(), fs::read_to_string(&path).unwrap()));
            }
        }
        found.sort();
        found
    }

    #[test]
    fn a_project_is_patched_once_and_unpatched_without_a_trace() {
        let (source, project) = (published(), project(MANIFEST));
        let before = all(project.path());
        assert_eq!(undo(project.path(), &HOST).unwrap(), Change::None);
        assert_eq!(installed(&project, &HOST, &source).unwrap(), Change::Made);
        let copy = project.path().join(FOLDER).join(HOST.folder());
        assert_eq!(fs::read_to_string(copy.join("src/lib.rs")).unwrap(), "1\ntwo\n3\n");
        assert_eq!(fs::read_to_string(copy.join("src/added/new.rs")).unwrap(), "new\n");
        assert!(!copy.join(".cargo-ok").exists());
        let config = fs::read_to_string(project.path().join(".cargo/config.toml")).unwrap();
        assert_eq!(config, format!("[patch.crates-io]\nruntime = {{ path = \"{FOLDER}/{}\" }}\n", HOST.folder()));

        let once = all(project.path());
        assert_eq!(installed(&project, &HOST, &source).unwrap(), Change::None);
        assert_eq!(all(project.path()), once);
        assert_eq!(undo(project.path(), &HOST).unwrap(), Change::Made);
        assert_eq!(all(project.path()), before);
        assert!(!project.path().join(".cargo").exists() && !project.path().join(FOLDER).exists());
    }

    #[test]
    fn other_configuration_stays() {
        let (source, project) = (published(), project(MANIFEST));
        let path = project.path().join(".cargo/config.toml");
        let other = "# mine\n[build]\njobs = 2\n\n[patch.crates-io]\nother = { path = \"o\" } # too\n";
        tree::write(&path, other.as_bytes()).unwrap();
        installed(&project, &HOST, &source).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with(other) && text[other.len()..].starts_with("runtime = {"), "{text}");
        undo(project.path(), &HOST).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), other);
    }

    #[test]
    fn a_changed_copy_an_old_one_and_an_unfinished_one_are_replaced() {
        let (source, project) = (published(), project(MANIFEST));
        let old = Host { script: "file src/lib.rs\nreplace 1\n| one", ..HOST };
        installed(&project, &old, &source).unwrap();
        let copies = project.path().join(FOLDER);
        tree::write(&copies.join(".new-x/fresh/src/lib.rs"), b"").unwrap();
        assert_eq!(installed(&project, &HOST, &source).unwrap(), Change::Made);
        let names: Vec<_> = fs::read_dir(&copies).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [HOST.folder().as_str()]);

        let good = all(project.path());
        fs::write(copies.join(HOST.folder()).join("src/lib.rs"), "changed").unwrap();
        assert_eq!(installed(&project, &HOST, &source).unwrap(), Change::Made);
        assert_eq!(all(project.path()), good);
    }

    #[test]
    fn a_patch_that_fails_leaves_nothing() {
        let (source, project) = (published(), project(MANIFEST));
        let before = all(project.path());
        let past_the_end = Host { script: "file src/lib.rs\nreplace 4\n| four", ..HOST };
        assert!(matches!(installed(&project, &past_the_end, &source), Err(Error::OutOfFile { .. })));
        let no_such_file = Host { script: "file src/lib.rs\nreplace 2\nfile src/other.rs\nreplace 1", ..HOST };
        assert!(matches!(installed(&project, &no_such_file, &source), Err(Error::Io { .. })));
        assert_eq!(all(project.path()), before);
        assert!(!project.path().join(FOLDER).exists());
    }

    #[test]
    fn other_versions_are_refused_before_anything_is_fetched() {
        let depends = |on: &str| format!("[package]\nname = \"p\"\n{on}\n");
        let refused = |project: &TempDir| {
            let before = all(project.path());
            let error = install_from(project.path(), &HOST, || panic!("fetched")).unwrap_err();
            assert_eq!(all(project.path()), before);
            error
        };
        for (manifest, package, version) in [
            ("[dependencies]\nruntime = \"0.9\"", "runtime", "0.9"),
            ("[dependencies]\nfacade = \"=1.2.2\"", "facade", "=1.2.2"),
            ("[dev-dependencies]\nr = { version = \"1.3\", package = \"runtime\" }", "runtime", "1.3"),
            ("[target.'cfg(unix)'.dependencies.facade]\nversion = \"2\"", "facade", "2"),
            ("[workspace.dependencies]\nruntime = { git = \"https://r\" }", "runtime", "https://r"),
            ("[build-dependencies]\nruntime = { path = \"../r\", version = \"1.2.3\" }", "runtime", "../r"),
        ] {
            match refused(&project(&depends(manifest))) {
                Error::Version { package: p, found, .. } => {
                    assert_eq!((&*p, &*found), (package, version), "{manifest}")
                }
                other => panic!("{manifest}: {other}"),
            }
        }
        let locked = project(MANIFEST);
        let lock = "[[package]]\nname = \"runtime\"\nversion = \"1.2.4\"\n";
        fs::write(locked.path().join("Cargo.lock"), lock).unwrap();
        let message = refused(&locked).to_string();
        assert!(
            message.ends_with("asks for runtime 1.2.4, the patch is for 1.2.3 only: ask for \"=1.2.3\""),
            "{message}"
        );

        let accepted = depends("[dependencies]\nruntime = { workspace = true }\nfacade = \"1\"\nother = \"9\"");
        assert!(installed(&project(&accepted), &HOST, &published()).is_ok());
    }

    #[test]
    fn what_is_not_ours_is_refused_and_left_alone() {
        let patch = "[patch.crates-io]\nruntime = { path = \"mine\" }\n";
        let refused = |project: &TempDir, change: fn(&TempDir) -> Result<Change>| {
            let before = all(project.path());
            assert!(matches!(change(project), Err(Error::Project { .. })));
            assert_eq!(all(project.path()), before);
        };
        let install: fn(&TempDir) -> Result<Change> = |project| installed(project, &HOST, &published());
        refused(&tempfile::tempdir().unwrap(), install);
        refused(&project("not toml"), install);
        refused(&project(&format!("{MANIFEST}{patch}")), install);
        for (file, text) in [("config.toml", patch), ("config.toml", "patch = 3\n"), ("config", "")] {
            let project = project(MANIFEST);
            tree::write(&project.path().join(".cargo").join(file), text.as_bytes()).unwrap();
            refused(&project, install);
        }
        let by_hand = project(MANIFEST);
        tree::write(&by_hand.path().join(".cargo/config.toml"), patch.as_bytes()).unwrap();
        refused(&by_hand, |project| undo(project.path(), &HOST));
    }
}
