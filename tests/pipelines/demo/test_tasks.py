"""Labels of the demo's tasks, and their splits."""

from dataclasses import replace

import pytest

from ssast.pipelines.demo.tasks import (
    DEMO_TASKS,
    Clip,
    Label,
    Task,
    divide,
    is_held,
    speech,
    syllable,
)

GCIN = "gcin-voice/usr/share/gcin-voice/ogg/"
FISH = "usr/share/games/fillets-ng/sound/"


@pytest.mark.parametrize(
    ("letters", "initial", "final", "tone"),
    [
        ("\u3105\u311a4", "b", "a", "4"),
        ("\u3112\u3129\u311d2", "x", "v-eh", "2"),
        ("\u3127\u31224", "", "i-an", "4"),
        ("\u3119", "s", "", "1"),
        ("\u3126\u02ca", None, None, None),  # a letter that is none
    ],
)
def test_syllables(letters: str, initial: str | None, final: str, tone: str) -> None:
    found = syllable(f"{GCIN}{letters}/3.ogg")
    if initial is None:
        assert found is None
        return
    assert found is not None
    assert found[:3] == (initial, final, tone)
    labels = {task.name: task.label(f"{GCIN}{letters}/3.ogg") for task in DEMO_TASKS}
    assert labels["zh_initial"] == Label(initial or "none", found[3])
    assert labels["zh_final"] == (Label(final, found[3]) if final else None)
    assert labels["zh_tone"] == Label(f"tone{tone}", found[3])
    assert labels["language"] is None


def test_tones_and_speakers_of_a_syllable_stay_together() -> None:
    groups = {syllable(f"{GCIN}\u310a\u3122{tone}/{who}.ogg")[3] for tone in "234" for who in "35"}  # type: ignore[index]
    assert len(groups) == 1


@pytest.mark.parametrize(
    ("name", "language", "voice", "utterance"),
    [
        (
            "klettres-data/usr/share/klettres/pt_BR/syllab/fe.ogg",
            "pt",
            "klettres-pt_BR",
            "syllab-fe",
        ),
        (
            "ktuberling-data/usr/share/ktuberling/sounds/sr@latin/bow.ogg",
            "sr",
            "ktuberling-sr@latin",
            "bow",
        ),
        ("ktuberling-data/usr/share/ktuberling/sounds/nn/shoe.opus", "nn", "ktuberling-nn", "shoe"),
        (
            f"fillets-ng-data-nl/{FISH}city/nl/vit-m-hlava.ogg",
            "nl",
            "fish-m-nl",
            "city-vit-hlava.ogg",
        ),
        (
            f"fillets-ng-data-cs/{FISH}propulsion/cs/v-chytra.ogg",
            "cs",
            "fish-v-cs",
            "propulsion-chytra.ogg",
        ),
        ("flight-of-the-amazon-queen/x/queen.1c/JOE12.SB", "en", "queen-joe", "JOE12"),
        ("flight-of-the-amazon-queen/x/queen.1c/020006J1.SB", "en", "", "020006J1.SB"),
        (f"{GCIN}\u3105\u311a4/5.ogg", "zh", "gcin-5", "\u3105\u311a4"),
    ],
)
def test_speech(name: str, language: str, voice: str, utterance: str) -> None:
    assert speech(name) == (language, voice, utterance)


@pytest.mark.parametrize(
    "name", ["other/a.ogg", f"fillets-ng-data-nl/{FISH}keys/nl/rand-0-4.ogg", ""]
)
def test_not_labelled(name: str) -> None:
    assert speech(name) is None


def clips(count: int) -> list[Clip]:
    return [Clip(str(n), 0, 1.0, n) for n in range(count)]


def test_divide() -> None:
    task = Task("t", "", lambda n: Label("abc"[int(n) % 3], str(int(n) // 6)), 30, 200)
    train, held = divide(task, clips(900))
    assert {label for _, label in train} == {label for _, label in held} == set("abc")
    groups = [{int(clip.name) // 6 for clip, _ in part} for part in (train, held)]
    assert not groups[0] & groups[1]
    assert 0.1 < len(held) / (len(held) + len(train)) < 0.3
    for name in "abc":
        assert sum(label == name for _, label in train + held) == 200
    assert divide(task, clips(900)[::-1]) == (train, held)


def test_divide_leaves_small_classes_and_short_clips_out() -> None:
    task = Task("t", "", lambda n: Label("ab"[int(n) % 2], n), 2, 100, min_s=1.0)
    assert all(divide(task, clips(50)))
    assert divide(replace(task, min_s=1.1), clips(50)) == ([], [])
    task = Task("t", "", lambda n: Label("many" if int(n) else "one", n), 2, 100)
    assert divide(task, clips(50)) == ([], [])
    task = Task("t", "", lambda n: None)
    assert divide(task, clips(50)) == ([], [])


def test_a_class_on_one_side_only_is_left_out() -> None:
    groups = {
        side: [g for g in map(str, range(200)) if is_held(Label("", g)) is side]
        for side in (True, False)
    }

    def label(name: str) -> Label:
        n = int(name)
        return (
            Label("lonely", groups[False][0])
            if n % 3 == 0
            else Label(f"{n % 3}", groups[n % 2 == 0][n % 5])
        )

    train, held = divide(Task("t", "", label, 2, 1000), clips(300))
    assert {label for _, label in train} == {label for _, label in held} == {"1", "2"}


def test_what_the_tasks_draw_never_changes() -> None:
    """Released weights were trained without the clips that are held out here."""
    name = "ktuberling-data/usr/share/ktuberling/sounds/sr@latin/bow tie.ogg"
    key = "flac/ktuberling-data/ktuberling-data_usr_share_ktuberling_sounds_sr@latin_bow_tie.ogg"
    assert Clip(name, 0, 1.0, 5).key == f"{key}_ec0e4070b9.flac"
    assert Clip(name, 12, 1.0, 5).key == f"{key}_ec0e4070b9-00012.flac"
    names = [
        f"klettres-data/usr/share/klettres/{c}/alpha/{n}.ogg"
        for c in ("de", "fr")
        for n in range(90)
    ]
    found = [Clip(name, 0, 1.0, row) for row, name in enumerate(names)]
    voice = next(task for task in DEMO_TASKS if task.name == "voice")
    train, held = divide(voice, found)
    drawn = [1, 10, 11, 15, 2, 20, 37, 39, 56, 59, 60, 62, 65, 66, 67, 76, 77, 84]
    assert [clip.row for clip, _ in held][:18] == drawn
    assert (len(train), len(held)) == (124, 36)
    assert [clip.row for clip, _ in train][:10] == [0, 12, 13, 14, 18, 19, 21, 22, 24, 25]
