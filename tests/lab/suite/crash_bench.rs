//! What a crash test stands on: a lab of its own, and one machine in it whose every flushed write is remembered.
//!
//! Crash tests kill libvirtd, put other programs into the agent's place and leave corpses behind: each has a lab to
//! itself. The machine has no guest OS. Patterns are written through its devices by QEMU's monitor, flushed, and noted
//! in a model; whatever is killed, every noted pattern has to be readable afterwards.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Where the machines' images lie in host a.
const IMAGES: &str = "/var/lib/libvirt/images";
/// Bytes of one pattern, and the distance between two.
const PATTERN_LEN: u64 = 64 << 10;
const SLOT_STRIDE: u64 = 1 << 20;
const SLOTS: u8 = 5;
/// The hard bound of every freeze and pause (I2).
pub const HELD_MAX: Duration = Duration::from_secs(10);
/// Patience of the tests: far beyond what anything may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// libvirtd's process in a host, in the words of a shell; and to wait until it is gone and has let go of its pidfile.
const LIBVIRTD: &str = "$(cat /run/libvirtd.pid)";
const GONE: &str = "while kill -0 $(cat /run/libvirtd.pid) 2>/dev/null; do sleep 0.02; done";

/// Asks until there is an answer; the question is named in the failure.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    wait_within(what, PATIENCE, &mut ask)
}

pub fn wait_within<T>(what: &str, patience: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let give_up_at = Instant::now() + patience;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < give_up_at, "waited {patience:?} in vain: {what}");
        sleep(Duration::from_millis(20));
    }
}

/// A lab of two hosts; ends with the value.
pub struct Lab {
    dir: PathBuf,
}

impl Lab {
    pub fn up() -> Lab {
        // Short: QEMU's monitor socket below it has to fit into a socket's address.
        let dir = tempfile::Builder::new().prefix("vrc").tempdir_in("/var/tmp").unwrap().keep();
        let lab = Lab { dir };
        let program = Path::new(env!("CARGO_BIN_EXE_virt-replica"));
        let done = lab.command(&["up", "--bin", program.to_str().unwrap()]).output().unwrap();
        assert!(done.status.success(), "lab up: {}", text(&done));
        lab
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/lab"));
        command.args(args).env("VR_LAB_DIR", &self.dir).stdin(Stdio::null());
        command
    }

