//! The stream as a whole: what was put in comes out, from any cut; nothing that was tampered with does.

use super::record::{Codec, HEAD_LEN, Head, RecordKind};
use super::*;
use crate::block::PIECE_LEN;
use proptest::prelude::*;

/// A disk and what happens to it, one letter per block: `D` compressible data, `R` incompressible data, `P` its second
/// piece, `z` zeros, `.` nothing. The last block has `tail` bytes.
#[derive(Debug, Clone)]
struct Script {
    letters: String,
    tail: usize,
}

fn script(letters: &str, tail: usize) -> Script {
    Script { letters: letters.to_owned(), tail }
}

/// Bytes that no compressor can shorten, the same ones for ever.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// The block in the point the patch starts from.
fn old_block(n: u64, len: usize) -> Vec<u8> {
    noise(1000 + n, len)
}

impl Script {
    fn size(&self) -> DiskSize {
        let blocks = self.letters.len() as u64;
        DiskSize((blocks * BLOCK_LEN as u64).saturating_sub((BLOCK_LEN - self.tail) as u64))
    }

    fn header(&self) -> Header {
        Header {
            domain: DomainUuid::new("6b1f0c9e-0000-4000-8000-00000000d15c").unwrap(),
            disk: DiskName::new("vda").unwrap(),
            size_from: DiskSize(BLOCK_LEN as u64),
            size: self.size(),
            from_root: Some(Digest([7; 32])),
        }
    }

    fn block_len(&self, n: u64) -> usize {
        BlockIndex(n).bytes(self.size()).len() as usize
    }

    /// The block after the patch.
    fn new_block(&self, n: u64, letter: char) -> Vec<u8> {
        let len = self.block_len(n);
        let mut block = old_block(n, len);
        match letter {
            'D' => block.iter_mut().enumerate().for_each(|(i, b)| *b = b"all work and no play "[i % 21]),
            'R' => block = noise(n, len),
            'P' => block[PIECE_LEN..].iter_mut().take(PIECE_LEN).for_each(|b| *b = !*b),
            'z' => block.fill(0),
            _ => {}
        }
        block
    }

    /// What the decoder must say, header and trailer left out.
    fn records(&self) -> Vec<Item> {
        let mut out: Vec<Item> = Vec::new();
        for (n, letter) in (0..).zip(self.letters.chars()) {
            let block = BlockIndex(n);
            let bytes = self.new_block(n, letter);
            let digest = block_digest(&bytes);
            match letter {
                '.' => {}
                'z' => match out.last_mut() {
                    Some(Item::Zero { first, count }) if first.0 + *count == n => *count += 1,
                    _ => out.push(Item::Zero { first: block, count: 1 }),
                },
                'P' => {
                    let mut pieces = Vec::new();
                    PieceMask(0b10).gather(&bytes, &mut pieces);
                    out.push(Item::Pieces { block, digest, mask: PieceMask(0b10), bytes: pieces });
                }
                _ => out.push(Item::Data { block, digest, bytes }),
            }
        }
        out
    }

    fn items(&self) -> Vec<Item> {
        let mut items = vec![Item::Header(self.header())];
        items.extend(self.records());
        let records = items.len() as u64 - 1;
        items.push(Item::Trailer(Trailer { records, to_root: TO_ROOT }));
        items
    }

    /// Each record encoded by itself.
    fn encoded_records(&self) -> Vec<Vec<u8>> {
        let mut encoder = RecordEncoder::new(Compression::default()).unwrap();
        let encode = |item: &Item| {
            let mut out = Vec::new();
            match item {
                Item::Data { block, digest, bytes } => encoder.data(*block, *digest, bytes, &mut out),
                Item::Pieces { block, digest, mask, .. } => {
                    encoder.pieces(*block, *digest, *mask, &self.new_block(block.0, 'P'), &mut out);
                }
                Item::Zero { first, count } => encoder.zero(*first, *count, &mut out),
                Item::Header(_) | Item::Trailer(_) => unreachable!("not records"),
            }
            out
        };
        self.records().iter().map(encode).collect()
    }

    fn stream(&self) -> Vec<u8> {
        stream_of(&self.header(), &self.encoded_records())
    }
}

const TO_ROOT: Digest = Digest([9; 32]);

