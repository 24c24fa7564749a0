//! A replica whose domain was brought up from it: no source writes to it, and its point stays, until that is withdrawn;
//! once it was committed, for ever.

use super::support::*;
use virt_replica::error::Kind;
use virt_replica::name::{Generation, PointId};
use virt_replica::replica::Replica;
use virt_replica::replica::store::Store;
use virt_replica::replica::upkeep::{Promoting, PruneReport, Upkeep};

/// A run of this generation that would build on the head.
fn begin_as(store: &Store, generation: u64) -> virt_replica::error::Result<()> {
    let head = store.describe().unwrap().head().map(|p| p.id.clone());
    let mut request = begin(50, head, &[("vda", 8 << 16, false)]);
    request.generation = Generation(generation);
    store.begin(&request).and_then(|_| store.abandon())
}

fn prune_all_but_the_head(store: &Store, history: &History) -> PruneReport {
    let ids: Vec<PointId> = history[..history.len() - 1].iter().map(|(id, _)| id.clone()).collect();
    store.prune(&ids, &mut |_, _| {}).unwrap()
}

#[test]
fn no_source_writes_to_a_promoted_replica_and_all_do_again_when_it_is_withdrawn() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let history = blocks(&store, "aaaaaaaa b....... .c......");
    begin_as(&store, 1).unwrap();
    assert_eq!(store.promoted().unwrap(), None);
    let middle = &history[1].0;
    for _ in 0..2 {
        store.promote(middle).unwrap();
    }
    assert_eq!(store.promoted().unwrap().map(|p| (p.point, p.committed)), Some((middle.clone(), false)));
    // Whatever generation it claims: who came up here decides.
    for generation in [1, 2, 99] {
        let e = begin_as(&store, generation).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict);
        assert!(e.chain().contains("brought up on the target"), "{}", e.chain());
        assert_eq!(e.advice(), Some(&virt_replica::error::advice::Failover::LeaveOffOrUndo.into()));
    }
    let e = store.promote(&history[2].0).unwrap_err();
    assert_eq!(e.kind(), Kind::Conflict, "{}", e.chain());
    for _ in 0..2 {
        store.withdraw().unwrap();
    }
    assert_eq!((store.promoted().unwrap(), store.describe().unwrap().generation), (None, Generation(1)));
    begin_as(&store, 1).unwrap();
    assert_history(&store, &history, "nothing of any point has changed");
}

#[test]
fn the_promoted_point_and_what_it_stands_on_stay() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let mut history = blocks(&store, "aaaaaaaa b....... .c...... ..d.....");
    let promoted = history[1].0.clone();
    store.promote(&promoted).unwrap();
    let lease = &store.holds().unwrap().leases[0];
    assert_eq!((&lease.point, lease.purpose.as_str()), (&promoted, "failover"));
    // It is passed by; the others go, and what it reads through stays as it is.
    let others = [history[0].0.clone(), history[2].0.clone()];
    let image = store.describe().unwrap().points[1].disks[0].image.clone();
    let before = std::fs::metadata(&image).unwrap().modified().unwrap();
    let report = prune_all_but_the_head(&store, &history);
    assert_eq!(report.removed, others);
    assert_eq!(report.kept.iter().map(|k| &k.point).collect::<Vec<_>>(), [&promoted]);
    assert_eq!(std::fs::metadata(&image).unwrap().modified().unwrap(), before, "its image was written to");
    history.retain(|(id, _)| !others.contains(id));
    assert_history(&store, &history, "promoted");
    store.withdraw().unwrap();
    assert_eq!(store.holds().unwrap().leases, []);
    store.prune(&[], &mut |_, _| {}).unwrap();
    assert_history(&store, &history, "withdrawn, and folded");
    assert_no_remains(&store);
}

#[test]
fn a_committed_failover_is_the_new_truth() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let history = blocks(&store, "aaaaaaaa b.......");
    assert_eq!(store.commit().unwrap_err().kind(), Kind::NotFound);
    store.promote(&history[1].0).unwrap();
    for _ in 0..2 {
        assert_eq!(store.commit().unwrap(), Generation(2), "the second time changes nothing");
    }
    assert_eq!(store.withdraw().unwrap_err().kind(), Kind::Refused);
    assert_eq!(store.describe().unwrap().generation, Generation(2));
    let e = begin_as(&store, 1).unwrap_err();
    assert!(e.hint_text().unwrap().contains("do not start it"), "{}", e.chain());
    assert_history(&store, &history, "committed");
}

#[test]
fn a_promotion_that_is_over_lets_in_its_own_generation_and_later_ones() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let history = blocks(&store, "aaaaaaaa b.......");
    store.promote(&history[1].0).unwrap();
    store.commit().unwrap();
    assert_eq!(store.conclude(Generation(1)).unwrap_err().kind(), Kind::Refused);
    assert!(store.promoted().unwrap().is_some(), "refused, and nothing has changed");
    for _ in 0..2 {
        store.conclude(Generation(3)).unwrap();
    }
    assert_eq!((store.promoted().unwrap(), store.holds().unwrap().leases), (None, vec![]));
    for old in [1, 2] {
        assert_eq!(begin_as(&store, old).unwrap_err().kind(), Kind::Conflict, "generation {old}");
    }
    begin_as(&store, 3).unwrap();
    assert_history(&store, &history, "concluded");
}

#[test]
fn who_writes_just_now_is_alive_and_a_point_that_is_not_there_is_not_promoted() {
    let lab = Lab::in_memory();
    let store = lab.store();
    let history = blocks(&store, "aaaaaaaa b.......");
    let writer = lab.store();
    writer.begin(&begin(60, Some(history[1].0.clone()), &[("vda", 8 << 16, false)])).unwrap();
    let e = store.promote(&history[1].0).unwrap_err();
    assert!(e.kind() == Kind::Busy && e.chain().contains("may well be alive"), "{}", e.chain());
    writer.abandon().unwrap();
    let missing = PointId::new("000099-deadbeef").unwrap();
    assert_eq!(store.promote(&missing).unwrap_err().kind(), Kind::NotFound);
    assert_eq!((store.promoted().unwrap(), store.holds().unwrap().leases), (None, Vec::new()));
    // A program that does not know of promotions must not take a run.
    store.promote(&history[0].0).unwrap();
    let manifest = std::fs::read_to_string(store.path().join("manifest.json")).unwrap();
    assert!(manifest.contains("\"version\": 4"), "{manifest}");
}
