// An Azure workbook: the parts of its format that we use. Microsoft's schema of it leaves nearly everything open; kinds and
// numbers are those that its published workbooks use.

type Resource = 'microsoft.containerservice/managedclusters' | 'microsoft.operationalinsights/workspaces';

interface Asks {
  query: string;
  /** 0: logs. */
  queryType: 0;
  resourceType: Resource;
}

interface Visible {
  conditionalVisibility?: { parameterName: string; comparison: 'isEqualTo'; value: string };
}

interface Text extends Visible {
  type: 1;
  name: string;
  content: { json: string; style?: 'info' };
}

type Parameter = { id: string; version: 'KqlParameterItem/1.0'; name: string; label?: string; description?: string } & (
  | { type: 4; isRequired: true; value: { durationMs: number }; typeSettings: { selectableValues: { durationMs: number }[]; allowCustom: boolean } }
  | ({ type: 1; isHiddenWhenLocked: true } & Asks)
  | ({
      type: 2;
      isRequired: true;
      multiSelect: true;
      quote: "'";
      delimiter: ',';
      value: ['value::all'];
      typeSettings: { additionalResourceOptions: ['value::all']; showDefault: false };
      timeContextFromParameter: string;
    } & Asks)
);

interface Parameters extends Visible {
  type: 9;
  name: string;
  content: { version: 'KqlParameterItem/1.0'; style: 'above' | 'pills'; parameters: Parameter[] } & Omit<Asks, 'query'>;
}

/** 1: text, 8: heat map, 12: big number. */
interface Formatter {
  columnMatch: string;
  formatter: 1 | 8 | 12;
  formatOptions?: { min?: number; max?: number; palette: string };
  numberFormat?: { unit: number; options: { style: 'decimal'; maximumFractionDigits?: number } };
}

type Time = { timeContext: { durationMs: number } } | { timeContextFromParameter: string };

type Query = Visible & {
  type: 3;
  name: string;
  customWidth?: string;
  showPin?: boolean;
  styleSettings?: { showBorder: boolean };
  content: { version: 'KqlItem/1.0'; size: 0 | 1 | 3 | 4; title: string; noDataMessage: string } & Asks &
    Time &
    (
      | { visualization: 'tiles'; tileSettings: { titleContent?: Formatter; leftContent: Formatter; showBorder: boolean; sortCriteriaField?: string; sortOrderField?: 1 | 2; size: 'auto' } }
      | { visualization: 'table'; gridSettings: { formatters: Formatter[]; filter: boolean; rowLimit: number } }
      | {
          visualization: 'timechart';
          /** 0: the largest of a bin stays, as drawn. */
          aggregation: 0 | 1 | 2 | 3 | 4 | 5;
          showAnalytics: boolean;
          /** Units: 17 counts, 23 milliseconds. */
          chartSettings: { ySettings: { numberFormatSettings: { unit: 17 | 23; options: { style: 'decimal' } } } };
        }
    );
};

interface Tabs extends Visible {
  type: 11;
  name: string;
  content: {
    version: 'LinkItem/1.0';
    style: 'tabs';
    links: { id: string; cellValue: string; linkTarget: 'parameter'; linkLabel: string; subTarget: string; style: 'link'; preText?: string }[];
  };
}

interface Group extends Visible {
  type: 12;
  name: string;
  content: { version: 'NotebookGroup/1.0'; groupType: 'editable'; items: Item[] };
}

type Item = Text | Parameters | Query | Tabs | Group;

export interface Workbook {
  version: 'Notebook/1.0';
  items: Item[];
  fallbackResourceIds?: string[];
  $schema: string;
}
