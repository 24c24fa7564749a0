//! One suite over every image and every adapter, against the real qemu-img, qemu-nbd and qemu-io.
//!
//! The table [`images`] makes disks with one feature each; every adapter that may read one reads it, and all have to agree
//! with `qemu-img convert`. What we write, QEMU checks and compares. Block devices need root and are skipped, loudly,
//! without it.

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
                eprintln!("SKIPPED: no loop device ({other:?}); run as root: cargo nextest run --test image");
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

// ---------------------------------------------------------------------------------------------- strangers' headers

#[test]
fn a_header_never_decides_what_is_opened() {
    let place = Place::new();
    // A secret beside the image, named by its header; the chain records something else below.
    place.run(
        "head -c 1048576 /dev/zero | tr '\\0' S > secret; qemu-img create -q -f raw honest.raw 1M; \
         qemu-img create -q -f qcow2 -b secret -F raw a.qcow2 1M",
    );
    for kind in ["in process", "over NBD"] {
        let chain = place.chain("a.qcow2 honest.raw");
        let mut buf = vec![1; 65536];
        if kind == "in process" {
            Qcow2Image::open(&chain).unwrap().read_at(0, &mut buf).unwrap();
        } else {
            over_nbd(&place, &chain).1.read_at(0, &mut buf).unwrap();
        }
        assert!(buf.iter().all(|b| *b == 0), "{kind}: the header's backing file was read");
    }
    // A chain that ends where the header goes on would silently read as zeros what the guest reads as data.
    assert_eq!(explain(&place.chain("a.qcow2")).unwrap_err().kind(), Kind::Conflict);
    place.run("qemu-img create -q -f qcow2 alone.qcow2 1M");
    assert_eq!(explain(&place.chain("alone.qcow2 honest.raw")).unwrap_err().kind(), Kind::Conflict);
}

#[test]
fn a_data_file_only_the_header_knows_is_a_conflict_and_so_is_the_reverse() {
    let place = Place::new();
    place.run("qemu-img create -q -f qcow2 -o data_file=d.raw a.qcow2 1M; qemu-img create -q -f qcow2 b.qcow2 1M");
    let error = open_read(&place.chain("a.qcow2"), &place.options()).err().unwrap();
    assert_eq!(error.kind(), Kind::Conflict);
    let mut with = place.chain("b.qcow2");
    with.0[0].data_file = Some(place.path("d.raw"));
    assert_eq!(open_read(&with, &place.options()).err().unwrap().kind(), Kind::Conflict);
    // And looking at it opens nothing else: the data file may be gone.
    std::fs::remove_file(place.path("d.raw")).unwrap();
    let info = qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert_eq!((info.virtual_size.0, info.data_file.as_deref()), (MIB, Some("d.raw")));
}

#[test]
fn what_cannot_be_read_is_refused_with_its_reason() {
    let place = Place::new();
    place.run(
        "qemu-img create -q -f qcow2 luks.qcow2 1M; printf '\\0\\0\\0\\2' | dd of=luks.qcow2 bs=1 seek=32 conv=notrunc status=none; \
         head -c 1000 /dev/zero > not.qcow2; mkfifo fifo.raw; mkdir dir.raw; \
         qemu-img create -q -f qcow2 long.qcow2 1M",
    );
    for (names, kind) in [
        ("luks.qcow2", Kind::Refused),
        ("not.qcow2", Kind::Corrupt),
        ("fifo.raw", Kind::Conflict),
        ("dir.raw", Kind::Conflict),
        ("missing.raw", Kind::NotFound),
        ("missing.qcow2", Kind::NotFound),
    ] {
        let opened = open_read(&place.chain(names), &place.options());
        assert_eq!(opened.err().unwrap().kind(), kind, "{names}");
        assert_eq!(explain(&place.chain(names)).unwrap_err().kind(), kind, "{names}");
    }
    assert_eq!(explain(&Chain(vec![])).unwrap_err().kind(), Kind::Usage);
    // An L1 table of 32 GiB is not read into memory; QEMU is asked, and says no in its own words.
    let file = std::fs::OpenOptions::new().write(true).open(place.path("long.qcow2")).unwrap();
    file.write_all_at(&u32::MAX.to_be_bytes(), 36).unwrap();
    let error = open_read(&place.chain("long.qcow2"), &place.options()).err().unwrap();
    assert_eq!(error.kind(), Kind::Refused, "{}", error.chain());
    assert!(error.chain().contains("L1"), "{}", error.chain());
}

