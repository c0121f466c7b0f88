// Stubs of both services, made from protos/ when the program starts, and streams that read like conversations.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));
// Keepalive as the Python client has it: servers answer more frequent pings with GOAWAY.
const OPTIONS = { "grpc.keepalive_time_ms": 60_000, "grpc.keepalive_timeout_ms": 20_000 };
// Addresses that do not leave this machine.
const LOCAL = /^(localhost|127(\.\d+){3}|\[::1\]):\d+$|^unix:/;

const definition = loadSync(["specpair/v1/target.proto", "specpair/v1/draft.proto"], {
  includeDirs: [PROTOS],
  enums: String,
  longs: String, // seeds go up to 2^64 - 1, which a JavaScript number does not hold
  defaults: true,
  oneofs: true,
});
const { TargetService, DraftService } = grpc.loadPackageDefinition(definition).specpair.v1;

/** A service at an address. `access` may name PEM files `ca`, `cert` and `key`, and a `tokenFile`. */
class Service {
  constructor(Stub, address, access = {}) {
    const read = (path) => (path === undefined ? null : readFileSync(path));
    const { ca, cert, key, tokenFile } = access;
    const secure = ca !== undefined || cert !== undefined;
    const credentials = secure
      ? grpc.credentials.createSsl(read(ca), read(key), read(cert))
      : grpc.credentials.createInsecure();
    this.stub = new Stub(address, credentials, OPTIONS);
    this.metadata = new grpc.Metadata();
    if (tokenFile !== undefined) {
      if (!secure && !LOCAL.test(address)) {
        throw new Error(`the token would go to ${address} in plain text: give a CA`);
      }
      this.metadata.set("authorization", `Bearer ${readFileSync(tokenFile, "utf8").trim()}`);
    }
  }

  /** What the service runs: a ModelInfo. */
  async info(milliseconds = 5000) {
    const deadline = Date.now() + milliseconds;
    const { info } = await new Promise((resolve, reject) => {
      this.stub.GetModelInfo({}, this.metadata, { deadline }, (error, answer) =>
        error ? reject(error) : resolve(answer),
      );
    });
    return info;
  }

  close() {
    this.stub.close();
  }
}

/** The target: the only source of truth. */
export class Target extends Service {
  constructor(address, access) {
    super(TargetService, address, access);
  }

  /** A session; the first message is `{ start }`. */
  verify() {
    return new Conversation(this.stub.Verify(this.metadata));
  }

  /** Plain decoding in the target's own loop. */
  generate(request) {
    return new Conversation(this.stub.Generate(request, this.metadata));
  }
}

/** The draft: advice. */
export class Draft extends Service {
  constructor(address, access) {
    super(DraftService, address, access);
  }

  /** A session; the first message is `{ start }`. */
  propose() {
    return new Conversation(this.stub.Propose(this.metadata));
  }
}

/** One stream: messages out, messages in. A failed call shows in `receive`, as an Error with gRPC's `code`. */
class Conversation {
  #call;
  #answers;
  #next;

  constructor(call) {
    this.#call = call;
    call.on("error", () => {}); // told by `receive`; without a listener it would end the process
    this.#answers = call[Symbol.asyncIterator]();
    this.#read();
  }

  send(message) {
    this.#call.write(message);
  }

  async receive() {
    const { value, done } = await this.#next;
    if (done) throw new Error("the service ended the stream early");
    this.#read();
    return value;
  }

  /** Ends the stream politely, which frees its slot. */
  async finish() {
    this.#call.end?.(); // a call with a stream of answers alone has nothing to end
    while (!(await this.#next).done) this.#read();
  }

  /** Ends the stream at once. */
  cancel() {
    this.#call.cancel();
  }

  // Always one read ahead: an error that comes while nobody waits is kept for who asks next.
  #read() {
    this.#next = this.#answers.next();
    this.#next.catch(() => {});
  }
}
