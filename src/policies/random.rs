use crate::{error::Result, params::Amount, policy::*, spec::Lag};
use candle_core::{DType, Tensor};

crate::policy_params! {
    /// Keeps a random choice: what a policy must beat. The same seed keeps the same positions.
    pub struct Random = "random", paper "baseline" {
        /// Entries each KV head keeps.
        budget: Amount, in ..;
        /// Newest entries that are never dropped.
        recent: u32 = 0, in 0..=1 << 30;
        /// Chooses the choice.
        seed: u64 = 0, in ..;
    }
}

impl Policy for Random {
    fn faults(&self) -> Vec<String> {
        self.budget.too_small_for("recent", self.recent as usize).into_iter().collect()
    }

    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.recent, ..Protect::default() }
    }

    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        let score = uniform(self.seed, cx, &new.positions)?.to_dtype(DType::F32)?;
        Ok(Verdict { evict: Evict::Never, score: Some(score) })
    }

    fn budget(&self, _: &LayerCx, seen: usize) -> Budget {
        Budget::PerHead(self.budget.of(seen))
    }

    fn when(&self, _: &LayerCx) -> When {
        When::ALWAYS
    }
}

crate::policy_params! {
    /// Random decisions with delayed eviction: the load of a learned gate without a model that has one, for
    /// benchmarks. A share `rate` of the tokens dies `window` tokens after it was written, per KV head.
    pub struct RandomGate = "random-gate", paper "synthetic" {
        /// Share of the tokens that are marked.
        rate: f64, in 0.0..=1.0;
        /// A marked entry stays visible while `query - key <= window`.
        window: u32 = 256, in 0..=1 << 30;
        /// Chooses the decisions.
        seed: u64 = 0, in ..;
    }
}

impl Policy for RandomGate {
    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { recent: self.window + 1, ..Protect::default() }
    }

    fn on_write(&self, cx: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        let bits = uniform(self.seed, cx, &new.positions)?.lt(self.rate)?;
        Ok(Verdict { evict: Evict::Bits { bits, lag: Lag::Own }, score: None })
    }
}

/// Numbers in [0, 1), f64 `[tokens, kv_heads]`, from the seed, the layer, the head and the position alone, by plain
/// arithmetic on the device: the fraction of `a p^2 + b p + c` with random a, b, c. So chunking and batch mates do not
/// matter, and a captured graph draws new numbers as its positions advance.
fn uniform(seed: u64, cx: &LayerCx, positions: &Tensor) -> Result<Tensor> {
    let heads = cx.spec.kv_heads;
    // Mixed, so that a layer's stream is not its neighbour's, shifted.
    let mut state = splitmix(&mut (seed ^ splitmix(&mut (cx.layer as u64))));
    let mut coefficients = || -> Result<Tensor> {
        let drawn: Vec<f64> = (0..heads).map(|_| (splitmix(&mut state) >> 11) as f64 / (1u64 << 53) as f64).collect();
        Ok(Tensor::from_vec(drawn, (1, heads), positions.device())?)
    };
    let (a, b, c) = (coefficients()?, coefficients()?, coefficients()?);
    let p = positions.to_dtype(DType::F64)?.unsqueeze(1)?; // [tokens, 1]
    let x = p.broadcast_mul(&a)?.broadcast_add(&b)?.broadcast_mul(&p)?.broadcast_add(&c)?;
    Ok((&x - x.floor()?)?)
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
