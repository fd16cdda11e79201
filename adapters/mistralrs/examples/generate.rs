//! A model under a policy, with the `mistralrs` crate as it is published.
//!
//! ```text
//! cargo run --release --example generate -- MODEL_FOLDER "tova:budget=25%" "Why is the sky blue?"
//! cargo run --release --example generate -- SmolLM2-135M-Instruct.Q4_1.gguf dms:weights=smollm2-135m-instruct-w64-4x "Why is the sky blue?"
//! ```

use kvpolicy::Registry;
use kvpolicy_mistralrs::{CacheOptions, register};
use mistralrs::{GgufModelBuilder, Model, ModelDType, RequestBuilder, TextMessageRole, TextModelBuilder};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, policy, prompt] = &arguments[..] else {
        anyhow::bail!("usage: generate MODEL_FOLDER_OR_GGUF POLICY PROMPT");
    };
    let hosting = register(Registry::standard().parse(policy)?, &CacheOptions::default()); // before the model is loaded
    let model = load(model).await?;
    let request = RequestBuilder::new().set_sampler_max_len(200).add_message(TextMessageRole::User, prompt);
    let answer = model.send_chat_request(request).await?;
    println!("{}", answer.choices[0].message.content.as_deref().unwrap_or_default());
    for model in hosting.figures() {
        println!(
            "{}: compression {:.1}x, {} entries evicted",
            model.policy,
            model.stats.compression(),
            model.usage.evicted
        );
    }
    Ok(())
}

async fn load(model: &str) -> anyhow::Result<Model> {
    let path = std::path::absolute(model)?;
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(file)) if path.is_file() => {
            GgufModelBuilder::new(folder.display(), vec![file.display()]).with_force_cpu().build().await
        }
        _ => TextModelBuilder::new(model).with_force_cpu().with_dtype(ModelDType::F32).build().await,
    }
}
