//! Prose for readers at three in the morning: short sentences, and lines that fit a terminal. Holds README, docs,
//! policies, packaging and every help text to the bounds that docs/contributing.md names. Needs no lab.

use super::{pages, root};
use std::process::Command;

/// A page or a help text has no sentence of more words.
const WORDS_MAX: usize = 35;
/// A line of prose in Markdown is no wider; links, tables and code may be.
const COLUMNS_MAX: usize = 100;
/// They end with a period, and no sentence ends there.
const ABBREVIATIONS: [&str; 6] = ["e.g.", "i.e.", "etc.", "vs.", "cf.", "approx."];
/// `make bench` writes the lines between these two itself.
const MEASURED: [&str; 2] = ["from here -->", "to here -->"];

/// A paragraph, an item of a list or a cell of a table: its first line, and its text in one line.
type Unit = (usize, String);

/// Collects lines into units; nothing of a unit goes beyond an empty line.
#[derive(Default)]
struct Units {
    done: Vec<Unit>,
    open: Option<Unit>,
}

impl Units {
    fn end(&mut self) {
        self.done.extend(self.open.take());
    }

    fn whole(&mut self, at: usize, text: &str) {
        self.end();
        if !text.trim().is_empty() {
            self.done.push((at, text.trim().to_owned()));
        }
    }

    fn begin(&mut self, at: usize, text: &str) {
        self.end();
        self.open = Some((at, text.to_owned()));
    }

    fn go_on(&mut self, at: usize, text: &str) {
        match &mut self.open {
            Some((_, unit)) => {
                unit.push(' ');
                unit.push_str(text);
            }
            None => self.begin(at, text),
        }
    }
}

/// The text behind `- `, `* ` or `12. `.
fn item(line: &str) -> Option<&str> {
    let bullet = line.strip_prefix("- ").or_else(|| line.strip_prefix("* "));
    bullet.or_else(|| {
        let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
        (rest.len() < line.len()).then(|| rest.strip_prefix(". "))?
    })
}

/// Every line of a page with its number; a line of code, fenced or indented by four beyond its list, is an empty one.
fn without_code(text: &str) -> Vec<(usize, &str)> {
    let (mut fenced, mut after_blank, mut of_list) = (false, true, 0);
    let mut lines = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let bare = line.trim_start();
        let indent = line.len() - bare.len();
        let is_fence = bare.starts_with("```");
        fenced ^= is_fence;
        let indented = after_blank && indent >= of_list + 4 && item(bare).is_none();
        let is_code = fenced || is_fence || indented;
        // The lines of an indented block follow one another.
        after_blank = bare.is_empty() || indented;
        match item(bare) {
            Some(text) if !is_code => of_list = line.len() - text.trim_start().len(),
            None if !bare.is_empty() && indent == 0 => of_list = 0,
            _ => {}
        }
        lines.push((at + 1, if is_code { "" } else { line }));
    }
    lines
}

/// The units of a page; headings, comments and code blocks are none.
fn units_of_page(text: &str) -> Vec<Unit> {
    let mut units = Units::default();
    for (at, line) in without_code(text).into_iter().map(|(at, line)| (at, line.trim())) {
        if line.is_empty() || line.starts_with('#') || line.starts_with("<!--") {
            units.end();
        } else if line.starts_with('|') {
            cells(line).for_each(|cell| units.whole(at, &cell));
        } else if let Some(text) = item(line) {
            units.begin(at, text.trim());
        } else {
            units.go_on(at, line);
        }
    }
    units.end();
    units.done
}

/// The cells of a table's row; a bar in code or behind a backslash parts none.
fn cells(line: &str) -> impl Iterator<Item = String> {
    let (mut in_code, mut before) = (false, ' ');
    let mut cells = vec![String::new()];
    for c in line.chars() {
        in_code ^= c == '`';
        match c {
            '|' if !in_code && before != '\\' => cells.push(String::new()),
            _ => cells.last_mut().expect("there is one from the beginning").push(c),
        }
        before = c;
    }
    cells.into_iter()
}

/// The units of a help text: a paragraph, or what stands right of an option, an argument or a command.
fn units_of_help(text: &str) -> Vec<Unit> {
    let mut units = Units::default();
    for (at, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line)) {
        let indent = line.len() - line.trim_start().len();
        let line = line.trim();
        let names = indent > 0 && indent < 9 && (line.starts_with(['-', '<', '[']) || line.contains("  "));
        if line.is_empty() || line.starts_with("Usage:") || (indent == 0 && line.ends_with(':')) {
            units.end();
        } else if names {
            units.begin(at, line.split_once("  ").map_or("", |(_, text)| text.trim()));
        } else {
            units.go_on(at, line);
        }
    }
    units.end();
    // Defaults, values and variables are appended by the parser, and are no words of ours.
    let ours = |text: String| {
        ["[default: ", "[possible values: ", "[env: "].iter().fold(text, |t, by| match t.find(by) {
            Some(end) => t[..end].to_owned(),
            None => t,
        })
    };
    units.done.into_iter().map(|(at, text)| (at, ours(text))).filter(|(_, text)| !text.is_empty()).collect()
}

