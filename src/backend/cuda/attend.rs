//! Attention over the rows: which kernel takes which spans, and how decode is cut.

use super::{Cuda, Strided, address, device_protect, driver, output, scratch, tensor_address, zeros};
use crate::{
    backend::{Attention, Tap},
    error::Result,
    policy::Protect,
    spec::ModelSpec,
    step::Span,
};
use candle_core::{DType, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, sys};
use kvpolicy_kernels::{
    BlockWork, DecodeParams, DecodeShape, Dtype, FAST_HEAD_DIMS, MASS_TILE, MassParams, PlainParams, PrefillParams,
    PrefillShape, RowWork, ScheduleParams,
};
use std::sync::Arc;

/// What decode attention needs beside the store.
#[derive(Debug)]
pub(super) struct DecodeScratch {
    shape: DecodeShape,
    blocks: u32,
    max_rows: usize,
    rows: CudaSlice<RowWork>,   // [layers, max_rows]
    work: CudaSlice<BlockWork>, // [layers, blocks]
    parts: CudaSlice<f32>,
    arrived: CudaSlice<u32>,
}

impl DecodeScratch {
    pub(super) fn new(stream: &Arc<CudaStream>, spec: &ModelSpec, dtype: Dtype, seats: usize) -> Result<Self> {
        use sys::CUdevice_attribute as Attribute;
        let attribute = |which| stream.context().attribute(which).map_err(driver("asking the device"));
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        let all_shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)? as u32;
        let shape = DecodeShape::new(dtype, spec.group() as u32, spec.head_dim as u32, shared, all_shared);
        let blocks = multiprocessors * shape.blocks_per_multiprocessor();
        let max_rows = seats * spec.kv_heads;
        Ok(Self {
            shape,
            blocks,
            max_rows,
            rows: scratch(stream, spec.layers * max_rows)?,
            work: scratch(stream, spec.layers * blocks as usize)?,
            parts: scratch(stream, shape.scratch(blocks))?,
            arrived: zeros(stream, spec.group().div_ceil(16) * max_rows)?,
        })
    }
}

impl Cuda {
    /// Whether tensor cores take this model.
    pub(super) fn fast(&self) -> bool {
        self.dtype != DType::F32 && FAST_HEAD_DIMS.contains(&(self.spec.head_dim as u32))
    }

    pub(super) fn schedule(&self, first_layer: usize, layers: usize) -> Result<()> {
        if self.current.singles == 0 || !self.fast() {
            return Ok(());
        }
        let params = ScheduleParams {
            store: self.memory.store,
            spans: self.control().spans(),
            singles: self.control().singles(),
            rows: address(&self.decode.rows),
            blocks: address(&self.decode.work),
            single_count: self.current.singles as u32,
            max_rows: self.decode.max_rows as u32,
            block_count: self.decode.blocks,
            first_layer: first_layer as u32,
            tile_shift: self.decode.shape.tile_shift(),
            least_tiles: self.decode.shape.least_tiles(),
        };
        // SAFETY: as in `plan`.
        unsafe { self.kernels.schedule(&self.stream, &params, layers as u32) }.map_err(driver("scheduling attention"))
    }

    fn attend_decode(&self, layer: usize, q: &Strided, y: &Tensor, lse: u64, protect: Protect) -> Result<()> {
        let (scratch, spec) = (&self.decode, &self.spec);
        let params = DecodeParams {
            store: self.memory.store,
            q: q.address,
            y: tensor_address(y)?,
            lse,
            rows: address(&scratch.rows) + (layer * scratch.max_rows * size_of::<RowWork>()) as u64,
            blocks: address(&scratch.work) + (layer * scratch.blocks as usize * size_of::<BlockWork>()) as u64,
            parts: address(&scratch.parts),
            arrived: address(&scratch.arrived),
            positions: self.control().positions(),
            q_heads: spec.q_heads as u32,
            q_stride: q.stride,
            group: spec.group() as u32,
            row_count: (self.current.singles * spec.kv_heads) as u32,
            scale: std::f32::consts::LOG2_E / (spec.head_dim as f32).sqrt(),
            protect: device_protect(protect),
            check_marks: self.layers[layer].check_marks as u32,
        };
        // SAFETY: the schedule covers this layer and step; scratch has the sizes it asks for; `y` is as large as `q`.
        unsafe { self.kernels.decode(&self.stream, self.element(), scratch.shape, scratch.blocks, &params) }
            .map_err(driver("decode attention"))
    }

