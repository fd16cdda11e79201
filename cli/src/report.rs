//! `kvpolicy report`: what a comparison found, for people to look at.

mod chart;
mod html;
mod markdown;
mod pictures;
#[cfg(feature = "png")]
mod png;

use crate::{
    results::{RESULTS, read_report, read_samples, read_traces, write as write_file},
    table::{self, Figures},
};
use anyhow::{Context, Result, ensure};
use kvpolicy::compare::{Asked, Report, Sample, Trace};
use pictures::Picture;
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A folder that `compare --out` wrote.
    dir: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    write(&args.dir)?;
    println!("{}", args.dir.join("report.html").display());
    Ok(())
}

/// Writes `report.html`, `report.md` and the pictures into a folder of results.
pub(crate) fn write(dir: &Path) -> Result<()> {
    let report = read_report(&dir.join(RESULTS))?;
    ensure!(
        !report.rows.is_empty(),
        "{} has no figures yet: the run has not ended; go on with `compare --resume`",
        dir.join(RESULTS).display()
    );
    let findings =
        Findings::new(report, &read_samples(dir)?, read_traces(dir)?).with_context(|| dir.display().to_string())?;
    write_file(dir, "report.html", html::page(&findings))?;
    write_file(dir, "report.md", markdown::page(&findings))?;
    findings.pictures.iter().try_for_each(|picture| write_file(dir, &picture.file(), picture.chart.alone()))?;
    #[cfg(feature = "png")]
    png::write(dir, &findings.pictures)?;
    Ok(())
}

/// What the pages show.
struct Findings {
    report: Report,
    figures: Figures,
    differences: Vec<[String; 8]>,
    pictures: Vec<Picture>,
    traces: Vec<Trace>,
    policies: Vec<String>, // by their names without ratios, in the order of their colours
}

impl Findings {
    fn new(report: Report, samples: &[Sample], traces: Vec<Trace>) -> Result<Self> {
        let tasks = table::tasks(&report.rows)?;
        let mut policies: Vec<String> = vec![];
        for row in &report.rows {
            if !policies.iter().any(|name| name == base(&row.policy)) {
                policies.push(base(&row.policy).to_string());
            }
        }
        let figures = table::comparison(&report.rows, &tasks);
        let pictures = pictures::all(&report.rows, samples, &tasks, &policies);
        let differences = differences(&report);
        Ok(Self { report, figures, differences, pictures, traces, policies })
    }

    /// Facts about the run.
    fn facts(&self) -> Vec<(&'static str, String)> {
        let report = &self.report;
        let weights = if report.quantized { ", weights quantized" } else { "" };
        let mut facts = vec![
            ("command", command(&report.command)),
            ("model", format!("{} (SHA-256 {})", report.model, report.model_sha256)),
            ("types", format!("{}{weights}, keys and values {}", report.dtype, report.kv_dtype)),
            ("seed", report.seed.to_string()),
            ("kvpolicy", report.version.clone()),
            ("device", report.host.device.clone()),
            ("machine", format!("{}, {} threads, {}", report.host.cpu, report.host.threads, report.host.platform)),
        ];
        if !report.text_sha256.is_empty() {
            facts.push(("text", format!("SHA-256 {}", report.text_sha256)));
        }
        let asked = |exam: &Asked| format!("{} questions of a file with SHA-256 {}", exam.questions, exam.sha256);
        facts.extend(report.exams.iter().map(|(name, exam)| ("benchmark", format!("{name}: {}", asked(exam)))));
        facts
    }
}

/// Of the columns of [`Findings::differences`].
const DIFFERENCES: [&str; 8] = ["context", "policy", "task", "against", "difference", "95% interval", "p", "pairs"];

fn differences(report: &Report) -> Vec<[String; 8]> {
    let row = |row: &kvpolicy::compare::Row| -> Vec<[String; 8]> {
        let line = |other: &kvpolicy::compare::Against| {
            [
                row.context.to_string(),
                row.policy.clone(),
                row.task.clone(),
                other.policy.clone(),
                format!("{:+.4}", other.difference),
                format!("{:+.4} to {:+.4}", other.interval[0], other.interval[1]),
                format!("{:.4}", other.p),
                other.pairs.to_string(),
            ]
        };
        row.against.iter().map(line).collect()
    };
    report.rows.iter().flat_map(row).collect()
}

/// A policy's label without the ratio of a sweep.
fn base(label: &str) -> &str {
    label.split_once(" @").map_or(label, |(name, _)| name)
}

