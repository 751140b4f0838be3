// Asks the server that this page came from.

let key = ""; // kept in this page only

export class NeedsKey extends Error {}

export function useKey(given) {
  key = given;
}

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

export const getJSON = async (path) => (await call(path)).json();

// The lines of a streamed answer: {comment}, or {event} of a `data:` line. Ends at [DONE] or with the response.
export async function* streamChat(body, signal) {
  const options = { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await call("/v1/chat/completions", options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (pending + value).split(/\r?\n/);
    pending = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield { event };
    }
  }
}
