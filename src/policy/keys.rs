//! Every key of a policy, in one table: the schema for editors is made of it, and docs/policies.md is held against it.

use serde_json::{Map, Value, json};

/// What a key holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Any text; not empty.
    Text,
    /// `90s`, `15m`, `1h 30m`, `7d`.
    Duration,
    /// `512M`, `1G`, or a plain number of bytes.
    Bytes,
    /// A whole number, zero or more.
    Count,
    /// `auto`, `no`, or a level of compression.
    Level,
    /// `true` or `false`.
    Switch,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// `"08:00"`.
    Clock,
    /// A list of days: `mon` to `sun`.
    Days,
    /// A list of texts; not empty.
    Texts,
    /// Names of disks by a selector of domains.
    DisksByDomain,
}

/// A key of a policy, as the schema and the documentation describe it.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// `a.b` is key `b` of `a`; `a[].b` is key `b` of each item of the list `a`.
    pub path: &'static str,
    /// Kind of value that the key holds.
    pub shape: Shape,
    /// A policy without this key is an error.
    pub required: bool,
    /// Value of a policy without this key, in words; empty if there is none to name.
    pub default: &'static str,
    /// Meaning of the key, in a sentence for editors.
    pub about: &'static str,
}

const fn key(path: &'static str, shape: Shape, default: &'static str, about: &'static str) -> Key {
    Key { path, shape, required: false, default, about }
}

const fn must(path: &'static str, shape: Shape, about: &'static str) -> Key {
    Key { path, shape, required: true, default: "", about }
}

