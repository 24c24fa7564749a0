//! The documents keep their word: links resolve, commands and make targets exist, the glossary has every word, and the
//! sample configuration is read by the code that reads the real one. Needs no lab.

mod prose;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use virt_replica::config::{Config, DaemonConfig, Defaults, LinkConfig, TargetConfig};
use virt_replica::policy::{Policy, keys};
use virt_replica::recovery::mapping::{MAPPING_FILE, MacPolicy, Mapping};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files_below(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.expect("readable directory").path();
        if path.is_dir() {
            files_below(&path, extension, found);
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
}

/// Every page: path relative to the root, text.
fn pages() -> Vec<(PathBuf, String)> {
    let mut found = vec![root().join("README.md")];
    found.extend(["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"].map(|page| root().join(page)));
    files_below(&root().join("docs"), "md", &mut found);
    files_below(&root().join("policies"), "md", &mut found);
    files_below(&root().join("packaging"), "md", &mut found);
    assert!(found.len() > 12, "found only {} pages: looked in the wrong place", found.len());
    found.sort();
    found.into_iter().map(|p| (p.strip_prefix(root()).unwrap().to_owned(), fs::read_to_string(&p).unwrap())).collect()
}

/// A page's lines, with whether each stands in a code block.
fn lines(text: &str) -> impl Iterator<Item = (usize, bool, &str)> {
    let mut in_block = false;
    text.lines().enumerate().filter_map(move |(at, line)| {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            return None;
        }
        Some((at + 1, in_block, line))
    })
}

/// Everything on a page that is code: lines of blocks, and what stands between backticks (also over a line's end).
fn code(text: &str) -> Vec<String> {
    let blocks = lines(text).filter(|(_, in_block, _)| *in_block).map(|(_, _, line)| line.to_owned());
    let prose: Vec<&str> = lines(text).filter(|(_, in_block, _)| !in_block).map(|(_, _, line)| line).collect();
    // Paragraph by paragraph, so that one backtick too many spoils no more than its own.
    let prose = prose.join("\n");
    let spans = prose.split("\n\n").flat_map(|p| p.split('`').skip(1).step_by(2)).map(|s| s.replace('\n', " "));
    blocks.chain(spans).collect()
}

/// The targets of a page's inline links, with their lines.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, in_block, line) in lines(text) {
        // Code spans may hold brackets that are no links.
        let plain: String = line.split('`').step_by(2).collect();
        for rest in plain.split("](").skip(1).filter(|_| !in_block) {
            let target = rest.split(')').next().expect("split gives at least one part");
            found.push((at, target.to_owned()));
        }
    }
    found
}

/// A heading's anchor, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

fn headings(text: &str) -> Vec<String> {
    let heads = lines(text).filter(|(_, in_block, line)| !in_block && line.starts_with('#'));
    heads.map(|(_, _, line)| line.trim_start_matches('#').trim().to_owned()).collect()
}

/// `docs/a/../b.md` as `docs/b.md`; `None` if it leads out of the repository.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => out.pop().then_some(())?,
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    Some(out)
}

#[test]
fn every_link_resolves_with_its_anchor() {
    let pages = pages();
    let mut broken = Vec::new();
    let mut checked = 0;
    for (page, text) in &pages {
        for (line, link) in links(text).into_iter().filter(|(_, l)| !l.contains("://") && !l.starts_with("mailto:")) {
            checked += 1;
            let (file, fragment) = link.split_once('#').unwrap_or((&link, ""));
            let target = match file {
                "" => Some(page.clone()),
                file => normal(&page.parent().expect("a page has a directory").join(file)),
            };
            let is_there = target.as_ref().is_some_and(|t| root().join(t).exists());
            let anchor_is_there = || {
                let text = fs::read_to_string(root().join(target.as_ref()?)).ok()?;
                headings(&text).iter().any(|h| anchor(h) == fragment).then_some(())
            };
            if !is_there || (!fragment.is_empty() && anchor_is_there().is_none()) {
                broken.push(format!("{}:{line}: {link}", page.display()));
            }
        }
    }
    assert!(checked > 40, "only {checked} links found: the test looks past them");
    assert!(broken.is_empty(), "links that lead nowhere:\n{}", broken.join("\n"));
}

#[test]
fn every_page_is_linked_from_another() {
    let pages = pages();
    let linked: BTreeSet<PathBuf> = pages
        .iter()
        .flat_map(|(page, text)| {
            let dir = page.parent().expect("a page has a directory").to_owned();
            links(text).into_iter().filter_map(move |(_, l)| normal(&dir.join(l.split('#').next()?)))
        })
        .collect();
    let lonely: Vec<_> = pages.iter().map(|(p, _)| p).filter(|p| !linked.contains(*p)).collect();
    assert!(lonely.is_empty(), "pages that nothing leads to: {lonely:?}");
}

