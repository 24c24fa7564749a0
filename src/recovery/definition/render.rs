//! Writes known XML anew: a rule says which attributes, which children and which text an element may have, and what a value
//! has to look like. What no rule names does not come through, and is told.

use super::remark::{Remark, Verdict};
use crate::error::Result;
use crate::hypervisor::xml::{escape, text_of};
use roxmltree::Node;

/// What a value has to look like.
#[derive(Debug, Clone, Copy)]
pub(super) enum Check {
    /// Letters, digits and `_ . : + -`, at most 64, the first a letter or a digit: a name from a list, never a path.
    Word,
    /// A decimal number.
    Number,
    /// A number, decimal or with `0x`.
    Hex,
    /// `yes`, `no`, `on`, `off`.
    Switch,
    OneOf(&'static [&'static str]),
    /// Words for the guest: printable, at most 255 bytes.
    Text,
}

impl Check {
    pub(super) fn accepts(self, value: &str) -> bool {
        let is_number = |v: &str| (1..=20).contains(&v.len()) && v.bytes().all(|b| b.is_ascii_digit());
        match self {
            Check::Word => is_word(value),
            Check::Number => is_number(value),
            Check::Hex => match value.strip_prefix("0x") {
                Some(digits) => (1..=16).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit()),
                None => is_number(value),
            },
            Check::Switch => matches!(value, "yes" | "no" | "on" | "off"),
            Check::OneOf(words) => words.contains(&value),
            Check::Text => value.len() <= 255 && !value.chars().any(char::is_control),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Check::Word => "a plain word",
            Check::Number => "a number",
            Check::Hex => "a number",
            Check::Switch => "yes, no, on or off",
            Check::OneOf(_) => "one of the words known for it",
            Check::Text => "short, printable text",
        }
    }
}

pub(super) fn is_word(value: &str) -> bool {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b"_.:+-".contains(&b);
    (1..=64).contains(&value.len()) && value.bytes().all(ok) && value.as_bytes()[0].is_ascii_alphanumeric()
}

/// An element that comes through, with all that comes through of it.
#[derive(Debug)]
pub(super) struct Rule {
    pub name: &'static str,
    pub attrs: &'static [(&'static str, Check)],
    pub text: Option<Check>,
    pub children: &'static [Rule],
}

/// An element of attributes and children.
pub(super) const fn el(name: &'static str, attrs: &'static [(&'static str, Check)], children: &'static [Rule]) -> Rule {
    Rule { name, attrs, text: None, children }
}

/// An element of text.
pub(super) const fn text(name: &'static str, attrs: &'static [(&'static str, Check)], check: Check) -> Rule {
    Rule { name, attrs, text: Some(check), children: &[] }
}

/// XML that is being written, and what is to be said about it.
#[derive(Debug, Default)]
pub(super) struct Out {
    pub xml: String,
    pub remarks: Vec<Remark>,
    depth: usize,
}

impl Out {
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

    pub fn remark(&mut self, what: &str, verdict: Verdict, why: impl Into<String>) {
        let remark = Remark { what: what.to_owned(), verdict, why: why.into() };
        if !self.remarks.contains(&remark) {
            self.remarks.push(remark);
        }
    }

    /// The attributes of `node` that `allowed` names; a value that is none is refused, an attribute nobody named is left out.
    pub fn attributes<'a>(
        &mut self,
        node: Node<'a, '_>,
        path: &str,
        allowed: &[(&'static str, Check)],
    ) -> Vec<(&'static str, &'a str)> {
        for attribute in node.attributes().filter(|a| !allowed.iter().any(|(name, _)| *name == a.name())) {
            self.remark(&format!("{path}/@{}", attribute.name()), Verdict::LeftOut, "is not known to be harmless here");
        }
        let mut kept = Vec::new();
        for (name, check) in allowed {
            let Some(value) = node.attribute(*name) else { continue };
            match check.accepts(value) {
                true => kept.push((*name, value)),
                false => {
                    let why = format!("{} is not {}", shown(value), check.words());
                    self.remark(&format!("{path}/@{name}"), Verdict::Refused, why);
                }
            }
        }
        kept
    }

    /// Writes `node` as far as its rule goes. `path` is how it is called in remarks.
    pub fn copy(&mut self, node: Node, rule: &Rule, path: &str) -> Result<()> {
        let attrs = self.attributes(node, path, rule.attrs);
        if let Some(check) = rule.text {
            let value = text_of(node);
            let value = value.trim();
            if !check.accepts(value) {
                self.remark(path, Verdict::Refused, format!("{} is not {}", shown(value), check.words()));
                return Ok(());
            }
            return self.text(rule.name, &attrs, value);
        }
        let mut inner = Out { depth: self.depth + 1, ..Out::default() };
        inner.children(node, rule.children, path)?;
        let xml = std::mem::take(&mut inner.xml);
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
            let path = format!("{path}/{name}");
            match rules.iter().find(|r| r.name == name && child.tag_name().namespace().is_none()) {
                Some(rule) => self.copy(child, rule, &path)?,
                None => self.remark(&path, Verdict::LeftOut, "is not known to be harmless here"),
            }
        }
        Ok(())
    }
}

/// A stranger's value, fit to be shown.
pub(super) fn shown(value: &str) -> String {
    format!("'{}'", crate::error::printable(value, 60))
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn no_path_and_no_markup_is_a_word() {
        for bad in ["", "/dev/sda", "../x", "a b", "a'b", "<x>", "a\nb", "-x", ".x", &"a".repeat(65), "ä"] {
            assert!(!is_word(bad), "{bad:?}");
            assert!(!Check::Number.accepts(bad) && !Check::Hex.accepts(bad), "{bad:?}");
        }
        for good in ["pc-q35-7.2", "Haswell-noTSX-IBRS", "52:54:00:00:00:01", "org.qemu.guest_agent.0"] {
            assert!(is_word(good), "{good}");
        }
    }
}
