// Who proposes: prompt lookup, or the draft service. What they say changes the speed and never the output.

/** Prompt lookup: what followed the last time the text went like this. */
export class Lookup {
  source = "SOURCE_NGRAM";

  async propose(tokenIds, most) {
    return lookup(tokenIds, most);
  }

  close() {}
}

/** Up to `most` ids that followed the latest of the longest earlier occurrences of the list's end. */
export function lookup(tokenIds, most, { longest = 8, shortest = 2 } = {}) {
  const end = tokenIds.length;
  for (let n = Math.min(longest, end - 1); n >= shortest; n -= 1) {
    for (let at = end - n - 1; at >= 0; at -= 1) {
      if (matches(tokenIds, at, n)) return tokenIds.slice(at + n, at + n + most);
    }
  }
  return [];
}

function matches(tokenIds, at, n) {
  for (let i = 0; i < n; i += 1) {
    if (tokenIds[at + i] !== tokenIds[tokenIds.length - n + i]) return false;
  }
  return true;
}

/** A session at the draft service. Every failure of it, silence included, is an exception; nothing waits for long. */
export class Model {
  source = "SOURCE_MODEL";
  #stream;
  #known;
  #round = 0;

  constructor(stream, known) {
    this.#stream = stream;
    this.#known = known;
  }

  /** Opens a session behind a prompt, with the target's own sampling parameters: the noise is then the same too. */
  static async open(draft, tokenIds, sampling, sessionId) {
    const stream = draft.propose();
    stream.send({ start: { tokenIds, sampling, proposer: "SOURCE_MODEL", sessionId } });
    await within(10_000, stream);
    return new Model(stream, tokenIds.length);
  }

  async propose(tokenIds, most) {
    this.#round += 1;
    this.#stream.send({
      ask: {
        round: this.#round,
        fromPosition: this.#known,
        tokenIds: tokenIds.slice(this.#known), // what the target has committed since the last ask
        maxTokens: most,
      },
    });
    this.#known = tokenIds.length;
    const { proposal } = await within(2000, this.#stream);
    const answers = proposal && Number(proposal.round) === this.#round && proposal.baseLength === tokenIds.length;
    if (!answers) throw new Error("the draft answered something else than it was asked");
    return proposal.tokenIds;
  }

  close() {
    this.#stream.cancel();
  }
}

/** The next answer of a stream; one that takes longer ends the stream. */
async function within(milliseconds, stream) {
  const timer = setTimeout(() => stream.cancel(), milliseconds);
  try {
    return await stream.receive();
  } finally {
    clearTimeout(timer);
  }
}
