//! Bitmaps that lie in every place, and budgets of every size.

use super::*;
use crate::engine::pump::tests::{Disk, Fault, Memory, always, pattern};
use std::collections::BTreeSet;

const B: usize = BLOCK_LEN;

fn options(every_runs: u32) -> AuditOptions {
    AuditOptions { every_runs, bytes_max: u64::MAX, within: Duration::from_secs(3600) }
}

/// A disk and its head, a letter a block: `=` as in the head, `D` changed and marked, `m` marked and not changed,
/// `L` changed and not marked, `0` a hole in both, `h` data that became a hole without a mark, `n` the other way round.
struct Bench {
    head: Vec<u8>,
    disk: Vec<u8>,
    dirty: Vec<ByteRange>,
}

impl Bench {
    fn new(letters: &str) -> Bench {
        let (mut head, mut disk, mut dirty) = (Vec::new(), Vec::new(), Vec::new());
        for (i, letter) in letters.chars().enumerate() {
            let old = pattern(B, i as u8);
            let new = pattern(B, 128 ^ i as u8);
            let zero = vec![0; B];
            let (was, is) = match letter {
                '=' | 'm' => (&old, &old),
                'D' | 'L' => (&old, &new),
                '0' => (&zero, &zero),
                'h' => (&old, &zero),
                'n' => (&zero, &new),
                other => panic!("no letter {other}"),
            };
            head.extend_from_slice(was);
            disk.extend_from_slice(is);
            if matches!(letter, 'D' | 'm') {
                dirty.push(ByteRange::new((i * B) as u64, ((i + 1) * B) as u64));
            }
        }
        Bench { head, disk, dirty }
    }

    /// Cuts the disk and its head within the last block.
    fn cut(mut self, by: usize) -> Bench {
        self.head.truncate(self.head.len() - by);
        self.disk.truncate(self.disk.len() - by);
        if let Some(last) = self.dirty.last_mut() {
            last.end = last.end.min(self.disk.len() as u64);
        }
        self
    }

    fn size(&self) -> DiskSize {
        DiskSize(self.disk.len() as u64)
    }

    fn audit(&self, cursor: u64, options: &AuditOptions, run: u64, fault: Fault) -> Result<AuditStats> {
        let image = Disk::new(self.disk.clone());
        let replica = Memory::new(&self.head, self.disk.len(), fault);
        let disk = DiskName::new("vda").unwrap();
        let auditor = Auditor { image: &image, replica: &replica, disk: &disk, size: self.size(), dirty: &self.dirty };
        let plan = plan(cursor, self.size(), options).expect("something to audit");
        auditor.run(&plan, &RunId::from_bits(run), 3, &always)
    }
}

#[test]
fn slices_that_follow_one_another_cover_the_disk_in_the_promised_number_of_runs() {
    const MIB: u64 = 1 << 20;
    for size in [512, 4 * MIB - 512, 4 * MIB, 4 * MIB + 512, 100 * MIB, 64 << 30, (8 << 40) + 512] {
        for every_runs in [1, 2, 3, 7, 100, 4000] {
            let (mut cursor, mut runs) = (0, 0);
            loop {
                let slice = plan(cursor, DiskSize(size), &options(every_runs)).unwrap();
                assert_eq!(slice.from, cursor, "no gap, {size} bytes in {every_runs} runs");
                assert!(slice.to > slice.from);
                runs += 1;
                cursor = slice.to;
                if cursor == size {
                    break;
                }
            }
            assert!(runs <= every_runs, "{size} bytes took {runs} runs of {every_runs}");
        }
    }
}

#[test]
fn a_cursor_behind_the_end_begins_anew_and_nothing_is_planned_where_nothing_is_wanted() {
    let size = DiskSize(100 << 20);
    assert_eq!(plan(1 << 40, size, &options(10)).unwrap().from, 0);
    for size in [size, DiskSize((100 << 20) + 512)] {
        assert_eq!(plan(size.0, size, &options(10)).unwrap().from, 0, "the end itself, of a group or within one");
    }
    assert_eq!(plan(0, size, &options(0)), None);
    assert_eq!(plan(0, DiskSize(0), &options(10)), None);
}

