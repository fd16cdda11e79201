use crate::{
    ModelSpec, Registry,
    compose::{budget_misfits, forward},
    params::{Args, Configured, Info},
    policy::*,
    registry::split_outside,
};
use std::{fmt, num::NonZeroU32, sync::Arc};

/// Trims the inner policy every n decode steps, whatever its own cadence in decode; prefill stays as it is.
///
/// Written `every(n, policy)`.
#[derive(Debug, Clone)]
pub struct Every {
    /// Decode steps between trims.
    pub n: NonZeroU32,
    /// The wrapped policy.
    pub inner: Arc<dyn Policy>,
}

impl Policy for Every {
    forward!(inner: faults, needs, protect, on_write, budget, score, same_for_all_heads);

    fn misfits(&self, spec: &ModelSpec) -> Vec<String> {
        budget_misfits(("every", "to trim to"), &*self.inner, spec)
    }

    fn when(&self, cx: &LayerCx) -> When {
        When { every: Some(self.n), ..self.inner.when(cx) }
    }
}

impl fmt::Display for Every {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "every({}, {})", self.n, self.inner)
    }
}

impl Configured for Every {
    fn info() -> Info {
        Info {
            name: "every",
            paper: "cadence of trims",
            doc: " Trims the inner policy every n decode steps: `every(64, snapkv:budget=512)`.",
            params: vec![],
        }
    }

    fn read(args: &mut Args, registry: &Registry) -> Option<Self> {
        let inner = args.take_inner("every(n, policy)")?;
        let (n, policy) = match split_outside(inner, ',').first() {
            Some(first) if first.len() < inner.len() => (*first, &inner[first.len() + 1..]),
            _ => {
                args.fault("takes a number and a policy: write every(n, policy)");
                return None;
            }
        };
        let steps = n.trim().parse().ok();
        if steps.is_none() {
            args.fault(format!("n={} is not accepted: whole number, 1 or more", n.trim()));
        }
        let inner = registry.read_nested(args, policy)?;
        Some(Self { n: steps?, inner })
    }
}
