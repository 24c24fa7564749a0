//! The configuration that ssh is run with: the operator's own, as it is, and behind it the cipher that we would rather
//! have where the operator says nothing.
//!
//! Of each setting ssh takes the first value that it finds (ssh_config(5)), so that what stands last is a preference
//! and never a change. OpenSSH puts chacha20-poly1305 first because it is quick everywhere; where the processor has AES
//! of its own, AES-GCM moves the same bytes with half the processor time, and one core's cipher is what bounds a
//! connection.

use crate::error::{Error, Result};
use crate::users;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const SYSTEM: &str = "/etc/ssh/ssh_config";

/// In front of what OpenSSH would offer; an end that has neither takes one of the others.
const PREFERRED: &str = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com";

/// Makes the configuration in `dir`, which is private to this user. `given` is what the operator wants read instead of
/// the user's and the system's. `None`: ssh's own way of reading is left alone, because it could not be repeated word
/// for word, or because nothing would be gained.
pub(super) fn prepare(dir: &Path, given: Option<&Path>) -> Result<Option<PathBuf>> {
    if !has_aes() {
        return Ok(None);
    }
    let parts = match given {
        Some(path) => vec![Part::of(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()), false)],
        None => {
            // The home that ssh means, which is not `$HOME`. Where it is not known ssh knows, or does without.
            let Ok(Some(home)) = users::home(me()) else { return Ok(None) };
            vec![Part::of(&home.join(".ssh/config"), false), Part::of(Path::new(SYSTEM), true)]
        }
    };
    let Some(text) = configuration(&parts) else { return Ok(None) };
    write(dir, &text).map(Some)
}

/// One file that ssh reads by itself.
struct Part {
    path: PathBuf,
    /// ssh refuses to include what others may write, though it would read it by itself.
    trusted: bool,
    /// Names files by paths that mean another directory once it is included from elsewhere.
    moves: bool,
}

impl Part {
    fn of(path: &Path, system: bool) -> Part {
        // What is not there is included as nothing.
        let trusted = path.metadata().map_or(true, |m| [0, me()].contains(&m.uid()) && m.mode() & 0o022 == 0);
        let moves = system && std::fs::read_to_string(path).is_ok_and(|text| has_relative_include(&text));
        Part { path: path.to_owned(), trusted, moves }
    }
}

fn has_relative_include(text: &str) -> bool {
    let words = |line: &str| line.split(|c: char| c.is_whitespace() || c == '=').map(str::to_owned).collect::<Vec<_>>();
    text.lines().map(|line| words(line.trim())).any(|line| {
        let relative = |word: &String| !word.is_empty() && !word.trim_matches('"').starts_with(['/', '~']);
        line[0].eq_ignore_ascii_case("include") && line[1..].iter().any(relative)
    })
}

fn configuration(parts: &[Part]) -> Option<String> {
    let mut text =
        "# Made by virt-replica: your own configuration, and behind it what holds where it says nothing.\n".to_owned();
    for part in parts {
        let path = part.path.to_str().filter(|path| !path.contains(['*', '?', '[', '{', '"', '\\', '$', '%', '\n']))?;
        if !part.trusted || part.moves {
            return None;
        }
        writeln!(text, "Include \"{path}\"").expect("a string");
    }
    writeln!(text, "Match all\nCiphers {PREFERRED}").expect("a string");
    Some(text)
}

/// Named by its content: several of us may share the directory, and none leaves more than one behind.
fn write(dir: &Path, text: &str) -> Result<PathBuf> {
    let path = dir.join(format!("config-{}", &blake3::hash(text.as_bytes()).to_hex()[..8]));
    if std::fs::read_to_string(&path).is_ok_and(|there| there == text) {
        return Ok(path);
    }
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(text.as_bytes())?;
        file.persist(&path).map_err(|e| e.error)
    };
    write().map_err(|e| Error::io("cannot write the configuration of ssh", &path, e))?;
    Ok(path)
}

fn me() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Whether the processor does AES, and the multiplication of GCM, by itself.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn part(path: &Path) -> Part {
        Part { path: path.to_owned(), trusted: true, moves: false }
    }

    #[test]
    fn what_cannot_be_repeated_word_for_word_is_left_alone() {
        let good = Path::new("/etc/ssh/ssh_config");
        assert!(configuration(&[part(good)]).is_some());
        assert!(configuration(&[Part { trusted: false, ..part(good) }]).is_none());
        assert!(configuration(&[Part { moves: true, ..part(good) }]).is_none());
        for odd in ["/a*/config", "/a\"b", "/a%h", "/a$HOME"] {
            assert!(configuration(&[part(good), part(Path::new(odd))]).is_none(), "{odd}");
        }
        for (text, relative) in [
            ("Include /etc/ssh/ssh_config.d/*.conf\nHost *\n", false),
            ("# Include local\n", false),
            ("  include ~/.ssh/more \"/a/b\"\n", false),
            ("Include=local.conf\n", true),
            ("Host x\n\tINCLUDE /a b\n", true),
            ("", false),
            ("\n\n", false),
        ] {
            assert_eq!(has_relative_include(text), relative, "{text}");
        }
    }

    /// What ssh itself makes of it.
    fn effective(config: &Path, host: &str, key: &str) -> String {
        let ssh = Command::new("ssh").args(["-G", "-F"]).arg(config).arg(host).output().expect("run ssh");
        assert!(ssh.status.success(), "{}", String::from_utf8_lossy(&ssh.stderr));
        let text = String::from_utf8(ssh.stdout).expect("ssh writes text");
        let prefix = format!("{key} ");
        text.lines().find_map(|line| line.strip_prefix(&prefix)).expect("ssh says it").to_owned()
    }

    #[test]
    fn the_operators_own_words_come_first() {
        let dir = tempfile::tempdir().expect("make a directory");
        let own = dir.path().join("own");
        let text = "Host strict\nCiphers aes256-ctr\nHost *\nPort 2022\nHost other\nUser somebody\n";
        std::fs::write(&own, text).expect("write a configuration");
        let made = write(dir.path(), &configuration(&[part(&own)]).expect("it can be repeated")).expect("write ours");

        assert_eq!(effective(&made, "strict", "ciphers"), "aes256-ctr");
        let ciphers = effective(&made, "any", "ciphers");
        assert!(ciphers.starts_with("aes128-gcm@openssh.com,aes256-gcm@openssh.com,"), "{ciphers}");
        assert!(ciphers.contains("chacha20-poly1305"), "a server that has no AES-GCM is still spoken to: {ciphers}");
        assert_eq!(effective(&made, "any", "port"), "2022");
        assert_eq!(effective(&made, "other", "user"), "somebody");
        assert_eq!(write(dir.path(), &std::fs::read_to_string(&made).expect("read it")).expect("again"), made);
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 2, "made once, and nothing else left");
    }

    #[test]
    fn a_file_that_others_may_write_is_read_by_ssh_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("make a directory");
        let own = dir.path().join("own");
        std::fs::write(&own, "Port 2022\n").expect("write a configuration");
        assert!(Part::of(&own, false).trusted && Part::of(&dir.path().join("missing"), false).trusted);
        std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o664)).expect("loosen it");
        assert!(!Part::of(&own, false).trusted);
    }
}
