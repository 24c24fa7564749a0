//! Images on another host: the real agent as a child, over pipes.

use super::support::*;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_replica::agent::client::AgentClient;
use virt_replica::engine::pump::Progress;
use virt_replica::error::{Error, Kind};
use virt_replica::image::Format::{Qcow2, Raw};
use virt_replica::image::foreign::format::{AnyFormat, Foreign};
use virt_replica::image::locks::QemuLock;
use virt_replica::plain::copy::{Copied, Copy, copy};
use virt_replica::plain::source::{ReadOptions, Source};
use virt_replica::plain::{Finish, WayWish, Wish};
use virt_replica::transport::Service;
use virt_replica::transport::local::LocalTransport;

/// An agent that serves what lies below `root`.
fn agent(root: &Path, service: Service) -> Arc<AgentClient> {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_virt-replica"));
    let transport = LocalTransport::new(root, Some(program)).unwrap().serving(service);
    Arc::new(AgentClient::connect(&transport).unwrap())
}

fn wish(path: PathBuf, format: impl Into<AnyFormat>) -> Wish {
    Wish {
        path,
        format: format.into(),
        read_only: false,
        way: WayWish::Auto,
        digests: None,
        size: None,
        force_share: false,
        afresh: false,
    }
}

fn send(t: &Bench, client: &Arc<AgentClient>, source: &Path, wish: &Wish) -> Result<Copied, Error> {
    let read = ReadOptions { exact: wish.format == Raw.into(), ..t.read_options() };
    let source = Source::open(source, Raw, &read).unwrap();
    let wish = Wish { size: Some(source.size()), ..wish.clone() };
    let target = client.open_image(&wish)?;
    let finish = Finish::default();
    let job = Copy { source: &source, target: &target, changed: None, finish, dry_run: false, sending: sending() };
    copy(&job, &Progress::default(), &|| Ok(()))
}

#[test]
fn an_image_on_another_host_is_as_one_on_this() {
    let t = Bench::new();
    let far = t.path("far");
    fs::create_dir(&far).unwrap();
    let client = agent(&far, Service::Images);
    for (drawn, format) in [
        (("abc.e", 1), Raw),
        (("abX.ef", 65536), Raw),
        (("a", 511), Raw),
        (("", 0), Raw),
        (("ab0d", 512), Qcow2),
        (("a.0d", 512), Qcow2),
    ]
    .map(|(drawn, format)| (drawn, AnyFormat::from(format)))
    .into_iter()
    .chain(Foreign::ALL.into_iter().flat_map(|f| [(("ab0d", 512), f.into()), (("aX0d.f", 1), f.into())]))
    {
        let source = t.image("source", Raw, drawn);
        let target = far.join(format!("image.{}", format.as_str()));
        let wish = Wish { digests: Some(far.join("digests")), ..wish(target.clone(), format) };
        send(&t, &client, &source, &wish).unwrap();
        t.expect(&target, format, &fs::read(&source).unwrap(), &format!("{drawn:?}"));
        let again = send(&t, &client, &source, &wish).unwrap();
        assert!(again.equal && again.bytes_sent < 400, "{again:?}");
    }
    client.close().unwrap();
}

