//! A policy as the file that says the same with every default written out.

use super::bandwidth::Bandwidth;
use super::window::Window;
use super::{Policy, Quiesce, Timed};
use crate::hook::Hook;
use crate::units::{duration, exact_bytes};
use std::fmt;

/// A double-quoted scalar: JSON's strings are YAML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let words: Vec<String> = items.into_iter().map(|i| quoted(&i.to_string())).collect();
    format!("[{}]", words.join(", "))
}

fn window(w: &Window) -> String {
    let days: Vec<&str> = w.days.iter().map(|d| d.word()).collect();
    format!("from: \"{}\", to: \"{}\", days: [{}]", w.from, w.to, days.join(", "))
}

fn hook(f: &mut fmt::Formatter<'_>, name: &str, hook: Option<&Hook>) -> fmt::Result {
    match hook {
        Some(h) => writeln!(f, "  {name}: {{command: {}, timeout: {}}}", list(&h.command), duration(h.timeout)),
        None => Ok(()),
    }
}

/// Reads back as the same policy.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "name: {}", quoted(&self.name))?;
        writeln!(f, "domains: {}", list(&self.domains))?;
        if !self.exclude.is_empty() {
            writeln!(f, "exclude: {}", list(&self.exclude))?;
        }
        if !self.exclude_disks.is_empty() {
            writeln!(f, "exclude_disks:")?;
        }
        for (domains, disks) in &self.exclude_disks {
            writeln!(f, "  {}: {}", quoted(&domains.to_string()), list(disks))?;
        }
        writeln!(f, "targets: {}", list(&self.targets))?;
        self.when(f)?;
        if let Some(rpo) = self.rpo {
            writeln!(f, "rpo: {}", duration(rpo))?;
        }
        if let Some(keep) = self.keep {
            writeln!(f, "keep: {{{}}}", keep.to_string().replace('=', ": ").replace(',', ", "))?;
        }
        if let Some(dir) = &self.overlay_dir {
            writeln!(f, "overlay_dir: {}", quoted(&dir.to_string_lossy()))?;
        }
        let limits = [
            self.overlay.bytes_max.map(|b| format!("max_bytes: {}", exact_bytes(b))),
            self.overlay.age_max.map(|a| format!("max_age: {}", duration(a))),
        ];
        let limits: Vec<String> = limits.into_iter().flatten().collect();
        if !limits.is_empty() {
            writeln!(f, "overlay: {{{}}}", limits.join(", "))?;
        }
        writeln!(f, "min_free_source: {}", exact_bytes(self.min_free_source_bytes))?;
        writeln!(f, "ready_timeout: {}", duration(self.ready_timeout))?;
        writeln!(f, "with_secrets: {}", self.with_secrets)?;
        if let Some(capture) = &self.capture {
            writeln!(f, "capture: {capture}")?;
        }
        let Quiesce { wish, every, budget } = &self.quiesce;
        writeln!(f, "quiesce: {{wish: {}, every: {every}, budget: {}}}", quoted(wish), duration(*budget))?;
        let (bytes, time) = (exact_bytes(self.audit.bytes), duration(self.audit.time));
        writeln!(f, "audit: {{runs: {}, bytes: {bytes}, time: {time}}}", self.audit.runs)?;
        self.bandwidth(f)?;
        writeln!(f, "compression: {}", quoted(&self.compression.to_string()))?;
        for (name, timed) in [("verify", &self.verify), ("scrub", &self.scrub)] {
            match timed {
                Some(Timed::Every(every)) => writeln!(f, "{name}: {{every: {}}}", duration(*every))?,
                Some(Timed::Cron(cron)) => writeln!(f, "{name}: {{cron: {}}}", quoted(cron))?,
                None => {}
            }
        }
        writeln!(f, "retry: {{first: {}, max: {}}}", duration(self.retry.first), duration(self.retry.max))?;
        if self.hooks.all().iter().any(|(_, hook)| hook.is_some()) {
            writeln!(f, "hooks:")?;
        }
        self.hooks.all().into_iter().try_for_each(|(name, h)| hook(f, name, h))
    }
}

impl Policy {
    fn bandwidth(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bandwidth = &self.bandwidth;
        if *bandwidth == Bandwidth::default() {
            return Ok(());
        }
        writeln!(f, "bandwidth:")?;
        if let Some(rate) = bandwidth.rate_bytes {
            writeln!(f, "  rate: {}", exact_bytes(rate))?;
        }
        if !bandwidth.times.is_empty() {
            writeln!(f, "  times:")?;
        }
        for timed in &bandwidth.times {
            writeln!(f, "    - {{{}, rate: {}}}", window(&timed.window), exact_bytes(timed.rate_bytes))?;
        }
        Ok(())
    }

    fn when(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let timing = &self.timing;
        if let Some(every) = timing.every {
            writeln!(f, "every: {}", duration(every))?;
        }
        if let Some(cron) = &timing.cron {
            writeln!(f, "cron: {}", quoted(cron))?;
        }
        if let Some(name) = timing.timezone.as_ref().and_then(|z| z.iana_name()) {
            writeln!(f, "timezone: {}", quoted(name))?;
        }
        writeln!(f, "jitter: {}", duration(timing.jitter))?;
        if !timing.blackout.is_empty() {
            writeln!(f, "blackout:")?;
        }
        for w in &timing.blackout {
            writeln!(f, "  - {{{}}}", window(w))?;
        }
        Ok(())
    }
}
