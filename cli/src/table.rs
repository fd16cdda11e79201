//! What people read.

use anyhow::{Context, Result, anyhow};
use comfy_table::{CellAlignment, Table, presets};
use kvpolicy::compare::{Against, Measure, Metrics, Row, Task, wilson};
use std::{fmt, path::Path};

/// A file that must be UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    utf8(std::fs::read(path).with_context(|| path.display().to_string())?, path)
}

/// The bytes of a file as text.
pub(crate) fn utf8(bytes: Vec<u8>, path: &Path) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow!("{}: is not UTF-8 text (byte {at} is not); convert it first", path.display())
    })
}

/// The tasks that rows are of, once each and in the order of their columns.
pub(crate) fn tasks<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Result<Vec<Task>> {
    let read = rows.into_iter().map(|row| Ok(Task::parse_list(&row.task)?));
    let mut tasks = read.collect::<Result<Vec<_>>>()?.concat();
    tasks.sort();
    tasks.dedup();
    Ok(tasks)
}

/// Bytes with a unit.
pub(crate) fn bytes(n: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (0..units.len() - 1).find(|&i| n < 1024f64.powi(i as i32 + 1)).unwrap_or(units.len() - 1);
    format!("{:.*} {}", (step > 0) as usize, n / 1024f64.powi(step as i32), units[step])
}

/// Figures of a comparison in lines, for any kind of table.
pub(crate) struct Figures {
    /// Of the columns.
    pub(crate) header: Vec<String>,
    /// One per context and policy.
    pub(crate) lines: Vec<Vec<String>>,
    /// What the marks in them mean; empty without any.
    pub(crate) marks: String,
}

/// One line per context and policy, one column per figure that was measured. Memory is over the policy's tasks: the largest
/// peak, the mean of means.
pub(crate) fn comparison(rows: &[Row], tasks: &[Task]) -> Figures {
    let mut header = ["context", "policy", "compression", "KV peak", "KV mean"].map(String::from).to_vec();
    header.extend(tasks.iter().flat_map(|task| columns(*task)));
    let mut named: Vec<(usize, &str)> = vec![];
    for row in rows {
        if !named.contains(&(row.context, &row.policy)) {
            named.push((row.context, &row.policy));
        }
    }
    let lines = named.into_iter().map(|(context, policy)| {
        let own: Vec<&Row> = rows.iter().filter(|r| r.context == context && r.policy == policy).collect();
        [vec![context.to_string(), policy.to_string()], cells(&own, tasks)].concat()
    });
    let is_used = |mark: &str| rows.iter().any(|row| marks(&row.against).contains(mark));
    let used = MEASURES.into_iter().filter(|(mark, ..)| is_used(mark));
    let used: Vec<String> = used.map(|(mark, _, policy)| format!("`{mark}` differs from {policy}")).collect();
    let marks = match used.is_empty() {
        true => String::new(),
        false => format!("{} (p < {SURE}, paired samples)", used.join(", ")),
    };
    Figures { header, lines: lines.collect(), marks }
}

/// What a policy held and scored at one context.
fn cells(own: &[&Row], tasks: &[Task]) -> Vec<String> {
    let mut cells = vec![
        compression(own),
        bytes(own.iter().map(|row| row.kv.peak_bytes).max().unwrap_or(0) as f64),
        bytes(own.iter().map(|row| row.kv.mean_bytes).sum::<f64>() / own.len() as f64),
    ];
    for task in tasks {
        let row = own.iter().find(|r| r.task == task.to_string());
        let mut figures = figures(*task, &row.map(|r| r.metrics.clone()).unwrap_or_default());
        // The last of `speed` is decode, which the difference is of; others have one figure.
        if let (Some(figure), Some(row)) = (figures.last_mut(), row) {
            *figure += &marks(&row.against);
        }
        cells.extend(figures);
    }
    cells
}

/// As a table of Markdown, which is also what the terminal shows.
impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN).set_header(&self.header).add_rows(&self.lines);
        table.column_iter_mut().enumerate().filter(|(i, _)| *i != 1).for_each(|(_, c)| {
            c.set_cell_alignment(CellAlignment::Right);
        });
        write!(f, "{table}")?;
        if self.marks.is_empty() { Ok(()) } else { write!(f, "\n\n{}", self.marks) }
    }
}

/// Differences that chance makes more rarely are marked.
const SURE: f64 = 0.05;
/// Marks of what figures are measured by.
const MEASURES: [(&str, Measure, &str); 2] = [("*", Measure::Full, "full"), ("^", Measure::Dms, "dms")];

