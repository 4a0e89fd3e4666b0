// What each view shows of the chosen image and patch: panels, an explanation, controls and details.
import { cividis, diverging, element, legend } from "./draw.js";
import { extent } from "./maths.js";

const NEIGHBOURS = 8;
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
const MINUS = "−";
const fixed = (value) => `${value < 0 ? MINUS : ""}${Math.abs(value).toFixed(2)}`;
export const signed = (value, digits = 2) => `${value < 0 ? MINUS : "+"}${Math.abs(value).toFixed(digits)}`;

// Every view: explain(page), panels(page) -> [{title, draw(sheet), grid, foot}], controls(page), details(page).
// A page has content, models, predictions, state, shown (the patch under the pointer or the chosen one), images, options.

const photo = (page) => ({
  title: "image",
  kind: "photo",
  grid: page.models[0].grid,
  draw: (sheet) => sheet.photo(page.images[page.state.image]),
});

const heat = (page, model, values, low, high, scale = cividis) => ({
  title: model.name,
  source: model.source,
  grid: model.grid,
  draw: (sheet) => {
    sheet.photo(page.images[page.state.image], true);
    sheet.map(Array.from(values, (v) => scale((v - low) / (high - low || 1))), model.grid, page.options.alpha);
  },
});

const sameGrid = (first, second) => first.grid[0] === second.grid[0] && first.grid[1] === second.grid[1];

const alphaControl = (page) =>
  element("label", {}, "map over photograph ",
    element("input", { type: "range", min: 0.3, max: 1, step: 0.05, value: page.options.alpha, id: "alpha",
      oninput: (event) => page.set({ alpha: Number(event.target.value) }) }));

const tick = (page, name, text) =>
  element("label", {},
    element("input", { type: "checkbox", id: name, checked: page.options[name], onchange: (event) => page.set({ [name]: event.target.checked }) }),
    ` ${text}`);

export const similarity = {
  title: "Similarity",
  explain: () => "Choose a patch: every other patch of the image is coloured by its cosine similarity to it, once for each model.",
  panels(page) {
    const { models, state, options } = page;
    const values = models.map((m) => m.similarities(state.image, page.patchOf(m)));
    // The patch itself has similarity 1: it does not count for the scale, which would be too coarse for the others.
    const rest = values.map((v, i) => v.filter((_, p) => p !== page.patchOf(models[i])));
    const shared = extent(...rest);
    const found = models.map((model, i) => {
      const [low, high] = options.shared ? shared : extent(rest[i]);
      const own = extent(rest[i]);
      const mean = rest[i].reduce((a, b) => a + b, 0) / rest[i].length;
      return { ...heat(page, model, values[i], low, high), values: values[i],
        foot: [legend(cividis, fixed(low), fixed(high)), `${fixed(own[0])} to ${fixed(own[1])}, mean ${fixed(mean)}`] };
    });
    if (sameGrid(models[0], models[1])) {
      const difference = values[1].map((v, p) => v - values[0][p]);
      const most = Math.max(...difference.map(Math.abs), 0.01);
      found.push({ ...heat(page, models[1], difference, -most, most, diverging),
        title: `${models[1].name} ${MINUS} ${models[0].name}`, source: "difference of the similarities", kind: "difference", values: difference,
        foot: [legend(diverging, signed(-most), signed(most)), "orange: more alike, blue: less"] });
    }
    return [photo(page), ...found];
  },
  controls: (page) => [tick(page, "shared", "one scale for all models"), tick(page, "others", "nearest: other images only"), alphaControl(page)],
  details(page) {
    const { models, state, options } = page;
    return models.map((model) => {
      const found = model.nearest(state.image, page.patchOf(model), NEIGHBOURS, options.others && page.images.length > 1);
      return element("section", { class: "strip" },
        element("h2", { text: `Nearest patches for ${model.name}` }),
        element("div", { class: "neighbours" }, ...found.map((n) => neighbour(page, model, n))));
    });
  },
};

