//! One suite over every image and every adapter, against the real qemu-img, qemu-nbd and qemu-io.
//!
//! The table [`images`] makes disks with one feature each; every adapter that may read one reads it, and all have to
//! agree with `qemu-img convert`. What we write, QEMU checks and compares. Block devices need root and are skipped,
//! loudly, without it.

mod check;
mod strangers;
mod writing;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virt_replica::block::extent::{Content, Extent};
use virt_replica::block::{ByteRange, DiskSize};
use virt_replica::error::Kind;
use virt_replica::image::nbd::NbdImage;
use virt_replica::image::open::{OpenOptions, explain, open_read};
use virt_replica::image::qcow2::{self, Qcow2Image};
use virt_replica::image::qemu_nbd::{QemuNbd, Serve};
use virt_replica::image::raw::{RawImage, RawWriter};
use virt_replica::image::{Chain, Format, Image, ImageMut, Layer, qemu_img};

const MIB: u64 = 1 << 20;

// ---------------------------------------------------------------------------------------------- small tools

/// A directory whose name already asks for trouble: blanks, commas, quotes, a colon.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("a, b:c=\"d\" ").tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Sockets need a short path.
    fn options(&self) -> OpenOptions {
        OpenOptions { runtime_dir: self.path("run"), force_share: false, readers: 3 }
    }

    /// Runs a tool in the directory, so that names on its command line stay plain.
    fn run(&self, line: &str) {
        let (ok, said) = self.try_run(line);
        assert!(ok, "{line}: {said}");
    }

    fn try_run(&self, line: &str) -> (bool, String) {
        let done = Command::new("sh").args(["-ec", line]).current_dir(self.0.path()).output().unwrap();
        (done.status.success(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
    }

    fn layer(&self, name: &str) -> Layer {
        let format = if name.ends_with(".qcow2") { Format::Qcow2 } else { Format::Raw };
        Layer { path: self.path(name), format, block_device: false, data_file: None }
    }

    /// A chain by file names, uppermost first: `"top.qcow2 mid.qcow2 base.raw"`.
    fn chain(&self, names: &str) -> Chain {
        Chain(names.split_whitespace().map(|n| self.layer(n)).collect())
    }

    fn create(&self, name: &str, size: u64, backing: Option<(&str, Format)>) -> qcow2::Qcow2Writer {
        qcow2::create(&self.path(name), DiskSize(size), backing).unwrap()
    }

    /// qemu-img finds no fault and no leak.
    fn check(&self, name: &str) {
        let report = qemu_img::check(&self.path(name), Format::Qcow2).unwrap();
        assert!(report.is_sound() && report.leaks == 0, "{name}: {report:?}");
    }

    /// What QEMU reads in the chain, following its headers: an opinion that shares nothing with ours.
    fn truth(&self, top: &str) -> Vec<u8> {
        let format = self.layer(top).format.as_str();
        self.run(&format!("rm -f truth.out; qemu-img convert -f {format} -O raw './{top}' truth.out"));
        std::fs::read(self.path("truth.out")).unwrap()
    }
}

/// xorshift64*: enough to find mistakes, and repeatable from the seed a failure prints.
struct Dice(u64);

impl Dice {
    fn new(name: &str) -> Self {
        let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            now.as_nanos() as u64 | 1
        });
        eprintln!("{name}: SEED={seed}");
        Self(seed)
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % sides.max(1)
    }
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange { start, end }
}

fn data_bytes(extents: &[Extent]) -> u64 {
    extents.iter().filter(|e| e.content == Content::Data).map(|e| e.range.end - e.range.start).sum()
}

