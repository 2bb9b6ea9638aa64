// The model, its cache and the loop that writes. T tokens given, P past, L layers, H heads, D head size, V vocabulary.

/** A GPT whose graph takes the keys and values of the past as an input and gives back those of the tokens it reads. */
export class GPT {
  /**
   * @param {object} ort The module onnxruntime-web.
   * @param {object} session Its session of the graph.
   * @param {{n_layer: number, n_kv_head: number, head_dim: number, block_size: number}} config
   */
  constructor(ort, session, config) {
    Object.assign(this, { ort, session, config });
    this.rows = 2 * config.n_layer * config.n_kv_head; // a row holds the keys, or the values, of one head
    this.cache = new Float32Array(this.rows * config.block_size * config.head_dim); // allocated once, for all P
    this.past = 0; // P
  }

  /** Start anew: what the cache holds is overwritten. */
  forget() {
    this.past = 0;
  }

  /**
   * Read tokens into the cache; the logits (V,) after the last one.
   * @param {number[]} tokens
   * @returns {Promise<Float32Array>}
   */
  async read(tokens) {
    const { n_layer, n_kv_head, head_dim, block_size } = this.config;
    const T = tokens.length, P = this.past;
    if (T < 1) throw new RangeError("there are no tokens to read, but there must be at least one.");
    if (P + T > block_size) throw new RangeError(`the text has ${P + T} tokens, but the model reads ${block_size}.`);
    const used = this.cache.subarray(0, this.rows * P * head_dim); // a view: nothing is copied
    const { logits, new: fresh } = await this.session.run({
      idx: new this.ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, T]),
      past: new this.ort.Tensor("float32", used, [2 * n_layer, 1, n_kv_head, P, head_dim]),
    }); // logits (1, 1, V), fresh (2L, 1, H, T, D)
    append(this.cache, this.rows, P * head_dim, fresh.data);
    this.past = P + T;
    return logits.data;
  }
}

/**
 * Lengthen each row of a packed cache (rows, P, D) by its part of `fresh` (rows, T, D), in place: (rows, P + T, D).
 * The last row moves first, so that none is overwritten before it has moved.
 * @param {Float32Array} cache With room for the result.
 * @param {number} rows
 * @param {number} old Numbers a row has now, P * D.
 * @param {Float32Array} fresh
 */
export function append(cache, rows, old, fresh) {
  const more = fresh.length / rows; // T * D
  for (let row = rows - 1; row >= 0; row--) {
    const start = row * (old + more);
    cache.copyWithin(start, row * old, (row + 1) * old);
    cache.set(fresh.subarray(row * more, (row + 1) * more), start + old);
  }
}

/**
 * Draw a token from logits (V,); temperature 0 takes the likeliest, the first of equals.
 * @param {Float32Array} logits
 * @param {number} temperature
 * @param {() => number} random From 0 up to, but not including, 1.
 * @returns {number}
 */
export function sample(logits, temperature, random = Math.random) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (temperature === 0) return best;
  // the likeliest has weight 1 and no other more, so that no temperature overflows
  const weights = Float64Array.from(logits, (z) => Math.exp((z - logits[best]) / temperature));
  let left = random() * weights.reduce((sum, weight) => sum + weight);
  for (let i = 0; i < weights.length; i++) if ((left -= weights[i]) < 0) return i;
  return best; // rounding ate the last weight
}

/**
 * Continue a prompt, token by token, until there are `count` new ones or the context is full.
 * @param {GPT} model
 * @param {number[]} prompt
 * @param {{count: number, temperature?: number, cached?: boolean, random?: () => number}} options
 * @returns {AsyncGenerator<number>}
 */
export async function* stream(model, prompt, { count, temperature = 0, cached = true, random = Math.random }) {
  const text = [...prompt];
  let unread = text; // prefill: the whole prompt in one pass; then one token at a time
  model.forget();
  for (let n = 0; n < count && text.length <= model.config.block_size; n++) {
    if (!cached) { // the naive loop: all of the text anew, for every token
      model.forget();
      unread = text;
    }
    const token = sample(await model.read(unread), temperature, random);
    text.push(token);
    unread = [token];
    yield token;
  }
}
