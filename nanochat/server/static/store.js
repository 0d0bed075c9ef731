// Conversations in localStorage, one key each. Every change reads the stored conversation first, so that two tabs keep
// each other's messages. A conversation is a tree: editing or asking again adds a branch, and nothing is overwritten.
//
// conversation: {id, title, updated (ms), nodes: [node], picked: {parent's id or "root": child's id}}
// node: {id, parent (null for a first message), role, text, calls: [{input, output, at (offset in text)}],
//        state ("open" while it is written, "done", "stopped", "failed"), error, finish, seed, usage, timings}

import { remember } from "./storage.js";

const PREFIX = "nanochat/conversation/";
const ID = /^[0-9a-f]{16}$/;
const unsaved = new Map();  // what the storage had no room for, kept as long as the page lives
const known = new Map();  // conversations as last read

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");

/** Return the key in sessionStorage of what is typed but not sent: two tabs do not mix theirs. */
export const draftKey = (id) => `nanochat/draft/${id ?? "new"}`;

/** Return all conversations, the last changed first. */
export const list = () => [...known.values()].sort((a, b) => b.updated - a.updated);

export const get = (id) => known.get(id);

/** Read everything; call `changed(id)` whenever another tab changes something. */
export function open(changed) {
  try {
    for (const key of Object.keys(localStorage)) if (key.startsWith(PREFIX)) read(key.slice(PREFIX.length));
  } catch {
    return;  // storage is closed: conversations live as long as the page
  }
  addEventListener("storage", ({ key }) => {
    if (key?.startsWith(PREFIX)) {
      read(key.slice(PREFIX.length));
      changed(key.slice(PREFIX.length));
    }
  });
}

function read(id) {
  let found = unsaved.get(id);
  try {
    found ??= checked(JSON.parse(localStorage.getItem(PREFIX + id)));
  } catch {
    // gone, or not ours to touch
  }
  if (found?.id === id) known.set(id, found);
  else known.delete(id);
  return known.get(id);
}

/** Store a conversation, or keep it for as long as the page lives where there is no room. */
function write(conversation) {
  known.set(conversation.id, conversation);
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    unsaved.delete(conversation.id);
  } catch {
    unsaved.set(conversation.id, conversation);
  }
}

/** Say whether something is kept in this page only. */
export const isFull = () => unsaved.size > 0;

export function create(title) {
  const conversation = { id: newId(), title, updated: Date.now(), nodes: [], picked: {} };
  write(conversation);
  return conversation.id;
}

/** Put nodes into a conversation, new or changed; new ones are picked. Nothing happens when it has been deleted. */
export function put(id, ...nodes) {
  const conversation = read(id);
  if (!conversation) return;
  for (const node of nodes) {
    const at = conversation.nodes.findIndex((other) => other.id === node.id);
    if (at >= 0) conversation.nodes[at] = { ...node };
    else {
      conversation.nodes.push({ ...node });
      Object.assign(conversation.picked, picksTo(conversation, node.id));
    }
  }
  conversation.updated = Date.now();
  write(conversation);
}

export function pick(id, node) {
  const conversation = read(id);
  if (!conversation) return;
  conversation.picked[node.parent ?? "root"] = node.id;
  write(conversation);
}

export function rename(id, title) {
  const conversation = read(id);
  if (conversation) write({ ...conversation, title });
}

export function remove(id) {
  unsaved.delete(id);
  known.delete(id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // it was never stored
  }
  remember(draftKey(id), "", "sessionStorage");
  for (const waiting of [...unsaved.values()]) write(waiting);  // there may be room now
}

export const siblings = (conversation, node) => conversation.nodes.filter((other) => other.parent === node.parent);

/** Return which child of each message leads to the node `id`: nothing when there is no such node. */
function picksTo({ nodes }, id) {
  const picks = {};
  for (let node; (node = nodes.find((other) => other.id === id)); id = node.parent) picks[node.parent ?? "root"] = id;
  return picks;
}

/** Return the nodes from the first message to the last along the branches that are picked, or by way of a node. */
export function path(conversation, through = null) {
  const nodes = [], picks = { ...conversation.picked, ...picksTo(conversation, through) };
  for (let parent = null; ;) {
    const children = conversation.nodes.filter((node) => node.parent === parent);
    if (!children.length) return nodes;
    const picked = picks[parent ?? "root"];
    nodes.push(children.find((node) => node.id === picked) ?? children.at(-1));
    parent = nodes.at(-1).id;
  }
}

/** Return the messages of a path as the server takes them: user and assistant in turns, so questions that got no
 *  answer are left out. */
export function history(nodes) {
  const messages = [];
  for (const { role, text } of nodes) {
    const asked = messages.at(-1)?.role === "user";
    if (role === "user" && asked) messages.pop();
    if (role === "user" || (asked && text)) messages.push({ role, content: text });
  }
  return messages;
}

// --- files ---

export const exported = () => JSON.stringify({ format: "nanochat conversations", version: 1, conversations: list() }, null, 1);

/** Add the conversations of a file to those here, message by message; returns how many there were. Throws Error. */
export function imported(text) {
  let conversations;
  try {
    const data = JSON.parse(text);
    if (data.format !== "nanochat conversations" || data.version !== 1) throw new Error();
    conversations = data.conversations.map(checked);
  } catch {
    throw new Error("This is not a file of conversations exported here; nothing was imported.");
  }
  for (const one of conversations) {
    const mine = read(one.id) ?? { ...one, nodes: [] };
    const ids = new Set(mine.nodes.map((node) => node.id));
    write({ ...mine, nodes: [...mine.nodes, ...one.nodes.filter((node) => !ids.has(node.id))] });
  }
  return conversations.length;
}

/** Return a conversation with the fields we know and no others. Throws TypeError when one is not what it must be. */
function checked({ id, title, updated, nodes, picked }) {
  const clean = nodes.map(checkedNode);
  const ids = new Set(clean.map((node) => node.id));
  require(ID.test(id) && isText(title) && Number.isFinite(updated) && ids.size === clean.length);
  const links = Object.entries(picked).filter(([parent, child]) => (parent === "root" || ID.test(parent)) && ids.has(child));
  return { id, title, updated, nodes: clean, picked: Object.fromEntries(links) };
}

function checkedNode({ id, parent, role, text, calls, state, error, finish, seed, usage, timings }) {
  require(ID.test(id) && (parent === null || ID.test(parent)) && ["user", "assistant"].includes(role) && isText(text));
  const node = { id, parent, role, text };
  if (role === "user") return node;
  require(["open", "done", "stopped", "failed"].includes(state) && (error === undefined || isText(error)));
  node.calls = calls.map(({ input, output, at }) => {
    require(isText(input) && (output === null || isText(output)) && Number.isInteger(at));
    return { input, output, at };
  });
  const numbers = (from, names) => {
    const picked = names.map((name) => [name, from[name]]);
    require(picked.every(([, value]) => Number.isFinite(value)));
    return Object.fromEntries(picked);
  };
  return { ...node, state, error, finish: finish === "length" ? finish : undefined,
    ...(seed === undefined ? {} : numbers({ seed }, ["seed"])),
    usage: usage && numbers(usage, ["total_tokens", "completion_tokens"]),
    timings: timings && numbers(timings, ["predicted_per_second", "time_to_first_token_ms"]) };
}

const isText = (value) => typeof value === "string";

function require(condition) {
  if (!condition) throw new TypeError("not a conversation");
}
