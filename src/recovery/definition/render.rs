//! Writes known XML anew: a rule says which attributes, which children and which text an element may have, and what a
//! value has to look like. What no rule names does not come through, and is told.

use super::remark::{Remark, Verdict};
use super::rules;
use crate::error::{Result, printable};
use crate::hypervisor::xml::{escape, text_of};
use crate::recovery::definition::rule::{Check, Rule, Taken, is_word};
use roxmltree::Node;

/// An element that does not come through although there is a rule for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LeaveOut {
    /// Its path; with `[NAME]` behind it only the one of this name: `cpu/feature[hle]`.
    pub what: String,
    /// A sentence part, as in a remark.
    pub why: String,
}

/// XML that is being written, and what is to be said about it.
#[derive(Debug, Default)]
pub(super) struct Out {
    pub xml: String,
    pub remarks: Vec<Remark>,
    /// What is left out although it is known.
    pub leave_out: Vec<LeaveOut>,
    /// Paths of the elements that came through by their rule.
    pub written: Vec<String>,
    depth: usize,
}

impl Out {
    /// Nothing yet, and these elements never.
    pub fn without(leave_out: Vec<LeaveOut>) -> Out {
        Out { leave_out, ..Out::default() }
    }

    pub fn open(&mut self, name: &str, attrs: &[(&str, &str)]) -> Result<()> {
        self.tag(name, attrs, ">\n")?;
        self.depth += 1;
        Ok(())
    }

    pub fn close(&mut self, name: &str) {
        self.depth -= 1;
        self.indent();
        self.xml.push_str(&format!("</{name}>\n"));
    }

    pub fn leaf(&mut self, name: &str, attrs: &[(&str, &str)]) -> Result<()> {
        self.tag(name, attrs, "/>\n")
    }

    pub fn text(&mut self, name: &str, attrs: &[(&str, &str)], text: &str) -> Result<()> {
        self.tag(name, attrs, ">")?;
        self.xml.push_str(&escape(text)?);
        self.xml.push_str(&format!("</{name}>\n"));
        Ok(())
    }

    fn indent(&mut self) {
        self.xml.push_str(&"  ".repeat(self.depth));
    }

    fn tag(&mut self, name: &str, attrs: &[(&str, &str)], end: &str) -> Result<()> {
        self.indent();
        self.xml.push_str(&format!("<{name}"));
        for (name, value) in attrs {
            self.xml.push_str(&format!(" {name}='{}'", escape(value)?));
        }
        self.xml.push_str(end);
        Ok(())
    }

    /// What is refused and what the operator of this host has decided to do without is missing, and no more than that.
    pub fn remark(&mut self, what: &str, verdict: Verdict, why: impl Into<String>) {
        let mut remark = Remark { what: what.to_owned(), verdict, why: why.into() };
        if verdict == Verdict::Refused && self.why_left_out(what).is_some() {
            remark.verdict = Verdict::Missing;
            remark.why += ", and `leave_out:` in recovery.yaml says to do without";
        }
        if !self.remarks.contains(&remark) {
            self.remarks.push(remark);
        }
    }

    /// Why an element of this path is left out although there is a rule for it.
    fn why_left_out(&self, path: &str) -> Option<&LeaveOut> {
        let kind = path.split('[').next().unwrap_or(path);
        self.leave_out.iter().find(|l| l.what == path || l.what == kind)
    }

    /// Whether an element of this path is left out; it is told then.
    pub fn leaves_out(&mut self, path: &str) -> bool {
        let Some(LeaveOut { why, .. }) = self.why_left_out(path).cloned() else { return false };
        self.remark(path, Verdict::Missing, why);
        true
    }

    /// What no rule names does not come through, for the reason that there is.
    pub fn unknown(&mut self, path: &str) {
        match rules::REASONS.iter().find(|(p, ..)| *p == path) {
            Some((_, verdict, why)) => self.remark(path, *verdict, *why),
            None => self.remark(&printable(path, 80), Verdict::LeftOut, "is not known to be harmless here"),
        }
    }

