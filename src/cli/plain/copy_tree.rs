//! What `copy` makes of its arguments: which image goes where, which directories and links go along, and what is left
//! out.

use crate::cli::plain::shared::absolute;
use crate::cli::speak::render;
use serde::Serialize;
use std::path::{Path, PathBuf};
use virt_replica::error::{Error, Kind, Result};
use virt_replica::plain::tree::{self, LeftOut};

/// One image, and where it goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Pair {
    pub source: PathBuf,
    pub target: PathBuf,
}

/// All that is to be done.
#[derive(Debug, Default)]
pub struct Job {
    pub images: Vec<Pair>,
    /// Directories to make, each before what lies in it.
    pub dirs: Vec<Pair>,
    /// Links to make, and what they lead to.
    pub links: Vec<(PathBuf, String)>,
    pub left_out: Vec<LeftOut>,
    /// A directory was among the sources.
    pub of_directories: bool,
}

/// What was done, counted.
#[derive(Debug, Serialize)]
pub struct Summary<'a> {
    pub images: usize,
    pub directories: usize,
    pub links: usize,
    pub left_out: &'a [LeftOut],
}

impl Job {
    pub fn summary(&self) -> Summary<'_> {
        let (images, directories, links) = (self.images.len(), self.dirs.len(), self.links.len());
        Summary { images, directories, links, left_out: &self.left_out }
    }
}

impl Summary<'_> {
    pub fn describe(&self) -> String {
        let count = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
        let mut lines = vec![format!(
            "{}, {}, {}; left out: {}",
            count(self.images, "image", "images"),
            count(self.directories, "directory", "directories"),
            count(self.links, "link", "links"),
            self.left_out.len()
        )];
        lines.extend(
            self.left_out.iter().map(|l| render::wrap("  left out: ", &format!("{} {}", l.path.display(), l.why))),
        );
        lines.join("\n")
    }
}

/// Which image goes where: a directory stands for what is in it, several sources go into a directory. With `recursive`
/// a directory goes along under its own name, unless a slash stands at its end, as with rsync.
pub fn job(sources: &[String], to: &str, target: &Path, here: bool, recursive: bool) -> Result<Job> {
    let into_directory = sources.len() > 1 || to.ends_with('/') || (here && target.is_dir());
    let mut job = Job::default();
    for text in sources {
        if text.starts_with("ssh://") {
            return Err(Error::new(Kind::Usage, format!("the source of a copy is on this host, and {text} is not"))
                .hint("start the copy on that host, with this one as its target; or let a patch come through a pipe (docs/plain.md)"));
        }
        let source = absolute(Path::new(text))?;
        if !source.is_dir() {
            let target = if into_directory { target.join(name_of(&source)?) } else { target.to_owned() };
            job.images.push(Pair { source, target });
            continue;
        }
        if !into_directory && !recursive {
            return Err(Error::new(Kind::Usage, "a directory is copied into a directory")
                .path(source)
                .hint("put a slash at the end of the target"));
        }
        let goes_along = recursive && !text.ends_with('/');
        let to = if goes_along { target.join(name_of(&source)?) } else { target.to_owned() };
        add(&mut job, &source, &to, target, recursive)?;
    }
    let mut targets: Vec<&Path> = job.images.iter().map(|p| p.target.as_path()).collect();
    targets.sort();
    match targets.windows(2).find(|two| two[0] == two[1]) {
        Some(two) => Err(Error::new(Kind::Usage, "two images would become one").path(two[0])),
        None => Ok(job),
    }
}

/// Adds what is in a directory. The directories that it goes into are made, with `recursive` only: without it they have
/// to be there.
fn add(job: &mut Job, source: &Path, to: &Path, top: &Path, recursive: bool) -> Result<()> {
    let tree = tree::walk(source, recursive)?;
    if tree.files.is_empty() && tree.dirs.is_empty() && tree.links.is_empty() {
        let seen = tree.left_out.iter().map(|l| format!("{} {}", l.path.display(), l.why)).collect::<Vec<_>>();
        let e = Error::new(Kind::NotFound, "there is no image in the directory").path(source);
        return Err(if seen.is_empty() { e } else { e.hint(seen.join("; ")) });
    }
    job.of_directories = true;
    if recursive {
        if to != top && !job.dirs.iter().any(|d| d.target == top) {
            // Only a directory to go into: it takes nobody's owner or mode.
            job.dirs.push(Pair { source: PathBuf::new(), target: top.to_owned() });
        }
        job.dirs.push(Pair { source: source.to_owned(), target: to.to_owned() });
    }
    job.dirs.extend(tree.dirs.iter().map(|d| Pair { source: source.join(d), target: to.join(d) }));
    job.images.extend(tree.files.iter().map(|f| Pair { source: source.join(f), target: to.join(f) }));
    job.links.extend(tree.links.into_iter().map(|(at, leads_to)| (to.join(at), leads_to)));
    job.left_out.extend(tree.left_out);
    Ok(())
}

