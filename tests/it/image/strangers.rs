//! Headers of strangers, and children that live and die.

use super::*;

// ---------------------------------------------------------------------------------------------- strangers' headers

#[test]
fn a_header_never_decides_what_is_opened() {
    let place = Place::new();
    // A secret beside the image, named by its header; the chain records something else below.
    place.run(
        "head -c 1048576 /dev/zero | tr '\\0' S > secret; qemu-img create -q -f raw honest.raw 1M; \
         qemu-img create -q -f qcow2 -b secret -F raw a.qcow2 1M",
    );
    for kind in ["in process", "over NBD"] {
        let chain = place.chain("a.qcow2 honest.raw");
        let mut buf = vec![1; 65536];
        if kind == "in process" {
            Qcow2Image::open(&chain).unwrap().read_at(0, &mut buf).unwrap();
        } else {
            over_nbd(&place, &chain).1.read_at(0, &mut buf).unwrap();
        }
        assert!(buf.iter().all(|b| *b == 0), "{kind}: the header's backing file was read");
    }
    // A chain that ends where the header goes on would silently read as zeros what the guest reads as data.
    assert_eq!(explain(&place.chain("a.qcow2")).unwrap_err().kind(), Kind::Conflict);
    place.run("qemu-img create -q -f qcow2 alone.qcow2 1M");
    assert_eq!(explain(&place.chain("alone.qcow2 honest.raw")).unwrap_err().kind(), Kind::Conflict);
}

#[test]
fn a_data_file_only_the_header_knows_is_a_conflict_and_so_is_the_reverse() {
    let place = Place::new();
    place.run("qemu-img create -q -f qcow2 -o data_file=d.raw a.qcow2 1M; qemu-img create -q -f qcow2 b.qcow2 1M");
    let error = open_read(&place.chain("a.qcow2"), &place.options()).err().unwrap();
    assert_eq!(error.kind(), Kind::Conflict);
    let mut with = place.chain("b.qcow2");
    with.0[0].data_file = Some(place.path("d.raw"));
    assert_eq!(open_read(&with, &place.options()).err().unwrap().kind(), Kind::Conflict);
    // And looking at it opens nothing else: the data file may be gone.
    std::fs::remove_file(place.path("d.raw")).unwrap();
    let info = qemu_img::info(&place.path("a.qcow2"), Format::Qcow2, false).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert_eq!((info.virtual_size.0, info.data_file.as_deref()), (MIB, Some("d.raw")));
}

#[test]
fn what_cannot_be_read_is_refused_with_its_reason() {
    let place = Place::new();
    place.run(
        "qemu-img create -q -f qcow2 luks.qcow2 1M; printf '\\0\\0\\0\\2' | dd of=luks.qcow2 bs=1 seek=32 conv=notrunc status=none; \
         head -c 1000 /dev/zero > not.qcow2; mkfifo fifo.raw; mkdir dir.raw; \
         qemu-img create -q -f qcow2 long.qcow2 1M",
    );
    for (names, kind) in [
        ("luks.qcow2", Kind::Refused),
        ("not.qcow2", Kind::Corrupt),
        ("fifo.raw", Kind::Conflict),
        ("dir.raw", Kind::Conflict),
        ("missing.raw", Kind::NotFound),
        ("missing.qcow2", Kind::NotFound),
    ] {
        let opened = open_read(&place.chain(names), &place.options());
        assert_eq!(opened.err().unwrap().kind(), kind, "{names}");
        assert_eq!(explain(&place.chain(names)).unwrap_err().kind(), kind, "{names}");
    }
    assert_eq!(explain(&Chain(vec![])).unwrap_err().kind(), Kind::Usage);
    // An L1 table of 32 GiB is not read into memory; QEMU is asked, and says no in its own words.
    let file = std::fs::OpenOptions::new().write(true).open(place.path("long.qcow2")).unwrap();
    file.write_all_at(&u32::MAX.to_be_bytes(), 36).unwrap();
    let error = open_read(&place.chain("long.qcow2"), &place.options()).err().unwrap();
    assert_eq!(error.kind(), Kind::Refused, "{}", error.chain());
    assert!(error.chain().contains("L1"), "{}", error.chain());
}

