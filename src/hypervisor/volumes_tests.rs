//! Volumes in documents: what is asked, what is read, and what goes back.

use super::*;
use crate::hypervisor::DiskKind;
use crate::hypervisor::xml::{parse_with, set_layers_with};
use crate::image::{Format, Layer};
use crate::name::DiskName;

/// Places that libvirt would tell: `"p/v=/i/v p/b=dev:/dev/b p/x=!why"`.
fn volumes(notation: &str) -> Volumes {
    let entry = |word: &str| {
        let (name, place) = word.split_once('=').unwrap();
        let (pool, volume) = name.split_once('/').unwrap();
        let place = match (place.strip_prefix('!'), place.strip_prefix("dev:")) {
            (Some(why), _) => Err(why.replace('_', " ")),
            (None, Some(dev)) => Ok(Place { path: dev.into(), block_device: true }),
            (None, None) => Ok(Place { path: place.into(), block_device: false }),
        };
        ((pool.to_owned(), volume.to_owned()), place)
    };
    Volumes(notation.split_whitespace().map(entry).collect())
}

fn domain(live: bool, disk: &str) -> String {
    let id = if live { " id='1'" } else { "" };
    format!(
        "<domain type='kvm'{id}><name>a</name><uuid>11111111-2222-3333-4444-555555555555</uuid><devices>\n{disk}\n</devices></domain>"
    )
}

fn disk(source: &str, format: &str, backing: &str) -> String {
    format!(
        "<disk type='volume' device='disk'><driver name='qemu' type='{format}'/>{source}{backing}<target dev='vda' bus='virtio'/></disk>"
    )
}

const SOURCE: &str = "<source pool='p' volume='v'/>";

fn vda(xml: &str, places: &str) -> Result<Vec<Layer>, String> {
    let mut disk = parse_with(xml, &volumes(places)).unwrap().disks.remove(0);
    match disk.kind {
        DiskKind::Image => Ok(std::mem::take(&mut disk.layers)),
        DiskKind::Unsupported(why) | DiskKind::Removable(why) => Err(why),
    }
}

fn layer(format: Format, path: &str) -> Layer {
    Layer { path: path.into(), format, block_device: path.starts_with("/dev/"), data_file: None }
}

#[test]
fn a_volume_is_what_libvirt_says_it_is_in_the_format_of_its_driver() {
    let stored = domain(false, &disk(SOURCE, "qcow2", ""));
    assert_eq!(named_in(&stored).unwrap(), [("p".to_owned(), "v".to_owned())]);
    assert_eq!(vda(&stored, "p/v=/i/v"), Ok(vec![layer(Format::Qcow2, "/i/v")]));
    let device = domain(false, &disk(SOURCE, "raw", ""));
    assert_eq!(vda(&device, "p/v=dev:/dev/vg/v"), Ok(vec![layer(Format::Raw, "/dev/vg/v")]));
    // On an overlay of ours, as libvirt prints it: the volume is below.
    let below =
        "<backingStore type='volume'><format type='raw'/><source pool='p' volume='v'/><backingStore/></backingStore>";
    let frozen = disk("<source file='/i/o' index='3'/>", "qcow2", below).replacen("volume", "file", 1);
    let live = domain(true, &frozen);
    assert_eq!(named_in(&live).unwrap().len(), 1);
    assert_eq!(vda(&live, "p/v=/i/v"), Ok(vec![layer(Format::Qcow2, "/i/o"), layer(Format::Raw, "/i/v")]));
}

#[test]
fn what_cannot_be_placed_is_refused_with_pool_volume_and_reason() {
    let stored = domain(false, &disk(SOURCE, "raw", ""));
    let why = vda(&stored, "p/v=!which_lies_on_the_network_(rbd/v)").unwrap_err();
    assert_eq!(why, "is the volume 'v' of the storage pool 'p', which lies on the network (rbd/v)");
    assert!(vda(&stored, "").unwrap_err().contains("was not asked"));
    assert!(vda(&domain(false, &disk("<source pool='p'/>", "raw", "")), "").is_err());
    let plain = domain(false, &disk("<source file='/f'/>", "raw", "").replacen("volume", "file", 1));
    assert_eq!(named_in(&plain).unwrap(), []);
}

/// What libvirt does itself at a pivot, and what a definition that is put back must be.
#[test]
fn going_back_to_a_volume_names_the_volume() {
    let places = volumes("p/v=/i/v");
    let back = |xml: &str| {
        set_layers_with(xml, &[(DiskName::new("vda").unwrap(), layer(Format::Raw, "/i/v"))], &places).unwrap()
    };
    let own = domain(false, &disk(SOURCE, "raw", ""));
    assert_eq!(back(&own), own, "it names it already");
    let below = "<backingStore type='volume'><format type='raw'/><source pool='p' volume='v'/></backingStore>";
    let frozen = disk("<source file='/i/o'/>", "qcow2", below).replacen("volume", "file", 1);
    assert_eq!(back(&domain(false, &frozen)), own);
    // A volume of another place is none of ours.
    let other = domain(false, &disk("<source pool='p' volume='w'/>", "raw", ""));
    assert!(back(&other).contains("<source file='/i/v'/>"), "{}", back(&other));
}

#[test]
fn what_goes_to_another_host_names_the_file() {
    let stored = domain(false, &disk("<source pool='p' volume='v' mode='host' startupPolicy='optional'/>", "raw", ""));
    let plain = as_files(&stored, &volumes("p/v=/i/v")).unwrap();
    assert_eq!(vda(&plain, ""), Ok(vec![layer(Format::Raw, "/i/v")]));
    assert!(
        !plain.contains("pool=") && !plain.contains("mode=") && plain.contains("startupPolicy='optional'"),
        "{plain}"
    );
    let device = as_files(&stored, &volumes("p/v=dev:/dev/v")).unwrap();
    assert_eq!(vda(&device, ""), Ok(vec![layer(Format::Raw, "/dev/v")]));
    // What is not known stays as it is.
    assert_eq!(as_files(&stored, &volumes("p/v=!gone")).unwrap(), stored);
    assert_eq!(as_files(&stored, &Volumes::default()).unwrap(), stored);
    assert!(as_files(&stored, &volumes("p/v=/i/a'b")).unwrap().contains("file='/i/a&apos;b'"));
}
