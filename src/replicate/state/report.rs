//! What a run did, as data: printed by the command line, kept by the journal, read by scripts.

use crate::error::{Error, Kind};
use crate::name::{DomainName, DomainUuid, RunId};
use crate::replica::PointView;
use crate::replica::left_out::LeftOut;
use crate::replicate::plan::options::CaptureKind;
use crate::replicate::plan::planned::Plan;
use crate::replicate::settle::account::Pauses;
use crate::replicate::state::record::GuestStopped;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The report of one run. The fields of the new point stand at its top level, as in `points --json`; scripts depend on
/// the names: fields are added, never renamed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Name of the domain that the run replicated.
    pub domain: DomainName,
    /// UUID of the domain that the run replicated.
    pub uuid: DomainUuid,
    /// Canonical URL of the target.
    pub target: String,
    /// The run, whether or not it led to a point (whose own `run` stands below).
    pub run_id: RunId,
    /// When the run began, by the source's clock.
    pub started_at: Timestamp,
    /// Whether a point was sealed, and whether the domain is back on its own images.
    pub outcome: RunOutcome,
    /// The new point; absent if none was sealed.
    #[serde(flatten)]
    pub point: Option<PointView>,
    /// How the disks were made to stand still, and why so; absent if the run did not come to plan it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<CaptureKind>,
    /// Why this capture was chosen. `None`: the run did not come to plan it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture_reason: Option<String>,
    /// Duration of the freeze call in milliseconds, an upper bound of what the guest felt; 0 for a domain that is off.
    pub freeze_ms: f64,
    /// How long the guest agent held the guest's file systems, in milliseconds; absent if it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_ms: Option<f64>,
    /// Longest time the guest's vCPUs stood still at the end of the commit, in milliseconds; 0 if they did not. A run
    /// with many disks pauses the guest more than once: this is the longest pause.
    pub pause_ms: f64,
    /// All pauses together, in milliseconds; absent in reports of older programs, and if the domain did not come home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_sum_ms: Option<f64>,
    /// How often the guest was paused; absent where `pause_sum_ms` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pauses: Option<u32>,
    /// Duration of the whole run in milliseconds.
    pub duration_ms: f64,
    /// Disks that are in no point, and whose decision that is.
    pub skipped: LeftOut,
    /// A dirty bitmap that lied: what to look into, although the run put it right.
    #[serde(default)]
    pub alarms: Vec<String>,
    /// QEMU stopped the guest after an I/O error, before or during the run; absent if it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_stopped: Option<GuestStopped>,
    /// What an operator should know although the run went on.
    pub warnings: Vec<String>,
    /// How the target stood after the run; absent if it was not asked any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_seen: Option<TargetSeen>,
    /// What keeps the point from being brought up on its target, a sentence each; empty also where the target does
    /// not say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub target_lacks: Vec<String>,
    /// Why the run failed, with all causes. `None`: it did not fail.
    pub error: Option<String>,
    /// What to do about it: whoever decides on a failure, decides on this.
    #[serde(default)]
    pub error_kind: Option<Kind>,
}

/// A target, as one run saw it last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetSeen {
    /// Recovery points of the domain.
    pub points: u64,
    /// Bytes that an unprivileged writer may still write to the file system of the store.
    pub free_bytes: u64,
}

/// Result of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunOutcome {
    /// A new point exists and the domain is back on its own images.
    Sealed,
    /// A new point exists, and the domain is still on an overlay, or its backup job still runs: see the warnings.
    CommitPending,
    /// No new point.
    Failed,
}

impl Report {
    /// Takes down what is known once the run is planned, whatever becomes of it.
    pub(in crate::replicate) fn planned(&mut self, plan: &Plan) {
        self.skipped = plan.skipped.clone();
        (self.capture, self.capture_reason) = (Some(plan.capture), Some(plan.capture_reason.clone()));
    }

    /// Takes down how often and how long the guest was paused.
    pub(in crate::replicate) fn paused(&mut self, pauses: Pauses) {
        self.pause_ms = millis(pauses.longest);
        (self.pause_sum_ms, self.pauses) = (Some(millis(pauses.sum)), Some(pauses.count));
    }

    /// How long the guest stood still in all, in milliseconds. An older program reported its longest pause only.
    pub fn stood_still_ms(&self) -> f64 {
        self.pause_sum_ms.unwrap_or(self.pause_ms)
    }

    /// Marks the run as failed, with the words and the kind of this error.
    pub fn failed(mut self, error: &Error) -> Self {
        self.outcome = RunOutcome::Failed;
        self.error = Some(error.chain());
        self.error_kind = Some(error.kind());
        self
    }
}

