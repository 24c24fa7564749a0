//! The allow-list itself: what comes through as it is, and why the rest does not.
//!
//! Terms: <https://libvirt.org/formatdomain.html>.

use super::remark::Verdict::{self, LeftOut, Missing, Refused};
use super::render::Check::{Hex, Number, OneOf, Switch, Text, Word};
use super::render::{Check, Rule, el, text};

const UNIT: &[(&str, Check)] = &[("unit", Word)];
const STATE: &[(&str, Check)] = &[("state", Switch)];

/// Where a device sits for the guest. What names a device of the host (`uuid`, `reg` of other buses) is not here.
pub(super) const ADDRESS: Rule = el(
    "address",
    &[
        ("type", OneOf(&["pci", "drive", "virtio-serial", "usb", "isa", "ccid", "virtio-mmio", "spapr-vio"])),
        ("domain", Hex),
        ("bus", Hex),
        ("slot", Hex),
        ("function", Hex),
        ("multifunction", Switch),
        ("controller", Number),
        ("target", Number),
        ("unit", Number),
        ("port", Word),
        ("reg", Hex),
        ("iobase", Hex),
        ("irq", Hex),
    ],
    &[],
);

const BOOT: Rule = el("boot", &[("order", Number)], &[]);
const ACTION: Check = OneOf(&["destroy", "restart", "preserve"]);

/// Children of `<domain>` that come through as they are.
pub(super) const TOP: &[Rule] = &[
    text("memory", UNIT, Number),
    text("currentMemory", UNIT, Number),
    text("maxMemory", &[("unit", Word), ("slots", Number)], Number),
    text("vcpu", &[("placement", OneOf(&["static"])), ("current", Number)], Number),
    text("iothreads", &[], Number),
    el("features", &[], FEATURES),
    el(
        "clock",
        &[
            ("offset", OneOf(&["utc", "localtime", "timezone", "variable"])),
            ("timezone", Text),
            ("adjustment", Word),
            ("basis", Word),
        ],
        &[el(
            "timer",
            &[
                ("name", Word),
                ("present", Switch),
                ("tickpolicy", Word),
                ("track", Word),
                ("frequency", Number),
                ("mode", Word),
            ],
            &[el("catchup", &[("threshold", Number), ("slew", Number), ("limit", Number)], &[])],
        )],
    ),
    text("on_poweroff", &[], ACTION),
    text("on_reboot", &[], ACTION),
    text("on_crash", &[], ACTION),
    el(
        "pm",
        &[],
        &[el("suspend-to-mem", &[("enabled", Switch)], &[]), el("suspend-to-disk", &[("enabled", Switch)], &[])],
    ),
];

const FEATURES: &[Rule] = &[
    el("acpi", &[], &[]),
    el("apic", &[("eoi", Switch)], &[]),
    el("pae", &[], &[]),
    el("hap", STATE, &[]),
    el("viridian", &[], &[]),
    el("pmu", STATE, &[]),
    el("vmport", STATE, &[]),
    el("smm", STATE, &[text("tseg", UNIT, Number)]),
    el("ioapic", &[("driver", OneOf(&["kvm", "qemu"]))], &[]),
    el("gic", &[("version", Word)], &[]),
    el("vmcoreinfo", STATE, &[]),
    el("kvm", &[], &[el("hidden", STATE, &[]), el("hint-dedicated", STATE, &[]), el("poll-control", STATE, &[])]),
    el(
        "hyperv",
        &[("mode", OneOf(&["custom", "passthrough"]))],
        &[
            el("relaxed", STATE, &[]),
            el("vapic", STATE, &[]),
            el("spinlocks", &[("state", Switch), ("retries", Number)], &[]),
            el("vpindex", STATE, &[]),
            el("runtime", STATE, &[]),
            el("synic", STATE, &[]),
            el("stimer", STATE, &[el("direct", STATE, &[])]),
            el("reset", STATE, &[]),
            el("vendor_id", &[("state", Switch), ("value", Text)], &[]),
            el("frequencies", STATE, &[]),
            el("reenlightenment", STATE, &[]),
            el("tlbflush", STATE, &[]),
            el("ipi", STATE, &[]),
            el("evmcs", STATE, &[]),
            el("avic", STATE, &[]),
        ],
    ),
];

/// Children of `<cpu>` but its model.
pub(super) const CPU: &[Rule] = &[
    text("vendor", &[], Word),
    el(
        "topology",
        &[("sockets", Number), ("dies", Number), ("clusters", Number), ("cores", Number), ("threads", Number)],
        &[],
    ),
    el("feature", &[("policy", OneOf(&["force", "require", "optional", "disable", "forbid"])), ("name", Word)], &[]),
    el("cache", &[("level", Number), ("mode", OneOf(&["emulate", "passthrough", "disable"]))], &[]),
    el("maxphysaddr", &[("mode", OneOf(&["emulate", "passthrough"])), ("bits", Number)], &[]),
    el(
        "numa",
        &[],
        &[el("cell", &[("id", Number), ("cpus", CPUS), ("memory", Number), ("unit", Word), ("discard", Switch)], &[])],
    ),
];

