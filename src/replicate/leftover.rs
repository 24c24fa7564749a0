//! What an earlier run left behind, and the way back from there: for step 1 of every run, and for `doctor`.

use super::backup;
use super::capture::pending;
use super::cycle::Ports;
use super::freeze_hooks;
use super::journal::{Journal, Record};
use super::quiesce;
use super::settle::{Account, Goal, Outcome, SettleOptions, Settler, halt_error};
use super::stopped;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::Hypervisor;
use crate::name::DomainUuid;

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
    account.pause = settler.account.pause;
    stopped::conclude(ports.hypervisor, journal, uuid, left_open.is_some(), &mut account);
    Ok((Some(record), account, left_open))
}

/// The copy of the record in the domain's own metadata: the one that survives the loss of our state directory.
pub fn record_in_domain(hypervisor: &dyn Hypervisor, uuid: &DomainUuid) -> Result<Option<Record>> {
    let domain = match hypervisor.observe(uuid) {
        Ok(domain) => domain,
        Err(e) if e.kind() == Kind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let Some(text) = domain.record else { return Ok(None) };
    let record: Record = serde_json::from_str(&text).map_err(|e| {
        Error::new(Kind::Corrupt, "the record in the domain's metadata cannot be understood")
            .source(e)
            .domain(&domain.name)
            .hint("it may be a newer virt-replica's; `virsh metadata DOMAIN https://virt-replica.org/xmlns/record/1` shows it")
    })?;
    if record.uuid != *uuid || record.format != 1 {
        return Err(Error::new(Kind::Corrupt, "the record in the domain's metadata is another domain's or version's")
            .domain(&domain.name)
            .hint("a clone made of this domain's XML carries it along: remove it with `virsh metadata DOMAIN URI --remove`"));
    }
    Ok(Some(record))
}
