// The chat page of `ifprune serve --ui`: streams answers, and draws the selection that computed them.
// What a model writes is text: it only ever goes into textContent.
"use strict";

const element = (id) => document.getElementById(id);
const conversation = element("conversation"), message = element("message"), strip = element("strip");
const choice = element("choice"), density = element("density");
const NEW = 0.25; // of a bin's kept neurons: where so many came in, it is orange

let messages = []; // what was said, as the API takes it
let model = null;
let key = ""; // kept in this page only
let running = null; // the AbortController of the answer under way
let shown = null, before = null; // selections: {hash, density, layers: [Uint8Array of 0 and 1]}

class NeedsKey extends Error {}

async function call(path, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}) };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let said = `the server answered ${response.status}`;
  try {
    said = (await response.json()).error.message || said;
  } catch { /* not JSON: the status says enough */ }
  if (response.status === 401) throw new NeedsKey(said);
  throw new Error(said);
}

// The server-sent events of a response, each `data:` line parsed; ends at [DONE] or with the response.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (pending + value).split(/\r?\n/);
    pending = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function addTurn(kind, text) {
  element("hint")?.remove();
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  turn.textContent = text;
  conversation.append(turn);
  conversation.scrollTop = conversation.scrollHeight;
  return turn;
}

function append(turn, text) {
  const atEnd = conversation.scrollTop + conversation.clientHeight >= conversation.scrollHeight - 8;
  turn.append(text); // a string becomes a text node
  if (atEnd) conversation.scrollTop = conversation.scrollHeight;
}

function addSpan(turn, kind, text) {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = text;
  turn.append(span);
  conversation.scrollTop = conversation.scrollHeight;
  return span;
}

const addEnding = (turn, text) => addSpan(turn, "ending", text);

function whatSelects() {
  const { value } = choice;
  if (value === "dense") return { dense: true };
  if (value.startsWith("task:")) return { task: value.slice(5) };
  return { policy: value, density: Number(density.value) };
}

async function ask(text) {
  const question = { role: "user", content: text };
  const own = addTurn("user", text);
  const turn = addTurn("assistant", "");
  conversation.setAttribute("aria-busy", "true");
  running = new AbortController();
  setRunning(true);
  let said = "", thoughts = null, finish = null, figures = null, stopped = false;
  try {
    const body = JSON.stringify({
      model, stream: true, messages: [...messages, question], stream_options: { include_usage: true },
      ifprune: whatSelects(),
    });
    const response = await call("/v1/chat/completions", { method: "POST", body, signal: running.signal });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [first] = event.choices ?? [];
      if (first?.delta?.reasoning_content) {
        thoughts ??= addSpan(turn, "thoughts", "");
        append(thoughts, first.delta.reasoning_content);
      }
      if (first?.delta?.content) {
        said += first.delta.content;
        append(turn, first.delta.content);
      }
      finish = first?.finish_reason ?? finish;
      figures = event.ifprune ?? figures;
    }
    if (finish === null) addEnding(turn, " [the connection ended before the answer did]");
  } catch (error) {
    stopped = error.name === "AbortError";
    if (error instanceof NeedsKey) {
      own.remove();
      turn.remove();
      message.value = message.value || text;
      askForKey();
    } else if (!stopped) {
      turn.className = "turn error";
      turn.textContent = said ? `${said}\n${error.message}` : error.message;
    }
  } finally {
    running = null;
    conversation.removeAttribute("aria-busy");
    setRunning(false);
  }
  if (stopped) addEnding(turn, said ? " [stopped]" : "[stopped before it began]");
  if (finish === "length") addEnding(turn, " [cut off]");
  // An answer that broke off without a word would leave two questions in a row.
  if (said) messages.push(question, { role: "assistant", content: said });
  if (figures) await showFigures(figures);
}

async function showFigures(figures) {
  const seconds = (name) => `${name} ${(figures[`${name}_s`] ?? 0).toFixed(2)} s`;
  const parts = [`${(figures.tokens_per_s ?? 0).toFixed(1)} tokens/s`];
  if (figures.active_parameters) parts.push(`${count(figures.active_parameters)} of ${count(figures.total_parameters)} active`);
  parts.push(...["select", "switch", "prefill", "decode"].map(seconds));
  parts.push(figures.selection ? `${figures.selector ?? "selection"} ${figures.selection.slice(0, 6)}, density ${figures.density.toFixed(2)}` : "all neurons");
  if (typeof figures.overlap === "number") parts.push(`${Math.round(100 * figures.overlap)} % of it active before`);
  element("figures").replaceChildren(...parts.map((part) => {
    const span = document.createElement("span");
    span.textContent = part;
    return span;
  }));
  try {
    await showSelection(figures.selection ?? null);
  } catch (error) {
    element("hovered").textContent = `the selection cannot be shown: ${error.message}`;
  }
}

function count(parameters) {
  return parameters >= 1e9 ? `${(parameters / 1e9).toFixed(2)}B` : `${Math.round(parameters / 1e6)}M`;
}

