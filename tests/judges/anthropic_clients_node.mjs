// Run by the judge `anthropic` with Vercel's AI SDK: anthropic_clients_node.mjs MODULES URL
import assert from "node:assert";
import { createRequire } from "node:module";

const [, , modules, url] = process.argv;
const require = createRequire(`${modules}/`);
const { createAnthropic } = require("@ai-sdk/anthropic");
const { generateObject, generateText, isStepCount, stepCountIs, streamText, tool } = require("ai");
const { z } = require("zod");
const model = createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" })("echo");
const CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>';
const inputSchema = z.object({ a: z.number() });

assert.equal((await generateText({ model, prompt: "hello" })).text, "hello");
const streamed = streamText({ model, prompt: "hello there" });
let text = "";
for await (const delta of streamed.textStream) text += delta;
assert.deepEqual([text, await streamed.finishReason], ["hello there", "stop"]);
assert.equal((await streamed.usage).outputTokens, 11);
const thinking = { type: "enabled", budgetTokens: 1200 };
const thought = await generateText({
  model,
  prompt: "<think>hm</think>yes",
  providerOptions: { anthropic: { thinking } },
});
assert.deepEqual([thought.reasoningText, thought.text], ["hm", "yes"]);
const made = await generateObject({ model, schema: inputSchema, prompt: '{"a": 1}' });
assert.deepEqual(made.object, { a: 1 });
const called = await generateText({
  model,
  prompt: CALL,
  tools: { add: tool({ description: "Adds one.", inputSchema, execute: async ({ a }) => a + 1 }) },
  stopWhen: (isStepCount ?? stepCountIs)(2),
});
assert.deepEqual(called.steps.map((step) => step.toolResults.map((one) => one.output)), [[2], [2]]);
const forced = await generateText({ model, prompt: CALL, toolChoice: "required", tools: { add: tool({ inputSchema }) } });
assert.deepEqual(forced.toolCalls[0].input, { a: 1 });
console.log(JSON.stringify({ content: true }));
