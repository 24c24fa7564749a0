//! Commands of a target's operator after a source went wrong, and files that others may write.

use super::*;
use std::os::unix::fs::PermissionsExt;

fn set_generation(store: &StoreWithPoints, args: &[&str]) -> Output {
    let root = store.root();
    run(&[&["set-generation"][..], args, &["--root", root.to_str().unwrap()]].concat())
}

#[test]
fn a_generation_is_set_by_who_names_the_domain_twice() {
    let store = StoreWithPoints::new();
    for (args, said) in [
        (&["web01", "7"][..], "Add `--confirm web01` to the command"),
        (&["web01", "7", "--confirm", "web1"], "that is not the domain's name; nothing was changed"),
        (&["web01", "0", "--confirm", "web01"], "0 is not in 1..=1000000000"),
        (&["web01", "1000000001", "--confirm", "web01"], "is not in 1..=1000000000"),
    ] {
        let refused = set_generation(&store, args);
        expect_code(&refused, 2);
        assert!(stderr(&refused).contains(said), "{args:?}: {}", stderr(&refused));
    }
    expect_code(&set_generation(&store, &["web02", "7", "--confirm", "web02"]), 4);
    let manifest = store.root().join("replicas").join(UUID).join("manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    assert!(text.contains("\"generation\": 1"), "{text}");
    // As 0.1 left it.
    std::fs::write(&manifest, text.replace("\"generation\": 1", "\"generation\": 18446744073709551615")).unwrap();
    let broken = run(&["points", "web01", "--to", &store.target()]);
    assert!(!broken.status.success(), "{}", stdout(&broken));
    for name in ["web01", UUID] {
        let done = set_generation(&store, &[name, "7", "--confirm", "web01", "--json"]);
        expect_code(&done, 0);
        let told: Value = serde_json::from_str(&stdout(&done)).unwrap();
        assert_eq!((told["domain"].as_str(), told["generation"].as_u64()), (Some("web01"), Some(7)));
    }
    expect_code(&run(&["points", "web01", "--to", &store.target()]), 0);
    let text = std::fs::read_to_string(&manifest).unwrap();
    assert_eq!(text.matches("\"generation\": 7").count(), 3, "{text}");
}

/// A directory with a configuration and a policy, all of it ours alone.
fn configured() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("virt-replica.yaml");
    std::fs::create_dir(dir.path().join("policies.d")).unwrap();
    std::fs::write(&config, "targets:\n  dr: {url: /srv/dr}\n").unwrap();
    let policy = "name: p\ndomains: [\"*\"]\ntargets: [dr]\nevery: 1h\n";
    std::fs::write(dir.path().join("policies.d/p.yaml"), policy).unwrap();
    (dir, config)
}

#[test]
fn what_others_may_write_is_not_obeyed() {
    let (dir, config) = configured();
    let check = || run(&["--config", config.to_str().unwrap(), "policy", "check"]);
    expect_code(&check(), 0);
    for (name, bad, good) in [
        ("virt-replica.yaml", 0o666, 0o644),
        ("policies.d/p.yaml", 0o664, 0o644),
        ("policies.d", 0o777, 0o755),
        ("", 0o777, 0o755),
    ] {
        let path = dir.path().join(name);
        let path = path.to_str().unwrap().trim_end_matches('/');
        let set = |mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        set(bad);
        let refused = check();
        expect_code(&refused, 78);
        let said = stderr(&refused);
        assert!(said.contains(&format!("mode {bad:04o}")) && said.contains(&format!("chmod go-w {path}")), "{said}");
        set(good);
        expect_code(&check(), 0);
    }
}

/// systemd does not try again what ends with 78 (`RestartPreventExitStatus=`): that has to be the daemon's own end.
#[cfg(feature = "libvirt")]
#[test]
fn a_daemon_with_a_wrong_configuration_ends_with_78() {
    let (dir, config) = configured();
    let daemon = || {
        let (state, socket) = (dir.path().join("state"), dir.path().join("socket"));
        let (state, socket) = (state.to_str().unwrap(), socket.to_str().unwrap());
        run(&["--config", config.to_str().unwrap(), "--state-dir", state, "daemon", "--control", socket])
    };
    std::fs::write(dir.path().join("policies.d/q.yaml"), "name: [\n").unwrap();
    expect_code(&daemon(), 78);
    std::fs::remove_file(dir.path().join("policies.d/q.yaml")).unwrap();
    std::fs::write(&config, "targets: [\n").unwrap();
    expect_code(&daemon(), 78);
    std::fs::remove_file(&config).unwrap();
    expect_code(&daemon(), 78);
}
