//! The program, from its arguments to its files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../adapters/candle/tests/common/tiny.rs"]
mod tiny;

use candle_core::quantized::GgmlDType;
use kvpolicy::compare::{Report, Sample, Trace};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;
use tiny::{HEADS, HIDDEN, Tiny};

fn tiny() -> Tiny {
    Tiny::new("llama", 2, HIDDEN / HEADS, true, json!({}))
}

/// A folder with a tiny model and a text.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        tiny().write_gguf(&dir.path().join("m.gguf"), GgmlDType::Q8_0);
        let text: String =
            (0..400).map(|i| format!("Sentence {i} speaks of the number {}. ", i * 7919 % 997)).collect();
        std::fs::write(dir.path().join("t.txt"), text).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `command --model m.gguf` and what follows.
    fn run(&self, command: &str, args: &[&str]) -> Output {
        let mut program = Command::new(env!("CARGO_BIN_EXE_kvpolicy"));
        program.current_dir(self.dir.path()).arg(command).args(["--model", "m.gguf"]).args(args);
        program.output().unwrap()
    }

    fn fails(&self, command: &str, args: &[&str], words: &[&str]) {
        let output = self.run(command, args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?} succeeded");
        assert!(!text.contains("panicked"), "{text}");
        words.iter().for_each(|word| assert!(text.contains(word), "`{text}` does not say `{word}`"));
    }
}

fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const COMPARE: [&str; 8] = ["--text", "t.txt", "--context", "400,480", "--samples", "1", "--out", "out"];

#[test]
fn compare_writes_a_row_for_each_policy_task_and_context() {
    let bench = Bench::new();
    let tasks = ["ppl", "kl", "token-match", "needle", "needle-aware", "speed"];
    let policies = ["full", "window:size=32,sinks=4", "h2o:budget=40,recent=8", "tova:budget=25%", "knorm:budget=40"];
    let output = bench
        .run("compare", &[&COMPARE[..], &["--policies", &policies.join(";"), "--tasks", &tasks.join(",")]].concat());
    let table = succeeded(&output);
    let report = read(&bench.path("out/results.json"));
    assert_eq!((report.schema, report.rows.len()), (1, 2 * policies.len() * tasks.len()));
    for policy in policies {
        assert!(table.contains(policy), "{table}");
        for task in tasks {
            for context in [400, 480] {
                let row = report.rows.iter().find(|r| r.policy == policy && r.task == task && r.context == context);
                let row = row.unwrap_or_else(|| panic!("no row for {policy} {task} {context}"));
                assert!(row.kv.written > 0 && row.kv.sampled_steps > 0 && row.kv.peak_bytes > 0);
                assert_eq!(row.kv.evicted > 0, policy != "full", "{policy} {task}");
                assert_eq!(row.compression > 1.01, policy != "full", "{policy} {task}");
                let m = &row.metrics;
                match task {
                    "ppl" => assert!(m.ppl.unwrap() > 1.0 && m.kl.is_none()),
                    "kl" => assert_eq!(m.kl.unwrap() > 1e-6, policy != "full", "{policy}: {:?}", m.kl),
                    "token-match" => {
                        assert!(m.token_match.is_some_and(|share| share == 1.0 || policy != "full" && share < 1.0))
                    }
                    "speed" => assert!(m.prefill_tokens_per_s.unwrap() > 0.0 && m.decode_tokens_per_s.unwrap() > 0.0),
                    _ => assert_eq!(m.questions, Some(1)),
                }
            }
        }
    }
    let samples = std::fs::read_to_string(bench.path("out/samples.jsonl")).unwrap();
    let samples: Vec<Sample> = samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(samples.len(), 2 * policies.len() * (tasks.len() - 2)); // the first three share theirs
    let needles: Vec<&Sample> = samples.iter().filter(|s| s.task == "needle").collect();
    assert!(needles.iter().all(|s| s.prompt.contains(s.expected.as_ref().unwrap()) && s.answer.is_some()));
}

/// Lines of `route` that have a field.
fn lines_with(output: &str, field: &str) -> Vec<Value> {
    let lines = output.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line.get(field).is_some()).collect()
}

