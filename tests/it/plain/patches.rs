//! Patches in files: made, looked at, applied, undone, merged; and what is left where that is cut short.

use super::support::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use virt_replica::engine::pump::Progress;
use virt_replica::error::{Error, Kind};
use virt_replica::image::Format::Raw;
use virt_replica::plain::diff::{KnownByDigests, Nothing, diff};
use virt_replica::plain::patchfile::{Applied, apply, look};
use virt_replica::plain::source::{Source, hash};
use virt_replica::plain::target::{LocalOptions, LocalTarget};
use virt_replica::plain::{Finish, PlainTarget, Way, WayWish, Wish, kept_digests, merge};

/// States of one image, as drawn.
const STATES: [(&str, usize); 6] =
    [("abcd.f", 65536), ("abXd.f", 65536), ("a.XdYf", 65536), ("a.XdYfgh", 77), ("a.XdY1", 4097), ("", 0)];

fn wish(path: &Path, way: WayWish, read_only: bool) -> Wish {
    Wish {
        path: path.to_owned(),
        format: Raw.into(),
        read_only,
        way,
        digests: None,
        size: None,
        force_share: false,
        afresh: !read_only,
    }
}

fn make(t: &Bench, base: &dyn PlainTarget, source: &Path) -> Vec<u8> {
    let mut patch = Vec::new();
    let source = Source::open(source, Raw, &t.read_options()).unwrap();
    diff(&source, base, &mut patch, None, &sending(), &Progress::default(), &|| Ok(())).unwrap();
    patch
}

/// The patch that leads from one image to the other.
fn between(t: &Bench, base: &Path, source: &Path) -> Vec<u8> {
    make(t, &LocalTarget::open(&wish(base, WayWish::Auto, true), &t.local_options()).unwrap(), source)
}

fn put(t: &Bench, patch: &[u8], image: &Path, way: WayWish, undo: Option<PathBuf>) -> Result<Applied, Error> {
    let options = LocalOptions { undo, ..t.local_options() };
    let open = |_: &virt_replica::patch::Header| -> Result<Box<dyn PlainTarget>, Error> {
        Ok(Box::new(LocalTarget::open(&wish(image, way, false), &options)?))
    };
    // In small bites, as from a pipe.
    apply(Bites(patch), &open, &Finish::default(), false, &mut |_, _| {}, &|| Ok(()))
}

struct Bites<'a>(&'a [u8]);

impl std::io::Read for Bites<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = buf.len().min(self.0.len()).min(777);
        buf[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
        Ok(len)
    }
}

#[test]
fn a_patch_leads_there_its_undo_leads_back_and_both_may_be_repeated() {
    let t = Bench::new();
    for (n, from) in STATES.into_iter().enumerate() {
        for (m, to) in STATES.into_iter().enumerate().filter(|(m, _)| *m != n) {
            let way = [WayWish::Redo, WayWish::Copy][(n + m) % 2];
            let (old, new, image) = (t.image("old", Raw, from), t.image("new", Raw, to), t.image("image", Raw, from));
            let patch = between(&t, &old, &new);
            assert!(look(patch.as_slice(), true).unwrap().from_root.is_some());
            let undo = t.path("undo");
            let name = format!("{from:?} -> {to:?}");
            let applied = put(&t, &patch, &image, way, Some(undo.clone())).unwrap();
            assert!(!applied.already, "{name}");
            assert!(fs::read(&image).unwrap() == fs::read(&new).unwrap(), "{name}");
            assert!(put(&t, &patch, &image, way, None).unwrap().already, "{name}");
            let back = fs::read(&undo).unwrap();
            assert_eq!(
                look(back.as_slice(), true).unwrap().to_root,
                look(patch.as_slice(), false).unwrap().from_root.unwrap()
            );
            assert!(!put(&t, &back, &image, way, None).unwrap().already, "{name}");
            assert!(fs::read(&image).unwrap() == fs::read(&old).unwrap(), "{name}: back");
            fs::remove_file(undo).unwrap();
            t.clean(&name);
        }
    }
}

