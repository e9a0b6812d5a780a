"""Random scenes and models for the tests of the tick: inputs by the tensor table's names, and the three ways to run them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from device.config import AudioConfig, ModelConfig, TextConfig, TrunkConfig, VoiceConfig
from device.engine import OnnxRuntimeEngine
from device.positions import clock_features, rope_table, tick_noise
from device.session import Rings
from device.tensors import tensor_table
from export.distill.finish import absorb
from export.distill.model import TickModel
from export.graph import build_graph

TEXT = TextConfig(words=("", "one", "two", "three", "ok"), acts=("none", "look_up", "nod"))
FULL = ModelConfig(audio=AudioConfig(level_low=-4.5, level_high=1.2), text=TEXT)
SMALL = ModelConfig(
    audio=AudioConfig(level_low=-4.5, level_high=1.2),
    text=TEXT,
    trunk=TrunkConfig(width=32, heads=2, mlp=64, perceive_layers=2, present_layers=1, perceive_window=3, present_window=5),
    voice=VoiceConfig(flow_width=32, flow_blocks=1, vocoder_width=16),
)

Scene = dict[str, np.ndarray]


def make_model(config: ModelConfig, seed: int = 0) -> TickModel:
    """A model with random weights whose vocoder is audible."""
    torch.manual_seed(seed)
    model = TickModel(config).eval()
    with torch.no_grad():
        model.flow.leave.bias += 0.5  # well above silence
    return model


def make_scene(config: ModelConfig, ticks: int, seed: int = 0) -> Scene:
    """Random inputs of `ticks` ticks, [ticks, …] as in the tensor table; mic and voice as streams with their context first."""
    rng = np.random.default_rng(seed)
    samples = ticks * config.tick_samples + config.context_samples
    t, v = config.text, config.video
    return {
        "mic": (0.05 * rng.standard_normal(samples)).astype(np.float32),
        "voice": (0.02 * rng.standard_normal(samples)).astype(np.float32),
        "frames": rng.integers(0, 256, (ticks, v.frames, v.height, v.width, 3)).astype(np.uint8),
        "frame_age": rng.uniform(0, 1.5, (ticks, 1)).astype(np.float32),
        "text_in": rng.integers(0, len(t.words), (ticks, t.text_in)).astype(np.int32),
        "said": rng.integers(0, len(t.words), (ticks, t.say)).astype(np.int32),
        "acted": rng.integers(0, len(t.acts), (ticks, 1)).astype(np.int32),
        "clock": clock_features(config, np.arange(ticks)),
        "rope": rope_table(config, np.arange(ticks)),
        "noise": np.stack([tick_noise(config, 1, tick) for tick in range(ticks)]),
        "tick": np.arange(ticks),
        "valid": np.ones(ticks, np.int64),
    }


def tick_inputs(config: ModelConfig, scene: Scene, tick: int) -> Scene:
    """The inputs of one tick."""
    span = slice(tick * config.tick_samples, (tick + 1) * config.tick_samples + config.context_samples)
    names = scene.keys() - {"tick", "valid"}  # a streaming step keeps count itself
    return {name: scene[name][span] if name in ("mic", "voice") else scene[name][tick] for name in names}


def run_forward(model: TickModel, scene: Scene) -> Scene:
    """Outputs and updates of every tick by the training forward, [ticks, …]."""
    batch = {name: torch.from_numpy(values)[None] for name, values in scene.items()}
    with torch.no_grad():
        out = {name: value[0].numpy() for name, value in model(batch).items()}
    out["speech"] = out["speech"].reshape(len(scene["said"]), -1)
    return out


def run_steps(model: TickModel, scene: Scene) -> Scene:
    """The same by the streaming step."""
    c = model.config
    state = {row.name: torch.zeros(row.shape) for row in tensor_table(c) if row.role == "state"}
    valid = {"perceive_valid": torch.zeros(c.trunk.perceive_window), "present_valid": torch.zeros(c.trunk.present_window)}
    kept: dict[str, list[np.ndarray]] = {}
    for tick in range(len(scene["said"])):
        inputs = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tick_inputs(c, scene, tick).items()}
        out = model.step(state | valid | inputs)
        for name, value in out.items():
            kept.setdefault(name, []).append(value.numpy().copy())
        absorb(c, state, valid, out, tick)
    return {name: np.stack(values) for name, values in kept.items()}


def run_engine(engine: OnnxRuntimeEngine, config: ModelConfig, scene: Scene) -> Scene:
    """The same by an engine, with the device's rings as memory."""
    rings = Rings(config, engine)
    kept: dict[str, list[np.ndarray]] = {}
    for tick in range(len(scene["said"])):
        for name, value in tick_inputs(config, scene, tick).items():
            engine.inputs[name][...] = value
        engine.run()
        for name, value in engine.outputs.items():
            kept.setdefault(name, []).append(value.copy())
        rings.absorb(tick)
    return {name: np.stack(values) for name, values in kept.items()}


def make_engine(model: TickModel, folder: Path) -> OnnxRuntimeEngine:
    """The model's graph on ONNX Runtime."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    onnx.save(build_graph(model.config, weights), folder / "graph.onnx")
    return OnnxRuntimeEngine(folder / "graph.onnx", model.config)
