//! [`Tracking`] on libvirt: QMP through the same gate as every other call, and QEMU's own NBD server for what is dirty.
//!
//! Tried with libvirt 9.0 and QEMU 7.2: libvirt copies persistent bitmaps into an overlay and merges them back at its
//! commit, and the frozen node can be exported read-only with its bitmap while the guest writes to the overlay.

use crate::block::ByteRange;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::bitmap::{self, Node};
use crate::hypervisor::libvirt::LibvirtHypervisor;
use crate::hypervisor::{BitmapView, Hypervisor, Tracking};
use crate::image::nbd::{NbdImage, bitmap_context};
use crate::image::{Format, Image, Layer, qemu_img};
use crate::name::DomainUuid;
use std::path::{Path, PathBuf};

/// Name of our socket in the domain's private directory; seen there, a server left behind by a run of ours is known.
const SOCKET: &str = "virt-replica.sock";

/// Where libvirt keeps a running domain's private directory `domain-ID-NAME`: QEMU may create sockets there, whatever
/// user and confinement it runs under.
const PRIVATE_DIRS: &str = "/var/lib/libvirt/qemu";

impl Tracking for LibvirtHypervisor {
    fn bitmaps(&self, uuid: &DomainUuid, layers: &[Layer]) -> Result<Vec<Vec<BitmapView>>> {
        let nodes = self.nodes(uuid)?;
        let of = |layer| bitmap::node_of(&nodes, layer).map(|n| n.dirty_bitmaps.clone()).unwrap_or_default();
        Ok(layers.iter().map(|layer| of(layer).into_iter().map(BitmapView::from).collect()).collect())
    }

    fn add_bitmap(&self, uuid: &DomainUuid, layers: &[Layer], name: &str) -> Result<()> {
        let nodes = self.nodes(uuid)?;
        let mut targets = Vec::with_capacity(layers.len());
        for layer in layers {
            // Version 2 of qcow2 has no place for bitmaps: there, too, one lives as long as the process.
            let persistent = layer.format == Format::Qcow2 && qemu_img::keeps_bitmaps(layer)?;
            targets.push((node_name(&nodes, layer)?.to_owned(), persistent));
        }
        bitmap::done(&self.qmp("add dirty bitmaps", uuid, bitmap::add(&targets, name))?)?;
        // QEMU has said yes to bitmaps that were not there afterwards: what counts is what it reports.
        for (layer, seen) in layers.iter().zip(self.bitmaps(uuid, layers)?) {
            if !seen.iter().any(|b| b.name == name && b.recording && !b.inconsistent) {
                return Err(Error::new(Kind::Refused, format!("the bitmap {name} was added and is not there"))
                    .path(&layer.path));
            }
        }
        Ok(())
    }

    fn remove_bitmap(&self, uuid: &DomainUuid, layer: &Layer, name: &str) -> Result<()> {
        let nodes = self.nodes(uuid)?;
        let Some(node) = bitmap::node_of(&nodes, layer) else { return Ok(()) };
        if !node.dirty_bitmaps.iter().any(|b| b.name == name) {
            return Ok(());
        }
        let node = node_name(&nodes, layer)?;
        bitmap::done(&self.qmp("remove a dirty bitmap", uuid, bitmap::remove(node, name))?)
            .map_err(|e| e.path(&layer.path))
    }

    fn dirty(&self, uuid: &DomainUuid, wanted: &[(Layer, String)]) -> Result<Vec<Vec<ByteRange>>> {
        let socket = self.private_dir(uuid)?.join(SOCKET);
        // A server of ours that a killed run left behind; another program's has another socket, and stays.
        if socket.exists() {
            let _ = self.qmp("stop our export", uuid, bitmap::stop_server())?;
            let _ = std::fs::remove_file(&socket);
        }
        bitmap::done(&self.qmp("start an export", uuid, bitmap::start_server(&socket)?)?)?;
        let answer = self.exported(uuid, wanted, &socket);
        let stopped = self.qmp("stop our export", uuid, bitmap::stop_server()).and_then(|r| bitmap::done(&r));
        let _ = std::fs::remove_file(&socket);
        let answer = answer?;
        stopped?;
        Ok(answer)
    }
}

impl LibvirtHypervisor {
    pub(in crate::hypervisor) fn nodes(&self, uuid: &DomainUuid) -> Result<Vec<Node>> {
        bitmap::reply(&self.qmp("ask for the block nodes", uuid, bitmap::query_nodes())?)
    }

    fn exported(&self, uuid: &DomainUuid, wanted: &[(Layer, String)], socket: &Path) -> Result<Vec<Vec<ByteRange>>> {
        let nodes = self.nodes(uuid)?;
        let mut answers = Vec::with_capacity(wanted.len());
        for (at, (layer, name)) in wanted.iter().enumerate() {
            let id = format!("virt-replica-{at}");
            let node = node_name(&nodes, layer)?;
            bitmap::done(&self.qmp("export a bitmap", uuid, bitmap::export(&id, node, name))?)
                .map_err(|e| e.path(&layer.path))?;
            let image = NbdImage::connect(socket, &id, &[bitmap_context(name)], 1)?;
            answers.push(image.dirty(name, image.size().range())?);
        }
        Ok(answers)
    }

    /// The running domain's private directory, by the word of its QEMU; of one that does not say, where libvirt of the
    /// system keeps it. `NotFound` if there is none on this host.
    pub(in crate::hypervisor) fn private_dir(&self, uuid: &DomainUuid) -> Result<PathBuf> {
        let told = bitmap::private_dir(&self.qmp("ask for the monitor's socket", uuid, bitmap::query_chardevs())?)?;
        let dir = match told {
            Some(dir) => dir,
            None => {
                let domain = self.observe_without_sizes(uuid)?;
                let id = domain.id.ok_or_else(|| Error::new(Kind::NotFound, "the domain does not run"))?;
                Path::new(PRIVATE_DIRS).join(private_name(id, domain.name.as_str()))
            }
        };
        match std::fs::metadata(&dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let what = "the running domain's private directory is not on this host";
                Err(Error::new(Kind::NotFound, what).path(dir).hint("run virt-replica on the host of that libvirt"))
            }
            // Whoever may not look at it may be told where it is.
            _ => Ok(dir),
        }
    }
}

/// As libvirt names it: by the id and the first 20 characters of the name.
fn private_name(id: u32, name: &str) -> String {
    format!("domain-{id}-{}", name.chars().take(20).collect::<String>())
}

pub(in crate::hypervisor) fn node_name<'a>(nodes: &'a [Node], layer: &Layer) -> Result<&'a str> {
    bitmap::node_of(nodes, layer)
        .and_then(|n| n.node_name.as_deref())
        .ok_or_else(|| Error::new(Kind::Conflict, "the running QEMU has no node for this image").path(&layer.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_directory_bears_id_and_name() {
        assert_eq!(private_name(7, "web"), "domain-7-web");
        assert_eq!(private_name(7, "a-name-of-more-than-twenty"), "domain-7-a-name-of-more-than-");
    }
}