#[test]
fn route_answers_each_line_under_the_arm_of_its_key() {
    let bench = Bench::new();
    let ask = |key: usize| json!({"key": format!("k{key}"), "prompt": "a b c d e f g h i j"}).to_string();
    let mut lines: Vec<String> = (0..12).map(ask).collect();
    lines.insert(6, json!({"roll_back": {"arm": "window:size=8", "reason": "to see"}}).to_string());
    lines.extend([
        json!({"key": "k0"}).to_string(),
        "".into(),
        json!({"key": "k0", "prompt": " "}).to_string(),
        ask(0),
    ]);
    lines.push(json!({"key": "k0", "prompt": "long ".repeat(300)}).to_string());
    lines.push(json!({"weight": {"arm": "tova", "to": 1}}).to_string());
    std::fs::write(bench.path("r.jsonl"), lines.join("\n")).unwrap();
    let arms = ["--policies", "full;window:size=8", "--shadow", "1", "--max-tokens", "12", "--requests", "r.jsonl"];
    let run = |more: &[&str]| bench.run("route", &[&arms[..], more].concat());
    let alone = run(&[]);
    let (text, table) = (succeeded(&alone), String::from_utf8_lossy(&alone.stderr).into_owned());

    let ends = lines_with(&text, "tokens");
    let end = |line: u64| ends.iter().find(|end| end["line"] == line).unwrap();
    assert_eq!(ends.len(), 13);
    assert!(ends.iter().any(|end| end["arm"] == "window:size=8" && end["kl"].as_f64().unwrap() > 1e-6));
    for end in ends.iter().filter(|end| end["arm"] == "full") {
        assert_eq!(end["kl"], 0.0);
    }
    assert!((8..14).all(|line| end(line)["arm"] == "full"), "after the roll back");
    let said = |line: u64| -> String {
        let pieces = lines_with(&text, "text").into_iter().filter(|piece| piece["line"] == line);
        pieces.map(|piece| piece["text"].as_str().unwrap().to_string()).collect()
    };
    assert!(!said(8).is_empty() && said(8) == said(9), "the same prompt under the same policy");
    assert_eq!(lines_with(&text, "shares")[0]["shares"], json!({"full": 1.0, "window:size=8": 0.0}));
    let errors = lines_with(&text, "error");
    for (line, words) in [(14, "missing field `prompt`"), (16, "prompt is empty"), (18, "512"), (19, "`tova`")] {
        let error = errors.iter().find(|error| error["line"] == line).unwrap();
        assert!(error["error"].as_str().unwrap().contains(words), "{error}");
    }
    let full: Vec<&str> = table.lines().find(|line| line.starts_with("| full")).unwrap().split('|').collect();
    assert_eq!((full[2].trim(), full[4].trim()), ("100.0%", "1"), "of the requests only one was too long: {table}");
    assert!(table.contains("to see"));

    let mut together = lines_with(&succeeded(&run(&["--parallel", "3", "--metrics", "route.prom"])), "tokens");
    together.sort_by_key(|end| end["line"].as_u64());
    assert_eq!(together, ends, "however many at a time");
    let metrics = std::fs::read_to_string(bench.path("route.prom")).unwrap();
    for arm in ["full", "window:size=8"] {
        let of_arm = ends.iter().filter(|end| end["arm"] == arm).count();
        for line in [
            format!("kvpolicy_router_requests{{arm=\"{arm}\"}} {of_arm}"),
            format!("kvpolicy_router_weight{{arm=\"{arm}\"}} 1"),
        ] {
            assert!(metrics.lines().any(|it| it == line), "{line}: {metrics}");
        }
    }
    assert!(metrics.contains("kvpolicy_router_failures{arm=\"full\"} 1"), "{metrics}");
}

#[test]
fn route_rolls_back_and_falls_back_by_its_limits() {
    let bench = Bench::new();
    let line = |i: usize| json!({"key": i.to_string(), "prompt": "one two three four five"}).to_string() + "\n";
    std::fs::write(bench.path("r.jsonl"), (0..10).map(line).collect::<String>()).unwrap();
    let arms = ["--policies", "full;window:size=2", "--weights", "0,1", "--shadow", "1", "--requests", "r.jsonl"];
    let limits = ["--limit-kl", "1e-6", "--window", "3", "--fallback-kl", "1e-6", "--fallback-tokens", "1"];
    let text = succeeded(&bench.run("route", &[&arms[..], &limits, &["--max-tokens", "5"]].concat()));
    let ends = lines_with(&text, "tokens");
    let arms: Vec<&str> = ends.iter().map(|end| end["arm"].as_str().unwrap()).collect();
    assert_eq!(arms, [&["window:size=2"; 3][..], &["full"; 7]].concat());
    assert!(ends.iter().all(|end| end["fell_back_at"].is_u64() == (end["arm"] == "window:size=2")), "{ends:?}");
    let told = lines_with(&text, "rolled_back");
    assert!(told.len() == 1 && told[0]["rolled_back"].as_str().unwrap().contains("the last 3 requests"), "{told:?}");

    let fails = |args: &[&str], words: &[&str]| bench.fails("route", args, words);
    fails(&["--weights", "1,2,3"], &["weights", "3 for 2"]);
    fails(&["--weights", "1,-1"], &["weight=-1"]);
    fails(&["--shadow", "2"], &["shadow=2"]);
    fails(&["--policies", "full;full"], &["named twice"]);
    fails(&["--policies", "full;dms"], &["gates"]);
    fails(&["--limit-kl", "0.1", "--window", "0"], &["window=0"]);
    fails(&["--parallel", "0"], &["parallel=0"]);
    fails(&["--requests", "nowhere.jsonl"], &["nowhere.jsonl"]);
    fails(&["--metrics", "nowhere/route.prom"], &["nowhere/route.prom"]);
}

#[test]
fn word_key_is_asked_under_a_sweep_and_results_become_one_table() {
    let bench = Bench::new();
    let compare = |policies: &str, tasks: &str, seed: &str, out: &str| {
        let args = ["--policies", policies, "--sweep", "2,4", "--tasks", tasks, "--context", "512", "--samples", "2"];
        succeeded(&bench.run("compare", &[&args[..], &["--seed", seed, "--out", out]].concat()))
    };
    let alone = compare("full;h2o:recent=8", "word-key,word-key-aware", "1", "a");
    compare("full;tova", "word-key", "1", "b");
    compare("full", "word-key", "2", "c");
    let report = read(&bench.path("a/results.json"));
    assert_eq!(report.rows.len(), 2 * (1 + 2));
    for row in &report.rows {
        let Some((_, ratio)) = row.policy.split_once('@') else { continue };
        let ratio: f64 = ratio.trim_end_matches('x').parse().unwrap();
        assert!((row.compression / ratio - 1.0).abs() < 0.05, "{} of {}", row.compression, row.policy);
        assert!(row.metrics.questions == Some(2) && row.metrics.accuracy_interval.is_some());
    }

    let table = |files: &[&str]| program(&bench.dir, &[&["table"], files].concat());
    assert_eq!(succeeded(&table(&["a/results.json"])), alone, "a file alone is the table it was printed with");
    let both = table(&["a/results.json", "b/results.json"]);
    let (lines, notes) = (succeeded(&both), String::from_utf8_lossy(&both.stderr).into_owned());
    for line in alone.lines().skip(2).filter(|line| line.starts_with('|')) {
        let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_string()).collect::<Vec<_>>();
        assert!(lines.lines().any(|other| cells(other) == cells(line)), "{line} is not in {lines}");
    }
    assert!(lines.contains("tova @4x") && lines.matches(" full ").count() == 1, "{lines}");
    assert!(notes.contains("word-key of full at context 512 in b/results.json"), "{notes}");

    let report = std::fs::read_to_string(bench.path("a/results.json")).unwrap();
    std::fs::write(bench.path("new.json"), report.replace("\"schema\": 1", "\"schema\": 7")).unwrap();
    std::fs::write(bench.path("odd.json"), report.replace("\"task\": \"word-key\"", "\"task\": \"poetry\"")).unwrap();
    for (files, words) in [
        (&["nowhere.json"][..], &["nowhere.json"][..]),
        (&["a/samples.jsonl"], &["a/samples.jsonl", "no results.json"]),
        (&["a/results.json", "t.txt"], &["t.txt", "no results.json"]),
        (&["new.json"], &["new.json", "schema", "7"]),
        (&["odd.json"], &["odd.json", "poetry"]),
        (&["a/results.json", "c/results.json"], &["c/results.json", "seed is 2", "a/results.json is 1"]),
    ] {
        let output = table(files);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && !text.contains("panicked"), "{files:?}: {text}");
        assert!(words.iter().all(|word| text.contains(word)), "{files:?}: {text}");
    }
}

