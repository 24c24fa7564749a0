//! `set-generation`: on a target, sets the generation of a replica right that a peer drove too far.

use crate::cli::globals::Globals;
use crate::cli::speak::output::{Exit, Output, print, print_json};
use clap::Args;
use serde_json::json;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use virt_replica::error::{Error, Kind, Result};
use virt_replica::name::{DomainName, Generation};
use virt_replica::transport::target::ROOT_DEFAULT;
use virt_replica::wiring;

#[derive(Debug, Args)]
#[command(after_help = "\
Each change of direction (failover, failback, migration) raises the generation by one. A
source of a lower generation is refused for good. A hostile or broken source can raise it
so far that the honest source is refused. Look first which generation the honest source
has: its runs name both numbers. No point and no byte of a disk is changed.")]
pub struct SetGenerationArgs {
    /// Name or UUID of the domain
    domain: String,
    /// The replica's generation from now on: sources of this or a later one are accepted, older ones are refused
    #[arg(value_parser = clap::value_parser!(u64).range(1..=Generation::MAX.0))]
    generation: u64,
    /// The store on this host
    #[arg(long, value_name = "DIR", default_value = ROOT_DEFAULT)]
    root: PathBuf,
    /// The domain's name again, instead of typing it when asked
    #[arg(long, value_name = "NAME")]
    confirm: Option<String>,
    /// Print JSON for scripts
    #[arg(long)]
    pub json: bool,
}

pub fn set_generation(args: &SetGenerationArgs, _: &Globals, output: Output) -> Result<Exit> {
    let found = wiring::stores::find_generation(&args.root, &args.domain)?;
    let generation = Generation(args.generation);
    let question = format!(
        "The replica of {} ({}) is of generation {}. From now on it is of generation {generation}.",
        found.name, found.uuid, found.generation
    );
    confirm(args, &found.name, &question)?;
    wiring::stores::set_generation(&args.root, &found.uuid, generation).map_err(|e| e.domain(&found.name))?;
    match output.json {
        true => print_json(&json!({
            "domain": found.name, "uuid": found.uuid, "generation_before": found.generation, "generation": generation,
        }))?,
        false => print(&format!("the replica of {} is of generation {generation} now", found.name))?,
    }
    Ok(Exit::Done)
}

/// The domain's name, from the command line or from the keyboard: the number alone is typed too easily.
fn confirm(args: &SetGenerationArgs, name: &DomainName, question: &str) -> Result<()> {
    let typed = match &args.confirm {
        Some(typed) => typed.clone(),
        None if std::io::stdin().is_terminal() => {
            let mut stderr = std::io::stderr();
            let asked =
                write!(stderr, "{question}\nType the name of the domain to go on: ").and_then(|()| stderr.flush());
            let mut line = String::new();
            asked
                .and_then(|()| std::io::stdin().read_line(&mut line))
                .map_err(|e| Error::from_io("cannot ask for the domain's name", e))?;
            line.trim_end_matches(['\n', '\r']).to_owned()
        }
        None => {
            return Err(Error::new(Kind::Usage, "nobody is there to confirm this")
                .hint(format!("{question} Add `--confirm {name}` to the command")));
        }
    };
    match typed == name.as_str() {
        true => Ok(()),
        false => Err(Error::new(Kind::Usage, "that is not the domain's name; nothing was changed").domain(name)),
    }
}