#[test]
fn every_lie_is_found_and_nothing_that_is_marked_is_called_one() {
    let long = |s: &str| s.repeat(70 / s.len() + 1);
    for (letters, lies, first) in [
        ("=".to_owned(), 0, None),
        (long("=D"), 0, None),
        (long("mD0="), 0, None),
        ("L".to_owned(), 1, Some(0)),
        (format!("{}L", long("=")), 1, Some(71)),
        (format!("{}L{}", long("D="), long("=")), 1, Some(72)),
        (format!("={}L", "0".repeat(130)), 1, Some(131)),
        ("===h===".to_owned(), 1, Some(3)),
        ("0000n".to_owned(), 1, Some(4)),
        ("LDLmLhn=".to_owned(), 5, Some(0)),
    ] {
        for cut in [0, 512, B - 512] {
            let bench = Bench::new(&letters).cut(cut);
            let stats = bench.audit(0, &options(1), 1, Fault::None).unwrap();
            assert_eq!(stats.lies, lies, "{letters} cut by {cut}");
            assert_eq!(stats.first_lie, first.map(|b| b * B as u64), "{letters} cut by {cut}");
            assert_eq!(stats.next_offset, bench.size().0, "the round is complete");
        }
    }
}

#[test]
fn budgets_cut_a_slice_short_and_the_next_run_goes_on_where_it_ended() {
    let bench = Bench::new(&"=".repeat(64 * 7));
    let tight = AuditOptions { bytes_max: 1, ..options(1) };
    let none = bench.audit(0, &tight, 1, Fault::None).unwrap();
    assert_eq!(none.next_offset, 0, "the sample alone has spent it: the slice is as it was");

    // The sample reads at most 64 blocks; what is left is enough for a group and less than for all.
    let some = AuditOptions { bytes_max: (64 + 70) * B as u64, ..options(1) };
    let (mut cursor, mut seen) = (0, BTreeSet::new());
    for run in 0..10 {
        let stats = bench.audit(cursor, &some, run, Fault::None).unwrap();
        assert!(stats.bytes_read <= some.bytes_max + 3 * GROUP_LEN, "three workers overshoot by a group each at most");
        assert!(stats.next_offset > cursor, "it gets on");
        seen.insert(cursor);
        cursor = stats.next_offset;
        if cursor == bench.size().0 {
            break;
        }
    }
    assert_eq!(cursor, bench.size().0, "the round was completed: {seen:?}");
    assert!(seen.len() > 1, "and not in one run: {seen:?}");

    let timeless = AuditOptions { within: Duration::ZERO, ..options(1) };
    assert_eq!(bench.audit(0, &timeless, 1, Fault::None).unwrap().next_offset, 0);
}

#[test]
fn the_sample_finds_what_the_slice_is_far_away_from() {
    // The slice is the first group; everything else was written behind the bitmap's back.
    let bench = Bench::new(&format!("{}{}", "=".repeat(64), "L".repeat(64 * 6)));
    for run in 0..20 {
        let stats = bench.audit(0, &options(7), run, Fault::None).unwrap();
        assert!(stats.lies > 0, "run {run}");
        assert!(stats.first_lie >= Some(GROUP_LEN));
        assert_eq!(stats.next_offset, GROUP_LEN);
    }
}

#[test]
fn samples_of_other_runs_and_disks_are_others() {
    let seeds: BTreeSet<[u8; 32]> = (0..10)
        .flat_map(|run| ["vda", "vdb"].map(|d| seed(&RunId::from_bits(run), &DiskName::new(d).unwrap())))
        .collect();
    assert_eq!(seeds.len(), 20);
    let mut random = Random::new(seeds.first().unwrap());
    let drawn: BTreeSet<u64> = (0..100).map(|_| random.below(1 << 40)).collect();
    assert_eq!(drawn.len(), 100);
    assert!(*drawn.last().unwrap() < 1 << 40 && *drawn.last().unwrap() > 1 << 38, "all over the disk");
}

#[test]
fn holes_cost_nothing_and_a_marked_disk_is_not_read() {
    let empty = Bench::new(&"0".repeat(200)).audit(0, &options(1), 1, Fault::None).unwrap();
    assert_eq!((empty.bytes_read, empty.lies, empty.blocks), (0, 0, 200));
    let marked = Bench::new(&"D".repeat(200)).audit(0, &options(1), 1, Fault::None).unwrap();
    assert_eq!((marked.bytes_read, marked.lies, marked.blocks), (0, 0, 0));
}

#[test]
fn what_goes_wrong_ends_the_audit_with_its_error() {
    let bench = Bench::new(&"=D".repeat(100));
    assert_eq!(bench.audit(0, &options(1), 1, Fault::TooFewNodes).unwrap_err().kind(), Kind::Protocol);
    let mut image = Disk::new(bench.disk.clone());
    image.fail_at = Some(64 * B as u64);
    let replica = Memory::new(&bench.head, bench.disk.len(), Fault::None);
    let disk = DiskName::new("vda").unwrap();
    let auditor = Auditor { image: &image, replica: &replica, disk: &disk, size: bench.size(), dirty: &bench.dirty };
    let plan = plan(0, bench.size(), &options(1)).unwrap();
    let e = auditor.run(&plan, &RunId::from_bits(1), 3, &always).unwrap_err();
    assert_eq!(e.kind(), Kind::Io);
}