fn stream_of(header: &Header, records: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut tail = StreamTail::begin(header, &mut out);
    for record in records {
        tail.observe(record);
        out.extend_from_slice(record);
    }
    tail.trailer(TO_ROOT, &mut out);
    out
}

fn decode(stream: &[u8]) -> Result<Vec<Item>> {
    decode_cut(stream, &[])
}

/// Pushes the stream cut at these places.
fn decode_cut(stream: &[u8], cuts: &[usize]) -> Result<Vec<Item>> {
    let mut decoder = Decoder::new(Limits::default())?;
    let mut items = Vec::new();
    let mut cuts: Vec<usize> = cuts.iter().map(|c| c % (stream.len() + 1)).collect();
    cuts.push(stream.len());
    cuts.sort_unstable();
    let mut at = 0;
    for cut in cuts {
        decoder.push(&stream[at..cut]);
        at = cut;
        while let Some(item) = decoder.next_item()? {
            items.push(item);
        }
    }
    decoder.finish()?;
    Ok(items)
}

/// Decodes and applies as a target does: every digest is compared. Yields the blocks that were written.
fn apply(script: &Script, stream: &[u8]) -> Result<Vec<(u64, Vec<u8>)>> {
    let mut blocks = Vec::new();
    for item in decode(stream)? {
        match item {
            Item::Data { block, digest, bytes } => {
                check_block(block, &bytes, digest)?;
                blocks.push((block.0, bytes));
            }
            Item::Pieces { block, digest, mask, bytes } => {
                let mut whole = old_block(block.0, script.block_len(block.0));
                mask.scatter(&bytes, &mut whole);
                check_block(block, &whole, digest)?;
                blocks.push((block.0, whole));
            }
            Item::Zero { first, count } => blocks.extend((first.0..first.0 + count).map(|n| (n, Vec::new()))),
            Item::Header(_) | Item::Trailer(_) => {}
        }
    }
    Ok(blocks)
}

/// The streams on which tampering is tried out: short last blocks keep them small. Together they have every kind of
/// record, stored and compressed.
fn small_scripts() -> [Script; 4] {
    [script("zz.z", 9), script("z.R", 150), script(".zD", 700), script("zP", PIECE_LEN + 200)]
}

fn corrupt(result: Result<impl std::fmt::Debug>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    error.to_string()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn what_goes_in_comes_out_from_any_cut(
        letters in "[DRPz.]{0,9}", tail in PIECE_LEN + 1..=BLOCK_LEN, cuts in prop::collection::vec(any::<usize>(), 0..40),
    ) {
        let script = script(&letters, tail);
        let stream = script.stream();
        let items = decode_cut(&stream, &cuts).unwrap();
        prop_assert!(items == script.items());
        let blocks = apply(&script, &stream).unwrap();
        prop_assert_eq!(blocks.len(), letters.chars().filter(|&c| c != '.').count());
    }

    #[test]
    fn garbage_is_refused_and_never_panics(head in 0usize..200, garbage in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut stream = small_scripts()[1].stream();
        stream.truncate(head);
        stream.extend_from_slice(&garbage);
        prop_assert!(decode(&stream).is_err());
    }
}

#[test]
fn byte_by_byte_is_a_cut_like_any_other() {
    for script in small_scripts() {
        let stream = script.stream();
        let everywhere: Vec<usize> = (0..stream.len()).collect();
        assert_eq!(decode_cut(&stream, &everywhere).unwrap(), script.items());
    }
}

#[test]
fn no_flipped_bit_changes_a_disk() {
    for script in small_scripts() {
        let stream = script.stream();
        let whole = apply(&script, &stream).unwrap();
        let compressed = compressed_payloads(&script, &stream);
        for bit in 0..stream.len() * 8 {
            let mut flipped = stream.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // A zstd frame has a bit that means nothing; flipping it yields the very same bytes, which is no damage.
            // Everywhere else a flip has to be an error.
            match apply(&script, &flipped) {
                Err(e) => assert!(matches!(e.kind(), Kind::Corrupt | Kind::Protocol), "bit {bit}: {e}"),
                Ok(blocks) => {
                    assert!(compressed.iter().any(|range| range.contains(&(bit / 8))), "bit {bit} goes unnoticed");
                    assert!(blocks == whole, "bit {bit} changes the disk");
                }
            }
        }
    }
}

