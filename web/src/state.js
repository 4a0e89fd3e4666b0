// What is chosen, and the page's address, in which images and patches count from 1.

export class State {
  constructor(limits) {
    this.limits = limits; // images, patches, views, steps, classes, questions
    Object.assign(this, { image: 0, patch: 0, view: limits.views[0], step: 0, chosen: null, question: 0 });
    this.patch = limits.start;
    this.step = Math.min(2, limits.steps - 1);
    this.read(location.hash);
  }

  read(hash) {
    const given = new URLSearchParams(hash.replace(/^#/, ""));
    const number = (name, most) => {
      const text = given.get(name);
      const value = text !== null && /^\d{1,9}$/.test(text) ? Number(text) - 1 : -1;
      return value >= 0 && value < most ? value : null;
    };
    this.image = number("image", this.limits.images) ?? this.image;
    this.patch = number("patch", this.limits.patches) ?? this.patch;
    this.step = number("step", this.limits.steps) ?? this.step;
    this.question = number("question", this.limits.questions) ?? this.question;
    this.chosen = number("class", this.limits.classes);
    if (this.limits.views.includes(given.get("view"))) this.view = given.get("view");
  }

  write() {
    const parts = this.view === "answers" ? [`question=${this.question + 1}`] : [`image=${this.image + 1}`, `patch=${this.patch + 1}`];
    if (this.view !== this.limits.views[0]) parts.push(`view=${this.view}`);
    if (this.view === "masks") parts.push(`step=${this.step + 1}`);
    if (this.view === "classes" && this.chosen !== null) parts.push(`class=${this.chosen + 1}`);
    history.replaceState(null, "", `#${parts.join("&")}`);
  }
}
