//! `kvpolicy export`: a model with its gates as a folder of Hugging Face's.

use anyhow::Result;
use clap::ValueEnum;
use kvpolicy_candle::{Export, GateLayout, Lm, LoadOptions, Merged};
use std::path::PathBuf;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Layout {
    /// Fields `dms_*` in config.json, an adapter's tensors beside the model's.
    Nvidia,
    /// `dms_metadata.json` and a borrowed neuron, as FastDMS reads them.
    Shisa,
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
    /// Who must be able to read the gates [default: those they were trained for].
    #[arg(long, value_enum)]
    layout: Option<Layout>,
    /// The folder to write: empty, or not there yet.
    #[arg(long)]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let layout = args.layout.map(|layout| match layout {
        Layout::Nvidia => GateLayout::Nvidia,
        Layout::Shisa => GateLayout::Shisa,
    });
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
