//! What goes wrong between two honest ends: errors that cross the wire, greetings, silence and cuts.

use super::*;

// ---- errors that cross the wire

#[test]
fn an_error_in_mid_apply_surfaces_with_kind_and_place() {
    let fake = Arc::new(Fake::default());
    *fake.room_bytes.lock().unwrap() = Some(100);
    let client = session(&fake);
    let replica = client.open(&uuid()).unwrap();
    replica.begin(&begin_request(&["vda", "vdb"])).unwrap();
    replica.apply(&disk("vdb"), &[1; 80]).unwrap();
    replica.apply(&disk("vdb"), &[1; 80]).unwrap();
    let check = |error: Error| {
        assert_eq!(error.kind(), Kind::Space);
        assert_eq!(error.to_string(), "disk 'vdb': on b: cannot write (/srv/vda.qcow2) at byte 80");
        assert!(error.chain().contains("os error 28"), "{}", error.chain());
    };
    check(replica.finish_disk(&disk("vdb")).unwrap_err());
    check(replica.seal(&seal_request()).unwrap_err());
    assert_eq!(fake.sealed.load(Ordering::SeqCst), 0, "a point with a failed patch is never sealed");
    // Told unasked too: nothing more is sent for nothing.
    let sent = client.bytes_sent();
    check(replica.apply(&disk("vda"), &[1; 1 << 20]).unwrap_err());
    assert!(client.bytes_sent() < sent + (1 << 20));
    // The session and the replica live on.
    replica.abandon().unwrap();
    replica.begin(&begin_request(&["vda"])).unwrap();
    replica.apply(&disk("vda"), &[1; 80]).unwrap();
    assert_eq!(replica.finish_disk(&disk("vda")).unwrap().bytes_written, 80);
    client.close().unwrap();
}

#[test]
fn a_refused_open_keeps_its_kind_and_hint() {
    let client = session(&Arc::default());
    let other = DomainUuid::new("00000000-0000-4000-8000-00000000000f").unwrap();
    let error = client.open(&other).unwrap_err();
    assert_eq!((error.kind(), error.hint_text()), (Kind::Busy, Some("wait for it")));
    assert_eq!(error.to_string(), format!("domain '{other}': on b: held by run 17"));
    client.close().unwrap();
}

#[test]
fn a_point_of_another_domain_is_refused() {
    let client = session(&Arc::default());
    let replica = client.open(&uuid()).unwrap();
    let mut request = begin_request(&["vda"]);
    request.uuid = DomainUuid::new("00000000-0000-4000-8000-00000000000f").unwrap();
    assert_eq!(replica.begin(&request).unwrap_err().kind(), Kind::Refused);
    client.close().unwrap();
}

// ---- greetings

fn refused_greeting(said: &'static [u8]) -> Error {
    let transport = PipeTransport::new(move |mut input, mut output| {
        output.write_all(said).unwrap();
        drop(output);
        let mut rest = Vec::new();
        while input.read_to_end(&mut rest).is_err() {}
        Ok(())
    });
    AgentClient::connect_with(&transport, quick_client()).unwrap_err()
}

#[test]
fn an_agent_of_another_protocol_is_named_with_what_to_do() {
    let error = refused_greeting(b"virt-replica agent protocol 9 version 4.0.0\n");
    assert_eq!(error.kind(), Kind::Protocol);
    let text = error.to_string();
    assert!(
        text.contains("virt-replica 4.0.0 (protocol 9)") && text.contains(&format!("{} (protocol 1)", wire::VERSION))
    );
    assert_eq!(error.hint_text(), Some("install the same virt-replica on b"));
}

#[test]
fn what_a_profile_says_instead_of_a_banner_is_in_the_error() {
    let error = refused_greeting(b"This account is currently not available.\n");
    assert!(error.to_string().contains("it said: This account is currently not available."), "{error}");
}

#[test]
fn a_talkative_profile_is_read_past() {
    let transport = PipeTransport::new(|input, mut output| {
        output.write_all(b"Welcome to b!\nYou have mail.\n>> ").unwrap();
        serve(input, output, &FakeOpener(Arc::default()), quick_serve())
    });
    let client = Arc::new(AgentClient::connect_with(&transport, quick_client()).unwrap());
    client.open(&uuid()).unwrap();
    client.close().unwrap();
}

