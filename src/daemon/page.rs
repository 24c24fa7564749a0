//! How everything stands, as a page for people: problems first, every domain with its lag against its RPO, its last
//! runs as a chart. Pure: a status in, HTML out. Nothing on it comes from elsewhere, nothing on it acts, and it needs
//! no script.

use super::pair::{Brief, RunResult};
use super::status::{Row, Status};
use crate::error::printable;
use crate::replica::lag;
use crate::units;
use std::fmt::Write;
use std::time::Duration;

/// Seconds after which a browser asks again.
const REFRESH_S: u32 = 10;

/// Bars of the chart, and its size.
const BAR_W: usize = 6;
const CHART_H: f64 = 26.0;

const STYLE: &str = "\
:root{color-scheme:light dark;--ok:#2a7d46;--bad:#b3261e;--warn:#9a6700;--dim:#6b7280;--line:#8884}\
body{font:14px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:76rem;padding:0 1rem}\
h1{font-size:1.25rem;margin:0}header p{color:var(--dim);margin:.2rem 0 1rem}\
ul.problems{list-style:none;margin:0 0 1.2rem;padding:0}\
ul.problems li{border-left:4px solid var(--bad);background:#b3261e14;padding:.35rem .7rem;margin:.3rem 0}\
p.fine{border-left:4px solid var(--ok);background:#2a7d4614;padding:.35rem .7rem}\
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.4rem .6rem;border-bottom:1px solid var(--line);vertical-align:middle}\
th{font-weight:600;color:var(--dim);font-size:.85rem}td.target{overflow-wrap:anywhere}small{color:var(--dim)}\
.bar{width:9rem;height:.5rem;background:var(--line);border-radius:.25rem;overflow:hidden;margin-bottom:.15rem}\
.bar i{display:block;height:100%;background:var(--ok)}.late .bar i{background:var(--bad)}.near .bar i{background:var(--warn)}\
.t{white-space:nowrap}.bad{color:var(--bad);font-weight:600}.ok{color:var(--ok)}svg{display:block}\
svg .sealed{fill:var(--ok)}svg .commit_pending{fill:var(--warn)}svg .failed{fill:var(--bad)}";

/// The page.
pub fn render(status: &Status) -> String {
    let mut html = String::new();
    let state = match (status.stopping, status.paused) {
        (true, _) => ", stopping",
        (_, true) => ", paused",
        _ => "",
    };
    let up = units::duration(Duration::from_secs(status.up_s));
    // Writing to a string does not fail.
    let _ = write!(
        html,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"{REFRESH_S}\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{}virt-replica</title><style>{STYLE}</style></head><body>\
         <header><h1>virt-replica</h1><p>version {}, up {up}{state}; {} policies, {} replications, {} under way</p></header>",
        if problems(status).is_empty() { "" } else { "(!) " },
        escaped(status.version),
        status.policies,
        status.domains.len(),
        status.runs,
    );
    list_of_problems(&mut html, status);
    html.push_str(
        "<table><thead><tr><th>Domain</th><th>Target</th><th>Lag against RPO</th><th>Last runs</th><th>Newest run</th>\
         <th>Next</th></tr></thead><tbody>",
    );
    let mut rows: Vec<&Row> = status.domains.iter().collect();
    // Those that need somebody first; within that, least slack first.
    rows.sort_by_key(|r| (!needs_somebody(r), r.slack_s.unwrap_or(i64::MAX)));
    rows.into_iter().for_each(|row| line(&mut html, row));
    html.push_str("</tbody></table></body></html>\n");
    html
}

fn needs_somebody(row: &Row) -> bool {
    row.breach_since.is_some()
        || row.failures > 0
        || !row.unprotected.is_empty()
        || row.clock_ahead_s.is_some()
        || row.checks.values().any(|s| s.error.is_some())
        || row.last_run.as_ref().is_some_and(|l| l.end.result != RunResult::Sealed || !l.end.alarms.is_empty())
        || row.last_run.as_ref().is_some_and(|l| l.end.guest_stopped.is_some())
}

