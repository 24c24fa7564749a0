//! Tests of `xml`: notations first, then what is read, refused and spliced, then hostile input.

use super::*;
use crate::hypervisor::element::XML_LEN_MAX;

const HEAD: &str = "<name>db &amp; co</name>\n  <uuid>11111111-2222-3333-4444-555555555555</uuid>\n";

fn live(devices: &str) -> String {
    format!("<domain type='kvm' id='7'>\n  {HEAD}  <devices>\n{devices}\n  </devices>\n</domain>\n")
}

fn stored(devices: &str) -> String {
    live(devices).replace(" id='7'", "")
}

/// A live disk from `"qcow2:/f<qcow2:/a<raw:/b"`, uppermost first; `dev:` in front of a path makes it a block device.
fn chain(name: &str, notation: &str) -> String {
    fn source(path: &str) -> (&str, String) {
        match path.strip_prefix("dev:") {
            Some(dev) => ("block", format!("<source dev='{dev}'/>")),
            None => ("file", format!("<source file='{path}'/>")),
        }
    }
    let mut backing = String::from("<backingStore/>");
    let mut layers: Vec<&str> = notation.split('<').collect();
    let top = layers.remove(0);
    for l in layers.iter().rev() {
        let (format, path) = l.split_once(':').unwrap();
        let (kind, source) = source(path);
        backing = format!("<backingStore type='{kind}'><format type='{format}'/>{source}{backing}</backingStore>");
    }
    let (format, path) = top.split_once(':').unwrap();
    let (kind, source) = source(path);
    format!(
        "    <disk type='{kind}' device='disk'>\n      <driver name='qemu' type='{format}' discard='unmap'/>\n      \
         {source}\n      {backing}\n      <target dev='{name}' bus='virtio'/>\n    </disk>"
    )
}

fn name(s: &str) -> DiskName {
    DiskName::new(s).unwrap()
}

fn file(format: Format, path: &str) -> Layer {
    Layer { path: path.into(), format, block_device: false, data_file: None }
}

fn only_disk(xml: &str) -> DiskXml {
    let mut d = parse(xml).unwrap();
    assert_eq!(d.disks.len(), 1);
    d.disks.remove(0)
}

fn why(disk: &str) -> String {
    match only_disk(&live(disk)).kind {
        DiskKind::Unsupported(why) | DiskKind::Removable(why) => why,
        DiskKind::Image => panic!("taken as an image: {disk}"),
    }
}

#[test]
fn a_live_chain_is_read_to_its_end() {
    let d = parse(&live(&chain("vda", "qcow2:/f<qcow2:/a<raw:dev:/dev/vg/b"))).unwrap();
    assert_eq!((d.name.as_str(), d.id), ("db & co", Some(7)));
    let vda = d.disk(&name("vda")).unwrap();
    assert_eq!(vda.kind, DiskKind::Image);
    assert_eq!(vda.layers[0], file(Format::Qcow2, "/f"));
    assert_eq!(vda.layers[1], file(Format::Qcow2, "/a"));
    assert_eq!(vda.layers[2], Layer { block_device: true, ..file(Format::Raw, "/dev/vg/b") });
    assert_eq!(vda.layers.len(), 3);
}

#[test]
fn a_stored_definition_tells_its_top_layer_only() {
    let vda = only_disk(&stored(&chain("vda", "qcow2:/f<vmdk:/a")));
    assert_eq!(vda.layers, [file(Format::Qcow2, "/f")]);
    let bare = chain("vda", "raw:/f").replace("<backingStore/>", "");
    assert_eq!(only_disk(&stored(&bare)).layers, [file(Format::Raw, "/f")]);
}

#[test]
fn a_live_chain_without_an_end_is_no_chain() {
    let open = chain("vda", "qcow2:/f<qcow2:/a").replace("<backingStore/>", "");
    assert_eq!(why(&open), "has a backing chain whose end libvirt does not tell");
}

