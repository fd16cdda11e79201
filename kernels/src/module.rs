//! Loading the compiled kernels.

use cudarc::{
    driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg},
    nvrtc::Ptx,
};
use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    sync::{Arc, Mutex, PoisonError},
};

/// Element type of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    /// Of a store: E4M3 with a factor for each vector. Queries, new keys and values, and outputs are bf16 then.
    Fp8,
    /// Of a store: whole numbers with a factor for each vector; the rest as with `Fp8`.
    Int8,
}

impl Dtype {
    /// As kernels are named.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of an entry's key and value of `head_dim` components, the exponents of their factors included.
    pub fn entry_bytes(self, head_dim: usize) -> usize {
        let factors = if self.bytes() == 1 { 2 } else { 0 };
        2 * head_dim * self.bytes() as usize + factors
    }

    /// Bytes of an element.
    pub fn bytes(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Fp8 | Self::Int8 => 1,
        }
    }
}

/// The kernels of one context. Each is looked up once.
#[derive(Debug)]
pub struct Kernels {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// With the dynamic shared memory each is allowed.
    functions: Mutex<HashMap<String, (CudaFunction, u32)>>,
}

/// A kernel's grid, threads of a block and dynamic shared memory in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: (u32, u32, u32),
    pub(crate) threads: u32,
    pub(crate) shared: u32,
}

macro_rules! images {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")).as_slice())),*]
    };
}

impl Kernels {
    /// Loads every module into a context.
    ///
    /// # Errors
    /// The driver's, such as no machine code for this GPU.
    pub fn load(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        let images = images![
            "append",
            "bench",
            "decode",
            "fork",
            "held",
            "losses",
            "mass",
            "matvec",
            "model",
            "observe",
            "plain",
            "plan",
            "prefill",
            "soft",
            "soft_plain",
            "train",
            "trim"
        ];
        let load =
            |(name, image): (&'static str, &[u8])| Ok((name, context.load_module(Ptx::from_binary(image.to_vec()))?));
        let modules = images.into_iter().map(load).collect::<Result<_, DriverError>>()?;
        Ok(Self { modules, functions: Mutex::default() })
    }

    /// The kernels of a context's GPU, loaded by the first call.
    ///
    /// # Errors
    /// As [`Kernels::load`].
    pub fn of(context: &Arc<CudaContext>) -> Result<Arc<Self>, DriverError> {
        // By ordinal: every context of a GPU is its primary one, which the loaded modules keep alive.
        static LOADED: Mutex<BTreeMap<usize, Arc<Kernels>>> = Mutex::new(BTreeMap::new());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = loaded.get(&context.ordinal()) {
            return Ok(kernels.clone());
        }
        let kernels = Arc::new(Self::load(context)?);
        loaded.insert(context.ordinal(), kernels.clone());
        Ok(kernels)
    }

    /// A kernel by its module and name, allowed `shared` bytes of dynamic shared memory.
    fn function(&self, module: &'static str, name: &str, shared: u32) -> Result<CudaFunction, DriverError> {
        use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let (function, allowed) = match functions.entry(name.to_string()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert((self.modules[module].load_function(name)?, 48 * 1024)),
        };
        if shared > *allowed {
            function.set_attribute(MOST, shared as i32)?;
            *allowed = shared;
        }
        Ok(function.clone())
    }

    /// Enqueues a kernel that takes one structure.
    ///
    /// # Safety
    /// The structure is the kernel's own, and every address in it is good until the stream has passed the kernel.
    pub(crate) unsafe fn launch<P: DeviceRepr>(
        &self,
        stream: &CudaStream,
        (module, name): (&'static str, &str),
        launch: Launch,
        params: &P,
    ) -> Result<(), DriverError> {
        let function = self.function(module, name, launch.shared)?;
        let Launch { grid, threads, shared } = launch;
        let config = LaunchConfig { grid_dim: grid, block_dim: (threads, 1, 1), shared_mem_bytes: shared };
        // SAFETY: the caller's.
        unsafe { stream.launch_builder(&function).arg(params).launch(config) }.map(|_| ())
    }
}
