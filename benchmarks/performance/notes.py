"""How much ``ssast bench performance`` measures, and the files that keep what was measured.

A case is measured once: what is in the file of its section is not measured again, so that a run
that was killed goes on. Its key says what it is, for the page and for whoever reads the file.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssast.benchmarks.training.step import Setting
from ssast.engine.errors import ConfigError
from ssast.engine.settings import SIZES
from ssast.pipelines.files import write_atomically

OUT = Path("runs/performance")
Case = Callable[[], Any]  # gives what JSON can hold
_NOT_OF_A_CASE = ("sizes", "turns")  # they say how many cases there are


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        sizes: Of the model.
        turns: Processes of each variant of the step; by size if None.
        batch: Clips of a step.
        frames: Of a clip.
        threads: Of PyTorch and of the loaders.
        clips: That each loader reads.
        data: A folder like that of ``ssast data demo``.
    """

    sizes: tuple[str, ...] = ("tiny", "small", "base")
    turns: int | None = None
    batch: int = 8
    frames: int = 1024
    threads: int = 2
    clips: int = 64
    data: str = "data/demo"

    def setting(self, size: str = "tiny") -> Setting:
        """Of a step."""
        return Setting(size, self.batch, self.frames, self.threads, default_memory=False)

    def of_a_case(self) -> dict[str, Any]:
        """What a case depends on."""
        return {key: value for key, value in asdict(self).items() if key not in _NOT_OF_A_CASE}


class Notes:
    """The files with what was measured, one for each section.

    Args:
        folder: Of the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, section: str) -> dict[str, Any]:
        """Results of a section by key, as far as there are any.

        Raises:
            ConfigError: The file is damaged.
        """
        return self._content(self._path(section)).get("results", {})

    def machines(self) -> list[dict[str, Any]]:
        """Machines, versions and commits of the files, each once."""
        found = [machine for path in self._files() for machine in self._content(path)["machines"]]
        return [m for place, m in enumerate(found) if m not in found[:place]]

    def scope(self) -> Scope | None:
        """That of the files, with the sizes that have one; None without files."""
        files = self._files()
        if not files:
            return None
        sizes = tuple(size for size in SIZES if self._path(f"step-{size}") in files)
        return Scope(**self._content(files[0])["scope"], sizes=sizes)

    def measure(
        self, section: str, cases: Mapping[str, Case], scope: Scope, machine: Mapping[str, Any]
    ) -> None:
        """Measure the cases that the file lacks, and write each down at once.

        Raises:
            ConfigError: There are files of another scope.
        """
        path, ours = self._path(section), scope.of_a_case()
        for name, before in (self.scope() or scope).of_a_case().items():
            if before != ours[name]:
                raise ConfigError(
                    f"{self.folder} was measured with {name} {before!r}, got {ours[name]!r}: "
                    "go on without the option, or choose another --out"
                )
        content = self._content(path) or {"machines": [], "scope": ours, "results": {}}
        results = content["results"]
        missing = [key for key in cases if key not in results]
        for number, key in enumerate(missing, 1):
            print(f"{section}, {number} of {len(missing)}: {key}", flush=True)
            results[key] = cases[key]()
            if machine not in content["machines"]:
                content["machines"].append(machine)
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
