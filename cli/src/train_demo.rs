//! `kvpolicy train-demo`: the embedded model, from nothing.

use crate::model::Place;
use anyhow::{Context, Result};
use kvpolicy::{
    PerGate,
    retrofit::{AdamWConfig, Rate, Schedule},
};
use kvpolicy_candle::{
    LoadOptions, Model,
    retrofit::{
        DEMO_CONFIG, DemoConfig, Divergence, Judged, Observer, Problems, RunConfig, Source, StepRecord, Trainee,
        dms_fields, run as train_gates, save_demo, train_demo,
    },
};
use serde_json::{Map, Value};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where it is trained: cpu, cuda, or cuda:N for a GPU of several.
    #[arg(long, default_value = "cpu")]
    device: Place,
    /// Steps of the weights.
    #[arg(long, default_value_t = 10_000)]
    steps: u64,
    /// Learning rate of the weights.
    #[arg(long, default_value_t = 1.5e-3)]
    rate: f64,
    /// Tokens of a step.
    #[arg(long, default_value_t = 65536)]
    batch_tokens: usize,
    /// Tokens of the longest problems.
    #[arg(long, default_value_t = 1024)]
    context: usize,
    /// Steps of the gates.
    #[arg(long, default_value_t = 1000)]
    gate_steps: u64,
    /// Learning rate of the gates.
    #[arg(long, default_value_t = 3e-4)]
    gate_rate: f64,
    /// Compression that the gates learn.
    #[arg(long, default_value_t = 5.0)]
    target_cr: f64,
    /// Tokens that stay whatever the gates say.
    #[arg(long, default_value_t = 32)]
    window: usize,
    /// Chooses weights, problems and noise.
    #[arg(long, default_value_t = 3)]
    seed: u64,
    /// Train gates only, for the weights of this folder.
    #[arg(long)]
    from: Option<PathBuf>,
    /// The folder of the model.
    #[arg(long)]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let device = args.device.device()?;
    let model = match &args.from {
        Some(dir) => Model::from_dir(dir, &LoadOptions::on(device.clone()))?.0,
        None => train_demo(&args.weights(), &device, &args.out, &mut Lines("weights"))?,
    };

    let gates = args.gates();
    let trainee = Trainee::new(&model, gates.gates(), gates.scale, gates.offset);
    let problems = Problems { others: 1.0, seed: args.seed + 1 };
    let params = train_gates(&trainee, &problems, &gates, &args.out.join("gates"), false, &mut Lines("gates"))?;
    let held_out = [Problems { seed: args.seed + 2, ..problems }.batch(0..32, args.context, &device)?];
    let found = trainee.evaluate(&held_out, Judged::Gates(&params))?;
    println!("gates: {:.2}x, KL {:.4} nats/token, last quarter {:.4}", found.compression, found.kl, found.tail_kl);

    let mut fields: Map<String, Value> = serde_json::from_str(DEMO_CONFIG).context("the model's configuration")?;
    fields.extend(dms_fields(&trainee));
    save_demo(&model, &params, &(serde_json::to_string_pretty(&fields)? + "\n"), &args.out)?;
    println!("{} written", args.out.display());
    Ok(())
}

impl Args {
    fn weights(&self) -> DemoConfig {
        DemoConfig {
            rate: Rate { peak: self.rate, warmup: 200.min(self.steps), steps: self.steps },
            batch_tokens: self.batch_tokens,
            context: self.context,
            seed: self.seed,
        }
    }

    fn gates(&self) -> RunConfig {
        let anneal = (self.gate_steps * 2 / 3).max(1);
        let sequences = (self.batch_tokens / self.context.max(1)).max(1);
        RunConfig {
            schedule: Schedule { context: self.context, window: self.window, target: self.target_cr, anneal },
            rate: Rate { peak: self.gate_rate, warmup: 20.min(self.gate_steps), steps: self.gate_steps },
            weights_rate: 1.0,
            per: PerGate::Head,
            scale: 100.0,
            offset: 5.0,
            tau: 0.1,
            compression: 1.0,
            divergence: Divergence::Teacher,
            sequences,
            at_a_time: sequences,
            activations: 16 << 30,
            save_every: 500,
            seed: self.seed,
            optimizer: AdamWConfig::default(),
        }
    }
}

/// A line now and then.
struct Lines(&'static str);

impl Observer for Lines {
    fn step(&mut self, record: &StepRecord) -> kvpolicy_candle::Result<()> {
        if record.step.is_multiple_of(50) {
            eprintln!(
                "{} step {}: loss {:.4}, compression {:.2}x of {:.2}x, gradient {:.3}, {:.0} tokens/s",
                self.0,
                record.step,
                record.divergence,
                record.compression,
                record.target,
                record.gradient,
                record.tokens as f64 / record.seconds
            );
        }
        Ok(())
    }
}
