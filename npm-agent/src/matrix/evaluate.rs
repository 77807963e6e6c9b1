//! Asks the engines.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::sync::Arc;
use std::thread;

use npm_policy::compile::compile;
use npm_policy::flow::{Decision, Flow};
use npm_policy::goal::Goal;
use npm_policy::model::{Pod, PodKey};
use npm_policy::world::{Change, World};

use crate::backend::ebpf::kernel::{Kernel, KernelError};
use crate::backend::ebpf::lower::decision;
use crate::backend::ebpf::maps::ApplyError;
use crate::backend::ebpf::width::Width;
use crate::backend::iptables::render::{Rendered, RenderedError};

use super::{
    Cell, Endpoint, Engine, Matrix, MatrixError, Probe, Request, Rows, endpoints, picked_probes, verdict,
};

/// Answers requests, and keeps the eBPF program that it has loaded for one for the next.
#[derive(Default)]
pub struct Evaluator {
    kernel: Option<Kernel>,
}

/// Answers a request. The engines work on all processors.
///
/// # Errors
/// As [`Evaluator::evaluate`].
pub fn evaluate(request: &Request) -> Result<Matrix, MatrixError> {
    Evaluator::default().evaluate(request)
}

impl Evaluator {
    /// Answers a request. The engines work on all processors, but for the kernel's.
    ///
    /// # Errors
    /// The request is ambiguous, or an engine can't be asked.
    pub fn evaluate(&mut self, request: &Request) -> Result<Matrix, MatrixError> {
        let Request { world, probes, externals, family, engines } = request;
        let mut seen = BTreeSet::new();
        let mut probes: Vec<Probe> = probes.iter().copied().filter(|probe| seen.insert(*probe)).collect();
        if probes.is_empty() {
            probes = picked_probes(world);
        }
        let endpoints = endpoints(world, externals, *family);
        let mut names = BTreeSet::new();
        if let Some(twice) = endpoints.iter().find(|endpoint| !names.insert(&endpoint.name)) {
            return Err(MatrixError::Ambiguous { name: twice.name.clone() });
        }
        let question = Question { world, probes: &probes, endpoints: &endpoints };
        let mut answers = BTreeMap::new();
        for engine in engines {
            let decisions = match engine {
                Engine::Oracle => question.ask_oracle(),
                Engine::Goal => question.ask_nodes(Judge::Goal)?,
                Engine::Iptables => {
                    question.ask_nodes(|goal| Judge::Iptables(Box::new(Rendered::of(&goal))))?
                }
                Engine::Ebpf => question.ask_kernel(self.kernel()?)?,
            };
            answers.insert(*engine, question.tables(&decisions));
        }
        Ok(Matrix { probes, endpoints, engines: answers })
    }

    fn kernel(&mut self) -> Result<&mut Kernel, MatrixError> {
        let kernel = match self.kernel.take() {
            Some(kernel) => kernel,
            None => Kernel::load(Width::Narrow)?,
        };
        Ok(self.kernel.insert(kernel))
    }
}

/// What one node's rules do with flows.
enum Judge {
    Goal(Goal),
    Iptables(Box<Rendered>),
}

impl Judge {
    fn decide(&self, flow: &Flow) -> Result<Decision, RenderedError> {
        match self {
            Self::Goal(goal) => Ok(goal.verdict(flow).decision()),
            Self::Iptables(rendered) => rendered.decide(flow),
        }
    }
}

/// What the engines are asked.
struct Question<'a> {
    world: &'a World,
    probes: &'a [Probe],
    endpoints: &'a [Endpoint],
}

/// The verdicts of an engine: by source, destination and probe, in this order, in one list.
type Decisions = Vec<Decision>;

