//! How one run of one domain is to be done: one value, whoever asks for the run.
//!
//! The command line fills it from its options and the daemon from a policy; both then take the same way. The daemon's
//! child reads it as JSON from its standard input ([`RunSettings::read`]), so that nothing is spelled a second time.
//! Every key must be filled by both sides or be on a list of exceptions: tests derive the keys from the value itself.

use crate::error::{Error, Kind, Result};
use crate::name::DiskName;
use crate::patch::Compression;
use crate::policy::Policy;
use crate::policy::bandwidth::RateRule;
use crate::policy::select::SeenDomain;
use crate::replicate::capture::freeze_hooks::FreezeHooks;
use crate::replicate::capture::quiesce::QuiesceOptions;
use crate::replicate::plan::capture_choice::CaptureWish;
use crate::replicate::plan::forecast::SpaceOptions;
use crate::replicate::tracking::audit::AuditOptions;
use crate::retention::Keep;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

/// Largest document that [`RunSettings::read`] takes, in bytes: a thousand excluded disks and long hooks fit.
const DOCUMENT_MAX: u64 = 1 << 20;

/// How long a commit may take to become ready, unless somebody says otherwise.
pub const READY_WITHIN: Duration = Duration::from_secs(3600);

/// The settings of one run. What is left out of a document has its default; a key that is not known is refused, because
/// nobody would act on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunSettings {
    /// How the disks of a running domain are made to stand still. `None`: as the configuration has it.
    pub capture: Option<CaptureWish>,
    /// Whether the guest agent holds the guest's file systems meanwhile.
    pub quiesce: QuiesceOptions,
    /// Directory for the overlays of all disks. `None`: as the configuration has it, else beside the images.
    pub overlay_dir: Option<PathBuf>,
    /// Room to keep free, and limits of the overlays.
    pub space: SpaceOptions,
    /// Disks that the operator leaves out.
    pub exclude_disks: Vec<DiskName>,
    /// Read everything and compare it, whatever a bitmap says.
    pub compare: bool,
    /// Read everything and send everything, whatever the target has.
    pub full: bool,
    /// The operator says that this host is the domain's source from now on.
    pub take_over: bool,
    /// How much of a disk the run compares although its dirty bitmap says clean.
    pub audit: AuditOptions,
    /// How fast the run may send, as an operator types it. None: as fast as it goes.
    #[serde(with = "crate::units::as_texts")]
    pub rates: Vec<RateRule>,
    /// Time zone of the times in `rates`, by its IANA name. `None`: the host's.
    pub timezone: Option<String>,
    /// How content is compressed before it is sent.
    #[serde(with = "crate::units::as_text")]
    pub compression: Compression,
    /// Programs that the run starts before and after the freeze.
    pub hooks: FreezeHooks,
    /// Keep secrets (graphics passwords) in the definition that travels with the point.
    pub with_secrets: bool,
    /// Afterwards remove the points that these rules do not keep. `None`: remove nothing.
    pub keep: Option<Keep>,
    /// How long a commit may take to become ready before it is left to the next run.
    pub ready_within: Duration,
    /// Create the store if the target has none there. The configuration of a target may say so as well.
    pub create_store: bool,
}

impl Default for RunSettings {
    fn default() -> Self {
        RunSettings {
            capture: None,
            quiesce: QuiesceOptions::default(),
            overlay_dir: None,
            space: SpaceOptions::default(),
            exclude_disks: Vec::new(),
            compare: false,
            full: false,
            take_over: false,
            audit: AuditOptions::default(),
            rates: Vec::new(),
            timezone: None,
            compression: Compression::default(),
            hooks: FreezeHooks::default(),
            with_secrets: false,
            keep: None,
            ready_within: READY_WITHIN,
            create_store: false,
        }
    }
}

