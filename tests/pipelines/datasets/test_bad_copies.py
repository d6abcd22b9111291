"""A copy that is not as it should be is refused in one line, and nothing is written."""

import re
import shutil
from pathlib import Path

import dataset_trees
import pytest
from dataset_files import contents, silent
from dataset_trees import sound, text

from ssast.pipelines.datasets.manifests import write_dataset
from ssast.pipelines.errors import DataError


def without(path: str):
    return lambda root: (root / path).unlink()


def replaced(path: str, old: str, new: str):
    def change(root: Path) -> None:
        content = (root / path).read_text(encoding="latin-1")
        assert old in content
        (root / path).write_text(content.replace(old, new, 1), encoding="latin-1")

    return change


def gone(path: str):
    return lambda root: shutil.rmtree(root / path)


def added(path: str, content: str):
    def change(root: Path) -> None:
        with open(root / path, "a") as file:
            file.write(content)

    return change


def noise_of(seconds: float):
    def change(root: Path) -> None:
        gone("speech_commands_v0.01/_background_noise_")(root)
        sound(root / "speech_commands_v0.01/_background_noise_/hum.wav", seconds)

    return change


def unreadable_noise(root: Path) -> None:
    text(root / "speech_commands_v0.01/_background_noise_/pink_noise.wav", "not a sound")


def without_the_last_class(root: Path) -> None:
    rows = (root / ESC).read_text().split("\n")
    text(root / ESC, "\n".join(row for row in rows if ",49," not in row))


def only_other_names(root: Path) -> None:
    for folder in ("balanced", "unbalanced", "eval"):
        shutil.rmtree(root / folder)
    sound(root / "rain.wav")


