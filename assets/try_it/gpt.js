// The model, its cache and the loop that writes. T tokens given, P past, H heads of keys, D head size, V vocabulary.

/** The keys and values of P tokens, by the names of a graph's inputs, past.k0, past.v0, ...: each packed (H, P, D). */
export class Cache {
  /**
   * @param {object} ort The module onnxruntime-web.
   * @param {object} session Its session of the graph.
   * @param {{n_kv_head: number, head_dim: number, block_size: number}} config
   */
  constructor(ort, session, { n_kv_head, head_dim, block_size }) {
    Object.assign(this, { ort, H: n_kv_head, D: head_dim, longest: block_size });
    const names = session.inputNames.filter((name) => name.startsWith("past."));
    this.arrays = new Map(names.map((name) => [name, new Float32Array(this.H * this.longest * this.D)]));
    this.length = 0; // P
  }

  /** The graph's inputs (1, H, P, D). */
  feed() {
    const { Tensor } = this.ort, { H, D, length: P } = this, inputs = {};
    for (const [name, array] of this.arrays) { // a subarray is a view: nothing is copied
      inputs[name] = new Tensor("float32", array.subarray(0, H * P * D), [1, H, P, D]);
    }
    return inputs;
  }

  /**
   * Take what the graph gave back, new.k0, new.v0, ..., each (1, H, T, D), behind what is here.
   * @param {Record<string, object>} outputs
   * @param {number} T
   */
  take(outputs, T) {
    for (const [name, array] of this.arrays) {
      append(array, this.H, this.length * this.D, outputs[name.replace("past", "new")].data);
    }
    this.length += T;
  }
}

/** A GPT whose graph takes the keys and values of the past as inputs and gives back those of the tokens it reads. */
export class GPT {
  /**
   * @param {object} ort
   * @param {object} session
   * @param {{n_kv_head: number, head_dim: number, block_size: number}} config
   */
  constructor(ort, session, config) {
    Object.assign(this, { ort, session, config, cache: new Cache(ort, session, config) });
  }

  /** Start anew: what the cache holds is overwritten. */
  forget() {
    this.cache.length = 0;
  }

  /**
   * Read tokens into the cache; the logits (V,) after the last one.
   * @param {number[]} tokens
   * @returns {Promise<Float32Array>}
   */
  async read(tokens) {
    const T = tokens.length, all = this.cache.length + T, { block_size } = this.config;
    if (T < 1) throw new RangeError("there are no tokens to read, but there must be at least one.");
    if (all > block_size) throw new RangeError(`the text has ${all} tokens, but the model reads ${block_size}.`);
    const idx = new this.ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, T]);
    const { logits, ...fresh } = await this.session.run({ idx, ...this.cache.feed() }); // logits (1, 1, V)
    this.cache.take(fresh, T);
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