/// Every promise of the trait `Image`, against the truth. Returns the bytes the image calls data.
fn conforms(name: &str, image: &dyn Image, truth: &[u8]) -> u64 {
    let size = image.size().0;
    assert_eq!(size, truth.len() as u64, "{name}: size");

    let mut whole = vec![0xee; truth.len()];
    for (n, piece) in whole.chunks_mut(MIB as usize).enumerate() {
        image.read_at(n as u64 * MIB, piece).unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
    }
    let differs = whole.iter().zip(truth).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{name}: first byte that differs");

    let extents = image.extents(image.size().range()).unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
    covers_exactly(name, &extents, range(0, size));
    for e in extents.iter().filter(|e| e.content == Content::Zero) {
        let zeros = &truth[e.range.start as usize..e.range.end as usize];
        assert!(zeros.iter().all(|b| *b == 0), "{name}: {e:?} is not zero");
    }

    let mut dice = Dice::new(name);
    for _ in 0..40 {
        let start = dice.roll(size + 1);
        let end = start + dice.roll((size - start).min(300_000) + 1);
        let mut buf = vec![0xee; (end - start) as usize];
        image.read_at(start, &mut buf).unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
        assert!(buf == truth[start as usize..end as usize], "{name}: bytes {start}..{end}");
        let part = image.extents(range(start, end)).unwrap();
        covers_exactly(name, &part, range(start, end));
        for e in part.iter().filter(|e| e.content == Content::Zero) {
            assert!(truth[e.range.start as usize..e.range.end as usize].iter().all(|b| *b == 0), "{name}: {e:?}");
        }
    }

    // Several threads at once see the same.
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let mut buf = vec![0; 100_003];
                let mut at = thread * 50_000;
                while at < size {
                    let n = (size - at).min(buf.len() as u64) as usize;
                    image.read_at(at, &mut buf[..n]).unwrap();
                    assert!(buf[..n] == truth[at as usize..at as usize + n], "{name}: thread {thread} at {at}");
                    image.extents(range(at, at + n as u64)).unwrap();
                    at += 200_000;
                }
            });
        }
    });

    assert_eq!(image.read_at(size, &mut [0]).unwrap_err().kind(), Kind::Usage, "{name}");
    assert_eq!(image.extents(range(0, size + 1)).unwrap_err().kind(), Kind::Usage, "{name}");
    assert!(image.read_at(u64::MAX, &mut [0; 2]).is_err());
    image.read_at(size, &mut []).unwrap();
    assert!(image.extents(range(0, 0)).unwrap().is_empty());
    data_bytes(&extents)
}

fn covers_exactly(name: &str, extents: &[Extent], all: ByteRange) {
    let mut at = all.start;
    let mut before = None;
    for e in extents {
        assert_eq!(e.range.start, at, "{name}: gap or overlap in {extents:?}");
        assert!(e.range.end > e.range.start, "{name}: empty extent");
        assert_ne!(Some(e.content), before, "{name}: neighbours not merged");
        (at, before) = (e.range.end, Some(e.content));
    }
    assert_eq!(at, all.end, "{name}: not covered to the end");
}

// ---------------------------------------------------------------------------------------------- reading

/// One disk with one feature.
struct Case {
    name: &'static str,
    /// Shell lines that make it, in its directory.
    make: &'static str,
    /// Layers, uppermost first.
    chain: &'static str,
    data_file: Option<&'static str>,
    /// How it has to be read.
    how: &'static str,
}

const RAW: &str = "raw file read in process";
const QCOW2: &str = "qcow2 read in process";

/// Something everywhere: data, written zeros, a trimmed range, a short tail.
const SOME: &str = "-c 'write -q -P 1 0 100k' -c 'write -q -P 2 1M 192k' -c 'write -q -z 2M 256k' -c 'write -q -P 3 3000k 70k' \
     -c 'write -q -P 4 5M 512' -c 'discard -q 1100k 64k'";

