//! The hypervisor port against real libvirt and QEMU: what is observed, and what freeze, commit, record, redefinition
//! and a dying libvirtd really do. Domains have no operating system; bytes are written through the live device.
//!
//! Needs a lab (`make test-lab`).

#[path = "hypervisor/host.rs"]
mod host;

use host::{Host, TWO_DISKS, freeze, inactive, live, name};
use std::time::{Duration, Instant};
use virt_replica::block::DiskSize;
use virt_replica::error::Kind;
use virt_replica::hypervisor::libvirt::gate::{Call, Gate, Repeat, Wake};
use virt_replica::hypervisor::libvirt::{Deadlines, LibvirtHypervisor};
use virt_replica::hypervisor::{BlockJobKind, DiskKind, FreezeDisk, Hypervisor, Power};

const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Commits and pivots a ready-made overlay while the guest stands, and says how long it stood.
fn commit(h: &LibvirtHypervisor, guest: &host::Guest, disks: &[(&str, &str, &str)]) -> Duration {
    for (disk, top, base) in disks {
        h.start_commit(&guest.uuid, &name(disk), &guest.path(top), &guest.path(base), true).unwrap();
    }
    for (disk, ..) in disks {
        let job = h.wait_job(&guest.uuid, &name(disk), READY_TIMEOUT).unwrap().expect("an active commit waits");
        assert_eq!((job.kind, job.ready), (BlockJobKind::ActiveCommit, true), "{job:?}");
    }
    let start = Instant::now();
    h.pause(&guest.uuid).unwrap();
    for (disk, ..) in disks {
        h.pivot(&guest.uuid, &name(disk)).unwrap();
    }
    let view = h.observe(&guest.uuid).unwrap();
    for (disk, top, base) in disks {
        assert!(live(&view, disk).starts_with(base), "{}", live(&view, disk));
        if view.persistent {
            assert_eq!(inactive(&view, disk), *base);
        }
        assert!(view.disk(&name(disk)).unwrap().job.is_none());
        assert!(guest.file(top).is_some(), "libvirt leaves the overlay's file to us");
    }
    h.resume(&guest.uuid).unwrap();
    start.elapsed()
}

#[test]
fn a_domain_is_observed_running_paused_and_off() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    let off = h.find(&guest.name).unwrap();
    assert_eq!((off.power, off.id, off.persistent), (Power::Off, None, true));
    assert_eq!((off.uuid.as_str(), off.name.as_str()), (guest.uuid.as_str(), guest.name.as_str()));
    let vda = off.disk(&name("vda")).unwrap();
    assert_eq!((vda.kind.clone(), vda.size), (DiskKind::Image, Some(DiskSize(64 << 20))));
    assert_eq!((vda.live.clone(), vda.inactive.clone()), (None, Some(guest.layer("a.qcow2"))));

    guest.start_paused();
    let paused = h.observe(&guest.uuid).unwrap();
    assert_eq!((paused.power, paused.persistent), (Power::Paused, true));
    assert_eq!(paused.disks.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["vda", "vdb"]);
    let vda = paused.disk(&name("vda")).unwrap();
    assert_eq!(vda.live.clone().unwrap().0, [guest.layer("a.qcow2"), guest.layer("gold.qcow2")]);
    assert_eq!((vda.inactive.clone(), vda.size), (Some(guest.layer("a.qcow2")), Some(DiskSize(64 << 20))));
    let vdb = paused.disk(&name("vdb")).unwrap();
    assert_eq!(vdb.live.clone().unwrap().0, [guest.layer("b.raw")]);
    assert!(vdb.job.is_none() && !vdb.read_only && !vdb.shareable);

    // Both verbs say nothing against what is so already.
    for _ in 0..2 {
        h.resume(&guest.uuid).unwrap();
        assert_eq!(h.observe(&guest.uuid).unwrap().power, Power::Running);
    }
    for _ in 0..2 {
        h.pause(&guest.uuid).unwrap();
        assert_eq!(h.observe(&guest.uuid).unwrap().power, Power::Paused);
    }
    let id = paused.id.unwrap();
    host.virsh(&["destroy", &guest.name]);
    guest.start();
    assert!(h.observe(&guest.uuid).unwrap().id.unwrap() > id, "another instance has another id");
    assert_eq!(h.pause(&guest.uuid).and_then(|()| h.resume(&guest.uuid)).map_err(|e| e.chain()), Ok(()));
}

