//! From YAML to values: the one place that turns a parser's error into ours.
//!
//! An error names file, line and column, shows the line with a mark below it, and says what was probably meant. Pure:
//! the path of a file is for its errors only.

use crate::error::{Error, Kind, Result, printable};
use serde::de::DeserializeOwned;
use std::path::Path;

/// A value that remembers where it stood, for what is wrong with it only together with others.
pub use serde_yaml::Spanned;

/// Parses a document. [`Kind::Config`] says where it is wrong.
pub fn parse<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T> {
    serde_yaml::from_str(text).map_err(|e| explain(&e, text, path))
}

/// Where something stands in a file; lines and columns count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Line, from 1; 0 if the parser does not know it.
    pub line: u64,
    /// Column in characters, from 1.
    pub column: u64,
}

impl Place {
    /// Where this value stood in its file.
    pub fn of<T>(value: &Spanned<T>) -> Place {
        Place { line: value.referenced.line(), column: value.referenced.column() }
    }
}

/// An error of configuration, with the line it is about.
pub fn mistake(what: &str, at: Option<Place>, text: &str, path: &Path) -> Error {
    let Some(at) = at.filter(|p| p.line > 0) else {
        return Error::new(Kind::Config, format!("{}: {what}", path.display()));
    };
    let line = text.lines().nth(at.line as usize - 1).unwrap_or_default();
    let column = (at.column as usize).max(1);
    let shown: String = line.chars().take(160).map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mark = format!("{}^", " ".repeat((column - 1).min(160)));
    let place = format!("{}:{}:{column}", path.display(), at.line);
    Error::new(Kind::Config, format!("{place}: {what}\n    {shown}\n    {mark}"))
}

/// A parser's error as ours.
fn explain(error: &serde_yaml::Error, text: &str, path: &Path) -> Error {
    let plain = error.without_snippet();
    let mut hint = None;
    let what = match plain {
        serde_yaml::Error::SerdeUnknownField { field, expected, .. } => {
            hint = Some(match closest(field, expected) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("known here: {}", expected.join(", ")),
            });
            format!("unknown key `{}`", printable(field, 80))
        }
        serde_yaml::Error::SerdeUnknownVariant { variant, expected, .. } => {
            hint = Some(match closest(variant, expected) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("known here: {}", expected.join(", ")),
            });
            format!("unknown word `{}`", printable(variant, 80))
        }
        serde_yaml::Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("the key `{}` stands twice", printable(key, 80))
        }
        serde_yaml::Error::SerdeMissingField { field, .. } => format!("the key `{field}` is missing here"),
        other => first_line(&other.to_string()),
    };
    let at = plain.location().map(|l| Place { line: l.line(), column: l.column() });
    let e = mistake(&what, at, text, path);
    match hint {
        Some(hint) => e.hint(hint),
        None => e,
    }
}

/// The parser appends the place to its sentences; ours stands in front.
fn first_line(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    line.rsplit_once(" at line ").map_or(line, |(sentence, _)| sentence).to_owned()
}

/// The word that was probably meant: the nearest within a third of its letters.
pub fn closest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let near = |candidate: &&str| edits(word, candidate);
    known.iter().copied().min_by_key(near).filter(|k| edits(word, k) <= k.chars().count().div_ceil(3))
}

/// Levenshtein's distance: insertions, deletions and replacements of letters that turn `a` into `b`.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_letters() {
        for (a, b, n) in [("", "abc", 3), ("kitten", "sitting", 3), ("url", "url", 0), ("ulr", "url", 2)] {
            assert_eq!((edits(a, b), edits(b, a)), (n, n), "{a} {b}");
        }
    }

    #[test]
    fn a_mistake_shows_its_line_and_survives_a_place_that_is_not_there() {
        let at = |line, column| Some(Place { line, column });
        let e = mistake("no", at(2, 3), "a\nb c\n", Path::new("p.yaml"));
        assert_eq!(e.to_string(), "p.yaml:2:3: no\n    b c\n      ^");
        assert!(mistake("no", at(9, 1), "a", Path::new("p.yaml")).to_string().starts_with("p.yaml:9:1: no"));
        assert_eq!(mistake("no", None, "a", Path::new("p.yaml")).to_string(), "p.yaml: no");
    }
}
