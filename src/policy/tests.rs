//! Policies as text: what is read, what is refused, and that nothing is read and then ignored.

use super::*;
use crate::name::{DomainName, DomainUuid};
use serde_json::Value;

const FULL: &str = r#"
name: everything
domains: ["web*", db01, 6695EB01-f6a4-8304-79aa-97f2502e193f]
exclude: ["*-test"]
exclude_disks: {db01: [vdz, vdb], "d*": [vdb]}
targets: [dr1, vault]
cron: "30 2 * * *"
timezone: Europe/Berlin
jitter: 30m
rpo: 30h
keep: {last: 3, daily: 7}
overlay_dir: /srv/overlays
overlay: {max_bytes: 20G, max_age: 4h}
min_free_source: 1G
ready_timeout: 2h
with_secrets: true
capture: auto
quiesce: {wish: require, every: 4, budget: 8s}
audit: {runs: 50, bytes: 512M, time: 3s}
bandwidth:
  rate: 50M
  times: [{from: "08:00", to: "18:00", days: [mon], rate: 10M}, {from: "18:00", to: "20:00", rate: 1G}]
compression: 3
verify: {every: 7d}
scrub: {cron: "0 4 * * SUN"}
blackout:
  - {from: "08:00", to: "18:00", days: [mon, fri]}
  - {from: "23:00", to: "01:00"}
retry: {first: 10s, max: 5m}
hooks:
  before_freeze: {command: [/usr/local/bin/flush], timeout: 20s}
  after_freeze: {command: [/usr/local/bin/go-on]}
  after_run: {command: [/bin/true]}
  on_failure: {command: [/usr/local/bin/tell, "a b"], timeout: 10s}
  on_breach: {command: [/bin/true]}
"#;

fn parse(text: &str) -> Result<Policy> {
    Policy::parse(text, Path::new("p.yaml"), &["dr1", "vault"])
}

fn domain(name: &str) -> SeenDomain {
    let uuid = DomainUuid::new("00000000-0000-0000-0000-000000000001").unwrap();
    SeenDomain { name: DomainName::new(name).unwrap(), uuid, tags: Vec::new() }
}

#[test]
fn a_policy_is_what_it_says_and_the_rest_is_documented_defaults() {
    let p = parse("name: a\ndomains: [web]\ntargets: [dr1]\nevery: 5m\n").unwrap();
    assert_eq!(p.timing.jitter, Duration::from_secs(300));
    assert_eq!((p.rpo, p.keep, p.overlay_dir.clone()), (None, None, None));
    assert_eq!((p.audit, p.retry), (Audit::default(), Retry::default()));
    let full = parse(FULL).unwrap();
    assert_eq!(full.timing.jitter, Duration::from_secs(1800));
    assert_eq!(full.keep.unwrap().to_string(), "last=3,daily=7");
    assert_eq!(full.hooks.after_run.as_ref().unwrap().timeout, Duration::from_secs(60));
    let disks: Vec<&str> = full.excluded_disks(&domain("db01")).into_iter().map(DiskName::as_str).collect();
    assert_eq!(disks, ["vdb", "vdz"]);
    assert!(full.means(&domain("web7")) && !full.means(&domain("web-test")) && !full.means(&domain("mail")));
    let none = parse("name: a\ndomains: [web]\ntargets: [dr1]\nevery: 5m\njitter: 0s\n").unwrap();
    assert_eq!(none.timing.jitter, Duration::ZERO);
}

/// `policy show` prints a policy: whoever copies it has the same one.
#[test]
fn what_is_shown_reads_back_as_the_same_policy() {
    for text in [FULL, "name: a\ndomains: [web]\ntargets: [dr1]\nevery: 90s\nrpo: 1h\n"] {
        let p = parse(text).unwrap();
        assert_eq!(parse(&p.to_string()).unwrap_or_else(|e| panic!("{e}\n{p}")), p);
    }
}

/// The keys the parser knows below `group`, from its own mouth: the sentence about one it does not know.
fn known_to_the_parser(text: &str) -> Vec<String> {
    let e = parse(text).unwrap_err();
    let hint = e.hint_text().unwrap_or_else(|| panic!("{e}"));
    let list = hint.strip_prefix("known here: ").unwrap_or_else(|| panic!("{hint}"));
    list.split(", ").map(str::to_owned).collect()
}