#[test]
fn a_transient_domain_has_no_definition_and_leaves_nothing() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.create(TWO_DISKS));
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!((view.power, view.persistent, view.managed_save), (Power::Running, false, false));
    assert!(view.disks.iter().all(|d| d.inactive.is_none() && d.live.is_some()));
    let e = h.redefine(&guest.uuid, &[(name("vda"), guest.layer("gold.qcow2"))]).unwrap_err();
    assert_eq!(e.kind(), Kind::Refused, "{}", e.chain());
    freeze(&h, &guest, &[("vda", "o.qcow2")]);
    commit(&h, &guest, &[("vda", "o.qcow2", "a.qcow2")]);
    assert!(!h.observe(&guest.uuid).unwrap().persistent, "nothing may have made it persistent");
    host.virsh(&["destroy", &guest.name]);
    assert_eq!(h.observe(&guest.uuid).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_domain_is_found_by_name_uuid_and_id() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    guest.start_paused();
    let view = h.observe(&guest.uuid).unwrap();
    for text in
        [guest.name.clone(), guest.uuid.to_string(), guest.uuid.as_str().to_uppercase(), view.id.unwrap().to_string()]
    {
        assert_eq!(h.find(&text).unwrap(), view, "{text}");
    }
    for text in ["no-such-domain", "999999", "11111111-2222-3333-4444-555555555555"] {
        let e = h.find(text).unwrap_err();
        assert_eq!(e.kind(), Kind::NotFound, "{}", e.chain());
        assert_eq!(e.advice(), Some(&virt_replica::error::advice::Host::FindDomain.into()));
    }
    assert!(h.list().unwrap().contains(&view));
}

#[test]
fn disks_that_cannot_be_replicated_say_why() {
    let host = Host::shared();
    let disk = |kind: &str, device: &str, source: &str, target: &str, extra: &str| {
        format!(
            "<disk type='{kind}' device='{device}'><driver name='qemu' type='raw'/>{source}\
             <target dev='{target}' bus='{}'/>{extra}</disk>",
            if device == "cdrom" { "ide" } else { "virtio" }
        )
    };
    let file = "<source file='DIR/b.raw'/>";
    let nbd = "<source protocol='nbd' name='x'><host name='192.0.2.1' port='10809'/></source>";
    let mixed = [
        disk("file", "cdrom", "", "hdc", "<readonly/>"),
        disk("file", "disk", file, "vda", "<readonly/>"),
        disk("file", "disk", file, "vdb", "<shareable/>"),
        disk("network", "disk", nbd, "vdc", ""),
        disk("file", "disk", "<source file='DIR/gone.raw'/>", "vdd", ""),
    ];
    let (h, guest) = (host.hypervisor(), host.define(&mixed.concat()));
    let view = h.observe(&guest.uuid).unwrap();
    let why = |disk: &str| match &view.disk(&name(disk)).unwrap().kind {
        DiskKind::Unsupported(why) | DiskKind::Removable(why) => why.clone(),
        DiskKind::Image => "image".into(),
    };
    assert_eq!(why("hdc"), "is a cdrom");
    assert_eq!(why("vda"), "is read-only");
    assert_eq!(why("vdb"), "is shareable (another domain may write to it)");
    assert_eq!(why("vdc"), "lies on the network (nbd)");
    // Its file is missing: the domain is described nevertheless.
    assert_eq!((why("vdd").as_str(), view.disk(&name("vdd")).unwrap().size), ("image", None));
    assert!(view.disk(&name("vda")).unwrap().read_only && view.disk(&name("vdb")).unwrap().shareable);
}

