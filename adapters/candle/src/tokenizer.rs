//! Text to token ids and back, from a `tokenizer.json` or from the vocabulary that a GGUF file carries.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use sha2::{Digest, Sha256};
use tokenizers::decoders::{self, byte_fallback::ByteFallback, fuse::Fuse, strip::Strip};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{self, NFC, Prepend, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::chat::ChatTemplate;
use crate::error::{Error, Result};
use crate::loader::hexadecimal;

/// SentencePiece's stand-in for a space.
const SPACE: &str = "▁";

/// Special tokens that end a turn or a text whatever the file names as its eos: chat models stop at either.
const END_TEXTS: [&str; 9] = [
    "<|end|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "</s>",
];

/// How qwen2 cuts a text into words; llama3 differs only in the digits of a run.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.ggml.token_type`.
mod token_type {
    pub(super) const NORMAL: i64 = 1;
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
    pub(super) const UNUSED: i64 = 5;
}

/// A model's tokenizer: text to ids, ids to text, and the ids that end a text.
///
/// ```no_run
/// # fn main() -> kvpolicy_candle::Result<()> {
/// use kvpolicy_candle::{TextStream, Tokenizer};
///
/// let tokenizer = Tokenizer::from_file("model/tokenizer.json".as_ref())?.with_eos(vec![2]);
/// let mut text = TextStream::new(&tokenizer);
/// for id in tokenizer.encode("<|im_start|>user\nHello<|im_end|>\n")? {
///     if let Some(piece) = text.push(id)? {
///         print!("{piece}");
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    spelling: Spelling,
    /// What each id adds to a text, by id.
    kinds: Vec<Kind>,
    /// Ids that `encode` puts first: the model's bos, if it wants one.
    prefix: Vec<u32>,
    eos: Vec<u32>,
}

/// How the vocabulary spells text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// A printable character per byte (GPT-2's table).
    Bytes,
    /// SentencePiece: `▁` for a space, `<0xAB>` for a byte; `strip` drops the space put before the text.
    Spaces { strip: bool },
    /// Whole words, a space between two.
    Words,
}

