//! What travels, of small documents in a notation: a word is a device, and the same word is the same device.

use super::*;
use crate::hypervisor::xml;

/// `vda` a virtio disk, `sda` one on a SCSI bus, `hdc` a CD drive (`vdb=cdrom` too), `nic1` an interface, `usb2` a
/// host's USB device. `@5` puts it on that PCI bus, `^1` gives it that boot order. `mem=64`, `cpus=2`, `machine=q` and
/// `cpu=X` are what they say; `hd` boots from the first disk.
fn domain(live: bool, notation: &str) -> String {
    let mut top = String::new();
    let mut os = String::from("<type machine='MACHINE'>hvm</type>");
    let mut machine = "pc-q35-7.2";
    let mut devices = String::from("\n    <controller type='pci' index='0' model='pcie-root'/>");
    for bus in 1..=3 {
        devices += &format!("\n    <controller type='pci' index='{bus}' model='pcie-root-port'/>");
    }
    for word in notation.split_whitespace() {
        match word.split_once('=') {
            Some(("mem", mib)) => {
                top += &format!("<memory unit='KiB'>{}</memory>", mib.parse::<u64>().unwrap() * 1024);
            }
            Some(("cpus", n)) => top += &format!("<vcpu placement='static'>{n}</vcpu>"),
            Some(("cpu", model)) => top += &format!("<cpu mode='custom'><model>{model}</model></cpu>"),
            Some(("machine", name)) => machine = name,
            _ if word == "hd" => os += "<boot dev='hd'/>",
            _ => devices += &device(live, word),
        }
    }
    let id = if live { " id='3'" } else { "" };
    format!(
        "<domain type='kvm'{id}>\n  <name>web01</name>\n  <uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>\n  {top}<os>{}</os>\n  \
         <devices>{devices}\n  </devices>\n</domain>\n",
        os.replace("MACHINE", machine)
    )
}

fn device(live: bool, word: &str) -> String {
    let (word, order) =
        word.split_once('^').map_or((word, String::new()), |(w, n)| (w, format!("<boot order='{n}'/>")));
    let (word, bus) = word.split_once('@').unwrap_or((word, ""));
    let (word, kind) = word.split_once('=').unwrap_or((word, if word.starts_with("hd") { "cdrom" } else { "disk" }));
    let pci = format!("<address type='pci' domain='0x0000' bus='0x{bus:0>2}' slot='0x00' function='0x0'/>");
    let address = if bus.is_empty() { String::new() } else { pci };
    let (alias, index) = if live { (format!("<alias name='a-{word}'/>"), " index='7'") } else { Default::default() };
    if let Some(n) = word.strip_prefix("nic") {
        let vnet = if live { "<target dev='vnet3'/>" } else { "" };
        let port = if live { " portid='p' bridge='virbr0'" } else { "" };
        return format!(
            "\n    <interface type='network'>\n      <mac address='52:54:00:00:00:0{n}'/>\n      <source network='lan'{port}/>\n      \
             {vnet}{order}<model type='virtio'/>{alias}{address}\n    </interface>"
        );
    }
    if let Some(n) = word.strip_prefix("usb") {
        return format!(
            "\n    <hostdev mode='subsystem' type='usb'>{alias}<address type='usb' bus='0' port='{n}'/></hostdev>"
        );
    }
    let bus = match word.chars().next().unwrap() {
        's' => "scsi",
        'h' => "sata",
        _ => "virtio",
    };
    let unit = u32::from(word.as_bytes()[2] - b'a');
    let drive = format!("<address type='drive' controller='0' bus='0' target='0' unit='{unit}'/>");
    let address = if bus == "virtio" { address } else { drive };
    let backing = if live { "\n      <backingStore/>" } else { "" };
    format!(
        "\n    <disk type='file' device='{kind}'>\n      <driver name='qemu' type='raw'/>\n      <source file='/i/{word}'{index}/>\
         {backing}\n      <target dev='{word}' bus='{bus}'/>{order}{alias}{address}\n    </disk>"
    )
}

fn names(disks: &str) -> Vec<DiskName> {
    disks.split_whitespace().map(|d| DiskName::new(d).unwrap()).collect()
}

