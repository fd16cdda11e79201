//! What the cache must know of a model.

use crate::params::Param;
use std::fmt;

/// The attention shape of a model, and what policies may want to know beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Number of attention layers.
    pub layers: usize,
    /// Query heads per layer, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Components of one head.
    pub head_dim: usize,
    /// How positions are rotated into queries and keys, the same in each layer; `None` if layers differ, or have no RoPE.
    pub rope: Option<Rope>,
    /// The decision gates the model was trained with (DMS); `None` for a plain model.
    pub gates: Option<GateSpec>,
    /// How large the components of its keys become; `None` for about the same.
    pub key_range: Option<KeyRange>,
}

impl ModelSpec {
    /// A model without RoPE and gates; set the fields to add them.
    pub fn new(layers: usize, q_heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self { layers, q_heads, kv_heads, head_dim, rope: None, gates: None, key_range: None }
    }

    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads.max(1)
    }

    /// Every reason these numbers cannot describe a model.
    pub fn faults(&self) -> Vec<String> {
        let mut why = vec![];
        for (name, n) in [
            ("layers", self.layers),
            ("q_heads", self.q_heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
        ] {
            if n == 0 {
                why.push(format!("{name}=0: a model has at least one"));
            }
        }
        if self.kv_heads > 0 && !self.q_heads.is_multiple_of(self.kv_heads) {
            why.push(format!("q_heads={} is no multiple of kv_heads={}", self.q_heads, self.kv_heads));
        }
        if let Some(rope) = &self.rope
            && rope.inv_freq.len() * 2 != self.head_dim
        {
            why.push(format!("rope has {} frequencies for head_dim={}", rope.inv_freq.len(), self.head_dim));
        }
        if let Some(range) = &self.key_range
            && range.exponents.len() != self.layers * self.kv_heads * self.head_dim
        {
            let [n, expected] = [range.exponents.len(), self.layers * self.kv_heads * self.head_dim];
            why.push(format!("key_range has {n} exponents for {expected} components of keys"));
        }
        why
    }
}

/// The powers of two about which the components of keys lie, as cached: after RoPE. A store of 8 bits divides keys by them and
/// multiplies queries, which changes no attention, so that components which are small in every key keep their bits beside
/// large ones (as SmoothQuant does for activations, arXiv 2211.10438). Other stores have no use for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    exponents: Vec<i8>, // [layers, kv_heads, head_dim]
}

impl KeyRange {
    /// From the largest absolute value of each component over some keys, `[layers, kv_heads, head_dim]`.
    pub fn of_largest(largest: &[f32]) -> Self {
        let exponent = |x: &f32| if x.is_normal() { x.abs().log2().floor().clamp(-16.0, 16.0) as i8 } else { 0 };
        Self { exponents: largest.iter().map(exponent).collect() }
    }

    /// What queries are multiplied by: powers of two, f32 `[layers, kv_heads, head_dim]`.
    pub fn factors(&self) -> Vec<f32> {
        self.exponents.iter().map(|&exponent| 2f32.powi(exponent as i32)).collect()
    }
}

/// How the two components of a RoPE pair are laid out in a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Pair i is (i, i + head_dim/2): safetensors of every architecture, GGUF of qwen.
    HalfSplit,
    /// Pair i is (2i, 2i + 1): GGUF of llama and smollm3.
    Interleaved,
}

/// Rotary position embedding over the whole head.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Angle per position of each pair, in radians; `head_dim / 2` of them, any frequency scaling applied.
    pub inv_freq: Vec<f32>,
    /// Where the components of a pair are.
    pub layout: RopeLayout,
}

impl Rope {
    /// The component indices of pair `i` in a head of `head_dim` components.
    pub fn pair(&self, i: usize, head_dim: usize) -> (usize, usize) {
        match self.layout {
            RopeLayout::HalfSplit => (i, i + head_dim / 2),
            RopeLayout::Interleaved => (2 * i, 2 * i + 1),
        }
    }
}

/// The token an eviction bit speaks about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lag {
    /// The bit made with token t judges token t (Shisa).
    Own,
    /// The bit made with token t judges token t-1 (NVIDIA).
    Previous,
}

/// What one decision holds for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PerGate {
    /// Each KV head decides for itself.
    Head,
    /// KV head 0 decides for the layer.
    Layer,
}

/// How a model's gates were trained; a policy that leaves a parameter open takes it from here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateSpec {
    /// A marked entry stays visible while `query - key <= window`.
    pub window: u32,
    /// Which token a bit judges.
    pub lag: Lag,
    /// What a decision holds for.
    pub per: PerGate,
    /// The checkpoint says that nothing is evicted.
    pub disable: bool,
}

macro_rules! keyword_param {
    ($type:ident: $($variant:ident = $word:literal),+) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),+ })
            }
        }
        impl Param for $type {
            const KIND: &'static str = concat!($($word, " ",)+);
            fn read(text: &str) -> Option<Self> {
                match text { $($word => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}
pub(crate) use keyword_param;

keyword_param!(Lag: Own = "own", Previous = "previous");
keyword_param!(PerGate: Head = "head", Layer = "layer");
