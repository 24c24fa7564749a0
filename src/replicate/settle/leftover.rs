//! What an earlier run left behind, and the way back from there: for step 1 of every run, and for `doctor`.

use super::account::Account;
use super::halts::halt_error;
use super::observe::record_in_domain;
use super::stopped;
use crate::error::Result;
use crate::name::DomainUuid;
use crate::replicate::capture::{backup, freeze_hooks, pending, quiesce};
use crate::replicate::run::Ports;
use crate::replicate::settle::options::SettleOptions;
use crate::replicate::settle::{Goal, Outcome, Settler};
use crate::replicate::state::journal::Journal;
use crate::replicate::state::record::Record;

/// Settles one domain from its open record, if it has one. Returns the record that was found, what was done, and what
/// is left open.
pub fn settle_domain(
    ports: &Ports,
    journal: &Journal,
    uuid: &DomainUuid,
    options: &SettleOptions,
) -> Result<(Option<Record>, Account, Option<String>)> {
    // A backup job stands in the way of a commit, and the other way round there is none.
    let mut account = Account::default();
    quiesce::settle(ports.hypervisor, ports.guest, journal, uuid)?.note(&mut account);
    account.alarms.extend(freeze_hooks::settle(journal)?);
    account.steps.extend(backup::settle(ports.hypervisor, ports.backups, journal, uuid)?);
    let record = match journal.record()? {
        Some(record) => Some(record),
        None => record_in_domain(ports.hypervisor, uuid)?,
    };
    let Some(record) = record else {
        stopped::conclude(ports.hypervisor, journal, uuid, false, &mut account);
        return Ok((None, account, None));
    };
    let mut guard = (ports.guard)(uuid)?;
    // A record that only the domain remembered is ours again from now on.
    journal.write(&record)?;
    let mut settler = Settler::new(ports.hypervisor, journal, record.clone(), guard.as_mut(), options.clone());
    let outcome = settler.run(Goal::Settled)?;
    let left_open = match outcome {
        Outcome::Reached => None,
        Outcome::Pending(disk) => Some(pending(&disk)),
        Outcome::Halted(halt) => Some(halt_error(&settler.record, &halt).chain()),
    };
    account.steps.append(&mut settler.account.steps);
    account.alarms.append(&mut settler.account.alarms);
    account.pauses = settler.account.pauses;
    stopped::conclude(ports.hypervisor, journal, uuid, left_open.is_some(), &mut account);
    Ok((Some(record), account, left_open))
}