#[test]
fn what_cannot_be_frozen_says_what_it_is() {
    let plain = chain("vda", "qcow2:/f<qcow2:/a");
    let with = |element: &str| why(&plain.replace("<target", &format!("{element}<target")));
    let device = |d: &str| why(&plain.replace("device='disk'", &format!("device='{d}'")));
    assert_eq!(device("cdrom"), "is a cdrom");
    assert_eq!(device("floppy"), "is a floppy");
    assert_eq!(device("lun"), "is a passed-through LUN");
    assert_eq!(with("<readonly/>"), "is read-only");
    assert_eq!(with("<shareable/>"), "is shareable (another domain may write to it)");
    assert_eq!(with("<transient/>"), "is transient (what is written to it is thrown away)");
    assert_eq!(with("<encryption format='luks'/>"), "is encrypted by QEMU (luks)");
    let source = |kind: &str, source: &str| {
        let top = plain.replacen("type='file'", &format!("type='{kind}'"), 1);
        why(&top.replace("<source file='/f'/>", source))
    };
    assert_eq!(source("network", "<source protocol='rbd' name='p/i'/>"), "lies on the network (rbd)");
    let volume = source("volume", "<source pool='p' volume='v'/>");
    assert_eq!(volume, "is the volume 'v' of the storage pool 'p', and libvirt was not asked where that lies");
    assert_eq!(source("nvme", "<source type='pci'/>"), "is a passed-through NVMe device");
    assert_eq!(source("vhostuser", "<source type='unix' path='/s'/>"), "is served by a vhost back end outside QEMU");
    assert_eq!(source("file", ""), "has no image");
    assert_eq!(source("file", "<source file='f'/>"), "has an image with a relative path");
    let slice = "<source file='/f'><slices><slice type='storage' offset='0' size='1'/></slices></source>";
    assert_eq!(source("file", slice), "is a slice of an image");
    let luks = "<source file='/f'><encryption format='luks'/></source>";
    assert_eq!(source("file", luks), "is encrypted by QEMU (luks)");
    assert_eq!(why(&plain.replace("type='qcow2' ", "type='qed' ")), "has the format qed");
    assert_eq!(why(&plain.replace("type='qcow2' ", "")), "has no recorded format");
    let nbd = plain.replace("type='file'><format type='qcow2'/><source file='/a'/>", {
        "type='network'><format type='raw'/><source protocol='nbd'/>"
    });
    assert_eq!(why(&nbd), "has a backing image that lies on the network (nbd)");
}

/// A drive without a medium is nothing that anybody has to protect; a LUN is.
#[test]
fn a_drive_for_media_is_no_disk_that_is_missing() {
    let kind = |device: &str| {
        only_disk(&live(&chain("vda", "raw:/f").replace("device='disk'", &format!("device='{device}'")))).kind
    };
    assert!(matches!(kind("cdrom"), DiskKind::Removable(_)) && matches!(kind("floppy"), DiskKind::Removable(_)));
    assert!(matches!(kind("lun"), DiskKind::Unsupported(_)) && kind("disk") == DiskKind::Image);
}

#[test]
fn snapshot_no_in_the_definition_is_no_reason() {
    let d = chain("vda", "raw:/f").replace("device='disk'", "device='disk' snapshot='no'");
    assert_eq!(only_disk(&live(&d)).kind, DiskKind::Image);
}

#[test]
fn a_data_file_belongs_to_its_layer() {
    let store =
        "<source file='/f'><dataStore type='block'><format type='raw'/><source dev='/dev/d'/></dataStore></source>";
    let d = only_disk(&live(&chain("vda", "qcow2:/f<qcow2:/a").replace("<source file='/f'/>", store)));
    assert_eq!(d.layers[0].data_file, Some("/dev/d".into()));
    assert_eq!(d.layers[1].data_file, None);
}

#[test]
fn only_libvirts_own_yes_is_ready() {
    let with = |mirror: &str| {
        let d = only_disk(&live(&chain("vda", "qcow2:/f").replace("<target", &format!("{mirror}<target"))));
        d.mirror.map(|m| (m.job, m.ready))
    };
    assert_eq!(with(""), None);
    assert_eq!(with("<mirror type='file' job='active-commit'/>"), Some(("active-commit".into(), false)));
    assert_eq!(with("<mirror type='file' job='active-commit' ready='yes'/>"), Some(("active-commit".into(), true)));
    assert_eq!(with("<mirror type='file' job='active-commit' ready='pivot'/>"), Some(("active-commit".into(), false)));
}

