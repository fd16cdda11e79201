use crate::{
    model::{ModelArgs, device_name, kv_name},
    report,
    results::Results,
    table::{self, read_text},
};
use anyhow::{Context, Result, ensure};
use candle_core::DType;
use indicatif::{ProgressBar, ProgressStyle};
use kvpolicy::{
    KvCache, Policy, Registry,
    compare::{
        self, Asked, Contender, Contest, Host, Plan, Planned, Progress, Report, SCHEMA, Sample, Subject, Task,
        benchmark::{Benchmark, Exam, Sampling, check_exams},
    },
};
use kvpolicy_candle::Hosted;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// The options of `kvpolicy compare`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Policies, separated by `;`. `full` is the measure of the others. [default: some well-known ones]
    #[arg(long)]
    policies: Option<String>,
    /// What to measure: ppl, kl, token-match, needle, needle-multikey, needle-multivalue, needle-multiquery, word-key,
    /// variable-tracking, common-words, state, recall, chain, speed, and the benchmarks of --file. From needle to state the
    /// policy compresses before it sees the question; with -aware behind the name, after [default: ppl,kl,needle,speed;
    /// without --model recall,chain].
    #[arg(long)]
    tasks: Option<String>,
    /// Context lengths in tokens.
    #[arg(long, value_delimiter = ',', default_value = "1024")]
    context: Vec<usize>,
    /// Compression ratios: each policy's budget is set so that all hold the same mean number of entries [default: none;
    /// without --model and --policies 4].
    #[arg(long, value_delimiter = ',')]
    sweep: Vec<f64>,
    /// Texts per context, prompts per context, repetitions of a timing [default: 3, without --model 8], or the first questions of
    /// a benchmark [default: all].
    #[arg(long)]
    samples: Option<usize>,
    /// Chooses texts, numbers and depths.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The text that prompts of ppl, kl, token-match and needles are cut from, UTF-8; the other tasks make up their own, and so does speed
    /// where there is none.
    #[arg(long)]
    text: Option<PathBuf>,
    /// The file of a benchmark among the tasks (gsm8k, math-500, aime, gpqa-diamond, humaneval, livecodebench), JSON lines as it
    /// is published; --context bounds question and answer together.
    #[arg(long, value_name = "TASK=PATH")]
    file: Vec<String>,
    /// Answers to each question of a benchmark; its figure is their mean (pass@1).
    #[arg(long, requires = "file", default_value_t = 1)]
    repeats: usize,
    /// What answers to benchmarks are drawn at; 0 takes the most likely token.
    #[arg(long, requires = "file", default_value_t = 0.0)]
    temperature: f64,
    /// Run the Python programs that the model writes for humaneval and livecodebench. They get a process with limits on time,
    /// memory and output, but no sandbox: they can do what you can.
    #[arg(long, requires = "file")]
    allow_exec: bool,
    /// A folder for results.json, samples.jsonl, and a report to look at: report.html, report.md and its pictures.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Go on with a run that was stopped, from its folder `--out`.
    #[arg(long, requires = "out")]
    resume: bool,
}

/// A model of some runtime that policies can be compared on.
pub trait Compared {
    /// What the tasks run over.
    fn subject(&self) -> &dyn Subject;
    /// What the results say of it.
    ///
    /// # Errors
    /// If it cannot be found out.
    fn about(&self) -> Result<About>;
    /// Whether a policy can run on it.
    ///
    /// # Errors
    /// Every reason why it cannot.
    fn check(&self, policy: &Arc<dyn Policy>) -> Result<()>;
    /// SHA-256 of the gates that a policy decides by, if any.
    ///
    /// # Errors
    /// If they cannot be read.
    fn gates_sha256(&self, policy: &Arc<dyn Policy>) -> Result<Option<String>>;
}

/// What the results say of a model.
#[derive(Debug, Clone)]
pub struct About {
    /// Its name.
    pub model: String,
    /// SHA-256 of its weights.
    pub sha256: String,
    /// Type of its activations.
    pub dtype: DType,
    /// Whether its matrices are quantized.
    pub quantized: bool,
    /// SHA-256 of what makes tokens of text.
    pub tokenizer_sha256: String,
    /// Type of stored keys and values.
    pub kv_dtype: DType,
    /// `cpu`, or the GPU's own name.
    pub device: String,
}

impl Compared for Hosted {
    fn subject(&self) -> &dyn Subject {
        self
    }

    fn about(&self) -> Result<About> {
        Ok(About {
            model: self.lm.name().to_string(),
            sha256: self.lm.sha256()?,
            dtype: self.lm.dtype(),
            quantized: self.lm.model().is_quantized(),
            tokenizer_sha256: self.lm.tokenizer_sha256()?,
            kv_dtype: self.options.kv_dtype(self.lm.model()),
            device: device_name(self.lm.model().device())?,
        })
    }

