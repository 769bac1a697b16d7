"""The figures and pictures of a run: always in its folder, on the terminal, and with trackers where asked."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fourm import runtime

COURSE = 30  # records
BARS = "▁▂▃▄▅▆▇█"
CELL = 54  # columns of the terminal for one figure and its course
# What the head of the live view says; the other figures of a record have a row each.
HEAD = (
    "lr",
    "grad_norm",
    "seconds",
    "data_wait",
    "tokens_per_second",
    "samples_per_second",
    "mfu",
    "skipped",
    "tokens",
)


class Logbook:
    """Writes down what a run measures, one record per call.

    Args:
        folder: The run's folder; records are lines of JSON in `metrics.jsonl`, each with its `step`.
        trackers: Which of `TRACKERS` get the same. A run goes on under the same name, whose random end is kept in
            `run_id.txt`. Trackers cannot forget: after `rewind`, wandb and trackio show what was made twice twice.
        project: What the trackers file the run under.
        config: Shown beside the run in wandb and trackio.
        enabled: Whether this process is the one of several that writes.

    Raises:
        ValueError: A tracker is unknown, not installed, or does not start.
    """

    def __init__(
        self,
        folder: str | Path,
        trackers: Sequence[str] = (),
        project: str = "fourm",
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self.folder, self.enabled = Path(folder), enabled
        self.path = self.folder / "metrics.jsonl"
        self.board = Board(str(folder))
        self._live: Live | None = None
        self._trackers: dict[str, Any] = {}
        self._failed: set[str] = set()
        if enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._trackers = {name: start(name, self.folder, project, config or {}) for name in trackers}

    def rewind(self, step: int) -> None:
        """Drops the records after a step, and a line that was cut short: they are about to be made again."""
        if not self.enabled or not self.path.exists():
            return
        kept = [record for record in read(self.folder) if record["step"] <= step]
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(aside, self.path)
        self.board = Board(self.board.title)
        for record in kept:
            self.board.add(record)
        self._mirror(lambda tracker: tracker.rewind(step) if hasattr(tracker, "rewind") else None)

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds one record; values that JSON has no word for (NaN, infinity) become text."""
        if not self.enabled:
            return
        plain = {name: _plain(value) for name, value in record.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
        self.board.add(record)
        known = {name: value for name, value in record.items() if isinstance(value, int | float | str)}
        self._mirror(lambda tracker: tracker.log(known, step=step))

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Writes `pictures/<name>-<step>.png` below the folder; slashes in a name become dashes."""
        if not self.enabled or not pictures:
            return
        (self.folder / "pictures").mkdir(exist_ok=True)
        for name, image in pictures.items():
            image.save(self.folder / "pictures" / f"{name.replace('/', '-')}-{step}.png")
        self._mirror(lambda tracker: tracker.log_images({name: [each] for name, each in pictures.items()}, step=step))

    def progress(self, step: int, share: float, record: Mapping[str, Any], left: float) -> None:
        """Shows how far the run is: in a terminal that can redraw as a live view, elsewhere as a line.

        Args:
            step: Updates made.
            share: Of the run, from 0 to 1.
            record: What was written last.
            left: Seconds.
        """
        if not self.enabled:
            return
        self.board.now = (step, share, record, left)
        with self._heard():
            if self._live is None and redraws():
                # Without a thread of its own that redraws: loaders fork.
                self._live = Live(console=Console(), auto_refresh=False)
                self._live.start()
            if self._live is not None:
                self._live.update(self.board, refresh=True)
                return
        loss = f"  loss {record['loss']:.4f}" if "loss" in record else ""
        self.say("  ".join([f"step {step} ({share:.0%}){loss}", *facts(record), f"{duration(left)} left"]))

    def say(self, line: str) -> None:
        """Prints a line, also where the output goes to a file."""
        if self.enabled:
            with self._heard():
                print(line, flush=True)

    def close(self) -> None:
        """Leaves the last state on the terminal, and tells the trackers that the run is over."""
        with self._heard():
            live, self._live = self._live, None
            if live is not None:
                live.stop()
        self._mirror(lambda tracker: tracker.finish())

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """Goes silent for good where the reader of the output is gone (a pipe or connection that closed)."""
        try:
            yield
        except OSError:
            runtime.hush()
            live, self._live = self._live, None
            if live is not None:
                with contextlib.suppress(OSError):
                    live.stop()  # gives the streams back

    def _mirror(self, send: Callable[[Any], None]) -> None:
        """Tells every tracker; what fails there costs the run nothing but a warning, the first time."""
        for name, tracker in self._trackers.items():
            try:
                send(tracker)
            except Exception as error:  # they raise what they like
                if name not in self._failed:
                    self.say(f"warning: {name} failed ({type(error).__name__}: {error}); the run goes on without it, "
                             f"its figures are in {self.path}")  # fmt: skip
                self._failed.add(name)

    def __enter__(self) -> Logbook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Trackers ------------------------------------------------------------------------------------------------------------


class Wandb(WandBTracker):
    """Weights & Biases. Its own steps cannot go back, as ours do after a crash: ours are the figure `step`."""

    def start(self) -> None:
        """Starts the run, or goes on with it."""
        super().start()
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """Figures, or images."""
        super().log({**values, "step": step}, **options)

    def finish(self) -> None:
        """Ends the run; as failed where an exception ends it."""
        self.run.finish(exit_code=int(sys.exc_info()[0] is not None))


class Trackio(TrackioTracker):
    """Trackio, which keeps its data on this machine unless told otherwise."""

    def log_images(self, values: dict[str, list[Image.Image]], step: int | None = None, **options: Any) -> None:
        """Pictures, one of each name."""
        import trackio  # an extra

        self.log({name: trackio.Image(image) for name, (image,) in values.items()}, step=step)


class TensorBoard(TensorBoardTracker):
    """TensorBoard, in the run's folder."""

    def log_images(self, values: dict[str, list[Image.Image]], step: int | None = None, **options: Any) -> None:
        """Pictures, one of each name."""
        arrays = {name: np.stack([np.asarray(each) for each in images]) for name, images in values.items()}
        super().log_images(arrays, step, dataformats="NHWC")

    def rewind(self, step: int) -> None:
        """Hides what was written after a step."""
        self.finish()
        self.init_kwargs["purge_step"] = step + 1
        self.start()


TRACKERS: dict[str, Callable[[Path, str, str, Mapping[str, Any]], GeneralTracker]] = {
    "wandb": lambda folder, project, name, config: Wandb(
        project, id=name, name=name, dir=folder, config=dict(config), resume="allow"
    ),
    "trackio": lambda folder, project, name, config: Trackio(project, name=name, config=dict(config), resume="allow"),
    "tensorboard": lambda folder, project, name, config: TensorBoard("tensorboard", folder),
}


def start(name: str, folder: Path, project: str, config: Mapping[str, Any]) -> GeneralTracker:
    """Starts a tracker, under the name that the run in this folder had before.

    Raises:
        ValueError: It is unknown, not installed, or does not start.
    """
    if name not in TRACKERS:
        raise ValueError(f"trackers: {name!r} is unknown, allowed are {', '.join(TRACKERS)}")
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"{name} was asked for but is not installed: pip install fourm[{name}]")
    known = folder / "run_id.txt"
    if not known.exists():
        known.write_text("-".join([*folder.resolve().parts[-2:], secrets.token_hex(4)]))
    tracker = TRACKERS[name](folder, project, known.read_text(), config)
    try:
        tracker.start()
    except Exception as error:
        raise ValueError(f"{name} does not start: {error}") from error
    return tracker


