//! Domains of host a: built, started, written to, replicated, compared, and gone with all their files on both hosts
//! when the test ends, however it ends.

use super::WAY;
use super::support::{Host, Job, PATIENCE, STORE, SyncResult, TARGET, eventually};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// Whether the runs of this module are by backup, not by overlay.
pub fn by_backup() -> bool {
    WAY.contains(&"backup")
}

/// Where overlays of block devices go unless told otherwise.
pub const IMAGES: &str = "/var/lib/libvirt/images";

/// How a disk's image is made.
#[derive(Debug, Clone)]
pub struct Disk {
    format: &'static str,
    device: bool,
    script: String,
}

impl Disk {
    /// An image made by a bash script: `$1` is the file to make, `$2` its directory, the domain's own. The
    /// script may make others beside it (backing images).
    pub fn made_by(format: &'static str, script: &str) -> Disk {
        Disk { format, device: false, script: script.to_owned() }
    }

    /// Empty, with `options` as `qemu-img create -o` has them.
    pub fn qcow2_with(size: &str, options: &str) -> Disk {
        Disk::made_by("qcow2", &format!("qemu-img create -q -f qcow2 -o '{options}' \"$1\" {size}"))
    }

    pub fn qcow2(size: &str) -> Disk {
        Disk::qcow2_with(size, "cluster_size=65536")
    }

    pub fn raw(size: &str) -> Disk {
        Disk::made_by("raw", &format!("truncate -s {size} \"$1\""))
    }

    /// A block device: a loop device over a raw file.
    pub fn device(size: &str) -> Disk {
        Disk::raw(size).on_a_device()
    }

    /// The raw file becomes a loop device.
    pub fn on_a_device(self) -> Disk {
        assert_eq!(self.format, "raw", "a loop device shows a file's bytes");
        Disk { device: true, ..self }
    }

    /// With an empty ext4, for the guest that writes lines.
    pub fn ext4(size: &str, format: &'static str) -> Disk {
        Disk::made_by(format, &format!("/lab/tools/guest disk \"$1\" {size} {format}"))
    }

    /// Goes on with the image in the hands of `qemu-io` (`write -P 0x11 0 1M`).
    pub fn then(mut self, command: &str) -> Disk {
        self.script += &format!("\nqemu-io -f {} -c '{command}' \"$1\" >&2", self.format);
        self
    }

    /// Goes on with a line of the script that made it.
    pub fn run(mut self, line: &str) -> Disk {
        self.script += &format!("\n{line} >&2");
        self
    }
}

/// What a builder does to the XML; the second argument is the directory of the images.
type Edit = Box<dyn Fn(String, &str) -> String>;

/// A domain to come.
pub struct Builder {
    name: String,
    disks: Vec<Disk>,
    guest: bool,
    delay: &'static str,
    agent: Option<&'static str>,
    edits: Vec<Edit>,
}

