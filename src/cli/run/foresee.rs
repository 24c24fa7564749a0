//! What a target says of a domain while its source still lives: whether it could be brought up there. Asked after a
//! run, when the guest writes to its own images again and the point is sealed; nobody waits for it for long.

use crate::cli::speak::advice;
use crate::cli::target::Target;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use virt_replica::error::{Result, printable};
use virt_replica::name::{DomainUuid, PointId};
use virt_replica::recovery::bringup::{BringUp as _, Readiness};
use virt_replica::recovery::ready::Color;
use virt_replica::transport::target::TargetUrl;
use virt_replica::wiring::Connection;

/// How long the target may take. An answer that comes later is worth nothing to anybody: the next run asks again.
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);

/// Longest sentence of a target's that is passed on, in bytes.
const SENTENCE_MAX: usize = 400;

/// What keeps this point (`None`: the head) from being brought up on its target, a sentence each, with what to do.
/// Nothing where all is well, where the target does not say, and where target and source are one host. Asked over the
/// connection of the run.
pub fn lacks(connection: &Connection, target: &Target, uuid: &DomainUuid, point: Option<&PointId>) -> Vec<String> {
    if matches!(target.url, TargetUrl::Local { .. }) {
        return Vec::new();
    }
    match ask(connection, uuid.clone(), point.cloned()) {
        Ok(Some(readiness)) => sentences(&advice::said(readiness)),
        Ok(None) => {
            tracing::debug!("the target did not say in time whether it could bring the domain up");
            Vec::new()
        }
        // An agent that may not bring anything up, or an older one, or a host without libvirt: it keeps points all
        // the same.
        Err(e) => {
            tracing::debug!("the target does not say whether it could bring the domain up: {}", e.chain());
            Vec::new()
        }
    }
}

/// `None`: no answer in time. What still waits for it then ends with the process.
fn ask(connection: &Connection, uuid: DomainUuid, point: Option<PointId>) -> Result<Option<Readiness>> {
    let client = connection.bring_up_client()?;
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let client = Arc::new(client);
        let answer = client.bring_up(&uuid).ready(point.as_ref());
        if let Err(e) = client.close() {
            tracing::debug!("the agent that was asked did not end in order: {}", e.chain());
        }
        // The run may have gone on meanwhile.
        let _ = tell.send(answer);
    });
    told.recv_timeout(ANSWERS_WITHIN).ok().transpose()
}

fn sentences(readiness: &Readiness) -> Vec<String> {
    let red = readiness.findings.iter().filter(|f| f.color == Color::Red).take(20);
    red.map(|f| {
        let what = format!("the target could not bring it up: {}", printable(&f.what, SENTENCE_MAX));
        match &f.advice {
            Some(advice) => format!("{what}; there: {}", printable(advice, SENTENCE_MAX)),
            None => what,
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_red_is_told_at_the_source_and_in_printable_words() {
        let json = r#"{"point":"000001-0123abcd","findings":[
            {"question":"machine","color":"red","what":"no pc-q35-10.0\u001b[2J","advice":"name another"},
            {"question":"memory","color":"yellow","what":"little"},{"question":"room","color":"green","what":"much"}]}"#;
        let told = sentences(&serde_json::from_str(json).unwrap());
        assert_eq!(told.len(), 1);
        assert!(told[0].starts_with("the target could not bring it up: no pc-q35-10.0"), "{told:?}");
        assert!(told[0].ends_with("there: name another") && !told[0].contains('\u{1b}'), "{told:?}");
    }
}
