// How long a pass should take on this machine, from parts that are timed without the model:
//
//   t(R, P) = t(matrix products of R tokens) + t(attention of R tokens, with P before them) + t(what stands between)

import { Cache } from "./gpt.js";
import { OPTIONS, keeper } from "./load.js";

/** Bytes of one weight, as the kernels read it; in 4 bits, 32 weights share a scale. */
export const WEIGHT_BYTES = { fp32: 4, int8: 1, int4: 0.5 + 4 / 32 };

/** Seconds for which the parts run before they count, and of a batch that counts, and how many batches do. */
const WARM_UP = 0.8, BATCH = 0.05, BATCHES = 5;

/** Weights in the matrix products of the blocks; each token needs each of them once. */
export const weights = ({ n_layer, n_embd }) => 12 * n_layer * n_embd ** 2;

/** Bytes of keys and values of P tokens, in float32. */
export const cacheBytes = ({ n_layer, n_kv_head, head_dim }, P) => 4 * 2 * n_layer * n_kv_head * head_dim * P;

/** The middle of some numbers; of none, NaN. */
export function median(values) {
  const sorted = [...values].sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/**
 * Seconds that each part takes where they run in turns, as they do in a model: so each finds the processor's caches as
 * the others leave them. The median of some batches, each long beside the steps of a browser's coarse clock. What ran in
 * the `warm` seconds before does not count: in them the browser notices what runs often, and compiles it for speed.
 * @param {(() => Promise<unknown>)[]} parts
 * @param {number} warm
 * @returns {Promise<number[]>}
 */
export async function timed(parts, warm = 0) {
  const now = () => performance.now() / 1000;
  const batch = async (enough) => { // the mean of some rounds, for each part
    const sums = parts.map(() => 0), start = now();
    let rounds = 0;
    do {
      for (const [i, part] of parts.entries()) {
        const before = now();
        await part();
        sums[i] += now() - before;
      }
      rounds++;
    } while (now() < start + enough);
    return sums.map((sum) => sum / rounds);
  };
  await batch(warm);
  const batches = [];
  while (batches.length < BATCHES) batches.push(await batch(BATCH));
  return parts.map((_, i) => median(batches.map((means) => means[i])));
}

/**
 * Seconds of a token, from the times of all after the first: the median over windows of up to eight tokens, because one
 * may be as short as a step of the browser's clock; undefined if there are none.
 * @param {number[]} times
 */
export function tokenTime(times) {
  const n = Math.min(8, times.length);
  const sums = times.slice(n - 1).map((_, i) => times.slice(i, i + n).reduce((sum, time) => sum + time));
  return n ? median(sums) / n : undefined;
}

/** What this machine takes for each part: timed whenever it is asked for, because a machine's speed drifts. */
export class Calibration {
  /**
   * @param {object} ort
   * @param {object} info The contents of models.json.
   * @param {(file: string) => Promise<Uint8Array>} get The bytes of one of its files.
   */
  constructor(ort, info, get) {
    Object.assign(this, { ort, info, get });
    this.once = keeper();
    this.warmed = new Set();
  }

  /**
   * A function that runs a file, which has the model's shapes but none of its weights, and does with its cache what the
   * model does.
   * @param {string} kind A key of `info.calibration`.
   * @param {number} T Tokens to read.
   * @param {number} P Tokens before them.
   */
  async part(kind, T, P) {
    const { InferenceSession, Tensor } = this.ort, file = this.info.calibration[kind];
    const session = await this.once(file, async () => InferenceSession.create(await this.get(file), OPTIONS));
    const cache = new Cache(this.ort, session, this.info.config), inputs = {};
    for (const { name, shape } of session.inputMetadata.filter(({ name }) => !cache.arrays.has(name))) {
      const sizes = shape.map((size) => ({ B: 1, T, P })[size] ?? size); // "T" becomes its number
      inputs[name] = new Tensor("float32", new Float32Array(sizes.reduce((a, b) => a * b)).fill(0.01), sizes);
    }
    return async () => {
      cache.length = P; // of whatever stands there
      cache.take(await session.run({ ...inputs, ...cache.feed() }), T);
    };
  }

  /**
   * The parts of a pass over R tokens after P others, in seconds, their sum, and the bytes of keys and values.
   * @param {string} precision
   * @param {number} R
   * @param {number} P
   * @returns {Promise<{products: number, attention: number, between: number, total: number, bytes: number}>}
   */
  async predict(precision, R, P) {
    const parts = await Promise.all([precision, "attention", "between"].map((kind) => this.part(kind, R, P)));
    const warm = this.warmed.has(precision) ? 0 : WARM_UP;
    this.warmed.add(precision);
    const [products, attention, between] = await timed(parts, warm);
    const bytes = cacheBytes(this.info.config, P + R);
    return { products, attention, between, total: products + attention + between, bytes };
  }
}
