//! The words of the allow-list: what a rule is, and which values it lets through. Pure.

/// What a value has to look like.
#[derive(Debug, Clone, Copy)]
pub(super) enum Check {
    /// Letters, digits and `_ . : + -`, at most 64, the first a letter or a digit: a name from a list, never a path.
    Word,
    /// A word; these come through as others, which stand behind them.
    WordBut(&'static [(&'static str, &'static str)]),
    /// A decimal number within these bounds, both of them included.
    Count(u64, u64),
    /// The same, and it may be negative.
    Signed(i64, i64),
    /// A number up to this one, decimal or with `0x`.
    Hex(u64),
    /// `yes`, `no`, `on`, `off`.
    Switch,
    OneOf(&'static [&'static str]),
    /// One of the first words; or one of the pairs, whose second word takes the place of the first.
    Replaced(&'static [&'static str], &'static [(&'static str, &'static str)]),
    /// Words for the guest: printable, at most 255 bytes.
    Text,
}

impl Check {
    pub(super) fn take(self, value: &str) -> Taken<'_> {
        let pairs = match self {
            Check::WordBut(pairs) | Check::Replaced(_, pairs) => pairs,
            _ => &[],
        };
        match pairs.iter().find(|(from, _)| *from == value) {
            Some((_, to)) => Taken::Instead(to),
            None if self.accepts(value) => Taken::AsItIs(value),
            None => Taken::Not,
        }
    }

    /// Whether a value comes through as it is.
    pub(super) fn accepts(self, value: &str) -> bool {
        match self {
            Check::Word => is_word(value),
            Check::WordBut(pairs) => is_word(value) && !pairs.iter().any(|(from, _)| *from == value),
            Check::Count(min, max) => number(value).is_some_and(|n| (min..=max).contains(&n)),
            Check::Signed(min, max) => {
                let digits = value.strip_prefix('-').unwrap_or(value);
                number(digits).is_some() && value.parse().is_ok_and(|n: i64| (min..=max).contains(&n))
            }
            Check::Hex(max) => match value.strip_prefix("0x") {
                Some(digits) => {
                    digits.bytes().all(|b| b.is_ascii_hexdigit())
                        && u64::from_str_radix(digits, 16).is_ok_and(|n| n <= max)
                }
                None => number(value).is_some_and(|n| n <= max),
            },
            Check::Switch => matches!(value, "yes" | "no" | "on" | "off"),
            Check::OneOf(words) | Check::Replaced(words, _) => words.contains(&value),
            Check::Text => value.len() <= 255 && !value.chars().any(char::is_control),
        }
    }

    pub(super) fn words(self) -> String {
        match self {
            Check::Word | Check::WordBut(_) => "a plain word".to_owned(),
            Check::Count(min, max) => format!("a number from {min} to {max}"),
            Check::Signed(min, max) => format!("a number from {min} to {max}"),
            Check::Hex(max) => format!("a number up to {max:#x}"),
            Check::Switch => "yes, no, on or off".to_owned(),
            Check::OneOf(_) | Check::Replaced(..) => "one of the words known for it".to_owned(),
            Check::Text => "short, printable text".to_owned(),
        }
    }
}

/// What becomes of a value.
pub(crate) enum Taken<'a> {
    AsItIs(&'a str),
    Instead(&'static str),
    Not,
}

/// A decimal number: digits alone, no sign and no space.
pub(super) fn number(value: &str) -> Option<u64> {
    value.bytes().all(|b| b.is_ascii_digit()).then(|| value.parse().ok()).flatten()
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
    /// Attributes without which the element means nothing: it is left out where one of them is.
    pub needed: &'static [&'static str],
}

/// An element of attributes and children.
pub(super) const fn el(name: &'static str, attrs: &'static [(&'static str, Check)], children: &'static [Rule]) -> Rule {
    Rule { name, attrs, text: None, children, needed: &[] }
}

/// An element of text.
pub(super) const fn text(name: &'static str, attrs: &'static [(&'static str, Check)], check: Check) -> Rule {
    Rule { name, attrs, text: Some(check), children: &[], needed: &[] }
}

/// The same element; without these attributes it is left out.
pub(super) const fn needs(needed: &'static [&'static str], rule: Rule) -> Rule {
    Rule { needed, ..rule }
}
