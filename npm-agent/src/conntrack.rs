//! The kernel's table of connections, over ctnetlink: shown, marked, deleted.
//!
//! It knows tuples and marks, and nothing of policies. A [`Conntrack`] works in the network namespace of the thread
//! that opened it, wherever it is used afterwards. Every call blocks for as long as the kernel works: a large table
//! takes seconds.
//!
//! Raw messages over a socket: the crates that know ctnetlink leave out what makes a tuple a key (ICMP's parts,
//! zones), the mask of a mark, and the entry's id.

mod entry;
mod socket;
mod wire;

use std::collections::BTreeSet;
use std::time::Duration;

use netlink_packet_core::NLM_F_ACK;
use rustix::io::Errno;

use self::entry::{CTA_ID, CTA_MARK, CTA_MARK_MASK};
pub use self::entry::{
    DESTINATION_TRANSLATED, Detail, EXPECTED, Entry, SEEN_REPLY, SOURCE_TRANSLATED, Tuple,
};
use self::socket::{Dump, Socket};
use self::wire::{Ask, Attributes, Header};

/// `CTA_STATS_GLOBAL_ENTRIES` (Linux, include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const CTA_STATS_GLOBAL_ENTRIES: u16 = 1;

/// How many requests go out before their answers are read: all answers fit into a socket's default receive buffer.
const BATCH: usize = 64;

/// How often a table is read that changes its form meanwhile, and how often a batch is sent whose answers were lost.
const MAX_ATTEMPTS: usize = 5;

/// How often the table is read for entries without the mark: each pass finds what arrived or moved during the last.
const MAX_PASSES: usize = 4;

/// The table of connections.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
}

/// What became of a request to delete an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletion {
    /// It was there and is gone.
    Deleted,
    /// There is no such entry.
    Absent,
}

/// Bits of a connection mark that an entry must have, as `value` in the bits of `mask`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkFilter {
    /// The bits.
    pub value: u32,
    /// Which bits count.
    pub mask: u32,
}

impl MarkFilter {
    /// Every entry.
    pub const ANY: Self = Self { value: 0, mask: 0 };

    /// Entries that lack all of these bits.
    pub fn without(bits: u32) -> Self {
        Self { value: 0, mask: bits }
    }

    fn admits(self, mark: u32) -> bool {
        mark & self.mask == self.value
    }
}

impl Conntrack {
    /// Opens the table of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`ConntrackError::Unsupported`] where the kernel has no ctnetlink, [`ConntrackError::NotPermitted`] without
    /// CAP_NET_ADMIN.
    pub fn open() -> Result<Self, ConntrackError> {
        let mut table = Self { socket: Socket::open()? };
        // A socket can be had without ctnetlink: only a question tells.
        match table.count() {
            Ok(_) => Ok(table),
            // A request to a subsystem that is not there (Linux, net/netfilter/nfnetlink.c, `nfnetlink_rcv_msg`).
            Err(ConntrackError::System { source }) if is(&source, Errno::INVAL) => {
                Err(ConntrackError::Unsupported)
            }
            Err(error) => Err(error),
        }
    }

    /// How many entries the table has, by the kernel's counter. It counts what [`Conntrack::entries`] passes over:
    /// entries that have expired and are not yet collected.
    ///
    /// # Errors
    /// The kernel did not answer as it should.
    pub fn count(&mut self) -> Result<u32, ConntrackError> {
        let read = |bytes: &[u8]| {
            for part in Attributes::of(bytes) {
                let (kind, value) = part.or(Err(ConntrackError::Malformed))?;
                if kind == CTA_STATS_GLOBAL_ENTRIES {
                    return wire::number_32(value).or(Err(ConntrackError::Malformed));
                }
            }
            Err(ConntrackError::Malformed)
        };
        // The counters of the subsystem have their own request; it is refused where the subsystem is missing.
        self.socket.ask(Ask::Count, wire::COUNTERS, None, |_| {}, read)?.ok_or(ConntrackError::Malformed)
    }

    /// All entries of both families.
    ///
    /// # Errors
    /// As [`Conntrack::entries_where`].
    pub fn entries(&mut self) -> Result<Vec<Entry>, ConntrackError> {
        self.entries_where(MarkFilter::ANY, |_| true)
    }

