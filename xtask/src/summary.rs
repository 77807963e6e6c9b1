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

#[cfg(test)]
mod tests {
    use super::*;

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
