//! The states a domain can be in when a run begins, and that it may change under the run's hands.

use crate::domain::Disk;
use crate::support::Lab;

/// Nothing writes, so the domain itself is the reference.
#[test]
fn paused() {
    let lab = Lab::get();
    let vm = lab.domain("paused").disk(Disk::qcow2("64M").then("write -P 0x11 1M 3M")).paused();
    vm.sync().sealed();
    assert_eq!(vm.state(), "paused");
    vm.compare_with_head();
    vm.assert_home();
    vm.write(0, "-P 0x22 8M 128k");
    let second = vm.sync().sealed();
    assert_eq!(second.mode("vda"), "digest");
    vm.compare_with_head();
    vm.assert_home();
}