#[test]
fn a_client_of_another_protocol_is_refused() {
    let input = Cursor::new(b"virt-replica client protocol 2 version 2.0.0\n");
    let error = serve(input, std::io::sink(), &FakeOpener(Arc::default()), quick_serve()).unwrap_err();
    assert_eq!(error.kind(), Kind::Protocol);
    assert!(error.to_string().contains("protocol 2 (version 2.0.0)"), "{error}");
}

// ---- silence and cuts

#[test]
fn an_agent_that_never_greets_is_given_up() {
    let hold = Arc::new(AtomicBool::new(true));
    let held = Arc::clone(&hold);
    let transport = PipeTransport::new(move |_input, _output| {
        while held.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    });
    let began = Instant::now();
    let error = AgentClient::connect_with(&transport, quick_client()).unwrap_err();
    hold.store(false, Ordering::SeqCst);
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(began.elapsed() < QUICK + Duration::from_secs(4), "{:?}", began.elapsed());
}

/// Also for who writes: a frozen agent leaves the pipe full.
#[test]
fn an_agent_that_freezes_is_dead_for_everybody() {
    let hold = Arc::new(AtomicBool::new(true));
    let held = Arc::clone(&hold);
    let transport = PipeTransport::new(move |_input, mut output| {
        output.write_all(wire::Banner::ours().line(Role::Agent).as_bytes()).unwrap();
        let open = wire::encode(&wire::Reply::Open { replica: wire::Handle(0) });
        // Answers the first two requests unread: open and begin.
        for (id, answer) in [(1, open), (2, wire::encode(&wire::Reply::Begin { begun: None }))] {
            std::thread::sleep(Duration::from_millis(100));
            let head = Head { kind: FrameKind::Reply, more: false, id };
            wire::write_frame(&mut output, head, &[], &answer).unwrap();
        }
        while held.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    });
    let client = Arc::new(AgentClient::connect_with(&transport, quick_client()).unwrap());
    let replica = client.open(&uuid()).unwrap();
    replica.begin(&begin_request(&["vda"])).unwrap();
    let began = Instant::now();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| replica.describe().unwrap_err());
        let writes = scope.spawn(|| replica.apply(&disk("vda"), &vec![1; 4 << 20]).unwrap_err());
        for error in [waits.join().unwrap(), writes.join().unwrap()] {
            assert_eq!(error.kind(), Kind::Unavailable);
            assert!(error.to_string().contains("has been silent"), "{error}");
        }
    });
    assert!(began.elapsed() < QUICK + Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(client.close().is_err());
    hold.store(false, Ordering::SeqCst);
}

/// An agent whose client has gone without a word ends and lets the lock go.
#[test]
fn a_silent_client_ends_the_agent_and_frees_the_lock() {
    let fake = Arc::new(Fake::default());
    let (agent_input, mut input) = pipe();
    let (mut output, agent_output) = pipe();
    let opener = FakeOpener(Arc::clone(&fake));
    let agent = std::thread::spawn(move || serve(agent_input, agent_output, &opener, quick_serve()));
    input.write_all(wire::Banner::ours().line(Role::Client).as_bytes()).unwrap();
    let open = wire::encode(&Request::Open { uuid: uuid() });
    wire::write_frame(&mut input, Head { kind: FrameKind::Request, more: false, id: 1 }, &[], &open).unwrap();
    eventually("the replica is open", || fake.held.load(Ordering::SeqCst) == 1);
    let began = Instant::now();
    while !agent.is_finished() {
        // Read by someone, so that only the client's own silence can be the reason.
        let _ = output.read(&mut [0; 4096]);
        assert!(began.elapsed() < QUICK + Duration::from_secs(3));
    }
    let error = agent.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("silent"), "{error}");
    assert_eq!(fake.held.load(Ordering::SeqCst), 0);
}

#[test]
fn a_dropped_client_ends_the_agent() {
    let ended = Arc::new(AtomicBool::new(false));
    let says = Arc::clone(&ended);
    let transport = PipeTransport::new(move |input, output| {
        let ended = serve(input, output, &FakeOpener(Arc::default()), quick_serve());
        says.store(true, Ordering::SeqCst);
        ended
    });
    let client = Arc::new(AgentClient::connect_with(&transport, quick_client()).unwrap());
    client.open(&uuid()).unwrap().describe().unwrap();
    assert!(!ended.load(Ordering::SeqCst));
    drop(client);
    eventually("the agent has ended", || ended.load(Ordering::SeqCst));
}

