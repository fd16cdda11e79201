//! What an answer says, by the conventions of the benchmarks, and whether two say the same.

/// The content of the last `\boxed{..}` whose braces close and that has something in it.
pub fn boxed(text: &str) -> Option<&str> {
    boxes(text).next().map(|(_, content)| content)
}

/// Where boxes stand and what they have in them, the last one first.
fn boxes(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.rmatch_indices("\\boxed").filter_map(|(at, found)| {
        let rest = text[at + found.len()..].trim_start();
        let content = if rest.starts_with('{') { braced(rest) } else { rest.split_whitespace().next() };
        content.filter(|content| !content.trim().is_empty()).map(|content| (at, content))
    })
}

/// The content of the braces that a text begins with.
fn braced(text: &str) -> Option<&str> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return text.get(1..at);
        }
    }
    None
}

/// GSM8K: the number directly behind the last `####` that has one, else in the last box, else the last one there is.
pub fn number(text: &str) -> Option<f64> {
    let marked = text.rmatch_indices("####").find_map(|(at, mark)| marked(&text[at + mark.len()..]));
    let boxed = || boxed(text).and_then(|content| numbers(content).last());
    marked.or_else(boxed).or_else(|| numbers(text).last())
}

/// The number that a text begins with. `#### Step 3` is a heading.
fn marked(text: &str) -> Option<f64> {
    let line = text.lines().next()?;
    let mut signs = line.trim_start_matches(|c: char| c == MINUS || " \t$\\*-".contains(c)).chars();
    let first = signs.next()?;
    let begins = first.is_ascii_digit() || (first == '.' && signs.next().is_some_and(|c| c.is_ascii_digit()));
    numbers(line).next().filter(|_| begins)
}

/// AIME: the whole number in the last box, else the last one there is, 0 to 999.
pub fn integer(text: &str) -> Option<u32> {
    let number = boxed(text).and_then(|content| numbers(content).last()).or_else(|| numbers(text).last())?;
    (number.fract() == 0.0 && (0.0..1000.0).contains(&number)).then_some(number as u32)
}

/// GPQA: the letter, A to D, behind the last word `answer` or in the last box, whichever stands last, else all there is.
pub fn choice(text: &str) -> Option<char> {
    let lower = text.to_ascii_lowercase(); // of the same length
    let behind = lower.rmatch_indices("answer").find_map(|(at, word)| Some((at, letter(&text[at + word.len()..])?)));
    let boxed = boxes(text).find_map(|(at, content)| Some((at, letter(content)?)));
    let last = behind.max(boxed).map(|(_, letter)| letter);
    last.or_else(|| (text.trim().len() <= 4).then(|| letter(text))?)
}

/// The letter that a text begins with, after signs and the words of `Answer: the correct choice is (C)`.
fn letter(text: &str) -> Option<char> {
    const SKIPPED: [&str; 12] = [
        "is", "the", "correct", "right", "choice", "option", "\\boxed", "\\text", "\\mathrm", "\\textbf", "letter", "s",
    ];
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || ":*_($`{[\"'".contains(c));
        let word = |rest: &str, skipped: &str| {
            let next = rest.get(..skipped.len())?;
            let after = rest[skipped.len()..].chars().next();
            (next.eq_ignore_ascii_case(skipped) && !after.is_some_and(char::is_alphanumeric)).then_some(skipped.len())
        };
        match SKIPPED.iter().find_map(|skipped| word(rest, skipped)) {
            Some(bytes) => rest = &rest[bytes..],
            None => break,
        }
    }
    let mut chars = rest.chars();
    let first = chars.next().filter(|c| ('A'..='D').contains(c))?;
    // `Both` begins with a B, and `A` may be a word.
    let is_word = |c: char| first == 'A' && c == ' ' && chars.clone().nth(1).is_some_and(char::is_lowercase);
    let ends = |c: char| !c.is_alphanumeric() && !is_word(c);
    rest.chars().nth(1).is_none_or(ends).then_some(first)
}

/// The sign that typesetting has for a hyphen before a number.
const MINUS: char = '\u{2212}';

