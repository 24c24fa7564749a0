//! The benchmark on the lab's two hosts: writes the measured part of docs/benchmarks.md. `make bench` runs it.
//!
//! No figure without a check: after each measured run the point is compared with the disk, bit for bit.

#[path = "../tests/lab/suite/domain.rs"]
#[allow(dead_code, reason = "the vocabulary of the lab's tests, of which this uses a part")]
mod domain;
#[path = "../tests/lab/suite/support.rs"]
#[allow(dead_code, reason = "the vocabulary of the lab's tests, of which this uses a part")]
mod support;
#[path = "../tests/lab/suite/tracked.rs"]
#[allow(dead_code, reason = "the vocabulary of the lab's tests, of which this uses a part")]
mod tracked;

use domain::{Disk, Reference};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;
use support::{Done, Host, Job, Lab, SyncResult};
use tracked::Tracked;

/// What every run is told beside what is measured: nothing, so by overlay.
const WAY: &[&str] = &[];

const MIB: u64 = 1 << 20;

/// What is changed between two runs: extents of 1 MiB, spread evenly over the disk.
const CHANGED_MIB: u64 = 64;

/// Runs of each kind; the middle one counts.
const ROUNDS: usize = 7;

const POINTS: usize = 100;

/// Runs of each number of disks; the middle one counts.
const DISKS_ROUNDS: usize = 5;

/// The bound of a pause.
const DEADMAN_WITHIN: Duration = Duration::from_secs(5);

/// What any measured command may take.
const PATIENT: Duration = Duration::from_secs(1800);

const BEGIN: &str = "<!-- measured: `make bench` writes from here -->";
const END: &str = "<!-- measured: to here -->";

fn main() {
    let lab = Lab::alone();
    let tables = [machine(), sizes(&lab), disks(&lab), chain(&lab), peers(&lab)].concat();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/benchmarks.md");
    let text = std::fs::read_to_string(&page).expect("read the page");
    let (before, rest) = text.split_once(BEGIN).expect("the page says where the figures begin");
    let (_, after) = rest.split_once(END).expect("the page says where the figures end");
    std::fs::write(&page, format!("{before}{BEGIN}\n\n{tables}{END}{after}")).expect("write the page");
    eprintln!("written: {}", page.display());
}

/// Where the figures come from.
fn machine() -> String {
    let first = |file: &str, key: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|l| l.starts_with(key)).unwrap_or_default();
        line.split_once(':').map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    let memory_kib: u64 = first("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0);
    let qemu = Host::A.output(&["qemu-img", "--version"]);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "{} on {}: {cores} cores ({}), {} GiB of memory; {}; both hosts, their ssh and the guest's QEMU share them. \
         Load average at the start: {}.\n\n",
        Host::A.output(&["virt-replica", "--version"]),
        jiff::Timestamp::now().strftime("%F"),
        first("/proc/cpuinfo", "model name"),
        memory_kib >> 20,
        qemu.lines().next().unwrap_or_default(),
        load.split(' ').next().unwrap_or_default()
    )
}

fn seconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64())
}

fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / MIB as f64)
}

