// Fetching what the page needs, with a count of the bytes and with errors that say what to do.

/** How sessions are made: on the processor, saying errors only. */
export const OPTIONS = { executionProviders: ["wasm"], logSeverityLevel: 3 };

/** An error whose message is a sentence for the reader. */
export class LoadError extends Error {}

/**
 * A function that keeps the promise made under a key, so that nothing is loaded or timed twice, until it fails.
 * @returns {<T>(key: string, make: () => Promise<T>) => Promise<T>}
 */
export function keeper() {
  const kept = new Map();
  return (key, make) => {
    if (!kept.has(key)) {
      kept.set(key, make());
      kept.get(key).catch(() => kept.delete(key));
    }
    return kept.get(key);
  };
}

/**
 * The bytes of a file.
 * @param {URL | string} url
 * @param {{bytes?: number, count?: (n: number) => void, signal?: AbortSignal}} options The size that it must have; what
 *   is told each part's size; what ends it.
 * @returns {Promise<Uint8Array>}
 */
export async function download(url, { bytes, count = () => {}, signal } = {}) {
  const name = new URL(url).pathname.split("/").pop();
  const parts = [];
  let size = 0, answer;
  try {
    answer = await fetch(url, { signal });
    if (answer.ok) {
      // Content-Length would be the compressed size, or missing; so the parts are counted, and `bytes` is the whole
      for (let reader = answer.body.getReader(), part; !(part = await reader.read()).done;) {
        parts.push(part.value);
        size += part.value.length;
        count(part.value.length);
      }
    }
  } catch {
    signal?.throwIfAborted();
    throw new LoadError(`${name} could not be loaded; check the connection and press Start again.`);
  }
  if (!answer.ok) {
    throw new LoadError(
      `${name} is not on this site (the server said ${answer.status}); reload the page, or choose another precision.`,
    );
  }
  if (bytes !== undefined && size !== bytes) {
    throw new LoadError(`${name} came with ${size} bytes of ${bytes}; reload the page and press Start again.`);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/**
 * The module onnxruntime-web, ready to make sessions on one thread of the processor.
 * @param {URL} folder
 * @param {{count?: (n: number) => void, signal?: AbortSignal}} options As of `download`.
 */
export async function loadRuntime(folder, options) {
  const module = import(new URL("ort.wasm.bundle.min.mjs", folder).href).catch(() => {
    throw new LoadError("onnxruntime-web could not be loaded; check the connection and reload the page.");
  });
  const [ort, binary] = await Promise.all([module, download(new URL("ort-wasm-simd-threaded.wasm", folder), options)]);
  // more threads would need headers that a plain static host does not send
  Object.assign(ort.env.wasm, { wasmBinary: binary.buffer, numThreads: 1 });
  return ort;
}

/**
 * What to tell the reader about an error.
 * @param {unknown} error
 * @returns {string}
 */
export function advice(error) {
  if (error instanceof LoadError) return error.message;
  const text = String(error?.message ?? error);
  if (/memory|alloc|Aborted|Array buffer/i.test(text)) {
    return "The browser ran out of memory; close other tabs, reload the page and choose a smaller precision.";
  }
  if (/wasm|WebAssembly|backend/i.test(text)) {
    return `This browser could not start WebAssembly with SIMD (${text}); try a newer one, or reload the page.`;
  }
  return `The model could not run (${text}); reload the page and try again.`;
}
