//! Dirty bitmaps as values: the QMP commands, typed by `qapi`, and the few facts of their replies that are believed.
//!
//! Pure: text in, values out. Commands are built from `qapi`'s types; replies are read with structs of our own,
//! tolerant of what other versions of QEMU add, because `qapi`'s fail on any unknown value.

use crate::error::{Error, Kind, Result};
use crate::image::{Format, Layer};
use qapi::qmp::{
    BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapAddWrapper, BlockDirtyBitmapMerge,
    BlockDirtyBitmapMergeWrapper, BlockDirtyBitmapOrStr, BlockExportOptions, BlockExportOptionsBase,
    BlockExportOptionsNbd, BlockExportOptionsNbdBase, SocketAddressLegacy, TransactionAction, UnixSocketAddress,
    UnixSocketAddressWrapper,
};
use qapi::{Command, Execute, qmp};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// Bytes per bit of our bitmaps: a block.
pub const GRANULARITY: u32 = crate::block::BLOCK_LEN as u32;

/// One bitmap of one node, as QEMU reports it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapInfo {
    #[serde(default)]
    pub name: String,
    /// Bytes marked as changed, in whole granules.
    #[serde(rename = "count", default)]
    pub dirty_bytes: u64,
    #[serde(rename = "granularity", default)]
    pub granularity_bytes: u64,
    #[serde(default)]
    pub recording: bool,
    #[serde(default)]
    pub persistent: bool,
    #[serde(default)]
    pub inconsistent: bool,
    #[serde(default)]
    pub busy: bool,
}

impl From<BitmapInfo> for super::BitmapView {
    fn from(i: BitmapInfo) -> Self {
        Self {
            name: i.name,
            dirty_bytes: i.dirty_bytes,
            granularity_bytes: i.granularity_bytes,
            recording: i.recording,
            persistent: i.persistent,
            inconsistent: i.inconsistent,
            busy: i.busy,
        }
    }
}

/// A node of QEMU's block graph, as far as it is needed to find the one behind a layer.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Node {
    #[serde(default)]
    pub node_name: Option<String>,
    #[serde(rename = "drv", default)]
    pub driver: String,
    #[serde(default)]
    pub file: String,
    #[serde(default)]
    pub dirty_bitmaps: Vec<BitmapInfo>,
}

/// The node that interprets `layer`: its format node, or, where libvirt leaves a raw format out, its protocol node.
pub fn node_of<'a>(nodes: &'a [Node], layer: &Layer) -> Option<&'a Node> {
    let path = layer.path.to_str()?;
    let of_driver = |drivers: &[&str]| {
        nodes.iter().find(|n| {
            n.node_name.is_some() && drivers.contains(&n.driver.as_str()) && file_of(&n.file).as_deref() == Some(path)
        })
    };
    match layer.format {
        Format::Qcow2 => of_driver(&["qcow2"]),
        Format::Raw => of_driver(&["raw"]).or_else(|| of_driver(&["file", "host_device"])),
    }
}

/// The path in QEMU's name of a node's file. A node whose options differ from what its header says (a backing image
/// that was changed by a commit) is named by a `json:` description of itself instead.
fn file_of(name: &str) -> Option<Cow<'_, str>> {
    let Some(description) = name.strip_prefix("json:") else { return Some(name.into()) };
    let node: serde_json::Value = serde_json::from_str(description).ok()?;
    let path = node.get("filename").or_else(|| node.get("file.filename")).or_else(|| node.get("file")?.get("filename"));
    path?.as_str().map(|p| p.to_owned().into())
}

/// Names of the nodes that have this file open, those that interpret it before those that only read it: the order in
/// which they can be closed.
pub fn nodes_on(nodes: &[Node], file: &Path) -> Vec<String> {
    let on_file = |n: &&Node| file.to_str().is_some_and(|path| file_of(&n.file).as_deref() == Some(path));
    let (protocol, format): (Vec<&Node>, Vec<&Node>) =
        nodes.iter().filter(on_file).partition(|n| ["file", "host_device"].contains(&n.driver.as_str()));
    format.into_iter().chain(protocol).filter_map(|n| n.node_name.clone()).collect()
}

/// Closes a node; QEMU refuses if anything uses it.
pub fn remove_node(node: &str) -> String {
    serialise(qmp::blockdev_del { node_name: node.to_owned() })
}

/// Has a node written out, by way of the human monitor: its answer is text.
pub fn flush(node: &str) -> String {
    serialise(qmp::human_monitor_command { command_line: format!("qemu-io {node} flush"), cpu_index: None })
}

