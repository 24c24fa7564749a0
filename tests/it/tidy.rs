//! House rules that a machine can keep: the direction between modules, the length of files and functions, words that
//! must not be left behind. docs/contributing.md says why.

mod imports;

use imports::{Arrow, Imports, Sources};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// Lines a source file may have, its tests not counted.
const FILE_LINES_MAX: usize = 600;
/// Lines a function may have.
const FUNCTION_LINES_MAX: usize = 70;
/// Columns a line of comment may have.
const COMMENT_COLUMNS_MAX: usize = 120;

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
    ("config", &["error", "policy", "transport", "replicate", "trust", "units", "yaml"]),
    ("patch", &["error", "name", "block"]),
    ("retention", &["error", "name"]),
    ("image", &["error", "block", "file_id"]),
    // Finds and ships differences: below the store, a domain's run and plain images, which all use it.
    ("engine", &["error", "name", "block", "patch", "image"]),
    ("transport", &["error", "users"]),
    ("hypervisor", &["error", "name", "block", "image", "users"]),
    ("replica", &["error", "flock", "failpoint", "name", "block", "patch", "image", "engine", "words"]),
    // It serves three ports: Replica, PlainTarget and BringUp. What travels of a failover are its own records and
    // findings: plain data.
    ("agent", &["error", "name", "block", "patch", "engine", "transport", "replica", "plain", "recovery", "words"]),
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
    ("plain", &["durable", "error", "file_id", "flock", "failpoint", "name", "block", "patch", "image", "engine"]),
    // How a run is to be done: what policies and the command line both say.
    ("run_settings", &["error", "name", "patch", "policy", "replicate", "retention"]),
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
            "plain",
        ],
    ),
    // The binary's own: grammar, rendering, exit codes.
    (
        "cli",
        &[
            "agent",
            "block",
            "config",
            "daemon",
            "durable",
            "engine",
            "envelope",
            "error",
            "file_id",
            "hook",
            "hypervisor",
            "image",
            "name",
            "patch",
            "plain",
            "policy",
            "recovery",
            "replica",
            "replicate",
            "retention",
            "run_settings",
            "transport",
            "units",
            "wiring",
            "words",
        ],
    ),
];

/// Adapters, and the modules that may name them beside `wiring` and the folder they stand in.
const ADAPTERS: &[(&str, &[&str])] = &[
    ("hypervisor::libvirt", &[]),
    // The options of ssh are flags of the command line.
    ("transport::ssh", &["cli"]),
    ("transport::local", &[]),
    // The limits that a host sets for its store are flags of the command line.
    ("replica::store", &["cli"]),
    // The session in which the command line asks the target for its replicas.
    ("agent::client", &["cli"]),
    // What a store and a plain image write; everybody else reads through `image::open`.
    ("image::raw", &["plain", "replica"]),
    ("image::qcow2", &["plain", "replica"]),
    ("image::foreign", &["cli", "plain"]),
    // How the bitmaps and backups of a domain are read.
    ("image::nbd", &["hypervisor"]),
    ("image::qemu_nbd", &["hypervisor", "replica"]),
    ("image::qemu_img", &["hypervisor", "plain", "recovery", "replica", "replicate"]),
];

/// Files that may use each other, because neither can be understood without the other; each with its reason.
const NATURAL: &[(&[&str], &str)] = &[
    (&["agent/client.rs", "agent/client/remote.rs"], "A session opens the replicas that speak through it."),
    (
        &["agent/server.rs", "agent/server/plain.rs", "agent/server/upkeep.rs"],
        "A session, and its answers by family of messages.",
    ),
    (
        &["cli/plain/patch.rs", "cli/store/pointfile.rs"],
        "`diff` and `apply` are one grammar; with a point they are commands of the store.",
    ),
    (
        &["engine/pump.rs", "engine/pump/planner.rs"],
        "The pump, and the thread in it that decides what each worker does next.",
    ),
    (
        &["hypervisor/libvirt/gate.rs", "hypervisor/libvirt/gate/events.rs"],
        "The gate waits for the events that it lets in; they share its lock.",
    ),
    (
        &["plain/incoming.rs", "plain/write_target.rs"],
        "An incoming image says into what it is written, and the landing takes it from there.",
    ),
    (
        &["policy/bandwidth.rs", "policy/file.rs", "policy/mod.rs", "policy/replicas.rs", "policy/select.rs"],
        "A policy as data, and the readers of its file, which its parts share.",
    ),
    (
        &["recovery/detach.rs", "recovery/detach/raw.rs"],
        "One disk is detached in two ways, and both end in the same check.",
    ),
    (
        &["recovery/handover.rs", "recovery/handover/run.rs"],
        "A handover judges, and its run asks for the verdict at every step.",
    ),
    (
        &["replica/prune.rs", "replica/shorten.rs"],
        "Pruning finishes a shortening that was cut off, and shortening asks pruning what is in use.",
    ),
];

