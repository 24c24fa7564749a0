//! The state of drills on this host: `STATE/recovery/drills/ID/` holds `lock` (held as long as the drill's process
//! lives), `record.json` (until everything of it is gone), and what stays as proof: `report.json`, `console.log`,
//! `screen`, `script.log`.
//!
//! A record without the holder of its lock is a drill that was cut short: whoever meets it settles it.
//! Format: docs/formats/recovery.md.

use crate::durable::{read_json, remove_durably, replace, replace_json, to_json};
use crate::error::{Error, Kind, Result};
use crate::flock::Flock;
use crate::name::{DomainName, DomainUuid, PointId, RunId};
use crate::replicate::state::locked_dir;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// Ended drills whose reports are kept; the oldest go first.
const KEPT_MAX: usize = 200;

const RECORD: &str = "record.json";
/// Name of the report's file in the directory of a drill.
pub const REPORT: &str = "report.json";

/// What a drill has made, or was about to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillRecord {
    /// Version of this document: 1.
    pub format: u32,
    /// Id of the drill.
    pub id: RunId,
    /// Name of the replicated domain that is drilled.
    pub domain: DomainName,
    /// UUID of the replicated domain that is drilled.
    pub uuid: DomainUuid,
    /// Recovery point that the copy reads.
    pub point: PointId,
    /// The throw-away domain.
    pub drill_domain: DomainName,
    /// UUID of the throw-away domain. The cleanup ends the domain with this UUID.
    pub drill_uuid: DomainUuid,
    /// Its network, if it is on any.
    pub network: Option<String>,
    /// Its overlays.
    pub dir: PathBuf,
    /// When the drill began, by this host's clock.
    pub started_at: Timestamp,
}

impl DrillRecord {
    /// The directory of overlays has the name that this drill would have given it: no other is ever removed.
    fn check(self, path: &Path) -> Result<DrillRecord> {
        let wrong = |what: &str| {
            Err(Error::new(Kind::Corrupt, what.to_owned()).path(path).hint("look at it before you move it away"))
        };
        if self.format != 1 {
            let what = format!("the record of a drill has version {}, this program reads version 1", self.format);
            return Err(Error::new(Kind::Protocol, what).path(path));
        }
        match self.dir.file_name().is_some_and(|n| *n == *dir_name(&self.id)) {
            true => Ok(self),
            false => wrong("the record of a drill names a directory that is not a drill's"),
        }
    }
}

/// Of the overlays of a drill, and of its network.
pub fn dir_name(id: &RunId) -> String {
    format!("vr-drill-{id}")
}

/// One drill's state, with its lock held. Released when dropped, also by `kill -9`.
#[derive(Debug)]
pub struct DrillState {
    /// Directory of this drill: `STATE/recovery/drills/ID`.
    pub dir: PathBuf,
    _lock: Flock,
}

impl DrillState {
    /// Of a new drill.
    pub fn create(state: &Path, id: &RunId) -> Result<DrillState> {
        let dir = drills_dir(state).join(id.as_str());
        locked_dir::make(&dir)?;
        Self::lock(dir)?.ok_or_else(|| Error::new(Kind::Busy, format!("the drill {id} is under way")))
    }

    /// `None`: somebody has it.
    fn lock(dir: PathBuf) -> Result<Option<DrillState>> {
        Ok(locked_dir::lock(&dir)?.map(|lock| DrillState { dir, _lock: lock }))
    }

    /// Reads the record of the drill. `None`: nothing is left to clean up. Fails with `Corrupt` if the record names a
    /// directory that is not this drill's.
    pub fn record(&self) -> Result<Option<DrillRecord>> {
        let path = self.dir.join(RECORD);
        read_json::<DrillRecord>(&path)?.map(|r| r.check(&path)).transpose()
    }

    /// Durable when it returns.
    pub fn write(&self, record: &DrillRecord) -> Result<()> {
        replace_json(&self.dir, RECORD, record)
    }

    /// Durable when it returns.
    pub fn keep_report(&self, report: &impl Serialize) -> Result<()> {
        replace(&self.dir, REPORT, &to_json(report))
    }

    /// Nothing is left of the drill but its report. Durable when it returns.
    pub fn close(&self) -> Result<()> {
        remove_durably(&self.dir, RECORD, "cannot remove the record of the drill")
    }
}

fn drills_dir(state: &Path) -> PathBuf {
    state.join("recovery").join("drills")
}

