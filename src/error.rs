//! The one error type of the library: a kind that says what the caller must do, the facts, the cause.
//!
//! `Display` prints what happened and where; the cause is reached through `source()`; the command line prints the
//! whole chain and the exit code that belongs to the kind. Nothing decides on the text of an error.
//!
//! What to do next is an [`Advice`]: facts, which the program that speaks puts into [`Words`] that name its commands.

pub mod advice;

use advice::Advice;
use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::path::{Path, PathBuf};

/// Result with the error type of this library, unless another is named.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller must do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Correct the arguments; nothing was touched.
    Usage,
    /// Correct the configuration file; nothing was touched.
    Config,
    /// The named domain, target, point or file does not exist.
    NotFound,
    /// Somebody has to decide; nothing was changed.
    Conflict,
    /// Another run, block job or program holds it; try again later.
    Busy,
    /// Retry with backoff: the other side, or the way to it, is not there.
    Unavailable,
    /// The other side does not know us, or we do not know it (keys, host keys).
    Auth,
    /// The two sides do not speak the same language; drop the session, compare versions.
    Protocol,
    /// Stored data is not what it was; stop, never repair silently.
    Corrupt,
    /// libvirt, QEMU or the agent said no.
    Refused,
    /// No room for it, here or there.
    Space,
    /// This machine's files, processes or memory.
    Io,
    /// A deadline passed or a signal came; the journal knows the rest.
    Interrupted,
}

impl Kind {
    /// Exit code of the process for this kind. 127 and 255 are never used: ssh gives them meanings of its own.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Usage => 2,
            Kind::NotFound => 4,
            Kind::Busy => 11,
            Kind::Auth => 12,
            Kind::Corrupt => 13,
            Kind::Config => 78,
            Kind::Interrupted => 130,
            _ => 1,
        }
    }
}

/// Where it happened; filled where known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Context {
    /// Name or UUID of the domain. `None`: the error names none.
    pub domain: Option<String>,
    /// Name of the disk, for example vda. `None`: the error names none.
    pub disk: Option<String>,
    /// Id of the recovery point. `None`: the error names none.
    pub point: Option<String>,
    /// File or directory. `None`: the error names none.
    pub path: Option<PathBuf>,
    /// Offset in the file or disk, in bytes. `None`: the error names none.
    pub offset_bytes: Option<u64>,
}

/// Puts an advice into words; the context fills in what the error is about. A pure function of the program that speaks.
pub type Words = fn(&Advice, &Context) -> String;

