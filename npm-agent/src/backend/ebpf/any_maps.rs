//! The maps of either width behind one type.

use std::path::Path;

use aya::Ebpf;
use npm_common::decide::Verdict;
use npm_common::layout::{NARROW_WORDS, WIDE_WORDS};
use npm_policy::flow::Flow;
use npm_policy::goal::Goal;

use super::maps::{ApplyError, Maps, MapsError, Writes};
use super::width::Width;
use crate::backend::meter::Store;

/// The maps of one object.
pub enum AnyMaps {
    /// Of the narrow one.
    Narrow(Box<Maps<NARROW_WORDS>>),
    /// Of the wide one.
    Wide(Box<Maps<WIDE_WORDS>>),
}

/// Does the same with the maps of either width.
macro_rules! either {
    ($maps:expr, $inner:ident => $work:expr) => {
        match $maps {
            AnyMaps::Narrow($inner) => $work,
            AnyMaps::Wide($inner) => $work,
        }
    };
}

impl AnyMaps {
    /// [`Maps::take`].
    ///
    /// # Errors
    /// As there.
    pub fn take(width: Width, ebpf: &mut Ebpf) -> Result<Self, MapsError> {
        Ok(match width {
            Width::Narrow => Self::Narrow(Box::new(Maps::take(ebpf)?)),
            Width::Wide => Self::Wide(Box::new(Maps::take(ebpf)?)),
        })
    }

    /// [`Maps::pinned`].
    ///
    /// # Errors
    /// As there.
    pub fn pinned(width: Width, directory: &Path) -> Result<Self, MapsError> {
        Ok(match width {
            Width::Narrow => Self::Narrow(Box::new(Maps::pinned(directory)?)),
            Width::Wide => Self::Wide(Box::new(Maps::pinned(directory)?)),
        })
    }

    /// Whose they are.
    pub fn width(&self) -> Width {
        match self {
            Self::Narrow(_) => Width::Narrow,
            Self::Wide(_) => Width::Wide,
        }
    }

    /// [`Maps::write_at_once_from`].
    pub fn write_at_once_from(&mut self, least: usize) {
        either!(self, maps => maps.write_at_once_from(least));
    }

    /// [`Maps::is_empty`].
    pub fn is_empty(&self) -> bool {
        either!(self, maps => maps.is_empty())
    }

    /// [`Maps::stores`].
    pub fn stores(&self) -> Vec<Store> {
        either!(self, maps => maps.stores())
    }

    /// [`Maps::apply`].
    ///
    /// # Errors
    /// As there.
    pub fn apply(&mut self, goal: &Goal) -> Result<Writes, ApplyError> {
        either!(self, maps => maps.apply(goal))
    }

    /// [`Maps::verify`].
    ///
    /// # Errors
    /// As there.
    pub fn verify(&mut self, goal: &Goal) -> Result<(Writes, Vec<String>), ApplyError> {
        either!(self, maps => maps.verify(goal))
    }

    /// [`Maps::read_back`].
    ///
    /// # Errors
    /// As there.
    pub fn read_back(&mut self) -> Result<(), MapsError> {
        either!(self, maps => maps.read_back())
    }

    /// [`Maps::decide`].
    pub fn decide(&self, flow: &Flow) -> Verdict {
        either!(self, maps => maps.decide(flow))
    }
}
