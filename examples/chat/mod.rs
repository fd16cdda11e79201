//! What the examples share: options, a chat with live figures of the cache, and a measurement on random weights.

mod measure;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use candle_transformers::generation::LogitsProcessor;
use clap::{Parser, ValueEnum};
use kvpolicy::Registry;
use kvpolicy_candle::{Lm, LoadOptions, Message, Session, SessionOptions, TextStream};
use std::{
    io::{BufRead, Write},
    time::Instant,
};

/// Chat with a model under a KV cache policy.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// A hub id (org/name), a folder of safetensors, sharded or not, or a GGUF file.
    #[arg(long, required_unless_present = "random")]
    model: Option<String>,
    /// Random weights of a published shape, such as llama-3.2-1b or qwen-r1-1.5b: the cache is measured beside the plan.
    #[arg(long, conflicts_with = "model")]
    random: Option<String>,
    /// What stays in the cache; `kvpolicy policies` lists them.
    #[arg(long, default_value = "full")]
    policy: String,
    /// `cpu`, or a GPU: `cuda`, `cuda:1`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Type of weights and activations [default: f32, on a GPU bf16].
    #[arg(long, value_enum)]
    dtype: Option<Float>,
    /// Say this and end, instead of a chat on the terminal.
    #[arg(long)]
    prompt: Option<String>,
    /// The most tokens of an answer.
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Tokens of the random prompt with --random.
    #[arg(long, default_value_t = 1024)]
    prompt_tokens: usize,
    /// Randomness of the choice; 0 takes the most likely token.
    #[arg(long)]
    temperature: Option<f64>,
    /// Tokens between two lines of figures.
    #[arg(long)]
    every: Option<usize>,
    /// Of the choices, and of random weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Float {
    F32,
    F16,
    Bf16,
}

/// What an example takes where nothing is said.
#[derive(Debug)]
pub(crate) struct Defaults {
    pub(crate) max_tokens: usize,
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
}

pub(crate) fn run(args: &Args, defaults: &Defaults) -> Result<()> {
    let policy = Registry::standard().parse(&args.policy)?;
    ensure!(args.every != Some(0), "every=0: 1 or more tokens");
    let max_tokens = args.max_tokens.unwrap_or(defaults.max_tokens);
    let mut options = LoadOptions::on(device(&args.device)?);
    if let Some(dtype) = args.dtype {
        options.dtype = match dtype {
            Float::F32 => DType::F32,
            Float::F16 => DType::F16,
            Float::Bf16 => DType::BF16,
        };
    }
    if let Some(shape) = &args.random {
        let lengths =
            measure::Lengths { prompt: args.prompt_tokens, generated: max_tokens, every: args.every.unwrap_or(4096) };
        return measure::run(shape, &options, policy, lengths, args.seed);
    }
    let lm = Lm::load(args.model.as_deref().unwrap_or_default(), &options)?;
    let temperature = args.temperature.or(defaults.temperature);
    let choice = LogitsProcessor::new(args.seed, temperature.filter(|t| *t > 0.0), defaults.top_p);
    let every = args.every.unwrap_or(256);
    let session = lm.session(policy, &SessionOptions::default())?;
    let mut chat = Chat { lm: &lm, session, choice, said: vec![], max_tokens, every };
    if let Some(prompt) = &args.prompt {
        return chat.turn(prompt);
    }
    loop {
        eprint!("\n> ");
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            return Ok(());
        }
        if !line.trim().is_empty() {
            chat.turn(line.trim())?;
        }
    }
}

fn device(name: &str) -> Result<Device> {
    match name.split_once(':').unwrap_or((name, "0")) {
        ("cpu", _) => Ok(Device::Cpu),
        #[cfg(feature = "cuda")]
        ("cuda", ordinal) => Ok(kvpolicy::cuda_device(ordinal.parse().context("cuda:N takes a number")?)?),
        #[cfg(not(feature = "cuda"))]
        ("cuda", _) => anyhow::bail!("device {name}: build the example with --features cuda"),
        _ => anyhow::bail!("`{name}` is no device: cpu, cuda or cuda:N"),
    }
}

struct Chat<'a> {
    lm: &'a Lm,
    session: Session<'a>,
    choice: LogitsProcessor,
    said: Vec<Message>,
    max_tokens: usize,
    every: usize,
}

impl Chat<'_> {
    /// Reads what the user says and streams the answer. What was read before stays in the cache, as the policy has it.
    fn turn(&mut self, user: &str) -> Result<()> {
        let (tokenizer, start) = (self.lm.tokenizer(), Instant::now());
        let tokens = tokenizer.encode(&self.text_of(user)?)?;
        let mut logits = self.session.prefill(&tokens, true)?;
        let mut stream = TextStream::new(tokenizer);
        let (mut out, mut answer, mut generated) = (std::io::stdout().lock(), String::new(), 0);
        while generated < self.max_tokens && self.session.has_room() {
            let token = self.choice.sample(&logits)?;
            generated += 1;
            logits = self.session.decode(token)?; // the end of a turn is part of the conversation, too
            if tokenizer.is_eos(token) {
                break;
            }
            if let Some(piece) = stream.push(token)? {
                write!(out, "{piece}").and_then(|_| out.flush()).context("standard output")?;
                answer += &piece;
            }
            if generated % self.every == 0 {
                eprintln!("\n[{}]", figures(&self.session, generated, start));
            }
        }
        answer.extend(stream.finish()?);
        writeln!(out).context("standard output")?;
        eprintln!("[{}]", figures(&self.session, generated, start));
        self.said.push(Message::new("user", user));
        self.said.push(Message::new("assistant", answer));
        Ok(())
    }

    /// What the chat template adds to the conversation. A template may leave thoughts of earlier turns out, so what it makes
    /// of the whole is not what was read: only what comes after the last answer is taken.
    fn text_of(&self, user: &str) -> Result<String> {
        let Some(template) = self.lm.template() else { return Ok(user.to_string()) };
        if self.said.is_empty() {
            return Ok(self.lm.chat(user)?);
        }
        let before = template.render(&self.said, false)?;
        let all: Vec<Message> = self.said.iter().cloned().chain([Message::new("user", user)]).collect();
        let whole = template.render(&all, true)?;
        Ok(whole.strip_prefix(&before).unwrap_or(&self.lm.chat(user)?).to_string())
    }
}

/// What the cache holds, beside what a dense one would.
fn figures(session: &Session, generated: usize, start: Instant) -> String {
    let (usage, spec) = (session.cache().usage(), session.cache().spec());
    let heads = (spec.layers * spec.kv_heads) as f64;
    let (held, seen) = (usage.live_entries as f64 / heads, session.seen() as f64);
    format!(
        "{seen} tokens, {held:.0} held a head, {:.2}x; KV {:.1} MiB of {:.1} dense; {:.1} tok/s",
        seen / held.max(1.0),
        usage.bytes_in_use as f64 / (1 << 20) as f64,
        seen * usage.dense_bytes_per_token as f64 / (1 << 20) as f64,
        generated as f64 / start.elapsed().as_secs_f64(),
    )
}
