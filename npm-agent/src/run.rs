//! Puts the agent together: the only place that knows every part.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::backend::Backend;
use crate::backend::iptables::layout::Placement;
use crate::backend::iptables::variant::Variant;
use crate::backend::iptables::{Iptables, Options};
use crate::config::file::PLACED_BEHIND;
use crate::config::value::{BackendKind, ChainPlacement, IptablesVariant};
use crate::config::{Flags, HostNames, Settings, Source};
use crate::escape::{self, Board, Engine};
use crate::exec::Tools;
use crate::reconcile::backoff::Backoff;
use crate::reconcile::worker::{Stopped, Timing, Worker};
use crate::reconcile::{Channels, Identity, Reconcile};
use crate::source::manifests;
use crate::status::server::Server;
use crate::{lock, logging};

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
    announce(&settings);
    let _lock = lock::take_network_namespace()?;
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
    let backend = match settings.backend {
        BackendKind::Iptables => iptables(settings.iptables_variant, settings.placement)?,
    };
    // From here on signals end the agent in order.
    let _context = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let server = Server::bind(&settings.socket)?;

    let timing = Timing { verify_interval: settings.verify_interval, backoff: Backoff::default() };
    let board = Board::new(match settings.backend {
        BackendKind::Iptables => Engine::Iptables,
    });
    let board = board.context("making the list of what escapes judgement")?;
    escape::start(board.clone(), settings.verify_interval, Tools::default())
        .context("starting the thread that looks for what escapes judgement")?;
    let worker = Worker::start(backend, timing).context("starting the backend's thread")?;
    let (events, events_end) = mpsc::channel(MAX_EVENTS);
    let (refresh, refresh_end) = mpsc::channel(1);
    let (asks, asks_end) = mpsc::channel(MAX_ASKS);
    let identity = Identity {
        node: settings.node.clone(),
        instance: settings.instance.clone(),
        known_differences: known_differences(settings),
    };
    let channels = Channels { events: events_end, refresh, asks: asks_end };
    let ended = Reconcile::new(identity, vec![worker.clone()])
        .with_board(board)
        .start(channels)
        .context("starting the reconcile thread")?;
    let source = match &settings.source {
        Source::Manifests(directory) => manifests::run(directory.clone(), events, refresh_end),
    };
    runtime.spawn(server.serve(asks));
    info!(socket = %settings.socket.display(), "status socket");

    let outcome = runtime.block_on(async {
        let source = tokio::spawn(source);
        tokio::select! {
            _ = terminate.recv() => { info!("SIGTERM: ending; what is programmed stays"); Ok(()) }
            _ = interrupt.recv() => { info!("SIGINT: ending; what is programmed stays"); Ok(()) }
            outcome = source => match outcome.context("running the source")? {
                Ok(()) => bail!("the source has ended; what is programmed stays"),
                Err(error) => Err(error.into()),
            },
            ended = ended => bail!("the reconcile loop has ended ({ended:?}); what is programmed stays"),
        }
    });
    if worker.stop(STOP_PATIENCE) == Stopped::Busy {
        warn!("the backend is still at work; the next start goes on from there");
    }
    outcome
}

/// How the configuration makes this agent differ from what the API promises.
fn known_differences(settings: &Settings) -> Vec<String> {
    match settings.placement {
        ChainPlacement::First => Vec::new(),
        ChainPlacement::AfterKubeServices => vec![format!("PlaceAzureChainFirst=false is {PLACED_BEHIND}")],
    }
}

/// The backend for `npm-agent cleanup`: it removes what is ours from every variant of iptables.
///
/// # Errors
/// The kernel or its tools lack what is needed.
pub(crate) fn backend_for_cleanup() -> anyhow::Result<Box<dyn Backend>> {
    iptables(IptablesVariant::default(), ChainPlacement::default())
}

fn iptables(variant: IptablesVariant, placement: ChainPlacement) -> anyhow::Result<Box<dyn Backend>> {
    let variant = match variant {
        IptablesVariant::Auto => None,
        IptablesVariant::Nft => Some(Variant::Nft),
        IptablesVariant::Legacy => Some(Variant::Legacy),
    };
    let placement = match placement {
        ChainPlacement::First => Placement::First,
        ChainPlacement::AfterKubeServices => Placement::AfterServices,
    };
    let options = Options { variant, placement, ..Options::default() };
    Ok(Box::new(Iptables::new(options).context("looking at iptables and ipset")?))
}
