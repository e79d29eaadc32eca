/* The page of a report. Sections: small things, data, state, frame, overview, answers, timeline, start.
 *
 * What a model, a dataset or a log has written reaches the document by textContent alone (`el`).
 */
"use strict";
(() => {

// -- small things ---------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);

/** An element: `el("p.soft", {title: "x"}, "text", child)`; strings become text, never markup. */
function el(kind, props = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (name in node && name !== "list") node[name] = value;
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function show(value, unit = "") {
  if (value === null || value === undefined) return "-";
  if (typeof value === "string") return value; // nan and inf have their name
  if (unit === "%") return `${Math.abs(value) < 0.1 ? Number((100 * value).toPrecision(2)) : (100 * value).toFixed(0)} %`;
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e5) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  if (size < 1e-3) return value.toExponential(1);
  return Number(value.toPrecision(size >= 1000 ? 5 : 3)).toLocaleString("en", { maximumFractionDigits: 5 });
}

function seconds(value) {
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${(value * 1e6).toFixed(0)} \u00b5s`;
  if (value < 1) return `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  const minutes = value / 60;
  return minutes < 120 ? `${minutes.toFixed(1)} min` : `${(minutes / 60).toFixed(1)} h`;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const themed = new Map();
/** A variable of the style sheet, as the theme has it. */
function css(name) {
  if (!themed.has(name)) themed.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return themed.get(name);
}
const COLOURS = 6;
const colour = (index) => css(`--c${index % COLOURS}`);
const WHAT_COLOURS = {
  "waiting": "--p0", "forward and backward": "--p1", "optimizer": "--p2", "weight sync": "--p3",
  "other": "--p4", "validation": "--p5", "generating": "--p1", "idle": "--p4", "paused": "--p0",
  "updating": "--p3", "out": "--p6",
};
const colourOf = (what) => css(WHAT_COLOURS[what] || "--p4");

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function button(text, onclick, props = {}) {
  return el("button", { type: "button", onclick, ...props }, text);
}

function later(wait, act) {
  let timer = 0;
  return (...args) => { clearTimeout(timer); timer = setTimeout(() => act(...args), wait); };
}

// -- data -----------------------------------------------------------------------------------------

let data = null;

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function embedded() {
  const text = atob($("data").textContent.trim());
  return inflate(Uint8Array.from(text, (char) => char.charCodeAt(0)));
}

/** Take data in: what is asked often is computed once. */
function take(found) {
  data = found;
  for (const group of data.groups) {
    const numbers = group.answers.filter((a) => !a.greedy).map((a) => Number(a.reward)).filter(Number.isFinite);
    group.mean = numbers.length ? mean(numbers) : NaN;
    group.spread = numbers.length > 1 ? Math.max(...numbers) - Math.min(...numbers) : 0;
    group.key = `${group.dataset}\u0000${group.row}`;
    group.id = [group.run, group.kind, group.step, group.dataset, group.pass, group.row].join("\u0000");
    group.asked = group.prompt.map((message) => message.text).join("\n");
    for (const answer of group.answers) {
      answer.shown = answer.turns.length
        ? answer.turns.map((turn) => [turn.text, ...turn.calls].join("\n")).join("\n")
        : answer.text;
      answer.stale = group.kind === "trained" ? group.version - answer.versions[0] : 0;
    }
  }
}

const theRun = () => data.runs.find((run) => run.name === state.run) || data.runs[0];
/** What the names of an interval's ends end with. */
const [LOW, HIGH] = ["_ci95_low", "_ci95_high"];
const value = (run, metric, step) => {
  const values = run.metrics[metric];
  const at = values ? run.steps.indexOf(step) : -1;
  return at < 0 ? null : values[at];
};

// -- state ----------------------------------------------------------------------------------------

/* All that a person has chosen; it stands in the address, so that a view can be kept and sent. */
const DEFAULTS = {
  view: "overview", run: "", step: "", kind: "", steps: "", dataset: "", search: "", sort: "step",
  reverse: false, mode: "groups", from: "", below: "", truncated: false, mixed: false, colour: "",
  follow: "", xmin: "", xmax: "", t0: "", t1: "", extra: "",
};
const FILTERS = ["kind", "steps", "dataset", "search", "from", "below", "truncated", "mixed", "follow"];
const state = { ...DEFAULTS };

function readAddress() {
  Object.assign(state, DEFAULTS);
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    if (name in DEFAULTS) state[name] = typeof DEFAULTS[name] === "boolean" ? text === "1" : text;
  }
}

function writeAddress(push = false) {
  const words = new URLSearchParams();
  for (const [name, plain] of Object.entries(DEFAULTS)) {
    if (state[name] !== plain) words.set(name, typeof plain === "boolean" ? "1" : state[name]);
  }
  const hash = `#${words}`;
  if (hash !== (location.hash || "#")) history[push ? "pushState" : "replaceState"](null, "", hash);
}

/** Change what is chosen and draw the view. A way back is kept where the view is another one. */
function set(changes, push = false) {
  Object.assign(state, changes);
  writeAddress(push || "view" in changes);
  draw();
}

/** Answers of a finding: its filters, and none that were set before. */
function look(changes) {
  const plain = {};
  for (const name of [...FILTERS, "sort", "reverse", "mode"]) plain[name] = DEFAULTS[name];
  set({ ...plain, ...Object.fromEntries(Object.entries(changes).map(([n, v]) => [n, typeof v === "number" ? String(v) : v])) }, true);
  scrollTo(0, 0);
}

// -- frame ----------------------------------------------------------------------------------------

const VIEWS = ["overview", "answers", "timeline"];

function draw() {
  hideTip();
  for (const view of VIEWS) {
    const chosen = state.view === view;
    $(view).hidden = !chosen;
    $(`tab-${view}`).setAttribute("aria-selected", chosen);
    $(`tab-${view}`).tabIndex = chosen ? 0 : -1;
  }
  ({ overview: drawOverview, answers: drawAnswers, timeline: drawTimeline })[state.view]();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  themed.clear();
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  if (data) { drawn.overview = drawn.answers = drawn.timeline = null; draw(); }
}

const themeNow = () => document.documentElement.dataset.theme;

function frame() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => setTheme(themeNow() === "dark" ? "light" : "dark"));
  for (const view of VIEWS) {
    $(`tab-${view}`).addEventListener("click", () => { if (state.view !== view) { set({ view }); scrollTo(0, 0); } });
    $(`tab-${view}`).addEventListener("keydown", (event) => {
      const turn = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!turn) return;
      const next = VIEWS[(VIEWS.indexOf(view) + turn + VIEWS.length) % VIEWS.length];
      set({ view: next });
      $(`tab-${next}`).focus();
      event.preventDefault();
    });
  }
  addEventListener("hashchange", () => { readAddress(); draw(); });
  addEventListener("popstate", () => { readAddress(); draw(); });
  addEventListener("keydown", onKey);
}

function onKey(event) {
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "Escape") { hideTip(); if (typing) event.target.blur(); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const acts = {
    1: () => set({ view: "overview" }), 2: () => set({ view: "answers" }), 3: () => set({ view: "timeline" }),
    t: () => setTheme(themeNow() === "dark" ? "light" : "dark"),
    "/": () => { if (state.view !== "answers") set({ view: "answers" }); $("search").focus(); },
    "[": () => moveStep(-1), "]": () => moveStep(1),
    j: () => moveGroup(1), k: () => moveGroup(-1),
  };
  if (acts[event.key]) { acts[event.key](); event.preventDefault(); }
}

