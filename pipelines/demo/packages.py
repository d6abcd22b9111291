"""Debian packages as a source of recordings: download and unpack them; nothing is installed.

``apt-get download`` checks the hash of what it downloads against the distribution's signed index,
and neither it nor ``dpkg-deb -x`` needs root.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from ssast.pipelines.errors import DataError, UnavailableError
from ssast.pipelines.locks import in_turn

OWN_AUDIO = "use your own audio instead: make demo DATA=/folder/of/audio"
APT_OPTIONS = (
    "-qq",
    "-oAPT::Sandbox::User=",  # as root, apt would not be able to write to a private folder
    "-oAcquire::Retries=2",
    "-oAcquire::http::Timeout=20",
    "-oAcquire::https::Timeout=20",
)


def check_tools() -> None:
    """Check that apt-get and dpkg-deb are installed.

    Raises:
        DataError: One of them is missing.
    """
    missing = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise DataError(
            f"{' and '.join(missing)} not found: the demo's recordings are Debian packages; "
            f"run it on Debian or Ubuntu, or {OWN_AUDIO}"
        )


def package_file(name: str, cache: Path) -> Path | None:
    """Return the downloaded file of a package, the newest if there are several."""
    files = sorted(cache.glob(f"{name}_*.deb"), key=lambda path: path.stat().st_mtime_ns)
    return files[-1] if files else None


def package_version(deb: Path) -> str:
    """Return the version in a file name such as ``klettres-data_4%3a22.12.3-1_all.deb``."""
    return deb.name.split("_")[1].replace("%3a", ":")


def download(name: str, cache: Path) -> Path:
    """Download a package, unless the cache has it.

    Args:
        name: Package.
        cache: Folder for packages; created.

    Returns:
        The ``.deb`` file in the cache.

    Raises:
        UnavailableError: The distribution has no such package.
        DataError: There is no network, or the download failed for another reason.
    """
    # Another run waits, and then finds the file.
    with in_turn(cache, "another run is downloading packages"):
        cached = package_file(name, cache)
        if cached is not None:
            return cached
        folder = cache / "downloading"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        try:
            deb = download_now(name, cache, folder)
            os.replace(deb, cache / deb.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return cache / deb.name


def download_now(name: str, cache: Path, folder: Path) -> Path:
    """Download a package into ``folder``; see :func:`download`."""
    said = apt("download", name, folder=folder)
    if said is not None:  # the machine's index is empty or old: fetch one of our own
        lists = private_index(cache)
        update_said = apt("update", *lists, folder=folder)
        if update_said is not None:
            raise DataError(
                f"{name} cannot be downloaded (no network?): {update_said}; {OWN_AUDIO}"
            )
        said = apt("download", *lists, name, folder=folder)
    if said is not None and re.search(r"unable to locate|no installation candidate", said, re.I):
        raise UnavailableError(f"{name}: this distribution has no such package")
    deb = package_file(name, folder)
    if said is not None or deb is None:
        raise DataError(f"{name} cannot be downloaded: {said or 'apt-get wrote no file'}")
    return deb


def apt(command: str, *arguments: str, folder: Path) -> str | None:
    """Run apt-get in a folder.

    Returns:
        None if it went well, or else its first error message.
    """
    run = subprocess.run(
        ["apt-get", command, *APT_OPTIONS, *arguments],
        cwd=folder,
        env=os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    errors = re.findall(r"^(?:E|Err[^ ]*|W): *(.+)$", run.stderr, re.M)
    # An update that reached no server exits with 0 and says so in warnings only.
    failed = run.returncode != 0 or (command == "update" and "Failed to fetch" in run.stderr)
    if not failed:
        return None
    return errors[0] if errors else f"apt-get {command} exited with status {run.returncode}"


def private_index(cache: Path) -> tuple[str, ...]:
    """Return options that keep apt's index below the cache, so that no root is needed."""
    folder = (cache / "apt").absolute()
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return (
        f"-oDir::State={folder / 'state'}",
        f"-oDir::Cache={folder / 'cache'}",
        "-oDir::State::status=/var/lib/dpkg/status",
    )


def unpack(deb: Path, folder: Path) -> None:
    """Unpack a package into a folder, which is emptied first.

    Raises:
        DataError: The file is damaged, or the folder cannot be written to.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = subprocess.run(
        ["dpkg-deb", "-x", str(deb), str(folder)],
        env=os.environ | {"LC_ALL": "C"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"{deb}: cannot be unpacked: {lines[0]}")


def is_intact(deb: Path) -> bool:
    """Return whether a package can be read to its end."""
    return subprocess.run(["dpkg-deb", "--contents", str(deb)], capture_output=True).returncode == 0


def copyright_file(name: str, folder: Path) -> Path:
    """Return the copyright file of an unpacked package; every Debian package has one."""
    return folder / "usr/share/doc" / name / "copyright"


def licences(text: str) -> list[str]:
    """Return the licences in a Debian copyright file, without those of the packaging.

    Args:
        text: The file; in the machine-readable form, or in prose that refers to
            ``/usr/share/common-licenses``.
    """
    names: dict[str, None] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        is_packaging = re.search(r"^Files:\s*debian/", paragraph, re.M)
        is_files = re.search(r"^Files:", paragraph, re.M)
        licence = re.search(r"^License:[ \t]*(\S.*)$", paragraph, re.M)
        if licence and is_files and not is_packaging:
            names[licence[1].strip()] = None
    if not names:
        names = dict.fromkeys(re.findall(r"common-licenses/([A-Za-z0-9.+-]*[A-Za-z0-9+])", text))
    return list(names) or ["see its copyright file"]