    /// The entries of both families with such a mark of which `wanted` holds.
    ///
    /// # Errors
    /// The kernel did not answer as it should, or the table kept changing its form.
    pub fn entries_where(
        &mut self,
        marks: MarkFilter,
        mut wanted: impl FnMut(&Entry) -> bool,
    ) -> Result<Vec<Entry>, ConntrackError> {
        for _ in 0..MAX_ATTEMPTS {
            let mut found = Vec::new();
            let filter = |out: &mut Vec<u8>| {
                if marks != MarkFilter::ANY {
                    wire::attribute(out, CTA_MARK, &marks.value.to_be_bytes());
                    wire::attribute(out, CTA_MARK_MASK, &marks.mask.to_be_bytes());
                }
            };
            let dump = self.socket.dump(filter, |bytes| {
                let entry = Entry::read(bytes).or(Err(ConntrackError::Malformed))?;
                // A kernel that does not know the filter shows everything.
                if marks.admits(entry.mark) && wanted(&entry) {
                    found.push(entry);
                }
                Ok(())
            });
            match dump {
                Ok(Dump::Whole) => return Ok(found),
                Ok(Dump::Torn) => {}
                Err(error) => {
                    // What is still on its way must not be taken for the answer to something else.
                    self.socket = Socket::open()?;
                    return Err(error);
                }
            }
        }
        Err(ConntrackError::Restless { attempts: MAX_ATTEMPTS })
    }

    /// The entry whose original direction this tuple is.
    ///
    /// # Errors
    /// The kernel did not answer as it should.
    pub fn entry(&mut self, tuple: &Tuple) -> Result<Option<Entry>, ConntrackError> {
        // The kernel finds entries by either direction.
        Ok(self.found_by(tuple)?.filter(|entry| entry.original == *tuple))
    }

    /// The entry of which either direction is this tuple.
    fn found_by(&mut self, tuple: &Tuple) -> Result<Option<Entry>, ConntrackError> {
        let read = |bytes: &[u8]| Entry::read(bytes).or(Err(ConntrackError::Malformed));
        self.socket.ask(Ask::Show, wire::ENTRY, Some(tuple.source), |out| tuple.write(out), read)
    }

    /// Whether there is an entry that is found by this tuple and whose original direction is `the_one`: a kernel that does not
    /// know a protocol shows less of its tuples than they were asked for by.
    ///
    /// # Errors
    /// The kernel did not answer as it should.
    pub fn has(&mut self, tuple: &Tuple, the_one: impl Fn(&Tuple) -> bool) -> Result<bool, ConntrackError> {
        Ok(self.found_by(tuple)?.is_some_and(|entry| the_one(&entry.original)))
    }

    /// Sets `bit` in the mark of every entry that lacks it, and changes no other bit. Gives how many entries it was. Entries
    /// that arrive meanwhile may be among them or not.
    ///
    /// The kernel reads, changes and writes back the mark without a lock, as all that write it: a packet that changes
    /// other bits of the same connection in the same nanoseconds can lose its change.
    ///
    /// # Errors
    /// The kernel did not answer as it should; [`ConntrackError::MarkLost`] if the bit does not stay. What was marked stays
    /// marked.
    pub fn mark_existing(&mut self, bit: u32) -> Result<usize, ConntrackError> {
        let mut marked = 0;
        let mut done = BTreeSet::new();
        for _ in 0..MAX_PASSES {
            let lacking = self.entries_where(MarkFilter::without(bit), |_| true)?;
            let lost = lacking.iter().filter(|entry| done.contains(&entry.id)).count();
            if lost > 0 {
                return Err(ConntrackError::MarkLost { bit, entries: lost });
            }
            if lacking.is_empty() {
                break;
            }
            let outcomes = self.write_marks(&lacking, bit, bit)?;
            for (entry, outcome) in lacking.iter().zip(outcomes) {
                match outcome {
                    None => {
                        done.insert(entry.id);
                        marked += 1;
                    }
                    // It has ended since.
                    Some(Errno::NOENT) => {}
                    Some(error) => return Err(ConntrackError::of(error)),
                }
            }
        }
        Ok(marked)
    }

    /// Makes the bits of `mask` in these entries' marks those of `value`, and changes no other bit. Gives how many entries
    /// were still there. An entry that took the place of another since is taken for it.
    ///
    /// # Errors
    /// The kernel did not answer as it should. What was marked stays marked.
    pub fn set_marks(&mut self, entries: &[Entry], value: u32, mask: u32) -> Result<usize, ConntrackError> {
        count_done(self.write_marks(entries, value, mask)?)
    }

    fn write_marks(
        &mut self,
        entries: &[Entry],
        value: u32,
        mask: u32,
    ) -> Result<Vec<Option<Errno>>, ConntrackError> {
        self.each(entries, |out, sequence, entry| {
            let family = Some(entry.original.source);
            wire::message(out, Header { ask: Ask::Change, flags: NLM_F_ACK, sequence, family }, |out| {
                entry.original.write(out);
                wire::attribute(out, CTA_MARK, &value.to_be_bytes());
                wire::attribute(out, CTA_MARK_MASK, &mask.to_be_bytes());
            });
        })
    }

    /// Deletes the entry whose original direction this tuple is, whatever its mark.
    ///
    /// # Errors
    /// The kernel did not answer as it should.
    pub fn delete(&mut self, tuple: &Tuple) -> Result<Deletion, ConntrackError> {
        match self.entry(tuple)? {
            None => Ok(Deletion::Absent),
            Some(entry) => match self.delete_entries(&[entry])? {
                0 => Ok(Deletion::Absent),
                _ => Ok(Deletion::Deleted),
            },
        }
    }

