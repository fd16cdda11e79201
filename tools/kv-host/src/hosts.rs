//! The runtimes there is a patch for.

use crate::{
    edits::{self, FileEdits},
    error::Result,
    tree,
};
use sha2::{Digest, Sha256};

/// A published package and what is to be changed in it.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// The package that is patched.
    pub package: &'static str,
    /// Its only version that can be.
    pub version: &'static str,
    /// Packages of the same release that depend on it: a project that asks for another of their versions is refused.
    pub siblings: &'static [&'static str],
    /// SHA-256 of the published `.crate`.
    pub crate_sha256: &'static str,
    /// [`digest`](crate::digest) of its unpacked files.
    pub tree_sha256: &'static str,
    /// The script of [`edits`].
    pub script: &'static str,
    /// Files that are added: path in the package, content.
    pub added: &'static [(&'static str, &'static str)],
}

/// mistral.rs.
pub const MISTRALRS: Host = Host {
    package: "mistralrs-core",
    version: "0.8.1",
    siblings: &["mistralrs", "mistralrs-server-core"],
    crate_sha256: "a2b8b9e5c94491d9ceeded3a30291cb6af6ae74810a5776dd55e3bbb8b3429d4",
    tree_sha256: "5ba3f1e8d580942e4bdce03a5a9dfa190edc6be6c8c530c51c6073038b55cd52",
    script: include_str!("../hosts/mistralrs/core-0.8.1.edits"),
    added: &[
        ("src/kv_policy.rs", include_str!("../hosts/mistralrs/kv_policy.rs")),
        ("src/kv_policy/scheduler.rs", include_str!("../hosts/mistralrs/scheduler.rs")),
        ("src/kv_cache/attend.rs", include_str!("../hosts/mistralrs/attend.rs")),
        ("NOTICE-KV-POLICY", include_str!("../hosts/mistralrs/NOTICE")),
    ],
};

impl Host {
    /// Name and version.
    pub fn id(&self) -> String {
        format!("{} {}", self.package, self.version)
    }

    /// The edits of its files.
    ///
    /// # Errors
    /// [`Error::Script`](crate::Error::Script) for a script that cannot be read.
    pub fn edits(&self) -> Result<Vec<FileEdits>> {
        edits::parse(self.script)
    }

    /// Name of the folder of the patched copy. It changes with the patch, so that a newer one takes the place of an older
    /// one by the project's single line that names it.
    pub(crate) fn folder(&self) -> String {
        let mut all = Sha256::new();
        all.update(self.script);
        for (path, text) in self.added {
            all.update(format!("{path} {}\n{text}", text.len()));
        }
        format!("{}{}", self.prefix(), &tree::hex(&all.finalize())[..12])
    }

    /// What the folders of all its patched copies begin with.
    pub(crate) fn prefix(&self) -> String {
        format!("{}-{}-", self.package, self.version)
    }
}
