"""Files whose headers misstate their lengths: predicted, cut into windows and embedded whole."""

import json
import logging

import numpy as np
import pytest
from lengths import SAMPLES, lying_files, truncated_files

from ssast.engine.cli.main import main
from ssast.engine.evaluation.embedding import embed_recordings
from ssast.engine.evaluation.timeline import Windows
from ssast.engine.finetune import FinetuneEngine
from ssast.engine.formats.open import open_model
from ssast.kernels.fbank import FbankSpec
from ssast.pipelines.errors import UnusableError


@pytest.fixture(scope="module")
def lying(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lying")
    for name, data in lying_files().items():
        (folder / name).write_bytes(data)
    return folder


def test_all_are_predicted_and_embedded(lying, finetuned, tmp_path):
    engine = FinetuneEngine.from_checkpoint(finetuned[0])
    found = engine.predict([lying])
    assert len(found) == len(lying_files())
    assert [one for one in found if one.reason is not None] == []
    written = embed_recordings(open_model(finetuned[0]), lying, tmp_path / "a.npy")
    assert written.rejected == {}
    rows = np.load(written.path)
    assert np.isfinite(rows).all() and len(rows) == len(found)


def test_windows_reach_the_end(lying):
    for path in sorted(lying.iterdir()):
        *_, (start, window) = Windows(4000, 2000).cut(path, FbankSpec())
        assert SAMPLES - 22 <= start + len(window) <= SAMPLES + 2304, path.name


def test_truncated_files_are_refused_alike(finetuned, tmp_path):
    engine = FinetuneEngine.from_checkpoint(finetuned[0])
    for name, data in truncated_files().items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnusableError, match="truncated: "):
            list(Windows(4000, 2000).cut(tmp_path / name, FbankSpec()))
    found = engine.predict([tmp_path])
    assert len(found) == len(truncated_files())
    assert all(one.reason.startswith("truncated: ") for one in found)


MP4 = b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(3000)


def test_a_folder_of_m4a_leads_to_data_prepare(finetuned, tmp_path, capsys, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.m4a", "b.M4A", "c.webm", "notes.txt"):
        (folder / name).write_bytes(MP4)
    embedding = ["embed", str(finetuned[0]), str(folder), "--out", str(tmp_path / "a.npy")]
    for command in (["predict", str(finetuned[0]), str(folder)], embedding):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "2 .m4a, 1 .webm: ssast data prepare" in error
        assert "converts them with ffmpeg" in error
    (folder / "d.wav").write_bytes(lying_files()["WAV_right.wav"])
    with caplog.at_level(logging.WARNING):
        assert main(["predict", str(finetuned[0]), str(folder)]) == 0
    (record,) = (r for r in caplog.records if "data prepare" in r.getMessage())
    assert "1 files are read; left out are 2 .m4a, 1 .webm" in record.getMessage()


def test_a_single_m4a_leads_to_data_prepare(finetuned, tmp_path, capsys):
    (tmp_path / "a.m4a").write_bytes(MP4)
    (tmp_path / "b.wav").write_bytes(lying_files()["WAV_right.wav"])
    listing = {"data": [{"wav": name, "labels": "x"} for name in ("a.m4a", "b.wav")]}
    (tmp_path / "a.json").write_text(json.dumps(listing))
    for source in ([str(tmp_path / "a.m4a"), str(tmp_path / "b.wav")], [str(tmp_path / "a.json")]):
        main(["predict", str(finetuned[0]), *source])
        assert "MP4 or M4A: ssast data prepare converts it" in capsys.readouterr().out
    main(["embed", str(finetuned[0]), str(tmp_path / "a.m4a"), "--out", str(tmp_path / "a.npy")])
    assert "MP4 or M4A: ssast data prepare converts it" in "".join(capsys.readouterr())
