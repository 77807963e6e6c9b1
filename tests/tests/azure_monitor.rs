//! What is shipped for Azure Monitor speaks of metrics and labels that exist, and its ConfigMap of the documented settings.
//! (Whether its queries are KQL is checked by `cargo xtask dashboards --check`.)
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

fn read(name: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

/// Every metric of docs/metrics.md with its labels, those that are of Prometheus' making included.
fn documented() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let mut metrics = BTreeMap::new();
    for line in read("docs/metrics.md")?.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", name, kind, labels, ..] = cells.as_slice() else { continue };
        let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`')) else { continue };
        let quoted = |text: &str| -> BTreeSet<String> {
            text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
        };
        let labels = quoted(labels);
        let with = |more: &str| labels.iter().cloned().chain([more.to_owned()]).collect();
        match *kind {
            "summary" => {
                metrics.insert(name.to_owned(), with("quantile"));
                metrics.insert(format!("{name}_sum"), labels.clone());
                metrics.insert(format!("{name}_count"), labels);
            }
            "histogram" => {
                metrics.insert(format!("{name}_bucket"), with("le"));
                metrics.insert(format!("{name}_sum"), labels.clone());
                metrics.insert(format!("{name}_count"), labels);
            }
            "counter" | "gauge" => {
                metrics.insert(name.to_owned(), labels);
            }
            _ => {}
        }
    }
    ensure!(metrics.len() > 50, "docs/metrics.md lists {} metrics", metrics.len());
    Ok(metrics)
}

/// What Container insights adds to the labels: shared by all metrics.
const ADDED: [&str; 2] = ["hostName", "container.azm.ms/clusterName"];

/// Words of a query that are names of metrics, or that begin them.
fn metric_words(query: &str) -> BTreeSet<&str> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("npm_")).collect()
}

/// Keys of the JSON in the column Tags that a query asks for.
fn tag_keys(query: &str) -> BTreeSet<&str> {
    let mut keys = BTreeSet::new();
    for start in ["Labels", "parse_json(Tags)"] {
        for rest in query.split(start).skip(1) {
            if let Some(rest) = rest.strip_prefix('.') {
                let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
                keys.insert(&rest[..end]);
            } else if let Some(rest) = rest.strip_prefix("[\"") {
                keys.insert(rest.split('"').next().unwrap_or_default());
            }
        }
    }
    keys
}

/// What is wrong with a query's names.
fn complaints(query: &str, metrics: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let query: String = query.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let words = metric_words(&query);
    let mut complaints = Vec::new();
    let mut labels: BTreeSet<&str> = ADDED.into();
    for word in words {
        // `contains "npm_"` and `startswith "npm_add_policy"` ask for many.
        let begun = query.contains(&format!("contains \"{word}\""))
            || query.contains(&format!("startswith \"{word}\""));
        let of: Vec<_> =
            metrics.iter().filter(|(name, _)| *name == word || begun && name.starts_with(word)).collect();
        if of.is_empty() {
            complaints.push(format!("no metric {word}"));
        }
        labels.extend(of.iter().flat_map(|(_, labels)| labels.iter().map(String::as_str)));
    }
    let unknown = tag_keys(&query).into_iter().filter(|key| !labels.contains(key));
    complaints.extend(unknown.map(|key| format!("none of the metrics has a label {key}")));
    complaints
}

/// Every string of this key, however deep.
fn strings<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                found.extend(field.as_str().filter(|_| name == key));
                strings(field, key, found);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| strings(item, key, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn queries_name_metrics_and_labels_that_exist() -> Result<()> {
    let metrics = documented()?;
    let mut checked = 0;
    for name in ["deploy/azure-monitor/npm-agent.workbook", "deploy/grafana/azure-npm-log-analytics.json"] {
        let json: Value = serde_json::from_str(&read(name)?).with_context(|| name.to_owned())?;
        let mut queries = Vec::new();
        strings(&json, "query", &mut queries);
        for query in queries.iter().filter(|query| query.contains("InsightsMetrics")) {
            let complaints = complaints(query, &metrics);
            ensure!(complaints.is_empty(), "{name}: {complaints:?}: {query}");
            checked += 1;
        }
    }
    let name = "deploy/azure-monitor/queries.kql";
    for query in read(name)?.split("\n\n").filter(|query| query.contains("InsightsMetrics\n")) {
        let complaints = complaints(query, &metrics);
        ensure!(complaints.is_empty(), "{name}: {complaints:?}: {query}");
        checked += 1;
    }
    ensure!(checked >= 40, "{checked} queries");
    Ok(())
}

#[test]
fn a_name_that_does_not_exist_is_seen() -> Result<()> {
    let metrics = documented()?;
    let of = |query: &str| complaints(query, &metrics);
    let query = "InsightsMetrics | where Name == \"npm_num_policies\"";
    assert_eq!(of(query), Vec::<String>::new());
    assert_eq!(of(&query.replace("policies", "polices")), ["no metric npm_num_polices"]);
    assert_eq!(of("where Name startswith \"npm_such_\"").len(), 1);
    let asks = |label: &str| of(&format!("{query} | extend L = tostring(parse_json(Tags).{label})"));
    assert_eq!(asks("hostName"), Vec::<String>::new());
    assert_eq!(asks("backend"), ["none of the metrics has a label backend"]);
    let quantile = "where Name == \"npm_add_policy_exec_time\" | where Labels.quantile == 1 and Labels[\"had_error\"] == 1";
    assert_eq!(of(quantile), Vec::<String>::new());
    assert_eq!(
        of(&quantile.replace("_time\"", "_time_count\"")),
        ["none of the metrics has a label quantile"]
    );
    Ok(())
}

#[test]
fn the_config_map_has_the_documented_settings() -> Result<()> {
    let map: Value =
        serde_saphyr::from_str(&read("deploy/azure-monitor/container-azm-ms-agentconfig.yaml")?)?;
    ensure!(map["kind"] == "ConfigMap", "{map}");
    ensure!(map["metadata"]["name"] == "container-azm-ms-agentconfig", "{map}");
    ensure!(map["metadata"]["namespace"] == "kube-system", "{map}");
    ensure!(map["data"]["schema-version"] == "v1", "another format than Azure Monitor's agent takes: {map}");
    let settings = map["data"]["integrations"].as_str().context("no integrations")?;
    let lines = settings.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let wanted = [
        "[integrations.azure_network_policy_manager]",
        "collect_basic_metrics = true",
        "collect_advanced_metrics = false",
    ];
    ensure!(lines.eq(wanted), "{settings}");
    Ok(())
}
