// Cosine similarity of stored features, nearest patches, and who is right.

export class Model {
  constructor(facts, number, arrays, place) {
    Object.assign(this, facts);
    this.number = number;
    this.features = arrays[`features${number}`];
    this.colours = arrays[`colours${number}`];
    this.attention = arrays[`attention${number}`];
    this.peak = arrays[`peak${number}`];
    this.prefix = arrays[`prefix${number}`];
    [this.count, this.patches, this.width] = place.shape;
    this.norms = new Float32Array(this.count * this.patches);
    for (let i = 0; i < this.norms.length; i++) this.norms[i] = Math.sqrt(this.dot(i, i)) || 1;
  }

  dot(a, b) {
    const { features, width } = this;
    let sum = 0;
    for (let c = 0, i = a * width, j = b * width; c < width; c++) sum += features[i + c] * features[j + c];
    return sum;
  }

  // Cosine similarity of one patch to all patches of an image.
  similarities(image, patch, other = image) {
    const from = image * this.patches + patch;
    const found = new Float32Array(this.patches);
    for (let p = 0; p < this.patches; p++) {
      const to = other * this.patches + p;
      found[p] = this.dot(from, to) / (this.norms[from] * this.norms[to]);
    }
    return found;
  }

  // The patches most similar to one, best first, without itself.
  nearest(image, patch, count, othersOnly) {
    const best = [];
    for (let other = 0; other < this.count; other++) {
      if (othersOnly && other === image) continue;
      const values = this.similarities(image, patch, other);
      for (let p = 0; p < this.patches; p++) {
        if (other === image && p === patch) continue;
        const value = values[p];
        if (best.length === count && value <= best[count - 1].value) continue;
        let at = best.length;
        while (at > 0 && best[at - 1].value < value) at--;
        best.splice(at, 0, { image: other, patch: p, value });
        best.length = Math.min(best.length, count);
      }
    }
    return best;
  }

  // The patch of this model's grid at the centre of a patch of another grid.
  at(patch, [rows, columns]) {
    if (rows === this.grid[0] && columns === this.grid[1]) return patch;
    const y = (Math.floor(patch / columns) + 0.5) / rows;
    const x = ((patch % columns) + 0.5) / columns;
    return Math.floor(y * this.grid[0]) * this.grid[1] + Math.floor(x * this.grid[1]);
  }
}

export class Predictions {
  constructor(facts, models, arrays) {
    Object.assign(this, facts);
    this.patches = models[0].patches;
    this.truth = arrays.truth;
    this.probabilities = models.map((_, number) => arrays[`probability${number}`]);
  }

  has(image) {
    return image < this.images;
  }

  row(image, patch) {
    return (image * this.patches + patch) * this.classes.length;
  }

  best(model, image, patch) {
    const row = this.row(image, patch);
    const values = this.probabilities[model];
    let best = 0;
    for (let c = 1; c < this.classes.length; c++) if (values[row + c] > values[row + best]) best = c;
    return best;
  }

  // Whether a class, or with null every class, is predicted (above 0.5) where it is and only there.
  right(model, image, patch, chosen) {
    const row = this.row(image, patch);
    const agrees = (c) => this.probabilities[model][row + c] > 127 === this.truth[row + c] > 0;
    return chosen === null ? this.classes.every((_, c) => agrees(c)) : agrees(chosen);
  }

  // "fixed", "broken" or "" for every patch: the model against the first model.
  changes(model, image, chosen) {
    return Array.from({ length: this.patches }, (_, patch) => {
      const before = this.right(0, image, patch, chosen);
      const after = this.right(model, image, patch, chosen);
      return before === after ? "" : after ? "fixed" : "broken";
    });
  }
}

export function extent(...lists) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) for (const value of list) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}