/// Numbers in a text, thousands separated by commas or not.
fn numbers(text: &str) -> impl DoubleEndedIterator<Item = f64> {
    let text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace(MINUS, "-");
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let (mut found, mut at) = (vec![], 0);
    while at < bytes.len() {
        let begins = digit(at) || (bytes[at] == b'.' && digit(at + 1));
        if !begins {
            at += 1;
            continue;
        }
        let start = at;
        while digit(at) || (bytes.get(at) == Some(&b',') && (1..=3).all(|i| digit(at + i)) && !digit(at + 4)) {
            at += 1;
        }
        if bytes.get(at) == Some(&b'.') && digit(at + 1) {
            at += 1;
            while digit(at) {
                at += 1;
            }
        }
        // A minus before the number or its currency, not one between two numbers.
        let before = text[..start].trim_end_matches(['$', '\\']);
        let minus = before.ends_with('-') && !before[..before.len() - 1].ends_with(|c: char| c.is_alphanumeric());
        if let Ok(number) = text[start..at].replace(',', "").parse::<f64>() {
            found.push(if minus { -number } else { number });
        }
    }
    found.into_iter()
}

/// Whether two numbers are the same, but for how a decimal fraction is stored.
pub fn same_number(a: f64, b: f64) -> bool {
    if a.fract() == 0.0 && b.fract() == 0.0 {
        return a == b;
    }
    a.is_finite() && b.is_finite() && (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0)
}

/// Whether a whole number is below zero, and its digits without zeros in front. It may be larger than any type here holds.
pub(super) fn whole(text: &str) -> Option<(bool, &str)> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    let is_whole = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let digits = digits.trim_start_matches('0');
    is_whole.then_some((text.starts_with('-') && !digits.is_empty(), digits))
}

/// MATH: whether an answer is a known one. Compared are normal forms, then values, then parts of tuples and lists.
pub fn same_math(answer: &str, known: &str) -> bool {
    let (a, b) = (normal(answer), normal(known));
    if a == b {
        return !a.is_empty();
    }
    if let (Some(a), Some(b)) = (whole(&a), whole(&b)) {
        return a == b;
    }
    if let (Some(a), Some(b)) = (value(&a), value(&b)) {
        return same_number(a, b);
    }
    let (a, b) = (parts(&a), parts(&b));
    let same_frame = (a.0, a.2) == (b.0, b.2);
    same_frame && a.1.len() > 1 && a.1.len() == b.1.len() && a.1.iter().zip(&b.1).all(|(a, b)| same_math(a, b))
}

/// A LaTeX expression without what can be written in several ways.
fn normal(text: &str) -> String {
    let mut text = text.trim().trim_end_matches('.').replace(MINUS, "-");
    for (open, close) in [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")] {
        if let Some(inner) = text.strip_prefix(open).and_then(|text| text.strip_suffix(close)) {
            text = inner.trim().to_string();
        }
    }
    text = without_text(&text);
    for (written, plain) in [
        ("\\left", ""),
        ("\\right", ""),
        ("\\displaystyle", ""),
        ("\\dfrac", "\\frac"),
        ("\\tfrac", "\\frac"),
        ("\\cfrac", "\\frac"),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\degree", ""),
        ("\\$", ""),
        ("\\%", ""),
        ("%", ""),
        ("$", ""),
        ("{,}", ","),
        ("\\!", ""),
        ("\\,", ""),
        ("\\;", ""),
        ("\\:", ""),
        ("\\ ", " "),
        ("~", " "),
        ("\\cdot", "*"),
        ("\\times", "*"),
        ("\\leq", "\\le"),
        ("\\geq", "\\ge"),
        ("\\infinity", "\\infty"),
        ("\\{", "{"),
        ("\\}", "}"),
    ] {
        text = text.replace(written, plain);
    }
    text = without_unit(text.trim().trim_end_matches('.'));
    // `x = 5`, but not `2x + y = 5`.
    if let Some((name, rest)) = text.split_once('=')
        && name.trim().chars().count() <= 2
        && !rest.contains('=')
    {
        text = rest.to_string();
    }
    text.retain(|c| !c.is_whitespace());
    text = braced_arguments(&text, "\\frac", 2);
    for command in ["\\sqrt", "^", "_"] {
        text = braced_arguments(&text, command, 1);
    }
    if is_grouped(&text) { text.replace(',', "") } else { text }
}