fn read(path: &Path) -> Report {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn the_same_seed_gives_the_same_figures() {
    let bench = Bench::new();
    let run = |seed: &str| {
        let args = ["--policies", "random:budget=40", "--tasks", "ppl,kl", "--seed", seed];
        succeeded(&bench.run("compare", &[&COMPARE[..], &args].concat()));
        read(&bench.path("out/results.json")).rows.into_iter().map(|row| row.metrics).collect::<Vec<_>>()
    };
    let first = run("5");
    assert_eq!(first, run("5"));
    assert_ne!(first, run("6"));
}

#[test]
fn a_sweep_gives_every_policy_the_same_mean_of_live_entries() {
    let bench = Bench::new();
    let policies = "full;window:sinks=2;h2o:recent=4;tova;snapkv:window=4;knorm;rkv:buffer=8,window=4;random;\
                    adakv(knorm);pyramid:beta=4(knorm);every(4, keydiff);random-gate:rate=0.5,window=16";
    let args = ["--policies", policies, "--sweep", "2,4", "--tasks", "ppl"];
    succeeded(&bench.run("compare", &[&COMPARE[..], &args].concat()));
    let report = read(&bench.path("out/results.json"));
    assert_eq!(report.rows.len(), 2 * (1 + 10 * 2 + 1));
    for context in [400, 480] {
        for row in report.rows.iter().filter(|r| r.context == context && r.policy.contains('@')) {
            let ratio: f64 = row.policy.split('@').nth(1).unwrap().trim_end_matches('x').parse().unwrap();
            let off = (row.compression / ratio - 1.0).abs();
            assert!(off < 0.03, "{} at {context} reaches {:.3}x, not {ratio}x", row.policy, row.compression);
        }
    }
}

#[test]
fn compare_without_a_model_shows_what_policies_do() {
    let dir = tempfile::tempdir().unwrap();
    let output = program(&dir, &["compare", "--samples", "1", "--out", "out"]);
    let table = succeeded(&output);
    let report = read(&dir.path().join("out/results.json"));
    assert_eq!((report.model.as_str(), report.text_sha256.as_str(), report.model_sha256.len()), ("demo", "", 64));
    for policy in ["full", "window:sinks=4 @4x", "h2o @4x", "tova @4x", "snapkv @4x", "knorm @4x", "dms"] {
        assert!(table.contains(policy), "{table}");
        let rows: Vec<_> = report.rows.iter().filter(|row| row.policy == policy).collect();
        // Prompts alone are what these two prune, and a walk is mostly generated.
        let tasks: &[&str] =
            if ["snapkv @4x", "knorm @4x"].contains(&policy) { &["recall"] } else { &["recall", "chain"] };
        assert_eq!(rows.iter().map(|row| row.task.as_str()).collect::<Vec<_>>(), tasks, "{policy}");
        assert!(rows.iter().all(|row| row.context == 1024 && (row.kv.evicted > 0) == (policy != "full")), "{policy}");
        assert!(rows.iter().all(|row| row.metrics.accuracy.is_some() && row.metrics.questions >= Some(1)));
    }
    let rows = |policy: &'static str| report.rows.iter().filter(move |row| row.policy == policy);
    for row in rows("full").chain(rows("dms")) {
        assert_eq!(row.metrics.accuracy, Some(1.0), "what it was trained for, its gates keep: {row:?}");
    }
    assert!(rows("dms").all(|row| row.compression >= 4.0));
    assert!(rows("window:sinks=4 @4x").all(|row| row.metrics.accuracy < Some(1.0)), "a window loses what is far back");
    let samples = std::fs::read_to_string(dir.path().join("out/samples.jsonl")).unwrap();
    let samples: Vec<Sample> = samples.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let asked: u64 = report.rows.iter().filter_map(|row| row.metrics.questions).sum();
    assert_eq!(samples.len() as u64, asked);
    for sample in samples {
        let question = if sample.task == "chain" { "\nfrom " } else { "\ncode " };
        assert!(
            sample.prompt.contains(question) && sample.expected.is_some() && sample.correct.is_some(),
            "{sample:?}"
        );
    }
}

#[test]
fn a_stopped_run_goes_on_to_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let compare = |more: &[&str]| {
        let args = ["compare", "--tasks", "recall,chain", "--context", "512", "--samples", "3", "--policies"];
        program(&dir, &[&args[..], &["full;h2o;dms", "--sweep", "4"], more].concat())
    };
    let files = |out: &str| {
        let mut report: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(dir.path().join(out).join("results.json")).unwrap()).unwrap();
        ["started", "command"].iter().for_each(|name| report[name] = json!(null));
        (report.to_string(), std::fs::read_to_string(dir.path().join(out).join("samples.jsonl")).unwrap())
    };
    let table = succeeded(&compare(&["--out", "a"]));
    succeeded(&compare(&["--out", "b"]));
    assert!(files("a") == files("b"), "the same seed");

    // The report can be made again from the figures.
    let page = |name: &str| std::fs::read_to_string(dir.path().join("a").join(name)).unwrap();
    let pages = ["report.html", "report.md", "quality-recall-512.svg"];
    let made = pages.map(page);
    assert!(made[0].contains("h2o @4x") && made[1].contains("quality-recall-512.svg"));
    pages.iter().for_each(|name| std::fs::remove_file(dir.path().join("a").join(name)).unwrap());
    succeeded(&program(&dir, &["report", "a"]));
    assert!(made == pages.map(page));
    let traces = page("trace.jsonl");
    let traces: Vec<Trace> = traces.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(traces.iter().map(|trace| trace.policy.as_str()).collect::<Vec<_>>(), ["full", "h2o @4x", "dms"]);
    for trace in &traces {
        let (heads, last) = (trace.live.iter().map(Vec::len).sum::<usize>(), trace.held.last().unwrap());
        assert!(trace.seen.is_sorted() && trace.seen.last() == Some(&trace.pieces.len()) && trace.context == 512);
        let text = trace.pieces.concat();
        assert!(text.len() > 400 && text.contains("code ") && text.ends_with('\n'), "a page with its answers: {text}");
        assert!(text[trace.prompt..].starts_with("\ncode "), "the questions come token by token");
        assert_eq!(last.iter().sum::<usize>(), trace.live.iter().flatten().sum::<usize>());
        assert_eq!(last.iter().all(|held| *held == heads), trace.policy == "full");
        // What is gone does not come back.
        let fades = |two: &[Vec<usize>]| two[0].iter().zip(&two[1]).all(|(before, after)| before >= after);
        assert!(trace.held.windows(2).all(fades), "{}", trace.policy);
    }

    // Stopped within a line, between the questions of a run, and before the first.
    let (whole, samples) = files("a");
    let middle = samples.len() / 2;
    let question = samples.match_indices('\n').map(|(at, _)| at + 1).find(|at| !samples[..*at].contains("\"kv\""));
    for stopped in [middle, middle + 1, question.unwrap(), samples.len(), 0] {
        std::fs::write(dir.path().join("b/samples.jsonl"), &samples[..stopped]).unwrap();
        let said = compare(&["--out", "b", "--resume"]);
        assert_eq!(succeeded(&said), table);
        assert!(files("b") == (whole.clone(), samples.clone()), "stopped at {stopped}");
    }

    let report = read(&dir.path().join("a/results.json"));
    let h2o = report.rows.iter().find(|row| row.task == "recall" && row.policy.starts_with("h2o")).unwrap();
    let measures: Vec<&str> = h2o.against.iter().map(|other| other.policy.as_str()).collect();
    assert_eq!(measures, ["full", "dms"]);
    let dense = report.rows[0].metrics.accuracy.unwrap();
    assert!((h2o.against[0].difference - (h2o.metrics.accuracy.unwrap() - dense)).abs() < 1e-12);

    let refused = |more: &[&str], words: &[&str]| {
        let output = compare(more);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused(&["--out", "a", "--resume", "--seed", "9"], &["a is of another plan", "seed was `0` and is `9`"]);
    refused(&["--out", "nowhere", "--resume"], &["nothing to resume", "nowhere"]);
    refused(&["--resume"], &["--out"]);
    for (folder, words) in [("nowhere", "nowhere"), (".", "results.json")] {
        let output = program(&dir, &["report", folder]);
        assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains(words));
    }
    std::fs::write(dir.path().join("b/samples.jsonl"), samples.replacen("\"task\"", "\"task", 1)).unwrap();
    refused(&["--out", "b", "--resume"], &["samples.jsonl", "line 1 is no sample"]);
    let old = std::fs::read_to_string(dir.path().join("a/results.json")).unwrap();
    let old = old.replacen("\"version\": \"", "\"version\": \"0.0.", 1).replacen("h2o:budget", "h2o:budgie", 1);
    std::fs::write(dir.path().join("a/results.json"), old).unwrap();
    refused(&["--out", "a", "--resume"], &["version was `0.0.", "policies was", "h2o:budgie"]);
    assert!(files("a").1 == samples, "what is refused leaves the samples alone");
}

