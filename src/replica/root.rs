//! The root of a store: a directory that somebody has made a store, and that bears the id of it.
//!
//! Owns the file `store.json`. A path alone makes no store: a misspelt one, and the empty directory where a file system
//! should be mounted, are refused and stay as they are.
//!
//! Invariants
//! - An id is written once, durably, before anything is written below it, and never changes.
//! - A directory with replicas and no id was made by version 0.1: it gets an id when it is first opened.
//!
//! Format: docs/formats/replica.md.

use super::files::Dir;
use super::manifest::REPLICAS_DIR;
use crate::error::{Error, Kind, Result, advice};
use crate::name::StoreId;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The file that makes a directory a store.
pub const MARKER_FILE: &str = "store.json";
const MARKER_NEW: &str = "store.json.new";
/// Largest marker that is read, in bytes.
const MARKER_MAX: usize = 4 << 10;
const FORMAT: &str = "virt-replica store";
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    format: String,
    version: u32,
    id: StoreId,
}

/// What a source asks of the store at the other end, before anything else.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreWish {
    /// The directory that the source's URL names; absent: the agent's own will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<PathBuf>,
    /// Make the directory a store if it is none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub create: bool,
    /// The stores that the source has found under this URL: where one of them is missing, none is created in its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub known: Vec<KnownStore>,
}

/// A store that was found at a directory. One URL leads to several where keys with forced commands do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownStore {
    /// Directory at which the store was found on the target.
    pub root: PathBuf,
    /// Id that the store had when it was found.
    pub id: StoreId,
}

/// The store among them that was found at this directory.
pub fn known_at<'a>(known: &'a [KnownStore], root: &Path) -> Option<&'a StoreId> {
    known.iter().find(|known| known.root == root).map(|known| &known.id)
}

/// The store that was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSeen {
    /// Absent only if it was made by version 0.1 and cannot be written to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<StoreId>,
    /// Its directory.
    pub root: PathBuf,
    /// It was made by version 0.1, and has its id since now.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adopted: bool,
    /// It was created just now.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub created: bool,
}

/// Opens the store at `path`. `fresh`: the id that a store of version 0.1 gets. [`Kind::NotFound`] for what is no
/// store.
pub fn open(path: &Path, fresh: &StoreId) -> Result<StoreSeen> {
    let seen = |id, adopted| StoreSeen { id, root: path.to_owned(), adopted, created: false };
    let dir = Dir::open_root(path)?.ok_or_else(|| no_store(path, "the directory does not exist"))?;
    if let Some(id) = read(&dir)? {
        return Ok(seen(Some(id), false));
    }
    if dir.sub(REPLICAS_DIR)?.is_none() {
        return Err(no_store(path, "the directory is there, and no store was created in it"));
    }
    match mark(&dir, fresh) {
        Ok(id) => Ok(seen(Some(id), true)),
        // Reading must go on where nothing can be written: on a bad day a read-only store is better than none.
        Err(e) if matches!(e.kind(), Kind::Io | Kind::Space) => {
            tracing::warn!(error = e.chain(), "the store cannot be given its id");
            Ok(seen(None, false))
        }
        Err(e) => Err(e),
    }
}

/// Creates a store at `path`, with the directories that lead to it, or finds that there is one. `known`: the store that
/// was here before; then none is created, because the one that is missing may only be not mounted.
pub fn create(path: &Path, fresh: &StoreId, known: Option<&StoreId>) -> Result<StoreSeen> {
    match open(path, fresh) {
        Err(e) if e.kind() == Kind::NotFound => {}
        found => return found,
    }
    if let Some(known) = known {
        let what = format!("the store {known} was here, and is not any more");
        return Err(Error::new(Kind::NotFound, what)
            .path(path)
            .advise(advice::Store::Lost { root: path.display().to_string() }));
    }
    let id = mark(&Dir::create_root(path)?, fresh)?;
    Ok(StoreSeen { id: Some(id), root: path.to_owned(), adopted: false, created: true })
}

