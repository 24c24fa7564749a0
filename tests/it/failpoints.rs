//! docs/replication.md numbers the steps of a run, docs/recovery.md those of a drill and a failover. Every failpoint
//! has a row there and a test that kills the program at that number; every row has a failpoint. Where order is safety,
//! the numbers must not drift.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(dir: PathBuf, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => rust_files(path, found),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => {}
        }
    }
}

/// Number -> where it stands, of every `failpoint!("…")` in the code.
fn in_source() -> BTreeMap<String, Vec<String>> {
    let mut files = Vec::new();
    rust_files(root().join("src"), &mut files);
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in files {
        let text = fs::read_to_string(&path).unwrap();
        let code = text.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//"));
        for (number, line) in code {
            for rest in line.split("failpoint!(\"").skip(1) {
                let place = format!("{}:{}", path.strip_prefix(root()).unwrap().display(), number + 1);
                found.entry(rest.split('"').next().unwrap().to_owned()).or_default().push(place);
            }
        }
    }
    found
}

/// Number -> who, tests; the rows of the tables of steps: of a run, of a backup, of a prune, of a shortening, of a
/// drill, of a failover, of a planned one, of a detaching, of a failback.
fn in_docs() -> BTreeMap<String, (String, Vec<String>)> {
    let pages = ["docs/replication.md", "docs/recovery.md"];
    let text = pages.map(|page| fs::read_to_string(root().join(page)).unwrap()).join("\n## \n");
    let section = |title: &str| {
        let section = text.split(title).nth(1).unwrap_or_else(|| panic!("there is no section {title:?}"));
        section.split("\n## ").next().unwrap().to_owned()
    };
    let titles = [
        "## Every step and its failpoint",
        "## By backup",
        "## Removing points",
        "## Keeping chains short",
        "## A drill, step by step",
        "## A failover, step by step",
        "## A planned failover, step by step",
        "## Images of its own, step by step",
        "## The way home, step by step",
        "## Plain images",
    ];
    let sections = titles.map(section).concat();
    let mut rows = BTreeMap::new();
    for line in sections.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [number, who, _, _, tests] = cells[..] else { continue };
        if !number
            .trim_start_matches(['b', 'p', 's', 'd', 'f', 'g', 'h', 'i', 'k'])
            .starts_with(|c: char| c.is_ascii_digit())
        {
            continue;
        }
        let tests = tests.split(", ").map(|t| t.trim_matches('`').to_owned()).collect();
        let twice = rows.insert(number.to_owned(), (who.to_owned(), tests));
        assert!(twice.is_none(), "docs/replication.md has step {number} twice");
    }
    rows
}

/// Test -> its file, for all crash tests of the lab, and those of a prune and a shortening.
fn crash_tests() -> BTreeMap<String, String> {
    lab_tests("crash")
}

/// Test -> its file, of all files of tests with this word in their names.
fn lab_tests(word: &str) -> BTreeMap<String, String> {
    let mut files = ["prune", "shorten"].map(|of| root().join(format!("tests/it/replica/{of}_crash.rs"))).to_vec();
    files.push(root().join("tests/it/plain/crash.rs"));
    rust_files(root().join("tests/lab/suite"), &mut files);
    let mut tests = BTreeMap::new();
    for path in files.iter().filter(|p| p.file_name().unwrap().to_string_lossy().contains(word)) {
        let text = fs::read_to_string(path).unwrap();
        for rest in text.split("#[test]\nfn ").skip(1) {
            tests.insert(rest.split('(').next().unwrap().to_owned(), text.clone());
        }
    }
    tests
}

#[test]
fn every_failpoint_has_a_row_and_a_test_and_every_row_a_failpoint() {
    let (source, docs, tests) = (in_source(), in_docs(), crash_tests());
    assert!(source.len() > 40, "only {} failpoints: looked in the wrong place", source.len());
    for (number, places) in &source {
        assert_eq!(places.len(), 1, "failpoint {number} stands in several places: {places:?}");
        let (who, by) =
            docs.get(number).unwrap_or_else(|| panic!("{number} ({}) is not in docs/replication.md", places[0]));
        let agent = places[0].starts_with("src/replica/");
        assert_eq!(who, if agent { "agent" } else { "driver" }, "who comes to {number}?");
        for test in by {
            let file = tests.get(test).unwrap_or_else(|| panic!("{number}: there is no crash test {test}"));
            assert!(file.contains(&format!("\"{number}\"")), "{number}: the file of {test} does not name it");
        }
    }
    for number in docs.keys() {
        assert!(source.contains_key(number), "docs/replication.md has step {number}, the code has no such failpoint");
    }
}

/// The other tests that the page names exist.
#[test]
fn every_test_that_the_page_names_exists() {
    named_tests_exist("## Other deaths, other hands", &crash_tests(), 10);
    named_tests_exist("## What tells the changes", &lab_tests("bitmaps"), 20);
    named_tests_exist("## The bitmap of a failover", &crash_tests(), 4);
}

fn named_tests_exist(heading: &str, tests: &BTreeMap<String, String>, at_least: usize) {
    let text = fs::read_to_string(root().join("docs/replication.md")).unwrap();
    let section = text.split(heading).nth(1).expect("the table of faults");
    let mut named = 0;
    for line in section.split("\n## ").next().unwrap().lines().filter(|l| l.starts_with("| ")).skip(1) {
        for test in line.rsplit("| ").next().unwrap().trim_end_matches(" |").split(", ") {
            assert!(tests.contains_key(test.trim_matches('`')), "{heading}: there is no test {test}");
            named += 1;
        }
    }
    assert!(named > at_least, "{heading}: only {named} tests named");
}
