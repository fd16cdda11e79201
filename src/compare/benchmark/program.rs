//! Programs that a model wrote, run on tests.
//!
//! A program runs in a process of its own, in an empty folder, without the environment, with limits on time, memory and what it
//! writes, and its whole process group is ended afterwards. That keeps an accident small; it is no sandbox: such a program can
//! read files and open connections as the user can. Whoever calls this has been told.

use super::invalid;
use crate::error::{Error, Result};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Limits of one run.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of time, on the clock and on the processor.
    pub seconds: u64,
    /// Of address space.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { seconds: 10, bytes: 4 << 30 }
    }
}

/// What a program may write, standard output included.
const MOST_WRITTEN: u64 = 64 << 20;

/// Runs a Python program. Its standard output, or `None` if it failed or went beyond a limit.
///
/// # Errors
/// [`Error::Config`] where there is no `python3`, or nothing to set limits with, and errors of files.
pub fn python(source: &str, input: &str, limits: Limits) -> Result<Option<String>> {
    let dir = Scratch::new()?;
    let (program, stdin, stdout) = (dir.0.join("program.py"), dir.0.join("stdin"), dir.0.join("stdout"));
    let files = || -> std::io::Result<(File, File)> {
        fs::write(&program, source)?;
        fs::write(&stdin, input)?;
        Ok((File::open(&stdin)?, File::create(&stdout)?))
    };
    let (from, to) = files().map_err(|e| host(&dir.0, &e))?;
    let work = dir.0.join("work");
    fs::create_dir(&work).map_err(|e| host(&work, &e))?;
    let mut child = start(&program, &work, limits, from, to)?;
    let ended = wait(&mut child, Duration::from_secs(limits.seconds)).map_err(|e| host(&program, &e))?;
    end_group(&mut child);
    match ended {
        Some(NO_PYTHON) => {
            Err(Error::Config("python3 cannot be started: put it on the path, or leave out tasks of code".into()))
        }
        Some(0) => Ok(Some(String::from_utf8_lossy(&fs::read(&stdout).map_err(|e| host(&stdout, &e))?).into_owned())),
        _ => Ok(None),
    }
}

/// What a shell says of a program that is not there.
const NO_PYTHON: i32 = 127;

#[cfg(unix)]
fn start(program: &Path, work: &Path, limits: Limits, from: File, to: File) -> Result<Child> {
    use std::os::unix::process::CommandExt;
    // The shell sets what the standard library has no call for, and is replaced by the program.
    let script = format!(
        "ulimit -t {} && ulimit -v {} && ulimit -f {} && ulimit -c 0 && exec python3 -I \"$0\"",
        limits.seconds,
        limits.bytes / 1024,
        MOST_WRITTEN / 512
    );
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script).arg(program).current_dir(work).env_clear();
    shell.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", work).process_group(0);
    shell.stdin(from).stdout(to).stderr(Stdio::null()).spawn().map_err(|e| host(program, &e))
}

#[cfg(not(unix))]
fn start(_: &Path, _: &Path, _: Limits, _: File, _: File) -> Result<Child> {
    Err(Error::Config("programs run with limits on Unix only: leave out tasks of code".into()))
}

/// Its exit code; `None` for a signal, or if it takes longer.
fn wait(child: &mut Child, most: Duration) -> std::io::Result<Option<i32>> {
    let start = Instant::now();
    while start.elapsed() < most {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(None)
}

/// Ends the program and whatever it started.
fn end_group(child: &mut Child) {
    let group = format!("-{}", child.id());
    // There may be nothing left to end.
    let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
    let _ = child.kill();
    let _ = child.wait();
}

/// A folder that goes when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("kvpolicy-program-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        fs::create_dir(&dir).map_err(|e| host(&dir, &e))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn host(path: &Path, error: &std::io::Error) -> Error {
    Error::Host(format!("{}: {error}", path.display()).into())
}

/// How a program is tested.
#[derive(Debug, Clone, PartialEq)]
pub enum Tests {
    /// HumanEval: what stands before the answer's code and behind it.
    Around {
        /// The signature with its documentation, which the answer completes or repeats.
        before: String,
        /// The function that is asked for.
        entry: String,
        /// Raises an error if the function is wrong.
        behind: String,
    },
    /// LiveCodeBench: cases, and those that are packed.
    Cases {
        /// The function that is called, of a class `Solution` if there is one; `None` for whole programs.
        function: Option<String>,
        /// Known cases.
        cases: Vec<Case>,
        /// More of them, as the benchmark packs them: base64 of zlib of a pickled JSON text; empty without.
        packed: String,
    },
}

/// An input with its right output.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
pub struct Case {
    /// Standard input, or arguments, a JSON value a line.
    pub input: String,
    /// Standard output, or a JSON value.
    pub output: String,
}

