"""What training minimises: words and hands alone, whole scenes with speech, and speech alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device.config import ModelConfig
from device.positions import rope_table
from export.distill.model import RMSNorm, TickModel, attend_windowed, blocks
from export.distill.pictures import IGNORE
from export.distill.voice import above_silence, word_mels
from export.voice_tables import MEL_CHANNELS, PAST_FRAMES, SILENCE

EVENT_WEIGHT = 2.0  # of a tick in which something is said or done; 3 fires falsely (measured on the prototype)
SILENT_WEIGHT = 0.1  # of a silent token in the flow loss
OWN_PAST = 0.5  # of the ticks in which the flow head goes on from mel of its own, as in life; in the rest from the true one
DRAWS = 8  # of noise and Euler step in a stage of the voice, from the same top states
SMOOTHING = 0.05  # of the labels of words and hands alone
HOLD = 3.0  # weight of what the summary tokens of scenes moved, by their own size
READING_WEIGHT = 20.0  # of a tick in which text arrives, in what they moved: one in 24 in such scenes, so that all of them weigh half
SOFT = 0.5  # the teacher's part, where there is one; the rest is the oracle's
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
    valid = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    tick = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
    for block in blocks(model.perceive)[:-1]:
        q, k, v = block.keys_values(tokens, rope)
        tokens = block.finish(tokens, attend_windowed(q, k, v, tick, valid, model.config.trunk.perceive_window))
    return tokens


def perceived(model: TickModel, heads: Auxiliary, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the word that each tick hears the end of, [n, T, labels], and of each hand, [m, labels], in a batch of both."""
    c, mic = model.config, batch["mic"]
    n, ticks = mic.shape[0], (mic.shape[1] - c.context_samples) // c.tick_samples
    rope = torch.from_numpy(rope_table(c, np.arange(ticks))).to(mic.device)
    audio = model.audio(mic, batch["voice"], ticks)
    audio = perceive_kind(model, audio, rope[:, : c.audio_tokens].expand(n, -1, -1, -1, -1))
    shown = len(batch["frames"])
    video = model.video(batch["frames"][:, None], torch.zeros(shown, 1, 1, device=mic.device))
    video = perceive_kind(model, video, rope[:1, c.audio_tokens : c.audio_tokens + c.video_tokens].expand(shown, -1, -1, -1, -1))
    return heads.words(audio), heads.hands(video[:, 0])


