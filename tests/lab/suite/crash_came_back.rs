//! A file system that comes back under another number of its device, as after a boot of the host: loop devices, LVM,
//! multipath, NFS and btrfs give numbers out anew. Files are known again by inode and birth, whatever the number.

use super::domain::Disk;
use super::support::{Host, Lab, PATIENCE};

/// A file system of host a on a loop device of its own. Gone with the value.
struct FileSystem {
    image: String,
    at: String,
    device: String,
}

impl FileSystem {
    fn mounted(at: &str) -> FileSystem {
        let image = format!("/var/tmp/{}-{}.fs", at.rsplit('/').next().unwrap(), std::process::id());
        let script = "truncate -s 300M \"$1\"; mkfs.ext4 -q -F \"$1\" >&2; mkdir -p \"$2\"
            device=$(losetup --find --show \"$1\"); mount \"$device\" \"$2\"; chmod 777 \"$2\"; echo \"$device\"";
        let device = Host::A.script(script, &[&image, at]).trim().to_owned();
        FileSystem { image, at: at.to_owned(), device }
    }

    fn number(&self) -> String {
        Host::A.output(&["stat", "-c", "%d", &self.at])
    }

    /// Everything that had files open on it has died. The old device is given back last, or its number would be given
    /// out again.
    fn comes_back(&mut self) {
        let before = self.number();
        let script = "for _ in $(seq 100); do umount \"$1\" && break; sleep 0.05; done
            device=$(losetup --find --show \"$2\"); mount \"$device\" \"$1\"; losetup --detach \"$3\"; echo \"$device\"";
        self.device = Host::A.script(script, &[&self.at, &self.image, &self.device]).trim().to_owned();
        assert_ne!(self.number(), before);
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let script = "umount \"$1\"; losetup --detach \"$2\"; rm -rf \"$1\" \"$3\"";
        Host::A.run(&["bash", "-c", script, "x", &self.at, &self.device, &self.image]);
    }
}

/// The whole host dies while the domain stands on its overlays.
#[test]
fn a_domain_comes_home_from_overlays_on_a_file_system_that_came_back() {
    const ARGS: [&str; 2] = ["--min-free-source", "32M"];
    let lab = Lab::get();
    let mut fs = FileSystem::mounted(&format!("/mnt/cameback-{}", std::process::id()));
    let at = fs.at.clone();
    let there = |disk: Disk| disk.run(&format!("mv \"$1\" {at}/"));
    let edit = at.clone();
    let mut vm = lab
        .domain("cameback")
        .disk(there(Disk::qcow2("32M").then("write -P 0x11 0 1M")))
        .disk(there(Disk::raw("32M")))
        .xml(move |xml, dir| xml.replace(&format!("file='{dir}/"), &format!("file='{edit}/")))
        .paused();
    vm.images = vm.images.iter().map(|image| image.replace(&vm.dir, &at)).collect();
    vm.sync_with("", &ARGS).sealed();
    let mut run = vm.start_sync("5f=sleep:2000,5f=kill", &ARGS);
    run.wait_step(5);
    assert!(vm.live_images().iter().all(|image| image.contains(".vr-")), "it stands on overlays");
    for disk in [0, 1] {
        vm.write(disk, "-P 0x22 3M 64k");
        vm.flush(disk);
    }
    assert!(run.wait(PATIENCE).code >= 128, "the run was killed");
    vm.virsh(&["destroy"]);
    fs.comes_back();
    Host::A.virt_replica(&["doctor", &vm.name, "--repair"]).success();
    for (image, format) in vm.images.iter().zip(["qcow2", "raw"]) {
        Host::A.ok(&["qemu-io", "-f", format, "-c", "read -P 0x22 3M 64k", image]);
    }
    vm.start_paused();
    vm.sync_with("", &ARGS).sealed();
    vm.compare_with_head();
    vm.assert_home();
}

/// The redo file is the only way back from a torn image: it is known to be of this image, and ends what was begun.
#[test]
fn a_torn_image_is_mended_on_a_file_system_that_came_back() {
    let _lab = Lab::get();
    let mut fs = FileSystem::mounted(&format!("/mnt/torn-{}", std::process::id()));
    let (image, new) = (format!("{}/a.raw", fs.at), format!("{}/new.raw", fs.at));
    let script = "head -c 8M /dev/urandom >\"$1\"; cp \"$1\" \"$2\"
        for n in 1 2 3 4 5 6 7; do head -c 4K /dev/urandom | dd of=\"$2\" bs=4K seek=$((n * 251)) conv=notrunc; done";
    Host::A.script(script, &[&image, &new]);
    let words = ["virt-replica", "copy", &new, &image, "--atomic", "redo"];
    let killed = Host::A.command(&words).env("VIRT_REPLICA_FAILPOINT", "i1=kill").output().expect("run it");
    assert!(!killed.status.success(), "{killed:?}");
    // As far as a power cut let it come.
    Host::A.script("dd if=\"$1\" of=\"$2\" bs=1M count=4 conv=notrunc", &[&new, &image]);
    fs.comes_back();
    Host::A.virt_replica(&["copy", &image, &format!("{}/elsewhere.raw", fs.at)]).exit(1).says(&["torn"]);
    Host::A.virt_replica(&["apply", "--finish", &image]).success();
    Host::A.ok(&["cmp", &image, &new]);
    let left = Host::A.output(&["ls", "-A", &fs.at]);
    assert!(!left.contains("redo"), "{left}");
}
