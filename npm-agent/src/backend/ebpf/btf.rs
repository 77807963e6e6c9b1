//! Where the running kernel keeps what the programs read: offsets from its type information (BTF).
//!
//! Distributions build connection tracking into the kernel or as a module; a module's types are in a file of their own,
//! which goes on where the kernel's ends (split BTF). Format: Documentation/bpf/btf.rst.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use aya::EbpfLoader;
use npm_common::kfunc::{CAST, CAST_CONTEXT, CHANGE_TIMEOUT, LOOK_UP, RELEASE, link};

/// Where the kernel shows its type information.
const DIRECTORY: &str = "/sys/kernel/btf";

const MAGIC: u16 = 0xeb9f;
const HEADER_LEN_BYTES: usize = 24;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNCTION: u32 = 12;

/// The types that are asked for.
const WANTED: [(u32, &str); 10] = [
    (STRUCT, "sk_buff"),
    (STRUCT, "nf_conn"),
    (STRUCT, "nf_conntrack_man"),
    (STRUCT, "nf_conntrack_tuple"),
    (STRUCT, "nf_conntrack_tuple_hash"),
    (FUNCTION, "bpf_cast_to_kern_ctx"),
    (FUNCTION, "bpf_rdonly_cast"),
    (FUNCTION, "bpf_skb_ct_lookup"),
    (FUNCTION, "bpf_ct_change_timeout"),
    (FUNCTION, "bpf_ct_release"),
];
/// Bytes of a structure's member.
const MEMBER_LEN_BYTES: usize = 12;

/// Why the kernel's types are of no use.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The file can't be read: the kernel was built without CONFIG_DEBUG_INFO_BTF, or hides it.
    #[error("cannot read the kernel's types from {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not BTF, or not whole.
    #[error("{} is not BTF that npm-agent can read", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// A type or a member does not exist.
    #[error("the kernel's types have no {what}")]
    Missing {
        /// Which.
        what: &'static str,
    },
    /// A type is not laid out as in every kernel that we know.
    #[error("the kernel lays out {what} differently")]
    Layout {
        /// Which.
        what: &'static str,
    },
}

/// What the programs have to know of this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// Of `_nfct` in `struct sk_buff`, in bytes, as are the others.
    pub nfct: u32,
    /// Of the original direction's tuple in `struct nf_conn`.
    pub original: u32,
    /// Of the reply direction's tuple.
    pub reply: u32,
    /// Of `mark`.
    pub mark: u32,
    /// What the programs that cast need besides; `None`: this kernel can't.
    pub casts: Option<Casts>,
    /// What the programs that write to connections need besides; `None`: this kernel can't.
    pub writes: Option<Writes>,
}

/// The kernel's numbers for what the programs that cast use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Casts {
    /// The function bpf_cast_to_kern_ctx.
    pub context: u32,
    /// The function bpf_rdonly_cast.
    pub cast: u32,
    /// The type `struct nf_conn`.
    pub entry: u32,
}

/// The kernel's numbers for the functions by which programs write to connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writes {
    /// bpf_skb_ct_lookup.
    pub look_up: u32,
    /// bpf_ct_change_timeout.
    pub change_timeout: u32,
    /// bpf_ct_release.
    pub release: u32,
}

impl Offsets {
    /// Writes this kernel's numbers into an object's bytes, wherever it calls functions of the kernel.
    pub fn link(&self, object: &mut [u8]) {
        if let Some(casts) = &self.casts {
            link(object, CAST_CONTEXT, casts.context.cast_signed());
            link(object, CAST, casts.cast.cast_signed());
        }
        if let Some(writes) = &self.writes {
            link(object, LOOK_UP, writes.look_up.cast_signed());
            link(object, CHANGE_TIMEOUT, writes.change_timeout.cast_signed());
            link(object, RELEASE, writes.release.cast_signed());
        }
    }