/// As it is typed into a shell, wherever the program lies.
fn command(args: &[String]) -> String {
    let name =
        |program: &String| Path::new(program).file_name().map_or(program.clone(), |n| n.to_string_lossy().into());
    let args: Vec<String> = args.iter().take(1).map(name).chain(args.iter().skip(1).cloned()).collect();
    let plain = |c: char| c.is_alphanumeric() || "-_=./,:@%+".contains(c);
    let quoted = args.iter().map(|arg| match !arg.is_empty() && arg.chars().all(plain) {
        true => arg.clone(),
        false => format!("'{}'", arg.replace('\'', "'\\''")),
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kvpolicy::compare::Row;
    use serde_json::json;

    /// Two contexts, a task of questions and one of likelihood, a policy at two ratios, and names that want to be code.
    fn findings() -> Findings {
        let row = |policy: &str, task: &str, context: u64, bytes: f64, metrics: serde_json::Value| {
            json!({
                "policy": policy, "policy_full": policy, "task": task, "context": context, "samples": 2, "metrics": metrics,
                "kv": {"sampled_steps": 1, "peak_bytes": 9, "mean_bytes": bytes, "mean_live_entries": 1.0, "mean_dense_entries": 2.0,
                       "dense_peak_bytes": 9, "written": 2, "evicted": 1},
                "compression": 2.0,
                "against": [{"policy": "full", "difference": -0.5, "interval": [-0.75, -0.25], "p": 0.01, "pairs": 9}],
            })
        };
        let right = |n: u64| json!({"correct": n, "questions": 10, "accuracy": n as f64 / 10.0, "accuracy_interval": [0.1, 0.9]});
        let mut rows = vec![];
        for context in [512, 1024] {
            let size = context as f64 * 1000.0;
            rows.push(row("full", "recall", context, size, right(10)));
            rows.push(row("h2o @2x", "recall", context, size / 2.0, right(6)));
            rows.push(row("h2o @4x", "recall", context, size / 4.0, right(3)));
            rows.push(row("<script>alert(1)</script>", "recall", context, size / 2.0, right(2)));
            rows.push(row("h2o @2x", "kl", context, size / 2.0, json!({"kl": 0.25})));
            rows.push(row(
                "h2o @2x",
                "speed",
                context,
                size / 2.0,
                json!({"prefill_tokens_per_s": 9.0, "decode_tokens_per_s": 3.0}),
            ));
        }
        let rows: Vec<Row> = serde_json::from_value(json!(rows)).unwrap();
        let report = json!({
            "schema": 1, "version": "0.1.0", "started": 1, "command": ["kvpolicy", "compare", "--policies", "full;h2o"], "model": "m",
            "model_sha256": "aa", "dtype": "f32", "kv_dtype": "f32", "text_sha256": "bb", "seed": 7,
            "host": {"platform": "p", "cpu": "c", "threads": 2, "device": "cpu"}, "rows": rows,
        });
        let sample = Sample {
            task: "ppl".into(),
            policy: "h2o @2x".into(),
            context: 512,
            kl: Some(0.2),
            kl_by_token: vec![0.1, 0.3],
            ..Sample::default()
        };
        let trace = Trace {
            policy: "h2o @2x".into(),
            context: 3,
            pieces: vec!["a".into(), " </script>".into(), "\n".into()],
            prompt: 2,
            seen: vec![2, 3],
            held: vec![vec![4, 4], vec![4, 0, 4]],
            live: vec![vec![2, 2], vec![2, 2]],
        };
        Findings::new(serde_json::from_value(report).unwrap(), &[sample], vec![trace]).unwrap()
    }

    #[test]
    fn a_page_needs_no_network_and_runs_no_names() {
        let page = html::page(&findings());
        for outside in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("<script").count(), 2, "the data and what moves the slider");
        assert_eq!(page.matches("</script").count(), 2);
        assert!(!page.contains("<script>alert") && page.contains("&lt;script&gt;alert"));
        for word in ["prefers-color-scheme", "viewport", "recall", "SHA-256 aa", "SHA-256 bb", "compare --policies"] {
            assert!(page.contains(word), "{word}");
        }
        assert!(page.contains("&#39;full;h2o&#39;"), "the command can be pasted");
    }

    #[test]
    fn every_figure_is_a_point_of_its_picture() {
        let findings = findings();
        let named: Vec<String> = findings.pictures.iter().map(Picture::file).collect();
        assert_eq!(
            named,
            [
                "quality-kl-512.svg",
                "quality-recall-512.svg",
                "quality-kl-1024.svg",
                "quality-recall-1024.svg",
                "kl-by-position-512.svg",
                "decode-speed.svg",
                "kv-memory.svg",
            ]
        );
        let points = |name: &str| {
            let picture = findings.pictures.iter().find(|picture| picture.file() == name).unwrap();
            picture.chart.alone().matches("<title>").count()
        };
        assert_eq!((points("quality-recall-512.svg"), points("quality-kl-512.svg")), (4, 1));
        assert_eq!((points("kl-by-position-512.svg"), points("decode-speed.svg"), points("kv-memory.svg")), (2, 2, 8));
        // Each stands alone, and so does the page of text.
        for picture in &findings.pictures {
            let alone = picture.chart.alone();
            assert!(
                alone.starts_with("<svg xmlns=") && alone.trim_end().ends_with("</svg>") && !alone.contains("<script")
            );
        }
        let text = markdown::page(&findings);
        assert!(named.iter().all(|name| text.contains(&format!("]({name})"))) && text.contains("| h2o @2x"));
        assert!(text.contains("-0.5000") && text.contains("SHA-256 aa"));
    }

    #[test]
    fn a_command_is_quoted_for_a_shell() {
        let args = ["/opt/bin/kvpolicy", "--policies", "full;h2o", "--text", "it's", ""].map(String::from);
        assert_eq!(command(&args), "kvpolicy --policies 'full;h2o' --text 'it'\\''s' ''");
    }
}
