//! Definitions of every shape that is known, brought before a real libvirt: whatever is said to be ready has to
//! start. They are made of a table: what libvirt writes by itself, what installers, orchestrators and people write,
//! and what a stranger might.

use super::crash_drill::Drills;
use super::crash_failover::OnB;
use super::domain::Disk;
use super::support::{Host, Lab};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use virt_replica::hypervisor::libvirt::LibvirtHypervisor;
use virt_replica::hypervisor::machine::Machines as _;
use virt_replica::name::{DiskName, DomainName, DomainUuid};
use virt_replica::recovery::definition::{Macs, Nics, Wish};
use virt_replica::recovery::fitting::fit;
use virt_replica::recovery::mapping::Mapping;
use virt_replica::recovery::ready::{Builds, Color, Room, judge, worst};

/// Where a piece of a definition goes: all others are as in an ordinary guest.
#[derive(Clone, Copy, Default)]
struct Parts<'a> {
    machine: &'a str,
    memory: &'a str,
    vcpu: &'a str,
    top: &'a str,
    os: &'a str,
    features: &'a str,
    cpu: &'a str,
    disk: &'a str,
    devices: &'a str,
}

impl Parts<'_> {
    fn xml(&self) -> String {
        let or = |part: &'_ str, ordinary: &str| if part.is_empty() { ordinary.to_owned() } else { part.to_owned() };
        format!(
            "<domain type='qemu'><name>x</name>{}{}{}<os><type arch='x86_64' machine='{}'>hvm</type>{}</os><features>{}</features>{}\
             <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/src/a'/>{}</disk>{}</devices></domain>",
            or(self.memory, "<memory unit='MiB'>24</memory>"),
            or(self.vcpu, "<vcpu>1</vcpu>"),
            self.top,
            or(self.machine, "q35"),
            self.os,
            or(self.features, "<acpi/><apic/>"),
            self.cpu,
            or(self.disk, "<target dev='vda' bus='virtio'/>"),
            self.devices,
        )
    }
}

const MACHINES: &[&str] = &["pc", "q35", "pc-q35-7.2", "pc-i440fx-7.2", "pc-q35-5.2", "pc-i440fx-4.2"];

const VCPUS: &[&str] = &[
    "<vcpu placement='auto'>2</vcpu>",
    "<vcpu placement='static' cpuset='0-3' current='1'>2</vcpu>",
    "<vcpu>4294967295</vcpu>",
    "<vcpu>18446744073709551616</vcpu>",
    "<vcpu>300</vcpu>",
    "<vcpu current='7'>2</vcpu>",
    "<vcpu>2</vcpu><vcpus><vcpu id='0' enabled='yes' hotpluggable='no'/><vcpu id='1' enabled='no' hotpluggable='yes'/></vcpus>",
];

const MEMORIES: &[&str] = &[
    "<memory>24576</memory><currentMemory>16384</currentMemory>",
    "<memory unit='bytes'>25165824</memory>",
    "<memory unit='m'>24</memory><currentMemory unit='GiB'>1</currentMemory>",
    "<memory dumpCore='off' unit='KiB'>24576</memory><maxMemory slots='16' unit='GiB'>4</maxMemory>",
    "<memory unit='EiB'>16</memory>",
    "<memory unit='TiB'>4000</memory>",
];

