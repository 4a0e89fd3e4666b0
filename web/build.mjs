// Bundles src/ into the one file that the Python package ships: src/localign/assets/explore/page.html.
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const here = new URL(".", import.meta.url).pathname;
const source = `${here}src/`;
const target = `${here}../src/localign/assets/explore/`;

async function bundled(entry) {
  const result = await build({
    entryPoints: [source + entry],
    bundle: true,
    minify: true,
    write: false,
    charset: "ascii",
    target: ["chrome100", "firefox100", "safari15"],
  });
  return result.outputFiles[0].text.trim();
}

// The tests compare this with the sources: a built file that is older than they are fails.
const hash = createHash("sha256");
for (const name of readdirSync(source).sort()) hash.update(readFileSync(source + name));

const [script, style] = await Promise.all([bundled("main.js"), bundled("style.css")]);
if (/<\/(script|style)/i.test(script + style)) throw new Error("the bundle would end its own element");
const page = readFileSync(`${source}page.html`, "utf-8")
  .replace("/* style */", () => style)
  .replace("/* script */", () => script)
  .replace("<!-- built -->", `<!-- built from sources ${hash.digest("hex")} -->`);
mkdirSync(target, { recursive: true });
writeFileSync(`${target}page.html`, page);
console.log(`${target}page.html: ${page.length} bytes`);
