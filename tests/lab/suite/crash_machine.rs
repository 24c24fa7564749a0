//! A machine whose every flushed write is remembered.
//!
//! It has no guest OS. Patterns are written through its devices by QEMU's monitor, flushed, and noted in a model;
//! whatever is killed, every noted pattern has to be readable afterwards, and [`Machine::check_settled`] says what else
//! has to hold.

use crate::crash_bench::{Driver, Ended, HELD_MAX, Lab, Script, text, wait_for, wait_within};
use crate::crash_qmp::Qmp;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Instant;

/// Where the machines' images lie in host a.
const IMAGES: &str = "/var/lib/libvirt/images";
/// Bytes of one pattern, and the distance between two.
const PATTERN_LEN: u64 = 64 << 10;
const SLOT_STRIDE: u64 = 1 << 20;
const SLOTS: u8 = 5;

/// libvirtd's process in a host, in the words of a shell; and to wait until it is gone and has let go of its pidfile.
const LIBVIRTD: &str = "$(cat /run/libvirtd.pid)";
const GONE: &str = "while kill -0 $(cat /run/libvirtd.pid) 2>/dev/null; do sleep 0.02; done";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub name: &'static str,
    pub image: String,
    pub format: &'static str,
}

/// (disk, slot) -> the pattern that was flushed there last.
pub type Model = BTreeMap<(usize, u8), u8>;

/// `….vr-RUN.qcow2`, retired or kept, or the scratch file of a backup; what somebody made on top and named after it is
/// theirs.
fn is_ours(name: &str) -> bool {
    let Some((_, rest)) = name.rsplit_once(".vr-") else { return false };
    matches!(rest.split_once('.'), Some((_, "qcow2" | "qcow2.retired" | "qcow2.kept" | "scratch.qcow2")))
}

/// A domain with two disks, one qcow2 and one raw, in host a.
pub struct Machine<'l> {
    pub lab: &'l Lab,
    pub name: String,
    pub uuid: String,
    pub disks: [Disk; 2],
    pub model: Model,
    /// The model as the newest point has it.
    pub sealed: Model,
    writes: u8,
    runs: u32,
}

