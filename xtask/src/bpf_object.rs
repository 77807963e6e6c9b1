//! Strips a linked BPF object of its DWARF sections and keeps BTF, which the kernel reads.
//!
//! Done here and not by llvm-objcopy: the result's layout would depend on the LLVM that a machine happens to have,
//! and the committed object is compared byte by byte.

use anyhow::{Context, Result};
use object::build::elf::{Builder, SectionData};
use object::elf::SHT_STRTAB;

/// Gives the object without its debug sections.
///
/// # Errors
/// When `object` is no ELF file that we understand.
pub(crate) fn strip(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object).context("reading the linked object")?;
    let mut debug = Vec::new();
    for section in builder.sections.iter_mut() {
        let name = section.name.to_string();
        if is_debug(&name) {
            section.delete = true;
            debug.push(section.id());
        }
    }
    for symbol in builder.symbols.iter_mut() {
        if symbol.section.is_some_and(|section| debug.contains(&section)) {
            symbol.delete = true;
        }
        symbol.name = without_disambiguators(&symbol.name).into();
    }
    // LLVM keeps section and symbol names in one table; the builder wants a table for each.
    if !builder.sections.iter().any(|section| matches!(section.data, SectionData::SectionString)) {
        let names = builder.sections.add();
        names.name = ".shstrtab".into();
        names.sh_type = SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = SectionData::SectionString;
    }
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("writing the stripped object")?;
    Ok(stripped)
}

/// DWARF and the relocations of DWARF; `.BTF` and `.BTF.ext` are neither.
fn is_debug(section: &str) -> bool {
    let section = section.strip_prefix(".rela").or_else(|| section.strip_prefix(".rel")).unwrap_or(section);
    section.starts_with(".debug")
}

/// A symbol's name without what rustc tells crates of one name apart by (`Cs<hash>_` in its mangled names): the hash is of
/// the flags too, and so of the tree's place.
fn without_disambiguators(name: &[u8]) -> Vec<u8> {
    if !name.starts_with(b"_R") {
        return name.to_vec();
    }
    let mut rest = name;
    let mut plain = Vec::new();
    while let Some(at) = rest.windows(2).position(|pair| pair == b"Cs") {
        let hash = &rest[at + 2..];
        let Some(len) = hash.iter().position(|byte| *byte == b'_') else { break };
        plain.extend_from_slice(&rest[..=at]);
        rest = &hash[len + 1..];
    }
    plain.extend_from_slice(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dwarf_goes_and_btf_stays() {
        for name in [".debug_info", ".rel.debug_info", ".rela.debug_line", ".debug_str"] {
            assert!(is_debug(name), "{name}");
        }
        for name in [".BTF", ".BTF.ext", ".rel.BTF.ext", "classifier", ".relclassifier", ".maps", ".text"] {
            assert!(!is_debug(name), "{name}");
        }
    }

    #[test]
    fn names_do_not_depend_on_the_place_of_the_tree() {
        let name = |hash: &str| {
            format!("_RINvNtCs{hash}_8npm_ebpf7enforce16judge_connectionNtNtB4_9conntrack6ByCastEB4_")
        };
        let plain = without_disambiguators(name("j3kmxsOhokK").as_bytes());
        assert_eq!(plain, without_disambiguators(name("dWUYOURHZN0").as_bytes()));
        assert_eq!(plain, b"_RINvNtC8npm_ebpf7enforce16judge_connectionNtNtB4_9conntrack6ByCastEB4_");
        assert_eq!(without_disambiguators(b"Cs_of_another"), b"Cs_of_another");
    }

    #[test]
    fn what_is_no_object_is_refused() {
        assert!(strip(b"not an object").is_err());
    }
}
