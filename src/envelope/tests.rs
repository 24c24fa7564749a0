//! Every way of protecting a file, taken off again; and every way in which it can be wrong.

use super::*;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

struct Keys {
    dir: tempfile::TempDir,
    recipient: String,
    public: String,
}

impl Keys {
    fn new() -> Keys {
        let dir = tempfile::tempdir().unwrap();
        let identity = age::x25519::Identity::generate();
        let secret = age::secrecy::ExposeSecret::expose_secret(&identity.to_string()).to_owned();
        std::fs::write(dir.path().join("identity"), format!("# a comment\n{secret}\n")).unwrap();
        let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
        std::fs::write(dir.path().join("sign.key"), pair.sk.to_box(None).unwrap().into_string()).unwrap();
        Keys { dir, recipient: identity.to_public().to_string(), public: pair.pk.to_base64() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn wrap(&self, encrypt: bool, sign: bool) -> Wrap {
        let recipients = Recipients::parse(encrypt.then_some(self.recipient.as_str())).unwrap();
        let signer = sign.then(|| Signer::load(&self.path("sign.key"), None, "a.patch", 5).unwrap());
        Wrap { recipients, signer }
    }

    fn unwrap(&self, decrypt: bool, verify: bool) -> Unwrap {
        let identity = self.path("identity");
        let identities = Identities::load(decrypt.then_some(identity.as_path())).unwrap();
        Unwrap { identities, key: verify.then(|| PublicKey::parse(&self.public).unwrap()) }
    }
}

/// What was made of `plain`, and its signature.
fn wrapped(plain: &[u8], wrap: Wrap) -> (Vec<u8>, Option<String>) {
    let mut out = Wrapped::new(Vec::new(), wrap).unwrap();
    // In odd bites, so that nothing depends on their borders.
    for bite in plain.chunks(10_007) {
        out.write_all(bite).unwrap();
    }
    out.finish().unwrap()
}

fn read(unwrap: &Unwrap, bytes: &[u8], signature: Option<&str>) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut opened = unwrap.open(Cursor::new(bytes.to_vec()), signature)?;
    opened.input.read_to_end(&mut all).map_err(|e| Error::from_io("cannot read", e))?;
    // Who asks once more after an end is told the same.
    assert_eq!(opened.input.read(&mut [0]).unwrap(), 0);
    Ok(all)
}

fn noise(len: usize) -> Vec<u8> {
    (0..len as u64).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).take(len).collect()
}

#[test]
fn what_was_wrapped_is_unwrapped_whatever_its_length() {
    let keys = Keys::new();
    for len in [0, 1, 20, 21, 31, 4096, 65535, 65536, 65537, 2 * 65536, 300_000] {
        for (encrypt, sign) in [(false, false), (true, false), (false, true), (true, true)] {
            let plain = noise(len);
            let (bytes, signature) = wrapped(&plain, keys.wrap(encrypt, sign));
            assert_eq!(signature.is_some(), sign);
            assert_eq!(bytes == plain, !encrypt, "{len}");
            let found = read(&keys.unwrap(true, sign), &bytes, signature.as_deref()).unwrap();
            assert!(found == plain, "{len} {encrypt} {sign}");
        }
    }
}

#[test]
fn what_was_changed_has_no_end() {
    let keys = Keys::new();
    let plain = noise(150_000);
    for (encrypt, sign) in [(true, false), (false, true), (true, true)] {
        let (bytes, signature) = wrapped(&plain, keys.wrap(encrypt, sign));
        let unwrap = keys.unwrap(true, sign);
        let refused = |bytes: &[u8], what: &str| {
            let e = read(&unwrap, bytes, signature.as_deref()).expect_err(what);
            assert!(matches!(e.kind(), Kind::Corrupt | Kind::Auth) && e.hint_text().is_some(), "{what}: {}", e.chain());
        };
        for at in (0..bytes.len()).step_by(bytes.len() / 50) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            if encrypt || sign {
                // A flipped banner makes of an encrypted file a plain one; only who made it tells.
                if sign || at > 30 {
                    refused(&flipped, &format!("flipped at {at}, {encrypt} {sign}"));
                }
            }
            if sign || at > 30 {
                refused(&bytes[..at], &format!("cut at {at}, {encrypt} {sign}"));
            }
        }
        refused(&[bytes.as_slice(), b"x"].concat(), "something behind it");
    }
}

