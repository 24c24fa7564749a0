//! Images of its own for a domain that was brought up on host b for good, while its guest writes; with kill -9 at every
//! numbered step (docs/recovery.md), and the same command after it.

use super::crash_drill::Drills;
use super::crash_failover::{OnB, lost_after_two_points};
use super::domain::{Disk, Domain};
use super::support::{Host, Lab, STORE};

fn backing(image: &str) -> String {
    let info = Host::B.output(&["qemu-img", "info", "-U", "--output=json", image]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON of qemu-img");
    info["backing-filename"].as_str().unwrap_or("none").to_owned()
}

fn leases(vm: &Domain) -> usize {
    let points = Host::B.virt_replica(&["points", &vm.name, "--to", STORE, "--json"]).success();
    let points: serde_json::Value = serde_json::from_str(&points.stdout).expect("JSON");
    // A command that was killed leaves one of its own, for ten minutes.
    points["leases"].as_array().expect("a list of leases").iter().filter(|l| l["purpose"] == "failover").count()
}

#[test]
fn a_detaching_killed_at_each_step_is_finished_by_the_same_command() {
    let lab = Lab::get();
    let vm =
        lab.domain("crash-detach").disk(Disk::ext4("64M", "qcow2")).disk(Disk::ext4("64M", "raw")).guest().running();
    let (acked, b, there) = lost_after_two_points(&vm);
    let name = vm.name.as_str();
    b.run("", &["detach", name]).exit(4).says(&["reads no point"]);
    b.run("", &["failover", name, "--unplanned", "--source-is-dead"]).success();
    b.run("", &["detach", name]).exit(1).says(&["--commit"]);
    b.run("", &["failover", name, "--commit"]).success();

    let detach = ["detach", name, "--json"];
    // Twice: a step for each disk.
    for step in ["g1", "g2", "g2", "g3", "g4", "g5"] {
        b.run(&format!("{step}=kill"), &detach).exit(137);
        match step {
            "g5" => drop(b.run("", &["doctor", name]).success()),
            _ => drop(b.run("", &["doctor", name]).exit(1).says(&["detaching", "virt-replica detach"])),
        }
        let expected = usize::from(!["g4", "g5"].contains(&step));
        assert_eq!(leases(&vm), expected, "{step}: the point is let go before its time, or stays held");
    }
    b.run("", &detach).exit(4);
    let images = ["vda", "vdb"].map(|disk| format!("{}/{disk}.qcow2", there.overlays()));
    for image in &images {
        assert_eq!(backing(image), "none");
    }
    // Nothing of it holds the replica any more; but who is of an older generation stays outside.
    vm.sync_with("", &[]).failed(1).says(&["generation 2", "generation 1"]);
    Host::B.virt_replica(&["verify", name, "--to", STORE]).success();

    // The guest has written all the while, and boots from what it has now.
    there.writes(&images[0]);
    Host::B.ok(&["virsh", "-q", "destroy", name]);
    for image in &images {
        Host::B.ok(&["qemu-img", "check", "-q", image]);
    }
    let lines = Host::B.output(&["/lab/tools/guest", "lines", &images[0], "qcow2"]).lines().count() as u64;
    assert!(lines > acked, "line {acked} was acknowledged before the freeze, b has {lines}");
    Host::B.ok(&["virsh", "-q", "start", name]);
}

#[test]
fn a_domain_that_is_off_gets_images_of_its_own_and_the_next_failover_leaves_them_alone() {
    let lab = Lab::get();
    let vm = lab.domain("detach-off").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).off();
    vm.sync().sealed();
    let (b, there) = (Drills::of(&vm), OnB(&vm));
    let name = vm.name.as_str();
    let up = ["failover", name, "--unplanned", "--source-is-dead", "--json"];
    b.run("", &up).success();
    b.run("", &["failover", name, "--commit"]).success();
    Host::B.ok(&["virsh", "-q", "destroy", name]);
    b.run("", &["detach", name]).success().says(&["images of its own"]);
    let image = format!("{}/vda.qcow2", there.overlays());
    assert_eq!(backing(&image), "none");
    Host::B.ok(&[
        "bash",
        "-c",
        r#"qemu-io -c 'read -P 0x11 1M 3M' "$1" | grep -v -q 'verification failed'"#,
        "x",
        &image,
    ]);

    // The domain that lives here now can be replicated from here; and what a failover of its replica lays is laid
    // elsewhere.
    Host::B.ok(&["virsh", "-q", "undefine", name]);
    b.run("", &up).success().says(&["vr-failover-", ".2"]);
    assert!(there.runs());
    Host::B.ok(&["test", "-s", &image]);
    b.run("", &["failover", name, "--undo", "--lose-its-writes"]).success();
    Host::B.ok(&["test", "-s", &image]);
}
