//! Images to be copied: programs, noise, written zeros and holes, the same bytes in every run.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: u64 = 1 << 20;

pub struct Image {
    pub size: u64,
    pub data: u64,
    pub changed: u64,
    /// Where the data lies.
    extents: Vec<(u64, u64)>,
}

/// Numbers and bytes that look random.
pub struct Noise(blake3::OutputReader);

impl Noise {
    pub fn new(seed: &str) -> Noise {
        Noise(blake3::Hasher::new().update(seed.as_bytes()).finalize_xof())
    }

    pub fn below(&mut self, n: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes) % n.max(1)
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill(&mut bytes);
        bytes
    }
}

/// Libraries of this machine, one after the other: what compresses as disks do.
fn programs(max: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let mut files: Vec<_> = fs::read_dir("/usr/lib/x86_64-linux-gnu")
        .map(|dir| dir.filter_map(|e| Some(e.ok()?.path())).collect())
        .unwrap_or_default();
    files.sort();
    for file in files {
        if all.len() < max && file.is_file() {
            all.extend(fs::read(file).unwrap_or_default());
        }
    }
    all.resize(max, b'x');
    all
}

/// A new image of this size with about so much data: two thirds programs, the rest noise and written zeros, in extents
/// of 64 KiB to 16 MiB with holes between.
pub fn mixed(path: &Path, size: u64, data: u64) -> Image {
    let _ = fs::remove_file(path);
    let file = File::create(path).expect("create the image");
    file.set_len(size).expect("size the image");
    let (mut noise, text) = (Noise::new("layout"), programs(256 << 20));
    let mut image = Image { size, data: 0, changed: 0, extents: Vec::new() };
    let mut at = 0;
    while image.data < data && at < size {
        let len = (65536u64 << noise.below(9)).min(size - at);
        let bytes = match noise.below(12) {
            0..8 => {
                let from = noise.below((text.len() as u64).saturating_sub(len)) as usize;
                text[from..from + len as usize].to_vec()
            }
            8..11 => noise.bytes(len as usize),
            _ => vec![0; len as usize],
        };
        file.write_all_at(&bytes, at).expect("write the image");
        image.extents.push((at, len));
        image.data += len;
        // As much hole on average as leaves room for all of the data.
        at += len + noise.below(2 * (len * (size - data) / data.max(1)).max(1)) / 65536 * 65536;
    }
    file.sync_all().expect("sync the image");
    image
}

/// Overwrites about 2 % of the data: pages of 4 KiB in 2,000 windows of 256 KiB, and one region, half of it noise and
/// half text.
pub fn change(path: &Path, image: &mut Image) {
    let file = File::options().write(true).open(path).expect("open the image");
    let (mut noise, text) = (Noise::new("changes"), programs(64 << 20));
    let mut pages = std::collections::BTreeSet::new();
    let mut page = |noise: &mut Noise, at: u64| {
        let bytes = match noise.below(2) {
            0 => noise.bytes(4096),
            _ => {
                let from = noise.below(text.len() as u64 - 4096) as usize;
                text[from..from + 4096].to_vec()
            }
        };
        file.write_all_at(&bytes, at).expect("write the image");
        pages.insert(at);
    };
    for _ in 0..2000 {
        let (start, len) = image.extents[noise.below(image.extents.len() as u64) as usize];
        let window = start + noise.below(len.saturating_sub(262_144).max(1)) / 4096 * 4096;
        for _ in 0..8 {
            let at = window + noise.below(len.min(262_144) / 4096) * 4096;
            page(&mut noise, at);
        }
    }
    let (start, len) = *image.extents.iter().max_by_key(|e| e.1).expect("there is data");
    for n in 0..(len.min(64 * MIB) / 4096) {
        page(&mut noise, start + n * 4096);
    }
    file.sync_all().expect("sync the image");
    image.changed = pages.len() as u64 * 4096;
}
