//! The daemon's loop: hears, asks [`engine`](super::engine), does what it orders. One thread; whatever may block has
//! its own.

use super::control::{self, refusal};
use super::engine::Engine;
use super::event::{About, Event, Level, Listed, Now, Order, Setup};
use super::notify::Notify;
use super::pair::End;
use super::state::{self, State};
use super::worker::{self, Program};
use super::{checks, http};
use crate::config::Config;
pub use crate::daemon::input::Input;
use crate::daemon::input::{Ask, Question};
use crate::error::{Kind, Result};
use crate::name::DomainUuid;
use crate::policy::select::{SeenDomain, store_url};
use crate::replicate::state::report::Report;
use crate::replicate::state::{journal, stores};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Lists this host's domains; may block.
pub type Lister = Arc<dyn Fn() -> Result<Vec<SeenDomain>> + Send + Sync>;

/// Lists the replicas of a store on this host, with when the disks of each head stood still; may block.
pub type StoreLister = Arc<dyn Fn(&Path) -> Result<Vec<SeenInStore>> + Send + Sync>;

/// A replica of a store of this host's.
#[derive(Debug, Clone)]
pub struct SeenInStore {
    /// Name and UUID of the domain that the replica is of. It has no tags.
    pub domain: SeenDomain,
    /// When the disks of the head stood still; `None`: no point yet.
    pub head: Option<Timestamp>,
    /// Since when the domain lives here, brought up from one of its points.
    pub promoted_since: Option<Timestamp>,
}

/// Settings of one daemon, and the functions by which it reaches the outside.
pub struct Options {
    /// Path of the configuration. Policies are in `policies.d` beside it.
    pub config: PathBuf,
    /// Whether the operator named it: then it has to be there.
    pub config_named: bool,
    /// Directory for the daemon's own state. One daemon at a time may use it.
    pub state: PathBuf,
    /// Program that the daemon starts for runs, checks and repairs.
    pub program: Program,
    /// Lists the domains of this host.
    pub list: Lister,
    /// Lists the replicas of a store on this host.
    pub list_store: StoreLister,
    /// How often the daemon asks libvirt for its domains.
    pub list_every: Duration,
    /// End when nothing is due.
    pub once: bool,
    /// Path of the control socket. `None`: the daemon serves none.
    pub control: Option<PathBuf>,
    /// Address on which metrics and the status page are served. `None`: they are not served.
    pub http: Option<SocketAddr>,
    /// Connection to systemd for readiness and watchdog messages.
    pub notify: Notify,
    /// Log lines carry the domain and the target as fields too.
    pub fields: bool,
    /// 64 random bits each time.
    pub random: fn() -> u64,
}

/// How soon libvirt is asked again when it did not answer; doubles up to `list_every`.
const LIST_AGAIN: Duration = Duration::from_secs(2);

/// Works until it is told to stop, or, `once`, until nothing is due. Returns how many runs failed. An error: nothing
/// was begun.
pub fn run(options: Options, inbox: Receiver<Input>, inputs: Sender<Input>) -> Result<u64> {
    // Before anything is touched: a configuration that is wrong, another daemon.
    let setup = read_setup(&options.config, options.config_named)?;
    let _lock = state::take(&options.state)?;
    let (known, aside) = state::load(&options.state)?;
    if let Some(path) = aside {
        tracing::error!("what an earlier daemon knew could not be read, and was put aside: {}", path.display());
    }
    let _control = options.control.as_deref().map(|path| control::serve(path, inputs.clone())).transpose()?;
    if let Some(address) = options.http {
        let address = http::serve(address, inputs.clone())?;
        tracing::info!("metrics: http://{address}/metrics");
    }
    let policies = setup.policies.len();
    tracing::info!("policies read: {policies}");
    let engine = Engine::new(setup, known.pairs, known.paused, known.all_paused, options.once);
    options.notify.say(&format!("READY=1\nSTATUS=policies: {policies}"));
    let service = Service {
        engine,
        inputs,
        began: Instant::now(),
        children: BTreeMap::new(),
        hooks: Vec::new(),
        listing: Listing { running: false, next: Instant::now(), wait: LIST_AGAIN, known: Arc::default() },
        save: false,
        exit: false,
        options,
    };
    Ok(service.work(&inbox))
}

/// The configuration and its policies, ready for use.
fn read_setup(path: &Path, named: bool) -> Result<Setup> {
    let config = Config::load(path, named)?;
    let policies = config.policies(path)?;
    Ok(Setup::new(&config, policies, &TimeZone::system()))
}

struct Listing {
    running: bool,
    next: Instant,
    wait: Duration,
    /// Domains whose whole history was read.
    known: Arc<Mutex<BTreeSet<DomainUuid>>>,
}

struct Service {
    options: Options,
    engine: Engine,
    inputs: Sender<Input>,
    began: Instant,
    children: BTreeMap<u64, OwnedFd>,
    hooks: Vec<JoinHandle<()>>,
    listing: Listing,
    save: bool,
    exit: bool,
}

