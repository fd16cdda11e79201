//! The patch of mistral.rs on its published source, where cargo has that already.
#![allow(clippy::unwrap_used)]

use kv_host::{Change, Error, MISTRALRS, Network, digest, install, source, undo};
use std::{fs, path::Path};

/// The published source; printed why not.
fn published() -> Option<std::path::PathBuf> {
    match source(&MISTRALRS, Network::Denied) {
        Err(Error::Cargo { .. }) => {
            println!("skipped: {} is not among what cargo has downloaded (cargo fetch gets it)", MISTRALRS.id());
            None
        }
        found => Some(found.unwrap()),
    }
}

#[test]
fn a_project_gets_the_published_source_with_the_feature() {
    let Some(published) = published() else { return };
    let project = tempfile::tempdir().unwrap();
    let manifest = "[package]\nname = \"p\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[lib]\npath = \"lib.rs\"\n[dependencies]\n\
                    mistralrs-core = { version = \"=0.8.1\", default-features = false, features = [\"kv-policy\"] }\n";
    fs::write(project.path().join("Cargo.toml"), manifest).unwrap();
    fs::write(project.path().join("lib.rs"), "").unwrap();
    let resolves = || {
        let mut cargo = std::process::Command::new(env!("CARGO"));
        cargo.args(["metadata", "--offline", "--format-version", "1"]).current_dir(project.path());
        cargo.output().unwrap().status.success()
    };
    assert!(!resolves(), "the feature must be the patch's");
    assert_eq!(install(project.path(), &MISTRALRS, Network::Denied).unwrap(), Change::Made);
    assert!(resolves());
    assert_eq!(install(project.path(), &MISTRALRS, Network::Denied).unwrap(), Change::None);

    let copy = fs::read_dir(project.path().join(".kv-host")).unwrap().next().unwrap().unwrap().path();
    unchanged_but_for_the_edits(&published, &copy);
    assert_eq!(digest(&published).unwrap(), MISTRALRS.tree_sha256, "cargo's own copy was changed");
    assert_eq!(undo(project.path(), &MISTRALRS).unwrap(), Change::Made);
    assert!(!resolves());
}

/// As it is meant to be called: in the project's folder, whose configuration has the patch the second time.
#[test]
fn the_program_may_be_called_again_where_it_was() {
    if published().is_none() {
        return;
    }
    let project = tempfile::tempdir().unwrap();
    fs::write(project.path().join("Cargo.toml"), "[package]\nname = \"p\"\n[lib]\npath = \"lib.rs\"\n").unwrap();
    fs::write(project.path().join("lib.rs"), "").unwrap();
    let said = |arguments: &[&str]| {
        let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_kv-host"));
        let output = program.args(arguments).current_dir(project.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let with = "uses mistralrs-core 0.8.1 with the feature `kv-policy`\n";
    assert_eq!(said(&["mistralrs"]), format!(". {with}"));
    assert_eq!(said(&["mistralrs"]), format!(". {}", with.replace("uses", "used").replace("`\n", "` already\n")));
    assert_eq!(said(&["mistralrs", "--undo"]), ". uses mistralrs-core 0.8.1 as published\n");
}

fn unchanged_but_for_the_edits(published: &Path, copy: &Path) {
    let edited: Vec<_> = MISTRALRS.edits().unwrap().into_iter().map(|edits| edits.file).collect();
    for file in ["src/sampler.rs", "src/models/phi3.rs", "src/gguf/mod.rs", "Cargo.toml.orig"] {
        assert!(!edited.iter().any(|name| name == file));
        assert_eq!(fs::read(published.join(file)).unwrap(), fs::read(copy.join(file)).unwrap(), "{file}");
    }
    let manifest = |folder: &Path| fs::read_to_string(folder.join("Cargo.toml")).unwrap();
    assert_eq!(manifest(copy).replacen("kv-policy = []\n", "", 1), manifest(published));
    // Cargo compiles a package anew in each build whose script names a file that does not exist.
    let script = fs::read_to_string(copy.join("build.rs")).unwrap();
    let named = script.lines().filter_map(|line| line.trim().strip_prefix("println!(\"cargo:rerun-if-changed="));
    let named: Vec<&str> = named.filter_map(|rest| rest.strip_suffix("\");")).collect();
    assert!(!named.is_empty() && named.iter().all(|file| copy.join(file).exists()), "{named:?}");
}
