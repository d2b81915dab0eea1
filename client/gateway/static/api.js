// The gateway as the page sees it: requests with the key, event streams that survive a lost
// connection. Must never touch the document.

const KEY = "tokenbus.key";

export const key = {
  get: () => localStorage.getItem(KEY) ?? "",
  set: (value) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

/** A failure with the gateway's own words; `status` 0 is a connection that was not there. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "connection_lost", retryAfterMs = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfterMs });
  }
}

function headers(more = {}) {
  const found = { ...more };
  if (key.get()) found.authorization = `Bearer ${key.get()}`;
  return found;
}

async function failure(response) {
  let body = null;
  try {
    body = (await response.json()).error;
  } catch {
    // Not ours: a proxy's page.
  }
  const wait = response.headers.get("retry-after-ms");
  return new ApiError(body?.message ?? `The gateway answered with status ${response.status}.`, {
    status: response.status,
    code: body?.code ?? "error",
    retryAfterMs: wait === null ? null : Number(wait),
  });
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options?.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The gateway cannot be reached.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export const getJson = async (path) => (await send(path)).json();

export const getPicture = async (path) => (await send(path)).blob();

export const postJson = async (path, body) =>
  (
    await send(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    })
  ).json();

/** The events of a response body: {id, event, data}. `onWaiting` gets the gateway's comments on why
 * nothing comes yet. */
async function* events(response, onWaiting) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const comment = buffer.match(/^: waiting .*$/gm)?.at(-1);
      if (comment) onWaiting(comment.slice(10).replace(/x-[a-z-]+=\S+ ?/g, "").trim());
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const event = { id: null, event: "message", data: "" };
        for (const line of buffer.slice(0, end).split("\n")) {
          const colon = line.indexOf(": ");
          if (colon > 0) event[line.slice(0, colon)] = line.slice(colon + 2);
        }
        buffer = buffer.slice(end + 2);
        if (event.data) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const pause = (ms, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });

/**
 * The chunks of a chat answer. When the connection breaks it is re-attached: to the running answer
 * where that gateway still has it, else by asking again from the last event on.
 *
 * `signal` stops it, at the worker too. `onState("connected" | "reconnecting")` tells the story, and
 * `onState("waiting", why)` what it waits for, if that is known.
 */
export async function* chat(body, { signal, reattachS = 30, onState = () => {} }) {
  const post = {
    method: "POST",
    headers: { "content-type": "application/json", "x-reattach": String(reattachS) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  };
  let last = null;
  let answer = null;
  let deadline = null;
  let wait = 250;
  const cancel = () => {
    if (!answer) return;
    const path = `/v1/chat/completions/${answer}/cancel`;
    fetch(path, { method: "POST", headers: headers(), keepalive: true }).catch(() => {});
  };
  signal.addEventListener("abort", cancel);
  addEventListener("pagehide", cancel);
  try {
    for (;;) {
      try {
        const response = await attach(post, answer, last, signal);
        onState("connected");
        let waits = false;
        const onWaiting = (why) => {
          waits = true;
          onState("waiting", why);
        };
        for await (const event of events(response, onWaiting)) {
          if (event.data === "[DONE]") return;
          if (waits) onState("connected");
          waits = false;
          last = event.id ?? last;
          const chunk = JSON.parse(event.data);
          if (chunk.error) {
            throw new ApiError(chunk.error.message, { status: 500, code: chunk.error.code });
          }
          answer = chunk.id;
          deadline = null;
          wait = 250;
          yield chunk;
        }
        throw new ApiError("The stream broke off.");
      } catch (error) {
        // Before the first event nothing is lost: the caller may simply ask again.
        if (signal.aborted || !last || (error instanceof ApiError && error.status)) throw error;
        deadline ??= Date.now() + reattachS * 1000;
        if (Date.now() > deadline) throw error;
        onState("reconnecting");
        await pause(wait, signal);
        wait = Math.min(wait * 2, 4000);
      }
    }
  } finally {
    signal.removeEventListener("abort", cancel);
    removeEventListener("pagehide", cancel);
  }
}

async function attach(post, answer, last, signal) {
  if (!last) return send("/v1/chat/completions", post);
  const resume = { "last-event-id": last };
  try {
    return await send(`/v1/chat/completions/${answer}`, { headers: resume, signal });
  } catch (error) {
    if (error.status !== 404) throw error;
    return send("/v1/chat/completions", { ...post, headers: { ...post.headers, ...resume } });
  }
}

/** Looks at the bus, one a second, until `signal` aborts. Throws when the stream ends. */
export async function* live(signal) {
  const response = await send("/bus/live", { signal });
  for await (const event of events(response)) yield JSON.parse(event.data);
}
