//! Log records on standard error: for people on a terminal, one JSON object a line otherwise.

use std::io::IsTerminal;

use tracing::Level;
use tracing::error;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Layer, fmt, registry};

use crate::config::value::{LogFormat, LogLevel};

/// Starts logging for the whole process.
///
/// `level` is for our own records; dependencies are heard from `warn` up, because what they have to say below that
/// is about themselves.
///
/// # Errors
/// Logging has been started before.
pub fn start(level: LogLevel, format: LogFormat) -> Result<(), TryInitError> {
    let level = level.level();
    // `Level` orders the most verbose last.
    let filter = Targets::new()
        .with_default(level.min(Level::WARN))
        .with_target("npm_agent", level)
        .with_target("npm_policy", level);
    let terminal = std::io::stderr().is_terminal();
    let human = match format {
        LogFormat::Human => true,
        LogFormat::Json => false,
        LogFormat::Auto => terminal,
    };
    let layer = fmt::layer().with_writer(std::io::stderr);
    let layer = if human {
        // https://no-color.org
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        layer.with_target(false).with_ansi(terminal && !plain).boxed()
    } else {
        layer.json().flatten_event(true).boxed()
    };
    registry().with(layer.with_filter(filter)).try_init()
}

/// Makes a panic of any thread end the process, with a log record.
///
/// A thread that has panicked leaves work undone that nobody would notice; a process that has ended is started
/// again and converges from what is in the kernel.
pub fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let message = panic.payload_as_str().unwrap_or("no message");
        error!(thread = thread.name(), location, message, "panic, a bug: the process aborts");
        std::process::abort();
    }));
}
