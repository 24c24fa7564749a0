//! What scrubs found damaged, and how far the present one has come: `scrub.json` in the replica's directory.
//!
//! A record says where damage *lies*: in the files of which point. Who *reads* it is worked out anew whenever it is
//! asked, from the change lists of the points above: they come and go, and a new head that names a block no longer
//! reads what lies below it.
//!
//! Invariants
//! - The file is replaced whole, by rename, and durable then. Its writer holds the lock of the scrub, never the
//!   writer's.
//! - What is in doubt counts as damaged: a record of a point that was folded since is taken for one of the point above.
//!   The next scrub of that point drops what was not found again.
//!
//! Format: docs/formats/replica.md.

use super::chain;
use super::files::Dir;
use super::manifest::{Manifest, POINTS_DIR, Point};
use super::upkeep::{Damage, DamageKind, ScrubTold, ScrubbedOnce};
use super::{HeadDamage, manifest};
use crate::block::{BLOCK_LEN, BlockIndex};
use crate::error::{Error, Kind, Result, advice};
use crate::name::{DiskName, PointId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) const SCRUB_FILE: &str = "scrub.json";
const SCRUB_FILE_NEW: &str = "scrub.json.new";

const FORMAT: &str = "virt-replica scrub";
const VERSION: u32 = 1;

/// Most records, and the largest file, in bytes.
pub(super) const RECORDS_MAX: usize = 4096;
const FILE_MAX: usize = 4 << 20;

/// Records of one disk of one point that are kept apart; beyond, they become one that spans them all.
const APART_MAX: usize = 64;

/// The document. Unknown fields are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    format: String,
    version: u32,
    /// Number of the scrub that is under way, or was the last.
    pub scrub: u64,
    /// Where it goes on; absent: it came to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
    /// The last one that came to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<ScrubbedOnce>,
    #[serde(default)]
    pub damage: Vec<Record>,
}

/// The next block to be read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Cursor {
    /// `None`: before the oldest point.
    pub point: Option<PointId>,
    pub disk: Option<DiskName>,
    pub block: u64,
    pub started_at: Timestamp,
    pub bytes_read: u64,
}

/// Damage, and the number of the scrub that found it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub scrub: u64,
    #[serde(flatten)]
    pub damage: Damage,
}

impl Default for State {
    fn default() -> Self {
        State { format: FORMAT.to_owned(), version: VERSION, scrub: 0, cursor: None, last: None, damage: Vec::new() }
    }
}

impl State {
    /// Of a replica never scrubbed: nothing.
    pub fn load(replica: &Dir) -> Result<State> {
        let Some(json) = replica.read(SCRUB_FILE, FILE_MAX)? else { return Ok(State::default()) };
        let corrupt = |what: &str| {
            Error::new(Kind::Corrupt, what.to_owned()).path(replica.join(SCRUB_FILE)).advise(advice::Store::ScrubAnew)
        };
        match serde_json::from_slice::<State>(&json) {
            Ok(state) if state.format == FORMAT && state.version == VERSION => Ok(state),
            Ok(_) => Err(corrupt("the account of the scrubs is of another version")),
            Err(e) => Err(corrupt("the account of the scrubs cannot be read").source(e)),
        }
    }

    /// As [`State::load`], for those who have something else to do: an account that cannot be read is as good as none.
    pub fn load_if_sound(replica: &Dir) -> State {
        Self::load(replica).unwrap_or_else(|e| {
            tracing::warn!("what scrubs found is not known: {}", e.chain());
            State::default()
        })
    }

    /// Replaces the file; durable when it returns. The caller holds the lock of the scrub.
    pub fn store(&self, replica: &Dir) -> Result<()> {
        let mut json = serde_json::to_vec_pretty(self).expect("plain data with text keys");
        json.push(b'\n');
        replica.remove_all(SCRUB_FILE_NEW)?;
        replica.write_new(SCRUB_FILE_NEW, &json)?;
        replica.rename(SCRUB_FILE_NEW, SCRUB_FILE)?;
        replica.sync()
    }

