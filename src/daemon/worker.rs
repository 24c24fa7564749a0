//! Children: a process for each run, each repair, each hook. Starts them, listens to them, tells how they ended.
//!
//! A child is signalled by its own id and never as a group: its dead-man lives in the group, and has to outlive it.

use super::event::{Event, StartRun};
use super::pair::{End, RunResult};
use crate::daemon::check::Check;
use crate::daemon::input::Input;
use crate::error::{Error, Kind, Result, printable};
use crate::hook::{Env, Hook};
use crate::name::DomainUuid;
use crate::replica::lag;
use crate::replicate::state::handover_record::{self, Stage};
use crate::replicate::state::report::{Report, RunOutcome};
use crate::run_settings::RunSettings;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest line of a child that is listened to, in bytes: a report with many disks has some hundred KiB.
const LINE_MAX: u64 = 8 << 20;
/// How long what a child wrote is awaited after its end; its dead-man may hold the pipe longer.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Exit code of `sync` for "a point, and a bitmap had lied".
const AUDIT_ALARM: i32 = 14;

/// How children are started.
#[derive(Debug, Clone)]
pub struct Program {
    /// Our own binary.
    pub path: PathBuf,
    /// Global options that stand before the command.
    pub globals: Vec<String>,
    /// Where this host keeps its own state.
    pub state: PathBuf,
}

/// The arguments of a run. How it is to be done stands on its standard input ([`RunSettings`]); which domain and where
/// to stand here too, so that a list of processes tells the runs apart.
pub fn sync_args(job: &StartRun) -> Vec<String> {
    ["sync", job.domain.uuid.as_str(), "--to", &job.target, "--json", "--settings-on-stdin"].map(str::to_owned).into()
}

/// The arguments of a check.
pub fn check_args(check: Check, job: &StartRun) -> Vec<String> {
    let mut args = vec![check.word().to_owned(), job.domain.uuid.to_string(), "--json".to_owned()];
    let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
    match (check, &job.policy.drill, &job.policy.store) {
        (Check::Drill, Some(drill), Some(store)) => {
            add("--root", store.to_string_lossy().into_owned());
            add("--within", format!("{}s", drill.within.as_secs()));
            drill.probes.iter().for_each(|probe| add("--probe", probe.clone()));
        }
        _ => add("--to", job.target.clone()),
    }
    args
}

impl Program {
    fn command(&self, args: &[String]) -> Command {
        let mut command = Command::new(&self.path);
        command.args(&self.globals).args(args);
        // A signal that is meant for the daemon is not meant for its runs.
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a run. Its signs and its end come as events of this number. Returns a hold on the process.
    pub fn start(&self, run: u64, job: &StartRun, inputs: &Sender<Input>) -> Result<OwnedFd> {
        let (state, uuid) = (self.state.clone(), job.domain.uuid.clone());
        let settings = RunSettings::of_policy(&job.policy, &job.domain)?.to_json();
        self.spawn(run, &sync_args(job), Some(settings), job.domain.name.as_str(), inputs, move |heard, status| {
            let mut end = heard.end(status);
            // Looked at now: it may have been handed over since the daemon asked last.
            end.lives_on = lives_on(&state, &uuid).filter(|_| end.result == RunResult::Failed);
            Event::Ended { run, end }
        })
    }

    /// Starts a check, with signs and an end as above.
    pub fn check(&self, run: u64, check: Check, job: &StartRun, inputs: &Sender<Input>) -> Result<OwnedFd> {
        self.spawn(run, &check_args(check, job), None, job.domain.name.as_str(), inputs, move |heard, status| {
            Event::Checked { run, error: heard.failure(status) }
        })
    }

    /// Starts `doctor --repair`.
    pub fn repair(&self, run: u64, uuid: &DomainUuid, ready: Duration, inputs: &Sender<Input>) -> Result<OwnedFd> {
        let ready = format!("{}s", ready.as_secs());
        let args = ["doctor", uuid.as_str(), "--repair", "--ready-timeout", &ready, "--json"].map(str::to_owned);
        self.spawn(run, &args, None, uuid.as_str(), inputs, move |heard, status| Event::Ended {
            run,
            end: heard.end(status),
        })
    }

    /// `input`: what the child finds on its standard input. `ended`: the event that its end is, by what was heard of
    /// it.
    fn spawn(
        &self,
        run: u64,
        args: &[String],
        input: Option<Vec<u8>>,
        name: &str,
        inputs: &Sender<Input>,
        ended: impl FnOnce(Heard, std::io::Result<ExitStatus>) -> Event + Send + 'static,
    ) -> Result<OwnedFd> {
        let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
        let mut child =
            self.command(args).stdin(stdin).spawn().map_err(|e| Error::io("cannot start a run", &self.path, e))?;
        // Taken before anybody waits for the child: a number could be another process's by the time it is used.
        let hold = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a child has an id");
        let hold = pidfd_open(hold, PidfdFlags::empty()).map_err(|e| Error::from_io("cannot hold a run", e.into()))?;
        let heard: Arc<Mutex<Heard>> = Arc::default();
        let (out, err) = (child.stdout.take().expect("it is piped"), child.stderr.take().expect("it is piped"));
        let listeners = [
            listen(out, {
                let (heard, inputs) = (heard.clone(), inputs.clone());
                move |line| {
                    let step = lock(&heard).output(line);
                    // Nobody listens any more when the daemon ends.
                    let _ = inputs.send(Input::Event(Box::new(Event::Sign { run, step })));
                }
            }),
            listen(err, {
                let (heard, name) = (heard.clone(), name.to_owned());
                move |line| lock(&heard).complaint(line, &name)
            }),
        ];
        let inputs = inputs.clone();
        std::thread::spawn(move || {
            if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
                // A child that died before it read says so by its end. One that lives reads first of all.
                let _ = stdin.write_all(&input);
            }
            let status = child.wait();
            let until = Instant::now() + LAST_WORDS;
            while listeners.iter().any(|l| !l.is_finished()) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(10));
            }
            let heard = std::mem::take(&mut *lock(&heard));
            let _ = inputs.send(Input::Event(Box::new(ended(heard, status))));
        });
        Ok(hold)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A listener that panicked heard less; what was heard is true.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Reads lines until the pipe ends. A line that is too long is cut: what is left of it is no JSON and is passed over.
