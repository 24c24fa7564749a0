//! What protects a file on its way: encrypted for whoever may read it (age), and signed by whoever made it (minisign).
//!
//! The signature is outside: it covers the bytes as they travel. A courier, or a store of objects, checks it without
//! being able to read them, and nothing is parsed or decrypted before the signer is verified.
//!
//! Invariants
//! - A reader that was told to check a signature reports the end of its input only if the signature is right over all
//!   that it handed out. Whoever waits for the end before anything counts cannot be deceived, and a file that is
//!   changed between two looks at it makes no difference.
//! - Keys never show: neither in errors nor in a `Debug`.
//!
//! Formats: docs/formats/envelope.md.

mod aside;
mod crypt;
mod keyfile;
pub mod look;
mod sign;

pub use crypt::{Identities, Recipients};
pub use sign::{PublicKey, Signer};

use crate::error::{Error, Kind, Result, advice};
use age::stream::StreamWriter;
use serde::Serialize;
use sign::{Signing, Verifying};
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, Write};

/// What a signature's name has more than that of its file.
pub const SIGNATURE_SUFFIX: &str = ".minisig";

/// How a file is protected that is written.
#[derive(Default)]
pub struct Wrap {
    /// Keys that the file is encrypted for. `None`: the file is not encrypted.
    pub recipients: Option<Recipients>,
    /// Key that signs the file, and the signature's comment. `None`: the file is not signed.
    pub signer: Option<Signer>,
}

/// A writer that encrypts, then signs. Without [`Wrapped::finish`] nothing can be done with what was written.
pub struct Wrapped<W: Write>(Layer<W>);

enum Layer<W: Write> {
    Open(Signing<W>),
    Encrypted(StreamWriter<Signing<W>>),
}

impl<W: Write> Wrapped<W> {
    /// Begins a protected file on `out`, and writes the header of the encryption if there is one.
    pub fn new(out: W, wrap: Wrap) -> Result<Self> {
        let signing = Signing::new(out, wrap.signer)?;
        Ok(Wrapped(match wrap.recipients {
            Some(recipients) => Layer::Encrypted(recipients.encrypt(signing)?),
            None => Layer::Open(signing),
        }))
    }

    /// Ends it: what was written to, flushed, and the signature, if there is to be one.
    pub fn finish(self) -> Result<(W, Option<String>)> {
        let signing = match self.0 {
            Layer::Open(signing) => signing,
            Layer::Encrypted(stream) => stream.finish().map_err(|e| Error::from_io("cannot write the file", e))?,
        };
        signing.finish()
    }
}

impl<W: Write> Write for Wrapped<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Layer::Open(out) => out.write(bytes),
            Layer::Encrypted(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Layer::Open(out) => out.flush(),
            Layer::Encrypted(out) => out.flush(),
        }
    }
}

/// How the protection of a file that is read is taken off.
#[derive(Default)]
pub struct Unwrap {
    /// Keys that can decrypt the file. `None`: an encrypted file is refused with `Auth`.
    pub identities: Option<Identities>,
    /// Only what this key signed is read to its end.
    pub key: Option<PublicKey>,
}

/// What a file was protected by. The JSON of this struct is a contract with scripts: fields are added, never renamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Protection {
    /// The file was encrypted.
    pub encrypted: bool,
    /// What the signature says beside the bytes, signed as they are. To be believed once the file was read to its end;
    /// absent where no signature was checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signed: Option<String>,
}

/// A file with its protection taken off as it is read.
pub struct Opened {
    /// Content without protection. With a signature, an error at its end means that nothing of it counts.
    pub input: Box<dyn Read + Send>,
    /// Protection that the file had.
    pub protection: Protection,
}

impl Unwrap {
    /// `signature`: the text of it, where one is to be checked.
    pub fn open(&self, input: impl Read + Send + 'static, signature: Option<&str>) -> Result<Opened> {
        let (input, signed) = self.verifying(Box::new(input), signature)?;
        self.decrypting(input, signed)
    }

    /// As [`Unwrap::open`]: a file is read twice, so that nothing is taken apart that was not signed. What counts is
    /// the second time, over the same bytes that are handed out.
    pub fn open_file(&self, mut file: File, signature: Option<&str>) -> Result<Opened> {
        self.verify(&mut file, signature)?;
        self.open(file, signature)
    }

    /// Reads a regular file for its signature alone, and goes back to its beginning: what the signature says beside the
    /// bytes. `None` where there is no key to check with, and of what can be read only once.
    pub fn verify(&self, file: &mut File, signature: Option<&str>) -> Result<Option<String>> {
        let cannot = |e| Error::from_io("cannot read the file", e);
        if self.key.is_none() || !file.metadata().map_err(cannot)?.is_file() {
            return Ok(None);
        }
        let copy = file.try_clone().map_err(cannot)?;
        let (mut input, signed) = self.verifying(Box::new(copy), signature)?;
        io::copy(&mut input, &mut io::sink()).map_err(cannot)?;
        file.rewind().map_err(cannot)?;
        Ok(signed)
    }

    fn verifying(
        &self,
        input: Box<dyn Read + Send>,
        signature: Option<&str>,
    ) -> Result<(Box<dyn Read + Send>, Option<String>)> {
        match (&self.key, signature) {
            (None, _) => Ok((input, None)),
            (Some(_), None) => {
                Err(Error::new(Kind::Usage, "there is no signature to be checked").advise(advice::Image::NameSignature))
            }
            (Some(key), Some(signature)) => {
                let (verifying, comment) = Verifying::new(input, key, signature)?;
                Ok((Box::new(verifying), Some(comment)))
            }
        }
    }

    fn decrypting(&self, mut input: Box<dyn Read + Send>, signed: Option<String>) -> Result<Opened> {
        let mut beginning = Vec::new();
        let read = (&mut input).take(crypt::BEGINNING_LEN as u64).read_to_end(&mut beginning);
        read.map_err(|e| Error::from_io("cannot read the file", e))?;
        let encrypted = crypt::is_encrypted(&beginning)?;
        let whole = Cursor::new(beginning).chain(input);
        let input: Box<dyn Read + Send> = match (encrypted, &self.identities) {
            (false, _) => Box::new(whole),
            (true, Some(identities)) => Box::new(identities.decrypt(whole)?),
            (true, None) => {
                return Err(Error::new(Kind::Auth, "the file is encrypted (age)").advise(advice::Image::NameIdentity));
            }
        };
        Ok(Opened { input, protection: Protection { encrypted, signed } })
    }
}

#[cfg(test)]
mod tests;