    /// The attributes of `node` that `allowed` names. An unknown attribute is left out, and so is a value that this
    /// host cannot use: nothing that is harmless keeps a guest from being started.
    pub fn attributes<'a>(
        &mut self,
        node: Node<'a, '_>,
        path: &str,
        allowed: &[(&'static str, Check)],
    ) -> Vec<(&'static str, &'a str)> {
        for attribute in node.attributes().filter(|a| !allowed.iter().any(|(name, _)| *name == a.name())) {
            self.unknown(&format!("{path}/@{}", attribute.name()));
        }
        let mut kept = Vec::new();
        for (name, check) in allowed {
            let Some(value) = node.attribute(*name) else { continue };
            kept.extend(self.taken(&format!("{path}/@{name}"), *check, value).map(|value| (*name, value)));
        }
        kept
    }

    /// The value that stands for this one here; `None` where there is none, which is told.
    pub fn taken<'a>(&mut self, path: &str, check: Check, value: &'a str) -> Option<&'a str> {
        match check.take(value) {
            Taken::AsItIs(value) => Some(value),
            Taken::Instead(other) => {
                self.remark(path, Verdict::LeftOut, format!("is {} at the source, and '{other}' here", shown(value)));
                Some(other)
            }
            Taken::Not => {
                let why = format!("is left out: {} is not {}", shown(value), check.words());
                self.remark(path, Verdict::Missing, why);
                None
            }
        }
    }

    /// Writes `node` as far as its rule goes. `path` is how it is called in remarks.
    pub fn copy(&mut self, node: Node, rule: &Rule, path: &str) -> Result<()> {
        if self.leaves_out(path) {
            return Ok(());
        }
        let attrs = self.attributes(node, path, rule.attrs);
        if let Some(needed) = rule.needed.iter().find(|name| !attrs.iter().any(|(kept, _)| kept == *name)) {
            self.remark(path, Verdict::Missing, format!("is left out: it has no '{needed}' that can be used here"));
            return Ok(());
        }
        if let Some(check) = rule.text {
            let value = text_of(node);
            if let Some(value) = self.taken(path, check, value.trim()) {
                self.text(rule.name, &attrs, value)?;
                self.written.push(path.to_owned());
            }
            return Ok(());
        }
        let mut inner = Out { depth: self.depth + 1, leave_out: self.leave_out.clone(), ..Out::default() };
        inner.children(node, rule.children, path)?;
        let xml = std::mem::take(&mut inner.xml);
        self.written.push(path.to_owned());
        self.written.append(&mut inner.written);
        inner.remarks.into_iter().for_each(|r| self.remark(&r.what, r.verdict, r.why));
        if xml.is_empty() {
            return self.leaf(rule.name, &attrs);
        }
        self.open(rule.name, &attrs)?;
        self.xml.push_str(&xml);
        self.close(rule.name);
        Ok(())
    }

    /// Writes the children of `node` that have a rule; says of the others that they are left out.
    pub fn children(&mut self, node: Node, rules: &[Rule], path: &str) -> Result<()> {
        for child in node.children().filter(Node::is_element) {
            let name = child.tag_name().name();
            let path = path_of(child, path);
            match rules.iter().find(|r| r.name == name && child.tag_name().namespace().is_none()) {
                Some(rule) => self.copy(child, rule, &path)?,
                None => self.unknown(&path),
            }
        }
        Ok(())
    }
}

/// How an element is called in remarks and in `leave_out:`; those that are told apart by a name of their own have it
/// behind.
pub(super) fn path_of(node: Node, parent: &str) -> String {
    let kind = node.tag_name().name();
    match (kind, node.attribute("name").filter(|name| is_word(name))) {
        ("feature" | "timer", Some(name)) => format!("{parent}/{kind}[{name}]"),
        _ => format!("{parent}/{kind}"),
    }
}

/// A stranger's value, fit to be shown.
pub(super) fn shown(value: &str) -> String {
    format!("'{}'", crate::error::printable(value, 60))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::definition::rule::{el, needs, number, text};

    const RULE: Rule = el("cpu", &[("mode", Check::Word)], &[text("model", &[], Check::Word), el("deep", &[], &[])]);

    fn copied(xml: &str) -> (String, Vec<String>) {
        let doc = crate::hypervisor::xml::document(xml).unwrap();
        let mut out = Out::default();
        out.copy(doc.root_element(), &RULE, "cpu").unwrap();
        (out.xml, out.remarks.iter().map(|r| r.what.clone()).collect())
    }

    #[test]
    fn what_the_rule_names_comes_through_and_nothing_else() {
        let (xml, left) = copied(
            "<cpu mode='custom' evil='/x'><model>Haswell</model><model>a b</model><evil/><deep><evil/></deep></cpu>",
        );
        assert_eq!(xml, "<cpu mode='custom'>\n  <model>Haswell</model>\n  <deep/>\n</cpu>\n");
        assert_eq!(left, ["cpu/@evil", "cpu/model", "cpu/evil", "cpu/deep/evil"]);
    }

    #[test]
    fn a_value_out_of_bounds_is_left_out_and_one_that_has_another_word_here_is_replaced() {
        const RULE: Rule = needs(
            &["type"],
            el("x", &[("type", Check::Replaced(&["a"], &[("b", "a")])), ("n", Check::Count(1, 9))], &[]),
        );
        let copied = |xml: &str| {
            let doc = crate::hypervisor::xml::document(xml).unwrap();
            let mut out = Out::default();
            out.copy(doc.root_element(), &RULE, "x").unwrap();
            assert!(out.remarks.iter().all(|r| r.verdict != Verdict::Refused), "{:?}", out.remarks);
            (out.xml, out.remarks.len())
        };
        assert_eq!(copied("<x type='a' n='9'/>"), ("<x type='a' n='9'/>\n".to_owned(), 0));
        assert_eq!(copied("<x type='b' n='10'/>"), ("<x type='a'/>\n".to_owned(), 2));
        assert_eq!(copied("<x type='c'/>"), (String::new(), 2));
        for (value, ok) in [("-1", true), ("7", true), ("8", false), ("-2", false), ("+1", false), ("--1", false)] {
            assert_eq!(Check::Signed(-1, 7).accepts(value), ok, "{value}");
        }
        for (value, ok) in
            [("0x1f", true), ("31", true), ("0x20", false), ("32", false), ("0x", false), ("0x+1", false)]
        {
            assert_eq!(Check::Hex(31).accepts(value), ok, "{value}");
        }
    }

    #[test]
    fn no_path_and_no_markup_is_a_word() {
        for bad in ["", "/dev/sda", "../x", "a b", "a'b", "<x>", "a\nb", "-x", ".x", &"a".repeat(65), "ä"] {
            assert!(!is_word(bad), "{bad:?}");
            assert!(
                !Check::Count(0, 9).accepts(bad) && !Check::Hex(9).accepts(bad) && number(bad).is_none(),
                "{bad:?}"
            );
        }
        for good in ["pc-q35-7.2", "Haswell-noTSX-IBRS", "52:54:00:00:00:01", "org.qemu.guest_agent.0"] {
            assert!(is_word(good), "{good}");
        }
    }
}
