// What the user types into and opens: the question's field, the drawers of narrow windows, and what is read aloud.

import { byId, h } from "./dom.js";
import { isRunning } from "./store.js";

export class Composer {
  #field = byId("question");
  #conversation = null;
  #editing = null;
  #drafts = new WeakMap();
  #isOpen = false;
  #actions;

  /** `actions`: send(text, isEdit) -> whether it was sent, stop(). */
  constructor(actions) {
    this.#actions = actions;
    this.#field.addEventListener("input", () => this.#fit());
    this.#field.addEventListener("keydown", (event) => {
      // isComposing: Enter that ends a Japanese or Chinese input sends nothing.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => {
      actions.stop();
      this.focus();
    });
    byId("stop-editing").addEventListener("click", () => this.leaveEdit());
  }

  /** Fit to the shown conversation; each keeps what was typed and not sent. */
  show(conversation, isOpen) {
    this.#isOpen = isOpen;
    if (conversation !== this.#conversation) {
      this.leaveEdit();
      if (this.#conversation) this.#drafts.set(this.#conversation, this.#field.value);
      this.#conversation = conversation;
      this.#field.value = this.#drafts.get(conversation) ?? "";
    }
    const running = isRunning(conversation);
    byId("stop").hidden = !running;
    byId("send").hidden = running;
    this.#fit();
  }

  /** Put a text into the field, for the user to send or change. */
  propose(text) {
    this.#field.value = text;
    this.#fit();
    this.focus();
  }

  /** Change the last question. */
  edit(conversation) {
    this.#editing = { draft: this.#field.value };
    byId("editing").hidden = false;
    this.propose(conversation.messages.findLast((message) => message.role === "user").content);
  }

  /** Leave the last question as it is; whether one was being changed. */
  leaveEdit() {
    if (!this.#editing) return false;
    const { draft } = this.#editing;
    this.#endEdit();
    this.#field.value = draft;
    this.#fit();
    return true;
  }

  focus() {
    // On a touch screen the keyboard would cover the page.
    if (matchMedia("(pointer: fine)").matches) this.#field.focus();
  }

  #send() {
    const text = this.#field.value;
    if (!text.trim() || isRunning(this.#conversation)) return;
    if (!this.#actions.send(text.trim(), this.#editing !== null)) return;
    this.#endEdit();
    this.#field.value = "";
    this.#fit();
  }

  #endEdit() {
    this.#editing = null;
    byId("editing").hidden = true;
  }

  #fit() {
    byId("send").disabled = !this.#isOpen || !this.#field.value.trim();
    this.#field.style.height = "auto";
    this.#field.style.height = `${this.#field.scrollHeight}px`;
  }
}

/** The side list and the panel, which narrow windows show over the chat, one at a time. */
export class Drawers {
  #pairs = [
    { drawer: byId("side"), opener: byId("open-side"), narrow: matchMedia("(max-width: 760px)") },
    { drawer: byId("panel"), opener: byId("open-panel"), narrow: matchMedia("(max-width: 1180px)") },
  ];
  #shown = null;

  constructor() {
    for (const pair of this.#pairs) {
      pair.opener.addEventListener("click", () => this.#show(pair));
      pair.narrow.addEventListener("change", () => this.close());
    }
    byId("shade").addEventListener("click", () => this.close());
    byId("close-panel").addEventListener("click", () => this.close());
  }

  /** Close the one that is open; whether one was. */
  close() {
    if (!this.#shown) return false;
    const { drawer, opener } = this.#shown;
    this.#shown = null;
    drawer.classList.remove("shown");
    opener.setAttribute("aria-expanded", "false");
    byId("shade").hidden = true;
    document.querySelector("main").inert = false;
    opener.focus();
    return true;
  }

  #show(pair) {
    this.close();
    this.#shown = pair;
    pair.drawer.classList.add("shown");
    pair.opener.setAttribute("aria-expanded", "true");
    byId("shade").hidden = false;
    document.querySelector("main").inert = true;
    pair.drawer.querySelector("button, a, input")?.focus();
  }
}

/**
 * Reads an answer aloud sentence by sentence: a region that changed with every token would be read from its beginning
 * again and again.
 */
export function announcer(region) {
  let said = 0;
  let active = false;
  const add = (text) => text.trim() && region.append(h("p", {}, text.trim()));
  return {
    begin() {
      said = 0;
      active = true;
      region.replaceChildren();
    },
    say(text) {
      if (!active) return;
      const ends = [...text.slice(said).matchAll(/[.!?:]["')\]]?\s|\n/g)];
      if (!ends.length) return;
      const end = said + ends.at(-1).index + ends.at(-1)[0].length;
      add(text.slice(said, end));
      said = end;
    },
    end(message) {
      if (!active || message?.role !== "assistant") return;
      active = false;
      add(message.content.slice(said));
      if (message.state === "stopped") add("Stopped.");
    },
  };
}
