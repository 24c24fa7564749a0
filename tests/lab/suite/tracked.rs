//! A domain whose dirty bitmaps are looked at: what the tests of changed-block tracking stand on.
//!
//! It has no guest OS. Every disk is written to through its live device (or, off, through `qemu-io`): data at new and
//! at old places, a part of a block, zeros, a discard. Whatever was done between two runs, the head has to equal the
//! disks bit for bit, by whichever mode it was made, and one bitmap of ours for each disk and target is left.

use super::domain::{Builder, Disk, Domain};
use super::support::{Host, Lab, SyncResult};
use serde_json::{Value, json};

/// One of a disk's bitmaps, as the running QEMU has it or as it lies in the image.
#[derive(Debug, Clone, PartialEq)]
pub struct Bitmap {
    pub name: String,
    pub recording: bool,
    pub sound: bool,
    pub dirty_bytes: u64,
}

/// A domain that is written to.
pub struct Tracked {
    pub vm: Domain,
    ticks: u64,
    size: u64,
}

/// Bytes of each disk of [`Tracked::pair`].
const SIZE: u64 = 64 << 20;

impl Tracked {
    /// vda on qcow2 and vdb on raw, running, with some data and a first point.
    pub fn pair(lab: &Lab, name: &str) -> Tracked {
        Tracked::with(lab, name, &[Disk::qcow2("64M"), Disk::raw("64M")])
    }

    pub fn with(lab: &Lab, name: &str, disks: &[Disk]) -> Tracked {
        Tracked::of(disks.iter().fold(lab.domain(name), |domain, disk| domain.disk(disk.clone())), |_| ())
    }

    /// A domain that was built otherwise; `edit` says what the test knows better.
    pub fn of(domain: Builder, edit: impl Fn(&mut Domain)) -> Tracked {
        let mut tracked = Tracked { vm: domain.running(), ticks: 0, size: SIZE };
        edit(&mut tracked.vm);
        tracked.write();
        tracked.vm.sync().sealed();
        tracked
    }

    /// A domain whose story the test tells alone, point and all.
    pub fn around(vm: Domain) -> Tracked {
        Tracked { vm, ticks: 0, size: SIZE }
    }

    /// `qemu-io` commands on the live devices, in one go.
    pub fn hmp(&self, commands: &[(usize, String)]) {
        let mut line = String::new();
        for (disk, command) in commands {
            let device = format!("/machine/peripheral/virtio-disk{disk}/virtio-backend");
            line += &format!("qemu-monitor-command {} --hmp 'qemu-io -d {device} \"{command}\"' ; ", self.vm.name);
        }
        let said = Host::A.output(&["virsh", "-q", line.trim_end_matches(" ; ")]);
        assert_eq!(said.trim(), "", "QEMU refused {commands:?}");
    }

    /// The next changes of one disk: never nothing, always different.
    fn changes(&mut self) -> Vec<String> {
        self.ticks += 1;
        let pattern = 1 + self.ticks % 255;
        let slot =
            |salt: u64| (self.ticks.wrapping_mul(2654435761).wrapping_add(salt * 7919) % (self.size >> 16)) << 16;
        vec![
            format!("write -z {} 128k", slot(1).min(self.size - (128 << 10))),
            format!("discard {} 64k", slot(2)),
            format!("write -P {pattern} {} 4k", slot(3) + 8192),
            // Always the same block, and one of its own.
            format!("write -P {pattern} 65536 64k"),
            format!("write -P {pattern} {} 64k", slot(4)),
            "flush".to_owned(),
        ]
    }

    /// Changes every disk through its live device.
    pub fn write(&mut self) {
        let commands: Vec<(usize, String)> = (0..self.vm.images.len())
            .flat_map(|disk| self.changes().into_iter().map(move |command| (disk, command)).collect::<Vec<_>>())
            .collect();
        self.hmp(&commands);
    }

    /// Changes every disk, the third through the device it got when it was plugged in.
    pub fn write_two(&mut self) {
        let all = std::mem::take(&mut self.vm.images);
        self.vm.images = all[..2].to_vec();
        self.write();
        self.vm.images = all;
        let id = self.qmp(json!({"execute": "query-block"}));
        let third =
            id.as_array().unwrap().iter().find(|b| b["inserted"]["file"] == self.vm.images[2].as_str()).unwrap();
        let device = third["qdev"].as_str().unwrap();
        let pattern = 1 + self.ticks % 255;
        let hmp = format!("qemu-io -d {device} \"write -P {pattern} 1M 128k\"");
        assert_eq!(self.vm.virsh(&["qemu-monitor-command", "--hmp", &hmp]).trim(), "");
    }

