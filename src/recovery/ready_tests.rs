//! Every question, with a host that has what it takes and one that lacks just that.

use super::*;
use crate::block::digest::Digest;
use crate::hypervisor::machine::{Machine, Neighbour, NetworkView};
use crate::recovery::definition::{Macs, Nics, Wish, render};
use crate::recovery::mapping::Mapping;
use crate::replica::TpmPrograms;
use std::path::Path;

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

const GUEST: &str = "<domain type='kvm'><memory unit='MiB'>512</memory>\
    <os firmware='efi'><type arch='x86_64' machine='pc-q35-9.0'>hvm</type><loader secure='yes'/></os>\
    <cpu mode='custom'><model>Haswell</model></cpu><devices>\
    <interface type='network'><mac address='52:54:00:00:00:0A'/><source network='default'/></interface>\
    <interface type='bridge'><mac address='52:54:00:00:00:0b'/><source bridge='br0'/></interface>\
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'>\
    <encryption secret='a5a5a5a5-0000-4000-8000-000000000001'/></backend></tpm></devices></domain>";

const SECRET: &str = "a5a5a5a5-0000-4000-8000-000000000001";

fn definition(mapping: &str) -> Definition {
    let mapping = Mapping::parse(mapping, Path::new("recovery.yaml")).unwrap();
    let (name, uuid) = names();
    let wish = Wish {
        name,
        uuid,
        disks: &[],
        nics: Nics::Mapped,
        macs: Macs::Keep,
        console: None,
        nvram: Some("/x/vars.fd".into()),
        tpm: true,
    };
    render(GUEST, &wish, &mapping).unwrap()
}

fn names() -> (DomainName, DomainUuid) {
    (DomainName::new("web01").unwrap(), DomainUuid::new(UUID).unwrap())
}

fn able() -> HostView {
    let capabilities = Capabilities {
        emulator: "/usr/bin/qemu-system-x86_64".into(),
        cpu_models: vec!["Haswell".into()],
        host_passthrough: true,
        cpu_modes: vec!["custom".into()],
        vcpus_max: Some(288),
        videos: vec!["vga".into()],
        uefi: true,
        secure_boot: true,
        tpm_emulator: true,
    };
    HostView {
        machine: Ok(capabilities),
        networks: vec![NetworkView { name: "lan".into(), active: true }],
        bridges: vec!["br1".into()],
        domains: vec![Neighbour {
            name: "db".into(),
            uuid: "x".into(),
            running: true,
            macs: vec!["52:54:00:00:00:01".into()],
        }],
        free_memory_bytes: 1 << 30,
        qemu_uid: Some(0),
        tpm_states: vec!["x".into()],
        tpm_secrets: vec![SECRET.into()],
        tpm_programs: Some(Programs { swtpm: "0.7.1".into(), libtpms: Some("0.9.2".into()) }),
        cpus: 2,
        libvirt: Some((9, 0, 0)),
        qemu: Some((7, 2, 0)),
        machines: vec!["pc-q35-7.2".into()],
    }
}

const MAPPED: &str = "networks: {default: lan, 'bridge:br0': 'bridge:br1'}";

fn judged(mapping: &str, host: &HostView) -> Vec<Finding> {
    let (name, uuid) = names();
    let room = Room { dir: "/images".into(), free_bytes: Some(10 << 30) };
    judge(&fitted(mapping, host), &name, &uuid, &room, &Builds { source: build(1), here: build(1) })
}

fn fitted(mapping: &str, host: &HostView) -> Fitted {
    Fitted { definition: definition(mapping), host: host.clone(), refused: None }
}

/// A build of the firmware.
fn build(content: u8) -> Option<Firmware> {
    let path = format!("/f/{content}.fd");
    Some(Firmware { format: 1, path, size_bytes: 1, blake3: Digest([content; 32]) })
}

