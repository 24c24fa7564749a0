//! The program as people and scripts meet it: help, errors, exit codes, JSON. A cleared environment, no libvirt.
//!
//! What is printed is compared with tests/fixtures/cli/; `VIRT_REPLICA_BLESS=1 cargo test --test it cli::` writes those
//! files anew, for a person to read the difference.

mod debug;
mod points;
mod policy;
#[cfg(feature = "libvirt")]
mod source;
mod target;

use jiff::Timestamp;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;
use virt_replica::block::DiskSize;
use virt_replica::engine::pump::{self, Progress, Shipment};
use virt_replica::engine::stats::{DiskStats, Mode};
use virt_replica::image::open::{OpenOptions, open_read};
use virt_replica::image::{Chain, Format, Layer};
use virt_replica::name::{DiskName, DomainName, DomainUuid, Generation, RunId};
use virt_replica::patch::Compression;
use virt_replica::replica::store::Store;
use virt_replica::replica::{BeginDisk, BeginPoint, Consistency, Replica, SealDisk, SealPoint};

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";
const COMMANDS: [&str; 26] = [
    "daemon",
    "policy",
    "sync",
    "plan",
    "points",
    "status",
    "verify",
    "scrub",
    "prune",
    "pin",
    "unpin",
    "export",
    "ready",
    "drill",
    "failover",
    "migrate",
    "doctor",
    "agent",
    "copy",
    "digest",
    "diff",
    "apply",
    "patch",
    "debug",
    "store",
    "set-generation",
];

/// The program with nothing in its environment but a time zone.
fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virt-replica"));
    command.env_clear().env("TZ", "UTC").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    program().args(args).output().expect("the program starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("text")
}

#[track_caller]
fn expect_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "stdout: {}\nstderr: {}", stdout(output), stderr(output));
}

/// Compares with the recorded text, or records it.
#[track_caller]
fn check(fixture: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cli").join(fixture);
    if std::env::var_os("VIRT_REPLICA_BLESS").is_some() {
        std::fs::write(&path, text).expect("fixtures can be written");
    }
    let recorded = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, recorded, "{} is not what is printed", path.display());
}

/// A store with one domain of one disk and two points, made at fixed times with made-up figures.
struct StoreWithPoints {
    dir: TempDir,
}

impl StoreWithPoints {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("source.raw");
        let store = StoreWithPoints { dir };
        expect_code(&run(&["store", "init", store.root().to_str().unwrap()]), 0);
        for (seq, fill) in [(1u64, 0xaau8), (2, 0xbb)] {
            let mut content = vec![fill; 64 << 10];
            content.resize(1 << 20, 0);
            std::fs::write(&image, content).unwrap();
            store.add_point(seq, &image);
        }
        store
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn target(&self) -> String {
        format!("local:{}", self.root().display())
    }

    fn add_point(&self, seq: u64, image: &Path) {
        let frozen_at: Timestamp = format!("2026-01-02T03:0{seq}:05Z").parse().unwrap();
        let uuid = DomainUuid::new(UUID).unwrap();
        let disk = DiskName::new("vda").unwrap();
        let size = DiskSize(1 << 20);
        let replica = Store::open(&self.root(), &uuid, move || frozen_at).unwrap();
        let view = replica.describe().unwrap();
        let head = view.head().and_then(|p| p.disk(&disk)).map(|d| (d.size, d.root));
        replica
            .begin(&BeginPoint {
                uuid: uuid.clone(),
                name: DomainName::new("web01").unwrap(),
                run: RunId::from_bits(seq << 32),
                generation: Generation(1),
                expected_head: view.head().map(|p| p.id.clone()),
                disks: vec![BeginDisk {
                    name: disk.clone(),
                    size,
                    fresh: head.is_none(),
                    reserve_bytes: 0,
                    resume: false,
                    repair: false,
                }],
            })
            .unwrap();
        let layer = Layer { path: image.to_owned(), format: Format::Raw, block_device: false, data_file: None };
        let options = OpenOptions { runtime_dir: self.dir.path().to_owned(), force_share: false, readers: 1 };
        let opened = open_read(&Chain(vec![layer]), &options).unwrap();
        let mode = if head.is_some() { Mode::Digest } else { Mode::Full };
        let shipment = Shipment {
            uuid,
            disk: disk.clone(),
            size,
            head,
            mode,
            reason: String::new(),
            workers: 1,
            compression: Compression::default(),
            throttle: None,
            dirty: None,
            compare_only: false,
        };
        let shipped = pump::ship(opened.image.as_ref(), &replica, &shipment, &Progress::default(), &|| Ok(())).unwrap();
        opened.close().unwrap();
        let stats = DiskStats {
            mode,
            reason: "a test wanted it so".into(),
            bytes_read: 1 << 20,
            bytes_sent: 1000 * seq,
            bytes_written: 64 << 10,
            blocks_changed: 1,
            audit: None,
            tracking_doubt: false,
            compression: None,
        };
        let disks = vec![SealDisk { name: disk, root: shipped.root, stats }];
        replica
            .seal(&SealPoint {
                frozen_at,
                consistency: Consistency::Crash,
                consistency_reason: None,
                autostart: None,
                tpm_programs: None,
                disks,
                left_out: Default::default(),
            })
            .unwrap();
    }

