//! What a user expects of a matrix, and how it differs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use npm_policy::world::World;
use serde::Deserialize;

use super::{Cell, Engine, Matrix, Probe, Rows, verdict};

/// An expected matrix: what [`Matrix::to_json`] writes, read back. The endpoints may be in another order, and it may hold
/// fewer probes and fewer engines than the matrix that it is compared with: those that it holds must all be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expectation {
    /// The endpoints' names.
    pub endpoints: Vec<String>,
    /// The probes.
    pub probes: Vec<Probe>,
    /// The tables.
    pub engines: BTreeMap<Engine, BTreeMap<Probe, Rows>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    probes: Vec<String>,
    endpoints: Vec<String>,
    engines: BTreeMap<String, BTreeMap<String, Vec<String>>>,
}

/// Why an expectation can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ExpectationError {
    /// It is not JSON of the form.
    #[error("not what `matrix -o json` writes")]
    Form(#[from] serde_json::Error),
    /// It names something that is not known.
    #[error("{text:?} is not known: {reason}")]
    Unknown {
        /// What it names.
        text: String,
        /// What would be known.
        reason: String,
    },
    /// A table is not square, or holds something else than `.`, `X` and `#`.
    #[error("table {engine} {probe}: must be {size} rows of {size} characters, each '.', 'X' or '#'")]
    Table {
        /// Whose table.
        engine: Engine,
        /// Of what.
        probe: Probe,
        /// The number of endpoints.
        size: usize,
    },
    /// There is nothing in it to compare with.
    #[error("holds no table")]
    Empty,
}

impl Expectation {
    /// Reads the JSON form.
    ///
    /// # Errors
    /// The text is not such JSON, is inconsistent, or holds nothing to compare.
    pub fn parse(text: &str) -> Result<Self, ExpectationError> {
        fn known<T: std::str::FromStr<Err: fmt::Display>>(text: &str) -> Result<T, ExpectationError> {
            text.parse().map_err(|reason: T::Err| ExpectationError::Unknown {
                text: text.to_owned(),
                reason: reason.to_string(),
            })
        }
        let Read { probes, endpoints, engines: read } = serde_json::from_str(text)?;
        let probes = probes.iter().map(|probe| known(probe)).collect::<Result<_, _>>()?;
        let size = endpoints.len();
        let mut engines = BTreeMap::new();
        for (engine, tables) in read {
            let engine: Engine = known(&engine)?;
            let mut parsed = BTreeMap::new();
            for (probe, rows) in tables {
                let probe: Probe = known(&probe)?;
                let row = |row: &String| row.chars().map(Cell::of).collect::<Option<Vec<Cell>>>();
                let rows: Option<Rows> = rows.iter().map(row).collect();
                let rows = rows.filter(|rows| rows.len() == size && rows.iter().all(|row| row.len() == size));
                parsed.insert(probe, rows.ok_or(ExpectationError::Table { engine, probe, size })?);
            }
            engines.insert(engine, parsed);
        }
        if engines.values().all(BTreeMap::is_empty) {
            return Err(ExpectationError::Empty);
        }
        Ok(Self { endpoints, probes, engines })
    }

    /// Where the matrix differs, with the oracle's reasons: cells, endpoints that only one of the two has, tables of the
    /// expectation that nothing was compared with. An engine that the expectation does not hold is compared with its
    /// first.
    pub fn compare(&self, matrix: &Matrix, world: &World) -> Vec<Difference> {
        let mut differences = Vec::new();
        let places: Vec<Option<usize>> =
            self.endpoints.iter().map(|name| matrix.endpoints.iter().position(|e| e.name == *name)).collect();
        for (name, place) in self.endpoints.iter().zip(&places) {
            if place.is_none() {
                differences.push(Difference::Missing { endpoint: name.clone() });
            }
        }
        for endpoint in matrix.endpoints.iter().filter(|endpoint| !self.endpoints.contains(&endpoint.name)) {
            differences.push(Difference::New { endpoint: endpoint.name.clone() });
        }
        let mut compared = BTreeSet::new();
        for (engine, tables) in &matrix.engines {
            let held = self.engines.get_key_value(engine).or_else(|| self.engines.first_key_value());
            let Some((held, expected)) = held else { continue };
            for (probe, expected) in expected {
                let Some(rows) = tables.get(probe) else { continue };
                compared.insert((*held, *probe));
                for (row, from) in expected.iter().zip(&places) {
                    for (expected, to) in row.iter().zip(&places) {
                        let (Some(from), Some(to)) = (*from, *to) else { continue };
                        let observed = rows[from][to];
                        if observed == *expected {
                            continue;
                        }
                        let (source, destination) = (&matrix.endpoints[from], &matrix.endpoints[to]);
                        let (flow, verdict) = verdict(world, *probe, source.address, destination.address);
                        differences.push(Difference::Cell {
                            engine: *engine,
                            probe: *probe,
                            source: source.name.clone(),
                            destination: destination.name.clone(),
                            expected: *expected,
                            observed,
                            reason: verdict.explain_as(&source.name, &destination.name, flow.transport),
                        });
                    }
                }
            }
        }
        let held =
            self.engines.iter().flat_map(|(engine, tables)| tables.keys().map(|probe| (*engine, *probe)));
        let uncompared = held.filter(|table| !compared.contains(table));
        differences.extend(uncompared.map(|(engine, probe)| Difference::Unevaluated { engine, probe }));
        differences
    }
}

/// One thing that is not as expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// An endpoint that is not there.
    Missing {
        /// Its name.
        endpoint: String,
    },
    /// An endpoint that the file does not have.
    New {
        /// Its name.
        endpoint: String,
    },
    /// A table of the file that nothing was compared with: its probe, or its engine, was not evaluated.
    Unevaluated {
        /// Whose table.
        engine: Engine,
        /// Of what.
        probe: Probe,
    },
    /// Another verdict.
    Cell {
        /// Whose.
        engine: Engine,
        /// On what.
        probe: Probe,
        /// From whom.
        source: String,
        /// To whom.
        destination: String,
        /// The verdict that the file has.
        expected: Cell,
        /// The engine's.
        observed: Cell,
        /// The oracle's reasons for its own.
        reason: String,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { endpoint } => write!(f, "{endpoint}: expected, and not there"),
            Self::New { endpoint } => {
                write!(f, "{endpoint}: there, and not expected: the file does not name it")
            }
            Self::Unevaluated { engine, probe } => {
                write!(
                    f,
                    "table {engine} {probe}: expected, and not evaluated: --engine or --probe leaves it out"
                )
            }
            Self::Cell { engine, probe, source, destination, expected, observed, reason } => {
                let (expected, observed) = (expected.symbol(), observed.symbol());
                write!(
                    f,
                    "{source} -> {destination} {probe}: expected {expected}, {engine} says {observed} ({reason})"
                )
            }
        }
    }
}
