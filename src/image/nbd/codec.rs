//! The NBD protocol as a client speaks it: bytes in and out of any stream, no sockets.
//!
//! Fixed newstyle negotiation, structured replies, metadata contexts, block sizes. Everything the server says is
//! bounded before it is believed: a reply fits the request it answers, byte for byte, or the connection is at an end.
//!
//! Specified in the NBD project's doc/proto.md.

use crate::error::{Error, Kind, Result};
use std::io::{Read, Write};

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, no zeroes.
const HANDSHAKE: u16 = 0b11;

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;

const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;
const CHUNK_DONE: u16 = 1;

/// Longest string in the protocol, by its specification.
const STRING_MAX: usize = 4096;
/// Longest reply to an option, and most replies to one: ours answer with a few short ones.
const OPTION_REPLY_MAX: u32 = 2 * STRING_MAX as u32;
const OPTION_REPLIES_MAX: usize = 64;
/// Most extents in one reply; QEMU stops there too.
const DESCRIPTORS_MAX: usize = 128 << 10;
/// Most separate pieces in which the bytes of one read may arrive out of order.
const PIECES_MAX: usize = 64 << 10;

/// Most chunks in one reply: the pieces, and a few that carry no bytes.
const CHUNKS_MAX: usize = PIECES_MAX + 64;

/// Bits of [`Export::flags`].
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// The server accepts `Flush`.
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// The server accepts `Trim`.
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// The server accepts `WriteZeroes`.
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Several connections see the same content; a flush on one of them covers all.
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// Type of a request, by its number in the NBD protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read bytes.
    Read = 0,
    /// Write bytes.
    Write = 1,
    /// End the connection. The server sends no reply.
    Disconnect = 2,
    /// Make all finished writes durable.
    Flush = 3,
    /// Give up the content of a range. Later reads of it may bring anything.
    Trim = 4,
    /// Make a range read as zeros, without sending them.
    WriteZeroes = 6,
    /// Ask for the extents of a range in the negotiated metadata contexts.
    BlockStatus = 7,
}

/// What the server said of the export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Size of the export in bytes.
    pub size: u64,
    /// Transmission flags of the server, the `FLAG_` constants.
    pub flags: u16,
    /// Requests are aligned to this, a power of two.
    pub block_min: u32,
    /// Most bytes that one read or write may carry.
    pub block_max: u32,
    /// The metadata contexts asked for, with the id the server gave each.
    pub contexts: Vec<(String, u32)>,
}

impl Export {
    /// True if the server set this flag, one of the `FLAG_` constants.
    pub fn offers(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Id that the server gave to the metadata context of this name. `None`: it was not negotiated.
    pub fn context_id(&self, name: &str) -> Option<u32> {
        self.contexts.iter().find(|(n, _)| n == name).map(|(_, id)| *id)
    }
}

/// One extent of a block status reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Length of the extent in bytes. Extents follow one another without gaps.
    pub len: u32,
    /// Flags of the extent, whose meaning the metadata context defines.
    pub flags: u32,
}

/// The server could not do what was asked; the connection goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerError {
    /// Error number as Linux has it.
    pub errno: i32,
    /// Text of the server; empty if it sent none.
    pub message: String,
}

impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.errno))?;
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ServerError {}

/// What the reply to a request has to bring.
pub enum Expect<'a> {
    /// Success or an error, and no content.
    Nothing,
    /// Every byte of `buf`, read from `offset`.
    Data {
        /// Offset in the disk of the first byte of `buf`.
        offset: u64,
        /// Buffer for the bytes; its length is the length of the request.
        buf: &'a mut [u8],
    },
    /// Extents of the context `id`; those of other contexts are read and dropped.
    Status {
        /// Id of the metadata context whose extents are wanted.
        id: u32,
        /// List that the extents are added to, in order.
        into: &'a mut Vec<Descriptor>,
    },
}

