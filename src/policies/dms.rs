use crate::{
    error::{Error, Result},
    ops,
    params::{Auto, AutoOr, FilePath},
    policy::*,
    spec::{GateSpec, Lag, ModelSpec, PerGate},
};

crate::policy_params! {
    /// Dynamic Memory Sparsification: a trained bit per token and KV head, obeyed once the token leaves the window
    /// (delayed eviction). The decision logits come from the model: an adapter or a borrowed query neuron.
    /// Parameters left at `auto` are those the gates were trained with.
    pub struct Dms = "dms", paper "arXiv 2506.05345" {
        /// A file of gates, or the name of gates that the host brings; `auto` takes those of the checkpoint.
        weights: Auto<FilePath> = Auto(None), in ..;
        /// A marked entry stays visible while `query - key <= window`.
        window: Auto<u32> = Auto(None), in AutoOr(0..=1 << 30);
        /// Which token a bit judges: `previous` (NVIDIA) or `own` (Shisa).
        lag: Auto<Lag> = Auto(None), in ..;
        /// Whether each KV head decides or KV head 0 for its layer.
        per: Auto<PerGate> = Auto(None), in ..;
        /// Added to the decision logit: below 0 evicts less, above 0 more.
        bias: f64 = 0.0, in -1e6..=1e6;
        /// Evict nothing.
        disable: bool = false, in ..;
    }
}

impl Dms {
    /// The parameters with those of the checkpoint filled in. A cache refuses `dms` without gates, so the values
    /// for no gates at all are never used.
    fn gates(&self, spec: &ModelSpec) -> GateSpec {
        let trained = spec.gates.unwrap_or(GateSpec { window: 0, lag: Lag::Own, per: PerGate::Head, disable: true });
        GateSpec {
            window: self.window.0.unwrap_or(trained.window),
            lag: self.lag.0.unwrap_or(trained.lag),
            per: self.per.0.unwrap_or(trained.per),
            disable: self.disable || trained.disable,
        }
    }
}

impl Policy for Dms {
    fn needs(&self, _: &LayerCx) -> Needs {
        let source = self.weights.0.as_ref().map_or(GateSource::Checkpoint, |path| GateSource::File(path.0.clone()));
        Needs { gates: Some(source), ..Needs::default() }
    }

    fn protect(&self, cx: &LayerCx) -> Protect {
        Protect { recent: self.gates(cx.spec).window.saturating_add(1), ..Protect::default() }
    }

    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        let gates = self.gates(cx.spec);
        if gates.disable {
            return Ok(Verdict::KEEP);
        }
        let logits = new.evict_logits.as_ref().ok_or_else(|| {
            Error::Config("dms: the model gave no decision logits; it must compute them from its gates".into())
        })?;
        let bits = ops::threshold(logits, -self.bias, gates.per)?;
        Ok(Verdict { evict: Evict::Bits { bits, lag: gates.lag }, score: None })
    }
}
