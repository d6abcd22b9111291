"""Results of the data benchmark: numbers, table and plot."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ssast.pipelines.figures import save_figure, subplots

CORES = (1, 4, 16, 64)
TITLES = {
    "soundfile": "soundfile + torch, DataLoader",
    "torchcodec": "torchcodec + torch, DataLoader",
    "torchaudio": "soundfile + torchaudio, DataLoader",
    "files": "AudioStream",
    "shards": "AudioStream, from shards",
}


@dataclass(frozen=True)
class Result:
    """Times per clip, as medians over the rounds.

    Attributes:
        kind: Format of the files.
        seconds: Length of a clip in s.
        clips: Number of clips in a round.
        rounds: Number of rounds.
        cpu_ms: CPU time of a clip by loader: the plain ones, and "files" and "shards" of the
            stream, also without its filterbanks ("files decode") and of reading alone
            ("files read").
        wall_ms: Wall-clock time of a clip by loader.
        max_difference: Largest difference between the filterbanks of two loaders (log-mel).
        device: Where the stream computes filterbanks: "cpu" or "cuda:0".
    """

    kind: str
    seconds: float
    clips: int
    rounds: int
    cpu_ms: dict[str, float]
    wall_ms: dict[str, float]
    max_difference: float
    device: str = "cpu"

    def ratio(self, loader: str) -> float:
        """Return the speed of a loader in clips per CPU second, relative to the plain one."""
        return self.cpu_ms["soundfile"] / self.cpu_ms[loader]

    def streams(self) -> list[str]:
        """Return the sources of the stream that were measured."""
        return [name for name in ("files", "shards") if name in self.cpu_ms]

    def stages(self, source: str) -> dict[str, float]:
        """Return the CPU time of a clip (ms) in each stage of the stream."""
        read, decode = self.cpu_ms[f"{source} read"], self.cpu_ms[f"{source} decode"]
        return {"read": read, "decode": decode - read, "filterbank": self.cpu_ms[source] - decode}

    def as_json(self) -> dict[str, object]:
        """Return all numbers as JSON can hold them."""
        rates = {f"{cores} cores": self.clips_per_s(cores) for cores in CORES}
        stages = {source: self.stages(source) for source in self.streams()}
        ratios = {"ratio": self.ratio("files"), "decode_ratio": self.ratio("files decode")}
        return asdict(self) | ratios | {"stages_cpu_ms": stages, "clips_per_s": rates}

    def clips_per_s(self, cores: int) -> dict[str, float]:
        """Return the clips per second that so many otherwise idle cores load."""
        names = [*self.streams(), *(f"{source} decode" for source in self.streams())]
        return {name: 1e3 * cores / self.cpu_ms[name] for name in names}


def table(result: Result) -> Iterator[str]:
    """Format a result as the lines of a table."""
    r = result
    where = "" if r.device == "cpu" else f", the stream's filterbanks on {r.device}"
    yield f"{r.kind}, {r.seconds:g} s, {r.clips} clips, medians of {r.rounds} rounds{where}"
    yield f"  {'':<42}{'CPU ms/clip':>12}{'clips/CPU s':>12}{'times plain':>12}"
    loaders = {title: name for name, title in TITLES.items() if name in r.cpu_ms}
    loaders |= {f"{TITLES[name]}, decoding alone": f"{name} decode" for name in r.streams()}
    for title, name in loaders.items():
        cpu_ms = r.cpu_ms[name]
        yield f"  {title:<42}{cpu_ms:>12.2f}{1e3 / cpu_ms:>12.0f}{r.ratio(name):>12.2f}"
    for source in r.streams() if r.device != "cpu" else ():
        rate = 1e3 / r.wall_ms[source]
        yield f"  {f'{TITLES[source]}, to {r.device}':<42}{rate:>12.0f} clips/s of wall-clock time"
    for source in r.streams():
        stages = ", ".join(f"{name} {ms:.2f}" for name, ms in r.stages(source).items())
        yield f"  CPU ms by stage, from {source}: {stages}"
    yield f"  {'clips/s by number of cores':<42}" + "".join(f"{n:>12}" for n in CORES)
    for source in r.streams():
        for what, name in (("with filterbanks", ""), ("where a GPU computes them", " decode")):
            rates = "".join(f"{r.clips_per_s(n)[source + name]:>12,.0f}" for n in CORES)
            yield f"  {f'from {source}, {what}':<42}{rates}"
    yield f"  largest difference between the filterbanks: {r.max_difference:.1e} (log-mel)"


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot the CPU time of a clip by loader, that of the stream by stage."""
    bars = [(r, name) for r in results for name in TITLES if name in r.cpu_ms]
    figure, axes = subplots(figsize=(9, 1.2 + 0.36 * len(bars)))
    colours = {"read": "tab:green", "decode": "tab:orange", "filterbank": "tab:blue"}
    places: list[float] = []
    labelled: set[str] = set()
    for number, (r, name) in enumerate(bars):
        gap = 1.6 if number and bars[number - 1][0] is not r else 1.0
        places.append((places[-1] if places else 0.0) + gap)
        whole = {"all of a plain loader": r.cpu_ms[name]}
        left = 0.0
        for stage, ms in (r.stages(name) if name in r.streams() else whole).items():
            label = None if stage in labelled else stage
            axes.barh(places[-1], ms, 0.8, left, color=colours.get(stage, "grey"), label=label)
            labelled.add(stage)
            left += ms
        times = "" if name == "soundfile" else f", {r.ratio(name):.2f} times the clips"
        axes.text(left, places[-1], f"  {left:.2f} ms{times}", va="center", fontsize=8)
    axes.set_yticks(places, [f"{r.kind}, {r.seconds:g} s: {TITLES[name]}" for r, name in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(max(r.cpu_ms.values()) for r in results))
    axes.set_xlabel("CPU ms a clip, median")
    axes.legend(loc="lower right")
    save_figure(figure, path, dpi=120)
