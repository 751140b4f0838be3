// The conversations, kept in this browser: one entry of localStorage each, so that two tabs do not overwrite each other.
// {id, title, changed, model, settings, turns: [{question, answer, beside}]}; see `answer.js` for the answers.

const PREFIX = "ifprune.chat.";

export function newChat() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", changed: 0, model: "", settings: null, turns: [] };
}

export function loadChat(id) {
  try {
    const chat = JSON.parse(localStorage.getItem(PREFIX + id));
    return Array.isArray(chat?.turns) ? chat : null;
  } catch {
    return null; // it is damaged, or this browser keeps nothing
  }
}

export function saveChat(chat) {
  chat.changed = Date.now();
  chat.title ||= chat.turns[0].question.slice(0, 80);
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
  } catch {
    throw new Error("this browser has no room for the conversation; export it, or delete others");
  }
}

export function deleteChat(id) {
  localStorage.removeItem(PREFIX + id);
}

// Those that hold `text`, the latest first.
export function findChats(text) {
  const sought = text.toLowerCase();
  const said = (chat) => chat.turns.flatMap((turn) => [turn.question, turn.answer?.content, turn.beside?.content]);
  return names()
    .filter((name) => name.startsWith(PREFIX))
    .map((name) => loadChat(name.slice(PREFIX.length)))
    .filter((chat) => chat && said(chat).some((part) => part?.toLowerCase().includes(sought)))
    .sort((one, other) => other.changed - one.changed);
}

function names() {
  try {
    return Object.keys(localStorage);
  } catch {
    return []; // this browser keeps nothing
  }
}

// A conversation as a Markdown text.
export function asMarkdown(chat) {
  const parts = [`# ${chat.title}`, `${chat.model}, ${new Date(chat.changed).toLocaleString()}`];
  if (chat.settings?.system) parts.push(`## System prompt\n\n${chat.settings.system}`);
  for (const { question, answer, beside } of chat.turns) {
    parts.push(`## Question\n\n${question}`, `## Answer\n\n${answer.content}`);
    if (beside) parts.push(`## Dense answer\n\n${beside.content}`);
  }
  return `${parts.join("\n\n")}\n`;
}
