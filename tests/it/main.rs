//! Every test that needs no lab, in one binary: a binary of its own for each file would link the whole crate each time.
//!
//! A test is found by its place: `replica::prune::NAME` stands in `tests/it/replica/prune.rs`. Tests that need the two
//! hosts are `tests/lab.rs`; those that hold one port against a real libvirt are `tests/hypervisor.rs`.

mod agent;
mod cli;
mod daemon;
mod docs;
mod failpoints;
mod image;
mod plain;
mod replica;
mod tidy;
#[cfg(feature = "lab")]
mod units;

use std::fs;
use std::path::{Path, PathBuf};

/// What stands directly in a directory: Rust files, directories.
fn entries(dir: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let all = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())).map(|e| e.unwrap().path());
    let (dirs, files): (Vec<PathBuf>, Vec<PathBuf>) = all.partition(|p| p.is_dir());
    (files.into_iter().filter(|p| p.extension().is_some_and(|e| e == "rs")).collect(), dirs)
}

/// The files in `dir` that the text of their parent does not make a module.
fn forgotten(parent: &str, dir: &Path) -> Vec<PathBuf> {
    let (mut files, _) = entries(dir);
    files.retain(|file| {
        let name = file.file_stem().unwrap().to_string_lossy();
        name != "main" && !parent.lines().any(|line| line == format!("mod {name};"))
    });
    files
}

/// A file that no module names is compiled by nobody, and all its tests are silent.
#[test]
fn no_file_of_tests_is_forgotten() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let read = |name: &str| fs::read_to_string(tests.join(name)).unwrap();
    let mut left = forgotten(&read("it/main.rs"), &tests.join("it"));
    let (_, rooms) = entries(&tests.join("it"));
    let rooms: Vec<PathBuf> = rooms.into_iter().filter(|room| !entries(room).0.is_empty()).collect();
    assert!(rooms.len() >= 5, "only {} rooms: looked in the wrong place", rooms.len());
    for room in rooms {
        left.extend(forgotten(&fs::read_to_string(room.with_extension("rs")).unwrap_or_default(), &room));
        // One level of rooms is all that this test looks at.
        left.extend(entries(&room).1.into_iter().flat_map(|below| entries(&below).0));
    }
    left.extend(forgotten(&read("lab.rs"), &tests.join("lab/suite")));
    left.extend(forgotten(&read("hypervisor.rs"), &tests.join("hypervisor")));
    assert!(left.is_empty(), "no module is made of {left:?}");
    // And no file becomes a binary of its own.
    let (mut binaries, _) = entries(&tests);
    binaries.sort();
    assert_eq!(binaries, ["hypervisor.rs", "lab.rs"].map(|name| tests.join(name)), "put it into tests/it");
}

/// A filter that names a test which is not there leaves nothing out, and nobody would notice.
#[test]
fn what_the_configuration_leaves_out_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let configuration = fs::read_to_string(root.join(".config/nextest.toml")).unwrap();
    let page = "docs/decisions/0061-what-does-not-depend-on-the-way-of-capture.md";
    let page = fs::read_to_string(root.join(page)).unwrap();
    let filter = configuration.split("^by_backup::(").nth(1).and_then(|f| f.split(")$/").next()).expect("the filter");
    let left_out: Vec<&str> = filter.split('|').map(str::trim).collect();
    assert!(left_out.len() > 10, "only {left_out:?}");
    for name in left_out {
        let (file, test) = name.split_once("::").unwrap_or_else(|| panic!("{name:?} is no name of a test"));
        let text = fs::read_to_string(root.join(format!("tests/lab/suite/{file}.rs"))).unwrap_or_default();
        assert!(text.contains(&format!("#[test]\nfn {test}()")), "there is no test {name}");
        let kind = test.rsplit_once("_with_").map_or(test, |(_, kind)| kind);
        assert!(page.contains(&format!("`{name}`")) || page.contains(&format!("`…_{kind}`")), "{name} has no row");
    }
}
