//! Times on the device, by events.

use super::Time;
use anyhow::{Context, Result};
use cudarc::driver::{CudaGraph, CudaStream, sys};
use std::sync::Arc;

/// Times `work` on a stream, once per repetition, after some unmeasured ones; each is divided by `parts`.
pub(crate) fn time(
    stream: &Arc<CudaStream>,
    repetitions: (usize, usize),
    parts: usize,
    work: impl FnMut() -> Result<()>,
) -> Result<Time> {
    time_after(stream, repetitions, parts, || Ok(()), work)
}

/// The same with something before each repetition that is not timed.
fn time_after(
    stream: &Arc<CudaStream>,
    (warm_up, repetitions): (usize, usize),
    parts: usize,
    mut before: impl FnMut() -> Result<()>,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Time> {
    for _ in 0..warm_up {
        before()?;
        work()?;
    }
    let event = || stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
    let mut times = vec![];
    for _ in 0..repetitions {
        let (start, end) = (event()?, event()?);
        before()?;
        start.record(stream)?;
        work()?;
        end.record(stream)?;
        times.push((start, end));
    }
    let microseconds = times.iter().map(|(start, end)| Ok(start.elapsed_ms(end)? as f64 * 1e3 / parts as f64));
    Ok(quartiles(microseconds.collect::<Result<_>>()?))
}

/// The same for launches that are recorded as a graph, so that the gaps between them are the device's own.
pub(crate) fn time_graph(
    stream: &Arc<CudaStream>,
    repetitions: (usize, usize),
    parts: usize,
    work: impl FnOnce() -> Result<()>,
) -> Result<Time> {
    let graph = record(stream, work)?;
    time(stream, repetitions, parts, || Ok(graph.launch()?))
}

/// The same for launches that change what they work on: `before` brings it back, in a graph that is not timed.
pub(crate) fn time_graph_after(
    stream: &Arc<CudaStream>,
    repetitions: (usize, usize),
    parts: usize,
    before: impl FnOnce() -> Result<()>,
    work: impl FnOnce() -> Result<()>,
) -> Result<Time> {
    let (before, work) = (record(stream, before)?, record(stream, work)?);
    time_after(stream, repetitions, parts, || Ok(before.launch()?), || Ok(work.launch()?))
}

fn record(stream: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let done = work();
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags)?;
    done?;
    graph.context("nothing was recorded")
}

pub(crate) fn quartiles(mut times: Vec<f64>) -> Time {
    times.sort_by(f64::total_cmp);
    let at = |quarter: usize| times[(times.len() - 1) * quarter / 4];
    Time { median_us: at(2), low_us: at(1), high_us: at(3) }
}
