//! How much a run may take of the link, of the disks and of the guest's time; and who is told around the freeze.

use clap::Args;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::sync::Arc;
use std::time::Duration;
use virt_replica::engine::throttle::Throttle;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::patch::Compression;
use virt_replica::policy::bandwidth::{Bandwidth, RateRule};

/// How much of the link is taken.
#[derive(Debug, Args)]
pub struct LinkArgs {
    /// Send no faster: 50M is bytes per second, 10M@08:00-18:00 or 10M@22:00-06:00/sat,sun holds at these times; may be
    /// given more than once
    #[arg(long = "rate", value_name = "RATE")]
    rates: Vec<RateRule>,
    /// Time zone of the times in --rate, as Europe/Berlin [default: the host's]
    #[arg(long, value_name = "ZONE", requires = "rates")]
    timezone: Option<String>,
    /// Compression: a level of zstd, 1 (fast) to 19 (small), no, or auto: level 1, unless the link is quicker than that
    /// [default: auto]
    #[arg(long, value_name = "LEVEL")]
    compress: Option<Compression>,
}

impl LinkArgs {
    /// Nothing is gained by compressing what does not leave this host.
    pub fn compression(&self, leaves: bool) -> Compression {
        self.compress.unwrap_or(if leaves { Compression::default() } else { Compression::NONE })
    }

    pub fn throttle(&self) -> Result<Option<Arc<Throttle>>> {
        throttle(&self.rates, self.timezone.as_deref())
    }
}

/// The throttle of these rates; `None`: nothing is limited. [`Kind::Usage`] if they contradict one another, or if there
/// is no such time zone.
pub fn throttle(rates: &[RateRule], timezone: Option<&str>) -> Result<Option<Arc<Throttle>>> {
    let zone = match timezone {
        Some(name) => TimeZone::get(name).map_err(|_| {
            Error::new(Kind::Usage, format!("there is no time zone '{name}'"))
                .hint("a name as Europe/Berlin or UTC; the package tzdata has them")
        })?,
        None => TimeZone::system(),
    };
    let bandwidth = Bandwidth::of_rules(rates).map_err(|why| Error::new(Kind::Usage, format!("--rate: {why}")))?;
    let limited = bandwidth != Bandwidth::default();
    let throttle = || Throttle::new(Box::new(move || bandwidth.rate_at(Timestamp::now(), &zone)));
    Ok(limited.then(|| Arc::new(throttle())))
}

#[derive(Debug, Args)]
pub struct LimitArgs {
    #[command(flatten)]
    link: LinkArgs,
    #[command(flatten)]
    guest: GuestArgs,
}

/// How much of the guest's time and disks is taken.
#[derive(Debug, Args)]
struct GuestArgs {
    /// End the run, and commit at once, when an overlay (or scratch file) grows larger
    #[arg(long, value_name = "SIZE", value_parser = crate::cli::speak::render::parse_bytes)]
    overlay_max_bytes: Option<u64>,
    /// End the run, and commit at once, when its overlays get older
    #[arg(long, value_name = "TIME", value_parser = crate::cli::speak::render::parse_duration)]
    overlay_max_age: Option<Duration>,
    /// Run this program before the disks of a running domain are frozen. If it fails, there is no point. Give the
    /// option again for each argument
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    before_freeze: Vec<String>,
    /// End that program after this time; it has then failed
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = crate::cli::speak::render::parse_duration)]
    before_freeze_timeout: Duration,
    /// Run this program when they are frozen, even if the freeze failed; arguments as for --before-freeze
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    after_freeze: Vec<String>,
    /// End that program after this time
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = crate::cli::speak::render::parse_duration)]
    after_freeze_timeout: Duration,
}

#[cfg(feature = "libvirt")]
mod fill {
    use super::LimitArgs;
    use std::time::Duration;
    use virt_replica::error::{Error, Kind, Result};
    use virt_replica::hook::Hook;
    use virt_replica::replicate::capture::freeze_hooks::FreezeHooks;
    use virt_replica::replicate::plan::forecast::OverlayLimits;
    use virt_replica::run_settings::RunSettings;

    impl LimitArgs {
        /// Puts them into the settings of a run.
        pub fn fill(&self, settings: &mut RunSettings) -> Result<()> {
            settings.compression = self.link.compression(true);
            settings.rates = self.link.rates.clone();
            settings.timezone = self.link.timezone.clone();
            settings.space.overlay =
                OverlayLimits { bytes_max: self.guest.overlay_max_bytes, age_max: self.guest.overlay_max_age };
            settings.hooks = FreezeHooks {
                before: hook(&self.guest.before_freeze, self.guest.before_freeze_timeout)?,
                after: hook(&self.guest.after_freeze, self.guest.after_freeze_timeout)?,
            };
            Ok(())
        }
    }

    fn hook(words: &[String], timeout: Duration) -> Result<Option<Hook>> {
        match words.first() {
            None => Ok(None),
            // What is owed is run by whoever comes next, wherever that one was started.
            Some(program) if !program.starts_with('/') => {
                let what = format!(
                    "'{program}' is not an absolute path: the program may be run by another process, from elsewhere"
                );
                Err(Error::new(Kind::Usage, what))
            }
            Some(_) => Ok(Some(Hook { command: words.to_vec(), timeout })),
        }
    }
}
