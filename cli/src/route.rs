//! `kvpolicy route`: an online A/B of policies over requests as they come.

mod metrics_file;
mod wire;

use crate::{model::ModelArgs, table::bytes};
use anyhow::{Context, Result, bail, ensure};
use comfy_table::{CellAlignment, Table, presets};
use kvpolicy::{
    Registry,
    compare::problems,
    router::{Arm, ArmReport, Guard, Limits, Router, RouterConfig, Ticket, answer},
    runtime::TextModel,
};
use kvpolicy_candle::{Hosted, TextStream};
use metrics_file::MetricsFile;
use rand::{SeedableRng, rngs::StdRng};
use std::{
    fs::File,
    io::{BufRead, BufReader, ErrorKind, Write},
    path::PathBuf,
    sync::{Mutex, PoisonError},
};
use wire::{Change, Event, Line, Request};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The arms, separated by `;`. The first is the control, which takes over what is rolled back.
    /// [default: full;window:size=256,sinks=4; without --model full;dms;window:size=48,sinks=4]
    #[arg(long)]
    policies: Option<String>,
    /// How many of the keys each arm serves, relative to the others [default: all alike].
    #[arg(long, value_delimiter = ',')]
    weights: Vec<f64>,
    /// Another number draws other keys for each arm.
    #[arg(long, default_value_t = 0)]
    salt: u64,
    /// The share of requests beside which a sequence under `full` reads the same tokens, to measure the KL divergence
    /// [default: 0.1; without --model 0.5].
    #[arg(long)]
    shadow: Option<f64>,
    /// A request that has a shadow goes on under `full` when its KL divergence passes so many nats per token
    /// [default: never; without --model 0.5].
    #[arg(long, value_name = "NATS")]
    fallback_kl: Option<f64>,
    /// Newest tokens over which that is the mean.
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    fallback_tokens: usize,
    /// An arm is rolled back when the KL divergence of its newest requests passes so many nats per token
    /// [default: never; without --model 0.1].
    #[arg(long, value_name = "NATS")]
    limit_kl: Option<f64>,
    /// The same, of seconds a token.
    #[arg(long, value_name = "SECONDS")]
    limit_seconds_per_token: Option<f64>,
    /// Newest requests that a limit is for [default: 20; without --model 4].
    #[arg(long, value_name = "REQUESTS")]
    window: Option<usize>,
    /// A file of requests, a line each, `{"key": "user-17", "prompt": ".."}`; `-` reads them from standard input as they come.
    /// Between them a line may change the arms: `{"weight": {"arm": "dms", "to": 3}}`, `{"roll_back": {"arm": "dms", "reason":
    /// ".."}}`, `{"restore": {"arm": "dms"}}` [default: -; without --model made-up maps to walk along].
    #[arg(long, value_name = "FILE")]
    requests: Option<String>,
    /// Requests that are answered at a time.
    #[arg(long, default_value_t = 1)]
    parallel: usize,
    /// The most tokens of an answer.
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// The most tokens of a prompt and its answer [default: as many as the model was made for].
    #[arg(long)]
    context: Option<usize>,
    /// Pass prompts as they are, without the model's chat template.
    #[arg(long)]
    raw: bool,
    /// A file for Prometheus (node exporter's textfile collector reads such), written anew after each answer.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
}

/// What is done where the command line does not say.
struct Defaults {
    policies: &'static str,
    shadow: f64,
    fallback_kl: Option<f64>,
    limit_kl: Option<f64>,
    window: usize,
    requests: fn() -> Result<Lines>,
}

type Lines = Box<dyn Iterator<Item = std::io::Result<String>> + Send>;

const DEFAULTS: Defaults = Defaults {
    policies: "full;window:size=256,sinks=4",
    shadow: 0.1,
    fallback_kl: None,
    limit_kl: None,
    window: 20,
    requests: || lines_of("-"),
};

const DEMO_DEFAULTS: Defaults = Defaults {
    policies: "full;dms;window:size=48,sinks=4",
    shadow: 0.5,
    fallback_kl: Some(0.5),
    limit_kl: Some(0.1),
    window: 4,
    requests: || Ok(Box::new((0..REQUESTS).map(|i| Ok(made_up(i))))),
};

/// Made-up requests, and the keys they have in turns.
const REQUESTS: u64 = 48;
const KEYS: u64 = 16;

fn made_up(i: u64) -> String {
    let prompt = problems::chain(&mut StdRng::seed_from_u64(i), 256).before_answer(0);
    serde_json::json!({"key": format!("user-{}", i % KEYS), "prompt": prompt}).to_string()
}

