// The KQL of dashboards, workbooks and files, and what Microsoft's own parser says of it.

import { createRequire } from 'node:module';

// Scripts of another age: they leave their names in the global object.
const require = createRequire(import.meta.url);
require('@kusto/language-service-next/bridge.min.js');
require('@kusto/language-service-next/Kusto.Language.Bridge.min.js');
const { GlobalState, KustoCode, Symbols } = globalThis.Kusto.Language;

/** The columns of the table that Container Insights writes Prometheus metrics to. */
const COLUMNS = {
  TimeGenerated: 'datetime',
  Computer: 'string',
  Origin: 'string',
  Namespace: 'string',
  Name: 'string',
  Val: 'real',
  Tags: 'string',
  AgentId: 'string',
  SourceSystem: 'string',
  TenantId: 'string',
  Type: 'string',
  _ResourceId: 'string',
};

const schema = Object.entries(COLUMNS).map(([name, type]) => `${name}: ${type}`).join(', ');
const table = new Symbols.TableSymbol.$ctor7('InsightsMetrics', `(${schema})`, null);
const database = new Symbols.DatabaseSymbol.ctor('logs', [table]);
const GLOBALS = GlobalState.Default.WithDatabase(database);

/** Errors of syntax and of meaning: names, columns, functions and types that do not exist or do not fit. */
export function complaintsAboutKql(where, text) {
  const code = KustoCode.ParseAndAnalyze(substituted(text), GLOBALS);
  const found = code.GetDiagnostics();
  return Array.from({ length: found.Count }, (_, index) => found.getItem(index))
    .filter(({ Severity }) => Severity !== 'Suggestion')
    .map(({ Message, Start, Length }) => `${where}: ${Message}: ${substituted(text).slice(Start, Start + Length)}: in\n${text}`);
}

/** The query with something for each variable, of the kind that Azure or Grafana puts there. */
function substituted(text) {
  const values = [
    ['$__timeFilter(TimeGenerated)', 'TimeGenerated between (ago(1h) .. now())'],
    ['$__timeFilter()', 'TimeGenerated between (ago(1h) .. now())'],
    ['$__interval', '1m'],
    ['{timeRange:start}', 'ago(1h)'],
    ['{timeRange:end}', 'now()'],
    ['{timeRange:grain}', '1m'],
    ['{timeRange}', 'between (ago(1h) .. now())'],
    ['{hostName}', "'a','b'"],
    ['{quantiles}', "'0.5','0.9'"],
    ['{backends}', "'iptables','ebpf'"],
    ['$cluster', "'c'"],
    ['$node', "'a','b'"],
    ['$quantile', "'0.5','0.9'"],
    ['$backend', "'iptables','ebpf'"],
  ];
  const done = values.reduce((text, [name, value]) => text.replaceAll(name, value), text);
  const left = done.match(/\$\w+|\{\w+(:\w+)?\}/);
  if (left) {
    throw new Error(`an unknown variable ${left[0]} in\n${text}`);
  }
  return done;
}

/** Every query of a dashboard's panels and variables. */
export function kqlOfDashboard(name, dashboard) {
  const panels = (list) => list.flatMap((panel) => [panel, ...panels(panel.panels ?? [])]);
  const ofPanels = panels(dashboard.panels).flatMap((panel) =>
    (panel.targets ?? []).map((target) => ({ where: `${name}: ${panel.title}`, text: target.azureLogAnalytics?.query })),
  );
  const ofVariables = dashboard.templating.list.map((variable) => ({
    where: `${name}: $${variable.name}`,
    text: variable.query?.azureLogAnalytics?.query,
  }));
  return [...ofPanels, ...ofVariables].filter(({ text }) => text !== undefined);
}

/** Every query of a workbook's items and parameters. */
export function kqlOfWorkbook(name, workbook) {
  const items = (list) => list.flatMap((item) => [item, ...items(item.content?.items ?? [])]);
  return items(workbook.items).flatMap((item) => {
    const parameters = (item.content.parameters ?? []).map((parameter) => ({ where: `${name}: ${parameter.name}`, text: parameter.query }));
    return [{ where: `${name}: ${item.name}`, text: item.content.query }, ...parameters].filter(({ text }) => text !== undefined);
  });
}

/** The queries of a file, with empty lines between them. */
export function kqlOfFile(name, text) {
  const queries = text.split(/\n\s*\n/).filter((part) => /^[^/\s]/m.test(part));
  return queries.map((text, index) => ({ where: `${name}: query ${index + 1}`, text }));
}