/// Units, which stand in `\text{..}` behind something, are left out; words that are all there is are kept.
fn without_text(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((at, command)) = ["\\text", "\\mbox", "\\mathrm", "\\textbf", "\\textit", "\\mathbf"]
        .iter()
        .filter_map(|command| rest.find(&format!("{command}{{")).map(|at| (at, *command)))
        .min()
    {
        let Some(content) = braced(&rest[at + command.len()..]) else { break };
        out += &rest[..at];
        let after = &rest[at + command.len() + content.len() + 2..];
        let is_unit = out.ends_with(|c: char| c.is_ascii_digit() || "}) ".contains(c)) && ends_answer(after);
        if !is_unit || out.trim().is_empty() {
            out += content.trim();
            rest = after;
        } else {
            rest = after.trim_start_matches(|c: char| "^{}23 ".contains(c));
        }
    }
    out + rest
}

/// Whether nothing follows a unit but its power.
fn ends_answer(text: &str) -> bool {
    text.trim_matches(|c: char| "^{}23. $".contains(c)).is_empty()
}

/// A number without the unit that is written behind it.
fn without_unit(text: &str) -> String {
    const UNITS: [&str; 40] = [
        "cm", "mm", "km", "kg", "ft", "mph", "inch", "inches", "foot", "feet", "meter", "meters", "metres", "mile",
        "miles", "degree", "degrees", "dollar", "dollars", "cent", "cents", "hour", "hours", "minute", "minutes",
        "second", "seconds", "day", "days", "week", "weeks", "year", "years", "unit", "units", "square", "cubic",
        "percent", "points", "people",
    ];
    let mut text = text.trim();
    while let Some((number, unit)) = text.rsplit_once(' ') {
        let unit = unit.trim_end_matches(|c: char| "^{}23".contains(c)).to_lowercase();
        if !UNITS.contains(&unit.as_str()) {
            break;
        }
        text = number.trim_end();
    }
    text.to_string()
}

/// `\frac12`, `\frac1{72}`, `\sqrt2` and `x^2` with braces around their arguments.
fn braced_arguments(text: &str, command: &str, count: usize) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(command) {
        out += &rest[..at + command.len()];
        rest = &rest[at + command.len()..];
        for _ in 0..count {
            let bytes = match braced(rest).filter(|_| rest.starts_with('{')) {
                Some(content) => {
                    out += &format!("{{{content}}}");
                    content.len() + 2
                }
                // A command is one argument, and so is a letter or digit; `\sqrt[3]{x}` stays as it is.
                None => match rest.chars().next() {
                    Some(c) if c.is_alphanumeric() => {
                        out += &format!("{{{c}}}");
                        c.len_utf8()
                    }
                    _ => 0,
                },
            };
            rest = &rest[bytes..];
        }
    }
    out + rest
}

/// A number whose thousands are separated by commas.
fn is_grouped(text: &str) -> bool {
    let whole = text.trim_start_matches('-').split('.').next().unwrap_or_default();
    let mut groups = whole.split(',');
    let is_digits = |group: &str| !group.is_empty() && group.bytes().all(|b| b.is_ascii_digit());
    let first = groups.next().is_some_and(|group| group.len() <= 3 && is_digits(group));
    let mut rest = groups.peekable();
    first && rest.peek().is_some() && rest.all(|group| group.len() == 3 && is_digits(group))
}

/// The value of a number, a fraction or a mixed number.
fn value(normal: &str) -> Option<f64> {
    if let Some(rest) = normal.strip_prefix('-') {
        return value(rest).map(|value| -value);
    }
    if let Some((whole, rest)) = normal.split_once("\\frac{") {
        let (above, below) = rest.strip_suffix('}')?.split_once("}{")?;
        let whole = if whole.is_empty() { 0.0 } else { whole.parse().ok().filter(|n: &f64| *n >= 0.0)? };
        return Some(whole + plain(above)? / plain(below)?);
    }
    match normal.split_once('/') {
        Some((above, below)) => Some(plain(above)? / plain(below)?),
        None => plain(normal),
    }
}

fn plain(text: &str) -> Option<f64> {
    let is_number = text.trim_start_matches('-').bytes().all(|b| b.is_ascii_digit() || b == b'.');
    text.parse().ok().filter(|_| is_number)
}

