//! A hypervisor of a few lines, for tests: domains, chains and block jobs in memory, the overlays as files in a
//! directory. It answers as libvirt does, and misbehaves as it is told.

use crate::block::DiskSize;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::{
    BlockJob, BlockJobKind, Confinement, DiskKind, DiskView, DomainView, FreezeDisk, Hypervisor, PauseReason, Power,
};
use crate::image::{Chain, Format, Layer};
use crate::name::{DiskName, DomainName, DomainUuid};
use crate::replicate::settle::decide::Phase;
use crate::replicate::state::journal::tests::record;
use crate::replicate::state::record::{DiskRecord, Record};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

pub fn layer(path: impl Into<PathBuf>) -> Layer {
    Layer { path: path.into(), format: Format::Qcow2, block_device: false, data_file: None }
}

pub struct FakeHypervisor {
    pub world: Mutex<World>,
}

pub struct World {
    pub view: DomainView,
    /// So many pivots answer that the job is not ready.
    pub busy_pivots: u32,
    /// QEMU may not write to the base of an overlay.
    pub denied: bool,
    pub confinement: Confinement,
    /// After a resume the guest stops again.
    pub stops_again: bool,
    /// What was asked for, in order.
    pub asked: Vec<String>,
}

impl FakeHypervisor {
    pub fn running(uuid: &DomainUuid) -> FakeHypervisor {
        let view = DomainView {
            name: DomainName::new("db01").unwrap(),
            uuid: uuid.clone(),
            id: Some(3),
            power: Power::Running,
            paused: None,
            ended: crate::hypervisor::Ended::Unknown,
            persistent: true,
            managed_save: false,
            domain_job: None,
            disks: Vec::new(),
            record: None,
            nvram: None,
            tpm: None,
            guest_agent: false,
        };
        let world = World {
            view,
            busy_pivots: 0,
            denied: false,
            confinement: Confinement { libvirt: (9, 0, 0), apparmor: false },
            stops_again: false,
            asked: Vec::new(),
        };
        FakeHypervisor { world: Mutex::new(world) }
    }

    /// A domain that runs on one overlay for each disk, and the record that a driver left which died behind step 4e.
    pub fn on_overlays(dir: &Path, disks: &[&str]) -> (FakeHypervisor, Record) {
        let mut record = Record { phase: Phase::Frozen, instance: Some(3), disks: Vec::new(), ..record(Phase::Frozen) };
        let fake = FakeHypervisor::running(&record.uuid);
        for name in disks {
            let (base, overlay) = (dir.join(format!("{name}.qcow2")), dir.join(format!("{name}.vr-00000000.qcow2")));
            std::fs::write(&base, b"base").unwrap();
            std::fs::write(&overlay, vec![0; 1 << 20]).unwrap();
            let name = DiskName::new(*name).unwrap();
            record.disks.push(DiskRecord {
                name: name.clone(),
                base: layer(&base),
                overlay: overlay.clone(),
                size: DiskSize(1 << 20),
                base_stamp: None,
                overlay_id: None,
                complete_at: None,
                live_only: false,
                off_commit: false,
            });
            fake.world.lock().unwrap().view.disks.push(DiskView {
                name,
                kind: DiskKind::Image,
                live: Some(Chain(vec![layer(&overlay), layer(&base)])),
                inactive: Some(layer(&overlay)),
                size: Some(DiskSize(1 << 20)),
                job: None,
                read_only: false,
                shareable: false,
            });
        }
        (fake, record)
    }

    pub fn asked(&self, what: &str) -> usize {
        self.world.lock().unwrap().asked.iter().filter(|asked| asked.starts_with(what)).count()
    }

    /// An I/O error stops the guest.
    pub fn stop(&self, reason: PauseReason) {
        let mut world = self.world.lock().unwrap();
        (world.view.power, world.view.paused) = (Power::Paused, Some(reason));
    }

    fn act<T>(&self, what: String, act: impl FnOnce(&mut World) -> Result<T>) -> Result<T> {
        let mut world = self.world.lock().unwrap();
        world.asked.push(what);
        act(&mut world)
    }
}

impl World {
    pub fn disk(&mut self, name: &DiskName) -> &mut DiskView {
        self.view.disks.iter_mut().find(|disk| &disk.name == name).expect("a disk of the domain")
    }
}

