//! Policies by name.

use crate::{
    compose,
    error::{Error, Result},
    params::{Args, Configured, Info},
    policies,
    policy::Policy,
};
use std::{fmt, sync::Arc};

type Read = Box<dyn Fn(&mut Args, &Registry) -> Option<Arc<dyn Policy>> + Send + Sync>;

/// A policy that can be asked for by name.
pub struct Entry {
    /// Name, paper, parameters.
    pub info: Info,
    read: Read,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.info.fmt(f)
    }
}

/// The policies that a policy string may name.
///
/// The string is `name`, `name:parameter=value,...`, or a wrapper with its policy in parentheses:
/// `full`, `window:size=1024,sinks=4`, `h2o:budget=25%`, `adakv:floor=0.2(snapkv:budget=512)`,
/// `every(8, tova:budget=256)`, `per-layer(0-3=full; rest=h2o:budget=512)`. A policy prints as such a string again.
#[derive(Debug, Default)]
pub struct Registry {
    entries: Vec<Entry>,
}

impl Registry {
    /// Every policy of this crate.
    pub fn standard() -> Self {
        let mut all = Self::default();
        all.add::<policies::Full>();
        all.add::<policies::Window>();
        all.add::<policies::Dms>();
        all.add::<policies::H2o>();
        all.add::<policies::Tova>();
        all.add::<policies::SnapKv>();
        all.add::<policies::Knorm>();
        all.add::<policies::KeyDiff>();
        all.add::<policies::ExpectedAttention>();
        all.add::<policies::Rkv>();
        all.add::<policies::Random>();
        all.add::<policies::RandomGate>();
        all.add::<compose::AdaKv>();
        all.add::<compose::Pyramid>();
        all.add::<compose::PerLayer>();
        all.add::<compose::Every>();
        all
    }

    /// Adds a policy; one of the same name is replaced.
    pub fn add<P: Policy + Configured + 'static>(&mut self) {
        let info = P::info();
        self.entries.retain(|e| e.info.name != info.name);
        let read: Read = Box::new(|args, registry| P::read(args, registry).map(|p| Arc::new(p) as Arc<dyn Policy>));
        self.entries.push(Entry { info, read });
    }

    /// What can be asked for, in order of addition.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The policy a string names.
    ///
    /// # Errors
    /// [`Error::Policy`] with every fault of the string, the policies it wraps included.
    pub fn parse(&self, text: &str) -> Result<Arc<dyn Policy>> {
        self.read(text.trim()).map_err(|reasons| Error::Policy { text: text.trim().to_string(), reasons })
    }

    /// The policies of a list separated by `;`, each with the text that named it.
    ///
    /// # Errors
    /// [`Error::Policy`] of the first that is wrong, or if there is none.
    pub fn parse_list(&self, list: &str) -> Result<Vec<(String, Arc<dyn Policy>)>> {
        Self::split_list(list)?.into_iter().map(|text| Ok((text.to_string(), self.parse(text)?))).collect()
    }

    /// The texts of a list separated by `;`, not yet parsed.
    ///
    /// # Errors
    /// [`Error::Policy`] if there is none.
    pub fn split_list(list: &str) -> Result<Vec<&str>> {
        let texts: Vec<&str> = split_outside(list, ';').into_iter().map(str::trim).filter(|t| !t.is_empty()).collect();
        if texts.is_empty() {
            return Err(Error::Policy { text: list.to_string(), reasons: vec!["the list names no policy".into()] });
        }
        Ok(texts)
    }

    /// Reads the policy that `args` wraps; faults are recorded in `args`.
    pub fn read_inner(&self, args: &mut Args, form: &str) -> Option<Arc<dyn Policy>> {
        let inner = args.take_inner(form)?;
        self.read_nested(args, inner)
    }

    /// Reads a policy named inside another's text; faults are recorded in `args`.
    pub fn read_nested(&self, args: &mut Args, text: &str) -> Option<Arc<dyn Policy>> {
        match self.read(text.trim()) {
            Ok(policy) => Some(policy),
            Err(faults) => {
                faults.into_iter().for_each(|fault| args.fault(format!("in `{}`: {fault}", text.trim())));
                None
            }
        }
    }

    fn read(&self, text: &str) -> std::result::Result<Arc<dyn Policy>, Vec<String>> {
        if depth(text) > DEEPEST {
            return Err(vec![format!("is nested deeper than {DEEPEST} policies")]);
        }
        let mut args = Args::split(text);
        let Some(entry) = self.entries.iter().find(|e| e.info.name == args.name()) else {
            return Err(vec![self.unknown(args.name())]);
        };
        let policy = (entry.read)(&mut args, self);
        args.finish(&entry.info.params);
        if let Some(policy) = &policy {
            args.faults.extend(policy.faults());
        }
        match policy {
            Some(policy) if args.faults.is_empty() => Ok(policy),
            _ => Err(args.faults),
        }
    }

    fn unknown(&self, name: &str) -> String {
        let names: Vec<_> = self.entries.iter().map(|e| e.info.name).collect();
        format!("unknown policy `{name}` (known: {})", names.join(", "))
    }
}

/// Wrappers around a policy.
const DEEPEST: usize = 16;

/// The most parentheses that are open at once.
fn depth(text: &str) -> usize {
    let depths = text.chars().scan(0usize, |depth, c| {
        *depth = match c {
            '(' => *depth + 1,
            ')' => depth.saturating_sub(1),
            _ => *depth,
        };
        Some(*depth)
    });
    depths.max().unwrap_or(0)
}

/// Splits at a separator that stands outside every pair of parentheses.
pub(crate) fn split_outside(text: &str, separator: char) -> Vec<&str> {
    let (mut parts, mut depth, mut from) = (vec![], 0i32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            c if c == separator && depth == 0 => {
                parts.push(&text[from..at]);
                from = at + c.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(&text[from..]);
    parts
}
