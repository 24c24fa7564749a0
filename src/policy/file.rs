//! A policy as it is written: what is wrong with one key alone, with its place, and what is wrong between keys.

use super::bandwidth::Bandwidth;
use super::retry::Retry;
use super::select::Selector;
use super::window::{self, Window};
use super::{
    Audit, Hooks, Overlay, Policy, Quiesce, Timed, Timing, bytes, capture, duration, jitter, min_free, one_hour,
};
use crate::name::DiskName;
use crate::patch::Compression;
use crate::retention::Keep;
use crate::yaml::{Place, Spanned, closest};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A duration behind a key that may be absent.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Span(#[serde(deserialize_with = "duration")] Duration);

/// A size behind a key that may be absent.
#[derive(Clone, Copy, Deserialize)]
struct Size(#[serde(deserialize_with = "bytes")] u64);

/// The file as it is written. What is wrong with one key alone is found here, with its place.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PolicyFile {
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
    #[serde(default)]
    overlay: OverlayFile,
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
    #[serde(default)]
    bandwidth: Bandwidth,
    #[serde(default)]
    compression: Compression,
    verify: Option<Spanned<TimedFile>>,
    scrub: Option<Spanned<TimedFile>>,
    blackout: Option<Spanned<Vec<Window>>>,
    retry: Option<Spanned<RetryFile>>,
    #[serde(default)]
    hooks: Hooks,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct OverlayFile {
    max_bytes: Option<Size>,
    max_age: Option<Span>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TimedFile {
    every: Option<Span>,
    cron: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RetryFile {
    first: Option<Span>,
    max: Option<Span>,
}

/// What is wrong, and where it stands.
pub(super) struct Wrong {
    pub(super) what: String,
    pub(super) at: Place,
    pub(super) hint: Option<String>,
}

fn wrong<T>(value: &Spanned<T>, what: impl Into<String>) -> Wrong {
    Wrong { what: what.into(), at: Place::of(value), hint: None }
}

/// Five fields; no seconds, no years.
pub(super) fn cron(text: &str) -> Result<croner::Cron, String> {
    use croner::parser::{CronParser, Seconds, Year};
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    let cron = parser.parse(text).map_err(|e| e.to_string())?;
    // 30 February: the search ends at the calendar's end. From the epoch, so that the answer never changes.
    let epoch = Timestamp::UNIX_EPOCH.to_zoned(TimeZone::UTC);
    cron.find_next_occurrence(&epoch, true).map_err(|_| "no such day ever comes".to_owned())?;
    Ok(cron)
}

fn no_cron<T>(at: &Spanned<T>, text: &str, why: &str) -> Wrong {
    Wrong {
        hint: Some("five fields: minute, hour, day of month, month, day of week".to_owned()),
        ..wrong(at, format!("'{text}' is no cron pattern: {why}"))
    }
}

fn timed(file: &Spanned<TimedFile>) -> Result<Timed, Wrong> {
    match (&file.value.every, &file.value.cron) {
        (Some(every), None) => Ok(Timed::Every(every.0)),
        (None, Some(text)) => {
            cron(text).map_err(|why| no_cron(file, text, &why))?;
            Ok(Timed::Cron(text.clone()))
        }
        _ => Err(wrong(file, "one of `every` and `cron` has to be here")),
    }
}

impl PolicyFile {
    /// The policy, if it holds together. `targets`: the names the configuration knows; `path`: where it was read.
    pub(super) fn check(self, path: &Path, targets: &[&str]) -> Result<Policy, Wrong> {
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
        let verify = self.verify.as_ref().map(timed).transpose()?;
        let scrub = self.scrub.as_ref().map(timed).transpose()?;
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
            overlay: Overlay {
                bytes_max: self.overlay.max_bytes.map(|b| b.0),
                age_max: self.overlay.max_age.map(|a| a.0),
            },
            min_free_source_bytes: self.min_free_source,
            ready_timeout: self.ready_timeout,
            with_secrets: self.with_secrets,
            capture: self.capture,
            quiesce: self.quiesce,
            audit: self.audit,
            bandwidth: self.bandwidth,
            compression: self.compression,
            verify,
            scrub,
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
            cron(&text.value).map_err(|why| no_cron(text, &text.value, &why))?;
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
