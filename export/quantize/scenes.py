"""Calibration data from scenes: people of the training split, played through the device's own loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from device.bundle import Bundle
from device.calibration import CalibrationError, CalibrationRecorder
from device.engine import OnnxRuntimeEngine
from export.distill.corpus import load_corpus
from export.distill.scenes import make_scene, mixture
from export.quantize.recordings import progress
from export.scoreboard.board import SCENE_S
from export.scoreboard.play import play
from export.spoken_words import render_words


def record_scenes(source: Path, data: Path, scenes: int, seed: int, out: Path) -> int:
    """Add `scenes` recordings to the data set `out`; how many ticks. Raises BundleError, CorpusMissing or CalibrationError."""
    bundle = Bundle.open(source)
    config = bundle.config
    corpus, words = load_corpus(data, "train"), render_words(config.text.words)
    engine, length = OnnxRuntimeEngine(bundle.graph, config), config.ticks_in(SCENE_S)
    for number in progress(range(scenes), scenes, "scenes"):
        scene = make_scene(corpus, words, np.random.default_rng([seed, number]), config, length, flawless=True, stage=mixture)
        recorder = CalibrationRecorder(out, config, bundle.digest, number, patient=True)
        play(scene, config, engine, number, recorder.record)
        recorder.close()
        if recorder.fault:
            raise CalibrationError(f"{out} cannot be written: {recorder.fault}; free space or name another place")
    return scenes * length