fn made(stored: &str, live: &str, disks: &str) -> Travelling {
    definition(&domain(false, stored), &domain(true, live), &names(disks)).unwrap()
}

/// The disks and interfaces that travel, in the order of the document, and the one note that there is.
fn shown(stored: &str, live: &str, disks: &str) -> (String, String) {
    let made = made(stored, live, disks);
    let doc = document(&made.xml).unwrap();
    let devices = child(domain_element(&doc).unwrap(), "devices").unwrap();
    let words = devices.children().filter_map(|d| match d.tag_name().name() {
        "disk" => target(d).map(str::to_owned),
        "interface" => mac(d).map(|mac| format!("nic{}", &mac[16..])),
        _ => None,
    });
    (words.collect::<Vec<_>>().join(" "), made.notes.join("\n"))
}

#[test]
fn documents_that_agree_give_the_stored_one_byte_for_byte() {
    for notation in ["vda", "vda@1 vdb@2 nic1@3", "hd sda hdc mem=64 cpus=2 cpu=Haswell", "vda^1 nic1^2 usb1"] {
        let disks: Vec<&str> =
            notation.split_whitespace().filter(|w| w.starts_with("vd") || w.starts_with("sd")).collect();
        let disks = disks.join(" ").replace(['@', '^', '1', '2', '3'], "");
        let made = made(notation, notation, &disks);
        assert_eq!((made.xml, made.notes), (domain(false, notation), Vec::<String>::new()), "{notation}");
    }
}

#[test]
fn what_only_the_running_instance_has_travels_and_is_said() {
    for (stored, live, disks, travels, note) in [
        // By `attach-disk` and `attach-interface`, without --persistent.
        (
            "vda",
            "vda vdb",
            "vda vdb",
            "vda vdb",
            "disk 'vdb' is attached to the running instance only: it is in the point",
        ),
        ("vda nic1", "vda nic1 nic2", "vda", "vda nic1 nic2", "interface 52:54:00:00:00:02 is attached to the running"),
        // What is not replicated does not come by this door.
        ("vda", "vda vdb", "vda", "vda", "disk 'vdb' is attached to the running instance only and is not replicated"),
        // Removed for the next start: the point has it all the same.
        ("vdb", "vda vdb", "vda vdb", "vdb vda", "disk 'vda' is attached to the running instance only"),
        // For the next start only.
        ("vda vdb", "vda", "vda", "vda vdb", "disk 'vdb' is in the definition for the next start only"),
        (
            "vda nic1",
            "vda",
            "vda",
            "vda nic1",
            "interface 52:54:00:00:00:01 is in the definition for the next start only",
        ),
        // The same name is a CD drive at the next start.
        ("vda vdb=cdrom", "vda vdb", "vda vdb", "vda vdb", "'vdb' is a disk of the running instance and a cdrom"),
        ("vda", "vda hdc", "vda", "vda", ""),
        ("vda", "vda usb4", "vda", "vda", "a device (hostdev) is attached to the running instance only"),
        ("vda mem=128", "vda mem=64", "vda", "vda", "the memory is 64 MiB now and 128 MiB then"),
        ("vda cpus=4", "vda cpus=2", "vda", "vda", "the number of processors is 2 now and 4 then"),
        ("vda machine=a-2", "vda machine=a-1", "vda", "vda", "the machine type is a-1 now and a-2 then"),
        ("vda cpu=B", "vda cpu=A", "vda", "vda", "the processor model is A now and B then"),
    ] {
        let (found, said) = shown(stored, live, disks);
        assert_eq!(found, travels, "{stored} | {live}");
        assert!(said.contains(note) && said.is_empty() == note.is_empty(), "{stored} | {live}: {said:?}");
        assert!(said.lines().count() <= 1, "one difference, one note: {said}");
    }
}