#[test]
fn scribbled_metadata_is_an_error_or_data_but_never_a_panic() {
    let place = Place::new();
    place.run(&format!("qemu-img create -q -f qcow2 a.qcow2 6M; qemu-io -f qcow2 {SOME} a.qcow2"));
    let good = std::fs::read(place.path("a.qcow2")).unwrap();
    let mut dice = Dice::new("scribbled");
    for _ in 0..std::env::var("ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(300) {
        let mut bad = good.clone();
        for _ in 0..1 + dice.roll(4) {
            // Header, refcounts, L1 and L2 lie in the first five clusters.
            let at = dice.roll(5 << 16) as usize;
            let at = if dice.roll(2) == 0 { at } else { at / 65536 * 65536 + at % 64 };
            bad[at] = dice.roll(256) as u8;
        }
        std::fs::write(place.path("b.qcow2"), &bad).unwrap();
        let Ok(image) = Qcow2Image::open(&place.chain("b.qcow2")) else { continue };
        let size = image.size().0.min(64 * MIB);
        let _ = image.extents(range(0, size));
        let mut buf = vec![0; MIB as usize];
        for at in (0..size).step_by(MIB as usize) {
            let _ = image.read_at(at, &mut buf[..(size - at).min(MIB) as usize]);
        }
    }
}

// ---------------------------------------------------------------------------------------------- life and death

fn zstd(place: &Place) -> Chain {
    place.run(
        "head -c 8000000 /dev/zero | tr '\\0' z > x.raw; \
         qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd x.raw a.qcow2",
    );
    place.chain("a.qcow2")
}

fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

/// The pid of the qemu-nbd child of this process that serves below this directory.
fn child_below(place: &Place) -> u32 {
    let wanted = place.path("run").display().to_string();
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    let mut found = pids.filter(|pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&wanted)
    });
    found.next().expect("a qemu-nbd child")
}

#[test]
fn after_close_the_child_is_gone_and_whoever_kept_the_image_reads_nothing() {
    let place = Place::new();
    let chain = zstd(&place);
    for names in ["qemu-nbd", "in process"] {
        let chain = if names == "qemu-nbd" { chain.clone() } else { place.chain("x.raw") };
        let opened = open_read(&chain, &place.options()).unwrap();
        let kept: Arc<dyn Image> = opened.image.clone();
        let pid = (names == "qemu-nbd").then(|| child_below(&place));
        let reader = {
            let image = kept.clone();
            std::thread::spawn(move || {
                let mut buf = vec![0; 1 << 20];
                while image.read_at(0, &mut buf).is_ok() {}
            })
        };
        std::thread::sleep(Duration::from_millis(50));
        opened.close().unwrap();
        reader.join().unwrap();
        assert!(pid.is_none_or(|pid| !alive(pid)), "{names}");
        assert_eq!(kept.read_at(0, &mut [0]).unwrap_err().kind(), Kind::Interrupted, "{names}");
        assert!(kept.extents(range(0, 512)).is_err(), "{names}");
        assert!(kept.size().0 > 0);
    }
}

#[test]
fn dropping_what_was_opened_ends_the_child_too() {
    let place = Place::new();
    let opened = open_read(&zstd(&place), &place.options()).unwrap();
    let pid = child_below(&place);
    assert!(alive(pid));
    drop(opened);
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "ended and reaped");
}

