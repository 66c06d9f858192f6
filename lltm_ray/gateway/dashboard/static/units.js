/** Numbers for people, with their units; a dash for what is not known, which is never 0. */

export const NOTHING = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const isKnown = (value) => typeof value === "number" && Number.isFinite(value);
const told = (format) => (value) => (isKnown(value) ? format(value) : NOTHING);

/** Three digits, so that a figure keeps its width as it changes. */
function digits(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 99.95) return whole.format(value);
  return value.toFixed(size >= 9.995 ? 1 : 2);
}

export const count = told((value) => whole.format(value));
export const rate = told(digits);
export const percent = told((ratio) => `${(ratio * 100).toFixed(ratio >= 0.9995 || ratio === 0 ? 0 : 1)} %`);
export const watts = told((value) => `${whole.format(value)} W`);
export const celsius = told((value) => `${whole.format(value)} °C`);
export const cores = told((value) => `${value.toFixed(2)} cores`);
export const joules = told((value) => {
  if (value >= 9999.5) return `${digits(value / 1000)} kJ`;
  return value > 0 && value < 0.0995 ? `${digits(value * 1000)} mJ` : `${digits(value)} J`;
});
export const bytes = told((value) =>
  value >= 2 ** 29 ? `${digits(value / 2 ** 30)} GiB` : `${digits(value / 2 ** 20)} MiB`,
);

export const seconds = told((value) => {
  if (value < 0.9995) return `${value < 0.00995 ? (value * 1000).toFixed(1) : whole.format(value * 1000)} ms`;
  if (value < 119.5) return `${digits(value)} s`;
  const rounded = Math.round(value);
  return `${Math.floor(rounded / 60)} min ${rounded % 60} s`;
});

const times = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
export const clock = (unixNano) => times.format(new Date(unixNano / 1e6));
