//! The allow-list itself: what comes through as it is, and why the rest does not.
//!
//! Every number has bounds: those of libvirt and QEMU where they are known, else far above what any guest has. libvirt
//! allocates by some of them before it looks at them, and a libvirtd that is out of memory ends.
//!
//! Terms: <https://libvirt.org/formatdomain.html>.

use super::remark::Verdict::{self, LeftOut, Missing, Refused};
use crate::recovery::definition::rule::Check::{
    self, Count, Hex, OneOf, Replaced, Signed, Switch, Text, Word, WordBut,
};
use crate::recovery::definition::rule::{Rule, el, needs, text};

const UNIT: &[(&str, Check)] = &[("unit", Word)];
const STATE: &[(&str, Check)] = &[("state", Switch)];

/// A number that libvirt only hands on.
const COUNT: Check = Count(0, i32::MAX as u64);

/// Where a device sits for the guest. What names a device of the host (`uuid`, `reg` of other buses) is not here.
pub(super) const ADDRESS: Rule = needs(
    &["type"],
    el(
        "address",
        &[
            ("type", OneOf(&["pci", "drive", "virtio-serial", "usb", "isa", "ccid", "virtio-mmio", "spapr-vio"])),
            ("domain", Hex(0)),
            ("bus", Hex(0xff)),
            ("slot", Hex(0x1f)),
            ("function", Hex(7)),
            ("multifunction", Switch),
            ("controller", Count(0, INDEX_MAX)),
            ("target", Count(0, 255)),
            ("unit", Count(0, 16383)),
            ("port", Word),
            ("reg", Hex(0xffff_ffff)),
            ("iobase", Hex(0xffff)),
            ("irq", Hex(0xf)),
        ],
        &[],
    ),
);

/// Highest number of a controller of one kind. libvirt makes all those below it.
const INDEX_MAX: u64 = 255;

const BOOT: Rule = needs(&["order"], el("boot", &[("order", Count(1, 4096))], &[]));

/// A dump of the guest's memory would lie on this host, which nobody has asked: what follows it counts.
const ACTION: Check = Replaced(
    &["destroy", "restart", "preserve"],
    &[("coredump-destroy", "destroy"), ("coredump-restart", "restart"), ("rename-restart", "restart")],
);

/// Of a clock, in seconds.
const ADJUSTMENT: Check = Signed(-(1 << 40), 1 << 40);

