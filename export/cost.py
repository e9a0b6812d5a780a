"""What one tick costs: operations, bytes and memory, counted from the exporter's graph, and the time that a board needs for them."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from device.config import ModelConfig
from device.tensors import tensor_table
from export.checkpoint import weight_table
from export.graph import TickGraph
from export.targets import Precision, Target

# The share of a GPU's dense rate that products of few rows reach. Measured by others, both 7 %: TensorRT-Edge-LLM's 370 tokens of
# Qwen3-1.7B in 13.9 ms on Thor (75 of 1035 TFLOPS), and YOLOv8n INT8 in 3.49 ms on an Orin Nano Super (2.5 of 33 TOPS, TensorRT 10.3).
COMPUTE_SHARE = 0.07
# PersonaPlex on GB10: less than 3 ms of dispatch for about 449 products (NVIDIA/personaplex, pull request 103). An upper bound.
LAUNCH_MS = 3 / 449
# Of the tick, for a model that is said to fit: the rest is for jitter, the loop and whatever else the board does.
USABLE_SHARE = 0.6
# Of the board's memory: the system, the camera, the sound, CUDA's context. A reserve, not a measurement.
RESERVED_GB = 2.0
# What quantizing leaves in floating point beside the front end: the last layers of the flow head and of the vocoder.
KEPT_FLOAT = frozenset({"flow.leave.weight", "vocoder.out.weight"})
WIDEST = 1 << 16  # beyond it no board comes into question

_FREE = frozenset({"Reshape", "Identity"})  # move nothing
_PICKS = frozenset({"Gather", "Slice", "Split"})  # read only what they put out


@dataclass(frozen=True)
class Node:
    """One node of the tick graph; sizes count elements.

    A product (MatMul) has `rows`, the rows of its left operand. `weight` is the initializer that it reads whole and `learned` says
    whether that is the model's or a fixed matrix; `ring` is what it reads of the keys and values of the past. `moved` is all
    else that it reads and writes.
    """

    name: str
    kind: str
    flops: int = 0
    rows: int = 0
    weight: str = ""
    weight_size: int = 0
    learned: bool = False
    ring: int = 0
    moved: int = 0

    @property
    def is_product(self) -> bool:
        return self.kind == "MatMul"


@dataclass(frozen=True)
class Work:
    """One tick of one configuration. `live` is the largest number of activations that exist at once, `io_bytes` what enters and leaves
    beside the rings, `ring_bytes` the rings as the tensor table has them."""

    config: ModelConfig
    parameters: int
    nodes: tuple[Node, ...]
    live: int
    io_bytes: int
    ring_bytes: int
    ring_item_bytes: int

    @property
    def products(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.is_product)

    @property
    def flops(self) -> int:
        return sum(node.flops for node in self.products)


@dataclass(frozen=True)
class Estimate:
    """What a board needs in one tick. Bytes are those of one tick; `bandwidth_ms` and `compute_ms` with the shares assumed."""

    parameters: int
    flops: float
    weight_bytes: float
    ring_bytes: float
    activation_bytes: float
    bandwidth_ms: float
    compute_ms: float
    launch_ms: float
    memory_bytes: float
    period_ms: float

    @property
    def floor_ms(self) -> float:
        """Memory and arithmetic overlap at best."""
        return max(self.bandwidth_ms, self.compute_ms)

    @property
    def needed_ms(self) -> float:
        return self.floor_ms + self.launch_ms

    @property
    def left_ms(self) -> float:
        return self.period_ms - self.needed_ms

    def fits(self, target: Target) -> bool:
        """In time and in memory, with the reserves of both."""
        in_memory = self.memory_bytes <= (target.memory_gb - RESERVED_GB) * 1e9
        return in_memory and self.needed_ms <= USABLE_SHARE * self.period_ms


# --- counting ---------------------------------------------------------------------------------------------------------


class HollowWeights(Mapping[str, NDArray[np.float32]]):
    """Weights of the right shapes that take no memory: all zeros."""

    def __init__(self, c: ModelConfig) -> None:
        self._shapes = weight_table(c)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return np.broadcast_to(np.float32(0), self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class OutlineGraph(TickGraph):
    """The tick graph with the weights' shapes in place of their values: a model of any size can be counted."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__(c, HollowWeights(c))

    def const(self, value: Any, name: str = "", dtype: Any = np.float32) -> str:
        if name not in self.weights:
            return super().const(value, name, dtype)
        if name not in self.initializers:
            self.initializers[name] = self.stored(name, np.shape(value))
        return name

    def stored(self, name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
        return onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)

    def model(self) -> onnx.ModelProto:
        return self.assemble()  # the checker would ask for values


