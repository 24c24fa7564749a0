//! `debug wire`: a captured stream of a session, message by message; either direction, from its banner or a frame on.
//!
//! A frame that cannot be read ends the look: where the next one would begin is its word.

use super::file;
use super::page::{Finding, List, Look, Page, View, clean, counted};
use crate::cli::speak::render;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufReader, Cursor, Read};
use std::path::Path;
use virt_replica::agent::wire::{
    self, Failed, FrameKind, HEADER_LEN, Head, Progress, Reply, Request, Role, Stream, WireError,
};
use virt_replica::error::{Error, Result, printable};
use virt_replica::words;

/// Most of a message that is shown in its line.
const WHAT_MAX: usize = 160;

/// Most of what stands in front of a banner that is shown.
const JUNK_SHOWN: usize = 200;

/// Fields that say when something was, of whatever message.
const TIMES: [&str; 4] = ["frozen_at", "sealed_at", "now", "since"];

/// How a patch begins.
const PATCH: &[u8] = b"virt-replica patch ";

#[derive(Serialize)]
pub struct WireView {
    bytes: u64,
    /// `null`: the stream does not begin with one.
    banner: Option<BannerSeen>,
    /// Bytes that were read, whole frames alone.
    read: u64,
    kinds: BTreeMap<&'static str, Kind>,
    frames: List<Frame>,
    findings: List<Finding>,
}

#[derive(Serialize)]
struct BannerSeen {
    role: &'static str,
    protocol: u32,
    version: String,
    /// What a login shell said before it.
    before: String,
}

#[derive(Default, Serialize)]
struct Kind {
    frames: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Frame {
    frame: u64,
    offset: u64,
    from: &'static str,
    kind: &'static str,
    id: u64,
    /// Of the payload.
    length: u64,
    /// The message goes on in a later frame.
    more: bool,
    /// A time that the message names.
    time: Option<String>,
    what: String,
}

pub fn look(path: &Path, max: usize) -> Result<Look<WireView>> {
    let input = file::open(path)?;
    let bytes = input.len;
    let beginning = input.beginning(path, wire::JUNK_MAX + 256)?;
    let mut view = WireView {
        bytes,
        banner: None,
        read: 0,
        kinds: BTreeMap::new(),
        frames: List::new(max),
        findings: List::new(max),
    };
    let mut input = BufReader::with_capacity(256 << 10, input.into_reader());
    if !begins_with_frame(&beginning) {
        let (banner, len) = banner(&beginning)?;
        std::io::copy(&mut (&mut input).take(len), &mut std::io::sink())
            .map_err(|e| Error::io("cannot read the file", path, e))?;
        (view.banner, view.read) = (Some(banner), len);
    }
    let damage = frames(&mut view, input).err();
    if let (Some(_), rest @ 1..) = (&damage, bytes - view.read) {
        view.findings
            .push(Finding::at(format!("{} from here on were not looked at", counted(rest, "byte")), view.read));
    }
    Ok(Look { view, damage })
}

/// Whether a stream that begins so was captured from a frame on. Text is none: its fifth byte is no kind of a frame.
fn begins_with_frame(beginning: &[u8]) -> bool {
    let Some(header) = beginning.first_chunk::<HEADER_LEN>() else { return !beginning.starts_with(b"virt") };
    // The length is not asked: what is wrong with it is said later, with its place.
    let bare = [&[0; 4], &header[4..]].concat();
    matches!(wire::read_frame(&mut Cursor::new(bare), &mut Vec::new()), Ok(Some(_)))
}

/// The banner of either side, and how many bytes it takes with all before it.
fn banner(beginning: &[u8]) -> Result<(BannerSeen, u64)> {
    let read = |role| {
        let mut input = Cursor::new(beginning);
        wire::read_banner(&mut input, role, wire::JUNK_MAX).map(|banner| (banner, input.position()))
    };
    let (role, banner, len) = match (read(Role::Agent), read(Role::Client)) {
        (Ok((banner, len)), Ok((_, other))) if len <= other => ("agent", banner, len),
        (_, Ok((banner, len))) => ("client", banner, len),
        (Ok((banner, len)), Err(_)) => ("agent", banner, len),
        (Err(e), Err(_)) => {
            return Err(e
                .offset(0)
                .hint("name what one side of a session sent, as bytes: from its banner or from a frame on"));
        }
    };
    let whole = &beginning[..len as usize];
    let line = whole.trim_ascii_end().rsplit(|byte| *byte == b'\n').next().unwrap_or_default().len();
    let before = String::from_utf8_lossy(&whole[..whole.trim_ascii_end().len() - line]);
    let (protocol, version) = (banner.protocol, clean(banner.version));
    Ok((BannerSeen { role, protocol, version, before: printable(&before, JUNK_SHOWN) }, len))
}

fn frames(view: &mut WireView, mut input: impl Read) -> Result<()> {
    let (mut payload, mut parts) = (Vec::new(), Parts::default());
    loop {
        let offset = view.read;
        // A frame that is torn, unknown or too long: the error names where it begins.
        let head = wire::read_frame(&mut input, &mut payload).map_err(|e| e.offset(offset))?;
        let Some(head) = head else { return Ok(()) };
        view.read += (HEADER_LEN + payload.len()) as u64;
        let (kind, frame) = (name(head.kind), view.frames.count);
        let counts = view.kinds.entry(kind).or_default();
        (counts.frames, counts.bytes) = (counts.frames + 1, counts.bytes + payload.len() as u64);
        let part = parts.of(head);
        let told = describe(head, part, &payload);
        if let Some(why) = &told.wrong {
            view.findings.push(Finding::at(format!("frame {frame}, {kind}: {why}"), offset));
        }
        let from = match head.kind {
            FrameKind::Ping => "either",
            kind if kind as u8 & 0x80 != 0 => "agent",
            _ => "client",
        };
        let (id, length, more) = (head.id, payload.len() as u64, head.more);
        view.frames.push(Frame { frame, offset, from, kind, id, length, more, time: told.time, what: told.what });
    }
}

/// Messages that travel in several frames. One of each kind is on its way at a time.
#[derive(Default)]
struct Parts(BTreeMap<u8, (u64, u64)>);

impl Parts {
    /// Which part of its message a frame is, from 1 on; `None` of a message in one frame.
    fn of(&mut self, head: Head) -> Option<u64> {
        let open = self.0.remove(&(head.kind as u8)).filter(|(id, _)| *id == head.id);
        let part = open.map_or(1, |(_, parts)| parts + 1);
        if head.more {
            self.0.insert(head.kind as u8, (head.id, part));
        }
        (part > 1 || head.more).then_some(part)
    }
}

#[derive(Default)]
struct Told {
    what: String,
    time: Option<String>,
    /// Why a whole message cannot be understood.
    wrong: Option<String>,
}

impl Told {
    fn plain(what: String) -> Told {
        Told { what, ..Told::default() }
    }

