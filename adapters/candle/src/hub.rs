//! Models by their id on the Hugging Face hub.

use std::collections::BTreeSet;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::error::{Error, Result};

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const OPTIONAL: [&str; 4] =
    ["tokenizer_config.json", "generation_config.json", "chat_template.jinja", "dms_metadata.json"];

/// How long the hub may take to answer at all before it counts as out of reach.
const PATIENCE: Duration = Duration::from_secs(8);

/// Fetches a model and says where it is now.
///
/// | id | fetched | returned |
/// |----|---------|----------|
/// | `org/name`, `org/name@revision` | config, tokenizer, chat template, safetensors weights | the folder |
/// | `org/name/file.gguf`, `org/name/file.gguf@revision` | that file | the file |
///
/// A file that is in the hub's local cache already (`$HF_HOME/hub`, else `~/.cache/huggingface/hub`) is not fetched
/// again, and a model that is there in full needs no network. `HF_TOKEN` (or the token that the hub's command line
/// stored) opens private models, `HF_ENDPOINT` names another hub, `HF_HUB_OFFLINE=1` keeps away from the network.
/// Nothing is printed; large files take their time.
///
/// # Errors
///
/// [`Error::Hub`] with the id and what to do: the id is malformed, the hub is out of reach (known within seconds),
/// it has no such model or wants a token, or the model has no safetensors weights.
pub(crate) fn fetch(id: &str) -> Result<PathBuf> {
    Hub::of_environment(id)?.fetch(id)
}

/// Fetches `config.json` of `org/name` or `org/name@revision` and says where it is, by the rules of [`fetch`].
///
/// # Errors
/// As [`fetch`].
pub(crate) fn fetch_config(id: &str) -> Result<PathBuf> {
    Hub::of_environment(id)?.fetch_config(id)
}

/// Whether a text has the form of an id.
pub(crate) fn is_id(text: &str) -> bool {
    Id::parse(text).is_ok()
}

struct Hub {
    cache: Cache,
    endpoint: String,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    fn of_environment(id: &str) -> Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        // hf-hub panics where there is neither.
        if variable("HF_HOME").is_none() && std::env::home_dir().is_none() {
            return Err(Error::Hub(format!("{id}: no home folder to keep models in; set HF_HOME to a folder")));
        }
        let offline =
            variable("HF_HUB_OFFLINE").is_some_and(|value| !["0", "false", "off", "no"].contains(&value.as_str()));
        let cache = Cache::from_env();
        let token = variable("HF_TOKEN").or_else(|| cache.token());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Self { cache, endpoint: endpoint.trim_end_matches('/').to_owned(), token, offline })
    }

    fn model<'a>(&'a self, id: &'a str, parsed: &Id) -> Model<'a> {
        let repo = Repo::with_revision(parsed.repo.to_owned(), RepoType::Model, parsed.revision.to_owned());
        Model { id, hub: self, repo, remote: None }
    }

    fn fetch_config(&self, id: &str) -> Result<PathBuf> {
        self.model(id, &Id::parse(id)?).need("config.json")
    }

    fn fetch(&self, id: &str) -> Result<PathBuf> {
        let parsed = Id::parse(id)?;
        let mut model = self.model(id, &parsed);
        match parsed.file {
            Some(file) => model.need(file),
            None => model.snapshot(),
        }
    }
}

/// An id in its parts.
#[derive(Debug, PartialEq, Eq)]
struct Id<'a> {
    repo: &'a str,
    revision: &'a str,
    file: Option<&'a str>,
}

impl<'a> Id<'a> {
    fn parse(id: &'a str) -> Result<Self> {
        let malformed =
            || Error::Hub(format!("\"{id}\" is no model id; give org/name, org/name@revision or org/name/file.gguf"));
        let (path, revision) = id.split_once('@').unwrap_or((id, "main"));
        let at = path.match_indices('/').nth(1).map(|(at, _)| at);
        let (repo, file) = match at {
            Some(at) => (&path[..at], Some(&path[at + 1..])),
            None => (path, None),
        };
        let plain = |part: &str| {
            let odd = |c: char| !c.is_ascii_alphanumeric() && !"-_./".contains(c);
            !part.is_empty() && !part.contains(odd) && part.split('/').all(|one| !["", ".", ".."].contains(&one))
        };
        let gguf = file.is_none_or(|file| plain(file) && file.to_ascii_lowercase().ends_with(".gguf"));
        if !repo.contains('/') || !plain(repo) || !plain(revision) || !gguf {
            return Err(malformed());
        }
        Ok(Self { repo, revision, file })
    }
}

