"""The Reporter's face on a terminal: a status line that is redrawn, everything else scrolls above it."""

import contextlib
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmkit.errors import LlmkitError
from llmkit.report.console import Clock, Pace, Values, error_text, eta_of, progress_text
from llmkit.report.formatting import format_duration, labelled, one_line, visible

_NOTHING: Values = {}
_BAR_CELLS = 24
_SPINNER = ("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\")


class LiveReporter:
    """Redraws one status line; finished phases, notes and samples stay above it.

    With `color=False` no style code is written, neither colour nor bold nor dim; only the redrawing remains.
    Every text goes in as `Text`, which rich neither parses as markup nor highlights.
    """

    def __init__(self, stream: TextIO, *, color: bool = True, clock: Clock = time.monotonic) -> None:
        # color_system=None is what drops bold and dim too; `no_color` alone would keep them.
        self._console = Console(
            file=stream,
            force_terminal=True,
            force_interactive=True,
            color_system="auto" if color else None,
            no_color=not color,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._ascii = not (self._console.encoding or "").startswith("utf")
        self._clock = clock
        self._pace = Pace(clock)
        self._live: Live | None = None
        self._name = self._status = self._last_values = ""
        self._ratio: float | None = None
        self._started = 0.0

    def phase(self, name: str, detail: str = "") -> None:
        """See Reporter."""
        self._finish_phase()
        self._begin(name)
        self._say(
            Text.assemble((f"{self._mark('●', '*')} ", "cyan"), (one_line(name), "bold"), self._after(detail))
        )
        self._start_live()

    def progress(
        self, phase: str, done: int, total: int | None, values: Values = _NOTHING, *, unit: str = "step"
    ) -> None:
        """See Reporter."""
        if phase != self._name:
            self.phase(phase)
        eta = eta_of(values, self._pace.eta(phase, done, total))
        self._ratio = min(1.0, done / total) if total else None
        self._status = progress_text(done, total, values, eta, unit)
        shown = [
            labelled(key, value)
            for key, value in values.items()
            if key in ("loss", "train/loss", "eval/loss")
        ]
        count = f"{done:,} {unit}{'s' if done != 1 and not unit.endswith('s') else ''}"
        self._last_values = " · ".join([count, *shown]) if unit != "bytes" else ""
        if total is not None and done >= total:
            self._finish_phase()

    def note(self, text: str) -> None:
        """See Reporter."""
        self._say(Text(visible(text)))

    def warn(self, text: str) -> None:
        """See Reporter."""
        self._say(Text.assemble(("warning: ", "bold yellow"), visible(text)))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """See Reporter."""
        body = Text.assemble((visible(prompt), "bold cyan"), visible(text))
        self._say(Text(f"  sample at step {step}", style="dim"))
        self._say(Padding(body, (0, 2, 0, 4), expand=False))

    def table(self, title: str, rows: Sequence[Sequence[object]]) -> None:
        """See Reporter."""
        self._say(Text(one_line(title), style="bold"))
        grid = Table.grid(padding=(0, 2))
        for row in rows:
            cells = [Text(one_line(str(cell)), overflow="fold") for cell in row]
            if len(cells) > 1:
                cells[0].stylize("dim")
            grid.add_row(*cells)
        self._say(Padding(grid, (0, 0, 0, 2), expand=False))

    def error(self, err: LlmkitError) -> None:
        """See Reporter."""
        self._stop_live()
        styles = {"error": "bold red", "hint": "cyan"}
        for text in error_text(err):
            head, colon, rest = text.partition(":")
            known = head in styles and bool(colon)
            self._say(
                Text.assemble((f"{head}:", styles[head]), visible(rest)) if known else Text(visible(text))
            )

    def close(self) -> None:
        """See Reporter."""
        self._stop_live()

    def __rich__(self) -> Text:
        """The status line as it stands now; the live display asks for it several times a second."""
        elapsed = self._clock() - self._started
        frames = _SPINNER[self._ascii]
        words = self._status or one_line(self._name)
        clock = f" {self._mark('·', '-')} {format_duration(float(int(elapsed)))}"
        # The words matter more than the bar: on a narrow terminal it gives way.
        cells = max(4, min(_BAR_CELLS, self._console.width - len(words) - len(clock) - 4))
        line = Text(no_wrap=True, overflow="crop" if self._ascii else "ellipsis")
        if self._ratio is None:
            line.append(f"  {frames[int(elapsed * 8) % len(frames)]} ", "cyan")
        else:
            filled = round(self._ratio * cells)
            line.append("  " + self._mark("━", "#") * filled, "cyan")
            line.append(self._mark("─", "-") * (cells - filled) + " ", "dim")
        line.append(words)
        line.append(clock, "dim")
        return line

    def _begin(self, name: str) -> None:
        self._name, self._status, self._last_values = name, "", ""
        self._ratio, self._started = None, self._clock()

    def _finish_phase(self) -> None:
        """Turn the status line into a line that stays."""
        self._stop_live()
        if self._last_values:
            took = format_duration(self._clock() - self._started)
            words = Text.assemble(
                (f"{self._mark('✓', '+')} ", "green"),
                (one_line(self._name), "bold"),
                self._after(f"{self._last_values} · {took}"),
            )
            self._say(words)
        self._name = self._last_values = ""

    def _after(self, detail: str) -> tuple[str, str]:
        return (f"  {one_line(detail)}" if detail else "", "dim")

    def _mark(self, fancy: str, plain: str) -> str:
        return plain if self._ascii else fancy

    def _say(self, what: Text | Padding) -> None:
        # A report must not end a run: when the terminal is gone there is no one left to tell.
        try:
            self._console.print(what, soft_wrap=isinstance(what, Text))
        except OSError:
            self._console.quiet = True

    def _start_live(self) -> None:
        # Only stderr is redirected: stdout carries the result and must stay what it is.
        self._live = Live(
            get_renderable=self.__rich__,
            console=self._console,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=True,
        )
        self._live.start()

    def _stop_live(self) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None