/// `tests/run/check` proves the claim of Cargo.toml; the README must not make another one.
#[test]
fn the_readme_claims_the_compiler_of_the_manifest() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let claimed = manifest.lines().find_map(|l| l.strip_prefix("rust-version = \"")?.strip_suffix('"'));
    let sentence = format!("Rust {} or newer", claimed.expect("Cargo.toml has a rust-version"));
    assert!(fs::read_to_string(root().join("README.md")).unwrap().contains(&sentence), "README.md lacks: {sentence}");
}

/// Paths `src/….rs` in a text.
fn sources_named(text: &str) -> Vec<String> {
    let path = |at: usize| {
        let rest = &text[at..];
        let end = rest.find(|c: char| !(c.is_alphanumeric() || matches!(c, '/' | '_' | '.'))).unwrap_or(rest.len());
        let end = rest[..end].rfind(".rs")? + ".rs".len();
        Some(rest[..end].to_owned())
    };
    text.match_indices("src/").filter_map(|(at, _)| path(at)).collect()
}

#[test]
fn every_source_file_that_is_named_exists() {
    let mut missing = Vec::new();
    let mut found = 0;
    for (page, text) in pages() {
        for path in sources_named(&text) {
            found += 1;
            if !root().join(&path).is_file() {
                missing.push(format!("{}: {path}", page.display()));
            }
        }
    }
    assert!(found > 30, "found only {found} paths: looked in the wrong way");
    assert!(missing.is_empty(), "no such file:\n{}", missing.join("\n"));
}

#[test]
fn every_make_target_exists() {
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    let has = |target: &str| makefile.lines().any(|l| l.starts_with(&format!("{target}:")));
    let mut named = 0;
    for (page, text) in pages() {
        for code in code(&text) {
            let Some(rest) = code.trim().strip_prefix("make ") else { continue };
            let target = rest.split_whitespace().next().unwrap_or_default();
            named += 1;
            assert!(has(target), "{}: `make {target}` is no target of the Makefile", page.display());
        }
    }
    assert!(named > 5, "only {named} make targets found: the test looks past them");
}

/// What follows `virt-replica` in code, options left out.
fn subcommands(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, name) in code.match_indices("virt-replica ") {
        // The end of a path is no command.
        if code[..at].ends_with(|c: char| !c.is_whitespace() && c != '"') {
            continue;
        }
        let word = code[at + name.len()..].split_whitespace().find(|w| !w.starts_with('-')).unwrap_or_default();
        if !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase()) {
            found.push(word.to_owned());
        }
    }
    found
}

#[test]
fn every_subcommand_exists() {
    let help = Command::new(env!("CARGO_BIN_EXE_virt-replica")).arg("--help").output().expect("the binary runs");
    let help = String::from_utf8(help.stdout).expect("help is text");
    let list = help.split("Commands:").nth(1).expect("the help lists commands");
    let list: Vec<&str> =
        list.lines().skip(1).take_while(|l| l.starts_with("  ")).filter_map(|l| l.split_whitespace().next()).collect();
    assert!(list.contains(&"sync"), "the help was misread: {list:?}");
    let mut named = BTreeSet::new();
    // Binary formats show their banners (`virt-replica patch 1`), which are no commands.
    let shows_commands = |page: &Path| !page.starts_with("docs/formats") || page.ends_with("json.md");
    for (page, text) in pages().into_iter().filter(|(page, _)| shows_commands(page)) {
        for word in code(&text).iter().flat_map(|c| subcommands(c)) {
            assert!(list.contains(&word.as_str()), "{}: `virt-replica {word}` is no command", page.display());
            named.insert(word);
        }
    }
    for expected in ["sync", "plan", "points", "verify", "status", "doctor"] {
        assert!(named.contains(expected), "no page shows `virt-replica {expected}`");
    }
}

