//! Scores and kept entries against kvpress, the Python library of the same methods.
//!
//! `tests/scorers` holds what it computed on tiny random models; the README there describes the files. A case is
//! replayed: the recorded queries, keys and values go into a cache under the policy that means the same, and what the
//! policy answers and what the cache then holds are compared. One line a case is printed.
//!
//! `KVPOLICY_SCORERS=DIR cargo test --release --test scorers` runs another folder of that format; what has no match
//! here is skipped with the reason.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "scorers/replay.rs"]
mod replay;

use kvpolicy::{
    Budget, LayerCx, ModelSpec, Phase, Policy,
    compose::Pyramid,
    params::{Amount, Param},
    policies::{Pooling, SnapKv},
};
use replay::{Case, Model, Replay, Row, index, read_json, text};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fmt,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The policy that does what a press does, or why there is none. `budget` is what our policies take, `entries` the same
/// as a number.
fn policy_for(params: &Value, budget: &str, entries: usize) -> Result<String, String> {
    let number = |name: &str| params[name].clone();
    let inner = |budget: &str| policy_for(&params["inner"], budget, entries);
    let snapkv = || {
        let (window, kernel) = (number("window_size"), number("kernel_size"));
        format!("snapkv:budget={budget},window={window},kernel={kernel},pool=avg")
    };
    Ok(match params["press"].as_str().unwrap() {
        "KnormPress" => format!("knorm:budget={budget}"),
        "KeyDiffPress" => format!("keydiff:budget={budget}"),
        "TOVAPress" => format!("tova:budget={budget},recent=1"), // kvpress shields the newest token, the paper does not
        "SnapKVPress" => snapkv(),
        "PyramidKVPress" => format!("pyramid:beta={}({})", number("beta"), snapkv()),
        // A mean over queries and group; ours sums both unless told to normalise.
        "ObservedAttentionPress" => format!("h2o:budget={budget},recent=0,normalise=true"),
        "ExpectedAttentionPress" => {
            let [sinks, future] = ["n_sink", "n_future_positions"].map(number);
            let [covariance, vnorm, epsilon] = ["use_covariance", "use_vnorm", "epsilon"].map(number);
            let share = format!("sinks={sinks},future={future},covariance={covariance},vnorm={vnorm}");
            format!("expected-attention:budget={budget},{share},epsilon={epsilon}")
        }
        // Ours has a fixed size, theirs follows the number kept.
        "StreamingLLMPress" => {
            let sinks = index(&params["n_sink"]);
            let size = entries.checked_sub(sinks).filter(|size| *size > 0).ok_or("keeps no more than the sinks")?;
            format!("window:size={size},sinks={sinks}")
        }
        "AdaKVPress" => format!("adakv:floor={}({})", number("alpha_safeguard"), inner(budget)?),
        "DecodingPress" if params["inner"]["press"] == "SnapKVPress" => {
            return Err("decode rotates all remembered queries to the newest position; ours keep their own".into());
        }
        "DecodingPress" => {
            format!("every({}, {})", number("compression_interval"), inner(&number("target_size").to_string())?)
        }
        "CriticalKVPress" => return Err("reads the output projection, which a cache does not see".into()),
        "DMSPress" => return Err("marks by a threshold on a score; ours by a trained bit".into()),
        other => return Err(format!("no policy here does what {other} does")),
    })
}

#[test]
fn policies_score_and_keep_what_kvpress_does() {
    let given = std::env::var_os("KVPOLICY_SCORERS").map(PathBuf::from);
    let folder = &given.clone().unwrap_or_else(own_folder);
    let (mut failed, mut skipped, mut families) = (vec![], 0, BTreeMap::<String, Report>::new());
    for name in cases(folder) {
        match run_case(folder, &name) {
            Err(reason) => {
                skipped += 1;
                say(&format!("{name:50} skipped: {reason}"));
            }
            Ok((family, report)) => {
                say(&format!("{name:50} {report}"));
                failed.extend(report.faults.first().map(|fault| format!("{name}: {fault}")));
                families.entry(family).or_default().add(report);
            }
        }
    }
    families.iter().for_each(|(family, report)| say(&format!("all of {family:43} {report}")));
    assert!(!families.is_empty(), "{} has no case that a policy here can run", folder.display());
    assert!(failed.is_empty(), "{} cases failed, each with its first fault:\n{}", failed.len(), failed.join("\n"));
    assert!(given.is_some() || skipped == 0, "the project's own folder has cases that do not run");
}