/// The questions that are red, each of which must say what to do.
fn reds(findings: &[Finding]) -> Vec<Question> {
    let red: Vec<&Finding> = findings.iter().filter(|f| f.color == Color::Red).collect();
    for finding in &red {
        assert!(finding.advised.is_some() || finding.advice.as_ref().is_some_and(|a| !a.is_empty()), "{finding:?}");
    }
    red.iter().map(|f| f.question).collect()
}

#[test]
fn a_host_that_has_everything_is_green() {
    let findings = judged(MAPPED, &able());
    assert_eq!(reds(&findings), [], "{findings:#?}");
    assert_eq!(worst(&findings), Color::Green, "{findings:#?}");
    let tpm = findings.iter().find(|f| f.question == Question::Tpm).unwrap();
    assert!(tpm.color == Color::Green && tpm.what.contains("comes with the point"), "{tpm:?}");
}

#[test]
fn each_thing_that_a_host_lacks_makes_its_own_line_red() {
    type Lack = fn(&mut HostView);
    let lacks: [(Question, Lack); 14] = [
        (Question::Machine, |h| h.machine = Err("the machine is not supported".into())),
        (Question::Cpu, |h| h.machine.as_mut().unwrap().cpu_models = vec!["Penryn".into()]),
        (Question::Firmware, |h| h.machine.as_mut().unwrap().uefi = false),
        (Question::Firmware, |h| h.machine.as_mut().unwrap().secure_boot = false),
        (Question::Tpm, |h| h.machine.as_mut().unwrap().tpm_emulator = false),
        (Question::Tpm, |h| h.tpm_secrets = vec![UUID.into()]),
        (Question::Tpm, |h| h.tpm_states.push(UUID.into())),
        (Question::Network, |h| h.networks.clear()),
        (Question::Network, |h| h.networks[0].active = false),
        (Question::Network, |h| h.bridges.clear()),
        (Question::Name, |h| h.domains[0].name = "web01".into()),
        (Question::Uuid, |h| h.domains[0].uuid = UUID.into()),
        (Question::Mac, |h| h.domains[0].macs = vec!["52:54:00:00:00:0a".into()]),
        (Question::Memory, |h| h.free_memory_bytes = 512 << 20),
    ];
    let mut refused = fitted(MAPPED, &able());
    refused.refused = Some("unknown word".to_owned());
    let (name, uuid) = names();
    let room = Room { dir: "/images".into(), free_bytes: Some(10 << 30) };
    let findings = judge(&refused, &name, &uuid, &room, &Builds { source: build(1), here: build(1) });
    assert_eq!(reds(&findings), [Question::Machine], "{findings:#?}");
    for (question, lack) in lacks {
        let mut host = able();
        lack(&mut host);
        let findings = judged(MAPPED, &host);
        assert_eq!(reds(&findings), [question], "{findings:#?}");
    }
}

#[test]
fn the_state_of_a_newer_tpm_is_yellow_and_one_that_is_known_not_to_be_read_is_red() {
    let of = |swtpm: &str, libtpms: Option<&str>| {
        let programs = TpmPrograms { swtpm: swtpm.into(), libtpms: libtpms.map(str::to_owned) };
        let point = point_of(Some(programs));
        tpm_programs(&fitted(MAPPED, &able()), &point).map(|f| f.color)
    };
    assert_eq!(of("0.7.1", Some("0.9.2")), Some(Color::Green));
    assert_eq!(of("0.7.0", None), Some(Color::Green));
    assert_eq!(of("0.8.2", Some("0.9.2")), Some(Color::Yellow));
    assert_eq!(of("0.7.1", Some("0.9.6")), Some(Color::Yellow));
    assert_eq!(of("0.10.1", Some("0.10.0")), Some(Color::Red));
    assert_eq!(tpm_programs(&fitted(MAPPED, &able()), &point_of(None)), None);
}

fn point_of(tpm_programs: Option<TpmPrograms>) -> PointView {
    let json = r#"{"id":"000001-0123abcd","generation":1,"frozen_at":"2026-11-24T06:00:00Z","sealed_at":"2026-11-24T06:00:01Z",
        "consistency":"off","run":"0123456789abcdef","disks":[]}"#;
    PointView { tpm_programs, ..serde_json::from_str(json).unwrap() }
}

