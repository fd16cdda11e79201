//! Policy strings: every good one prints as a string that makes it again, every bad one is refused with all its
//! reasons.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Rng, cases, complete, policies::EVERY_POLICY, policy};
use kvpolicy::{CpuConfig, Error, KvCache, ModelSpec, Registry, cpu};
use proptest::{prelude::*, sample::select};

/// What a parameter accepts, written down once more.
#[derive(Debug, Clone, Copy)]
enum Accepts {
    Whole(u64, u64),
    AutoWhole(u64, u64),
    Number(f64, f64),
    Words(&'static [&'static str]),
    /// Entries or a share.
    Amount,
    Path,
}
use Accepts::{Amount, AutoWhole, Number, Path, Whole, Words};

const BOOL: Accepts = Words(&["true", "false"]);
const ENTRIES: Accepts = Whole(0, 1 << 30);

/// Every parameter of every policy, in order of printing.
const PARAMS: &[(&str, &[(&str, Accepts)])] = &[
    ("full", &[]),
    ("window", &[("size", Whole(1, 1 << 30)), ("sinks", ENTRIES)]),
    (
        "dms",
        &[
            ("weights", Path),
            ("window", AutoWhole(0, 1 << 30)),
            ("lag", Words(&["auto", "own", "previous"])),
            ("per", Words(&["auto", "head", "layer"])),
            ("bias", Number(-1e6, 1e6)),
            ("disable", BOOL),
        ],
    ),
    ("h2o", &[("budget", Amount), ("recent", AutoWhole(0, 1 << 30)), ("normalise", BOOL)]),
    ("tova", &[("budget", Amount), ("recent", ENTRIES)]),
    (
        "snapkv",
        &[("budget", Amount), ("window", Whole(1, 4096)), ("kernel", Whole(1, 255)), ("pool", Words(&["avg", "max"]))],
    ),
    ("knorm", &[("budget", Amount), ("recent", ENTRIES)]),
    ("keydiff", &[("budget", Amount), ("recent", ENTRIES)]),
    (
        "expected-attention",
        &[
            ("budget", Amount),
            ("sinks", Whole(0, 1 << 20)),
            ("future", Whole(1, 1 << 20)),
            ("covariance", BOOL),
            ("vnorm", BOOL),
            ("epsilon", Number(0.0, 1.0)),
        ],
    ),
    (
        "rkv",
        &[
            ("budget", Amount),
            ("buffer", Whole(1, 1 << 20)),
            ("window", Whole(1, 4096)),
            ("kernel", Whole(1, 255)),
            ("lambda", Number(0.0, 1.0)),
            ("similar", Number(-1.0, 1.0)),
        ],
    ),
    ("random", &[("budget", Amount), ("recent", ENTRIES), ("seed", Whole(0, u64::MAX))]),
    ("random-gate", &[("rate", Number(0.0, 1.0)), ("window", ENTRIES), ("seed", Whole(0, u64::MAX))]),
    ("adakv", &[("floor", Number(0.0, 1.0))]),
    ("pyramid", &[("beta", Number(1.0, 1e6))]),
    ("per-layer", &[]),
    ("every", &[]),
];

impl Accepts {
    fn good(self, rng: &mut Rng) -> String {
        let whole = |rng: &mut Rng, low: u64, high: u64| match rng.below(4) {
            0 => low,
            1 => high,
            2 => low + rng.draw() % (high - low).min(1 << 10),
            _ => low + rng.draw() % (high - low),
        };
        match self {
            Whole(low, high) => whole(rng, low, high).to_string(),
            AutoWhole(..) if rng.chance(0.3) => "auto".into(),
            AutoWhole(low, high) => whole(rng, low, high).to_string(),
            Number(low, high) => (low + (high - low) * rng.draw() as f64 / u64::MAX as f64).to_string(),
            Words(words) => rng.pick(words).into(),
            Amount if rng.chance(0.5) => (1 + rng.draw() % 5_000).to_string(),
            // Up to four decimals, as people write them.
            Amount => format!("{}%", (1 + rng.draw() % 1_000_000) as f64 / 1e4),
            Path => rng.pick(&["auto", "gates.safetensors", "/a b/c=d:e%/ü.bin", "..", "C:\\x"]).into(),
        }
    }

