// What an empty conversation offers: an image to ask about, and things to say. Knows nothing of
// how they are sent.

import { h } from "./markdown.js";

export const PICTURE = "/page/sample.png";

// The bundled demo model knows these; about its image it is asked nothing that it may get wrong.
const DEMO = {
  title: "Chat about an image",
  lead: "Choose a question, or add an image of your own.",
  about: ["What is in this image?", "What colour is the square?", "How many shapes are there?", "Is there a green star?"],
  say: ["What is 3 plus 4?", "Count to 10.", "Tell me a short story."],
  fine: "This demo model is tiny: it knows images of coloured shapes, small sums and small talk. Photographs are beyond it.",
};
const SEEING = {
  title: "What shall it be?",
  lead: "Write below, or add an image.",
  about: ["What is in this image?", "Describe this picture in one sentence."],
  say: ["Explain what a message bus does, in three sentences.", "Write a haiku about a queue."],
};
const READING = { ...SEEING, lead: "Write below. This model reads text alone.", about: [] };

const of = (model) => (model?.name === "demo" ? DEMO : model?.images ? SEEING : READING);

const chips = (questions, ask) => h("div", { class: "ideas" }, ...questions.map((question) => h("button", { class: "idea", type: "button", onclick: () => ask(question) }, question)));

/** For a conversation in which nothing was said; `say(text)` and `show(text)` (with the image) send. */
export function welcome(model, { say, show }) {
  const ideas = of(model);
  const sample = ideas.about.length
    ? h(
        "section",
        { class: "sample", "aria-label": "Try this image" },
        h("img", { src: PICTURE, alt: "A red circle left of a blue square", width: 132, height: 132 }),
        h("div", {}, h("h2", {}, "Try this image"), chips(ideas.about, show)),
      )
    : null;
  return h("div", { class: "empty" }, h("h1", {}, ideas.title), h("p", {}, ideas.lead), sample, chips(ideas.say, say), ideas.fine ? h("p", { class: "fine" }, ideas.fine) : null);
}

/** Further questions about the image, those that were asked left out; null when none is left. */
export function further(model, asked, say) {
  const left = of(model).about.filter((question) => !asked.has(question));
  return left.length ? h("div", { class: "further" }, chips(left, say)) : null;
}