def moved_elements(model: onnx.ModelProto) -> int:
    """Elements that the nodes of a graph without products read and write, each by itself."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    sizes = _Sizes(graph)
    return sum(sizes.total(node.input) + sizes.total(node.output) for node in graph.node if node.op_type not in _FREE)


@functools.cache
def count(c: ModelConfig) -> Work:
    """The work of one tick, from the graph's own nodes and inferred shapes."""
    graph = onnx.shape_inference.infer_shapes(OutlineGraph(c).build(), strict_mode=True).graph
    sizes = _Sizes(graph)
    rows = tensor_table(c)
    rings = {row.name: row for row in rows if row.name.startswith(("key_", "value_"))}
    learned = weight_table(c)
    origin: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        if node.op_type in ("Transpose", "Reshape"):
            origin[node.output[0]] = origin.get(node.input[0], node.input[0])
        if node.op_type in _FREE:
            continue
        if node.op_type in ("Conv", "Gemm"):
            raise NotImplementedError(f"{node.name}: {node.op_type} is not counted yet; add it to export/cost.py")
        if node.op_type == "MatMul":
            nodes.append(_product(node, sizes, {name for name in node.input if origin.get(name, name) in rings}, learned.keys()))
        else:
            read = sizes.total(node.output) if node.op_type in _PICKS else sizes.total(node.input)
            nodes.append(Node(node.name, node.op_type, moved=read + sizes.total(node.output)))
    return Work(
        c,
        sum(math.prod(shape) for shape in learned.values()),
        tuple(nodes),
        _most_alive(graph, sizes),
        sum(math.prod(row.shape) * np.dtype(row.dtype).itemsize for row in rows if row.name not in rings),
        sum(math.prod(row.shape) * np.dtype(row.dtype).itemsize for row in rings.values()),
        max(np.dtype(row.dtype).itemsize for row in rings.values()),
    )


