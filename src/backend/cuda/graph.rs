//! Recorded steps.

use super::{Cuda, driver};
use crate::{
    backend::{Capture, Recording},
    error::{Error, Result},
};
use cudarc::driver::{CudaGraph, DriverError, sys};

/// A recorded step.
struct Graph {
    graph: CudaGraph,
    /// What its trims asked for, by layer.
    asked: Vec<[Vec<u32>; 2]>,
    /// The rings it knows.
    generation: u64,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph {{ generation: {} }}", self.generation)
    }
}

// SAFETY: a graph is launched through its stream; the driver's handles may be used from any thread.
unsafe impl Send for Graph {}

impl Recording for Graph {
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Whether a graph holds a copy whose source is host memory: by the time of a replay something else lies there.
fn copies_from_host(graph: &CudaGraph) -> std::result::Result<bool, DriverError> {
    let mut count = 0;
    // SAFETY: the graph is alive; with no array the driver writes the number of nodes alone.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut count) }.result()?;
    let mut nodes = vec![std::ptr::null_mut(); count];
    // SAFETY: the array has room for `count` nodes.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), nodes.as_mut_ptr(), &mut count) }.result()?;
    for node in nodes {
        let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: a node of this graph.
        unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.result()?;
        if kind == sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMCPY {
            let mut copy = std::mem::MaybeUninit::<sys::CUDA_MEMCPY3D>::zeroed();
            // SAFETY: a node of this graph that is a copy; all zeros is a valid value of the structure.
            let copy = unsafe {
                sys::cuGraphMemcpyNodeGetParams(node, copy.as_mut_ptr()).result()?;
                copy.assume_init()
            };
            if copy.srcMemoryType == sys::CUmemorytype::CU_MEMORYTYPE_HOST {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

impl Capture for Cuda {
    fn begin_capture(&mut self) -> Result<()> {
        *self.unrepeatable.borrow_mut() = None;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(driver("beginning a capture; take the device from `cuda_device`"))?;
        self.capturing = true;
        Ok(())
    }

    fn end_capture(&mut self) -> Result<Box<dyn Recording>> {
        self.capturing = false;
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags).map_err(driver("ending a capture"))?;
        if let Some(what) = self.unrepeatable.borrow_mut().take() {
            return Err(Error::Config(format!("this step cannot be replayed: {what}")));
        }
        let graph = graph.ok_or_else(|| Error::Config("the captured step did nothing".into()))?;
        if copies_from_host(&graph).map_err(driver("looking at a graph"))? {
            return Err(Error::Config(
                "this step cannot be replayed: it copies from host memory, as candle does for scalars and strided shapes"
                    .into(),
            ));
        }
        Ok(Box::new(Graph { graph, asked: self.asked(), generation: self.generation }))
    }

    fn replay(&mut self, recording: &dyn Recording) -> Result<()> {
        let graph = recording.as_any().downcast_ref::<Graph>();
        let graph = graph.ok_or_else(|| Error::Config(format!("{recording:?} was not recorded by this backend")))?;
        if graph.generation != self.generation {
            return Err(Error::Config("marks began after the step was recorded: record it again".into()));
        }
        self.ask_again(&graph.asked)?;
        graph.graph.launch().map_err(driver("launching a graph"))
    }
}