    fn bad(self, rng: &mut Rng) -> String {
        let word = rng.pick(&["", "x", "-", "1 2", "1e", "0x10", "NaN", "inf", "-inf", "none", "25%%", "%", "½"]);
        let beyond = match self {
            Whole(low, high) | AutoWhole(low, high) => match rng.below(4) {
                0 if low > 0 => (low - 1).to_string(),
                1 => (high as u128 + 1).to_string(),
                2 => "-1".into(),
                3 => "1.5".into(),
                _ => word.into(),
            },
            Number(low, high) => match rng.below(3) {
                0 => (low - 0.001).to_string(),
                1 => (high + 0.001).to_string(),
                _ => word.into(),
            },
            Words(_) => rng.pick(&["", "True", "yes", "1", "Own", "auto auto"]).into(),
            Amount => rng.pick(&["0", "0%", "-5", "-5%", "100.1%", "1.5", "NaN%", "1e-400%", "inf%", word]).into(),
            Path => rng.pick(&["", "a)", "b;c"]).into(),
        };
        // `auto` is no number, and `inf` no whole one: nothing in `word` is ever accepted.
        beyond
    }

    /// The bounds as a message has to name them.
    fn bounds(self) -> Vec<String> {
        match self {
            Whole(_, u64::MAX) => vec!["whole number".into()],
            Whole(low, high) | AutoWhole(low, high) => vec!["whole number".into(), format!("{low}..={high}")],
            Number(low, high) => vec!["number".into(), format!("{low}..={high}")],
            Words(words) => words.iter().filter(|word| **word != "auto").map(|word| word.to_string()).collect(),
            Amount => vec!["512".into(), "25%".into()],
            Path => vec!["path".into()],
        }
    }
}

fn parameters(name: &str) -> &'static [(&'static str, Accepts)] {
    PARAMS.iter().find(|(policy, _)| *policy == name).unwrap().1
}

/// The text a wrapper stands around.
fn inside(name: &str) -> &'static str {
    match name {
        "adakv" | "pyramid" => "(knorm:budget=9,recent=0)",
        "every" => "(3, window:size=9,sinks=0)",
        "per-layer" => "(0-3=full; 7=window:size=9,sinks=0; rest=tova:budget=9,recent=0)",
        _ => "",
    }
}

fn write(name: &str, given: &[(&str, String)]) -> String {
    let given: Vec<String> = given.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let colon = if given.is_empty() { "" } else { ":" };
    format!("{name}{colon}{}{}", given.join(","), inside(name))
}

/// Contradictions that the values themselves make, each as its message.
fn contradictions(given: &[(&str, String)]) -> Vec<String> {
    let value = |name: &str| given.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str());
    let mut all = vec![];
    if let Some(kernel) = value("kernel").filter(|kernel| kernel.parse::<u32>().unwrap() % 2 == 0) {
        all.push(format!("kernel={kernel} is even: take an odd width"));
    }
    for shielded in ["recent", "window", "sinks"] {
        if let (Some(n), Some(Ok(budget))) = (value(shielded), value("budget").map(str::parse::<u64>))
            && n.parse::<u64>().is_ok_and(|n| n > budget)
        {
            all.push(format!("{shielded}={n} exceeds budget={budget}"));
        }
    }
    all
}

#[track_caller]
fn reasons(text: &str) -> Vec<String> {
    match Registry::standard().parse(text) {
        Err(Error::Policy { text: named, reasons }) => {
            assert_eq!(named, text.trim());
            reasons
        }
        other => panic!("`{text}` gave {other:?}"),
    }
}

