// Colours, maps and marks. The maps are cividis and blue-white-orange, which the colour-blind tell apart.

const CIVIDIS = [
  [0, 34, 78], [0, 46, 108], [30, 58, 111], [53, 69, 108], [71, 81, 108], [87, 93, 109],
  [102, 105, 112], [117, 117, 117], [132, 130, 121], [148, 142, 119], [165, 156, 116], [183, 169, 110],
  [200, 184, 102], [219, 199, 90], [238, 214, 73], [254, 232, 56],
];
const DIVERGING = [[5, 80, 160], [70, 147, 200], [170, 207, 228], [245, 245, 245], [250, 200, 130], [230, 130, 30], [150, 70, 0]];
export const FIXED = "#0072b2", BROKEN = "#d55e00";
export const MODEL_COLOURS = ["#d55e00", "#0072b2", "#cc79a7", "#009e73"];

function along(points, share) {
  const place = Math.min(1, Math.max(0, share)) * (points.length - 1);
  const first = Math.min(points.length - 2, Math.floor(place));
  return points[first].map((c, i) => Math.round(c + (place - first) * (points[first + 1][i] - c)));
}

export const cividis = (share) => along(CIVIDIS, share);
export const diverging = (share) => along(DIVERGING, share);
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

export function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function legend(scale, low, high) {
  const canvas = element("canvas", { width: 128, height: 1, class: "legend", "aria-hidden": "true" });
  const pen = canvas.getContext("2d");
  for (let x = 0; x < 128; x++) {
    pen.fillStyle = css(scale(x / 127));
    pen.fillRect(x, 0, 1, 1);
  }
  return element("div", { class: "scale" }, element("span", { text: low }), canvas, element("span", { text: high }));
}

// A canvas as wide as its place, with the photograph. Patches of a grid are drawn onto it.
export class Sheet {
  constructor(canvas, [height, width], covered) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    const wide = Math.max(1, Math.round(canvas.clientWidth * Math.min(devicePixelRatio || 1, 2)));
    const high = Math.max(1, Math.round((wide * height) / width));
    if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
    // Pixels right of and below the last patch belong to no patch.
    this.covered = [covered[0] / height, covered[1] / width];
    this.unit = wide / 320;
  }

  photo(image, grey = false) {
    const { pen, canvas } = this;
    pen.filter = grey ? "grayscale(1)" : "none";
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    pen.filter = "none";
  }

  cell(patch, [rows, columns]) {
    const high = this.canvas.height * this.covered[0], wide = this.canvas.width * this.covered[1];
    const x = Math.round(((patch % columns) * wide) / columns), y = Math.round((Math.floor(patch / columns) * high) / rows);
    const right = Math.round((((patch % columns) + 1) * wide) / columns), below = Math.round(((Math.floor(patch / columns) + 1) * high) / rows);
    return [x, y, right - x, below - y];
  }

  map(colours, grid, alpha) {
    this.pen.globalAlpha = alpha;
    colours.forEach((colour, patch) => {
      if (colour === null) return;
      this.pen.fillStyle = css(colour);
      this.pen.fillRect(...this.cell(patch, grid));
    });
    this.pen.globalAlpha = 1;
  }

  outline(patch, grid) {
    const [x, y, w, h] = this.cell(patch, grid);
    for (const [colour, line] of [["#000", 5], ["#fff", 2.5]]) {
      this.pen.strokeStyle = colour;
      this.pen.lineWidth = Math.max(1, line * this.unit);
      this.pen.strokeRect(x, y, w, h);
    }
  }

  // The edge of a set of patches.
  border(inside, grid, dash = true) {
    const { pen } = this;
    const [rows, columns] = grid;
    const path = new Path2D();
    inside.forEach((is, patch) => {
      if (!is) return;
      const [x, y, w, h] = this.cell(patch, grid);
      const row = Math.floor(patch / columns), column = patch % columns;
      const edge = (out, x1, y1, x2, y2) => {
        if (!out) return;
        path.moveTo(x1, y1);
        path.lineTo(x2, y2);
      };
      edge(row === 0 || !inside[patch - columns], x, y, x + w, y);
      edge(row === rows - 1 || !inside[patch + columns], x, y + h, x + w, y + h);
      edge(column === 0 || !inside[patch - 1], x, y, x, y + h);
      edge(column === columns - 1 || !inside[patch + 1], x + w, y, x + w, y + h);
    });
    pen.strokeStyle = "#000";
    pen.lineWidth = 4 * this.unit;
    pen.stroke(path);
    pen.strokeStyle = "#fff";
    pen.lineWidth = 2 * this.unit;
    pen.setLineDash(dash ? [5 * this.unit, 4 * this.unit] : []);
    pen.stroke(path);
    pen.setLineDash([]);
  }

  // A disc with a tick, a square with a cross, or a stroke: told apart by shape, too.
  mark(kind, patch, grid) {
    const [x, y, w, h] = this.cell(patch, grid);
    const { pen } = this;
    if (kind === "wrong") {
      for (const [colour, line] of [["#fff", 3], ["#000", 1.5]]) {
        pen.beginPath();
        pen.moveTo(x + 0.38 * w, y + 0.62 * h);
        pen.lineTo(x + 0.62 * w, y + 0.38 * h);
        pen.strokeStyle = colour;
        pen.lineWidth = Math.max(1, line * this.unit);
        pen.stroke();
      }
      return;
    }
    const r = 0.38 * Math.min(w, h), cx = x + w / 2, cy = y + h / 2;
    pen.beginPath();
    if (kind === "fixed") pen.arc(cx, cy, r, 0, 2 * Math.PI);
    else pen.rect(cx - r, cy - r, 2 * r, 2 * r);
    pen.fillStyle = kind === "fixed" ? FIXED : BROKEN;
    pen.fill();
    pen.strokeStyle = "#fff";
    pen.lineWidth = Math.max(1, r / 4);
    pen.stroke();
    pen.beginPath();
    const lines = kind === "fixed" ? [[-0.5, 0, -0.1, 0.4], [-0.1, 0.4, 0.5, -0.4]] : [[-0.45, -0.45, 0.45, 0.45], [-0.45, 0.45, 0.45, -0.45]];
    for (const [x1, y1, x2, y2] of lines) {
      pen.moveTo(cx + x1 * r, cy + y1 * r);
      pen.lineTo(cx + x2 * r, cy + y2 * r);
    }
    pen.stroke();
  }

  box([left, top, right, bottom], colour, dash) {
    const { pen, canvas } = this;
    const rect = [left * canvas.width, top * canvas.height, (right - left) * canvas.width, (bottom - top) * canvas.height];
    pen.setLineDash([]);
    pen.strokeStyle = "#fff";
    pen.lineWidth = 6 * this.unit;
    pen.strokeRect(...rect);
    pen.setLineDash(dash.map((d) => d * this.unit));
    pen.strokeStyle = colour;
    pen.lineWidth = 3 * this.unit;
    pen.strokeRect(...rect);
    pen.setLineDash([]);
  }
}