/// A file's, or those of standard input.
fn lines_of(path: &str) -> Result<Lines> {
    if path == "-" {
        return Ok(Box::new(BufReader::new(std::io::stdin()).lines()));
    }
    let file = File::open(PathBuf::from(path)).with_context(|| path.to_string())?;
    Ok(Box::new(BufReader::new(file).lines()))
}

impl Args {
    fn defaults(&self) -> &'static Defaults {
        if self.model.model.is_some() { &DEFAULTS } else { &DEMO_DEFAULTS }
    }

    fn router(&self, registry: &Registry) -> Result<Router> {
        let defaults = self.defaults();
        let texts = Registry::split_list(self.policies.as_deref().unwrap_or(defaults.policies))?;
        let weights = if self.weights.is_empty() { vec![1.0; texts.len()] } else { self.weights.clone() };
        ensure!(
            weights.len() == texts.len(),
            "weights: {} for {} policies, one each is needed",
            weights.len(),
            texts.len()
        );
        let shadow = self.shadow.unwrap_or(defaults.shadow);
        let arm = |(text, weight): (&str, f64)| -> Result<Arm> {
            Ok(Arm { name: text.to_string(), policy: registry.parse(text)?, weight, shadow })
        };
        let guard = |kl| Guard { kl, tokens: self.fallback_tokens };
        let limits = Limits {
            kl: self.limit_kl.or(defaults.limit_kl),
            seconds_per_token: self.limit_seconds_per_token,
            window: self.window.unwrap_or(defaults.window),
        };
        Ok(Router::new(RouterConfig {
            arms: texts.into_iter().zip(weights).map(arm).collect::<Result<_>>()?,
            salt: self.salt,
            guard: self.fallback_kl.or(defaults.fallback_kl).map(guard),
            limits,
        })?)
    }
}

pub(crate) fn run(args: &Args, registry: &Registry) -> Result<()> {
    ensure!(args.parallel > 0, "parallel=0: at least one");
    ensure!(args.max_tokens > 0, "max-tokens=0: at least one");
    let metrics = args.metrics.as_deref().map(MetricsFile::new).transpose()?; // before the router shows its arms
    let router = args.router(registry)?;
    let lines = match &args.requests {
        Some(path) => lines_of(path)?,
        None => (args.defaults().requests)()?,
    };
    let mut hosted = args.model.load()?;
    let context = args.context.unwrap_or(hosted.max_context());
    args.model.reach(&mut hosted, context);
    for arm in router.arms() {
        // What cannot run is told before the first request.
        hosted.lm.session(registry.parse(&arm.policy)?, &hosted.options)?;
    }
    let (input, output) = (Mutex::new(Input { lines, read: 0 }), Mutex::new(std::io::stdout()));
    let service = Service { args, hosted: &hosted, router: &router, input, output, metrics };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..args.parallel).map(|_| scope.spawn(|| service.work())).collect();
        let ended = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| bail!("a worker broke off")));
        ended.collect::<Result<()>>()
    })?;
    eprintln!("{}", arms_table(&router.arms()));
    Ok(())
}

/// What workers share.
struct Service<'a> {
    args: &'a Args,
    hosted: &'a Hosted,
    router: &'a Router,
    input: Mutex<Input>,
    output: Mutex<std::io::Stdout>,
    metrics: Option<MetricsFile>,
}

struct Input {
    lines: Lines,
    read: usize,
}

/// A request on its way.
struct Job {
    line: usize,
    request: Request,
    ticket: Ticket,
}

