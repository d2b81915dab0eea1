// Run by the judge `ollama` with Ollama's JavaScript package: ollama_node.mjs MODULES URL
import assert from "node:assert";
import { createRequire } from "node:module";

const [, , modules, url] = process.argv;
const { Ollama } = createRequire(`${modules}/`)("ollama");
const client = new Ollama({ host: url });
const said = (content) => [{ role: "user", content }];
const CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Graz"}}</tool_call>';
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather of a city.",
      parameters: { type: "object", required: ["city"], properties: { city: { type: "string" } } },
    },
  },
];

const listed = await client.list();
assert.deepEqual(listed.models.map((model) => model.name).sort(), ["demo", "echo"]);
assert.equal((await client.show({ model: "demo" })).details.parameter_size, "1.7M");
assert.match((await client.version()).version, /^\d+\.\d+\.\d+$/);
assert.equal((await client.ps()).models.length, 2);
const whole = await client.chat({ model: "echo", messages: said("hello there") });
assert.equal(whole.message.content, "hello there");
let text = "";
let last;
for await (const chunk of await client.chat({ model: "echo", messages: said("abc"), stream: true })) {
  text += chunk.message.content;
  last = chunk;
}
assert.equal(text, "abc");
assert.equal(last.done_reason, "stop");
assert.equal(last.eval_count, 3);
const called = await client.chat({ model: "echo", messages: said(CALL), tools });
assert.deepEqual(called.message.tool_calls[0].function.arguments, { city: "Graz" });
const thought = await client.chat({ model: "echo", messages: said("<think>hm</think>so"), think: true });
assert.deepEqual([thought.message.thinking, thought.message.content], ["hm", "so"]);
const made = await client.generate({ model: "demo", prompt: "A", options: { temperature: 0, num_predict: 4 } });
assert.equal(made.eval_count, 4);
assert.equal((await client.embed({ model: "echo", input: ["a", "b"] })).embeddings.length, 2);
await assert.rejects(client.chat({ model: "nope", messages: said("x") }), { status_code: 404 });
const failing = await client.chat({ model: "echo", messages: said("[[echo error_at=2]]abcdef"), stream: true });
await assert.rejects(async () => {
  for await (const _ of failing);
}, /as requested/);
console.log(JSON.stringify({ content: true }));
