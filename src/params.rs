//! Parameters of a policy: parsed from and printed to its string, documented and range-checked in one place.
//!
//! [`policy_params!`](crate::policy_params) declares a policy's struct together with its name, paper, parameters,
//! defaults and accepted ranges.

use std::{
    fmt::{self, Display},
    ops::{RangeFrom, RangeFull, RangeInclusive},
};

/// A type that can be a parameter.
pub trait Param: Display + Sized {
    /// How the type is written, for messages: `whole number`, `true or false`, ...
    const KIND: &'static str;
    /// The value, or `None` if the text is none.
    fn read(text: &str) -> Option<Self>;
}

macro_rules! number_param {
    ($($type:ty = $kind:literal),+) => {$(
        impl Param for $type {
            const KIND: &'static str = $kind;
            fn read(text: &str) -> Option<Self> {
                text.parse().ok()
            }
        }
    )+};
}
number_param!(u32 = "whole number", u64 = "whole number", usize = "whole number", bool = "true or false");

macro_rules! float_param {
    ($($type:ty),+) => {$(
        impl Param for $type {
            const KIND: &'static str = "number";
            fn read(text: &str) -> Option<Self> {
                text.parse().ok().filter(|x: &$type| x.is_finite())
            }
        }
    )+};
}
float_param!(f32, f64);

/// An optional parameter, printed as `auto` when it is left to the checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Auto<T>(pub Option<T>);

impl<T: Display> Display for Auto<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("auto"),
        }
    }
}

impl<T: Param> Param for Auto<T> {
    const KIND: &'static str = T::KIND;
    fn read(text: &str) -> Option<Self> {
        if text == "auto" { Some(Self(None)) } else { T::read(text).map(|value| Self(Some(value))) }
    }
}

/// A path. It may not contain `,`, `;`, `(` or `)`, which the policy string uses itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePath(pub std::path::PathBuf);

impl Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl Param for FilePath {
    const KIND: &'static str = "path";
    fn read(text: &str) -> Option<Self> {
        let own = |c: char| ",;()".contains(c);
        (!text.is_empty() && !text.contains(own)).then(|| Self(text.into()))
    }
}

/// A number of entries: absolute (`512`) or a share of the tokens seen (`25%`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    /// This many, at least 1.
    Entries(usize),
    /// This part of the tokens seen, above 0 and at most 1.
    Share(f64),
}

impl Amount {
    /// The number of entries at `seen` tokens; fractional for a share, of which a store keeps the whole part.
    pub fn of(self, seen: usize) -> f64 {
        match self {
            Self::Entries(n) => n as f64,
            Self::Share(share) => {
                // 29% of 100 is 28.999.. in double precision: a share that is a whole number of entries is that number.
                let (product, up) = (seen as f64 * share, (seen as f64 * share).ceil());
                if up / seen as f64 == share { up } else { product }
            }
        }
    }

    /// A fault if an absolute budget cannot hold `what=n` entries that it must keep.
    pub fn too_small_for(self, what: &str, n: usize) -> Option<String> {
        match self {
            Self::Entries(budget) if n > budget => Some(format!("{what}={n} exceeds budget={budget}")),
            _ => None,
        }
    }
}

impl Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entries(n) => n.fmt(f),
            Self::Share(share) => write!(f, "{}%", percent(*share)),
        }
    }
}

/// The shortest decimal of a share in (0, 1], its point shifted by two digits.
fn percent(share: f64) -> String {
    let text = share.to_string(); // never with an exponent
    let Some((whole, digits)) = text.split_once('.') else { return format!("{text}00") };
    let digits = format!("{digits:0<2}");
    let (hundredths, rest) = digits.split_at(2);
    let whole = format!("{whole}{hundredths}");
    let whole = match whole.trim_start_matches('0') {
        "" => "0",
        whole => whole,
    };
    if rest.is_empty() { whole.to_string() } else { format!("{whole}.{rest}") }
}

impl Param for Amount {
    const KIND: &'static str = "1 or more entries (512), or a share of the tokens seen up to 100% (25%)";
    fn read(text: &str) -> Option<Self> {
        match text.strip_suffix('%') {
            Some(percent) => {
                // Shifting the point instead of dividing: every share has a text that reads back as itself.
                let share = format!("{percent}e-2").parse::<f64>().ok()?;
                (share > 0.0 && share <= 1.0).then_some(Self::Share(share))
            }
            None => text.parse().ok().filter(|&n| n > 0).map(Self::Entries),
        }
    }
}

/// A set of accepted values.
pub trait Bounds<T> {
    /// Whether the value is accepted.
    fn holds(&self, value: &T) -> bool;
    /// The set in words; empty if everything the type can hold is accepted.
    fn text(&self) -> String;
}

