//! IPVS's services, from `/proc/net/ip_vs` (net/netfilter/ipvs/ip_vs_ctl.c, `ip_vs_info_seq_show`).

/// How many virtual services a listing has.
pub(super) fn services(text: &str) -> usize {
    let is_service = |line: &&str| {
        let kind = line.split_whitespace().next().unwrap_or_default();
        ["TCP", "UDP", "SCTP", "FWM"].contains(&kind)
    };
    text.lines().filter(is_service).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_counted_and_servers_are_not() {
        let head = "IP Virtual Server version 1.2.1 (size=4096)\n\
                    Prot LocalAddress:Port Scheduler Flags\n  \
                      -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n";
        assert_eq!(services(head), 0);
        let text = format!(
            "{head}TCP  0A600001:01BB rr\n  -> 0AF00004:192B      Masq    1      0          0\n\
             UDP  [fd00:0010:0000:0000:0000:0000:0000:000a]:0035 rr\n  \
             -> [fd00:0241:0000:0000:0000:0000:0000:0002]:0035      Masq    1      0          0\n\
             SCTP 0A600002:0009 wlc\nFWM  00000001 rr persistent 360 FFFFFFFF\n"
        );
        assert_eq!(services(&text), 4);
    }
}
