//! The agent behind a real sshd on 127.0.0.1, with keys, port, configuration and directory of its own.

use super::{Fake, FakeOpener, begin_request, disk, eventually, seal_request, uuid};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virt_replica::agent::client::AgentClient;
use virt_replica::agent::server::{ServeOptions, serve_stdio};
use virt_replica::engine::disk_target::DiskTarget as _;
use virt_replica::error::{Error, Kind};
use virt_replica::replica::Replica;
use virt_replica::transport::Transport;
use virt_replica::transport::ssh::{SshOptions, SshTransport};
use virt_replica::transport::target::{SshTarget, TargetUrl};

/// Not a test: the program that sshd starts as the agent. The test harness prints a line before it, as a noisy shell
/// profile would.
#[test]
#[ignore = "the agent that the tests over ssh start"]
fn agent_process() {
    let served = serve_stdio(&FakeOpener(Arc::new(Fake::default())), ServeOptions::default());
    // The harness must not say more after the agent's last word: nobody reads it, and its panic would be the exit code.
    std::process::exit(match served {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{}", error.chain());
            1
        }
    });
}

/// One sshd and everything a client needs to log in to it.
struct Sshd {
    dir: tempfile::TempDir,
    port: u16,
    process: Child,
}

impl Sshd {
    /// `None`, loudly, where there is no sshd to test with.
    fn start() -> Option<Sshd> {
        let program = Path::new("/usr/sbin/sshd");
        if !program.exists() {
            eprintln!("SKIPPED: no {}; `apt-get install openssh-server` makes this test run", program.display());
            return None;
        }
        // Short, for the control socket's sake.
        let dir = tempfile::Builder::new().prefix("vr").tempdir_in("/tmp").unwrap();
        let path = |name: &str| dir.path().join(name);
        for key in ["host", "other_host", "user", "other_user"] {
            let status = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(path(key))
                .status()
                .unwrap();
            assert!(status.success());
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        for (name, key) in [("known", "host"), ("known_changed", "other_host")] {
            let key = std::fs::read_to_string(path(&format!("{key}.pub"))).unwrap();
            std::fs::write(path(name), format!("[127.0.0.1]:{port} {key}")).unwrap();
        }
        std::fs::write(path("known_empty"), "").unwrap();
        std::fs::write(path("ssh_config"), "").unwrap();
        std::fs::copy(path("user.pub"), path("authorized")).unwrap();
        let agent = format!(
            "#!/bin/sh\nexec '{}' --ignored --exact agent::ssh::agent_process --nocapture\n",
            std::env::current_exe().unwrap().display()
        );
        std::fs::write(path("agent"), agent).unwrap();
        std::fs::set_permissions(path("agent"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\nPidFile none\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxSessions 3\n",
            dir.path().display()
        );
        std::fs::write(path("sshd_config"), config).unwrap();
        let mut sshd = Sshd { process: start(program, &path("sshd_config")), dir, port };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = sshd.process.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "sshd does not start: {ended:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(sshd)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn target(&self) -> SshTarget {
        match TargetUrl::parse(&format!("ssh://127.0.0.1:{}/srv/a%20store", self.port)).unwrap() {
            TargetUrl::Ssh(target) => target,
            other => panic!("{other}"),
        }
    }

    fn options(&self) -> SshOptions {
        SshOptions {
            identity_file: Some(self.path("user")),
            config_file: Some(self.path("ssh_config")),
            known_hosts_file: Some(self.path("known")),
            control_directory: Some(self.path("c")),
            agent_command: vec![self.path("agent").to_string_lossy().into_owned()],
            connect_timeout: Duration::from_secs(10),
            ..SshOptions::default()
        }
    }

    fn transport(&self, change: impl FnOnce(&mut SshOptions)) -> SshTransport {
        let mut options = self.options();
        change(&mut options);
        SshTransport::connect(&self.target(), options).unwrap()
    }

    fn refusal(&self, change: impl FnOnce(&mut SshOptions)) -> Error {
        AgentClient::connect(&self.transport(change)).unwrap_err()
    }

    /// Masters of this test, by what their command line shows: the control directory.
    fn masters(&self) -> Vec<u32> {
        let control = self.path("c").to_string_lossy().into_owned();
        let pids = std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok());
        let shows = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&control)
        };
        pids.filter(shows).collect()
    }
}

