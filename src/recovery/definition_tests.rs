//! The allow-list against strangers: `tests/fixtures/definitions/hostile/` has a definition for every way that is known
//! of reaching a host. Whatever is dangerous in them is marked with the word `canary`, which must not come through;
//! beside each lies what is said about it. `VIRT_REPLICA_BLESS=1` writes those files anew.

use super::*;
use crate::hypervisor::xml;
use std::path::Path;

fn disks(names: &[&str]) -> Vec<(DiskName, PathBuf)> {
    names.iter().map(|n| (DiskName::new(*n).unwrap(), format!("/images/{n}.qcow2").into())).collect()
}

fn mapping() -> Mapping {
    let text = "networks: {default: lan, 'bridge:br0': 'bridge:br1', user: none}\npaths: {/srv/kernels: /boot/guests}";
    Mapping::parse(text, Path::new("recovery.yaml")).unwrap()
}

fn wish(disks: &[(DiskName, PathBuf)]) -> Wish<'_> {
    Wish {
        name: DomainName::new("web01-here").unwrap(),
        uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
        disks,
        nics: Nics::Mapped,
        macs: Macs::Keep,
        console: None,
        nvram: None,
        tpm: false,
    }
}

fn corpus(dir: &str) -> Vec<(PathBuf, String)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/definitions").join(dir);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut found: Vec<PathBuf> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "xml")).collect();
    found.sort();
    found.into_iter().map(|p| (p.clone(), std::fs::read_to_string(&p).unwrap())).collect()
}

