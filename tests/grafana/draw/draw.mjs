// Draws every panel of the dashboards for Prometheus in headless Chromium, from figures that a real Prometheus gave.
//
//     node draw.mjs DEPLOY FIGURES OUTPUT    the directory deploy/, what `dashboards` has written, where the pictures go
//
// Exits with 1 when a panel can't be drawn, or draws nothing although it has data.

import { createServer } from 'node:http';
import { existsSync, mkdirSync, readFileSync, readdirSync, statSync, writeFileSync } from 'node:fs';
import { extname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { build } from 'esbuild';
import puppeteer from 'puppeteer-core';

const [deploy, figuresFile, output] = process.argv.slice(2);
if (!output) {
  console.error('usage: node draw.mjs DEPLOY FIGURES OUTPUT');
  process.exit(2);
}
const WIDTH = 1280;
/** Milliseconds that a busy machine may take for anything. */
const PATIENCE = 180_000;
const here = fileURLToPath(new URL('.', import.meta.url)).replace(/\/$/, '');
const { from, to, step, dashboards } = JSON.parse(readFileSync(figuresFile, 'utf8'));
mkdirSync(output, { recursive: true });

await build({
  entryPoints: [join(here, 'page.jsx')],
  outfile: join(here, 'built/page.js'),
  bundle: true,
  jsx: 'automatic',
  loader: { '.ttf': 'empty', '.woff': 'empty', '.woff2': 'empty', '.svg': 'empty' },
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  logLevel: 'error',
});

// Icons are asked for over HTTP.
const TYPES = { '.js': 'text/javascript', '.css': 'text/css', '.svg': 'image/svg+xml', '.json': 'application/json' };
let page = '';
const server = createServer((request, response) => {
  const path = new URL(request.url, 'http://localhost').pathname;
  const icon = join(here, 'node_modules/@grafana/ui/dist/public', path.replace(/^.*?public\/(build\/)?/, ''));
  if (path === '/') {
    response.setHeader('content-type', 'text/html');
    response.end(page);
  } else if (/^\/page\.(js|css)$/.test(path) && existsSync(join(here, 'built', path))) {
    response.setHeader('content-type', TYPES[extname(path)]);
    response.end(readFileSync(join(here, 'built', path)));
  } else if (!path.includes('..') && existsSync(icon) && statSync(icon).isFile()) {
    response.setHeader('content-type', TYPES[extname(path)] ?? 'application/octet-stream');
    response.end(readFileSync(icon));
  } else {
    response.statusCode = 404;
    response.end();
  }
});
await new Promise((listening) => server.listen(0, '127.0.0.1', listening));
const address = `http://127.0.0.1:${server.address().port}/`;

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  pipe: true,
  protocolTimeout: PATIENCE,
  timeout: PATIENCE,
  // The tree's tests run as root, where Chromium has no sandbox; the page is ours.
  args: ['--no-sandbox', '--hide-scrollbars', '--disable-gpu', '--force-color-profile=srgb'],
});
const complaints = [];
let panels = 0;
for (const [name, figures] of Object.entries(dashboards)) {
  const dashboard = JSON.parse(readFileSync(join(deploy, 'grafana', name), 'utf8'));
  const height = 38 * Math.max(...dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h)) + 8;
  for (const colours of ['light', 'dark']) {
    const drawing = JSON.stringify({ dashboard, figures, from, to, step, colours }).replaceAll('<', '\\u003c');
    page = `<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="page.css"><body style="margin:0"><div id="root"></div>
<script>window.drawing = ${drawing}; window.__grafana_public_path__ = '/public/';</script><script src="page.js"></script>`;
    const tab = await browser.newPage();
    const said = [];
    tab.on('pageerror', (error) => said.push(`${error.stack ?? error}`));
    tab.on('console', (message) => message.type() === 'error' && process.env.VERBOSE && console.error(message.text()));
    await tab.setViewport({ width: WIDTH, height });
    await tab.goto(address, { waitUntil: 'load', timeout: PATIENCE });
    const report = await settled(tab, dashboard.panels.filter(({ type }) => type !== 'row'));
    await tab.screenshot({ path: join(output, `${name.replace('.json', '')}-${colours}.png`) });
    for (const panel of report) {
      const where = `${name}: ${panel.title} (${colours})`;
      if (panel.error) {
        complaints.push(`${where}: ${panel.error}`);
      } else if (panel.points > 0 && panel.coloured === 0) {
        complaints.push(`${where}: ${panel.points} points of ${panel.series} series, and nothing is drawn`);
      } else if (panel.points === 0) {
        console.log(`${where}: no data in this run`);
      }
    }
    complaints.push(...said.map((error) => `${name}: ${error}`));
    panels += report.length;
    writeFileSync(join(output, `${name.replace('.json', '')}-${colours}.report.json`), JSON.stringify(report, null, 2));
    await tab.close();
  }
}
await browser.close();
server.close();
if (panels === 0) {
  complaints.push('nothing was drawn');
}
complaints.forEach((complaint) => console.error(complaint));
console.log(`${panels} pictures of panels, in light and in dark: ${output}`);
process.exit(complaints.length === 0 ? 0 : 1);

/** What each panel says of itself once all are drawn, with `coloured`: pixels of its graph, or numbers and words for numbers, that are there. */
async function settled(tab, panels) {
  await tab.waitForFunction((count) => window.report?.length === count, { timeout: PATIENCE }, panels.length);
  const words = Object.fromEntries(
    panels.map(({ id, fieldConfig }) => [id, (fieldConfig.defaults.mappings ?? []).flatMap(({ options }) => Object.values(options).map(({ text }) => text))]),
  );
  // Graphs and tables measure themselves first.
  await new Promise((done) => setTimeout(done, 3000));
  return tab.evaluate((words) =>
    window.report.map((panel) => {
      const element = document.getElementById(`panel-${panel.id}`);
      if (!element) {
        return { ...panel, error: panel.error ?? 'it is not on the page' };
      }
      const canvases = [...element.querySelectorAll('canvas')];
      const drawn = (canvas) => {
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let pixels = 0;
        for (let at = 0; at < data.length; at += 4) {
          const most = Math.max(data[at], data[at + 1], data[at + 2]);
          const least = Math.min(data[at], data[at + 1], data[at + 2]);
          pixels += data[at + 3] > 40 && most - least > 40 ? 1 : 0;
        }
        return pixels;
      };
      const text = [...element.querySelectorAll('*')].filter(({ children }) => children.length === 0).map(({ textContent }) => textContent).join(' ');
      const graph = panel.type === 'timeseries';
      const rest = text.replace(panel.title, '');
      const said = /\d/.test(rest) || words[panel.id].some((word) => rest.includes(word));
      return { ...panel, coloured: graph ? canvases.reduce((sum, canvas) => sum + drawn(canvas), 0) : said ? 1 : 0, text: text.slice(0, 400) };
    }),
    words,
  );
}
