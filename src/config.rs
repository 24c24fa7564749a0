//! This host's configuration: `/etc/virt-replica/virt-replica.yaml` (named targets, defaults, the daemon), and where
//! its policies are read.
//!
//! ```yaml
//! targets:
//!   dr1:
//!     url: ssh://replica@dr1.example.net/srv/virt-replica
//!     identity: /etc/virt-replica/ssh/id_ed25519    # optional: only this key is offered
//!     ssh_config: /etc/virt-replica/ssh/config      # optional: instead of the user's own
//!     known_hosts: /etc/virt-replica/ssh/known_hosts
//!     create_store: true                            # the first run creates the store there
//!     runs_max: 2                                   # runs to this target at a time (the daemon's)
//!     link: wan                                     # the link that leads there
//! links:
//!   wan: {runs_max: 3}                # runs over this link at a time, whatever their targets
//! defaults:
//!   overlay_dir: /srv/overlays          # overlays of all disks; without it they lie beside their images
//!   block_overlay_dir: /srv/overlays    # overlays of disks that are block devices
//!   capture: auto                       # overlay (without it), backup, or auto
//! daemon:
//!   runs_max: 2                         # runs of this host at a time
//!   stall_timeout: 15m                  # a run without a sign of life for so long is ended
//!   stop_timeout: 2m                    # time that runs have to end in order when the daemon stops
//! ```
//!
//! Policies lie beside it in `policies.d`, one in each file: [`crate::policy`].
//!
//! A key that is not known is an error, and so is one that stands twice: a misspelt setting that does nothing is worse
//! than none. Errors name file, line and column and show the line.

use crate::error::{Error, Kind, Result};
use crate::policy::{self, Policy};
use crate::replicate::plan::capture_choice::CaptureWish;
use crate::transport::target::TargetUrl;
use crate::trust;
use crate::units;
use crate::yaml::{self, closest};
use serde::Deserialize;
use serde::de::Error as _;
use std::collections::BTreeMap;
use std::io::Read;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the file is looked for unless another is named.
pub const CONFIG_FILE: &str = "/etc/virt-replica/virt-replica.yaml";

/// Directory of the policies, beside the configuration.
const POLICY_DIR: &str = "policies.d";

/// Largest file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// The configuration file, `/etc/virt-replica/virt-replica.yaml` by default. Every key is optional, and an unknown
/// key is an error.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Targets by the name that commands and policies use.
    pub targets: BTreeMap<String, TargetConfig>,
    /// Network links by name. Every `link` of a target must name one of them.
    pub links: BTreeMap<String, LinkConfig>,
    /// Values that commands use if no option gives them.
    pub defaults: Defaults,
    /// Limits and timeouts of the daemon.
    pub daemon: DaemonConfig,
}

/// A target with a name.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// Address of the store: an ssh URL, or a directory of this host.
    #[serde(deserialize_with = "target_url")]
    pub url: TargetUrl,
    /// Private key for ssh, the only one that is offered. `None`: ssh chooses by its configuration.
    #[serde(default)]
    pub identity: Option<PathBuf>,
    /// Configuration file that ssh reads instead of the user's and the system's. `None`: ssh reads those.
    #[serde(default)]
    pub ssh_config: Option<PathBuf>,
    /// File with the host keys that ssh trusts. `None`: the files that ssh's configuration names.
    #[serde(default)]
    pub known_hosts: Option<PathBuf>,
    /// The first run to it creates the store if there is none.
    #[serde(default)]
    pub create_store: bool,
    /// Runs that the daemon has under way to it at a time; `None`: as many as it may have at all.
    #[serde(default)]
    pub runs_max: Option<NonZeroU32>,
    /// The link that leads to it, by its name in [`Config::links`].
    #[serde(default)]
    pub link: Option<String>,
}

/// A link that several targets may share.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkConfig {
    /// Runs that the daemon has under way over it at a time.
    pub runs_max: NonZeroU32,
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

/// How the daemon works.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DaemonConfig {
    /// Runs under way at a time, whatever their targets.
    pub runs_max: NonZeroU32,
    /// A run that shows no step and no progress for so long is ended, and its domain is put right.
    #[serde(deserialize_with = "duration")]
    pub stall_timeout: Duration,
    /// How long runs may take to end in order when the daemon stops.
    #[serde(deserialize_with = "duration")]
    pub stop_timeout: Duration,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        Self {
            runs_max: NonZeroU32::new(2).expect("two is not zero"),
            stall_timeout: Duration::from_secs(15 * 60),
            stop_timeout: Duration::from_secs(120),
        }
    }
}