fn of_the_table(group: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for rest in keys::KEYS.iter().filter_map(|k| k.path.strip_prefix(group)) {
        let name = rest.split('.').next().unwrap().trim_end_matches("[]").to_owned();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

#[test]
fn the_table_has_exactly_the_keys_that_are_read() {
    let sorted = |mut v: Vec<String>| {
        v.sort();
        v
    };
    for (group, text) in [
        ("", "zzzzzzzz: 1\n"),
        ("keep.", "keep: {zzzzzzzz: 1}\n"),
        ("audit.", "audit: {zzzzzzzz: 1}\n"),
        ("overlay.", "overlay: {zzzzzzzz: 1}\n"),
        ("bandwidth.", "bandwidth: {zzzzzzzz: 1}\n"),
        ("bandwidth.times[].", "bandwidth: {times: [{zzzzzzzz: 1}]}\n"),
        ("verify.", "verify: {zzzzzzzz: 1}\n"),
        ("scrub.", "scrub: {zzzzzzzz: 1}\n"),
        ("hooks.before_freeze.", "hooks: {before_freeze: {zzzzzzzz: 1}}\n"),
        ("hooks.after_freeze.", "hooks: {after_freeze: {zzzzzzzz: 1}}\n"),
        ("retry.", "retry: {zzzzzzzz: 1}\n"),
        ("blackout[].", "blackout: [{zzzzzzzz: 1}]\n"),
        ("hooks.", "hooks: {zzzzzzzz: 1}\n"),
        ("hooks.after_run.", "hooks: {after_run: {zzzzzzzz: 1}}\n"),
        ("hooks.on_failure.", "hooks: {on_failure: {zzzzzzzz: 1}}\n"),
        ("hooks.on_breach.", "hooks: {on_breach: {zzzzzzzz: 1}}\n"),
    ] {
        assert_eq!(sorted(known_to_the_parser(text)), sorted(of_the_table(group)), "{group}");
    }
}

/// As much of JSON Schema as ours uses.
fn conforms(schema: &Value, value: &Value) -> Result<(), String> {
    let is = |kind: &str| match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "boolean" => value.is_boolean(),
        other => panic!("the schema has a type {other}"),
    };
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    if !kinds.is_empty() && !kinds.iter().any(|k| is(k)) {
        return Err(format!("{value} is no {kinds:?}"));
    }
    if let Some(allowed) = schema["enum"].as_array().filter(|a| !a.contains(value)) {
        return Err(format!("{value} is none of {allowed:?}"));
    }
    if let Value::Object(map) = value {
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            map.get(name).ok_or(format!("{name} is missing"))?;
        }
        for (name, inner) in map {
            match (&schema["properties"][name], &schema["additionalProperties"]) {
                (Value::Null, Value::Bool(false)) => return Err(format!("unknown key {name}")),
                (Value::Null, any) => conforms(any, inner)?,
                (known, _) => conforms(known, inner)?,
            }
        }
    }
    for item in value.as_array().into_iter().flatten() {
        conforms(&schema["items"], item)?;
    }
    if let Some(ways) = schema["oneOf"].as_array() {
        let fit = ways.iter().filter(|w| conforms(w, value).is_ok()).count();
        return if fit == 1 { Ok(()) } else { Err(format!("{fit} of the alternatives fit")) };
    }
    Ok(())
}

#[test]
fn the_schema_agrees_with_the_parser() {
    let schema = keys::schema();
    let agrees = |text: &str, expected: bool| {
        let value: Value = serde_yaml::from_str(text).unwrap();
        let says = conforms(&schema, &value);
        assert_eq!((says.is_ok(), parse(text).is_ok()), (expected, expected), "{says:?}\n{text}");
    };
    agrees(FULL, true);
    let short = "name: a\ndomains: [web]\ntargets: [dr1]\n";
    agrees(&format!("{short}every: 5m\n"), true);
    for wrong in [
        "",
        "every: 5m\ncron: \"0 2 * * *\"\n",
        "every: 5m\nevry: 5m\n",
        "every: 5m\nkeep: {daily: many}\n",
        "every: 5m\nblackout: [{from: \"08:00\"}]\n",
        "every: 5m\nblackout: [{from: \"08:00\", to: \"09:00\", days: [monday]}]\n",
        "every: 5m\nhooks: {after_run: {timeout: 5s}}\n",
        "every: 5m\nwith_secrets: perhaps\n",
        "every: 5m\ncompression: hard\n",
        "every: 5m\ncompression: 0\n",
        "every: 5m\nbandwidth: {times: [{from: \"08:00\", to: \"18:00\"}]}\n",
    ] {
        agrees(&format!("{short}{wrong}"), false);
    }
    agrees("name: a\ndomains: [web]\nevery: 5m\n", false);
}

/// A word of ours, whatever other dialects of YAML take it for.
#[test]
fn no_is_a_word() {
    let policy = parse("name: x\ndomains: [a]\ntargets: [dr1]\nevery: 5m\nquiesce: {wish: no}\n").unwrap();
    assert_eq!(policy.quiesce, Quiesce::default());
}

#[test]
fn two_policies_of_one_name_are_found() {
    let one = parse("name: a\ndomains: [web]\ntargets: [dr1]\nevery: 5m\n").unwrap();
    let other = Policy { file: "q.yaml".into(), ..one.clone() };
    let e = no_name_twice(&[one, other]).unwrap_err().to_string();
    assert!(e.contains("p.yaml") && e.contains("q.yaml"), "{e}");
}
