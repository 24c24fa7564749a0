//! `/` for people and `/metrics` for Prometheus, over HTTP on a loopback port: read only. A slow client holds up nobody
//! (`serving`).

use super::serving::{Conversations, Socket, Timed};
use super::status::Status;
use super::{metrics, page};
use crate::daemon::input::Input;
use crate::error::{Error, Kind, Result};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

/// Longest request that is read, in bytes.
const REQUEST_MAX: usize = 8192;
/// How long one request may take, from the first byte of the question to the last one of the answer.
const WITHIN: Duration = Duration::from_secs(10);
/// How long the daemon's loop may take over its part.
const PATIENCE: Duration = Duration::from_secs(5);
/// Requests that are answered side by side.
const REQUESTS_MAX: usize = 16;

/// Serves from now on; returns the address, whose port was chosen by the kernel if 0 was asked for. Only loopback:
/// there is no password.
pub fn serve(address: SocketAddr, inputs: Sender<Input>) -> Result<SocketAddr> {
    serve_within(address, inputs, WITHIN)
}

fn serve_within(address: SocketAddr, inputs: Sender<Input>, within: Duration) -> Result<SocketAddr> {
    if !address.ip().is_loopback() {
        return Err(Error::new(
            Kind::Usage,
            format!("{address} is not a loopback address: whoever reaches it could read it"),
        )
        .hint("use 127.0.0.1:PORT or [::1]:PORT, and a proxy with a password for others"));
    }
    let fail = |e| Error::from_io(format!("cannot serve http://{address}"), e);
    let listener = TcpListener::bind(address).map_err(fail)?;
    let bound = listener.local_addr().map_err(fail)?;
    let requests = Conversations::new(REQUESTS_MAX, within);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => {
                    let inputs = inputs.clone();
                    requests.begin(stream, move |stream| answer(stream, &inputs));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    });
    Ok(bound)
}

fn answer<S: Socket>(mut stream: Timed<S>, inputs: &Sender<Input>) {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < REQUEST_MAX {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => request.extend_from_slice(&buffer[..n]),
        }
    }
    let (code, kind, body) = reply(&request, || status(inputs, stream.left().min(PATIENCE)));
    let head = format!(
        "HTTP/1.1 {code}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {}\r\nCache-Control: no-store\r\n\
         Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'\r\nX-Content-Type-Options: nosniff\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    // A scraper that went away asks again.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
}

/// The answer to a request: its status line, what kind of text it is, its body.
fn reply(request: &[u8], status: impl FnOnce() -> Option<Box<Status>>) -> (&'static str, &'static str, String) {
    const PLAIN: &str = "text/plain";
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    match (words.next(), words.next()) {
        (Some("GET"), Some(path @ ("/" | "/metrics"))) => match status() {
            Some(status) if path == "/" => ("200 OK", "text/html", page::render(&status)),
            Some(status) => ("200 OK", "text/plain; version=0.0.4", metrics::render(&status)),
            None => ("503 Service Unavailable", PLAIN, "the daemon does not answer\n".to_owned()),
        },
        (Some("GET"), Some(_)) => ("404 Not Found", PLAIN, "there are / and /metrics\n".to_owned()),
        (Some(_), Some(_)) => ("405 Method Not Allowed", PLAIN, "this page is for reading\n".to_owned()),
        _ => ("400 Bad Request", PLAIN, "that is no request\n".to_owned()),
    }
}

fn status(inputs: &Sender<Input>, within: Duration) -> Option<Box<Status>> {
    let (answer, answered) = mpsc::channel();
    inputs.send(Input::Status(answer)).ok()?;
    answered.recv_timeout(within).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;
    use std::time::Instant;

    #[test]
    fn only_loopback_is_served() {
        let (inputs, _inbox) = mpsc::channel();
        let e = serve("0.0.0.0:0".parse().unwrap(), inputs).unwrap_err();
        assert_eq!(e.kind(), Kind::Usage);
    }

    /// The status line of an answer, and how long it took.
    fn get(address: SocketAddr) -> (String, Duration) {
        let began = Instant::now();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        (text.lines().next().unwrap_or_default().to_owned(), began.elapsed())
    }

    /// A client that sends a byte now and then, and many that send nothing: everybody else is answered at once.
    #[test]
    fn slow_clients_hold_up_nobody_and_are_ended() {
        // Nobody is behind it: each request is answered with 503, at once.
        let (inputs, inbox) = mpsc::channel();
        drop(inbox);
        let address = serve_within("127.0.0.1:0".parse().unwrap(), inputs, Duration::from_millis(1500)).unwrap();
        let mut slow = TcpStream::connect(address).unwrap();
        let began = Instant::now();
        let trickle = std::thread::spawn(move || {
            while slow.write_all(b"G").is_ok() && began.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(50));
            }
            began.elapsed()
        });
        let (line, took) = get(address);
        assert!(line.contains("503"), "{line}");
        assert!(took < Duration::from_millis(1200), "held up by the slow one: {took:?}");
        assert!(trickle.join().unwrap() < Duration::from_secs(15), "the slow one was never ended");
        let idle: Vec<TcpStream> = (0..3 * REQUESTS_MAX).map(|_| TcpStream::connect(address).unwrap()).collect();
        // Those that gave way need a moment to end.
        std::thread::sleep(Duration::from_millis(300));
        let (line, took) = get(address);
        assert!(line.contains("503") && took < Duration::from_millis(1200), "{line} {took:?}");
        drop(idle);
    }

    #[test]
    fn two_pages_and_only_reading() {
        let code = |request: &str| reply(request.as_bytes(), || None).0.split(' ').next().unwrap().to_owned();
        assert_eq!(code("GET /metrics HTTP/1.1\r\n\r\n"), "503");
        assert_eq!(code("GET / HTTP/1.1\r\n\r\n"), "503");
        assert_eq!(code("GET /else HTTP/1.1\r\n\r\n"), "404");
        assert_eq!(code("POST /metrics HTTP/1.1\r\n\r\n"), "405");
        assert_eq!(code(""), "400");
    }
}
