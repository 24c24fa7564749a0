//! A chain as QEMU's tools take it: the `json:` pseudo-protocol, every layer and every child explicit.
//!
//! Pure. A description never leaves a choice to an image's header: each layer has its driver, its backing image (or
//! none), its data file (or none, which the caller has checked against the header). JSON needs no escaping of commas,
//! colons or blanks in paths.

use super::{Format, Layer};
use crate::error::{Error, Kind, Result};
use crate::image::foreign::format::Foreign;
use serde_json::{Value, json};
use std::path::Path;

/// How the described images are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Under QEMU's shared locks: nobody starts to write to a qcow2 image meanwhile. (Of a raw one QEMU's tools do not
    /// keep writers out.)
    Read,
    /// Without locks: somebody may.
    ReadUnlocked,
    Write,
}

/// The description of `layers`, uppermost first, as an argument that stands for a file name.
pub(super) fn describe(layers: &[Layer], access: Access) -> Result<String> {
    let mut below = Value::Null;
    for (depth, layer) in layers.iter().enumerate().rev() {
        let mut node =
            json!({ "driver": layer.format.as_str(), "file": file(&layer.path, layer.block_device, access)? });
        match layer.format {
            Format::Raw if !below.is_null() => {
                return Err(Error::new(Kind::Usage, "a raw image has no backing image").path(&layer.path));
            }
            Format::Raw => {}
            Format::Qcow2 => node["backing"] = below,
        }
        if let Some(data_file) = &layer.data_file {
            node["data-file"] = file(data_file, false, access)?;
        }
        if depth == 0 && access != Access::Write {
            node["read-only"] = true.into();
            if access == Access::ReadUnlocked {
                node["force-share"] = true.into();
            }
        }
        below = node;
    }
    Ok(format!("json:{below}"))
}

/// The description of an image in a format of others, alone: a parent that it names is not opened.
pub(super) fn describe_foreign(layer: &Layer, driver: Foreign, access: Access) -> Result<String> {
    let file = file(&layer.path, layer.block_device, access)?;
    let mut node =
        json!({ "driver": driver.as_str(), "file": file, "backing": null, "read-only": access != Access::Write });
    if access == Access::ReadUnlocked {
        node["force-share"] = true.into();
    }
    Ok(format!("json:{node}"))
}

/// The description of one layer for questions about its metadata: nothing its header names is opened. Guest data of an
/// image with an external data file reads as nonsense.
pub(super) fn describe_alone(layer: &Layer, has_data_file: bool, access: Access) -> Result<String> {
    let alone = Layer { data_file: None, ..layer.clone() };
    let text = describe(std::slice::from_ref(&alone), access)?;
    if !has_data_file {
        return Ok(text);
    }
    let mut node: Value = serde_json::from_str(&text["json:".len()..]).expect("we wrote it");
    node["data-file"] = json!({ "driver": "null-co" });
    Ok(format!("json:{node}"))
}

fn file(path: &Path, block_device: bool, access: Access) -> Result<Value> {
    // Relative names would depend on the directory in which the tool runs, which is ours.
    let absolute = std::path::absolute(path).map_err(|e| Error::io("cannot make the path absolute", path, e))?;
    let name =
        absolute.to_str().ok_or_else(|| Error::new(Kind::Usage, "QEMU takes only paths that are UTF-8").path(path))?;
    let mut node = json!({ "driver": if block_device { "host_device" } else { "file" }, "filename": name });
    if access == Access::ReadUnlocked {
        node["locking"] = "off".into();
    }
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(path: &str, format: Format) -> Layer {
        Layer { path: path.into(), format, block_device: false, data_file: None }
    }

    fn parsed(text: &str) -> Value {
        serde_json::from_str(text.strip_prefix("json:").unwrap()).unwrap()
    }

    #[test]
    fn every_layer_is_explicit_and_the_bottom_has_no_backing() {
        let mut top = layer("/a,b=c \"d\".qcow2", Format::Qcow2);
        top.data_file = Some("/d.raw".into());
        let chain = [top, layer("/m.qcow2", Format::Qcow2)];
        let got = parsed(&describe(&chain, Access::Read).unwrap());
        assert_eq!(
            got,
            json!({
                "driver": "qcow2", "read-only": true,
                "file": { "driver": "file", "filename": "/a,b=c \"d\".qcow2" },
                "data-file": { "driver": "file", "filename": "/d.raw" },
                "backing": {
                    "driver": "qcow2", "backing": null,
                    "file": { "driver": "file", "filename": "/m.qcow2" },
                },
            })
        );
    }

    #[test]
    fn without_locks_means_no_file_of_the_chain_is_locked() {
        let mut device = layer("/dev/vg/x", Format::Raw);
        device.block_device = true;
        let got = parsed(&describe(&[layer("/o", Format::Qcow2), device], Access::ReadUnlocked).unwrap());
        assert_eq!(got["force-share"], true);
        assert_eq!(got["file"]["locking"], "off");
        assert_eq!(
            got["backing"]["file"],
            json!({ "driver": "host_device", "filename": "/dev/vg/x", "locking": "off" })
        );
    }

    #[test]
    fn what_qemu_could_not_be_told_is_refused() {
        use std::os::unix::ffi::OsStrExt;
        let mut odd = layer("", Format::Raw);
        odd.path = std::ffi::OsStr::from_bytes(b"/a\xff").into();
        assert_eq!(describe(&[odd], Access::Read).unwrap_err().kind(), Kind::Usage);
        let raw_on_raw = [layer("/a", Format::Raw), layer("/b", Format::Raw)];
        assert_eq!(describe(&raw_on_raw, Access::Read).unwrap_err().kind(), Kind::Usage);
    }
}
