// Imports, checks, scrubs, lists and deletes with grpc-js, from the proto itself. Needs DNC_GRPC_URL, DNC_API_KEY and DNC_PROTO.
import assert from "node:assert/strict";
import { promisify } from "node:util";
import { createRequire } from "node:module";

// The packages are those of the working directory.
const require = createRequire(`${process.cwd()}/`);
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const { dnc } = grpc.loadPackageDefinition(
  loader.loadSync("dnc/v1/dnc.proto", { includeDirs: [process.env.DNC_PROTO], longs: Number, enums: String, defaults: true }),
);
const target = process.env.DNC_GRPC_URL.replace("http://", "");
const service = new dnc.v1.DncService(target, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set("x-api-key", process.env.DNC_API_KEY);
const call = (method, message) => promisify(service[method].bind(service))(message, metadata);

const imported = await new Promise((resolve, reject) => {
  const stream = service.importEntries(metadata, (error, answer) => (error ? reject(error) : resolve(answer)));
  for (let number = 0; number < 3; number += 1) {
    const entries = Array.from({ length: 1_000 }, (_, index) => ({ email: `node${number}x${index}@example.com`, reason: "bounce" }));
    stream.write({ entries });
  }
  stream.end({ entries: [{ email: "node.example.net", type: "ENTRY_TYPE_DOMAIN" }, { email: "node0x0@example.com" }, { email: "nonsense" }] });
});
assert.deepEqual([imported.imported, imported.skipped, imported.failed], [3_001, 1, 1]);
assert.equal(imported.errors[0].code, "INVALID_EMAIL");

const emails = ["node0x0@example.com", "someone@mail.node.example.net", "free@example.org"];
const { results } = await call("checkEntries", { emails });
assert.deepEqual(results.map((result) => result.suppressed), [true, true, false]);

const scrubbed = await new Promise((resolve, reject) => {
  const messages = [];
  const stream = service.scrubEntries(metadata);
  stream.on("data", (message) => messages.push(message.results.map((result) => result.suppressed)));
  stream.on("error", reject);
  stream.on("end", () => resolve(messages));
  stream.write({ emails: emails.slice(0, 2) });
  stream.end({ emails: emails.slice(2) });
});
assert.deepEqual(scrubbed, [[true, true], [false]]);

const page = await call("listEntries", { filter: { search: "node" }, pageSize: 10 });
assert.deepEqual([page.entries.length, page.totalSize], [10, 3_001]);
assert.notEqual(page.nextPageToken, "");
assert.equal((await call("deleteEntries", { emails: emails.slice(0, 1) })).deleted, 1);
assert.equal((await call("deleteEntries", { all: true, filter: { search: "node" } })).deleted, 3_000);
await assert.rejects(
  promisify(service.listEntries.bind(service))({}, new grpc.Metadata()),
  (error) => error.code === grpc.status.UNAUTHENTICATED,
);
service.close();
console.log("the Node client: ok");