/// Error of this library: kind, text, place, hint and cause.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    what: Cow<'static, str>,
    context: Context,
    advice: Option<Advice>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error without place, hint or cause.
    pub fn new(kind: Kind, what: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner { kind, what: what.into(), context: Context::default(), advice: None, source: None }))
    }

    /// An operating system error met while doing `what` to `path`. `ENOSPC` and `EDQUOT` become [`Kind::Space`].
    pub fn io(what: impl Into<Cow<'static, str>>, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::from_io(what, source).path(path)
    }

    /// As [`Error::io`], where no path is involved. An error of ours that came through a reader or writer is itself
    /// again.
    pub fn from_io(what: impl Into<Cow<'static, str>>, source: std::io::Error) -> Self {
        let source = match source.downcast::<Error>() {
            Ok(ours) => return ours,
            Err(source) => source,
        };
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Kind::Space,
            std::io::ErrorKind::NotFound => Kind::NotFound,
            _ => Kind::Io,
        };
        Self::new(kind, what).source(source)
    }

    /// Sets the cause, and replaces an earlier one.
    pub fn source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What to do next; shown on a line of its own. Replaces what was advised before.
    pub fn advise(mut self, advice: impl Into<Advice>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// As [`Error::advise`], in plain words that name no command of ours: in the imperative.
    pub fn hint(self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.advise(Advice::Text(hint.into()))
    }

    /// Adds the domain to the place, unless the error names one already.
    pub fn domain(mut self, domain: impl fmt::Display) -> Self {
        self.0.context.domain.get_or_insert_with(|| domain.to_string());
        self
    }

    /// Adds the disk to the place, unless the error names one already.
    pub fn disk(mut self, disk: impl fmt::Display) -> Self {
        self.0.context.disk.get_or_insert_with(|| disk.to_string());
        self
    }

    /// Adds the recovery point to the place, unless the error names one already.
    pub fn point(mut self, point: impl fmt::Display) -> Self {
        self.0.context.point.get_or_insert_with(|| point.to_string());
        self
    }

    /// Adds the file or directory to the place, unless the error names one already.
    pub fn path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.context.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Adds the offset in bytes to the place, unless the error names one already.
    pub fn offset(mut self, offset_bytes: u64) -> Self {
        self.0.context.offset_bytes.get_or_insert(offset_bytes);
        self
    }

    /// Kind of the error, which says what the caller must do.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Text of the error, without place, hint and cause.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// Place of the error, as far as it is known.
    pub fn context(&self) -> &Context {
        &self.0.context
    }

    /// What to do, as facts; `None` if the error has no advice.
    pub fn advice(&self) -> Option<&Advice> {
        self.0.advice.as_ref()
    }

    /// The advice, if it is plain words.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.advice.as_ref()?.text()
    }

    /// The advice as the program says it.
    pub fn next_step(&self, words: Words) -> Option<String> {
        self.0.advice.as_ref().map(|advice| words(advice, &self.0.context))
    }

    /// The same error once more, for another thread that waits for the same thing. Its causes become text.
    pub fn again(&self) -> Self {
        let mut copy = Self::new(self.0.kind, self.0.what.clone());
        copy.0.context = self.0.context.clone();
        copy.0.advice = self.0.advice.clone();
        match StdError::source(self) {
            None => copy,
            Some(cause) => {
                let mut text = cause.to_string();
                let mut next = cause.source();
                while let Some(cause) = next {
                    text.push_str(": ");
                    text.push_str(&cause.to_string());
                    next = cause.source();
                }
                copy.source(text)
            }
        }
    }

    /// Adds to what happened; the place and the hint stay.
    pub fn more(mut self, words: &str) -> Self {
        let what = self.0.what.to_mut();
        what.push_str("; ");
        what.push_str(words);
        self
    }

    /// The error and its causes, outermost first, joined with `: `.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = StdError::source(self);
        while let Some(c) = cause {
            let c_text = c.to_string();
            if !text.contains(&c_text) {
                text.push_str(": ");
                text.push_str(&c_text);
            }
            cause = c.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.0.context;
        if let Some(domain) = &c.domain {
            write!(f, "domain '{domain}': ")?;
        }
        if let Some(disk) = &c.disk {
            write!(f, "disk '{disk}': ")?;
        }
        if let Some(point) = &c.point {
            write!(f, "point {point}: ")?;
        }
        f.write_str(&self.0.what)?;
        if let Some(path) = &c.path {
            // Headers of images and peers name files, too, and a name may have any character.
            let shown: String = path.to_string_lossy().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            write!(f, " ({shown})")?;
        }
        if let Some(offset) = c.offset_bytes {
            write!(f, " at byte {offset}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|s| s.as_ref() as &(dyn StdError + 'static))
    }
}

/// Adds the place to errors that come from below.
pub trait ResultExt<T> {
    /// Adds the domain to the error's place, unless the error names one already.
    fn on_domain(self, domain: impl fmt::Display) -> Result<T>;
    /// Adds the disk to the error's place, unless the error names one already.
    fn on_disk(self, disk: impl fmt::Display) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn on_domain(self, domain: impl fmt::Display) -> Result<T> {
        self.map_err(|e| e.domain(domain))
    }

    fn on_disk(self, disk: impl fmt::Display) -> Result<T> {
        self.map_err(|e| e.disk(disk))
    }
}

/// Somebody else's words, fit for a terminal and a log line: control characters become spaces, the middle of a long
/// text is left out. At most about `max` bytes.
pub fn printable(text: &str, max: usize) -> String {
    let clean: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if clean.len() <= max {
        return clean;
    }
    let head = (0..=max / 3).rev().find(|&at| clean.is_char_boundary(at)).unwrap_or(0);
    let tail = (clean.len() - max / 2..clean.len()).find(|&at| clean.is_char_boundary(at)).unwrap_or(clean.len());
    format!("{} [...] {}", &clean[..head], &clean[tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_the_place_and_chain_names_the_cause() {
        let cause = std::io::Error::from_raw_os_error(28);
        let e = Error::io("cannot write", "/pool/a.qcow2", cause).offset(65536).disk("vda").domain("db01");
        assert_eq!(e.kind(), Kind::Space);
        assert_eq!(e.to_string(), "domain 'db01': disk 'vda': cannot write (/pool/a.qcow2) at byte 65536");
        assert!(e.chain().ends_with("No space left on device (os error 28)"), "{}", e.chain());
    }

    #[test]
    fn a_path_is_harmless_on_a_terminal() {
        let e = Error::new(Kind::Io, "cannot read").path("/pool/\x1b[2Ja");
        assert_eq!(e.to_string(), "cannot read (/pool/ [2Ja)");
    }

    #[test]
    fn an_error_that_came_through_a_reader_is_itself_again() {
        let inner = Error::new(Kind::Auth, "not that key").hint("another one");
        let e = Error::io("cannot read", "/a", std::io::Error::other(inner));
        assert_eq!(
            (e.kind(), e.to_string().as_str(), e.hint_text()),
            (Kind::Auth, "not that key (/a)", Some("another one"))
        );
    }

    #[test]
    fn an_error_for_another_thread_says_the_same() {
        let cause = std::io::Error::from_raw_os_error(28);
        let e = Error::io("cannot write", "/pool/a.qcow2", cause).disk("vda").hint("free some room");
        let copy = e.again().more("it had waited 8.0 s");
        assert_eq!((copy.kind(), copy.hint_text()), (e.kind(), e.hint_text()));
        assert_eq!(copy.to_string(), "disk 'vda': cannot write; it had waited 8.0 s (/pool/a.qcow2)");
        assert!(copy.chain().ends_with("No space left on device (os error 28)"), "{}", copy.chain());
    }

    #[test]
    fn the_innermost_place_wins() {
        let e = Error::new(Kind::Io, "x").disk("vdb").disk("vda");
        assert_eq!(e.context().disk.as_deref(), Some("vdb"));
    }

    #[test]
    fn no_kind_uses_an_exit_code_that_ssh_uses() {
        use Kind::*;
        for k in [
            Usage,
            Config,
            NotFound,
            Conflict,
            Busy,
            Unavailable,
            Auth,
            Protocol,
            Corrupt,
            Refused,
            Space,
            Io,
            Interrupted,
        ] {
            assert!(!matches!(k.exit_code(), 0 | 127 | 255));
        }
    }

    #[test]
    fn words_of_others_are_harmless_and_short() {
        assert_eq!(printable(" a\x1b[2Jb\r\n", 80), "a [2Jb");
        let long = printable(&"ä".repeat(1000), 100);
        assert!(long.len() <= 100 && long.contains(" [...] "), "{long}");
    }
}
