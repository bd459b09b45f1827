// Replaces the content of the live page when the run has written more. What is open, chosen and focused stays so.
"use strict";

const SECONDS = 10;
const state = document.getElementById("live-state");
let shown = null;

async function refresh() {
  if (document.hidden || !document.getElementById("live-refresh").checked) return;
  try {
    const answer = await fetch("/", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    if (shown !== answer.headers.get("ETag")) {
      show(new DOMParser().parseFromString(await answer.text(), "text/html"));
      shown = answer.headers.get("ETag");
    }
    state.textContent = "";
  } catch {
    state.textContent = "The server no longer answers: the run has ended. This is its last page.";
  }
}

function show(page) {
  const main = document.querySelector("main");
  const isOpen = new Map([...main.querySelectorAll("details")].map((item) => [item.id, item.open]));
  const chosen = main.querySelector("input:checked")?.id;
  const focused = document.activeElement?.id;
  main.replaceWith(document.adoptNode(page.querySelector("main")));
  document.title = page.title;
  for (const item of document.querySelectorAll("main details")) item.open = isOpen.get(item.id) ?? item.open;
  if (chosen && document.getElementById(chosen)) document.getElementById(chosen).checked = true;
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

setInterval(refresh, 1000 * SECONDS);
document.addEventListener("visibilitychange", refresh);
