//! Which recovery points to keep, and why. Pure: points, rules, a time zone and the time in, verdicts out.
//!
//! A rule is a number of periods: `daily=7` keeps the newest point of each of the last seven days *that have a point*;
//! a day without one does not count. `last=3` keeps the three newest points. The rules do not know of each other: a
//! point is kept if any of them keeps it, as in restic. A period is a calendar's, in the time zone given: hours (the
//! two hours that a clock set back repeats are two), days, weeks from Monday on, months.
//!
//! Invariants
//! - The head is kept, whatever the rules say. So are points that are pinned, in use, or younger than the target allows
//!   to be removed; a rule that keeps one of these counts it like any other.
//! - "Newest" is by the sequence of the points, never by their time: a source's clock may have been set back.
//! - Keeping again what was kept removes nothing more.

use crate::error::{Error, Kind, Result};
use crate::name::PointId;
use jiff::Timestamp;
use jiff::tz::{Offset, TimeZone};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// How many points of each kind to keep; zero: the rule is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keep {
    /// Newest points, whatever their time.
    pub last: u32,
    /// Hours of which the newest point is kept.
    pub hourly: u32,
    /// Days of which the newest point is kept.
    pub daily: u32,
    /// Weeks of which the newest point is kept.
    pub weekly: u32,
    /// Months of which the newest point is kept.
    pub monthly: u32,
}

/// The kinds of rules, in the order in which they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Keeps the newest points.
    Last,
    /// Keeps the newest point of each of the newest hours.
    Hourly,
    /// Keeps the newest point of each of the newest days.
    Daily,
    /// Keeps the newest point of each of the newest weeks.
    Weekly,
    /// Keeps the newest point of each of the newest months.
    Monthly,
}

impl Rule {
    const ALL: [Rule; 5] = [Rule::Last, Rule::Hourly, Rule::Daily, Rule::Weekly, Rule::Monthly];

    fn word(self) -> &'static str {
        match self {
            Rule::Last => "last",
            Rule::Hourly => "hourly",
            Rule::Daily => "daily",
            Rule::Weekly => "weekly",
            Rule::Monthly => "monthly",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Keep {
    fn count(&self, rule: Rule) -> u32 {
        match rule {
            Rule::Last => self.last,
            Rule::Hourly => self.hourly,
            Rule::Daily => self.daily,
            Rule::Weekly => self.weekly,
            Rule::Monthly => self.monthly,
        }
    }

    fn count_mut(&mut self, rule: Rule) -> &mut u32 {
        match rule {
            Rule::Last => &mut self.last,
            Rule::Hourly => &mut self.hourly,
            Rule::Daily => &mut self.daily,
            Rule::Weekly => &mut self.weekly,
            Rule::Monthly => &mut self.monthly,
        }
    }
}

/// `last=3,daily=7`: at least one rule, each once, none of zero. "Keep nothing" is never meant.
impl FromStr for Keep {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: String| {
            Error::new(Kind::Usage, format!("'{text}' does not say what to keep: {why}"))
                .hint("write it as last=3,hourly=24,daily=7,weekly=4,monthly=12, or any of these")
        };
        let mut keep = Keep::default();
        for item in text.split(',') {
            let (word, count) = item.split_once('=').ok_or_else(|| wrong(format!("'{item}' is not RULE=COUNT")))?;
            let rule = Rule::ALL.into_iter().find(|r| r.word() == word.trim());
            let rule = rule.ok_or_else(|| wrong(format!("there is no rule '{}'", word.trim())))?;
            let count: u32 = count.trim().parse().map_err(|_| wrong(format!("'{count}' is not a count")))?;
            if count == 0 {
                return Err(wrong(format!("{rule}=0 keeps nothing; leave the rule out")));
            }
            if keep.count(rule) != 0 {
                return Err(wrong(format!("{rule} is there twice")));
            }
            *keep.count_mut(rule) = count;
        }
        Ok(keep)
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = Rule::ALL.into_iter().filter(|r| self.count(*r) > 0);
        let words: Vec<String> = rules.map(|r| format!("{r}={}", self.count(r))).collect();
        f.write_str(&words.join(","))
    }
}

/// A point as retention sees it.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Id of the point that the rules judge.
    pub id: PointId,
    /// By the source's clock: what the calendar's periods go by.
    pub frozen_at: Timestamp,
    /// By the target's clock: what its floor goes by, since nobody but the target can set it.
    pub sealed_at: Timestamp,
    /// Why it is pinned, if it is.
    pub pinned: Option<String>,
    /// Who uses it, and for what, if somebody does.
    pub in_use: Option<String>,
}

