// The page: what the buttons and keys do, and the requests that are under way.

import * as api from "./api.js";
import { ask, openSettings, settings } from "./dialogs.js";
import { $, element, iconButton, say } from "./dom.js";
import { count, editing, fit, follow, show, submitOnEnter, update } from "./messages.js";
import { recall, remember } from "./storage.js";
import * as store from "./store.js";

const NEARLY_FULL = 0.85;  // of the context: time to say so
const EXAMPLES = ["Why is the sky blue?", "What is 37 + 85?", "How many letters r are in strawberry?"];
const SAVE_MS = 1000;

const running = new Map();  // conversation's id -> {node, controller}
const prompt = $("prompt");
const narrow = matchMedia("(max-width: 760px)");
let current = null;  // id of the conversation on the page, null for one that is yet to begin
let model = null;  // once the server is ready
let connecting = false;
let trouble = "The server is being asked…";  // why nothing can be sent

// --- asking the server ---

/** Wait until the server is ready, telling why it is not. */
async function connect() {
  if (connecting) return;
  connecting = true;
  try {
    await ready();
  } finally {
    connecting = false;
  }
}

async function ready() {
  for (let wait = 300; ; wait = Math.min(wait * 1.5, 3000)) {
    try {
      await api.health();
      model = await api.model();
      trouble = "";
      return refresh();
    } catch (error) {
      trouble = error.message;
      refresh();
      if (error.status === 401) return;
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

/** Add an answer to the message `parent` and write it as it comes. */
async function answer(id, parent) {
  const node = { id: store.newId(), parent, role: "assistant", text: "", calls: [], state: "open" };
  const controller = new AbortController();
  store.put(id, node);
  const nodes = store.path(store.get(id)).slice(0, -1);
  running.set(id, { node, controller });
  refresh();
  follow(true);
  const saver = setInterval(() => store.put(id, node), SAVE_MS);
  try {
    const { system, ...sampling } = settings();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...store.history(nodes)];
    for await (const chunk of api.chat({ messages, ...sampling }, controller.signal)) {
      take(node, chunk);
      if (id === current) paint(node);
    }
    node.state = "done";
  } catch (error) {
    node.state = controller.signal.aborted ? "stopped" : "failed";
    if (node.state === "failed") node.error = error.message;
    if (error.status === 503 || error.status === 0) connect();
  } finally {
    clearInterval(saver);
    running.delete(id);
    store.put(id, node);
    refresh();
    if (id === current) say({ done: "The answer is complete", stopped: "Stopped" }[node.state] ?? "");
  }
}

/** Add a chunk to an answer. */
function take(node, chunk) {
  const { delta = {}, finish_reason: finish } = chunk.choices[0] ?? {};
  node.text += delta.content ?? "";
  for (const call of delta.tool_trace ?? []) node.calls.push({ ...call, at: node.text.length });
  if (finish) node.finish = finish;
  for (const name of ["seed", "usage", "timings"]) if (chunk[name] != null) node[name] = chunk[name];
}

let painting = 0;
function paint(node) {
  painting ||= requestAnimationFrame(() => {
    painting = 0;
    if (running.get(current)?.node === node) update(node);
  });
}

// --- what the user does ---

function send(text) {
  const id = current ?? store.create(text.split("\n", 1)[0].slice(0, 80));
  const nodes = store.path(store.get(id), editing);
  const node = { id: store.newId(), parent: nodes.at(-1)?.id ?? null, role: "user", text };
  store.put(id, node);
  if (!current) {
    current = id;
    history.pushState(null, "", `#${id}`);
  }
  answer(id, node.id);
}

const actions = {
  refresh,
  edit(node, text) {
    const changed = { ...node, id: store.newId(), text };
    store.put(current, changed);
    prompt.focus();
    answer(current, changed.id);
  },
  again(node) {
    prompt.focus();
    answer(current, node.parent);
  },
  pick(node) {
    store.pick(current, node);
    refresh();
  },
};

function go(id) {
  current = id && store.get(id) ? id : null;
  const shown = location.hash.slice(1);
  const change = shown && !store.get(shown) ? "replaceState" : "pushState";  // nobody goes back to what is gone
  if (shown !== (current ?? "")) history[change](null, "", current ? `#${current}` : location.pathname);
  prompt.value = recall(store.draftKey(current), "sessionStorage") ?? "";
  fit(prompt);
  openMenu(false);
  refresh();
  follow(true);
}

function newChat() {
  go(null);
  prompt.focus();
}

const keepDraft = () => remember(store.draftKey(current), prompt.value, "sessionStorage");

// --- what the page shows ---

function refresh() {
  const conversation = current && store.get(current);
  if (!conversation) current = null;
  const run = running.get(current);
  show(conversation, run?.node, actions, model?.max_model_len);
  $("title").textContent = conversation?.title ?? "New chat";
  document.title = conversation ? `${conversation.title} · nanochat` : "nanochat";
  $("about").textContent = model ? `${model.id}, with room for ${count(model.max_model_len)} tokens of conversation` : "";
  $("send").hidden = Boolean(run);
  $("stop").hidden = !run;
  $("send").disabled = !model || Boolean(trouble) || !prompt.value.trim();
  showList();
  showContext(conversation);
}

function showContext(conversation) {
  const used = conversation ? store.path(conversation, editing).findLast((node) => node.usage)?.usage.total_tokens : 0;
  const limit = model?.max_model_len;
  $("context").textContent = used && limit ? `${count(used)} of ${count(limit)} tokens` : "";
  const near = used && limit && used >= NEARLY_FULL * limit;
  $("context").classList.toggle("near", Boolean(near));
  const notices = [trouble,
    store.isFull() && "The browser's storage is full: export what you want to keep, and delete what you do not.",
    near && `This conversation fills ${Math.floor((100 * used) / limit)} % of the model's context. A new chat has room.`];
  const sentence = notices.find(Boolean) ?? "";
  if ($("notice").textContent !== sentence) $("notice").textContent = sentence;
  $("notice").classList.toggle("waiting", Boolean(trouble));
}

function showList() {
  const wanted = store.list().map(({ id, title }) => JSON.stringify([id, title, id === current, running.has(id)]));
  const list = $("conversations");
  if (list.signature === wanted.join()) return;
  const focused = list.contains(document.activeElement) && document.activeElement.dataset.key;
  list.signature = wanted.join();
  list.replaceChildren(...store.list().map(entry));
  const next = list.querySelector(`[data-key="${focused}"]`) ?? $("new");
  if (focused) ($("sidebar").inert ? $("menu") : next).focus();
}

function entry({ id, title }) {
  const link = element("a", { href: `#${id}`, title, "data-key": id }, title);
  if (id === current) link.setAttribute("aria-current", "page");
  if (running.has(id)) link.append(element("span", { className: "unseen" }, " (being answered)"));
  const rename = iconButton("edit", `Rename ${title}`, async () => {
    const name = await ask({ title: "Rename the conversation", value: title, ok: "Rename" });
    if (name?.trim()) store.rename(id, name.trim());
    refresh();
  });
  const remove = iconButton("delete", `Delete ${title}`, async () => {
    if (await ask({ title: "Delete the conversation?", text: `“${title}” will be gone for good.`, ok: "Delete" }) === null) return;
    running.get(id)?.controller.abort();
    store.remove(id);
    if (id === current) go(null);
    refresh();
  });
  rename.dataset.key = `${id}/rename`;
  remove.dataset.key = `${id}/delete`;
  return element("li", { className: running.has(id) ? "running" : "" }, link, rename, remove);
}

function openMenu(open) {
  document.body.classList.toggle("menu-open", open && narrow.matches);
  $("sidebar").inert = narrow.matches && !open;
  document.querySelector("main").inert = narrow.matches && open;
  $("menu").setAttribute("aria-expanded", String(open));
}

// --- wiring ---

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (trouble) connect();  // who has refused to give a token is asked again
  if (!text || running.has(current) || trouble) return;
  prompt.value = "";
  keepDraft();
  fit(prompt);
  if ($("send").matches(":focus-visible")) prompt.focus();  // the button gives way to Stop
  send(text);
};
prompt.onkeydown = (event) => submitOnEnter(event, $("composer"));
prompt.oninput = () => {
  fit(prompt);
  keepDraft();
  $("send").disabled = !model || Boolean(trouble) || !prompt.value.trim();
};
$("stop").onclick = () => {
  running.get(current)?.controller.abort();
  prompt.focus();
};
$("new").onclick = newChat;
$("menu").onclick = () => {
  openMenu(true);
  $("new").focus();
};
$("scrim").onclick = () => openMenu(false);
$("skip").onclick = () => prompt.focus();
$("open-settings").onclick = () => openSettings({ defaults: model?.defaults, changed: refresh, deleted: () => {
  for (const { controller } of running.values()) controller.abort();
  go(null);
} });
$("theme").onclick = () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const wanted = (document.documentElement.dataset.theme || system) === "dark" ? "light" : "dark";
  const chosen = wanted === system ? "" : wanted;  // what the system wants is followed, also when it changes its mind
  document.documentElement.dataset.theme = chosen;
  remember("nanochat/theme", chosen);
};
$("examples").append(...EXAMPLES.map((text) => element("button", { type: "button", onclick: () => {
  prompt.value = text;
  prompt.oninput();
  prompt.focus();
} }, text)));

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.body.classList.contains("menu-open")) {
    openMenu(false);
    $("menu").focus();
  } else if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) {
    running.get(current)?.controller.abort();
  } else if (event.key.toLowerCase() === "o" && (event.ctrlKey || event.metaKey) && event.shiftKey) {
    event.preventDefault();
    if (!document.querySelector("dialog[open]")) newChat();
  }
});
addEventListener("popstate", () => go(location.hash.slice(1)));
addEventListener("pagehide", () => {
  for (const [id, { node }] of running) store.put(id, node);
});
narrow.onchange = () => openMenu(false);
api.access.ask = (sentence) => ask({ title: "This server asks for a token", text: sentence, value: "", secret: true, ok: "Continue" });

store.open((id) => {
  if (!store.get(id)) running.get(id)?.controller.abort();  // deleted in another tab: nobody could stop it any more
  refresh();
});
go(location.hash.slice(1));
connect();
document.body.dataset.ready = "";  // what is clicked from now on is answered
