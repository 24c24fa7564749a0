//! A domain is brought up by an agent as it is on this host: every verb arrives, and so does every answer, refusal and
//! word.

use crate::agent::client::AgentClient;
use crate::agent::server::{ReplicaOpener, ServeOptions, Served, serve};
use crate::error::{Error, Kind, Result};
use crate::name::{DomainName, DomainUuid, Generation, PointId, RunId};
use crate::recovery::bringup::{BringUp, Coming, Order, Readiness, Standing, Wanted};
use crate::recovery::failover::{FailoverRecord, Stage};
use crate::recovery::ready::{Color, Finding, Question};
use crate::recovery::retire_home_copy::GaveWay;
use crate::transport::pipe::{PipeReader, PipeWriter};
use crate::transport::{Channel, Closer, Transport};
use jiff::Timestamp;
use std::sync::{Arc, Mutex};

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

fn order() -> Order {
    let run = RunId::from_bits(7);
    Order {
        point: PointId::from_parts(1, &run),
        handover: run,
        wanted: Wanted { autostart: true, ..Wanted::default() },
    }
}

/// Does nothing, and remembers what it was told to do.
#[derive(Clone, Default)]
struct Host {
    allows: bool,
    told: Arc<Mutex<Vec<String>>>,
}

impl Host {
    fn hears(&self, what: impl Into<String>) {
        self.told.lock().unwrap().push(what.into());
    }
}

fn record() -> FailoverRecord {
    FailoverRecord {
        format: 1,
        domain: DomainName::new("web01").unwrap(),
        uuid: DomainUuid::new(UUID).unwrap(),
        point: order().point,
        frozen_at: Timestamp::UNIX_EPOCH,
        dir: "/images/vr-failover-x".into(),
        stage: Stage::Running,
        started_at: Timestamp::UNIX_EPOCH,
        detached: Vec::new(),
        detaching_in: None,
        tpm: false,
        raw: Vec::new(),
        moving: None,
        wanted: Default::default(),
    }
}

impl BringUp for Host {
    fn ready(&self, point: Option<&PointId>) -> Result<Readiness> {
        self.hears(format!("ready {}", point.is_some()));
        let advised = Some(crate::error::advice::Failover::MapNetwork.into());
        let red = Finding { question: Question::Network, color: Color::Red, what: "no".into(), advice: None, advised };
        Ok(Readiness { point: order().point, findings: vec![red], suggestion: Vec::new() })
    }
    fn ready_for(&self, coming: &Coming) -> Result<Vec<Finding>> {
        self.hears(format!("ready for {coming:?}"));
        Ok(self.ready(None)?.findings)
    }
    fn state(&self) -> Result<Standing> {
        Ok(Standing { failover: Some(record()), ..Standing::default() })
    }
    fn bring_up(&self, order: &Order, say: &dyn Fn(&str)) -> Result<FailoverRecord> {
        self.hears(format!("up {} {} {:?}", order.handover, order.point, order.wanted));
        say("starting\x1b[2J the domain");
        // The latest words count; these have to be heard before others could come.
        std::thread::sleep(std::time::Duration::from_millis(200));
        Ok(record())
    }
    fn call_off(&self, order: &Order, _: &dyn Fn(&str)) -> Result<()> {
        self.hears(format!("off {}", order.handover));
        Err(Error::new(Kind::Refused, "it was committed"))
    }
    fn undo(&self, _: &dyn Fn(&str)) -> Result<FailoverRecord> {
        self.hears("undo");
        Ok(record())
    }
    fn commit(&self, _: &dyn Fn(&str)) -> Result<Generation> {
        self.hears("commit");
        Ok(Generation(2))
    }
    fn give_way(&self, _: &dyn Fn(&str)) -> Result<GaveWay> {
        self.hears("way");
        Ok(GaveWay { point: Some(order().point) })
    }
}

impl ReplicaOpener for Host {
    fn open(&self, _: &DomainUuid) -> Result<Box<dyn Served>> {
        Err(Error::new(Kind::Refused, "no store"))
    }
    fn find(&self, _: &str) -> Result<Vec<(DomainUuid, DomainName)>> {
        Ok(Vec::new())
    }
    fn bring_up(&self, uuid: &DomainUuid) -> Result<Box<dyn BringUp + '_>> {
        match self.allows {
            true => Ok(Box::new(self.clone())),
            false => NoBringUp.bring_up(uuid).map(|_| unreachable!("it is refused")),
        }
    }
}

/// An opener as it is where nothing is said about it.
struct NoBringUp;

impl ReplicaOpener for NoBringUp {
    fn open(&self, _: &DomainUuid) -> Result<Box<dyn Served>> {
        unreachable!("nothing is opened")
    }
    fn find(&self, _: &str) -> Result<Vec<(DomainUuid, DomainName)>> {
        unreachable!("nothing is looked for")
    }
}

