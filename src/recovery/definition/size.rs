//! How large the guest is: processors and memory, and how they lie. Read once, bounded, and written in our own
//! words, so that libvirt defines what [`ready`](crate::recovery::ready) has judged.

use super::limits::{Limits, VCPUS_PLAIN_MAX};
use super::remark::{Remark, Verdict};
use super::render::shown;
use crate::hypervisor::xml::{child, children, text_of};
use crate::recovery::definition::rule::number;
use roxmltree::Node;

/// Most memory that slots for more of it may lead to. QEMU refuses what the processor cannot address, and no host
/// says beforehand how much that is; all of them can do this.
const HOTPLUG_MAX_BYTES: u64 = 512 << 30;

/// Cells of memory that a guest may have.
const CELLS_MAX: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Size {
    pub vcpus: Option<u64>,
    /// Those that run from the start, where it is not all of them.
    pub vcpus_current: Option<u64>,
    /// `None`: not said in a way that libvirt takes.
    pub memory_bytes: Option<u64>,
    pub current_bytes: Option<u64>,
    /// The most that memory may be plugged in to, and in how many pieces.
    pub hotplug: Option<(u64, u64)>,
    /// The processors' topology goes with their number.
    pub topology: Option<[u64; 4]>,
    /// The cells go with number and memory.
    pub numa: bool,
    pub remarks: Vec<Remark>,
}

impl Size {
    pub fn of(root: Node, limits: &Limits) -> Size {
        let mut size = Size::default();
        size.vcpus(root, limits);
        size.memory(root);
        let cpu = child(root, "cpu");
        if let Some(topology) = cpu.and_then(|cpu| child(cpu, "topology")) {
            size.topology(topology);
        }
        if let Some(numa) = cpu.and_then(|cpu| child(cpu, "numa")) {
            size.numa(numa);
        }
        if let Some(max) = child(root, "maxMemory") {
            size.hotplug(max);
        }
        size
    }

    fn remark(&mut self, what: &str, verdict: Verdict, why: impl Into<String>) {
        self.remarks.push(Remark { what: what.to_owned(), verdict, why: why.into() });
    }

    fn vcpus(&mut self, root: Node, limits: &Limits) {
        let Some(vcpu) = child(root, "vcpu") else { return };
        if let Some(placement) = vcpu.attribute("placement").filter(|p| *p != "static") {
            let why = format!("is {} at the source; where a processor runs is for this host to say", shown(placement));
            self.remark("vcpu/@placement", Verdict::LeftOut, why);
        }
        let said = text_of(vcpu);
        let Some(wanted) = number(said.trim()).filter(|n| *n > 0) else {
            self.remark("vcpu", Verdict::Missing, format!("{} is no number of processors: it gets one", shown(&said)));
            self.vcpus = Some(1);
            return;
        };
        let max = match far_interrupts(root) {
            true => limits.vcpus_max,
            false => limits.vcpus_max.min(VCPUS_PLAIN_MAX),
        };
        if wanted > max {
            let why = format!("asks for {wanted} processors, and such a guest has at most {max} here: it gets {max}");
            self.remark("vcpu", Verdict::Missing, why);
        }
        let vcpus = wanted.min(max);
        self.vcpus = Some(vcpus);
        self.vcpus_current = vcpu.attribute("current").and_then(number).filter(|n| (1..vcpus).contains(n));
    }

    fn memory(&mut self, root: Node) {
        let memory = child(root, "memory");
        self.memory_bytes = memory.and_then(|m| bytes(&text_of(m), m.attribute("unit"))).filter(|b| *b >= 1 << 10);
        if let (Some(memory), None) = (memory, self.memory_bytes) {
            let why = format!("{} is no size of a guest's memory", shown(&text_of(memory)));
            self.remark("memory", Verdict::Refused, why);
        }
        let current = child(root, "currentMemory").and_then(|m| bytes(&text_of(m), m.attribute("unit")));
        self.current_bytes = current.filter(|c| *c >= 1 << 10 && self.memory_bytes.is_some_and(|m| *c <= m));
    }