#[test]
fn a_chain_that_is_too_long_is_yellow_and_red_where_there_is_no_room_to_shorten_it() {
    let mut deep = fitted(MAPPED, &able());
    let copied = Copied { deepest: 41, images: 16, bytes: 3 << 30 };
    let room = |gib: u64| Room { dir: "/images".into(), free_bytes: Some(gib << 30) };
    assert_eq!(chain(&deep, Copied { deepest: 41, ..Copied::default() }, &room(10)), None);
    deep.definition.images_max = Some(25);
    deep.host.libvirt = Some((11, 3, 0));
    let found = chain(&deep, copied, &room(10)).unwrap();
    assert!(found.color == Color::Yellow && found.what.contains("libvirt 11.3.0 here starts 25 at most"), "{found:?}");
    assert_eq!(chain(&deep, copied, &room(3)).unwrap().color, Color::Red);
    assert_eq!(chain(&deep, Copied { deepest: 25, ..Copied::default() }, &room(3)), None);
}

#[test]
fn no_network_is_said_of_no_guest_whose_interfaces_nobody_has_mapped() {
    let said = |mapping: &str| {
        let findings = judged(mapping, &able());
        findings.into_iter().filter(|f| f.question == Question::Network).map(|f| f.what).collect::<Vec<_>>()
    };
    assert_eq!(said("networks: {}"), [""; 0]);
    assert_eq!(
        said("networks: {default: none, 'bridge:br0': none}"),
        ["the domain is on no network here: its interfaces are left out"]
    );
    let suggested = super::super::suggest::lines(&fitted("networks: {}", &able())).join("\n");
    assert!(suggested.contains("\n  \"default\": \"lan\"\n  \"bridge:br0\": \"lan\""), "{suggested}");
    let pasted = Mapping::parse(&suggested, Path::new("recovery.yaml")).unwrap();
    assert_eq!(pasted.networks.len(), 2);
    let advice = judged("networks: {}", &able()).into_iter().filter_map(|f| f.advice.filter(|_| f.color == Color::Red));
    advice.for_each(|advice| assert!(advice.contains("recovery.yaml"), "{advice}"));
}

#[test]
fn nothing_red_needs_the_source() {
    let mut all = vec![];
    for mapping in [MAPPED, "networks: {}"] {
        let mut host = able();
        host.machine.as_mut().unwrap().tpm_emulator = false;
        host.machine.as_mut().unwrap().secure_boot = false;
        host.machine.as_mut().unwrap().cpu_models = vec!["Penryn".into()];
        host.free_memory_bytes = 1;
        all.extend(judged(mapping, &host));
        host.machine = Err("no".into());
        all.extend(judged(mapping, &host));
    }
    for finding in all.iter().filter(|f| f.color == Color::Red) {
        let advice = finding.advice.as_deref().unwrap_or_default();
        assert!(!advice.contains("at the source") && !advice.contains("source's domain"), "{advice}");
    }
}

#[test]
fn a_network_that_nobody_mapped_is_red_and_one_that_is_left_out_is_not() {
    assert_eq!(reds(&judged("networks: {default: lan}", &able())), [Question::Devices]);
    assert_eq!(reds(&judged("networks: {default: lan, 'bridge:br0': none}", &able())), []);
    let mapped = format!("{MAPPED}\nmachines: {{pc-q35-9.0: pc-q35-7.2}}\ncpus: {{Haswell: Penryn}}");
    let d = definition(&mapped);
    let machine = Machine { virt_type: "kvm".into(), arch: "x86_64".into(), machine: "pc-q35-7.2".into() };
    assert_eq!((d.machine, d.cpu.as_deref()), (machine, Some("Penryn")));
}