#[test]
fn other_keys_are_told_apart_from_damage() {
    let (keys, others) = (Keys::new(), Keys::new());
    let (bytes, signature) = wrapped(b"plain", keys.wrap(true, true));
    let signature = signature.unwrap();
    let kind = |unwrap: Unwrap, signature: Option<&str>| read(&unwrap, &bytes, signature).unwrap_err().kind();
    assert_eq!(kind(others.unwrap(true, false), None), Kind::Auth, "another identity");
    assert_eq!(kind(keys.unwrap(false, false), None), Kind::Auth, "no identity");
    let mixed = Unwrap { key: others.unwrap(false, true).key, ..keys.unwrap(true, false) };
    assert_eq!(kind(mixed, Some(&signature)), Kind::Auth, "another public key");
    assert_eq!(kind(keys.unwrap(true, true), None), Kind::Usage, "no signature");
    assert_eq!(kind(keys.unwrap(true, true), Some("rubbish")), Kind::Corrupt, "no such signature");
    let said = signature.replace("a.patch", "b.patch");
    assert_eq!(kind(keys.unwrap(true, true), Some(&said)), Kind::Corrupt, "its comment is signed, too");
}

/// A file that is changed between the look that checks it and the one that uses it.
#[test]
fn only_the_bytes_that_are_handed_out_count() {
    let keys = Keys::new();
    let (bytes, signature) = wrapped(&noise(200_000), keys.wrap(false, true));
    let path = keys.path("file");
    std::fs::write(&path, &bytes).unwrap();
    let unwrap = keys.unwrap(false, true);
    let open = || unwrap.open_file(File::open(&path).unwrap(), signature.as_deref());
    let mut opened = open().unwrap();
    assert_eq!(opened.protection.signed.as_deref(), Some("timestamp:5 file:a.patch hashed"));
    File::options().write(true).open(&path).unwrap().write_all_at(b"!", 150_000).unwrap();
    let e = opened.input.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(Error::from_io("", e).kind(), Kind::Corrupt);
    let e = opened.input.read(&mut [0; 9]).unwrap_err();
    assert_eq!(Error::from_io("", e).kind(), Kind::Corrupt, "it does not end on being asked again");
    assert_eq!(open().err().unwrap().kind(), Kind::Corrupt, "and now it is not even begun");
}

#[test]
fn what_is_no_key_is_said_without_showing_it() {
    let keys = Keys::new();
    let secret = std::fs::read_to_string(keys.path("identity")).unwrap();
    let secret = secret.lines().last().unwrap();
    std::fs::write(keys.path("recipients"), format!("# mine\n{secret}\n")).unwrap();
    let path = keys.path("recipients");
    let e = Recipients::parse([path.to_str().unwrap()]).err().unwrap();
    assert!(e.kind() == Kind::Usage && !e.chain().contains(secret), "{}", e.chain());
    for (wrong, kind) in [("age1xyz", Kind::Usage), ("ssh-ed25519 AAAA", Kind::Usage), ("/none", Kind::NotFound)] {
        assert_eq!(Recipients::parse([wrong]).err().unwrap().kind(), kind, "{wrong}");
    }
    let e = Identities::load([keys.path("sign.key").as_path()]).err().unwrap();
    assert_eq!(e.kind(), Kind::Usage);
    let e = Signer::load(&keys.path("identity"), None, "a", 0).err().unwrap();
    assert!(e.hint_text().is_some());
    assert_eq!(PublicKey::parse(keys.path("identity").to_str().unwrap()).err().unwrap().kind(), Kind::Usage);
    assert_eq!(Identities::load(std::iter::empty::<&Path>()).unwrap().map(|_| ()), None);
}
