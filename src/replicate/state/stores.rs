//! Which store this host has found under which URL: a help to recognise a store, and to notice that one is missing.
//!
//! One small document per URL in `STATE/stores`. None of them is needed: without it a store is only not recognised.
//!
//! Format: docs/formats/journal.md.

use crate::durable::{read_json, replace, to_json};
use crate::error::Result;
use crate::name::StoreId;
use crate::replica::root::KnownStore;
use crate::replicate::state::locked_dir;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// Stores that are remembered for one URL: a forced command may lead each key to another one.
const FOUND_MAX: usize = 8;

#[derive(Debug, Serialize, Deserialize)]
struct Known {
    /// Version of this document: 1.
    format: u32,
    url: String,
    /// Newest first.
    found: Vec<KnownStore>,
}

fn dir(state: &Path) -> PathBuf {
    state.join("stores")
}

fn file(url: &str) -> String {
    format!("{}.json", &blake3::hash(url.as_bytes()).to_hex()[..16])
}

/// The stores that were found under this URL, the newest first.
pub fn found(state: &Path, url: &str) -> Vec<KnownStore> {
    let known = read_json::<Known>(&dir(state).join(file(url))).ok().flatten();
    known.filter(|k| k.format == 1 && k.url == url).map_or_else(Vec::new, |k| k.found)
}

/// The store that was found under this URL the last time.
pub fn known(state: &Path, url: &str) -> Option<StoreId> {
    found(state, url).into_iter().next().map(|found| found.id)
}

/// The URLs under which this store was found the last time, sorted.
pub fn urls(state: &Path, store: &StoreId) -> Vec<String> {
    let entries = fs::read_dir(dir(state)).into_iter().flatten().flatten();
    let known = entries.filter_map(|e| read_json::<Known>(&e.path()).ok().flatten());
    let is_it = |k: &Known| k.format == 1 && k.found.first().is_some_and(|found| found.id == *store);
    let mut urls: Vec<String> = known.filter(is_it).map(|k| k.url).collect();
    urls.sort();
    urls
}

/// Remembers the store that was found under a URL.
pub fn learn(state: &Path, url: &str, store: &KnownStore) -> Result<()> {
    let mut all = found(state, url);
    if all.first() == Some(store) {
        return Ok(());
    }
    all.retain(|other| other.root != store.root);
    all.insert(0, store.clone());
    all.truncate(FOUND_MAX);
    let dir = dir(state);
    locked_dir::make(&dir)?;
    replace(&dir, &file(url), &to_json(&Known { format: 1, url: url.to_owned(), found: all }))
}

/// All URLs that mean what this one means, as far as is known: itself first.
pub fn spellings(state: &Path, url: &str) -> Vec<String> {
    spellings_of(state, url, known(state, url).as_ref())
}

/// The same for one that leads to this store today.
pub fn spellings_of(state: &Path, url: &str, store: Option<&StoreId>) -> Vec<String> {
    let others = store.map_or_else(Vec::new, |store| urls(state, store));
    std::iter::once(url.to_owned()).chain(others.into_iter().filter(|other| other != url)).collect()
}

/// What the dirty bitmaps of a target are named after, newest custom first: its store, then the URLs that lead to it,
/// which is what version 0.1 did, and what is done where the store is not known.
pub fn keys(state: &Path, url: &str, store: Option<&StoreId>) -> Vec<String> {
    let own = store.map(|store| format!("store:{store}"));
    own.into_iter().chain(spellings_of(state, url, store)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_store_may_have_many_urls_and_a_url_has_one_store() {
        let temp = tempfile::tempdir().unwrap();
        let at = |root: &str, bits| KnownStore { root: root.into(), id: StoreId::from_bits(bits) };
        let (one, two) = (StoreId::from_bits(1), StoreId::from_bits(2));
        assert_eq!(known(temp.path(), "ssh://b"), None);
        for (url, store) in [
            ("ssh://root@b", at("/s", 1)),
            ("ssh://b", at("/s", 1)),
            ("ssh://c", at("/s", 1)),
            ("ssh://c", at("/other", 3)),
            ("ssh://c", at("/s", 2)),
        ] {
            learn(temp.path(), url, &store).unwrap();
        }
        assert_eq!(found(temp.path(), "ssh://c"), [at("/s", 2), at("/other", 3)]);
        assert_eq!(urls(temp.path(), &one), ["ssh://b", "ssh://root@b"]);
        assert_eq!(known(temp.path(), "ssh://c"), Some(two));
        assert_eq!(spellings(temp.path(), "ssh://root@b"), ["ssh://root@b", "ssh://b"]);
        assert_eq!(spellings(temp.path(), "ssh://new"), ["ssh://new"]);
        let store = format!("store:{one}");
        assert_eq!(keys(temp.path(), "ssh://b", Some(&one)), [store.as_str(), "ssh://b", "ssh://root@b"]);
        assert_eq!(keys(temp.path(), "ssh://new", None), ["ssh://new"]);
        fs::write(dir(temp.path()).join(file("ssh://c")), "{").unwrap();
        assert_eq!(known(temp.path(), "ssh://c"), None, "what cannot be read is not known");
    }
}