/// Which of the policies that a figure is measured by it differs from.
fn marks(against: &[Against]) -> String {
    let differs = |measure| against.iter().any(|other| other.measure == Some(measure) && other.p < SURE);
    MEASURES.into_iter().filter(|(_, measure, _)| differs(*measure)).map(|(mark, ..)| mark).collect()
}

/// What the tasks have in common, or from the least to the most where they differ: gates keep what a text is worth.
fn compression(rows: &[&Row]) -> String {
    let ratios = rows.iter().map(|row| row.compression);
    let (least, most) = (ratios.clone().fold(f64::INFINITY, f64::min), ratios.fold(0.0, f64::max));
    if most > least * 1.05 { format!("{least:.2}-{most:.2}x") } else { format!("{least:.2}x") }
}

fn columns(task: Task) -> Vec<String> {
    match task {
        Task::Kl => vec!["KL nats/token".into()],
        Task::Speed => vec!["prefill tok/s".into(), "decode tok/s".into()],
        task => vec![task.to_string()],
    }
}

fn figures(task: Task, metrics: &Metrics) -> Vec<String> {
    let number = |x: Option<f64>, digits: usize| x.map_or("-".to_string(), |x| format!("{x:.digits$}"));
    match task {
        Task::Ppl => vec![number(metrics.ppl, 3)],
        // Rounding makes it less than 0 where nothing differs.
        Task::Kl => vec![number(metrics.kl.map(|kl| kl.max(0.0)), 4)],
        Task::TokenMatch => vec![metrics.token_match.map_or("-".to_string(), |share| format!("{:.1}%", 100.0 * share))],
        Task::Speed => vec![number(metrics.prefill_tokens_per_s, 1), number(metrics.decode_tokens_per_s, 1)],
        Task::Ask(..) | Task::Recall | Task::Chain | Task::Exam(_) => vec![score(metrics)],
    }
}

/// Right answers with what their share may be: `87/100 (79-92%)`; where parts count, the mean share that is right, `88%
/// (80-93%)`.
fn score(metrics: &Metrics) -> String {
    let percent = |[least, most]: [f64; 2]| format!(" ({:.0}-{:.0}%)", 100.0 * least, 100.0 * most);
    let interval = |interval: Option<[f64; 2]>| interval.map(percent).unwrap_or_default();
    match (metrics.score, metrics.correct.zip(metrics.questions)) {
        (Some(score), _) => format!("{:.0}%{}", 100.0 * score, interval(metrics.score_interval)),
        (None, Some((correct, questions))) => format!("{correct}/{questions}{}", interval(wilson(correct, questions))),
        (None, None) => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_says_how_sure_it_is() {
        let counted =
            |(correct, questions)| Metrics { correct: Some(correct), questions: Some(questions), ..Metrics::default() };
        let printed = [(87, 100), (0, 2), (2, 2), (0, 0)].map(|counts| score(&counted(counts)));
        assert_eq!(printed, ["87/100 (79-92%)", "0/2 (0-66%)", "2/2 (34-100%)", "0/0"]);
        let line = |task, metrics: &Metrics| figures(task, metrics).remove(0);
        let likelihood = Metrics { kl: Some(-1e-9), token_match: Some(0.9375), ..Metrics::default() };
        assert_eq!(
            (line(Task::Kl, &likelihood), line(Task::TokenMatch, &likelihood)),
            ("0.0000".into(), "93.8%".into())
        );
        assert_eq!(line(Task::TokenMatch, &Metrics::default()), "-");
        let parts = Metrics { score: Some(0.755), score_interval: Some([0.6, 0.85]), ..counted((2, 4)) };
        assert_eq!((score(&parts), score(&Metrics::default())), ("76% (60-85%)".into(), "-".into()));
    }

    #[test]
    fn a_mark_says_what_a_figure_surely_differs_from() {
        let other = |measure, p| Against {
            policy: "a label of any kind".into(),
            measure,
            difference: 1.0,
            interval: [0.5, 2.0],
            p,
            pairs: 9,
        };
        let (full, dms) = (Some(Measure::Full), Some(Measure::Dms));
        assert_eq!(marks(&[other(full, 0.01), other(dms, 0.04)]), "*^");
        assert_eq!(marks(&[other(full, 0.06), other(dms, 0.04), other(None, 0.0)]), "^");
        assert_eq!(marks(&[]), "");
    }

    #[test]
    fn bytes_are_readable() {
        let printed: Vec<String> = [0.0, 1023.0, 1024.0, 1.5 * 1024.0 * 1024.0].map(bytes).to_vec();
        assert_eq!(printed, ["0 B", "1023 B", "1.0 KiB", "1.5 MiB"]);
    }
}
