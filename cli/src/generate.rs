use crate::{model::ModelArgs, table};
use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use candle_transformers::generation::{LogitsProcessor, Sampling};
use kvpolicy::{Registry, compare::problems, runtime::TextModel};
use kvpolicy_candle::{Chains, TextStream, Tokenizer};
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
    /// Answers, decoded together; they hold the prompt once. More than one need a temperature.
    #[arg(long, default_value_t = 1)]
    n: usize,
    /// Randomness of the choice of tokens; 0 takes the most likely one.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Of the choices.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Args {
    fn check(&self) -> Result<()> {
        let (n, temperature) = (self.n, self.temperature);
        ensure!(n > 0, "n=0 is not accepted: 1 or more");
        ensure!(temperature.is_finite() && temperature >= 0.0, "temperature={temperature} is not accepted: 0 or more");
        ensure!(n == 1 || temperature > 0.0, "n={n} answers at temperature=0 are all the same: give a --temperature");
        Ok(())
    }

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

/// One answer.
struct Answer<'a> {
    tokenizer: &'a Tokenizer,
    choice: LogitsProcessor,
    stream: TextStream<'a>,
    text: String,
    tokens: usize,
}

impl<'a> Answer<'a> {
    fn new(args: &Args, tokenizer: &'a Tokenizer, i: usize) -> Self {
        let sampling = match args.temperature {
            0.0 => Sampling::ArgMax,
            temperature => Sampling::All { temperature },
        };
        let choice = LogitsProcessor::from_sampling(args.seed.wrapping_add(i as u64), sampling);
        Self { tokenizer, choice, stream: TextStream::new(tokenizer), text: String::new(), tokens: 0 }
    }

    /// The next token, or the end. `logits`: `[vocab]`.
    fn choose(&mut self, logits: &Tensor) -> Result<Option<u32>> {
        let token = self.choice.sample(logits)?;
        if self.tokenizer.is_eos(token) {
            return Ok(None);
        }
        self.tokens += 1;
        self.text.push_str(&self.stream.push(token)?.unwrap_or_default());
        Ok(Some(token))
    }

    /// What was said since the last call.
    fn say(&mut self, out: &mut impl Write) -> Result<()> {
        let said = write!(out, "{}", self.text).and_then(|_| out.flush());
        self.text.clear();
        said.context("standard output")
    }

    fn finish(&mut self, out: &mut impl Write) -> Result<()> {
        let rest = self.stream.clone().finish()?.unwrap_or_default();
        writeln!(out, "{}{rest}", self.text).context("standard output")
    }
}

/// The answers as they grow.
struct Answers<'a> {
    chains: Chains<'a>,
    answers: Vec<Answer<'a>>,
    most: usize,
    /// Tokens that were chosen and not read: `(chain, token)`.
    next: Vec<(usize, u32)>,
    lost: Vec<kvpolicy_candle::Error>,
}

impl Answers<'_> {
    /// Chains choose a token, each by a row of the logits, or end. `of`: `(row, chain)`; `logits`: `[rows, vocab]`.
    fn choose(&mut self, of: &[(usize, usize)], logits: &Tensor) -> Result<()> {
        self.next.clear();
        for &(row, chain) in of {
            let answer = &mut self.answers[chain];
            let token = answer.choose(&logits.get(row)?)?;
            match token.filter(|_| answer.tokens < self.most && self.chains.has_room(chain)) {
                Some(token) => self.next.push((chain, token)),
                None => self.chains.end(chain),
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        let (logits, lost) = self.chains.decode(&self.next)?;
        let mut living: Vec<(usize, usize)> = self.next.iter().map(|&(chain, _)| chain).enumerate().collect();
        living.retain(|(_, chain)| !lost.iter().any(|(gone, _)| gone == chain));
        self.lost.extend(lost.into_iter().map(|(_, error)| error));
        self.choose(&living, &logits)
    }
}

pub(crate) fn run(args: &Args, registry: &Registry) -> Result<()> {
    let policy = registry.parse(&args.policy)?;
    args.check()?;
    let (prompt, made_up) = args.prompt()?;
    ensure!(!prompt.trim().is_empty(), "the prompt is empty");
    let most = args.max_tokens.unwrap_or(if made_up { 1024 } else { 256 });
    let mut hosted = args.model.load()?;
    let text = if args.raw { prompt } else { hosted.chat(&prompt).map_err(anyhow::Error::from_boxed)? };
    let tokens = hosted.lm.tokenizer().encode(&text)?;
    args.model.reach(&mut hosted, tokens.len().saturating_add(most));
    hosted.options.chains = Some(args.n);

    let mut out = std::io::stdout().lock();
    if made_up {
        write!(out, "{text}").context("standard output")?;
    }
    let mut session = hosted.lm.session(policy.clone(), &hosted.options)?;
    let start = Instant::now();
    let logits = session.prefill(&tokens, true)?;
    let (read, prompt_bytes) = (start.elapsed().as_secs_f64(), session.cache().usage().bytes_in_use);
    let (start, chains) = (Instant::now(), session.chains(args.n)?);
    let answers = (0..args.n).map(|i| Answer::new(args, hosted.lm.tokenizer(), i)).collect();
    let mut all = Answers { chains, answers, most, next: vec![], lost: vec![] };
    let first: Vec<(usize, usize)> = (0..args.n).map(|chain| (0, chain)).collect();
    if most > 0 {
        all.choose(&first, &logits.unsqueeze(0)?)?;
    }
    let mut begun_bytes = None; // with a token in each answer
    while !all.next.is_empty() {
        if let [alone] = &mut all.answers[..] {
            alone.say(&mut out)?;
        }
        all.step()?;
        begun_bytes.get_or_insert(all.chains.cache().usage().bytes_in_use);
    }
    let wrote = start.elapsed().as_secs_f64();
    for (i, answer) in all.answers.iter_mut().enumerate() {
        if args.n > 1 {
            writeln!(out, "--- {} of {}", i + 1, args.n).context("standard output")?;
        }
        answer.finish(&mut out)?;
    }
    for error in &all.lost {
        eprintln!("an answer ended early: {error}");
    }
    ensure!(all.lost.len() < args.n, "no answer came to its end");
    let (stats, generated) = (all.chains.stats(), all.answers.iter().map(|answer| answer.tokens).sum::<usize>());
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
    if let (2.., Some(begun)) = (args.n, begun_bytes) {
        let (prompt, begun) = (prompt_bytes as f64, begun as f64);
        eprintln!(
            "{} answers began in {}, {:.3} times the prompt's {}",
            args.n,
            table::bytes(begun),
            begun / prompt,
            table::bytes(prompt)
        );
    }
    Ok(())
}
