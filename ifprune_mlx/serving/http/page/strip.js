// Draws the selection that computes the answer, and how it differs from the one before.

import { getJSON } from "./api.js";

const PIXELS = 60; // of height, for all layers
const element = (id) => document.getElementById(id);
const strip = element("strip"), sentence = element("sentence"), legend = element("legend");
let shown = null, before = null; // selections: {hash, density, layers: [Uint8Array of 0 and 1]}

// Nothing is selected; `text` says what will be, or why.
export function clearStrip(text, label = "No selection yet") {
  shown = before = null;
  strip.setAttribute("aria-label", label);
  say(text);
  draw();
}

// Shows the selection of another message. `because` is said where it is the one before.
export async function showSelection(hash, because) {
  if (shown?.hash === hash) {
    before = shown;
  } else {
    const fetched = await getJSON(`/v1/ifprune/selections/${encodeURIComponent(hash)}`);
    const layers = fetched.masks.map((mask, layer) => unpacked(mask, fetched.widths[layer]));
    before = shown?.layers.length === layers.length ? shown : null;
    shown = { hash, density: fetched.density, layers };
  }
  strip.setAttribute("aria-label", `${percent(shown.density)} of ${shown.layers.length} layers' neurons are active`);
  say(description(because));
  draw();
}

function say(text) {
  sentence.textContent = text;
  legend.hidden = shown === null || before === null;
}

const percent = (share) => `${Math.round(100 * share)} %`;

function description(because) {
  if (!before) {
    return `${percent(shown.density)} of the neurons in each of ${shown.layers.length} layers answer, drawn blue: a row is a layer. The others are not computed.`;
  }
  if (before === shown) return `The same neurons as for the message before. ${because}`.trim();
  const layers = shown.layers.map((mask, layer) => difference(mask, before.layers[layer], 0, mask.length));
  const sum = (name) => layers.reduce((total, one) => total + one[name], 0);
  const [kept, entered, left] = [sum("kept"), sum("entered"), sum("left")];
  const changes = layers.map((one) => (one.entered + one.left) / (one.kept + one.left));
  const [most, least] = [Math.max(...changes), Math.min(...changes)].map((change) => changes.indexOf(change));
  const where = most === least ? "" : ` Layer ${most} changed most, layer ${least} least.`;
  return `New neurons: ${percent(entered / kept)} of those in use came in, ${percent(left / (kept - entered + left))} of those before went out.${where}`;
}

// A base64 bit mask, the first neuron in the highest bit, as one byte per neuron.
function unpacked(mask, width) {
  const bytes = Uint8Array.from(atob(mask), (char) => char.charCodeAt(0));
  return Uint8Array.from({ length: width }, (_, neuron) => (bytes[neuron >> 3] >> (7 - (neuron & 7))) & 1);
}

// Of the neurons `first` to `end`: how many are kept, came in, and went out.
function difference(mask, old, first, end) {
  let kept = 0, entered = 0, left = 0;
  for (let neuron = first; neuron < end; neuron += 1) {
    kept += mask[neuron];
    if (!old || mask[neuron] === old[neuron]) continue;
    if (mask[neuron]) entered += 1;
    else left += 1;
  }
  return { kept, entered, left };
}

export function draw() {
  const layers = shown?.layers.length ?? 1;
  const bins = Math.max(1, Math.min(Math.floor(strip.clientWidth / 4), ...(shown?.layers.map((layer) => layer.length) ?? [])));
  strip.width = bins;
  strip.height = layers;
  strip.style.height = shown ? `${layers * Math.max(1, Math.min(8, Math.floor(PIXELS / layers)))}px` : "8px";
  if (!shown) return;
  const style = getComputedStyle(document.documentElement);
  const [none, all, fresh, gone] = ["--none", "--kept", "--entered", "--left"].map((name) => rgb(style.getPropertyValue(name).trim()));
  const image = new ImageData(bins, layers);
  for (let layer = 0; layer < layers; layer += 1) {
    const mask = shown.layers[layer];
    for (let column = 0; column < bins; column += 1) {
      const first = Math.floor((column * mask.length) / bins), end = Math.floor(((column + 1) * mask.length) / bins);
      const { kept, entered, left } = difference(mask, before?.layers[layer], first, end);
      const size = end - first, change = Math.min(1, (2 * Math.max(entered, left)) / size);
      const plain = mixed(none, all, kept / size);
      image.data.set([...mixed(plain, entered >= left ? fresh : gone, change), 255], 4 * (layer * bins + column));
    }
  }
  strip.getContext("2d").putImageData(image, 0, 0);
}

const mixed = (from, to, share) => from.map((part, at) => Math.round(part + share * (to[at] - part)));

function rgb(colour) {
  return [1, 3, 5].map((at) => Number.parseInt(colour.slice(at, at + 2), 16));
}

addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
