//! Policies: what is wrong with them, what they mean, when they are due.

use super::*;

/// A directory as /etc/virt-replica, with one target and these policies.
fn configured(policies: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("virt-replica.yaml"), "targets: {dr1: {url: ssh://dr1}}\n").unwrap();
    std::fs::create_dir(dir.path().join("policies.d")).unwrap();
    for (name, text) in policies {
        std::fs::write(dir.path().join("policies.d").join(name), text).unwrap();
    }
    dir
}

fn policy(dir: &TempDir, args: &[&str]) -> Output {
    let config = dir.path().join("virt-replica.yaml");
    let mut command = program();
    command.arg("--config").arg(config).arg("policy").args(args);
    command.output().expect("the program starts")
}

/// Not only the first mistake; each with its place, its line and the way out.
#[test]
fn policy_check_says_everything_that_is_wrong() {
    let dir = configured(&[
        ("a.yaml", "name: a\ndomains: [web01]\ntargets: [dr1]\nevery: 5m\n"),
        ("b.yaml", "name: b\ndomains: [web01]\ntargets: [dr2]\nevery: 5m\n"),
        ("c.yaml", "name: c\ndomains: [web01]\ntargets: [dr1]\nevry: 5m\n"),
        ("notes.txt", "no policy"),
    ]);
    let output = policy(&dir, &["check"]);
    expect_code(&output, 78);
    let text = stderr(&output).replace(&format!("{}/policies.d/", dir.path().display()), "");
    check("policy-check.txt", &text);
    std::fs::remove_file(dir.path().join("policies.d/b.yaml")).unwrap();
    std::fs::remove_file(dir.path().join("policies.d/c.yaml")).unwrap();
    let output = policy(&dir, &["check"]);
    expect_code(&output, 0);
    assert!(stdout(&output).ends_with("a.yaml: a is right\n"), "{}", stdout(&output));
}

#[test]
fn policy_show_writes_out_every_default() {
    let dir = configured(&[("a.yaml", "name: a\ndomains: [web01]\ntargets: [dr1]\nevery: 5m\nkeep: {daily: 7}\n")]);
    std::fs::write(
        dir.path().join("virt-replica.yaml"),
        "targets: {dr1: {url: ssh://dr1}}\ndefaults: {overlay_dir: /srv/overlays}\n",
    )
    .unwrap();
    let output = policy(&dir, &["show", "a"]);
    expect_code(&output, 0);
    check("policy-show.txt", &stdout(&output).replace(&dir.path().display().to_string(), "ETC"));
    expect_code(&policy(&dir, &["show", "b"]), 4);
}

#[test]
fn policy_schema_is_json() {
    let output = policy(&configured(&[]), &["schema"]);
    expect_code(&output, 0);
    let schema: Value = serde_json::from_str(&stdout(&output)).unwrap();
    for kind in [0, 1] {
        assert_eq!(schema["oneOf"][kind]["properties"]["rpo"]["type"], "string");
    }
}

/// libvirt's test driver has one domain, `test`, with a UUID that never changes: so the times never change either.
#[cfg(feature = "libvirt")]
#[test]
fn policy_next_says_when_in_local_time() {
    let nightly = "name: n\ndomains: [test]\ntargets: [dr1]\ncron: \"30 2 * * *\"\ntimezone: Europe/Berlin\n";
    let dir = configured(&[("n.yaml", nightly)]);
    let state = dir.path().join("state").display().to_string();
    let common = ["--connect", "test:///default", "--state-dir", &state, "next", "--at", "2026-10-24T12:00:00Z"];
    let output = policy(&dir, &[&common[..], &["--count", "3"]].concat());
    expect_code(&output, 0);
    check("policy-next.txt", &stdout(&output));
    let output = policy(&dir, &[&common[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(json["next"][0]["at"][0], "2026-10-25T00:30:00Z", "{json}");
    assert_eq!(json["next"][0]["target"], "ssh://dr1");
    expect_code(&policy(&dir, &[&common[..], &["nobody"]].concat()), 4);
}

/// Who is meant twice is said with both files; who is meant and is not there is a warning.
#[cfg(feature = "libvirt")]
#[test]
fn policy_check_asks_libvirt_who_is_meant() {
    let dir = configured(&[
        ("a.yaml", "name: a\ndomains: [test, ghost]\ntargets: [dr1]\nevery: 5m\n"),
        ("b.yaml", "name: b\ndomains: [\"*\"]\ntargets: [dr1]\nevery: 5m\n"),
    ]);
    let output = policy(&dir, &["--connect", "test:///default", "check", "--domains"]);
    expect_code(&output, 78);
    let said = stderr(&output);
    assert!(said.contains("'ghost' is no domain of this host"), "{said}");
    assert!(said.contains("a.yaml") && said.contains("b.yaml") && said.contains("domain 'test'"), "{said}");
}