/// Negotiates an export. Fails unless the server speaks structured replies and offers every context in `contexts`.
pub fn negotiate<S: Read + Write>(stream: &mut S, export: &str, contexts: &[String]) -> Result<Export> {
    if export.len() > STRING_MAX || contexts.iter().any(|c| c.len() > STRING_MAX) {
        return Err(Error::new(Kind::Usage, "an NBD name is longer than 4096 bytes"));
    }
    if read_u64(stream)? != INIT_MAGIC || read_u64(stream)? != OPTION_MAGIC {
        return Err(protocol("the server does not speak newstyle NBD"));
    }
    if read_u16(stream)? & HANDSHAKE != HANDSHAKE {
        return Err(protocol("the server does not speak fixed newstyle NBD"));
    }
    write_all(stream, &u32::from(HANDSHAKE).to_be_bytes())?;

    option(stream, OPT_STRUCTURED_REPLY, &[])?;
    option_replies(stream, OPT_STRUCTURED_REPLY, |_, _| Err(protocol("the server answers an option with nonsense")))?;

    let contexts = if contexts.is_empty() { Vec::new() } else { set_contexts(stream, export, contexts)? };
    go(stream, export, contexts)
}

fn set_contexts<S: Read + Write>(stream: &mut S, export: &str, wanted: &[String]) -> Result<Vec<(String, u32)>> {
    let mut body = Vec::new();
    put_string(&mut body, export);
    body.extend((wanted.len() as u32).to_be_bytes());
    wanted.iter().for_each(|name| put_string(&mut body, name));
    option(stream, OPT_SET_META_CONTEXT, &body)?;

    let mut got: Vec<(String, u32)> = Vec::new();
    option_replies(stream, OPT_SET_META_CONTEXT, |kind, body| {
        let (id, name) = body
            .split_at_checked(4)
            .filter(|_| kind == REP_META_CONTEXT)
            .ok_or_else(|| protocol("the server answers a request for metadata contexts with something else"))?;
        let id = u32::from_be_bytes(id.try_into().expect("four bytes"));
        let name = String::from_utf8_lossy(name).into_owned();
        if !wanted.contains(&name) || got.iter().any(|(n, i)| *n == name || *i == id) {
            return Err(protocol("the server offers a metadata context nobody asked for, or twice"));
        }
        got.push((name, id));
        Ok(())
    })?;
    match wanted.iter().find(|name| !got.iter().any(|(n, _)| n == *name)) {
        Some(missing) => Err(Error::new(Kind::Refused, format!("the NBD server does not offer '{missing}'"))),
        None => Ok(got),
    }
}

fn go<S: Read + Write>(stream: &mut S, name: &str, contexts: Vec<(String, u32)>) -> Result<Export> {
    let mut body = Vec::new();
    put_string(&mut body, name);
    body.extend(1u16.to_be_bytes());
    body.extend(INFO_BLOCK_SIZE.to_be_bytes());
    option(stream, OPT_GO, &body)?;

    let mut size = None;
    // What a client has to assume of a server that does not say.
    let (mut block_min, mut block_max) = (512u32, 32u32 << 20);
    option_replies(stream, OPT_GO, |kind, body| {
        let (what, info) = body
            .split_at_checked(2)
            .filter(|_| kind == REP_INFO)
            .ok_or_else(|| protocol("the server describes the export in a way unknown to us"))?;
        match (u16::from_be_bytes(what.try_into().expect("two bytes")), info.len()) {
            (INFO_EXPORT, 10) => size = Some((be64(info), u16::from_be_bytes([info[8], info[9]]))),
            (INFO_BLOCK_SIZE, 12) => (block_min, block_max) = (be32(info), be32(&info[8..])),
            (INFO_EXPORT | INFO_BLOCK_SIZE, _) => {
                return Err(protocol("the server describes the export in a wrong length"));
            }
            _ => {}
        }
        Ok(())
    })?;
    let (size, flags) = size.ok_or_else(|| protocol("the server does not say how large the export is"))?;
    if i64::try_from(size).is_err() || !block_min.is_power_of_two() || block_min > 64 << 10 || block_max < block_min {
        return Err(protocol("the server describes an impossible export"));
    }
    Ok(Export { size, flags, block_min, block_max, contexts })
}