    /// A verb of the lab itself; fails the test if it fails.
    pub fn lab(&self, args: &[&str]) -> String {
        let done = self.command(args).output().unwrap();
        assert!(done.status.success(), "lab {args:?}: {}", text(&done));
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    pub fn try_exec(&self, host: &str, args: &[&str]) -> Output {
        self.command(&[&["exec", host], args].concat()).output().unwrap()
    }

    pub fn exec(&self, host: &str, args: &[&str]) -> String {
        let done = self.try_exec(host, args);
        assert!(done.status.success(), "{host}: {args:?}: {}", text(&done));
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    pub fn sh(&self, host: &str, script: &str) -> String {
        self.exec(host, &["bash", "-c", script])
    }

    /// A file of a host, as this test sees it.
    pub fn path(&self, host: &str, inside: &str) -> PathBuf {
        self.dir.join("host").join(host).join(inside.trim_start_matches('/'))
    }

    /// Puts a program in front of host b's agent that arms a failpoint in it; `None` takes it away.
    pub fn arm_agent(&self, failpoint: Option<&str>) {
        let program = env!("CARGO_BIN_EXE_virt-replica");
        let Some(failpoint) = failpoint else {
            self.lab(&["bin", "b", program]);
            return;
        };
        let real = self.path("b", "/lab/bin/virt-replica.real");
        if !real.exists() {
            fs::copy(program, &real).unwrap();
        }
        let _ = fs::remove_file(self.path("b", "/tmp/agent.err"));
        let wrapper = self.dir.join("wrapper");
        let script = format!(
            "#!/bin/sh\nVIRT_REPLICA_FAILPOINT={failpoint} exec /usr/local/bin/virt-replica.real \"$@\" 2>>/tmp/agent.err\n"
        );
        fs::write(&wrapper, script).unwrap();
        fs::set_permissions(&wrapper, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        self.lab(&["bin", "b", wrapper.to_str().unwrap()]);
    }
}

impl Lab {
    /// What an armed agent said.
    pub fn agent_said(&self) -> String {
        fs::read_to_string(self.path("b", "/tmp/agent.err")).unwrap_or_default()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("VR_LAB_KEEP").is_some_and(|v| !v.is_empty()) {
            eprintln!("the lab was left running: VR_LAB_DIR={} tests/lab/lab down", self.dir.display());
            return;
        }
        let _ = self.command(&["down"]).output();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

pub fn text(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub name: &'static str,
    pub image: String,
    pub format: &'static str,
}

/// (disk, slot) -> the pattern that was flushed there last.
pub type Model = BTreeMap<(usize, u8), u8>;

/// A program of ours at work in host a. Its output goes to files: a pipe would be held open by the dead-man.
pub struct Driver {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

/// How it ended, and what it had said.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
    pub at: Instant,
}

impl Ended {
    pub fn killed(&self) -> bool {
        self.status.signal() == Some(9) || self.status.code() == Some(137)
    }

    /// Whether these words are in what it printed, however the lines were broken.
    pub fn says(&self, words: &str) -> bool {
        let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        flat(&self.out).contains(words) || flat(&self.err).contains(words)
    }

    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    #[track_caller]
    pub fn ok(self, why: &str) -> Ended {
        assert_eq!(self.code(), Some(0), "{why}: {self:#?}");
        self
    }
}

impl Driver {
    pub fn output(&self) -> String {
        fs::read_to_string(&self.out).unwrap_or_default()
    }

    /// Ends it from outside; a second time is no error.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// Waits until it stands at a failpoint that is armed with a sleep.
    #[track_caller]
    pub fn stands_at(&mut self, point: &str) {
        let mark = format!("failpoint {point}:");
        wait_for(&format!("the driver at {point}"), || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("ended ({status}) before it came to {point}: {}", self.said());
            }
            self.said().contains(&mark).then_some(())
        });
    }

    /// Its process id inside host a.
    pub fn pid(&self) -> String {
        wait_for("the driver's process id", || {
            let id = fs::read_to_string(self.out.with_extension("pid")).ok()?;
            id.ends_with('\n').then(|| id.trim().to_owned())
        })
    }

    /// As [`Driver::wait`], for one that was stopped: what the lab put in front of it has stopped with it, and is only told
    /// to go on when the driver is dead.
    #[track_caller]
    pub fn wait_stopped(self, lab: &Lab) -> Ended {
        let dead = format!("cut -d' ' -f3 /proc/{}/stat 2>/dev/null || echo Z", self.pid());
        wait_for("the stopped driver's end", || (lab.sh("a", &dead).trim() == "Z").then_some(()));
        let front = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(front, rustix::process::Signal::CONT).unwrap();
        self.wait()
    }

    #[track_caller]
    pub fn wait(mut self) -> Ended {
        let status = wait_for("the driver's end", || self.child.try_wait().unwrap());
        let at = Instant::now();
        let out = fs::read_to_string(&self.out).unwrap();
        Ended { status, out, err: self.said(), at }
    }
}

/// `….vr-RUN.qcow2`, retired or kept; what somebody made on top and named after it is theirs.
fn is_ours(name: &str) -> bool {
    let Some((_, rest)) = name.rsplit_once(".vr-") else { return false };
    matches!(rest.split_once('.'), Some((_, "qcow2" | "qcow2.retired" | "qcow2.kept")))
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

/// A script beside the test.
pub struct Script(Child);

impl Script {
    pub fn wait_end(&mut self) {
        wait_for("the script's end", || self.0.try_wait().unwrap());
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU's own monitor.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    pub qemu_pid: String,
}

impl Qmp {
    fn connect(path: &Path, qemu_pid: String) -> Qmp {
        let stream = wait_for("QEMU's monitor", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Qmp { stream: BufReader::new(stream), qemu_pid };
        qmp.line();
        qmp.ask("qmp_capabilities", json!({}));
        qmp
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("QMP: {e}: {line:?}"))
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let question = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{question}\n").as_bytes()).unwrap();
        loop {
            let answer = self.line();
            assert!(answer.get("error").is_none(), "QMP {command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }

    pub fn running(&mut self) -> bool {
        self.ask("query-status", json!({}))["running"] == true
    }

    /// Puts an overlay that exists already above the image the guest writes to, as libvirt's snapshot would.
    pub fn freeze_onto(&mut self, base: &str, overlay: &str) {
        let nodes = self.ask("query-named-block-nodes", json!({ "flat": true }));
        let nodes = nodes.as_array().unwrap();
        let formats = ["qcow2", "raw"];
        let of_base = |n: &&Value| n["file"] == base && formats.contains(&n["drv"].as_str().unwrap());
        let node = nodes.iter().find(of_base).expect("the base is open")["node-name"].clone();
        let name = format!("lost-{}", nodes.len());
        let file = json!({ "driver": "file", "filename": overlay, "node-name": format!("{name}-storage") });
        let options = json!({ "driver": "qcow2", "node-name": name, "file": file, "backing": null });
        self.ask("blockdev-add", options);
        self.ask("blockdev-snapshot", json!({ "node": node, "overlay": name }));
    }

    /// Ends every block job as libvirt's pivot would, and waits until QEMU has pivoted.
    pub fn pivot_all(&mut self) {
        let jobs = self.ask("query-block-jobs", json!({}));
        assert!(jobs.as_array().is_some_and(|j| !j.is_empty()), "there is nothing to pivot");
        for job in jobs.as_array().unwrap() {
            assert_eq!(job["ready"], true, "{job}");
            self.ask("job-complete", json!({ "id": job["device"] }));
        }
        wait_for("QEMU has pivoted", || {
            let jobs = self.ask("query-jobs", json!({}));
            jobs.as_array().unwrap().iter().all(|j| j["status"] == "concluded").then_some(())
        });
    }
}
