//! What makes a node enforce policies: the agent as it runs in production, or its rendering, given to the tools
//! directly.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use npm_agent::backend::ebpf::choice::Choice;
use npm_agent::backend::ebpf::enforcer::{Ebpf, Options as EbpfOptions};
use npm_agent::backend::ebpf::rule::Iptables as Tracking;
use npm_agent::backend::iptables::render::Rendered;
use npm_agent::backend::iptables::state::State;
use npm_agent::backend::iptables::variant::Variant;
use npm_agent::backend::iptables::{Iptables, Options};
use npm_agent::backend::{Applied, Backend};
use npm_agent::exec::Tools;
use npm_agent::interfaces::select::Selection;
use npm_common::mark::ProofBit;
use npm_policy::compile::compile;
use npm_policy::goal::Family;
use npm_policy::world::World;

use crate::lab::agent::{Agent, Settings};
use crate::lab::netns::Netns;
use crate::lab::service::Dialect;

/// Who enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Means {
    /// Nobody: what a scenario denies must then show as a difference, or the comparison proves nothing.
    Nothing,
    /// Compiled and rendered in this process; `ipset restore` and `iptables-restore` do the rest.
    Rendering,
    /// The iptables backend in this process, from one state to the next as the agent would.
    Backend,
    /// The eBPF backend in this process, with these programs.
    Ebpf(Choice),
    /// The agent's program.
    Agent,
    /// The agent's program with its eBPF backend.
    EbpfAgent,
}

/// Enforces on one node.
#[derive(Debug)]
pub enum Enforcer {
    /// See [`Means::Nothing`].
    Nothing,
    /// See [`Means::Rendering`].
    Rendering {
        /// The node's namespace.
        netns: Netns,
        /// The node's name.
        node: String,
        /// Which iptables.
        dialect: Dialect,
    },
    /// See [`Means::Backend`].
    Backend {
        /// The node's namespace.
        netns: Netns,
        /// The node's name.
        node: String,
        /// The backend.
        backend: Box<Iptables>,
    },
    /// See [`Means::Ebpf`].
    Ebpf {
        /// The node's namespace.
        netns: Netns,
        /// The node's name.
        node: String,
        /// The backend.
        backend: Box<Ebpf>,
    },
    /// See [`Means::Agent`].
    Agent {
        /// The process.
        agent: Box<Agent>,
        /// Which iptables.
        dialect: Dialect,
    },
}

/// Where to enforce, and how.
#[derive(Debug)]
pub struct Site<'a> {
    /// The node's namespace.
    pub netns: &'a Netns,
    /// The node's name.
    pub node: &'a str,
    /// Which iptables.
    pub dialect: Dialect,
    /// A directory of the lab's own, with the manifests in `manifests`.
    pub directory: &'a Path,
}

impl Enforcer {
    /// Starts to enforce on a node.
    ///
    /// # Errors
    /// The agent can't be started.
    pub fn start(means: Means, site: &Site<'_>) -> Result<Self> {
        let Site { netns, node, dialect, directory } = *site;
        match means {
            Means::Nothing => Ok(Self::Nothing),
            Means::Rendering => Ok(Self::Rendering { netns: netns.clone(), node: node.to_owned(), dialect }),
            Means::Backend => {
                let options = Options { variant: Some(variant(dialect)), ..Options::default() };
                let backend = netns.run(|| Ok(Box::new(Iptables::new(options)?)))?;
                Ok(Self::Backend { netns: netns.clone(), node: node.to_owned(), backend })
            }
            Means::Ebpf(choice) => {
                let backend = Box::new(ebpf(netns, choice, dialect)?);
                Ok(Self::Ebpf { netns: netns.clone(), node: node.to_owned(), backend })
            }
            Means::Agent | Means::EbpfAgent => {
                let own: PathBuf = directory.join(netns.name());
                std::fs::create_dir_all(&own).with_context(|| format!("making {}", own.display()))?;
                let settings = Settings {
                    backend: if means == Means::Agent { "iptables" } else { "ebpf" }.into(),
                    node: node.to_owned(),
                    manifests: directory.join("manifests"),
                    directory: own,
                    more: ["--iptables-variant", dialect.name(), "--instance", netns.name()]
                        .map(str::to_owned)
                        .to_vec(),
                };
                Ok(Self::Agent { agent: Box::new(Agent::start(netns, settings)?), dialect })
            }
        }
    }