#[test]
fn scribbled_metadata_is_an_error_or_data_but_never_a_panic() {
    let place = Place::new();
    place.run(&format!("qemu-img create -q -f qcow2 a.qcow2 6M; qemu-io -f qcow2 {SOME} a.qcow2"));
    let good = std::fs::read(place.path("a.qcow2")).unwrap();
    let mut dice = Dice::new("scribbled");
    for _ in 0..std::env::var("ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(300) {
        let mut bad = good.clone();
        for _ in 0..1 + dice.roll(4) {
            // Header, refcounts, L1 and L2 lie in the first five clusters.
            let at = dice.roll(5 << 16) as usize;
            let at = if dice.roll(2) == 0 { at } else { at / 65536 * 65536 + at % 64 };
            bad[at] = dice.roll(256) as u8;
        }
        std::fs::write(place.path("b.qcow2"), &bad).unwrap();
        let Ok(image) = Qcow2Image::open(&place.chain("b.qcow2")) else { continue };
        let size = image.size().0.min(64 * MIB);
        let _ = image.extents(range(0, size));
        let mut buf = vec![0; MIB as usize];
        for at in (0..size).step_by(MIB as usize) {
            let _ = image.read_at(at, &mut buf[..(size - at).min(MIB) as usize]);
        }
    }
}

// ---------------------------------------------------------------------------------------------- life and death

fn zstd(place: &Place) -> Chain {
    place.run(
        "head -c 8000000 /dev/zero | tr '\\0' z > x.raw; \
         qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd x.raw a.qcow2",
    );
    place.chain("a.qcow2")
}

fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

/// The pid of the qemu-nbd child of this process that serves below this directory.
fn child_below(place: &Place) -> u32 {
    let wanted = place.path("run").display().to_string();
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    let mut found = pids.filter(|pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&wanted)
    });
    found.next().expect("a qemu-nbd child")
}

#[test]
fn after_close_the_child_is_gone_and_whoever_kept_the_image_reads_nothing() {
    let place = Place::new();
    let chain = zstd(&place);
    for names in ["qemu-nbd", "in process"] {
        let chain = if names == "qemu-nbd" { chain.clone() } else { place.chain("x.raw") };
        let opened = open_read(&chain, &place.options()).unwrap();
        let kept: Arc<dyn Image> = opened.image.clone();
        let pid = (names == "qemu-nbd").then(|| child_below(&place));
        let reader = {
            let image = kept.clone();
            std::thread::spawn(move || {
                let mut buf = vec![0; 1 << 20];
                while image.read_at(0, &mut buf).is_ok() {}
            })
        };
        std::thread::sleep(Duration::from_millis(50));
        opened.close().unwrap();
        reader.join().unwrap();
        assert!(pid.is_none_or(|pid| !alive(pid)), "{names}");
        assert_eq!(kept.read_at(0, &mut [0]).unwrap_err().kind(), Kind::Interrupted, "{names}");
        assert!(kept.extents(range(0, 512)).is_err(), "{names}");
        assert!(kept.size().0 > 0);
    }
}

#[test]
fn dropping_what_was_opened_ends_the_child_too() {
    let place = Place::new();
    let opened = open_read(&zstd(&place), &place.options()).unwrap();
    let pid = child_below(&place);
    assert!(alive(pid));
    drop(opened);
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "ended and reaped");
}

