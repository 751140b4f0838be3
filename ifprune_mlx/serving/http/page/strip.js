// Draws the selection that computes the answer, and how it differs from the one before.

import { getJSON } from "./api.js";

const element = (id) => document.getElementById(id);
const strip = element("strip"), sentence = element("sentence");
let shown = null, before = null; // selections: {hash, density, layers: [Uint8Array of 0 and 1]}
let cleared = 0; // how often

// Nothing is selected; `text` says what will be, or why.
export function clearStrip(text, label = "No selection yet") {
  shown = before = null;
  cleared += 1;
  strip.setAttribute("aria-label", label);
  say(text);
  draw();
}

// Shows the selection of another message. `because` is said where it is the one before.
export async function showSelection(hash, because) {
  if (shown?.hash === hash) {
    before = shown;
  } else {
    const begun = cleared;
    const fetched = await getJSON(`/v1/ifprune/selections/${encodeURIComponent(hash)}`);
    if (cleared !== begun) return; // another conversation has been opened
    const layers = fetched.masks.map((mask, layer) => unpacked(mask, fetched.widths[layer]));
    before = shown?.layers.length === layers.length ? shown : null;
    shown = { hash, density: fetched.density, layers };
  }
  strip.setAttribute("aria-label", `${percent(shown.density)} of ${shown.layers.length} layers' neurons are active`);
  say(...description(because));
  draw();
}

function say(...parts) {
  sentence.replaceChildren(...parts);
}

const percent = (share) => `${Math.round(100 * share)} %`;

// A square in the colour of the strip that the next words are about.
function square(kind) {
  const made = document.createElement("i");
  made.className = kind;
  return made;
}

// What the strip shows, in words and squares.
function description(because) {
  if (!before) {
    return [square("kept"), `${percent(shown.density)} of the neurons in each of ${shown.layers.length} layers answer: a bar is a layer. The others are not computed.`];
  }
  if (before === shown) return [square("kept"), `The same neurons as for the message before. ${because}`];
  const layers = differences();
  const sum = (name) => layers.reduce((total, one) => total + one[name], 0);
  const [stayed, entered, left] = [sum("stayed"), sum("entered"), sum("left")];
  const changes = layers.map((one) => (one.entered + one.left) / one.width);
  const [most, least] = [Math.max(...changes), Math.min(...changes)].map((change) => changes.indexOf(change));
  return [
    "New neurons: ", square("entered"), `${percent(entered / (stayed + entered))} of those in use came in, `,
    square("left"), `${percent(left / (stayed + left))} of those before went out.`,
    most === least ? "" : ` Layer ${most} changed most, layer ${least} least.`,
  ];
}

// A base64 bit mask, the first neuron in the highest bit, as one byte per neuron.
function unpacked(mask, width) {
  const bytes = Uint8Array.from(atob(mask), (char) => char.charCodeAt(0));
  return Uint8Array.from({ length: width }, (_, neuron) => (bytes[neuron >> 3] >> (7 - (neuron & 7))) & 1);
}

// Of each layer: how many of its neurons stayed, came in and went out.
function differences() {
  return shown.layers.map((mask, layer) => {
    const old = (before ?? shown).layers[layer];
    let stayed = 0, entered = 0, left = 0;
    mask.forEach((kept, neuron) => {
      if (kept && old[neuron]) stayed += 1;
      else if (kept) entered += 1;
      else if (old[neuron]) left += 1;
    });
    return { stayed, entered, left, width: mask.length };
  });
}

// A bar for each layer: from the bottom, what stayed and came in, which is in use, and what went out.
function draw() {
  const { clientWidth, clientHeight } = strip, scale = devicePixelRatio;
  strip.width = Math.round(clientWidth * scale);
  strip.height = Math.round(clientHeight * scale);
  if (!shown) return;
  const context = strip.getContext("2d"), style = getComputedStyle(document.documentElement);
  differences().forEach((one, layer, { length }) => {
    const x = Math.round((layer * strip.width) / length), end = Math.round(((layer + 1) * strip.width) / length);
    let below = 0;
    for (const [count, colour] of [[one.stayed, "--kept"], [one.entered, "--entered"], [one.left, "--left"]]) {
      const from = Math.round((below * strip.height) / one.width);
      below += count;
      const to = Math.round((below * strip.height) / one.width);
      context.fillStyle = style.getPropertyValue(colour);
      context.fillRect(x, strip.height - to, Math.max(1, end - x - Math.round(scale)), to - from);
    }
  });
}

addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