/// What a running instance has been given this time is worth nothing in a definition, and libvirt would refuse some of
/// it.
#[test]
fn what_is_taken_over_is_fit_for_a_stored_definition() {
    let made = made("vda@1", "vda@1 vdb@2 nic1@3", "vda vdb");
    let added = made.xml.split("dev='vda'").nth(1).unwrap();
    for word in ["alias", "backingStore", "index='7'", "vnet3", "portid", "virbr0"] {
        assert!(!added.contains(word), "{word}: {added}");
    }
    assert!(added.contains("bus='0x02'") && added.contains("bus='0x03'"), "where they sit for the guest: {added}");
    assert!(xml::parse(&made.xml).unwrap().disk(&names("vdb")[0]).is_some());
}

#[test]
fn nothing_is_in_two_places_and_nothing_on_a_bus_that_is_not_there() {
    let addresses =
        |stored: &str, live: &str, disks: &str| made(stored, live, disks).xml.matches("type='pci' domain").count();
    assert_eq!(addresses("vda@1", "vda@1 vdb@2", "vda vdb"), 2);
    assert_eq!(addresses("vda@1 vdc@2", "vda@1 vdb@2", "vda vdb"), 2, "its place was given away for the next start");
    assert_eq!(addresses("vda@1", "vda@1 vdb@9", "vda vdb"), 1, "bus 9 is not in the stored definition");
    let boots = |stored: &str, live: &str| made(stored, live, "vda vdb").xml.matches("<boot ").count();
    assert_eq!(boots("vda^1", "vda^1 vdb^2"), 2);
    assert_eq!(boots("vda^1", "vda^1 vdb^1"), 1, "an order is given once");
    assert_eq!(boots("vda hd", "vda vdb^1"), 1, "libvirt allows one way to say it");
}

/// A SCSI disk that was plugged in brings its controller: libvirt would make one of another model.
#[test]
fn a_controller_that_a_disk_needs_comes_with_it_once() {
    let scsi = "<controller type='scsi' index='0' model='virtio-scsi'><alias name='scsi0'/></controller>";
    let with = |xml: String| xml.replacen("\n    <controller", &format!("\n    {scsi}\n    <controller"), 1);
    let live = with(domain(true, "vda sda sdb"));
    let both = definition(&domain(false, "vda"), &live, &names("vda sda sdb")).unwrap().xml;
    assert_eq!(both.matches("model='virtio-scsi'").count(), 1, "{both}");
    assert!(!both.contains("scsi0") && both.find("virtio-scsi").unwrap() < both.find("dev='sda'").unwrap(), "{both}");
    let there = with(domain(false, "vda")).replace("<alias name='scsi0'/>", "");
    let one = definition(&there, &live, &names("vda sda sdb")).unwrap().xml;
    assert_eq!(one.matches("model='virtio-scsi'").count(), 1, "{one}");
}

#[test]
fn a_disk_of_the_point_that_neither_has_is_no_such_domain_for_nobody() {
    let e = definition(&domain(false, "vda"), &domain(true, "vda"), &names("vda vdb")).unwrap_err();
    assert_eq!((e.kind(), e.kind().exit_code()), (Kind::Conflict, 1), "{}", e.chain());
    assert!(e.chain().contains("vdb"), "{}", e.chain());
    for bad in ["", "<domain/>", "<domain id='1'><devices/></domain>", "<x/>"] {
        assert!(definition(bad, &domain(true, "vda"), &names("vda")).is_err(), "{bad}");
        assert!(definition(&domain(false, "vda"), bad, &names("vdb")).is_err(), "{bad}");
    }
}

/// A live document may be cut anywhere: an error or a document, never a panic.
#[test]
fn half_a_document_never_panics() {
    let (stored, live) = (domain(false, "vda nic1"), domain(true, "vda vdb@2^1 sda nic1 nic2 usb4"));
    let cut =
        |text: &str, at: usize| text.char_indices().take_while(|(i, _)| *i < at).map(|(_, c)| c).collect::<String>();
    for at in 0..live.len() {
        let _ = definition(&stored, &cut(&live, at), &names("vda vdb sda"));
        let without: String = live.char_indices().filter(|(i, _)| !(at..at + 9).contains(i)).map(|(_, c)| c).collect();
        let _ = definition(&stored, &without, &names("vda vdb sda"));
    }
}