impl Builder {
    pub(crate) fn new(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            disks: Vec::new(),
            guest: false,
            delay: "0.05",
            agent: None,
            edits: Vec::new(),
        }
    }

    pub fn disk(mut self, disk: Disk) -> Builder {
        self.disks.push(disk);
        self
    }

    /// With the guest that writes numbered lines for ever; without it there is a QEMU and no operating system.
    pub fn guest(mut self) -> Builder {
        self.guest = true;
        self
    }

    /// The guest, with a real guest agent in it: `yes`, or one that will `hang`.
    pub fn agent(mut self, how: &'static str) -> Builder {
        (self.guest, self.agent) = (true, Some(how));
        self
    }

    /// Seconds the guest waits between two lines.
    pub fn delay(mut self, seconds: &'static str) -> Builder {
        self.delay = seconds;
        self
    }

    /// Edits the domain's XML; `edit` gets it and the domain's directory.
    pub fn xml(mut self, edit: impl Fn(String, &str) -> String + 'static) -> Builder {
        self.edits.push(Box::new(edit));
        self
    }

    /// Adds to the domain's devices; `DIR` in the text becomes the domain's directory.
    pub fn devices(self, xml: &'static str) -> Builder {
        self.xml(move |all, dir| all.replace("</devices>", &format!("{}</devices>", xml.replace("DIR", dir))))
    }

    /// Defined, and shut off.
    pub fn off(self) -> Domain {
        let domain = self.make();
        domain.define();
        domain
    }

    /// Defined and running. With a guest: returns when the guest has acknowledged its first line.
    pub fn running(self) -> Domain {
        let guest = self.guest;
        let domain = self.off();
        domain.virsh(&["start"]);
        if guest {
            domain.wait_acked(1);
        }
        domain
    }

    /// Defined, started, and not one instruction executed: nothing but the test writes.
    pub fn paused(self) -> Domain {
        let domain = self.off();
        domain.start_paused();
        domain
    }

    /// As paused, without a definition that outlives it.
    pub fn transient(self) -> Domain {
        let domain = self.make();
        Host::A.ok(&["virsh", "create", "--paused", &domain.xml_file()]);
        domain
    }

    fn make(self) -> Domain {
        // Made first: whatever fails from here on, its Drop cleans up.
        let mut domain = Domain {
            dir: format!("{IMAGES}/{}", self.name),
            console: format!("/var/log/libvirt/console/{}.log", self.name),
            name: self.name,
            uuid: String::new(),
            images: Vec::new(),
            devices: Vec::new(),
            to: TARGET.to_owned(),
        };
        Host::A.ok(&["mkdir", "-p", &domain.dir, &domain.shared()]);
        if !Host::B.file(format!("{STORE}/store.json")).exists() {
            Host::B.ok(&["virt-replica", "store", "init"]);
        }
        let mut words = vec!["/lab/tools/guest".to_owned(), "xml".to_owned(), domain.name.clone()];
        for (at, disk) in self.disks.iter().enumerate() {
            let file = format!("{}/{}.{}", domain.dir, disk_name(at), disk.format);
            Host::A.script(&disk.script, &[&file, &domain.dir]);
            let image = match disk.device {
                true => domain.attach_loop(&file),
                false => file,
            };
            let kind = if disk.device { "block" } else { "file" };
            words.extend(["--disk".to_owned(), format!("{image}:{}:{kind}", disk.format)]);
            domain.images.push(image);
        }
        match self.guest {
            true => {
                words.extend(["--delay".to_owned(), self.delay.to_owned()]);
                words.extend(self.agent.iter().flat_map(|how| ["--agent".to_owned(), (*how).to_owned()]));
            }
            false => words.extend(["--no-os", "--memory", "32"].map(str::to_owned)),
        }
        let mut xml = Host::A.output(&words.iter().map(String::as_str).collect::<Vec<_>>());
        for edit in &self.edits {
            xml = edit(xml, &domain.dir);
        }
        domain.uuid = between(&xml, "<uuid>", "</uuid>").expect("the XML has a UUID").to_owned();
        std::fs::write(Host::A.file(domain.xml_file()), xml).expect("write the XML");
        domain
    }
}

fn disk_name(at: usize) -> String {
    let letter = |n: usize| char::from(b'a' + n as u8);
    // As the kernel counts, and `tests/lab/guest`.
    let second = if at < 26 { String::new() } else { letter(at / 26 - 1).to_string() };
    format!("vd{second}{}", letter(at % 26))
}

pub fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    let rest = &text[text.find(start)? + start.len()..];
    Some(&rest[..rest.find(end)?])
}

/// A domain on host a. Dropping it removes everything of it, here and on the target.
pub struct Domain {
    pub name: String,
    pub uuid: String,
    /// The directory of its images, as host a sees it.
    pub dir: String,
    /// What it runs on, by disk.
    pub images: Vec<String>,
    /// Where it is replicated to, in the words of `--to`.
    pub to: String,
    console: String,
    devices: Vec<String>,
}

impl Domain {
    /// Replicates into a store of its own on host b instead of the default one. Returns the store's root there.
    pub fn own_store(&mut self) -> String {
        let root = format!("/srv/{}", self.name);
        self.to = format!("{TARGET}{root}");
        Host::B.ok(&["virt-replica", "store", "init", &root]);
        root
    }

    fn xml_file(&self) -> String {
        format!("{}/domain.xml", self.dir)
    }

    /// A directory that both hosts see.
    pub fn shared(&self) -> String {
        format!("/lab/shared/{}", self.name)
    }

    fn attach_loop(&mut self, file: &str) -> String {
        let device = Host::A.output(&["losetup", "--find", "--show", file]);
        self.devices.push(device.clone());
        device
    }

    pub fn start_paused(&self) {
        Host::A.ok(&["virsh", "start", "--paused", &self.name]);
    }

