//! Lists come back as they were written, damage is found, and merged lists say what the points hold.

use super::*;
use crate::block::BLOCK_LEN;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn size_of(blocks: u64) -> DiskSize {
    DiskSize((blocks * BLOCK_LEN as u64).saturating_sub(100))
}

fn digest(n: u8) -> Digest {
    Digest([n; 32])
}

const FROM: Digest = Digest([0xf0; 32]);
const TO: Digest = Digest([0x70; 32]);

/// A list, one character per block of the disk: `1` to `9` a digest, `0` zeros, `.` not changed.
fn list(blocks: &str, from_root: Option<Digest>, to_root: Digest) -> Vec<u8> {
    let header = ChangesHeader { size: size_of(blocks.len() as u64), from_root };
    let mut writer = ChangesWriter::new(Vec::new(), &header).unwrap();
    for (n, c) in (0..).zip(blocks.chars()) {
        if let Some(value) = c.to_digit(10) {
            writer.push(BlockIndex(n), digest(value as u8)).unwrap();
        }
    }
    writer.finish(to_root).unwrap()
}

/// The same notation, from runs.
fn text(runs: impl Iterator<Item = Result<Run>>, blocks: usize) -> Result<String> {
    let mut out = vec!['.'; blocks];
    let mut next = 0;
    for run in runs {
        let run = run?;
        assert!(run.first().0 >= next && run.count() > 0, "runs ascend");
        next = run.end();
        for n in run.first().0..run.end() {
            out[n as usize] = match &run {
                Run::Zero { .. } => '0',
                Run::Digests { first, digests } => (b'0' + digests[(n - first.0) as usize].0[0]) as char,
            };
        }
    }
    Ok(out.into_iter().collect())
}

/// Reads a whole list and insists on its end.
fn read(bytes: &[u8]) -> Result<(ChangesHeader, Vec<Run>, ChangesTrailer)> {
    let mut reader = ChangesReader::new(bytes)?;
    let runs = reader.by_ref().collect::<Result<Vec<Run>>>()?;
    let trailer = *reader.trailer().expect("read to its end");
    Ok((*reader.header(), runs, trailer))
}

fn damaged(result: Result<impl std::fmt::Debug>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    error.to_string()
}

#[test]
fn neighbours_become_one_run() {
    let (header, runs, trailer) = read(&list("12.00034.5", Some(FROM), TO)).unwrap();
    assert_eq!(header, ChangesHeader { size: size_of(10), from_root: Some(FROM) });
    let digests =
        |first, n: &[u8]| Run::Digests { first: BlockIndex(first), digests: n.iter().copied().map(digest).collect() };
    let zeros = Run::Zero { first: BlockIndex(3), count: 3 };
    assert_eq!(runs, [digests(0, &[1, 2]), zeros, digests(6, &[3, 4]), digests(9, &[5])]);
    assert_eq!(trailer, ChangesTrailer { runs: 4, to_root: TO });
}

#[test]
fn long_runs_are_cut_and_huge_ones_too() {
    let blocks = RUN_DIGESTS_MAX as u64 * 2 + 1;
    let mut writer = ChangesWriter::new(Vec::new(), &ChangesHeader { size: size_of(blocks), from_root: None }).unwrap();
    (0..blocks).for_each(|n| writer.push(BlockIndex(n), digest(1)).unwrap());
    let (_, runs, _) = read(&writer.finish(TO).unwrap()).unwrap();
    assert_eq!(runs.iter().map(Run::count).collect::<Vec<_>>(), [1024, 1024, 1]);

    let huge = ChangesHeader { size: DiskSize(u64::MAX), from_root: None };
    let mut writer = ChangesWriter::new(Vec::new(), &huge).unwrap();
    writer.push_zero(BlockIndex(0), huge.size.blocks()).unwrap();
    let bytes = writer.finish(TO).unwrap();
    let runs = ChangesReader::new(&bytes[..]).unwrap().take(3).collect::<Result<Vec<Run>>>().unwrap();
    assert!(runs.windows(2).all(|w| w[0].end() == w[1].first().0), "without gaps");
    let reader = ChangesReader::new(&bytes[..]).unwrap();
    assert_eq!(reader.map(|r| r.unwrap().count()).sum::<u64>(), huge.size.blocks());
}

