"""The rooms of the project and the arrows between them; run as a program, it prints them.

A room is a folder below ``engine``, ``pipelines`` or ``benchmarks``, or a file beside such folders.
An arrow goes from the room that imports to the room that is imported, and may only go to a room
on a lower floor.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from paths import ROOT

FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {  # lowest first
    "kernels": (("kernels",),),
    "pipelines": (
        ("errors",),
        ("files", "cores"),
        ("text",),
        ("locks", "figures"),
        ("clips",),
        ("audio",),
        ("datasets",),
        ("stream",),
        ("prepare",),
        ("demo",),
    ),
    "engine": (
        ("errors",),
        ("settings",),
        ("finetune_settings", "objective_settings"),
        ("registry",),
        ("config",),
        ("parallel", "data"),
        ("model",),
        ("checkpoints", "monitoring"),
        ("formats",),
        ("evaluation",),
        ("train",),
        ("pretrain", "finetune"),
        ("folds",),
        ("planning",),
        ("cli",),
        ("api",),
    ),
    "benchmarks": (
        ("device",),
        ("training", "loading", "study", "fuzzing"),
        ("operations", "faults", "fuzz"),
        ("performance", "gpu"),
    ),
}


@dataclass(frozen=True)
class Arrow:
    """An import: a file of a room uses a module of another room."""

    file: Path
    line: int
    module: str
    source: tuple[str, str]
    target: tuple[str, str]

    @property
    def runs_up(self) -> bool:
        """Whether the target is not on a lower floor."""
        return floor(self.target) >= floor(self.source)


def floor(room: tuple[str, str]) -> tuple[int, int]:
    """The number of a room's folder and of its floor there, both from the bottom."""
    folder, name = room
    numbers = [n for n, names in enumerate(FLOORS[folder]) if name in names]
    if not numbers:
        raise LookupError(f"{folder}/{name} has no floor in FLOORS")
    return list(FLOORS).index(folder), numbers[0]


def files(folder: str) -> list[Path]:
    """The Python files of a folder at the top of the repository."""
    return sorted((ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> tuple[str, str]:
    """The room of a file (or module written as a path), relative to the repository."""
    folder, *rest = path.with_suffix("").parts
    return folder, "kernels" if folder == "kernels" else rest[0]


@cache
def imports(path: Path) -> tuple[tuple[int, str], ...]:
    """(line, full module name) of each import of a file, inside functions as well."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: line {node.lineno} imports relatively")
            module = node.module or ""
            below = [ROOT / "/".join(f"{module}.{n.name}".split(".")[1:]) for n in node.names]
            modules = [
                f"{module}.{name.name}" if file.with_suffix(".py").is_file() else module
                for name, file in zip(node.names, below, strict=True)
            ]
            found += [(node.lineno, name) for name in dict.fromkeys(modules)]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
    return tuple(found)


def ours(path: Path) -> Iterator[tuple[int, str]]:
    """The imports of a file that are modules of this project."""
    return (pair for pair in imports(path) if pair[1].startswith("ssast."))


def arrows() -> Iterator[Arrow]:
    """Every import that leaves its room."""
    for folder in FLOORS:
        for path in files(folder):
            source = room_of(path.relative_to(ROOT))
            for line, module in ours(path):
                target = room_of(Path(*module.split(".")[1:]))
                if target != source:
                    yield Arrow(path.relative_to(ROOT), line, module, source, target)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of a directed graph, one for each node that closes one."""
    found, done = [], set[str]()

    def visit(node: str, way: list[str]) -> None:
        if node in way:
            found.append([*way[way.index(node) :], node])
        elif node not in done:
            for target in sorted(graph.get(node, ())):
                visit(target, [*way, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])
    return found


def module_circles() -> list[list[str]]:
    """Circles of imports between modules."""
    graph = {}
    for folder in FLOORS:
        for path in files(folder):
            name = ".".join(("ssast", *path.relative_to(ROOT).with_suffix("").parts))
            graph[name] = {module for _, module in ours(path)}
    return circles(graph)


def room_circles() -> list[list[str]]:
    """Circles of arrows between rooms."""
    graph: dict[str, set[str]] = {}
    for arrow in arrows():
        graph.setdefault("/".join(arrow.source), set()).add("/".join(arrow.target))
    return circles(graph)


def _table(found: Iterable[Arrow]) -> Iterator[str]:
    counts = Counter((arrow.source, arrow.target) for arrow in found)
    for folder, floors in FLOORS.items():
        paths = files(folder)
        yield f"{folder}: {len(paths)} files, {sum(_lines(p) for p in paths)} lines"
        for number, names in reversed(list(enumerate(floors))):
            for name in names:
                room = (folder, name)
                inside = [p for p in paths if room_of(p.relative_to(ROOT)) == room]
                used = [
                    f"{t[1] if t[0] == folder else '/'.join(t)} {count}"
                    for (s, t), count in sorted(counts.items())
                    if s == room
                ]
                yield (
                    f"  {number:2} {name:12} {len(inside):2} files {sum(map(_lines, inside)):5} "
                    f"lines  -> {', '.join(used) or 'nothing'}"
                )
        yield ""


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def main() -> int:
    """Print rooms, floors and arrows; returns 1 if an arrow runs up or closes a circle."""
    found = list(arrows())
    print("\n".join(_table(found)))
    up = [arrow for arrow in found if arrow.runs_up]
    for arrow in up:
        print(f"runs up: {arrow.file}:{arrow.line} imports {arrow.module}")
    loops = module_circles() + room_circles()
    for loop in loops:
        print("circle: " + " -> ".join(loop))
    pairs = {(arrow.source, arrow.target) for arrow in found}
    print(
        f"{len(pairs)} arrows between rooms ({len(found)} imports), "
        f"{len(up)} imports that run up, {len(loops)} circles"
    )
    return 1 if up or loops else 0


if __name__ == "__main__":
    raise SystemExit(main())
