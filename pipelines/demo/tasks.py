"""Labelled tasks on the demo's recordings: what each one is, read from its name.

A name is ``<package>/<path inside the package>``. Every task gives a recording a label and a group:
whole groups go to training or to evaluation, so that what is asked about is new (a syllable, an
utterance) in every evaluation clip.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssast.pipelines.audio.convert import clip_stem, name_hash

EVAL_SHARE = 0.2
# The Bopomofo letters from U+3105 on, 21 initials and 16 finals, as Pinyin would write them
BOPOMOFO = re.findall(
    r"\w+",
    "b p m f d t n l g k h j q x zh ch sh r z c s  a o e eh ai ei ao ou an en ang eng er i u v",
)
INITIALS = frozenset(BOPOMOFO[:21])
LETTERS = {chr(0x3105 + i): name for i, name in enumerate(BOPOMOFO)}
SYLLABLE = re.compile(r"gcin-voice/.*/ogg/([^/]+?)([1-5]?)/[^/]+$")
# (package, pattern in the path, language, voice, utterance): \1 is a group of the pattern
SPEECH = (
    (r"gcin-voice", r"ogg/([^/]+)/(\d)\.ogg$", "zh", r"gcin-\2", r"\1"),
    (r"klettres-data", r"klettres/([^/]+)/(\w+)/([^/]+)\.\w+$", r"\1", r"klettres-\1", r"\2-\3"),
    (r"ktuberling-data", r"sounds/([\w@]+)/([^/]+)\.\w+$", r"\1", r"ktuberling-\1", r"\2"),
    (
        r"fillets-ng-data-\w+",
        r"/(\w+)/(cs|nl)/([^/]*-)?([mv])-([^/]+)$",
        r"\2",
        r"fish-\4-\2",
        r"\1-\3\5",
    ),
    (
        r"tuxpaint-stamps-default",
        r"/stamps/(.+)_desc_(bg|ca|da|el|es|fr|be|ro|ru|nl|lt)\.ogg$",
        r"\2",
        r"tuxpaint-\2",
        r"\1",
    ),
    (r"flight-of-the-amazon-queen", r"/(JOE\d+\w*)", "en", "queen-joe", r"\1"),
    (r"flight-of-the-amazon-queen", r"/([^/]+)$", "en", "", r"\1"),
)


@dataclass(frozen=True)
class Clip:
    """A clip of one of the recordings.

    Attributes:
        name: Name of the recording.
        part: Number of the clip within its recording, from 0.
        duration_s: Length in s.
        row: Place of the clip in the prepared folder.
    """

    name: str
    part: int
    duration_s: float
    row: int

    @property
    def key(self) -> str:
        """Key that decides which clips a task takes.

        Released weights were trained without the evaluation clips that it drew: never change it.
        """
        package = self.name.partition("/")[0]
        part = f"-{self.part:05d}" if self.part else ""
        return f"flac/{package}/{clip_stem(self.name)}{part}.flac"


def share_of(name: str) -> float:
    """Return a number in [0, 1) drawn by a name, the same on every machine."""
    return int(name_hash(name)[:13], 16) / 16**13


@dataclass(frozen=True)
class Label:
    """The label that a task gives a recording.

    Attributes:
        label: The class.
        group: Recordings of one group are never on both sides of the split.
    """

    label: str
    group: str


@dataclass(frozen=True)
class Task:
    """A labelled task.

    Attributes:
        name: File name of its manifests.
        what: One line for people.
        label: The label of a recording by its name, or None.
        min_clips: Classes with fewer clips are left out.
        max_clips: Clips of a class beyond this number are left out.
        min_s: Shorter clips are left out.
        first_part: Of a recording that was cut, only the first clip is taken.
        held: The groups to evaluate on; by default they are drawn by their names.
        even: Draw groups in each class until they have their share of its clips, for small classes.
            No group may have clips of two classes.
    """

    name: str
    what: str
    label: Callable[[str], Label | None]
    min_clips: int = 40
    max_clips: int = 100
    min_s: float = 0.0
    first_part: bool = False
    held: frozenset[str] | None = None
    even: bool = False

    def takes(self, clip: Clip) -> bool:
        """Return whether a clip can be in the task, whatever its label."""
        return clip.duration_s >= self.min_s and not (self.first_part and clip.part)

    def groups_to_hold(self, labels: Sequence[Label]) -> set[str]:
        """Choose the groups of a class to evaluate on.

        Args:
            labels: Labels of all clips of the class.
        """
        sizes = Counter(label.group for label in labels)
        if self.held is not None:
            return set(sizes) & self.held
        if not self.even:
            return {label.group for label in labels if is_held(label)}
        chosen: set[str] = set()
        room = EVAL_SHARE * len(labels)
        for group in sorted(sizes, key=share_of):
            if sizes[group] <= room:
                chosen.add(group)
                room -= sizes[group]
        return chosen


def syllable(name: str) -> tuple[str, str, str, str] | None:
    """Parse a Mandarin syllable: (initial or '', final or '', tone, syllable without tone)."""
    match = SYLLABLE.search(name)
    if match is None or not set(match[1]) <= set(LETTERS):
        return None
    parts = [LETTERS[letter] for letter in match[1]]
    initial = parts.pop(0) if parts[0] in INITIALS else ""
    return initial, "-".join(parts), match[2] or "1", "-".join([initial, *parts])


def initial_label(name: str) -> Label | None:
    """Return the initial consonant of a Mandarin syllable, grouped by syllable."""
    found = syllable(name)
    return found and Label(found[0] or "none", found[3])


def final_label(name: str) -> Label | None:
    """Return the final of a Mandarin syllable (its vowel part), grouped by syllable."""
    found = syllable(name)
    return Label(found[1], found[3]) if found and found[1] else None


def tone_label(name: str) -> Label | None:
    """Return the tone of a Mandarin syllable, grouped by syllable."""
    found = syllable(name)
    return found and Label(f"tone{found[2]}", found[3])


def speech(name: str) -> tuple[str, str, str] | None:
    """Parse the name of a recording of speech: (language, voice or '', utterance)."""
    package, _, path = name.partition("/")
    for package_pattern, pattern, *templates in SPEECH:
        match = re.search(pattern, "/" + path) if re.fullmatch(package_pattern, package) else None
        if match is not None:
            language, voice, utterance = (filled(template, match) for template in templates)
            return re.split("[@_]", language)[0], voice, utterance
    return None


def filled(template: str, match: re.Match[str]) -> str:
    """Fill in what the numbered groups matched; '' for a group that did not match."""
    return re.sub(r"\\(\d)", lambda digit: match[int(digit[1])] or "", template)


def voice_label(name: str) -> Label | None:
    """Return the voice (or, where unknown, the set of recordings), grouped by utterance."""
    found = speech(name)
    return Label(found[1], found[2]) if found and found[1] else None


def language_label(name: str) -> Label | None:
    """Return the language, grouped by utterance; without Mandarin, whose clips are too short."""
    found = speech(name)
    return Label(found[0], found[2]) if found and found[0] != "zh" else None


DEMO_TASKS = (
    Task("zh_initial", "initial consonant of an unseen Mandarin syllable", initial_label, 40, 1000),
    Task("zh_final", "final of an unseen Mandarin syllable", final_label, 40, 1000),
    Task("zh_tone", "tone of an unseen Mandarin syllable", tone_label, 40, 1000),
    Task("voice", "which voice speaks an unseen utterance", voice_label, 40, 80, 0.4),
    Task("language", "language of an unseen utterance", language_label, 60, 150, 0.4),
)


def divide(
    task: Task, clips: Sequence[Clip]
) -> tuple[list[tuple[Clip, str]], list[tuple[Clip, str]]]:
    """Label and split the clips of a task.

    Args:
        task: The task.
        clips: All clips, without duplicates.

    Returns:
        (training clips, evaluation clips) with labels. Every class is in both. Both are empty if
        fewer than two classes are left.
    """
    found: dict[str, list[tuple[Clip, Label]]] = defaultdict(list)
    for clip in clips:
        label = task.label(clip.name) if task.takes(clip) else None
        if label is not None:
            found[label.label].append((clip, label))
    train: list[tuple[Clip, str]] = []
    evaluation: list[tuple[Clip, str]] = []
    for name, members in sorted(found.items()):
        if len(members) < task.min_clips:
            continue
        members = sorted(members, key=lambda m: share_of(m[0].key))[: task.max_clips]
        groups = task.groups_to_hold([label for _, label in members])
        held = [(clip, name) for clip, label in members if label.group in groups]
        rest = [(clip, name) for clip, label in members if label.group not in groups]
        if held and rest:
            train += rest
            evaluation += held
    if len({label for _, label in train}) < 2:
        return [], []
    return sorted(train, key=by_key), sorted(evaluation, key=by_key)


def is_held(label: Label) -> bool:
    """Return whether a group is drawn by its name for evaluation."""
    return share_of(label.group) < EVAL_SHARE


def by_key(pair: tuple[Clip, str]) -> str:
    """Return the sorting key of a labelled clip."""
    return pair[0].key
