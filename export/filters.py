"""The two-stage DFT of the tick graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def split_dft(samples: int) -> tuple[int, NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Factors of a real DFT of length n = r*r in two stages of r-point DFTs (Cooley & Tukey 1965).

    With x[r*a + b] and bin c + r*d: stage 1 sums over a, a twiddle follows, stage 2 sums over b. Returns r,
    stage 1 f32[r, 2r] (real | imaginary), the twiddles f32[2, r(b), r(c)] and stage 2 f32[2r, 2(r/2 + 1)], which maps
    (real | imaginary) over b to (real | imaginary) over d = 0 … r/2.
    """
    r = round(samples**0.5)
    if r * r != samples or r % 2:
        raise ValueError(f"the dMel window must be the square of an even number of samples, not {samples}")
    n = np.arange(r)
    stage1 = np.exp(-2j * np.pi * np.outer(n, n) / r)
    twiddle = np.exp(-2j * np.pi * np.outer(n, n) / samples)
    stage2 = np.exp(-2j * np.pi * np.outer(n, np.arange(r // 2 + 1)) / r)
    return (
        r,
        np.concatenate([stage1.real, stage1.imag], axis=1).astype(np.float32),
        np.stack([twiddle.real, twiddle.imag]).astype(np.float32),
        np.block([[stage2.real, stage2.imag], [-stage2.imag, stage2.real]]).astype(np.float32),
    )
