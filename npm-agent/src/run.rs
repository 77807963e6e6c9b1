//! Puts the agent together: the only place that knows every part.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};

use npm_policy::goal::Family;

use crate::backend::cut::Cutting;
use crate::backend::ebpf::choice::{Choice, Drops};
use crate::backend::hold::Holding;
use crate::backend::iptables::layout::{Established, Placement};
use crate::backend::iptables::render::Form;
use crate::backend::iptables::variant::{self, Variant};
use crate::backend::iptables::{Iptables, Options};
use crate::backend::succession::{Release, Succession};
use crate::backend::{Backend, BackendError, Removed, ebpf, hold};
use crate::config::file::PLACED_BEHIND;
use crate::config::value::{
    BackendKind, ChainPlacement, DeniedConnections, IptablesVariant, LogDenied, PodStartup, Scraping,
};
use crate::config::{Flags, HostNames, Settings, Source};
use crate::denied::Log;
use crate::escape::{self, Board, Engine};
use crate::exec::Tools;
use crate::metrics::Metrics;
use crate::reconcile::backoff::Backoff;
use crate::reconcile::worker::{Stopped, Timing, Worker};
use crate::reconcile::{Channels, Identity, Reconcile};
use crate::source::Event;
use crate::source::kube::{self, Credentials};
use crate::source::manifests;
use crate::status::server::Server;
use crate::{disturbance, http, lock, logging, memory};

/// How many messages of a source may wait: a source that is ahead of the loop waits too.
const MAX_EVENTS: usize = 1024;

/// How many questions may wait.
const MAX_ASKS: usize = 16;

/// How long a signal lets the backend finish what it is at: the process is gone within 2 s.
const STOP_PATIENCE: Duration = Duration::from_millis(1500);

/// Runs the agent until SIGTERM or SIGINT. What is programmed stays.
///
/// # Errors
/// It could not start, or its source has gone. What is programmed stays.
pub fn run(flags: Flags) -> anyhow::Result<()> {
    let settings = Settings::load(flags, &HostNames::of_this_machine())?;
    logging::start(settings.log_level, settings.log_format).context("starting the log")?;
    logging::abort_on_panic();
    memory::keep_little();
    announce(&settings);
    let _lock = lock::take_network_namespace()?;
    lock::sweep();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = start(&settings, &runtime);
    // Reading files blocks in a thread that nobody has to wait for.
    runtime.shutdown_background();
    outcome
}

fn announce(settings: &Settings) {
    info!(
        version = env!("CARGO_PKG_VERSION"),
        node = settings.node,
        instance = settings.instance,
        backend = %settings.backend,
        source = ?settings.source,
        config = ?settings.file,
        "npm-agent starts"
    );
    for notice in &settings.notices {
        warn!(key = notice.key, reason = notice.reason, "config key");
    }
}

