//! Requests that are refused before they reach the model.

use axum::{
    Json,
    extract::rejection::JsonRejection,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use mistralrs_core::{NormalRequest, Request, RequestMessage, TokenizationRequest};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::models::Served;

/// Why a request is not served.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    reason: String,
}

impl Refusal {
    /// The client's fault.
    pub(crate) fn of(reason: impl ToString) -> Self {
        Self { status: StatusCode::BAD_REQUEST, reason: reason.to_string() }
    }

    /// The engine is gone.
    pub(crate) fn unavailable(reason: impl ToString) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, reason: reason.to_string() }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let kind = if self.status.is_client_error() { "invalid_request_error" } else { "server_error" };
        (self.status, Json(json!({"error": {"message": self.reason, "type": kind}}))).into_response()
    }
}

/// What a request may say, if it is one of a text model, and says nothing that mistral.rs would fail at later.
pub(crate) fn read<T: DeserializeOwned>(body: Result<Json<Value>, JsonRejection>) -> Result<T, Refusal> {
    let Json(body) = body.map_err(|error| Refusal { status: error.status(), reason: error.body_text() })?;
    let faults = faults(&body);
    if !faults.is_empty() {
        return Err(Refusal::of(faults.join("; ")));
    }
    serde_json::from_value(body).map_err(Refusal::of)
}

/// Field, its least and its largest value, and whether the least is left out.
const RANGES: [(&str, f64, f64, bool); 15] = [
    ("n", 1.0, 128.0, false),
    ("best_of", 1.0, 128.0, false),
    ("max_tokens", 1.0, f64::MAX, false),
    ("max_completion_tokens", 1.0, f64::MAX, false),
    ("temperature", 0.0, 2.0, false),
    ("top_p", 0.0, 1.0, true),
    ("top_k", 1.0, f64::MAX, false),
    ("min_p", 0.0, 1.0, false),
    ("presence_penalty", -2.0, 2.0, false),
    ("frequency_penalty", -2.0, 2.0, false),
    ("repetition_penalty", 0.01, 10.0, false), // mistral.rs divides by it
    ("dry_multiplier", 0.0, 100.0, false),
    ("dry_base", 1.0, 100.0, false), // mistral.rs takes powers of it
    ("top_logprobs", 0.0, 20.0, false),
    ("logprobs", 0.0, 20.0, false),
];

/// Every fault at once. Types are serde's to check.
fn faults(body: &Value) -> Vec<String> {
    let mut why = vec![];
    for (name, least, most, open) in RANGES {
        if let Some(given) = body[name].as_f64()
            && (given < least || given > most || open && given == least)
        {
            let from = if open { "above" } else { "at least" };
            let to = if most == f64::MAX { String::new() } else { format!(" and at most {most}") };
            why.push(format!("{name}={given} is not accepted: {from} {least}{to}"));
        }
    }
    if body["stream"] == true && body["n"].as_u64().is_some_and(|n| n > 1) {
        why.push(format!("n={} is not accepted with stream: mistral.rs streams one choice", body["n"]));
    }
    if body["prompt"].as_str().is_some_and(str::is_empty) {
        why.push("the prompt is empty".into());
    }
    if body["messages"].as_array().is_some_and(Vec::is_empty) || body["messages"].as_str().is_some_and(str::is_empty) {
        why.push("there are no messages".into());
    }
    let parts = body["messages"].as_array().into_iter().flatten().filter_map(|message| message["content"].as_array());
    if let Some(other) = parts.flatten().find(|part| part["type"] != "text") {
        why.push(format!("a message has a part of type {}: the model reads text only", other["type"]));
    }
    if !body["web_search_options"].is_null() {
        why.push("web_search_options are not served".into());
    }
    why
}

/// Refuses a prompt that leaves no room for a token, which mistral.rs tells a streaming client only within the stream.
pub(crate) async fn check_length(served: &Served, request: &NormalRequest) -> Result<(), Refusal> {
    let name = request.model_id.as_deref();
    let most = served.host.max_sequence_length(name).map_err(Refusal::unavailable)?;
    let Some(most) = most.filter(|_| !request.truncate_sequence) else { return Ok(()) };
    let tokens = count(served, request).await?;
    if tokens < most {
        return Ok(());
    }
    Err(Refusal::of(format!("the prompt has {tokens} tokens: the model reads {most}, one of them to be generated")))
}

async fn count(served: &Served, request: &NormalRequest) -> Result<usize, Refusal> {
    use either::Either::{Left, Right};
    let (text, chat) = match &request.messages {
        RequestMessage::Chat { messages, .. } => (Left(messages.clone()), true),
        RequestMessage::Completion { text, .. } => (Right(text.clone()), false),
        _ => return Err(Refusal::of("the model reads text only")),
    };
    let (enable_thinking, reasoning_effort) = match &request.messages {
        RequestMessage::Chat { enable_thinking, reasoning_effort, .. } => (*enable_thinking, *reasoning_effort),
        _ => (None, None),
    };
    let (response, mut answer) = tokio::sync::mpsc::channel(1);
    let question = Request::Tokenize(TokenizationRequest {
        text,
        tools: request.tools.clone(),
        add_generation_prompt: chat,
        add_special_tokens: true,
        enable_thinking,
        reasoning_effort,
        response,
    });
    let gone = || Refusal::unavailable("the engine does not answer");
    let engine = served.host.get_sender(request.model_id.as_deref()).map_err(Refusal::unavailable)?;
    let asked = async move {
        engine.send(question).await.ok()?;
        answer.recv().await
    };
    // A task of its own hears the answer when the client has left: the engine's thread would end if nobody did.
    let tokens = tokio::spawn(asked).await.ok().flatten().ok_or_else(gone)?;
    Ok(tokens.map_err(Refusal::of)?.len())
}
