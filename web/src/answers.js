// Questions with the answers of all models; those on which the models disagree come first.
import { element, MODEL_COLOURS, Sheet } from "./draw.js";

const DASHES = [[], [2, 2], [8, 3], [1, 3]];
const TRUTH = "#222";

export class AnswersView {
  constructor(place, page) {
    this.page = page;
    this.facts = page.content.answers;
    this.disagreeOnly = false;
    this.benchmark = "";
    const names = [...new Set(this.facts.questions.map((q) => q.benchmark))];
    const filter = element("select", { id: "benchmark", onchange: (e) => this.filter({ benchmark: e.target.value }) },
      element("option", { value: "", text: "all benchmarks" }), ...names.map((text) => element("option", { value: text, text })));
    const only = element("input", { type: "checkbox", id: "disagree", onchange: (e) => this.filter({ disagreeOnly: e.target.checked }) });
    this.list = element("div", { role: "listbox", class: "questions", tabindex: 0, "aria-label": "Questions", onkeydown: (e) => this.key(e) });
    this.detail = element("article", { class: "question", "aria-live": "polite" });
    place.append(
      element("p", { class: "muted", text: `${this.facts.common} questions asked of all models, ${this.facts.disagreements} with different scores; ${this.facts.questions.length} are here, differences first.` }),
      element("div", { id: "answercontrols", class: "controls" }, element("label", {}, "benchmark ", filter), element("label", {}, only, " only different scores")),
      element("div", { class: "answers" }, this.list, this.detail));
    this.filter({});
  }

  filter(change) {
    Object.assign(this, change);
    this.listed = this.facts.questions.map((q, i) => i)
      .filter((i) => (!this.benchmark || this.facts.questions[i].benchmark === this.benchmark) && (!this.disagreeOnly || this.facts.questions[i].disagree));
    this.list.replaceChildren(...this.listed.map((i) => {
      const q = this.facts.questions[i];
      return element("div", { role: "option", id: `q${i}`, class: "option", onclick: () => this.page.go({ question: i }) },
        element("span", { class: q.disagree ? "badge differs" : "badge", text: q.disagree ? "≠" : "=", title: q.disagree ? "different scores" : "same score" }),
        element("span", { text: q.message.split("\n")[0] }));
    }));
    if (!this.listed.length) this.list.append(element("p", { class: "muted", text: "No such question." }));
    this.render();
  }

  key(event) {
    const at = this.listed.indexOf(this.page.state.question);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: this.listed.length - 1 }[event.key];
    if (to === undefined || this.listed[to] === undefined) return;
    event.preventDefault();
    this.page.go({ question: this.listed[to] });
  }

  render() {
    const number = this.page.state.question, q = this.facts.questions[number];
    for (const option of this.list.querySelectorAll("[role=option]")) option.setAttribute("aria-selected", option.id === `q${number}`);
    const chosen = this.list.querySelector(`#q${number}`);
    this.list.setAttribute("aria-activedescendant", chosen ? chosen.id : "");
    if (chosen) this.list.scrollTop = Math.max(0, chosen.offsetTop - this.list.offsetTop - 80);
    const rows = [
      ...(q.box || q.truth ? [["truth", q.truth || (q.image === null ? `box ${q.box.join(", ")}` : "the box drawn here"), null, q.box ? TRUTH : null, [6, 4]]] : []),
      ...q.answers.map((a, i) => [this.facts.models[i], a.text, a.score, q.box ? MODEL_COLOURS[i] : null, DASHES[i], a.box]),
    ];
    const list = element("dl", {}, ...rows.flatMap(([name, text, score, colour, dash, box]) => {
      const term = element("dt", {}, ...(colour && (name === "truth" || box) ? [swatch(colour, dash)] : []), name);
      const verdict = score === null ? [] : [element("span", { class: score >= 1 ? "badge fixed" : score > 0 ? "badge" : "badge broken", text: score >= 1 ? "✓" : score > 0 ? "~" : "✕", title: `score ${score.toFixed(2)}` }), " "];
      return [term, element("dd", {}, ...verdict, text || "(empty)", ...(score === null ? [] : [element("span", { class: "muted", text: `  score ${score.toFixed(2)}` })]))];
    }));
    const canvas = element("canvas", { class: "picture", role: "img", "aria-label": `The image of the question${q.box ? ", with the true box and the boxes of the models" : ""}` });
    this.detail.replaceChildren(
      element("p", { class: "muted", text: `${q.benchmark} ${q.id}` }),
      element("p", { class: "message", text: q.message }),
      ...(q.image === null ? [element("p", { class: "note", text: "The image could not be read when the page was made." })] : [canvas]), list);
    if (q.image !== null && this.page.state.view === "answers") this.draw(canvas, q);
  }

  draw(canvas, q) {
    const image = this.page.pictures[q.image];
    canvas.style.maxWidth = `${Math.min(640, 1.6 * image.naturalWidth)}px`;
    const sheet = new Sheet(canvas, [image.naturalHeight, image.naturalWidth], [image.naturalHeight, image.naturalWidth]);
    sheet.photo(image);
    if (q.box) sheet.box(q.box, TRUTH, [6, 4]);
    q.answers.forEach((a, i) => a.box && sheet.box(a.box, MODEL_COLOURS[i], DASHES[i]));
  }
}

function swatch(colour, dash) {
  const canvas = element("canvas", { width: 44, height: 16, class: "swatch", "aria-hidden": "true" });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 3, 44, 10);
  pen.setLineDash(dash.map((d) => 2 * d));
  pen.strokeStyle = colour;
  pen.lineWidth = 5;
  pen.beginPath();
  pen.moveTo(0, 8);
  pen.lineTo(44, 8);
  pen.stroke();
  return canvas;
}
