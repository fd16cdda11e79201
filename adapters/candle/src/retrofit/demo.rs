//! The embedded model: a small decoder trained from nothing on the problems of [`kvpolicy::compare::problems`].

use super::{
    run::Observer,
    save::write_model,
    scratch::next_token_gradients,
    text::{Sequence, Source, numbers},
};
use crate::{
    config::Config,
    demo,
    error::{Error, Result},
    model::Model,
};
use candle_core::{DType, Device};
use kvpolicy::{
    compare::problems::{self, Problem},
    retrofit::{AdamW, AdamWConfig, Named, Rate},
};
use rand::Rng;
use serde_json::{Value, json};
use std::{collections::HashSet, path::Path, time::Instant};

/// Its shape, as `config.json` has it.
pub const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_size": 256,
  "intermediate_size": 512,
  "num_hidden_layers": 4,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 64,
  "vocab_size": 257,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1000000.0,
  "max_position_embeddings": 2048,
  "tie_word_embeddings": true,
  "hidden_act": "silu",
  "eos_token_id": 256,
  "torch_dtype": "bfloat16"
}"#;

/// The token that ends a text.
const END: u32 = 256;

/// Problems, a half of each kind, as long as the sequence.
#[derive(Debug, Clone, Copy)]
pub struct Problems {
    /// Weight of all that is no answer together. What must be looked up to answer has 1 together, whatever the problem: a
    /// walk repeats the same words in every line, and they would drown the few that matter.
    pub others: f32,
    /// Chooses problems.
    pub seed: u64,
}

impl Source for Problems {
    fn sequence(&self, number: u64, length: usize) -> Result<Sequence> {
        let mut rng = numbers(self.seed, number);
        let make = if rng.random_bool(0.5) { problems::recall } else { problems::chain };
        Ok(laid_out(&make(&mut rng, length.saturating_sub(1)), self.others, length))
    }

    fn check(&self, length: usize) -> Result<()> {
        if length > problems::MIN_BYTES {
            return Ok(());
        }
        Err(Error::Model(format!("sequences of {length} bytes are too short: more than {}", problems::MIN_BYTES)))
    }

    fn settings(&self) -> Value {
        json!({ "problems": self.seed, "others": self.others as f64 })
    }
}

/// A problem with its answers and the end, padded. A position has the weight of what follows it.
fn laid_out(problem: &Problem, others: f32, length: usize) -> Sequence {
    let mut tokens: Vec<u32> = problem.text().bytes().map(u32::from).collect();
    let mut wanted = vec![];
    let mut at = problem.context.len();
    for turn in &problem.turns {
        at += turn.question.len();
        wanted.extend(looked_up(&turn.answer, &problem.context).map(|i| at + i));
        at += turn.answer.len();
    }
    tokens.push(END);
    let mut weights = vec![others / tokens.len() as f32; tokens.len()];
    for &i in &wanted {
        weights[i] = 1.0 / wanted.len() as f32;
    }
    tokens.resize(length, END);
    weights.resize(length, 0.0);
    weights.rotate_left(1);
    Sequence { tokens, weights }
}

/// The bytes of an answer that belong to words of the context.
fn looked_up(answer: &str, context: &str) -> impl Iterator<Item = usize> {
    let is_word = |c: char| c.is_ascii_alphanumeric();
    let known: HashSet<&str> = context.split(|c| !is_word(c)).collect();
    let mut bytes = vec![];
    let mut at = 0;
    for word in answer.split(|c| !is_word(c)) {
        if !word.is_empty() && known.contains(word) {
            bytes.extend(at..at + word.len());
        }
        at += word.len() + 1;
    }
    bytes.into_iter()
}

/// How the weights are trained.
#[derive(Debug, Clone, Copy)]
pub struct DemoConfig {
    /// Steps and learning rate.
    pub rate: Rate,
    /// Tokens of a step.
    pub batch_tokens: usize,
    /// Tokens of the longest sequences.
    pub context: usize,
    /// Chooses weights and problems.
    pub seed: u64,
}

