use crate::{
    ModelSpec, Registry,
    error::Result,
    params::{Args, Configured, Info},
    policy::*,
    registry::split_outside,
};
use std::{fmt, ops::RangeInclusive, sync::Arc};

/// A policy of its own for ranges of layers.
///
/// Written `per-layer(0-3=full; 7=window:size=64; rest=h2o:budget=512)`: layer ranges from 0, both ends included,
/// then one policy for the rest.
#[derive(Debug, Clone)]
pub struct PerLayer {
    /// Policies of layer ranges; the first that contains a layer holds.
    pub ranges: Vec<(RangeInclusive<usize>, Arc<dyn Policy>)>,
    /// The policy of every other layer.
    pub rest: Arc<dyn Policy>,
}

impl PerLayer {
    fn at(&self, cx: &LayerCx) -> &dyn Policy {
        let own = self.ranges.iter().find(|(layers, _)| layers.contains(&cx.layer));
        own.map_or(&*self.rest, |(_, policy)| &**policy)
    }

    fn each(&self) -> impl Iterator<Item = &Arc<dyn Policy>> {
        self.ranges.iter().map(|(_, policy)| policy).chain([&self.rest])
    }
}

impl Policy for PerLayer {
    fn faults(&self) -> Vec<String> {
        self.each().flat_map(|policy| policy.faults()).collect()
    }

    fn misfits(&self, spec: &ModelSpec) -> Vec<String> {
        let beyond = self.ranges.iter().filter(|(layers, _)| *layers.end() >= spec.layers);
        let beyond = beyond.map(|(layers, _)| {
            format!(
                "per-layer: layers {} are beyond the model's last layer {}",
                range(layers),
                spec.layers.saturating_sub(1)
            )
        });
        beyond.chain(self.each().flat_map(|policy| policy.misfits(spec))).collect()
    }

    fn needs(&self, cx: &LayerCx) -> Needs {
        self.at(cx).needs(cx)
    }

    fn protect(&self, cx: &LayerCx) -> Protect {
        self.at(cx).protect(cx)
    }

    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        self.at(cx).on_write(cx, new)
    }

    fn budget(&self, cx: &LayerCx, seen: usize) -> Budget {
        self.at(cx).budget(cx, seen)
    }

    fn when(&self, cx: &LayerCx) -> When {
        self.at(cx).when(cx)
    }

    fn score(&self, cx: &LayerCx, held: &dyn Held) -> Result<Score> {
        self.at(cx).score(cx, held)
    }

    fn same_for_all_heads(&self) -> bool {
        self.each().any(|policy| policy.same_for_all_heads())
    }
}

fn range(layers: &RangeInclusive<usize>) -> String {
    if layers.start() == layers.end() {
        layers.start().to_string()
    } else {
        format!("{}-{}", layers.start(), layers.end())
    }
}

impl fmt::Display for PerLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("per-layer(")?;
        for (layers, policy) in &self.ranges {
            write!(f, "{}={policy}; ", range(layers))?;
        }
        write!(f, "rest={})", self.rest)
    }
}

impl Configured for PerLayer {
    fn info() -> Info {
        Info {
            name: "per-layer",
            paper: "composition",
            doc: " A policy of its own for ranges of layers: `per-layer(0-3=full; rest=h2o:budget=512)`.",
            params: vec![],
        }
    }

    fn read(args: &mut Args, registry: &Registry) -> Option<Self> {
        let inner = args.take_inner("per-layer(0-3=policy; rest=policy)")?;
        let (mut ranges, mut rest) = (vec![], None);
        for part in split_outside(inner, ';').into_iter().map(str::trim).filter(|p| !p.is_empty()) {
            let Some((layers, text)) = part.split_once('=') else {
                args.fault(format!("`{part}` is not of the form layers=policy"));
                continue;
            };
            let policy = registry.read_nested(args, text);
            match (layers.trim(), read_range(layers.trim())) {
                ("rest", _) if rest.is_some() => args.fault("rest is given twice"),
                ("rest", _) => rest = Some(policy),
                (_, Some(layers)) => ranges.push((layers, policy)),
                (layers, None) => args.fault(format!("layers `{layers}` are not accepted: 5, 0-3 or rest")),
            }
        }
        if rest.is_none() {
            args.fault("rest=policy is missing: it holds for every layer not named");
        }
        let ranges = ranges.into_iter().map(|(layers, policy)| Some((layers, policy?))).collect::<Option<_>>()?;
        Some(Self { ranges, rest: rest?? })
    }
}

fn read_range(text: &str) -> Option<RangeInclusive<usize>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first <= last).then_some(first..=last)
}
