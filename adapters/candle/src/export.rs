//! A model with its gates as a folder of Hugging Face's: for other programs, and to publish.

mod extract;
mod merge;

pub use extract::extract_gates;
pub use merge::Merged;

use crate::{
    config::Arch,
    error::{Error, Result},
    folder::Folder,
    gates::{self, Description, Gates},
    loader::{Lm, Origin},
    retrofit::write_model,
    shipped,
    weights::GgufFile,
};
use candle_core::{DType, Device, quantized::gguf_file};
use kvpolicy::retrofit::Named;
use serde_json::{Map, Value, json};
use std::{
    borrow::Cow,
    collections::HashMap,
    fmt, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

/// Who can read the gates of a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateLayout {
    /// `dms_*` fields in `config.json`; an adapter's tensors beside the model's, or a borrowed neuron. A decision judges the
    /// token before its own.
    Nvidia,
    /// `dms_metadata.json`, and a borrowed neuron whose decision judges its own token.
    Shisa,
}

impl fmt::Display for GateLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", if *self == Self::Nvidia { "nvidia" } else { "shisa" })
    }
}

/// What is to be exported, and where to.
#[derive(Debug, Clone)]
pub struct Export {
    /// A folder of gates (as a training writes it, or of a model), a safetensors file with its `config.json` beside it, or
    /// the name of gates that the program brings. `None`: the checkpoint's own, or the first that the program brings for the
    /// model.
    ///
    /// Where a training wrote weights of the model as well, they are taken: `weights.safetensors` (whole tensors by their
    /// Hugging Face names) or a LoRA adapter in PEFT's layout (`adapter_model.safetensors`, `adapter_config.json`). Both have
    /// their rows in the order of Hugging Face.
    pub gates: Option<PathBuf>,
    /// Who must be able to read the gates. `None`: those they were trained for, since a decision cannot be carried from one
    /// layout to the other.
    pub layout: Option<GateLayout>,
    /// The folder. It must be empty, or not be there yet.
    pub out: PathBuf,
}

/// What was written.
#[derive(Debug, Clone, Copy)]
pub struct Exported {
    /// Who can read the gates.
    pub layout: GateLayout,
    /// Tensors of the file, those of gates included.
    pub tensors: usize,
    /// Tensors of gates.
    pub gate_tensors: usize,
    /// What was taken of a training beside gates.
    pub merged: Merged,
}

/// Files of a model folder that go along unchanged, where there are any. The last two are those of NVIDIA's checkpoints.
const KEPT: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "configuration_qwen3_dms.py",
    "modeling_qwen3_dms.py",
];

/// Largest pages that NVIDIA's cache is told to take: its own default.
const LARGEST_PAGE: u64 = 256;

/// Small files by their names.
type Files = Vec<(&'static str, Cow<'static, [u8]>)>;

/// Gates that were chosen.
struct Chosen {
    description: Description,
    tensors: Named,
    /// Where weights may be beside them.
    dir: Option<PathBuf>,
}

impl Export {
    /// Refuses a folder that has files: nothing is overwritten, and no file of another model gets among these. Ask before the
    /// model is loaded.
    ///
    /// # Errors
    /// [`Error::File`] naming the folder.
    pub fn check(&self) -> Result<()> {
        check_empty(&self.out)
    }

    /// Writes `config.json`, `model.safetensors` (bf16), the tokenizer and the chat template. The model must be loaded with
    /// dense weights ([`crate::LoadOptions::dequantize`]), best in f32: what is bf16 in its files stays what it is.
    ///
    /// NVIDIA's loader of Qwen3 takes two Python files from the folder, `configuration_qwen3_dms.py` and
    /// `modeling_qwen3_dms.py` of its repository, which `config.json` names; they are not written. Its loader knows no other
    /// family.
    ///
    /// # Errors
    /// As [`Export::check`]; [`Error::Model`] if there are no gates, they are of another shape or layout, weights are
    /// quantized, or `config.json` has no words for the model; [`Error::File`] for weights or adapters that do not fit, and
    /// for what cannot be written: then what was written of the folder is taken back.
    pub fn run(&self, lm: &Lm) -> Result<Exported> {
        self.check()?;
        let chosen = self.chosen(lm)?;
        let layout = chosen.description.layout();
        if self.layout.is_some_and(|wanted| wanted != layout) {
            return Err(chosen.description.refused());
        }
        let mut tensors = lm.model().hf_tensors()?;
        let merged = chosen.dir.map_or(Ok(Merged::Nothing), |dir| merge::merge(&mut tensors, &dir))?;
        let gate_tensors = chosen.tensors.len();
        tensors.extend(chosen.tensors);
        let files = files(lm, &chosen.description)?;
        write_model(&self.out, &tensors, &files).inspect_err(|_| self.clear(&files))?;
        Ok(Exported { layout, tensors: tensors.len(), gate_tensors, merged })
    }