function neighbour(page, model, { image, patch, value }) {
  const [rows, columns] = model.grid;
  const row = Math.floor(patch / columns), column = patch % columns;
  const canvas = element("canvas", { width: 96, height: 96, "aria-hidden": "true" });
  const picture = page.images[image];
  // Five patches around the found one, moved inside the image.
  const w = picture.naturalWidth * (model.patch[1] / model.size[1]), h = picture.naturalHeight * (model.patch[0] / model.size[0]);
  const x = Math.max(0, Math.min(columns - 5, column - 2)), y = Math.max(0, Math.min(rows - 5, row - 2));
  const pen = canvas.getContext("2d");
  const across = Math.min(5, columns), down = Math.min(5, rows);
  pen.drawImage(picture, x * w, y * h, across * w, down * h, 0, 0, 96, 96);
  const [cw, ch] = [96 / across, 96 / down];
  for (const [colour, line] of [["#000", 4], ["#fff", 2]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.strokeRect((column - x) * cw, (row - y) * ch, cw, ch);
  }
  const here = page.models[0].at(patch, model.grid);
  return element("button", { type: "button", class: "neighbour", title: page.content.images[image].name,
    "aria-label": `Image ${image + 1}, row ${row + 1}, column ${column + 1}: similarity ${fixed(value)}. Go there.`,
    onclick: () => page.choose(image, here) },
  canvas, element("span", { text: fixed(value) }));
}

export const components = {
  title: "Components",
  explain(page) {
    const bases = new Set(page.models.map((m) => m.basis)).size;
    return bases === 1
      ? "The first three principal components of all patches as red, green and blue. All models share one basis and one colour range, each centred on its own mean: equal colours mean equal directions."
      : "The first three principal components of all patches as red, green and blue. Models with different numbers of channels have bases of their own: compare shapes, not colours.";
  },
  panels(page) {
    const { models, state } = page;
    return [photo(page), ...models.map((model) => ({
      title: model.name, source: model.source, grid: model.grid,
      draw: (sheet) => {
        sheet.photo(page.images[state.image], true);
        sheet.map(triples(model.colours, state.image * model.patches, model.patches), model.grid, page.options.alpha);
      },
      foot: [`${model.share.map((s) => percent(s)).join(", ")} of the variance`],
    }))];
  },
  controls: (page) => [alphaControl(page)],
  details: () => [],
};

function triples(array, start, count) {
  return Array.from({ length: count }, (_, p) => {
    const at = 3 * (start + p);
    return [array[at], array[at + 1], array[at + 2]];
  });
}

export const attention = {
  title: "Attention",
  explain: () => "Where the chosen patch looks in the last block: the mean of the attention over all heads, brightest where it is largest.",
  panels(page) {
    const { models, state } = page;
    return [photo(page), ...models.map((model) => {
      if (!model.attention) return { title: model.name, source: model.source, grid: model.grid, draw: (sheet) => sheet.photo(page.images[state.image], true), foot: ["this model's attention cannot be shown"] };
      const row = state.image * model.patches + page.patchOf(model);
      const values = model.attention.subarray(row * model.patches, (row + 1) * model.patches);
      return { ...heat(page, model, values, 0, 255), values,
        foot: [legend(cividis, "0", percent(model.peak[row], 1)), `${percent(model.prefix[row])} goes to class and register tokens`] };
    })];
  },
  controls: (page) => [alphaControl(page)],
  details: () => [],
};

export const classes = {
  title: "Classes",
  explain: (page) => page.state.chosen === null
    ? "A head predicts the classes of each patch. Bright: sure of its most probable class. A model is right where it predicts, above 50 %, exactly the patch's classes."
    : "Brightness: the probability of the class. Dashed: where the class is. A model is right where it predicts the class above 50 % exactly where it is.",
  panels(page) {
    const { models, state, predictions } = page;
    if (!predictions.has(state.image)) return [photo(page)];
    const n = predictions.patches, c = predictions.classes.length;
    const truth = state.chosen === null ? null : Array.from({ length: n }, (_, p) => predictions.truth[predictions.row(state.image, p) + state.chosen] > 0);
    const first = photo(page);
    return [{ ...first, draw: (sheet) => { first.draw(sheet); if (truth) sheet.border(truth, models[0].grid); },
      foot: [truth ? `${truth.filter(Boolean).length} patches with ${predictions.classes[state.chosen]}` : `${n} patches, ${c} classes`] },
    ...models.map((model, i) => {
      const values = Array.from({ length: n }, (_, p) => {
        const klass = state.chosen ?? predictions.best(i, state.image, p);
        return predictions.probabilities[i][predictions.row(state.image, p) + klass];
      });
      const map = heat(page, model, values, 0, 255);
      const right = values.filter((_, p) => predictions.right(i, state.image, p, state.chosen)).length;
      const changes = i > 0 ? predictions.changes(i, state.image, state.chosen) : [];
      const count = (kind) => changes.filter((k) => k === kind).length;
      return { ...map, values,
        draw: (sheet) => {
          map.draw(sheet);
          if (truth) sheet.border(truth, model.grid);
          values.forEach((_, p) => {
            if (changes[p]) sheet.mark(changes[p], p, model.grid);
            else if (!predictions.right(i, state.image, p, state.chosen)) sheet.mark("wrong", p, model.grid);
          });
        },
        foot: [legend(cividis, "0", "100 %"), `right on ${right} of ${n}`, ...(right < n ? [marked("wrong", n - right)] : []),
          ...(i > 0 ? [marked("fixed", count("fixed")), marked("broken", count("broken"))] : [])] };
    })];
  },
  controls(page) {
    const { predictions, state } = page;
    const select = element("select", { id: "class", onchange: (event) => page.go({ chosen: event.target.value === "" ? null : Number(event.target.value) }) },
      element("option", { value: "", text: "all classes" }),
      ...present(page).map((c) => element("option", { value: c, text: predictions.classes[c], selected: c === state.chosen })));
    return [element("label", {}, "class ", select), alphaControl(page)];
  },
  details(page) {
    const { models, state, predictions } = page;
    if (!predictions.has(state.image)) {
      return [element("p", { class: "note" }, `Predictions exist for the first ${predictions.images} images only. `,
        element("button", { type: "button", text: "Go to the first", onclick: () => page.choose(0, state.patch) }))];
    }
    const row = predictions.row(state.image, page.shown);
    const value = (i, c) => predictions.probabilities[i][row + c] / 255;
    const listed = predictions.classes.map((_, c) => c)
      .filter((c) => predictions.truth[row + c] || models.some((_, i) => value(i, c) > 0.1))
      .sort((a, b) => predictions.truth[row + b] - predictions.truth[row + a] || value(0, b) - value(0, a)).slice(0, 8);
    const head = element("tr", {}, ...["class", "there", ...models.map((m) => m.name)].map((text) => element("th", { text, scope: "col" })));
    const lines = listed.map((c) => element("tr", {},
      element("th", { text: predictions.classes[c], scope: "row" }),
      element("td", { text: predictions.truth[row + c] ? "yes" : "no" }),
      ...models.map((_, i) => element("td", {}, bar(value(i, c))))));
    return [element("section", {}, element("h2", { text: "Classes of the chosen patch" }),
      element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines))))];
  },
};

