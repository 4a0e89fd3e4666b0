// Puts the page together: tabs, thumbnails, panels, pointer and keys.
import { AnswersView } from "./answers.js";
import { readContent } from "./data.js";
import { element, Sheet } from "./draw.js";
import { Model, Predictions } from "./maths.js";
import { State } from "./state.js";
import * as views from "./views.js";

const byId = (id) => document.getElementById(id);

class Page {
  constructor({ content, arrays }, images, pictures) {
    Object.assign(this, { content, arrays, images, pictures });
    this.models = content.models.map((facts, i) => new Model(facts, i, arrays, content.arrays[`features${i}`]));
    this.predictions = content.predictions ? new Predictions(content.predictions, this.models, arrays) : null;
    this.views = { similarity: views.similarity, components: views.components };
    if (this.models.some((m) => m.attention)) this.views.attention = views.attention;
    if (content.predictions) this.views.classes = views.classes;
    if (content.masks) this.views.masks = views.masks;
    const names = Object.keys(this.views);
    if (content.answers) names.push("answers");
    const [rows, columns] = this.models[0].grid;
    this.state = new State({
      images: images.length,
      patches: this.models[0].patches,
      start: Math.floor(rows / 2) * columns + Math.floor(columns / 2),
      views: names,
      steps: content.masks ? content.masks.hidden.length : 1,
      classes: content.predictions ? content.predictions.classes.length : 0,
      questions: content.answers ? content.answers.questions.length : 0,
    });
    this.options = { alpha: 0.8, shared: true, others: true };
    this.hover = null;
    this.built = "";
    this.frame();
    this.answers = content.answers ? new AnswersView(byId("answers"), this) : null;
    this.render();
  }

  get shown() {
    return this.hover ?? this.state.patch;
  }

  patchOf(model) {
    return model.at(this.shown, this.models[0].grid);
  }

  choose(image, patch) {
    this.hover = null;
    this.go({ image, patch });
  }

  go(change) {
    Object.assign(this.state, change);
    this.state.write();
    this.render();
  }

  set(change) {
    Object.assign(this.options, change);
    this.render();
  }