/// A unit's text with each piece of code as one word and each link as its text.
fn plain(text: &str) -> String {
    let code = |(at, part)| if at % 2 == 1 { "code" } else { part };
    let text: String = text.split('`').enumerate().map(code).collect();
    let mut links = text.split("](");
    let mut out = links.next().unwrap_or_default().to_owned();
    for rest in links {
        out.push(']');
        out.push_str(rest.split_once(')').map_or(rest, |(_, rest)| rest));
    }
    out
}

/// A sentence ends at `.`, `?` or `!` before a space, in parentheses or emphasis too; not behind an abbreviation.
fn sentences(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut words: Vec<&str> = Vec::new();
    let text = plain(text);
    for word in text.split_whitespace() {
        words.push(word);
        let bare = word.trim_end_matches([')', ']', '"', '\'', '*', '_']);
        let short = ABBREVIATIONS.contains(&bare.trim_start_matches(['(', '*']));
        if bare.ends_with(['.', '?', '!']) && !bare.ends_with("...") && !short {
            found.push(std::mem::take(&mut words).join(" "));
        }
    }
    found.extend((!words.is_empty()).then(|| words.join(" ")));
    found
}

/// Signs alone, as an arrow or a dash, are no words.
fn words(sentence: &str) -> usize {
    sentence.split_whitespace().filter(|w| w.contains(char::is_alphanumeric)).count()
}

/// `file:line: [words] sentence` for each that is too long.
fn too_long(name: &str, units: Vec<Unit>) -> Vec<String> {
    let each = |(at, text): Unit| sentences(&text).into_iter().map(move |s| (at, words(&s), s));
    let long = units.into_iter().flat_map(each).filter(|(_, words, _)| *words > WORDS_MAX);
    long.map(|(at, words, sentence)| format!("{name}:{at}: [{words}] {sentence}")).collect()
}

/// `file:line: sentence` for each whose subject is a question word: a reader takes it for a question until its end.
fn without_noun(name: &str, units: Vec<Unit>) -> Vec<String> {
    let each = |(at, text): Unit| sentences(&text).into_iter().map(move |s| (at, s));
    let starts = |s: &str| {
        let first =
            s.trim_start_matches(['*', '(', '_']).split(|c: char| !c.is_alphabetic()).next().unwrap_or_default();
        ["What", "Who", "Whoever"].contains(&first) && !s.ends_with('?')
    };
    let bad = units.into_iter().flat_map(each).filter(|(_, s)| starts(s));
    bad.map(|(at, sentence)| format!("{name}:{at}: no noun as its subject: {sentence}")).collect()
}

/// Prose lines of a page beyond the width; a line that is one link or one path cannot be broken.
fn too_wide(name: &str, text: &str) -> Vec<String> {
    let mut measured = false;
    let mut found = Vec::new();
    for (at, line) in without_code(text) {
        let bare = line.trim_start();
        if bare.starts_with("<!--") {
            measured = if measured { !bare.ends_with(MEASURED[1]) } else { bare.ends_with(MEASURED[0]) };
        }
        let is_prose = !(measured || bare.starts_with(['|', '#', '<']) || bare.contains("]("));
        // A command in backticks stays on one line, so that it can be copied.
        let can_break = plain(bare).split_whitespace().count() > 2;
        if is_prose && can_break && line.chars().count() > COLUMNS_MAX {
            found.push(format!("{name}:{at}: {line}"));
        }
    }
    found
}

/// The help of a command and of all below it, by name.
fn helps(path: &[String], found: &mut Vec<(String, String)>) {
    let output = Command::new(env!("CARGO_BIN_EXE_virt-replica")).args(path).arg("--help").output().expect("it runs");
    assert!(output.status.success(), "{path:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("help is text");
    let list = text.split("Commands:\n").nth(1).unwrap_or_default().to_owned();
    found.push((format!("virt-replica {} --help", path.join(" ")), text));
    let entries = list.lines().take_while(|l| !l.is_empty()).filter(|l| l.starts_with("  ") && !l.starts_with("   "));
    for name in entries.filter_map(|l| l.split_whitespace().next()).filter(|name| *name != "help") {
        helps(&[path, &[name.to_owned()]].concat(), found);
    }
}

#[test]
fn no_sentence_of_the_pages_is_too_long_and_no_line_too_wide() {
    let mut bad = Vec::new();
    let mut read = 0;
    for (page, text) in pages() {
        let name = page.display().to_string();
        let units = units_of_page(&text);
        read += units.iter().map(|(_, text)| sentences(text).len()).sum::<usize>();
        bad.extend(too_long(&name, units.clone()));
        bad.extend(without_noun(&name, units));
        bad.extend(too_wide(&name, &text));
    }
    assert!(read > 2_000, "only {read} sentences found: the test looks past them");
    assert!(
        bad.is_empty(),
        "{} sentences of more than {WORDS_MAX} words or without a noun, or lines of more than {COLUMNS_MAX} columns:\n{}",
        bad.len(),
        bad.join("\n")
    );
}

#[test]
fn no_sentence_of_the_help_is_too_long() {
    let mut found = Vec::new();
    helps(&[], &mut found);
    assert!(found.len() > 25, "only {} help texts found", found.len());
    let both = |(name, text): (String, String)| {
        let units = units_of_help(&text);
        [too_long(&name, units.clone()), without_noun(&name, units)].concat()
    };
    let bad: Vec<String> = found.into_iter().flat_map(both).collect();
    assert!(bad.is_empty(), "{} sentences of more than {WORDS_MAX} words:\n{}", bad.len(), bad.join("\n"));
}

/// Sentences that readers stumbled over; each has a plain one in its place now.
#[test]
fn the_sentences_that_were_replaced_are_gone() {
    let gone = [
        "may hardly be down",
        "it is said why",
        "is said before anything is done",
        "before it is known whose it is",
        "For some eyes only",
        "have not been so",
        "in so many words",
        "Whether it starts with its host is what",
    ];
    let mut texts: Vec<(String, String)> = pages().into_iter().map(|(p, t)| (p.display().to_string(), t)).collect();
    helps(&[], &mut texts);
    for (name, text) in texts {
        // Lines are broken anywhere.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for words in gone {
            assert!(!text.contains(words), "{name}: \"{words}\"");
        }
    }
    assert!(root().join("README.md").exists());
}