function showTip(text, x, y) {
  const tip = $("tip");
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18}px`;
}
function hideTip() { $("tip").hidden = true; }

/** A select with its choices: [value, text] pairs. */
function choice(name, label, pairs, onchange = (text) => set({ [name]: text })) {
  const box = el("select", { "data-choose": name, onchange: (event) => onchange(event.target.value) },
    pairs.map(([key, text]) => el("option", { value: key, selected: key === state[name] }, text)));
  return el("label", {}, label, box);
}

const drawn = { overview: null, answers: null, timeline: null };

// -- overview -------------------------------------------------------------------------------------

let plots = [];

function drawOverview() {
  if (drawn.overview !== data) {
    drawn.overview = data;
    const several = data.runs.length > 1;
    $("overview").replaceChildren(
      ...(several ? [comparison()] : []),
      ...(several ? [el("div.bar", {}, choice("run", "Run", data.runs.map((run) => [run.name, run.name])))] : []),
      el("div", { id: "questions" }),
      ...(allSteps().length ? [el("h2", {}, "One step"),
      el("div.step", { id: "step" }),
      el("h2", {}, "Over the steps"),
      el("p.soft.small", {}, "Click a chart for a step, drag to zoom all of them, double-click to zoom out. Dashed lines: something was said at that step."),
      el("div.charts", { id: "charts" }),
      el("div.bar", { id: "more", style: { marginTop: "1rem" } })] : []),
      el("div", { id: "said" }),
      el("div", { id: "setup" }),
    );
    if (allSteps().length) drawCharts();
  }
  drawRun();
  if (allSteps().length) drawStep();
  plots.forEach((plot) => plot.redraw(false));
}

/** The runs beside each other, in figures. */
function comparison() {
  const head = ["", "steps", "best held-out", "at step", "last held-out", "last reward", "s / step", "tokens / s"];
  const rows = data.runs.map((run, index) => {
    const points = series(run, run.score);
    const best = points.length ? points.reduce((a, b) => (b[1] > a[1] ? b : a)) : [null, null];
    const last = points.length ? points[points.length - 1][1] : null;
    const rewards = series(run, "reward/mean").slice(-5).map((point) => point[1]);
    const times = series(run, "time/step_s").map((point) => point[1]);
    const speed = series(run, "throughput/tokens_per_s").map((point) => point[1]);
    const [low, high] = [LOW, HIGH].map((end) => (best[0] === null ? null : value(run, run.score + end, best[0])));
    const score = show(best[1]) + (low === null || high === null ? "" : ` (${show(low)} to ${show(high)})`);
    const cells = [run.trained.length, score, show(best[0]), show(last), show(rewards.length ? mean(rewards) : null),
      show(times.length ? median(times) : null), show(speed.length ? median(speed) : null)];
    return el("tr", {}, el("th", { scope: "row" }, el("span.swatch", { style: { color: colour(index) } }), run.name),
      cells.map((cell) => el("td.num", {}, String(cell))));
  });
  return el("div.scroll", {}, el("table", {}, el("thead", {}, el("tr", {}, head.map((text, index) => el(index ? "th.num" : "th", { scope: "col" }, text)))), el("tbody", {}, rows)));
}

function series(run, metric) {
  const values = run.metrics[metric] || [];
  return run.steps.map((step, index) => [step, values[index]]).filter((point) => point[1] !== null && point[1] !== undefined);
}

function drawRun() {
  const run = theRun();
  const questions = el("div.questions", {}, run.findings.map((finding) => el("div", {},
    el("h3", {}, finding.question),
    el("p.answer", {}, finding.answer),
    finding.details.length ? el("ul", {}, finding.details.map((line) =>
      line.startsWith("! ") ? el("li.sign", {}, line.slice(2)) : el("li", {}, line))) : null,
    finding.looks.length ? el("div.looks", {}, finding.looks.map((each) => button(each.label, () => look(each.state)))) : null,
  )));
  $("questions").replaceChildren(questions);

  const marks = data.runs.flatMap((each) => each.marks.map((mark) => ({ ...mark, run: each.name })));
  $("said").replaceChildren(...(marks.length ? [el("h2", {}, "What was said meanwhile"),
    el("div.scroll", {}, el("table", {}, el("tbody", {}, marks.map((mark) => el("tr", {},
      el("td", {}, button(`step ${mark.step}`, () => set({ run: mark.run, step: String(mark.step) }), { className: "quiet" })),
      data.runs.length > 1 ? el("td.soft", {}, mark.run) : null,
      el("td", { className: mark.level === "INFO" ? "soft" : "warn" }, mark.level.toLowerCase()),
      el("td", {}, mark.text))))))] : []));

  const lines = [...Object.entries(run.setup), ["machine", run.machine],
    ["versions", Object.entries(run.versions).map(([name, version]) => `${name} ${version}`).join(", ")],
    ["folder", run.folder]].filter(([, text]) => text);
  $("setup").replaceChildren(
    el("h2", {}, "How it was set up"),
    el("dl.setup", {}, lines.flatMap(([label, text]) => [el("dt", {}, label), el("dd", {}, text)])),
    el("h2", {}, run.command.includes("--ckpt_path") ? "To go on from its last checkpoint" : "To run it again"),
    el("div.command", {}, el("code", {}, run.command), button("Copy", (event) => copy(run.command, event.target))),
  );
}

function copy(text, from) {
  const done = () => { from.textContent = "Copied"; setTimeout(() => { from.textContent = "Copy"; }, 1500); };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, () => select(from.previousSibling));
  else select(from.previousSibling);
}
function select(node) { getSelection().selectAllChildren(node); }

// A step: what it took, what it gave, what was unusual about it.

function chosenStep(run) {
  if (run.trained.length === 0) return null;
  const asked = Number(state.step);
  if (state.step !== "" && run.steps.includes(asked)) return asked;
  return run.trained[run.trained.length - 1];
}

function moveStep(by) {
  const run = theRun();
  const at = run.steps.indexOf(chosenStep(run));
  const next = run.steps[Math.max(0, Math.min(run.steps.length - 1, at + by))];
  if (next === undefined) return;
  set({ step: String(next) });
  if (state.view === "timeline") jump(next);
}

const FACTS = ["reward/mean", "completion/length_mean", "completion/truncated_fraction", "policy/entropy",
  "policy/grad_norm", "staleness/mean", "reward/zero_variance_fraction", "throughput/tokens_per_s"];

/** How long a step took and, where that was long, why. */
function stepWords(run, step) {
  const sum = (parts) => parts.reduce((a, b) => a + b, 0);
  if (run.slow[step] || !run.times[step]) return run.slow[step] || "";
  return `${seconds(sum(run.times[step]))}; the median step takes ${seconds(median(Object.values(run.times).map(sum)))}.`;
}

function drawStep() {
  const run = theRun();
  const step = chosenStep(run);
  if (step === null) { $("step").replaceChildren(el("p.soft", {}, "No step was trained.")); return; }
  const parts = run.times[step];
  const all = Object.values(run.times);
  const usual = data.phases.map((_, index) => median(all.map((each) => each[index])));
  const most = Math.max(...(parts || [0]), ...usual);
  const width = (amount) => `${(100 * amount) / (most || 1)}%`;
  const bars = parts ? data.phases.flatMap((phase, index) => [
    el("span", {}, phase),
    el("span", { title: `usually ${seconds(usual[index])}` },
      el("i", { style: { width: width(parts[index]), background: colourOf(phase) } }),
      el("i.usual", { style: { width: width(usual[index]), background: css("--ink") } })),
    el("span", {}, `${seconds(parts[index])} `, el("span.soft", {}, `usually ${seconds(usual[index])}`)),
  ]) : [];
  const score = run.score && value(run, run.score, step);
  const facts = [...FACTS, ...(score !== null && score !== undefined ? [run.score] : [])]
    .filter((name) => value(run, name, step) !== null && run.metrics[name])
    .map((name) => el("div", { title: explain(name) }, el("span", {}, name.replace(/[/_]/g, "$&\u200b")), show(value(run, name, step), name.endsWith("fraction") ? "%" : "")));
  const marks = run.slow[step] ? [] : run.marks.filter((mark) => mark.step === step); // else in the words
  const input = el("input.num", { id: "step-number", type: "number", min: run.steps[0], max: run.steps[run.steps.length - 1], value: step,
    "aria-label": "Step", onchange: (event) => set({ step: event.target.value }) });
  $("step").replaceChildren(
    el("div.pick", {}, button("\u2039", () => moveStep(-1), { title: "previous step ([)", ariaLabel: "previous step" }), "Step", input,
      button("\u203a", () => moveStep(1), { title: "next step (])", ariaLabel: "next step" }),
      button("Its answers", () => look({ view: "answers", run: run.name, kind: "trained", steps: String(step) })),
      button("On the timeline", () => { set({ view: "timeline", run: run.name, step: String(step) }); jump(step); }),
      data.runs.length > 1 ? el("span.soft", {}, run.name) : null),
    el("div", {}, el("p", {}, stepWords(run, step)), marks.map((mark) => el("p.warn", {}, mark.text)), el("div.facts", {}, facts)),
    el("div", {}, el("div.bars", {}, bars)),
  );
}

function explain(metric) {
  const known = data.explained[metric];
  return known ? `${known.meaning}\nhealthy: ${known.healthy}` : "";
}

// Charts.

const SYNC = "steps";
const unfolded = new Set();
let zooming = false;

function drawCharts() {
  plots.forEach((plot) => plot.destroy());
  plots = [];
  uPlot.sync(SYNC);
  const extra = state.extra ? state.extra.split(",").filter((name) => data.runs.some((run) => run.metrics[name])) : [];
  const charts = [...data.charts, ...extra.map((name) => ({ title: name, metrics: [name], unit: "", low: null }))];
  const figures = charts.map(lineChart);
  const times = data.runs.filter((run) => Object.keys(run.times).length).map(timeChart);
  figures.splice(times.length > 1 ? figures.length : 2, 0, ...times);
  $("charts").replaceChildren(...figures.map((each) => each.figure));
  // Measured in one go, then drawn: no chart changes the width of another.
  const widths = figures.map((each) => each.place.clientWidth);
  figures.forEach((each, index) => plots.push(each.make(widths[index])));
  if (state.xmin !== "") plots.forEach((plot) => plot.setScale("x", { min: Number(state.xmin), max: Number(state.xmax) }));
  const drawnNames = new Set(charts.flatMap((chart) => chart.metrics));
  const others = [...new Set(data.runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => !drawnNames.has(name) && !name.endsWith(LOW) && !name.endsWith(HIGH)).sort();
  $("more").replaceChildren(choice("extra", "Draw another metric", [["", "choose ..."], ...others.map((name) => [name, name])], (name) => {
    if (!name) return;
    state.extra = [...extra, name].join(",");
    writeAddress();
    drawCharts();
  }), extra.length ? button("Only the usual ones", () => { state.extra = ""; writeAddress(); drawCharts(); }) : "");
}

const axisFont = () => `11px ${css("--sans")}`;

function axes(unit) {
  const look = { stroke: css("--soft"), font: axisFont(), grid: { stroke: css("--rule"), width: 1 }, ticks: { show: false } };
  return [
    { ...look, grid: { show: false }, size: 28, gap: 6, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? String(tick) : "")) },
    { ...look, size: 52, gap: 4, values: (_, ticks) => ticks.map((tick) => show(tick, unit)) },
  ];
}

const allSteps = () => [...new Set(data.runs.flatMap((run) => run.steps))].sort((a, b) => a - b);

/** The same steps in every chart, whole bars at both ends. */
function stepScale(steps) {
  const [first, last] = [steps[0], steps[steps.length - 1]];
  const whole = (low, high) => low === null || (low <= first && high >= last);
  return { time: false, range: (_, low, high) => (whole(low, high) ? [first - 0.5, last + 0.5] : [low, high]) };
}

/** A chart of one metric or some, of every run. */
function lineChart(chart) {
  const steps = allSteps();
  const columns = [steps];
  const lines = [{}];
  const bands = [];
  const keys = [];
  data.runs.forEach((run, runIndex) => chart.metrics.forEach((metric, index) => {
    if (!run.metrics[metric]) return;
    const at = new Map(series(run, metric));
    const stroke = data.runs.length > 1 ? colour(runIndex) : colour(index);
    const dash = data.runs.length > 1 && index ? [3 + 3 * index, 3] : undefined;
    const few = at.size < 25;
    const values = steps.map((step) => (at.has(step) ? at.get(step) : null));
    columns.push(values);
    lines.push({ stroke, dash, width: 1.6, spanGaps: true, points: { show: few, size: 5, fill: stroke } });
    keys.push({ name: data.runs.length > 1 ? run.name : metric, stroke, index: columns.length - 1 });
    if (run.metrics[metric + HIGH]) {
      for (const end of [HIGH, LOW]) {
        const ends = new Map(series(run, metric + end));
        columns.push(steps.map((step) => ends.get(step) ?? at.get(step) ?? null));
        lines.push({ stroke: "transparent", spanGaps: true, points: { show: false } });
      }
      bands.push({ series: [columns.length - 2, columns.length - 1], fill: `color-mix(in srgb, ${stroke} 20%, transparent)` });
    }
  }));
  const marks = [...new Set(data.runs.flatMap((run) => run.marks.map((mark) => mark.step)))];
  const shown = data.runs.length > 1 ? `${chart.metrics.join(", ")} ` : "";
  const what = shown + (chart.metrics.some((name) => data.runs.some((run) => run.metrics[name + HIGH])) ? "with 95 % interval" : chart.unit === "%" ? "" : chart.unit);
  const range = (_, low, high) => {
    if (low === null) return [0, 1];
    const least = chart.low === null ? low : Math.min(low, chart.low);
    const room = (high - least) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [chart.low === null ? low - room : least, high + room];
  };
  return plotted(chart.title, what, keys, chart.metrics, (place, width, caption) => new uPlot({
    width, height: 160, series: lines, bands, axes: axes(chart.unit), legend: { show: false },
    scales: { x: stepScale(steps), y: { range } },
    cursor: cursor(), hooks: hooks(marks, caption),
  }, columns, place), chart.unit);
}

/** The time of each step of a run, by part. */
function timeChart(run) {
  const steps = allSteps();
  const rows = data.phases.map((_, index) => steps.map((step) => (run.times[step] ? run.times[step][index] : null)));
  const stacked = rows.map((_, index) => steps.map((__, at) => rows.slice(0, index + 1).reduce((sum, row) => (row[at] === null ? null : sum + row[at]), 0)));
  const bars = uPlot.paths.bars({ size: [0.92, 40], gap: 0 });
  // The highest first: each next one is painted over its lower part.
  const order = data.phases.map((_, index) => index).reverse();
  const lines = [{}, ...order.map((index) => ({ fill: colourOf(data.phases[index]), stroke: colourOf(data.phases[index]), width: 0, paths: bars, points: { show: false } }))];
  const columns = [steps, ...order.map((index) => stacked[index])];
  const keys = data.phases.map((name, index) => ({ name, stroke: colourOf(name), box: true, values: rows[index] }));
  const title = data.runs.length > 1 ? `Time of a step: ${run.name}` : "Time of a step";
  const marks = run.marks.map((mark) => mark.step);
  return plotted(title, "s", keys, [], (place, width, caption) => new uPlot({
    width, height: 160, series: lines, axes: axes("s"), legend: { show: false },
    scales: { x: stepScale(allSteps()), y: { range: (_, low, high) => [0, (high || 1) * 1.05] } },
    cursor: cursor(), hooks: hooks(marks, caption),
  }, columns, place), "s");
}

function cursor() {
  return { sync: { key: SYNC, setSeries: false }, points: { show: false }, drag: { x: true, y: false, uni: 8 }, y: false };
}

/** A figure, its key with the values under the cursor, and what its metrics mean. */
function plotted(title, what, keys, metrics, make, unit) {
  const values = keys.map(() => el("b", {}, ""));
  const place = el("div.plot");
  const about = metrics.filter((name) => data.explained[name]);
  const figure = el("figure", { "data-chart": title },
    el("figcaption", {}, el("h3", {}, el("span", {}, title), el("span.unit", { title: what }, what)),
      keys.map((key, index) => el("span.key", {}, el(key.box ? "span.swatch.box" : "span.swatch", { style: { color: key.stroke } }), key.name, " ", values[index]))),
    place,
    about.length ? el("details.why", { open: unfolded.has(title), ontoggle: (event) => unfolded[event.target.open ? "add" : "delete"](title) }, el("summary", {}, "What is it, and what is healthy?"), el("dl", {}, about.flatMap((name) => {
      const known = data.explained[name];
      return [el("dt", {}, name), el("dd", {}, `${known.meaning}. Healthy: ${known.healthy || "-"}. If not: ${known.remedy || "-"}`)];
    }))) : null);
  const caption = (plot) => {
    keys.forEach((key, index) => {
      const column = key.values || plot.data[key.index];
      const under = plot.cursor.idx ?? (state.step === "" ? -1 : plot.data[0].indexOf(Number(state.step)));
      const known = under >= 0 ? column[under] : column.findLast((each) => each !== null);
      const text = key.values ? (typeof known === "number" ? seconds(known) : "-") : show(known, unit);
      if (values[index].textContent !== text) values[index].textContent = text;
    });
  };
  return { figure, place, make: (width) => make(place, Math.max(200, width), caption) };
}

function hooks(marks, caption) {
  return {
    ready: [(plot) => {
      caption(plot);
      plot.over.addEventListener("click", () => {
        const at = plot.cursor.idx;
        if (at !== null && at !== undefined && !zooming) set({ step: String(plot.data[0][at]) });
      });
      plot.over.addEventListener("mousemove", (event) => markTip(plot, event));
      plot.over.addEventListener("mouseleave", hideTip);
      plot.over.addEventListener("dblclick", () => zoom(null));
    }],
    setCursor: [caption],
    setSelect: [(plot) => {
      if (plot.select.width <= 2) return;
      zooming = true;
      zoom([plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")]);
      setTimeout(() => { zooming = false; }, 0);
    }],
    draw: [(plot) => { drawMarks(plot, marks); caption(plot); }],
  };
}

function zoom(range) {
  state.xmin = range ? range[0].toFixed(2) : "";
  state.xmax = range ? range[1].toFixed(2) : "";
  writeAddress();
  for (const plot of plots) {
    const steps = plot.data[0];
    plot.setScale("x", range ? { min: range[0], max: range[1] } : { min: steps[0], max: steps[steps.length - 1] });
  }
}

function drawMarks(plot, marks) {
  const { ctx, bbox } = plot;
  const line = (step, stroke, dash) => {
    const x = plot.valToPos(step, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) return;
    ctx.save();
    ctx.strokeStyle = stroke;
    ctx.setLineDash(dash);
    ctx.lineWidth = devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.restore();
  };
  for (const step of marks) line(step, css("--warn"), [4, 3]);
  if (state.step !== "") line(Number(state.step), css("--ink"), []);
}

function markTip(plot, event) {
  const at = plot.cursor.idx;
  const step = at === null || at === undefined ? null : plot.data[0][at];
  const said = data.runs.flatMap((run) => run.marks.filter((mark) => mark.step === step).map((mark) => mark.text));
  if (step === null) return;
  showTip([`step ${step}`, ...said].join("\n"), event.clientX, event.clientY);
}

addEventListener("resize", later(150, () => {
  if (!data) return;
  for (const plot of plots) {
    const width = plot.root.parentNode ? plot.root.parentNode.clientWidth : 0;
    if (width) plot.setSize({ width, height: 160 });
  }
  if (state.view === "answers") list.remeasure();
  if (state.view === "timeline") paintLanes();
}));

// -- answers --------------------------------------------------------------------------------------

/* Groups and which of their answers pass the filters; a card never holds more than what is asked. */

function stepRule(text) {
  const parts = text.split(",").map((part) => part.trim().match(/^(\d+)(?:\s*-\s*(\d+))?$/)).filter(Boolean);
  if (!text.trim() || !parts.length) return () => true;
  const spans = parts.map((part) => [Number(part[1]), Number(part[2] || part[1])]);
  return (step) => spans.some(([low, high]) => step >= low && step <= high);
}

function answerRule() {
  const search = state.search.toLowerCase();
  const from = state.from === "" ? -Infinity : Number(state.from);
  const below = state.below === "" ? Infinity : Number(state.below);
  const plain = state.from === "" && state.below === "";
  return (answer, group) =>
    (plain || (Number(answer.reward) >= from && Number(answer.reward) < below)) &&
    (!state.truncated || answer.truncated) &&
    (!search || answer.shown.toLowerCase().includes(search) || group.asked.toLowerCase().includes(search));
}

function groupRule() {
  const step = stepRule(state.steps);
  return (group) =>
    (!state.run || group.run === state.run || data.runs.length === 1) &&
    (state.follow ? group.key === state.follow : (
      (!state.kind || group.kind === state.kind) && (!state.dataset || group.dataset === state.dataset) &&
      (!state.mixed || group.spread > 0))) &&
    step(group.step);
}

const SORTS = {
  step: ["step", (item) => item.group.step],
  reward: ["reward", (item) => item.reward],
  spread: ["spread of rewards", (item) => item.group.spread],
  length: ["length", (item) => item.length],
  stale: ["staleness", (item) => Math.max(...item.group.answers.map((a) => a.stale))],
  change: ["change", (item) => (item.change === undefined ? 0 : item.change)],
};

function chosenItems() {
  const wanted = groupRule();
  const passes = answerRule();
  const items = [];
  for (const group of data.groups) {
    if (!wanted(group)) continue;
    const answers = group.answers.filter((answer) => passes(answer, group));
    if (!answers.length) continue;
    const rewards = answers.map((answer) => Number(answer.reward)).filter(Number.isFinite);
    items.push({ group, answers, reward: rewards.length ? mean(rewards) : NaN, length: mean(answers.map((answer) => answer.length)), id: group.id });
  }
  return state.mode === "change" ? pairs(items) : items;
}

/** The same prompt at the first and at the last of the chosen steps. */
function pairs(items) {
  const by = new Map();
  for (const item of items) {
    const key = `${item.group.run}\u0000${item.group.kind}\u0000${item.group.key}`;
    by.set(key, [...(by.get(key) || []), item]);
  }
  const out = [];
  for (const found of by.values()) {
    if (found.length < 2) continue;
    found.sort((a, b) => a.group.step - b.group.step);
    const [first, last] = [found[0], found[found.length - 1]];
    out.push({ ...last, first, change: last.group.mean - first.group.mean, id: `${last.id}\u0000pair` });
  }
  return out;
}

function sortItems(items) {
  const by = SORTS[state.sort][1];
  const way = state.reverse ? -1 : 1;
  // What is no number comes last, whichever way.
  return items.map((item, index) => [by(item), index, item])
    .sort((a, b) => (Number.isNaN(a[0]) - Number.isNaN(b[0])) || way * (a[0] - b[0]) || a[1] - b[1])
    .map((entry) => entry[2]);
}

function drawAnswers() {
  if (drawn.answers !== data) {
    drawn.answers = data;
    $("answers").replaceChildren(
      el("form.filters", { id: "filters", onsubmit: (event) => event.preventDefault() }),
      el("div.status", { id: "status" }), el("div.notes", { id: "notes" }, data.notes.map((note) => el("p", {}, note))),
      el("div.legend", { id: "legend" }), el("div", { id: "list" }));
    drawFilters();
  }
  fillFilters();
  const items = sortItems(chosenItems());
  drawStatus(items);
  drawLegend();
  list.show(items);
}

function drawFilters() {
  const datasets = [...new Set(data.groups.map((group) => group.dataset))].filter(Boolean);
  const field = (name, label, props, className = "") => el("label", {}, label,
    el(`input${className}`, { id: name === "search" ? "search" : `f-${name}`, oninput: later(120, (event) => set({ [name]: event.target.value })), ...props }));
  const check = (name, label) => el("label.check", {}, el("input", { id: `f-${name}`, type: "checkbox", onchange: (event) => set({ [name]: event.target.checked }) }), label);
  $("filters").replaceChildren(
    field("search", "Search prompts and answers", { type: "search", placeholder: "text" }),
    data.runs.length > 1 ? choice("run", "Run", [["", "all"], ...data.runs.map((run) => [run.name, run.name])]) : "",
    choice("kind", "Answers of", [["", "training and held-out"], ["trained", "training"], ["held-out", "held-out"]]),
    field("steps", "Steps", { placeholder: "12, 10-14", title: "12, 10-14 or 0,20" }, ".short"),
    datasets.length > 1 ? choice("dataset", "Dataset", [["", "all"], ...datasets.map((name) => [name, name])]) : "",
    field("from", "Reward from", { type: "number", step: "any" }, ".short"),
    field("below", "below", { type: "number", step: "any" }, ".short"),
    check("truncated", "truncated"),
    check("mixed", "mixed groups"),
    choice("mode", "Show", [["groups", "groups"], ["change", "first and last of a prompt"]], (mode) => set({ mode, sort: mode === "change" ? "change" : "step" })),
    choice("sort", "Sort by", Object.entries(SORTS).map(([key, [label]]) => [key, label])),
    el("label.check", {}, el("input", { id: "f-reverse", type: "checkbox", onchange: (event) => set({ reverse: event.target.checked }) }), "largest first"),
    choice("colour", "Colour tokens by", [["", "nothing"], ["logprob", "logprob"], ["ratio", "ratio"], ["advantage", "advantage"], ["version", "weight version"], ["mask", "who wrote it"]]),
    button("Clear", () => look({ view: "answers" }), { id: "clear" }),
  );
}

/** The fields say what is set; the one that is being typed in is left alone. */
function fillFilters() {
  for (const name of ["search", "steps", "from", "below"]) {
    const field = $(name === "search" ? "search" : `f-${name}`);
    if (document.activeElement !== field) field.value = state[name];
  }
  for (const name of ["truncated", "mixed", "reverse"]) $(`f-${name}`).checked = state[name];
  for (const name of ["run", "kind", "dataset", "mode", "sort", "colour"]) {
    const box = document.querySelector(`#answers [data-choose="${name}"]`);
    if (box) box.value = state[name];
  }
}