/// The keys, in the order in which `policy show` writes them.
pub const KEYS: &[Key] = &[
    must("name", Shape::Text, "Name of the policy: letters, digits, hyphens, underscores and dots"),
    must("domains", Shape::Texts, "Domains it means: names, patterns with * and ?, UUIDs, tag:WORD"),
    key("exclude", Shape::Texts, "none", "Domains it does not mean, written in the same ways"),
    key("exclude_disks", Shape::DisksByDomain, "none", "Disks that are left out, by the domains they belong to"),
    must("targets", Shape::Texts, "Targets by their names in the configuration"),
    key("every", Shape::Duration, "", "A run in every such span, on a grid that never moves; this or `cron`"),
    key(
        "cron",
        Shape::Text,
        "",
        "A run at these times: minute, hour, day of month, month, day of week; this or `every`",
    ),
    key("timezone", Shape::Text, "the host's", "Time zone of `cron` and `blackout`, as Europe/Berlin"),
    key("jitter", Shape::Duration, "all of `every`; none with `cron`", "Domains are spread over this span"),
    key("rpo", Shape::Duration, "none", "Allowed age of the head; longer than `every`"),
    key("keep.last", Shape::Count, "none", "Newest points to keep"),
    key("keep.hourly", Shape::Count, "none", "Hours of which the newest point is kept"),
    key("keep.daily", Shape::Count, "none", "Days of which the newest point is kept"),
    key("keep.weekly", Shape::Count, "none", "Weeks of which the newest point is kept"),
    key("keep.monthly", Shape::Count, "none", "Months of which the newest point is kept"),
    key("overlay_dir", Shape::Text, "the configuration's", "Directory for the overlays of all disks"),
    key("overlay.max_bytes", Shape::Bytes, "none", "An overlay that grows larger ends its run, and is committed"),
    key("overlay.max_age", Shape::Duration, "none", "So does one that gets older"),
    key("min_free_source", Shape::Bytes, "256M", "Keep this much free where overlays lie"),
    key(
        "ready_timeout",
        Shape::Duration,
        "1h",
        "How long a commit may take to become ready before the next run ends it",
    ),
    key("with_secrets", Shape::Switch, "false", "Graphics passwords travel with the definition"),
    key(
        "capture",
        Shape::Choice(super::CAPTURES),
        "the configuration's",
        "How the disks of a running domain stand still: overlay, backup, or auto",
    ),
    key(
        "quiesce.wish",
        Shape::Choice(super::QUIESCE),
        "no",
        "The guest agent holds the guest's file systems: no, try, or require",
    ),
    key("quiesce.every", Shape::Count, "1", "Only in every such run"),
    key("quiesce.budget", Shape::Duration, "10s", "Longest time they are held, 2s to 1m"),
    key("audit.runs", Shape::Count, "100", "So many runs have compared a whole disk once; 0 checks no bitmap"),
    key("audit.bytes", Shape::Bytes, "1G", "Most to read for that, per disk and run"),
    key("audit.time", Shape::Duration, "5s", "Most time for that, per disk and run"),
    key("bandwidth.rate", Shape::Bytes, "none", "Most that a run sends in a second"),
    key("bandwidth.times[].from", Shape::Clock, "", "From this time on another rate holds"),
    key("bandwidth.times[].to", Shape::Clock, "", "Until this time; at or before `from`: of the next day"),
    key("bandwidth.times[].days", Shape::Days, "every day", "Days on which that begins"),
    key("bandwidth.times[].rate", Shape::Bytes, "", "Most that a run sends in a second then"),
    key("compression", Shape::Level, "auto", "auto, a level of zstd, 1 (fast) to 19 (small), or no"),
    key(
        "verify.every",
        Shape::Duration,
        "none",
        "The head is read again on the target in every such span; this or `cron`",
    ),
    key("verify.cron", Shape::Text, "none", "The head is read again on the target at these times"),
    key(
        "scrub.every",
        Shape::Duration,
        "none",
        "All points are read again on the target in every such span; this or `cron`",
    ),
    key("scrub.cron", Shape::Text, "none", "All points are read again on the target at these times"),
    key("blackout[].from", Shape::Clock, "", "No run is begun from this time on"),
    key("blackout[].to", Shape::Clock, "", "Until this time; at or before `from`: of the next day"),
    key("blackout[].days", Shape::Days, "every day", "Days on which the window begins"),
    key("retry.first", Shape::Duration, "30s", "Wait after a failure; doubles with each"),
    key("retry.max", Shape::Duration, "30m", "Longest wait; at once where a person has to act"),
    key(
        "hooks.before_freeze.command",
        Shape::Texts,
        "",
        "Run before the disks are frozen; if it fails there is no point",
    ),
    key("hooks.before_freeze.timeout", Shape::Duration, "1m", "After this long it is ended"),
    key("hooks.after_freeze.command", Shape::Texts, "", "Run as soon as they are, and whenever `before_freeze` was"),
    key("hooks.after_freeze.timeout", Shape::Duration, "1m", "After this long it is ended"),
    key("hooks.after_run.command", Shape::Texts, "", "Run after every run: program and arguments, no shell"),
    key("hooks.after_run.timeout", Shape::Duration, "1m", "After this long it is ended"),
    key("hooks.on_failure.command", Shape::Texts, "", "Run after a run that made no point"),
    key("hooks.on_failure.timeout", Shape::Duration, "1m", "After this long it is ended"),
    key("hooks.on_breach.command", Shape::Texts, "", "Run when an RPO is broken, and when it is kept again"),
    key("hooks.on_breach.timeout", Shape::Duration, "1m", "After this long it is ended"),
];

/// The keys of a policy of a target ([`super::replicas`]), in the order in which `policy show` writes them.
pub const REPLICA_KEYS: &[Key] = &[
    must("name", Shape::Text, "Name of the policy: letters, digits, hyphens, underscores and dots"),
    must("replicas", Shape::Texts, "Replicas it means, by their domains: names, patterns with * and ?, UUIDs"),
    key("exclude", Shape::Texts, "none", "Replicas it does not mean, written in the same ways"),
    key("root", Shape::Text, "/var/lib/virt-replica", "The store on this host"),
    key("timezone", Shape::Text, "the host's", "Time zone of every `cron` and `blackout`, as Europe/Berlin"),
    key("blackout[].from", Shape::Clock, "", "No check is begun from this time on"),
    key("blackout[].to", Shape::Clock, "", "Until this time; at or before `from`: of the next day"),
    key("blackout[].days", Shape::Days, "every day", "Days on which the window begins"),
    key("rpo", Shape::Duration, "none", "Allowed age of the head, watched from here: also when the source is gone"),
    key("drill.every", Shape::Duration, "none", "The head is booted, in a copy, in every such span; this or `cron`"),
    key("drill.cron", Shape::Text, "none", "The head is booted, in a copy, at these times"),
    key("drill.probes", Shape::Texts, "", "Evidence that it works: the probes of a drill; all of them"),
    key("drill.within", Shape::Duration, "5m", "How long the evidence may take"),
    key("verify.every", Shape::Duration, "none", "The head is read again in every such span; this or `cron`"),
    key("verify.cron", Shape::Text, "none", "The head is read again at these times"),
    key("scrub.every", Shape::Duration, "none", "All points are read again in every such span; this or `cron`"),
    key("scrub.cron", Shape::Text, "none", "All points are read again at these times"),
    key("retry.first", Shape::Duration, "30s", "Wait after a check that did not come to an end; doubles with each"),
    key("retry.max", Shape::Duration, "30m", "Longest wait; at once where a person has to act"),
    key("hooks.on_failure.command", Shape::Texts, "", "Run after a check that found damage, or did not come to an end"),
    key("hooks.on_failure.timeout", Shape::Duration, "1m", "After this long it is ended"),
    key("hooks.on_breach.command", Shape::Texts, "", "Run when an RPO is broken, and when it is kept again"),
    key("hooks.on_breach.timeout", Shape::Duration, "1m", "After this long it is ended"),
];

