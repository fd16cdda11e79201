//! The server as a client sees it, on a tiny random model.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "../../tests/common/mod.rs"]
mod common;

use common::{endless, write};
use futures::{StreamExt, future::join_all};
use kvpolicy_mistralrs::Figures;
use kvpolicy_serve::{Options, Place, Served, router};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

const WINDOW: &str = "window:size=28,sinks=4";

struct Server {
    url: String,
    client: Client,
    served: Served,
    model: TempDir,
}

fn options(model: PathBuf, policies: &[&str], kv_memory: Option<u64>) -> Options {
    let policies = policies.iter().map(|text| text.to_string()).collect();
    let max_sequences = 64.try_into().unwrap();
    Options { model, policies, kv_memory, kv_dtype: None, device: Place::Cpu, max_sequences }
}

impl Server {
    async fn start(policies: &[&str], kv_memory: Option<u64>) -> Self {
        let model = tempfile::tempdir().unwrap();
        write(&endless("llama", json!({})), model.path()); // many of its streams end within a character
        let path = model.path().into();
        Self::of(path, model, policies, kv_memory).await
    }

    async fn of(path: PathBuf, model: TempDir, policies: &[&str], kv_memory: Option<u64>) -> Self {
        let served = Served::load(&options(path, policies, kv_memory)).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let routes = router(served.clone());
        tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self { url, client: Client::builder().no_proxy().build().unwrap(), served, model }
    }

    async fn post(&self, route: &str, body: &Value) -> reqwest::Response {
        self.client.post(format!("{}{route}", self.url)).json(body).send().await.unwrap()
    }

    async fn get(&self, route: &str) -> String {
        self.client.get(format!("{}{route}", self.url)).send().await.unwrap().text().await.unwrap()
    }

    /// What a chat says in a stream.
    async fn said(&self, body: &Value) -> String {
        let chunks = self.chunks("/v1/chat/completions", body).await;
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
    }

    /// The tokens of a stream, and its finish reason, after it has ended as it should.
    async fn stream(&self, route: &str, body: &Value) -> (usize, String) {
        let chunks = self.chunks(route, body).await;
        let last = chunks.last().unwrap();
        let finish = last["choices"][0]["finish_reason"].as_str().unwrap().to_string();
        (last["usage"]["completion_tokens"].as_u64().unwrap() as usize, finish)
    }