    fn topology(&mut self, topology: Node) {
        let of = |name: &str| topology.attribute(name).map_or(Some(1), number);
        let parts = [of("sockets"), of("dies"), of("cores"), of("threads")];
        let counted = match (parts, of("clusters")) {
            ([Some(sockets), Some(dies), Some(cores), Some(threads)], Some(clusters)) => {
                // libvirt before 10.1 knows no clusters, and no PC has any: their cores are those of the die.
                cores.checked_mul(clusters).map(|cores| [sockets, dies, cores, threads])
            }
            _ => None,
        };
        let product = |parts: &[u64; 4]| parts.iter().try_fold(1u64, |n, part| n.checked_mul(*part));
        self.topology = counted.filter(|parts| product(parts) == Some(self.vcpus.unwrap_or(1)));
        if self.topology.is_none() {
            let why = "is left out: it is not one of as many processors as the guest gets";
            self.remark("cpu/topology", Verdict::Missing, why);
        }
    }

    fn numa(&mut self, numa: Node) {
        match cells(numa, self.vcpus.unwrap_or(1)) {
            Some(memory) => {
                self.numa = true;
                // libvirt goes by the cells, whatever else is said.
                self.memory_bytes = self.memory_bytes.map(|_| memory);
                self.current_bytes = self.current_bytes.filter(|c| *c <= memory);
            }
            None => {
                let why = "is left out: its cells do not go with the processors and the memory that the guest gets";
                self.remark("cpu/numa", Verdict::Missing, why);
            }
        }
    }

    fn hotplug(&mut self, max: Node) {
        let slots = max.attribute("slots").and_then(number).filter(|n| (1..=256).contains(n));
        let most = bytes(&text_of(max), max.attribute("unit"));
        let memory = self.memory_bytes.unwrap_or(u64::MAX);
        self.hotplug = most.filter(|b| self.numa && (memory..=HOTPLUG_MAX_BYTES).contains(b)).zip(slots);
        if self.hotplug.is_none() {
            self.remark("maxMemory", Verdict::Missing, "is left out: no memory can be plugged into the guest here");
        }
    }
}

/// The guest's IOMMU lets it reach more than 255 processors.
fn far_interrupts(root: Node) -> bool {
    let iommus = child(root, "devices").into_iter().flat_map(|d| children(d, "iommu"));
    iommus.filter_map(|i| child(i, "driver")).any(|d| d.attribute("eim") == Some("on"))
}

/// The memory of all cells, in bytes; `None`: libvirt would refuse them.
fn cells(numa: Node, vcpus: u64) -> Option<u64> {
    let cells: Vec<Node> = children(numa, "cell").collect();
    if cells.is_empty() || cells.len() > CELLS_MAX {
        return None;
    }
    let mut memory = 0u64;
    let mut taken = Vec::new();
    for (at, cell) in cells.iter().enumerate() {
        let in_order = cell.attribute("id").is_none_or(|id| number(id) == Some(at as u64));
        let own = bytes(cell.attribute("memory")?, cell.attribute("unit")).filter(|b| *b >= 1 << 10)?;
        memory = memory.checked_add(own)?;
        for (from, to) in ranges(cell.attribute("cpus").unwrap_or(""))? {
            let is_new = !taken.iter().any(|(a, b)| from <= *b && *a <= to);
            (in_order && to < vcpus && is_new).then(|| taken.push((from, to)))?;
        }
        in_order.then_some(())?;
    }
    Some(memory)
}

/// `0-3,8`, each with its end.
fn ranges(text: &str) -> Option<Vec<(u64, u64)>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to) = (number(from)?, number(to)?);
        (from <= to).then_some((from, to))
    };
    parts.map(range).collect()
}