#[test]
fn any_other_base_is_refused_with_what_was_wanted() {
    let t = Bench::new();
    let (old, new) = (t.image("old", Raw, ("abc", 65536)), t.image("new", Raw, ("axc", 65536)));
    let other = t.image("other", Raw, ("abd", 65536));
    let before = fs::read(&other).unwrap();
    let patch = between(&t, &old, &new);
    let wanted = look(patch.as_slice(), false).unwrap().from_root.unwrap().to_string();
    for way in [WayWish::Redo, WayWish::Copy, WayWish::InPlace] {
        let e = put(&t, &patch, &other, way, None).unwrap_err();
        assert!(e.kind() == Kind::Conflict && e.to_string().contains(&wanted), "{e}");
        assert!(fs::read(&other).unwrap() == before);
    }
    let e = put(&t, &patch, &t.path("none"), WayWish::Auto, None).unwrap_err();
    assert!(e.kind() == Kind::Conflict && e.to_string().contains("the image has nothing"), "{e}");
    t.clean("refused");
}

#[test]
fn what_is_damaged_is_not_applied_at_all() {
    let t = Bench::new();
    let (old, new) = (t.image("old", Raw, ("abcdef", 65536)), t.image("new", Raw, ("xbc0eg", 65536)));
    let patch = between(&t, &old, &new);
    let before = fs::read(&old).unwrap();
    for way in [WayWish::Redo, WayWish::Copy] {
        for at in (0..patch.len()).step_by(patch.len() / 40) {
            let mut damaged = patch.clone();
            damaged[at] ^= 0x20;
            assert!(put(&t, &damaged, &old, way, None).is_err(), "{at}");
            let cut = &patch[..at];
            assert!(put(&t, cut, &old, way, None).is_err(), "cut at {at}");
            assert!(fs::read(&old).unwrap() == before, "{at}");
        }
    }
    // And what the damaged ones left in the place of a copy is in nobody's way.
    assert!(!put(&t, &patch, &old, WayWish::Copy, None).unwrap().already);
    assert!(fs::read(&old).unwrap() == fs::read(&new).unwrap());
    t.clean("damaged");
}

#[test]
fn digests_alone_are_enough_for_a_patch() {
    let t = Bench::new();
    let (old, new) = (t.image("old", Raw, ("abc.e", 100)), t.image("new", Raw, ("ab1.ef", 9)));
    let base = Source::open(&old, Raw, &t.read_options()).unwrap();
    let hashed = hash(base.image.as_ref(), 2, &Progress::default(), &|| Ok(())).unwrap();
    let mut file = Vec::new();
    kept_digests::write(&hashed.nodes, hashed.root, &mut file).unwrap();
    base.close().unwrap();
    let (nodes, root) = kept_digests::read(file.as_slice()).unwrap();
    let patch = make(&t, &KnownByDigests { nodes, root }, &new);
    assert!(look(patch.as_slice(), true).unwrap().blocks_in_pieces == 0);
    put(&t, &patch, &old, WayWish::Auto, None).unwrap();
    assert!(fs::read(&old).unwrap() == fs::read(&new).unwrap());
}

#[test]
fn a_patch_from_nothing_makes_the_image_and_replaces_none_unasked() {
    let t = Bench::new();
    let source = t.image("source", Raw, ("a0.d", 5));
    let patch = make(&t, &Nothing, &source);
    assert_eq!(look(patch.as_slice(), true).unwrap().from_root, None);
    let image = t.path("new.raw");
    assert_eq!(put(&t, &patch, &image, WayWish::Auto, None).unwrap().way, Some(Way::New));
    assert!(fs::read(&image).unwrap() == fs::read(&source).unwrap());
    assert!(put(&t, &patch, &image, WayWish::Auto, None).unwrap().already);
    let other = t.image("other", Raw, ("x", 5));
    let e = put(&t, &patch, &other, WayWish::Auto, None).unwrap_err();
    assert!(
        e.kind() == Kind::Conflict && e.advice() == Some(&virt_replica::error::advice::Image::Overwrite.into()),
        "{e}"
    );
}

