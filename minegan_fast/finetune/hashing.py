"""Hashes of parameters' bits: they prove that frozen rows stand still and that a delta meets its base."""

import hashlib

import torch
from torch import Tensor, nn

from .neurons import flat_rows

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22  # elements hashed at a time: bounds the int64 copy to 32 MiB


def row_hashes(tensor: Tensor, axis: int = 0) -> Tensor:
    """A 64-bit hash of the bits of every slice of `tensor` along `axis`: int64 [n], the same on every device.

    h_i = Σ_j b_ij m_j mod 2⁶⁴ with b the bits as an integer of the element's size and m_j odd and pseudo-random
    (splitmix64 of j). One changed element always changes h; other changes escape with probability about 2⁻⁶⁴.
    """
    rows = flat_rows(tensor.detach(), axis)
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    n, m = rows.shape
    j = torch.arange(m, device=rows.device, dtype=torch.int64)
    # splitmix64 in wrapping int64; the shifts are arithmetic, so the copies of the sign are masked away
    z = (j + 1) * -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    multipliers = (z ^ ((z >> 31) & 0x1FFFFFFFF)) | 1
    out = torch.empty(n, dtype=torch.int64, device=rows.device)
    step = max(1, _CHUNK // max(m, 1))
    for i in range(0, n, step):
        bits = rows[i : i + step].contiguous().view(_INTEGERS[rows.element_size()])
        out[i : i + step] = (bits.long() * multipliers).sum(1)
    return out


def buffer_hashes(model: nn.Module) -> dict[str, Tensor]:
    """{buffer: int64 [1]}, on its device; nothing waits for a GPU."""
    return {name: row_hashes(buffer.reshape(1, -1)) for name, buffer in model.named_buffers()}


def fingerprint(model: "nn.Module | dict[str, Tensor]") -> str:
    """A digest of the names, shapes, dtypes and bits of a model's parameters (buffers aside), as 64 hex digits.

    It is the same on every device and for a plain and a sparsely held copy of the same network.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted((model if isinstance(model, dict) else dict(model.named_parameters())).items()):
        digest.update(f"{name}:{list(parameter.shape)}:{parameter.dtype};".encode())
        digest.update(row_hashes(parameter).cpu().numpy().tobytes())
    return digest.hexdigest()