#[test]
fn a_child_that_dies_is_an_error_of_the_read_and_not_a_hang() {
    let place = Place::new();
    let opened = open_read(&zstd(&place), &place.options()).unwrap();
    let pid = child_below(&place);
    opened.image.read_at(0, &mut [0; 512]).unwrap();
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    let error = opened.image.read_at(0, &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{}", error.chain());
    for _ in 0..4 {
        assert_eq!(opened.image.read_at(0, &mut [0; 512]).unwrap_err().kind(), Kind::Unavailable);
    }
    opened.close().unwrap();
}

/// The second half of the test below: runs in a process of its own, which is killed.
#[test]
fn helper_that_is_killed_while_it_reads() {
    let Some(dir) = std::env::var_os("VIRT_REPLICA_TEST_DIR") else { return };
    let dir = PathBuf::from(dir);
    let layer = Layer { path: dir.join("a.qcow2"), format: Format::Qcow2, block_device: false, data_file: None };
    let options = OpenOptions { runtime_dir: dir.join("run"), force_share: false, readers: 1 };
    // From a thread that ends, as a thread of a pool does.
    let opened = std::thread::spawn(move || open_read(&Chain(vec![layer]), &options).unwrap()).join().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    opened.image.read_at(0, &mut [0; 512]).unwrap();
    std::fs::write(dir.join("ready"), "").unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_child_does_not_outlive_us_when_we_are_killed() {
    let place = Place::new();
    zstd(&place);
    let mut us = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_that_is_killed_while_it_reads", "--nocapture"])
        .env("VIRT_REPLICA_TEST_DIR", place.0.path())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !place.path("ready").exists() {
        assert!(Instant::now() < deadline, "the helper never became ready");
        std::thread::sleep(Duration::from_millis(10));
    }
    let line = format!("{}/run", place.0.path().display());
    let pid = child_below(&place);
    assert!(alive(pid), "{line}");
    us.kill().unwrap();
    us.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while alive(pid) {
        assert!(Instant::now() < deadline, "qemu-nbd {pid} outlived us");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0, "and left no socket");
}

#[test]
fn a_domain_that_is_off_may_be_started_while_we_read() {
    let place = Place::new();
    let chain = zstd(&place);
    let start = "qemu-io -f qcow2 -c 'write -q -P 1 0 512' a.qcow2";
    // Under locks, whoever wants to write is kept out ...
    let opened = open_read(&chain, &place.options()).unwrap();
    let (started, said) = place.try_run(start);
    assert!(!started && said.contains("lock"), "{said}");
    opened.close().unwrap();
    // ... and without them is not.
    let opened = open_read(&chain, &OpenOptions { force_share: true, ..place.options() }).unwrap();
    assert!(opened.how.starts_with("qemu-nbd"));
    place.run(start);
    opened.close().unwrap();
    for format in ["a.qcow2", "x.raw"] {
        let opened = open_read(&place.chain(format), &OpenOptions { force_share: true, ..place.options() }).unwrap();
        place.run(start);
        drop(opened);
    }
}

#[test]
fn a_program_that_is_missing_or_fails_says_so() {
    let place = Place::new();
    let chain = zstd(&place);
    place.run("printf '#!/bin/sh\\necho no luck today >&2\\nexit 1\\n' > nbd; chmod +x nbd");
    // One process, one test: nextest gives each test its own.
    if std::env::var_os("NEXTEST").is_none() {
        eprintln!("SKIPPED: sets the environment; run with cargo nextest");
        return;
    }
    for (program, kind) in [(place.path("nbd"), Kind::Refused), (place.path("none"), Kind::NotFound)] {
        // SAFETY: this process runs this test only, and no other thread of it reads the environment now.
        unsafe { std::env::set_var("QEMU_NBD", &program) };
        let error = open_read(&chain, &place.options()).err().unwrap();
        assert_eq!(error.kind(), kind, "{}", error.chain());
        assert!(kind != Kind::Refused || error.chain().contains("no luck today"), "{}", error.chain());
        assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0, "nothing is left");
    }
}

// ---------------------------------------------------------------------------------------------- writing

/// The same random writes and zeros to an image and to memory.
fn scribble(image: &dyn ImageMut, model: &mut [u8], dice: &mut Dice, steps: usize) {
    let size = model.len() as u64;
    for step in 0..steps {
        let start = dice.roll(size / 512) * 512;
        let start = if dice.roll(3) == 0 { start / 65536 * 65536 } else { start };
        let len = [512, 4096, 65536, 200 * 1024, MIB][dice.roll(5) as usize].min(size - start);
        let bytes = start as usize..(start + len) as usize;
        if dice.roll(3) == 0 {
            image.zero(range(start, start + len)).unwrap();
            model[bytes].fill(0);
        } else {
            let data: Vec<u8> = (0..len).map(|i| (step as u64 * 31 + i / 512 + 1) as u8 | 1).collect();
            image.write_at(start, &data).unwrap();
            model[bytes].copy_from_slice(&data);
        }
        if dice.roll(20) == 0 {
            image.sync().unwrap();
        }
    }
    // The ends of a disk are where mistakes live.
    let tail = size.min(700);
    image.write_at(size - tail, &vec![0xa5; tail as usize]).unwrap();
    model[(size - tail) as usize..].fill(0xa5);
    image.sync().unwrap();
}

#[test]
fn what_we_write_qemu_reads_without_a_fault_or_a_leak() {
    let mut dice = Dice::new("writing");
    for size in [512, 65536, 65536 + 512, 5 * MIB + 1536, 21 * MIB - 512] {
        for backing in [None, Some("b.raw"), Some("small.qcow2"), Some("large.qcow2")] {
            let place = Place::new();
            let (small, large) = (size / 1024 * 512, size + 3 * 65536 + 512);
            place.run(&format!(
                "head -c {size} /dev/urandom > b.raw; qemu-img create -q -f qcow2 -o cluster_size=4k small.qcow2 {small}; \
                 qemu-img create -q -f qcow2 large.qcow2 {large}; qemu-io -f qcow2 -c 'write -q -P 9 0 {large}' large.qcow2"
            ));
            if small > 0 {
                place.run(&format!("qemu-io -f qcow2 -c 'write -q -P 9 0 {small}' small.qcow2"));
            }
            let name = format!("{size} on {backing:?}");
            let mut model = vec![0u8; size as usize];
            if let Some(below) = backing {
                let bytes = place.truth(below);
                let n = bytes.len().min(model.len());
                model[..n].copy_from_slice(&bytes[..n]);
            }
            let format = backing.map(|b| place.layer(b).format);
            let image = place.create("a.qcow2", size, backing.zip(format));
            scribble(&image, &mut model, &mut dice, 60);
            conforms(&name, &image, &model);
            drop(image);
            place.check("a.qcow2");

            // Reopened, it goes on where it was.
            let image = qcow2::open_write(&place.path("a.qcow2")).unwrap();
            conforms(&format!("{name}, reopened"), &image, &model);
            scribble(&image, &mut model, &mut dice, 30);
            image.sync().unwrap();
            drop(image);
            place.check("a.qcow2");
            assert!(place.truth("a.qcow2") == model, "{name}: QEMU reads something else");

            let chain = qcow2::own_chain(&place.path("a.qcow2")).unwrap();
            assert_eq!(chain.0.len(), 1 + backing.iter().len());
            std::fs::write(place.path("model.raw"), &model).unwrap();
            assert!(qemu_img::compare(&chain, &place.chain("model.raw")).unwrap(), "{name}");
            let opened = open_read(&chain, &place.options()).unwrap();
            assert_eq!(opened.how, "qcow2 read in process");
            conforms(&format!("{name}, read only"), &*opened.image, &model);
        }
    }
}

#[test]
fn raw_and_nbd_writers_do_the_same() {
    let mut dice = Dice::new("raw and nbd");
    let size = 9 * MIB + 512;
    let place = Place::new();
    let mut model = vec![0u8; size as usize];
    let image = RawWriter::create(&place.path("a.raw"), DiskSize(size)).unwrap();
    scribble(&image, &mut model, &mut dice, 80);
    conforms("raw writer", &image, &model);
    drop(image);
    assert!(std::fs::read(place.path("a.raw")).unwrap() == model);
    conforms("raw writer, reopened", &RawWriter::open(&place.path("a.raw")).unwrap(), &model);

    let socket = tempfile::tempdir().unwrap();
    let socket = socket.path().join("s");
    place.run(&format!("qemu-img create -q -f qcow2 b.qcow2 {size}"));
    let mut server = Command::new("qemu-nbd")
        .args(["-f", "qcow2", "--persistent", "--shared=4", "--discard=unmap", "-k"])
        .arg(&socket)
        .arg(place.path("b.qcow2"))
        .spawn()
        .unwrap();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let image = NbdImage::connect(&socket, "", &[], 3).unwrap();
    let mut model = vec![0u8; size as usize];
    scribble(&image, &mut model, &mut dice, 80);
    image.trim(range(0, 65536)).unwrap();
    image.write_at(0, &[1; 65536]).unwrap();
    model[..65536].fill(1);
    image.sync().unwrap();
    conforms("nbd writer", &image, &model);
    drop(image);
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(place.truth("b.qcow2") == model);

    // And read-only is read-only.
    let (_server, image) = over_nbd(&place, &place.chain("b.qcow2"));
    assert_eq!(image.write_at(0, &[1; 512]).unwrap_err().kind(), Kind::Refused);
    assert_eq!(image.zero(range(0, 512)).unwrap_err().kind(), Kind::Refused);
}

#[test]
fn several_threads_write_one_image() {
    let place = Place::new();
    place.run("head -c 16777216 /dev/urandom > b.raw");
    let image = place.create("a.qcow2", 16 * MIB, Some(("b.raw", Format::Raw)));
    let mut model = std::fs::read(place.path("b.raw")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                for n in (thread..256).step_by(4) {
                    match n % 7 {
                        0 => image.zero(range(n << 16, (n + 1) << 16)).unwrap(),
                        1 => image.write_at((n << 16) + 512, &[n as u8; 1024]).unwrap(),
                        _ => image.write_at(n << 16, &[n as u8; 65536]).unwrap(),
                    }
                    image.read_at(n << 16, &mut [0; 4096]).unwrap();
                }
            });
        }
    });
    for n in 0..256usize {
        let cluster = &mut model[n << 16..(n + 1) << 16];
        match n % 7 {
            0 => cluster.fill(0),
            1 => cluster[512..1536].fill(n as u8),
            _ => cluster.fill(n as u8),
        }
    }
    image.sync().unwrap();
    conforms("threads", &image, &model);
    drop(image);
    place.check("a.qcow2");
    assert!(place.truth("a.qcow2") == model);
}

