"use strict";

/* Shows the findings and samples of the report, a few dozen at a time. Texts of the dataset only ever become text nodes. */

const SHOWN = { findings: 50, samples: 48 };
const report = JSON.parse(document.getElementById("data").textContent);
const found = (id) => document.getElementById(id);

const samplesByRow = new Map(report.samples.map((sample) => [sample.row, sample]));
const decoded = new Set(report.samples.filter((sample) => sample.width).map((sample) => sample.files[0][1]));
const findingsByRow = new Map();
for (const finding of report.findings) {
  if (!findingsByRow.has(finding.row)) findingsByRow.set(finding.row, []);
  findingsByRow.get(finding.row).push(finding);
}
for (const sample of report.samples) {
  sample.findings = findingsByRow.get(sample.row) ?? [];
  sample.text = [sample.caption ?? "", ...sample.files.map(([, path]) => path)].join("\n").toLowerCase();
}
for (const finding of report.findings) {
  finding.text = `${finding.path ?? ""}\n${samplesByRow.get(finding.row)?.text ?? ""}`.toLowerCase();
}

const chosen = { view: "findings", page: 0, levels: new Set(), codes: new Set(), words: "", order: "worst" };

/* Elements */

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/* What stands between backticks becomes code. */
function withCode(text) {
  return text.split("`").map((part, place) => (place % 2 ? make("code", {}, part) : part));
}