    /// Makes the node enforce what the world, which the manifests have said already, wants.
    ///
    /// # Errors
    /// It can't be done, or takes too long.
    pub fn enforce(&mut self, world: &World) -> Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Rendering { netns, node, dialect } => {
                let rendered = Rendered::of(&compile(world, node).0);
                // Rules let go of sets before the sets go; nobody asks for more here than the end.
                restore(netns, *dialect, &|_| "*filter\nCOMMIT\n".to_owned())?;
                netns.exec("ipset", &["destroy"])?;
                netns.exec_with_input("ipset", &["restore"], &rendered.sets_text())?;
                restore(netns, *dialect, &|family| rendered.filter_text(family))
            }
            Self::Backend { netns, node, backend } => {
                let goal = compile(world, node).0;
                netns.run(|| {
                    let applied = backend.apply(&goal)?;
                    if !applied.degraded.is_empty() {
                        bail!("the kernel would not take all: {:?}", applied.degraded);
                    }
                    let left = backend.verify()?;
                    if left != Applied::default() {
                        bail!("what was applied was not all there: {left:?}");
                    }
                    Ok(())
                })
            }
            Self::Ebpf { netns, node, backend } => {
                let goal = compile(world, node).0;
                netns.run(|| {
                    let applied = backend.apply(&goal)?;
                    if !applied.degraded.is_empty() {
                        bail!("the maps would not take all: {:?}", applied.degraded);
                    }
                    let left = backend.verify()?;
                    if !left.drift.is_empty() {
                        bail!("what was applied was not all there: {left:?}");
                    }
                    Ok(())
                })
            }
            Self::Agent { agent, .. } => agent.wait(),
        }
    }

    /// What the kernel holds of ours, as whoever comes next would find it.
    ///
    /// # Errors
    /// It can't be read.
    pub fn kernel(&self) -> Result<BTreeMap<Family, State>> {
        let (netns, dialect) = match self {
            Self::Nothing => return Ok(BTreeMap::new()),
            Self::Rendering { netns, dialect, .. } => (netns, variant(*dialect)),
            Self::Backend { netns, backend, .. } => (netns, backend.variant()),
            Self::Ebpf { .. } => bail!("maps are compared by the backend's own verify"),
            Self::Agent { agent, dialect } => (agent.netns(), variant(*dialect)),
        };
        let options = Options { variant: Some(dialect), ..Options::default() };
        netns.run(|| Ok(Iptables::new(options)?.read()?))
    }

    /// What it has said, for people.
    pub fn log(&self) -> String {
        match self {
            Self::Nothing | Self::Rendering { .. } | Self::Backend { .. } => String::new(),
            Self::Ebpf { backend, .. } => format!("{:?}", backend.outcomes()),
            Self::Agent { agent, .. } => agent.log(),
        }
    }
}

/// The eBPF backend on a node, under the name of its namespace.
///
/// # Errors
/// It can't be started.
pub fn ebpf(netns: &Netns, choice: Choice, dialect: Dialect) -> Result<Ebpf> {
    let options = EbpfOptions {
        instance: netns.name().to_owned(),
        choice,
        iptables: tracking(dialect),
        tools: Tools::default(),
        selection: Selection::default(),
        proof: ProofBit::DEFAULT,
    };
    netns.run(|| Ok(Ebpf::new(options)?))
}

fn variant(dialect: Dialect) -> Variant {
    match dialect {
        Dialect::Nft => Variant::Nft,
        Dialect::Legacy => Variant::Legacy,
    }
}

impl Drop for Enforcer {
    fn drop(&mut self) {
        // Everything else is gone with the namespace; pins are not.
        if let Self::Ebpf { netns, backend, .. } = self
            && let Err(error) = netns.run(|| Ok(backend.remove()?))
        {
            eprintln!("pins of {} are left behind: {error:#}", netns.name());
        }
    }
}

/// The programs that make the node track connections.
pub fn tracking(dialect: Dialect) -> Vec<Tracking> {
    let program = |family| match (dialect, family) {
        (Dialect::Nft, Family::V4) => "iptables-nft",
        (Dialect::Nft, Family::V6) => "ip6tables-nft",
        (Dialect::Legacy, Family::V4) => "iptables-legacy",
        (Dialect::Legacy, Family::V6) => "ip6tables-legacy",
    };
    Family::BOTH.map(|family| Tracking { family, program: program(family) }).to_vec()
}

fn restore(netns: &Netns, dialect: Dialect, text: &dyn Fn(Family) -> String) -> Result<()> {
    Family::BOTH.into_iter().try_for_each(|family| {
        netns.exec_with_input(&dialect.program(family, "-restore"), &["-w"], &text(family)).map(drop)
    })
}