function drawStatus(items) {
  const answers = items.flatMap((item) => item.answers);
  const rewards = answers.map((answer) => Number(answer.reward)).filter(Number.isFinite);
  const parts = state.mode === "change"
    ? [`${plural(items.length, "prompt")}, at the first and at the last of the chosen steps`]
    : [`${plural(answers.length, "answer")} in ${plural(items.length, "group")}`];
  if (rewards.length) parts.push(`mean reward ${show(mean(rewards))}`);
  if (answers.length) parts.push(`mean length ${show(mean(answers.map((answer) => answer.length)))}`);
  const truncated = answers.filter((answer) => answer.truncated).length;
  if (truncated) parts.push(`${truncated} truncated`);
  const following = state.follow ? [el("strong", {}, `One prompt through time: ${where(state.follow)}`), button("All prompts", () => look({ view: "answers" }))] : [];
  $("status").replaceChildren(...following, ...parts.map((part) => el("span.num", {}, part)));
}

const where = (key) => { const [dataset, row] = key.split("\u0000"); return `${dataset ? `${dataset}, ` : ""}row ${row}`; };

function drawLegend() {
  const tok = (text, style) => el("span.tok", { style }, text);
  const legends = {
    "": [],
    logprob: ["Likely", ...[0, 0.5, 1, 2, 4].map((depth) => tok(`\u2212${depth}`, logprobStyle(-100 * depth))), "surprising: log-probability at which each token was sampled"],
    ratio: ["Less likely", ...[0.5, 0.8, 1, 1.25, 2].map((ratio) => tok(`\u00d7${ratio}`, ratioStyle(100 * Math.log(ratio)))), "more likely when it was trained on than when it was sampled"],
    advantage: ["Worse", ...[-2, -1, 0, 1, 2].map((advantage) => tok(show(advantage), signedStyle(advantage / 2))), "better than the other answers to its prompt: the advantage of the whole answer"],
    version: [tok("newest weights", versionStyle(0)), tok("one older", versionStyle(1)), tok("two or more older", versionStyle(2)), "within its answer's group"],
    mask: [tok("sampled by the policy (trained on)", maskStyle(true)), el("span.tok.outside", {}, "put there by an environment or template")],
  };
  $("legend").replaceChildren(...legends[state.colour].map((part) => (typeof part === "string" ? el("span", {}, part) : part)));
  $("legend").hidden = !state.colour;
}

