//! The two hosts, the commands that run in them, and what `sync --json` said. `domain` builds what is replicated.
//!
//! Every wait is bounded and polls. What a command printed is printed again, so that a failed test shows its story.

use super::domain::Builder;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

/// The target in the words of `--to`: the default store of host b.
pub const TARGET: &str = "ssh://root@192.0.2.2";

/// The default store of a host.
pub const STORE: &str = "/var/lib/virt-replica";

/// What an ordinary command, and an ordinary run, may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The lab, and the right to use it: together with other tests, or alone. `make test` gives each test a lab of its own,
/// where nobody else asks; the locks are for a lab that several tests share.
pub struct Lab {
    _turn: Option<File>,
    _use: File,
}

impl Lab {
    /// The lab, with other tests beside this one. They may not touch what all share: link, program, libvirtd.
    pub fn get() -> Lab {
        let turn = lock_file("turn");
        turn.lock().expect("lock the turnstile");
        let shared = lock_file("use");
        shared.lock_shared().expect("lock the lab");
        Lab { _turn: None, _use: shared }
    }

    /// The lab for this test alone. It must leave everything as it found it: see [`Undo`].
    pub fn alone() -> Lab {
        let turn = lock_file("turn");
        turn.lock().expect("lock the turnstile");
        let own = lock_file("use");
        own.lock().expect("lock the lab");
        // Held on: whoever comes later waits at the turnstile, and a waiting `alone` is never overtaken for ever.
        Lab { _turn: Some(turn), _use: own }
    }

    /// Begins a domain on host a; `name` is made unique.
    pub fn domain(&self, name: &str) -> Builder {
        Builder::new(&format!("{name}-{}", std::process::id()))
    }

    /// Runs the lab's own program (`link-rate`, `cut`, `bin` ...).
    pub fn tool(&self, args: &[&str]) -> Done {
        let mut command = Command::new(variable("VR_LAB"));
        command.args(args);
        Job::start(command).wait(PATIENCE).success()
    }
}

/// Does something when it goes, also when the test failed: what a test alone in the lab has changed.
pub struct Undo<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for Undo<F> {
    fn drop(&mut self) {
        // A panic while a failed test unwinds would end the process before its domain is cleaned up.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (self.0)()));
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: no lab. Run `make test-lab`"))
}

/// A file of the directory that both hosts see, as this process reaches it.
pub fn shared_file(name: &str) -> PathBuf {
    Path::new(&variable("VR_LAB_SHARED")).join(name)
}

fn lock_file(name: &str) -> File {
    let path = shared_file(&format!(".{name}.lock"));
    File::options().create(true).truncate(false).write(true).open(path).expect("open the lab's lock")
}

/// What virsh says when libvirtd is gone, before the call or in it.
const LIBVIRTD_LOST: [&str; 3] =
    ["failed to connect to the hypervisor", "client socket is closed", "End of file while reading data"];

/// Runs `run`; again, while it is a `virsh` whose libvirtd is gone, if that has crashed by itself
/// (tests/lab/lib/keep-libvirtd.sh starts it anew and keeps a list). One that a test has killed stays gone. `complaint`
/// tells what was said by one that failed.
pub fn asked_again<T>(
    args: &[&str],
    crashes: &Path,
    mut run: impl FnMut() -> T,
    complaint: impl Fn(&T) -> Option<String>,
) -> T {
    let is_lost = |done: &T| complaint(done).is_some_and(|said| LIBVIRTD_LOST.iter().any(|words| said.contains(words)));
    let mut done = run();
    for _ in 0..50 {
        if args.first() != Some(&"virsh") || !is_lost(&done) {
            break;
        }
        sleep(Duration::from_millis(100));
        if !crashes.exists() {
            break;
        }
        done = run();
    }
    done
}

/// A host of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    A,
    B,
}

impl Host {
    pub fn a() -> Host {
        Host::A
    }

    pub fn b() -> Host {
        Host::B
    }