#[test]
fn thin_stays_thin_and_zeros_hide_what_is_below() {
    let place = Place::new();
    let occupied = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(place.path(name)).unwrap().blocks() * 512
    };
    // A whole terabyte zeroed in an image that holds nothing allocates nothing.
    let image = place.create("thin.qcow2", 1 << 40, None);
    image.zero(range(0, 1 << 40)).unwrap();
    image.write_at(1 << 39, &[7; 65536]).unwrap();
    image.zero(range(1 << 39, (1 << 39) + 65536)).unwrap();
    image.write_at(1 << 30, &[7; 65536]).unwrap();
    image.sync().unwrap();
    assert_eq!(data_bytes(&image.extents(image.size().range()).unwrap()), 65536);
    drop(image);
    place.check("thin.qcow2");
    assert!(occupied("thin.qcow2") < 2 * MIB, "{}", occupied("thin.qcow2"));

    // In an overlay zeros are clusters of their own, and cost no data. The data below lies across two L2 tables.
    place.run("qemu-img create -q -f qcow2 b.qcow2 600M; qemu-io -f qcow2 -c 'write -q -P 9 508M 8M' b.qcow2");
    let image = place.create("a.qcow2", 600 * MIB, Some(("b.qcow2", Format::Qcow2)));
    image.zero(range(509 * MIB, 599 * MIB)).unwrap();
    image.sync().unwrap();
    assert_eq!(data_bytes(&image.extents(image.size().range()).unwrap()), MIB);
    drop(image);
    place.check("a.qcow2");
    assert!(occupied("a.qcow2") < MIB, "{}", occupied("a.qcow2"));
    let (ok, said) = place.try_run("qemu-io -f qcow2 -c 'read -q -P 9 508M 1M' -c 'read -q -P 0 509M 91M' a.qcow2");
    assert!(ok && !said.contains("verification failed"), "{said}");
}

