use std::path::{Path, PathBuf};

/// Everything that can go wrong while a project is prepared; the project is as it was before, or wholly prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An edit script that cannot be read: a fault of this program, not of the project.
    #[error("edit script, line {line}: {what}")]
    Script {
        /// Line of the script, from 1.
        line: usize,
        /// What is wrong there.
        what: String,
    },
    /// An edit of lines that the file does not have.
    #[error("{file} has {has} lines, an edit is at line {line}")]
    OutOfFile {
        /// Which file, relative to the package.
        file: String,
        /// Where the edit is, from 1.
        line: usize,
        /// How many lines there are.
        has: usize,
    },
    /// The host's source is not what was published.
    #[error("{path} is not the published {package}: {what}")]
    Source {
        /// Where cargo keeps it.
        path: PathBuf,
        /// Name and version.
        package: String,
        /// What differs.
        what: String,
    },
    /// The project wants a version of the host for which there is no patch.
    #[error("{path} asks for {package} {found}, the patch is for {wanted} only: ask for \"={wanted}\"")]
    Version {
        /// The manifest or lock file that says so.
        path: PathBuf,
        /// Which package.
        package: String,
        /// The version or requirement found.
        found: String,
        /// The only version that can be patched.
        wanted: String,
    },
    /// A file of the project that cannot be used: which and why.
    #[error("{path}: {what}")]
    Project {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        what: String,
    },
    /// cargo could not be run, or could not fetch the source.
    #[error("cargo could not fetch {package}: {what}")]
    Cargo {
        /// Name and version.
        package: String,
        /// What cargo says.
        what: String,
    },
    /// A file or folder that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn project(path: &Path, what: impl ToString) -> Self {
        Self::Project { path: path.into(), what: what.to_string() }
    }
}

/// Names the path in an error of the file system.
pub(crate) trait At<T> {
    fn at(self, path: &Path) -> Result<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io { path: path.into(), source })
    }
}
