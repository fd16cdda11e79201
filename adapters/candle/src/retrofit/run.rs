//! A whole training: steps, checkpoints, the evaluation at its end.

use super::{
    evaluate::{Evaluation, Judged},
    save::{Checkpoint, save_gates, save_weights},
    text::Source,
    trainee::{Batch, Divergence, Losses, Objective, Trainee, is_gate},
};
use crate::error::{Error, Result};
use candle_core::Tensor;
use kvpolicy::{
    GateSpec, Lag, PerGate,
    retrofit::{AdamW, AdamWConfig, Named, Rate, Schedule, accumulate},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

/// What a training is told.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// Compression.
    pub schedule: Schedule,
    /// Steps and learning rate of the gates.
    pub rate: Rate,
    /// Learning rate of what learns beside them, over theirs.
    pub weights_rate: f64,
    /// Whether heads decide for themselves.
    pub per: PerGate,
    /// Factor of decision logits.
    pub scale: f64,
    /// Taken from them.
    pub offset: f64,
    /// Temperature of soft decisions.
    pub tau: f64,
    /// Weight of the compression loss.
    pub compression: f64,
    /// Direction of the divergence.
    pub divergence: Divergence,
    /// Sequences of a step.
    pub sequences: usize,
    /// Sequences at a time; gradients of a step are summed up.
    pub at_a_time: usize,
    /// Bytes of activations to keep for the backward pass: speed for memory.
    pub activations: usize,
    /// Steps from one checkpoint to the next.
    pub save_every: u64,
    /// Chooses noise; the corpus has its own seed.
    pub seed: u64,
    /// Of the optimizer.
    pub optimizer: AdamWConfig,
}

/// One step, as `train.jsonl` has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepRecord {
    /// Counted from 1.
    pub step: u64,
    /// Tokens seen so far.
    pub tokens: u64,
    /// Divergence from the dense model, nats per token.
    pub divergence: f64,
    /// Share of evictions that is missing.
    pub compression_loss: f64,
    /// Share of hard decisions to evict.
    pub evicted: f64,
    /// The same of soft ones.
    pub soft: f64,
    /// Compression at the end of a sequence with those hard decisions.
    pub compression: f64,
    /// Compression asked for.
    pub target: f64,
    /// Learning rate.
    pub rate: f64,
    /// Norm of the gradients before clipping.
    pub gradient: f64,
    /// Since this run began.
    pub seconds: f64,
}

impl StepRecord {
    /// The steps of a `train.jsonl`.
    ///
    /// # Errors
    /// [`Error::File`] naming the file and the line that is no step, or if there is none.
    pub fn read(path: &Path) -> Result<Vec<Self>> {
        let text = fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let step = |(i, line)| {
            serde_json::from_str(line).map_err(|e| Error::file(path, format!("line {} is no step: {e}", i + 1)))
        };
        let steps = lines.map(step).collect::<Result<Vec<Self>>>()?;
        if steps.is_empty() { Err(Error::file(path, "has no steps")) } else { Ok(steps) }
    }
}

/// Told of progress.
pub trait Observer {
    /// A step is done.
    ///
    /// # Errors
    /// Whatever keeps it from being written down.
    fn step(&mut self, record: &StepRecord) -> Result<()>;
}

impl RunConfig {
    /// The gates that will be trained.
    pub fn gates(&self) -> GateSpec {
        GateSpec { window: self.schedule.window as u32, lag: Lag::Previous, per: self.per, disable: false }
    }

    /// What a checkpoint must have in common with a training that goes on from it.
    fn settings(&self, trainee: &Trainee, source: &dyn Source) -> Value {
        let Schedule { context, window, target, anneal } = self.schedule;
        let Rate { peak, warmup, steps } = self.rate;
        let AdamWConfig { beta1, beta2, eps, weight_decay, clip } = self.optimizer;
        json!({
            "context": context, "window": window, "target-cr": target, "anneal": anneal, "steps": steps,
            "warmup": warmup, "rate": peak, "trains": format!("{:?}", trainee.trains()),
            "borrows": trainee.borrows(),
            "weights-rate": self.weights_rate, "per": format!("{:?}", self.per), "scale": self.scale,
            "offset": self.offset, "tau": self.tau, "compression": self.compression,
            "divergence": format!("{:?}", self.divergence), "sequences": self.sequences,
            "at-a-time": self.at_a_time, "seed": self.seed,
            "adamw": [beta1, beta2, eps, weight_decay, clip], "text": source.settings(),
        })
    }

