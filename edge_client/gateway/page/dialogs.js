// The three dialogs. The browser traps the focus in them, and Esc closes them.

import { byId } from "./dom.js";

/** Wire the buttons that close without doing anything. */
export function prepare() {
  for (const button of document.querySelectorAll("dialog [data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
}

function onSubmit(id, action) {
  byId(id).querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    if (action() !== false) byId(id).close();
  };
}

const FIELDS = [
  { id: "set-temperature", name: "temperature", label: "Temperature", isValid: (value) => value >= 0 && value <= 100, rule: "a number from 0 to 100" },
  { id: "set-tokens", name: "maxTokens", label: "Longest answer", isValid: (value) => Number.isInteger(value) && value >= 1 && value < 2 ** 31, rule: "a whole number from 1" },
  { id: "set-seed", name: "seed", label: "Seed", isValid: (value) => Number.isSafeInteger(value) && value >= 0, rule: "a whole number from 0, or nothing" },
];

/** Let the user change `conversation.settings`; `done()` when they were changed. */
export function editSettings(conversation, defaults, done) {
  byId("set-system").value = conversation.settings.system ?? "";
  byId("set-temperature").placeholder = defaults ? String(defaults.temperature) : "";
  byId("set-tokens").placeholder = defaults ? String(defaults.max_tokens) : "";
  byId("settings-fault").hidden = true;
  for (const { id, name } of FIELDS) {
    byId(id).value = conversation.settings[name] ?? "";
    byId(id).removeAttribute("aria-invalid");
  }
  onSubmit("settings", () => {
    const settings = { system: byId("set-system").value.trim() || undefined };
    for (const { id, name, label, isValid, rule } of FIELDS) {
      const text = byId(id).value.trim().replace(",", ".");
      const value = text === "" ? undefined : Number(text);
      if (value !== undefined && !isValid(value)) return complain(byId(id), `${label}: expected ${rule}.`);
      settings[name] = value;
    }
    conversation.settings = settings;
    return done();
  });
  byId("settings").showModal();
}

function complain(input, words) {
  byId("settings-fault").textContent = words;
  byId("settings-fault").hidden = false;
  input.setAttribute("aria-invalid", "true");
  input.focus();
  return false;
}

/** Ask before a conversation goes; `done()` when it shall. */
export function confirmDelete(conversation, done) {
  byId("delete-text").textContent = `\u201c${conversation.title}\u201d goes from this page, and from what is kept in this browser.`;
  onSubmit("delete", done);
  byId("delete").showModal();
}

/** Ask for the gateway's key; `done(key)`. */
export function askKey(wrong, done) {
  byId("key-fault").textContent = "The gateway does not know this key. Look for missing characters, or ask for another.";
  byId("key-fault").hidden = !wrong;
  byId("key-value").value = "";
  onSubmit("key", () => {
    const key = byId("key-value").value.trim();
    // No key has anything else, and no header could carry it.
    const isPossible = /^[\x21-\x7e]+$/.test(key);
    byId("key-fault").hidden = isPossible;
    return isPossible && done(key);
  });
  // Without a key there is nothing to do here: Esc does not close it.
  byId("key").oncancel = (event) => event.preventDefault();
  if (!byId("key").open) byId("key").showModal();
}
