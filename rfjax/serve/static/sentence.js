// The sentence: read into words, composed of words, and shown with marks on those that are not in the picture yet.

const WORD = "[\\p{L}\\p{M}\\p{N}_']+"; // of any script

export const split = (text) => text.toLowerCase().match(new RegExp(WORD, "gu")) ?? [];

const article = (word) => (/^[aeiou]/.test(word) ? "an " : "a ") + word;

// What a small world's sentence says: {size?, colour, shape, motion, background}.
export function read(text, groups) {
  const words = split(text);
  const over = words.indexOf("over");
  const [front, back] = over < 0 ? [words, []] : [words.slice(0, over), words.slice(over)];
  const first = (from, group) => from.find((word) => groups[group].includes(word));
  return {
    size: first(front, "size"),
    colour: first(front, "colour"),
    shape: first(front, "shape"),
    motion: first(front, "motion"),
    background: first(back, "colour"),
  };
}

export function compose({size, colour, shape, motion, background}) {
  const thing = [size, colour, shape, motion].filter(Boolean).join(" ");
  return `${article(thing)} over ${article(background)} background`;
}

// Words of the text that the picture does not have yet: those that differ, place by place from both ends, from what it shows.
export function pending(text, shown) {
  const now = split(text), then = split(shown);
  let head = 0, tail = 0;
  while (head < now.length && now[head] === then[head]) head += 1;
  while (tail < now.length - head && now.at(-1 - tail) === then.at(-1 - tail)) tail += 1;
  if (now.length === then.length) return new Set([...now.keys()].filter((index) => now[index] !== then[index]));
  return new Set([...now.keys()].filter((index) => head <= index && index < now.length - tail));
}

// The text as nodes: a <mark> for each run of pending words, <u> for unknown ones.
export function nodes(text, marked, known) {
  const strange = split(text).map((word) => known && !known.has(word));
  const pends = (index) => marked.has(index) && !strange[index];
  const out = [];
  let index = -1;
  for (const [place, piece] of text.split(new RegExp(`(${WORD})`, "u")).entries()) {
    const word = place % 2 === 1; // what lies between comes first, and then in turn
    index += word;
    const mark = pends(index) && (word || pends(index + 1));
    const tag = word && strange[index] ? "u" : mark ? "mark" : "span";
    if (tag === "mark" && out.at(-1)?.localName === tag) out.at(-1).textContent += piece;
    else out.push(Object.assign(document.createElement(tag), {textContent: piece}));
  }
  return out;
}