#[test]
fn a_page_is_taken_apart_into_its_units() {
    let text = "# A heading\n\nTwo lines\nof prose.\n\n- an item\n  that goes on\n- another\n\n1. first\n\n```\ncode. Not prose.\n```\n\
                | a | `x | y` |\n|---|---|\n<!-- a comment -->\nThe end";
    let units = units_of_page(text);
    let expected = [(3, "Two lines of prose."), (6, "an item that goes on"), (8, "another"), (10, "first")];
    assert_eq!(units[..4], expected.map(|(at, text)| (at, text.to_owned())));
    let rest: Vec<&str> = units[4..].iter().map(|(_, text)| text.as_str()).filter(|t| !t.starts_with('-')).collect();
    assert_eq!(rest, ["a", "`x | y`", "The end"]);
    let text = "Said:\n\n    {\"code\": 1}\n    {}\n\n- an item\n\n  goes on\n\n      {}\n\n    - below it";
    let units: Vec<String> = units_of_page(text).into_iter().map(|(_, text)| text).collect();
    assert_eq!(units, ["Said:", "an item", "goes on", "below it"]);
}

#[test]
fn a_unit_is_taken_apart_into_its_sentences() {
    let two = |text: &str| assert_eq!(sentences(text).len(), 2, "{:?}", sentences(text));
    let one = |text: &str| assert_eq!(sentences(text).len(), 1, "{:?}", sentences(text));
    two("One ends here. libvirt begins the next.");
    two("**Bold too.** Then more.");
    two("(In parentheses.) Then more?");
    two("Mode 0600. Then more.");
    two("Really? Yes");
    one("Images, e.g. raw ones, etc. are read.");
    one("Version 1.90 of `a. b. c` and [a link](a.md#b.c) in 0.1.0");
    one("copies from ... to");
    assert_eq!(sentences("Run `virt-replica sync a --to b` - see [the page](a. b)."), ["Run code - see [the page]."]);
    assert_eq!(words("Run code - see [the page]."), 5);
}

#[test]
fn help_is_taken_apart_into_its_units() {
    let text = "Does a thing\n\nUsage: virt-replica x [OPTIONS]\n\nOptions:\n      --way <WAY>  How it is done,\n                   \
                in which way [default: auto]\n  -n, --dry-run    Say it. Do nothing\n\nCodes: 0; 1.\n";
    let units: Vec<String> = units_of_help(text).into_iter().map(|(_, text)| text.trim().to_owned()).collect();
    assert_eq!(units, ["Does a thing", "How it is done, in which way", "Say it. Do nothing", "Codes: 0; 1."]);
}

#[test]
fn long_sentences_and_wide_lines_are_found() {
    let long = ["word"; WORDS_MAX + 1].join(" ");
    assert_eq!(too_long("p", units_of_page(&format!("Short.\n\n- {long}.\n"))).len(), 1);
    assert_eq!(too_long("p", units_of_page(&format!("| a | {long} |\n"))).len(), 1);
    assert!(too_long("p", units_of_page(&["word"; WORDS_MAX].join("\n"))).is_empty());
    let nouns = "What it is. **Who asks** gets it.\n\nWhat is it? Whole. Whoever comes, waits.";
    assert_eq!(without_noun("p", units_of_page(nouns)).len(), 3);
    let wide = format!("{long} {long}");
    assert_eq!(too_wide("p", &wide).len(), 1);
    for free in [format!("| {wide} |"), format!("```\n{wide}\n```"), format!("[{wide}](a.md)"), format!("# {wide}")] {
        assert!(too_wide("p", &free).is_empty(), "{free}");
    }
}
