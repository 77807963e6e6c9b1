//! The matrix as text for people.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets};

use super::{Engine, Matrix, Probe, Rows};

/// How many columns may carry names; more carry numbers.
const NAMED_COLUMNS: usize = 12;

pub(super) fn render(matrix: &Matrix) -> String {
    let mut text = String::new();
    if matrix.endpoints.is_empty() {
        return "no running pod has an address of this family, and no external was given\n".to_owned();
    }
    for (probes, engines, rows) in groups(matrix) {
        let probes = probes.iter().map(Probe::to_string).collect::<Vec<_>>().join(", ");
        let engines = match engines.as_slice() {
            [engine] => engine.to_string(),
            engines => {
                let names = engines.iter().map(|engine| engine.name()).collect::<Vec<_>>();
                format!("{} agree", names.join(", "))
            }
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{probes} ({engines}), from row to column\n{}\n", table(matrix, rows));
    }
    text.push_str(". allowed   X denied   # itself\n");
    text
}

/// Tables that are the same are printed once: for all engines that agree, and all probes that they agree on.
fn groups(matrix: &Matrix) -> Vec<(Vec<Probe>, Vec<Engine>, &Rows)> {
    let mut groups: Vec<(Vec<Probe>, Vec<Engine>, &Rows)> = Vec::new();
    for probe in &matrix.probes {
        let mut opinions: Vec<(Vec<Engine>, &Rows)> = Vec::new();
        for (engine, tables) in &matrix.engines {
            let Some(rows) = tables.get(probe) else { continue };
            match opinions.iter_mut().find(|(_, other)| *other == rows) {
                Some((engines, _)) => engines.push(*engine),
                None => opinions.push((vec![*engine], rows)),
            }
        }
        for (engines, rows) in opinions {
            match groups.iter_mut().find(|(_, others, other)| *others == engines && *other == rows) {
                Some((probes, ..)) => probes.push(*probe),
                None => groups.push((vec![*probe], engines, rows)),
            }
        }
    }
    groups
}

fn table(matrix: &Matrix, rows: &Rows) -> String {
    let numbered = matrix.endpoints.len() > NAMED_COLUMNS;
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let header = |(place, name): (usize, &str)| {
        if numbered { (place + 1).to_string() } else { name.replacen('/', "/\n", 1) }
    };
    let names = matrix.endpoints.iter().map(|endpoint| endpoint.name.as_str());
    table.set_header(std::iter::once(String::new()).chain(names.clone().enumerate().map(header)));
    for ((place, name), row) in names.enumerate().zip(rows) {
        let label = if numbered { format!("{:>3} {name}", place + 1) } else { name.to_owned() };
        let cells = row.iter().map(|cell| cell.symbol().to_string());
        table.add_row(std::iter::once(label).chain(cells));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(if numbered { CellAlignment::Right } else { CellAlignment::Center });
    }
    table.trim_fmt()
}
