//! What ssh's failures mean, and what to do about them.
//!
//! Pure. ssh says why in words only, so this is the one place that reads them; a text nobody here knows stays
//! readable and is worth another try.

use crate::error::{Error, Kind, printable};
use crate::transport::target::SshTarget;
use std::error::Error as StdError;
use std::io;
use std::process::ExitStatus;

/// A master that could not be started.
pub(super) fn connect(target: &SshTarget, error: &openssh::Error) -> Error {
    let host = &target.host;
    let (text, missing) = match error {
        openssh::Error::Connect(e) => (e.to_string(), e.kind() == io::ErrorKind::NotFound),
        openssh::Error::Master(e) => return Error::new(Kind::Io, "cannot make the ssh control socket").source(copy(e)),
        other => (causes(other), false),
    };
    if missing {
        let hint = "install the OpenSSH client (openssh-client) on this host";
        return Error::new(Kind::NotFound, "cannot run ssh").source(text).hint(hint);
    }
    let (kind, what, hint) = judge(&text, &by_hand(target));
    let error = Error::new(kind, format!("{what} {host}: {}", printable(&text, 600)));
    hint.into_iter().fold(error, |error, hint| error.hint(hint))
}

/// The kind, the beginning of a sentence that the host ends, and advice. `by_hand` is the ssh command a person would
/// type.
fn judge(text: &str, by_hand: &str) -> (Kind, &'static str, Option<String>) {
    let has = |words: &str| text.contains(words);
    if has("IDENTIFICATION HAS CHANGED") {
        let hint = format!(
            "if the host was really reinstalled, compare the fingerprint with the host's own, remove the old key with \
             `ssh-keygen -R`, then run `{by_hand}` once; if not, somebody may stand in between"
        );
        return (Kind::Auth, "the host key has changed of", Some(hint));
    }
    if has("Host key verification failed") || has("host key is known") {
        let hint = format!(
            "run `{by_hand}` once and compare the fingerprint it shows with the host's own, or add the output of \
             `ssh-keyscan`, compared likewise, to known_hosts"
        );
        return (Kind::Auth, "the host key is not known of", Some(hint));
    }
    if has("Permission denied (") || has("Too many authentication failures") {
        let hint = format!(
            "`{by_hand}` must work without a password: put a public key into authorized_keys there; a key with a \
             passphrase needs a running ssh-agent"
        );
        return (Kind::Auth, "no login on", Some(hint));
    }
    if has("Bad configuration option") || has("Bad owner or permissions") || has("terminating,") {
        return (Kind::Config, "ssh does not accept its configuration for", None);
    }
    (Kind::Unavailable, "cannot reach", None)
}

/// A channel that the living master could not open.
pub(super) fn spawn(host: &str, error: &openssh::Error) -> Error {
    let text = causes(error);
    if text.contains("Session open refused by peer") {
        let what = format!("{host} refuses another channel over its ssh connection: {text}");
        return Error::new(Kind::Busy, what).hint("raise MaxSessions in sshd_config there, or run fewer at once");
    }
    Error::new(Kind::Unavailable, format!("cannot start the agent on {host}: {text}"))
}

/// How an agent ended. `said`: its last words on stderr, ready to be appended. `lost`: the connection is gone; the
/// master's log.
pub(super) fn end(
    host: &str,
    ended: Result<ExitStatus, openssh::Error>,
    said: &str,
    lost: Option<String>,
) -> crate::error::Result<()> {
    match ended {
        Ok(status) if status.success() => Ok(()),
        // Found but not executable.
        Ok(status) if status.code() == Some(126) => Err(no_agent(host, said)),
        Ok(status) => {
            let how = status.code().map_or_else(|| status.to_string(), |code| format!("exit code {code}"));
            Err(Error::new(Kind::Unavailable, format!("the agent on {host} ended with {how}{said}")))
        }
        Err(openssh::Error::Remote(e)) if e.kind() == io::ErrorKind::NotFound => Err(no_agent(host, said)),
        Err(_) if lost.is_some() => {
            let log = printable(&lost.unwrap_or_default(), 300);
            let log = if log.is_empty() { log } else { format!("; ssh said: {log}") };
            Err(Error::new(Kind::Unavailable, format!("the ssh connection to {host} was lost{said}{log}")))
        }
        Err(openssh::Error::RemoteProcessTerminated) => {
            Err(Error::new(Kind::Unavailable, format!("the agent on {host} was killed{said}")))
        }
        Err(error) => {
            let what = format!("cannot tell how the agent on {host} ended{said}: {}", causes(&error));
            Err(Error::new(Kind::Unavailable, what))
        }
    }
}