/// The root at `path`, if it is still that of store `id`: a mount may have gone since it was opened.
pub(super) fn reopen(path: &Path, id: &StoreId) -> Result<Dir> {
    let dir = Dir::open_root(path)?;
    let found = dir.as_ref().map(read).transpose()?.flatten();
    match (dir, found) {
        (Some(dir), Some(found)) if found == *id => Ok(dir),
        (_, found) => {
            let found = found.map_or("no store".to_owned(), |id| format!("the store {id}"));
            let what = format!("the store {id} was opened here, and now there is {found}");
            Err(Error::new(Kind::Conflict, what).path(path).hint("was its file system unmounted meanwhile?"))
        }
    }
}

/// Refuses a session whose URL names another directory than the one that this agent serves.
pub fn check_root(serves: &Path, wish: &StoreWish) -> Result<()> {
    let Some(named) = &wish.root else { return Ok(()) };
    let same = |a: &Path, b: &Path| a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    if same(named, serves) {
        return Ok(());
    }
    let (named, serves) = (named.display(), serves.display());
    let what = format!("the URL names the store {named}, and the key of this session is bound to {serves}");
    Err(Error::new(Kind::Conflict, what)
        .hint(format!("write {serves} in the URL, or no directory at all; or change the forced command on the target")))
}

fn no_store(path: &Path, why: &str) -> Error {
    Error::new(Kind::NotFound, format!("there is no store here: {why}"))
        .path(path)
        .advise(advice::Store::Create { root: path.display().to_string() })
}

fn read(dir: &Dir) -> Result<Option<StoreId>> {
    let Some(json) = dir.read(MARKER_FILE, MARKER_MAX)? else { return Ok(None) };
    parse(&json).map(Some).map_err(|e| e.path(dir.join(MARKER_FILE)))
}

fn parse(json: &[u8]) -> Result<StoreId> {
    #[derive(Deserialize)]
    struct Preamble {
        format: String,
        version: u32,
    }
    let corrupt = |what: String| Error::new(Kind::Corrupt, what);
    let preamble: Preamble =
        serde_json::from_slice(json).map_err(|e| corrupt("the store's marker cannot be read".into()).source(e))?;
    if preamble.format != FORMAT {
        return Err(corrupt(format!("this is not the marker of a {FORMAT}")));
    }
    if preamble.version != VERSION {
        let what = format!("the store has version {}, this program reads version {VERSION}", preamble.version);
        return Err(
            Error::new(Kind::Protocol, what).hint("use the version of virt-replica that made it, or a newer one")
        );
    }
    let marker: Marker =
        serde_json::from_slice(json).map_err(|e| corrupt("the store's marker cannot be read".into()).source(e))?;
    Ok(marker.id)
}

