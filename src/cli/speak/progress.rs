//! Stderr with progress bars at its end: every other line goes above them.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::Write;
use std::sync::LazyLock;
use std::time::Duration;

/// All bars of this process. Whatever else is written to stderr goes above them.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Writes a line to stderr, above the bars. Never panics: a terminal that is gone must not end a run.
pub fn say(text: &str) {
    BARS.suspend(|| drop(writeln!(std::io::stderr(), "{text}")));
}

/// The log's way to stderr.
pub struct AboveBars;

impl Write for AboveBars {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        BARS.suspend(|| std::io::stderr().write(buf))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A bar for bytes that are read: `vda  #####>----  40 %  1.2 GiB/s  3.4 MiB sent  12s left`.
pub fn bar(name: &str, size_bytes: u64) -> ProgressBar {
    let bar = BARS.add(ProgressBar::new(size_bytes).with_style(style()).with_prefix(name.to_owned()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// At most 79 columns wide.
fn style() -> ProgressStyle {
    ProgressStyle::with_template("      {prefix:5} {bar:20} {percent:>3} %  {binary_bytes_per_sec}  {msg} {eta} left")
        .expect("the template is a constant, and a test parses it")
        .progress_chars("#>-")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_template_is_one() {
        super::style();
    }
}
