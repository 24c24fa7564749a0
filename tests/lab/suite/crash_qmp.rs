//! QEMU's own monitor, for what libvirt would not do, or while it is dead.

use crate::crash_bench::{PATIENCE, wait_for};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to it.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    pub qemu_pid: String,
}

impl Qmp {
    pub fn connect(path: &Path, qemu_pid: String) -> Qmp {
        let stream = wait_for("QEMU's monitor", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut qmp = Qmp { stream: BufReader::new(stream), qemu_pid };
        qmp.line();
        qmp.ask("qmp_capabilities", json!({}));
        qmp
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("QMP: {e}: {line:?}"))
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let question = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{question}\n").as_bytes()).unwrap();
        loop {
            let answer = self.line();
            assert!(answer.get("error").is_none(), "QMP {command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }

    pub fn running(&mut self) -> bool {
        self.ask("query-status", json!({}))["running"] == true
    }

    /// Puts an overlay that exists already above the image the guest writes to, as libvirt's snapshot would.
    pub fn freeze_onto(&mut self, base: &str, overlay: &str) {
        let nodes = self.ask("query-named-block-nodes", json!({ "flat": true }));
        let nodes = nodes.as_array().unwrap();
        let formats = ["qcow2", "raw"];
        let of_base = |n: &&Value| n["file"] == base && formats.contains(&n["drv"].as_str().unwrap());
        let node = nodes.iter().find(of_base).expect("the base is open")["node-name"].clone();
        let name = format!("lost-{}", nodes.len());
        let file = json!({ "driver": "file", "filename": overlay, "node-name": format!("{name}-storage") });
        let options = json!({ "driver": "qcow2", "node-name": name, "file": file, "backing": null });
        self.ask("blockdev-add", options);
        self.ask("blockdev-snapshot", json!({ "node": node, "overlay": name }));
    }

    /// Opens an overlay's file, and nothing above it, under the name that libvirt gives to its node of this number.
    pub fn open_as_libvirt(&mut self, file: &str, number: u64) {
        let name = format!("libvirt-{number}-storage");
        self.ask("blockdev-add", json!({ "driver": "file", "filename": file, "node-name": name, "discard": "unmap" }));
    }

    /// Ends every block job as libvirt's pivot would, and waits until QEMU has pivoted.
    pub fn pivot_all(&mut self) {
        let jobs = self.ask("query-block-jobs", json!({}));
        assert!(jobs.as_array().is_some_and(|j| !j.is_empty()), "there is nothing to pivot");
        for job in jobs.as_array().unwrap() {
            assert_eq!(job["ready"], true, "{job}");
            self.ask("job-complete", json!({ "id": job["device"] }));
        }
        wait_for("QEMU has pivoted", || {
            let jobs = self.ask("query-jobs", json!({}));
            jobs.as_array().unwrap().iter().all(|j| j["status"] == "concluded").then_some(())
        });
    }
}
