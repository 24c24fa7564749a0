//! A directory as a whole: which of its entries are copied, which are made anew (directories, links), and which are
//! left out, with the reason. Nothing is left out silently.
//!
//! Invariants
//! - A link is never followed out of a directory: it is made anew, or left out.
//! - Below the root of an agent nothing is made that leads out of that root.

use super::{FileMeta, file_name, meta_of};
use crate::error::{Error, Kind, Result};
use crate::plain::beside::{check_within, is_beside_an_image, real_path, set_meta, sync_dir};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Deepest nesting that is followed.
const DEPTH_MAX: usize = 64;

/// What a directory holds, as far as it concerns a copy. All paths of `files`, `dirs` and `links` are relative to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    /// Regular files to copy.
    pub files: Vec<PathBuf>,
    /// Each before what lies in it.
    pub dirs: Vec<PathBuf>,
    /// Symbolic links to make anew: path, and the text that the link leads to.
    pub links: Vec<(PathBuf, String)>,
    /// Entries that are not copied, each with the reason.
    pub left_out: Vec<LeftOut>,
}

/// An entry that is not copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Path of the entry, below the directory as the caller named it.
    pub path: PathBuf,
    /// A sentence without its subject.
    pub why: String,
}

/// Looks at a directory, in the order of names; with `recursive` also at what is hidden and at all below.
pub fn walk(dir: &Path, recursive: bool) -> Result<Tree> {
    let mut tree = Tree::default();
    walk_into(dir, Path::new(""), recursive, 0, &mut tree)?;
    Ok(tree)
}

fn walk_into(root: &Path, below: &Path, recursive: bool, depth: usize, tree: &mut Tree) -> Result<()> {
    let dir = root.join(below);
    if depth > DEPTH_MAX {
        return Err(Error::new(Kind::Refused, format!("directories lie deeper than {DEPTH_MAX} levels")).path(dir));
    }
    let cannot = |e| Error::io("cannot list the directory", &dir, e);
    let mut entries = fs::read_dir(&dir).map_err(cannot)?.collect::<std::io::Result<Vec<_>>>().map_err(cannot)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, kind) = (entry.path(), entry.file_type().map_err(cannot)?);
        let mut leave = |why: &str| tree.left_out.push(LeftOut { path: path.clone(), why: why.to_owned() });
        let Ok(name) = entry.file_name().into_string() else {
            leave("has a name that is no text");
            continue;
        };
        if is_beside_an_image(&path) {
            leave("belongs to a copy that was cut short");
            continue;
        }
        let relative = below.join(&name);
        match (recursive, kind) {
            (false, kind) if kind.is_dir() => leave("is a directory: -r copies what is in it"),
            (false, kind) if kind.is_symlink() => leave("is a link: -r makes it anew"),
            (false, _) if name.starts_with('.') => leave("is hidden: -r takes it along"),
            (_, kind) if kind.is_file() => tree.files.push(relative),
            (_, kind) if kind.is_dir() => {
                tree.dirs.push(relative.clone());
                walk_into(root, &relative, recursive, depth + 1, tree)?;
            }
            (_, kind) if kind.is_symlink() => {
                match fs::read_link(&path).map_err(cannot)?.into_os_string().into_string() {
                    Ok(to) => tree.links.push((relative, to)),
                    Err(_) => leave("is a link to a name that is no text"),
                }
            }
            _ => leave("is neither a file nor a directory"),
        }
    }
    Ok(())
}

/// What is made at the other end beside images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Make {
    /// Absolute.
    pub path: PathBuf,
    /// Whether a directory or a link is made there.
    pub what: What,
}

/// Kind of the entry that is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A directory, which may be there; with its owner, mode and time, if they are given.
    Dir {
        /// Owner, mode and time of the directory. `None`: they are not set.
        meta: Option<FileMeta>,
    },
    /// A symbolic link, which may be there and lead to the same.
    Link {
        /// Text of the link. It must not lead out of the root of an agent.
        to: String,
    },
}

impl Make {
    /// A directory without owner, mode and time.
    pub fn dir(path: PathBuf) -> Make {
        Make { path, what: What::Dir { meta: None } }
    }

    /// The directory with owner, mode and time of `source`.
    pub fn dir_as(path: PathBuf, source: &Path) -> Result<Make> {
        Ok(Make { path, what: What::Dir { meta: Some(meta_of(source)?) } })
    }

    /// A symbolic link at `path` that leads to `to`.
    pub fn link(path: PathBuf, to: String) -> Make {
        Make { path, what: What::Link { to } }
    }
}

/// Makes a directory or a link, below `within` if there is one. Durable when it returns. [`Kind::Conflict`] where
/// something else has the name, [`Kind::Refused`] where it would lead out of `within`.
pub fn make(make: &Make, within: Option<&Path>) -> Result<()> {
    let is_root =
        |root: &Path| fs::canonicalize(root).is_ok_and(|root| fs::canonicalize(&make.path).is_ok_and(|p| p == root));
    match (&make.what, within) {
        (What::Dir { .. }, Some(root)) if is_root(root) => Ok(()),
        (What::Dir { meta }, within) => {
            let path = match within {
                Some(root) => check_within(&make.path, root)?,
                None => real_path(&make.path)?,
            };
            make_dir(&path, meta.as_ref())
        }
        (What::Link { to }, within) => {
            // The link itself, not what it leads to.
            let parent = make.path.parent().unwrap_or(Path::new("/"));
            let dir = fs::canonicalize(parent).map_err(|e| Error::io("there is no such directory", parent, e))?;
            let path = dir.join(file_name(&make.path)?);
            if let Some(root) = within {
                let root =
                    fs::canonicalize(root).map_err(|e| Error::io("cannot look at the directory of images", root, e))?;
                if !stays_within(&dir, Path::new(to), &root) || is_beside_an_image(&path) {
                    let what = format!("a link to {to} would lead out of {}", root.display());
                    return Err(Error::new(Kind::Refused, what).path(&make.path));
                }
            }
            make_link(&path, to)
        }
    }
}