fn option<W: Write>(stream: &mut W, option: u32, body: &[u8]) -> Result<()> {
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend(option.to_be_bytes());
    message.extend((body.len() as u32).to_be_bytes());
    message.extend(body);
    write_all(stream, &message)
}

/// Reads the replies to an option until its acknowledgement; every other one goes to `each`.
fn option_replies<R: Read>(stream: &mut R, option: u32, mut each: impl FnMut(u32, &[u8]) -> Result<()>) -> Result<()> {
    for _ in 0..OPTION_REPLIES_MAX {
        if read_u64(stream)? != OPTION_REPLY_MAGIC || read_u32(stream)? != option {
            return Err(protocol("the server answers an option that was not asked"));
        }
        let kind = read_u32(stream)?;
        let len = read_u32(stream)?;
        if len > OPTION_REPLY_MAX {
            return Err(protocol("the server answers an option at too great a length"));
        }
        let mut body = vec![0; len as usize];
        read_exact(stream, &mut body)?;
        if kind & REP_ERROR != 0 {
            let text = String::from_utf8_lossy(&body);
            let what = format!("the NBD server refused option {option} (error {}): {text}", kind & !REP_ERROR);
            return Err(Error::new(Kind::Refused, what));
        }
        if kind == REP_ACK {
            return Ok(());
        }
        each(kind, &body)?;
    }
    Err(protocol("the server does not stop answering an option"))
}

/// Writes the head of a request; the bytes of a write follow it.
pub fn request<W: Write>(stream: &mut W, command: Command, cookie: u64, offset: u64, len: u32) -> Result<()> {
    let mut head = [0u8; 28];
    head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    head[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..24].copy_from_slice(&offset.to_be_bytes());
    head[24..].copy_from_slice(&len.to_be_bytes());
    write_all(stream, &head)
}

/// Reads the whole reply to the request `cookie`, the only one in flight.
///
/// The outer error ends the connection: the streams are no longer in step. The inner one is the server's answer.
pub fn reply<R: Read>(stream: &mut R, cookie: u64, mut expect: Expect<'_>) -> Result<Result<(), ServerError>> {
    let mut failure: Option<ServerError> = None;
    let mut covered = Covered::default();
    let mut chunks = 0;
    loop {
        chunks += 1;
        if chunks > CHUNKS_MAX {
            return Err(protocol("the server's reply does not end"));
        }
        let magic = read_u32(stream)?;
        if magic == SIMPLE_MAGIC {
            let errno = read_u32(stream)? as i32;
            same_cookie(read_u64(stream)?, cookie)?;
            return match (errno, &expect) {
                (0, Expect::Nothing) => Ok(Ok(())),
                (0, _) => Err(protocol("the server answers a read with a simple reply")),
                _ => Ok(Err(ServerError { errno, message: String::new() })),
            };
        }
        if magic != STRUCTURED_MAGIC {
            return Err(protocol("the server's reply does not begin as one"));
        }
        let flags = read_u16(stream)?;
        let kind = read_u16(stream)?;
        same_cookie(read_u64(stream)?, cookie)?;
        let len = read_u32(stream)?;
        let done = flags & CHUNK_DONE != 0;
        if kind & CHUNK_ERROR != 0 {
            let error = error_chunk(stream, len)?;
            failure.get_or_insert(error);
        } else {
            chunk(stream, kind, len, done, &mut expect, &mut covered)?;
        }
        if done {
            break;
        }
    }
    match (failure, &expect) {
        (Some(error), _) => Ok(Err(error)),
        (None, Expect::Data { buf, .. }) if !covered.is(buf.len()) => {
            Err(protocol("the server left out bytes of a read"))
        }
        (None, Expect::Status { into, .. }) if into.is_empty() => Err(protocol("the server left out the block status")),
        _ => Ok(Ok(())),
    }
}

