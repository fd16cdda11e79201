//! What clients may ask.

use crate::{
    answers::begun,
    metrics,
    models::Served,
    request::{Refusal, check_length, read},
};
use axum::{
    Json, Router,
    extract::{State, rejection::JsonRejection},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use mistralrs_core::Request;
use mistralrs_server_core::{
    chat_completion::{self, ChatCompletionResponder},
    completions::{self, CompletionResponder},
    handler_core::{create_response_channel, send_request_with_model},
};
use serde_json::{Value, json};

/// The server's routes.
pub fn router(served: Served) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(complete))
        .route("/v1/models", get(models))
        .route("/metrics", get(measured))
        .route("/health", get(|| async { "OK" }))
        .with_state(served)
}

type Body = Result<Json<Value>, JsonRejection>;

async fn chat(State(served): State<Served>, body: Body) -> Result<Response, Refusal> {
    let (sender, answers) = create_response_channel(None);
    let parsed = chat_completion::parse_request(read(body)?, served.host.clone(), sender).await;
    let (request, streams) = parsed.map_err(Refusal::of)?;
    send(&served, request).await?;
    let mut answers = begun(answers).await?;
    Ok(if streams {
        ChatCompletionResponder::Sse(chat_completion::create_streamer(answers, served.host, None, None)).into_response()
    } else {
        chat_completion::process_non_streaming_response(&mut answers, served.host).await.into_response()
    })
}

async fn complete(State(served): State<Served>, body: Body) -> Result<Response, Refusal> {
    let (sender, answers) = create_response_channel(None);
    let parsed = completions::parse_request(read(body)?, served.host.clone(), sender);
    let (request, streams) = parsed.map_err(Refusal::of)?;
    send(&served, request).await?;
    let mut answers = begun(answers).await?;
    Ok(if streams {
        CompletionResponder::Sse(completions::create_streamer(answers, served.host, None, None)).into_response()
    } else {
        completions::process_non_streaming_response(&mut answers, served.host).await.into_response()
    })
}

/// To the engine of the policy that the request names.
async fn send(served: &Served, request: Request) -> Result<(), Refusal> {
    let Request::Normal(request) = request else { return Err(Refusal::of("is no request for text")) };
    check_length(served, &request).await?;
    let name = request.model_id.clone();
    let sent = send_request_with_model(&served.host, Request::Normal(request), name.as_deref()).await;
    sent.map_err(Refusal::unavailable)
}

async fn models(State(served): State<Served>) -> Json<Value> {
    let created = served.host.get_creation_time();
    let model = |id: &String| json!({"id": id, "object": "model", "created": created, "owned_by": "local"});
    Json(json!({"object": "list", "data": served.names().iter().map(model).collect::<Vec<_>>()}))
}

async fn measured(State(served): State<Served>) -> Response {
    let text = move || metrics::text(&served).map_err(|error| error.to_string());
    // Figures wait for the layer that is under way.
    let text = tokio::task::spawn_blocking(text).await.map_err(|error| error.to_string()).flatten();
    match text {
        Ok(text) => {
            ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
    }
}