/// What somebody should look at, as sentences.
fn problems(status: &Status) -> Vec<String> {
    let mut all = Vec::new();
    all.extend(status.libvirt_error.iter().map(|e| format!("libvirt does not answer, no run begins: {e}")));
    all.extend(
        status.config_error.iter().map(|e| format!("the configuration cannot be read, the old one is in force: {e}")),
    );
    for row in &status.domains {
        let whom = format!("{} to {}", row.domain, row.target);
        if let Some(since) = row.breach_since {
            all.push(format!("{whom}: its RPO is broken since {}", time(since)));
        }
        all.extend(row.clock_ahead_s.map(|s| format!("{whom}: {}", lag::told(s))));
        all.extend(row.unprotected.iter().map(|s| format!("{whom}: {}", s.told())));
        for (check, state) in &row.checks {
            all.extend(state.error.iter().map(|e| format!("{whom}: {}: {e}", check.word())));
        }
        let Some(last) = &row.last_run else { continue };
        if row.failures > 0 {
            let why = last.end.error.as_deref().unwrap_or("the run said nothing");
            let times = if row.failures == 1 { "failed".to_owned() } else { format!("failed {} times", row.failures) };
            all.push(format!("{whom}: {times}: {why}"));
        }
        if last.end.result == RunResult::CommitPending {
            all.push(format!("{whom}: a disk is still on an overlay; the next run ends that"));
        }
        let alarms = last.end.alarms.iter().chain(last.end.guest_stopped.iter().map(|g| &g.why));
        all.extend(alarms.map(|a| format!("{whom}: {a}")));
    }
    all
}

fn list_of_problems(html: &mut String, status: &Status) {
    let problems = problems(status);
    if problems.is_empty() {
        html.push_str("<p class=\"fine\">Nothing needs anybody.</p>");
        return;
    }
    html.push_str("<ul class=\"problems\">");
    for problem in problems {
        let _ = write!(html, "<li>{}</li>", escaped(&problem));
    }
    html.push_str("</ul>");
}

fn line(html: &mut String, row: &Row) {
    let policy = row.policy.as_deref().unwrap_or("no policy any more");
    let _ = write!(
        html,
        "<tr><td>{}<br><small>{}</small></td><td class=\"target\">{}</td>",
        escaped(row.domain.as_str()),
        escaped(policy),
        escaped(&row.target)
    );
    lag(html, row);
    chart(html, &row.recent);
    newest(html, row);
    let next = match (&row.running, row.paused, row.next_at) {
        _ if row.lives_on.is_some() => "demoted".to_owned(),
        _ if row.promoted_since.is_some() => "promoted here".to_owned(),
        (Some(run), _, _) => format!("step {} of 8, {}", run.step, run.state),
        (None, true, _) => "paused".to_owned(),
        (None, false, Some(at)) => time(at),
        (None, false, None) => "never".to_owned(),
    };
    let _ = write!(html, "<td class=\"t\"><small>{}</small></td></tr>", escaped(&next));
}

/// The lag as a bar whose whole length is the RPO.
fn lag(html: &mut String, row: &Row) {
    if let Some(to) = &row.lives_on {
        let _ = write!(html, "<td><small>lives on {}</small></td>", escaped(to));
        return;
    }
    if let Some(since) = row.promoted_since {
        let _ = write!(html, "<td><small>lives here since {}</small></td>", escaped(&time(since)));
        return;
    }
    let Some(lag_s) = row.lag_s.map(|s| s.max(0) as u64) else {
        html.push_str("<td><small>no point yet</small></td>");
        return;
    };
    let lag = units::duration(Duration::from_secs(lag_s));
    let Some(rpo_s) = row.rpo_s.filter(|r| *r > 0) else {
        let _ = write!(html, "<td>{lag} <small>no RPO</small></td>");
        return;
    };
    let percent = lag_s.saturating_mul(100) / rpo_s;
    let class = match percent {
        0..80 => "",
        80..=100 => "near",
        _ => "late",
    };
    let rpo = units::duration(Duration::from_secs(rpo_s));
    let _ = write!(
        html,
        "<td class=\"{class}\"><div class=\"bar\"><i style=\"width:{}%\"></i></div>{lag} <small>of {rpo}</small></td>",
        percent.min(100)
    );
}

