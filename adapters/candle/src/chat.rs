//! Chat templates: a conversation to the text that the model was trained on.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use candle_core::quantized::gguf_file;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::{
    error::{Error, Result},
    folder::Folder,
};

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
        environment.add_template_owned(NAME, without_training_marks(source)).map_err(template)?;
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
        Self::of(Folder::Disk(dir))
    }

    pub(crate) fn of(folder: Folder) -> Result<Option<Self>> {
        let broken = |what: String| Error::file(folder.path("tokenizer_config.json"), what);
        let config: serde_json::Value = match folder.text("tokenizer_config.json")? {
            Some(text) => serde_json::from_str(&text).map_err(|e| broken(format!("not JSON: {e}")))?,
            None => serde_json::Value::Null,
        };
        let source = match folder.text("chat_template.jinja")? {
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

    /// All that decides what it renders, for a hash.
    pub(crate) fn text(&self) -> String {
        let source = self.environment.get_template(NAME).map(|template| template.source().to_string());
        [source.unwrap_or_default().as_str(), &self.bos, &self.eos].join("\0")
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

/// Trained models keep `{% generation %}` blocks, which only say what the loss is computed on; the tags of an `if`
/// treat the spaces around them the same.
fn without_training_marks(source: &str) -> String {
    let mut source = source.to_owned();
    for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
        source = source
            .replace(&format!("{open} generation {close}"), &format!("{open} if true {close}"))
            .replace(&format!("{open} endgeneration {close}"), &format!("{open} endif {close}"));
    }
    source
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::{fs, path::PathBuf};

    use candle_core::quantized::gguf_file::Content;

    use super::*;

    fn say(role: &str, content: &str) -> Message {
        Message::new(role, content)
    }

    fn render(source: &str, messages: &[Message]) -> String {
        ChatTemplate::new(source, "<s>", "</s>").unwrap().render(messages, true).unwrap()
    }

    /// A tiny GGUF's metadata.
    fn gguf(template: Option<&str>) -> HashMap<String, gguf_file::Value> {
        let tokens = ["a", "<s>", "</s>"].map(|token| gguf_file::Value::String(token.to_owned())).to_vec();
        let mut metadata = HashMap::from([
            ("tokenizer.ggml.tokens".to_owned(), gguf_file::Value::Array(tokens)),
            ("tokenizer.ggml.bos_token_id".to_owned(), gguf_file::Value::U32(1)),
            ("tokenizer.ggml.eos_token_id".to_owned(), gguf_file::Value::U32(2)),
        ]);
        if let Some(template) = template {
            metadata.insert("tokenizer.chat_template".to_owned(), gguf_file::Value::String(template.to_owned()));
        }
        metadata
    }

    #[test]
    fn chatml_puts_its_default_system_prompt_first() {
        let chatml = "{%- if messages[0]['role'] != 'system' %}\n    {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}\n\
            {%- endif %}\n{%- for message in messages %}\n    \
            {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n\
            {%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n";
        let user = say("user", "Hi <b>&");
        assert_eq!(
            render(chatml, std::slice::from_ref(&user)),
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <b>&<|im_end|>\n<|im_start|>assistant\n"
        );
        let template = ChatTemplate::new(chatml, "", "").unwrap();
        assert_eq!(
            template.render(&[say("system", "Be short."), user], false).unwrap(),
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi <b>&<|im_end|>\n"
        );
    }

    #[test]
    fn llama3_writes_bos_and_a_date_and_sees_no_tools() {
        let llama3 = "{{- bos_token }}\n{%- if not date_string is defined %}\n    \
            {%- if strftime_now is defined %}\n        {%- set date_string = strftime_now('%d %b %Y') %}\n    \
            {%- endif %}\n{%- endif %}\n{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n\
            {%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] | trim %}\n    \
            {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n\
            {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n\
            {%- if tools is not none %}\n    {{- 'Environment: ipython\\n' }}\n{%- endif %}\n\
            {{- 'Today: ' + date_string + '\\n\\n' }}\n{{- system }}\n{{- '<|eot_id|>' }}\n\
            {%- for m in messages %}\n    {%- if not 'tool_calls' in m %}\n        {{- '<|start_header_id|>' + \
            m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}\n    {%- endif %}\n\
            {%- endfor %}\n{%- if add_generation_prompt %}\n    \
            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n";
        let today = strftime("%d %b %Y", now()).unwrap();
        let text = render(llama3, &[say("system", " Be short. "), say("user", " Hi ")]);
        // The day may have changed between the two looks at the clock.
        let text = text.replace(&strftime("%d %b %Y", now()).unwrap(), &today);
        assert_eq!(
            text,
            format!(
                "<s><|start_header_id|>system<|end_header_id|>\n\nToday: {today}\n\nBe short.<|eot_id|>\
                 <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>\
                 <|start_header_id|>assistant<|end_header_id|>\n\n"
            )
        );
    }

    #[test]
    fn python_methods_slices_and_namespaces_work() {
        let thinking = "{%- set ns = namespace(last=-1) %}\n{%- for m in messages[::-1] %}\n    \
            {%- if ns.last < 0 and m.role == 'user' and not m.content.startswith('<tool') %}\n        \
            {%- set ns.last = (messages|length - 1) - loop.index0 %}\n    {%- endif %}\n{%- endfor %}\n\
            {%- for m in messages %}\n    {%- set content = m.content %}\n    {%- if '</think>' in content %}\n        \
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n    {%- endif %}\n    \
            {%- if m.get('tool_calls') is none and m.reasoning is not defined %}{{- m.role.upper() ~ ': ' ~ content }}\
            {%- endif %}\n    {%- if loop.index0 == ns.last %}{{- ' <' }}{% endif %}{{ '\\n' }}\n{%- endfor %}";
        let messages = [say("user", "2+2?"), say("assistant", "<think>\nhm\n</think>\n\n4"), say("user", "+1?")];
        assert_eq!(render(thinking, &messages), "USER: 2+2?\nASSISTANT: 4\nUSER: +1? <\n");
    }

    #[test]
    fn blocks_on_lines_of_their_own_leave_no_trace() {
        let source =
            "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend\n";
        assert_eq!(render(source, &[say("user", "a"), say("user", "b")]), "a\nb\nend");
    }

    #[test]
    fn json_is_written_as_python_does() {
        assert_eq!(
            render("{{ messages | tojson }}", &[say("user", "<é>'")]),
            r#"[{"role": "user", "content": "<é>'"}]"#
        );
        assert_eq!(
            render("{{ {'a': [1, true, none]} | tojson(indent=2) }}", &[]),
            "{\n  \"a\": [\n    1,\n    true,\n    null\n  ]\n}"
        );
        assert_eq!(render("{{ [[], {}] | tojson(ensure_ascii=false) }}", &[]), "[[], {}]");
    }

    #[test]
    fn generation_blocks_are_transparent() {
        let source = "{% for m in messages %}\n{% generation %}\n{{ m.content }}{%- endgeneration %}\n{% endfor %}";
        assert_eq!(render(source, &[say("user", "a"), say("user", "b")]), "ab");
    }

    #[test]
    fn a_template_may_refuse_a_conversation() {
        let source = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}ok";
        let template = ChatTemplate::new(source, "", "").unwrap();
        assert_eq!(template.render(&[say("user", "a")], false).unwrap(), "ok");
        let error = template.render(&[say("system", "a")], false).unwrap_err().to_string();
        assert!(error.starts_with("chat template: ") && error.contains("roles must alternate"), "{error}");
        assert!(ChatTemplate::new("{% if %}", "", "").is_err());
        assert!(matches!(
            ChatTemplate::new("{{ m.x.y }}", "", "").unwrap().render(&[], false),
            Err(Error::Template(_))
        ));
    }

    #[test]
    fn a_missing_bos_is_undefined() {
        let source = "{% if bos_token is defined %}{{ bos_token }}{% else %}none{% endif %}{{ eos_token }}";
        assert_eq!(ChatTemplate::new(source, "", "").unwrap().render(&[], false).unwrap(), "none");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |format: &str, seconds: u64| strftime(format, seconds).unwrap();
        assert_eq!(at("%d %b %Y", 0), "01 Jan 1970");
        // 2024-02-29 23:59:59 UTC, a Thursday, and the second after.
        assert_eq!(
            at("%A %a %d %B %m %y %j %H:%M:%S %I%p", 1_709_251_199),
            "Thursday Thu 29 February 02 24 060 23:59:59 11PM"
        );
        assert_eq!(at("%F %T %-d %-m %e%%|%Z%z", 1_709_251_200), "2024-03-01 00:00:00 1 3  1%|UTC+0000");
        assert_eq!(at("%Y-%m-%d", 4_102_444_799), "2099-12-31");
        assert!(strftime("%Q", 0).is_err() && strftime("%", 0).is_err());
    }

    #[test]
    fn a_folder_has_a_file_or_an_entry_or_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
        let read = || ChatTemplate::from_hf_dir(dir).map(|found| found.map(|t| t.render(&[], false).unwrap()));
        assert_eq!(read().unwrap(), None);
        write("tokenizer_config.json", r#"{"bos_token": {"content": "<s>"}, "eos_token": null}"#);
        assert_eq!(read().unwrap(), None);
        write("tokenizer_config.json", r#"{"bos_token": {"content": "<s>"}, "chat_template": "one {{ bos_token }}"}"#);
        assert_eq!(read().unwrap().unwrap(), "one <s>");
        write(
            "tokenizer_config.json",
            r#"{"eos_token": "</s>", "chat_template": [{"name": "rag", "template": "no"},
                {"name": "default", "template": "two {{ eos_token }}"}]}"#,
        );
        assert_eq!(read().unwrap().unwrap(), "two </s>");
        write("chat_template.jinja", "three {{ eos_token }}\n");
        assert_eq!(read().unwrap().unwrap(), "three </s>");

        fs::remove_file(dir.join("chat_template.jinja")).unwrap();
        for broken in ["{", r#"{"chat_template": 1}"#, r#"{"chat_template": [{"name": "rag", "template": "x"}]}"#] {
            write("tokenizer_config.json", broken);
            let error = read().unwrap_err().to_string();
            assert!(error.contains("tokenizer_config.json"), "{error}");
        }
    }

    #[test]
    fn a_gguf_has_a_template_or_not() {
        assert!(ChatTemplate::from_gguf(&gguf(None)).unwrap().is_none());
        let template = ChatTemplate::from_gguf(&gguf(Some("{{ bos_token }}.{{ eos_token }}"))).unwrap().unwrap();
        assert_eq!(template.render(&[], true).unwrap(), "<s>.</s>");
        let mut metadata = gguf(None);
        metadata.insert("tokenizer.chat_template".to_owned(), gguf_file::Value::U32(1));
        assert!(matches!(ChatTemplate::from_gguf(&metadata), Err(Error::Template(_))));
    }

    #[test]
    fn real_templates_render() {
        let cases = [
            (
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                 <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            ),
            (
                "qwen2.5-coder-0.5b-instruct.gguf",
                "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n\
                 <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            ),
        ];
        let Some(folder) = std::env::var_os("KVPOLICY_MODELS").map(PathBuf::from) else {
            println!("skipped: KVPOLICY_MODELS is not set to a folder with {} and {}", cases[0].0, cases[1].0);
            return;
        };
        for (file, first) in cases {
            let Ok(mut open) = fs::File::open(folder.join(file)) else {
                println!("skipped: {} has no {file}", folder.display());
                continue;
            };
            let metadata = Content::read(&mut open).unwrap().metadata;
            let template = ChatTemplate::from_gguf(&metadata).unwrap().unwrap();
            assert_eq!(template.render(&[say("user", "Hi")], true).unwrap(), first);
            let talk = [say("system", "S"), say("user", "U"), say("assistant", "A")];
            assert_eq!(
                template.render(&talk, false).unwrap(),
                "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
            );
        }
    }
}
