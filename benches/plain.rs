//! Copies of plain images beside the tools that people use for them, on the lab's two hosts, in one run: writes its
//! part of docs/benchmarks.md. `make bench` runs it; `VR_BENCH_GIB` makes the images smaller for a look at the bench
//! itself.
//!
//! No figure without a check: after each measured copy the two images are compared, byte for byte.

#[path = "../tests/lab/suite/domain.rs"]
#[allow(dead_code, reason = "the vocabulary of the lab's tests, of which this uses a part")]
mod domain;
#[path = "plain/load.rs"]
mod load;
#[path = "plain/meter.rs"]
mod meter;
#[path = "../tests/lab/suite/support.rs"]
#[allow(dead_code, reason = "the vocabulary of the lab's tests, of which this uses a part")]
mod support;

use meter::{Figures, Meter};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;
use support::{Host, Job, Lab};

const WAY: &[&str] = &[];

const BEGIN: &str = "<!-- measured: `make bench` writes copies of plain images from here -->";
const END: &str = "<!-- measured: copies of plain images to here -->";

/// Where the images lie, on both hosts.
const DIR: &str = "/lab/shared/bench";
const THERE: &str = "root@192.0.2.2";

/// What any measured command may take.
const PATIENT: Duration = Duration::from_secs(3600);

/// Columns of the plot.
const PLOT_WIDTH: f64 = 48.0;

fn main() {
    let _lab = Lab::alone();
    let gib: u64 = std::env::var("VR_BENCH_GIB").map_or(16, |n| n.parse().expect("VR_BENCH_GIB is a number"));
    Host::A.ok(&["mkdir", "-p", DIR]);
    let mut bench = Bench { meter: Meter::new(), sections: String::new(), bars: Vec::new() };
    bench.all(gib);
    Host::A.ok(&["rm", "-rf", DIR]);
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/benchmarks.md");
    let text = std::fs::read_to_string(&page).expect("read the page");
    let (before, rest) = text.split_once(BEGIN).expect("the page says where the figures begin");
    let (_, after) = rest.split_once(END).expect("the page says where the figures end");
    let measured = [bench.sections.clone(), bench.verdict()].concat();
    let page_text = format!("{before}{BEGIN}\n\n{measured}{END}{after}");
    match gib {
        16 => std::fs::write(&page, page_text).expect("write the page"),
        // Figures of a small run are of no use to anybody.
        _ => eprintln!("{measured}"),
    }
}

/// One way of copying.
struct Peer {
    name: &'static str,
    figures: Figures,
}

struct Bench {
    meter: Meter,
    sections: String,
    /// What was to be shown, and the ratio that came out.
    bars: Vec<(String, f64, f64)>,
}

impl Bench {
    fn all(&mut self, gib: u64) {
        let mut image = load::mixed(&host_path("a.raw"), gib << 30, (gib << 30) / 8 * 3);
        self.first_copies(&image);
        self.unchanged(&image, "W2: nothing changed");
        load::change(&host_path("a.raw"), &mut image);
        self.changed(&image);
        let holes = load::mixed(&host_path("a.raw"), gib << 32, (gib << 30) / 8);
        self.mostly_holes(&holes);
    }

    fn ours(&self, more: &[&str]) -> Figures {
        let (from, to) = (format!("{DIR}/a.raw"), format!("ssh://{THERE}{DIR}/ours.raw"));
        self.meter
            .run(Host::A, &[&["virt-replica", "copy", &from, &to], more].concat(), DIR, PATIENT)
            .checked("ours.raw")
    }

    fn rsync(&self, how: &[&str]) -> Figures {
        let (from, to) = (format!("{DIR}/a.raw"), format!("{THERE}:{DIR}/rsync.raw"));
        self.meter
            .run(Host::A, &[&["rsync", "-a", "-I"], how, &[&from, &to]].concat(), DIR, PATIENT)
            .checked("rsync.raw")
    }