/// `0-3,8`: within a definition's numa cells.
const CPUS: Check = Check::Text;

/// Children of `<os>` that come through as they are; type, firmware and kernel have code of their own.
pub(super) const OS: &[Rule] = &[
    el("boot", &[("dev", OneOf(&["hd", "cdrom", "network", "fd"]))], &[]),
    el("bootmenu", &[("enable", Switch), ("timeout", Number)], &[]),
    el("bios", &[("useserial", Switch), ("rebootTimeout", Number)], &[]),
];

pub(super) const SYSINFO: &[Rule] = {
    const ENTRY: Rule = text("entry", &[("name", Word)], Text);
    &[
        el("bios", &[], &[ENTRY]),
        el("system", &[], &[ENTRY]),
        el("baseBoard", &[], &[ENTRY]),
        el("chassis", &[], &[ENTRY]),
        el("oemStrings", &[], &[text("entry", &[], Text)]),
    ]
};

/// Devices that come through as they are.
pub(super) const DEVICES: &[Rule] = &[
    el(
        "controller",
        &[("type", Word), ("index", Number), ("model", Word), ("ports", Number), ("vectors", Number)],
        &[
            ADDRESS,
            el("model", &[("name", Word)], &[]),
            el(
                "target",
                &[
                    ("chassisNr", Number),
                    ("chassis", Number),
                    ("port", Hex),
                    ("busNr", Number),
                    ("index", Number),
                    ("hotplug", Switch),
                ],
                &[],
            ),
            el("master", &[("startport", Number)], &[]),
            el(
                "driver",
                &[("queues", Number), ("iothread", Number), ("cmd_per_lun", Number), ("max_sectors", Number)],
                &[],
            ),
        ],
    ),
    el("input", &[("type", OneOf(&["mouse", "tablet", "keyboard"])), ("bus", Word), ("model", Word)], &[ADDRESS]),
    el(
        "video",
        &[],
        &[
            ADDRESS,
            el(
                "model",
                &[
                    ("type", Word),
                    ("ram", Number),
                    ("vram", Number),
                    ("vram64", Number),
                    ("vgamem", Number),
                    ("heads", Number),
                    ("primary", Switch),
                    ("blob", Switch),
                ],
                &[el("resolution", &[("x", Number), ("y", Number)], &[])],
            ),
        ],
    ),
    el("sound", &[("model", Word)], &[ADDRESS, el("codec", &[("type", Word)], &[])]),
    el(
        "memballoon",
        &[("model", Word), ("autodeflate", Switch), ("freePageReporting", Switch)],
        &[ADDRESS, el("stats", &[("period", Number)], &[])],
    ),
    el(
        "watchdog",
        &[("model", Word), ("action", OneOf(&["reset", "shutdown", "poweroff", "pause", "none", "inject-nmi"]))],
        &[ADDRESS],
    ),
    el("panic", &[("model", Word)], &[ADDRESS]),
    el(
        "iommu",
        &[("model", Word)],
        &[el(
            "driver",
            &[("intremap", Switch), ("caching_mode", Switch), ("eim", Switch), ("iotlb", Switch), ("aw_bits", Number)],
            &[],
        )],
    ),
    el("hub", &[("type", OneOf(&["usb"]))], &[ADDRESS]),
];

/// What comes through of a disk beside its image.
pub(super) const DISK: &[Rule] = &[
    text("serial", &[], Text),
    text("wwn", &[], Word),
    text("vendor", &[], Text),
    text("product", &[], Text),
    BOOT,
    ADDRESS,
    el(
        "blockio",
        &[("logical_block_size", Number), ("physical_block_size", Number), ("discard_granularity", Number)],
        &[],
    ),
    el("geometry", &[("cyls", Number), ("heads", Number), ("secs", Number), ("trans", Word)], &[]),
    el(
        "target",
        &[("dev", Word), ("bus", Word), ("removable", Switch), ("tray", Word), ("rotation_rate", Number)],
        &[],
    ),
];

/// What comes through of a network interface beside what it is attached to, and its MAC address.
pub(super) const INTERFACE: &[Rule] = &[
    el("model", &[("type", Word)], &[]),
    el("link", &[("state", OneOf(&["up", "down"]))], &[]),
    el("mtu", &[("size", Number)], &[]),
    BOOT,
    ADDRESS,
    el(
        "driver",
        &[
            ("name", OneOf(&["qemu", "vhost"])),
            ("queues", Number),
            ("rx_queue_size", Number),
            ("tx_queue_size", Number),
        ],
        &[],
    ),
];

