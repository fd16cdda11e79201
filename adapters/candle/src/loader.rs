//! From a path or a hub id to a model with its tokenizer and chat template.

use crate::{
    chat::{ChatTemplate, Message},
    config::Config,
    demo,
    error::{Error, Result},
    folder::{Blob, Folder},
    gate_choice::GateChoice,
    gates::Gates,
    model::Model,
    session::{Session, SessionOptions},
    shipped::Shipped,
    tokenizer::Tokenizer,
    weights::{GgufFile, Weights},
};
use candle_core::{DType, Device};
use kvpolicy::Policy;
use sha2::{Digest, Sha256};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

/// How a model is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Type of weights and activations. GGUF weights stay quantized, with f32 activations, unless `dequantize` is set.
    pub dtype: DType,
    /// Where it runs.
    pub device: Device,
    /// Makes the weights of a GGUF file dense: more memory, no rounding of activations, and faster where many tokens go
    /// through at a time.
    pub dequantize: bool,
}

impl LoadOptions {
    /// On a device, in the type it is good at: f32 on a CPU, bf16 on a GPU.
    pub fn on(device: Device) -> Self {
        Self { dtype: if device.is_cpu() { DType::F32 } else { DType::BF16 }, device, dequantize: false }
    }

    /// The type of a GGUF file's dense weights, if they are to be dense.
    fn dense(&self) -> Result<Option<DType>> {
        self.check()?;
        Ok(self.dequantize.then_some(self.dtype))
    }

    fn check(&self) -> Result<()> {
        if self.dtype == DType::BF16 && self.device.is_cpu() {
            return Err(Error::Model("candle has no bf16 products on CPU: take f32 or f16".into()));
        }
        Ok(())
    }
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self::on(Device::Cpu)
    }
}

/// Where a model came from.
#[derive(Debug)]
pub(crate) enum Origin {
    Folder(PathBuf),
    Embedded(Folder<'static>),
    Gguf(PathBuf),
}

impl Origin {
    /// Its folder, unless it is a single file.
    pub(crate) fn folder(&self) -> Option<Folder<'_>> {
        match self {
            Self::Folder(dir) => Some(Folder::Disk(dir)),
            Self::Embedded(folder) => Some(*folder),
            Self::Gguf(_) => None,
        }
    }

    fn weights(&self) -> Result<Vec<Blob>> {
        match self {
            Self::Folder(dir) => Folder::Disk(dir).weights(),
            Self::Embedded(folder) => folder.weights(),
            Self::Gguf(path) => Ok(vec![Blob::Disk(path.clone())]),
        }
    }

    fn sha256(&self) -> Result<String> {
        let mut hash = Sha256::new();
        self.weights()?.iter().try_for_each(|file| file.digest(&mut hash))?;
        Ok(hexadecimal(hash))
    }
}

/// SHA-256 of the weights of a model that is not loaded, a folder or a GGUF file: what [`Lm::sha256`] says of it.
///
/// # Errors
/// [`Error::File`] if a file cannot be read.
pub fn weights_sha256(model: &Path) -> Result<String> {
    let path = model.to_path_buf();
    if model.is_dir() { Origin::Folder(path).sha256() } else { Origin::Gguf(path).sha256() }
}

impl From<Folder<'_>> for Origin {
    fn from(folder: Folder) -> Self {
        match folder {
            Folder::Disk(dir) => Self::Folder(dir.to_path_buf()),
            Folder::Embedded(files) => Self::Embedded(Folder::Embedded(files)),
        }
    }
}

/// A language model: weights, tokenizer, chat template, and the gates it was trained with.
#[derive(Debug)]
pub struct Lm {
    name: String,
    model: Model,
    gates: Option<Arc<Gates>>,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    origin: Origin,
    dtype: DType,
    device: Device,
    sha256: OnceLock<String>,
}

