//! Compiles `cuda/*.cu` with nvcc, one fat binary each: machine code for sm_80, sm_89 and sm_90, and PTX for what comes
//! after. `CUDA_COMPUTE_CAP` (such as 90) narrows it to one architecture; `NVCC` or `CUDA_HOME` name the compiler.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cuda");
    for name in ["CUDA_COMPUTE_CAP", "NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return; // the empty crate: no toolkit needed
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let sources = sources();
    // A few at a time: each nvcc takes a core.
    let workers = thread::available_parallelism().map_or(1, |n| n.get());
    for batch in sources.chunks(workers) {
        thread::scope(|scope| batch.iter().for_each(|source| _ = scope.spawn(|| compile(source, &out))));
    }
}

fn sources() -> Vec<PathBuf> {
    let dir = std::fs::read_dir("cuda").unwrap_or_else(|e| fail(&format!("kernels/cuda: {e}")));
    let files = dir.filter_map(|entry| Some(entry.ok()?.path()));
    files.filter(|path| path.extension().is_some_and(|end| end == "cu")).collect()
}

fn nvcc() -> PathBuf {
    if let Some(path) = env::var_os("NVCC") {
        return path.into();
    }
    env::var_os("CUDA_HOME").map_or("nvcc".into(), |home| Path::new(&home).join("bin/nvcc"))
}

fn architectures() -> Vec<String> {
    let code = |cap: &str, code: &str| format!("-gencode=arch=compute_{cap},code={code}_{cap}");
    match env::var("CUDA_COMPUTE_CAP") {
        Ok(cap) => vec![code(&cap.replace('.', ""), "sm")],
        Err(_) => vec![code("80", "sm"), code("89", "sm"), code("90", "sm"), code("90", "compute")],
    }
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