    /// Has an object be told where the kernel keeps what it reads.
    pub fn tell<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        let entry = self.casts.as_ref().map_or(&0, |casts| &casts.entry);
        loader
            .override_global("ENTRY_TYPE", entry, true)
            .override_global("NFCT_OFFSET", &self.nfct, true)
            .override_global("ORIGINAL_OFFSET", &self.original, true)
            .override_global("REPLY_OFFSET", &self.reply, true)
            .override_global("MARK_OFFSET", &self.mark, true);
    }

    /// Of the running kernel.
    ///
    /// # Errors
    /// The kernel shows no types, has no connection tracking, or lays it out in a way that we do not know.
    pub fn of_this_kernel() -> Result<Self, BtfError> {
        let directory = Path::new(DIRECTORY);
        let kernel = Types::read(&directory.join("vmlinux"), None)?;
        let module = directory.join("nf_conntrack");
        if kernel.structure("nf_conn").is_none() && module.exists() {
            let module = Types::read(&module, Some(&kernel))?;
            return Self::of(&[&kernel, &module]);
        }
        Self::of(&[&kernel])
    }

    fn of(types: &[&Types<'_>]) -> Result<Self, BtfError> {
        let offset = |name, member, what| {
            let found = types.iter().find_map(|types| types.structure(name)?.member(member));
            found.ok_or(BtfError::Missing { what })
        };
        let size = |name, what| {
            let found = types.iter().find_map(|types| types.structure(name)).map(|it| it.size);
            found.ok_or(BtfError::Missing { what })
        };
        // What npm_common::conntrack::Tuple says.
        const TUPLE: &str = "struct nf_conntrack_tuple";
        let tuple = [
            offset("nf_conntrack_tuple", "src", TUPLE)?,
            offset("nf_conntrack_man", "u3", TUPLE)?,
            offset("nf_conntrack_man", "u", TUPLE)?,
            offset("nf_conntrack_man", "l3num", TUPLE)?,
            offset("nf_conntrack_tuple", "dst", TUPLE)?,
            size("nf_conntrack_tuple", TUPLE)?,
        ];
        if tuple != [0, 0, 16, 18, 20, 40] {
            return Err(BtfError::Layout { what: TUPLE });
        }
        // The kernel resolves functions among its own types, not among a module's, unless a program names the module.
        let number = |kind, name| types.first().and_then(|kernel| kernel.id(kind, name));
        let casts = || {
            Some(Casts {
                context: number(FUNCTION, "bpf_cast_to_kern_ctx")?,
                cast: number(FUNCTION, "bpf_rdonly_cast")?,
                entry: number(STRUCT, "nf_conn")?,
            })
        };
        let writes = || {
            Some(Writes {
                look_up: number(FUNCTION, "bpf_skb_ct_lookup")?,
                change_timeout: number(FUNCTION, "bpf_ct_change_timeout")?,
                release: number(FUNCTION, "bpf_ct_release")?,
            })
        };
        let hashes = offset("nf_conn", "tuplehash", "nf_conn.tuplehash")?;
        let within = offset("nf_conntrack_tuple_hash", "tuple", "nf_conntrack_tuple_hash.tuple")?;
        let stride = size("nf_conntrack_tuple_hash", "struct nf_conntrack_tuple_hash")?;
        Ok(Self {
            nfct: offset("sk_buff", "_nfct", "sk_buff._nfct (CONFIG_NF_CONNTRACK)")?,
            original: hashes + within,
            reply: hashes + stride + within,
            mark: offset("nf_conn", "mark", "nf_conn.mark (CONFIG_NF_CONNTRACK_MARK)")?,
            casts: casts(),
            writes: writes(),
        })
    }
}

/// The types in a file. Their ids go on where the base's end, and so do their strings.
struct Types<'a> {
    bytes: Vec<u8>,
    strings: usize,
    strings_len: usize,
    /// Where each type begins.
    starts: Vec<usize>,
    /// The places in `starts` of the types that are asked for, by kind and name: a kernel has more than 100,000.
    wanted: BTreeMap<(u32, &'static str), usize>,
    base: Option<&'a Types<'a>>,
}

