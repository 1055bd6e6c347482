// @ts-check
import { bytes, element } from "./api.js";
import { paint } from "./colour.js";

/** @typedef {{ previous: number, first: number, same: number, own: number, spread: number, distance: number }} Habits */
/** @typedef {{ layer: number, head: number, habits: Habits, tile: HTMLElement }} Tile */

/** @typedef {{ name: string, heads: number, recurrent: boolean }} Section */

/** @type {Tile[]} */
let tiles = [];
/** @type {Tile[]} in the order in which they are shown */
let shown = [];
let chosen = -1;
/** @type {(layer: number | null, head: number | null) => void} */
let choose = () => {};

/**
 * A small map of every head: a lower triangle of levels, as the server sent it.
 * @param {{ cells: number, layers: { maps: string, habits: Habits[], sections: Section[] }[] }} look
 */
export function draw(look) {
  const { cells } = look, triangle = (cells * (cells + 1)) / 2;
  const place = element("maps", HTMLElement);
  place.replaceChildren();
  tiles = look.layers.flatMap(({ maps, habits, sections }, layer) => {
    const all = bytes(maps);
    return habits.map((habit, head) => {
      const levels = new Uint8Array(cells * cells);
      let from = head * triangle;
      for (let a = 0; a < cells; a++) for (let b = 0; b <= a; b++) levels[a * cells + b] = all[from++];
      const tile = document.createElement("div");
      tile.setAttribute("role", "option");
      tile.id = `map-${layer}-${head}`;
      const canvas = document.createElement("canvas");
      paint(canvas, levels, cells);
      const name = document.createElement("span");
      name.textContent = `${layer}·${head}`;
      tile.append(canvas, name);
      tile.title = about(layer, head, habit) + (section(sections, head)?.name ?? "");
      tile.setAttribute("aria-label", tile.title);
      return { layer, head, habits: habit, tile };
    });
  });
  chosen = -1;
  order(element("order", HTMLSelectElement).value);
}

/**
 * @param {number} layer
 * @param {number} head
 * @param {Habits} habits
 */
function about(layer, head, habits) {
  const share = (/** @type {number} */ x) => `${Math.round(100 * x)} %`;
  return `layer ${layer}, head ${head}: token before ${share(habits.previous)}, first ${share(habits.first)}, ` +
    `same ${share(habits.same)}, itself ${share(habits.own)}, entropy ${share(habits.spread)} `;
}

/**
 * The mechanism of a head, where it is another than attention to the newest tokens.
 * @param {Section[]} sections
 * @param {number} head
 */
export function section(sections, head) {
  let end = 0;
  return sections.find(({ heads }) => head < (end += heads));
}

/** @param {string} by a habit; nothing for layers in order */
export function order(by) {
  /** @type {(tile: Tile) => number} */
  const value = (tile) => {
    const habit = /** @type {keyof Habits} */ (by);
    return habit === "spread" ? -tile.habits.spread : tile.habits[habit];
  };
  shown = by ? tiles.slice().sort((a, b) => value(b) - value(a)) : tiles.slice();
  element("maps", HTMLElement).append(...shown.map(({ tile }) => tile));
}

/**
 * Marks a head, and no other.
 * @param {number | null} layer
 * @param {number | null} head
 */
export function mark(layer, head) {
  for (const tile of tiles) {
    const is = tile.layer === layer && tile.head === head;
    tile.tile.setAttribute("aria-selected", String(is));
    if (is) {
      chosen = shown.indexOf(tile);
      element("maps", HTMLElement).setAttribute("aria-activedescendant", tile.tile.id);
    }
  }
}

/** @param {number} n */
function take(n) {
  const tile = shown[Math.min(Math.max(n, 0), shown.length - 1)];
  if (!tile) return;
  tile.tile.scrollIntoView({ block: "nearest" });
  choose(tile.layer, tile.head);
}

/** @param {(layer: number | null, head: number | null) => void} chose */
export function start(chose) {
  choose = chose;
  const place = element("maps", HTMLElement);
  place.addEventListener("click", (event) => {
    const n = shown.findIndex(({ tile }) => event.target instanceof Node && tile.contains(event.target));
    if (n >= 0) take(n);
  });
  place.addEventListener("keydown", (event) => {
    const columns = getComputedStyle(place).gridTemplateColumns.split(" ").length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    take(chosen < 0 ? 0 : chosen + step);
  });
}
