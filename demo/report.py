"""The demonstration's page: one HTML file with everything inside, for light and dark screens, without scripts."""

from __future__ import annotations

import platform
import sys
from html import escape

from journey import Command, Journey, Step

from cowhand import __version__

_STYLE = """
:root { color-scheme: light dark; --ground: #f4f6fa; --card: #fff; --ink: #0f172a; --quiet: #5b6b82; --edge: #d5dde8; --mark: #2563eb;
  --code: #0f172a; --code-ink: #e2e8f0; --good: #15803d; }
@media (prefers-color-scheme: dark) { :root { --ground: #0b1220; --card: #0f172a; --ink: #e6edf7; --quiet: #93a4bd; --edge: #26344d;
  --mark: #60a5fa; --code: #060b16; --code-ink: #d7e1f0; --good: #4ade80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.6 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 56px 20px 80px; }
h1 { font-size: 2.3rem; line-height: 1.15; margin: 0 0 .4em; letter-spacing: -.02em; }
.lead { color: var(--quiet); font-size: 1.1rem; max-width: 46em; margin: 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin: 32px 0 48px; }
.number { background: var(--card); border: 1px solid var(--edge); border-radius: 12px; padding: 16px 18px; }
.number b { display: block; font-size: 1.5rem; letter-spacing: -.01em; }
.number span { color: var(--quiet); font-size: .9rem; }
section { position: relative; padding: 0 0 40px 52px; }
section::before { content: ""; position: absolute; left: 17px; top: 40px; bottom: 0; width: 2px; background: var(--edge); }
section:last-of-type::before { display: none; }
.dot { position: absolute; left: 0; top: 0; width: 36px; height: 36px; border-radius: 50%; background: var(--mark); color: var(--card);
  font-weight: 600; display: grid; place-items: center; }
h2 { margin: 0 0 .3em; font-size: 1.35rem; line-height: 36px; }
section > p { margin: 0 0 1em; max-width: 46em; }
.term { background: var(--code); color: var(--code-ink); border-radius: 10px; border: 1px solid var(--edge); margin: 12px 0; overflow: hidden; }
.term div { display: flex; justify-content: space-between; gap: 16px; padding: 9px 14px; border-bottom: 1px solid #ffffff1c;
  font: 600 .86rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
.term div::before { content: "$"; color: #7c8da8; margin-right: -6px; }
.term div code { flex: 1; font: inherit; overflow-wrap: anywhere; }
.term div time { color: #7c8da8; font-weight: 400; white-space: nowrap; }
.term pre { margin: 0; padding: 10px 14px 12px; overflow-wrap: anywhere; white-space: pre-wrap;
  font: .82rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
.term .status { color: #fbbf24; font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 12px 0; font-size: .95rem; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 18px 0; } figure svg { width: 100%; height: auto; display: block; border: 1px solid var(--edge); border-radius: 12px; }
figcaption { color: var(--quiet); font-size: .9rem; margin-top: 8px; }
footer { color: var(--quiet); font-size: .9rem; border-top: 1px solid var(--edge); padding-top: 20px; }
@media (max-width: 640px) { section { padding-left: 0; } section::before, .dot { display: none; } dl { grid-template-columns: 1fr; } }
"""


def render(journey: Journey) -> str:
    """Return the page that tells of *journey*."""
    steps = "\n".join(_step(number, step) for number, step in enumerate(journey.steps, start=1))
    count = sum(len(step.commands) for step in journey.steps)
    numbers = [
        (f"{journey.seconds:.0f} s", "from real files to this page"),
        (str(count), "commands, none of which failed"),
        ("0", "bytes that differ from the model"),
        (
            str(sum("qemu-img" in command.line for step in journey.steps for command in step.commands)),
            "judgements by qemu-img",
        ),
    ]
    cards = "".join(
        f'<div class="number"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in numbers
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>cowhand: a disk's life</title>
<style>{_STYLE}</style>
<main>
<h1>A disk's life</h1>
<p class="lead">Imported, snapshotted, put under an overlay, measured, committed, reverted, compressed, restored and checked by cowhand,
in pure Python. Every command and every answer below is real.</p>
<div class="numbers">{cards}</div>
{steps}
<footer>cowhand {escape(__version__)}, Python {escape(platform.python_version())}, {escape(platform.system())}
{escape(platform.machine())}. Made by <code>make demo</code> ({escape(sys.implementation.name)}).</footer>
</main>
</html>
"""


def _step(number: int, step: Step) -> str:
    commands = "".join(_command(command) for command in step.commands)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in step.facts)
    pictures = "".join(
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for caption, svg in step.pictures
    )
    return (
        f'<section><span class="dot">{number}</span><h2>{escape(step.title)}</h2><p>{escape(step.words)}</p>'
        f"{f'<dl>{facts}</dl>' if facts else ''}{commands}{pictures}</section>"
    )


def _command(command: Command) -> str:
    status = f'<span class="status"> exit code {command.status}</span>' if command.status else ""
    output = f"<pre>{escape(command.output)}</pre>" if command.output else ""
    return f'<div class="term"><div><code>{escape(command.line)}{status}</code><time>{command.seconds:.2f} s</time></div>{output}</div>'
