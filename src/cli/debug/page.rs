//! What the views of `debug` are made of: bounded lists, findings, and the page of text that a person reads.
//!
//! Invariants
//! - A list keeps at most as many entries as its bound; the rest is counted.
//! - Words of a file reach a page or JSON through [`clean`] alone, or are of a type that checks them.

use crate::cli::speak::render;
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};
use std::collections::VecDeque;
use virt_replica::error::{Error, Kind, printable};

/// Most of one text of a file that is shown, in bytes.
const TEXT_MAX: usize = 400;

/// Columns of a label.
const LABEL: usize = 10;

/// A stranger's words as they may be printed.
pub fn clean(text: impl AsRef<str>) -> String {
    printable(text.as_ref(), TEXT_MAX)
}

/// Some entries of a list, and how many there are.
#[derive(Debug, Clone)]
pub struct List<T> {
    max: usize,
    pub count: u64,
    pub shown: Vec<T>,
}

impl<T> List<T> {
    pub fn new(max: usize) -> Self {
        List { max, count: 0, shown: Vec::new() }
    }

    pub fn push(&mut self, entry: T) {
        self.count += 1;
        if self.shown.len() < self.max {
            self.shown.push(entry);
        }
    }

    pub fn of(entries: impl IntoIterator<Item = T>, max: usize) -> Self {
        let mut list = List::new(max);
        entries.into_iter().for_each(|entry| list.push(entry));
        list
    }

    /// The last entries instead, where the newest come last.
    pub fn newest_of(entries: impl IntoIterator<Item = T>, max: usize) -> Self {
        let (mut count, mut kept) = (0, VecDeque::new());
        for entry in entries {
            count += 1;
            kept.push_back(entry);
            if kept.len() > max {
                kept.pop_front();
            }
        }
        List { max, count, shown: kept.into() }
    }

    pub fn left_out(&self) -> u64 {
        self.count - self.shown.len() as u64
    }
}

impl<T: Serialize> Serialize for List<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_struct("list", 3)?;
        list.serialize_field("count", &self.count)?;
        list.serialize_field("left_out", &self.left_out())?;
        list.serialize_field("shown", &self.shown)?;
        list.end()
    }
}

/// Something that is not as it should be.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    pub what: String,
    /// Byte of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl Finding {
    pub fn new(what: impl AsRef<str>) -> Self {
        Finding { what: clean(what), offset: None }
    }

    pub fn at(what: impl AsRef<str>, offset: u64) -> Self {
        Finding { what: clean(what), offset: Some(offset) }
    }

    pub fn of(error: &Error) -> Self {
        Finding { what: clean(error.chain()), offset: error.context().offset_bytes }
    }

    fn text(&self) -> String {
        // The chain of an error names the place already.
        match self.offset {
            Some(at) if !self.what.contains(&format!("at byte {at}")) => format!("{} (at byte {at})", self.what),
            _ => self.what.clone(),
        }
    }
}

/// A view, and what kept it from being whole.
pub struct Look<V> {
    pub view: V,
    pub damage: Option<Error>,
}

/// A view as a page of text.
pub trait View: Serialize {
    fn page(&self, page: &mut Page);
}

/// Lines of text.
#[derive(Default)]
pub struct Page(String);

impl Page {
    pub fn line(&mut self, label: &str, text: impl AsRef<str>) {
        if !self.0.is_empty() {
            self.0.push('\n');
        }
        self.0.push_str(format!("{label:<LABEL$}{}", text.as_ref()).trim_end());
    }

    /// A line if there is something to be said.
    pub fn maybe(&mut self, label: &str, text: Option<impl AsRef<str>>) {
        text.into_iter().for_each(|text| self.line(label, text));
    }

    /// A list as a table behind an empty line. `what` names its entries, in the plural.
    pub fn table<T>(
        &mut self,
        what: &str,
        (header, right): (&[&str], &[usize]),
        list: &List<T>,
        row: impl Fn(&T) -> Vec<String>,
    ) {
        if list.count == 0 {
            return;
        }
        self.line("", "");
        self.line(&render::table(header, right, list.shown.iter().map(row).collect()), "");
        self.left_out(what, list);
    }

    /// A list as one line for each entry, under one label.
    pub fn lines<T>(&mut self, label: &str, what: &str, list: &List<T>, text: impl Fn(&T) -> String) {
        for (n, entry) in list.shown.iter().enumerate() {
            self.line(if n == 0 { label } else { "" }, text(entry));
        }
        self.left_out(what, list);
    }

    pub fn findings(&mut self, list: &List<Finding>) {
        self.lines("wrong", "findings", list, Finding::text);
    }

    fn left_out<T>(&mut self, what: &str, list: &List<T>) {
        if list.left_out() > 0 {
            self.line("", format!("... and {} more {what}; --all shows more of them", list.left_out()));
        }
    }

    pub fn text(self) -> String {
        self.0
    }
}

/// An error of what stands in a file says what to do, also where its maker could not know.
pub fn with_advice(error: Error) -> Error {
    match (error.kind(), error.hint_text()) {
        (Kind::Corrupt | Kind::Protocol | Kind::Unavailable, None) => {
            error.hint("what could be read is shown; bring the file here again, or have it made again")
        }
        _ => error,
    }
}

/// `1 block`, `2 blocks`.
pub fn counted(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// How many times content is larger than what it became: `12.5x`.
pub fn ratio(content: u64, encoded: u64) -> String {
    match (content, encoded) {
        (0, _) | (_, 0) => "-".to_owned(),
        (content, encoded) => format!("{:.1}x", content as f64 / encoded as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_its_bound_and_counts_the_rest() {
        let list = List::of(0..7, 3);
        assert_eq!((list.shown.clone(), list.count, list.left_out()), (vec![0, 1, 2], 7, 4));
        assert_eq!(serde_json::to_string(&list).unwrap(), r#"{"count":7,"left_out":4,"shown":[0,1,2]}"#);
        let mut page = Page::default();
        page.lines("numbers", "numbers", &list, |n| n.to_string());
        assert_eq!(
            page.text(),
            "numbers   0\n          1\n          2\n          ... and 4 more numbers; --all shows more of them"
        );
    }

    #[test]
    fn words_of_a_file_are_clean_and_short() {
        let finding = Finding::at(format!("a\x1b[2J\n{}", "x".repeat(9999)), 7);
        assert!(finding.text().len() < TEXT_MAX + 30 && !finding.text().contains(['\x1b', '\n']), "{finding:?}");
        assert!(finding.text().ends_with("(at byte 7)"));
    }
}