    fn attend_plain(&self, layer: usize, q: &Strided, y: &Tensor, lse: u64, protect: Protect) -> Result<()> {
        let spec = &self.spec;
        let params = PlainParams {
            store: self.memory.store,
            q: q.address,
            y: tensor_address(y)?,
            lse,
            spans: self.control().spans(),
            span_of: self.control().span_of(),
            positions: self.control().positions(),
            layer: layer as u32,
            q_heads: spec.q_heads as u32,
            q_stride: q.stride,
            group: spec.group() as u32,
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
            protect: device_protect(protect),
        };
        // SAFETY: the step's spans and positions are on the device; `y` is as large as `q`.
        unsafe { self.kernels.plain(&self.stream, self.element(), self.current.tokens as u32, &params) }
            .map_err(driver("plain attention"))
    }

    /// The shape of prefill attention, where tensor cores take this model.
    pub(super) fn prefill_shape(&self) -> Option<PrefillShape> {
        PrefillShape::of(self.spec.head_dim as u32).filter(|_| self.fast())
    }

    fn attend_prefill(&self, layer: usize, q: &Strided, y: &Tensor, lse: u64, protect: Protect) -> Result<()> {
        let (spec, current) = (&self.spec, &self.current);
        let Some(shape) = self.prefill_shape() else { return Ok(()) };
        let (spans, longest) = (current.spans.len() as u32, self.bound(layer, &current.spans).max(1) as u32);
        let scratch = shape.scratch(spans, spec.kv_heads as u32, longest).div_ceil(4);
        let sights = output(&[scratch], DType::U32, &self.device)?;
        let params = PrefillParams {
            store: self.memory.store,
            q: q.address,
            y: tensor_address(y)?,
            lse,
            spans: self.control().spans(),
            tiles: self.control().tiles(),
            sights: tensor_address(&sights)?,
            layer: layer as u32,
            q_heads: spec.q_heads as u32,
            q_stride: q.stride,
            tile_count: current.tiles as u32,
            span_count: spans,
            max_tiles: shape.max_tiles(longest),
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
            protect: device_protect(protect),
        };
        // SAFETY: the step's spans and tiles are on the device; no row is longer than its bound; `y` is as large as `q`.
        unsafe { self.kernels.prefill(&self.stream, self.element(), &params) }.map_err(driver("prefill attention"))
    }

    fn mass_params(
        &self,
        layer: usize,
        spans: &[Span],
        q: &Strided,
        lse: u64,
        protect: Protect,
        decay: f32,
    ) -> MassParams {
        let longest = self.bound(layer, spans).max(1) as u32;
        MassParams {
            store: self.memory.store,
            q: q.address,
            lse,
            spans: self.control().spans(),
            layer: layer as u32,
            q_heads: self.spec.q_heads as u32,
            q_stride: q.stride,
            span_count: spans.len() as u32,
            max_tiles: longest.div_ceil(MASS_TILE),
            scale: 1.0 / (self.spec.head_dim as f32).sqrt(),
            decay,
            protect: device_protect(protect),
        }
    }
}

impl Attention for Cuda {
    fn attend(&mut self, layer: usize, spans: &[Span], q: &Tensor, protect: Protect, tap: Tap) -> Result<Tensor> {
        self.check_current(spans)?;
        let y = output(q.dims(), self.beside(), &self.device)?;
        if spans.is_empty() {
            return Ok(y.to_dtype(q.dtype())?);
        }
        let heads = self.multiplied(layer, self.heads(q)?)?;
        let lse = match tap {
            Tap::None => 0,
            Tap::Mass { .. } => self.control().lse()?,
        };
        let (singles, longer) = (self.current.singles > 0, self.current.singles < spans.len());
        if self.fast() && Self::even(&heads) {
            if singles {
                self.attend_decode(layer, &heads, &y, lse, protect)?;
            }
            if longer {
                self.attend_prefill(layer, &heads, &y, lse, protect)?;
            }
        } else {
            self.attend_plain(layer, &heads, &y, lse, protect)?;
        }
        if let Tap::Mass { decay, layer: whole } = tap {
            let params = self.mass_params(layer, spans, &heads, lse, protect, decay);
            // SAFETY: attention has written `lse`; no row is longer than its bound.
            unsafe { self.kernels.mass(&self.stream, self.element(), &params) }.map_err(driver("attention mass"))?;
            if whole {
                // SAFETY: as above; the policy holds the same positions in each head.
                unsafe { self.kernels.layer_mass(&self.stream, &params) }.map_err(driver("mass of a layer"))?;
            }
        }
        Ok(y.to_dtype(q.dtype())?)
    }
}
