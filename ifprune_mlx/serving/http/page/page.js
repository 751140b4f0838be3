// The chat page of `ifprune serve --ui`: the conversation, its settings, and the list of the others.

import { NeedsKey, getJSON, streamChat, useKey } from "./api.js";
import { AnswerView, make, newAnswer } from "./answer.js";
import { asMarkdown, deleteChat, findChats, loadChat, newChat, saveChat } from "./chats.js";
import { clearStrip, showSelection } from "./strip.js";

const element = (id) => document.getElementById(id);
const conversation = element("conversation"), message = element("message");
const choice = element("choice"), density = element("density"), beside = element("beside");
// What is selected when, by the choice.
const EXPLAINED = {
  first: "Your first message selects the neurons that answer. They stay for the whole conversation.",
  turn: "Each message selects the neurons that answer it.",
  auto: "Your first message selects the neurons that answer. A later one selects anew where the topic changes.",
  system: "The system prompt selects the neurons that answer; without one, your first message does.",
  task: "The neurons of a saved task answer, whatever you write.",
  dense: "All neurons answer. Nothing is selected.",
};

let model = null, selector = null;
let chat = newChat();
let running = null; // the AbortController of the answer under way
let answering = Promise.resolve(); // until it has ended

const kind = (value = choice.value) => value.split(":")[0]; // of what selects

// What a choice means.
function explained(value = choice.value) {
  const own = kind(value);
  // The selector `activation` has no use for a policy: it reads the whole prompt.
  return EXPLAINED[selector === "activation" && own !== "task" && own !== "dense" ? "turn" : own];
}

function settings() {
  return {
    choice: choice.value, density: Number(density.value), beside: beside.checked,
    system: element("system").value.trim(), temperature: element("temperature").value,
    maxTokens: element("max-tokens").value, stop: element("stop-strings").value,
  };
}

function setSettings(given) {
  choice.value = given.choice;
  if (!choice.value) choice.value = "auto"; // a task that is no more
  density.value = given.density;
  beside.checked = given.beside;
  element("system").value = given.system;
  element("temperature").value = given.temperature;
  element("max-tokens").value = given.maxTokens;
  element("stop-strings").value = given.stop;
  showSettings();
}

function showSettings() {
  element("density-shown").textContent = Number(density.value).toFixed(2);
  density.disabled = ["dense", "task"].includes(kind());
  beside.disabled = kind() === "dense";
  if (chat.turns.length) return;
  conversation.replaceChildren(make("p", "hint", `Write a message. ${explained()}`));
}

// The request for the last turn's answer.
function requestBody() {
  const { choice: selects, system, temperature, maxTokens, stop } = chat.settings;
  const messages = system ? [{ role: "system", content: system }] : [];
  const earlier = chat.turns.slice(0, -1).filter((turn) => turn.answer.content); // else there were two questions in a row
  for (const turn of earlier) {
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.answer.content });
  }
  messages.push({ role: "user", content: chat.turns.at(-1).question });
  const body = { model, messages, stream_options: { include_usage: true } };
  if (temperature) body.temperature = Number(temperature);
  if (maxTokens) body.max_tokens = Number(maxTokens);
  const stops = stop.split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if (selects === "dense") body.ifprune = { dense: true };
  else if (selects.startsWith("task:")) body.ifprune = { task: selects.slice(5) };
  else body.ifprune = { policy: selects, density: chat.settings.density };
  return body;
}

function showTurn(turn) {
  element("conversation").querySelector(".hint")?.remove();
  const article = make("article", "turn");
  article.append(make("div", "question", turn.question));
  const answers = make("div", turn.beside ? "answers two" : "answers");
  article.append(answers);
  conversation.append(article);
  const view = new AnswerView(answers, turn.answer, turn.beside ? "Sliced" : "");
  const other = turn.beside ? new AnswerView(answers, turn.beside, "Dense") : null;
  conversation.scrollTop = conversation.scrollHeight;
  return { article, view, other };
}

