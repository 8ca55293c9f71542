// Frames as they come → a canvas at a steady rate, and what is drawn there → a file.

const BEGIN = 0.25; // seconds in hand with which it begins, at first and after it ran dry
const MOST = 3.0, KEPT = 1.5; // seconds in hand at which it skips, and down to what

export class Player {
  constructor(canvas, shown) {
    this.canvas = canvas;
    this.shown = shown; // called with each entry that was drawn
    this.queue = [];
    this.times = [];
    this.held = false;
    this.skipped = 0;
    requestAnimationFrame((now) => this.tick(now));
  }

  // Small frames are enlarged by a whole factor on the canvas, so that recordings are crisp too.
  fit(width, height, fps) {
    const factor = Math.max(1, Math.floor(512 / Math.max(width, height)));
    this.fps = fps;
    this.canvas.width = width * factor;
    this.canvas.height = height * factor;
    this.canvas.classList.toggle("crisp", factor > 1);
    this.context = this.canvas.getContext("2d", {alpha: false});
    this.context.imageSmoothingEnabled = factor === 1;
  }

  get inHand() {
    return this.queue.length / this.fps;
  }

  clear() {
    for (const entry of this.queue) entry.gone = true, entry.bitmap?.close();
    this.queue = [];
    this.rolling = false;
  }

  push(number, prompt, jpeg) {
    const entry = {number, prompt};
    this.queue.push(entry);
    createImageBitmap(new Blob([jpeg], {type: "image/jpeg"})).then(
      (bitmap) => (entry.gone ? bitmap.close() : (entry.bitmap = bitmap)),
      () => (entry.broken = true),
    );
    if (this.inHand > MOST) while (this.inHand > KEPT) this.drop();
  }

  drop() {
    const entry = this.queue.shift();
    entry.gone = true;
    entry.bitmap?.close();
    this.skipped += 1;
  }

  tick(now) {
    requestAnimationFrame((next) => this.tick(next));
    if (this.held || !this.fps) return (this.due = now);
    if (!this.rolling) {
      if (this.inHand < BEGIN) return;
      this.rolling = true;
      this.due = now;
    }
    if (now < this.due) return;
    while (this.queue[0]?.broken) this.drop();
    const entry = this.queue[0];
    if (!entry) return (this.rolling = false);
    if (!entry.bitmap) return; // still being decoded
    this.context.drawImage(entry.bitmap, 0, 0, this.canvas.width, this.canvas.height);
    this.queue.shift();
    const period = 1000 / this.fps;
    this.due = Math.max(this.due + period, now - period);
    this.times.push(now);
    this.shown(entry, now);
    entry.bitmap.close();
  }

  // Frames a second, drawn in the last two.
  rate(now) {
    this.times = this.times.filter((time) => now - time < 2000);
    return this.times.length / 2;
  }
}

const KINDS = ["video/mp4;codecs=avc1.42E01F", "video/mp4", "video/webm;codecs=vp9", "video/webm"];

export class Recorder {
  constructor(canvas) {
    this.canvas = canvas;
    this.kind = globalThis.MediaRecorder && KINDS.find((kind) => MediaRecorder.isTypeSupported(kind));
  }

  get running() {
    return this.recorder?.state === "recording";
  }

  start(fps) {
    this.parts = [];
    const options = {mimeType: this.kind, videoBitsPerSecond: 8e6};
    this.recorder = new MediaRecorder(this.canvas.captureStream(fps), options);
    this.recorder.ondataavailable = ({data}) => data.size && this.parts.push(data);
    this.recorder.start(1000);
  }

  // Ends the recording and saves it under this name and the kind's ending.
  save(name) {
    const {recorder, parts, kind} = this;
    recorder.onstop = () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob(parts, {type: kind}));
      link.download = `${name}.${kind.startsWith("video/mp4") ? "mp4" : "webm"}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    };
    recorder.stop();
    for (const track of recorder.stream.getTracks()) track.stop();
  }
}
