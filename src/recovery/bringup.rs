//! The port to a host that can bring a domain up from its replica: of one domain, on this host or on another.
//!
//! Who asks may lose the answer, and an order may come late. So every verb may be repeated; [`BringUp::state`] says how
//! it stands; and an order bears the handover that it belongs to, so that one which was called off is refused for ever.
//!
//! Near: `wiring::local_bringup`. Far: the agent's client. What the verbs do: [`super::failover`], docs/recovery.md.

use super::ready::{Color, Finding};
use crate::error::{Error, Kind, Result, Words};
use crate::hypervisor::Power;
use crate::name::{DiskName, DomainName, Generation, PointId, RunId};
pub use crate::recovery::record::Wanted;
use crate::recovery::record::{FailoverRecord, GaveWay};
use crate::replica::upkeep::Promoted;
use serde::{Deserialize, Serialize};

/// One domain, on the host of its replica. Methods block; `say` is told what is done now, in words.
pub trait BringUp {
    /// Whether the domain could be brought up there from this point (`None`: the head). Touches nothing.
    /// [`NotFound`](crate::error::Kind::NotFound) where there is no replica, or no such point.
    fn ready(&self, point: Option<&PointId>) -> Result<Readiness>;

    /// What [`ready`](BringUp::ready) would find of a domain that is about to come, before any point of it is there.
    /// What that host itself has of the domain counts as gone: it is about to give way. Touches nothing.
    fn ready_for(&self, coming: &Coming) -> Result<Vec<Finding>>;

    /// How it stands there. Waits for nobody, also not for a verb that is at work.
    fn state(&self) -> Result<Standing>;

    /// Brings the domain up from exactly this point, or goes on where an earlier order of it was left: durable, and
    /// started, when it returns. [`Busy`](crate::error::Kind::Busy) while another hand is at work,
    /// [`Refused`](crate::error::Kind::Refused) once the handover was called off. After
    /// [`Unavailable`](crate::error::Kind::Unavailable) and [`Interrupted`](crate::error::Kind::Interrupted) it may
    /// have been done, or be done yet: ask [`BringUp::state`].
    fn bring_up(&self, order: &Order, say: &dyn Fn(&str)) -> Result<FailoverRecord>;

    /// Calls an order off: what it brought up is ended there, what the guest wrote there is lost, and an order of the
    /// same handover that comes later is refused. Durable when it returns: from then on the source may run the domain.
    /// [`Conflict`](crate::error::Kind::Conflict) where the domain was brought up from another point, `Refused` once
    /// that was committed; nothing was called off then.
    fn call_off(&self, order: &Order, say: &dyn Fn(&str)) -> Result<()>;

    /// Throws away whatever failover there is; `NotFound` without one.
    fn undo(&self, say: &dyn Fn(&str)) -> Result<FailoverRecord>;

    /// Makes the failover the truth: it cannot be undone any more. Gives the generation from then on.
    fn commit(&self, say: &dyn Fn(&str)) -> Result<Generation>;

    /// What the host itself has of the domain, which is off there, becomes a pinned point of its store, and its
    /// definition goes: see [`give_way`](crate::recovery::retire_home_copy).
    fn give_way(&self, say: &dyn Fn(&str)) -> Result<GaveWay>;
}

/// What is to be brought up, and for which handover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Id of the handover that this order belongs to; after it is called off, the target refuses the order.
    pub handover: RunId,
    /// Recovery point that the target brings the domain up from, and no other.
    pub point: PointId,
    /// Autostart and disk format that the domain gets there. Defaults if an older source does not send them.
    #[serde(default)]
    pub wanted: Wanted,
}

/// A domain as its next point would bring it, told before that point is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coming {
    /// Name of the domain at its source; the host checks it against its own domains.
    pub name: DomainName,
    /// The definition that would travel.
    #[serde(with = "chunks")]
    pub definition: String,
    /// Disks that the next point would contain.
    pub disks: Vec<DiskName>,
    /// UEFI variables travel with it.
    #[serde(default)]
    pub nvram: bool,
    /// The state of a TPM travels with it.
    #[serde(default)]
    pub tpm: bool,
}

/// A definition in a message: its bytes in base64, in pieces. What is one text would be cut and cleaned of its line
/// ends where it comes in ([`words`](crate::words)), as every word of a peer is.
mod chunks {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    /// Bytes of a piece; four thirds of that travel.
    const PIECE: usize = 3 << 10;

    pub fn serialize<S: Serializer>(text: &str, to: S) -> Result<S::Ok, S::Error> {
        text.as_bytes().chunks(PIECE).map(|piece| STANDARD.encode(piece)).collect::<Vec<_>>().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
        let pieces = Vec::<String>::deserialize(from)?;
        let bytes: Result<Vec<Vec<u8>>, _> = pieces.iter().map(|piece| STANDARD.decode(piece)).collect();
        String::from_utf8(bytes.map_err(D::Error::custom)?.concat()).map_err(D::Error::custom)
    }
}

/// Refuses with the first red finding, in the words of every verb that needs the domain to come up on `host`.
pub fn refuse_red(findings: &[Finding], host: &str) -> Result<()> {
    match findings.iter().find(|f| f.color == Color::Red) {
        None => Ok(()),
        Some(red) => {
            let what = format!("it cannot be brought up on {host}: {}", red.what);
            Err(red.advise(Error::new(Kind::Conflict, what)))
        }
    }
}

/// Whether a point could be brought up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// The point that was judged: the requested one, or the head if none was named.
    pub point: PointId,
    /// One finding for each question that was answered. A red finding prevents the failover.
    pub findings: Vec<Finding>,
    /// Lines for recovery.yaml of that host, which an operator may want to paste. None: there are none, or its agent is
    /// older.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub suggestion: Vec<String>,
}

impl Readiness {
    /// With every advice in this program's words: see [`Finding::spoken`].
    pub fn spoken(self, words: Option<Words>) -> Readiness {
        Readiness { findings: self.findings.into_iter().map(|finding| finding.spoken(words)).collect(), ..self }
    }

    /// The first finding that keeps it from being tried.
    pub fn red(&self) -> Option<&Finding> {
        self.findings.iter().find(|f| f.color == Color::Red)
    }
}

/// How a domain stands on the host of its replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The promotion that is in force: while there is one the source is refused.
    pub promoted: Option<Promoted>,
    /// The failover on record.
    pub failover: Option<FailoverRecord>,
    /// `None`: libvirt there does not know the domain.
    pub power: Option<Power>,
}