impl RunSettings {
    /// What this policy says of a run of this domain. [`Kind::Config`] if the policy has a word that no run knows.
    pub fn of_policy(policy: &Policy, domain: &SeenDomain) -> Result<RunSettings> {
        let unknown = |why: String| Error::new(Kind::Config, why).path(&policy.file);
        let mut space = SpaceOptions { min_free_source_bytes: policy.min_free_source_bytes, ..SpaceOptions::default() };
        space.overlay.bytes_max = policy.overlay.bytes_max;
        space.overlay.age_max = policy.overlay.age_max;
        let zone = policy.timing.timezone.as_ref().and_then(|zone| zone.iana_name());
        Ok(RunSettings {
            capture: policy.capture.as_deref().map(str::parse).transpose().map_err(unknown)?,
            quiesce: QuiesceOptions {
                wish: policy.quiesce.wish.parse().map_err(unknown)?,
                every: policy.quiesce.every,
                budget: policy.quiesce.budget,
            },
            overlay_dir: policy.overlay_dir.clone(),
            space,
            exclude_disks: policy.excluded_disks(domain).into_iter().cloned().collect(),
            audit: AuditOptions {
                every_runs: policy.audit.runs,
                bytes_max: policy.audit.bytes,
                within: policy.audit.time,
            },
            rates: policy.bandwidth.rules(),
            timezone: zone.map(str::to_owned),
            compression: policy.compression,
            hooks: FreezeHooks { before: policy.hooks.before_freeze.clone(), after: policy.hooks.after_freeze.clone() },
            with_secrets: policy.with_secrets,
            keep: policy.keep,
            ready_within: policy.ready_timeout,
            ..RunSettings::default()
        })
    }

    /// The settings by their keys: `quiesce.wish` is key `wish` of `quiesce`.
    pub fn by_key(&self) -> BTreeMap<String, Value> {
        fn walk(at: &str, value: Value, found: &mut BTreeMap<String, Value>) {
            match value {
                // A duration is two numbers to serde, and one thing to us.
                Value::Object(keys) if !keys.contains_key("nanos") => {
                    let joined = |key: String| if at.is_empty() { key } else { format!("{at}.{key}") };
                    keys.into_iter().for_each(|(key, value)| walk(&joined(key), value, found));
                }
                value => drop(found.insert(at.to_owned(), value)),
            }
        }
        let mut found = BTreeMap::new();
        walk("", serde_json::to_value(self).expect("settings are plain data"), &mut found);
        found
    }

