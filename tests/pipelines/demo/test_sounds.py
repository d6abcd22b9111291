"""Labels of events and drums, and their splits."""

import pytest

from ssast.pipelines.demo.sounds import EVALUATED_KITS, SOUND_TASKS, STUDY_TASKS, without_number
from ssast.pipelines.demo.tasks import Clip, Label, Task, divide

EVENTS, DRUMS = SOUND_TASKS
UFO = "ufoai-sound/usr/share/games/ufoai/base/0snd.pk3/sound"
ARENA = "openarena-data/usr/share/games/openarena/baseoa/pak0.pk3/sound"
DOOM = "freedoom/usr/share/games/doom/freedoom2.wad"
MINETEST = "minetest-data/usr/share/games/minetest/games/minetest_game/mods"
QABCS = "qabcs-data/usr/share/qabcs/abcs/all/noises"
SCORCHED = "scorched3d-data/usr/share/games/scorched3d/data/globalmods"
STAMPS = "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
KITS = "hydrogen-drumkits/usr/share/hydrogen/data/drumkits"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        (f"{UFO}/footsteps/grass2.ogg", "footstep"),
        (f"{UFO}/footsteps/splash1.ogg", "water"),
        (f"{UFO}/footsteps/crouch.ogg", None),
        (f"{UFO}/weapons/bullet-smg-15x.ogg", "gunshot"),
        (f"{UFO}/impact/bullet-impact.ogg", "impact"),
        (f"{UFO}/impact/bullet-bodyimpact.ogg", None),
        (f"{UFO}/weapons/ugv-lasercannon-fire.ogg", "laser"),
        (f"{UFO}/weapons/reload-laser.ogg", None),
        (f"{UFO}/weapons/explosion-plasma.ogg", "explosion"),
        (f"{UFO}/soldiers/femaledeath03.ogg", "scream"),
        (f"{UFO}/aliens/ortnok/hurt7.ogg", "monster"),
        (f"{UFO}/ambience/alienmachinery3.ogg", "machine"),
        (f"{UFO}/ugv/diesel-idle.ogg", "vehicle"),
        (f"{UFO}/ui/beep1.ogg", "beep"),
        (f"{ARENA}/weapons/plasma/plasmx1a.wav", "explosion"),
        (f"{ARENA}/player/sarge/pain100_1.wav", "scream"),
        (f"{ARENA}/player/sarge/taunt.wav", None),
        (f"{DOOM}/DSPISTOL", "gunshot"),
        (f"{DOOM}/DSPOSIT1", "monster"),
        (f"{DOOM}/DSPLPAIN", "scream"),
        (f"{DOOM}/DSDOROPN", "door"),
        (f"{MINETEST}/default/sounds/default_water_footstep.1.ogg", "footstep"),
        (f"{MINETEST}/doors/sounds/doors_fencegate_close.ogg", "door"),
        (f"{MINETEST}/fire/sounds/fire_extinguish_flame.2.ogg", "fire"),
        (f"{QABCS}/guinea_fowl.ogg", "bird"),
        (f"{QABCS}/giraffe.ogg", "mammal"),
        (f"{QABCS}/yueqin.ogg", "instrument"),
        (f"{QABCS}/watercolor.ogg", None),
        (f"{SCORCHED}/apoc/data/wav/explosions/lightning.wav", None),
        (f"{SCORCHED}/none/data/wav/explosions/xlarge.wav", "explosion"),
        (f"{STAMPS}/animals/mammals/cats/lion.ogg", "mammal"),
        (f"{STAMPS}/animals/mammals/cats/lion_desc_nl.ogg", None),
        ("lugaru-data/usr/share/games/lugaru/Sounds/Music1Desert.ogg", None),
        ("bucklespring-data/usr/share/buckle/wav/1e-0.wav", "keyboard"),
        ("flight-of-the-amazon-queen/x/queen.1c/JOE12.SB", None),
    ],
)
def test_events(name: str, label: str | None) -> None:
    found = EVENTS.label(name)
    assert (found and found.label) == label
    assert DRUMS.label(name) is None


