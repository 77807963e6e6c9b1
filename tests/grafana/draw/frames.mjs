// Prometheus' answers as the data frames that Grafana's data source makes of them.

import { FieldType, toDataFrame } from '@grafana/data';

const named = (legend, labels) => legend.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => labels[label] ?? '');
/** What is no number is a gap in a graph. */
const finite = (text) => (Number.isFinite(Number(text)) ? Number(text) : null);

/** The frames of one query. `step`: seconds between points; a larger distance is a gap. */
export function frames(target, samples, step) {
  if (target.format === 'table') {
    return [asTable(target, samples)];
  }
  return samples.map((sample) => {
    const points = sample.values ?? [sample.value];
    const name = named(target.legendFormat, sample.metric);
    return toDataFrame({
      refId: target.refId,
      name,
      fields: [
        { name: 'Time', type: FieldType.time, config: { interval: step * 1000 }, values: points.map(([time]) => time * 1000) },
        {
          name: 'Value',
          type: FieldType.number,
          labels: sample.metric,
          config: { displayNameFromDS: name },
          values: points.map(([, value]) => finite(value)),
        },
      ],
    });
  });
}

function asTable(target, samples) {
  const labels = [...new Set(samples.flatMap(({ metric }) => Object.keys(metric)))].sort();
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, config: {}, values: samples.map(({ value }) => value[0] * 1000) },
      ...labels.map((label) => ({ name: label, type: FieldType.string, config: {}, values: samples.map(({ metric }) => metric[label] ?? '') })),
      { name: 'Value', type: FieldType.number, config: {}, values: samples.map(({ value }) => finite(value[1])) },
    ],
  });
}
