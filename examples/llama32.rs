//! Chat with Llama 3.2 (or any Llama) under a policy: `meta-llama/Llama-3.2-1B-Instruct`, `shisa-ai/Llama-3.2-1B-DMS-8x` with
//! `--policy dms`, a folder, a GGUF file.
//!
//! ```text
//! cargo run --release -p kvpolicy-candle --example llama32 -- --model meta-llama/Llama-3.2-1B-Instruct \
//!     --policy h2o:budget=512,recent=128
//! ```
//!
//! Without a download, on random weights of the exact shape, what the cache takes beside what `kvpolicy plan` says:
//!
//! ```text
//! cargo run --release -p kvpolicy-candle --features cuda --example llama32 -- --random llama-3.2-1b --device cuda \
//!     --max-tokens 32768 --policy window:size=4096,sinks=4
//! ```

mod chat;

use clap::Parser;

fn main() -> anyhow::Result<()> {
    let args = chat::Args::parse();
    // Greedy, unless --temperature says otherwise.
    chat::run(&args, &chat::Defaults { max_tokens: 1024, temperature: None, top_p: None })
}
