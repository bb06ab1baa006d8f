"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const panel = document.getElementById("panel");
const said = document.getElementById("said");
const texts = [...document.querySelectorAll(".text[role=listbox]")];
const STRIKING_LEVEL = 4; // a probability of 1/16 or less
let kept = null; // the token that was clicked or reached by a key
let laid = null; // the token whose row is in the panel

texts.forEach((text, number) => {
  text.tokens = [...text.children];
  text.tokens.forEach((token, position) => {
    token.setAttribute("role", "option");
    token.setAttribute("aria-selected", "false");
    token.tabIndex = position ? -1 : 0;
    token.text = text;
    token.position = position;
    token.row = data.documents[number][position];
  });
  text.addEventListener("pointerover", (event) => {
    const token = event.target.closest("b");
    if (token) lay(token);
  });
  text.addEventListener("pointerleave", () => kept && lay(kept));
  text.addEventListener("click", (event) => {
    const token = event.target.closest("b");
    if (token) keep(token);
  });
  text.addEventListener("focusin", (event) => event.target.text === text && event.target !== kept && keep(event.target));
  text.addEventListener("keydown", (event) => {
    const target = event.ctrlKey || event.metaKey || event.altKey ? null : reach(event.target, event.key);
    if (target) {
      event.preventDefault();
      keep(target);
    }
  });
});

for (const choice of document.querySelectorAll("input[name=by]")) {
  choice.addEventListener("change", () => document.body.classList.toggle("by-kl", choice.id === "by-kl"));
  if (choice.checked) document.body.classList.toggle("by-kl", choice.id === "by-kl"); // a browser may restore it
}

for (const button of document.querySelectorAll("button[data-token]")) {
  const text = button.closest("details").querySelector(".text");
  button.addEventListener("click", () => keep(text.tokens[button.dataset.token]));
}

/** The token that a key leads to, or undefined. */
function reach(token, key) {
  const { text, position } = token;
  if (!text) return undefined;
  const level = (other) => Number((/\bs(\d)/.exec(other.className) || [0, 0])[1]);
  switch (key) {
    case "ArrowRight": return text.tokens[position + 1];
    case "ArrowLeft": return text.tokens[position - 1];
    case "Home": return text.tokens[0];
    case "End": return text.tokens.at(-1);
    case "n": return text.tokens.find((other) => other.position > position && level(other) >= STRIKING_LEVEL);
    case "p": return text.tokens.findLast((other) => other.position < position && level(other) >= STRIKING_LEVEL);
    case "ArrowDown": return onNextLine(token, 1);
    case "ArrowUp": return onNextLine(token, -1);
    case "Enter": case " ": return token;
  }
}

/** The token nearest to the same column on the line below (step 1) or above (−1). */
function onNextLine(token, step) {
  const box = (other) => other.getClientRects()[0] || other.getBoundingClientRect();
  const { left, top } = box(token);
  let line = null, best;
  for (let other = token; (other = token.text.tokens[other.position + step]); ) {
    const place = box(other);
    if (step * (place.top - top) < 4) continue;
    if (line === null) line = place.top;
    if (Math.abs(place.top - line) > 4) break;
    if (!best || Math.abs(place.left - left) < Math.abs(box(best).left - left)) best = other;
  }
  return best;
}

/** Choose a token: focus it, show its row and say it in a sentence. */
function keep(token) {
  const before = kept || token;
  before.tabIndex = -1;
  before.setAttribute("aria-selected", "false");
  before.text.tokens[0].tabIndex = before.text === token.text ? -1 : 0;
  token.text.tokens[0].tabIndex = -1;
  token.tabIndex = 0;
  token.setAttribute("aria-selected", "true");
  token.setAttribute("aria-label", sentence(token));
  said.textContent = sentence(token);
  kept = token;
  lay(token);
  token.focus({ preventScroll: true });
  token.scrollIntoView({ block: "nearest" });
}

function sentence({ row, position }) {
  const here = `Token ${position}: ${data.labels[row.l]}`;
  if (!row.e) return `${here}; nothing predicts it.`;
  const [first, p] = row.e[0];
  const kl = row.q ? ` KL ${row.q[3]} nats.` : "";
  return `${here}; ${standing(row.r, row.p)}, surprise ${surprise(row)}. Most likely ${data.labels[first]}, ${percent(p)}.${kl}`;
}

