//! House rules that a machine can keep: the direction between modules, the length of files and functions, words that
//! must not be left behind. docs/contributing.md says why.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines a source file may have, its tests not counted.
const FILE_LINES_MAX: usize = 600;
/// Lines a function may have.
const FUNCTION_LINES_MAX: usize = 70;

/// What each module of the library may use. Arrows point down only; what is not listed here does not exist.
const MAY_USE: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("failpoint", &["error"]),
    ("flock", &[]),
    ("file_id", &["error"]),
    ("durable", &["error", "failpoint"]),
    ("name", &["error"]),
    ("block", &["error"]),
    ("trust", &["error"]),
    ("units", &[]),
    ("words", &["error"]),
    // Libraries of the system: whoever asks it may wait.
    ("users", &["error"]),
    ("envelope", &["error"]),
    ("yaml", &["error"]),
    ("hook", &["error", "trust"]),
    ("policy", &["error", "hook", "name", "patch", "retention", "units", "yaml"]),
    ("config", &["error", "name", "policy", "transport", "replicate", "trust", "units", "yaml"]),
    ("patch", &["error", "name", "block"]),
    ("retention", &["error", "name"]),
    ("image", &["error", "block", "file_id"]),
    // Finds and ships differences: below the store, a domain's run and plain images, which all use it.
    ("engine", &["error", "name", "block", "patch", "image", "words"]),
    ("transport", &["error", "users"]),
    ("hypervisor", &["error", "name", "block", "image", "users"]),
    ("replica", &["error", "flock", "failpoint", "name", "block", "patch", "image", "engine", "words"]),
    // It serves three ports: Replica, PlainTarget and BringUp. What travels of a failover are its own records and
    // findings: plain data.
    (
        "agent",
        &[
            "error",
            "failpoint",
            "name",
            "block",
            "patch",
            "engine",
            "transport",
            "replica",
            "plain",
            "recovery",
            "words",
        ],
    ),
    (
        "replicate",
        &[
            "durable",
            "error",
            "file_id",
            "flock",
            "failpoint",
            "hook",
            "name",
            "block",
            "patch",
            "image",
            "engine",
            "hypervisor",
            "replica",
            "units",
        ],
    ),
    (
        "recovery",
        &[
            "durable",
            "engine",
            "error",
            "file_id",
            "failpoint",
            "flock",
            "name",
            "block",
            "yaml",
            "image",
            "hypervisor",
            "replica",
            "replicate",
            "trust",
        ],
    ),
    // Images that are no domain's: the same engine, and neither store nor libvirt.
    (
        "plain",
        &["durable", "error", "file_id", "flock", "failpoint", "name", "block", "patch", "image", "engine", "replica"],
    ),
    // How a run is to be done: what policies and the command line both say.
    ("run_settings", &["error", "name", "patch", "policy", "replicate", "retention", "units"]),
    // It knows a run by its report and its journal, and a domain by its name; the rest is the children's.
    (
        "daemon",
        &[
            "durable",
            "engine",
            "error",
            "flock",
            "hook",
            "name",
            "config",
            "policy",
            "replica",
            "replicate",
            "run_settings",
            "units",
        ],
    ),
    (
        "wiring",
        &[
            "engine",
            "error",
            "name",
            "block",
            "image",
            "transport",
            "hypervisor",
            "replica",
            "agent",
            "replicate",
            "recovery",
            "config",
            "plain",
        ],
    ),
];

/// Adapters: named by `wiring` alone, and by the folder they stand in.
const ADAPTERS: &[&str] =
    &["hypervisor::libvirt", "transport::ssh", "transport::local", "replica::store", "agent::client"];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.expect("readable directory").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn library() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    sources(&root, &mut found);
    assert!(found.len() > 30, "found only {} sources: looked in the wrong place", found.len());
    found.sort();
    found.into_iter().map(|p| (p.strip_prefix(&root).unwrap().to_owned(), fs::read_to_string(&p).unwrap())).collect()
}

/// The code of a file without its inline tests.
fn without_tests(text: &str) -> &str {
    text.find("\n#[cfg(test)]\nmod ")
        .or_else(|| text.find("\n#[cfg(test)]\npub(crate) mod "))
        .map_or(text, |at| &text[..at])
}

fn is_test_file(path: &Path) -> bool {
    let stem = path.file_stem().unwrap().to_string_lossy();
    stem == "tests" || stem.ends_with("_tests")
}

