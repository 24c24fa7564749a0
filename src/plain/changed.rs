//! Change lists of other tools: which ranges of an image may have changed, as text, JSON, or what `thin_delta` or
//! `era_invalidate` print.
//!
//! Pure. They are believed, as a dirty bitmap is not: what they leave out is not looked at. Format: docs/plain.md.

use crate::block::ByteRange;
use crate::error::advice::{self, Advice};
use crate::error::{Error, Kind, Result};
use serde::Deserialize;

/// Largest list in bytes.
pub const LIST_MAX: u64 = 256 << 20;

#[derive(Deserialize)]
struct Item {
    offset: u64,
    length: u64,
}

/// Understands a list, in whichever of the four ways it is written; the ranges ascend and do not overlap. `block`:
/// bytes of a block of the dm-era device, which only `era_invalidate` leaves to be said, and nothing else wants to be
/// told.
pub fn parse(text: &str, block: Option<u64>) -> Result<Vec<ByteRange>> {
    let is_era = text.trim_start().starts_with("<blocks");
    let parsed = match (text.trim_start().chars().next(), block) {
        (_, Some(0)) => Err("a block of a dm-era device is not empty".into()),
        (_, Some(block)) if is_era => parse_era(text, block),
        (_, None) if is_era => {
            Err("`era_invalidate` does not print how large a block is, so that has to be said".into())
        }
        (_, Some(_)) => {
            Err("the size of a block was given, and only what `era_invalidate` prints needs it: this is something else"
                .into())
        }
        (Some('['), None) => parse_json(text),
        (Some('<'), None) => parse_thin_delta(text),
        _ => parse_lines(text),
    };
    parsed.and_then(in_order).map_err(|why| {
        let advice = match is_era && block.is_none() {
            true => advice::Image::SayBlockSize.into(),
            false => Advice::from(
                "write a line `OFFSET LENGTH` in bytes for each range, or JSON, or what `thin_delta` or `era_invalidate` print",
            ),
        };
        Error::new(Kind::Usage, format!("the change list cannot be understood: {why}")).advise(advice)
    })
}

fn parse_json(text: &str) -> Result<Vec<(u64, u64)>, String> {
    let items: Vec<Item> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    Ok(items.into_iter().map(|item| (item.offset, item.length)).collect())
}

fn parse_lines(text: &str) -> Result<Vec<(u64, u64)>, String> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let words: Vec<Option<u64>> = line.split_whitespace().map(number).collect();
        match words[..] {
            [Some(offset), Some(length)] => found.push((offset, length)),
            _ => return Err(format!("line {} is not two numbers", at + 1)),
        }
    }
    Ok(found)
}

fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

/// `<superblock data_block_size="SECTORS"><diff><different begin= length=/><right_only …/></diff></superblock>`, in
/// blocks.
fn parse_thin_delta(text: &str) -> Result<Vec<(u64, u64)>, String> {
    let document = roxmltree::Document::parse(text).map_err(|e| e.to_string())?;
    let top = document.root_element();
    let of = |node: roxmltree::Node, name: &str| node.attribute(name).and_then(|v| v.parse::<u64>().ok());
    let block = of(top, "data_block_size").and_then(|sectors| sectors.checked_mul(512));
    if top.has_attribute("current_era") {
        return Err(
            "this is the whole history of a dm-era device; `era_invalidate --written-since ERA` prints what has \
                    changed since then"
                .into(),
        );
    }
    let block = block.filter(|b| *b > 0).ok_or("it says no data_block_size")?;
    let mut found = Vec::new();
    let mut known = false;
    for node in top.descendants().filter(|n| n.is_element()) {
        match node.tag_name().name() {
            "superblock" | "diff" | "same" => known = true,
            // What only the older one has is a hole in the newer one now.
            "different" | "left_only" | "right_only" => {
                let begin = of(node, "begin").and_then(|n| n.checked_mul(block));
                let length = of(node, "length").and_then(|n| n.checked_mul(block));
                let (Some(begin), Some(length)) = (begin, length) else { return Err("a range has no numbers".into()) };
                found.push((begin, length));
            }
            other => return Err(format!("<{other}> is nothing that thin_delta prints")),
        }
    }
    if known { Ok(found) } else { Err("it is no output of thin_delta".to_owned()) }
}