#[test]
fn two_disks_freeze_at_once_and_come_back_onto_their_bases() {
    let host = Host::shared();
    let (h, guest) = (
        host.hypervisor(),
        host.define(&format!(
            "{TWO_DISKS}<disk type='file' device='cdrom'>\
        <target dev='hdc' bus='ide'/><readonly/></disk>"
        )),
    );
    guest.start();
    let original = h.definition(&guest.uuid, true, false).unwrap();
    for (device, byte) in [(0, 0x11), (1, 0x22)] {
        guest.write(device, byte, "0", "1M");
    }
    freeze(&h, &guest, &[("vda", "va.qcow2"), ("vdb", "vb.qcow2")]);
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!(view.power, Power::Running);
    assert_eq!(
        (live(&view, "vda"), live(&view, "vdb")),
        ("va.qcow2<a.qcow2<gold.qcow2".into(), "vb.qcow2<b.raw".into())
    );
    assert_eq!((inactive(&view, "vda"), inactive(&view, "vdb")), ("va.qcow2".into(), "vb.qcow2".into()));
    assert_eq!(view.disk(&name("vdb")).unwrap().size, Some(DiskSize(64 << 20)));

    for (device, byte) in [(0, 0x33), (1, 0x44)] {
        guest.write(device, byte, "0", "64k");
    }
    assert!(guest.holds("a.qcow2", 0x11, "0", "1M") && guest.holds("b.raw", 0x22, "0", "1M"), "a frozen image moved");

    commit(&h, &guest, &[("vda", "va.qcow2", "a.qcow2"), ("vdb", "vb.qcow2", "b.raw")]);
    assert_eq!(h.observe(&guest.uuid).unwrap().power, Power::Running);
    assert!(guest.holds("a.qcow2", 0x33, "0", "64k") && guest.holds("b.raw", 0x44, "0", "64k"));
    assert!(guest.holds("a.qcow2", 0x11, "64k", "960k") && guest.holds("b.raw", 0x22, "64k", "960k"));
    assert_eq!(h.definition(&guest.uuid, true, false).unwrap(), original, "the definition is what it was");
}

#[test]
fn a_paused_domain_freezes_and_stays_paused() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    guest.start_paused();
    freeze(&h, &guest, &[("vdb", "o.qcow2")]);
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!((view.power, live(&view, "vdb")), (Power::Paused, "o.qcow2<b.raw".into()));
    assert_eq!(live(&view, "vda"), "a.qcow2<gold.qcow2", "only what was named is frozen");
    commit(&h, &guest, &[("vdb", "o.qcow2", "b.raw")]);
}

#[test]
fn a_refused_freeze_leaves_nothing() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    let good = guest.freeze_disk("vda", "va.qcow2");
    let off = h.freeze(&guest.uuid, std::slice::from_ref(&good)).unwrap_err();
    assert_eq!(off.kind(), Kind::Refused, "{}", off.chain());
    assert_eq!(inactive(&h.observe(&guest.uuid).unwrap(), "vda"), "a.qcow2");

    guest.start();
    host.exec(&["sh", "-c", &format!("echo mine >{}", guest.path("taken.qcow2").display())]);
    let bad = [
        (guest.freeze_disk("vdb", "no/such/dir.qcow2"), Kind::Refused),
        (guest.freeze_disk("vdb", "taken.qcow2"), Kind::Refused),
        (guest.freeze_disk("vdx", "vx.qcow2"), Kind::Conflict),
        (guest.freeze_disk("vda", "other.qcow2"), Kind::Usage),
        (guest.freeze_disk("vdb", "va.qcow2"), Kind::Usage),
        // Somebody's snapshot came first: the guest does not write to the image that was planned.
        (FreezeDisk { over: guest.path("a.qcow2"), ..guest.freeze_disk("vdb", "vb.qcow2") }, Kind::Busy),
    ];
    for (bad, kind) in bad {
        let e = h.freeze(&guest.uuid, &[good.clone(), bad]).unwrap_err();
        assert_eq!(e.kind(), kind, "{}", e.chain());
        let view = h.observe(&guest.uuid).unwrap();
        assert_eq!((live(&view, "vda"), live(&view, "vdb")), ("a.qcow2<gold.qcow2".into(), "b.raw".into()));
        assert_eq!((inactive(&view, "vda"), inactive(&view, "vdb")), ("a.qcow2".into(), "b.raw".into()));
        assert_eq!(guest.file("va.qcow2"), None, "{}", e.chain());
    }
    assert_eq!(guest.file("taken.qcow2"), Some(5), "a file that was there is not ours to touch");
}