/// A size as libvirt reads it; `None`: it is none, or too large for anything.
fn bytes(count: &str, unit: Option<&str>) -> Option<u64> {
    let count = number(count.trim())?;
    let unit = unit.unwrap_or("KiB").to_ascii_lowercase();
    let factor = match unit.as_str() {
        "b" | "byte" | "bytes" => Some(1),
        _ => {
            let power = "kmgtpe".find(unit.chars().next()?)? as u32 + 1;
            match &unit[1..] {
                "" | "ib" => 1024u64.checked_pow(power),
                "b" => 1000u64.checked_pow(power),
                _ => None,
            }
        }
    };
    count.checked_mul(factor?).filter(|b| *b < 1 << 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::xml::document;

    fn size(xml: &str, vcpus_max: u64) -> Size {
        let xml = format!("<domain>{xml}</domain>");
        let doc = document(&xml).unwrap();
        Size::of(doc.root_element(), &Limits { vcpus_max, ..Limits::default() })
    }

    fn told(size: &Size) -> Vec<(&str, Verdict)> {
        size.remarks.iter().map(|r| (r.what.as_str(), r.verdict)).collect()
    }

    #[test]
    fn a_guest_gets_no_more_processors_than_this_host_gives_and_what_went_with_their_number_goes() {
        let wide = "<vcpu placement='auto' current='2'>512</vcpu><memory>1024</memory><cpu><topology sockets='2' cores='256' threads='1'/>\
            <numa><cell cpus='0-511' memory='1024'/></numa></cpu>";
        let s = size(wide, 288);
        assert_eq!((s.vcpus, s.vcpus_current, s.topology, s.numa), (Some(255), Some(2), None, false));
        let missing = ["vcpu", "cpu/topology", "cpu/numa"].map(|what| (what, Verdict::Missing));
        assert_eq!(told(&s)[1..], missing);
        let far = wide.replace("<vcpu", "<devices><iommu><driver eim='on'/></iommu></devices><vcpu");
        assert_eq!(size(&far, 288).vcpus, Some(288));
        let s = size(&far, 4096);
        assert_eq!((s.vcpus, s.topology, s.numa), (Some(512), Some([2, 1, 256, 1]), true));
        for huge in ["4294967295", "18446744073709551615", "99999999999999999999"] {
            let s = size(&format!("<vcpu>{huge}</vcpu>"), 288);
            assert!(s.vcpus.is_some_and(|n| n <= 255), "{huge}: {s:?}");
        }
    }

    #[test]
    fn the_cores_of_clusters_are_those_of_their_die() {
        let s =
            size("<vcpu>8</vcpu><cpu><topology sockets='1' dies='1' clusters='2' cores='2' threads='2'/></cpu>", 64);
        assert_eq!((s.topology, s.remarks.len()), (Some([1, 1, 4, 2]), 0));
    }

    #[test]
    fn sizes_are_read_as_libvirt_reads_them_and_what_is_none_is_refused() {
        for (text, unit, expected) in [
            ("512", None, Some(512 << 10)),
            ("2", Some("GiB"), Some(2 << 30)),
            ("2", Some("g"), Some(2 << 30)),
            ("2", Some("KB"), Some(2000)),
            ("2", Some("kb"), Some(2000)),
            ("1", Some("E"), None),
            ("9999999", Some("TiB"), None),
            ("1", Some("furlong"), None),
            ("-1", None, None),
            ("1.5", Some("GiB"), None),
        ] {
            assert_eq!(bytes(text, unit), expected, "{text} {unit:?}");
        }
        assert_eq!(told(&size("<memory unit='EiB'>1</memory>", 1)), [("memory", Verdict::Refused)]);
    }

    #[test]
    fn cells_count_for_the_memory_and_slots_need_them() {
        let cells = "<vcpu>4</vcpu><memory unit='MiB'>1</memory><maxMemory slots='16' unit='GiB'>16</maxMemory>\
            <cpu><numa><cell id='0' cpus='0-1' memory='1' unit='GiB'/><cell id='1' cpus='2,3' memory='1' unit='GiB'/></numa></cpu>";
        let s = size(cells, 64);
        assert_eq!((s.memory_bytes, s.hotplug, s.remarks.len()), (Some(2 << 30), Some((16 << 30, 16)), 0));
        for broken in ["cpus='2,2'", "cpus='1-2'", "cpus='2-4'", "cpus='3-2'", "cpus='x'"] {
            let s = size(&cells.replace("cpus='2,3'", broken), 64);
            assert_eq!(told(&s), [("cpu/numa", Verdict::Missing), ("maxMemory", Verdict::Missing)], "{broken}");
        }
        assert_eq!(size(&cells.replace(">16<", ">16000<"), 64).hotplug, None);
    }
}