/// A structure or union, with who can look up what its members are.
struct Structure<'a> {
    types: &'a Types<'a>,
    start: usize,
    /// In bytes.
    size: u32,
}

impl<'a> Types<'a> {
    fn read(path: &Path, base: Option<&'a Types<'a>>) -> Result<Self, BtfError> {
        let bytes = std::fs::read(path).map_err(|source| BtfError::Read { path: path.to_owned(), source })?;
        Self::parse(bytes, base).ok_or_else(|| BtfError::Malformed { path: path.to_owned() })
    }

    /// `None`: it is not BTF, or not whole.
    fn parse(bytes: Vec<u8>, base: Option<&'a Types<'a>>) -> Option<Self> {
        let magic = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
        let [header_len, types, types_len, strings, strings_len] =
            [4, 8, 12, 16, 20].map(|at| word(&bytes, at).map(|word| word as usize));
        let header_len = header_len?;
        if magic != MAGIC || header_len < HEADER_LEN_BYTES {
            return None;
        }
        let (mut at, strings, strings_len) = (header_len + types?, header_len + strings?, strings_len?);
        let end = at.checked_add(types_len?)?;
        bytes.get(..end)?;
        bytes.get(strings..strings.checked_add(strings_len)?)?;
        let mut starts = Vec::new();
        while at < end {
            starts.push(at);
            at += 12 + extra_len(word(&bytes, at + 4)?)?;
        }
        let mut types = Self { bytes, strings, strings_len, starts, wanted: BTreeMap::new(), base };
        types.wanted = types.find();
        Some(types)
    }

    /// Finds [`WANTED`]. Of several with one name the first counts.
    fn find(&self) -> BTreeMap<(u32, &'static str), usize> {
        let mut found = BTreeMap::new();
        for (index, start) in self.starts.iter().enumerate() {
            let Some(kind) = word(&self.bytes, start + 4).map(kind) else { continue };
            if kind != STRUCT && kind != FUNCTION {
                continue;
            }
            let Some(name) = word(&self.bytes, *start).and_then(|at| self.string(at as usize)) else {
                continue;
            };
            if let Some(wanted) = WANTED.iter().find(|(of, wanted)| *of == kind && wanted.as_bytes() == name)
            {
                found.entry(*wanted).or_insert(index);
            }
        }
        found
    }

    /// Types up to the end of this file; the type 0 is none.
    fn count(&self) -> usize {
        self.base.map_or(1, Types::count) + self.starts.len()
    }

    fn strings_end(&self) -> usize {
        self.base.map_or(0, Types::strings_end) + self.strings_len
    }

    fn string(&self, offset: usize) -> Option<&[u8]> {
        let first = self.base.map_or(0, Types::strings_end);
        match (offset.checked_sub(first), self.base) {
            (Some(offset), _) => {
                let rest = self.bytes.get(self.strings + offset..self.strings + self.strings_len)?;
                rest.get(..rest.iter().position(|byte| *byte == 0)?)
            }
            (None, Some(base)) => base.string(offset),
            (None, None) => None,
        }
    }

    /// The structure of this name that is defined in this file.
    fn structure(&self, name: &'static str) -> Option<Structure<'_>> {
        self.at(*self.starts.get(*self.wanted.get(&(STRUCT, name))?)?)
    }

    /// The number of the type of this kind and name that is defined in this file.
    fn id(&self, kind: u32, name: &'static str) -> Option<u32> {
        let index = *self.wanted.get(&(kind, name))?;
        u32::try_from(self.base.map_or(1, Types::count) + index).ok()
    }

    /// The structure or union that begins here.
    fn at(&self, start: usize) -> Option<Structure<'_>> {
        let kind = kind(word(&self.bytes, start + 4)?);
        let size = word(&self.bytes, start + 8)?;
        (kind == STRUCT || kind == UNION).then_some(Structure { types: self, start, size })
    }

