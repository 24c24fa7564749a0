//! No input makes a look panic, wait, or say more than its bounds allow; and what stands before damage is told.

use super::*;
use crate::cli::{Cli, Command as Of};
use clap::Parser;
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;
use virt_replica::agent::wire::{FrameKind, Head, write_frame};
use virt_replica::error::{Error, Kind};

/// Entries of each list in these tests.
const MAX: usize = 5;

/// A page of such lists has no more lines, and none of them is longer.
const LINES_MAX: usize = 90;
const LINE_MAX: usize = 1600;

/// A look as both readers of it see it: the page and the JSON.
struct Shown {
    page: String,
    json: Value,
    damage: Option<Error>,
}

fn shown<V: View>(subject: &'static str, path: &Path, look: Result<Look<V>>) -> Result<Shown> {
    let Look { view, damage } = look?;
    let found = damage.as_ref().map(Finding::of);
    let page = text(path, &view, found.as_ref());
    let json = serde_json::to_string(&told(subject, path, &view, found)).unwrap();
    assert_eq!(json.lines().count(), 1, "{json}");
    Ok(Shown { page, json: serde_json::from_str(&json).unwrap(), damage })
}

fn look_at(subject: &'static str, path: &Path) -> Result<Shown> {
    let cli = Cli::try_parse_from(["virt-replica", "debug", subject, path.to_str().unwrap()]).unwrap();
    let Of::Debug(args) = &cli.command else { panic!("the grammar has another command") };
    match &args.subject {
        Subject::Extents(args) => shown(subject, path, extents::look(path, args, &cli.globals, MAX)),
        Subject::Patch(args) => shown(subject, path, patch::look(path, &args.keys, MAX)),
        Subject::Points(args) => shown(subject, path, points::look(path, &args.keys, Timestamp::UNIX_EPOCH, MAX)),
        Subject::Journal(_) => shown(subject, path, journal::look(path, MAX)),
        Subject::Digests(_) => shown(subject, path, digests::look(path, MAX)),
        Subject::Wire(_) => shown(subject, path, wire::look(path, MAX)),
    }
}

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn frames() -> Vec<u8> {
    let mut bytes = fixture("formats/v1/wire-banner-client.txt");
    for name in ["describe", "apply", "nodes", "pieces"] {
        bytes.extend(fixture(&format!("formats/v1/wire-frame-{name}.bin")));
    }
    for (kind, payload) in [(FrameKind::Ping, ""), (FrameKind::Progress, r#"{"done_bytes":1,"total_bytes":2}"#)] {
        write_frame(&mut bytes, Head { kind, more: false, id: 0 }, &[], payload.as_bytes()).unwrap();
    }
    bytes
}

/// Every kind of file that there is, with the subject that shows it and its name.
fn samples() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let of = |subject, name, fixture_name: &str| (subject, name, fixture(fixture_name));
    vec![
        of("patch", "a.patch", "formats/v1/patch.bin"),
        of("patch", "a.patch", "formats/v1/patch-plain.bin"),
        of("patch", "a.patch", "formats/v1/patch-zstd.bin"),
        of("points", "a.point", "formats/v1/point.bin"),
        of("points", "manifest.json", "debug/manifest.json"),
        of("journal", "record.json", "debug/journal/record.json"),
        of("journal", "lock", "debug/journal/lock"),
        of("journal", "history.jsonl", "debug/journal/history.jsonl"),
        of("digests", "a.changes", "formats/v1/changes.bin"),
        ("wire", "session", frames()),
    ]
}

/// Small and good enough for a sample; every test prints where it begins.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let seed = std::env::var("VIRT_REPLICA_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| Timestamp::now().as_nanosecond() as u64);
        println!("VIRT_REPLICA_SEED={seed}");
        Random(seed)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33) as usize % end
    }
}

/// Writes `bytes` under that name and looks at them; what is shown has to keep its bounds.
fn bounded(dir: &Path, subject: &'static str, name: &str, bytes: &[u8]) -> Result<Shown> {
    let path = dir.join(name);
    std::fs::File::create(&path).and_then(|mut file| file.write_all(bytes)).unwrap();
    let seen = look_at(subject, &path)?;
    let lines: Vec<&str> = seen.page.lines().collect();
    assert!(lines.len() <= LINES_MAX, "{} lines: {}", lines.len(), seen.page);
    assert!(lines.iter().all(|line| line.len() <= LINE_MAX), "{}", seen.page);
    let control = |c: char| c.is_control() && c != '\n';
    assert!(!seen.page.contains(control), "{:?}", seen.page);
    Ok(seen)
}

