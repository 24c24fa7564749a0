//! `status --nagios`: one verdict as monitoring plugins give it (Nagios Plugins' developer guidelines): a line,
//! performance data behind `|`, details below, and 0, 1, 2 or 3. Pure.

use super::view::{Row, State};
use std::fmt::Write;
use std::time::Duration;
use virt_replica::replicate::state::report::RunOutcome;
use virt_replica::units;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Ok,
    /// Cannot be found out. Ranks below a warning: what is known to be wrong is worse.
    Unknown,
    Warning,
    Critical,
}

impl Verdict {
    pub fn code(self) -> u8 {
        match self {
            Verdict::Ok => 0,
            Verdict::Warning => 1,
            Verdict::Critical => 2,
            Verdict::Unknown => 3,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Verdict::Ok => "OK",
            Verdict::Warning => "WARNING",
            Verdict::Critical => "CRITICAL",
            Verdict::Unknown => "UNKNOWN",
        }
    }
}

/// Lags beyond which a row is not well.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub warning: Option<Duration>,
    pub critical: Option<Duration>,
}

/// The verdict of one row, with the reason if it is not well.
fn judge(row: &Row, limits: Limits) -> (Verdict, Option<String>) {
    let whom = match &row.target {
        Some(target) => format!("{} to {target}", row.domain),
        None => row.domain.clone(),
    };
    let lag = Duration::from_secs(row.lag_s.unwrap_or(0).max(0) as u64);
    let over = |limit: Option<Duration>| limit.filter(|l| row.lag_s.is_some() && lag > *l);
    let late = |limit: Duration| {
        let (lag, limit) = (units::duration(lag), units::duration(limit));
        format!("lag {lag}, over {limit}")
    };
    let failed = row.last_run.as_ref().filter(|r| r.outcome == RunOutcome::Failed && row.running.is_none());
    let (verdict, why) = match (row.state, over(limits.critical), over(limits.warning)) {
        (State::NeedsAttention, _, _) => {
            (Verdict::Critical, row.notes.first().cloned().unwrap_or_else(|| "needs attention".to_owned()))
        }
        // Nobody replicates it from here any more: its age says nothing.
        (State::Demoted, _, _) => return (Verdict::Ok, None),
        // On its target it is where it should be, and no source may send a younger point. Anywhere else it is news.
        (State::Promoted, _, _) if is_at_its_target(row) => return (Verdict::Ok, None),
        // A failover that somebody forgot about leaves a domain that still works here without any protection.
        (State::Promoted, Some(limit), _) => {
            (Verdict::Critical, format!("{}, and no run is accepted: it was brought up on the target", late(limit)))
        }
        (State::Promoted, _, _) => (Verdict::Warning, "it was brought up on the target: no run is accepted".to_owned()),
        (_, Some(limit), _) => (Verdict::Critical, late(limit)),
        (State::CommitPending, _, _) if row.running.is_none() => (Verdict::Warning, "commit pending".to_owned()),
        (State::HandingOver, _, _) => {
            (Verdict::Warning, row.notes.first().cloned().unwrap_or_else(|| "handing over".to_owned()))
        }
        (State::NeverReplicated, _, _) if limits.critical.is_some() => {
            (Verdict::Warning, "not replicated yet".to_owned())
        }
        (_, None, Some(limit)) => (Verdict::Warning, late(limit)),
        (State::PartlyProtected, _, _) => {
            (Verdict::Warning, row.notes.first().cloned().unwrap_or_else(|| "partly protected".to_owned()))
        }
        (State::Unknown, _, _) => (Verdict::Unknown, "libvirt does not know it, or was not asked".to_owned()),
        _ => match failed.and_then(|r| r.error.clone()) {
            Some(error) => (Verdict::Warning, format!("the newest run failed: {error}")),
            None => return (Verdict::Ok, None),
        },
    };
    (verdict, Some(format!("{whom}: {why}")))
}

/// Whether this is the target's own word of a replica that it has.
fn is_at_its_target(row: &Row) -> bool {
    row.target.as_deref().is_some_and(|target| target.starts_with("local:"))
}

