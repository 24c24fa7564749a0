//! A copy killed at every step that docs/replication.md numbers: old or new, or torn with a redo file beside it that
//! every reader minds and the next run ends.

use super::patches::program;
use super::support::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Output};
use virt_replica::error::Kind;
use virt_replica::image::Format::Raw;
use virt_replica::image::foreign::format::Foreign;
use virt_replica::plain::source::Source;

/// An image killed at `step` while it is changed in this way; then what `then` makes of it.
fn killed_at(step: &str, way: &str, then: &[&str]) {
    let t = Bench::new();
    let (source, image) = (t.image("source", Raw, ("xbc0eg", 9)), t.image("image", Raw, ("abcdef", 65536)));
    let (old, new) = (fs::read(&image).unwrap(), fs::read(&source).unwrap());
    let args = ["copy", "--atomic", way, "source", "image"];
    let killed = program(&t, &format!("{step}=kill"), &args);
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&killed.status), Some(9), "{killed:?}");
    let torn = t.path(".image.vr-redo").exists();
    let now = fs::read(&image).unwrap();
    assert!(torn || now == old || now == new, "{step}: neither old nor new, and nothing says so");
    if torn {
        let e = Source::open(&image, Raw, &t.read_options()).err().unwrap();
        assert!(e.kind() == Kind::Conflict && e.to_string().contains("torn"), "{e}");
    }
    let done = program(&t, "", then);
    assert!(done.status.success(), "{done:?}");
    assert!(fs::read(&image).unwrap() == new, "{step}: {then:?}");
    t.clean(step);
    let again = program(&t, "", &args);
    assert!(String::from_utf8(again.stdout).unwrap().contains("is as its source"));
}

const REPEAT: [&str; 3] = ["copy", "source", "image"];

#[test]
fn killed_at_i1() {
    killed_at("i1", "redo", &REPEAT);
    killed_at("i1", "redo", &["apply", "--finish", "image"]);
}

#[test]
fn killed_at_i2() {
    killed_at("i2", "redo", &REPEAT);
    killed_at("i2", "redo", &["apply", "--finish", "image"]);
}

#[test]
fn killed_at_i3() {
    killed_at("i3", "redo", &REPEAT);
}

#[test]
fn killed_at_i4() {
    killed_at("i4", "copy", &REPEAT);
}

#[test]
fn killed_at_i5() {
    killed_at("i5", "copy", &REPEAT);
}

/// A patch fits the image that is there, and is not taken in by the copy of it that nobody gave the name.
#[test]
fn an_apply_that_was_cut_short_is_repeated_on_the_image_itself() {
    for way in ["redo", "copy"] {
        let step = if way == "redo" { "i1" } else { "i4" };
        let t = Bench::new();
        let (source, image) = (t.image("source", Raw, ("xbc0eg", 9)), t.image("image", Raw, ("abcdef", 65536)));
        assert!(program(&t, "", &["diff", "source", "--base", "image", "-o", "a.patch"]).status.success());
        let args = ["apply", "--atomic", way, "a.patch", "image"];
        assert!(!program(&t, &format!("{step}=kill"), &args).status.success());
        let done = program(&t, "", &args);
        assert!(done.status.success(), "{done:?}");
        assert!(fs::read(&image).unwrap() == fs::read(&source).unwrap(), "{way}");
        t.clean(way);
    }
}

/// Torn between any two blocks, with the redo file durable: the next run ends it all the same.
#[test]
fn a_torn_image_is_mended_however_far_it_came() {
    for blocks_done in 0..=6u64 {
        let t = Bench::new();
        let (source, image) = (t.image("source", Raw, ("xbc0egh", 9)), t.image("image", Raw, ("abcdef", 65536)));
        let new = fs::read(&source).unwrap();
        let file = fs::File::options().read(true).write(true).open(&source).unwrap();
        file.write_all_at(&[7], 65536 + 5).unwrap();
        let new_with_piece = fs::read(&source).unwrap();
        let killed = program(&t, "i1=kill", &["copy", "--atomic", "redo", "source", "image"]);
        assert!(!killed.status.success() && new != new_with_piece);
        let torn = fs::File::options().write(true).open(&image).unwrap();
        let upto = (blocks_done * 65536).min(new.len() as u64) as usize;
        torn.write_all_at(&new_with_piece[..upto], 0).unwrap();
        // And half a block.
        let end = (upto + 30_000).min(new.len());
        torn.write_all_at(&new_with_piece[upto..end], upto as u64).unwrap();
        let done = program(&t, "", &["apply", "--finish", "image"]);
        assert!(done.status.success(), "{blocks_done}: {done:?}");
        assert!(fs::read(&image).unwrap() == new_with_piece, "{blocks_done}");
    }
}