    fn wrong(e: &Error) -> Told {
        Told { what: "not understood".to_owned(), time: None, wrong: Some(clean(e.chain())) }
    }
}

fn describe(head: Head, part: Option<u64>, payload: &[u8]) -> Told {
    if let (Some(part), FrameKind::Reply | FrameKind::Error | FrameKind::Failed) = (part, head.kind) {
        return Told::plain(format!("part {part} of a message"));
    }
    match head.kind {
        FrameKind::Request => json::<Request>("request", payload),
        FrameKind::Reply => json::<Reply>("reply", payload),
        FrameKind::Error => match wire::decode::<WireError>("error", payload) {
            Ok(error) => Told::plain(printable(&error.into_error(None).chain(), WHAT_MAX)),
            Err(e) => Told::wrong(&e),
        },
        FrameKind::Progress => match wire::decode::<Progress>("progress", payload) {
            Ok(Progress { words: Some(words), .. }) => Told::plain(printable(&words, WHAT_MAX)),
            Ok(progress) => Told::plain(format!("{} of {} bytes", progress.done_bytes, progress.total_bytes)),
            Err(e) => Told::wrong(&e),
        },
        FrameKind::Failed => match wire::decode::<Failed>("failure", payload) {
            Ok(Failed { replica, error }) => {
                let why = error.into_error(None).chain();
                Told::plain(printable(&format!("replica {}: {why}", replica.0), WHAT_MAX))
            }
            Err(e) => Told::wrong(&e),
        },
        FrameKind::Apply => match Stream::split(payload) {
            Ok((stream, patch)) => {
                let begins = if patch.starts_with(PATCH) { "; a patch begins" } else { "" };
                let (replica, disk) = (stream.replica.0, stream.disk);
                Told::plain(format!(
                    "replica {replica}, disk {disk}: {} of patch{begins}",
                    counted(patch.len() as u64, "byte")
                ))
            }
            Err(e) => Told::wrong(&e),
        },
        FrameKind::Release => match wire::Handle::from_bytes(payload) {
            Ok(replica) => Told::plain(format!("replica {}", replica.0)),
            Err(e) => Told::wrong(&e),
        },
        FrameKind::Nodes => Told::plain(format!("{} of digests", counted(payload.len() as u64, "byte"))),
        FrameKind::Pieces => Told::plain(format!("{} of digests of pieces", counted(payload.len() as u64, "byte"))),
        FrameKind::Attach | FrameKind::Data => {
            let begins = if payload.starts_with(PATCH) { "; a patch begins" } else { "" };
            Told::plain(format!("{} of content{begins}", counted(payload.len() as u64, "byte")))
        }
        FrameKind::Bye | FrameKind::Ping | FrameKind::End => Told::default(),
    }
}

/// A message in JSON: its words in short, and whether this program understands it.
fn json<T: serde::de::DeserializeOwned>(what: &str, payload: &[u8]) -> Told {
    let value = words::of_message(payload).ok().and_then(|clean| serde_json::from_slice::<Value>(&clean).ok());
    let time = value.as_ref().and_then(time_in).map(clean);
    let short = value.as_ref().map(|value| printable(&short(value), WHAT_MAX));
    match wire::decode::<T>(what, payload) {
        Ok(_) => Told { what: short.unwrap_or_default(), time, wrong: None },
        Err(e) => Told { what: short.unwrap_or_else(|| "not understood".to_owned()), time, ..Told::wrong(&e) },
    }
}

/// The first time that a message names.
fn time_in(value: &Value) -> Option<&str> {
    match value {
        Value::Object(fields) => {
            let own = TIMES.iter().find_map(|name| fields.get(*name)?.as_str());
            own.or_else(|| fields.values().find_map(time_in))
        }
        Value::Array(entries) => entries.iter().find_map(time_in),
        _ => None,
    }
}

/// `describe: replica 7`: the name of the message, then its fields; what is nested deeper is counted.
fn short(message: &Value) -> String {
    let Some((name, fields)) = message.as_object().and_then(|message| message.iter().next()) else {
        return message.to_string();
    };
    let fields = fields.as_object().into_iter().flatten().map(|(name, value)| match value {
        Value::Array(entries) => format!("{name} [{}]", entries.len()),
        Value::Object(fields) => {
            format!("{name} {{{}}}", fields.keys().map(String::as_str).collect::<Vec<_>>().join(", "))
        }
        Value::String(text) => format!("{name} {text}"),
        other => format!("{name} {other}"),
    });
    let fields: Vec<String> = fields.collect();
    if fields.is_empty() { name.clone() } else { format!("{name}: {}", fields.join(", ")) }
}

fn name(kind: FrameKind) -> &'static str {
    match kind {
        FrameKind::Request => "Request",
        FrameKind::Apply => "Apply",
        FrameKind::Attach => "Attach",
        FrameKind::Release => "Release",
        FrameKind::Bye => "Bye",
        FrameKind::Ping => "Ping",
        FrameKind::Reply => "Reply",
        FrameKind::Nodes => "Nodes",
        FrameKind::Error => "Error",
        FrameKind::Progress => "Progress",
        FrameKind::Failed => "Failed",
        FrameKind::End => "End",
        FrameKind::Pieces => "Pieces",
        FrameKind::Data => "Data",
    }
}