#[test]
fn whole_files_are_shown_whole() {
    let dir = tempfile::tempdir().unwrap();
    for (subject, name, bytes) in samples() {
        let seen = bounded(dir.path(), subject, name, &bytes).unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
        assert!(seen.damage.is_none(), "{subject} {name}: {:?}", seen.damage);
        assert_eq!((&seen.json["message_type"], &seen.json["subject"]), (&"debug".into(), &subject.into()));
    }
}

#[test]
fn a_file_that_is_cut_anywhere_is_shown_as_far_as_it_goes() {
    let (dir, mut random) = (tempfile::tempdir().unwrap(), Random::new());
    for (subject, name, bytes) in samples() {
        let some: Vec<usize> = match bytes.len() {
            len @ ..=600 => (0..len).collect(),
            len => (0..300).map(|_| random.below(len)).collect(),
        };
        for cut in some {
            match bounded(dir.path(), subject, name, &bytes[..cut]) {
                // A history has no end, and a stream may end between two frames.
                Ok(seen) if seen.damage.is_none() => {
                    assert!(
                        name == "history.jsonl" || subject == "wire" || bytes[cut..].trim_ascii().is_empty(),
                        "{name}: {cut}"
                    );
                }
                Ok(Shown { damage: Some(e), .. }) | Err(e) => {
                    let at = e.context().offset_bytes.unwrap_or(0);
                    assert!(at <= cut as u64, "{name} cut at {cut}: {}", e.chain());
                }
                Ok(_) => unreachable!("damage is there or not"),
            }
        }
    }
}

#[test]
fn flipped_bits_make_no_look_panic() {
    let (dir, mut random) = (tempfile::tempdir().unwrap(), Random::new());
    for (subject, name, bytes) in samples() {
        for _ in 0..250 {
            let mut bytes = bytes.clone();
            for _ in 0..1 + random.below(3) {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            let _ = bounded(dir.path(), subject, name, &bytes);
        }
    }
}

#[test]
fn every_subject_refuses_nonsense_or_shows_it_within_bounds() {
    let (dir, mut random) = (tempfile::tempdir().unwrap(), Random::new());
    for subject in ["patch", "points", "journal", "digests", "wire"] {
        for name in ["x", "lock", "record.json", "history.jsonl"] {
            for len in [0, 1, 15, 16, 17, 1000, 100_000] {
                let noise: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
                let _ = bounded(dir.path(), subject, name, &noise);
            }
        }
    }
}

/// What a decoder takes apart before the damage is all told, in the same words as of the whole file.
#[test]
fn records_before_damage_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fixture("formats/v1/patch.bin");
    let whole = bounded(dir.path(), "patch", "whole", &bytes).unwrap().json;
    let records = whole["patch"]["records"]["shown"].as_array().unwrap().clone();
    assert!(records.len() >= 3 && whole["patch"]["records"]["left_out"] == 0, "{whole}");
    for (n, record) in records.iter().enumerate() {
        let end = record["offset"].as_u64().unwrap() + record["length"].as_u64().unwrap();
        for cut in [end, end + 1] {
            let seen = bounded(dir.path(), "patch", "cut", &bytes[..cut as usize]).unwrap();
            assert_eq!(seen.json["patch"]["records"]["shown"].as_array().unwrap()[..], records[..=n]);
            assert_eq!(seen.json["damage"]["offset"], end, "{}", seen.page);
            assert!(seen.page.contains("damaged"), "{}", seen.page);
        }
        // A header that was changed: what comes before it counts, and it does not.
        let mut changed = bytes.clone();
        changed[record["offset"].as_u64().unwrap() as usize + 9] ^= 1;
        let seen = bounded(dir.path(), "patch", "changed", &changed).unwrap();
        assert_eq!(seen.json["patch"]["records"]["shown"].as_array().unwrap()[..], records[..n]);
        assert_eq!((&seen.json["damage"]["offset"], seen.damage.unwrap().kind()), (&record["offset"], Kind::Corrupt));
    }
}