fn start(settings: &Settings, runtime: &Runtime) -> anyhow::Result<()> {
    let engine = match settings.backend {
        BackendKind::Iptables => Engine::Iptables,
        BackendKind::Ebpf => Engine::Ebpf,
    };
    let held = match settings.pod_startup {
        PodStartup::Allow => None,
        PodStartup::Hold => Some(settings.pod_interfaces.clone()),
    };
    let board = Board::new(engine, held);
    let board = board.context("making the list of what escapes judgement")?;
    let log = match settings.log_denied {
        LogDenied::Never => None,
        LogDenied::Flows => Some(Log::default()),
    };
    let backend = backend(settings, &board, log.clone())?;
    // From here on signals end the agent in order.
    let _context = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let server = Server::bind(&settings.socket)?;

    let timing = Timing { verify_interval: settings.verify_interval, backoff: Backoff::default() };
    escape::start(board.clone(), settings.verify_interval, Tools::default())
        .context("starting the thread that looks for what escapes judgement")?;
    let metrics = Arc::new(Metrics::new());
    metrics.board(board.clone());
    let worker = Worker::start(backend, timing, &metrics).context("starting the backend's thread")?;
    let disturbed = worker.clone();
    disturbance::watch(move || disturbed.verify_soon())
        .context("starting the thread that hears of changes of rules")?;
    let (events, events_end) = mpsc::channel(MAX_EVENTS);
    let (refresh, refresh_end) = mpsc::channel(1);
    let (asks, asks_end) = mpsc::channel(MAX_ASKS);
    let identity = Identity {
        node: settings.node.clone(),
        instance: settings.instance.clone(),
        known_differences: known_differences(settings),
    };
    let channels = Channels { events: events_end, refresh, asks: asks_end };
    let reconcile =
        Reconcile::new(identity, vec![worker.clone()], Arc::clone(&metrics)).with_board(board).with_log(log);
    let reconcile = match settings.pod_startup {
        PodStartup::Allow => reconcile,
        PodStartup::Hold => reconcile.with_locals(),
    };
    let ended = reconcile.start(channels).context("starting the reconcile thread")?;
    let source = source(settings.source.clone(), events, refresh_end);
    runtime.spawn(server.serve(asks.clone()));
    if let Some(address) = settings.listening {
        let scraped = match settings.scraping {
            Scraping::Served => Some(metrics),
            Scraping::Refused => None,
        };
        let served = http::Served { asks, metrics: scraped, access: settings.debug_access };
        runtime.spawn(http::serve(address, served));
    }
    info!(socket = %settings.socket.display(), "status socket");

    let outcome = runtime.block_on(async {
        let source = tokio::spawn(source);
        tokio::select! {
            _ = terminate.recv() => { info!("SIGTERM: ending; what is programmed stays"); Ok(()) }
            _ = interrupt.recv() => { info!("SIGINT: ending; what is programmed stays"); Ok(()) }
            outcome = source => match outcome.context("running the source")? {
                Ok(()) => bail!("the source has ended; what is programmed stays"),
                Err(error) => Err(error),
            },
            ended = ended => bail!("the reconcile loop has ended ({ended:?}); what is programmed stays"),
        }
    });
    if worker.stop(STOP_PATIENCE) == Stopped::Busy {
        warn!("the backend is still at work; the next start goes on from there");
    }
    outcome
}

/// The backend that `settings` ask for, with what is around it.
fn backend(settings: &Settings, board: &Board, log: Option<Log>) -> anyhow::Result<Box<dyn Backend>> {
    let (judging, mut release): (_, Release) = match settings.backend {
        BackendKind::Iptables => (iptables_that_cuts(settings)?, Box::new(remove_pinned)),
        BackendKind::Ebpf => (ebpf(settings, board, log)?, Box::new(remove_rules)),
    };
    match settings.pod_startup {
        PodStartup::Allow => {
            // An agent before may have held pods: they are let go when this one has programmed everything.
            let release_all = move || {
                let Removed { sets, chains, rules } = hold::release(&Tools::default())?;
                Ok(release()? + sets + chains + rules)
            };
            Ok(Box::new(Succession::new(judging, Box::new(release_all))))
        }
        PodStartup::Hold => {
            let (interfaces, variant) =
                (settings.pod_interfaces.clone(), variant_of(settings.iptables_variant));
            let holding = Holding::new(judging, interfaces, variant, Tools::default());
            let holding = holding.context("pod-startup hold, which needs iptables and ipset")?;
            Ok(Box::new(Succession::new(Box::new(holding), release)))
        }
    }
}

/// What the source does until it ends, which it does not by itself.
async fn source(
    source: Source,
    events: mpsc::Sender<Event>,
    refresh: mpsc::Receiver<u64>,
) -> anyhow::Result<()> {
    match source {
        Source::Manifests(directory) => Ok(manifests::run(directory, events, refresh).await?),
        Source::Kube { kubeconfig, watch_timeout } => {
            let credentials = match kubeconfig {
                Some(path) => Credentials::Kubeconfig(path),
                None => Credentials::InCluster,
            };
            let options = kube::Options { credentials, watch_timeout };
            Ok(kube::run(options, events, refresh).await?)
        }
    }
}

/// How the configuration makes this agent differ from what the API promises.
fn known_differences(settings: &Settings) -> Vec<String> {
    match settings.placement {
        ChainPlacement::First => Vec::new(),
        ChainPlacement::AfterKubeServices => vec![format!("PlaceAzureChainFirst=false is {PLACED_BEHIND}")],
    }
}

/// Which of the eBPF programs is loaded, and how it is attached: for tests and for looking for a fault. Words with commas
/// between them; what is not said is chosen by what the kernel offers.
const EBPF_CHOICE: &str = "NPM_EBPF_CHOICE";