#[test]
fn what_is_created_records_its_backing_and_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    drop(place.create("base.qcow2", 3 * MIB, None));
    drop(place.create("a.qcow2", 3 * MIB, Some(("base.qcow2", Format::Qcow2))));
    assert_eq!(std::fs::metadata(place.path("a.qcow2")).unwrap().permissions().mode() & 0o777, 0o600);
    let info = qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap();
    assert_eq!((info.backing.as_deref(), info.backing_format.as_deref()), (Some("base.qcow2"), Some("qcow2")));
    assert_eq!(info.virtual_size, DiskSize(3 * MIB));
    assert!(!info.corrupt && !info.dirty && !info.encrypted && info.snapshots.is_empty());
    let (ok, said) = place.try_run("qemu-img info a.qcow2");
    assert!(ok && said.contains("compat: 1.1") && said.contains("cluster_size: 65536"), "{said}");

    let refused =
        |size, backing| qcow2::create(&place.path("new.qcow2"), DiskSize(size), backing).err().unwrap().kind();
    assert_eq!(refused(513, None), Kind::Usage);
    for name in ["/etc/passwd", "../x", "nbd:localhost:1", "a/b", "", ".", "..", "json:{}", "a,b", "a\nb"] {
        assert_eq!(refused(512, Some((name, Format::Raw))), Kind::Refused, "{name:?}");
    }
    assert!(!place.path("new.qcow2").exists());
    assert_eq!(qcow2::create(&place.path("a.qcow2"), DiskSize(512), None).err().unwrap().kind(), Kind::Conflict);

    // Nothing that our store did not make is opened for writing.
    place.run(
        "qemu-img create -q -f qcow2 -b /etc/passwd -F raw evil.qcow2 1M; \
         qemu-img create -q -f qcow2 -u -b x.qcow2 -F qcow2 loop.qcow2 1M; cp loop.qcow2 x.qcow2; \
         qemu-img create -q -f qcow2 marked.qcow2 1M; qemu-img bitmap --add marked.qcow2 b0; \
         qemu-img create -q -f qcow2 -o extended_l2=on ext.qcow2 1M",
    );
    for (name, kind) in [
        ("evil.qcow2", Kind::Refused),
        ("marked.qcow2", Kind::Refused),
        ("ext.qcow2", Kind::Refused),
        ("loop.qcow2", Kind::Corrupt),
    ] {
        assert_eq!(qcow2::open_write(&place.path(name)).err().unwrap().kind(), kind, "{name}");
    }
    let info = qemu_img::info(&place.path("marked.qcow2"), Format::Qcow2, false).unwrap();
    assert!(!info.bitmaps[0].is_inconsistent(), "and its bitmap is as it was");
}