    /// A whole copy by a program that speaks NBD, to a server at the other end of an ssh channel.
    fn over_nbd(&self, program: &str, size: u64) -> Figures {
        let serve = "rm -f \"$1\" n.sock; truncate -s \"$2\" \"$1\"
            qemu-nbd --fork --format=raw --discard=unmap --detect-zeroes=unmap --shared=8 -k \"$PWD/n.sock\" \"$1\"";
        let script = format!("cd {DIR}; {serve}");
        self.meter.prepare(Host::B, &["bash", "-euc", &script, "serve", "nbd.raw", &size.to_string()]);
        let copy = format!(
            "cd {DIR}; rm -f l.sock; ssh -f -N -M -S ./c.sock -o ExitOnForwardFailure=yes -L $PWD/l.sock:$PWD/n.sock {THERE}
             {program}; ssh -q -S ./c.sock -O exit {THERE}"
        );
        self.meter.run(Host::A, &["bash", "-euc", &copy], DIR, PATIENT).checked("nbd.raw")
    }

    fn bdsync(&self) -> Option<Figures> {
        if !there("bdsync") {
            return None;
        }
        let script = format!(
            "cd {DIR}; bdsync --zeroblocks 'ssh {THERE} bdsync --server' a.raw {DIR}/bdsync.raw | ssh {THERE} bdsync --patch={DIR}/bdsync.raw"
        );
        Some(self.meter.run(Host::A, &["bash", "-euo", "pipefail", "-c", &script], DIR, PATIENT).checked("bdsync.raw"))
    }

    fn blocksync(&self) -> Option<Figures> {
        if !there("blocksync-fast") {
            return None;
        }
        let script = format!(
            "cd {DIR}; blocksync-fast --make-delta -s a.raw -f bsf.digest | ssh {THERE} blocksync-fast --apply-delta -d {DIR}/bsf.raw"
        );
        Some(self.meter.run(Host::A, &["bash", "-euo", "pipefail", "-c", &script], DIR, PATIENT).checked("bsf.raw"))
    }

    fn first_copies(&mut self, image: &load::Image) {
        let mut peers = vec![Peer { name: "virt-replica copy", figures: self.ours(&[]) }];
        peers.push(Peer { name: "rsync --sparse", figures: self.rsync(&["--sparse"]) });
        let convert =
            "qemu-img convert -n --target-is-zero -W -m 8 -f raw -O raw a.raw \"nbd+unix:///?socket=$PWD/l.sock\"";
        let convert = self.over_nbd(convert, image.size);
        self.bars.push(("W1 as fast as qemu-img convert".into(), convert.wall / peers[0].figures.wall, 1.0));
        let durable = convert.durable / peers[0].figures.durable;
        self.bars.push(("the same, until both are durable".into(), durable, 1.0));
        peers.push(Peer { name: "qemu-img convert (ssh)", figures: convert });
        if there("nbdcopy") {
            let copy = "nbdcopy --destination-is-zero a.raw \"nbd+unix:///?socket=$PWD/l.sock\"";
            peers.push(Peer { name: "nbdcopy (ssh)", figures: self.over_nbd(copy, image.size) });
        }
        for (name, file) in [("bdsync", "bdsync.raw"), ("blocksync-fast", "bsf.raw")] {
            Host::B.script(
                "rm -f \"$1\"; truncate -s \"$2\" \"$1\"",
                &[&format!("{DIR}/{file}"), &image.size.to_string()],
            );
            let figures = if name == "bdsync" { self.bdsync() } else { self.blocksync() };
            peers.extend(figures.map(|figures| Peer { name, figures }));
        }
        self.section("W1: first copy", image, &peers);
    }

    /// All that find out what differs; with ours twice, the second time with kept digests.
    fn updates(&self) -> Vec<Peer> {
        let digests = format!("{DIR}/digests");
        let mut peers = vec![Peer { name: "virt-replica copy", figures: self.ours(&[]) }];
        peers.push(Peer { name: "rsync --inplace", figures: self.rsync(&["--inplace", "--no-whole-file"]) });
        peers.extend(self.bdsync().map(|figures| Peer { name: "bdsync", figures }));
        peers.extend(self.blocksync().map(|figures| Peer { name: "blocksync-fast", figures }));
        // The first run with digests makes them.
        self.ours(&["--digests", &digests]);
        peers.push(Peer {
            name: "virt-replica copy, nothing changed, --digests",
            figures: self.ours(&["--digests", &digests]),
        });
        peers
    }

    fn unchanged(&mut self, image: &load::Image, title: &str) {
        let peers = self.updates();
        self.bars.push((format!("{title}: 3 times as fast as the best peer"), lead(&peers), 3.0));
        self.section(title, image, &peers);
    }

