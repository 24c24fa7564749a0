//! What we write, and QEMU reads; bitmaps and what qemu-img does for us.

use super::*;

/// The same random writes and zeros to an image and to memory.
fn scribble(image: &dyn ImageMut, model: &mut [u8], dice: &mut Dice, steps: usize) {
    let size = model.len() as u64;
    for step in 0..steps {
        let start = dice.roll(size / 512) * 512;
        let start = if dice.roll(3) == 0 { start / 65536 * 65536 } else { start };
        let len = [512, 4096, 65536, 200 * 1024, MIB][dice.roll(5) as usize].min(size - start);
        let bytes = start as usize..(start + len) as usize;
        if dice.roll(3) == 0 {
            image.zero(range(start, start + len)).unwrap();
            model[bytes].fill(0);
        } else {
            let data: Vec<u8> = (0..len).map(|i| (step as u64 * 31 + i / 512 + 1) as u8 | 1).collect();
            image.write_at(start, &data).unwrap();
            model[bytes].copy_from_slice(&data);
        }
        if dice.roll(20) == 0 {
            image.sync().unwrap();
        }
    }
    // The ends of a disk are where mistakes live.
    let tail = size.min(700);
    image.write_at(size - tail, &vec![0xa5; tail as usize]).unwrap();
    model[(size - tail) as usize..].fill(0xa5);
    image.sync().unwrap();
}

#[test]
fn what_we_write_qemu_reads_without_a_fault_or_a_leak() {
    let mut dice = Dice::new("writing");
    for size in [512, 65536, 65536 + 512, 5 * MIB + 1536, 21 * MIB - 512] {
        for backing in [None, Some("b.raw"), Some("small.qcow2"), Some("large.qcow2")] {
            let place = Place::new();
            let (small, large) = (size / 1024 * 512, size + 3 * 65536 + 512);
            place.run(&format!(
                "head -c {size} /dev/urandom > b.raw; qemu-img create -q -f qcow2 -o cluster_size=4k small.qcow2 {small}; \
                 qemu-img create -q -f qcow2 large.qcow2 {large}; qemu-io -f qcow2 -c 'write -q -P 9 0 {large}' large.qcow2"
            ));
            if small > 0 {
                place.run(&format!("qemu-io -f qcow2 -c 'write -q -P 9 0 {small}' small.qcow2"));
            }
            let name = format!("{size} on {backing:?}");
            let mut model = vec![0u8; size as usize];
            if let Some(below) = backing {
                let bytes = place.truth(below);
                let n = bytes.len().min(model.len());
                model[..n].copy_from_slice(&bytes[..n]);
            }
            let format = backing.map(|b| place.layer(b).format);
            let image = place.create("a.qcow2", size, backing.zip(format));
            scribble(&image, &mut model, &mut dice, 60);
            conforms(&name, &image, &model);
            drop(image);
            place.check("a.qcow2");

            // Reopened, it goes on where it was.
            let image = qcow2::open_write(&place.path("a.qcow2")).unwrap();
            conforms(&format!("{name}, reopened"), &image, &model);
            scribble(&image, &mut model, &mut dice, 30);
            image.sync().unwrap();
            drop(image);
            place.check("a.qcow2");
            assert!(place.truth("a.qcow2") == model, "{name}: QEMU reads something else");

            let chain = qcow2::own_chain(&place.path("a.qcow2")).unwrap();
            assert_eq!(chain.0.len(), 1 + backing.iter().len());
            std::fs::write(place.path("model.raw"), &model).unwrap();
            assert!(qemu_img::compare(&chain, &place.chain("model.raw")).unwrap(), "{name}");
            let opened = open_read(&chain, &place.options()).unwrap();
            assert_eq!(opened.how, "qcow2 read in process");
            conforms(&format!("{name}, read only"), &*opened.image, &model);
        }
    }
}

