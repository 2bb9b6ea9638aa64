// The form and the order of things: load, predict, write, compare. The page imports this at the first click.

import { GPT, stream } from "./gpt.js";
import { OPTIONS, advice, download, keeper, loadRuntime } from "./load.js";
import { Calibration, tokenTime } from "./predict.js";
import { digits, report } from "./report.js";
import { breathe, readPrompt, write } from "./text.js";
import { Tokenizer } from "./tokenizer.js";

const once = keeper(); // what has been loaded
const at = (name) => new URL(name, import.meta.url); // beside this module, so that the site works under any path
let running = null; // the AbortController of the run under way

/** What the reader chose. */
function choices(app) {
  const { prompt, precision, count, temperature, cache } = app.querySelector("form").elements;
  return {
    prompt: prompt.value, precision: precision.value, count: count.valueAsNumber,
    temperature: temperature.valueAsNumber, cached: cache.checked,
  };
}

/** Options for `download` that show how far all of a run's downloads are. */
function counter(app, signal) {
  const bar = app.querySelector("progress"), text = app.querySelector(".bytes");
  let got = 0, of = 0;
  const show = (more) => {
    got += more;
    [bar.hidden, bar.max, bar.value] = [false, of, got];
    text.textContent = `${(got / 1e6).toFixed(1)} of ${(of / 1e6).toFixed(1)} MB`;
  };
  const end = () => { bar.hidden = true; text.textContent = ""; };
  return { add: (bytes) => { of += bytes; show(0); return { signal, count: show }; }, end };
}

/** The description, a calibration and, when it is called for, the model; what was loaded before is kept. */
async function load(app, precision, signal) {
  const { add, end } = counter(app, signal);
  try {
    const info = await once("info", async () => {
      return JSON.parse(new TextDecoder().decode(await download(at("models/models.json"), { signal })));
    });
    const { file, bytes } = info.models[precision];
    const runtime = once("runtime", () => loadRuntime(at("ort/"), add(Number(app.dataset.runtimeBytes))));
    const weights = once(file, () => download(at(`models/${file}`), { bytes, ...add(bytes) }));
    const [ort] = await Promise.all([runtime, weights]); // one beside the other
    const calibration = await once("calibration", async () => {
      return new Calibration(ort, info, (name) => download(at(`models/${name}`)));
    });
    const model = () => once(`model ${precision}`, async () => {
      return new GPT(ort, await ort.InferenceSession.create(await weights, OPTIONS), info.config);
    });
    return { info, calibration, model };
  } finally {
    end();
  }
}

/** One run, from the form to the comparison; while one is under way, another start is not heard. */
export async function run(app) {
  if (running) return;
  running = new AbortController();
  const { signal } = running, { prompt, precision, count, temperature, cached } = choices(app);
  const output = app.querySelector("[role=log]"), stopButton = app.querySelector("button[name=stop]");
  const say = (...sentences) => { app.querySelector("[role=status]").textContent = sentences.join(" "); };
  app.dataset.state = "running";
  stopButton.disabled = false;
  try {
    say("Loading.");
    const { info, calibration, model } = await load(app, precision, signal);
    const tokenizer = new Tokenizer(info.vocabulary), { tokens, notes } = readPrompt(tokenizer, prompt);
    say(...notes, "Timing the parts, to predict.");
    await breathe();
    const T = tokens.length, middle = T + (Math.min(count, info.config.block_size - T + 1) >> 1);
    const token = await calibration.predict(precision, ...(cached ? [1, middle - 1] : [middle, 0]));
    const first = await calibration.predict(precision, T, 0);
    const comparison = { precision, cached, info, predicted: { token, first } };
    report(app, comparison);
    const gpt = await model();
    say(...notes, "Writing.");
    output.textContent = tokenizer.decode(tokens);
    const written = output.appendChild(document.createElement("mark"));
    await breathe();
    const characters = (async function* () {
      for await (const token of stream(gpt, tokens, { count, temperature, cached })) yield tokenizer.decode([token]);
    })();
    const times = await write(written, characters, signal);
    const measured = { first: times[0], token: tokenTime(times.slice(1)) };
    report(app, { ...comparison, measured });
    const full = `The model sees ${gpt.config.block_size} characters, and the text has them.`;
    if (signal.aborted || times.length < count) notes.push(signal.aborted ? "Stopped." : full);
    const speed = measured.token ? `, ${digits(1 / measured.token)} a second` : "";
    say(...notes, `${times.length} characters written${speed}.`);
  } catch (error) {
    say(signal.aborted ? "Stopped." : advice(error));
  } finally {
    app.dataset.state = "idle";
    stopButton.disabled = true;
    running = null;
  }
}

/** End the run under way, if there is one. */
export function stop() {
  running?.abort();
}