#[test]
fn a_run_is_resumed_with_the_same_weights_tokenizer_and_gates_only() {
    let bench = Bench::new();
    tiny().write_gates(&bench.path("gates"));
    let args = ["--policies", "full;dms:weights=gates/gates.safetensors", "--tasks", "chain", "--context", "128"];
    let compare =
        |more: &[&str]| bench.run("compare", &[&args[..], &["--samples", "1", "--out", "out"], more].concat());
    succeeded(&compare(&[]));
    let report = read(&bench.path("out/results.json"));
    assert!(report.quantized && report.tokenizer_sha256.len() == 64 && report.gates.len() == 1);
    succeeded(&compare(&["--resume"]));
    let refused = |more: &[&str], words: &[&str]| {
        let error = String::from_utf8_lossy(&compare(&[&["--resume"], more].concat()).stderr).into_owned();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused(&["--dequantize"], &["out is of another plan", "quantized was `true` and is `false`"]);

    let file = bench.path("gates/gates.safetensors");
    let mut gates = std::fs::read(&file).unwrap();
    let last = gates.len() - 1;
    gates[last] ^= 1; // a little of one weight
    std::fs::write(&file, &gates).unwrap();
    refused(&[], &["gates was `dms:", "and is `dms:"]);
    gates[last] ^= 1;
    std::fs::write(&file, &gates).unwrap();
    succeeded(&compare(&["--resume"]));

    let written = std::fs::read_to_string(bench.path("out/results.json")).unwrap();
    let other = written.replace(&report.tokenizer_sha256, &"0".repeat(64));
    std::fs::write(bench.path("out/results.json"), other).unwrap();
    refused(&[], &["tokenizer_sha256 was `000", &report.tokenizer_sha256]);
}

#[test]
fn benchmarks_are_asked_from_files() {
    let bench = Bench::new();
    let question = |text: &str, answer: &str| json!({ "question": text, "answer": answer }).to_string() + "\n";
    let file = question("How many are 2 and 3?", "#### 5") + &question("And 4 and 4?", "#### 8");
    std::fs::write(bench.path("school.jsonl"), file).unwrap();
    let code = json!({"prompt": "def f():\n", "entry_point": "f", "test": "def check(c): pass"});
    std::fs::write(bench.path("code.jsonl"), code.to_string()).unwrap();
    let ask = |more: &[&str], words: &[&str]| {
        let args = ["--policies", "full;window:size=24", "--context", "400", "--out", "out"];
        match words {
            [] => drop(succeeded(&bench.run("compare", &[&args[..], more].concat()))),
            words => bench.fails("compare", &[&args[..], more].concat(), words),
        }
    };
    let drawn = ["--tasks", "gsm8k", "--file", "gsm8k=school.jsonl", "--repeats", "2", "--temperature", "0.8"];
    ask(&drawn, &[]);
    let report = read(&bench.path("out/results.json"));
    assert_eq!((report.exams["gsm8k"].sha256.len(), report.exams["gsm8k"].questions), (64, 2));
    assert_eq!((report.repeats, report.temperature), (2, 0.8));
    assert_eq!(
        report.rows.iter().map(|row| (row.samples, row.metrics.questions)).collect::<Vec<_>>(),
        [(2, Some(4)); 2]
    );
    let samples = std::fs::read_to_string(bench.path("out/samples.jsonl")).unwrap();
    ask(&[&drawn[..], &["--resume"]].concat(), &[]);
    ask(&[&drawn[..7], &["0.9", "--resume"]].concat(), &["temperature was `0.8` and is `0.9`"]);
    ask(&[&drawn[..], &["--samples", "1", "--resume"]].concat(), &["exams was `2 of gsm8k", "is `1 of gsm8k"]);
    assert_eq!(samples, std::fs::read_to_string(bench.path("out/samples.jsonl")).unwrap());
    ask(&[&drawn[..4], &["--samples", "1"]].concat(), &[]);
    assert_eq!(read(&bench.path("out/results.json")).rows[0].samples, 1);

    ask(&["--tasks", "gsm8k"], &["gsm8k", "--file gsm8k="]);
    ask(&["--tasks", "recall", "--file", "gsm8k=school.jsonl"], &["gsm8k", "not among the tasks"]);
    ask(&["--tasks", "recall", "--repeats", "2"], &["--file"]);
    ask(&[&drawn[..4], &["--file", "gsm8k=code.jsonl"]].concat(), &["gsm8k", "line 1"]);
    ask(&[&drawn[..4], &["--file", "gsm8k=school.jsonl"]].concat(), &["gsm8k has two files"]);
    ask(&["--tasks", "gsm8k", "--file", "school.jsonl"], &["school.jsonl", "TASK=PATH"]);
    ask(&["--tasks", "gsm8k", "--file", "poetry=school.jsonl"], &["poetry", "math-500"]);
    ask(&["--tasks", "gsm8k", "--file", "gsm8k=code.jsonl"], &["code.jsonl", "line 1 of gsm8k", "question"]);
    ask(&["--tasks", "humaneval", "--file", "humaneval=code.jsonl"], &["humaneval", "--allow-exec"]);
}

#[test]
fn retrofit_trains_gates_that_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let text = "a boat waits near the mill. the owl sings and the river runs.\n".repeat(120);
    std::fs::write(dir.path().join("text.txt"), text).unwrap();
    let args = |more: &[&'static str]| -> Vec<&'static str> {
        let all =
            ["retrofit", "--text", "text.txt", "--out", "out", "--context", "96", "--window", "4", "--target-cr", "2"];
        let rest = ["--steps", "3", "--batch-tokens", "192", "--judged", "2", "--save-every", "2"];
        [&all[..], &rest[..], more].concat()
    };
    let table = succeeded(&program(&dir, &args(&[])));
    assert!(table.contains("| gates |") && table.contains("| window |"), "{table}");
    let log = |dir: &tempfile::TempDir| std::fs::read_to_string(dir.path().join("out/train.jsonl")).unwrap();
    assert_eq!(log(&dir).lines().count(), 3);
    assert_eq!(dir.path().join("out/train.svg").exists(), cfg!(feature = "plot"));
    let config = std::fs::read_to_string(dir.path().join("out/config.json")).unwrap();
    assert!(config.contains("\"dms_window_size\": 4") && config.contains("kvpolicy_model_sha256"), "{config}");
    let prompt =
        ["generate", "--policy", "dms:weights=out/gates.safetensors", "--prompt", "a boat", "--max-tokens", "3"];
    succeeded(&program(&dir, &prompt));

    // Gates that learned with weights are of the model with these, which export makes.
    let said = program(&dir, &args(&["--train", "lora", "--lora-rank", "2"]));
    assert!(String::from_utf8_lossy(&said.stderr).contains("kvpolicy export"), "{said:?}");
    succeeded(&said);
    let alone = program(&dir, &prompt);
    let error = String::from_utf8_lossy(&alone.stderr).into_owned();
    assert!(!alone.status.success() && error.contains("adapter_model.safetensors"), "{error}");
    let whole = succeeded(&program(&dir, &["export", "--gates", "out", "--out", "whole"]));
    assert!(whole.contains("adapter"), "{whole}");
    succeeded(&program(
        &dir,
        &["generate", "--model", "whole", "--policy", "dms", "--prompt", "a", "--max-tokens", "3"],
    ));
    // The same of a borrowed neuron, whose weights are part of the queries'.
    succeeded(&program(&dir, &args(&["--gates", "borrowed"])));
    assert!(!dir.path().join("out/adapter_model.safetensors").exists(), "of the training before");
    let whole = succeeded(&program(&dir, &["export", "--gates", "out", "--out", "neurons"]));
    assert!(whole.contains("0 of gates, layout nvidia"), "{whole}");
    succeeded(&program(
        &dir,
        &["generate", "--model", "neurons", "--policy", "dms", "--prompt", "a", "--max-tokens", "3"],
    ));
    succeeded(&program(&dir, &args(&[])));
    succeeded(&program(&dir, &prompt));

    let before = log(&dir);
    let refused = |more: &[&'static str], word: &str| {
        let output = program(&dir, &args(more));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(word), "{error} does not name {word}");
    };
    refused(&["--resume", "--tau", "0.2"], "tau was 0.1 and is 0.2");
    refused(&["--judged", "0"], "--judged");
    refused(&["--facts", "2"], "facts=2");
    refused(&["--tau", "0"], "tau=0");
    assert_eq!(log(&dir), before, "what is refused leaves the log alone");
}

