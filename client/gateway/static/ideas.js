// What an empty conversation offers: a picture to ask about, and things to say. Knows nothing of
// how they are sent.

import { h } from "./markdown.js";

export const PICTURE = "/page/sample.png";

// The bundled demo model knows these; about its picture it is asked nothing that it may get wrong.
const DEMO = {
  title: "Chat about a picture",
  lead: "Choose a question, or add a picture of your own.",
  about: ["What is in this image?", "What colour is the square?", "How many shapes are there?", "Is there a green star?"],
  say: ["What is 3 plus 4?", "Count to 10.", "Tell me a short story."],
  fine: "This demo model is tiny: it knows pictures of coloured shapes, small sums and small talk. Photographs are beyond it.",
};
const SEEING = {
  title: "What shall it be?",
  lead: "Write below, or add a picture.",
  about: ["What is in this image?", "Describe this picture in one sentence."],
  say: ["Explain what a message bus does, in three sentences.", "Write a haiku about a queue."],
};
const READING = { ...SEEING, lead: "Write below. This model reads text alone.", about: [] };

const of = (model) => (model?.name === "demo" ? DEMO : model?.images ? SEEING : READING);

const chips = (questions, ask) => h("div", { class: "ideas" }, ...questions.map((question) => h("button", { class: "idea", type: "button", onclick: () => ask(question) }, question)));

/** For a conversation in which nothing was said; `say(text)` and `show(text)` (with the picture) send. */
export function welcome(model, { say, show }) {
  const ideas = of(model);
  const sample = ideas.about.length
    ? h(
        "section",
        { class: "sample", "aria-label": "Try this picture" },
        h("img", { src: PICTURE, alt: "A red circle left of a blue square", width: 132, height: 132 }),
        h("div", {}, h("h2", {}, "Try this picture"), chips(ideas.about, show)),
      )
    : null;
  return h("div", { class: "empty" }, h("h1", {}, ideas.title), h("p", {}, ideas.lead), sample, chips(ideas.say, say), ideas.fine ? h("p", { class: "fine" }, ideas.fine) : null);
}

/** Further questions about the picture, those that were asked left out; null when none is left. */
export function further(model, asked, say) {
  const left = of(model).about.filter((question) => !asked.has(question));
  return left.length ? h("div", { class: "further" }, chips(left, say)) : null;
}
