//! Years of replication in a moment: schedules, admission and retries together, with hundreds of domains and a made-up
//! clock.

use super::admission::{Caps, Running, Waiting, admit};
use super::retry::{Retry, delay};
use super::schedule::{Due, Past, Schedule, Shift, When};
use crate::error::Kind;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::time::Duration;

/// xorshift: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

struct Pair {
    domain: String,
    target: String,
    schedule: Schedule,
    shift: Shift,
    rpo: Option<Duration>,
    past: Past,
    frozen_at: Option<Timestamp>,
    run_s: i64,
    failures: u32,
    /// Nothing changes for it before.
    look_at: Timestamp,
    runs: u64,
    worst_lag_s: i64,
    worst_wait_s: i64,
}

struct Simulation {
    pairs: Vec<Pair>,
    caps: Caps,
    now: Timestamp,
    /// (end, pair, begin)
    running: Vec<(Timestamp, usize, Timestamp)>,
    random: Random,
    /// One run in so many fails; 0: none.
    fails_one_in: u64,
}

fn start() -> Timestamp {
    "2026-01-01T00:00:00Z".parse().unwrap()
}

fn secs(s: i64) -> SignedDuration {
    SignedDuration::from_secs(s)
}

impl Simulation {
    fn new(seed: u64, host: usize, targets: &[(&str, usize)]) -> Self {
        let caps =
            Caps { host, targets: targets.iter().map(|(t, n)| ((*t).to_owned(), *n)).collect(), ..Caps::default() };
        Simulation { pairs: Vec::new(), caps, now: start(), running: Vec::new(), random: Random(seed), fails_one_in: 0 }
    }

    fn add(&mut self, domain: &str, target: &str, when: When, rpo_s: u64, run_s: i64) {
        let jitter = match &when {
            When::Every(every) => *every,
            When::Cron(_) | When::Never => Duration::from_secs(3600),
        };
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        self.pairs.push(Pair {
            domain: domain.to_owned(),
            target: target.to_owned(),
            schedule: Schedule { when, jitter, blackout: Vec::new(), zone },
            shift: Shift::of(domain, target),
            rpo: (rpo_s > 0).then(|| Duration::from_secs(rpo_s)),
            past: Past { since: self.now, begun: None, retry_at: None },
            frozen_at: None,
            run_s,
            failures: 0,
            look_at: self.now,
            runs: 0,
            worst_lag_s: 0,
            worst_wait_s: 0,
        });
    }

    fn every(&mut self, count: usize, name: &str, target: &str, every_s: u64, rpo_s: u64, run_s: i64) {
        for n in 0..count {
            self.add(&format!("{name}{n}"), target, When::Every(Duration::from_secs(every_s)), rpo_s, run_s);
        }
    }

    /// Ends runs, begins others, and goes to the next moment at which anything changes; not beyond `end`.
    fn step(&mut self, end: Timestamp) {
        let now = self.now;
        let done: Vec<_> = self.running.extract_if(.., |(until, _, _)| *until <= now).collect();
        for (until, at, begin) in done {
            let fails = self.fails_one_in > 0 && self.random.below(self.fails_one_in) == 0;
            let random = self.random.next();
            let pair = &mut self.pairs[at];
            pair.runs += 1;
            pair.look_at = until;
            if fails {
                pair.failures += 1;
                let wait = delay(Retry::default(), Some(Kind::Unavailable), pair.failures, random);
                pair.past.retry_at = Some(until + SignedDuration::try_from(wait).unwrap());
                continue;
            }
            // The lag is greatest just before the new point exists.
            let lag = until.duration_since(pair.frozen_at.unwrap_or(pair.past.since)).as_secs();
            pair.worst_lag_s = pair.worst_lag_s.max(lag);
            pair.frozen_at = Some(begin);
            pair.past = Past { begun: Some(begin), retry_at: None, ..pair.past };
            pair.failures = 0;
        }
        let mut next = end;
        let busy: Vec<usize> = self.running.iter().map(|(_, at, _)| *at).collect();
        let mut waiting = Vec::new();
        for (at, pair) in self.pairs.iter_mut().enumerate().filter(|(at, _)| !busy.contains(at)) {
            if pair.look_at <= now {
                match pair.schedule.due(pair.shift, &pair.past, now) {
                    Due::At(later) => pair.look_at = later,
                    Due::Now { since } => {
                        pair.worst_wait_s = pair.worst_wait_s.max(now.duration_since(since).as_secs());
                        waiting.push(Waiting {
                            key: at,
                            domain: pair.domain.clone(),
                            target: pair.target.clone(),
                            deadline: pair.schedule.deadline(pair.shift, pair.rpo, pair.frozen_at, &pair.past),
                            expected: Duration::from_secs(pair.run_s as u64),
                        });
                        continue;
                    }
                }
            }
            next = next.min(pair.look_at);
        }
        let under_way: Vec<Running> = self
            .running
            .iter()
            .map(|&(ends_at, at, _)| Running {
                domain: self.pairs[at].domain.clone(),
                target: self.pairs[at].target.clone(),
                ends_at,
            })
            .collect();
        for at in admit(&waiting, &under_way, &self.caps) {
            self.running.push((now + secs(self.pairs[at].run_s), at, now));
        }
        self.keeps_its_rules();
        next = self.running.iter().map(|(until, _, _)| *until).fold(next, Timestamp::min);
        self.now = next.max(now + secs(1)).min(end.max(now + secs(1)));
    }