fn middle(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A disk with some data that cannot be compressed, and files of such data beside it to write from.
fn noisy(disk: Disk, data_mib: u64) -> Disk {
    let fill = format!(
        "for n in 0 1 2 3 4 5 6 7; do head -c 1M /dev/urandom >\"$2/random.$n\"; done; chmod 644 \"$2\"/random.*
         head -c {data_mib}M /dev/urandom >\"$2/data\"
         qemu-io -f \"${{1##*.}}\" -c \"write -s $2/data 0 {data_mib}M\" \"$1\" >&2; rm \"$2/data\""
    );
    disk.run(&format!("{{ {fill}; }}"))
}

/// Changes the same places of the first disk, to something else each round.
fn change(tracked: &Tracked, size_bytes: u64, mib: u64, round: usize) {
    let step = size_bytes / mib;
    let write = |n: u64| {
        let file = (n + round as u64) % 8;
        (0, format!("write -s {}/random.{file} {} 1M", tracked.vm.dir, n * step))
    };
    tracked.hmp(&(0..mib).map(write).collect::<Vec<_>>());
}

/// A run by bitmap over disks of very different sizes with the same changes: its time must not grow with the size. The
/// sizes take turns, so that whatever else the machine does meanwhile meets all of them alike.
fn sizes(lab: &Lab) -> String {
    let mut table = format!(
        "## A run by bitmap, by size of the disk\n\nA sparse qcow2 disk of which the same {CHANGED_MIB} MiB were changed, from the command \
         line's start to its end. The middle of {ROUNDS} runs, and the quickest and slowest; the sizes took turns.\n\n\
         | disk | first copy | run by bitmap | from, to | freeze call | read | sent | read by the audit | `--compare` |\n\
         |--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    );
    let mut disks: Vec<(u64, Tracked, Duration, Vec<SyncResult>)> = Vec::new();
    for gib in [8u64, 64, 512] {
        eprintln!("a disk of {gib} GiB");
        let disk = noisy(Disk::qcow2(&format!("{gib}G")), 64);
        let tracked = Tracked::around(lab.domain(&format!("bench{gib}")).disk(disk).paused());
        // What was never written is allocated at its first writing: not in a measured run.
        change(&tracked, gib << 30, CHANGED_MIB, 0);
        let first = tracked.vm.sync().sealed();
        disks.push((gib, tracked, first.done.time, Vec::new()));
    }
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        for (gib, tracked, _, runs) in &mut disks {
            change(tracked, *gib << 30, CHANGED_MIB, round);
            let run = tracked.vm.sync().sealed();
            assert_eq!(run.mode("vda"), "bitmap", "{:#}", run.report);
            tracked.vm.compare_with_head();
            runs.push(run);
        }
    }
    for (gib, tracked, first, runs) in &disks {
        let compared = tracked.vm.sync_with("", &["--compare"]).sealed();
        let last = runs.last().expect("there were rounds");
        let times: Vec<Duration> = runs.iter().map(|r| r.done.time).collect();
        let ms = |run: &SyncResult| run.report["freeze_ms"].as_f64().expect("a number") / 1000.0;
        let freeze = middle(runs.iter().map(|r| Duration::from_secs_f64(ms(r))).collect());
        let audited = last.disk("vda")["audit"]["bytes_read"].as_u64().unwrap_or(0);
        let _ = writeln!(
            table,
            "| {gib} GiB | {} s | **{} s** | {}, {} | {} ms | {} MiB | {} MiB | {} MiB | {} s |",
            seconds(*first),
            seconds(middle(times.clone())),
            seconds(*times.iter().min().expect("there were rounds")),
            seconds(*times.iter().max().expect("there were rounds")),
            freeze.as_millis(),
            mib(last.bytes("vda", "bytes_read")),
            mib(last.bytes("vda", "bytes_sent")),
            mib(audited),
            seconds(compared.done.time),
        );
    }
    table + "\n"
}

/// Domains of many disks: how long the freeze call takes, and how long the guest stands in one go at the commit.
fn disks(lab: &Lab) -> String {
    let mut table = format!(
        "## A run, by number of disks\n\nqcow2 disks of 64 MiB, a running QEMU, nothing written in between: what a run costs beside its \
         data. The middle of {DISKS_ROUNDS} runs. A pause goes on to further disks for 250 ms; then the guest runs for as long, and \
         the next pause takes the rest. *Pause* is the longest one.\n\n\
         | disks | freeze call | pause | run |\n|--:|--:|--:|--:|\n"
    );
    let mut pauses = Vec::new();
    for count in [1usize, 4, 8, 16, 32] {
        eprintln!("{count} disks");
        let disk = || Disk::qcow2("64M").then("write -P 0x11 0 1M");
        let vm = (0..count).fold(lab.domain(&format!("disks{count}")), |vm, _| vm.disk(disk())).running();
        vm.sync_within(PATIENT).sealed();
        let runs: Vec<SyncResult> = (0..DISKS_ROUNDS).map(|_| vm.sync_within(PATIENT).sealed()).collect();
        vm.compare_with_head();
        let ms = |run: &SyncResult, what: &str| run.report[what].as_f64().expect("a number");
        let of = |what: &str| middle(runs.iter().map(|r| Duration::from_secs_f64(ms(r, what) / 1000.0)).collect());
        let (freeze, pause, run) = (of("freeze_ms"), of("pause_ms"), of("duration_ms"));
        pauses.push((count, pause));
        let _ = writeln!(
            table,
            "| {count} | {} ms | **{} ms** | {} s |",
            freeze.as_millis(),
            pause.as_millis(),
            seconds(run)
        );
    }
    let of = |count: usize| pauses.iter().find(|(n, _)| *n == count).expect("measured").1;
    assert!(of(32) <= 4 * of(8), "the pause grows faster than the disks: {pauses:?}");
    assert!(of(32) < DEADMAN_WITHIN / 2, "the pause comes near the dead-man's bound: {pauses:?}");
    table + "\n"
}

/// A chain of many points: what is asked of it stays quick.
fn chain(lab: &Lab) -> String {
    let size_bytes = 1u64 << 30;
    let tracked = Tracked::around(lab.domain("chain").disk(noisy(Disk::qcow2("1G"), 64)).paused());
    let sync = |round: usize| {
        change(&tracked, size_bytes, 4, round);
        tracked.vm.sync().sealed().done.time
    };
    let times: Vec<Duration> = (0..POINTS)
        .inspect(|n| {
            if n % 20 == 0 {
                eprintln!("a chain: {n} of {POINTS} points")
            }
        })
        .map(sync)
        .collect();
    let asked = |words: &[&str]| {
        let mut all = vec!["virt-replica", words[0], &tracked.vm.name];
        all.extend(&words[1..]);
        all.extend(["--to", &tracked.vm.to, "--json"]);
        Job::start(Host::A.command(&all)).wait(PATIENT).success()
    };
    let list = asked(&["points"]);
    let points = tracked.vm.points();
    assert_eq!(points.len(), POINTS);
    let file = format!("{}/exported", tracked.vm.shared());
    let export = |point: &serde_json::Value| {
        let _ = Host::A.run(&["rm", "-f", &file]);
        let done = asked(&["export", "--point", point["id"].as_str().expect("an id"), "--output", &file]);
        tracked.vm.compare_with_frozen(point, 0, &Reference { file: file.clone() });
        done.time
    };
    let (oldest, newest) = (export(&points[0]), export(&points[POINTS - 1]));
    let next = sync(POINTS);
    tracked.vm.compare_with_head();
    let pruned = asked(&["prune", "--keep", "last=10"]);
    assert_eq!(tracked.vm.points().len(), 10);
    tracked.vm.compare_with_head();
    format!(
        "## A chain of {POINTS} points\n\nA disk of 1 GiB with 64 MiB of data, 4 MiB changed from each point to the next; seconds, of the whole \
         command.\n\n| command | s |\n|---|--:|\n| `sync`, the middle of points 2 to 11 | {} |\n| `sync` on top of {POINTS} points | {} |\n\
         | `points` | {} |\n| `export` of the oldest point | {} |\n| `export` of the newest point | {} |\n\
         | `prune --keep last=10`: {} points removed and folded | {} |\n\n",
        seconds(middle(times[1..11].to_vec())),
        seconds(next),
        seconds(list.time),
        seconds(oldest),
        seconds(newest),
        POINTS + 1 - 10,
        seconds(pruned.time),
    )
}

/// The same image by the programs that are at hand everywhere. They have no consistent state of a running guest, no
/// points and no digests; here the guest stands still, so that they may read its image.
fn peers(lab: &Lab) -> String {
    const SIZE: u64 = 4 << 30;
    const DATA_MIB: u64 = 512;
    eprintln!("beside rsync and qemu-img");
    let tracked = Tracked::around(lab.domain("peers").disk(noisy(Disk::raw("4G"), DATA_MIB)).paused());
    let image = tracked.vm.images[0].clone();
    let copy = format!("{}/copy.raw", tracked.vm.shared());
    let there = "root@192.0.2.2";
    Host::B.ok(&["mkdir", "-p", "/srv/bench"]);
    let rsync = |how: &[&str]| {
        let mut words = vec!["rsync", "-a", "-I"];
        words.extend(how);
        let to = format!("{there}:/srv/bench/rsync.raw");
        words.extend([image.as_str(), to.as_str()]);
        timed(Host::A, &words, "/srv/bench/rsync.raw", &image, &copy)
    };
    let convert = || {
        let script = "truncate -s 0 \"$1\"; truncate -s \"$2\" \"$1\"
            qemu-nbd --fork --format=raw --discard=unmap --shared=8 --bind=192.0.2.2 --port=10809 --pid-file=/run/bench.pid \"$1\"";
        Host::B.script(script, &["/srv/bench/convert.raw", &SIZE.to_string()]);
        let words = ["qemu-img", "convert", "-U", "-n", "--target-is-zero", "-W", "-m", "8", "-f", "raw", "-O", "raw"];
        let words = [&words[..], &[&image, "nbd://192.0.2.2:10809"]].concat();
        timed(Host::A, &words, "/srv/bench/convert.raw", &image, &copy)
    };
    let first = tracked.vm.sync().sealed().done.time;
    let (rsync_first, convert_first) = (rsync(&["--sparse"]), convert());
    // Written once before, so that both of ours lead on from a point with the same places.
    change(&tracked, SIZE, CHANGED_MIB, 0);
    tracked.vm.sync().sealed();
    rsync(&["--inplace", "--no-whole-file"]);
    change(&tracked, SIZE, CHANGED_MIB, 1);
    let rsync_next = rsync(&["--inplace", "--no-whole-file"]);
    let bitmap = tracked.vm.sync().sealed();
    assert_eq!(bitmap.mode("vda"), "bitmap");
    change(&tracked, SIZE, CHANGED_MIB, 2);
    let digest = tracked.vm.sync_with("", &["--compare"]).sealed();
    tracked.vm.compare_with_head();
    let convert_next = convert();
    Host::B.ok(&["rm", "-rf", "/srv/bench"]);
    format!(
        "## Beside rsync and qemu-img\n\nA sparse raw disk of {} GiB with {DATA_MIB} MiB of data that cannot be compressed; then {CHANGED_MIB} MiB of it are changed. Seconds.\n\n\
         | | first copy | after the change |\n|---|--:|--:|\n| `virt-replica sync`, by bitmap | {} | {} |\n| `virt-replica sync --compare` | | {} |\n\
         | `rsync --sparse`, then `--inplace --no-whole-file` (ssh) | {} | {} |\n| `qemu-img convert` to `qemu-nbd` (not encrypted), a whole copy each time | {} | {} |\n\n",
        SIZE >> 30,
        seconds(first),
        seconds(bitmap.done.time),
        seconds(digest.done.time),
        seconds(rsync_first),
        seconds(rsync_next),
        seconds(convert_first),
        seconds(convert_next),
    )
}

/// Runs a copying command, and holds its result against the image.
fn timed(host: Host, words: &[&str], result: &str, image: &str, copy: &str) -> Duration {
    let done: Done = Job::start(host.command(words)).wait(PATIENT).success();
    Host::A.ok(&["cp", "--sparse=always", image, copy]);
    Host::B.ok(&["qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", result, copy]);
    done.time
}
