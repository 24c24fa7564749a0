//! Where a replica lives: `ssh://[user@]host[:port][/root]`, or a directory of this host.
//!
//! Pure. A target comes from a policy or a command line and ends up among ssh's arguments: nothing passes that ssh
//! could take for an option, and nothing that a terminal or a shell could take for more than a name.

use crate::error::{Error, Kind, Result};
use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

/// Where stores live unless told otherwise.
pub const ROOT_DEFAULT: &str = "/var/lib/virt-replica";

/// A store's place. `Display` gives the canonical form, which parses to the same value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TargetUrl {
    /// A store on another host, reached by ssh.
    Ssh(SshTarget),
    /// A store on this host: tests, and disks that are carried away.
    Local {
        /// Absolute.
        root: PathBuf,
    },
}

/// A store on another host: login, host and directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SshTarget {
    /// `None`: as the user's ssh configuration says.
    pub user: Option<String>,
    /// A name, also an alias of the user's ssh configuration, or an address; IPv6 without brackets.
    pub host: String,
    /// `None`: as the user's ssh configuration says.
    pub port: Option<u16>,
    /// Absolute path of the store on the host.
    pub root: PathBuf,
}

impl TargetUrl {
    /// Parses `ssh://…`, `local:/root` or an absolute path.
    pub fn parse(text: &str) -> Result<TargetUrl> {
        let parsed = if let Some(rest) = text.strip_prefix("ssh://") {
            parse_ssh(rest).map(TargetUrl::Ssh)
        } else if let Some(path) = text.strip_prefix("local:") {
            parse_root(path).map(|root| TargetUrl::Local { root })
        } else if text.starts_with('/') {
            check_root(text).map(|root| TargetUrl::Local { root })
        } else {
            Err("it is neither ssh://host/root nor local:/root nor an absolute path".to_owned())
        };
        parsed.map_err(|why| {
            let shown: String = text.escape_debug().take(120).collect();
            let error = Error::new(Kind::Usage, format!("'{shown}' is not a target: {why}"));
            match scp_like(text) {
                Some(url) => error.hint(format!("write {url}")),
                None => error.hint("write ssh://[user@]host[:port][/root], or local:/root for this host"),
            }
        })
    }

    /// The host as messages name it.
    pub fn host(&self) -> &str {
        match self {
            TargetUrl::Ssh(ssh) => &ssh.host,
            TargetUrl::Local { .. } => "this host",
        }
    }

    /// Absolute path of the store.
    pub fn root(&self) -> &Path {
        match self {
            TargetUrl::Ssh(ssh) => &ssh.root,
            TargetUrl::Local { root } => root,
        }
    }
}

impl FromStr for TargetUrl {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for TargetUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetUrl::Ssh(ssh) => ssh.fmt(f),
            TargetUrl::Local { root } => write!(f, "local:{}", encoded(&root.to_string_lossy())),
        }
    }
}

impl fmt::Display for SshTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ssh://")?;
        if let Some(user) = &self.user {
            write!(f, "{}@", encoded(user))?;
        }
        match self.host.contains(':') {
            true => write!(f, "[{}]", self.host.replace('%', "%25"))?,
            false => f.write_str(&self.host)?,
        }
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        match self.root == Path::new(ROOT_DEFAULT) {
            true => Ok(()),
            false => write!(f, "{}", encoded(&self.root.to_string_lossy())),
        }
    }
}

type Parsed<T> = Result<T, String>;

fn parse_ssh(rest: &str) -> Parsed<SshTarget> {
    let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
    let (user, host_port) = match authority.rsplit_once('@') {
        Some((user, host_port)) => (Some(parse_user(user)?), host_port),
        None => (None, authority),
    };
    let (host, port) = match host_port.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or("a bracket is not closed")?;
            let port = match port {
                "" => None,
                port => Some(port.strip_prefix(':').ok_or("only a port may follow the bracket")?),
            };
            (parse_ipv6(address)?, port)
        }
        None => {
            let (host, port) = host_port.split_once(':').map_or((host_port, None), |(h, p)| (h, Some(p)));
            if port.is_some_and(|port| port.contains(':')) {
                return Err("an IPv6 address needs brackets".to_owned());
            }
            (parse_host(host)?, port)
        }
    };
    let port = port.map(parse_port).transpose()?;
    let root = if matches!(path, "" | "/") { PathBuf::from(ROOT_DEFAULT) } else { parse_root(path)? };
    Ok(SshTarget { user, host, port, root })
}

