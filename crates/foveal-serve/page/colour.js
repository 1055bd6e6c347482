// @ts-check
/** Cividis: even in lightness, and the same for all kinds of colour vision. */
const STOPS = [[0, 32, 76], [0, 57, 107], [55, 79, 108], [87, 102, 112], [114, 124, 117], [145, 147, 113], [180, 172, 102], [217, 199, 80], [255, 233, 69]];

/** Colours of 256 levels, three bytes each. */
export const TABLE = new Uint8Array(768);
for (let n = 0; n < 256; n++) {
  const x = (n / 255) * (STOPS.length - 1);
  const i = Math.min(Math.floor(x), STOPS.length - 2);
  for (let k = 0; k < 3; k++) TABLE[3 * n + k] = Math.round(STOPS[i][k] + (x - i) * (STOPS[i + 1][k] - STOPS[i][k]));
}

/**
 * The level of a weight: its square root, so that small weights can be told apart.
 * @param {number} weight
 */
export const level = (weight) => Math.round(255 * Math.sqrt(Math.min(Math.max(weight, 0), 1)));

/** @param {number} n a level of 0 to 255 */
export const css = (n) => `rgb(${TABLE[3 * n]} ${TABLE[3 * n + 1]} ${TABLE[3 * n + 2]})`;

/**
 * Black or white, whichever can be read on a level.
 * @param {number} n
 */
export const ink = (n) => (n > 130 ? "#000" : "#fff");

/**
 * Paints levels, row by row, on a canvas of as many pixels.
 * @param {HTMLCanvasElement} canvas
 * @param {ArrayLike<number>} levels
 * @param {number} width
 */
export function paint(canvas, levels, width) {
  const height = Math.max(1, Math.floor(levels.length / width));
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  if (!context) return;
  const image = context.createImageData(width, height);
  for (let n = 0; n < width * height; n++) {
    for (let k = 0; k < 3; k++) image.data[4 * n + k] = TABLE[3 * levels[n] + k];
    image.data[4 * n + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}
