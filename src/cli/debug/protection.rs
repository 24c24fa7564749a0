//! How a file is protected, as far as it says so itself; and its content, where it is open or a key was named.

use super::file;
use super::page::{Page, clean};
use crate::cli::plain::envelope::{KeyArgs, SIGNATURE_MAX, beside};
use serde::Serialize;
use std::io::Read;
use std::path::Path;
use virt_replica::envelope::look::{self, BEGINNING_LEN, Encrypted, SignatureSeen};
use virt_replica::error::{Kind, Result};

/// How a file is protected. Without a key to check it with, a signature proves nothing.
#[derive(Debug, Clone, Serialize)]
pub struct Protection {
    /// `null`: it is not encrypted.
    pub encrypted: Option<Encrypted>,
    /// It was decrypted, with a key that was named.
    pub decrypted: bool,
    /// Of the `.minisig` file beside it; `null`: there is none.
    pub signature: Option<SignatureSeen>,
    /// Why the file beside it is no signature.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signature_error: Option<String>,
    /// The signature is right over the whole file, by the key that was named.
    pub verified: bool,
}

/// A file, and its content unless that is encrypted and no key was named.
pub struct Protected {
    pub protection: Protection,
    /// Of the file as it lies there.
    pub bytes: u64,
    pub content: Option<Box<dyn Read + Send>>,
}

pub fn open(path: &Path, keys: &KeyArgs) -> Result<Protected> {
    let input = file::open(path)?;
    let encrypted = look::encrypted(&input.beginning(path, BEGINNING_LEN)?);
    let text = signature_text(&beside(path))?;
    let seen = text.as_deref().map(look::signature).transpose();
    let (signature, signature_error) = match seen {
        Ok(seen) => (seen, None),
        Err(e) => (None, Some(clean(e.chain()))),
    };
    let (bytes, mut file) = (input.len, input.file);
    // A signature is checked also of a file that stays closed: it is over the bytes as they travel.
    let verified = keys.verify(&mut file, text.as_deref())?.is_some();
    let opened = match encrypted.is_none() || keys.decrypts() {
        true => Some(keys.open_file(file, text.as_deref())?),
        false => None,
    };
    let decrypted = opened.as_ref().is_some_and(|opened| opened.protection.encrypted);
    let protection = Protection { encrypted, decrypted, signature, signature_error, verified };
    Ok(Protected { protection, bytes, content: opened.map(|opened| opened.input) })
}

/// The text of a signature; `None` if there is none.
fn signature_text(path: &Path) -> Result<Option<String>> {
    match file::open(path) {
        Ok(input) => {
            let mut bytes = Vec::new();
            let read = input.into_reader().take(SIGNATURE_MAX).read_to_end(&mut bytes);
            read.map_err(|e| virt_replica::error::Error::io("cannot read the signature", path, e))?;
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        }
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

impl Protection {
    pub fn page(&self, page: &mut Page) {
        if let Some(encrypted) = &self.encrypted {
            page.line("encrypted", describe(encrypted));
            if !self.decrypted {
                page.line("", "not decrypted: name the file with your key (--decrypt-with FILE) to look inside");
            }
        }
        if let Some(seen) = &self.signature {
            let checked = match self.verified {
                true => "the signature is right, by the key that was named",
                false => "not checked: name the public key (--verify-with KEY) to check it",
            };
            let old = if seen.hashed { "" } else { ", in the old way, without a hash" };
            page.line("signed", format!("by key {}{old}: {}", seen.key_id, seen.comment));
            page.line("", checked);
        }
        page.maybe("signed", self.signature_error.as_ref());
    }
}

fn describe(encrypted: &Encrypted) -> String {
    if encrypted.armored {
        return "by age, in armor; decrypt it with age -d, and look into what comes out".to_owned();
    }
    let recipients = match encrypted.recipients.as_slice() {
        [] => "no recipient".to_owned(),
        kinds => kinds.iter().map(|(kind, count)| format!("{count} x {kind}")).collect::<Vec<_>>().join(", "),
    };
    let cut = if encrypted.whole { "" } else { "; its header does not end" };
    format!("by age {}, for {recipients} (age does not write down who they are){cut}", encrypted.version)
}
