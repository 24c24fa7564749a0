//! What `status` shows of a domain: plain data, the verdict, and the table. Pure, except for the time zone.

use crate::cli::speak::render;
use jiff::Timestamp;
use serde::Serialize;
use std::path::PathBuf;
use virt_replica::name::{DiskName, DomainUuid, Generation, PointId, RunId};
use virt_replica::recovery::bringup::Readiness;
use virt_replica::recovery::ready::{Color, Finding};
use virt_replica::replica::left_out::LeftOut;
use virt_replica::replica::{Consistency, PointView};
use virt_replica::replicate::settle::decide::Phase;
use virt_replica::replicate::state::handover_record::Stage;
use virt_replica::replicate::state::report::RunOutcome;

/// How a domain's own disks stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Ok,
    OnOverlay,
    /// A backup job of ours runs, or is on record.
    ByBackup,
    CommitPending,
    NeedsAttention,
    /// It lives on its target: it was handed over.
    Demoted,
    /// It is being handed over, or that was cut short.
    HandingOver,
    /// It was brought up on the target from this replica: no run is accepted there.
    Promoted,
    NeverReplicated,
    /// The newest point lacks a disk that could not be replicated and that nobody excluded.
    PartlyProtected,
    Unknown,
}

impl State {
    pub fn words(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::OnOverlay => "on overlay",
            State::ByBackup => "by backup",
            State::CommitPending => "commit pending",
            State::NeedsAttention => "needs attention",
            State::Demoted => "demoted",
            State::HandingOver => "handing over",
            State::Promoted => "promoted",
            State::NeverReplicated => "never replicated",
            State::PartlyProtected => "partly protected",
            State::Unknown => "unknown",
        }
    }
}

/// What the state follows from.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Phase of the open record, if there is one.
    pub open: Option<Phase>,
    /// A run by backup is on record.
    pub backup: bool,
    /// The open record cannot be settled without a person, an overlay of ours has no record, or an I/O error has
    /// stopped the guest.
    pub stuck: bool,
    /// How far the domain is on the way to its target.
    pub handed: Option<Stage>,
    /// The target says that it was brought up there.
    pub promoted: bool,
    /// libvirt was asked and knows the domain.
    pub observed: bool,
    /// A point was sealed, ever.
    pub replicated: bool,
    /// The newest run found that a dirty bitmap had lied, a scrub that the newest point is damaged, or a clock was
    /// wrong.
    pub alarmed: bool,
    /// The newest point lacks a disk that nobody excluded.
    pub partly: bool,
}

/// Pure. The worse news wins.
pub fn state(seen: Seen) -> State {
    match seen {
        Seen { stuck: true, .. } => State::NeedsAttention,
        Seen { open: Some(Phase::CommitIntent | Phase::PivotIntent), .. } => State::CommitPending,
        Seen { open: Some(_), .. } => State::OnOverlay,
        Seen { backup: true, .. } => State::ByBackup,
        Seen { handed: Some(Stage::Moved), .. } => State::Demoted,
        Seen { handed: Some(_), .. } => State::HandingOver,
        Seen { alarmed: true, .. } => State::NeedsAttention,
        Seen { promoted: true, .. } => State::Promoted,
        Seen { observed: false, .. } => State::Unknown,
        Seen { replicated: false, .. } => State::NeverReplicated,
        Seen { partly: true, .. } => State::PartlyProtected,
        Seen { .. } => State::Ok,
    }
}

/// One domain and one target.
#[derive(Debug, Serialize)]
pub struct Row {
    pub domain: String,
    pub uuid: DomainUuid,
    pub state: State,
    /// Why it is so, where that is not plain.
    pub notes: Vec<String>,
    pub target: Option<String>,
    pub head: Option<Head>,
    /// Age of the head's content in seconds; `None` with a head: nobody can know, as a clock was wrong.
    pub lag_s: Option<i64>,
    /// So far, at least, a clock was ahead when the head was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_ahead_s: Option<i64>,
    pub last_run: Option<LastRun>,
    /// What works on the domain right now.
    pub running: Option<String>,
    pub overlays: Vec<Overlay>,
    /// Dirty bitmaps that lied, newest last, as far as the journal's tail goes.
    pub alarms: Vec<Alarm>,
    /// With `--ready`: whether the target could bring it up from its head. `None`: not asked, or not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<Ready>,
}

