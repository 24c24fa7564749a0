//! The state of a domain's emulated TPM, as libvirt keeps it for swtpm: where it lies, whose it is, how it is put there
//! and taken away.
//!
//! It is one file, which swtpm replaces by rename: whoever reads it gets a whole one, of one moment. Tried with libvirt
//! 9.0: where the directory is there and not empty, the domain starts with what is in it. libvirt gives the directory
//! to swtpm's user, but not the file, so the file has to belong to that user already.

use super::releases::parse_version;
use crate::error::{Error, Kind, Result, printable};
use crate::hypervisor::element::child;
use crate::name::DomainUuid;
use crate::users;
use roxmltree::Node;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long swtpm may take to say which version it is.
const SAYS_WITHIN: Duration = Duration::from_secs(5);

/// Where a library may lie, below its architecture's directory too.
const LIBRARIES: [&str; 4] = ["/usr/lib64", "/usr/lib", "/lib64", "/usr/local/lib"];

/// Which programs emulate a TPM; they write its state, and only their like can read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// As it calls itself: `0.7.1`.
    pub swtpm: String,
    /// By the name of its file; `None`: it was not found.
    pub libtpms: Option<String>,
}

impl Programs {
    /// In a few words.
    pub fn words(&self) -> String {
        let cut = |text: &str| printable(text, 24);
        match &self.libtpms {
            Some(libtpms) => format!("swtpm {} with libtpms {}", cut(&self.swtpm), cut(libtpms)),
            None => format!("swtpm {}", cut(&self.swtpm)),
        }
    }
}

/// Those of this host; `None`: there are none, or they do not say.
pub fn programs() -> Option<Programs> {
    let mut child = Command::new("swtpm")
        .arg("--version")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let until = Instant::now() + SAYS_WITHIN;
    while child.try_wait().ok()?.is_none() {
        if Instant::now() >= until {
            // It is ours, and nobody waits for it any longer.
            let _ = child.kill().and_then(|()| child.wait().map(drop));
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut said = String::new();
    child.stdout.take()?.take(4096).read_to_string(&mut said).ok()?;
    Some(Programs { swtpm: said_version(&said)?, libtpms: libtpms() })
}

/// "TPM emulator version 0.7.1, Copyright ...".
fn said_version(said: &str) -> Option<String> {
    let mut words = said.split_whitespace().skip_while(|word| *word != "version").skip(1);
    let version = words.next()?.trim_end_matches(',');
    parse_version(version).map(|_| printable(version, 24))
}

/// The file behind the library's name says which it is: `libtpms.so.0.9.2`.
fn libtpms() -> Option<String> {
    let below = |dir: &str| fs::read_dir(dir).into_iter().flatten().flatten().map(|d| d.path());
    let multiarch = below("/usr/lib").filter(|d| d.to_string_lossy().contains("-linux-"));
    let dirs = multiarch.chain(LIBRARIES.iter().map(PathBuf::from));
    let real = dirs.filter_map(|dir| fs::canonicalize(dir.join("libtpms.so.0")).ok()).next()?;
    let version = real.file_name()?.to_str()?.strip_prefix("libtpms.so.")?.to_owned();
    parse_version(&version).map(|_| printable(&version, 24))
}

/// Where libvirt of the whole system (`qemu:///system`) keeps them, a directory for each domain.
pub const ROOT: &str = "/var/lib/libvirt/swtpm";

const QEMU_CONF: &str = "/etc/libvirt/qemu.conf";

/// Whom libvirt runs swtpm as unless its configuration says otherwise; root where there is no such user.
const USER: &str = "tss";

/// Version of the TPM standard that an emulated TPM follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TpmVersion {
    /// TPM 1.2.
    V1_2,
    /// TPM 2.0, which libvirt takes if the definition names no version.
    V2_0,
}

impl TpmVersion {
    /// As a definition says it; libvirt takes 2.0 where that says nothing.
    pub fn parse(said: Option<&str>) -> TpmVersion {
        match said {
            Some("1.2") => TpmVersion::V1_2,
            _ => TpmVersion::V2_0,
        }
    }

    /// Version as a definition writes it: `1.2` or `2.0`.
    pub fn words(self) -> &'static str {
        match self {
            TpmVersion::V1_2 => "1.2",
            TpmVersion::V2_0 => "2.0",
        }
    }

    fn dir_name(self) -> &'static str {
        match self {
            TpmVersion::V1_2 => "tpm1.2",
            TpmVersion::V2_0 => "tpm2",
        }
    }

    fn file_name(self) -> &'static str {
        match self {
            TpmVersion::V1_2 => "tpm-00.permall",
            TpmVersion::V2_0 => "tpm2-00.permall",
        }
    }
}

/// An emulated TPM, as a definition has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpmXml {
    /// Version of the TPM that the guest sees.
    pub version: TpmVersion,
    /// Where the TPM keeps its state.
    pub place: TpmPlace,
}

