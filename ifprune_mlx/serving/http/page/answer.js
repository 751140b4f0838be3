// Shows an answer: {content, thoughts, ending, error, figures, tokens}. `ending` says why it is not whole.

import { copyButton, showMarkdown } from "./markdown.js";

export const newAnswer = () => ({ content: "", thoughts: "", ending: "", error: "", figures: null, tokens: 0 });

export function make(tag, kind, text = "") {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.textContent = text;
  return made;
}

export class AnswerView {
  #drawing = null; // the timer of the next drawing
  #pause = 0; // before it, in ms: long answers take long to draw

  constructor(parent, answer, title) {
    this.answer = answer;
    this.element = make("section", "answer");
    this.thoughts = make("details", "thoughts");
    this.thoughts.append(make("summary", "", "Thoughts"), make("div"));
    this.content = make("div", "content");
    this.waiting = make("p", "waiting");
    this.end = make("p", "ending");
    this.figures = make("p", "figures");
    if (title) this.element.append(make("h2", "", title));
    this.element.append(this.thoughts, this.content, this.waiting, this.end, this.figures);
    parent.append(this.element);
  }

  // Draws soon what has been added to the answer.
  update() {
    this.#drawing ??= setTimeout(() => this.draw(), this.#pause);
  }

  draw() {
    clearTimeout(this.#drawing);
    this.#drawing = null;
    const start = performance.now();
    this.#atEnd(() => this.#show());
    this.#pause = Math.min(2000, 4 * (performance.now() - start));
  }

  // Makes a change; who has scrolled to the conversation's end stays there.
  #atEnd(change) {
    const scroller = this.element.closest("main");
    const atEnd = scroller.scrollTop + scroller.clientHeight >= scroller.scrollHeight - 8;
    change();
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  }

  #show() {
    const { answer } = this;
    this.thoughts.hidden = !answer.thoughts;
    this.thoughts.lastElementChild.textContent = answer.thoughts;
    try {
      showMarkdown(this.content, answer.content);
    } catch { // no Markdown that can be shown
      this.content.textContent = answer.content;
    }
  }

  wait(text) {
    this.#atEnd(() => { this.waiting.textContent = text; });
  }

  // Draws the whole answer, with what there is to say of it.
  finish() {
    this.wait("");
    this.draw();
    this.#atEnd(() => this.#conclude());
  }

  #conclude() {
    const { answer } = this, { figures } = answer;
    this.end.textContent = answer.error || answer.ending;
    this.end.classList.toggle("error", Boolean(answer.error));
    if (!figures) return;
    const seconds = (name) => `${name} ${(figures[`${name}_s`] ?? 0).toFixed(2)} s`;
    const parts = [`${answer.tokens} tokens, ${(figures.tokens_per_s ?? 0).toFixed(1)} tokens/s`];
    parts.push(figures.selection ? `${figures.selector} ${figures.selection.slice(0, 6)}, density ${figures.density.toFixed(2)}` : "all neurons");
    if (figures.active_parameters) parts.push(`${count(figures.active_parameters)} of ${count(figures.total_parameters)} active`);
    parts.push(...["select", "switch", "prefill", "decode"].map(seconds));
    this.figures.replaceChildren(...parts.map((part) => make("span", "", part)));
    if (answer.content) this.figures.append(copyButton("Copy answer", () => answer.content, this.content));
  }
}

function count(parameters) {
  return parameters >= 1e9 ? `${(parameters / 1e9).toFixed(2)}B` : `${Math.round(parameters / 1e6)}M`;
}
