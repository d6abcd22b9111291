"""GPU specifications from data sheets, and the efficiency that training reaches.

Peaks are dense bf16, without sparsity. The efficiencies (``*_share``) are set so that the published
throughputs below are met within 20 %:

    MPT-125M on A100, 42.6 % of the peak; MPT-760M on H100, 40.4 %   llm-foundry's tables
    attention of 512 tokens, heads of 64, forward, H100: 335 TFLOP/s Shah et al. 2024, figure 5
    all-reduce in a node of 8: 460 GB/s (H100), 230 GB/s (A100)      nccl-tests, bus bandwidth
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssast.engine.errors import ConfigError
from ssast.pipelines.errors import DataError
from ssast.pipelines.text import YAML_BYTES, one_line, parse_yaml, read_text, shown

CPU = "cpu"  # name of a CPU


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and the node around it; a YAML file for ``--gpu FILE`` has these keys.

    Attributes:
        name: Name, part of what the driver reports.
        peak_tflops: Peak dense matmul throughput in ``precision``, TFLOP/s.
        memory_gib: Device memory, GiB.
        bandwidth_gb_s: Memory bandwidth, GB/s.
        link_gb_s: Bus bandwidth of collectives within a node, GB/s per GPU and direction.
        network_gb_s: Network bandwidth between nodes, GB/s per GPU.
        per_node: GPUs per node.
        precision: "bf16" or "fp32".
        gemm_share: Fraction of the peak that matmuls of very wide layers reach.
        half_width: Layer width at which half of ``gemm_share`` is reached, D / (D + half_width).
        attention_share: Fraction of the peak that attention reaches, forward and backward.
        convolution_share: Fraction of the peak that convolutions in groups reach.
        bandwidth_share: Fraction of the bandwidth that norms, activations and the optimizer reach.
        launch_us: Host time to launch one operation, microseconds.
        base_gib: Memory of driver, libraries and communicators, GiB.
        fragmentation: Memory reserved by the allocator, relative to the memory in use.
    """

    name: str
    peak_tflops: float
    memory_gib: float
    bandwidth_gb_s: float
    link_gb_s: float = 25.0
    network_gb_s: float = 12.5
    per_node: int = 8
    precision: str = "bf16"
    gemm_share: float = 0.66
    half_width: float = 250.0
    attention_share: float = 0.27
    convolution_share: float = 0.1
    bandwidth_share: float = 0.8
    launch_us: float = 8.0
    base_gib: float = 2.0
    fragmentation: float = 1.08

    @property
    def is_cpu(self) -> bool:
        """Whether this describes a CPU, in the same terms."""
        return self.name == CPU


_AMPERE: dict[str, Any] = {"gemm_share": 0.73, "attention_share": 0.38}
_CARD: dict[str, Any] = {"gemm_share": 0.73, "attention_share": 0.4}
# The first entry whose words are all in the device name is used: "NVIDIA A100-SXM4-40GB".
GPUS = (
    Gpu(
        name="B200", peak_tflops=2250, memory_gib=179, bandwidth_gb_s=8000, link_gb_s=800,
        network_gb_s=50, gemm_share=0.6,
    ),
    Gpu(
        name="H200", peak_tflops=989, memory_gib=140, bandwidth_gb_s=4800, link_gb_s=400,
        network_gb_s=50,
    ),
    Gpu(name="H100 PCIe", peak_tflops=756, memory_gib=79, bandwidth_gb_s=2000, network_gb_s=25),
    Gpu(
        name="H100", peak_tflops=989, memory_gib=79, bandwidth_gb_s=3350, link_gb_s=400,
        network_gb_s=50,
    ),
    Gpu(
        name="A100 40GB", peak_tflops=312, memory_gib=39, bandwidth_gb_s=1555, link_gb_s=230,
        network_gb_s=25, **_AMPERE,
    ),
    Gpu(
        name="A100", peak_tflops=312, memory_gib=79, bandwidth_gb_s=2039, link_gb_s=230,
        network_gb_s=25, **_AMPERE,
    ),
    Gpu(name="L40S", peak_tflops=362, memory_gib=44, bandwidth_gb_s=864, **_CARD),
    Gpu(name="L4", peak_tflops=121, memory_gib=22, bandwidth_gb_s=300, **_CARD),
    Gpu(name="A10G", peak_tflops=70, memory_gib=22, bandwidth_gb_s=600, **_CARD),
    Gpu(name="A10", peak_tflops=125, memory_gib=22, bandwidth_gb_s=600, **_CARD),
    Gpu(name="4090", peak_tflops=165, memory_gib=23, bandwidth_gb_s=1008, **_CARD),
)  # fmt: skip
SAME_GPU = {"GB200": "B200"}


def find_gpu(device_name: str) -> Gpu | None:
    """Find a GPU by the device name of its driver; None if it is not in the table."""
    words = {SAME_GPU.get(word, word) for word in device_name.replace("-", " ").split()}
    return next((gpu for gpu in GPUS if words.issuperset(gpu.name.split())), None)


def load_gpu(name: str) -> Gpu:
    """Load a GPU by its name in the table (in any case), or from a YAML file.

    Raises:
        ConfigError: Neither, or the file lacks or misspells a key.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        return _read(path)
    plain = name.lower().replace("-", " ")
    for gpu in GPUS:
        if gpu.name.lower() == plain:
            return gpu
    known = ", ".join(gpu.name.lower().replace(" ", "-") for gpu in GPUS)
    raise ConfigError(f"--gpu {name}: expected cpu, {known}, or a YAML file")


def _read(path: Path) -> Gpu:
    try:
        raw = parse_yaml(read_text(path, YAML_BYTES))
    except DataError as error:
        raise ConfigError(str(error)) from error
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {shown(raw)}")
    fields = {f.name: f for f in dataclasses.fields(Gpu)}
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    for problem, keys in (("unknown", raw.keys() - fields), ("missing", required - raw.keys())):
        if keys:
            raise ConfigError(
                f"{path}: {problem} key {min(map(shown, keys))}; keys: {list(fields)}"
            )
    for key, value in raw.items():
        text = key in ("name", "precision")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = isinstance(value, str) if text else number and 0 <= value < math.inf
        if not fits or (key in required | {"per_node"} and not value):
            raise ConfigError(
                f"{path}: {key} must be {'a text' if text else 'positive'}: {shown(value)}"
            )
    if raw.get("precision", "bf16") not in ("bf16", "fp32"):
        raise ConfigError(f"{path}: precision must be bf16 or fp32, got {raw['precision']!r}")
    return Gpu(**raw)
