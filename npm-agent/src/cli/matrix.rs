//! `npm-agent matrix`: who can talk to whom, from manifests alone.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use npm_policy::goal::Family;
use npm_policy::world::World;

use self::input::Input;
use crate::matrix::{self, Engine, Expectation, MOST_PICKED, Matrix, Probe, Request};
use crate::source::manifests;

mod input;

/// The exit status for a difference: from the expectation, or between engines.
const DIFFERENT: u8 = 1;

/// How many differences are shown one by one.
const SHOWN: usize = 100;

/// Evaluates manifests offline and prints who can talk to whom.
#[derive(Args, Clone, Debug)]
pub struct MatrixArgs {
    /// Kubernetes manifests (YAML or JSON): a file, a directory with *.yaml, *.yml and *.json to any depth, or - for
    /// standard input
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR", required = true)]
    pub files: Vec<PathBuf>,

    /// What to try: TCP/80, UDP/53, SCTP/9, ICMP [default: those of the file of --expect, else the ports that the
    /// policies and pods name, no more than 32 of them: the first, in the order TCP, UDP, SCTP and by number]
    #[arg(long = "probe", value_name = "PROBE", value_delimiter = ',')]
    pub probes: Vec<Probe>,

    /// A host outside the cluster, shown as ext/NAME; those of the other --family are left out
    #[arg(long = "external", value_name = "NAME=IP", value_parser = external)]
    pub externals: Vec<(String, IpAddr)>,

    /// The addresses to use: 4 or 6
    #[arg(long, value_enum, default_value = "4")]
    pub family: FamilyArg,

    /// Whom to ask: oracle, goal, iptables, ebpf [default: oracle; with --expect the engines of that file]
    ///
    /// ebpf asks this kernel, with a program that is loaded for the answer and attached to nothing: it needs root.
    #[arg(long = "engine", value_name = "ENGINE", value_delimiter = ',')]
    pub engines: Vec<Engine>,

    /// The form of the output
    #[arg(short = 'o', long = "output", value_enum, default_value = "table")]
    pub output: Output,

    /// What `-o json` wrote once: exits 1 if the table is another now, and shows what differs and why: a verdict, an
    /// endpoint that is gone or new, a table of the file that --probe or --engine leaves out. Probes and engines that
    /// the file does not have are no difference; an engine it does not have is compared with its first
    #[arg(long, value_name = "FILE")]
    pub expect: Option<PathBuf>,
}

/// An address family on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FamilyArg {
    /// IPv4.
    #[value(name = "4")]
    V4,
    /// IPv6.
    #[value(name = "6")]
    V6,
}

impl From<FamilyArg> for Family {
    fn from(family: FamilyArg) -> Self {
        match family {
            FamilyArg::V4 => Self::V4,
            FamilyArg::V6 => Self::V6,
        }
    }
}

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

fn external(text: &str) -> Result<(String, IpAddr), String> {
    let (name, address) = text.split_once('=').ok_or("not NAME=IP")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || !name.chars().all(plain) {
        return Err(format!("{name:?} is not a name of letters, digits, '-', '_' and '.'"));
    }
    let address: IpAddr = address.parse().map_err(|_unsaid| format!("{address:?} is not an IP address"))?;
    Ok((name.to_owned(), address.to_canonical()))
}

/// Runs the subcommand. Exits with 0; with 1 if the matrix is not as expected or the engines differ.
///
/// # Errors
/// Input that can't be read, or that asks for the impossible: the caller exits with 2.
pub fn run(args: &MatrixArgs) -> anyhow::Result<ExitCode> {
    let MatrixArgs { files, probes, externals, family, engines, output, expect } = args;
    let expectation = match expect {
        None => None,
        Some(path) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
            Some(Expectation::parse(&text).with_context(|| format!("reading {}", path.display()))?)
        }
    };
    let mut engines: BTreeSet<Engine> = engines.iter().copied().collect();
    let mut probes = probes.clone();
    if let Some(expectation) = &expectation {
        if engines.is_empty() {
            engines.extend(expectation.engines.keys());
        }
        if probes.is_empty() {
            probes.extend(expectation.engines.values().flat_map(|tables| tables.keys()));
        }
    }
    if engines.is_empty() {
        engines.insert(Engine::Oracle);
    }
    let world = read(files)?;
    let family = Family::from(*family);
    for (name, address) in externals.iter().filter(|(_, address)| Family::of(*address) != family) {
        eprintln!("ext/{name}: left out: {address} is not of the family that --family asks for");
    }
    if probes.is_empty() {
        probes = matrix::named_probes(&world);
        if let Some(first_left) = probes.get(MOST_PICKED) {
            let left = probes.len() - MOST_PICKED;
            eprintln!(
                "{left} of {} ports are not tried, from {first_left} on: name them with --probe",
                probes.len()
            );
            probes.truncate(MOST_PICKED);
        }
    }
    let request = Request { world, probes, externals: externals.clone(), family, engines };
    let matrix = matrix::evaluate(&request)?;
    let text = match output {
        Output::Table => matrix.to_table(),
        Output::Json => matrix.to_json() + "\n",
    };
    // A pager that was closed is no reason to fail, nor to panic as `print!` would.
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error).context("writing"),
        Ok(()) | Err(_) => {}
    }
    let mut differences = disagreements(&matrix, &request.world);
    if let Some(expectation) = &expectation {
        let found = expectation.compare(&matrix, &request.world);
        differences.extend(found.iter().map(ToString::to_string));
    }
    if differences.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    for difference in differences.iter().take(SHOWN) {
        eprintln!("{difference}");
    }
    if differences.len() > SHOWN {
        eprintln!("and {} more differences", differences.len() - SHOWN);
    }
    Ok(ExitCode::from(DIFFERENT))
}

/// Reads the manifests; what is wrong with them goes to stderr.
fn read(files: &[PathBuf]) -> anyhow::Result<World> {
    let input = Input::open(files)?;
    let reading = manifests::read(&input.paths);
    for problem in &reading.problems {
        eprintln!("{}: {}", input.called(&problem.object), input.called(&problem.message));
    }
    if !reading.unread.is_empty() {
        let paths =
            reading.unread.iter().map(|path| input.called(&path.display().to_string())).collect::<Vec<_>>();
        bail!("cannot read {}", paths.join(", "));
    }
    let mut world = World::default();
    for change in reading.changes {
        world.apply(change);
    }
    for address in world.contested() {
        let claimants = world.claimants(address).map(ToString::to_string).collect::<Vec<_>>().join(", ");
        eprintln!("{address}: claimed by {claimants}; the last holds it");
    }
    Ok(world)
}

/// Where the engines differ, for people.
fn disagreements(matrix: &Matrix, world: &World) -> Vec<String> {
    let lines = matrix.disagreements().into_iter().map(|(source, destination, probe)| {
        let (source, destination) = (&matrix.endpoints[source], &matrix.endpoints[destination]);
        let (_, verdict) = matrix::verdict(world, probe, source.address, destination.address);
        format!("{} -> {} {probe}: the engines differ (oracle: {verdict})", source.name, destination.name)
    });
    lines.collect()
}
