//! The gates of a model folder as files of their own.

use super::check_empty;
use crate::{
    error::{Error, Result},
    folder::Folder,
    gates::{self, Description, Layout},
    loader::locate,
    tensor_file::{Raw, TensorFile},
};
use std::{fs, path::Path};

/// Takes the adapter out of a model folder (or a model of the hub): `gates.safetensors`, its tensors to the bit, and a
/// `config.json` with what else there is to know, as a training writes both. `dms:weights=OUT` puts it on the model that it
/// was trained for. Returns the number of tensors.
///
/// # Errors
/// [`Error::File`] if the folder describes no gates, or `out` has files; [`Error::Model`] for borrowed neurons, which are
/// part of the model.
pub fn extract_gates(source: &str, out: &Path) -> Result<usize> {
    check_empty(out)?;
    let path = locate(source)?;
    let folder = Folder::Disk(&path);
    let description = Description::of(folder)?.ok_or_else(|| gates::not_described(&path))?;
    if !Layout::of(folder)?.is_some_and(|layout| layout.adapter) {
        let what =
            "the gates are neurons of the model's queries: they cannot be taken out of it, export the whole model";
        return Err(Error::file(&path, what));
    }
    let mut tensors: Vec<(String, Raw)> = vec![];
    for blob in folder.weights()? {
        let mut file = TensorFile::open(&blob.path())?;
        let is_gate = |name: &String| name.contains(gates::ADAPTER);
        let names: Vec<String> = file.tensors().into_iter().map(|(name, _)| name).filter(is_gate).collect();
        for name in names {
            let raw = file.raw(&name)?;
            tensors.push((name, raw));
        }
    }
    if tensors.is_empty() {
        return Err(Error::file(&path, format!("has no tensor `{}.weight`", gates::adapter_name(0))));
    }
    write(out, &tensors, &description).inspect_err(|_| {
        [gates::FILE, "config.json"].iter().for_each(|name| _ = fs::remove_file(out.join(name)));
        _ = fs::remove_dir(out);
    })?;
    Ok(tensors.len())
}

fn write(out: &Path, tensors: &[(String, Raw)], description: &Description) -> Result<()> {
    fs::create_dir_all(out).map_err(|e| Error::file(out, e))?;
    let path = out.join(gates::FILE);
    let views = tensors.iter().map(|(name, raw)| raw.view().map(|view| (name, view)));
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(|e| Error::file(&path, e))?;
    safetensors::serialize_to_file(views, None, &path).map_err(|e| Error::file(&path, e))?;
    let config = out.join("config.json");
    fs::write(&config, super::pretty(&description.fields())?).map_err(|e| Error::file(&config, e))
}
