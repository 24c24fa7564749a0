//! `debug` from the outside: a golden text for each subject, JSON, exit codes, and memory that has an end.

use super::*;
use std::fs;

const NAMES: [&str; 6] = ["extents", "patch", "points", "journal", "digests", "wire"];

fn fixtures(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name).to_str().unwrap().to_owned()
}

/// What is printed of fixtures, with the place of this checkout replaced.
#[track_caller]
fn golden(recorded: &str, args: &[&str], code: i32) {
    let output = run(&[&["debug"], args].concat());
    expect_code(&output, code);
    check(recorded, &stdout(&output).replace(&fixtures(""), "/FIXTURES/"));
}

/// How long a file is and what it occupies is the affair of who wrote it, and of the file system.
fn without_room(text: &str) -> String {
    let line = |line: &str| match line.find(" on disk") {
        Some(end) => {
            let mut commas = line[..end].rmatch_indices(", ").map(|(at, _)| at);
            let start = commas.nth(1).map_or(0, |at| at + 2);
            format!("{}N{}\n", &line[..start], &line[end..])
        }
        None => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

fn json(args: &[&str]) -> (Vec<Value>, Output) {
    let output = run(&[&["debug"], args, &["--json"]].concat());
    let lines = stdout(&output).lines().map(|line| serde_json::from_str(line).expect("each line is JSON")).collect();
    (lines, output)
}

#[test]
fn help_of_every_subject_is_what_was_read_and_approved() {
    for name in NAMES {
        let help = run(&["debug", name, "--help"]);
        expect_code(&help, 0);
        check(&format!("help-debug-{name}.txt"), &stdout(&help));
    }
    expect_code(&run(&["debug", "patch"]), 2);
}

#[test]
fn every_subject_shows_what_was_approved() {
    golden("debug-patch.txt", &["patch", &fixtures("formats/v1/patch.bin"), &fixtures("formats/v1/patch-zstd.bin")], 0);
    golden("debug-patch-plain.txt", &["patch", &fixtures("formats/v1/patch-plain.bin")], 0);
    golden("debug-point.txt", &["points", &fixtures("formats/v1/point.bin")], 0);
    golden("debug-manifest.txt", &["points", &fixtures("debug/manifest.json")], 0);
    golden("debug-journal.txt", &["journal", &fixtures("debug/journal")], 0);
    golden("debug-digests.txt", &["digests", &fixtures("formats/v1/changes.bin")], 0);
    let t = tempfile::tempdir().unwrap();
    let session = t.path().join("session");
    let frames = ["wire-banner-client.txt", "wire-frame-describe.bin", "wire-frame-apply.bin", "wire-frame-nodes.bin"];
    let bytes: Vec<u8> = frames.iter().flat_map(|f| fs::read(fixtures(&format!("formats/v1/{f}"))).unwrap()).collect();
    fs::write(&session, [b"Welcome\x1b[2J to a shell\n", &bytes[..], &[9, 0, 0]].concat()).unwrap();
    let output = run(&["debug", "wire", session.to_str().unwrap()]);
    expect_code(&output, 1);
    check("debug-wire.txt", &stdout(&output).replace(t.path().to_str().unwrap(), "/T"));
}

#[test]
fn damage_is_shown_with_its_place_and_has_code_13() {
    let t = tempfile::tempdir().unwrap();
    let cut = t.path().join("cut.patch");
    let bytes = fs::read(fixtures("formats/v1/patch.bin")).unwrap();
    fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    let (whole, cut) = (fixtures("formats/v1/patch.bin"), cut.to_str().unwrap().to_owned());
    // One that is damaged keeps no other from being shown.
    let (lines, output) = json(&["patch", &cut, &whole]);
    expect_code(&output, 13);
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["damage"]["offset"], bytes.len() as u64 - 96);
    assert!(lines[1]["damage"].is_null() && lines[0]["patch"]["records"] == lines[1]["patch"]["records"]);
    let last: Value = serde_json::from_str(stderr(&output).lines().last().unwrap()).unwrap();
    assert_eq!((&last["code"], &last["kind"]), (&13.into(), &"corrupt".into()));
    assert!(last["message"].as_str().unwrap().contains(&cut) && last["hint"].is_string(), "{last}");
    expect_code(&run(&["debug", "patch", "/nonexistent/x"]), 4);
    expect_code(&run(&["debug", "patch", "/"]), 1);
}

#[test]
fn an_encrypted_and_signed_patch_says_so_and_stays_closed_without_a_key() {
    let t = tempfile::tempdir().unwrap();
    let at = |name: &str| t.path().join(name).to_str().unwrap().to_owned();
    let tool = |name: &str, args: &[&str]| {
        let output =
            Command::new(name).args(args).stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        stdout(&output)
    };
    tool("age-keygen", &["-o", &at("key")]);
    let recipient = tool("age-keygen", &["-y", &at("key")]).trim().to_owned();
    tool("minisign", &["-G", "-W", "-p", &at("pub"), "-s", &at("sec")]);
    fs::write(at("a.raw"), [7; 100_000]).unwrap();
    fs::write(at("b.raw"), [0; 100_000]).unwrap();
    let diff = ["diff", &at("a.raw"), "--base", &at("b.raw"), "-o", &at("p"), "--encrypt-to", &recipient];
    expect_code(&run(&[&diff[..], &["--sign-with", &at("sec")]].concat()), 0);
    let (lines, output) = json(&["patch", &at("p")]);
    expect_code(&output, 0);
    let protection = &lines[0]["protection"];
    assert_eq!(protection["encrypted"]["recipients"], serde_json::json!([["X25519", 1]]), "{protection}");
    assert!(
        lines[0]["patch"].is_null() && protection["signature"]["hashed"] == true && protection["verified"] == false
    );
    let key_id = protection["signature"]["key_id"].as_str().unwrap();
    // Minisign prints it without zeros in front.
    let public = fs::read_to_string(at("pub")).unwrap();
    assert!(public.contains(key_id.trim_start_matches('0')), "minisign calls its key otherwise: {key_id}, {public}");
    // The signature alone may be checked, and with the key the patch is shown.
    let (lines, output) = json(&["patch", &at("p"), "--verify-with", &at("pub")]);
    expect_code(&output, 0);
    assert!(lines[0]["protection"]["verified"] == true && lines[0]["patch"].is_null());
    let (lines, output) = json(&["patch", &at("p"), "--decrypt-with", &at("key")]);
    expect_code(&output, 0);
    assert!(lines[0]["protection"]["decrypted"] == true && lines[0]["patch"]["totals"]["records"] == 2);
    fs::write(at("p.minisig"), "no signature").unwrap();
    let (lines, _) = json(&["patch", &at("p")]);
    assert!(lines[0]["protection"]["signature_error"].is_string());
    expect_code(&run(&["debug", "patch", &at("p"), "--verify-with", &at("pub")]), 13);
}

#[test]
fn a_replica_is_shown_with_its_files_and_what_is_missing() {
    let store = StoreWithPoints::new();
    let replica = store.root().join("replicas").join(UUID);
    let dir = replica.to_str().unwrap();
    let (lines, output) = json(&["points", dir]);
    expect_code(&output, 0);
    let seen = &lines[0]["replica"];
    assert_eq!(
        (&seen["points"]["count"], &seen["files"]["count"], &seen["findings"]["count"]),
        (&2.into(), &4.into(), &0.into())
    );
    assert_eq!(seen["points"]["shown"][1]["disks"][0]["depth"], 2);
    // Nothing was changed by the look: a lease, a lock or a directory would be.
    assert!(!replica.join("leases").exists() || fs::read_dir(replica.join("leases")).unwrap().count() <= 1);
    fs::create_dir(replica.join("points/000003-00000003")).unwrap();
    fs::create_dir_all(replica.join("leases")).unwrap();
    fs::write(replica.join("leases/1-1.json"), "{").unwrap();
    fs::remove_file(replica.join("points/000001-00000001/vda.changes")).unwrap();
    let text = stdout(&run(&["debug", "points", dir]));
    for told in [
        "points/000003-00000003: the manifest does not name it",
        "1-1.json: this is no lease",
        "vda.changes: it is not there",
    ] {
        assert!(text.contains(told), "{told} is missing:\n{text}");
    }
    // The tree of the head is bound to its point, and its blocks lead to its root.
    let tree = replica.join("digests/vda.tree");
    let (lines, output) = json(&["digests", tree.to_str().unwrap()]);
    expect_code(&output, 0);
    let seen = &lines[0];
    assert_eq!(
        (&seen["kind"], &seen["root_of_blocks"], &seen["findings"]["count"]),
        (&"tree".into(), &seen["root"], &0.into())
    );
    assert!(
        seen["slots"]
            .as_array()
            .unwrap()
            .iter()
            .any(|slot| slot["point"] == "000002-00000002" && slot["counts"] == true)
    );
    let mut bytes = fs::read(&tree).unwrap();
    bytes[8192 + 3] ^= 1;
    fs::write(&tree, bytes).unwrap();
    let output = run(&["debug", "digests", tree.to_str().unwrap()]);
    expect_code(&output, 13);
    assert!(stdout(&output).contains("the blocks lead to root"), "{}", stdout(&output));
    // A manifest that nobody reads any more is told in its own words.
    let manifest = replica.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap().replace("\"generation\": 1", "\"generation\": 9999999999");
    fs::write(&manifest, text).unwrap();
    let output = run(&["debug", "points", dir]);
    expect_code(&output, 13);
    assert!(stdout(&output).contains("the generation is no number up to 1000000000"), "{}", stdout(&output));
    let output = run(&["debug", "points", store.root().to_str().unwrap()]);
    expect_code(&output, 2);
    assert!(stderr(&output).contains("/UUID"), "{}", stderr(&output));
}

#[test]
fn the_map_of_an_image_is_shown_with_its_chain() {
    use std::os::unix::fs::FileExt;
    use virt_replica::image::qcow2;
    let t = tempfile::tempdir().unwrap();
    let (base, top) = (t.path().join("base.raw"), t.path().join("top.qcow2"));
    let file = fs::File::create(&base).unwrap();
    file.set_len(8 << 20).unwrap();
    file.write_all_at(&[1; 65536], 1 << 20).unwrap();
    drop(qcow2::create(&top, DiskSize(8 << 20), Some(("base.raw", Format::Raw))).unwrap());
    let (lines, output) = json(&["extents", top.to_str().unwrap()]);
    expect_code(&output, 0);
    let seen = &lines[0];
    let chain = seen["chain"]["shown"].as_array().unwrap();
    assert_eq!((chain.len(), &chain[0]["backing"], &chain[1]["format"]), (2, &"base.raw".into(), &"raw".into()));
    let extent = |start: u64, length: u64, content: &str| serde_json::json!({"start": start, "length": length, "content": content});
    let expected = [
        extent(0, 1 << 20, "zero"),
        extent(1 << 20, 65536, "data"),
        extent((1 << 20) + 65536, (7 << 20) - 65536, "zero"),
    ];
    assert_eq!(seen["extents"]["shown"].as_array().unwrap()[..], expected);
    let text = stdout(&run(&["debug", "extents", top.to_str().unwrap()]));
    check("debug-extents.txt", &without_room(&text.replace(t.path().to_str().unwrap(), "/T")));
    // A layer that is not there, or that the image may not choose: what is above it is shown.
    fs::rename(&base, t.path().join("away")).unwrap();
    let (lines, output) = json(&["extents", top.to_str().unwrap()]);
    expect_code(&output, 4);
    assert_eq!((&lines[0]["chain"]["count"], &lines[0]["size"]), (&1.into(), &Value::Null));
}

/// Whatever a file says of itself, memory has an end: here one that a larger claim would break.
#[test]
fn memory_is_bounded_whatever_a_file_claims() {
    let t = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8], len: u64| {
        let path = t.path().join(name);
        fs::write(&path, bytes).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_len(len.max(bytes.len() as u64)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let head = |name: &str| fs::read(fixtures(&format!("formats/v1/{name}"))).unwrap();
    let zeros = format!("{{\"points\":[{}0]}}", "0,".repeat(20 << 20));
    let cases = [
        ("patch", write("p", &head("patch.bin")[..150], 8 << 30), 13),
        ("points", write("q", &head("point.bin")[..200], 8 << 30), 13),
        ("points", write("m", zeros.as_bytes(), 0), 13),
        ("points", write("n", b"{", 8 << 30), 13),
        ("journal", write("history.jsonl", b"x", 256 << 20), 0),
        ("digests", write("d", b"{", 8 << 30), 13),
        ("digests", write("c", &head("changes.bin")[..80], 8 << 30), 13),
        ("wire", write("w", &[0; 16], 8 << 30), 1),
        ("extents", write("x.raw", b"x", 1 << 42), 0),
        ("extents", write("x.qcow2", b"QFI\xfb\x00\x00\x00\x03", 0), 13),
    ];
    for (subject, path, code) in cases {
        let limited = "ulimit -v 1500000; exec \"$@\"";
        let mut command = program();
        let own = command.get_program().to_owned();
        command = Command::new("timeout");
        command.env_clear().env("TZ", "UTC").env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
        command.args(["60", "sh", "-c", limited, "sh"]).arg(own).args(["debug", subject, &path]);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{subject} {path}: {}", stderr(&output));
        assert!(stdout(&output).len() < 200_000, "{subject} {path}: {} bytes", stdout(&output).len());
    }
}
