//! `kvpolicy inspect`: what is in a checkpoint, and what policy it implies.

use crate::table;
use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use kvpolicy_candle::{GatesSummary, Inspection, LayerGates};
use std::collections::BTreeMap;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A model folder, one of gates, a safetensors file, a GGUF file, or a hub id (org/name, org/name/file.gguf).
    path: String,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let found = Inspection::of(&args.path)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        println!("{}", page(&found));
    }
    Ok(())
}

fn page(found: &Inspection) -> String {
    let bytes: u64 = found.files.iter().map(|(_, bytes)| bytes).sum();
    let mut lines = vec![format!(
        "{}: {} of tensors in {}",
        found.path.display(),
        table::bytes(bytes as f64),
        found.files.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
    )];
    if let Some(model) = &found.model {
        lines.push(format!(
            "{}: {} layers, hidden {}, feed-forward {}, {} query heads, {} KV heads of {}, vocabulary {}, context {}{}",
            model.architecture,
            model.layers,
            model.hidden,
            model.ffn,
            model.q_heads,
            model.kv_heads,
            model.head_dim,
            model.vocab,
            model.max_context,
            if model.tied { ", output tied to the embedding" } else { "" }
        ));
        lines.extend(model.windows.map(|(layers, size)| {
            format!("sliding window: {layers} layers hold {size} tokens each, whatever the policy is")
        }));
        lines.push(format!("keys and values: {} a token in 16 bits", table::bytes(model.kv_bytes(2) as f64)));
    }
    lines.extend(found.refused.iter().map(|why| format!("cannot run here: {why}")));
    let types = found.parameters();
    let list = types.iter().map(|(dtype, count)| format!("{} {dtype}", short(*count))).collect::<Vec<_>>().join(", ");
    lines.push(format!("{} parameters in {} tensors: {list}", short(types.values().sum()), found.tensors.len()));
    match &found.gates {
        Some(gates) => lines.extend([String::new(), of_gates(gates)]),
        None => lines.push("gates: none, so every policy but those that need some".into()),
    }
    lines.extend([String::new(), of_tensors(found)]);
    lines.join("\n")
}

fn of_gates(gates: &GatesSummary) -> String {
    let about = format!(
        "gates: {}'s layout, {}; window {}, a decision judges {} and holds for a {}; evicts where {} x - {} > 0{}\n\
         policy: {}\nin full: dms:window={},lag={},per={}",
        gates.layout,
        gates.source,
        gates.window,
        if gates.lag == "own" { "its own token" } else { "the token before its own" },
        gates.per,
        gates.scale,
        gates.offset,
        if gates.disabled { ", but eviction is switched off" } else { "" },
        gates.policy,
        gates.window,
        gates.lag,
        gates.per,
    );
    let list = |numbers: &[f64]| numbers.iter().map(|x| format!("{x:.3}")).collect::<Vec<_>>().join(" ");
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header([
        "layer",
        "norms by KV head",
        "biases",
        "mean of the norm's weight",
    ]);
    for LayerGates { layer, norms, biases, input_norm } in &gates.layers {
        let biases = biases.as_ref().map_or("-".into(), |biases| list(biases));
        let input = input_norm.map_or("-".into(), |mean| format!("{mean:.3}"));
        table.add_row([layer.to_string(), list(norms), biases, input]);
    }
    table.column_iter_mut().take(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    format!("{about}\n\n{table}")
}

/// Tensors that differ in their layer alone share a line.
fn of_tensors(found: &Inspection) -> String {
    let mut groups: BTreeMap<(String, &str, &[usize]), usize> = BTreeMap::new();
    for (name, tensor) in &found.tensors {
        *groups.entry((without_layer(name), &tensor.dtype, &tensor.shape)).or_default() += 1;
    }
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(["tensor", "type", "shape", "of them"]);
    for ((name, dtype, shape), count) in groups {
        table.add_row([name, dtype.to_string(), format!("{shape:?}"), count.to_string()]);
    }
    table.to_string()
}

fn without_layer(name: &str) -> String {
    let parts = name.split('.').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
    parts.collect::<Vec<_>>().join(".")
}

/// 1235 as 1.2k, 134500000 as 134.5M.
fn short(count: u64) -> String {
    [(1e9, "B"), (1e6, "M"), (1e3, "k")]
        .into_iter()
        .find(|(unit, _)| count as f64 >= *unit)
        .map_or(count.to_string(), |(unit, letter)| format!("{:.1}{letter}", count as f64 / unit))
}

#[cfg(test)]
mod tests {
    use super::{short, without_layer};

    #[test]
    fn layers_share_a_line() {
        assert_eq!(without_layer("model.layers.12.mlp.up_proj.weight"), "model.layers.*.mlp.up_proj.weight");
        assert_eq!(without_layer("blk.3.attn_q.weight"), "blk.*.attn_q.weight");
        assert_eq!(without_layer("lm_head.weight"), "lm_head.weight");
    }

    #[test]
    fn counts_are_short() {
        let shown = [7, 1235, 134_515_008, 8_190_735_360].map(short);
        assert_eq!(shown, ["7", "1.2k", "134.5M", "8.2B"]);
    }
}
