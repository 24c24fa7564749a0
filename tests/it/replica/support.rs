//! What the tests of the store share: contents in a tiny notation, patches between them, and the model they are held
//! against.
#![allow(dead_code)] // Without failpoints some of it has no user.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use virt_replica::block::digest::{Digest, block_digest};
use virt_replica::block::tree::RootBuilder;
use virt_replica::block::{BLOCK_LEN, BlockIndex, DiskSize, PIECE_LEN};
use virt_replica::engine::disk_target::DiskTarget as _;
use virt_replica::engine::stats::DiskStats;
use virt_replica::name::{DiskName, DomainName, DomainUuid, Generation, PointId, RunId};
use virt_replica::patch::{Compression, Header, PieceMask, RecordEncoder, StreamTail};
use virt_replica::replica::store::Store;
use virt_replica::replica::upkeep::Upkeep;
use virt_replica::replica::{BeginDisk, BeginPoint, Consistency, PointView, Replica, SealDisk, SealPoint};

pub const UUID: &str = "0a1b2c3d-0000-4000-8000-000000000001";

pub fn uuid() -> DomainUuid {
    DomainUuid::new(UUID).unwrap()
}

pub fn now() -> jiff::Timestamp {
    "2024-05-01T12:00:05Z".parse().unwrap()
}

pub struct Lab(tempfile::TempDir);

impl Lab {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// On a file system that makes fsync cheap, where only processes die.
    pub fn in_memory() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        Self(dir.unwrap())
    }

    pub fn root(&self) -> &Path {
        self.0.path()
    }

    pub fn store(&self) -> Store {
        Store::open(self.root(), &uuid(), now).unwrap()
    }
}

/// A disk of `size` bytes with runs of blocks (first, count) that are not zero, each block like no other.
pub fn content(size: usize, runs: &[(usize, usize)]) -> Vec<u8> {
    let mut disk = vec![0; size];
    for (first, count) in runs {
        for block in *first..first + count {
            let start = block * BLOCK_LEN;
            let end = (start + BLOCK_LEN).min(size);
            Rng(block as u64 + 1).fill(&mut disk[start..end]);
        }
    }
    disk
}

pub fn leaves(disk: &[u8]) -> Vec<Digest> {
    disk.chunks(BLOCK_LEN).map(block_digest).collect()
}

pub fn root(disk: &[u8]) -> Digest {
    let mut builder = RootBuilder::new(DiskSize(disk.len() as u64));
    leaves(disk).into_iter().enumerate().for_each(|(n, d)| builder.push_block(BlockIndex(n as u64), d));
    builder.finish()
}

/// The patch from `old` (nothing: `None`) to `new`; in pieces where both have the block.
pub fn patch(disk: &str, old: Option<&[u8]>, new: &[u8], pieces: bool) -> Vec<u8> {
    patch_of(disk, old, new, |n, block, out, encoder| {
        let was = old.map_or(&[][..], |o| o.get(n * BLOCK_LEN..).map_or(&[][..], |o| &o[..o.len().min(BLOCK_LEN)]));
        let mut padded = was.to_vec();
        padded.resize(BLOCK_LEN, 0);
        let digest = block_digest(block);
        if digest == block_digest(was) {
        } else if pieces && was.len() == block.len() {
            let changed = block.chunks(PIECE_LEN).zip(was.chunks(PIECE_LEN)).enumerate().filter(|(_, (a, b))| a != b);
            let mask = changed.fold(PieceMask::default(), |mask, (n, _)| mask.with(n));
            encoder.pieces(BlockIndex(n as u64), digest, mask, block, out);
        } else {
            encoder.data(BlockIndex(n as u64), digest, block, out);
        }
    })
}

/// A patch that sends every block, changed or not.
pub fn whole_patch(disk: &str, old: &[u8], new: &[u8]) -> Vec<u8> {
    patch_of(disk, Some(old), new, |n, block, out, encoder| {
        encoder.data(BlockIndex(n as u64), block_digest(block), block, out);
    })
}

/// A patch of whatever `record` writes for each block of `new` (number, content).
pub fn patch_of(
    disk: &str,
    old: Option<&[u8]>,
    new: &[u8],
    mut record: impl FnMut(usize, &[u8], &mut Vec<u8>, &mut RecordEncoder),
) -> Vec<u8> {
    let header = Header {
        domain: uuid(),
        disk: DiskName::new(disk).unwrap(),
        size_from: DiskSize(old.map_or(0, |o| o.len() as u64)),
        size: DiskSize(new.len() as u64),
        from_root: old.map(root),
    };
    let mut out = Vec::new();
    let mut tail = StreamTail::begin(&header, &mut out);
    let mut encoder = RecordEncoder::new(Compression::default()).unwrap();
    for (n, block) in new.chunks(BLOCK_LEN).enumerate() {
        let at = out.len();
        record(n, block, &mut out, &mut encoder);
        tail.observe(&out[at..]);
    }
    tail.trailer(root(new), &mut out);
    out
}

