use crate::{model::ModelArgs, table};
use anyhow::{Context, Result};
use kvpolicy::{Registry, compare::problems, runtime::TextModel};
use kvpolicy_candle::TextStream;
use rand::{SeedableRng, rngs::StdRng};
use std::{io::Write, path::PathBuf, time::Instant};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The policy.
    #[arg(long, default_value = "full")]
    policy: String,
    /// What to say to the model [default without --model: a map to walk along].
    #[arg(long, conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// A file with what to say.
    #[arg(long)]
    prompt_file: Option<PathBuf>,
    /// Pass the prompt as it is, without the model's chat template.
    #[arg(long)]
    raw: bool,
    /// The most tokens to generate [default: 256; 1024 for the map].
    #[arg(long)]
    max_tokens: Option<usize>,
}

impl Args {
    /// What to say, and whether it was made up here.
    fn prompt(&self) -> Result<(String, bool)> {
        match (&self.prompt, &self.prompt_file) {
            (Some(prompt), _) => Ok((prompt.clone(), false)),
            (None, Some(path)) => Ok((table::read_text(path)?, false)),
            (None, None) if self.model.model.is_none() => {
                let problem = problems::chain(&mut StdRng::seed_from_u64(0), 256);
                Ok((problem.before_answer(0), true))
            }
            (None, None) => anyhow::bail!("nothing to say: give --prompt or --prompt-file"),
        }
    }
}

pub(crate) fn run(args: &Args, registry: &Registry) -> Result<()> {
    let policy = registry.parse(&args.policy)?;
    let (prompt, made_up) = args.prompt()?;
    anyhow::ensure!(!prompt.trim().is_empty(), "the prompt is empty");
    let max_tokens = args.max_tokens.unwrap_or(if made_up { 1024 } else { 256 });
    let mut hosted = args.model.load()?;
    let text = if args.raw { prompt } else { hosted.chat(&prompt).map_err(anyhow::Error::from_boxed)? };
    let tokens = hosted.lm.tokenizer().encode(&text)?;
    args.model.reach(&mut hosted, tokens.len().saturating_add(max_tokens));
    let tokenizer = hosted.lm.tokenizer();

    let mut out = std::io::stdout().lock();
    if made_up {
        write!(out, "{text}").context("standard output")?;
    }
    let mut session = hosted.lm.session(policy.clone(), &hosted.options)?;
    let start = Instant::now();
    let mut logits = session.prefill(&tokens, true)?;
    let read = start.elapsed().as_secs_f64();
    let (start, mut generated) = (Instant::now(), 0usize);
    let mut stream = TextStream::new(tokenizer);
    while generated < max_tokens {
        let token = logits.argmax(0)?.to_scalar::<u32>()?;
        if tokenizer.is_eos(token) {
            break;
        }
        generated += 1;
        if let Some(piece) = stream.push(token)? {
            write!(out, "{piece}").and_then(|_| out.flush()).context("standard output")?;
        }
        if generated < max_tokens && session.has_room() {
            logits = session.decode(token)?;
        } else {
            break;
        }
    }
    let wrote = start.elapsed().as_secs_f64();
    writeln!(out, "{}", stream.finish()?.unwrap_or_default()).context("standard output")?;

    let stats = session.stats();
    eprintln!(
        "\n{policy}\n{} prompt tokens at {:.1}/s, {generated} generated at {:.1}/s\n\
         KV: peak {}, mean {}, dense would peak at {}; compression {:.2}x ({} of {} entries evicted)",
        tokens.len(),
        tokens.len() as f64 / read,
        generated as f64 / wrote,
        table::bytes(stats.peak_bytes as f64),
        table::bytes(stats.mean_bytes),
        table::bytes(stats.dense_peak_bytes as f64),
        stats.compression(),
        stats.evicted,
        stats.written,
    );
    Ok(())
}