/// One model on the hub.
struct Model<'a> {
    id: &'a str,
    hub: &'a Hub,
    repo: Repo,
    /// The connection, or why there is none; made when the first file is not in the cache.
    remote: Option<std::result::Result<ApiRepo, String>>,
}

/// Why a file was not got.
enum Miss {
    /// The model has no such file.
    Absent,
    /// No network; why.
    Unreachable(String),
    Failed(String),
}

impl Model<'_> {
    fn cached(&self) -> CacheRepo {
        self.hub.cache.repo(self.repo.clone())
    }

    fn get(&mut self, file: &str) -> std::result::Result<PathBuf, Miss> {
        if let Some(path) = self.cached().get(file) {
            return Ok(path);
        }
        let (hub, repo) = (self.hub, &self.repo);
        let remote = self.remote.get_or_insert_with(|| {
            hub.reachable()?;
            let api = ApiBuilder::from_cache(hub.cache.clone())
                .with_endpoint(hub.endpoint.clone())
                .with_token(hub.token.clone())
                .with_progress(false)
                .build()
                .map_err(|e| e.to_string())?;
            Ok(api.repo(repo.clone()))
        });
        match remote {
            Ok(remote) => remote.download(file).map_err(|error| self.miss(error)),
            Err(why) => Err(Miss::Unreachable(why.clone())),
        }
    }

    /// What an error of the hub means.
    fn miss(&self, error: ApiError) -> Miss {
        let text = error.to_string();
        let ApiError::RequestError(request) = error else { return Miss::Failed(text) };
        let Some(response) = request.into_response() else { return Miss::Unreachable(text) };
        match (response.status(), response.header("x-error-code").unwrap_or_default()) {
            (404, "RevisionNotFound") => Miss::Failed(format!("there is no revision {}", self.repo.revision())),
            (404, "" | "EntryNotFound") => Miss::Absent,
            (401 | 403, "GatedRepo") => Miss::Failed(
                "the model is gated; ask for access on its page and set HF_TOKEN to a token of that account".to_owned(),
            ),
            (401 | 403 | 404, _) => Miss::Failed(
                "there is no such model, or it is private; check the id, or set HF_TOKEN to a token that may read it"
                    .to_owned(),
            ),
            _ => Miss::Failed(text),
        }
    }

    fn error(&self, miss: Miss, file: &str) -> Error {
        let what = match miss {
            Miss::Absent => format!("the model has no {file}"),
            Miss::Failed(why) => format!("{file}: {why}"),
            Miss::Unreachable(why) => format!(
                "{file} is not in the local cache and the hub cannot be reached ({why}); \
                 give a local model folder or a GGUF file instead"
            ),
        };
        Error::Hub(format!("{}: {what}", self.id))
    }

    fn need(&mut self, file: &str) -> Result<PathBuf> {
        self.get(file).map_err(|miss| self.error(miss, file))
    }

    /// Fetches all files of a model in safetensors.
    fn snapshot(&mut self) -> Result<PathBuf> {
        // A branch can move between two files; then all of them are looked up again at its new commit.
        for _ in 0..2 {
            let files = self.files()?;
            let folders: BTreeSet<&Path> = files.iter().filter_map(|file| file.parent()).collect();
            if let (Some(folder), 1) = (folders.first(), folders.len()) {
                return Ok(folder.to_path_buf());
            }
        }
        Err(Error::Hub(format!("{}: the model changed while it was fetched; try again or name a revision", self.id)))
    }

    fn files(&mut self) -> Result<Vec<PathBuf>> {
        let mut files = vec![self.need("config.json")?, self.need("tokenizer.json")?];
        let index = match self.cached().get(INDEX) {
            Some(index) => Some(index),
            None => match self.get(WEIGHTS) {
                Ok(weights) => {
                    files.push(weights);
                    None
                }
                Err(Miss::Absent) => Some(self.get(INDEX).map_err(|miss| match miss {
                    Miss::Absent => Error::Hub(format!(
                        "{}: the model has neither {WEIGHTS} nor {INDEX}; name one in safetensors, or a GGUF file as \
                         org/name/file.gguf",
                        self.id
                    )),
                    miss => self.error(miss, INDEX),
                })?),
                Err(miss) => return Err(self.error(miss, WEIGHTS)),
            },
        };
        if let Some(index) = index {
            for shard in shards(&index)? {
                files.push(self.need(&shard)?);
            }
            files.push(index);
        }
        for file in OPTIONAL {
            match self.get(file) {
                Ok(path) => files.push(path),
                // What must be there is there by now, so a model in the cache works without network.
                Err(Miss::Absent | Miss::Unreachable(_)) => {}
                Err(miss) => return Err(self.error(miss, file)),
            }
        }
        Ok(files)
    }
}