  frame() {
    const { content } = this;
    const names = this.models.map((m) => m.name);
    document.title = `${names.join(", ")}: localign explore`;
    byId("title").textContent = `What ${names.slice(0, -1).join(", ")} and ${names.at(-1)} see in each patch`;
    byId("summary").textContent = `${this.images.length} image${this.images.length === 1 ? "" : "s"} · ${this.models.map((m) => (m.name === m.source ? m.name : `${m.name}: ${m.source}`)).join(" · ")} · similarities within ${Math.max(...this.models.map((m) => m.error)).toFixed(4)} · localign ${content.version}`;
    if (content.home) byId("summary").append(" · ", element("a", { href: content.home, text: "other photographs" }));
    byId("tabs").append(...this.state.limits.views.map((name) =>
      element("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "main", text: name === "answers" ? "Answers" : this.views[name].title, onclick: () => this.go({ view: name }) })));
    byId("tabs").addEventListener("keydown", (event) => this.tabKey(event));
    byId("thumbs").append(...content.images.map(({ name, uri }, i) =>
      element("button", { type: "button", role: "option", class: "thumb", tabindex: -1, title: name, "aria-label": `Image ${i + 1}: ${name}`, onclick: () => this.choose(i, this.state.patch) },
        element("img", { src: uri, alt: "", draggable: "false" }))));
    byId("thumbs").addEventListener("keydown", (event) => this.thumbKey(event));
    byId("panels").addEventListener("keydown", (event) => this.patchKey(event));
    addEventListener("hashchange", () => { this.state.read(location.hash); this.hover = null; this.render(); });
    new ResizeObserver(() => this.render()).observe(document.body);
  }

  tabKey(event) {
    const names = this.state.limits.views, at = names.indexOf(this.state.view);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 }[event.key];
    if (names[to] === undefined) return;
    event.preventDefault();
    this.go({ view: names[to] });
    byId(`tab-${names[to]}`).focus();
  }

  thumbKey(event) {
    const at = this.state.image, last = this.images.length - 1;
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || to < 0 || to > last) return;
    event.preventDefault();
    this.choose(to, this.state.patch);
    byId("thumbs").children[to].focus();
  }

  patchKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [rows, columns] = this.models[0].grid;
    let { image, patch } = this.state;
    const row = Math.floor(patch / columns), column = patch % columns;
    const moves = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [row, 0], End: [row, columns - 1],
    };
    if (moves[event.key]) {
      const [r, c] = moves[event.key];
      patch = Math.min(rows - 1, Math.max(0, r)) * columns + Math.min(columns - 1, Math.max(0, c));
    } else if (event.key === "PageDown") image = Math.min(this.images.length - 1, image + 1);
    else if (event.key === "PageUp") image = Math.max(0, image - 1);
    else return;
    event.preventDefault();
    this.choose(image, patch);
  }

  render() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      this.renderNow();
    });
  }

  renderNow() {
    const { state } = this;
    for (const name of state.limits.views) {
      const tab = byId(`tab-${name}`);
      tab.setAttribute("aria-selected", name === state.view);
      tab.tabIndex = name === state.view ? 0 : -1;
    }
    byId("main").setAttribute("aria-labelledby", `tab-${state.view}`);
    byId("patches").hidden = state.view === "answers";
    byId("answers").hidden = state.view !== "answers";
    if (state.view === "answers") return this.answers.render();
    this.renderThumbs();
    this.renderPatches();
  }

  renderThumbs() {
    const thumbs = byId("thumbs");
    [...thumbs.children].forEach((thumb, i) => {
      thumb.setAttribute("aria-selected", i === this.state.image);
      thumb.tabIndex = i === this.state.image ? 0 : -1;
    });
    if (this.scrolledTo !== this.state.image) {
      const chosen = thumbs.children[this.state.image];
      thumbs.scrollLeft = chosen.offsetLeft - thumbs.offsetLeft - thumbs.clientWidth / 2 + chosen.clientWidth / 2;
      this.scrolledTo = this.state.image;
    }
  }

  renderPatches() {
    const { state } = this;
    const view = this.views[state.view];
    byId("explanation").textContent = view.explain(this);
    this.renderControls(view);
    const panels = view.panels(this);
    this.buildPanels(panels);
    const figures = byId("panels").children;
    const covered = this.models[0].grid.map((count, i) => count * this.models[0].patch[i]);
    panels.forEach((panel, i) => {
      const figure = figures[i];
      figure.dataset.kind = panel.kind ?? "";
      figure.querySelector("h2").textContent = panel.title;
      figure.querySelector("h2").title = panel.source ?? "";
      const sheet = new Sheet(figure.querySelector("canvas"), this.models[0].size, covered);
      panel.draw(sheet);
      sheet.outline(panel.grid === this.models[0].grid ? this.shown : this.at(panel.grid), panel.grid);
      const foot = [...(panel.foot ?? [])];
      figure.querySelector(".foot").replaceChildren(...foot.map((part) => (typeof part === "string" ? element("span", { text: part }) : part)));
    });
    // The chosen patch's details stay while the pointer only passes over patches of the similarity view.
    byId("details").replaceChildren(...view.details(this));
    const columns = this.models[0].grid[1];
    byId("live").textContent = `Image ${state.image + 1} of ${this.images.length}: ${this.content.images[state.image].name}. Patch ${this.shown + 1}: row ${Math.floor(this.shown / columns) + 1}, column ${(this.shown % columns) + 1}.`;
  }

  at(grid) {
    return Model.prototype.at.call({ grid }, this.shown, this.models[0].grid);
  }

  // Controls that are in use keep the focus: they are only built again when the view or its choices change.
  renderControls(view) {
    const { state } = this;
    const key = `${state.view} ${state.view === "classes" ? `${state.image} ${state.chosen}` : ""}`;
    if (key !== this.controlsOf) {
      byId("controls").replaceChildren(...view.controls(this));
      this.controlsOf = key;
    } else if (state.view === "masks" && document.activeElement?.id !== "step") {
      byId("controls").replaceChildren(...view.controls(this));
    } else if (state.view === "masks") {
      const again = view.controls(this)[0];
      const label = byId("controls").firstChild;
      label.lastChild.textContent = again.lastChild.textContent;
      byId("step").setAttribute("aria-valuetext", again.querySelector("input").getAttribute("aria-valuetext"));
    }
  }

  buildPanels(panels) {
    const key = `${this.state.view} ${panels.length}`;
    if (key === this.built) return;
    this.built = key;
    const place = byId("panels");
    place.dataset.count = panels.length;
    place.replaceChildren(...panels.map((_, i) => {
      const canvas = element("canvas", { "aria-hidden": "true" });
      const to = (event) => {
        const { grid, patch, size } = this.models[0];
        const box = canvas.getBoundingClientRect();
        const x = Math.floor(((event.clientX - box.left) / box.width) * (size[1] / patch[1]));
        const y = Math.floor(((event.clientY - box.top) / box.height) * (size[0] / patch[0]));
        return Math.min(grid[0] - 1, Math.max(0, y)) * grid[1] + Math.min(grid[1] - 1, Math.max(0, x));
      };
      canvas.addEventListener("pointermove", (event) => {
        if (event.pointerType === "touch") return;
        const hover = to(event);
        if (hover === this.shown) return;
        this.hover = hover;
        this.render();
      });
      canvas.addEventListener("pointerleave", () => {
        if (this.hover === null) return;
        this.hover = null;
        this.render();
      });
      canvas.addEventListener("click", (event) => this.choose(this.state.image, to(event)));
      return element("figure", { class: "panel" }, element("h2", {}), canvas, element("figcaption", { class: "foot" }));
    }));
  }
}

function themeButton() {
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
}

async function loaded(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  return image;
}

async function start() {
  themeButton();
  const data = readContent(document);
  const images = await Promise.all(data.content.images.map(({ uri }) => loaded(uri)));
  const pictures = await Promise.all((data.content.answers?.images ?? []).map(loaded));
  window.explorer = new Page(data, images, pictures);
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("failure").hidden = false;
  byId("failure").textContent = `This page cannot be shown: ${error.message}. Try a newer browser, or write the page again.`;
  console.error(error);
});
