//! Policies: which domains go where, when, and what is kept. Pure: text in, values out; the time is always an argument.
//!
//! One policy is one file of `policies.d`. A key that is not known is an error, and so is one that stands twice: there is
//! nothing in a policy that nobody acts on. All keys: [`keys::KEYS`], docs/policies.md.

pub mod admission;
pub mod keys;
mod render;
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

use crate::error::{Error, Kind, Result};
use crate::name::DiskName;
use crate::retention::Keep;
use crate::units;
use crate::yaml::{self, Place, Spanned, closest, mistake};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use retry::Retry;
use schedule::{Schedule, When};
use select::{SeenDomain, Selector};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use window::Window;

/// A policy that was read and holds together.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Where it was read.
    pub file: PathBuf,
    pub name: String,
    pub domains: Vec<Selector>,
    pub exclude: Vec<Selector>,
    pub exclude_disks: BTreeMap<Selector, Vec<DiskName>>,
    /// Names of the configuration, each once.
    pub targets: Vec<String>,
    pub timing: Timing,
    pub rpo: Option<Duration>,
    pub keep: Option<Keep>,
    /// `None`: as the configuration has it.
    pub overlay_dir: Option<PathBuf>,
    pub min_free_source_bytes: u64,
    pub ready_timeout: Duration,
    pub with_secrets: bool,
    /// One of [`CAPTURES`]; `None`: as the configuration has it.
    pub capture: Option<String>,
    pub quiesce: Quiesce,
    pub audit: Audit,
    pub retry: Retry,
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
    pub every: Option<Duration>,
    pub cron: Option<String>,
    pub timezone: Option<TimeZone>,
    pub jitter: Duration,
    pub blackout: Vec<Window>,
}

/// The check of dirty bitmaps, as `sync` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    pub runs: u32,
    #[serde(deserialize_with = "bytes")]
    pub bytes: u64,
    #[serde(deserialize_with = "duration")]
    pub time: Duration,
}

impl Default for Audit {
    fn default() -> Self {
        Audit { runs: 100, bytes: 1 << 30, time: Duration::from_secs(5) }
    }
}

