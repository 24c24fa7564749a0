//! A point of one real image, held without a store: what drills and failovers are tested on.

use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::engine::stats::DiskStats;
use crate::error::Result;
use crate::image::{Chain, Format, Layer};
use crate::name::{DiskName, Generation, PointId, RunId};
use crate::replica::upkeep::Held;
use crate::replica::{Attachment, Consistency, PointDisk, PointView};
use jiff::Timestamp;
use std::path::Path;

pub struct Point {
    pub view: PointView,
    definition: Option<&'static str>,
    tpm: Option<&'static [u8]>,
}

impl Point {
    /// With an empty image `vda.qcow2` in `dir`, made if it is not there.
    pub fn in_dir(dir: &Path, seq: u64, definition: Option<&'static str>) -> Point {
        let (image, size) = (dir.join("vda.qcow2"), DiskSize(1 << 20));
        if !image.exists() {
            drop(crate::image::qcow2::create(&image, size, None).unwrap());
        }
        let (run, stats) = (RunId::from_bits(7), DiskStats::default());
        let disks = vec![PointDisk { name: DiskName::new("vda").unwrap(), image, size, root: Digest::ZERO, stats }];
        let view = PointView {
            id: PointId::from_parts(seq, &run),
            generation: Generation(1),
            frozen_at: Timestamp::UNIX_EPOCH,
            sealed_at: Timestamp::UNIX_EPOCH,
            consistency: Consistency::Crash,
            consistency_reason: None,
            autostart: None,
            tpm_programs: None,
            run,
            disks,
            attachments: definition.map(|_| Attachment::InactiveXml).into_iter().collect(),
            left_out: Default::default(),
        };
        Point { view, definition, tpm: None }
    }

    /// The state of a TPM comes with it.
    pub fn with_tpm(mut self, state: &'static [u8]) -> Point {
        self.view.attachments.push(Attachment::Tpm);
        Point { tpm: Some(state), ..self }
    }
}

impl Held for Point {
    fn point(&self) -> &PointView {
        &self.view
    }

    fn images(&self, _: &DiskName) -> Result<Chain> {
        let path = self.view.disks[0].image.clone();
        Ok(Chain(vec![Layer { path, format: Format::Qcow2, block_device: false, data_file: None }]))
    }

    fn attachment(&self, name: Attachment) -> Result<Option<Vec<u8>>> {
        let content = match name {
            Attachment::InactiveXml => self.definition.map(str::as_bytes),
            Attachment::Tpm => self.tpm,
            _ => None,
        };
        Ok(content.map(<[u8]>::to_vec))
    }

    fn renew(&mut self) -> Result<()> {
        Ok(())
    }

    fn release(self: Box<Self>) {}
}