    fn keeps_its_rules(&self) {
        assert!(self.running.len() <= self.caps.host);
        let mut by_target: BTreeMap<&str, usize> = BTreeMap::new();
        for (n, (_, at, _)) in self.running.iter().enumerate() {
            *by_target.entry(&self.pairs[*at].target).or_default() += 1;
            let same = |(_, other, _): &(_, usize, _)| self.pairs[*other].domain == self.pairs[*at].domain;
            assert!(!self.running[n + 1..].iter().any(same), "two runs of one domain at a time");
        }
        for (target, runs) in by_target {
            assert!(runs <= self.caps.targets.get(target).copied().unwrap_or(usize::MAX));
        }
    }

    fn run_days(&mut self, days: i64) {
        let end = self.now + secs(days * 86_400);
        while self.now < end {
            self.step(end);
        }
    }
}

fn seed() -> u64 {
    let seed = std::env::var("VIRT_REPLICA_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed_2026);
    println!("seed {seed} (VIRT_REPLICA_SEED sets it)");
    seed
}

/// Three hundred domains, two targets, two years through four changes of the clock: everybody within his RPO, all the
/// time.
#[test]
fn years_of_many_domains_stay_within_their_rpo() {
    let mut s = Simulation::new(seed(), 4, &[("dr1", 3), ("vault", 2)]);
    s.every(50, "db", "dr1", 4 * 3600, 8 * 3600, 240);
    s.every(220, "web", "dr1", 12 * 3600, 18 * 3600, 120);
    for n in 0..30 {
        s.add(&format!("db{n}"), "vault", When::Cron(Box::new(super::cron("30 2 * * *").unwrap())), 30 * 3600, 300);
    }
    s.fails_one_in = 50;
    s.run_days(730);
    for p in &s.pairs {
        let rpo = p.rpo.unwrap().as_secs() as i64;
        assert!(p.worst_lag_s <= rpo, "{} to {}: lag {} s, RPO {rpo} s", p.domain, p.target, p.worst_lag_s);
        let expected = match &p.schedule.when {
            When::Every(every) => 730 * 86_400 / every.as_secs(),
            When::Cron(_) => 730,
            When::Never => 0,
        };
        // Failed runs come on top, one in fifty.
        assert!((expected..expected + expected / 10 + 10).contains(&p.runs), "{}: {} runs", p.domain, p.runs);
    }
}

/// Twice as much to do as can be done: everybody is late, and nobody is forgotten, whatever his RPO.
#[test]
fn nobody_starves_where_there_is_too_much_to_do() {
    let mut s = Simulation::new(seed(), 2, &[]);
    s.every(60, "fast", "dr1", 300, 600, 20);
    s.every(20, "slow", "dr1", 6 * 3600, 24 * 3600, 600);
    s.every(5, "none", "dr1", 3600, 0, 60);
    s.run_days(20);
    for p in &s.pairs {
        assert!(p.runs >= 10, "{}: {} runs in 20 days", p.domain, p.runs);
    }
    // What is late is late by about the same, above what it was allowed.
    let late = |p: &Pair| p.worst_lag_s - p.rpo.map_or(0, |r| r.as_secs() as i64);
    let worst = s.pairs.iter().map(late).max().unwrap();
    assert!(worst < 86_400, "somebody was late by {worst} s");
}

/// A night without power: one run each when it is back, most urgent first, and then as if nothing had been.
#[test]
fn a_downtime_is_caught_up_with_one_run_each() {
    let mut s = Simulation::new(seed(), 3, &[]);
    s.every(100, "web", "dr1", 900, 3600, 15);
    s.run_days(2);
    let before: Vec<u64> = s.pairs.iter().map(|p| p.runs).collect();
    s.running.clear();
    s.now += secs(10 * 3600);
    let back = s.now;
    let end = back + secs(900);
    while s.now < end {
        s.step(end);
    }
    for (p, before) in s.pairs.iter().zip(before) {
        let caught_up = p.runs - before;
        // One for all that was missed, and the regular one of this quarter of an hour.
        assert!((1..=2).contains(&caught_up), "{}: {caught_up} runs after the downtime", p.domain);
    }
}

/// A target that is away for a day: the waits grow, and when it is back everybody is served within the longest of them.
#[test]
fn a_target_that_is_away_is_not_hammered() {
    let mut s = Simulation::new(seed(), 4, &[]);
    s.every(40, "web", "dr1", 300, 3600, 5);
    s.run_days(1);
    s.fails_one_in = 1;
    let before: u64 = s.pairs.iter().map(|p| p.runs).sum();
    s.run_days(1);
    let attempts = s.pairs.iter().map(|p| p.runs).sum::<u64>() - before;
    // At most every quarter of an hour (half of the longest wait) once the waits have grown; 288 a day would be its
    // slots.
    assert!(attempts / 40 <= 110, "{} attempts a domain in a day", attempts / 40);
    s.fails_one_in = 0;
    let back = s.now;
    let end = back + secs(45 * 60);
    while s.now < end {
        s.step(end);
    }
    assert!(s.pairs.iter().all(|p| p.frozen_at.is_some_and(|f| f >= back)), "somebody was not served again");
}
