"""Shape of the model, and its sizes, one row each."""

from __future__ import annotations

from dataclasses import dataclass

# `tiny` to `xlarge` are 4M's (Mizrahi et al. 2023, table 6); `nano` fits a laptop.
SIZES = {
    "nano": {"dim": 192, "encoder_depth": 4, "decoder_depth": 4, "heads": 3},
    "tiny": {"dim": 384, "encoder_depth": 6, "decoder_depth": 6, "heads": 6},
    "small": {"dim": 512, "encoder_depth": 8, "decoder_depth": 8, "heads": 8},
    "base": {"dim": 768, "encoder_depth": 12, "decoder_depth": 12, "heads": 12},
    "large": {"dim": 1024, "encoder_depth": 24, "decoder_depth": 24, "heads": 16},
    "xlarge": {"dim": 2048, "encoder_depth": 24, "decoder_depth": 24, "heads": 32},
}

ATTENTION = ("sdpa", "flex", "xformers")


@dataclass(frozen=True)
class FourMConfig:
    """Shape of the model. Numbers left at 0 come from the row of `size`.

    Args:
        size: Row of `SIZES`: nano, tiny, small, base, large, xlarge.
        dim: Width D, a multiple of 4 and of `heads`.
        encoder_depth: Encoder blocks.
        decoder_depth: Decoder blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over D (two thirds of it where gated).
        gated_mlp: SwiGLU instead of GELU.
        qkv_bias: Bias in query, key and value projections.
        proj_bias: Bias in attention output projections.
        mlp_bias: Bias in MLP layers.
        norm_bias: Learned bias in layer norms.
        qk_norm: Normalise queries and keys per head.
        registers: Learned tokens added to every encoder input.
        zero_init: Output projections of attention and MLP start at 0, so that every block starts as nothing at all.
        drop_path: Stochastic depth at the last block, rising from 0.
        share_modality_embeddings: One modality table for both sides.
        tied_head: Score tokens with the decoder's token table.
        blank_hidden: Guidance shows a hidden text as `[S_1]` and hidden vectors as a zero vector, and where nothing is
            left there is no context (4M's checkpoints). Else what is hidden is absent, and the empty slot is left.
        decoder_causal: Decoder tokens of a grid, too, see earlier ones only.
        decoder_separate: Decoder tokens see their own modality only; if not, also all that stands before it.
        attention: What computes attention, no part of the weights: `sdpa` (torch's own, everywhere), `flex`
            (FlexAttention: CUDA, and on CPU without gradients) or `xformers` (CUDA).
        packed: Compute no empty slots (off for comparison only), no part of the weights either.
    """

    size: str = "base"
    dim: int = 0
    encoder_depth: int = 0
    decoder_depth: int = 0
    heads: int = 0
    mlp_ratio: float = 4.0
    gated_mlp: bool = True
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    registers: int = 0
    zero_init: bool = False
    drop_path: float = 0.0
    share_modality_embeddings: bool = True
    tied_head: bool = True
    blank_hidden: bool = False
    decoder_causal: bool = False
    decoder_separate: bool = True
    attention: str = "sdpa"
    packed: bool = True

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention is {self.attention!r}, allowed are {', '.join(ATTENTION)}")
        if self.attention == "xformers" and not (self.decoder_separate or self.decoder_causal):
            raise ValueError("attention: xformers has no mask for decoder_separate: false; use sdpa or flex")
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size!r}, allowed are {', '.join(SIZES)}")
        for field, value in SIZES[self.size].items():
            if not getattr(self, field):
                object.__setattr__(self, field, value)
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of 4 and of heads {self.heads}")
