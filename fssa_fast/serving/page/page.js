"use strict";
// The page speaks the server's own API. Whatever people or the model wrote is set as textContent, never as markup.

const $ = (id) => document.getElementById(id);
const PRIOR = "__prior__", BASE = "__base__";
const state = { model: "", users: [], map: null, way: new Map(), abort: null };

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function shown(name) {
  return name === PRIOR ? "nobody known (prior)" : name === BASE ? "the base model" : name;
}

function problem(error) {
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
}

// Runs what a control does: its button is off meanwhile, and what goes wrong is said.
async function acting(button, act) {
  problem(null);
  if (button) button.disabled = true;
  try {
    return await act();
  } catch (error) {
    if (error.name !== "AbortError") problem(error);
  } finally {
    if (button) button.disabled = false;
  }
}

// ---------------------------------------------------------------- the server

async function call(method, path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (method !== "GET" && !path.includes("completions")) headers["Idempotency-Key"] = random();
  const answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (answer.status === 401) {
    await askForKey();
    return call(method, path, body, signal);
  }
  if (!answer.ok) {
    const found = await answer.json().catch(() => null);
    throw new Error(found ? found.error.message : `the server answered ${answer.status}`);
  }
  return answer;
}

const get = async (path) => (await call("GET", path)).json();
const user = (name) => `v1/users/${encodeURIComponent(name)}`;

function random() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

let asking = null;
function askForKey() {
  $("key-button").hidden = false;
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("key", $("key").value);
      $("key").value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const data = text.slice(0, end).replace(/^data: /, "");
      text = text.slice(end + 2);
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

// ---------------------------------------------------------------- asking

function bodyFor(whom) {
  const body = { model: whom.name === BASE ? `${state.model}:base` : state.model, stream: true,
    messages: [{ role: "user", content: $("prompt").value }],
    max_tokens: Number($("tokens").value), temperature: Number($("temperature").value) };
  if (whom.users) body.steering = { users: whom.users };
  else if (whom.name !== PRIOR && whom.name !== BASE) body.user = whom.name;
  return body;
}

function mix() {
  const share = Number($("mix-share").value) / 100, from = $("mix-from").value, to = $("mix-to").value;
  return from === to ? { [from]: 1 } : { [from]: 1 - share, [to]: share };
}

async function stream(whom, signal) {
  const card = element("article", undefined, { class: "going" });
  const text = element("p"), note = element("small");
  card.append(element("h3", whom.title), text, note);
  $("answers").append(card);
  const began = performance.now();
  let first = 0, reason = "";
  try {
    for await (const event of events(await call("POST", "v1/chat/completions", bodyFor(whom), signal))) {
      const choice = event.choices[0];
      if (choice?.delta.content) {
        first ||= performance.now() - began;
        text.append(choice.delta.content);
      }
      reason = choice?.finish_reason ?? reason;
    }
    note.textContent = `${reason === "length" ? "cut at the limit" : "ended"}, first words after ${Math.round(first)} ms`;
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "stopped" : error.message;
  } finally {
    card.classList.remove("going");
  }
}

$("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  acting(event.submitter, async () => {
    state.abort?.abort();
    state.abort = new AbortController();
    $("answers").replaceChildren();
    $("stop").disabled = false;
    const asked = [...document.querySelectorAll("#people input:checked")]
      .map(({ value }) => ({ name: value, title: shown(value) }));
    if ($("mix-on").checked) asked.push({ users: mix(), title: $("mix-text").textContent });
    if (!asked.length) throw new Error("Pick at least one to answer for.");
    await Promise.all(asked.map((whom) => stream(whom, state.abort.signal)));
    $("stop").disabled = true;
  });
});
$("stop").addEventListener("click", () => state.abort?.abort());

function showMix() {
  const share = Number($("mix-share").value);
  $("mix-text").textContent = `${100 - share} % ${shown($("mix-from").value)}, ${share} % ${shown($("mix-to").value)}`;
}
for (const id of ["mix-from", "mix-to", "mix-share"]) $(id).addEventListener("input", showMix);

// ---------------------------------------------------------------- users

function options(select, names, wanted) {
  select.replaceChildren(...names.map((name) => element("option", shown(name), { value: name })));
  if (names.includes(wanted)) select.value = wanted;
}

async function loadUsers(picked) {
  const found = await get("v1/users?limit=100");
  state.users = found.data.map((one) => one.id);
  const before = new Set([...document.querySelectorAll("#people input:checked")].map(({ value }) => value));
  const everybody = [...state.users, PRIOR, BASE];
  $("people").replaceChildren(...everybody.map((name, index) => {
    const box = element("input", undefined, { type: "checkbox", value: name });
    box.checked = before.size ? before.has(name) : index < 3 || name === BASE;
    const label = element("label");
    label.append(box, shown(name));
    return label;
  }));
  options($("mix-from"), everybody, $("mix-from").value);
  options($("mix-to"), everybody, $("mix-to").value || everybody[1]);
  options($("who"), state.users, picked ?? $("who").value);
  $("delete").disabled = !state.users.length;
  showMix();
  await Promise.all([loadChoices(), loadMap()]);
}