/// One bar a run, oldest first; its height is the time it took, by the longest of them.
fn chart(html: &mut String, recent: &[Brief]) {
    let longest = recent.iter().map(|b| b.seconds).max().unwrap_or(0).max(1) as f64;
    let _ = write!(html, "<td><svg width=\"{}\" height=\"{CHART_H}\" role=\"img\">", recent.len() * BAR_W);
    for (at, run) in recent.iter().enumerate() {
        let height = (CHART_H * run.seconds as f64 / longest).max(3.0);
        let word = run.result.word();
        let _ = write!(
            html,
            "<rect class=\"{word}\" x=\"{}\" y=\"{:.1}\" width=\"{}\" height=\"{height:.1}\"><title>{}: {word}, {}</title></rect>",
            at * BAR_W,
            CHART_H - height,
            BAR_W - 1,
            time(run.started_at),
            units::duration(Duration::from_secs(run.seconds))
        );
    }
    html.push_str("</svg></td>");
}

fn newest(html: &mut String, row: &Row) {
    let Some(last) = &row.last_run else {
        html.push_str("<td><small>none yet</small></td>");
        return;
    };
    let (class, word) = match last.end.result {
        RunResult::Sealed => ("ok", "sealed"),
        RunResult::CommitPending => ("bad", "commit pending"),
        RunResult::Failed => ("bad", "failed"),
    };
    let point = last.end.point.as_deref().unwrap_or("no point");
    let _ = write!(
        html,
        "<td class=\"t\"><span class=\"{class}\">{word}</span><br><small>{}<br>{}</small></td>",
        time(last.started_at),
        escaped(point)
    );
}

