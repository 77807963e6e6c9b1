//! The rules of iptables-legacy's raw table that bend conntrack, from what `iptables-legacy-save` prints.

/// How many rules put into zones, and how many keep from tracking. Those of OUTPUT are about the node's own packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rules {
    pub(super) zones: usize,
    pub(super) no_track: usize,
}

/// Counts the rules of a saved raw table.
pub(super) fn rules(saved: &str) -> Rules {
    let mut rules = Rules::default();
    for line in saved.lines().filter(|line| line.starts_with("-A ") && !line.starts_with("-A OUTPUT ")) {
        // What stands in a comment is no target: the target is last.
        let Some((_, target)) = line.rsplit_once(" -j ") else { continue };
        let mut words = target.split(' ');
        match words.next() {
            Some("NOTRACK") => rules.no_track += 1,
            Some("CT") => {
                let options: Vec<&str> = words.collect();
                rules.no_track += usize::from(options.contains(&"--notrack"));
                rules.zones += usize::from(options.iter().any(|option| option.starts_with("--zone")));
            }
            Some(_) | None => {}
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As iptables-legacy-save 1.8.9 printed them.
    #[test]
    fn rules_are_counted_by_what_they_do() {
        let saved = "*raw\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:mine - [0:0]\n\
            -A PREROUTING -j CT --notrack\n-A PREROUTING -i veth0 -j CT --zone-orig 5\n-A PREROUTING -j CT --zone mark\n\
            -A PREROUTING -m comment --comment \"see -j NOTRACK\" -j mine\n-A mine -d 169.254.20.10/32 -j NOTRACK\n\
            -A PREROUTING -j CT --helper ftp\n-A OUTPUT -j CT --notrack\nCOMMIT\n";
        assert_eq!(rules(saved), Rules { zones: 2, no_track: 2 });
        assert_eq!(rules("*raw\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"), Rules::default());
    }
}