/// Exit codes stand in the README, in the help and in the code: the same ones.
#[test]
fn exit_codes_are_those_of_the_help() {
    let help = Command::new(env!("CARGO_BIN_EXE_virt-replica")).arg("--help").output().expect("the binary runs");
    let help = String::from_utf8(help.stdout).expect("help is text");
    let codes = help.split("Exit codes:").nth(1).expect("the help lists exit codes");
    let of_help: BTreeSet<u8> = codes
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(|n| n.parse().unwrap_or_else(|_| panic!("'{n}' is no exit code: the help was misread")))
        .collect();
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let table = readme.split("### Exit codes").nth(1).expect("the README lists exit codes");
    let of_readme: BTreeSet<u8> = table
        .lines()
        .take_while(|l| !l.starts_with("## "))
        .filter_map(|l| l.strip_prefix("| ")?.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(of_readme, of_help);
}

/// The words that were agreed on before the first line was written.
const WORDS: &str = "domain, guest, guest agent, disk, image, backing image, overlay, base, chain, freeze, quiesce, commit, \
    bitmap, block, cluster, extent, patch, source, target, agent, replica, recovery point, head, seal, abandon, prune, \
    generation, run, job, plan, reason, conflict, policy, RPO, lag, breach, failover, drill, failback, precopy, cutover, \
    settle, dead-man, journal, record, digest, root, change list, manifest, mode, pivot, pause, retire, commit pending";

#[test]
fn the_glossary_has_every_word_once() {
    let glossary = fs::read_to_string(root().join("docs/glossary.md")).unwrap();
    let heads = headings(&glossary);
    for word in WORDS.split(',').map(str::trim) {
        assert_eq!(heads.iter().filter(|h| *h == word).count(), 1, "the glossary has '{word}' not just once");
    }
    let unique: BTreeSet<&String> = heads.iter().collect();
    assert_eq!(unique.len(), heads.len(), "a heading stands twice in the glossary");
}

/// `policies/` as an operator would have it: owner and modes of a checkout are not what is obeyed.
fn installed_policies() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let mut found = Vec::new();
    files_below(&root().join("policies"), "yaml", &mut found);
    for path in found {
        let to = dir.path().join(path.strip_prefix(root().join("policies")).unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::set_permissions(to.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(&to, fs::read(&path).unwrap()).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644)).unwrap();
    }
    dir
}

/// `policies/` looks like `/etc/virt-replica`: what lies in a `policies.d` is a policy, all else a configuration.
#[test]
fn every_policy_file_is_read_by_the_code() {
    let mut found = Vec::new();
    let installed = installed_policies();
    files_below(installed.path(), "yaml", &mut found);
    let sample = Config::load(&installed.path().join("virt-replica.yaml"), true).unwrap();
    let (mut policies, mut configurations) = (0, 0);
    for path in found {
        let read = if path.ends_with(MAPPING_FILE) {
            // Every key of it: taking it apart makes a new one an error here.
            let Mapping { networks, machines, cpus, paths, macs, leave_out, images_max, images, without_disks } =
                Mapping::load(&path, true).unwrap();
            assert!(networks.len() > 3 && !machines.is_empty() && !cpus.is_empty() && !paths.is_empty());
            assert!(!leave_out.is_empty() && images_max.is_some());
            assert!(macs == MacPolicy::Keep && images.is_some() && !without_disks.is_empty());
            Ok(())
        } else if path.parent().is_some_and(|d| d.ends_with("policies.d")) {
            policies += 1;
            sample.policy(&path).map(drop)
        } else {
            configurations += 1;
            Config::load(&path, true).map(drop)
        };
        read.unwrap_or_else(|e| panic!("{}", e.chain()));
    }
    assert!(policies >= 6 && configurations >= 1, "{policies} policies, {configurations} configurations");
    // Their names are different, too: the directory as a whole is one that `policy check` accepts.
    assert_eq!(sample.policies(&installed.path().join("virt-replica.yaml")).unwrap().len(), policies);
}

/// The sample says that it has every key. Taking the structs apart by name makes a new key an error here.
#[test]
fn the_sample_has_every_key() {
    let installed = installed_policies();
    let sample = Config::load(&installed.path().join("virt-replica.yaml"), true).unwrap();
    let Config { targets, links, defaults, daemon } = sample;
    let TargetConfig { url, identity, ssh_config, known_hosts, create_store, runs_max, link } = targets["dr1"].clone();
    assert_eq!(url.to_string(), "ssh://replica@dr1.example.net/srv/virt-replica");
    assert!(targets["usb"].url.to_string() == "local:/mnt/usb/virt-replica" && !targets["usb"].create_store);
    assert!(create_store && identity.is_some() && ssh_config.is_some() && known_hosts.is_some() && runs_max.is_some());
    let LinkConfig { runs_max: _ } = links[&link.expect("the sample names a link")];
    let Defaults { overlay_dir, block_overlay_dir, capture } = defaults;
    assert!(overlay_dir.is_some() && block_overlay_dir.is_some() && capture.is_some());
    let DaemonConfig { runs_max: _, stall_timeout: _, stop_timeout: _ } = daemon;
    let text = fs::read_to_string(root().join("policies/virt-replica.yaml")).unwrap();
    for key in ["runs_max:", "stall_timeout:", "stop_timeout:"] {
        assert!(text.split("daemon:").nth(1).is_some_and(|d| d.contains(key)), "the sample has no {key}");
    }
}

