//! A model in mistral.rs as a [`kvpolicy::runtime::Runtime`]: one sequence at a time, each token when it is asked for.

use crate::{
    Error, Result,
    hosting::{CacheOptions, Hosting, register},
    loading::load,
    text::Text,
};
use async_trait::async_trait;
use candle_core::{DType, Device, Tensor};
use futures_util::stream;
use kvpolicy::{
    ModelSpec, Policy, Stats,
    policies::Full,
    runtime::{HostError, Runtime, TextModel, Tokens},
};
use mistralrs_core::{
    DefaultSchedulerMethod, MistralRs, MistralRsBuilder, NormalRequest, Request, RequestMessage, Response,
    SamplingParams, SchedulerConfig, kv_policy::unregister,
};
use std::{
    fmt,
    num::NonZeroUsize,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};
use tokio::{
    runtime::Handle,
    sync::mpsc::{Receiver, UnboundedReceiver, channel, unbounded_channel},
};

/// A model that mistral.rs runs. Its policy changes between sequences, its weights stay.
pub struct MistralRuntime {
    host: Arc<MistralRs>,
    hosting: Arc<Hosting>,
    text: Text,
    dtype: DType,
    /// Whether it was put under a policy.
    loaded: AtomicBool,
    tokio: Handle,
}

impl fmt::Debug for MistralRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MistralRuntime({:?})", self.hosting)
    }
}

impl MistralRuntime {
    /// Loads a folder with safetensors or a GGUF file. Must be called on a tokio runtime of several threads, and while
    /// nobody else loads a model: whom it runs under is a matter of the process.
    ///
    /// # Errors
    /// What keeps the model from being loaded.
    pub async fn start(model: &Path, device: &Device, options: &CacheOptions) -> Result<Self> {
        let text = Text::of(model)?;
        let hosting = register(Arc::new(Full {}), options);
        let loaded = load(model, device);
        unregister();
        let loaded = loaded?;
        let dtype = loaded.lock().await.get_metadata().activation_dtype;
        let method = DefaultSchedulerMethod::Fixed(NonZeroUsize::MIN);
        let host = MistralRsBuilder::new(loaded, SchedulerConfig::DefaultScheduler { method }, false, None);
        let (host, tokio) = (host.build().await, Handle::current());
        Ok(Self { host, hosting, text, dtype, loaded: AtomicBool::new(false), tokio })
    }

    /// Type of the model's activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// SHA-256 of what makes tokens of text, as [`Tokenizer::sha256`](kvpolicy_candle::Tokenizer::sha256).
    ///
    /// # Errors
    /// As there.
    pub fn tokenizer_sha256(&self) -> Result<String> {
        self.text.sha256()
    }

    /// SHA-256 of the gates that the model runs with under a policy, as [`Gates::sha256`](kvpolicy_candle::Gates::sha256);
    /// `None` without any.
    ///
    /// # Errors
    /// What is wrong with the gates that it asks for.
    pub fn gates_sha256(&self, policy: &dyn Policy) -> Result<Option<String>> {
        let gates = self.hosting.gates(policy)?;
        Ok(gates.map(|gates| gates.sha256()).transpose()?)
    }

    /// Waits until the sequence that was dropped last has given its place back.
    async fn settle(&self) {
        let hosting = self.hosting.clone();
        let wait = async move {
            while hosting.running() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        // On a runtime that has a clock, whoever polls this. What does not end is told by what comes next.
        _ = self.tokio.spawn(async { tokio::time::timeout(Duration::from_secs(60), wait).await }).await;
    }

    /// A request whose tokens come one by one.
    fn request(&self, prompt: &[u32], most: usize) -> (NormalRequest, Generation) {
        let (answer, answers) = channel(4);
        let (say, said) = unbounded_channel();
        let (go_on, may_go_on) = mpsc::channel::<()>();
        let (read, ends, may_go_on) = (prompt.len(), self.text.ends().to_vec(), Mutex::new(may_go_on));
        let choose = move |logits: &Tensor, context: &[u32]| {
            let token = logits.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
            let nobody = || candle_core::Error::Msg("nobody asks for the next token".into());
            say.send(token).map_err(|_| nobody())?;
            // The model reads a token when this returns.
            if context.len() + 1 < read + most && !ends.contains(&token) {
                may_go_on.lock().unwrap_or_else(PoisonError::into_inner).recv().map_err(|_| nobody())?;
            }
            let only = (0..logits.elem_count() as u32).map(|other| (other == token) as u8 as f32);
            Tensor::from_iter(only, logits.device())?.reshape(logits.dims())
        };
        let sampling = SamplingParams { max_len: Some(most), ..SamplingParams::deterministic() };
        let prompt = RequestMessage::CompletionTokens(prompt.to_vec());
        let id = self.host.next_request_id();
        let mut request = NormalRequest::new_simple(prompt, sampling, answer, id, None, None);
        request.logits_processors = Some(vec![Arc::new(choose)]);
        (request, Generation { said, go_on, answers, begun: false, ends: self.text.ends().to_vec() })
    }
}

/// The other end of a request.
struct Generation {
    said: UnboundedReceiver<u32>,
    go_on: mpsc::Sender<()>,
    answers: Receiver<Response>,
    begun: bool,
    ends: Vec<u32>,
}

impl Generation {
    async fn next(mut self) -> Option<(Result<u32, HostError>, Option<Self>)> {
        if self.begun {
            _ = self.go_on.send(()); // nobody hears it after the last token
        }
        self.begun = true;
        if let Some(token) = self.said.recv().await {
            let goes_on = !self.ends.contains(&token);
            return Some((Ok(token), goes_on.then_some(self)));
        }
        match self.answers.recv().await {
            Some(Response::CompletionDone(_)) => None,
            Some(Response::CompletionModelError(why, _)) => Some((Err(why.into()), None)),
            Some(Response::InternalError(why) | Response::ValidationError(why)) => Some((Err(why), None)),
            _ => Some((Err("mistral.rs hung up".into()), None)),
        }
    }
}

impl TextModel for MistralRuntime {
    fn spec(&self) -> ModelSpec {
        self.text.spec()
    }

    fn max_context(&self) -> usize {
        self.text.max_context()
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, HostError> {
        self.text.encode(text)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, HostError> {
        self.text.decode(tokens)
    }

    fn is_end(&self, token: u32) -> bool {
        self.text.is_end(token)
    }

    fn chat(&self, user: &str) -> Result<String, HostError> {
        self.text.chat(user)
    }
}

#[async_trait]
impl Runtime for MistralRuntime {
    async fn load(&self, policy: &Arc<dyn Policy>) -> Result<(), HostError> {
        self.settle().await;
        self.hosting.put_under(policy)?;
        self.loaded.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn generate<'a>(&'a self, prompt: &[u32], most: usize) -> Result<Tokens<'a>, HostError> {
        if !self.loaded.load(Ordering::Relaxed) {
            return Err("no policy is loaded".into());
        }
        self.settle().await;
        self.hosting.empty()?;
        let (request, generation) = self.request(prompt, most);
        let engine = self.host.get_sender(None).map_err(|error| Error::Host(error.to_string()))?;
        engine.send(Request::Normal(Box::new(request))).await?;
        let next = |generation: Option<Generation>| async { generation?.next().await };
        Ok(Box::pin(stream::unfold(Some(generation), next)))
    }

    async fn stats(&self) -> Stats {
        self.hosting.figures().first().map_or_else(Stats::default, |model| model.stats)
    }
}
