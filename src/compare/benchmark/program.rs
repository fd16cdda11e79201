//! Programs that a model wrote, run on tests.
//!
//! A program runs in a process of its own, in an empty folder, without the environment, with limits on time, memory and what it
//! writes, and its whole process group is ended afterwards. That keeps an accident small; it is no sandbox: such a program can
//! read files and open connections as the user can, and what leaves its process group is not followed. Whoever calls this has
//! been told.

use super::{answer::whole, invalid};
use crate::error::{Error, Result};
use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Seek},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
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
/// [`Error::Config`] where there is no `python3`, or limits cannot be set, and errors of files.
pub fn python(source: &str, input: &str, limits: Limits) -> Result<Option<String>> {
    let dir = Scratch::new()?;
    dir.write(PROGRAM, source)?;
    run(&dir, input, limits)
}

/// Runs the program in a folder, once it is known that programs can be run at all.
fn run(dir: &Scratch, input: &str, limits: Limits) -> Result<Option<String>> {
    static CAN_RUN: AtomicBool = AtomicBool::new(false);
    if !CAN_RUN.load(Ordering::Relaxed) {
        probe(&script(Limits::default()))?;
        CAN_RUN.store(true, Ordering::Relaxed);
    }
    execute(dir, input, &script(limits), limits.seconds)
}

/// Runs an empty program: if that fails, so would every answer, and none would be at fault.
fn probe(script: &str) -> Result<()> {
    let dir = Scratch::new()?;
    dir.write(PROGRAM, "")?;
    let ended = execute(&dir, "", script, Limits::default().seconds)?;
    let refused = || {
        let what = "python3 cannot be started, not even on an empty program: put one that works on the path, or leave out tasks of code";
        Error::Config(what.into())
    };
    ended.map(|_| ()).ok_or_else(refused)
}

/// The names of files in a program's folder. The working directory is the only one that the program is shown.
const PROGRAM: &str = "program.py";
const ANSWER: &str = "answer.py";
const TESTS: &str = "tests.json";
const PASSED: &str = "passed";
const LIMITED: &str = "limited";
const WORK: &str = "work";

/// The shell sets what the standard library has no call for, notes that it did, and is replaced by the program.
fn script(limits: Limits) -> String {
    format!(
        "ulimit -t {} && ulimit -v {} && ulimit -f {} && ulimit -c 0 && : > \"$1\" && exec python3 -I \"$0\"",
        limits.seconds,
        limits.bytes / 1024,
        MOST_WRITTEN / 512
    )
}

fn execute(dir: &Scratch, input: &str, script: &str, seconds: u64) -> Result<Option<String>> {
    dir.write("stdin", input)?;
    let files = || -> std::io::Result<(File, File, File)> {
        fs::create_dir(dir.0.join(WORK))?;
        let stdout = File::options().read(true).write(true).create_new(true).open(dir.0.join("stdout"))?;
        Ok((File::open(dir.0.join("stdin"))?, stdout.try_clone()?, stdout))
    };
    let (from, to, mut stdout) = files().map_err(|e| host(&dir.0, &e))?;
    let mut child = start(dir, script, from, to)?;
    let ended = wait(&mut child, Duration::from_secs(seconds));
    end_group(&mut child);
    let ended = ended.map_err(|e| host(&dir.0, &e))?;
    if ended.is_some() && !dir.0.join(LIMITED).exists() {
        return Err(Error::Config(format!(
            "limits of programs cannot be set by `{script}`: raise the hard limits (`ulimit -H -a` lists them), or leave out tasks of code"
        )));
    }
    match ended {
        Some(0) => said(&mut stdout).map(Some).map_err(|e| host(&dir.0.join("stdout"), &e)),
        _ => Ok(None),
    }
}

/// What was written to a file that is open: at its path the program may have put another.
fn said(stdout: &mut File) -> std::io::Result<String> {
    let mut bytes = vec![];
    stdout.rewind()?;
    stdout.take(MOST_WRITTEN).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(unix)]