fn name_of(path: &Path) -> Result<&str> {
    // Names travel as text.
    let name = path.file_name().and_then(|name| name.to_str());
    name.ok_or_else(|| Error::new(Kind::Usage, "an image has a name of text").path(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_images_go_into_a_directory_and_none_onto_another() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        std::fs::create_dir(&images).unwrap();
        for name in ["b.raw", "a.qcow2", ".hidden"] {
            std::fs::write(images.join(name), b"").unwrap();
        }
        std::fs::create_dir(images.join("sub")).unwrap();
        let of = |sources: &[&Path], to: &str| {
            let sources: Vec<String> = sources.iter().map(|s| s.to_str().unwrap().to_owned()).collect();
            job(&sources, to, Path::new(to), false, false).map(|job| job.images)
        };
        let pair = |source: &str, target: &str| Pair { source: images.join(source), target: target.into() };
        let one = images.join("b.raw");
        assert_eq!(of(&[&one], "/to/x.raw").unwrap(), [pair("b.raw", "/to/x.raw")]);
        assert_eq!(of(&[&one], "/to/").unwrap(), [pair("b.raw", "/to/b.raw")]);
        let both = [pair("a.qcow2", "/to/a.qcow2"), pair("b.raw", "/to/b.raw")];
        assert_eq!(of(&[&images], "/to/").unwrap(), both);
        assert_eq!(of(&[&images], "/to").unwrap_err().kind(), Kind::Usage);
        assert_eq!(of(&[&images, &one], "/to").unwrap_err().kind(), Kind::Usage, "b.raw twice");
        assert_eq!(of(&[&images.join("sub")], "/to/").unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn what_is_left_out_is_counted_and_named_and_goes_along_with_r() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        std::fs::create_dir_all(images.join("sub")).unwrap();
        for name in ["a.raw", ".hidden", "sub/c.raw"] {
            std::fs::write(images.join(name), b"").unwrap();
        }
        std::os::unix::fs::symlink("a.raw", images.join("link")).unwrap();
        let of = |slash: &str, recursive| {
            let source = format!("{}{slash}", images.display());
            job(&[source], "/to/", Path::new("/to/"), false, recursive).unwrap()
        };
        let flat = of("", false);
        assert!(flat.of_directories && flat.dirs.is_empty());
        assert_eq!((flat.images.len(), flat.left_out.len()), (1, 3));
        let said = flat.summary().describe();
        assert!(said.contains("1 image, 0 directories, 0 links; left out: 3"), "{said}");
        assert!(said.contains("sub is a directory: -r copies what is in it"), "{said}");
        let targets = |job: &Job| job.images.iter().map(|p| p.target.clone()).collect::<Vec<_>>();
        let inside = of("/", true);
        assert_eq!(targets(&inside), ["/to/.hidden", "/to/a.raw", "/to/sub/c.raw"].map(PathBuf::from));
        assert_eq!(inside.links, [(PathBuf::from("/to/link"), "a.raw".to_owned())]);
        // The target's own slash says nothing: a second run goes where the first one went.
        let bare = job(&[images.display().to_string()], "/to", Path::new("/to"), false, true).unwrap();
        assert_eq!(targets(&bare)[2], Path::new("/to/images/sub/c.raw"));
        let whole = of("", true);
        assert_eq!(targets(&whole)[2], Path::new("/to/images/sub/c.raw"));
        let dirs: Vec<_> = whole.dirs.iter().map(|d| d.target.clone()).collect();
        assert_eq!(dirs, ["/to/", "/to/images", "/to/images/sub"].map(PathBuf::from));
        assert!(whole.left_out.is_empty());
    }
}