/// Milliseconds with three decimals, as the reports have them.
pub fn millis(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::engine::stats::DiskStats;
    use crate::name::{DiskName, Generation, PointId};
    use crate::replica::{Consistency, PointDisk};

    pub(crate) fn report(sealed: bool) -> Report {
        let run = RunId::from_bits(0xdead_beef_0000_0001);
        let disk = PointDisk {
            name: DiskName::new("vda").unwrap(),
            image: "/r/vda.qcow2".into(),
            size: crate::block::DiskSize(1 << 30),
            root: serde_json::from_str(&format!("\"{}\"", "ab".repeat(32))).unwrap(),
            stats: DiskStats { reason: "why".into(), bytes_read: 1, ..DiskStats::default() },
        };
        let point = PointView {
            id: PointId::from_parts(1, &run),
            generation: Generation(1),
            frozen_at: Timestamp::UNIX_EPOCH,
            sealed_at: Timestamp::UNIX_EPOCH,
            consistency: Consistency::Crash,
            consistency_reason: None,
            autostart: None,
            tpm_programs: None,
            run: run.clone(),
            disks: vec![disk],
            attachments: Vec::new(),
            left_out: Default::default(),
        };
        Report {
            domain: DomainName::new("db01").unwrap(),
            uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
            target: "dr1".into(),
            run_id: run,
            started_at: Timestamp::UNIX_EPOCH,
            outcome: if sealed { RunOutcome::Sealed } else { RunOutcome::Failed },
            point: sealed.then_some(point),
            capture: Some(CaptureKind::Overlay),
            capture_reason: Some("why".into()),
            freeze_ms: 1.5,
            held_ms: None,
            pause_ms: 2.25,
            pause_sum_ms: Some(4.5),
            pauses: Some(3),
            duration_ms: 1000.0,
            skipped: LeftOut::default(),
            alarms: Vec::new(),
            guest_stopped: None,
            warnings: Vec::new(),
            target_seen: None,
            target_lacks: Vec::new(),
            error: None,
            error_kind: None,
        }
    }

    /// A key that stands twice is read by everybody in his own way, and by us not at all: the point was lost.
    #[test]
    fn a_report_reads_back_as_it_was_written() {
        for sealed in [true, false] {
            let text = serde_json::to_string(&report(sealed)).unwrap();
            let back: Report = serde_json::from_str(&text).unwrap();
            assert_eq!(back.point, report(sealed).point, "{text}");
            assert_eq!(serde_json::to_string(&back).unwrap(), text);
        }
    }

    /// Reports of before there were kinds are read as well.
    #[test]
    fn a_failed_report_says_what_kind_of_failure_it_was() {
        let failed = report(false).failed(&Error::new(Kind::Unavailable, "the target is away"));
        let mut json = serde_json::to_value(&failed).unwrap();
        assert_eq!(json["error_kind"], "unavailable");
        json.as_object_mut().unwrap().remove("error_kind");
        assert_eq!(serde_json::from_value::<Report>(json).unwrap().error_kind, None);
    }

    /// The longest pause and the sum of all are told apart; a report of before the sum was there counts its only pause.
    #[test]
    fn a_report_tells_the_longest_pause_from_the_sum() {
        let mut now = report(true);
        let mut pauses = Pauses::default();
        for ms in [100, 250, 50] {
            pauses.add(Duration::from_millis(ms));
        }
        now.paused(pauses);
        assert_eq!((now.pause_ms, now.pause_sum_ms, now.pauses), (250.0, Some(400.0), Some(3)));
        assert_eq!(now.stood_still_ms(), 400.0);
        let mut json = serde_json::to_value(&now).unwrap();
        for name in ["pause_sum_ms", "pauses"] {
            assert!(json.as_object_mut().unwrap().remove(name).is_some(), "no {name}");
        }
        let old: Report = serde_json::from_value(json).unwrap();
        assert_eq!((old.pause_sum_ms, old.pauses, old.stood_still_ms()), (None, None, 250.0));
    }

    /// The names that docs/formats/json.md promises to scripts.
    #[test]
    fn the_names_that_scripts_depend_on_never_change() {
        let json = serde_json::to_value(report(true)).unwrap();
        let has = |value: &serde_json::Value, names: &[&str]| {
            for name in names {
                assert!(value.get(name).is_some(), "'{name}' is missing in {value}");
            }
        };
        has(&json, &["id", "generation", "frozen_at", "sealed_at", "consistency", "disks"]);
        has(
            &json,
            &[
                "freeze_ms",
                "pause_ms",
                "pause_sum_ms",
                "pauses",
                "duration_ms",
                "outcome",
                "domain",
                "uuid",
                "target",
                "run_id",
            ],
        );
        has(&json, &["capture", "capture_reason"]);
        has(&json["disks"][0], &["name", "image", "mode", "reason", "bytes_read", "bytes_sent", "bytes_written"]);
        assert_eq!(json["frozen_at"], "1970-01-01T00:00:00Z");
        assert_eq!(json["outcome"], "sealed");
    }
}