/// What the target says of bringing a domain up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ready {
    pub ready: bool,
    /// What stands in the way, with what to do about it.
    pub red: Vec<String>,
}

impl From<&Readiness> for Ready {
    fn from(readiness: &Readiness) -> Ready {
        let red = readiness.findings.iter().filter(|f| f.color == Color::Red);
        let words = |f: &Finding| match &f.advice {
            Some(advice) => format!("{}: {advice}", f.what),
            None => f.what.clone(),
        };
        Ready { ready: readiness.red().is_none(), red: red.map(words).collect() }
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct Alarm {
    pub at: Timestamp,
    pub message: String,
}

#[derive(Debug, Serialize)]
pub struct Head {
    pub id: PointId,
    pub generation: Generation,
    pub frozen_at: Timestamp,
    pub sealed_at: Timestamp,
    pub consistency: Consistency,
    /// Disks of the domain that are not in it.
    #[serde(skip_serializing_if = "LeftOut::is_empty")]
    pub left_out: LeftOut,
}

impl From<&PointView> for Head {
    fn from(p: &PointView) -> Head {
        Head {
            id: p.id.clone(),
            generation: p.generation,
            frozen_at: p.frozen_at,
            sealed_at: p.sealed_at,
            consistency: p.consistency,
            left_out: p.left_out.clone(),
        }
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct LastRun {
    pub run_id: RunId,
    pub started_at: Timestamp,
    pub duration_ms: f64,
    pub outcome: RunOutcome,
    pub error: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Overlay {
    pub disk: DiskName,
    pub path: PathBuf,
    pub since: Timestamp,
    pub age_s: i64,
}

/// Whose word the heads are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadFrom {
    Journal,
    Target,
}

impl Row {
    /// Of a domain and a target that a policy brings together, and no run has yet.
    pub fn awaited(domain: String, uuid: DomainUuid, target: String) -> Row {
        Row {
            domain,
            uuid,
            state: State::NeverReplicated,
            notes: Vec::new(),
            target: Some(target),
            head: None,
            lag_s: None,
            clock_ahead_s: None,
            last_run: None,
            running: None,
            overlays: Vec::new(),
            alarms: Vec::new(),
            ready: None,
        }
    }

    /// Whether nobody has to look at it.
    pub fn is_well(&self) -> bool {
        let failed = self.last_run.as_ref().is_some_and(|r| r.outcome != RunOutcome::Sealed);
        let ready = self.ready.as_ref().is_none_or(|r| r.ready);
        self.state == State::Ok && ready && (!failed || self.running.is_some())
    }

    fn last_run_words(&self) -> &str {
        match (&self.running, self.last_run.as_ref().map(|r| r.outcome)) {
            (Some(_), _) => "running",
            (None, None) => "-",
            (None, Some(RunOutcome::Sealed)) => "sealed",
            (None, Some(RunOutcome::CommitPending)) => "commit pending",
            (None, Some(RunOutcome::Failed)) => "failed",
        }
    }

    /// What does not fit into a table.
    fn remarks(&self) -> impl Iterator<Item = String> {
        let overlays = self
            .overlays
            .iter()
            .map(|o| format!("disk {} is on {} for {}", o.disk, o.path.display(), render::age(o.age_s)));
        let running = self.running.iter().map(|what| format!("at work: {what}"));
        let failed = self.last_run.iter().filter(|_| self.running.is_none());
        let failed = failed.filter_map(|r| r.error.as_ref().map(|e| format!("last run: {e}")));
        let alarms =
            self.alarms.iter().rev().take(1).map(|a| format!("ALARM of {}: {}", render::time(a.at), a.message));
        let ready = self.ready.iter().flat_map(|r| match r.ready {
            true => vec!["the target could bring it up from its head".to_owned()],
            false => r.red.iter().map(|red| format!("NOT READY at the target: {red}")).collect(),
        });
        overlays.chain(alarms).chain(ready).chain(running).chain(failed).chain(self.notes.iter().cloned())
    }
}

pub fn describe(rows: &[Row], from: HeadFrom) -> String {
    if rows.is_empty() {
        return "no domain is known here".to_owned();
    }
    let dash = || "-".to_owned();
    let cells = rows.iter().map(|row| {
        vec![
            row.domain.clone(),
            row.state.words().to_owned(),
            row.head.as_ref().map_or_else(dash, |h| h.id.to_string()),
            row.head.as_ref().map_or_else(dash, |h| render::minute(h.frozen_at)),
            row.lag_s.map_or_else(dash, render::short_age),
            row.last_run_words().to_owned(),
            row.target.clone().unwrap_or_else(dash),
        ]
    });
    let frozen = format!("Frozen ({})", render::zone_now());
    let header = ["Domain", "State", "Head", &frozen, "Lag", "Last run", "Target"];
    let mut lines = vec![render::table(&header, &[], cells.collect())];
    let remarks =
        rows.iter().flat_map(|row| row.remarks().map(|text| render::wrap(&format!(" {}: ", row.domain), &text)));
    let mut remarks: Vec<String> = remarks.collect();
    remarks.dedup();
    if !remarks.is_empty() {
        lines.push(String::new());
        lines.extend(remarks);
    }
    lines.push(String::new());
    lines.push(match from {
        HeadFrom::Journal => " Heads are as this host's journal has them; --to TARGET asks the target.".to_owned(),
        HeadFrom::Target => " Heads are as the target has them now.".to_owned(),
    });
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A letter each; the last may be `d` for a disk that is not protected. Phase (- f F c p, b by backup, m moved, h
    /// being handed over, P promoted), stuck, observed, replicated, alarmed.
    fn of(text: &str) -> State {
        let c: Vec<char> = text.chars().collect();
        let open = match c[0] {
            'f' => Some(Phase::FreezeIntent),
            'F' => Some(Phase::Frozen),
            'c' => Some(Phase::CommitIntent),
            'p' => Some(Phase::PivotIntent),
            _ => None,
        };
        state(Seen {
            open,
            backup: c[0] == 'b',
            stuck: c[1] == 's',
            handed: match c[0] {
                'm' => Some(Stage::Moved),
                'h' => Some(Stage::Off),
                _ => None,
            },
            promoted: c[0] == 'P',
            observed: c[2] == 'o',
            replicated: c[3] == 'r',
            alarmed: c.get(4) == Some(&'a'),
            partly: c.get(4) == Some(&'d'),
        })
    }

    #[test]
    fn the_worse_news_wins() {
        for (seen, expected) in [
            ("--or", State::Ok),
            ("--o-", State::NeverReplicated),
            ("---r", State::Unknown),
            ("f-or", State::OnOverlay),
            ("F---", State::OnOverlay),
            ("b-or", State::ByBackup),
            ("bsor", State::NeedsAttention),
            ("c-or", State::CommitPending),
            ("p--r", State::CommitPending),
            ("psor", State::NeedsAttention),
            ("-sor", State::NeedsAttention),
            ("--ora", State::NeedsAttention),
            ("c-ora", State::CommitPending),
            ("m-or", State::Demoted),
            ("h-or", State::HandingOver),
            ("m-ora", State::Demoted),
            ("msor", State::NeedsAttention),
            ("P--r", State::Promoted),
            ("P-or", State::Promoted),
            ("--ord", State::PartlyProtected),
            ("--o-d", State::NeverReplicated),
            ("P-ord", State::Promoted),
            ("c-ord", State::CommitPending),
            // The guest reads through what is damaged.
            ("P-ora", State::NeedsAttention),
        ] {
            assert_eq!(of(seen), expected, "{seen}");
        }
    }
}