/// Every prefix and every part of a chain, merged, does what its patches do one after the other.
#[test]
fn a_merged_chain_is_its_patches_one_after_the_other() {
    let t = Bench::new();
    let drawn = ["abcd.f", "abXd.f", "a.XdYf0", "a.XdYfgh", "q.XdYf.h"];
    let images: Vec<PathBuf> = drawn
        .iter()
        .enumerate()
        .map(|(n, d)| t.image(&format!("{n}.raw"), Raw, (d, [65536, 65536, 9000, 9100, 65536][n])))
        .collect();
    // Pieces of blocks, also over pieces of an earlier patch.
    for (n, at) in [(1, 5), (2, 5000), (3, 5), (4, 4096 * 3), (3, 3 * 65536 + 70)] {
        for later in &images[n..] {
            fs::File::options().write(true).open(later).unwrap().write_all_at(&[n as u8], at).unwrap();
        }
    }
    let whole = make(&t, &Nothing, &images[0]);
    let mut chain: Vec<Vec<u8>> = vec![whole];
    chain.extend(images.windows(2).map(|two| between(&t, &two[0], &two[1])));
    for start in 0..chain.len() - 1 {
        for end in start + 2..=chain.len() {
            let mut merged = Vec::new();
            merge::merge(chain[start..end].iter().map(|p| Bites(p)).collect(), &mut merged).unwrap();
            let info = look(merged.as_slice(), true).unwrap();
            let image = t.path("image");
            let _ = fs::remove_file(&image);
            if start > 0 {
                fs::copy(&images[start - 1], &image).unwrap();
            }
            let applied = put(&t, &merged, &image, WayWish::Auto, None).unwrap();
            assert_eq!(applied.root, info.to_root);
            assert!(fs::read(&image).unwrap() == fs::read(&images[end - 1]).unwrap(), "{start}..{end}");
        }
    }
    let pair = |a: usize, b: usize| merge::merge(vec![Bites(&chain[a]), Bites(&chain[b])], &mut Vec::new());
    for (a, b) in [(1, 3), (2, 1), (1, 1), (1, 0)] {
        assert_eq!(pair(a, b).unwrap_err().kind(), Kind::Conflict, "{a} {b}");
    }
    let shrunk = between(&t, &images[4], &t.image("small", Raw, ("q.X", 65536)));
    let e = merge::merge(vec![Bites(&chain[4]), Bites(&shrunk)], &mut Vec::new()).unwrap_err();
    assert!(e.kind() == Kind::Refused && e.to_string().contains("shrinks"), "{e}");
}

/// The program, killed or failed where `failpoint` says.
pub fn program(t: &Bench, failpoint: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virt-replica"));
    command.env_clear().env("VIRT_REPLICA_FAILPOINT", failpoint).env("TMPDIR", t.path("")).current_dir(t.path(""));
    command.arg("--state-dir").arg(t.path("state")).args(args).output().unwrap()
}

/// Any transport will do: a patch through a pipe, and a list of digests back.
#[test]
fn pipes_carry_patches_and_digests() {
    let t = Bench::new();
    let (source, image) = (t.image("source", Raw, ("abXd", 9)), t.image("image", Raw, ("abcd", 65536)));
    let script =
        "$VR digest image -o - | $VR diff source --base-digest /dev/stdin -o - | $VR apply - image --undo undo.patch";
    let done = Command::new("sh")
        .args(["-c", script])
        .env("VR", env!("CARGO_BIN_EXE_virt-replica"))
        .current_dir(t.path(""))
        .output();
    let done = done.unwrap();
    assert!(done.status.success(), "{done:?}");
    assert!(fs::read(&source).unwrap() == fs::read(&image).unwrap());
    let info = program(&t, "", &["patch", "verify", "undo.patch", "--json"]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["info"]["size"], 4 << 16);
    for name in ["one", "two"] {
        let done = program(&t, "", &["apply", "undo.patch", "image"]);
        assert!(done.status.success(), "{name}: {done:?}");
    }
    assert!(!program(&t, "", &["diff", "source", "-o", "x.patch"]).status.success(), "a base is demanded");
}

/// As docs/plain.md has it for an image on a host that can only be reached: digests go there, what differs comes back.
#[test]
fn an_image_is_fetched_by_its_digests_and_a_patch() {
    let t = Bench::new();
    let (far, near) = (t.image("far", Raw, ("aXcd.f", 77)), t.image("near", Raw, ("abcdef", 65536)));
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/plain.md")).unwrap();
    let line = page.lines().find(|line| line.contains("| ssh dr1 'virt-replica diff")).expect("the page has it");
    // The other host is played by a shell.
    let script = line
        .replace("ssh dr1", "sh -c")
        .replace("/srv/images/disk.raw", "far")
        .replace("disk.raw", "near")
        .replace("virt-replica", env!("CARGO_BIN_EXE_virt-replica"));
    let done = Command::new("bash").args(["-o", "pipefail", "-c", &script]).current_dir(t.path("")).output().unwrap();
    assert!(done.status.success(), "{script}: {done:?}");
    assert!(fs::read(far).unwrap() == fs::read(near).unwrap());
    let refused = program(&t, "", &["copy", "ssh://dr1/srv/images/disk.raw", "near"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(2) && said.contains("is on this host") && said.contains("hint"), "{said}");
}