/// Exit code 127 has two meanings: the shell found no program, or the loader found no library for it.
fn no_agent(host: &str, said: &str) -> Error {
    if said.contains("shared librar") {
        return Error::new(Kind::Protocol, format!("virt-replica cannot start on {host}{said}"))
            .hint("install the library there, or a virt-replica built with --no-default-features, which needs none");
    }
    let hint = format!(
        "install the same version on {host}, in the PATH of a login without a terminal; if it is installed, its libvirt \
         library may be missing: build with --no-default-features"
    );
    Error::new(Kind::Protocol, format!("no virt-replica on {host}{said}")).hint(hint)
}

/// The command that does by hand what was tried.
fn by_hand(target: &SshTarget) -> String {
    let port = target.port.map(|port| format!("-p {port} ")).unwrap_or_default();
    let user = target.user.as_ref().map(|user| format!("{user}@")).unwrap_or_default();
    format!("ssh {port}{user}{}", target.host)
}

/// The useful text is never in the outermost error.
fn causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(c) = cause {
        text = format!("{text}: {c}");
        cause = c.source();
    }
    printable(&text, 600)
}

/// `io::Error` cannot be cloned.
fn copy(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn target() -> SshTarget {
        SshTarget { user: Some("root".into()), host: "b".into(), port: Some(2222), root: "/srv".into() }
    }

    fn connect_error(text: &str) -> Error {
        let error = io::Error::new(io::ErrorKind::ConnectionAborted, text);
        connect(&target(), &openssh::Error::Connect(error))
    }

    /// Texts of OpenSSH 9.2.
    #[test]
    fn every_refusal_has_its_kind_and_its_advice() {
        for (text, kind, advice) in [
            (
                "No ED25519 host key is known for [b]:2222 and you have requested strict checking.\r\nHost key \
                 verification failed.",
                Kind::Auth,
                "run `ssh -p 2222 root@b` once",
            ),
            (
                "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\r\nHost key verification failed.",
                Kind::Auth,
                "ssh-keygen -R",
            ),
            ("root@b: Permission denied (publickey,password).", Kind::Auth, "authorized_keys"),
            ("connect to host b port 2222: Connection refused", Kind::Unavailable, ""),
            ("Could not resolve hostname b: Name or service not known", Kind::Unavailable, ""),
            ("connect to host b port 2222: Connection timed out", Kind::Unavailable, ""),
            ("/etc/ssh/x: line 1: Bad configuration option: nonsense", Kind::Config, ""),
            ("something that no ssh has said yet", Kind::Unavailable, ""),
        ] {
            let error = connect_error(text);
            assert_eq!(error.kind(), kind, "{text}");
            assert!(error.hint_text().unwrap_or("").contains(advice), "{text}: {:?}", error.hint_text());
            assert!(error.what().contains(text.split(['\r', '\n']).next().unwrap()), "{error}");
            assert!(!error.what().contains('\r'), "{error}");
        }
    }

    #[test]
    fn a_bad_end_of_an_agent_is_told_apart() {
        let code = |code: i32| Ok(ExitStatus::from_raw(code << 8));
        let not_found = || Err(openssh::Error::Remote(io::ErrorKind::NotFound.into()));
        assert!(end("b", code(0), "", None).is_ok());

        let error = end("b", not_found(), "; it said: sh: virt-replica: not found", None).unwrap_err();
        assert_eq!(error.kind(), Kind::Protocol);
        assert!(error.hint_text().unwrap().contains("install the same version on b"));

        let said = "; it said: error while loading shared libraries: libvirt.so.0";
        let error = end("b", not_found(), said, None).unwrap_err();
        assert!(error.hint_text().unwrap().contains("--no-default-features, which needs none"));

        let error = end("b", code(1), "; it said: no store", None).unwrap_err();
        assert_eq!(error.what(), "the agent on b ended with exit code 1; it said: no store");

        let lost = || Err(openssh::Error::RemoteProcessTerminated);
        let error = end("b", lost(), "", Some("Timeout, server b not responding.\r\n".into())).unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.what().ends_with("was lost; ssh said: Timeout, server b not responding."), "{error}");
        assert!(end("b", lost(), "", None).unwrap_err().what().contains("was killed"));
    }
}
