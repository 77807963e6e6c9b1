//! Where in an object a value is. It is put into words only where something is told of the value, which is seldom: of each
//! pod of a cluster there are some fifty.

use std::fmt;

use super::findings::brief;

/// Where a value is.
pub(super) enum Path<'a> {
    /// It is the object.
    Top,
    /// An item of a list.
    Item(&'a Path<'a>, usize),
    /// A field.
    Field(&'a Path<'a>, &'a str),
    /// An entry of a map, by its key.
    Entry(&'a Path<'a>, &'a str),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Top => Ok(()),
            Self::Item(of, index) => write!(f, "{of}[{index}]"),
            Self::Field(Self::Top, name) => f.write_str(&brief(name)),
            Self::Field(of, name) => write!(f, "{of}.{}", brief(name)),
            Self::Entry(of, key) => write!(f, "{of}[{}]", brief(key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_put_into_words() {
        let spec = Path::Field(&Path::Top, "spec");
        let rules = Path::Field(&spec, "ingress");
        let labels = Path::Field(&Path::Item(&rules, 2), "labels");
        assert_eq!(Path::Entry(&labels, "a\n").to_string(), r"spec.ingress[2].labels[a\n]");
        assert_eq!(Path::Top.to_string(), "");
    }
}
