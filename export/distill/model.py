"""The tick model in PyTorch: one forward over whole scenes for training, one streaming step, the same numbers."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device.config import AudioConfig, ModelConfig, VideoConfig
from device.dmel import hann, level_thresholds, mel_filters
from device.tensors import layer_tokens
from export.constants import CLIP_MEAN, CLIP_STD, HMLP_FOLDS, MASKED, NORM_EPS, modality_bias
from export.distill.voice import State, Vocoder, above_silence
from export.voice_tables import PAST_FRAMES


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) with eps 1e-6, as Inkling's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), NORM_EPS)


class DMel(nn.Module):
    """Samples to dMel levels, as transformers' Inkling feature extractor and processor (range from the config)."""

    window: Tensor
    filters: Tensor
    thresholds: Tensor

    def __init__(self, a: AudioConfig) -> None:
        super().__init__()
        self.hop, self.size = a.hop_samples, a.window_samples
        self.register_buffer("window", torch.from_numpy(hann(a.window_samples)), persistent=False)
        filters = mel_filters(a.sample_rate_hz, a.window_samples // 2 + 1, a.mel_channels)
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)
        self.register_buffer("thresholds", torch.from_numpy(level_thresholds(a)), persistent=False)

    # In what PyTorch 2.13 compiles of it with the tables, their gradients are no numbers (bf16, AMX); apart it costs no time.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, samples: Tensor) -> Tensor:
        """f32[..., n·hop + window − hop] to levels i64[..., n, channels]."""
        with torch.autocast(samples.device.type, enabled=False):
            spectrum = torch.fft.rfft(samples.float().unfold(-1, self.size, self.hop) * self.window)
            magnitude = (spectrum.real.square() + spectrum.imag.square()).clamp_min(1e-10).sqrt()
            return torch.bucketize(magnitude @ self.filters.T, self.thresholds)  # how many thresholds lie below