pub fn query_chardevs() -> String {
    serialise(qmp::query_chardev {})
}

/// The directory of the monitor's socket, which is the domain's private one: libvirt asks QEMU through it, so QEMU
/// knows where it is. `None`: this QEMU does not say.
pub fn private_dir(chardevs: &str) -> Result<Option<PathBuf>> {
    let all: Vec<Chardev> = reply(chardevs)?;
    let monitor = all.into_iter().find(|c| c.label == "charmonitor");
    let socket = monitor.as_ref().and_then(|c| c.filename.strip_prefix("disconnected:").or(Some(&c.filename)));
    let path =
        socket.and_then(|name| name.strip_prefix("unix:")).map(|name| name.split(",server").next().unwrap_or(name));
    Ok(path.map(Path::new).filter(|path| path.is_absolute()).and_then(Path::parent).map(Path::to_owned))
}

#[derive(Debug, Deserialize)]
struct Chardev {
    #[serde(default)]
    label: String,
    #[serde(default)]
    filename: String,
}

pub fn query_nodes() -> String {
    serialise(qmp::query_named_block_nodes { flat: Some(true) })
}

/// Adds a bitmap to each node, all or none.
pub fn add(nodes: &[(String, bool)], name: &str) -> String {
    let actions = nodes
        .iter()
        .map(|(node, persistent)| {
            TransactionAction::block_dirty_bitmap_add(BlockDirtyBitmapAddWrapper {
                data: BlockDirtyBitmapAdd {
                    node: node.clone(),
                    name: name.to_owned(),
                    granularity: Some(GRANULARITY),
                    persistent: Some(*persistent),
                    disabled: None,
                },
            })
        })
        .collect();
    serialise(qmp::transaction { properties: None, actions })
}

pub fn remove(node: &str, name: &str) -> String {
    serialise(qmp::block_dirty_bitmap_remove(BlockDirtyBitmap { node: node.to_owned(), name: name.to_owned() }))
}

/// Copies a bitmap's marks as they are now into a new one of the same node, which records nothing and lives no longer
/// than its QEMU. QEMU exports none that records from a node that is written to.
pub fn copy(node: &str, from: &str, to: &str) -> String {
    let new = BlockDirtyBitmapAdd {
        node: node.to_owned(),
        name: to.to_owned(),
        granularity: Some(GRANULARITY),
        persistent: Some(false),
        disabled: Some(true),
    };
    let marks = BlockDirtyBitmapMerge {
        node: node.to_owned(),
        target: to.to_owned(),
        bitmaps: vec![BlockDirtyBitmapOrStr::local(from.to_owned())],
    };
    let actions = vec![
        TransactionAction::block_dirty_bitmap_add(BlockDirtyBitmapAddWrapper { data: new }),
        TransactionAction::block_dirty_bitmap_merge(BlockDirtyBitmapMergeWrapper { data: marks }),
    ];
    serialise(qmp::transaction { properties: None, actions })
}

/// Starts QEMU's own NBD server on a unix socket.
pub fn start_server(socket: &Path) -> Result<String> {
    let path = socket.to_str().ok_or_else(|| Error::new(Kind::Usage, "the path is not UTF-8").path(socket))?;
    let data = UnixSocketAddress { path: path.to_owned(), abstract_: None, tight: None };
    Ok(serialise(qmp::nbd_server_start {
        addr: SocketAddressLegacy::unix(UnixSocketAddressWrapper { data }),
        tls_authz: None,
        tls_creds: None,
        max_connections: None,
    }))
}

pub fn stop_server() -> String {
    serialise(qmp::nbd_server_stop {})
}

/// Offers a node for reading, with one of its bitmaps as a metadata context.
pub fn export(id: &str, node: &str, bitmap: &str) -> String {
    let base = BlockExportOptionsBase {
        id: id.to_owned(),
        node_name: node.to_owned(),
        writable: Some(false),
        writethrough: None,
        fixed_iothread: None,
        iothread: None,
    };
    let nbd = BlockExportOptionsNbd {
        base: BlockExportOptionsNbdBase { name: Some(id.to_owned()), description: None },
        allocation_depth: None,
        bitmaps: Some(vec![BlockDirtyBitmapOrStr::local(bitmap.to_owned())]),
    };
    serialise(qmp::block_export_add(BlockExportOptions::nbd { base, nbd }))
}

