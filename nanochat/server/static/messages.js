// The messages of a conversation on the page: built once each, replaced when they change, and the scrolling.

import { $, copyButton, element, iconButton } from "./dom.js";
import { render } from "./markdown.js";
import { path, siblings } from "./store.js";

const log = $("log"), messages = $("messages");
const touch = matchMedia("(pointer: coarse)");
const built = new Map();  // node's id -> its element
export let editing = null;  // id of the message that is being edited; it stays, whatever another tab picks

/** Show a conversation, or the welcome for null. live: the node that is being written here, or undefined.
 *
 *  actions: edit(node, text), again(node), pick(node), refresh(). limit: tokens of the model's context, if known. */
export function show(conversation, live, actions, limit) {
  const nodes = conversation ? path(conversation, editing) : [];
  if (!nodes.some((node) => node.id === editing)) editing = null;
  const wanted = nodes.map((node) => node.id === live?.id ? messageOf(live, [live], true, actions, limit)
    : messageOf(node, siblings(conversation, node), false, actions, limit));
  for (const [id, made] of built) if (!wanted.includes(made)) built.delete(id);
  for (const old of [...messages.children]) if (!wanted.includes(old)) old.remove();
  let at = messages.firstChild;
  for (const made of wanted) {  // moving an element would take its focus away
    if (made === at) at = at.nextSibling;
    else messages.insertBefore(made, at);
  }
  for (const button of messages.querySelectorAll("[data-change]")) button.disabled = Boolean(live);
  $("welcome").hidden = nodes.length > 0;
  log.setAttribute("aria-busy", String(Boolean(live)));
  follow();
}

/** Return what a button does that changes its message: an edit of a later one would stand where nothing leads. */
function changing(act) {
  return ({ currentTarget }) => {
    const editor = messages.querySelector(".editor");
    if (editor && currentTarget.compareDocumentPosition(editor) & Node.DOCUMENT_POSITION_FOLLOWING) editing = null;
    act();
  };
}

/** Show what has been added to the node that is being written. */
export function update(node) {
  const made = built.get(node.id);
  if (made) showText(made.querySelector(".text"), node);
  follow();
}

function messageOf(node, branches, isLive, actions, limit) {
  const signature = editing === node.id ? "edited"  // and nothing that happens meanwhile takes away what is typed
    : JSON.stringify([isLive || node, branches.map((one) => one.id), limit]);
  const before = built.get(node.id);
  if (before?.signature === signature) return before;
  const user = node.role === "user";
  const made = element("article", { className: `message ${node.role}`, "aria-label": user ? "You" : "nanochat" });
  made.signature = signature;
  if (editing === node.id) made.append(editor(node, actions));
  else {
    const said = user ? [element("div", { className: "bubble" }, node.text)] : answer(node, isLive, actions);
    made.append(...said, isLive ? element("footer") : footer(node, branches, actions, limit));
  }
  built.set(node.id, made);
  return made;
}

function answer(node, isLive, actions) {
  const text = element("div", { className: "text" });
  showText(text, node, isLive);
  if (node.state !== "failed") return [text];
  const again = element("button", { type: "button", onclick: changing(() => actions.again(node)), "data-change": "" }, "Try again");
  return [text, element("div", { className: "error", role: "alert" }, element("p", {}, node.error), again)];
}

function showText(text, node, isLive = true) {
  render(text, node.text, node.calls.map((call) => ({ at: call.at, make: () => toolCall(call) })));
  if (isLive && !node.text && !node.calls.length) text.append(element("span", { className: "dots", role: "img", "aria-label": "Thinking" },
    element("i"), element("i"), element("i")));
}

function toolCall({ input, output }) {
  return element("span", { className: "tool" }, element("b", {}, "python: "), input, " → ",
    element("strong", {}, output ?? "refused"));
}