    fn by_id(&self, id: usize) -> Option<Structure<'_>> {
        let first = self.base.map_or(1, Types::count);
        match (id.checked_sub(first), self.base) {
            (Some(index), _) => self.at(*self.starts.get(index)?),
            (None, Some(base)) => base.by_id(id),
            (None, None) => None,
        }
    }
}

impl Structure<'_> {
    /// The offset of a member, also of one of an unnamed part, in bytes.
    fn member(&self, name: &str) -> Option<u32> {
        let Self { types, start, .. } = self;
        let info = word(&types.bytes, start + 4)?;
        (0..(info & 0xffff) as usize).find_map(|index| {
            let at = start + 12 + index * MEMBER_LEN_BYTES;
            let found = types.string(word(&types.bytes, at)? as usize)?;
            let bits = word(&types.bytes, at + 8)?;
            // With the flag the upper byte is a bit field's width.
            let bits = if info >> 31 == 1 { bits & 0x00ff_ffff } else { bits };
            if found == name.as_bytes() {
                return Some(bits / 8);
            }
            if !found.is_empty() {
                return None;
            }
            let part = types.by_id(word(&types.bytes, at + 4)? as usize)?;
            Some(bits / 8 + part.member(name)?)
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn kind(info: u32) -> u32 {
    info >> 24 & 0x1f
}

/// Bytes behind a type's first three words. `None`: a kind that we do not know, so that nothing behind it can be found.
fn extra_len(info: u32) -> Option<usize> {
    let count = (info & 0xffff) as usize;
    match kind(info) {
        // Integers, variables, declaration tags.
        1 | 14 | 17 => Some(4),
        // Arrays.
        3 => Some(12),
        // Structures, unions, data sections, wide enumerations.
        STRUCT | UNION | 15 | 19 => Some(count * 12),
        // Enumerations, prototypes.
        6 | 13 => Some(count * 8),
        // Pointers, forward declarations, names, qualifiers, functions, floats, type tags.
        2 | 7..=12 | 16 | 18 => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INT: u32 = 1;

    /// A file of BTF in the making.
    #[derive(Default)]
    struct Made {
        types: Vec<u8>,
        strings: Vec<u8>,
        strings_before: usize,
    }

    impl Made {
        fn name(&mut self, name: &str) -> u32 {
            if self.strings.is_empty() && self.strings_before == 0 {
                self.strings.push(0);
            }
            if name.is_empty() {
                return 0;
            }
            let at = self.strings_before + self.strings.len();
            self.strings.extend(name.as_bytes());
            self.strings.push(0);
            at as u32
        }

        fn words(&mut self, words: &[u32]) {
            words.iter().for_each(|word| self.types.extend(word.to_ne_bytes()));
        }

        fn int(&mut self) {
            let name = self.name("int");
            self.words(&[name, INT << 24, 4, 32]);
        }

        fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) {
            let name = self.name(name);
            self.words(&[name, STRUCT << 24 | members.len() as u32, size]);
            for (name, of, offset) in members {
                let name = self.name(name);
                self.words(&[name, *of, offset * 8]);
            }
        }

        fn bytes(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            bytes.extend(MAGIC.to_ne_bytes());
            bytes.extend([1, 0]);
            let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
            for word in [24, 0, types, types, strings] {
                bytes.extend(u32::to_ne_bytes(word));
            }
            bytes.extend(&self.types);
            bytes.extend(&self.strings);
            bytes
        }
    }

    fn conntrack(made: &mut Made) {
        made.structure("nf_conntrack_man", 20, &[("u3", 1, 0), ("u", 1, 16), ("l3num", 1, 18)]);
        made.structure("nf_conntrack_tuple", 40, &[("src", 1, 0), ("dst", 1, 20)]);
        made.structure("nf_conntrack_tuple_hash", 56, &[("hnnode", 1, 0), ("tuple", 1, 16)]);
        made.structure("nf_conn", 240, &[("ct_general", 1, 0), ("tuplehash", 1, 24), ("mark", 1, 172)]);
    }

    const EXPECTED: Offsets =
        Offsets { nfct: 104, original: 40, reply: 96, mark: 172, casts: None, writes: None };

    #[test]
    fn offsets_are_found_in_unnamed_parts_too() {
        let mut made = Made::default();
        made.int();
        made.structure("", 32, &[("other", 1, 0), ("_nfct", 1, 4)]);
        made.structure("sk_buff", 200, &[("next", 1, 0), ("", 2, 100)]);
        conntrack(&mut made);
        let types = Types::parse(made.bytes(), None).unwrap();
        assert_eq!(Offsets::of(&[&types]).unwrap(), EXPECTED);
    }

    #[test]
    fn a_module_goes_on_where_the_kernel_ends() {
        let mut kernel = Made::default();
        kernel.int();
        kernel.structure("sk_buff", 200, &[("next", 1, 0), ("_nfct", 1, 104)]);
        let kernel_bytes = kernel.bytes();
        let kernel = Types::parse(kernel_bytes, None).unwrap();
        let mut module = Made { strings_before: kernel.strings_len, ..Made::default() };
        conntrack(&mut module);
        let module = Types::parse(module.bytes(), Some(&kernel)).unwrap();
        assert_eq!(Offsets::of(&[&kernel, &module]).unwrap(), EXPECTED);
        assert!(matches!(Offsets::of(&[&kernel]), Err(BtfError::Missing { .. })));
    }

    #[test]
    fn functions_have_numbers() {
        let mut made = Made::default();
        made.int();
        made.structure("sk_buff", 200, &[("next", 1, 0), ("_nfct", 1, 104)]);
        conntrack(&mut made);
        let functions = [
            "bpf_rdonly_cast",
            "bpf_cast_to_kern_ctx",
            "bpf_ct_release",
            "bpf_skb_ct_lookup",
            "bpf_ct_change_timeout",
        ];
        for function in functions {
            let name = made.name(function);
            made.words(&[name, FUNCTION << 24, 1]);
        }
        let types = Types::parse(made.bytes(), None).unwrap();
        let casts = Some(Casts { context: 8, cast: 7, entry: 6 });
        let writes = Some(Writes { look_up: 10, change_timeout: 11, release: 9 });
        assert_eq!(Offsets::of(&[&types]).unwrap(), Offsets { casts, writes, ..EXPECTED });
    }

    #[test]
    fn another_layout_is_refused() {
        let mut made = Made::default();
        made.int();
        made.structure("sk_buff", 200, &[("_nfct", 1, 104)]);
        made.structure("nf_conntrack_man", 20, &[("u3", 1, 0), ("u", 1, 16), ("l3num", 1, 18)]);
        made.structure("nf_conntrack_tuple", 44, &[("src", 1, 0), ("dst", 1, 24)]);
        let types = Types::parse(made.bytes(), None).unwrap();
        assert!(matches!(Offsets::of(&[&types]), Err(BtfError::Layout { .. })));
    }

    #[test]
    fn what_is_cut_short_is_refused() {
        let mut made = Made::default();
        made.int();
        made.structure("sk_buff", 200, &[("_nfct", 1, 104)]);
        let whole = made.bytes();
        for len in 0..whole.len() {
            assert!(Types::parse(whole[..len].to_vec(), None).is_none(), "{len} bytes");
        }
    }

    #[test]
    fn this_kernel_is_understood() {
        let Ok(offsets) = Offsets::of_this_kernel() else {
            eprintln!("SKIPPED: this kernel shows no types of connection tracking");
            return;
        };
        assert!(offsets.reply - offsets.original >= 40 && offsets.nfct > 0, "{offsets:?}");
    }
}
