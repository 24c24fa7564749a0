//! The conversation as it should be: a whole run, upkeep, streams, many questions at once, and long waits.

use super::*;

#[test]
fn a_whole_run_through_the_trait() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    assert_eq!(client.agent_version(), wire::VERSION);
    assert_eq!(client.find("db01").unwrap(), [(uuid(), DomainName::new("db01").unwrap())]);
    let replica = client.open(&uuid()).unwrap();
    assert!(replica.describe().unwrap().points.is_empty());
    replica.begin(&begin_request(&["vda", "vdb"])).unwrap();

    // Longer than a frame, and in pieces of every kind.
    let patch: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7) as u8).collect();
    replica.apply(&disk("vdb"), &patch).unwrap();
    replica.apply(&disk("vda"), b"").unwrap();
    replica.apply(&disk("vda"), b"abc").unwrap();
    assert_eq!(replica.finish_disk(&disk("vdb")).unwrap().bytes_written, patch.len() as u64);
    assert_eq!(fake.applied.lock().unwrap()["vdb"], patch);
    assert_eq!(fake.applied.lock().unwrap()["vda"], b"abc");
    assert_eq!(replica.apply(&disk("vdc"), b"x").unwrap_err().kind(), Kind::Usage);

    for length in [0, 5, 1 << 20, (1 << 20) + 1, 3 << 20] {
        replica.attach(Attachment::Nvram, &vec![1; length]).unwrap();
        assert_eq!(fake.attached.lock().unwrap().last(), Some(&(Attachment::Nvram, length)));
    }
    assert_eq!(replica.seal(&seal_request()).unwrap(), point(1));
    replica.abandon().unwrap();
    assert_eq!(fake.abandoned.load(Ordering::SeqCst), 1);
    assert!(client.bytes_sent() > patch.len() as u64 && client.bytes_received() > 100);

    // The lock goes with the replica, not with the session.
    assert_eq!(fake.held.load(Ordering::SeqCst), 1);
    drop(replica);
    eventually("the replica is released", || fake.held.load(Ordering::SeqCst) == 0);
    client.close().unwrap();
    client.close().unwrap();
    assert_eq!(client.find("x").unwrap_err().kind(), Kind::Usage);
}

#[test]
fn points_are_kept_and_removed_through_the_trait() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    let holds = replica.holds().unwrap();
    assert_eq!((holds.min_age_s, holds.links, holds.depth), (7, vec![point(1).id], 3));
    let mut heard = 0;
    let report = replica.prune(&[point(1).id], &mut |_, _| heard += 1).unwrap();
    assert_eq!((report.removed, report.kept[0].why.as_str(), report.bytes_copied), (vec![point(1).id], "pinned", 5));
    assert!(heard > 0, "progress travels");
    let refused = replica.prune(&[point(9).id], &mut |_, _| {}).unwrap_err();
    assert_eq!((refused.kind(), refused.context().point.clone()), (Kind::Refused, Some(point(9).id.to_string())));
    replica.pin(&point(2).id, Some("why")).unwrap();
    replica.pin(&point(2).id, None).unwrap();
    assert_eq!(*fake.asked.lock().unwrap(), ["remove 1", "remove 1", "pin 2 Some(\"why\")", "pin 2 None"]);
    client.close().unwrap();
}

#[test]
fn a_stream_is_read_ahead_and_ends_with_its_reader() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    let mut stream = replica.export(&point(9).id, &disk("vda")).unwrap();
    for n in (1..=9).rev() {
        assert_eq!(stream.next_chunk().unwrap(), vec![n; 600_000]);
    }
    assert!(stream.next_chunk().unwrap().is_empty() && stream.next_chunk().unwrap().is_empty());
    stream.close().unwrap();
    assert_eq!(fake.streams.load(Ordering::SeqCst), 0);
    for asked in ["changes 3 vda", "attachment nvram.fd"] {
        let mut stream = match asked.starts_with("changes") {
            true => replica.changes(&point(3).id, &point(1).id, &disk("vda")).unwrap(),
            false => replica.attachment(&point(1).id, Attachment::Nvram).unwrap(),
        };
        assert_eq!(stream.next_chunk().unwrap(), vec![1; 600_000]);
        stream.close().unwrap();
        assert_eq!(fake.asked.lock().unwrap().last().unwrap(), asked);
    }

    let mut stream = replica.export(&point(200).id, &disk("vda")).unwrap();
    let e = stream.next_chunk().unwrap_err();
    assert_eq!((e.kind(), e.context().offset_bytes), (Kind::Corrupt, Some(7)));
    // Closed in the middle, and not closed at all: the agent lets go of the point.
    stream.close().unwrap();
    let mut stream = replica.export(&point(100).id, &disk("vda")).unwrap();
    stream.next_chunk().unwrap();
    stream.close().unwrap();
    for _ in 0..16 {
        drop(replica.export(&point(5).id, &disk("vda")).unwrap());
    }
    assert_eq!(replica.export(&point(5).id, &disk("vda")).err().unwrap().kind(), Kind::Refused);
    assert_eq!(fake.streams.load(Ordering::SeqCst), 16);
    drop(replica);
    eventually("the streams end with the replica", || fake.streams.load(Ordering::SeqCst) == 0);
    client.close().unwrap();
}

