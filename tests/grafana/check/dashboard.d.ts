// A dashboard as Grafana's own types have it, with the options and queries of the kinds of panels that we use.

import type {
  Dashboard as AnyDashboard,
  DataQuery,
  Panel as AnyPanel,
  RowPanel,
  VariableModel,
} from '@grafana/schema';
import type { AzureMonitorQuery } from '@grafana/schema/dist/esm/raw/composable/azuremonitor/dataquery/x/AzureMonitorDataQuery_types.gen';
import type { Options as BarGauge } from '@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type { Options as Stat } from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type {
  FieldConfig as TableField,
  Options as Table,
} from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type {
  FieldConfig as SeriesField,
  Options as Series,
} from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

/** JSON holds the values of enums, not their names. */
type Plain<T> = T extends string
  ? `${T}`
  : T extends number | boolean | null | undefined
    ? T
    : T extends Array<infer U>
      ? Array<Plain<U>>
      : T extends object
        ? { [K in keyof T]: Plain<T[K]> }
        : T;

/** The package does not have Prometheus' query: these are its fields that we use. */
interface PrometheusQuery extends DataQuery {
  expr: string;
  legendFormat: string;
  range: boolean;
  instant: boolean;
  editorMode: 'code';
  format?: 'table' | 'time_series';
}

type Kind<Type extends string, Options, Custom> = Omit<AnyPanel, 'type' | 'options' | 'fieldConfig' | 'targets'> & {
  type: Type;
  title: string;
  /** An operator reads it beside the title. */
  description: string;
  options: Partial<Options>;
  targets: PrometheusQuery[] | AzureMonitorQuery[];
  fieldConfig: Omit<NonNullable<AnyPanel['fieldConfig']>, 'defaults'> & {
    defaults: Omit<NonNullable<AnyPanel['fieldConfig']>['defaults'], 'custom'> & { unit: string; custom?: Partial<Custom> };
  };
};

type Panel =
  | Kind<'bargauge', BarGauge, Record<string, never>>
  | Kind<'stat', Stat, Record<string, never>>
  | Kind<'table', Table, TableField>
  | Kind<'timeseries', Series, SeriesField>;

type Variable = Omit<VariableModel, 'query'> & {
  query: string | { query: string; refId: string } | AzureMonitorQuery;
};

export type Dashboard = Plain<
  Omit<AnyDashboard, 'panels' | 'templating'> & {
    uid: string;
    title: string;
    description: string;
    templating: { list: Variable[] };
    panels: Array<Panel | (Omit<RowPanel, 'panels'> & { panels: Panel[] })>;
  }
>;
