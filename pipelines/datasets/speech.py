"""LibriSpeech, Speech Commands, VoxCeleb1 and IEMOCAP in the layouts of their publishers."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import soundfile

from ssast.pipelines.clips.folders import audio_files
from ssast.pipelines.datasets.tables import (
    Cut,
    Dataset,
    Listed,
    existing,
    lines,
    listing,
    once,
    root_with,
)
from ssast.pipelines.errors import DataError

LIBRISPEECH_960 = ("train-clean-100", "train-clean-360", "train-other-500")
LIBRISPEECH_HELD = ("dev-clean", "dev-other", "test-clean", "test-other")

# In the order of the published class table, so that published heads fit
WORDS_V2 = tuple(
    re.findall(
        r"\w+",
        "backward follow five bed zero on learn two house tree dog stop seven eight down six "
        "forward cat right visual four wow no nine off three left marvin yes up sheila happy bird "
        "go one",
    )
)
NEW_IN_V2 = ("backward", "follow", "forward", "learn", "visual")
WORDS_V1 = tuple(word for word in WORDS_V2 if word not in NEW_IN_V2)
COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = "_unknown_", "_silence_"
NOISE = "_background_noise_"
TEST_ARCHIVE = "speech_commands_test_set_v0.01"
SILENCE_PARTS = {"train": (0, 8), "valid": (8, 9), "eval": (9, 10)}  # tenths of a recording
SILENCE_S = 1
SILENCE_CUTS_PER_S = 4

VOXCELEB1_SPLITS = {"1": "train", "2": "valid", "3": "eval"}
VOXCELEB1_SPEAKERS = tuple(f"id{number}" for number in range(10001, 11252))
VOXCELEB1_LINE = re.compile(r"([123])\s+((id\d{5})/[^/\s]+/[^/\s]+\.wav)")

SESSIONS = range(1, 6)
EMOTIONS = {"neu": "neutral", "hap": "happy", "ang": "angry", "sad": "sad"}
SAME_EMOTION = {"exc": "hap"}
IEMOCAP_TURN = re.compile(r"\[[\d.]+ - [\d.]+\]\s+(\w+)\s+([a-z]{3})\s+\[.*\]")


def read_librispeech(source: Path) -> Dataset:
    """Read LibriSpeech, unlabelled: ``train-960``, its three parts, dev and test where present.

    The clips of a part are all FLAC files below its folder.

    Args:
        source: The user's copy: ``LibriSpeech`` or the folder around it.

    Raises:
        DataError: One of the three training parts is missing, or a part has no audio.
    """
    root = root_with(source, LIBRISPEECH_960[0], "LibriSpeech")
    splits: dict[str, list[Listed]] = {"train-960": []}
    notes = []
    for part in LIBRISPEECH_960:
        if not (root / part).is_dir():
            raise DataError(f"{root}: expected {', '.join(LIBRISPEECH_960)}, found no {part}")
        splits[part] = _flac_files(root / part)
        splits["train-960"] += splits[part]
    for part in LIBRISPEECH_HELD:
        if (root / part).is_dir():
            splits[part] = _flac_files(root / part)
        else:
            notes.append(f"{part}: left out, there is no such folder")
    return Dataset(splits, notes=notes)


def _flac_files(folder: Path) -> list[Listed]:
    paths = [path for path in audio_files(folder) if path.endswith(".flac")]
    if not paths:
        raise DataError(f"{folder}: expected .flac files, found none")
    return [Listed(path, path) for path in paths]


def read_speechcommands_v2(source: Path) -> Dataset:
    """Read Speech Commands version 2, 35 words: ``train``, ``valid`` and ``eval``.

    ``valid`` and ``eval`` are the publishers' ``validation_list.txt`` and ``testing_list.txt``,
    ``train`` is the rest. Labels are those of the published manifests, ``/m/spcmd00`` and so on.

    Args:
        source: The user's copy: ``speech_commands_v0.02`` or the folder around it.

    Raises:
        DataError: A list is missing or malformed, or the words are not those of version 2.
    """
    root = root_with(source, "validation_list.txt", "speech_commands_v0.02")
    labels = {word: f"/m/spcmd{index:02d}" for index, word in enumerate(WORDS_V2)}
    splits = _spoken_words(root, WORDS_V2, labels)
    return Dataset(splits, [(label, word) for word, label in labels.items()])


def read_speechcommands_v1(source: Path) -> Dataset:
    """Read Speech Commands version 1, 12 classes: ten commands, ``_unknown_``, ``_silence_``.

    This is the keyword task of S3PRL and SUPERB, with these splits:

    - ``valid`` and ``eval`` are the publishers' ``validation_list.txt`` and ``testing_list.txt``,
      ``train`` is the rest. All clips of the other twenty words are ``_unknown_``.
    - ``_silence_`` is cut from the recordings in ``_background_noise_``: of each recording the
      first 80 % are for ``train``, the next 10 % for ``valid``, the last 10 % for ``eval``; clips
      of 1 s begin every 0.25 s, and none crosses a border, so no sample is in two splits. They are
      copied sample for sample. S3PRL draws a new second of the whole recording each time instead,
      from the same recordings in training and validation.
    - ``eval_superb`` is the publishers' separate test archive, on which SUPERB reports: all clips
      below ``speech_commands_test_set_v0.01``, where that lies next to the data set. It holds
      silence of its own, which may be of the same seconds as that of ``train``.

    ``train`` has sampling weights that make the classes equally frequent, as S3PRL's sampler does:
    clips / clips of this class. S3PRL lowers all audio by 3 dB; nothing is changed here.

    Args:
        source: The user's copy: ``speech_commands_v0.01`` or the folder around it.

    Raises:
        DataError: A list is missing or malformed, the words are not those of version 1, or the
            background noise is missing, cannot be read or is too short.
    """
    root = root_with(source, "validation_list.txt", "speech_commands_v0.01")
    labels = {word: word if word in COMMANDS else UNKNOWN for word in WORDS_V1}
    splits = _spoken_words(root, WORDS_V1, labels)
    made: dict[str, Cut] = {}
    for split, cuts in _silence(root / NOISE).items():
        made |= cuts
        splits[split] += (Listed(path, path, (SILENCE,)) for path in cuts)
    classes = (*COMMANDS, UNKNOWN, SILENCE)
    archive = root.parent / TEST_ARCHIVE
    notes = []
    if archive.is_dir():
        splits["eval_superb"] = [
            Listed(f"{label}/{name}", str(archive / label / name), (label,))
            for label in classes
            for name in listing(archive / label, ".wav")
        ]
    else:
        notes.append(f"eval_superb: left out, there is no {archive}")
    named = [(label, label) for label in classes]
    return Dataset(splits, named, {"train": equal_class_weights}, made, notes)


def equal_class_weights(labels: Sequence[Sequence[str]]) -> list[float]:
    """Return weights that sample classes equally: clips / clips of the clip's class.

    Args:
        labels: The one label of each clip.
    """
    counts = Counter(label for (label,) in labels)
    return [len(labels) / counts[label] for (label,) in labels]


def _spoken_words(
    root: Path, words: Sequence[str], labels: Mapping[str, str]
) -> dict[str, list[Listed]]:
    """Return the clips of single words, in the publishers' splits."""
    folders = {p.name for p in root.iterdir() if p.is_dir() and p.name[0] not in "._"}
    for word in sorted(folders ^ set(words)):
        found = f"found also {word!r}" if word in folders else f"found no {word!r}"
        raise DataError(f"{root}: expected folders of {len(words)} words, {found}")
    splits: dict[str, list[Listed]] = {"train": []}
    seen: dict[str, str] = {}
    for split, file in (("valid", "validation_list.txt"), ("eval", "testing_list.txt")):
        splits[split] = []
        for place, name in lines(root / file):
            word, slash, _ = name.partition("/")
            if word not in labels or not slash:
                raise DataError(f"{place}: expected <word>/<clip>.wav, found {name!r:.80}")
            once(seen, name, place)
            splits[split].append(Listed(name, existing(root / name), (labels[word],)))
    for word in sorted(words):
        for file in listing(root / word, ".wav"):
            if (name := f"{word}/{file}") not in seen:
                splits["train"].append(Listed(name, str(root / name), (labels[word],)))
    return splits


