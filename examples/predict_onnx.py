"""Classify recordings with an exported ONNX file, by what the file says of itself alone.

    ssast export runs/classifier --to onnx model.onnx --input waveform
    python predict_onnx.py model.onnx dog.wav cat.wav

Needs numpy, onnxruntime, soundfile and soxr. A file that is fed waveforms has the filterbank
inside; for one that is fed filterbanks (``--input fbank``), ``log_mel`` computes them.
"""

import json
import sys

import numpy as np
import onnxruntime
import soundfile
import soxr


def log_mel(wave: np.ndarray, audio: dict) -> np.ndarray:
    """Compute Kaldi's log-mel filterbank [T, F] of samples [S], by the settings in the metadata."""
    window, hop, n_fft = audio["window"], audio["hop"], audio["n_fft"]
    # snip_edges: only windows that lie inside the clip; longer clips are cut at the end.
    count = min(max((len(wave) - window) // hop + 1, 0), audio["num_frames"])
    frames = wave.astype(np.float64)[hop * np.arange(count)[:, None] + np.arange(window)]
    frames -= frames.mean(1, keepdims=True)
    frames -= audio["preemphasis"] * np.hstack([frames[:, :1], frames[:, :-1]])
    power = np.abs(np.fft.rfft(frames * np.hanning(window), n_fft)) ** 2

    def mel(hz):
        return 1127 * np.log1p(hz / 700)

    edges = np.linspace(mel(audio["low_hz"]), mel(audio["high_hz"]), audio["n_mels"] + 2)
    bins = mel(np.linspace(0, audio["sample_rate_hz"] / 2, n_fft // 2 + 1))[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    filters = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    filters = filters.clip(0) * (bins < bins[-1])  # nothing of the Nyquist frequency
    # Frames past the end of a clip have the padding value.
    out = np.full((audio["num_frames"], audio["n_mels"]), audio["padding_value"])
    out[:count] = np.log((power @ filters).clip(audio["mel_floor"]))
    return out.astype(np.float32)


def mono(samples: np.ndarray, channel: str) -> np.ndarray:
    """Return the waveform [S] of samples [S, channels]: their mean, the left or the right one."""
    if channel == "mean":
        return samples.mean(1)
    return samples[:, min(channel == "right", samples.shape[1] - 1)]


def classify(session: onnxruntime.InferenceSession, path: str) -> dict[str, float]:
    """Return the probabilities of a recording by the names of the classes, the likeliest first."""
    metadata = session.get_modelmeta().custom_metadata_map
    audio = json.loads(metadata["audio"])
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    wave = soxr.resample(mono(samples, audio["channel"]), rate, audio["sample_rate_hz"])
    if metadata["input"] == "waveform":
        inputs = {"waveform": wave[None], "num_samples": np.array([len(wave)])}
    else:
        inputs = {"fbank": log_mel(wave, audio)[None]}
    logits = session.run(None, inputs)[0][0].astype(np.float64)
    if metadata["activation"] == "softmax":  # one class a clip
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    else:  # sigmoid: any number of classes a clip
        scores = 1 / (1 + np.exp(-logits))
    names = json.loads(metadata["labels"])
    return {names[i]: float(scores[i]) for i in np.argsort(-scores)}


if __name__ == "__main__":
    model, *paths = sys.argv[1:]
    session = onnxruntime.InferenceSession(model)
    for path in paths:
        top = list(classify(session, path).items())[:5]
        print(f"{path}:", ", ".join(f"{name} {score:.3f}" for name, score in top))