/// Place of the state of an emulated TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TpmPlace {
    /// Where libvirt keeps all of them.
    Libvirts,
    /// In a directory that the definition names (libvirt 10.10 and later).
    Dir(PathBuf),
    /// In a form that swtpm does not take from a directory.
    Other,
}

/// The emulated TPM among these devices, if there is one. One of the host that is passed through has no state to keep.
pub(super) fn of(devices: Node) -> Option<TpmXml> {
    let tpms = devices.children().filter(|n| n.has_tag_name("tpm"));
    let backend = tpms.filter_map(|t| child(t, "backend")).find(|b| b.attribute("type") == Some("emulator"))?;
    let place = match child(backend, "source") {
        None => TpmPlace::Libvirts,
        Some(source) => match (source.attribute("type"), source.attribute("path")) {
            (Some("dir"), Some(path)) if path.starts_with('/') => TpmPlace::Dir(path.into()),
            _ => TpmPlace::Other,
        },
    };
    Some(TpmXml { version: TpmVersion::parse(backend.attribute("version")), place })
}

impl TpmXml {
    /// The file with its state; `None`: nobody here knows where, or how to read it. `root`: see [`root_of`].
    pub fn state_file(&self, root: Option<&Path>, uuid: &DomainUuid) -> Option<PathBuf> {
        match &self.place {
            TpmPlace::Libvirts => root.map(|root| state_file(root, uuid, self.version)),
            TpmPlace::Dir(dir) => Some(dir.join(self.version.file_name())),
            TpmPlace::Other => None,
        }
    }
}

/// Where the libvirt of this URI keeps them; `None` for one that is not the system's: a user's session has a place of
/// its own.
pub fn root_of(uri: &str) -> Option<PathBuf> {
    let path = uri.split('?').next().unwrap_or(uri);
    path.ends_with("/system").then(|| ROOT.into())
}

/// File in which swtpm keeps the state of this domain's TPM, below `root`. It need not exist.
pub fn state_file(root: &Path, uuid: &DomainUuid, version: TpmVersion) -> PathBuf {
    root.join(uuid.as_str()).join(version.dir_name()).join(version.file_name())
}

/// Domains of which something is there, by their UUIDs.
pub fn states(root: &Path) -> Vec<String> {
    let dirs = fs::read_dir(root).into_iter().flatten().flatten();
    dirs.map(|dir| dir.file_name().to_string_lossy().into_owned()).collect()
}

/// Puts a state where libvirt looks for it at the next start of the domain, in the place of what is there. Durable when
/// it returns; broken off before, it is to be done again, or [`forget`] to be called. `owner`: user and group of swtpm.
pub fn put(root: &Path, uuid: &DomainUuid, version: TpmVersion, content: &[u8], owner: (u32, u32)) -> Result<()> {
    forget(root, uuid)?;
    let path = state_file(root, uuid, version);
    let at = |e| Error::io("cannot write the state of the TPM", &path, e);
    let own = root.join(uuid.as_str());
    let dir = own.join(version.dir_name());
    // The modes that libvirt gives them. It makes the first one with the host's first TPM.
    for (dir, mode) in [(root, 0o711), (own.as_path(), 0o711), (dir.as_path(), 0o700)] {
        match DirBuilder::new().mode(mode).create(dir) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(at(e)),
            _ => {}
        }
    }
    let written = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        fchown(&file, Some(owner.0), Some(owner.1))?;
        file.write_all(content)?;
        file.sync_all()?;
        let dir = File::open(&dir)?;
        fchown(&dir, Some(owner.0), Some(owner.1))?;
        dir.sync_all()?;
        File::open(&own)?.sync_all()?;
        File::open(root)?.sync_all()
    };
    written().map_err(at)
}

/// Removes the state of a domain's TPM; no error if there is none.
pub fn forget(root: &Path, uuid: &DomainUuid) -> Result<()> {
    let dir = root.join(uuid.as_str());
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("cannot remove the state of the TPM", &dir, e)),
        _ => Ok(()),
    }
}

/// User and group that libvirt of this host runs swtpm as. May block as [`users`] does.
pub fn owner() -> Result<(u32, u32)> {
    let conf = match fs::read_to_string(QEMU_CONF) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            return Err(Error::io("cannot find out whom swtpm runs as", QEMU_CONF, e));
        }
        found => found.unwrap_or_default(),
    };
    owner_by(&conf, &users::uid, &users::gid)
}

/// The number of a name; `None`: nobody is called so.
type Known<'a> = &'a dyn Fn(&str) -> Result<Option<u32>>;

/// The same, by the content of `qemu.conf`, and whom this host knows.
fn owner_by(conf: &str, users: Known, groups: Known) -> Result<(u32, u32)> {
    let one = |key: &str, known: Known| match setting(conf, key) {
        None => Ok(id_of(USER, known)?.unwrap_or(0)),
        Some(name) => id_of(name, known)?.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("{key} is '{name}', whom this host does not know"))
                .path(QEMU_CONF)
                .hint("name there whom swtpm is to run as; `+1234` is a number")
        }),
    };
    Ok((one("swtpm_user", users)?, one("swtpm_group", groups)?))
}

