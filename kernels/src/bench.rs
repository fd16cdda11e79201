//! Launcher of `cuda/bench.cu`.

use crate::{
    Kernels,
    module::Launch,
    store::{Address, device_repr},
};
use cudarc::driver::{CudaStream, DriverError};

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct ReadParams {
    from: Address,
    out: Address,
    vectors: u64,
}

device_repr!(ReadParams);

impl Kernels {
    /// Reads `bytes` (a multiple of 16) once, for measuring what reading costs. `out`: one word.
    ///
    /// # Safety
    /// Both addresses are good.
    pub unsafe fn read_memory(
        &self,
        stream: &CudaStream,
        from: Address,
        bytes: usize,
        out: Address,
    ) -> Result<(), DriverError> {
        let params = ReadParams { from, out, vectors: bytes as u64 / 16 };
        // SAFETY: the caller's.
        unsafe {
            self.launch(
                stream,
                ("bench", "read_memory"),
                Launch { grid: (132 * 4, 1, 1), threads: 512, shared: 0 },
                &params,
            )
        }
    }
}
