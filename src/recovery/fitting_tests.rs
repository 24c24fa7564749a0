//! libvirts of the test's making, each of which does not know some words.

use super::*;
use crate::name::{DiskName, DomainName, DomainUuid};
use crate::recovery::definition::{Macs, Nics, remark::Verdict};
use std::cell::Cell;
use std::path::PathBuf;

const GUEST: &str = "<domain type='kvm'><memory unit='MiB'>64</memory><vcpu>2</vcpu>\
    <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/><vmcoreinfo state='on'/></features>\
    <cpu mode='host-model'><feature policy='require' name='hle'/><feature policy='require' name='rtm'/></cpu><devices>\
    <disk type='file' device='disk'><target dev='vda' bus='virtio'/></disk>\
    <watchdog model='new-dog' action='reset'/><sound model='new-sound'/><panic model='isa'/></devices></domain>";

/// Refuses these words, one after the other, as libvirt does. Gives what is told of the definition in the end.
fn fitted(unknown: &[&str]) -> (Option<String>, Vec<(String, Verdict)>, usize) {
    let disks = [(DiskName::new("vda").unwrap(), PathBuf::from("/images/vda.qcow2"))];
    let wish = Wish {
        name: DomainName::new("web01").unwrap(),
        uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
        disks: &disks,
        nics: Nics::Mapped,
        macs: Macs::Keep,
        console: None,
        nvram: None,
        tpm: false,
    };
    let (limits, mapping) = (Limits::default(), Mapping::default());
    let write = |without: &[(String, String)]| definition::render_for(GUEST, &wish, &mapping, &limits.without(without));
    let asked = Cell::new(0);
    let ask = |xml: &str| {
        asked.set(asked.get() + 1);
        Ok(unknown
            .iter()
            .find(|word| xml.contains(**word))
            .map_or(Ok(()), |word| Err(format!("unknown word '{word}'"))))
    };
    let (d, refused) = persuade(write(&[]).unwrap(), &write, &ask).unwrap();
    (refused, d.remarks.iter().map(|r| (r.what.clone(), r.verdict)).collect(), asked.get())
}

fn missing(what: &[&str]) -> Vec<(String, Verdict)> {
    what.iter().map(|what| ((*what).to_owned(), Verdict::Missing)).collect()
}

#[test]
fn what_libvirt_takes_is_asked_once_and_stays_whole() {
    assert_eq!(fitted(&[]), (None, Vec::new(), 1));
}

#[test]
fn words_that_libvirt_does_not_know_are_left_out_and_no_others() {
    let (refused, told, _) = fitted(&["new-dog"]);
    assert_eq!((refused, told), (None, missing(&["devices/watchdog"])));
    let (refused, mut told, _) = fitted(&["new-dog", "new-sound", "hle"]);
    told.sort();
    assert_eq!((refused, told), (None, missing(&["cpu/feature[hle]", "devices/sound", "devices/watchdog"])));
}

#[test]
fn what_cannot_be_left_out_is_told_in_libvirts_words_and_the_questions_end() {
    let (refused, told, asked) = fitted(&["new-dog", "/images/vda.qcow2"]);
    assert_eq!((refused.as_deref(), told), (Some("unknown word 'new-dog'"), Vec::new()));
    assert!(asked <= QUESTIONS_MAX, "{asked}");
}