// ---------------------------------------------------------------------------------------------- bitmaps, qemu-img

#[test]
fn a_bitmap_says_what_changed() {
    let place = Place::new();
    place.run(
        "qemu-img create -q -f qcow2 a.qcow2 64M; qemu-io -f qcow2 -c 'write -q -P 1 0 8M' a.qcow2; \
         qemu-img bitmap --add a.qcow2 b0; \
         qemu-io -f qcow2 -c 'write -q -P 2 1M 1' -c 'write -q -P 2 10M 128k' -c 'write -q -P 2 67108352 512' a.qcow2",
    );
    let chain = place.chain("a.qcow2");
    let run = place.path("run");
    let serve = Serve { chain: &chain, runtime_dir: &run, force_share: false, connections: 2, bitmap: Some("b0") };
    let server = QemuNbd::start(&serve).unwrap();
    let context = [virt_replica::image::nbd::bitmap_context("b0")];
    let image = NbdImage::connect(server.socket(), "", &context, 2).unwrap();
    let dirty = image.dirty("b0", image.size().range()).unwrap();
    let block = |n: u64| range(n * 65536, (n + 1) * 65536);
    assert_eq!(dirty, [block(16), range(10 * MIB, 10 * MIB + 131072), block(1023)]);
    assert_eq!(image.dirty("b0", range(10 * MIB + 5, 10 * MIB + 10)).unwrap(), [range(10 * MIB + 5, 10 * MIB + 10)]);
    conforms("with a bitmap", &image, &place.truth_of_open("a.qcow2"));
    assert_eq!(image.dirty("b1", range(0, 512)).unwrap_err().kind(), Kind::Usage);
    let missing = NbdImage::connect(server.socket(), "", &["qemu:dirty-bitmap:none".to_owned()], 1).err().unwrap();
    assert_eq!(missing.kind(), Kind::Refused);
    drop(image);
    server.stop().unwrap();

    let info = qemu_img::info(&chain.top().path, Format::Qcow2, false).unwrap();
    assert_eq!((info.bitmaps[0].name.as_str(), info.bitmaps[0].granularity_bytes), ("b0", 65536));
    assert!(info.bitmaps[0].is_auto());
    let absent = Serve { bitmap: Some("none"), ..serve };
    let error = QemuNbd::start(&absent).err().unwrap();
    assert!(error.kind() == Kind::Refused && error.chain().contains("none"), "{}", error.chain());
}