def perception_loss(model: TickModel, heads: Auxiliary, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses and accuracies of the first stage."""
    words, hands = (logits.float() for logits in perceived(model, heads, batch))
    losses = [_word_loss(words, batch["word"], SMOOTHING), F.cross_entropy(hands, batch["hand"], label_smoothing=SMOOTHING)]
    if "soft_word" in batch:
        every = torch.ones_like(words[..., 0])
        soft = [_towards(words, batch["soft_word"], every), F.cross_entropy(hands, batch["soft_hand"])]
        losses = [torch.lerp(own, teacher, SOFT) for own, teacher in zip(losses, soft, strict=True)]
    return {"loss": losses[0] + losses[1], "word": _accuracy(words, batch["word"]), "hand": _accuracy(hands, batch["hand"])}


def practice_loss(model: TickModel, heads: Auxiliary, before: TickModel, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Losses of words and hands in batch["practice"], and how far what is above would have to read anew in the scenes of `batch`.

    That is held to what `before` perceives (less-forgetting learning, Jung et al. 2016, arXiv 1607.00122), see `drift`.
    """
    perception = perception_loss(model, heads, batch["practice"])
    with torch.no_grad():
        old, _ = before.perceive_scene(before.embed(batch), batch)
    new, _ = model.perceive_scene(model.embed(batch), batch)
    moved = drift(old, new, batch)
    return perception | {"loss": perception["loss"] + HOLD * moved, "drift": moved}


def drift(old: Tensor, new: Tensor, batch: dict[str, Any]) -> Tensor:
    """Squared distance of the summary tokens that leave the perceiving layers, [B, T, S, width], from what they were, by their size.

    A tick in which text arrives counts READING_WEIGHT times, one that was lost not at all.
    """
    weight = (batch["valid"] * torch.where((batch["text_in"] > 0).any(-1), READING_WEIGHT, 1.0))[..., None, None]
    return ((new - old).float().square() * weight).sum() / (old.float().square() * weight).sum()


class SpeechTarget(nn.Module):
    """Which mel frames belong to which tick, given the words that were begun."""

    table: Tensor
    lengths: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        mels = word_mels(c.text.words[1:], c.mel_frames)
        frames, channels = c.mel_frames, c.voice.mel_channels
        self.longest = max(len(m) for m in mels.values()) // frames
        table = np.full((len(c.text.words), self.longest * frames, channels), SILENCE, dtype=np.float32)
        lengths = torch.zeros(len(c.text.words), dtype=torch.long)
        for i, word in enumerate(c.text.words):
            if i:
                table[i, : len(mels[word])] = mels[word]
                lengths[i] = len(mels[word]) // frames
        shape = len(c.text.words), self.longest, c.trunk.summary_tokens, frames // c.trunk.summary_tokens * channels
        self.register_buffer("table", torch.from_numpy(table).reshape(shape), persistent=False)
        self.register_buffer("lengths", lengths, persistent=False)

    def forward(self, say: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
        """say i64[B, T], cut bool[B, T] to mel f32[B, T, summary_tokens, flow_dim] and bool[B, T], true where a word sounds.

        With `cut` the word that sounds is broken off before this tick.
        """
        tick = torch.arange(say.shape[1], device=say.device).expand_as(say)
        # Never a loop over ticks: compiled, it made a forward 20 times slower.
        begun = torch.where((say > 0) | cut, tick, -1).cummax(1).values  # the tick in which the latest word began, or was broken off
        word, phase = torch.where(begun < 0, 0, say.gather(1, begun.clamp_min(0))), tick - begun
        sounds = phase < self.lengths[word]
        return self.table[torch.where(sounds, word, 0), torch.where(sounds, phase, 0)], sounds


def scene_loss(model: TickModel, heads: Auxiliary, target: SpeechTarget, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Losses of the second stage: what to say and do, the speech itself, the auxiliary heads, and more of the first stage."""
    c = model.config
    probe: list[Tensor] = []
    x, _ = model.perceive_scene(model.embed(batch), batch, probe)
    top, _ = model.present_scene(x, batch)
    say, act = (logits.float() for logits in model.logits(top))

    heard = batch["valid"].float()
    first, rest = say[..., 0, :], say[..., 1:, :]
    say_loss = _events(first, batch["say_target"].long(), batch["say_weight"] * heard)
    act_loss = _events(act, batch["act_target"].long(), batch["act_weight"] * heard)
    if "soft_say" in batch:
        say_loss = torch.lerp(say_loss, _towards(first, batch["soft_say"], heard), SOFT)
        act_loss = torch.lerp(act_loss, _towards(act, batch["soft_act"], heard), SOFT)
    rest_loss = -rest.log_softmax(-1)[..., 0].mean()

    speech_loss = flow_loss(model, target, top, batch)

    a = c.audio_tokens
    words, hands = heads.words(probe[0][:, :, :a]).float(), heads.hands(probe[0][:, :, a : a + c.video_tokens]).float()
    word_label, hand_label = (torch.where(batch["valid"] > 0, batch[k].long(), IGNORE) for k in ("word_label", "hand_label"))
    word_loss = _word_loss(words, word_label)
    hand_loss = _labelled(hands, hand_label, torch.ones_like(hands[0, 0]))
    practice = {"loss": word_loss.new_zeros(()), "word": _accuracy(words, word_label), "hand": _accuracy(hands, hand_label)}
    if "practice" in batch:
        practice = perception_loss(model, heads, batch["practice"])
    return {
        "loss": 4 * (say_loss + act_loss + rest_loss) + speech_loss + 0.5 * (word_loss + hand_loss + practice["loss"]),
        "say": say_loss,
        "act": act_loss,
        "flow": speech_loss,
        "word": practice["word"],
        "hand": practice["hand"],
        "say_hit": _accuracy(first, torch.where(batch["say_weight"] > 0, batch["say_target"].long(), 0)),
        "act_hit": _accuracy(act, torch.where(batch["act_weight"] > 0, batch["act_target"].long(), 0)),
        "false": ((first.argmax(-1) > 0) & (batch["say_target"] == 0) & (batch["say_weight"] > 0)).float().mean()
        + ((act.argmax(-1) > 0) & (batch["act_target"] == 0) & (batch["act_weight"] > 0)).float().mean(),
    }


def voice_loss(model: TickModel, target: SpeechTarget, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Loss of the flow head alone, in scenes; everything else stays as it is."""
    with torch.no_grad():
        x, _ = model.perceive_scene(model.embed(batch), batch)
        top, _ = model.present_scene(x, batch)
    loss = flow_loss(model, target, top, batch, DRAWS)
    return {"loss": loss, "flow": loss}


def flow_loss(model: TickModel, target: SpeechTarget, top: Tensor, batch: dict[str, Any], draws: int = 1) -> Tensor:
    """Squared error of the mel that the flow head predicts from the top states of scenes, [B, T, summary_tokens, width].

    The mean over so many draws of noise and Euler step. In OWN_PAST of the ticks the mel before them is what the head itself makes, in a
    first pass from the true mel (scheduled sampling in two passes, Mihaylova & Martins 2019, arXiv 1906.07651).
    """
    mel, sounds = target(batch["say_now"][..., 0].long(), batch["cut"])
    say, act, past = batch["say_now"].long(), batch["act_now"].long(), past_frames(mel, batch["valid"])
    with torch.no_grad():
        made = model.flow(model.flow.conditions(top, say, act, past).float(), torch.randn_like(mel))
        own = torch.rand_like(past[..., :1, :1]) < OWN_PAST
        past = torch.where(own, past_frames(made, batch["valid"]), past)
    conditions = model.flow.conditions(top, say, act, past).float()
    error = torch.stack([model.flow.loss(conditions, mel) for _ in range(draws)]).mean(0)
    weight = torch.where(sounds | batch["cut"], 1.0, SILENT_WEIGHT)[..., None] * batch["valid"].float()[..., None]
    return (error * weight).sum() / (weight.sum() * model.config.trunk.summary_tokens)


def past_frames(mel: Tensor, valid: Tensor) -> Tensor:
    """What the flow head goes on from in each tick, f32[B, T, 2, 80]: the end of the tick before it that was not lost, or silence.

    mel f32[B, T, summary_tokens, flow_dim], valid i64[B, T].
    """
    ends = above_silence(mel.flatten(2).unflatten(-1, (-1, MEL_CHANNELS))[:, :, -PAST_FRAMES:])
    tick = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    before = F.pad(torch.where(valid > 0, tick, -1).cummax(1).values[:, :-1], (1, 0), value=-1)[..., None, None]
    return torch.where(before < 0, 0.0, ends.gather(1, before.clamp_min(0).expand_as(ends)))


def _events(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    weight = weight * torch.where(target > 0, EVENT_WEIGHT, 1.0)
    return (F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") * weight.flatten()).sum() / weight.sum()


def _word_loss(logits: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
    weights = torch.ones_like(logits[0, 0])
    weights[0] = 0.2  # most ticks end no word
    return _labelled(logits, label, weights, smoothing)


def _labelled(logits: Tensor, label: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy where there is a label, classes weighing as in `weights`; 0 where there is none at all."""
    flat = logits.flatten(0, 1), label.flatten()
    loss = F.cross_entropy(*flat, weight=weights, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    return loss / (weights[label.clamp_min(0)] * (label != IGNORE)).sum().clamp_min(1.0)


def _towards(logits: Tensor, probabilities: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy with a teacher's probabilities [B, T, choices], a tick weighing as much as the teacher is sure of an event."""
    weight = weight * torch.lerp(torch.full_like(weight, EVENT_WEIGHT), torch.ones_like(weight), probabilities[..., 0])
    return (-(logits.log_softmax(-1) * probabilities).sum(-1) * weight).sum() / weight.sum()


def _accuracy(logits: Tensor, label: Tensor) -> Tensor:
    asked = label > 0
    return ((logits.argmax(-1) == label) & asked).float().sum() / asked.float().sum().clamp_min(1)