    /// Changes every disk of a domain that is off, with QEMU's own program, as its owner might.
    pub fn write_off(&mut self) {
        for disk in 0..self.vm.images.len() {
            let image = self.vm.images[disk].clone();
            let format = if image.ends_with(".raw") { "raw" } else { "qcow2" };
            let mut words = vec!["qemu-io".to_owned(), "-f".into(), format.into(), "-d".into(), "unmap".into()];
            words.extend(self.changes().into_iter().flat_map(|command| ["-c".to_owned(), command]));
            words.push(image);
            Host::A.ok(&words.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }

    fn is_off(&self) -> bool {
        self.vm.state() == "shut off"
    }

    /// All bitmaps of a disk's own image.
    #[track_caller]
    pub fn bitmaps(&self, disk: usize) -> Vec<Bitmap> {
        self.bitmaps_of(&self.vm.images[disk])
    }

    #[track_caller]
    pub fn bitmaps_of(&self, image: &str) -> Vec<Bitmap> {
        if self.is_off() {
            return stored(image);
        }
        let mut found: Vec<Bitmap> = Vec::new();
        for node in
            self.qmp(json!({"execute": "query-named-block-nodes", "arguments": {"flat": true}})).as_array().unwrap()
        {
            let here = file_of(node) == image;
            for bitmap in node["dirty-bitmaps"].as_array().filter(|_| here).into_iter().flatten() {
                let bitmap = Bitmap {
                    name: bitmap["name"].as_str().unwrap_or_default().to_owned(),
                    recording: bitmap["recording"] == true,
                    sound: bitmap["inconsistent"] != true,
                    dirty_bytes: bitmap["count"].as_u64().unwrap(),
                };
                if !bitmap.name.is_empty() && !found.contains(&bitmap) {
                    found.push(bitmap);
                }
            }
        }
        found
    }

    /// Names of our bitmaps on a disk's own image.
    #[track_caller]
    pub fn ours(&self, disk: usize) -> Vec<String> {
        self.bitmaps(disk).into_iter().map(|b| b.name).filter(|n| n.starts_with("vr-")).collect()
    }

    /// QEMU's node that interprets a disk's own image.
    #[track_caller]
    pub fn node(&self, disk: usize) -> String {
        let nodes = self.qmp(json!({"execute": "query-named-block-nodes", "arguments": {"flat": true}}));
        let image = &self.vm.images[disk];
        let format = if image.ends_with(".raw") { "raw" } else { "qcow2" };
        let nodes = nodes.as_array().unwrap().iter();
        let mut own = nodes.filter(|n| n["drv"] == format && file_of(n) == *image);
        own.next().expect("the disk has a node")["node-name"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub fn qmp(&self, command: Value) -> Value {
        let reply = self.vm.virsh(&["qemu-monitor-command", &command.to_string()]);
        let reply: Value = serde_json::from_str(&reply).unwrap();
        assert!(reply["error"].is_null(), "{command}: {reply}");
        reply["return"].clone()
    }

    /// A run that seals, with these modes by disk; the head is what the disks hold, and nothing is left but what
    /// belongs.
    #[track_caller]
    pub fn sealed_by(&self, modes: &[&str]) -> SyncResult {
        let result = self.vm.sync().sealed();
        self.check(&result, modes);
        result
    }

    #[track_caller]
    pub fn check(&self, result: &SyncResult, modes: &[&str]) {
        let was: Vec<&str> = (0..self.vm.images.len()).map(|disk| result.mode(disk_name(disk))).collect();
        assert_eq!(was, modes, "{:#}", result.report);
        self.vm.compare_with_head();
        self.vm.assert_home();
        self.check_one_each(1);
    }

    /// `targets` bitmaps of ours on every disk that can have one, recording and sound.
    #[track_caller]
    pub fn check_one_each(&self, targets: usize) {
        for disk in 0..self.vm.images.len() {
            let ours: Vec<Bitmap> = self.bitmaps(disk).into_iter().filter(|b| b.name.starts_with("vr-")).collect();
            let expected = if self.is_off() && self.vm.images[disk].ends_with(".raw") { 0 } else { targets };
            assert_eq!(ours.len(), expected, "disk {disk}: {ours:?}");
            assert!(ours.iter().all(|b| b.recording && b.sound), "disk {disk}: {ours:?}");
        }
    }

    /// The next run after another change is by bitmap again on every disk.
    #[track_caller]
    pub fn by_bitmap_again(&mut self) {
        self.write();
        let modes = vec!["bitmap"; self.vm.images.len()];
        let result = self.sealed_by(&modes);
        for disk in 0..self.vm.images.len() {
            assert!(result.bytes(disk_name(disk), "blocks_changed") > 0, "{:#}", result.report);
        }
        assert_eq!(result.report["warnings"], json!([]), "{:#}", result.report);
    }

    /// An orderly end, as a guest's own shutdown is: QEMU closes its images.
    pub fn shut_down(&self) {
        self.vm.virsh(&["destroy", "--graceful"]);
    }

    pub fn kill_qemu(&self) {
        Host::A.script("kill -9 \"$(cat /run/libvirt/qemu/\"$1\".pid)\"", &[&self.vm.name]);
        self.vm.wait_state("shut off");
    }

    pub fn start(&self) {
        self.vm.virsh(&["start"]);
    }
}

/// The file that a node of QEMU reads; one whose backing image was changed describes itself.
fn file_of(node: &Value) -> String {
    let file = node["file"].as_str().unwrap_or_default();
    let Some(described) = file.strip_prefix("json:") else { return file.to_owned() };
    let described: Value = serde_json::from_str(described).unwrap();
    described["file"]["filename"].as_str().unwrap_or_default().to_owned()
}

/// The bitmaps that lie in an image nobody has open.
#[track_caller]
fn stored(image: &str) -> Vec<Bitmap> {
    let info = Host::A.output(&["qemu-img", "info", "--output=json", image]);
    let info: Value = serde_json::from_str(&info).unwrap();
    let all = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    let has = |b: &Value, flag: &str| b["flags"].as_array().is_some_and(|flags| flags.iter().any(|f| f == flag));
    all.iter()
        .map(|b| Bitmap {
            name: b["name"].as_str().unwrap().to_owned(),
            recording: has(b, "auto"),
            sound: !has(b, "in-use"),
            dirty_bytes: 0,
        })
        .collect()
}

pub fn disk_name(disk: usize) -> &'static str {
    ["vda", "vdb", "vdc"][disk]
}

/// What a disk's report gives as its reason.
#[track_caller]
pub fn reason(result: &SyncResult, disk: &str) -> String {
    result.disk(disk)["reason"].as_str().expect("a disk has a reason").to_owned()
}

#[track_caller]
pub fn says(result: &SyncResult, disk: &str, words: &str) {
    assert!(reason(result, disk).contains(words), "{disk}: {}", reason(result, disk));
}