fn parse_user(text: &str) -> Parsed<String> {
    if text.contains(':') {
        return Err("a password has no place in it; use a key".to_owned());
    }
    let user = decoded(text)?;
    let good = |c: char| c.is_ascii_alphanumeric() || "._-+@".contains(c);
    match () {
        _ if user.is_empty() => Err("the user is empty".to_owned()),
        _ if user.starts_with('-') => Err("a user cannot begin with a hyphen".to_owned()),
        _ if user.len() > 128 || !user.chars().all(good) => {
            Err("a user has at most 128 letters, digits and . _ - + @".to_owned())
        }
        _ => Ok(user),
    }
}

fn parse_host(host: &str) -> Parsed<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match () {
        _ if host.is_empty() => Err("the host is missing".to_owned()),
        _ if host.starts_with('-') => Err("a host cannot begin with a hyphen".to_owned()),
        _ if host.len() > 253 || !host.chars().all(good) => {
            Err("a host has at most 253 letters, digits and . _ -".to_owned())
        }
        _ => Ok(host.to_owned()),
    }
}

/// An address without its brackets, perhaps with a zone (`fe80::1%25eth0`).
fn parse_ipv6(text: &str) -> Parsed<String> {
    let text = decoded(text)?;
    let (address, zone) = text.split_once('%').map_or((text.as_str(), None), |(a, z)| (a, Some(z)));
    let address: Ipv6Addr = address.parse().map_err(|_| "what stands in brackets is not an IPv6 address".to_owned())?;
    match zone {
        None => Ok(address.to_string()),
        Some(zone) if parse_host(zone).is_ok() && zone.len() < 16 => Ok(format!("{address}%{zone}")),
        Some(_) => Err("the zone of the address is not an interface's name".to_owned()),
    }
}

fn parse_port(text: &str) -> Parsed<u16> {
    match text.parse() {
        Ok(port) if port != 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
        _ => Err("a port is a number from 1 to 65535".to_owned()),
    }
}

/// The path of a URL.
fn parse_root(path: &str) -> Parsed<PathBuf> {
    if path.contains(['?', '#']) {
        return Err("a ? or # in a path is written %3F or %23".to_owned());
    }
    check_root(&decoded(path)?)
}

/// An absolute path in its simplest form.
fn check_root(path: &str) -> Parsed<PathBuf> {
    if path.chars().any(char::is_control) {
        return Err("the path has a control character".to_owned());
    }
    if !path.starts_with('/') {
        return Err("the path is not absolute".to_owned());
    }
    if Path::new(path).components().any(|c| c == Component::ParentDir) {
        return Err("the path goes upward".to_owned());
    }
    let root: PathBuf = Path::new(path).components().collect();
    if root == Path::new("/") { Err("the root directory is not a store".to_owned()) } else { Ok(root) }
}

fn decoded(text: &str) -> Parsed<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).filter(|d| d.iter().all(u8::is_ascii_hexdigit));
        let digits = digits.and_then(|d| std::str::from_utf8(d).ok()).ok_or("a % is not followed by two hex digits")?;
        bytes.push(u8::from_str_radix(digits, 16).expect("two hex digits fit a byte"));
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| "it decodes to something that is not UTF-8".to_owned())
}

fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, b| {
        match b.is_ascii_alphanumeric() || b"/._-+".contains(&b) {
            true => out.push(b.into()),
            false => out.push_str(&format!("%{b:02X}")),
        }
        out
    })
}

