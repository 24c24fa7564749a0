//! An image behind an NBD server on a unix socket, read and written over a few connections at once.
//!
//! Blocking, one request in flight on each connection: parallelism comes from the threads that read. The protocol is in
//! [`codec`]; this file owns sockets, the pool, and the splitting of requests to what the server takes.
//!
//! A connection whose streams are out of step is never used again; when none is left, every call fails.

pub mod codec;

use super::raw::Poison;
use super::{Cover, Image, ImageMut, within};
use crate::block::extent::{Content, Extent};
use crate::block::{ByteRange, DiskSize};
use crate::error::{Error, Kind, Result};
use codec::{Command, Expect, Export, ServerError};
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::Duration;

/// The metadata context that says what is data and what reads as zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Bit of `base:allocation`: reads as zeros.
const ALLOCATION_ZERO: u32 = 1 << 1;
/// Bit of a `qemu:dirty-bitmap:` context: changed.
const BITMAP_DIRTY: u32 = 1;

/// A server that keeps silent this long is given up. Longer than a busy disk takes, shorter than a night.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// Bytes asked for at once at most, whatever the server would take; a status request covers more.
const TRANSFER_MAX: u64 = 32 << 20;
const STATUS_MAX: u64 = 1 << 31;
const ZEROES_MAX: u64 = 1 << 30;

/// The metadata context of a dirty bitmap, as QEMU names it.
pub fn bitmap_context(bitmap: &str) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}

/// A range with the flags that one metadata context gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Bytes of the disk that the flags are about.
    pub range: ByteRange,
    /// Flags whose meaning the metadata context defines. For a dirty bitmap, bit 0 means changed.
    pub flags: u32,
}

/// One connection, one request at a time.
struct Connection {
    stream: BufReader<UnixStream>,
    export: Export,
    cookie: u64,
    broken: bool,
}

impl Connection {
    fn open(socket: &Path, export: &str, contexts: &[String]) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(|e| Error::io("cannot reach the NBD server", socket, e))?;
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            set(&stream, Some(SILENCE_MAX)).map_err(|e| Error::io("cannot set up the NBD socket", socket, e))?;
        }
        // Small: it is for the heads of replies; the bytes of a read go straight to where they belong.
        let mut stream = BufReader::with_capacity(4096, stream);
        let export = codec::negotiate(&mut Duplex(&mut stream), export, contexts).map_err(|e| e.path(socket))?;
        Ok(Self { stream, export, cookie: 0, broken: false })
    }

    fn call(&mut self, command: Command, offset: u64, len: u32, data: &[u8], expect: Expect<'_>) -> Result<()> {
        self.cookie += 1;
        let answer = codec::request(self.stream.get_mut(), command, self.cookie, offset, len)
            .and_then(|()| codec::write_all(self.stream.get_mut(), data))
            .and_then(|()| codec::reply(&mut self.stream, self.cookie, expect));
        match answer {
            Ok(Ok(())) => Ok(()),
            Ok(Err(refusal)) => Err(server_error(refusal)),
            Err(e) => {
                self.broken = true;
                Err(e)
            }
        }
        .map_err(|e| e.offset(offset))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A courtesy: the server sees the socket close in any case.
        if !self.broken {
            let _ = codec::request(self.stream.get_mut(), Command::Disconnect, self.cookie + 1, 0, 0);
        }
    }
}

/// Reads through the buffer, writes past it.
struct Duplex<'a>(&'a mut BufReader<UnixStream>);

impl std::io::Read for Duplex<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buf)
    }
}

impl std::io::Write for Duplex<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.get_mut().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.get_mut().flush()
    }
}

fn server_error(refusal: ServerError) -> Error {
    let kind = Error::from_io("", std::io::Error::from_raw_os_error(refusal.errno)).kind();
    let kind = if kind == Kind::NotFound { Kind::Io } else { kind };
    Error::new(kind, "the NBD server could not do it").source(refusal)
}

/// An export, over several connections.
pub struct NbdImage {
    socket: PathBuf,
    export: Export,
    connections: Vec<Mutex<Connection>>,
    next: AtomicUsize,
    poison: Poison,
}

