// How long a token should take on this machine, from parts that are timed without the model:
//
//   t(pass) = t(matrix products) + other operators * t(operator) + COPIES * bytes of the cache / copying rate

import { OPTIONS, keeper } from "./load.js";

/**
 * How often a token's step moves the cache: `append` shifts it, it is copied into WebAssembly's memory, the graph takes
 * it apart by layer, and attention reads it.
 */
export const COPIES = 4;

/** Bytes of one weight, as the kernels read it; in 4 bits, 32 weights share a scale. */
export const WEIGHT_BYTES = { fp32: 4, int8: 1, int4: 0.5 + 4 / 32 };

/** Seconds for which a calibration runs before it counts, and of a batch that counts. */
const WARM_UP = 0.3, BATCH = 0.02;

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
 * Seconds that `work` takes: the median of three batches, each long beside the steps of a browser's coarse clock. What
 * ran in the `warm` seconds before does not count: in them the browser notices what runs often, and compiles it again
 * for speed.
 * @param {() => unknown} work
 * @param {number} warm
 */
export async function timed(work, warm = 0) {
  const now = () => performance.now() / 1000, start = now();
  let runs = 0;
  do { await work(); runs++; } while (now() < start + Math.max(warm, BATCH));
  const size = Math.ceil(runs * BATCH / (now() - start)), batches = [];
  for (let i = 0; i < 3; i++) {
    const before = now();
    for (let j = 0; j < size; j++) await work();
    batches.push((now() - before) / size);
  }
  return median(batches);
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

  /** Seconds to run a file on R rows; its weights, made while it loads, have the model's shapes, not its values. */
  async run(file, R) {
    const { InferenceSession, Tensor } = this.ort, C = this.info.config.n_embd;
    const session = await this.once(file, async () => InferenceSession.create(await this.get(file), OPTIONS));
    const x = new Tensor("float32", new Float32Array(R * C).fill(0.01), [R, C]); // (R, C)
    const warm = this.warmed.has(file) ? 0 : WARM_UP;
    this.warmed.add(file);
    return timed(() => session.run({ [session.inputNames[0]]: x }), warm);
  }

  /** Seconds of the model's matrix products over R tokens. */
  products(precision, R) {
    return this.run(this.info.calibration[precision], R);
  }

  /** Seconds of an operator that has next to nothing to do. */
  async operator() {
    return await this.run(this.info.calibration.ops, 1) / this.info.calibration_ops;
  }

  /** Bytes a second at which a whole cache is copied. */
  async copying() {
    const { config } = this.info, bytes = cacheBytes(config, config.block_size);
    const from = new Float32Array(bytes / 4).fill(1), to = new Float32Array(bytes / 4);
    return bytes / await timed(() => to.set(from));
  }

  /**
   * The parts of passes over R tokens after P others, in seconds, their sum, and the bytes of the cache.
   * @param {string} precision
   * @param {[R: number, P: number][]} passes
   * @returns {Promise<{products: number, operators: number, copies: number, total: number, bytes: number}[]>}
   */
  async predict(precision, passes) {
    const operators = this.info.models[precision].ops * await this.operator();
    const rate = await this.copying(), predicted = [];
    for (const [R, P] of passes) {
      const products = await this.products(precision, R);
      const bytes = cacheBytes(this.info.config, P + R), copies = COPIES * bytes / rate;
      predicted.push({ products, operators, copies, total: products + operators + copies, bytes });
    }
    return predicted;
  }
}