const mix = (name, share) => ({ background: share <= 0 ? "" : `color-mix(in srgb, ${css(name)} ${Math.round(share * 100)}%, transparent)` });
const logprobStyle = (hundredths) => mix("--c1", Math.min(0.75, -hundredths / 100 / 4));
const signedStyle = (share) => mix(share < 0 ? "--bad" : "--good", 0.6 * Math.min(1, Math.abs(share)));
const ratioStyle = (hundredths) => signedStyle(hundredths / 100 / Math.LN2);
const versionStyle = (behind) => mix("--c3", Math.min(0.6, 0.3 * behind));
const maskStyle = (sampled) => (sampled ? mix("--c0", 0.18) : {});

// A list that holds only what is seen.

const list = {
  items: [], heights: new Map(), tops: [], nodes: new Map(), open: new Set(), usual: 320, total: 0,

  show(items) {
    this.items = items;
    for (const node of this.nodes.values()) node.remove();
    this.nodes.clear();
    $("list").replaceChildren();
    if (!items.length) {
      $("list").style.height = "auto";
      $("list").append(el("p.empty", {}, data.groups.length ? "No answer passes these filters." : "No answers were recorded."));
      return;
    }
    this.layout();
    this.paint();
  },

  layout() {
    const known = [...this.heights.values()];
    if (known.length) this.usual = mean(known);
    let top = 0;
    this.tops = this.items.map((item) => { const at = top; top += this.heights.get(item.id) || this.usual; return at; });
    this.total = top;
    $("list").style.height = `${top}px`;
  },

  at(offset) { // the last item that begins above
    let [low, high] = [0, this.items.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.tops[middle] <= offset) low = middle; else high = middle - 1;
    }
    return low;
  },

  /** Put what can be seen into the document; where a height was guessed wrongly, once more. */
  paint(again = 3) {
    if (state.view !== "answers" || !this.items.length) return;
    const above = -$("list").getBoundingClientRect().top;
    const first = this.at(above - 600);
    const last = this.at(above + innerHeight + 600);
    const anchor = this.at(Math.max(0, above));
    const before = this.tops[anchor];
    const wanted = new Set();
    const added = [];
    for (let index = first; index <= last; index += 1) {
      const item = this.items[index];
      wanted.add(item.id);
      let node = this.nodes.get(item.id);
      if (!node) {
        node = groupNode(item, index);
        this.nodes.set(item.id, node);
        added.push(node);
      }
      node.style.top = `${this.tops[index]}px`;
    }
    $("list").append(...added);
    for (const [id, node] of this.nodes) {
      if (!wanted.has(id) && !node.contains(document.activeElement)) { node.remove(); this.nodes.delete(id); }
    }
    let changed = false;
    for (const [id, node] of this.nodes) {
      const height = node.offsetHeight;
      if (Math.abs((this.heights.get(id) || 0) - height) > 1) { this.heights.set(id, height); changed = true; }
    }
    if (!changed) return;
    this.layout();
    const moved = this.tops[anchor] - before;
    if (above > 0 && moved) scrollBy(0, moved);
    if (again) this.paint(again - 1);
  },

  /** One item has another content now. */
  redraw(item) {
    const node = this.nodes.get(item.id);
    const index = this.items.indexOf(item);
    const focused = node && node.contains(document.activeElement);
    const fresh = groupNode(item, index);
    if (node) node.replaceWith(fresh);
    this.nodes.set(item.id, fresh);
    fresh.style.top = `${this.tops[index]}px`;
    if (focused) fresh.focus({ preventScroll: true });
    this.paint();
  },

  remeasure() { this.heights.clear(); this.layout(); this.paint(); },
};