#[test]
fn the_parameters_written_down_here_are_those_of_the_registry() {
    let registry = Registry::standard();
    let told: Vec<_> = registry.entries().iter().map(|e| e.info.name).collect();
    assert_eq!(told, PARAMS.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    for entry in registry.entries() {
        let told: Vec<_> = entry.info.params.iter().map(|p| p.name).collect();
        assert_eq!(told, parameters(entry.info.name).iter().map(|(name, _)| *name).collect::<Vec<_>>());
        assert!(!entry.info.doc.trim().is_empty() && !entry.info.paper.is_empty());
        for (info, (_, accepts)) in entry.info.params.iter().zip(parameters(entry.info.name)) {
            assert!(!info.doc.trim().is_empty(), "{} of {} is not documented", info.name, entry.info.name);
            for part in accepts.bounds() {
                assert!(info.accepts.contains(&part), "{} of {}: {}", info.name, entry.info.name, info.accepts);
            }
        }
    }
}

#[test]
fn every_policy_prints_as_a_string_that_makes_it_again() {
    for text in EVERY_POLICY {
        let printed = policy(text).to_string();
        assert_eq!(policy(&printed).to_string(), printed);
    }
}

#[test]
fn a_default_that_is_told_is_the_default_that_is_taken() {
    for entry in Registry::standard().entries() {
        let mut rng = Rng(1);
        let required: Vec<_> = entry.info.params.iter().filter(|p| p.default.is_none()).collect();
        let accepts = |name: &str| parameters(entry.info.name).iter().find(|p| p.0 == name).unwrap().1;
        let given: Vec<_> = required.iter().map(|p| (p.name, accepts(p.name).good(&mut rng))).collect();
        let Ok(policy) = Registry::standard().parse(&write(entry.info.name, &given)) else { continue };
        for info in &entry.info.params {
            if let Some(default) = &info.default {
                assert!(policy.to_string().contains(&format!("{}={default}", info.name)), "{policy}");
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(1_000))]

    #[test]
    fn values_in_range_are_accepted_and_printed_back(name in select(PARAMS), seed: u64) {
        let mut rng = Rng(seed);
        let given: Vec<_> = name.1.iter().map(|(key, accepts)| (*key, accepts.good(&mut rng))).collect();
        let text = write(name.0, &given);
        let contradictions = contradictions(&given);
        if contradictions.is_empty() {
            prop_assert_eq!(policy(&text).to_string(), text);
        } else {
            prop_assert_eq!(reasons(&text), contradictions);
        }
    }

    #[test]
    fn a_value_out_of_range_is_refused_by_name_value_and_range(name in select(PARAMS), seed: u64) {
        prop_assume!(!name.1.is_empty());
        let mut rng = Rng(seed);
        let mut given: Vec<_> = name.1.iter().map(|(key, accepts)| (*key, accepts.good(&mut rng))).collect();
        // Any number of them, and every one has to be told.
        let mut wrong = vec![];
        for (i, (key, accepts)) in name.1.iter().enumerate() {
            if rng.chance(0.5) || i + 1 == name.1.len() && wrong.is_empty() {
                given[i].1 = accepts.bad(&mut rng);
                wrong.push((key, given[i].1.clone(), accepts));
            }
        }
        let text = write(name.0, &given);
        let reasons = reasons(&text);
        prop_assert_eq!(reasons.len(), wrong.len(), "{}: {:?}", text, reasons);
        for ((key, value, accepts), reason) in wrong.into_iter().zip(&reasons) {
            let said = format!("{key}={value} is not accepted: ");
            prop_assert!(reason.starts_with(&said), "{}: {}", text, reason);
            prop_assert!(accepts.bounds().iter().all(|part| reason.contains(part)), "{}: {}", text, reason);
        }
    }

    /// The order of parameters, white space and those left out do not matter.
    #[test]
    fn the_way_it_is_written_never_matters(name in select(PARAMS), seed: u64) {
        let mut rng = Rng(seed);
        let given: Vec<_> = name.1.iter().map(|(key, accepts)| (*key, accepts.good(&mut rng))).collect();
        prop_assume!(contradictions(&given).is_empty());
        let want = policy(&write(name.0, &given)).to_string();
        let mut parts: Vec<String> = given.iter().map(|(key, value)| format!(" {key} = {value} ")).collect();
        for i in (1..parts.len()).rev() {
            parts.swap(i, rng.below(i + 1));
        }
        let text = format!(" {} : {}{} ", name.0, parts.join(","), inside(name.0));
        prop_assert_eq!(policy(&text).to_string(), want);
    }

    /// Whatever digits a share has, printing it loses nothing.
    #[test]
    fn a_share_survives_printing(percent in 0.000_001..=100.0f64) {
        let first = policy(&format!("knorm:budget={percent}%"));
        let printed = first.to_string();
        prop_assert_eq!(policy(&printed).to_string(), printed);
        let spec = ModelSpec::new(1, 1, 1, 8);
        let budget = |text: &str| policy(text).budget(&kvpolicy::LayerCx { layer: 0, spec: &spec }, 1_000_000);
        prop_assert_eq!(budget(&first.to_string()), budget(&format!("knorm:budget={percent}%")));
    }

    #[test]
    fn nested_wrappers_round_trip(depth in 1..6usize, seed: u64) {
        let mut rng = Rng(seed);
        let mut text = rng.pick(&["full", "h2o:budget=9,recent=3", "snapkv:budget=50%", "dms:window=3"]).to_string();
        for _ in 0..depth {
            text = match rng.below(4) {
                0 => format!("adakv:floor=0.5({text})"),
                1 => format!("pyramid({text})"),
                2 => format!("every({}, {text})", 1 + rng.below(9)),
                _ => format!("per-layer(0={text}; 2-4=full; rest={text})"),
            };
        }
        let printed = policy(&text).to_string();
        prop_assert_eq!(policy(&printed).to_string(), printed);
    }

    #[test]
    fn no_text_panics(text: String) {
        _ = Registry::standard().parse(&text);
        _ = Registry::standard().parse_list(&text);
    }

    /// Text made of the grammar's own pieces goes deeper than random letters.
    #[test]
    fn no_scramble_of_the_grammar_panics(
        pieces in prop::collection::vec(select(PIECES), 0..20),
    ) {
        let text = pieces.concat();
        match Registry::standard().parse(&text) {
            Ok(policy) => prop_assert_eq!(common::policy(&policy.to_string()).to_string(), policy.to_string()),
            Err(Error::Policy { reasons, .. }) => prop_assert!(!reasons.is_empty()),
            Err(other) => prop_assert!(false, "{}", other),
        }
        _ = Registry::standard().parse_list(&text);
    }
}

const PIECES: &[&str] = &[
    "full",
    "h2o",
    "window",
    "dms",
    "adakv",
    "pyramid",
    "every",
    "per-layer",
    "tova",
    "(",
    "(",
    ")",
    ")",
    ":",
    "=",
    "=",
    ",",
    ";",
    " ",
    "-",
    "budget",
    "size",
    "recent",
    "sinks",
    "floor",
    "weights",
    "0",
    "3",
    "8",
    "25%",
    "0-3",
    "5-2",
    "rest",
    "rest=",
    "budget=9",
    "size=4",
    "é",
    "\u{0}",
    "99999999999999999999",
    "auto",
    "true",
];

#[test]
fn every_bad_string_is_refused_with_its_reasons() {
    let known = "known: full, window, dms,";
    for (text, want) in [
        ("", vec!["unknown policy `` (known: full"]),
        ("h20:budget=5", vec!["unknown policy `h20`"]),
        ("Full", vec!["unknown policy `Full`"]),
        ("full)", vec!["unknown policy `full)`"]),
        (":budget=5", vec!["unknown policy ``"]),
        ("nothing", vec![known]),
        ("full:x=1", vec!["unknown parameter `x=1` (it has none)"]),
        ("h2o:budget=5,recent=0,budgett=6", vec!["unknown parameter `budgett=6` (known: budget, recent, normalise)"]),
        ("h2o", vec!["parameter `budget` is missing"]),
        ("h2o:", vec!["parameter `budget` is missing"]),
        ("h2o:budget", vec!["`budget` is not of the form parameter=value", "parameter `budget` is missing"]),
        ("window:size=5,size=6", vec!["parameter `size` is given twice"]),
        ("window:size=0", vec!["size=0 is not accepted: whole number, 1..=1073741824"]),
        ("window:size=4294967296", vec!["size=4294967296 is not accepted: whole number, 1..=1073741824"]),
        ("h2o:budget=512,recent=600", vec!["recent=600 exceeds budget=512"]),
        ("snapkv:budget=16,window=32", vec!["window=32 exceeds budget=16"]),
        ("snapkv:budget=64,kernel=4", vec!["kernel=4 is even"]),
        ("rkv:budget=4,kernel=6", vec!["kernel=6 is even", "window=8 exceeds budget=4"]),
        ("expected-attention:budget=3", vec!["sinks=4 exceeds budget=3"]),
        ("full()", vec!["takes no inner policy"]),
        ("full(tova:budget=4)", vec!["takes no inner policy"]),
        ("adakv(knorm:budget=4", vec!["`(` is not closed at the end", "write adakv(policy)"]),
        ("adakv(knorm:budget=4) x", vec!["`(` is not closed at the end", "write adakv(policy)"]),
        ("adakv", vec!["wraps another policy: write adakv(policy)"]),
        ("adakv()", vec!["wraps another policy: write adakv(policy)"]),
        ("adakv(nope)", vec!["in `nope`: unknown policy `nope`"]),
        ("adakv(tova:budget=9)", vec!["keeps the same positions in every KV head, there is nothing to share"]),
        ("adakv(every(2, tova:budget=9))", vec!["keeps the same positions in every KV head"]),
        ("adakv(per-layer(0=tova:budget=9; rest=full))", vec!["keeps the same positions in every KV head"]),
        ("every(8)", vec!["takes a number and a policy: write every(n, policy)"]),
        ("every", vec!["write every(n, policy)"]),
        ("every(0, full)", vec!["n=0 is not accepted: whole number, 1 or more"]),
        ("every(x, h2o)", vec!["n=x is not accepted", "in `h2o`: parameter `budget` is missing"]),
        ("every:n=8(8, full)", vec!["unknown parameter `n=8` (it has none)"]),
        ("per-layer(0=full)", vec!["rest=policy is missing"]),
        ("per-layer(0=full; rest=full; rest=full)", vec!["rest is given twice"]),
        ("per-layer(3-1=full; rest=full)", vec!["layers `3-1` are not accepted: 5, 0-3 or rest"]),
        ("per-layer(a=full; rest=full)", vec!["layers `a` are not accepted"]),
        ("per-layer(full; rest=full)", vec!["`full` is not of the form layers=policy"]),
        (
            "per-layer(0=h2o:recent=x; 1-=full; 2=window; 3=adakv(nope:a=1))",
            vec![
                "in `h2o:recent=x`: parameter `budget` is missing",
                "in `h2o:recent=x`: recent=x is not accepted: whole number, auto or 0..=1073741824",
                "layers `1-` are not accepted",
                "in `window`: parameter `size` is missing (whole number, 1..=1073741824)",
                "in `adakv(nope:a=1)`: in `nope:a=1`: unknown policy `nope`",
                "rest=policy is missing",
            ],
        ),
        (
            "adakv:floor=2,roof=3(h2o:budget=0,recent=-1,normalise=maybe,x)",
            vec![
                "floor=2 is not accepted: number, 0..=1",
                "in `h2o:budget=0,recent=-1,normalise=maybe,x`: `x` is not of the form parameter=value",
                "budget=0 is not accepted",
                "recent=-1 is not accepted",
                "normalise=maybe is not accepted: true or false",
                "unknown parameter `roof=3` (known: floor)",
            ],
        ),
        ("h2o:budget=5,recent=9,x=1", vec!["unknown parameter `x=1`", "recent=9 exceeds budget=5"]),
    ] {
        let told = reasons(text);
        assert_eq!(told.len(), want.len(), "`{text}`: {told:#?}");
        for (told, want) in told.iter().zip(want) {
            assert!(told.contains(want), "`{text}`: `{told}` does not say `{want}`");
        }
        let message = Registry::standard().parse(text).unwrap_err().to_string();
        assert!(message.contains(text) && told.iter().all(|reason| message.contains(reason.as_str())), "{message}");
    }
}

#[test]
fn a_message_about_a_budget_tells_what_is_accepted() {
    for text in ["knorm:budget=0", "knorm:budget=120%", "knorm"] {
        let told = reasons(text).concat();
        assert!(told.contains("1 or more") && told.contains("100%"), "`{text}`: {told}");
    }
}

#[test]
fn a_path_holds_none_of_the_characters_of_the_grammar() {
    for path in ["a)", "a;b"] {
        assert!(reasons(&format!("dms:weights={path}"))[0].contains(&format!("weights={path} is not accepted")));
    }
    assert_eq!(reasons("adakv(dms:weights=a))").len(), 1);
}

#[test]
fn a_string_nested_out_of_all_reason_is_refused() {
    // Were it read, its depth alone would exhaust the stack.
    let deep = |n: usize| format!("{}full{}", "pyramid(".repeat(n), ")".repeat(n));
    assert!(Registry::standard().parse(&deep(8)).is_ok());
    assert_eq!(reasons(&deep(200)).len(), 1);
}

#[test]
fn a_list_holds_policies_separated_by_semicolons_outside_parentheses() {
    let list = "full; per-layer(0=full; rest=window:size=4) ;; h2o:budget=9,recent=1;";
    let texts: Vec<String> = Registry::standard().parse_list(list).unwrap().into_iter().map(|(text, _)| text).collect();
    assert_eq!(texts, ["full", "per-layer(0=full; rest=window:size=4)", "h2o:budget=9,recent=1"]);
    for (list, reason) in
        [("", "names no policy"), (" ; ;", "names no policy"), ("full;nope;h2o", "unknown policy `nope`")]
    {
        let error = Registry::standard().parse_list(list).unwrap_err();
        assert!(matches!(error, Error::Policy { .. }) && error.to_string().contains(reason), "{error}");
    }
}

kvpolicy::policy_params! {
    /// A policy of a user.
    struct Own = "own", paper "none" {
        /// A number.
        n: u32 = 3, in 1..;
        /// Another one, which must be given.
        m: u64, in ..;
    }
}
impl kvpolicy::Policy for Own {}

#[test]
fn a_policy_of_ones_own_can_be_named_and_wrapped_and_replaced() {
    let mut registry = Registry::standard();
    registry.add::<Own>();
    registry.add::<Own>();
    assert_eq!(registry.entries().iter().filter(|e| e.info.name == "own").count(), 1);
    assert_eq!(registry.parse("every(2, own:m=7)").unwrap().to_string(), "every(2, own:n=3,m=7)");
    let Err(Error::Policy { reasons, .. }) = registry.parse("own:n=0") else { panic!("accepted") };
    assert_eq!(reasons, ["n=0 is not accepted: whole number, 1 or more", "parameter `m` is missing (whole number)"]);
}

/// Why a model cannot run a policy.
#[track_caller]
fn refusal(text: &str, spec: &ModelSpec) -> Vec<String> {
    match KvCache::new(spec.clone(), policy(text), cpu(spec, &CpuConfig::default()).unwrap()) {
        Err(Error::Refused { policy: named, reasons }) => {
            assert_eq!(named, policy(text).to_string());
            reasons
        }
        other => panic!("`{text}` gave {other:?}"),
    }
}

#[test]
fn a_cache_refuses_what_its_model_cannot_run_with_every_reason() {
    let bare = ModelSpec::new(4, 4, 2, 8);
    for (text, want) in [
        ("dms:window=4", vec!["the model has no decision gates"]),
        ("every(2, adakv(dms))", vec!["the model has no decision gates"]),
        ("expected-attention:budget=9", vec!["the model has no RoPE to average"]),
        ("adakv(pyramid(expected-attention:budget=9))", vec!["the model has no RoPE to average"]),
        ("adakv(full)", vec!["adakv: `full` has no budget per head to share"]),
        ("pyramid(window:size=9)", vec!["has no budget to tilt"]),
        ("every(8, dms)", vec!["has no budget to trim to", "the model has no decision gates"]),
        ("per-layer(0=full; rest=every(2, adakv(full)))", vec!["every: `adakv", "adakv: `full`"]),
        ("per-layer(0-4=full; rest=full)", vec!["layers 0-4 are beyond the model's last layer 3"]),
        ("per-layer(4=full; 3=full; 9-12=full; rest=full)", vec!["layers 4 are beyond", "layers 9-12 are beyond"]),
        (
            "per-layer(2-9=full; 1=expected-attention:budget=9; rest=dms)",
            vec!["layers 2-9 are beyond", "the model has no RoPE to average", "the model has no decision gates"],
        ),
    ] {
        // The backend may have reasons of its own beside these.
        let told = refusal(text, &bare);
        for want in want {
            let times = told.iter().filter(|reason| reason.contains(want)).count();
            assert_eq!(times, 1, "`{text}` says `{want}` {times} times: {told:#?}");
        }
    }
    for text in EVERY_POLICY {
        let full = complete(4, 4, 2, 8);
        assert!(KvCache::new(full.clone(), policy(text), cpu(&full, &CpuConfig::default()).unwrap()).is_ok(), "{text}");
    }
}

#[test]
fn gates_come_from_one_source() {
    let spec = complete(4, 4, 2, 8);
    let source = |text: &str| KvCache::gate_source(&*policy(text), &spec);
    assert_eq!(source("full").unwrap(), None);
    assert_eq!(source("per-layer(0=full; rest=dms)").unwrap(), Some(kvpolicy::GateSource::Checkpoint));
    let file = kvpolicy::GateSource::File("x/y".into());
    assert_eq!(source("every(2, dms:weights=x/y)").unwrap(), Some(file));
    for text in ["per-layer(1=dms; rest=dms:weights=x)", "per-layer(0-1=dms:weights=y; rest=dms:weights=x)"] {
        assert!(matches!(source(text), Err(Error::Refused { .. })), "{text}");
    }
}
