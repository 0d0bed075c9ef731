// Elements from text, never from markup: whatever a model, a user or a server says stays text.

export const $ = (id) => document.getElementById(id);

/** Return a new element; `properties` are assigned, "aria-" and "data-" ones become attributes. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(aria|data)-|^role$/.test(name)) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export function icon(name) {
  const [svg, use] = ["svg", "use"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Return a button that shows an icon and is called `label`. */
export function iconButton(name, label, onclick) {
  return element("button", { type: "button", className: "icon", "aria-label": label, title: label, onclick }, icon(name));
}

/** Return a button that copies what `text` returns, and says so. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    say(copied ? "Copied" : "The browser does not allow copying");
    if (!copied) return;
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Tell screen readers. */
export function say(text) {
  $("status").textContent = "";
  $("status").textContent = text;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const area = element("textarea", { value: text, className: "unseen" });  // plain http has no navigator.clipboard
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}