/// The weight files that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let file = |what: String| Error::File { path: index.to_path_buf(), what };
    let text = std::fs::read_to_string(index).map_err(|e| file(e.to_string()))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| file(format!("not JSON: {e}")))?;
    let map = json["weight_map"].as_object().ok_or_else(|| file("it has no weight_map".to_owned()))?;
    map.values()
        .map(|shard| {
            let name = shard.as_str().unwrap_or_default();
            // A name with folders in it could lead out of the cache.
            let mut parts = Path::new(name).components();
            match (parts.next(), parts.next()) {
                (Some(Component::Normal(_)), None) => Ok(name.to_owned()),
                _ => Err(file(format!("its weight_map names {shard}, which is no file name"))),
            }
        })
        .collect()
}

impl Hub {
    /// Whether anything answers at the hub's address: the library's own wait for a dead network is half a minute.
    fn reachable(&self) -> std::result::Result<(), String> {
        if self.offline {
            return Err("HF_HUB_OFFLINE is set".to_owned());
        }
        let proxy = ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
        if proxy.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty())) {
            return Ok(()); // the proxy resolves and connects, not we
        }
        let (scheme, rest) = self.endpoint.split_once("://").unwrap_or(("https", &self.endpoint));
        let host = rest.split('/').next().unwrap_or(rest).to_owned();
        let port_given = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = match (port_given, scheme) {
            (true, _) => host,
            (false, "http") => format!("{host}:80"),
            (false, _) => format!("{host}:443"),
        };
        let (sender, answer) = mpsc::channel();
        let asked = address.clone();
        // Name look-ups have no time limit of their own; the thread ends when the system gives up.
        thread::spawn(move || {
            let connect = || {
                let mut last = None;
                for one in asked.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&one, PATIENCE / 2) {
                        Ok(_) => return Ok(()),
                        Err(error) => last = Some(error),
                    }
                }
                Err(last.unwrap_or_else(|| std::io::Error::other("the name has no address")))
            };
            sender.send(connect()).ok();
        });
        match answer.recv_timeout(PATIENCE) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("{address}: {error}")),
            Err(_) => Err(format!("{address}: no answer in {} s", PATIENCE.as_secs())),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use std::collections::HashMap;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};
    use std::time::Instant;

    use super::*;

    fn hub(folder: &Path, endpoint: &str) -> Hub {
        Hub { cache: Cache::new(folder.to_path_buf()), endpoint: endpoint.to_owned(), token: None, offline: false }
    }

    /// A stand-in for the hub on this machine: the files by path and the requests it got.
    struct Server {
        endpoint: String,
        files: Arc<Mutex<HashMap<String, String>>>,
        commit: Arc<Mutex<String>>,
        asked: Arc<Mutex<Vec<String>>>,
    }

    impl Server {
        fn start(files: &[(&str, &str)]) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let files = files.iter().map(|&(path, body)| (path.to_owned(), body.to_owned())).collect();
            let server = Self {
                endpoint: format!("http://{}", listener.local_addr().unwrap()),
                files: Arc::new(Mutex::new(files)),
                commit: Arc::new(Mutex::new("c0ffee".to_owned())),
                asked: Arc::default(),
            };
            let (files, commit, asked) = (server.files.clone(), server.commit.clone(), server.asked.clone());
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    answer(stream, &files, &commit, &asked);
                }
            });
            server
        }
    }

    fn answer(
        stream: TcpStream,
        files: &Mutex<HashMap<String, String>>,
        commit: &Mutex<String>,
        asked: &Mutex<Vec<String>>,
    ) -> Option<()> {
        let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
        let path = lines.next()?.ok()?.split(' ').nth(1)?.trim_start_matches('/').to_owned();
        let mut from_start = true;
        for line in lines.by_ref() {
            let line = line.ok()?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            from_start &= line != "range: bytes=0-0";
        }
        asked.lock().unwrap().push(path.clone());
        let commit = commit.lock().unwrap().clone();
        let reply = match files.lock().unwrap().get(&path) {
            Some(body) if body.starts_with("status ") => {
                let code = body.trim_start_matches("status ");
                let (status, code) = code.split_once(' ').unwrap_or((code, ""));
                format!("HTTP/1.1 {status} No\r\nx-error-code: {code}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            }
            Some(body) => {
                let part = if from_start { body.as_str() } else { &body[..1] };
                let (last, size, length) = (part.len() - 1, body.len(), part.len());
                format!(
                    "HTTP/1.1 206 Partial Content\r\nx-repo-commit: {commit}\r\netag: \"{}\"\r\n\
                     content-range: bytes 0-{last}/{size}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{part}",
                    path.replace('/', "-"),
                )
            }
            None => "HTTP/1.1 404 Not Found\r\nx-error-code: EntryNotFound\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                .to_owned(),
        };
        (&stream).write_all(reply.as_bytes()).ok()
    }

    #[test]
    fn an_id_has_a_name_and_may_have_a_revision_or_a_file() {
        let id = |repo, revision, file| Id { repo, revision, file };
        assert_eq!(Id::parse("org/name").unwrap(), id("org/name", "main", None));
        assert_eq!(Id::parse("org/na.me-1@refs/pr/1").unwrap(), id("org/na.me-1", "refs/pr/1", None));
        assert_eq!(Id::parse("org/name/q4.gguf").unwrap(), id("org/name", "main", Some("q4.gguf")));
        assert_eq!(Id::parse("org/name/sub/q4.GGUF@v1").unwrap(), id("org/name", "v1", Some("sub/q4.GGUF")));
        for bad in
            ["", "name", "/name", "org/", "org/../x", "org/name@", "org/name/file.bin", "a b/c", "org/n/../x.gguf"]
        {
            let error = Id::parse(bad).unwrap_err().to_string();
            assert!(error.contains("is no model id") && error.contains("org/name/file.gguf"), "{error}");
        }
    }

    #[test]
    fn without_a_network_the_message_comes_at_once() {
        let folder = tempfile::tempdir().unwrap();
        // Nothing listens on port 1; the name does not exist; the key forbids it.
        let closed = hub(folder.path(), "http://127.0.0.1:1");
        let unknown = hub(folder.path(), "https://hub.invalid");
        let forbidden = Hub { offline: true, ..hub(folder.path(), "https://huggingface.co") };
        for hub in [closed, unknown, forbidden] {
            for id in ["org/name", "org/name/q4.gguf"] {
                let start = Instant::now();
                let error = hub.fetch(id).unwrap_err().to_string();
                assert!(start.elapsed() < PATIENCE + Duration::from_secs(2));
                assert!(error.starts_with(&format!("hub: {id}: ")), "{error}");
                assert!(error.contains("cannot be reached") && error.contains("a local model folder or a GGUF file"));
            }
        }
    }

    #[test]
    fn a_model_is_fetched_once_and_then_needs_no_network() {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start(&[
            ("org/name/resolve/main/config.json", "{}"),
            ("org/name/resolve/main/tokenizer.json", "{\"a\":1}"),
            ("org/name/resolve/main/model.safetensors", "weights"),
            ("org/name/resolve/main/dms_metadata.json", "{\"b\":1}"),
            ("org/name/resolve/main/sub/q4.gguf", "GGUF"),
        ]);
        let dir = hub(folder.path(), &server.endpoint).fetch("org/name").unwrap();
        assert!(dir.ends_with("models--org--name/snapshots/c0ffee"), "{}", dir.display());
        assert_eq!(std::fs::read_to_string(dir.join("model.safetensors")).unwrap(), "weights");
        assert!(dir.join("dms_metadata.json").exists() && !dir.join("chat_template.jinja").exists());
        let asked = server.asked.lock().unwrap().len();

        let offline = Hub { offline: true, ..hub(folder.path(), &server.endpoint) };
        assert_eq!(offline.fetch("org/name").unwrap(), dir);
        assert_eq!(server.asked.lock().unwrap().len(), asked);
        let file = hub(folder.path(), &server.endpoint).fetch("org/name/sub/q4.gguf").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "GGUF");
        assert_eq!(offline.fetch("org/name/sub/q4.gguf").unwrap(), file);
    }

    #[test]
    fn a_configuration_is_fetched_alone() {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start(&[("org/name/resolve/main/config.json", "{\"a\":1}")]);
        let config = hub(folder.path(), &server.endpoint).fetch_config("org/name").unwrap();
        assert_eq!(std::fs::read_to_string(&config).unwrap(), "{\"a\":1}");
        assert!(server.asked.lock().unwrap().iter().all(|path| path.contains("config.json")));
        let offline = Hub { offline: true, ..hub(folder.path(), &server.endpoint) };
        assert_eq!(offline.fetch_config("org/name").unwrap(), config);
        assert!(offline.fetch_config("org/other").unwrap_err().to_string().contains("config.json"));
    }

    #[test]
    fn shards_come_from_the_index() {
        let folder = tempfile::tempdir().unwrap();
        let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}"#;
        let server = Server::start(&[
            ("org/name/resolve/v1/config.json", "{}"),
            ("org/name/resolve/v1/tokenizer.json", "{}"),
            ("org/name/resolve/v1/model.safetensors.index.json", index),
            ("org/name/resolve/v1/m-1.safetensors", "one"),
            ("org/name/resolve/v1/m-2.safetensors", "two"),
        ]);
        let dir = hub(folder.path(), &server.endpoint).fetch("org/name@v1").unwrap();
        assert_eq!(std::fs::read_to_string(dir.join("m-2.safetensors")).unwrap(), "two");
        let offline = Hub { offline: true, ..hub(folder.path(), &server.endpoint) };
        assert_eq!(offline.fetch("org/name@v1").unwrap(), dir);

        let path = folder.path().join("index.json");
        for bad in ["{", "{}", r#"{"weight_map": {"a": "../../x"}}"#, r#"{"weight_map": {"a": 1}}"#] {
            std::fs::write(&path, bad).unwrap();
            assert!(shards(&path).unwrap_err().to_string().contains("index.json"), "{bad}");
        }
    }

    #[test]
    fn a_branch_that_moved_is_fetched_whole() {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start(&[
            ("org/name/resolve/main/config.json", "{}"),
            ("org/name/resolve/main/tokenizer.json", "{}"),
        ]);
        assert!(hub(folder.path(), &server.endpoint).fetch("org/name").is_err());
        *server.commit.lock().unwrap() = "decade".to_owned();
        let weights = ("org/name/resolve/main/model.safetensors".to_owned(), "weights".to_owned());
        server.files.lock().unwrap().extend([weights]);
        let dir = hub(folder.path(), &server.endpoint).fetch("org/name").unwrap();
        assert!(dir.ends_with("decade"));
        assert!(dir.join("config.json").exists() && dir.join("model.safetensors").exists());
    }

    #[test]
    fn what_the_hub_refuses_is_explained() {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start(&[
            ("org/bare/resolve/main/config.json", "{}"),
            ("org/bare/resolve/main/tokenizer.json", "{}"),
            ("org/gated/resolve/main/config.json", "status 401 GatedRepo"),
            ("org/none/resolve/main/config.json", "status 401 RepoNotFound"),
            ("org/bare/resolve/v9/config.json", "status 404 RevisionNotFound"),
            ("org/down/resolve/main/config.json", "status 503 "),
        ]);
        let error = |id: &str| hub(folder.path(), &server.endpoint).fetch(id).unwrap_err().to_string();
        assert!(error("org/bare").contains("has neither model.safetensors nor"));
        assert!(error("org/empty").contains("the model has no config.json"));
        assert!(error("org/bare/q4.gguf").contains("the model has no q4.gguf"));
        assert!(error("org/gated").contains("HF_TOKEN"));
        assert!(error("org/none").contains("no such model"));
        assert!(error("org/bare@v9").contains("no revision v9"));
        assert!(error("org/down").contains("503"));
    }
}
