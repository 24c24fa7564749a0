//! Which step is next, in every state of a disk.

use super::*;

#[test]
fn every_state_of_a_disk_has_its_step_and_none_starts_an_old_image() {
    use On::{Other, Overlay, Raw};
    let on = [None, Some(Overlay), Some(Raw), Some(Other)];
    let mut seen = 0;
    for (live, inactive) in on.iter().flat_map(|live| on.iter().map(move |inactive| (*live, *inactive))) {
        for overlay in [false, true] {
            for job in [Job::None, Job::AtWork, Job::Ready] {
                seen += 1;
                let todo = next(Seen { live, inactive, overlay, job });
                let state = format!("{live:?} {inactive:?} {overlay} {job:?}: {todo:?}");
                match todo {
                    // From the overlay only while it is the disk, by all that can be asked.
                    Next::Copy | Next::Wait | Next::Move => {
                        assert!(live == Some(Overlay) && inactive == Some(Overlay) && overlay, "{state}");
                        assert_eq!(todo == Next::Move, job == Job::Ready, "{state}");
                    }
                    Next::Convert => assert!(live.is_none() && inactive == Some(Overlay) && overlay, "{state}"),
                    Next::Define => {
                        assert!(
                            inactive == Some(Overlay) && (live == Some(Raw) || (live.is_none() && !overlay)),
                            "{state}"
                        );
                    }
                    Next::PutAway => assert!(overlay && inactive == Some(Raw) && live != Some(Overlay), "{state}"),
                    Next::Done => assert!(!overlay && inactive == Some(Raw) && live != Some(Overlay), "{state}"),
                    Next::Strange => {
                        let elsewhere = live == Some(Other) || matches!(inactive, None | Some(Other));
                        let apart = live == Some(Overlay) && (inactive == Some(Raw) || !overlay);
                        assert!(elsewhere || apart, "{state}");
                    }
                }
            }
        }
    }
    assert_eq!(seen, 96);
}