impl Place {
    /// As [`Place::truth`], of an image that somebody has open.
    fn truth_of_open(&self, top: &str) -> Vec<u8> {
        self.run(&format!("rm -f truth.out; qemu-img convert -U -f qcow2 -O raw {top} truth.out"));
        std::fs::read(self.path("truth.out")).unwrap()
    }
}

#[test]
fn an_offline_commit_keeps_the_overlay_and_makes_the_base_read_the_same() {
    for base in ["base.qcow2", "base.raw"] {
        let place = Place::new();
        let format = place.layer(base).format.as_str();
        place.run(&format!(
            "qemu-img create -q -f {format} {base} 6M; qemu-io -f {format} {SOME} {base}; \
             qemu-img create -q -f qcow2 -b {base} -F {format} a.qcow2; \
             qemu-io -f qcow2 -c 'write -q -P 7 60k 100k' -c 'write -q -z 3M 64k' a.qcow2"
        ));
        let chain = place.chain(&format!("a.qcow2 {base}"));
        let truth = place.truth("a.qcow2");
        assert!(!qemu_img::compare(&chain, &place.chain(base)).unwrap());
        let overlay = std::fs::read(place.path("a.qcow2")).unwrap();
        // Twice: a run that lost the first answer repeats it.
        for _ in 0..2 {
            qemu_img::commit(&chain).unwrap_or_else(|e| panic!("{}", e.chain()));
            assert!(place.truth(base) == truth, "{base}");
            assert!(place.truth("a.qcow2") == truth, "{base}");
            assert!(qemu_img::compare(&chain, &place.chain(base)).unwrap());
        }
        assert_eq!(
            std::fs::read(place.path("a.qcow2")).unwrap().len(),
            overlay.len(),
            "the overlay keeps its clusters"
        );
        let info = qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap();
        assert_eq!(info.backing.as_deref(), Some(base));

        // Somebody has the base open: refused, with QEMU's words, and the overlay still completes it. (qemu-nbd keeps
        // nobody from writing to a raw image.)
        if base == "base.qcow2" {
            let (server, image) = over_nbd(&place, &place.chain(base));
            let error = qemu_img::commit(&chain).unwrap_err();
            assert!(error.kind() == Kind::Refused && error.chain().contains("lock"), "{}", error.chain());
            drop(image);
            server.stop().unwrap();
            assert!(place.truth("a.qcow2") == truth);
        }
    }
}