    fn chosen(&self, lm: &Lm) -> Result<Chosen> {
        let config = lm.model().config();
        if let Some(path) = &self.gates {
            if let Some(shipped) = lm.named_gates(path)? {
                return brought(lm, shipped);
            }
            let gates = Gates::find(path, config, DType::F32, &Device::Cpu)?;
            let gates = gates.ok_or_else(|| gates::not_described(path))?;
            let dir = Gates::folder(path);
            return Chosen::new(Folder::Disk(dir), &gates, Some(dir.to_path_buf()));
        }
        if let (Some(gates), Some(folder)) = (lm.gates(), lm.origin().folder()) {
            return Chosen::new(folder, gates, None);
        }
        match shipped::find(&lm.sha256()?, None) {
            Some(shipped) => brought(lm, shipped),
            None => Err(Error::Model(format!(
                "{} has no gates, and the program brings none for it: name some, or train them with `kvpolicy retrofit`",
                lm.name()
            ))),
        }
    }

    /// Takes back what was written of a folder that was empty.
    fn clear(&self, files: &Files) {
        let names = files.iter().map(|(name, _)| *name).chain(["model.safetensors"]);
        names.for_each(|name| _ = fs::remove_file(self.out.join(name)));
        _ = fs::remove_dir(&self.out);
    }
}

fn check_empty(out: &Path) -> Result<()> {
    match fs::read_dir(out).map(|mut inside| inside.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::file(out, "is not empty: an export goes to a folder of its own")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::file(out, error)),
    }
}

fn brought(lm: &Lm, shipped: &shipped::Shipped) -> Result<Chosen> {
    let gates = Gates::of_folder(shipped.folder, lm.model().config(), DType::F32, &Device::Cpu)?;
    Chosen::new(shipped.folder, &gates, None)
}

impl Chosen {
    fn new(folder: Folder, gates: &Gates, dir: Option<PathBuf>) -> Result<Self> {
        let description = Description::of(folder)?.ok_or_else(|| gates::not_described(&folder.path("")))?;
        Ok(Self { description, tensors: gates.tensors(), dir })
    }
}

impl Description {
    fn layout(&self) -> GateLayout {
        match self {
            Self::Nvidia(_) => GateLayout::Nvidia,
            Self::Shisa(_) => GateLayout::Shisa,
        }
    }

    /// Why these gates cannot be written in the other layout.
    fn refused(&self) -> Error {
        let what = match self {
            Self::Nvidia(fields) if fields.get("dms_separate_alpha") == Some(&Value::Bool(true)) => {
                "the gates are an adapter, tensors of their own; in Shisa's layout the decision is a neuron of the query, and \
                 no neuron can say what an adapter does: take hf-nvidia"
            }
            Self::Nvidia(_) => {
                "the gates were trained to judge the token before their own; in Shisa's layout a decision judges its own \
                 token: take hf-nvidia"
            }
            Self::Shisa(_) => {
                "the gates were trained to judge their own token; in NVIDIA's layout a decision judges the token before its \
                 own: take hf-shisa"
            }
        };
        Error::Model(what.into())
    }

