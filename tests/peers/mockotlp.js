// One receiver of @elastic/mockotlpserver: `node mockotlp.js PACKAGE_FOLDER grpc|http FILE`. Tells its address and
// appends every request for traces to FILE, as one line of JSON.
const fs = require("fs");
const path = require("path");

const [folder, service, file] = process.argv.slice(2);
const { MockOtlpServer } = require(path.join(folder, "lib/mockotlpserver.js"));
const { jsonStringifyTrace } = require(path.join(folder, "lib/normalize.js"));

const server = new MockOtlpServer({
  logLevel: "fatal",
  services: [service],
  grpcHostname: "127.0.0.1",
  httpHostname: "127.0.0.1",
  grpcPort: 0,
  httpPort: 0,
  onTrace: (trace) => fs.appendFileSync(file, jsonStringifyTrace(trace, { indent: 0, normAttributes: true }) + "\n"),
});
server.start().then(() => console.log(String(server.grpcUrl || server.httpUrl)));
