//! What is done about a recorded backup, with a hypervisor of a few lines.

use super::*;
use crate::block::ByteRange;
use crate::image::Layer;
use crate::name::{DiskName, DomainName};
use crate::replicate::fake::FakeHypervisor;
use jiff::Timestamp;

/// What runs, and what was asked. `stuck`: the job does not end when it is told.
struct Fake {
    running: Mutex<BackupJob>,
    stuck: bool,
    told: Mutex<u32>,
}

impl Fake {
    fn with(running: BackupJob) -> Fake {
        Fake { running: Mutex::new(running), stuck: false, told: Mutex::new(0) }
    }
}

impl Backups for Fake {
    fn backup_socket(&self, _: &DomainUuid) -> Result<PathBuf> {
        unreachable!("settling begins nothing")
    }

    fn begin_backup(&self, _: &DomainUuid, _: &Backup) -> Result<()> {
        unreachable!("settling begins nothing")
    }

    fn running_backup(&self, _: &DomainUuid) -> Result<BackupJob> {
        Ok(self.running.lock().unwrap().clone())
    }

    fn end_backup(&self, _: &DomainUuid, backup: &Backup) -> Result<()> {
        *self.told.lock().unwrap() += 1;
        if self.stuck {
            return Err(Error::new(Kind::Refused, "no"));
        }
        let mut running = self.running.lock().unwrap();
        match &*running {
            BackupJob::Running(job) => assert!(job.is(backup), "only our own is ended"),
            other => panic!("there is nothing to end: {other:?}"),
        }
        *running = BackupJob::None;
        Ok(())
    }

    fn marked(&self, _: &DomainUuid, _: &Path, _: &Layer, _: &str) -> Result<Vec<ByteRange>> {
        unreachable!("settling asks for no marks")
    }
}

/// A state directory with a record, and the files that it names.
struct Left {
    dir: tempfile::TempDir,
    record: BackupRecord,
}

impl Left {
    fn behind() -> Left {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str| BackupDisk {
            name: DiskName::new(name).unwrap(),
            scratch: dir.path().join(format!("{name}.vr-00000000.scratch.qcow2")),
        };
        let backup = Backup { socket: dir.path().join("b.sock"), disks: vec![disk("vda"), disk("vdb")] };
        for path in files(&backup) {
            std::fs::write(path, b"x").unwrap();
        }
        let record = BackupRecord {
            format: 1,
            run: RunId::from_bits(7),
            domain: DomainName::new("db01").unwrap(),
            uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
            instance: Some(3),
            boot: Some("boot".into()),
            ran: true,
            backup,
            started_at: Timestamp::UNIX_EPOCH,
        };
        let left = Left { dir, record };
        left.journal().write_backup(&left.record).unwrap();
        left
    }

    fn journal(&self) -> Journal {
        Journal::open(self.dir.path(), &self.record.uuid, "test", Timestamp::UNIX_EPOCH).unwrap()
    }

    fn settle(&self, backups: &Fake) -> Result<Vec<String>> {
        // The guest runs: what is done about one that stands is told by `settle_tests.rs`.
        settle(&FakeHypervisor::running(&self.record.uuid), backups, &self.journal(), &self.record.uuid)
    }

    fn files_left(&self) -> usize {
        files(&self.record.backup).filter(|f| f.exists()).count()
    }
}

fn other(backup: &Backup) -> Backup {
    let disks = vec![BackupDisk { name: backup.disks[0].name.clone(), scratch: "/theirs.qcow2".into() }];
    Backup { socket: "/theirs.sock".into(), disks }
}

#[test]
fn our_job_is_ended_and_all_of_it_removed() {
    let left = Left::behind();
    let fake = Fake::with(BackupJob::Running(left.record.backup.clone()));
    let done = left.settle(&fake).unwrap();
    assert!(done[0].contains("ended the backup job") && done.len() == 4, "{done:?}");
    assert_eq!((left.files_left(), left.journal().backup().unwrap()), (0, None));
    // Again, and where nothing was ever begun, there is nothing to do.
    assert_eq!(left.settle(&fake).unwrap(), [""; 0]);
    assert_eq!(*fake.told.lock().unwrap(), 1);
}

#[test]
fn a_job_that_ended_by_itself_leaves_its_files_to_remove() {
    let left = Left::behind();
    let done = left.settle(&Fake::with(BackupJob::None)).unwrap();
    assert!(done.len() == 3 && done.iter().all(|d| d.starts_with("removed ")), "{done:?}");
    assert_eq!((left.files_left(), left.journal().backup().unwrap()), (0, None));
}

/// What a libvirtd that died inside the begin comes back with: to abort it does nothing, and our files are not its.
#[test]
fn a_hollow_job_is_left_alone_and_our_files_go() {
    let left = Left::behind();
    let fake = Fake::with(BackupJob::Hollow);
    left.settle(&fake).unwrap();
    assert_eq!((left.files_left(), *fake.told.lock().unwrap()), (0, 0));
}

/// libvirt has one job for a domain: one of another program's says that ours has ended.
#[test]
fn another_programs_job_is_left_alone() {
    let left = Left::behind();
    let theirs = other(&left.record.backup);
    let fake = Fake::with(BackupJob::Running(theirs.clone()));
    left.settle(&fake).unwrap();
    assert_eq!(*fake.running.lock().unwrap(), BackupJob::Running(theirs));
    assert_eq!((left.files_left(), *fake.told.lock().unwrap()), (0, 0));
}

#[test]
fn a_job_that_shares_a_file_with_ours_is_for_a_person() {
    let left = Left::behind();
    for (socket, scratch) in [(true, false), (false, true)] {
        let mut mixed = other(&left.record.backup);
        if socket {
            mixed.socket = left.record.backup.socket.clone();
        }
        if scratch {
            mixed.disks[0].scratch = left.record.backup.disks[1].scratch.clone();
        }
        let fake = Fake::with(BackupJob::Running(mixed));
        let e = left.settle(&fake).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict);
        assert!(e.hint_text().unwrap().contains("domjobabort"), "{e}");
        assert_eq!((left.files_left(), *fake.told.lock().unwrap()), (3, 0));
        assert!(left.journal().backup().unwrap().is_some(), "the record stays");
        assert!(explain(&fake, &left.record).unwrap().1);
    }
}

#[test]
fn a_job_that_cannot_be_ended_keeps_record_and_files() {
    let left = Left::behind();
    let fake = Fake { stuck: true, ..Fake::with(BackupJob::Running(left.record.backup.clone())) };
    assert_eq!(left.settle(&fake).unwrap_err().kind(), Kind::Refused);
    assert_eq!(left.files_left(), 3);
    assert_eq!(left.journal().backup().unwrap().as_ref(), Some(&left.record));
    let (said, halted) = explain(&fake, &left.record).unwrap();
    assert!(!halted && said[1].contains("still runs") && said[2].contains("is there"), "{said:?}");
}

#[test]
fn a_record_of_a_later_version_is_not_touched() {
    let left = Left::behind();
    left.journal().write_backup(&BackupRecord { format: 2, ..left.record.clone() }).unwrap();
    assert_eq!(left.settle(&Fake::with(BackupJob::None)).unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(left.files_left(), 3);
}