/// `key = "value"`, the last one that is not a comment.
fn setting<'a>(conf: &'a str, key: &str) -> Option<&'a str> {
    let value = |line: &'a str| Some(line.trim().strip_prefix(key)?.trim_start().strip_prefix('=')?.trim());
    conf.lines().filter_map(value).next_back().map(|v| v.trim_matches(['"', '\'']))
}

/// `+1234` is a number, all else first a name, and then a number.
fn id_of(name: &str, known: Known) -> Result<Option<u32>> {
    if let Some(number) = name.strip_prefix('+') {
        return Ok(number.parse().ok());
    }
    Ok(known(name)?.or_else(|| name.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn uuid() -> DomainUuid {
        DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap()
    }

    #[test]
    fn a_state_lies_where_libvirt_looks_and_replaces_what_was_there() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("swtpm");
        let me = fs::metadata(temp.path()).unwrap();
        let owner = (me.uid(), me.gid());
        put(&root, &uuid(), TpmVersion::V2_0, b"old", owner).unwrap();
        fs::write(root.join(uuid().as_str()).join("tpm2/.lock"), "").unwrap();
        put(&root, &uuid(), TpmVersion::V2_0, b"new", owner).unwrap();
        let file = root.join(uuid().as_str()).join("tpm2/tpm2-00.permall");
        assert_eq!(fs::read(&file).unwrap(), b"new");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let dir = file.parent().unwrap();
        assert_eq!([mode(&file), mode(dir), mode(dir.parent().unwrap()), mode(&root)], [0o600, 0o700, 0o711, 0o711]);
        assert!(!dir.join(".lock").exists() && states(&root) == [uuid().as_str()]);
        put(&root, &uuid(), TpmVersion::V1_2, b"other", owner).unwrap();
        assert!(!dir.exists() && root.join(uuid().as_str()).join("tpm1.2/tpm-00.permall").exists());
        for _ in 0..2 {
            forget(&root, &uuid()).unwrap();
            assert_eq!(states(&root), [""; 0]);
        }
    }

    #[test]
    fn a_definition_says_where_the_state_lies() {
        let file = |backend: &str, uri: &str| {
            let xml = format!("<devices><tpm model='tpm-crb'>{backend}</tpm></devices>");
            let doc = roxmltree::Document::parse(&xml).unwrap();
            of(doc.root_element()).map(|tpm| tpm.state_file(root_of(uri).as_deref(), &uuid()))
        };
        let (system, own) = ("qemu:///system", format!("{ROOT}/{}", uuid()));
        let two = "<backend type='emulator' version='2.0'/>";
        assert_eq!(file(two, system), Some(Some(format!("{own}/tpm2/tpm2-00.permall").into())));
        assert_eq!(file(two, "qemu:///system?socket=/x"), file(two, system));
        assert_eq!(file("<backend type='emulator'/>", system), file(two, system));
        assert_eq!(file(two, "qemu:///session"), Some(None), "a session's state lies elsewhere");
        let one = "<backend type='emulator' version='1.2'/>";
        assert_eq!(file(one, system), Some(Some(format!("{own}/tpm1.2/tpm-00.permall").into())));
        let named = |source: &str| file(&format!("<backend type='emulator'>{source}</backend>"), system);
        assert_eq!(named("<source type='dir' path='/t'/>"), Some(Some("/t/tpm2-00.permall".into())));
        assert_eq!(named("<source type='file' path='/t/state'/>"), Some(None));
        assert_eq!(file("<backend type='passthrough'/>", system), None);
    }

    #[test]
    fn the_owner_is_whom_libvirt_would_take() {
        let users =
            |name: &str| Ok([("root", 0), ("tss", 103), ("107", 5)].into_iter().find(|u| u.0 == name).map(|u| u.1));
        let groups = |name: &str| Ok([("tss", 108), ("kvm", 9)].into_iter().find(|g| g.0 == name).map(|g| g.1));
        let owner_by = |conf: &str| super::owner_by(conf, &users, &groups);
        assert_eq!(owner_by("#swtpm_user = \"root\"").unwrap(), (103, 108));
        let nobody = |_: &str| Ok(None);
        assert_eq!(super::owner_by("", &nobody, &nobody).unwrap(), (0, 0), "libvirt falls back to root");
        let silent = |_: &str| Err(Error::new(Kind::Io, "no answer"));
        assert_eq!(super::owner_by("", &silent, &nobody).unwrap_err().kind(), Kind::Io, "which is not to be nobody");
        let conf = "swtpm_user = \"root\"\n  swtpm_group=\"kvm\"\nswtpm_user_other = \"x\"";
        assert_eq!(owner_by(conf).unwrap(), (0, 9));
        assert_eq!(owner_by("swtpm_user = \"107\"\nswtpm_group = \"+12\"").unwrap(), (5, 12));
        assert_eq!(owner_by("swtpm_user = \"1234\"").unwrap().0, 1234);
        assert_eq!(owner_by("swtpm_user = \"nobody\"").unwrap_err().kind(), Kind::NotFound);
    }
}