/// Gives the directory this id, durably, unless it has one: the id that it has is returned.
fn mark(dir: &Dir, id: &StoreId) -> Result<StoreId> {
    let marker = Marker { format: FORMAT.to_owned(), version: VERSION, id: id.clone() };
    let mut json = serde_json::to_vec_pretty(&marker)
        .map_err(|e| Error::new(Kind::Corrupt, "cannot write the store's marker").source(e))?;
    json.push(b'\n');
    // Whoever comes second reads what the first one wrote: two sources may meet a store of 0.1 at once.
    let aside = format!("{MARKER_NEW}.{id}");
    dir.remove(&aside)?;
    dir.write_new(&aside, &json)?;
    let won = dir.rename_new(&aside, MARKER_FILE);
    if !matches!(won, Ok(true)) {
        dir.remove(&aside)?;
    }
    won?;
    dir.sync()?;
    let found = read(dir)?;
    found.ok_or_else(|| Error::new(Kind::Io, "the store's marker vanished").path(dir.join(MARKER_FILE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(bits: u128) -> StoreId {
        StoreId::from_bits(bits)
    }

    /// Case B4: a misspelt root, or a mount point without its file system, became a store by being named.
    #[test]
    fn a_directory_is_no_store_until_somebody_makes_it_one() {
        let temp = tempfile::tempdir().unwrap();
        for path in [temp.path().to_owned(), temp.path().join("misspelt")] {
            let e = open(&path, &id(1)).unwrap_err();
            assert_eq!(e.kind(), Kind::NotFound);
            assert_eq!(e.advice(), Some(&advice::Store::Create { root: path.display().to_string() }.into()));
        }
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0, "a refusal leaves nothing behind");

        let root = temp.path().join("a/b");
        let made = create(&root, &id(2), None).unwrap();
        assert_eq!((made.id.clone(), made.created, made.adopted), (Some(id(2)), true, false));
        let again = create(&root, &id(3), Some(&id(9))).unwrap();
        assert_eq!((again.id, again.created), (Some(id(2)), false), "an id never changes");
        assert_eq!(open(&root, &id(3)).unwrap().id, Some(id(2)));
    }

    #[test]
    fn a_store_of_an_earlier_version_gets_its_id_once() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir(temp.path().join(REPLICAS_DIR)).unwrap();
        let first = open(temp.path(), &id(1)).unwrap();
        assert_eq!((first.id, first.adopted), (Some(id(1)), true));
        let second = open(temp.path(), &id(2)).unwrap();
        assert_eq!((second.id, second.adopted), (Some(id(1)), false));
    }

    #[test]
    fn of_two_that_mark_at_once_one_wins_and_both_know_it() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open_root(temp.path()).unwrap().unwrap();
        assert_eq!(mark(&dir, &id(1)).unwrap(), id(1));
        assert_eq!(mark(&dir, &id(2)).unwrap(), id(1));
        assert_eq!(dir.entries().unwrap(), [MARKER_FILE], "nothing is left beside it");
    }

    #[test]
    fn no_store_is_created_where_a_known_one_is_missing() {
        let temp = tempfile::tempdir().unwrap();
        let e = create(temp.path(), &id(1), Some(&id(7))).unwrap_err();
        assert_eq!(e.kind(), Kind::NotFound);
        assert!(e.what().contains(id(7).as_str()), "{e}");
        assert_eq!(e.advice(), Some(&advice::Store::Lost { root: temp.path().display().to_string() }.into()));
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_store_that_goes_while_it_is_used_is_noticed() {
        let temp = tempfile::tempdir().unwrap();
        create(temp.path(), &id(1), None).unwrap();
        reopen(temp.path(), &id(1)).unwrap();
        let e = reopen(temp.path(), &id(2)).unwrap_err();
        assert!(e.what().contains(id(1).as_str()) && e.what().contains(id(2).as_str()), "both sides: {e}");
        std::fs::remove_file(temp.path().join(MARKER_FILE)).unwrap();
        assert_eq!(reopen(temp.path(), &id(1)).unwrap_err().kind(), Kind::Conflict);
    }

    #[test]
    fn a_url_and_a_forced_command_have_to_agree() {
        let wish = |root: Option<&str>| StoreWish { root: root.map(PathBuf::from), ..StoreWish::default() };
        check_root(Path::new("/srv/a"), &wish(None)).unwrap();
        check_root(Path::new("/srv/a"), &wish(Some("/srv/a/"))).unwrap();
        let e = check_root(Path::new("/srv/a"), &wish(Some("/srv/b"))).unwrap_err();
        assert!(e.what().contains("/srv/a") && e.what().contains("/srv/b"), "{e}");
        assert_eq!(e.kind(), Kind::Conflict);
    }

    #[test]
    fn a_marker_that_is_not_understood_is_an_error_and_no_new_store() {
        let temp = tempfile::tempdir().unwrap();
        create(temp.path(), &id(1), None).unwrap();
        let path = temp.path().join(MARKER_FILE);
        let newer = std::fs::read_to_string(&path).unwrap().replace("\"version\": 1", "\"version\": 2");
        for (text, kind) in [("{}", Kind::Corrupt), (newer.as_str(), Kind::Protocol)] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(create(temp.path(), &id(2), None).unwrap_err().kind(), kind, "{text}");
        }
    }
}
