//! A definition that fits this host: written anew for it, and read by its libvirt before anything depends on that.
//!
//! libvirt stops at the first word that it does not know, and a newer libvirt writes words by itself. A guest
//! starts without most of them; so what libvirt refuses is left out, as little as possible, and told. It is the
//! same wherever a domain is looked at or brought up: what was green is what is started.

use super::definition::limits::Limits;
use super::definition::{self, Definition, Wish};
use super::mapping::Mapping;
use crate::error::Result;
use crate::hypervisor::machine::{HostView, Machines};

/// How often libvirt is asked at most about one definition: each time takes some milliseconds.
const QUESTIONS_MAX: usize = 120;

/// A definition for this host, and what both of them are judged by.
#[derive(Debug, Clone)]
pub struct Fitted {
    /// Definition for this host, without the elements that its libvirt refuses.
    pub definition: Definition,
    /// Capabilities, networks, domains and memory of this host, as libvirt told them.
    pub host: HostView,
    /// libvirt's words, why it would not start it; `None` also where nothing could be asked, which other findings
    /// tell.
    pub refused: Option<String>,
}

/// Writes the definition for this host. Touches nothing. Blocks for as long as libvirt's answers take.
pub fn fit(machines: &dyn Machines, xml: &str, wish: &Wish, mapping: &Mapping) -> Result<Fitted> {
    // Which machine it is has to be known before the host can be asked about it.
    let host = machines.host(&definition::render(xml, wish, mapping)?.machine)?;
    let mut limits = Limits::of(&host);
    limits.images_max = mapping.images_max.or(limits.images_max);
    let write = |without: &[(String, String)]| definition::render_for(xml, wish, mapping, &limits.without(without));
    let definition = write(&[])?;
    if definition.xml().is_err() || host.machine.is_err() {
        return Ok(Fitted { definition, host, refused: None });
    }
    let (definition, refused) = persuade(definition, &write, &|xml| machines.accepts(xml))?;
    Ok(Fitted { definition, host, refused })
}

type Write<'a> = &'a dyn Fn(&[(String, String)]) -> Result<Definition>;
type Ask<'a> = &'a dyn Fn(&str) -> Result<Result<(), String>>;

/// Leaves out what libvirt refuses, if there is a way that it takes; else the definition is as it was, with
/// libvirt's first words.
fn persuade(definition: Definition, write: Write, ask: Ask) -> Result<(Definition, Option<String>)> {
    let Err(first) = ask(definition.xml()?)? else { return Ok((definition, None)) };
    let mut asked = 1;
    let mut without: Vec<(String, String)> = Vec::new();
    let (mut current, mut said) = (definition.clone(), first.clone());
    'again: loop {
        for path in current.candidates(&said) {
            let mut more = without.clone();
            more.push((path, format!("is left out: libvirt here refuses it ({said})")));
            let attempt = write(&more)?;
            let Ok(xml) = attempt.xml() else { continue };
            asked += 1;
            match ask(xml)? {
                Ok(()) => return fewest(more, attempt, write, ask),
                // One word less that it stumbles over.
                Err(other) if other != said => {
                    (without, current, said) = (more, attempt, other);
                    continue 'again;
                }
                Err(_) if asked >= QUESTIONS_MAX => break 'again,
                Err(_) => {}
            }
        }
        break;
    }
    Ok((definition, Some(first)))
}

/// Puts back what libvirt takes after all.
fn fewest(
    mut without: Vec<(String, String)>,
    mut best: Definition,
    write: Write,
    ask: Ask,
) -> Result<(Definition, Option<String>)> {
    let mut at = 0;
    while at < without.len() && without.len() > 1 {
        let mut fewer = without.clone();
        fewer.remove(at);
        let attempt = write(&fewer)?;
        match attempt.xml().map(ask) {
            Ok(Ok(Ok(()))) => (without, best) = (fewer, attempt),
            _ => at += 1,
        }
    }
    Ok((best, None))
}

#[cfg(test)]
#[path = "fitting_tests.rs"]
mod tests;
