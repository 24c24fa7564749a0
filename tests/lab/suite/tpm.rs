//! The state of an emulated TPM: with the points to host b, into a drill, through a failover, and home again.

use super::consistency::attachment;
use super::crash_drill::Drills;
use super::crash_failback::{AtHome, HOME, on};
use super::domain::{Disk, Domain};
use super::handover::Traveller;
use super::support::{Host, Lab, STORE, TARGET, shared_file};

/// libvirt leaves the state of this one behind when its domain goes.
const TPM: &str = "<tpm model='tpm-crb'><backend type='emulator' version='2.0' persistent_state='yes'/></tpm>";

/// libvirt's secret for an encrypted one.
const SECRET: &str = "0f5e8e1c-7b1d-4b6e-9a59-0b5d6a1c2e3f";
const ENCRYPTED: &str = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'>\
    <encryption secret='0f5e8e1c-7b1d-4b6e-9a59-0b5d6a1c2e3f'/></backend></tpm>";

/// Where libvirt keeps the state for the domain of this UUID.
fn dir(uuid: &str) -> String {
    format!("/var/lib/libvirt/swtpm/{uuid}")
}

fn state(host: Host, vm: &Domain) -> Vec<u8> {
    let path = host.file(format!("{}/tpm2/tpm2-00.permall", dir(&vm.uuid)));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What no two TPMs have alike: the public key in the certificate that was made with the TPM, behind the name of its
/// domain.
fn identity(vm: &Domain, state: &[u8]) -> Vec<u8> {
    let name = format!("{}:{}", vm.name, vm.uuid).into_bytes();
    let at = state.windows(name.len()).position(|w| w == name).expect("the state has its certificate") + name.len();
    state[at..at + 280].to_vec()
}

/// What the newest point has of it.
fn sealed(vm: &Domain) -> Vec<u8> {
    vm.sync().sealed();
    let head = vm.head();
    assert!(head["attachments"].as_array().unwrap().contains(&"tpm".into()), "{head:#}");
    attachment(vm, &head, "tpm.permall")
}

/// The same, of a domain that is off: nothing changes it meanwhile.
fn sealed_while_off(vm: &Domain) -> Vec<u8> {
    vm.virsh(&["destroy"]);
    let own = state(Host::A, vm);
    assert!(sealed(vm) == own, "the state is not the source's");
    own
}

#[test]
fn the_state_of_a_tpm_is_in_drills_and_failovers_and_comes_home_changed() {
    let lab = Lab::get();
    let vm = lab.domain("tpm").disk(Disk::qcow2("16M")).devices(TPM).running();
    let (b, t, home) = (Drills::of(&vm), Traveller::of(&vm), AtHome(&vm));
    let name = vm.name.as_str();
    assert_eq!(identity(&vm, &sealed(&vm)), identity(&vm, &state(Host::A, &vm)));
    let own = sealed_while_off(&vm);
    let ready = Drills::report(&b.run("", &["ready", name, "--json"]).success());
    let tpm = ready["findings"].as_array().unwrap().iter().find(|f| f["question"] == "tpm").expect("an answer");
    assert_eq!(tpm["color"], "green", "{ready:#}");
    assert!(!ready.to_string().contains("begins empty"), "{ready:#}");

    // A drill has a copy of it, under its own UUID, and leaves none.
    let script = format!(
        "#!/bin/bash\necho $VIRT_REPLICA_DRILL_UUID >{0}/drill-uuid; cp {1}/tpm2/tpm2-00.permall {0}/drill-tpm\n",
        vm.shared(),
        dir("$VIRT_REPLICA_DRILL_UUID"),
    );
    let probe = format!("{}/probe", vm.shared());
    Host::B.script("printf %s \"$1\" >\"$2\"; chmod 755 \"$2\"", &[&script, &probe]);
    let probe = format!("script:{probe}");
    let drill = Drills::report(&b.run("", &["drill", name, "--probe", &probe, "--json"]).success());
    assert_eq!(drill["outcome"], "passed", "{drill:#}");
    let kept = |file: &str| std::fs::read(shared_file(&format!("{name}/{file}"))).unwrap();
    assert_eq!(identity(&vm, &kept("drill-tpm")), identity(&vm, &own));
    let drill_uuid = String::from_utf8(kept("drill-uuid")).unwrap();
    assert_ne!(drill_uuid.trim(), vm.uuid);
    Host::B.ok(&["test", "!", "-e", &dir(drill_uuid.trim())]);

    // Also of one that was cut short.
    for step in ["d2", "d4"] {
        b.run(&format!("{step}=kill"), &["drill", name, "--probe", &probe, "--json"]).exit(137);
        let record = Host::B.script("cat \"$1\"/state/recovery/drills/*/record.json", &[&vm.shared()]);
        let record: serde_json::Value = serde_json::from_str(&record).expect("the record of one drill");
        let copy = dir(record["drill_uuid"].as_str().unwrap());
        Host::B.ok(&["test", "-s", &format!("{copy}/tpm2/tpm2-00.permall")]);
        b.run("", &["doctor", name, "--repair"]).success();
        Host::B.ok(&["test", "!", "-e", &copy]);
    }

    // What an undone failover wrote is gone with it.
    let up = ["failover", name, "--unplanned", "--source-is-dead", "--json"];
    for step in ["f1", "f3", "f5"] {
        b.run(&format!("{step}=kill"), &up).exit(137);
    }
    b.run("", &up).success();
    assert!(t.there.runs());
    assert_eq!(identity(&vm, &state(Host::B, &vm)), identity(&vm, &own));
    b.run("", &["failover", name, "--undo", "--lose-its-writes"]).success();
    Host::B.ok(&["test", "!", "-e", &dir(&vm.uuid)]);

    // Nobody's state is replaced by accident.
    Host::B.ok(&["mkdir", "-p", &dir(&vm.uuid)]);
    b.run("", &up).exit(1).says(&["is here already", "move it away"]);
    Host::B.ok(&["rmdir", &dir(&vm.uuid)]);

    // Planned, and changed there: swtpm's own tool writes other banks into it.
    vm.virsh(&["start"]);
    on(Host::A, "", &["failover", name, "--to", TARGET, "--timeout", "1s", "--force-off"]).success();
    Host::B.ok(&["virsh", "-q", "destroy", name]);
    let other_banks = r#"exec setpriv --reuid tss --regid tss --clear-groups \
        swtpm_setup --tpm2 --tpmstate "$1/tpm2" --reconfigure --pcr-banks sha1"#;
    Host::B.script(other_banks, &[&dir(&vm.uuid)]);
    let changed = state(Host::B, &vm);
    assert!(changed != own && identity(&vm, &changed) == identity(&vm, &own));
    on(Host::B, "", &["failover", name, "--commit"]).success();
    on(Host::B, "", &["failback", name, "--to", HOME, "--home-loses"]).success();
    let points = Host::A.json(&["points", name, "--to", STORE, "--json"]);
    let points = points["points"].as_array().unwrap();
    let [gave_way, came] = [&points[0], &points[points.len() - 1]].map(|point| {
        let id = point["id"].as_str().unwrap();
        std::fs::read(Host::A.file(format!("{STORE}/replicas/{}/points/{id}/tpm.permall", vm.uuid))).unwrap()
    });
    assert!(came == changed, "what was written on b is not what came home");
    assert!(gave_way != changed && identity(&vm, &gave_way) == identity(&vm, &own), "home kept what it had");
    assert_eq!((vm.state().as_str(), identity(&vm, &state(Host::A, &vm))), ("running", identity(&vm, &own)));
    Host::B.ok(&["test", "!", "-e", &dir(&vm.uuid)]);
    drop((t, home));
}

/// libvirt keeps the key; only with the same one can swtpm read the state.
#[test]
fn the_encrypted_state_of_a_tpm_needs_its_secret_on_the_target() {
    let lab = Lab::get();
    let define = r#"printf '<secret ephemeral="no" private="yes"><uuid>%s</uuid><usage type="vtpm"><name>vr-lab</name></usage></secret>' "$1" >/tmp/secret.xml
        virsh -q secret-define /tmp/secret.xml
        printf %s c2VjcmV0IG9mIHRoZSBsYWI= >/tmp/secret; virsh -q secret-set-value "$1" --file /tmp/secret"#;
    Host::A.script(define, &[SECRET]);
    let vm = lab.domain("tpm-secret").disk(Disk::qcow2("16M")).devices(ENCRYPTED).running();
    let (b, t) = (Drills::of(&vm), Traveller::of(&vm));
    let own = sealed_while_off(&vm);
    let up = ["failover", &vm.name, "--unplanned", "--source-is-dead"];
    b.run("", &up).exit(1).says(&[SECRET, "virsh secret-define"]);
    Host::B.script(define, &[SECRET]);
    b.run("", &up).success();
    assert!(t.there.runs());
    // A state that the key does not open would have kept it from starting.
    assert_eq!(state(Host::B, &vm).len(), own.len());
    b.run("", &["failover", &vm.name, "--undo", "--lose-its-writes"]).success();
    for host in [Host::A, Host::B] {
        host.ok(&["virsh", "-q", "secret-undefine", SECRET]);
    }
}