/// What the target itself demands.
#[derive(Debug, Clone, Copy)]
pub struct Floor {
    /// Now, by the target's clock.
    pub now: Timestamp,
    /// Points sealed less long ago are not removed, whoever asks.
    pub min_age: Duration,
}

impl Floor {
    /// How long the point is still too young to be removed; `None` if it is old enough.
    pub fn still_young(&self, sealed_at: Timestamp) -> Option<Duration> {
        // A point from the future is as young as any.
        let age = Duration::try_from(self.now.duration_since(sealed_at)).unwrap_or(Duration::ZERO);
        self.min_age.checked_sub(age).filter(|left| !left.is_zero())
    }
}

/// Why a point is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The newest point is never removed.
    Head,
    /// The newest of its period, or among the newest of all.
    Rule(Rule),
    /// The point is pinned, for this reason.
    Pinned(String),
    /// The point is leased, by this user or for this purpose.
    InUse(String),
    /// The target does not remove it for so many seconds yet.
    Young(u64),
    /// Points were named, and this is none of them.
    NotNamed,
}

impl Reason {
    /// Whether a rule asked for it; otherwise it is kept although no rule did.
    fn is_wish(&self) -> bool {
        matches!(self, Reason::Rule(_) | Reason::NotNamed)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Head => f.write_str("newest"),
            Reason::Rule(rule) => rule.fmt(f),
            Reason::Pinned(why) if why.is_empty() => f.write_str("pinned"),
            Reason::Pinned(why) => write!(f, "pinned: {why}"),
            Reason::InUse(who) => write!(f, "in use: {who}"),
            Reason::Young(seconds) => write!(f, "too young for the target for another {}", span(*seconds)),
            Reason::NotNamed => f.write_str("not named"),
        }
    }
}

/// Seconds in the largest unit that leaves a number above one.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds.div_ceil(60)),
        7_200..172_800 => format!("{} h", seconds.div_ceil(3_600)),
        _ => format!("{} d", seconds.div_ceil(86_400)),
    }
}

/// What becomes of a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Id of the point that was judged.
    pub id: PointId,
    /// Why it is kept; empty: it is removed, since nothing keeps it.
    pub kept: Vec<Reason>,
}

impl Verdict {
    /// True if nothing keeps the point.
    pub fn removed(&self) -> bool {
        self.kept.is_empty()
    }

    /// Kept although nobody asked for it: what pruning went around.
    pub fn in_the_way(&self) -> bool {
        !self.removed() && !self.kept.iter().any(Reason::is_wish) && self.kept != [Reason::Head]
    }
}

/// What to do with each of `points`, oldest first, the head last; in their order.
pub fn plan(points: &[Candidate], keep: &Keep, zone: &TimeZone, floor: &Floor) -> Vec<Verdict> {
    let mut kept: Vec<Vec<Reason>> = points.iter().map(|_| Vec::new()).collect();
    for rule in Rule::ALL {
        let mut seen = BTreeSet::new();
        for (point, reasons) in points.iter().zip(&mut kept).rev() {
            let period = period(rule, point, zone);
            if seen.len() < keep.count(rule) as usize && seen.insert(period) {
                reasons.push(Reason::Rule(rule));
            }
        }
    }
    judge(points, kept, floor)
}

/// What to do if just the points of `named` are to go.
pub fn plan_named(points: &[Candidate], named: &[PointId], floor: &Floor) -> Vec<Verdict> {
    let kept = points.iter().map(|p| if named.contains(&p.id) { vec![] } else { vec![Reason::NotNamed] }).collect();
    judge(points, kept, floor)
}

