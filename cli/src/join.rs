use crate::{results::read_report, table};
use anyhow::{Context, Result, bail};
use kvpolicy::compare::{Report, Row};
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Files that `compare --out` wrote: results of the same model, seed and text.
    #[arg(required = true)]
    results: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut read: Vec<(&Path, Report)> = vec![];
    let mut rows: Vec<Row> = vec![];
    for path in &args.results {
        let report = read_report(path)?;
        read.iter().try_for_each(|(earlier, other)| check_alike((earlier, other), (path, &report)))?;
        // A task that nobody knows is one of this file.
        table::tasks(&report.rows).with_context(|| path.display().to_string())?;
        report.rows.iter().for_each(|row| add(&mut rows, row.clone(), path));
        read.push((path, report));
    }
    rows.sort_by_key(|row| row.context);
    println!("{}", table::comparison(&rows, &table::tasks(&rows)?));
    Ok(())
}

/// One table is of one model that was asked the same.
fn check_alike((a_path, a): (&Path, &Report), (b_path, b): (&Path, &Report)) -> Result<()> {
    let facts = |r: &Report| {
        [
            ("model_sha256", r.model_sha256.clone()),
            ("tokenizer_sha256", r.tokenizer_sha256.clone()),
            ("dtype", r.dtype.clone()),
            ("quantized", r.quantized.to_string()),
            ("kv_dtype", r.kv_dtype.clone()),
            ("seed", r.seed.to_string()),
            ("text_sha256", r.text_sha256.clone()),
            ("repeats and temperature", format!("{} at {}", r.repeats, r.temperature)),
        ]
    };
    for ((name, a), (_, b)) in facts(a).into_iter().zip(facts(b)) {
        // Tasks that make up their prompts leave the text empty.
        if a != b && !a.is_empty() && !b.is_empty() {
            bail!("{}: its {name} is {b}, that of {} is {a}", b_path.display(), a_path.display());
        }
    }
    match a.exams.iter().find(|(name, asked)| b.exams.get(*name).is_some_and(|other| other != *asked)) {
        Some((name, _)) => {
            bail!("{}: its {name} had other questions than that of {}", b_path.display(), a_path.display())
        }
        None => Ok(()),
    }
}

/// A row that an earlier file has too, as the `full` that every run is measured by, is shown once.
fn add(rows: &mut Vec<Row>, row: Row, path: &Path) {
    let is_same = |r: &Row| (&r.policy, &r.task, r.context) == (&row.policy, &row.task, row.context);
    if rows.iter().any(is_same) {
        let (path, Row { policy, task, context, .. }) = (path.display(), row);
        eprintln!("left out: {task} of {policy} at context {context} in {path}, which an earlier file has");
    } else {
        rows.push(row);
    }
}
