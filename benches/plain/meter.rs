//! What a command costs on each of the two hosts: time, CPU, memory, bytes on the wire and bytes read.
//!
//! Every process of an end is in a control group of its own, those that sshd starts included. CPU is the group's;
//! memory and bytes read are sampled, so that what a process does in its last milliseconds is missed, and bytes read
//! include what came through pipes and sockets.

use crate::support::{Host, Job};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup/cpuacct";
const TICK: Duration = Duration::from_millis(10);

#[derive(Debug, Clone, Copy, Default)]
pub struct End {
    /// Seconds of CPU, user and system.
    pub cpu: f64,
    /// Peak of the sum of all processes' resident memory, in bytes.
    pub rss: u64,
    pub read: u64,
}

#[derive(Debug, Clone)]
pub struct Figures {
    /// Seconds.
    pub wall: f64,
    /// Seconds until what was written is on the disk: ours is by then, and a peer that does not say so leaves it to the
    /// kernel.
    pub durable: f64,
    /// Bytes that left host a and came to it.
    pub wire: u64,
    pub ends: [End; 2],
}

/// Two control groups, gone with the value.
pub struct Meter([PathBuf; 2]);

impl Meter {
    pub fn new() -> Meter {
        let groups = ["a", "b"].map(|end| PathBuf::from(ROOT).join(format!("vr-bench-{}-{end}", std::process::id())));
        groups.iter().for_each(|group| fs::create_dir(group).expect("make a control group (v1, cpuacct)"));
        // The hosts are process namespaces: all that runs in host b, sshd above all, goes into its group with all it
        // will start.
        let init = std::env::var("VR_LAB_B_PID").expect("the lab says who is host b's first process");
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let of_b = namespace(&init).expect("host b has a process namespace");
        for entry in fs::read_dir("/proc").expect("list the processes").flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if namespace(&pid).as_ref() == Some(&of_b) {
                // Who has ended meanwhile does not matter.
                let _ = fs::write(groups[1].join("cgroup.procs"), pid);
            }
        }
        Meter(groups)
    }

    fn command(&self, host: Host, words: &[&str]) -> Command {
        let group = match host {
            Host::A => &self.0[0],
            Host::B => &self.0[1],
        };
        let inner = host.command(words);
        let mut command = Command::new("bash");
        command.args(["-c", "echo $$ >\"$0/tasks\" && exec \"$@\""]).arg(group).arg(inner.get_program());
        command.args(inner.get_args());
        command
    }

    /// Runs what is needed first, in the group of its host; not measured.
    pub fn prepare(&self, host: Host, words: &[&str]) {
        Job::start(self.command(host, words)).wait(Duration::from_secs(60)).success();
    }

    /// Runs a command that must succeed, and waits until what it has written in `dir` is durable.
    pub fn run(&self, host: Host, words: &[&str], dir: &str, limit: Duration) -> Figures {
        // What others have written before is not waited for.
        let settle = || Host::B.ok(&["sync", "--file-system", dir]);
        settle();
        let (cpu, wire) = (self.cpu(), wire());
        let ended = AtomicBool::new(false);
        let (wall, sampled) = std::thread::scope(|scope| {
            let sampler = scope.spawn(|| self.sample(&ended));
            let began = Instant::now();
            let done = Job::start(self.command(host, words)).wait(limit);
            let wall = began.elapsed();
            ended.store(true, Ordering::Relaxed);
            done.success();
            (wall, sampler.join().expect("the sampler does not panic"))
        });
        let before = Instant::now();
        settle();
        let durable = wall + before.elapsed();
        // The other end may still be closing.
        std::thread::sleep(Duration::from_millis(300));
        let after = self.cpu();
        let end = |n: usize| End { cpu: after[n] - cpu[n], ..sampled[n] };
        Figures {
            wall: wall.as_secs_f64(),
            durable: durable.as_secs_f64(),
            wire: self::wire() - wire,
            ends: [end(0), end(1)],
        }
    }

    fn cpu(&self) -> [f64; 2] {
        let of = |group: &PathBuf| {
            let text = fs::read_to_string(group.join("cpuacct.usage")).expect("read the group's CPU");
            text.trim().parse::<f64>().expect("it is a number") / 1e9
        };
        [of(&self.0[0]), of(&self.0[1])]
    }

    fn sample(&self, ended: &AtomicBool) -> [End; 2] {
        let mut ends = [End::default(); 2];
        let mut read: [BTreeMap<String, Read>; 2] = Default::default();
        while !ended.load(Ordering::Relaxed) {
            for (n, group) in self.0.iter().enumerate() {
                let mut rss = 0;
                let mut living = Vec::new();
                for pid in fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().lines() {
                    rss += resident(pid).unwrap_or(0);
                    if let (Some(bytes), Some(parent)) = (rchar(pid), parent(pid)) {
                        living.push(pid.to_owned());
                        // What it had read before does not count.
                        let before = Read { first: bytes, last: bytes, parent, ended: false };
                        read[n].entry(pid.to_owned()).or_insert(before).last = bytes;
                    }
                }
                forget_inherited(&mut read[n], &living);
                ends[n].rss = ends[n].rss.max(rss);
            }
            std::thread::sleep(TICK);
        }
        for (end, read) in ends.iter_mut().zip(&read) {
            end.read = read.values().map(|read| read.last.saturating_sub(read.first)).sum();
        }
        ends
    }
}

/// What one process has read.
struct Read {
    first: u64,
    last: u64,
    parent: String,
    ended: bool,
}

/// The kernel adds the bytes that a process read to its parent's account, once the parent has waited for it. Here each
/// byte counts for the process that read it. If a parent ended in the same tick, the grandparent has inherited both.
fn forget_inherited(read: &mut BTreeMap<String, Read>, living: &[String]) {
    let gone = |read: &Read, pid: &String| !read.ended && !living.contains(pid);
    let ended: Vec<String> = read.iter().filter(|(pid, read)| gone(read, pid)).map(|(pid, _)| pid.clone()).collect();
    for pid in &ended {
        let (bytes, mut heir) = (read[pid].last, read[pid].parent.clone());
        while ended.contains(&heir) {
            heir = read[&heir].parent.clone();
        }
        if let Some(heir) = read.get_mut(&heir) {
            heir.first += bytes;
        }
    }
    for pid in ended {
        read.get_mut(&pid).expect("it was listed").ended = true;
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        for group in &self.0 {
            // Whoever is left goes back to where he came from; a group that stays is empty and harmless.
            for pid in fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().lines() {
                let _ = fs::write(PathBuf::from(ROOT).join("tasks"), pid);
            }
            let _ = fs::remove_dir(group);
        }
    }
}

fn resident(pid: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    Some(text.split(' ').nth(1)?.parse::<u64>().ok()? * 4096)
}

fn rchar(pid: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|l| l.strip_prefix("rchar: "))?.parse().ok()
}

fn parent(pid: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(text.lines().find_map(|l| l.strip_prefix("PPid:"))?.trim().to_owned())
}

/// Bytes over host a's network, both ways.
fn wire() -> u64 {
    let text = Host::A.output(&["cat", "/proc/net/dev"]);
    let of = |line: &str| -> Option<u64> {
        let (name, rest) = line.split_once(':')?;
        let fields: Vec<u64> = rest.split_whitespace().filter_map(|f| f.parse().ok()).collect();
        (name.trim() != "lo").then(|| fields.first().zip(fields.get(8)).map(|(rx, tx)| rx + tx))?
    };
    text.lines().filter_map(of).sum()
}
