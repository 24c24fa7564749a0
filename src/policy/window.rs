//! Blackout windows: hours of the week in which no run is begun. Pure: the time zone and the time are arguments.
//!
//! A window is a clock's on the wall: from 08:00 to 18:00 means what the clock of the policy's time zone shows, also on
//! days of 23 and 25 hours. An hour that a clock set back repeats is in the window both times.

use jiff::civil::{DateTime, Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// Minutes of a day, `00:00` to `24:00`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Minute(u16);

const DAY: u16 = 24 * 60;

impl Minute {
    fn parse(text: &str) -> Option<Minute> {
        let (h, m) = text.split_once(':')?;
        let two = |t: &str| (t.len() == 2 && t.bytes().all(|b| b.is_ascii_digit())).then(|| t.parse::<u16>().ok())?;
        let (h, m) = (two(h)?, two(m)?);
        let minute = h * 60 + m;
        (m < 60 && minute <= DAY).then_some(Minute(minute))
    }
}

impl fmt::Display for Minute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

impl<'de> Deserialize<'de> for Minute {
    fn deserialize<D: Deserializer<'de>>(de: D) -> Result<Self, D::Error> {
        let text = String::deserialize(de)?;
        Minute::parse(&text).ok_or_else(|| {
            serde::de::Error::custom(format!("'{text}' is no time of day: write it in quotes, \"08:00\" to \"24:00\""))
        })
    }
}

impl Serialize for Minute {
    fn serialize<S: Serializer>(&self, ser: S) -> Result<S::Ok, S::Error> {
        ser.collect_str(self)
    }
}

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Day {
    /// Monday.
    Mon,
    /// Tuesday.
    Tue,
    /// Wednesday.
    Wed,
    /// Thursday.
    Thu,
    /// Friday.
    Fri,
    /// Saturday.
    Sat,
    /// Sunday.
    Sun,
}

impl Day {
    /// All days, Monday first.
    pub const ALL: [Day; 7] = [Day::Mon, Day::Tue, Day::Wed, Day::Thu, Day::Fri, Day::Sat, Day::Sun];

    fn of(weekday: Weekday) -> Day {
        Day::ALL[weekday.to_monday_zero_offset() as usize]
    }

    /// The day as policies write it: three letters in lower case.
    pub fn word(self) -> &'static str {
        ["mon", "tue", "wed", "thu", "fri", "sat", "sun"][self as usize]
    }
}

/// One window. `to` at or before `from` is on the next day; the days are those on which it begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Time of day at which the window begins.
    pub from: Minute,
    /// Time of day at which the window ends.
    pub to: Minute,
    /// Days on which the window begins; every day if the document names none.
    #[serde(default = "every_day")]
    pub days: Vec<Day>,
}

fn every_day() -> Vec<Day> {
    Day::ALL.to_vec()
}

/// `08:00-18:00`, on certain days `08:00-18:00/mon,fri`.
impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let how = || format!("'{text}' is no time of day: write it as 08:00-18:00, or 08:00-18:00/mon,fri");
        let (span, days) = text.split_once('/').map_or((text, None), |(span, days)| (span, Some(days)));
        let (from, to) = span.split_once('-').ok_or_else(how)?;
        let minute = |t: &str| Minute::parse(t).ok_or_else(how);
        let day = |word: &str| Day::ALL.into_iter().find(|d| d.word() == word).ok_or_else(how);
        let days = days.map(|days| days.split(',').map(day).collect()).transpose()?;
        Ok(Window { from: minute(from)?, to: minute(to)?, days: days.unwrap_or_else(every_day) })
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.from, self.to)?;
        if self.days == Day::ALL {
            return Ok(());
        }
        let days: Vec<&str> = self.days.iter().map(|d| d.word()).collect();
        write!(f, "/{}", days.join(","))
    }
}

impl Window {
    /// Whether the clock on the wall shows a time within it.
    pub fn holds(&self, t: Timestamp, zone: &TimeZone) -> bool {
        self.end_of(zone.to_datetime(t)).is_some()
    }

    fn over_midnight(&self) -> bool {
        self.to <= self.from
    }

    /// Where the window that holds this time on the wall ends, by the same clock; `None`: it holds no such time.
    fn end_of(&self, at: DateTime) -> Option<DateTime> {
        let minute = Minute(at.hour() as u16 * 60 + at.minute() as u16);
        let begins = |date: jiff::civil::Date| self.days.contains(&Day::of(date.weekday()));
        let today = at.date();
        let next = today.tomorrow().ok()?;
        match self.over_midnight() {
            false if begins(today) && self.from <= minute && minute < self.to => Some(wall(today, self.to)),
            true if begins(today) && minute >= self.from => Some(wall(next, self.to)),
            true if begins(today.yesterday().ok()?) && minute < self.to => Some(wall(today, self.to)),
            _ => None,
        }
    }

    /// The moment at which this window lets go of `t`; `None` if it does not hold it. Always later than `t`.
    fn release(&self, t: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let wall_end = self.end_of(zone.to_datetime(t))?;
        let ends = zone.to_ambiguous_timestamp(wall_end);
        let mut end = ends.compatible().ok()?;
        // The earlier of two ends may lie behind us already.
        if end <= t {
            end = zone.to_ambiguous_timestamp(wall_end).later().ok()?;
        }
        // A clock that is set may leave the window when it jumps, over its end or back before its begin.
        let jumps = zone.following(t).map(|jump| jump.timestamp()).take_while(|jump| *jump < end);
        let out = jumps.into_iter().find(|jump| self.end_of(zone.to_datetime(*jump)).is_none());
        let end = out.unwrap_or(end);
        // A clock set back inside the window shows the same hour again: what the end was, it is still ahead.
        Some(end.max(t + 1.second()))
    }
}