/// Mistakes in policies, each with the message beside it; `VIRT_REPLICA_BLESS=1` writes the messages anew.
#[test]
fn every_mistake_is_said_in_the_recorded_words() {
    let mut found = Vec::new();
    files_below(&root().join("tests/fixtures/policies/invalid"), "yaml", &mut found);
    assert!(found.len() >= 25, "only {} mistakes", found.len());
    for path in found {
        let name = Path::new(path.file_name().unwrap());
        let text = fs::read_to_string(&path).unwrap();
        let e = Policy::parse(&text, name, &["dr1", "vault"]).err();
        let e = e.unwrap_or_else(|| panic!("{} is accepted", path.display()));
        let hint = match (e.hint_text(), e.advice()) {
            (Some(hint), _) => format!("hint: {hint}\n"),
            // Its words are the program's.
            (None, Some(advice)) => format!("advice: {}\n", serde_json::to_string(advice).unwrap()),
            (None, None) => String::new(),
        };
        let said = format!("error: {}\n{hint}", e.chain());
        let recorded = path.with_extension("txt");
        if std::env::var_os("VIRT_REPLICA_BLESS").is_some() {
            fs::write(&recorded, &said).unwrap();
        }
        assert_eq!(said, fs::read_to_string(&recorded).unwrap_or_default(), "{}", recorded.display());
    }
}

/// Each page has a row for every key of the table that the parser is held against, and for no other.
#[test]
fn the_references_of_policies_have_every_key() {
    for (page, table) in [("docs/policies.md", keys::KEYS), ("docs/target.md", keys::REPLICA_KEYS)] {
        let text = fs::read_to_string(root().join(page)).unwrap();
        let of_page: BTreeSet<&str> =
            text.lines().filter_map(|l| l.strip_prefix("| `")?.split_once("` | ")).map(|(key, _)| key).collect();
        let of_table: BTreeSet<&str> = table.iter().map(|k| k.path).collect();
        assert_eq!(of_page, of_table, "{page}");
        for key in table {
            let row = text.lines().find(|l| l.starts_with(&format!("| `{}` |", key.path))).unwrap();
            assert!(row.contains(key.about), "{page}: {row}\nshould say: {}", key.about);
            assert!(row.contains(key.default), "{page}: {row}\nshould give the default: {}", key.default);
        }
    }
}

/// The units start commands that there are, and give runs longer to end than the daemon gives them.
#[test]
fn the_units_fit_the_program() {
    let mut started = 0;
    for unit in ["virt-replica.service", "virt-replica-once.service"] {
        let text = fs::read_to_string(root().join("packaging").join(unit)).unwrap();
        for line in text.lines().filter_map(|l| l.strip_prefix("ExecStart").and_then(|l| l.split_once('='))) {
            let args: Vec<&str> = line.1.split_whitespace().skip(1).chain(["--help"]).collect();
            let output = Command::new(env!("CARGO_BIN_EXE_virt-replica")).args(&args).output().expect("it runs");
            assert!(output.status.success(), "{unit}: {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            started += 1;
        }
        let stop = text.lines().find_map(|l| l.strip_prefix("TimeoutStopSec=")?.strip_suffix("min")?.parse().ok());
        let minutes: u64 = stop.unwrap_or_else(|| panic!("{unit} has no TimeoutStopSec"));
        assert!(minutes * 60 > DaemonConfig::default().stop_timeout.as_secs() + 60, "{unit}");
        assert!(text.lines().any(|l| l == "KillMode=process"), "{unit} would kill dead-men");
    }
    assert_eq!(started, 2);
}

#[test]
fn the_helpers_of_this_test_see_what_they_should() {
    let text = "# A `b` c-d, e!\n[x](a.md#b) `[no](link)` [y](../c)\n```\nvirt-replica -q sync d\n[z](no)\n/lib/virt-replica unless\n```\n`a`";
    assert_eq!(links(text), [(2, "a.md#b".to_owned()), (2, "../c".to_owned())]);
    assert_eq!(headings(text).iter().map(|h| anchor(h)).collect::<Vec<_>>(), ["a-b-c-d-e"]);
    assert_eq!(code(text).iter().flat_map(|c| subcommands(c)).collect::<Vec<_>>(), ["sync"]);
    assert_eq!(sources_named("`src/a/b_c.rs`, (src/d.rs). src/no src/e.rs."), ["src/a/b_c.rs", "src/d.rs", "src/e.rs"]);
    assert_eq!(normal(Path::new("docs/a/../b.md")), Some("docs/b.md".into()));
    assert_eq!(normal(Path::new("../b.md")), None);
}
