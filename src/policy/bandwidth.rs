//! How much of a link a run may take, also by time of day. Pure: the time and its zone are arguments.

use super::window::{Minute, Window};
use super::{Days, bytes};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::str::FromStr;

/// Slowest rate, in bytes per second: below it a run of any size outlives every RPO.
const RATE_MIN: u64 = 4 << 10;

/// Rates of the day. With none a run sends as fast as it can.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Bytes per second outside of all `times`.
    pub rate_bytes: Option<u64>,
    /// The first that holds a moment counts.
    pub times: Vec<TimedRate>,
}

/// A rate for certain hours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimedRate {
    /// Hours and days in which the rate applies.
    pub window: Window,
    /// Most bytes per second in that window.
    pub rate_bytes: u64,
}

impl Bandwidth {
    /// Bytes per second at this moment; `None`: as fast as it goes.
    pub fn rate_at(&self, t: Timestamp, zone: &TimeZone) -> Option<u64> {
        let timed = self.times.iter().find(|timed| timed.window.holds(t, zone));
        timed.map(|timed| timed.rate_bytes).or(self.rate_bytes)
    }

    /// The rules of a command line, which say the same. A rate of all times may be there once.
    pub fn of_rules(rules: &[RateRule]) -> Result<Bandwidth, String> {
        let mut bandwidth = Bandwidth::default();
        for rule in rules {
            match (&rule.window, bandwidth.rate_bytes) {
                (Some(window), _) => {
                    bandwidth.times.push(TimedRate { window: window.clone(), rate_bytes: rule.rate_bytes });
                }
                (None, None) => bandwidth.rate_bytes = Some(rule.rate_bytes),
                (None, Some(_)) => return Err("two rates without a time of day: which of them is meant?".to_owned()),
            }
        }
        Ok(bandwidth)
    }

    /// As rules of a command line.
    pub fn rules(&self) -> Vec<RateRule> {
        let always = self.rate_bytes.map(|rate_bytes| RateRule { window: None, rate_bytes });
        let times = self.times.iter().map(|t| RateRule { window: Some(t.window.clone()), rate_bytes: t.rate_bytes });
        always.into_iter().chain(times).collect()
    }
}

/// One rate as an operator types it: `50M`, or `10M@08:00-18:00`, or `10M@08:00-18:00/mon,fri`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RateRule {
    /// Hours and days in which the rate applies. `None`: at all times without a window of their own.
    pub window: Option<Window>,
    /// Most bytes per second.
    pub rate_bytes: u64,
}

impl FromStr for RateRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rate, window) = match text.split_once('@') {
            Some((rate, window)) => (rate, Some(window.parse()?)),
            None => (text, None),
        };
        Ok(RateRule { window, rate_bytes: parse_rate(rate)? })
    }
}

impl fmt::Display for RateRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::units::exact_bytes(self.rate_bytes))?;
        self.window.as_ref().map_or(Ok(()), |w| write!(f, "@{w}"))
    }
}

/// Bytes per second; `50M` and `50M/s` are one.
fn parse_rate(text: &str) -> Result<u64, String> {
    let rate = crate::units::parse_bytes(text.trim_end_matches("/s"))?;
    check_rate(rate)
}

fn check_rate(rate: u64) -> Result<u64, String> {
    match rate {
        0 => Err("nothing can be sent at a rate of 0: leave it out, or write a blackout".to_owned()),
        1..RATE_MIN => Err("it is counted in bytes per second, and is at least 4K".to_owned()),
        rate => Ok(rate),
    }
}

#[derive(Deserialize)]
struct Rate(#[serde(deserialize_with = "rate")] u64);

fn rate<'de, D: Deserializer<'de>>(de: D) -> Result<u64, D::Error> {
    check_rate(bytes(de)?).map_err(serde::de::Error::custom)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct BandwidthFile {
    rate: Option<Rate>,
    times: Vec<TimedRateFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TimedRateFile {
    from: Minute,
    to: Minute,
    #[serde(default)]
    days: Days,
    #[serde(deserialize_with = "rate")]
    rate: u64,
}

impl<'de> Deserialize<'de> for Bandwidth {
    fn deserialize<D: Deserializer<'de>>(de: D) -> Result<Self, D::Error> {
        let file = BandwidthFile::deserialize(de)?;
        let timed = |t: TimedRateFile| TimedRate {
            window: Window { from: t.from, to: t.to, days: t.days.0 },
            rate_bytes: t.rate,
        };
        Ok(Bandwidth { rate_bytes: file.rate.map(|r| r.0), times: file.times.into_iter().map(timed).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rules: &[&str]) -> Result<Bandwidth, String> {
        let rules: Vec<RateRule> = rules.iter().map(|r| r.parse()).collect::<Result<_, _>>()?;
        Bandwidth::of_rules(&rules)
    }

    #[test]
    fn the_first_time_that_holds_the_moment_counts() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let b = of(&["10M@08:00-18:00/mon,tue,wed", "50M", "20M@07:00-09:00"]).unwrap();
        // 2026-11-25 is a Wednesday; Berlin is an hour ahead of UTC.
        for (t, mib) in [("06:30", 20), ("07:30", 10), ("16:59", 10), ("17:00", 50), ("23:00", 50)] {
            let t: Timestamp = format!("2026-11-25T{t}:00Z").parse().unwrap();
            assert_eq!(b.rate_at(t, &zone), Some(mib << 20), "{t}");
        }
        let sunday: Timestamp = "2026-11-29T10:00:00Z".parse().unwrap();
        assert_eq!(b.rate_at(sunday, &zone), Some(50 << 20));
        let night_only = of(&["10M@22:00-06:00"]).unwrap();
        assert_eq!(night_only.rate_at(sunday, &zone), None);
    }

    #[test]
    fn rules_are_typed_and_written_alike() {
        for text in ["50M", "10M@08:00-18:00", "4K@22:00-06:00/sat,sun"] {
            assert_eq!(of(&[text]).unwrap().rules()[0].to_string(), text);
        }
        assert_eq!(of(&["50M/s"]).unwrap(), of(&["50MiB"]).unwrap());
        for wrong in ["", "fast", "0", "100", "5M@", "5M@8-18", "5M@08:00-18:00/monday", "5M@08:00-18:00/"] {
            assert!(of(&[wrong]).is_err(), "{wrong}");
        }
        assert!(of(&["1M", "2M"]).is_err());
    }
}
