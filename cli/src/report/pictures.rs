//! Which pictures a comparison makes.

use super::{
    base,
    chart::{Axis, Chart, Point, Series, Unit},
};
use kvpolicy::compare::{Row, Sample, Task};

/// A chart with a name.
pub(super) struct Picture {
    pub(super) name: String,
    pub(super) chart: Chart,
}

impl Picture {
    pub(super) fn file(&self) -> String {
        format!("{}.svg", self.name)
    }
}

/// Quality against memory for every task and context, KL by position for every context that has it, then speed and memory by
/// context.
pub(super) fn all(rows: &[Row], samples: &[Sample], tasks: &[Task], policies: &[String]) -> Vec<Picture> {
    let mut contexts: Vec<usize> = rows.iter().map(|row| row.context).collect();
    contexts.sort();
    contexts.dedup();
    let cells = contexts.iter().flat_map(|&context| tasks.iter().map(move |&task| (context, task)));
    let quality = cells.filter_map(|(context, task)| quality(rows, task, context, policies));
    let positions = contexts.iter().filter_map(|&context| by_position(samples, context, policies));
    quality.chain(positions).chain(speed(rows, policies)).chain(memory(rows, policies)).collect()
}

fn axis(label: impl Into<String>, unit: Unit) -> Axis {
    Axis { label: label.into(), is_log: false, unit }
}

/// A series for each policy that has points, in the order of their x.
fn series(policies: &[String], points: impl Fn(&str) -> Vec<Point>) -> Vec<Series> {
    let all = policies.iter().enumerate().map(|(colour, name)| {
        let mut points = points(name);
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        Series { name: name.clone(), colour, points }
    });
    all.filter(|series| !series.points.is_empty()).collect()
}

/// The figure of a task with what it may be, its unit, and whether less is better.
fn figure(task: Task, row: &Row) -> Option<(f64, Option<[f64; 2]>, Unit, bool)> {
    let m = &row.metrics;
    match task {
        Task::Ppl => m.ppl.map(|ppl| (ppl, None, Unit::Number, true)),
        Task::Kl => m.kl.map(|kl| (kl, None, Unit::Number, true)),
        Task::TokenMatch => m.token_match.map(|share| (share, None, Unit::Percent, false)),
        Task::Speed => None,
        _ if m.score.is_some() => m.score.map(|score| (score, m.score_interval, Unit::Percent, false)),
        _ => m.accuracy.map(|accuracy| (accuracy, m.accuracy_interval, Unit::Percent, false)),
    }
}

fn quality(rows: &[Row], task: Task, context: usize, policies: &[String]) -> Option<Picture> {
    let own: Vec<&Row> = rows.iter().filter(|row| row.context == context && row.task == task.to_string()).collect();
    let (_, _, unit, less_is_better) = figure(task, own.first()?)?;
    let points = |name: &str| {
        let own = own.iter().filter(|row| base(&row.policy) == name);
        let point = |row: &&Row| {
            let (y, interval, ..) = figure(task, row)?;
            let name = row.policy[base(&row.policy).len()..].to_string();
            Some(Point { x: row.kv.mean_bytes, y, interval, name })
        };
        own.filter_map(point).collect()
    };
    let series = series(policies, points);
    let name = match task {
        Task::Ppl => "perplexity".to_string(),
        Task::Kl => "KL from full, nats per token".to_string(),
        Task::TokenMatch => "tokens as full would choose".to_string(),
        task => format!("{task}, right answers"),
    };
    let frontier = frontier(series.iter().flat_map(|s| &s.points).map(|p| (p.x, p.y)), less_is_better);
    let title = format!("{name}, context {context}");
    let x = Axis { is_log: true, ..axis("KV memory, mean", Unit::Bytes) };
    Some(Picture {
        name: format!("quality-{task}-{context}"),
        chart: Chart { title, x, y: axis("", unit), series, frontier },
    })
}

/// Points that no other one beats in memory without being worse, from the smallest memory.
fn frontier(points: impl Iterator<Item = (f64, f64)>, less_is_better: bool) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> = points.collect();
    let better = |a: f64, b: f64| if less_is_better { a < b } else { a > b };
    let best_first = |a: f64, b: f64| if less_is_better { a.total_cmp(&b) } else { b.total_cmp(&a) };
    points.sort_by(|a, b| a.0.total_cmp(&b.0).then(best_first(a.1, b.1)));
    let mut frontier: Vec<(f64, f64)> = vec![];
    for point in points {
        if frontier.last().is_none_or(|last| better(point.1, last.1)) {
            frontier.push(point);
        }
    }
    frontier
}

