"use strict";
// Everything that the server or a document says is put in as text, never as HTML.

const at = (id) => document.getElementById(id);
const modelName = { value: null };
let asking = null;

function headers(more) {
  const key = at("key").value.trim();
  return Object.assign(key ? { Authorization: `Bearer ${key}` } : {}, more);
}

async function call(path, options) {
  const answer = await fetch(path, Object.assign({ headers: headers() }, options));
  if (!answer.ok) {
    if (answer.status === 401) at("access").open = true;
    let message = `status ${answer.status}`;
    try { message = (await answer.json()).error.message; } catch { /* not in the usual form */ }
    throw new Error(message);
  }
  return answer;
}

function tell(id, text, failed) {
  at(id).textContent = text;
  at(id).classList.toggle("failed", Boolean(failed));
}

async function model() {
  if (modelName.value === null) {
    modelName.value = (await (await call("/v1/models")).json()).data[0].id;
  }
  return modelName.value;
}

async function listDocuments(chosen) {
  try {
    const found = (await (await call("/v1/documents")).json()).data;
    const list = at("document");
    const before = chosen === undefined ? list.value : chosen;
    list.replaceChildren(new Option("none", ""));
    for (const one of found) {
      const size = one.tokens === null ? `${one.characters} characters` : `${one.tokens} tokens`;
      list.add(new Option(`${one.name || one.id} (${size}, ${one.state})`, one.id));
    }
    list.value = found.some((one) => one.id === before) ? before : "";
    at("delete").disabled = list.value === "";
  } catch (error) {
    tell("about", error.message, true);
  }
}

async function handIn(body, more) {
  tell("about", "handing in ...");
  try {
    const found = await (await call("/v1/documents", { method: "POST", body, headers: headers(more) })).json();
    tell("about", `${found.characters} characters`);
    await listDocuments(found.id);
    return true;
  } catch (error) {
    tell("about", error.message, true);
    return false;
  }
}

async function upload() {
  const file = at("file").files[0];
  if (!file) return;
  const form = new FormData();
  form.append("file", file);
  await handIn(form);
  at("file").value = "";
}

async function handInText() {
  const text = at("text").value;
  if (!text.trim()) {
    tell("about", "there is no text yet", true);
    return;
  }
  const name = text.trim().split(/\s+/).slice(0, 8).join(" ").slice(0, 60);
  if (await handIn(JSON.stringify({ text, name }), { "Content-Type": "application/json" })) at("text").value = "";
}

async function remove() {
  try {
    await call(`/v1/documents/${encodeURIComponent(at("document").value)}`, { method: "DELETE" });
    tell("about", "deleted");
    await listDocuments("");
  } catch (error) {
    tell("about", error.message, true);
  }
}

function clear() {
  at("answer").replaceChildren();
  at("chunks").replaceChildren();
  at("retrieved").textContent = "Retrieved";
  for (const origin of ["lookup", "draft", "correction", "bonus"]) at(`of-${origin}`).textContent = "0";
}

function showSpans(spans) {
  for (const span of spans) {
    const piece = document.createElement("span");
    piece.className = span.origin;
    piece.title = span.origin;
    piece.textContent = span.text;
    at("answer").append(piece);
    const count = at(`of-${span.origin}`);
    count.textContent = String(Number(count.textContent) + 1);
  }
}

function showChunks(citations) {
  at("retrieved").textContent = `Retrieved: ${citations.length} chunks`;
  for (const chunk of citations) {
    const item = document.createElement("details");
    const head = document.createElement("summary");
    head.textContent = `${chunk.score.toFixed(3)} · characters ${chunk.start}–${chunk.end} · ${chunk.tokens} tokens `;
    const begin = document.createElement("span");
    begin.className = "faint";
    begin.textContent = chunk.text.trim().replace(/\s+/g, " ").slice(0, 60);
    head.append(begin);
    const text = document.createElement("pre");
    text.textContent = chunk.text.trim();
    item.append(head, text);
    at("chunks").append(item);
  }
}

function showEnd(choice) {
  const how = choice.rapid;
  const accepted = how.acceptance === null ? "nothing drafted" : `${Math.round(how.acceptance * 100)}% of drafts accepted`;
  const reused = how.document_reused ? ", document not read anew" : "";
  tell("status", `${how.mode}, eta ${how.eta}, gamma ${how.gamma}: ended by ${choice.finish_reason}, ${accepted}, ` +
    `${how.tokens_per_round.toFixed(2)} tokens a round${reused}`);
}

function take(line) {
  if (!line.startsWith("data: ")) return;
  const data = line.slice(6);
  if (data === "[DONE]") return;
  const chunk = JSON.parse(data);
  if (chunk.error) throw new Error(chunk.error.message);
  for (const choice of chunk.choices) {
    const rapid = choice.rapid || {};
    if (rapid.citations) showChunks(rapid.citations);
    if (rapid.origins) showSpans(rapid.origins);
    if (choice.finish_reason) showEnd(choice);
  }
}

async function read(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    const lines = waiting.split("\n");
    waiting = lines.pop();
    lines.forEach(take);
  }
}

async function ask(event) {
  event.preventDefault();
  if (asking) return;
  clear();
  tell("status", "asking ...");
  asking = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  at("answer").setAttribute("aria-busy", "true");
  try {
    const body = {
      model: await model(), stream: true, origins: true, max_tokens: Number(at("most").value) || 256,
      messages: [{ role: "user", content: at("question").value }],
    };
    if (at("document").value) body.document = at("document").value;
    if (at("mode").value) body.mode = at("mode").value;
    if (at("eta").value) body.eta = Number(at("eta").value);
    await read(await call("/v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), signal: asking.signal,
      headers: headers({ "Content-Type": "application/json" }),
    }));
  } catch (error) {
    tell("status", error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  } finally {
    asking = null;
    at("send").disabled = false;
    at("stop").disabled = true;
    at("answer").setAttribute("aria-busy", "false");
    listDocuments();
  }
}

at("ask").addEventListener("submit", ask);
at("stop").addEventListener("click", () => asking && asking.abort());
at("file").addEventListener("change", upload);
at("add").addEventListener("click", handInText);
at("delete").addEventListener("click", remove);
at("document").addEventListener("change", () => { at("delete").disabled = at("document").value === ""; });
at("key").addEventListener("change", () => listDocuments());
listDocuments();