#[test]
fn a_reply_larger_than_a_frame_arrives_whole() {
    let fake = Arc::new(Fake::default());
    fake.points.store(20_000, Ordering::SeqCst);
    let client = session(&fake);
    let view = client.open(&uuid()).unwrap().describe().unwrap();
    assert_eq!(view.points.len(), 20_000);
    assert_eq!(view.head().unwrap(), &point(20_000));
    assert!(client.bytes_received() > 2 << 20);
    client.close().unwrap();
}

#[test]
fn eight_threads_ask_at_once_and_each_gets_its_own_answer() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let replica = &replica;
            scope.spawn(move || {
                for round in 0..50u64 {
                    let start = thread * 1_000_000 + round * 1000;
                    let nodes = replica.nodes(&disk("vda"), thread as u8, start..start + round * 7).unwrap();
                    let expected = (start..start + round * 7)
                        .map(|n| if n % 3 == 0 { Digest::ZERO } else { node(n << 8 | thread) });
                    assert!(nodes.iter().copied().eq(expected), "thread {thread}, round {round}");
                }
            });
        }
    });
    // Pieces too, among the others' nodes.
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let replica = &replica;
            scope.spawn(move || {
                for round in 0..50u64 {
                    let blocks: Vec<_> = (0..round * 5).map(|n| BlockIndex((thread << 40) + n * (round + 1))).collect();
                    let pieces = replica.pieces(&disk("vda"), &blocks).unwrap();
                    assert!(pieces.iter().copied().eq(blocks.iter().copied().map(pieces_of)), "{thread}, {round}");
                    assert_eq!(replica.nodes(&disk("vda"), 0, thread * 3 + 1..thread * 3 + 3).unwrap().len(), 2);
                }
            });
        }
    });
    let most = replica.nodes(&disk("vda"), 0, 0..NODES_MAX).unwrap();
    assert_eq!(most.len() as u64, NODES_MAX);
    assert_eq!(replica.nodes(&disk("vda"), 0, 0..NODES_MAX + 1).unwrap_err().kind(), Kind::Usage);
    let blocks: Vec<_> = (0..=PIECES_MAX as u64).map(BlockIndex).collect();
    assert_eq!(replica.pieces(&disk("vda"), &blocks[1..]).unwrap().len(), PIECES_MAX);
    assert_eq!(replica.pieces(&disk("vda"), &blocks).unwrap_err().kind(), Kind::Usage, "more than the most");
    let disorder = [BlockIndex(2), BlockIndex(2)];
    assert_eq!(replica.pieces(&disk("vda"), &disorder).unwrap_err().kind(), Kind::Usage);
    client.close().unwrap();
}

/// A client that does not check what it asks is refused by the agent, and what it asked reaches no replica.
#[test]
fn an_agent_checks_the_blocks_whose_pieces_are_asked_for() {
    let replica = wire::Handle(0);
    let (many, disorder) = (vec![BlockIndex(0); PIECES_MAX + 1], vec![BlockIndex(3), BlockIndex(2)]);
    for blocks in [many, disorder] {
        let mut input = wire::Banner::ours().line(Role::Client).into_bytes();
        let requests = [Request::Open { uuid: uuid() }, Request::Pieces { replica, disk: disk("vda"), blocks }];
        for (id, request) in (1..).zip(&requests) {
            let head = Head { kind: FrameKind::Request, more: false, id };
            wire::write_frame(&mut input, head, &[], &wire::encode(request)).unwrap();
        }
        wire::write_frame(&mut input, Head { kind: FrameKind::Bye, more: false, id: 0 }, &[], &[]).unwrap();
        let mut output = Vec::new();
        serve(&input[..], &mut output, &FakeOpener(Arc::default()), quick_serve()).unwrap();
        let mut output = &output[wire::Banner::ours().line(Role::Agent).len()..];
        let (mut answer, mut refused) = (Vec::new(), None);
        while let Some(head) = wire::read_frame(&mut output, &mut answer).unwrap() {
            if (head.id, head.kind) == (2, FrameKind::Error) {
                refused = Some(wire::decode::<wire::WireError>("error", &answer).unwrap());
            }
        }
        let refused = refused.expect("an error under the request's id");
        assert_eq!((refused.kind, refused.context.disk.as_deref()), (Kind::Usage, Some("vda")));
    }
}

