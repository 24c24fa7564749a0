//! The operator's own programs around the freeze: a database is told to flush and to wait, and to go on.
//!
//! Invariant: whoever was told to wait is told to go on. Before `before_freeze` is run, the journal says durably that
//! `after_freeze` is owed; whoever comes next runs it: the run itself, the dead-man, the next run, `doctor`. It may so
//! be run twice, and has to bear that.
//!
//! Steps 3d.owed, 3d and 4g of docs/replication.md.

use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::hook::{Env, Hook};
use crate::name::{DomainName, DomainUuid};
use crate::replicate::state::journal::Journal;
use crate::replicate::state::record::OwedHook;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Programs around the freeze of a running domain. One that is off has nothing to wait.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FreezeHooks {
    /// If it fails there is no point.
    pub before: Option<Hook>,
    /// Run whatever became of the freeze, and of `before`. That it failed is a warning.
    pub after: Option<Hook>,
}

/// What hooks of this run are told.
pub(in crate::replicate) fn told(
    event: &str,
    (domain, uuid): (&DomainName, &DomainUuid),
    target: &str,
    run: &str,
) -> Env {
    let env =
        [("EVENT", event), ("DOMAIN", domain.as_str()), ("UUID", uuid.as_str()), ("TARGET", target), ("RUN", run)];
    env.map(|(name, value)| (format!("VIRT_REPLICA_{name}"), value.to_owned())).into()
}

impl FreezeHooks {
    /// Step 3d. `env`: what both are told, by the event's name. An error: `after_freeze` was run too, or is still owed.
    pub(in crate::replicate) fn before(&self, journal: &Journal, env: &dyn Fn(&str) -> Env) -> Result<()> {
        if let Some(after) = &self.after {
            // The program that is told to wait must be told to go on: check that now, not after the freeze.
            after.check()?;
            journal.owe_hook(&OwedHook {
                command: after.command.clone(),
                timeout_s: after.timeout.as_secs(),
                env: env("after_freeze"),
            })?;
            failpoint!("3d.owed");
        }
        let Some(before) = &self.before else { return Ok(()) };
        let failed = match before.run(&env("before_freeze")) {
            Ok(status) if status.success() => {
                failpoint!("3d");
                return Ok(());
            }
            Ok(status) => Error::new(Kind::Refused, format!("the hook before the freeze ended with {status}"))
                .path(&before.command[0])
                .hint("nothing was frozen; what it printed says why"),
            Err(e) if e.advice().is_some() => e,
            Err(e) => e.hint("nothing was frozen"),
        };
        if let Some(warning) = settle(journal)? {
            tracing::error!("{warning}");
        }
        Err(failed)
    }
}

/// Step 4g, and all that is needed after any crash: runs the hook that is owed. Gives what an operator has to know of
/// it.
pub(in crate::replicate) fn settle(journal: &Journal) -> Result<Option<String>> {
    let Some(owed) = journal.owed_hook()? else { return Ok(None) };
    let failed = match owed.command.is_empty() {
        // A document that nobody can obey is not kept for ever.
        true => Some("the hook that is owed after a freeze has no command".to_owned()),
        false => {
            let hook = Hook { command: owed.command, timeout: Duration::from_secs(owed.timeout_s) };
            match hook.run(&owed.env) {
                Ok(status) if status.success() => None,
                Ok(status) => Some(format!("the hook after the freeze, {}, ended with {status}", hook.command[0])),
                Err(e) => Some(format!("after the freeze: {}", e.chain())),
            }
        }
    };
    journal.hook_is_paid()?;
    failpoint!("4g");
    Ok(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replicate::state::journal::peek_hook;
    use std::path::Path;

    const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

    /// A hook that appends its event to a file.
    fn says(log: &Path, then: &str) -> Hook {
        let script = format!("echo $VIRT_REPLICA_EVENT >> {}; {then}", log.display());
        let command = ["/bin/sh", "-c", &script].map(str::to_owned).into();
        Hook { command, timeout: Duration::from_secs(10) }
    }

    fn env(event: &str) -> Env {
        let (domain, uuid) = (DomainName::new("web01").unwrap(), DomainUuid::new(UUID).unwrap());
        told(event, (&domain, &uuid), "ssh://dr1", "a1b2")
    }

    struct Setting {
        dir: tempfile::TempDir,
        journal: Journal,
    }

    impl Setting {
        fn new() -> Setting {
            let dir = tempfile::tempdir().unwrap();
            let uuid = DomainUuid::new(UUID).unwrap();
            let journal = Journal::open(dir.path(), &uuid, "test", "2026-11-25T00:00:00Z".parse().unwrap()).unwrap();
            Setting { dir, journal }
        }

        fn log(&self) -> std::path::PathBuf {
            self.dir.path().join("log")
        }

        fn said(&self) -> String {
            std::fs::read_to_string(self.log()).unwrap_or_default().replace('\n', " ").trim().to_owned()
        }

        fn owed(&self) -> bool {
            peek_hook(self.dir.path(), &DomainUuid::new(UUID).unwrap()).unwrap()
        }
    }

    #[test]
    fn whoever_was_told_to_wait_is_told_to_go_on() {
        let s = Setting::new();
        let hooks = FreezeHooks { before: Some(says(&s.log(), "true")), after: Some(says(&s.log(), "true")) };
        hooks.before(&s.journal, &env).unwrap();
        assert!(s.owed(), "it is owed from before the first program on");
        assert_eq!(settle(&s.journal).unwrap(), None);
        assert_eq!((s.said().as_str(), s.owed()), ("before_freeze after_freeze", false));
        assert_eq!(settle(&s.journal).unwrap(), None, "once");
        assert_eq!(s.said(), "before_freeze after_freeze");
    }

    #[test]
    fn one_that_fails_before_costs_the_point_and_the_other_is_run_all_the_same() {
        let s = Setting::new();
        let hooks = FreezeHooks { before: Some(says(&s.log(), "exit 3")), after: Some(says(&s.log(), "exit 4")) };
        let e = hooks.before(&s.journal, &env).unwrap_err();
        assert!(e.to_string().contains("exit status: 3") && e.hint_text().is_some(), "{e}");
        assert_eq!((s.said().as_str(), s.owed()), ("before_freeze after_freeze", false));
    }

    #[test]
    fn one_that_fails_after_is_said_and_not_owed_for_ever() {
        let s = Setting::new();
        let hooks = FreezeHooks { before: None, after: Some(says(&s.log(), "exit 4")) };
        hooks.before(&s.journal, &env).unwrap();
        assert!(settle(&s.journal).unwrap().unwrap().contains("exit status: 4"));
        assert!(!s.owed());
    }
}