#[test]
fn raw_and_nbd_writers_do_the_same() {
    let mut dice = Dice::new("raw and nbd");
    let size = 9 * MIB + 512;
    let place = Place::new();
    let mut model = vec![0u8; size as usize];
    let image = RawWriter::create(&place.path("a.raw"), DiskSize(size)).unwrap();
    scribble(&image, &mut model, &mut dice, 80);
    conforms("raw writer", &image, &model);
    drop(image);
    assert!(std::fs::read(place.path("a.raw")).unwrap() == model);
    conforms("raw writer, reopened", &RawWriter::open(&place.path("a.raw")).unwrap(), &model);

    let socket = tempfile::tempdir().unwrap();
    let socket = socket.path().join("s");
    place.run(&format!("qemu-img create -q -f qcow2 b.qcow2 {size}"));
    let mut server = Command::new("qemu-nbd")
        .args(["-f", "qcow2", "--persistent", "--shared=4", "--discard=unmap", "-k"])
        .arg(&socket)
        .arg(place.path("b.qcow2"))
        .spawn()
        .unwrap();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let image = NbdImage::connect(&socket, "", &[], 3).unwrap();
    let mut model = vec![0u8; size as usize];
    scribble(&image, &mut model, &mut dice, 80);
    image.trim(range(0, 65536)).unwrap();
    image.write_at(0, &[1; 65536]).unwrap();
    model[..65536].fill(1);
    image.sync().unwrap();
    conforms("nbd writer", &image, &model);
    drop(image);
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(place.truth("b.qcow2") == model);

    // And read-only is read-only.
    let (_server, image) = over_nbd(&place, &place.chain("b.qcow2"));
    assert_eq!(image.write_at(0, &[1; 512]).unwrap_err().kind(), Kind::Refused);
    assert_eq!(image.zero(range(0, 512)).unwrap_err().kind(), Kind::Refused);
}

#[test]
fn several_threads_write_one_image() {
    let place = Place::new();
    place.run("head -c 16777216 /dev/urandom > b.raw");
    let image = place.create("a.qcow2", 16 * MIB, Some(("b.raw", Format::Raw)));
    let mut model = std::fs::read(place.path("b.raw")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                for n in (thread..256).step_by(4) {
                    match n % 7 {
                        0 => image.zero(range(n << 16, (n + 1) << 16)).unwrap(),
                        1 => image.write_at((n << 16) + 512, &[n as u8; 1024]).unwrap(),
                        _ => image.write_at(n << 16, &[n as u8; 65536]).unwrap(),
                    }
                    image.read_at(n << 16, &mut [0; 4096]).unwrap();
                }
            });
        }
    });
    for n in 0..256usize {
        let cluster = &mut model[n << 16..(n + 1) << 16];
        match n % 7 {
            0 => cluster.fill(0),
            1 => cluster[512..1536].fill(n as u8),
            _ => cluster.fill(n as u8),
        }
    }
    image.sync().unwrap();
    conforms("threads", &image, &model);
    drop(image);
    place.check("a.qcow2");
    assert!(place.truth("a.qcow2") == model);
}