fn start(dir: &Scratch, script: &str, from: File, to: File) -> Result<Child> {
    use std::os::unix::process::CommandExt;
    let work = dir.0.join(WORK);
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script).arg(dir.0.join(PROGRAM)).arg(dir.0.join(LIMITED)).current_dir(&work).env_clear();
    shell.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", &work).process_group(0);
    shell.stdin(from).stdout(to).stderr(Stdio::null()).spawn().map_err(|e| host(Path::new("sh"), &e))
}

#[cfg(not(unix))]
fn start(_: &Scratch, _: &str, _: File, _: File) -> Result<Child> {
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

/// Ends the program and what it started, as far as that stayed in its process group.
fn end_group(child: &mut Child) {
    // By the shell's own `kill`: a small system has no other. There may be nothing left to end.
    let end = ["-c", "kill -s KILL -- \"-$0\""];
    let _ = Command::new("sh").args(end).arg(child.id().to_string()).stderr(Stdio::null()).status();
    let _ = child.kill();
    let _ = child.wait();
}

/// A folder that goes when it is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self::below(&std::env::temp_dir(), &NEXT)
    }

    fn below(parent: &Path, next: &AtomicU64) -> Result<Self> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let dir = parent.join(format!("kvpolicy-program-{}-{number}", std::process::id()));
            match fs::create_dir(&dir) {
                Ok(()) => return Ok(Self(dir)),
                // Of a run with the same process id that was killed.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(host(&dir, &e)),
            }
        }
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.0.join(name);
        fs::write(&path, text).map_err(|e| host(&path, &e))
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
    /// The same without anything packed: for whoever has several answers to them.
    ///
    /// # Errors
    /// Those of [`python`], and [`Error::Config`] for cases that cannot be read.
    pub fn unpacked(&self) -> Result<Self> {
        let mut tests = self.clone();
        if let Self::Cases { cases, packed, .. } = &mut tests
            && !packed.is_empty()
        {
            cases.extend(unpack(packed)?);
            packed.clear();
        }
        Ok(tests)
    }

    /// Whether the code in an answer passes.
    ///
    /// # Errors
    /// As [`Tests::unpacked`].
    pub fn pass(&self, answer: &str, limits: Limits) -> Result<bool> {
        match self {
            Self::Around { before, entry, behind } => {
                let begins = format!("def {entry}(");
                let code = code(answer, Some(&begins));
                let check = format!("check({entry})\n");
                // A whole function takes the place of the one that was begun; else it goes on in it.
                let sources = match code.contains(&begins) {
                    true => vec![before.clone(), code.into(), behind.clone(), check],
                    false => vec![format!("{before}{code}"), behind.clone(), check],
                };
                checks(sources, None, limits)
            }
            Self::Cases { packed, .. } if !packed.is_empty() => self.unpacked()?.pass(answer, limits),
            Self::Cases { function, cases, .. } => {
                let code = code(answer, None);
                for case in cases {
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
    let Some(name) = function else {
        let said = main_program(code, &case.input, limits)?;
        return Ok(said.is_some_and(|said| same_output(&said, &case.output)));
    };
    let args: Vec<&str> = case.input.lines().filter(|line| !line.trim().is_empty()).collect();
    for json in args.iter().chain([&case.output.as_str()]) {
        serde_json::from_str::<serde::de::IgnoredAny>(json).map_err(|e| invalid("a case", &e))?;
    }
    // As they are written: a number may be larger than any here.
    let call = serde_json::json!({ "name": name, "args": args, "expected": case.output });
    checks(vec![IMPORTS.into(), code.into()], Some(call), limits)
}

/// Runs an answer that is a whole program.
fn main_program(code: &str, input: &str, limits: Limits) -> Result<Option<String>> {
    let dir = Scratch::new()?;
    dir.write(PROGRAM, &format!("{IMPORTS}{MAIN}"))?;
    dir.write(ANSWER, code)?;
    run(&dir, input, limits)
}

/// What LiveCodeBench has imported before an answer begins: answers are written as on sites that do so. Of names that several
/// modules have, those of Python itself count.
const IMPORTS: &str = "
_modules = (
    'string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json typing'
).split()
for _module in _modules + ['builtins']:
    exec(f'from {_module} import *')
for _module in _modules:
    exec(f'import {_module}')
del _module, _modules
sys.setrecursionlimit(50000)
";

/// The answer is compiled by itself, so that `from __future__` may stand at its beginning.
const MAIN: &str = "
with open(__file__.replace('program.py', 'answer.py'), encoding='utf-8') as _file:
    _answer = _file.read()
exec(compile(_answer, 'answer.py', 'exec', dont_inherit=True))
";

/// Runs sources one after the other as one module, then calls a function of theirs if there is a call. Whether all of that came
/// to its end: an exit code alone does not tell, as the answer may leave early with 0.
fn checks(sources: Vec<String>, call: Option<serde_json::Value>, limits: Limits) -> Result<bool> {
    let dir = Scratch::new()?;
    let token = format!("{:032x}", rand::random::<u128>());
    let tests = serde_json::json!({ "token": token, "sources": sources, "call": call });
    dir.write(PROGRAM, CHECKS)?;
    dir.write(TESTS, &tests.to_string())?;
    let ended = run(&dir, "", limits)?;
    // Without that file it did not come to its end.
    let passed = fs::read(dir.0.join(PASSED)).unwrap_or_default();
    Ok(ended.is_some() && passed == token.as_bytes())
}

/// The module is not `__main__`, so that what an answer does when it is a program does not happen.
const CHECKS: &str = "
import json, os, sys, types
def run(here):
    path = os.path.join(here, 'tests.json')
    with open(path, encoding='utf-8') as file:
        tests = json.load(file)
    os.remove(path)
    answer = sys.modules['answer'] = types.ModuleType('answer')
    for source in tests['sources']:
        exec(compile(source, 'answer.py', 'exec', dont_inherit=True), answer.__dict__)
    call = tests['call']
    if call is not None:
        owner = answer.Solution() if hasattr(answer, 'Solution') else answer
        result = getattr(owner, call['name'])(*map(json.loads, call['args']))
        if json.loads(json.dumps(result)) != json.loads(call['expected']):
            sys.exit('another result is expected')
    with open(os.path.join(here, 'passed'), 'w') as file:
        file.write(tests['token'])
run(os.path.dirname(os.path.abspath(__file__)))
";

/// Whether two outputs are the same but for white space and how numbers are written.
fn same_output(said: &str, known: &str) -> bool {
    let lines = |text: &str| -> Vec<Vec<String>> {
        let words = |line: &str| line.split_whitespace().map(String::from).collect();
        text.trim().lines().map(words).collect()
    };
    let (said, known) = (lines(said), lines(known));
    let same_line =
        |(a, b): (&Vec<String>, &Vec<String>)| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_word(a, b));
    said.len() == known.len() && said.iter().zip(&known).all(same_line)
}

fn same_word(a: &str, b: &str) -> bool {
    if let (Some(a), Some(b)) = (whole(a), whole(b)) {
        return a == b;
    }
    let is_fraction = |text: &str| text.contains(['.', 'e', 'E']);
    let value = |text: &str| text.parse::<f64>().ok();
    a == b || ((is_fraction(a) || is_fraction(b)) && value(a).zip(value(b)).is_some_and(|(a, b)| a == b))
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

/// The last block of code in an answer that has a text in it, else the last block, or all of it where it has none.
fn code<'a>(answer: &'a str, wanted: Option<&str>) -> &'a str {
    let blocks = blocks(answer);
    let found = wanted.and_then(|wanted| blocks.iter().rfind(|block| block.contains(wanted)));
    found.or(blocks.last()).copied().unwrap_or(answer)
}

/// Blocks of code that are not empty. A block begins and ends with lines of their own, indented alike: backquotes within a line,
/// or in a text that the code has, are no fence. The last one may lack its end.
fn blocks(answer: &str) -> Vec<&str> {
    let (mut found, mut open, mut at) = (vec![], None, 0);
    for line in answer.split_inclusive('\n') {
        let fence = fence(line);
        let next = at + line.len();
        match (open, fence) {
            (None, Some(fence)) => open = Some((fence, next)),
            (Some((begun, start)), Some(_)) if line.trim_end() == begun => {
                found.push(&answer[start..at]);
                open = None;
            }
            _ => {}
        }
        at = next;
    }
    found.extend(open.map(|(_, start)| &answer[start..]));
    found.retain(|block| !block.trim().is_empty());
    found
}

/// The indentation and backquotes of a line that may begin a block.
fn fence(line: &str) -> Option<&str> {
    let signs = line.trim_start();
    let name = signs.trim_start_matches('`');
    let is_fence = signs.len() - name.len() >= 3 && !name.contains('`');
    is_fence.then(|| &line[..line.len() - name.len()])
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
            ("Use ```f()``` so:\n```\na = 1\n```\nand ```b```.", "a = 1\n"),
            ("```python\ns = '''\n    ```\n    x\n    ```\n'''\n```", "s = '''\n    ```\n    x\n    ```\n'''\n"),
            ("  ```python\n  a = 1\n  ```\n", "  a = 1\n"),
        ] {
            assert_eq!(code(answer, None), found, "{answer}");
        }
        let answer = "```python\ndef f(x):\n    return x\n```\nUse it:\n```python\nprint(f(1))\n```\n";
        assert_eq!(code(answer, Some("def f(")), "def f(x):\n    return x\n");
        assert_eq!(code(answer, Some("def g(")), "print(f(1))\n");
    }

    #[test]
    fn outputs_are_the_same_but_for_space() {
        assert!(same_output("1 2\n3\n", "1  2 \n3") && same_output("2.50", "2.5") && same_output("", "\n"));
        assert!(!same_output("1 2 3", "1 2\n3") && !same_output("Yes", "YES") && !same_output("1", "1\n2"));
        assert!(!same_output("9007199254740993", "9007199254740992") && !same_output("nan", "NaN"));
        assert!(same_output("007 -0", "7 0") && same_output("1e3", "1000") && same_output("2", "2.0"));
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
            "import sys; sys.exit(127)", // what a shell says of a program that is not there
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
            ("```python\nimport sys\ndef double(x):\n    return 0\nsys.exit()\n```", false),
            ("```python\nimport sys\ndef double(x):\n    sys.exit(0)\n```", false),
            ("```python\nimport os\ndef double(x):\n    os._exit(0)\n```", false),
            (
                "```python\ndef double(x):\n    return 2 * x\nif __name__ == '__main__':\n    import unittest\n    \
                 unittest.main()\n```",
                true,
            ),
            ("```python\nfrom __future__ import annotations\ndef double(x: N):\n    return 2 * x\n```", true),
            ("```python\ndef double(x):\n    return 2 * x\n```\nSo:\n```python\nprint(double(2))\n```", true),
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
        let unpacked = whole.unpacked().unwrap();
        assert!(
            matches!(&unpacked, Tests::Cases { cases, packed, .. } if cases[2] == case("4\n", "8") && packed.is_empty())
        );
        assert_eq!(unpacked.unpacked().unwrap(), unpacked);
        let function = Some("total".to_string());
        let call = Tests::Cases { function, cases: vec![case("[1, 2]\n3", "6")], packed: String::new() };
        assert!(
            call.pass("```python\nclass Solution:\n    def total(self, a, b):\n        return sum(a) + b\n```", SHORT)
                .unwrap()
        );
        assert!(call.pass("```python\ndef total(a, b):\n    return sum(a) + b\n```", SHORT).unwrap());
        assert!(!call.pass("```python\ndef total(a, b):\n    return sum(a)\n```", SHORT).unwrap());
        for answer in [
            "```python\nclass Solution:\n    def total(self, a: List[int], b: int) -> int:\n        return reduce(add, a) + b\n```",
            "```python\nfrom __future__ import annotations\ndef total(a: N, b):\n    return sum(a) + b\n```",
            "```python\ndef total(a, b):\n    return sum(a) + b\nif __name__ == '__main__':\n    print(total([], int(input())))\n```",
        ] {
            assert!(call.pass(answer, SHORT).unwrap(), "{answer}");
        }
        for answer in ["```python\nimport sys\nsys.exit()\n```", "```python\ndef total(a, b):\n    exit(0)\n```"] {
            assert!(!call.pass(answer, SHORT).unwrap(), "{answer}");
        }
        let large = Tests::Cases {
            function: Some("next".into()),
            cases: vec![case("100000000000000000000000", "100000000000000000000001")],
            packed: String::new(),
        };
        assert!(large.pass("def next(n):\n    return n + 1", SHORT).unwrap());
        assert!(!large.pass("def next(n):\n    return n + 2", SHORT).unwrap());
        for answer in [
            "from __future__ import annotations\ndef f(n: List[int]) -> N:\n    return 2 * n\nprint(f(int(input())))",
            "def f(n: List[int]):\n    return 2 * n\nif __name__ == '__main__':\n    print(f(pow(int(input()), 1, 1000)))\n    exit()",
            "import sys\nassert sys.getrecursionlimit() == 50000\nprint(2 * int(stdin.readline()))",
        ] {
            assert!(whole.pass(answer, SHORT).unwrap(), "{answer}");
        }
        let evil = Tests::Cases { function: None, cases: vec![], packed: "bm8=".into() };
        assert!(evil.pass("print(1)", SHORT).is_err());
        // A pickle that would run code while it is read.
        let pack = "import base64, pickle, zlib\nclass Evil:\n    def __reduce__(self):\n        return (eval, (\"'[]'\",))\n\
                    print(base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode())";
        let packed = python(pack, "", SHORT).unwrap().unwrap();
        let evil = Tests::Cases { function: None, cases: vec![], packed };
        assert!(evil.pass("print(1)", SHORT).is_err());
    }

    #[test]
    fn what_cannot_run_anything_is_no_wrong_answer() {
        if !has_python() {
            return;
        }
        let refused = |script: String, word: &str| {
            let error = probe(&script).unwrap_err();
            assert!(matches!(&error, Error::Config(what) if what.contains(word)), "{error}");
        };
        let script = script(Limits::default());
        assert!(probe(&script).is_ok());
        refused(script.replace("ulimit -v ", "ulimit -v x"), "hard limits");
        refused(script.replace("exec python3", "exec python3-that-is-not-there"), "python3 cannot be started");
    }

    #[test]
    fn what_a_killed_run_left_is_in_nobodys_way() {
        let parent = Scratch::new().unwrap();
        let left = Scratch::below(&parent.0, &AtomicU64::new(4)).unwrap();
        let next = Scratch::below(&parent.0, &AtomicU64::new(4)).unwrap();
        assert!(left.0.ends_with(format!("kvpolicy-program-{}-4", std::process::id())));
        assert!(next.0.ends_with(format!("kvpolicy-program-{}-5", std::process::id())));
    }

    #[test]
    fn output_is_what_was_said_not_what_lies_at_its_path() {
        if !has_python() {
            return;
        }
        let swap = "import os\nprint('said')\nos.remove('../stdout')\nopen('../stdout', 'w').write('put there')";
        assert_eq!(python(swap, "", SHORT).unwrap().unwrap(), "said\n");
    }
}
