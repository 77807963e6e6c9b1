//! Frames for the parser to read: mostly right, some cut, damaged or contradicting themselves.

use npm_common::packet::{
    ETHERNET_LEN_BYTES, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, IPV4_LEN_BYTES, IPV6_LEN_BYTES,
    MAX_EXTENSIONS,
};

/// A small generator, so that a failure can be repeated from its number (xorshift64*).
#[derive(Clone)]
pub struct Dice(pub u64);

impl Dice {
    /// One of `0..sides`.
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }

    /// Whether a roll of a die with so many sides is a certain one.
    pub fn one_in(&mut self, sides: usize) -> bool {
        self.roll(sides) == 0
    }

    /// One of the choices.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.roll(choices.len())]
    }
}

/// A frame that is mostly right: tags, options, fragments, chains of extension headers, sometimes cut or damaged.
pub fn frame(dice: &mut Dice) -> Vec<u8> {
    let mut frame = vec![2; 12];
    for _ in 0..dice.pick(&[0, 0, 0, 1, 2, 3]) {
        let tag = dice.pick(&[ETHERTYPE_VLAN, ETHERTYPE_SERVICE_VLAN]);
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 7]);
    }
    let protocol: u8 = dice.pick(&[6, 17, 132, 1, 58, 58, 47]);
    let payload = dice.roll(60);
    match dice.pick(&[4, 6, 4, 6, 4, 6, 0]) {
        4 => {
            frame.extend([0x08, 0x00]);
            let options = dice.pick(&[0, 0, 4, 40]);
            let total = dice.pick(&[20 + options + payload, 20 + options + payload, 0]) as u16;
            let fragment: u16 = dice.pick(&[0, 0, 0x4000, 0x2000, 0x2005, 0x0005]);
            frame.push(0x45 + (options / 4) as u8);
            frame.push(0);
            frame.extend(total.to_be_bytes());
            frame.extend([0, 1]);
            frame.extend(fragment.to_be_bytes());
            frame.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            frame.extend(vec![1; options]);
        }
        6 => {
            frame.extend([0x86, 0xdd]);
            let mut chain: Vec<u8> = Vec::new();
            let count = dice.pick(&[0, 0, 1, 2, 3, MAX_EXTENSIONS, MAX_EXTENSIONS + 1]);
            let kinds: Vec<u8> = (0..count).map(|_| dice.pick(&[0, 43, 44, 51, 60])).collect();
            for (index, kind) in kinds.iter().enumerate() {
                let next = kinds.get(index + 1).copied().unwrap_or(protocol);
                let length = dice.pick(&[0_u8, 1, 2]);
                let size = match kind {
                    44 => 8,
                    51 => (usize::from(length) + 2) * 4,
                    _ => (usize::from(length) + 1) * 8,
                };
                let mut header = vec![0; size];
                header[0] = next;
                header[1] = length;
                if *kind == 44 {
                    let word: u16 = dice.pick(&[0, 1, 0x0048, 0x0049]);
                    header[2..4].copy_from_slice(&word.to_be_bytes());
                }
                chain.extend(header);
            }
            frame.extend([0x60, 0, 0, 0]);
            frame
                .extend((dice.pick(&[chain.len() + payload, chain.len() + payload, 0]) as u16).to_be_bytes());
            frame.extend([kinds.first().copied().unwrap_or(protocol), 64]);
            frame.extend([0xfd; 32]);
            frame.extend(chain);
        }
        _ => frame.extend([0x08, 0x06]),
    }
    // The first byte of ICMPv6 is its type.
    let first = dice.pick(&[dice.clone().roll(256), 130, 133, 137, 143]);
    frame.extend((first..first + payload).map(|byte| byte as u8));
    if dice.one_in(4) {
        frame.truncate(14 + dice.roll(frame.len()));
    }
    if dice.one_in(6) {
        let place = dice.roll(frame.len());
        frame[place] ^= 1 << dice.roll(8);
    }
    frame
}

/// Whether the kernel's test run takes the frame: it refuses one that ends with or in its Ethernet header, and from
/// Linux 6.18 on one that ends in an IP header right behind that (EINVAL; net/bpf/test_run.c).
pub fn takes(frame: &[u8]) -> bool {
    let least = match frame.get(12..14) {
        Some([0x08, 0x00]) => ETHERNET_LEN_BYTES + IPV4_LEN_BYTES,
        Some([0x86, 0xdd]) => ETHERNET_LEN_BYTES + IPV6_LEN_BYTES,
        Some(_) | None => ETHERNET_LEN_BYTES + 1,
    };
    frame.len() >= least
}