    fn check(&self, policy: &Arc<dyn Policy>) -> Result<()> {
        self.lm.session(policy.clone(), &self.options)?;
        Ok(())
    }

    fn gates_sha256(&self, policy: &Arc<dyn Policy>) -> Result<Option<String>> {
        if KvCache::gate_source(&**policy, &self.subject().spec())?.is_none() {
            return Ok(None);
        }
        Ok(self.lm.gates_for(&**policy)?.map(|gates| gates.sha256()).transpose()?)
    }
}

/// What is compared where the command line does not say.
struct Defaults {
    tasks: &'static str,
    policies: &'static str,
    sweep: &'static [f64], // of the policies above
    samples: usize,
}

const DEFAULTS: Defaults = Defaults {
    tasks: "ppl,kl,needle,speed",
    policies: "full;window:size=256,sinks=4;h2o:budget=256;tova:budget=256;snapkv:budget=256",
    sweep: &[],
    samples: 3,
};

/// With the model inside the program: done within a minute on two cores.
const DEMO_DEFAULTS: Defaults = Defaults {
    tasks: "recall,chain",
    policies: "full;window:sinks=4;h2o;tova;snapkv;knorm;dms",
    sweep: &[4.0],
    samples: 8,
};

/// The command line, filled in.
struct Request<'a> {
    tasks: Vec<Task>,
    policies: Vec<&'a str>,
    sweep: &'a [f64],
    samples: usize,
}

impl<'a> Request<'a> {
    fn new(args: &'a Args) -> Result<Self> {
        let defaults = if args.model.model.is_some() { &DEFAULTS } else { &DEMO_DEFAULTS };
        // A sweep would replace the budgets of policies that were written out.
        let sweep = if args.policies.is_none() && args.sweep.is_empty() { defaults.sweep } else { &args.sweep };
        Ok(Self {
            tasks: Task::parse_list(args.tasks.as_deref().unwrap_or(defaults.tasks))?,
            policies: Registry::split_list(args.policies.as_deref().unwrap_or(defaults.policies))?,
            sweep,
            samples: args.samples.unwrap_or(defaults.samples),
        })
    }

    fn is_swept(&self, registry: &Registry, policy: &str) -> bool {
        !self.sweep.is_empty() && compare::sweepable(registry, policy)
    }
}

pub(crate) fn run(args: &Args, registry: &Registry) -> Result<()> {
    compare(args, registry, |model, longest| {
        let mut hosted = model.load()?;
        model.reach(&mut hosted, longest);
        Ok(Box::new(hosted))
    })
}

/// Compares policies as `kvpolicy compare` does, on a model that `load` makes of its options; sequences will not have more
/// tokens than it is told, unless the model was made for more.
///
/// # Errors
/// What is wrong with the options, and whatever stops the model.
pub fn compare(
    args: &Args,
    registry: &Registry,
    load: impl FnOnce(&ModelArgs, usize) -> Result<Box<dyn Compared>>,
) -> Result<()> {
    let clock = Instant::now();
    let request = Request::new(args)?;
    // Before the model is loaded: a typing error costs no wait. A sweep fills in what is missing.
    for text in request.policies.iter().filter(|text| !request.is_swept(registry, text)) {
        registry.parse(text)?;
    }
    let text = args.text.as_deref().map(read_text).transpose()?;
    compare::check_text(&request.tasks, text.as_deref())?;
    let exams = args.file.iter().map(|file| exam(file, args)).collect::<Result<Vec<_>>>()?;
    let sampling = Sampling { repeats: args.repeats, temperature: args.temperature, allow_exec: args.allow_exec };
    check_exams(&request.tasks, &exams, &sampling)?;
    // Text that is cut and put together again may make a few tokens more.
    let hosted = load(&args.model, args.context.iter().max().unwrap_or(&0).saturating_add(1024))?;
    let subject = hosted.subject();
    let groups = compare::task_groups(&request.tasks);
    let cells = args.context.iter().flat_map(|&context| groups.iter().map(move |tasks| (context, tasks.clone())));
    let contests = cells.map(|(context, tasks)| contest(&request, registry, subject, context, tasks));
    let (contests, samples, seed) = (contests.collect::<Result<_>>()?, request.samples, args.seed);
    let plan = Plan { contests, samples, seed, text, exams, sampling };
    check(&plan, &*hosted, args.model.allow_long)?;

    let mut head = head(hosted.about()?, gates(&*hosted, &plan)?, &plan);
    let (results, done) = match &args.out {
        Some(dir) if args.resume => {
            let (results, done) = Results::resume(dir, &head)?;
            (Some(results), done)
        }
        Some(dir) => (Some(Results::create(dir, &head)?), vec![]),
        None => (None, vec![]),
    };
    let mut progress = Bar::new(results)?;
    head.rows = compare::run(subject, &plan, done, &mut progress)?;
    let results = progress.finish();
    println!("{}", table::comparison(&head.rows, &request.tasks));
    eprintln!("{} in {:.1} s", head.model, clock.elapsed().as_secs_f64());
    if let (Some(dir), Some(results)) = (&args.out, results) {
        results.write(&head)?;
        results.write_traces(&compare::trace(subject, &plan)?)?;
        report::write(dir)?;
        eprintln!("results and report.html written to {}", dir.display());
    }
    Ok(())
}