const TOPS: &[&str] = &[
    "<iothreads>4</iothreads><iothreadids><iothread id='9'/></iothreadids><defaultiothread thread_pool_min='8'/>",
    "<iothreads>4294967295</iothreads>",
    "<cputune><shares>2048</shares><vcpupin vcpu='0' cpuset='1'/><iothreadpin iothread='1' cpuset='0'/></cputune><iothreads>1</iothreads>",
    "<numatune><memory mode='strict' nodeset='0'/><memnode cellid='0' mode='strict' nodeset='1'/></numatune>",
    "<memoryBacking><hugepages><page size='1' unit='GiB' nodeset='0'/></hugepages><locked/><source type='memfd'/><access mode='shared'/></memoryBacking>",
    "<memtune><hard_limit unit='G'>1</hard_limit></memtune><blkiotune><weight>500</weight></blkiotune>",
    "<on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>coredump-destroy</on_crash>",
    "<on_crash>coredump-restart</on_crash>",
    "<on_crash>rename-restart</on_crash><on_lockfailure>poweroff</on_lockfailure>",
    "<on_poweroff>preserve</on_poweroff>",
    "<clock offset='utc'><timer name='rtc' tickpolicy='catchup'/><timer name='pit' tickpolicy='delay'/><timer name='hpet' present='no'/></clock>",
    "<clock offset='localtime'><timer name='rtc' track='guest' tickpolicy='catchup'><catchup threshold='123' slew='120' limit='10000'/></timer></clock>",
    "<clock offset='absolute' start='1234567890'/>",
    "<clock offset='variable' adjustment='-3600' basis='utc'/>",
    "<clock offset='variable' adjustment='12' basis='localtime'/>",
    "<clock offset='utc' adjustment='reset'/>",
    "<clock offset='timezone' timezone='Europe/Berlin'/>",
    "<clock offset='utc'><timer name='kvmclock' present='yes'/><timer name='hypervclock' present='yes'/><timer name='tsc' frequency='2400000000'/></clock>",
    "<clock offset='utc'><timer name='armvtimer' tickpolicy='discard'/></clock>",
    "<pm><suspend-to-mem enabled='no'/><suspend-to-disk enabled='yes'/></pm>",
    "<sysinfo type='smbios'><bios><entry name='vendor'>LENOVO</entry></bios><system><entry name='manufacturer'>Fedora</entry></system></sysinfo>",
    "<sysinfo type='fwcfg'><entry name='opt/com.example/name'>x</entry></sysinfo>",
    "<genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid><title>t</title><description>d</description>",
    "<seclabel type='none'/><resource><partition>/machine</partition></resource><perf><event name='cmt' enabled='yes'/></perf>",
    "<throttlegroups><throttlegroup><group_name>limit0</group_name><total_iops_sec>400</total_iops_sec></throttlegroup></throttlegroups>",
];

const OS: &[&str] = &[
    "<boot dev='hd'/><boot dev='cdrom'/><boot dev='network'/><boot dev='fd'/>",
    "<bootmenu enable='yes' timeout='3000'/><bios useserial='yes' rebootTimeout='-1'/>",
    "<bootmenu enable='yes' timeout='4294967295'/>",
    "<smbios mode='host'/>",
    "<smbios mode='sysinfo'/>",
    "<acpi><table type='slic'>/etc/x</table></acpi>",
];

const FEATURES: &[&str] = &[
    "<acpi/><apic eoi='on'/><pae/><hap state='on'/><viridian/>",
    "<acpi/><smm state='on'/>",
    "<acpi/><smm state='on'><tseg unit='MiB'>48</tseg></smm>",
    "<acpi/><vmport state='off'/><vmcoreinfo state='on'/><pmu state='off'/>",
    "<acpi/><kvm><hidden state='on'/><hint-dedicated state='on'/><poll-control state='on'/><pv-ipi state='off'/><dirty-ring state='on' size='4096'/></kvm>",
    "<acpi/><hyperv><relaxed state='on'/><vapic state='on'/><spinlocks state='on' retries='8191'/><vpindex state='on'/><runtime state='on'/><synic state='on'/><stimer state='on'><direct state='on'/></stimer><reset state='on'/><vendor_id state='on' value='KVM Hv'/><frequencies state='on'/><reenlightenment state='on'/><tlbflush state='on'><direct state='on'/></tlbflush><ipi state='on'/><evmcs state='off'/><emsr_bitmap state='on'/><xmm_input state='on'/></hyperv>",
    "<acpi/><hyperv mode='passthrough'/>",
    "<acpi/><hyperv mode='host-model'><relaxed state='on'/></hyperv>",
    "<acpi/><gic version='3'/><ioapic driver='qemu'/>",
    "<acpi/><ioapic driver='kvm'/><tcg><tb-cache unit='MiB'>128</tb-cache></tcg><async-teardown enabled='yes'/><ras state='on'/><ps2 state='on'/>",
    "<pvspinlock state='on'/><htm state='on'/><nested-hv state='off'/><capabilities policy='default'/><msrs unknown='ignore'/>",
];

