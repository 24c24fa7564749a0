//! Signatures as minisign has them: beside the file, over a hash of all of it.

use super::aside::Aside;
use super::keyfile;
use crate::error::{Error, Kind, Result, advice, printable};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use minisign::{SecretKey, SecretKeyBox};
use minisign_verify::{Error as VerifyError, Signature};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::Path;

/// Bytes hashed at once.
const CHUNK_LEN: usize = 64 << 10;

/// Of a secret key: its length, how it begins, how a password became a key, and its checksum.
const SECRET_LEN: usize = 158;
const ALGORITHM: &[u8] = b"Ed";
const KDF: Range<usize> = 2..4;
const CHECKSUM: Range<usize> = 126..158;

/// Most of a signature's comment that is shown.
const COMMENT_MAX: usize = 300;

/// Whoever signs, and what he says beside the bytes.
pub struct Signer {
    key: SecretKey,
    comment: String,
}

impl Signer {
    /// From a secret key as minisign writes it; `password`: a file whose first line is that of the key. `file`: what is
    /// signed.
    pub fn load(path: &Path, password: Option<&Path>, file: &str, now_s: i64) -> Result<Signer> {
        let text = keyfile::read_secret(path, "secret key")?;
        let key = match password {
            None => without_password(&text).map_err(|e| e.path(path))?,
            Some(password) => {
                let password = keyfile::read_secret(password, "password")?;
                let password = password.lines().next().unwrap_or_default().to_owned();
                SecretKeyBox::from(text).into_secret_key(Some(password)).map_err(|e| {
                    Error::new(Kind::Auth, "the secret key cannot be used with this password")
                        .path(path)
                        .source(e)
                        .hint("the first line of the password's file is taken, without its end; a key without a password needs none")
                })?
            }
        };
        Ok(Signer { key, comment: format!("timestamp:{now_s}\tfile:{}\thashed", printable(file, COMMENT_MAX)) })
    }

    fn sign(self, input: impl Read) -> Result<String> {
        // With the public half, which is in a secret key, too, what was signed is verified at once: a key may have been
        // damaged.
        let public = minisign::PublicKey::from_secret_key(&self.key)
            .map_err(|e| Error::new(Kind::Usage, "the secret key is not whole").source(e))?;
        let signed =
            minisign::sign(Some(&public), &self.key, input, Some(&self.comment), Some("signature by virt-replica"));
        signed.map(|s| s.into_string()).map_err(|e| Error::new(Kind::Io, "cannot sign").source(e))
    }
}

/// A secret key that has no password, as `minisign -W` writes it. It has no checksum either, which the library expects.
fn without_password(text: &str) -> Result<SecretKey> {
    let no_key =
        || Error::new(Kind::Usage, "this is no secret key of minisign").hint("minisign -G makes a pair of keys");
    let line = text.lines().nth(1).ok_or_else(no_key)?;
    let bytes = STANDARD.decode(line.trim()).map_err(|e| no_key().source(e))?;
    if bytes.len() != SECRET_LEN || !bytes.starts_with(ALGORITHM) {
        return Err(no_key());
    }
    if bytes[KDF] != [0, 0] {
        return Err(Error::new(Kind::Auth, "the secret key has a password").advise(advice::Image::NameSignPassword));
    }
    let key = match bytes[CHECKSUM].iter().all(|byte| *byte == 0) {
        true => SecretKey::from_bytes(&bytes),
        false => SecretKeyBox::from(text.to_owned()).into_unencrypted_secret_key(),
    };
    key.map_err(|e| no_key().source(e))
}

/// A writer whose bytes are signed, if there is somebody to sign them.
pub(super) struct Signing<W> {
    out: W,
    aside: Option<Aside<String>>,
}

impl<W: Write> Signing<W> {
    pub(super) fn new(out: W, signer: Option<Signer>) -> Result<Self> {
        let aside = signer.map(|signer| Aside::start(move |input| signer.sign(input))).transpose()?;
        Ok(Signing { out, aside })
    }