#[test]
fn the_record_goes_through_escaping_and_back() {
    let text = "{\"a\":\"<&>'\\u0001\",\"ü\":\"\t\n\r\"}";
    let element = record_xml(text).unwrap().replace("<record>", &format!("<v:record xmlns:v='{RECORD_NS}'>"));
    let element = element.replace("</record>", "</v:record>");
    let foreign = "<x:record xmlns:x='https://example.org/'>no</x:record>";
    let xml = live("").replace("<devices>", &format!("<metadata>{foreign}{element}</metadata><devices>"));
    assert_eq!(parse(&xml).unwrap().record.as_deref(), Some(text));
    assert_eq!(parse(&live("")).unwrap().record, None);
    assert_eq!(record_xml("\u{1}").unwrap_err().kind(), Kind::Usage);
    assert_eq!(record_xml(&"x".repeat(RECORD_LEN_MAX + 1)).unwrap_err().kind(), Kind::Usage);
}

/// Found by the demo: the definition in a point told the other host of a run that was open on the first.
#[test]
fn what_travels_has_no_record_of_ours_and_all_of_theirs() {
    let plain = live("");
    let ours = format!("<v:record xmlns:v='{RECORD_NS}'>{{&quot;a&quot;:1}}</v:record>");
    let theirs = "<x:record xmlns:x='https://example.org/'>keep</x:record>";
    let with = |metadata: &str| plain.replace("  <devices>", &format!("  {metadata}\n  <devices>"));
    let cases = [
        (plain.clone(), plain.clone()),
        (with(&format!("<metadata>\n    {ours}\n  </metadata>")), plain.clone()),
        (
            with(&format!("<metadata>\n    {ours}\n    {theirs}\n  </metadata>")),
            with(&format!("<metadata>\n    {theirs}\n  </metadata>")),
        ),
        (with(&format!("<metadata>{theirs}</metadata>")), with(&format!("<metadata>{theirs}</metadata>"))),
    ];
    for (xml, expected) in cases {
        let cleaned = without_record(&xml).unwrap();
        assert_eq!(cleaned, expected);
        assert_eq!(parse(&cleaned).unwrap().record, None);
    }
}

#[test]
fn firmware_variables_and_guest_agent() {
    let os = |nvram: &str| parse(&live("").replace("<devices>", &format!("<os>{nvram}</os><devices>"))).unwrap().nvram;
    assert_eq!(os("<nvram template='/t'>/v.fd</nvram>"), Some("/v.fd".into()));
    assert_eq!(os("<nvram type='file'><source file='/v.fd'/></nvram>"), Some("/v.fd".into()));
    assert_eq!(os("<nvram template='/t'/>"), None);
    assert_eq!(os(""), None);
    let agent = |state: &str| {
        let target = format!("<target type='virtio' name='org.qemu.guest_agent.0'{state}/>");
        parse(&live(&format!("<channel type='unix'>{target}</channel>"))).unwrap().guest_agent
    };
    assert!(agent(" state='connected'"));
    assert!(!agent(" state='disconnected'"));
    assert!(!agent(""));
}

#[test]
fn the_snapshot_names_every_disk_and_escapes() {
    let freeze =
        [FreezeDisk { name: name("vdb"), overlay: "/p/a'b<&>\n.qcow2".into(), over: "/p/b".into(), prepared: false }];
    let xml = snapshot_xml(&freeze, &[name("vda"), name("vdb"), name("hdc")]).unwrap();
    let doc = Document::parse(&xml).unwrap();
    let disks: Vec<_> = doc.descendants().filter(|n| n.has_tag_name("disk")).collect();
    let seen: Vec<_> = disks.iter().map(|d| (d.attribute("name").unwrap(), d.attribute("snapshot").unwrap())).collect();
    assert_eq!(seen, [("vda", "no"), ("vdb", "external"), ("hdc", "no")]);
    let source = child(disks[1], "source").unwrap();
    assert_eq!(source.attribute("file"), Some("/p/a'b<&>\n.qcow2"));
    let relative = [FreezeDisk { name: name("vda"), overlay: "o.qcow2".into(), over: "/p/a".into(), prepared: false }];
    assert_eq!(snapshot_xml(&relative, &[name("vda")]).unwrap_err().kind(), Kind::Usage);
}