fn images() -> Vec<Case> {
    let case = |name, make, chain, how| Case { name, make, chain, data_file: None, how };
    let with = |name, make, chain, data_file, how| Case { name, make, chain, data_file: Some(data_file), how };
    vec![
        case("raw", "qemu-img create -q -f raw a.raw 6M; qemu-io -f raw SOME a.raw", "a.raw", RAW),
        case("raw, odd size", "printf 'hello%09999d' 7 > a.raw", "a.raw", RAW),
        case("raw, empty", ": > a.raw", "a.raw", RAW),
        case("raw, one byte", "printf x > a.raw", "a.raw", RAW),
        case("raw, full", "head -c 3000000 /dev/urandom > a.raw", "a.raw", RAW),
        // A guest may write what it likes into its disk: a header in a raw image is data.
        case(
            "raw that looks like qcow2",
            "qemu-img create -q -f qcow2 -b /etc/passwd -F raw a.raw 64M; truncate -s 1M a.raw",
            "a.raw",
            RAW,
        ),
        case("qcow2", "qemu-img create -q -f qcow2 a.qcow2 6M; qemu-io -f qcow2 SOME a.qcow2", "a.qcow2", QCOW2),
        case("qcow2, empty", "qemu-img create -q -f qcow2 a.qcow2 0", "a.qcow2", QCOW2),
        case("qcow2, nothing written", "qemu-img create -q -f qcow2 a.qcow2 9M", "a.qcow2", QCOW2),
        case(
            "qcow2, short last cluster",
            "qemu-img create -q -f qcow2 a.qcow2 6292992; qemu-io -f qcow2 SOME -c 'write -q -P 9 6M 1536' a.qcow2",
            "a.qcow2",
            QCOW2,
        ),
        case(
            "qcow2, version 2",
            "qemu-img create -q -f qcow2 -o compat=0.10 a.qcow2 6M; qemu-io -f qcow2 SOME a.qcow2",
            "a.qcow2",
            QCOW2,
        ),
        case(
            "qcow2, clusters of 512 bytes",
            "qemu-img create -q -f qcow2 -o cluster_size=512 a.qcow2 6M; qemu-io -f qcow2 SOME a.qcow2",
            "a.qcow2",
            QCOW2,
        ),
        case(
            "qcow2, clusters of 2 MiB",
            "qemu-img create -q -f qcow2 -o cluster_size=2M a.qcow2 6M; qemu-io -f qcow2 SOME a.qcow2",
            "a.qcow2",
            QCOW2,
        ),
        case(
            "qcow2, refcounts of 1 bit, lazy",
            "qemu-img create -q -f qcow2 -o refcount_bits=1,lazy_refcounts=on a.qcow2 6M; qemu-io -f qcow2 SOME a.qcow2",
            "a.qcow2",
            QCOW2,
        ),
        // virt-manager's default: every cluster is allocated, and most are holes of the file.
        case(
            "qcow2, metadata preallocated",
            "qemu-img create -q -f qcow2 -o preallocation=metadata a.qcow2 30M; qemu-io -f qcow2 SOME a.qcow2",
            "a.qcow2",
            QCOW2,
        ),
        case(
            "qcow2, compressed",
            "qemu-img create -q -f raw x.raw 6M; qemu-io -f raw SOME x.raw; head -c 700000 /dev/urandom > r; \
             dd if=r of=x.raw bs=1M seek=4 conv=notrunc status=none; qemu-img convert -c -f raw -O qcow2 x.raw a.qcow2",
            "a.qcow2",
            QCOW2,
        ),
        case(
            "qcow2, compressed and overwritten",
            "qemu-img create -q -f raw x.raw 6M; qemu-io -f raw SOME x.raw; qemu-img convert -c -f raw -O qcow2 x.raw a.qcow2; \
             qemu-io -f qcow2 -c 'write -q -P 8 10k 20k' a.qcow2",
            "a.qcow2",
            QCOW2,
        ),
        case(
            "qcow2 with a bitmap",
            "qemu-img create -q -f qcow2 a.qcow2 6M; qemu-img bitmap --add a.qcow2 b0; qemu-io -f qcow2 SOME a.qcow2",
            "a.qcow2",
            QCOW2,
        ),
        case(
            "qcow2, zstd",
            "qemu-img create -q -f raw x.raw 6M; qemu-io -f raw SOME x.raw; \
             qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd x.raw a.qcow2",
            "a.qcow2",
            "qemu-nbd, because a.qcow2 has zstd clusters",
        ),
        case(
            "qcow2, extended L2",
            "qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=128k a.qcow2 6M; qemu-io -f qcow2 SOME a.qcow2",
            "a.qcow2",
            "qemu-nbd, because a.qcow2 has extended L2 entries",
        ),
        case(
            "qcow2, internal snapshot",
            "qemu-img create -q -f qcow2 a.qcow2 6M; qemu-io -f qcow2 SOME a.qcow2; qemu-img snapshot -c s1 a.qcow2; \
             qemu-io -f qcow2 -c 'write -q -P 9 0 64k' a.qcow2",
            "a.qcow2",
            "qemu-nbd, because a.qcow2 has internal snapshots",
        ),
        with(
            "qcow2, data file",
            "qemu-img create -q -f qcow2 -o data_file=d.raw a.qcow2 6M; qemu-io -f qcow2 SOME a.qcow2",
            "a.qcow2",
            "d.raw",
            "qemu-nbd, because a.qcow2 has an external data file",
        ),
        with(
            "qcow2, raw data file",
            "qemu-img create -q -f qcow2 -o data_file=d.raw,data_file_raw=on a.qcow2 6M; qemu-io -f qcow2 SOME a.qcow2",
            "a.qcow2",
            "d.raw",
            "qemu-nbd, because a.qcow2 has an external data file",
        ),
        case(
            "overlay on qcow2",
            "qemu-img create -q -f qcow2 b.qcow2 6M; qemu-io -f qcow2 SOME b.qcow2; \
             qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 a.qcow2; \
             qemu-io -f qcow2 -c 'write -q -P 7 60k 10k' -c 'write -q -z 1M 64k' -c 'write -q -P 8 4M 1M' a.qcow2",
            "a.qcow2 b.qcow2",
            QCOW2,
        ),
        case(
            "overlay on raw of odd size",
            "printf 'x%0130000d' 7 > b.raw; qemu-img create -q -f qcow2 -b b.raw -F raw a.qcow2; \
             qemu-io -f qcow2 -c 'write -q -P 7 512 512' a.qcow2",
            "a.qcow2 b.raw",
            QCOW2,
        ),
        case(
            "overlay larger than its backing image",
            "qemu-img create -q -f qcow2 b.qcow2 1M; qemu-io -f qcow2 -c 'write -q -P 5 512k 512k' b.qcow2; \
             qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 a.qcow2 3146240; qemu-io -f qcow2 -c 'write -q -P 6 2M 64k' a.qcow2",
            "a.qcow2 b.qcow2",
            QCOW2,
        ),
        case(
            "overlay smaller than its backing image",
            "qemu-img create -q -f qcow2 b.qcow2 4M; qemu-io -f qcow2 -c 'write -q -P 5 0 4M' b.qcow2; \
             qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 a.qcow2 1049088; qemu-io -f qcow2 -c 'write -q -P 6 64k 64k' a.qcow2",
            "a.qcow2 b.qcow2",
            QCOW2,
        ),
        case(
            "a short layer between two long ones",
            "qemu-img create -q -f raw c.raw 4M; qemu-io -f raw -c 'write -q -P 5 0 4M' c.raw; \
             qemu-img create -q -f qcow2 -b c.raw -F raw b.qcow2 1M; qemu-io -f qcow2 -c 'write -q -P 6 64k 64k' b.qcow2; \
             qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 a.qcow2 3M; qemu-io -f qcow2 -c 'write -q -P 4 2M 64k' a.qcow2",
            "a.qcow2 b.qcow2 c.raw",
            QCOW2,
        ),
        case(
            "zstd below",
            "qemu-img create -q -f raw x.raw 6M; qemu-io -f raw SOME x.raw; \
             qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd x.raw b.qcow2; \
             qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 a.qcow2; qemu-io -f qcow2 -c 'write -q -P 7 0 64k' a.qcow2",
            "a.qcow2 b.qcow2",
            "qemu-nbd, because b.qcow2 has zstd clusters",
        ),
    ]
}

