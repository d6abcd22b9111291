"""Bytes and operations, counted by hand for one shape."""

from ssast.kernels import roofline
from ssast.kernels.roofline import Work

# Two clips of 8 patches of 4 values, 5 masked, width 3: 10 tokens a clip.
B, N, M, P, D = 2, 8, 5, 4, 3


def test_draw_masks() -> None:
    # 2 clip numbers, 2 epochs and 2 x 8 ids of 8 bytes
    assert roofline.draw_masks(B, N) == Work(20 * 8, 0)


def test_fill_masked() -> None:
    # In: 2 x 3 visible tokens of 3, 2 x 5 rows of noise, 2 x 8 rows and 2 x 3 ids. Out: 2 x 8.
    want = (18 + 30 + 48) * 4 + (16 + 6) * 8
    assert roofline.fill_masked(B, N, M, D, itemsize=4) == Work(want, 0)
    assert roofline.fill_masked_backward(B, N, M, D, itemsize=4) == Work((18 + 18) * 4 + 6 * 8, 0)


def test_patch_embed() -> None:
    # fp32 in: 64 values; ids: 16. bf16 parameters: weight 12, positions 30, bias 3, mask token 3,
    # two tokens in front 6.
    # Out: 2 x 10 tokens of 3, 2 x 5 targets of 4.
    want = 64 * 4 + 16 * 8 + (12 + 30 + 3 + 3 + 6) * 2 + 60 * 2 + 40 * 2
    got = roofline.patch_embed(B, N, M, P, D, fbank_bytes=4, weight_bytes=2)
    assert got == Work(want, 6 * 4 * 3 * 2)  # 6 visible patches

    # In: 60 gradients, 6 visible patches of 4, 16 ids. Out: the gradients of the parameters.
    want = 60 * 2 + 24 * 4 + 16 * 8 + (12 + 30 + 3 + 3 + 6) * 2
    got = roofline.patch_embed_backward(B, N, M, P, D, fbank_bytes=4, weight_bytes=2)
    assert got == Work(want, 6 * 4 * 3 * 2)


def test_losses() -> None:
    # 40 targets, 40 predictions, 40 gradients; a loss and an accuracy of each clip in fp32.
    # Two products of 5 x 4 by 4 x 5 for each clip.
    assert roofline.info_nce(B, M, P, itemsize=2) == Work(120 * 2 + 16, 2 * 2 * 2 * 100)
    assert roofline.mse(B, M, P, itemsize=4) == Work(120 * 4 + 8, 0)
    assert roofline.scale_gradient(B, M, P, itemsize=4) == Work(80 * 4, 0)


def test_attention() -> None:
    # 2 x 10 x 3 values in each of q, k, v and out; two products of 10 x 10 x 3 for each clip.
    assert roofline.attention(B, 10, D, itemsize=2) == Work(4 * 60 * 2, 2 * 2 * 2 * 300)
    # q, k, v, out, d out in; dq, dk, dv out; five products.
    assert roofline.attention_backward(B, 10, D, itemsize=2) == Work(8 * 60 * 2, 5 * 2 * 2 * 300)


def test_add_norm() -> None:
    # Four tensors of 2 x 10 x 3, mean and deviation of 20 rows, three vectors.
    assert roofline.add_norm(B, 10, D, itemsize=2) == Work(4 * 60 * 2 + 40 * 4 + 9 * 2, 0)


def test_linear_layers() -> None:
    # 20 rows of 3 to 12, with a weight of 36 and 12 biases: h and gelu(h) are written.
    want = Work(2 * (60 + 2 * 240 + 36 + 12), 2 * 20 * 3 * 12)
    assert roofline.linear_gelu(B, 10, D, itemsize=2) == want
    # In: gradient, h, x, twice the gradient of h, weight. Out: gradients of h, x, weight, bias.
    want = Work(2 * (2 * 240 + 60 + 480 + 36 + 240 + 60 + 36 + 12), 2 * 2 * 20 * 3 * 12)
    assert roofline.linear_gelu_backward(B, 10, D, itemsize=2) == want
    # 20 rows of 3 to 3 x 3, with a weight of 27 and 9 biases.
    want = Work(2 * (60 + 180 + 27 + 9), 2 * 20 * 3 * 9)
    assert roofline.linear_chunks(B, 10, D, itemsize=2) == want
    # In: twice the gradient, x, weight. Out: gradients of x, weight, bias.
    want = Work(2 * (2 * 180 + 60 + 27 + 60 + 27 + 9), 2 * 2 * 20 * 3 * 9)
    assert roofline.linear_chunks_backward(B, 10, D, itemsize=2) == want


def test_fbank() -> None:
    # 2 x 1000 samples in, 2 x 4 frames of 3 mels out; 8 frames times 3 mels times 256 bins.
    assert roofline.fbank(2, 1000, 4, 3, 512) == Work(4 * 2024, 2 * 8 * 3 * 256)


def test_the_least_time_is_the_slower_of_both() -> None:
    assert Work(100, 10).seconds(10.0, 10.0) == 10.0
    assert Work(10, 100).seconds(10.0, 10.0) == 10.0
