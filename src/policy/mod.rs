//! Policies: which domains go where, when, and what is kept. Pure: text in, values out; the time is always an argument.
//!
//! One policy is one file of `policies.d`. A key that is not known is an error, and so is one that stands twice: there
//! is nothing in a policy that nobody acts on. All keys: [`keys::KEYS`], docs/policies.md.

pub mod admission;
pub mod bandwidth;
mod file;
pub mod keys;
mod render;
pub mod replicas;
pub mod retry;
pub mod schedule;
#[cfg(test)]
mod schedule_tests;
pub mod select;
#[cfg(test)]
mod simulation_tests;
#[cfg(test)]
mod tests;
pub mod window;

use crate::error::{Error, Kind, Result, advice};
use crate::hook::Hook;
use crate::name::DiskName;
use crate::patch::Compression;
use crate::retention::Keep;
use crate::units;
use crate::yaml::{self, Spanned, mistake};
use bandwidth::Bandwidth;
use file::{PolicyFile, cron};
use jiff::tz::TimeZone;
use replicas::ReplicaPolicyFile;
use retry::Retry;
use schedule::{Schedule, When};
use select::{SeenDomain, Selector};
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use window::{Day, Window};

/// A policy that was read and holds together.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Where it was read.
    pub file: PathBuf,
    /// Name of the policy. No other policy may have it.
    pub name: String,
    /// Domains that the policy selects.
    pub domains: Vec<Selector>,
    /// Domains that the policy leaves out although `domains` selects them.
    pub exclude: Vec<Selector>,
    /// Disks to leave out, by the domains they belong to.
    pub exclude_disks: BTreeMap<Selector, Vec<DiskName>>,
    /// Of a target: the store on this host whose replicas it means. Then it has no runs, and `domains` are replicas.
    pub store: Option<PathBuf>,
    /// Names of the configuration, each once.
    pub targets: Vec<String>,
    /// When runs begin, and when none may.
    pub timing: Timing,
    /// Allowed age of the head. `None`: the daemon watches no age.
    pub rpo: Option<Duration>,
    /// Points to keep on the target. `None`: the daemon removes none.
    pub keep: Option<Keep>,
    /// `None`: as the configuration has it.
    pub overlay_dir: Option<PathBuf>,
    /// Largest size and age of an overlay.
    pub overlay: Overlay,
    /// Bytes to keep free where overlays lie; 256 MiB without the key.
    pub min_free_source_bytes: u64,
    /// How long a commit may take to become ready; one hour without the key. Afterwards the next run ends it.
    pub ready_timeout: Duration,
    /// Graphics passwords travel with the definition.
    pub with_secrets: bool,
    /// One of [`CAPTURES`]; `None`: as the configuration has it.
    pub capture: Option<String>,
    /// Whether, how often and for how long the guest agent holds the guest's file systems.
    pub quiesce: Quiesce,
    /// How much of a disk a run compares although its dirty bitmap says clean.
    pub audit: Audit,
    /// Rates at which runs may send.
    pub bandwidth: Bandwidth,
    /// How content is compressed before it is sent.
    pub compression: Compression,
    /// When points are read again on the target, and when its whole store is.
    pub verify: Option<Timed>,
    /// When all points are read again on the target. `None`: never by this policy.
    pub scrub: Option<Timed>,
    /// When replicas of this host's store are booted, and what proves that they work.
    pub drill: Option<Drill>,
    /// How long to wait after a failure.
    pub retry: Retry,
    /// Programs that the daemon or a run starts at certain moments.
    pub hooks: Hooks,
}

/// Ways to make the disks of a running domain stand still, as `sync --capture` has them.
pub const CAPTURES: &[&str] = &["overlay", "backup", "auto"];

/// Whether the guest agent is asked, as `sync --quiesce` has it.
pub const QUIESCE: &[&str] = &["no", "try", "require"];

/// Consistent points, as `sync` has them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quiesce {
    /// One of [`QUIESCE`].
    #[serde(deserialize_with = "quiesce_wish")]
    pub wish: String,
    /// At least 1.
    #[serde(deserialize_with = "at_least_one")]
    pub every: u32,
    /// 2 s to a minute.
    #[serde(deserialize_with = "freeze_budget")]
    pub budget: Duration,
}

