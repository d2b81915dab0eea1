// Run by the judge `anthropic` with Anthropic's JavaScript package: anthropic_node.mjs MODULES URL
import assert from "node:assert";
import { createRequire } from "node:module";

const [, , modules, url] = process.argv;
const { default: Anthropic } = createRequire(`${modules}/`)("@anthropic-ai/sdk");
const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}</tool_call>';
const THOUGHT = "<think>hm</think>so";
const tools = [{ name: "add", input_schema: { type: "object", properties: {} } }];
const thinking = { type: "enabled", budget_tokens: 1024 };
const asking = (content, more = {}) => ({
  model: "echo",
  max_tokens: 4096,
  messages: [{ role: "user", content }],
  ...more,
});
// The message at once, and from the stream's helper with the events that it fired.
const both = async (body) => {
  const whole = await client.messages.create(body);
  const fired = { text: "", thinking: "", inputJson: "", blocks: [] };
  const stream = client.messages
    .stream(body)
    .on("text", (text) => (fired.text += text))
    .on("thinking", (text) => (fired.thinking += text))
    .on("inputJson", (text) => (fired.inputJson += text))
    .on("contentBlock", (block) => fired.blocks.push(block.type));
  const collected = await stream.finalMessage();
  const bare = (message) => message.content.map(({ id, ...block }) => block);
  assert.deepEqual(bare(collected), bare(whole));
  assert.equal(collected.stop_reason, whole.stop_reason);
  assert.deepEqual(fired.blocks, whole.content.map((block) => block.type));
  assert.equal(collected.usage.output_tokens, whole.usage.output_tokens);
  assert.equal(collected.usage.input_tokens, whole.usage.input_tokens);
  return [whole, fired];
};

const [plain] = await both(asking("hello there"));
assert.equal(plain.content[0].text, "hello there");
assert.equal(plain.stop_reason, "end_turn");
const counted = await client.messages.countTokens({ model: "echo", messages: asking("hello there").messages });
assert.equal(counted.input_tokens, plain.usage.input_tokens);

const [called, callsFired] = await both(asking(`See:\n${CALL}\n${CALL}`, { tools }));
assert.deepEqual(callsFired.blocks, ["text", "tool_use", "tool_use"]);
assert.equal(called.stop_reason, "tool_use");
assert.deepEqual(called.content[2].input, { a: 1, b: [2, "x"] });

const [thought, thoughtFired] = await both(asking(THOUGHT, { thinking }));
assert.deepEqual([thoughtFired.thinking, thoughtFired.text], ["hm", "so"]);
const again = (block) =>
  client.messages.create({
    ...asking(""),
    messages: [
      { role: "user", content: "?" },
      { role: "assistant", content: [block, thought.content[1]] },
      { role: "user", content: "sure?" },
    ],
  });
assert.equal((await again(thought.content[0])).content[0].text, "sure?");
await assert.rejects(again({ ...thought.content[0], thinking: "ha" }), { status: 400, type: "invalid_request_error" });

const [stopped] = await both(asking("one two", { stop_sequences: ["two"] }));
assert.deepEqual([stopped.stop_reason, stopped.stop_sequence], ["stop_sequence", "two"]);
const demo = await client.messages.create({ ...asking("What is 2 + 2?"), model: "demo", max_tokens: 8 });
assert.ok(demo.usage.output_tokens <= 8 && demo.content[0].text.length > 0);

await assert.rejects(client.messages.create({ ...asking("x"), model: "nope" }), { status: 404, type: "not_found_error" });
await assert.rejects(client.messages.stream(asking("[[echo error_at=2]]abcdef")).finalMessage(), (error) => {
  assert.equal(error.error.error.type, "api_error");
  assert.match(error.message, /as requested/);
  return true;
});
const listed = [];
for await (const model of client.models.list({ limit: 1 })) listed.push(model.id);
assert.deepEqual(listed, ["demo", "echo"]);
console.log(JSON.stringify({ content: true }));