/// Neighbouring positions are drawn as one.
const BINS: usize = 24;

fn by_position(samples: &[Sample], context: usize, policies: &[String]) -> Option<Picture> {
    let own: Vec<&Sample> = samples.iter().filter(|s| s.context == context && !s.kl_by_token.is_empty()).collect();
    let mut labels: Vec<&str> = vec![];
    for sample in &own {
        if !labels.contains(&sample.policy.as_str()) {
            labels.push(&sample.policy);
        }
    }
    let scored = own.first()?.kl_by_token.len();
    let curve = |label: &&str| {
        let own: Vec<&&Sample> = own.iter().filter(|sample| sample.policy == **label).collect();
        let width = scored.div_ceil(BINS);
        let bins = (0..scored).step_by(width).map(|from| {
            let to = (from + width).min(scored);
            let values = own.iter().flat_map(|s| s.kl_by_token.get(from..to).unwrap_or_default());
            let mean = values.map(|x| *x as f64).sum::<f64>() / (own.len() * (to - from)) as f64;
            let x = (context - scored) as f64 + (from + to) as f64 / 2.0;
            Point { x, y: mean, interval: None, name: String::new() }
        });
        let colour = policies.iter().position(|name| name == base(label)).unwrap_or(0);
        Series { name: label.to_string(), colour, points: bins.collect() }
    };
    let chart = Chart {
        title: format!("KL from full by position, context {context}"),
        x: axis("position", Unit::Number),
        y: axis("", Unit::Number),
        series: labels.iter().map(curve).collect(),
        frontier: vec![],
    };
    Some(Picture { name: format!("kl-by-position-{context}"), chart })
}

fn speed(rows: &[Row], policies: &[String]) -> Option<Picture> {
    let own = |name: &str| {
        let own = rows.iter().filter(|row| base(&row.policy) == name);
        own.filter_map(|row| Some(by_context(row, row.metrics.decode_tokens_per_s?))).collect()
    };
    let chart = Chart { title: "decode, tokens per second".into(), ..over_contexts(policies, own, Unit::Number) };
    (!chart.series.is_empty()).then(|| Picture { name: "decode-speed".into(), chart })
}

/// Of the first task in a row that has the context.
fn memory(rows: &[Row], policies: &[String]) -> Option<Picture> {
    let own = |name: &str| {
        let is_first = |i: usize, row: &Row| {
            !rows[..i].iter().any(|other| (&other.policy, other.context) == (&row.policy, row.context))
        };
        let own = rows.iter().enumerate().filter(|(_, row)| base(&row.policy) == name);
        own.filter(|(i, row)| is_first(*i, row)).map(|(_, row)| by_context(row, row.kv.mean_bytes)).collect()
    };
    let chart = Chart { title: "KV memory, mean".into(), ..over_contexts(policies, own, Unit::Bytes) };
    (!chart.series.is_empty()).then(|| Picture { name: "kv-memory".into(), chart })
}

fn by_context(row: &Row, y: f64) -> Point {
    Point { x: row.context as f64, y, interval: None, name: row.policy[base(&row.policy).len()..].to_string() }
}

/// A line for each ratio of a policy.
fn over_contexts(policies: &[String], points: impl Fn(&str) -> Vec<Point>, unit: Unit) -> Chart {
    let by_ratio = |series: Series| {
        let mut ratios: Vec<String> = series.points.iter().map(|point| point.name.clone()).collect();
        ratios.sort();
        ratios.dedup();
        let line = move |ratio: String| Series {
            name: series.name.clone() + &ratio,
            colour: series.colour,
            points: series
                .points
                .iter()
                .filter(|p| p.name == ratio)
                .map(|p| Point { name: String::new(), ..p.clone() })
                .collect(),
        };
        ratios.into_iter().map(line)
    };
    let series = series(policies, points).into_iter().flat_map(by_ratio).collect();
    let x = Axis { is_log: true, ..axis("context", Unit::Number) };
    Chart { x, y: axis("", unit), series, ..Chart::default() }
}

#[cfg(test)]
mod tests {
    use super::frontier;

    #[test]
    fn the_frontier_leaves_out_what_is_beaten() {
        let points = [(4.0, 0.9), (1.0, 0.3), (2.0, 0.2), (2.0, 0.5), (3.0, 0.5), (8.0, 0.9)];
        assert_eq!(frontier(points.into_iter(), false), [(1.0, 0.3), (2.0, 0.5), (4.0, 0.9)]);
        assert_eq!(frontier(points.into_iter(), true), [(1.0, 0.3), (2.0, 0.2)]);
        assert!(frontier([].into_iter(), true).is_empty());
    }
}