impl View for WireView {
    fn page(&self, page: &mut Page) {
        page.line("bytes", format!("{}, {} of them in whole messages", self.bytes, self.read));
        if let Some(banner) = &self.banner {
            let BannerSeen { role, protocol, version, before } = banner;
            page.line("banner", format!("of the {role}: protocol {protocol}, version {version}"));
            if !before.is_empty() {
                page.line("", format!("before it: {before}"));
            }
        }
        let kinds = self.kinds.iter().map(|(kind, k)| format!("{} {kind} ({})", k.frames, render::bytes(k.bytes)));
        let kinds: Vec<String> = kinds.collect();
        if !kinds.is_empty() {
            page.line("frames", format!("{}: {}", self.frames.count, kinds.join(", ")));
        }
        page.findings(&self.findings);
        let header = ["Frame", "Offset", "From", "Kind", "Id", "Length", "Time", "What"];
        page.table("frames", (&header, &[0, 1, 4, 5]), &self.frames, |frame| {
            let more = if frame.more { "; goes on" } else { "" };
            vec![
                frame.frame.to_string(),
                frame.offset.to_string(),
                frame.from.to_owned(),
                frame.kind.to_owned(),
                frame.id.to_string(),
                frame.length.to_string(),
                frame.time.clone().unwrap_or_else(|| "-".to_owned()),
                format!("{}{more}", frame.what),
            ]
        });
    }
}