impl<'l> Machine<'l> {
    /// Defined and running, with a first point at the target.
    pub fn replicated(lab: &'l Lab, name: &str) -> Machine<'l> {
        let mut machine = Machine::running(lab, name);
        machine.write();
        machine.check_next_sync("the first point");
        machine
    }

    pub fn running(lab: &'l Lab, name: &str) -> Machine<'l> {
        let machine = Machine::prepared(lab, name);
        lab.exec("a", &["virsh", "-q", "define", &format!("/lab/shared/{name}.xml")]);
        machine.virsh("start", &[]);
        machine
    }

    pub fn transient(lab: &'l Lab, name: &str) -> Machine<'l> {
        let machine = Machine::prepared(lab, name);
        lab.exec("a", &["virsh", "-q", "create", &format!("/lab/shared/{name}.xml")]);
        machine
    }

    fn prepared(lab: &'l Lab, name: &str) -> Machine<'l> {
        let disk = |disk, suffix: &str, format| Disk { name: disk, image: format!("{IMAGES}/{name}{suffix}"), format };
        let disks = [disk("vda", "-a.qcow2", "qcow2"), disk("vdb", "-b.raw", "raw")];
        for d in &disks {
            lab.exec("a", &["qemu-img", "create", "-q", "-f", d.format, &d.image, "32M"]);
        }
        let [a, b] = [0, 1].map(|i: usize| format!("{}:{}", disks[i].image, disks[i].format));
        let guest = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/guest");
        let xml = Command::new(guest)
            .args(["xml", name, "--no-os", "--memory", "32", "--disk", &a, "--disk", &b])
            .output()
            .unwrap();
        assert!(xml.status.success(), "{}", text(&xml));
        fs::write(lab.dir.join(format!("shared/{name}.xml")), &xml.stdout).unwrap();
        let xml = String::from_utf8(xml.stdout).unwrap();
        let uuid = xml.split("<uuid>").nth(1).unwrap().split('<').next().unwrap().to_owned();
        Machine {
            lab,
            name: name.to_owned(),
            uuid,
            disks,
            model: Model::new(),
            sealed: Model::new(),
            writes: 0,
            runs: 0,
        }
    }

    // --- virsh --------------------------------------------------------------------------------------------------

    pub fn virsh(&self, verb: &str, rest: &[&str]) -> String {
        self.lab.exec("a", &[&["virsh", "-q", verb, &self.name], rest].concat())
    }

    pub fn try_virsh(&self, verb: &str, rest: &[&str]) -> Output {
        self.lab.try_exec("a", &[&["virsh", "-q", verb, &self.name], rest].concat())
    }

    pub fn state(&self) -> String {
        self.virsh("domstate", &[]).trim().to_owned()
    }

    /// Disk -> image, as the live or the inactive definition says.
    pub fn images(&self, inactive: bool) -> BTreeMap<String, String> {
        let listed = self.virsh("domblklist", if inactive { &["--inactive"] } else { &[] });
        let pair = |line: &str| {
            let mut words = line.split_whitespace();
            Some((words.next()?.to_owned(), words.next()?.to_owned()))
        };
        listed.lines().filter_map(pair).collect()
    }

    fn own_images(&self) -> BTreeMap<String, String> {
        self.disks.iter().map(|d| (d.name.to_owned(), d.image.clone())).collect()
    }

    /// What of ours lies beside the images.
    pub fn overlays(&self) -> Vec<String> {
        let mut found: Vec<String> = fs::read_dir(self.lab.path("a", IMAGES))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n.starts_with(&format!("{}-", self.name)) && is_ours(n))
            .collect();
        found.sort();
        found
    }

    /// Overlays that still have their name.
    pub fn named_overlays(&self) -> Vec<String> {
        self.overlays().into_iter().filter(|n| n.ends_with(".qcow2")).collect()
    }

    fn state_dir(&self) -> PathBuf {
        self.lab.path("a", &format!("/var/lib/virt-replica/source/domains/{}", self.uuid))
    }

    pub fn record(&self) -> Option<String> {
        fs::read_to_string(self.state_dir().join("record.json")).ok()
    }

    /// The journal's record of an open run by backup.
    pub fn backup_record(&self) -> PathBuf {
        self.state_dir().join("backup.json")
    }

    /// When each retired overlay lost its name, in seconds: its inode's last change, by the file system's clock.
    pub fn retired_at(&self) -> Vec<f64> {
        use std::os::unix::fs::MetadataExt;
        let retired = self.overlays().into_iter().filter(|n| n.ends_with(".retired"));
        retired
            .map(|name| fs::metadata(self.lab.path("a", IMAGES).join(name)).unwrap())
            .map(|m| m.ctime() as f64 + m.ctime_nsec() as f64 / 1e9)
            .collect()
    }

    /// Removes what was set aside for a person, and says how much that was.
    pub fn take_kept(&self) -> usize {
        let kept: Vec<String> = self.overlays().into_iter().filter(|n| n.ends_with(".kept")).collect();
        for name in &kept {
            fs::remove_file(self.lab.path("a", IMAGES).join(name)).unwrap();
        }
        kept.len()
    }

    /// Takes the journal's directory away, as a lost disk would.
    pub fn lose_state(&self) {
        fs::remove_dir_all(self.state_dir()).unwrap();
    }

    pub fn record_in_metadata(&self) -> bool {
        self.try_virsh("metadata", &["https://virt-replica.org/xmlns/record/1"]).status.success()
    }

    // --- the guest's writes -------------------------------------------------------------------------------------

    fn hmp(&self, commands: &[(usize, String)]) -> String {
        let mut line = String::new();
        for (disk, command) in commands {
            let name = &self.name;
            let device = format!("/machine/peripheral/virtio-disk{disk}/virtio-backend");
            write!(line, "qemu-monitor-command {name} --hmp 'qemu-io -d {device} \"{command}\"' ; ").unwrap();
        }
        let said = self.lab.exec("a", &["virsh", "-q", line.trim_end_matches(" ; ")]);
        assert!(said.trim().is_empty(), "QEMU refused {commands:?}: {said}");
        said
    }

    fn log(&self) -> String {
        let bytes = fs::read(self.lab.path("a", &format!("/var/log/libvirt/qemu/{}.log", self.name)));
        String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
    }

    /// Runs commands of qemu-io on the live devices and returns what QEMU printed, once `done` such lines are there.
    fn qemu_io(&self, commands: &[(usize, String)], line: &str, done: usize) -> String {
        let before = self.log().len();
        self.hmp(commands);
        wait_for(&format!("{done} times {line:?} in the log of QEMU"), || {
            let said = self.log().split_off(before);
            (said.matches(line).count() >= done || said.contains("failed")).then_some(said)
        })
    }

    /// The next write: a new pattern to the slot that every write goes to, and to one of the others. What every overlay
    /// holds is thereby written again after every pivot, so that an overlay put over a newer base shows.
    fn next_write(&mut self) -> Vec<(usize, String)> {
        self.writes = self.writes.checked_add(1).expect("one machine has at most 255 writes");
        let pattern = self.writes;
        let mut commands = Vec::new();
        for disk in 0..self.disks.len() {
            for slot in [0, 1 + pattern % (SLOTS - 1)] {
                commands.push((disk, format!("write -P {pattern} {} {PATTERN_LEN}", u64::from(slot) * SLOT_STRIDE)));
                self.model.insert((disk, slot), pattern);
            }
            commands.push((disk, "flush".to_owned()));
        }
        commands
    }

    /// A new pattern on both disks, through the devices, flushed.
    #[track_caller]
    pub fn write(&mut self) {
        let commands = self.next_write();
        let said = self.qemu_io(&commands, "wrote 65536/65536 bytes", 2 * self.disks.len());
        assert!(!said.contains("failed"), "a write failed: {said}");
    }

    /// Writes once the disks stand on their overlays, so that there is something to commit.
    #[track_caller]
    pub fn write_to_overlays(&mut self, driver: &mut Driver) {
        driver.stands_at("4f");
        assert_eq!(self.named_overlays().len(), self.disks.len(), "overlays at 4f");
        self.write();
    }

    /// Fills MiB after MiB of a disk's end with data that is not noted: only bulk for a commit to copy.
    pub fn fill(&self, disk: usize, mib: u64) {
        let commands: Vec<(usize, String)> =
            (0..mib).map(|i| (disk, format!("write -P 255 {} 1M", (u64::from(SLOTS) + i) * SLOT_STRIDE))).collect();
        self.qemu_io(&commands, "wrote 1048576/1048576 bytes", commands.len());
    }

    /// Whether a pattern of the model is not on the live disk.
    pub fn lost(&self, disk: usize) -> bool {
        let commands: Vec<(usize, String)> = Self::reads(&self.model, disk).into_iter().map(|r| (disk, r)).collect();
        let before = self.log().len();
        self.hmp(&commands);
        let said = wait_for("all reads", || {
            let said = self.log().split_off(before);
            (said.matches("read 65536/65536 bytes").count() == commands.len()).then_some(said)
        });
        said.contains("Pattern verification failed")
    }

    /// A write with libvirtd away, by QEMU's own monitor.
    pub fn write_by(&mut self, qmp: &mut Qmp) {
        let before = self.log().len();
        for (disk, command) in self.next_write() {
            let line = format!("qemu-io -d /machine/peripheral/virtio-disk{disk}/virtio-backend \"{command}\"");
            qmp.ask("human-monitor-command", json!({ "command-line": line }));
        }
        wait_for("QEMU has written", || {
            (self.log().split_off(before).matches("wrote 65536/65536").count() == 2 * self.disks.len()).then_some(())
        });
    }

    /// QEMU's monitor, which only one may hold: libvirtd has to be dead.
    pub fn qmp(&self) -> Qmp {
        let qemu_pid = self.qemu_pid();
        let found = self.lab.sh("a", &format!("ls -d /var/lib/libvirt/qemu/domain-*-{}/monitor.sock", self.name));
        Qmp::connect(&self.lab.path("a", found.trim()), qemu_pid)
    }

    /// The number of the last block node that libvirtd noted; it counts on from there when it starts.
    pub fn node_index_noted(&self) -> u64 {
        let noted = self.lab.sh(
            "a",
            &format!("sed -n \"s/.*<nodename index='\\([0-9]*\\)'.*/\\1/p\" /run/libvirt/qemu/{}.xml", self.name),
        );
        noted.trim().parse().unwrap_or_else(|e| panic!("libvirt's notes: {e}: {noted:?}"))
    }

    /// A script in host a, running beside the test.
    pub fn start_script(&self, script: &str) -> Script {
        Script(self.lab.command(&["exec", "a", "bash", "-c", script]).spawn().unwrap())
    }

    fn reads(model: &Model, disk: usize) -> Vec<String> {
        let of_disk = model.iter().filter(|((d, _), _)| *d == disk);
        of_disk.map(|((_, slot), p)| format!("read -P {p} {} {PATTERN_LEN}", u64::from(*slot) * SLOT_STRIDE)).collect()
    }

    /// Every flushed pattern, read through the live devices.
    #[track_caller]
    pub fn check_live(&self, why: &str) {
        let commands: Vec<(usize, String)> = (0..self.disks.len())
            .flat_map(|disk| Self::reads(&self.model, disk).into_iter().map(move |r| (disk, r)))
            .collect();
        let said = self.qemu_io(&commands, "read 65536/65536 bytes", commands.len());
        assert!(!said.contains("failed"), "{why}: a flushed write is gone ({:?}): {said}", self.model);
    }

    /// Every pattern of the model, read from files nobody has open.
    #[track_caller]
    pub fn check_files(lab: &Lab, host: &str, files: &[(String, &str)], model: &Model, why: &str) {
        for (disk, (file, format)) in files.iter().enumerate() {
            let reads = Self::reads(model, disk);
            let mut args = vec!["qemu-io", "-r", "-f", format];
            args.extend(reads.iter().flat_map(|r| ["-c", r.as_str()]));
            args.push(file);
            let done = lab.try_exec(host, &args);
            let said = text(&done);
            let whole = said.matches("read 65536/65536 bytes").count() == reads.len();
            assert!(done.status.success() && whole && !said.contains("failed"), "{why}: {file}: {model:?}: {said}");
        }
    }

    /// Every flushed pattern, read from the machine's own images while it is off.
    #[track_caller]
    pub fn check_off(&self, why: &str) {
        let files = self.disks.clone().map(|d| (d.image, d.format));
        Self::check_files(self.lab, "a", &files, &self.model, why);
    }

    // --- our programs -------------------------------------------------------------------------------------------

    /// Starts one of our commands in host a with failpoints armed.
    pub fn spawn(&mut self, failpoint: &str, args: &[&str]) -> Driver {
        self.spawn_program(failpoint, &[&["virt-replica"], args].concat())
    }

    fn spawn_program(&mut self, failpoint: &str, words: &[&str]) -> Driver {
        self.runs += 1;
        let out = self.lab.dir.join(format!("shared/{}-{}.out", self.name, self.runs));
        let err = out.with_extension("err");
        let script = format!("echo $$ >/lab/shared/{}-{}.pid; exec \"$@\"", self.name, self.runs);
        let child = self
            .lab
            .command(&[&["exec", "a", "bash", "-c", &script, "bash"], words].concat())
            .env("VIRT_REPLICA_FAILPOINT", failpoint)
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(&err).unwrap())
            .spawn()
            .unwrap();
        Driver { child, out, err }
    }

    pub const TARGET: &'static str = "ssh://root@192.0.2.2";

    pub fn spawn_sync(&mut self, failpoint: &str) -> Driver {
        let name = self.name.clone();
        self.spawn(failpoint, &["sync", &name, "--to", Self::TARGET, "--json"])
    }

    pub fn sync(&mut self, failpoint: &str) -> Ended {
        self.spawn_sync(failpoint).wait()
    }

    /// What QEMU says of itself, as lines of virsh, until the answer is killed.
    pub fn watch_qemu(&mut self) -> Driver {
        let name = self.name.clone();
        self.spawn_program("", &["stdbuf", "-oL", "virsh", "qemu-monitor-event", &name, "--loop"])
    }

    pub fn doctor(&mut self, failpoint: &str, repair: bool) -> Ended {
        let name = self.name.clone();
        let args: &[&str] = if repair { &["doctor", &name, "--repair"] } else { &["doctor", &name] };
        self.spawn(failpoint, args).wait()
    }

    /// Ids of the points, oldest first, and the newest one's images with the disks' order of this machine.
    pub fn points(&self) -> (Vec<String>, Vec<(String, &'static str)>) {
        let listed = self.lab.exec("a", &["virt-replica", "points", &self.uuid, "--to", Self::TARGET, "--json"]);
        let listed: Value = serde_json::from_str(&listed).unwrap();
        let points = listed["points"].as_array().unwrap();
        let ids = points.iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect();
        let image = |disk: &Disk| {
            let disks = points.last()?["disks"].as_array().unwrap().clone();
            let found = disks.iter().find(|d| d["name"] == disk.name).unwrap();
            Some((found["image"].as_str().unwrap().to_owned(), "qcow2"))
        };
        (ids, self.disks.iter().filter_map(image).collect())
    }

    /// The head is the old point or one new one, whole, with exactly what was flushed before its freeze.
    #[track_caller]
    pub fn check_head(&self, before: &[String], old: &Model, new: &Model, why: &str) {
        let (now, images) = self.points();
        assert_eq!(now[..before.len().min(now.len())], *before, "{why}: points are gone");
        let model = match now.len() - before.len() {
            0 => old,
            1 => new,
            more => panic!("{why}: one run made {more} points"),
        };
        Self::check_files(self.lab, "b", &images, model, &format!("{why}: the head"));
        self.lab.exec("a", &["virt-replica", "verify", &self.uuid, "--to", Self::TARGET]);
    }

    // --- what has to hold in the end ----------------------------------------------------------------------------

    /// On its own images in both definitions, not held, nothing of ours left, every flushed write there.
    #[track_caller]
    pub fn check_settled(&self, why: &str) {
        let state = self.state();
        assert!(state == "running" || state == "shut off", "{why}: the domain is {state}");
        let own = self.own_images();
        assert_eq!(self.images(true), own, "{why}: the definition");
        assert_eq!(self.overlays(), [""; 0], "{why}: overlays are left");
        assert_eq!(self.record(), None, "{why}: the journal's record is left");
        assert!(!self.record_in_metadata(), "{why}: the record in the metadata is left");
        if state == "running" {
            assert_eq!(self.images(false), own, "{why}: the running domain");
            self.check_live(why);
        } else {
            self.check_off(why);
        }
    }

    /// The next run seals a point with everything in it.
    #[track_caller]
    pub fn check_next_sync(&mut self, why: &str) {
        self.sync("").ok(&format!("{why}: the next sync"));
        self.sealed = self.model.clone();
        let (_, images) = self.points();
        Self::check_files(self.lab, "b", &images, &self.model, &format!("{why}: the next point"));
    }

    /// Running by itself, within the bound of a pause.
    #[track_caller]
    pub fn check_let_go(&self, since: Instant, why: &str) {
        let left = HELD_MAX.saturating_sub(since.elapsed());
        wait_within(&format!("{why}: the guest runs again"), left, || (self.state() == "running").then_some(()));
    }

    /// Everything that `doctor` without `--repair` must leave as it is.
    pub fn traces(&self) -> String {
        let images = self.lab.path("a", IMAGES);
        let mut seen =
            format!("{} {:?} {:?} {:?}\n", self.state(), self.images(true), self.images(false), self.record());
        for name in self.overlays() {
            let m = fs::metadata(images.join(&name)).unwrap();
            writeln!(seen, "{name} {} {:?}", m.len(), m.modified().unwrap()).unwrap();
        }
        seen
    }

    // --- killing ------------------------------------------------------------------------------------------------

    /// kill -9 of these processes of host a, in this order, at one instant.
    pub fn kill9(&self, pids: &[String]) {
        self.lab.sh("a", &format!("kill -9 {} || true", pids.join(" ")));
    }

    pub fn qemu_pid(&self) -> String {
        self.lab.sh("a", &format!("cat /run/libvirt/qemu/{}.pid", self.name)).trim().to_owned()
    }

    /// Waits until libvirt has noticed that QEMU is gone.
    pub fn wait_off(&self) {
        wait_for("libvirt sees that QEMU is gone", || {
            let done = self.try_virsh("domstate", &[]);
            (!done.status.success() || String::from_utf8_lossy(&done.stdout).trim() == "shut off").then_some(())
        });
    }

    pub fn kill_qemu(&self) {
        self.kill9(&[self.qemu_pid()]);
        self.wait_off();
    }

    /// SIGKILL to the dead-man, the driver and libvirtd, in one go: QEMU is left to itself.
    pub fn kill_all_but_qemu(&self, driver: Driver) {
        let script = format!("kill -9 $(pgrep -P {0} -f ' deadman ') {0} {LIBVIRTD}; {GONE}", driver.pid());
        self.lab.sh("a", &script);
        let ended = driver.wait();
        assert!(ended.killed(), "{ended:#?}");
    }

    /// SIGKILL to the dead-man, the driver, QEMU and libvirtd, in one go.
    pub fn kill_everything(&self, driver: Driver) {
        let script = format!(
            "kill -9 $(pgrep -P {0} -f ' deadman ') {0} $(cat /run/libvirt/qemu/{1}.pid) {LIBVIRTD}; {GONE}",
            driver.pid(),
            self.name
        );
        self.lab.sh("a", &script);
        let ended = driver.wait();
        assert!(ended.killed(), "{ended:#?}");
    }
}
