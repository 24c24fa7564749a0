//! The words between source and agent: a banner in text, then bounded frames.
//!
//! Pure: it turns values into bytes and back over any `Read` and `Write`, and knows no files, threads or clock.
//!
//! Invariants
//! - The version is said first, in text, by both sides; nothing else is ever read as a frame before it.
//! - Every length is checked against a constant before it is allocated.
//! - Control payloads are JSON and tolerate unknown fields; bulk payloads are raw bytes.
//!
//! Format and sequence: docs/formats/wire.md. Fixtures: tests/fixtures/formats/v1/wire-*.

pub mod bringup;
mod bulk;
mod failure;
mod handle;
pub mod plain;
pub mod upkeep;

pub use bulk::{decode_nodes, decode_pieces, encode_nodes, encode_pieces};
pub use failure::{SAME_VERSION, WireContext, WireError, protocol};

pub use crate::agent::wire::handle::Handle;
use crate::block::BlockIndex;
use crate::engine::disk_target::DiskApplied;
use crate::error::{Error, Kind, Result, printable};
use crate::name::{DiskName, DomainName, DomainUuid, PointId};
use crate::replica::root::{StoreSeen, StoreWish};
use crate::replica::source::{Claim, Claimed};
use crate::replica::{Attachment, BeginPoint, Begun, PointView, ReplicaView, SealPoint, VerifyReport};
use crate::words;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{self, BufRead, IoSlice, Read, Write};

/// Changes with every incompatible change of banner, frames, requests or replies. 1: the first.
pub const PROTOCOL: u32 = 1;
/// Version of this program, said in the banner for people; it decides nothing.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 16;
/// Most bulk bytes in one frame.
pub const BULK_MAX: usize = 1 << 20;
/// Largest payload of any frame: bulk bytes and their prefix.
pub const PAYLOAD_MAX: usize = BULK_MAX + 64;
/// Largest JSON request. Smaller than a frame: parsed JSON costs more memory than its text.
pub const REQUEST_MAX: usize = 256 << 10;
/// Largest reply, which may travel in several frames: a view of many thousand points.
pub const REPLY_MAX: usize = 64 << 20;
/// Most bytes before the agent's banner (shell profiles talk) that a client reads past.
pub const JUNK_MAX: usize = 64 << 10;

const BANNER_MAX: usize = 256;
const FLAG_MORE: u8 = 1;
/// Longest words of progress: they fit their frame, however they are escaped.
const WORDS_MAX: usize = 500;

/// Who says a banner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The agent, on the target.
    Agent,
    /// The client, on the source.
    Client,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Role::Agent => "agent",
            Role::Client => "client",
        }
    }
}

/// The first line of either side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Banner {
    /// Version of the protocol that this side speaks. Both sides must speak the same.
    pub protocol: u32,
    /// Of the program, as its package says; at most 64 printable characters.
    pub version: String,
}

impl Banner {
    /// What this program says.
    pub fn ours() -> Banner {
        Banner { protocol: PROTOCOL, version: VERSION.to_owned() }
    }

    /// The line, newline included.
    pub fn line(&self, role: Role) -> String {
        format!("virt-replica {} protocol {} version {}\n", role.word(), self.protocol, self.version)
    }

    /// Finds a banner at the end of a line: a shell profile may have printed words without a newline before it.
    fn parse(role: Role, line: &[u8]) -> Option<Banner> {
        let line = std::str::from_utf8(&line[line.len().saturating_sub(BANNER_MAX)..]).ok()?;
        let start = line.rfind(&format!("virt-replica {} protocol ", role.word()))?;
        let mut words = line[start..].split(' ').skip(3);
        let protocol = words.next()?.parse().ok()?;
        let version = (words.next()? == "version").then(|| words.next())??;
        let version_ok = (1..=64).contains(&version.len()) && version.bytes().all(|b| b.is_ascii_graphic());
        (version_ok && words.next().is_none()).then(|| Banner { protocol, version: version.to_owned() })
    }
}

