//! Long reasoning with DeepSeek-R1-Distill-Qwen or Qwen3 under a policy: `deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B`,
//! `nvidia/Qwen3-8B-DMS-8x` with `--policy dms`, a folder, a GGUF file. The chat template opens the thoughts.
//!
//! ```text
//! cargo run --release -p kvpolicy-candle --features cuda --example qwen_r1 -- --device cuda \
//!     --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --policy tova:budget=2048 \
//!     --prompt "How many primes are there below 200?"
//! ```
//!
//! Without a download: `--random qwen-r1-1.5b`, as in `llama32`.

mod chat;

use clap::Parser;

fn main() -> anyhow::Result<()> {
    let args = chat::Args::parse();
    // What the authors of R1 advise: greedy chains run into repetitions.
    chat::run(&args, &chat::Defaults { max_tokens: 32_768, temperature: Some(0.6), top_p: Some(0.95) })
}
