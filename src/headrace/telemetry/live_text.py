"""The text of the live page: one document, which needs nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import html
import re

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fafafa; --faint: #6b6b70; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17171a; --faint: #9a9aa2; }
}
* { box-sizing: border-box; }
body {
  margin: 0; min-height: 100vh; padding: 1rem; display: flex; flex-direction: column; gap: 0.75rem;
  background: var(--paper); color: var(--ink); font: 16px/1.4 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
#picture { flex: 1; min-height: 12rem; position: relative; }
#picture img {
  position: absolute; width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated;
}
#picture img.large { image-rendering: auto; }
dl { margin: 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; }
dl div { display: flex; gap: 0.4rem; }
dt { color: var(--faint); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
#note { margin: 0; font-weight: 600; }
#note:empty { display: none; }
"""

_SCRIPT = """
"use strict";
const token = new URLSearchParams(location.search).get("token");
const note = document.getElementById("note");
const numbers = document.getElementById("numbers");
const image = document.querySelector("#picture img");
const ENDED = "Training has ended, or its viewer has stopped: this is the last picture. "
  + "If training goes on, a new address was printed where it was started.";
const LATE = "No answer yet: the machine is busy with training.";
let shown = 0;
let address = "";

function get(path, query) {
  const signal = AbortSignal.timeout(8000);
  return fetch(`${path}?${new URLSearchParams({ token, ...query })}`, { signal });
}

function pause(ms) {
  return new Promise((done) => setTimeout(done, ms));
}

async function draw(answer) {
  const next = URL.createObjectURL(await answer.blob());
  image.src = next;
  await image.decode();
  image.hidden = false;
  image.className = image.naturalWidth > 256 ? "large" : "";
  URL.revokeObjectURL(address);
  address = next;
}

function write(values) {
  numbers.replaceChildren(...Object.entries(values).map(([name, value]) => {
    const pair = document.createElement("div");
    const term = pair.appendChild(document.createElement("dt"));
    const number = pair.appendChild(document.createElement("dd"));
    term.textContent = name;
    number.textContent = value === null ? "\\u2013"
      : value.toLocaleString(undefined, { maximumFractionDigits: 2 });
    return pair;
  }));
}

async function follow(once) {
  for (;;) {
    if (document.hidden) {
      await pause(500);
      continue;
    }
    try {
      await once();
    } catch (error) {
      note.textContent = error.name === "TimeoutError" ? LATE : ENDED;
      await pause(2000);
    }
  }
}

follow(async () => {
  const answer = await get("frame", { after: shown });
  if (!answer.ok) throw new Error(answer.status);
  if (answer.status === 200) {
    await draw(answer);
    shown = Number(answer.headers.get("X-Frame"));
  }
  note.textContent = shown ? "" : "Waiting for the first picture.";
});
follow(async () => {
  const answer = await get("state", {});
  if (!answer.ok) throw new Error(answer.status);
  write(await answer.json());
  await pause(500);
});
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<div id="picture"><img alt="The newest frame" hidden></div>
<dl id="numbers"></dl>
<p id="note" role="status">Waiting for the first picture.</p>
<script>{script}</script>
</body>
</html>
"""


def page(title: str) -> bytes:
    """Returns the document."""
    return _PAGE.format(title=html.escape(title), style=_STYLE, script=_SCRIPT).encode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hash(_SCRIPT)}",
        f"style-src {_hash(_STYLE)}",
        "img-src blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The Content-Security-Policy: this script, this style, this server, and nothing else."""


def without_token(text: str) -> str:
    """Returns a text without the tokens of addresses in it, for a log that others may read."""
    return re.sub(r"\btoken=[\w-]+", "token=...", text)