/// Reads up to and including the other side's banner, past at most `junk_max` bytes of anything else.
/// Whatever came instead of a banner is quoted in the error: `Unavailable` if the other side ended, `Protocol` if it
/// went on talking.
pub fn read_banner(input: &mut impl BufRead, role: Role, junk_max: usize) -> Result<Banner> {
    let mut seen = Vec::new();
    let limit = junk_max + BANNER_MAX;
    loop {
        let start = seen.len();
        let line_ended = read_line(input, &mut seen, limit)?;
        let line = &seen[start..];
        if let (true, Some(banner)) = (line_ended, Banner::parse(role, line.trim_ascii_end())) {
            return Ok(banner);
        }
        if !line_ended {
            let said = printable(&String::from_utf8_lossy(&seen), 300);
            let said = if said.is_empty() { "it said nothing".to_owned() } else { format!("it said: {said}") };
            return Err(match seen.len() >= limit {
                true => Error::new(Kind::Protocol, format!("the {} talks but says no banner; {said}", role.word())),
                false => Error::new(Kind::Unavailable, format!("the {} ended before its banner; {said}", role.word())),
            });
        }
    }
}

/// Appends one line to `seen`; false if the input or the room (`limit` bytes in all) ended first.
fn read_line(input: &mut impl BufRead, seen: &mut Vec<u8>, limit: usize) -> Result<bool> {
    loop {
        let chunk = match input.fill_buf() {
            Ok(chunk) => chunk,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(read_failed(e)),
        };
        let room = limit - seen.len();
        if chunk.is_empty() || room == 0 {
            return Ok(false);
        }
        let chunk = &chunk[..chunk.len().min(room)];
        let newline = chunk.iter().position(|&b| b == b'\n');
        let used = newline.map_or(chunk.len(), |at| at + 1);
        seen.extend_from_slice(&chunk[..used]);
        input.consume(used);
        if newline.is_some() {
            return Ok(true);
        }
    }
}

/// What a frame is. The high bit says that it comes from the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// JSON [`Request`]; answered under the same id.
    Request = 0x01,
    /// [`Stream`], then patch bytes. Not answered.
    Apply = 0x02,
    /// Content of the attachment whose request has this id.
    Attach = 0x03,
    /// A [`Handle`] that is needed no more. Not answered.
    Release = 0x04,
    /// Nothing more will be asked; answered by `End`.
    Bye = 0x05,
    /// "I am alive", from either side, at any time between frames.
    Ping = 0x10,
    /// JSON [`Reply`].
    Reply = 0x81,
    /// Digests, see [`encode_nodes`].
    Nodes = 0x82,
    /// JSON [`WireError`]: the request of this id failed; id 0: the session did, and ends.
    Error = 0x83,
    /// JSON [`Progress`] of the request of this id.
    Progress = 0x84,
    /// JSON [`Failed`]: patches for a replica are no longer applied. Answers nothing; saves the rest of a long send.
    Failed = 0x85,
    /// The agent's last word.
    End = 0x86,
    /// Digests of pieces, see [`encode_pieces`].
    Pieces = 0x87,
    /// Bytes of a stream.
    Data = 0x88,
}

/// For a message about a frame that should not have come.
impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FrameKind::Request => "a frame with a request",
            FrameKind::Apply => "a frame with a piece of a patch",
            FrameKind::Attach => "a frame with an attachment",
            FrameKind::Release => "a frame that releases a handle",
            FrameKind::Bye => "the frame that ends the questions",
            FrameKind::Ping => "a sign of life",
            FrameKind::Reply => "a frame with a reply",
            FrameKind::Nodes => "a frame with digests",
            FrameKind::Error => "a frame with an error",
            FrameKind::Progress => "a frame with progress",
            FrameKind::Failed => "a frame with a failed patch",
            FrameKind::End => "the frame that ends the session",
            FrameKind::Pieces => "a frame with digests of pieces",
            FrameKind::Data => "a frame with data",
        })
    }
}

impl FrameKind {
    fn from_byte(byte: u8) -> Option<FrameKind> {
        use FrameKind::*;
        [Request, Apply, Attach, Release, Bye, Ping, Reply, Nodes, Error, Progress, Failed, End, Pieces, Data]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    fn payload_max(self) -> usize {
        use FrameKind::*;
        match self {
            Request => REQUEST_MAX,
            Apply | Attach | Reply | Nodes | Pieces | Data | Error | Failed => PAYLOAD_MAX,
            Progress => 4 << 10,
            Release => 4,
            Bye | Ping | End => 0,
        }
    }
}

/// A frame's header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Kind of the frame, which also bounds the length of its payload.
    pub kind: FrameKind,
    /// The message goes on in a later frame of the same kind and id.
    pub more: bool,
    /// Number of the request that the frame belongs to; 0 if it belongs to the session as a whole.
    pub id: u64,
}

