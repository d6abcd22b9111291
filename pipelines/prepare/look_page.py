"""The page about a data set: one HTML file that needs nothing else, and configurations."""

import base64
import html
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssast.pipelines.files import write_atomically
from ssast.pipelines.prepare.look import (
    COPIES_AMONG,
    HIGHEST_FRAMES,
    LONGEST_S,
    SILENT_DB,
    Look,
    suggested_share,
    suggestions,
)
from ssast.pipelines.prepare.look_figures import (
    draw_classes,
    draw_lengths,
    draw_levels,
    draw_spectrograms,
)
from ssast.pipelines.text import printable

TITLE = "A look at"
SHOWN = 20  # rows of a list
QUIET_DB = -50.0  # a clip below is named as quiet
MUCH_SILENCE = 0.9
MUCH_CLIPPED = 0.001  # of the samples
STYLE = """
:root { color-scheme: light; --ink: #1d2129; --soft: #5b6270; --line: #e3e6eb; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 62rem;
  margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1px;
  margin: 1.4rem 0; }
dl div { outline: 1px solid var(--line); padding: .7rem .9rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-size: 1.1rem; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; }
td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; }
pre { background: #f6f7f9; border: 1px solid var(--line); padding: .8rem 1rem; overflow-x: auto; }
"""

Rows = Iterable[Sequence[object]]
Recipe = Mapping[str, Mapping[str, Any]]