impl Case {
    fn make(&self, place: &Place) -> Chain {
        place.run(&self.make.replace("SOME", SOME));
        let mut chain = place.chain(self.chain);
        chain.0[0].data_file = self.data_file.map(|d| place.path(d));
        chain
    }
}

/// Served by qemu-nbd whether or not it could be read in process.
fn over_nbd(place: &Place, chain: &Chain) -> (QemuNbd, NbdImage) {
    let run = place.path("run");
    let serve = Serve { chain, runtime_dir: &run, force_share: false, connections: 3, bitmap: None };
    let server = QemuNbd::start(&serve).unwrap_or_else(|e| panic!("{}", e.chain()));
    let image = NbdImage::connect(server.socket(), "", &[], 3).unwrap();
    (server, image)
}

#[test]
fn every_adapter_reads_every_image_as_qemu_does() {
    for case in images() {
        let place = Place::new();
        let chain = case.make(&place);
        let name = case.name;
        let truth = place.truth(&chain.top().path.file_name().unwrap().to_string_lossy());

        assert_eq!(explain(&chain).unwrap(), case.how, "{name}");
        let opened = open_read(&chain, &place.options()).unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
        assert_eq!(opened.how, case.how, "{name}");
        let data = conforms(name, &*opened.image, &truth);
        opened.close().unwrap();

        let (server, image) = over_nbd(&place, &chain);
        let qemu_data = conforms(&format!("{name}, over NBD"), &image, &truth);
        drop(image);
        server.stop().unwrap();

        // Thin stays thin: we never call more data than QEMU does.
        assert!(data <= qemu_data, "{name}: {data} bytes of data, QEMU says {qemu_data}");
        assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0, "{name}: sockets are gone");
    }
}