const CPUS: &[&str] = &[
    "<cpu mode='host-passthrough' check='none' migratable='on'/>",
    "<cpu mode='host-passthrough'><topology sockets='1' dies='1' cores='1' threads='1'/><cache mode='passthrough'/></cpu>",
    "<cpu mode='host-model' check='partial'/>",
    "<cpu mode='host-model'><model fallback='forbid'/><feature policy='require' name='invtsc'/></cpu>",
    "<cpu mode='maximum'/>",
    "<cpu mode='custom' match='exact' check='full'><model fallback='forbid'>Haswell</model><vendor>Intel</vendor><feature policy='require' name='vme'/></cpu>",
    "<cpu mode='custom' match='exact' check='partial'><model fallback='allow'>Skylake-Server</model></cpu>",
    "<cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>",
    "<cpu mode='custom'><model>EPYC-Turin-v9</model></cpu>",
    "<cpu match='exact'><model>core2duo</model><feature policy='force' name='vmx'/></cpu>",
    "<cpu mode='custom'><model>qemu64</model><feature policy='require' name='frobnicate'/><feature policy='disable' name='svm'/></cpu>",
    "<cpu mode='custom'><model>qemu64</model><feature policy='require' name='vmx-ept'/><feature policy='require' name='stibp'/></cpu>",
    "<cpu mode='custom'><feature policy='disable' name='svm'/></cpu>",
    "<cpu mode='custom'><model>qemu64</model><cache level='2' mode='emulate'/></cpu>",
    "<cpu mode='custom'><model>qemu64</model><cache level='3' mode='emulate'/></cpu>",
    "<cpu mode='custom'><model>qemu64</model><cache mode='passthrough'/></cpu>",
    "<cpu mode='custom'><model>qemu64</model><maxphysaddr mode='emulate' bits='42'/></cpu>",
    "<cpu mode='custom'><model>qemu64</model><maxphysaddr mode='emulate' bits='99'/></cpu>",
    "<cpu mode='host-passthrough'><maxphysaddr mode='passthrough' limit='39'/></cpu>",
    "<cpu><topology sockets='1' dies='1' clusters='1' cores='1' threads='1'/></cpu>",
    "<cpu><topology sockets='4' cores='4' threads='1'/></cpu>",
    "<cpu><numa><cell id='0' cpus='0' memory='24' unit='MiB' memAccess='shared'><distances><sibling id='0' value='10'/></distances></cell></numa></cpu>",
    "<cpu><numa><cell id='0' cpus='0-511' memory='24' unit='MiB'/></numa></cpu>",
    "<cpu><numa><cell id='0' cpus='0' memory='900' unit='GiB'/></numa></cpu>",
    "<cpu><numa><cell id='4294967295' cpus='0' memory='24' unit='MiB'/></numa></cpu>",
];

