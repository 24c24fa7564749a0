//! libvirt's backup in pull mode as values: the document that begins one, and the one by which libvirt names the one
//! that runs. Pure.
//!
//! While such a job runs, QEMU serves every disk as it was when the job began, over NBD on a unix socket. What the
//! guest overwrites is first copied into a *scratch* file of the disk; the production chain is not touched.
//!
//! Format: <https://libvirt.org/formatbackup.html>.

use crate::error::{Error, Kind, Result};
use crate::hypervisor::element::{children, document, escape, path_text};
use crate::name::DiskName;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::path::PathBuf;

/// A backup job, as it is asked for and as it is recognized again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Where QEMU serves the disks. Absolute.
    pub socket: PathBuf,
    /// Disks that the job serves, each with its scratch file.
    pub disks: Vec<BackupDisk>,
}

/// One disk of a backup job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupDisk {
    /// Also the name of its export.
    pub name: DiskName,
    /// What was overwritten since the begin. Absolute; libvirt makes it, as qcow2, and removes it.
    pub scratch: PathBuf,
}

/// What libvirt says of a domain's backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupJob {
    /// There is none; also of a domain that is off or gone.
    None,
    /// A backup job of this form is running. Another program may have begun it.
    Running(Backup),
    /// A libvirtd that died inside a begin has come back: it holds a job of which it knows nothing. It refuses every
    /// other job, and to abort it does nothing (libvirt 9.0): it goes when the domain is shut off and libvirtd
    /// restarted.
    Hollow,
}

impl Backup {
    /// Whether `running` is this very job: same socket, same disks on the same scratch files, in any order.
    pub fn is(&self, running: &Backup) -> bool {
        let all_in = |a: &Backup, b: &Backup| a.disks.iter().all(|d| b.disks.contains(d));
        self.socket == running.socket && all_in(self, running) && all_in(running, self)
    }

    /// Whether the two have a file in common.
    pub fn meets(&self, other: &Backup) -> bool {
        let scratch = |d: &BackupDisk| other.disks.iter().any(|o| o.scratch == d.scratch);
        self.socket == other.socket || self.disks.iter().any(scratch)
    }
}

/// The `<domainbackup>` that begins the job and leaves every other disk of `all` alone. Every disk is named, because
/// libvirt backs up those that are not.
pub fn backup_xml(backup: &Backup, all: &[DiskName]) -> Result<String> {
    let socket = escape(path_text(&backup.socket)?)?;
    let mut xml = format!("<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>");
    for name in all {
        match backup.disks.iter().find(|d| &d.name == name) {
            Some(d) => {
                let scratch = escape(path_text(&d.scratch)?)?;
                write!(
                    xml,
                    "<disk name='{name}' backup='yes' type='file' exportname='{name}'>\
                     <driver type='qcow2'/><scratch file='{scratch}'/></disk>"
                )
            }
            None => write!(xml, "<disk name='{name}' backup='no'/>"),
        }
        .expect("writing to a String cannot fail");
    }
    xml.push_str("</disks></domainbackup>");
    Ok(xml)
}

/// Reads the `<domainbackup>` of a running job. A job of another kind (push mode, over TCP) has no socket here, and so
/// is none of ours.
pub fn parse_backup(xml: &str) -> Result<Backup> {
    let doc = document(xml)?;
    let root = doc.root_element();
    if !root.has_tag_name("domainbackup") {
        return Err(Error::new(Kind::Corrupt, "not the XML of a backup: its element is not <domainbackup>"));
    }
    let socket = children(root, "server").next().and_then(|s| s.attribute("socket")).unwrap_or_default();
    let mut disks = Vec::new();
    for disk in children(root, "disks").flat_map(|d| children(d, "disk")) {
        let name = disk.attribute("name").filter(|_| disk.attribute("backup") != Some("no"));
        let scratch = children(disk, "scratch").next().and_then(|s| s.attribute("file").or_else(|| s.attribute("dev")));
        if let Some(name) = name {
            let scratch = scratch.unwrap_or_default().into();
            disks.push(BackupDisk { name: DiskName::new(name)?, scratch });
        }
    }
    Ok(Backup { socket: socket.into(), disks })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, scratch: &str) -> BackupDisk {
        BackupDisk { name: DiskName::new(name).unwrap(), scratch: scratch.into() }
    }

    fn ours() -> Backup {
        Backup { socket: "/s/b.sock".into(), disks: vec![disk("vda", "/pool/a.qcow2"), disk("vdb", "/po'ol/b.qcow2")] }
    }

    #[test]
    fn every_disk_is_named_and_what_is_not_ours_is_left_alone() {
        let all = ["vda", "sda", "vdb"].map(|n| DiskName::new(n).unwrap());
        let xml = backup_xml(&ours(), &all).unwrap();
        assert!(xml.contains("<disk name='sda' backup='no'/>"), "{xml}");
        assert!(xml.contains("<server transport='unix' socket='/s/b.sock'/>"), "{xml}");
        assert!(xml.contains("<scratch file='/po&apos;ol/b.qcow2'/>"), "{xml}");
        assert!(backup_xml(&Backup { socket: "relative".into(), ..ours() }, &all).is_err());
        assert!(parse_backup(&xml).unwrap().is(&ours()));
    }

    /// As libvirt 9.0 printed it.
    const RUNNING: &str = "<domainbackup mode='pull'>
  <server transport='unix' socket='/s/b.sock'/>
  <disks>
    <disk name='vdb' backup='yes' type='file' backupmode='full' exportname='vdb' index='4'>
      <driver type='qcow2'/>
      <scratch file=\"/po'ol/b.qcow2\"/>
    </disk>
    <disk name='vda' backup='yes' type='file' backupmode='full' exportname='vda' index='3'>
      <driver type='qcow2'/>
      <scratch file='/pool/a.qcow2'/>
    </disk>
    <disk name='vdc' backup='no'/>
  </disks>
</domainbackup>
";

    #[test]
    fn a_running_job_is_ours_only_if_all_of_it_is() {
        let running = parse_backup(RUNNING).unwrap();
        assert!(ours().is(&running) && running.is(&ours()));
        let mut other = running.clone();
        other.disks[0].scratch = "/elsewhere.qcow2".into();
        assert!(!ours().is(&other) && ours().meets(&other));
        let mut fewer = running.clone();
        fewer.disks.pop();
        assert!(!ours().is(&fewer) && !fewer.is(&ours()));
        let socket = Backup { socket: "/s/other.sock".into(), ..running };
        assert!(!ours().is(&socket) && ours().meets(&socket));
    }

    #[test]
    fn another_programs_job_is_read_and_has_nothing_of_ours() {
        let push = "<domainbackup mode='push'><disks><disk name='vda' backup='yes' type='file'>\
                    <target file='/backup/a.qcow2'/></disk></disks></domainbackup>";
        let running = parse_backup(push).unwrap();
        assert!(!ours().is(&running) && !ours().meets(&running), "{running:?}");
        let tcp = "<domainbackup mode='pull'><server transport='tcp' name='localhost' port='10809'/></domainbackup>";
        assert!(!ours().meets(&parse_backup(tcp).unwrap()));
        assert_eq!(parse_backup("<domain/>").unwrap_err().kind(), Kind::Corrupt);
        assert!(parse_backup("<domainbackup").is_err());
    }
}
