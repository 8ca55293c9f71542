// The timeline: a frame of every second, edge to edge, and the prompts where they came into the picture.

const KEPT = 120; // seconds of film at most

export class Strip {
  constructor(canvas, list, recall) {
    this.canvas = canvas;
    this.list = list;
    this.recall = recall; // called with a prompt that is chosen again
    this.reset(1);
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  reset(aspect) {
    this.aspect = aspect;
    this.film = []; // {second, picture}
    this.changes = []; // {second, prompt, item}
    this.list.replaceChildren();
    this.draw();
  }

  // A frame that is shown, so many seconds after the start; one a second is kept, the first or a fresh one.
  add(seconds, bitmap, fresh) {
    const second = Math.floor(seconds);
    if (this.film.at(-1)?.second === second) {
      if (!fresh) return;
      this.film.pop();
    }
    const picture = document.createElement("canvas");
    picture.width = 64 * this.aspect;
    picture.height = 64;
    picture.getContext("2d").drawImage(bitmap, 0, 0, picture.width, picture.height);
    this.film.push({second, picture});
    if (this.film.length > KEPT) this.film.shift();
    this.draw();
  }

  // A prompt whose first frame is shown, so many seconds after the start.
  mark(seconds, prompt) {
    const item = document.createElement("li"), button = document.createElement("button"), time = document.createElement("time");
    time.textContent = clock(seconds);
    button.type = "button";
    button.title = "Show this again";
    button.append(time, " ", prompt);
    button.onclick = () => this.recall(prompt);
    item.append(button);
    this.list.append(item);
    this.changes.push({second: Math.floor(seconds), prompt, item});
    this.draw();
  }

  draw() {
    const ratio = globalThis.devicePixelRatio || 1;
    const {clientWidth: width, clientHeight: height} = this.canvas;
    if (!width || !this.film) return;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const side = height * this.aspect;
    const fit = Math.floor(width / side);
    const film = this.film.slice(-fit), first = film[0]?.second ?? 0;
    const context = this.canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    film.forEach(({picture}, index) => {
      const x = Math.round(index * side * ratio);
      context.drawImage(picture, x, 0, Math.round((index + 1) * side * ratio) - x, this.canvas.height);
    });
    this.label(film, first, side);
  }

  // Each label from where its prompt came to where the next one did; those that have left the film go.
  label(film, first, side) {
    const place = (second) => Math.max(0, film.findIndex((frame) => frame.second >= second)) * side;
    this.changes = this.changes.filter(({item}, index) => {
      const gone = this.changes[index + 1]?.second <= first;
      if (gone) item.remove();
      return !gone;
    });
    this.changes.forEach(({second, item}, index) => {
      const next = this.changes[index + 1];
      const left = place(second), right = next ? place(next.second) : this.canvas.clientWidth;
      item.style.setProperty("--left", `${left}px`);
      item.style.setProperty("--width", `${Math.max(right - left, 0)}px`);
      item.classList.toggle("now", !next);
    });
  }
}

export function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
