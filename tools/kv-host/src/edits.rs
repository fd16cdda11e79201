//! Line-addressed edits: a patch that quotes nothing of what it changes.
//!
//! ```text
//! # a comment
//! file src/lib.rs
//! after 50
//! | pub mod added;
//! replace 60-62
//! | one line instead of three
//! replace 70
//! ```
//!
//! Numbers are lines of the published file, from 1, whatever stands above; `after 0` is the top. A text line begins with
//! `|` and one space. `replace` without text deletes. Without context to search for, a script means something only for
//! the exact file it was written for, so whoever applies one checks the file's hash before.

use crate::error::{Error, Result};

/// The edits of one file, in the order of its lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEdits {
    /// Path relative to the package, with `/`.
    pub file: String,
    edits: Vec<Edit>,
}

/// Replaces `removed` lines behind the first `start` by `text`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Edit {
    start: usize,
    removed: usize,
    text: String,
}

impl Edit {
    fn end(&self) -> usize {
        self.start + self.removed
    }
}

/// Reads a script.
///
/// # Errors
/// [`Error::Script`] for a line that is none of the above, numbers that are not in order or overlap, an insertion without
/// text, a file named twice, and a file that the next one follows without an edit.
pub fn parse(script: &str) -> Result<Vec<FileEdits>> {
    let mut files: Vec<FileEdits> = vec![];
    let mut last = 0;
    for (at, text) in script.lines().enumerate() {
        last = at + 1;
        read_line(text, &mut files).map_err(|what| Error::Script { line: last, what })?;
    }
    complete(&files).map_err(|what| Error::Script { line: last, what })?;
    Ok(files)
}

fn read_line(line: &str, files: &mut Vec<FileEdits>) -> std::result::Result<(), String> {
    if line.is_empty() || line.starts_with('#') {
        return Ok(());
    }
    if let Some(text) = line.strip_prefix('|') {
        let edit = files.last_mut().and_then(|file| file.edits.last_mut()).ok_or("text that belongs to no edit")?;
        edit.text.push_str(text.strip_prefix(' ').unwrap_or(text));
        edit.text.push('\n');
        return Ok(());
    }
    complete(files)?;
    match line.split_once(' ') {
        Some(("file", path)) if files.iter().any(|f| f.file == path) => Err(format!("{path} is named twice")),
        Some(("file", path)) if files.last().is_some_and(|f| f.edits.is_empty()) => {
            Err(format!("{path} follows a file without edits"))
        }
        Some(("file", path)) => {
            files.push(FileEdits { file: path.to_string(), edits: vec![] });
            Ok(())
        }
        Some(("after", line)) => push(files, number(line)?, 0),
        Some(("replace", range)) => {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (number(first)?, number(last)?);
            if first == 0 || last < first {
                return Err(format!("`{range}` is no range of lines"));
            }
            push(files, first - 1, last - first + 1)
        }
        _ => Err(format!("`{line}` is none of: file, after, replace, text behind |")),
    }
}

/// What a finished part of a script must have.
fn complete(files: &[FileEdits]) -> std::result::Result<(), String> {
    match files.last().and_then(|file| file.edits.last()) {
        Some(edit) if edit.removed == 0 && edit.text.is_empty() => Err("an insertion of nothing".into()),
        _ => Ok(()),
    }
}

fn number(text: &str) -> std::result::Result<usize, String> {
    text.parse().map_err(|_| format!("`{text}` is no line number"))
}

fn push(files: &mut [FileEdits], start: usize, removed: usize) -> std::result::Result<(), String> {
    let file = files.last_mut().ok_or("an edit of no file")?;
    if let Some(before) = file.edits.last()
        && (start < before.end() || start == before.start)
    {
        return Err("edits must be in the order of lines and may not overlap".into());
    }
    file.edits.push(Edit { start, removed, text: String::new() });
    Ok(())
}

impl FileEdits {
    /// The file with all edits.
    ///
    /// # Errors
    /// [`Error::OutOfFile`] for an edit behind the end of `text`.
    pub fn apply(&self, text: &str) -> Result<String> {
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let mut edited = String::with_capacity(text.len());
        let mut at = 0;
        for edit in &self.edits {
            let kept = lines.get(at..edit.start).filter(|_| edit.end() <= lines.len());
            let out = || Error::OutOfFile { file: self.file.clone(), line: edit.end(), has: lines.len() };
            edited.extend(kept.ok_or_else(out)?.iter().copied());
            edited.push_str(&edit.text);
            at = edit.end();
        }
        edited.extend(lines[at..].iter().copied());
        Ok(edited)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    const TEXT: &str = "one\ntwo\nthree\nfour\nfive";

    fn edited(edits: &str) -> Result<String> {
        parse(&format!("file a\n{edits}"))?[0].apply(TEXT)
    }

    fn fault(script: &str) -> (usize, String) {
        match parse(script) {
            Err(Error::Script { line, what }) => (line, what),
            other => panic!("{script:?} gave {other:?}"),
        }
    }

    #[test]
    fn numbers_are_of_the_file_before_any_edit() {
        let all = "# why\nafter 0\n| zero\n\nreplace 2-3\n| 2\n|\n|   3\n| and more\nreplace 4\nafter 4\n| 4.5\n";
        assert_eq!(edited(all).unwrap(), "zero\none\n2\n\n  3\nand more\n4.5\nfive");
        assert_eq!(edited("replace 1-5\n| x").unwrap(), "x\n");
        assert_eq!(edited("").unwrap(), TEXT);
    }

    #[test]
    fn edits_behind_the_end_are_errors() {
        assert!(edited("after 4\n| x").is_ok());
        for edit in ["after 6\n| x", "replace 5-6", "replace 6", "replace 2\nreplace 9\n| x"] {
            assert!(matches!(edited(edit), Err(Error::OutOfFile { has: 5, .. })), "{edit}");
        }
    }

    #[test]
    fn faults_name_their_line() {
        assert_eq!(fault("after 3\n| x").0, 1);
        assert_eq!(fault("| x").0, 1);
        assert_eq!(fault("file a\n\n# x\ninsert 3").0, 4);
        assert_eq!(fault("file a\nreplace 0"), (2, "`0` is no range of lines".into()));
        assert_eq!(fault("file a\nreplace 4-3"), (2, "`4-3` is no range of lines".into()));
        assert_eq!(fault("file a\nreplace x"), (2, "`x` is no line number".into()));
        assert_eq!(fault("file a\nreplace 1\nfile a"), (3, "a is named twice".into()));
        assert_eq!(fault("file a\nfile b"), (2, "b follows a file without edits".into()));
        for nothing in ["file a\nafter 2\nreplace 3", "file a\n\nafter 2"] {
            assert_eq!(fault(nothing), (3, "an insertion of nothing".into()), "{nothing}");
        }
        for order in ["replace 4\nreplace 3", "replace 2-4\nreplace 4", "replace 2-4\nafter 3", "replace 3\nreplace 3"]
        {
            let (line, what) = fault(&format!("file a\n{order}"));
            assert_eq!((line, &what[..14]), (3, "edits must be "), "{order}");
        }
        assert!(fault("file a\nafter 2\n| x\nafter 2\n| y").1.contains("overlap"));
    }
}