#[test]
fn export_writes_a_folder_that_runs() {
    let bench = Bench::new();
    tiny().write_gates(&bench.path("gates"));
    let said = succeeded(&bench.run("export", &["--gates", "gates", "--to", "hf-nvidia", "--out", "out"]));
    assert!(said.contains("out") && said.contains("4 of gates, layout nvidia"), "{said}");
    let text = |args: &[&str]| {
        let rest = ["--prompt", "Sentence 7 speaks", "--max-tokens", "12"];
        succeeded(&program(&bench.dir, &[&["generate"], args, &rest[..]].concat()))
    };
    let exported = text(&["--model", "out", "--policy", "dms"]);
    assert_eq!(exported, text(&["--model", "out", "--policy", "dms:weights=gates/gates.safetensors"]));
    assert_ne!(exported, text(&["--model", "out", "--policy", "full"]));
    bench.fails("export", &["--gates", "gates", "--out", "out"], &["out", "not empty"]);
    bench.fails("export", &["--out", "new"], &["m.gguf", "no gates", "retrofit"]);
    bench.fails("export", &["--gates", "gates", "--to", "hf-shisa", "--out", "new"], &["adapter", "nvidia"]);
    bench.fails("export", &["--gates", "nowhere", "--out", "new"], &["nowhere"]);
    bench.fails("export", &["--gates", "gates"], &["--out"]);
    let alone = succeeded(&program(&bench.dir, &["export", "--to", "gates", "--model", "out", "--out", "alone"]));
    assert!(alone.contains("4 tensors of gates") && alone.contains("dms:weights=alone"), "{alone}");
    assert_eq!(exported, text(&["--model", "out", "--policy", "dms:weights=alone"]));
    bench.fails("export", &["--gates", "gates", "--to", "gates", "--out", "new"], &["--to gates"]);
    assert!(!bench.path("new").exists());
}