    /// Takes note of damage that the present scrub found, in the place of what earlier ones had said of the same bytes.
    pub fn add(&mut self, damage: Damage) {
        let now = self.scrub;
        self.damage.retain_mut(|Record { scrub, damage: old }| {
            let overlaps = old.is_beside(&damage) && old.start < damage.end && damage.start < old.end;
            if *scrub < now && overlaps {
                // The rest of it was not read again yet.
                old.start = damage.end;
                return old.start < old.end;
            }
            !(old.is_beside(&damage) && (old.start, old.end) == (damage.start, damage.end))
        });
        let before = |r: &&mut Record| r.scrub == now && r.damage.is_beside(&damage) && r.damage.end == damage.start;
        match self.damage.iter_mut().find(before) {
            // Neighbours found one after the other are one.
            Some(last) => last.damage.end = damage.end,
            None => self.damage.push(Record { scrub: now, damage: damage.clone() }),
        }
        self.draw_together(&damage);
    }

    /// One record for all of a disk of a point, where there are too many.
    fn draw_together(&mut self, like: &Damage) {
        let beside = |r: &Record| r.damage.is_beside(like);
        if self.damage.iter().filter(|r| beside(r)).count() <= APART_MAX {
            return;
        }
        let start = self.damage.iter().filter(|r| beside(r)).map(|r| r.damage.start).min().unwrap_or(like.start);
        let end = self.damage.iter().filter(|r| beside(r)).map(|r| r.damage.end).max().unwrap_or(like.end);
        self.damage.retain(|r| !beside(r));
        self.damage.push(Record { scrub: self.scrub, damage: Damage { start, end, ..like.clone() } });
    }

    /// A part of a point was read to its end (`disk`: `None` for what stands beside the disks): what earlier scrubs had
    /// found there and this one did not is there no more.
    pub fn forget_older(&mut self, manifest: &Manifest, point: &PointId, disk: Option<&DiskName>) {
        let now = self.scrub;
        let is_there = |d: &Damage| d.disk.as_ref() == disk && lies_in(manifest, d).is_none_or(|p| p.id == *point);
        self.damage.retain(|r| r.scrub >= now || !is_there(&r.damage));
    }

    /// For whoever asks: with the points that read what is damaged, as the manifest has them now.
    pub fn told(&self, points: &Dir, manifest: &Manifest) -> ScrubTold {
        let damage = self.damage.iter().filter_map(|r| with_readers(points, manifest, &r.damage)).collect();
        let under_way = self.cursor.as_ref().map(|c| ScrubbedOnce {
            started_at: c.started_at,
            finished_at: None,
            bytes_read: c.bytes_read,
        });
        ScrubTold { damage, under_way, last: self.last.clone() }
    }
}

/// The point or link whose files have the damage now. `None`: it went with them.
fn lies_in<'m>(manifest: &'m Manifest, damage: &Damage) -> Option<&'m Point> {
    if let Some(point) = manifest.named(&damage.point) {
        return Some(point);
    }
    // What was folded down lies in the image of the point above now.
    let above = manifest.all().into_iter().find(|p| p.id.seq() > damage.point.seq())?;
    damage.disk.as_ref().and_then(|disk| above.disk(disk)).map(|_| above)
}

/// The damage as it is now, with the later points that read it. `None`: it is there no more.
pub(super) fn with_readers(points: &Dir, manifest: &Manifest, damage: &Damage) -> Option<Damage> {
    let point = lies_in(manifest, damage)?;
    let readers = readers(points, manifest, point, damage);
    let dependants = readers.into_iter().map(|(id, _)| id).collect();
    Some(Damage { point: point.id.clone(), dependants, ..damage.clone() })
}

