// The socket: opened when it is wanted, and again when it is lost.

const FOR_GOOD = new Set([1008, 4000]); // closed by a rule of the server; only the viewer can change that
const FIRST_WAIT = 500, LONGEST_WAIT = 8000; // milliseconds

export class Link {
  // handlers: reply(message), frame(number, prompt, jpeg), lost(reason), refused(code, reason)
  constructor(handlers) {
    this.handlers = handlers;
    this.wait = FIRST_WAIT;
    this.open();
  }

  get alive() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  // Opens it now, if it is neither open nor about to be.
  open() {
    clearTimeout(this.timer);
    if (this.socket?.readyState <= WebSocket.OPEN) return;
    const token = new URLSearchParams(location.hash.slice(1)).get("token");
    const scheme = location.protocol === "https:" ? "wss://" : "ws://";
    const socket = new WebSocket(scheme + location.host + "/stream", token ? ["rfjax.1", token] : ["rfjax.1"]);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({data}) => this.receive(data);
    socket.onclose = ({code, reason}) => this.closed(code, reason);
    this.socket = socket;
  }

  receive(data) {
    this.wait = FIRST_WAIT;
    if (typeof data === "string") return this.handlers.reply(JSON.parse(data));
    const head = new DataView(data);
    this.handlers.frame(head.getUint32(0), head.getUint32(4), new Uint8Array(data, 8));
  }

  closed(code, reason) {
    if (FOR_GOOD.has(code)) return this.handlers.refused(code, reason);
    this.handlers.lost(reason);
    this.timer = setTimeout(() => this.open(), this.wait * (0.75 + Math.random() / 2));
    this.wait = Math.min(2 * this.wait, LONGEST_WAIT);
  }

  send(type, fields = {}) {
    if (!this.alive) return false;
    this.socket.send(JSON.stringify({type, ...fields}));
    return true;
  }
}
