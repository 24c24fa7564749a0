//! XML element by element: documents parsed within bounds, children found, text escaped and spliced. Pure.

use crate::error::{Error, Kind, Result};
use roxmltree::{Document, Node, ParsingOptions};
use std::fmt::Write as _;
use std::ops::Range;
use std::path::Path;

/// Largest domain XML we read. libvirt's own limit on a reply is 32 MiB; real definitions are some ten KiB.
pub const XML_LEN_MAX: usize = 4 << 20;

pub(crate) fn document(xml: &str) -> Result<Document<'_>> {
    if xml.len() > XML_LEN_MAX {
        return Err(bad_xml(format!("it has more than {XML_LEN_MAX} bytes")));
    }
    // Two nodes per element at the least; a document of this size with more of them is no domain.
    let options = ParsingOptions { allow_dtd: false, nodes_limit: 1 << 18, ..ParsingOptions::default() };
    Document::parse_with_options(xml, options).map_err(|e| bad_xml("it cannot be parsed").source(e))
}

pub(crate) fn bad_xml(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Corrupt, format!("not a domain's XML: {why}"))
}

pub(crate) fn domain_element<'a, 'i>(doc: &'a Document<'i>) -> Result<Node<'a, 'i>> {
    let root = doc.root_element();
    if root.has_tag_name("domain") { Ok(root) } else { Err(bad_xml("its element is not <domain>")) }
}

/// Children of this name without a namespace.
pub(crate) fn children<'a, 'i: 'a>(node: Node<'a, 'i>, name: &'static str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |c| c.has_tag_name(name) && c.tag_name().namespace().is_none())
}

pub(crate) fn child<'a, 'i: 'a>(node: Node<'a, 'i>, name: &'static str) -> Option<Node<'a, 'i>> {
    children(node, name).next()
}

/// All text directly inside; comments may split it.
pub(crate) fn text_of(node: Node) -> String {
    node.children().filter(|c| c.is_text()).filter_map(|c| c.text()).collect()
}

pub(crate) fn path_text(path: &Path) -> Result<&str> {
    let text =
        path.to_str().ok_or_else(|| Error::new(Kind::Usage, "libvirt takes no path that is not UTF-8").path(path))?;
    if path.is_absolute() { Ok(text) } else { Err(Error::new(Kind::Usage, "the path is not absolute").path(path)) }
}

/// Text as it may stand in an attribute or an element. White space other than a blank is written as a reference,
/// because a parser would turn it into blanks; characters that XML cannot carry are refused.
pub(crate) fn escape(text: &str) -> Result<String> {
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            '\t' | '\n' | '\r' => write!(out, "&#{};", u32::from(c)).expect("writing to a String cannot fail"),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => {
                return Err(Error::new(Kind::Usage, format!("XML cannot carry the character {c:?}")));
            }
            _ => out.push(c),
        }
    }
    Ok(out)
}

/// Replaces byte ranges that do not overlap.
pub(crate) fn splice(xml: &str, mut edits: Vec<(Range<usize>, String)>) -> String {
    // Stable: an insertion stays before the replacement that begins at the same byte.
    edits.sort_by_key(|(range, _)| range.start);
    let mut out = String::with_capacity(xml.len() + 256);
    let mut at = 0;
    for (range, text) in edits {
        out.push_str(&xml[at..range.start]);
        out.push_str(&text);
        at = range.end;
    }
    out.push_str(&xml[at..]);
    out
}