/// A program that is told of something.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// Program (an absolute path) and its arguments. No shell.
    #[serde(deserialize_with = "command")]
    pub command: Vec<String>,
    #[serde(default = "one_minute", deserialize_with = "duration")]
    pub timeout: Duration,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hooks {
    pub after_run: Option<Hook>,
    pub on_failure: Option<Hook>,
    pub on_breach: Option<Hook>,
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

/// A duration behind a key that may be absent.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Span(#[serde(deserialize_with = "duration")] Duration);

/// The file as it is written. What is wrong with one key alone is found here, with its place.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    name: Spanned<String>,
    domains: Spanned<Vec<Selector>>,
    #[serde(default)]
    exclude: Vec<Selector>,
    #[serde(default)]
    exclude_disks: BTreeMap<Selector, Vec<DiskName>>,
    targets: Spanned<Vec<Spanned<String>>>,
    every: Option<Spanned<Span>>,
    cron: Option<Spanned<String>>,
    timezone: Option<Spanned<String>>,
    #[serde(default, deserialize_with = "jitter")]
    jitter: Option<Spanned<Duration>>,
    rpo: Option<Spanned<Span>>,
    keep: Option<Spanned<Keep>>,
    overlay_dir: Option<Spanned<PathBuf>>,
    #[serde(default = "min_free", deserialize_with = "bytes")]
    min_free_source: u64,
    #[serde(default = "one_hour", deserialize_with = "duration")]
    ready_timeout: Duration,
    #[serde(default)]
    with_secrets: bool,
    #[serde(default, deserialize_with = "capture")]
    capture: Option<String>,
    #[serde(default)]
    quiesce: Quiesce,
    #[serde(default)]
    audit: Audit,
    blackout: Option<Spanned<Vec<Window>>>,
    retry: Option<Spanned<RetryFile>>,
    #[serde(default)]
    hooks: Hooks,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RetryFile {
    first: Option<Span>,
    max: Option<Span>,
}

/// What is wrong, and where it stands.
struct Wrong {
    what: String,
    at: Place,
    hint: Option<String>,
}

fn wrong<T>(value: &Spanned<T>, what: impl Into<String>) -> Wrong {
    Wrong { what: what.into(), at: Place::of(value), hint: None }
}

impl Policy {
    /// Reads a policy. `targets`: the names the configuration knows; `path`: for errors. [`Kind::Config`] says file, line and
    /// column, and shows the line.
    pub fn parse(text: &str, path: &Path, targets: &[&str]) -> Result<Policy> {
        let file: Option<PolicyFile> = yaml::parse(text, path)?;
        let Some(file) = file else {
            return Err(mistake("the file has no policy in it", None, text, path)
                .hint("`virt-replica policy schema` and docs/policies.md say what a policy has"));
        };
        file.check(path, targets).map_err(|w| {
            let e = mistake(&w.what, Some(w.at), text, path);
            match w.hint {
                Some(hint) => e.hint(hint),
                None => e,
            }
        })
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

    /// The schedule; `local` is this host's time zone.
    pub fn schedule(&self, local: &TimeZone) -> Schedule {
        let when = match (&self.timing.every, &self.timing.cron) {
            (Some(every), _) => When::Every(*every),
            (None, Some(text)) => When::Cron(Box::new(cron(text).expect("it was parsed when the policy was read"))),
            (None, None) => unreachable!("a policy without `every` and `cron` is refused"),
        };
        Schedule {
            when,
            jitter: self.timing.jitter,
            blackout: self.timing.blackout.clone(),
            zone: self.timing.timezone.clone().unwrap_or_else(|| local.clone()),
        }
    }
}

/// Five fields; no seconds, no years.
fn cron(text: &str) -> Result<croner::Cron, String> {
    use croner::parser::{CronParser, Seconds, Year};
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    let cron = parser.parse(text).map_err(|e| e.to_string())?;
    // 30 February: the search ends at the calendar's end. From the epoch, so that the answer never changes.
    let epoch = Timestamp::UNIX_EPOCH.to_zoned(TimeZone::UTC);
    cron.find_next_occurrence(&epoch, true).map_err(|_| "no such day ever comes".to_owned())?;
    Ok(cron)
}

impl PolicyFile {
    fn check(self, path: &Path, targets: &[&str]) -> Result<Policy, Wrong> {
        let name_ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.name.value.is_empty() || self.name.value.len() > 64 || !self.name.value.chars().all(name_ok) {
            return Err(wrong(&self.name, "a name has 1 to 64 letters, digits, hyphens, underscores and dots"));
        }
        if self.domains.value.is_empty() {
            return Err(Wrong {
                hint: Some("name them, or write \"*\" for all".to_owned()),
                ..wrong(&self.domains, "no domain is meant")
            });
        }
        let timing = self.timing()?;
        if let (Some(rpo), Some(every)) = (&self.rpo, timing.every)
            && rpo.value.0 <= every
        {
            return Err(Wrong {
                hint: Some("a run needs time too: let `rpo` be at least twice `every`".to_owned()),
                ..wrong(rpo, "`rpo` is not longer than `every`: it would be broken between any two runs")
            });
        }
        if let Some(keep) = self.keep.as_ref().filter(|k| k.value == Keep::default()) {
            return Err(wrong(keep, "`keep` keeps nothing: name a rule (last, hourly, daily, weekly, monthly)"));
        }
        if let Some(dir) = self.overlay_dir.as_ref().filter(|d| !d.value.is_absolute()) {
            return Err(wrong(dir, "the directory has to be an absolute path"));
        }
        let targets = self.known_targets(targets)?;
        let retry = self.retry()?;
        Ok(Policy {
            file: path.to_owned(),
            name: self.name.value,
            domains: self.domains.value,
            exclude: self.exclude,
            exclude_disks: self.exclude_disks,
            targets,
            timing,
            rpo: self.rpo.map(|r| r.value.0),
            keep: self.keep.map(|k| k.value),
            overlay_dir: self.overlay_dir.map(|d| d.value),
            min_free_source_bytes: self.min_free_source,
            ready_timeout: self.ready_timeout,
            with_secrets: self.with_secrets,
            capture: self.capture,
            quiesce: self.quiesce,
            audit: self.audit,
            retry,
            hooks: self.hooks,
        })
    }

    fn timing(&self) -> Result<Timing, Wrong> {
        match (&self.every, &self.cron) {
            (Some(_), Some(cron)) => return Err(wrong(cron, "`every` and `cron` are both here: one of them is meant")),
            (None, None) => {
                return Err(wrong(&self.name, "the policy does not say when: `every: 15m` or `cron: \"0 2 * * *\"`"));
            }
            _ => {}
        }
        if let Some(text) = &self.cron {
            cron(&text.value).map_err(|why| Wrong {
                hint: Some("five fields: minute, hour, day of month, month, day of week".to_owned()),
                ..wrong(text, format!("'{}' is no cron pattern: {why}", text.value))
            })?;
        }
        let every = self.every.as_ref().map(|e| e.value.0);
        let timezone = match &self.timezone {
            Some(name) => Some(TimeZone::get(&name.value).map_err(|_| Wrong {
                hint: Some("a name as Europe/Berlin or UTC; the package tzdata has them".to_owned()),
                ..wrong(name, format!("there is no time zone '{}'", name.value))
            })?),
            None => None,
        };
        let jitter = match (&self.jitter, every) {
            (Some(j), Some(every)) if j.value > every => return Err(wrong(j, "`jitter` is longer than `every`")),
            (Some(j), None) if j.value > Duration::from_secs(86_400) => {
                return Err(wrong(j, "`jitter` is longer than a day"));
            }
            (Some(j), _) => j.value,
            (None, every) => every.unwrap_or_default(),
        };
        let blackout = self.blackout.as_ref().map(|b| b.value.clone()).unwrap_or_default();
        if let Some(b) = &self.blackout
            && window::open_at(&blackout, &TimeZone::UTC, Timestamp::UNIX_EPOCH).is_none()
        {
            return Err(wrong(b, "no hour of the week is left in which a run may begin"));
        }
        Ok(Timing { every, cron: self.cron.as_ref().map(|c| c.value.clone()), timezone, jitter, blackout })
    }

    fn known_targets(&self, known: &[&str]) -> Result<Vec<String>, Wrong> {
        let mut targets: Vec<String> = Vec::new();
        for target in &self.targets.value {
            if targets.contains(&target.value) {
                return Err(wrong(target, format!("target '{}' stands twice", target.value)));
            }
            if !known.contains(&target.value.as_str()) {
                let hint = match (closest(&target.value, known), known) {
                    (Some(meant), _) => format!("did you mean '{meant}'?"),
                    (None, []) => "no target is configured: name it under `targets:` in virt-replica.yaml".to_owned(),
                    (None, known) => format!("known targets: {}", known.join(", ")),
                };
                let w = wrong(target, format!("no target is called '{}'", target.value));
                return Err(Wrong { hint: Some(hint), ..w });
            }
            targets.push(target.value.clone());
        }
        if targets.is_empty() { Err(wrong(&self.targets, "no target is named")) } else { Ok(targets) }
    }

    fn retry(&self) -> Result<Retry, Wrong> {
        let Some(file) = &self.retry else { return Ok(Retry::default()) };
        let default = Retry::default();
        let max = file.value.max.map_or(default.max, |m| m.0);
        let first = file.value.first.map_or(default.first.min(max), |f| f.0);
        if first <= max { Ok(Retry { first, max }) } else { Err(wrong(file, "`first` is longer than `max`")) }
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
