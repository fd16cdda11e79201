use crate::{
    model::{ModelArgs, device_name},
    table::{self, read_text},
};
use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use kvpolicy::{
    Registry,
    compare::{self, Contender, Contest, Host, Plan, Progress, Report, SCHEMA, Sample, Subject, Task},
};
use kvpolicy_candle::Hosted;
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Policies, separated by `;`. `full` is the measure of the others.
    #[arg(long, default_value = "full;window:size=256,sinks=4;h2o:budget=256;tova:budget=256;snapkv:budget=256")]
    policies: String,
    /// What to measure: ppl, kl, needle, needle-aware, speed.
    #[arg(long, default_value = "ppl,kl,needle,speed")]
    tasks: String,
    /// Context lengths in tokens.
    #[arg(long, value_delimiter = ',', default_value = "1024")]
    context: Vec<usize>,
    /// Compression ratios: each policy's budget is set so that all hold the same mean number of entries.
    #[arg(long, value_delimiter = ',')]
    sweep: Vec<f64>,
    /// Texts per context, prompts per context, repetitions of a timing.
    #[arg(long, default_value_t = 3)]
    samples: usize,
    /// Chooses texts, numbers and depths.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The text that prompts are cut from, UTF-8.
    #[arg(long)]
    text: PathBuf,
    /// A folder for results.json and samples.jsonl.
    #[arg(long)]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, registry: &Registry) -> Result<()> {
    let tasks = Task::parse_list(&args.tasks)?;
    let policies = Registry::split_list(&args.policies)?;
    // Before the model is loaded: a typing error costs no wait. A sweep fills in what is missing.
    for text in policies.iter().filter(|text| args.sweep.is_empty() || !compare::sweepable(registry, text)) {
        registry.parse(text)?;
    }
    let text = read_text(&args.text)?;
    let mut hosted = args.model.load()?;
    // Text that is cut and put together again may make a few tokens more.
    args.model.reach(&mut hosted, args.context.iter().max().unwrap_or(&0).saturating_add(1024));
    let groups = compare::task_groups(&tasks);
    let cells = args.context.iter().flat_map(|&context| groups.iter().map(move |tasks| (context, tasks.clone())));
    let contests = cells.map(|(context, tasks)| contest(args, registry, &hosted, &policies, context, tasks));
    let plan = Plan { contests: contests.collect::<Result<_>>()?, samples: args.samples, seed: args.seed, text };
    check(&plan, &hosted, args.model.allow_long)?;

    let mut progress = Bar::new(args.out.as_deref())?;
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let rows = compare::run(&hosted, &plan, &mut progress)?;
    progress.finish()?;
    println!("{}", table::comparison(&rows, &tasks));
    if let Some(dir) = &args.out {
        let report = report(&hosted, &plan, started, rows)?;
        write_json(&dir.join("results.json"), &report)?;
        eprintln!("{} and samples.jsonl written", dir.join("results.json").display());
    }
    Ok(())
}

fn contest(
    args: &Args,
    registry: &Registry,
    hosted: &Hosted,
    policies: &[&str],
    context: usize,
    tasks: Vec<Task>,
) -> Result<Contest> {
    let mut contenders = vec![];
    for text in policies {
        if args.sweep.is_empty() || !compare::sweepable(registry, text) {
            contenders.push(Contender { label: text.to_string(), policy: registry.parse(text)? });
            continue;
        }
        for &ratio in &args.sweep {
            match compare::fit(registry, text, &hosted.spec(), tasks[0], context, ratio) {
                Ok(policy) => contenders.push(Contender { label: format!("{text} @{ratio}x"), policy }),
                Err(kvpolicy::Error::OutOfReach(what)) => {
                    eprintln!("left out at context {context}: {text} @{ratio}x {what}")
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(Contest { context, tasks, contenders })
}

/// What would fail after minutes fails now.
fn check(plan: &Plan, hosted: &Hosted, allow_long: bool) -> Result<()> {
    let most = hosted.max_context();
    for contest in &plan.contests {
        let context = contest.context;
        ensure!(
            context <= most || allow_long,
            "context={context} exceeds the {most} tokens the model was made for; allow it with --allow-long"
        );
        for contender in &contest.contenders {
            hosted.lm.session(contender.policy.clone(), &hosted.options)?;
        }
    }
    Ok(())
}

fn report(hosted: &Hosted, plan: &Plan, started: u64, rows: Vec<compare::Row>) -> Result<Report> {
    Ok(Report {
        schema: SCHEMA,
        version: env!("CARGO_PKG_VERSION").to_string(),
        started,
        command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        model: hosted.lm.name().to_string(),
        model_sha256: hosted.lm.sha256()?,
        dtype: hosted.lm.dtype().as_str().to_string(),
        kv_dtype: hosted.options.kv_dtype(hosted.lm.model()).as_str().to_string(),
        text_sha256: Sha256::digest(plan.text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect(),
        seed: plan.seed,
        host: Host {
            platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: cpu_name(),
            threads: rayon::current_num_threads(),
            device: device_name(hosted.lm.model().device())?,
        },
        rows,
    })
}

/// Linux says; elsewhere it stays empty.
fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split(':').nth(1)).unwrap_or_default().trim().to_string()
}

fn write_json(path: &Path, report: &Report) -> Result<()> {
    let file = File::create(path).with_context(|| path.display().to_string())?;
    let mut out = BufWriter::new(file);
    serde_json::to_writer_pretty(&mut out, report).with_context(|| path.display().to_string())?;
    out.flush().with_context(|| path.display().to_string())
}

/// A progress bar, and the file of samples.
struct Bar {
    bar: ProgressBar,
    samples: Option<BufWriter<File>>,
}

impl Bar {
    fn new(out: Option<&Path>) -> Result<Self> {
        let open = |dir: &Path| -> Result<BufWriter<File>> {
            std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
            let path = dir.join("samples.jsonl");
            Ok(BufWriter::new(File::create(&path).with_context(|| path.display().to_string())?))
        };
        let bar = ProgressBar::no_length();
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed}<{eta} {wide_msg}")?);
        Ok(Self { bar, samples: out.map(open).transpose()? })
    }

    fn finish(&mut self) -> Result<()> {
        self.bar.finish_and_clear();
        self.samples.iter_mut().try_for_each(|file| file.flush()).context("samples.jsonl")
    }
}

impl Progress for Bar {
    fn start(&mut self, units: u64) {
        self.bar.set_length(units);
    }

    fn unit(&mut self, what: &str) {
        self.bar.set_message(what.to_string());
    }

    fn sample(&mut self, sample: &Sample) -> kvpolicy::Result<()> {
        self.bar.inc(1);
        let Some(file) = &mut self.samples else { return Ok(()) };
        let write = |file: &mut BufWriter<File>| -> std::io::Result<()> {
            serde_json::to_writer(&mut *file, sample)?;
            writeln!(file)
        };
        write(file).map_err(|e| kvpolicy::Error::Host(format!("samples.jsonl: {e}").into()))
    }
}