#[test]
fn a_child_that_dies_is_an_error_of_the_read_and_not_a_hang() {
    let place = Place::new();
    let opened = open_read(&zstd(&place), &place.options()).unwrap();
    let pid = child_below(&place);
    opened.image.read_at(0, &mut [0; 512]).unwrap();
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    let error = opened.image.read_at(0, &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{}", error.chain());
    for _ in 0..4 {
        assert_eq!(opened.image.read_at(0, &mut [0; 512]).unwrap_err().kind(), Kind::Unavailable);
    }
    opened.close().unwrap();
}

/// The second half of the test below: runs in a process of its own, which is killed.
#[test]
fn helper_that_is_killed_while_it_reads() {
    let Some(dir) = std::env::var_os("VIRT_REPLICA_TEST_DIR") else { return };
    let dir = PathBuf::from(dir);
    let layer = Layer { path: dir.join("a.qcow2"), format: Format::Qcow2, block_device: false, data_file: None };
    let options = OpenOptions { runtime_dir: dir.join("run"), force_share: false, readers: 1 };
    // From a thread that ends, as a thread of a pool does.
    let opened = std::thread::spawn(move || open_read(&Chain(vec![layer]), &options).unwrap()).join().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    opened.image.read_at(0, &mut [0; 512]).unwrap();
    std::fs::write(dir.join("ready"), "").unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_child_does_not_outlive_us_when_we_are_killed() {
    let place = Place::new();
    zstd(&place);
    let mut us = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "image::strangers::helper_that_is_killed_while_it_reads", "--nocapture"])
        .env("VIRT_REPLICA_TEST_DIR", place.0.path())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !place.path("ready").exists() {
        assert!(Instant::now() < deadline, "the helper never became ready");
        std::thread::sleep(Duration::from_millis(10));
    }
    let line = format!("{}/run", place.0.path().display());
    let pid = child_below(&place);
    assert!(alive(pid), "{line}");
    us.kill().unwrap();
    us.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while alive(pid) {
        assert!(Instant::now() < deadline, "qemu-nbd {pid} outlived us");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0, "and left no socket");
}

#[test]
fn a_domain_that_is_off_may_be_started_while_we_read() {
    let place = Place::new();
    let chain = zstd(&place);
    let start = "qemu-io -f qcow2 -c 'write -q -P 1 0 512' a.qcow2";
    // Under locks, whoever wants to write is kept out ...
    let opened = open_read(&chain, &place.options()).unwrap();
    let (started, said) = place.try_run(start);
    assert!(!started && said.contains("lock"), "{said}");
    opened.close().unwrap();
    // ... and without them is not.
    let opened = open_read(&chain, &OpenOptions { force_share: true, ..place.options() }).unwrap();
    assert!(opened.how.starts_with("qemu-nbd"));
    place.run(start);
    opened.close().unwrap();
    for format in ["a.qcow2", "x.raw"] {
        let opened = open_read(&place.chain(format), &OpenOptions { force_share: true, ..place.options() }).unwrap();
        place.run(start);
        drop(opened);
    }
}

#[test]
fn a_program_that_is_missing_or_fails_says_so() {
    let place = Place::new();
    let chain = zstd(&place);
    place.run("printf '#!/bin/sh\\necho no luck today >&2\\nexit 1\\n' > nbd; chmod +x nbd");
    // One process, one test: nextest gives each test its own.
    if std::env::var_os("NEXTEST").is_none() {
        eprintln!("SKIPPED: sets the environment; run with cargo nextest");
        return;
    }
    for (program, kind) in [(place.path("nbd"), Kind::Refused), (place.path("none"), Kind::NotFound)] {
        // SAFETY: this process runs this test only, and no other thread of it reads the environment now.
        unsafe { std::env::set_var("QEMU_NBD", &program) };
        let error = open_read(&chain, &place.options()).err().unwrap();
        assert_eq!(error.kind(), kind, "{}", error.chain());
        assert!(kind != Kind::Refused || error.chain().contains("no luck today"), "{}", error.chain());
        assert_eq!(std::fs::read_dir(place.path("run")).unwrap().count(), 0, "nothing is left");
    }
}