async function loadChoices() {
  const name = $("who").value;
  const found = name ? (await get(`${user(name)}/choices?limit=1000`)).data : [];
  if (name !== $("who").value) return;  // another has been picked meanwhile
  $("count").textContent = name ? `of ${name}: ${found.length}` : "";
  $("choices").replaceChildren(...found.map((choice) => {
    const line = element("li"), text = element("div");
    const side = (word, value) => {
      const made = element("div", undefined, { class: "clip" });
      made.append(element("b", `${word} `), typeof value === "string" ? value : `${value.length} numbers`);
      return made;
    };
    if (choice.prompt) text.append(element("div", choice.prompt, { class: "quiet clip" }));
    text.append(side("Better:", choice.chosen), side("Worse:", choice.rejected));
    const button = element("button", "Remove", { type: "button", "aria-label": "Remove this choice" });
    button.addEventListener("click", () => acting(button, async () => {
      await call("DELETE", `${user(name)}/choices/${choice.id}`);
      await moved(name);
    }));
    line.append(text, button);
    return line;
  }));
}

async function moved(name) {
  await loadChoices();
  const { latent } = await get(`${user(name)}?latent=true`);
  follow(name, latent);
}

$("who").addEventListener("change", () => acting(null, async () => {
  $("pair").replaceChildren();
  await loadChoices();
  drawMap();
}));

$("new-form").addEventListener("submit", (event) => {
  event.preventDefault();
  acting(event.submitter, async () => {
    const name = $("new-name").value;
    await call("POST", "v1/users", { name });
    $("new-name").value = "";
    $("pair").replaceChildren();
    await loadUsers(name);
  });
});

$("delete").addEventListener("click", () => {
  const name = $("who").value;
  if (!confirm(`Delete ${name}, with all choices?`)) return;
  acting($("delete"), async () => {
    await call("DELETE", user(name));
    state.way.delete(name);
    $("pair").replaceChildren();
    await loadUsers();
  });
});

$("question-form").addEventListener("submit", (event) => {
  event.preventDefault();
  acting(event.submitter, async () => {
    const name = $("who").value;
    if (!name) throw new Error("Add a user first.");
    $("pair").replaceChildren(element("p", "Asking …", { class: "quiet" }));
    let found;
    try {
      const answer = await call("POST", `${user(name)}/question`,
        { prompt: $("prompt").value, max_tokens: Number($("tokens").value), temperature: 1 });
      found = (await answer.json()).answers;
    } catch (error) {
      $("pair").replaceChildren();
      throw error;
    }
    $("pair").replaceChildren(...found.map((one, index) => {
      const card = element("article"), button = element("button", "This one is better", { type: "button", class: "main" });
      button.addEventListener("click", () => acting(button, async () => {
        await call("POST", "v1/feedback", { better: one.id, worse: found[1 - index].id, user: name });
        $("pair").replaceChildren();
        await moved(name);
      }));
      card.append(element("h3", `Answer ${index + 1}`), element("p", one.text), button);
      return card;
    }));
  });
});

// ---------------------------------------------------------------- the map

async function loadMap() {
  state.map = await get("v1/map");
  for (const { id, at } of state.map.users) {
    if (!state.way.has(id)) state.way.set(id, []);
    state.way.get(id).splice(0, Infinity, at);  // the axes may be others now
  }
  for (const name of [...state.way.keys()]) if (!state.map.users.some(({ id }) => id === name)) state.way.delete(name);
  drawMap();
}

function follow(name, latent) {
  const { axes, center } = state.map;
  const at = axes.map((axis) => axis.reduce((sum, a, i) => sum + a * (latent[i] - center[i]), 0));
  state.way.get(name)?.push(at);
  drawMap();
}

function drawMap() {
  const svg = $("map"), here = $("who").value;
  const place = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    svg.append(made);
  };
  svg.replaceChildren(...svg.querySelectorAll("title"));
  let far = 1e-9;
  for (const way of state.way.values()) for (const [x, y] of way) far = Math.max(far, Math.abs(x) / 80, Math.abs(y) / 62);
  const on = ([x, y]) => [(x / far).toFixed(2), (-y / far).toFixed(2)];
  place("path", { d: "M-3 0H3M0 -3V3", class: "prior" });
  const names = state.way.size <= 24;
  for (const [name, way] of state.way) {
    const points = way.map(on), [x, y] = points.at(-1);
    if (points.length > 1) place("polyline", { points: points.join(" ") });
    place("circle", { cx: x, cy: y, r: 1.8 });
    if (name === here) place("circle", { cx: x, cy: y, r: 3.6, class: "here" });
    if (names || name === here) {
      const left = Number(x) > 55;
      place("text", { x: Number(x) + (left ? -5 : 5), y: Number(y) + 1.7, "text-anchor": left ? "end" : "start" },
        name.length > 18 ? `${name.slice(0, 17)}…` : name);
    }
  }
}

// ---------------------------------------------------------------- begin

$("key-button").addEventListener("click", () => acting(null, async () => {
  await askForKey();
  await loadUsers();
}));

acting(null, async () => {
  state.model = (await get("v1/models")).data[0].id;
  $("model").textContent = state.model;
  await loadUsers();
});