/// A job that copies slowly (1 MiB/s) is neither ready by progress nor pivoted by force.
#[test]
fn a_commit_that_is_not_ready_is_busy_and_can_be_cancelled() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    guest.start();
    freeze(&h, &guest, &[("vdb", "o.qcow2")]);
    guest.write(1, 0x55, "0", "32M");
    host.virsh(&["blockcommit", &guest.name, "vdb", "--active", "--bandwidth", "1"]);
    let start = Instant::now();
    let job = h.wait_job(&guest.uuid, &name("vdb"), Duration::from_millis(1500)).unwrap().unwrap();
    assert!((1500..4000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    assert_eq!((job.kind, job.ready), (BlockJobKind::ActiveCommit, false));
    assert!(job.done_bytes < job.total_bytes, "{job:?}");
    assert_eq!(h.observe(&guest.uuid).unwrap().disk(&name("vdb")).unwrap().job.map(|j| j.ready), Some(false));
    let e = h.pivot(&guest.uuid, &name("vdb")).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{}", e.chain());
    let e = h.start_commit(&guest.uuid, &name("vdb"), &guest.path("o.qcow2"), &guest.path("b.raw"), true).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{}", e.chain());
    let second = FreezeDisk { over: guest.path("o.qcow2"), ..guest.freeze_disk("vdb", "second.qcow2") };
    let e = h.freeze(&guest.uuid, &[second]).unwrap_err();
    assert!(matches!(e.kind(), Kind::Busy | Kind::Refused), "{}", e.chain());
    for _ in 0..2 {
        h.cancel_job(&guest.uuid, &name("vdb")).unwrap();
        let view = h.observe(&guest.uuid).unwrap();
        assert_eq!((live(&view, "vdb"), view.disk(&name("vdb")).unwrap().job), ("o.qcow2<b.raw".into(), None));
    }
    assert_eq!(h.wait_job(&guest.uuid, &name("vdb"), READY_TIMEOUT).unwrap(), None, "no job is an answer at once");
    commit(&h, &guest, &[("vdb", "o.qcow2", "b.raw")]);
    assert!(guest.holds("b.raw", 0x55, "0", "32M"));
}

#[test]
fn an_overlay_below_a_foreign_one_is_committed_without_it() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    guest.start();
    guest.write(1, 0x11, "0", "1M");
    freeze(&h, &guest, &[("vdb", "ours.qcow2")]);
    guest.write(1, 0x22, "0", "128k");
    let foreign = format!("vdb,file={}", guest.path("foreign.qcow2").display());
    host.virsh(&[
        "snapshot-create-as",
        &guest.name,
        "--disk-only",
        "--no-metadata",
        "--diskspec",
        &foreign,
        "--diskspec",
        "vda,snapshot=no",
    ]);
    guest.write(1, 0x33, "0", "64k");

    let conflict = |top: &str, base: &str, active: bool| {
        let e = h.start_commit(&guest.uuid, &name("vdb"), &guest.path(top), &guest.path(base), active).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict, "{}", e.chain());
    };
    conflict("ours.qcow2", "b.raw", true);
    conflict("foreign.qcow2", "b.raw", true);
    conflict("foreign.qcow2", "ours.qcow2", false);
    conflict("stranger.qcow2", "b.raw", false);

    h.start_commit(&guest.uuid, &name("vdb"), &guest.path("ours.qcow2"), &guest.path("b.raw"), false).unwrap();
    let start = Instant::now();
    assert_eq!(h.wait_job(&guest.uuid, &name("vdb"), READY_TIMEOUT).unwrap(), None, "it ends by itself");
    assert!(start.elapsed() < Duration::from_secs(5));
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!((live(&view, "vdb"), inactive(&view, "vdb")), ("foreign.qcow2<b.raw".into(), "foreign.qcow2".into()));
    assert!(guest.holds("b.raw", 0x22, "0", "128k") && guest.holds("b.raw", 0x11, "128k", "896k"));
    assert!(guest.holds("foreign.qcow2", 0x33, "0", "64k"));
}

