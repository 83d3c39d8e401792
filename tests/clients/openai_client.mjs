// The openai package of npm against the server at OPENAI_BASE_URL.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const packages = createRequire(process.env.NODE_PACKAGES + "/");
const { default: OpenAI } = await import(pathToFileURL(packages.resolve("openai")));
const { version } = JSON.parse(readFileSync(process.env.NODE_PACKAGES + "/node_modules/openai/package.json"));
const client = new OpenAI({ maxRetries: 0 });
const model = "first-light";
const messages = [{ role: "user", content: "Hello!" }];
const city = [{ role: "user", content: "What is the weather in Paris?" }];
const greedy = { model, temperature: 0, max_completion_tokens: 64 };
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", description: "The weather in a city", parameters } }];
const schema = {
  type: "object",
  properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};

const checks = {
  async chat() {
    const answer = await client.chat.completions.create({ messages, ...greedy });
    assert.equal(answer.choices[0].finish_reason, "stop");
    return answer.choices[0].message.content;
  },
  async stream() {
    let text = "";
    const chunks = await client.chat.completions.create({ messages, stream: true, ...greedy });
    for await (const chunk of chunks) text += chunk.choices[0]?.delta.content ?? "";
    assert.equal(text, await checks.chat());
    return text;
  },
  async tools() {
    const answer = await client.chat.completions.create({ messages: city, tools, ...greedy });
    const [call] = answer.choices[0].message.tool_calls;
    assert.ok(JSON.parse(call.function.arguments).city);
    const runner = client.chat.completions.stream({ messages: city, tools, ...greedy });
    const streamed = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0];
    assert.equal(streamed.function.arguments, call.function.arguments);
    return call.function;
  },
  async "json schema"() {
    const response_format = { type: "json_schema", json_schema: { name: "person", strict: true, schema } };
    const content = 'Extract name and age as JSON: "Maria is 31 years old."';
    const answer = await client.chat.completions.create({ messages: [{ role: "user", content }], response_format, ...greedy });
    const found = JSON.parse(answer.choices[0].message.content);
    assert.deepEqual(Object.keys(found).sort(), ["age", "name"]);
    return found;
  },
  async logprobs() {
    const answer = await client.chat.completions.create({ messages, logprobs: true, top_logprobs: 3, ...greedy });
    const { content } = answer.choices[0].logprobs;
    assert.ok(content.every((one) => one.top_logprobs.length === 3));
    return content.length;
  },
  async embeddings() {
    const { data } = await client.embeddings.create({ model, input: ["one text", "another"] }); // asks for base64
    assert.ok(Math.abs(data[0].embedding.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-3);
    return data[0].embedding.length;
  },
  async "errors name the field"() {
    await assert.rejects(client.chat.completions.create({ messages, ...greedy, temperature: 3 }), (error) => {
      return error.status === 400 && error.param === "temperature";
    });
    return 400;
  },
};

let wrong = 0;
for (const [what, check] of Object.entries(checks)) {
  try {
    console.log(`openai (npm) ${version}: ${what}: OK  ${JSON.stringify(await check())}`.slice(0, 200));
  } catch (error) {
    wrong = 1;
    console.log(`openai (npm) ${version}: ${what}: FAILED: ${error.stack}`);
  }
}
process.exit(wrong);