fn chunk<R: Read>(
    stream: &mut R,
    kind: u16,
    len: u32,
    done: bool,
    expect: &mut Expect<'_>,
    covered: &mut Covered,
) -> Result<()> {
    match (kind, expect) {
        (CHUNK_NONE, _) if len == 0 && done => Ok(()),
        (CHUNK_DATA, Expect::Data { offset, buf }) if len > 8 => {
            let at = read_u64(stream)?;
            read_exact(stream, covered.take(*offset, buf, at, len - 8)?)
        }
        (CHUNK_HOLE, Expect::Data { offset, buf }) if len == 12 => {
            let at = read_u64(stream)?;
            let hole_len = read_u32(stream)?;
            covered.take(*offset, buf, at, hole_len)?.fill(0);
            Ok(())
        }
        (CHUNK_STATUS, Expect::Status { id, into }) if len >= 12 && (len - 4).is_multiple_of(8) => {
            let count = (len as usize - 4) / 8;
            if count > DESCRIPTORS_MAX {
                return Err(protocol("the server sends too many extents at once"));
            }
            let ours = read_u32(stream)? == *id;
            if ours && !into.is_empty() {
                return Err(protocol("the server sends the same block status twice"));
            }
            for _ in 0..count {
                let descriptor = Descriptor { len: read_u32(stream)?, flags: read_u32(stream)? };
                if descriptor.len == 0 {
                    return Err(protocol("the server sends an empty extent"));
                }
                if ours {
                    into.push(descriptor);
                }
            }
            Ok(())
        }
        _ => Err(protocol("the server's reply does not fit the request")),
    }
}

/// Reads the body of an error chunk: number, message, and whatever its type adds.
fn error_chunk<R: Read>(stream: &mut R, len: u32) -> Result<ServerError> {
    if !(6..=6 + STRING_MAX as u32 + 8).contains(&len) {
        return Err(protocol("the server sends an error of impossible length"));
    }
    let mut body = vec![0; len as usize];
    read_exact(stream, &mut body)?;
    let message_len = u16::from_be_bytes([body[4], body[5]]) as usize;
    let message = body[6..].get(..message_len).ok_or_else(|| protocol("the server's error message is cut off"))?;
    // Zero would be no error; the server says that it is one.
    let errno = i32::try_from(be32(&body)).ok().filter(|e| *e != 0).unwrap_or(5);
    Ok(ServerError { errno, message: String::from_utf8_lossy(message).into_owned() })
}

/// Which bytes of a read have arrived: ranges in order, neighbours merged. Servers answer in order, so it stays at one.
#[derive(Default)]
struct Covered(Vec<(usize, usize)>);

impl Covered {
    /// The part of `buf` (read from `offset`) that a chunk at `at` fills; each byte at most once.
    fn take<'a>(&mut self, offset: u64, buf: &'a mut [u8], at: u64, len: u32) -> Result<&'a mut [u8]> {
        let outside = || protocol("the server sends bytes that were not asked for");
        let start = usize::try_from(at.checked_sub(offset).ok_or_else(outside)?).map_err(|_| outside())?;
        let end =
            start.checked_add(len as usize).filter(|end| *end <= buf.len() && *end > start).ok_or_else(outside)?;
        let place = self.0.partition_point(|(s, _)| *s < start);
        let overlaps_left = place > 0 && self.0[place - 1].1 > start;
        let overlaps_right = self.0.get(place).is_some_and(|(s, _)| *s < end);
        if overlaps_left || overlaps_right || self.0.len() >= PIECES_MAX {
            return Err(protocol("the server sends the same bytes twice, or in too many pieces"));
        }
        if place > 0 && self.0[place - 1].1 == start {
            self.0[place - 1].1 = end;
        } else {
            self.0.insert(place, (start, end));
        }
        Ok(&mut buf[start..end])
    }

    fn is(&self, len: usize) -> bool {
        self.0.iter().map(|(s, e)| e - s).sum::<usize>() == len
    }
}

