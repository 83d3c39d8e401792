// The server's HTTP side: models, health, metrics, and a streamed chat completion.

let apiKey = "";

export function setKey(key) {
  apiKey = key.trim();
}

function headers(extra = {}) {
  return apiKey ? { ...extra, Authorization: `Bearer ${apiKey}` } : extra;
}

async function problem(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error?.message ?? message;
  } catch {
    return new Error(message); // no JSON: the status says what there is to say
  }
  return new Error(message);
}

export async function models() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await problem(response);
  return (await response.json()).data.map((model) => model.id);
}

/** "ready", "starting" or "down". */
export async function health() {
  try {
    const response = await fetch("ready", { headers: headers(), cache: "no-store" });
    return response.ok ? "ready" : "starting";
  } catch {
    return "down";
  }
}

export async function metricsText() {
  const response = await fetch("metrics", { headers: headers(), cache: "no-store" });
  if (!response.ok) throw await problem(response);
  return response.text();
}

/** Server-sent events as the objects in their data lines. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // comments keep the connection alive
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Calls `onDelta(delta)` for each piece; returns {finish, usage}. Throws what the server says is wrong. */
export async function streamChat(body, { signal, onDelta }) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await problem(response);
  let finish = null;
  let usage = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message ?? "the server ended the stream with an error");
    usage = event.usage ?? usage;
    const choice = event.choices?.[0];
    if (!choice) continue;
    finish = choice.finish_reason ?? finish;
    if (choice.delta) onDelta(choice.delta);
  }
  if (finish === null && !signal.aborted) throw new Error("the stream ended before the answer did");
  return { finish, usage };
}
