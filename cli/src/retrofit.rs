//! `kvpolicy retrofit`: DMS gates for a model.

use crate::{
    model::{ModelArgs, bytes},
    table::read_text,
};
use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use kvpolicy::{
    PerGate,
    retrofit::{AdamWConfig, Rate, Schedule},
};
use kvpolicy_candle::{
    Lm, Message,
    retrofit::{
        Batch, Checkpoint, Corpus, Divergence, Evaluation, Judged, Mixture, Observer, RunConfig, Source, StepRecord,
        Trainee, Trains, finish, run as train,
    },
};
use serde_json::{Map, Value, json};
use std::{
    fs::{File, OpenOptions},
    io::{BufWriter, Write},
    path::PathBuf,
};

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Direction {
    /// KL(with gates || dense).
    Student,
    /// KL(dense || with gates).
    Teacher,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Gates {
    /// A norm and a small matrix for each layer: the model itself stays as it is.
    Adapter,
    /// A neuron of the queries of each KV head, which attention loses: no tensors of its own.
    Borrowed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Training {
    /// The gates: weights stay.
    Gates,
    /// The gates, and low-rank additions to the weights.
    Lora,
    /// The gates, and the weights of all blocks.
    Full,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Running text to train on: UTF-8 files, or folders of them.
    #[arg(long, num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// Conversations to train on, one a line: a list of messages with `role` and `content`, or `{"messages": [..]}`.
    #[arg(long, num_args = 1..)]
    jsonl: Vec<PathBuf>,
    /// Text to judge the gates on [default: the last twentieth of each file of --text, left out of training].
    #[arg(long, num_args = 1..)]
    held_out: Vec<PathBuf>,
    /// Compression to reach: tokens over live entries at the end of a context, the window counted.
    #[arg(long, default_value_t = 8.0)]
    target_cr: f64,
    /// Tokens that stay whatever was decided.
    #[arg(long, default_value_t = 256)]
    window: usize,
    /// Tokens of a training sequence.
    #[arg(long, default_value_t = 4096)]
    context: usize,
    /// Steps.
    #[arg(long, default_value_t = 600)]
    steps: u64,
    /// Steps over which compression grows to the target [default: three quarters of all].
    #[arg(long)]
    anneal: Option<u64>,
    /// Tokens of a step.
    #[arg(long, default_value_t = 32768)]
    batch_tokens: usize,
    /// Tokens at a time: as many as memory allows.
    #[arg(long, default_value_t = 16384)]
    tokens_at_a_time: usize,
    /// Learning rate.
    #[arg(long, default_value_t = 3e-4)]
    rate: f64,
    /// What decides.
    #[arg(long, value_enum, default_value_t = Gates::Adapter)]
    gates: Gates,
    /// What learns.
    #[arg(long, value_enum, default_value_t = Training::Gates)]
    train: Training,
    /// Rank of additions to the weights, with --train lora.
    #[arg(long, default_value_t = 16)]
    lora_rank: usize,
    /// Learning rate of additions or weights.
    #[arg(long, default_value_t = 1e-4)]
    weights_rate: f64,
    /// Memory for activations: what does not fit is computed again on the way back.
    #[arg(long, default_value = "16GiB", value_parser = bytes)]
    activations: u64,
    /// Steps over which it rises.
    #[arg(long, default_value_t = 20)]
    warmup: u64,
    /// Temperature of soft decisions.
    #[arg(long, default_value_t = 0.1)]
    tau: f64,
    /// Factor of decision logits.
    #[arg(long, default_value_t = 100.0)]
    scale: f64,
    /// Where decision logits start, below 0: larger evicts less at first.
    #[arg(long, default_value_t = 5.0)]
    offset: f64,
    /// Weight of the compression loss.
    #[arg(long, default_value_t = 1.0)]
    compression_weight: f64,
    /// Which way the divergence is taken.
    #[arg(long, value_enum, default_value_t = Direction::Student)]
    divergence: Direction,
    /// One decision for all KV heads of a layer.
    #[arg(long)]
    per_layer: bool,
    /// Share of sequences with planted facts that are asked for at the end.
    #[arg(long, default_value_t = Mixture::default().facts)]
    facts: f64,
    /// Share of sequences of conversations, with --jsonl.
    #[arg(long, default_value_t = Mixture::default().conversations)]
    conversations: f64,
    /// Weight of an answer's tokens.
    #[arg(long, default_value_t = Mixture::default().answers)]
    answer_weight: f32,
    /// Held-out sequences to judge on.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    judged: u64,
    /// Steps from one checkpoint to the next.
    #[arg(long, default_value_t = 100)]
    save_every: u64,
    /// Chooses text and noise.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The most text to read of each file.
    #[arg(long, value_parser = bytes)]
    most_text: Option<u64>,
    /// Where gates, checkpoints and logs go.
    #[arg(long)]
    out: PathBuf,
    /// Go on from the checkpoint in --out.
    #[arg(long)]
    resume: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let config = args.config();
    config.check()?;
    let (documents, held_out) = args.documents()?;
    let lm = args.model.load_dense()?;
    let mixture = Mixture { facts: args.facts, conversations: args.conversations, answers: args.answer_weight };
    let mut corpus = Corpus::new(&lm, &documents, mixture, args.seed)?;
    corpus.add_conversations(&args.talks()?)?;
    corpus.check(args.context)?;
    let plain = Mixture { facts: 0.0, conversations: 0.0, answers: 1.0 };
    let judged = Corpus::new(&lm, &held_out, plain, args.seed)?;
    judged.check(args.context).context("held-out text")?;
    let trainee = Trainee::new(lm.model(), config.gates(), args.scale, args.offset).training(args.trains());
    let trainee = if args.gates == Gates::Borrowed { trainee.borrowing()? } else { trainee };
    eprintln!(
        "{}: {} tokens of text, {} held out; {} sequences of {} tokens a step",
        lm.name(),
        corpus.text_tokens(),
        judged.text_tokens(),
        config.sequences,
        args.context
    );

    let mut progress = Bar::new(args, &config)?;
    let params = train(&trainee, &corpus, &config, &args.out, args.resume, &mut progress)?;
    progress.finish()?;
    let batches = judged.batches(0..args.judged, config.at_a_time, args.context, lm.model().device())?;
    let evaluation = finish(&trainee, &params, &batches, &args.out, about(&lm, args)?)?;
    report(&trainee, &evaluation, &batches)?;
    #[cfg(feature = "plot")]
    crate::plot::draw(&[args.out.join("train.jsonl")], &args.out.join("train.svg"))?;
    if (args.gates, args.train) == (Gates::Adapter, Training::Gates) {
        eprintln!("gates: dms:weights={}", args.out.join("gates.safetensors").display());
    } else {
        // They judge the model with what it has learned, and no other.
        eprintln!("the model with them: kvpolicy export --model .. --gates {} --out ..", args.out.display());
    }
    Ok(())
}

impl Args {
    fn config(&self) -> RunConfig {
        let Self { context, window, target_cr, steps, .. } = *self;
        let of = |tokens: usize| (tokens / context.max(1)).max(1);
        RunConfig {
            schedule: Schedule {
                context,
                window,
                target: target_cr,
                anneal: self.anneal.unwrap_or((steps * 3 / 4).max(1)),
            },
            rate: Rate { peak: self.rate, warmup: self.warmup, steps },
            weights_rate: self.weights_rate / self.rate,
            per: if self.per_layer { PerGate::Layer } else { PerGate::Head },
            scale: self.scale,
            offset: self.offset,
            tau: self.tau,
            compression: self.compression_weight,
            divergence: match self.divergence {
                Direction::Student => Divergence::Student,
                Direction::Teacher => Divergence::Teacher,
            },
            sequences: of(self.batch_tokens),
            at_a_time: of(self.tokens_at_a_time),
            activations: self.activations as usize,
            save_every: self.save_every,
            seed: self.seed,
            optimizer: AdamWConfig::default(),
        }
    }

    fn trains(&self) -> Trains {
        match self.train {
            Training::Gates => Trains::Gates,
            Training::Lora => Trains::Lora { rank: self.lora_rank },
            Training::Full => Trains::Full,
        }
    }

    /// Text to train on, and text to judge on.
    fn documents(&self) -> Result<(Vec<String>, Vec<String>)> {
        let read = |paths: &[PathBuf]| -> Result<Vec<String>> {
            let mut all = vec![];
            for path in text_files(paths)? {
                let mut text = read_text(&path)?;
                if let Some(most) = self.most_text {
                    text.truncate(boundary(&text, most as usize));
                }
                all.push(text);
            }
            ensure!(!all.is_empty(), "no text files in {paths:?}");
            Ok(all)
        };
        let mut documents = read(&self.text)?;
        if !self.held_out.is_empty() {
            return Ok((documents, read(&self.held_out)?));
        }
        let tail = |text: &mut String| text.split_off(boundary(text, text.len() / 20 * 19));
        let held_out = documents.iter_mut().map(tail).collect();
        Ok((documents, held_out))
    }

    fn talks(&self) -> Result<Vec<Vec<Message>>> {
        let mut all = vec![];
        for path in &self.jsonl {
            for (number, line) in read_text(path)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let place = || format!("{}:{}", path.display(), number + 1);
                let value: Value = serde_json::from_str(line).with_context(place)?;
                let messages = value.get("messages").unwrap_or(&value).clone();
                all.push(serde_json::from_value(messages).with_context(place)?);
            }
        }
        Ok(all)
    }
}

fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

/// Files as they are, folders as the files in them.
fn text_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let inside = std::fs::read_dir(path).with_context(|| path.display().to_string())?;
        for entry in inside {
            files.push(entry.with_context(|| path.display().to_string())?.path());
        }
    }
    files.retain(|path| !path.is_dir());
    files.sort();
    Ok(files)
}

