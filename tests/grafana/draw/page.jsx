// Draws a dashboard with Grafana's own components: the page that `draw.mjs` opens and takes pictures of.
//
// What is Grafana's: fields' options and overrides, names, units, colours, transformations, graphs, legends, tables, numbers,
// panels' frames. What is ours: the arrangement on the page, the defaults in `options.mjs`, and the frames in `frames.mjs`.

import {
  applyFieldOverrides,
  cacheFieldDisplayNames,
  createTheme,
  dateTime,
  EventBusSrv,
  getDisplayProcessor,
  getDisplayValueAlignmentFactors,
  getFieldDisplayValues,
  standardTransformers,
  standardTransformersRegistry,
  ThemeContext,
  transformDataFrame,
} from '@grafana/data';
import { BarGauge, BigValue, GlobalStyles, PanelChrome, PanelContextProvider, TimeSeries, VizRepeater } from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import { Component, useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { lastValueFrom } from 'rxjs';

import { frames } from './frames.mjs';
import { REGISTRIES, withDefaults } from './options.mjs';

const { dashboard, figures, from, to, step, colours } = window.drawing;
const theme = createTheme({ colors: { mode: colours } });
const timeRange = { from: dateTime(from * 1000), to: dateTime(to * 1000), raw: { from: dateTime(from * 1000), to: dateTime(to * 1000) } };
const replaceVariables = (text) => text;
const transformers = new Map(Object.values(standardTransformers).map((it) => [it.id, { id: it.id, name: it.name, transformation: async () => it }]));
standardTransformersRegistry.setInit(() => [...transformers.values()]);

/** Grafana's grid: 24 columns, rows of 30 pixels, 8 between. */
const GAP = 8;
const WIDTH = document.documentElement.clientWidth - 2 * GAP;
const place = ({ x, y, w, h }) => ({
  left: Math.round((x * (WIDTH + GAP)) / 24),
  top: y * 38,
  width: Math.round((w * (WIDTH + GAP)) / 24) - GAP,
  height: h * 38 - GAP,
});

const report = [];
window.report = report;

function fields(panel, data) {
  const fieldConfig = withDefaults(panel);
  const done = applyFieldOverrides({ data, fieldConfig, fieldConfigRegistry: REGISTRIES[panel.type], replaceVariables, theme, timeZone: 'utc' });
  cacheFieldDisplayNames(done);
  return done;
}

function Viz({ panel, data, width, height }) {
  if (data.every((frame) => frame.length === 0)) {
    const style = { height, display: 'flex', alignItems: 'center', justifyContent: 'center', color: theme.colors.text.secondary };
    return <div style={style}>{panel.fieldConfig.defaults.noValue ?? 'No data'}</div>;
  }
  const { options } = panel;
  switch (panel.type) {
    case 'timeseries':
      return <TimeSeries frames={data} timeRange={timeRange} timeZone="utc" width={width} height={height} legend={options.legend} options={options} />;
    case 'table':
      return <TableNG data={data[0]} width={width} height={height} timeRange={timeRange} showHeader cellHeight={options.cellHeight} initialSortBy={options.sortBy} enableSharedCrosshair={false} />;
    case 'stat':
    case 'bargauge':
      return <Numbers panel={panel} data={data} width={width} height={height} />;
    default:
      throw new Error(`no way to draw a ${panel.type}`);
  }
}

function Numbers({ panel, data, width, height }) {
  const { options } = panel;
  const getValues = () =>
    getFieldDisplayValues({ data, fieldConfig: withDefaults(panel), reduceOptions: options.reduceOptions, replaceVariables, theme, timeZone: 'utc' });
  const count = getValues().length;
  const bar = ({ value, width, height, orientation, alignmentFactors }) => (
    <BarGauge
      {...{ width, height, orientation, alignmentFactors, theme }}
      text={options.text}
      value={value.display}
      field={value.field}
      display={getDisplayProcessor({ field: { type: 'number', config: value.field }, theme })}
      displayMode={options.displayMode}
      valueDisplayMode={options.valueMode}
      namePlacement={options.namePlacement}
      showUnfilled={options.showUnfilled}
    />
  );
  const big = ({ value, width, height, alignmentFactors }) => (
    <BigValue
      {...{ width, height, alignmentFactors, theme, count }}
      text={options.text}
      value={value.display}
      colorMode={options.colorMode}
      graphMode={options.graphMode}
      justifyMode={options.justifyMode}
      textMode={options.textMode}
    />
  );
  return (
    <VizRepeater
      {...{ width, height, getValues }}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={panel.type === 'stat' ? big : bar}
      source={data}
      autoGrid={panel.type === 'stat'}
      renderCounter={1}
      orientation={options.orientation}
      itemSpacing={panel.type === 'stat' ? 3 : 8}
      minVizHeight={options.minVizHeight}
      maxVizHeight={options.maxVizHeight}
    />
  );
}

/** Tells of a panel that can't be drawn, and leaves the others. */
class Guard extends Component {
  state = {};

  static getDerivedStateFromError(error) {
    return { error };
  }

  componentDidCatch(error) {
    this.props.entry.error = `${error.stack ?? error}`;
  }

  render() {
    return this.state.error ? <pre>{`${this.state.error}`}</pre> : this.props.children;
  }
}

function Panel({ panel }) {
  const [data, setData] = useState();
  const [entry] = useState(() => ({ id: panel.id, title: panel.title, type: panel.type, queries: panel.targets.length }));
  useEffect(() => {
    report.push(entry);
    const found = panel.targets.flatMap((target) => frames(target, figures[panel.id]?.[target.refId] ?? [], step));
    entry.series = found.reduce((sum, frame) => sum + (frame.length > 0 ? 1 : 0), 0);
    entry.points = found.reduce((sum, frame) => sum + frame.length, 0);
    lastValueFrom(transformDataFrame(panel.transformations ?? [], found)).then(
      (transformed) => setData(fields(panel, transformed)),
      (error) => (entry.error = `${error}`),
    );
  }, []);
  const box = place(panel.gridPos);
  return (
    <div id={`panel-${panel.id}`} style={{ position: 'absolute', ...box }}>
      <Guard entry={entry}>
        <PanelChrome title={panel.title} description={panel.description} width={box.width} height={box.height}>
          {(width, height) => data && <Viz {...{ panel, data, width, height }} />}
        </PanelChrome>
      </Guard>
    </div>
  );
}

function Row({ row }) {
  return <div style={{ position: 'absolute', ...place(row.gridPos), fontSize: 16, fontWeight: 500 }}>{row.title}</div>;
}

function Dashboard() {
  const [context] = useState(() => ({ eventsScope: 'global', eventBus: new EventBusSrv(), sync: () => 0, onToggleSeriesVisibility: () => {} }));
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <PanelContextProvider value={context}>
        <div style={{ position: 'relative', margin: GAP, color: theme.colors.text.primary }}>
          {dashboard.panels.map((panel) => (panel.type === 'row' ? <Row key={panel.id} row={panel} /> : <Panel key={panel.id} panel={panel} />))}
        </div>
      </PanelContextProvider>
    </ThemeContext.Provider>
  );
}

document.body.style.background = theme.colors.background.canvas;
createRoot(document.getElementById('root')).render(<Dashboard />);