/// Writes one frame whose payload is these parts, in order; returns the bytes written. After an error the output may
/// hold half a frame and must not be used again.
pub fn write_frame(output: &mut (impl Write + ?Sized), head: Head, prefix: &[u8], payload: &[u8]) -> io::Result<u64> {
    let length = prefix.len() + payload.len();
    assert!(length <= head.kind.payload_max(), "{:?} of {length} bytes was not bounded by its maker", head.kind);
    let mut bytes = [0u8; HEADER_LEN];
    bytes[0..4].copy_from_slice(&(length as u32).to_le_bytes());
    bytes[4] = head.kind as u8;
    bytes[5] = if head.more { FLAG_MORE } else { 0 };
    bytes[8..16].copy_from_slice(&head.id.to_le_bytes());
    let mut slices = [IoSlice::new(&bytes), IoSlice::new(prefix), IoSlice::new(payload)];
    let mut rest = &mut slices[..];
    let mut left = HEADER_LEN + length;
    while left > 0 {
        match output.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                left -= n;
                IoSlice::advance_slices(&mut rest, n);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    output.flush()?;
    Ok((HEADER_LEN + length) as u64)
}

/// Reads one frame, its payload into `payload` (replaced). `None` at an end of input between two frames.
pub fn read_frame(input: &mut impl Read, payload: &mut Vec<u8>) -> Result<Option<Head>> {
    let mut bytes = [0u8; HEADER_LEN];
    loop {
        match input.read(&mut bytes[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(read_failed(e)),
        }
    }
    input.read_exact(&mut bytes[1..]).map_err(read_failed)?;
    let length = u32::from_le_bytes(bytes[0..4].try_into().expect("four bytes")) as usize;
    let id = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
    let kind = FrameKind::from_byte(bytes[4])
        .ok_or_else(|| Error::new(Kind::Protocol, format!("a frame of unknown kind 0x{:02x}", bytes[4])))?;
    if bytes[5] & !FLAG_MORE != 0 || bytes[6..8] != [0, 0] {
        return Err(Error::new(Kind::Protocol, format!("{kind} with unknown flags")));
    }
    if length > kind.payload_max() {
        let max = kind.payload_max();
        return Err(Error::new(Kind::Protocol, format!("{kind} of {length} bytes; at most {max} are allowed")));
    }
    payload.resize(length, 0);
    input.read_exact(payload).map_err(read_failed)?;
    Ok(Some(Head { kind, more: bytes[5] & FLAG_MORE != 0, id }))
}

/// An input error as the caller meets it: silence and a cut are for a retry, the rest is this machine's.
fn read_failed(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::new(Kind::Unavailable, "the connection ended inside a frame").source(error)
        }
        io::ErrorKind::TimedOut => Error::new(Kind::Unavailable, "the other side has fallen silent").source(error),
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe => {
            Error::new(Kind::Unavailable, "the connection was lost").source(error)
        }
        _ => Error::new(Kind::Io, "cannot read from the other side").source(error),
    }
}

/// Where the bytes of an `Apply` frame belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// Replica or plain image that the patch bytes are for.
    pub replica: Handle,
    /// Position of the disk in the request that began the point.
    pub disk: u32,
}

impl Stream {
    /// Bytes of a stream's name at the start of an `Apply` payload.
    pub const LEN: usize = 8;

    /// The stream's name as it travels: handle, then number of the disk, both little-endian.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.replica.to_bytes());
        bytes[4..].copy_from_slice(&self.disk.to_le_bytes());
        bytes
    }

    /// Splits an `Apply` payload into its stream and the patch bytes.
    pub fn split(payload: &[u8]) -> Result<(Stream, &[u8])> {
        let (replica, rest) =
            payload.split_first_chunk().ok_or_else(|| Error::new(Kind::Protocol, "an Apply frame without a stream"))?;
        let (disk, patch) =
            rest.split_first_chunk().ok_or_else(|| Error::new(Kind::Protocol, "an Apply frame without a stream"))?;
        Ok((Stream { replica: Handle(u32::from_le_bytes(*replica)), disk: u32::from_le_bytes(*disk) }, patch))
    }
}

