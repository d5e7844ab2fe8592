"""The autoencoders: video to latents, sound to latents, and back.

    CausalVideoVAE   one class, three configurations: Pyramid Flow's published VAE, REAL_VAE,
                     TOYBOX_VAE
    AudioVAE         front end "waveform": EnCodec's network, a Gaussian in place of the quantiser
                     (SyncFlow section 3.1). Front end "mel": log-mel spectra, the idea of MMAudio,
                     whose latents Harmony uses

    video (B, 3, frames, H, W)                         wave (B, samples)
      | patchify                                         | pad, or log-mel
      | encoder: ResBlocks and halvings                  | encoder: residual units and strides
    mean, logvar (B, C, L, h, w)                       mean, logvar (B, A, S)
      | mean + exp(logvar / 2) * noise                   | the same
      | decoder: the mirror image                        | decoder: the mirror image
      | unpatchify, or composite over frame 0            | trim, or Griffin-Lim
    video (B, 3, frames, H, W)                         wave (B, samples)

**Frames and latents.** Latent 0 codes frame 0 alone, every other latent t frames: L latents are
t(L-1)+1 frames, and an image is a video of one frame. For t = 4, L = 4:

    frame     0 | 1  2  3  4 | 5  6  7  8 | 9 10 11 12
    latent    0 |     1      |     2      |     3

Convolutions are causal, with all padding in time in front: latent l depends on frames 0 .. t l.

**Chunks.** For a video that is coded in chunks, every convolution keeps its last two inputs in a
cache. They replace the padding of the next chunk, so the result is the same. Frames a b c d e, a
temporal kernel of 3:

    at once    0 0 a b c d e
    chunk 1    0 0 a b c              keeps b c
    chunk 2        b c d e            keeps d e

Legend: B batch, C and A channels of a video and an audio latent, L video latents, S audio latents,
h w latent grid, t frames per latent, p side of a patch in pixels. Inside the networks c, T, H, W
are channels, time steps, height and width of the layer. F is torch.nn.functional.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------- video: layers

@dataclass
class VAEConfig:
    """The defaults are Pyramid Flow's published VAE: 8x8 pixels x 8 frames -> 16 channels."""
    widths: tuple = (128, 256, 512, 512)      # channels of each level
    space: tuple = (1, 1, 1, 0)               # does this level end in a spatial halving?
    time: tuple = (1, 1, 1, 0)                # ... and in a temporal one?
    layers: tuple = (2, 3)                    # ResBlocks per level: encoder, decoder
    latent: int = 16                          # channels of the latent
    groups: int = 32                          # GroupNorm groups
    # Six switches, for a network that learns on two CPU cores, where the published layout,
    # however narrow, learns nothing within an hour. Chosen by short runs of one seed each.
    # temporal kernel. 1: a latent depends on its t frames; the transformer models the history
    kernel_t: int = 3
    # (frames, pixels) of one input position. (4, 4): sixty times fewer positions. Frame 0 is
    # repeated to fill its patch, so that 4(L-1)+1 frames remain L latents
    patch: tuple = (1, 1)
    # the decoder's temporal doublings, if not `time`. Doubling level by level is better than
    # unfolding all 4 frames in the last layer: mean |error| 0.046, not 0.051, after 400 steps
    time_up: tuple = None
    # both sides get the true first frame, which image-to-video always has: see CausalVideoVAE
    reference: bool = False
    # a linear autoencoder in parallel to the deep one. Without it the first thousand steps do not
    # even find the colours: neither side learns before the other one uses the latents
    shortcut: bool = False
    # with `reference`: the decoder's output is added to the first frame, pixel by pixel. Off: it is
    # a mixture with two colours per patch, for the toybox's flat things (CausalVideoVAE.composite)
    residual: bool = False
    # Latents are normalised as (z - shift) * scale. Latent 0 codes a complete image and has
    # constants of its own.
    shift_image: float = -0.04
    scale_image: float = 1 / 1.8726
    shift_video: float = -0.2343
    scale_video: float = 1 / 3.0986


# The toybox's VAE: 16x16 pixels x 4 frames.
TOYBOX_VAE = dict(widths=(64, 112, 144), space=(1, 1, 0), time=(0, 0, 0), time_up=(1, 1, 0),
                  layers=(1, 2), groups=8, kernel_t=1, patch=(4, 4), reference=True, shortcut=True)

# The VAE of real video: 8x8 pixels x 4 frames. Its decoder unfolds the 4 frames of a latent in its
# last layer: with temporal doublings a training step of 8 crops costs 153 GFLOP instead of 110.
REAL_VAE = dict(widths=(96, 192), space=(1, 0), time=(0, 0), layers=(1, 2), groups=8, kernel_t=1,
                patch=(4, 4), reference=True, shortcut=True, residual=True)


def patchify(x, t, p):
    """Video (B, c, frames, H, W) -> (B, c t p p, frames/t, H/p, W/p)."""
    x = x.unflatten(2, (-1, t)).transpose(1, 2).flatten(2, 3)       # (B, frames/t, c t, H, W)
    return F.pixel_unshuffle(x, p).transpose(1, 2)


def unpatchify(x, t, p):
    """The inverse: (B, c t p p, T, H, W) -> (B, c, T t, H p, W p)."""
    x = F.pixel_shuffle(x.transpose(1, 2), p)                       # (B, T, c t, H p, W p)
    return x.unflatten(2, (-1, t)).transpose(1, 2).flatten(2, 3)


def split_positions(frames, t, P):
    """Frames (B, 3, t L, H, W) -> what every latent position covers, (B, L, h, w, 3, t, P, P)."""
    x = frames.unflatten(4, (-1, P)).unflatten(3, (-1, P)).unflatten(2, (-1, t))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7)