#[test]
fn every_flipped_bit_is_found() {
    let whole = list("12.000.4", Some(FROM), TO);
    for bit in 0..whole.len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let error = read(&bytes).expect_err(&format!("bit {bit}"));
        assert!(matches!(error.kind(), Kind::Corrupt | Kind::Protocol), "bit {bit}: {error}");
    }
}

#[test]
fn a_torn_tail_and_a_long_one_are_found() {
    let mut whole = list("12.000.4", Some(FROM), TO);
    for len in 0..whole.len() {
        assert!(damaged(read(&whole[..len])).contains("ends in the middle"), "{len}");
    }
    whole.push(0);
    assert!(damaged(read(&whole)).contains("after its end"));
}

/// Lists with a right checksum and wrong content, as a hostile or broken writer can make them.
#[test]
fn a_right_checksum_does_not_excuse_nonsense() {
    let run = |first: u64, count: u32, kind: u32, digests: &[Digest]| {
        let mut out = [&first.to_le_bytes()[..], &count.to_le_bytes(), &kind.to_le_bytes()].concat();
        digests.iter().for_each(|d| out.extend_from_slice(&d.0));
        out
    };
    let header = ChangesHeader { size: size_of(10), from_root: None };
    let seal = |mut bytes: Vec<u8>, runs: u64| {
        bytes.extend_from_slice(&run(runs, 0, KIND_END, &[TO]));
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        bytes
    };
    let one = run(3, 1, KIND_DIGESTS, &[digest(1)]);
    assert!(read(&seal([header.encode(), one.clone()].concat(), 1)).is_ok());
    for (why, runs, count) in [
        ("is empty", run(3, 0, KIND_ZERO, &[]), 1),
        ("beyond the disk", run(10, 1, KIND_ZERO, &[]), 1),
        ("beyond the disk", run(9, 2, KIND_ZERO, &[]), 1),
        ("beyond the disk", run(u64::MAX, u32::MAX, KIND_ZERO, &[]), 1),
        ("ascending", [run(4, 1, KIND_ZERO, &[]), one.clone()].concat(), 2),
        ("ascending", [one.clone(), one.clone()].concat(), 2),
        ("ascending", [run(0, 4, KIND_ZERO, &[]), one.clone()].concat(), 2),
        ("unknown kind", run(3, 1, 3, &[]), 1),
        ("zero block", run(3, 2, KIND_DIGESTS, &[digest(1), Digest::ZERO]), 1),
        ("checksum", one.clone(), 2),
    ] {
        let message = damaged(read(&seal([header.encode(), runs].concat(), count)));
        assert!(message.contains(why), "{why}: {message}");
    }
    // A run longer than any is refused before its digests are read: there are none.
    let large = ChangesHeader { size: DiskSize(u64::MAX), from_root: None };
    let hostile = [large.encode(), run(0, u32::MAX, KIND_DIGESTS, &[])].concat();
    assert!(damaged(read(&hostile)).contains("longer than any"));
    let mut flags = header.encode();
    flags[BANNER.line().len()] = 2;
    assert!(damaged(read(&seal(flags, 0))).contains("contradicts"));
    for newer in ["virt-replica changes 2\n", "virt-replica changes 4000000000\n and so on"] {
        assert_eq!(read(newer.as_bytes()).unwrap_err().kind(), Kind::Protocol);
    }
    assert!(damaged(read(&[b'v'; 100])).contains("does not begin like"));
}

#[test]
fn after_an_error_there_is_no_trailer_and_nothing_more() {
    let whole = list("1.2", None, TO);
    let mut bytes = whole.clone();
    *bytes.last_mut().unwrap() ^= 1;
    let mut reader = ChangesReader::new(&bytes[..]).unwrap();
    assert!(reader.by_ref().any(|run| run.is_err()));
    assert!(reader.next().is_none() && reader.trailer().is_none());
    assert!(reader.into_trailer().is_err());
    assert_eq!(ChangesReader::new(&whole[..]).unwrap().into_trailer().unwrap().to_root, TO);
}