/// What a client asks. Each is answered by the [`Reply`] of the same name (`Nodes` and `Pieces` by digests), or by an
/// error.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Opens the replica of a domain, which need not exist yet. One session may hold 256 replicas and images open.
    Open {
        /// UUID of the domain whose replica is opened.
        uuid: DomainUuid,
    },
    /// Lists the replicas of the store whose domain has this name.
    Find {
        /// Name of the domain; empty for all domains of the store.
        name: String,
    },
    /// Asks for the state of a replica: its points, its generation and the free space.
    Describe {
        /// Replica to describe.
        replica: Handle,
    },
    /// Opens a point above the head, throws away an earlier open point and reserves space.
    Begin {
        /// Replica that gets the point. It must be of the domain that `request` names.
        replica: Handle,
        /// Expected head, generation and disks of the new point.
        request: BeginPoint,
    },
    /// Asks for digests of a disk's tree as the disk is before the patch. Answered by a `Nodes` frame.
    Nodes {
        /// Replica or plain image that the digests are of.
        replica: Handle,
        /// Disk whose digest tree is asked for.
        disk: DiskName,
        /// Level of the tree: 0 for blocks, 1 for groups, and so on.
        level: u8,
        /// Index of the first node within its level.
        start: u64,
        /// Index behind the last node. One request may span at most `NODES_MAX` nodes.
        end: u64,
    },
    /// Numbers of blocks, ascending.
    Pieces {
        /// Replica or plain image that the digests are of.
        replica: Handle,
        /// Disk whose blocks are asked for.
        disk: DiskName,
        /// Numbers of the blocks, ascending; at most `PIECES_MAX` in one request.
        blocks: Vec<BlockIndex>,
    },
    /// Ends the patch of a disk. The agent answers once it has applied all records and compared the root.
    FinishDisk {
        /// Replica or plain image that the patch was for.
        replica: Handle,
        /// Disk whose patch is complete.
        disk: DiskName,
    },
    /// Followed by `Attach` frames with the same id and `length` bytes in all; one attachment at a time.
    Attach {
        /// Replica whose open point gets the attachment.
        replica: Handle,
        /// Which of the known attachments it is.
        name: Attachment,
        /// Length of the content in bytes, at most `ATTACHMENT_MAX`.
        length: u64,
    },
    /// Makes the open point exist. The point is durable when the agent answers.
    Seal {
        /// Replica whose open point is sealed.
        replica: Handle,
        /// Roots, consistency and times of the point. Its disks are exactly those of `Begin`.
        request: SealPoint,
    },
    /// Throws the open point away. Without an open point the request succeeds too.
    Abandon {
        /// Replica whose open point is thrown away.
        replica: Handle,
    },
    /// Reads a point again and compares every block with its digest. `Progress` frames come before the answer.
    Verify {
        /// Replica that has the point.
        replica: Handle,
        /// Point to read again.
        point: PointId,
    },
    /// Asks for work on points that exist, such as prune, pin, scrub or export.
    Upkeep {
        /// Replica whose points the question is about.
        replica: Handle,
        /// Question about the points; its answer is the `Told` of the same name.
        ask: upkeep::UpkeepRequest,
    },
    /// Asks for work on plain images. Refused unless the agent serves images.
    Plain {
        /// Question about plain images; its answer is the `Told` of the same name.
        ask: plain::PlainRequest,
    },
    /// Asks about failover of a domain on the agent's host. Refused unless that host allows failover.
    BringUp {
        /// UUID of the domain to bring up.
        uuid: DomainUuid,
        /// Question about the failover; its answer is the `Told` of the same name.
        ask: bringup::BringUpRequest,
    },
    /// Which source the points are of that are begun from now on.
    Claim {
        /// Replica that the source is going to write to.
        replica: Handle,
        /// Source, its generation, and whether it takes the replica over from another source.
        claim: Claim,
    },
    /// Which store the agent serves. Asked first; an agent that does not know the question has no id to tell.
    Store {
        /// Directory that the source's URL names, and whether the agent may create a store there.
        wish: StoreWish,
    },
}