    /// Refuses what cannot be trained.
    ///
    /// # Errors
    /// As [`Schedule::check`] and [`Rate::check`], and [`Error::Model`] for counts below 1 or factors that are no numbers.
    pub fn check(&self) -> Result<()> {
        self.schedule.check()?;
        self.rate.check()?;
        let Self { sequences, at_a_time, save_every, scale, offset, tau, compression, weights_rate, .. } = *self;
        if sequences == 0 || at_a_time == 0 || save_every == 0 {
            return Err(Error::Model(format!(
                "sequences={sequences}, at-a-time={at_a_time}, save-every={save_every}: 1 or more"
            )));
        }
        let positive = [tau, scale, weights_rate].iter().all(|x| x.is_finite() && *x > 0.0);
        if !(positive && offset.is_finite() && compression.is_finite() && compression >= 0.0) {
            return Err(Error::Model(format!(
                "tau={tau}, scale={scale}, weights-rate={weights_rate}, offset={offset}, compression={compression}: tau, \
                 scale and rates above 0, the weight of the compression loss not below it"
            )));
        }
        Ok(())
    }
}

/// Trains gates for a model, with checkpoints in `dir`. `resume`: goes on from the one there. Returns the parameters, by the
/// names of [`Trainee::fresh`]; [`finish`] writes them as gates.
///
/// # Errors
/// A configuration that cannot be met, text that is too short, a checkpoint of another training, a loss that is no number
/// (the last good checkpoint is named), files that cannot be written.
pub fn run(
    trainee: &Trainee,
    source: &dyn Source,
    config: &RunConfig,
    dir: &Path,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Named> {
    config.check()?;
    source.check(config.schedule.context)?;
    let mut optimizer = AdamW::new(config.optimizer, trainee.fresh(config.seed)?)?;
    let settings = config.settings(trainee, source);
    if resume {
        let checkpoint = Checkpoint::load(dir)?;
        same_settings(&checkpoint.settings, &settings)?;
        optimizer.restore(&checkpoint.state, &Checkpoint::path(dir))?;
    }
    let (started, steps) = (Instant::now(), config.rate.steps);
    let mut saved = resume;
    let batches = |step: u64| (step < steps).then(|| config.batches(source, step, trainee)).transpose();
    let mut next = batches(optimizer.steps())?;
    while let Some(now) = next {
        let step = optimizer.steps();
        let (gradients, losses) = config.gradients(trainee, optimizer.params(), &now, step)?;
        let gradient = optimizer.step(&gradients, |name| config.rate_of(name, step))?;
        // While the device works on this step: the text of the next.
        next = batches(step + 1)?;
        let record = config.record(step, &losses, &gradient, started)?;
        if !(record.divergence.is_finite() && record.gradient.is_finite()) {
            return Err(no_number(&record, saved.then(|| Checkpoint::path(dir))));
        }
        observer.step(&record)?;
        if (step + 1).is_multiple_of(config.save_every) || step + 1 == steps {
            Checkpoint { state: optimizer.state()?, settings: settings.clone() }.save(dir)?;
            saved = true;
        }
    }
    Ok(optimizer.params().clone())
}

/// Judges gates on held-out sequences and writes them with what was found.
///
/// # Errors
/// As [`run`].
pub fn finish(
    trainee: &Trainee,
    params: &Named,
    held_out: &[Batch],
    dir: &Path,
    mut about: Map<String, Value>,
) -> Result<Evaluation> {
    let evaluation = trainee.evaluate(held_out, Judged::Gates(params))?;
    let found = serde_json::to_value(&evaluation).map_err(|e| Error::file(dir, e))?;
    about.insert("kvpolicy_evaluation".into(), found);
    save_gates(dir, trainee, params, about)?;
    save_weights(dir, trainee, params)?;
    Ok(evaluation)
}

impl RunConfig {
    fn rate_of(&self, name: &str, step: u64) -> f64 {
        let rate = self.rate.at(step);
        if is_gate(name) { rate } else { rate * self.weights_rate }
    }

    /// The sequences of a step, in the portions that are taken at a time.
    fn batches(&self, source: &dyn Source, step: u64, trainee: &Trainee) -> Result<Vec<Batch>> {
        let (first, all) = (step * self.sequences as u64, self.sequences as u64);
        source.batches(first..first + all, self.at_a_time, self.schedule.context, trainee.model().device())
    }

    /// Means over the portions of a step.
    fn gradients(
        &self,
        trainee: &Trainee,
        params: &Named,
        batches: &[Batch],
        step: u64,
    ) -> Result<(Named, Vec<Tensor>)> {
        let objective = Objective {
            tau: self.tau,
            evicted: self.schedule.evicted(step + 1),
            compression: self.compression,
            divergence: self.divergence,
            activations: self.activations,
        };
        let layers = trainee.model().config().layers as u64;
        let (mut sum, mut losses): (Named, Vec<Tensor>) = Default::default();
        for (part, batch) in batches.iter().enumerate() {
            let stream = (step * batches.len() as u64 + part as u64) * layers;
            let noise = |layer: usize| trainee.noise(batch, mix(self.seed, stream + layer as u64));
            let (gradients, Losses { divergence, compression, evicted, soft }) =
                trainee.gradients(params, batch, &objective, noise)?;
            let share = batch.sequences as f64 / self.sequences as f64;
            let scaled = gradients.into_iter().map(|(name, g)| Ok((name, (g * share)?))).collect::<Result<Named>>()?;
            accumulate(&mut sum, scaled)?;
            losses.push((Tensor::stack(&[divergence, compression, evicted, soft], 0)? * share)?);
        }
        Ok((sum, losses))
    }

    fn record(&self, step: u64, losses: &[Tensor], gradient: &Tensor, started: Instant) -> Result<StepRecord> {
        let sum = Tensor::stack(losses, 0)?.sum(0)?.to_vec1::<f32>()?;
        let [divergence, compression_loss, evicted, soft] = [0, 1, 2, 3].map(|i| sum[i] as f64);
        Ok(StepRecord {
            step: step + 1,
            tokens: (step + 1) * (self.sequences * self.schedule.context) as u64,
            divergence,
            compression_loss,
            evicted,
            soft,
            compression: self.schedule.reached(evicted),
            target: self.schedule.ratio(step + 1),
            rate: self.rate.at(step),
            gradient: gradient.to_scalar::<f32>()? as f64,
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}

/// A seed of its own for each stream.
fn mix(seed: u64, stream: u64) -> u64 {
    let z = seed.wrapping_mul(0xD134_2543_DE82_EF95) ^ stream.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (z ^ (z >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

/// `saved`: the checkpoint of this training, if there is one.
fn no_number(record: &StepRecord, saved: Option<PathBuf>) -> Error {
    let kept = match saved {
        Some(path) => format!("the last good checkpoint is {}", path.display()),
        None => "none was saved yet".into(),
    };
    Error::Model(format!(
        "the loss is no finite number at step {} (divergence {}, gradient {}); {kept}: go on from it with a lower rate",
        record.step, record.divergence, record.gradient
    ))
}

fn same_settings(then: &Value, now: &Value) -> Result<()> {
    let Value::Object(now) = now else { return Ok(()) };
    let changed = now.iter().filter(|(key, value)| then.get(key.as_str()) != Some(value));
    let changed: Vec<String> = changed
        .map(|(key, value)| format!("{key} was {} and is {value}", then.get(key.as_str()).unwrap_or(&Value::Null)))
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(Error::Model(format!("the checkpoint is of another training: {}", changed.join("; "))))
}