    pub(super) fn finish(mut self) -> Result<(W, Option<String>)> {
        self.out.flush().map_err(|e| Error::from_io("cannot write the file", e))?;
        Ok((self.out, self.aside.map(Aside::end).transpose()?))
    }
}

impl<W: Write> Write for Signing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        if let Some(aside) = &mut self.aside {
            aside.show(&bytes[..written])?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The key that tells whether a signature is right.
#[derive(Clone)]
pub struct PublicKey(minisign_verify::PublicKey);

impl PublicKey {
    /// The key itself, as minisign prints it, or a file with it.
    pub fn parse(text: &str) -> Result<PublicKey> {
        if let Ok(key) = minisign_verify::PublicKey::from_base64(text) {
            return Ok(PublicKey(key));
        }
        let path = Path::new(text);
        let content = keyfile::read(path, "public key")?;
        minisign_verify::PublicKey::decode(&content).map(PublicKey).map_err(|e| {
            let hint = "minisign -G writes it, beside the secret one; its second line begins with RW";
            Error::new(Kind::Usage, "this is no public key of minisign").path(path).source(e).hint(hint)
        })
    }
}

/// A reader that comes to its end only if the signature is right.
pub(super) struct Verifying<R> {
    input: R,
    state: State,
}

enum State {
    Reading(Aside<()>),
    Right,
    Wrong,
}

impl<R: Read> Verifying<R> {
    /// And what the signature says beside the bytes. `Auth` if another key made it.
    pub(super) fn new(input: R, key: &PublicKey, signature: &str) -> Result<(Self, String)> {
        let signature = Signature::decode(signature).map_err(|e| {
            Error::new(Kind::Corrupt, "this is no signature of minisign")
                .source(e)
                .hint("bring the .minisig file again")
        })?;
        let comment = printable(signature.trusted_comment(), COMMENT_MAX);
        key.0.verify_stream(&signature).map_err(wrong)?;
        let key = key.clone();
        let aside = Aside::start(move |mut input| {
            let mut verifier = key.0.verify_stream(&signature).map_err(wrong)?;
            let mut chunk = vec![0; CHUNK_LEN];
            loop {
                match input.read(&mut chunk).map_err(|e| Error::from_io("cannot read the file", e))? {
                    0 => return verifier.finalize().map_err(wrong),
                    len => verifier.update(&chunk[..len]),
                }
            }
        })?;
        Ok((Verifying { input, state: State::Reading(aside) }, comment))
    }
}

fn wrong(e: VerifyError) -> Error {
    let (kind, what, hint) = match e {
        VerifyError::UnexpectedKeyId => (
            Kind::Auth,
            "the file is signed by another key than the one that is asked for",
            "find out whose key it is before you trust it",
        ),
        VerifyError::UnsupportedLegacyMode => (
            Kind::Usage,
            "the signature is of the old kind, which needs the whole file in memory",
            "sign it again with minisign 0.10 or later, or with -H",
        ),
        _ => (
            Kind::Corrupt,
            "the signature is not that of this file: one of the two was changed after it was signed",
            "bring both here again; if it stays so, somebody has changed them, and nothing of it should be used",
        ),
    };
    Error::new(kind, what).source(e).hint(hint)
}

impl<R: Read> Read for Verifying<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buffer)?;
        if len == 0 && buffer.is_empty() {
            return Ok(0);
        }
        match (std::mem::replace(&mut self.state, State::Wrong), len) {
            (State::Reading(aside), 0) => {
                aside.end().map_err(io::Error::other)?;
                self.state = State::Right;
                Ok(0)
            }
            (State::Reading(mut aside), len) => {
                aside.show(&buffer[..len])?;
                self.state = State::Reading(aside);
                Ok(len)
            }
            (State::Right, 0) => {
                self.state = State::Right;
                Ok(0)
            }
            // More behind an end that was there: not what was signed. Or it was wrong before.
            (State::Right | State::Wrong, _) => Err(io::Error::other(wrong(VerifyError::InvalidSignature))),
        }
    }
}
