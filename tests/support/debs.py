"""Debian packages of our own making, and an apt-get that knows them."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from ssast.pipelines.clips.manifest import read_manifest
from ssast.pipelines.demo.corpora import fetch_demo

# What apt-get does and says, in the ways it goes well and wrong
FAKE_APT = """#!/bin/sh
fail() {{ echo "$1" >&2; exit "$2"; }}
echo "$@" >> {repo}/calls
for last; do :; done
case "$*" in update*)
  [ -e {repo}/offline ] && fail "W: Failed to fetch http://deb/x  Could not resolve 'deb'" 0
  touch {repo}/updated
  exit 0;;
esac
if [ -e {repo}/needs-update ] && ! [ -e {repo}/updated ]; then
  fail "E: Unable to locate package $last" 100
fi
[ -e {repo}/offline ] && fail "E: Failed to fetch http://deb/$last.deb  Could not resolve 'deb'" 100
cp {repo}/"$last"_*.deb . 2>/dev/null || fail "E: Unable to locate package $last" 100
"""
DEP5 = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2001 Someone
License: GPL-2+

Files: sounds/*
Copyright: 2002 Someone
License: CC-BY-3

Files: debian/*
Copyright: 2003 A packager
License: GPL-3

License: GPL-3
 On Debian systems, see /usr/share/common-licenses/GPL-3
"""


def sound(seed: int, seconds: float = 1.0, rate_hz: int = 22050) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.4, 0.4, int(seconds * rate_hz))


def save(path: Path, seed: int, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(seed, seconds), 22050)


def build(repo: Path, name: str, fill: Callable[[Path], None]) -> None:
    root = repo / f"root-{name}"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 4:1.2-3\nArchitecture: all\n"
        "Maintainer: T <t@t.org>\nDescription: test\n"
    )
    (root / f"usr/share/doc/{name}").mkdir(parents=True)
    (root / f"usr/share/doc/{name}/copyright").write_text(DEP5)
    fill(root / "usr/share")
    deb = repo / f"{name}_4%3a1.2-3_all.deb"
    subprocess.run(
        ["dpkg-deb", "-Zgzip", "-b", str(root), str(deb)], check=True, capture_output=True
    )


def fill_klettres(share: Path) -> None:
    for n in range(60):
        for code in ("de", "fr"):
            save(share / f"klettres/{code}/alpha/{n}.ogg", n + 1000 * (code == "fr"), 0.5)
    save(share / "klettres/it/alpha/same-as-de.ogg", 0, 0.5)
    (share / "klettres/it/alpha/broken.ogg").write_bytes(b"OggS")
    (share / "klettres/it/alpha/link.ogg").symlink_to("same-as-de.ogg")


def fill_fillets(share: Path) -> None:
    for n in range(5):
        save(share / f"games/fillets-ng/sound/city/nl/a-m-{n}.ogg", 5000 + n)
    save(share / "games/fillets-ng/sound/elk/nl/robot.ogg", 6000)


PACKAGES = ("klettres-data", "fillets-ng-data-nl")


def demo(tmp_path: Path, out: str = "out", names: tuple[str, ...] = PACKAGES) -> list[str]:
    """Make a demo of packages; what it logs."""
    said: list[str] = []
    fetch_demo(tmp_path / out, tmp_path / "cache", progress=False, packages=names, log=said.append)
    return said


def calls(repo: Path) -> int:
    """How often apt-get was called."""
    return len((repo / "calls").read_text().splitlines())


def manifests(out: Path) -> dict[str, set[str]]:
    """The names of the clips in each manifest of a demo."""
    files = [out / "train.json", *sorted((out / "tasks").glob("*.json"))]
    return {file.name: set(read_manifest(file).paths.names()) for file in files}  # type: ignore[union-attr]
