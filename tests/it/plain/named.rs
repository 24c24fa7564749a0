//! Files that an image names: whoever made it chose them, so they lie beside it, or where the operator says.

use super::patches::program;
use super::support::*;
use std::fs;
use std::path::Path;
use virt_replica::error::{Kind, advice};
use virt_replica::image::Format::{Qcow2, Raw};
use virt_replica::plain::source::{ReadOptions, Source};
use virt_replica::plain::target::{LocalOptions, LocalTarget};
use virt_replica::plain::{WayWish, Wish};

/// An image over `backing`, as a stranger would make it.
fn over(t: &Bench, backing: &Path, name: &str) -> std::path::PathBuf {
    let path = t.path(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let (backing, image) = (backing.to_str().unwrap(), path.to_str().unwrap());
    t.qemu(&["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", image, "128K"]);
    path
}

fn open(t: &Bench, path: &Path, allowed: &[&Path]) -> virt_replica::error::Result<Vec<u8>> {
    let backing = allowed.iter().map(|dir| dir.to_path_buf()).collect();
    let source = Source::open(path, Qcow2, &ReadOptions { backing, ..t.read_options() })?;
    let mut bytes = vec![0; source.size().0 as usize];
    source.image.read_at(0, &mut bytes)?;
    source.close()?;
    Ok(bytes)
}

#[test]
fn an_image_does_not_choose_which_file_of_the_host_is_read() {
    let t = Bench::new();
    fs::create_dir_all(t.path("private/deep")).unwrap();
    let secret = t.path("private/deep/secret");
    fs::write(&secret, [b's'; 131_072]).unwrap();
    let links = t.path("in/link");
    let names = [
        over(&t, &secret, "in/absolute.qcow2"),
        over(&t, Path::new("../private/deep/secret"), "in/relative.qcow2"),
        over(&t, &links, "in/linked.qcow2"),
    ];
    std::os::unix::fs::symlink(&secret, &links).unwrap();
    for image in &names {
        let e = open(&t, image, &[]).unwrap_err();
        assert_eq!(e.kind(), Kind::Refused, "{e}");
        assert!(e.what().contains("lies outside of the image's directory"), "{e}");
        let dir = secret.parent().unwrap();
        let wanted = advice::Image::AllowBacking { dir: dir.display().to_string() };
        assert_eq!(e.advice(), Some(&wanted.into()));
        // A directory that is not the one does not do; the one, and what it lies in, do.
        assert!(open(&t, image, &[&t.path("other"), &t.path("priv")]).is_err());
        for allowed in [dir, &t.path("private")] {
            assert!(open(&t, image, &[allowed]).unwrap().iter().all(|b| *b == b's'));
        }
        // The base of a patch is read, too.
        let wish = Wish {
            path: image.clone(),
            format: Qcow2.into(),
            read_only: true,
            way: WayWish::Auto,
            digests: None,
            size: None,
            force_share: false,
            afresh: false,
        };
        assert_eq!(LocalTarget::open(&wish, &t.local_options()).err().unwrap().kind(), Kind::Refused);
        LocalTarget::open(&wish, &LocalOptions { backing: vec![dir.to_owned()], ..t.local_options() }).unwrap();
    }
    // In its own directory, and below it, an image may name what it likes.
    fs::create_dir_all(t.path("in/below")).unwrap();
    fs::write(t.path("in/below/base"), [b'b'; 131_072]).unwrap();
    let image = over(&t, Path::new("below/base"), "in/own.qcow2");
    assert!(open(&t, &image, &[]).unwrap().iter().all(|b| *b == b'b'));
    std::os::unix::fs::symlink(&image, t.path("elsewhere")).unwrap();
}

#[test]
fn a_data_file_lies_beside_its_image() {
    let t = Bench::new();
    fs::create_dir_all(t.path("in")).unwrap();
    fs::create_dir_all(t.path("out")).unwrap();
    let data = t.path("out/data");
    let image = t.path("in/image.qcow2");
    let options = format!("data_file={},data_file_raw=on", data.display());
    t.qemu(&["create", "-q", "-f", "qcow2", "-o", &options, image.to_str().unwrap(), "128K"]);
    assert_eq!(open(&t, &image, &[]).unwrap_err().kind(), Kind::Refused);
    open(&t, &image, &[&t.path("out")]).unwrap();
}

/// The commands, and that a copy says what it read beside its image.
#[test]
fn the_commands_refuse_and_take_a_directory() {
    let t = Bench::new();
    fs::create_dir_all(t.path("out")).unwrap();
    fs::write(t.path("out/base"), [b'b'; 131_072]).unwrap();
    let image = over(&t, &t.path("out/base"), "in/image.qcow2");
    let (image, out, allowed) = (image.to_str().unwrap(), t.path("x.raw"), t.path("out"));
    let digests = t.path("x.digests");
    let patch = t.path("x.patch");
    let store = t.path("store");
    assert!(program(&t, "", &["store", "init", store.to_str().unwrap()]).status.success());
    let (digests, patch) = (digests.to_str().unwrap(), patch.to_str().unwrap());
    let uuid = "0a1b2c3d-0000-4000-8000-000000000001";
    let commands: [Vec<&str>; 4] = [
        vec!["copy", "--json", image, out.to_str().unwrap()],
        vec!["digest", image, "-o", digests],
        vec!["diff", image, "--from-nothing", "-o", patch],
        vec!["seed", uuid, "--from", image, "--format", "qcow2", "--root", store.to_str().unwrap()],
    ];
    for command in commands {
        let refused = program(&t, "", &command);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{command:?}: {said}");
        assert!(said.contains("--backing"), "{command:?}: {said}");
        let mut allowing = command.clone();
        allowing.extend(["--backing", allowed.to_str().unwrap()]);
        let done = program(&t, "", &allowing);
        assert!(done.status.success(), "{allowing:?}: {}", String::from_utf8_lossy(&done.stderr));
        if command[0] == "copy" {
            let said = String::from_utf8_lossy(&done.stdout).into_owned();
            let last: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
            assert_eq!(last["source_files"], serde_json::json!([image, t.path("out/base")]), "{said}");
        }
    }
    t.expect(&out, Raw, &[b'b'; 131_072], "the copy");
}
