//! Numbers, times and tables as people read them. Pure, except for the time zone of this machine.

use comfy_table::{CellAlignment, Table};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::time::Duration;
use virt_replica::engine::stats::CompressionStats;
use virt_replica::replica::Consistency;
use virt_replica::replica::upkeep::{Damage, DamageKind};

pub use virt_replica::units::{parse_age, parse_bytes, parse_duration};

/// Bytes in binary units with one decimal: `0 B`, `512 B`, `1.5 KiB`, `20.0 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64;
    let mut unit = "B";
    for next in UNITS {
        // Where rounding would print 1024.0, the next unit is meant.
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// Bytes per second; nothing sensible can be said of no bytes, or of a time too short to measure.
pub fn rate(n: u64, time: Duration) -> String {
    if n == 0 || time < Duration::from_millis(1) {
        return "-".to_owned();
    }
    format!("{}/s", bytes((n as f64 / time.as_secs_f64()) as u64))
}

/// Which way content was sent and why, where both ways were tried: nobody has to be told of what is always done.
pub fn compression(stats: &CompressionStats) -> Option<String> {
    (stats.trials > 0).then(|| stats.reason.clone())
}

/// Milliseconds as a person wants them: `0.4 ms`, `41 ms`, `3.2 s`, `2 min 5 s`.
pub fn millis(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        ms if ms < 59_950.0 => format!("{:.1} s", ms / 1e3),
        ms => age((ms / 1e3).round() as i64),
    }
}

/// A span of time in its two largest units: `45 s`, `2 min 5 s`, `3 h 20 min`, `9 d 4 h`.
pub fn age(seconds: i64) -> String {
    if seconds < 0 {
        return format!("-{}", age(seconds.saturating_neg()));
    }
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, m) => format!("{m} min {} s", seconds % 60),
        (0, h, m) => format!("{h} h {m} min"),
        (d, h, _) => format!("{d} d {h} h"),
    }
}

/// [`age`] for a column: `45s`, `2m 5s`, `3h 20m`, `9d 4h`.
pub fn short_age(seconds: i64) -> String {
    age(seconds).replace(" min", "m").replace(" s", "s").replace(" h", "h").replace(" d", "d")
}

/// A moment in this machine's time zone, with the zone.
pub fn time(t: Timestamp) -> String {
    time_in(t, TimeZone::system())
}

/// A moment to the minute, in this machine's time zone; [`zone_now`] names it once for a whole column.
pub fn minute(t: Timestamp) -> String {
    t.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M").to_string()
}

/// Where damage lies, and who reads it: `vda of 000001-5f0c61aa, bytes 65536 to 131072; read by 000002-9b1de0f3`.
pub fn damage(d: &Damage) -> String {
    let disk = d.disk.as_ref().map_or("", |disk| disk.as_str());
    let what = match (d.what, d.attachment) {
        (DamageKind::Content, _) => format!("{disk} of {}, bytes {} to {}", d.point, d.start, d.end),
        (DamageKind::Image, _) => format!("the image of {disk} of {}", d.point),
        (DamageKind::Changes, _) => format!("the change list of {disk} of {}", d.point),
        (DamageKind::Attachment, name) => {
            format!("{} of {}", name.map_or("an attachment", |name| name.file_name()), d.point)
        }
    };
    match d.dependants.as_slice() {
        [] => format!("{what}; no later point reads it"),
        [one] => format!("{what}; also read by {one}"),
        [first, .., last] => format!("{what}; also read by {} later points, {first} to {last}", d.dependants.len()),
    }
}

/// This machine's time zone by its present abbreviation.
pub fn zone_now() -> String {
    jiff::Zoned::now().strftime("%Z").to_string()
}

fn time_in(t: Timestamp, zone: TimeZone) -> String {
    t.to_zoned(zone).strftime("%Y-%m-%d %H:%M:%S %Z").to_string()
}

/// What a point promises, in a word or two.
pub fn consistency(c: Consistency) -> &'static str {
    match c {
        Consistency::Crash => "crash",
        Consistency::FileSystem => "file systems held",
        Consistency::Off => "shut off",
    }
}