#[test]
fn the_record_lies_in_both_definitions_and_goes_again() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    let record = |view: virt_replica::hypervisor::DomainView| view.record;
    let text = "{\"run\":\"<&'\\\"\u{1F427}>\",\"n\":1}";
    let before = h.definition(&guest.uuid, true, true).unwrap();
    h.set_record(&guest.uuid, None).unwrap();
    assert_eq!(h.definition(&guest.uuid, true, true).unwrap(), before, "removing nothing changes nothing");

    h.set_record(&guest.uuid, Some("off")).unwrap();
    assert_eq!(record(h.observe(&guest.uuid).unwrap()).as_deref(), Some("off"));
    guest.start_paused();
    assert_eq!(record(h.observe(&guest.uuid).unwrap()).as_deref(), Some("off"), "it is taken along by a start");
    for value in [text, "{}"] {
        h.set_record(&guest.uuid, Some(value)).unwrap();
        for flag in ["--live", "--config"] {
            let ns = "https://virt-replica.org/xmlns/record/1";
            assert!(host.virsh(&["metadata", &guest.name, ns, flag]).contains("<record>"), "{flag}");
        }
        assert_eq!(record(h.observe(&guest.uuid).unwrap()).as_deref(), Some(value));
    }
    host.virsh(&["destroy", &guest.name]);
    assert_eq!(record(h.observe(&guest.uuid).unwrap()).as_deref(), Some("{}"), "the persistent one had it too");
    h.set_record(&guest.uuid, None).unwrap();
    assert_eq!(record(h.observe(&guest.uuid).unwrap()), None);
    assert_eq!(h.set_record(&guest.uuid, Some("\u{0}")).unwrap_err().kind(), Kind::Usage);

    let transient = host.create(TWO_DISKS);
    h.set_record(&transient.uuid, Some(text)).unwrap();
    assert_eq!(record(h.observe(&transient.uuid).unwrap()).as_deref(), Some(text));
    h.set_record(&transient.uuid, None).unwrap();
    assert_eq!(record(h.observe(&transient.uuid).unwrap()), None);
}

/// QEMU dies between freeze and commit: the overlay is committed offline, the definition goes back to the base.
#[test]
fn the_definition_of_a_domain_that_is_off_goes_back_byte_for_byte() {
    let host = Host::shared();
    let graphics = "<graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1' passwd='secret'/>";
    let (h, guest) = (host.hypervisor(), host.define(&format!("{TWO_DISKS}{graphics}")));
    let original = h.definition(&guest.uuid, true, true).unwrap();
    assert!(original.contains("secret") && !h.definition(&guest.uuid, true, false).unwrap().contains("secret"));
    guest.start();
    freeze(&h, &guest, &[("vda", "va.qcow2"), ("vdb", "vb.qcow2")]);
    guest.write(1, 0x66, "0", "64k");
    host.virsh(&["destroy", &guest.name]);
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!(
        (view.power, inactive(&view, "vda"), inactive(&view, "vdb")),
        (Power::Off, "va.qcow2".into(), "vb.qcow2".into())
    );

    host.exec(&["qemu-img", "commit", "-q", "-d", guest.path("vb.qcow2").to_str().unwrap()]);
    let bases = [(name("vda"), guest.layer("a.qcow2")), (name("vdb"), guest.layer("b.raw"))];
    for _ in 0..2 {
        h.redefine(&guest.uuid, &bases).unwrap();
        assert_eq!(h.definition(&guest.uuid, true, true).unwrap(), original);
    }
    guest.start();
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!((live(&view, "vda"), live(&view, "vdb")), ("a.qcow2<gold.qcow2".into(), "b.raw".into()));
    assert!(guest.holds("b.raw", 0x66, "0", "64k"));
    let e = h.redefine(&guest.uuid, &[(name("vdx"), guest.layer("b.raw"))]).unwrap_err();
    assert_eq!(e.kind(), Kind::Conflict, "{}", e.chain());
}