function footer(node, branches, actions, limit) {
  const made = element("footer");
  const change = (name, label, onclick) => {
    const button = iconButton(name, label, changing(onclick));
    button.dataset.change = "";  // nothing can be changed while an answer is written
    return button;
  };
  if (branches.length > 1) made.append(switcher(node, branches, actions, change));
  if (node.text) made.append(copyButton("Copy message", () => node.text));
  if (node.role === "user") made.append(change("edit", "Edit message", () => {
    editing = node.id;
    actions.refresh();
    messages.querySelector(".editor textarea").focus();
  }));
  else made.append(change("again", "Answer again", () => actions.again(node)), facts(node, limit));
  return made;
}

function switcher(node, branches, actions, change) {
  const at = branches.findIndex((one) => one.id === node.id);
  const button = (name, label, to) => {
    if (branches[to]) return change(name, label, () => {
      actions.pick(branches[to]);
      const now = built.get(branches[to].id);
      (now.querySelector(`[aria-label="${label}"]:enabled`) ?? now.querySelector(".switcher button:enabled")).focus();
    });
    const none = iconButton(name, label);
    none.disabled = true;
    return none;
  };
  return element("span", { className: "switcher", role: "group", "aria-label": "Versions" },
    button("left", "Previous version", at - 1), element("span", {}, `${at + 1}/${branches.length}`),
    button("right", "Next version", at + 1));
}

/** Return how the answer ended and how fast it came. */
function facts(node, limit) {
  const full = limit && node.usage?.total_tokens >= limit;
  const said = { open: "not finished", stopped: "stopped" }[node.state]
    ?? (node.finish === "length" ? (full ? "cut off: the context is full" : "cut off at the most tokens allowed") : "");
  const { predicted_per_second: rate, time_to_first_token_ms: first } = node.timings ?? {};
  const parts = [said, node.usage && `${count(node.usage.completion_tokens)} tokens`, rate && `${significant(rate)} tokens/s`,
    first !== undefined && `first token after ${duration(first)}`];
  return element("span", { className: "facts quiet", title: node.seed === undefined ? "" : `seed ${node.seed}` },
    parts.filter(Boolean).join(" · "));
}

export const count = (number) => number.toLocaleString("en");
const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const significant = (number) => (number >= 100 ? count(Math.round(number)) : number.toPrecision(2));

function editor(node, actions) {
  const area = element("textarea", { value: node.text, "aria-label": "Edit message", rows: 1 });
  const cancel = () => {
    editing = null;
    actions.refresh();
    built.get(node.id)?.querySelector("[aria-label='Edit message']")?.focus();
  };
  const send = element("button", { type: "submit", className: "strong", "data-change": "" }, "Send");
  const form = element("form", { className: "editor", onsubmit: (event) => {
    event.preventDefault();
    if (!area.value.trim() || send.disabled) return;
    editing = null;
    actions.edit(node, area.value.trim());
  } }, area, element("div", { className: "buttons" },
    element("button", { type: "button", onclick: cancel }, "Cancel"), send));
  area.onkeydown = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else submitOnEnter(event, form);
  };
  area.oninput = () => fit(area);
  requestAnimationFrame(() => fit(area));
  return form;
}

/** Send on Enter, but not on the one that ends the composition of a character, nor with Shift, nor on a touch device,
 *  whose keyboard has no Shift+Enter: there Enter breaks the line, and the button sends. */
export function submitOnEnter(event, form) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229 || touch.matches) return;
  event.preventDefault();
  form.requestSubmit();
}

/** Make a text area as high as its text; the style sheet limits it. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

// --- scrolling: follows the text as long as the reader is at its end ---

let following = true, last = 0;

const gap = () => log.scrollHeight - log.clientHeight - log.scrollTop;

export function follow(always = false) {
  following ||= always;
  if (following) log.scrollTop = log.scrollHeight;
  last = log.scrollTop;
  $("latest").hidden = following || gap() < 40;
}

log.addEventListener("scroll", () => {
  if (log.scrollTop < last) following = gap() < 1;  // a reader who goes up, however little, stays there
  else if (gap() < 40) following = true;
  last = log.scrollTop;
  $("latest").hidden = following;
}, { passive: true });

$("latest").onclick = () => {
  follow(true);
  $("prompt").focus();
};

new ResizeObserver(() => follow()).observe(log);