/// Types with methods in more than one file, each with its reason. The methods of any other type stand beside it.
const SPREAD: &[(&str, &str)] = &[
    ("agent::client::AgentClient", "the requests of a session, by family of messages"),
    ("agent::client::Shared", "its reader thread"),
    ("agent::client::remote::RemoteReplica", "the requests about one replica, by family of messages"),
    ("agent::server::Session", "the answers of a session, by family of messages"),
    ("daemon::engine::Engine", "the runs, the checks beside them, and what is told of both"),
    ("hypervisor::libvirt::LibvirtHypervisor", "one adapter of many ports"),
    ("hypervisor::libvirt::gate::Call", "a call's failure in words"),
    ("policy::Policy", "a policy printed"),
    ("recovery::definition::Rendering", "the devices of a definition"),
    ("recovery::detach::One", "a disk that becomes raw"),
    ("replica::Promoted", "plain data for all, judged by the store alone"),
    ("replica::store::Store", "the writers of a store that need no open point"),
    ("replica::upkeep::Damage", "plain data for all, built by the scrub alone"),
    ("replicate::run::Run", "the story of a run stands on a page of its own"),
    ("wiring::local_target::Here", "this host as a target, by port"),
    ("wiring::source::Site", "this host as a source, by port"),
];

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

static IMPORTS: LazyLock<Imports> = LazyLock::new(|| {
    let sources: Sources =
        library().into_iter().map(|(path, text)| (path.to_string_lossy().into_owned(), text)).collect();
    imports::read(&sources)
});

/// The arrows between modules of the crate, without those of the roots.
fn between_modules() -> impl Iterator<Item = (String, String, &'static Arrow)> {
    let ends = |a: &'static Arrow| (module(Path::new(&a.from)), module(Path::new(&a.to)), a);
    IMPORTS.arrows.iter().map(ends).filter(|(from, to, _)| from != to && from != "main")
}

#[test]
fn every_file_is_reached_by_a_mod() {
    let lost: Vec<_> =
        library().into_iter().filter(|(p, _)| !IMPORTS.files.contains_key(&*p.to_string_lossy())).collect();
    assert!(lost.is_empty(), "no mod line names {:?}", lost.iter().map(|(p, _)| p).collect::<Vec<_>>());
}