/// In UTC, as every time this program shows of more than one host.
fn time(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// Text that may come from anywhere: a target's words, a domain's name.
fn escaped(text: &str) -> String {
    let text = printable(text, 400);
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::pair::{End, Key, Pair};
    use crate::error::Kind;
    use crate::name::{DomainName, DomainUuid};
    use jiff::Timestamp;

    fn at(s: i64) -> Timestamp {
        Timestamp::from_second(s).unwrap()
    }

    /// `"web01 30/60"`: its lag and its RPO in seconds; `"db - "` has no point, `"x 5"` no RPO; a `!` behind it: its
    /// last run failed.
    fn row(text: &str) -> Row {
        let words: Vec<&str> = text.trim_end_matches('!').split(' ').collect();
        let (lag, rpo) = words[1].split_once('/').map_or((words[1], None), |(l, r)| (l, r.parse::<u64>().ok()));
        let lag_s: Option<i64> = lag.parse().ok();
        let uuid = DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap();
        let key = Key { uuid: uuid.clone(), url: "ssh://dr1".into() };
        let mut pair = Pair::new(key, DomainName::new(words[0]).unwrap(), at(0));
        let failed = text.ends_with('!');
        if failed {
            pair.ended(at(10), at(12), End::failed(Some(Kind::Unavailable), "dr1 <is> \"away\" & silent"));
            pair.failures = 3;
        }
        let slack_s = rpo.zip(lag_s).map(|(r, l)| r as i64 - l);
        Row {
            domain: pair.domain.clone(),
            uuid,
            target: "ssh://dr1".into(),
            policy: Some("gold".into()),
            paused: false,
            lives_on: None,
            promoted_since: None,
            frozen_at: None,
            lag_s,
            rpo_s: rpo,
            slack_s,
            breach_since: slack_s.filter(|s| *s < 0).map(|_| at(7)),
            next_at: Some(at(600)),
            running: None,
            failures: pair.failures,
            last_run: pair.last.clone(),
            last_seen: None,
            recent: pair.recent.clone(),
            totals: pair.totals,
            checks: pair.checks.clone(),
            unprotected: Vec::new(),
            clock_ahead_s: None,
        }
    }

    fn page(rows: &[&str]) -> String {
        render(&status(rows))
    }

    fn status(rows: &[&str]) -> Status {
        Status {
            version: "0.1.0",
            up_s: 3600,
            stopping: false,
            paused: false,
            policies: 1,
            runs: 0,
            libvirt_error: None,
            config_error: None,
            domains: rows.iter().map(|r| row(r)).collect(),
        }
    }

    #[test]
    fn problems_come_first_and_least_slack_before_more() {
        let html = page(&["calm 5/100", "close 90/100", "late 130/100", "sad 1/100!"]);
        let place = |word: &str| html.find(&format!("<td>{word}<br>")).unwrap_or_else(|| panic!("no {word}: {html}"));
        assert!(place("late") < place("sad") && place("sad") < place("close") && place("close") < place("calm"));
        assert!(html.contains("<li>late to ssh://dr1: its RPO is broken since 1970-01-01 00:00:07 UTC</li>"), "{html}");
        assert!(html.contains("failed 3 times") && html.contains("<title>(!) "), "{html}");
        let calm = page(&["calm 5/100", "new -/100", "free 5"]);
        assert!(calm.contains("Nothing needs anybody.") && !calm.contains("(!)"), "{calm}");
        assert!(calm.contains("no point yet") && calm.contains("no RPO"), "{calm}");
    }

    #[test]
    fn a_disk_that_nobody_protects_and_a_clock_that_is_wrong_are_problems() {
        let mut sad = row("partly 1/100");
        let skipped = r#"{"name":"vdb","reason":"is encrypted by QEMU (luks)","cause":"unprotected"}"#;
        sad.unprotected = vec![serde_json::from_str(skipped).unwrap()];
        assert!(needs_somebody(&sad));
        let mut ahead = row("ahead 1/100");
        ahead.clock_ahead_s = Some(75);
        assert!(needs_somebody(&ahead));
        let status = Status { domains: vec![sad, ahead], ..status(&[]) };
        let told = problems(&status).join("\n");
        assert!(told.contains("partly to ssh://dr1: disk 'vdb' is NOT PROTECTED") && told.contains("75 s"), "{told}");
    }

    #[test]
    fn the_bar_is_the_rpo_and_its_colour_says_how_near_the_end_is() {
        for (text, class, width) in [("a 79/100", "", 79), ("a 80/100", "near", 80), ("a 101/100", "late", 100)] {
            let html = page(&[text]);
            let bar = format!("<td class=\"{class}\"><div class=\"bar\"><i style=\"width:{width}%\">");
            assert!(html.contains(&bar), "{text}: {html}");
        }
    }

    /// An error is in the words of a target, and a target is a stranger.
    #[test]
    fn nothing_that_is_shown_is_markup_and_nothing_comes_from_elsewhere() {
        let html = page(&["sad 1/100!"]);
        assert!(html.contains("dr1 &lt;is&gt; &quot;away&quot; &amp; silent"), "{html}");
        for word in ["http://", "https://", "<script", "<link", "<img", "url("] {
            assert!(!html.contains(word), "{word}");
        }
        assert_eq!(html.matches('<').count(), html.matches('>').count());
    }

    #[test]
    fn the_chart_has_a_bar_a_run_by_its_length() {
        let brief = |seconds, result| Brief { started_at: at(0), seconds, result };
        let runs = [brief(10, RunResult::Sealed), brief(20, RunResult::Failed), brief(0, RunResult::CommitPending)];
        let mut html = String::new();
        chart(&mut html, &runs);
        assert_eq!(html.matches("<rect").count(), 3);
        assert!(html.contains("class=\"failed\" x=\"6\" y=\"0.0\" width=\"5\" height=\"26.0\""), "{html}");
        assert!(html.contains("class=\"sealed\" x=\"0\" y=\"13.0\""), "{html}");
        let mut none = String::new();
        chart(&mut none, &[]);
        assert!(!none.contains("<rect"), "{none}");
    }
}
