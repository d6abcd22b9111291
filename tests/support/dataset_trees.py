"""Small copies of the data sets of the paper, in the layouts and formats of their publishers."""

from pathlib import Path

import numpy as np
import soundfile

RATE_HZ = 16000
WORDS_V1 = (
    "bed bird cat dog down eight five four go happy house left marvin nine no off on one right "
    "seven sheila six stop three tree two up wow yes zero"
)
WORDS_V2 = f"{WORDS_V1} backward follow forward learn visual"
COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
CLASSES_V1 = (*COMMANDS, "_unknown_", "_silence_")
CLASSES_CSV = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/t/dd00088,"Gush"
"""
SEGMENTS_HEAD = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=3, num_segs=3, num_unique_labels=3, num_positive_labels=5
# YTID, start_seconds, end_seconds, positive_labels
"""
BALANCED_CSV = f"""{SEGMENTS_HEAD}--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
Y0aaaaaaaa_, 0.000, 10.000, "/m/05zppz"
gone0000000, 5.000, 15.000, "/m/09x0r"
"""
UNBALANCED_CSV = f"""{SEGMENTS_HEAD}___________, 70.000, 80.000, "/m/09x0r,/m/05zppz"
bbbbbbbbb-1, 30.000, 40.000, "/m/09x0r"
"""
EVAL_CSV = f"""{SEGMENTS_HEAD}-0BIyqJj9ZU, 30.000, 40.000, "/t/dd00088"
"""
EMOTIONS = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\t{d}_F000\tneu\t[2.5000, 2.5000, 2.5000]
C-E2:\tNeutral;\t()
A-F1:\tval 3; act 2; dom  1;\t(caf\xe9)

[10.0100 - 11.3925]\t{d}_F001\texc\t[2.5000, 2.5000, 2.5000]
C-E2:\tExcited;\t()

[14.8872 - 18.0175]\t{d}_M000\tfru\t[2.5000, 3.5000, 3.5000]

[19.2900 - 20.7875]\t{d}_M001\tang\t[1.5000, 3.5000, 3.5000]

[21.3257 - 24.7400]\t{d}_M002\thap\t[3.0, 3.0, 3.0]

[25.0000 - 26.7400]\t{d}_MXX0\tsad\t[3.0, 3.0, 3.0]

[27.0000 - 28.7400]\t{d}_F002\txxx\t[3.0, 3.0, 3.0]
"""


def sound(path: Path, seconds: float = 0.01, seed: int = 0) -> None:
    """A little noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-9999, 9999, int(seconds * RATE_HZ))
    soundfile.write(path, noise.astype(np.int16), RATE_HZ, subtype="PCM_16")


def text(path: Path, content: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding=encoding)


def audioset(root: Path) -> None:
    text(root / "class_labels_indices.csv", CLASSES_CSV)
    text(root / "balanced_train_segments.csv", BALANCED_CSV)
    text(root / "unbalanced_train_segments.csv", UNBALANCED_CSV)
    text(root / "eval_segments.csv", EVAL_CSV)
    for name in (
        "balanced/Y--PJHxphWEs.wav",
        "balanced/YY0aaaaaaaa__0.000.flac",
        "unbalanced/part00/____________70.wav",
        "unbalanced/part01/bbbbbbbbb-1_30000_40000.flac",
        "eval/_/0/-0BIyqJj9ZU_30.000.flac",
        "eval/_/0/of_no_split_.wav",
        "eval/notes.wav",
    ):
        sound(root / name)


def librispeech(root: Path) -> None:
    for name in (
        "train-clean-100/103/1240/103-1240-0001.flac",
        "train-clean-100/103/1240/103-1240-0000.flac",
        "train-clean-360/100/121669/100-121669-0000.flac",
        "train-other-500/20/205/20-205-0000.flac",
        "dev-clean/84/121123/84-121123-0000.flac",
        "test-other/367/130732/367-130732-0000.flac",
    ):
        sound(root / "LibriSpeech" / name)
    text(root / "LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt", "103-1240-0000 A B\n")
    text(root / "LibriSpeech/SPEAKERS.TXT", "; comment\n")