@pytest.mark.parametrize(
    ("name", "kit", "label"),
    [
        ("BJA_Pacific/BD_01.aiff", "BJA_Pacific", "kick"),
        ("BJA_Pacific/HH2_03.aiff", "BJA_Pacific", "hihat"),
        ("Audiophob/122557__anillogic__trimo-c3.wav", "", None),
        ("ColomboAcousticDrumkit/crash16i__ride2.flac", "ColomboAcousticDrumkit", "ride"),
        ("ColomboAcousticDrumkit/stick-rim-9.flac", "ColomboAcousticDrumkit", "snare"),
        ("ForzeeStereo/CrashRide18Bell-0.wav", "ForzeeStereo", "crash"),
        ("ForzeeStereo/AgogoLow-4.wav", "ForzeeStereo", "cowbell"),
        ("Gimme A Hand 1.0/CajonSlaps-Med.wav", "Gimme A Hand 1.0", "hand_drum"),
        ("HardElectro1/emptySample.flac", "", None),
        ("Millo_MultiLayered3/t2_01.flac", "Millo_MultiLayered3", "tom"),
        ("The Black Pearl 1.0/SabianHatChoke-Soft.wav", "The Black Pearl 1.0", "hihat"),
        ("rumpf_kit_z01_h2/beats_06-24.flac", "", None),
    ],
)
def test_drums(name: str, kit: str, label: str | None) -> None:
    found = DRUMS.label(f"{KITS}/{name}")
    assert found == (Label(label, kit) if label else None)
    assert EVENTS.label(f"{KITS}/{name}") is None


def test_samples_of_sonic_pi_are_a_kit() -> None:
    samples = "sonic-pi-samples/usr/share/sonic-pi/samples"
    assert DRUMS.label(f"{samples}/bd_boom.flac") == Label("kick", "sonic-pi")
    assert EVENTS.label(f"{samples}/bd_boom.flac") is None
    assert DRUMS.label(f"{samples}/loop_amen.flac") is None


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("a/grass1.ogg", "a/grass"),
        ("a/grass.2.ogg", "a/grass"),
        ("a/machgf3b.wav", "a/machgf"),
        ("a/pain75_1.wav", "a/pain"),
        ("a/30-0.wav", "a/30"),
        ("a/1e-1.wav", "a/1e"),
        ("a/DSPOSIT3", "a/dsposit"),
        ("a/Dog.wav", "a/dog"),
    ],
)
def test_takes_of_a_sound_are_one_group(name: str, group: str) -> None:
    assert without_number(name) == group


def clips(*names: str, part: int = 0) -> list[Clip]:
    return [Clip(name, part, 1.0, row) for row, name in enumerate(names)]


def test_every_class_has_its_share_of_test_clips() -> None:
    def label(name: str) -> Label:
        return Label(name[0], name[:3])  # class "a": groups of one; "b": of ten

    names = [f"a{n:02}" for n in range(50)] + [
        f"b{n:02}-{take}" for n in range(5) for take in "x" * 10
    ]
    found = clips(*(f"{name}{place}" for place, name in enumerate(names)))
    train, held = divide(Task("t", "", label, 2, 100, even=True), found)
    assert [sum(name == kind for _, name in held) for kind in "ab"] == [10, 10]
    groups = [{label(clip.name).group for clip, _ in part} for part in (train, held)]
    assert not groups[0] & groups[1]


def test_a_class_that_is_one_group_is_left_out() -> None:
    task = Task("t", "", lambda n: Label(n[0], "c" if n[0] == "c" else n), 2, 100, even=True)
    train, held = divide(task, clips(*(f"{kind}{n}" for kind in "abc" for n in range(20))))
    assert {label for _, label in train} == {label for _, label in held} == {"a", "b"}


def test_held_kits() -> None:
    kits = [*sorted(EVALUATED_KITS), "Millo_MultiLayered3", "ForzeeStereo"]
    names = [
        f"{KITS}/{kit}/{what}_{n}.wav" for kit in kits for what in ("bd", "ft") for n in range(9)
    ]
    train, held = divide(DRUMS, clips(*names))
    assert {clip.name.split("/")[-2] for clip, _ in held} == EVALUATED_KITS
    assert {clip.name.split("/")[-2] for clip, _ in train} == set(kits) - EVALUATED_KITS


def test_only_the_first_clip_of_a_long_recording() -> None:
    task = Task("t", "", lambda n: Label(n[0], n), 2, 100, first_part=True)
    names = [f"{kind}{n}" for kind in "ab" for n in range(30)]
    train, held = divide(task, clips(*names) + clips(*names, part=1))
    assert len(train) + len(held) == 60 and not any(clip.part for clip, _ in train + held)


def test_names_of_tasks_are_unique() -> None:
    assert len({task.name for task in STUDY_TASKS}) == len(STUDY_TASKS)