/// The promise of `redefine`: after freeze and redefinition the document is, byte for byte, what it was.
#[test]
fn going_back_to_a_recorded_layer_restores_every_byte() {
    let base = "<source file='/a'>\n        <seclabel model='dac' relabel='no'/>\n      </source>";
    let rest = "<driver name='qemu' type='raw' io='native'/>\n      SOURCE\n      <target dev='vda' bus='virtio'/>";
    let before = stored(&format!("<!-- mine -->\n<disk type='file' device='disk'>\n      {rest}\n    </disk>"));
    let frozen = format!(
        "<source file='/f'/>\n      <backingStore type='file'>\n        <format type='raw'/>\n        {base}\n      \
         </backingStore>"
    );
    let after = before.replace("type='raw'", "type='qcow2'").replace("SOURCE", &frozen);
    let back = set_layers(&after, &[(name("vda"), file(Format::Raw, "/a"))]).unwrap();
    assert_eq!(back, before.replace("SOURCE", base));
}

#[test]
fn the_recorded_chain_below_the_layer_is_kept() {
    let back =
        set_layers(&stored(&chain("vda", "qcow2:/f<qcow2:/a<raw:/b")), &[(name("vda"), file(Format::Qcow2, "/a"))]);
    assert_eq!(back.unwrap(), stored(&chain("vda", "qcow2:/a<raw:/b")));
}

#[test]
fn a_layer_of_another_kind_changes_type_and_attribute() {
    let old = stored(&chain("vda", "qcow2:/f<raw:/x")).replace("disk type='file' ", "disk ");
    let new = Layer { block_device: true, ..file(Format::Raw, "/dev/a'b") };
    let xml = set_layers(&old, &[(name("vda"), new.clone())]).unwrap();
    assert_eq!(only_disk(&xml).layers, [new]);
    assert!(!xml.contains("backingStore"), "{xml}");
    assert!(xml.contains("discard='unmap'"), "{xml}");
}

#[test]
fn an_edit_that_changes_nothing_changes_nothing() {
    let old = stored(&chain("vda", "qcow2:/f<qcow2:/a"));
    assert_eq!(set_layers(&old, &[(name("vda"), file(Format::Qcow2, "/f"))]).unwrap(), old);
    assert_eq!(set_layers(&old, &[]).unwrap(), old);
}

#[test]
fn several_disks_in_any_order_and_no_other() {
    let all = |a: &str, b: &str, c: &str| {
        stored(&[chain("vda", a), chain("vdb", b), chain("vdc", c)].join("\n<!-- between -->\n"))
    };
    let edits = [(name("vdc"), file(Format::Raw, "/c")), (name("vda"), file(Format::Qcow2, "/a"))];
    let xml = set_layers(&all("qcow2:/fa<qcow2:/a", "qcow2:/fb<raw:/b", "qcow2:/fc<raw:/c"), &edits).unwrap();
    assert_eq!(xml, all("qcow2:/a", "qcow2:/fb<raw:/b", "raw:/c"));
    let kind = |e: &[(DiskName, Layer)]| set_layers(&xml, e).unwrap_err().kind();
    assert_eq!(kind(&[(name("vdx"), file(Format::Raw, "/c"))]), Kind::Conflict, "4 means that there is no such domain");
    assert_eq!(kind(&[edits[0].clone(), edits[0].clone()]), Kind::Usage);
}