impl Default for Quiesce {
    fn default() -> Self {
        Quiesce { wish: "no".to_owned(), every: 1, budget: Duration::from_secs(10) }
    }
}

fn one_of<'de, D: Deserializer<'de>>(de: D, words: &[&str]) -> Result<String, D::Error> {
    let text = String::deserialize(de)?;
    match words.contains(&text.as_str()) {
        true => Ok(text),
        false => Err(serde::de::Error::custom(format!("'{text}' is none of: {}", words.join(", ")))),
    }
}

fn capture<'de, D: Deserializer<'de>>(de: D) -> Result<Option<String>, D::Error> {
    one_of(de, CAPTURES).map(Some)
}

fn quiesce_wish<'de, D: Deserializer<'de>>(de: D) -> Result<String, D::Error> {
    one_of(de, QUIESCE)
}

fn at_least_one<'de, D: Deserializer<'de>>(de: D) -> Result<u32, D::Error> {
    match u32::deserialize(de)? {
        0 => Err(serde::de::Error::custom("it has to be at least 1, which is every run")),
        n => Ok(n),
    }
}

fn freeze_budget<'de, D: Deserializer<'de>>(de: D) -> Result<Duration, D::Error> {
    match duration(de)? {
        d if (2..=60).contains(&d.as_secs()) => Ok(d),
        _ => Err(serde::de::Error::custom("a guest is held for 2s to 1m")),
    }
}

/// When runs begin, as it is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// Time between two runs, on a grid that never moves. `None`: `cron` decides, or there are no runs.
    pub every: Option<Duration>,
    /// Pattern of five fields for the times of runs. `None`: `every` decides, or there are no runs.
    pub cron: Option<String>,
    /// Time zone of `cron` and `blackout`. `None`: the host's.
    pub timezone: Option<TimeZone>,
    /// Span over which the runs of different domains are spread. Without the key: all of `every`, or none with
    /// `cron`.
    pub jitter: Duration,
    /// Windows in which no run begins. A run that is under way goes on.
    pub blackout: Vec<Window>,
}

/// The check of dirty bitmaps, as `sync` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// Number of runs in which the audit has compared a whole disk once; 0 turns the audit off.
    pub runs: u32,
    /// Most bytes to read for the audit, for each disk and run.
    #[serde(deserialize_with = "bytes")]
    pub bytes: u64,
    /// Most time for the audit, for each disk and run.
    #[serde(deserialize_with = "duration")]
    pub time: Duration,
}

impl Default for Audit {
    fn default() -> Self {
        Audit { runs: 100, bytes: 1 << 30, time: Duration::from_secs(5) }
    }
}

/// How far an overlay may go before its run is cut short and the overlay committed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overlay {
    /// Largest size of one overlay, in bytes. `None`: no limit.
    pub bytes_max: Option<u64>,
    /// Longest time since the freeze. `None`: no limit.
    pub age_max: Option<Duration>,
}

/// A schedule beside that of the runs; one of both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Timed {
    /// Once in every such span, on a grid that never moves.
    Every(Duration),
    /// At the times of this pattern of five fields.
    Cron(String),
}

/// A drill of every replica that is meant, as `drill` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drill {
    /// When drills begin.
    pub when: Timed,
    /// Evidence; at least one.
    pub probes: Vec<String>,
    /// How long the evidence may take.
    pub within: Duration,
}

/// Programs that are run; all may be left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hooks {
    /// Program to start before the disks are frozen. If it fails, the run makes no point. `None`: no program.
    #[serde(deserialize_with = "hook")]
    pub before_freeze: Option<Hook>,
    /// Program to start after the freeze, and whenever `before_freeze` was started. `None`: no program.
    #[serde(deserialize_with = "hook")]
    pub after_freeze: Option<Hook>,
    /// Program to start after every run. `None`: no program.
    #[serde(deserialize_with = "hook")]
    pub after_run: Option<Hook>,
    /// Program to start after a run that made no point, or a check that failed. `None`: no program.
    #[serde(deserialize_with = "hook")]
    pub on_failure: Option<Hook>,
    /// Program to start when the lag exceeds the RPO, and when it no longer does. `None`: no program.
    #[serde(deserialize_with = "hook")]
    pub on_breach: Option<Hook>,
}