    /// What was printed, with the directory of this test replaced.
    fn plain(&self, text: &str) -> String {
        text.replace(&self.root().display().to_string(), "/ROOT")
    }
}

#[test]
fn help_is_what_was_read_and_approved() {
    let whole = run(&["--help"]);
    expect_code(&whole, 0);
    check("help.txt", &stdout(&whole));
    for command in COMMANDS {
        let help = run(&[command, "--help"]);
        expect_code(&help, 0);
        check(&format!("help-{command}.txt"), &stdout(&help));
    }
    // What a driver starts for itself is nobody's business, but it is there.
    expect_code(&run(&["deadman", "--help"]), 0);
    assert!(!stdout(&whole).contains("deadman"));
}

#[test]
fn wrong_usage_is_told_with_code_2() {
    for args in [
        &[][..],
        &["nonsense"],
        &["sync", "web01"],
        &["sync", "web01", "--to", "/r", "--exclude-disk", "../vda"],
        &["sync", "web01", "--to", "/r", "--ready-timeout", "90"],
        &["verify", "web01", "--to", "/r", "--point", "newest"],
        &["verify", "web01", "--to", "/r", "--point", "000001-00000000", "--against-source"],
        &["prune", "web01", "--to", "/r"],
        &["prune", "web01", "--to", "/r", "--keep", "last=0"],
        &["prune", "web01", "--to", "/r", "--keep", "last=1", "--point", "000001-00000000"],
        &["sync", "web01", "--to", "/r", "--keep", "always"],
        &["export", "web01", "--to", "/r"],
        &["export", "web01", "--to", "/r", "--output", "/o", "--nbd", "/s"],
        &["agent", "--min-age", "7"],
        &["drill", "web01"],
        &["drill", "web01", "--probe", "tcp:22"],
        &["failover", "web01"],
        &["failover", "web01", "--source-is-dead"],
        &["failover", "web01", "--unplanned"],
        &["failover", "web01", "--undo"],
        &["failover", "web01", "--undo", "--lose-its-writes", "--commit"],
        &["failover", "web01", "--commit", "--point", "000001-00000000"],
        &["points", "web01", "--to", "host:/srv"],
        &["points", "web01", "--to", "ssh://-oProxyCommand=x/srv"],
    ] {
        expect_code(&run(args), 2);
    }
    let scp = run(&["points", "web01", "--to", "host:/srv"]);
    check("error-scp-like.txt", &stderr(&scp));
}

/// A script that asked for JSON gets the end in JSON too, in the last line of stderr, whatever went wrong.
#[test]
fn the_end_of_a_failed_command_is_told_in_json() {
    let dir = tempfile::tempdir().unwrap();
    let target = format!("local:{}", dir.path().display());
    for (args, code, kind) in [
        (&["points", "web01", "--json"][..], 2, "usage"),
        (&["points", "web01", "--json", "--to", "nowhere"], 4, "not_found"),
        (&["points", "web01", "--json", "--to", &target], 4, "not_found"),
        (&["points", "web01", "--json", "--to", "x", "--config", "/nonexistent.yaml"], 78, "config"),
    ] {
        let output = run(args);
        expect_code(&output, code);
        let text = stderr(&output);
        let end: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert_eq!(end["message_type"], "exit_error", "{text}");
        assert_eq!((&end["code"], &end["kind"]), (&code.into(), &kind.into()), "{text}");
        assert!(!end["message"].as_str().unwrap().is_empty() && end.get("hint").is_some(), "{text}");
        assert_eq!(stdout(&output), "");
    }
}

#[test]
fn a_target_may_have_a_name() {
    let store = StoreWithPoints::new();
    let config = store.dir.path().join("vr.yaml");
    let points = |name: &str| run(&["--config", config.to_str().unwrap(), "points", "web01", "--to", name]);
    std::fs::write(&config, format!("targets:\n  dr1:\n    url: {}\n", store.target())).unwrap();
    expect_code(&points("dr1"), 0);
    let unknown = points("dr2");
    expect_code(&unknown, 4);
    check("error-unknown-name.txt", &stderr(&unknown));
    std::fs::write(&config, "targets:\n  dr1:\n    url: ssh://dr1\n    identiy: /k\n").unwrap();
    let mistake = points("dr1");
    expect_code(&mistake, 78);
    check("error-config.txt", &stderr(&mistake).replace(config.to_str().unwrap(), "/CONFIG"));
}

