//! The durable record of a run: what any later run, the dead-man or `doctor` needs to bring a domain back onto its own
//! images (I1). One small document per domain, replaced whole: a torn record cannot exist.
//!
//! `STATE/domains/UUID/` holds `lock` (who works on the domain), `record.json` (only while a run is open;
//! `backup.json` instead while one by backup is), `thaw.json` (only while the guest is owed a thaw),
//! `after-freeze.json` (only while a hook is), `stopped.json` (only while a guest that QEMU stopped is ours to resume),
//! `last.json` (the newest report), `history.jsonl` (the reports, see `history`),
//! `generation.json` ([`generation`](super::generation)). A copy of the record's identity lies in the domain's own
//! `<metadata>`, which survives the loss of this directory and travels with the domain.
//!
//! Format: docs/formats/journal.md.

use crate::durable::{denied, read_json, remove_durably, replace, replace_json, sync_dir, to_json};
use crate::error::{Error, Kind, Result};
use crate::file_id::{BootId, FileId, Stamp};
use crate::flock::Flock;
use crate::name::DomainUuid;
use crate::replicate::state::history::{self, HISTORY};
use crate::replicate::state::record::{BackupRecord, OwedHook, StoppedRecord};
pub use crate::replicate::state::record::{DiskRecord, Record};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// There while the guest may hold its file systems at our word.
const THAW: &str = "thaw.json";

/// There while a hook is owed for what another was told before the freeze.
const HOOK: &str = "after-freeze.json";

/// The record of an open run by backup.
const BACKUP: &str = "backup.json";

/// There while a guest that QEMU stopped on a file of ours has not been let go.
const STOPPED: &str = "stopped.json";

/// How the dead-man calls itself when it holds a domain's lock, and how long it is waited for.
pub const DEADMAN: &str = "dead-man";
const DEADMAN_WITHIN: Duration = Duration::from_secs(20);

/// Where this host keeps its own state.
pub const STATE_DIR: &str = "/var/lib/virt-replica/source";

/// One domain's directory of state, with its lock held: one hand on a domain at a time. Released when dropped, also by
/// `kill -9`.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    _lock: Flock,
}

/// Who holds a domain's lock, as written into it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Holder {
    /// Process id of the holder.
    pub pid: u32,
    /// What the holder does, for example `sync to URL` or `dead-man`.
    pub what: String,
    /// When the holder took the lock, by this host's clock.
    pub since: Timestamp,
}