impl NbdImage {
    /// Connects `connections` times (at least once; exactly once to a writable export whose server does not promise
    /// that a flush covers all of them). Asks for `base:allocation` and for `contexts`; a server that lacks one is
    /// refused.
    pub fn connect(socket: &Path, export: &str, contexts: &[String], connections: usize) -> Result<Self> {
        let mut names = vec![BASE_ALLOCATION.to_owned()];
        names.extend(contexts.iter().filter(|c| *c != BASE_ALLOCATION).cloned());
        let first = Connection::open(socket, export, &names)?;
        let about = first.export.clone();
        let one = !about.offers(codec::FLAG_READ_ONLY) && !about.offers(codec::FLAG_CAN_MULTI_CONN);
        let mut all = vec![Mutex::new(first)];
        while all.len() < connections && !one {
            let next = Connection::open(socket, export, &names)?;
            if next.export.size != about.size {
                return Err(
                    Error::new(Kind::Protocol, "the export changed its size between two connections").path(socket)
                );
            }
            all.push(Mutex::new(next));
        }
        Ok(Self {
            socket: socket.to_owned(),
            export: about,
            connections: all,
            next: AtomicUsize::new(0),
            poison: Poison::default(),
        })
    }

    /// What a metadata context says of `range`, which must lie within the size: ranges in order, without gaps,
    /// neighbours of equal flags merged. Fails for a context that was not asked for at the start.
    pub fn status(&self, context: &str, range: ByteRange) -> Result<Vec<Status>> {
        within(self.size(), range.start, range.len())?;
        let mut all: Vec<Status> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            // Asked from an aligned offset, the answer may begin before `at`, and it may go on behind the question.
            let (start, end) = self.aligned(at, range.end.min(at + STATUS_MAX));
            let mut descriptors = Vec::new();
            self.with_connection(|c| {
                let id = c.export.context_id(context).ok_or_else(|| {
                    Error::new(Kind::Usage, format!("the metadata context '{context}' was not asked for"))
                })?;
                let len = u32::try_from(end - start).expect("a status request is bounded");
                c.call(Command::BlockStatus, start, len, &[], Expect::Status { id, into: &mut descriptors })
            })?;
            let before = at;
            let mut told = start;
            for d in descriptors {
                told = told.saturating_add(u64::from(d.len)).min(range.end);
                if told <= at {
                    continue;
                }
                match all.last_mut() {
                    Some(last) if last.flags == d.flags => last.range.end = told,
                    _ => all.push(Status { range: ByteRange::new(at, told), flags: d.flags }),
                }
                at = told;
            }
            if at == before {
                return Err(self
                    .error(Kind::Protocol, "the server's block status does not reach the range")
                    .offset(at));
            }
        }
        Ok(all)
    }

    /// The parts of `range` that `bitmap` marks as changed, in order.
    pub fn dirty(&self, bitmap: &str, range: ByteRange) -> Result<Vec<ByteRange>> {
        let status = self.status(&bitmap_context(bitmap), range)?;
        Ok(status.into_iter().filter(|s| s.flags & BITMAP_DIRTY != 0).map(|s| s.range).collect())
    }

    /// Tells the server that nobody needs `range` any more; it may read as anything afterwards. A server that cannot
    /// trim is not asked.
    pub fn trim(&self, range: ByteRange) -> Result<()> {
        within(self.size(), range.start, range.len())?;
        if !self.export.offers(codec::FLAG_SEND_TRIM) {
            return Ok(());
        }
        self.over(range, ZEROES_MAX, |start, len| self.command(Command::Trim, start, len, &[]))
    }

    /// Widens a range to the server's smallest block. The end stays within the size.
    fn aligned(&self, start: u64, end: u64) -> (u64, u64) {
        let block = u64::from(self.export.block_min);
        (start / block * block, end.next_multiple_of(block).min(self.export.size))
    }

    /// Bytes in one read or write, a multiple of the smallest block.
    fn transfer_max(&self) -> u64 {
        let block = u64::from(self.export.block_min);
        (u64::from(self.export.block_max).min(TRANSFER_MAX) / block * block).max(block)
    }

    /// Refuses a change that the server would not take.
    fn writable(&self, start: u64, len: u64) -> Result<()> {
        self.poison.check(&self.socket)?;
        within(self.size(), start, len)?;
        if self.export.offers(codec::FLAG_READ_ONLY) {
            return Err(self.error(Kind::Refused, "the export is read-only"));
        }
        if (start, start + len) != self.aligned(start, start + len) {
            return Err(self.error(Kind::Usage, "a write is not aligned to the server's blocks").offset(start));
        }
        Ok(())
    }

    /// Calls `each` with the start and length of every part of `range`, none longer than `step`.
    fn over(&self, range: ByteRange, step: u64, mut each: impl FnMut(u64, u32) -> Result<()>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = step.min(range.end - at);
            each(at, u32::try_from(len).expect("steps fit a request"))?;
            at += len;
        }
        Ok(())
    }

    fn command(&self, command: Command, start: u64, len: u32, data: &[u8]) -> Result<()> {
        self.with_connection(|c| c.call(command, start, len, data, Expect::Nothing))
    }

    /// Runs `job` on an idle connection, or waits for one.
    fn with_connection<T>(&self, job: impl FnOnce(&mut Connection) -> Result<T>) -> Result<T> {
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let count = self.connections.len();
        let in_turn = || (0..count).map(|n| &self.connections[first.wrapping_add(n) % count]);
        let idle = in_turn().find_map(|c| match c.try_lock() {
            Ok(connection) if !connection.broken => Some(connection),
            Ok(_) | Err(TryLockError::Poisoned(_) | TryLockError::WouldBlock) => None,
        });
        let waited = || in_turn().filter_map(|c| c.lock().ok()).find(|c| !c.broken);
        let mut connection: MutexGuard<'_, Connection> = idle
            .or_else(waited)
            .ok_or_else(|| self.error(Kind::Unavailable, "no connection to the NBD server is left"))?;
        job(&mut connection).map_err(|e| e.path(&self.socket))
    }

    fn error(&self, kind: Kind, what: &'static str) -> Error {
        Error::new(kind, what).path(&self.socket)
    }
}