def esc50(root: Path) -> None:
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        for target in range(50):
            name = f"{fold}-{100000 + target}-A-{target}.wav"
            category = "dog" if target == 0 else f"category_{target}"
            rows.append(f"{name},{fold},{target},{category},False,{100000 + target},A")
            sound(root / "ESC-50-master/audio" / name)
    text(root / "ESC-50-master/meta/esc50.csv", "\n".join(rows) + "\n")


def speechcommands(root: Path, words: str) -> None:
    for word in words.split():
        for speaker in ("aa", "bb", "cc"):
            sound(root / word / f"{speaker}_nohash_0.wav")
    sound(root / "yes/aa_nohash_1.wav")
    valid = [f"{word}/bb_nohash_0.wav\n" for word in words.split()]
    held = [f"{word}/cc_nohash_0.wav\n" for word in words.split()]
    text(root / "validation_list.txt", "".join(valid))
    text(root / "testing_list.txt", "".join(held))
    sound(root / "_background_noise_/pink_noise.wav", 12.0, seed=1)
    sound(root / "_background_noise_/running_tap.wav", 10.0, seed=2)
    text(root / "_background_noise_/README.md", "Noise.\n")


def speechcommands_v1(root: Path) -> None:
    speechcommands(root / "speech_commands_v0.01", WORDS_V1)
    for label in CLASSES_V1:
        sound(root / "speech_commands_test_set_v0.01" / label / "dd_nohash_0.wav")


def speechcommands_v2(root: Path) -> None:
    speechcommands(root, WORDS_V2)


def voxceleb1(root: Path) -> None:
    text(
        root / "iden_split.txt",
        "3 id10003/na8-QEFmj44/00003.wav\n"
        "1 id10003/tCq2LcKO6xY/00002.wav\n"
        "1 id11251/K5zRxtXc27s/00001.wav\n"
        "2 id11251/K5zRxtXc27s/00002.wav\n",
    )
    sound(root / "dev/wav/id10003/tCq2LcKO6xY/00002.wav")
    sound(root / "dev/wav/id11251/K5zRxtXc27s/00001.wav")
    sound(root / "dev/wav/id11251/K5zRxtXc27s/00002.wav")
    sound(root / "test/wav/id10003/na8-QEFmj44/00003.wav")


def iemocap(root: Path) -> None:
    for session in range(1, 6):
        folder = root / "IEMOCAP_full_release" / f"Session{session}"
        dialog = f"Ses0{session}F_script01_1"
        evaluation = folder / "dialog/EmoEvaluation"
        text(evaluation / f"{dialog}.txt", EMOTIONS.format(d=dialog), "latin-1")
        text(evaluation / f"._{dialog}.txt", "Mac OS X\n")
        text(evaluation / "Categorical/x_cat.txt", "Ses :Neutral state; ()\n")
        for turn in ("F000", "F001", "F002", "M000", "M001", "M002", "MXX0"):
            sound(folder / "sentences/wav" / dialog / f"{dialog}_{turn}.wav")


def fsd50k(root: Path) -> None:
    truth = root / "FSD50K.ground_truth"
    text(truth / "vocabulary.csv", "0,Bark,/m/05tny_\n1,Dog,/m/0bt9lr\n2,Rain,/m/06mb1\n")
    text(
        truth / "dev.csv",
        "fname,labels,mids,split\n"
        '64760,"Bark,Dog","/m/05tny_,/m/0bt9lr",train\n'
        "16399,Rain,/m/06mb1,val\n"
        "16401,Dog,/m/0bt9lr,train\n",
    )
    text(truth / "eval.csv", 'fname,labels,mids\n37199,"Bark,Dog","/m/05tny_,/m/0bt9lr"\n')
    for name in ("dev_audio/64760", "dev_audio/16399", "dev_audio/16401", "eval_audio/37199"):
        sound(root / f"FSD50K.{name}.wav")


def folders(root: Path) -> None:
    for name in ("train/dog/a", "train/dog/more/b", "train/cat, wild/c", "test/dog/a"):
        sound(root / f"{name}.wav", seed=len(name))


TREES = {
    "audioset": audioset,
    "librispeech": librispeech,
    "esc50": esc50,
    "speechcommands_v1": speechcommands_v1,
    "speechcommands_v2": speechcommands_v2,
    "voxceleb1": voxceleb1,
    "iemocap": iemocap,
    "fsd50k": fsd50k,
    "folders": folders,
}