fn all(state: &Path) -> Result<Vec<PathBuf>> {
    let dir = drills_dir(state);
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("cannot read the directory of drills", &dir, e)),
    };
    let named = |path: &PathBuf| path.file_name().and_then(|n| n.to_str()).is_some_and(|n| RunId::new(n).is_ok());
    Ok(entries.filter_map(|e| e.ok().map(|e| e.path())).filter(named).collect())
}

/// Drills that were cut short, each locked: nobody else settles them meanwhile. Those under way are not among them.
pub fn abandoned(state: &Path) -> Result<Vec<(DrillState, DrillRecord)>> {
    let mut found = Vec::new();
    for dir in all(state)?.into_iter().filter(|d| d.join(RECORD).exists()) {
        if let Some(drill) = DrillState::lock(dir)?
            && let Some(record) = drill.record()?
        {
            found.push((drill, record));
        }
    }
    Ok(found)
}

/// The records of drills that were cut short, for `doctor`.
pub fn left_behind(state: &Path) -> Result<Vec<DrillRecord>> {
    Ok(abandoned(state)?.into_iter().map(|(_, record)| record).collect())
}

/// Removes the oldest reports beyond those that are kept. What has a record stays.
pub fn forget_old(state: &Path) -> Result<()> {
    let age = |dir: &PathBuf| fs::metadata(dir.join(REPORT)).and_then(|m| m.modified()).ok();
    let mut ended: Vec<_> =
        all(state)?.into_iter().filter(|d| !d.join(RECORD).exists()).filter_map(|d| Some((age(&d)?, d))).collect();
    ended.sort();
    let surplus = ended.len().saturating_sub(KEPT_MAX);
    for (_, dir) in ended.into_iter().take(surplus) {
        fs::remove_dir_all(&dir).map_err(|e| Error::io("cannot remove the report of an old drill", &dir, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &RunId) -> DrillRecord {
        DrillRecord {
            format: 1,
            id: id.clone(),
            domain: DomainName::new("web01").unwrap(),
            uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
            point: PointId::from_parts(1, id),
            drill_domain: DomainName::new("web01-drill").unwrap(),
            drill_uuid: DomainUuid::new("00000000-f6a4-8304-79aa-97f2502e193f").unwrap(),
            network: None,
            dir: Path::new("/images").join(dir_name(id)),
            started_at: Timestamp::UNIX_EPOCH,
        }
    }

    #[test]
    fn only_what_nobody_works_on_is_abandoned() {
        let temp = tempfile::tempdir().unwrap();
        assert!(abandoned(temp.path()).unwrap().is_empty());
        let (one, two) = (RunId::from_bits(1), RunId::from_bits(2));
        let under_way = DrillState::create(temp.path(), &one).unwrap();
        under_way.write(&record(&one)).unwrap();
        let dead = DrillState::create(temp.path(), &two).unwrap();
        dead.write(&record(&two)).unwrap();
        drop(dead);
        let found = abandoned(temp.path()).unwrap();
        assert_eq!(found.iter().map(|(_, r)| &r.id).collect::<Vec<_>>(), [&two]);
        assert!(abandoned(temp.path()).unwrap().is_empty(), "it is being settled already");
        found[0].0.close().unwrap();
        drop(found);
        assert!(abandoned(temp.path()).unwrap().is_empty());
        assert_eq!(DrillState::create(temp.path(), &one).unwrap_err().kind(), Kind::Busy);
    }

    #[test]
    fn a_record_that_names_another_directory_is_not_obeyed() {
        let temp = tempfile::tempdir().unwrap();
        let id = RunId::from_bits(1);
        let drill = DrillState::create(temp.path(), &id).unwrap();
        for dir in ["/", "/images", "/images/vr-drill-0000000000000002", "/images/vr-drill-0000000000000001/.."] {
            drill.write(&DrillRecord { dir: dir.into(), ..record(&id) }).unwrap();
            assert_eq!(drill.record().unwrap_err().kind(), Kind::Corrupt, "{dir}");
        }
    }

    #[test]
    fn old_reports_go_and_records_stay() {
        let temp = tempfile::tempdir().unwrap();
        for n in 0..KEPT_MAX as u64 + 3 {
            let drill = DrillState::create(temp.path(), &RunId::from_bits(n)).unwrap();
            drill.keep_report(&"x").unwrap();
            if n == 0 {
                drill.write(&record(&RunId::from_bits(n))).unwrap();
            }
        }
        forget_old(temp.path()).unwrap();
        assert_eq!(all(temp.path()).unwrap().len(), KEPT_MAX + 1);
        assert!(drills_dir(temp.path()).join(RunId::from_bits(0).as_str()).exists());
    }
}