fn listen(pipe: impl Read + Send + 'static, mut on_line: impl FnMut(&[u8]) + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        loop {
            line.clear();
            match pipe.by_ref().take(LINE_MAX).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => on_line(line.trim_ascii()),
            }
        }
    })
}

/// What a child said.
#[derive(Default)]
struct Heard {
    report: Option<Box<Report>>,
    error: Option<(Kind, String)>,
}

#[derive(Deserialize)]
struct Line {
    message_type: String,
    #[serde(default)]
    step: Option<u8>,
    #[serde(default)]
    kind: Option<Kind>,
    #[serde(default)]
    message: Option<String>,
}

impl Heard {
    /// A line of stdout; the step that it says begins.
    fn output(&mut self, line: &[u8]) -> Option<u8> {
        let parsed: Line = serde_json::from_slice(line).ok()?;
        if parsed.message_type == "report" {
            self.report = serde_json::from_slice(line).ok().map(Box::new);
        }
        parsed.step
    }

    /// A line of stderr.
    fn complaint(&mut self, line: &[u8], name: &str) {
        match serde_json::from_slice::<Line>(line) {
            Ok(Line { message_type, kind: Some(kind), message: Some(message), .. }) if message_type == "exit_error" => {
                self.error = Some((kind, message));
            }
            _ => tracing::debug!(domain = name, "{}", printable(&String::from_utf8_lossy(line), 1000)),
        }
    }

    /// Why it failed; `None`: it did not.
    fn failure(self, status: std::io::Result<ExitStatus>) -> Option<(Option<Kind>, String)> {
        let status = match status {
            Ok(status) if status.success() => return None,
            Ok(status) => status,
            Err(e) => return Some((Some(Kind::Io), format!("its end was not seen: {e}"))),
        };
        Some(match (self.error, status.signal()) {
            (Some((kind, message)), _) => (Some(kind), message),
            (None, Some(signal)) => (None, format!("it was ended by signal {signal}")),
            (None, None) => (None, format!("it ended with code {} and said nothing", status.code().unwrap_or(-1))),
        })
    }

    fn end(mut self, status: std::io::Result<ExitStatus>) -> End {
        let (Some(report), Ok(status)) = (self.report.take(), &status) else {
            return match self.failure(status) {
                Some((kind, why)) => End::failed(kind, why),
                None => End::failed(None, "the run ended without a report"),
            };
        };
        let point = report.point.as_ref();
        let sum = |of: fn(&crate::engine::stats::DiskStats) -> u64| {
            point.map_or(0, |p| p.disks.iter().fold(0u64, |sum, d| sum.saturating_add(of(&d.stats))))
        };
        let mut alarms = report.alarms.clone();
        if alarms.is_empty() && status.code() == Some(AUDIT_ALARM) {
            alarms.push("a dirty bitmap had lied".to_owned());
        }
        End {
            result: match report.outcome {
                RunOutcome::Sealed => RunResult::Sealed,
                RunOutcome::CommitPending => RunResult::CommitPending,
                RunOutcome::Failed => RunResult::Failed,
            },
            frozen_at: point.map(|p| p.as_of()),
            clock_ahead_s: point.and_then(|p| lag::ahead_s(p.frozen_at, p.sealed_at)),
            unprotected: report.capture.map(|_| report.skipped.unprotected().cloned().collect()),
            point: point.map(|p| p.id.to_string()),
            error_kind: report.error_kind.or(self.error.as_ref().map(|(kind, _)| *kind)),
            error: report.error.clone(),
            alarms,
            guest_stopped: report.guest_stopped.clone(),
            freeze_ms: report.freeze_ms,
            pause_ms: report.pause_ms,
            pause_sum_ms: report.pause_sum_ms,
            pauses: report.pauses,
            bytes_read: sum(|s| s.bytes_read),
            bytes_sent: sum(|s| s.bytes_sent),
            bytes_written: sum(|s| s.bytes_written),
            seen: report.target_seen,
            lives_on: None,
        }
    }
}