#[test]
fn thin_stays_thin_and_zeros_hide_what_is_below() {
    let place = Place::new();
    let occupied = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(place.path(name)).unwrap().blocks() * 512
    };
    // A whole terabyte zeroed in an image that holds nothing allocates nothing.
    let image = place.create("thin.qcow2", 1 << 40, None);
    image.zero(range(0, 1 << 40)).unwrap();
    image.write_at(1 << 39, &[7; 65536]).unwrap();
    image.zero(range(1 << 39, (1 << 39) + 65536)).unwrap();
    image.write_at(1 << 30, &[7; 65536]).unwrap();
    image.sync().unwrap();
    assert_eq!(data_bytes(&image.extents(image.size().range()).unwrap()), 65536);
    drop(image);
    place.check("thin.qcow2");
    assert!(occupied("thin.qcow2") < 2 * MIB, "{}", occupied("thin.qcow2"));

    // In an overlay zeros are clusters of their own, and cost no data. The data below lies across two L2 tables.
    place.run("qemu-img create -q -f qcow2 b.qcow2 600M; qemu-io -f qcow2 -c 'write -q -P 9 508M 8M' b.qcow2");
    let image = place.create("a.qcow2", 600 * MIB, Some(("b.qcow2", Format::Qcow2)));
    image.zero(range(509 * MIB, 599 * MIB)).unwrap();
    image.sync().unwrap();
    assert_eq!(data_bytes(&image.extents(image.size().range()).unwrap()), MIB);
    drop(image);
    place.check("a.qcow2");
    assert!(occupied("a.qcow2") < MIB, "{}", occupied("a.qcow2"));
    let (ok, said) = place.try_run("qemu-io -f qcow2 -c 'read -q -P 9 508M 1M' -c 'read -q -P 0 509M 91M' a.qcow2");
    assert!(ok && !said.contains("verification failed"), "{said}");
}

#[test]
fn what_is_created_records_its_backing_and_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    drop(place.create("base.qcow2", 3 * MIB, None));
    drop(place.create("a.qcow2", 3 * MIB, Some(("base.qcow2", Format::Qcow2))));
    assert_eq!(std::fs::metadata(place.path("a.qcow2")).unwrap().permissions().mode() & 0o777, 0o600);
    let info = qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap();
    assert_eq!((info.backing.as_deref(), info.backing_format.as_deref()), (Some("base.qcow2"), Some("qcow2")));
    assert_eq!(info.virtual_size, DiskSize(3 * MIB));
    assert!(!info.corrupt && !info.dirty && !info.encrypted && info.snapshots.is_empty());
    let (ok, said) = place.try_run("qemu-img info a.qcow2");
    assert!(ok && said.contains("compat: 1.1") && said.contains("cluster_size: 65536"), "{said}");

    let refused =
        |size, backing| qcow2::create(&place.path("new.qcow2"), DiskSize(size), backing).err().unwrap().kind();
    assert_eq!(refused(513, None), Kind::Usage);
    for name in ["/etc/passwd", "../x", "nbd:localhost:1", "a/b", "", ".", "..", "json:{}", "a,b", "a\nb"] {
        assert_eq!(refused(512, Some((name, Format::Raw))), Kind::Refused, "{name:?}");
    }
    assert!(!place.path("new.qcow2").exists());
    assert_eq!(qcow2::create(&place.path("a.qcow2"), DiskSize(512), None).err().unwrap().kind(), Kind::Conflict);

    // Nothing that our store did not make is opened for writing.
    place.run(
        "qemu-img create -q -f qcow2 -b /etc/passwd -F raw evil.qcow2 1M; \
         qemu-img create -q -f qcow2 -u -b x.qcow2 -F qcow2 loop.qcow2 1M; cp loop.qcow2 x.qcow2; \
         qemu-img create -q -f qcow2 marked.qcow2 1M; qemu-img bitmap --add marked.qcow2 b0; \
         qemu-img create -q -f qcow2 -o extended_l2=on ext.qcow2 1M",
    );
    for (name, kind) in [
        ("evil.qcow2", Kind::Refused),
        ("marked.qcow2", Kind::Refused),
        ("ext.qcow2", Kind::Refused),
        ("loop.qcow2", Kind::Corrupt),
    ] {
        assert_eq!(qcow2::open_write(&place.path(name)).err().unwrap().kind(), kind, "{name}");
    }
    let info = qemu_img::info(&place.path("marked.qcow2"), Format::Qcow2, false).unwrap();
    assert!(!info.bitmaps[0].is_inconsistent(), "and its bitmap is as it was");
}

// ---------------------------------------------------------------------------------------------- bitmaps, qemu-img