impl Spelling {
    /// What undoes it.
    fn decoder(self) -> tokenizers::Result<Option<DecoderWrapper>> {
        let Self::Spaces { strip } = self else {
            return Ok((self == Self::Bytes).then(|| ByteLevel::default().into()));
        };
        let mut steps: Vec<DecoderWrapper> =
            vec![Replace::new(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
        if strip {
            steps.push(Strip::new(' ', 1, 0).into());
        }
        Ok(Some(decoders::sequence::Sequence::new(steps).into()))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No text: a special token, or no token at all (models pad their vocabulary).
    Silent,
    /// The token as it is written.
    Literal,
    /// The token in the vocabulary's [`Spelling`].
    Piece,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// Its post-processor decides whether [`encode`](Self::encode) puts a bos first. Truncation and padding that
    /// the file asks for are switched off: a prompt keeps all its tokens. [`eos`](Self::eos) has the special tokens
    /// with a well-known name (`<|im_end|>`, `<|eot_id|>`, `</s>`, ...); [`with_eos`](Self::with_eos) adds the
    /// model's own.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when the file cannot be read, is no tokenizer, or has a decoder other than byte-level,
    /// SentencePiece-style or none.
    pub fn from_file(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
        Self::from_json(&bytes, path)
    }

    /// Reads the bytes of a `tokenizer.json`; messages name it by `path`.
    pub(crate) fn from_json(bytes: &[u8], path: &Path) -> Result<Self> {
        let file = |what: String| Error::File { path: path.to_path_buf(), what };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| file(format!("not a tokenizer: {e}")))?;
        inner.with_truncation(None).map_err(|e| file(e.to_string()))?;
        inner.with_padding(None);

        let decoder = serde_json::to_value(inner.get_decoder()).map_err(|e| file(e.to_string()))?;
        let spelling = spelling_of(&decoder)
            .ok_or_else(|| file(format!("its decoder is not supported: {decoder}; use a Llama or Qwen tokenizer")))?;

        // The post-processor marks what it added; only what stands first belongs to a prompt.
        let sample = inner.encode_fast("a", true).map_err(|e| file(e.to_string()))?;
        let added = sample.get_special_tokens_mask().iter().take_while(|&&m| m == 1).count();
        let prefix = sample.get_ids()[..added].to_vec();
        Ok(Self::new(inner, spelling, prefix, &[], &[]))
    }

    /// Builds the tokenizer that a GGUF file carries in its metadata (`tokenizer.ggml.*`).
    ///
    /// - `tokenizer.ggml.model` = `gpt2`: byte-level BPE. `tokenizer.ggml.pre` names how text is cut into words; a
    ///   name that is not known is refused, since other words give other ids; `default` is taken for GPT-2's. For
    ///   `qwen2` text is first brought to Unicode NFC, as Qwen's own tokenizer does.
    /// - `llama`: SentencePiece BPE with byte fallback. The pieces' scores are turned into merges; where two pieces
    ///   have the same score, the one with the lower id merges first and SentencePiece takes the leftmost.
    /// - Control tokens are recognised in text and silent in output; user-defined tokens are recognised and written.
    /// - A bos is put first when `tokenizer.ggml.add_bos_token` says so or, where the key is missing, when the
    ///   family does (llama3, tekken and SentencePiece). An eos is never appended, since a prompt goes on.
    /// - [`eos`](Self::eos) has the file's eos, eot and eom ids and control tokens with a well-known name.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] when a key is missing or malformed, or names a model or a `pre` that is not supported.
    pub fn from_gguf(metadata: &HashMap<String, Value>) -> Result<Self> {
        let gguf = Gguf(metadata);
        let tokens = gguf.strings("tokens")?;
        let types = gguf.types(tokens.len())?;
        match gguf.string("model")? {
            "gpt2" => gguf.byte_level(&tokens, &types),
            "llama" => gguf.sentencepiece(&tokens, &types),
            other => Err(Error::Tokenizer(format!(
                "tokenizer.ggml.model is \"{other}\"; gpt2 (byte-level BPE) and llama (SentencePiece) are supported; \
                 load the model from a folder with a tokenizer.json instead"
            ))),
        }
    }

    fn new(inner: tokenizers::Tokenizer, spelling: Spelling, prefix: Vec<u32>, eos: &[u32], unused: &[u32]) -> Self {
        let vocab = inner.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let mut kinds = vec![Kind::Silent; size];
        for &id in vocab.values() {
            kinds[id as usize] = Kind::Piece;
        }
        let mut end = eos.to_vec();
        for (id, token) in inner.get_added_tokens_decoder() {
            kinds[id as usize] = if token.special { Kind::Silent } else { Kind::Literal };
            if token.special && END_TEXTS.contains(&token.content.as_str()) {
                end.push(id);
            }
        }
        for &id in unused {
            // An empty token has no place in the vocabulary.
            if let Some(kind) = kinds.get_mut(id as usize) {
                *kind = Kind::Silent;
            }
        }
        Self { inner, spelling, kinds, prefix, eos: Vec::new() }.with_eos(end)
    }

    /// Adds ids that end a text: those of the model's config, which often names only one of several.
    #[must_use]
    pub fn with_eos(mut self, ids: Vec<u32>) -> Self {
        self.eos.extend(ids);
        self.eos.sort_unstable();
        self.eos.dedup();
        self
    }

    /// SHA-256 of what makes tokens of text: the tokenizer, its ends of a text and the chat template; hexadecimal.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] for a bos that cannot be written.
    pub fn sha256(&self, template: Option<&ChatTemplate>) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(self.to_json()?);
        hash.update(format!("{:?}{:?}", self.eos, template.map(ChatTemplate::text)));
        Ok(hexadecimal(hash))
    }

    /// It as a `tokenizer.json`, which [`Tokenizer::from_file`] reads to the same ids and texts.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] for a bos that cannot be written.
    pub(crate) fn to_json(&self) -> Result<String> {
        let broken = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
        let mut inner = self.inner.clone();
        if inner.get_decoder().is_none() {
            inner.with_decoder(self.spelling.decoder().map_err(broken)?);
        }
        if inner.get_post_processor().is_none() {
            inner.with_post_processor(self.prefixed().map_err(broken)?);
        }
        inner.to_string(true).map_err(broken)
    }

    /// What puts the prefix first.
    fn prefixed(&self) -> tokenizers::Result<Option<TemplateProcessing>> {
        let token = |&id: &u32| Some((self.inner.id_to_token(id)?, id));
        let prefix: Vec<(String, u32)> = self.prefix.iter().filter_map(token).collect();
        if prefix.is_empty() {
            return Ok(None);
        }
        let single: String = prefix.iter().map(|(text, _)| format!("{text} ")).collect();
        let template = TemplateProcessing::builder().try_single(single + "$A")?.special_tokens(prefix).build();
        Ok(Some(template?))
    }

    /// The ids of `text`. Special tokens written in it (`<|im_start|>`) become their one id.
    ///
    /// A model that wants a bos gets it first, unless the text starts with it, as a rendered chat template does.
    /// Bytes that a byte-level vocabulary lacks are left out, as transformers does (SmolLM2 has no `0xF1`, say).
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] when a word-level vocabulary has neither the word nor an unknown token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode_within(text)?;
        if ids.starts_with(&self.prefix) { Ok(ids) } else { Ok([&self.prefix, ids.as_slice()].concat()) }
    }

    /// The ids of a piece of text that goes on: no bos is put first.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::encode`].
    pub fn encode_within(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`: special tokens and ids without a token give none, bytes that are not UTF-8 give `U+FFFD`.
    ///
    /// # Errors
    ///
    /// None today; the type leaves room for vocabularies that cannot always be written.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut stream = TextStream::new(self);
        let mut text = String::new();
        for &id in ids {
            text.extend(stream.push(id)?);
        }
        text.extend(stream.finish()?);
        Ok(text)
    }

    /// Whether `id` ends a text.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos.contains(&id)
    }

    /// The ids that end a text.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The largest id that has a token, plus one. A model may have more logits than that.
    pub fn vocab_size(&self) -> usize {
        self.kinds.len()
    }

    /// The token as the vocabulary spells it (`Ġthe` or `▁the` for " the"), `None` where the id has none.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it, `None` where there is no such token.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// Appends the bytes that `id` stands for, `first` of all that have a text; false where it has none.
    fn spell(&self, id: u32, first: bool, out: &mut Vec<u8>) -> bool {
        let kind = self.kinds.get(id as usize).copied().unwrap_or(Kind::Silent);
        let Some(token) = (kind != Kind::Silent).then(|| self.inner.id_to_token(id)).flatten() else { return false };
        let start = out.len();
        match (self.spelling, kind) {
            (Spelling::Words, _) if !first => out.extend(format!(" {token}").into_bytes()),
            (_, Kind::Literal) | (Spelling::Words, _) => out.extend(token.into_bytes()),
            (Spelling::Bytes, _) => match token.chars().map(gpt2_byte).collect::<Option<Vec<u8>>>() {
                Some(bytes) => out.extend(bytes),
                None => out.extend(token.into_bytes()),
            },
            (Spelling::Spaces { .. }, _) => match fallback_byte(&token) {
                Some(byte) => out.push(byte),
                None => out.extend(token.replace(SPACE, " ").into_bytes()),
            },
        }
        if first && self.spelling == (Spelling::Spaces { strip: true }) && out.get(start) == Some(&b' ') {
            out.remove(start);
        }
        true
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("spelling", &self.spelling)
            .field("prefix", &self.prefix)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

/// Text from ids that come one at a time, in whole characters.
///
/// The pieces put together are what [`Tokenizer::decode`] gives for all the ids. Begin a stream at the first
/// generated token: SentencePiece vocabularies drop the space before the first word of a stream.
#[derive(Debug, Clone)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// At most the three first bytes of a character, between two calls.
    pending: Vec<u8>,
    started: bool,
}

impl<'a> TextStream<'a> {
    /// A stream that begins with the next id.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, pending: Vec::new(), started: false }
    }

    /// Takes the next id. `None` where it completes no character.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.started |= self.tokenizer.spell(id, !self.started, &mut self.pending);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.pending.clear();
                    break;
                }
                Err(e) => {
                    let good = e.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..good]));
                    self.pending.drain(..good + e.error_len().unwrap_or(0));
                    if e.error_len().is_none() {
                        break;
                    }
                    text.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
        Ok((!text.is_empty()).then_some(text))
    }

    /// Ends the text: the start of a character that never got its end becomes one `U+FFFD`.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<Option<String>> {
        Ok((!self.pending.is_empty()).then(|| String::from_utf8_lossy(&self.pending).into_owned()))
    }
}

/// The `tokenizer.ggml.*` part of a GGUF's metadata.
struct Gguf<'a>(&'a HashMap<String, Value>);

impl<'a> Gguf<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(&format!("tokenizer.ggml.{key}"))
    }

    fn string(&self, key: &str) -> Result<&'a str> {
        match self.get(key) {
            Some(Value::String(text)) => Ok(text),
            other => Err(malformed(key, "a string", other.is_some())),
        }
    }

    fn strings(&self, key: &str) -> Result<Vec<&'a str>> {
        self.list(key, "a list of strings", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    fn list<T>(&self, key: &str, wanted: &str, item: impl Fn(&'a Value) -> Option<T>) -> Result<Vec<T>> {
        let value = self.get(key);
        match value {
            Some(Value::Array(values)) => values.iter().map(item).collect(),
            _ => None,
        }
        .ok_or_else(|| malformed(key, wanted, value.is_some()))
    }

    /// The type of each of `n` tokens; all normal where the file does not say.
    fn types(&self, n: usize) -> Result<Vec<i64>> {
        if self.get("token_type").is_none() {
            return Ok(vec![token_type::NORMAL; n]);
        }
        let types = self.list("token_type", "a list of integers", integer)?;
        self.same_length("token_type", types.len(), n)?;
        Ok(types)
    }

    fn same_length(&self, key: &str, n: usize, tokens: usize) -> Result<()> {
        if n == tokens {
            return Ok(());
        }
        Err(Error::Tokenizer(format!("tokenizer.ggml.{key} has {n} entries and tokenizer.ggml.tokens {tokens}")))
    }

    fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key) {
            Some(Value::Bool(flag)) => Some(*flag),
            _ => None,
        }
    }

    fn id(&self, key: &str) -> Option<u32> {
        self.get(&format!("{key}_token_id")).and_then(integer).and_then(|id| id.try_into().ok())
    }

    /// Byte-level BPE.
    fn byte_level(&self, tokens: &[&str], types: &[i64]) -> Result<Tokenizer> {
        // Qwen files from before the key was written are all cut the same way; other families are not.
        let qwen = matches!(self.0.get("general.architecture"), Some(Value::String(name)) if name.starts_with("qwen"));
        let words = Words::named(if qwen && self.get("pre").is_none() { "qwen2" } else { self.string("pre")? })?;
        let merges = self
            .strings("merges")?
            .into_iter()
            .map(|merge| merge.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| malformed("merges", "a list of pairs", true))?;
        let model = BPE::builder()
            .vocab_and_merges(vocab(tokens), merges)
            .ignore_merges(words.whole)
            .build()
            .map_err(|e| Error::Tokenizer(format!("tokenizer.ggml.merges: {e}")))?;
        let mut inner = tokenizers::Tokenizer::new(model);
        inner.with_pre_tokenizer(Some(words.split));
        inner.with_normalizer(words.nfc.then_some(NFC));
        let prefix = self.bos(words.bos, None);
        self.finish(inner, Spelling::Bytes, tokens, types, prefix, self.id("eos"))
    }

    /// SentencePiece BPE.
    fn sentencepiece(&self, tokens: &[&str], types: &[i64]) -> Result<Tokenizer> {
        let scores = self.list("scores", "a list of floats", |value| match value {
            Value::F32(score) => Some(*score),
            Value::F64(score) => Some(*score as f32),
            _ => None,
        })?;
        self.same_length("scores", scores.len(), tokens.len())?;

        // SentencePiece merges the neighbours that make the piece of the highest score; so each way to cut a piece
        // into two is a merge, ranked by that score.
        let normal = |i: usize| {
            types[i] == token_type::NORMAL || types[i] == token_type::USER_DEFINED && tokens[i].contains(SPACE)
        };
        let pieces: HashSet<&str> = (0..tokens.len()).filter(|&i| normal(i)).map(|i| tokens[i]).collect();
        let mut order: Vec<usize> = (0..tokens.len()).filter(|&i| normal(i)).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let mut merges = Vec::new();
        for piece in order.into_iter().map(|i| tokens[i]) {
            for (at, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(at);
                if pieces.contains(left) && pieces.contains(right) {
                    merges.push((left.to_owned(), right.to_owned()));
                }
            }
        }

        let unknown = self.id("unknown").unwrap_or(0);
        let mut model = BPE::builder().vocab_and_merges(vocab(tokens), merges).byte_fallback(true).fuse_unk(true);
        if let Some(unknown) = tokens.get(unknown as usize) {
            model = model.unk_token((*unknown).to_owned());
        }
        let mut inner =
            tokenizers::Tokenizer::new(model.build().map_err(|e| Error::Tokenizer(format!("tokenizer.ggml: {e}")))?);
        let strip = self.flag("add_space_prefix").unwrap_or(true);
        let replace = Replace::new(" ", SPACE).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if strip {
            steps.push(Prepend::new(SPACE.to_owned()).into());
        }
        steps.push(replace.into());
        inner.with_normalizer(Some(normalizers::Sequence::new(steps)));

        let prefix = self.bos(true, Some(1));
        self.finish(inner, Spelling::Spaces { strip }, tokens, types, prefix, self.id("eos").or(Some(2)))
    }

    /// What `encode` puts first, where the key that says so is missing: `add`, and the id `bos`.
    fn bos(&self, add: bool, bos: Option<u32>) -> Vec<u32> {
        let bos = self.id("bos").or(bos);
        bos.filter(|_| self.flag("add_bos_token").unwrap_or(add)).into_iter().collect()
    }

    fn finish(
        &self,
        mut inner: tokenizers::Tokenizer,
        spelling: Spelling,
        tokens: &[&str],
        types: &[i64],
        prefix: Vec<u32>,
        eos: Option<u32>,
    ) -> Result<Tokenizer> {
        let eos: Vec<u32> = [eos, self.id("eot"), self.id("eom")].into_iter().flatten().collect();
        for &id in eos.iter().chain(&prefix) {
            if id as usize >= tokens.len() {
                let n = tokens.len();
                return Err(Error::Tokenizer(format!("bos or eos id {id} is outside the vocabulary of {n} tokens")));
            }
        }
        let (mut special, mut unused) = (Vec::new(), Vec::new());
        for (i, (&token, &kind)) in tokens.iter().zip(types).enumerate() {
            let id = i as u32;
            let control = matches!(kind, token_type::CONTROL | token_type::UNKNOWN);
            if control || eos.contains(&id) || prefix.contains(&id) {
                special.push(AddedToken::from(token, true).normalized(false));
            } else if kind == token_type::USER_DEFINED && !(spelling != Spelling::Bytes && token.contains(SPACE)) {
                special.push(AddedToken::from(token, false).normalized(false));
            } else if kind == token_type::UNUSED {
                unused.push(id);
            }
        }
        inner.add_tokens(&special);
        Ok(Tokenizer::new(inner, spelling, prefix, &eos, &unused))
    }
}

/// How a byte-level vocabulary cuts text into words.
struct Words {
    split: PreTokenizerWrapper,
    /// A word that is a token is taken as it is, whatever the merges say.
    whole: bool,
    nfc: bool,
    bos: bool,
}

impl Words {
    /// `tokenizer.ggml.pre`: the names that llama.cpp's converter gives.
    fn named(pre: &str) -> Result<Self> {
        let gpt2 = || ByteLevel::new(false, true, true);
        let (split, llama3) = match pre {
            "gpt-2" | "gpt2" | "default" => (gpt2().into(), false),
            "smollm" | "starcoder" | "refact" => {
                (Sequence::new(vec![Digits::new(true).into(), gpt2().into()]).into(), false)
            }
            "qwen2" | "deepseek-r1-qwen" => (by_regex(QWEN2)?, false),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => (by_regex(LLAMA3)?, true),
            "tekken" => (by_regex(TEKKEN)?, true),
            other => {
                return Err(Error::Tokenizer(format!(
                    "tokenizer.ggml.pre is \"{other}\", which is not known here, and a guess would give other ids; \
                     load the model from a folder with a tokenizer.json instead"
                )));
            }
        };
        Ok(Self { split, whole: llama3, nfc: pre == "qwen2", bos: llama3 })
    }
}

/// Words by a regular expression, then bytes.
fn by_regex(regex: &str) -> Result<PreTokenizerWrapper> {
    let split = Split::new(SplitPattern::Regex(regex.to_owned()), SplitDelimiterBehavior::Isolated, false)
        .map_err(|e| Error::Tokenizer(e.to_string()))?;
    Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
}

fn vocab(tokens: &[&str]) -> Vocab {
    let named = tokens.iter().enumerate().filter(|(_, token)| !token.is_empty());
    named.map(|(id, token)| ((*token).to_owned(), id as u32)).collect()
}

fn integer(value: &Value) -> Option<i64> {
    match *value {
        Value::U8(v) => Some(v.into()),
        Value::I8(v) => Some(v.into()),
        Value::U16(v) => Some(v.into()),
        Value::I16(v) => Some(v.into()),
        Value::U32(v) => Some(v.into()),
        Value::I32(v) => Some(v.into()),
        Value::U64(v) => v.try_into().ok(),
        Value::I64(v) => Some(v),
        _ => None,
    }
}

fn malformed(key: &str, wanted: &str, present: bool) -> Error {
    let what = if present { "is not" } else { "is missing from the file; it should be" };
    Error::Tokenizer(format!("tokenizer.ggml.{key} {what} {wanted}"))
}

/// The spelling that a `tokenizer.json`'s decoder undoes, `None` for a decoder that is not known.
fn spelling_of(decoder: &serde_json::Value) -> Option<Spelling> {
    if decoder.is_null() {
        return Some(Spelling::Words);
    }
    let of = |decoder: &serde_json::Value| decoder["type"].as_str().unwrap_or_default().to_owned();
    let steps = match decoder["decoders"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![decoder],
    };
    let mut spelling = None;
    for step in &steps {
        match of(step).as_str() {
            "ByteLevel" => return Some(Spelling::Bytes),
            "ByteFallback" => spelling = spelling.or(Some(Spelling::Spaces { strip: false })),
            "Metaspace" => spelling = Some(Spelling::Spaces { strip: step["prepend_scheme"] != "never" }),
            _ => {}
        }
    }
    if spelling.is_some() && steps.iter().any(|step| of(step) == "Strip") {
        spelling = Some(Spelling::Spaces { strip: true });
    }
    spelling
}

/// The byte that a character stands for in GPT-2's table: printable Latin-1 for itself, the rest from U+0100 on.
fn gpt2_byte(c: char) -> Option<u8> {
    let code = u32::from(c);
    let byte = match code {
        33..=126 | 161..=172 | 174..=255 => code,
        256..=288 => code - 256,
        289..=322 => code - 289 + 127,
        323 => 173,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// `<0xAB>`: the byte that SentencePiece falls back on where no piece fits.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use candle_core::quantized::gguf_file::Content;

    const TEXTS: [&str; 12] = [
        "",
        " ",
        "Hello world",
        "  two  spaces  ",
        "x = 12 + 345.678e-9",
        "def f(x):\n    return x**2  # square\n\n\nclass A:\n\tpass\r\n",
        "It's naïve, they'LL say: café déjà vu…",
        "你好，世界！ こんにちは 안녕하세요 Привет",
        "🤗😀👩‍👩‍👧🇩🇪 ④ ² ٣",
        "{\"a\": [1, null]}\n",
        "https://example.com/a?b=c&d=1#e",
        "\n\n\n \n",
    ];

    fn text(value: &str) -> Value {
        Value::String(value.to_owned())
    }

    /// GPT-2's character for a byte, found by trying.
    fn gpt2_char(byte: u8) -> char {
        (33..=323).filter_map(char::from_u32).find(|&c| gpt2_byte(c) == Some(byte)).unwrap()
    }

    /// Byte-level metadata: the 256 bytes, then what `merges` make, then `added` with their types.
    fn byte_level(pre: &str, merges: &[&str], added: &[(&str, i32)]) -> HashMap<String, Value> {
        let mut tokens: Vec<(String, i32)> = (0..=255).map(|byte| (gpt2_char(byte).to_string(), 1)).collect();
        tokens.extend(merges.iter().map(|merge| (merge.replace(' ', ""), 1)));
        tokens.extend(added.iter().map(|&(token, kind)| (token.to_owned(), kind)));
        HashMap::from(
            [
                ("model", text("gpt2")),
                ("pre", text(pre)),
                ("tokens", Value::Array(tokens.iter().map(|(token, _)| text(token)).collect())),
                ("token_type", Value::Array(tokens.iter().map(|&(_, kind)| Value::I32(kind)).collect())),
                ("merges", Value::Array(merges.iter().map(|merge| text(merge)).collect())),
            ]
            .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)),
        )
    }

    fn set(metadata: &mut HashMap<String, Value>, key: &str, value: Value) {
        metadata.insert(format!("tokenizer.ggml.{key}"), value);
    }

    /// SentencePiece metadata: unk, bos, eos, the bytes, and `pieces`, the best first.
    fn sentencepiece(pieces: &[&str]) -> HashMap<String, Value> {
        let mut tokens = vec![("<unk>".to_owned(), 2), ("<s>".to_owned(), 3), ("</s>".to_owned(), 3)];
        tokens.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), 6)));
        tokens.extend(pieces.iter().map(|piece| ((*piece).to_owned(), 1)));
        HashMap::from(
            [
                ("model", text("llama")),
                ("tokens", Value::Array(tokens.iter().map(|(token, _)| text(token)).collect())),
                ("token_type", Value::Array(tokens.iter().map(|&(_, kind)| Value::I32(kind)).collect())),
                ("scores", Value::Array((0..tokens.len()).map(|i| Value::F32(-(i as f32))).collect())),
            ]
            .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)),
        )
    }

    fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
        tokenizer.encode(text).unwrap().into_iter().map(|id| tokenizer.token_text(id).unwrap()).collect()
    }

    fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let mut stream = TextStream::new(tokenizer);
        let mut out: String = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
        out.extend(stream.finish().unwrap());
        out
    }

    fn round_trips(tokenizer: &Tokenizer) {
        for text in TEXTS {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            assert_eq!(streamed(tokenizer, &ids), text);
        }
    }

    #[test]
    fn every_byte_has_one_character() {
        let characters: HashSet<char> = (0..=255).map(gpt2_char).collect();
        assert_eq!(characters.len(), 256);
        assert_eq!((gpt2_char(b' '), gpt2_char(b'\n'), gpt2_char(b'a'), gpt2_char(0xad)), ('Ġ', 'Ċ', 'a', 'Ń'));
        assert_eq!(gpt2_byte('你'), None);
    }

    #[test]
    fn each_family_cuts_words_its_own_way() {
        let merges = ["1 2", "12 3", "123 4", "a b", "Ġ ab", "ab Ċ", "Ċ Ċ"];
        let of = |pre: &str, text: &str| pieces(&Tokenizer::from_gguf(&byte_level(pre, &merges, &[])).unwrap(), text);
        assert_eq!(of("gpt-2", "ab 1234"), ["ab", "Ġ", "1234"]);
        assert_eq!(of("gpt-2", "1234"), ["1234"]);
        assert_eq!(of("smollm", "ab 1234"), ["ab", "Ġ", "1", "2", "3", "4"]);
        assert_eq!(of("qwen2", "ab1234"), ["ab", "1", "2", "3", "4"]);
        assert_eq!(of("llama-bpe", "ab1234"), ["ab", "123", "4"]);
        assert_eq!(of("tekken", "ab1234"), ["ab", "1", "2", "3", "4"]);
        for pre in ["gpt-2", "smollm", "qwen2", "llama-bpe"] {
            assert_eq!(of(pre, "ab ab"), ["ab", "Ġab"], "no space is put first");
            assert_eq!(of(pre, "ab\n\n"), ["ab", "ĊĊ"]);
        }
        for pre in ["default", "gpt-2", "smollm", "qwen2", "deepseek-r1-qwen", "llama-bpe", "llama3", "tekken"] {
            round_trips(&Tokenizer::from_gguf(&byte_level(pre, &merges, &[])).unwrap());
        }
    }

    #[test]
    fn qwen_composes_characters() {
        let tokenizer = Tokenizer::from_gguf(&byte_level("qwen2", &[], &[])).unwrap();
        assert_eq!(tokenizer.encode("e\u{301}").unwrap(), tokenizer.encode("é").unwrap());
        let mut metadata = byte_level("qwen2", &["1 2"], &[]);
        metadata.remove("tokenizer.ggml.pre");
        assert!(Tokenizer::from_gguf(&metadata).is_err());
        metadata.insert("general.architecture".to_owned(), text("qwen2"));
        assert_eq!(pieces(&Tokenizer::from_gguf(&metadata).unwrap(), "12"), ["1", "2"]);
    }

    #[test]
    fn special_tokens_are_one_id_and_silent() {
        let added = [("<|im_start|>", 3), ("<|im_end|>", 3), ("<tool>", 4), ("[PAD]", 5), ("<|eot_id|>", 3)];
        let mut metadata = byte_level("qwen2", &[], &added);
        set(&mut metadata, "eos_token_id", Value::U32(257));
        let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
        let ids = tokenizer.encode("<|im_start|>é<tool> <|im_end|>").unwrap();
        assert_eq!(ids, [256, 0xc3, 0xa9, 258, 32, 257]);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "é<tool> ");
        assert_eq!(tokenizer.decode(&[259, 97, 400_000]).unwrap(), "a", "unused ids and ids past the end are silent");
        assert_eq!((tokenizer.vocab_size(), tokenizer.eos()), (261, &[257, 260][..]));
        assert!(tokenizer.is_eos(257) && tokenizer.is_eos(260) && !tokenizer.is_eos(256));
        assert_eq!(tokenizer.token_text(258).as_deref(), Some("<tool>"));
        assert_eq!((tokenizer.token_id("<|im_end|>"), tokenizer.token_text(261)), (Some(257), None));
        assert_eq!(tokenizer.with_eos(vec![258, 257]).eos(), [257, 258, 260]);
    }

    #[test]
    fn a_bos_comes_first_and_once() {
        let added = [("<|begin_of_text|>", 3)];
        let ids = |pre: &str, add: Option<bool>, text: &str| {
            let mut metadata = byte_level(pre, &[], &added);
            set(&mut metadata, "bos_token_id", Value::U32(256));
            if let Some(add) = add {
                set(&mut metadata, "add_bos_token", Value::Bool(add));
            }
            Tokenizer::from_gguf(&metadata).unwrap().encode(text).unwrap()
        };
        assert_eq!(ids("llama-bpe", None, "a"), [256, 97]);
        assert_eq!(ids("llama-bpe", Some(false), "a"), [97]);
        assert_eq!(ids("qwen2", None, "a"), [97]);
        assert_eq!(ids("qwen2", Some(true), "a"), [256, 97]);
        assert_eq!(ids("qwen2", Some(true), "<|begin_of_text|>a"), [256, 97]);
        assert_eq!(ids("qwen2", Some(true), ""), [256]);
    }

    #[test]
    fn a_stream_gives_whole_characters() {
        let tokenizer = Tokenizer::from_gguf(&byte_level("gpt-2", &[], &[("<|im_end|>", 3)])).unwrap();
        let mut stream = TextStream::new(&tokenizer);
        let got: Vec<Option<String>> = "a🤗".bytes().map(|byte| stream.push(byte.into()).unwrap()).collect();
        assert_eq!(got, [Some("a".to_owned()), None, None, None, Some("🤗".to_owned())]);
        assert_eq!(stream.push(256).unwrap(), None);
        assert_eq!(stream.finish().unwrap(), None);

        // A cut-off character, then a letter: the half becomes one mark, the letter is kept.
        let mut stream = TextStream::new(&tokenizer);
        assert_eq!((stream.push(0xe4).unwrap(), stream.push(0xbd).unwrap()), (None, None));
        assert_eq!(stream.push(u32::from(b'a')).unwrap().as_deref(), Some("\u{fffd}a"));
        assert_eq!(stream.push(0xff).unwrap().as_deref(), Some("\u{fffd}"));
        assert_eq!(stream.push(0xf0).unwrap(), None);
        assert_eq!(stream.finish().unwrap().as_deref(), Some("\u{fffd}"));
        let bytes = [0xe4, 0xbd, 0x61, 0xff, 0xf0, 0x9f];
        let ids: Vec<u32> = bytes.iter().map(|&byte| u32::from(byte)).collect();
        assert_eq!(tokenizer.decode(&ids).unwrap(), String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn sentencepiece_merges_by_score_and_falls_back_on_bytes() {
        let vocabulary = ["▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "abc", "▁▁"];
        let tokenizer = Tokenizer::from_gguf(&sentencepiece(&vocabulary)).unwrap();
        // "▁a" has the best score and wins over "ab" and "bc"; then "bc" joins.
        assert_eq!(pieces(&tokenizer, "abc"), ["<s>", "▁a", "bc"]);
        assert_eq!(pieces(&tokenizer, "  abc"), ["<s>", "▁▁", "▁a", "bc"]);
        assert_eq!(pieces(&tokenizer, "é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
        assert_eq!(pieces(&tokenizer, "a</s>b"), ["<s>", "▁a", "</s>", "▁", "b"]);
        assert_eq!(tokenizer.eos(), [2]);
        round_trips(&tokenizer);
        assert_eq!(tokenizer.decode(&tokenizer.encode("<s> a").unwrap()).unwrap(), " a");
        assert_eq!(streamed(&tokenizer, &tokenizer.encode(" 🤗").unwrap()), " 🤗");

        let mut metadata = sentencepiece(&vocabulary);
        set(&mut metadata, "add_space_prefix", Value::Bool(false));
        set(&mut metadata, "add_bos_token", Value::Bool(false));
        let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
        assert_eq!(pieces(&tokenizer, "abc"), ["abc"]);
        round_trips(&tokenizer);
    }

    #[test]
    fn metadata_that_cannot_be_used_is_named() {
        let error = |metadata: &HashMap<String, Value>| Tokenizer::from_gguf(metadata).unwrap_err().to_string();
        let good = byte_level("gpt-2", &["a b"], &[]);
        let with = |key: &str, value: Value| {
            let mut metadata = good.clone();
            set(&mut metadata, key, value);
            error(&metadata)
        };
        let named = error(&byte_level("mystery", &[], &[]));
        assert!(named.contains("tokenizer.ggml.pre is \"mystery\"") && named.contains("tokenizer.json"), "{named}");
        assert!(with("model", text("t5")).contains("tokenizer.ggml.model is \"t5\""));
        assert!(with("tokens", Value::U32(1)).contains("tokenizer.ggml.tokens is not a list of strings"));
        assert!(with("token_type", Value::Array(vec![])).contains("tokenizer.ggml.token_type has 0 entries"));
        assert!(
            with("merges", Value::Array(vec![text("ab")])).contains("tokenizer.ggml.merges is not a list of pairs")
        );
        assert!(with("merges", Value::Array(vec![text("q z")])).contains("qz"));
        assert!(with("eos_token_id", Value::U32(9999)).contains("9999"));
        assert!(error(&HashMap::new()).contains("tokenizer.ggml.tokens is missing"));
        let mut metadata = sentencepiece(&["a"]);
        metadata.remove("tokenizer.ggml.scores");
        assert!(error(&metadata).contains("tokenizer.ggml.scores is missing"));
    }

    #[test]
    fn a_file_reads_back_as_the_metadata_it_was_made_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let made =
            Tokenizer::from_gguf(&byte_level("smollm", &["1 2", "a b"], &[("<|im_end|>", 3), ("<t>", 4)])).unwrap();
        let mut inner = made.inner.clone();
        inner.with_decoder(Some(ByteLevel::default()));
        // A prompt must not be cut or filled up, whatever the training set-up was.
        inner.with_truncation(Some(tokenizers::TruncationParams { max_length: 2, ..Default::default() })).unwrap();
        inner.with_padding(Some(tokenizers::PaddingParams {
            strategy: tokenizers::PaddingStrategy::Fixed(64),
            ..Default::default()
        }));
        inner.save(&path, false).unwrap();
        let read = Tokenizer::from_file(&path).unwrap();
        for text in TEXTS.into_iter().chain(["ab12<|im_end|><t>"]) {
            let ids = read.encode(text).unwrap();
            assert_eq!(ids, made.encode(text).unwrap());
            assert_eq!(read.decode(&ids).unwrap(), text.replace("<|im_end|>", ""));
        }
        assert_eq!((read.eos(), read.vocab_size()), (made.eos(), made.vocab_size()));
    }

    #[test]
    fn a_file_may_add_a_bos_and_spell_with_spaces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let metadata = sentencepiece(&["▁", "a", "b", "▁a", "ab"]);
        let made = Tokenizer::from_gguf(&metadata).unwrap();
        let mut inner = made.inner.clone();
        let steps: Vec<tokenizers::DecoderWrapper> = vec![
            Replace::new("▁", " ").unwrap().into(),
            decoders::byte_fallback::ByteFallback::new().into(),
            decoders::fuse::Fuse::new().into(),
            decoders::strip::Strip::new(' ', 1, 0).into(),
        ];
        inner.with_decoder(Some(decoders::sequence::Sequence::new(steps)));
        let template = tokenizers::processors::template::TemplateProcessing::builder()
            .try_single("<s> $A </s>")
            .unwrap()
            .special_tokens(vec![("<s>", 1), ("</s>", 2)])
            .build()
            .unwrap();
        inner.with_post_processor(Some(template));
        inner.save(&path, false).unwrap();
        let read = Tokenizer::from_file(&path).unwrap();
        assert_eq!(read.encode("ab").unwrap()[0], 1);
        for text in TEXTS {
            let ids = read.encode(text).unwrap();
            assert_eq!(ids, made.encode(text).unwrap(), "a bos, and no eos");
            assert_eq!(read.decode(&ids).unwrap(), text);
        }
    }

    #[test]
    fn what_is_written_reads_back_as_the_metadata_it_was_made_of() {
        let added = [("<|im_end|>", 3), ("<t>", 4), ("<|begin_of_text|>", 3)];
        let mut all: Vec<_> = ["smollm", "qwen2", "llama-bpe", "tekken", "gpt-2"]
            .map(|pre| byte_level(pre, &["1 2", "a b", "Ġ a"], &added))
            .into();
        all.iter_mut().for_each(|metadata| set(metadata, "bos_token_id", Value::U32(261)));
        all.push(sentencepiece(&["▁", "a", "b", "▁a", "ab"]));
        all.push(sentencepiece(&["▁", "a", "b", "▁a", "ab"]));
        set(&mut all[6], "add_space_prefix", Value::Bool(false));
        let mut with_bos = 0;
        for metadata in all {
            let made = Tokenizer::from_gguf(&metadata).unwrap();
            let read = Tokenizer::from_json(made.to_json().unwrap().as_bytes(), Path::new("written")).unwrap();
            for text in TEXTS.into_iter().chain(["ab12<|im_end|><t> a", "a\u{30a}"]) {
                let ids = made.encode(text).unwrap();
                assert_eq!(read.encode(text).unwrap(), ids, "{made:?}: {text:?}");
                assert_eq!(read.encode_within(text).unwrap(), made.encode_within(text).unwrap());
                assert_eq!(read.decode(&ids).unwrap(), made.decode(&ids).unwrap(), "{made:?}: {text:?}");
            }
            assert_eq!((read.eos(), read.vocab_size(), &read.prefix), (made.eos(), made.vocab_size(), &made.prefix));
            assert_eq!(read.spelling, made.spelling);
            with_bos += usize::from(!read.prefix.is_empty());
        }
        assert_eq!(with_bos, 4, "llama3, tekken and SentencePiece");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let error = || Tokenizer::from_file(&path).unwrap_err().to_string();
        assert!(error().contains("tokenizer.json"));
        std::fs::write(&path, "{}").unwrap();
        assert!(error().contains("not a tokenizer"));
        let model = r#"{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":{"type":"WhitespaceSplit"},
            "post_processor":null,"decoder":DECODER,"model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}"#;
        std::fs::write(&path, model.replace("DECODER", r###"{"type":"WordPiece","prefix":"##","cleanup":true}"###))
            .unwrap();
        assert!(error().contains("decoder is not supported"));
        std::fs::write(&path, model.replace("DECODER", "null")).unwrap();
        let words = Tokenizer::from_file(&path).unwrap();
        assert_eq!((words.encode("b a").unwrap(), words.decode(&[1, 0]).unwrap()), (vec![1, 0], "b a".to_owned()));
    }

    /// The ids come from tiktoken with Qwen's published ranks, and from a plain BPE loop over SmolLM2's own merges.
    #[test]
    fn real_vocabularies_give_the_known_ids() {
        let code = "def add(a, b):\n    return a + 12345\n";
        let mixed = "It's 你好 🤗 naïve café!";
        let chat = "<|im_start|>user\nHi<|im_end|>\n";
        let cases: [(&str, usize, [&[u32]; 3]); 2] = [
            (
                "qwen2.5-coder-0.5b-instruct.gguf",
                151_936,
                [
                    &[750, 912, 2877, 11, 293, 982, 262, 470, 264, 488, 220, 16, 17, 18, 19, 20, 198],
                    &[2132, 594, 220, 108_386, 11162, 97, 245, 94880, 586, 51950, 0],
                    &[151_644, 872, 198, 13048, 151_645, 198],
                ],
            ),
            (
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                49152,
                [
                    &[1604, 803, 24, 81, 28, 278, 727, 472, 1003, 253, 1232, 216, 33, 34, 35, 36, 37, 198],
                    &[1589, 506, 216, 18645, 250, 48392, 138, 15107, 114, 241, 15486, 46494, 37366, 17],
                    &[1, 4093, 198, 26843, 2, 198],
                ],
            ),
        ];
        let Some(folder) = std::env::var_os("KVPOLICY_MODELS").map(PathBuf::from) else {
            println!("skipped: KVPOLICY_MODELS is not set to a folder with {} and {}", cases[0].0, cases[1].0);
            return;
        };
        for (file, size, ids) in cases {
            let Ok(mut open) = std::fs::File::open(folder.join(file)) else {
                println!("skipped: {} has no {file}", folder.display());
                continue;
            };
            let metadata = Content::read(&mut open).unwrap().metadata;
            let tokenizer = Tokenizer::from_gguf(&metadata).unwrap();
            for (text, ids) in [code, mixed, chat].into_iter().zip(ids) {
                assert_eq!(tokenizer.encode(text).unwrap(), ids, "{file}: {text:?}");
            }
            round_trips(&tokenizer);
            assert_eq!(tokenizer.vocab_size(), size);
            let end = tokenizer.token_id("<|im_end|>").unwrap();
            assert!(tokenizer.is_eos(end) && tokenizer.decode(&[end]).unwrap().is_empty());
            assert_eq!(tokenizer.encode("987").unwrap().len(), 3, "digits stand alone");
        }
    }
}
