//! A lab host as these tests see it: its libvirt reached through its root, throw-away domains, and bytes written
//! through the live device.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use virt_replica::hypervisor::libvirt::{Deadlines, LibvirtHypervisor};
use virt_replica::hypervisor::{DomainView, FreezeDisk, Hypervisor};
use virt_replica::image::{Format, Layer};
use virt_replica::name::{DiskName, DomainUuid};

/// Where disks lie, as the host sees it.
const IMAGES: &str = "/var/lib/libvirt/images";

/// Host `a` of a lab.
pub struct Host {
    lab: PathBuf,
    dir: PathBuf,
    root: PathBuf,
    pub uri: String,
    private: bool,
}

impl Host {
    /// The lab that is up. For tests that leave libvirtd alone: other suites use it at the same time.
    pub fn shared() -> Self {
        let dir = std::env::var_os("VR_LAB_DIR")
            .expect("no lab: run 'make test-lab', or 'tests/lab/lab up' and set VR_LAB_DIR");
        Self::in_lab(dir.into(), false)
    }

    /// A lab of the test's own (about a second), whose libvirtd it may kill. Ends with the value.
    pub fn private() -> Self {
        let output = Command::new(lab_program()).arg("up").env_remove("VR_LAB_DIR").output().unwrap();
        let text = success("lab up", output);
        let dir = text.trim().rsplit("VR_LAB_DIR=").next().unwrap();
        Self::in_lab(dir.into(), true)
    }

    fn in_lab(dir: PathBuf, private: bool) -> Self {
        let env = std::fs::read_to_string(dir.join("env")).expect("the lab has an env file");
        let value = |key: &str| env.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('=')).unwrap().to_owned();
        let root = PathBuf::from(value("VR_LAB_A_ROOT"));
        // The socket lies on the host's private /run, which only its processes see.
        let socket = format!("/proc/{}/root/run/libvirt/libvirt-sock", value("VR_LAB_A_PID"));
        Self { lab: lab_program(), dir, root, uri: format!("qemu+unix:///system?socket={socket}"), private }
    }

    pub fn hypervisor(&self) -> LibvirtHypervisor {
        LibvirtHypervisor::connect(Some(&self.uri)).unwrap()
    }

    pub fn hypervisor_with(&self, deadlines: Deadlines) -> LibvirtHypervisor {
        LibvirtHypervisor::connect_with(Some(&self.uri), deadlines).unwrap()
    }

    fn lab(&self, args: &[&str]) -> Output {
        Command::new(&self.lab).args(args).env("VR_LAB_DIR", &self.dir).output().unwrap()
    }

    /// Runs a command in the host; its output, or a panic with what it said.
    pub fn exec(&self, command: &[&str]) -> String {
        success(&command.join(" "), self.lab(&[&["exec", "a"], command].concat()))
    }

    /// `kill9`, `start`, `restart`, `stop`.
    pub fn libvirtd(&self, action: &str) {
        assert!(self.private, "the shared lab's libvirtd belongs to others as well");
        success(action, self.lab(&["libvirtd", "a", action]));
    }

    pub fn signal_libvirtd(&self, signal: &str) {
        assert!(self.private, "the shared lab's libvirtd belongs to others as well");
        self.exec(&["sh", "-c", &format!("kill -{signal} $(cat /run/libvirtd.pid)")]);
    }

    /// Sockets that libvirtd has open: its listeners, QEMUs and clients.
    pub fn libvirtd_sockets(&self) -> usize {
        let links = self.exec(&["sh", "-c", "readlink /proc/$(cat /run/libvirtd.pid)/fd/*"]);
        links.lines().filter(|l| l.starts_with("socket:")).count()
    }

    pub fn virsh(&self, args: &[&str]) -> String {
        self.exec(&[&["virsh", "-q"], args].concat())
    }

    pub fn outside(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap())
    }

    /// Defines a domain without an operating system; `disks` may say DIR for its directory.
    pub fn define(&self, disks: &str) -> Guest<'_> {
        let guest = self.guest();
        let file = guest.write_xml(disks);
        self.virsh(&["define", &file]);
        guest
    }

    /// A domain that exists only while it runs.
    pub fn create(&self, disks: &str) -> Guest<'_> {
        let guest = self.guest();
        let file = guest.write_xml(disks);
        self.virsh(&["create", &file]);
        guest
    }

    fn guest(&self) -> Guest<'_> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("hyp{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(IMAGES).join(&name);
        std::fs::create_dir(self.outside(&dir)).unwrap();
        let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
        let guest = Guest { host: self, name, dir, uuid: DomainUuid::new(uuid.trim()).unwrap() };
        for (file, backing) in [("gold.qcow2", None), ("a.qcow2", Some("gold.qcow2")), ("b.raw", None)] {
            let (path, format) = (guest.path(file), file.rsplit('.').next().unwrap());
            let backing = backing.map(|b| guest.path(b));
            let mut args = vec!["qemu-img", "create", "-q", "-f", format, path.to_str().unwrap()];
            match &backing {
                Some(b) => args.extend(["-b", b.to_str().unwrap(), "-F", "qcow2"]),
                None => args.push("64M"),
            }
            self.exec(&args);
        }
        guest
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.private {
            let _ = self.lab(&["down"]);
        }
    }
}

fn lab_program() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/lab");
    std::env::var_os("VR_LAB").map_or(own, PathBuf::from)
}

fn success(what: &str, output: Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{out}{err}", output.status);
    out.into_owned()
}

/// A qcow2 over a golden image, and a raw disk.
pub const TWO_DISKS: &str = "
    <disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/><source file='DIR/a.qcow2'/>
      <target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='DIR/b.raw'/>
      <target dev='vdb' bus='virtio'/></disk>";