/// `virt-replica points ... | head -1` must not end in a panic, and a full disk must not end in silence.
#[test]
fn a_reader_that_goes_away_is_no_error_and_a_full_disk_is() {
    let store = StoreWithPoints::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let target = store.target();
    let gone = program().args(["points", "web01", "--to", &target]).stdout(writer).output().unwrap();
    expect_code(&gone, 0);
    assert_eq!(stderr(&gone), "");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let full = program().args(["points", "web01", "--to", &target]).stdout(full).output().unwrap();
    expect_code(&full, 1);
    assert!(stderr(&full).contains("cannot write the output"), "{}", stderr(&full));
}

/// stdout belongs to the protocol: whatever the environment says about logs and colours.
#[test]
fn the_agent_says_its_banner_first_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let mut agent = program();
    agent.args(["-vvv", "agent", "--root"]).arg(&root).env("RUST_LOG", "trace");
    let output = agent.output().unwrap();
    assert!(stdout(&output).starts_with("virt-replica agent protocol "), "{}", stdout(&output));
    assert_eq!(stdout(&output).lines().count(), 1);
    expect_code(&output, 1);
    assert!(!root.exists(), "an agent that was asked for nothing makes nothing");
}

#[test]
fn colours_are_for_terminals_only() {
    let output = run(&["points", "web01", "--to", "nowhere"]);
    assert!(!output.stderr.contains(&0x1b), "{}", stderr(&output));
}

#[cfg(not(feature = "libvirt"))]
#[test]
fn a_build_without_libvirt_says_what_it_cannot() {
    let commands: [&[&str]; 5] = [
        &["sync", "web01", "--to", "/r"],
        &["plan", "web01", "--to", "/r"],
        &["status"],
        &["doctor"],
        &["verify", "web01", "--to", "/r", "--against-source"],
    ];
    for args in commands {
        let output = run(args);
        expect_code(&output, 2);
        let text = stderr(&output);
        assert!(text.contains("this build has no libvirt") && text.contains("hint: "), "{text}");
    }
}

/// A point in a file is encrypted and signed as a patch is; and no point comes of one that was not signed.
#[test]
fn a_point_is_brought_only_if_it_was_signed() {
    let store = StoreWithPoints::new();
    let in_dir = |name: &str| store.dir.path().join(name).display().to_string();
    let (file, identity, key, public) =
        (in_dir("shop.point"), in_dir("me.key"), in_dir("sign.key"), in_dir("sign.pub"));
    let tool = |name: &str, args: &[&str]| {
        let done =
            Command::new(name).args(args).output().unwrap_or_else(|e| panic!("{name}: {e}; run tests/run/setup"));
        expect_code(&done, 0);
        stdout(&done).trim().to_owned()
    };
    tool("age-keygen", &["-o", &identity]);
    let recipient = tool("age-keygen", &["-y", &identity]);
    tool("minisign", &["-G", "-W", "-p", &public, "-s", &key]);
    let target = store.target();
    let from = ["diff", "--point", "web01", "--to", &target, "-o", &file];
    expect_code(&run(&[&from[..], &["--encrypt-to", &recipient, "--sign-with", &key]].concat()), 0);
    tool("minisign", &["-V", "-p", &public, "-m", &file]);
    let other = format!("local:{}", in_dir("other"));
    expect_code(&run(&["store", "init", &in_dir("other")]), 0);
    let with = ["--to", &other, "--decrypt-with", &identity, "--verify-with", &public];
    let points = || stdout(&run(&["points", "web01", "--to", &other, "--json"]));
    // Through a pipe it is known at the end only.
    let forged = in_dir("forged");
    expect_code(&run(&[&from[..4], &[&target, "-o", &forged, "--encrypt-to", &recipient]].concat()), 0);
    let signature = format!("{file}.minisig");
    let piped = |file: &str| {
        let args = [&["apply", "-"][..], &with, &["--signature", &signature]].concat();
        program().args(args).stdin(std::fs::File::open(file).unwrap()).output().unwrap()
    };
    for refused in [piped(&forged), run(&[&["apply", &forged][..], &with, &["--signature", &signature]].concat())] {
        expect_code(&refused, 13);
        assert!(stderr(&refused).contains("signature is not that of this file"), "{}", stderr(&refused));
        assert!(!points().contains("frozen_at"), "{}", points());
    }
    expect_code(&piped(&file), 0);
    assert!(points().contains("frozen_at"));
    let again = run(&[&["apply", &file][..], &with].concat());
    expect_code(&again, 0);
    assert!(stdout(&again).contains("already"));
}
