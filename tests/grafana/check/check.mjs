// Checks what is shipped for Grafana and Azure Monitor without either of them: the dashboards against Grafana's own types,
// every KQL query with Microsoft's parser and the columns that the table has.
//
//     node check.mjs DEPLOY    the directory deploy/ of the tree; exits with 1 when anything is wrong

import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { complaintsAboutKql, kqlOfDashboard, kqlOfFile, kqlOfWorkbook } from './kql.mjs';
import { complaintsAboutTypes } from './types.mjs';

const here = fileURLToPath(new URL('.', import.meta.url)).replace(/\/$/, '');
const deploy = process.argv[2];
if (!deploy) {
  console.error('usage: node check.mjs DEPLOY');
  process.exit(2);
}

const names = (directory, end) => readdirSync(join(deploy, directory)).filter((name) => name.endsWith(end)).sort();
const json = (directory, name) => JSON.parse(readFileSync(join(deploy, directory, name), 'utf8'));

const dashboards = names('grafana', '.json').map((name) => [name, json('grafana', name)]);
const workbooks = names('azure-monitor', '.workbook').map((name) => [name, json('azure-monitor', name)]);
const files = names('azure-monitor', '.kql').map((name) => [name, readFileSync(join(deploy, 'azure-monitor', name), 'utf8')]);

const queries = [
  ...dashboards.flatMap(([name, dashboard]) => kqlOfDashboard(name, dashboard)),
  ...workbooks.flatMap(([name, workbook]) => kqlOfWorkbook(name, workbook)),
  ...files.flatMap(([name, text]) => kqlOfFile(name, text)),
];
// What the compiler and the parser must say of mistakes: a check that finds nothing wrong anywhere is broken.
const planted = {
  dashboards: ['planted.json', { ...dashboards[0]?.[1], graphTooltip: 'yes' }],
  workbooks: ['planted.workbook', { version: 'Notebook/1.0', items: [{ type: 4 }] }],
};
const ofTypes = complaintsAboutTypes(here, [...dashboards, planted.dashboards], [...workbooks, planted.workbooks]);
const mistakes = [
  complaintsAboutKql('planted', 'InsightsMetrics | where Nome == "x"'),
  complaintsAboutKql('planted', 'InsightsMetrics | summarise count()'),
  ofTypes.filter((complaint) => complaint.startsWith(planted.dashboards[0])),
  ofTypes.filter((complaint) => complaint.startsWith(planted.workbooks[0])),
];
const complaints = [
  ...ofTypes.filter((complaint) => !complaint.startsWith('planted.')),
  ...queries.flatMap(({ where, text }) => complaintsAboutKql(where, text)),
];
if (mistakes.some((found) => found.length === 0)) {
  complaints.push('a planted mistake was not found: the check itself is broken');
}
for (const [what, list] of Object.entries({ dashboards, workbooks, queries })) {
  if (list.length === 0) {
    complaints.push(`no ${what}`);
  }
}

if (complaints.length > 0) {
  complaints.forEach((complaint) => console.error(complaint));
  process.exit(1);
}
console.log(`${dashboards.length} dashboards and ${workbooks.length} workbook have Grafana's and our types, ${queries.length} KQL queries parse`);