/// What comes through of a serial line beside what is at its host end.
pub(super) const CHARACTER: &[Rule] =
    &[el("target", &[("type", Word), ("port", Number)], &[el("model", &[("name", Word)], &[])]), ADDRESS];

/// Replaced by this host's own, or of no meaning here: nobody has to be told.
pub(super) const SILENT: &[&str] = &[
    "name",
    "uuid",
    "metadata",
    "title",
    "description",
    "resource",
    "seclabel",
    "genid",
    "devices/emulator",
    "devices/audio",
    "devices/disk/source",
    "devices/disk/backingStore",
    "devices/disk/mirror",
    "devices/disk/alias",
    "devices/disk/driver",
    "devices/disk/readonly",
    "devices/interface/source",
    "devices/interface/target",
    "devices/interface/alias",
    "devices/interface/mac",
    "devices/serial/source",
    "devices/serial/alias",
    "devices/serial/log",
    "devices/console/source",
    "devices/console/alias",
];

/// Elements with a reason of their own.
pub(super) const REASONS: &[(&str, Verdict, &str)] = &[
    ("devices/hostdev", Missing, "passes a device of the source's host through, which is not here"),
    ("devices/redirdev", LeftOut, "lets a client's USB device in"),
    ("devices/redirfilter", LeftOut, "goes with redirected USB devices"),
    ("devices/filesystem", Missing, "shares a directory of the source's host"),
    ("devices/shmem", Missing, "shares memory with other processes of the host"),
    ("devices/smartcard", Missing, "reaches a smart card of the host"),
    ("devices/vsock", Missing, "is a way to the host past its networks"),
    ("devices/lease", LeftOut, "names a lock of the source's"),
    ("devices/nvram", LeftOut, "is for machines of another kind"),
    ("devices/crypto", Missing, "uses a cipher of the host"),
    ("devices/memory", Missing, "adds memory that may be backed by a file of the host"),
    ("devices/parallel", Missing, "reaches a port of the host"),
    ("devices/disk/iotune", LeftOut, "sets limits made for the source's storage"),
    ("devices/disk/encryption", Refused, "has QEMU decrypt the image with a secret that is not here"),
    ("devices/disk/auth", LeftOut, "names a secret of the source's"),
    ("devices/disk/shareable", LeftOut, "shares the image with another domain, and nobody else has this copy"),
    ("devices/disk/transient", LeftOut, "throws away what is written, and in this copy it stays"),
    ("devices/interface/filterref", Missing, "names a packet filter of the source's"),
    ("devices/interface/bandwidth", LeftOut, "sets limits made for the source's network"),
    ("devices/interface/vlan", Missing, "sets tags made for the source's network"),
    ("devices/interface/virtualport", LeftOut, "was made for the source's switch"),
    ("devices/interface/script", LeftOut, "names a program that libvirt would run here"),
    ("devices/interface/backend", LeftOut, "names devices and programs of the host"),
    ("devices/interface/teaming", Missing, "goes with a device that is passed through"),
    ("launchSecurity", Refused, "encrypts the guest's memory for the source's processor"),
    ("memoryBacking", LeftOut, "reserves memory or files of the source's host"),
    ("memtune", LeftOut, "sets limits made for the source's host"),
    ("cputune", LeftOut, "sets limits and pins made for the source's processors"),
    ("numatune", LeftOut, "was made for the source's processors"),
    ("blkiotune", LeftOut, "sets limits made for the source's storage"),
    ("iothreadids", LeftOut, "was made for the source's processors"),
    ("defaultiothread", LeftOut, "was made for the source's processors"),
    ("keywrap", Refused, "uses keys of the source's processor"),
    ("idmap", Refused, "is for containers"),
    ("bootloader", Refused, "names a program that libvirt would run here"),
    ("bootloader_args", Refused, "goes with a program that libvirt would run here"),
    ("on_lockfailure", LeftOut, "goes with locks of the source's"),
    ("perf", LeftOut, "measures on the source's host"),
    ("throttlegroups", LeftOut, "sets limits made for the source's storage"),
    ("cpu/numa/cell/distances", LeftOut, "was made for the source's processors"),
    ("os/dtb", Refused, "names a file of the source's host"),
    ("os/acpi", LeftOut, "names a table in a file of the source's host"),
    ("os/shim", Refused, "names a file of the source's host"),
    ("os/init", Refused, "is for containers"),
    ("os/nvram", LeftOut, "the UEFI variables of the point take its place"),
];

/// Why an element that belongs to another XML namespace does not come through.
pub(super) const FOREIGN: (Verdict, &str) =
    (Missing, "is passed to QEMU past libvirt, and could name any file or program of this host");