    /// What of it belongs into `config.json`. How gates were evaluated, and by which command they were made, does not.
    fn fields(&self) -> Map<String, Value> {
        let Self::Nvidia(fields) = self else { return Map::new() };
        let scalar =
            |(name, value): &(&String, &Value)| name.starts_with("dms_") || !(value.is_array() || value.is_object());
        fields.iter().filter(scalar).map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// [`Description::fields`] as NVIDIA's loader takes them.
    fn fields_of_model(&self) -> Map<String, Value> {
        let mut fields = self.fields();
        // NVIDIA's cache refuses windows that are no longer than a page.
        let window = fields.get("dms_window_size").and_then(Value::as_u64).unwrap_or(0);
        let page = fields.get("dms_paged_attention_block_size").and_then(Value::as_u64).unwrap_or(LARGEST_PAGE);
        if window > 1 && page >= window {
            let largest = (window.next_power_of_two() / 2).min(LARGEST_PAGE);
            fields.insert("dms_paged_attention_block_size".into(), json!(largest));
        }
        fields
    }
}

/// All but the tensors.
fn files(lm: &Lm, gates: &Description) -> Result<Files> {
    let (mut config, mut files) = match lm.origin() {
        Origin::Gguf(path) => {
            let file = GgufFile::open(path, &Device::Cpu, None)?;
            (lm.model().config().to_json(file.metadata(), &ends(lm))?, tokenizer(lm, file.metadata())?)
        }
        Origin::Folder(dir) => kept(Folder::Disk(dir))?,
        Origin::Embedded(folder) => kept(*folder)?,
    };
    let arch = lm.model().config().arch;
    config.extend(gates.fields_of_model());
    config.entry("architectures").or_insert_with(|| json!([arch.class()]));
    if arch == Arch::Qwen3 && gates.layout() == GateLayout::Nvidia {
        config.entry("auto_map").or_insert_with(|| {
            json!({
                "AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS",
                "AutoModel": "modeling_qwen3_dms.Qwen3ModelDMS",
                "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS",
            })
        });
    }
    if let Description::Shisa(metadata) = gates {
        files.push((gates::SHISA_FILE, pretty(metadata)?));
    }
    files.push(("config.json", pretty(&config)?));
    Ok(files)
}

/// The configuration of a folder without its gates, and its other files.
fn kept(folder: Folder) -> Result<(Map<String, Value>, Files)> {
    let name = "config.json";
    let parsed = serde_json::from_slice(&folder.required(name)?).map_err(|e| Error::file(folder.path(name), e))?;
    let mut config: Map<String, Value> = parsed;
    config.retain(|name, _| !gates::is_field(name));
    // The newer name, where it is in use.
    let dtype = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    config.insert(dtype.into(), json!("bfloat16"));
    let files = KEPT.iter().map(|name| Ok(folder.read(name)?.map(|bytes| (*name, bytes))));
    Ok((config, files.filter_map(Result::transpose).collect::<Result<_>>()?))
}

/// The tokens that end a text, the configuration's own first.
fn ends(lm: &Lm) -> Vec<u32> {
    let own = &lm.model().config().eos;
    let others = lm.tokenizer().eos().iter().filter(|id| !own.contains(id));
    own.iter().chain(others).copied().collect()
}

/// `tokenizer.json` and `tokenizer_config.json` of a GGUF file.
fn tokenizer(lm: &Lm, metadata: &HashMap<String, gguf_file::Value>) -> Result<Files> {
    let token = |name: &str| {
        let id = metadata.get(&format!("tokenizer.ggml.{name}_token_id"))?.to_u32().ok()?;
        lm.tokenizer().token_text(id).map(|text| (format!("{name}_token"), json!(text)))
    };
    let mut config: Map<String, Value> = ["bos", "eos"].into_iter().filter_map(token).collect();
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    config.insert("model_max_length".into(), json!(lm.model().config().max_context));
    // transformers would take spaces away before punctuation.
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    let template = metadata.get("tokenizer.chat_template").and_then(|template| template.to_string().ok());
    config.extend(template.map(|template| ("chat_template".into(), json!(template))));
    Ok(vec![
        ("tokenizer.json", lm.tokenizer().to_json()?.into_bytes().into()),
        ("tokenizer_config.json", pretty(&config)?),
    ])
}

fn pretty(fields: &Map<String, Value>) -> Result<Cow<'static, [u8]>> {
    let text = serde_json::to_string_pretty(fields).map_err(|e| Error::Model(e.to_string()))?;
    Ok((text + "\n").into_bytes().into())
}
