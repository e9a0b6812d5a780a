"""The companion's voice in numbers: constants and fixed matrices of mel and vocoder, numpy only, for trainer and graph builder alike."""

from __future__ import annotations

import math

import numpy as np

from device.dmel import hz_to_mel, mel_to_hz

RATE_HZ = 16000
HOP_SAMPLES = 200  # one mel frame, 12.5 ms
MEL_CHANNELS = 80
PAST_FRAMES = 2  # mel frames of the tick before in the vocoder's state: what its first layer and the flow head go on from
BANDS = 64  # gains of each filter, evenly spaced on the mel scale from 0 to 8000 Hz
FILTER_REACH, DISPERSION_REACH = 124, 32
REACH_SAMPLES = FILTER_REACH + DISPERSION_REACH  # ±156 samples: 200 + 2*156 = 512, one DFT without wrap-around
FIR_SAMPLES = 2 * REACH_SAMPLES  # what rings on after the frame
DFT = HOP_SAMPLES + FIR_SAMPLES
BINS = DFT // 2 + 1
# A filter is faded in over its frame, hence half a frame behind its mel; then it is delayed to be causal.
DELAY_SAMPLES = REACH_SAMPLES + HOP_SAMPLES // 2

# Natural logs of mel magnitudes; over the companion's words: mean -5.1 and deviation 2.3 where it speaks.
LOG_FLOOR = math.log(1e-5)
MEL_MEAN = -5.0
MEL_STD = 2.5
SILENCE = (LOG_FLOOR - MEL_MEAN) / MEL_STD  # every channel of a silent normalised mel frame: about -2.6
MEL_TOP = 2.5  # normalised; the voice itself stays below 2: a wild frame cannot be louder than this
GATE = 8e-5  # mel magnitude; below it the filters are exactly shut (about -82 dBFS)
# Log of a filter's gain over the mel's own. Trained shares reach 2.8 where the gate is open; where it is shut nothing
# holds them, and 0 times the exponential of 90 is not a number.
SHARE_TOP = 3.0
SILENT_ABOVE = 0.25  # a frame is silent when its mean lies less than this above SILENCE

PHASE_UNITS = 65536  # per cycle; integers that float32 adds exactly
PITCH_STEP = 4  # units per sample: 0.98 Hz
PITCH_LOW_HZ, PITCH_HIGH_HZ = 70.0, 400.0
PULSE_HZ = 3000.0  # the pulse's harmonics fall off as exp(-(f/PULSE_HZ)**2 / 2)


def band_centres_hz() -> np.ndarray:
    """f64[64]: where the gains are given."""
    return mel_to_hz(np.linspace(0.0, _TOP_MEL, BANDS))


def mel_to_bands() -> np.ndarray:
    """f32[80, 64]: linear interpolation from mel channels to bands; columns sum to 1, the outermost channels are held."""
    channels_hz = mel_to_hz(np.linspace(0.0, _TOP_MEL, MEL_CHANNELS + 2))[1:-1]
    return _interpolation(channels_hz, band_centres_hz()).astype(np.float32)


def bands_to_spectrum() -> np.ndarray:
    """f32[64, 514]: band gains to the real zero-phase gains of the DFT's 257 real and 257 imaginary values.

    Each response is cut to ±124 samples by a Hann window, so the 512-point product is a true convolution.
    """
    bins = _interpolation(band_centres_hz(), np.linspace(0.0, RATE_HZ / 2, BINS))
    response = np.fft.irfft(bins, DFT)
    window = 0.5 + 0.5 * np.cos(np.pi * np.minimum(_LAG / FILTER_REACH, 1.0))
    limited = np.fft.rfft(response * window).real
    return np.concatenate([limited, limited], axis=1).astype(np.float32)


def analysis() -> np.ndarray:
    """f32[200, 1028]: DFT (real, imaginary) of a frame faded out, then of the same frame faded in."""
    samples = np.arange(HOP_SAMPLES)
    angle = 2 * np.pi / DFT * np.outer(samples, np.arange(BINS))
    dft = np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)
    rise = ((samples + 0.5) / HOP_SAMPLES)[:, None]
    return np.concatenate([(1 - rise) * dft, rise * dft], axis=1).astype(np.float32)


def synthesis() -> np.ndarray:
    """f32[514, 512]: inverse DFT, delayed by 156 samples and dispersed."""
    angle = 2 * np.pi / DFT * np.outer(np.arange(BINS), np.arange(DFT) - REACH_SAMPLES)
    weight = np.full((BINS, 1), 2.0 / DFT)
    weight[[0, -1]] = 1.0 / DFT
    inverse = np.concatenate([weight * np.cos(angle), -weight * np.sin(angle)])
    return np.fft.irfft(np.fft.rfft(inverse) * np.fft.rfft(dispersion()), DFT).astype(np.float32)


def dispersion() -> np.ndarray:
    """f64[512]: a nearly all-pass response (within 1 dB) of ±32 samples, its middle at sample 0, that delays low frequencies more.

    Zero-phase pulses are all peak: at -20 dBFS RMS they reached full scale. 40 samples (2.5 ms) between the slowest and the
    fastest frequency bring the peaks of the words down to those of the recordings (0.68).
    """
    height = np.linspace(0.0, 1.0, BINS)
    delay = 40.0 * np.exp(-4.0 * height)
    phase = -np.pi / (BINS - 1) * np.concatenate([[0.0], np.cumsum((delay[1:] + delay[:-1]) / 2)])
    phase += height * (10.0 * np.pi - phase[-1])  # earlier by 20 samples: centred, and real at the Nyquist frequency
    response = np.fft.irfft(np.exp(1j * phase), DFT)
    fade = np.clip((_LAG / DISPERSION_REACH - 0.6) / 0.4, 0.0, 1.0)
    return response * (0.5 + 0.5 * np.cos(np.pi * fade))


_LAG = np.minimum(np.arange(DFT), DFT - np.arange(DFT))  # distance from sample 0 on the DFT's circle
_TOP_MEL = float(hz_to_mel(RATE_HZ / 2))


def _interpolation(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """f64[known, wanted]: the matrix of np.interp."""
    return np.stack([np.interp(wanted, known, row) for row in np.eye(len(known))])