#[test]
fn other_jobs_and_saved_memory_are_seen() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    guest.start();
    assert_eq!(h.observe(&guest.uuid).unwrap().domain_job, None);
    let socket = guest.path("backup.sock");
    let backup = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks><disk name='vda' backup='no'/>\
         <disk name='vdb' backup='yes' type='file'><scratch file='{}'/></disk></disks></domainbackup>",
        socket.display(),
        guest.path("scratch.qcow2").display()
    );
    std::fs::write(host.outside(&guest.path("backup.xml")), backup).unwrap();
    host.virsh(&["backup-begin", &guest.name, guest.path("backup.xml").to_str().unwrap()]);
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!(view.domain_job.as_deref(), Some("backup"));
    host.virsh(&["domjobabort", &guest.name]);
    assert_eq!(h.observe(&guest.uuid).unwrap().domain_job, None);

    assert!(!h.observe(&guest.uuid).unwrap().managed_save);
    host.virsh(&["managedsave", &guest.name]);
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!((view.power, view.managed_save), (Power::Off, true));
}

/// A killed libvirtd costs nothing: the connection is reopened, the record is there, the job goes on, and events come
/// over the new connection.
#[test]
fn a_killed_libvirtd_is_survived() {
    let host = Host::private();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    guest.start();
    h.set_record(&guest.uuid, Some("{\"state\":\"frozen\"}")).unwrap();
    freeze(&h, &guest, &[("vdb", "o.qcow2")]);
    guest.write(1, 0x77, "0", "4M");

    host.libvirtd("kill9");
    let e = h.observe(&guest.uuid).unwrap_err();
    assert_eq!(e.kind(), Kind::Unavailable, "{}", e.chain());
    assert_eq!(h.pause(&guest.uuid).unwrap_err().kind(), Kind::Unavailable, "it cannot have been sent");
    host.libvirtd("start");
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!(view.record.as_deref(), Some("{\"state\":\"frozen\"}"));
    assert_eq!(live(&view, "vdb"), "o.qcow2<b.raw");

    // Between two calls, the second of which must not be sent twice.
    host.libvirtd("kill9");
    host.libvirtd("start");
    let mut listener = Listener::new(&host);
    listener.subscribe(&guest, "vdb");
    h.start_commit(&guest.uuid, &name("vdb"), &guest.path("o.qcow2"), &guest.path("b.raw"), true).unwrap();
    listener.expect_event();
    h.cancel_job(&guest.uuid, &name("vdb")).unwrap();

    // In the middle of a wait: 4 MiB at 1 MiB/s.
    host.virsh(&["blockcommit", &guest.name, "vdb", "--active", "--bandwidth", "1"]);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| h.wait_job(&guest.uuid, &name("vdb"), READY_TIMEOUT));
        host.libvirtd("kill9");
        assert!(!waiter.is_finished(), "too fast to say anything");
        host.libvirtd("start");
        assert!(waiter.join().unwrap().unwrap().expect("the job outlives libvirtd").ready);
    });
    // The new connection has its events as well.
    listener.reopen();
    listener.subscribe(&guest, "vdb");
    h.pause(&guest.uuid).unwrap();
    h.pivot(&guest.uuid, &name("vdb")).unwrap();
    listener.expect_event();
    drop(listener);
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!((live(&view, "vdb"), inactive(&view, "vdb")), ("b.raw".into(), "b.raw".into()));
    h.resume(&guest.uuid).unwrap();
    assert!(guest.holds("b.raw", 0x77, "0", "4M"));
    h.set_record(&guest.uuid, None).unwrap();
}