impl Lm {
    /// Loads a folder of Hugging Face safetensors, a GGUF file, or (with the feature `hub`) a model of the hub: `org/name`,
    /// `org/name@revision`, `org/name/file.gguf`.
    ///
    /// # Errors
    /// Whatever keeps the model from being used, naming the file, the field or the tensor.
    pub fn load(source: &str, options: &LoadOptions) -> Result<Self> {
        let path = locate(source)?;
        let name = path.file_name().map_or(source.to_string(), |name| name.to_string_lossy().into_owned());
        let name = if Path::new(source).exists() { name } else { source.to_string() };
        if path.is_dir() {
            Self::from_folder(name, Folder::Disk(&path), options)
        } else {
            Self::from_gguf(name, &path, options)
        }
    }

    /// The small model inside the program, with gates: made for [`kvpolicy::compare::problems`] and nothing else, its tokens
    /// are bytes. Its name is `demo`.
    ///
    /// # Errors
    /// [`Error::Model`] for a type that the device does not take.
    pub fn embedded(options: &LoadOptions) -> Result<Self> {
        Self::from_folder(demo::NAME.to_string(), demo::FOLDER, options)
    }

    fn from_folder(name: String, folder: Folder, options: &LoadOptions) -> Result<Self> {
        let (model, gates) = Model::from_folder(folder, options)?;
        let file = "tokenizer.json";
        let tokenizer = Tokenizer::from_json(&folder.required(file)?, &folder.path(file))?;
        let tokenizer = tokenizer.with_eos(model.config().eos.clone());
        let template = ChatTemplate::of(folder)?;
        Ok(Self::new(name, model, gates, tokenizer, template, folder.into(), options))
    }

    fn from_gguf(name: String, path: &Path, options: &LoadOptions) -> Result<Self> {
        let dense = options.dense()?;
        let mut weights = GgufFile::open(path, &options.device, dense)?;
        let tokenizer = Tokenizer::from_gguf(weights.metadata())?;
        let template = ChatTemplate::from_gguf(weights.metadata())?;
        let config = gguf_config(&mut weights)?;
        let model = Model::load(config, &mut Weights::Gguf(weights), &options.device)?;
        // Whatever was asked for: quantized weights come with f32 activations.
        let options = &LoadOptions { dtype: dense.unwrap_or(DType::F32), ..options.clone() };
        Ok(Self::new(name, model, None, tokenizer, template, Origin::Gguf(path.to_path_buf()), options))
    }

    fn new(
        name: String,
        model: Model,
        gates: Option<Gates>,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        origin: Origin,
        options: &LoadOptions,
    ) -> Self {
        let (gates, sha256) = (gates.map(Arc::new), OnceLock::new());
        let device = options.device.clone();
        Self { name, model, gates, tokenizer, template, origin, dtype: options.dtype, device, sha256 }
    }

    /// Its folder or file name, or the hub id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its other files are.
    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The definition and its weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The gates the checkpoint was trained with.
    pub fn gates(&self) -> Option<&Arc<Gates>> {
        self.gates.as_ref()
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The chat template, if there is one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Type of activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A user's message as the model's chat template has it, the answer about to begin. A model without a template gets
    /// the text as it is.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses.
    pub fn chat(&self, user: &str) -> Result<String> {
        match &self.template {
            Some(template) => template.render(&[Message { role: "user".into(), content: user.into() }], true),
            None => Ok(user.to_string()),
        }
    }

    /// SHA-256 of the weight files, in order of their names; hexadecimal. Read once.
    ///
    /// # Errors
    /// [`Error::File`] if one cannot be read.
    pub fn sha256(&self) -> Result<String> {
        if let Some(known) = self.sha256.get() {
            return Ok(known.clone());
        }
        let text = self.origin.sha256()?;
        Ok(self.sha256.get_or_init(|| text).clone())
    }

    /// SHA-256 of what makes tokens of text: the tokenizer, its ends of a text and the chat template; hexadecimal.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for one that cannot be written down.
    pub fn tokenizer_sha256(&self) -> Result<String> {
        self.tokenizer.sha256(self.template.as_ref())
    }

    /// The gates a policy asks for: see [`GateChoice::gates_for`].
    ///
    /// # Errors
    /// As there.
    pub fn gates_for(&self, policy: &dyn Policy) -> Result<Option<Arc<Gates>>> {
        self.gate_choice(&|| self.sha256()).gates_for(policy)
    }

    /// As [`GateChoice::named`].
    pub(crate) fn named_gates(&self, path: &Path) -> Result<Option<&'static Shipped>> {
        self.gate_choice(&|| self.sha256()).named(path)
    }

