// The list of conversations, and whether they are kept.

import { byId, h, icon } from "./dom.js";
import { isRunning } from "./store.js";

const IN_MEMORY = "They are in this tab\u2019s memory only, and gone when you close or reload it.";
const KEPT = "Saved in this browser as plain text. Switching this off deletes what was saved.";

export class Sidebar {
  #store;
  #actions;
  #renaming = null;

  /** `actions`: open(conversation), remove(conversation). */
  constructor(store, actions) {
    this.#store = store;
    this.#actions = actions;
    byId("new").prepend(icon("plus"));
    byId("keep").addEventListener("change", (event) => store.setKeep(event.target.checked));
    this.show();
  }

  show() {
    // A name being typed stays.
    if (this.#renaming && this.#store.conversations.includes(this.#renaming)) return;
    const list = byId("conversations");
    const focused = focusIn(list);
    list.replaceChildren(...this.#store.conversations.map((one) => this.#row(one)));
    if (focused) list.querySelector(`[data-key="${focused}"]`)?.focus();
    byId("keep").checked = this.#store.keep;
    byId("keep-note").textContent = this.#store.trouble ?? (this.#store.keep ? KEPT : IN_MEMORY);
  }

  #row(conversation) {
    const current = conversation === this.#store.current;
    const running = isRunning(conversation);
    const open = h(
      "button",
      {
        class: "open",
        type: "button",
        "aria-current": current ? "true" : null,
        "data-key": `open-${conversation.id}`,
        onclick: () => this.#actions.open(conversation),
        ondblclick: () => this.#rename(conversation),
      },
      h("span", {}, conversation.title),
      running ? h("span", { class: "pulse", role: "img", "aria-label": "An answer is being written" }) : null,
    );
    const tool = (name, label, onclick) =>
      h("button", { class: "icon-button", type: "button", title: label, "aria-label": `${label}: ${conversation.title}`, "data-key": `${name}-${conversation.id}`, onclick }, icon(name));
    const tools = [
      tool("rename", "Rename", () => this.#rename(conversation)),
      tool("remove", "Delete", () => this.#actions.remove(conversation)),
    ];
    return h("li", { class: current ? "conversation current" : "conversation", "data-id": conversation.id }, open, ...tools);
  }

  #rename(conversation) {
    const row = byId("conversations").querySelector(`[data-id="${conversation.id}"]`);
    const input = h("input", { "aria-label": "Name of the conversation", maxlength: "80" });
    input.value = conversation.title;
    this.#renaming = conversation;
    const end = (name) => {
      if (this.#renaming !== conversation) return;
      this.#renaming = null;
      if (name?.trim()) this.#store.rename(conversation, name);
      else this.show();
      byId("conversations").querySelector(`[data-key="rename-${conversation.id}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key !== "Enter" && event.key !== "Escape") return;
      // Else Enter would press the button that gets the focus back.
      event.preventDefault();
      end(event.key === "Enter" ? input.value : null);
    });
    input.addEventListener("blur", () => end(input.value));
    row.replaceChildren(input);
    input.select();
  }
}

function focusIn(list) {
  return list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
}