let frameAsked = false;
addEventListener("scroll", () => {
  if (frameAsked || state.view !== "answers") return;
  frameAsked = true;
  requestAnimationFrame(() => { frameAsked = false; list.paint(); });
}, { passive: true });

function moveGroup(by) {
  if (state.view !== "answers" || !list.items.length) return;
  const now = [...list.nodes].find(([, node]) => node.contains(document.activeElement));
  const at = now ? list.items.findIndex((item) => item.id === now[0]) + by : list.at(Math.max(0, -$("list").getBoundingClientRect().top));
  const next = Math.max(0, Math.min(list.items.length - 1, at));
  const head = document.querySelector(".top").offsetHeight;
  scrollTo(0, $("list").getBoundingClientRect().top + scrollY + list.tops[next] - head);
  list.paint();
  const node = list.nodes.get(list.items[next].id);
  if (node) node.focus({ preventScroll: true });
}

// A group and its answers.

function groupNode(item, index) {
  const { group } = item;
  const chip = (text, flag = false) => (text ? el(flag ? "span.chip.flag" : "span.chip", {}, text) : null);
  const head = el("header", {},
    el("span.where", {}, item.first ? where(group.key) : `Step ${group.step}`),
    chip(group.kind === "trained" ? "training" : group.kind),
    data.runs.length > 1 ? chip(group.run) : null,
    item.first ? chip(`change ${item.change >= 0 ? "+" : "\u2212"}${show(Math.abs(item.change))}`) : chip(where(group.key)),
    chip(Number.isNaN(group.mean) ? "" : `mean reward ${show(group.mean)}`),
    chip(group.kind === "trained" ? `weights ${group.version}` : ""),
    chip(group.outcome !== "trained" && group.kind === "trained" ? group.outcome : "", true),
    chip(group.attempts > 1 ? `${group.attempts} attempts` : "", true),
    state.follow ? null : button("This prompt through time", () => look({ view: "answers", follow: group.key, colour: state.colour }), { className: "quiet small" }));
  const asked = group.prompt.map((message) => message.role && group.prompt.length > 1
    ? el("div.turn", {}, el("div.role", {}, message.role), long(item, `prompt ${message.role}`, message.text, "p"))
    : long(item, "prompt", message.text, "p"));
  const columns = Object.entries(group.columns).map(([name, text]) => el("div", {}, el("span.soft", {}, `${name}: `), long(item, `column ${name}`, text, "span")));
  const answers = item.first
    ? el("div.pair", {}, [item.first, item].map((each) => el("div", {}, el("h3", {}, `Step ${each.group.step}`), cards(each, item))))
    : cards(item, item);
  return el("article.group", { tabIndex: 0, "data-index": index, "aria-label": `step ${group.step}, ${where(group.key)}` },
    head, el("div.sides", {}, el("div.asked", {}, el("div.prompt", {}, asked), columns.length ? el("div.expected", {}, columns) : null), answers));
}

