"""The whole tick as one ONNX graph: samples, pixels and text in, speech, words and acts out; built from weights alone.

Operators are those that TensorRT 10.3's parser and ONNX Runtime both take, shapes are static, and nodes are named after
the model's modules ("perceive.0/attention/scores").
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from device.config import ModelConfig
from device.dmel import hann, level_thresholds, mel_filters
from device.tensors import Tensor, layer_tokens, layer_window, tensor_table
from export import voice_tables as voice
from export.constants import CLIP_MEAN, CLIP_STD, HMLP_FOLDS, MASKED, NORM_EPS, modality_bias
from export.filters import split_dft

OPSET = 17  # what every supported TensorRT parser reads; 19 is the ceiling
IR_VERSION = 8

Weights = Mapping[str, NDArray[np.float32]]


class GraphBuilder:
    """Appends nodes to a graph; names follow the scope they are made in, and equal constants are stored once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._scope: list[str] = []
        self._used: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._scope.append(name)
        yield
        self._scope.pop()

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; its output's name, or a list of names where there are several."""
        full = "/".join([*self._scope, name or kind])
        count = self._used[full] = self._used.get(full, 0) + 1
        if count > 1:
            full = f"{full}_{count}"
        names = [full] if outputs == 1 else [f"{full}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=full, **attributes))
        return names[0] if outputs == 1 else names

    def const(self, value: Any, name: str = "", dtype: Any = np.float32) -> str:
        """An initializer holding `value`."""
        array = np.ascontiguousarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            wanted = name or "/".join([*self._scope, "const"])
            if wanted in self.initializers:
                wanted = f"{wanted}_{len(self.initializers)}"
            self.initializers[wanted] = numpy_helper.from_array(array, wanted)
            self._constants[key] = wanted
        return self._constants[key]

    def ints(self, *values: int) -> str:
        return self.const(values, dtype=np.int64)

    # Shorthands for what occurs everywhere.

    def add(self, a: str, b: str, name: str = "") -> str:
        return str(self.op("Add", a, b, name=name))

    def mul(self, a: str, b: str | float, name: str = "") -> str:
        return str(self.op("Mul", a, b if isinstance(b, str) else self.const(b), name=name))

    def matmul(self, a: str, b: str, name: str = "") -> str:
        return str(self.op("MatMul", a, b, name=name))

    def reshape(self, x: str, *shape: int, name: str = "") -> str:
        return str(self.op("Reshape", x, self.ints(*shape), name=name))

    def transpose(self, x: str, *perm: int) -> str:
        return str(self.op("Transpose", x, perm=perm))

    def concat(self, *xs: str, axis: int, name: str = "") -> str:
        return str(self.op("Concat", *xs, axis=axis, name=name))

    def slice(self, x: str, start: int, end: int, axis: int = 0) -> str:
        return str(self.op("Slice", x, self.ints(start), self.ints(end), self.ints(axis)))

    def split(self, x: str, sizes: list[int], axis: int) -> list[str]:
        return list(self.op("Split", x, self.ints(*sizes), outputs=len(sizes), axis=axis))


class TickGraph(GraphBuilder):
    """Builds the tick of one model; the methods mirror the modules of `export.distill.model`."""

    def __init__(self, c: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.c, self.weights = c, weights
        self.table = tensor_table(c)

    def build(self) -> onnx.ModelProto:
        """The finished, checked model; its inputs and outputs are exactly the tensor table's."""
        c, k = self.c, self.c.trunk
        x = self.concat(self.audio(), self.video(), self.text(), axis=0, name="tokens")
        cos, sin = (self.reshape(part, c.tokens, c.head_dim // 2) for part in self.split("rope", [1, 1], axis=1))
        for layer in range(c.layers):
            x = self.block(layer, x, cos, sin)
        top = self.norm(x, "norm")
        say = self.head(self.slice(top, 0, c.text.say), "say")
        act = self.reshape(self.head(self.slice(top, c.text.say, c.text.say + 1), "act"), len(c.text.acts))
        self.output("say_prob", self.op("Softmax", say, axis=-1, name="say/probability"))
        self.output("act_prob", self.op("Softmax", act, axis=-1, name="act/probability"))
        chosen = self.op("ArgMax", say, axis=-1, keepdims=0, name="say/choice")
        self.output("say", self.op("Cast", chosen, to=onnx.TensorProto.INT32, name="say/word"))
        acted = self.op("ArgMax", act, axis=-1, keepdims=1, name="act/choice")
        self.output("act", self.op("Cast", acted, to=onnx.TensorProto.INT32, name="act/token"))
        flow_noise, vocoder_noise = self.split("noise", [k.summary_tokens * c.flow_dim, c.tick_samples], axis=0)
        with self.scope("flow"):
            mel = self.flow(top, chosen, acted, self.reshape(flow_noise, k.summary_tokens, c.flow_dim))
        with self.scope("vocoder"):
            self.vocoder(self.reshape(mel, c.mel_frames, c.voice.mel_channels), vocoder_noise)
        return self.model()

    def model(self) -> onnx.ModelProto:
        model = self.assemble()
        onnx.checker.check_model(model, full_check=True)
        return model

    def assemble(self) -> onnx.ModelProto:
        """The nodes as a model, unchecked."""

        def info(name: str, dtype: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

        graph = helper.make_graph(
            self.nodes,
            "tick",
            [info(t.name, t.dtype, t.shape) for t in self.table if t.enters],
            [info(t.name, t.dtype, t.shape) for t in self.table if not t.enters],
            list(self.initializers.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="copresence")

    def output(self, name: str, value: str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"out/{name}"))

    # --- layers ---------------------------------------------------------------------------------------------------

    def weight(self, name: str, transposed: bool = False) -> str:
        value = self.weights[name]
        return self.const(value.T if transposed else value, name)

    def linear(self, x: str, module: str, bias: bool = False, name: str = "") -> str:
        y = self.matmul(x, self.weight(f"{module}.weight", transposed=True), name=name or module.rsplit(".", 1)[-1])
        return self.add(y, self.weight(f"{module}.bias")) if bias else y

    def head(self, x: str, module: str) -> str:
        with self.scope(module):
            return self.linear(x, module, bias=True)

    def norm(self, x: str, module: str) -> str:
        with self.scope(module.rsplit(".", 1)[-1]):
            square = self.op("Pow", x, self.const(2.0))
            mean = self.op("ReduceMean", square, axes=[-1], keepdims=1)
            root = self.op("Sqrt", self.add(mean, self.const(NORM_EPS)))
            return self.mul(self.op("Div", x, root), self.weight(f"{module}.weight"))

    def gelu(self, x: str) -> str:
        with self.scope("gelu"):
            erf = self.op("Erf", self.op("Div", x, self.const(math.sqrt(2.0))))
            return self.mul(self.mul(x, self.add(erf, self.const(1.0))), 0.5)

    # --- tokens ---------------------------------------------------------------------------------------------------

    def audio(self) -> str:
        c, a = self.c, self.c.audio
        with self.scope("audio"):
            levels = self.dmel([self.reshape(name, 1, -1) for name in ("mic", "voice")])
            index = self.add(levels, self.const(np.arange(a.mel_channels) * a.levels))
            rows = self.split(self.op("Cast", index, to=onnx.TensorProto.INT32), [c.audio_tokens] * 2, axis=0)
            parts = []
            for stream, row in zip(("heard", "played"), rows, strict=True):
                vectors = self.op("Gather", self.weight(f"audio.{stream}.weight"), row, name=stream)
                bag = self.op("ReduceSum", vectors, self.ints(1), keepdims=0, name=f"{stream}_sum")
                parts.append(self.norm(bag, f"audio.{stream}_norm"))
            return self.add(self.add(*parts), self.weight("audio.position"))

    def dmel(self, streams: list[str]) -> str:
        """Streams f32[1, n·hop + hop] to levels as f32[streams·n, channels]; DFT in two stages of matrix products."""
        a = self.c.audio
        with self.scope("dmel"):
            samples = self.concat(*streams, axis=0) if len(streams) > 1 else streams[0]
            hop, end = a.hop_samples, self.c.tick_samples
            halves = [self.reshape(self.slice(samples, s, s + end, axis=1), -1, hop) for s in (0, hop)]
            windowed = self.mul(self.concat(*halves, axis=1, name="frames"), self.const(hann(a.window_samples), "audio.window"))
            r, stage1, twiddle, stage2 = split_dft(a.window_samples)
            columns = self.transpose(self.reshape(windowed, -1, r, r), 0, 2, 1)  # [frames, b, a]
            real, imag = self.split(self.matmul(columns, self.const(stage1), name="dft1"), [r, r], axis=2)  # [frames, b, c]
            cos, sin = self.const(twiddle[0]), self.const(twiddle[1])
            turned = [
                self.op("Sub", self.mul(real, cos), self.mul(imag, sin)),
                self.add(self.mul(real, sin), self.mul(imag, cos)),
            ]
            rows = self.concat(*(self.transpose(x, 0, 2, 1) for x in turned), axis=2)  # [frames, c, (re | im) over b]
            real, imag = self.split(self.matmul(rows, self.const(stage2), name="dft2"), [r // 2 + 1] * 2, axis=2)  # [frames, c, d]
            power = self.add(self.mul(real, real), self.mul(imag, imag), name="power")
            magnitude = self.op("Sqrt", self.op("Max", power, self.const(1e-10)), name="magnitude")
            # Bin c + r·d lies at [c, d]; bins past half the rate get no weight.
            filters = np.zeros((r, r // 2 + 1, a.mel_channels), np.float32)
            bins = np.arange(a.window_samples // 2 + 1)
            filters[bins % r, bins // r] = mel_filters(a.sample_rate_hz, len(bins), a.mel_channels).T
            flat = self.reshape(magnitude, -1, r * (r // 2 + 1))
            mel = self.matmul(flat, self.const(filters.reshape(-1, a.mel_channels), "audio.mel_filters"), name="mel")
            above = self.op("Greater", self.reshape(mel, -1, a.mel_channels, 1), self.const(level_thresholds(a), "audio.thresholds"))
            return str(self.op("ReduceSum", self.op("Cast", above, to=onnx.TensorProto.FLOAT), self.ints(-1), keepdims=0, name="levels"))

    def video(self) -> str:
        v = self.c.video
        with self.scope("video"):
            pixels = self.op("Cast", "frames", to=onnx.TensorProto.FLOAT)
            rows, columns = v.height // v.patch, v.width // v.patch
            x = self.reshape(pixels, v.frames, rows, v.patch, columns, v.patch, 3)
            x = self.reshape(self.transpose(x, 1, 3, 0, 2, 4, 5), rows * columns, v.frames, v.patch, v.patch, 3)
            size, channels = v.patch, 3
            with self.scope("hmlp"):
                for i, (t, s) in enumerate(HMLP_FOLDS):
                    time, size = v.frames if i < 3 else 1, size // s
                    x = self.reshape(x, rows * columns, time, t, size, s, size, s, channels)
                    x = self.reshape(self.transpose(x, 0, 1, 3, 5, 2, 4, 6, 7), rows * columns * time * size * size, t * s * s * channels)
                    x = self.linear(x, f"video.hmlp.projections.{i}", name=f"projection{i}") if i else self.pixel_projection(x)
                    if i < 3:
                        channels = v.hmlp_widths[i]
                        x = self.gelu(self.norm(x, f"video.hmlp.norms.{i}"))
                x = self.norm(x, "video.hmlp.final_norm")
            age = self.mul(self.op("Clip", "frame_age", self.const(0.0), self.const(2.0)), self.weight("video.age"))
            return self.add(self.add(x, self.weight("video.position")), age)

    def pixel_projection(self, pixels: str) -> str:
        """The first fold on raw values 0..255: /255 and CLIP's mean and deviation are part of its weights (saves 0.6 ms of 5.8)."""
        weight = self.weights["video.hmlp.projections.0.weight"].astype(np.float64).reshape(-1, 25, 3)
        scaled = (weight / (255 * np.array(CLIP_STD))).reshape(len(weight), -1)
        bias = -(weight * np.array(CLIP_MEAN) / np.array(CLIP_STD)).sum(axis=(1, 2))
        return self.add(self.matmul(pixels, self.const(scaled.T, "video.hmlp.projections.0.weight"), name="projection0"), self.const(bias))

    def text(self) -> str:
        c, k, t = self.c, self.c.trunk, self.c.text
        with self.scope("text"):

            def placed(x: str, first: int, count: int) -> str:
                parts = [self.const(np.zeros((first, k.width)))] if first else []
                rest = k.summary_tokens - first - count
                parts += [x] + ([self.const(np.zeros((rest, k.width)))] if rest else [])
                return self.concat(*parts, axis=0) if len(parts) > 1 else x

            text_in = self.op("Gather", self.weight("text.text_in.weight"), "text_in", name="text_in")
            said = self.op("Gather", self.weight("text.said.weight"), "said", name="said")
            acted = self.op("Gather", self.weight("text.acted.weight"), "acted", name="acted")
            clock = self.linear(self.reshape("clock", 1, 2 * len(k.clock_periods_s)), "text.clock")
            x = self.add(self.weight("text.slot"), placed(text_in, 0, t.text_in))
            x = self.add(self.add(x, placed(said, 0, t.say)), placed(acted, t.say, 1))
            return self.add(x, placed(clock, c.trunk.summary_tokens - 1, 1))

    # --- transformer ----------------------------------------------------------------------------------------------

    def block(self, layer: int, x: str, cos: str, sin: str) -> str:
        c, k = self.c, self.c.trunk
        perceiving = layer < k.perceive_layers
        module = f"perceive.{layer}" if perceiving else f"present.{layer - k.perceive_layers}"
        tokens, window, asked = layer_tokens(c, layer), layer_window(c, layer), layer_tokens(c, layer)
        with self.scope(module):
            if not perceiving:
                cos, sin = (self.slice(r, c.tokens - tokens, c.tokens) for r in (cos, sin))
            joint = self.linear(self.norm(x, f"{module}.norm1"), f"{module}.qkv")
            heads = self.transpose(self.reshape(joint, tokens, 3, k.heads, c.head_dim), 1, 2, 0, 3)
            turning, value = self.split(heads, [2, 1], axis=0)
            a, b = self.split(turning, [c.head_dim // 2] * 2, axis=3)
            with self.scope("rope"):
                turned = [
                    self.op("Sub", self.mul(a, cos), self.mul(b, sin)),
                    self.add(self.mul(a, sin), self.mul(b, cos)),
                ]
                query, key = self.split(self.concat(*turned, axis=3), [1, 1], axis=0)
            query, key, value = (self.reshape(part, k.heads, tokens, c.head_dim) for part in (query, key, value))
            self.output(f"new_key_{layer}", key)
            self.output(f"new_value_{layer}", value)
            if layer == k.perceive_layers - 1:  # from here on only the summary tokens go up
                asked = k.summary_tokens
                query, x = self.slice(query, tokens - asked, tokens, axis=1), self.slice(x, tokens - asked, tokens)
            with self.scope("attention"):
                attended = self.attention(layer, query, key, value, asked, tokens, window)
            x = self.add(x, self.linear(attended, f"{module}.out"))
            with self.scope("mlp"):
                hidden = self.gelu(self.linear(self.norm(x, f"{module}.norm2"), f"{module}.up"))
                return self.add(x, self.linear(hidden, f"{module}.down"))

    def attention(self, layer: int, query: str, key: str, value: str, asked: int, tokens: int, window: int) -> str:
        c, k = self.c, self.c.trunk
        perceiving = layer < k.perceive_layers
        query = self.mul(query, c.head_dim**-0.5)
        past = self.matmul(query, self.transpose(f"key_{layer}", 0, 2, 1), name="past_scores")
        now = self.matmul(query, self.transpose(key, 0, 2, 1), name="scores")
        past = self.add(past, self.past_bias(perceiving, tokens, window))
        if perceiving:
            bias = modality_bias(c)[-asked:]
            now = self.add(now, self.const(bias))
            if (bias != 0).any():
                past = self.add(past, self.const(np.tile(bias, (1, window))))
        weights = self.op("Softmax", self.concat(past, now, axis=2), axis=2)
        past, now = self.split(weights, [window * tokens, tokens], axis=2)
        attended = self.add(self.matmul(past, f"value_{layer}", name="past_values"), self.matmul(now, value, name="values"))
        return self.reshape(self.transpose(attended, 1, 0, 2), asked, k.width)

    def past_bias(self, perceiving: bool, tokens: int, window: int) -> str:
        """f32[1, window·tokens]: 0 for keys of a slot that holds a tick, MASKED for the rest."""
        valid = "perceive_valid" if perceiving else "present_valid"
        bias = self.mul(self.op("Sub", valid, self.const(1.0)), -MASKED)
        spread = self.op("Expand", self.reshape(bias, window, 1), self.ints(window, tokens))
        return self.reshape(spread, 1, window * tokens)

    # --- speech ---------------------------------------------------------------------------------------------------

    def flow(self, top: str, chosen: str, acted: str, noise: str) -> str:
        c, s = self.c, self.c.voice
        x = self.add(top, self.weight("flow.place"))
        for i, word in enumerate(self.split(chosen, [1] * c.text.say, axis=0)):
            x = self.add(x, self.op("Gather", self.weight(f"flow.chosen.{i}.weight"), word, name=f"chosen{i}"))
        x = self.add(x, self.op("Gather", self.weight("flow.chosen_act.weight"), acted, name="chosen_act"))
        past = self.linear(self.reshape("vocoder_mel", 1, -1), "flow.past")
        conditions = self.add(self.linear(x, "flow.condition", bias=True), past)
        x = noise
        for step in range(s.flow_steps):
            with self.scope(f"step{step}"):
                h = self.add(
                    self.add(self.linear(x, "flow.enter", bias=True), conditions), self.const(self.weights["flow.step.weight"][step])
                )
                for i in range(s.flow_blocks):
                    inner = self.gelu(self.linear(self.norm(h, f"flow.norms.{i}"), f"flow.ups.{i}", bias=True, name="up"))
                    h = self.add(h, self.linear(inner, f"flow.downs.{i}", bias=True, name="down"))
                predicted = self.linear(self.norm(h, "flow.final_norm"), "flow.leave", bias=True)
                # Euler's step towards the predicted end: dt / (1 - t) = 1 / (steps left)
                x = self.add(x, self.mul(self.op("Sub", predicted, x), 1 / (s.flow_steps - step)))
        return x

    def vocoder(self, mel: str, noise: str) -> None:
        """Mel f32[F, 80] and noise f32[200 F] to `speech` and the vocoder's new state."""
        frames, hop = self.c.mel_frames, voice.HOP_SAMPLES
        clipped = self.op("Clip", mel, self.const(voice.SILENCE), self.const(voice.MEL_TOP))
        height = self.concat("vocoder_mel", self.op("Sub", clipped, self.const(voice.SILENCE)), axis=0, name="height")  # [F + 2, 80]
        near = self.concat(*(self.slice(height, i, i + frames) for i in range(3)), axis=1)
        hidden = self.concat("vocoder_hidden", self.gelu(self.linear(near, "vocoder.first", bias=True)), axis=0)  # [F + 2, W]
        pair = self.concat(self.slice(hidden, 0, frames + 1), self.slice(hidden, 1, frames + 2), axis=1)
        out = self.linear(self.gelu(self.linear(pair, "vocoder.second", bias=True)), "vocoder.out", bias=True)  # [F + 1, 129]
        self.output("new_vocoder_mel", self.slice(height, frames, frames + 2))
        self.output("new_vocoder_hidden", self.slice(hidden, frames, frames + 2))
        logit, pulse_share, noise_share = self.split(out, [1, voice.BANDS, voice.BANDS], axis=1)

        with self.scope("gains"):
            bands = self.matmul(self.slice(height, 1, frames + 2), self.const(voice.mel_to_bands(), "vocoder.mel_to_bands"))
            magnitude = self.op("Exp", self.add(self.mul(bands, voice.MEL_STD), self.const(voice.LOG_FLOOR)))
            opened = self.op("Relu", self.op("Sub", magnitude, self.const(voice.GATE)))
            spectrum = self.const(voice.bands_to_spectrum(), "vocoder.bands_to_spectrum")
            gains = []  # [F + 1, 514] of the pulses and of the noise
            for share in (pulse_share, noise_share):
                limited = self.op("Exp", self.op("Min", share, self.const(voice.SHARE_TOP)))
                gains.append(self.matmul(self.mul(opened, limited), spectrum))

        with self.scope("pitch"):
            octaves = math.log(voice.PITCH_HIGH_HZ / voice.PITCH_LOW_HZ)
            log_hz = self.add(
                self.mul(self.op("Sigmoid", self.slice(logit, 1, frames + 1)), octaves), self.const(math.log(voice.PITCH_LOW_HZ))
            )
            steps = self.mul(self.op("Exp", log_hz), voice.PHASE_UNITS / voice.RATE_HZ / voice.PITCH_STEP)
            units = self.mul(self.op("Round", steps), voice.PITCH_STEP)  # [F, 1], 2**-16 cycle per sample
            # Integers below 2**24 from here to the phase: exact in float32.
            after = self.add(self.mul(self.op("CumSum", units, self.const(0, dtype=np.int64)), float(hop)), "vocoder_phase")
            before = self.op("Sub", after, self.mul(units, float(hop)))
            phase = self.wrap(self.add(before, self.mul(units, self.const(np.arange(1, hop + 1)[None]))))  # [F, 200]
            last = self.op("ReduceMean", self.slice(height, frames + 1, frames + 2), axes=[0, 1], keepdims=0)
            silent = self.op("Less", self.reshape(last, 1), self.const([voice.SILENT_ABOVE]))
            end = self.wrap(self.reshape(self.slice(after, frames - 1, frames), 1))
            self.output("new_vocoder_phase", self.op("Where", silent, self.const([0.0]), end))

        with self.scope("source"):
            ratio = self.op("Div", self.const(voice.PULSE_HZ / voice.RATE_HZ * voice.PHASE_UNITS), units)
            k = self.mul(ratio, ratio)
            half = self.op("Sin", self.mul(phase, math.pi / voice.PHASE_UNITS))
            shape = self.op("Exp", self.mul(self.mul(self.mul(k, -2.0), half), half))
            pulses = self.mul(shape, self.op("Sqrt", self.op("Sqrt", self.mul(k, 4.0 * math.pi))))
            sources = [pulses, self.reshape(noise, frames, hop)]

        with self.scope("filter"):
            analysis, parts = self.const(voice.analysis(), "vocoder.analysis"), []
            for source, gain in zip(sources, gains, strict=True):
                fading_out, fading_in = self.split(self.matmul(source, analysis), [2 * voice.BINS] * 2, axis=1)
                parts.append(self.mul(fading_out, self.slice(gain, 0, frames)))
                parts.append(self.mul(fading_in, self.slice(gain, 1, frames + 1)))
            spectrum = self.add(self.add(parts[0], parts[2]), self.add(parts[1], parts[3]))
            rows = self.matmul(spectrum, self.const(voice.synthesis(), "vocoder.synthesis"))  # [F, 512]
            # Overlap-add: three pieces of each row, one row further down each time.
            total = ""
            for i in range(-(-voice.DFT // hop)):
                piece = self.slice(rows, i * hop, min((i + 1) * hop, voice.DFT), axis=1)
                short = max(0, (i + 1) * hop - voice.DFT)
                if short:
                    piece = self.concat(piece, self.const(np.zeros((frames, short))), axis=1)
                around = [self.const(np.zeros((n, hop))) for n in (i, 2 - i) if n]
                piece = self.concat(*(around[:1] if i else []), piece, *(around[-1:] if i < 2 else []), axis=0)
                total = self.add(total, piece) if total else piece
            size = (frames + 2) * hop
            samples = self.reshape(total, size)
            ringing = self.concat("vocoder_tail", self.const(np.zeros(size - voice.FIR_SAMPLES)), axis=0)
            samples = self.add(samples, ringing)
            self.output("speech", self.slice(samples, 0, frames * hop))
            self.output("new_vocoder_tail", self.slice(samples, frames * hop, frames * hop + voice.FIR_SAMPLES))

    def wrap(self, phase: str) -> str:
        """Whole cycles taken off, exactly: into [-2**15, 2**15)."""
        cycles = self.op("Floor", self.add(self.mul(phase, 1 / voice.PHASE_UNITS), self.const(0.5)))
        return str(self.op("Sub", phase, self.mul(cycles, float(voice.PHASE_UNITS))))


def build_graph(c: ModelConfig, weights: Weights) -> onnx.ModelProto:
    """The tick of the model with these weights (names and shapes as in `export.checkpoint.weight_table`)."""
    return TickGraph(c, weights).build()


def build_front_end(c: ModelConfig) -> onnx.ModelProto:
    """The graph's dMel front end alone: `samples` f32[tick + context] to `levels` u8[audio_tokens, channels]."""
    graph = TickGraph(c, {})
    levels = graph.dmel([graph.reshape("samples", 1, -1)])
    graph.nodes.append(helper.make_node("Cast", [levels], ["levels"], name="out/levels", to=onnx.TensorProto.UINT8))
    size = c.tick_samples + c.context_samples
    graph.table = (
        Tensor("samples", "input", "float32", (size,), "full scale ±1", "samples of one tick and the context before it"),
        Tensor("levels", "output", "uint8", (c.audio_tokens, c.audio.mel_channels), "level", "dMel levels"),
    )
    return graph.model()
