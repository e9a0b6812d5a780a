"""What training minimises: words and hands alone, then whole scenes with speech."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device.config import ModelConfig
from device.positions import rope_table
from export.distill.model import RMSNorm, TickModel, attend_windowed, blocks
from export.distill.scenes import IGNORE
from export.distill.voice import word_mels
from export.voice_tables import SILENCE

EVENT_WEIGHT = 2.0  # of a tick in which something is said or done; 3 fires falsely (measured on the prototype)
SILENT_WEIGHT = 0.1  # of a silent token in the flow loss
WORD_LABELS, HAND_LABELS = 12, 11  # none, the corpus' ten words, another word; none, the ten digits


class Auxiliary(nn.Module):
    """Heads that exist in training only: which word just ended, which hand is shown, read from the perception tokens."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        width = c.trunk.width
        self.word_norm, self.hand_norm = RMSNorm(c.audio_tokens * width), RMSNorm(width)
        self.word = nn.Linear(c.audio_tokens * width, WORD_LABELS)
        self.hand = nn.Linear(width, HAND_LABELS)

    def words(self, audio: Tensor) -> Tensor:
        """Audio tokens [..., audio_tokens, width] to logits [..., WORD_LABELS]."""
        return self.word(self.word_norm(audio.flatten(-2)))

    def hands(self, video: Tensor) -> Tensor:
        """Video tokens [..., video_tokens, width] to logits [..., HAND_LABELS]."""
        return self.hand(self.hand_norm(video.mean(-2)))


def perceive_kind(model: TickModel, tokens: Tensor, rope: Tensor) -> Tensor:
    """One kind of perception token alone, [B, T, n, width], through all perceiving layers but the last: what it is in a whole scene too."""
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool)
    for block in blocks(model.perceive)[:-1]:
        q, k, v = block.keys_values(tokens, rope)
        tokens = block.finish(tokens, attend_windowed(q, k, v, valid, model.config.trunk.perceive_window))
    return tokens


