//! This host's configuration file, `/etc/virt-replica/virt-replica.yaml`: named targets, and defaults of the commands.
//!
//! ```yaml
//! targets:
//!   dr1:
//!     url: ssh://replica@dr1.example.net/srv/virt-replica
//!     identity: /etc/virt-replica/ssh/id_ed25519    # optional: only this key is offered
//!     ssh_config: /etc/virt-replica/ssh/config      # optional: instead of the user's own
//!     known_hosts: /etc/virt-replica/ssh/known_hosts
//! defaults:
//!   overlay_dir: /srv/overlays          # overlays of all disks; without it they lie beside their images
//!   block_overlay_dir: /srv/overlays    # overlays of disks that are block devices
//!   capture: auto                       # overlay (without it), backup, or auto
//! ```
//!
//! A key that is not known is an error, and so is one that stands twice: a misspelt setting that does nothing is worse
//! than none. Errors name file, line and column and show the line.

use crate::error::{Error, Kind, Result};
use crate::replicate::choice::CaptureWish;
use crate::transport::target::TargetUrl;
use serde::Deserialize;
use serde::de::Error as _;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where the file is looked for unless another is named.
pub const CONFIG_FILE: &str = "/etc/virt-replica/virt-replica.yaml";

/// Largest file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub targets: BTreeMap<String, TargetConfig>,
    pub defaults: Defaults,
}

/// A target with a name.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    #[serde(deserialize_with = "target_url")]
    pub url: TargetUrl,
    #[serde(default)]
    pub identity: Option<PathBuf>,
    #[serde(default)]
    pub ssh_config: Option<PathBuf>,
    #[serde(default)]
    pub known_hosts: Option<PathBuf>,
}

/// What a command does where its options say nothing.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// Directory for the overlays of all disks; `None`: beside their images.
    pub overlay_dir: Option<PathBuf>,
    /// Directory for the overlays of block devices, which have no place beside them.
    pub block_overlay_dir: Option<PathBuf>,
    /// How the disks of a running domain are made to stand still; `None`: by overlay.
    pub capture: Option<CaptureWish>,
}

impl Config {
    /// Reads `path`. A file that is not there is an empty one, unless it was `named` by the operator.
    pub fn load(path: &Path, named: bool) -> Result<Config> {
        let mut text = String::new();
        match std::fs::File::open(path).and_then(|f| f.take(FILE_MAX + 1).read_to_string(&mut text)) {
            Ok(read) if read as u64 <= FILE_MAX => Config::parse(&text, path),
            Ok(_) => Err(Error::new(Kind::Config, "the configuration is larger than 1 MiB").path(path)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !named => Ok(Config::default()),
            Err(e) => Err(Error::new(Kind::Config, "cannot read the configuration").path(path).source(e)),
        }
    }

    /// Parses a configuration; `path` is for its errors only.
    pub fn parse(text: &str, path: &Path) -> Result<Config> {
        // A file of nothing but comments is YAML's null.
        let parsed: Result<Option<Config>, _> = serde_yaml::from_str(text);
        parsed.map(Option::unwrap_or_default).map_err(|e| explain(&e, text, path))
    }

    /// The target of this name. [`Kind::NotFound`] lists the names there are.
    pub fn target(&self, name: &str) -> Result<&TargetConfig> {
        if let Some(target) = self.targets.get(name) {
            return Ok(target);
        }
        let error = Error::new(Kind::NotFound, format!("no target is called '{name}'"));
        let known: Vec<&str> = self.targets.keys().map(String::as_str).collect();
        Err(match (known.as_slice(), closest(name, &known)) {
            ([], _) => error.hint(
                "no target is configured: write the URL (ssh://[user@]host[:port][/root]), or name it under `targets:` in the configuration",
            ),
            (_, Some(meant)) => error.hint(format!("did you mean '{meant}'? Known targets: {}", known.join(", "))),
            (_, None) => error.hint(format!("known targets: {}", known.join(", "))),
        })
    }
}

fn target_url<'de, D: serde::Deserializer<'de>>(de: D) -> Result<TargetUrl, D::Error> {
    let text = String::deserialize(de)?;
    TargetUrl::parse(&text).map_err(|e| D::Error::custom(e.what()))
}

/// A parser's error as ours: where, the line itself, and what was probably meant.
fn explain(error: &serde_yaml::Error, text: &str, path: &Path) -> Error {
    let plain = error.without_snippet();
    let mut hint = None;
    let what = match plain {
        serde_yaml::Error::SerdeUnknownField { field, expected, .. } => {
            hint = Some(match closest(field, expected) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("known here: {}", expected.join(", ")),
            });
            format!("unknown key `{}`", crate::error::printable(field, 80))
        }
        serde_yaml::Error::SerdeMissingField { field, .. } => format!("the key `{field}` is missing here"),
        other => first_line(&other.to_string()),
    };
    let place = match plain.location().filter(|l| l.line() > 0) {
        Some(l) => {
            let line = text.lines().nth(l.line() as usize - 1).unwrap_or_default();
            let column = (l.column() as usize).max(1);
            let shown: String = line.chars().take(160).map(|c| if c.is_control() { ' ' } else { c }).collect();
            let caret = format!("{}^", " ".repeat((column - 1).min(160)));
            (format!("{}:{}:{column}", path.display(), l.line()), format!("\n    {shown}\n    {caret}"))
        }
        None => (path.display().to_string(), String::new()),
    };
    let e = Error::new(Kind::Config, format!("{}: {what}{}", place.0, place.1));
    match hint {
        Some(hint) => e.hint(hint),
        None => e,
    }
}