impl Service<'_> {
    fn work(&self) -> Result<()> {
        while let Some(job) = self.next()? {
            self.serve(job)?;
            self.metrics.iter().try_for_each(MetricsFile::write)?;
        }
        Ok(())
    }

    /// Lines take effect in their order, however many workers there are: what changes arms changes them for all that follow.
    fn next(&self) -> Result<Option<Job>> {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(text) = input.lines.next() {
            input.read += 1;
            let line = input.read;
            let read = match text {
                Ok(text) if text.trim().is_empty() => continue,
                Ok(text) => Line::read(&text),
                Err(error) if error.kind() == ErrorKind::InvalidData => Err(error.into()),
                Err(error) => return Err(error).context("requests"),
            };
            match read.and_then(|read| self.follow(line, read)) {
                Ok(Some(job)) => return Ok(Some(job)),
                Ok(None) => self.tell(&Event::shares(line, &self.router.arms()))?,
                Err(error) => self.tell(&Event::Error { line, error: format!("{error:#}") })?,
            }
        }
        Ok(None)
    }

    /// A request to answer; `None` for a change, which is done.
    fn follow(&self, line: usize, read: Line) -> Result<Option<Job>> {
        match read {
            Line::Ask(request) => {
                // No fault of an arm: none gets it.
                ensure!(!request.prompt.trim().is_empty(), "the prompt is empty");
                let ticket = self.router.route(&request.key);
                return Ok(Some(Job { line, request, ticket }));
            }
            Line::Change(Change::Weight { arm, to }) => self.router.set_weight(&arm, to)?,
            Line::Change(Change::RollBack { arm, reason }) => self.router.roll_back(&arm, &reason)?,
            Line::Change(Change::Restore { arm }) => self.router.restore(&arm)?,
        }
        Ok(None)
    }

    fn serve(&self, job: Job) -> Result<()> {
        let Job { line, request, mut ticket } = job;
        let arm = ticket.arm().to_string();
        match self.answer(line, &request, &mut ticket) {
            Ok(answer) => {
                let (tokens, kl, fell_back_at) = (answer.tokens.len(), ticket.kl(), answer.fell_back_at);
                let rolled_back = self.router.finish(ticket, &answer.outcome);
                self.tell(&Event::End { line, key: &request.key, arm: &arm, tokens, kl, fell_back_at })?;
                match rolled_back {
                    Some(found) => self.tell(&Event::RolledBack { arm: &found.arm, rolled_back: &found.reason }),
                    None => Ok(()),
                }
            }
            Err(error) => {
                self.router.fail(ticket, &format!("{error:#}"));
                self.tell(&Event::Error { line, error: format!("{error:#}") })
            }
        }
    }

    /// Streams the pieces of an answer as they come.
    fn answer(&self, line: usize, request: &Request, ticket: &mut Ticket) -> Result<kvpolicy::router::Answer> {
        let chat = || self.hosted.chat(&request.prompt).map_err(anyhow::Error::from_boxed);
        let text = if self.args.raw { request.prompt.clone() } else { chat()? };
        let prompt = self.hosted.lm.tokenizer().encode(&text)?;
        let room = self
            .hosted
            .options
            .max_tokens
            .map_or(usize::MAX, |most| most.saturating_add(1).saturating_sub(prompt.len()));
        let arm = ticket.arm().to_string();
        let mut stream = TextStream::new(self.hosted.lm.tokenizer());
        let piece = |text: &str| self.tell(&Event::Piece { line, key: &request.key, arm: &arm, text });
        let mut told = |token: u32| {
            let text = stream.push(token).map_err(|e| kvpolicy::Error::Host(e.into()))?;
            text.map_or(Ok(()), |text| piece(&text)).map_err(|e| kvpolicy::Error::Host(e.into()))
        };
        let answer = answer(self.hosted, ticket, &prompt, self.args.max_tokens.min(room), &mut told)?;
        stream.finish()?.map_or(Ok(()), |text| piece(&text))?;
        Ok(answer)
    }

    /// A line at once.
    fn tell(&self, event: &Event) -> Result<()> {
        let line = serde_json::to_string(event)? + "\n";
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        output.write_all(line.as_bytes()).and_then(|()| output.flush()).context("standard output")
    }
}

fn arms_table(arms: &[ArmReport]) -> Table {
    let number = |x: Option<f64>, digits: usize| x.map_or("-".to_string(), |x| format!("{x:.digits$}"));
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header([
        "arm",
        "share",
        "requests",
        "failed",
        "shadowed",
        "KL nats/token",
        "fell back",
        "first token",
        "tokens/s",
        "KV mean",
        "compression",
        "rolled back",
    ]);
    for arm in arms {
        table.add_row([
            arm.name.clone(),
            format!("{:.1}%", 100.0 * arm.share),
            arm.requests.to_string(),
            arm.failures.to_string(),
            arm.shadowed.to_string(),
            number(arm.kl, 4),
            arm.fallbacks.to_string(),
            arm.prefill_seconds.map_or("-".into(), |seconds| format!("{seconds:.3} s")),
            number(arm.seconds_per_token.map(f64::recip), 1),
            arm.kv_mean_bytes.map_or("-".into(), bytes),
            arm.compression.map_or("-".into(), |ratio| format!("{ratio:.2}x")),
            arm.rolled_back.clone().unwrap_or_default(),
        ]);
    }
    table.column_iter_mut().skip(1).take(10).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}
