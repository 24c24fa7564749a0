//! A disk of a point served over NBD, read-only, for as long as somebody wants it.

use super::store::Store;
use super::upkeep::Held as _;
use crate::error::{Error, Kind, Result};
use crate::image::qemu_nbd::QemuNbd;
use crate::name::{DiskName, PointId};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often the server and the lease are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Serves a disk of a point on a unix socket until `stop` is set or the server ends. Blocks. The point is leased
/// meanwhile. `ready` is told when it serves.
pub fn serve(
    store: &Store,
    point: &PointId,
    disk: &DiskName,
    socket: &Path,
    ready: &dyn Fn() -> Result<()>,
    stop: &AtomicBool,
) -> Result<()> {
    let mut held = Box::new(store.hold(point, "nbd")?);
    let served = held.images(disk).and_then(|images| QemuNbd::start_at(&images, socket)).and_then(|mut server| {
        let mut serving = ready();
        while serving.is_ok() && !stop.load(Ordering::Relaxed) {
            if !server.is_running()? {
                serving = Err(Error::new(Kind::Interrupted, "qemu-nbd ended").path(socket));
                break;
            }
            serving = held.renew();
            std::thread::sleep(LOOK_EVERY);
        }
        serving.and(server.stop())
    });
    held.release();
    served
}
