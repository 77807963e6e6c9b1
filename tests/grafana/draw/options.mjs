// What Grafana's panels take for granted where a dashboard says nothing, and how it applies a dashboard's field options.

import { identityOverrideProcessor, standardFieldConfigEditorRegistry, createFieldConfigRegistry } from '@grafana/data';

const item = (path) => ({
  id: path,
  path,
  name: path,
  process: identityOverrideProcessor,
  override: () => null,
  editor: () => null,
  shouldApply: () => true,
  settings: {},
});

const STANDARD = ['unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'thresholds', 'mappings', 'links', 'color', 'filterable'];
standardFieldConfigEditorRegistry.setInit(() => STANDARD.map(item));

/** Options of a kind of panel that dashboards may set for a field. */
const CUSTOM = {
  timeseries: [
    'drawStyle', 'lineInterpolation', 'lineWidth', 'lineStyle', 'fillOpacity', 'gradientMode', 'showPoints', 'pointSize', 'spanNulls',
    'axisPlacement', 'axisLabel', 'scaleDistribution', 'thresholdsStyle', 'stacking', 'hideFrom', 'barAlignment', 'axisColorMode',
    'axisCenteredZero', 'axisSoftMax', 'insertNulls',
  ],
  table: ['align', 'filterable', 'cellOptions', 'width', 'inspect', 'hidden'],
  stat: [],
  bargauge: [],
};

const registry = (kind) =>
  createFieldConfigRegistry(
    { useCustomConfig: (builder) => CUSTOM[kind].forEach((path) => builder.addCustomEditor({ ...item(path), defaultValue: undefined })) },
    kind,
  );
export const REGISTRIES = Object.fromEntries(Object.keys(CUSTOM).map((kind) => [kind, registry(kind)]));

// Grafana fills these in too. A number above 80 is red unless the dashboard says otherwise.
const THRESHOLDS = {
  mode: 'absolute',
  steps: [
    { color: 'green', value: -Infinity },
    { color: 'red', value: 80 },
  ],
};
const SERIES = {
  drawStyle: 'line',
  lineInterpolation: 'linear',
  lineWidth: 1,
  fillOpacity: 0,
  gradientMode: 'none',
  showPoints: 'auto',
  pointSize: 5,
  spanNulls: false,
  axisPlacement: 'auto',
  axisLabel: '',
  axisColorMode: 'text',
  axisCenteredZero: false,
  barAlignment: 0,
  scaleDistribution: { type: 'linear' },
  thresholdsStyle: { mode: 'off' },
  stacking: { mode: 'none', group: 'A' },
  hideFrom: { tooltip: false, viz: false, legend: false },
};

/** A panel's field options with what Grafana fills in. */
export function withDefaults(panel) {
  const { defaults, overrides } = panel.fieldConfig;
  const color = { mode: panel.type === 'timeseries' ? 'palette-classic' : 'thresholds' };
  const custom = { ...(panel.type === 'timeseries' ? SERIES : {}), ...defaults.custom };
  return { defaults: { color, thresholds: THRESHOLDS, mappings: [], ...defaults, custom }, overrides };
}
