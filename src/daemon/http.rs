//! `/` for people and `/metrics` for Prometheus, over HTTP on a loopback port: read only, one question at a time.

use super::service::Input;
use super::status::Status;
use super::{metrics, page};
use crate::error::{Error, Kind, Result};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

/// Longest request that is read, in bytes.
const REQUEST_MAX: usize = 8192;
/// How long a scraper may take over it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves from now on; returns the address, whose port was chosen by the kernel if 0 was asked for. Only loopback: there
/// is no password.
pub fn serve(address: SocketAddr, inputs: Sender<Input>) -> Result<SocketAddr> {
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
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => answer(stream, &inputs),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    });
    Ok(bound)
}

fn answer(mut stream: TcpStream, inputs: &Sender<Input>) {
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let _ = stream.set_write_timeout(Some(PATIENCE));
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < REQUEST_MAX {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => request.extend_from_slice(&buffer[..n]),
        }
    }
    let (code, kind, body) = reply(&request, || status(inputs));
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

fn status(inputs: &Sender<Input>) -> Option<Box<Status>> {
    let (answer, answered) = mpsc::channel();
    inputs.send(Input::Status(answer)).ok()?;
    answered.recv_timeout(PATIENCE).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_served() {
        let (inputs, _inbox) = mpsc::channel();
        let e = serve("0.0.0.0:0".parse().unwrap(), inputs).unwrap_err();
        assert_eq!(e.kind(), Kind::Usage);
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
