//! The files of the model inside the program: see its `README.md`.

use crate::folder::Folder;

/// The tokenizer of the embedded model, a Hugging Face `tokenizer.json`: ids 0 to 255 are bytes, 256 is `<|end|>`, which ends
/// a text. There are no merges and nothing is put in front.
pub const TOKENIZER: &str = include_str!("../demo/tokenizer.json");

/// The name of the embedded model.
pub(crate) const NAME: &str = "demo";

pub(crate) const FOLDER: Folder = Folder::Embedded(&[
    ("config.json", include_bytes!("../demo/config.json")),
    ("tokenizer.json", TOKENIZER.as_bytes()),
    ("model.safetensors", include_bytes!("../demo/model.safetensors")),
]);