#[test]
fn trouble_of_the_file_is_not_damage_of_the_list() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::from_raw_os_error(5))
        }
    }
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::Error::from_raw_os_error(28))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let whole = list("1", None, TO);
    for len in [0, 10, 40, whole.len() - 1, whole.len()] {
        let error = ChangesReader::new(whole[..len].chain(Broken)).and_then(ChangesReader::into_trailer).unwrap_err();
        assert_eq!(error.kind(), Kind::Io, "{len}");
    }
    let header = ChangesHeader { size: size_of(1), from_root: None };
    assert_eq!(ChangesWriter::new(Broken, &header).err().unwrap().kind(), Kind::Space);
}

#[test]
#[should_panic(expected = "ascending")]
fn a_block_is_named_once() {
    let header = ChangesHeader { size: size_of(10), from_root: None };
    let mut writer = ChangesWriter::new(Vec::new(), &header).unwrap();
    writer.push_zero(BlockIndex(3), 3).unwrap();
    writer.push(BlockIndex(5), digest(1)).unwrap();
}

/// Merges lists given oldest first, each with the roots that join them.
fn merged(lists: &[&str], from_root: Option<Digest>) -> Result<String> {
    let root = |n: usize| Digest([100 + n as u8; 32]);
    let bytes: Vec<Vec<u8>> = lists
        .iter()
        .enumerate()
        .map(|(n, blocks)| list(blocks, if n == 0 { from_root } else { Some(root(n)) }, root(n + 1)))
        .collect();
    let readers = bytes.iter().map(|b| ChangesReader::new(&b[..]).unwrap());
    let mut merged = MergedChanges::new(readers)?;
    assert_eq!(merged.header().from_root, from_root);
    assert_eq!(merged.to_root(), None, "not before the end");
    let text = text(merged.by_ref(), lists.last().unwrap().len())?;
    assert_eq!(merged.to_root(), Some(root(lists.len())));
    Ok(text)
}

#[test]
fn the_newest_word_counts() {
    for (lists, wanted) in [
        (&["11111111", "..2..0.2", "...33..."][..], "11233012"),
        (&["000000", ".1.2.3"], "010203"),
        (&["......", "......"], "......"),
        (&["123456", "......"], "123456"),
        (&["1", "......"], "100000"),
        (&["123456", ".7"], "17"),
        // Cut off and grown again: the old digests no longer hold, named or not.
        (&["123456", "..", "......"], "120000"),
        (&["123456", "..", "....7."], "120070"),
        (&["......", "..", "......"], "..0000"),
        (&["", "12", "", "1."], "10"),
    ] {
        assert_eq!(merged(lists, Some(FROM)).unwrap(), wanted, "{lists:?}");
    }
}

#[test]
fn lists_that_do_not_join_are_not_merged() {
    let a = list("12", None, FROM);
    let readers = |second: &[u8]| [&a[..], second].map(|b| b.to_vec());
    let merge = |lists: [Vec<u8>; 2]| {
        let merged = MergedChanges::new(lists.iter().map(|b| ChangesReader::new(&b[..]).unwrap()))?;
        merged.collect::<Result<Vec<Run>>>().map(drop)
    };
    assert!(merge(readers(&list(".3", Some(FROM), TO))).is_ok());
    assert!(damaged(merge(readers(&list(".3", Some(TO), TO)))).contains("does not start where"));
    assert!(damaged(merge(readers(&list(".3", None, TO)))).contains("does not start where"));
    assert_eq!(MergedChanges::<&[u8]>::new([]).err().unwrap().kind(), Kind::Usage);
    // Damage behind everything that could matter is still damage.
    let mut torn = list("11111111", None, FROM);
    *torn.last_mut().unwrap() ^= 1;
    assert!(damaged(merge([torn, list("3", Some(FROM), TO)])).contains("checksum"));
}

/// What a point holds: blocks that are not zero.
type Point = BTreeMap<u64, u8>;

fn root_of_point(blocks: u64, point: &Point) -> Digest {
    let mut builder = RootBuilder::new(size_of(blocks));
    point.iter().for_each(|(&b, &n)| builder.push_block(BlockIndex(b), digest(n)));
    builder.finish()
}