#[test]
fn frames_before_a_torn_or_an_unknown_one_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = frames();
    let len = bytes.len() as u64;
    bytes.extend([7, 0, 0, 0, 0x77]);
    bytes.extend([0; 20]);
    let seen = bounded(dir.path(), "wire", "w", &bytes).unwrap();
    assert_eq!((&seen.json["frames"]["count"], &seen.json["damage"]["offset"]), (&6.into(), &len.into()));
    assert!(seen.page.contains("unknown kind 0x77") && seen.page.contains("25 bytes from here on"), "{}", seen.page);
    assert!(seen.page.contains("and 1 more frames"), "{}", seen.page);
    let torn = bounded(dir.path(), "wire", "w", &bytes[..len as usize - 1]).unwrap();
    assert_eq!(torn.json["frames"]["count"], 5);
    assert!(torn.page.contains("ended inside a frame"), "{}", torn.page);
    // Without a banner, from a frame on, and of a length that nothing may have.
    let bare = [&[0xff; 4][..], &[1, 0, 0, 0], &[0; 8]].concat();
    let seen = bounded(dir.path(), "wire", "w", &bare).unwrap();
    assert!(seen.page.contains("4294967295 bytes; at most 262144"), "{}", seen.page);
}

/// What may stand in the place of a file of ours, and must not be waited for, followed or acted on.
#[test]
fn what_is_no_file_is_refused_and_never_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    let fifo = |path: &Path| {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        mknodat(CWD, path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    };
    fifo(&at("fifo"));
    for subject in ["patch", "points", "journal", "digests", "wire", "extents"] {
        for path in [at("fifo"), "/dev/zero".into()] {
            let e = look_at(subject, &path).err().unwrap_or_else(|| panic!("{subject} looks into {}", path.display()));
            assert_eq!(e.kind(), Kind::Refused, "{subject}: {}", e.chain());
        }
        assert_eq!(look_at(subject, &at("none")).err().unwrap().kind(), Kind::NotFound, "{subject}");
    }
    // Below a directory no link is followed either.
    for (subject, name) in [("points", "manifest.json"), ("journal", "lock")] {
        for link in [true, false] {
            let place = at(&format!("{subject}-{link}"));
            std::fs::create_dir(&place).unwrap();
            match link {
                true => std::os::unix::fs::symlink("/etc/hostname", place.join(name)).unwrap(),
                false => fifo(&place.join(name)),
            }
            let e = match look_at(subject, &place) {
                Ok(seen) => seen.damage.unwrap_or_else(|| panic!("{}", seen.page)),
                Err(e) => e,
            };
            assert_eq!(e.kind(), Kind::Refused, "{}", e.chain());
        }
    }
}

/// Claims that no file keeps: sizes, lengths and counts at their largest, in a few bytes or in a sparse file.
#[test]
fn large_claims_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let sparse = |name: &str, head: &[u8], len: u64| -> PathBuf {
        let path = dir.path().join(name);
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(head).unwrap();
        file.set_len(len).unwrap();
        path
    };
    let begun = std::time::Instant::now();
    let raw = look_at("extents", &sparse("a.raw", &[1; 4096], 1 << 42)).unwrap();
    assert_eq!(raw.json["extents"]["count"], 2, "{}", raw.page);
    assert_eq!(raw.json["totals"]["zero_bytes"], (1u64 << 42) - 4096, "{}", raw.page);
    let e = look_at("journal", &sparse("record.json", b"{", 1 << 40)).err().unwrap();
    assert_eq!(e.kind(), Kind::Corrupt, "{}", e.chain());
    let many = format!("{{\"points\":[{}{{}}]}}", "{},".repeat(200_000));
    let seen = bounded(dir.path(), "points", "manifest.json", many.as_bytes()).unwrap();
    assert!(seen.json["replica"]["findings"]["left_out"].as_u64().unwrap() > 500, "{}", seen.page);
    let deep = "[".repeat(1 << 20);
    assert!(bounded(dir.path(), "points", "manifest.json", deep.as_bytes()).unwrap().damage.is_some());
    let long = format!("{}\n", "x".repeat(3 << 20)).repeat(3);
    let seen = bounded(dir.path(), "journal", "history.jsonl", long.as_bytes()).unwrap();
    assert!(seen.json["unreadable"].as_u64().unwrap() >= 9, "{}", seen.page);
    assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
}
