//! The source side of this host, as the commands need it.

use crate::cli::globals::Globals;
use crate::cli::target::Target;
use virt_replica::config::Config;
use virt_replica::error::Result;
use virt_replica::name::DomainUuid;
use virt_replica::patch::Compression;
use virt_replica::policy::select::SeenDomain;
use virt_replica::replicate::capture::freeze_hooks::FreezeHooks;
use virt_replica::replicate::cycle::Request;
use virt_replica::replicate::plan::PlanOptions;
use virt_replica::replicate::plan::capture_choice::CaptureWish;
use virt_replica::replicate::settle::options::SettleOptions;
pub use virt_replica::wiring::new_run;
use virt_replica::wiring::{self, Site, SiteOptions};

/// Overlays of block devices lie here unless a directory is configured: it exists wherever libvirt does, and QEMU
/// may enter it.
const BLOCK_OVERLAY_DIR: &str = "/var/lib/libvirt/images";

/// Connects to libvirt.
pub fn connect(globals: &Globals) -> Result<Site> {
    Site::connect(SiteOptions { uri: globals.uri(), state: globals.state_dir.clone() })
}

/// The domains of this host, as policies ask for them.
pub fn seen_domains(site: &Site) -> Result<Vec<SeenDomain>> {
    let names = site.hypervisor().names()?;
    Ok(names.into_iter().map(|d| SeenDomain { name: d.name, uuid: d.uuid, tags: d.tags }).collect())
}

/// What is asked of one domain. Directories that `wish` leaves open, and the way of `capture`, are those of the configuration.
pub fn request(
    domain: &str,
    target: &Target,
    globals: &Globals,
    config: &Config,
    wish: PlanOptions,
    capture: Option<CaptureWish>,
) -> Result<Request> {
    let defaults = &config.defaults;
    let block_overlay_dir = defaults.block_overlay_dir.clone().unwrap_or_else(|| BLOCK_OVERLAY_DIR.into());
    let overlay_dir = wish.overlay_dir.clone().or_else(|| defaults.overlay_dir.clone());
    let capture = capture.or(defaults.capture).unwrap_or_default();
    let workers = wiring::workers();
    Ok(Request {
        domain: domain.to_owned(),
        target: target.url.to_string(),
        store: Default::default(),
        run: new_run()?,
        state: globals.state_dir.clone(),
        plan: PlanOptions { overlay_dir, block_overlay_dir, capture, ..wish },
        settle: SettleOptions::default(),
        open: wiring::open_options(workers),
        with_secrets: false,
        workers,
        compression: Compression::default(),
        throttle: None,
        hooks: FreezeHooks::default(),
        handover: None,
        gives_way: false,
    })
}

/// A new UUID, as random as they are.
pub fn new_uuid() -> Result<DomainUuid> {
    let (high, low) = (new_run()?, new_run()?);
    let (high, low) = (high.as_str(), low.as_str());
    // Version 4, and the variant of RFC 9562.
    DomainUuid::new(format!("{}-{}-4{}-8{}-{}", &high[..8], &high[8..12], &high[13..], &low[1..4], &low[4..]))
}

/// 64 bits that shorten a wait; where no random ones are to be had, the wait is its full length.
pub fn random() -> u64 {
    let mut bits = [0xff; 8];
    let _ = rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty());
    u64::from_le_bytes(bits)
}