proptest! {
    /// A history of a disk that grows, shrinks and changes, written down as lists: every point is found again in them.
    #[test]
    fn lists_laid_over_each_other_are_the_point(
        history in prop::collection::vec((0u64..40, prop::collection::btree_map(0u64..40, 0u8..5, 0..20)), 1..7),
    ) {
        let (mut point, mut root, mut lists) = (Point::new(), None, Vec::<Vec<u8>>::new());
        for (blocks, changes) in &history {
            point.retain(|b, _| b < blocks);
            let header = ChangesHeader { size: size_of(*blocks), from_root: root };
            let mut writer = ChangesWriter::new(Vec::new(), &header).unwrap();
            for (&block, &n) in changes.iter().filter(|(b, _)| *b < blocks) {
                writer.push(BlockIndex(block), digest(n)).unwrap();
                point.insert(block, n);
            }
            point.retain(|_, n| *n != 0);
            root = Some(root_of_point(*blocks, &point));
            lists.push(writer.finish(root.unwrap()).unwrap());
            let readers = || lists.iter().map(|b| ChangesReader::new(&b[..]).unwrap());
            prop_assert_eq!(MergedChanges::new(readers()).unwrap().check_root().unwrap(), root.unwrap());
        }
        // Merging a part first makes no difference: that is what pruning does.
        for middle in 1..lists.len() {
            let mut part = MergedChanges::new(lists[middle..].iter().map(|b| ChangesReader::new(&b[..]).unwrap())).unwrap();
            let mut writer = ChangesWriter::new(Vec::new(), &part.header()).unwrap();
            part.by_ref().for_each(|run| writer.push_run(&run.unwrap()).unwrap());
            let pruned = writer.finish(part.to_root().unwrap()).unwrap();
            let all = lists[..middle].iter().chain([&pruned]).map(|b| ChangesReader::new(&b[..]).unwrap());
            prop_assert_eq!(MergedChanges::new(all).unwrap().check_root().unwrap(), root.unwrap());
        }
    }
}

#[test]
fn lists_that_amount_to_another_root_are_not_believed() {
    let bytes = list("12", None, TO);
    let merge = |bytes: &[u8]| MergedChanges::new([ChangesReader::new(bytes).unwrap()]).unwrap().check_root();
    assert!(damaged(merge(&bytes)).contains("do not amount"));
    assert_eq!(merge(&list("12", Some(FROM), TO)).unwrap_err().kind(), Kind::Usage);
}

/// Written by version 1; it must be read for ever. Never made anew: a reader that refuses it has lost a format.
const GOLDEN: &[u8] = include_bytes!("../../../tests/fixtures/formats/v1/changes.bin");

#[test]
fn golden_list() {
    assert!(list("12.000.4", Some(FROM), TO) == GOLDEN, "the writer no longer writes version 1");
    let (header, runs, trailer) = read(GOLDEN).unwrap();
    assert_eq!((header.size, header.from_root, trailer.to_root), (size_of(8), Some(FROM), TO));
    assert_eq!(text(runs.into_iter().map(Ok), 8).unwrap(), "12.000.4");
}

#[test]
fn what_others_name_is_left_out() {
    for (runs, others, left) in [
        ("11.00022", "........", "11.00022"),
        ("11.00022", "11111111", "........"),
        ("11100022", ".0..3..1", "1.10.02."),
        ("111.2222", "...0....", "111.2222"),
        ("00000000", "1......1", ".000000."),
        (".1.1.1.1", "1.1.1.1.", ".1.1.1.1"),
        ("........", "12121212", "........"),
    ] {
        let reader = |blocks: &str| ChangesReader::new(std::io::Cursor::new(list(blocks, Some(FROM), TO))).unwrap();
        let found = Without::new(reader(runs), reader(others));
        assert_eq!(text(found, runs.len()).unwrap(), left, "{runs} without {others}");
    }
    let mut broken = list("1111", Some(FROM), TO);
    let at = broken.len() - 40;
    broken[at] ^= 1;
    let found = Without::new(
        ChangesReader::new(std::io::Cursor::new(list("2222", Some(FROM), TO))).unwrap(),
        ChangesReader::new(std::io::Cursor::new(broken)).unwrap(),
    );
    assert_eq!(text(found, 4).unwrap(), "....", "damage that was not reached is not met");
}