/// Children of `<domain>` that come through as they are; the sizes of the guest have code of their own.
pub(super) const TOP: &[Rule] = &[
    el("features", &[], FEATURES),
    el(
        "clock",
        &[
            // A clock that begins at a fixed time is for tests; here it shows the time that it is.
            ("offset", Replaced(&["utc", "localtime", "timezone", "variable"], &[("absolute", "utc")])),
            ("timezone", Text),
            ("adjustment", ADJUSTMENT),
            ("basis", OneOf(&["utc", "localtime"])),
        ],
        &[needs(
            &["name"],
            el(
                "timer",
                &[
                    ("name", Word),
                    ("present", Switch),
                    ("tickpolicy", Word),
                    ("track", Word),
                    ("frequency", Count(1, 1 << 40)),
                    ("mode", Word),
                ],
                &[el("catchup", &[("threshold", COUNT), ("slew", COUNT), ("limit", COUNT)], &[])],
            ),
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
    el("smm", STATE, &[text("tseg", UNIT, Count(1, 1 << 40))]),
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
            el("spinlocks", &[("state", Switch), ("retries", Count(4095, u32::MAX as u64))], &[]),
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

/// Children of `<cpu>` but its model, and the places of the processors.
pub(super) const CPU: &[Rule] = &[
    text("vendor", &[], Word),
    needs(
        &["policy", "name"],
        el(
            "feature",
            &[("policy", OneOf(&["force", "require", "optional", "disable", "forbid"])), ("name", Word)],
            &[],
        ),
    ),
    needs(
        &["mode"],
        el("cache", &[("level", Count(1, 3)), ("mode", OneOf(&["emulate", "passthrough", "disable"]))], &[]),
    ),
    needs(&["mode"], el("maxphysaddr", &[("mode", OneOf(&["emulate", "passthrough"])), ("bits", Count(32, 52))], &[])),
];

/// What the guest sees of its processors' places; [`super::size`] has seen that the numbers go together.
pub(super) const NUMA: Rule = el(
    "numa",
    &[],
    &[el(
        "cell",
        &[
            ("id", Count(0, 63)),
            // `0-3,8`
            ("cpus", Text),
            ("memory", Count(1, 1 << 50)),
            ("unit", Word),
            ("discard", Switch),
        ],
        &[],
    )],
);

/// Children of `<os>` that come through as they are; type, firmware and kernel have code of their own.
pub(super) const OS: &[Rule] = &[
    needs(&["dev"], el("boot", &[("dev", OneOf(&["hd", "cdrom", "network", "fd"]))], &[])),
    el("bootmenu", &[("enable", Switch), ("timeout", Count(0, 65535))], &[]),
    el("bios", &[("useserial", Switch), ("rebootTimeout", Signed(-1, 65535))], &[]),
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

/// Models that this QEMU was never built with for the machines of today, and those that take their place.
const CONTROLLER_MODEL: Check =
    WordBut(&[("buslogic", "virtio-scsi"), ("ibmvscsi", "virtio-scsi"), ("dc390", "am53c974"), ("xen", "qemu-xhci")]);

/// Devices that come through as they are.
pub(super) const DEVICES: &[Rule] = &[
    needs(
        &["type"],
        el(
            "controller",
            &[
                ("type", OneOf(&["pci", "usb", "scsi", "ide", "sata", "fdc", "virtio-serial", "ccid", "isa"])),
                ("index", Count(0, INDEX_MAX)),
                ("model", CONTROLLER_MODEL),
                ("ports", Count(1, 511)),
                ("vectors", Count(0, 2048)),
            ],
            &[
                ADDRESS,
                needs(&["name"], el("model", &[("name", Word)], &[])),
                el(
                    "target",
                    &[
                        ("chassisNr", Count(1, 255)),
                        ("chassis", Count(0, 255)),
                        ("port", Hex(0xff)),
                        ("busNr", Count(1, 254)),
                        ("index", Count(0, 255)),
                        ("hotplug", Switch),
                    ],
                    &[],
                ),
                el("master", &[("startport", Count(0, 255))], &[]),
                el(
                    "driver",
                    &[("queues", Count(1, 256)), ("cmd_per_lun", Count(1, 65535)), ("max_sectors", Count(1, 65535))],
                    &[],
                ),
            ],
        ),
    ),
    needs(
        &["type"],
        el(
            "input",
            &[
                ("type", OneOf(&["mouse", "tablet", "keyboard"])),
                ("bus", OneOf(&["ps2", "usb", "virtio"])),
                ("model", Word),
            ],
            &[ADDRESS],
        ),
    ),
    needs(&["model"], el("sound", &[("model", Word)], &[ADDRESS, el("codec", &[("type", Word)], &[])])),
    el(
        "memballoon",
        &[("model", Word), ("autodeflate", Switch), ("freePageReporting", Switch)],
        &[ADDRESS, el("stats", &[("period", COUNT)], &[])],
    ),
    el("panic", &[("model", Word)], &[ADDRESS]),
    needs(
        &["model"],
        el(
            "iommu",
            &[("model", Word)],
            &[
                ADDRESS,
                el(
                    "driver",
                    &[
                        ("intremap", Switch),
                        ("caching_mode", Switch),
                        ("eim", Switch),
                        ("iotlb", Switch),
                        ("aw_bits", OneOf(&["39", "48"])),
                    ],
                    &[],
                ),
            ],
        ),
    ),
    needs(&["type"], el("hub", &[("type", OneOf(&["usb"]))], &[ADDRESS])),
];

/// One that the guest has beside those that come with its machine. To dump its memory is for the source's host.
pub(super) const WATCHDOG: Rule = needs(
    &["model"],
    el(
        "watchdog",
        &[
            ("model", Word),
            (
                "action",
                Replaced(&["reset", "shutdown", "poweroff", "pause", "none", "inject-nmi"], &[("dump", "reset")]),
            ),
        ],
        &[ADDRESS],
    ),
);

/// A screen; its model is looked at with what this host's QEMU has.
pub(super) const VIDEO: &[Rule] = &[ADDRESS];
pub(super) const VIDEO_MODEL: &[(&str, Check)] = &[
    ("type", Word),
    ("ram", KIB),
    ("vram", KIB),
    ("vram64", Count(0, 1 << 22)),
    ("vgamem", KIB),
    ("heads", Count(1, 16)),
    ("primary", Switch),
    ("blob", Switch),
];
pub(super) const RESOLUTION: Rule = el("resolution", &[("x", Count(1, 16384)), ("y", Count(1, 16384))], &[]);

/// Memory of a screen. QEMU takes 1 MiB at least.
const KIB: Check = Count(1024, 1 << 20);

/// What comes through of a disk beside its image.
pub(super) const DISK: &[Rule] = &[
    text("serial", &[], Text),
    text("wwn", &[], Word),
    text("vendor", &[], Text),
    text("product", &[], Text),
    BOOT,
    ADDRESS,
    needs(
        &["cyls", "heads", "secs"],
        el(
            "geometry",
            &[("cyls", Count(1, 65535)), ("heads", Count(1, 16)), ("secs", Count(1, 63)), ("trans", Word)],
            &[],
        ),
    ),
    needs(
        &["dev"],
        el(
            "target",
            &[
                ("dev", Word),
                // Buses that a PC of today has not: whatever drove them there, virtio is what such guests know too.
                (
                    "bus",
                    Replaced(
                        &["virtio", "scsi", "sata", "ide", "usb"],
                        &[("xen", "virtio"), ("sd", "virtio"), ("fdc", "sata"), ("uml", "virtio"), ("nvme", "virtio")],
                    ),
                ),
                ("removable", Switch),
                ("tray", Word),
                ("rotation_rate", Count(1, 65534)),
            ],
            &[],
        ),
    ),
];

/// Sizes of blocks; [`super::devices`] has seen that they go together.
pub(super) const BLOCKIO: &[(&str, Check)] = &[
    ("logical_block_size", Count(512, 2 << 20)),
    ("physical_block_size", Count(512, 2 << 20)),
    ("discard_granularity", Count(0, 2 << 30)),
];

/// Network cards of QEMU's on PCI.
pub(super) const NIC_MODELS: &[&str] = &[
    "virtio",
    "virtio-transitional",
    "virtio-non-transitional",
    "e1000",
    "e1000-82544gc",
    "e1000-82545em",
    "e1000e",
    "rtl8139",
    "ne2k_pci",
    "pcnet",
    "vmxnet3",
    "tulip",
    "i82550",
    "i82551",
    "i82557a",
    "i82557b",
    "i82557c",
    "i82558a",
    "i82558b",
    "i82559a",
    "i82559b",
    "i82559c",
    "i82559er",
    "i82562",
    "i82801",
];

/// What comes through of a network interface beside what it is attached to, and its MAC address.
pub(super) const INTERFACE: &[Rule] = &[
    el("link", &[("state", OneOf(&["up", "down"]))], &[]),
    needs(&["size"], el("mtu", &[("size", Count(68, 65521))], &[])),
    BOOT,
    ADDRESS,
    el(
        "driver",
        &[
            // What carries the packets (`name`) is for this host to choose. QEMU has more than 256 slots to send from
            // only where another process carries them.
            ("queues", Count(1, 256)),
            ("rx_queue_size", OneOf(&["256", "512", "1024"])),
            ("tx_queue_size", OneOf(&["256"])),
        ],
        &[],
    ),
];

/// What comes through of a serial line beside what is at its host end.
pub(super) const CHARACTER: &[Rule] =
    &[el("target", &[("type", Word), ("port", Count(0, 255))], &[el("model", &[("name", Word)], &[])]), ADDRESS];

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
    "devices/disk/blockio",
    "devices/video/model",
    "devices/interface/source",
    "devices/interface/model",
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
    ("iothreads", LeftOut, "was made for the source's processors"),
    ("iothreadids", LeftOut, "was made for the source's processors"),
    ("devices/controller/driver/@iothread", LeftOut, "was made for the source's processors"),
    ("devices/interface/driver/@name", LeftOut, "is for this host to choose"),
    ("vcpus", LeftOut, "says which processors are plugged in: here it is the first ones"),
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

/// Elements that came through and that no guest can do without, or whose absence would only move the trouble.
pub(super) const ALWAYS: &[&str] = &["devices/disk/target", "devices/controller", "features", "features/acpi"];

/// Why an element that belongs to another XML namespace does not come through.
pub(super) const FOREIGN: (Verdict, &str) =
    (Missing, "is passed to QEMU past libvirt, and could name any file or program of this host");