/// `<blocks><range begin= end=/><block block=/></blocks>`, in blocks; the end is the first that is not meant.
fn parse_era(text: &str, block: u64) -> Result<Vec<(u64, u64)>, String> {
    let document = roxmltree::Document::parse(text).map_err(|e| e.to_string())?;
    let range = |node: roxmltree::Node| {
        let of = |name: &str| node.attribute(name)?.parse::<u64>().ok();
        let (begin, end) = match node.tag_name().name() {
            "range" => (of("begin")?, of("end")?),
            "block" => (of("block")?, of("block")?.checked_add(1)?),
            _ => return None,
        };
        Some((begin.checked_mul(block)?, end.checked_sub(begin)?.checked_mul(block)?))
    };
    let nodes = document.root_element().children().filter(|n| n.is_element());
    nodes.map(|n| range(n).ok_or_else(|| format!("<{}> is no range of blocks", n.tag_name().name()))).collect()
}

fn in_order(found: Vec<(u64, u64)>) -> Result<Vec<ByteRange>, String> {
    let mut ranges = Vec::with_capacity(found.len());
    for (offset, length) in found {
        let end = offset.checked_add(length).ok_or_else(|| format!("{offset} + {length} is too much"))?;
        if length > 0 {
            ranges.push(ByteRange::new(offset, end));
        }
    }
    ranges.sort_by_key(|r| r.start);
    let mut merged: Vec<ByteRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> Vec<(u64, u64)> {
        parse(text, None).unwrap().into_iter().map(|r| (r.start, r.end)).collect()
    }

    #[test]
    fn lists_are_read_in_every_way_they_are_written() {
        let expected = [(0, 100), (4096, 8192)];
        assert_eq!(pairs("# offset length\n0x1000 4096 # one\n\n0 100\n50 20\n7 0\n"), expected);
        assert_eq!(pairs(r#"[{"offset": 4096, "length": 4096, "id": 3}, {"offset": 0, "length": 100}]"#), expected);
        let xml = r#"<superblock uuid="" time="0" transaction="1" data_block_size="128" nr_data_blocks="0">
            <diff left="1" right="2"><different begin="1" length="2"/><same begin="3" length="9"/>
            <right_only begin="12" length="1"/><left_only begin="20" length="1"/></diff></superblock>"#;
        assert_eq!(pairs(xml), [(65536, 196608), (786432, 851968), (1310720, 1376256)]);
        assert_eq!(pairs(""), []);
        assert_eq!(pairs("[]"), []);
    }

    #[test]
    fn what_is_none_is_refused() {
        for bad in [
            "1",
            "1 2 3",
            "a b",
            "-1 5",
            "18446744073709551615 2",
            r#"[{"offset": 1}]"#,
            "<domain/>",
            r#"<superblock data_block_size="0"><diff/></superblock>"#,
            r#"<superblock data_block_size="128"><diff><different begin="1"/></diff></superblock>"#,
            r#"<superblock data_block_size="128"><diff><other begin="1" length="1"/></diff></superblock>"#,
        ] {
            assert_eq!(parse(bad, None).unwrap_err().kind(), Kind::Usage, "{bad}");
        }
    }

    /// As `era_invalidate` of thin-provisioning-tools 0.9 prints it.
    const ERA: &str = "<blocks>\n  <range begin=\"10\" end = \"14\"/>\n  <block block=\"40\"/>\n</blocks>\n";

    #[test]
    fn blocks_of_dm_era_want_their_size() {
        let ranges = parse(ERA, Some(65536)).unwrap();
        assert_eq!(ranges, [ByteRange::new(655_360, 917_504), ByteRange::new(2_621_440, 2_686_976)]);
        assert_eq!(parse("<blocks/>", Some(65536)).unwrap(), []);
        let why = |text: &str, block| parse(text, block).unwrap_err().chain();
        assert_eq!(parse(ERA, None).unwrap_err().advice(), Some(&advice::Image::SayBlockSize.into()));
        assert!(why(ERA, Some(0)).contains("not empty"));
        assert!(why("0 100", Some(65536)).contains("something else"));
        let dump = r#"<superblock uuid="" block_size="128" nr_blocks="9" current_era="5"><era_array/></superblock>"#;
        assert!(why(dump, None).contains("--written-since"), "{}", why(dump, None));
        for bad in [
            r#"<blocks><range begin="4" end="3"/></blocks>"#,
            r#"<blocks><range begin="4"/></blocks>"#,
            r#"<blocks><block block="18446744073709551615"/></blocks>"#,
            r#"<blocks><other block="1"/></blocks>"#,
        ] {
            assert_eq!(parse(bad, Some(65536)).unwrap_err().kind(), Kind::Usage, "{bad}");
        }
    }
}
