//! Why a watch's attempt ended, and what follows from it.

use std::time::Duration;

use super::client::{CredentialsError, RequestError};
use super::wire::{ApiError, WireError};

/// How often the same line may fail to be understood before everything is listed.
const MAX_REPEATS: u32 = 2;

/// An attempt's end.
#[derive(Debug)]
pub(super) enum End {
    /// Nobody listens any more.
    Unheard,
    /// It has to be tried again.
    Failed(Failure),
}

impl<F: Into<Failure>> From<F> for End {
    fn from(failure: F) -> Self {
        Self::Failed(failure.into())
    }
}

/// Why an attempt failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the watch reports {}: {}", .0.code, .0.message)]
    Event(ApiError),
    #[error("the list has no version, so that nothing can be watched from there")]
    NoVersion,
    #[error("the answer was cut off")]
    Cut,
    #[error("the watch ended as soon as it had begun")]
    Refusing,
    #[error("the server is at version {now} after {before}: its store was replaced")]
    Rewound { before: String, now: String },
}

impl Failure {
    /// Whether everything has to be listed; `failures`: how many there were in a row.
    pub(super) fn needs_list(&self, failures: u32) -> bool {
        match self {
            Self::Request(RequestError::Refused { code, error, .. }) => {
                code.as_u16() == 410 || error.is_expired()
            }
            Self::Event(error) => error.is_expired(),
            Self::Wire(_) => failures >= MAX_REPEATS,
            Self::NoVersion | Self::Rewound { .. } => true,
            Self::Credentials(_) | Self::Request(_) | Self::Cut | Self::Refusing => false,
        }
    }

    /// Whether it is how servers say that they have no streaming lists: 422 "forbidden for watch" where the feature is
    /// off or unknown, 400 from some that stand in for one.
    pub(super) fn has_no_streaming_lists(&self) -> bool {
        match self {
            Self::Request(RequestError::Refused { code, .. }) => matches!(code.as_u16(), 400 | 422),
            Self::Request(_)
            | Self::Credentials(_)
            | Self::Wire(_)
            | Self::Event(_)
            | Self::NoVersion
            | Self::Cut
            | Self::Refusing
            | Self::Rewound { .. } => false,
        }
    }

    /// How long the server asked to be left alone.
    pub(super) fn pause_asked_for(&self) -> Duration {
        match self {
            Self::Request(RequestError::Refused { retry_after, .. }) => retry_after.unwrap_or_default(),
            Self::Request(_)
            | Self::Credentials(_)
            | Self::Wire(_)
            | Self::Event(_)
            | Self::NoVersion
            | Self::Cut
            | Self::Refusing
            | Self::Rewound { .. } => Duration::ZERO,
        }
    }

    /// With all its causes, on one line; a cause that its error has told of already is not told again.
    pub(super) fn text(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let said = error.to_string();
            if !text.contains(&said) {
                text = format!("{text}: {said}");
            }
            cause = error.source();
        }
        text
    }
}