impl Tests {
    /// Whether the code in an answer passes.
    ///
    /// # Errors
    /// Those of [`python`], and [`Error::Config`] for cases that cannot be read.
    pub fn pass(&self, answer: &str, limits: Limits) -> Result<bool> {
        let code = code(answer);
        match self {
            Self::Around { before, entry, behind } => {
                // A whole function takes the place of the one that was begun; else it goes on in it.
                let between = if code.contains(&format!("def {entry}")) { "\n" } else { "" };
                let source = format!("{before}{between}{code}\n\n{behind}\n\ncheck({entry})\n");
                Ok(python(&source, "", limits)?.is_some())
            }
            Self::Cases { function, cases, packed } => {
                let hidden = if packed.is_empty() { vec![] } else { unpack(packed)? };
                for case in cases.iter().chain(&hidden) {
                    if !passes(code, function.as_deref(), case, limits)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
        }
    }
}

fn passes(code: &str, function: Option<&str>, case: &Case, limits: Limits) -> Result<bool> {
    match function {
        None => Ok(python(code, &case.input, limits)?.is_some_and(|said| same_output(&said, &case.output))),
        Some(name) => {
            let values = |text: &str| -> Result<Vec<serde_json::Value>> {
                let lines = text.lines().filter(|line| !line.trim().is_empty());
                lines.map(|line| serde_json::from_str(line).map_err(|e| invalid("a case", &e))).collect()
            };
            let expected: serde_json::Value = serde_json::from_str(&case.output).map_err(|e| invalid("a case", &e))?;
            let call = serde_json::json!({ "name": name, "args": values(&case.input)?, "expected": expected });
            Ok(python(&format!("{code}\n{CALL}"), &call.to_string(), limits)?.is_some())
        }
    }
}

/// Calls the function that standard input names, and fails unless it returns what is expected.
const CALL: &str = "
import json as _json, sys as _sys
_call = _json.load(_sys.stdin)
_owner = Solution() if 'Solution' in globals() else _sys.modules['__main__']
_result = getattr(_owner, _call['name'])(*_call['args'])
_sys.exit(_json.loads(_json.dumps(_result)) != _call['expected'])
";

/// Whether two outputs are the same but for white space and how numbers are written.
fn same_output(said: &str, known: &str) -> bool {
    let lines = |text: &str| -> Vec<Vec<String>> {
        let words = |line: &str| line.split_whitespace().map(String::from).collect();
        text.trim().lines().map(words).collect()
    };
    let same = |(a, b): (&String, &String)| {
        a == b || a.parse::<f64>().ok().zip(b.parse::<f64>().ok()).is_some_and(|(a, b)| a == b)
    };
    let (said, known) = (lines(said), lines(known));
    let same_line = |(a, b): (&Vec<String>, &Vec<String>)| a.len() == b.len() && a.iter().zip(b).all(same);
    said.len() == known.len() && said.iter().zip(&known).all(same_line)
}

/// Cases that are packed. Python unpacks them, with a reader that makes nothing but plain values.
fn unpack(packed: &str) -> Result<Vec<Case>> {
    let json = python(UNPACK, packed, Limits::default())?;
    let json = json.ok_or_else(|| Error::Config("private_test_cases: cannot be unpacked".into()))?;
    serde_json::from_str(&json).map_err(|e| invalid("private_test_cases", &e))
}

const UNPACK: &str = "
import base64, io, pickle, sys, zlib
class Plain(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError('no plain value')
print(Plain(io.BytesIO(zlib.decompress(base64.b64decode(sys.stdin.read())))).load())
";

/// The last block of code in an answer, or all of it where it has none.
fn code(answer: &str) -> &str {
    let mut blocks = answer.split("```").skip(1).step_by(2);
    let block = blocks.by_ref().filter(|block| !block.trim().is_empty()).last();
    block.map_or(answer, |block| {
        let (first, rest) = block.split_once('\n').unwrap_or(("", block));
        // The name of the language.
        if first.trim().chars().all(char::is_alphanumeric) { rest } else { block }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SHORT: Limits = Limits { seconds: 2, bytes: 1 << 30 };

    #[test]
    fn code_is_the_last_block() {
        for (answer, found) in [
            ("So:\n```python\ndef f():\n    return 1\n```\nDone.", "def f():\n    return 1\n"),
            ("```py\na = 1\n```\nbetter:\n```\nb = 2\n```", "b = 2\n"),
            ("```python\nunfinished = 1\n", "unfinished = 1\n"),
            ("    return x", "    return x"),
        ] {
            assert_eq!(code(answer), found, "{answer}");
        }
    }

    #[test]
    fn outputs_are_the_same_but_for_space() {
        assert!(same_output("1 2\n3\n", "1  2 \n3") && same_output("2.50", "2.5") && same_output("", "\n"));
        assert!(!same_output("1 2 3", "1 2\n3") && !same_output("Yes", "YES") && !same_output("1", "1\n2"));
    }

    /// Python is not part of the project: without it these say so.
    fn has_python() -> bool {
        let found = python("print(1)", "", SHORT).is_ok();
        if !found {
            println!("skipped: no python3");
        }
        found
    }

    #[test]
    fn a_program_has_limits() {
        if !has_python() {
            return;
        }
        assert_eq!(python("print(input()[::-1])", "abc", SHORT).unwrap().unwrap().trim(), "cba");
        assert_eq!(
            python("import os; print(len(os.listdir('.')), 'SECRET' in os.environ)", "", SHORT)
                .unwrap()
                .unwrap()
                .trim(),
            "0 False"
        );
        for bad in [
            "raise ValueError",
            "while True: pass",
            "import time; time.sleep(60)",
            "import mmap; mmap.mmap(-1, 3 << 30)", // not touched, so that it takes no time
            "import sys; sys.exit(3)",
            "import os; os.abort()",
            "open('big', 'wb').write(b'x' * (100 << 20))",
        ] {
            assert_eq!(python(bad, "", SHORT).unwrap(), None, "{bad}");
        }
        // What it started ends with it.
        let child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid)";
        let pid = python(child, "", SHORT).unwrap().unwrap();
        let runs = || {
            let state = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            !state.is_empty() && !state.contains(") Z ")
        };
        // A signal takes a moment to arrive.
        (0..500).take_while(|_| runs()).for_each(|_| std::thread::sleep(Duration::from_millis(10)));
        assert!(!runs());
    }

    #[test]
    fn a_function_passes_its_tests_whole_or_as_a_body() {
        if !has_python() {
            return;
        }
        let tests = Tests::Around {
            before: "def double(x):\n    \"\"\"Twice x.\"\"\"\n".into(),
            entry: "double".into(),
            behind: "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n".into(),
        };
        for (answer, right) in [
            ("Here:\n```python\ndef double(x):\n    return 2 * x\n```", true),
            ("    return x + x\n", true),
            ("```python\ndef double(x):\n    return x * x\n```", false),
            ("```python\ndef triple(x):\n    return 3 * x\n```", false),
            ("I do not know.", false),
        ] {
            assert_eq!(tests.pass(answer, SHORT).unwrap(), right, "{answer}");
        }
    }

    #[test]
    fn programs_and_functions_pass_all_their_cases() {
        if !has_python() {
            return;
        }
        let case = |input: &str, output: &str| Case { input: input.into(), output: output.into() };
        // What the benchmark's own packing makes of `[{"input": "4\n", "output": "8", "testtype": "stdin"}]`.
        let packed = python(
            "import base64, json, pickle, zlib\nprint(base64.b64encode(zlib.compress(pickle.dumps(json.dumps([{'input': '4\\n', 'output': '8', 'testtype': 'stdin'}])))).decode())",
            "",
            SHORT,
        );
        let packed = packed.unwrap().unwrap();
        let whole = Tests::Cases { function: None, cases: vec![case("1\n", "2"), case("3\n", "6\n")], packed };
        assert!(whole.pass("```python\nprint(2 * int(input()))\n```", SHORT).unwrap());
        assert!(!whole.pass("```python\nprint({1: 2, 3: 6}.get(int(input())))\n```", SHORT).unwrap(), "the packed one");
        let function = Some("total".to_string());
        let call = Tests::Cases { function, cases: vec![case("[1, 2]\n3", "6")], packed: String::new() };
        assert!(
            call.pass("```python\nclass Solution:\n    def total(self, a, b):\n        return sum(a) + b\n```", SHORT)
                .unwrap()
        );
        assert!(call.pass("```python\ndef total(a, b):\n    return sum(a) + b\n```", SHORT).unwrap());
        assert!(!call.pass("```python\ndef total(a, b):\n    return sum(a)\n```", SHORT).unwrap());
        let evil = Tests::Cases { function: None, cases: vec![], packed: "bm8=".into() };
        assert!(evil.pass("print(1)", SHORT).is_err());
        // A pickle that would run code while it is read.
        let pack = "import base64, pickle, zlib\nclass Evil:\n    def __reduce__(self):\n        return (eval, (\"'[]'\",))\n\
                    print(base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode())";
        let packed = python(pack, "", SHORT).unwrap().unwrap();
        let evil = Tests::Cases { function: None, cases: vec![], packed };
        assert!(evil.pass("print(1)", SHORT).is_err());
    }
}