/// Where the compressed payloads lie in a stream.
fn compressed_payloads(script: &Script, stream: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut at = script.header().encode().len();
    let mut out = Vec::new();
    while at < stream.len() {
        let head = Head::decode(&stream[at..]).unwrap();
        let payload = at + HEAD_LEN..at + HEAD_LEN + head.payload_len as usize;
        at = payload.end;
        if head.codec == Codec::Zstd {
            out.push(payload);
        }
    }
    out
}

#[test]
fn the_small_streams_have_what_they_are_for() {
    let kinds: Vec<(RecordKind, Codec)> = small_scripts()
        .iter()
        .flat_map(Script::encoded_records)
        .map(|r| Head::decode(&r).map(|h| (h.kind, h.codec)).unwrap())
        .collect();
    for wanted in [
        (RecordKind::Zero, Codec::Stored),
        (RecordKind::Data, Codec::Stored),
        (RecordKind::Data, Codec::Zstd),
        (RecordKind::Pieces, Codec::Stored),
    ] {
        assert!(kinds.contains(&wanted), "{wanted:?} is missing");
    }
}

#[test]
fn a_stream_cut_anywhere_is_not_a_patch() {
    for script in small_scripts() {
        let stream = script.stream();
        for len in 0..stream.len() {
            let message = corrupt(decode(&stream[..len]));
            assert!(message.contains("before its trailer"), "{len}: {message}");
        }
    }
}

#[test]
fn nothing_may_follow_the_trailer() {
    let mut stream = small_scripts()[1].stream();
    stream.push(0);
    assert!(corrupt(decode(&stream)).contains("after its trailer"));
}

#[test]
fn records_left_out_repeated_or_from_another_patch_are_found() {
    let (a, b) = (script("RzR.", 100), script("Rz.R", 100));
    let (mut records, header) = (a.encoded_records(), a.header());
    // The trailer of the whole patch behind a part of its records.
    let trailer_len = HEAD_LEN + record::TRAILER_LEN;
    let whole = a.stream();
    let trailer = &whole[whole.len() - trailer_len..];
    let with = |header: &Header, records: &[Vec<u8>]| [header.encode(), records.concat(), trailer.to_vec()].concat();
    assert!(decode(&with(&header, &records)).is_ok());
    assert!(corrupt(decode(&with(&header, &records[..2]))).contains("counts 3 records, and 2 came"));
    assert!(corrupt(decode(&with(&header, &b.encoded_records()))).contains("not those its trailer was made for"));
    assert!(
        corrupt(decode(&with(&Header { size: DiskSize(1 << 40), ..header.clone() }, &records))).contains("not those")
    );
    records.swap(0, 1);
    assert!(corrupt(decode(&with(&header, &records))).contains("record 1 (block 0): it is not in ascending order"));
    records[0] = records[1].clone();
    assert!(corrupt(decode(&with(&header, &records))).contains("ascending order"));
}

