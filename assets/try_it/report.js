// What was predicted and what was measured, as rows of the page's two tables.

import { WEIGHT_BYTES, weights } from "./predict.js";

/** A number to three digits, as the book prints it. */
export const digits = (value) => {
  return value.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
};

const ms = (seconds) => `${digits(seconds * 1e3)} ms`;
const rate = (seconds) => digits(1 / seconds);

/** How far a measured time is from the predicted one, in words. */
export function gap(predicted, measured) {
  const percent = Math.round(100 * (measured / predicted - 1));
  return percent === 0 ? "as predicted" : `${Math.abs(percent)}% ${percent > 0 ? "longer" : "shorter"}`;
}

/** Put a row into the body of a table: in place of the row with the same key, or as the last one. */
function putRow(body, key, cells) {
  const row = document.createElement("tr");
  row.dataset.key = key;
  cells.forEach((cell, i) => {
    const element = row.appendChild(document.createElement(i ? "td" : "th"));
    if (!i) element.scope = "row";
    element.textContent = cell;
  });
  const old = [...body.rows].find((other) => other.dataset.key === key);
  if (old) old.replaceWith(row);
  else body.append(row);
}

/** The prediction, term by term. */
function terms({ precision, predicted: { token } }) {
  const parts = [
    `${ms(token.products)} of matrix products`,
    `${ms(token.attention)} of attention with ${digits(token.bytes / 1e6)} MB of keys and values`,
    `${ms(token.between)} for what stands between`,
  ];
  return `The prediction for a token in ${precision}: ${parts.join(" + ")} = ${ms(token.total)}.`;
}

/**
 * Show a run, before it, when nothing is measured, and after it.
 * @param {HTMLElement} app
 * @param {{precision: string, cached: boolean, info: object, predicted: object, measured?: object}} run
 */
export function report(app, run) {
  const { precision, cached, info, predicted, measured } = run;
  const [speed, products] = app.querySelectorAll("table");
  app.querySelector(".results").hidden = false;
  putRow(speed.tBodies[0], `${precision} ${cached}`, [
    `${precision}, ${cached ? "cache" : "no cache"}`,
    ms(predicted.first.total), measured?.first ? ms(measured.first) : "",
    rate(predicted.token.total), measured?.token ? rate(measured.token) : "",
    measured?.token ? gap(predicted.token.total, measured.token) : "",
  ]);
  app.querySelector(".terms").textContent = terms(run);
  if (cached) {
    const bytes = weights(info.config) * WEIGHT_BYTES[precision], time = predicted.token.products;
    const cells = [precision, `${digits(bytes / 1e6)} MB`, ms(time), `${digits(bytes / time / 1e9)} GB/s`];
    putRow(products.tBodies[0], precision, cells);
  }
}