/// The module a file belongs to: its first folder or its own name.
fn module(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// `crate::a::b` as written anywhere but in comments: (line number, "a::b").
fn uses(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        for (at, _) in code.match_indices("crate::") {
            // `$crate::` in a macro is the same arrow; a longer word that ends in "crate" is not ours.
            if at > 0 && code.as_bytes()[at - 1].is_ascii_alphanumeric() {
                continue;
            }
            let path: String =
                code[at + 7..].chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':').collect();
            found.push((number + 1, path.trim_end_matches(':').to_owned()));
        }
    }
    found
}

#[test]
fn arrows_between_modules_point_down_only() {
    let rules: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut wrong = Vec::new();
    for (path, text) in library() {
        let me = module(&path);
        if matches!(me.as_str(), "lib" | "main" | "cli") || is_test_file(&path) {
            continue;
        }
        let Some(allowed) = rules.get(me.as_str()) else {
            wrong.push(format!("{}: module '{me}' has no place in the order (tests/it/tidy.rs)", path.display()));
            continue;
        };
        for (line, used) in uses(without_tests(&text)) {
            let module = used.split("::").next().unwrap();
            let known = rules.contains_key(module);
            if known && module != me && !allowed.contains(&module) {
                wrong.push(format!("{}:{line}: {me} must not use crate::{used}", path.display()));
            }
            let adapter = ADAPTERS.iter().find(|a| used.starts_with(*a));
            if let Some(adapter) = adapter.filter(|_| me != "wiring" && module != me) {
                wrong.push(format!("{}:{line}: only wiring names the adapter {adapter}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_command_line_belongs_to_the_binary() {
    for (path, text) in library() {
        if matches!(module(&path).as_str(), "main" | "cli") || is_test_file(&path) {
            continue;
        }
        let text = without_tests(&text);
        for word in ["println!", "eprintln!", "clap::", "indicatif::", "std::process::exit"] {
            let used = text.lines().position(|l| l.split("//").next().unwrap_or("").contains(word));
            assert_eq!(used, None, "{}: the library does not use {word}", path.display());
        }
    }
}

#[test]
fn files_stay_short() {
    let long: Vec<String> = library()
        .iter()
        .filter(|(path, _)| !is_test_file(path))
        .map(|(path, text)| (path, without_tests(text).lines().count()))
        .filter(|(_, lines)| *lines > FILE_LINES_MAX)
        .map(|(path, lines)| format!("{}: {lines} lines", path.display()))
        .collect();
    assert!(long.is_empty(), "a file of more than {FILE_LINES_MAX} lines is usually two things:\n{}", long.join("\n"));
}

#[test]
fn functions_stay_short() {
    let mut long = Vec::new();
    for (path, text) in library() {
        if is_test_file(&path) {
            continue;
        }
        let mut open: Option<(usize, usize, String)> = None; // start line, indent, signature
        for (number, line) in without_tests(&text).lines().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let code = line.trim_start();
            let begins =
                ["fn ", "pub fn ", "pub(crate) fn ", "pub(super) fn ", "unsafe fn ", "async fn ", "extern \"C\" fn "];
            if open.is_none() && begins.iter().any(|b| code.starts_with(b)) {
                open = Some((number, indent, code.to_owned()));
            }
            if let Some((start, at, name)) = &open {
                let ends =
                    indent == *at && (code == "}" || (number == *start && code.ends_with('}')) || code.ends_with(';'));
                if ends {
                    let lines = number - start + 1;
                    if lines > FUNCTION_LINES_MAX {
                        long.push(format!("{}:{}: {lines} lines: {name}", path.display(), start + 1));
                    }
                    open = None;
                }
            }
        }
    }
    assert!(
        long.is_empty(),
        "a function of more than {FUNCTION_LINES_MAX} lines is usually two things:\n{}",
        long.join("\n")
    );
}

#[test]
fn nothing_is_left_half_done() {
    // Put together here, so that this file does not find itself.
    let banned =
        [["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["todo", "!("], ["unimple", "mented!("], ["being ", "written)"]];
    let banned: Vec<String> = banned.iter().map(|w| w.concat()).collect();
    for (path, text) in library() {
        for (number, line) in text.lines().enumerate() {
            let found = banned.iter().find(|word| line.contains(word.as_str()));
            assert_eq!(found, None, "{}:{}: {line}", path.display(), number + 1);
        }
    }
}

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in library() {
        assert!(text.starts_with("//!"), "{} does not open with //!", path.display());
    }
}
