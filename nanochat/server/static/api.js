// The server's API: JSON, Server-Sent Events, and errors in the server's own sentences.

import { recall, remember } from "./storage.js";

const TOKEN = "nanochat/token";
let tokenAsked = null;  // one question for all requests that wait for the answer

/** What the server refused, in its words. status 0: no answer at all. */
export class ServerError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export const access = { ask: async () => null };  // ask(sentence) returns a token, or null when the user has none

/** Return the answer to GET, or to POST when there is a body. Throws ServerError; asks for a token on 401. */
async function request(path, body, signal) {
  for (;;) {
    const token = recall(TOKEN, "sessionStorage");
    const headers = { ...(body && { "Content-Type": "application/json" }), ...(token && { Authorization: `Bearer ${token}` }) };
    const init = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body), cache: "no-store" };
    const response = await fetch(path, init).catch((error) => {
      throw signal?.aborted ? error : new ServerError("the server cannot be reached");
    });
    if (response.ok) return response;
    const { message = `the server answered ${response.status}`, code } = await errorOf(response);
    if (response.status !== 401 || !(await newToken(message))) throw new ServerError(message, response.status, code);
  }
}

async function newToken(sentence) {
  tokenAsked ??= askedToken(sentence).finally(() => { tokenAsked = null; });
  const token = await tokenAsked;
  if (token) remember(TOKEN, token, "sessionStorage");
  return Boolean(token);
}

/** Return a token that can be a header's value, as every server's is; what is pasted may have signs nobody sees. */
async function askedToken(sentence) {
  for (;;) {
    const token = (await access.ask(sentence))?.trim();
    const strange = token?.match(/[^ -~]/u);
    if (!strange) return token;
    const code = strange[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    sentence = `A token must be printable ASCII; this one has U+${code} at place ${strange.index + 1}.`;
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error ?? {};
  } catch {
    return {};
  }
}

/** Return when the server can answer. Throws ServerError with the reason it cannot. */
export async function health() {
  await request("/health");
}

/** Return {id, max_model_len, tools, defaults} of the model. */
export async function model() {
  return (await (await request("/v1/models")).json()).data[0];
}

/** Yield the chunks of an answer as they come. Throws ServerError when it ends early. */
export async function* chat(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("/v1/chat/completions", { ...body, ...options }, signal);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, response.status, chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    throw error instanceof ServerError || signal.aborted ? error : new ServerError("the connection broke off");
  }
  throw new ServerError("the connection ended before the answer did");
}

/** Yield the data of Server-Sent Events. The network cuts anywhere: inside an event, a line end or a character. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "", data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split(/\r\n|\n|\r(?!$)/);  // the \n of a last \r may be still to come
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (!line && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