function cards(item, owner) {
  const others = item.group.answers.length - item.answers.length;
  const openKey = `${item.id} all`;
  const shown = list.open.has(openKey) ? item.group.answers : item.answers;
  return el("div", {},
    el("div.cards", {}, shown.map((answer) => card(answer, item.group, owner))),
    others ? button(list.open.has(openKey) ? "Only those that pass the filters" : `${others} more of this group`, () => toggle(owner, openKey), { className: "quiet small" }) : null);
}

function toggle(item, key) {
  if (list.open.has(key)) list.open.delete(key); else list.open.add(key);
  list.redraw(item);
}

function card(answer, group, item) {
  const numbers = group.answers.map((each) => Number(each.reward)).filter(Number.isFinite);
  const reward = Number(answer.reward);
  const mixed = Math.max(...numbers) > Math.min(...numbers);
  const rank = mixed ? (reward === Math.max(...numbers) ? ".high" : reward === Math.min(...numbers) ? ".low" : "") : "";
  const parts = Object.entries(answer.rewards);
  const [oldest, newest] = answer.versions;
  const chip = (text, flag = false) => (text ? el(flag ? "span.chip.flag" : "span.chip", {}, text) : null);
  const place = group.answers.indexOf(answer);
  const key = `${group.id}\u0000${place}`;
  return el(`div.card${rank}`, {},
    el("header", {},
      el("span.reward", {}, `reward ${show(answer.reward)}`),
      parts.length > 1 ? parts.map(([name, each]) => chip(`${name} ${show(each)}`)) : null,
      answer.advantage === undefined ? null : chip(`advantage ${show(answer.advantage)}`),
      chip(plural(answer.length, "token")),
      group.kind === "trained" ? chip(`weights ${oldest === newest ? oldest : `${oldest}\u2013${newest}`}${answer.stale ? `, ${answer.stale} old` : ""}`) : null,
      answer.turns.length ? chip(plural(answer.turns.filter((turn) => turn.role === "assistant").length, "turn")) : null,
      chip(answer.greedy ? "greedy" : ""),
      chip(answer.truncated ? "truncated" : "", true)),
    state.colour ? coloured(answer, group, item, key) : plainAnswer(answer, item, key));
}

const plainAnswer = (answer, item, key) => (answer.turns.length ? conversation(answer, item, key) : long(item, key, answer.text, "p"));

function conversation(answer, item, key) {
  return el("div", {}, answer.turns.map((turn, index) => el("div", { className: `turn ${turn.role === "assistant" ? "assistant" : ""}` },
    el("div.role", {}, turn.role === "assistant" ? "policy" : turn.role),
    turn.text ? el("div.said", {}, long(item, `${key} ${index}`, turn.text, "p")) : null,
    turn.calls.map((call) => el("div.call", {}, call)))));
}

const CLAMP_CHARACTERS = 900, CLAMP_LINES = 14, LONG = 4000;

/** Text that is cut where it is long, with the rest a button away; what was searched is marked. */
function long(item, key, text, tag) {
  const id = `${item.id}\u0001${key}`;
  const lines = text.split("\n", CLAMP_LINES + 1).length;
  const cut = text.length > CLAMP_CHARACTERS || lines > CLAMP_LINES;
  if (!cut) return el(`${tag}.text`, { dir: "auto" }, marked(text));
  const open = list.open.has(id);
  const shown = open ? text : text.slice(0, LONG);
  return el("div", {}, el(`div.body${open ? (text.length > LONG ? ".long" : "") : ".clamped"}`, {}, el(`${tag}.text`, { dir: "auto" }, marked(shown))),
    button(open ? "Less" : `All of it (${text.length.toLocaleString("en")} characters)`, () => toggle(item, id), { className: "quiet small" }));
}