/// What is to be known of gates beside their numbers.
fn about(lm: &Lm, args: &Args) -> Result<Map<String, Value>> {
    let command: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let fields = [
        ("kvpolicy_model", json!(lm.name())),
        ("kvpolicy_model_sha256", json!(lm.sha256()?)),
        ("kvpolicy_target_cr", json!(args.target_cr)),
        ("kvpolicy_context", json!(args.context)),
        ("kvpolicy_version", json!(env!("CARGO_PKG_VERSION"))),
        ("kvpolicy_command", json!(command)),
        ("dms_tau", json!(args.tau)),
    ];
    Ok(fields.map(|(name, value)| (name.to_string(), value)).into_iter().collect())
}

fn report(trainee: &Trainee, gates: &Evaluation, batches: &[Batch]) -> Result<()> {
    let length = batches.first().map_or(0, |batch| batch.length);
    let size = (length as f64 / gates.compression) as usize;
    let window = trainee.evaluate(batches, Judged::Window { size: size.saturating_sub(4), sinks: 4 })?;
    println!(
        "{} held-out tokens in sequences of {length}, hard eviction; the window holds as many entries",
        gates.tokens
    );
    println!("| | compression | KL nats/token | perplexity | last quarter: KL | perplexity |");
    println!("|---|--:|--:|--:|--:|--:|");
    for (name, e) in [("gates", gates), ("window", &window)] {
        println!(
            "| {name} | {:.2}x | {:.4} | {:+.2}% | {:.4} | {:+.2}% |",
            e.compression,
            e.kl,
            e.perplexity_change() * 100.0,
            e.tail_kl,
            e.tail_perplexity_change() * 100.0
        );
    }
    for (layer, live) in gates.live.iter().enumerate() {
        let shares: Vec<String> = live.iter().map(|share| format!("{:.0}%", share * 100.0)).collect();
        println!("layer {layer}: live {}", shares.join(" "));
    }
    Ok(())
}