/// What is trained on: short problems alone until they are solved. Looking up what was read is found there or not at all,
/// and then goes on to hold for long ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Short,
    All,
}

/// The loss below which the model looks up what it read: guessing among a few facts is twice as far off and more, and a
/// fifth of this is what cannot be foreseen.
const SOLVED: f64 = 0.1;

impl DemoConfig {
    /// Bytes of a step's problems.
    fn length(&self, stage: Stage, step: u64) -> usize {
        match (stage, step % 8) {
            (Stage::Short, _) | (_, 1) => self.context / 4,
            // Short ones go on, or they are forgotten.
            (_, 0) => self.context / 8 + 32,
            (_, 2 | 3) => self.context / 2,
            _ => self.context,
        }
    }

    /// The stage after a step: long problems come at half of the steps at the latest.
    fn stage(&self, now: Stage, step: u64, loss: f64) -> Stage {
        if loss < SOLVED || step >= self.rate.steps / 2 { Stage::All } else { now }
    }
}

/// Trains the weights and writes them to `dir` as a Hugging Face folder. `step` of the observer gets the loss of answers
/// as the divergence.
///
/// # Errors
/// Those of the tensor library; files that cannot be written.
pub fn train_demo(config: &DemoConfig, device: &Device, dir: &Path, observer: &mut dyn Observer) -> Result<Model> {
    config.rate.check()?;
    let dtype = if device.is_cuda() { DType::BF16 } else { DType::F32 };
    let mut model = Model::random(Config::from_json(CONFIG)?, dtype, device, config.seed)?;
    let adamw = AdamWConfig { weight_decay: 0.05, ..AdamWConfig::default() };
    let mut optimizer = AdamW::new(adamw, model.parameters()?)?;
    let source = Problems { others: 0.05, seed: config.seed };
    let (started, mut tokens) = (Instant::now(), 0);
    let batch = |stage: Stage, step: u64| {
        let length = config.length(stage, step);
        let sequences = (config.batch_tokens / length).max(1) as u64;
        // Numbers of their own for each step, whatever its length.
        let first = step << 20;
        (step < config.rate.steps).then(|| source.batch(first..first + sequences, length, device)).transpose()
    };
    let mut stage = Stage::Short;
    let mut next = batch(stage, 0)?;
    while let Some(now) = next {
        let step = optimizer.steps();
        let (gradients, loss) = next_token_gradients(&model, &now)?;
        let norm = optimizer.step(&gradients, |_| config.rate.at(step))?;
        model.set_parameters(optimizer.params())?;
        next = batch(stage, step + 1)?;
        tokens += (now.sequences * now.length) as u64;
        if step % 50 == 49 || step + 1 == config.rate.steps {
            let (loss, norm) = (loss.to_scalar::<f32>()? as f64, norm.to_scalar::<f32>()? as f64);
            if !loss.is_finite() {
                return Err(Error::Model(format!("the loss is no finite number at step {step}: take a lower rate")));
            }
            stage = config.stage(stage, step, loss);
            observer.step(&super::run::StepRecord {
                step: step + 1,
                tokens,
                divergence: loss,
                compression_loss: 0.0,
                evicted: 0.0,
                soft: 0.0,
                compression: 1.0,
                target: 1.0,
                rate: config.rate.at(step),
                gradient: norm,
                seconds: started.elapsed().as_secs_f64(),
            })?;
        }
    }
    save_demo(&model, &Named::new(), CONFIG, dir)?;
    Ok(model)
}

/// Writes a demo model, with its gates if it has some, and its tokenizer.
///
/// # Errors
/// [`Error::File`] naming the file that cannot be written.
pub fn save_demo(model: &Model, gates: &Named, config: &str, dir: &Path) -> Result<()> {
    let mut tensors = model.hf_tensors()?;
    tensors.extend(gates.clone());
    let files = [("config.json", config), ("tokenizer.json", demo::TOKENIZER)];
    write_model(dir, &tensors, &files.map(|(name, text)| (name, text.as_bytes().into())))
}
