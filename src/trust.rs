//! Whether a file may tell this program what to do: configuration, policies, mappings, and programs of the operator's.
//!
//! As ssh does with its own: the file and every directory that leads to it belong to root or to the user of this
//! process, and nobody else may write there. A directory that is sticky, as /tmp is, is as good: in it nobody replaces
//! what is another's.

use crate::error::{Error, Kind, Result};
use std::fs::{self, Metadata};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// [`Kind::Config`] if somebody else could change what is read here; the hint has the command that ends it. A missing
/// file is no error here: opening it gives one.
pub fn check(path: &Path) -> Result<()> {
    let us = rustix::process::geteuid().as_raw();
    let Ok(real) = fs::canonicalize(path) else { return Ok(()) };
    // A link is as good as the directory that it lies in, too.
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = fs::canonicalize(dir).ok();
    let file = real.clone();
    for place in real.ancestors().chain(beside.iter().flat_map(|dir| dir.ancestors())) {
        let Ok(meta) = fs::metadata(place) else { continue };
        if let Some(fault) = fault(&meta, us) {
            return Err(distrust(&file, place, &meta, fault));
        }
    }
    Ok(())
}

/// As [`check`], of a program as a command line names it: without a slash it is looked for where the system looks.
pub fn check_program(name: &str) -> Result<()> {
    if name.contains('/') {
        return check(Path::new(name));
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found: Option<PathBuf> = std::env::split_paths(&paths).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.map_or(Ok(()), |file| check(&file))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Owner,
    Mode,
}

fn fault(meta: &Metadata, us: u32) -> Option<Fault> {
    let sticky_dir = meta.is_dir() && meta.mode() & 0o1000 != 0;
    match () {
        // Devices and pipes are the system's, and their modes say nothing of who speaks through them.
        _ if !meta.is_dir() && !meta.is_file() => None,
        _ if meta.uid() != 0 && meta.uid() != us => Some(Fault::Owner),
        _ if meta.mode() & 0o022 != 0 && !sticky_dir => Some(Fault::Mode),
        _ => None,
    }
}

fn distrust(file: &Path, place: &Path, meta: &Metadata, fault: Fault) -> Error {
    let kind = if meta.is_dir() { "the directory" } else { "the file" };
    let (owner, mode) = (meta.uid(), meta.permissions().mode() & 0o7777);
    let (what, command) = match fault {
        Fault::Owner => ("another user owns", "chown root"),
        Fault::Mode => ("other users may write to", "chmod go-w"),
    };
    let what =
        format!("{what} {kind} {} (owner: uid {owner}, mode {mode:04o}), so this is not obeyed", place.display());
    Error::new(Kind::Config, what).path(file).hint(format!("run `{command} {}`", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_others_may_change_is_refused_with_the_command_that_ends_it() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("policies.d");
        let file = dir.join("a.yaml");
        fs::create_dir(&dir).unwrap();
        fs::write(&file, "").unwrap();
        for (dir_mode, file_mode, place) in [
            (0o755, 0o644, None),
            (0o700, 0o600, None),
            (0o1777, 0o644, None),
            (0o755, 0o664, Some(&file)),
            (0o755, 0o646, Some(&file)),
            (0o777, 0o644, Some(&dir)),
            (0o775, 0o644, Some(&dir)),
            (0o1777, 0o666, Some(&file)),
        ] {
            set(&dir, dir_mode);
            set(&file, file_mode);
            let checked = check(&file);
            let Some(place) = place else {
                checked.unwrap();
                continue;
            };
            let e = checked.unwrap_err();
            let mode = if place == &dir { dir_mode } else { file_mode };
            assert_eq!((e.kind(), e.context().path.as_deref()), (Kind::Config, Some(file.as_path())));
            assert!(e.what().contains(&format!("{} (owner: uid ", place.display())), "{e}");
            assert!(e.what().contains(&format!("mode {mode:04o})")), "{e}");
            assert_eq!(e.hint_text().unwrap(), format!("run `chmod go-w {}`", place.display()));
        }
        check(&dir.join("not there")).unwrap();
        check(Path::new("/dev/null")).unwrap();
        check_program("sh").unwrap();
        assert!(check_program(file.to_str().unwrap()).is_err());
    }

    #[test]
    fn a_link_leads_to_its_file_and_lies_in_a_directory_and_both_count() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name: &str| temp.path().join(name);
        fs::create_dir(at("open")).unwrap();
        fs::create_dir(at("ours")).unwrap();
        fs::write(at("ours/file"), "").unwrap();
        set(&at("ours/file"), 0o644);
        std::os::unix::fs::symlink(at("ours/file"), at("open/link")).unwrap();
        check(&at("open/link")).unwrap();
        set(&at("open"), 0o777);
        assert!(check(&at("open/link")).unwrap_err().what().contains("open (owner"));
        check(&at("ours/file")).unwrap();
        set(&at("ours/file"), 0o666);
        set(&at("open"), 0o755);
        assert!(check(&at("open/link")).unwrap_err().what().contains("ours/file (owner"));
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("a");
        fs::write(&file, "").unwrap();
        let meta = fs::metadata(&file).unwrap();
        assert_eq!(fault(&meta, meta.uid()), None);
        if meta.uid() == 0 {
            std::os::unix::fs::chown(&file, Some(12345), None).unwrap();
            let e = check(&file).unwrap_err();
            assert!(e.what().contains("another user owns the file") && e.what().contains("uid 12345"), "{e}");
            assert_eq!(e.hint_text().unwrap(), format!("run `chown root {}`", file.display()));
        } else {
            assert_eq!(fault(&meta, meta.uid() + 1), Some(Fault::Owner));
        }
    }
}
