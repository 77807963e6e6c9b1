//! Calls of the kernel's own functions (kfuncs), which a kernel knows by a number of its own: in the object stands a number
//! of ours in its place, and the loader writes the kernel's over it.

/// Stands for bpf_cast_to_kern_ctx.
pub const CAST_CONTEXT: i32 = 0x6e70_6d01;
/// Stands for bpf_rdonly_cast.
pub const CAST: i32 = 0x6e70_6d02;
/// Stands for bpf_skb_ct_lookup.
pub const LOOK_UP: i32 = 0x6e70_6d03;
/// Stands for bpf_ct_change_timeout.
pub const CHANGE_TIMEOUT: i32 = 0x6e70_6d04;
/// Stands for bpf_ct_release.
pub const RELEASE: i32 = 0x6e70_6d05;

/// An instruction that calls the helper of this number, as the compiler writes it.
const fn call(number: i32) -> [u8; 8] {
    let [a, b, c, d] = number.to_le_bytes();
    [0x85, 0, 0, 0, a, b, c, d]
}

/// Writes the kernel's number for a function over ours, wherever an object calls it; gives how many calls there are. The
/// mark in the second byte says that it is no helper (`BPF_PSEUDO_KFUNC_CALL`, include/uapi/linux/bpf.h).
pub fn link(object: &mut [u8], ours: i32, kernels: i32) -> usize {
    let mut calls = 0;
    // Instructions are of 8 bytes, and their sections begin at multiples of 8.
    for instruction in object.chunks_exact_mut(8).filter(|bytes| **bytes == call(ours)) {
        let mut linked = call(kernels);
        linked[1] = 2 << 4;
        instruction.copy_from_slice(&linked);
        calls += 1;
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_gets_the_kernels_number_and_nothing_else() {
        let mut object = [[7; 8], call(CAST), call(CAST_CONTEXT), call(CAST)].concat_flat();
        assert_eq!(link(&mut object, CAST, 0x0001_0203), 2);
        let linked = [0x85, 0x20, 0, 0, 3, 2, 1, 0];
        assert_eq!(object, [[7; 8], linked, call(CAST_CONTEXT), linked].concat_flat());
    }

    trait Flat {
        fn concat_flat(&self) -> [u8; 32];
    }

    impl Flat for [[u8; 8]; 4] {
        fn concat_flat(&self) -> [u8; 32] {
            let mut flat = [0; 32];
            for (to, from) in flat.chunks_exact_mut(8).zip(self) {
                to.copy_from_slice(from);
            }
            flat
        }
    }
}