def _silence(folder: Path) -> dict[str, dict[str, Cut]]:
    """Return clips of silence for each split, by path in the output folder."""
    cuts: dict[str, dict[str, Cut]] = {split: {} for split in SILENCE_PARTS}
    for file in listing(folder, ".wav"):
        try:
            samples, rate_hz = soundfile.read(folder / file, dtype="int16")
        except soundfile.LibsndfileError as error:
            raise DataError(f"{folder / file}: cannot be decoded: {error.error_string}") from error
        size = SILENCE_S * rate_hz
        for split, (begin, end) in SILENCE_PARTS.items():
            last = len(samples) * end // 10 - size
            starts = range(len(samples) * begin // 10, last + 1, rate_hz // SILENCE_CUTS_PER_S)
            for number, start in enumerate(starts):
                path = f"silence/{split}/{Path(file).stem}_{number:04d}.wav"
                cuts[split][path] = Cut(samples[start : start + size], rate_hz)
    for split, paths in cuts.items():
        if not paths:
            raise DataError(
                f"{folder}: expected recordings of at least 10 s to cut silence from, "
                f"found none for {split}"
            )
    return cuts


def read_voxceleb1(source: Path) -> Dataset:
    """Read VoxCeleb1 identification, 1251 speakers: ``train``, ``valid`` and ``eval``.

    The splits are those of the publishers' ``iden_split.txt`` (1, 2 and 3). The label of a clip is
    its speaker, ``id10001`` to ``id11251``. Clips are looked for in ``dev/wav``, ``test/wav``,
    ``wav`` and the folder itself.

    Args:
        source: The user's copy, with ``iden_split.txt``.

    Raises:
        DataError: The list is missing or malformed.
    """
    root = root_with(source, "iden_split.txt", "VoxCeleb1", "voxceleb1")
    splits: dict[str, list[Listed]] = {split: [] for split in VOXCELEB1_SPLITS.values()}
    speakers = frozenset(VOXCELEB1_SPEAKERS)
    seen: dict[str, str] = {}
    for place, line in lines(root / "iden_split.txt"):
        match = VOXCELEB1_LINE.fullmatch(line)
        if match is None or match[3] not in speakers:
            wanted = "1, 2 or 3 and <id10001 to id11251>/<video>/<clip>.wav"
            raise DataError(f"{place}: expected {wanted}, found {line!r:.80}")
        number, name, speaker = match.groups()
        once(seen, name, place)
        folders = (root / "dev" / "wav", root / "test" / "wav", root / "wav", root)
        path = existing(*(folder / name for folder in folders))
        splits[VOXCELEB1_SPLITS[number]].append(Listed(name, path, (speaker,)))
    return Dataset(splits, [(speaker, speaker) for speaker in VOXCELEB1_SPEAKERS])


def read_iemocap(source: Path) -> Dataset:
    """Read IEMOCAP, 4 classes: ``train_1`` to ``train_5`` and ``eval_1`` to ``eval_5``.

    ``eval_k`` is session k, ``train_k`` are the other four, so no speaker is on both sides. Of the
    turns in ``Session*/dialog/EmoEvaluation`` those whose agreed emotion is neutral, happy, excited
    (counted as happy), sad or angry are taken; of the whole corpus that is 5531. The order of the
    classes is S3PRL's.

    Args:
        source: The user's copy: ``IEMOCAP_full_release`` or the folder around it.

    Raises:
        DataError: A session is missing, or an evaluation is malformed.
    """
    root = root_with(source, "Session1", "IEMOCAP_full_release", "IEMOCAP")
    sessions = {number: list(_emotional_turns(root / f"Session{number}")) for number in SESSIONS}
    splits = {}
    for held in SESSIONS:
        others = (sessions[number] for number in SESSIONS if number != held)
        splits[f"train_{held}"] = [clip for clips in others for clip in clips]
        splits[f"eval_{held}"] = sessions[held]
    return Dataset(splits, list(EMOTIONS.items()))


def _emotional_turns(session: Path) -> Iterator[Listed]:
    """Return the turns of a session that have one of the four emotions."""
    folder = session / "dialog" / "EmoEvaluation"
    seen: dict[str, str] = {}
    for file in listing(folder, ".txt"):
        # Free comments of the annotators: not always UTF-8, and never needed.
        for place, line in lines(folder / file, encoding="latin-1"):
            if not line.startswith("["):
                continue
            match = IEMOCAP_TURN.fullmatch(line)
            if match is None:
                wanted = "[<start> - <end>] <turn> <emotion> [<V, A, D>]"
                raise DataError(f"{place}: expected {wanted}, found {line!r:.80}")
            turn, emotion = match[1], SAME_EMOTION.get(match[2], match[2])
            once(seen, turn, place)
            if emotion in EMOTIONS:
                name = f"{session.name}/sentences/wav/{file.removesuffix('.txt')}/{turn}.wav"
                yield Listed(name, existing(session.parent / name), (emotion,))