const DISKS: &[&str] = &[
    "<target dev='sda' bus='scsi' rotation_rate='1'/><wwn>5000c50015ea71aa</wwn><vendor>SEAGATE</vendor><product>ST31000</product>",
    "<target dev='sda' bus='sata' rotation_rate='7200'/><serial>WD-1</serial>",
    "<target dev='sda' bus='usb' removable='on'/>",
    "<target dev='sda' bus='scsi' rotation_rate='70000'/>",
    "<target dev='vda' bus='virtio' rotation_rate='7200'/>",
    "<target dev='xvda' bus='xen'/>",
    "<target dev='sda' bus='sd'/>",
    "<target dev='vda' bus='virtio'/><serial>a b,c$%</serial>",
    "<target dev='vda' bus='virtio'/><wwn>xyz</wwn><vendor>MUCHTOOLONG</vendor>",
    "<target dev='vda' bus='virtio'/><blockio logical_block_size='4096' physical_block_size='4096'/>",
    "<target dev='vda' bus='virtio'/><blockio logical_block_size='3'/>",
    "<target dev='vda' bus='virtio'/><blockio logical_block_size='4096' physical_block_size='512' discard_granularity='4096'/>",
    "<target dev='sda' bus='sata'/><blockio logical_block_size='4096'/>",
    "<target dev='vda' bus='virtio'/><geometry cyls='16383' heads='16' secs='63' trans='lba'/>",
    "<target dev='vda' bus='virtio'/><geometry cyls='99999999' heads='300' secs='63'/>",
    "<target dev='vda' bus='virtio'/><boot order='1'/><address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>",
    "<target dev='vda' bus='virtio'/><boot order='0'/>",
    "<target dev='vda' bus='virtio'/><address type='pci' domain='0x0001' bus='0x00' slot='0x05' function='0x0'/>",
    "<target dev='sda' bus='scsi'/><address type='drive' controller='4294967295' bus='0' target='0' unit='0'/>",
    "<target dev='sda' bus='scsi'/><address type='drive' controller='2' bus='0' target='3' unit='1'/>",
    "<target dev='vda' bus='virtio'/><iotune><total_iops_sec>5</total_iops_sec></iotune><auth username='x'/><shareable/><transient/>",
    "<target dev='vda' bus='virtio'/><address type='ccw' cssid='0xfe' ssid='0x0' devno='0x0000'/>",
];

const CONTROLLERS: &[&str] = &[
    "<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='4' queues='2' cmd_per_lun='128' max_sectors='512'/></controller>",
    "<controller type='scsi' index='0' model='virtio-scsi'><driver queues='5000'/></controller>",
    "<controller type='scsi' index='0' model='virtio-scsi'><driver><iothreads><iothread id='2'/></iothreads></driver></controller>",
    "<controller type='scsi' index='0' model='lsilogic'/>",
    "<controller type='scsi' index='0' model='lsisas1068'/>",
    "<controller type='scsi' index='0' model='buslogic'/>",
    "<controller type='scsi' index='0' model='vmpvscsi'/>",
    "<controller type='scsi' index='4294967295' model='virtio-scsi'/>",
    "<controller type='nvme' index='0'><serial>x</serial></controller>",
    "<controller type='xenbus' index='0' maxGrantFrames='64'/>",
    "<controller type='usb' index='0' model='qemu-xhci' ports='15'/>",
    "<controller type='usb' index='0' model='qemu-xhci' ports='99'/>",
    "<controller type='usb' index='0' model='ich9-ehci1'/><controller type='usb' index='0' model='ich9-uhci1'><master startport='0'/></controller>",
    "<controller type='usb' index='0' model='piix3-uhci'/>",
    "<controller type='usb' index='0' model='none'/>",
    "<controller type='usb' index='0' model='qusb2'/>",
    "<controller type='virtio-serial' index='0' ports='31' vectors='4'/>",
    "<controller type='virtio-serial' index='0' ports='600'/>",
    "<controller type='pci' index='0' model='pcie-root'/><controller type='pci' index='1' model='pcie-root-port'><model name='pcie-root-port'/><target chassis='1' port='0x10'/></controller>",
    "<controller type='pci' index='1' model='pcie-root-port'><target chassis='300' port='0x12c' hotplug='off'/></controller>",
    "<controller type='pci' index='1' model='dmi-to-pci-bridge'/><controller type='pci' index='2' model='pci-bridge'><target chassisNr='2'/></controller>",
    "<controller type='pci' index='1' model='pcie-expander-bus'><target busNr='200'><node>0</node></target></controller>",
    "<controller type='ccid' index='0'/><smartcard mode='host'/>",
    "<controller type='fdc' index='0'/><controller type='sata' index='1'/>",
];