#[test]
fn a_deep_chain_with_long_names_is_read_by_both() {
    let place = Place::new();
    let name = |n: usize| format!("{n:03}-{}.qcow2", "x".repeat(120));
    place.run(&format!("qemu-img create -q -f qcow2 {} 6M", name(0)));
    for n in 1..32 {
        let at = n * 100;
        place.run(&format!(
            "qemu-img create -q -f qcow2 -b {} -F qcow2 {}; qemu-io -f qcow2 -c 'write -q -P {n} {at}k 70k' {}",
            name(n - 1),
            name(n),
            name(n)
        ));
    }
    let chain = Chain((0..32).rev().map(|n| place.layer(&name(n))).collect());
    let truth = place.truth(&name(31));
    let opened = open_read(&chain, &place.options()).unwrap();
    conforms("deep", &*opened.image, &truth);
    let (_server, image) = over_nbd(&place, &chain);
    conforms("deep, over NBD", &image, &truth);
}

#[test]
fn a_disk_of_many_terabytes_costs_what_it_holds() {
    let place = Place::new();
    place.run("qemu-img create -q -f qcow2 a.qcow2 8T; qemu-io -f qcow2 -c 'write -q -P 1 7T 64k' a.qcow2; truncate -s 8T b.raw");
    for name in ["a.qcow2", "b.raw"] {
        let opened = open_read(&place.chain(name), &place.options()).unwrap();
        let started = Instant::now();
        let extents = opened.image.extents(opened.image.size().range()).unwrap();
        assert!(started.elapsed() < Duration::from_secs(5), "{name}: {:?}", started.elapsed());
        assert_eq!(data_bytes(&extents), if name == "b.raw" { 0 } else { 65536 }, "{name}");
    }
}

/// A loop device for as long as the test runs; `None`, loudly, where none can be had.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Option<Loop> {
        let done = Command::new("losetup").args(["--find", "--show"]).arg(path).output();
        match done {
            Ok(out) if out.status.success() => Some(Loop(String::from_utf8_lossy(&out.stdout).trim().to_owned())),
            other => {
                assert!(!rustix::process::geteuid().is_root(), "root has loop devices: {other:?}");
                eprintln!("SKIPPED: no loop device ({other:?}); run as root: cargo nextest run --test it image::");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_devices_are_read_as_raw_and_as_qcow2() {
    let place = Place::new();
    place.run(&format!(
        "qemu-img create -q -f raw a.img 6M; qemu-io -f raw {SOME} a.img; \
         qemu-img create -q -f qcow2 b.qcow2 6M; qemu-io -f qcow2 {SOME} b.qcow2; cp b.qcow2 b.img; truncate -s 9M b.img"
    ));
    for (file, format, how) in
        [("a.img", Format::Raw, "block device read in process"), ("b.img", Format::Qcow2, "qcow2 read in process")]
    {
        let Some(device) = Loop::over(&place.path(file)) else { return };
        let layer = Layer { path: device.0.clone().into(), format, block_device: true, data_file: None };
        let truth = place.truth(if format == Format::Raw { "a.img" } else { "b.qcow2" });
        let chain = Chain(vec![layer]);
        let opened = open_read(&chain, &place.options()).unwrap();
        assert_eq!(opened.how, how);
        conforms(how, &*opened.image, &truth);
        opened.close().unwrap();
        let (server, image) = over_nbd(&place, &chain);
        conforms("device over NBD", &image, &truth);
        drop(image);
        server.stop().unwrap();
        let run = place.path("run");
        let serve = Serve { chain: &chain, runtime_dir: &run, force_share: true, connections: 1, bitmap: None };
        QemuNbd::start(&serve).unwrap_or_else(|e| panic!("without locks: {}", e.chain())).stop().unwrap();
        assert_eq!(qemu_img::info(&chain.top().path, format, false).unwrap().virtual_size.0, truth.len() as u64);
        // Recorded as a file, it is refused.
        let as_file = Chain(vec![Layer { block_device: false, ..chain.0[0].clone() }]);
        assert_eq!(explain(&as_file).unwrap_err().kind(), Kind::Conflict);
    }
}