impl Journal {
    /// Takes the domain's lock. `Busy`, naming the holder, when another program has it. What the journal says from here
    /// on is durable: a run that died behind a rename and before its fsync is made good, or a commit would begin whose
    /// intent a power cut takes back.
    pub fn open(state: &Path, uuid: &DomainUuid, what: &str, now: Timestamp) -> Result<Journal> {
        let dir = domain_dir(state, uuid);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|e| denied(Error::io("cannot create the directory of the domain's state", &dir, e)))?;
        let path = dir.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| denied(Error::io("cannot open the domain's lock", &path, e)))?;
        let locked = Flock::exclusive(file).map_err(|e| Error::io("cannot lock the domain", &path, e))?;
        let lock = locked.map_err(|mut file| busy(&mut file, &path))?;
        let holder = Holder { pid: std::process::id(), what: what.to_owned(), since: now };
        let text = serde_json::to_vec(&holder).expect("a holder is plain data");
        let mut file = lock.file();
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(&text))
            .map_err(|e| Error::io("cannot write the domain's lock", &path, e))?;
        sync_dir(&dir)?;
        Ok(Journal { dir, _lock: lock })
    }

    /// As [`Journal::open`], and waits while it is the dead-man who holds the lock: after a crash it lets the guest go,
    /// which takes a moment, and nobody should be turned away for that.
    pub fn open_after_deadman(state: &Path, uuid: &DomainUuid, what: &str, now: Timestamp) -> Result<Journal> {
        let give_up_at = Instant::now() + DEADMAN_WITHIN;
        loop {
            let opened = Self::open(state, uuid, what, now);
            let deadman = || holder(state, uuid).is_ok_and(|h| h.is_none_or(|h| h.what == DEADMAN));
            match opened {
                Err(e) if e.kind() == Kind::Busy && deadman() && Instant::now() < give_up_at => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                other => return other,
            }
        }
    }

    /// Reads the record of the open run. `None`: no run by overlay is open. Fails with `Corrupt` for an unknown
    /// version.
    pub fn record(&self) -> Result<Option<Record>> {
        read_record(&self.dir.join("record.json"))
    }

    /// Durable when it returns.
    pub fn write(&self, record: &Record) -> Result<()> {
        replace_json(&self.dir, "record.json", record)
    }

    /// The run is put right; durable when it returns.
    pub fn close(&self) -> Result<()> {
        self.remove("record.json")
    }

    fn remove(&self, name: &str) -> Result<()> {
        remove_durably(&self.dir, name, "cannot remove the settled record")
    }

    /// The open run by backup, if there is one.
    pub fn backup(&self) -> Result<Option<BackupRecord>> {
        read_backup(&self.dir.join(BACKUP))
    }

    /// Durable when it returns.
    pub fn write_backup(&self, record: &BackupRecord) -> Result<()> {
        replace_json(&self.dir, BACKUP, record)
    }

    /// Whether the guest may have been asked to hold its file systems, and has not said since that it let them go.
    pub fn is_thaw_owed(&self) -> Result<bool> {
        Stamp::of(&self.dir.join(THAW)).map(|stamp| stamp.is_some())
    }

    /// The guest is about to be asked to hold its file systems. Durable when it returns.
    pub fn owe_thaw(&self) -> Result<()> {
        replace(&self.dir, THAW, b"{}\n")
    }

    /// It has let them go; durable when it returns.
    pub fn thaw_is_paid(&self) -> Result<()> {
        self.remove(THAW)
    }

    /// The hook that has to be run, whatever else happens.
    pub fn owed_hook(&self) -> Result<Option<OwedHook>> {
        read_json(&self.dir.join(HOOK))
    }

    /// Durable when it returns.
    pub fn owe_hook(&self, hook: &OwedHook) -> Result<()> {
        replace_json(&self.dir, HOOK, hook)
    }

    /// It was run; durable when it returns.
    pub fn hook_is_paid(&self) -> Result<()> {
        self.remove(HOOK)
    }

    /// The guest that stands for an I/O error that came under our hands.
    pub fn stopped(&self) -> Result<Option<StoppedRecord>> {
        read_json(&self.dir.join(STOPPED))
    }

    /// It is ours to let go. Durable when it returns.
    pub fn owe_resume(&self, stopped: &StoppedRecord) -> Result<()> {
        replace(&self.dir, STOPPED, &to_json(stopped))
    }

    /// It runs again, or its QEMU has ended; durable when it returns.
    pub fn resume_is_paid(&self) -> Result<()> {
        self.remove(STOPPED)
    }

    /// Nothing is left of the backup; durable when it returns.
    pub fn close_backup(&self) -> Result<()> {
        self.remove(BACKUP)
    }

    /// Keeps a report: the newest one whole, all of them in the history. A failed run is a report too. One of the
    /// two that cannot be written keeps the other from nothing.
    pub fn keep_report(&self, report: &impl Serialize) -> Result<()> {
        let newest = replace(&self.dir, "last.json", &to_json(report));
        let line = serde_json::to_vec(report).expect("a report is plain data");
        newest.and(history::append(&self.dir, &line))
    }

    /// Refuses, before anything is frozen, if the record of a commit might not find room here.
    pub fn check_room(&self) -> Result<()> {
        history::check_room(&self.dir)
    }
}

/// The open record of a domain, read without its lock; for `status` and `doctor`.
pub fn peek(state: &Path, uuid: &DomainUuid) -> Result<Option<Record>> {
    read_record(&domain_dir(state, uuid).join("record.json"))
}

/// Whether a domain's guest is owed a thaw, read without its lock; for `doctor`.
pub fn peek_thaw(state: &Path, uuid: &DomainUuid) -> Result<bool> {
    Stamp::of(&domain_dir(state, uuid).join(THAW)).map(|stamp| stamp.is_some())
}

/// The guest that stands for an I/O error that came under our hands, read without the domain's lock; for `doctor`.
pub fn peek_stopped(state: &Path, uuid: &DomainUuid) -> Result<Option<StoppedRecord>> {
    read_json(&domain_dir(state, uuid).join(STOPPED))
}

/// Whether a hook is owed for a domain, read without its lock; for `doctor` and the dead-man.
pub fn peek_hook(state: &Path, uuid: &DomainUuid) -> Result<bool> {
    Stamp::of(&domain_dir(state, uuid).join(HOOK)).map(|stamp| stamp.is_some())
}

/// The open run by backup of a domain, read without its lock; for `plan` and `doctor`.
pub fn peek_backup(state: &Path, uuid: &DomainUuid) -> Result<Option<BackupRecord>> {
    read_backup(&domain_dir(state, uuid).join(BACKUP))
}

/// The newest report as stored, or `None`.
pub fn last_report<T: serde::de::DeserializeOwned>(state: &Path, uuid: &DomainUuid) -> Result<Option<T>> {
    let path = domain_dir(state, uuid).join("last.json");
    read_json(&path)
}