/// Where a domain lives that was handed over.
pub fn lives_on(state: &Path, uuid: &DomainUuid) -> Option<String> {
    match handover_record::peek(state, uuid) {
        Ok(record) => record.filter(|record| record.stage == Stage::Moved).map(|record| record.to),
        Err(e) => {
            tracing::warn!(domain = %uuid, "{}", e.chain());
            None
        }
    }
}

/// Sends a signal to a child; one that has ended does not hear it.
pub fn signal(child: &OwnedFd, signal: Signal) {
    if let Err(e) = pidfd_send_signal(child, signal) {
        tracing::debug!("a run could not be signalled: {e}");
    }
}

/// Runs a hook in a thread of its own; its end is logged.
pub fn hook(hook: Hook, env: Env) -> JoinHandle<()> {
    std::thread::spawn(move || match hook.run(&env) {
        Ok(status) if status.success() => {}
        Ok(status) => tracing::warn!(hook = hook.command[0], "the hook ended with {status}"),
        Err(e) => tracing::warn!(hook = hook.command[0], "{}", e.chain()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::DomainName;
    use crate::policy::Policy;
    use crate::policy::select::SeenDomain;
    use std::path::Path;

    fn job(lines: &str) -> StartRun {
        let text = format!("name: p\ndomains: [web01]\ntargets: [dr1]\nevery: 5m\n{lines}");
        StartRun {
            domain: SeenDomain {
                name: DomainName::new("web01").unwrap(),
                uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
                tags: Vec::new(),
            },
            target: "dr1".to_owned(),
            policy: Policy::parse(&text, Path::new("p.yaml"), &["dr1"]).unwrap(),
        }
    }

    #[test]
    fn a_list_of_processes_tells_runs_apart() {
        let words = "sync 6695eb01-f6a4-8304-79aa-97f2502e193f --to dr1 --json --settings-on-stdin";
        assert_eq!(sync_args(&job("")).join(" "), words);
    }

    #[test]
    fn a_drill_is_of_the_store_and_has_its_evidence() {
        let text = "name: t\nreplicas: [web01]\nroot: /srv/r\ndrill: {every: 7d, probes: [agent, \"serial:login:\"], within: 90s}\nverify: {every: 1d}\n";
        let policy = Policy::parse(text, Path::new("t.yaml"), &[]).unwrap();
        let job = StartRun { target: "local:/srv/r".to_owned(), policy, ..job("") };
        let uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f";
        let words = format!("drill {uuid} --json --root /srv/r --within 90s --probe agent --probe serial:login:");
        assert_eq!(check_args(Check::Drill, &job).join(" "), words);
        assert_eq!(check_args(Check::Verify, &job).join(" "), format!("verify {uuid} --json --to local:/srv/r"));
    }

    /// The words that a policy may use are those that `sync` knows.
    #[test]
    fn the_words_of_policies_are_those_of_sync() {
        for word in crate::policy::CAPTURES {
            assert!(word.parse::<crate::replicate::plan::capture_choice::CaptureWish>().is_ok(), "{word}");
        }
        for word in crate::policy::QUIESCE {
            assert!(word.parse::<crate::replicate::capture::quiesce::Quiesce>().is_ok(), "{word}");
        }
    }

    #[test]
    fn the_last_words_of_a_run_say_how_it_ended() {
        let mut heard = Heard::default();
        assert_eq!(heard.output(br#"{"message_type":"step","step":5,"what":"x"}"#), Some(5));
        assert_eq!(heard.output(b"not JSON"), None);
        heard.complaint(br#"{"message_type":"exit_error","code":1,"kind":"unavailable","message":"away"}"#, "web01");
        let end = heard.end(Ok(ExitStatus::from_raw(1 << 8)));
        assert_eq!(
            (end.result, end.error_kind, end.error.as_deref()),
            (RunResult::Failed, Some(Kind::Unavailable), Some("away"))
        );
        let end = Heard::default().end(Ok(ExitStatus::from_raw(9)));
        assert!(end.error_kind.is_none() && end.error.unwrap().contains("signal 9"));
        let end = Heard::default().end(Ok(ExitStatus::from_raw(0)));
        assert_eq!(end.result, RunResult::Failed, "no report, no point");
    }
}
