//! What the router counts, in Prometheus's text format.

use crate::results::replace;
use anyhow::{Context, Result};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// A file with the metrics of this process.
#[derive(Debug)]
pub(super) struct MetricsFile {
    handle: PrometheusHandle,
    path: Mutex<PathBuf>, // one writes at a time
}

impl MetricsFile {
    /// Takes all metrics from here on. A process has one such file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn new(path: &Path) -> Result<Self> {
        let handle = PrometheusBuilder::new().install_recorder().context("metrics")?;
        let file = Self { handle, path: Mutex::new(path.to_path_buf()) };
        file.write()?;
        Ok(file)
    }

    /// Whoever reads finds what was there before, or all of what is there now.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn write(&self) -> Result<()> {
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        self.handle.run_upkeep();
        replace(&path, self.handle.render())
    }
}