fn wall(date: jiff::civil::Date, at: Minute) -> DateTime {
    match at.0 {
        DAY => date.tomorrow().unwrap_or(date).to_datetime(Time::midnight()),
        minutes => date.at((minutes / 60) as i8, (minutes % 60) as i8, 0, 0),
    }
}

/// The first moment from `t` on that no window holds; `None`: there is none within nine days.
pub fn open_at(windows: &[Window], zone: &TimeZone, t: Timestamp) -> Option<Timestamp> {
    let mut at = t;
    let give_up = t + (9 * 24).hours();
    while at < give_up {
        match windows.iter().filter_map(|w| w.release(at, zone)).max() {
            Some(end) => at = end,
            None => return Some(at),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(name: &str) -> TimeZone {
        TimeZone::get(name).unwrap()
    }

    fn window(text: &str) -> Window {
        text.parse().unwrap()
    }

    /// Windows, zone, a moment, and the moment at which it is open.
    #[track_caller]
    fn opens(windows: &[&str], tz: &str, t: &str, expected: &str) {
        let windows: Vec<Window> = windows.iter().map(|w| window(w)).collect();
        let t: Timestamp = t.parse().unwrap();
        assert_eq!(open_at(&windows, &zone(tz), t).unwrap(), expected.parse::<Timestamp>().unwrap(), "{t}");
    }

    #[test]
    fn a_window_is_left_at_its_end() {
        let berlin = "Europe/Berlin";
        // 2026-11-25 is a Wednesday; Berlin is an hour ahead of UTC.
        opens(&["08:00-18:00"], berlin, "2026-11-25T07:00:00Z", "2026-11-25T17:00:00Z");
        opens(&["08:00-18:00"], berlin, "2026-11-25T17:00:00Z", "2026-11-25T17:00:00Z");
        opens(&["08:00-18:00"], berlin, "2026-11-25T06:59:59Z", "2026-11-25T06:59:59Z");
        opens(&["08:00-18:00/sat,sun"], berlin, "2026-11-25T10:00:00Z", "2026-11-25T10:00:00Z");
        opens(&["22:00-06:00/wed"], berlin, "2026-11-25T23:30:00Z", "2026-11-26T05:00:00Z");
        opens(&["22:00-06:00/wed"], berlin, "2026-11-26T23:30:00Z", "2026-11-26T23:30:00Z");
        opens(&["08:00-24:00", "00:00-03:00"], berlin, "2026-11-25T10:00:00Z", "2026-11-26T02:00:00Z");
        opens(&["08:00-12:00", "11:00-13:00"], berlin, "2026-11-25T10:30:00Z", "2026-11-25T12:00:00Z");
    }

    /// 2026-03-29: 02:00 becomes 03:00 in Berlin at 01:00 UTC. 2026-11-01: 02:00 becomes 01:00 in New York at 06:00
    /// UTC.
    #[test]
    fn clocks_that_are_set_do_not_lose_a_window() {
        opens(&["01:00-02:30"], "Europe/Berlin", "2026-03-29T00:30:00Z", "2026-03-29T01:00:00Z");
        opens(&["01:00-04:00"], "Europe/Berlin", "2026-03-29T00:30:00Z", "2026-03-29T02:00:00Z");
        // The first 01:15 and the second: both are in the window, 01:45 between them is not.
        opens(&["01:00-01:30"], "America/New_York", "2026-11-01T05:15:00Z", "2026-11-01T05:30:00Z");
        opens(&["01:00-01:30"], "America/New_York", "2026-11-01T05:45:00Z", "2026-11-01T05:45:00Z");
        opens(&["01:00-01:30"], "America/New_York", "2026-11-01T06:15:00Z", "2026-11-01T06:30:00Z");
        opens(&["00:30-02:30"], "America/New_York", "2026-11-01T05:15:00Z", "2026-11-01T07:30:00Z");
    }

    #[test]
    fn a_week_without_a_gap_is_found_out() {
        let all = [window("00:00-24:00")];
        assert_eq!(open_at(&all, &zone("UTC"), Timestamp::UNIX_EPOCH), None);
    }

    /// Whatever the windows are, what is called open is in none of them, and nothing earlier was (to the minute).
    #[test]
    fn open_means_open_through_every_clock_change() {
        let windows = [window("01:30-02:30"), window("23:00-00:45/sat,sun"), window("12:00-12:01/mon")];
        for tz in ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"] {
            let zone = zone(tz);
            let is_open = |t: Timestamp| windows.iter().all(|w| w.end_of(zone.to_datetime(t)).is_none());
            for day in ["2026-03-08", "2026-03-29", "2026-04-05", "2026-10-04", "2026-10-25", "2026-11-01"] {
                let start: Timestamp = format!("{day}T00:00:00Z").parse().unwrap();
                for minute in (0..36 * 60).step_by(7) {
                    let t = start - 12.hours() + jiff::Span::new().minutes(minute);
                    let open = open_at(&windows, &zone, t).unwrap();
                    assert!(open >= t && is_open(open), "{tz}: {t} gives {open}");
                    let minutes = open.duration_since(t).as_secs() / 60;
                    let early = (0..minutes).map(|m| t + jiff::Span::new().minutes(m)).find(|&x| is_open(x));
                    assert_eq!(early, None, "{tz}: {t} gives {open}, but it was open before");
                }
            }
        }
    }
}
