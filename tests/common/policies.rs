//! Every policy of the registry, and policies of our own.

use candle_core::{DType, Device, Tensor};
use kvpolicy::{Budget, Evict, Held, Lag, LayerCx, Needs, NewTokens, Policy, Protect, Result, Score, Verdict, When};
use std::fmt;

/// At least one string for every registered policy and wrapper, small enough to evict within some tens of tokens from a
/// model of three layers.
pub(crate) const EVERY_POLICY: &[&str] = &[
    "full",
    "window:size=9",
    "window:size=7,sinks=3",
    "dms",
    "dms:window=3,lag=own,per=layer,bias=0.5",
    "dms:disable=true",
    "h2o:budget=12,recent=4",
    "h2o:budget=40%,recent=2,normalise=true",
    "tova:budget=11",
    "tova:budget=50%,recent=3",
    "snapkv:budget=13,window=4,kernel=3",
    "snapkv:budget=13,window=4,kernel=5,pool=max",
    "knorm:budget=10",
    "keydiff:budget=10,recent=2",
    "expected-attention:budget=12,sinks=2,future=16",
    "expected-attention:budget=40%,sinks=0,future=4,covariance=false,vnorm=false",
    "rkv:budget=12,buffer=5,window=3,kernel=3",
    "rkv:budget=12,buffer=2,window=2,kernel=1,lambda=0.5,similar=0",
    "random:budget=9,recent=2,seed=5",
    "random-gate:rate=0.6,window=6",
    "adakv:floor=0.3(snapkv:budget=13,window=4,kernel=3)",
    "adakv(h2o:budget=12,recent=4)",
    "adakv:floor=0(knorm:budget=30%)",
    "adakv(rkv:budget=12,buffer=3,window=3,kernel=3)",
    "pyramid:beta=4(keydiff:budget=12)",
    "every(3, knorm:budget=10)",
    "every(4, tova:budget=11)",
    "per-layer(0=full; 1=window:size=6,sinks=1; rest=h2o:budget=12,recent=4)",
    "per-layer(0-1=adakv(every(2, keydiff:budget=9)); rest=dms:window=3)",
    "adakv(pyramid:beta=3(every(5, snapkv:budget=13,window=4,kernel=3)))",
];

/// Takes the first component of an entry's key as its score, so that an oracle knows the ranks to the last bit.
#[derive(Debug)]
pub(crate) struct FirstComponent {
    pub(crate) budget: Budget,
    pub(crate) protect: Protect,
    pub(crate) when: When,
}

impl fmt::Display for FirstComponent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("first-component")
    }
}

impl Policy for FirstComponent {
    fn protect(&self, _: &LayerCx) -> Protect {
        self.protect
    }
    fn on_write(&self, _: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        Ok(Verdict { evict: Evict::Never, score: Some(new.k.narrow(2, 0, 1)?.squeeze(2)?) })
    }
    fn budget(&self, _: &LayerCx, _: usize) -> Budget {
        self.budget.clone()
    }
    fn when(&self, _: &LayerCx) -> When {
        self.when
    }
}

/// Marks as DMS does and ranks what is left by attention mass.
#[derive(Debug)]
pub(crate) struct MarkAndRank {
    pub(crate) recent: u32,
    pub(crate) budget: Budget,
}

impl fmt::Display for MarkAndRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("mark-and-rank")
    }
}

impl Policy for MarkAndRank {
    fn needs(&self, _: &LayerCx) -> Needs {
        Needs { attn_mass: Some(1.0), ..Needs::default() }
    }
    fn protect(&self, _: &LayerCx) -> Protect {
        Protect { sinks: 1, recent: self.recent }
    }
    fn on_write(&self, _: &LayerCx, new: &NewTokens) -> Result<Verdict> {
        let logits = new.evict_logits.as_ref().expect("the driver passes logits to every policy");
        Ok(Verdict { evict: Evict::Bits { bits: logits.gt(0.0)?, lag: Lag::Own }, score: None })
    }
    fn budget(&self, _: &LayerCx, _: usize) -> Budget {
        self.budget.clone()
    }
    fn when(&self, _: &LayerCx) -> When {
        When::ALWAYS
    }
}

/// Answers with whatever shapes it was told to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Misshapen {
    pub(crate) bits: Option<Vec<usize>>,
    pub(crate) first_score: Option<Vec<usize>>,
    pub(crate) score: Option<Vec<usize>>,
    pub(crate) heads: Vec<usize>,
}

impl fmt::Display for Misshapen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("misshapen")
    }
}

impl Policy for Misshapen {
    fn on_write(&self, _: &LayerCx, _: &NewTokens) -> Result<Verdict> {
        let zeros = |shape: &Vec<usize>, dtype| Tensor::zeros(shape.as_slice(), dtype, &Device::Cpu);
        let bits = self.bits.as_ref().map(|shape| zeros(shape, DType::U8)).transpose()?;
        let score = self.first_score.as_ref().map(|shape| zeros(shape, DType::F32)).transpose()?;
        Ok(Verdict { evict: bits.map_or(Evict::Never, |bits| Evict::Bits { bits, lag: Lag::Own }), score })
    }
    fn budget(&self, _: &LayerCx, _: usize) -> Budget {
        Budget::Heads(self.heads.clone())
    }
    fn when(&self, _: &LayerCx) -> When {
        When::ALWAYS
    }
    fn score(&self, _: &LayerCx, _: &dyn Held) -> Result<Score> {
        let Some(shape) = &self.score else { return Ok(Score::Carried) };
        Ok(Score::Dense(Tensor::zeros(shape.as_slice(), DType::F32, &Device::Cpu)?))
    }
}