    /// The document that [`RunSettings::read`] reads.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("settings are plain data")
    }

    /// Reads a document to its end. [`Kind::Usage`] with line and column if it is none. Blocks until the writer closes
    /// it.
    pub fn read(from: impl Read) -> Result<RunSettings> {
        let mut text = Vec::new();
        let read = from.take(DOCUMENT_MAX + 1).read_to_end(&mut text);
        read.map_err(|e| Error::from_io("cannot read the settings of the run from standard input", e))?;
        if text.len() as u64 > DOCUMENT_MAX {
            let what = format!("the settings of the run have more than {DOCUMENT_MAX} bytes");
            return Err(Error::new(Kind::Usage, what));
        }
        serde_json::from_slice(&text).map_err(|e| {
            Error::new(Kind::Usage, format!("the settings of the run cannot be read: {e}"))
                .hint("another release of this program wrote them: restart the daemon")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::{DomainName, DomainUuid};
    use std::collections::BTreeSet;
    use std::path::Path;

    fn of_lines(lines: &str) -> RunSettings {
        let text = format!("name: p\ndomains: [web01]\ntargets: [dr1]\nevery: 5m\n{lines}");
        let policy = Policy::parse(&text, Path::new("p.yaml"), &["dr1"]).unwrap();
        let domain = SeenDomain {
            name: DomainName::new("web01").unwrap(),
            uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
            tags: Vec::new(),
        };
        RunSettings::of_policy(&policy, &domain).unwrap()
    }

    /// The lines of a policy that set each key, or why no policy sets it.
    const KEYS: &[(&str, Result<&str, &str>)] = &[
        ("capture", Ok("capture: backup")),
        ("quiesce.wish", Ok("quiesce: {wish: try}")),
        ("quiesce.every", Ok("quiesce: {every: 4}")),
        ("quiesce.budget", Ok("quiesce: {budget: 8s}")),
        ("overlay_dir", Ok("overlay_dir: /srv/o")),
        ("space.min_free_source_bytes", Ok("min_free_source: 1G")),
        ("space.overlay.bytes_max", Ok("overlay: {max_bytes: 1G}")),
        ("space.overlay.age_max", Ok("overlay: {max_age: 2h}")),
        ("exclude_disks", Ok("exclude_disks: {web*: [vdb]}")),
        ("compare", Err("a person asks for it once, in doubt")),
        ("full", Err("a person asks for it once, in doubt")),
        ("take_over", Err("a person decides which host is the source")),
        ("audit.every_runs", Ok("audit: {runs: 7}")),
        ("audit.bytes_max", Ok("audit: {bytes: 1M}")),
        ("audit.within", Ok("audit: {time: 9s}")),
        ("rates", Ok("bandwidth: {times: [{from: \"08:00\", to: \"18:00\", days: [mon], rate: 1M}]}")),
        ("timezone", Ok("timezone: Europe/Berlin")),
        ("compression", Ok("compression: no")),
        ("hooks.before", Ok("hooks: {before_freeze: {command: [/bin/flush, \"-x\"], timeout: 5s}}")),
        ("hooks.after", Ok("hooks: {after_freeze: {command: [/bin/on]}}")),
        ("with_secrets", Ok("with_secrets: true")),
        ("keep", Ok("keep: {last: 3, daily: 7}")),
        ("ready_within", Ok("ready_timeout: 2h")),
        ("create_store", Err("the configuration of the target says it")),
    ];

    #[test]
    fn every_key_is_set_by_a_policy_or_known_not_to_be() {
        let plain = of_lines("").by_key();
        let table: BTreeMap<&str, Result<&str, &str>> = KEYS.iter().copied().collect();
        let (ours, listed): (BTreeSet<&str>, BTreeSet<&str>) =
            (plain.keys().map(String::as_str).collect(), table.keys().copied().collect());
        assert_eq!(ours, listed, "a key of a run has no line here, or a line no key");
        for (key, line) in table {
            let Ok(line) = line else { continue };
            let set = of_lines(line).by_key();
            let key_is_set = set.iter().any(|(at, value)| at.starts_with(key) && plain.get(at) != Some(value));
            assert!(key_is_set, "{line} does not arrive as {key}");
        }
        assert_eq!(of_lines(""), RunSettings::default(), "a policy that says nothing means the defaults");
    }

    #[test]
    fn settings_are_read_as_they_were_written() {
        let lines: Vec<&str> = KEYS.iter().filter_map(|(_, line)| line.ok()).collect();
        for line in &lines {
            let settings = of_lines(line);
            assert_eq!(RunSettings::read(settings.to_json().as_slice()).unwrap(), settings, "{line}");
        }
        // A daemon of an earlier release knew fewer keys.
        assert_eq!(RunSettings::read(b"{}".as_slice()).unwrap(), RunSettings::default());
    }

    #[test]
    fn a_document_of_strangers_is_refused_with_its_place() {
        for (document, says) in [
            ("", "EOF"),
            ("{\"capture\":\"magic\"}", "magic"),
            ("{\"full\":true,\n\"fulll\":true}", "line 2"),
            ("{\"rates\":[\"fast\"]}", "fast"),
        ] {
            let e = RunSettings::read(document.as_bytes()).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage);
            assert!(e.to_string().contains(says), "{document}: {e}");
        }
        let endless = RunSettings::read(std::io::repeat(b' ')).unwrap_err();
        assert!(endless.to_string().contains("more than"), "{endless}");
    }
}