#[test]
fn inspect_says_what_is_in_a_file() {
    let bench = Bench::new();
    tiny().write_gates(&bench.path("gates"));
    let page = succeeded(&program(&bench.dir, &["inspect", "m.gguf"]));
    assert!(
        page.contains("LlamaForCausalLM") && page.contains("gates: none") && page.contains("blk.*.attn_q"),
        "{page}"
    );
    let page = succeeded(&program(&bench.dir, &["inspect", "gates"]));
    assert!(
        page.contains("policy: dms:weights=gates") && page.contains("dms:window=8,lag=previous,per=head"),
        "{page}"
    );
    let json = succeeded(&program(&bench.dir, &["inspect", "gates/gates.safetensors", "--json"]));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["gates"]["window"], &json["gates"]["layers"][1]["layer"]), (&json!(8), &json!(1)));
    let nothing = program(&bench.dir, &["inspect", "./nothing"]);
    assert!(!nothing.status.success() && String::from_utf8_lossy(&nothing.stderr).contains("no such file"));
}

#[test]
fn plan_reads_whatever_says_the_shape_of_a_model() {
    let bench = Bench::new();
    let config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512,
        "tie_word_embeddings": true, "eos_token_id": 0,
    });
    std::fs::create_dir(bench.path("model")).unwrap();
    std::fs::write(bench.path("model/config.json"), config.to_string()).unwrap();
    let plan = |model: &str, more: &[&str]| {
        let args = ["plan", "--model", model, "--gpu-memory", "80GB", "--context", "400"];
        program(&bench.dir, &[&args[..], more].concat())
    };
    let from_file = succeeded(&plan("model/config.json", &[]));
    // 2 layers of 2 heads of 16, keys and values, 2 bytes.
    assert!(from_file.contains("256 B of keys and values a token") && from_file.contains("8x |"), "{from_file}");
    assert_eq!(from_file.replace("model/config.json:", "model:"), succeeded(&plan("model", &[])));
    // 2 layers of 36,864 and an embedding of 300 rows: 92,928 parameters, whatever the files weigh.
    std::fs::write(bench.path("model/model.safetensors"), [0; 1000]).unwrap();
    assert!(succeeded(&plan("model", &[])).contains("181.5 KiB of weights"));
    assert!(succeeded(&plan("model", &["--dtype", "f32"])).contains("363.0 KiB of weights"));
    assert!(succeeded(&plan("m.gguf", &["--kv-dtype", "f32"])).contains("of keys and values a token"));
    let preset = succeeded(&plan("llama-3.1-8b", &["--compression", "4", "--price-per-hour", "2.5"]));
    assert!(preset.contains("128.0 KiB of keys") && preset.contains("4x |"), "{preset}");
    assert_eq!(preset.matches("cost of a million tokens").count(), 2);
    for (model, more, words) in [
        ("gpt-2", &[][..], &["gpt-2", "llama-3.1-8b"][..]),
        ("./nowhere", &[], &["nowhere"]),
        ("qwen3-8b", &["--gpu-memory", "8GB"], &["gpu-memory", "weights"]),
        ("qwen3-8b", &["--compression", "0.5"], &["compression=0.5"]),
        ("qwen3-8b", &["--context", "0"], &["context=0"]),
        ("t.txt", &[], &["t.txt"]),
    ] {
        let args: Vec<&str> = ["plan", "--model", model].into_iter().chain(more.iter().copied()).collect();
        let given = |name: &&str| !more.contains(name);
        let rest: Vec<&str> = [["--gpu-memory", "80GB"], ["--context", "400"]]
            .into_iter()
            .filter(|[name, _]| given(name))
            .flatten()
            .collect();
        let output = program(&bench.dir, &[args, rest].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && !error.contains("panicked"), "{model} {more:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{model} {more:?}: {error}");
    }
}

