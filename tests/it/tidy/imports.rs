//! Which file of the crate uses which other, read from the source text alone, and the circles among them.
//!
//! `use` trees, `super::`, `self::` and paths in the code are resolved to the file that defines the name; a re-export
//! leads to its origin. Code for tests alone (`#[cfg(test)]`) does not count. Comments and texts do not count either,
//! but the paths that serde reads out of a text do.

use std::collections::{BTreeMap, BTreeSet};

/// Files by their path below `src`, with their text.
pub type Sources = BTreeMap<String, String>;

/// One file names something that another file defines.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Arrow {
    pub from: String,
    pub to: String,
    pub line: usize,
    /// The full path of the item, for example `replica::store::Store`.
    pub item: String,
}

/// What the reader found.
#[derive(Default)]
pub struct Imports {
    /// Between two files, tests left out.
    pub arrows: Vec<Arrow>,
    /// Blocks `impl T` that stand in another file than `T`: (arrow from the block to the type).
    pub distant_impls: Vec<Arrow>,
    /// Every file that a `mod` reaches; with `true` for a file of tests.
    pub files: BTreeMap<String, bool>,
}

#[derive(Clone, PartialEq, Debug)]
enum Token {
    Word(String),
    /// `::`
    Sep,
    Mark(char),
    Text(String),
}