const NICS: &[&str] = &[
    "<model type='virtio'/><driver name='vhost' queues='4' rx_queue_size='1024' tx_queue_size='1024'/><mtu size='9000'/><boot order='2'/>",
    "<model type='virtio'/><driver name='qemu' queues='4294967295' rx_queue_size='128'/>",
    "<model type='virtio'/><mtu size='65536'/>",
    "<model type='virtio-non-transitional'/><link state='down'/>",
    "<model type='e1000'/><mtu size='1400'/>",
    "<model type='e1000e'/>",
    "<model type='rtl8139'/>",
    "<model type='vmxnet3'/>",
    "<model type='i82559er'/>",
    "<model type='igb'/>",
    "<model type='netfront'/>",
    "<model type='usb-net'/>",
    "<model type='virtio'/><filterref filter='clean-traffic'/><bandwidth><inbound average='1000'/></bandwidth><vlan><tag id='42'/></vlan><virtualport type='openvswitch'/>",
];

const DEVICES: &[&str] = &[
    "<watchdog model='itco' action='reset'/>",
    "<watchdog model='itco' action='poweroff'/>",
    "<watchdog model='i6300esb' action='dump'/>",
    "<watchdog model='i6300esb' action='inject-nmi'/><watchdog model='itco' action='reset'/>",
    "<watchdog model='ib700'/>",
    "<watchdog model='diag288' action='reset'/>",
    "<watchdog model='frob'/>",
    "<panic model='isa'/>",
    "<panic model='hyperv'/>",
    "<panic model='pvpanic'/>",
    "<iommu model='intel'/>",
    "<iommu model='intel'><driver intremap='on' caching_mode='on' eim='on' iotlb='on' aw_bits='64' dma_translation='on'/></iommu>",
    "<iommu model='virtio'/>",
    "<iommu model='smmuv3'/>",
    "<iommu model='amd'><driver xtsup='on'/></iommu>",
    "<sound model='ich9'><codec type='micro'/><audio id='1'/></sound><audio id='1' type='pulseaudio' serverName='x'/>",
    "<sound model='ac97'/>",
    "<sound model='virtio' streams='2'/>",
    "<sound model='usb' multichannel='yes'/>",
    "<graphics type='spice' autoport='yes'><gl enable='yes'/></graphics><video><model type='qxl' ram='65536' vram='65536' vgamem='16384' heads='1' primary='yes'/></video>",
    "<graphics type='vnc' port='5901' passwd='x'/><video><model type='virtio' heads='1'><acceleration accel3d='yes'/><resolution x='800' y='600'/></model></video>",
    "<video><model type='none'/></video>",
    "<video><model type='bochs'/></video><video><model type='ramfb'/></video>",
    "<video><model type='vmvga'/></video>",
    "<video><model type='xen'/></video>",
    "<video><model type='gop'/></video>",
    "<video><model type='virtio' heads='99' vram='4294967295'/></video>",
    "<video><model type='vga' vram='9'/></video>",
    "<video><driver name='vhostuser'/><model type='virtio'/></video>",
    "<graphics type='egl-headless'/><graphics type='dbus'/><graphics type='sdl'/>",
    "<input type='tablet' bus='usb'/><input type='mouse' bus='ps2'/><input type='keyboard' bus='ps2'/>",
    "<input type='tablet' bus='virtio'/><input type='keyboard' bus='virtio'/><input type='mouse' bus='virtio'/>",
    "<input type='evdev'><source dev='/dev/input/event1' grab='all' repeat='on'/></input>",
    "<input type='passthrough' bus='virtio'><source evdev='/dev/input/event1'/></input>",
    "<input type='mouse' bus='xen'/>",
    "<input type='tablet' bus='usb'><address type='usb' bus='0' port='1.2'/></input><hub type='usb'><address type='usb' bus='0' port='1'/></hub>",
    "<memballoon model='virtio' autodeflate='on' freePageReporting='on'><stats period='10'/></memballoon>",
    "<memballoon model='none'/>",
    "<memballoon model='xen'/>",
    "<rng model='virtio'><rate bytes='123' period='1000'/><backend model='egd' type='udp'><source mode='bind' service='1234'/></backend></rng>",
    "<rng model='virtio-transitional'><backend model='builtin'/></rng>",
    "<serial type='pty'><target type='isa-serial' port='0'><model name='isa-serial'/></target></serial><console type='pty'><target type='serial' port='0'/></console>",
    "<serial type='tcp'><source mode='bind' host='0.0.0.0' service='4555'/><target type='pci-serial' port='1'/></serial>",
    "<serial type='pty'><target type='usb-serial' port='0'/></serial><serial type='pty'><target type='isa-debug' port='0'/></serial>",
    "<serial type='pty'><target type='spapr-vio-serial'/></serial>",
    "<console type='pty'><target type='virtio' port='0'/></console><console type='pty'><target type='virtio' port='1'/></console>",
    "<channel type='unix'><source mode='bind'/><target type='virtio' name='org.qemu.guest_agent.0'/><address type='virtio-serial' controller='0' bus='0' port='1'/></channel>",
    "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel><redirdev bus='usb' type='spicevmc'/>",
    "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/><address type='virtio-serial' controller='7' bus='0' port='4'/></channel>",
    "<hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0' bus='1' slot='0' function='0'/></source></hostdev>",
    "<filesystem type='mount'><driver type='virtiofs'/><source dir='/x'/><target dir='x'/></filesystem><shmem name='x'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>",
    "<vsock model='virtio'><cid auto='yes' address='3'/></vsock><crypto model='virtio' type='qemu'><backend model='builtin' queues='1'/></crypto>",
    "<memory model='dimm'><target><size unit='MiB'>64</size><node>0</node></target></memory><memory model='virtio-mem'><target><size unit='MiB'>64</size><node>0</node><block unit='MiB'>2</block><requested unit='MiB'>64</requested></target></memory>",
    "<parallel type='file'><source path='/x'/></parallel><lease><key>x</key><target path='/x'/></lease><pstore backend='acpi-erst'><path>/x</path></pstore>",
];