#[test]
fn a_session_torn_at_any_byte_seals_nothing_and_frees_the_lock() {
    let said = spoken();
    for cut in 0..=said.len() {
        let fake = Arc::new(Fake::default());
        let ended = serve(&said[..cut], std::io::sink(), &FakeOpener(Arc::clone(&fake)), quick_serve());
        assert!(ended.is_err(), "cut at {cut}: no goodbye was said");
        assert_eq!(fake.sealed.load(Ordering::SeqCst), usize::from(cut == said.len()), "cut at {cut}");
        assert_eq!(fake.held.load(Ordering::SeqCst), 0, "cut at {cut}");
    }
}

#[test]
fn an_agent_torn_at_any_byte_is_an_error_here() {
    let mut answers = wire::Banner::ours().line(Role::Agent).into_bytes();
    let ping = Head { kind: FrameKind::Ping, more: false, id: 0 };
    wire::write_frame(&mut answers, ping, &[], &[]).unwrap();
    let open = wire::encode(&wire::Reply::Open { replica: wire::Handle(0) });
    wire::write_frame(&mut answers, Head { kind: FrameKind::Reply, more: false, id: 1 }, &[], &open).unwrap();
    for cut in 0..answers.len() {
        let said = answers[..cut].to_vec();
        let transport = PipeTransport::new(move |mut input, mut output| {
            // Not before the request is here: an answer to a request that nobody made is another test.
            let banner_end = said.len().min(wire::Banner::ours().line(Role::Agent).len());
            output.write_all(&said[..banner_end]).unwrap();
            if said.len() > banner_end {
                let mut asked = Vec::new();
                while !asked.windows(6).any(|w| w == b"\"open\"") {
                    let mut buf = [0; 256];
                    if let Ok(n @ 1..) = input.read(&mut buf) {
                        asked.extend_from_slice(&buf[..n]);
                    }
                }
                output.write_all(&said[banner_end..]).unwrap();
            }
            Ok(())
        });
        let opened = AgentClient::connect_with(&transport, quick_client()).map(Arc::new).and_then(|c| c.open(&uuid()));
        let error = opened.expect_err(&format!("cut at {cut}"));
        assert_eq!(error.kind(), Kind::Unavailable, "cut at {cut}: {error}");
    }
}

#[test]
fn answers_that_nobody_asked_for_end_the_session() {
    for (kind, id, payload) in [
        (FrameKind::Reply, 99, &b"{}"[..]),
        (FrameKind::End, 0, b""),
        (FrameKind::Request, 1, b"{}"),
        (FrameKind::Failed, 0, b"nonsense"),
    ] {
        let transport = PipeTransport::new(move |mut input, mut output| {
            output.write_all(wire::Banner::ours().line(Role::Agent).as_bytes()).unwrap();
            wire::write_frame(&mut output, Head { kind, more: false, id }, &[], payload).unwrap();
            let mut rest = Vec::new();
            while input.read_to_end(&mut rest).is_err() {}
            Ok(())
        });
        let error = match AgentClient::connect_with(&transport, quick_client()) {
            Ok(client) => Arc::new(client).open(&uuid()).unwrap_err(),
            Err(error) => error,
        };
        assert_eq!(error.kind(), Kind::Protocol, "{kind:?}: {error}");
    }
}

/// An agent of 0.1 does not know the question: what it answers is what it says to every request that it cannot
/// understand.
struct OldOpener(FakeOpener);

impl ReplicaOpener for OldOpener {
    fn open(&self, uuid: &DomainUuid) -> Result<Box<dyn Served>> {
        self.0.open(uuid)
    }

    fn find(&self, name: &str) -> Result<Vec<(DomainUuid, DomainName)>> {
        self.0.find(name)
    }

    fn store(&self, _: &StoreWish) -> Result<StoreSeen> {
        Err(wire::protocol("the request cannot be understood"))
    }
}

#[test]
fn an_agent_that_knows_no_stores_is_used_without_an_id() {
    let transport =
        PipeTransport::new(|input, output| serve(input, output, &OldOpener(FakeOpener(Arc::default())), quick_serve()));
    let client = Arc::new(AgentClient::connect_with(&transport, quick_client()).unwrap());
    assert_eq!(client.store(&StoreWish::default()).unwrap(), None);
    client.open(&uuid()).unwrap().describe().unwrap();
    client.close().unwrap();

    // A refusal is one.
    let client = session(&Arc::default());
    assert_eq!(client.store(&StoreWish::default()).unwrap_err().kind(), Kind::Refused);
    client.close().unwrap();
}