/// Problems are made up in bytes; where tokens have more of them, and a template or a text is no help.
#[test]
fn recall_and_chain_run_on_any_model() {
    let bench = Bench::new();
    let args = ["--tasks", "recall,chain,speed", "--policies", "full;h2o:recent=8", "--sweep", "2"];
    let args = [&args[..], &["--context", "400", "--samples", "2", "--out", "out"]].concat();
    succeeded(&bench.run("compare", &args));
    let rows = read(&bench.path("out/results.json")).rows;
    assert_eq!(rows.len(), 6);
    for row in rows.iter().filter(|row| row.policy == "h2o:recent=8 @2x" && row.task != "chain") {
        assert!((row.compression / 2.0 - 1.0).abs() < 0.05, "{}: {}", row.task, row.compression);
    }
}

#[test]
fn generate_without_a_model_walks_along_a_map() {
    let dir = tempfile::tempdir().unwrap();
    let output = program(&dir, &["generate", "--max-tokens", "30"]);
    let text = succeeded(&output);
    assert!(text.contains("-") && text.contains("\nfrom ") && text.contains(" steps.\n"), "{text}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("KV: peak"));
    let named = succeeded(&program(&dir, &["generate", "--prompt", "the code of", "--max-tokens", "3"]));
    assert!(!named.contains("steps"), "{named}");
}

fn program(dir: &TempDir, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvpolicy")).current_dir(dir.path()).args(args).output().unwrap()
}

/// The example is a program with a policy of its own; cargo builds it beside the tests.
#[test]
fn a_policy_of_a_user_runs_in_compare() {
    let target = std::env::current_exe().unwrap();
    let example = target.parent().unwrap().parent().unwrap().join("examples/my_policy");
    if !example.is_file() {
        println!("skipped: {} was not built; `cargo test` without --test builds it", example.display());
        return;
    }
    let bench = Bench::new();
    let mut program = Command::new(example);
    let args =
        ["compare", "--model", "m.gguf", "--policies", "full;stride:every=4;per-layer(0=full; rest=stride:every=2)"];
    program.current_dir(bench.dir.path()).args(args).args(COMPARE).args(["--tasks", "ppl"]);
    let table = succeeded(&program.output().unwrap());
    assert!(table.contains("stride:every=4"), "{table}");
    let rows = read(&bench.path("out/results.json")).rows;
    assert!(rows.iter().any(|row| row.policy_full == "stride:window=8,every=4" && row.compression > 2.0));
}

#[test]
fn generate_prints_text_and_what_the_cache_held() {
    let bench = Bench::new();
    let output = bench.run("generate", &["--prompt", "Hello there", "--policy", "window:size=8", "--max-tokens", "20"]);
    succeeded(&output);
    let nothing = bench.run("generate", &["--prompt", "Hello there", "--max-tokens", "0"]);
    assert_eq!(succeeded(&nothing), "\n");
    let summary = String::from_utf8_lossy(&output.stderr);
    for word in ["window:size=8,sinks=0", "prompt tokens", "KV: peak", "compression"] {
        assert!(summary.contains(word), "{summary}");
    }
}

#[test]
fn generate_gives_several_answers_that_hold_the_prompt_once() {
    let bench = Bench::new();
    let prompt = "one two three four ".repeat(20);
    let args = ["--prompt", &prompt, "--n", "3", "--temperature", "2", "--max-tokens", "9", "--policy", "full"];
    let run = |more: &[&str]| bench.run("generate", &[&args[..], more].concat());
    let output = run(&[]);
    let text = succeeded(&output);
    let answers: Vec<&str> = text.split("--- ").skip(1).map(|part| part.split_once('\n').unwrap().1).collect();
    assert_eq!(answers.len(), 3);
    assert!(answers[0] != answers[1] && answers[1] != answers[2], "{text}");
    assert_eq!(text, succeeded(&run(&[])), "the same seed");
    assert_ne!(text, succeeded(&run(&["--seed", "5"])));
    let summary = String::from_utf8_lossy(&output.stderr);
    let times = summary.split("answers began in").nth(1).unwrap().split_whitespace().nth(2).unwrap();
    assert!((1.0..2.0).contains(&times.parse::<f64>().unwrap()), "{summary}");
}

/// A build without CUDA says how to get one; a build with it names the device that is not there.
#[test]
fn a_device_that_cannot_be_had_is_named() {
    let bench = Bench::new();
    let words: &[&str] =
        if cfg!(feature = "cuda") { &["cuda:99"] } else { &["cuda:99", "without CUDA", "--features cuda"] };
    bench.fails("generate", &["--prompt", "x", "--device", "cuda:99"], words);
    bench.fails("compare", &["--text", "t.txt", "--device", "cuda:99"], words);
    bench.fails("generate", &["--prompt", "x", "--device", "tpu"], &["tpu", "cuda:N"]);
    if cfg!(not(feature = "cuda")) {
        bench.fails("generate", &["--prompt", "x", "--device", "cuda"], &["cuda:0"]);
    }
}

#[test]
fn policies_lists_every_policy_with_its_parameters() {
    let output = Command::new(env!("CARGO_BIN_EXE_kvpolicy")).arg("policies").output().unwrap();
    let text = succeeded(&output);
    for word in ["full", "h2o", "arXiv 2306.14048", "normalise", "dms", "lag", "adakv", "every"] {
        assert!(text.contains(word));
    }
    let unknown = Command::new(env!("CARGO_BIN_EXE_kvpolicy")).args(["policies", "h3o"]).output().unwrap();
    assert!(!unknown.status.success() && String::from_utf8_lossy(&unknown.stderr).contains("h3o"));
}

#[test]
fn bad_input_is_refused_with_its_reason() {
    let bench = Bench::new();
    std::fs::write(bench.path("bad.txt"), b"fine until \xff\xfe").unwrap();
    std::fs::write(bench.path("short.txt"), "Too short.").unwrap();
    std::fs::write(bench.path("empty.txt"), "").unwrap();
    std::fs::write(bench.path("no.gguf"), "no model").unwrap();
    let compare = |args: &[&str], words: &[&str]| bench.fails("compare", &[&["--samples", "1"], args].concat(), words);
    compare(&["--text", "t.txt", "--policies", "h3o"], &["unknown policy `h3o`", "h2o"]);
    compare(&["--text", "t.txt", "--policies", "h2o:budget=0"], &["budget=0", "entries"]);
    compare(&["--text", "t.txt", "--policies", "h2o:budget=8,recent=9"], &["recent=9 exceeds budget=8"]);
    compare(&["--text", "t.txt", "--policies", "window:sinks=2"], &["`size` is missing"]);
    compare(&["--text", "t.txt", "--policies", "dms", "--context", "256"], &["gates"]);
    compare(&["--text", "t.txt", "--policies", ";"], &["no policy"]);
    let twice = ["--text", "t.txt", "--policies", "full;tova:budget=9;full", "--context", "256"];
    compare(&twice, &["full is named twice"]);
    compare(&["--text", "t.txt", "--tasks", "ppl,poetry"], &["poetry", "needle"]);
    compare(&["--text", "t.txt", "--tasks", ","], &["no task"]);
    compare(&[], &["ppl", "--text", "recall,chain"]);
    compare(&["--tasks", "recall,needle"], &["needle", "--text"]);
    compare(&["--tasks", "chain", "--context", "100"], &["context=100"]);
    compare(&["--tasks", "chain", "--policies", "full", "--context", "200,200"], &["context=200 is there twice"]);
    compare(&["--tasks", "speed", "--policies", "full", "--context", "256", "--text", "short.txt"], &["too short"]);
    compare(&["--tasks", "word-key", "--context", "128"], &["context=128", "no room for lines"]);
    compare(&["--text", "t.txt", "--context", "100000"], &["100000", "512", "--allow-long"]);
    compare(&["--text", "t.txt", "--context", "0"], &["context=0"]);
    compare(&["--text", "t.txt", "--samples", "0"], &["samples"]);
    compare(&["--text", "t.txt", "--policies", "h2o", "--sweep", "0.5", "--context", "256"], &["0.5"]);
    compare(
        &["--text", "t.txt", "--policies", "snapkv:window=200", "--sweep", "4", "--context", "256"],
        &["left out at context 256: snapkv:window=200 @4x", "nothing to compare"],
    );
    compare(&["--text", "t.txt", "--policies", "h2o", "--sweep", "2", "--context", "2"], &["context=2"]);
    compare(&["--text", "bad.txt"], &["bad.txt", "UTF-8", "byte 11"]);
    compare(&["--text", "short.txt", "--context", "256", "--policies", "full"], &["too short", "256"]);
    compare(&["--text", "empty.txt", "--context", "256", "--policies", "full"], &["too short"]);
    compare(&["--text", "nowhere.txt"], &["nowhere.txt"]);
    let exhausted = ["--text", "t.txt", "--context", "256", "--policies", "full", "--kv-memory", "64KiB"];
    compare(&exhausted, &["exhausted"]);
    let generate = |args: &[&str], words: &[&str]| bench.fails("generate", args, words);
    generate(&["--prompt", ""], &["prompt is empty"]);
    generate(&["--prompt", "  "], &["prompt is empty"]);
    generate(&[], &["--prompt"]);
    generate(&["--prompt-file", "bad.txt"], &["UTF-8"]);
    generate(&["--prompt", "x", "--kv-memory", "a lot"], &["a lot"]);
    generate(&["--prompt", "x", "--n", "0"], &["n=0"]);
    generate(&["--prompt", "x", "--n", "2"], &["n=2", "--temperature"]);
    generate(&["--prompt", "x", "--temperature=-1"], &["temperature=-1"]);
    for (args, words) in [
        (&["compare", "--tasks", "ppl"][..], &["ppl", "--text"][..]),
        (&["compare", "--tasks", "poetry"], &["poetry", "recall"]),
        (&["compare", "--context", "4096"], &["4096", "--allow-long"]),
        (&["generate", "--prompt", ""], &["prompt is empty"]),
    ] {
        let output = self::program(&bench.dir, args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && words.iter().all(|word| text.contains(word)), "{args:?}: {text}");
    }
    let mut program = Command::new(env!("CARGO_BIN_EXE_kvpolicy"));
    let args = ["generate", "--model", "no.gguf", "--prompt", "x"];
    let output = program.current_dir(bench.dir.path()).args(args).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("is no GGUF file"));
}
