// One WebSocket to the gateway this page came from. It comes back by itself, ever more slowly, and says how it stands.

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10_000;

/** UTF-8 as base64url without padding: what a subprotocol's name may hold. */
function packed(text) {
  const binary = String.fromCodePoint(...new TextEncoder().encode(text));
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/**
 * Calls `onState({name, ...})` with name "connecting", "open", "waiting" (`at`: time of the next try) or "key" (`wrong`),
 * and `onMessage(message)` for every message.
 */
export class Connection {
  #socket = null;
  #key = null;
  #wait = FIRST_WAIT_MS;
  #timer = 0;
  #handlers;

  constructor(handlers) {
    this.#handlers = handlers;
    addEventListener("online", () => this.tryNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.tryNow());
  }

  get isOpen() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  connect(key = this.#key) {
    this.#key = key;
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#handlers.onState({ name: "connecting" });
    const address = new URL("v1/chat/ws", location.href);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(address, key ? ["fl-llama", `key.${packed(key)}`] : ["fl-llama"]);
    this.#socket = socket;
    let opened = false;
    socket.onopen = () => {
      opened = true;
      this.#wait = FIRST_WAIT_MS;
      this.#handlers.onState({ name: "open" });
    };
    socket.onmessage = (event) => this.#handlers.onMessage(JSON.parse(event.data));
    socket.onclose = async () => {
      if (!opened && (await this.#isRefused())) this.#handlers.onState({ name: "key", wrong: Boolean(key) });
      else this.#later();
    };
  }

  /** Send one message; false when there is nobody to send it to. */
  send(message) {
    if (!this.isOpen) return false;
    this.#socket.send(JSON.stringify(message));
    return true;
  }

  /** Do not wait for the next try. */
  tryNow() {
    if (this.#timer) this.connect();
  }

  #later() {
    const wait = this.#wait * (0.8 + 0.4 * Math.random());
    this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT_MS);
    this.#timer = setTimeout(() => this.connect(), wait);
    this.#handlers.onState({ name: "waiting", at: Date.now() + wait });
  }

  // A browser does not tell why a WebSocket was refused; a plain request with the same key does.
  async #isRefused() {
    const headers = this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
    try {
      return (await fetch("v1/models", { headers, cache: "no-store" })).status === 401;
    } catch {
      return false;
    }
  }
}
