//! The power fails after every single act of a handover, or of calling it off.

use super::*;

/// The power fails after every single act, and the command is given again; or it is called off.
#[test]
fn whatever_it_dies_of_the_same_command_finishes_and_the_other_one_puts_back() {
    for abort in [false, true] {
        let mut deaths = 0;
        for acts in 0.. {
            let b = Bench::new();
            b.set(|w| w.acts_left = Some(acts));
            let done = b.over().is_ok();
            b.set(|w| w.acts_left = None);
            if done {
                break;
            }
            deaths += 1;
            match abort {
                // The power failed while it was being put back: that comes to its end first.
                false if matches!(b.stage(), Some(Stage::Aborting | Stage::Undone)) => {
                    assert!(b.over().is_err(), "{acts}");
                    b.back(false).unwrap();
                    b.is_home();
                }
                false => {
                    b.over().unwrap();
                    b.has_moved();
                }
                true => {
                    let home = b.back(true);
                    assert!(home.is_ok() || b.stage().is_none(), "{acts}: {home:?}");
                    b.is_home();
                }
            }
        }
        assert!(deaths > 15, "only {deaths} acts: the world is too small");
    }
}

/// And so does calling it off.
#[test]
fn calling_off_is_finished_by_the_same_command() {
    for acts in 0.. {
        let b = Bench::new();
        b.over().unwrap();
        b.set(|w| w.acts_left = Some(acts));
        let done = b.back(true).is_ok();
        b.set(|w| w.acts_left = None);
        if done {
            assert!(acts > 4);
            return;
        }
        if b.stage() != Some(Stage::Moved) {
            assert!(b.over().is_err(), "{acts}: first it comes to its end");
        }
        b.back(true).unwrap();
        b.is_home();
    }
}