/// (name, size, fresh) of each disk.
pub fn begin(run: u64, expected_head: Option<PointId>, disks: &[(&str, usize, bool)]) -> BeginPoint {
    let disk = |(name, size, fresh): &(&str, usize, bool)| BeginDisk {
        name: DiskName::new(*name).unwrap(),
        size: DiskSize(*size as u64),
        fresh: *fresh,
        reserve_bytes: 0,
        resume: false,
        repair: false,
    };
    BeginPoint {
        uuid: uuid(),
        name: DomainName::new("db01").unwrap(),
        run: RunId::from_bits(run << 32),
        generation: Generation(1),
        expected_head,
        disks: disks.iter().map(disk).collect(),
    }
}

pub fn send(store: &Store, disk: &str, old: Option<&[u8]>, new: &[u8]) {
    let name = DiskName::new(disk).unwrap();
    store.apply(&name, &patch(disk, old, new, false)).unwrap();
    assert_eq!(store.finish_disk(&name).unwrap().root, root(new));
}

pub fn seal(disks: &[(&str, &[u8])]) -> SealPoint {
    let disk = |(name, content): &(&str, &[u8])| SealDisk {
        name: DiskName::new(*name).unwrap(),
        root: root(content),
        stats: DiskStats { reason: "a test".into(), ..DiskStats::default() },
    };
    SealPoint {
        frozen_at: "2024-05-01T12:00:00Z".parse().unwrap(),
        consistency: Consistency::Crash,
        consistency_reason: None,
        autostart: None,
        tpm_programs: None,
        disks: disks.iter().map(disk).collect(),
        left_out: Default::default(),
    }
}

/// A disk, its content before (nothing: `None`) and after.
pub type Step<'a> = (&'a str, Option<&'a [u8]>, &'a [u8]);

/// A whole run.
pub fn sync(store: &Store, run: u64, head: Option<&PointView>, disks: &[Step]) -> PointView {
    let begun: Vec<_> = disks.iter().map(|(name, _, new)| (*name, new.len(), false)).collect();
    store.begin(&begin(run, head.map(|h| h.id.clone()), &begun)).unwrap();
    disks.iter().for_each(|(name, old, new)| send(store, name, *old, new));
    store.seal(&seal(&disks.iter().map(|(name, _, new)| (*name, *new)).collect::<Vec<_>>())).unwrap()
}

/// The replica's leaves are those of the model, and its upper nodes follow from them.
pub fn assert_nodes(store: &Store, disk: &str, content: &[u8]) {
    let name = DiskName::new(disk).unwrap();
    let expected = leaves(content);
    let found = store.nodes(&name, 0, 0..expected.len() as u64 + 5).unwrap();
    assert_eq!(found[..expected.len()], expected);
    assert!(found[expected.len()..].iter().all(Digest::is_zero), "beyond the disk all is zero");
    let mut builder = RootBuilder::new(DiskSize(content.len() as u64));
    let groups = DiskSize(content.len() as u64).groups();
    for (n, node) in store.nodes(&name, 1, 0..groups).unwrap().into_iter().enumerate() {
        builder.push_node(1, n as u64, node);
    }
    assert_eq!(builder.finish(), root(content));
}

/// What QEMU reads from the image is the content, and the image is sound.
pub fn assert_image(image: &Path, content: &[u8]) {
    let model = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(model.path(), content).unwrap();
    let (image, model) = (image.to_str().unwrap(), model.path().to_str().unwrap());
    qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", image, model]);
    qemu_img(&["check", "-q", "-f", "qcow2", image]);
}

pub fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
}

/// A disk and its content.
pub type Model = Vec<(String, Vec<u8>)>;
pub type History = Vec<(PointId, Model)>;

/// Everything that is left is what it was.
pub fn assert_history(store: &Store, history: &[(PointId, Model)], what: &str) {
    let view = store.describe().unwrap();
    let ids: Vec<&PointId> = view.points.iter().map(|p| &p.id).collect();
    assert_eq!(ids, history.iter().map(|(id, _)| id).collect::<Vec<_>>(), "{what}");
    for ((id, disks), point) in history.iter().zip(&view.points) {
        assert!(store.verify(id, &mut |_, _| {}).unwrap().is_whole(), "{what}: {id}");
        for (name, content) in disks {
            assert_image(&point.disk(&DiskName::new(name.as_str()).unwrap()).unwrap().image, content);
        }
    }
    // The head's digests are right, and made anew from the change lists they are the same.
    let (_, head) = history.last().unwrap();
    head.iter().for_each(|(name, content)| assert_nodes(store, name, content));
    std::fs::remove_dir_all(view.path.join("digests")).unwrap();
    head.iter().for_each(|(name, content)| assert_nodes(store, name, content));
}