/// All of them, with a name each.
fn corpus() -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut add = |kind: &str, parts: Parts| {
        let name = format!("{kind} {}", all.len());
        all.push((name, parts.xml()));
    };
    let nic = |rest: &str| format!("<interface type='network'><source network='default'/>{rest}</interface>");
    for (n, machine) in MACHINES.iter().enumerate() {
        let devices = nic("<model type='virtio'/>");
        add("machine", Parts { machine, devices: &devices, ..Parts::default() });
        // Devices that are on every board, on each in turn.
        for devices in DEVICES.iter().skip(n).step_by(MACHINES.len() * 3) {
            add("board", Parts { machine, devices, ..Parts::default() });
        }
    }
    VCPUS.iter().for_each(|vcpu| add("vcpu", Parts { vcpu, ..Parts::default() }));
    MEMORIES.iter().for_each(|memory| add("memory", Parts { memory, ..Parts::default() }));
    TOPS.iter().for_each(|top| add("top", Parts { top, ..Parts::default() }));
    OS.iter().for_each(|os| add("os", Parts { os, ..Parts::default() }));
    FEATURES.iter().for_each(|features| add("features", Parts { features, ..Parts::default() }));
    CPUS.iter().for_each(|cpu| add("cpu", Parts { cpu, ..Parts::default() }));
    DISKS.iter().for_each(|disk| add("disk", Parts { disk, ..Parts::default() }));
    CONTROLLERS.iter().for_each(|devices| add("controller", Parts { devices, ..Parts::default() }));
    NICS.iter().for_each(|rest| add("nic", Parts { devices: &nic(rest), ..Parts::default() }));
    DEVICES.iter().for_each(|devices| add("device", Parts { devices, ..Parts::default() }));
    all
}

/// What became of one of them.
enum Fate {
    Started,
    /// It was said not to be ready, and why.
    Red(String),
    /// It was said to be ready, and this is what libvirt says.
    Lie(String),
}

