"""Quantizers: continuous latents to ids and back, behind one call.

VQ learns its codes by moving averages and replaces codes that nothing falls on; it is the default, as it loses least on
the built-in data (README). Memcodes picks values by their keys from several codebooks at once. These two update and
decode as 4M's tokenizers do, where the library differs. FSQ (Mentzer et al. 2023) needs no codebook, LFQ (Yu et al.
2023) and SimVQ (Zhu et al. 2024) scale to large vocabularies, and residual quantizers (Zeghidour et al. 2021) give
several tokens per latent, each for what the last left: these wrap layers of `vector-quantize-pytorch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, ResidualFSQ, ResidualVQ, SimVQ

KMEANS_STEPS = 10


@dataclass(frozen=True)
class QuantizerConfig:
    """How latents become ids.

    Args:
        type: One of `fsq`, `vq`, `lfq`, `simvq`, `memcodes`, `residual_vq`, `residual_fsq`.
        levels: Values per latent dimension (fsq, residual_fsq); the vocabulary is their product.
        codebook_size: Number of codes (vq, simvq, memcodes, residual_vq; a power of two for lfq).
        codebooks: Codebooks that each give a token: for their part of the latent (memcodes), or for what those before
            left of it (residual).
        dim: Width of the latent (vq, simvq, memcodes, residual_vq).
        cosine: Compare directions only (vq).
        decay: Of the moving averages of the codes (vq, residual_vq).
        dead_code: A code whose moving average of hits a step falls below this is replaced (vq, residual_vq).
        replace: By what: `batch_random`, a random latent, or `linde_buzo_gray`, one half of a much used code (vq).
        kmeans: Start from k-means over the latents of the first step (vq, residual_vq).
        unit_loss: Take latents at unit length in the quantizer's own loss and gradient (vq with cosine).
        sync: Update from the latents of all processes, not from each one's own (vq).
        weight: Of the quantizer's own loss: commitment (vq, simvq, residual_vq) or commitment and entropy (lfq).
    """

    type: Literal["vq", "fsq", "lfq", "simvq", "memcodes", "residual_vq", "residual_fsq"] = "vq"
    levels: tuple[int, ...] = (8, 8, 8)
    codebook_size: int = 512
    codebooks: int = 1
    dim: int = 16
    cosine: bool = False
    decay: float = 0.95
    dead_code: float = 1.0
    replace: Literal["batch_random", "linde_buzo_gray"] = "batch_random"
    kmeans: bool = True
    unit_loss: bool = False
    sync: bool = True
    weight: float = 0.25

    def __post_init__(self) -> None:
        if self.type not in QUANTIZERS:
            raise ValueError(f"quantizer type is {self.type!r}, allowed are {', '.join(QUANTIZERS)}")
        if self.type.endswith("fsq") and (not self.levels or min(self.levels) < 3):
            raise ValueError(f"levels is {list(self.levels)}, expected at least one number, each 3 or more")
        if self.type == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"codebook_size is {self.codebook_size}, lfq needs a power of two")
        several = self.type.startswith("residual") or (self.type == "memcodes" and not self.dim % self.codebooks)
        if self.codebooks < 1 or (self.codebooks > 1 and not several):
            raise ValueError(f"codebooks is {self.codebooks}, expected 1, with memcodes a divisor of dim {self.dim}, "
                             "or with a residual quantizer any number above 0")  # fmt: skip
        if self.replace not in ("batch_random", "linde_buzo_gray"):
            raise ValueError(f"replace is {self.replace!r}, allowed are batch_random, linde_buzo_gray")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return math.prod(self.levels) if self.type.endswith("fsq") else self.codebook_size

    @property
    def latent_dim(self) -> int:
        """Width of the latent that is quantized."""
        if self.type.endswith("fsq"):
            return len(self.levels)
        return self.codebook_size.bit_length() - 1 if self.type == "lfq" else self.dim


class Residual(nn.Module):
    """The library's residual quantizers behind the calls of the others: h codebooks, latents of d dimensions."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.layer: Any
        if config.type == "residual_fsq":
            self.layer = ResidualFSQ(levels=list(config.levels), num_quantizers=config.codebooks)
        else:
            self.layer = ResidualVQ(
                dim=config.dim, num_quantizers=config.codebooks, codebook_size=config.codebook_size,
                decay=config.decay, kmeans_init=config.kmeans, threshold_ema_dead_code=config.dead_code,
                commitment_weight=config.weight,
            )  # fmt: skip
        self.codebooks = config.codebooks

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """(B, n, d) to quantized latents (B, n, d), ids (B, h * n), codebook by codebook, and perhaps losses."""
        quantized, ids, *losses = self.layer(z)
        return quantized, ids.transpose(1, 2).flatten(1), *losses

    def decode(self, ids: Tensor) -> Tensor:
        """Latents (B, n, d) of ids (B, h * n)."""
        return self.layer.get_output_from_indices(ids.unflatten(1, (self.codebooks, -1)).transpose(1, 2))


