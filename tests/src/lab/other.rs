//! Somebody else's program at the egress of an interface, as other agents of a node have it.

use anyhow::{Context, Result};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{SchedClassifier, TcAttachType};
use npm_agent::backend::ebpf::width::Width;

use super::netns::Netns;

/// A program named `nothing` that does nothing, attached for as long as this lives.
#[derive(Debug)]
pub struct Other {
    program: aya::Ebpf,
}

impl Other {
    /// Attaches one to the egress of an interface of a namespace.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn attach(node: &Netns, interface: &str, options: TcAttachOptions) -> Result<Self> {
        let mut program = aya::Ebpf::load(Width::Narrow.object())?;
        let nothing: &mut SchedClassifier = program.program_mut("nothing").context("nothing")?.try_into()?;
        nothing.load()?;
        node.run(|| Ok(nothing.attach_with_options(interface, TcAttachType::Egress, options).map(drop)?))?;
        Ok(Self { program })
    }

    /// Takes it away again, within its namespace: filters are found by the interface's name.
    ///
    /// # Errors
    /// The namespace is gone.
    pub fn detach(self, node: &Netns) -> Result<()> {
        node.run(|| {
            drop(self.program);
            Ok(())
        })
    }
}