/// An agent in a thread of this process.
struct Inside(Mutex<Option<(PipeWriter, PipeReader)>>);

impl std::fmt::Debug for Inside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Inside")
    }
}

struct PipeEnds;

impl Closer for PipeEnds {
    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

impl Transport for Inside {
    fn host(&self) -> &str {
        "b"
    }
    fn open(&self) -> Result<Channel> {
        let (input, output) = self.0.lock().unwrap().take().expect("opened once");
        Ok(Channel { input: Box::new(input), output: Box::new(output), closer: Box::new(PipeEnds) })
    }
    fn close(&self) -> Result<()> {
        Ok(())
    }
}

fn with_agent(host: Host, test: impl FnOnce(&Arc<AgentClient>)) {
    let (agent_in, client_out) = rustix::pipe::pipe().unwrap();
    let (client_in, agent_out) = rustix::pipe::pipe().unwrap();
    let agent = std::thread::spawn(move || {
        let output = PipeWriter::new(agent_out).unwrap();
        let options =
            ServeOptions { words: Some(|advice, _| format!("in words: {advice:?}")), ..ServeOptions::default() };
        serve(PipeReader::new(agent_in), output, &host, options)
    });
    let ends = (PipeWriter::new(client_out).unwrap(), PipeReader::new(client_in));
    let client = Arc::new(AgentClient::connect(&Inside(Mutex::new(Some(ends)))).unwrap());
    test(&client);
    client.close().unwrap();
    agent.join().unwrap().unwrap();
}

#[test]
fn every_verb_arrives_and_every_answer_comes_back() {
    let host = Host { allows: true, ..Host::default() };
    let told = Arc::clone(&host.told);
    with_agent(host, |client| {
        let far = client.bring_up(&DomainUuid::new(UUID).unwrap());
        let ready = far.ready(Some(&order().point)).unwrap();
        let red = ready.red().unwrap();
        assert_eq!(red.question, Question::Network);
        // An older client shows the words; this one may word the facts itself.
        assert_eq!(red.advice.as_deref(), Some("in words: Failover(MapNetwork)"));
        assert_eq!(red.advised, Some(crate::error::advice::Failover::MapNetwork.into()));
        far.ready(None).unwrap();
        assert_eq!(far.state().unwrap().failover.unwrap(), record());
        let words = Mutex::new(Vec::new());
        assert_eq!(far.bring_up(&order(), &|w| words.lock().unwrap().push(w.to_owned())).unwrap(), record());
        assert_eq!(*words.lock().unwrap(), ["starting [2J the domain"], "harmless on a terminal");
        let e = far.call_off(&order(), &|_| {}).unwrap_err();
        assert!(e.kind() == Kind::Refused && e.what().contains("on b: it was committed"), "{e}");
        far.undo(&|_| {}).unwrap();
        assert_eq!(far.commit(&|_| {}).unwrap(), Generation(2));
        assert_eq!(far.give_way(&|_| {}).unwrap().point, Some(order().point));
    });
    let Order { handover, point, wanted } = order();
    let all = [
        "ready true",
        "ready false",
        &format!("up {handover} {point} {wanted:?}"),
        &format!("off {handover}"),
        "undo",
        "commit",
        "way",
    ];
    assert_eq!(*told.lock().unwrap(), all);
}

/// Text of a peer is cut and loses its line ends on the way in; what is to be defined must not.
#[test]
fn a_definition_arrives_as_it_was_sent_however_long() {
    let host = Host { allows: true, ..Host::default() };
    let told = Arc::clone(&host.told);
    let long = "<!-- \u{e4} -->\n".repeat(4000);
    let coming = Coming {
        name: DomainName::new("shop").unwrap(),
        definition: format!("<domain>\n{long}</domain>"),
        disks: Vec::new(),
        nvram: true,
        tpm: false,
    };
    with_agent(host, |client| {
        client.bring_up(&DomainUuid::new(UUID).unwrap()).ready_for(&coming).unwrap();
    });
    assert_eq!(told.lock().unwrap()[0], format!("ready for {coming:?}"));
}

#[test]
fn an_agent_that_may_not_says_which_flag_allows_it_and_goes_on() {
    with_agent(Host::default(), |client| {
        let far = client.bring_up(&DomainUuid::new(UUID).unwrap());
        for e in [far.ready(None).unwrap_err(), far.bring_up(&order(), &|_| {}).unwrap_err()] {
            assert_eq!(e.kind(), Kind::Refused);
            assert_eq!(e.advice(), Some(&crate::error::advice::Host::ServeFailovers.into()), "{e}");
        }
    });
}
