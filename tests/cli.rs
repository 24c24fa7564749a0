//! The program as people and scripts meet it: help, errors, exit codes, JSON. A cleared environment, no libvirt.
//!
//! What is printed is compared with tests/fixtures/cli/; `VIRT_REPLICA_BLESS=1 cargo test --test cli` writes those files
//! anew, for a person to read the difference.

use jiff::Timestamp;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;
use virt_replica::block::DiskSize;
use virt_replica::image::open::{OpenOptions, open_read};
use virt_replica::image::{Chain, Format, Layer};
use virt_replica::name::{DiskName, DomainName, DomainUuid, Generation, RunId};
use virt_replica::patch::Compression;
use virt_replica::replica::store::Store;
use virt_replica::replica::{BeginDisk, BeginPoint, Consistency, DiskStats, Mode, Replica, SealDisk, SealPoint};
use virt_replica::replicate::pump::{self, Progress, Shipment};

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";
const COMMANDS: [&str; 23] = [
    "daemon", "policy", "sync", "plan", "points", "status", "verify", "scrub", "prune", "pin", "unpin", "export",
    "ready", "drill", "failover", "migrate", "doctor", "agent", "copy", "digest", "diff", "apply", "patch",
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
        };
        let disks = vec![SealDisk { name: disk, root: shipped.root, stats }];
        replica
            .seal(&SealPoint {
                frozen_at,
                consistency: Consistency::Crash,
                consistency_reason: None,
                autostart: None,
                disks,
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

/// The contract of issue and docs/formats/json.md: names, order, absolute paths.
#[test]
fn points_are_listed_oldest_first_also_without_a_source() {
    let store = StoreWithPoints::new();
    for domain in ["web01", UUID] {
        let output = run(&["points", domain, "--to", &store.target(), "--json"]);
        expect_code(&output, 0);
        assert_eq!(stdout(&output).lines().count(), 1);
        let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
        let points = json["points"].as_array().unwrap();
        let ids: Vec<&str> = points.iter().map(|p| p["id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["000001-00000001", "000002-00000002"]);
        for point in points {
            for name in ["id", "generation", "frozen_at", "sealed_at", "consistency", "disks"] {
                assert!(point.get(name).is_some(), "'{name}' is missing in {point}");
            }
            for disk in point["disks"].as_array().unwrap() {
                for name in ["name", "image", "mode", "reason", "bytes_read", "bytes_sent", "bytes_written"] {
                    assert!(disk.get(name).is_some(), "'{name}' is missing in {disk}");
                }
                let image = Path::new(disk["image"].as_str().unwrap());
                assert!(image.is_absolute() && image.exists(), "{image:?}");
            }
        }
        assert_eq!(points[0]["frozen_at"], "2026-01-02T03:01:05Z");
        assert_eq!(points[1]["disks"][0]["mode"], "digest");
    }
    let output = run(&["points", "web01", "--to", &store.target()]);
    expect_code(&output, 0);
    check("points.txt", &store.plain(&stdout(&output)));
    expect_code(&run(&["points", "web02", "--to", &store.target()]), 4);
}

#[test]
fn verify_says_whole_or_damaged_with_code_13() {
    let store = StoreWithPoints::new();
    let verify = |more: &[&str]| run(&[&["verify", "web01", "--to", &store.target()], more].concat());
    let whole = verify(&[]);
    expect_code(&whole, 0);
    check("verify.txt", &store.plain(&stdout(&whole)));
    expect_code(&verify(&["--point", "000001-00000001"]), 0);
    expect_code(&verify(&["--point", "000009-00000009"]), 4);

    let listed: Value =
        serde_json::from_str(&stdout(&run(&["points", UUID, "--to", &store.target(), "--json"]))).unwrap();
    let image = listed["points"][1]["disks"][0]["image"].as_str().unwrap().to_owned();
    let mut bytes = std::fs::read(&image).unwrap();
    let at =
        bytes.windows(4096).position(|w| w.iter().all(|b| *b == 0xbb)).expect("the guest's bytes are in its image");
    bytes[at + 100] ^= 1;
    std::fs::write(&image, bytes).unwrap();

    let damaged = verify(&["--json"]);
    expect_code(&damaged, 13);
    let text = stdout(&damaged);
    let end: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((&end["message_type"], &end["equal"]), (&"verify".into(), &false.into()));
    assert_eq!((&end["point"], &end["disks"][0]["damaged"][0]), (&"000002-00000002".into(), &0.into()));
    let for_people = verify(&[]);
    expect_code(&for_people, 13);
    check("verify-damaged.txt", &store.plain(&(stdout(&for_people) + &stderr(&for_people))));
    // The point below it is what it was.
    expect_code(&verify(&["--point", "000001-00000001"]), 0);

    let scrubbed = run(&["scrub", "web01", "--to", &store.target()]);
    expect_code(&scrubbed, 13);
    check("scrub-damaged.txt", &store.plain(&(stdout(&scrubbed) + &stderr(&scrubbed))));
    let json = run(&["scrub", "web01", "--to", &store.target(), "--rate", "1G", "--json"]);
    expect_code(&json, 13);
    let end: Value = serde_json::from_str(stdout(&json).lines().last().unwrap()).unwrap();
    assert_eq!((&end["finished"], &end["damage"][0]["point"]), (&true.into(), &"000002-00000002".into()), "{end:#}");
    let known: Value =
        serde_json::from_str(&stdout(&run(&["points", UUID, "--to", &store.target(), "--json"]))).unwrap();
    assert_eq!(known["scrub"]["damage"], end["damage"]);
    let again = verify(&["--json"]);
    let again: Value = serde_json::from_str(stdout(&again).lines().last().unwrap()).unwrap();
    assert_eq!(again["known_damage"], end["damage"]);
    expect_code(&run(&["scrub", "web01", "--to", &store.target(), "--rate", "0"]), 2);
}

/// What a dry run says is what happens, and what is held stays.
#[test]
fn points_are_pruned_as_was_said() {
    let store = StoreWithPoints::new();
    let target = store.target();
    let prune = |more: &[&str]| run(&[&["prune", "web01", "--to", &target], more].concat());
    let json = |output: &Output| -> Value {
        expect_code(output, 0);
        serde_json::from_str(stdout(output).lines().last().unwrap()).unwrap()
    };
    let ids = || -> Vec<String> {
        let listed = json(&run(&["points", "web01", "--to", &target, "--json"]));
        listed["points"].as_array().unwrap().iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect()
    };
    let thought = prune(&["--keep", "last=1", "--dry-run"]);
    expect_code(&thought, 0);
    check("prune-dry-run.txt", &store.plain(&stdout(&thought)));
    assert_eq!(ids().len(), 2, "a dry run removes nothing");

    expect_code(&run(&["pin", "web01", "000001-00000001", "--to", &target, "--reason", "before the upgrade"]), 0);
    expect_code(&run(&["pin", "web01", "000009-00000009", "--to", &target]), 4);
    let listed = run(&["points", "web01", "--to", &target]);
    check("points-pinned.txt", &store.plain(&stdout(&listed)));
    let pinned = prune(&["--keep", "last=1"]);
    expect_code(&pinned, 0);
    check("prune-pinned.txt", &store.plain(&stdout(&pinned)));
    assert_eq!(ids().len(), 2);
    expect_code(&run(&["unpin", "web01", "000001-00000001", "--to", &target]), 0);

    let end = json(&prune(&["--point", "000001-00000001", "--json"]));
    assert_eq!((&end["message_type"], &end["dry_run"]), (&"prune".into(), &false.into()));
    assert_eq!(end["points"][0]["action"], "remove");
    assert_eq!(end["points"][1]["reasons"], serde_json::json!(["head", "not_named"]));
    assert_eq!(
        (&end["removed"], &end["folded"]),
        (&serde_json::json!(["000001-00000001"]), &serde_json::json!(["000001-00000001"]))
    );
    assert_eq!(ids(), ["000002-00000002"]);
    expect_code(&run(&["verify", "web01", "--to", &target]), 0);
    expect_code(&prune(&["--point", "000001-00000001"]), 4);
    // The newest one stays whatever is asked for.
    expect_code(&prune(&["--point", "000002-00000002"]), 1);
    assert_eq!(ids(), ["000002-00000002"]);
}

#[test]
fn a_disk_of_a_point_is_handed_out_as_a_file() {
    let store = StoreWithPoints::new();
    let target = store.target();
    let file = store.dir.path().join("out.img");
    let path = file.to_str().unwrap();
    let export = |more: &[&str]| run(&[&["export", "web01", "--to", &target, "--output", path], more].concat());
    let first = export(&["--point", "000001-00000001"]);
    expect_code(&first, 0);
    check("export.txt", &stdout(&first).replace(path, "/OUT"));
    let content = std::fs::read(&file).unwrap();
    assert!(content.len() == 1 << 20 && content[..64 << 10].iter().all(|b| *b == 0xaa));
    assert!(content[64 << 10..].iter().all(|b| *b == 0));
    use std::os::unix::fs::MetadataExt;
    assert!(std::fs::metadata(&file).unwrap().blocks() * 512 < 256 << 10, "sparse");

    // What is there is not replaced unasked.
    expect_code(&export(&[]), 1);
    assert_eq!(std::fs::read(&file).unwrap(), content);
    expect_code(&export(&["--force", "--format", "qcow2", "--disk", "vda", "--json"]), 0);
    let raw = store.dir.path().join("raw.img");
    let convert = ["convert", "-f", "qcow2", "-O", "raw", path, raw.to_str().unwrap()];
    let done = Command::new("qemu-img").args(convert).status().unwrap();
    let content = std::fs::read(&raw).unwrap();
    assert!(done.success() && content.len() == 1 << 20 && content[..64 << 10].iter().all(|b| *b == 0xbb));
    expect_code(&export(&["--force", "--disk", "vdb"]), 4);
    expect_code(&export(&["--force", "--point", "000009-00000009"]), 4);

    // Damage is not handed out as the point, and nothing half done is left.
    let image = std::fs::read_dir(store.root().join("replicas").join(UUID).join("points/000002-00000002"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "qcow2"))
        .unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    let at = bytes.windows(4096).position(|w| w.iter().all(|b| *b == 0xbb)).unwrap();
    bytes[at + 9] ^= 1;
    std::fs::write(&image, bytes).unwrap();
    let other = store.dir.path().join("other.img");
    expect_code(&run(&["export", "web01", "--to", &target, "--output", other.to_str().unwrap()]), 13);
    let left: Vec<String> = std::fs::read_dir(store.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.contains("other") || n.contains(".part"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Over NBD on the host of the store: QEMU reads it, the point is leased, and all of it ends with the command.
#[test]
fn a_disk_of_a_point_is_served_over_nbd() {
    use std::io::{BufRead, BufReader};
    let store = StoreWithPoints::new();
    let target = store.target();
    let socket = store.dir.path().join("s");
    let args = ["export", "web01", "--to", &target, "--point", "000001-00000001", "--json", "--nbd"];
    let path = std::env::var_os("PATH").unwrap();
    let mut server =
        program().env("PATH", path).args(args).arg(&socket).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&said["message_type"], &said["size"]), (&"nbd".into(), &(1 << 20).into()));
    let raw = store.dir.path().join("raw.img");
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let convert = ["convert", "-f", "raw", "-O", "raw", &url, raw.to_str().unwrap()];
    assert!(Command::new("qemu-img").args(convert).status().unwrap().success());
    assert!(std::fs::read(&raw).unwrap()[..64 << 10].iter().all(|b| *b == 0xaa));
    let listed = |what: &str| -> Value {
        let output = run(&["points", "web01", "--to", &target, "--json"]);
        let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
        json[what].clone()
    };
    assert!(listed("leases").as_array().unwrap().iter().any(|l| l["purpose"] == "nbd"), "{}", listed("leases"));
    let pruned = run(&["prune", "web01", "--to", &target, "--point", "000001-00000001"]);
    expect_code(&pruned, 0);
    assert!(stdout(&pruned).contains("in use"), "{}", stdout(&pruned));
    rustix::process::kill_process(rustix::process::Pid::from_child(&server), rustix::process::Signal::INT).unwrap();
    assert!(server.wait().unwrap().success());
    assert!(!socket.exists() && listed("leases").as_array().unwrap().is_empty(), "{}", listed("leases"));
    // Elsewhere there is no qemu-nbd of ours.
    expect_code(&run(&["export", "web01", "--to", "ssh://nowhere", "--nbd", "/tmp/s"]), 2);
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

#[cfg(feature = "libvirt")]
mod source {
    use super::*;
    use virt_replica::replicate::decide::Phase;
    use virt_replica::replicate::journal::{DiskRecord, Journal, Record};
    use virt_replica::replicate::report::{Report, RunOutcome};

    /// Where no libvirt can be.
    const NO_LIBVIRT: &str = "qemu+unix:///system?socket=/nonexistent/socket";

    fn open_record(overlay: &Path) -> Record {
        let base =
            Layer { path: "/pool/web01.qcow2".into(), format: Format::Qcow2, block_device: false, data_file: None };
        Record {
            format: 1,
            run: RunId::from_bits(7),
            domain: DomainName::new("web01").unwrap(),
            uuid: DomainUuid::new(UUID).unwrap(),
            instance: Some(3),
            boot: None,
            persistent: true,
            phase: Phase::CommitIntent,
            resume_after: false,
            disks: vec![DiskRecord {
                name: DiskName::new("vda").unwrap(),
                base,
                overlay: overlay.to_owned(),
                size: DiskSize(1 << 20),
                base_stamp: None,
                overlay_id: None,
                complete_at: None,
            }],
            started_at: Timestamp::UNIX_EPOCH,
            frozen_at: Some(Timestamp::UNIX_EPOCH),
            point: None,
        }
    }

    fn report(store: &StoreWithPoints, outcome: RunOutcome, target: &str) -> Report {
        let uuid = DomainUuid::new(UUID).unwrap();
        let view = Store::open(&store.root(), &uuid, Timestamp::now).unwrap().describe().unwrap();
        let failed = outcome == RunOutcome::Failed;
        Report {
            domain: DomainName::new("web01").unwrap(),
            uuid,
            target: target.to_owned(),
            run_id: RunId::from_bits(9),
            started_at: Timestamp::UNIX_EPOCH,
            outcome,
            point: view.head().cloned().filter(|_| !failed),
            capture: None,
            capture_reason: None,
            held_ms: None,
            freeze_ms: 1.0,
            pause_ms: 2.0,
            duration_ms: 3.0,
            skipped: Vec::new(),
            alarms: Vec::new(),
            warnings: Vec::new(),
            target_seen: None,
            error: failed.then(|| "the target is on fire".to_owned()),
            error_kind: None,
        }
    }

    /// Status is asked for when things are bad: libvirt down, a commit pending, the last run failed.
    #[test]
    fn status_tells_what_the_journal_knows_when_libvirt_is_down() {
        let store = StoreWithPoints::new();
        let state = store.dir.path().join("state");
        let overlay = store.dir.path().join("web01.vda.vr-00000000.qcow2");
        std::fs::write(&overlay, "").unwrap();
        let journal = Journal::open(&state, &DomainUuid::new(UUID).unwrap(), "test", Timestamp::UNIX_EPOCH).unwrap();
        journal.keep_report(&report(&store, RunOutcome::Sealed, "dr1")).unwrap();
        journal.keep_report(&report(&store, RunOutcome::Failed, "dr1")).unwrap();
        journal.keep_report(&report(&store, RunOutcome::Failed, "dr2")).unwrap();
        journal.write(&open_record(&overlay)).unwrap();
        drop(journal);
        let status = |more: &[&str]| {
            let output =
                run(&[&["status", "--json", "-c", NO_LIBVIRT, "--state-dir", state.to_str().unwrap()], more].concat());
            expect_code(&output, 0);
            assert!(stderr(&output).contains("libvirt was not asked"), "{}", stderr(&output));
            serde_json::from_str::<Value>(&stdout(&output)).unwrap()
        };

        let json = status(&[]);
        assert_eq!(json["head_from"], "journal");
        let rows = json["domains"].as_array().unwrap();
        assert_eq!(rows.len(), 2, "one for each target: {json}");
        let dr1 = rows.iter().find(|r| r["target"] == "dr1").unwrap();
        assert_eq!((&dr1["domain"], &dr1["uuid"]), (&"web01".into(), &UUID.into()));
        assert_eq!((&dr1["state"], &dr1["running"]), (&"commit_pending".into(), &Value::Null));
        assert_eq!(dr1["head"]["id"], "000002-00000002", "a failed run does not hide the point before it");
        assert_eq!(dr1["head"]["frozen_at"], "2026-01-02T03:02:05Z");
        assert!(dr1["lag_s"].as_i64().unwrap() > 0);
        assert_eq!(
            (&dr1["last_run"]["outcome"], &dr1["last_run"]["error"]),
            (&"failed".into(), &"the target is on fire".into())
        );
        assert_eq!(dr1["overlays"][0]["path"], overlay.to_str().unwrap());
        let dr2 = rows.iter().find(|r| r["target"] == "dr2").unwrap();
        assert_eq!((&dr2["head"], &dr2["lag_s"]), (&Value::Null, &Value::Null));

        let json = status(&["web01", "--to", &store.target()]);
        assert_eq!(json["head_from"], "target");
        assert_eq!(json["domains"][0]["head"]["id"], "000002-00000002");
        assert_eq!(json["domains"][0]["target"], store.target());
    }

    #[test]
    fn status_of_an_unknown_domain_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let args = ["status", "web01", "-c", NO_LIBVIRT, "--state-dir", dir.path().to_str().unwrap()];
        expect_code(&run(&args), 4);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "status makes nothing");
    }

    /// Nothing may be touched, here or at the target, by a run that cannot see its domain.
    #[test]
    fn a_run_without_libvirt_ends_before_it_begins() {
        let dir = tempfile::tempdir().unwrap();
        let (root, state) = (dir.path().join("root"), dir.path().join("state"));
        for command in ["sync", "plan"] {
            let mut program = program();
            program.args([command, "web01", "--json", "--to"]).arg(&root).arg("--state-dir").arg(&state);
            let output = program.env("LIBVIRT_DEFAULT_URI", NO_LIBVIRT).output().unwrap();
            expect_code(&output, 1);
            let text = stderr(&output);
            let end: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
            assert_eq!(end["kind"], "unavailable", "{text}");
            assert!(!root.exists() && !state.exists());
        }
    }
}

/// A directory as /etc/virt-replica, with one target and these policies.
fn configured(policies: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("virt-replica.yaml"), "targets: {dr1: {url: ssh://dr1}}\n").unwrap();
    std::fs::create_dir(dir.path().join("policies.d")).unwrap();
    for (name, text) in policies {
        std::fs::write(dir.path().join("policies.d").join(name), text).unwrap();
    }
    dir
}

fn policy(dir: &TempDir, args: &[&str]) -> Output {
    let config = dir.path().join("virt-replica.yaml");
    let mut command = program();
    command.arg("--config").arg(config).arg("policy").args(args);
    command.output().expect("the program starts")
}

/// Not only the first mistake; each with its place, its line and the way out.
#[test]
fn policy_check_says_everything_that_is_wrong() {
    let dir = configured(&[
        ("a.yaml", "name: a\ndomains: [web01]\ntargets: [dr1]\nevery: 5m\n"),
        ("b.yaml", "name: b\ndomains: [web01]\ntargets: [dr2]\nevery: 5m\n"),
        ("c.yaml", "name: c\ndomains: [web01]\ntargets: [dr1]\nevry: 5m\n"),
        ("notes.txt", "no policy"),
    ]);
    let output = policy(&dir, &["check"]);
    expect_code(&output, 78);
    let text = stderr(&output).replace(&format!("{}/policies.d/", dir.path().display()), "");
    check("policy-check.txt", &text);
    std::fs::remove_file(dir.path().join("policies.d/b.yaml")).unwrap();
    std::fs::remove_file(dir.path().join("policies.d/c.yaml")).unwrap();
    let output = policy(&dir, &["check"]);
    expect_code(&output, 0);
    assert!(stdout(&output).ends_with("a.yaml: a is right\n"), "{}", stdout(&output));
}

#[test]
fn policy_show_writes_out_every_default() {
    let dir = configured(&[("a.yaml", "name: a\ndomains: [web01]\ntargets: [dr1]\nevery: 5m\nkeep: {daily: 7}\n")]);
    std::fs::write(
        dir.path().join("virt-replica.yaml"),
        "targets: {dr1: {url: ssh://dr1}}\ndefaults: {overlay_dir: /srv/overlays}\n",
    )
    .unwrap();
    let output = policy(&dir, &["show", "a"]);
    expect_code(&output, 0);
    check("policy-show.txt", &stdout(&output).replace(&dir.path().display().to_string(), "ETC"));
    expect_code(&policy(&dir, &["show", "b"]), 4);
}

#[test]
fn policy_schema_is_json() {
    let output = policy(&configured(&[]), &["schema"]);
    expect_code(&output, 0);
    let schema: Value = serde_json::from_str(&stdout(&output)).unwrap();
    for kind in [0, 1] {
        assert_eq!(schema["oneOf"][kind]["properties"]["rpo"]["type"], "string");
    }
}

/// libvirt's test driver has one domain, `test`, with a UUID that never changes: so the times never change either.
#[cfg(feature = "libvirt")]
#[test]
fn policy_next_says_when_in_local_time() {
    let nightly = "name: n\ndomains: [test]\ntargets: [dr1]\ncron: \"30 2 * * *\"\ntimezone: Europe/Berlin\n";
    let dir = configured(&[("n.yaml", nightly)]);
    let state = dir.path().join("state").display().to_string();
    let common = ["--connect", "test:///default", "--state-dir", &state, "next", "--at", "2026-10-24T12:00:00Z"];
    let output = policy(&dir, &[&common[..], &["--count", "3"]].concat());
    expect_code(&output, 0);
    check("policy-next.txt", &stdout(&output));
    let output = policy(&dir, &[&common[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["next"][0]["at"][0], "2026-10-25T00:30:00Z", "{json}");
    assert_eq!(json["next"][0]["target"], "ssh://dr1");
    expect_code(&policy(&dir, &[&common[..], &["nobody"]].concat()), 4);
}

/// Who is meant twice is said with both files; who is meant and is not there is a warning.
#[cfg(feature = "libvirt")]
#[test]
fn policy_check_asks_libvirt_who_is_meant() {
    let dir = configured(&[
        ("a.yaml", "name: a\ndomains: [test, ghost]\ntargets: [dr1]\nevery: 5m\n"),
        ("b.yaml", "name: b\ndomains: [\"*\"]\ntargets: [dr1]\nevery: 5m\n"),
    ]);
    let output = policy(&dir, &["--connect", "test:///default", "check", "--domains"]);
    expect_code(&output, 78);
    let said = stderr(&output);
    assert!(said.contains("'ghost' is no domain of this host"), "{said}");
    assert!(said.contains("a.yaml") && said.contains("b.yaml") && said.contains("domain 'test'"), "{said}");
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