    async fn chunks(&self, route: &str, body: &Value) -> Vec<Value> {
        let answer = self.post(route, body).await;
        assert_eq!(answer.status(), StatusCode::OK, "{body}");
        let text = answer.text().await.unwrap();
        let mut events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{text}");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    async fn idle(&self) {
        for _ in 0..250 {
            if self.served.figures().iter().all(|model| model.served.running == 0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{:?}", self.served.figures());
    }

    fn figures(&self, policy: &str) -> Figures {
        let at = self.served.names().iter().position(|name| name == policy).unwrap();
        self.served.figures().remove(at)
    }
}

fn text(length: usize) -> String {
    (0..length).map(|i| (b' ' + ((i * 37 + 11) % 95) as u8) as char).collect()
}

fn chat(model: &str, text: &str, tokens: usize, stream: bool) -> Value {
    let messages = json!([{"role": "user", "content": text}]);
    json!({"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0.0, "stream": stream})
}

#[tokio::test(flavor = "multi_thread")]
async fn serves() {
    let server = Server::start(&[WINDOW, "full"], None).await;
    a_policy_is_a_model(&server).await;
    bad_requests_are_told_why(&server).await;
    prometheus_reads(&server).await;
    clients_that_leave_give_their_memory_back(&server).await;
    the_last_position_ends_a_sequence(&server).await;
    bad_options_are_told_why().await;
    the_program_serves(&server).await;
    what_fits_nowhere_is_told().await;
    streams_go_on_where_they_were_set_aside().await;
    sixty_four_streams(1).await;
}

const PAGES: u64 = 16 * (2 * 16 * 4 + 9) * 4; // one for each of the model's 4 rows

/// Read whole, the prompt takes 19 pages in each row.
async fn what_fits_nowhere_is_told() {
    let server = Server::start(&["full"], Some(12 * PAGES)).await;
    for stream in [false, true] {
        for (route, body) in [
            ("/v1/chat/completions", chat("full", &text(300), 4, stream)),
            ("/v1/completions", json!({"prompt": text(300), "max_tokens": 4, "stream": stream})),
        ] {
            let answer = server.post(route, &body).await;
            assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{route}, stream: {stream}");
            let why = answer.text().await.unwrap();
            assert!(why.contains("the sequence needs more than all memory for keys and values"), "{why}");
        }
    }
    assert_eq!(server.stream("/v1/chat/completions", &chat("full", "hello", 4, true)).await.0, 4);
}

/// Six streams need twice what the pool holds. Each says what it would say alone.
async fn streams_go_on_where_they_were_set_aside() {
    let server = Server::start(&["full"], Some(20 * PAGES)).await;
    let ask = |i: usize| chat("full", &text(30 + 5 * i), 80, true);
    let mut alone = vec![];
    for i in 0..6 {
        alone.push(server.said(&ask(i)).await);
    }
    assert_eq!(server.figures("full").served.set_aside, 0);
    let bodies: Vec<Value> = (0..6).map(ask).collect();
    assert_eq!(join_all(bodies.iter().map(|body| server.said(body))).await, alone);
    server.idle().await;
    let figures = server.figures("full");
    assert!(figures.served.set_aside > 0 && figures.usage.bytes_peak <= 20 * PAGES, "{figures:?}");
}

async fn a_policy_is_a_model(server: &Server) {
    let models: Value = serde_json::from_str(&server.get("/v1/models").await).unwrap();
    let names: Vec<_> = models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, [WINDOW, "full"]);

    let text = text(100);
    let mut answers = vec![];
    for model in ["default", WINDOW, "full"] {
        let before = [WINDOW, "full"].map(|policy| server.figures(policy).stats.written);
        let answer = server.post("/v1/chat/completions", &chat(model, &text, 20, false)).await;
        assert_eq!(answer.status(), StatusCode::OK);
        let answer: Value = answer.json().await.unwrap();
        assert_eq!(answer["usage"]["completion_tokens"], 20, "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        let body = json!({"model": model, "prompt": text, "max_tokens": 20, "temperature": 0.0});
        let completion = server.post("/v1/completions", &body).await;
        assert_eq!(completion.status(), StatusCode::OK);
        let completion: Value = completion.json().await.unwrap();
        assert!(completion["choices"][0]["text"].is_string(), "{completion}");
        let after = [WINDOW, "full"].map(|policy| server.figures(policy).stats.written);
        let went = [after[0] > before[0], after[1] > before[1]];
        assert_eq!(went, [model != "full", model == "full"], "{model}: to which policy the requests went");
        answers.push(answer["choices"][0]["message"]["content"].clone());

        let (generated, finish) = server.stream("/v1/chat/completions", &chat(model, &text, 20, true)).await;
        assert_eq!((generated, finish.as_str()), (20, "length"));
    }
    assert_eq!(answers[0], answers[1]);
    assert_ne!(answers[1], answers[2], "the policy must matter");
    assert_eq!(server.figures("full").stats.evicted, 0);
    assert!(server.figures(WINDOW).stats.evicted > 0);
}

async fn bad_requests_are_told_why(server: &Server) {
    let good = chat("default", "hello", 4, false);
    let with = |changes: Value| {
        let mut body = good.clone();
        body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        body
    };
    let image =
        json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://0.0.0.0/a.png"}}]}]);
    for (changes, reason) in [
        (json!({"model": "other"}), "'other' is not available"),
        (json!({"temperature": -1}), "temperature=-1 is not accepted: at least 0 and at most 2"),
        (json!({"temperature": "warm"}), "invalid type: string"),
        (json!({"top_p": 0}), "top_p=0 is not accepted: above 0 and at most 1"),
        (json!({"top_k": 0}), "top_k=0 is not accepted: at least 1"),
        (json!({"n": 0, "min_p": 2}), "n=0 is not accepted: at least 1 and at most 128; min_p=2 is not accepted"),
        (json!({"max_tokens": 0}), "max_tokens=0 is not accepted: at least 1"),
        (json!({"max_tokens": -3}), "max_tokens=-3 is not accepted: at least 1"),
        (json!({"presence_penalty": 3}), "presence_penalty=3 is not accepted: at least -2 and at most 2"),
        (json!({"repetition_penalty": 0}), "repetition_penalty=0 is not accepted: at least 0.01 and at most 10"),
        (json!({"n": 2, "stream": true}), "n=2 is not accepted with stream"),
        (json!({"messages": []}), "there are no messages"),
        (json!({"grammar": {"type": "regex", "value": "(" }}), "regex"),
        (json!({"grammar": {"type": "regex", "value": "(" }, "stream": true}), "regex"),
        (json!({"messages": image}), "a part of type \"image_url\": the model reads text only"),
        (
            json!({"messages": [{"role": "user", "content": "a".repeat(600)}], "stream": true}),
            "the prompt has 600 tokens: the model reads 512, one of them to be generated",
        ),
    ] {
        let answer = server.post("/v1/chat/completions", &with(changes.clone())).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{changes}");
        let answer: Value = answer.json().await.unwrap();
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(reason), "{changes}: {message}");
    }
    let answer = server.post("/v1/completions", &json!({"prompt": ""})).await;
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    let answer = server.client.post(format!("{}/v1/completions", server.url)).body("{").send().await.unwrap();
    assert!(answer.status().is_client_error());
    let answer = server.post("/v1/chat/completions", &good).await;
    assert_eq!(answer.status(), StatusCode::OK);
}

/// The model has 512 positions. A pass beyond them would fail for the neighbour too.
async fn the_last_position_ends_a_sequence(server: &Server) {
    let long = json!({"model": "full", "prompt": text(502), "temperature": 0.0});
    let neighbour = chat("full", "hello", 100, true);
    let (answer, beside) =
        tokio::join!(server.post("/v1/completions", &long), server.stream("/v1/chat/completions", &neighbour));
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["choices"][0]["finish_reason"], "length", "{answer}");
    assert_eq!(answer["usage"]["total_tokens"], 512, "{answer}");
    assert_eq!(beside, (100, "length".to_string()));
}

async fn prometheus_reads(server: &Server) {
    server.idle().await;
    let text = server.get("/metrics").await;
    let figures = server.figures(WINDOW);
    let of = |name: &str| {
        let label = format!("policy=\"{WINDOW}\"}} ");
        let line = text.lines().find(|line| line.starts_with(&format!("kvpolicy_{name}{{")) && line.contains(&label));
        line.unwrap_or_else(|| panic!("{name} in {text}")).rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(of("live_tokens"), 0.0);
    assert_eq!(of("kv_in_use_bytes"), 0.0);
    assert_eq!(of("kv_peak_bytes"), figures.usage.bytes_peak as f64);
    assert_eq!(of("evicted_tokens_total"), figures.usage.evicted as f64 / figures.entries_per_token as f64);
    assert_eq!(of("decoded_tokens_total"), figures.served.decoded_tokens as f64);
    assert_eq!(of("admission_waits_total"), 0.0);
    assert_eq!(of("compression"), figures.stats.compression());
    assert!(of("compression") > 1.5 && of("decode_seconds_total") > 0.0);
    assert!(text.ends_with("# EOF\n"));
}

/// Streaming or not, each would run for hundreds of tokens.
async fn clients_that_leave_give_their_memory_back(server: &Server) {
    let before = server.figures("full").served.decoded_tokens;
    let mut stream = server.post("/v1/chat/completions", &chat("full", "hello", 480, true)).await.bytes_stream();
    assert!(stream.next().await.unwrap().is_ok());
    drop(stream);
    server.idle().await;
    let body = chat("full", "hello", 480, false);
    let waits = server.post("/v1/chat/completions", &body);
    tokio::select! {
        answer = waits => panic!("{:?} came before anyone could leave", answer.status()),
        _ = begun(server, "full") => {}
    }
    server.idle().await;
    let decoded = server.figures("full").served.decoded_tokens - before;
    assert!(decoded < 800, "{decoded} of 958 tokens were decoded for nobody");
}

async fn begun(server: &Server, policy: &str) {
    while server.figures(policy).served.running == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn bad_options_are_told_why() {
    let model = tempfile::tempdir().unwrap();
    assert!(refusal(&model, &["full", "windows"]).await.contains("windows"));
    assert_eq!(refusal(&model, &["full", "full"]).await, "policy `full` is named twice");
    assert!(refusal(&model, &["full"]).await.ends_with("config.json: No such file or directory (os error 2)"));
    std::fs::write(model.path().join("config.json"), r#"{"model_type": "gpt2"}"#).unwrap();
    assert!(refusal(&model, &["full"]).await.ends_with("its model_type gpt2 is none of llama, qwen2, qwen3"));
}

async fn the_program_serves(server: &Server) {
    let start = |model: &Path| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_kvpolicy-serve"));
        program.arg("--model").arg(model).args(["--policy", WINDOW, "--policy", "full", "--kv-memory", "1MiB"]);
        program.args(["--listen", "127.0.0.1:0"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut program = start(server.model.path());
    let lines = BufReader::new(program.stdout.take().unwrap()).lines();
    let line = lines.map(Result::unwrap).find(|line| line.starts_with("http://")).unwrap(); // among the host's log
    let (url, names) = line.split_once(" serves ").unwrap();
    assert_eq!(names, format!("{WINDOW}, full"));
    let text = server.client.get(format!("{url}/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(text.contains(&format!("kvpolicy_kv_limit_bytes{{policy=\"{WINDOW}\"}} 1048576.0\n")), "{text}");
    program.kill().unwrap();
    program.wait().unwrap();

    let ended = start(Path::new("nowhere")).wait_with_output().unwrap();
    assert!(!ended.status.success());
    let why = String::from_utf8(ended.stderr).unwrap();
    assert!(why.ends_with("kvpolicy-serve: nowhere: there is no such file or folder\n"), "{why}");
}

async fn refusal(model: &TempDir, policies: &[&str]) -> String {
    Served::load(&options(model.path().into(), policies, None)).await.unwrap_err().to_string()
}

/// For as many minutes as the variable `MINUTES` says, on the tiny model or the one that `MODEL` names, in a pool of `KV_MIB`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes"]
async fn sixty_four_streams_for_minutes() {
    let variable = |name: &str| std::env::var(name).ok();
    let minutes: u64 = variable("MINUTES").unwrap().parse().unwrap();
    let load = match variable("MODEL") {
        Some(model) => Load::of(model.into(), variable("KV_MIB").unwrap().parse::<u64>().unwrap() << 20).await,
        None => Load::tiny().await,
    };
    let begun = Instant::now();
    let mut rounds = 0;
    while begun.elapsed() < Duration::from_secs(60 * minutes) {
        load.round(rounds).await;
        rounds += 1;
        println!("{rounds} rounds, {:.0} s, resident {} MiB", begun.elapsed().as_secs_f64(), resident_mib());
    }
    load.check();
    for model in load.server.served.figures() {
        println!("{model:#?}");
    }
}

async fn sixty_four_streams(rounds: usize) {
    let load = Load::tiny().await;
    for round in 0..rounds {
        load.round(round).await;
    }
    load.check();
}

/// The requests in flight need more than the pool under `full`, and less at a quarter of it.
struct Load {
    server: Server,
    pool: u64, // bytes
    /// Whether the model ends texts by itself.
    ends: bool,
}

const LOAD: [&str; 2] = ["full", "tova:budget=25%"];

impl Load {
    async fn tiny() -> Self {
        let pool = 3 << 20;
        Self { server: Server::start(&LOAD, Some(pool)).await, pool, ends: false }
    }

    async fn of(model: PathBuf, pool: u64) -> Self {
        let server = Server::of(model, tempfile::tempdir().unwrap(), &LOAD, Some(pool)).await;
        Self { server, pool, ends: true }
    }

    /// 64 streams at once, of many lengths, for each policy.
    async fn round(&self, round: usize) {
        for policy in LOAD {
            let ask = |i: usize| {
                let (prompt, tokens) = (text(80 + (i * 29 + round) % 160), 20 + (i * 7) % 60);
                async move {
                    let (generated, finish) =
                        self.server.stream("/v1/chat/completions", &chat(policy, &prompt, tokens, true)).await;
                    let ended = match finish.as_str() {
                        "length" => generated == tokens,
                        "stop" => self.ends && generated <= tokens,
                        _ => false,
                    };
                    assert!(ended, "{policy}, request {i}: {generated} of {tokens} tokens, {finish}");
                }
            };
            join_all((0..64).map(ask)).await;
            self.server.idle().await;
        }
    }

    fn check(&self) {
        let [full, quarter] = LOAD.map(|policy| self.server.figures(policy));
        for model in [&full, &quarter] {
            let (usage, policy) = (model.usage, &model.policy);
            assert!(usage.bytes_peak <= self.pool && usage.bytes_reserved <= self.pool, "{policy}: {usage:?}");
            assert_eq!((usage.live_entries, usage.pages_in_use), (0, 0), "{policy}");
        }
        assert!(full.served.waits > 0, "the pool must be too small for `full`: {:?}", full.served);
        assert_eq!((quarter.served.waits, quarter.served.set_aside), (0, 0), "{:?}", quarter.served);
    }
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}
