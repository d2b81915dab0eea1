// Run by the judge `batches` with OpenAI's JavaScript package: batches_node.mjs MODULES URL
import assert from "node:assert";
import { createRequire } from "node:module";

const [, , modules, url] = process.argv;
const require = createRequire(`${modules}/`);
const OpenAI = require("openai");
const { toFile } = OpenAI;
const client = new OpenAI({ apiKey: "none", baseURL: `${url}/v1`, maxRetries: 0 });
const CHAT = "/v1/chat/completions";
const line = (id, body) => ({ custom_id: id, method: "POST", url: CHAT, body });
const said = (content, model = "echo") => ({ model, messages: [{ role: "user", content }] });
const jsonl = (lines) => lines.map((one) => `${JSON.stringify(one)}\n`).join("");

async function begin(lines) {
  const file = await client.files.create({
    file: await toFile(Buffer.from(jsonl(lines)), "in.jsonl"),
    purpose: "batch",
    expires_after: { anchor: "created_at", seconds: 3600 },
  });
  assert.equal(file.bytes, jsonl(lines).length);
  assert.equal(file.expires_at, file.created_at + 3600);
  const batch = await client.batches.create({
    input_file_id: file.id,
    endpoint: CHAT,
    completion_window: "24h",
    metadata: { judge: "yes" },
  });
  return batch;
}

async function over(batch) {
  for (;;) {
    const now = await client.batches.retrieve(batch.id);
    if (["completed", "failed", "cancelled", "expired"].includes(now.status)) return now;
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

async function rows(id) {
  const text = await (await client.files.content(id)).text();
  return text.trimEnd().split("\n").map((row) => JSON.parse(row));
}

const names = Array.from({ length: 50 }, (_, i) => `l${i}`);
const lines = [...names.map((name) => line(name, said(name))), line("wrong", { ...said("x"), n: 0 })];
const first = await begin(lines);
const done = await over(first);
assert.equal(done.status, "completed");
assert.deepEqual(done.request_counts, { total: 51, completed: 50, failed: 1 });
assert.deepEqual(done.metadata, { judge: "yes" });
const answers = await rows(done.output_file_id);
assert.deepEqual(answers.map((row) => row.custom_id).sort(), [...names].sort());
for (const row of answers) {
  assert.equal(row.response.body.choices[0].message.content, row.custom_id);
}
const [wrong] = await rows(done.error_file_id);
assert.equal(wrong.response.body.error.param, "n");

const endless = said("[[echo mode=sampled answer_tokens=100000 step_delay_ms=20]] go");
const second = await begin([line("endless", endless)]);
assert.ok(["cancelling", "cancelled"].includes((await client.batches.cancel(second.id)).status));
assert.equal((await over(second)).status, "cancelled");

const listed = [];
for await (const batch of client.batches.list({ limit: 1 })) listed.push(batch.id);
assert.deepEqual(listed, [second.id, first.id]);
let files = 0;
for await (const file of client.files.list({ limit: 2, purpose: "batch" })) files += Boolean(file.id);
assert.equal(files, 2);
assert.ok((await client.files.delete(first.input_file_id)).deleted);
await assert.rejects(client.files.retrieve(first.input_file_id), OpenAI.NotFoundError);
await assert.rejects(
  client.files.create({ file: await toFile(Buffer.from("x"), "a.txt"), purpose: "fine-tune" }),
  OpenAI.BadRequestError,
);
const failed = await over(await begin([line("a", said("x")), line("a", said("y"))]));
assert.equal(failed.status, "failed");
assert.deepEqual([failed.errors.data[0].line, failed.errors.data[0].code], [2, "duplicate_custom_id"]);
console.log(JSON.stringify({ content: true }));