/// Headers with a valid guard, as a hostile peer can make them.
#[test]
fn hostile_records_are_refused_before_they_cost_anything() {
    let script = script("....", 100);
    let digest = Digest([1; 32]);
    let data = Head {
        kind: RecordKind::Data,
        codec: Codec::Stored,
        mask: PieceMask(0),
        payload_len: BLOCK_LEN as u32,
        first: 0,
        count: 1,
        digest,
    };
    let pieces = Head { kind: RecordKind::Pieces, mask: PieceMask(1), payload_len: PIECE_LEN as u32, ..data };
    for (why, head) in [
        ("a length that is not the block's", Head { payload_len: u32::MAX, ..data }),
        ("a length just one too short", Head { payload_len: BLOCK_LEN as u32 - 1, ..data }),
        ("compressed to as much as it was", Head { codec: Codec::Zstd, ..data }),
        ("compressed to 4 GiB", Head { codec: Codec::Zstd, payload_len: u32::MAX, ..data }),
        ("a whole block where the last is short", Head { first: 3, ..data }),
        ("a block beyond the disk", Head { first: 4, ..data }),
        ("the block with the largest number", Head { first: u64::MAX, ..data }),
        ("two blocks of data", Head { count: 2, ..data }),
        ("no block of data", Head { count: 0, ..data }),
        ("data with the digest of zeros", Head { digest: Digest::ZERO, ..data }),
        ("data with a mask", Head { mask: PieceMask(1), ..data }),
        ("pieces without any", Head { mask: PieceMask(0), payload_len: 0, ..pieces }),
        ("pieces that become zeros", Head { digest: Digest::ZERO, ..pieces }),
        ("pieces beyond the disk", Head { first: 3, mask: PieceMask(2), ..pieces }),
        ("pieces of another length", Head { payload_len: 2 * PIECE_LEN as u32, ..pieces }),
        ("no zeros at all", Head::zero(0, 0)),
        ("zeros beyond the disk", Head::zero(1, 4)),
        ("zeros around the number range", Head::zero(1, u64::MAX)),
        ("zeros with a payload", Head { payload_len: 5, ..Head::zero(0, 1) }),
        ("zeros with a digest", Head { digest, ..Head::zero(0, 1) }),
        ("zeros compressed", Head { codec: Codec::Zstd, ..Head::zero(0, 1) }),
        ("a trailer with a long payload", Head { payload_len: u32::MAX, ..Head::end(0, digest) }),
        ("a trailer with blocks", Head { count: 1, ..Head::end(0, digest) }),
    ] {
        let mut decoder = Decoder::new(Limits::default()).unwrap();
        decoder.push(&script.header().encode());
        assert!(matches!(decoder.next_item(), Ok(Some(Item::Header(_)))));
        decoder.push(&head.encode());
        // The header alone is enough: nobody waits for a payload that may never be allowed.
        let error = decoder.next_item().expect_err(why);
        assert_eq!((error.kind(), error.context().disk.as_deref()), (Kind::Corrupt, Some("vda")), "{why}: {error}");
        assert_eq!(error.context().offset_bytes, Some(script.header().encode().len() as u64), "{why}");
        assert!(corrupt(decoder.next_item()).contains("refused already"), "{why}: an error is final");
        assert!(decoder.finish().is_err(), "{why}");
    }
    for (place, value) in [(0, 0), (0, 5), (1, 2)] {
        let mut bytes = data.encode();
        bytes[place] = value;
        let check = check_of(&bytes[..HEAD_LEN - CHECK_LEN]);
        bytes[HEAD_LEN - CHECK_LEN..].copy_from_slice(&check);
        let message = corrupt(decode(&[&script.header().encode()[..], &bytes].concat()));
        assert!(message.contains("unknown"), "{message}");
    }
}

#[test]
fn a_payload_that_unpacks_to_anything_but_its_block_is_refused() {
    let script = script("D", 5000);
    for (why, content) in [
        ("a bomb", vec![0u8; 64 << 20]),
        ("one byte more", vec![1u8; 5001]),
        ("one byte less", vec![1u8; 4999]),
        ("nothing", vec![]),
    ] {
        let payload = zstd::bulk::compress(&content, 1).unwrap();
        assert!(payload.len() < 5000, "{why}: the length alone must not give it away");
        let head = Head {
            kind: RecordKind::Data,
            codec: Codec::Zstd,
            mask: PieceMask(0),
            payload_len: payload.len() as u32,
            first: 0,
            count: 1,
            digest: Digest([1; 32]),
        };
        let message = corrupt(decode(&[&script.header().encode()[..], &head.encode(), &payload].concat()));
        assert!(message.contains("record 0 (block 0): it d"), "{why}: {message}");
    }
}