def perception_loss(model: TickModel, heads: Auxiliary, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses and accuracies of the first stage."""
    c = model.config
    n, ticks = batch["mic"].shape[0], (batch["mic"].shape[1] - c.context_samples) // c.tick_samples
    rope = torch.from_numpy(rope_table(c, np.arange(ticks)))
    audio = model.audio(batch["mic"], torch.zeros_like(batch["mic"]), ticks)
    audio = perceive_kind(model, audio, rope[:, : c.audio_tokens].expand(n, -1, -1, -1, -1))
    words = heads.words(audio[torch.arange(n), batch["end_tick"]])
    video = model.video(batch["frames"][:, None], torch.zeros(n, 1, 1))
    hands = heads.hands(
        perceive_kind(model, video, rope[:1, c.audio_tokens : c.audio_tokens + c.video_tokens].expand(n, -1, -1, -1, -1))[:, 0]
    )
    pairs = ((words.float(), batch["word"]), (hands.float(), batch["hand"]))
    return {
        "loss": torch.stack([F.cross_entropy(x, label, ignore_index=IGNORE, label_smoothing=0.05) for x, label in pairs]).sum(),
        "word": _accuracy(*pairs[0]),
        "hand": _accuracy(*pairs[1]),
    }


class SpeechTarget:
    """Which mel frames belong to which tick, given the words that were begun."""

    def __init__(self, c: ModelConfig) -> None:
        mels = word_mels(c.text.words[1:], c.mel_frames)
        frames, channels = c.mel_frames, c.voice.mel_channels
        self.longest = max(len(m) for m in mels.values()) // frames
        table = np.full((len(c.text.words), self.longest * frames, channels), SILENCE, dtype=np.float32)
        self.lengths = torch.zeros(len(c.text.words), dtype=torch.long)
        for i, word in enumerate(c.text.words):
            if i:
                table[i, : len(mels[word])] = mels[word]
                self.lengths[i] = len(mels[word]) // frames
        self.table = torch.from_numpy(table).reshape(
            len(c.text.words), self.longest, c.trunk.summary_tokens, frames // c.trunk.summary_tokens * channels
        )

    def __call__(self, say: Tensor) -> tuple[Tensor, Tensor]:
        """say i64[B, T] to mel f32[B, T, summary_tokens, flow_dim] and bool[B, T], true where a word sounds."""
        word, phase = torch.zeros_like(say), torch.zeros_like(say)
        for t in range(say.shape[1]):
            if t:
                word[:, t], phase[:, t] = word[:, t - 1], phase[:, t - 1] + 1
            begins = say[:, t] > 0
            word[:, t] = torch.where(begins, say[:, t], word[:, t])
            phase[:, t] = torch.where(begins, 0, phase[:, t])
        sounds = phase < self.lengths[word]
        return self.table[torch.where(sounds, word, 0), torch.where(sounds, phase, 0)], sounds


def scene_loss(model: TickModel, heads: Auxiliary, target: SpeechTarget, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of the second stage: what to say and do, the speech itself, and the auxiliary heads."""
    c = model.config
    scene = batch | {"valid": ~batch["lost"]}
    probe: list[Tensor] = []
    x, _ = model.perceive_scene(model.embed(scene), scene["rope"], scene["valid"], probe)
    top, _ = model.present_scene(x, scene["rope"], scene["valid"])
    say, act = (logits.float() for logits in model.logits(top))

    heard = scene["valid"].float()
    first, rest = say[..., 0, :], say[..., 1:, :]
    say_loss = _events(first, batch["say_target"].long(), batch["say_weight"] * heard)
    act_loss = _events(act, batch["act_target"].long(), batch["act_weight"] * heard)
    rest_loss = -rest.log_softmax(-1)[..., 0].mean()

    mel, sounds = target(batch["say_now"][..., 0].long())
    conditions = model.flow.conditions(top, batch["say_now"].long())
    weight = torch.where(sounds, 1.0, SILENT_WEIGHT)[..., None] * heard[..., None]
    flow_loss = (model.flow.loss(conditions.float(), mel) * weight).sum() / (weight.sum() * c.trunk.summary_tokens)

    a = c.audio_tokens
    words, hands = heads.words(probe[0][:, :, :a]).float(), heads.hands(probe[0][:, :, a : a + c.video_tokens]).float()
    word_label, hand_label = (torch.where(scene["valid"], batch[k].long(), IGNORE) for k in ("word_label", "hand_label"))
    weights = torch.ones(WORD_LABELS)
    weights[0] = 0.2  # most ticks end no word
    word_loss = F.cross_entropy(words.flatten(0, 1), word_label.flatten(), weight=weights, ignore_index=IGNORE)
    hand_loss = F.cross_entropy(hands.flatten(0, 1), hand_label.flatten(), ignore_index=IGNORE)
    return {
        "loss": 4 * (say_loss + act_loss + rest_loss) + flow_loss + 0.5 * (word_loss + hand_loss),
        "say": say_loss,
        "act": act_loss,
        "flow": flow_loss,
        "word": _accuracy(words, word_label),
        "hand": _accuracy(hands, hand_label),
        "say_hit": _accuracy(first, torch.where(batch["say_weight"] > 0, batch["say_target"].long(), 0)),
        "act_hit": _accuracy(act, torch.where(batch["act_weight"] > 0, batch["act_target"].long(), 0)),
        "false": ((first.argmax(-1) > 0) & (batch["say_target"] == 0) & (batch["say_weight"] > 0)).float().mean()
        + ((act.argmax(-1) > 0) & (batch["act_target"] == 0) & (batch["act_weight"] > 0)).float().mean(),
    }


def _events(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    weight = weight * torch.where(target > 0, EVENT_WEIGHT, 1.0)
    return (F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") * weight.flatten()).sum() / weight.sum()


def _accuracy(logits: Tensor, label: Tensor) -> Tensor:
    asked = label > 0
    return ((logits.argmax(-1) == label) & asked).float().sum() / asked.float().sum().clamp_min(1)
