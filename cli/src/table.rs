//! What people read.

use anyhow::{Context, Result, anyhow};
use comfy_table::{CellAlignment, Table, presets};
use kvpolicy::compare::{Metrics, Row, Task, wilson};
use std::path::Path;

/// A file that must be UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow!("{}: is not UTF-8 text (byte {at} is not); convert it first", path.display())
    })
}

/// Bytes with a unit.
pub(crate) fn bytes(n: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (0..units.len() - 1).find(|&i| n < 1024f64.powi(i as i32 + 1)).unwrap_or(units.len() - 1);
    format!("{:.*} {}", (step > 0) as usize, n / 1024f64.powi(step as i32), units[step])
}

/// One line per context and policy, one column per figure that was measured. Memory is over the policy's tasks: the largest
/// peak, the mean of means.
pub(crate) fn comparison(rows: &[Row], tasks: &[Task]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    let mut header = vec!["context", "policy", "compression", "KV peak", "KV mean"];
    header.extend(tasks.iter().flat_map(|task| columns(*task)));
    table.set_header(header);
    let mut lines: Vec<(usize, &str)> = vec![];
    for row in rows {
        if !lines.contains(&(row.context, &row.policy)) {
            lines.push((row.context, &row.policy));
        }
    }
    for (context, policy) in lines {
        let own: Vec<&Row> = rows.iter().filter(|r| r.context == context && r.policy == policy).collect();
        let mut cells = vec![
            context.to_string(),
            policy.to_string(),
            compression(&own),
            bytes(own.iter().map(|row| row.kv.peak_bytes).max().unwrap_or(0) as f64),
            bytes(own.iter().map(|row| row.kv.mean_bytes).sum::<f64>() / own.len() as f64),
        ];
        for task in tasks {
            let metrics = own.iter().find(|r| r.task == task.to_string()).map(|r| r.metrics.clone());
            cells.extend(figures(*task, &metrics.unwrap_or_default()));
        }
        table.add_row(cells);
    }
    table.column_iter_mut().enumerate().filter(|(i, _)| *i != 1).for_each(|(_, c)| {
        c.set_cell_alignment(CellAlignment::Right);
    });
    table
}

/// What the tasks have in common, or from the least to the most where they differ: gates keep what a text is worth.
fn compression(rows: &[&Row]) -> String {
    let ratios = rows.iter().map(|row| row.compression);
    let (least, most) = (ratios.clone().fold(f64::INFINITY, f64::min), ratios.fold(0.0, f64::max));
    if most > least * 1.05 { format!("{least:.2}-{most:.2}x") } else { format!("{least:.2}x") }
}

fn columns(task: Task) -> Vec<&'static str> {
    match task {
        Task::Ppl => vec!["ppl"],
        Task::Kl => vec!["KL nats/token"],
        Task::Needle => vec!["needle"],
        Task::NeedleAware => vec!["needle-aware"],
        Task::WordKey => vec!["word-key"],
        Task::WordKeyAware => vec!["word-key-aware"],
        Task::Recall => vec!["recall"],
        Task::Chain => vec!["chain"],
        Task::Speed => vec!["prefill tok/s", "decode tok/s"],
    }
}

fn figures(task: Task, metrics: &Metrics) -> Vec<String> {
    let number = |x: Option<f64>, digits: usize| x.map_or("-".to_string(), |x| format!("{x:.digits$}"));
    match task {
        Task::Ppl => vec![number(metrics.ppl, 3)],
        Task::Kl => vec![number(metrics.kl, 4)],
        Task::Needle | Task::NeedleAware | Task::WordKey | Task::WordKeyAware | Task::Recall | Task::Chain => {
            let counts = metrics.correct.zip(metrics.questions);
            vec![counts.map_or("-".to_string(), |(correct, questions)| score(correct, questions))]
        }
        Task::Speed => vec![number(metrics.prefill_tokens_per_s, 1), number(metrics.decode_tokens_per_s, 1)],
    }
}

/// Right answers with what their share may be: `87/100 (79-92%)`.
fn score(correct: u64, questions: u64) -> String {
    let interval = wilson(correct, questions);
    let percent = interval.map(|[least, most]| format!(" ({:.0}-{:.0}%)", 100.0 * least, 100.0 * most));
    format!("{correct}/{questions}{}", percent.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_score_says_how_sure_it_is() {
        let printed = [(87, 100), (0, 2), (2, 2), (0, 0)].map(|(correct, questions)| super::score(correct, questions));
        assert_eq!(printed, ["87/100 (79-92%)", "0/2 (0-66%)", "2/2 (34-100%)", "0/0"]);
    }

    #[test]
    fn bytes_are_readable() {
        let printed: Vec<String> = [0.0, 1023.0, 1024.0, 1.5 * 1024.0 * 1024.0].map(super::bytes).to_vec();
        assert_eq!(printed, ["0 B", "1023 B", "1.0 KiB", "1.5 MiB"]);
    }
}
