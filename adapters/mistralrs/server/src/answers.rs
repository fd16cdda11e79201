//! Answers of an engine on their way to a client.

use crate::request::Refusal;
use kvpolicy_mistralrs::Error;
use mistralrs_core::Response;
use std::collections::VecDeque;
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// Parts of an answer that wait for a client who reads slowly. One that falls further behind is hung up on.
const BEHIND: usize = 10_000;

/// Waits until an answer begins, and takes what the engine says from then on: it must never wait for a client, since all
/// sequences would.
///
/// # Errors
/// A refusal with the reason if the engine finds that the request cannot be served.
pub(crate) async fn begun(mut engine: Receiver<Response>) -> Result<Receiver<Response>, Refusal> {
    let first = engine.recv().await.ok_or_else(|| Refusal::unavailable("the engine does not answer"))?;
    match &first {
        Response::ValidationError(error) => return Err(Refusal::of(error)),
        Response::ModelError(why, _) | Response::CompletionModelError(why, _) if Error::is_too_large(why) => {
            return Err(Refusal::of(why));
        }
        _ => {}
    }
    let (client, answers) = channel(1);
    tokio::spawn(relay(first, engine, client, BEHIND));
    Ok(answers)
}

/// Ends, and with it the sequence of `engine`, when the client has left or is more than `behind` parts behind.
async fn relay(first: Response, mut engine: Receiver<Response>, client: Sender<Response>, behind: usize) {
    let mut waiting = VecDeque::from([first]);
    let mut over = false;
    while !(over && waiting.is_empty()) && waiting.len() <= behind {
        tokio::select! {
            part = engine.recv(), if !over => match part {
                Some(part) => waiting.push_back(part),
                None => over = true,
            },
            place = client.reserve(), if !waiting.is_empty() => match (place, waiting.pop_front()) {
                (Ok(place), Some(part)) => place.send(part),
                _ => return,
            },
            () = client.closed() => return,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn part(i: usize) -> Response {
        Response::InternalError(i.to_string().into())
    }

    fn number(part: Response) -> usize {
        let Response::InternalError(error) = part else { unreachable!() };
        error.to_string().parse().unwrap()
    }

    #[tokio::test]
    async fn the_engine_waits_for_nobody() {
        let (engine, parts) = channel(1);
        let (client, mut answers) = channel(1);
        tokio::spawn(relay(part(0), parts, client, 100));
        for i in 1..100 {
            engine.send(part(i)).await.unwrap(); // nobody reads
        }
        drop(engine);
        for i in 0..100 {
            assert_eq!(number(answers.recv().await.unwrap()), i);
        }
        assert!(answers.recv().await.is_none());
    }

    #[tokio::test]
    async fn who_falls_too_far_behind_is_hung_up_on() {
        let (engine, parts) = channel(1);
        let (client, _answers) = channel(1);
        tokio::spawn(relay(part(0), parts, client, 10));
        let mut sent = 0;
        while engine.send(part(sent)).await.is_ok() {
            sent += 1;
        }
        assert!((10..20).contains(&sent), "{sent}");
    }

    #[tokio::test]
    async fn who_leaves_ends_the_sequence() {
        let (engine, parts) = channel(1);
        let (client, answers) = channel(1);
        tokio::spawn(relay(part(0), parts, client, 10));
        drop(answers);
        engine.closed().await;
    }

    #[tokio::test]
    async fn a_refusal_comes_before_anything_else() {
        let (engine, parts) = channel(1);
        engine.send(Response::ValidationError("no grammar".into())).await.unwrap();
        assert!(format!("{:?}", begun(parts).await.unwrap_err()).contains("no grammar"));
        let (engine, parts) = channel(1);
        engine.send(part(7)).await.unwrap();
        assert_eq!(number(begun(parts).await.unwrap().recv().await.unwrap()), 7);
        let (engine, parts) = channel::<Response>(1);
        drop(engine);
        assert!(begun(parts).await.is_err());
    }
}
