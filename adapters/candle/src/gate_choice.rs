//! Which gates a model runs with under a policy.

use crate::{
    config::Config,
    error::{Error, Result},
    gates::Gates,
    shipped::{self, Shipped},
};
use candle_core::{DType, Device};
use kvpolicy::{GateSource, KvCache, Policy};
use std::{fmt, path::Path, sync::Arc};

/// What the gates of a model are chosen by.
#[derive(Clone, Copy)]
pub struct GateChoice<'a> {
    /// The model's shape.
    pub config: &'a Config,
    /// The gates that its checkpoint was trained with.
    pub own: Option<&'a Arc<Gates>>,
    /// SHA-256 of its weights, hexadecimal: the gates inside this crate are known by it. Asked only for these.
    pub weights_sha256: &'a dyn Fn() -> Result<String>,
    /// Type of its activations.
    pub dtype: DType,
    /// Where it runs.
    pub device: &'a Device,
}

impl fmt::Debug for GateChoice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GateChoice({:?} on {:?})", self.dtype, self.device.location())
    }
}

impl GateChoice<'_> {
    /// The gates a policy asks for: a file's or those of a name inside this crate; else the checkpoint's own, or the first
    /// inside this crate that are of the model. For a policy that asks for none those that borrow neurons, which attention
    /// must not read.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be used with this model, [`Error::Model`] if the model takes no others.
    pub fn gates_for(&self, policy: &dyn Policy) -> Result<Option<Arc<Gates>>> {
        let own = self.own.cloned();
        match KvCache::gate_source(policy, &self.config.spec())? {
            None => Ok(own.filter(|gates| gates.borrows_neurons())),
            Some(GateSource::Checkpoint) if own.is_none() => {
                let found = shipped::find(&(self.weights_sha256)()?, None);
                found.map(|shipped| self.brought(shipped)).transpose()
            }
            Some(GateSource::Checkpoint) => Ok(own),
            Some(GateSource::File(path)) => match self.named(&path)? {
                Some(shipped) => self.brought(shipped).map(Some),
                None => Ok(Some(Arc::new(Gates::load(&path, self.config, self.dtype, self.device)?))),
            },
        }
    }

    /// Those inside this crate, where a path is their name; `None` for one to read.
    ///
    /// # Errors
    /// [`Error::Model`] if they are of another model, or this one takes none but its own.
    pub(crate) fn named(&self, path: &Path) -> Result<Option<&'static Shipped>> {
        if self.own.is_some_and(|gates| gates.borrows_neurons()) {
            let what = "the checkpoint was trained with borrowed neurons: it takes no other gates";
            return Err(Error::Model(what.into()));
        }
        let Some(name) = path.to_str().filter(|name| shipped::is_known(name) && !path.exists()) else {
            return Ok(None);
        };
        let another = || format!("the gates `{name}` are of another model: this one's weights have another hash");
        shipped::find(&(self.weights_sha256)()?, Some(name)).map(Some).ok_or_else(|| Error::Model(another()))
    }

    fn brought(&self, gates: &Shipped) -> Result<Arc<Gates>> {
        Gates::of_folder(gates.folder, self.config, self.dtype, self.device).map(Arc::new)
    }
}