#[test]
fn strangers_are_refused_without_a_panic() {
    let kind = |xml: &str| parse(xml).unwrap_err().kind();
    let dtd = format!("<!DOCTYPE d [<!ENTITY x 'y'>]>{}", live(""));
    for bad in ["", "<", "<x/>", "<domain/>", &dtd, &live("").replace("'7'", "'-7'"), &live("<disk/>")] {
        assert_eq!(kind(bad), Kind::Corrupt, "{bad}");
    }
    assert_eq!(kind(&live(&" ".repeat(XML_LEN_MAX))), Kind::Corrupt);
    assert_eq!(kind(&"<a>".repeat(XML_LEN_MAX / 3)), Kind::Corrupt);
    let twice = [chain("vda", "raw:/a"), chain("vda", "raw:/b")].concat();
    assert_eq!(kind(&live(&twice)), Kind::Corrupt);
    assert_eq!(kind(&live(&chain("../x", "raw:/a"))), Kind::Corrupt);
    let deep = vec!["raw:/a"; CHAIN_LEN_MAX + 1].join("<");
    assert_eq!(why(&chain("vda", &deep)), format!("has a backing chain of more than {CHAIN_LEN_MAX} layers"));
}

/// Cuts, doubles and overwrites pieces of a real document: neither reading nor editing may panic, and an edit that
/// succeeds leaves a document in which the disk is what was asked for.
#[test]
fn mutilated_documents_never_panic() {
    let seed: u64 = match std::env::var("VR_TEST_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64,
    };
    println!("VR_TEST_SEED={seed}");
    let mut state = seed | 1;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let whole = live(&[chain("vda", "qcow2:/f<qcow2:/ä<raw:/b"), chain("vdb", "raw:dev:/dev/x")].join("\n"));
    let layer = file(Format::Qcow2, "/ä");
    let mut edited = 0;
    for _ in 0..20_000 {
        let mut bytes = whole.clone().into_bytes();
        for _ in 0..=random(3) {
            let (a, b) = (random(bytes.len()), random(bytes.len()));
            let (from, to) = (a.min(b), a.max(b).min(a.min(b) + 40));
            match random(4) {
                0 => drop(bytes.drain(from..to)),
                1 => {
                    let piece = bytes[from..to].to_vec();
                    let at = random(bytes.len());
                    bytes.splice(at..at, piece);
                }
                2 => bytes[from] = b"<>'\"&/ =x\xc3"[random(10)],
                _ => bytes.swap(from, b),
            }
        }
        let Ok(text) = String::from_utf8(bytes) else { continue };
        let _ = parse(&text);
        if let Ok(xml) = set_layers(&text, &[(name("vda"), layer.clone())]) {
            let doc = document(&xml).unwrap();
            let devices = child(doc.root_element(), "devices").unwrap();
            let disk = children(devices, "disk").find(|d| target(*d) == Some("vda")).unwrap();
            assert_eq!(child(disk, "source").unwrap().attribute("file"), Some("/ä"), "{text}");
            assert_eq!(disk.attribute("type"), Some("file"), "{text}");
            edited += 1;
        }
    }
    assert!(edited > 1000, "the mutations leave too few documents to say anything: {edited}");
}

#[test]
fn confinement_is_what_the_running_domain_is_labelled_with() {
    let domain = |labels: &str| format!("<domain id='1'><name>a</name>{labels}</domain>");
    let dac = "<seclabel type='dynamic' model='dac' relabel='yes'><label>+0:+0</label></seclabel>";
    let of = |labels: &str| confined_by(&domain(labels), "apparmor").unwrap();
    assert!(!of(dac) && !of("") && !of("<seclabel type='none' model='apparmor'/>"));
    assert!(of(&format!("{dac}<seclabel type='dynamic' model='apparmor' relabel='yes'/>")));
    assert!(confined_by("<x/>", "apparmor").is_err());
}

#[test]
fn tags_are_words_and_nothing_else_is() {
    for (element, words) in [
        ("<tags>gold</tags>", vec!["gold"]),
        (
            "<vr:tags xmlns:vr='https://virt-replica.org/xmlns/tags/1'>gold, nightly\n db</vr:tags>",
            vec!["gold", "nightly", "db"],
        ),
        ("<tags><tag>a</tag> <tag>b</tag></tags>", vec!["a", "b"]),
        ("<tags/>", vec![]),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><tags>&a;</tags>", vec![]),
        ("not XML", vec![]),
    ] {
        assert_eq!(tags(element), words, "{element}");
    }
}