async function showSelection(hash) {
  if (hash === null) {
    shown = before = null;
    strip.setAttribute("aria-label", "All neurons are active");
  } else if (shown?.hash !== hash) {
    const fetched = await (await call(`/v1/ifprune/selections/${encodeURIComponent(hash)}`)).json();
    const layers = fetched.masks.map((mask, layer) => unpacked(mask, fetched.widths[layer]));
    before = shown?.layers.length === layers.length ? shown : null;
    shown = { hash, density: fetched.density, layers };
    strip.setAttribute("aria-label", `${Math.round(100 * fetched.density)} % of ${layers.length} layers' neurons are active`);
  }
  draw();
}

// A base64 bit mask, the first neuron in the highest bit, as one byte per neuron.
function unpacked(mask, width) {
  const bytes = Uint8Array.from(atob(mask), (char) => char.charCodeAt(0));
  return Uint8Array.from({ length: width }, (_, neuron) => (bytes[neuron >> 3] >> (7 - (neuron & 7))) & 1);
}

const columns = () => Math.max(1, Math.min(Math.floor(strip.clientWidth / 4), ...(shown?.layers.map((layer) => layer.length) ?? [])));

// Of one layer's stretch `column` of `bins`: its neurons, those kept, and those of them that came in.
function bin(layer, column, bins) {
  const mask = shown.layers[layer], old = before?.layers[layer];
  const first = Math.floor((column * mask.length) / bins), end = Math.floor(((column + 1) * mask.length) / bins);
  let kept = 0, entered = 0;
  for (let neuron = first; neuron < end; neuron += 1) {
    kept += mask[neuron];
    if (old && mask[neuron] && !old[neuron]) entered += 1;
  }
  return { first, end, kept, entered };
}

function draw() {
  if (!shown) {
    strip.height = 40;
    strip.style.height = "40px";
    strip.getContext("2d").clearRect(0, 0, strip.width, strip.height);
    return;
  }
  const style = getComputedStyle(document.documentElement);
  const [none, all, fresh] = ["--none", "--kept", "--entered"].map((name) => rgb(style.getPropertyValue(name).trim()));
  const layers = shown.layers.length, bins = columns();
  const image = new ImageData(bins, layers);
  for (let layer = 0; layer < layers; layer += 1) {
    for (let column = 0; column < bins; column += 1) {
      const { first, end, kept, entered } = bin(layer, column, bins);
      const share = kept / (end - first), colour = entered && entered >= NEW * kept ? fresh : all;
      for (let part = 0; part < 3; part += 1) {
        image.data[4 * (layer * bins + column) + part] = Math.round(none[part] + share * (colour[part] - none[part]));
      }
      image.data[4 * (layer * bins + column) + 3] = 255;
    }
  }
  strip.width = bins;
  strip.height = layers;
  strip.style.height = `${layers * Math.max(2, Math.min(24, Math.floor(150 / layers)))}px`;
  strip.getContext("2d").putImageData(image, 0, 0);
}

function rgb(colour) {
  return [1, 3, 5].map((at) => Number.parseInt(colour.slice(at, at + 2), 16));
}

function describe(event) {
  if (!shown) return;
  const bins = columns(), layers = shown.layers.length;
  const column = Math.min(bins - 1, Math.max(0, Math.floor((event.offsetX * bins) / strip.clientWidth)));
  const layer = Math.min(layers - 1, Math.max(0, Math.floor((event.offsetY * layers) / strip.clientHeight)));
  const { first, end, kept, entered } = bin(layer, column, bins);
  const came = before ? `, ${entered} new` : "";
  element("hovered").textContent = `layer ${layer}, neurons ${first} to ${end - 1}: ${kept} of ${end - first} kept${came}`;
}

function setRunning(on) {
  element("send").disabled = element("new").disabled = on;
  element("stop").disabled = !on;
  if (!on) message.focus();
}

function setDensity() {
  element("density-shown").textContent = Number(density.value).toFixed(2);
  density.disabled = choice.value === "dense" || choice.value.startsWith("task:");
}

function askForKey() {
  element("key-form").hidden = false;
  element("key").value = "";
  element("key").focus();
}

function send() {
  const text = message.value.trim();
  if (!text || running) return;
  message.value = "";
  ask(text);
}

// What the server offers: the model's name, its default density, and its named tasks.
async function begin() {
  try {
    const [served] = (await (await call("/v1/models")).json()).data;
    model = served.id;
    element("model").textContent = document.title = model;
    const known = served.ifprune?.density;
    if (known) density.value = known;
    const { tasks } = await (await call("/v1/ifprune/tasks")).json();
    choice.querySelectorAll("option[value^='task:']").forEach((option) => option.remove());
    for (const task of tasks) {
      const option = new Option(`task ${task.name}`, `task:${task.name}`);
      if (task.description) option.title = task.description;
      choice.add(option);
    }
    element("key-form").hidden = true;
  } catch (error) {
    if (error instanceof NeedsKey) askForKey();
    else addTurn("error", error.message);
  }
  setDensity();
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
element("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = element("key").value;
  await begin();
  if (element("key-form").hidden) message.focus();
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
element("stop").addEventListener("click", () => running?.abort());
element("new").addEventListener("click", () => {
  messages = [];
  conversation.replaceChildren();
  element("figures").replaceChildren("\u00a0");
  message.focus();
});
density.addEventListener("input", setDensity);
choice.addEventListener("change", setDensity);
strip.addEventListener("pointermove", describe);
strip.addEventListener("pointerleave", () => { element("hovered").textContent = "a row per layer"; });
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
begin();
