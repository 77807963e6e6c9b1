//! Steps of a plan, as the tools' input.

use std::fmt::Write as _;
use std::sync::Arc;

use npm_policy::goal::Family;
#[cfg(feature = "libipset")]
use npm_policy::goal::Member;

use super::BackendError;
use super::layout;
use super::plan::{SetOp, Transaction};
use super::state::{Line, Name};
use super::text;
use super::variant::Variant;
use crate::exec::Tools;

/// How many writes to sets are done one by one, without starting a program.
#[cfg(feature = "libipset")]
const SINGLE_WRITES: usize = 2;

/// The lines of an `ipset restore` file, one for each operation.
pub(super) fn sets_text(family: Family, ops: &[SetOp]) -> String {
    let mut text = String::new();
    for op in ops {
        // Writing to a String cannot fail.
        let _ = match op {
            SetOp::Create { set, kind } => writeln!(text, "create {set} {}", text::kind_text(family, kind)),
            SetOp::Add { set, member } => writeln!(text, "add {set} {}", text::member_text(member)),
            SetOp::Delete { set, member } => writeln!(text, "del {set} {}", text::element_text(member)),
            SetOp::Swap { one, other } => writeln!(text, "swap {one} {other}"),
            SetOp::Destroy { set } => writeln!(text, "destroy {set}"),
        };
    }
    text
}

/// Writes to sets. Where it fails, writes before the failing one may be lost as well: what is there has to be read again.
///
/// # Errors
/// `ipset` could not be run or refused a line.
pub(super) fn sets(tools: &Tools, family: Family, ops: &[SetOp]) -> Result<(), BackendError> {
    #[cfg(feature = "libipset")]
    if ops.len() <= SINGLE_WRITES && tools.directory.is_none() && single::all(ops) {
        return Ok(());
    }
    tools.write("ipset", &["restore", "-exist"], &sets_text(family, ops))
}

/// Single members through libipset: microseconds instead of a process.
#[cfg(feature = "libipset")]
mod single {
    use ipset::Session;
    use ipset::types::{Error, HashNet, NetDataType};

    use super::*;

    /// Whether all of the writes could be done here. If not, the caller does them all: repeated, they change nothing.
    pub(super) fn all(ops: &[SetOp]) -> bool {
        ops.iter().all(|op| match op {
            // Of the types that we use, the crate can write to hash:net only: it knows no protocol.
            SetOp::Add { set, member: Member::Address(address) } => {
                done(write(set, |session| session.add(NetDataType::new(*address, length(*address)), &[])))
            }
            SetOp::Delete { set, member: Member::Address(address) } => {
                done(write(set, |session| session.del(NetDataType::new(*address, length(*address)))))
            }
            SetOp::Add { .. }
            | SetOp::Delete { .. }
            | SetOp::Create { .. }
            | SetOp::Swap { .. }
            | SetOp::Destroy { .. } => false,
        })
    }

    /// A session of its own for each write: its socket belongs to the network namespace that the thread is in now.
    fn write(
        set: &Name,
        command: impl FnOnce(&mut Session<HashNet>) -> Result<bool, Error>,
    ) -> Result<bool, Error> {
        command(&mut Session::<HashNet>::new(set.to_string()))
    }

    fn done(result: Result<bool, Error>) -> bool {
        match result {
            Ok(_) => true,
            Err(error) => {
                tracing::debug!(?error, "libipset refused a write, trying ipset restore");
                false
            }
        }
    }

    fn length(address: std::net::IpAddr) -> u8 {
        ipnet::IpNet::from(address).prefix_len()
    }
}

/// An `iptables-restore --noflush` file.
pub(super) fn rules_text(transaction: &Transaction) -> String {
    let mut lines = vec!["*filter".to_owned()];
    // Declaring a chain empties it.
    lines.extend(transaction.chains.keys().map(|name| format!(":{name} - [0:0]")));
    if let Some(edit) = &transaction.forward {
        lines.extend(
            edit.delete.iter().map(|line| format!("-D {} {}", layout::FORWARD, text::line_text(line))),
        );
        if let Some((index, jump)) = &edit.insert {
            let jump = text::rule_text(jump);
            lines.push(format!("-I {} {} {jump}", layout::FORWARD, index + 1));
        }
    }
    for (name, chain) in &transaction.chains {
        for line in chain.iter().flat_map(|chain| chain.iter()) {
            lines.push(format!("-A {name} {}", text::line_text(line)));
        }
    }
    let gone = transaction.chains.iter().filter(|(_, chain)| chain.is_none());
    lines.extend(gone.map(|(name, _)| format!("-X {name}")));
    lines.push("COMMIT\n".to_owned());
    lines.join("\n")
}