/// Answer to the request of the same name. It travels under the request's id.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The replica is open.
    Open {
        /// Handle of the replica for the rest of the session.
        replica: Handle,
    },
    /// Domains of the store that have the name.
    Find {
        /// UUID and name of each domain; empty if no domain matches. Several domains may have the same name.
        found: Vec<(DomainUuid, DomainName)>,
    },
    /// State of the replica.
    Describe {
        /// Points, generation and free space. A replica without a run has no points and generation 1.
        view: ReplicaView,
    },
    /// The point is open.
    Begin {
        /// Seeds that the disks start from.
        begun: Option<Begun>,
    },
    /// The patch of the disk is applied, but not durable yet.
    FinishDisk {
        /// Resulting root and the amount that the target wrote.
        applied: DiskApplied,
    },
    /// The open point has the attachment.
    Attach {},
    /// The point exists and is durable.
    Seal {
        /// The new point, which is now the head.
        point: PointView,
    },
    /// The replica has no open point any more.
    Abandon {},
    /// The point was read to its end. Damage is in the report and is no failure of the request.
    Verify {
        /// Damaged blocks and attachments, for each disk of the point.
        report: VerifyReport,
    },
    /// Answer to a question about points that exist.
    Upkeep {
        /// Answer to the `Ask` of the same name.
        told: upkeep::UpkeepReply,
    },
    /// Answer to a question about plain images.
    Plain {
        /// Answer to the `Ask` of the same name.
        told: plain::PlainReply,
    },
    /// Answer to a question about a failover on the agent's host.
    BringUp {
        /// Answer to the `Ask` of the same name.
        told: bringup::BringUpReply,
    },
    /// The replica accepts the source.
    Claim {
        /// How the source came to be the accepted one, and the source before it.
        claimed: Claimed,
    },
    /// The agent serves this store.
    Store {
        /// Directory and id of the store, and whether the agent created it just now.
        store: StoreSeen,
    },
}

/// How far the agent is with a long request. A later message replaces an earlier one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes that are done; 0 where only `words` tell the progress.
    pub done_bytes: u64,
    /// Bytes of the whole work; 0 where only `words` tell the progress.
    pub total_bytes: u64,
    /// What is done now, where that is not told in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words: Option<String>,
}

impl Progress {
    /// Progress in bytes, without words.
    pub fn bytes(done_bytes: u64, total_bytes: u64) -> Progress {
        Progress { done_bytes, total_bytes, words: None }
    }

    /// Progress in words. Longer words are cut to 500 bytes, and control characters are replaced.
    pub fn words(words: &str) -> Progress {
        Progress { words: Some(printable(words, WORDS_MAX)), ..Progress::default() }
    }
}

/// Patches for this replica are dropped from now on, for this reason, until its next `Begin` or `Abandon`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failed {
    /// Replica or plain image whose patch failed.
    pub replica: Handle,
    /// Failure of the patch. The next request that builds on the patch gets it again.
    pub error: WireError,
}

/// JSON of a control message. The types of this module always have one.
pub fn encode(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("plain data with string keys always has JSON")
}

