"""The least bytes and FLOPs of each operation: the roofline that its speed is measured against.

Bytes: every input read once and every output written once, whatever an implementation does in
between. FLOPs: two for each multiply-add of its matmuls. A kernel that needs t seconds on a device
of peak FLOP/s F and bandwidth W reaches max(bytes / W, FLOPs / F) / t of the roofline (Williams et
al. 2009).

    B clips, N patches of P values, M of them masked, V = N - M, L = N + 2 tokens of width D
"""

from typing import NamedTuple

ID_BYTES = 8  # patch ids are int64
PREFIX = 2  # cls and dist


class Work(NamedTuple):
    """Bytes and FLOPs of one call."""

    bytes: int
    flops: int

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Return the least time on a device with these peaks."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


def draw_masks(B: int, N: int) -> Work:
    """Count clip and epoch numbers in, ids out."""
    return Work(B * (2 + N) * ID_BYTES, 0)


def fill_masked(B: int, N: int, M: int, D: int, *, itemsize: int) -> Work:
    """Count tokens, a row of noise for each masked patch and ids in, the whole grid out."""
    return Work(2 * B * N * D * itemsize + B * (N + N - M) * ID_BYTES, 0)


def fill_masked_backward(B: int, N: int, M: int, D: int, *, itemsize: int) -> Work:
    """Count the gradient and the ids of visible patches in, and the same gradient out."""
    return Work(B * (N - M) * (2 * D * itemsize + ID_BYTES), 0)


def patch_embed(
    B: int, N: int, M: int, P: int, D: int, *, fbank_bytes: int, weight_bytes: int
) -> Work:
    """Count the forward pass: visible patches are read for the matmul, masked ones as targets."""
    read = B * N * (P * fbank_bytes + ID_BYTES) + (D * P + (2 * PREFIX + N + 2) * D) * weight_bytes
    written = B * (PREFIX + N) * D * weight_bytes + B * M * P * weight_bytes
    return Work(read + written, 2 * B * (N - M) * P * D)


def patch_embed_backward(
    B: int, N: int, M: int, P: int, D: int, *, fbank_bytes: int, weight_bytes: int
) -> Work:
    """Count the backward pass: gradients of all tokens and visible patches in, of weights out."""
    V = N - M
    read = B * (PREFIX + N) * D * weight_bytes + B * V * P * fbank_bytes + B * N * ID_BYTES
    written = (D * P + (2 * PREFIX + N + 2) * D) * weight_bytes
    return Work(read + written, 2 * B * V * P * D)


def info_nce(B: int, M: int, P: int, *, itemsize: int) -> Work:
    """Count the forward pass with its gradient: two matmuls, S = t c^T and softmax(S)^T t."""
    return Work(3 * B * M * P * itemsize + 2 * B * 4, 4 * B * M * M * P)


def mse(B: int, M: int, P: int, *, itemsize: int) -> Work:
    """Count the forward pass with its gradient; no matmul."""
    return Work(3 * B * M * P * itemsize + B * 4, 0)


def scale_gradient(B: int, M: int, P: int, *, itemsize: int) -> Work:
    """Count the backward pass of either loss."""
    return Work(2 * B * M * P * itemsize, 0)


def attention(B: int, L: int, D: int, *, itemsize: int) -> Work:
    """Count the forward pass: two matmuls, q k^T and the one with v."""
    return Work(4 * B * L * D * itemsize, 4 * B * L * L * D)


def attention_backward(B: int, L: int, D: int, *, itemsize: int) -> Work:
    """Count the backward pass: five matmuls, scores recomputed (Dao et al. 2022)."""
    return Work(8 * B * L * D * itemsize, 10 * B * L * L * D)


def add_norm(B: int, L: int, D: int, *, itemsize: int) -> Work:
    """Count the forward or the backward pass, which both move four tensors.

    Forward: stream and update in, total and normalised out. Backward: both gradients and the total
    in, one gradient out. Mean and deviation of each row are float32.
    """
    return Work(4 * B * L * D * itemsize + 8 * B * L + 3 * D * itemsize, 0)


def linear_gelu(B: int, L: int, D: int, *, itemsize: int) -> Work:
    """Count the forward pass: x in, h and its GELU out; weight [4 D, D]."""
    return Work((9 * B * L * D + 4 * D * D + 4 * D) * itemsize, 8 * B * L * D * D)


def linear_gelu_backward(B: int, L: int, D: int, *, itemsize: int) -> Work:
    """Count the backward pass: the gradient, h and x in, gradients of x and weight out.

    The gradient of h is written once and read once for each of the two matmuls.
    """
    return Work((22 * B * L * D + 8 * D * D + 4 * D) * itemsize, 16 * B * L * D * D)


def linear_chunks(B: int, L: int, D: int, *, itemsize: int) -> Work:
    """Count the forward pass: x in, three chunks out; weight [3 D, D]."""
    return Work((4 * B * L * D + 3 * D * D + 3 * D) * itemsize, 6 * B * L * D * D)


def linear_chunks_backward(B: int, L: int, D: int, *, itemsize: int) -> Work:
    """Count the backward pass: three gradients side by side, read for each of two matmuls."""
    return Work((8 * B * L * D + 6 * D * D + 3 * D) * itemsize, 12 * B * L * D * D)


def fbank(B: int, samples: int, frames: int, n_mels: int, n_fft: int) -> Work:
    """Count waveforms in, features out, and the mel matmul over n_fft / 2 bins.

    The Fourier transform is not counted: how many operations it takes is up to the algorithm.
    """
    return Work(4 * B * (samples + frames * n_mels), 2 * B * frames * n_mels * (n_fft // 2))
