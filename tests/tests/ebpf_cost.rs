//! scratch
#![forbid(unsafe_code)]
use aya::Ebpf;
use aya::programs::SchedClassifier;
use std::time::Instant;

#[test]
fn cost() {
    let path = std::env::var("OBJ").unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../npm-ebpf/npm-ebpf.o").into());
    let bytes = std::fs::read(path).unwrap();
    let mut best: std::collections::BTreeMap<String, (u128, u128, u32, u32, u32)> = Default::default();
    for _ in 0..20 {
        let t = Instant::now();
        let mut ebpf = match Ebpf::load(&bytes) { Ok(it) => it, Err(error) => panic!("{error:?}") };
        let object = t.elapsed().as_micros();
        let names: Vec<String> = ebpf.programs().map(|(n, _)| n.to_owned()).collect();
        for name in names {
            let program: &mut SchedClassifier = ebpf.program_mut(&name).unwrap().try_into().unwrap();
            let t = Instant::now();
            match program.load() { Ok(()) => {}, Err(aya::programs::ProgramError::LoadError { verifier_log, .. }) => panic!("{name}: {verifier_log}"), Err(error) => panic!("{error:?}") }
            let took = t.elapsed().as_micros();
            let info = program.info().unwrap();
            let e = best.entry(name).or_insert((u128::MAX, u128::MAX, 0, 0, 0));
            *e = (e.0.min(took), e.1.min(object), info.verified_instruction_count().unwrap(), info.size_translated().unwrap() / 8, info.size_jitted());
        }
    }
    for (name, (took, object, verified, xlated, jited)) in best {
        println!("{name}: load {took} us (object {object} us), verified {verified}, xlated {xlated} insns, jited {jited} bytes");
    }
}
