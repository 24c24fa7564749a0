//! A policy of a target: what this host does, on its own, with the replicas of its own store. It has no runs: those are
//! the sources' business, and a source may be gone. It has checks, drills, and an RPO that is watched from here.

use super::file::{RetryFile, Span, TimedFile, Wrong, check_name, no_open_hour, retry, timed, timezone, wrong};
use super::select::Selector;
use super::window::Window;
use super::{Drill, Hooks, Policy, Timing, duration, hook};
use crate::hook::Hook;
use crate::yaml::Spanned;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where a store is, unless the policy says otherwise.
pub(super) const DEFAULT_ROOT: &str = "/var/lib/virt-replica";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReplicaPolicyFile {
    name: Spanned<String>,
    replicas: Spanned<Vec<Selector>>,
    #[serde(default)]
    exclude: Vec<Selector>,
    root: Option<Spanned<PathBuf>>,
    rpo: Option<Span>,
    verify: Option<Spanned<TimedFile>>,
    scrub: Option<Spanned<TimedFile>>,
    drill: Option<Spanned<DrillFile>>,
    timezone: Option<Spanned<String>>,
    blackout: Option<Spanned<Vec<Window>>>,
    retry: Option<Spanned<RetryFile>>,
    #[serde(default)]
    hooks: ReplicaHooks,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DrillFile {
    every: Option<Span>,
    cron: Option<String>,
    probes: Vec<String>,
    #[serde(default = "five_minutes", deserialize_with = "duration")]
    within: Duration,
}

fn five_minutes() -> Duration {
    Duration::from_secs(300)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ReplicaHooks {
    #[serde(deserialize_with = "hook")]
    on_failure: Option<Hook>,
    #[serde(deserialize_with = "hook")]
    on_breach: Option<Hook>,
}

impl ReplicaPolicyFile {
    /// The policy, if it holds together.
    pub(super) fn check(self, path: &Path) -> Result<Policy, Wrong> {
        check_name(&self.name)?;
        if self.replicas.value.is_empty() {
            return Err(Wrong {
                hint: Some("name them, or write \"*\" for all".to_owned()),
                ..wrong(&self.replicas, "no replica is meant")
            });
        }
        if let Some(tag) = self.replicas.value.iter().chain(&self.exclude).find(|s| matches!(s, Selector::Tag(_))) {
            return Err(wrong(&self.replicas, format!("'{tag}': a replica has no tags, they are its source's")));
        }
        let root = match self.root {
            Some(root) if !root.value.is_absolute() => {
                return Err(wrong(&root, "the store has to be an absolute path"));
            }
            Some(root) => root.value,
            None => DEFAULT_ROOT.into(),
        };
        let blackout = self.blackout.as_ref().map(|b| b.value.clone()).unwrap_or_default();
        no_open_hour(self.blackout.as_ref())?;
        let timing = Timing {
            every: None,
            cron: None,
            timezone: timezone(self.timezone.as_ref())?,
            jitter: Duration::ZERO,
            blackout,
        };
        let drill = self.drill.map(drill).transpose()?;
        let (verify, scrub) =
            (self.verify.as_ref().map(timed).transpose()?, self.scrub.as_ref().map(timed).transpose()?);
        let rpo = self.rpo.map(|r| r.0);
        if verify.is_none() && scrub.is_none() && drill.is_none() && rpo.is_none() {
            return Err(Wrong {
                hint: Some("`verify`, `scrub`, `drill` or `rpo`".to_owned()),
                ..wrong(&self.name, "the policy says nothing that is to be done with its replicas")
            });
        }
        Ok(Policy {
            name: self.name.value,
            domains: self.replicas.value,
            exclude: self.exclude,
            store: Some(root),
            timing,
            rpo,
            verify,
            scrub,
            drill,
            retry: retry(self.retry.as_ref())?,
            hooks: Hooks { on_failure: self.hooks.on_failure, on_breach: self.hooks.on_breach, ..Hooks::default() },
            ..Policy::of_file(path)
        })
    }
}

fn drill(file: Spanned<DrillFile>) -> Result<Drill, Wrong> {
    let when = timed(&Spanned::new(
        TimedFile { every: file.value.every, cron: file.value.cron.clone() },
        file.referenced,
        file.defined,
    ))?;
    match file.value.probes.is_empty() {
        true => Err(Wrong {
            hint: Some(
                "write `probes: [agent]`, or another probe: serial:TEXT, tcp:ADDRESS/PREFIX:PORT, script:/PATH"
                    .to_owned(),
            ),
            ..wrong(&file, "a drill without evidence proves nothing")
        }),
        false => Ok(Drill { when, probes: file.value.probes, within: file.value.within }),
    }
}