/// A progress bar, and the file of steps.
struct Bar {
    bar: ProgressBar,
    log: BufWriter<File>,
    path: PathBuf,
    first: Option<StepRecord>,
}

impl Bar {
    fn new(args: &Args, config: &RunConfig) -> Result<Self> {
        std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
        let path = args.out.join("train.jsonl");
        let done = if args.resume { Checkpoint::load(&args.out)?.steps() } else { 0 };
        let open = || -> std::io::Result<File> {
            let file = OpenOptions::new().create(true).append(true).open(&path)?;
            // Steps that a run made after its last checkpoint will be made again.
            file.set_len(length_of_lines(&std::fs::read(&path)?, done))?;
            Ok(file)
        };
        let log = BufWriter::new(open().with_context(|| path.display().to_string())?);
        let bar = ProgressBar::new(config.rate.steps).with_position(done);
        bar.set_style(ProgressStyle::with_template("{bar:20} {pos}/{len} {elapsed}<{eta} {wide_msg}")?);
        Ok(Self { bar, log, path, first: None })
    }

    fn finish(&mut self) -> Result<()> {
        self.bar.finish();
        self.log.flush().with_context(|| self.path.display().to_string())
    }
}

/// Bytes of the first lines of a text.
fn length_of_lines(text: &[u8], lines: u64) -> u64 {
    text.split_inclusive(|&byte| byte == b'\n').take(lines as usize).map(|line| line.len() as u64).sum()
}

impl Observer for Bar {
    fn step(&mut self, record: &StepRecord) -> kvpolicy_candle::Result<()> {
        let first = self.first.get_or_insert_with(|| record.clone());
        let (tokens, seconds) = (record.tokens - first.tokens, record.seconds - first.seconds);
        let speed = if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
        self.bar.set_position(record.step);
        let message = format!(
            "KL {:.4}, compression {:.2}x of {:.2}x (soft {:.3}), {speed:.0} tokens/s",
            record.divergence, record.compression, record.target, record.soft
        );
        self.bar.set_message(message.clone());
        if self.bar.is_hidden() && (record.step.is_power_of_two() || record.step.is_multiple_of(50)) {
            eprintln!("step {}: {message}, gradient {:.3}", record.step, record.gradient);
        }
        let write = |log: &mut BufWriter<File>| -> std::io::Result<()> {
            serde_json::to_writer(&mut *log, record)?;
            writeln!(log)?;
            log.flush()
        };
        write(&mut self.log).map_err(|e| kvpolicy_candle::Error::File { path: self.path.clone(), what: e.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::length_of_lines;

    #[test]
    fn a_log_is_cut_after_whole_lines() {
        let log = b"one\ntwo\nthree";
        for (lines, bytes) in [(0, 0), (1, 4), (2, 8), (3, 13), (9, 13)] {
            assert_eq!(length_of_lines(log, lines), bytes);
        }
        assert_eq!(length_of_lines(b"", 3), 0);
    }
}
