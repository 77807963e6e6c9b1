//! An answer as lines: a watch sends one event a line, in parts that end anywhere.

use std::time::Duration;

use bytes::Bytes;

use super::client::{Answer, RequestError};

/// The longest line: etcd takes objects of 1.5 MiB, and JSON may spell a byte with six.
const MAX_LINE_BYTES: usize = 16 << 20;

/// How much room is kept when nothing is in it.
const KEPT_BYTES: usize = 256 << 10;

/// What waiting came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fill {
    /// There may be lines.
    More,
    /// The answer ended, not amid a line.
    Ended,
    /// The answer ended amid a line.
    Cut,
    /// Nothing came.
    Silent,
}

/// An answer's lines.
pub(super) struct Lines {
    answer: Answer,
    buffer: Buffer,
}

impl Lines {
    pub(super) fn new(answer: Answer) -> Self {
        Self { answer, buffer: Buffer::default() }
    }

    /// Waits for more. Dropping it while it waits loses nothing.
    ///
    /// # Errors
    /// The connection broke, or a line is too long.
    pub(super) async fn fill(&mut self, patience: Duration) -> Result<Fill, RequestError> {
        match self.answer.part(patience).await {
            Ok(Some(part)) => {
                self.buffer.push(&part);
                match self.buffer.pending() > MAX_LINE_BYTES {
                    true => Err(RequestError::TooLong(MAX_LINE_BYTES)),
                    false => Ok(Fill::More),
                }
            }
            Ok(None) if self.buffer.pending() == 0 => Ok(Fill::Ended),
            Ok(None) => Ok(Fill::Cut),
            Err(RequestError::Silent(_)) => Ok(Fill::Silent),
            Err(error) => Err(error),
        }
    }

    /// The next line that is complete.
    pub(super) fn next(&mut self) -> Option<&[u8]> {
        self.buffer.next()
    }
}

/// Bytes that have come and were not taken.
#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// How far there is no end of a line.
    searched: usize,
}

impl Buffer {
    fn push(&mut self, part: &Bytes) {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.bytes.is_empty() && self.bytes.capacity() > KEPT_BYTES {
            self.bytes.shrink_to(KEPT_BYTES);
        }
        self.bytes.extend_from_slice(part);
    }

    fn pending(&self) -> usize {
        self.bytes.len() - self.start
    }

    fn next(&mut self) -> Option<&[u8]> {
        loop {
            let Some(length) = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.bytes.len();
                return None;
            };
            let (start, end) = (self.start, self.searched + length);
            self.start = end + 1;
            self.searched = self.start;
            let is_blank = self.bytes[start..end].iter().all(u8::is_ascii_whitespace);
            if !is_blank {
                return Some(&self.bytes[start..end]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_however_the_parts_are_cut() {
        let text = b"{\"a\":1}\n\n{\"b\":2}\r\nxyz\nrest";
        for size in 1..=text.len() {
            let mut buffer = Buffer::default();
            let mut lines: Vec<Vec<u8>> = Vec::new();
            for part in text.chunks(size) {
                buffer.push(&Bytes::copy_from_slice(part));
                while let Some(line) = buffer.next() {
                    lines.push(line.to_vec());
                }
            }
            assert_eq!(lines, [&b"{\"a\":1}"[..], b"{\"b\":2}\r", b"xyz"], "parts of {size}");
            assert_eq!(buffer.pending(), 4, "parts of {size}");
        }
    }
}
