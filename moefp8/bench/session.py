"""What the subcommands share: a console, a timer, a progress bar, and files written whatever happens."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moefp8.bench import report
from moefp8.bench.apart import Watchdog
from moefp8.bench.ceilings import Ceilings
from moefp8.bench.timing import DeviceLostError, Timer

#: Seconds without a step, beside what a peer's first call may take, after which a run is given up.
PATIENCE = 180.0


class Bar:
    """A progress bar over ``total`` calls; candidates that turn out missing make fewer."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._task = progress.add_task("", total=total)

    def at(self, fraction: float, text: str) -> None:
        self._progress.update(self._task, completed=round(fraction * self._total), description=text)

    def name(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def advance(self) -> None:
        self._progress.advance(self._task)


class Session:
    """One run of a subcommand: ``rows`` gathers what is measured."""

    def __init__(self, args: argparse.Namespace, device: torch.device, command: str) -> None:
        self.args, self.device, self.command = args, device, command
        self.console = report.console()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events and launches go to the current device
        self.environment: dict[str, Any] = report.environment(device)
        shown = (f"{name} {value}" for name, value in self.environment.items() if value is not None)
        self.console.print(", ".join(shown))
        self.timer = Timer(device, args.peer_seconds)
        self.ceilings: Ceilings | None = None
        self.rows: list[Any] = []

    def kept(self, named: Sequence[Any]) -> list[Any]:
        """Those whose names contain none of ``--without``."""
        return [x for x in named if not any(part in x.name for part in self.args.without)]

    def run(self, total: int, measure: Callable[[Bar], None], show: Callable[[], None]) -> None:
        """``measure`` under a progress bar of ``total`` calls, then ``show`` and the JSON.

        What was measured before Ctrl-C, the loss of the device or a hang is still shown and written.
        """
        stopped: list[str] = []

        def finish() -> None:
            show()
            if self.args.json is not None:
                report.write_json(
                    self.args.json, self.command, self.environment, self.ceilings, self.rows, stopped
                )
                self.written(self.args.json)

        def give_up(reason: str) -> None:
            stopped.append(reason)
            self.console.print(f"[bold]{reason}[/]")
            finish()

        patience = self.args.peer_seconds + PATIENCE
        with Watchdog(patience, give_up) as watchdog, self._progress(total) as bar:
            self.timer.beat = watchdog.beat
            try:
                measure(bar)
            except KeyboardInterrupt:
                stopped.append("stopped by Ctrl-C")
            except DeviceLostError as error:
                stopped.append(f"{error}. Leave it out with --without to measure the rest.")
            watchdog.beat()
        finish()
        if stopped:
            raise SystemExit(f"Not complete, the tables end with the last whole shape: {stopped[0]}")

    @contextmanager
    def _progress(self, total: int) -> Iterator[Bar]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield Bar(progress, total)

    def beside(self, suffix: str) -> Path:
        """``--png`` with ``-suffix`` before its extension."""
        path: Path = self.args.png
        return path.with_stem(f"{path.stem}-{suffix}")

    def written(self, *paths: Path) -> None:
        for path in paths:
            self.console.print(f"wrote {path}")
