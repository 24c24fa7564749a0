//! How everything stands, as Prometheus reads it (text format 0.0.4). Pure: a status in, text out.
//!
//! Base units, `_total` for what only grows. Counters are kept over restarts, so they do not fall.

use super::pair::RunResult;
use super::status::{Row, Status};
use std::fmt::Write;

#[derive(Clone, Copy)]
enum Type {
    Gauge,
    Counter,
}

struct Page(String);

/// A label's value, with what the format wants escaped.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

impl Page {
    /// A family: what it is, and its samples (labels, value). A family without samples is left out.
    fn family<'a>(
        &mut self,
        name: &str,
        kind: Type,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'static str, &'a str)>, f64)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        let kind = match kind {
            Type::Gauge => "gauge",
            Type::Counter => "counter",
        };
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP virt_replica_{name} {help}\n# TYPE virt_replica_{name} {kind}");
        for (labels, value) in samples {
            let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escaped(v))).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ = writeln!(self.0, "virt_replica_{name}{labels} {value}");
        }
    }

    /// A family with one sample of each domain and target that has a value.
    fn each(&mut self, name: &str, kind: Type, help: &str, rows: &[Row], value: impl Fn(&Row) -> Option<f64>) {
        self.family(name, kind, help, rows.iter().filter_map(|r| Some((labels(r), value(r)?))));
    }
}

