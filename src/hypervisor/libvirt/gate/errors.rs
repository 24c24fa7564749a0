//! What a call through the gate says when it fails: what was wanted, of which domain, and libvirt's own words.

use super::Call;
use crate::error::{Error, Kind};
use std::fmt;
use virt::error::{Error as VirtError, ErrorNumber};

/// What libvirt said, without its codes' decoration.
#[derive(Debug)]
struct Said {
    message: String,
    code: u32,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "libvirt: {} (code {})", self.message, self.code)
    }
}

impl std::error::Error for Said {}

fn said(e: &VirtError) -> Said {
    Said { message: e.message().to_owned(), code: e.code().to_raw() }
}

impl Call<'_> {
    pub(super) fn place(&self, e: Error) -> Error {
        match self.domain {
            Some(domain) => e.domain(domain),
            None => e,
        }
    }

    pub(super) fn error(&self, kind: Kind, what: String) -> Error {
        self.place(Error::new(kind, what))
    }

    pub(super) fn refused(&self, e: &VirtError) -> Error {
        let kind = kind_of(e);
        let e = self.error(kind, format!("cannot {}", self.what)).source(said(e));
        if kind == Kind::Auth { e.hint(AUTH_HINT) } else { e }
    }

    pub(super) fn not_opened(&self, e: &VirtError, uri: Option<&str>) -> Error {
        let name = uri.unwrap_or("the default URI");
        let virsh = uri.map_or("virsh uri".to_owned(), |u| format!("virsh -c '{u}' uri"));
        let (kind, hint) = match kind_of(e) {
            Kind::Auth => (Kind::Auth, AUTH_HINT.to_owned()),
            _ => (Kind::Unavailable, format!("is libvirtd (or virtqemud) running there? '{virsh}' asks the same way")),
        };
        self.error(kind, format!("cannot connect to libvirt at {name}, to {}", self.what)).source(said(e)).hint(hint)
    }

    pub(super) fn lost(&self, e: &VirtError, changing: bool) -> Error {
        let what = format!("the connection to libvirt broke when it was to {}", self.what);
        self.unanswered(what, changing).source(said(e))
    }

    pub(super) fn late(&self, changing: bool) -> Error {
        let seconds = self.deadline.as_secs_f32();
        self.unanswered(format!("libvirt did not answer within {seconds:.1} s when it was to {}", self.what), changing)
            .hint(
                "libvirtd or the domain's QEMU hangs: look at 'virsh domstate', 'virsh domcontrol' and libvirtd's log; \
                 after an upgrade of QEMU libvirt first looks at its emulators, for a minute or more: then run again",
            )
    }

    fn unanswered(&self, what: String, changing: bool) -> Error {
        let doubt = if changing { "; it may have taken effect" } else { "" };
        self.error(Kind::Unavailable, what + doubt)
    }
}

const AUTH_HINT: &str = "run as root, or give this user access to libvirt (group 'libvirt', or a polkit rule)";

fn kind_of(e: &VirtError) -> Kind {
    use virt::enumutil::Enum::Known;
    match e.code() {
        Known(ErrorNumber::NoDomain) => Kind::NotFound,
        Known(
            ErrorNumber::AuthFailed
            | ErrorNumber::AuthCancelled
            | ErrorNumber::AuthUnavailable
            | ErrorNumber::AccessDenied
            | ErrorNumber::OperationDenied,
        ) => Kind::Auth,
        // Timed out: libvirt's own wait for the domain's job lock. Block copy active: any block job that is in the way,
        // and also one that is not yet ready for a pivot.
        Known(ErrorNumber::BlockCopyActive | ErrorNumber::ResourceBusy | ErrorNumber::OperationTimeout) => Kind::Busy,
        _ => Kind::Refused,
    }
}