class AudioEmbedding(nn.Module):
    """Levels to tokens: the microphone and the device's own voice have a table each and share the positions."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        a, width = c.audio, c.trunk.width
        self.dmel = DMel(a)
        self.heard, self.played = (nn.Embedding(a.mel_channels * a.levels, width) for _ in range(2))
        # Neighbouring levels begin as neighbours: a ramp along a random direction per channel.
        ramp = torch.linspace(-1, 1, a.levels)[:, None]
        for table in (self.heard, self.played):
            direction = torch.randn(a.mel_channels, 1, width)
            start = ramp * direction + 0.3 * torch.randn(a.mel_channels, a.levels, width)
            table.weight.data = start.flatten(0, 1) / math.sqrt(a.mel_channels)
        self.heard_norm, self.played_norm = RMSNorm(width), RMSNorm(width)
        self.position = nn.Parameter(0.02 * torch.randn(c.audio_tokens, width))
        self.levels = a.levels

    def forward(self, mic: Tensor, voice: Tensor, ticks: int) -> Tensor:
        """mic, voice f32[B, T·tick + context] to tokens [B, T, audio_tokens, width]."""
        levels = self.dmel(mic)
        heard = self.heard_norm(self._sum(self.heard, levels, spectral_gaps(levels) if self.training else None))
        played = self.played_norm(self._sum(self.played, self.dmel(voice)))
        return (heard + played).unflatten(1, (ticks, -1)) + self.position

    def _sum(self, table: nn.Embedding, levels: Tensor, gaps: Tensor | None = None) -> Tensor:
        # A one-hot product is several times faster on a CPU than an embedding bag, forward and backward.
        device = levels.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        one_hot = F.one_hot(levels, self.levels).to(dtype)
        if gaps is not None:
            one_hot = one_hot.masked_fill(gaps[..., None], 0.0)
        return F.linear(one_hot.flatten(-2), table.weight.T)


def spectral_gaps(levels: Tensor) -> Tensor:
    """Where a student hears nothing, so that it does not learn voices by heart: bool[B, frames, channels] for `levels` of that shape.

    Two bands of up to a fifth of the channels each, and every 0.7 s up to 0.1 s of all of them (SpecAugment, arXiv 1904.08779).
    """
    b, frames, channels = levels.shape

    def gaps(n: int, length: int, widest: int, count: int) -> Tensor:
        """bool[B, n], true within `count` gaps of random width, one in each `length`."""
        first, width = torch.rand(2, b, count, 1, device=levels.device)
        start = (first + torch.arange(count, device=levels.device)[:, None]) * length
        place = torch.arange(n, device=levels.device)
        return ((place >= start) & (place < start + width * widest)).any(1)

    return gaps(channels, channels // 2, channels // 5, 2)[:, None] | gaps(frames, 56, 8, -(-frames // 56))[..., None]


class HMLP(nn.Module):
    """Patch embedding with folds 5x5, 2x2, 4x4 and 2 in time (arXiv 2203.09795; structure of Inkling's vision model)."""

    def __init__(self, v: VideoConfig, width: int) -> None:
        super().__init__()
        widths = (3, *v.hmlp_widths, width)
        self.projections = nn.ModuleList(nn.Linear(widths[i] * t * s * s, widths[i + 1], bias=False) for i, (t, s) in enumerate(HMLP_FOLDS))
        self.norms = nn.ModuleList(RMSNorm(w) for w in widths[1:4])
        self.final_norm = RMSNorm(width)

    def forward(self, patches: Tensor) -> Tensor:
        """Normalised patches [n, 2, 40, 40, 3] to [n, width]."""
        x = patches
        for i, ((t, s), projection) in enumerate(zip(HMLP_FOLDS, self.projections, strict=True)):
            n, time, height, wide, channels = x.shape
            x = x.reshape(n, time // t, t, height // s, s, wide // s, s, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
            x = projection(x.flatten(4))
            if i < len(self.norms):
                x = F.gelu(self.norms[i](x))
        return self.final_norm(x.flatten(1))


class VideoEmbedding(nn.Module):
    """Camera frames to one token per patch, with the place of the patch and the age of the newest frame."""

    mean: Tensor
    std: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.hmlp = HMLP(c.video, c.trunk.width)
        self.position = nn.Parameter(0.02 * torch.randn(c.video_tokens, c.trunk.width))
        self.age = nn.Parameter(torch.zeros(c.trunk.width))
        self.patch = c.video.patch
        self.register_buffer("mean", torch.tensor(CLIP_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD), persistent=False)

    def forward(self, frames: Tensor, frame_age: Tensor) -> Tensor:
        """frames u8[B, T, 2, H, W, 3], frame_age f32[B, T, 1] s to tokens [B, T, video_tokens, width]."""
        b, t, n, height, width, _ = frames.shape
        p = self.patch
        x = (frames.float() / 255 - self.mean) / self.std
        x = x.reshape(b * t, n, height // p, p, width // p, p, 3).permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, n, p, p, 3)
        tokens = self.hmlp(x).unflatten(0, (b, t, -1))
        return tokens + self.position + self.age * frame_age.clamp(0, 2)[..., None]


class TextEmbedding(nn.Module):
    """The summary tokens: what was delivered, said and done, and the clock; one learned slot vector each."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        width, t = c.trunk.width, c.text
        self.text_in, self.said = nn.Embedding(len(t.words), width), nn.Embedding(len(t.words), width)
        self.acted = nn.Embedding(len(t.acts), width)
        self.clock = nn.Linear(2 * len(c.trunk.clock_periods_s), width, bias=False)
        self.slot = nn.Parameter(torch.randn(c.trunk.summary_tokens, width))
        for table in (self.text_in, self.said, self.acted):
            table.weight.data[0] = 0.0

    def forward(self, text_in: Tensor, said: Tensor, acted: Tensor, clock: Tensor) -> Tensor:
        """i32[B, T, text_in], i32[B, T, say], i32[B, T, 1], f32[B, T, clock] to [B, T, summary_tokens, width]."""
        slots = self.slot.shape[0]
        x = self.slot + _pad_slots(self.text_in(text_in.long()), slots) + _pad_slots(self.said(said.long()), slots)
        # The act stands in the first place after the words, the clock in the last.
        acted_at = said.shape[-1]
        x = x + F.pad(self.acted(acted.long()), (0, 0, acted_at, slots - 1 - acted_at))
        return x + F.pad(self.clock(clock)[..., None, :], (0, 0, slots - 1, 0))


def _pad_slots(x: Tensor, slots: int) -> Tensor:
    return F.pad(x, (0, 0, 0, slots - x.shape[-2]))


class Block(nn.Module):
    """Pre-norm transformer block; the caller says how its heads attend."""

    def __init__(self, width: int, heads: int, mlp: int, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, mlp, bias=False), nn.Linear(mlp, width, bias=False)
        for projection in (self.out, self.down):
            projection.weight.data /= math.sqrt(2 * depth)

    def keys_values(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., n, width], rope [..., n, 2, head_dim/2] to rotated queries, rotated keys and values [..., n, heads, head_dim]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return _rotate(q, rope), _rotate(k, rope), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def mixed_precision(device: str) -> torch.autocast:
    """bf16 products where they are faster: on a GPU, on a CPU with AMX, and on one of AMD's with AVX512-BF16 (2.8 times, on an EPYC).

    On a Xeon with AVX512-BF16 alone a step took 2.6 s, in f32 2.2, and what PyTorch 2.13 compiled of it had gradients that are no numbers.
    """
    able = torch.cpu.get_capabilities()
    multiplies = able.get("amx_bf16", False) or (able.get("avx512_bf16", False) and str(able.get("cpu_name")).startswith("AMD"))
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or multiplies)


def blocks(modules: nn.ModuleList) -> list[Block]:
    """The modules of a list, typed."""
    return cast("list[Block]", list(modules))


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    cos, sin = rope[..., 0, :].unsqueeze(-2).to(x.dtype), rope[..., 1, :].unsqueeze(-2).to(x.dtype)
    # Not chunk and cat: in what PyTorch 2.13 compiles of those, the keys' gradients are no numbers (bf16, AMX).
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-2).flatten(-2)


def attend_windowed(q: Tensor, k: Tensor, v: Tensor, tick: Tensor, valid: Tensor, window: int) -> Tensor:
    """Attention of every tick to itself and the `window` tick numbers before its own.

    q [B, T, nq, H, d]; k, v [B, T, nk, H, d]; tick i64[B, T], rising; valid i64[B, T] (0: a lost tick, seen by nobody
    later). Works in chunks of `window` ticks that see their own and the previous chunk, or, where that is no more, in a single one;
    returns [B, T, nq, H, d].
    """
    b, ticks, nq, heads, dim = q.shape
    nk = k.shape[2]
    chunk = window if ticks > 2 * window else ticks
    chunks = -(-ticks // chunk)
    past = chunk if chunks > 1 else 0
    short = chunks * chunk - ticks
    q = F.pad(q, (0, 0, 0, 0, 0, 0, 0, short))
    k, v = (F.pad(x, (0, 0, 0, 0, 0, 0, past, short)) for x in (k, v))
    number, valid = F.pad(tick, (past, short), value=-(2**40)), F.pad(valid, (past, short))

    def with_past(x: Tensor) -> Tensor:  # [B, past + chunks·chunk, …] to [B, chunks, past + chunk, …]
        x = x.unflatten(1, (-1, chunk))
        return torch.cat([x[:, :-1], x[:, 1:]], dim=2) if past else x

    def pairs(x: Tensor) -> Tensor:  # [B, past + chunks·chunk, n, H, d] to [B·chunks·H, (past + chunk)·n, d]
        x = with_past(x)
        return x.permute(0, 1, 4, 2, 3, 5).reshape(b * chunks * heads, -1, dim)

    queries = q.unflatten(1, (chunks, chunk)).permute(0, 1, 4, 2, 3, 5).reshape(b * chunks * heads, chunk * nq, dim)
    keys, values = pairs(k), pairs(v)
    lag = number[:, past:].unflatten(1, (chunks, chunk))[..., None] - with_past(number)[:, :, None, :]
    mask = (lag >= 0) & (lag <= window) & ((with_past(valid)[:, :, None, :] > 0) | (lag == 0))
    bias = torch.where(mask, 0.0, MASKED).to(q.dtype)
    bias = bias[:, :, None, :, None, :, None].expand(b, chunks, heads, chunk, nq, past + chunk, nk)
    scores = torch.baddbmm(bias.reshape(b * chunks * heads, chunk * nq, -1), queries, keys.transpose(1, 2), alpha=dim**-0.5)
    out = scores.softmax(-1).to(values.dtype) @ values
    return out.reshape(b, chunks, heads, chunk, nq, dim).permute(0, 1, 3, 4, 2, 5).flatten(1, 2)[:, :ticks]


class FlowHead(nn.Module):
    """Rectified flow (Lipman et al. 2022, arXiv 2210.02747) from noise to one token's mel frames.

    The network predicts the data end of the path; the velocity is (prediction − x) / (1 − t), so the last Euler step
    lands on the prediction itself. It is conditioned on the token's top state, on the words and the act chosen in this tick, and on
    the last mel frames of the tick before, which tell it what to go on with in the middle of a word.
    """

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        s, width = c.voice, c.voice.flow_width
        self.dim, self.steps = c.flow_dim, s.flow_steps
        self.condition = nn.Linear(c.trunk.width, width)
        self.chosen = nn.ModuleList(nn.Embedding(len(c.text.words), c.trunk.width) for _ in range(c.text.say))
        self.chosen_act = nn.Embedding(len(c.text.acts), c.trunk.width)  # "yield" silences a word
        self.place = nn.Parameter(0.02 * torch.randn(c.trunk.summary_tokens, c.trunk.width))
        self.past = nn.Linear(PAST_FRAMES * s.mel_channels, width, bias=False)
        self.step = nn.Embedding(s.flow_steps, width)
        self.enter = nn.Linear(self.dim, width)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(s.flow_blocks))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(s.flow_blocks))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(s.flow_blocks))
        self.final_norm = RMSNorm(width)
        self.leave = nn.Linear(width, self.dim)

    def conditions(self, top: Tensor, say: Tensor, act: Tensor, past: Tensor) -> Tensor:
        """top [..., summary_tokens, width], say i64[..., say], act i64[..., 1] to [..., summary_tokens, flow_width].

        `past` [..., 2, 80] are the last mel frames of the tick before as height above silence: the vocoder's state.
        """
        chosen = sum((table(say[..., i]) for i, table in enumerate(self.chosen)), self.chosen_act(act[..., 0]))
        return self.condition(top + self.place + chosen[..., None, :]) + self.past(past.flatten(-2))[..., None, :]

    def predict(self, x: Tensor, step: Tensor, conditions: Tensor) -> Tensor:
        """The data end of the path through x [..., dim] at Euler step `step` i64[...]."""
        h = self.enter(x) + conditions + self.step(step)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            h = h + down(F.gelu(up(norm(h))))
        return self.leave(self.final_norm(h))

    def forward(self, conditions: Tensor, noise: Tensor) -> Tensor:
        """Euler steps from normal noise [..., dim] to mel values [..., dim]."""
        x = noise
        for step in range(self.steps):
            # dt / (1 - t) with t = step / steps
            x = x + (self.predict(x, torch.tensor(step, device=x.device), conditions) - x) / (self.steps - step)
        return x

    def loss(self, conditions: Tensor, mel: Tensor) -> Tensor:
        """Squared error of the predicted data end [...] at a random Euler step, per token; mel [..., dim]."""
        step = torch.randint(self.steps, mel.shape[:-1], device=mel.device)
        t = (step / self.steps)[..., None]
        x = (1 - t) * torch.randn_like(mel) + t * mel
        return (self.predict(x, step, conditions) - mel).square().mean(-1)


class TickModel(nn.Module):
    """The whole tick: samples, pixels and text in, speech, words and acts out."""

    modality_bias: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        k = c.trunk
        self.audio, self.video, self.text = AudioEmbedding(c), VideoEmbedding(c), TextEmbedding(c)
        self.perceive = nn.ModuleList(Block(k.width, k.heads, k.mlp, c.layers) for _ in range(k.perceive_layers))
        self.present = nn.ModuleList(Block(k.width, k.heads, k.mlp, c.layers) for _ in range(k.present_layers))
        self.norm = RMSNorm(k.width)
        self.say, self.act = nn.Linear(k.width, len(c.text.words)), nn.Linear(k.width, len(c.text.acts))
        self.flow, self.vocoder = FlowHead(c), Vocoder(c.voice.vocoder_width, c.mel_frames)
        self.register_buffer("modality_bias", torch.from_numpy(modality_bias(c)), persistent=False)

    # --- whole scenes -------------------------------------------------------------------------------------------

    def perceive_scene(self, tokens: Tensor, scene: dict[str, Tensor], probe: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """All tokens [B, T, N, width] through the perceiving layers to the summary tokens [B, T, S, width]; `scene` as in `forward`.

        Audio and video tokens attend to their own kind only, summary tokens to everything. `probe` receives the
        tokens before the last layer, for auxiliary losses. Also returns keys and values per layer, [B, T, N, H, d].
        """
        c, x, kept, when = self.config, tokens, [], (scene["tick"], scene["valid"])
        spans = (slice(0, c.audio_tokens), slice(c.audio_tokens, c.tokens - c.trunk.summary_tokens))
        summary = slice(c.tokens - c.trunk.summary_tokens, c.tokens)
        for layer, block in enumerate(blocks(self.perceive)):
            last = layer == len(self.perceive) - 1
            if last and probe is not None:
                probe.append(x)
            q, k, v = block.keys_values(x, scene["rope"])
            kept += [k, v]
            parts = [] if last else [attend_windowed(q[:, :, s], k[:, :, s], v[:, :, s], *when, c.trunk.perceive_window) for s in spans]
            parts.append(attend_windowed(q[:, :, summary], k, v, *when, c.trunk.perceive_window))
            x = block.finish(x[:, :, summary] if last else x, torch.cat(parts, dim=2))
        return x, kept

    def present_scene(self, x: Tensor, scene: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Summary tokens [B, T, S, width] through the present layers to their normalised top states."""
        kept = []
        for block in blocks(self.present):
            q, k, v = block.keys_values(x, scene["rope"][..., -x.shape[2] :, :, :])
            kept += [k, v]
            x = block.finish(x, attend_windowed(q, k, v, scene["tick"], scene["valid"], self.config.trunk.present_window))
        return self.norm(x), kept

    def embed(self, scene: dict[str, Tensor]) -> Tensor:
        """All tokens of a scene, [B, T, N, width]; keys as in the tensor table, each with leading [B, T] but mic and voice [B, samples]."""
        ticks = scene["said"].shape[1]
        return torch.cat(
            [
                self.audio(scene["mic"], scene["voice"], ticks),
                self.video(scene["frames"], scene["frame_age"]),
                self.text(scene["text_in"], scene["said"], scene["acted"], scene["clock"]),
            ],
            dim=2,
        )

    def forward(self, scene: dict[str, Tensor]) -> dict[str, Tensor]:
        """A whole scene from an empty memory; the outputs of every tick, [B, T, …] (speech f32[B, T·tick]).

        `scene` holds the inputs of the tensor table ([B, T, …]; mic and voice [B, T·tick + context]), `tick` i64[B, T],
        their numbers, and `valid` i64[B, T], 0 for ticks that were lost.
        """
        x, lower = self.perceive_scene(self.embed(scene), scene)
        top, upper = self.present_scene(x, scene)
        out = self.decide(top)
        flow_noise, vocoder_noise = self._split_noise(scene["noise"])
        state = self.vocoder.zero_state(top.shape[0])
        past, ticks = state.mel, []
        for tick in range(top.shape[1]):  # each goes on from the one before that was not lost
            conditions = self.flow.conditions(top[:, tick], out["say"][:, tick].long(), out["act"][:, tick].long(), past)
            ticks.append(self.flow(conditions, flow_noise[:, tick]).flatten(1).unflatten(-1, (-1, self.config.voice.mel_channels)))
            past = torch.where(scene["valid"][:, tick, None, None] > 0, above_silence(ticks[-1][:, -PAST_FRAMES:]), past)
        out["speech"], _ = self.vocoder(torch.cat(ticks, 1), vocoder_noise.flatten(1), state)
        for i, kept in enumerate(lower + upper):
            out[f"new_{('key', 'value')[i % 2]}_{i // 2}"] = kept.transpose(2, 3)
        return out

    def choices(self, scene: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The words and acts chosen in each tick of a scene (as in `forward`): i32[B, T, say] and i32[B, T, 1]."""
        x, _ = self.perceive_scene(self.embed(scene), scene)
        out = self.decide(self.present_scene(x, scene)[0])
        return out["say"], out["act"]

    def logits(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """Top states [..., S, width] to logits of `say` [..., say, words] and `act` [..., acts]."""
        say = self.config.text.say
        return self.say(top[..., :say, :]), self.act(top[..., say, :])

    def decide(self, top: Tensor) -> dict[str, Tensor]:
        """What is chosen and how sure: say, act (i32) and their probabilities."""
        say, act = self.logits(top)
        return {
            "say": say.argmax(-1).int(),
            "act": act.argmax(-1, keepdim=True).int(),
            "say_prob": say.softmax(-1),
            "act_prob": act.softmax(-1),
        }

    def _split_noise(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.config.trunk.summary_tokens
        flow, vocoder = noise.split([slots * self.config.flow_dim, self.config.tick_samples], dim=-1)
        return flow.unflatten(-1, (slots, -1)), vocoder

    # --- one tick -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """One tick: inputs and state of the tensor table to its outputs and updates, all without a batch dimension."""
        c = self.config
        scene = {name: inputs[name][None, None] for name in ("frames", "frame_age", "text_in", "said", "acted", "clock")}
        scene |= {name: inputs[name][None] for name in ("mic", "voice")}
        x = self.embed(scene)[0, 0]
        out: dict[str, Tensor] = {}
        for layer, block in enumerate(blocks(self.perceive) + blocks(self.present)):
            perceiving = layer < c.trunk.perceive_layers
            rope = inputs["rope"][-x.shape[0] :]
            q, k, v = (y.transpose(0, 1) for y in block.keys_values(x, rope))
            if layer == c.trunk.perceive_layers - 1:
                x, q = x[-c.trunk.summary_tokens :], q[:, -c.trunk.summary_tokens :]
            valid = inputs["perceive_valid" if perceiving else "present_valid"]
            past_bias = ((valid - 1) * -MASKED).repeat_interleave(layer_tokens(c, layer))
            now_bias = torch.zeros(q.shape[1], k.shape[1])
            if perceiving:
                now_bias = self.modality_bias[-q.shape[1] :]
                past_bias = past_bias + now_bias.repeat(1, c.trunk.perceive_window)
            scale = c.head_dim**-0.5
            past = q @ inputs[f"key_{layer}"].mT * scale + past_bias
            now = q @ k.mT * scale + now_bias
            weights = torch.cat([past, now], dim=-1).softmax(-1)
            past_weights, now_weights = weights.split([past.shape[-1], now.shape[-1]], dim=-1)
            attended = past_weights @ inputs[f"value_{layer}"] + now_weights @ v
            x = block.finish(x, attended.transpose(0, 1))
            out[f"new_key_{layer}"], out[f"new_value_{layer}"] = k, v
        top = self.norm(x)
        out |= self.decide(top)
        flow_noise, vocoder_noise = self._split_noise(inputs["noise"])
        state = State(*(inputs[f"vocoder_{name}"][None] for name in State._fields))
        mel = self.flow(self.flow.conditions(top, out["say"].long(), out["act"].long(), state.mel[0]), flow_noise)
        speech, state = self.vocoder(mel.reshape(1, -1, c.voice.mel_channels), vocoder_noise[None], state)
        out["speech"] = speech[0]
        for name, value in zip(State._fields, state, strict=True):
            out[f"new_vocoder_{name}"] = value[0]
        return out
