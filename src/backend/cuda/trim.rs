//! Dropping entries, and what the host uploads for it: which spans, and what they may keep.

use super::{Cuda, address, device_protect, driver, memory, output, tensor_address};
use crate::{
    error::{Error, Result},
    policy::{Budget, Protect},
    step::Span,
};
use candle_core::{DType, Tensor};
use cudarc::driver::CudaSlice;
use kvpolicy_kernels::{Address, ListedRows, ScatterParams, TrimParams, UNLIMITED};

/// Words on the device that are uploaded only when they change, so that steps that repeat need no upload and can be
/// recorded.
#[derive(Debug, Default)]
pub(super) struct Uploaded {
    words: Vec<u32>,
    data: Option<CudaSlice<u32>>,
}

impl Uploaded {
    pub(super) fn holds(&self, words: &[u32]) -> bool {
        self.data.is_some() && self.words == words
    }

    pub(super) fn len(&self) -> usize {
        self.words.len()
    }

    pub(super) fn address(&self) -> Address {
        self.data.as_ref().map_or(0, address)
    }
}

/// What the host asks of a layer at a trim.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// Indices of the spans.
    pub(super) list: Uploaded,
    /// What each may keep: `[listed, heads]`, then `[listed]` pairs of total and floor.
    budgets: Uploaded,
}

impl Cuda {
    /// Indices of some of the current step's spans.
    pub(super) fn list_of(&self, spans: &[Span]) -> Result<Vec<u32>> {
        let index = |span: &Span| self.current.spans.iter().position(|other| other == span).map(|i| i as u32);
        let list: Option<Vec<u32>> = spans.iter().map(index).collect();
        list.ok_or_else(|| Error::Config("a trim names a span that is not in the step begun last".into()))
    }

    pub(super) fn upload(
        &mut self,
        layer: usize,
        which: fn(&mut Asked) -> &mut Uploaded,
        words: Vec<u32>,
    ) -> Result<Address> {
        let uploaded = which(&mut self.layers[layer].asked);
        if uploaded.holds(&words) {
            return Ok(uploaded.address());
        }
        if self.capturing {
            return Err(Error::Config("what a trim asks for changed: run a step before the capture".into()));
        }
        if uploaded.data.is_none() {
            // Room for every sequence at once: a recorded step keeps the address.
            let most = self.memory.store.seats as usize * (self.spec.kv_heads + 2);
            uploaded.data = Some(memory::scratch(&self.stream, most)?);
        }
        let to = uploaded.address();
        self.staging.upload(&words, to)?;
        uploaded.words = words;
        Ok(to)
    }

    /// What every layer was asked last.
    pub(super) fn asked(&self) -> Vec<[Vec<u32>; 2]> {
        let words = |layer: &super::Layer| [&layer.asked.list, &layer.asked.budgets].map(|up| up.words.clone());
        self.layers.iter().map(words).collect()
    }

    /// Asks the same again, where something else was asked since.
    pub(super) fn ask_again(&mut self, asked: &[[Vec<u32>; 2]]) -> Result<()> {
        for (layer, [list, budgets]) in asked.iter().enumerate() {
            if !list.is_empty() && !self.layers[layer].asked.list.holds(list) {
                self.upload(layer, |asked| &mut asked.list, list.clone())?;
            }
            if !budgets.is_empty() && !self.layers[layer].asked.budgets.holds(budgets) {
                self.upload(layer, |asked| &mut asked.budgets, budgets.clone())?;
            }
        }
        Ok(())
    }