fn labels(row: &Row) -> Vec<(&'static str, &str)> {
    vec![("domain", row.domain.as_str()), ("target", row.target.as_str())]
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// The page.
pub fn render(status: &Status) -> String {
    use Type::{Counter, Gauge};
    let mut page = Page(String::new());
    let rows = &status.domains;
    page.family("build_info", Gauge, "The program; always 1.", [(vec![("version", status.version)], 1.0)]);
    let own = |v: f64| [(Vec::new(), v)];
    page.family("up_seconds", Gauge, "Time since the daemon began.", own(status.up_s as f64));
    page.family("policies", Gauge, "Policies in force.", own(status.policies as f64));
    page.family("runs_active", Gauge, "Runs under way.", own(status.runs as f64));
    page.family("libvirt_up", Gauge, "Whether libvirt answers.", own(flag(status.libvirt_error.is_none())));
    let config_ok = flag(status.config_error.is_none());
    page.family(
        "config_ok",
        Gauge,
        "Whether the newest configuration could be read; 0: an older one is in force.",
        own(config_ok),
    );
    page.each(
        "replication_lag_seconds",
        Gauge,
        "Age of the head, from when the source's disks stood still.",
        rows,
        |r| Some(r.lag_s? as f64),
    );
    page.each("rpo_target_seconds", Gauge, "Allowed age of the head.", rows, |r| Some(r.rpo_s? as f64));
    page.each("rpo_breached", Gauge, "Whether the RPO is broken.", rows, |r| {
        r.rpo_s.map(|_| flag(r.breach_since.is_some()))
    });
    page.each("rpo_breaches_total", Counter, "How often the RPO was broken.", rows, |r| Some(r.totals.breaches as f64));
    page.each(
        "unprotected_disks",
        Gauge,
        "Disks that the newest run could not replicate and nobody excluded.",
        rows,
        |r| Some(r.unprotected.len() as f64),
    );
    page.each(
        "clock_ahead_seconds",
        Gauge,
        "How far a clock was ahead, at least, when the newest point was made.",
        rows,
        |r| r.frozen_at.map(|_| r.clock_ahead_s.unwrap_or(0) as f64),
    );
    page.each("demoted", Gauge, "Whether it was handed over, and lives elsewhere.", rows, |r| {
        Some(flag(r.lives_on.is_some()))
    });
    page.each("promoted", Gauge, "Whether its domain was brought up on this host, and lives here.", rows, |r| {
        Some(flag(r.promoted_since.is_some()))
    });
    page.each("paused", Gauge, "Whether a person holds runs back.", rows, |r| Some(flag(r.paused)));
    page.each("consecutive_failures", Gauge, "Runs that failed since the last that did not.", rows, |r| {
        Some(f64::from(r.failures))
    });
    let time = |t: jiff::Timestamp| t.as_millisecond() as f64 / 1e3;
    page.each("last_success_timestamp_seconds", Gauge, "When the disks of the head stood still.", rows, |r| {
        r.frozen_at.map(time)
    });
    page.each("last_attempt_timestamp_seconds", Gauge, "When the newest run began.", rows, |r| {
        Some(time(r.last_run.as_ref()?.started_at))
    });
    runs(&mut page, rows);
    checks(&mut page, rows);
    target(&mut page, rows);
    page.0
}

fn runs(page: &mut Page, rows: &[Row]) {
    use Type::{Counter, Gauge};
    let by_result = rows.iter().flat_map(|r| {
        RunResult::ALL.into_iter().map(move |result| {
            let mut labels = labels(r);
            labels.push(("result", result.word()));
            (labels, r.totals.runs(result) as f64)
        })
    });
    page.family("runs_total", Counter, "Runs that ended, by what became of them.", by_result);
    page.each("run_seconds_total", Counter, "Time that runs took.", rows, |r| Some(r.totals.run_seconds));
    const STEPS: [&str; 8] = ["settle", "observe", "plan", "freeze", "ship", "seal", "commit", "retire"];
    let by_step = rows.iter().flat_map(|r| {
        STEPS.iter().zip(r.totals.step_seconds).map(move |(step, seconds)| {
            let mut labels = labels(r);
            labels.push(("step", *step));
            (labels, seconds)
        })
    });
    page.family("step_seconds_total", Counter, "Time that runs spent in each step.", by_step);
    page.each("freeze_seconds_total", Counter, "Time that freeze calls took.", rows, |r| Some(r.totals.freeze_seconds));
    page.each("pause_seconds_total", Counter, "Time the guest stood still at commits, in all pauses.", rows, |r| {
        Some(r.totals.pause_seconds)
    });
    let last = |r: &Row, of: fn(&super::pair::End) -> f64| r.last_run.as_ref().map(|l| of(&l.end));
    page.each("freeze_seconds", Gauge, "Duration of the newest freeze call.", rows, |r| last(r, |e| e.freeze_ms / 1e3));
    page.each("pause_seconds", Gauge, "Longest pause of the guest in the newest run.", rows, |r| {
        last(r, |e| e.pause_ms / 1e3)
    });
    page.each("pause_sum_seconds", Gauge, "All pauses of the guest in the newest run together.", rows, |r| {
        r.last_run.as_ref().and_then(|l| l.end.pause_sum_ms).map(|ms| ms / 1e3)
    });
    page.each("pauses", Gauge, "How often the newest run paused the guest.", rows, |r| {
        r.last_run.as_ref().and_then(|l| l.end.pauses).map(f64::from)
    });
    page.each("bytes_read_total", Counter, "Bytes read from the source's images.", rows, |r| {
        Some(r.totals.bytes_read as f64)
    });
    page.each("bytes_sent_total", Counter, "Bytes sent to the target.", rows, |r| Some(r.totals.bytes_sent as f64));
    page.each("bytes_written_total", Counter, "Bytes written at the target.", rows, |r| {
        Some(r.totals.bytes_written as f64)
    });
    page.each("audit_failures_total", Counter, "Dirty bitmaps that lied.", rows, |r| Some(r.totals.alarms as f64));
    page.each("guest_stopped", Gauge, "Whether the newest run left the guest stopped by an I/O error.", rows, |r| {
        last(r, |e| flag(e.guest_stopped.as_ref().is_some_and(|g| !g.resumed)))
    });
    page.each("commit_pending", Gauge, "Whether the newest run left a disk on an overlay.", rows, |r| {
        last(r, |e| flag(e.result == RunResult::CommitPending))
    });
}

fn checks(page: &mut Page, rows: &[Row]) {
    use Type::{Counter, Gauge};
    let each = || {
        rows.iter().flat_map(|r| {
            r.checks.iter().map(move |(check, state)| {
                let mut labels = labels(r);
                labels.push(("check", check.word()));
                (labels, state)
            })
        })
    };
    let failed = each().map(|(labels, s)| (labels, flag(s.error.is_some())));
    page.family("check_failed", Gauge, "Whether the newest check on the target found damage, or did not end.", failed);
    let whole = each().filter_map(|(labels, s)| Some((labels, s.whole_at?.as_millisecond() as f64 / 1e3)));
    page.family("check_success_timestamp_seconds", Gauge, "When a check last found everything right.", whole);
    let counted = each().flat_map(|(labels, s)| {
        [("passed", s.passed), ("failed", s.failed)].map(|(result, count)| {
            let mut labels = labels.clone();
            labels.push(("result", result));
            (labels, count as f64)
        })
    });
    page.family("checks_total", Counter, "Checks that ended, by what became of them.", counted);
}

/// What the newest run saw of the target.
fn target(page: &mut Page, rows: &[Row]) {
    use Type::Gauge;
    let seen = |r: &Row| r.last_seen;
    page.each("points", Gauge, "Recovery points on the target after the newest run.", rows, |r| {
        Some(seen(r)?.points as f64)
    });
    page.each("target_free_bytes", Gauge, "Bytes free on the target's file system after the newest run.", rows, |r| {
        Some(seen(r)?.free_bytes as f64)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::check::Check;
    use crate::daemon::check::CheckState;
    use crate::daemon::pair::Totals;
    use crate::name::{DomainName, DomainUuid};
    use crate::replicate::state::report::TargetSeen;
    use std::collections::BTreeMap;

    fn status() -> Status {
        let row = |name: &str, lag: Option<i64>| Row {
            domain: DomainName::new(name).unwrap(),
            uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
            target: "ssh://dr1".into(),
            policy: Some("p".into()),
            paused: false,
            lives_on: (name == "new").then(|| "ssh://dr1".into()),
            promoted_since: (name == "new").then_some(jiff::Timestamp::UNIX_EPOCH),
            frozen_at: lag.map(|_| jiff::Timestamp::UNIX_EPOCH),
            lag_s: lag,
            rpo_s: Some(900),
            slack_s: Some(0),
            breach_since: None,
            next_at: None,
            running: None,
            failures: 2,
            last_run: None,
            last_seen: lag.map(|_| TargetSeen { points: 3, free_bytes: 1 << 30 }),
            recent: Vec::new(),
            totals: Totals { sealed: 7, failed: 2, bytes_sent: 1 << 40, ..Totals::default() },
            checks: [(Check::Verify, CheckState { error: Some("rot".into()), failed: 1, ..CheckState::default() })]
                .into(),
            unprotected: Vec::new(),
            clock_ahead_s: lag.map(|_| 75),
        };
        Status {
            version: "1.2.3",
            up_s: 5,
            stopping: false,
            paused: false,
            policies: 1,
            runs: 0,
            libvirt_error: None,
            config_error: Some("no".into()),
            domains: vec![row("web\"01\\", Some(312)), row("new", None)],
        }
    }

    /// Reads the page as a scraper would: every sample has a family with HELP and TYPE above it, names and labels are
    /// well formed, no sample stands twice.
    fn parse(page: &str) -> BTreeMap<String, f64> {
        let (mut helped, mut typed) = (String::new(), String::new());
        let mut samples = BTreeMap::new();
        let mut families = std::collections::BTreeSet::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, text) = rest.split_once(' ').unwrap();
                assert!(text.ends_with('.') && families.insert(name.to_owned()), "{line}");
                helped = name.to_owned();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!((name, kind == "counter"), (helped.as_str(), name.ends_with("_total")), "{line}");
                typed = name.to_owned();
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let name = series.split('{').next().unwrap();
                assert_eq!(name, typed, "{line}");
                assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
                assert_eq!(series.contains('{'), series.ends_with('}'), "{line}");
                let value: f64 = value.parse().unwrap();
                assert!(samples.insert(series.to_owned(), value).is_none(), "twice: {line}");
            }
        }
        samples
    }

    #[test]
    fn the_page_is_what_a_scraper_expects() {
        let samples = parse(&render(&status()));
        let of = |series: &str| samples.get(series).copied();
        let web = r#"{domain="web\"01\\",target="ssh://dr1"}"#;
        assert_eq!(of(&format!("virt_replica_replication_lag_seconds{web}")), Some(312.0));
        // Never replicated: no lag, which is not a lag of zero.
        assert_eq!(of(r#"virt_replica_replication_lag_seconds{domain="new",target="ssh://dr1"}"#), None);
        assert_eq!(of(r#"virt_replica_runs_total{domain="new",target="ssh://dr1",result="sealed"}"#), Some(7.0));
        assert_eq!(of(&format!("virt_replica_bytes_sent_total{web}")), Some((1u64 << 40) as f64));
        assert_eq!(of(&format!("virt_replica_points{web}")), Some(3.0));
        assert_eq!(of(r#"virt_replica_points{domain="new",target="ssh://dr1"}"#), None);
        assert_eq!(of(&format!("virt_replica_clock_ahead_seconds{web}")), Some(75.0));
        assert_eq!(of(&format!("virt_replica_unprotected_disks{web}")), Some(0.0));
        assert_eq!(of(&format!("virt_replica_demoted{web}")), Some(0.0));
        assert_eq!(of(r#"virt_replica_demoted{domain="new",target="ssh://dr1"}"#), Some(1.0));
        assert_eq!(of(&format!("virt_replica_promoted{web}")), Some(0.0));
        assert_eq!(of(r#"virt_replica_promoted{domain="new",target="ssh://dr1"}"#), Some(1.0));
        let check = r#"{domain="new",target="ssh://dr1",check="verify"}"#;
        assert_eq!(of(&format!("virt_replica_check_failed{check}")), Some(1.0));
        assert_eq!((of("virt_replica_config_ok"), of("virt_replica_libvirt_up")), (Some(0.0), Some(1.0)));
        assert_eq!(of(r#"virt_replica_build_info{version="1.2.3"}"#), Some(1.0));
    }

    /// The counter adds up all pauses; of a run of an older program only the longest is known.
    #[test]
    fn pauses_are_told_by_the_longest_the_sum_and_their_number() {
        use crate::daemon::pair::{End, Key, Pair};
        let mut all = status();
        let (row, at) = (&mut all.domains[0], jiff::Timestamp::UNIX_EPOCH);
        let mut pair = Pair::new(Key { uuid: row.uuid.clone(), url: "ssh://dr1".into() }, row.domain.clone(), at);
        let end = |pause_ms, pause_sum_ms, pauses| End { pause_ms, pause_sum_ms, pauses, ..End::failed(None, "away") };
        pair.ended(at, at, end(100.0, None, None));
        pair.ended(at, at, end(250.0, Some(400.0), Some(3)));
        (row.totals, row.last_run) = (pair.totals, pair.last);
        let samples = parse(&render(&all));
        let of = |family: &str| samples[&format!(r#"virt_replica_{family}{{domain="web\"01\\",target="ssh://dr1"}}"#)];
        assert_eq!((of("pause_seconds"), of("pause_sum_seconds"), of("pauses")), (0.25, 0.4, 3.0));
        assert_eq!(of("pause_seconds_total"), 0.5);
    }

    /// What is shipped for Prometheus and Grafana asks for nothing that is not there.
    #[test]
    fn rules_and_dashboard_name_what_is_served() {
        let mut all = status();
        let mut pair = crate::daemon::pair::Pair::new(
            crate::daemon::pair::Key { uuid: all.domains[0].uuid.clone(), url: "ssh://dr1".into() },
            all.domains[0].domain.clone(),
            jiff::Timestamp::UNIX_EPOCH,
        );
        let end = crate::daemon::pair::End::failed(None, "away");
        pair.ended(jiff::Timestamp::UNIX_EPOCH, jiff::Timestamp::UNIX_EPOCH, end);
        all.domains[0].last_run = pair.last;
        let served = render(&all);
        for text in [
            include_str!("../../packaging/prometheus-rules.yaml"),
            include_str!("../../packaging/grafana-dashboard.json"),
        ] {
            let mut asked = 0;
            for rest in text.split("virt_replica_").skip(1) {
                let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
                let family = format!("# TYPE virt_replica_{} ", &rest[..end]);
                assert!(served.contains(&family), "nobody serves virt_replica_{}", &rest[..end]);
                asked += 1;
            }
            assert!(asked > 7, "only {asked} names: looked in the wrong place");
        }
        let dashboard: serde_json::Value =
            serde_json::from_str(include_str!("../../packaging/grafana-dashboard.json")).unwrap();
        assert!(dashboard["panels"].as_array().is_some_and(|p| p.len() > 10));
    }
}