/// The libvirt of host b, as this process reaches it.
fn libvirt_of_b() -> LibvirtHypervisor {
    let pid = std::env::var("VR_LAB_B_PID").expect("a lab");
    let uri = format!("qemu+unix:///system?socket=/proc/{pid}/root/run/libvirt/libvirt-sock");
    LibvirtHypervisor::connect(Some(&uri)).expect("the libvirt of host b")
}

fn try_one(hypervisor: &LibvirtHypervisor, n: usize, xml: &str, mapping: &Mapping) -> Fate {
    let target = ["vda", "sda", "xvda"].into_iter().find(|dev| xml.contains(&format!("dev='{dev}'"))).expect("a disk");
    let disks = [(DiskName::new(target).unwrap(), PathBuf::from(format!("/var/tmp/corpus/{}.qcow2", n % WORKERS)))];
    let wish = Wish {
        name: DomainName::new(format!("corpus-{n}")).unwrap(),
        uuid: DomainUuid::new(format!("{n:08x}-f6a4-4304-89aa-97f2502e193f")).unwrap(),
        disks: &disks,
        nics: Nics::Mapped,
        macs: Macs::New(n as u64),
        console: None,
        nvram: None,
        tpm: false,
    };
    let fitted = fit(hypervisor, xml, &wish, mapping).unwrap_or_else(|e| panic!("{}: {xml}", e.chain()));
    let room = Room { dir: "/var/tmp".into(), free_bytes: Some(64 << 30) };
    let findings = judge(&fitted, &wish.name, &wish.uuid, &room, &Builds::default());
    if worst(&findings) == Color::Red {
        let red = findings.into_iter().filter(|f| f.color == Color::Red).map(|f| f.what).collect::<Vec<_>>();
        return Fate::Red(red.join("; "));
    }
    let here = fitted.definition.xml().expect("nothing of it is red");
    match hypervisor.start_transient(here) {
        Ok(()) => {
            hypervisor.destroy(&wish.uuid).expect("end it");
            Fate::Started
        }
        Err(e) => Fate::Lie(format!("{}\n{here}", e.chain())),
    }
}

/// As many at a time as a small machine takes.
const WORKERS: usize = 2;

#[test]
fn what_is_said_to_be_ready_starts_whatever_its_definition_looks_like() {
    let _lab = Lab::get();
    let images = r#"mkdir -p /var/tmp/corpus; for n in 0 1; do qemu-img create -q -f qcow2 "/var/tmp/corpus/$n.qcow2" 16M; done
        printf '<network><name>corpus</name><bridge name="vrcorpus" stp="off" delay="0"/></network>' >/var/tmp/corpus/net.xml
        virsh -q net-create /var/tmp/corpus/net.xml; touch /var/log/libvirt/crashes; wc -l </var/log/libvirt/crashes"#;
    let crashes = Host::B.script(images, &[]);
    let mapping = Mapping::parse("networks: {default: corpus}", Path::new("recovery.yaml")).unwrap();
    let corpus = corpus();
    assert!(corpus.len() >= 150, "only {} definitions", corpus.len());
    let fates = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (corpus, fates, mapping) = (&corpus, &fates, &mapping);
            scope.spawn(move || {
                let hypervisor = libvirt_of_b();
                for (n, (name, xml)) in corpus.iter().enumerate().filter(|(n, _)| n % WORKERS == worker) {
                    let fate = try_one(&hypervisor, n, xml, mapping);
                    fates.lock().unwrap().push((name.clone(), fate));
                }
            });
        }
    });
    let fates = fates.into_inner().unwrap();
    assert_eq!(fates.len(), corpus.len());
    let (mut lies, mut red) = (Vec::new(), Vec::new());
    for (name, fate) in &fates {
        match fate {
            Fate::Started => {}
            Fate::Red(why) => red.push(format!("{name}: {why}")),
            Fate::Lie(said) => lies.push(format!("{name}: {said}")),
        }
    }
    println!("{} definitions, {} of them not ready:\n{}", corpus.len(), red.len(), red.join("\n"));
    let after =
        Host::B.script("virsh -q net-destroy corpus; rm -r /var/tmp/corpus; wc -l </var/log/libvirt/crashes", &[]);
    assert!(lies.is_empty(), "{} were said to be ready, and did not start:\n{}", lies.len(), lies.join("\n"));
    assert_eq!(crashes, after, "libvirtd has crashed");
    // Harmless words keep nobody from a failover: nearly all of them start.
    assert!(red.len() * 10 <= corpus.len(), "too many are not ready:\n{}", red.join("\n"));
}

