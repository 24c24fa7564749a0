//! Marks that are asked of a QEMU that takes its time, while a guest waits on its overlays.

use super::*;
use crate::hypervisor::BitmapView;
use crate::hypervisor::backup::{Backup, BackupJob};
use crate::image::Chain;
use crate::name::DomainUuid;
use crate::replica::Consistency;
use crate::replicate::plan::forecast::tests::{disk, plan};
use crate::replicate::plan::planned::DiskPlan;
use crate::replicate::target_gate::watched;
use jiff::Timestamp;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A QEMU that marks one block of each disk. `slow`: it answers only once the run is cut.
struct Qemu<'a> {
    cut: &'a Cut,
    slow: bool,
    asked: AtomicUsize,
}

impl Qemu<'_> {
    fn answer(&self) -> Vec<ByteRange> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let began = Instant::now();
        while self.slow && self.cut.check().is_ok() {
            assert!(began.elapsed() < Duration::from_secs(30), "nobody watches the limits");
            std::thread::sleep(Duration::from_millis(5));
        }
        vec![ByteRange::new(0, 65536)]
    }

    /// The marks of all disks of a plan, while a thread watches the limits. The guest's overlays get too old with the
    /// first question about one disk.
    fn marks(&self, plan: &mut Plan, still: &Frozen) -> Result<Marked> {
        let good = || match self.slow && self.asked.load(Ordering::SeqCst) > 0 {
            true => Err(Error::new(Kind::Interrupted, "the overlay is older than it may get, 1s")),
            false => Ok(()),
        };
        watched(self.cut, &good, || Marks { tracking: self, backups: self }.of(plan, still, self.cut))
    }
}

impl Tracking for Qemu<'_> {
    fn bitmaps(&self, _: &DomainUuid, _: &[Layer]) -> Result<Vec<Vec<BitmapView>>> {
        unreachable!("not asked here")
    }

    fn add_bitmap(&self, _: &DomainUuid, _: &[Layer], _: &str) -> Result<()> {
        unreachable!("not asked here")
    }

    fn remove_bitmap(&self, _: &DomainUuid, _: &Layer, _: &str) -> Result<()> {
        unreachable!("not asked here")
    }

    fn dirty(&self, _: &DomainUuid, wanted: &[(Layer, String)]) -> Result<Vec<Vec<ByteRange>>> {
        match wanted.len() {
            1 => Ok(vec![self.answer()]),
            _ => Err(Error::new(Kind::Refused, "one of the bitmaps is inconsistent")),
        }
    }
}

impl Backups for Qemu<'_> {
    fn backup_socket(&self, _: &DomainUuid) -> Result<PathBuf> {
        unreachable!("not asked here")
    }

    fn begin_backup(&self, _: &DomainUuid, _: &Backup) -> Result<()> {
        unreachable!("not asked here")
    }

    fn running_backup(&self, _: &DomainUuid) -> Result<BackupJob> {
        unreachable!("not asked here")
    }

    fn end_backup(&self, _: &DomainUuid, _: &Backup) -> Result<()> {
        unreachable!("not asked here")
    }

    fn marked(&self, _: &DomainUuid, _: &Path, _: &Layer, _: &str) -> Result<Vec<ByteRange>> {
        Ok(self.answer())
    }
}

const DISKS: [&str; 4] = ["vda", "vdb", "vdc", "vdd"];

fn by_bitmap() -> Plan {
    let tracked = |name| DiskPlan { bitmap: Some("of the head".into()), ..disk(name, Mode::Bitmap, 0) };
    plan(DISKS.map(tracked).into())
}

fn standing(plan: &Plan, source: impl Fn(&Chain) -> Source) -> Frozen {
    Frozen {
        disks: plan.disks.iter().map(|disk| (disk.name.clone(), source(&disk.chain))).collect(),
        frozen_at: Timestamp::UNIX_EPOCH,
        consistency: Consistency::Crash,
        consistency_reason: None,
        held: None,
        freeze: None,
        may_start: false,
    }
}

fn ways() -> [fn(&Chain) -> Source; 2] {
    [|chain| Source::Chain(chain.clone()), |_| Source::Export { socket: "/s".into(), name: "x".into() }]
}

/// A limit that is reached while QEMU answers about the first disk: no other disk is asked for, and the limit is told.
#[test]
fn a_limit_ends_the_questions_about_the_marks() {
    for way in ways() {
        let cut = Cut::default();
        let qemu = Qemu { cut: &cut, slow: true, asked: AtomicUsize::new(0) };
        let mut plan = by_bitmap();
        let still = standing(&plan, way);
        let e = qemu.marks(&mut plan, &still).unwrap_err();
        assert_eq!((e.kind(), e.what()), (Kind::Interrupted, "the overlay is older than it may get, 1s"));
        assert_eq!(qemu.asked.load(Ordering::SeqCst), 1);
        assert!(plan.disks.iter().all(|disk| disk.mode == Mode::Bitmap), "a limit is no doubt about the tracking");
    }
}

/// A run that is cut already asks nothing at all.
#[test]
fn a_run_that_was_cut_asks_for_no_marks() {
    let cut = Cut::default();
    cut.because(Error::new(Kind::Interrupted, "stopped by a signal"));
    let qemu = Qemu { cut: &cut, slow: false, asked: AtomicUsize::new(0) };
    let mut plan = by_bitmap();
    let still = standing(&plan, ways()[0]);
    assert_eq!(qemu.marks(&mut plan, &still).unwrap_err().what(), "stopped by a signal");
    assert_eq!(qemu.asked.load(Ordering::SeqCst), 0);
}

#[test]
fn within_the_limits_every_disk_has_its_marks() {
    for way in ways() {
        let cut = Cut::default();
        let qemu = Qemu { cut: &cut, slow: false, asked: AtomicUsize::new(0) };
        let mut plan = by_bitmap();
        let still = standing(&plan, way);
        let marked = qemu.marks(&mut plan, &still).unwrap();
        let names: Vec<&str> = marked.keys().map(DiskName::as_str).collect();
        assert_eq!(names, DISKS);
        assert!(marked.values().all(|ranges| *ranges == [ByteRange::new(0, 65536)]), "{marked:?}");
    }
}
