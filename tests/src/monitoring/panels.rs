//! The queries of Grafana dashboards, with their variables as Grafana would fill them in.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

/// One query of a panel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// The panel's number: unique in its dashboard.
    pub panel: u64,
    /// The panel's title.
    pub title: String,
    /// The query's letter: unique in its panel.
    pub letter: String,
    /// The expression, with variables.
    pub expression: String,
    /// The series' names, with labels in double braces.
    pub legend: String,
    /// Whether it asks for now alone, and not for a range.
    pub instant: bool,
}

/// The data source of dashboards for Azure Monitor. Their queries are no PromQL.
const LOG_ANALYTICS: &str = "grafana-azure-monitor-datasource";

/// The dashboards of a directory, (file name, content), in the order of names. Those for Log Analytics are left out.
///
/// # Errors
/// The directory can't be read, or a file is no JSON.
pub fn dashboards(directory: &Path) -> Result<Vec<(String, Value)>> {
    let entries = std::fs::read_dir(directory).context("listing the dashboards")?;
    let paths: Result<Vec<PathBuf>, _> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut found = Vec::new();
    for path in paths.context("listing the dashboards")? {
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let dashboard: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let name = path.file_name().context("a file has a name")?.to_string_lossy().into_owned();
        if sources(&dashboard).all(|source| source != LOG_ANALYTICS) {
            found.push((name, dashboard));
        }
    }
    found.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(found)
}

/// The kinds of data source that a dashboard lets one choose.
fn sources(dashboard: &Value) -> impl Iterator<Item = &str> {
    let variables = dashboard["templating"]["list"].as_array().into_iter().flatten();
    variables.filter(|variable| variable["type"] == "datasource").filter_map(|it| it["query"].as_str())
}

/// Every query of a dashboard, those of panels in collapsed rows included.
pub fn queries(dashboard: &Value) -> Vec<Query> {
    let mut found = Vec::new();
    for panel in dashboard["panels"].as_array().into_iter().flatten() {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        for target in panel["targets"].as_array().into_iter().flatten() {
            found.push(Query {
                panel: panel["id"].as_u64().unwrap_or_default(),
                title: text(&panel["title"]),
                letter: text(&target["refId"]),
                expression: text(&target["expr"]),
                legend: text(&target["legendFormat"]),
                instant: target["instant"].as_bool().unwrap_or_default(),
            });
        }
        found.extend(queries(panel));
    }
    found
}

/// The expression with everything chosen, and rates over `rate_interval`.
///
/// # Panics
/// There is a variable that nobody knows.
pub fn substituted(expression: &str, rate_interval: &str) -> String {
    let mut text = expression.replace("$__rate_interval", rate_interval);
    for variable in ["$cluster", "$node", "$backend", "$quantile"] {
        text = text.replace(variable, ".*");
    }
    assert!(!text.contains('$'), "an unknown variable: {expression}");
    text
}