#[test]
fn verify_reports_progress_and_outlasts_the_silence() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    let mut seen = Vec::new();
    let began = Instant::now();
    let report = replica.verify(&point(3).id, &mut |done, total| seen.push((done, total))).unwrap();
    assert!(began.elapsed() > QUICK, "the test wants a verify longer than the silence allowed");
    assert_eq!(report.point, point(3).id);
    assert!(seen.len() >= 2 && seen.iter().all(|(_, total)| *total == 4), "{seen:?}");
    client.close().unwrap();
}

/// The agent pings while it works, the client while it waits.
#[test]
fn a_long_seal_is_not_silence() {
    let fake = Arc::new(Fake::default());
    *fake.delay.lock().unwrap() = QUICK * 2;
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    assert_eq!(replica.seal(&seal_request()).unwrap(), point(1));
    client.close().unwrap();
}

/// A slow disk there fills the pipe here: that is backpressure, not death.
#[test]
fn a_full_pipe_to_a_living_agent_waits() {
    let fake = Arc::new(Fake::default());
    *fake.delay.lock().unwrap() = QUICK * 3 / 2;
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    replica.begin(&begin_request(&["vda"])).unwrap();
    replica.apply(&disk("vda"), &vec![1; 3 << 20]).unwrap();
    assert_eq!(replica.finish_disk(&disk("vda")).unwrap().bytes_written, 3 << 20);
    client.close().unwrap();
}

/// A scrub reads while it is asked to, and ends with its replica.
#[test]
fn a_shortening_goes_step_by_step_where_there_is_one() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    let mut shorten = replica.shorten().unwrap().expect("the chain is deep");
    let start = ShortenStart { point: point(4).id, disks: vec![disk("vdb")], bytes_total: 20 };
    assert_eq!(shorten.start(), start);
    assert_eq!(shorten.step(10).unwrap(), ShortenStep { bytes_done: 10, end: false });
    assert_eq!(shorten.step(10).unwrap(), ShortenStep { bytes_done: 20, end: true });
    shorten.close().unwrap();
    assert_eq!(fake.streams.load(Ordering::SeqCst), 0);
    assert!(replica.shorten().unwrap().is_none());
    drop(replica);
    client.close().unwrap();
}

#[test]
fn a_scrub_goes_step_by_step_and_ends_with_its_replica() {
    let fake = Arc::new(Fake::default());
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    assert_eq!(replica.holds().unwrap().scrub.damage, [rotten()]);
    let mut scrub = replica.scrub(true).unwrap();
    assert_eq!(scrub.start(), ScrubStart { resumed: true, bytes_done: 5, bytes_total: 35 });
    assert_eq!(scrub.step(10).unwrap(), ScrubStep { bytes_read: 10, bytes_done: 15, found: vec![], end: false });
    // Other requests come in between.
    assert_eq!(replica.holds().unwrap().min_age_s, 7);
    scrub.step(10).unwrap();
    assert_eq!(scrub.step(10).unwrap(), ScrubStep { bytes_read: 10, bytes_done: 35, found: vec![rotten()], end: true });
    scrub.close().unwrap();
    assert_eq!(
        (fake.streams.load(Ordering::SeqCst), fake.asked.lock().unwrap().as_slice()),
        (0, &["scrub true".to_owned()][..])
    );
    let left = replica.scrub(false).unwrap();
    assert_eq!(fake.streams.load(Ordering::SeqCst), 1);
    drop((left, replica));
    eventually("it ends with the replica", || fake.streams.load(Ordering::SeqCst) == 0);
    client.close().unwrap();
}