const MOST_MARKS = 200;

function marked(text) {
  const search = state.search.toLowerCase();
  const plain = text.toLowerCase();
  // Case may change a text's length (Turkish dotted I): then no place can be marked.
  if (!search || plain.length !== text.length) return [text];
  const out = [];
  let from = 0;
  for (let at = plain.indexOf(search); at >= 0 && out.length < MOST_MARKS; at = plain.indexOf(search, from)) {
    out.push(text.slice(from, at), el("mark", {}, text.slice(at, at + search.length)));
    from = at + search.length;
  }
  return [...out, text.slice(from)];
}

const MOST_COLOURED = 600;

function coloured(answer, group, item, key) {
  const { tokens } = answer;
  if (!tokens || !tokens.pieces.length) return plainAnswer(answer, item, key);
  const versions = [];
  for (let at = 0; at < tokens.versions.length; at += 2) for (let n = 0; n < tokens.versions[at + 1]; n += 1) versions.push(tokens.versions[at]);
  const newest = Math.max(...group.answers.map((each) => each.versions[1]));
  const open = list.open.has(key);
  const count = open ? tokens.pieces.length : Math.min(tokens.pieces.length, MOST_COLOURED);
  const styles = {
    logprob: (at) => logprobStyle(tokens.logprobs[at]),
    ratio: (at) => (tokens.moved ? ratioStyle(tokens.moved[at]) : {}),
    advantage: () => (Number.isFinite(answer.advantage) ? signedStyle(answer.advantage / 2) : {}),
    version: (at) => versionStyle(newest - versions[at]),
    mask: () => maskStyle(true),
  };
  const style = styles[state.colour] || styles.mask;
  const spans = [];
  for (let at = 0; at < count; at += 1) {
    const sampled = versions[at] >= 0;
    const span = document.createElement("span"); // thousands at once: without what `el` costs
    span.className = sampled ? "tok" : "tok outside";
    span.textContent = data.pieces[tokens.pieces[at]];
    const ratio = tokens.moved ? `, ratio ${Math.exp(tokens.moved[at] / 100).toFixed(2)}` : "";
    span.title = sampled ? `logprob ${(tokens.logprobs[at] / 100).toFixed(2)}${ratio}, weights ${versions[at]}` : "not sampled by the policy";
    if (sampled) span.style.background = style(at).background || "";
    spans.push(span);
  }
  const rest = tokens.pieces.length > MOST_COLOURED ? button(open ? "Less" : `All ${tokens.pieces.length.toLocaleString("en")} tokens`, () => toggle(item, key), { className: "quiet small" }) : null;
  return el("div", {}, el("p.text", { dir: "auto" }, spans), rest);
}

// -- timeline -------------------------------------------------------------------------------------

const LANE = 34, TOP = 30, LEFT = 92;
let lanesRun = null;

function drawTimeline() {
  const run = theRun();
  const { lanes, recorded, starts, left_out: leftOut, kinds } = run.timeline;
  if (drawn.timeline !== run) {
    drawn.timeline = run;
    const step = el("input.num", { type: "number", id: "jump", value: chosenStep(run) === null ? "" : chosenStep(run), "aria-label": "Step to go to", onchange: (event) => jump(Number(event.target.value)) });
    const rows = lanes.flatMap((lane) => {
      const sums = new Map();
      for (const [, long_, kind] of lane.spans) sums.set(kind, (sums.get(kind) || 0) + long_);
      const all = [...sums.values()].reduce((a, b) => a + b, 0) || 1;
      return el("tr", {}, el("th", { scope: "row" }, lane.name), el("td", {}, [...sums].sort((a, b) => b[1] - a[1]).map(([kind, sum]) =>
        el("span.key.soft", { style: { marginRight: "1.2em", whiteSpace: "nowrap" } }, el("span.swatch.box", { style: { color: colourOf(kinds[kind]) } }), `${kinds[kind]} ${seconds(sum)} (${Math.round((100 * sum) / all)} %)`))));
    });
    $("timeline").replaceChildren(
      el("div.bar", {},
        data.runs.length > 1 ? choice("run", "Run", data.runs.map((each) => [each.name, each.name])) : "",
        el("label", {}, "Go to step ", step),
        button("\u2212", () => zoomLanes(2), { ariaLabel: "zoom out", title: "zoom out (\u2212)" }), button("+", () => zoomLanes(0.5), { ariaLabel: "zoom in", title: "zoom in (+)" }),
        button("All", () => frameLanes(null)),
        el("span.soft.small", { id: "span" })),
      el("p.soft.small", {}, recorded
        ? "Wheel or + and \u2212 zoom, drag or the arrow keys move, click a span for its step." + (starts > 1 ? " The time between its starts is left out." : "")
        : "This run recorded no timeline: the trainer's steps are laid end to end as metrics.csv has their parts, without validations and pauses; servers are unknown."),
      leftOut ? el("p.soft.small", {}, `${leftOut.toLocaleString("en")} of the shortest spans are left out.`) : "",
      lanes.length ? el("canvas", { id: "lanes", tabIndex: 0, role: "img", "aria-label": "What the trainer and each server did over time" }) : el("p.empty", {}, "Nothing was recorded."),
      el("p", { id: "jumped" }),
      el("div.scroll", { style: { marginTop: ".8rem" } }, el("table", {}, el("tbody", {}, rows))));
    lanesRun = run;
    if (lanes.length) listen($("lanes"));
  }
  paintLanes();
}

const extent = () => Math.max(1e-3, ...lanesRun.timeline.lanes.map((lane) => lane.spans.reduce((most, span) => Math.max(most, span[0] + span[1]), 0)));
const windowOf = () => (state.t0 === "" ? [0, extent()] : [Number(state.t0), Number(state.t1)]);

function frameLanes(range) {
  const most = extent();
  if (range) {
    const width = Math.min(most, Math.max(1e-3, range[1] - range[0]));
    const from = Math.max(0, Math.min(range[0], most - width));
    [state.t0, state.t1] = width >= most ? ["", ""] : [from.toFixed(4), (from + width).toFixed(4)];
  } else [state.t0, state.t1] = ["", ""];
  later.write(); // the address may be written only so often
  paintLanes();
}
later.write = later(250, () => writeAddress());

function zoomLanes(factor, share = 0.5) {
  const [from, to] = windowOf();
  const middle = from + share * (to - from);
  frameLanes([middle - (middle - from) * factor, middle + (to - middle) * factor]);
}

/** Show a step: its spans of the trainer, with a little before and after. */
function jump(step) {
  const run = theRun();
  const spans = run.timeline.lanes.flatMap((lane) => lane.spans).filter((span) => span[3] === step);
  state.step = String(step);
  if ($("jump")) $("jump").value = step;
  if (!spans.length) { paintLanes(); return; }
  const from = Math.min(...spans.map((span) => span[0]));
  const to = Math.max(...spans.map((span) => span[0] + span[1]));
  const room = Math.max(0.05, (to - from) * 0.4);
  lanesRun = run;
  frameLanes([from - room, to + room]);
}

