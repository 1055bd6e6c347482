// @ts-check
/** What went wrong, in the server's words. */
export class Failure extends Error {
  /**
   * @param {number} status
   * @param {string} message
   */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The server's key, if it needs one: kept until the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem("key") ?? "",
  /** @param {string} value */
  set: (value) => sessionStorage.setItem("key", value),
};

/**
 * @param {string} path
 * @param {unknown} [body] what is posted; nothing asks
 * @param {AbortSignal} [signal]
 */
async function ask(path, body, signal) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  const response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (!response.ok) {
    const text = await response.text();
    let message = text;
    try { message = JSON.parse(text).error.message; } catch { /* not the server's own words */ }
    throw new Failure(response.status, message || response.statusText);
  }
  return response;
}

/**
 * @param {string} path
 * @param {unknown} [body]
 * @param {AbortSignal} [signal]
 * @returns {Promise<any>}
 */
export async function json(path, body, signal) {
  return (await ask(path, body, signal)).json();
}

/**
 * The events of a stream, one after the other.
 * @param {string} path
 * @param {unknown} body
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
export async function* events(path, body, signal) {
  const response = await ask(path, body, signal);
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop() ?? "";
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(500, event.error.message);
      yield event;
    }
  }
}

/** @param {string} text base64 */
export const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/**
 * Weights of 16 bits, with their signs.
 * @param {string} text base64
 * @param {number} scale what the greatest number stands for
 */
export function weights(text, scale) {
  const all = new DataView(bytes(text).buffer);
  return Float32Array.from({ length: all.byteLength / 2 }, (_, n) => (scale * all.getInt16(2 * n, true)) / 32767);
}

/**
 * An element that is there.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} kind
 * @returns {T}
 */
export function element(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`no ${id}`);
  return found;
}

/** @param {unknown} [error] nothing takes the notice away */
export function notice(error) {
  const place = element("notice", HTMLElement);
  place.hidden = error === undefined;
  place.textContent = error instanceof Error ? error.message : String(error ?? "");
  if (error instanceof Failure && error.status === 401) element("key-form", HTMLFormElement).hidden = false;
}