/// Events as `wait_job` gets them. Its questions would hide their absence, so it is the gate that is listened to here.
struct Listener {
    gate: Gate,
    wake: Option<Wake>,
}

impl Listener {
    fn new(host: &Host) -> Self {
        let this = Self { gate: Gate::new(Some(&host.uri)).unwrap(), wake: None };
        this.reopen();
        this
    }

    /// Any call opens the connection, and its events with it.
    fn reopen(&self) {
        let (deadline, repeat) = (READY_TIMEOUT, Repeat::Harmless);
        let call = Call { what: "listen", domain: None, deadline, repeat };
        self.gate.call(call, |c| Ok(c.lib_version()?)).unwrap();
    }

    fn subscribe(&mut self, guest: &host::Guest, disk: &str) {
        self.wake = Some(self.gate.subscribe(guest.uuid.as_str(), disk));
    }

    fn expect_event(&self) {
        let start = Instant::now();
        self.wake.as_ref().unwrap().wait(READY_TIMEOUT);
        assert!(start.elapsed() < READY_TIMEOUT / 2, "no event came");
    }
}

#[test]
fn a_block_jobs_events_concern_its_disk_only() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    guest.start();
    freeze(&h, &guest, &[("vdb", "o.qcow2")]);
    let mut listener = Listener::new(&host);
    let other = listener.gate.subscribe(guest.uuid.as_str(), "vda");
    listener.subscribe(&guest, "vdb");
    h.start_commit(&guest.uuid, &name("vdb"), &guest.path("o.qcow2"), &guest.path("b.raw"), true).unwrap();
    listener.expect_event();
    assert!(h.wait_job(&guest.uuid, &name("vdb"), READY_TIMEOUT).unwrap().unwrap().ready);
    // Asked again, it answers at once.
    let start = Instant::now();
    assert!(h.wait_job(&guest.uuid, &name("vdb"), READY_TIMEOUT).unwrap().unwrap().ready);
    assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
    h.pivot(&guest.uuid, &name("vdb")).unwrap();
    listener.expect_event();
    let start = Instant::now();
    other.wait(Duration::from_millis(300));
    assert!(start.elapsed() >= Duration::from_millis(300), "woken by another disk's event");
}