BAL, ESC, SC1 = (
    "balanced_train_segments.csv",
    "ESC-50-master/meta/esc50.csv",
    "speech_commands_v0.01",
)
DEV, VOC = "FSD50K.ground_truth/dev.csv", "FSD50K.ground_truth/vocabulary.csv"
IEM = "IEMOCAP_full_release/Session3/dialog/EmoEvaluation/Ses03F_script01_1.txt"
BAD = [
    (
        "audioset",
        without("class_labels_indices.csv"),
        "class_labels_indices.csv: expected this file of the data set, found none",
    ),
    ("audioset", without(BAL), f"{BAL}: expected this file of the data set, found none"),
    (
        "audioset",
        replaced("class_labels_indices.csv", "index,mid", "number,mid"),
        "class_labels_indices.csv: line 1: expected a header with index,mid,display_name, "
        "found 'number,mid,display_name'",
    ),
    (
        "audioset",
        replaced("class_labels_indices.csv", "1,/m", "7,/m"),
        "class_labels_indices.csv: line 3: expected index 1, found '7'",
    ),
    (
        "audioset",
        replaced("class_labels_indices.csv", "/m/05zppz", "/m/09x0r"),
        "class_labels_indices.csv: line 3: class /m/09x0r is listed already",
    ),
    (
        "audioset",
        lambda root: text(root / "class_labels_indices.csv", "index,mid,display_name\n"),
        "class_labels_indices.csv: expected a table of classes, found no rows",
    ),
    (
        "audioset",
        lambda root: (root / "class_labels_indices.csv").write_bytes(b"\xff\xfa"),
        "class_labels_indices.csv: not UTF-8 text: byte 0",
    ),
    (
        "audioset",
        replaced(BAL, ", 0.000, 10.000", ", 0.000"),
        f"{BAL}: line 5: expected 4 columns YTID,start_seconds,end_seconds,positive_labels, "
        "found 'Y0aaaaaaaa_,0.000,/m/05zppz'",
    ),
    ("audioset", replaced(BAL, '/m/05zppz"', "/m/05zppz"), f"{BAL}: line 5: not CSV: "),
    (
        "audioset",
        replaced(BAL, "/m/05zppz", "/m/nothing"),
        f"{BAL}: line 5: expected labels of the 3 classes, found '/m/nothing'",
    ),
    (
        "audioset",
        replaced(BAL, "gone0000000", "gone"),
        f"{BAL}: line 6: expected a YouTube id of 11 characters, found 'gone'",
    ),
    (
        "audioset",
        replaced(BAL, "gone0000000", "--PJHxphWEs"),
        f"{BAL}: line 6: --PJHxphWEs is listed already at ",
    ),
    (
        "audioset",
        replaced("eval_segments.csv", "-0BIyqJj9ZU", "--PJHxphWEs"),
        "eval_segments.csv: line 4: --PJHxphWEs is listed already at ",
    ),
    ("audioset", gone("eval"), "split eval: found none of its 1 clips, as -0BIyqJj9ZU"),
    (
        "audioset",
        lambda root: text(root / "eval_segments.csv", dataset_trees.SEGMENTS_HEAD),
        "split eval: expected clips, found none listed",
    ),
    (
        "audioset",
        only_other_names,
        "expected audio named by YouTube id, as Y<id>.wav, <id>.flac or <id>_30.wav, "
        "found rain.wav",
    ),
    (
        "librispeech",
        gone("LibriSpeech/train-clean-360"),
        "LibriSpeech: expected train-clean-100, train-clean-360, train-other-500, "
        "found no train-clean-360",
    ),
    (
        "librispeech",
        gone("LibriSpeech"),
        ": expected a folder with train-clean-100, found nothing",
    ),
    ("librispeech", gone("LibriSpeech/dev-clean/84"), "dev-clean: no audio files in this folder"),
    (
        "librispeech",
        lambda root: (root / "LibriSpeech/dev-clean/84/121123/84-121123-0000.flac").rename(
            root / "LibriSpeech/dev-clean/x.wav"
        ),
        "dev-clean: expected .flac files, found none",
    ),
    ("esc50", without(ESC), ": expected a folder with meta/esc50.csv, found ESC-50-master"),
    (
        "esc50",
        replaced(ESC, "filename,fold", "filename,part"),
        "esc50.csv: line 1: expected a header with filename,fold,target,category, "
        "found 'filename,part,target",
    ),
    (
        "esc50",
        replaced(ESC, "wav,1,0,dog", "wav,6,0,dog"),
        "esc50.csv: line 2: expected a fold from 1 to 5, found '6'",
    ),
    (
        "esc50",
        replaced(ESC, "wav,1,0,dog", "wav,1,50,dog"),
        "esc50.csv: line 2: expected a target from 0 to 49, found '50'",
    ),
    (
        "esc50",
        replaced(ESC, "wav,2,0,dog", "wav,2,0,cat"),
        "esc50.csv: line 52: expected category dog of target 0, found 'cat'",
    ),
    (
        "esc50",
        replaced(ESC, "1-100001-A-1", "1-100000-A-0"),
        "esc50.csv: line 3: 1-100000-A-0.wav is listed already at ",
    ),
    (
        "esc50",
        without_the_last_class,
        "esc50.csv: expected 50 classes, found 49",
    ),
    ("esc50", gone("ESC-50-master/audio"), "split train_1: found none of its 200 clips, as 2-"),
    (
        "speechcommands_v2",
        gone("visual"),
        ": expected folders of 35 words, found no 'visual'",
    ),
    (
        "speechcommands_v2",
        without("testing_list.txt"),
        "testing_list.txt: expected this file of the data set, found none",
    ),
    (
        "speechcommands_v2",
        without("validation_list.txt"),
        ": expected a folder with validation_list.txt, found _background_noise_, backward, bed,",
    ),
    (
        "speechcommands_v2",
        added("testing_list.txt", "\nhello\n"),
        "testing_list.txt: line 37: expected <word>/<clip>.wav, found 'hello'",
    ),
    (
        "speechcommands_v2",
        added("testing_list.txt", "bed/bb_nohash_0.wav\n"),
        "testing_list.txt: line 36: bed/bb_nohash_0.wav is listed already at ",
    ),
    (
        "speechcommands_v1",
        lambda root: sound(root / SC1 / "visual/aa_nohash_0.wav"),
        f"{SC1}: expected folders of 30 words, found also 'visual'",
    ),
    (
        "speechcommands_v1",
        gone(f"{SC1}/_background_noise_"),
        "_background_noise_: expected this folder of the data set, found none",
    ),
    (
        "speechcommands_v1",
        noise_of(9.9),
        "_background_noise_: expected recordings of at least 10 s to cut silence from, "
        "found none for valid",
    ),
    ("speechcommands_v1", unreadable_noise, "pink_noise.wav: cannot be decoded: "),
    (
        "speechcommands_v1",
        gone("speech_commands_test_set_v0.01/_silence_"),
        "_silence_: expected this folder of the data set, found none",
    ),
    (
        "voxceleb1",
        without("iden_split.txt"),
        ": expected a folder with iden_split.txt, found dev, test",
    ),
    *(
        (
            "voxceleb1",
            replaced("iden_split.txt", "2 id11251/K5zRxtXc27s/00002.wav", bad),
            "iden_split.txt: line 4: expected 1, 2 or 3 and "
            f"<id10001 to id11251>/<video>/<clip>.wav, found '{bad}'",
        )
        for bad in ("4 id11251/K5/00002.wav", "2 id11252/K5/00002.wav", "2 00002.wav")
    ),
    (
        "voxceleb1",
        replaced("iden_split.txt", "2 id11251/K5zRxtXc27s/00002", "3 id11251/K5zRxtXc27s/00001"),
        "iden_split.txt: line 4: id11251/K5zRxtXc27s/00001.wav is listed already at ",
    ),
    ("voxceleb1", gone("test"), "split eval: found none of its 1 clips, as id10003/na8-"),
    (
        "iemocap",
        gone("IEMOCAP_full_release/Session3"),
        "Session3/dialog/EmoEvaluation: expected this folder of the data set, found none",
    ),
    ("iemocap", without(IEM), "split eval_3: expected clips, found none listed"),
    (
        "iemocap",
        replaced(IEM, "\tfru\t", "\t"),
        "Ses03F_script01_1.txt: line 10: expected [<start> - <end>] <turn> <emotion> [<V, A, D>], "
        "found '[14.8872 - 18.0175]",
    ),
    (
        "iemocap",
        replaced(IEM, "_F001", "_F000"),
        "Ses03F_script01_1.txt: line 7: Ses03F_script01_1_F000 is listed already at ",
    ),
    (
        "iemocap",
        gone("IEMOCAP_full_release/Session3/sentences"),
        "split eval_3: found none of its 5 clips, as Session3/sentences/wav/Ses03F_script01_1/",
    ),
    ("fsd50k", without(VOC), "vocabulary.csv: expected this file of the data set, found none"),
    (
        "fsd50k",
        replaced(VOC, "1,Dog,/m/0bt9lr", "1,Dog"),
        "vocabulary.csv: line 2: expected 3 columns index,label,mid, found '1,Dog'",
    ),
    ("fsd50k", replaced(VOC, "1,Dog", "2,Dog"), "vocabulary.csv: line 2: expected index 1"),
    (
        "fsd50k",
        replaced(DEV, ",val", ",test"),
        "dev.csv: line 3: expected split train or val, found 'test'",
    ),
    (
        "fsd50k",
        replaced(DEV, "Rain,/m/06mb1", "Rain,"),
        "dev.csv: line 3: expected labels of the 3 classes, found ''",
    ),
    (
        "fsd50k",
        replaced("FSD50K.ground_truth/eval.csv", "37199", "64760"),
        "eval.csv: line 2: 64760 is listed already at ",
    ),
    ("fsd50k", gone("FSD50K.eval_audio"), "split eval: found none of its 1 clips, as 37199.wav"),
]


@pytest.mark.parametrize("case", range(len(BAD)), ids=lambda n: f"{n}-{BAD[n][0]}")
def test_a_bad_copy_is_refused_in_one_line_and_nothing_is_written(
    case: int, trees: dict[str, Path], tmp_path: Path
) -> None:
    name, spoil, message = BAD[case]
    source, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(trees[name], source)
    write_dataset(name, source, out, silent)
    before = contents(out)
    spoil(source)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        write_dataset(name, source, out, silent)
    assert str(caught.value).startswith(str(source))
    assert "\n" not in str(caught.value)
    assert contents(out) == before