fn leaf(key: &Key) -> Value {
    let text_list = json!({ "type": "array", "items": { "type": "string" }, "minItems": 1 });
    let duration = "^\\s*[0-9].*[a-z]\\s*$";
    let mut schema = match key.shape {
        Shape::Text => json!({ "type": "string", "minLength": 1 }),
        Shape::Duration => json!({ "type": "string", "pattern": duration }),
        Shape::Bytes => json!({ "type": ["string", "integer"], "minimum": 0 }),
        Shape::Count => json!({ "type": "integer", "minimum": 0 }),
        Shape::Level => {
            let levels = (1..=crate::patch::Compression::LEVEL_MAX).map(Value::from);
            json!({ "enum": levels.chain(["auto", "no"].map(Value::from)).collect::<Vec<_>>() })
        }
        Shape::Switch => json!({ "type": "boolean" }),
        Shape::Choice(words) => json!({ "enum": words }),
        Shape::Clock => json!({ "type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$|^24:00$" }),
        Shape::Days => {
            let days: Vec<&str> = super::window::Day::ALL.iter().map(|d| d.word()).collect();
            json!({ "type": "array", "items": { "enum": days }, "minItems": 1 })
        }
        Shape::Texts => text_list,
        Shape::DisksByDomain => json!({ "type": "object", "additionalProperties": text_list }),
    };
    let default = match key.default {
        "" => String::new(),
        text => format!(" (default: {text})"),
    };
    schema["description"] = Value::String(format!("{}{default}", key.about));
    schema
}

/// An object of these keys: (the rest of the path, the key).
fn object(keys: &[(&str, &Key)]) -> Value {
    let mut properties = Map::new();
    let mut required: Vec<&str> = Vec::new();
    for (path, key) in keys {
        match path.split_once('.') {
            None => {
                properties.insert((*path).to_owned(), leaf(key));
                // Of a group that is there, what has no default is needed.
                if key.required || (key.path.contains('.') && key.default.is_empty()) {
                    required.push(path);
                }
            }
            Some((group, _)) if !properties.contains_key(group.trim_end_matches("[]")) => {
                let inner: Vec<(&str, &Key)> =
                    keys.iter().filter_map(|(p, k)| Some((p.strip_prefix(group)?.strip_prefix('.')?, *k))).collect();
                let schema = match group.ends_with("[]") {
                    true => json!({ "type": "array", "items": object(&inner) }),
                    false => object(&inner),
                };
                properties.insert(group.trim_end_matches("[]").to_owned(), schema);
            }
            Some(_) => {}
        }
    }
    let mut schema = json!({ "type": "object", "additionalProperties": false, "properties": properties });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

/// The JSON Schema of a policy file (draft 2020-12), for editors: of a source, or of a target.
pub fn schema() -> Value {
    let of = |keys: &'static [Key]| object(&keys.iter().map(|k| (k.path, k)).collect::<Vec<_>>());
    let mut source = of(KEYS);
    source["oneOf"] = json!([{ "required": ["every"] }, { "required": ["cron"] }]);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "virt-replica policy",
        "oneOf": [source, of(REPLICA_KEYS)],
    })
}