#[test]
fn every_layer_of_a_pyramid_gets_the_budget_that_kvpress_gives_it() {
    let tables = read_json(&own_folder().join("tables.json"));
    let draws = tables["pyramid_budgets"].as_array().unwrap();
    assert_eq!(draws.len(), 250);
    for draw in draws {
        let (layers, window) = (index(&draw["layers"]), index(&draw["window"]) as u32);
        let budget = Amount::Share(1.0 - draw["ratio"].as_f64().unwrap());
        let inner = Arc::new(SnapKv { budget, window, kernel: 5, pool: Pooling::Avg });
        let pyramid = Pyramid { beta: draw["beta"].as_f64().unwrap(), inner };
        let spec = ModelSpec::new(layers, 1, 1, 2);
        let got = (0..layers).map(|layer| pyramid.budget(&LayerCx { layer, spec: &spec }, index(&draw["q_len"])));
        let want = draw["budgets"].as_array().unwrap().iter().map(|n| Budget::PerHead(n.as_f64().unwrap()));
        assert_eq!(got.collect::<Vec<_>>(), want.collect::<Vec<_>>(), "{draw}");
    }
}

#[test]
fn a_share_keeps_as_many_entries_as_the_ratio_of_kvpress_leaves() {
    let tables = read_json(&own_folder().join("tables.json"));
    let kept = tables["scorer_n_kept"].as_array().unwrap();
    assert_eq!(kept.len(), 670);
    let share = |ratio: &Value| Amount::Share(1.0 - ratio.as_f64().unwrap());
    for row in kept {
        let printed = Amount::read(&share(&row[1]).to_string()).unwrap(); // as a policy string has it
        let got = [share(&row[1]), printed].map(|amount| amount.of(index(&row[0])) as usize);
        assert_eq!(got, [index(&row[2]); 2], "[tokens, ratio, kept] {row}");
    }
}

fn own_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scorers")
}

/// A line that the test harness does not swallow.
fn say(line: &str) {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}").unwrap();
}

/// The names of a folder's cases.
fn cases(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let cases = names.filter_map(|name| Some(name.strip_prefix("case_")?.strip_suffix(".json")?.to_string()));
    let mut cases: Vec<String> = cases.collect();
    cases.sort();
    cases
}

/// Replays a case: the press and the report, or why it is skipped.
fn run_case(folder: &Path, name: &str) -> Result<(String, Report), String> {
    let case = Case::load(folder, &format!("case_{name}"));
    policy_for(case.params(), "1", 1 << 20)?;
    let report = match case.json["kind"].as_str() {
        Some("prefill") => run_prefill(&case, &Model::new(&Case::load(folder, text(&case.json["base"]))))?,
        Some("decode") => run_decode(&case, &Model::new(&case)),
        kind => return Err(format!("kind {kind:?} is unknown")),
    };
    let inner = case.params()["inner"]["press"].as_str().map_or_else(String::new, |inner| format!(" of {inner}"));
    Ok((format!("{}{inner}", text(&case.params()["press"])), report))
}