/// Root's sshd wants `/run/sshd`; where the machine has none it gets one in a mount namespace of its own.
fn start(program: &Path, config: &Path) -> Child {
    let needs_dir = rustix::process::geteuid().is_root() && !Path::new("/run/sshd").exists();
    let mut command = match needs_dir {
        false => Command::new(program),
        true => {
            let mut command = Command::new("unshare");
            let script = "mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec \"$@\"";
            command.args(["--mount", "sh", "-c", script, "sh"]).arg(program);
            command
        }
    };
    command.arg("-D").arg("-e").arg("-f").arg(config);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

impl Drop for Sshd {
    /// Also after a failed test: its master would wait for ten minutes.
    fn drop(&mut self) {
        self.masters().into_iter().for_each(kill);
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// It may have gone by itself in between.
fn kill(pid: u32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

#[test]
fn two_channels_share_one_master_which_ends_when_told() {
    let Some(sshd) = Sshd::start() else { return };
    let transport = sshd.transport(|_| {});
    let clients = [(); 2].map(|()| Arc::new(AgentClient::connect(&transport).unwrap()));
    assert_eq!(sshd.masters().len(), 1);
    std::thread::scope(|scope| {
        for client in &clients {
            scope.spawn(|| {
                let replica = client.open(&uuid()).unwrap();
                replica.begin(&begin_request(&["vda"])).unwrap();
                let patch = vec![5; 8 << 20];
                replica.apply(&disk("vda"), &patch).unwrap();
                assert_eq!(replica.finish_disk(&disk("vda")).unwrap().bytes_written, 8 << 20);
                replica.seal(&seal_request()).unwrap();
            });
        }
    });
    for client in clients {
        client.close().unwrap();
    }
    assert_eq!(sshd.masters().len(), 1);
    transport.close().unwrap();
    eventually("the master ends", || sshd.masters().is_empty());
    // Opening again starts anew.
    let client = AgentClient::connect(&transport).unwrap();
    client.close().unwrap();
    transport.close().unwrap();
    eventually("the second master ends", || sshd.masters().is_empty());
}

#[test]
fn a_host_key_is_known_or_the_host_is_refused() {
    let Some(sshd) = Sshd::start() else { return };
    let unknown = sshd.refusal(|options| options.known_hosts_file = Some(sshd.path("known_empty")));
    assert_eq!(unknown.kind(), Kind::Auth, "{unknown}");
    assert!(unknown.hint_text().unwrap().contains(&format!("`ssh -p {} 127.0.0.1` once", sshd.port)), "{unknown:?}");

    let changed = |options: &mut SshOptions| options.known_hosts_file = Some(sshd.path("known_changed"));
    let error = sshd.refusal(changed);
    assert_eq!(error.kind(), Kind::Auth, "{error}");
    assert!(error.what().contains("has changed"), "{error}");
    let error = sshd.refusal(|options| {
        changed(options);
        options.accept_new_host_key = true;
    });
    assert_eq!(error.kind(), Kind::Auth, "a changed key is refused even where new ones are accepted: {error}");

    let transport = sshd.transport(|options| {
        options.known_hosts_file = Some(sshd.path("known_empty"));
        options.accept_new_host_key = true;
    });
    AgentClient::connect(&transport).unwrap().close().unwrap();
    transport.close().unwrap();
    assert!(std::fs::read_to_string(sshd.path("known_empty")).unwrap().contains("127.0.0.1"));
    eventually("no master is left", || sshd.masters().is_empty());
}

#[test]
fn a_key_the_host_does_not_know_is_an_answer_not_a_retry() {
    let Some(sshd) = Sshd::start() else { return };
    let error = sshd.refusal(|options| options.identity_file = Some(sshd.path("other_user")));
    assert_eq!(error.kind(), Kind::Auth, "{error}");
    assert!(error.hint_text().unwrap().contains("authorized_keys"), "{error:?}");
}

#[test]
fn a_closed_port_is_worth_another_try() {
    let Some(sshd) = Sshd::start() else { return };
    let mut target = sshd.target();
    target.port = Some(TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
    let transport = SshTransport::connect(&target, sshd.options()).unwrap();
    let error = AgentClient::connect(&transport).unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

#[test]
fn a_missing_agent_is_named_with_what_to_do() {
    let Some(sshd) = Sshd::start() else { return };
    let error = sshd.refusal(|options| options.agent_command = vec!["/opt/no such/virt-replica".into()]);
    assert_eq!(error.kind(), Kind::Protocol, "{error}");
    assert!(error.what().contains("no virt-replica on 127.0.0.1; it said:"), "{error}");
    assert!(error.hint_text().unwrap().contains("install the same version on 127.0.0.1"), "{error:?}");
}

/// Each word reaches the agent as it is, whatever the login shell thinks of it.
#[test]
fn words_are_quoted_and_a_bad_end_is_quoted() {
    let Some(sshd) = Sshd::start() else { return };
    let script = "printf '<%s>' \"$@\" >&2; exit 3";
    let words = ["sh", "-c", script, "sh", "$(touch /tmp/x)", "a'b"];
    let error = sshd.refusal(|options| options.agent_command = words.map(str::to_owned).to_vec());
    assert_eq!(error.kind(), Kind::Unavailable);
    // The account's own shell profile may have said something before.
    assert!(error.what().contains("ended with exit code 3; it said: "), "{error}");
    assert!(error.what().ends_with("<$(touch /tmp/x)><a'b><agent><--root></srv/a store>"), "{error}");
}

#[test]
fn more_channels_than_the_host_allows_are_told_apart() {
    let Some(sshd) = Sshd::start() else { return };
    let transport = sshd.transport(|_| {});
    let clients: Vec<_> = (0..3).map(|_| AgentClient::connect(&transport).unwrap()).collect();
    let error = AgentClient::connect(&transport).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
    assert!(error.hint_text().unwrap().contains("MaxSessions"), "{error:?}");
    clients.iter().for_each(|client| client.close().unwrap());
    transport.close().unwrap();
}

#[test]
fn a_master_killed_in_mid_stream_is_an_error_soon_and_a_new_one_later() {
    let Some(sshd) = Sshd::start() else { return };
    let transport = sshd.transport(|_| {});
    let client = Arc::new(AgentClient::connect(&transport).unwrap());
    let replica = client.open(&uuid()).unwrap();
    replica.begin(&begin_request(&["vda"])).unwrap();
    let [master] = sshd.masters()[..] else { panic!("{:?}", sshd.masters()) };
    let patch = vec![5; 1 << 20];
    let began = Instant::now();
    let mut killed = None;
    let error = loop {
        if killed.is_none() && client.bytes_sent() > 4 << 20 {
            kill(master);
            killed = Some(Instant::now());
        }
        if let Err(error) = replica.apply(&disk("vda"), &patch) {
            break error;
        }
        assert!(began.elapsed() < Duration::from_secs(30));
    };
    assert!(killed.expect("the stream broke by itself").elapsed() < Duration::from_secs(5));
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(error.to_string().contains("the ssh connection to 127.0.0.1 was lost"), "{error}");
    assert_eq!(replica.describe().unwrap_err().kind(), Kind::Unavailable);
    assert!(client.close().is_err());

    let client = Arc::new(AgentClient::connect(&transport).unwrap());
    client.open(&uuid()).unwrap().describe().unwrap();
    client.close().unwrap();
    transport.close().unwrap();
    eventually("no master is left", || sshd.masters().is_empty());
}

/// What a SIGKILL of this process leaves behind must not stay.
#[test]
fn a_master_that_nobody_ends_ends_by_itself() {
    let Some(sshd) = Sshd::start() else { return };
    let transport = sshd.transport(|options| options.idle_persist = Duration::from_secs(2));
    AgentClient::connect(&transport).unwrap().close().unwrap();
    assert_eq!(sshd.masters().len(), 1);
    eventually("the idle master ends", || sshd.masters().is_empty());
    drop(transport);
}