impl Image for NbdImage {
    fn size(&self) -> DiskSize {
        DiskSize(self.export.size)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let mut cover = Cover::from(range.start);
        for s in self.status(BASE_ALLOCATION, range)? {
            // A hole that does not say it reads as zeros has to be read.
            let zero = s.flags & ALLOCATION_ZERO != 0;
            cover.extend_to(s.range.end, if zero { Content::Zero } else { Content::Data });
        }
        Ok(cover.finish())
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        within(self.size(), offset_bytes, len)?;
        let (start, end) = self.aligned(offset_bytes, offset_bytes + len);
        let mut bounce = Vec::new();
        let aligned: &mut [u8] = if (start, end) == (offset_bytes, offset_bytes + len) {
            buf
        } else {
            bounce.resize((end - start) as usize, 0);
            &mut bounce
        };
        self.over(ByteRange::new(start, end), self.transfer_max(), |at, part_len| {
            let part = &mut aligned[(at - start) as usize..][..part_len as usize];
            self.with_connection(|c| c.call(Command::Read, at, part_len, &[], Expect::Data { offset: at, buf: part }))
        })?;
        if !bounce.is_empty() {
            buf.copy_from_slice(&bounce[(offset_bytes - start) as usize..][..buf.len()]);
        }
        Ok(())
    }
}

impl ImageMut for NbdImage {
    fn write_at(&self, offset_bytes: u64, data: &[u8]) -> Result<()> {
        self.writable(offset_bytes, data.len() as u64)?;
        let range = ByteRange::new(offset_bytes, offset_bytes + data.len() as u64);
        self.over(range, self.transfer_max(), |at, len| {
            let part = &data[(at - offset_bytes) as usize..][..len as usize];
            self.command(Command::Write, at, len, part)
        })
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        self.writable(range.start, range.len())?;
        if self.export.offers(codec::FLAG_SEND_WRITE_ZEROES) {
            return self.over(range, ZEROES_MAX, |at, len| self.command(Command::WriteZeroes, at, len, &[]));
        }
        let zeros = vec![0; self.transfer_max().min(1 << 20).min(range.len()) as usize];
        self.over(range, zeros.len() as u64, |at, len| self.command(Command::Write, at, len, &zeros[..len as usize]))
    }