/// Tokens with their line, comments and characters left out.
fn tokens(text: &str) -> Vec<(Token, usize)> {
    let c: Vec<char> = text.chars().collect();
    let (mut at, mut line, mut out) = (0, 1, Vec::new());
    let get = |i: usize| c.get(i).copied().unwrap_or('\0');
    while at < c.len() {
        match c[at] {
            '\n' => {
                line += 1;
                at += 1;
            }
            '/' if get(at + 1) == '/' => {
                while at < c.len() && c[at] != '\n' {
                    at += 1;
                }
            }
            '/' if get(at + 1) == '*' => {
                while at < c.len() && !(c[at] == '*' && get(at + 1) == '/') {
                    line += usize::from(c[at] == '\n');
                    at += 1;
                }
                at += 2;
            }
            'r' | 'b' if literal(&c, at).is_some() => {
                let (content, end) = literal(&c, at).expect("just seen");
                out.push((Token::Text(content.iter().collect()), line));
                line += content.iter().filter(|c| **c == '\n').count();
                at = end;
            }
            '"' => {
                let (content, end) = literal(&c, at).expect("a quote opens a text");
                out.push((Token::Text(content.iter().collect()), line));
                line += content.iter().filter(|c| **c == '\n').count();
                at = end;
            }
            // A character, else the name of a lifetime.
            '\'' if get(at + 1) == '\\' => {
                at += 3;
                while at < c.len() && c[at] != '\'' {
                    at += 1;
                }
                at += 1;
            }
            '\'' if get(at + 2) == '\'' => at += 3,
            '\'' => at += 1 + c[at + 1..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').count(),
            ':' if get(at + 1) == ':' => {
                out.push((Token::Sep, line));
                at += 2;
            }
            first if first.is_alphanumeric() || first == '_' => {
                let word: String = c[at..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect();
                at += word.chars().count();
                out.push((Token::Word(word), line));
            }
            mark => {
                if !mark.is_whitespace() {
                    out.push((Token::Mark(mark), line));
                }
                at += 1;
            }
        }
    }
    out
}

/// A text that begins here (`"…"`, `r#"…"#`, `b"…"`): its content and the place after it.
fn literal(c: &[char], mut at: usize) -> Option<(&[char], usize)> {
    if c[at] == 'b' {
        at += 1;
    }
    let raw = c.get(at) == Some(&'r');
    at += usize::from(raw);
    let hashes = if raw { c[at..].iter().take_while(|c| **c == '#').count() } else { 0 };
    at += hashes;
    if c.get(at) != Some(&'"') {
        return None;
    }
    let start = at + 1;
    let mut end = start;
    while end < c.len() {
        if c[end] == '\\' && !raw {
            end += 2;
        } else if c[end] == '"' && c[end + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes {
            return Some((&c[start..end], end + 1 + hashes));
        } else {
            end += 1;
        }
    }
    Some((&c[start..], c.len()))
}

/// One name brought into a module.
struct Use {
    path: Vec<String>,
    public: bool,
    line: usize,
}

#[derive(Default)]
struct Module {
    file: String,
    parent: Option<usize>,
    name: String,
    children: BTreeMap<String, usize>,
    defined: BTreeSet<String>,
    uses: BTreeMap<String, Use>,
    globs: Vec<Use>,
    /// Paths in the code: the words and the line.
    paths: Vec<(Vec<String>, usize)>,
    impls: Vec<(Vec<String>, usize)>,
}

#[derive(Default)]
struct Tree {
    modules: Vec<Module>,
    /// The root of the library and of the program.
    roots: BTreeMap<&'static str, usize>,
    macros: BTreeMap<String, String>,
    files: BTreeMap<String, bool>,
}

type Stream<'a> = &'a [(Token, usize)];

fn word(t: Stream<'_>, at: usize) -> Option<&str> {
    match t.get(at) {
        Some((Token::Word(w), _)) => Some(w),
        _ => None,
    }
}

fn is(t: Stream, at: usize, mark: char) -> bool {
    t.get(at).is_some_and(|(token, _)| *token == Token::Mark(mark))
}

/// The place after the bracket that closes the one at `at`.
fn after_bracket(t: Stream, at: usize) -> usize {
    let mut depth = 0usize;
    for (i, (token, _)) in t.iter().enumerate().skip(at) {
        match token {
            Token::Mark('(' | '[' | '{') => depth += 1,
            Token::Mark(')' | ']' | '}') => {
                depth -= 1;
                if depth == 0 {
                    return i + 1;
                }
            }
            _ => {}
        }
    }
    t.len()
}

/// The place after the item that begins at `at`: after its block, else after its semicolon (or the comma of a field).
fn after_item(t: Stream, mut at: usize) -> usize {
    while is(t, at, '#') {
        at = after_bracket(t, at + 1);
    }
    let item = (at..at + 6).filter_map(|i| word(t, i)).any(|w| {
        matches!(w, "mod" | "fn" | "use" | "impl" | "struct" | "enum" | "trait" | "const" | "static" | "type")
    });
    while at < t.len() {
        match t[at].0 {
            Token::Mark('{') => return after_bracket(t, at),
            Token::Mark('(' | '[') => at = after_bracket(t, at),
            Token::Mark(';') => return at + 1,
            Token::Mark(',') if !item => return at + 1,
            Token::Mark('}') if !item => return at,
            _ => at += 1,
        }
    }
    at
}

impl Tree {
    fn add(&mut self, file: &str, parent: Option<usize>, name: &str) -> usize {
        self.modules.push(Module { file: file.into(), parent, name: name.into(), ..Module::default() });
        let id = self.modules.len() - 1;
        if let Some(parent) = parent {
            self.modules[parent].children.insert(name.into(), id);
        }
        id
    }

    /// Reads a file and all that its `mod` lines declare. `below` is the folder of its children.
    fn file(&mut self, sources: &Sources, file: &str, id: usize, below: &str, test: bool) {
        self.files.insert(file.to_owned(), test);
        let text = sources.get(file).unwrap_or_else(|| panic!("a mod line names {file}, which does not exist"));
        let t = tokens(text);
        self.items(sources, &t, id, (file, below), test);
    }

    fn items(&mut self, sources: &Sources, t: Stream, id: usize, place: (&str, &str), test: bool) {
        let (mut at, mut path_attribute, mut only_tests) = (0, None, test);
        while at < t.len() {
            let line = t[at].1;
            match &t[at].0 {
                Token::Mark('#') if is(t, at + 1, '[') || (is(t, at + 1, '!') && is(t, at + 2, '[')) => {
                    let open = if is(t, at + 1, '[') { at + 1 } else { at + 2 };
                    let end = after_bracket(t, open);
                    let attribute = &t[open + 1..end - 1];
                    if let (Some("path"), Some((Token::Text(path), _))) = (word(attribute, 0), attribute.last()) {
                        path_attribute = Some(path.clone());
                    }
                    let names = |w: &str| (0..attribute.len()).any(|i| word(attribute, i) == Some(w));
                    if word(attribute, 0) == Some("cfg") && names("test") && !names("not") {
                        only_tests = true;
                        // A file of tests is still declared here; anything else is passed over.
                        let mut after = end;
                        while is(t, after, '#') {
                            after = after_bracket(t, after + 1);
                        }
                        let declares = (after..after + 6).find(|i| word(t, *i) == Some("mod"));
                        if !declares.is_some_and(|i| is(t, i + 2, ';')) {
                            at = after_item(t, end);
                            only_tests = test;
                            path_attribute = None;
                            continue;
                        }
                    } else {
                        self.inside(t, (open + 1, end - 1), id);
                    }
                    at = end;
                }
                Token::Word(w) if w == "mod" && word(t, at + 1).is_some() => {
                    let name = word(t, at + 1).expect("just seen").to_owned();
                    let child_below = format!("{}{name}/", place.1);
                    if is(t, at + 2, '{') {
                        let end = after_bracket(t, at + 2);
                        let child = self.add(place.0, Some(id), &name);
                        self.items(sources, &t[at + 3..end - 1], child, (place.0, &child_below), only_tests);
                        at = end;
                    } else {
                        let folder = place.0.rfind('/').map_or("", |i| &place.0[..=i]);
                        let file = match path_attribute.take() {
                            Some(path) => format!("{folder}{path}"),
                            None if sources.contains_key(&format!("{}{name}.rs", place.1)) => {
                                format!("{}{name}.rs", place.1)
                            }
                            None => format!("{child_below}mod.rs"),
                        };
                        let child = self.add(&file, Some(id), &name);
                        self.file(sources, &file, child, &child_below, only_tests);
                        at += 3;
                    }
                    only_tests = test;
                    path_attribute = None;
                }
                Token::Word(w) if w == "use" => {
                    // `pub use` and `pub(crate) use`.
                    let back = if at >= 4 && is(t, at - 1, ')') { at - 4 } else { at.wrapping_sub(1) };
                    let public = word(t, back) == Some("pub");
                    let mut end = at;
                    while end < t.len() && !is(t, end, ';') {
                        end += 1;
                    }
                    self.use_tree(&t[at + 1..end], Vec::new(), (id, public, line));
                    at = end + 1;
                }
                Token::Word(w) => {
                    if let (true, Some(name)) = (
                        matches!(
                            w.as_str(),
                            "fn" | "struct" | "enum" | "trait" | "type" | "const" | "static" | "union"
                        ),
                        word(t, at + 1),
                    ) {
                        self.modules[id].defined.insert(name.to_owned());
                        at += 2;
                        continue;
                    }
                    if w == "macro_rules" && is(t, at + 1, '!') {
                        let name = word(t, at + 2).unwrap_or_default().to_owned();
                        self.macros.insert(name, place.0.to_owned());
                    }
                    if w == "impl" {
                        self.implementation(t, at, id);
                    }
                    at = self.path(t, at, id);
                }
                _ => at += 1,
            }
        }
    }

    /// Paths between two places: of an attribute, also those that serde reads out of a text.
    fn inside(&mut self, t: Stream, (from, to): (usize, usize), id: usize) {
        let mut at = from;
        while at < to {
            match &t[at].0 {
                Token::Text(text) if text.starts_with("crate::") || text.starts_with("super::") => {
                    let words = text.split("::").map(str::to_owned).collect();
                    self.modules[id].paths.push((words, t[at].1));
                    at += 1;
                }
                Token::Word(_) => at = self.path(t, at, id),
                _ => at += 1,
            }
        }
    }

    /// A path in the code that begins at `at`; returns the place after it.
    fn path(&mut self, t: Stream, at: usize, id: usize) -> usize {
        let mut words = vec![word(t, at).expect("a path begins with a word").to_owned()];
        let mut end = at + 1;
        while t.get(end).is_some_and(|(token, _)| *token == Token::Sep) && word(t, end + 1).is_some() {
            words.push(word(t, end + 1).expect("just seen").to_owned());
            end += 2;
        }
        let after_another =
            at > 0 && (t[at - 1].0 == Token::Sep || (is(t, at - 1, '.') && !is(t, at.wrapping_sub(2), '.')));
        let is_name =
            words.len() > 1 || words[0].starts_with(|c: char| c.is_uppercase()) || is(t, end, '(') || is(t, end, '!');
        if !after_another && is_name {
            self.modules[id].paths.push((words, t[at].1));
        }
        end
    }

    /// The type of a block `impl T {`; nothing for `impl Trait for T`.
    fn implementation(&mut self, t: Stream, at: usize, id: usize) {
        // `-> impl Trait` and `(x: impl Trait)` are types, not blocks.
        let begins =
            at == 0 || matches!(t[at - 1].0, Token::Mark('}' | ';' | ']' | '{')) || word(t, at - 1) == Some("unsafe");
        if !begins {
            return;
        }
        let (mut i, mut depth) = (at + 1, 0i32);
        let mut named = None;
        while i < t.len() && !(is(t, i, '{') && depth == 0) {
            match &t[i].0 {
                Token::Mark('<') => depth += 1,
                Token::Mark('>') if !is(t, i - 1, '-') => depth -= 1,
                Token::Word(w) if w == "for" && depth == 0 => return,
                Token::Word(w) if w == "where" && depth == 0 => break,
                Token::Word(w) if depth == 0 && named.is_none() && w != "dyn" => {
                    let mut words = vec![w.clone()];
                    while t.get(i + 1).is_some_and(|(token, _)| *token == Token::Sep) {
                        words.extend(word(t, i + 2).map(str::to_owned));
                        i += 2;
                    }
                    named = Some(words);
                }
                _ => {}
            }
            i += 1;
        }
        if let Some(words) = named {
            self.modules[id].impls.push((words, t[at].1));
        }
    }

    /// `a::{b, c as d, e::*}` below `prefix`.
    fn use_tree(&mut self, t: Stream, prefix: Vec<String>, at: (usize, bool, usize)) {
        let (id, public, line) = at;
        let (mut path, mut i) = (prefix, 0);
        while i < t.len() {
            match &t[i].0 {
                Token::Word(w) if w == "as" => {
                    let alias = word(t, i + 1).unwrap_or("_").to_owned();
                    let last = path.last().map_or("", String::as_str);
                    if last == "self" {
                        path.pop();
                    }
                    self.modules[id].uses.insert(alias, Use { path, public, line });
                    return;
                }
                Token::Word(w) => path.push(w.clone()),
                Token::Mark('*') => {
                    self.modules[id].globs.push(Use { path, public, line });
                    return;
                }
                Token::Mark('{') => {
                    let inner = &t[i + 1..after_bracket(t, i) - 1];
                    let (mut start, mut depth) = (0, 0);
                    for (j, (token, _)) in inner.iter().enumerate() {
                        match token {
                            Token::Mark('{') => depth += 1,
                            Token::Mark('}') => depth -= 1,
                            Token::Mark(',') if depth == 0 => {
                                self.use_tree(&inner[start..j], path.clone(), (id, public, inner[start].1));
                                start = j + 1;
                            }
                            _ => {}
                        }
                    }
                    if start < inner.len() {
                        self.use_tree(&inner[start..], path, (id, public, inner[start].1));
                    }
                    return;
                }
                _ => {}
            }
            i += 1;
        }
        if path.last().is_some_and(|w| w == "self") && path.len() > 1 {
            path.pop();
        }
        if let Some(name) = path.last().cloned() {
            self.modules[id].uses.insert(name, Use { path, public, line });
        }
    }

    fn root_of(&self, mut id: usize) -> usize {
        while let Some(parent) = self.modules[id].parent {
            id = parent;
        }
        id
    }

    /// The module and the rest of the path, from the module in which the path stands; `None` for other crates and
    /// for names that the module itself defines.
    fn resolve(&self, id: usize, path: &[String], depth: usize) -> Option<(usize, Vec<String>)> {
        let mut rest = path;
        let mut here = id;
        match rest.first()?.as_str() {
            "crate" => here = self.root_of(id),
            "virt_replica" => here = *self.roots.get("lib")?,
            "self" | "super" => {
                while let Some(step @ ("self" | "super")) = rest.first().map(String::as_str) {
                    here = if step == "super" { self.modules[here].parent? } else { here };
                    rest = &rest[1..];
                }
                return self.walk(here, rest, depth);
            }
            name => {
                let me = &self.modules[id];
                let local = me.children.contains_key(name) && rest.len() > 1;
                return if local || me.uses.contains_key(name) || !me.defined.contains(name) {
                    self.step(id, rest, depth)
                } else {
                    None
                };
            }
        }
        self.walk(here, &rest[1..], depth)
    }

    /// From a module on: as far as the path names modules and what they re-export.
    fn walk(&self, here: usize, rest: &[String], depth: usize) -> Option<(usize, Vec<String>)> {
        if rest.is_empty() {
            return Some((here, Vec::new()));
        }
        Some(self.step(here, rest, depth).unwrap_or_else(|| (here, rest.to_vec())))
    }

    fn step(&self, here: usize, rest: &[String], depth: usize) -> Option<(usize, Vec<String>)> {
        if depth > 12 {
            return None;
        }
        let (me, name) = (&self.modules[here], rest.first()?);
        let child = me.children.get(name);
        if let Some(child) = child.filter(|_| rest.len() > 1) {
            return self.walk(*child, &rest[1..], depth + 1);
        }
        if let Some(brought) = me.uses.get(name) {
            let before = &brought.path[..brought.path.len() - 1];
            // A `use` of an own child is the child.
            let itself =
                before.is_empty() || self.resolve(here, before, depth + 1).is_some_and(|r| r == (here, vec![]));
            return match child {
                Some(child) if itself => Some((*child, Vec::new())),
                _ if brought.path.len() == 1 => None,
                _ => {
                    let path: Vec<String> = brought.path.iter().chain(&rest[1..]).cloned().collect();
                    match path.first().filter(|first| *first == name) {
                        // `use ready::ready`: a function that is called as its module.
                        Some(_) => self.walk(*child?, &path[1..], depth + 1),
                        None => self.resolve(here, &path, depth + 1),
                    }
                }
            };
        }
        if me.defined.contains(name) {
            return Some((here, rest.to_vec()));
        }
        if let Some(child) = child {
            return Some((*child, Vec::new()));
        }
        me.globs.iter().find_map(|glob| {
            let (module, more) = self.resolve(here, &glob.path, depth + 1)?;
            (more.is_empty() && module != here).then(|| self.step(module, rest, depth + 1)).flatten()
        })
    }

    fn full_name(&self, mut id: usize, rest: &[String]) -> String {
        let mut words: Vec<&str> = rest.iter().rev().map(String::as_str).collect();
        while let Some(parent) = self.modules[id].parent {
            words.push(&self.modules[id].name);
            id = parent;
        }
        words.reverse();
        words.join("::")
    }

    fn arrow(&self, id: usize, path: &[String], line: usize) -> Option<Arrow> {
        let from = self.modules[id].file.clone();
        // A macro stands at the root, whatever file defines it.
        if let [root, name] = path
            && matches!(root.as_str(), "crate" | "virt_replica")
            && let Some(to) = self.macros.get(name)
        {
            return Some(Arrow { from, to: to.clone(), line, item: name.clone() });
        }
        let (module, rest) = self.resolve(id, path, 0)?;
        // A module alone is a name for the way; what is used of it is written behind it.
        let to = self.modules[module].file.clone();
        (!rest.is_empty() && to != from).then(|| Arrow { from, to, line, item: self.full_name(module, &rest[..1]) })
    }
}

/// Reads the crate from its roots (`lib.rs`, `main.rs`).
pub fn read(sources: &Sources) -> Imports {
    let mut tree = Tree::default();
    for (name, file) in [("lib", "lib.rs"), ("bin", "main.rs")] {
        if sources.contains_key(file) {
            let root = tree.add(file, None, "");
            tree.roots.insert(name, root);
            tree.file(sources, file, root, "", false);
        }
    }
    let mut found = Imports { files: tree.files.clone(), ..Imports::default() };
    for (id, module) in tree.modules.iter().enumerate() {
        if tree.files[&module.file] {
            continue;
        }
        // A re-export declares; it is no use of its own.
        let brought = module.uses.values().chain(&module.globs).filter(|u| !u.public);
        let paths = module.paths.iter().map(|(path, line)| (path, *line));
        for (path, line) in brought.map(|u| (&u.path, u.line)).chain(paths) {
            found.arrows.extend(tree.arrow(id, path, line));
        }
        for (path, line) in &module.impls {
            found.distant_impls.extend(tree.arrow(id, path, *line));
        }
    }
    found.arrows.sort();
    found.arrows.dedup_by(|a, b| (&a.from, &a.to, &a.item) == (&b.from, &b.to, &b.item));
    found
}

/// Every set of places each of which reaches all others, sets of one left out.
pub fn circles<'a>(arrows: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<BTreeSet<&'a str>> {
    let mut next: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (from, to) in arrows {
        next.entry(from).or_default().insert(to);
    }
    let reach = |start: &'a str| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![start]);
        while let Some(at) = open.pop() {
            for to in next.get(at).into_iter().flatten() {
                if seen.insert(*to) {
                    open.push(to);
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<&str>> = next.keys().map(|at| (*at, reach(at))).collect();
    let mut found: Vec<BTreeSet<&str>> = Vec::new();
    for (at, far) in &reached {
        if far.contains(at) && !found.iter().any(|set| set.contains(at)) {
            let set: BTreeSet<&str> =
                far.iter().copied().filter(|to| reached.get(to).is_some_and(|back| back.contains(at))).collect();
            if set.len() > 1 {
                found.push(set);
            }
        }
    }
    found
}

/// A circle for people: each arrow of it with the names that make it, the thinnest first.
pub fn drawn(set: &BTreeSet<&str>, arrows: &[Arrow]) -> String {
    let mut by_arrow: BTreeMap<(&str, &str), Vec<String>> = BTreeMap::new();
    for arrow in arrows.iter().filter(|a| set.contains(a.from.as_str()) && set.contains(a.to.as_str())) {
        let name = arrow.item.rsplit("::").next().unwrap_or_default();
        by_arrow.entry((&arrow.from, &arrow.to)).or_default().push(format!("{name} (line {})", arrow.line));
    }
    let mut lines: Vec<(usize, String)> = by_arrow
        .iter()
        .map(|((from, to), names)| (names.len(), format!("    {from} -> {to}: {}", names.join(", "))))
        .collect();
    lines.sort();
    let files = set.iter().copied().collect::<Vec<_>>().join(", ");
    format!(
        "{} files use each other: {files}\n{}",
        set.len(),
        lines.into_iter().map(|l| l.1).collect::<Vec<_>>().join("\n")
    )
}