impl Hooks {
    /// Each with its name, in the order in which they are run.
    pub fn all(&self) -> [(&'static str, Option<&Hook>); 5] {
        [
            ("before_freeze", self.before_freeze.as_ref()),
            ("after_freeze", self.after_freeze.as_ref()),
            ("after_run", self.after_run.as_ref()),
            ("on_failure", self.on_failure.as_ref()),
            ("on_breach", self.on_breach.as_ref()),
        ]
    }
}

fn hook<'de, D: Deserializer<'de>>(de: D) -> Result<Option<Hook>, D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct HookFile {
        #[serde(deserialize_with = "command")]
        command: Vec<String>,
        #[serde(default = "one_minute", deserialize_with = "duration")]
        timeout: Duration,
    }
    let file: Option<HookFile> = Option::deserialize(de)?;
    Ok(file.map(|f| Hook { command: f.command, timeout: f.timeout }))
}

/// Days of a window; every day without the key.
#[derive(Deserialize)]
struct Days(Vec<Day>);

impl Default for Days {
    fn default() -> Self {
        Days(Day::ALL.to_vec())
    }
}

fn one_minute() -> Duration {
    Duration::from_secs(60)
}

fn one_hour() -> Duration {
    Duration::from_secs(3600)
}

fn min_free() -> u64 {
    256 << 20
}

fn duration<'de, D: Deserializer<'de>>(de: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(de)?;
    let wrong = |why: String| serde::de::Error::custom(format!("'{text}' is no duration: {why}"));
    let d = units::parse_age(&text).map_err(wrong)?;
    match d {
        d if d.subsec_nanos() != 0 => Err(wrong("it is counted in whole seconds".to_owned())),
        d if d.is_zero() => Err(wrong("leave the key out instead".to_owned())),
        d if d > Duration::from_secs(3660 * 86_400) => Err(wrong("it is longer than ten years".to_owned())),
        d => Ok(d),
    }
}

