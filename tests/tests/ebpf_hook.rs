//! The eBPF programs at the hook: they load, attach, stay, and go.

use anyhow::Result;
use npm_agent::backend::Backend;
use npm_agent::backend::ebpf::enforcer::{Ebpf, Options};
use npm_agent::exec::Tools;
use npm_tests::lab::netns::Namespaces;
use npm_tests::lab::require_root;
use npm_tests::lab::service::Dialect;
use npm_tests::scenario::enforcer::tracking;

#[test]
fn every_program_loads() -> Result<()> {
    if !require_root() {
        return Ok(());
    }
    for choice in ["probe,tcx", "probe,clsact"] {
        let namespaces = Namespaces::create(["node"])?;
        let node = &namespaces.members()[0];
        let options = Options {
            instance: node.name().to_owned(),
            choice: choice.parse()?,
            iptables: tracking(Dialect::Nft),
            tools: Tools::default(),
        };
        let mut backend = node.run(|| Ok(Ebpf::new(options)?))?;
        node.run(|| Ok(backend.remove()?))?;
    }
    Ok(())
}
