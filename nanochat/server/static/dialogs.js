// The two dialogs: a question, and the settings. Both are native ones: focus stays inside, Escape closes them.

import { $ } from "./dom.js";
import { recall, remember } from "./storage.js";
import * as store from "./store.js";

const SETTINGS = "nanochat/settings";
const NUMBERS = ["temperature", "max_tokens", "top_k", "top_p", "seed"];
const form = $("settings").querySelector("form");

for (const button of document.querySelectorAll("[data-close]")) button.onclick = () => button.closest("dialog").close();

/** Ask the user; returns what was typed ("" where there is nothing to type), or null when it was cancelled. */
export function ask({ title, text = "", value = null, secret = false, ok }) {
  const dialog = $("ask"), input = $("ask-value");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-ok").textContent = ok;
  input.hidden = value === null;
  input.type = secret ? "password" : "text";
  input.value = value ?? "";
  let answer = null;
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    answer = input.value;
    dialog.close();
  };
  dialog.showModal();
  input.select();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(answer), { once: true }));
}

/** Return what the user has set: numbers by the API's names, and the system prompt. */
export function settings() {
  try {
    return JSON.parse(recall(SETTINGS)) ?? {};
  } catch {
    return {};
  }
}

/** Open the settings. defaults: the server's, by the API's names; changed and deleted are called after it happened. */
export function openSettings({ defaults = {}, changed, deleted }) {
  const set = settings();
  for (const name of NUMBERS) {
    form[name].value = set[name] ?? "";
    if (name !== "seed") form[name].placeholder = defaults[name] ?? "";
  }
  form.system.value = set.system ?? "";
  $("settings-news").textContent = "";
  form.onsubmit = (event) => {
    event.preventDefault();
    const given = NUMBERS.filter((name) => form[name].value !== "").map((name) => [name, form[name].valueAsNumber]);
    const system = form.system.value.trim();
    remember(SETTINGS, JSON.stringify({ ...Object.fromEntries(given), ...(system && { system }) }));
    $("settings").close();
  };
  $("delete-all").onclick = async () => {
    const text = "All of them will be gone for good.";
    if (await ask({ title: "Delete all conversations?", text, ok: "Delete all" }) === null) return;
    for (const { id } of store.list()) store.remove(id);
    $("settings-news").textContent = "All conversations are deleted.";
    deleted();
  };
  $("file").onchange = async () => {
    const [file] = $("file").files;
    try {
      $("settings-news").textContent = `Imported ${store.imported(await file.text())} conversations.`;
      changed();
    } catch (error) {
      $("settings-news").textContent = error.message;
    }
    $("file").value = "";
  };
  $("settings").showModal();
}

$("import").onclick = () => $("file").click();
$("export").onclick = () => {
  const url = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  const link = document.createElement("a");
  Object.assign(link, { href: url, download: `nanochat-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
};
