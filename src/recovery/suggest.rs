//! What an operator of this host may want to write into recovery.yaml so that a domain can be brought up here:
//! lines to paste, each a guess that says so. Pure.

use super::definition::remark::Verdict;
use super::fitting::Fitted;
use crate::error::printable;
use crate::hypervisor::machine::HostView;
use crate::hypervisor::releases::parse_version;

/// How many names are listed to choose from.
const SHOWN_MAX: usize = 12;

/// The lines; `None`: nothing is missing that they could say.
pub fn lines(fitted: &Fitted) -> Vec<String> {
    let Fitted { definition, host, .. } = fitted;
    let mut lines = Vec::new();
    if !definition.unmapped.is_empty() {
        lines.push("networks:".to_owned());
        lines.push(format!("  # this host has: {}; or none, which leaves the interface out", places(host)));
        let mapped =
            definition.unmapped.iter().map(|source| format!("  {}: {}", quoted(source), network(source, host)));
        lines.extend(mapped);
    }
    if host.machine.is_err() && !host.machines.is_empty() {
        let wanted = &definition.machine.machine;
        lines.push("machines:".to_owned());
        let here = machine(wanted, &host.machines);
        lines.push(format!("  {}: {}", quoted(wanted), here.map_or("# see `virsh capabilities`".to_owned(), quoted)));
    }
    if let (Some(model), Ok(able)) = (&definition.cpu, &host.machine)
        && !able.cpu_models.is_empty()
        && !able.cpu_models.contains(model)
    {
        lines.push("cpus:".to_owned());
        lines.push(format!("  # this host has: {}", few(able.cpu_models.iter().map(String::as_str))));
        lines.push(format!("  {}: {}", quoted(model), quoted(cpu(model, &able.cpu_models))));
    }
    let refused = definition.remarks.iter().filter(|r| r.verdict == Verdict::Refused);
    let (mut files, mut others) = (Vec::new(), Vec::new());
    for remark in refused {
        match remark.what.as_str() {
            "devices/interface" => {}
            "os/kernel" | "os/initrd" | "os/loader" => files.push(remark),
            _ => others.push(remark),
        }
    }
    if !files.is_empty() {
        lines.push("paths:".to_owned());
        lines.extend(files.iter().map(|r| format!("  # {} {}", r.what, printable(&r.why, 120))));
        lines.push("  /directory/at/the/source: /directory/here".to_owned());
    }
    if !others.is_empty() {
        lines.push("leave_out:".to_owned());
        lines.extend(others.iter().map(|r| format!("  - {}  # {}", quoted(&r.what), printable(&r.why, 120))));
    }
    lines
}

/// As YAML takes any text.
fn quoted(text: &str) -> String {
    format!("\"{}\"", printable(text, 120).replace(['"', '\\'], "_"))
}

/// The first of them, and how many more there are.
fn few<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let all: Vec<&str> = names.collect();
    let shown = all.iter().take(SHOWN_MAX).map(|name| printable(name, 60)).collect::<Vec<_>>().join(", ");
    match all.len().saturating_sub(SHOWN_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn places(host: &HostView) -> String {
    let bridges: Vec<String> = host.bridges.iter().map(|name| format!("bridge:{name}")).collect();
    let networks = host.networks.iter().filter(|n| n.active).map(|n| n.name.as_str());
    match few(networks.chain(bridges.iter().map(String::as_str))) {
        empty if empty.is_empty() => "no network that is started, and no bridge".to_owned(),
        names => names,
    }
}

/// What has the same name here; else the only network that there is; else none.
fn network(source: &str, host: &HostView) -> String {
    let active: Vec<&str> = host.networks.iter().filter(|n| n.active).map(|n| n.name.as_str()).collect();
    let bridge = source.strip_prefix("bridge:");
    match (bridge.filter(|b| host.bridges.iter().any(|h| h == b)), active.as_slice()) {
        (Some(_), _) => quoted(source),
        (None, names) if names.contains(&source) => quoted(source),
        (None, [only]) => quoted(only),
        _ => "none".to_owned(),
    }
}

/// The newest of the same family: `pc-q35-7.2` for a `pc-q35-10.0`.
fn machine<'a>(wanted: &str, all: &'a [String]) -> Option<&'a str> {
    let family = |name: &str| name.rsplit_once('-').map(|(family, _)| family.to_owned());
    let version = |name: &str| name.rsplit_once('-').and_then(|(_, version)| parse_version(version));
    let same = all.iter().filter(|name| version(name).is_some() && family(name) == family(wanted));
    same.max_by_key(|name| version(name)).map(String::as_str)
}

/// One that begins alike; else the plainest that there is.
fn cpu<'a>(wanted: &str, all: &'a [String]) -> &'a str {
    let maker = wanted.split(['-', '_']).next().unwrap_or(wanted);
    let alike = all.iter().find(|name| name.split(['-', '_']).next() == Some(maker));
    let plain = || all.iter().find(|name| *name == "qemu64" || *name == "Westmere");
    alike.or_else(plain).or(all.first()).map_or("qemu64", String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_machine_of_the_same_family_is_suggested() {
        let all = ["pc-i440fx-7.2", "pc-q35-2.12", "pc-q35-7.2", "pc-q35-7.10", "microvm"].map(str::to_owned);
        assert_eq!(machine("pc-q35-10.0", &all), Some("pc-q35-7.10"));
        assert_eq!(machine("pc-i440fx-9.0", &all), Some("pc-i440fx-7.2"));
        assert_eq!(machine("virt-9.0", &all), None);
    }

    #[test]
    fn a_processor_of_the_same_name_is_suggested() {
        let all = ["Haswell-noTSX", "Skylake-Client", "qemu64"].map(str::to_owned);
        assert_eq!(cpu("Skylake-Server-v5", &all), "Skylake-Client");
        assert_eq!(cpu("EPYC-Turin", &all), "qemu64");
    }
}