# What was written ----------------------------------------------------------------------------------------------------


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run in the order they were made; a line that was cut short is left out."""
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) is not None]


def duration(seconds: float) -> str:
    """Seconds as `s`, `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def amount(number: float) -> str:
    """A number with three digits and k, M or G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


# The terminal --------------------------------------------------------------------------------------------------------


def redraws() -> bool:
    """Whether the output is a terminal where lines can be drawn anew, and the bars of the view exist."""
    stream, console = sys.stdout, Console()
    capable = console.is_terminal and console.is_interactive and not console.is_dumb_terminal
    return capable and stream.isatty() and stream.encoding.lower().startswith("utf")


class Board:
    """What a terminal shows of a run.

    Args:
        title: Headline.

    Attributes:
        now: Step, share, record and seconds left of `Logbook.progress`.
    """

    def __init__(self, title: str):
        self.title = title
        self.now: tuple[int, float, Mapping[str, Any], float] = (0, 0.0, {}, 0.0)
        self.courses: dict[str, deque[float]] = {}
        self.held_out: dict[str, float] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Remembers the numbers of a record of training, or those of an evaluation called `val`."""
        for name, value in record.items():
            if not isinstance(value, int | float):
                continue
            if name.startswith("val/"):
                self.held_out[name.removeprefix("val/")] = value
            elif "seconds" in record and name not in (*HEAD, "step"):
                self.courses.setdefault(name, deque(maxlen=COURSE)).append(value)

    def chosen(self, room: int) -> list[str]:
        """The loss, then its parts, then the rest; where there is no room for all, the largest parts."""
        names = sorted(self.courses, key=lambda name: (not name.startswith("loss"), name))
        if len(names) > room:
            names.sort(key=lambda name: (name != "loss", not name.startswith("loss"), -self.courses[name][-1]))
        return names[:room]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        step, share, record, left = self.now
        head = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, None, 1, None):
            head.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
        steps = f"step {step} of {round(step / share)}" if share else f"step {step}"
        bar = ProgressBar(total=1.0, completed=share)
        room = options.max_width // 3
        title = self.title if len(self.title) <= room else "…" + self.title[1 - room :]
        head.add_row(Text(title, "bold"), steps, bar, f"{share:.0%}  {duration(left)} left")
        yield head
        said = Text("  ".join(facts(record)), overflow="fold")
        yield said
        taken = 4 + len(said.wrap(console, options.max_width))  # and the head, titles, what is left out, the cursor
        down, across = max(1, console.size.height - taken), max(1, (options.max_width + 3) // (CELL + 3))
        names = self.chosen(down * across)
        if not names:
            return
        needed = -(-len(names) // down)
        yield Columns((self.table(part.tolist()) for part in np.array_split(names, needed)), padding=(0, 3))
        if len(names) < len(self.courses):
            yield Text(f"and {len(self.courses) - len(names)} more", "dim")

    def table(self, names: Sequence[str]) -> Table:
        """Name, last value, course and held-out value of figures."""
        table = Table(box=None, pad_edge=False, width=CELL, header_style="dim")
        table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
        for title, width, side in (("now", 8, "right"), ("course", COURSE // 2, "left"), ("held out", 8, "right")):
            table.add_column(title, width=width, justify=side, no_wrap=True)  # type: ignore[arg-type]
        for name in names:
            held_out = f"{self.held_out[name]:.4g}" if name in self.held_out else ""
            values = self.courses[name]
            table.add_row(Text(name.removeprefix("loss/")), f"{values[-1]:.4g}", sparkline(values), held_out)
        return table


def facts(record: Mapping[str, Any]) -> list[str]:
    """A record but for its losses, in words."""
    forms: dict[str, Callable[[float], str]] = {
        "lr": lambda value: f"lr {value:.2e}",
        "grad_norm": lambda value: f"gradient {value:.3g}",
        "samples_per_second": lambda value: f"{amount(value)} samples/s",
        "tokens_per_second": lambda value: f"{amount(value)} tokens/s",
        "mfu": lambda value: f"MFU {value:.1%}",
        "data_wait": lambda value: f"data {value:.1%}",
        "skipped": lambda value: f"{value:g} skipped",
    }
    # An image tokenizer counts no tokens, and nothing is said of nothing.
    silent = [name for name in ("tokens_per_second", "skipped") if not record.get(name)]
    return [form(record[name]) for name, form in forms.items() if name in record and name not in silent]


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """The course of a figure as bars between its lowest and its highest point; NaN is a gap."""
    means = np.array([part.mean() for part in np.array_split(np.array(values), min(len(values), COURSE // 2))])
    finite = means[np.isfinite(means)]
    if not len(finite):
        return ""
    heights = (means - finite.min()) / max(np.ptp(finite), 1e-12) * (len(BARS) - 1)
    return "".join(BARS[round(height)] if math.isfinite(height) else " " for height in heights)