fn same_cookie(got: u64, sent: u64) -> Result<()> {
    if got == sent { Ok(()) } else { Err(protocol("the server answers a request that was not made")) }
}

fn protocol(what: &'static str) -> Error {
    Error::new(Kind::Protocol, what)
}

fn put_string(body: &mut Vec<u8>, text: &str) {
    body.extend((text.len() as u32).to_be_bytes());
    body.extend(text.as_bytes());
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}

fn read_u16<R: Read>(stream: &mut R) -> Result<u16> {
    let mut bytes = [0; 2];
    read_exact(stream, &mut bytes).map(|()| u16::from_be_bytes(bytes))
}

fn read_u32<R: Read>(stream: &mut R) -> Result<u32> {
    let mut bytes = [0; 4];
    read_exact(stream, &mut bytes).map(|()| u32::from_be_bytes(bytes))
}

fn read_u64<R: Read>(stream: &mut R) -> Result<u64> {
    let mut bytes = [0; 8];
    read_exact(stream, &mut bytes).map(|()| u64::from_be_bytes(bytes))
}

fn read_exact<R: Read>(stream: &mut R, buf: &mut [u8]) -> Result<()> {
    stream.read_exact(buf).map_err(stream_error)
}

/// Writes all bytes to the server. `Unavailable` if the server hung up, `Interrupted` if it does not take them in
/// time.
pub fn write_all<W: Write>(stream: &mut W, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).map_err(stream_error)
}

