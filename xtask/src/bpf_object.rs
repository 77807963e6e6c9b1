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
    fn what_is_no_object_is_refused() {
        assert!(strip(b"not an object").is_err());
    }
}
