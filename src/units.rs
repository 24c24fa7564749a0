//! Times and sizes as an operator writes them, on the command line and in policies; and back.

use std::time::Duration;

/// `90s`, `15m`, `1h 30m`; a bare number would leave the unit to guessing.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let span: jiff::SignedDuration = text.parse().map_err(|_| "write it with its unit: 90s, 15m, 1h 30m".to_owned())?;
    Duration::try_from(span).map_err(|_| "it must not be negative".to_owned())
}

/// A number of bytes as an operator writes it: `512M`, `1G`, `1.5T`; units are powers of 1024.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let how = || "write it as a number with K, M, G or T behind it: 512M, 1.5G".to_owned();
    let number = text.trim_end_matches("iB").trim_end_matches(['B', 'b']);
    let (digits, shift) = match number.char_indices().next_back().map(|(at, c)| (at, c.to_ascii_uppercase())) {
        Some((at, 'K')) => (&number[..at], 10),
        Some((at, 'M')) => (&number[..at], 20),
        Some((at, 'G')) => (&number[..at], 30),
        Some((at, 'T')) => (&number[..at], 40),
        _ => (number, 0),
    };
    let value: f64 = digits.trim().parse().map_err(|_| how())?;
    let bytes = value * (1u64 << shift) as f64;
    // Beyond 2^53 a float no longer counts every byte, and nobody means that much.
    if !(0.0..9e15).contains(&bytes) { Err(how()) } else { Ok(bytes as u64) }
}

/// [`parse_duration`], and `7d` and `2w`: days of 24 hours.
pub fn parse_age(text: &str) -> Result<Duration, String> {
    const HOUR: u64 = 3600;
    let long = |unit: char, hours: u64| {
        let count: u64 = text.trim().strip_suffix(unit)?.trim_end().parse().ok()?;
        count.checked_mul(hours * HOUR).map(Duration::from_secs)
    };
    match long('d', 24).or_else(|| long('w', 7 * 24)) {
        Some(age) => Ok(age),
        None => parse_duration(text).map_err(|_| "write it with its unit: 12h, 7d, 2w".to_owned()),
    }
}

/// A duration of whole seconds as [`parse_age`] reads it: `45s`, `1h 30m`, `7d`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs();
    if s > 0 && s.is_multiple_of(86_400) {
        return format!("{}d", s / 86_400);
    }
    let parts = [(s / 3600, 'h'), (s / 60 % 60, 'm'), (s % 60, 's')];
    let words: Vec<String> = parts.iter().filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n}{unit}")).collect();
    if words.is_empty() { "0s".to_owned() } else { words.join(" ") }
}

/// A number of bytes as [`parse_bytes`] reads it, without loss: `512M`, `1G`, `1000`.
pub fn exact_bytes(n: u64) -> String {
    let units = [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')];
    match units.iter().find(|(shift, _)| n > 0 && n.is_multiple_of(1 << shift)) {
        Some((shift, unit)) => format!("{}{unit}", n >> shift),
        None => n.to_string(),
    }
}

/// A value in a document as an operator types it: `#[serde(with = "units::as_text")]`.
pub mod as_text {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::fmt::Display;
    use std::str::FromStr;

    /// Writes it by its `Display`.
    pub fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    /// Reads it by its `FromStr`, whose words are the error.
    pub fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(|why| serde::de::Error::custom(format!("'{text}': {why}")))
    }
}

/// A list of such values.
pub mod as_texts {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::fmt::Display;
    use std::str::FromStr;

    /// Writes each by its `Display`.
    pub fn serialize<T: Display, S: Serializer>(values: &[T], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(T::to_string))
    }

    /// Reads each by its `FromStr`; the first that fails decides.
    pub fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        let parsed = |text: &String| text.parse().map_err(|why| serde::de::Error::custom(format!("'{text}': {why}")));
        texts.iter().map(parsed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for s in [0, 1, 59, 60, 61, 3600, 5400, 86_399, 86_400, 90_000, 7 * 86_400] {
            let d = Duration::from_secs(s);
            assert_eq!(parse_age(&duration(d)), Ok(d), "{}", duration(d));
        }
        for n in [0, 1, 1000, 1024, 1 << 20, 3 << 29, 1 << 40] {
            assert_eq!(parse_bytes(&exact_bytes(n)), Ok(n), "{}", exact_bytes(n));
        }
    }

    #[test]
    fn ages_may_be_days() {
        let hours = |text| parse_age(text).map(|age| age.as_secs() / 3600);
        assert_eq!([hours("7d"), hours("2w"), hours("12h"), hours("0s")], [Ok(168), Ok(336), Ok(12), Ok(0)]);
        for bad in ["", "7", "d", "-1d", "1.5d", "99999999999999999d"] {
            assert!(hours(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("1h 30m"), Ok(Duration::from_secs(5400)));
        for bad in ["90", "", "-5s", "1 fortnight"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }
}
