//! Files that are protected on their way: the options, and what is written or read with them.

use crate::cli::plain::shared::{OutFile, absolute};
use clap::Args;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use virt_replica::envelope::{
    Identities, Opened, PublicKey, Recipients, SIGNATURE_SUFFIX, Signer, Unwrap, Wrap, Wrapped,
};
use virt_replica::error::{Error, Kind, Result};

/// Longest signature that is read: two lines of comments and two of base64.
pub const SIGNATURE_MAX: u64 = 64 << 10;

/// How a file is protected that is written.
#[derive(Debug, Args)]
pub struct WrapArgs {
    /// Encrypt it for this recipient of age (age1...), or for those in this file; may be given more than once
    #[arg(long, value_name = "RECIPIENT|FILE")]
    encrypt_to: Vec<String>,
    /// Sign it with this secret key of minisign, after it was encrypted; the signature goes beside it, as PATCH.minisig
    #[arg(long, value_name = "KEYFILE")]
    sign_with: Option<PathBuf>,
    /// The file whose first line is the password of that key
    #[arg(long, value_name = "FILE", requires = "sign_with")]
    sign_password_file: Option<PathBuf>,
    /// Where the signature goes, if not beside the file. Needed if the signed file goes to stdout
    #[arg(long, value_name = "FILE", requires = "sign_with")]
    signature: Option<PathBuf>,
}

/// Keys for what is read.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// Decrypt it with the identity of age in this file; may be given more than once
    #[arg(long, value_name = "KEYFILE")]
    decrypt_with: Vec<PathBuf>,
    /// Read only files that this public key of minisign signed: the key, or a file with it
    #[arg(long, value_name = "PUBKEY|FILE")]
    verify_with: Option<String>,
}

/// How the protection of a file that is read is taken off.
#[derive(Debug, Args)]
pub struct UnwrapArgs {
    #[command(flatten)]
    keys: KeyArgs,
    /// Where the signature is, if not beside the file as PATCH.minisig
    #[arg(long, value_name = "FILE", requires = "verify_with")]
    signature: Option<PathBuf>,
}

/// Where the signature of a file lies, if nothing else is said.
pub fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SIGNATURE_SUFFIX);
    PathBuf::from(name)
}

/// An [`OutFile`] that is encrypted and signed, as far as that was asked for.
pub struct ProtectedOut {
    out: Wrapped<OutFile>,
    signature: Option<OutFile>,
    piped: bool,
}

impl ProtectedOut {
    pub fn create(path: &Path, force: bool, args: &WrapArgs) -> Result<ProtectedOut> {
        let recipients = Recipients::parse(args.encrypt_to.iter().map(String::as_str))?;
        let mut wrap = Wrap { recipients, signer: None };
        let out = OutFile::create(path, force)?;
        let piped = out.is_stdout();
        let mut signature = None;
        if let Some(key) = &args.sign_with {
            let to = match &args.signature {
                Some(to) => to.clone(),
                None if piped => {
                    return Err(Error::new(
                        Kind::Usage,
                        "the signature of what goes to stdout needs a place of its own",
                    )
                    .hint("name a file for it: --signature FILE"));
                }
                None => beside(path),
            };
            if to == Path::new("-") || to == path {
                return Err(Error::new(Kind::Usage, "a signature goes into a file of its own").path(to));
            }
            let name = if piped { "-".into() } else { path.file_name().unwrap_or_default().to_string_lossy() };
            let now_s = jiff::Timestamp::now().as_second();
            wrap.signer = Some(Signer::load(key, args.sign_password_file.as_deref(), &name, now_s)?);
            signature = Some(OutFile::create(&to, force)?);
        }
        Ok(ProtectedOut { out: Wrapped::new(out, wrap)?, signature, piped })
    }

    /// Whether results go elsewhere, because stdout has the content.
    pub fn is_stdout(&self) -> bool {
        self.piped
    }

    /// Gives the file its name, durably; its signature first, so that a file that is there has one. Where both are
    /// replaced and that is cut short between the two, the signature is not that of the file, and says so.
    pub fn commit(self) -> Result<()> {
        let (out, text) = self.out.finish()?;
        if let (Some(mut signature), Some(text)) = (self.signature, text) {
            signature.write_all(text.as_bytes()).map_err(|e| Error::from_io("cannot write the signature", e))?;
            signature.commit()?;
        }
        out.commit()
    }
}

impl Write for ProtectedOut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl KeyArgs {
    fn load(&self) -> Result<Unwrap> {
        let identities = Identities::load(self.decrypt_with.iter().map(PathBuf::as_path))?;
        let key = self.verify_with.as_deref().map(PublicKey::parse).transpose()?;
        Ok(Unwrap { identities, key })
    }

    /// Whether there is a key to decrypt with.
    pub fn decrypts(&self) -> bool {
        !self.decrypt_with.is_empty()
    }

    /// Checks the signature of a file that is open already, if a key was named for that: what it says beside the bytes.
    pub fn verify(&self, file: &mut File, signature: Option<&str>) -> Result<Option<String>> {
        self.load()?.verify(file, signature)
    }

    /// A file that is open already, with the text of its signature if there is one.
    pub fn open_file(&self, file: File, signature: Option<&str>) -> Result<Opened> {
        self.load()?.open_file(file, signature)
    }

    /// All of them, with the signature of each beside it.
    pub fn open_all(&self, paths: &[PathBuf]) -> Result<Vec<Box<dyn Read + Send>>> {
        let unwrap = self.load()?;
        paths.iter().map(|path| open(&unwrap, path, None).map(|opened| opened.input)).collect()
    }
}

impl UnwrapArgs {
    /// A file, or stdin for `-`.
    pub fn open(&self, path: &Path) -> Result<Opened> {
        open(&self.keys.load()?, path, self.signature.as_deref())
    }

    /// Whether a signature is to be checked.
    pub fn verifies(&self) -> bool {
        self.keys.verify_with.is_some()
    }
}

fn open(unwrap: &Unwrap, path: &Path, signature: Option<&Path>) -> Result<Opened> {
    let piped = path == Path::new("-");
    let signature = match (&unwrap.key, signature) {
        (None, _) => None,
        (Some(_), Some(signature)) => Some(read_signature(signature)?),
        (Some(_), None) if piped => {
            return Err(Error::new(Kind::Usage, "the signature of what comes through a pipe has to be named")
                .hint("--signature FILE names it; where that cannot be, save what comes as a file first"));
        }
        (Some(_), None) => Some(read_signature(&beside(path))?),
    };
    if piped {
        return unwrap.open(io::stdin(), signature.as_deref());
    }
    let file = File::open(path).map_err(|e| Error::io("cannot open the file", path, e))?;
    unwrap.open_file(file, signature.as_deref()).map_err(|e| e.path(path))
}

fn read_signature(path: &Path) -> Result<String> {
    let path = &absolute(path)?;
    let file = File::open(path).map_err(|e| {
        Error::io("there is no signature to be checked", path, e)
            .hint("bring it along with the file, or say where it is: --signature FILE")
    })?;
    let mut text = String::new();
    file.take(SIGNATURE_MAX).read_to_string(&mut text).map_err(|e| Error::io("cannot read the signature", path, e))?;
    Ok(text)
}