def join_positions(x):
    """The inverse of `split_positions`."""
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def principal_components(moments, n):
    """Second moments X^T X / m of data X (m, d), not centred -> the n directions in which X is
    largest (n, d), its mean square along them."""
    squares, vectors = torch.linalg.eigh(moments)
    return vectors[:, -n:].T, squares[-n:].mean()


class CausalConv3d(nn.Module):
    """Convolution with zero padding on both sides in space, in front only in time."""

    def __init__(self, c_in, c_out, kernel=(3, 3, 3), stride=(1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, kernel, stride, (0, kernel[1] // 2, kernel[2] // 2))
        self.front = kernel[0] - 1                                  # time steps of padding
        self.stride_t = stride[0]

    def forward(self, x, cache=None):                               # (B, c_in, T, H, W)
        if self.front == 0:
            return self.conv(x)
        if self in cache:
            # The last two inputs of the chunk before. With a stride of 2 the next window begins
            # one step later and needs only the last one.
            x = torch.cat([cache[self][:, :, self.stride_t - 1:], x], 2)
        else:
            x = F.pad(x, (0, 0, 0, 0, self.front, 0))
        # a copy: a view would keep the complete chunk in memory
        cache[self] = x[:, :, -self.front:].clone()
        return self.conv(x)


class Norm(nn.GroupNorm):
    """GroupNorm of each frame: statistics over time would make a latent depend on the future."""

    def forward(self, x):                                           # (B, c, T, H, W)
        B, C, T, H, W = x.shape
        y = super().forward(x.transpose(1, 2).reshape(B * T, C, H, W))
        return y.view(B, T, C, H, W).transpose(1, 2)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, cfg):
        super().__init__()
        kernel = (cfg.kernel_t, 3, 3)
        self.norm1 = Norm(cfg.groups, c_in, 1e-6)
        self.conv1 = CausalConv3d(c_in, c_out, kernel)
        self.norm2 = Norm(cfg.groups, c_out, 1e-6)
        self.conv2 = CausalConv3d(c_out, c_out, kernel)
        self.conv_shortcut = nn.Identity()
        if c_in != c_out:
            self.conv_shortcut = CausalConv3d(c_in, c_out, (1, 1, 1))

    def forward(self, x, cache):
        h = self.conv1(F.silu(self.norm1(x)), cache)
        h = self.conv2(F.silu(self.norm2(h)), cache)
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over the positions of one frame, one head as wide as the network."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = Norm(groups, c, 1e-6)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])              # a list, for the published name

    def forward(self, x):                                           # (B, c, T, H, W)
        h = self.group_norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)     # (B, T, HW, c)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out[0](h).transpose(2, 3)                       # (B, T, c, HW)
        return x + h.unflatten(3, x.shape[3:]).transpose(1, 2)


class MidBlock(nn.Module):
    def __init__(self, c, cfg):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, c, cfg), ResBlock(c, c, cfg)])
        self.attentions = nn.ModuleList([Attention(c, cfg.groups)])

    def forward(self, x, cache):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, cache)), cache)


class Resample(nn.Module):
    """Halving (way "down") or doubling ("up") of time by t and of space by p: (1, 2) or (2, 1)."""

    def __init__(self, c, way, t, p, kernel_t):
        super().__init__()
        self.factors = t, p
        self.up = way == "up"
        # Halving: a convolution with stride. Doubling: a convolution to more channels, which
        # become pixels or frames.
        c_out = t * p * p * c if self.up else c
        stride = (1, 1, 1) if self.up else (t, p, p)
        self.conv = CausalConv3d(c, c_out, (kernel_t, 3, 3), stride)

    def forward(self, x, cache):                                    # (B, c, T, H, W)
        x = self.conv(x, cache)
        if self.up:
            x = unpatchify(x, *self.factors)
            # latent 0 is one frame: (B, c, 2T - 1, H, W) if it is in this chunk
            x = x[:, :, self.factors[0] - 1:] if cache["start"] else x
        return x


class Level(nn.Module):
    """The ResBlocks of one resolution, then resampling, of space first, in encoder (way "down") and
    decoder (way "up"). Attribute names are the published ones."""

    def __init__(self, c_in, c_out, layers, cfg, space, time, way):
        super().__init__()
        blocks = [ResBlock(c_in if i == 0 else c_out, c_out, cfg) for i in range(layers)]
        self.resnets = nn.ModuleList(blocks)
        self.resampling = []
        for wanted, name, t, p in ((space, "", 1, 2), (time, "temporal_", 2, 1)):
            if wanted:
                resample = Resample(c_out, way, t, p, cfg.kernel_t)
                setattr(self, f"{name}{way}samplers", nn.ModuleList([resample]))
                self.resampling.append(resample)

    def forward(self, x, cache):
        """-> the output, and the activations before resampling."""
        for block in self.resnets:
            x = block(x, cache)
        features = x
        for resample in self.resampling:
            x = resample(x, cache)
        return x, features