    fn sync(&self) -> Result<()> {
        self.poison.check(&self.socket)?;
        if !self.export.offers(codec::FLAG_SEND_FLUSH) {
            return Err(self.error(Kind::Refused, "the NBD server cannot make writes durable"));
        }
        // One flush is enough: there is one connection, or the server promised it (CAN_MULTI_CONN).
        self.poison.guard(self.command(Command::Flush, 0, 0, &[]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    /// A server as strict as the protocol allows, and stricter than qemu-nbd: blocks of 4 KiB, at most 8 KiB at once,
    /// and it tells the block status in scraps or beyond the question.
    struct Strict {
        disk: Mutex<Vec<u8>>,
        flags: u16,
    }

    const BLOCK: u32 = 4096;
    const AT_ONCE: u32 = 8192;

    impl Strict {
        fn serve(disk: Vec<u8>, flags: u16) -> (tempfile::TempDir, PathBuf, Arc<Strict>) {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("s");
            let listener = UnixListener::bind(&socket).unwrap();
            let server = Arc::new(Strict { disk: Mutex::new(disk), flags });
            let serving = server.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let serving = serving.clone();
                    std::thread::spawn(move || serving.talk(stream));
                }
            });
            (dir, socket, server)
        }

        fn talk(&self, mut s: UnixStream) -> std::io::Result<()> {
            s.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
            s.read_exact(&mut [0; 4])?;
            let reply = |s: &mut UnixStream, option: u32, kind: u32, body: &[u8]| {
                let mut message = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
                [option, kind, body.len() as u32].iter().for_each(|n| message.extend(n.to_be_bytes()));
                message.extend(body);
                s.write_all(&message)
            };
            loop {
                let mut head = [0; 16];
                s.read_exact(&mut head)?;
                let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
                let mut body = vec![0; u32::from_be_bytes(head[12..].try_into().unwrap()) as usize];
                s.read_exact(&mut body)?;
                if option == 10 {
                    reply(&mut s, 10, 4, b"\0\0\0\x05base:allocation")?;
                }
                if option == 7 {
                    let size = self.disk.lock().unwrap().len() as u64;
                    reply(&mut s, 7, 3, &[&[0, 0], &size.to_be_bytes()[..], &self.flags.to_be_bytes()].concat())?;
                    let sizes = [BLOCK, BLOCK, AT_ONCE].map(u32::to_be_bytes).concat();
                    reply(&mut s, 7, 3, &[&[0, 3], sizes.as_slice()].concat())?;
                }
                reply(&mut s, option, 1, &[])?;
                if option == 7 {
                    break;
                }
            }
            loop {
                let mut head = [0; 28];
                s.read_exact(&mut head)?;
                let command = head[7];
                let offset = u64::from_be_bytes(head[16..24].try_into().unwrap());
                let len = u32::from_be_bytes(head[24..].try_into().unwrap());
                let mut payload = vec![0; if command == 1 { len as usize } else { 0 }];
                s.read_exact(&mut payload)?;
                if command == 2 {
                    return Ok(());
                }
                let (kind, body) = self.answer(command, offset, len, &payload);
                let chunk = [&0x668e_33efu32.to_be_bytes()[..], &[0, 1], &kind.to_be_bytes(), &head[8..16]];
                s.write_all(&[chunk.concat(), (body.len() as u32).to_be_bytes().to_vec(), body].concat())?;
            }
        }

        fn answer(&self, command: u8, offset: u64, len: u32, payload: &[u8]) -> (u16, Vec<u8>) {
            let mut disk = self.disk.lock().unwrap();
            let end = offset + u64::from(len);
            let aligned =
                offset.is_multiple_of(BLOCK.into()) && (len.is_multiple_of(BLOCK) || end == disk.len() as u64);
            if !aligned || end > disk.len() as u64 || (command <= 1 && len > AT_ONCE) {
                return ((1 << 15) | 1, [&22u32.to_be_bytes()[..], &6u16.to_be_bytes(), b"strict"].concat());
            }
            let range = offset as usize..end as usize;
            match command {
                0 => (1, [&offset.to_be_bytes()[..], &disk[range]].concat()),
                1 => {
                    disk[range].copy_from_slice(payload);
                    (0, vec![])
                }
                7 => {
                    let zero = |at: u64| disk[at as usize..].iter().take(BLOCK as usize).all(|b| *b == 0);
                    let flags = if zero(offset) { 3u32 } else { 0 };
                    // The last block of a zero run is told together with what nobody asked for.
                    let told = if flags == 3 && len <= BLOCK { len + BLOCK } else { BLOCK };
                    (5, [&5u32.to_be_bytes()[..], &told.to_be_bytes(), &flags.to_be_bytes()].concat())
                }
                _ => (0, vec![]),
            }
        }
    }

