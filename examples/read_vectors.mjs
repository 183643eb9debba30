// Read the test vectors in JavaScript (Node 18 or newer) without packages.
//
// drrho vectors --out vectors
// node examples/read_vectors.mjs vectors
//
// The program checks two functions: excess_loss and the risk of a KL penalty. read_vectors.py checks and explains more.

import { readFileSync } from "node:fs";
import { join } from "node:path";

const folder = process.argv[2] ?? "vectors";
const types = { F64: [Float64Array, 8], F32: [Float32Array, 4], I64: [BigInt64Array, 8], BOOL: [Uint8Array, 1] };

// Return every tensor of a file as {shape, data}, row by row. The file consists of eight bytes with the length of the
// header, the header in JSON, and the numbers.
function readTensors(path) {
  const bytes = readFileSync(path);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.toString("utf8", 8, start));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    const [Kind, size] = types[dtype];
    const own = new Uint8Array(bytes.subarray(start + begin, start + end)); // the copy is aligned to eight bytes
    tensors[name] = { shape, data: Array.from(new Kind(own.buffer, 0, (end - begin) / size), Number) };
  }
  return tensors;
}

const functions = {
  excess_loss: ([loss, reference], { reference_weight = 1 }) => ({
    value: loss.data.map((value, i) => value - reference_weight * reference.data[i]),
  }),
  worst_case: ([losses, set], { axis = -1, where }) => {
    if (set.ambiguity_set !== "KLPenalty") return {};
    const t = set.parameters.temperature;
    const [rows, columns] = losses.shape;
    const [slices, size] = axis === 0 ? [columns, rows] : [rows, columns];
    const risk = Array.from({ length: slices }, (_, slice) => {
      const places = Array.from({ length: size }, (_, i) => (axis === 0 ? i * columns + slice : slice * columns + i));
      const x = places.filter((place) => !where || where.data[place]).map((place) => losses.data[place]);
      const largest = Math.max(...x);
      return largest + t * Math.log1p(x.reduce((sum, value) => sum + Math.expm1((value - largest) / t), 0) / x.length);
    });
    return { risk };
  },
};

const index = JSON.parse(readFileSync(join(folder, "vectors.json"), "utf8"));
if (index.format !== "drrho-vectors" || !index.format_version.startsWith("1.")) {
  throw new Error(`format_version must be 1.x, got ${index.format} ${index.format_version}`);
}
const files = {};
let lookedAt = 0;
let wrong = 0;
for (const testCase of index.cases.filter((each) => each.function in functions)) {
  const tensors = (files[testCase.file] ??= readTensors(join(folder, testCase.file)));
  const valueOf = (described) =>
    "tensor" in described ? tensors[described.tensor] : "value" in described ? described.value : described;
  const options = Object.fromEntries(Object.entries(testCase.options).map(([name, each]) => [name, valueOf(each)]));
  const answer = functions[testCase.function](testCase.arguments.map(valueOf), options);
  for (const field of testCase.fields.filter((each) => each.field in answer)) {
    const [expected, scale] = [valueOf(field.expected).data, valueOf(field.scale).data];
    const errors = answer[field.field].map((got, i) =>
      got === expected[i] ? 0 : Math.abs(got - expected[i]) / scale[scale.length === 1 ? 0 : i],
    );
    const worst = Math.max(...errors);
    const right = errors.every((error) => error <= field.bound);
    lookedAt += 1;
    wrong += right ? 0 : 1;
    console.log(`${testCase.id}  ${field.field}  ${worst.toExponential(1)}  ${field.bound}${right ? "" : "  WRONG"}`);
  }
}
console.log(`${lookedAt - wrong} of ${lookedAt} fields are right`);
process.exitCode = lookedAt > 0 && wrong === 0 ? 0 : 1;