    /// Defines it (anew) from its XML file.
    pub fn define(&self) {
        Host::A.ok(&["virsh", "define", &self.xml_file()]);
    }

    /// Edits the XML file and defines the domain anew.
    pub fn redefine(&self, edit: impl Fn(String) -> String) {
        let path = Host::A.file(self.xml_file());
        let xml = std::fs::read_to_string(&path).expect("read the XML");
        std::fs::write(path, edit(xml)).expect("write the XML");
        self.define();
    }

    /// Runs `virsh COMMAND DOMAIN REST...`, which must succeed.
    #[track_caller]
    pub fn virsh(&self, words: &[&str]) -> String {
        let mut all = vec!["virsh", "-q", words[0], &self.name];
        all.extend(&words[1..]);
        Host::A.output(&all)
    }

    pub fn state(&self) -> String {
        self.virsh(&["domstate"])
    }

    pub fn wait_state(&self, state: &str) {
        eventually(&format!("{} to be {state}", self.name), PATIENCE, || (self.state() == state).then_some(()));
    }

    /// `qemu-io` on a live disk, through the device the guest has. QEMU 7.2 prints what it did to its own stdout, not
    /// to the monitor: whether a write arrived is for the test to see in what the next run sends.
    #[track_caller]
    pub fn qemu_io(&self, disk: usize, command: &str) {
        let hmp = format!("qemu-io -d /machine/peripheral/virtio-disk{disk}/virtio-backend \"{command}\"");
        let said = self.virsh(&["qemu-monitor-command", "--hmp", &hmp]);
        // HMP has no exit codes; what went wrong before qemu-io began, it does say.
        assert_eq!(said.trim(), "", "{hmp}");
    }

    /// Writes through the live device: `write(0, "-P 0xaa 0 1M")`.
    #[track_caller]
    pub fn write(&self, disk: usize, what: &str) {
        self.qemu_io(disk, &format!("write {what}"));
    }

    pub fn flush(&self, disk: usize) {
        self.qemu_io(disk, "flush");
    }

