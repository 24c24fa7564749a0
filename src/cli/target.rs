//! `--to`: a target's URL or its name in the configuration, and how ssh reaches it.

use crate::cli::globals::Globals;
use clap::Args;
use std::path::PathBuf;
use virt_replica::config::Config;
use virt_replica::error::Result;
use virt_replica::transport::ssh::SshOptions;
use virt_replica::transport::target::TargetUrl;
use virt_replica::wiring::Connection;

/// Where to, for commands that cannot do without.
#[derive(Debug, Args)]
pub struct TargetArgs {
    /// Target: ssh://[user@]host[:port][/root], local:/root, /root, or a name of the configuration
    #[arg(long, value_name = "TARGET")]
    pub to: String,
    #[command(flatten)]
    pub ssh: SshArgs,
}

#[derive(Debug, Args)]
pub struct SshArgs {
    /// Offer only this key to the target
    #[arg(long, value_name = "FILE", help_heading = "ssh")]
    identity: Option<PathBuf>,
    /// Read this ssh configuration instead of the user's
    #[arg(long, value_name = "FILE", help_heading = "ssh")]
    ssh_config: Option<PathBuf>,
    /// Know hosts by this file
    #[arg(long, value_name = "FILE", help_heading = "ssh")]
    known_hosts: Option<PathBuf>,
    /// Accept the key of a host never seen, and remember it
    #[arg(long, help_heading = "ssh")]
    accept_new_host_key: bool,
}

impl SshArgs {
    /// How ssh reaches a host that no configuration names.
    pub fn options(&self) -> SshOptions {
        SshOptions {
            accept_new_host_key: self.accept_new_host_key,
            identity_file: self.identity.clone(),
            config_file: self.ssh_config.clone(),
            known_hosts_file: self.known_hosts.clone(),
            ..SshOptions::default()
        }
    }
}

/// For commands that write to a target, and may be the first to do so.
#[derive(Debug, Clone, Copy, Args)]
pub struct CreateStore {
    /// Create the store if the target has none there (without this, `virt-replica store init` on the target does it)
    #[arg(long, env = "VIRT_REPLICA_CREATE_STORE", hide_env_values = true,
          value_parser = clap::builder::FalseyValueParser::new())]
    pub create_store: bool,
}

/// A target that was understood. Reports name it by its URL, however the operator called it: a name may be given to
/// another target tomorrow.
#[derive(Debug, Clone)]
pub struct Target {
    pub url: TargetUrl,
    pub ssh: SshOptions,
    /// The configuration wants its store created if there is none.
    create_store: bool,
}

impl Target {
    /// Understands `--to`. Options of the command line win over the configuration.
    pub fn resolve(to: &str, args: &SshArgs, config: &Config) -> Result<Target> {
        let mut ssh = SshOptions { accept_new_host_key: args.accept_new_host_key, ..SshOptions::default() };
        // Whatever has one of these in it cannot be a name that was forgotten in the configuration.
        let looks_like_url = to.contains(['/', ':', '@']);
        let mut create_store = false;
        let url = if looks_like_url && !config.targets.contains_key(to) {
            TargetUrl::parse(to)?
        } else {
            let named = config.target(to)?;
            ssh.identity_file = named.identity.clone();
            ssh.config_file = named.ssh_config.clone();
            ssh.known_hosts_file = named.known_hosts.clone();
            create_store = named.create_store;
            named.url.clone()
        };
        ssh.identity_file = args.identity.clone().or(ssh.identity_file);
        ssh.config_file = args.ssh_config.clone().or(ssh.config_file);
        ssh.known_hosts_file = args.known_hosts.clone().or(ssh.known_hosts_file);
        Ok(Target { url, ssh, create_store })
    }

    /// The way there; nothing is sent before it is needed.
    pub fn connection(&self) -> Connection {
        Connection::new(self.url.clone(), self.ssh.clone())
    }

    /// The same, for what is written there.
    pub fn connection_creating(&self, wish: CreateStore) -> Connection {
        self.connection().creating(wish.create_store || self.create_store)
    }

    /// The same, for a source: it remembers which store it has found there.
    #[cfg(feature = "libvirt")]
    pub fn connection_for_runs(&self, globals: &Globals, wish: CreateStore) -> Connection {
        self.connection_creating(wish).of_source(&globals.state_dir)
    }
}

impl TargetArgs {
    pub fn resolve(&self, globals: &Globals) -> Result<Target> {
        Target::resolve(&self.to, &self.ssh, &globals.config()?)
    }
}

/// Ends a session in order. What it was for is done: an unclean end is worth a log line, no more.
pub fn hang_up(connection: Connection) {
    if let Err(e) = connection.close() {
        tracing::debug!("the session with the target did not end in order: {}", e.chain());
    }
}
