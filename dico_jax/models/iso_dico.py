"""DiCo's blocks one after the other at one resolution (arXiv 2505.11196, table 4: isotropic)."""

import functools

import flax.linen as nn

from dico_jax.models import layers
from dico_jax.models.dico import ConvBlocks, DiCoBlock
from dico_jax.models.dit import Isotropic, PatchConv
from dico_jax.models.layers import Dense
from dico_jax.models.mixers import num_skips


class IsoDiCo(ConvBlocks, Isotropic):
    """DiCo's blocks in the place of DiT's, without a position table: called as every `Denoiser`.

    Attributes:
      hidden_size, depth: width and number of the blocks.
      patch_size: side of the patches that positions are made of.
    """

    hidden_size: int = 1152
    depth: int = 23
    patch_size: int = 1
    mlp_ratio: float = 6.5

    variants = (*ConvBlocks.variants, "layout")

    @property
    def size_divisor(self) -> int:  # type: ignore[override]
        return self.patch_size

    @nn.compact
    def forward(self, x, t, condition):
        n, height, width, _ = x.shape
        rows, columns, p = height // self.patch_size, width // self.patch_size, self.patch_size
        d, dtype, wide = self.hidden_size, self.dtype, self.wide_dtype

        c = layers.embed_times(t, d, wide, "t_embedder")
        c += self.embed_labels(condition, (("embedding_table", d),))[0]

        proj = functools.partial(PatchConv, d, p, dtype)
        x = layers.Named("proj", proj, name="x_embedder")(x).reshape(n, rows, columns, d)
        options = self.mlp_ratio, dtype, None, self.mixer_module
        block = functools.partial(DiCoBlock, d, *options)
        x = self.pass_blocks(block, x, c)
        linear = functools.partial(Dense, p * p * self.out_channels, dtype)
        final = layers.FinalLayer("linear", linear, dtype, store_input=True, name="final_layer")

        x = final(x, c).reshape(n, rows, columns, p, p, self.out_channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, -1).astype(wide)

    def macs(self, positions):
        d, patch = self.hidden_size, self.patch_size**2
        size = positions // patch
        ends = size * patch * d * (self.in_channels + self.out_channels)
        skips = 0 if self.stages else num_skips(self.depth) * size * 2 * d**2
        blocks = self.depth * self.block_macs(size, d)
        return self.time_macs(d) + 2 * d**2 + ends + blocks + skips
