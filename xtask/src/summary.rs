//! Counts tests from what `cargo test` prints.

use std::fmt;
use std::ops::Add;

/// How many tests passed, failed, and were ignored.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) ignored: usize,
}

impl Counts {
    /// Adds up every line like `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; ...`.
    pub(crate) fn of(output: &str) -> Self {
        let mut total = Self::default();
        for line in output.lines() {
            // A test's own output may stand before it on the line.
            let Some((_, result)) = line.split_once("test result: ") else { continue };
            let Some((_, numbers)) = result.split_once(". ") else { continue };
            for part in numbers.split("; ") {
                let Some((number, word)) = part.split_once(' ') else { continue };
                let Ok(number) = number.parse::<usize>() else { continue };
                match word {
                    "passed" => total.passed += number,
                    "failed" => total.failed += number,
                    "ignored" => total.ignored += number,
                    _ => {}
                }
            }
        }
        total
    }
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            ignored: self.ignored + other.ignored,
        }
    }
}

/// The plain line that CI reads.
impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.ignored > 0 {
            write!(f, ", {} skipped", self.ignored)?;
        }
        Ok(())
    }
}

/// As many lines of each test that failed are said again.
const LINES: usize = 40;

/// What the tests that failed printed, a paragraph each: whoever reads only the end of a long log finds it there.
pub(crate) fn failures(output: &str) -> Vec<String> {
    let mut found: Vec<Vec<&str>> = Vec::new();
    let mut inside = false;
    for line in output.lines() {
        if line.starts_with("---- ") && line.ends_with(" ----") {
            inside = true;
            found.push(vec![line]);
        } else if line == "failures:" || line.starts_with("test result: ") {
            inside = false;
        } else if let Some(section) = found.last_mut().filter(|_| inside) {
            section.push(line);
        }
    }
    let shown = |lines: Vec<&str>| {
        let left = lines.len().saturating_sub(LINES);
        let mut text = lines.into_iter().take(LINES).collect::<Vec<_>>().join("\n");
        if left > 0 {
            text.push_str(&format!("\n[{left} more lines]"));
        }
        text
    };
    found.into_iter().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_tests_printed_is_found() {
        let long = "line\n".repeat(50);
        let output = format!(
            "running 2 tests\ntest a ... FAILED\ntest b ... FAILED\n\nfailures:\n\n---- a stdout ----\nError: one\n\n\
            ---- b stdout ----\n{long}\nfailures:\n    a\n    b\n\ntest result: FAILED. 0 passed; 2 failed\nother\n"
        );
        let [one, other] = &failures(&output)[..] else { panic!("two failures") };
        assert_eq!(one, "---- a stdout ----\nError: one\n");
        assert_eq!(other.lines().count(), LINES + 1);
        assert!(other.ends_with("[12 more lines]"), "{other}");
    }

    #[test]
    fn what_passed_is_not_said_again() {
        let output = "running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed";
        assert_eq!(failures(output), Vec::<String>::new());
    }

    #[test]
    fn results_of_all_binaries_are_added() {
        let output = "running 3 tests\ntest a ... ok\n\
            test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
            some test printed this without a newline: test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; \
            0 filtered out; finished in 1.00s\n";
        let counts = Counts::of(output);
        assert_eq!(counts, Counts { passed: 5, failed: 1, ignored: 1 });
        assert_eq!(counts.to_string(), "5 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn no_result_counts_nothing() {
        assert_eq!(Counts::of("error: could not compile").to_string(), "0 passed, 0 failed");
    }
}