#[test]
fn another_build_of_the_firmware_is_yellow_and_so_is_one_that_nobody_knows() {
    let seen = |source, here| {
        let finding = super::build(&Builds { source, here });
        assert_eq!(finding.advised.is_some(), finding.color != Color::Green);
        (finding.color, finding.what)
    };
    assert_eq!(seen(build(1), build(1)).0, Color::Green);
    let (color, what) = seen(build(1), build(2));
    assert!(color == Color::Yellow && what.contains("/f/2.fd") && what.contains("/f/1.fd"), "{what}");
    let (color, what) = seen(None, build(2));
    assert!(color == Color::Yellow && what.contains("the point does not say"), "{what}");
    let (color, what) = seen(build(1), None);
    assert!(color == Color::Yellow && what.contains("does not say which"), "{what}");
}

/// `"vda"`, and what the point says of disks that are not in it: `"vdb unprotected"`.
fn left(os: &str, disks: &str, skipped: &str, mapping: &str) -> Vec<(Color, String)> {
    let disk = |word: &str| {
        let (dev, order) =
            word.split_once('^').map_or((word, String::new()), |(d, n)| (d, format!("<boot order='{n}'/>")));
        format!("<disk type='file' device='disk'><target dev='{dev}' bus='virtio'/>{order}</disk>")
    };
    let xml = GUEST
        .replace("<devices>", &format!("<devices>{}", disks.split(' ').map(disk).collect::<String>()))
        .replace("hvm</type>", &format!("hvm</type>{os}"));
    let mapping = Mapping::parse(mapping, Path::new("recovery.yaml")).unwrap();
    let (name, uuid) = names();
    let wish =
        Wish { name, uuid, disks: &[], nics: Nics::Mapped, macs: Macs::Keep, console: None, nvram: None, tpm: false };
    let definition = render(&xml, &wish, &mapping).unwrap();
    let (disk, cause) = skipped.split_once(' ').unwrap();
    let json = format!(r#"[{{"name":"{disk}","reason":"is encrypted by QEMU (luks)","cause":"{cause}"}}]"#);
    let mut point = crate::replicate::state::report::tests::report(true).point.unwrap();
    point.left_out = serde_json::from_str(&json).unwrap();
    let found = left_out(&definition, &point, &mapping);
    reds(&found);
    found.into_iter().map(|f| (f.color, f.what)).collect()
}

/// Yellow where the source could not protect a disk; red where the guest boots from it, until this host's operator says
/// so.
#[test]
fn a_disk_that_the_source_could_not_protect_is_told_and_a_boot_disk_is_red() {
    let color = |os: &str, disks: &str, skipped: &str, mapping: &str| left(os, disks, skipped, mapping)[0].0;
    assert_eq!(color("", "vda vdb", "vdb unprotected", ""), Color::Yellow);
    assert_eq!(color("", "vda vdb", "vda unprotected", ""), Color::Red);
    assert_eq!(color("<boot dev='network'/>", "vda vdb", "vda unprotected", ""), Color::Yellow);
    assert_eq!(color("<boot dev='cdrom'/><boot dev='hd'/>", "vda vdb", "vda unprotected", ""), Color::Red);
    assert_eq!(color("", "vda^2 vdb^1", "vda unprotected", ""), Color::Yellow);
    assert_eq!(color("", "vda^2 vdb^1", "vdb unprotected", ""), Color::Red);
    assert_eq!(color("<kernel>/srv/kernels/x</kernel>", "vda", "vda unprotected", ""), Color::Yellow);
    // The way out needs no source.
    assert_eq!(color("", "vda vdb", "vda unprotected", "without_disks: [vda]"), Color::Yellow);
    assert_eq!(color("", "vda vdb", "vda excluded", ""), Color::Green, "its operator knows");
    assert_eq!(left("", "vda", "sda removable", ""), []);
    let (_, what) = left("", "vda", "vda unprotected", "").remove(0);
    assert!(what.contains("from which the guest boots") && what.contains("luks"), "{what}");
}

#[test]
fn a_directory_that_is_not_there_is_red_and_a_small_one_yellow() {
    let room = |free_bytes| room_for(&Room { dir: "/images".into(), free_bytes }).color;
    assert_eq!((room(None), room(Some(1 << 20)), room(Some(2 << 30))), (Color::Red, Color::Yellow, Color::Green));
}
