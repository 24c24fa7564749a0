//! The source side of this host, as the commands need it.

use super::limits::throttle;
use crate::cli::globals::Globals;
use crate::cli::target::Target;
use virt_replica::config::Config;
use virt_replica::error::Result;
use virt_replica::name::DomainUuid;
use virt_replica::policy::select::SeenDomain;
use virt_replica::replicate::cycle::Request;
use virt_replica::replicate::plan::PlanOptions;
use virt_replica::replicate::settle::options::SettleOptions;
use virt_replica::run_settings::RunSettings;
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

/// What is asked of one domain. What the settings leave open is as the configuration has it.
pub fn request(
    domain: &str,
    target: &Target,
    globals: &Globals,
    config: &Config,
    settings: &RunSettings,
) -> Result<Request> {
    let defaults = &config.defaults;
    let workers = wiring::workers();
    let plan = PlanOptions {
        capture: settings.capture.or(defaults.capture).unwrap_or_default(),
        quiesce: settings.quiesce.clone(),
        overlay_dir: settings.overlay_dir.clone().or_else(|| defaults.overlay_dir.clone()),
        block_overlay_dir: defaults.block_overlay_dir.clone().unwrap_or_else(|| BLOCK_OVERLAY_DIR.into()),
        exclude_disks: settings.exclude_disks.clone(),
        full: settings.full,
        compare: settings.compare,
        take_over: settings.take_over,
        audit: settings.audit,
        space: settings.space,
    };
    Ok(Request {
        domain: domain.to_owned(),
        target: target.url.to_string(),
        store: Default::default(),
        run: new_run()?,
        state: globals.state_dir.clone(),
        plan,
        settle: SettleOptions { ready_within: settings.ready_within, ..SettleOptions::default() },
        open: wiring::open_options(workers),
        with_secrets: settings.with_secrets,
        workers,
        compression: settings.compression,
        throttle: throttle(&settings.rates, settings.timezone.as_deref())?,
        hooks: settings.hooks.clone(),
        handover: None,
        gives_way: false,
    })
}

/// A new random UUID, for a copy of a domain.
pub fn new_uuid() -> Result<DomainUuid> {
    uuid_of(wiring::random_bytes()?)
}

/// The UUID of these random bits: version 4 of RFC 9562.
fn uuid_of(bits: [u8; 16]) -> Result<DomainUuid> {
    DomainUuid::new(uuid::Builder::from_random_bytes(bits).into_uuid().to_string())
}

/// 64 bits that shorten a wait; where no random ones are to be had, the wait is its full length.
pub fn random() -> u64 {
    let mut bits = [0xff; 8];
    let _ = rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty());
    u64::from_le_bytes(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_uuid_is_of_version_4_whatever_the_bits() {
        for (bits, uuid) in [
            ([0x00; 16], "00000000-0000-4000-8000-000000000000"),
            ([0xff; 16], "ffffffff-ffff-4fff-bfff-ffffffffffff"),
            ([0x5a; 16], "5a5a5a5a-5a5a-4a5a-9a5a-5a5a5a5a5a5a"),
        ] {
            assert_eq!(uuid_of(bits).unwrap().as_str(), uuid);
        }
        assert_ne!(new_uuid().unwrap(), new_uuid().unwrap());
    }
}