#[track_caller]
fn check_recorded(path: &Path, text: &str) {
    if std::env::var_os("VIRT_REPLICA_BLESS").is_some() {
        std::fs::write(path, text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(path).unwrap_or_default(), "{}", path.display());
}

/// What is said, a line for each remark.
fn told(result: &Result<Definition>) -> String {
    match result {
        Ok(d) => d.remarks.iter().map(|r| format!("{:?}: {} {}\n", r.verdict, r.what, r.why)).collect(),
        Err(e) => format!("error: {}\n", e.chain()),
    }
}

const REPLACED_IN_SILENCE: &[&str] = &[];

#[test]
fn no_hostile_definition_reaches_the_host() {
    let disks = disks(&["vda"]);
    let hostile = corpus("hostile");
    assert!(hostile.len() >= 100, "only {} hostile definitions", hostile.len());
    let mut silent = Vec::new();
    for (path, text) in &hostile {
        let result = render(text, &wish(&disks), &mapping());
        check_recorded(&path.with_extension("txt"), &told(&result));
        if told(&result).is_empty() {
            silent.push(path.file_stem().unwrap().to_string_lossy().into_owned());
        }
        assert!(text.contains("canary"), "{}: nothing in it is marked as dangerous", path.display());
        // Also what is refused as a whole must not be dangerous.
        let Ok(definition) = result else { continue };
        assert!(!definition.xml.contains("canary"), "{}:\n{}", path.display(), definition.xml);
        // A second opinion, of the code that reads libvirt's own XML.
        let parsed = xml::parse(&definition.xml).unwrap_or_else(|e| panic!("{}: {}", path.display(), e.chain()));
        for layer in parsed.disks.iter().flat_map(|d| &d.layers) {
            assert!(layer.path.starts_with("/images"), "{}: {}", path.display(), layer.path.display());
        }
    }
    // What this host puts its own in the place of, as it always does: there is nothing to say.
    assert_eq!(silent, REPLACED_IN_SILENCE);
}

#[test]
fn what_an_ordinary_guest_has_comes_through() {
    for (path, text) in corpus("ordinary") {
        let parsed = xml::parse(&text).unwrap();
        let replicated = parsed.disks.iter().filter(|d| d.kind == crate::hypervisor::DiskKind::Image);
        let disks = disks(&replicated.map(|d| d.name.as_str()).collect::<Vec<_>>());
        let nvram = text.contains("pflash").then(|| "/images/vars.fd".into());
        let wish = Wish { nvram, tpm: text.contains("pflash"), ..wish(&disks) };
        let definition = render(&text, &wish, &mapping()).unwrap();
        definition.xml().unwrap_or_else(|e| panic!("{}: {}", path.display(), e.chain()));
        check_recorded(&path.with_extension("here"), &definition.xml);
        check_recorded(&path.with_extension("txt"), &told(&Ok(definition.clone())));
        // With names that mean the same here, the result is its own fixed point.
        let same = "networks: {lan: lan, 'bridge:br1': 'bridge:br1'}\npaths: {/boot/guests: /boot/guests}";
        let same = Mapping::parse(same, Path::new("recovery.yaml")).unwrap();
        let again = render(&definition.xml, &wish, &same).unwrap();
        assert_eq!(again.xml, definition.xml, "{}", path.display());
    }
}

const PLAIN: &str = "<domain type='qemu'><memory>1024</memory><os><type arch='x86_64' machine='pc'>hvm</type></os><devices>\
    <disk type='file' device='disk'><source file='/src/a'/><target dev='vda' bus='virtio'/></disk>\
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>\
    <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='brX'/></interface>\
    <serial type='file'><source path='/src/log'/></serial></devices></domain>";

#[test]
fn a_drill_has_another_name_other_macs_and_an_isolated_network() {
    let disks = disks(&["vda"]);
    let drill = Wish {
        nics: Nics::Isolated("vr-drill".into()),
        macs: Macs::New(0x12_34ff),
        console: Some("/images/console.log".into()),
        ..wish(&disks)
    };
    let d = render(PLAIN, &drill, &Mapping::default()).unwrap();
    let xml = d.xml().unwrap();
    assert_eq!(d.macs, ["52:54:00:12:34:ff", "52:54:00:12:35:00"]);
    assert_eq!(d.attached, [Attach::Network("vr-drill".into())]);
    assert_eq!(xml.matches("network='vr-drill'").count(), 2, "{xml}");
    assert!(xml.contains("<source path='/images/console.log'/>") && !xml.contains("/src/"), "{xml}");
    assert!(xml.contains("<name>web01-here</name>") && d.serial && !d.guest_agent, "{xml}");
    assert_eq!(d.memory_bytes, 1 << 20);
}

#[test]
fn every_disk_of_the_point_has_to_be_in_the_definition() {
    let both = disks(&["vda", "vdb"]);
    let d = render(PLAIN, &wish(&both), &mapping()).unwrap();
    assert!(d.xml().unwrap_err().chain().contains("has no disk 'vdb'"));
    let none = disks(&[]);
    let d = render(PLAIN, &wish(&none), &mapping()).unwrap();
    assert!(d.remarks.iter().any(|r| r.why.contains("'vda' is not replicated") && r.verdict == Verdict::Missing));
    assert!(!d.xml.contains("<disk"), "{}", d.xml);
}

#[test]
fn what_is_too_large_too_deep_or_no_domain_is_an_error() {
    let disks = disks(&["vda"]);
    let deep = format!("<domain type='kvm'>{}{}</domain>", "<a>".repeat(100), "</a>".repeat(100));
    let large = format!("<domain type='kvm'><!-- {} --></domain>", " ".repeat(DEFINITION_MAX));
    let dtd = "<!DOCTYPE domain [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain type='kvm'>&x;</domain>";
    for text in ["", "<domain", "<network/>", deep.as_str(), large.as_str(), dtd] {
        assert!(render(text, &wish(&disks), &mapping()).is_err(), "{}", &text[..text.len().min(80)]);
    }
}

proptest::proptest! {
    /// Whatever a value says, it stays inside the attribute or the text it is written into.
    #[test]
    fn no_value_breaks_out_of_its_place(value in "[ -~äß\u{7f}]{0,40}", place in 0usize..8) {
        let escaped = crate::hypervisor::xml::escape(&value).unwrap();
        let places = [
            format!("<cpu mode='{escaped}'/>"), format!("<cpu mode='custom'><model>{escaped}</model></cpu>"),
            format!("<clock offset='timezone' timezone='{escaped}'/>"), format!("<vcpu>{escaped}</vcpu>"),
            format!("<sysinfo type='smbios'><system><entry name='serial'>{escaped}</entry></system></sysinfo>"),
            format!("<on_crash>{escaped}</on_crash>"), format!("<features><hyperv><vendor_id state='on' value='{escaped}'/></hyperv></features>"),
            format!("<x{0}/><title>{escaped}</title>", place),
        ];
        let xml = PLAIN.replace("<devices>", &format!("{}<devices>", places[place]));
        let disks = disks(&["vda"]);
        let all = Mapping::parse("networks: {default: lan, 'bridge:brX': none}", Path::new("m")).unwrap();
        let d = render(&xml, &wish(&disks), &all).unwrap();
        let doc = crate::hypervisor::xml::document(&d.xml).unwrap();
        let names: Vec<&str> = doc.descendants().filter(|n| n.is_element()).map(|n| n.tag_name().name()).collect();
        let known = ["domain", "name", "uuid", "memory", "os", "type", "cpu", "model", "clock", "vcpu", "sysinfo", "system", "entry",
            "on_crash", "features", "hyperv", "vendor_id", "devices", "disk", "driver", "source", "target", "interface", "mac", "serial"];
        proptest::prop_assert!(names.iter().all(|n| known.contains(n)), "{}", d.xml);
    }
}