    fn letter(self) -> &'static str {
        match self {
            Host::A => "a",
            Host::B => "b",
        }
    }

    /// A file of the host, as this process reaches it. Mounts inside the host are not seen.
    pub fn file(self, path: impl AsRef<Path>) -> PathBuf {
        let root = variable(&format!("VR_LAB_{}_ROOT", self.letter().to_uppercase()));
        Path::new(&root).join(path.as_ref().strip_prefix("/").expect("a path inside a host is absolute"))
    }

    /// A command in the host. Killing it kills what runs there.
    pub fn command(self, args: &[&str]) -> Command {
        let mut command = Command::new(variable("VR_LAB"));
        command.args(["exec", self.letter()]).args(args).env_remove("VIRT_REPLICA_FAILPOINT");
        command
    }

    /// Runs a command, however it ends. A `virsh` that lost its libvirtd to a crash of its own asks again.
    pub fn run(self, args: &[&str]) -> Done {
        let crashes = self.file("/var/log/libvirt/crashes");
        asked_again(
            args,
            &crashes,
            || Job::start(self.command(args)).wait(PATIENCE),
            |done| (done.code != 0).then(|| done.stderr.clone()),
        )
    }

    /// Runs a command that must succeed.
    pub fn ok(self, args: &[&str]) {
        self.run(args).success();
    }

    /// What a command that must succeed printed, without the last line's end.
    pub fn output(self, args: &[&str]) -> String {
        self.run(args).success().stdout.trim_end().to_owned()
    }

    /// Runs a bash script that must succeed; `$1` and so on are `args`.
    pub fn script(self, script: &str, args: &[&str]) -> String {
        let mut words = vec!["bash", "-euo", "pipefail", "-c", script, "script"];
        words.extend(args);
        self.output(&words)
    }

    /// Runs the program, however it ends.
    pub fn virt_replica(self, args: &[&str]) -> Done {
        let mut words = vec!["virt-replica"];
        words.extend(args);
        self.run(&words)
    }

    /// Runs the program, which must succeed and print one JSON document.
    pub fn json(self, args: &[&str]) -> Value {
        let done = self.virt_replica(args).success();
        serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e} in {}", done.stdout))
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Done {
    pub command: String,
    /// Exit code; 128 + N for one that ended by signal N.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub time: Duration,
}

impl Done {
    #[track_caller]
    pub fn success(self) -> Done {
        self.exit(0)
    }

    /// It must have ended with this code.
    #[track_caller]
    pub fn exit(self, code: i32) -> Done {
        assert_eq!(self.code, code, "{}\n{}{}", self.command, self.stdout, self.stderr);
        self
    }

    /// It must have said all of this, in any order, on either stream.
    #[track_caller]
    pub fn says(self, words: &[&str]) -> Done {
        for word in words {
            let said = self.stdout.contains(word) || self.stderr.contains(word);
            assert!(said, "{} does not say {word:?} but\n{}{}", self.command, self.stdout, self.stderr);
        }
        self
    }
}

/// A command that runs. Dropping it kills it.
pub struct Job {
    command: String,
    child: Child,
    since: Instant,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Job {
    pub fn start(mut command: Command) -> Job {
        let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
        let mut text = words.join(" ");
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                text = format!("{}={} {text}", name.to_string_lossy(), value.to_string_lossy());
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{text}: {e}"));
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let readers = vec![
            collect(child.stdout.take().expect("it is piped"), &stdout),
            collect(child.stderr.take().expect("it is piped"), &stderr),
        ];
        Job { command: text, child, since: Instant::now(), stdout, stderr, readers }
    }

    /// Waits for the end; longer than `limit` is a failure.
    #[track_caller]
    pub fn wait(mut self, limit: Duration) -> Done {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for a child") {
                break status;
            }
            if self.since.elapsed() > limit {
                panic!("{} runs longer than {limit:?}\n{}{}", self.command, self.stdout(), self.stderr());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let time = self.since.elapsed();
        // A process it left behind may hold the pipes (a daemon); what the command itself said is there.
        let patience = Instant::now();
        while self.readers.iter().any(|r| !r.is_finished()) && patience.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let code = {
            use std::os::unix::process::ExitStatusExt;
            status.code().unwrap_or_else(|| 128 + status.signal().expect("it exited or was killed"))
        };
        let done = Done { command: self.command.clone(), code, stdout: self.stdout(), stderr: self.stderr(), time };
        println!("[{:.1?}] {} -> {code}\n{}{}", done.time, done.command, done.stdout, done.stderr);
        done
    }

    /// Waits for the end, counted from now.
    #[track_caller]
    pub fn wait_from_now(self, limit: Duration) -> Done {
        let limit = self.since.elapsed() + limit;
        self.wait(limit)
    }

    pub fn running(&mut self) -> bool {
        self.child.try_wait().expect("wait for a child").is_none()
    }

    /// Waits until it has printed a line to stdout of which `wanted` is true.
    #[track_caller]
    pub fn wait_line(&mut self, limit: Duration, what: &str, wanted: impl Fn(&str) -> bool) {
        let since = Instant::now();
        while !self.stdout().lines().any(&wanted) {
            let alive = self.running();
            if since.elapsed() > limit || (!alive && !self.stdout().lines().any(&wanted)) {
                panic!("{} never printed {what}\n{}{}", self.command, self.stdout(), self.stderr());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a `sync --json` has begun this step.
    #[track_caller]
    pub fn wait_step(&mut self, step: u64) {
        self.wait_line(PATIENCE, &format!("step {step}"), |line| {
            let line: Value = serde_json::from_str(line).unwrap_or_default();
            line["message_type"] == "step" && line["step"] == step
        });
    }

    fn stdout(&self) -> String {
        self.stdout.lock().expect("nothing panics while it is held").clone()
    }

    fn stderr(&self) -> String {
        self.stderr.lock().expect("nothing panics while it is held").clone()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(stream: impl Read + Send + 'static, into: &Arc<Mutex<String>>) -> JoinHandle<()> {
    let into = into.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let mut text = into.lock().expect("nothing panics while it is held");
            text.push_str(&String::from_utf8_lossy(&line));
            text.push('\n');
        }
    })
}

/// Asks until the answer is there.
#[track_caller]
pub fn eventually<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let give_up_at = Instant::now() + limit;
    loop {
        let asked = Instant::now();
        if let Some(answer) = ask() {
            return answer;
        }
        let left = give_up_at.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "{what}: not within {limit:?}");
        sleep(rest_after(asked.elapsed()).min(left));
    }
}

/// How long to rest before the same question is asked again. A question to libvirt costs 40 ms of processor time, so
/// that one asked without rest takes half a processor from the test beside it.
pub fn rest_after(question: Duration) -> Duration {
    (question * 3).clamp(Duration::from_millis(20), Duration::from_millis(200))
}

/// What a `sync --json` said.
#[derive(Debug)]
pub struct SyncResult {
    pub done: Done,
    /// All of stdout, a JSON document per line.
    pub lines: Vec<Value>,
    /// The last one, which is the report; null if nothing was begun.
    pub report: Value,
}

impl SyncResult {
    #[track_caller]
    pub fn of(done: Done) -> SyncResult {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line:?}"));
        // A process killed in the middle of a line is no mistake of the format.
        let lines: Vec<Value> = match done.code < 128 {
            true => done.stdout.lines().map(parse).collect(),
            false => done.stdout.lines().filter_map(|l| serde_json::from_str(l).ok()).collect(),
        };
        let report = lines.last().filter(|l| l["message_type"] == "report").cloned().unwrap_or_default();
        SyncResult { done, lines, report }
    }