/// The file of `--file task=path`, or what `--samples` leaves of it.
fn exam(file: &str, args: &Args) -> Result<Exam> {
    let (task, path) = file.split_once('=').with_context(|| format!("--file {file}: write TASK=PATH"))?;
    let text = read_text(Path::new(path))?;
    let mut exam = Exam::read(Benchmark::named(task)?, &text, args.seed, sha256(&text)).context(path.to_string())?;
    exam.questions.truncate(args.samples.unwrap_or(usize::MAX));
    Ok(exam)
}

fn contest(
    request: &Request,
    registry: &Registry,
    subject: &dyn Subject,
    context: usize,
    tasks: Vec<Task>,
) -> Result<Contest> {
    let mut contenders = vec![];
    for text in &request.policies {
        if !request.is_swept(registry, text) {
            contenders.push(Contender { label: text.to_string(), policy: registry.parse(text)? });
            continue;
        }
        for &ratio in request.sweep {
            match compare::fit(registry, text, &subject.spec(), tasks[0], context, ratio) {
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
fn check(plan: &Plan, hosted: &dyn Compared, allow_long: bool) -> Result<()> {
    compare::check_subject(hosted.subject(), plan)?;
    let most = hosted.subject().max_context();
    for contest in &plan.contests {
        let context = contest.context;
        ensure!(
            context <= most || allow_long,
            "context={context} exceeds the {most} tokens the model was made for; allow it with --allow-long"
        );
        for contender in &contest.contenders {
            hosted.check(&contender.policy)?;
        }
    }
    Ok(())
}

/// What is known before the first run.
fn head(about: About, gates: BTreeMap<String, String>, plan: &Plan) -> Report {
    Report {
        schema: SCHEMA,
        version: env!("CARGO_PKG_VERSION").to_string(),
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        command: std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        model: about.model,
        model_sha256: about.sha256,
        dtype: about.dtype.as_str().to_string(),
        quantized: about.quantized,
        tokenizer_sha256: about.tokenizer_sha256,
        gates,
        kv_dtype: kv_name(about.kv_dtype).to_string(),
        text_sha256: plan.text.as_deref().map_or_else(String::new, sha256),
        seed: plan.seed,
        samples: plan.samples,
        exams: plan.exams.iter().map(|exam| (exam.benchmark.to_string(), asked(exam))).collect(),
        repeats: plan.sampling.repeats,
        temperature: plan.sampling.temperature,
        contests: Planned::of(plan),
        host: Host {
            platform: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: cpu_name(),
            threads: rayon::current_num_threads(),
            device: about.device,
        },
        rows: vec![],
    }
}

/// The hash of the gates of each policy that asks for some.
fn gates(model: &dyn Compared, plan: &Plan) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for Contender { policy, .. } in plan.contests.iter().flat_map(|contest| &contest.contenders) {
        let name = policy.to_string();
        if !all.contains_key(&name)
            && let Some(sha256) = model.gates_sha256(policy)?
        {
            all.insert(name, sha256);
        }
    }
    Ok(all)
}

fn asked(exam: &Exam) -> Asked {
    Asked { sha256: exam.sha256.clone(), questions: exam.questions.len() }
}

fn sha256(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Linux says; elsewhere it stays empty.
fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split(':').nth(1)).unwrap_or_default().trim().to_string()
}

/// A progress bar, and the folder that samples go to.
struct Bar {
    bar: ProgressBar,
    begun: u64, // units
    results: Option<Results>,
}

impl Bar {
    fn new(results: Option<Results>) -> Result<Self> {
        let bar = ProgressBar::no_length();
        bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed}<{eta} {wide_msg}")?);
        Ok(Self { bar, begun: 0, results })
    }

    fn finish(self) -> Option<Results> {
        self.bar.finish_and_clear();
        self.results
    }
}

impl Progress for Bar {
    fn start(&mut self, units: u64) {
        self.bar.set_length(units);
    }

    fn unit(&mut self, what: &str) {
        self.bar.set_position(self.begun);
        self.begun += 1;
        self.bar.set_message(what.to_string());
    }

    fn sample(&mut self, sample: &Sample) -> kvpolicy::Result<()> {
        let added = self.results.as_mut().map_or(Ok(()), |results| results.add(sample));
        added.map_err(|e| kvpolicy::Error::Host(format!("samples.jsonl: {e}").into()))
    }
}
