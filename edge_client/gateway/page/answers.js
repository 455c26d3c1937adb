// Questions go out, answers come in: what the gateway says about an answer, put into its message.

import { isOpen } from "./store.js";

const NUMBERS = ["rows_up", "bytes_up", "bytes_down"];

export class Answers {
  /** Sums since the page was opened. */
  totals = { rows_up: 0, bytes_up: 0, bytes_down: 0 };
  #store;
  #connection;
  #open = new Map();
  #onUsage;
  #onText;

  /** `onUsage(message, grown)` hears of new figures, `onText(conversation, message)` of new text. */
  constructor(store, connection, { onUsage, onText }) {
    this.#store = store;
    this.#connection = connection;
    this.#onUsage = onUsage;
    this.#onText = onText;
  }

  /** Ask for the answer to all that is in the conversation; false when nobody is there to be asked. */
  ask(conversation) {
    if (!this.#connection.isOpen) return false;
    const { system, temperature, maxTokens, seed } = conversation.settings;
    const said = conversation.messages.filter((message) => message.content !== "" || message.role === "user");
    const messages = said.map(({ role, content }) => ({ role, content }));
    if (system) messages.unshift({ role: "system", content: system });
    const message = this.#store.addMessage(conversation, "assistant", "", "waiting");
    this.#open.set(message.id, { conversation, message });
    const request = { type: "send", id: message.id, messages };
    this.#connection.send({ ...request, temperature, max_tokens: maxTokens, seed });
    return true;
  }

  /** Stop the answer under way; what came of it stays. */
  stop(conversation) {
    const message = conversation.messages.at(-1);
    if (isOpen(message)) this.#connection.send({ type: "cancel", id: message.id });
  }

  /** The connection went, and with it everything that was under way. */
  cut() {
    for (const { conversation, message } of this.#open.values()) this.#end(conversation, message, "cut");
  }

  take(event) {
    const found = this.#open.get(event.id);
    if (!found) return;
    const { conversation, message } = found;
    if (event.type === "delta") {
      message.content += event.text;
      const begins = message.state === "waiting";
      message.state = "streaming";
      if (begins) this.#store.touch(conversation, "list");
      this.#onText(conversation, message, event.text);
    } else if (event.type === "usage") this.#count(message, event);
    else if (event.type === "done") this.#end(conversation, message, event.finish_reason === "cancelled" ? "stopped" : "done", event);
    else if (event.type === "error") this.#end(conversation, message, "failed", event);
  }

  #count(message, usage) {
    const before = message.usage;
    const grown = {};
    for (const name of NUMBERS) {
      grown[name] = usage[name] - (before?.[name] ?? 0);
      this.totals[name] += grown[name];
    }
    const { type, id, ...figures } = usage;
    message.usage = figures;
    this.#onUsage(message, grown);
  }

  #end(conversation, message, state, event = {}) {
    this.#open.delete(message.id);
    message.state = state;
    if (state === "failed") message.fault = { code: event.code, text: event.message, retry: event.retry_after_ms };
    if (event.finish_reason === "length") message.cutShort = true;
    this.#store.touch(conversation, "list");
  }
}
