//! How long to wait after a run that failed. Pure: the random bits are an argument.

use crate::error::Kind;
use std::time::Duration;

/// What a policy says of it. `first` is at least a second and at most `max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Wait after the first failure. It doubles with each further one.
    pub first: Duration,
    /// Longest wait. It applies at once where a person has to act.
    pub max: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Retry { first: Duration::from_secs(30), max: Duration::from_secs(30 * 60) }
    }
}

/// What kind of waiting an error asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// It ends by itself and soon: somebody else's run, a signal.
    Soon,
    /// It may take its time: longer from one attempt to the next.
    Growing,
    /// A person has to do something first; asking often only fills the log.
    Person,
}

impl Patience {
    /// `None`: the run said nothing, as one that was killed.
    pub fn of(kind: Option<Kind>) -> Patience {
        match kind {
            Some(Kind::Busy | Kind::Interrupted) => Patience::Soon,
            None | Some(Kind::Unavailable | Kind::Io | Kind::Refused | Kind::Protocol) => Patience::Growing,
            Some(Kind::Usage | Kind::Config | Kind::NotFound | Kind::Conflict | Kind::Auth) => Patience::Person,
            Some(Kind::Corrupt | Kind::Space) => Patience::Person,
        }
    }
}

/// How many doublings [`Patience::Soon`] goes through.
const SOON_DOUBLINGS: u32 = 2;

/// The time to wait after `failures` in a row (1: the first). Never more than `retry.max`, never less than half of what
/// the rule says: the random bits shorten it, so that domains that failed together do not come back together.
pub fn delay(retry: Retry, kind: Option<Kind>, failures: u32, random: u64) -> Duration {
    let doublings = failures.saturating_sub(1);
    let grown = |n: u32| retry.first.saturating_mul(2u32.saturating_pow(n.min(31))).min(retry.max);
    let whole = match Patience::of(kind) {
        Patience::Soon => grown(doublings.min(SOON_DOUBLINGS)),
        Patience::Growing => grown(doublings),
        Patience::Person => retry.max,
    };
    whole.mul_f64(0.5 + 0.5 * (random as f64 / u64::MAX as f64)).min(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds of the first waits, without the shortening.
    fn waits(kind: Option<Kind>) -> Vec<u64> {
        let retry = Retry { first: Duration::from_secs(30), max: Duration::from_secs(600) };
        (1..8).map(|n| delay(retry, kind, n, u64::MAX).as_secs()).collect()
    }

    #[test]
    fn patience_follows_what_the_caller_can_do() {
        assert_eq!(waits(Some(Kind::Unavailable)), [30, 60, 120, 240, 480, 600, 600]);
        assert_eq!(waits(None), waits(Some(Kind::Io)));
        assert_eq!(waits(Some(Kind::Busy)), [30, 60, 120, 120, 120, 120, 120]);
        assert_eq!(waits(Some(Kind::Auth)), [600; 7]);
    }

    #[test]
    fn randomness_shortens_by_at_most_half_and_never_overflows() {
        let retry = Retry::default();
        for random in [0, 1, u64::MAX / 3, u64::MAX] {
            for failures in [0, 1, 5, 31, 32, u32::MAX] {
                let got = delay(retry, None, failures, random);
                let whole = delay(retry, None, failures, u64::MAX);
                assert!(got <= whole && got >= whole / 2, "{random} {failures}: {got:?} of {whole:?}");
                assert!(got <= retry.max);
            }
        }
    }
}