/// The newest reports, oldest first: as many as the last 256 KiB of the history hold. What cannot be read there (the
/// line a crash cut short, a report of another version) is left out.
pub fn recent_reports<T: serde::de::DeserializeOwned>(state: &Path, uuid: &DomainUuid) -> Result<Vec<T>> {
    let path = domain_dir(state, uuid).join(HISTORY);
    match history::tail(&path) {
        Ok(tail) => Ok(tail.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io("cannot read the history", path, e)),
    }
}

/// Who works on the domain right now, learnt without touching its lock: whoever has the lock's file open.
pub fn holder(state: &Path, uuid: &DomainUuid) -> Result<Option<Holder>> {
    let path = domain_dir(state, uuid).join("lock");
    let Some(lock) = Stamp::of(&path)? else { return Ok(None) };
    // A lock that was never written has never been held; one that is being written is, by somebody we see next time.
    let Ok(Some(holder)) = read_json::<Holder>(&path) else { return Ok(None) };
    Ok(is_held(lock.id, &holder).then_some(holder))
}

/// Whether the program that a lock names has that very file open: it works on the domain right now.
pub fn is_held(lock: FileId, holder: &Holder) -> bool {
    match fs::read_dir(format!("/proc/{}/fd", holder.pid)) {
        Ok(open) => open.flatten().any(|fd| matches!(Stamp::of(&fd.path()), Ok(Some(s)) if s.id == lock)),
        // Somebody else's program: it is there, and that is all we may know.
        Err(e) => e.kind() == std::io::ErrorKind::PermissionDenied,
    }
}

/// Which boot of this host it is. `None` where the kernel does not tell.
pub fn boot_id() -> Option<String> {
    BootId::current().map(|boot| boot.to_string())
}

/// Domains with state on this host, whether or not libvirt still knows them.
pub fn known_domains(state: &Path) -> Result<Vec<DomainUuid>> {
    let dir = state.join("domains");
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("cannot list the state", &dir, e)),
    };
    let mut uuids: Vec<DomainUuid> = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter_map(|name| DomainUuid::new(name).ok())
        .collect();
    uuids.sort();
    Ok(uuids)
}

pub(in crate::replicate) fn domain_dir(state: &Path, uuid: &DomainUuid) -> PathBuf {
    state.join("domains").join(uuid.as_str())
}

fn busy(file: &mut File, path: &Path) -> Error {
    let mut text = String::new();
    let holder =
        file.take(4096).read_to_string(&mut text).ok().and_then(|_| serde_json::from_str::<Holder>(&text).ok());
    let what = match holder {
        Some(h) => format!("another program works on this domain: {} (pid {}, since {:.0})", h.what, h.pid, h.since),
        None => "another program works on this domain".to_owned(),
    };
    Error::new(Kind::Busy, what).path(path).hint("wait for it to end; the lock is free as soon as its holder is gone")
}

fn read_record(path: &Path) -> Result<Option<Record>> {
    let Some(record) = read_json::<Record>(path)? else { return Ok(None) };
    known_version(record.format, path)?;
    Ok(Some(record))
}

fn read_backup(path: &Path) -> Result<Option<BackupRecord>> {
    let Some(record) = read_json::<BackupRecord>(path)? else { return Ok(None) };
    known_version(record.format, path)?;
    Ok(Some(record))
}