/// Only the directories of points that exist are there.
pub fn assert_no_remains(store: &Store) {
    let view = store.describe().unwrap();
    let mut names: Vec<String> = std::fs::read_dir(view.path.join("points"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, view.points.iter().map(|p| p.id.to_string()).collect::<Vec<_>>());
    for point in &view.points {
        for entry in std::fs::read_dir(view.path.join("points").join(point.id.as_str())).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            assert!(name.ends_with(".qcow2") || name.ends_with(".changes"), "{entry:?}");
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o400, "{entry:?}");
        }
    }
}

/// A history of one disk of blocks: `"aab. ..cc"`: a point for each word, a letter fills the block, `-` zeroes it, `.`
/// leaves it.
pub fn blocks(store: &Store, words: &str) -> History {
    let mut history: History = Vec::new();
    for word in words.split_whitespace() {
        let old = history.last().map(|(_, disks)| disks[0].1.clone());
        let mut new = old.clone().unwrap_or_default();
        new.resize(word.len() * BLOCK_LEN, 0);
        for (n, c) in word.chars().enumerate().filter(|(_, c)| *c != '.') {
            new[n * BLOCK_LEN..][..BLOCK_LEN].fill(if c == '-' { 0 } else { c as u8 });
        }
        let head = store.describe().unwrap().head().cloned();
        let run = head.as_ref().map_or(1, |h| h.id.seq() + 1);
        let point = sync(store, run, head.as_ref(), &[("vda", old.as_deref(), &new)]);
        history.push((point.id, vec![("vda".to_owned(), new)]));
    }
    history
}

/// Removes the points of these numbers (from 1) and checks what is left; gives the blocks that were copied.
/// A disk after the first `n` of these words, each of which is a point as in [`blocks`].
pub fn disk_at(words: &[&str], n: usize) -> Vec<u8> {
    let mut disk = vec![0; words[0].len() * BLOCK_LEN];
    for word in &words[..n] {
        for (n, c) in word.chars().enumerate().filter(|(_, c)| *c != '.') {
            disk[n * BLOCK_LEN..][..BLOCK_LEN].fill(if c == '-' { 0 } else { c as u8 });
        }
    }
    disk
}

/// `p3@2` as the failpoint that kills there.
pub fn kill(step: &str) -> String {
    match step.split_once('@') {
        Some((name, hit)) => format!("{name}=kill@{hit}"),
        None => format!("{step}=kill"),
    }
}

/// Lets the store keep its chain short, at most so many steps of the smallest size; whether there was something to do,
/// and it came to its end.
pub fn shorten(store: &Store, steps_max: u64) -> virt_replica::error::Result<bool> {
    let Some(mut shortening) = store.shorten()? else { return Ok(false) };
    let mut result = Ok(false);
    for _ in 0..steps_max {
        result = shortening.step(1).map(|step| step.end);
        if !matches!(result, Ok(false)) {
            break;
        }
    }
    shortening.close().unwrap();
    result
}

/// Writes, zeros and small changes at random places.
pub fn scribble(rng: &mut Rng, disk: &mut [u8]) {
    for _ in 0..rng.below(12) {
        let start = rng.below(disk.len() as u64) as usize;
        let len = match rng.below(3) {
            0 => 1 + rng.below(100) as usize,
            1 => rng.below(200_000) as usize,
            _ => rng.below(2_000_000) as usize,
        };
        let end = (start + len).min(disk.len());
        if rng.below(3) == 0 { disk[start..end].fill(0) } else { rng.fill(&mut disk[start..end]) }
    }
}

/// xorshift64*: small, and the same everywhere.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        bytes.chunks_mut(8).for_each(|c| c.copy_from_slice(&self.next().to_le_bytes()[..c.len()]));
    }

    /// `bytes` in parts of random lengths.
    pub fn cuts<'a>(&mut self, mut bytes: &'a [u8]) -> Vec<&'a [u8]> {
        let mut parts = Vec::new();
        while !bytes.is_empty() {
            let (part, rest) = bytes.split_at((1 + self.below(100_000) as usize).min(bytes.len()));
            parts.push(part);
            bytes = rest;
        }
        parts
    }
}

/// From `REPLICA_SEED`, or another one each time.
pub fn seed() -> u64 {
    let from_env = std::env::var("REPLICA_SEED").ok().map(|s| s.parse().expect("REPLICA_SEED is a number"));
    from_env.unwrap_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1)
}

/// Where in a file these bytes are.
pub fn find(path: &Path, bytes: &[u8]) -> u64 {
    let content = std::fs::read(path).unwrap();
    content.windows(bytes.len()).position(|w| w == bytes).expect("it is there") as u64
}

/// Inverts a byte.
pub fn flip(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}