/// The whole way: what the source's libvirt has, through a point, to the target.
#[test]
fn harmless_words_of_the_source_come_up_on_the_target() {
    let lab = Lab::get();
    let words = |xml: String, _: &str| {
        let more = "<iothreads>1</iothreads><iothreadids><iothread id='4'/></iothreadids>\
            <clock offset='absolute' start='1234567890'/><devices>\
            <controller type='scsi' index='0' model='virtio-scsi'><driver iothread='4'/></controller>\
            <watchdog model='i6300esb' action='dump'/><interface type='user'><model type='virtio'/></interface>\
            <input type='evdev'><source dev='/dev/input/event0'/></input>";
        let xml = xml.replace("<devices>", more).replace("<on_crash>destroy<", "<on_crash>coredump-destroy<");
        xml.replace("<vcpu>", "<vcpu placement='auto'>")
    };
    let vm = lab.domain("words").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).xml(words).off();
    // The target says at the source what it lacks, while the source lives: by its own mapping, which has no networks.
    let first = vm.sync().sealed();
    let lacks = first.report["target_lacks"].to_string();
    assert!(lacks.contains("devices/interface is on 'user'") && lacks.contains("recovery.yaml"), "{:#}", first.report);
    // More points than the target's libvirt is said to start.
    let disks = vm.virsh(&["domblklist"]);
    let image = disks.lines().find_map(|l| l.trim().strip_prefix("vda")).expect("its disk").trim().to_owned();
    for n in 0..4 {
        let write = format!("qemu-io -f qcow2 -c 'write -P 0x2{n} {n}M 1M' \"$1\" >/dev/null");
        Host::A.script(&write, &[&image]);
        vm.sync().sealed();
    }
    let (b, there) = (Drills::of(&vm), OnB(&vm));
    let ready = Drills::report(&b.run("", &["ready", &vm.name, "--json"]).success());
    let findings = ready["findings"].as_array().unwrap();
    assert!(findings.iter().all(|f| f["color"] != "red"), "{ready:#}");
    for what in ["devices/input", "vcpu/@placement", "on_crash", "devices/watchdog/@action", "clock/@offset"] {
        assert!(findings.iter().any(|f| f["what"].as_str().unwrap().starts_with(what)), "{what}: {ready:#}");
    }
    Host::B.script("echo 'images_max: 3' >>\"$1/recovery.yaml\"", &[&vm.shared()]);
    let ready = Drills::report(&b.run("", &["ready", &vm.name, "--json"]).success());
    let findings = ready["findings"].as_array().unwrap();
    let deep = findings.iter().find(|f| f["what"].as_str().unwrap().contains("starts 3 at most")).expect("it is told");
    assert_eq!(deep["color"], "yellow", "{ready:#}");
    b.run("", &["failover", &vm.name, "--unplanned", "--source-is-dead"]).success();
    assert!(there.runs());
    // The guest's disk is what the point is, on three images.
    let overlay = format!("{}/vda.qcow2", there.overlays());
    let images = Host::B.output(&["qemu-img", "info", "-U", "--backing-chain", &overlay]);
    assert_eq!(images.matches("image: ").count(), 3, "{images}");
    let point = super::domain::image_of(&vm.head(), "vda");
    Host::B.ok(&["qemu-img", "compare", "-U", "-q", &point, &overlay]);
    b.run("", &["failover", &vm.name, "--undo", "--lose-its-writes"]).success();
}