    fn changed(&mut self, image: &load::Image) {
        let peers = self.updates();
        self.bars.push(("W3: 3 times as fast as the best peer".into(), lead(&peers), 3.0));
        let wire = image.changed as f64 / peers[0].figures.wire as f64;
        self.bars.push(("W3: at most 1.1 times what changed on the wire".into(), wire, 1.0 / 1.1));
        self.section("W3: changes in 2,000 places", image, &peers);
    }

    fn mostly_holes(&mut self, image: &load::Image) {
        // Everybody begins with a copy that is equal.
        for file in ["ours.raw", "rsync.raw", "bdsync.raw", "bsf.raw"] {
            Host::B.script("cd \"$1\"; rm -f \"$2\"; cp --sparse=always a.raw \"$2\"", &[DIR, file]);
        }
        let peers = self.updates();
        self.bars.push(("W4: 20 times as fast as the best peer".into(), lead(&peers), 20.0));
        self.section("W4: mostly holes, nothing changed", image, &peers);
    }

    fn section(&mut self, title: &str, image: &load::Image, peers: &[Peer]) {
        eprintln!("{title}");
        let of = format!("{} GiB, {} of them data", image.size >> 30, mib(image.data));
        let changed = if image.changed > 0 { format!("; {} changed", mib(image.changed)) } else { String::new() };
        let out = &mut self.sections;
        writeln!(out, "### {title}\n\nA raw image of {of}{changed}.\n").expect("a string");
        writeln!(
            out,
            "| | s | s, durable | CPU s, from | to | peak RSS MiB, from | to | wire MiB | read MiB, from | to |"
        )
        .expect("a string");
        writeln!(out, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|").expect("a string");
        for Peer { name, figures: f } in peers {
            let (a, b) = (&f.ends[0], &f.ends[1]);
            writeln!(
                out,
                "| {name} | {:.1} | {:.1} | {:.1} | {:.1} | {} | {} | {:.1} | {} | {} |",
                f.wall,
                f.durable,
                a.cpu,
                b.cpu,
                a.rss >> 20,
                b.rss >> 20,
                f.wire as f64 / 1048576.0,
                a.read >> 20,
                b.read >> 20
            )
            .expect("a string");
        }
        let longest = peers.iter().map(|p| p.figures.wall).fold(0.0, f64::max);
        writeln!(out, "\n```").expect("a string");
        for Peer { name, figures } in peers {
            let bar = "#".repeat(((figures.wall / longest * PLOT_WIDTH).round() as usize).max(1));
            writeln!(out, "{name:46} {bar} {:.1} s", figures.wall).expect("a string");
        }
        writeln!(out, "```\n").expect("a string");
    }

    fn verdict(&self) -> String {
        let mut out = "### What was to be shown\n\n| | ratio | at least | |\n|---|--:|--:|---|\n".to_owned();
        for (what, ratio, least) in &self.bars {
            let shown = if ratio >= least { "yes" } else { "**no**" };
            writeln!(out, "| {what} | {ratio:.2} | {least:.2} | {shown} |").expect("a string");
        }
        out + "\n"
    }
}

/// How many times as long as ours the best peer takes.
fn lead(peers: &[Peer]) -> f64 {
    let others = peers.iter().filter(|p| !p.name.starts_with("virt-replica")).map(|p| p.figures.wall);
    others.fold(f64::INFINITY, f64::min) / peers[0].figures.wall
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn there(program: &str) -> bool {
    Host::A.run(&["bash", "-c", &format!("command -v {program}")]).code == 0
}

/// A file of the shared directory, as this process reaches it.
fn host_path(name: &str) -> std::path::PathBuf {
    let dir = std::env::var("VR_LAB_DIR").expect("the lab says where it lives");
    Path::new(&dir).join("shared/bench").join(name)
}

impl Figures {
    /// The copy is the image.
    fn checked(self, copy: &str) -> Figures {
        let (one, two) = (host_path("a.raw"), host_path(copy));
        let path = |p: &Path| p.to_str().expect("the lab's paths are text").to_owned();
        let compare = ["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", &path(&one), &path(&two)];
        let mut command = std::process::Command::new(compare[0]);
        command.args(&compare[1..]);
        Job::start(command).wait(PATIENT).success();
        self
    }
}
