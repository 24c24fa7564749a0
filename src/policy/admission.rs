//! Which of the runs that are due begin now, and which of them will come too late. Pure.
//!
//! Least slack first: whoever has to begin earliest to be within its RPO goes first. A deadline stands still while its
//! run waits, so everybody who waits becomes the most urgent in the end: nobody starves, also where there is always
//! more to do than can be done.

use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::time::Duration;

/// A run that is due. `K` names it to the caller.
#[derive(Debug, Clone)]
pub struct Waiting<K> {
    /// Name of the run for the caller.
    pub key: K,
    /// A domain has one run at a time, whatever its targets.
    pub domain: String,
    /// URL of the target; each one has a limit of its own.
    pub target: String,
    /// Until when it has to be done.
    pub deadline: Timestamp,
    /// How long it is expected to take.
    pub expected: Duration,
}

/// A run that is under way.
#[derive(Debug, Clone)]
pub struct Running {
    /// UUID of the domain that is replicated. It has no second run at the same time.
    pub domain: String,
    /// URL of the target that the run sends to.
    pub target: String,
    /// When the run is expected to end.
    pub ends_at: Timestamp,
}

/// How many runs at a time. Zero admits nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caps {
    /// Most runs on this host, whatever their targets.
    pub host: usize,
    /// Per target; one that is not listed has the host's.
    pub targets: BTreeMap<String, usize>,
    /// The link that leads to a target, if it has a name.
    pub links_of: BTreeMap<String, String>,
    /// Per link.
    pub links: BTreeMap<String, usize>,
}

impl Caps {
    fn of(&self, target: &str) -> usize {
        self.targets.get(target).copied().unwrap_or(self.host)
    }

    /// Whether one more run of this domain to this target may be under way beside these.
    fn allow<'a>(&self, domain: &str, target: &str, running: impl Iterator<Item = (&'a str, &'a str)>) -> bool {
        let link = self.links_of.get(target);
        let (mut all, mut there, mut on_the_way) = (0, 0, 0);
        for (d, t) in running {
            if d == domain {
                return false;
            }
            all += 1;
            there += usize::from(t == target);
            on_the_way += usize::from(link.is_some() && self.links_of.get(t) == link);
        }
        let link_max = link.and_then(|l| self.links.get(l)).copied().unwrap_or(usize::MAX);
        all < self.host && there < self.of(target) && on_the_way < link_max
    }
}

fn signed(d: Duration) -> SignedDuration {
    SignedDuration::try_from(d).unwrap_or(SignedDuration::MAX)
}

/// The latest moment at which a run may begin and still be in time.
fn latest_begin<K>(run: &Waiting<K>) -> Timestamp {
    run.deadline.checked_sub(signed(run.expected)).unwrap_or(Timestamp::MIN)
}

/// Those who wait, most urgent first.
fn by_urgency<K: Ord>(waiting: &[Waiting<K>]) -> Vec<&Waiting<K>> {
    let mut order: Vec<&Waiting<K>> = waiting.iter().collect();
    order.sort_by(|a, b| latest_begin(a).cmp(&latest_begin(b)).then_with(|| a.key.cmp(&b.key)));
    order
}

/// The runs that begin now, in this order.
pub fn admit<K: Ord + Clone>(waiting: &[Waiting<K>], running: &[Running], caps: &Caps) -> Vec<K> {
    let mut begun: Vec<&Waiting<K>> = Vec::new();
    for run in by_urgency(waiting) {
        let beside = running.iter().map(|r| (r.domain.as_str(), r.target.as_str()));
        let beside = beside.chain(begun.iter().map(|b| (b.domain.as_str(), b.target.as_str())));
        if caps.allow(&run.domain, &run.target, beside) {
            begun.push(run);
        }
    }
    begun.into_iter().map(|b| b.key.clone()).collect()
}

/// A run that is expected to come too late.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Miss<K> {
    /// Name of the run for the caller.
    pub key: K,
    /// When the run would have to be done.
    pub deadline: Timestamp,
    /// When the run is expected to be done; later than `deadline`.
    pub expected_end: Timestamp,
}

/// Who will miss its deadline, if those under way end when they are expected to and all that wait follow in their
/// order.
pub fn foresee<K: Ord + Clone>(
    waiting: &[Waiting<K>],
    running: &[Running],
    caps: &Caps,
    now: Timestamp,
) -> Vec<Miss<K>> {
    let mut under_way: Vec<(Timestamp, String, String)> =
        running.iter().map(|r| (r.ends_at.max(now), r.domain.clone(), r.target.clone())).collect();
    let mut left = by_urgency(waiting);
    let mut misses = Vec::new();
    let mut at = now;
    loop {
        under_way.retain(|(end, _, _)| *end > at);
        left.retain(|run| {
            let beside = under_way.iter().map(|(_, d, t)| (d.as_str(), t.as_str()));
            if !caps.allow(&run.domain, &run.target, beside) {
                return true;
            }
            let end = at.checked_add(signed(run.expected)).unwrap_or(Timestamp::MAX);
            if end > run.deadline {
                misses.push(Miss { key: run.key.clone(), deadline: run.deadline, expected_end: end });
            }
            under_way.push((end, run.domain.clone(), run.target.clone()));
            false
        });
        match under_way.iter().map(|(end, _, _)| *end).filter(|end| *end > at).min() {
            Some(next) if !left.is_empty() => at = next,
            _ => return misses,
        }
    }
}

