//! Encryption: the format of age, version 1, for X25519 keys.

use super::keyfile;
use crate::error::{Error, Kind, Result, advice};
use age::stream::{StreamReader, StreamWriter};
use age::x25519::Recipient;
use age::{DecryptError, Decryptor, Encryptor, Identity, IdentityFile};
use std::io::{self, Read, Write};
use std::path::Path;

/// How files begin that age wrote.
pub(super) const BANNER: &[u8] = b"age-encryption.org/";
pub(super) const ARMOR: &[u8] = b"-----BEGIN AGE ENCRYPTED FILE-----";

/// Bytes that tell whether a file is encrypted.
pub(super) const BEGINNING_LEN: usize = ARMOR.len();

/// Whether a file that begins so is encrypted. `Usage` if it is in a way that is not read here.
pub(super) fn is_encrypted(beginning: &[u8]) -> Result<bool> {
    match beginning {
        ARMOR => Err(Error::new(Kind::Usage, "the file is encrypted (age), and in armor, as for a letter")
            .advise(advice::Image::DecryptInPipe { key_file: true })),
        _ => Ok(beginning.starts_with(BANNER)),
    }
}

/// Whom a file is for; at least one.
pub struct Recipients(Vec<Recipient>);

impl Recipients {
    /// Each is a recipient (`age1...`), or a file with one on each line.
    pub fn parse<'a>(given: impl IntoIterator<Item = &'a str>) -> Result<Option<Recipients>> {
        let mut all = Vec::new();
        for text in given {
            if text.starts_with("age1") || text.starts_with("ssh-") {
                all.push(recipient(text)?);
                continue;
            }
            let (path, before) = (Path::new(text), all.len());
            let lines = keyfile::read(path, "file with recipients")?;
            for line in keyfile::lines(&lines) {
                all.push(recipient(line).map_err(|e| e.path(path))?);
            }
            if all.len() == before {
                return Err(Error::new(Kind::Usage, "there is no recipient in the file").path(path));
            }
        }
        Ok((!all.is_empty()).then_some(Recipients(all)))
    }

    pub(super) fn encrypt<W: Write>(&self, out: W) -> Result<StreamWriter<W>> {
        let encryptor = Encryptor::with_recipients(self.0.iter().map(|r| r as &dyn age::Recipient));
        let encryptor = encryptor.map_err(|e| Error::new(Kind::Usage, "cannot encrypt for these").source(e))?;
        encryptor.wrap_output(out).map_err(|e| Error::from_io("cannot write the file", e))
    }
}

fn recipient(text: &str) -> Result<Recipient> {
    let hint = match text {
        _ if text.starts_with("ssh-") => "keys of ssh are not for this: age-keygen makes one, and prints its recipient",
        _ if text.starts_with("AGE-SECRET-KEY-") => "this is a secret key; its recipient is in the comment above it",
        _ => "age-keygen prints one: age1 and 58 more letters and digits",
    };
    // Not shown: who mixes up the two halves of a key would find the secret one in a log.
    text.parse().map_err(|_| Error::new(Kind::Usage, "this is no recipient that can be encrypted for").hint(hint))
}

/// Keys that decrypt; at least one.
pub struct Identities(Vec<Box<dyn Identity + Send + Sync>>);

impl Identities {
    /// From the files that `age-keygen` writes.
    pub fn load<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<Option<Identities>> {
        let mut all = Vec::new();
        for path in paths {
            let text = keyfile::read_secret(path, "identity")?;
            let found = IdentityFile::from_buffer(text.as_bytes())
                .map_err(|e| no_identity(path).source(e))
                .and_then(|file| file.into_identities().map_err(|e| no_identity(path).source(e)))?;
            if found.is_empty() {
                return Err(no_identity(path));
            }
            all.extend(found);
        }
        Ok((!all.is_empty()).then_some(Identities(all)))
    }

    /// A reader of what was encrypted. `Auth` if it is for others.
    pub(super) fn decrypt<R: Read>(&self, input: R) -> Result<Decrypting<R>> {
        let decryptor = Decryptor::new(input).map_err(cannot_decrypt)?;
        if decryptor.is_scrypt() {
            return Err(Error::new(Kind::Auth, "the file is encrypted with a passphrase, and for no key")
                .advise(advice::Image::DecryptInPipe { key_file: false }));
        }
        let identities = self.0.iter().map(|identity| identity.as_ref() as &dyn Identity);
        decryptor.decrypt(identities).map(Decrypting).map_err(cannot_decrypt)
    }
}

fn no_identity(path: &Path) -> Error {
    Error::new(Kind::Usage, "this is no identity: a file as age-keygen writes it, not encrypted itself").path(path)
}

fn cannot_decrypt(e: DecryptError) -> Error {
    match e {
        DecryptError::NoMatchingKeys => Error::new(Kind::Auth, "the file is encrypted, and for none of these keys")
            .hint("name the identity whose recipient it was encrypted to, or have it made again for yours"),
        DecryptError::Io(e) => damaged(e),
        e => Error::new(Kind::Corrupt, "what the encrypted file begins with is not what was written")
            .source(e)
            .hint(AGAIN),
    }
}

const AGAIN: &str = "bring the file here again, or have it made again";

/// An error met while decrypting: somebody else's, as of the disk or of the signature, or that of bytes that are wrong.
fn damaged(e: io::Error) -> Error {
    match e.raw_os_error().is_some() || e.get_ref().is_some_and(|inner| inner.is::<Error>()) {
        true => Error::from_io("cannot read the file", e),
        false => {
            Error::new(Kind::Corrupt, "the encrypted file is cut short, or not what was written").source(e).hint(AGAIN)
        }
    }
}

pub(super) struct Decrypting<R>(StreamReader<R>);

impl<R: Read> Read for Decrypting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|e| io::Error::other(damaged(e)))
    }
}