def levels(cfg, widths, layers, time, way):
    """All levels of an encoder or decoder; the channels change at the beginning of a level."""
    inputs = [widths[0], *widths[:-1]]
    return nn.ModuleList(Level(c_in, c_out, layers, cfg, space, time, way)
                         for c_in, c_out, space, time in zip(inputs, widths, cfg.space, time))


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        w = cfg.widths
        t, p = cfg.patch
        kernel = (cfg.kernel_t, 3, 3)
        self.reference = cfg.reference
        # a patch of t frames, and with `reference` the same patch of the first frame beside it
        c_in = 3 * p * p * (t + cfg.reference)
        self.conv_in = CausalConv3d(c_in, w[0], kernel)
        self.down_blocks = levels(cfg, w, cfg.layers[0], cfg.time, "down")
        self.mid_block = MidBlock(w[-1], cfg)
        self.conv_norm_out = Norm(cfg.groups, w[-1], 1e-6)
        self.conv_out = CausalConv3d(w[-1], 2 * cfg.latent, kernel)         # mean and logvar
        self.linear = None
        if cfg.shortcut:
            s = 2 ** sum(cfg.space)
            self.linear = nn.Conv3d(c_in, 2 * cfg.latent, (1, s, s), (1, s, s))

    def forward(self, x, cache):                                    # (B, c_in, T, H/p, W/p)
        """-> moments (B, 2C, L, h, w), and with `reference` the activations of every level."""
        h = self.conv_in(x, cache)
        features = []
        for level in self.down_blocks:
            h, before = level(h, cache)
            if self.reference:
                features.append(before)
        h = self.mid_block(h, cache)
        h = self.conv_out(F.silu(self.conv_norm_out(h)), cache)
        if self.linear is not None:
            h = h + self.linear(x)
        return h, features


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        w = cfg.widths[::-1]
        p = cfg.patch[1]
        # `space` and `time` count from the latents: the published decoder reuses the encoder's
        time = cfg.time_up or cfg.time
        kernel = (cfg.kernel_t, 3, 3)
        self.conv_in = CausalConv3d(cfg.latent, w[0], kernel)
        self.mid_block = MidBlock(w[0], cfg)
        self.up_blocks = levels(cfg, w, cfg.layers[1], time, "up")
        if cfg.reference:
            # from the encoder's activations of a resolution to the decoder's input of that level
            self.references = nn.ModuleList(
                CausalConv3d(c, c_in, (1, 1, 1)) for c, c_in in zip(w, [w[0], *w[:-1]]))
        self.conv_norm_out = Norm(cfg.groups, w[-1], 1e-6)
        # pixels; with `residual` of all frames that doublings leave out; or what `composite` needs
        c_out = 3 * p * p
        if cfg.residual:
            c_out *= cfg.patch[0] * 2 ** sum(cfg.time) // 2 ** sum(time)
        elif cfg.reference:
            c_out = 6 + 2 * p * p
        self.conv_out = CausalConv3d(w[-1], c_out, kernel)
        self.linear = None
        if cfg.shortcut:
            s = 2 ** sum(cfg.space)
            kernel = (2 ** sum(time), s, s)
            self.linear = nn.ConvTranspose3d(cfg.latent, c_out, kernel, kernel)

    def forward(self, z, cache, features):                          # (B, C, L, h, w)
        x = self.conv_in(z, cache)
        for i, level in enumerate(self.up_blocks):
            if features:
                # the first frame enters at every resolution, as in a U-Net
                reference = self.references[i](features[-1 - i])
                x = x + for_later_frames(reference, x.shape[2], cache)
            if i == 0:
                x = self.mid_block(x, cache)
            x, _ = level(x, cache)
        x = self.conv_out(F.silu(self.conv_norm_out(x)), cache)     # (B, c_out, frames, H/p, W/p)
        if self.linear is not None:
            # the linear path makes t frames of latent 0, too: the last of them is frame 0
            x = x + self.linear(z)[:, :, -x.shape[2]:]
        return x


def for_later_frames(x, n, cache):
    """x (B, c, 1, H, W) of the first frame, for the n time steps of a chunk -> (B, c, n, H, W). The
    first frame itself has no reference: zeros."""
    x = x.repeat(1, 1, n, 1, 1)
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 1:]], 2) if cache["start"] else x


# ---------------------------------------------------------------------------- video: coding

