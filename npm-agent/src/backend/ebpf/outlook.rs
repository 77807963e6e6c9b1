//! What the backend knows of itself that lets traffic escape judgement, for the board: interfaces without the program,
//! programs of others in front of it, connections that are not tracked.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::escape::{Board, Escape, Origin, Subject};
use crate::interfaces::Index;

/// What is known now, and where it is told.
#[derive(Default)]
pub(super) struct Outlook {
    board: Option<Board>,
    /// Interfaces that have refused the program.
    without: BTreeMap<Index, Escape>,
    /// Those where it is not the first.
    before: BTreeMap<Index, BTreeSet<Escape>>,
    /// What was found of the rules that track connections when they were last looked at.
    tracking: BTreeSet<Escape>,
}

impl Outlook {
    pub(super) fn report_to(&mut self, board: Board) {
        self.board = Some(board);
    }

    /// An interface has the program, and these programs before it; or the kernel does not let itself be asked for them.
    pub(super) fn attached(&mut self, index: Index, name: &str, before: io::Result<Vec<String>>) {
        self.without.remove(&index);
        let before = match before {
            Ok(before) => before
                .into_iter()
                .map(|program| Escape::ProgramBefore { interface: name.to_owned(), program })
                .collect(),
            Err(error) => BTreeSet::from([Escape::Unknown {
                subject: Subject::Programs,
                reason: format!("on {name}: {error}"),
            }]),
        };
        self.before.insert(index, before);
    }

    /// An interface has refused the program.
    pub(super) fn refused(&mut self, index: Index, name: &str, reason: String) {
        self.without.insert(index, Escape::WithoutProgram { interface: name.to_owned(), reason });
        self.before.remove(&index);
    }

    /// Whether an interface has refused the program when it was last tried.
    pub(super) fn has_refusals(&self) -> bool {
        !self.without.is_empty()
    }

    /// An interface is gone, or is not to have the program.
    pub(super) fn forget(&mut self, index: Index) {
        let was_without = self.without.remove(&index).is_some();
        let had_others = self.before.remove(&index).is_some_and(|before| !before.is_empty());
        if was_without || had_others {
            self.tell();
        }
    }

    pub(super) fn tracking(&mut self, found: BTreeSet<Escape>) {
        self.tracking = found;
    }

    /// Nothing is judged any more, so nothing escapes.
    pub(super) fn close(&mut self) {
        *self = Self { board: self.board.take(), ..Self::default() };
        self.tell();
    }

    /// Puts on the board what is known. An interface that comes and goes at once refuses the program for a moment, so what
    /// is known is told after a look at all of them.
    pub(super) fn tell(&self) {
        if let Some(board) = &self.board {
            let all = self.without.values().chain(self.before.values().flatten()).chain(&self.tracking);
            board.replace(Origin::Backend, all.cloned().collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::escape::{Effect, Engine};

    #[test]
    fn what_is_told_is_what_is_so_now() {
        let board = Board::new(Engine::Ebpf, None).unwrap();
        let names = || -> Vec<(Effect, &str)> {
            board.current().iter().map(|(effect, escape)| (*effect, escape.name())).collect()
        };
        let mut outlook = Outlook::default();
        outlook.report_to(board.clone());
        outlook.refused(Index(3), "eth0", "no".to_owned());
        assert_eq!(names(), [], "until all were looked at");
        outlook.attached(Index(4), "eth1", Ok(vec!["other".to_owned()]));
        outlook.tell();
        assert_eq!(names(), [(Effect::Unjudged, "without-program"), (Effect::Unknown, "program-before")]);
        outlook.attached(Index(3), "eth0", Ok(Vec::new()));
        outlook.forget(Index(4));
        assert_eq!(names(), []);
        outlook.attached(Index(3), "eth0", Err(io::ErrorKind::PermissionDenied.into()));
        outlook.tell();
        assert_eq!(names(), [(Effect::Unknown, "unknown")], "not to be told is not to be fine");
        outlook.attached(Index(3), "eth0", Ok(Vec::new()));
        outlook.refused(Index(5), "eth2", "no".to_owned());
        outlook.tell();
        outlook.close();
        assert_eq!(names(), []);
    }
}