class _Sizes:
    """Shapes of everything in a graph, by name."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.initializers = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.shapes = dict(self.initializers)
        for value in (*graph.input, *graph.output, *graph.value_info):
            self.shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)

    def total(self, names: Any) -> int:
        return sum(math.prod(self.shapes[name]) for name in names)


def _product(node: onnx.NodeProto, sizes: _Sizes, rings: set[str], learned: Any) -> Node:
    left, right = (sizes.shapes[name] for name in node.input)
    out = sizes.shapes[node.output[0]]
    # A stack of left operands over one matrix is one tall operand.
    rows = left[-2] if len(right) > 2 else math.prod(left[:-1])
    weights = [name for name in node.input if name in sizes.initializers]
    weight = weights[0] if weights else ""
    read = [name for name in node.input if name != weight and name not in rings]
    return Node(
        node.name,
        node.op_type,
        flops=2 * math.prod(out) * left[-1],
        rows=rows,
        weight=weight,
        weight_size=sizes.total(weights),
        learned=weight in learned,
        ring=sizes.total(rings),
        moved=sizes.total(read) + math.prod(out),
    )


def _most_alive(graph: onnx.GraphProto, sizes: _Sizes) -> int:
    """Elements of the activations at the moment when most exist, nothing fused."""
    last_use = {name: i for i, node in enumerate(graph.node) for name in node.input}
    outer = {value.name for value in (*graph.input, *graph.output)} | sizes.initializers.keys()
    alive = most = 0
    for i, node in enumerate(graph.node):
        alive += sizes.total(name for name in node.output if name not in outer)
        most = max(most, alive)
        alive -= sizes.total(name for name in {*node.input, *node.output} if name not in outer and last_use.get(name, i) == i)
    return most


# --- a board ----------------------------------------------------------------------------------------------------------


def estimate(work: Work, target: Target, precision: Precision) -> Estimate:
    """One tick on a board. All but the products is taken to be fused into them; fixed matrices stay in float32."""

    def item_bytes(node: Node) -> float:
        if not node.learned:
            return 4.0
        return precision.float_bytes if node.weight in KEPT_FLOAT else precision.weight_bytes

    products = work.products
    uses = Counter(node.weight for node in products if node.weight)
    stored = {node.weight: node.weight_size * item_bytes(node) for node in products if node.weight}
    # The flow head's weights serve every Euler step: read once if the cache holds them all, at each step otherwise.
    again = sum(stored[name] for name, n in uses.items() if n > 1)
    weight_bytes = sum(size * (1 if again <= target.l2_mb * 1e6 else uses[name]) for name, size in stored.items())
    rows_read = sum(node.moved // 2 for node in work.nodes if node.kind == "Gather")  # of the embedding tables
    weight_bytes += rows_read * precision.float_bytes
    ring_bytes = float(work.ring_bytes)
    activation_bytes = float(sum(node.moved for node in products) * precision.float_bytes + work.io_bytes)

    seconds = 0.0
    for node in products:
        quantized = node.learned and node.weight not in KEPT_FLOAT
        rate = precision.products if quantized else ("fp32" if precision.float_bytes == 4 else "fp16")
        seconds += node.flops / (target.gpu_tops[rate] * 1e12 * COMPUTE_SHARE)
    others = work.parameters - sum(node.weight_size for node in {n.weight: n for n in products if n.learned}.values())
    return Estimate(
        work.parameters,
        work.flops,
        weight_bytes,
        ring_bytes,
        activation_bytes,
        _milliseconds(weight_bytes + ring_bytes + activation_bytes, target, precision),
        seconds * 1e3,
        len(products) * LAUNCH_MS,
        sum(stored.values()) + others * precision.float_bytes + ring_bytes + work.io_bytes + work.live * precision.float_bytes,
        float(work.config.tick_ms),
    )


def _milliseconds(bytes_moved: float, target: Target, precision: Precision) -> float:
    return bytes_moved / (target.bandwidth_gb_s * 1e9 * precision.bandwidth_share) * 1e3


def scaled(c: ModelConfig, width: int) -> ModelConfig:
    """The same shape at another width, a multiple of the width per head or less than that: depth, windows and tokens stay."""

    def along(n: int) -> int:
        return max(8, round(n * width / c.trunk.width / 8) * 8)

    return dataclasses.replace(
        c,
        trunk=dataclasses.replace(c.trunk, width=width, heads=max(1, width // c.head_dim), mlp=along(c.trunk.mlp)),
        video=dataclasses.replace(c.video, hmlp_widths=tuple(along(n) for n in c.video.hmlp_widths)),
        voice=dataclasses.replace(c.voice, flow_width=along(c.voice.flow_width), vocoder_width=along(c.voice.vocoder_width)),
    )


def of_size(c: ModelConfig, parameters: float) -> ModelConfig:
    """The model of this shape whose number of parameters is nearest."""

    def size(width: int) -> int:
        return sum(math.prod(shape) for shape in weight_table(scaled(c, width)).values())

    widths = [*range(8, c.head_dim, 8), *range(c.head_dim, WIDEST, c.head_dim)]
    above = bisect.bisect_left(widths, parameters, key=size)
    return scaled(c, min(widths[max(0, above - 1) : above + 1], key=lambda width: abs(size(width) - parameters)))


def largest(c: ModelConfig, target: Target, precision: Precision) -> ModelConfig | None:
    """The widest model of this shape that fits the board in time and memory; None if even one head is too much."""

    def fits(heads: int) -> bool:
        return estimate(count(scaled(c, heads * c.head_dim)), target, precision).fits(target)

    if not fits(1):
        return None
    low, high = 1, 2
    while high * c.head_dim <= WIDEST and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):  # to 1.5 % of the width: finer than the estimate
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return scaled(c, low * c.head_dim)


# --- the other kind of model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodecShape:
    """A model that speaks codec frames, one temporal step and `steps` depth steps each; the defaults are Moshi's.

    Source: kyutai-labs/moshi, moshi/models/loaders.py (`_lm_kwargs`): 7.7 G parameters, 12.5 frames a second, a depth decoder
    with weights of its own for each of eight codebooks. PersonaPlex has the same shape and sixteen.
    """

    frame_ms: float = 80.0
    width: int = 4096
    layers: int = 32
    text_words: int = 32000
    depth_width: int = 1024
    depth_layers: int = 6
    steps: int = 8
    streams: int = 16
    codes: int = 2048
    # PersonaPlex's 449 products a frame (pull request 103): 4 in each of 32 layers, the text head, 20 in each of 16 depth steps.
    products_per_layer: int = 4
    products_per_step: int = 20

    @property
    def read(self) -> int:
        """Parameters that one frame reads: all layers and heads, and of the embeddings next to nothing."""
        depth = self.steps * (self.depth_layers * _layer(self.depth_width) + self.depth_width * (self.width + self.codes))
        return self.layers * _layer(self.width) + self.width * self.text_words + depth

    @property
    def parameters(self) -> int:
        embeddings = self.width * (self.text_words + self.streams * self.codes)
        return self.read + embeddings + self.depth_width * (self.text_words + (self.steps - 1) * self.codes)

    @property
    def products(self) -> int:
        return self.layers * self.products_per_layer + 1 + self.steps * self.products_per_step


def _layer(width: int) -> int:
    hidden = 4.125 * 2 / 3 * width  # gated, so three matrices
    return round(4 * width**2 + 3 * width * hidden)


MOSHI = CodecShape()


def codec_estimate(parameters: float, memory_s: float, period_ms: float, target: Target, precision: Precision) -> Estimate:
    """A codec-frame model of `parameters` with Moshi's proportions and `memory_s` seconds of past, over a period of `period_ms`.

    In its favour: the codec itself is left out, its activations too, and its past is in the precision's floating point.
    """
    share = parameters / MOSHI.parameters
    frames = period_ms / MOSHI.frame_ms
    read = share * MOSHI.read
    width = MOSHI.width * math.sqrt(share)
    ring_bytes = 2 * MOSHI.layers * width * (memory_s * 1000 / MOSHI.frame_ms) * precision.float_bytes
    flops = 2 * read + 2 * ring_bytes / precision.float_bytes
    weight_bytes = read * precision.weight_bytes
    embeddings = (parameters - read) * precision.float_bytes
    return Estimate(
        round(parameters),
        flops * frames,
        weight_bytes * frames,
        ring_bytes * frames,
        0.0,
        _milliseconds((weight_bytes + ring_bytes) * frames, target, precision),
        flops * frames / (target.gpu_tops[precision.products] * 1e12 * COMPUTE_SHARE) * 1e3,
        MOSHI.products * frames * LAUNCH_MS,
        weight_bytes + embeddings + ring_bytes,
        period_ms,
    )


def largest_codec(memory_s: float, period_ms: float, target: Target, precision: Precision) -> float:
    """Parameters of the largest codec-frame model that fits the board; 0 if none does."""
    low, high = 0.0, 1e12
    while high - low > max(1e5, low / 1000):
        middle = (low + high) / 2
        fits = codec_estimate(middle, memory_s, period_ms, target, precision).fits(target)
        low, high = (middle, high) if fits else (low, middle)
    return low
