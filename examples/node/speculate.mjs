// The loop between both services: propose, verify, commit.

import { Lookup, Model } from "./proposers.mjs";

const OWN = "SOURCE_TARGET";

/**
 * Continues a prompt over a Verify stream and yields what each round commits: `{ tokens: [{ id, source }], text,
 * finishReason }`.
 *
 * `start` is a SessionStart, `draft` a Draft or null for prompt lookup alone, `draftLength` the most ids to propose in
 * a round, `vocabularySize` the target's. Losing the draft costs speed: prompt lookup goes on in its place, and
 * `onDraftLost` is told why.
 */
export async function* speculate(
  target,
  draft,
  start,
  { draftLength = 4, vocabularySize = Infinity, onDraftLost = () => {} } = {},
) {
  const stream = target.verify();
  let proposer = new Lookup();
  const lose = (error) => {
    proposer.close();
    proposer = new Lookup();
    onDraftLost(error);
  };
  try {
    stream.send({ start });
    const { started } = await stream.receive();
    const log = [...started.promptTokenIds];
    if (draft !== null) {
      try {
        proposer = await Model.open(draft, log, start.sampling, started.sessionId);
      } catch (error) {
        lose(error);
      }
    }
    let finished = false;
    for (let round = 1; !finished; round += 1) {
      const most = Math.min(draftLength, limit(started, log, start));
      let proposed = [];
      if (most > 0) {
        try {
          proposed = await proposer.propose(log, most);
        } catch (error) {
          lose(error);
          proposed = await proposer.propose(log, most);
        }
        proposed = usable(proposed, most, vocabularySize);
      }
      const source = proposer.source;
      stream.send({ block: { round, baseLength: log.length, tokenIds: proposed, source } });
      const { verdict } = await stream.receive();
      if (verdict?.status !== "STATUS_APPLIED" || Number(verdict.round) !== round) {
        throw new Error("the target did not judge the block that it was sent");
      }
      // The accepted ids and one more of the target's own: nothing else ever becomes part of the log.
      const { tokenIds, textDelta, finishReason } = verdict.committed;
      log.push(...tokenIds);
      finished = finishReason !== "FINISH_REASON_UNSPECIFIED";
      yield {
        tokens: tokenIds.map((id, i) => ({ id, source: i < verdict.accepted ? source : OWN })),
        text: textDelta,
        finishReason,
      };
    }
    await stream.finish();
  } finally {
    stream.cancel();
    proposer.close();
  }
}

/** The same without a proposer: the target decodes token by token. */
export async function* generate(target, start) {
  const stream = target.generate(start);
  try {
    await stream.receive(); // started
    for (let finished = false; !finished; ) {
      const { tokenIds, textDelta, finishReason } = (await stream.receive()).committed;
      finished = finishReason !== "FINISH_REASON_UNSPECIFIED";
      yield { tokens: tokenIds.map((id) => ({ id, source: OWN })), text: textDelta, finishReason };
    }
    await stream.finish();
  } finally {
    stream.cancel();
  }
}

/** Most ids that are worth proposing: each needs a position in the cache, and the target adds one token of its own. */
function limit(started, log, start) {
  const generated = log.length - started.promptTokenIds.length;
  const wanted = start.sampling.maxNewTokens ?? Infinity;
  return Math.min(started.maxBlockTokens, started.maxLength - log.length, wanted - generated - 1);
}

/** What of a proposal the target would take: a draft may say anything, and it must not cost an error. */
function usable(tokenIds, most, vocabularySize) {
  const wrong = tokenIds.findIndex((id) => id >= vocabularySize);
  return tokenIds.slice(0, wrong < 0 ? most : Math.min(wrong, most));
}
