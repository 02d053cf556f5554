"use strict";

/* Reads charts out at a step, turns the previews over, and loads the page again while the run goes on. */

const run = JSON.parse(document.getElementById("data").textContent);
const found = (id) => document.getElementById(id);

/* What was chosen, over a refresh. A browser may refuse to keep it. */

const KEPT = `diffsynth run ${run.key}`;

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

function keep(values) {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ ...kept(), ...values }));
  } catch {
    /* the next page starts as this one did */
  }
}

/* Charts */

function number(value) {
  return value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6)
    ? Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 })
    : value.toExponential(2);
}

/* The point of a curve at a step, or the nearest one before it. */
function pointAt(points, step) {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (points[middle][0] <= step) low = middle;
    else high = middle - 1;
  }
  return points[low];
}

function readOut(figure, step) {
  const chart = run.charts[figure.dataset.chart];
  const cursor = figure.querySelector(".cursor");
  const output = figure.querySelector(".readout");
  if (step === null) {
    cursor.setAttribute("visibility", "hidden");
    output.textContent = "";
    return;
  }
  const texts = chart.curves.map(({ label, points }) => {
    const [first, last, low, mean, high] = pointAt(points, step);
    const range = first === last || low === high ? "" : ` (${number(low)} to ${number(high)})`;
    return `${label} ${number(mean)}${range}`;
  });
  for (const end of ["x1", "x2"]) cursor.setAttribute(end, `${(100 * step) / chart.last}%`);
  cursor.setAttribute("visibility", "visible");
  output.textContent = `step ${step.toLocaleString("en")}: ${texts.join(", ")}`;
}

for (const figure of document.querySelectorAll("[data-chart]")) {
  const plot = figure.querySelector(".plot");
  const { last } = run.charts[figure.dataset.chart];
  let at = last;
  const show = (step) => readOut(figure, (at = Math.min(last, Math.max(0, Math.round(step)))));
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(((event.clientX - box.left) / box.width) * last);
  });
  plot.addEventListener("pointerleave", () => readOut(figure, null));
  plot.addEventListener("focus", () => show(at));
  plot.addEventListener("blur", () => readOut(figure, null));
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -last / 100, ArrowRight: last / 100, Home: -last, End: last };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const move = moves[event.key];
    show(at + Math.sign(move) * Math.max(1, Math.abs(move)));
  });
}

/* Previews: of each prompt its images as [step, thumbnail or null for the one in the page, address of the whole one]. */

const cards = [...document.querySelectorAll("[data-prompt]")];
const all = found("all-steps");

function turn(card, place) {
  const images = run.previews[card.dataset.prompt];
  const [step, data, address] = images[place];
  const image = card.querySelector("img");
  image.dataset.latest ??= image.getAttribute("src") ?? "";
  const source = data ?? image.dataset.latest;
  if (source) image.src = source;
  image.hidden = !source;
  image.alt = `${card.querySelector(".prompt").textContent}, step ${step}`;
  card.querySelector(".nothing").hidden = Boolean(source);
  card.querySelector("a").href = address;
  card.querySelector("input").value = place;
  card.querySelector("input").setAttribute("aria-valuetext", `step ${step}`);
  card.querySelector("output").textContent = step.toLocaleString("en");
}

/* The image of a step, or of the nearest one before it; null: the latest. */
function turnToStep(card, step) {
  const images = run.previews[card.dataset.prompt];
  const place = step === null ? images.length - 1 : images.findLastIndex((image) => image[0] <= step);
  turn(card, Math.max(0, place));
}

function chosenStep(input, steps) {
  return Number(input.value) === steps.length - 1 ? null : steps[input.value];
}

function keepSteps() {
  keep({
    steps: cards.map((card) =>
      chosenStep(card.querySelector("input"), run.previews[card.dataset.prompt].map(([step]) => step)),
    ),
    all: all ? chosenStep(all, run.steps) : null,
  });
}

for (const card of cards) {
  card.querySelector("input").addEventListener("input", (event) => {
    turn(card, Number(event.target.value));
    keepSteps();
  });
}

function turnAll(place) {
  const step = run.steps[place];
  all.value = place;
  all.setAttribute("aria-valuetext", `step ${step}`);
  found("all-step").textContent = step.toLocaleString("en");
}

all?.addEventListener("input", () => {
  turnAll(Number(all.value));
  for (const card of cards) turnToStep(card, chosenStep(all, run.steps));
  keepSteps();
});

/* Refresh */

const refresh = found("refresh");
let held = false;

function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

function showAge() {
  const age = Math.max(0, Date.now() / 1000 - run.written);
  found("age").textContent = `, ${ago(age)} ago`;
  found("stale").hidden = !(run.refresh && age > run.stale);
}

function loadAgain() {
  if (!refresh.checked || held || document.hidden || !getSelection().isCollapsed) return;
  keep({ scroll: scrollY });
  location.reload();
}

function restore() {
  const { steps, all: step, scroll, open, paused } = kept();
  if (all && step !== null && step !== undefined) {
    turnAll(Math.max(0, run.steps.findLastIndex((one) => one <= step)));
  }
  if (steps) cards.forEach((card, place) => turnToStep(card, steps[place] ?? null));
  for (const details of document.querySelectorAll("details")) details.open = Boolean(open);
  if (paused) refresh.checked = false;
  if (scroll) scrollTo(0, scroll);
}

for (const details of document.querySelectorAll("details")) {
  details.addEventListener("toggle", () => keep({ open: details.open }));
}
if (run.refresh) {
  found("refreshing").hidden = false;
  refresh.addEventListener("change", () => keep({ paused: !refresh.checked }));
  document.addEventListener("pointerdown", () => (held = true));
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => (held = false));
  setInterval(loadAgain, 1000 * run.refresh);
}
history.scrollRestoration = "manual";
restore();
showAge();
setInterval(showAge, 1000);