#[test]
fn a_bitmap_says_what_changed() {
    let place = Place::new();
    place.run(
        "qemu-img create -q -f qcow2 a.qcow2 64M; qemu-io -f qcow2 -c 'write -q -P 1 0 8M' a.qcow2; \
         qemu-img bitmap --add a.qcow2 b0; \
         qemu-io -f qcow2 -c 'write -q -P 2 1M 1' -c 'write -q -P 2 10M 128k' -c 'write -q -P 2 67108352 512' a.qcow2",
    );
    let chain = place.chain("a.qcow2");
    let run = place.path("run");
    let serve = Serve { chain: &chain, runtime_dir: &run, force_share: false, connections: 2, bitmap: Some("b0") };
    let server = QemuNbd::start(&serve).unwrap();
    let context = [virt_replica::image::nbd::bitmap_context("b0")];
    let image = NbdImage::connect(server.socket(), "", &context, 2).unwrap();
    let dirty = image.dirty("b0", image.size().range()).unwrap();
    let block = |n: u64| range(n * 65536, (n + 1) * 65536);
    assert_eq!(dirty, [block(16), range(10 * MIB, 10 * MIB + 131072), block(1023)]);
    assert_eq!(image.dirty("b0", range(10 * MIB + 5, 10 * MIB + 10)).unwrap(), [range(10 * MIB + 5, 10 * MIB + 10)]);
    conforms("with a bitmap", &image, &place.truth_of_open("a.qcow2"));
    assert_eq!(image.dirty("b1", range(0, 512)).unwrap_err().kind(), Kind::Usage);
    let missing = NbdImage::connect(server.socket(), "", &["qemu:dirty-bitmap:none".to_owned()], 1).err().unwrap();
    assert_eq!(missing.kind(), Kind::Refused);
    drop(image);
    server.stop().unwrap();

    let info = qemu_img::info(&chain.top().path, Format::Qcow2, false).unwrap();
    assert_eq!((info.bitmaps[0].name.as_str(), info.bitmaps[0].granularity_bytes), ("b0", 65536));
    assert!(info.bitmaps[0].is_auto());
    let absent = Serve { bitmap: Some("none"), ..serve };
    let error = QemuNbd::start(&absent).err().unwrap();
    assert!(error.kind() == Kind::Refused && error.chain().contains("none"), "{}", error.chain());
}

impl Place {
    /// As [`Place::truth`], of an image that somebody has open.
    fn truth_of_open(&self, top: &str) -> Vec<u8> {
        self.run(&format!("rm -f truth.out; qemu-img convert -U -f qcow2 -O raw {top} truth.out"));
        std::fs::read(self.path("truth.out")).unwrap()
    }
}

#[test]
fn an_offline_commit_keeps_the_overlay_and_makes_the_base_read_the_same() {
    for base in ["base.qcow2", "base.raw"] {
        let place = Place::new();
        let format = place.layer(base).format.as_str();
        place.run(&format!(
            "qemu-img create -q -f {format} {base} 6M; qemu-io -f {format} {SOME} {base}; \
             qemu-img create -q -f qcow2 -b {base} -F {format} a.qcow2; \
             qemu-io -f qcow2 -c 'write -q -P 7 60k 100k' -c 'write -q -z 3M 64k' a.qcow2"
        ));
        let chain = place.chain(&format!("a.qcow2 {base}"));
        let truth = place.truth("a.qcow2");
        assert!(!qemu_img::compare(&chain, &place.chain(base)).unwrap());
        let overlay = std::fs::read(place.path("a.qcow2")).unwrap();
        // Twice: a run that lost the first answer repeats it.
        for _ in 0..2 {
            qemu_img::commit(&chain).unwrap_or_else(|e| panic!("{}", e.chain()));
            assert!(place.truth(base) == truth, "{base}");
            assert!(place.truth("a.qcow2") == truth, "{base}");
            assert!(qemu_img::compare(&chain, &place.chain(base)).unwrap());
        }
        assert_eq!(
            std::fs::read(place.path("a.qcow2")).unwrap().len(),
            overlay.len(),
            "the overlay keeps its clusters"
        );
        let info = qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap();
        assert_eq!(info.backing.as_deref(), Some(base));

        // Somebody has the base open: refused, with QEMU's words, and the overlay still completes it. (qemu-nbd keeps
        // nobody from writing to a raw image.)
        if base == "base.qcow2" {
            let (server, image) = over_nbd(&place, &place.chain(base));
            let error = qemu_img::commit(&chain).unwrap_err();
            assert!(error.kind() == Kind::Refused && error.chain().contains("lock"), "{}", error.chain());
            drop(image);
            server.stop().unwrap();
            assert!(place.truth("a.qcow2") == truth);
        }
    }
}