function paintLanes() {
  const canvas = $("lanes");
  if (!canvas || !lanesRun) return;
  const { lanes, kinds, began } = lanesRun.timeline;
  const width = canvas.clientWidth;
  const height = TOP + lanes.length * LANE + 6;
  const ratio = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, height);
  const [from, to] = windowOf();
  const x = (at) => LEFT + ((at - from) / (to - from)) * (width - LEFT - 8);
  paintAxis(ctx, x, from, to, width, height);
  const colours = kinds.map(colourOf);
  ctx.font = axisFont();
  lanes.forEach((lane, index) => {
    const top = TOP + index * LANE;
    ctx.fillStyle = css("--ink");
    ctx.fillText(lane.name, 8, top + LANE / 2 + 4, LEFT - 14);
    paintSpans(ctx, lane.spans, x, top + 3, colours, kinds, width);
  });
  ctx.fillStyle = css("--warn");
  if (began !== null) {
    for (const mark of lanesRun.marks) {
      const at = mark.at === null ? -1 : x(mark.at - began);
      if (at < LEFT || at > width) continue;
      ctx.beginPath();
      ctx.moveTo(at - 5, TOP - 9);
      ctx.lineTo(at + 5, TOP - 9);
      ctx.lineTo(at, TOP - 1);
      ctx.fill();
    }
  }
  const chosen = Number(state.step);
  $("jumped").textContent = state.step === "" ? "" : `Step ${chosen}: ${stepWords(lanesRun, chosen) || "no time is known of it."}`;
  $("span").textContent = `${seconds(from)} to ${seconds(to)} of ${seconds(extent())}`;
}

function paintAxis(ctx, x, from, to, width, height) {
  const wanted = (to - from) / Math.max(2, (width - LEFT) / 110);
  const size = 10 ** Math.floor(Math.log10(wanted));
  const every = size * ([1, 2, 5, 10].find((times) => times * size >= wanted) || 10);
  ctx.font = axisFont();
  ctx.lineWidth = 1;
  for (let at = Math.ceil(from / every) * every; at <= to; at += every) {
    ctx.strokeStyle = css("--rule");
    ctx.beginPath();
    ctx.moveTo(x(at), 18);
    ctx.lineTo(x(at), height);
    ctx.stroke();
    ctx.fillStyle = css("--soft");
    ctx.fillText(at < every / 2 ? "0 s" : seconds(at), x(at) + 3, 13);
  }
}

function paintSpans(ctx, spans, x, top, colours, kinds, width) {
  let painted = -1;
  const edge = width - 8;
  for (const [at, long_, kind, step] of spans) {
    const left = Math.max(LEFT, x(at));
    const right = Math.min(edge, x(at + long_));
    if (right < LEFT || left > edge) continue;
    if (right - left < 0.4 && left < painted) continue; // in a pixel that is painted
    ctx.fillStyle = colours[kind];
    ctx.fillRect(left, top, Math.max(0.8, right - left), LANE - 8);
    painted = left + 0.8;
    if (step !== null && String(step) === state.step) {
      ctx.fillStyle = css("--ink");
      ctx.fillRect(left, top + LANE - 8, Math.max(0.8, right - left), 3);
    }
    if (right - left > 54) {
      ctx.save();
      ctx.beginPath();
      ctx.rect(left, top, right - left - 4, LANE - 8);
      ctx.clip();
      ctx.fillStyle = css(["idle", "other"].includes(kinds[kind]) ? "--ink" : "--paper");
      ctx.fillText(step === null ? kinds[kind] : `${kinds[kind]} ${step}`, left + 5, top + LANE / 2);
      ctx.restore();
    }
  }
}

/** The span under a point, or null. */
function spanAt(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const { lanes, kinds } = lanesRun.timeline;
  const lane = lanes[Math.floor((event.clientY - box.top - TOP) / LANE)];
  const [from, to] = windowOf();
  const pixel = (to - from) / (box.width - LEFT - 8);
  const time = from + (event.clientX - box.left - LEFT) * pixel;
  if (!lane || time < from) return null;
  const found = lane.spans.filter((span) => time >= span[0] - pixel && time <= span[0] + span[1] + pixel).sort((a, b) => b[1] - a[1])[0];
  return found ? { lane: lane.name, what: kinds[found[2]], at: found[0], long: found[1], step: found[3] } : null;
}

function markAt(canvas, event) {
  const { began } = lanesRun.timeline;
  const box = canvas.getBoundingClientRect();
  if (began === null || event.clientY - box.top > TOP) return null;
  const [from, to] = windowOf();
  const pixel = (to - from) / (box.width - LEFT - 8);
  const time = from + (event.clientX - box.left - LEFT) * pixel;
  return lanesRun.marks.find((mark) => mark.at !== null && Math.abs(mark.at - began - time) < 6 * pixel) || null;
}

function listen(canvas) {
  let held = null;
  canvas.addEventListener("wheel", (event) => {
    const box = canvas.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (event.clientX - box.left - LEFT) / (box.width - LEFT - 8)));
    zoomLanes(Math.exp(event.deltaY * 0.002), share);
    event.preventDefault();
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { held = { x: event.clientX, range: windowOf(), moved: false }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", (event) => {
    const found = held && !held.moved ? spanAt(canvas, event) : null;
    held = null;
    if (found && found.step !== null) { state.step = String(found.step); $("jump").value = found.step; writeAddress(); paintLanes(); }
  });
  canvas.addEventListener("pointermove", (event) => {
    if (held) {
      const [from, to] = held.range;
      const by = ((event.clientX - held.x) / (canvas.clientWidth - LEFT - 8)) * (to - from);
      held.moved = held.moved || Math.abs(event.clientX - held.x) > 3;
      if (held.moved) { hideTip(); frameLanes([from - by, to - by]); }
      return;
    }
    const mark = markAt(canvas, event);
    const found = mark ? null : spanAt(canvas, event);
    if (mark) showTip(`step ${mark.step}: ${mark.text}`, event.clientX, event.clientY);
    else if (found) showTip(`${found.lane}: ${found.what}${found.step === null ? "" : `, step ${found.step}`}\n${seconds(found.long)}, from ${seconds(found.at)} on`, event.clientX, event.clientY);
    else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("dblclick", () => frameLanes(null));
  canvas.addEventListener("keydown", (event) => {
    const [from, to] = windowOf();
    const by = (to - from) / 5;
    const acts = {
      "+": () => zoomLanes(0.5), "=": () => zoomLanes(0.5), "-": () => zoomLanes(2),
      ArrowLeft: () => frameLanes([from - by, to - by]), ArrowRight: () => frameLanes([from + by, to + by]),
      Home: () => frameLanes(null), 0: () => frameLanes(null),
    };
    if (acts[event.key]) { acts[event.key](); event.preventDefault(); }
  });
}

// -- start ----------------------------------------------------------------------------------------

/** Ask for newer data; what is open, chosen and scrolled to stays. */
async function refresh(every) {
  let tag = document.body.dataset.tag;
  for (;;) {
    await new Promise((done) => setTimeout(done, every * 1000));
    try {
      const reply = await fetch("data", { headers: { "If-None-Match": tag } });
      if (reply.status === 200) {
        tag = reply.headers.get("ETag");
        const at = scrollY;
        const typing = document.activeElement.id;
        take(await inflate(await reply.arrayBuffer()));
        drawn.timeline = null;
        draw();
        scrollTo(0, at);
        if (typing && $(typing)) $(typing).focus({ preventScroll: true });
      }
      $("live").textContent = `live, read at ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      $("live").textContent = "the server has gone; this is what was read last";
    }
  }
}

async function start() {
  frame();
  readAddress();
  take(await embedded());
  draw();
  performance.mark("ready");
  document.body.dataset.ready = "1";
  const every = Number(document.body.dataset.refresh);
  if (every > 0) { $("live").textContent = "live"; refresh(every); }
}

start().catch((error) => {
  $("overview").replaceChildren(el("p.empty", {}, `This browser can't show the page: ${error.message}`));
  throw error;
});

})();