/// A control message out of its JSON. Whatever its fields are: no text in it has a control character, no number is
/// beyond [`words::NUMBER_MAX`].
pub fn decode<T: DeserializeOwned>(what: impl fmt::Display, payload: &[u8]) -> Result<T> {
    let error = || Error::new(Kind::Protocol, format!("cannot understand a {what}")).hint(SAME_VERSION);
    let payload = words::of_message(payload).map_err(|why| error().source(why))?;
    serde_json::from_slice(&payload).map_err(|e| error().source(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::digest::{BlockPieces, Digest, PieceDigest};
    use std::io::Cursor;

    fn frame(kind: FrameKind, id: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Head { kind, more: false, id }, &[], payload).unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Option<(Head, Vec<u8>)>> {
        let mut payload = Vec::new();
        Ok(read_frame(&mut Cursor::new(bytes), &mut payload)?.map(|head| (head, payload)))
    }

    fn fixture(name: &str) -> Vec<u8> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/v1").join(name);
        std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// Kept for ever: what version 0.1.0 says must be understood, byte for byte, by whatever comes later.
    #[test]
    fn golden_banners() {
        let banner = Banner { protocol: 1, version: "0.1.0".to_owned() };
        for (role, name) in [(Role::Agent, "wire-banner-agent.txt"), (Role::Client, "wire-banner-client.txt")] {
            let golden = fixture(name);
            assert_eq!(banner.line(role).as_bytes(), golden);
            assert_eq!(read_banner(&mut &golden[..], role, 0).unwrap(), banner);
        }
    }

    #[test]
    fn golden_frames() {
        let describe = encode(&Request::Describe { replica: Handle(7) });
        assert_eq!(frame(FrameKind::Request, 0x0102, &describe), fixture("wire-frame-describe.bin"));

        let mut apply = Vec::new();
        let head = Head { kind: FrameKind::Apply, more: false, id: u64::MAX };
        let stream = Stream { replica: Handle(7), disk: 1 };
        write_frame(&mut apply, head, &stream.to_bytes(), b"patch").unwrap();
        assert_eq!(apply, fixture("wire-frame-apply.bin"));
        let (read_head, payload) = read(&apply).unwrap().unwrap();
        assert_eq!((read_head, Stream::split(&payload).unwrap()), (head, (stream, &b"patch"[..])));

        let nodes = [Digest::ZERO, Digest::ZERO, Digest([0xab; 32]), Digest::ZERO];
        let payload = encode_nodes(&nodes);
        assert_eq!(frame(FrameKind::Nodes, 3, &payload), fixture("wire-frame-nodes.bin"));
        assert_eq!(decode_nodes(&payload, 4).unwrap(), nodes);

        let payload = encode_pieces(&[pieces("................"), pieces("a..b...........c")]);
        assert_eq!(frame(FrameKind::Pieces, 4, &payload), fixture("wire-frame-pieces.bin"));
    }

    #[test]
    fn the_banner_is_found_behind_what_a_profile_prints() {
        let line = Banner::ours().line(Role::Agent);
        for junk in ["", "Welcome!\nLast login: today\n", "no newline here: ", "virt-replica agent protocol x\n"] {
            let text = format!("{junk}{line}rest");
            let mut input = text.as_bytes();
            assert_eq!(read_banner(&mut input, Role::Agent, JUNK_MAX).unwrap(), Banner::ours(), "{junk:?}");
            assert_eq!(input, b"rest");
        }
        let line_after_much = format!("{}\n{line}", "x".repeat(JUNK_MAX - 1));
        assert!(read_banner(&mut line_after_much.as_bytes(), Role::Agent, JUNK_MAX).is_ok());
        let line_after_too_much = format!("{}\n{line}", "x".repeat(JUNK_MAX + BANNER_MAX));
        let error = read_banner(&mut line_after_too_much.as_bytes(), Role::Agent, JUNK_MAX).unwrap_err();
        assert_eq!(error.kind(), Kind::Protocol);
    }

    #[test]
    fn what_came_instead_of_a_banner_is_quoted_and_harmless() {
        let error =
            read_banner(&mut &b"This account is \x1b[1mnot available.\n"[..], Role::Agent, JUNK_MAX).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.what().ends_with("it said: This account is  [1mnot available."), "{error}");
        let error = read_banner(&mut &b""[..], Role::Agent, JUNK_MAX).unwrap_err();
        assert!(error.what().ends_with("it said nothing"), "{error}");
        // A banner without its newline is a cut one.
        assert!(read_banner(&mut Banner::ours().line(Role::Agent).trim_end().as_bytes(), Role::Agent, 0).is_err());
    }

    #[test]
    fn a_frame_cut_at_any_byte_is_an_error_and_only_nothing_is_an_end() {
        let whole = frame(FrameKind::Request, 1, b"{\"describe\":{\"replica\":0}}");
        assert!(read(&[]).unwrap().is_none());
        for cut in 1..whole.len() {
            assert_eq!(read(&whole[..cut]).unwrap_err().kind(), Kind::Unavailable, "{cut}");
        }
        assert!(read(&whole).unwrap().is_some());
    }

    #[test]
    fn a_header_is_refused_before_anything_is_allocated() {
        let good = frame(FrameKind::Ping, 1, &[]);
        let broken = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            read(&bytes).unwrap_err().what().to_owned()
        };
        assert!(broken(0, 1).contains("a sign of life of 1 bytes"));
        assert!(broken(3, 0xff).contains("at most 0"));
        assert!(broken(4, 0x7f).contains("unknown kind 0x7f"));
        assert!(broken(5, 2).contains("unknown flags"));
        assert!(broken(6, 1).contains("unknown flags"));
        let mut apply = frame(FrameKind::Apply, 1, &[]);
        apply[..4].copy_from_slice(&(PAYLOAD_MAX as u32 + 1).to_le_bytes());
        let mut payload = Vec::new();
        assert!(read_frame(&mut Cursor::new(&apply), &mut payload).is_err());
        assert_eq!(payload.capacity(), 0);
    }

    /// `.` zero, any other letter a digest of that byte.
    fn nodes(notation: &str) -> Vec<Digest> {
        notation.bytes().map(|b| if b == b'.' { Digest::ZERO } else { Digest([b; 32]) }).collect()
    }

    #[test]
    fn nodes_travel_as_runs() {
        for notation in ["", ".", "a", "..a", "ab..", ".a.b.", "........"] {
            let (nodes, bytes) = (nodes(notation), encode_nodes(&nodes(notation)));
            assert_eq!(decode_nodes(&bytes, nodes.len()).unwrap(), nodes, "{notation}");
            assert!(decode_nodes(&bytes, nodes.len() + 1).is_err(), "{notation}");
            for cut in 1..bytes.len().min(40) {
                assert!(decode_nodes(&bytes[..bytes.len() - cut], nodes.len()).is_err(), "{notation} without {cut}");
            }
        }
        assert_eq!(encode_nodes(&nodes(&".".repeat(16384))).len(), 4);
        assert!(decode_nodes(&[0, 0, 0, 0x80], 0).is_err(), "a run of nothing could go on for ever");
        assert!(decode_nodes(&u32::MAX.to_le_bytes(), 5).is_err(), "a run longer than what was asked for");
        let worst: String = ".a".repeat(crate::engine::disk_target::NODES_MAX as usize / 2);
        assert!(encode_nodes(&nodes(&worst)).len() <= PAYLOAD_MAX);
    }

    /// `.` zero, any other letter a digest of that byte.
    fn pieces(notation: &str) -> BlockPieces {
        let digest = |b| if b == b'.' { PieceDigest::ZERO } else { PieceDigest([b; 16]) };
        notation.bytes().map(digest).collect::<Vec<_>>().try_into().unwrap()
    }

    #[test]
    fn pieces_travel_behind_their_masks() {
        let blocks =
            ["................", "a...............", "...............z", "abcdefghijklmnop", "................"]
                .map(pieces);
        let bytes = encode_pieces(&blocks);
        assert_eq!(bytes.len(), 5 * 2 + 18 * 16);
        assert_eq!(decode_pieces(&bytes, 5).unwrap(), blocks);
        for cut in 0..bytes.len() {
            assert_eq!(decode_pieces(&bytes[..cut], 5).unwrap_err().kind(), Kind::Protocol, "{cut}");
        }
        assert!(decode_pieces(&bytes, 4).is_err() && decode_pieces(&bytes, 6).is_err());
        assert!(decode_pieces(&[], 0).unwrap().is_empty());
        let most = vec![pieces("abcdefghijklmnop"); crate::engine::disk_target::PIECES_MAX];
        assert!(encode_pieces(&most).len() <= BULK_MAX, "one frame");
        let request = Request::Pieces {
            replica: Handle(u32::MAX),
            disk: DiskName::new("v".repeat(32)).unwrap(),
            blocks: vec![BlockIndex(u64::MAX); crate::engine::disk_target::PIECES_MAX],
        };
        assert!(encode(&request).len() <= REQUEST_MAX);
    }

    #[test]
    fn an_error_keeps_kind_place_hint_and_cause() {
        let error = Error::io("cannot write", "/p/vda.qcow2", io::Error::from_raw_os_error(28))
            .offset(65536)
            .disk("vda")
            .hint("make room");
        let json = encode(&WireError::from(&error));
        let there: WireError = decode("error", &json).unwrap();
        let there = there.into_error(Some("b"));
        assert_eq!(there.kind(), Kind::Space);
        assert_eq!(there.to_string(), "disk 'vda': on b: cannot write (/p/vda.qcow2) at byte 65536");
        assert_eq!(there.hint_text(), Some("make room"));
        assert!(there.chain().ends_with("No space left on device (os error 28)"), "{}", there.chain());
    }

    /// A peer of 0.1 shows the words; one that knows the advice gets the facts, and words them itself.
    #[test]
    fn an_advice_travels_as_facts_beside_its_words() {
        let words: crate::error::Words = |advice, about| format!("{advice:?} of {}", about.point.as_deref().unwrap());
        let error = Error::new(Kind::Refused, "a pin of its operator's").point("000007-0123abcd");
        let error = error.advise(crate::error::advice::Store::UnpinThere);
        let told = encode(&WireError::from(&error).spoken(Some(words)));
        assert_eq!(String::from_utf8(told.clone()).unwrap().as_bytes(), fixture("wire-error-advice.json").trim_ascii());
        let there = decode::<WireError>("error", &told).unwrap().into_error(Some("b"));
        assert_eq!(there.advice(), Some(&crate::error::advice::Store::UnpinThere.into()));
        // What an older peer reads of it.
        let old: serde_json::Value = serde_json::from_slice(&told).unwrap();
        assert_eq!(old["hint"], "Store(UnpinThere) of 000007-0123abcd");
        // A program without words sends the facts alone.
        let silent = WireError::from(&error).spoken(None);
        assert!(silent.hint.is_none() && silent.advice.is_some());
    }

    #[test]
    fn an_error_of_an_older_or_a_newer_peer_keeps_its_words() {
        for name in ["wire-error.json", "wire-error-newer.json"] {
            let error = decode::<WireError>("error", &fixture(name)).unwrap().into_error(None);
            assert_eq!((error.kind(), error.hint_text()), (Kind::Refused, Some("unpin it there")), "{name}");
        }
        // Plain words go as ever: what version 0.1.0 says is said byte for byte.
        let error =
            Error::new(Kind::Refused, "a pin of its operator's").point("000007-0123abcd").hint("unpin it there");
        assert_eq!(encode(&WireError::from(&error).spoken(None)), fixture("wire-error.json").trim_ascii());
    }

    /// A target that lies: whatever the field, nothing of it reaches a terminal as more than text, and no number
    /// overflows.
    #[test]
    fn words_of_a_peer_are_clean_and_its_numbers_bounded_whatever_the_field() {
        let bad = r"\u001b[2J\u0007\r\u009b31m";
        let view = format!(
            r#"{{"describe":{{"view":{{"generation":1,"free_bytes":1,"path":"/x/{bad}","points":[{{"id":"000001-00000000",
            "generation":1,"frozen_at":"2026-11-30T20:00:00Z","sealed_at":"2026-11-30T20:00:00Z","consistency":"crash",
            "consistency_reason":"{bad}","run":"0000000000000001","disks":[{{"name":"vda","image":"/x/{bad}","size":1,
            "root":"{root}","mode":"full","reason":"{bad}","bytes_read":1,"bytes_sent":1,"bytes_written":1,
            "compression":{{"compressed_bytes":1,"stored_bytes":1,"trials":1,"reason":"{bad}"}}}}]}}]}}}}}}"#,
            root = "00".repeat(32)
        );
        let lease = r#"{"point":"000001-00000000","owner":"BAD","purpose":"BAD","since":"2026-11-30T20:00:00Z","expires":"2026-11-30T20:00:00Z"}"#;
        let holds = format!(
            r#"{{"upkeep":{{"told":{{"holds":{{"holds":{{"now":"2026-11-30T20:00:00Z","min_age_s":1,"leases":[{lease}],"links":[],
            "depth":1,"depth_max":1,"pins":[{{"point":"000001-00000000","reason":"BAD","since":"2026-11-30T20:00:00Z"}}]}}}}}}}}}}"#
        )
        .replace("BAD", bad);
        for json in [&view, &holds] {
            let reply: Reply = decode("reply", json.as_bytes()).unwrap();
            let said = String::from_utf8(encode(&reply)).unwrap();
            assert!(said.contains("[2J") && !said.contains(r"\u00") && !said.contains(r"\r"), "{said}");
            assert!(!said.chars().any(char::is_control), "{said}");
            for number in
                [r#""min_age_s":1"#, r#""free_bytes":1"#, r#""bytes_sent":1"#, r#""generation":1"#, r#""size":1"#]
            {
                let large = json.replace(number, &number.replace(":1", ":18446744073709551615"));
                assert!(large == *json || decode::<Reply>("reply", large.as_bytes()).is_err(), "{number}");
            }
        }
    }

    /// A newer agent may know kinds and fields that this side does not.
    #[test]
    fn an_error_from_a_newer_side_is_still_an_error() {
        let json = br#"{"kind":"tired","what":"no\u001b[2J","context":{"mood":"bad"},"since":5}"#;
        let error: WireError = decode("error", json).unwrap();
        let error = error.into_error(Some("b"));
        assert_eq!((error.kind(), error.what()), (Kind::Refused, "on b: no [2J"));
    }

    #[test]
    fn names_pass_their_gates_on_the_way_in() {
        for bad in
            [r#"{"open":{"uuid":"../../etc"}}"#, r#"{"finish_disk":{"replica":0,"disk":"../x"}}"#, r#"{"rm":{}}"#]
        {
            assert_eq!(decode::<Request>("request", bad.as_bytes()).unwrap_err().kind(), Kind::Protocol, "{bad}");
        }
    }
}
