// The prompt as it is read, and the text as it is written.

/** Let the browser draw and hear clicks; a timer would wait some milliseconds, and longer in the background. */
export const breathe = () => new Promise((go) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => { port1.close(); go(); };
  port2.postMessage(null);
});

/**
 * The prompt as tokens, and sentences on what became of it.
 * @param {import("./tokenizer.js").Tokenizer} tokenizer
 * @param {string} prompt
 * @returns {{tokens: number[], notes: string[]}}
 */
export function readPrompt(tokenizer, prompt) {
  const { tokens, unknown } = tokenizer.encode(prompt);
  const notes = [];
  const named = unknown.map((c) => `“${c}”`).join(", ");
  if (unknown.length) notes.push(`The model does not know ${named}, so that was left out.`);
  if (!tokens.length) {
    tokens.push(...tokenizer.encode("\n").tokens);
    notes.push("There is no prompt, so the text begins with a new line.");
  }
  return { tokens, notes };
}

/**
 * Write on into `output` until the text ends or is stopped.
 * @param {HTMLElement} output
 * @param {AsyncGenerator<string>} characters
 * @param {AbortSignal} signal
 * @returns {Promise<number[]>} The seconds that each character took; drawing it on the page is not counted.
 */
export async function write(output, characters, signal) {
  const times = [];
  let drawn = performance.now(), text = "";
  const draw = async () => {
    output.append(text);
    text = "";
    await breathe();
    drawn = performance.now();
  };
  for (let start = performance.now(); !signal.aborted; start = performance.now()) {
    const { value, done } = await characters.next();
    if (done) break;
    times.push((performance.now() - start) / 1000);
    text += value;
    if (performance.now() - drawn > 16) await draw(); // about once a frame
  }
  await draw();
  return times;
}