#[test]
fn nothing_outside_of_its_directory_is_touched() {
    let t = Bench::new();
    let (far, secret) = (t.path("far"), t.image("secret", Raw, ("s", 65536)));
    fs::create_dir(&far).unwrap();
    symlink(&secret, far.join("link")).unwrap();
    symlink(t.path(""), far.join("up")).unwrap();
    t.qemu(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        secret.to_str().unwrap(),
        far.join("o.qcow2").to_str().unwrap(),
    ]);
    let source = t.image("source", Raw, ("a", 65536));
    let client = agent(&far, Service::Images);
    for bad in [
        secret.clone(),
        far.join("link"),
        far.join("up/secret"),
        far.join("../secret"),
        far.join("up/new"),
        far.clone(),
    ] {
        let e = send(&t, &client, &source, &wish(bad.clone(), Raw)).unwrap_err();
        assert_eq!(e.kind(), Kind::Refused, "{}: {e}", bad.display());
    }
    let outside = Wish { read_only: true, ..wish(far.join("o.qcow2"), Qcow2) };
    let e = client.open_image(&outside).unwrap_err();
    assert!(e.kind() == Kind::Refused && e.to_string().contains("secret"), "a backing image leads out: {e}");
    // QEMU's driver would write to the extent that such a header names, and read it.
    let (flat, extent) = (far.join("flat.vmdk"), far.join("flat-flat.vmdk"));
    t.qemu(&["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", flat.to_str().unwrap(), "64k"]);
    fs::remove_file(&extent).unwrap();
    let text = fs::read_to_string(&flat).unwrap().replace("flat-flat.vmdk", secret.to_str().unwrap());
    fs::write(&flat, text).unwrap();
    for read_only in [false, true] {
        let e = client.open_image(&Wish { read_only, ..wish(flat.clone(), Foreign::Vmdk) }).unwrap_err();
        assert!(e.kind() == Kind::Conflict && e.to_string().contains("one file"), "{e}");
    }
    let e = send(&t, &client, &source, &wish(far.join("up/new"), Foreign::Vdi)).unwrap_err();
    assert_eq!(e.kind(), Kind::Refused, "{e}");
    let digests = Wish { digests: Some(t.path("elsewhere")), ..wish(far.join("a.raw"), Raw) };
    assert_eq!(send(&t, &client, &source, &digests).unwrap_err().kind(), Kind::Refused);
    assert!(fs::read(&secret).unwrap() == noise(b's', 65536));
    // The session has survived it all.
    send(&t, &client, &source, &wish(far.join("good.raw"), Raw)).unwrap();
    client.close().unwrap();
}

#[test]
fn an_agent_serves_what_it_was_started_for() {
    let t = Bench::new();
    let source = t.image("source", Raw, ("a", 65536));
    let store = agent(&t.path("store"), Service::Store);
    let e = send(&t, &store, &source, &wish(t.path("store/a.raw"), Raw)).unwrap_err();
    assert!(
        e.kind() == Kind::Refused && e.advice() == Some(&virt_replica::error::advice::Host::ServeImages.into()),
        "{e}"
    );
    store.close().unwrap();
    let images = agent(&t.path(""), Service::Images);
    let uuid = virt_replica::name::DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap();
    assert_eq!(images.open(&uuid).unwrap_err().kind(), Kind::Refused);
    images.close().unwrap();
}

#[test]
fn a_session_that_breaks_leaves_the_old_image_and_the_next_one_goes_on() {
    let t = Bench::new();
    let far = t.path("far");
    fs::create_dir(&far).unwrap();
    let source =
        t.image("source", Raw, ("abcdefghijklmnopqrstuvwxyzABCDEFabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP", 65536));
    let client = agent(&far, Service::Images);
    let target = far.join("new.raw");
    let opened = Source::open(&source, Raw, &t.read_options()).unwrap();
    let image = client.open_image(&Wish { size: Some(opened.size()), ..wish(target.clone(), Raw) }).unwrap();
    let asked = std::cell::Cell::new(0);
    let good = || {
        asked.set(asked.get() + 1);
        // After the first group was sent.
        if asked.get() > 1 { Err(Error::new(Kind::Interrupted, "enough")) } else { Ok(()) }
    };
    let job = Copy {
        source: &opened,
        target: &image,
        changed: None,
        finish: Finish::default(),
        dry_run: false,
        sending: sending(),
    };
    assert_eq!(copy(&job, &Progress::default(), &good).unwrap_err().kind(), Kind::Interrupted);
    drop(image);
    client.close().unwrap();
    assert!(!target.exists() && far.join(".new.raw.vr-part").exists());
    let client = agent(&far, Service::Images);
    let copied = send(&t, &client, &source, &wish(target.clone(), Raw)).unwrap();
    assert!(copied.resumed && copied.blocks_changed < 64, "{copied:?}");
    assert!(fs::read(&target).unwrap() == fs::read(&source).unwrap());
    // Who has an image is left alone, there as here.
    let held = QemuLock::take(&target).unwrap().unwrap();
    assert_eq!(send(&t, &client, &source, &wish(target.clone(), Raw)).unwrap_err().kind(), Kind::Busy);
    drop(held);
    client.close().unwrap();
}