/// The parser appends the place to its sentences; ours stands in front.
fn first_line(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    line.rsplit_once(" at line ").map_or(line, |(sentence, _)| sentence).to_owned()
}

/// The word that was probably meant: the nearest within a third of its letters.
fn closest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = |candidate: &&str| edits(word, candidate);
    known.iter().copied().min_by_key(near).filter(|k| edits(word, k) <= k.chars().count().div_ceil(3))
}

/// Levenshtein's distance: insertions, deletions and replacements of letters that turn `a` into `b`.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config> {
        Config::parse(text, Path::new("vr.yaml"))
    }

    #[test]
    fn targets_have_names_and_all_else_is_optional() {
        let text = "targets:\n  dr1:\n    url: ssh://root@dr1:2222/srv/vr\n    identity: /k\n  usb: {url: /mnt/usb}\n";
        let config = parse(text).unwrap();
        assert_eq!(config.target("dr1").unwrap().identity.as_deref(), Some(Path::new("/k")));
        assert_eq!(config.target("usb").unwrap().url.to_string(), "local:/mnt/usb");
        assert_eq!(config.defaults, Defaults::default());
        for nothing in ["", "# only a comment\n", "{}", "targets: {}"] {
            assert_eq!(parse(nothing).unwrap(), Config::default(), "{nothing:?}");
        }
    }

    /// Each mistake with the words that must be in the message: where it is, what it is, the line, the way out.
    #[test]
    fn mistakes_are_shown_where_they_stand() {
        let mistakes: &[(&str, &[&str], &str)] = &[
            (
                "targets:\n  dr1:\n    url: ssh://dr1\n    identiy: /k\n",
                &["vr.yaml:4:5: unknown key `identiy`", "\n        identiy: /k\n        ^"],
                "did you mean `identity`?",
            ),
            ("retention: 7\n", &["vr.yaml:1:1: unknown key `retention`"], "known here: targets, defaults"),
            ("targets:\n  dr1: {identity: /k}\n", &["the key `url` is missing", "vr.yaml:2:"], ""),
            ("targets:\n  dr1:\n    url: dr1:/srv\n", &["vr.yaml:3:", "'dr1:/srv' is not a target"], ""),
            ("targets:\n  a: {url: /x}\n  a: {url: /y}\n", &["vr.yaml:3:3: ", "uplicate"], ""),
            ("targets: [\n", &["vr.yaml:"], ""),
        ];
        for (text, words, hint) in mistakes {
            let e = parse(text).unwrap_err();
            assert_eq!(e.kind(), Kind::Config);
            for word in *words {
                assert!(e.to_string().contains(word), "{text:?} gives {e}");
            }
            assert_eq!(e.hint_text().unwrap_or_default(), *hint, "{text:?}");
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let config = parse("targets:\n  dr1: {url: /a}\n  vault: {url: /b}\n").unwrap();
        let hint = |name: &str| config.target(name).unwrap_err().hint_text().unwrap().to_owned();
        assert_eq!(hint("valt"), "did you mean 'vault'? Known targets: dr1, vault");
        assert_eq!(hint("elsewhere"), "known targets: dr1, vault");
        assert_eq!(config.target("x").unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn only_a_file_the_operator_named_must_be_there() {
        let nowhere = Path::new("/nonexistent/virt-replica.yaml");
        assert_eq!(Config::load(nowhere, false).unwrap(), Config::default());
        assert_eq!(Config::load(nowhere, true).unwrap_err().kind(), Kind::Config);
    }

    #[test]
    fn distance_counts_letters() {
        for (a, b, n) in [("", "abc", 3), ("kitten", "sitting", 3), ("url", "url", 0), ("ulr", "url", 2)] {
            assert_eq!((edits(a, b), edits(b, a)), (n, n), "{a} {b}");
        }
    }
}