    /// A point was sealed and the domain is back on its own images.
    #[track_caller]
    pub fn sealed(self) -> SyncResult {
        self.exit(0).outcome("sealed")
    }

    /// No point was sealed; the exit code says why.
    #[track_caller]
    pub fn failed(self, code: i32) -> SyncResult {
        self.exit(code)
    }

    #[track_caller]
    pub fn exit(self, code: i32) -> SyncResult {
        SyncResult { done: self.done.exit(code), ..self }
    }

    #[track_caller]
    pub fn says(self, words: &[&str]) -> SyncResult {
        SyncResult { done: self.done.says(words), ..self }
    }

    #[track_caller]
    fn outcome(self, expected: &str) -> SyncResult {
        assert_eq!(self.report["outcome"], expected, "{:#}", self.report);
        self
    }

    pub fn id(&self) -> &str {
        self.report["id"].as_str().expect("a sealed point has an id")
    }

    /// A disk of the new point.
    #[track_caller]
    pub fn disk(&self, name: &str) -> &Value {
        let disks = self.report["disks"].as_array().expect("a sealed point has disks");
        disks.iter().find(|d| d["name"] == name).unwrap_or_else(|| panic!("no disk {name} in {:#}", self.report))
    }

    pub fn mode(&self, disk: &str) -> &str {
        self.disk(disk)["mode"].as_str().expect("a disk has a mode")
    }

    /// The disk was compared with the head, by whatever means; not sent whole.
    #[track_caller]
    pub fn incremental(&self, disk: &str) {
        assert!(["digest", "bitmap"].contains(&self.mode(disk)), "{:#}", self.disk(disk));
    }

    #[track_caller]
    pub fn bytes(&self, disk: &str, what: &str) -> u64 {
        self.disk(disk)[what].as_u64().unwrap_or_else(|| panic!("no {what} in {:#}", self.report))
    }

    /// The highest step that began.
    pub fn step(&self) -> u64 {
        self.lines.iter().filter_map(|l| l["step"].as_u64()).max().unwrap_or(0)
    }
}

/// A line of b's `authorized_keys`, for as long as this lives. Tests run side by side: a change is made under a lock
/// and by one rename, so that no login meets half a file and no line of another test is lost.
pub struct KeyLine(String);

const KEYS: &str = "keys=/root/.ssh/authorized_keys; exec 9>>$keys.lock; flock 9;";

impl KeyLine {
    pub fn add(line: &str) -> KeyLine {
        let add = r#"cp -p $keys $keys.new; printf '%s\n' "$1" >>$keys.new; mv $keys.new $keys"#;
        Host::B.script(&format!("{KEYS} {add}"), &[line]);
        KeyLine(line.to_owned())
    }
}

impl Drop for KeyLine {
    fn drop(&mut self) {
        let remove = r#"cp -p $keys $keys.new; grep -vF "$1" $keys >$keys.new; mv $keys.new $keys"#;
        Host::B.script(&format!("{KEYS} {remove}"), &[&self.0]);
    }
}
