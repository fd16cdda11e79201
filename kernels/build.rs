//! Compiles `cuda/*.cu` with nvcc, one fat binary each: machine code for sm_80, sm_89 and sm_90, and PTX for what comes
//! after. `CUDA_COMPUTE_CAP` (such as 90) narrows it to one architecture, as it does for candle's kernels, which need it where
//! there is no GPU; `KVPOLICY_CUDA_ARCHS` (80,89,90) goes before it. `NVCC` or `CUDA_HOME` name the compiler.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cuda");
    for name in ["KVPOLICY_CUDA_ARCHS", "CUDA_COMPUTE_CAP", "NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return; // the empty crate: no toolkit needed
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let sources = sources();
    // Each nvcc takes a core.
    let (next, workers) = (AtomicUsize::new(0), thread::available_parallelism().map_or(1, |n| n.get()));
    let work = || {
        while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            compile(source, &out);
        }
    };
    thread::scope(|scope| (0..workers).for_each(|_| _ = scope.spawn(work)));
}

fn sources() -> Vec<PathBuf> {
    let dir = std::fs::read_dir("cuda").unwrap_or_else(|e| fail(&format!("kernels/cuda: {e}")));
    let files = dir.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|end| end == "cu")).collect();
    // The longest first, so that none of them is left for the end.
    files.sort_by_key(|path| std::cmp::Reverse(path.metadata().map_or(0, |file| file.len())));
    files
}

fn nvcc() -> PathBuf {
    if let Some(path) = env::var_os("NVCC") {
        return path.into();
    }
    env::var_os("CUDA_HOME").map_or("nvcc".into(), |home| Path::new(&home).join("bin/nvcc"))
}

fn architectures() -> Vec<String> {
    let list = ["KVPOLICY_CUDA_ARCHS", "CUDA_COMPUTE_CAP"].iter().find_map(|name| env::var(name).ok());
    let list = list.unwrap_or("80,89,90".into()).replace('.', "");
    let caps: Vec<&str> = list.split(',').map(str::trim).collect();
    let code = |cap: &str, code: &str| format!("-gencode=arch=compute_{cap},code={code}_{cap}");
    let newer = caps.last().filter(|_| caps.len() > 1).map(|cap| code(cap, "compute"));
    caps.iter().map(|cap| code(cap, "sm")).chain(newer).collect()
}

fn compile(source: &Path, out: &Path) {
    let target = out.join(source.file_stem().unwrap_or_default()).with_extension("fatbin");
    let mut command = Command::new(nvcc());
    command.args(["-fatbin", "-O3", "-std=c++17", "-lineinfo", "-Xptxas=-v", "-o"]).arg(&target).arg(source);
    command.args(architectures());
    let output = command.output().unwrap_or_else(|e| {
        fail(&format!("{}: {e}; the feature `cuda` needs a CUDA toolkit: set CUDA_HOME", nvcc().display()))
    });
    let report = String::from_utf8_lossy(&output.stderr);
    _ = std::fs::write(target.with_extension("ptxas"), report.as_bytes());
    if !output.status.success() {
        fail(&format!("nvcc {}:\n{report}", source.display()));
    }
}

fn fail(what: &str) -> ! {
    eprintln!("{what}");
    std::process::exit(1)
}
