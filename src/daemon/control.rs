//! The control socket: a line of JSON in, a line of JSON out, so that the command line and the daemon never fight over
//! a domain. Mode 0600: whoever may open it may do this.

use super::serving::{Conversations, Timed};
pub use crate::daemon::input::Ask;
use crate::daemon::input::{Input, Question};
use crate::error::{Error, Kind, Result};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

/// Longest question, in bytes.
const QUESTION_MAX: u64 = 4096;
/// Longest answer that is read, in bytes: a thousand domains.
const ANSWER_MAX: u64 = 16 << 20;
/// How long one side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one question may take, from its first byte to the last one of the answer; and how many are answered
/// side by side.
const WITHIN: Duration = Duration::from_secs(20);
const QUESTIONS_MAX: usize = 32;

/// Puts a question to the loop and waits for the answer.
pub fn ask(inputs: &Sender<Input>, ask: Ask) -> Option<Value> {
    let (answer, answered) = mpsc::channel();
    inputs.send(Input::Question(Question { ask, answer })).ok()?;
    answered.recv_timeout(PATIENCE).ok()
}

/// The socket's file; removed when the daemon ends.
pub struct Control {
    path: PathBuf,
}

impl Drop for Control {
    fn drop(&mut self) {
        // A file that stays is replaced by the next daemon.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Serves the socket from now on, each question in a thread of its own. A file that nobody serves is replaced; the
/// state's lock is what keeps two daemons apart.
pub fn serve(path: &Path, inputs: Sender<Input>) -> Result<Control> {
    let fail = |e| Error::io("cannot serve the control socket", path, e);
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(fail)?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    // Nobody may connect between bind and chmod: the file appears under another name first.
    let early = path.with_extension("new");
    let _ = std::fs::remove_file(&early);
    let listener = UnixListener::bind(&early).map_err(fail)?;
    std::fs::set_permissions(&early, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    std::fs::rename(&early, path).map_err(fail)?;
    let questions = Conversations::new(QUESTIONS_MAX, WITHIN);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let inputs = inputs.clone();
            match stream {
                Ok(stream) => questions.begin(stream, move |stream| answer(stream, &inputs)),
                // Out of descriptors: waiting is better than spinning.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    });
    Ok(Control { path: path.to_owned() })
}

fn answer(mut stream: Timed<UnixStream>, inputs: &Sender<Input>) {
    let mut line = Vec::new();
    if BufReader::new((&mut stream).take(QUESTION_MAX)).read_until(b'\n', &mut line).is_err() {
        return;
    }
    let answer = match serde_json::from_slice::<Ask>(&line) {
        Ok(question) => ask(inputs, question)
            .unwrap_or_else(|| refusal(Kind::Unavailable, "the daemon does not answer: it is about to end, or busy")),
        Err(e) => refusal(Kind::Usage, &format!("the question was not understood: {e}")),
    };
    let mut text = answer.to_string();
    text.push('\n');
    // Whoever asked may be gone.
    let _ = stream.write_all(text.as_bytes());
}

/// An answer that says no.
pub fn refusal(kind: Kind, message: &str) -> Value {
    json!({ "ok": false, "kind": kind, "message": message })
}

/// Asks the daemon behind a socket. [`Kind::Unavailable`]: there is none; a refusal has the kind that the daemon gave
/// it.
pub fn ask_daemon(path: &Path, ask: &Ask) -> Result<Value> {
    let fail = |e| Error::new(Kind::Unavailable, "no daemon answers").path(path).source(e);
    let mut stream =
        UnixStream::connect(path).map_err(|e| fail(e).hint("is it running? systemctl status virt-replica"))?;
    let _ = stream.set_read_timeout(Some(2 * PATIENCE));
    let mut text = serde_json::to_string(ask).expect("a question is plain data");
    text.push('\n');
    stream.write_all(text.as_bytes()).map_err(fail)?;
    let mut line = Vec::new();
    BufReader::new(stream.take(ANSWER_MAX)).read_until(b'\n', &mut line).map_err(fail)?;
    let answer: Value = serde_json::from_slice(&line)
        .map_err(|e| Error::new(Kind::Protocol, "the daemon's answer was not understood").path(path).source(e))?;
    if answer["ok"] == json!(true) {
        return Ok(answer);
    }
    let kind = serde_json::from_value(answer["kind"].clone()).unwrap_or(Kind::Protocol);
    let message = answer["message"].as_str().unwrap_or("the daemon said no").to_owned();
    Err(Error::new(kind, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_goes_in_and_an_answer_comes_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/control.sock");
        let (inputs, inbox) = mpsc::channel();
        let control = serve(&path, inputs).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::thread::spawn(move || {
            while let Ok(Input::Question(q)) = inbox.recv() {
                let reply = match q.ask {
                    Ask::Pause { domain: Some(d) } if d == "web01" => json!({ "ok": true }),
                    _ => refusal(Kind::NotFound, "nobody is called so"),
                };
                q.answer.send(reply).unwrap();
            }
        });
        let pause = |d: &str| ask_daemon(&path, &Ask::Pause { domain: Some(d.to_owned()) });
        assert!(pause("web01").is_ok());
        assert_eq!(pause("web02").unwrap_err().kind(), Kind::NotFound);
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"{\"command\":\"rm\"}\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.contains("not understood"), "{text}");
        drop(control);
        assert_eq!(ask_daemon(&path, &Ask::Status {}).unwrap_err().kind(), Kind::Unavailable);
    }
}
