use anyhow::{Result, anyhow};
use kvpolicy::{Entry, Registry};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Show this policy only.
    name: Option<String>,
}

pub(crate) fn run(args: &Args, registry: &Registry) -> Result<()> {
    let Some(name) = &args.name else {
        registry.entries().iter().for_each(show);
        println!("Wrappers take a policy in parentheses: adakv(snapkv:budget=25%), every(8, tova:budget=256).");
        return Ok(());
    };
    let known = || registry.entries().iter().map(|e| e.info.name).collect::<Vec<_>>().join(", ");
    let entry = registry.entries().iter().find(|e| e.info.name == name);
    show(entry.ok_or_else(|| anyhow!("unknown policy `{name}` (known: {})", known()))?);
    Ok(())
}

fn show(entry: &Entry) {
    println!("{}  ({})", entry.info.name, entry.info.paper);
    paragraph(entry.info.doc, "    ");
    for param in &entry.info.params {
        let default = param.default.as_ref().map_or("required".to_string(), |d| format!("default {d}"));
        println!("    {} [{}; {default}]", param.name, param.accepts);
        paragraph(param.doc, "        ");
    }
    println!();
}

fn paragraph(text: &str, indent: &str) {
    text.lines().for_each(|line| println!("{indent}{}", line.trim()));
}