    /// Deletes, of the entries whose original direction is among these tuples, those that lack `bit` in their mark: what
    /// was judged and allowed since somebody named it stays. Gives how many were deleted.
    ///
    /// # Errors
    /// The kernel did not answer as it should. What was deleted before is gone.
    pub fn delete_unmarked(&mut self, tuples: &[Tuple], bit: u32) -> Result<usize, ConntrackError> {
        let mut unmarked = Vec::with_capacity(tuples.len());
        for tuple in tuples {
            unmarked.extend(self.entry(tuple)?.filter(|entry| entry.mark & bit == 0));
        }
        self.delete_entries(&unmarked)
    }

    /// Deletes the entries with such a mark of which `wanted` holds. Gives how many there were.
    ///
    /// # Errors
    /// As [`Conntrack::entries_where`]. What was deleted before is gone.
    pub fn delete_where(
        &mut self,
        marks: MarkFilter,
        wanted: impl FnMut(&Entry) -> bool,
    ) -> Result<usize, ConntrackError> {
        let found = self.entries_where(marks, wanted)?;
        self.delete_entries(&found)
    }

    /// Deletes exactly these entries, and none that took their place since; except one that was given the same memory for the
    /// same tuples, which has the same id. Gives how many were still there.
    ///
    /// # Errors
    /// The kernel did not answer as it should. What was deleted before is gone.
    pub fn delete_entries(&mut self, entries: &[Entry]) -> Result<usize, ConntrackError> {
        let outcomes = self.each(entries, |out, sequence, entry| {
            let family = Some(entry.original.source);
            wire::message(out, Header { ask: Ask::Delete, flags: NLM_F_ACK, sequence, family }, |out| {
                entry.original.write(out);
                wire::attribute(out, CTA_ID, &entry.id.to_be_bytes());
            });
        })?;
        count_done(outcomes)
    }

    /// Sends a request for each item. Requests say what is to be, so those whose answer was lost are sent again.
    fn each<T>(
        &mut self,
        items: &[T],
        write: impl Fn(&mut Vec<u8>, u32, &T),
    ) -> Result<Vec<Option<Errno>>, ConntrackError> {
        let mut outcomes = Vec::with_capacity(items.len());
        for batch in items.chunks(BATCH) {
            let mut attempt = 0;
            outcomes.extend(loop {
                attempt += 1;
                match self.socket.batch(batch, &write) {
                    Ok(outcomes) => break outcomes,
                    Err(error) => {
                        self.socket = Socket::open()?;
                        if !matches!(error, ConntrackError::Overrun) || attempt >= MAX_ATTEMPTS {
                            return Err(error);
                        }
                    }
                }
            });
        }
        Ok(outcomes)
    }
}

/// Why the table could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    /// The kernel has no ctnetlink.
    #[error("the kernel lacks ctnetlink (CONFIG_NF_CT_NETLINK, module nf_conntrack_netlink)")]
    Unsupported,
    /// The process may not.
    #[error("conntrack's table needs CAP_NET_ADMIN in its network namespace")]
    NotPermitted,
    /// Answers were lost because the socket's buffer was full.
    #[error("answers of ctnetlink were lost: the socket's buffer was full")]
    Overrun,
    /// The kernel gave no answer.
    #[error("ctnetlink gave no answer within {after:?}")]
    Silent {
        /// How long it was waited for.
        after: Duration,
    },
    /// The table could not be read whole.
    #[error("conntrack's table changed its form during each of {attempts} reads")]
    Restless {
        /// How often it was tried.
        attempts: usize,
    },
    /// A bit that was set is gone: the kernel keeps no marks, or somebody writes whole marks.
    #[error(
        "bit {bit:#x} of connection marks does not stay ({entries} entries): does another program write it?"
    )]
    MarkLost {
        /// The bit.
        bit: u32,
        /// How many entries lost them.
        entries: usize,
    },
    /// An answer is not of the form that the kernel's interface promises.
    #[error("cannot read an answer of ctnetlink")]
    Malformed,
    /// The system refused.
    #[error("ctnetlink failed")]
    System {
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// How many requests about entries were done; the others came too late.
fn count_done(outcomes: Vec<Option<Errno>>) -> Result<usize, ConntrackError> {
    let mut done = 0;
    for outcome in outcomes {
        match outcome {
            None => done += 1,
            Some(Errno::NOENT) => {}
            Some(error) => return Err(ConntrackError::of(error)),
        }
    }
    Ok(done)
}

fn is(error: &std::io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

impl ConntrackError {
    fn of(error: Errno) -> Self {
        match error {
            // Without nfnetlink there is no such socket.
            Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT => Self::Unsupported,
            Errno::PERM | Errno::ACCESS => Self::NotPermitted,
            Errno::NOBUFS => Self::Overrun,
            error => Self::System { source: error.into() },
        }
    }
}
