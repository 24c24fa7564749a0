//! Numbered crash points: places in the code where a test may kill, fail or delay the process.
//!
//! A point is named after the step it *follows* in docs/replication.md (`failpoint!("6d")` stands behind the act of
//! step 6d), so that "killed at 6d" means that 6d was done and nothing after it. Without the cargo feature
//! `failpoints` the macro is nothing at all: no branch, no string in the binary, no environment that could trigger it.
//!
//! With the feature, the environment variable `VIRT_REPLICA_FAILPOINT` arms points for the whole process; it is read
//! once, at the first hit. It holds actions joined with commas:
//!
//! ```text
//! 6d=kill            SIGKILL to this process: nothing is flushed, no destructor runs
//! 6d=error           the surrounding function returns an error of Kind::Io
//! 6d=sleep:5000      waits 5000 ms, then goes on
//! 6d=kill@3          as above at the third hit only (the first unless told)
//! ```
//!
//! A spec that cannot be understood makes every hit an error: a test whose fault never fires must not pass.
//!
//! With the feature, tests can also ask in which order a thread renamed, removed and synced ([`traced`]): killing
//! processes shows what is visible, and only the order shows what would be durable after a power cut.

/// Marks the end of a numbered step; usable in functions that return `Result<_, virt_replica::error::Error>`.
///
/// ```
/// fn step() -> virt_replica::error::Result<()> {
///     virt_replica::failpoint!("doc");
///     Ok(())
/// }
/// step().unwrap();
/// ```
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        $crate::failpoint::hit($name)?;
    };
}

#[cfg(feature = "failpoints")]
pub use armed::{VARIABLE, hit};
#[cfg(feature = "failpoints")]
pub use order::{trace, traced};

/// Adds to what [`traced`] returns: `sync`, `rename` (to) or `remove`, and a path.
#[macro_export]
macro_rules! traced_step {
    ($what:literal, $path:expr) => {
        #[cfg(feature = "failpoints")]
        $crate::failpoint::trace($what, ::std::path::Path::new(&$path));
    };
}

#[cfg(feature = "failpoints")]
mod order {
    use std::cell::RefCell;
    use std::path::Path;

    thread_local! {
        static STEPS: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
    }

    /// Runs `f` and returns what this thread renamed, removed and synced meanwhile, in order.
    pub fn traced<T>(f: impl FnOnce() -> T) -> (T, Vec<String>) {
        STEPS.set(Some(Vec::new()));
        let result = f();
        (result, STEPS.take().unwrap_or_default())
    }

    /// Called by the macro behind each act.
    pub fn trace(what: &str, path: &Path) {
        STEPS.with_borrow_mut(|steps| {
            if let Some(steps) = steps {
                steps.push(format!("{what} {}", path.display()));
            }
        });
    }
}

#[cfg(feature = "failpoints")]
mod armed {
    use crate::error::{Error, Kind, Result};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    /// Environment variable that arms points.
    pub const VARIABLE: &str = "VIRT_REPLICA_FAILPOINT";

    #[derive(Debug, PartialEq)]
    enum Act {
        Kill,
        Error,
        Sleep(Duration),
    }

    #[derive(Debug)]
    struct Armed {
        name: String,
        act: Act,
        /// The hit that fires, counted from 1.
        at: u64,
        hits: AtomicU64,
    }

    /// Called by the macro: does what is armed for `name`, if anything.
    pub fn hit(name: &str) -> Result<()> {
        static ARMED: OnceLock<Result<Vec<Armed>, String>> = OnceLock::new();
        match ARMED.get_or_init(|| parse(&std::env::var(VARIABLE).unwrap_or_default())) {
            Ok(armed) => fire(armed, name),
            Err(why) => Err(Error::new(Kind::Usage, format!("{VARIABLE}: {why}"))),
        }
    }

    fn fire(armed: &[Armed], name: &str) -> Result<()> {
        for point in armed.iter().filter(|p| p.name == name) {
            if point.hits.fetch_add(1, Ordering::SeqCst) + 1 != point.at {
                continue;
            }
            // A test waits for this line: "it sleeps there now".
            tracing::warn!("failpoint {name}: {:?}", point.act);
            match point.act {
                Act::Kill => kill_self(),
                Act::Error => return Err(Error::new(Kind::Io, format!("failpoint {name}"))),
                Act::Sleep(time) => std::thread::sleep(time),
            }
        }
        Ok(())
    }

    fn kill_self() -> ! {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The signal is delivered on the way back from the call; should it be refused, the crash must still happen.
        std::process::abort()
    }

    fn parse(spec: &str) -> Result<Vec<Armed>, String> {
        spec.split(',').map(str::trim).filter(|s| !s.is_empty()).map(parse_one).collect()
    }

    fn parse_one(item: &str) -> Result<Armed, String> {
        let (name, rest) = item.split_once('=').ok_or_else(|| format!("{item:?} is not NAME=ACTION[@HIT]"))?;
        let (act, at) = match rest.split_once('@') {
            Some((act, at)) => (act, at.parse().map_err(|_| format!("{at:?} is not a number of hits"))?),
            None => (rest, 1),
        };
        if at == 0 {
            return Err(format!("{item:?}: hits are counted from 1"));
        }
        let act = match act.split_once(':') {
            None if act == "kill" => Act::Kill,
            None if act == "error" => Act::Error,
            Some(("sleep", ms)) => {
                Act::Sleep(Duration::from_millis(ms.parse().map_err(|_| format!("{ms:?} is not milliseconds"))?))
            }
            _ => return Err(format!("{act:?} is not kill, error or sleep:MS")),
        };
        Ok(Armed { name: name.to_owned(), act, at, hits: AtomicU64::new(0) })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn fires_at_the_hit_it_was_armed_for_and_only_there() {
            let armed = parse("6d=error@2, 5a=sleep:1").unwrap();
            assert!(fire(&armed, "6d").is_ok());
            assert!(fire(&armed, "6c").is_ok());
            assert!(fire(&armed, "6d").is_err());
            assert!(fire(&armed, "6d").is_ok());
            assert_eq!(armed[1].act, Act::Sleep(Duration::from_millis(1)));
        }

        #[test]
        fn nonsense_is_an_error_and_nothing_is_nothing() {
            for bad in ["6d", "6d=", "6d=explode", "6d=sleep", "6d=sleep:soon", "6d=kill@", "6d=kill@0", "6d=kill@x"] {
                assert!(parse(bad).is_err(), "{bad}");
            }
            assert!(parse("").unwrap().is_empty());
        }
    }
}