function standing(rank, p) {
  return rank ? `rank ${rank}, ${percent(p)}` : `outside the row, at most ${percent(p)}`;
}

function surprise(row) {
  return `${row.r ? "" : "at least "}${(-Math.log(Math.max(row.p, 1e-45))).toFixed(2)} nats`;
}

function percent(p) {
  return p === null ? "in the tail" : p >= 0.0005 ? `${(100 * p).toFixed(1)} %` : p.toExponential(1);
}

function make(tag, content = "", attributes = {}) {
  const element = document.createElement(tag);
  if (content !== "") element.textContent = content;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function bar(p, kind) {
  const element = make("span", "", { class: `bar ${kind}`, "aria-hidden": "true" });
  element.style.width = `${100 * p}%`;
  return element;
}

/** Lay a token's row out in the panel. */
function lay(token) {
  if (laid) laid.classList.remove("chosen");
  laid = token;
  token.classList.add("chosen");
  panel.classList.remove("empty");
  const { row, position } = token;
  const close = make("button", "Close", { type: "button", class: "close" });
  close.addEventListener("click", () => panel.classList.add("empty"));
  const title = make("h2", `Token ${position} `);
  title.append(make("code", data.labels[row.l]));
  const facts = make("dl");
  const fact = (name, value) => facts.append(make("dt", name), make("dd", value));
  fact("id", `${row.i}${row.t ? "" : ", no training target"}`);
  if (row.s) fact("spells", `a part (${row.s[0]} of ${row.s[1]}) of “${joined(token)}”`);
  if (row.b) fact("bytes", row.b);
  if (!row.e) {
    panel.replaceChildren(close, title, facts, make("p", "Nothing predicts a document’s first token."));
    return;
  }
  fact("teacher", standing(row.r, row.p));
  fact("surprise", surprise(row));
  if (row.q) fact("student", standing(row.q[1], row.q[0]));
  if (row.q) fact("KL(teacher‖student)", `${row.q[3]} nats`);
  fact("entropy", row.h[1] - row.h[0] < 0.005 ? `${row.h[0].toFixed(2)} nats` : `${row.h[0].toFixed(2)} to ${row.h[1].toFixed(2)} nats`);
  panel.replaceChildren(close, title, facts, table(row));
  panel.scrollTop = 0;
}

function joined(token) {
  return token.text.tokens[token.position - token.row.s[0] + 1].textContent;
}

/** The most likely ids with bars and their sum so far, the rest of the row, and the tail. */
function table(row) {
  const result = make("table");
  result.append(make("caption", `What was expected: the ids until 95 %, of ${row.k} in the row`));
  const head = make("tr");
  const names = row.q ? ["token", "teacher", "sum", "student"] : ["token", "teacher", "sum"];
  head.append(...names.map((name) => make("th", name, { scope: "col" })));
  result.append(make("thead"), make("tbody"));
  result.tHead.append(head);
  let sum = 0;
  const add = (name, p, total, q, here) => {
    const line = make("tr", "", here ? { class: "here" } : {});
    const first = make("th", "", { scope: "row" });
    first.append(name);
    const teacher = make("td", percent(p));
    if (p !== null) teacher.append(bar(p, ""));
    line.append(first, teacher, make("td", total));
    if (row.q) {
      const student = make("td", q === null ? "" : percent(q));
      if (q !== null) student.append(bar(q, "student"));
      line.append(student);
    }
    result.tBodies[0].append(line);
  };
  for (const [label, p, q = null] of row.e) {
    sum += p || 0;
    add(make("code", data.labels[label]), p, p === null ? "" : percent(Math.min(sum, 1)), q, label === row.l);
  }
  if (row.m[0]) add(`${row.m[0]} more of the row`, row.m[1], percent(Math.min(sum + row.m[1], 1)), null);
  add("tail: all other ids", row.o, percent(Math.min(sum + row.m[1] + row.o, 1)), row.q ? row.q[2] : null);
  return result;
}