/// Adds what keeps a point whatever the rules say.
fn judge(points: &[Candidate], wishes: Vec<Vec<Reason>>, floor: &Floor) -> Vec<Verdict> {
    let head = points.last().map(|p| &p.id);
    let verdict = |(point, wishes): (&Candidate, Vec<Reason>)| {
        let mut kept = Vec::new();
        kept.extend((head == Some(&point.id)).then_some(Reason::Head));
        kept.extend(wishes);
        kept.extend(point.pinned.clone().map(Reason::Pinned));
        kept.extend(point.in_use.clone().map(Reason::InUse));
        kept.extend(floor.still_young(point.sealed_at).map(|left| Reason::Young(left.as_secs().max(1))));
        Verdict { id: point.id.clone(), kept }
    };
    points.iter().zip(wishes).map(verdict).collect()
}

/// Names the period a point belongs to, so that two points of one period, and only these, have the same.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Period {
    /// Of `last`: every point has its own.
    Point(PointId),
    /// With the offset from UTC, which tells the two hours of a clock set back apart.
    Hour(jiff::civil::Date, i8, Offset),
    Day(jiff::civil::Date),
    Week(i16, i8),
    Month(i16, i8),
}

fn period(rule: Rule, point: &Candidate, zone: &TimeZone) -> Period {
    let time = point.frozen_at.to_zoned(zone.clone());
    let date = time.date();
    match rule {
        Rule::Last => Period::Point(point.id.clone()),
        Rule::Hourly => Period::Hour(date, time.hour(), time.offset()),
        Rule::Daily => Period::Day(date),
        Rule::Weekly => Period::Week(date.iso_week_date().year(), date.iso_week_date().week()),
        Rule::Monthly => Period::Month(date.year(), date.month()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::RunId;

    /// `"0102T08 0102T09! 0103T08*"`: points of 2024, month, day, hour and perhaps minutes; `!` pinned, `*` in use.
    /// UTC.
    fn points(text: &str) -> Vec<Candidate> {
        (1..).zip(text.split_whitespace()).map(|(seq, item)| point(seq, item)).collect()
    }

    fn point(seq: u64, item: &str) -> Candidate {
        let time = item.trim_end_matches(['!', '*']);
        let (month, day, clock) = (&time[..2], &time[2..4], &time[5..]);
        let minute = if clock.len() == 4 { &clock[2..] } else { "00" };
        let at: Timestamp = format!("2024-{month}-{day}T{}:{minute}:00Z", &clock[..2]).parse().unwrap();
        Candidate {
            id: PointId::from_parts(seq, &RunId::from_bits(seq)),
            frozen_at: at,
            sealed_at: at,
            pinned: item.contains('!').then(String::new),
            in_use: item.contains('*').then(|| "verify".to_owned()),
        }
    }

    fn floor(min_age_hours: u64, now: &str) -> Floor {
        Floor { now: point(1, now).sealed_at, min_age: Duration::from_secs(min_age_hours * 3600) }
    }

    /// What keeps each point, a letter for each reason: H head, l h d w m the rules, P pinned, U in use, Y young;
    /// `-`: removed.
    fn letters(verdicts: &[Verdict]) -> String {
        let letter = |reason: &Reason| match reason {
            Reason::Head => 'H',
            Reason::Rule(rule) => rule.word().chars().next().unwrap(),
            Reason::Pinned(_) => 'P',
            Reason::InUse(_) => 'U',
            Reason::Young(_) => 'Y',
            Reason::NotNamed => 'n',
        };
        let word = |v: &Verdict| match v.removed() {
            true => "-".to_owned(),
            false => v.kept.iter().map(letter).collect(),
        };
        verdicts.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    fn kept_in(zone: &str, keep: &str, text: &str) -> String {
        let zone = TimeZone::get(zone).unwrap();
        letters(&plan(&points(text), &keep.parse().unwrap(), &zone, &floor(0, "1231T00")))
    }

    fn kept(keep: &str, text: &str) -> String {
        kept_in("UTC", keep, text)
    }

    #[test]
    fn the_newest_of_each_period_is_kept() {
        for (keep, text, expected) in [
            ("last=2", "0101T01 0101T02 0101T03", "- l Hl"),
            ("last=9", "0101T01 0101T02", "l Hl"),
            ("hourly=2", "0101T0100 0101T0110 0101T0200 0101T0230 0101T0300", "- - - h Hh"),
            ("daily=2", "0101T01 0101T23 0102T00 0102T12 0103T00", "- - - d Hd"),
            // A day without a point does not count.
            ("daily=3", "0101T01 0101T23 0105T00 0105T12 0109T00", "- d - d Hd"),
            // Weeks begin on Monday: 2024-01-01 is one.
            ("weekly=2", "0101T01 0107T23 0108T00 0114T12", "- w - Hw"),
            ("monthly=2", "0101T01 0131T23 0201T00 0215T12", "- m - Hm"),
            ("last=1,daily=2,monthly=2", "0131T01 0131T02 0205T01 0205T02 0206T01", "- m - d Hldm"),
        ] {
            assert_eq!(kept(keep, text), expected, "{keep} of {text}");
        }
        assert_eq!(kept("last=1", ""), "");
    }

    #[test]
    fn periods_are_those_of_the_time_zone() {
        // 23:30 UTC is the next day in Berlin.
        let text = "0110T2230 0110T2330 0111T0030";
        assert_eq!(kept("daily=2", text), "- d Hd");
        assert_eq!(kept_in("Europe/Berlin", "daily=2", text), "d - Hd");
        // 2024-10-27 in Berlin: the hour from 02:00 comes twice.
        assert_eq!(kept_in("Europe/Berlin", "hourly=2", "1027T0015 1027T0045 1027T0115"), "- h Hh");
        assert_eq!(kept_in("Europe/Berlin", "hourly=3", "1026T2330 1027T0045 1027T0115"), "h h Hh");
    }

    #[test]
    fn the_year_of_a_week_is_not_that_of_its_days() {
        // 2024-12-30 belongs to the first week of 2025, 2024-01-01 to that of 2024.
        assert_eq!(kept("weekly=1", "0101T01 1230T01 1231T00"), "- - Hw");
        assert_eq!(kept("weekly=2", "0101T01 1230T01 1231T00"), "w - Hw");
    }

    #[test]
    fn what_is_held_is_kept_and_said_to_be() {
        assert_eq!(kept("last=1", "0101T01! 0101T02* 0101T03 0101T04"), "P U - Hl");
        let verdicts = plan(
            &points("0101T01! 0101T02* 0101T03 0101T04!"),
            &"last=2".parse().unwrap(),
            &TimeZone::UTC,
            &floor(0, "0102T00"),
        );
        assert_eq!(letters(&verdicts), "P U l HlP");
        assert_eq!(verdicts.iter().map(Verdict::in_the_way).collect::<Vec<_>>(), [true, true, false, false]);
    }

    #[test]
    fn the_head_stays_and_a_clock_set_back_does_not_change_what_is_newest() {
        assert_eq!(kept("daily=1", "0103T01 0101T02"), "- Hd");
        assert_eq!(kept("daily=2", "0103T01 0103T02 0101T02"), "- d Hd");
        let last = |text| letters(&plan_named(&points(text), &[points(text)[1].id.clone()], &floor(0, "0201T00")));
        assert_eq!(last("0101T01 0101T02 0101T03"), "n - Hn");
        assert_eq!(last("0101T01 0101T02"), "n H");
    }

    #[test]
    fn what_is_too_young_for_the_target_stays() {
        let young = |now| {
            let points = points("0101T00 0101T12 0102T00");
            letters(&plan(&points, &"last=1".parse().unwrap(), &TimeZone::UTC, &floor(24, now)))
        };
        assert_eq!(young("0102T00"), "- Y HlY");
        assert_eq!(young("0102T1159"), "- Y HlY");
        assert_eq!(young("0102T12"), "- - HlY");
        // By a clock that is behind, everything is young.
        assert_eq!(young("0101T00"), "Y Y HlY");
        let floor = floor(24, "0102T11");
        assert_eq!(floor.still_young(point(1, "0101T12").sealed_at), Some(Duration::from_secs(3600)));
    }

    #[test]
    fn rules_are_read_as_they_are_written_and_nonsense_is_refused() {
        let all = "last=3,hourly=24,daily=7,weekly=4,monthly=12";
        assert_eq!(all.parse::<Keep>().unwrap().to_string(), all);
        assert_eq!("daily=7, last=3".parse::<Keep>().unwrap().to_string(), "last=3,daily=7");
        for bad in ["", "7", "last", "last=", "last=x", "last=-1", "last=0", "yearly=1", "last=1,last=2", "last=1,"] {
            let e = bad.parse::<Keep>().unwrap_err();
            assert_eq!(e.kind(), Kind::Usage, "{bad}");
            assert!(e.hint_text().unwrap().contains("daily=7"));
        }
    }

    /// xorshift64*.
    struct Rng(u64);

    impl Rng {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n
        }
    }

    #[test]
    fn whatever_the_history_these_hold() {
        let from_env = std::env::var("RETENTION_SEED").ok().map(|s| s.parse().expect("RETENTION_SEED is a number"));
        let seed: u64 =
            from_env.unwrap_or_else(|| std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1);
        println!("RETENTION_SEED={seed}");
        let mut rng = Rng(seed);
        for round in 0..400 {
            let history = history(&mut rng);
            let mut keep = Keep::default();
            Rule::ALL.into_iter().for_each(|r| *keep.count_mut(r) = rng.below(5) as u32);
            let now = history.last().map_or(Timestamp::UNIX_EPOCH, |p| p.sealed_at);
            let floor = Floor { now, min_age: Duration::from_secs(rng.below(3) * 86_400) };
            let zone = TimeZone::get(["UTC", "Europe/Berlin", "Asia/Kathmandu"][rng.below(3) as usize]).unwrap();
            assert_holds(&history, &keep, &zone, &floor, &format!("round {round}: {keep}"));
        }
    }

    /// Points some minutes to some weeks apart, now and then back in time.
    fn history(rng: &mut Rng) -> Vec<Candidate> {
        let mut at = 1_704_067_200i64 + rng.below(86_400 * 400) as i64;
        let step = [600, 7_200, 100_000, 900_000][rng.below(4) as usize];
        let point = |seq| {
            at += rng.below(step) as i64 - if rng.below(20) == 0 { step as i64 * 2 } else { 0 };
            let at = Timestamp::from_second(at).unwrap();
            Candidate {
                id: PointId::from_parts(seq, &RunId::from_bits(seq)),
                frozen_at: at,
                sealed_at: at,
                pinned: (rng.below(10) == 0).then(|| "release".to_owned()),
                in_use: (rng.below(15) == 0).then(|| "drill".to_owned()),
            }
        };
        (1..=20).map(point).collect()
    }

    fn assert_holds(history: &[Candidate], keep: &Keep, zone: &TimeZone, floor: &Floor, what: &str) {
        let verdicts = plan(history, keep, zone, floor);
        assert_eq!(verdicts.last().map(|v| v.kept[0].clone()), Some(Reason::Head), "{what}");
        for (point, verdict) in history.iter().zip(&verdicts) {
            let held = point.pinned.is_some() || point.in_use.is_some() || floor.still_young(point.sealed_at).is_some();
            assert!(!(held && verdict.removed()), "{what}: {} is held", point.id);
        }
        for rule in Rule::ALL {
            let periods: BTreeSet<Period> = history.iter().map(|p| period(rule, p, zone)).collect();
            let by_rule = verdicts.iter().filter(|v| v.kept.contains(&Reason::Rule(rule))).count();
            assert_eq!(by_rule, periods.len().min(keep.count(rule) as usize), "{what}: {rule}");
        }
        let survivors: Vec<Candidate> =
            history.iter().zip(&verdicts).filter(|(_, v)| !v.removed()).map(|(p, _)| p.clone()).collect();
        assert!(plan(&survivors, keep, zone, floor).iter().all(|v| !v.removed()), "{what}: once more removes more");
        let mut more = *keep;
        more.daily += 1;
        for (few, many) in verdicts.iter().zip(plan(history, &more, zone, floor)) {
            assert!(few.removed() || !many.removed(), "{what}: a further rule removes {}", few.id);
        }
    }
}
