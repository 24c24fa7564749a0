//! A handover while it lasts: what each step does. Which one is next is [`next`](super::next)'s to say.

use super::{
    ASK_EVERY, ASK_WITHIN, HandoverRecord, HandoverState, LOOK_EVERY, PRESS_EVERY, Ports, Report, Request, Stage,
    Verdict, judge, order_of, put_back,
};
use crate::error::{Error, Kind, Result, advice};
use crate::failpoint;
use crate::hypervisor::Power;
use crate::hypervisor::departure::Asking;
use crate::recovery::bringup::{Order, refuse_red};
use crate::replicate::state::handover_record::Learned;
use crate::replicate::state::report::millis;
use jiff::Timestamp;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A handover while it lasts.
pub(super) struct Run<'a> {
    ports: &'a Ports<'a>,
    state: &'a HandoverState,
    request: &'a Request,
    pub(super) record: Option<HandoverRecord>,
    pub(super) sent_by_us: bool,
    /// Nobody had asked the target before this process.
    first: bool,
    forced_off: bool,
    warnings: Vec<String>,
}

impl<'a> Run<'a> {
    pub(super) fn new(ports: &'a Ports<'a>, state: &'a HandoverState, request: &'a Request) -> Result<Run<'a>> {
        let record = state.record()?;
        if let Some(record) = record.as_ref().filter(|record| record.to != request.to) {
            return Err(record.refusal(Power::Off));
        }
        let first = record.as_ref().is_none_or(|record| !record.asked);
        Ok(Run { ports, state, request, record, sent_by_us: false, first, forced_off: false, warnings: Vec::new() })
    }

    pub(super) fn held(&self) -> &HandoverRecord {
        self.record.as_ref().expect("only asked for once it was begun")
    }

    /// Changes the record, durably.
    fn set(&mut self, change: impl FnOnce(&mut HandoverRecord)) -> Result<()> {
        let mut record = self.held().clone();
        change(&mut record);
        self.state.write(&record)?;
        self.record = Some(record);
        Ok(())
    }

    fn order(&self) -> Result<Order> {
        let record = self.held();
        let point =
            record.point.clone().ok_or_else(|| Error::new(Kind::Corrupt, "the handover's record has no point"))?;
        Ok(order_of(record, point))
    }

    fn stopped(&self) -> Result<()> {
        match self.ports.stop.load(Ordering::Relaxed) {
            true => Err(Error::new(Kind::Interrupted, "stopped by a signal")),
            false => Ok(()),
        }
    }

    /// Whatever is wrong is found here, while the guest works and nothing was changed.
    pub(super) fn begin(&mut self, runs: bool) -> Result<()> {
        let (ports, request) = (self.ports, self.request);
        let look = (ports.look)()?;
        if !look.persistent {
            return Err(Error::new(Kind::Conflict, "the domain is transient: shut down it would be gone here")
                .hint("give it a definition first: virsh dumpxml DOMAIN >FILE; virsh define FILE"));
        }
        if look.managed_save && !runs {
            return Err(Error::new(Kind::Conflict, "the domain has a saved memory image, which would not travel")
                .hint("start it and shut it down, or give the image up: virsh managedsave-remove DOMAIN"));
        }
        if ports.machines.power(&request.uuid)? == Some(Power::Paused) && !request.force_off {
            return Err(Error::new(Kind::Conflict, "the domain is paused: its guest cannot shut down")
                .advise(advice::Handover::ResumeOrForceOff));
        }
        let there = (ports.there)()?;
        if let Some(promoted) = there.state()?.promoted {
            return Err(Error::new(Kind::Conflict, promoted.why()).advise(promoted.advice()));
        }
        let old = |head: Timestamp| {
            let age = (ports.clock)().duration_since(head);
            age.is_negative() || age.unsigned_abs() > request.head_age_max
        };
        let head = (ports.head)()?;
        if head.is_none() || (runs && head.is_some_and(old)) {
            (ports.say)("bringing the target up to date while the guest works");
            let sent = (ports.run)(None)?;
            self.warnings.extend(sent.warnings);
        }
        refuse_red(&there.ready(None)?.findings, &request.to)?;
        // The newest point may be older than the last change here: what the last run will meet is looked at as well.
        (ports.preflight)(&*there)?;
        self.stopped()?;
        let record = HandoverRecord {
            format: 1,
            handover: request.handover.clone(),
            domain: request.domain.clone(),
            uuid: request.uuid.clone(),
            to: request.to.clone(),
            since: (ports.clock)(),
            stage: Stage::Begun,
            ran: runs,
            autostart: ports.custody.autostart(&request.uuid)?,
            asked: false,
            commit: request.commit,
            disk_format: request.disk_format,
            down_from: None,
            off_at: None,
            point: None,
            last_run_bytes: 0,
            sent_at: None,
            up_at: None,
        };
        self.state.write(&record)?;
        self.record = Some(record);
        failpoint!("h1");
        Ok(())
    }

    pub(super) fn secure(&mut self) -> Result<()> {
        let uuid = &self.request.uuid;
        self.ports.custody.set_autostart(uuid, false)?;
        let since = self.held().since;
        let words = format!("being handed to {} since {since:.0}: do not start it here", self.request.to);
        self.ports.custody.set_mark(uuid, Some(&words))?;
        failpoint!("h2");
        self.set(|record| record.stage = Stage::Secured)
    }

    /// Asks the guest to go down, and waits.
    pub(super) fn shut_down(&mut self) -> Result<()> {
        let (ports, request) = (self.ports, self.request);
        // What somebody started in the middle is no part of what was sent.
        self.sent_by_us = false;
        let from = (ports.clock)();
        self.set(|record| {
            record.stage = Stage::Secured;
            record.down_from = Some(from);
            record.point = None;
        })?;
        (ports.say)("shutting the guest down");
        let by_agent = (ports.look)()?.guest_agent
            && match ports.custody.ask_to_shut_down(&request.uuid, Asking::GuestAgent) {
                Ok(()) => true,
                Err(e) => {
                    self.warnings.push(format!("the guest agent did not shut it down: {}", e.chain()));
                    false
                }
            };
        let (mut waited, mut pressed_at) = (Duration::ZERO, by_agent.then_some(Duration::ZERO));
        let mut unasked = None;
        loop {
            let power = ports.machines.power(&request.uuid)?.unwrap_or(Power::Off);
            if power == Power::Off {
                return Ok(());
            }
            self.stopped()?;
            // One that is paused hears nothing.
            if waited >= request.timeout || (power == Power::Paused && request.force_off) {
                break;
            }
            if pressed_at.is_none_or(|at| waited >= at + PRESS_EVERY) {
                unasked = ports.custody.ask_to_shut_down(&request.uuid, Asking::PowerButton).err();
                pressed_at = Some(waited);
            }
            (ports.sleep)(LOOK_EVERY);
            waited += LOOK_EVERY;
        }
        if request.force_off {
            self.warnings.push(format!(
                "the guest did not shut down within {} s and was ended as by a power cut: what it had not flushed is lost",
                waited.as_secs()
            ));
            self.forced_off = true;
            return ports.machines.destroy(&request.uuid);
        }
        let what = format!("the guest did not shut down within {} s", request.timeout.as_secs());
        let error = Error::new(Kind::Refused, what);
        Err(match unasked {
            Some(e) => error.source(e),
            None => error,
        }
        .advise(advice::Handover::WaitOrForceOff))
    }

    pub(super) fn note_off(&mut self) -> Result<()> {
        let now = (self.ports.clock)();
        self.set(|record| {
            record.stage = Stage::Off;
            record.off_at = Some(now);
        })?;
        failpoint!("h3");
        Ok(())
    }

    /// The last run: of a domain that is off.
    pub(super) fn send(&mut self) -> Result<()> {
        self.stopped()?;
        (self.ports.say)("sending what is left");
        let handover = self.held().handover.clone();
        let sent = (self.ports.run)(Some(&handover))?;
        self.warnings.extend(sent.warnings);
        if !sent.off || self.held().off_at.is_some_and(|off| sent.frozen_at < off) {
            // It was started meanwhile: the loop sees to that.
            return match self.ports.machines.power(&self.request.uuid)? {
                Some(Power::Off) => Err(Error::new(Kind::Busy, "the domain was started and stopped while it was sent")),
                _ => Ok(()),
            };
        }
        let now = (self.ports.clock)();
        self.set(|record| {
            record.stage = Stage::Sent;
            record.point = Some(sent.point);
            record.last_run_bytes = sent.bytes;
            record.sent_at = Some(now);
        })?;
        self.sent_by_us = true;
        failpoint!("h4");
        Ok(())
    }

    /// From here on the domain is the target's to start.
    pub(super) fn commit_to_asking(&mut self) -> Result<()> {
        self.stopped()?;
        self.set(|record| {
            record.stage = Stage::Asked;
            record.asked = true;
        })?;
        failpoint!("h5");
        Ok(())
    }

    pub(super) fn ask(&mut self) -> Result<()> {
        let (ports, order) = (self.ports, self.order()?);
        let mut waited = Duration::ZERO;
        loop {
            let answer = (ports.there)().and_then(|there| there.bring_up(&order, ports.say));
            let error = match answer {
                Ok(_) => break,
                Err(e) => e,
            };
            let standing = match error.kind() {
                Kind::Unavailable | Kind::Interrupted | Kind::Busy => None,
                _ => (ports.there)().and_then(|there| there.state()).ok(),
            };
            match judge(&error, self.first, &order, standing.as_ref()) {
                Verdict::Again if waited < ASK_WITHIN => {
                    (ports.say)(&format!("asking again: {}", error.chain()));
                    (ports.sleep)(ASK_EVERY);
                    waited += ASK_EVERY;
                }
                Verdict::No => {
                    (ports.say)(&format!("the target says no: {}", error.chain()));
                    let mut record = self.held().clone();
                    put_back(ports, self.state, &mut record, None).map_err(|e| {
                        let (domain, to) = (record.domain.to_string(), record.to.to_string());
                        let what = format!("{}; and the domain could not be put back as it was", error.chain());
                        Error::new(e.kind(), what).source(e).advise(advice::Handover::Abort { domain, to })
                    })?;
                    self.record = None;
                    return Err(error);
                }
                Verdict::Again | Verdict::Unclear => return Err(self.unanswered(error)),
            }
        }
        failpoint!("h6");
        let now = (ports.clock)();
        self.set(|record| {
            record.stage = Stage::Moved;
            record.up_at = Some(now);
        })?;
        failpoint!("h7");
        Ok(())
    }

    /// What the next handover of this domain is foretold from.
    pub(super) fn learn(&self, report: &Report) {
        let record = self.held();
        let start = record.up_at.zip(record.sent_at).map(|(up, sent)| up.duration_since(sent).unsigned_abs());
        let learned = Learned { shutdown_ms: report.shutdown_ms, start_ms: start.map(millis) };
        if let Err(e) = self.state.learn(&learned) {
            tracing::debug!("how long it took was not kept: {}", e.chain());
        }
    }

    /// The words for whoever looks at the definition. The record is what counts.
    pub(super) fn mark_moved(&mut self) {
        let record = self.held();
        let words = format!("lives on {} since {:.0}: do not start it here", record.to, record.since);
        if let Err(e) = self.ports.custody.set_mark(&self.request.uuid, Some(&words)) {
            self.warnings.push(format!("its definition here does not say where it lives: {}", e.chain()));
        }
    }

    fn unanswered(&self, error: Error) -> Error {
        let (domain, to) = (self.request.domain.to_string(), self.request.to.to_string());
        Error::new(
            error.kind(),
            format!("{to} was asked to start the domain and did not say that it did: it may run there"),
        )
        .source(error)
        .advise(advice::Handover::AskAgainOrAbort { domain, to })
    }

    /// What was begun and did not come to asking is put back, and the error told. What was asked stays as it is.
    pub(super) fn put_back_after(&mut self, error: Error) -> Error {
        let Some(mut record) = self.record.take().filter(|record| !record.asked) else { return error };
        (self.ports.say)("putting the domain back as it was");
        match put_back(self.ports, self.state, &mut record, None) {
            Ok(()) => error,
            Err(e) => {
                let what = format!("{}; and the domain could not be put back as it was: {}", error.chain(), e.chain());
                let (domain, to) = (record.domain.to_string(), record.to.to_string());
                Error::new(error.kind(), what).advise(advice::Handover::Abort { domain, to })
            }
        }
    }

    pub(super) fn report(&self) -> Report {
        let record = self.held();
        let between = |from: Option<Timestamp>, to: Option<Timestamp>| {
            let span = to?.duration_since(from?);
            Some(millis(span.unsigned_abs())).filter(|_| record.ran)
        };
        Report {
            domain: record.domain.clone(),
            uuid: record.uuid.clone(),
            to: record.to.clone(),
            handover: record.handover.clone(),
            point: record.point.clone(),
            downtime_ms: between(record.off_at, record.up_at),
            shutdown_ms: between(record.down_from, record.off_at),
            last_run_ms: between(record.off_at, record.sent_at),
            last_run_bytes: record.last_run_bytes,
            forced_off: self.forced_off,
            warnings: self.warnings.clone(),
        }
    }
}
