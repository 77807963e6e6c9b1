//! What the API server accepts as names, labels and port names (k8s.io/apimachinery `pkg/util/validation`).
//!
//! Each check gives the reason why a text is refused, for people; `None` when it is accepted.

/// A namespace's name: an RFC 1123 label.
pub(super) fn namespace_name(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        Some("must not be empty")
    } else if text.len() > 63 {
        Some("must be no more than 63 characters")
    } else if !is_dns_label(text) {
        Some("must be lower case letters, digits and '-', and start and end with a letter or digit")
    } else {
        None
    }
}

/// The name of a policy or pod, the prefix of a label key: an RFC 1123 subdomain.
pub(super) fn subdomain(text: &str) -> Option<&'static str> {
    if text.is_empty() {
        Some("must not be empty")
    } else if text.len() > 253 {
        Some("must be no more than 253 characters")
    } else if !text.split('.').all(is_dns_label) {
        Some(
            "must be lower case letters, digits, '-' and '.', each part starting and ending with a letter or digit",
        )
    } else {
        None
    }
}

/// A label's key (`IsQualifiedName`): an optional subdomain and `/`, then a name.
pub(super) fn label_key(text: &str) -> Option<&'static str> {
    let name = match text.split_once('/') {
        Some((prefix, name)) => {
            if subdomain(prefix).is_some() {
                return Some("its prefix must be a DNS subdomain of no more than 253 characters");
            }
            name
        }
        None => text,
    };
    if name.is_empty() {
        Some("must not be empty")
    } else if name.len() > 63 {
        Some("must be no more than 63 characters")
    } else if !is_label_text(name) {
        Some("must be letters, digits, '-', '_' and '.', and start and end with a letter or digit")
    } else {
        None
    }
}

/// A label's value; the empty one is a value.
pub(super) fn label_value(text: &str) -> Option<&'static str> {
    if text.len() > 63 {
        Some("must be no more than 63 characters")
    } else if !text.is_empty() && !is_label_text(text) {
        Some("must be empty or letters, digits, '-', '_' and '.', and start and end with a letter or digit")
    } else {
        None
    }
}

/// A port's name (`IsValidPortName`, after RFC 6335).
pub(super) fn port_name(text: &str) -> Option<&'static str> {
    if text.len() > 15 {
        Some("must be no more than 15 characters")
    } else if text.is_empty() || !text.bytes().all(|byte| is_lower_alphanumeric(byte) || byte == b'-') {
        Some("must be lower case letters, digits and '-'")
    } else if !text.bytes().any(|byte| byte.is_ascii_lowercase()) {
        Some("must contain a letter")
    } else if text.contains("--") {
        Some("must not contain '--'")
    } else if text.starts_with('-') || text.ends_with('-') {
        Some("must not start or end with '-'")
    } else {
        None
    }
}

fn is_lower_alphanumeric(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn is_dns_label(text: &str) -> bool {
    let inner = text.bytes().all(|byte| is_lower_alphanumeric(byte) || byte == b'-');
    inner && !text.is_empty() && !text.starts_with('-') && !text.ends_with('-')
}

fn is_label_text(text: &str) -> bool {
    let end = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    text.bytes().all(inner) && end(text.bytes().next()) && end(text.bytes().last())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rule: fn(&str) -> Option<&'static str>, good: &[&str], bad: &[&str]) {
        for text in good {
            assert_eq!(rule(text), None, "{text:?}");
        }
        for text in bad {
            assert!(rule(text).is_some(), "{text:?}");
        }
    }

    #[test]
    fn names() {
        let (longest, longer) = ("a".repeat(63), "a".repeat(64));
        check(
            namespace_name,
            &["x", "kube-system", "0", &longest],
            &["", "a.b", "A", "-a", "a-", "a_b", &longer],
        );
        let (longest, longer) = (format!("{}b", "a.".repeat(126)), "a".repeat(254));
        check(
            subdomain,
            &["x", "a.b", "allow-dns.v1", &longest],
            &["", ".a", "a..b", "a.", "a.-b", "ä", &longer],
        );
    }

    #[test]
    fn labels() {
        let (longest, longer) = ("a".repeat(63), "a".repeat(64));
        let prefixed = format!("example.com/{longest}");
        let good = ["app", "app.kubernetes.io/name", "A_b.c-D", "0", &prefixed];
        check(label_key, &good, &["", "/a", "a/", "a/b/c", "A.com/x", "-a", "a.", "a b", &longer]);
        check(
            label_value,
            &["", "v1", "A_b.c-D", &longest],
            &["-a", "a-", "a b", "a/b", "a\0", "ä", &longer],
        );
    }

    #[test]
    fn port_names() {
        let good = ["http", "a", "p80", "80a", "a-b-c", "abcdefghijklmno"];
        check(port_name, &good, &["", "80", "HTTP", "a--b", "-a", "a-", "a_b", "a.b", "abcdefghijklmnop"]);
    }
}