    fn gate_choice<'a>(&'a self, weights_sha256: &'a dyn Fn() -> Result<String>) -> GateChoice<'a> {
        let (config, own) = (self.model.config(), self.gates.as_ref());
        GateChoice { config, own, weights_sha256, dtype: self.dtype, device: &self.device }
    }

    /// One sequence under a policy; its entries are where the model is. A GPU is best taken from
    /// `kvpolicy::cuda_device`.
    ///
    /// # Errors
    /// Every reason why the policy cannot run on this model.
    pub fn session(&self, policy: Arc<dyn Policy>, options: &SessionOptions) -> Result<Session<'_>> {
        Session::new(&self.model, self.gates_for(&*policy)?, policy, options)
    }
}

impl Model {
    /// A model folder of Hugging Face safetensors, and the gates it was trained with.
    ///
    /// # Errors
    /// Whatever keeps the model from being used, naming the file, the field or the tensor.
    pub fn from_dir(dir: &Path, options: &LoadOptions) -> Result<(Self, Option<Gates>)> {
        Self::from_folder(Folder::Disk(dir), options)
    }

    fn from_folder(folder: Folder, options: &LoadOptions) -> Result<(Self, Option<Gates>)> {
        options.check()?;
        let config = Config::of_folder(folder)?;
        let mut weights = Weights::from_files(&folder.weights()?, options.dtype, &options.device)?;
        let gates = Gates::of_checkpoint(folder, &mut weights, &config)?;
        Ok((Self::load(config, &mut weights, &options.device)?, gates))
    }

    /// A GGUF file; its weights stay quantized, unless [`LoadOptions::dequantize`] is set.
    ///
    /// # Errors
    /// As [`Model::from_dir`].
    pub fn from_gguf(path: &Path, options: &LoadOptions) -> Result<Self> {
        let mut weights = GgufFile::open(path, &options.device, options.dense()?)?;
        let config = gguf_config(&mut weights)?;
        Self::load(config, &mut Weights::Gguf(weights), &options.device)
    }
}

impl Config {
    /// That of a model which is not loaded: a folder of Hugging Face safetensors or a GGUF file.
    ///
    /// # Errors
    /// [`Error::File`] if there is none, [`Error::Model`] for one that this crate has no definition of.
    pub fn read(model: &Path) -> Result<Self> {
        if model.is_dir() {
            return Self::of_folder(Folder::Disk(model));
        }
        gguf_config(&mut GgufFile::open(model, &Device::Cpu, None)?)
    }

    fn of_folder(folder: Folder) -> Result<Self> {
        let missing = || Error::file(folder.path("config.json"), "no such file");
        Self::from_json(&folder.text("config.json")?.ok_or_else(missing)?)
    }
}

pub(crate) fn gguf_config(weights: &mut GgufFile) -> Result<Config> {
    // Llama 3 files carry the divisors of their RoPE frequencies as a tensor.
    let factors = if weights.has("rope_freqs.weight") { Some(weights.tensor("rope_freqs.weight")?) } else { None };
    let factors = factors.map(|factors| factors.flatten_all()?.to_vec1()).transpose()?;
    Config::from_gguf(weights.metadata(), |name| weights.has(name), factors)
}

pub(crate) fn hexadecimal(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn locate(source: &str) -> Result<PathBuf> {
    let path = Path::new(source);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if source.trim().is_empty() {
        return Err(Error::Model("no model named: give a folder, a GGUF file or a hub id".into()));
    }
    #[cfg(feature = "hub")]
    if !source.starts_with(['.', '/', '~']) && crate::hub::is_id(source) {
        return crate::hub::fetch(source);
    }
    Err(Error::file(path, "no such file or folder"))
}