async function ask(question) {
  const turn = { question, answer: newAnswer(), beside: beside.checked && !beside.disabled ? newAnswer() : null };
  chat.turns.push(turn);
  chat.settings = settings();
  chat.model = model;
  const { article, view, other } = showTurn(turn);
  history.replaceState(null, "", `#${chat.id}`);
  conversation.setAttribute("aria-busy", "true");
  running = new AbortController();
  setRunning(true);
  keep();
  const body = requestBody(), { signal } = running;
  try {
    other?.wait("comes after the sliced answer");
    await receive(body, view, signal);
    if (other) await receive({ ...body, ifprune: { dense: true } }, other, signal);
  } catch (error) { // the server asks for a key
    article.remove();
    chat.turns.pop();
    message.value ||= question;
    askForKey();
  }
  running = null;
  conversation.removeAttribute("aria-busy");
  setRunning(false);
  keep();
  showFigures();
}

// Receives an answer. Only a missing key is raised: what else goes wrong is said in its place.
async function receive(body, view, signal) {
  const { answer } = view, because = explained(chat.settings.choice);
  let finish = null, selected = null;
  const select = async (hash) => {
    if (!hash || hash === selected) return;
    selected = hash;
    await showSelection(hash, because).catch((error) => clearStrip(`The selection cannot be shown: ${error.message}`));
  };
  view.wait("waiting");
  try {
    for await (const { comment, event } of streamChat(body, signal)) {
      const [first] = event?.choices ?? [];
      if (comment?.startsWith("selection ")) await select(comment.slice(10));
      else if (comment) view.wait(comment);
      if (first?.delta?.content || first?.delta?.reasoning_content) {
        answer.content += first.delta.content ?? "";
        answer.thoughts += first.delta.reasoning_content ?? "";
        view.wait(answer.content ? "" : "thinking");
        view.update();
      }
      finish = first?.finish_reason ?? finish;
      answer.figures = event?.ifprune ?? answer.figures;
      answer.tokens = event?.usage?.completion_tokens ?? answer.tokens;
    }
    if (finish === null) answer.ending = "[the connection ended before the answer did]";
    if (finish === "length") answer.ending = "[cut off]";
  } catch (error) {
    if (error instanceof NeedsKey) throw error;
    if (error.name === "AbortError") answer.ending = answer.content ? "[stopped]" : "[stopped before it began]";
    else answer.error = error.message;
  }
  view.finish();
  await select(answer.figures?.selection);
  if (chat.settings.choice === "dense") clearStrip(because, "All neurons are active");
}

// The sums over this conversation; what other clients of the server do is not in them.
function showFigures() {
  const answers = chat.turns.map((turn) => turn.answer).filter((answer) => answer.figures);
  const sum = (of) => answers.reduce((total, answer) => total + of(answer), 0);
  const tokens = sum((answer) => answer.tokens), seconds = sum((answer) => answer.figures.decode_s);
  const hashes = answers.map((answer) => answer.figures.selection);
  const switches = hashes.filter((hash, at) => at > 0 && hash !== hashes[at - 1]).length;
  const speed = seconds > 0 ? (tokens - answers.length) / seconds : 0;
  element("figures").textContent = answers.length
    ? `This conversation: ${answers.length} ${answers.length === 1 ? "answer" : "answers"}, ${tokens} tokens, ${speed.toFixed(1)} tokens/s, neurons switched ${switches} ${switches === 1 ? "time" : "times"}`
    : "\u00a0";
}

function keep() {
  try {
    if (chat.turns.length) saveChat(chat);
  } catch (error) {
    conversation.append(make("p", "error", error.message));
  }
  showList();
}

function showList() {
  const items = findChats(element("search").value).map((found) => {
    const item = make("li"), open = make("button", "open", found.title), remove = make("button", "remove", "×");
    if (found.id === chat.id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => {
      location.hash = found.id;
      showChats(false);
    });
    remove.title = `Delete ${found.title}`;
    remove.setAttribute("aria-label", remove.title);
    remove.addEventListener("click", () => removeChat(found));
    item.append(open, remove);
    return item;
  });
  element("list").replaceChildren(...items);
  element("export").disabled = !chat.turns.length;
}