/// The stream failed under the protocol.
fn stream_error(e: std::io::Error) -> Error {
    use std::io::ErrorKind::*;
    match e.kind() {
        UnexpectedEof | BrokenPipe | ConnectionReset | WriteZero => {
            Error::new(Kind::Unavailable, "the NBD server hung up").source(e)
        }
        WouldBlock | TimedOut => Error::new(Kind::Interrupted, "the NBD server does not answer").source(e),
        _ => Error::from_io("cannot talk to the NBD server", e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One end of a conversation: what the server will say, and what it was told.
    struct Script {
        says: std::io::Cursor<Vec<u8>>,
        heard: Vec<u8>,
    }

    impl Script {
        fn new(says: Vec<u8>) -> Self {
            Self { says: std::io::Cursor::new(says), heard: Vec::new() }
        }
    }

    impl Read for Script {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            self.says.read(buf)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.heard.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn bytes(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    fn option_reply(option: u32, kind: u32, body: &[u8]) -> Vec<u8> {
        bytes(&[
            &OPTION_REPLY_MAGIC.to_be_bytes(),
            &option.to_be_bytes(),
            &kind.to_be_bytes(),
            &(body.len() as u32).to_be_bytes(),
            body,
        ])
    }

    fn greeting() -> Vec<u8> {
        bytes(&[&INIT_MAGIC.to_be_bytes(), &OPTION_MAGIC.to_be_bytes(), &HANDSHAKE.to_be_bytes()])
    }

    fn export_info(size: u64, flags: u16) -> Vec<u8> {
        bytes(&[&INFO_EXPORT.to_be_bytes(), &size.to_be_bytes(), &flags.to_be_bytes()])
    }

    fn block_info(min: u32, max: u32) -> Vec<u8> {
        bytes(&[&INFO_BLOCK_SIZE.to_be_bytes(), &min.to_be_bytes(), &4096u32.to_be_bytes(), &max.to_be_bytes()])
    }

    fn context(id: u32, name: &str) -> Vec<u8> {
        option_reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, &bytes(&[&id.to_be_bytes(), name.as_bytes()]))
    }

    fn whole_negotiation() -> Vec<u8> {
        bytes(&[
            &greeting(),
            &option_reply(OPT_STRUCTURED_REPLY, REP_ACK, &[]),
            &context(7, "base:allocation"),
            &option_reply(OPT_SET_META_CONTEXT, REP_ACK, &[]),
            &option_reply(OPT_GO, REP_INFO, &export_info(1 << 20, FLAG_READ_ONLY)),
            &option_reply(OPT_GO, REP_INFO, &block_info(1, 32 << 20)),
            &option_reply(OPT_GO, REP_INFO, &bytes(&[&99u16.to_be_bytes(), b"of the future"])),
            &option_reply(OPT_GO, REP_ACK, &[]),
        ])
    }

    fn wanted() -> Vec<String> {
        vec!["base:allocation".to_owned()]
    }

    fn structured(flags: u16, kind: u16, body: &[u8]) -> Vec<u8> {
        bytes(&[
            &STRUCTURED_MAGIC.to_be_bytes(),
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &1u64.to_be_bytes(),
            &(body.len() as u32).to_be_bytes(),
            body,
        ])
    }

    fn data(at: u64, payload: &[u8]) -> Vec<u8> {
        bytes(&[&at.to_be_bytes(), payload])
    }

    fn hole(at: u64, len: u32) -> Vec<u8> {
        bytes(&[&at.to_be_bytes(), &len.to_be_bytes()])
    }

    fn status(id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
        let mut body = id.to_be_bytes().to_vec();
        for (len, flags) in extents {
            body.extend(len.to_be_bytes());
            body.extend(flags.to_be_bytes());
        }
        body
    }

    /// Reads 4 bytes from 100 out of these chunks.
    fn read4(chunks: &[Vec<u8>]) -> Result<Result<[u8; 4], ServerError>> {
        let mut buf = [0xee; 4];
        let stream = chunks.concat();
        let outcome = reply(&mut stream.as_slice(), 1, Expect::Data { offset: 100, buf: &mut buf })?;
        Ok(outcome.map(|()| buf))
    }

    #[test]
    fn a_whole_negotiation_yields_the_export() {
        let mut script = Script::new(whole_negotiation());
        let export = negotiate(&mut script, "vda", &wanted()).unwrap();
        assert_eq!((export.size, export.block_min, export.block_max), (1 << 20, 1, 32 << 20));
        assert_eq!(export.context_id("base:allocation"), Some(7));
        assert!(export.offers(FLAG_READ_ONLY) && !export.offers(FLAG_SEND_TRIM));
        assert!(script.heard.windows(3).any(|w| w == b"vda"));
    }

    #[test]
    fn a_negotiation_torn_at_any_byte_is_an_error() {
        let whole = whole_negotiation();
        for cut in 0..whole.len() {
            let error = negotiate(&mut Script::new(whole[..cut].to_vec()), "", &wanted()).unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable, "cut at {cut}");
        }
    }

    #[test]
    fn a_negotiation_with_any_byte_wrong_never_panics_and_allocates_little() {
        let whole = whole_negotiation();
        for at in 0..whole.len() {
            for flip in [0x01u8, 0x80, 0xff] {
                let mut wrong = whole.clone();
                wrong[at] ^= flip;
                let _ = negotiate(&mut Script::new(wrong), "", &wanted());
            }
        }
    }

    #[test]
    fn a_missing_context_and_a_refusal_are_named() {
        let start = bytes(&[&greeting(), &option_reply(OPT_STRUCTURED_REPLY, REP_ACK, &[])]);
        let none = bytes(&[&start, &option_reply(OPT_SET_META_CONTEXT, REP_ACK, &[])]);
        let error = negotiate(&mut Script::new(none), "", &wanted()).unwrap_err();
        assert!(error.what().contains("base:allocation"), "{error}");
        let no = bytes(&[&start, &option_reply(OPT_SET_META_CONTEXT, REP_ERROR | 6, b"no such export")]);
        let error = negotiate(&mut Script::new(no), "", &wanted()).unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        assert!(error.what().contains("no such export"), "{error}");
    }

    #[test]
    fn impossible_exports_and_endless_answers_are_refused() {
        let start = bytes(&[&greeting(), &option_reply(OPT_STRUCTURED_REPLY, REP_ACK, &[])]);
        let ack = option_reply(OPT_GO, REP_ACK, &[]);
        let info = |body: &[u8]| option_reply(OPT_GO, REP_INFO, body);
        let size = info(&export_info(4096, 0));
        for (name, rest) in [
            ("no size", ack.clone()),
            ("size", bytes(&[&info(&export_info(u64::MAX, 0)), &ack])),
            ("minimum 0", bytes(&[&size, &info(&block_info(0, 4096)), &ack])),
            ("minimum 3", bytes(&[&size, &info(&block_info(3, 4096)), &ack])),
            ("maximum", bytes(&[&size, &info(&block_info(4096, 512)), &ack])),
            ("length", bytes(&[&info(&export_info(4096, 0)[..9]), &ack])),
            ("other option", option_reply(OPT_STRUCTURED_REPLY, REP_ACK, &[])),
            ("endless", size.repeat(OPTION_REPLIES_MAX + 1)),
            ("huge", bytes(&[&OPTION_REPLY_MAGIC.to_be_bytes(), &[0, 0, 0, 7, 0, 0, 0, 3], &u32::MAX.to_be_bytes()])),
        ] {
            let error = negotiate(&mut Script::new(bytes(&[&start, &rest])), "", &[]).unwrap_err();
            assert_eq!(error.kind(), Kind::Protocol, "{name}: {error}");
        }
    }

    #[test]
    fn a_read_may_arrive_in_pieces_and_in_any_order() {
        let chunks = [structured(0, CHUNK_HOLE, &hole(102, 2)), structured(1, CHUNK_DATA, &data(100, b"ab"))];
        assert_eq!(read4(&chunks).unwrap().unwrap(), *b"ab\0\0");
        let end = structured(1, CHUNK_NONE, &[]);
        let one = structured(0, CHUNK_DATA, &data(100, b"abcd"));
        assert_eq!(read4(&[one, end]).unwrap().unwrap(), *b"abcd");
    }

    #[test]
    fn hostile_replies_to_a_read_end_the_connection() {
        let full = structured(0, CHUNK_DATA, &data(100, b"abcd"));
        let end = structured(1, CHUNK_NONE, &[]);
        for (name, chunks) in [
            ("missing bytes", vec![structured(1, CHUNK_DATA, &data(100, b"abc"))]),
            ("nothing", vec![end.clone()]),
            ("before", vec![structured(1, CHUNK_DATA, &data(99, b"abcd"))]),
            ("behind", vec![structured(1, CHUNK_DATA, &data(101, b"abcd"))]),
            ("far behind", vec![structured(1, CHUNK_DATA, &data(u64::MAX, b"abcd"))]),
            ("twice", vec![full.clone(), full.clone(), end.clone()]),
            ("overlap", vec![structured(0, CHUNK_DATA, &data(101, b"bcd")), structured(1, CHUNK_HOLE, &hole(100, 2))]),
            ("huge hole", vec![structured(1, CHUNK_HOLE, &hole(100, u32::MAX))]),
            ("empty hole", vec![structured(0, CHUNK_HOLE, &hole(100, 0)), full.clone(), end.clone()]),
            ("status", vec![structured(1, CHUNK_STATUS, &status(1, &[(4, 0)]))]),
            ("unfinished none", vec![structured(0, CHUNK_NONE, &[]), full.clone()]),
            ("unknown", vec![structured(1, 77, b"xxxx")]),
            ("simple", vec![bytes(&[&SIMPLE_MAGIC.to_be_bytes(), &0u32.to_be_bytes(), &1u64.to_be_bytes()])]),
            ("magic", vec![b"HTTP/1.1 400".to_vec()]),
        ] {
            let error = read4(&chunks).unwrap_err();
            assert_eq!(error.kind(), Kind::Protocol, "{name}: {error}");
        }
        let mut other = full.clone();
        other[15] = 9;
        assert_eq!(read4(&[other, end]).unwrap_err().kind(), Kind::Protocol);
    }

    #[test]
    fn a_reply_torn_at_any_byte_is_an_error() {
        let whole = bytes(&[&structured(0, CHUNK_DATA, &data(100, b"ab")), &structured(1, CHUNK_HOLE, &hole(102, 2))]);
        for cut in 0..whole.len() {
            assert_eq!(read4(&[whole[..cut].to_vec()]).unwrap_err().kind(), Kind::Unavailable, "cut at {cut}");
        }
    }

    #[test]
    fn a_servers_error_is_its_answer_and_the_connection_goes_on() {
        let error = bytes(&[&28u32.to_be_bytes(), &4u16.to_be_bytes(), b"full"]);
        let chunks = [structured(0, CHUNK_ERROR | 1, &error), structured(1, CHUNK_NONE, &[])];
        let server = read4(&chunks).unwrap().unwrap_err();
        assert_eq!((server.errno, server.message.as_str()), (28, "full"));
        let simple = bytes(&[&SIMPLE_MAGIC.to_be_bytes(), &5u32.to_be_bytes(), &1u64.to_be_bytes()]);
        assert_eq!(read4(&[simple]).unwrap().unwrap_err().errno, 5);
        let cut_off = bytes(&[&28u32.to_be_bytes(), &9u16.to_be_bytes(), b"full"]);
        assert!(read4(&[structured(1, CHUNK_ERROR | 1, &cut_off)]).is_err());
    }

    #[test]
    fn a_reply_without_end_is_given_up() {
        let error = bytes(&[&28u32.to_be_bytes(), &0u16.to_be_bytes()]);
        let endless = structured(0, CHUNK_ERROR | 1, &error).repeat(CHUNKS_MAX + 1);
        assert_eq!(read4(&[endless]).unwrap_err().kind(), Kind::Protocol);
    }

    #[test]
    fn block_status_keeps_its_own_context_and_refuses_nonsense() {
        let ask = |chunks: &[Vec<u8>]| {
            let mut into = Vec::new();
            let stream = chunks.concat();
            reply(&mut stream.as_slice(), 1, Expect::Status { id: 7, into: &mut into }).map(|r| r.map(|()| into))
        };
        let ours = structured(0, CHUNK_STATUS, &status(7, &[(512, 0), (1024, 3)]));
        let other = structured(0, CHUNK_STATUS, &status(8, &[(1536, 1)]));
        let end = structured(1, CHUNK_NONE, &[]);
        let got = ask(&[other.clone(), ours.clone(), end.clone()]).unwrap().unwrap();
        assert_eq!(got, [Descriptor { len: 512, flags: 0 }, Descriptor { len: 1024, flags: 3 }]);
        assert!(ask(&[other, end.clone()]).is_err());
        assert!(ask(&[ours.clone(), ours, end]).is_err());
        assert!(ask(&[structured(1, CHUNK_STATUS, &status(7, &[(0, 0)]))]).is_err());
        assert!(ask(&[structured(1, CHUNK_STATUS, &status(7, &[]))]).is_err());
        let mut huge = structured(1, CHUNK_STATUS, &status(7, &[(1, 0)]));
        huge[16..20].copy_from_slice(&0xffff_fffcu32.to_be_bytes());
        assert_eq!(ask(&[huge]).unwrap_err().kind(), Kind::Protocol);
    }
}