class CausalVideoVAE(nn.Module):
    """Video (B, 3, frames, H, W) in [-1, 1] <-> latents (B, C, L, h, w), frames = t(L-1)+1.

    With `cfg.reference`, all but latent 0 are conditioned on the true first frame. The encoder gets
    it beside every patch, and latents are differences from the latent of a still clip: rest is
    exactly zero, and no latent repeats how the scene appears. The decoder gets the encoder's
    activations of it, and its output is added to it, or is a composite over it."""

    def __init__(self, cfg):
        super().__init__()
        counts = {len(cfg.widths), len(cfg.space), len(cfg.time), len(cfg.time_up or cfg.time)}
        assert len(counts) == 1, "widths, space, time and time_up must have an entry per level"
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = CausalConv3d(2 * cfg.latent, 2 * cfg.latent, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(cfg.latent, cfg.latent, (1, 1, 1))
        # logvar starts at -6: with more noise in the latents the decoder never learns to use them
        nn.init.constant_(self.quant_conv.conv.bias[cfg.latent:], -6)
        self.stride_t = cfg.patch[0] * 2 ** sum(cfg.time)           # t, frames per latent
        self.stride = cfg.patch[1] * 2 ** sum(cfg.space)            # pixels per latent position

    def composite(self, x, first):
        """Every pixel is a mixture of the first frame and of two colours of its patch.

        x (B, 6 + 2pp, frames, H/p, W/p): two colours a patch, two logits a pixel (the first frame's
        logit is 0). Only the mixture is per pixel, which keeps edges sharp, and where nothing moves
        the result is an exact copy of first (B, 3, frames, H, W)."""
        p = self.cfg.patch[1]
        colours, logits = x.split([6, 2 * p * p], 1)
        colours = colours.repeat_interleave(p, -1).repeat_interleave(p, -2)
        one, two = colours.chunk(2, 1)                              # (B, 3, frames, H, W) each
        logits = F.pad(unpatchify(logits, 1, p), (0, 0, 0, 0, 0, 0, 1, 0))
        w = logits.softmax(1)                                       # (B, 3, frames, H, W)
        return w[:, :1] * first + w[:, 1:2] * one + w[:, 2:] * two

    def encode(self, video, cache=None):
        """Video (B, 3, frames, H, W) -> mean, logvar (B, C, L, h, w), logvar within [-30, 20].

        cache: a dict, empty for the first chunk of t n + 1 frames; later chunks have t n frames."""
        cache = {} if cache is None else cache
        cache["start"] = not cache
        first = cache.setdefault("first", video[:, :, :1].clone())  # of the clip
        (mean, logvar), _ = self.moments(video, first, cache)
        if self.cfg.reference:
            # the code of a still clip is the origin
            still, _ = self.encode_still(first)
            mean = mean - for_later_frames(still, mean.shape[2], cache)
        return mean, logvar.clamp(-30, 20)

    def moments(self, video, first, cache):
        """-> (mean, logvar), and with `cfg.reference` the encoder's activations."""
        t, p = self.cfg.patch
        if cache["start"]:
            # frame 0 fills a patch of t frames by itself
            video = torch.cat([video[:, :, :1]] * (t - 1) + [video], 2)
        x = patchify(video, t, p)
        if self.cfg.reference:
            x = torch.cat([x, for_later_frames(patchify(first, 1, p), x.shape[2], cache)], 1)
        x, features = self.encoder(x, cache)
        return self.quant_conv(x).chunk(2, 1), features

    def encode_still(self, first):
        """First frame (B, 3, 1, H, W) -> the latent (B, C, 1, h, w) of t frames like it, and the
        encoder's activations, one tensor per level."""
        still = first.repeat(1, 1, self.stride_t, 1, 1)
        (mean, _), features = self.moments(still, first, {"start": False})
        return mean, features

    def decode(self, z, first=None, cache=None):
        """Latents (B, C, L, h, w) -> video (B, 3, frames, H, W), about [-1, 1].

        cache: as in encode; later chunks of L latents are t L frames. first: the true first frame
        (B, 3, 1, H, W), for the first chunk with `cfg.reference`; its default is latent 0."""
        cache = {} if cache is None else cache
        cache["start"] = not cache
        features = []
        if self.cfg.reference and cache["start"]:
            if first is None:
                # latent 0 is decoded without a reference, but the call asks for one
                grey = torch.zeros_like(z[:, :1, :1]).repeat(1, 3, 1, self.stride, self.stride)
                first = self.decode(z[:, :, :1], grey)
            features = self.encode_still(first)[1]
        first, features = cache.setdefault("first", (first, features))
        x = self.decoder(self.post_quant_conv(z), cache, features)
        p = self.cfg.patch[1]
        if not self.cfg.reference:
            return unpatchify(x, *self.cfg.patch)                   # pixels
        if not self.cfg.residual:
            return self.composite(x, for_later_frames(first, x.shape[2], cache))
        # Differences from the first frame, t frames a step. Latent 0 is the last one of its t.
        t = x.shape[1] // (3 * p * p)
        x = unpatchify(x, t, p)
        x = x[:, :, t - 1:] if cache["start"] else x
        return for_later_frames(first, x.shape[2], cache) + x

    def encode_chunks(self, video):
        """`encode` of a video of any length, uint8 or in [-1, 1], chunk by chunk on the VAE's
        device. video: (B, 3, frames, H, W), or an iterator of such pieces of one."""
        cache = {}
        moments = []

        def encode(x):
            # contiguous: other strides may be summed in another order
            x = x.to(self.quant_conv.conv.weight.device).contiguous()
            x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
            moments.append(self.encode(x, cache))

        rest = None
        for piece in [video] if isinstance(video, torch.Tensor) else video:
            rest = piece if rest is None else torch.cat([rest, piece], 2)
            # 16 latents, fewer of large pictures or many clips: of 384 x 640 pixels two, which are
            # 2 GB in the 128 channels of the published VAE
            B, _, _, H, W = piece.shape
            n = self.stride_t * min(16, max(1, 2 ** 22 // (B * self.stride_t * H * W)))
            # the first chunk has frame 0, too
            while rest.shape[2] > n + (not cache):
                chunk, rest = rest.tensor_split([n + (not cache)], 2)
                encode(chunk)
        # the last frame is repeated until its latent is full
        lacking = ((not cache) - rest.shape[2]) % self.stride_t
        encode(torch.cat([rest, *[rest[:, :, -1:]] * lacking], 2))
        means, logvars = zip(*moments)
        return torch.cat(means, 2), torch.cat(logvars, 2)

    def decode_tiles(self, z, caches, tile=32, overlap=8):
        """`decode` of large frames in overlapping tiles of so many latents, as in Pyramid Flow's
        pipeline. Close to `decode`, not equal: GroupNorm and attention act on a tile.

        caches: a dict, empty for the first chunk, that keeps one cache per tile."""
        p = self.stride
        # Tiles are averaged. The weight of a pixel rises linearly from the edge of its tile to 1
        # over the overlap.
        ramp = ((torch.arange(tile * p, device=z.device) + .5) / (overlap * p)).clamp(max=1)
        fade = torch.minimum(ramp, ramp.flip(0))
        height, width = z.shape[3:]
        total = 0
        weights = 0
        for y, x in product(tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)):
            cache = caches.setdefault((y, x), {})
            piece = self.decode(z[:, :, :, y:y + tile, x:x + tile], cache=cache)
            h, w = piece.shape[3:]
            weight = fade[:h, None] * fade[:w]
            # zeros to the left, right, above and below
            margins = (x * p, (width - x) * p - w, y * p, (height - y) * p - h)
            total = total + F.pad(piece * weight, margins)
            weights = weights + F.pad(weight, margins)
        return total / weights

    def normalise(self, z):
        """Latents from latent 0 on -> about unit variance."""
        c = self.cfg
        image = (z[:, :, :1] - c.shift_image) * c.scale_image
        video = (z[:, :, 1:] - c.shift_video) * c.scale_video
        return torch.cat([image, video], 2)

    def denormalise(self, z, start=True):
        """The inverse of `normalise`. start=False: z does not begin with latent 0."""
        c = self.cfg
        n = int(start)
        image = z[:, :, :n] / c.scale_image + c.shift_image
        video = z[:, :, n:] / c.scale_video + c.shift_video
        return torch.cat([image, video], 2)


@torch.no_grad()
def start_as_linear(vae, differences):
    """Give a new VAE with `reference`, `shortcut` and `residual` the weights of the best linear
    autoencoder: principal components of how frames differ from the first one.

    differences (n, 3, t, P, P): of t frames from the first frame, position by position, in [-2, 2].
    From here the deep path learns what is not linear. From random weights 100 steps of 8
    clips came to 25.1 dB, from these 28.3 after 40."""
    cfg = vae.cfg
    t, p = cfg.patch
    rows = differences.flatten(1)
    components, variance = principal_components(rows.T @ rows / len(rows), cfg.latent)
    components = components.unflatten(1, differences.shape[1:])
    # One scale for all of them: an error of a latent stays an error of pixels of the same size.
    scale = variance.clamp(min=1e-6).sqrt()
    linear = patchify(components, t, p)                             # (C, 3tpp, 1, s, s)
    first = patchify(components.sum(2, keepdim=True), 1, p)         # (C, 3pp, 1, s, s)
    nn.init.zeros_(vae.encoder.linear.weight)
    vae.encoder.linear.weight[:cfg.latent] = torch.cat([linear, -first], 1) / scale
    vae.decoder.linear.weight.copy_(linear * scale)
    # The other path begins small, and what lies between encoder and decoder as the identity.
    for part in (vae.encoder, vae.decoder):
        part.conv_out.conv.weight *= .1
        nn.init.zeros_(part.conv_out.conv.bias)
        nn.init.zeros_(part.linear.bias)
    nn.init.dirac_(vae.quant_conv.conv.weight)
    nn.init.dirac_(vae.post_quant_conv.conv.weight)
    nn.init.zeros_(vae.post_quant_conv.conv.bias)


def tile_starts(n, tile, overlap):
    """First latents of the tiles along a side of n latents; the last tile ends with the side."""
    last = max(n - tile, 0)
    return sorted({*range(0, last, tile - overlap), last})


def kl_divergence(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)) of every latent value, in nats."""
    # In float32: the terms nearly cancel, and rounded to bfloat16, which autocast keeps on a CPU,
    # their sum could be negative.
    mean = mean.float()
    logvar = logvar.float()
    return .5 * (mean.square() + logvar.exp() - 1 - logvar)


def video_vae_loss(vae, source, target, noise, kl):
    """Reconstruction plus KL -> loss, mean |error|, nats per latent (latent 0 excepted).

    source, target (B, 3, frames, H, W): the same motion of two objects of one kind, or twice one
    clip. noise (B, C, L, h, w) ~ N(0, 1). The encoder gets the source; the decoder gets the first
    frame of the target and has to reproduce the target. So latents gain nothing by coding colour,
    position or size: they come to code motion, and a small error in a generated latent is an error
    of motion, not of appearance. Latent 0, an image by itself, reproduces the source.

    The KL term is the price of information in a latent. What the decoder finds in the first frame
    costs nothing, so that kl can be far above the customary 1e-6: 0.02 for the toybox."""
    mean, logvar = vae.encode(source)
    first = target[:, :, :1]
    output = vae.decode(mean + (logvar / 2).exp() * noise, first).float()

    # Little of a picture moves. Pixels that have left the first frame by more than 0.04, with a rim
    # of one pixel, count 8 times. So does all of frame 0, which latent 0 codes without a reference.
    moved = ((target - first).abs().amax(1, keepdim=True) > .04).float()
    moved = F.max_pool3d(moved, (1, 3, 3), 1, (0, 1, 1))            # (B, 1, frames, H, W)
    moved[:, :, 0] = 1
    weight = 1 + 7 * moved

    # |error| of pixels and of their differences downwards and to the right. The differences keep
    # edges, in place of a perceptual network that would have to be downloaded.
    error = output - torch.cat([source[:, :, :1], target[:, :, 1:]], 2)     # (B, 3, frames, H, W)
    edges = (error.diff(dim=3).abs() * weight[..., 1:, :]).mean()
    edges = edges + (error.diff(dim=4).abs() * weight[..., 1:]).mean()
    divergence = kl_divergence(mean, logvar)
    loss = (error.abs() * weight).mean() + .5 * edges + kl * divergence.mean()
    nats = divergence.detach()[:, :, 1:].sum((1, 3, 4)).mean()
    return loss, error.detach().abs().mean(), nats


# ---------------------------------------------------------------------------- audio: layers

@dataclass
class AudioVAEConfig:
    """The defaults are SyncFlow's VAE, of 15 M parameters: 48 kHz, 50 latents a second."""
    front: Literal["waveform", "mel"] = "waveform"      # "mel": log-mel spectra
    rate: int = 48000                         # samples per second
    width: int = 32                           # channels; of "waveform", each level doubles them
    latent: int = 128                         # channels of the latent
    ratios: tuple = (4, 5, 6, 8)              # waveform: strides of the levels. Their product times
    patch: int = 1                            # the samples per first position is the hop, 960
    lstm: int = 2                             # waveform: layers of the LSTM next to the latents
    mels: int = 64                            # mel: bands
    depth: int = 2                            # mel: residual units on either side of the halving
    shift: tuple = 0.                         # latents are normalised as (z - shift) * scale, with
    scale: tuple = 1.                         # a number per channel; 0. and 1.: not measured yet


AUDIO_VAE_SIZES = {                           # by front end
    "waveform": {
        # hop 320: 50 Hz. With patches of 20 samples training is 10 times faster
        "tiny": dict(rate=16000, patch=20, ratios=(4, 4), width=64, latent=16, lstm=0),
        "syncflow": dict(),
    },
    # two frames of 10 ms per latent: 50 Hz
    "mel": {"tiny": dict(front="mel", rate=16000, width=256, latent=16)},
}


class ResidualUnit(nn.Module):
    """EnCodec's residual unit: a kernel of 3 into half the channels, a kernel of 1 back."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv1d(c, c // 2, 3, padding=1)
        self.conv2 = nn.Conv1d(c // 2, c, 1)
        self.shortcut = nn.Conv1d(c, c, 1)

    def forward(self, x):                                           # (B, c, n)
        return self.shortcut(x) + self.conv2(F.elu(self.conv1(F.elu(x))))


class LSTM(nn.Module):
    """EnCodec's LSTM over the latents, with a residual connection."""

    def __init__(self, c, layers):
        super().__init__()
        self.lstm = nn.LSTM(c, c, layers, batch_first=True)

    def forward(self, x):                                           # (B, c, S)
        y, _ = self.lstm(x.transpose(1, 2))
        return x + y.transpose(1, 2)


class StridedConv(nn.Module):
    """r samples to one, or with `up` one to r. The kernel is 2r; r samples of padding or trimming
    make lengths divide or multiply exactly."""

    def __init__(self, c_in, c_out, r, up=False):
        super().__init__()
        self.conv = (nn.ConvTranspose1d if up else nn.Conv1d)(c_in, c_out, 2 * r, r)
        self.up = up
        self.left = r - r // 2
        self.right = r // 2

    def forward(self, x):
        if self.up:                                                 # (B, c_in, n) -> (B, c_out, nr)
            return self.conv(x)[..., self.left:-self.right]
        return self.conv(F.pad(x, (self.left, self.right)))         # (B, c_in, nr) -> (B, c_out, n)


def three_parts(first, blocks, last):
    """A network whose weights are named first.*, blocks.0.*, ..., last.*"""
    return nn.Sequential(OrderedDict(first=first, blocks=nn.Sequential(*blocks), last=last))


def waveform_layers(cfg):
    """EnCodec's encoder (B, 1, S hop) -> (B, 2A, S) and decoder (B, A, S) -> (B, 1, S hop): SEANet,
    non-causal. Of its weight normalisation, `variance_preserving_init` keeps the effect at the
    start of training."""
    c = cfg.width
    if cfg.patch > 1:
        first = StridedConv(1, c, cfg.patch)
        last = StridedConv(c, 1, cfg.patch, up=True)
    else:
        first = nn.Conv1d(1, c, 7, padding=3)
        last = nn.Conv1d(c, 1, 7, padding=3)
    down = []
    up = []
    for r in cfg.ratios:
        # the decoder is the mirror image: it grows from its end
        down += [ResidualUnit(c), nn.ELU(), StridedConv(c, 2 * c, r)]
        up = [nn.ELU(), StridedConv(2 * c, c, r, up=True), ResidualUnit(c), *up]
        c = 2 * c
    if cfg.lstm:
        down += [LSTM(c, cfg.lstm)]
        up = [LSTM(c, cfg.lstm), *up]
    encoder = three_parts(first, [*down, nn.ELU()], nn.Conv1d(c, 2 * cfg.latent, 7, padding=3))
    decoder = three_parts(nn.Conv1d(cfg.latent, c, 7, padding=3), [*up, nn.ELU()], last)
    return encoder, decoder


def mel_layers(cfg):
    """Encoder (B, mels, 2S) -> (B, 2A, S) and decoder (B, A, S) -> (B, mels, 2S)."""
    c = cfg.width

    def network(c_in, resample, c_out):
        before = [ResidualUnit(c) for _ in range(cfg.depth)]
        after = [ResidualUnit(c) for _ in range(cfg.depth)]
        return three_parts(nn.Conv1d(c_in, c, 3, padding=1),
                           [*before, nn.ELU(), resample, *after, nn.ELU()],
                           nn.Conv1d(c, c_out, 3, padding=1))
    encoder = network(cfg.mels, StridedConv(c, c, 2), 2 * cfg.latent)
    decoder = network(cfg.latent, StridedConv(c, c, 2, up=True), cfg.mels)
    return encoder, decoder


@torch.no_grad()
def variance_preserving_init(vae):
    """Weights of variance 1 / fan-in: every layer keeps the scale of its input.

    From torch's defaults, sounds left the strided encoder 100 times smaller than they entered, and
    after 400 steps nothing was coded; from this start most onsets were."""
    for m in vae.modules():
        if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)):
            fan_in = m.weight[0].numel()
            if isinstance(m, nn.ConvTranspose1d):
                # kernels of 2r at steps of r: two of them overlap
                fan_in = 2 * len(m.weight)
            nn.init.normal_(m.weight, std=fan_in ** -.5)
            nn.init.zeros_(m.bias)
    for m in vae.modules():
        if isinstance(m, ResidualUnit):
            # the residual branch starts at zero
            nn.init.zeros_(m.conv2.weight)
    # logvar starts near -6: with more noise than that nothing is ever coded
    logvar = slice(vae.cfg.latent, None)
    vae.encoder.last.weight[logvar] *= .1
    nn.init.constant_(vae.encoder.last.bias[logvar], -6)
    if vae.cfg.front == "waveform":
        # the samples of a sound are about 0.1, activations about 1
        for w in vae.encoder.first.parameters():
            w *= 10
        for w in vae.decoder.last.parameters():
            w *= .1


