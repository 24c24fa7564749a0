//! The operator's programs around the freeze: when they are run, what they are told, and that whoever was told to wait
//! is told to go on when the run dies in between.

use crate::domain::{Disk, Domain};
use crate::support::{Host, Lab, PATIENCE, SyncResult, eventually};
use std::time::Duration;

/// A program on host a that writes down its event, and where the first disk of the domain lies at that moment.
struct Hooks {
    dir: String,
}

const SCRIPT: &str = "#!/bin/sh\n\
    echo \"$VIRT_REPLICA_EVENT $VIRT_REPLICA_DOMAIN $1\" >> \"$2/log\"\n\
    [ ! -e \"$2/fail-$VIRT_REPLICA_EVENT\" ]\n";

impl Hooks {
    fn of(vm: &Domain) -> Hooks {
        let dir = vm.shared();
        let words = "printf %s \"$2\" > \"$1/hook\"; chmod 755 \"$1/hook\"";
        Host::A.script(words, &[&dir, SCRIPT]);
        Hooks { dir }
    }

    /// The options of a run that has both.
    fn options(&self) -> Vec<String> {
        let words = |option: &str| {
            [format!("{}/hook", self.dir), "an argument".to_owned(), self.dir.clone()]
                .map(|word| [option.to_owned(), word])
                .concat()
        };
        [words("--before-freeze"), words("--after-freeze")].concat()
    }

    /// The events since the last question.
    fn events(&self, vm: &Domain) -> Vec<String> {
        let path = format!("{}/log", self.dir);
        let log = Host::A.script("cat \"$1\" 2>/dev/null || true; rm -f \"$1\"", &[&path]);
        let told = format!(" {} an argument", vm.name);
        log.lines().map(|l| l.strip_suffix(&told).unwrap_or_else(|| panic!("{l:?}")).to_owned()).collect()
    }

    fn fails(&self, event: &str, fails: bool) {
        let what = if fails { "touch" } else { "rm" };
        Host::A.ok(&[what, &format!("{}/fail-{event}", self.dir)]);
    }

    fn owed(vm: &Domain) -> bool {
        vm.record().with_file_name("after-freeze.json").exists()
    }
}

fn sync(vm: &Domain, failpoint: &str, options: &[String]) -> SyncResult {
    vm.sync_with(failpoint, &options.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn hooks_stand_around_the_freeze_by_either_way() {
    let lab = Lab::get();
    let vm = lab.domain("hooked").disk(Disk::qcow2("16M")).running();
    let hooks = Hooks::of(&vm);
    for way in ["overlay", "backup"] {
        let options = [hooks.options(), vec!["--capture".into(), way.into()]].concat();
        let run = sync(&vm, "", &options).sealed();
        assert_eq!(hooks.events(&vm), ["before_freeze", "after_freeze"], "{way}");
        assert_eq!(run.report["warnings"].as_array().map(Vec::len), Some(0), "{way}: {:#}", run.report);

        hooks.fails("before_freeze", true);
        let refused = sync(&vm, "", &options).failed(1).says(&["the hook before the freeze", "exit status: 1"]);
        assert!(refused.step() <= 3, "{way}: nothing was frozen");
        assert_eq!(hooks.events(&vm), ["before_freeze", "after_freeze"], "{way}");
        hooks.fails("before_freeze", false);

        hooks.fails("after_freeze", true);
        let warned = sync(&vm, "", &options).sealed();
        assert!(warned.report["warnings"].to_string().contains("the hook after the freeze"), "{:#}", warned.report);
        hooks.fails("after_freeze", false);
        hooks.events(&vm);
        assert!(!Hooks::owed(&vm), "{way}");
        vm.assert_home();
    }
    // Nothing has to wait in a domain that is off.
    vm.virsh(&["destroy"]);
    sync(&vm, "", &hooks.options()).sealed();
    assert_eq!(hooks.events(&vm), [""; 0]);
}

/// Killed between the two: the dead-man runs the second, without any further command.
#[test]
fn a_run_that_dies_between_its_hooks() {
    let lab = Lab::get();
    let vm = lab.domain("hookless").disk(Disk::qcow2("16M")).running();
    let hooks = Hooks::of(&vm);
    sync(&vm, "", &hooks.options()).sealed();
    hooks.events(&vm);
    for (point, way) in
        [("3d.owed", "overlay"), ("3d", "overlay"), ("4d", "overlay"), ("4g", "overlay"), ("3d", "backup")]
    {
        let why = format!("killed at {point}, by {way}");
        eprintln!("{why}");
        let options = [hooks.options(), vec!["--capture".into(), way.into()]].concat();
        sync(&vm, &format!("{point}=kill"), &options).exit(137);
        eventually(&format!("{why}: the second hook was run"), Duration::from_secs(12), || {
            (!Hooks::owed(&vm)).then_some(())
        });
        let before: &[&str] = if point == "3d.owed" { &[] } else { &["before_freeze"] };
        assert_eq!(hooks.events(&vm), [before, &["after_freeze"]].concat(), "{why}");
        Host::A.virt_replica(&["doctor", &vm.name, "--repair"]).success();
        assert_eq!(hooks.events(&vm), [""; 0], "{why}: once is enough");
        vm.assert_home();
        sync(&vm, "", &options).sealed();
        assert_eq!(hooks.events(&vm), ["before_freeze", "after_freeze"], "{why}");
    }
    // Both die, driver and dead-man, as in a power cut: doctor says so, and the next run pays.
    let words: Vec<String> = hooks.options();
    let job = vm.start_sync("3d=sleep:60000", &words.iter().map(String::as_str).collect::<Vec<_>>());
    eventually("the first hook was run", PATIENCE, || {
        (Host::A.run(&["test", "-s", &format!("{}/log", hooks.dir)]).code == 0).then_some(())
    });
    let both = "driver=$(pgrep -f \"^virt-replica sync $1\"); kill -9 $(pgrep -P $driver -f ' deadman ') $driver";
    Host::A.script(both, &[&vm.name]);
    assert_eq!(job.wait(PATIENCE).code, 137);
    assert!(Hooks::owed(&vm));
    Host::A.virt_replica(&["doctor", &vm.name]).exit(1).says(&["the hook before the freeze was run"]);
    assert_eq!(hooks.events(&vm), ["before_freeze"], "doctor only looks");
    sync(&vm, "", &words).sealed();
    assert_eq!(hooks.events(&vm), ["after_freeze", "before_freeze", "after_freeze"]);
    vm.assert_home();
}