/// A domain with its directory; both go with the value.
pub struct Guest<'h> {
    host: &'h Host,
    pub name: String,
    pub dir: PathBuf,
    pub uuid: DomainUuid,
}

impl Guest<'_> {
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    pub fn layer(&self, file: &str) -> Layer {
        let format = if file.ends_with(".raw") { Format::Raw } else { Format::Qcow2 };
        Layer { path: self.path(file), format, block_device: false, data_file: None }
    }

    pub fn freeze_disk(&self, disk: &str, overlay: &str) -> FreezeDisk {
        let over = self.path(if disk == "vda" { "a.qcow2" } else { "b.raw" });
        FreezeDisk { name: name(disk), overlay: self.path(overlay), over, prepared: false }
    }

    /// Size of a file of its directory, in bytes; `None` if there is none.
    pub fn file(&self, file: &str) -> Option<u64> {
        std::fs::metadata(self.host.outside(&self.path(file))).ok().map(|m| m.len())
    }

    /// Puts a program in front of its emulator that takes these seconds whenever libvirt looks at what it can do.
    pub fn give_slow_emulator(&self, seconds: u32) {
        let slow = self.path("slow-qemu");
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *'-machine none'*) sleep {seconds} ;; esac\nexec /usr/bin/qemu-system-x86_64 \"$@\"\n"
        );
        let outside = self.host.outside(&slow);
        std::fs::write(&outside, script).unwrap();
        std::fs::set_permissions(&outside, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let file = self.path("domain.xml").to_str().unwrap().to_owned();
        let xml = std::fs::read_to_string(self.host.outside(Path::new(&file))).unwrap();
        let xml = xml.replace("/usr/bin/qemu-system-x86_64", slow.to_str().unwrap());
        std::fs::write(self.host.outside(Path::new(&file)), xml).unwrap();
        self.host.virsh(&["define", &file]);
    }

    /// The emulator's file is another one from now on, as after an upgrade. libvirt compares whole seconds.
    pub fn upgrade_emulator(&self) {
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let slow = self.host.outside(&self.path("slow-qemu"));
        std::fs::set_permissions(&slow, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }

    pub fn start(&self) {
        self.host.virsh(&["start", &self.name]);
    }

    pub fn start_paused(&self) {
        self.host.virsh(&["start", "--paused", &self.name]);
    }

    /// Fills `len` (`64k`, `8M`) from `at` with a byte, through the live device as the guest would, and flushes.
    pub fn write(&self, device: u32, byte: u8, at: &str, len: &str) {
        for io in [format!("write -P {byte:#x} {at} {len}"), "flush".into()] {
            let command = format!("qemu-io -d /machine/peripheral/virtio-disk{device}/virtio-backend \"{io}\"");
            let said = self.host.virsh(&["qemu-monitor-command", &self.name, "--hmp", &command]);
            assert!(!said.to_lowercase().contains("error"), "{command}: {said}");
        }
    }

    /// Does the image, with all below it, hold `byte` in the `len` from `at`?
    pub fn holds(&self, file: &str, byte: u8, at: &str, len: &str) -> bool {
        let (path, format) = (self.path(file), self.layer(file).format.as_str());
        let read = format!("read -P {byte:#x} {at} {len}");
        let args = ["exec", "a", "qemu-io", "-U", "-r", "-f", format, "-c", &read, path.to_str().unwrap()];
        self.host.lab(&args).status.success()
    }

    fn write_xml(&self, disks: &str) -> String {
        let (name, uuid) = (&self.name, &self.uuid);
        let disks = disks.replace("DIR", self.dir.to_str().unwrap());
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>16</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><devices>\
             <emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}<controller type='usb' model='none'/>\
             <memballoon model='none'/></devices></domain>"
        );
        let file = self.path("domain.xml");
        std::fs::write(self.host.outside(&file), xml).unwrap();
        file.to_str().unwrap().to_owned()
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        for command in [&["destroy", self.name.as_str()][..], &["undefine", "--managed-save", self.name.as_str()][..]] {
            let _ = self.host.lab(&[&["exec", "a", "virsh", "-q"], command].concat());
        }
        let _ = std::fs::remove_dir_all(self.host.outside(&self.dir));
    }
}

pub fn name(disk: &str) -> DiskName {
    DiskName::new(disk).unwrap()
}

/// The file names of a disk's live chain, uppermost first, joined with `<`.
pub fn live(view: &DomainView, disk: &str) -> String {
    let chain = view.disk(&name(disk)).unwrap().live.as_ref().expect("a live chain");
    chain.0.iter().map(|l| l.path.file_name().unwrap().to_str().unwrap()).collect::<Vec<_>>().join("<")
}

/// The file name of a disk's persistent definition.
pub fn inactive(view: &DomainView, disk: &str) -> String {
    let layer = view.disk(&name(disk)).unwrap().inactive.as_ref().expect("a persistent definition");
    layer.path.file_name().unwrap().to_str().unwrap().to_owned()
}

/// Freezes what is named and expects it to be done.
pub fn freeze(hypervisor: &dyn Hypervisor, guest: &Guest, disks: &[(&str, &str)]) {
    let view = hypervisor.observe(&guest.uuid).unwrap();
    let over = |disk: &str| view.disk(&name(disk)).unwrap().live.as_ref().unwrap().top().path.clone();
    let freeze_disk =
        |(disk, overlay): &(&str, &str)| FreezeDisk { over: over(disk), ..guest.freeze_disk(disk, overlay) };
    let disks: Vec<_> = disks.iter().map(freeze_disk).collect();
    hypervisor.freeze(&guest.uuid, &disks).unwrap();
}