/// Somebody went on with the torn image, or put another one there.
#[test]
fn a_redo_file_is_applied_to_its_image_only() {
    let t = Bench::new();
    let (source, image) = (t.image("source", Raw, ("abXd", 65536)), t.image("image", Raw, ("abcd", 65536)));
    fs::File::options().write(true).open(&source).unwrap().write_all_at(&[7], 5).unwrap();
    program(&t, "i1=kill", &["copy", "--atomic", "redo", "source", "image"]);
    let redo = fs::read(t.path(".image.vr-redo")).unwrap();
    fs::File::options().write(true).open(&image).unwrap().write_all_at(&[9], 60_000).unwrap();
    let done = program(&t, "", &["apply", "--finish", "image"]);
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.code() == Some(13) && said.contains("somebody has written to the image"), "{said}");
    // Kept, so that its number is not given to the other one.
    fs::rename(&image, t.path("kept")).unwrap();
    t.image("image", Raw, ("zzz", 5));
    fs::write(t.path(".image.vr-redo"), redo).unwrap();
    let done = program(&t, "", &["apply", "--finish", "image"]);
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.code() == Some(1) && said.contains("the redo file is for another file"), "{said}");
}

/// Old or new, whatever dies; what is left beside it is not gone on from.
#[test]
fn killed_at_the_last_moment_the_old_image_is_there_and_the_next_copy_begins_afresh() {
    for format in Foreign::ALL {
        for shape in [("xbc0eg", 65536), ("xbc0egh", 512)] {
            let t = Bench::new();
            let source = t.image("source", Raw, shape);
            let image = t.any_image("image", format.into(), ("abcdef", 65536));
            let old = fs::read(&image).unwrap();
            let args = ["copy", "source", "image", "--target-format", format.as_str(), "--json"];
            for (step, is_new) in [("i4", false), ("i5", true)] {
                let killed = program(&t, &format!("{step}=kill"), &args);
                assert_eq!(std::os::unix::process::ExitStatusExt::signal(&killed.status), Some(9), "{killed:?}");
                assert_eq!(fs::read(&image).unwrap() != old, is_new, "{format:?} {step}");
                assert_eq!(t.path(".image.vr-part").exists(), !is_new, "{format:?} {step}");
            }
            t.expect(&image, format, &fs::read(&source).unwrap(), format.as_str());
            let again = told(&program(&t, "", &args));
            assert_eq!(again["copied"]["equal"], true, "{again}");
            t.clean(format.as_str());
        }
    }
}

fn told(done: &Output) -> serde_json::Value {
    assert!(done.status.success(), "{done:?}");
    let line = String::from_utf8(done.stdout.clone()).unwrap();
    serde_json::from_str(line.lines().last().unwrap()).unwrap()
}

#[test]
fn killed_in_the_middle_of_writing_the_old_image_is_there_bit_for_bit() {
    for format in Foreign::ALL {
        let t = Bench::new();
        let letters: String = (0..64).map(|n| char::from(b'A' + n % 50)).collect();
        let source = t.image("source", Raw, (&letters, 65536));
        let image = t.any_image("image", format.into(), (&"z".repeat(64), 65536));
        let old = fs::read(&image).unwrap();
        let args = ["copy", "source", "image", "--target-format", format.as_str(), "--json"];
        let mut child = Command::new(env!("CARGO_BIN_EXE_virt-replica"))
            .current_dir(t.path(""))
            .arg("--state-dir")
            .arg(t.path("state"))
            .args(args)
            .args(["--rate", "1M"])
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Until something of the new contents is in the copy.
        let part = t.path(".image.vr-part");
        let began = std::time::Instant::now();
        while !fs::read(&part).is_ok_and(|bytes| bytes.len() >= old.len() && bytes != old) {
            assert!(began.elapsed().as_secs() < 60 && child.try_wait().unwrap().is_none(), "{format:?}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(fs::read(&image).unwrap() == old && part.exists(), "{format:?}");
        let done = told(&program(&t, "", &args));
        assert!(done["copied"]["resumed"] == false && done["copied"]["blocks_changed"] == 64, "{done}");
        t.expect(&image, format, &fs::read(&source).unwrap(), format.as_str());
        t.clean(format.as_str());
    }
}
