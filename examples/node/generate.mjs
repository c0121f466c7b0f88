// Continues a prompt with a pair of services:
//
//     node generate.mjs "def fibonacci(n):" --target 127.0.0.1:50051 --draft 127.0.0.1:50052
//
// `--draft` is the address of a draft service, `ngram` for prompt lookup, or `none` for the target alone.

import { parseArgs } from "node:util";

import { Draft, Target } from "./services.mjs";
import { generate, speculate } from "./speculate.mjs";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    target: { type: "string", default: "127.0.0.1:50051" },
    draft: { type: "string", default: "127.0.0.1:50052" },
    "max-new-tokens": { type: "string", default: "64" },
    temperature: { type: "string", default: "0" },
    seed: { type: "string", default: "0" },
    "draft-length": { type: "string", default: "4" },
    ca: { type: "string" },
    cert: { type: "string" },
    key: { type: "string" },
    "token-file": { type: "string" },
    json: { type: "boolean", default: false },
  },
});

async function main() {
  const access = { ca: options.ca, cert: options.cert, key: options.key, tokenFile: options["token-file"] };
  const target = new Target(options.target, access);
  const draft = ["ngram", "none"].includes(options.draft) ? null : new Draft(options.draft, access);
  const start = {
    prompt: { text: positionals[0] ?? "def fibonacci(n):\n" },
    sampling: {
      temperature: Number(options.temperature),
      seed: options.seed,
      maxNewTokens: Number(options["max-new-tokens"]),
    },
  };
  try {
    if (options.draft === "none") {
      await print(generate(target, start));
      return;
    }
    const { fingerprint } = await target.info();
    const speaks = draft !== null && (await fits(draft, fingerprint));
    const chunks = speculate(target, speaks ? draft : null, start, {
      draftLength: Number(options["draft-length"]),
      vocabularySize: fingerprint.vocabularySize,
      onDraftLost: (error) => console.error(`going on with prompt lookup: ${error.message}`),
    });
    await print(chunks);
  } finally {
    target.close();
    draft?.close();
  }
}

/** Whether the draft speaks the target's language; if not, or if nobody answers, prompt lookup has to do. */
async function fits(draft, fingerprint) {
  try {
    const theirs = (await draft.info()).fingerprint;
    const same = ["vocabularySize", "vocabularySha256", "specialTokensSha256"].every(
      (name) => theirs !== null && theirs[name] === fingerprint[name],
    );
    if (!same) console.error("prompt lookup alone: the draft has another vocabulary");
    return same;
  } catch (error) {
    console.error(`prompt lookup alone: ${error.message}`);
    return false;
  }
}

async function print(chunks) {
  const result = { token_ids: [], text: "", finish_reason: "", accepted: 0 };
  for await (const { tokens, text, finishReason } of chunks) {
    result.token_ids.push(...tokens.map(({ id }) => id));
    result.accepted += tokens.filter(({ source }) => source !== "SOURCE_TARGET").length;
    result.text += text;
    result.finish_reason = finishReason.replace("FINISH_REASON_", "").toLowerCase();
    if (!options.json) process.stdout.write(text);
  }
  process.stdout.write(options.json ? `${JSON.stringify(result)}\n` : "\n");
}

main().catch((error) => {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
});