pub(in crate::replicate) fn known_version(format: u32, path: &Path) -> Result<()> {
    if format == 1 {
        return Ok(());
    }
    Err(Error::new(Kind::Corrupt, format!("the record has the unknown version {format}"))
        .path(path)
        .hint("it was written by a newer virt-replica: use that one to settle the domain"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::block::DiskSize;
    use crate::image::{Format, Layer};
    use crate::name::{DiskName, DomainName, RunId};
    use crate::replicate::settle::decide::Phase;

    pub(crate) fn record(phase: Phase) -> Record {
        Record {
            format: 1,
            run: RunId::from_bits(7),
            domain: DomainName::new("db01").unwrap(),
            uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
            instance: Some(3),
            boot: None,
            persistent: true,
            phase,
            resume_after: false,
            ran: true,
            commit_denied: None,
            disks: vec![DiskRecord {
                name: DiskName::new("vda").unwrap(),
                base: Layer {
                    path: "/pool/a.qcow2".into(),
                    format: Format::Qcow2,
                    block_device: false,
                    data_file: None,
                },
                overlay: "/pool/a.vr-0000.qcow2".into(),
                size: DiskSize(1 << 30),
                base_stamp: None,
                overlay_id: None,
                complete_at: None,
                live_only: false,
                off_commit: false,
            }],
            started_at: Timestamp::UNIX_EPOCH,
            frozen_at: None,
            point: None,
        }
    }

    #[test]
    fn a_second_hand_is_told_who_holds_the_domain() {
        let state = tempfile::tempdir().unwrap();
        let uuid = record(Phase::Frozen).uuid;
        let first = Journal::open(state.path(), &uuid, "sync to dr1", Timestamp::UNIX_EPOCH).unwrap();
        let e = Journal::open(state.path(), &uuid, "doctor", Timestamp::UNIX_EPOCH).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy);
        assert_eq!(holder(state.path(), &uuid).unwrap().unwrap().what, "sync to dr1");
        assert!(e.what().contains("sync to dr1") && e.what().contains(&std::process::id().to_string()), "{e}");
        drop(first);
        assert_eq!(holder(state.path(), &uuid).unwrap(), None);
        Journal::open(state.path(), &uuid, "doctor", Timestamp::UNIX_EPOCH).unwrap();
    }

    #[test]
    fn a_record_is_there_until_it_is_closed() {
        let state = tempfile::tempdir().unwrap();
        let written = record(Phase::CommitIntent);
        let journal = Journal::open(state.path(), &written.uuid, "test", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(journal.record().unwrap(), None);
        journal.write(&written).unwrap();
        assert_eq!(peek(state.path(), &written.uuid).unwrap(), Some(written.clone()));
        assert_eq!(known_domains(state.path()).unwrap(), std::slice::from_ref(&written.uuid));
        journal.close().unwrap();
        journal.close().unwrap();
        assert_eq!(journal.record().unwrap(), None);
    }

    /// A power cut takes back what was seen and not synced: whoever takes the lock syncs before it believes, and a
    /// removal that is found done is made durable like one's own.
    #[cfg(feature = "failpoints")]
    #[test]
    fn what_a_killed_run_left_unsynced_is_made_durable_first() {
        use crate::failpoint::traced;
        let state = tempfile::tempdir().unwrap();
        let uuid = record(Phase::Frozen).uuid;
        let synced = format!("sync {}", domain_dir(state.path(), &uuid).display());
        let open = || Journal::open(state.path(), &uuid, "test", Timestamp::UNIX_EPOCH).unwrap();
        let (journal, steps) = traced(open);
        assert_eq!(steps, [synced.as_str()]);
        journal.write(&record(Phase::Frozen)).unwrap();
        for what in ["the record is removed", "it was removed, and the directory not synced"] {
            assert_eq!(traced(|| journal.close().unwrap()).1, [synced.as_str()], "{what}");
        }
        assert_eq!(traced(|| journal.thaw_is_paid().unwrap()).1, [synced.as_str()]);
        std::fs::remove_dir_all(domain_dir(state.path(), &uuid)).unwrap();
        journal.close().unwrap();
        // A generation that is found raised.
        let raise =
            |n| crate::replicate::state::generation::raise(state.path(), &uuid, crate::name::Generation(n)).unwrap();
        raise(3);
        assert_eq!(traced(|| raise(3)).1, [synced.as_str()]);
    }

    /// `status` shows the last point even if the runs after it failed, and reads past what a crash cut short.
    #[test]
    fn the_history_is_read_from_its_end() {
        let state = tempfile::tempdir().unwrap();
        let uuid = record(Phase::Frozen).uuid;
        assert_eq!(recent_reports::<u64>(state.path(), &uuid).unwrap(), Vec::<u64>::new());
        let journal = Journal::open(state.path(), &uuid, "test", Timestamp::UNIX_EPOCH).unwrap();
        for n in 0..60_000u64 {
            if n % 1000 == 0 || n >= 59_998 {
                journal.keep_report(&n).unwrap();
            }
        }
        let path = domain_dir(state.path(), &uuid).join("history.jsonl");
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"cut\": ").unwrap();
        let all = recent_reports::<u64>(state.path(), &uuid).unwrap();
        assert_eq!(all.len(), 62);
        assert_eq!(all[60..], [59_998, 59_999]);
        fs::write(&path, [b"7\n".as_slice(), &b"1\n".repeat(history::HISTORY_TAIL as usize / 2)].concat()).unwrap();
        assert!(recent_reports::<u64>(state.path(), &uuid).unwrap().iter().all(|n| *n == 1));
    }

    #[test]
    fn a_record_of_the_future_is_refused_and_kept() {
        let state = tempfile::tempdir().unwrap();
        let mut future = record(Phase::Frozen);
        let journal = Journal::open(state.path(), &future.uuid, "test", Timestamp::UNIX_EPOCH).unwrap();
        future.format = 2;
        journal.write(&future).unwrap();
        assert_eq!(journal.record().unwrap_err().kind(), Kind::Corrupt);
        assert!(domain_dir(state.path(), &future.uuid).join("record.json").exists());
    }
}