fn duration<'de, D: serde::Deserializer<'de>>(de: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(de)?;
    match units::parse_age(&text) {
        Ok(d) if d.is_zero() => Err(D::Error::custom("it has to be longer than nothing")),
        Ok(d) => Ok(d),
        Err(why) => Err(D::Error::custom(format!("'{text}' is no duration: {why}"))),
    }
}

impl Config {
    /// Reads `path`. A file that is not there is an empty one, unless it was `named` by the operator.
    pub fn load(path: &Path, named: bool) -> Result<Config> {
        match read(path)? {
            Some(text) => Config::parse(&text, path),
            None if !named => Ok(Config::default()),
            None => Err(Error::new(Kind::Config, "the configuration is not there").path(path)),
        }
    }

    /// Parses a configuration; `path` is for its errors only.
    pub fn parse(text: &str, path: &Path) -> Result<Config> {
        // A file of nothing but comments is YAML's null.
        let config: Config = yaml::parse::<Option<Config>>(text, path)?.unwrap_or_default();
        for (name, target) in &config.targets {
            if let Some(link) = target.link.as_ref().filter(|l| !config.links.contains_key(*l)) {
                let known: Vec<&str> = config.links.keys().map(String::as_str).collect();
                let e = Error::new(Kind::Config, format!("target '{name}': no link is called '{link}'")).path(path);
                return Err(e.hint(match closest(link, &known) {
                    Some(meant) => format!("did you mean '{meant}'?"),
                    None => "name it under `links:`, as `wan: {runs_max: 2}`".to_owned(),
                }));
            }
        }
        Ok(config)
    }

    /// Reads one policy of this configuration.
    pub fn policy(&self, path: &Path) -> Result<Policy> {
        let text = read(path)?.ok_or_else(|| Error::new(Kind::Config, "the policy is not there").path(path))?;
        let targets: Vec<&str> = self.targets.keys().map(String::as_str).collect();
        Policy::parse(&text, path, &targets)
    }

    /// Reads all policies beside the configuration at `path`, by the names of their files. The first that is wrong is
    /// the error.
    pub fn policies(&self, path: &Path) -> Result<Vec<Policy>> {
        let policies: Vec<Policy> = policy_files(path)?.iter().map(|p| self.policy(p)).collect::<Result<_>>()?;
        policy::no_name_twice(&policies)?;
        Ok(policies)
    }

    /// The URL of each target by its name.
    pub fn urls(&self) -> BTreeMap<String, String> {
        self.targets.iter().map(|(name, t)| (name.clone(), t.url.to_string())).collect()
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

/// A file's text; `None`: there is no such file.
fn read(path: &Path) -> Result<Option<String>> {
    trust::check(path)?;
    let mut text = String::new();
    match std::fs::File::open(path).and_then(|f| f.take(FILE_MAX + 1).read_to_string(&mut text)) {
        Ok(read) if read as u64 <= FILE_MAX => Ok(Some(text)),
        Ok(_) => Err(Error::new(Kind::Config, "the file is larger than 1 MiB").path(path)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::new(Kind::Config, "cannot read the configuration").path(path).source(e)),
    }
}

/// The policies beside the configuration at `path`, sorted. No directory: none. What an editor leaves behind is none,
/// but a file that was surely meant as one and is not called so is an error.
pub fn policy_files(path: &Path) -> Result<Vec<PathBuf>> {
    let dir = path.parent().unwrap_or(Path::new(".")).join(POLICY_DIR);
    let fail = |e| Error::new(Kind::Config, "cannot read the directory of policies").path(&dir).source(e);
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fail(e)),
    };
    // A user who may put a file there gives orders, too.
    trust::check(&dir)?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(fail)?.path();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        match path.extension().map(|e| e.to_string_lossy().into_owned()).as_deref() {
            Some("yaml") if !hidden => files.push(path),
            Some("yml") if !hidden => {
                let e = Error::new(Kind::Config, "a policy's file ends in .yaml; this one would not be read");
                return Err(e.path(path));
            }
            _ => {}
        }
    }
    files.sort();
    Ok(files)
}

fn target_url<'de, D: serde::Deserializer<'de>>(de: D) -> Result<TargetUrl, D::Error> {
    let text = String::deserialize(de)?;
    TargetUrl::parse(&text).map_err(|e| D::Error::custom(e.what()))
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
            (
                "retention: 7\n",
                &["vr.yaml:1:1: unknown key `retention`"],
                "known here: targets, links, defaults, daemon",
            ),
            ("targets:\n  dr1: {identity: /k}\n", &["the key `url` is missing", "vr.yaml:2:"], ""),
            ("targets:\n  dr1:\n    url: dr1:/srv\n", &["vr.yaml:3:", "'dr1:/srv' is not a target"], ""),
            ("targets:\n  a: {url: /x}\n  a: {url: /y}\n", &["vr.yaml:3:3: the key `a` stands twice"], ""),
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
}