#[test]
fn arrows_between_modules_point_down_only() {
    let rules: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let mut wrong = Vec::new();
    for (from, to, arrow) in between_modules() {
        let Arrow { from: file, line, item, .. } = arrow;
        match rules.get(from.as_str()) {
            None => wrong.push(format!("{file}: module '{from}' has no place in the order (tests/it/tidy.rs)")),
            Some(allowed) if allowed.contains(&to.as_str()) => {}
            Some(_) => wrong.push(format!("{file}:{line}: {from} must not use {item}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_arrow_that_may_be_is() {
    let drawn: BTreeSet<(String, String)> = between_modules().map(|(from, to, _)| (from, to)).collect();
    let unused: Vec<_> = MAY_USE
        .iter()
        .flat_map(|(from, allowed)| allowed.iter().map(move |to| (from.to_string(), to.to_string())))
        .filter(|arrow| !drawn.contains(arrow))
        .map(|(from, to)| format!("{from} uses nothing of {to}: take it out of MAY_USE (tests/it/tidy.rs)"))
        .collect();
    assert!(unused.is_empty(), "{}", unused.join("\n"));
}

#[test]
fn adapters_are_named_by_few() {
    let mut wrong = Vec::new();
    for (from, to, arrow) in between_modules() {
        for (adapter, users) in ADAPTERS {
            // An item of the adapter itself, or of a file below it.
            let named = arrow.item.strip_prefix(adapter).is_some_and(|rest| rest.starts_with("::"));
            if named && from != "wiring" && !users.contains(&from.as_str()) {
                wrong
                    .push(format!("{}:{}: {from} must not name the adapter {adapter} of {to}", arrow.from, arrow.line));
            }
        }
    }
    for (adapter, users) in ADAPTERS {
        let here = adapter.replace("::", "/");
        assert!(IMPORTS.files.contains_key(&format!("{here}.rs")), "the adapter {adapter} has no file {here}.rs");
        for user in *users {
            let names = |(from, _, a): &(String, String, &Arrow)| from == user && a.to.starts_with(&here);
            assert!(between_modules().any(|a| names(&a)), "{user} names nothing of {adapter}: take it out of ADAPTERS");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_form_no_circle() {
    let circles = imports::circles(IMPORTS.arrows.iter().map(|a| (a.from.as_str(), a.to.as_str())));
    let natural: Vec<BTreeSet<&str>> = NATURAL.iter().map(|(files, _)| files.iter().copied().collect()).collect();
    let wrong: Vec<String> =
        circles.iter().filter(|c| !natural.contains(c)).map(|c| imports::drawn(c, &IMPORTS.arrows)).collect();
    assert!(
        wrong.is_empty(),
        "Move what both need, often a plain data type, to a file of its own below both.\n\n{}",
        wrong.join("\n\n")
    );
    let gone: Vec<_> = natural.iter().filter(|set| !circles.contains(set)).collect();
    assert!(gone.is_empty(), "no circle any more, take them out of NATURAL (tests/it/tidy.rs): {gone:?}");
}

#[test]
fn methods_stand_beside_their_type() {
    let spread: BTreeSet<&str> = IMPORTS.distant_impls.iter().map(|a| a.item.as_str()).collect();
    let known: BTreeSet<&str> = SPREAD.iter().map(|(item, _)| *item).collect();
    let wrong = IMPORTS.distant_impls.iter().filter(|a| !known.contains(a.item.as_str()));
    let wrong: Vec<String> = wrong.map(|a| format!("{}:{}: impl {}", a.from, a.line, a.item)).collect();
    assert!(wrong.is_empty(), "methods far from their type:\n{}", wrong.join("\n"));
    let gone: Vec<_> = known.difference(&spread).collect();
    assert!(gone.is_empty(), "take them out of SPREAD (tests/it/tidy.rs): {gone:?}");
}

/// The floors that a picture of the modules draws, uppermost first: lines ` name · name   words` of its text block.
fn floors(picture: &str) -> Vec<Vec<String>> {
    let lines = picture.lines().map(|l| l.strip_prefix("//!").unwrap_or(l));
    let block = lines.skip_while(|l| !l.trim_start().starts_with("```text")).skip(1);
    block
        .take_while(|l| !l.trim_start().starts_with("```"))
        .filter_map(|line| line.strip_prefix(' ').filter(|l| !l.starts_with(' ')))
        .map(|line| line.split("  ").next().unwrap_or_default().split(" · ").map(str::to_owned).collect())
        .collect()
}

/// The floors that the arrows make, uppermost first: each module right above the highest one that it uses.
fn floors_of(arrows: &BTreeSet<(String, String)>) -> Vec<BTreeSet<String>> {
    let mut height: BTreeMap<&str, usize> =
        arrows.iter().flat_map(|(a, b)| [(a.as_str(), 0), (b.as_str(), 0)]).collect();
    // As many rounds as there are modules raise each to its floor, if there is no circle.
    for _ in 0..height.len() {
        for (from, to) in arrows {
            let above = height[to.as_str()] + 1;
            let at = height.get_mut(from.as_str()).expect("every end was put in");
            *at = (*at).max(above);
        }
    }
    let top = height.values().copied().max().unwrap_or_default();
    let floor = |at: usize| height.iter().filter(|(_, h)| **h == at).map(|(m, _)| m.to_string()).collect();
    (0..=top).rev().map(floor).collect()
}

#[test]
fn the_pictures_draw_what_the_imports_say() {
    let arrows: BTreeSet<_> = between_modules().map(|(from, to, _)| (from, to)).collect();
    let drawn = floors_of(&arrows);
    for page in ["src/lib.rs", "docs/architecture.md"] {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap();
        let text = text.split_once("stands as low as its imports allow").expect("the words before the picture").1;
        let picture: Vec<BTreeSet<String>> = floors(text).into_iter().map(BTreeSet::from_iter).collect();
        let should: Vec<String> = drawn.iter().map(|f| f.iter().cloned().collect::<Vec<_>>().join(" · ")).collect();
        assert_eq!(picture, drawn, "{page} should draw:\n {}", should.join("\n "));
    }
}

#[test]
fn a_picture_is_read_and_drawn_by_floors() {
    let text = "//! words\n//! ```text\n//! a · b_c   words · more\n//!             more words\n//! d\n//! ```\n//! e";
    assert_eq!(floors(text), [vec!["a".to_owned(), "b_c".to_owned()], vec!["d".to_owned()]]);
    let arrows = [("a", "d"), ("a", "b"), ("b", "d"), ("c", "d")].map(|(from, to)| (from.to_owned(), to.to_owned()));
    let floors: Vec<Vec<String>> =
        floors_of(&BTreeSet::from(arrows)).into_iter().map(|f| f.into_iter().collect()).collect();
    assert_eq!(floors, [vec!["a"], vec!["b", "c"], vec!["d"]]);
}

/// A crate of a few lines for the reader of imports.
fn tiny(files: &[(&str, &str)]) -> Imports {
    imports::read(&files.iter().map(|(path, text)| (path.to_string(), text.to_string())).collect())
}

/// The arrows of a tiny crate as `from > to item`.
fn told(imports: &Imports) -> Vec<String> {
    imports.arrows.iter().map(|a| format!("{} > {} {}", a.from, a.to, a.item)).collect()
}

#[test]
fn the_reader_of_imports_sees_every_notation() {
    let to = ("b.rs", "pub struct T; pub fn f() {} pub mod deep;");
    let deep = ("b/deep.rs", "pub struct D;");
    let seen = |a: &str| told(&tiny(&[("lib.rs", "mod a; mod b;"), ("a.rs", a), to, deep]));
    let (t, d) = ("a.rs > b.rs b::T".to_owned(), "a.rs > b/deep.rs b::deep::D".to_owned());
    for one in ["use crate::b::T;", "use super::b::T;", "use self::super::b::T as U;", "fn x() { crate::b::T; }"] {
        assert_eq!(seen(one), [t.as_str()], "{one}");
    }
    for both in [
        "use crate::{b::{T, deep::{D}}};",
        "use crate::b::{self, T}; fn x(_: b::deep::D) {}",
        "use super::b; type X = (b::T, b::deep::D);",
    ] {
        assert_eq!(seen(both), [t.clone(), d.clone()], "{both}");
    }
    assert_eq!(seen("use crate::b; fn x() { b::f() }"), ["a.rs > b.rs b::f"]);
    assert_eq!(seen("mod inner { use super::super::b::T; }"), [t.as_str()], "a module inside the file");
    assert_eq!(seen("#[serde(with = \"crate::b::T\")] struct S;"), [t], "a path that serde reads");
    for nothing in [
        "// crate::b::T",
        "/* use crate::b::T; */",
        "const X: &str = \"crate::b::T\"; const Y: &str = r#\"\"crate::b::T\"#; const Z: char = '\"';",
        "#[cfg(test)] mod tests { use crate::b::T; }",
        "#[cfg(test)] use crate::b::T;",
        "use crate::b;",
        "use other::b::T;",
    ] {
        assert_eq!(seen(nothing), [""; 0], "{nothing}");
    }
}

#[test]
fn a_name_leads_to_the_file_that_defines_it() {
    let files = |b: &'static str| {
        tiny(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b::T;"),
            ("b.rs", b),
            ("b/c.rs", "pub struct T; impl T {} #[cfg(test)] #[path = \"c_tests.rs\"] mod tests;"),
            ("b/c_tests.rs", "use crate::a::X;"),
        ])
    };
    assert_eq!(told(&files("mod c; pub use c::T;")), ["a.rs > b/c.rs b::c::T"], "a re-export declares, and no more");
    assert_eq!(told(&files("mod c; pub use c::*;")), ["a.rs > b/c.rs b::c::T"]);
    let used = files("mod c; pub(crate) use c::T; fn f(_: T) {}");
    assert_eq!(told(&used), ["a.rs > b/c.rs b::c::T", "b.rs > b/c.rs b::c::T"], "the parent uses it too");
    assert!(used.files["b/c_tests.rs"] && !used.files["b/c.rs"], "{:?}", used.files);
    let bin = tiny(&[
        ("lib.rs", "pub mod b;"),
        ("b.rs", "pub struct T;"),
        ("main.rs", "mod cli;"),
        ("cli/mod.rs", "use virt_replica::b::T;"),
    ]);
    assert_eq!(told(&bin), ["cli/mod.rs > b.rs b::T"]);
    let distant = tiny(&[
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "use crate::b::T; impl T {} impl Clone for T {}"),
        ("b.rs", "pub struct T; impl T {}"),
    ]);
    assert_eq!(distant.distant_impls.len(), 1, "{:?}", distant.distant_impls);
}

#[test]
fn the_finder_of_circles_finds_them() {
    let found = |arrows: &[(&'static str, &'static str)]| imports::circles(arrows.iter().copied());
    assert!(found(&[("a", "b"), ("b", "c"), ("a", "c")]).is_empty());
    let two = found(&[("a", "b"), ("b", "c"), ("c", "a"), ("d", "a"), ("x", "y"), ("y", "x")]);
    assert_eq!(two, [BTreeSet::from(["a", "b", "c"]), BTreeSet::from(["x", "y"])]);
    let circle = tiny(&[
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "use super::b::{self, T}; struct S; fn f() { b::g() }"),
        ("b.rs", "pub struct T;\nuse crate::a::S;"),
    ]);
    let drawn = imports::drawn(&BTreeSet::from(["a.rs", "b.rs"]), &circle.arrows);
    let told =
        "2 files use each other: a.rs, b.rs\n    b.rs -> a.rs: S (line 2)\n    a.rs -> b.rs: T (line 1), g (line 1)";
    assert_eq!(drawn, told);
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

/// Lines of comment that are too wide: (number, columns).
fn wide_comments(text: &str) -> Vec<(usize, usize)> {
    let comments = text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("//"));
    let columns = comments.map(|(at, line)| (at + 1, line.chars().count()));
    columns.filter(|(_, columns)| *columns > COMMENT_COLUMNS_MAX).collect()
}

#[test]
fn comments_are_no_wider_than_a_screen() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    ["src", "tests", "benches"].iter().for_each(|dir| sources(&root.join(dir), &mut found));
    let mut wide = Vec::new();
    for path in &found {
        let text = fs::read_to_string(path).expect("a readable source");
        let at = path.strip_prefix(root).expect("below the root").display();
        wide.extend(wide_comments(&text).iter().map(|(line, columns)| format!("{at}:{line}: {columns} columns")));
    }
    assert!(wide.is_empty(), "comments of more than {COMMENT_COLUMNS_MAX} columns:\n{}", wide.join("\n"));
    // Letters count, not bytes, and code is rustfmt's.
    let (fits, wide) = (format!("// {}", "ä".repeat(117)), format!("  /// {}", "x".repeat(115)));
    assert_eq!(wide_comments(&format!("{fits}\n{wide}\nlet long = \"{wide}\";")), [(2, 121)]);
}

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in library() {
        assert!(text.starts_with("//!"), "{} does not open with //!", path.display());
    }
}
