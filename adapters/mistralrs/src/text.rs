//! What is known of a model beside its weights: the candle adapter reads it, so that both write the same prompts.

use crate::error::{Error, Result};
use candle_core::{DType, Device, quantized::gguf_file};
use kvpolicy::{
    ModelSpec,
    runtime::{HostError, TextModel},
};
use kvpolicy_candle::{ChatTemplate, Config, Gates, Message, Tokenizer};
use std::{fs::File, io::BufReader, path::Path};

/// Tokenizer, chat template and shape of a model.
pub(crate) struct Text {
    spec: ModelSpec,
    max_context: usize,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

impl Text {
    /// Of a folder or a GGUF file.
    pub(crate) fn of(model: &Path) -> Result<Self> {
        if model.is_dir() { Self::of_folder(model) } else { Self::of_file(model) }
    }

    fn of_folder(dir: &Path) -> Result<Self> {
        let config = Config::read(dir)?;
        let gates = Gates::find(dir, &config, DType::F32, &Device::Cpu)?;
        let spec = ModelSpec { gates: gates.map(|gates| gates.spec()), ..config.spec() };
        let tokenizer = Tokenizer::from_file(&dir.join("tokenizer.json"))?.with_eos(config.eos.clone());
        Ok(Self { spec, max_context: config.max_context, tokenizer, template: ChatTemplate::from_hf_dir(dir)? })
    }

    fn of_file(path: &Path) -> Result<Self> {
        let io = |error: std::io::Error| Error::Path { path: path.into(), what: error.to_string() };
        let content = gguf_file::Content::read(&mut BufReader::new(File::open(path).map_err(io)?))?;
        let (config, metadata) = (Config::read(path)?, &content.metadata);
        let (tokenizer, template) = (Tokenizer::from_gguf(metadata)?, ChatTemplate::from_gguf(metadata)?);
        Ok(Self { spec: config.spec(), max_context: config.max_context, tokenizer, template })
    }

    /// As [`Tokenizer::sha256`].
    pub(crate) fn sha256(&self) -> Result<String> {
        Ok(self.tokenizer.sha256(self.template.as_ref())?)
    }

    /// Tokens that end a text.
    pub(crate) fn ends(&self) -> &[u32] {
        self.tokenizer.eos()
    }
}

impl TextModel for Text {
    fn spec(&self) -> ModelSpec {
        self.spec.clone()
    }

    fn max_context(&self) -> usize {
        self.max_context
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, HostError> {
        Ok(self.tokenizer.encode(text)?)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, HostError> {
        Ok(self.tokenizer.decode(tokens)?)
    }

    fn is_end(&self, token: u32) -> bool {
        self.tokenizer.is_eos(token)
    }

    fn chat(&self, user: &str) -> Result<String, HostError> {
        Ok(match &self.template {
            Some(template) => template.render(&[Message::new("user", user)], true)?,
            None => user.to_string(),
        })
    }
}