fn ebpf(settings: &Settings, board: &Board, log: Option<Log>) -> anyhow::Result<Box<dyn Backend>> {
    if settings.denied_connections == DeniedConnections::Cut {
        bail!("denied-connections cut is of the iptables backend only, so far");
    }
    let words = std::env::var(EBPF_CHOICE).unwrap_or_default();
    let mut choice: Choice = words.parse().with_context(|| format!("reading {EBPF_CHOICE}"))?;
    if log.is_some() {
        choice.drops = Drops::Told;
    }
    let options = ebpf::enforcer::Options {
        instance: settings.instance.clone(),
        choice,
        iptables: tracking(settings.iptables_variant),
        tools: Tools::default(),
        selection: settings.interfaces.clone(),
        proof: settings.proof,
    };
    let backend = ebpf::enforcer::Ebpf::new(options).context("loading the eBPF programs")?;
    let backend = backend.with_board(board.clone());
    Ok(Box::new(match log {
        None => backend,
        Some(log) => backend.with_log(log, Arc::new(|line| line.write())).context("reading denied flows")?,
    }))
}

/// Removes what any version of the eBPF backend has pinned and attached, and the rules that make the kernel track
/// connections; gives how many objects those were.
///
/// # Errors
/// Something is still there.
pub(crate) fn remove_pinned() -> Result<usize, BackendError> {
    let mut removed = ebpf::enforcer::release()?;
    let tools = Tools::default();
    for variant in Variant::BOTH {
        // Asking iptables-legacy makes a table where there is none.
        for rule in tracking_with(variant).iter().filter(|rule| variant.has_table(rule.family, "filter")) {
            removed += usize::from(rule.remove(&tools)?);
        }
    }
    Ok(removed)
}

/// Removes the chains and sets of the iptables backend, of either variant; gives how many objects those were.
fn remove_rules() -> Result<usize, BackendError> {
    let Removed { sets, chains, rules } = Iptables::new(Options::default())?.remove()?;
    Ok(sets + chains + rules)
}

/// The programs of the node's iptables, for the rule that makes the kernel track connections.
fn tracking(variant: IptablesVariant) -> Vec<ebpf::rule::Iptables> {
    tracking_with(variant_of(variant).unwrap_or_else(|| Variant::detect(&Tools::default())))
}

/// The variant that is asked for; `None`: the node's.
fn variant_of(variant: IptablesVariant) -> Option<Variant> {
    match variant {
        IptablesVariant::Auto => None,
        IptablesVariant::Nft => Some(Variant::Nft),
        IptablesVariant::Legacy => Some(Variant::Legacy),
    }
}

fn tracking_with(variant: Variant) -> Vec<ebpf::rule::Iptables> {
    let mut families = vec![Family::V4];
    if variant::has_ipv6().unwrap_or(true) {
        families.push(Family::V6);
    }
    let program = |family| ebpf::rule::Iptables { family, program: variant.command(family) };
    families.into_iter().map(program).collect()
}

/// The backend for `npm-agent cleanup`: it removes what is ours from every variant of iptables.
///
/// # Errors
/// The kernel or its tools lack what is needed.
pub(crate) fn backend_for_cleanup() -> anyhow::Result<Box<dyn Backend>> {
    Ok(Box::new(iptables(IptablesVariant::default(), ChainPlacement::default(), Form::default())?))
}

/// The backend that `settings` ask for, with what cuts connections around it if they do.
fn iptables_that_cuts(settings: &Settings) -> anyhow::Result<Box<dyn Backend>> {
    if settings.log_denied == LogDenied::Flows {
        bail!(
            "log-denied flows is of the eBPF backend only: iptables does not tell whose packets a rule drops"
        );
    }
    let established = match settings.denied_connections {
        DeniedConnections::Keep => Established::Keep,
        DeniedConnections::Cut => Established::Cut,
    };
    let form = Form { proof: settings.proof, established };
    let backend = Box::new(iptables(settings.iptables_variant, settings.placement, form)?);
    match settings.denied_connections {
        DeniedConnections::Keep => Ok(backend),
        DeniedConnections::Cut => {
            let cutting = Cutting::new(backend, settings.proof).context("denied-connections cut")?;
            Ok(Box::new(cutting))
        }
    }
}

fn iptables(variant: IptablesVariant, placement: ChainPlacement, form: Form) -> anyhow::Result<Iptables> {
    let variant = variant_of(variant);
    let placement = match placement {
        ChainPlacement::First => Placement::First,
        ChainPlacement::AfterKubeServices => Placement::AfterServices,
    };
    let options = Options { variant, placement, form, ..Options::default() };
    Iptables::new(options).context("looking at iptables and ipset")
}