function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}\u00a0%`;
}

function count(number) {
  return number.toLocaleString("en");
}

function withoutThumbnail(path) {
  if (path === null) return "whole set";
  return decoded.has(path) ? "thumbnail omitted" : "no image";
}

/* A thumbnail, its longer side at most `side` pixels; with `crop` the part that training sees is framed. */
function thumbnail(path, side, crop) {
  const data = path === null ? undefined : report.thumbnails[path];
  if (data === undefined) return make("div", { class: "nothing" }, withoutThumbnail(path));
  const image = make("img", { src: `data:image/jpeg;base64,${data}`, alt: path, decoding: "async" });
  const frame = make("div", { class: "frame" }, image);
  image.addEventListener("load", () => {
    const scale = Math.min(1, side / Math.max(image.naturalWidth, image.naturalHeight));
    frame.style.width = `${Math.round(image.naturalWidth * scale)}px`;
    frame.style.height = `${Math.round(image.naturalHeight * scale)}px`;
  });
  if (crop) {
    const box = make("div", { class: "crop" });
    [box.style.left, box.style.top, box.style.width, box.style.height] = crop.map((share) => `${100 * share}%`);
    frame.append(box);
  }
  return frame;
}

function levelMark(level) {
  return make("span", { class: level }, make("i", { class: `dot ${level}` }), level);
}

function findingItem(finding) {
  const sample = samplesByRow.get(finding.row);
  const path = finding.path ?? sample?.files[0]?.[1] ?? null;
  const head = make(
    "p",
    { class: "head" },
    levelMark(finding.level),
    make("span", { class: "name" }, finding.code),
    finding.row === null ? null : make("span", { class: "row" }, `row ${finding.row}`),
    path === null ? null : make("span", { class: "path" }, path),
  );
  const text = make("div", {}, head, make("p", { class: "what" }, ...withCode(finding.message)));
  if (finding.hint) text.append(make("p", { class: "hint" }, ...withCode(finding.hint)));
  return make("li", {}, thumbnail(path, 88), text);
}

/* A size, kept on one line. */
function by(...sides) {
  return sides.join("\u00a0×\u00a0");
}

function sizes(sample) {
  if (!sample.width) return null;
  const line = make("p", { class: "sizes" }, by(sample.width, sample.height));
  if (!sample.size) {
    line.append(" ", make("span", { class: "lost" }, "not trained on"));
    return line;
  }
  const [width, height, frames] = sample.size;
  line.append(` → ${by(width, height, ...(frames > 1 ? [frames] : []))}`);
  const lost = sample.lost > 0.0005 ? `, ${percent(sample.lost)} cropped` : ", whole";
  line.append(make("span", { class: "lost" }, lost));
  return line;
}

function sampleItem(sample) {
  const [target, ...others] = sample.files;
  const path = target?.[1] ?? null;
  const shown = others.map(([column, name]) =>
    make("figure", {}, thumbnail(name, 72), make("figcaption", { title: name }, column)),
  );
  const codes = [...new Map(sample.findings.map((finding) => [finding.code, finding.level]))];
  const chips = codes.map(([code, level]) =>
    make("button", { type: "button", class: level, "data-chip": code, title: "Show only these" }, code),
  );
  return make(
    "li",
    {},
    make("div", { class: "stage" }, thumbnail(path, 160, sample.crop)),
    make(
      "p",
      { class: "place" },
      make("span", { class: "row" }, `row ${sample.row}`),
      make("span", { class: "path" }, path ?? ""),
    ),
    sizes(sample),
    shown.length ? make("div", { class: "shown" }, ...shown) : null,
    make("p", { class: "caption", title: sample.caption ?? "" }, sample.caption || "(no caption)"),
    chips.length ? make("div", { class: "chips" }, ...chips) : null,
  );
}

/* What is chosen */

function fits(finding) {
  return (
    (!chosen.levels.size || chosen.levels.has(finding.level)) && (!chosen.codes.size || chosen.codes.has(finding.code))
  );
}

function selected() {
  const words = chosen.words.toLowerCase();
  const any = chosen.levels.size + chosen.codes.size;
  if (chosen.view === "findings") {
    return report.findings.filter((finding) => fits(finding) && finding.text.includes(words));
  }
  const samples = report.samples.filter(
    (sample) => (!any || sample.findings.some(fits)) && sample.text.includes(words),
  );
  if (chosen.order === "row") samples.sort((one, other) => one.row - other.row);
  if (chosen.order === "lost") samples.sort((one, other) => (other.lost ?? -1) - (one.lost ?? -1));
  return samples;
}

const ITEM = { findings: findingItem, samples: sampleItem };

function show() {
  const every = report[chosen.view];
  const items = selected();
  const pages = Math.max(1, Math.ceil(items.length / SHOWN[chosen.view]));
  chosen.page = Math.min(chosen.page, pages - 1);
  const first = chosen.page * SHOWN[chosen.view];
  const list = found(`${chosen.view}-view`).querySelector("ol");
  list.replaceChildren(...items.slice(first, first + SHOWN[chosen.view]).map(ITEM[chosen.view]));
  found("count").textContent = `${count(items.length)} of ${count(every.length)} ${chosen.view}`;
  for (const view of Object.keys(ITEM)) found(`${view}-view`).hidden = view !== chosen.view;
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === chosen.view) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  for (const [set, name] of [[chosen.levels, "level"], [chosen.codes, "code"]]) {
    for (const button of document.querySelectorAll(`button[data-${name}]`)) {
      button.setAttribute("aria-pressed", set.has(button.dataset[name]));
    }
  }
  document.querySelector(".order").hidden = chosen.view !== "samples";
  found("reset").hidden = !(chosen.levels.size + chosen.codes.size + chosen.words.length);
  found("pages").hidden = pages === 1;
  found("page").textContent = `${chosen.page + 1} of ${pages}`;
  found("previous").disabled = chosen.page === 0;
  found("next").disabled = chosen.page === pages - 1;
}

function change(values) {
  Object.assign(chosen, { page: 0 }, values);
  show();
}

function toggle(set, value) {
  if (!set.delete(value)) set.add(value);
  change({});
}

function turn(by) {
  change({ page: chosen.page + by });
  document.querySelector(".views").scrollIntoView();
}

function clear() {
  found("search").value = "";
  change({ levels: new Set(), codes: new Set(), words: "" });
}

function takeView() {
  const view = location.hash.slice(1);
  if (!(view in ITEM)) return;
  change({ view });
  document.querySelector(".views").scrollIntoView();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.level) toggle(chosen.levels, button.dataset.level);
  if (button?.dataset.code) toggle(chosen.codes, button.dataset.code);
  if (button?.dataset.chip) change({ levels: new Set(), codes: new Set([button.dataset.chip]) });
});
found("search").addEventListener("input", (event) => change({ words: event.target.value }));
found("order").addEventListener("change", (event) => change({ order: event.target.value }));
found("previous").addEventListener("click", () => turn(-1));
found("next").addEventListener("click", () => turn(1));
found("reset").addEventListener("click", clear);
window.addEventListener("hashchange", takeView);
document.querySelector(".views").hidden = false;
show();
takeView();