impl Question<'_> {
    fn flow(&self, source: usize, destination: usize, probe: Probe) -> Flow {
        probe.flow(self.endpoints[source].address, self.endpoints[destination].address)
    }

    fn place(&self, source: usize, destination: usize) -> usize {
        (source * self.endpoints.len() + destination) * self.probes.len()
    }

    fn ask_oracle(&self) -> Decisions {
        let sources: Vec<usize> = (0..self.endpoints.len()).collect();
        let rows = on_all_processors(&sources, |source| {
            let mut row = Vec::with_capacity(self.endpoints.len() * self.probes.len());
            for destination in 0..self.endpoints.len() {
                for probe in self.probes {
                    let (from, to) = (self.endpoints[*source].address, self.endpoints[destination].address);
                    let (_, verdict) = verdict(self.world, *probe, from, to);
                    row.push(verdict.decision());
                }
            }
            row
        });
        rows.concat()
    }

    /// A flow is allowed if the nodes of both ends allow it.
    fn ask_nodes(&self, judge: impl Fn(Goal) -> Judge + Sync) -> Result<Decisions, MatrixError> {
        let world = apart(self.world);
        let denied = on_all_processors(&self.nodes(&world), |(holder, places)| {
            let Some(goal) = goal_of(&world, holder) else { return Ok(Vec::new()) };
            let judge = judge(goal);
            self.denied_by(|flow| judge.decide(flow), places)
                .map_err(|source| MatrixError::Rendered { pod: PodKey::clone(holder), source })
        });
        self.decisions(denied)
    }

    /// The same, one node after the other: there is one program, whose maps hold one node's rules at a time.
    fn ask_kernel(&self, kernel: &mut Kernel) -> Result<Decisions, MatrixError> {
        let world = apart(self.world);
        let denied = self.nodes(&world).into_iter().map(|(holder, places)| {
            let Some(goal) = goal_of(&world, holder) else { return Ok(Vec::new()) };
            match kernel.fill(&goal) {
                Ok(_) => {}
                Err(KernelError::Apply(ApplyError::Lower(source))) => {
                    return Err(MatrixError::Lowered { pod: holder.clone(), source });
                }
                Err(error) => return Err(MatrixError::Kernel(error)),
            }
            Ok(self.denied_by(|flow| kernel.verdict(flow).map(decision), &places)?)
        });
        self.decisions(denied)
    }

    /// The pods that hold endpoints, each with the places of its own.
    fn nodes<'a>(&self, world: &'a World) -> Vec<(&'a PodKey, Vec<usize>)> {
        let mut holders: BTreeMap<&PodKey, Vec<usize>> = BTreeMap::new();
        for (place, endpoint) in self.endpoints.iter().enumerate() {
            if let Some(holder) = world.holder(endpoint.address) {
                holders.entry(&holder.key).or_default().push(place);
            }
        }
        holders.into_iter().collect()
    }

    /// What is left when every node has denied what it denies.
    fn decisions(
        &self,
        denied: impl IntoIterator<Item = Result<Vec<usize>, MatrixError>>,
    ) -> Result<Decisions, MatrixError> {
        let mut decisions = vec![Decision::Allow; self.place(self.endpoints.len(), 0)];
        for places in denied {
            for place in places? {
                decisions[place] = Decision::Deny;
            }
        }
        Ok(decisions)
    }

    /// Where a node denies what comes from or goes to its endpoints.
    fn denied_by<E>(
        &self,
        decide: impl Fn(&Flow) -> Result<Decision, E>,
        places: &[usize],
    ) -> Result<Vec<usize>, E> {
        let mut denied = Vec::new();
        for own in places {
            for other in 0..self.endpoints.len() {
                for (source, destination) in [(*own, other), (other, *own)] {
                    for (i, probe) in self.probes.iter().enumerate() {
                        match decide(&self.flow(source, destination, *probe))? {
                            Decision::Deny => denied.push(self.place(source, destination) + i),
                            Decision::Allow => {}
                        }
                    }
                }
            }
        }
        Ok(denied)
    }

    fn tables(&self, decisions: &Decisions) -> BTreeMap<Probe, Rows> {
        let all = 0..self.endpoints.len();
        let table = |i: usize| {
            let cell = |source, destination| match decisions[self.place(source, destination) + i] {
                _ if source == destination => Cell::Itself,
                Decision::Deny => Cell::Denied,
                Decision::Allow => Cell::Allowed,
            };
            all.clone()
                .map(|source| all.clone().map(|destination| cell(source, destination)).collect())
                .collect()
        };
        self.probes.iter().enumerate().map(|(i, probe)| (*probe, table(i))).collect()
    }
}

/// The same world with every pod on a node of its own.
fn apart(world: &World) -> World {
    let mut apart = world.clone();
    for pod in world.pods() {
        let moved = Pod { node: Some(node_of(&pod.key)), ..Pod::clone(pod) };
        apart.apply(Change::Pod(pod.key.clone(), Some(moved)));
    }
    apart
}

/// What a pod's own node must enforce; `None`: no policy selects anything there, so it allows everything.
fn goal_of(world: &World, pod: &PodKey) -> Option<Goal> {
    let (goal, _) = compile(world, &node_of(pod));
    (!goal.programs.is_empty()).then_some(goal)
}

fn node_of(pod: &PodKey) -> Arc<str> {
    pod.to_string().into()
}

/// Maps items in order, on as many threads as there are processors.
fn on_all_processors<T: Sync, R: Send>(items: &[T], map: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let part = items.len().div_ceil(threads).max(1);
    thread::scope(|scope| {
        let map = &map;
        let parts: Vec<_> = items
            .chunks(part)
            .map(|part| scope.spawn(move || part.iter().map(map).collect::<Vec<R>>()))
            .collect();
        let parts = parts.into_iter().map(|part| part.join());
        parts.flat_map(|part| part.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}