class EMACodebook(nn.Module):
    """Codes that follow the latents that fall on them by moving averages (van den Oord et al. 2017, appendix A).

    K codes of d dimensions, N latents. With `cosine` the code in the most similar direction is chosen, and a code
    moves towards the mean direction of its latents; its length is left as the average makes it.
    """

    initted: Tensor
    cluster_size: Tensor
    embed: Tensor
    embed_avg: Tensor

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        size, dim = config.codebook_size, config.dim
        bound = math.sqrt(6 / dim)  # Kaiming uniform
        embed = self._direction(torch.empty(size, dim).uniform_(-bound, bound))
        self.register_buffer("initted", torch.tensor([float(not config.kmeans)]))
        self.register_buffer("cluster_size", torch.zeros(size))
        if not config.cosine:
            self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("embed", embed)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, d) to the codes (B, n, d), ids (B, n) and the commitment loss; in training the codes move."""
        latents = self._direction(z.detach().flatten(0, 1))
        if self.training and self.config.kmeans and not self.initted:
            self._start(latents)
        ids = self._nearest(latents, self.embed)
        codes = F.embedding(ids, self.embed).view_as(z)
        if not self.training:
            return codes, ids.view(z.shape[:-1]), z.new_zeros(())
        self._move(latents, ids)
        source = self._direction(z) if self.config.unit_loss else z
        loss = self.config.weight * F.mse_loss(source, codes)
        return source + (codes - source).detach(), ids.view(z.shape[:-1]), loss

    def decode(self, ids: Tensor) -> Tensor:
        """Codes (B, n, d) of ids (B, n)."""
        return F.embedding(ids, self.embed)

    def _direction(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.cosine else x

    def _nearest(self, latents: Tensor, embed: Tensor) -> Tensor:
        if self.config.cosine:
            return (latents @ self._direction(embed).T).argmax(-1)
        return torch.addmm(embed.square().sum(-1), latents, embed.T, beta=-1, alpha=2).argmax(-1)

    def _sums(self, latents: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How many latents fall on each code (K,), and their sums (K, d), over all processes."""
        counts = torch.bincount(ids, minlength=len(self.embed)).to(latents.dtype)
        sums = torch.zeros_like(self.embed).index_add_(0, ids, latents)
        if self._joined():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        return counts, sums

    def _joined(self) -> bool:
        return self.config.sync and dist.is_available() and dist.is_initialized()

    @torch.no_grad()
    def _move(self, latents: Tensor, ids: Tensor) -> None:
        counts, sums = self._sums(latents, ids)
        step = 1 - self.config.decay
        self.cluster_size.lerp_(counts, step)
        if self.config.cosine:
            hit = counts[:, None] > 0
            self.embed.lerp_(self._direction(torch.where(hit, sums, self.embed)), step)
        else:
            self.embed_avg.lerp_(sums, step)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + 1e-5) / (total + 1e-5 * len(counts)) * total  # Laplace
            self.embed.copy_(self.embed_avg / smoothed[:, None])
        if self.config.dead_code > 0:
            REPLACE[self.config.replace](self, self.cluster_size < self.config.dead_code, latents)

    def _random(self, latents: Tensor) -> Tensor:
        """K of the latents, the same ones in all processes."""
        chosen = latents[torch.randint(len(latents), (len(self.embed),), device=latents.device)]
        if self._joined():
            dist.broadcast(chosen, 0)
        return chosen

    def _by_latents(self, dead: Tensor, latents: Tensor) -> None:
        """A dead code becomes a random latent, with just enough hits to live on."""
        size = torch.where(dead, self.config.dead_code, self.cluster_size)
        self._replace(dead, torch.where(dead[:, None], self._random(latents), self.embed), size)

    def _by_splitting(self, dead: Tensor, latents: Tensor) -> None:
        """The most used codes are split in two a little apart, which share the hits (Linde, Buzo and Gray 1980)."""
        alive = (len(dead) - dead.sum()).clamp(min=1)
        order = self.cluster_size.argsort(descending=True)
        parent = order[(dead.cumsum(0) - 1).clamp(min=0) % alive]
        shares = 1 + torch.zeros_like(self.cluster_size).index_add_(0, parent, dead.to(self.embed.dtype))
        size = self.cluster_size / shares
        apart = 1 + 0.01 * torch.randn_like(self.embed)
        if self._joined():
            dist.broadcast(apart, 0)
        embed = torch.where(dead[:, None], self.embed[parent] * apart, self.embed)
        self._replace(dead, embed, torch.where(dead, size[parent], size))

    def _replace(self, dead: Tensor, embed: Tensor, size: Tensor) -> None:
        if not self.config.cosine:
            kept = self.embed_avg * (size / self.cluster_size.clamp(min=1e-12))[:, None]
            self.embed_avg.copy_(torch.where(dead[:, None], embed * size[:, None], kept))
        self.embed.copy_(embed)
        self.cluster_size.copy_(size)

    @torch.no_grad()
    def _start(self, latents: Tensor) -> None:
        """k-means over the first latents."""
        means = self._random(latents)
        for _ in range(KMEANS_STEPS):
            counts, sums = self._sums(latents, self._nearest(latents, means))
            means = torch.where(counts[:, None] > 0, self._direction(sums / counts.clamp(min=1)[:, None]), means)
        self.embed.copy_(means)
        self.cluster_size.copy_(counts)
        if not self.config.cosine:
            self.embed_avg.copy_(means * counts[:, None])
        self.initted.fill_(1.0)


