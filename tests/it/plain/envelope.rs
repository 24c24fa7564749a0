//! Patches that are encrypted and signed: age's and minisign's own programs read what we write, and we what they write;
//! and what is not as it should be changes nothing.

use super::patches::program;
use super::support::*;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use virt_replica::image::Format::Raw;

/// A program of somebody else; what it writes to stdout.
fn tool(t: &Bench, name: &str, args: &[&str]) -> Vec<u8> {
    let done = Command::new(name).args(args).current_dir(t.path("")).stdin(Stdio::null()).output();
    let done = done.unwrap_or_else(|e| panic!("{name}: {e}; tests/run/setup installs it"));
    assert!(done.status.success(), "{name} {args:?}: {done:?}");
    done.stdout
}

fn recipient(t: &Bench, key: &str) -> String {
    tool(t, "age-keygen", &["-o", key]);
    String::from_utf8(tool(t, "age-keygen", &["-y", key])).unwrap().trim().to_owned()
}

/// An old image, a new one, and keys: `me.key` and `r` of age, `sign.key` and `sign.pub` of minisign.
struct Stage {
    t: Bench,
    recipient: String,
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Stage {
    fn new() -> Stage {
        let t = Bench::new();
        let (new, old) = (t.image("new", Raw, ("xbc0egh", 9)), t.image("old", Raw, ("abcdef", 65536)));
        fs::copy(&old, t.path("image")).unwrap();
        let recipient = recipient(&t, "me.key");
        tool(&t, "minisign", &["-G", "-W", "-p", "sign.pub", "-s", "sign.key"]);
        fs::set_permissions(t.path("sign.key"), fs::Permissions::from_mode(0o600)).unwrap();
        Stage { old: fs::read(old).unwrap(), new: fs::read(new).unwrap(), t, recipient }
    }

    fn run(&self, args: &[&str]) -> Output {
        program(&self.t, "", args)
    }

    #[track_caller]
    fn good(&self, args: &[&str]) -> String {
        let done = self.run(args);
        assert!(done.status.success(), "{args:?}: {done:?}");
        String::from_utf8(done.stdout).unwrap()
    }

    /// It fails with this code and these words, gives a next step, and the image is what it was, with nothing beside
    /// it.
    #[track_caller]
    fn refused(&self, args: &[&str], code: i32, words: &str) {
        let before = fs::read(self.path("image")).unwrap();
        let done = self.run(args);
        self.is_refused(&done, code, words);
        assert!(fs::read(self.path("image")).unwrap() == before, "{args:?}: the image has changed");
        self.t.clean("refused");
    }

    #[track_caller]
    fn is_refused(&self, done: &Output, code: i32, words: &str) {
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.code() == Some(code) && said.contains(words) && said.contains("hint"), "{done:?}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.t.path(name)
    }

    fn make(&self, more: &[&str]) {
        self.good(&[&["diff", "new", "--base", "old", "-o", "a.patch", "--force"], more].concat());
    }

    #[track_caller]
    fn applied(&self, args: &[&str]) {
        fs::write(self.path("image"), &self.old).unwrap();
        self.good(args);
        assert!(fs::read(self.path("image")).unwrap() == self.new, "{args:?}");
    }
}

#[test]
fn age_and_minisign_read_what_we_write_and_we_what_they_write() {
    let s = Stage::new();
    let t = &s.t;
    s.make(&[]);
    let plain = fs::read(s.path("a.patch")).unwrap();
    fs::write(s.path("plain.patch"), &plain).unwrap();
    s.make(&["--encrypt-to", &s.recipient, "--sign-with", "sign.key"]);
    tool(t, "minisign", &["-V", "-p", "sign.pub", "-m", "a.patch"]);
    let decrypted = tool(t, "age", &["-d", "-i", "me.key", "a.patch"]);
    fs::write(s.path("decrypted.patch"), decrypted).unwrap();
    s.applied(&["apply", "decrypted.patch", "image"]);
    s.applied(&["apply", "a.patch", "image", "--decrypt-with", "me.key", "--verify-with", "sign.pub"]);
    let said = s.good(&["patch", "info", "a.patch", "--decrypt-with", "me.key", "--verify-with", "sign.pub"]);
    assert!(said.contains("encrypted") && said.contains("file:a.patch"), "{said}");
    let key = fs::read_to_string(s.path("sign.pub")).unwrap().lines().nth(1).unwrap().to_owned();
    let said = s.good(&["patch", "verify", "a.patch", "--decrypt-with", "me.key", "--verify-with", &key, "--json"]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["protection"]["encrypted"], true);
    assert!(said["protection"]["signed"].as_str().unwrap().contains("timestamp:"), "{said}");
    // Theirs, for several, from a file of recipients.
    let other = recipient(t, "other.key");
    fs::write(s.path("all"), format!("# both\n{other}\n\n{}\n", s.recipient)).unwrap();
    tool(t, "age", &["-R", "all", "-o", "theirs", "plain.patch"]);
    tool(t, "minisign", &["-S", "-s", "sign.key", "-m", "theirs"]);
    for key in ["me.key", "other.key"] {
        s.applied(&["apply", "theirs", "image", "--decrypt-with", key, "--verify-with", "sign.pub"]);
    }
    s.make(&["--encrypt-to", "all"]);
    for key in ["me.key", "other.key"] {
        tool(t, "age", &["-d", "-i", key, "-o", "/dev/null", "a.patch"]);
    }
}

/// minisign asks for a password twice, on a terminal or from stdin.
#[test]
fn a_signing_key_may_have_a_password() {
    let s = Stage::new();
    let mut made = Command::new("minisign")
        .args(["-G", "-f", "-p", "sign.pub", "-s", "sign.key"])
        .current_dir(s.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    made.stdin.take().unwrap().write_all(b"hidden words\nhidden words\n").unwrap();
    assert!(made.wait().unwrap().success());
    let sign = ["diff", "new", "--base", "old", "-o", "a.patch", "--sign-with", "sign.key"];
    s.refused(&sign, 12, "password");
    let put = |name: &str, words: &str| {
        fs::write(s.path(name), words).unwrap();
        fs::set_permissions(s.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    };
    put("wrong", "other words\n");
    s.is_refused(&s.run(&[&sign[..], &["--sign-password-file", "wrong"]].concat()), 12, "password");
    assert!(!s.path("a.patch").exists() && !s.path("a.patch.minisig").exists());
    put("right", "hidden words\n");
    s.good(&[&sign[..], &["--sign-password-file", "right"]].concat());
    tool(&s.t, "minisign", &["-V", "-p", "sign.pub", "-m", "a.patch"]);
}

#[test]
fn what_is_not_as_it_should_be_changes_nothing_and_says_why() {
    let s = Stage::new();
    s.make(&["--encrypt-to", &s.recipient, "--sign-with", "sign.key"]);
    let (bytes, signature) = (fs::read(s.path("a.patch")).unwrap(), fs::read(s.path("a.patch.minisig")).unwrap());
    recipient(&s.t, "other.key");
    tool(&s.t, "minisign", &["-G", "-W", "-p", "other.pub", "-s", "other-sign.key"]);
    let apply = ["apply", "a.patch", "image"];
    let both = ["--decrypt-with", "me.key", "--verify-with", "sign.pub"];
    let with = |more: &[&'static str]| [&apply[..], more].concat();
    s.refused(&apply, 12, "encrypted");
    s.refused(&with(&["--decrypt-with", "other.key"]), 12, "for none of these keys");
    s.refused(&with(&["--decrypt-with", "me.key", "--verify-with", "other.pub"]), 12, "another key");
    s.refused(&with(&["--decrypt-with", "me.key", "--verify-with", "me.key"]), 2, "no public key");
    s.refused(&[&with(&both)[..], &["--in-place"]].concat(), 2, "in place");
    for (at, what) in [(0, "at its start"), (bytes.len() / 2, "in the middle"), (bytes.len() - 1, "at its end")] {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        fs::write(s.path("a.patch"), &flipped).unwrap();
        s.refused(&with(&both), 13, "signature is not that of this file");
        fs::write(s.path("a.patch"), &bytes[..at]).unwrap();
        s.refused(&with(&both), 13, "signature is not that of this file");
        if at > 0 {
            s.refused(&with(&["--decrypt-with", "me.key"]), 13, "cut short, or not what was written");
            fs::write(s.path("a.patch"), &flipped).unwrap();
            s.refused(&with(&["--decrypt-with", "me.key"]), 13, "cut short, or not what was written");
        }
        for verb in ["info", "verify"] {
            let done = s.run(&[&["patch", verb, "a.patch"], &both[..]].concat());
            s.is_refused(&done, 13, "signature is not that of this file");
            assert!(done.stdout.is_empty(), "{what}: {done:?}");
        }
    }
    fs::write(s.path("a.patch"), &bytes).unwrap();
    fs::remove_file(s.path("a.patch.minisig")).unwrap();
    s.refused(&with(&both), 4, "no signature");
    fs::write(s.path("elsewhere"), signature).unwrap();
    s.applied(&[&with(&both)[..], &["--signature", "elsewhere"]].concat());
}

/// A pipe is seen once: what came is put in place if the signature over it is right, and only then.
#[test]
fn pipes_are_signed_and_checked() {
    let s = Stage::new();
    let shell = |script: &str| {
        let vr = format!("{} --state-dir {}", env!("CARGO_BIN_EXE_virt-replica"), s.path("state").display());
        let mut command = Command::new("bash");
        command.args(["-o", "pipefail", "-c", script]).env("VR", vr).env("TO", &s.recipient);
        command.current_dir(s.path("")).output().unwrap()
    };
    s.is_refused(&shell("$VR diff new --base old -o - --sign-with sign.key | cat >x"), 2, "--signature");
    let make = "$VR diff new --base old -o - --encrypt-to $TO --sign-with sign.key --signature sig";
    assert!(shell(&format!("{make} | cat >a.age")).status.success());
    tool(&s.t, "minisign", &["-V", "-p", "sign.pub", "-m", "a.age", "-x", "sig"]);
    let apply = "$VR apply - image --decrypt-with me.key --verify-with sign.pub";
    s.is_refused(&shell(&format!("cat a.age | {apply}")), 2, "--signature");
    for way in ["redo", "copy"] {
        for forge in [
            "head -c -1 a.age",
            "cat a.age sig",
            "$VR diff new --base old -o -",
            "$VR diff new --base old -o - --encrypt-to $TO",
        ] {
            let done = shell(&format!("{forge} | {apply} --signature sig --atomic {way} --undo back"));
            s.is_refused(&done, 13, "signature is not that of this file");
            assert!(fs::read(s.path("image")).unwrap() == s.old && !s.path("back").exists(), "{forge}");
        }
        let done = shell(&format!("cat a.age | {apply} --signature sig --atomic {way}"));
        assert!(done.status.success(), "{done:?}");
        assert!(fs::read(s.path("image")).unwrap() == s.new, "{way}");
        s.t.clean(way);
        fs::write(s.path("image"), &s.old).unwrap();
    }
}

#[test]
fn a_chain_is_merged_if_each_part_is_signed() {
    let s = Stage::new();
    let sign = ["--encrypt-to", s.recipient.as_str(), "--sign-with", "sign.key"];
    s.make(&sign);
    s.t.image("newer", Raw, ("xbz0egh", 100));
    s.good(&[&["diff", "newer", "--base", "new", "-o", "b.patch"], &sign[..]].concat());
    let merge = [
        "patch",
        "merge",
        "a.patch",
        "b.patch",
        "-o",
        "c.patch",
        "--decrypt-with",
        "me.key",
        "--verify-with",
        "sign.pub",
    ];
    s.good(&[&merge[..], &sign[..]].concat());
    tool(&s.t, "minisign", &["-V", "-p", "sign.pub", "-m", "c.patch"]);
    s.good(&["apply", "c.patch", "image", "--decrypt-with", "me.key", "--verify-with", "sign.pub"]);
    assert!(fs::read(s.path("image")).unwrap() == fs::read(s.path("newer")).unwrap());
    let mut bytes = fs::read(s.path("b.patch")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(s.path("b.patch"), bytes).unwrap();
    let done = s.run(&[&merge[..], &["--force"]].concat());
    s.is_refused(&done, 13, "signature is not that of this file");
    assert!(
        !tool(&s.t, "minisign", &["-V", "-p", "sign.pub", "-m", "c.patch"]).is_empty(),
        "the one that was there is there"
    );
}

#[test]
fn a_key_that_others_may_read_is_warned_of() {
    let s = Stage::new();
    let warned = |done: Output| String::from_utf8(done.stderr).unwrap().contains("others may read");
    let make = [
        "diff",
        "new",
        "--base",
        "old",
        "-o",
        "a.patch",
        "--force",
        "--sign-with",
        "sign.key",
        "--encrypt-to",
        &s.recipient,
    ];
    let look = ["patch", "info", "a.patch", "--decrypt-with", "me.key"];
    assert!(!warned(s.run(&make)) && !warned(s.run(&look)));
    for key in ["sign.key", "me.key"] {
        fs::set_permissions(s.path(key), fs::Permissions::from_mode(0o640)).unwrap();
    }
    assert!(warned(s.run(&make)) && warned(s.run(&look)));
}
