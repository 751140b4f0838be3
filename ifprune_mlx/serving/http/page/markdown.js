// Shows a model's Markdown. HTML in it stays text, images become links, and nothing is loaded or run.

const HIGHLIGHTED = 50_000; // characters of a code block; a longer one would hold up the page
const ALLOWED = {
  ALLOWED_TAGS: "p br strong em s code pre span a ul ol li blockquote h1 h2 h3 h4 h5 h6 hr table thead tbody tr th td".split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};
const markdown = markdownit({ html: false, breaks: true, linkify: true, highlight });
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false }); // main.py is a file
const { escapeHtml } = markdown.utils;
markdown.renderer.rules.image = (tokens, at) => {
  const address = escapeHtml(tokens[at].attrGet("src") ?? "");
  return `<a href="${address}">image: ${escapeHtml(tokens[at].content) || address}</a>`;
};
for (const cell of ["th", "td"]) { // their alignment is a style, which the page's policy forbids
  markdown.renderer.rules[`${cell}_open`] = (tokens, at) => `<${cell} class="${(tokens[at].attrGet("style") ?? "").replace("text-align:", "align-")}">`;
}

function highlight(code, language) {
  if (code.length > HIGHLIGHTED || !hljs.getLanguage(language)) return "";
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

// Shows `text` in `container`. What was shown before stays where it is the same, so that a growing answer can be
// selected and scrolled in.
export function showMarkdown(container, text) {
  const lines = text.split("\n");
  let at = 0;
  for (const tokens of blocks(markdown.parse(text, {}))) {
    const [first, end] = tokens[0].map;
    const source = lines.slice(first, end).join("\n");
    const old = container.children[at];
    at += 1;
    if (old?.source === source) continue;
    const block = document.createElement("div");
    block.source = source;
    block.append(DOMPurify.sanitize(markdown.renderer.render(tokens, markdown.options, {}), ALLOWED));
    block.querySelectorAll("a").forEach(makeOutside);
    block.querySelectorAll("pre").forEach((pre) => addCopy(pre, tokens[0].info));
    if (old) old.replaceWith(block);
    else container.append(block);
  }
  while (container.children.length > at) container.lastElementChild.remove();
}

// The tokens of each block that stands in no other one.
function* blocks(tokens) {
  let begin = 0;
  for (let at = 0; at < tokens.length; at += 1) {
    if (tokens[at].level > 0 || tokens[at].nesting === 1) continue;
    yield tokens.slice(begin, at + 1);
    begin = at + 1;
  }
}

function makeOutside(link) {
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  link.title = link.href; // where it leads, whatever it says
}

function addCopy(pre, info) {
  const bar = document.createElement("div");
  bar.className = "code-bar";
  const language = document.createElement("span");
  language.textContent = info?.trim().split(/\s/)[0] ?? "";
  bar.append(language, copyButton("Copy code", () => pre.textContent, pre));
  pre.before(bar);
}

// A button that copies `text()`; where the browser does not let it, it selects `shown` for the user to copy.
export function copyButton(label, text, shown) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = label;
  button.addEventListener("click", async () => {
    let done = "Copied";
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      getSelection().selectAllChildren(shown);
      done = "Selected";
    }
    button.textContent = done;
    setTimeout(() => { button.textContent = label; }, 1500);
  });
  return button;
}
