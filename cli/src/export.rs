//! `kvpolicy export`: a model with its gates as a folder of Hugging Face's, or the gates alone.

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use kvpolicy_candle::{Export, GateLayout, Lm, LoadOptions, Merged, extract_gates};
use std::path::PathBuf;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// The model, with fields `dms_*` in config.json and an adapter's tensors beside the model's.
    HfNvidia,
    /// The model, with `dms_metadata.json` and a borrowed neuron, as FastDMS reads them.
    HfShisa,
    /// The gates of a model folder alone, for `dms:weights=`.
    Gates,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A folder of safetensors, a GGUF file, or a hub id (org/name, org/name/file.gguf) [default: `demo`, a small model
    /// inside the program]. It takes 4 bytes of memory for each weight.
    #[arg(long)]
    model: Option<String>,
    /// A folder as `retrofit --out` writes it, a safetensors file with its config.json beside it, or the name of gates that
    /// the program brings [default: the model's own, or those the program brings for it].
    #[arg(long)]
    gates: Option<PathBuf>,
    /// What to write [default: the model, in the layout that its gates were trained for].
    #[arg(long, value_enum)]
    to: Option<Target>,
    /// The folder to write: empty, or not there yet.
    #[arg(long)]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let layout = match args.to {
        Some(Target::Gates) => return gates(args),
        Some(Target::HfNvidia) => Some(GateLayout::Nvidia),
        Some(Target::HfShisa) => Some(GateLayout::Shisa),
        None => None,
    };
    let export = Export { gates: args.gates.clone(), layout, out: args.out.clone() };
    export.check()?;
    let options = LoadOptions { dequantize: true, ..LoadOptions::default() };
    let lm = match &args.model {
        Some(model) => Lm::load(model, &options)?,
        None => Lm::embedded(&options)?,
    };
    let done = export.run(&lm)?;
    let training = match done.merged {
        Merged::Nothing => String::new(),
        Merged::Weights(tensors) => format!(", {tensors} of them trained"),
        Merged::Adapter(tensors) => format!(", an adapter added to {tensors} of them"),
    };
    println!(
        "{}: {} tensors in bf16{training}; {} of gates, layout {}",
        args.out.display(),
        done.tensors,
        done.gate_tensors,
        done.layout
    );
    Ok(())
}

fn gates(args: &Args) -> Result<()> {
    ensure!(args.gates.is_none(), "--gates names gates that are files of their own: they need no `--to gates`");
    let model = args.model.as_ref().context("--to gates takes the gates out of a folder: name it with --model")?;
    let tensors = extract_gates(model, &args.out)?;
    println!("{0}: {tensors} tensors of gates; use them by `dms:weights={0}`", args.out.display());
    Ok(())
}
