//! What an agent says on stderr: always read (a full pipe would stop the agent), the end of it kept for the error.

use crate::error::printable;

/// Most bytes kept.
const TAIL_MAX: usize = 8 << 10;

/// The last bytes of a stream.
#[derive(Debug, Default)]
pub struct Tail(Vec<u8>);

impl Tail {
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        let excess = self.0.len().saturating_sub(TAIL_MAX);
        self.0.drain(..excess);
    }

    /// `; it said: …`, or nothing.
    pub fn said(&self) -> String {
        let text = printable(&String::from_utf8_lossy(&self.0), 600);
        if text.is_empty() { String::new() } else { format!("; it said: {text}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept_and_it_is_fit_for_a_terminal() {
        let mut tail = Tail::default();
        assert_eq!(tail.said(), "");
        tail.push(&[b'x'; 3 * TAIL_MAX]);
        tail.push(b"\x1b[31mno such store\r\n");
        assert_eq!(tail.0.len(), TAIL_MAX);
        assert!(tail.said().ends_with("[31mno such store") && !tail.said().contains('\x1b'), "{}", tail.said());
        assert!(tail.said().len() < 700);
    }
}
