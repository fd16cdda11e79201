//! A model in a candle program, its cache under a policy that the model has learned.
//!
//! `cargo run --release -p kvpolicy-candle --example dms -- MODEL POLICY PROMPT`; without arguments the small model inside the
//! crate walks along a map of roads, with the gates that are part of it.

use kvpolicy_candle::{Lm, LoadOptions, SessionOptions, TextStream};
use std::io::Write;

const MAP: &str = "re-si he-li pu-ra wu-za ra-se ha-le ke-di li-mo le-mi ti-vo vo-wu be-ki si-to pa-re fo-gu vu-ba no-pu mo-nu ba-ke nu-pa \
    di-fo to-vu ga-he za-be fu-ga se-ti gu-ha ki-do do-fu mi-no\n\nfrom ba, 12 steps.\n";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (lm, prompt_of_model) = match args.next() {
        Some(model) => (Lm::load(&model, &LoadOptions::default())?, "Why is the sky blue?"),
        None => (Lm::embedded(&LoadOptions::default())?, MAP),
    };
    let policy = kvpolicy::Registry::standard().parse(&args.next().unwrap_or_else(|| "dms".into()))?;
    let prompt = lm.chat(&args.next().unwrap_or_else(|| prompt_of_model.into()))?;

    let mut session = lm.session(policy, &SessionOptions::default())?;
    let mut logits = session.prefill(&lm.tokenizer().encode(&prompt)?, true)?;
    let mut text = TextStream::new(lm.tokenizer());
    for _ in 0..200 {
        let token = logits.argmax(0)?.to_scalar::<u32>()?;
        if lm.tokenizer().is_eos(token) {
            break;
        }
        if let Some(piece) = text.push(token)? {
            print!("{piece}");
            std::io::stdout().flush()?;
        }
        logits = session.decode(token)?;
    }
    let stats = session.stats();
    println!("\n{} of {} entries evicted, compression {:.2}x", stats.evicted, stats.written, stats.compression());
    Ok(())
}
