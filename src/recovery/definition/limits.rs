//! What a host can do, as far as it bounds a definition. Pure.

use super::render::LeaveOut;
use crate::hypervisor::machine::HostView;
use crate::hypervisor::releases::{self, Version};

/// The most processors that any machine of QEMU's has, whatever the host says.
const VCPUS_MAX: u64 = 4096;

/// Processors beyond this one are reached only through an IOMMU with extended interrupts.
pub const VCPUS_PLAIN_MAX: u64 = 255;

/// What bounds a definition on one host; what is not known bounds nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Processors of a guest of this machine type.
    pub vcpus_max: u64,
    /// `<cpu mode=…>` that this host has; empty: not known.
    pub cpu_modes: Vec<String>,
    /// Models of screens; empty: not known.
    pub videos: Vec<String>,
    /// Version of this host's libvirt. `None`: not known.
    pub libvirt: Option<Version>,
    /// Version of this host's QEMU. `None`: not known.
    pub qemu: Option<Version>,
    /// Images that a disk may consist of, that of the guest's own writes included; `None`: as many as there are.
    pub images_max: Option<u64>,
    /// Elements that libvirt here was found to refuse.
    pub(super) without: Vec<LeaveOut>,
}

impl Default for Limits {
    /// Of a host that nobody has asked.
    fn default() -> Limits {
        let (cpu_modes, videos, without) = (Vec::new(), Vec::new(), Vec::new());
        Limits { vcpus_max: VCPUS_MAX, cpu_modes, videos, libvirt: None, qemu: None, images_max: None, without }
    }
}

impl Limits {
    /// Takes the limits from what libvirt said about this host. An unknown value limits nothing.
    pub fn of(host: &HostView) -> Limits {
        let able = host.machine.as_ref().ok();
        Limits {
            vcpus_max: able.and_then(|c| c.vcpus_max).unwrap_or(VCPUS_MAX).min(VCPUS_MAX),
            cpu_modes: able.map(|c| c.cpu_modes.clone()).unwrap_or_default(),
            videos: able.map(|c| c.videos.clone()).unwrap_or_default(),
            libvirt: host.libvirt,
            qemu: host.qemu,
            images_max: releases::images_max(host.libvirt),
            without: Vec::new(),
        }
    }

    /// The same, and these elements are left out, for this reason.
    pub fn without(&self, elements: &[(String, String)]) -> Limits {
        let without = elements.iter().map(|(what, why)| LeaveOut { what: what.clone(), why: why.clone() });
        Limits { without: without.collect(), ..self.clone() }
    }

    /// The processor's mode that stands for this one here; `None`: QEMU's own choice.
    pub(super) fn cpu_mode<'a>(&self, mode: &'a str) -> Option<&'a str> {
        let has = |mode: &str| self.cpu_modes.is_empty() || self.cpu_modes.iter().any(|m| m == mode);
        let next = match mode {
            "host-passthrough" => "maximum",
            "maximum" => "host-passthrough",
            _ => mode,
        };
        [mode, next].into_iter().find(|mode| has(mode))
    }
}