def mel_filters(rate, n_fft, bands, lowest):
    r"""Triangles over frequency, equally spaced on Slaney's mel scale -> (bands, n_fft / 2 + 1).

                   /\  /\    /\        each rises from the peak of the band before to its own and
        weight    /  \/  \  /  \       falls to that of the next; area 1 over Hz, so that white
                 /   /\   \/    \      noise has the same energy in every band
                +---------------> Hz    from `lowest` to rate / 2

    The scale is linear up to 1 kHz, which is mel 15, and logarithmic above: 27 mels are a factor of
    6.4. The same numbers as librosa.filters.mel, whose import takes two seconds."""
    linear = 15 / 1000                                              # mel per Hz
    log_step = math.log(6.4) / 27

    def to_mel(hz):
        return hz * linear if hz < 1000 else 15 + math.log(hz / 1000) / log_step

    mel = np.linspace(to_mel(lowest), to_mel(rate / 2), bands + 2)
    edges = np.where(mel < 15, mel / linear, 1000 * np.exp((mel - 15) * log_step))[:, None]
    hz = np.linspace(0, rate / 2, n_fft // 2 + 1)
    # band k: from edge k over edge k + 1 to edge k + 2
    width = np.diff(edges, axis=0)                                  # (bands + 1, 1)
    rising = (hz - edges[:-2]) / width[:-1]                         # (bands, n_fft / 2 + 1)
    falling = (edges[2:] - hz) / width[1:]
    triangles = np.minimum(rising, falling).clip(min=0)
    return (2 / (edges[2:] - edges[:-2]) * triangles).astype(np.float32)


class LogMel(nn.Module):
    """Waveform (B, n) <-> log-mel spectra (B, bands, n / hop + 1) at 100 Hz, on any device.

    25 ms windows every 10 ms, bands from 40 Hz up: librosa's melspectrogram, as a test says. The
    buffers are no state-dict keys."""

    def __init__(self, rate, bands):
        super().__init__()
        # 257 frequencies; windows of 25 ms are 512 samples at most
        assert bands <= 257 and rate <= 20480, f"no spectrum of {bands} bands at {rate} Hz"
        self.hop = rate // 100
        self.stft = dict(n_fft=512, hop_length=self.hop, win_length=rate // 40)
        filters = torch.from_numpy(mel_filters(rate, 512, bands, lowest=40))
        self.register_buffer("filters", filters, persistent=False)  # (bands, 257)
        self.register_buffer("spread", torch.linalg.pinv(filters), persistent=False)
        window = torch.hann_window(rate // 40, device="cpu")
        self.register_buffer("window", window, persistent=False)

    def spectrum(self, wave):                                       # -> (B, 257, n / hop + 1)
        return torch.stft(wave, **self.stft, window=self.window, pad_mode="constant",
                          return_complex=True)

    def forward(self, wave):
        # In float32 at any rate: bfloat16 has 8 bits of precision. (Operations are counted on the
        # meta device, which has no autocast.)
        with torch.autocast("cpu" if wave.is_meta else wave.device.type, enabled=False):
            power = self.spectrum(wave.to(self.window.dtype)).abs().square()
            # Energies below 1e-6 count as silence; constants for about zero mean, unit variance.
            # They are not the clip's: loud and soft stay different, and silence stays silence
            # however long it lasts.
            mels = ((self.filters @ power + 1e-6).log10() + 3) / 1.6
        return mels.to(wave.dtype)

    def inverse(self, mels):
        """(B, bands, n) -> waveform (B, n hop): magnitudes by the pseudo-inverse of the filters,
        phases by Griffin and Lim's iteration (1984), with momentum (Perraudin et al. 2013)."""
        with torch.autocast(mels.device.type, enabled=False):
            # A network that has diverged may ask for any energy; no sound exceeds 4.
            mels = mels.to(self.window.dtype).clamp(max=4)
            energy = (10 ** (1.6 * mels - 3) - 1e-6).clamp(min=0)
            magnitude = (self.spread @ energy).clamp(min=0).sqrt()  # (B, 257, n)
            # the centres of n + 1 frames are 0, hop, ..., n hop: repeat the last one
            magnitude = torch.cat([magnitude, magnitude[..., -1:]], 2)
            # The start is librosa's of random_state=0, the same for every row.
            phases = 2 * np.pi * np.random.RandomState(0).random(magnitude.shape[1:])
            phases = torch.from_numpy(phases).to(magnitude).expand_as(magnitude)
            estimate = torch.polar(magnitude, phases)
            previous = 0
            samples = mels.shape[2] * self.hop
            # 16 rounds; librosa makes 32. (They were not compared.)
            for _ in range(16):
                # the spectrum of a real waveform, extrapolated, with the given magnitudes
                wave = torch.istft(estimate, **self.stft, window=self.window, length=samples)
                consistent = self.spectrum(wave)
                estimate = consistent - .99 / 1.99 * previous
                estimate = magnitude * estimate / (estimate.abs() + 1e-30)
                previous = consistent
            return torch.istft(estimate, **self.stft, window=self.window, length=samples)


# ---------------------------------------------------------------------------- audio: coding

class AudioVAE(nn.Module):
    """Waveforms (B, n) in [-1, 1] <-> latents (B, A, S), S = ceil(n / hop).

    Why spectra: a waveform is mostly phase, which is inaudible, and 16 numbers a latent cannot hold
    the partials of a bell. In 0.95 of comparisons a toybox sound is closer in timbre to its own
    material than to another; in 0.62 after coding as waveforms, in 0.90 as spectra, with half the
    training. For the phases MMAudio trains a vocoder; Griffin-Lim needs no training."""

    def __init__(self, cfg):
        super().__init__()
        assert 8000 <= cfg.rate <= 192000, f"no sound has {cfg.rate} samples per second"
        self.cfg = cfg
        if cfg.front == "mel":
            self.encoder, self.decoder = mel_layers(cfg)
            self.log_mel = LogMel(cfg.rate, cfg.mels)
            self.hop = 2 * self.log_mel.hop                         # samples per latent
        else:
            self.encoder, self.decoder = waveform_layers(cfg)
            self.hop = cfg.patch * math.prod(cfg.ratios)
        variance_preserving_init(self)

    def features(self, wave):
        """Waveform (B, n), filled up with silence -> (B, 1, S hop), or log-mels (B, mels, 2S)."""
        wave = F.pad(wave, (0, -wave.shape[1] % self.hop))
        if self.cfg.front == "mel":
            # windows are centred at 0, 10 ms, ... and the end of the sound: without the last one
            return self.log_mel(wave)[..., :-1]
        return wave[:, None]

    def encode(self, wave):
        """Waveform (B, n) -> mean, logvar (B, A, S), logvar within [-30, 20]."""
        return self.encode_features(self.features(wave))

    def encode_features(self, features):
        """What `features` makes of a waveform -> the same."""
        mean, logvar = self.encoder(features).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z, samples=None, piece=500):
        """Latents (B, A, S) -> waveform (B, samples), S hop if not given. Long sounds are decoded
        in pieces of `piece` latents (10 s), in bounded memory."""
        # The network's output depends on fewer than 16 latents on either side: with this margin the
        # pieces of a waveform are those of one pass (with an LSTM, which has no bound, nearly).
        margin = 16
        wave = z.new_zeros(len(z), z.shape[2] * self.hop)
        for start in range(0, z.shape[2], piece):
            before = min(start, margin)
            part = self.decoder(z[:, :, start - before:start + piece + margin])
            if self.cfg.front == "mel":
                part = self.log_mel.inverse(part)
            else:
                part = part[:, 0]
            # The weight of the new piece steps from 0 to 1 where the old one ends. Of spectra
            # Griffin-Lim finds other phases in every piece, so these fade, within 40 ms.
            fade = 2 * self.hop if self.cfg.front == "mel" else 1
            time = torch.arange(part.shape[1], device=z.device) - before * self.hop + .5
            weight = (time / fade + .5).clamp(0, 1) if start else torch.ones_like(time)
            place = wave[:, (start - before) * self.hop:][:, :part.shape[1]]
            place.copy_(place * (1 - weight).sqrt() + part * weight.sqrt())
        return wave[:, :samples]

    def shift_and_scale(self, z):
        """Of every channel of latents like z."""
        constants = torch.tensor([self.cfg.shift, self.cfg.scale], dtype=z.dtype)
        # Only CUDA may copy while the CPU goes on: see `from_cpu` in model.py.
        return constants.to(z.device, non_blocking=z.is_cuda)[..., None]     # (A, 1) each

    def normalise(self, z):
        """Latents (B, A, S) -> about unit variance in every channel."""
        shift, scale = self.shift_and_scale(z)
        return (z - shift) * scale

    def denormalise(self, z):
        """The inverse of `normalise`."""
        shift, scale = self.shift_and_scale(z)
        return z / scale + shift


def spectral_error(output, target):
    """Distance of the spectra of waveforms (B, n) at three resolutions."""
    total = 0.
    # short windows resolve time, long ones frequency
    for w in (64, 256, 1024):
        window = torch.hann_window(w, device=output.device)
        a = torch.stft(output, w, w // 4, window=window, return_complex=True).abs()
        b = torch.stft(target, w, w // 4, window=window, return_complex=True).abs()
        # (B, bins, frames): logarithms, which are loudness, and magnitudes, where the energy is
        logs = ((a + 1e-3).log() - (b + 1e-3).log()).abs().mean()
        total = total + logs + (a - b).norm() / (b.norm() + 1e-3)
    return total / 3


def audio_vae_loss(vae, wave, noise, kl):
    """Reconstruction plus KL of waveforms (B, n) in [-1, 1]; noise (B, A, S) ~ N(0, 1).

    -> loss, report: mean |error| of samples or log-mels, spectral error (front end "waveform"
    only), nats per latent."""
    features = vae.features(wave)
    mean, logvar = vae.encode_features(features)
    output = vae.decoder(mean + (logvar / 2).exp() * noise).float()
    error = (output - features).abs().mean()
    divergence = kl_divergence(mean, logvar)
    nats = divergence.detach().sum(1).mean()
    if vae.cfg.front == "mel":
        # no phases: |error| is enough
        return error + kl * divergence.mean(), torch.stack([error.detach(), nats])
    # The phases of a waveform decide |error| and are inaudible, hence a spectral loss beside it.
    # 10: samples are about 0.1 large.
    spectral = spectral_error(output[:, 0], features[:, 0])
    loss = 10 * error + spectral + kl * divergence.mean()
    return loss, torch.stack([error.detach(), spectral.detach(), nats])