    /// Drops what is dead, and with budgets what they leave no room for. `scores`: f32 `[rows, max_len]`, oldest first.
    pub(super) fn settle(
        &mut self,
        layer: usize,
        spans: &[Span],
        scores: Option<&Tensor>,
        budgets: &[Budget],
        protect: Protect,
    ) -> Result<()> {
        let list = self.list_of(spans)?;
        if list.is_empty() {
            return Ok(());
        }
        let listed = list.len() as u32;
        let list = self.upload(layer, |asked| &mut asked.list, list)?;
        if budgets.is_empty() && self.layers[layer].plan.reuse_age == 0 {
            return Ok(()); // nothing was ever marked: nothing is dead
        }
        let max_len = self.bound(layer, spans).max(1);
        let scores = scores.map(|scores| self.by_slot(layer, spans, scores, max_len)).transpose()?;
        let (mut keep, mut pooled, mut cuts) = (0, 0, None);
        if !budgets.is_empty() {
            let heads = self.spec.kv_heads;
            keep = self.upload(layer, |asked| &mut asked.budgets, budget_words(budgets, heads))?;
            pooled = keep + 4 * (budgets.len() * heads) as u64;
            if budgets.iter().any(|budget| matches!(budget, Budget::Pooled { .. })) {
                cuts = Some(output(&[budgets.len() * heads * 2], DType::U32, &self.device)?); // u64 each
            }
        }
        let params = TrimParams {
            store: self.memory.store,
            ring: self.ring(layer),
            protect: device_protect(protect),
            spans: self.control().spans(),
            list,
            keep,
            pooled,
            cuts: cuts.as_ref().map_or(Ok(0), tensor_address)?,
            scores: scores.as_ref().map_or(Ok(0), tensor_address)?,
            layer: layer as u32,
            max_len: max_len as u32,
            vector_bytes: TrimParams::vector_bytes(self.element(), self.spec.head_dim as u32),
        };
        // SAFETY: the step's spans, the list and the budgets are on the device; no row is longer than its bound.
        unsafe { self.kernels.settle(&self.stream, listed, &params) }.map_err(driver("dropping entries"))
    }

    /// The policy's scores in slot order, f32 `[rows, max_len]`.
    fn by_slot(&self, layer: usize, spans: &[Span], scores: &Tensor, max_len: usize) -> Result<Tensor> {
        let rows = spans.len() * self.spec.kv_heads;
        let expected = vec![rows, max_len];
        if scores.dims() != expected {
            return Err(Error::Shape { what: "the policy's scores", expected, got: scores.dims().to_vec() });
        }
        let dense = scores.to_dtype(DType::F32)?.contiguous()?;
        let order = self.order(&self.listed_rows(layer, spans, 0)?)?;
        let out = output(&[rows, max_len], DType::F32, &self.device)?;
        let params = ScatterParams {
            order: tensor_address(&order)?,
            dense: tensor_address(&dense)?,
            out: tensor_address(&out)?,
            max_len: max_len as u32,
        };
        // SAFETY: all three are `[rows, max_len]`.
        unsafe { self.kernels.scatter(&self.stream, rows as u32, &params) }.map_err(driver("sorting scores"))?;
        Ok(out)
    }

    /// The rows of a list that is on the device already.
    pub(super) fn listed_rows(&self, layer: usize, spans: &[Span], order: Address) -> Result<ListedRows> {
        let list = &self.layers[layer].asked.list;
        if !list.holds(&self.list_of(spans)?) {
            return Err(Error::Config("rows are shown to a policy only between expiry and trim".into()));
        }
        Ok(ListedRows {
            store: self.memory.store,
            spans: self.control().spans(),
            list: list.address(),
            order,
            layer: layer as u32,
            max_len: self.bound(layer, spans).max(1) as u32,
        })
    }
}

fn budget_words(budgets: &[Budget], heads: usize) -> Vec<u32> {
    let entries = |n: usize| u32::try_from(n).unwrap_or(UNLIMITED);
    let keep = budgets.iter().flat_map(|budget| -> Vec<u32> {
        match budget {
            Budget::Unlimited | Budget::Pooled { .. } => vec![UNLIMITED; heads],
            Budget::PerHead(keep) => vec![*keep as u32; heads],
            Budget::Heads(keep) => keep.iter().map(|&n| entries(n)).collect(),
        }
    });
    let pooled = budgets.iter().flat_map(|budget| match budget {
        Budget::Pooled { total, floor } => [entries(*total), entries(*floor)],
        _ => [UNLIMITED, 0],
    });
    keep.chain(pooled).collect()
}