    fn disk() -> Vec<u8> {
        let mut disk: Vec<u8> = (0..10 * BLOCK + 512).map(|n| (n / 7) as u8 | 1).collect();
        disk[2 * BLOCK as usize..5 * BLOCK as usize].fill(0);
        disk
    }

    #[test]
    fn requests_are_cut_and_aligned_to_what_the_server_takes() {
        let (_dir, socket, _server) = Strict::serve(disk(), codec::FLAG_READ_ONLY);
        let image = NbdImage::connect(&socket, "", &[], 2).unwrap();
        let size = image.size().0;
        for (start, end) in [(0, size), (1, 2), (4095, 4097), (5000, 30_000), (size - 1, size), (40_960, size)] {
            let mut buf = vec![0; (end - start) as usize];
            image.read_at(start, &mut buf).unwrap_or_else(|e| panic!("{start}..{end}: {}", e.chain()));
            assert!(buf == disk()[start as usize..end as usize], "{start}..{end}");
        }
    }

    #[test]
    fn scraps_of_block_status_are_put_together_and_what_is_too_much_is_cut() {
        let (_dir, socket, _server) = Strict::serve(disk(), codec::FLAG_READ_ONLY);
        let image = NbdImage::connect(&socket, "", &[], 1).unwrap();
        let drawn = |start, end| -> Vec<(u64, u64, bool)> {
            let extents = image.extents(ByteRange::new(start, end)).unwrap();
            extents.iter().map(|e| (e.range.start, e.range.end, e.content == Content::Zero)).collect()
        };
        let size = image.size().0;
        assert_eq!(drawn(0, size), [(0, 8192, false), (8192, 20480, true), (20480, size, false)]);
        assert_eq!(drawn(100, 8193), [(100, 8192, false), (8192, 8193, true)]);
        assert_eq!(drawn(16385, 20000), [(16385, 20000, true)]);
    }

    #[test]
    fn writes_that_do_not_fit_the_blocks_are_refused_and_the_others_arrive() {
        let (_dir, socket, server) = Strict::serve(disk(), 1 | codec::FLAG_SEND_FLUSH);
        let image = NbdImage::connect(&socket, "", &[], 4).unwrap();
        assert_eq!(image.connections.len(), 1, "no promise that a flush covers several connections");
        assert_eq!(image.write_at(512, &[1; 4096]).unwrap_err().kind(), Kind::Usage);
        image.write_at(4096, &[0xaa; 20480]).unwrap();
        image.zero(ByteRange::new(8192, 24576)).unwrap();
        image.write_at(10 * u64::from(BLOCK), &[0xbb; 512]).unwrap();
        image.sync().unwrap();
        let mut model = disk();
        model[4096..24576].fill(0xaa);
        model[8192..24576].fill(0);
        model[10 * BLOCK as usize..].fill(0xbb);
        assert!(*server.disk.lock().unwrap() == model);
    }

    #[test]
    fn without_flush_nothing_is_called_durable() {
        let (_dir, socket, _server) = Strict::serve(disk(), 1);
        let image = NbdImage::connect(&socket, "", &[], 1).unwrap();
        assert_eq!(image.sync().unwrap_err().kind(), Kind::Refused);
    }

    #[test]
    fn a_refused_request_leaves_the_connection_in_step() {
        let (_dir, socket, _server) = Strict::serve(disk(), codec::FLAG_READ_ONLY);
        let image = NbdImage::connect(&socket, "", &[], 1).unwrap();
        let refused =
            image.with_connection(|c| c.call(Command::Read, 1, 1, &[], Expect::Data { offset: 1, buf: &mut [0] }));
        assert!(refused.unwrap_err().chain().contains("strict"));
        image.read_at(0, &mut [0; 10]).unwrap();
    }
}