/// Compresses, at every ratio, a prefill that came in one piece and one that came in chunks.
fn run_prefill(case: &Case, model: &Model) -> Result<Report, String> {
    let mut report = Report::default();
    let t = model.tokens;
    let (first, last) = (t / 3, t / 8); // the last chunk is shorter than most windows of queries
    for (name, ratio) in case.json["per_ratio"].as_object().unwrap() {
        let share = 1.0 - name.trim_start_matches('r').parse::<f64>().unwrap();
        let entries = (t as f64 * share) as usize;
        let policy = policy_for(case.params(), &Amount::Share(share).to_string(), entries)?;
        let score = case.tensors.get("score").unwrap_or_else(|| &case.tensors[&format!("score.{name}")]);
        let score: Vec<Vec<Vec<f32>>> = score.flatten(1, 2).unwrap().to_vec3().unwrap();
        let kept: Vec<Vec<Vec<u8>>> = case.tensors[&format!("kept.{name}")].flatten(1, 2).unwrap().to_vec3().unwrap();
        for chunks in [vec![t], vec![first, 1, t - first - 1 - last, last]] {
            let mut replay = Replay::new(model, &policy);
            let rankings = replay.prefill(&chunks);
            for layer in 0..model.spec.layers {
                let at = format!("{policy} in chunks of {chunks:?}, layer {layer}");
                for (row, score) in score[layer].iter().enumerate() {
                    let want = score.iter().copied().enumerate().map(|(pos, score)| (pos as u32, score)).collect();
                    // A policy that only marks ranks nothing.
                    let ranked = rankings.get(layer).map(|ranking| &ranking[row]);
                    ranked.into_iter().for_each(|ranked| report.compare_scores(&replay, ranked, &want, &at));
                }
                let cut = Cut {
                    entries,
                    tie: ratio["tie_at_boundary"][layer].as_bool().unwrap(),
                    floor: case.params()["alpha_safeguard"].as_f64(),
                };
                let heads = model.spec.kv_heads;
                for (seq, (kept, score)) in kept[layer].chunks(heads).zip(score[layer].chunks(heads)).enumerate() {
                    let held: Vec<Vec<u32>> = (0..heads).map(|head| replay.held(layer, seq * heads + head)).collect();
                    report.compare_kept(&cut, &held, kept, score, &at);
                }
            }
        }
    }
    Ok(report)
}

/// Compresses again and again in decode. The recorded calls are replayed twice: as turns, of which those after which
/// kvpress compressed end a prefill; and, where each call has one token, as decode steps, so that our clock decides.
fn run_decode(case: &Case, model: &Model) -> Report {
    let mut report = Report::default();
    let policy = policy_for(case.params(), "", 0).unwrap();
    let list = |what: &str| case.json[what].as_array().unwrap().iter();
    let calls: Vec<usize> = list("calls").map(|call| index(&call[1]) - index(&call[0])).collect();
    let single = calls[1..].iter().all(|&len| len == 1);
    for as_turns in [Some(true), single.then_some(false)].into_iter().flatten() {
        let mut replay = Replay::new(model, &policy);
        for (call, &len) in calls.iter().enumerate() {
            let event = list("events").position(|event| index(&event["call"]) == call);
            let phase = match call {
                0 => Phase::Prefill { last: false }, // kvpress leaves the prompt alone
                _ if as_turns => Phase::Prefill { last: event.is_some() },
                _ => Phase::Decode,
            };
            let rankings = replay.step(&vec![len; model.batch], phase);
            let (trimmed, due) = (rankings.len(), if event.is_some() { model.spec.layers } else { 0 });
            report.check(trimmed == due, || format!("{policy}: trims {trimmed} layers at call {call}, not {due}"));
            for (layer, ranking) in rankings.iter().enumerate().filter(|_| event.is_some()) {
                let at = format!("{policy}, call {call}, layer {layer}");
                let read = |what| case.rows(&format!("event{}.L{layer}.{what}", event.unwrap_or(0)));
                let (before, after, score) = (read("before"), read("after"), read("score"));
                for (row, ranked) in ranking.iter().enumerate() {
                    let want = before[row].iter().map(|pos| *pos as u32).zip(score[row].iter().copied()).collect();
                    report.compare_scores(&replay, ranked, &want, &at);
                    let mut after: Vec<u32> = after[row].iter().map(|pos| *pos as u32).collect();
                    after.sort_unstable();
                    report.sets += 1;
                    let held = replay.held(layer, row);
                    report.check(held == after, || format!("{at}: row {row} holds {held:?}, not {after:?}"));
                }
            }
        }
    }
    report
}

/// What was compared and how it came out.
#[derive(Default)]
struct Report {
    scores: usize,
    worst: f32,
    sets: usize,
    tied: usize,
    swapped: usize,
    faults: Vec<String>,
}

/// How a layer is cut.
struct Cut {
    /// Entries a head keeps on average.
    entries: usize,
    /// Whether the cut falls between equal scores.
    tie: bool,
    /// The heads share: the part of its entries that each is sure of.
    floor: Option<f64>,
}

impl Report {
    fn add(&mut self, other: Report) {
        self.worst = self.worst.max(other.worst);
        self.scores += other.scores;
        self.sets += other.sets;
        self.tied += other.tied;
        self.swapped += other.swapped;
        self.faults.extend(other.faults);
    }