/// Zero is a duration too where it switches something off.
fn jitter<'de, D: Deserializer<'de>>(de: D) -> Result<Option<Spanned<Duration>>, D::Error> {
    #[derive(Deserialize)]
    struct Zero(#[serde(deserialize_with = "zero_too")] Duration);
    let found: Option<Spanned<Zero>> = Option::deserialize(de)?;
    Ok(found.map(|z| Spanned::new(z.value.0, z.referenced, z.defined)))
}

fn zero_too<'de, D: Deserializer<'de>>(de: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(de)?;
    let d = units::parse_age(&text);
    let d = d.map_err(|why| serde::de::Error::custom(format!("'{text}' is no duration: {why}")))?;
    if d.subsec_nanos() == 0 { Ok(d) } else { Err(serde::de::Error::custom("it is counted in whole seconds")) }
}

fn bytes<'de, D: Deserializer<'de>>(de: D) -> Result<u64, D::Error> {
    let text = String::deserialize(de)?;
    units::parse_bytes(&text).map_err(|why| serde::de::Error::custom(format!("'{text}' is no size: {why}")))
}

fn command<'de, D: Deserializer<'de>>(de: D) -> Result<Vec<String>, D::Error> {
    let words: Vec<String> = Vec::deserialize(de)?;
    match words.first() {
        None => Err(serde::de::Error::custom("the command is empty: [/path/to/program, argument]")),
        Some(program) if !program.starts_with('/') => Err(serde::de::Error::custom(format!(
            "'{program}' is not an absolute path: a daemon has no PATH to look in"
        ))),
        Some(_) => Ok(words),
    }
}

impl Policy {
    /// Reads a policy. `targets`: the names the configuration knows; `path`: for errors. [`Kind::Config`] says file,
    /// line and column, and shows the line.
    pub fn parse(text: &str, path: &Path, targets: &[&str]) -> Result<Policy> {
        let nothing = || mistake("the file has no policy in it", None, text, path).advise(advice::Host::PolicySchema);
        // Which of the two kinds it is. What is no mapping at all is told so by the parser of the first.
        let names: Option<BTreeMap<String, IgnoredAny>> = yaml::parse(text, path).unwrap_or_default();
        let policy = match names.is_some_and(|n| n.contains_key("replicas")) {
            true => yaml::parse::<Option<ReplicaPolicyFile>>(text, path)?.ok_or_else(nothing)?.check(path),
            false => yaml::parse::<Option<PolicyFile>>(text, path)?.ok_or_else(nothing)?.check(path, targets),
        };
        policy.map_err(|w| {
            let e = mistake(&w.what, Some(w.at), text, path);
            match w.hint {
                Some(hint) => e.hint(hint),
                None => e,
            }
        })
    }

    /// One of this file that says nothing yet: what keys that are left out mean.
    fn of_file(path: &Path) -> Policy {
        Policy {
            file: path.to_owned(),
            name: String::new(),
            domains: Vec::new(),
            exclude: Vec::new(),
            exclude_disks: BTreeMap::new(),
            store: None,
            targets: Vec::new(),
            timing: Timing { every: None, cron: None, timezone: None, jitter: Duration::ZERO, blackout: Vec::new() },
            rpo: None,
            keep: None,
            overlay_dir: None,
            overlay: Overlay::default(),
            min_free_source_bytes: min_free(),
            ready_timeout: one_hour(),
            with_secrets: false,
            capture: None,
            quiesce: Quiesce::default(),
            audit: Audit::default(),
            bandwidth: Bandwidth::default(),
            compression: Compression::default(),
            verify: None,
            scrub: None,
            drill: None,
            retry: Retry::default(),
            hooks: Hooks::default(),
        }
    }

    /// Whether it means this domain.
    pub fn means(&self, domain: &SeenDomain) -> bool {
        self.domains.iter().any(|s| s.means(domain)) && !self.exclude.iter().any(|s| s.means(domain))
    }

    /// The disks of this domain that are left out.
    pub fn excluded_disks(&self, domain: &SeenDomain) -> Vec<&DiskName> {
        let mut disks: Vec<&DiskName> =
            self.exclude_disks.iter().filter(|(s, _)| s.means(domain)).flat_map(|(_, disks)| disks).collect();
        disks.sort();
        disks.dedup();
        disks
    }

    /// The schedule of the runs; `local` is this host's time zone.
    pub fn schedule(&self, local: &TimeZone) -> Schedule {
        let when = match (&self.timing.every, &self.timing.cron) {
            (Some(every), _) => When::Every(*every),
            (None, Some(text)) => When::Cron(Box::new(cron(text).expect("it was parsed when the policy was read"))),
            // Of a target: the sources run.
            (None, None) => When::Never,
        };
        self.scheduled(when, self.timing.jitter, local)
    }

    /// A schedule beside it. Spread over all of `every`: nobody waits for a check.
    pub fn schedule_of(&self, timed: &Timed, local: &TimeZone) -> Schedule {
        match timed {
            Timed::Every(every) => self.scheduled(When::Every(*every), *every, local),
            Timed::Cron(text) => {
                let cron = cron(text).expect("it was parsed when the policy was read");
                self.scheduled(When::Cron(Box::new(cron)), Duration::ZERO, local)
            }
        }
    }

    fn scheduled(&self, when: When, jitter: Duration, local: &TimeZone) -> Schedule {
        Schedule { when, jitter, blackout: self.timing.blackout.clone(), zone: self.zone(local) }
    }

    /// The time zone of everything in it that is a time of day.
    pub fn zone(&self, local: &TimeZone) -> TimeZone {
        self.timing.timezone.clone().unwrap_or_else(|| local.clone())
    }
}

/// Policies with one name cannot be told apart in a report.
pub fn no_name_twice(policies: &[Policy]) -> Result<()> {
    let mut seen: BTreeMap<&str, &Path> = BTreeMap::new();
    for policy in policies {
        if let Some(first) = seen.insert(&policy.name, &policy.file) {
            let what =
                format!("two policies are called '{}': {} and {}", policy.name, first.display(), policy.file.display());
            return Err(Error::new(Kind::Config, what).hint("give one of them another name"));
        }
    }
    Ok(())
}
