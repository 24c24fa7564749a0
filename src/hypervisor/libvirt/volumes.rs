//! Volumes of storage pools looked up at libvirt, so that a disk by volume is a path like any other.

use crate::error::Result;
use crate::hypervisor::element::{child, document, text_of};
use crate::hypervisor::libvirt::gate::Failure;
use crate::hypervisor::volumes::{Place, Volumes, named_in};
use crate::hypervisor::xml::{DomainXml, parse_with};
use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error as VirtError, ErrorDomain};
use virt::storage_pool::StoragePool;

/// Asks libvirt for the volumes of a definition. `runs`: its instance has them open, so that the pool need not be
/// active.
pub fn of(conn: &Connect, xml: &str, runs: bool) -> Result<Volumes, Failure> {
    let mut volumes = BTreeMap::new();
    for (pool, volume) in named_in(xml)? {
        let place = look_up(conn, &pool, &volume, runs)?;
        volumes.insert((pool, volume), place);
    }
    Ok(Volumes(volumes))
}

/// One of a domain's XMLs, with the volumes that it names looked up.
pub fn parsed(conn: &Connect, domain: &Domain, flags: u32) -> Result<DomainXml, Failure> {
    let text = domain.xml_desc(flags)?;
    Ok(parse_with(&text, &of(conn, &text, domain.id().is_some())?)?)
}

/// Bytes of the disk that an image of a pool is, as a guest sees it. `None` where libvirt does not know.
pub fn capacity(conn: &Connect, path: &Path) -> Result<Option<u64>, VirtError> {
    let volume = path.to_str().map(|path| conn.lookup_storage_vol_by_path(path));
    match volume.map(|found| found.and_then(|volume| volume.info())) {
        Some(Ok(info)) => Ok(Some(info.capacity)),
        Some(Err(e)) if is_lost(&e) => Err(e),
        _ => Ok(None),
    }
}

/// A broken connection is not an answer; any other error is one.
fn look_up(conn: &Connect, pool: &str, volume: &str, runs: bool) -> Result<Result<Place, String>, VirtError> {
    let answer = |e: VirtError| match is_lost(&e) {
        true => Err(e),
        false => Ok(Err(format!("and libvirt cannot say where that lies: {}", e.message()))),
    };
    let found = match conn.lookup_storage_pool_by_name(pool) {
        Ok(found) => found,
        Err(e) => return answer(e),
    };
    match found.lookup_storage_vol_by_name(volume).and_then(|v| v.path()) {
        Ok(path) => Ok(place(&path)),
        // It was stopped under the running domain, which needs the pool for nothing.
        Err(e) if runs && !is_lost(&e) => match of_directory(&found, volume)? {
            Some(path) => Ok(place(&path)),
            None => answer(e),
        },
        Err(e) => answer(e),
    }
}

fn is_lost(e: &VirtError) -> bool {
    e.domain().is(ErrorDomain::Rpc)
}

/// A pool that is a directory, or a volume group, names its volumes by their files.
fn of_directory(pool: &StoragePool, volume: &str) -> Result<Option<String>, VirtError> {
    let xml = pool.xml_desc(0)?;
    let target = || -> Option<String> {
        let doc = document(&xml).ok()?;
        let root = doc.root_element();
        let by_name = matches!(root.attribute("type")?, "dir" | "fs" | "netfs" | "logical");
        let dir = text_of(child(child(root, "target")?, "path")?);
        (by_name && dir.starts_with('/') && !volume.contains('/')).then(|| format!("{}/{volume}", dir.trim()))
    };
    Ok(target())
}

fn place(path: &str) -> Result<Place, String> {
    if !path.starts_with('/') {
        return Err(format!("which lies on the network ({path})"));
    }
    match std::fs::metadata(path).map(|m| m.file_type()) {
        Ok(kind) if kind.is_file() || kind.is_block_device() => {
            Ok(Place { path: path.into(), block_device: kind.is_block_device() })
        }
        Ok(_) => Err(format!("which is neither a file nor a block device ({path})")),
        Err(e) => Err(format!("whose path cannot be looked at ({path}: {e})")),
    }
}