#[test]
fn a_header_is_believed_only_as_a_whole() {
    let header = script("R", 100).header();
    let good = header.encode();
    let banner_len = BANNER.line().len();
    /// The header with `bytes` put in at `at` and the guard made anew.
    fn with(good: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut out = good[..good.len() - CHECK_LEN].to_vec();
        out[at..at + bytes.len()].copy_from_slice(bytes);
        let check = check_of(&out);
        out.extend_from_slice(&check);
        out
    }
    // No flags, a size before, any size after, a root before.
    let before = |size: u64, root: u8| [&[0; 4][..], &size.to_le_bytes(), &9u64.to_le_bytes(), &[root; 32]].concat();
    assert!(
        corrupt(decode(&with(&good, banner_len + 8, &before(0, 0)))).contains("before its trailer"),
        "this is fine"
    );
    for (what, why, stream) in [
        ("length of 4 GiB", "length of its header", with(&good, banner_len, &u32::MAX.to_le_bytes())),
        ("length of nothing", "length of its header", with(&good, banner_len, &0u32.to_le_bytes())),
        ("blocks of 4 KiB", "blocks of another length", with(&good, banner_len + 4, &4096u32.to_le_bytes())),
        ("unknown flag", "unknown flags", with(&good, banner_len + 8, &5u32.to_le_bytes())),
        ("a plain image of a domain", "and yet of a domain", with(&good, banner_len + 8, &3u32.to_le_bytes())),
        ("from nothing, with a root", "yet from something", with(&good, banner_len + 8, &before(0, 1))),
        ("from nothing, with a size", "yet from something", with(&good, banner_len + 8, &before(1, 0))),
        ("a path as domain", "names no domain", with(&good, banner_len + 60, b"../../../../../etc/passwd-----------")),
        ("a path as disk", "names no disk", with(&good, banner_len + 97, b"../")),
        ("a disk longer than its field", "length of its disk's name", with(&good, banner_len + 96, &[200])),
        ("no newline", "does not begin like", vec![b'v'; 64]),
        ("another text", "does not begin like", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
    ] {
        // Enough bytes behind it that nothing is refused merely for being short.
        let message = corrupt(decode(&[stream, vec![0; 512]].concat()));
        assert!(message.contains(why), "{what}: {message}");
    }
    let mut newer = good.clone();
    newer[banner_len - 2] = b'2';
    assert_eq!(decode(&newer).unwrap_err().kind(), Kind::Protocol);
    let mut decoder = Decoder::new(Limits { size_max: DiskSize(99) }).unwrap();
    decoder.push(&good);
    assert_eq!(decoder.next_item().unwrap_err().kind(), Kind::Refused);
}

#[test]
fn headers_of_every_shape_round_trip() {
    let header = script("RRR", 1).header();
    for header in [
        Header { size_from: DiskSize(0), from_root: None, ..header.clone() },
        Header { disk: DiskName::new("x".repeat(32)).unwrap(), ..header.clone() },
        Header { size: DiskSize(0), ..header.clone() },
        Header { disk: DiskName::new("a").unwrap(), size: DiskSize(i64::MAX as u64), ..header },
        Header::plain(None, DiskSize(1)),
        Header::plain(Some((DiskSize(5), Digest([3; 32]))), DiskSize(7)),
    ] {
        let items = decode(&stream_of(&header, &[])).unwrap();
        assert_eq!(items[0], Item::Header(header));
    }
}

/// A reader of before there were plain images refuses the flag as one that it does not know; so the bit is the third.
#[test]
fn a_plain_patch_bears_its_flag() {
    let plain = Header::plain(Some((DiskSize(1), Digest([3; 32]))), DiskSize(1));
    assert!(plain.is_plain() && !script("R", 100).header().is_plain());
    assert_eq!(plain.encode()[BANNER.line().len() + 8..][..4], [3, 0, 0, 0]);
    assert_eq!(Header::plain(None, DiskSize(1)).encode()[BANNER.line().len() + 8..][..4], [2, 0, 0, 0]);
    // Byte for byte, for ever.
    let patch = stream_of(&plain, &[]);
    assert!(patch == GOLDEN_PLAIN, "{patch:?}");
    assert_eq!(
        to_root_at_end(&GOLDEN_PLAIN[GOLDEN_PLAIN.len() - TRAILER_LEN..]),
        to_root_of(&decode(GOLDEN_PLAIN).unwrap())
    );
    assert_eq!(to_root_at_end(&GOLDEN_PLAIN[..TRAILER_LEN]), None);
}

fn to_root_of(items: &[Item]) -> Option<Digest> {
    items.iter().find_map(|i| if let Item::Trailer(trailer) = i { Some(trailer.to_root) } else { None })
}

#[test]
fn the_encoder_says_the_same_thing_one_way_only() {
    let mut encoder = RecordEncoder::new(Compression::default()).unwrap();
    let block = noise(1, BLOCK_LEN);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    encoder.data(BlockIndex(5), block_digest(&block), &block, &mut a);
    encoder.pieces(BlockIndex(5), block_digest(&block), PieceMask(0xffff), &block, &mut b);
    assert!(a == b, "all pieces are the block");
    (a, b) = (Vec::new(), Vec::new());
    encoder.zero(BlockIndex(5), 1, &mut a);
    encoder.data(BlockIndex(5), Digest::ZERO, &[0; BLOCK_LEN], &mut b);
    assert!(a == b, "a block of zeros is a run of one");
    b.clear();
    encoder.pieces(BlockIndex(5), Digest::ZERO, PieceMask(1), &[0; BLOCK_LEN], &mut b);
    assert!(a == b, "pieces that leave zeros are a run of one");
}

#[test]
fn what_does_not_shrink_is_stored() {
    let mut encoder = RecordEncoder::new(Compression::default()).unwrap();
    let len_of = |encoder: &mut RecordEncoder, block: &[u8]| {
        let mut out = Vec::new();
        encoder.data(BlockIndex(0), Digest([1; 32]), block, &mut out);
        (Head::decode(&out).unwrap().codec, out.len() - HEAD_LEN)
    };
    // The first sixteenth compresses to nearly nothing and the rest not at all: just not enough; twice that is.
    let mut block = noise(1, BLOCK_LEN);
    assert_eq!(len_of(&mut encoder, &block), (Codec::Stored, BLOCK_LEN));
    block[..BLOCK_LEN / 16].fill(7);
    assert_eq!(len_of(&mut encoder, &block), (Codec::Stored, BLOCK_LEN));
    block[..BLOCK_LEN / 8].fill(7);
    let (codec, len) = len_of(&mut encoder, &block);
    assert!(codec == Codec::Zstd && len < BLOCK_LEN * 15 / 16, "{len}");
    assert_eq!(len_of(&mut encoder, b"short").0, Codec::Stored);
}

#[test]
#[should_panic(expected = "not in ascending order")]
fn disorder_does_not_leave_this_host() {
    let script = script("RRR", 100);
    let mut records = script.encoded_records();
    records.swap(0, 1);
    stream_of(&script.header(), &records);
}

#[test]
#[should_panic(expected = "not in ascending order")]
fn an_overlap_does_not_leave_this_host() {
    let script = script("RRR", 100);
    let mut zeros = Vec::new();
    RecordEncoder::new(Compression::default()).unwrap().zero(BlockIndex(0), 3, &mut zeros);
    stream_of(&script.header(), &[zeros, script.encoded_records().remove(2)]);
}

#[test]
#[should_panic(expected = "beyond the disk")]
fn a_record_beyond_the_disk_does_not_leave_this_host() {
    let script = script("RRR", 100);
    stream_of(&Header { size: DiskSize(1), ..script.header() }, &script.encoded_records());
}

#[test]
fn a_block_that_is_not_what_it_should_be_is_named() {
    let message = corrupt(check_block(BlockIndex(3), b"x", Digest([1; 32])));
    assert!(message.contains("block 3") && message.contains("at byte 196608"), "{message}");
}

/// Written by version 1; they must be read for ever. Never made anew: a decoder that refuses them has lost a format.
/// The second has compressed payloads, whose bytes are zstd's affair and may change with it.
const GOLDEN_STORED: &[u8] = include_bytes!("../../tests/fixtures/formats/v1/patch.bin");
const GOLDEN_PLAIN: &[u8] = include_bytes!("../../tests/fixtures/formats/v1/patch-plain.bin");
const GOLDEN_ZSTD: &[u8] = include_bytes!("../../tests/fixtures/formats/v1/patch-zstd.bin");

fn golden_scripts() -> [Script; 2] {
    [script("zz.P.R", 300), script(".DzD", 700)]
}

#[test]
fn golden_patches() {
    let [stored, compressed] = golden_scripts();
    assert!(stored.stream() == GOLDEN_STORED, "the encoder no longer writes version 1");
    assert_eq!(decode(GOLDEN_STORED).unwrap(), stored.items());
    assert_eq!(decode(GOLDEN_ZSTD).unwrap(), compressed.items());
    assert!(apply(&compressed, GOLDEN_ZSTD).is_ok());
}
