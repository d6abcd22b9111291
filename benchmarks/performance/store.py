"""How much ``ssast bench performance`` measures, and the files that keep the results.

Each case is measured once: results in the file of its section are kept, so that a killed run
resumes. A case's key identifies it in the file and on the page. A case during which other programs
took the machine is measured again; what stays disturbed is marked, and not published.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssast.benchmarks.performance.others import OtherWork
from ssast.benchmarks.training.setting import Setting
from ssast.engine.errors import ConfigError
from ssast.engine.settings import SIZES
from ssast.pipelines.files import write_atomically

OUT = Path("runs/performance")
Case = Callable[[], Any]  # returns something that JSON can hold
TRIES = 3  # of a case
MOST_OTHER = 0.05  # share of all cores that other programs may take while a case is measured
_NUMBER_OF_CASES = ("sizes", "repeats", "variants")  # fields that no case depends on


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        sizes: Sizes of the model.
        repeats: Processes of each variant of the step; by size if None.
        variants: Variants of the step; all if empty.
        batch: Clips of a step.
        frames: Frames of a clip.
        threads: Threads of PyTorch and of the loaders.
        clips: Clips that each loader reads.
        data: Folder written by ``ssast data demo``, or one like it.
        device: What computes: "cpu" or "cuda:0".
    """

    sizes: tuple[str, ...] = ("tiny", "small", "base")
    repeats: int | None = None
    variants: tuple[str, ...] = ()
    batch: int = 8
    frames: int = 1024
    threads: int = 2
    clips: int = 64
    data: str = "data/demo"
    device: str = "cpu"

    def setting(self, size: str = "tiny") -> Setting:
        """Return the setting of a step."""
        return Setting(
            size, self.batch, self.frames, self.threads, default_memory=False, device=self.device
        )

    def case_settings(self) -> dict[str, Any]:
        """Return what the result of a case depends on."""
        return {key: value for key, value in asdict(self).items() if key not in _NUMBER_OF_CASES}


def _measured(case: Case) -> tuple[Any, float]:
    """Measure a case until the machine is idle but for it; return the share that others had."""
    for number in range(1, TRIES + 1):
        with OtherWork() as others:
            found = case()
        if others.share <= MOST_OTHER or number == TRIES:
            break
        print(f"  other programs took {others.share:.0%} of the machine: again", flush=True)
    return found, others.share


class ResultStore:
    """Files with the results, one for each section.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, section: str) -> dict[str, Any]:
        """Return the results of a section by key, as far as there are any.

        Raises:
            ConfigError: The file is damaged.
        """
        return self._content(self._path(section)).get("results", {})

    def disturbed(self) -> dict[str, float]:
        """Return the share of the machine that others had, of each case that was disturbed.

        Raises:
            ConfigError: A file is damaged.
        """
        return {key: share for key, share in self.shares().items() if share > MOST_OTHER}

    def shares(self) -> dict[str, float]:
        """Return the share of the machine that others had, of each case.

        Raises:
            ConfigError: A file is damaged.
        """
        return {
            f"{path.stem}, {key}": share
            for path in self._files()
            for key, share in self._content(path).get("others", {}).items()
        }

    def sections(self) -> list[str]:
        """Return the sections that have results."""
        return [path.stem for path in self._files()]

    def machines(self) -> list[dict[str, Any]]:
        """Return the machines, versions and commits of the files, each once."""
        found = [machine for path in self._files() for machine in self._content(path)["machines"]]
        return [m for place, m in enumerate(found) if m not in found[:place]]

    def scope(self) -> Scope | None:
        """Return the scope of the files, with the sizes that have one; None without files."""
        files = self._files()
        if not files:
            return None
        sizes = tuple(size for size in SIZES if self._path(f"step-{size}") in files)
        return Scope(**self._content(files[0])["scope"], sizes=sizes)

    def measure(
        self, section: str, cases: Mapping[str, Case], scope: Scope, machine: Mapping[str, Any]
    ) -> None:
        """Measure the cases that the file lacks, or has disturbed, and store each result at once.

        Raises:
            ConfigError: There are results of another scope.
        """
        path, given = self._path(section), scope.case_settings()
        for name, before in (self.scope() or scope).case_settings().items():
            if before != given[name]:
                raise ConfigError(
                    f"{self.folder} was measured with {name} {before!r}, got {given[name]!r}: "
                    "resume without the option, or choose another --out"
                )
        content = self._content(path) or {"machines": [], "scope": given, "results": {}}
        results = content["results"]
        others = content.setdefault("others", {})
        missing = [key for key in cases if key not in results or others[key] > MOST_OTHER]
        for number, key in enumerate(missing, 1):
            print(f"{section}, {number} of {len(missing)}: {key}", flush=True)
            results[key], share = _measured(cases[key])
            others[key] = round(share, 3)
            if dict(machine) not in content["machines"]:
                content["machines"].append(dict(machine))
            write_atomically(path, json.dumps(content, indent=1) + "\n")

    def _path(self, section: str) -> Path:
        return self.folder / f"{section}.json"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def _content(self, path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise ConfigError(f"{path} is damaged, delete it: {error}") from error