/// How long a run is expected to take: the longest of the last few. Too long a guess warns too early; too short a one,
/// too late.
pub fn expected(recent: &[Duration]) -> Duration {
    recent.iter().copied().max().unwrap_or_default()
}

/// What became of an RPO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreachChange {
    /// The RPO is kept as before, or in breach as before.
    Unchanged,
    /// The lag became greater than the RPO.
    Entered,
    /// The lag is within the RPO again.
    Left,
}

/// Breach is a state: it is entered once and left once, however often one looks. `since` is when it was entered.
pub fn breach(since: &mut Option<Timestamp>, deadline: Option<Timestamp>, now: Timestamp) -> BreachChange {
    let broken = deadline.is_some_and(|d| now > d);
    match (since.is_some(), broken) {
        (false, true) => {
            // The moment it became true, not the one at which it was seen.
            *since = deadline;
            BreachChange::Entered
        }
        (true, false) => {
            *since = None;
            BreachChange::Left
        }
        _ => BreachChange::Unchanged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: i64) -> Timestamp {
        Timestamp::from_second(s).unwrap()
    }

    /// `"a>x 100 +20"`: domain a to target x, to be done by second 100, expected to take 20.
    fn waiting(text: &str) -> Waiting<String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let (domain, target) = words[0].split_once('>').unwrap();
        Waiting {
            key: words[0].to_owned(),
            domain: domain.to_owned(),
            target: target.to_owned(),
            deadline: at(words[1].parse().unwrap()),
            expected: Duration::from_secs(words.get(2).map_or(0, |w| w.trim_start_matches('+').parse().unwrap())),
        }
    }

    fn running(text: &str) -> Running {
        let w = waiting(text);
        Running { domain: w.domain, target: w.target, ends_at: w.deadline }
    }

    fn caps(host: usize, targets: &[(&str, usize)]) -> Caps {
        Caps { host, targets: targets.iter().map(|(t, n)| ((*t).to_owned(), *n)).collect(), ..Caps::default() }
    }

    fn admitted(due: &[&str], under_way: &[&str], caps: &Caps) -> Vec<String> {
        let due: Vec<_> = due.iter().map(|w| waiting(w)).collect();
        admit(&due, &under_way.iter().map(|r| running(r)).collect::<Vec<_>>(), caps)
    }

    #[test]
    fn least_slack_goes_first_within_the_caps() {
        let caps = caps(2, &[("x", 1)]);
        assert_eq!(admitted(&["a>x 90", "b>x 80", "c>y 100"], &[], &caps), ["b>x", "c>y"]);
        assert_eq!(admitted(&["a>x 90", "b>x 80", "c>y 100"], &["d>x 5"], &caps), ["c>y"]);
        assert_eq!(admitted(&["a>x 90"], &["d>y 5", "e>y 5"], &caps), [""; 0]);
        // A long run has less slack than its deadline says.
        assert_eq!(admitted(&["a>x 90", "b>x 100 +50"], &[], &caps), ["b>x"]);
        // One domain, two targets: one after the other.
        assert_eq!(admitted(&["a>x 90", "a>y 80"], &[], &caps), ["a>y"]);
    }

    /// A link is shared: two targets beyond it have together what it bears.
    #[test]
    fn targets_behind_one_link_share_it() {
        let names = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let links_of = names(&[("x", "wan"), ("y", "wan"), ("z", "lan")]);
        let caps = Caps { links_of, links: [("wan".to_owned(), 1)].into(), ..caps(5, &[]) };
        assert_eq!(
            admitted(&["a>x 10", "b>y 20", "c>z 30", "d>z 40", "e>w 50"], &[], &caps),
            ["a>x", "c>z", "d>z", "e>w"]
        );
        assert_eq!(admitted(&["b>y 20", "c>z 30"], &["a>x 10"], &caps), ["c>z"]);
    }

    #[test]
    fn who_will_be_late_is_named_beforehand() {
        let caps = caps(1, &[]);
        let due: Vec<_> = ["a>x 100 +60", "b>x 110 +60", "c>x 500 +60"].iter().map(|w| waiting(w)).collect();
        let misses = foresee(&due, &[running("d>x 10")], &caps, at(0));
        let late: Vec<(&str, i64)> = misses.iter().map(|m| (m.key.as_str(), m.expected_end.as_second())).collect();
        assert_eq!(late, [("b>x", 130)]);
        assert!(foresee(&due, &[], &Caps { host: 3, ..caps }, at(0)).is_empty());
        // A cap of nothing: nobody is ever begun, and asking ends all the same.
        assert!(foresee(&due, &[], &Caps::default(), at(0)).is_empty());
    }

    #[test]
    fn breach_is_entered_once_and_left_once() {
        let mut since = None;
        let mut look = |deadline: i64, now: i64| breach(&mut since, Some(at(deadline)), at(now));
        use BreachChange::*;
        let seen = [look(100, 100), look(100, 101), look(100, 500), look(600, 501), look(600, 502)];
        assert_eq!(seen, [Unchanged, Entered, Unchanged, Left, Unchanged]);
        let mut since = None;
        breach(&mut since, Some(at(100)), at(180));
        assert_eq!(since, Some(at(100)));
        // A policy that lost its RPO has none to break.
        assert_eq!(breach(&mut since, None, at(181)), Left);
    }
}