/// The points above `point` that read what is damaged there, oldest first, each with the damaged blocks that it sees.
fn readers(points: &Dir, manifest: &Manifest, point: &Point, damage: &Damage) -> Vec<(PointId, Vec<Range<u64>>)> {
    let Some(disk) = &damage.disk else { return Vec::new() };
    let mut left = vec![damage.blocks()];
    let mut found = Vec::new();
    let mut below = &point.id;
    for above in manifest.all().into_iter().filter(|p| p.id.seq() > point.id.seq()) {
        match above.disk(disk) {
            Some(record) if record.backing.as_ref() == Some(below) => {}
            // The disk was not there, or was begun afresh.
            _ => break,
        }
        below = &above.id;
        if damage.what == DamageKind::Content {
            left = without_what_changed(points, above, disk, left);
        }
        if left.is_empty() {
            break;
        }
        if !manifest.is_link(&above.id) {
            found.push((above.id.clone(), left.clone()));
        }
    }
    found
}

/// What is left of `ranges` where `point` has nothing of its own. A list that cannot be read has changed nothing: what
/// is in doubt counts as damaged.
fn without_what_changed(points: &Dir, point: &Point, disk: &DiskName, ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let list = match chain::changes(points, point, disk) {
        Ok(list) => list,
        Err(e) => {
            tracing::warn!(point = %point.id, %disk, "who reads the damage is not known: {}", e.chain());
            return ranges;
        }
    };
    let cut = list.header().size.blocks();
    let mut left = without(ranges, &(cut..u64::MAX));
    for run in list {
        match run {
            Ok(run) if !left.is_empty() => left = without(left, &(run.first().0..run.end())),
            _ => break,
        }
    }
    left
}

fn without(ranges: Vec<Range<u64>>, gone: &Range<u64>) -> Vec<Range<u64>> {
    let parts = |r: Range<u64>| [r.start..r.end.min(gone.start), r.start.max(gone.end)..r.end];
    ranges.into_iter().flat_map(parts).filter(|r| r.start < r.end).collect()
}

/// Of each disk of the head, what of the damage it reads.
pub(super) type InHead = BTreeMap<DiskName, Rotten>;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Rotten {
    /// Blocks whose content is not what was sealed. They may overlap.
    pub blocks: Vec<Range<u64>>,
    /// More than content is damaged: what the disk is made of cannot be told any more.
    pub beyond_repair: bool,
}

impl Rotten {
    pub fn has(&self, block: u64) -> bool {
        self.blocks.iter().any(|r| r.contains(&block))
    }

    /// Those of `blocks` that are damaged, perhaps more than once.
    pub fn within(&self, blocks: Range<u64>) -> impl Iterator<Item = u64> {
        self.blocks.iter().flat_map(move |r| r.start.max(blocks.start)..r.end.min(blocks.end))
    }

    /// Whether any of `blocks` is damaged.
    pub fn touches(&self, blocks: &Range<u64>) -> bool {
        self.blocks.iter().any(|r| r.start < blocks.end && blocks.start < r.end)
    }

    fn bytes(&self) -> u64 {
        let mut sorted = self.blocks.clone();
        sorted.sort_by_key(|r| r.start);
        let mut upto = 0;
        let count = |r: &Range<u64>| {
            let new = r.end.max(upto) - r.start.max(upto);
            upto = upto.max(r.end);
            new
        };
        sorted.iter().map(count).sum::<u64>() * BLOCK_LEN as u64
    }
}

/// What a run should know of the head. Never fails: what cannot be found out is not known.
pub(super) fn in_head(replica: &Dir, manifest: &Manifest) -> InHead {
    let state = State::load_if_sound(replica);
    let mut found = InHead::new();
    if state.damage.is_empty() {
        return found;
    }
    let (Some(head), Ok(Some(points))) = (manifest.head(), replica.sub(POINTS_DIR)) else { return found };
    for Record { damage, .. } in &state.damage {
        let (Some(disk), Some(point)) = (&damage.disk, lies_in(manifest, damage)) else { continue };
        let seen = match point.id == head.id {
            true => Some(vec![damage.blocks()]),
            false => readers(&points, manifest, point, damage).pop().filter(|(id, _)| *id == head.id).map(|(_, b)| b),
        };
        let Some(blocks) = seen else { continue };
        let rotten = found.entry(disk.clone()).or_default();
        match damage.what {
            DamageKind::Content => rotten.blocks.extend(blocks),
            DamageKind::Image | DamageKind::Changes => rotten.beyond_repair = true,
            DamageKind::Attachment => {}
        }
    }
    found
}