async function removeChat(found) {
  if (!confirm(`Delete “${found.title}”? It cannot be had back.`)) return;
  if (found.id === chat.id) await openChat("");
  deleteChat(found.id);
  showList();
  element("search").focus();
}

function exportChat() {
  const address = URL.createObjectURL(new Blob([asMarkdown(chat)], { type: "text/markdown" }));
  const link = make("a");
  link.href = address;
  link.download = `${chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "chat"}.md`;
  link.click();
  URL.revokeObjectURL(address);
}

// Shows a kept conversation, or a new one.
async function openChat(id) {
  running?.abort();
  await answering;
  const found = loadChat(id);
  const opened = chat = found ?? newChat();
  history.replaceState(null, "", found ? `#${id}` : location.pathname);
  showChats(false);
  conversation.replaceChildren();
  clearStrip("");
  for (const turn of chat.turns) {
    const { view, other } = showTurn(turn);
    view.finish();
    other?.finish();
  }
  if (found) setSettings(chat.settings);
  else showSettings();
  conversation.scrollTop = conversation.scrollHeight;
  showList();
  showFigures();
  message.focus();
  // The server knows the selections that were used recently.
  const hashes = chat.turns.map((turn) => turn.answer.figures?.selection).filter(Boolean).slice(-2);
  try {
    for (const hash of hashes) if (chat === opened) await showSelection(hash, explained());
  } catch {
    if (chat === opened) clearStrip("The server no longer knows this conversation's selection. The next message shows one.");
  }
}

function showChats(on) {
  element("chats").classList.toggle("shown", on);
  element("show-chats").setAttribute("aria-expanded", String(on));
}

function setRunning(on) {
  element("send").disabled = on;
  element("stop").disabled = !on;
  if (!on) message.focus();
}

function askForKey() {
  element("key-form").hidden = false;
  element("key").value = "";
  element("key").focus();
}

function send() {
  const text = message.value.trim();
  if (!text || running) return;
  if (!element("settings-form").checkValidity()) {
    element("settings").open = true;
    element("settings-form").reportValidity();
    return;
  }
  message.value = "";
  answering = ask(text);
}

// What the server offers: the model's name, its defaults, and its named tasks.
async function begin() {
  try {
    const [served] = (await getJSON("/v1/models")).data;
    model = served.id;
    element("model").textContent = document.title = model;
    const { tasks } = await getJSON("/v1/ifprune/tasks");
    choice.querySelectorAll("option[value^='task:']").forEach((option) => option.remove());
    for (const task of tasks) choice.add(new Option(`task ${task.name}`, `task:${task.name}`));
    const own = served.ifprune;
    selector = own.selector;
    density.value = own.density;
    choice.value = own.task ? `task:${own.task}` : own.dense ? "dense" : own.chat_policy;
    element("key-form").hidden = true;
  } catch (error) {
    if (error instanceof NeedsKey) askForKey();
    else conversation.append(make("p", "error", error.message));
    return;
  }
  // Before, what the user does would be undone by the server's defaults.
  for (const control of [choice, message, element("send"), element("new")]) control.disabled = false;
  await openChat(location.hash.slice(1));
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
element("settings-form").addEventListener("submit", (event) => event.preventDefault());
element("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(element("key").value);
  await begin();
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    running?.abort();
    showChats(false);
    element("settings").open = false;
  }
});
element("stop").addEventListener("click", () => running?.abort());
element("new").addEventListener("click", () => openChat(""));
element("export").addEventListener("click", exportChat);
element("search").addEventListener("input", showList);
element("show-chats").addEventListener("click", () => showChats(element("show-chats").getAttribute("aria-expanded") === "false"));
density.addEventListener("input", showSettings);
choice.addEventListener("change", showSettings);
addEventListener("hashchange", () => { if (model) openChat(location.hash.slice(1)); });
addEventListener("storage", showList); // of another tab
addEventListener("pagehide", () => { if (running) keep(); });
begin();