impl<T: PartialOrd + Display> Bounds<T> for RangeInclusive<T> {
    fn holds(&self, value: &T) -> bool {
        self.contains(value)
    }
    fn text(&self) -> String {
        format!("{}..={}", self.start(), self.end())
    }
}

impl<T: PartialOrd + Display> Bounds<T> for RangeFrom<T> {
    fn holds(&self, value: &T) -> bool {
        self.contains(value)
    }
    fn text(&self) -> String {
        format!("{} or more", self.start)
    }
}

impl<T> Bounds<T> for RangeFull {
    fn holds(&self, _: &T) -> bool {
        true
    }
    fn text(&self) -> String {
        String::new()
    }
}

/// Bounds of the value inside an [`Auto`].
#[derive(Debug, Clone)]
pub struct AutoOr<B>(pub B);

impl<T, B: Bounds<T>> Bounds<Auto<T>> for AutoOr<B> {
    fn holds(&self, value: &Auto<T>) -> bool {
        value.0.as_ref().is_none_or(|v| self.0.holds(v))
    }
    fn text(&self) -> String {
        format!("auto or {}", self.0.text())
    }
}

/// What a parameter is.
#[derive(Debug, Clone)]
pub struct ParamInfo {
    /// As written in the policy string.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// The default, printed; `None` if it must be given.
    pub default: Option<String>,
    /// Accepted values in words.
    pub accepts: String,
}

/// What a policy is.
#[derive(Debug, Clone)]
pub struct Info {
    /// As written in the policy string.
    pub name: &'static str,
    /// Where the method comes from.
    pub paper: &'static str,
    /// The policy's documentation.
    pub doc: &'static str,
    /// Its parameters, in order of printing.
    pub params: Vec<ParamInfo>,
}

/// The parameters and the inner text of one policy string, and the faults found while reading them.
#[derive(Debug)]
pub struct Args<'a> {
    name: &'a str,
    given: Vec<(&'a str, &'a str)>,
    inner: Option<&'a str>,
    pub(crate) faults: Vec<String>,
}

impl<'a> Args<'a> {
    /// Splits `name:key=value,...(inner)`.
    pub(crate) fn split(text: &'a str) -> Self {
        let mut faults = vec![];
        let (head, inner) = match text.split_once('(') {
            None => (text, None),
            Some((head, rest)) => match rest.trim_end().strip_suffix(')') {
                Some(inner) => (head, Some(inner.trim())),
                None => {
                    faults.push("`(` is not closed at the end".to_string());
                    (head, None)
                }
            },
        };
        let (name, params) = head.split_once(':').unwrap_or((head, ""));
        let mut given: Vec<(&str, &str)> = vec![];
        for part in params.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            match part.split_once('=') {
                Some((key, _)) if given.iter().any(|(k, _)| *k == key.trim()) => {
                    faults.push(format!("parameter `{}` is given twice", key.trim()));
                }
                Some((key, value)) => given.push((key.trim(), value.trim())),
                None => faults.push(format!("`{part}` is not of the form parameter=value")),
            }
        }
        Self { name: name.trim(), given, inner, faults }
    }

    /// The policy's name.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Records a fault.
    pub fn fault(&mut self, what: impl Into<String>) {
        self.faults.push(what.into());
    }

    /// Takes a parameter. `None` means that a fault was recorded.
    pub fn take<T: Param>(&mut self, name: &str, default: Option<T>, bounds: impl Bounds<T>) -> Option<T> {
        let Some(at) = self.given.iter().position(|(key, _)| *key == name) else {
            if default.is_none() {
                self.fault(format!("parameter `{name}` is missing ({})", accepts::<T>(&bounds)));
            }
            return default;
        };
        let (_, text) = self.given.swap_remove(at);
        let value = T::read(text).filter(|value| bounds.holds(value));
        if value.is_none() {
            self.fault(format!("{name}={text} is not accepted: {}", accepts::<T>(&bounds)));
        }
        value
    }

    /// Takes the text between the parentheses. `None` means that a fault was recorded.
    pub fn take_inner(&mut self, form: &str) -> Option<&'a str> {
        let inner = self.inner.take().filter(|text| !text.is_empty());
        if inner.is_none() {
            self.fault(format!("wraps another policy: write {form}"));
        }
        inner
    }

    /// Records what nobody took.
    pub(crate) fn finish(&mut self, known: &[ParamInfo]) {
        for (key, value) in std::mem::take(&mut self.given) {
            if known.iter().any(|p| p.name == key) {
                continue;
            }
            let names: Vec<_> = known.iter().map(|p| p.name).collect();
            let known =
                if names.is_empty() { "it has none".to_string() } else { format!("known: {}", names.join(", ")) };
            self.fault(format!("unknown parameter `{key}={value}` ({known})"));
        }
        if self.inner.take().is_some() {
            self.fault("takes no inner policy");
        }
    }
}