/// Takes an export away; whoever is connected to it is cut off.
pub fn remove_export(id: &str) -> String {
    serialise(qmp::block_export_del { id: id.to_owned(), mode: Some(qmp::BlockExportRemoveMode::hard) })
}

fn serialise<C: Command>(command: C) -> String {
    serde_json::to_string(&Execute::<C, u32>::with_command(command)).expect("a QMP command is plain data")
}

/// Reads a reply. libvirt hands QMP errors through as text: they become `Refused` here.
pub fn reply<T: DeserializeOwned>(text: &str) -> Result<T> {
    #[derive(Deserialize)]
    struct Envelope<'a> {
        #[serde(rename = "return", borrow)]
        value: Option<&'a RawValue>,
        error: Option<QmpError>,
    }
    #[derive(Deserialize)]
    struct QmpError {
        #[serde(default)]
        desc: String,
    }
    let odd = |e| Error::new(Kind::Protocol, "QEMU's reply cannot be understood").source(e);
    let envelope: Envelope = serde_json::from_str(text).map_err(odd)?;
    match (envelope.value, envelope.error) {
        (_, Some(e)) => Err(Error::new(Kind::Refused, format!("QEMU refused: {}", e.desc))),
        (Some(value), None) => serde_json::from_str(value.get()).map_err(odd),
        (None, None) => Err(Error::new(Kind::Protocol, "QEMU's reply has neither a value nor an error")),
    }
}