/// The brackets around a list and its elements.
fn parts(text: &str) -> (Option<char>, Vec<&str>, Option<char>) {
    let open = text.chars().next().filter(|c| "([{".contains(*c));
    let close = text.chars().next_back().filter(|c| ")]}".contains(*c));
    let is_framed = open.is_some() && close.is_some() && text.len() > 1;
    let (open, close) = (open.filter(|_| is_framed), close.filter(|_| is_framed));
    let inner = if is_framed { &text[1..text.len() - 1] } else { text };
    let (mut depth, mut start, mut parts) = (0, 0, vec![]);
    for (at, c) in inner.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&inner[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&inner[start..]);
    (open, parts, close)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// What a model says may be anything.
        #[test]
        fn whatever_is_said_is_read(parts in proptest::collection::vec(proptest::sample::select(vec![
            "\\boxed", "{", "}", "(", ")", "[", ",", ".", "-", "\u{2212}", "1", "23", "1,000", "/", "\\frac", "\\sqrt", "\\text{", "^",
            "\\left", "$", "%", " cm", "=", "x", "é", "####", "Answer", ": ", "B", "\n", "\\", "∞",
        ]), 0..24)) {
            let text = parts.concat();
            let _ = (number(&text), integer(&text), choice(&text));
            let content = boxed(&text).unwrap_or(&text);
            prop_assert_eq!(same_math(content, content), !normal(content).is_empty());
            prop_assert_eq!(same_math(content, "17"), same_math("17", content));
        }
    }

    #[test]
    fn the_last_whole_box_counts() {
        for (text, content) in [
            (r"so \boxed{42}.", Some("42")),
            (r"\boxed{\frac{1}{\sqrt{2}}} it is", Some(r"\frac{1}{\sqrt{2}}")),
            (r"first \boxed{1}, no: \boxed{2}", Some("2")),
            (r"\boxed{1} and \boxed{2", Some("1")),
            (r"\boxed 7 it is", Some("7")),
            (r"$\boxed{ \text{(C)} }$", Some(r" \text{(C)} ")),
            ("nothing", None),
            (r"\boxed{", None),
            (r"\boxed{5}, in the form \boxed{} or \boxed{ }", Some("5")),
            (r"\boxed{}", None),
        ] {
            assert_eq!(boxed(text), content, "{text}");
        }
    }

    #[test]
    fn gsm8k_numbers_are_read_as_people_write_them() {
        for (text, number) in [
            ("48 + 24 = 72.\n#### 72", Some(72.0)),
            ("#### $1,234.50 dollars", Some(1234.5)),
            ("#### 18.00", Some(18.0)),
            ("#### -5", Some(-5.0)),
            ("#### -$5", Some(-5.0)),
            ("#### 10 apples\nand 3 pears are left over", Some(10.0)),
            ("She has 3 boxes of 12, that is 36 eggs.", Some(36.0)),
            (r"The answer is \boxed{2{,}000} of 5000", Some(2000.0)),
            ("from 3-5 days", Some(5.0)),
            ("it fell to \u{2212}12 degrees", Some(-12.0)),
            ("1,2,3", Some(3.0)),
            ("50%", Some(50.0)),
            ("#### Step 3: add\n5 + 6 = 11", Some(11.0)),
            ("#### 72\n#### Step 3 is done", Some(72.0)),
            ("#### **-$7**", Some(-7.0)),
            ("#### .5", Some(0.5)),
            (r"#### Step 3: add\n\boxed{11} of 12", Some(11.0)),
            ("####", None),
            (".5", Some(0.5)),
            ("none", None),
            ("", None),
        ] {
            assert_eq!(super::number(text), number, "{text}");
        }
        assert!(same_number(0.1 + 0.2, 0.3) && !same_number(72.0, 73.0) && !same_number(0.5, 0.501));
        assert!(!same_number(1_000_001.0, 1_000_000.0) && !same_number(0.5, 0.500_000_1));
        assert!(!same_number(f64::INFINITY, 0.5) && !same_number(f64::NAN, f64::NAN));
    }

    #[test]
    fn aime_answers_are_whole_and_below_1000() {
        for (text, number) in [
            (r"\boxed{025}", Some(25)),
            (r"\boxed{n = 204}", Some(204)),
            ("therefore m+n = 371.", Some(371)),
            (r"\boxed{12.5}", None),
            (r"\boxed{1000}", None),
            (r"\boxed{-3}", None),
        ] {
            assert_eq!(integer(text), number, "{text}");
        }
    }

    #[test]
    fn gpqa_choices_are_found_and_words_are_not() {
        for (text, choice) in [
            ("Answer: C", Some('C')),
            ("**Answer:** B", Some('B')),
            ("Answer: (D) because", Some('D')),
            ("I first thought the answer is A. But then:\nAnswer: D.", Some('D')),
            ("The correct answer is (B).", Some('B')),
            (r"\boxed{A}", Some('A')),
            (r"the answer is $\boxed{\text{C}}$", Some('C')),
            ("Answer: the correct option is B) 5 eV", Some('B')),
            ("B", Some('B')),
            ("(B)", Some('B')),
            ("Answer: C because of the mass", Some('C')),
            ("answer is D as shown", Some('D')),
            (r"The answer is A. No: \boxed{B}", Some('B')),
            (r"\boxed{B}? No: the answer is D.", Some('D')),
            ("The answer is A mixture of all", None),
            ("Answer: Both", None),
            ("Answer: E", None),
            ("the answer is c", None),
            ("A careful look", None),
            ("", None),
        ] {
            assert_eq!(super::choice(text), choice, "{text}");
        }
    }

    #[test]
    fn math_answers_are_the_same_however_they_are_written() {
        for (answer, known) in [
            (r"\dfrac{1}{2}", r"\frac{1}{2}"),
            (r"\frac12", r"\frac{1}{2}"),
            ("1/2", r"\frac{1}{2}"),
            ("0.5", r"\frac{1}{2}"),
            (".5", "0.5"),
            (r"-\frac{3}{4}", "-0.75"),
            (r"\frac{-3}{4}", r"-\frac{3}{4}"),
            (r"2\frac{1}{2}", "2.5"),
            (r"\frac1{72}", r"\frac{1}{72}"),
            (r"\sqrt2", r"\sqrt{2}"),
            (r"3\sqrt{2}", r"3 \sqrt{2}"),
            (r"10{,}080", "10080"),
            ("10,080", "10080"),
            (r"1\,000", "1,000"),
            (r"\$18.90", "18.90"),
            (r"$42$", "42"),
            (r"50\%", "50"),
            (r"90^\circ", "90"),
            (r"90^{\circ}", "90"),
            (r"x = 5", "5"),
            (r"5 \text{ cm}", "5"),
            (r"5\text{ cm}^2", "5"),
            ("5 square units", "5"),
            ("12 cm^2", "12"),
            (r"\text{Evelyn}", "Evelyn"),
            (r"\text{(C)}", "(C)"),
            (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
            (r"(1/2, 3)", r"\left(\frac{1}{2},3\right)"),
            ("1, 0.5", r"1,\frac12"),
            (r"[0,\infty)", r"[0, \infty)"),
            ("6.", "6"),
            (r"x^2+2x+1", r"x^2 + 2x + 1"),
            (r"11\sqrt{2}.", r"11\sqrt2"),
            ("\u{2212}3", "-3"),
            ("x^{2}", "x^2"),
            (r"2x^{3}_{1}+x^{12}", "2x^3_1 + x^{12}"),
            ("+7", "007"),
        ] {
            assert!(same_math(answer, known) && same_math(known, answer), "{answer} and {known}");
        }
        for (answer, known) in [
            ("1", "2"),
            ("", ""),
            (r"\frac{1}{3}", "0.33"),
            ("1,2", "12"),
            ("1,200", "1,2,0,0"),
            ("(1,2)", "[1,2]"),
            ("(1,2)", "(2,1)"),
            ("(1,2)", "(1,2,3)"),
            ("2x", "2"),
            (r"\sqrt{2}", "2"),
            ("-5", "5"),
            (r"2\frac{1}{2}", r"\frac{1}{2}"),
            ("x+y=5", "5"),
            (r"\text{Evelyn}", "Angela"),
            ("5 apples", "4"),
            ("1/0", "7"),
            ("x^{12}", "x^12"),
            ("1000001", "1000000"),
            ("9007199254740993", "9007199254740992"),
        ] {
            assert!(!same_math(answer, known) && !same_math(known, answer), "{answer} and {known}");
        }
    }
}