def write_look(look: Look, out: Path, recipe: Recipe) -> list[Path]:
    """Write the page, its figures and the configurations to a folder.

    Args:
        look: What was found.
        out: The folder.
        recipe: Settings of fine-tuning by section, beside those that the data suggest.

    Returns:
        The page, then the other files.

    Raises:
        OSError: A file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "lengths": draw_lengths(look, out / "lengths.png"),
        "levels": draw_levels(look, out / "levels.png"),
        "spectrograms": draw_spectrograms(look, out / "spectrograms.png"),
    }
    if look.counts:
        figures["classes"] = draw_classes(look.counts, out / "classes.png")
    else:
        (out / "classes.png").unlink(missing_ok=True)  # of an earlier look
    configs = configurations(look, recipe)
    if "finetune.yaml" not in configs:
        (out / "finetune.yaml").unlink(missing_ok=True)
    for name, text in configs.items():
        write_atomically(out / name, text)
    write_atomically(out / "index.html", page(look, figures, out, configs))
    return [out / "index.html", *figures.values(), *(out / name for name in configs)]


def is_look(out: Path) -> bool:
    """Return whether a folder holds an earlier look, which a new one may replace."""
    try:
        return f"<title>{TITLE} " in (out / "index.html").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def configurations(look: Look, recipe: Recipe) -> dict[str, str]:
    """Return the configurations that are suggested, by file name; see :func:`write_look`."""
    found = suggestions(look)
    finetune = found.pop("finetune", None)
    sets = {"pretrain.yaml": found}
    if finetune is not None:
        suggested = {**found, "finetune": finetune}
        names = [*suggested, *(name for name in recipe if name not in suggested)]
        sets["finetune.yaml"] = {n: {**recipe.get(n, {}), **suggested.get(n, {})} for n in names}
    return {
        name: yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        for name, settings in sets.items()
    }


def page(look: Look, figures: dict[str, Path], out: Path, configs: dict[str, str]) -> str:
    """Return the page as HTML; all text of the data set is escaped."""
    seconds = np.array([clip.seconds for clip in look.heard])
    is_all = look.num_drawn == look.num_clips
    drawn = f"all {look.num_clips:,} clips"
    if not is_all:
        drawn = f"a random draw of {look.num_drawn:,} of {look.num_clips:,} clips"
    facts = [
        ("clips", f"{look.num_clips:,}"),
        ("hours", f"{'' if is_all else 'about '}{look.hours():,.2f}"),
        ("median length", f"{np.median(seconds):.2f} s"),
        ("sample rates", _counted((c.rate_hz for c in look.heard), "Hz")),
        ("channels", _counted(c.channels or "unknown" for c in look.heard)),
        ("unusable", f"{len(look.bad):,} of {look.num_drawn:,}"),
    ]
    if look.counts is not None:
        facts.insert(3, ("classes", f"{len(look.counts):,}"))
    parts = [
        f"<h1>{_text(look.source)}</h1>",
        f"<p class=soft>What was listened to: {drawn}"
        + (f", of each at most {LONGEST_S:g} s" if seconds.max() > LONGEST_S else "")
        + ".</p>",
        "<dl>" + "".join(f"<div><dt>{k}</dt><dd>{_text(v)}</dd></div>" for k, v in facts) + "</dl>",
        *_settings(look, out, configs),
        "<h2>Lengths</h2>",
        f"<p>{_lengths(look, seconds)}</p>",
        _image(figures["lengths"], "Histogram of the lengths"),
        *_wrong_lengths(look),
    ]
    if look.counts:
        parts += _classes(look, look.counts, figures)
    parts += [
        *_levels(look, figures),
        *_copies(look),
        *_bad(look),
        "<h2>Some of the clips</h2>",
        "<p>Log-mel spectrograms, as the model sees them; time in s, on one scale of brightness."
        f" {'Above each its labels' if look.counts else 'Above each its name'}.</p>",
        _image(figures["spectrograms"], "Spectrograms of random clips"),
    ]
    title = _text(f"{TITLE} {look.source}")
    return (
        "<!doctype html>\n<html lang=en>\n<head><meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _settings(look: Look, out: Path, configs: dict[str, str]) -> list[str]:
    stats, share = look.stats, suggested_share(look.num_clips)
    held = f"{share * look.num_clips:,.0f}"
    frames = (
        f"{stats.num_frames} frames ({stats.num_frames / 100:g} s) hold 95 % of the clips whole"
    )
    if stats.num_frames == HIGHEST_FRAMES:
        frames = f"{stats.num_frames} frames, 10.24 s, are what the published models hear"
    measured = f"{stats.num_clips:,} of {stats.num_total:,} clips"
    if stats.mean_error:
        measured += (
            f", 95 % intervals &plusmn;{stats.mean_error:.3f} and &plusmn;{stats.std_error:.3f}"
        )
    found = [
        "<h2>Settings that fit</h2>",
        f"<p>{frames}. Mean and standard deviation of the log-mel are of {measured}. About {held} "
        "clips are held out for validation.</p>",
    ]
    commands = {
        "pretrain.yaml": ("ssast plan {0}", "ssast pretrain {0}"),
        "finetune.yaml": ("ssast finetune {0} --checkpoint runs/pretrain",),
    }
    for name, text in configs.items():
        lines = [_text(line.format(shlex.quote(str(out / name)))) for line in commands[name]]
        found += [f"<p><code>{line}</code></p>" for line in lines]
        found.append(f"<pre>{_text(text)}</pre>")
    return found


def _lengths(look: Look, seconds: np.ndarray) -> str:
    low, middle, high = np.quantile(seconds, [0.05, 0.5, 0.95])
    longer = float((seconds > look.stats.num_frames / 100).mean())
    return (
        f"From {seconds.min():.2f} s to {seconds.max():.2f} s; 5 % are below {low:.2f} s, half "
        f"below {middle:.2f} s, 95 % below {high:.2f} s. {_share(longer)} are longer than "
        "num_frames: of these training hears the beginning, unless data.random_crop is true."
    )


def _wrong_lengths(look: Look) -> list[str]:
    noted = [(c.clip, c.note) for c in look.heard if c.note is not None]
    if not noted:
        return []
    rows = [(clip, f"{n['stated_s']:g} s", f"{n['found_s']:g} s") for clip, n in noted]
    text = f"Headers that state another length than there is: {len(noted)}. All samples are read."
    return [f"<p>{text}</p>", _table(("file", "header", "sound"), rows)]


def _classes(look: Look, counts: Counter[str], figures: dict[str, Path]) -> list[str]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    (most, top), (least, bottom) = ordered[0], ordered[-1]
    text = (
        f"{len(counts):,} classes, of all clips: &ldquo;{_text(most)}&rdquo; has {top:,}, "
        f"&ldquo;{_text(least)}&rdquo; has {bottom:,} ({top / bottom:.1f} to 1)."
    )
    if look.several:
        text += " Some clips have several labels."
    if look.unlabelled:
        text += f" {look.unlabelled:,} clips have none."
    rare = [(name, count) for name, count in ordered if count < 10]
    found = [
        "<h2>Classes</h2>",
        f"<p>{text}</p>",
        _image(figures["classes"], "Clips of each class"),
    ]
    if rare:
        found += [
            f"<p>With fewer than 10 clips, too few to measure anything: {len(rare):,}.</p>",
            _table(("class", "clips"), rare[::-1]),
        ]
    return found


def _levels(look: Look, figures: dict[str, Path]) -> list[str]:
    heard = look.heard
    odd = [
        (f"quieter than {QUIET_DB:g} dB", [c for c in heard if -math.inf < c.level_db < QUIET_DB]),
        ("digital silence", [c for c in heard if c.level_db == -math.inf]),
        (f"{_share(MUCH_SILENCE)} or more silence", [c for c in heard if c.silent >= MUCH_SILENCE]),
        (
            f"{_share(MUCH_CLIPPED)} or more clipped",
            [c for c in heard if c.clipped >= MUCH_CLIPPED],
        ),
        ("peaks above full scale", [c for c in heard if c.peak > 1]),
    ]
    rows = [(what, f"{len(c):,}", c[0].clip) for what, c in odd if c]
    levels = [clip.level_db for clip in heard]
    found = [
        "<h2>Loudness, silence and clipping</h2>",
        f"<p>Half of the clips are quieter than {np.median(levels):.1f} dB of full scale. Silence "
        f"is what lies below {SILENT_DB:g} dB, measured in blocks of 20 ms.</p>",
        _image(figures["levels"], "Histograms of level and silence"),
    ]
    if rows:
        found.append(_table(("what", "clips", "the first"), rows))
    return found


def _copies(look: Look) -> list[str]:
    found = ["<h2>Copies</h2>"]
    if look.copies is None:
        return [*found, f"<p>Not looked for: more than {COPIES_AMONG:,} clips.</p>"]
    if not look.copies:
        return [*found, "<p>No two clips hold the same, of all.</p>"]
    extra = sum(len(group) - 1 for group in look.copies)
    are = "is an exact copy of another" if extra == 1 else "are exact copies of others"
    text = (
        f"{extra:,} of all clips {are}. A copy of a training clip among the held-out ones makes "
        "the validation too good."
    )
    rows = [(len(group), group[0], group[1]) for group in look.copies]
    return [*found, f"<p>{text}</p>", _table(("clips", "one", "another"), rows)]


def _bad(look: Look) -> list[str]:
    if not look.bad:
        return []
    text = (
        f"{len(look.bad):,} of {look.num_drawn:,} cannot be used: training passes over such clips."
    )
    return ["<h2>Unusable</h2>", f"<p>{text}</p>", _table(("clip", "why"), look.bad)]


def _table(names: Sequence[str], rows: Rows) -> str:
    rows = list(rows)
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows[:SHOWN]
    )
    more = f"<p class=soft>... and {len(rows) - SHOWN:,} more</p>" if len(rows) > SHOWN else ""
    return f"<table><tr>{head}</tr>\n{body}</table>{more}"


def _counted(values: Iterable[object], unit: str = "") -> str:
    counts = Counter(values)
    total = sum(counts.values())
    if len(counts) == 1:
        return f"{next(iter(counts))} {unit}".strip()
    named = [f"{value} ({100 * count / total:.0f} %)" for value, count in counts.most_common(3)]
    more = f" and {len(counts) - 3} more" if len(counts) > 3 else ""
    return f"{', '.join(named)}{more} {unit}".strip()


def _share(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(text)}" src="data:image/png;base64,{data}">'


def _text(value: object) -> str:
    return html.escape(printable(value)) if "\n" not in str(value) else html.escape(str(value))