    fn check(&mut self, holds: bool, fault: impl FnOnce() -> String) {
        if !holds {
            self.faults.push(fault());
        }
    }

    /// One row: the entries must be the same, and so must the scores of those that are not protected (kvpress writes a
    /// constant there).
    fn compare_scores(&mut self, replay: &Replay, ranked: &Row, want: &Row, at: &str) {
        self.check(ranked.keys().eq(want.keys()), || format!("{at}: ranks {:?}, not {:?}", ranked.keys(), want.keys()));
        let now = want.keys().next_back().copied().unwrap_or(0);
        for (pos, want) in want.iter().filter(|(pos, _)| !replay.protect.covers(**pos, now)) {
            let Some(got) = ranked.get(pos) else { continue };
            let error = (got - want).abs();
            self.scores += 1;
            self.worst = self.worst.max(error);
            let allowed = 1e-6 + replay.relative * want.abs();
            self.check(error <= allowed, || format!("{at}: position {pos} scores {got}, not {want}"));
        }
    }

    /// The heads of one layer of one sequence.
    fn compare_kept(&mut self, cut: &Cut, held: &[Vec<u32>], kept: &[Vec<u8>], score: &[Vec<f32>], at: &str) {
        let bits = |(held, kept): (&Vec<u32>, &Vec<u8>)| {
            let mut bits = vec![false; kept.len()];
            let mut once = |pos: &u32| !std::mem::replace(&mut bits[*pos as usize], true);
            assert!(held.iter().all(&mut once), "{at}: a position is held twice: {held:?}");
            bits
        };
        let ours: Vec<Vec<bool>> = held.iter().zip(kept).map(bits).collect();
        let theirs: Vec<Vec<bool>> = kept.iter().map(|kept| kept.iter().map(|bit| *bit != 0).collect()).collect();
        let Some(floor) = cut.floor else {
            for ((ours, theirs), score) in ours.iter().zip(&theirs).zip(score) {
                self.compare_set(cut, ours, theirs, score, at);
            }
            return;
        };
        let counts: Vec<usize> = held.iter().map(Vec::len).collect();
        let (floor, total) = ((cut.entries as f64 * floor) as usize, cut.entries * held.len());
        let holds = counts.iter().sum::<usize>() == total && counts.iter().all(|n| *n >= floor);
        self.check(holds, || format!("{at}: heads hold {counts:?}, not {total} with at least {floor} each"));
        self.compare_set(cut, &ours.concat(), &theirs.concat(), &score.concat(), at);
    }

    /// Entries that compete with each other. Rounding may swap two that are within 1e-6 of each other.
    fn compare_set(&mut self, cut: &Cut, ours: &[bool], theirs: &[bool], score: &[f32], at: &str) {
        let scores_where = |choose: &dyn Fn(usize) -> bool| {
            let mut scores: Vec<f32> = (0..score.len()).filter(|i| choose(*i)).map(|i| score[i]).collect();
            scores.sort_by(f32::total_cmp);
            scores
        };
        let added = scores_where(&|i| ours[i] && !theirs[i]);
        let lost = scores_where(&|i| theirs[i] && !ours[i]);
        let holds = if cut.tie {
            // Which of the tied entries stay is free, and ours keeps all that it protects, over its budget if need be.
            let tied = scores_where(&|i| theirs[i])[0];
            added.len() >= lost.len() && added.iter().chain(&lost).all(|score| *score == tied)
        } else {
            self.swapped += added.len();
            added.len() == lost.len() && added.iter().zip(&lost).all(|(a, b)| (a - b).abs() <= 1e-6)
        };
        self.sets += 1;
        self.tied += cut.tie as usize;
        self.check(holds, || format!("{at}: keeps entries scored {added:?} in place of {lost:?}"));
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.scores {
            0 => write!(f, "no scores, ")?,
            n => write!(f, "{n} scores within {:.1e}, ", self.worst)?,
        }
        write!(f, "{} kept sets", self.sets)?;
        if self.tied > 0 {
            write!(f, " ({} cut a tie)", self.tied)?;
        }
        if self.swapped > 0 {
            write!(f, " but for {} swaps within 1e-6", self.swapped)?;
        }
        f.write_str(if self.faults.is_empty() { ": ok" } else { ": FAILED" })
    }
}