fn make_dir(path: &Path, meta: Option<&FileMeta>) -> Result<()> {
    match fs::create_dir(path) {
        Ok(()) => path.parent().map_or(Ok(()), sync_dir)?,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(Error::new(Kind::Conflict, "there is a file in the place of a directory").path(path));
        }
        Err(e) => return Err(Error::io("cannot make the directory", path, e)),
    }
    meta.map_or(Ok(()), |meta| set_meta(path, meta))
}

fn make_link(path: &Path, to: &str) -> Result<()> {
    match fs::read_link(path) {
        Ok(there) if there == Path::new(to) => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        _ => {
            let what = format!("something else is in the place of a link to {to}");
            return Err(Error::new(Kind::Conflict, what).path(path).hint("remove it, if nobody needs it"));
        }
    }
    std::os::unix::fs::symlink(to, path).map_err(|e| Error::io("cannot make the link", path, e))?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Whether a link in `dir` to `to` stays below `root`, by its words: what it leads to need not be there yet. Both are
/// real.
fn stays_within(dir: &Path, to: &Path, root: &Path) -> bool {
    let mut at = if to.is_absolute() { PathBuf::from("/") } else { dir.to_owned() };
    for part in to.components() {
        match part {
            Component::ParentDir => {
                at.pop();
            }
            Component::Normal(name) => at.push(name),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
        if !to.is_absolute() && !at.starts_with(root) {
            return false;
        }
    }
    at.starts_with(root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    fn example() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("sub/deep")).unwrap();
        for name in ["b.raw", "a.qcow2", ".hidden", "sub/c.raw", "sub/deep/d.raw", ".a.qcow2.vr-part"] {
            fs::write(at(name), b"x").unwrap();
        }
        symlink("sub/c.raw", at("link")).unwrap();
        drop(UnixListener::bind(at("socket")).unwrap());
        dir
    }

    fn left(tree: &Tree) -> Vec<String> {
        tree.left_out.iter().map(|l| l.path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn all_that_a_directory_holds_is_copied_or_named_as_left_out() {
        let dir = example();
        let flat = walk(dir.path(), false).unwrap();
        assert_eq!(flat.files, ["a.qcow2", "b.raw"].map(PathBuf::from));
        assert_eq!(left(&flat), [".a.qcow2.vr-part", ".hidden", "link", "socket", "sub"]);
        assert!(flat.dirs.is_empty() && flat.links.is_empty());
        let whole = walk(dir.path(), true).unwrap();
        assert_eq!(whole.files, [".hidden", "a.qcow2", "b.raw", "sub/c.raw", "sub/deep/d.raw"].map(PathBuf::from));
        assert_eq!(whole.dirs, ["sub", "sub/deep"].map(PathBuf::from));
        assert_eq!(whole.links, [(PathBuf::from("link"), "sub/c.raw".to_owned())]);
        assert_eq!(left(&whole), [".a.qcow2.vr-part", "socket"]);
        assert!(whole.left_out.iter().all(|l| !l.why.is_empty()));
    }

    #[test]
    fn directories_and_links_are_made_twice_without_harm_and_replace_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for _ in 0..2 {
            make(&Make::dir(at("a")), None).unwrap();
            make(&Make::link(at("a/l"), "../x.raw".into()), None).unwrap();
        }
        assert_eq!(fs::read_link(at("a/l")).unwrap(), Path::new("../x.raw"));
        let e = make(&Make::link(at("a/l"), "other".into()), None).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict);
        fs::write(at("f"), b"").unwrap();
        assert_eq!(make(&Make::dir(at("f")), None).unwrap_err().kind(), Kind::Conflict);
        let meta = FileMeta { mode: 0o750, modified_s: 1_000_000, ..meta_of(&at("a")).unwrap() };
        make(&Make { path: at("a"), what: What::Dir { meta: Some(meta) } }, None).unwrap();
        assert_eq!(fs::metadata(at("a")).unwrap().permissions().mode() & 0o7777, 0o750);
    }

    #[test]
    fn nothing_that_an_agent_makes_leads_out_of_its_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("images");
        fs::create_dir_all(root.join("sub")).unwrap();
        let made = |path: &str, to: &str| make(&Make::link(root.join(path), to.into()), Some(&root));
        for (path, to) in [("sub/a", "../b.raw"), ("b", "sub/c"), ("c", root.join("d").to_str().unwrap())] {
            made(path, to).unwrap();
        }
        for (path, to) in [("x", "../secret"), ("x", "/etc/passwd"), ("sub/x", "../../secret"), ("x", "../images/a")] {
            assert_eq!(made(path, to).unwrap_err().kind(), Kind::Refused, "{path} to {to}");
        }
        make(&Make::dir(root.clone()), Some(&root)).unwrap();
        make(&Make::dir(root.join("sub/new")), Some(&root)).unwrap();
        assert_eq!(make(&Make::dir(dir.path().join("out")), Some(&root)).unwrap_err().kind(), Kind::Refused);
    }
}