/// Carries out a transaction.
///
/// # Errors
/// The tool could not be run or refused the transaction; nothing of it has happened then.
pub(super) fn rules(
    tools: &Tools,
    variant: Variant,
    family: Family,
    lock_wait: std::time::Duration,
    transaction: &Transaction,
) -> Result<(), BackendError> {
    let text = rules_text(transaction);
    let wait = lock_wait.as_secs().max(1).to_string();
    tools.write(&variant.restore(family), &["--noflush", "-w", &wait], &text)
}

/// The set that could not be destroyed because rules name it, if that is what went wrong.
pub(super) fn held_set(ops: &[SetOp], error: &BackendError) -> Option<Name> {
    let BackendError::Refused { stderr, .. } = error else { return None };
    let held = stderr.contains("it is in use by a kernel component");
    match ops.get(line_number(stderr)?.checked_sub(1)?)? {
        SetOp::Destroy { set } if held => Some(Arc::clone(set)),
        SetOp::Destroy { .. }
        | SetOp::Create { .. }
        | SetOp::Add { .. }
        | SetOp::Delete { .. }
        | SetOp::Swap { .. } => None,
    }
}

/// The line that `ipset` complains of: "Error in line 4: ..".
fn line_number(stderr: &str) -> Option<usize> {
    let (_, rest) = stderr.split_once("Error in line")?;
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// A transaction that shows whether the kernel takes a rule: it makes a chain that nothing leads to, and removes it.
/// Only a refusal counts: a tool that hangs or is missing says nothing of the rule.
pub(super) fn probe(
    tools: &Tools,
    variant: Variant,
    family: Family,
    lock_wait: std::time::Duration,
    rule: &Line,
) -> bool {
    let wait = lock_wait.as_secs().max(1).to_string();
    let run = |lines: &str| {
        let text = format!("*filter\n:{} - [0:0]\n{lines}\nCOMMIT\n", layout::PROBE);
        let outcome = tools.write(&variant.restore(family), &["--noflush", "-w", &wait], &text);
        !matches!(outcome, Err(BackendError::Refused { .. }))
    };
    let taken = run(&format!("-A {} {}", layout::PROBE, text::line_text(rule)));
    // What is left of it after a failure here is a leftover that the next plan removes.
    run(&format!("-X {}", layout::PROBE)) && taken
}

#[cfg(test)]
mod tests {
    use super::super::plan::ForwardEdit;
    use super::super::state::{Rule, Target};
    use super::*;

    #[test]
    fn a_transaction_as_text() {
        let chain =
            Arc::new(vec![Line::Rule(Rule::new(Target::Drop)), Line::Rule(Rule::new(Target::Return))]);
        let jump = layout::jump(layout::Established::Keep);
        let transaction = Transaction {
            chains: [("AZURE-NPM".into(), Some(chain)), ("AZURE-NPM-X".into(), None)].into(),
            forward: Some(ForwardEdit { delete: vec![Line::Rule(jump.clone())], insert: Some((0, jump)) }),
        };
        assert_eq!(
            rules_text(&transaction),
            "*filter\n:AZURE-NPM - [0:0]\n:AZURE-NPM-X - [0:0]\n\
             -D FORWARD -m conntrack ! --ctstate RELATED,ESTABLISHED -j AZURE-NPM\n\
             -I FORWARD 1 -m conntrack ! --ctstate RELATED,ESTABLISHED -j AZURE-NPM\n\
             -A AZURE-NPM -j DROP\n-A AZURE-NPM -j RETURN\n-X AZURE-NPM-X\nCOMMIT\n"
        );
    }

    #[test]
    fn sets_in_use_are_recognised() {
        let destroy = |set: &str| SetOp::Destroy { set: set.into() };
        let ops = [destroy("a"), destroy("b")];
        let refused = |stderr: &str| BackendError::Refused {
            program: "ipset restore".to_owned(),
            status: "exit status: 1".to_owned(),
            stderr: stderr.to_owned(),
        };
        let in_use =
            "ipset v7.17: Error in line 2: Set cannot be destroyed: it is in use by a kernel component";
        assert_eq!(held_set(&ops, &refused(in_use)), Some("b".into()));
        let missing = "ipset v7.17: Error in line 2: The set with the given name does not exist";
        assert_eq!(held_set(&ops, &refused(missing)), None);
    }
}
