//! Chat templates: a conversation to the text that the model was trained on.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use candle_core::quantized::gguf_file;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::error::{Error, Result};

const NAME: &str = "chat";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`, and whatever else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A model's chat template (Jinja), set up as the transformers library does it.
///
/// ```
/// # fn main() -> kvpolicy_candle::Result<()> {
/// use kvpolicy_candle::{ChatTemplate, Message};
///
/// let source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}\
///     {% if add_generation_prompt %}[assistant] {% endif %}";
/// let template = ChatTemplate::new(source, "<s>", "</s>")?;
/// let text = template.render(&[Message::new("user", " Hello ")], true)?;
/// assert_eq!(text, "<s>[user] Hello\n[assistant] ");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// A template from its source. `bos` and `eos` are the texts of those tokens, empty where the model has none.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] when the source does not parse.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("strftime_now", |format: String| strftime(&format, now()));
        environment.add_function("raise_exception", |what: String| -> std::result::Result<(), minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, what))
        });
        environment.add_template_owned(NAME, source.to_owned()).map_err(template)?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The template of a Hugging Face model folder, `None` where it has none.
    ///
    /// `chat_template.jinja` comes before the `chat_template` of `tokenizer_config.json`; of several named ones it
    /// is `default`. The texts of bos and eos come from `tokenizer_config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when a file cannot be read, is malformed or has no `default` among its templates;
    /// [`Error::Template`] when the template does not parse.
    pub fn from_hf_dir(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("tokenizer_config.json");
        let broken = |what: String| Error::File { path: path.clone(), what };
        let config: serde_json::Value = match read_optional(&path)? {
            Some(text) => serde_json::from_str(&text).map_err(|e| broken(format!("not JSON: {e}")))?,
            None => serde_json::Value::Null,
        };
        let source = match read_optional(&dir.join("chat_template.jinja"))? {
            Some(source) => source,
            None => match &config["chat_template"] {
                serde_json::Value::Null => return Ok(None),
                serde_json::Value::String(source) => source.clone(),
                serde_json::Value::Array(named) => match named.iter().find(|one| one["name"] == "default") {
                    Some(serde_json::Value::Object(one)) if one["template"].is_string() => {
                        one["template"].as_str().unwrap_or_default().to_owned()
                    }
                    _ => return Err(broken("chat_template is a list without a template named \"default\"".to_owned())),
                },
                _ => return Err(broken("chat_template is neither a string nor a list".to_owned())),
            },
        };
        let text = |key: &str| {
            let token = &config[key];
            token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
        };
        Self::new(&source, &text("bos_token"), &text("eos_token")).map(Some)
    }

    /// The template that a GGUF file carries (`tokenizer.chat_template`), `None` where it has none.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] when the template is no string or does not parse.
    pub fn from_gguf(metadata: &HashMap<String, gguf_file::Value>) -> Result<Option<Self>> {
        let source = match metadata.get("tokenizer.chat_template") {
            None => return Ok(None),
            Some(gguf_file::Value::String(source)) => source,
            Some(_) => return Err(Error::Template("tokenizer.chat_template is not a string".to_owned())),
        };
        let text = |key: &str| {
            let id = metadata.get(key).and_then(|id| id.to_u32().ok())?;
            match metadata.get("tokenizer.ggml.tokens") {
                Some(gguf_file::Value::Array(tokens)) => tokens.get(id as usize)?.to_string().ok().cloned(),
                _ => None,
            }
        };
        let bos = text("tokenizer.ggml.bos_token_id").unwrap_or_default();
        let eos = text("tokenizer.ggml.eos_token_id").unwrap_or_default();
        Self::new(source, &bos, &eos).map(Some)
    }

    /// The text of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// The template sees `messages`, `add_generation_prompt`, `bos_token` and `eos_token`; `tools` and `documents`
    /// are `none`, as transformers has them when nobody gives any.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] when the template refuses the conversation (roles that must alternate, say) or uses what
    /// is not there; the message is the template's own.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let token = |text: &str| if text.is_empty() { Value::UNDEFINED } else { Value::from(text) };
        let context = context! {
            messages,
            add_generation_prompt,
            bos_token => token(&self.bos),
            eos_token => token(&self.eos),
            tools => (),
            documents => (),
        };
        self.environment.get_template(NAME).and_then(|chat| chat.render(context)).map_err(template)
    }
}

fn template(error: minijinja::Error) -> Error {
    let mut what = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        what.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    Error::Template(what)
}

fn read_optional(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::File { path: path.to_path_buf(), what: e.to_string() }),
    }
}

/// Python's `json.dumps`: minijinja's own filter escapes for HTML and puts no spaces.
fn to_json(value: &Value, options: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?.map(|n| " ".repeat(n));
    let mut out = Vec::new();
    match &indent {
        Some(indent) => {
            value.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(indent.as_bytes())))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, OneLine)),
    }
    .map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// JSON in one line with a space after each comma and colon.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Seconds since 1970, UTC.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The date and time in UTC, in the directives that chat templates use.
fn strftime(format: &str, seconds: u64) -> std::result::Result<String, minijinja::Error> {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let (mut rest, mut year) = (seconds / 86400, 1970);
    let weekday = DAYS[(rest % 7) as usize];
    while rest >= 365 + u64::from(leap(year)) {
        rest -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = rest + 1;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while rest >= lengths[month] {
        rest -= lengths[month];
        month += 1;
    }
    let (name, month, day) = (MONTHS[month], month + 1, rest + 1);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let two = |n: u64| if padded { format!("{n:02}") } else { n.to_string() };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month as u64),
            Some('d') => two(day),
            Some('j') => format!("{day_of_year:03}"),
            Some('e') => format!("{day:2}"),
            Some('B') => name.to_owned(),
            Some('b' | 'h') => name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let what = format!("strftime_now does not know %{}", other.map(String::from).unwrap_or_default());
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, what));
            }
        });
    }
    Ok(out)
}