/// A reply whose value does not matter.
pub fn done(text: &str) -> Result<()> {
    reply::<serde_json::Value>(text).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 7.2 answers under libvirt 9.0, of the system and of a session.
    #[test]
    fn the_monitors_socket_says_where_the_private_directory_is() {
        let answer = |monitor: &str| {
            format!(
                "{{\"return\":[{{\"frontend-open\":true,\"filename\":\"pty:/dev/pts/3\",\"label\":\"charserial0\"}},\
                 {{\"frontend-open\":true,\"filename\":\"{monitor}\",\"label\":\"charmonitor\"}}],\"id\":\"libvirt-20\"}}"
            )
        };
        let dir = |monitor: &str| private_dir(&answer(monitor)).unwrap();
        let system = "/var/lib/libvirt/qemu/domain-1-web";
        assert_eq!(dir(&format!("unix:{system}/monitor.sock,server=on")), Some(system.into()));
        assert_eq!(dir(&format!("disconnected:unix:{system}/monitor.sock,server")), Some(system.into()));
        let session = "/home/op/.config/libvirt/qemu/lib/domain-1-web";
        assert_eq!(dir(&format!("unix:{session}/monitor.sock,server=on")), Some(session.into()));
        assert_eq!(dir("fd:23"), None);
        assert_eq!(private_dir("{\"return\":[],\"id\":\"libvirt-20\"}").unwrap(), None);
    }

    const NODES: &str = r#"{"return":[
        {"node-name":"libvirt-2-format","drv":"qcow2","file":"/pool/a.qcow2","new-in-qemu-99":{"x":1},
         "dirty-bitmaps":[{"name":"vr-1-2","recording":true,"persistent":true,"busy":false,"granularity":65536,"count":131072},
                          {"name":"theirs","recording":true,"persistent":true,"inconsistent":true,"granularity":65536,"count":0}]},
        {"node-name":"libvirt-2-storage","drv":"file","file":"/pool/a.qcow2"},
        {"node-name":"libvirt-1-format","drv":"raw","file":"/dev/vg/b"},
        {"node-name":"libvirt-1-storage","drv":"host_device","file":"/dev/vg/b"},
        {"node-name":"libvirt-3-storage","drv":"file","file":"/pool/c.raw"}],"id":"libvirt-9"}"#;

    fn layer(path: &str, format: Format) -> Layer {
        Layer { path: path.into(), format, block_device: false, data_file: None }
    }

    #[test]
    fn the_node_behind_a_layer_is_its_format_node_where_there_is_one() {
        let nodes: Vec<Node> = reply(NODES).unwrap();
        let name = |path, format| node_of(&nodes, &layer(path, format)).and_then(|n| n.node_name.as_deref());
        assert_eq!(name("/pool/a.qcow2", Format::Qcow2), Some("libvirt-2-format"));
        assert_eq!(name("/dev/vg/b", Format::Raw), Some("libvirt-1-format"));
        assert_eq!(name("/pool/c.raw", Format::Raw), Some("libvirt-3-storage"));
        assert_eq!(name("/pool/c.raw", Format::Qcow2), None);
        assert_eq!(nodes[0].dirty_bitmaps[0].dirty_bytes, 131072);
        assert!(nodes[0].dirty_bitmaps[1].inconsistent);
    }

    /// The commands as QEMU 7.2 took them.
    #[test]
    fn a_bitmap_is_copied_in_one_transaction_and_its_export_taken_away() {
        let sent: serde_json::Value = serde_json::from_str(&copy("n", "vr-1", "vr-1-still")).unwrap();
        assert_eq!(sent["execute"], "transaction");
        let (add, merge) = (&sent["arguments"]["actions"][0], &sent["arguments"]["actions"][1]);
        assert_eq!((&add["type"], &add["data"]["disabled"]), (&"block-dirty-bitmap-add".into(), &true.into()));
        assert_eq!((&add["data"]["name"], &add["data"]["persistent"]), (&"vr-1-still".into(), &false.into()));
        assert_eq!(
            (&merge["type"], &merge["data"]["target"]),
            (&"block-dirty-bitmap-merge".into(), &"vr-1-still".into())
        );
        assert_eq!(merge["data"]["bitmaps"][0], "vr-1");
        let gone = r#"{"execute":"block-export-del","arguments":{"mode":"hard","id":"e"}}"#;
        assert_eq!(remove_export("e"), gone);
    }

    #[test]
    fn nodes_are_closed_from_the_top() {
        let reply_text = r#"{"return":[
            {"node-name":"libvirt-9-storage","drv":"file","file":"/pool/o.qcow2"},
            {"node-name":"libvirt-9-format","drv":"qcow2",
             "file":"json:{\"backing\": null, \"driver\": \"qcow2\", \"file\": {\"driver\": \"file\", \"filename\": \"/pool/o.qcow2\"}}"},
            {"node-name":"libvirt-8-format","drv":"qcow2","file":"/pool/other.qcow2"}]}"#;
        let nodes: Vec<Node> = reply(reply_text).unwrap();
        assert_eq!(nodes_on(&nodes, Path::new("/pool/o.qcow2")), ["libvirt-9-format", "libvirt-9-storage"]);
        assert_eq!(nodes_on(&nodes, Path::new("/pool/none.qcow2")), [""; 0]);
        assert_eq!(remove_node("n"), r#"{"execute":"blockdev-del","arguments":{"node-name":"n"}}"#);
    }

    #[test]
    fn a_node_whose_backing_image_was_changed_describes_itself() {
        let described = r#"{"return":[{"node-name":"libvirt-1-format","drv":"qcow2",
            "file":"json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"/pool/a.qcow2\"},\"backing\":{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/pool/gold.raw\"}}}"},
            {"node-name":"odd","drv":"qcow2","file":"json:{broken"}]}"#;
        let nodes: Vec<Node> = reply(described).unwrap();
        assert!(node_of(&nodes, &layer("/pool/a.qcow2", Format::Qcow2)).is_some());
        assert!(node_of(&nodes, &layer("/pool/gold.raw", Format::Raw)).is_none());
    }

    #[test]
    fn refusals_are_errors_although_libvirt_calls_them_replies() {
        let e = done(r#"{"error":{"class":"GenericError","desc":"Bitmap already exists: x"},"id":"libvirt-1"}"#)
            .unwrap_err();
        assert_eq!(e.kind(), Kind::Refused);
        assert!(e.what().contains("Bitmap already exists"), "{e}");
        assert!(done(r#"{"return":{},"id":"libvirt-1"}"#).is_ok());
        assert_eq!(done("{}").unwrap_err().kind(), Kind::Protocol);
        assert_eq!(done("what").unwrap_err().kind(), Kind::Protocol);
    }

    #[test]
    fn commands_are_what_qemu_reads() {
        let value = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
        let bitmap = serde_json::json!({"granularity": 65536, "name": "vr-a-b", "node": "n1", "persistent": true});
        let actions = serde_json::json!([{"type": "block-dirty-bitmap-add", "data": bitmap}]);
        let expected = serde_json::json!({"execute": "transaction", "arguments": {"actions": actions}});
        assert_eq!(value(add(&[("n1".into(), true)], "vr-a-b")), expected);
        let arguments = serde_json::json!({"name": "vr-a-b", "node": "n1"});
        let expected = serde_json::json!({"execute": "block-dirty-bitmap-remove", "arguments": arguments});
        assert_eq!(value(remove("n1", "vr-a-b")), expected);
        assert!(export("e", "n1", "b").contains(r#""bitmaps":["b"]"#));
    }
}