impl Service {
    fn now(&self) -> Now {
        Now { wall: Timestamp::now(), up: self.began.elapsed(), random: (self.options.random)() }
    }

    fn work(mut self, inbox: &Receiver<Input>) -> u64 {
        let mut alive = Instant::now();
        while !self.exit {
            self.list();
            let mut sleep = self.engine.sleep(self.now());
            if !self.listing.running && !self.engine.stopping() {
                sleep = sleep.min(self.listing.next.saturating_duration_since(Instant::now()));
            }
            if let Some(every) = self.options.notify.watchdog {
                sleep = sleep.min(every);
            }
            // The clocks of sleep and of due times differ by a little: waking too early only looks again.
            let input = match inbox.recv_timeout(sleep.max(Duration::from_millis(5))) {
                Ok(input) => input,
                Err(RecvTimeoutError::Timeout) => Input::Event(Box::new(Event::Tick)),
                Err(RecvTimeoutError::Disconnected) => unreachable!("the loop holds a sender itself"),
            };
            self.hear(input);
            if std::mem::take(&mut self.save) {
                self.keep();
            }
            if self.options.notify.watchdog.is_some_and(|every| alive.elapsed() >= every / 2) {
                alive = Instant::now();
                self.options.notify.say("WATCHDOG=1");
            }
        }
        self.options.notify.say("STOPPING=1");
        self.keep();
        // What is to be told is told: hooks have their own timeouts.
        self.hooks.drain(..).for_each(|hook| drop(hook.join()));
        self.engine.failed_runs
    }

    fn hear(&mut self, input: Input) {
        match input {
            Input::Event(event) => self.handle(*event),
            Input::Reload => {
                let stamp = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
                let usec = stamp.tv_sec as i128 * 1_000_000 + stamp.tv_nsec as i128 / 1000;
                self.options.notify.say(&format!("RELOADING=1\nMONOTONIC_USEC={usec}"));
                match read_setup(&self.options.config, self.options.config_named) {
                    Ok(setup) => self.handle(Event::Reloaded(setup)),
                    Err(e) => self.handle(Event::ReloadFailed(e.chain())),
                }
                self.options.notify.say("READY=1");
            }
            Input::Question(Question { ask, answer }) => {
                let reply = self.answer(&ask);
                // Whoever asked may be gone.
                let _ = answer.send(reply);
                self.handle(Event::Tick);
            }
            Input::Status(answer) => {
                let _ = answer.send(Box::new(self.engine.status(self.now())));
            }
        }
    }

    fn answer(&mut self, ask: &Ask) -> Value {
        let (done, domain) = match ask {
            Ask::Status {} => {
                let status = self.engine.status(self.now());
                return json!({ "ok": true, "status": status });
            }
            Ask::Pause { domain } => (self.engine.pause(domain.as_deref(), true), domain.as_deref()),
            Ask::Resume { domain } => (self.engine.pause(domain.as_deref(), false), domain.as_deref()),
            Ask::Sync { domain } => (self.engine.run_now(domain), Some(domain.as_str())),
        };
        let domain = domain.unwrap_or("all");
        if !done {
            return refusal(Kind::NotFound, &format!("no policy means a domain '{domain}' of this host"));
        }
        let ask = serde_json::to_value(ask).expect("a question is plain data");
        tracing::info!("asked to {}: {domain}", ask["command"].as_str().unwrap_or_default());
        self.save = true;
        json!({ "ok": true })
    }

