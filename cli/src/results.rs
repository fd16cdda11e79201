//! The folder of a comparison: `results.json` and `samples.jsonl`.

use crate::table::{read_text, utf8};
use anyhow::{Context, Result, anyhow, bail, ensure};
use kvpolicy::compare::{Report, SCHEMA, Sample, Trace};
use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

/// Where a comparison writes.
#[derive(Debug)]
pub(crate) struct Results {
    dir: PathBuf,
    samples: File,
}

impl Results {
    /// Begins a comparison anew. What an earlier one left in the folder goes.
    pub(crate) fn create(dir: &Path, head: &Report) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let path = dir.join(SAMPLES);
        let samples = File::create(&path).with_context(|| path.display().to_string())?;
        let results = Self { dir: dir.to_path_buf(), samples };
        results.write(head)?;
        Ok(results)
    }

    /// Goes on with a comparison that was stopped, and returns what it has measured. A line that was torn when it stopped, or
    /// is of a run that had not ended, goes.
    pub(crate) fn resume(dir: &Path, head: &Report) -> Result<(Self, Vec<Sample>)> {
        let begun = read_report(&dir.join(RESULTS)).context("nothing to resume")?;
        let departures = begun.departures(head);
        ensure!(
            departures.is_empty(),
            "{} is of another plan: {}; go on with the same options, or begin anew without --resume",
            dir.display(),
            departures.join("; ")
        );
        let path = dir.join(SAMPLES);
        let (done, bytes) = whole_runs(&read_lines(&path)?).with_context(|| path.display().to_string())?;
        let samples = OpenOptions::new().append(true).open(&path).with_context(|| path.display().to_string())?;
        samples.set_len(bytes as u64).with_context(|| path.display().to_string())?;
        let results = Self { dir: dir.to_path_buf(), samples };
        results.write(head)?;
        Ok((results, done))
    }

    /// A line at once: what is stopped has lost nothing.
    pub(crate) fn add(&mut self, sample: &Sample) -> std::io::Result<()> {
        let line = serde_json::to_string(sample)? + "\n";
        self.samples.write_all(line.as_bytes())
    }

    pub(crate) fn write(&self, report: &Report) -> Result<()> {
        write(&self.dir, RESULTS, serde_json::to_string_pretty(report)?)
    }

    pub(crate) fn write_traces(&self, traces: &[Trace]) -> Result<()> {
        let lines = traces.iter().map(|trace| Ok(serde_json::to_string(trace)? + "\n"));
        write(&self.dir, TRACES, lines.collect::<Result<String>>()?)
    }
}

/// A file of the folder.
pub(crate) fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> Result<()> {
    replace(&dir.join(name), content)
}

/// Writes a file anew. Whatever stops it, the file is whole: the old one or the new one.
pub(crate) fn replace(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let mut begun = path.as_os_str().to_owned();
    begun.push(".part");
    let written = std::fs::write(&begun, content).and_then(|()| std::fs::rename(&begun, path));
    written.with_context(|| path.display().to_string())
}

pub(crate) const RESULTS: &str = "results.json";
const SAMPLES: &str = "samples.jsonl";
const TRACES: &str = "trace.jsonl";

/// All samples of a folder.
pub(crate) fn read_samples(dir: &Path) -> Result<Vec<Sample>> {
    let path = dir.join(SAMPLES);
    Ok(whole_runs(&read_lines(&path)?).with_context(|| path.display().to_string())?.0)
}

/// All traces of a folder; none if it has no file of them.
pub(crate) fn read_traces(dir: &Path) -> Result<Vec<Trace>> {
    let path = dir.join(TRACES);
    if !path.exists() {
        return Ok(vec![]);
    }
    let text = read_text(&path)?;
    let traces = text.lines().map(|line| serde_json::from_str(line).with_context(|| path.display().to_string()));
    traces.collect()
}

pub(crate) fn read_report(path: &Path) -> Result<Report> {
    let refuse = || format!("{} is no results.json of schema {SCHEMA}", path.display());
    let report: Report = serde_json::from_str(&read_text(path)?).with_context(refuse)?;
    ensure!(report.schema == SCHEMA, "{}: its schema is {}", refuse(), report.schema);
    Ok(report)
}

/// The lines of a file that have an end. What follows the last may be torn within a character.
fn read_lines(path: &Path) -> Result<String> {
    utf8(whole_lines(std::fs::read(path).with_context(|| path.display().to_string())?), path)
}

fn whole_lines(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1));
    bytes
}

/// The samples of runs that ended, and how many bytes their lines take.
fn whole_runs(text: &str) -> Result<(Vec<Sample>, usize)> {
    let (mut samples, mut at, mut whole) = (vec![], 0, (0, 0));
    for (i, line) in text.split_inclusive('\n').enumerate() {
        at += line.len();
        match serde_json::from_str::<Sample>(line) {
            Ok(sample) => {
                let ends_run = sample.kv.is_some();
                samples.push(sample);
                if ends_run {
                    whole = (samples.len(), at);
                }
            }
            Err(error) => bail!(anyhow!(error).context(format!("line {} is no sample", i + 1))),
        }
    }
    samples.truncate(whole.0);
    Ok((samples, whole.1))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kvpolicy::Stats;

    fn line(sample: usize, ends_run: bool) -> String {
        let kv = ends_run.then(Stats::default);
        serde_json::to_string(&Sample { sample, kv, ..Sample::default() }).unwrap() + "\n"
    }

    fn whole_runs(text: &str) -> Result<(Vec<Sample>, usize)> {
        super::whole_runs(&String::from_utf8(whole_lines(text.into())).unwrap())
    }

    #[test]
    fn a_line_may_be_torn_within_a_character() {
        let torn = [b"one\ntw".as_slice(), &"\u{e9}".as_bytes()[..1]].concat();
        assert_eq!(whole_lines(torn), b"one\n");
        assert_eq!(whole_lines(b"one".into()), b"");
    }

    #[test]
    fn only_runs_that_ended_are_kept() {
        let whole = line(0, false) + &line(0, true) + &line(1, true);
        for rest in ["".into(), line(2, false), line(2, true).trim_end().to_string(), line(2, true)[..9].to_string()] {
            let (samples, bytes) = whole_runs(&(whole.clone() + &rest)).unwrap();
            assert_eq!((samples.len(), bytes), (3, whole.len()), "{rest}");
        }
        let (samples, bytes) = whole_runs(&(whole.clone() + &line(2, false) + "{\"task\"")).unwrap();
        assert_eq!((samples.len(), bytes), (3, whole.len()));
        assert_eq!(whole_runs("").unwrap().1, 0);
        let error = format!("{:#}", whole_runs(&(whole.clone() + "{}x\n" + &whole)).unwrap_err());
        assert!(error.contains("line 4"), "{error}");
    }
}
