//! The units that we ship, under a real systemd: it boots in a container whose root is this machine's own, with
//! everything that is written there thrown away. Needs root and systemd-nspawn; `make setup` installs it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long the container may take, from boot to power-off; it takes some 20 s.
const BOUND: Duration = Duration::from_secs(110);

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// This machine's root with a layer of its own above it.
struct Root(tempfile::TempDir);

impl Root {
    fn mount() -> Root {
        // The upper layer of an overlay must not lie on an overlay.
        let root = Root(tempfile::tempdir_in("/dev/shm").unwrap());
        for dir in ["upper", "work", "root"] {
            fs::create_dir(root.0.path().join(dir)).unwrap();
        }
        let at = |dir: &str| root.0.path().join(dir).display().to_string();
        let options = format!("lowerdir=/,upperdir={},workdir={}", at("upper"), at("work"));
        run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(root.path()));
        root
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("root")
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        run(Command::new("umount").arg("--lazy").arg(self.path()));
    }
}

/// What `tests/it/units/inside` found.
fn boot(root: &Root) -> BTreeMap<String, String> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let unit = fs::read_to_string(repository.join("packaging/virt-replica.service")).unwrap();
    root.write("etc/systemd/system/virt-replica.service", &unit);
    root.write("units/log", "");
    fs::copy(repository.join("tests/it/units/inside"), root.path().join("units/inside")).unwrap();
    let binary = concat!(env!("CARGO_BIN_EXE_virt-replica"), ":/usr/bin/virt-replica");
    root.write(
        "etc/systemd/system/vr-units.service",
        "[Unit]\nAfter=basic.target\nWants=basic.target\n\
         [Service]\nType=oneshot\nExecStart=/units/inside\nExecStopPost=/bin/systemctl --no-block poweroff\n",
    );
    let _ = fs::remove_file(root.path().join("etc/machine-id"));
    let mut container = Command::new("systemd-nspawn")
        .env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1")
        .args(["--quiet", "--register=no", "--keep-unit", "--private-network", "--kill-signal=SIGRTMIN+3"])
        .arg(format!("--bind-ro={binary}"))
        .args(["--machine", &format!("vr-units-{}", std::process::id()), "--boot", "--directory"])
        .arg(root.path())
        .arg("systemd.unit=vr-units.service")
        .stdin(Stdio::null())
        .stdout(fs::File::create(root.0.path().join("console")).unwrap())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let until = Instant::now() + BOUND;
    while container.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            // The container ends with its manager.
            container.kill().unwrap();
            container.wait().unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let read = |path: PathBuf| fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let result = read(root.path().join("units/result"));
    println!("{result}\n{}", read(root.path().join("units/log")));
    for file in ["drill.out", "forbidden.out"] {
        println!("{file}:\n{}", read(root.path().join("units").join(file)));
    }
    if !result.contains("done=yes") {
        println!("{}", read(root.0.path().join("console")));
    }
    result.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

#[test]
fn the_daemons_unit_keeps_its_promises_under_systemd() {
    let root = Root::mount();
    let found = boot(&root);
    let is = |name: &str, wanted: &str| {
        assert_eq!(found.get(name).map(String::as_str), Some(wanted), "{name}");
    };
    is("done", "yes");
    for (name, wanted) in [("good_start", "0"), ("good_state", "active"), ("good_result", "success")] {
        is(name, wanted);
    }
    // A wrong configuration is `failed`, at once and for good, and somebody is told.
    for what in ["config", "policy"] {
        is(&format!("{what}_start"), "1");
        is(&format!("{what}_state"), "failed");
        is(&format!("{what}_code"), "78");
        is(&format!("{what}_restarts"), "0");
        is(&format!("{what}_listed"), "1");
        is(&format!("{what}_alarm"), "yes");
    }
    // A drill finds what it needs, and nothing more is open.
    for (name, wanted) in [("drill_start", "0"), ("drill_address", "192.0.2.1/24"), ("forbidden_start", "0")] {
        is(name, wanted);
    }
    is("forbidden", "0");
}