    /// Hands an event to the engine, and does what it orders. What cannot be begun has ended.
    fn handle(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            match &event {
                Event::Ended { run, .. } | Event::Checked { run, .. } => drop(self.children.remove(run)),
                Event::Domains(_) | Event::DomainsFailed(_) => self.listed(matches!(event, Event::Domains(_))),
                Event::Stop => self.options.notify.say("STOPPING=1"),
                _ => {}
            }
            for order in self.engine.handle(event, self.now()) {
                let (run, begun) = match order {
                    Order::Start { run, job } => {
                        let text = format!("domain '{}': run to {} begins", job.domain.name, job.target);
                        self.say(Level::Info, About::job(&job), &text);
                        (run, self.options.program.start(run, &job, &self.inputs))
                    }
                    Order::Repair { run, uuid, ready_timeout } => {
                        (run, self.options.program.repair(run, &uuid, ready_timeout, &self.inputs))
                    }
                    Order::Check { run, check, job } => {
                        let text = format!("domain '{}': {} on {} begins", job.domain.name, check.word(), job.target);
                        self.say(Level::Info, About::job(&job), &text);
                        match self.options.program.check(run, check, &job, &self.inputs) {
                            Ok(child) => drop(self.children.insert(run, child)),
                            Err(e) => events.push_back(checks::not_begun(run, e.kind(), e.chain())),
                        }
                        continue;
                    }
                    other => {
                        self.act(other);
                        continue;
                    }
                };
                match begun {
                    Ok(child) => drop(self.children.insert(run, child)),
                    Err(e) => events.push_back(Event::Ended { run, end: End::failed(Some(e.kind()), e.chain()) }),
                }
            }
        }
    }

    fn act(&mut self, order: Order) {
        match order {
            Order::Start { .. } | Order::Repair { .. } | Order::Check { .. } => {
                unreachable!("they are begun by the caller")
            }
            Order::Terminate(run) => self.children.get(&run).into_iter().for_each(|c| worker::signal(c, Signal::TERM)),
            Order::Kill(run) => self.children.get(&run).into_iter().for_each(|c| worker::signal(c, Signal::KILL)),
            Order::Hook { hook, env } => {
                self.hooks.retain(|h| !h.is_finished());
                self.hooks.push(worker::hook(hook, env));
            }
            Order::Say(level, about, text) => self.say(level, about, &text),
            Order::Save => self.save = true,
            Order::Exit => self.exit = true,
        }
    }

    /// The text is whole; fields are for a journal that can be searched by them.
    fn say(&self, level: Level, about: About, text: &str) {
        let about = if self.options.fields { about } else { About::default() };
        let domain = about.domain.as_ref().map(|d| d.as_str());
        let target = about.target.as_deref();
        match level {
            Level::Info => tracing::info!(domain, target, "{text}"),
            Level::Warn => tracing::warn!(domain, target, "{text}"),
            Level::Error => tracing::error!(domain, target, "{text}"),
        }
    }

    fn keep(&self) {
        let e = &self.engine;
        let (pairs, paused, all_paused) = e.memory();
        if let Err(e) = state::save(&self.options.state, State { format: 0, all_paused, paused, pairs }) {
            // It goes on: replicas are worth more than what is remembered of them.
            tracing::error!("{}", e.chain());
        }
    }

    /// Starts asking libvirt, if it is time.
    fn list(&mut self) {
        if self.listing.running || self.engine.stopping() || Instant::now() < self.listing.next {
            return;
        }
        self.listing.running = true;
        let policies = &self.engine.setup.policies;
        let any_domains = policies.iter().any(|p| p.store.is_none());
        let stores: BTreeSet<PathBuf> = policies.iter().filter_map(|p| p.store.clone()).collect();
        let (list, list_store) = (self.options.list.clone(), self.options.list_store.clone());
        let (inputs, state, known) = (self.inputs.clone(), self.options.state.clone(), self.listing.known.clone());
        std::thread::spawn(move || {
            // A target that only looks after its store needs no libvirt for that.
            let domains = if any_domains { list() } else { Ok(Vec::new()) };
            let event = match domains {
                Ok(domains) => {
                    let domains = domains.into_iter().map(|d| learn(d, &state, &known));
                    let replicas = stores.iter().flat_map(|store| replicas(store, &list_store));
                    Event::Domains(domains.chain(replicas).collect())
                }
                Err(e) => Event::DomainsFailed(e.chain()),
            };
            // Nobody listens any more when the daemon ends.
            let _ = inputs.send(Input::Event(Box::new(event)));
        });
    }

    fn listed(&mut self, well: bool) {
        let listing = &mut self.listing;
        let wait = if well { self.options.list_every } else { listing.wait.min(self.options.list_every) };
        listing.wait = if well { LIST_AGAIN } else { (listing.wait * 2).min(self.options.list_every) };
        listing.running = false;
        listing.next = Instant::now() + wait;
    }
}

/// The replicas of a store. What cannot be read is said every time: nobody else looks.
fn replicas(store: &Path, list: &StoreLister) -> Vec<Listed> {
    let found = list(store).unwrap_or_else(|e| {
        tracing::error!("{}", e.chain());
        Vec::new()
    });
    let url = store_url(store);
    // A point here is one that somebody's run has made: when that began, only he knows.
    let listed = |seen: SeenInStore| Listed {
        domain: seen.domain,
        store: Some(store.to_owned()),
        points: seen.head.map(|frozen_at| (url.clone(), frozen_at, frozen_at)).into_iter().collect(),
        lives_on: None,
        promoted_since: seen.promoted_since,
    };
    found.into_iter().map(listed).collect()
}

/// What this host's journal knows of a domain: all that is kept the first time, then what is new.
fn learn(domain: SeenDomain, state: &Path, known: &Mutex<BTreeSet<DomainUuid>>) -> Listed {
    let is_new = known.lock().unwrap_or_else(|e| e.into_inner()).insert(domain.uuid.clone());
    let reports: Result<Vec<Report>> = match is_new {
        true => journal::recent_reports(state, &domain.uuid),
        false => journal::last_report(state, &domain.uuid).map(|r| r.into_iter().collect()),
    };
    let reports = reports.unwrap_or_else(|e| {
        tracing::warn!("{}", e.chain());
        Vec::new()
    });
    let points = reports.into_iter().filter_map(|r| Some((r.target, r.started_at, r.point?.as_of())));
    // A run by hand may have named the same store by another URL.
    let points = points.flat_map(|(target, started, frozen)| {
        stores::spellings(state, &target).into_iter().map(move |target| (target, started, frozen))
    });
    let points = points.collect();
    let lives_on = worker::lives_on(state, &domain.uuid);
    Listed { domain, store: None, points, lives_on, promoted_since: None }
}