/// Where prose is broken: right for the narrowest terminal, readable on all others.
const PROSE_WIDTH: usize = 80;

/// Prose after a label, broken between words and indented below the text. A word that is too long (a path) stands
/// whole.
pub fn wrap(label: &str, text: &str) -> String {
    let indent = label.chars().count();
    let mut out = label.to_owned();
    let mut column = indent;
    for word in text.split_whitespace() {
        let width = word.chars().count();
        if column > indent && column + 1 + width > PROSE_WIDTH {
            out.push('\n');
            out.push_str(&" ".repeat(indent));
            column = indent;
        }
        if column > indent {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += width;
    }
    out
}

/// A table in virsh's manner: a header, a rule, rows; columns named in `right` are numbers.
pub fn table(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(header.to_vec());
    table.add_rows(rows);
    for &column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut lines: Vec<String> = table.lines().map(|l| l.trim_end().to_owned()).collect();
    let width = lines.iter().map(|l| l.chars().count()).max().unwrap_or(0) + 1;
    lines.insert(1, "-".repeat(width));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_one_decimal_and_never_1024_of_a_unit() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (20 << 30, "20.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn times_are_short_at_every_size() {
        for (ms, text) in [
            (0.0, "0.0 ms"),
            (9.94, "9.9 ms"),
            (41.4, "41 ms"),
            (999.4, "999 ms"),
            (999.6, "1.0 s"),
            (59_940.0, "59.9 s"),
            (125_000.0, "2 min 5 s"),
        ] {
            assert_eq!(millis(ms), text);
        }
        for (s, text) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min 0 s"),
            (12_000, "3 h 20 min"),
            (86_400 * 9 + 3600 * 4, "9 d 4 h"),
            (-61, "-1 min 1 s"),
        ] {
            assert_eq!(age(s), text);
            assert!(short_age(s).len() < text.len(), "{}", short_age(s));
        }
    }

    #[test]
    fn ages_in_a_column_are_shorter() {
        for (s, text) in
            [(45, "45s"), (125, "2m 5s"), (12_000, "3h 20m"), (86_400 * 9 + 3600 * 4, "9d 4h"), (-5, "-5s")]
        {
            assert_eq!(short_age(s), text);
        }
    }

    #[test]
    fn a_moment_names_its_zone() {
        let t: Timestamp = "2026-11-22T16:51:02.5Z".parse().unwrap();
        let zone = TimeZone::fixed(jiff::tz::offset(1));
        assert_eq!(time_in(t, TimeZone::UTC), "2026-11-22 16:51:02 UTC");
        assert_eq!(time_in(t, zone), "2026-11-22 17:51:02 +01");
    }

    #[test]
    fn rates_of_no_time_are_not_infinite() {
        assert_eq!(rate(1 << 20, Duration::ZERO), "-");
        assert_eq!(rate(0, Duration::from_secs(1)), "-");
        assert_eq!(rate(1 << 20, Duration::from_millis(500)), "2.0 MiB/s");
    }

    #[test]
    fn prose_is_broken_between_words_and_paths_are_not() {
        assert_eq!(wrap(" vda: ", "short  enough"), " vda: short enough");
        let text = format!("{} end", "word ".repeat(20));
        let lines: Vec<String> = wrap("  - ", &text).lines().map(str::to_owned).collect();
        assert!(lines.len() == 2 && lines.iter().all(|l| l.chars().count() <= PROSE_WIDTH), "{lines:#?}");
        assert!(lines[1].starts_with("    word"), "{lines:#?}");
        let path = format!("/{}", "d".repeat(90));
        assert_eq!(wrap("- ", &format!("at {path} now")), format!("- at\n  {path}\n  now"));
    }

    #[test]
    fn tables_look_like_virsh() {
        let rows = vec![vec!["vda".into(), "1.0 MiB".into()], vec!["vdbcde".into(), "20 B".into()]];
        let expected = " Disk       Sent\n-----------------\n vda     1.0 MiB\n vdbcde     20 B";
        assert_eq!(table(&["Disk", "Sent"], &[1], rows), expected);
    }
}