function marked(kind, count) {
  const badge = element("span", { class: `badge ${kind}`, "aria-hidden": "true", text: { fixed: "✓", broken: "✕", wrong: "╱" }[kind] });
  return element("span", {}, badge, ` ${kind} ${count}`);
}

function bar(share) {
  const inner = element("span", { class: "fill" });
  inner.style.width = `${100 * share}%`;
  return element("span", { class: "bar" }, inner, element("span", { class: "figure", text: percent(share) }));
}

// Classes that are in the image, or that a model predicts there.
function present(page) {
  const { predictions, state, models } = page;
  const found = new Set(state.chosen === null ? [] : [state.chosen]);
  if (predictions.has(state.image)) {
    for (let p = 0; p < predictions.patches; p++) {
      const row = predictions.row(state.image, p);
      for (let c = 0; c < predictions.classes.length; c++) {
        if (predictions.truth[row + c] || models.some((_, i) => predictions.probabilities[i][row + c] > 127)) found.add(c);
      }
    }
  }
  return [...found].sort((a, b) => a - b);
}

export const masks = {
  title: "Masks",
  explain: (page) => `Hide patches: what the first model makes of the masked view, and what the decoder of ${page.content.masks.name} reconstructs of it from embeddings of the whole image. Colours are principal components of the first model's tokens.`,
  panels(page) {
    const { content, state, arrays } = page;
    const model = page.models[0], n = model.patches, steps = content.masks.hidden.length;
    const hidden = content.masks.hidden[state.step];
    const order = arrays.order.subarray(state.image * n, (state.image + 1) * n);
    const gone = Array.from(order, (rank) => rank < hidden);
    const start = (state.image * steps + state.step) * n;
    const colours = (name) => (sheet) => sheet.map(triples(arrays[name], start, n), model.grid, 1);
    const errors = arrays.patch_error.subarray(start, start + n);
    const most = content.masks.max_error;
    return [
      { title: "masked view", grid: model.grid, draw: (sheet) => {
        sheet.photo(page.images[state.image]);
        sheet.map(gone.map((is) => (is ? model.mean : null)), model.grid, 1);
      }, foot: [`${hidden} of ${n} patches hidden`] },
      { title: `tokens of ${model.name}`, source: "the teacher, of the view", grid: model.grid, draw: colours("target"), foot: ["what the decoder should give"] },
      { title: "reconstruction", source: `decoder of ${content.masks.name}`, grid: model.grid, draw: colours("reconstruction"),
        foot: [`error ${arrays.view_error[state.image * steps + state.step].toFixed(2)} of the variance`] },
      { ...heat(page, model, errors, 0, 255), title: "error", source: "of each patch", values: errors, foot: [legend(cividis, "0", `${most} or more`), "in variances"] },
    ];
  },
  controls(page) {
    const { content, state } = page;
    const hidden = content.masks.hidden, n = page.models[0].patches;
    const slider = element("input", { type: "range", id: "step", min: 0, max: hidden.length - 1, step: 1, value: state.step,
      "aria-valuetext": `${hidden[state.step]} of ${n} patches hidden`,
      oninput: (event) => page.go({ step: Number(event.target.value) }) });
    return [element("label", {}, "hidden ", slider, ` ${percent(hidden[state.step] / n)}`)];
  },
  details: () => [],
};
