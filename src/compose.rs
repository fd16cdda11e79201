//! Wrappers: each changes one axis of a policy and forwards the rest.

use crate::{Budget, LayerCx, ModelSpec, Policy};

mod adakv;
mod every;
mod per_layer;
mod pyramid;

pub use adakv::AdaKv;
pub use every::Every;
pub use per_layer::PerLayer;
pub use pyramid::Pyramid;

/// The misfits of a wrapper of budgets: those of the inner policy, and that it has no budget in any layer, so that the
/// wrapper would do nothing. The pair names the wrapper and what the budget is for.
fn budget_misfits((wrapper, what): (&str, &str), inner: &dyn Policy, spec: &ModelSpec) -> Vec<String> {
    const SEEN: usize = 1000;
    let budget = |layer| inner.budget(&LayerCx { layer, spec }, SEEN);
    let mut why = inner.misfits(spec);
    if (0..spec.layers).all(|layer| budget(layer) == Budget::Unlimited) {
        why.push(format!("{wrapper}: `{inner}` has no budget {what}"));
    }
    why
}

/// Forwards the named methods of [`Policy`](crate::Policy) to a wrapped policy.
macro_rules! forward {
    ($inner:ident: $($method:ident),+) => { $($crate::compose::forward!(@ $inner $method);)+ };
    (@ $inner:ident faults) => {
        fn faults(&self) -> Vec<String> { self.$inner.faults() }
    };
    (@ $inner:ident misfits) => {
        fn misfits(&self, spec: &$crate::ModelSpec) -> Vec<String> { self.$inner.misfits(spec) }
    };
    (@ $inner:ident needs) => {
        fn needs(&self, cx: &$crate::LayerCx) -> $crate::Needs { self.$inner.needs(cx) }
    };
    (@ $inner:ident protect) => {
        fn protect(&self, cx: &$crate::LayerCx) -> $crate::Protect { self.$inner.protect(cx) }
    };
    (@ $inner:ident on_write) => {
        fn on_write(&self, cx: &$crate::LayerCx, new: &$crate::NewTokens) -> $crate::Result<$crate::Verdict> {
            self.$inner.on_write(cx, new)
        }
    };
    (@ $inner:ident budget) => {
        fn budget(&self, cx: &$crate::LayerCx, seen: usize) -> $crate::Budget { self.$inner.budget(cx, seen) }
    };
    (@ $inner:ident when) => {
        fn when(&self, cx: &$crate::LayerCx) -> $crate::When { self.$inner.when(cx) }
    };
    (@ $inner:ident score) => {
        fn score(&self, cx: &$crate::LayerCx, held: &dyn $crate::Held) -> $crate::Result<$crate::Score> {
            self.$inner.score(cx, held)
        }
    };
    (@ $inner:ident same_for_all_heads) => {
        fn same_for_all_heads(&self) -> bool { self.$inner.same_for_all_heads() }
    };
}
pub(crate) use forward;