#[test]
fn a_commit_goes_into_the_next_layer_and_never_below_it() {
    let place = Place::new();
    place.run(
        "qemu-img create -q -f raw c.raw 1M; qemu-img create -q -f qcow2 -b c.raw -F raw b.qcow2; \
         qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 a.qcow2; qemu-io -f qcow2 -c 'write -q -P 7 0 64k' a.qcow2",
    );
    qemu_img::commit(&place.chain("a.qcow2 b.qcow2 c.raw")).unwrap();
    assert_eq!(std::fs::read(place.path("c.raw")).unwrap(), vec![0; MIB as usize]);
    assert_eq!(place.truth("b.qcow2")[..65536], [7; 65536]);
    assert_eq!(qemu_img::commit(&place.chain("c.raw")).unwrap_err().kind(), Kind::Usage);

    qemu_img::rebase_unsafe(&place.path("a.qcow2"), Some(("c.raw", Format::Raw)))
        .unwrap_or_else(|e| panic!("{}", e.chain()));
    let info = qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap();
    assert_eq!((info.backing.as_deref(), info.backing_format.as_deref()), (Some("c.raw"), Some("raw")));
    qemu_img::rebase_unsafe(&place.path("a.qcow2"), None).unwrap();
    assert_eq!(qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap().backing, None);
}

#[test]
fn a_check_tells_damage_from_leaks() {
    let place = Place::new();
    place.run("qemu-img create -q -f qcow2 a.qcow2 6M; qemu-io -f qcow2 -c 'write -q -P 1 0 1M' a.qcow2");
    let path = place.path("a.qcow2");
    let good = std::fs::read(&path).unwrap();
    assert!(qemu_img::check(&path, Format::Qcow2).unwrap().is_sound());
    let l1 = u64::from_be_bytes(good[40..48].try_into().unwrap()) as usize;
    let l2 = (u64::from_be_bytes(good[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize;
    // An entry less: its cluster leaks. An entry twice: two claim one cluster.
    let mut leak = good.clone();
    leak[l2..l2 + 8].fill(0);
    std::fs::write(&path, &leak).unwrap();
    let report = qemu_img::check(&path, Format::Qcow2).unwrap();
    assert!(report.is_sound() && report.leaks == 1, "{report:?}");
    let mut damage = good.clone();
    damage.copy_within(l2..l2 + 8, l2 + 8);
    std::fs::write(&path, &damage).unwrap();
    let report = qemu_img::check(&path, Format::Qcow2).unwrap();
    assert!(!report.is_sound(), "{report:?}");
    std::fs::write(&path, b"nonsense").unwrap();
    assert!(qemu_img::check(&path, Format::Qcow2).is_err());
    std::fs::write(place.path("a.raw"), b"anything").unwrap();
    assert!(qemu_img::check(&place.path("a.raw"), Format::Raw).unwrap().is_sound());
    assert!(qemu_img::info(&place.path("missing.qcow2"), Format::Qcow2, false).is_err());
    let raw = RawImage::open(&place.layer("a.raw")).unwrap();
    assert_eq!(qemu_img::info(&place.path("a.raw"), Format::Raw, true).unwrap().virtual_size, raw.size());
}
