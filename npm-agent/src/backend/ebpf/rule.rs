//! The rule that makes the kernel track connections: it does so only where some rule asks for it.
//!
//! The rule is alone in a chain that nothing leads to. No packet meets it; that it exists is enough for both forms of
//! iptables.

use npm_policy::goal::Family;

use crate::backend::BackendError;
use crate::exec::Tools;

/// Its chain does not begin with AZURE-NPM, so that it is none of the iptables backend's: while that backend's chains go,
/// connections have to be tracked on.
const CHAIN: &str = "NPM-AGENT-CONNTRACK";

/// The programs of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Iptables {
    /// The family.
    pub family: Family,
    /// The name of the program that changes single rules; the one that restores has `-restore` behind it.
    pub program: &'static str,
}

impl Iptables {
    fn rule(&self) -> [&'static str; 10] {
        [
            CHAIN,
            "-m",
            "conntrack",
            "--ctstate",
            "NEW",
            "-m",
            "comment",
            "--comment",
            "npm-agent: connections are tracked",
            "-j",
        ]
    }

    /// Makes sure that the rule is there; whether it was not.
    ///
    /// # Errors
    /// It can't be added.
    pub fn ensure(&self, tools: &Tools) -> Result<bool, BackendError> {
        let mut check = vec!["-w", "5", "-C"];
        check.extend(self.rule());
        check.push("RETURN");
        if tools.run(self.program, &check, "").is_ok() {
            return Ok(false);
        }
        // Naming the chain makes it, or empties it.
        let rule =
            self.rule().map(|word| if word.contains(' ') { format!("\"{word}\"") } else { word.into() });
        let text = format!("*filter\n:{CHAIN} - [0:0]\n-A {} RETURN\nCOMMIT\n", rule.join(" "));
        tools.write(&format!("{}-restore", self.program), &["--noflush", "-w", "5"], &text)?;
        Ok(true)
    }

    /// Removes the rule and its chain; whether they were there.
    ///
    /// # Errors
    /// They are there still.
    pub fn remove(&self, tools: &Tools) -> Result<bool, BackendError> {
        if tools.run(self.program, &["-w", "5", "-S", CHAIN], "").is_err() {
            return Ok(false);
        }
        let text = format!("*filter\n:{CHAIN} - [0:0]\n-X {CHAIN}\nCOMMIT\n");
        tools.write(&format!("{}-restore", self.program), &["--noflush", "-w", "5"], &text)?;
        Ok(true)
    }
}