/// Accepted values in words, for help and messages.
pub fn accepts<T: Param>(bounds: &impl Bounds<T>) -> String {
    let range = bounds.text();
    if range.is_empty() { T::KIND.trim().to_string() } else { format!("{}, {range}", T::KIND.trim()) }
}

/// A policy that can be made from its string. Derived by [`policy_params!`](crate::policy_params).
pub trait Configured: Sized {
    /// Name, paper, parameters.
    fn info() -> Info;
    /// Reads the parameters; `None` means that faults were recorded.
    fn read(args: &mut Args, registry: &crate::Registry) -> Option<Self>;
}

/// Declares a policy's parameters: the struct, its string form, its documentation and its accepted ranges.
///
/// ```
/// kvpolicy::policy_params! {
///     /// Keeps every second token.
///     pub struct Halve = "halve", paper "none" {
///         /// Newest entries that are never dropped.
///         recent: u32 = 32, in 1..=65_536;
///         /// Entries each KV head keeps; no default, so it must be given.
///         budget: kvpolicy::params::Amount, in ..;
///     }
/// }
/// impl kvpolicy::Policy for Halve {}
/// let mut registry = kvpolicy::Registry::standard();
/// registry.add::<Halve>();
/// assert_eq!(registry.parse("halve:budget=25%").unwrap().to_string(), "halve:recent=32,budget=25%");
/// assert!(registry.parse("halve:recent=0").is_err());
/// ```
#[macro_export]
macro_rules! policy_params {
    (
        $(#[doc = $doc:literal])+
        $vis:vis struct $type:ident = $name:literal, paper $paper:literal {
            $(
                $(#[doc = $field_doc:literal])+
                $field:ident: $field_type:ty $(= $default:expr)?, in $bounds:expr;
            )*
        }
        $(wraps $inner:ident)?
    ) => {
        $(#[doc = $doc])+
        #[doc = ""]
        #[doc = concat!("Source: ", $paper, ".")]
        #[derive(Debug, Clone)]
        $vis struct $type {
            $($(#[doc = $field_doc])+ pub $field: $field_type,)*
            $(#[doc = "The wrapped policy."] pub $inner: ::std::sync::Arc<dyn $crate::Policy>,)?
        }

        impl $crate::params::Configured for $type {
            fn info() -> $crate::params::Info {
                $crate::params::Info {
                    name: $name,
                    paper: $paper,
                    doc: concat!($($doc, "\n"),+),
                    params: vec![$($crate::params::ParamInfo {
                        name: stringify!($field),
                        doc: concat!($($field_doc, "\n"),+),
                        default: $crate::policy_params!(@default $field_type $(, $default)?).map(|d| d.to_string()),
                        accepts: $crate::params::accepts::<$field_type>(&($bounds)),
                    }),*],
                }
            }

            #[allow(unused_variables)]
            fn read(args: &mut $crate::params::Args, registry: &$crate::Registry) -> Option<Self> {
                $(let $field = args.take::<$field_type>(
                    stringify!($field),
                    $crate::policy_params!(@default $field_type $(, $default)?),
                    $bounds,
                );)*
                $(let $inner = registry.read_inner(args, concat!($name, "(policy)"));)?
                Some(Self { $($field: $field?,)* $($inner: $inner?,)? })
            }
        }

        impl ::std::fmt::Display for $type {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.write_str($name)?;
                #[allow(unused_mut, unused_variables)]
                let mut sign = ':';
                $(
                    write!(f, "{sign}{}={}", stringify!($field), self.$field)?;
                    #[allow(unused_assignments)]
                    { sign = ','; }
                )*
                $(write!(f, "({})", self.$inner)?;)?
                Ok(())
            }
        }
    };
    (@default $type:ty) => { None::<$type> };
    (@default $type:ty, $default:expr) => { Some::<$type>($default) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_reads_back_as_itself() {
        for (share, text) in [
            (0.25, "25%"),
            (1.0, "100%"),
            (0.5, "50%"),
            (0.05, "5%"),
            (0.001, "0.1%"),
            (0.075, "7.5%"),
            (0.29, "29%"),
            (0.00005, "0.005%"),
        ] {
            assert_eq!(Amount::Share(share).to_string(), text);
            assert_eq!(Amount::read(text), Some(Amount::Share(share)));
        }
        let mut state = 1u64;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let share = ((state >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
            let text = Amount::Share(share).to_string();
            assert_eq!(Amount::read(&text), Some(Amount::Share(share)), "{text}");
        }
        for bad in ["0%", "101%", "%", "x%", "nan%", "inf%", "-5%"] {
            assert_eq!(Amount::read(bad), None, "{bad}");
        }
    }
}