/// The same, for the view of the replica.
pub(super) fn head_damage(found: &InHead) -> Vec<HeadDamage> {
    let one = |(disk, rotten): (&DiskName, &Rotten)| HeadDamage {
        disk: disk.clone(),
        bytes: rotten.bytes(),
        beyond_repair: rotten.beyond_repair,
    };
    found.iter().map(one).collect()
}

impl Damage {
    /// Of the same kind in the same file.
    fn is_beside(&self, other: &Damage) -> bool {
        (&self.point, &self.disk, self.what, self.attachment)
            == (&other.point, &other.disk, other.what, other.attachment)
    }

    fn blocks(&self) -> Range<u64> {
        self.start / BLOCK_LEN as u64..self.end.div_ceil(BLOCK_LEN as u64)
    }

    /// Of blocks of a disk; where the last one ends is the disk's end.
    pub(super) fn of_block(point: &PointId, disk: &manifest::Disk, block: u64, found_at: Timestamp) -> Damage {
        let bytes = BlockIndex(block).bytes(disk.size);
        let (start, end) = (bytes.start, bytes.end);
        Damage { start, end, ..Damage::whole(point, Some(&disk.name), DamageKind::Content, found_at) }
    }

    /// Of a file as a whole.
    pub(super) fn whole(point: &PointId, disk: Option<&DiskName>, what: DamageKind, found_at: Timestamp) -> Damage {
        let (point, disk) = (point.clone(), disk.cloned());
        let (start, end) = (0, 0);
        Damage { point, disk, what, start, end, attachment: None, found_at, dependants: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::RunId;

    fn id(seq: u64) -> PointId {
        PointId::from_parts(seq, &RunId::from_bits(seq))
    }

    fn at(blocks: Range<u64>) -> Damage {
        const BLOCK: u64 = BLOCK_LEN as u64;
        let vda = DiskName::new("vda").unwrap();
        let whole = Damage::whole(&id(1), Some(&vda), DamageKind::Content, Timestamp::UNIX_EPOCH);
        Damage { start: blocks.start * BLOCK, end: blocks.end * BLOCK, ..whole }
    }

    /// `"3..5 9..10"`
    fn text(ranges: impl IntoIterator<Item = Range<u64>>) -> String {
        ranges.into_iter().map(|r| format!("{r:?}")).collect::<Vec<_>>().join(" ")
    }

    fn ranges(state: &State) -> String {
        text(state.damage.iter().map(|r| r.damage.blocks()))
    }

    #[test]
    fn neighbours_become_one_and_what_is_found_again_stays_one() {
        let mut state = State { scrub: 1, ..State::default() };
        [3..4, 4..5, 9..10].into_iter().for_each(|r| state.add(at(r)));
        assert_eq!(ranges(&state), "3..5 9..10");
        state.scrub = 2;
        state.add(at(4..5));
        assert_eq!(ranges(&state), "9..10 4..5", "what the first scrub said of these bytes is superseded");
    }

    #[test]
    fn too_many_are_drawn_together() {
        let mut state = State { scrub: 1, ..State::default() };
        (0..=APART_MAX as u64).for_each(|n| state.add(at(2 * n..2 * n + 1)));
        assert_eq!(ranges(&state), format!("0..{}", 2 * APART_MAX + 1));
    }

    #[test]
    fn what_a_newer_point_has_is_taken_off() {
        for (gone, left) in [(0..2, "3..9"), (3..9, ""), (5..6, "3..5 6..9"), (8..20, "3..8")] {
            assert_eq!(text(without(std::iter::once(3..9).collect(), &gone)), left, "{gone:?}");
        }
    }

    #[test]
    fn overlapping_ranges_are_counted_once() {
        let rotten = Rotten { blocks: vec![4..6, 0..5, 8..9], beyond_repair: false };
        assert_eq!(rotten.bytes(), 7 << 16);
        assert!(rotten.has(5) && !rotten.has(6) && rotten.touches(&(6..9)) && !rotten.touches(&(6..8)));
    }
}
