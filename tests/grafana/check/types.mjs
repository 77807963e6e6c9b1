// Puts JSON into TypeScript as literals, so that the compiler tells of unknown and of ill-typed fields.

import { join } from 'node:path';

import ts from 'typescript';

const WRAPPERS = {
  dashboards: (value) => `import type { Dashboard } from './dashboard';\nexport const it: Dashboard = ${value};\n`,
  workbooks: (value) => `import type { Workbook } from './workbook';\nexport const it: Workbook = ${value};\n`,
};

const OPTIONS = {
  strict: true,
  noEmit: true,
  skipLibCheck: true,
  target: ts.ScriptTarget.ES2022,
  module: ts.ModuleKind.ESNext,
  moduleResolution: ts.ModuleResolutionKind.Bundler,
  lib: ['lib.es2022.d.ts'],
  types: [],
};

/** What the compiler says of dashboards and workbooks, (name, content) each. */
export function complaintsAboutTypes(directory, dashboards, workbooks) {
  const sources = new Map();
  const add = (kind, list) =>
    list.forEach(([name, value]) => sources.set(join(directory, `${name}.ts`), WRAPPERS[kind](JSON.stringify(value, null, 2))));
  add('dashboards', dashboards);
  add('workbooks', workbooks);
  const host = ts.createCompilerHost(OPTIONS);
  const { getSourceFile, fileExists, readFile } = host;
  host.fileExists = (name) => sources.has(name) || fileExists.call(host, name);
  host.readFile = (name) => sources.get(name) ?? readFile.call(host, name);
  host.getSourceFile = (name, ...rest) =>
    sources.has(name) ? ts.createSourceFile(name, sources.get(name), rest[0]) : getSourceFile.call(host, name, ...rest);
  const program = ts.createProgram([...sources.keys()], OPTIONS, host);
  return ts.getPreEmitDiagnostics(program).map((found) => {
    const text = ts.flattenDiagnosticMessageText(found.messageText, '\n  ');
    if (!found.file) {
      return text;
    }
    const { line } = found.file.getLineAndCharacterOfPosition(found.start);
    const source = found.file.text.split('\n')[line].trim();
    return `${found.file.fileName.replace(`${directory}/`, '')}: ${source}: ${text}`;
  });
}