impl Hypervisor for FakeHypervisor {
    fn find(&self, _: &str) -> Result<DomainView> {
        Ok(self.world.lock().unwrap().view.clone())
    }

    fn observe(&self, _: &DomainUuid) -> Result<DomainView> {
        Ok(self.world.lock().unwrap().view.clone())
    }

    fn observe_without_sizes(&self, uuid: &DomainUuid) -> Result<DomainView> {
        self.observe(uuid)
    }

    fn warm_up(&self, _: &DomainUuid) -> Result<()> {
        Ok(())
    }

    fn firmware(&self, _: &DomainUuid) -> Result<Option<PathBuf>> {
        Ok(None)
    }

    fn list(&self) -> Result<Vec<DomainView>> {
        Ok(vec![self.world.lock().unwrap().view.clone()])
    }

    fn freeze(&self, _: &DomainUuid, _: &[FreezeDisk]) -> Result<()> {
        unreachable!("what is settled was frozen before")
    }

    fn start_commit(&self, _: &DomainUuid, disk: &DiskName, top: &Path, base: &Path, active: bool) -> Result<()> {
        self.act(format!("commit {disk}"), |world| {
            if world.denied {
                // As libvirt 11.3 says it under AppArmor.
                let said = "libvirt: internal error: unable to execute QEMU command 'block-commit': Could not open \
                            '/pool/a.qcow2': Permission denied (code 1)";
                return Err(Error::new(Kind::Refused, "cannot start the commit").source(std::io::Error::other(said)));
            }
            let disk = world.disk(disk);
            let layers = &disk.live.as_ref().expect("it has a chain").0;
            let at = layers.iter().position(|layer| layer.path == top).expect("the layer is in the chain");
            assert!(layers[at + 1].path == base && active == (at == 0), "{layers:?}");
            disk.job = Some(BlockJob { kind: BlockJobKind::ActiveCommit, ready: true, done_bytes: 0, total_bytes: 0 });
            Ok(())
        })
    }

    fn wait_job(&self, _: &DomainUuid, disk: &DiskName, _: Duration) -> Result<Option<BlockJob>> {
        Ok(self.world.lock().unwrap().disk(disk).job)
    }

    fn pivot(&self, _: &DomainUuid, disk: &DiskName) -> Result<()> {
        self.act(format!("pivot {disk}"), |world| {
            if world.busy_pivots > 0 {
                world.busy_pivots -= 1;
                return Err(Error::new(Kind::Busy, "the job is not ready"));
            }
            let disk = world.disk(disk);
            disk.live.as_mut().expect("it has a chain").0.remove(0);
            (disk.inactive, disk.job) = (disk.live.as_ref().map(|chain| chain.top().clone()), None);
            Ok(())
        })
    }

    fn cancel_job(&self, _: &DomainUuid, disk: &DiskName) -> Result<()> {
        self.act(format!("cancel {disk}"), |world| {
            world.disk(disk).job = None;
            Ok(())
        })
    }

    fn pause(&self, _: &DomainUuid) -> Result<()> {
        self.act("pause".into(), |world| {
            if world.view.power == Power::Running {
                (world.view.power, world.view.paused) = (Power::Paused, Some(PauseReason::Asked));
            }
            Ok(())
        })
    }

    fn resume(&self, _: &DomainUuid) -> Result<()> {
        self.act("resume".into(), |world| {
            (world.view.power, world.view.paused) = match world.stops_again {
                true => (Power::Paused, Some(PauseReason::IoError)),
                false => (Power::Running, None),
            };
            Ok(())
        })
    }

    fn set_record(&self, _: &DomainUuid, record: Option<&str>) -> Result<()> {
        self.world.lock().unwrap().view.record = record.map(str::to_owned);
        Ok(())
    }

    fn redefine(&self, _: &DomainUuid, disks: &[(DiskName, Layer)]) -> Result<()> {
        self.act("redefine".into(), |world| {
            for (name, layer) in disks {
                world.disk(name).inactive = Some(layer.clone());
            }
            Ok(())
        })
    }

    fn close_unused(&self, _: &DomainUuid, _: &Path) -> Result<()> {
        Ok(())
    }

    fn confinement(&self, _: &DomainUuid) -> Result<Confinement> {
        Ok(self.world.lock().unwrap().confinement)
    }

    fn definition(&self, _: &DomainUuid, _: bool, _: bool) -> Result<String> {
        unreachable!("settling reads no definition")
    }
}