/// What was probably meant by `host` and `[user@]host:/root`, the way scp writes them.
fn scp_like(text: &str) -> Option<String> {
    let (host, path) = text.split_once(':').unwrap_or((text, ""));
    let url = format!("ssh://{host}{path}");
    let plausible = !host.is_empty() && (path.is_empty() || path.starts_with('/')) && !path.starts_with("//");
    (plausible && parse_ssh(&url[6..]).is_ok()).then_some(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `user|host|port|root`, or why not.
    fn parse(text: &str) -> String {
        match TargetUrl::parse(text) {
            Ok(TargetUrl::Local { root }) => format!("local|{}", root.display()),
            Ok(TargetUrl::Ssh(t)) => {
                let port = t.port.map(|p| p.to_string()).unwrap_or_default();
                format!("{}|{}|{port}|{}", t.user.unwrap_or_default(), t.host, t.root.display())
            }
            Err(e) => e.what().rsplit_once("is not a target: ").unwrap().1.to_owned(),
        }
    }

    #[test]
    fn targets_of_every_form() {
        for (text, parts) in [
            ("ssh://b", "|b||/var/lib/virt-replica"),
            ("ssh://b/", "|b||/var/lib/virt-replica"),
            ("ssh://root@b.example:2222/srv/vr", "root|b.example|2222|/srv/vr"),
            ("ssh://me%40corp@b//srv/./vr/", "me@corp|b||/srv/vr"),
            ("ssh://me@corp@b", "me@corp|b||/var/lib/virt-replica"),
            ("ssh://[::1]:22/a%20b", "|::1|22|/a b"),
            ("ssh://u@[fe80::1%25eth0]", "u|fe80::1%eth0||/var/lib/virt-replica"),
            ("local:/srv/vr", "local|/srv/vr"),
            ("/srv/100%", "local|/srv/100%"),
        ] {
            assert_eq!(parse(text), parts, "{text}");
            let target = TargetUrl::parse(text).unwrap();
            assert_eq!(TargetUrl::parse(&target.to_string()).unwrap(), target, "{text} as {target}");
        }
    }

    /// CVE-2017-1000117 and its family: a host or user that ssh takes for an option.
    #[test]
    fn nothing_becomes_an_option_or_a_command() {
        for text in [
            "ssh://-oProxyCommand=touch%20x/srv",
            "ssh://-oProxyCommand=x@b/srv",
            "ssh://%2doProxyCommand=x@b/srv",
            "ssh://-l@b",
            "ssh://-b",
            "ssh://a b/srv",
            "ssh://b;reboot/srv",
            "ssh://$(reboot)/srv",
            "ssh://b%0a/srv",
            "ssh://[-oX]/srv",
            "ssh://[::1%25-oX]/srv",
            "ssh://b:-1/srv",
            "ssh://b:+22/srv",
            "ssh://b/../etc",
            "ssh://b/a%2f..%2fetc",
            "ssh://b/a%00",
            "local:relative",
            "-oX",
        ] {
            assert!(TargetUrl::parse(text).is_err(), "{text}: {}", parse(text));
        }
    }

    #[test]
    fn refusals_say_why() {
        for (text, why) in [
            ("", "it is neither"),
            ("http://b/", "it is neither"),
            ("ssh://", "the host is missing"),
            ("ssh://root:secret@b", "a password"),
            ("ssh://::1/srv", "an IPv6 address needs brackets"),
            ("ssh://[::1/srv", "a bracket"),
            ("ssh://[::1]22", "only a port"),
            ("ssh://[b]", "what stands in brackets"),
            ("ssh://b:0", "a port is"),
            ("ssh://b:65536", "a port is"),
            ("ssh://b/a%2", "a % is not followed"),
            ("ssh://b/a%ff", "it decodes"),
            ("ssh://b/a?x", "a ? or #"),
            ("ssh://b//", "the root directory"),
            ("local:/", "the root directory"),
        ] {
            assert!(parse(text).starts_with(why), "{text}: {}", parse(text));
        }
    }

    #[test]
    fn the_way_scp_writes_is_understood_and_corrected() {
        let hint = |text| TargetUrl::parse(text).unwrap_err().hint_text().unwrap().to_owned();
        assert_eq!(hint("root@b:/srv/vr"), "write ssh://root@b/srv/vr");
        assert_eq!(hint("b"), "write ssh://b");
        assert!(hint("b:vr").starts_with("write ssh://[user@]host"));
    }
}