REPLACE: dict[str, Callable[[EMACodebook, Tensor, Tensor], None]] = {
    "batch_random": EMACodebook._by_latents,
    "linde_buzo_gray": EMACodebook._by_splitting,
}


class Memcodes(nn.Module):
    """Several codebooks, each with learned codes from which keys and values are made: a latent's part picks the value
    whose key it fits best, in training with Gumbel noise.

    h codebooks of K codes of c = d / h dimensions.
    """

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.codebooks, width = config.codebooks, config.dim // config.codebooks
        self.codes = nn.Parameter(torch.randn(config.codebooks, config.codebook_size, width))
        self.to_keys = nn.Parameter(torch.empty(config.codebooks, width, width).uniform_(-1, 1) / width**0.5)
        self.to_values = nn.Parameter(torch.empty(config.codebooks, width, width).uniform_(-1, 1) / width**0.5)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, d) to values (B, n, d) and ids (B, h * n), codebook by codebook."""
        queries = z.unflatten(-1, (self.codebooks, -1)).transpose(1, 2)  # (B, h, n, c)
        logits = queries @ (self.codes @ self.to_keys).mT * queries.shape[-1] ** -0.5
        if not self.training:
            ids = logits.argmax(-1).flatten(1)
            return self.decode(ids), ids
        chosen = F.gumbel_softmax(logits, hard=True)
        values = chosen @ (self.codes @ self.to_values)
        return values.transpose(1, 2).flatten(2), chosen.argmax(-1).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        """Values (B, n, d) of ids (B, h * n)."""
        values = self.codes @ self.to_values  # (h, K, c)
        books = torch.arange(self.codebooks, device=ids.device)[:, None]
        return values[books, ids.unflatten(1, (self.codebooks, -1))].transpose(1, 2).flatten(2)


QUANTIZERS: dict[str, Callable[[QuantizerConfig], nn.Module]] = {
    "fsq": lambda config: FSQ(levels=list(config.levels)),
    "vq": EMACodebook,
    "lfq": lambda config: LFQ(
        codebook_size=config.codebook_size, entropy_loss_weight=config.weight, commitment_loss_weight=config.weight
    ),
    "simvq": lambda config: SimVQ(dim=config.dim, codebook_size=config.codebook_size, commitment_weight=config.weight),
    "memcodes": Memcodes,
    "residual_vq": Residual,
    "residual_fsq": Residual,
}


class Quantizer(nn.Module):
    """One quantizer layer. B images, n latents an image, d = `config.latent_dim`, h = `config.codebooks`."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.layer: Any = QUANTIZERS[config.type](config)
        # Fixed levels stay unused unless the latents spread over them; a learned codebook follows the latents.
        fixed = config.type in ("fsq", "lfq", "residual_fsq")
        self.norm = nn.BatchNorm1d(config.latent_dim, affine=False) if fixed else nn.Identity()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes latents; gradients pass straight through.

        Args:
            z: (B, n, d) latents.

        Returns:
            Quantized latents (B, n, d), ids (B, h * n) int64, and the quantizer's own loss (scalar, 0 for FSQ).
        """
        with torch.autocast(z.device.type, enabled=False):  # nearest codes and moving averages need full precision
            z = self.norm(z.float().flatten(0, 1)).view_as(z)
            quantized, ids, *loss = self.layer(z)
        return quantized, ids.long(), sum((part.sum() for part in loss), z.new_zeros(()))

    def codes(self, ids: Tensor) -> Tensor:
        """Latents (B, n, d) of ids (B, h * n): exactly what `forward` returned for them."""
        if isinstance(self.layer, FSQ | LFQ | SimVQ):
            return self.layer.indices_to_codes(ids)
        return self.layer.decode(ids)


def codebook_use(ids: Tensor, size: int, books: int = 1) -> dict[str, Tensor]:
    """Of ids (B, h * n) of h codebooks: the share of codes that occur and the perplexity, means over them (scalars)."""
    first = size * torch.arange(books, device=ids.device)[:, None]
    counts = torch.bincount((ids.unflatten(1, (books, -1)) + first).flatten(), minlength=books * size)
    share = counts.view(books, size) / (ids.numel() / books)
    entropy = torch.special.entr(share).sum(1)
    return {"codebook_use": (share > 0).float().mean(), "perplexity": entropy.exp().mean()}