#[test]
fn a_hanging_libvirtd_holds_nobody_beyond_the_deadline() {
    let host = Host::private();
    let short = Duration::from_millis(700);
    let h = host.hypervisor_with(Deadlines { query: short, change: short, standing: short, probing: short });
    let guest = host.define(TWO_DISKS);
    guest.start_paused();
    h.observe(&guest.uuid).unwrap();
    let connections = host.libvirtd_sockets();
    host.signal_libvirtd("STOP");
    let timed = |what: &str, kind: Kind, call: &dyn Fn() -> virt_replica::error::Result<()>| {
        let start = Instant::now();
        let e = call().unwrap_err();
        assert!(start.elapsed() < short + Duration::from_millis(300), "{what}: {:?}", start.elapsed());
        assert_eq!(e.kind(), kind, "{what}: {}", e.chain());
        assert_eq!(e.context().domain.as_deref(), Some(guest.uuid.as_str()), "{what}");
        assert!(e.what().contains("0.7 s"), "{what}: {e}");
    };
    // On the open connection libvirtd has the question before the freeze; on the next one, not even the greeting.
    for overlay in ["late1.qcow2", "late2.qcow2"] {
        timed("freeze", Kind::Unavailable, &|| h.freeze(&guest.uuid, &[guest.freeze_disk("vda", overlay)]));
    }
    timed("observe", Kind::Unavailable, &|| h.observe(&guest.uuid).map(drop));
    timed("resume", Kind::Unavailable, &|| h.resume(&guest.uuid));
    let start = Instant::now();
    assert!(h.wait_job(&guest.uuid, &name("vda"), short).is_err());
    assert!(start.elapsed() < 3 * short, "{:?}", start.elapsed());
    host.signal_libvirtd("CONT");
    assert_eq!(h.observe(&guest.uuid).unwrap().power, Power::Paused, "a call just works again");
    // What was left behind is closed as soon as libvirtd answers, events and all.
    let settled = Instant::now() + Duration::from_secs(10);
    while host.libvirtd_sockets() > connections && Instant::now() < settled {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(host.libvirtd_sockets(), connections, "connections stay open");
    // Nor has any of it happened since.
    let view = h.observe(&guest.uuid).unwrap();
    assert_eq!((view.power, live(&view, "vda")), (Power::Paused, "a.qcow2<gold.qcow2".into()));
}

/// After an upgrade of QEMU libvirt looks at its emulators anew, and the first definition waits for that. Here it
/// takes two seconds for each way to run a guest: longer than the deadline of any other change.
#[test]
fn a_libvirt_that_looks_at_its_emulators_anew_is_waited_for() {
    let host = Host::shared();
    let guest = host.define(TWO_DISKS);
    guest.give_slow_emulator(2);
    let h = |probing| {
        let second = Duration::from_secs(1);
        host.hypervisor_with(Deadlines { query: 10 * second, change: second, standing: second, probing })
    };
    let disks = [(name("vda"), guest.layer("a.qcow2"))];
    let patient = h(Duration::from_secs(120));
    patient.redefine(&guest.uuid, &disks).unwrap();
    // Nobody waits for long: the answer to what was asked first is the one that is used.
    guest.upgrade_emulator();
    let hasty = h(Duration::from_millis(700));
    let e = hasty.redefine(&guest.uuid, &disks).unwrap_err();
    assert_eq!(e.kind(), Kind::Unavailable, "{}", e.chain());
    assert!(e.hint_text().unwrap().contains("after an upgrade of QEMU"), "{e}");
    let until = Instant::now() + Duration::from_secs(60);
    while let Err(e) = hasty.redefine(&guest.uuid, &disks) {
        assert_eq!(e.kind(), Kind::Unavailable, "{}", e.chain());
        assert!(Instant::now() < until, "never: {}", e.chain());
    }
    // What a run asks before its freeze: what follows is quick.
    guest.upgrade_emulator();
    let start = Instant::now();
    patient.warm_up(&guest.uuid).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(2), "libvirt did not look: {:?}", start.elapsed());
    h(Duration::from_millis(1500)).redefine(&guest.uuid, &disks).unwrap();
}

/// The published figures: freeze, pivot, and how long the guest stands (two disks). I2 bounds the pause.
#[test]
fn the_guest_stands_for_less_than_a_second() {
    let host = Host::shared();
    let (h, guest) = (host.hypervisor(), host.define(TWO_DISKS));
    guest.start();
    let (mut frozen, mut paused) = (Vec::new(), Vec::new());
    for n in 0..10 {
        guest.write(0, n, "0", "1M");
        let (va, vb) = (format!("va{n}.qcow2"), format!("vb{n}.qcow2"));
        let start = Instant::now();
        freeze(&h, &guest, &[("vda", &va), ("vdb", &vb)]);
        frozen.push(start.elapsed());
        guest.write(1, n, "0", "1M");
        paused.push(commit(&h, &guest, &[("vda", &va, "a.qcow2"), ("vdb", &vb, "b.raw")]));
    }
    for times in [&mut frozen, &mut paused] {
        times.sort();
    }
    println!("freeze of two disks: median {:?}, worst {:?}", frozen[5], frozen[9]);
    println!("pause, two pivots, look, resume: median {:?}, worst {:?}", paused[5], paused[9]);
    assert!(paused[9] < Duration::from_secs(1), "{paused:?}");
}