#[test]
fn a_commit_goes_into_the_next_layer_and_never_below_it() {
    let place = Place::new();
    place.run(
        "qemu-img create -q -f raw c.raw 1M; qemu-img create -q -f qcow2 -b c.raw -F raw b.qcow2; \
         qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 a.qcow2; qemu-io -f qcow2 -c 'write -q -P 7 0 64k' a.qcow2",
    );
    qemu_img::commit(&place.chain("a.qcow2 b.qcow2 c.raw")).unwrap();
    assert_eq!(std::fs::read(place.path("c.raw")).unwrap(), vec![0; MIB as usize]);
    assert_eq!(place.truth("b.qcow2")[..65536], [7; 65536]);
    assert_eq!(qemu_img::commit(&place.chain("c.raw")).unwrap_err().kind(), Kind::Usage);

    qemu_img::rebase_unsafe(&place.path("a.qcow2"), Some(("c.raw", Format::Raw)))
        .unwrap_or_else(|e| panic!("{}", e.chain()));
    let info = qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap();
    assert_eq!((info.backing.as_deref(), info.backing_format.as_deref()), (Some("c.raw"), Some("raw")));
    qemu_img::rebase_unsafe(&place.path("a.qcow2"), None).unwrap();
    assert_eq!(qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap().backing, None);
}

#[test]
fn a_check_tells_damage_from_leaks() {
    let place = Place::new();
    place.run("qemu-img create -q -f qcow2 a.qcow2 6M; qemu-io -f qcow2 -c 'write -q -P 1 0 1M' a.qcow2");
    let path = place.path("a.qcow2");
    let good = std::fs::read(&path).unwrap();
    assert!(qemu_img::check(&path, Format::Qcow2).unwrap().is_sound());
    let l1 = u64::from_be_bytes(good[40..48].try_into().unwrap()) as usize;
    let l2 = (u64::from_be_bytes(good[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize;
    // An entry less: its cluster leaks. An entry twice: two claim one cluster.
    let mut leak = good.clone();
    leak[l2..l2 + 8].fill(0);
    std::fs::write(&path, &leak).unwrap();
    let report = qemu_img::check(&path, Format::Qcow2).unwrap();
    assert!(report.is_sound() && report.leaks == 1, "{report:?}");
    let mut damage = good.clone();
    damage.copy_within(l2..l2 + 8, l2 + 8);
    std::fs::write(&path, &damage).unwrap();
    let report = qemu_img::check(&path, Format::Qcow2).unwrap();
    assert!(!report.is_sound(), "{report:?}");
    std::fs::write(&path, b"nonsense").unwrap();
    assert!(qemu_img::check(&path, Format::Qcow2).is_err());
    std::fs::write(place.path("a.raw"), b"anything").unwrap();
    assert!(qemu_img::check(&place.path("a.raw"), Format::Raw).unwrap().is_sound());
    assert!(qemu_img::info(&place.path("missing.qcow2"), Format::Qcow2, false).is_err());
    let raw = RawImage::open(&place.layer("a.raw")).unwrap();
    assert_eq!(qemu_img::info(&place.path("a.raw"), Format::Raw, true).unwrap().virtual_size, raw.size());
}