/// What a plugin prints, and its exit code. `limits`: those of a row.
pub fn report(rows: &[Row], limits: impl Fn(&Row) -> Limits) -> (String, u8) {
    let judged: Vec<(Verdict, Option<String>)> = rows.iter().map(|r| judge(r, limits(r))).collect();
    let worst = judged.iter().map(|(v, _)| *v).max().unwrap_or(Verdict::Ok);
    let mut problems: Vec<&(Verdict, Option<String>)> = judged.iter().filter(|(_, why)| why.is_some()).collect();
    problems.sort_by_key(|(v, _)| std::cmp::Reverse(*v));
    let first = problems.first().and_then(|(_, why)| why.clone());
    let count = |v: Verdict| judged.iter().filter(|(x, _)| *x == v).count();
    let summary = format!(
        "{} replications, {} critical, {} warning, {} unknown",
        rows.len(),
        count(Verdict::Critical),
        count(Verdict::Warning),
        count(Verdict::Unknown)
    );
    let head = match first {
        Some(first) => format!("{}; {summary}", plain(&first)),
        None => summary,
    };
    let mut text = format!("VIRT-REPLICA {} - {head}", worst.word());
    let lags = rows
        .iter()
        .filter(|r| r.state != State::Demoted && !(r.state == State::Promoted && is_at_its_target(r)))
        .filter_map(|r| Some((r, r.lag_s?)));
    for (at, (row, lag_s)) in lags.enumerate() {
        let Limits { warning, critical } = limits(row);
        let seconds = |d: Option<Duration>| d.map_or(String::new(), |d| d.as_secs().to_string());
        let label =
            format!("lag {} {}", row.domain, row.target.as_deref().unwrap_or("-")).replace(['\'', '=', '|'], "_");
        let separator = if at == 0 { " |" } else { "" };
        // Writing to a string does not fail.
        let _ = write!(text, "{separator} '{label}'={lag_s}s;{};{};0", seconds(warning), seconds(critical));
    }
    for (verdict, why) in problems {
        let _ = write!(text, "\n{}: {}", verdict.word(), plain(why.as_deref().unwrap_or_default()));
    }
    (text, worst.code())
}

/// `|` would begin performance data, and a line is a line.
fn plain(text: &str) -> String {
    text.replace('|', "/").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::status::view::LastRun;
    use jiff::Timestamp;
    use virt_replica::name::{DomainUuid, RunId};

    fn row(domain: &str, state: State, lag_s: Option<i64>) -> Row {
        Row {
            domain: domain.to_owned(),
            uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
            state,
            notes: Vec::new(),
            target: Some("ssh://dr1".to_owned()),
            head: None,
            lag_s,
            clock_ahead_s: None,
            last_run: None,
            running: None,
            overlays: Vec::new(),
            alarms: Vec::new(),
            ready: None,
        }
    }

    fn quarter(_: &Row) -> Limits {
        Limits { warning: Some(Duration::from_secs(720)), critical: Some(Duration::from_secs(900)) }
    }

    fn of(rows: &[Row]) -> (String, u8) {
        report(rows, quarter)
    }

    #[test]
    fn all_is_well() {
        let (text, code) = of(&[row("web01", State::Ok, Some(12)), row("new", State::OnOverlay, None)]);
        assert_eq!(code, 0);
        assert_eq!(
            text,
            "VIRT-REPLICA OK - 2 replications, 0 critical, 0 warning, 0 unknown | 'lag web01 ssh://dr1'=12s;720;900;0"
        );
    }

    #[test]
    fn the_worst_is_named_first_and_decides() {
        let mut failed = row("failed", State::Ok, Some(1));
        let (run_id, started_at) = (RunId::from_bits(1), Timestamp::UNIX_EPOCH);
        let error = Some("no | route\nto host".to_owned());
        failed.last_run = Some(LastRun { run_id, started_at, duration_ms: 1.0, outcome: RunOutcome::Failed, error });
        let rows = [failed, row("near", State::Ok, Some(800)), row("late", State::Ok, Some(901))];
        let (text, code) = of(&rows);
        assert_eq!(code, 2);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("VIRT-REPLICA CRITICAL - late to ssh://dr1: lag 15m 1s, over 15m; 3 rep"),
            "{text}"
        );
        assert_eq!(lines.len(), 4, "{text}");
        assert!(text.contains("WARNING: failed to ssh://dr1: the newest run failed: no / route to host"), "{text}");
        assert_eq!(of(&rows[..1]).1, 1);
    }

    #[test]
    fn each_state_has_its_verdict() {
        for (state, code) in [
            (State::Ok, 0),
            (State::OnOverlay, 0),
            (State::ByBackup, 0),
            (State::CommitPending, 1),
            (State::NeverReplicated, 1),
            (State::PartlyProtected, 1),
            (State::NeedsAttention, 2),
            (State::Unknown, 3),
        ] {
            assert_eq!(of(&[row("a", state, None)]).1, code, "{state:?}");
        }
        // A replica whose domain lives here is as old as it is; seen from elsewhere it replicates nothing any more, and
        // is late like any other.
        assert_eq!(of(&[row("a", State::Promoted, Some(1))]).1, 1);
        let promoted = row("a", State::Promoted, Some(1 << 20));
        let (text, code) = of(std::slice::from_ref(&promoted));
        assert_eq!(
            (code, text.contains("brought up on the target"), text.contains("lag a")),
            (2, true, true),
            "{text}"
        );
        let (text, code) = of(&[Row { target: Some("local:/var/lib/virt-replica".to_owned()), ..promoted }]);
        assert_eq!((code, text.contains("lag a")), (0, false), "{text}");
        // Nobody promised anything of it.
        assert_eq!(report(&[row("a", State::NeverReplicated, None)], |_| Limits::default()).1, 0);
        assert_eq!(report(&[row("a", State::Ok, Some(1 << 40))], |_| Limits::default()).1, 0);
        assert_eq!(of(&[]).1, 0);
    }
}