    /// What the guest has said so far.
    pub fn console(&self) -> String {
        let log = std::fs::read(Host::A.file(&self.console)).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// The last line the guest said to be on disk; 0 if none.
    pub fn acked(&self) -> u64 {
        let log = self.console();
        // A line still being printed does not count.
        let whole = &log[..log.rfind('\n').map_or(0, |end| end + 1)];
        whole.lines().rev().find_map(|l| l.trim().strip_prefix("ack ")?.parse().ok()).unwrap_or(0)
    }

    /// Waits until the guest has acknowledged line `n`.
    #[track_caller]
    pub fn wait_acked(&self, n: u64) -> u64 {
        eventually(&format!("{} to acknowledge line {n}", self.name), PATIENCE, || {
            Some(self.acked()).filter(|a| *a >= n)
        })
    }

    /// The guest is alive: it acknowledges more lines than it has until now.
    #[track_caller]
    pub fn still_writes(&self) {
        self.wait_acked(self.acked() + 2);
    }

    /// Starts a run with `--json`; `failpoint` arms points in the driver (empty: none).
    pub fn start_sync(&self, failpoint: &str, args: &[&str]) -> Job {
        let mut words = vec!["virt-replica", "sync", &self.name, "--to", &self.to, "--json"];
        words.extend(WAY);
        words.extend(args);
        let mut command = Host::A.command(&words);
        if !failpoint.is_empty() {
            command.env("VIRT_REPLICA_FAILPOINT", failpoint);
        }
        Job::start(command)
    }

    #[track_caller]
    pub fn sync_with(&self, failpoint: &str, args: &[&str]) -> SyncResult {
        SyncResult::of(self.start_sync(failpoint, args).wait(PATIENCE))
    }

    #[track_caller]
    pub fn sync(&self) -> SyncResult {
        self.sync_with("", &[])
    }

    /// As [`Domain::sync`], of a domain that takes long.
    #[track_caller]
    pub fn sync_within(&self, limit: Duration) -> SyncResult {
        SyncResult::of(self.start_sync("", &[]).wait(limit))
    }

    pub fn plan(&self) -> Value {
        let mut words = vec!["plan", &self.name, "--to", &self.to, "--json"];
        words.extend(WAY);
        Host::A.json(&words)
    }

    /// The points on the target, oldest first.
    pub fn points(&self) -> Vec<Value> {
        let all = Host::A.json(&["points", &self.name, "--to", &self.to, "--json"]);
        all["points"].as_array().expect("points are a list").clone()
    }

    #[track_caller]
    pub fn head(&self) -> Value {
        self.points().pop().expect("there is a point")
    }

    /// What the guest sees on a disk right now, as a raw image that both hosts see. Of a domain that writes, this
    /// means something only while it is frozen: [`Domain::copy_frozen`].
    pub fn copy(&self, disk: usize) -> Reference {
        let file = format!("{}/{}.raw", self.shared(), disk_name(disk));
        // An overlay makes QEMU write out what it holds of the image's tables; a backup leaves that alone.
        if by_backup() && self.state() != "shut off" {
            self.flush(disk);
        }
        Host::A.ok(&["qemu-img", "convert", "-U", "-O", "raw", &self.images[disk], &file]);
        Reference { file }
    }

    /// Copies a disk's own image while an overlay holds it still; the run must be past step 4 and not yet in step 7.
    #[track_caller]
    pub fn copy_frozen(&self, disk: usize) -> Reference {
        if by_backup() {
            return self.copy_served(disk);
        }
        let on_overlay = || self.live_images()[disk].contains(".vr-");
        assert!(on_overlay(), "the disk is not frozen yet");
        let copy = self.copy(disk);
        assert!(on_overlay(), "the commit began while the frozen image was copied: the failpoint is too short");
        copy
    }

    /// Copies a disk as QEMU serves it while a backup job runs, by another reader than ours.
    #[track_caller]
    fn copy_served(&self, disk: usize) -> Reference {
        let (name, file) = (disk_name(disk), format!("{}/{}.raw", self.shared(), disk_name(disk)));
        let export = format!("nbd+unix:///{name}?socket={}", self.backup_socket());
        Host::A.ok(&["qemu-img", "convert", "-f", "raw", "-O", "raw", &export, &file]);
        Reference { file }
    }

    /// The socket of the backup job that runs.
    #[track_caller]
    pub fn backup_socket(&self) -> String {
        let job = self.virsh(&["backup-dumpxml"]);
        between(&job, "socket='", "'").expect("the job serves on a socket").to_owned()
    }

    /// A point's disk on the target holds exactly this content, bit for bit as QEMU sees it.
    #[track_caller]
    pub fn compare_with_frozen(&self, point: &Value, disk: usize, frozen: &Reference) {
        let image = image_of(point, &disk_name(disk));
        Host::B.ok(&["qemu-img", "compare", "-f", "qcow2", "-F", "raw", &image, &frozen.file]);
        Host::B.ok(&["qemu-img", "check", "-q", &image]);
    }

    /// The head holds what the domain's disks hold now: for domains that do not write.
    #[track_caller]
    pub fn compare_with_head(&self) {
        let head = self.head();
        for disk in 0..self.images.len() {
            self.compare_with_frozen(&head, disk, &self.copy(disk));
        }
    }

    /// The lines a guest wrote, as they stand in a point after the file system's own recovery.
    #[track_caller]
    pub fn lines(&self, point: &Value, disk: usize) -> u64 {
        lines_in(Host::B, &image_of(point, &disk_name(disk)), "qcow2")
    }

    /// The same of the domain's own disk, which nobody may have open.
    #[track_caller]
    pub fn own_lines(&self, disk: usize) -> u64 {
        let image = &self.images[disk];
        lines_in(Host::A, image, if image.ends_with(".qcow2") { "qcow2" } else { "raw" })
    }

    /// What the disks are on, by the running domain.
    pub fn live_images(&self) -> Vec<String> {
        self.sources(&self.virsh(&["domblklist"]))
    }

    fn sources(&self, domblklist: &str) -> Vec<String> {
        let sources = domblklist.lines().filter_map(|l| l.split_whitespace().nth(1).map(str::to_owned));
        sources.take(self.images.len()).collect()
    }

    /// The promise kept after every run, however it ended: the domain is on its own images, by what runs and by what
    /// is defined; nothing of ours is left beside them, in the domain, or in our own state.
    #[track_caller]
    pub fn assert_home(&self) {
        const MARK: &str = "@@";
        let name = &self.name;
        let questions =
            ["dominfo", "domblklist", "dumpxml", "domblklist --inactive"].map(|q| format!("{q} {name}; echo {MARK}; "));
        // The last question has no answer for a transient domain, and is not a failure then.
        let answers = Host::A.run(&["virsh", "-q", &questions.concat()]).stdout;
        let answers: Vec<&str> = answers.split(MARK).collect();
        assert!(answers.len() > questions.len(), "{name} has gone: {answers:?}");
        assert_eq!(self.sources(answers[1]), self.images, "what runs is not on its own images");
        if answers[0].contains("Persistent:     yes") {
            assert_eq!(self.sources(answers[3]), self.images, "the definition is not on its own images");
        }
        assert!(!answers[2].contains("virt-replica"), "a record is left in the domain: {}", answers[2]);
        let left = Host::A.output(&["find", &self.dir, "-name", "*.vr-*"]);
        assert_eq!(left, "", "overlays are left");
        for device in &self.devices {
            let name = Path::new(device).file_name().and_then(|n| n.to_str()).expect("a device has a name");
            let left = Host::A.output(&["find", IMAGES, "-maxdepth", "1", "-name", &format!("{name}.*vr-*")]);
            assert_eq!(left, "", "overlays of {device} are left");
        }
        assert!(!self.record().exists(), "a record is left in {}", self.record().display());
        assert!(!self.backup_record().exists(), "a record is left in {}", self.backup_record().display());
    }

    /// The journal's record of an open run, as this process reaches it.
    pub fn record(&self) -> std::path::PathBuf {
        Host::A.file(format!("{STORE}/source/domains/{}/record.json", self.uuid))
    }

    /// The journal's record of an open run by backup.
    pub fn backup_record(&self) -> std::path::PathBuf {
        self.record().with_file_name("backup.json")
    }

    /// Its replica's directory on host b.
    pub fn replica(&self) -> String {
        let root = self.to.strip_prefix(TARGET).filter(|r| !r.is_empty()).unwrap_or(STORE);
        format!("{root}/replicas/{}", self.uuid)
    }

    fn clean(&self) {
        let a = r#"
            virsh -q destroy "$1" || virsh -q undefine --managed-save "$1" --snapshots-metadata --nvram
            virsh -q dominfo "$1" && virsh -q undefine --managed-save "$1" --snapshots-metadata --nvram
            shift; dir=$1 shared=$2 state=$3; shift 3
            for device; do losetup --detach "$device"; done
            rm -rf "${dir:?}" "${shared:?}" "${state:?}"
            for device; do rm -f /var/lib/libvirt/images/"${device##*/}".*vr-*; done"#;
        let state = format!("{STORE}/source/domains/{}", self.uuid);
        let (dir, shared) = (self.dir.clone(), self.shared());
        let mut words = vec!["bash", "-c", a, "clean", &self.name, &dir, &shared, &state];
        words.extend(self.devices.iter().map(String::as_str));
        Host::A.run(&words);
        Host::A.run(&["rm", "-f", &self.console]);
        if !self.uuid.is_empty() {
            let own = format!("/srv/{}", self.name);
            Host::B.run(&["rm", "-rf", "--one-file-system", &format!("{STORE}/replicas/{}", self.uuid), &own]);
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- how {} stood when the test failed", self.name);
            Host::A.run(&["virsh", "dumpxml", &self.name]);
            Host::A.run(&["bash", "-c", "ls -la \"$1\"; tail -n 20 /var/log/libvirt/libvirtd.log", "x", &self.dir]);
        }
        self.clean();
    }
}

/// How many lines an image holds; every one of them must be there, in order.
#[track_caller]
fn lines_in(host: Host, image: &str, format: &str) -> u64 {
    let lines = host.output(&["/lab/tools/guest", "lines", image, format]);
    for (at, line) in lines.lines().enumerate() {
        assert_eq!(line, (at + 1).to_string(), "line {} of {image}", at + 1);
    }
    lines.lines().count() as u64
}

/// A raw image of what a disk held, seen by both hosts.
pub struct Reference {
    pub file: String,
}

/// The absolute path on the target of a disk's image in a point.
#[track_caller]
pub fn image_of(point: &Value, disk: &str) -> String {
    let disks = point["disks"].as_array().expect("a point has disks");
    let disk = disks.iter().find(|d| d["name"] == disk).unwrap_or_else(|| panic!("no disk {disk} in {point:#}"));
    disk["image"].as_str().expect("an image is a path").to_owned()
}
