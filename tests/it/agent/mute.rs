//! An agent that is alive and does not answer: its storage hangs while another thread of it goes on saying "I am
//! alive".

use super::*;

/// A session with an agent that answers nothing behind a `describe`, until it is let go.
struct MuteAgent {
    fake: Arc<Fake>,
    client: Arc<AgentClient>,
}

impl MuteAgent {
    fn new(options: ClientOptions) -> MuteAgent {
        let fake = Arc::new(Fake { mute: AtomicBool::new(true), ..Fake::default() });
        let client = AgentClient::connect_with(&PipeTransport::agent(&fake, quick_serve()), options).unwrap();
        MuteAgent { fake, client: Arc::new(client) }
    }
}

impl Drop for MuteAgent {
    fn drop(&mut self) {
        self.fake.mute.store(false, Ordering::SeqCst);
    }
}

const SOON: Duration = Duration::from_millis(500);

#[test]
fn a_question_that_is_never_answered_ends_and_says_where_to_look() {
    let agent = MuteAgent::new(ClientOptions { question: SOON, ..quick_client() });
    let replica = agent.client.open(&uuid()).unwrap();
    let began = Instant::now();
    let error = replica.describe().unwrap_err();
    assert!(began.elapsed() >= SOON && began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("is alive, but did not tell what points there are within"), "{error}");
    assert!(error.hint_text().unwrap().contains("state D"), "{error}");
    // An agent does one thing after the other: nothing else will be answered either.
    assert!(!agent.client.is_open());
    assert!(replica.nodes(&disk("vda"), 0, 0..1).is_err());
    agent.client.close().unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// Slowness is not silence: what says how far it is may take as long as it likes.
#[test]
fn work_that_moves_is_waited_for() {
    let options = ClientOptions { work: Duration::from_millis(700), ..quick_client() };
    let client =
        Arc::new(AgentClient::connect_with(&PipeTransport::agent(&Arc::default(), quick_serve()), options).unwrap());
    let replica = client.open(&uuid()).unwrap();
    let began = Instant::now();
    replica.verify(&point(1).id, &mut |_, _| {}).unwrap();
    assert!(began.elapsed() > options.work, "it took longer than it may stand still");
    client.close().unwrap();
}

#[test]
fn a_goodbye_that_does_not_come_is_not_waited_for() {
    let agent = MuteAgent::new(ClientOptions { goodbye: SOON, ..quick_client() });
    let replica = agent.client.open(&uuid()).unwrap();
    let asking = std::thread::spawn(move || replica.describe());
    std::thread::sleep(Duration::from_millis(100));
    let began = Instant::now();
    let error = agent.client.close().unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(error.to_string().contains("say goodbye"), "{error}");
    asking.join().unwrap().unwrap_err();
}

/// The pipe to an agent that reads no more is full, for as long as it is heard.
#[test]
fn a_pipe_that_stays_full_is_not_waited_for_without_end() {
    let agent = MuteAgent::new(ClientOptions { work: SOON, ..quick_client() });
    let replica = Arc::new(agent.client.open(&uuid()).unwrap());
    replica.begin(&begin_request(&["vda"])).unwrap();
    let asking = std::thread::spawn({
        let replica = Arc::clone(&replica);
        move || replica.describe()
    });
    std::thread::sleep(Duration::from_millis(100));
    let began = Instant::now();
    let error = replica.apply(&disk("vda"), &[7; 4 << 20]).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    asking.join().unwrap().unwrap_err();
}
