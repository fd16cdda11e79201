//! The lines that `kvpolicy route` reads and writes.

use anyhow::{Context, Result};
use kvpolicy::router::ArmReport;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// A line that was read.
#[derive(Debug, PartialEq)]
pub(super) enum Line {
    Ask(Request),
    Change(Change),
}

/// Something to answer.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Request {
    pub(super) key: String,
    pub(super) prompt: String,
}

/// Something to do to an arm.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Change {
    Weight { arm: String, to: f64 },
    RollBack { arm: String, reason: String },
    Restore { arm: String },
}

impl Line {
    pub(super) fn read(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).context("no JSON")?;
        if value.get("key").or(value.get("prompt")).is_some() {
            let request = serde_json::from_value(value).context("no request of key and prompt")?;
            return Ok(Self::Ask(request));
        }
        let change =
            serde_json::from_value(value).context("neither a request of key and prompt nor a change of an arm")?;
        Ok(Self::Change(change))
    }
}

/// A line that is written; `line` is the number of the line that asked.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Event<'a> {
    /// A piece of an answer.
    Piece { line: usize, key: &'a str, arm: &'a str, text: &'a str },
    /// An answer is whole. `fell_back_at`: the token from which on it is that of `full`.
    End { line: usize, key: &'a str, arm: &'a str, tokens: usize, kl: Option<f64>, fell_back_at: Option<usize> },
    /// An arm passed a limit.
    RolledBack { arm: &'a str, rolled_back: &'a str },
    /// A change was made: what each arm serves now.
    Shares { line: usize, shares: BTreeMap<String, f64> },
    /// A line could not be followed, or its answer failed.
    Error { line: usize, error: String },
}

impl Event<'_> {
    pub(super) fn shares(line: usize, arms: &[ArmReport]) -> Self {
        Self::Shares { line, shares: arms.iter().map(|arm| (arm.name.clone(), arm.share)).collect() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_requests_or_changes() {
        let request = Request { key: "a".into(), prompt: "b".into() };
        assert_eq!(Line::read(r#"{"key": "a", "prompt": "b"}"#).unwrap(), Line::Ask(request));
        for (text, change) in [
            (r#"{"weight": {"arm": "x", "to": 3}}"#, Change::Weight { arm: "x".into(), to: 3.0 }),
            (r#"{"roll_back": {"arm": "x", "reason": "y"}}"#, Change::RollBack { arm: "x".into(), reason: "y".into() }),
            (r#"{"restore": {"arm": "x"}}"#, Change::Restore { arm: "x".into() }),
        ] {
            assert_eq!(Line::read(text).unwrap(), Line::Change(change));
        }
    }

    #[test]
    fn what_is_neither_is_refused_with_a_reason() {
        for (text, words) in [
            ("hello", "no JSON"),
            (r#"{"key": "a"}"#, "missing field `prompt`"),
            (r#"{"key": 1, "prompt": "b"}"#, "expected a string"),
            (r#"{"key": "a", "prompt": "b", "policy": "full"}"#, "unknown field `policy`"),
            (r#"{"weights": {"arm": "x"}}"#, "unknown variant `weights`"),
            (r#"{"weight": {"arm": "x"}}"#, "missing field `to`"),
            (r#"{"weight": {"arm": "x", "to": 1, "for": 2}}"#, "unknown field `for`"),
            ("[1]", "neither a request"),
            ("{}", "neither a request"),
        ] {
            let error = format!("{:#}", Line::read(text).unwrap_err());
            assert!(error.contains(words), "`{error}` does not say `{words}`");
        }
    }
}
