"""The autoencoders: what a diffusion transformer sees instead of pixels and samples.

**The video VAE**: frames to latents and back, one class from `tiny` to Pyramid Flow's published one.

A diffusion transformer never sees pixels. It sees what this file makes of them: F = t(L-1)+1 frames become L latents,
the first of which is the first frame alone. That is what *causal* buys. A picture is a video of length one, a latent
never depends on later frames, and a long video can be coded in chunks that keep nothing but the last two frames of
every convolution (`cache`), bit for bit the same as coding it whole.

    encode   conv_in, levels of ResBlocks each followed by a spatial and then a temporal halving, mid, conv_out
             -> mean and log-variance of a Gaussian per latent value; a sample is mean + exp(logvar / 2) * noise
    decode   the mirror image; upsampling is a convolution to 4C (or 2C) channels whose extra channels become pixels

The published network (`SIZES["pyramid"]`: 335 M parameters, 8x8 pixels x 8 frames -> 16 channels) spends its time on
3x3x3 convolutions at full resolution. A small copy of it learns nothing on a CPU within an hour. `tiny` is the same
class with five switches, chosen by short runs of one seed each, not by a controlled ablation:

    patch      4 frames x 4x4 pixels enter as ONE position: sixty times fewer positions for the same pixels. The first
               frame is repeated to fill its patch, so the causal 4(L-1)+1 arithmetic stays
    time_up    the decoder unfolds these 4 frames level by level and paints frame by frame. Painting them from one vector
               was worse at equal cost: mean |error| 0.051 against 0.046 after 400 steps
    kernel_t   1: a latent covers its own 4 frames and no others; the history is the transformer's business
    reference  encoder and decoder are given the true first frame, which image-to-video always has: the decoder at every
               resolution, as the encoder saw it (a U-Net whose left arm is the first frame). Latents then say what
               CHANGED, and the decoder paints (`paint`): every pixel is a mixture of the first frame and of two colours
               its 4x4 patch has for it. Edges are sharp because the mixture alone is per pixel, and where nothing moves
               the picture is copied exactly. Latents count from the code of a still clip (`_still`), so rest is zero and
               the transformer need not repeat in every latent what the scene looks like. Latent 0 has no reference
    shortcut   a linear autoencoder in parallel to the deep one. Without it the first thousand steps do not even find
               the colours: a narrow bottleneck teaches nothing until both of its sides speak the same language

What a code may cost is the KL term's business: it prices the information of every latent, in nats, and what the decoder can
see in the first frame need not be paid for; from scratch the price can be far above the customary 1e-6. And what a code must
not say at all, the training clips see to: encoder and decoder get the same motion, done by two things of one kind (`vae_loss`).

    B batch · C channels · F frames · L latents · H W pixels, h w latent grid · p patch side · t frames per latent
"""
import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data


@dataclass
class VAEConfig:
    widths: tuple = (128, 256, 512, 512)      # channels of each level
    space: tuple = (1, 1, 1, 0)               # does this level end in a spatial halving?
    time: tuple = (1, 1, 1, 0)                # ... and in a temporal one?
    time_up: tuple = None                     # the decoder's temporal doublings, where they are not the encoder's halvings
    layers: tuple = (2, 3)                    # ResBlocks per level: encoder, decoder
    latent: int = 16                          # channels of the latent
    groups: int = 32                          # GroupNorm groups
    kernel_t: int = 3                         # temporal kernel
    patch: tuple = (1, 1)                     # (frames, pixels) of one input position
    reference: bool = False                   # later frames are coded against the true first one
    shortcut: bool = False                    # a linear autoencoder in parallel
    # latents are normalised as (z - shift) * scale, with constants of its own for latent 0, which codes a whole picture
    shift_image: float = -0.04
    scale_image: float = 1 / 1.8726
    shift_video: float = -0.2343
    scale_video: float = 1 / 3.0986


SIZES = {
    "tiny": dict(widths=(64, 112, 144), space=(1, 1, 0), time=(0, 0, 0), time_up=(1, 1, 0), layers=(1, 2), groups=8, kernel_t=1, patch=(4, 4),
                 reference=True, shortcut=True),                                                       # 16x16 x 4, toybox
    "pyramid": dict(),                                                                                 # 8x8 x 8, 335.4 M
    "syncflow": dict(time=(0, 1, 1, 0), latent=4),                                                     # 8x8 x 4 like Open-Sora's, but causal
}


class CausalConv3d(nn.Module):
    """Zero padding on both sides in space, in FRONT only in time. With a cache, the front is what came before."""

    def __init__(self, c_in, c_out, kernel=(3, 3, 3), stride=(1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, kernel, stride, (0, kernel[1] // 2, kernel[2] // 2))
        self.front, self.stride_t = kernel[0] - 1, stride[0]

    def forward(self, x, cache=None):                                         # (B, C, T, H, W)
        if self.front and (cache is None or self not in cache):
            padded = F.pad(x, (0, 0, 0, 0, self.front, 0))
        elif self.front:                                                      # a strided conv has already used one of them
            padded = torch.cat([cache[self][:, :, self.stride_t - 1:], x], 2)
        else:
            padded = x
        if cache is not None and self.front:
            cache[self] = padded[:, :, -self.front:].clone()                  # a view would keep the whole chunk in memory
        return self.conv(padded)


class Norm(nn.GroupNorm):
    """GroupNorm of each frame by itself: statistics that ran over time would let a latent see the future."""

    def forward(self, x):                                                     # (B, C, T, H, W)
        B, C, T, H, W = x.shape
        y = super().forward(x.transpose(1, 2).reshape(B * T, C, H, W))
        return y.view(B, T, C, H, W).transpose(1, 2)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, cfg):
        super().__init__()
        kernel = (cfg.kernel_t, 3, 3)
        self.norm1, self.conv1 = Norm(cfg.groups, c_in, 1e-6), CausalConv3d(c_in, c_out, kernel)
        self.norm2, self.conv2 = Norm(cfg.groups, c_out, 1e-6), CausalConv3d(c_out, c_out, kernel)
        self.conv_shortcut = CausalConv3d(c_in, c_out, (1, 1, 1)) if c_in != c_out else nn.Identity()

    def forward(self, x, cache):
        h = self.conv1(F.silu(self.norm1(x)), cache)
        h = self.conv2(F.silu(self.norm2(h)), cache)
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """One head as wide as the network, over the positions of one frame."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = Norm(groups, c, 1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):                                                     # (B, C, T, H, W)
        h = self.group_norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)           # (B, T, HW, C)
        h = self.to_out[0](F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.transpose(2, 3).unflatten(3, x.shape[3:]).transpose(1, 2)


class Mid(nn.Module):
    def __init__(self, c, cfg):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, c, cfg), ResBlock(c, c, cfg)])
        self.attentions = nn.ModuleList([Attention(c, cfg.groups)])

    def forward(self, x, cache):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, cache)), cache)


class Resample(nn.Module):
    """One halving or doubling, of space or of time. The convolution makes the channels, the reshape makes the pixels."""

    def __init__(self, c, what, kernel_t):
        super().__init__()
        factor, stride = {"down": (1, (1, 2, 2)), "down_t": (1, (2, 1, 1)), "up": (4, (1, 1, 1)), "up_t": (2, (1, 1, 1))}[what]
        self.what, self.conv = what, CausalConv3d(c, factor * c, (kernel_t, 3, 3), stride)

    def forward(self, x, cache, start=True):
        x = self.conv(x, cache)
        if self.what == "up":                                                 # (B, C·2·2, T, H, W) -> (B, C, T, 2H, 2W)
            x = x.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4)
        elif self.what == "up_t":                                             # (B, C·2, T, H, W) -> (B, C, 2T, H, W)
            x = x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)
            x = x[:, :, 1:] if start else x                                   # the first frame has no twin: 2T - 1
        return x


class Level(nn.Module):
    """The ResBlocks of one resolution and the resampling that leads out of it. Attribute names are the published ones."""

    def __init__(self, c_in, c_out, layers, cfg, space, time, way):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c_in if i == 0 else c_out, c_out, cfg) for i in range(layers)])
        make = lambda what: nn.ModuleList([Resample(c_out, what, cfg.kernel_t)])
        if space:
            setattr(self, f"{way}samplers", make(way))
        if time:
            setattr(self, f"temporal_{way}samplers", make(way + "_t"))
        self.way = way

    def forward(self, x, cache, start=True, seen=None):
        for block in self.resnets:
            x = block(x, cache)
        if seen is not None:
            seen.append(x)                                                    # what this resolution made of the picture
        for name in (f"{self.way}samplers", f"temporal_{self.way}samplers"):  # space first, then time, both ways
            for resample in getattr(self, name, ()):
                x = resample(x, cache, start)
        return x


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        w, (t, p) = cfg.widths, cfg.patch
        self.conv_in = CausalConv3d(3 * p * p * (t + cfg.reference), w[0], (cfg.kernel_t, 3, 3))
        self.down_blocks = nn.ModuleList([Level(w[max(i - 1, 0)], w[i], cfg.layers[0], cfg, cfg.space[i], cfg.time[i], "down")
                                          for i in range(len(w))])
        self.mid_block = Mid(w[-1], cfg)
        self.conv_norm_out = Norm(cfg.groups, w[-1], 1e-6)
        self.conv_out = CausalConv3d(w[-1], 2 * cfg.latent, (cfg.kernel_t, 3, 3))
        if cfg.shortcut:
            s = 2 ** sum(cfg.space)
            self.linear = nn.Conv3d(self.conv_in.conv.in_channels, 2 * cfg.latent, (1, s, s), (1, s, s))

    def forward(self, x, cache, seen=None):
        h = self.conv_in(x, cache)
        for level in self.down_blocks:
            h = level(h, cache, seen=seen)
        h = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h, cache))), cache)
        return h + self.linear(x) if hasattr(self, "linear") else h


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        w, p, time = cfg.widths[::-1], cfg.patch[1], cfg.time_up or cfg.time
        self.conv_in = CausalConv3d(cfg.latent, w[0], (cfg.kernel_t, 3, 3))
        self.mid_block = Mid(w[0], cfg)
        self.up_blocks = nn.ModuleList([Level(w[max(i - 1, 0)], w[i], cfg.layers[1], cfg, cfg.space[i], time[i], "up")
                                        for i in range(len(w))])              # the published decoder flags its levels alike
        if cfg.reference:
            self.references = nn.ModuleList([CausalConv3d(w[i], w[max(i - 1, 0)], (1, 1, 1)) for i in range(len(w))])
        self.conv_norm_out = Norm(cfg.groups, w[-1], 1e-6)
        self.conv_out = CausalConv3d(w[-1], 6 + 2 * p * p if cfg.reference else 3 * p * p, (cfg.kernel_t, 3, 3))    # see `paint`
        if cfg.shortcut:
            t, s = 2 ** sum(time), 2 ** sum(cfg.space)
            self.linear = nn.ConvTranspose3d(cfg.latent, self.conv_out.conv.out_channels, (t, s, s), (t, s, s))

    def forward(self, z, cache, start, seen=None):
        x = self.conv_in(z, cache)
        for i, level in enumerate(self.up_blocks):
            if seen is not None:                                              # the encoder's view of the first frame joins in,
                x = x + _later(self.references[i](seen[-1 - i]), x.shape[2], start)       # at every resolution, as in a U-Net
            x = level(self.mid_block(x, cache) if i == 0 else x, cache, start)
        x = self.conv_out(F.silu(self.conv_norm_out(x)), cache)
        return x + self.linear(z)[:, :, -x.shape[2]:] if hasattr(self, "linear") else x


def _later(x, frames, start):
    """x (B, C, 1, h, w) for every frame or latent of a chunk; zeros for the first, which has no reference."""
    x = x.repeat(1, 1, frames, 1, 1)
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 1:]], 2) if start else x


class CausalVideoVAE(nn.Module):
    """Video (B, 3, F, H, W) in [-1, 1] <-> latents (B, C, L, h, w), F = t(L-1)+1. Shapes as in `VAEConfig`."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.encoder, self.decoder = cfg, Encoder(cfg), Decoder(cfg)
        self.quant_conv = CausalConv3d(2 * cfg.latent, 2 * cfg.latent, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(cfg.latent, cfg.latent, (1, 1, 1))
        nn.init.constant_(self.quant_conv.conv.bias[cfg.latent:], -6)         # start with little noise, or nothing is ever coded
        self.stride_t = cfg.patch[0] * 2 ** sum(cfg.time)                     # frames per latent
        self.stride = cfg.patch[1] * 2 ** sum(cfg.space)                      # pixels per latent position

    def patchify(self, x, t):                                                 # (B, 3, F, H, W) -> (B, 3·t·p·p, F/t, H/p, W/p)
        p = self.cfg.patch[1]
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, t))      # (B, 3, F/t, t, H/p, p, W/p, p)
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)

    def unpatchify(self, x):                                                  # (B, n·p·p, F, H/p, W/p) -> (B, n, F, H, W)
        p = self.cfg.patch[1]
        x = x.unflatten(1, (-1, p, p)).permute(0, 1, 4, 5, 2, 6, 3)           # (B, n, F, H/p, p, W/p, p)
        return x.flatten(5, 6).flatten(3, 4)

    def paint(self, x, first):
        """Every pixel is a mixture of the first frame and two colours that its 4x4 patch has for it. Edges come out sharp,
        because only the mixture is per pixel; where nothing moved it is all first frame, an exact copy."""
        p = self.cfg.patch[1]
        colours, logits = x.split([6, 2 * p * p], 1)                          # (B, 6 or 2pp, F, H/p, W/p)
        colours = colours.repeat_interleave(p, -1).repeat_interleave(p, -2).unflatten(1, (2, 3))      # (B, 2, 3, F, H, W)
        w = F.pad(self.unpatchify(logits), (0, 0, 0, 0, 0, 0, 1, 0)).softmax(1)                       # (B, 3, F, H, W)
        return w[:, :1] * first + w[:, 1:2] * colours[:, 0] + w[:, 2:] * colours[:, 1]

    def encode(self, video, first=None, cache=None):
        """Video (B, 3, F, H, W) -> mean, logvar (B, C, L, h, w), logvar clamped to [-30, 20].

        With a `cache` (a dict, empty for the first chunk) it continues where the last call ended; the first chunk has
        t·n + 1 frames, later ones t·n. `first`: the clip's first frame (B, 3, 1, H, W), needed by later chunks only."""
        start, first = not cache, video[:, :, :1] if first is None else first
        if cache is not None:
            cache["started"] = True
        mean, logvar = self._code(video, first, start, cache)
        if self.cfg.reference:
            mean = mean - _later(self._still(first)[0], mean.shape[2], start)
        return mean, logvar.clamp(-30, 20)

    def _code(self, video, first, start, cache=None, seen=None):
        t = self.cfg.patch[0]
        x = torch.cat([video[:, :, :1]] * (t - 1) + [video], 2) if start else video
        x = self.patchify(x, t)
        if self.cfg.reference:
            x = torch.cat([x, _later(self.patchify(first, 1), x.shape[2], start)], 1)
        return self.quant_conv(self.encoder(x, cache, seen)).chunk(2, 1)

    def _still(self, first):
        """What a later latent would be if nothing had moved (latents count from there: rest is exactly zero), and what the
        encoder sees in the first frame, one tensor per level."""
        seen = []
        return self._code(first.repeat(1, 1, self.stride_t, 1, 1), first, False, seen=seen)[0], seen

    def decode(self, z, first=None, cache=None):
        """Latents (B, C, L, h, w) -> video (B, 3, F, H, W), about [-1, 1]. `cache` as in encode (later chunks: F = t·L).

        `first` (B, 3, 1, H, W), for a VAE with reference: the true first frame; without it latent 0 is decoded to serve."""
        start, seen = not cache, None
        if self.cfg.reference:
            first = self.decode(z[:, :, :1], torch.zeros_like(z[:, :1, :1]).repeat(
                1, 3, 1, self.stride, self.stride)) if first is None else first
            seen = self._still(first)[1]
        if cache is not None:
            cache["started"] = True
        x = self.decoder(self.post_quant_conv(z), cache, start, seen)
        return self.paint(x, _later(first, x.shape[2], start)) if self.cfg.reference else self.unpatchify(x)

    def encode_chunks(self, video, frames=16):
        """`encode` of a long video, `frames` (a multiple of t) at a time: the same latents in bounded memory."""
        cache, first, pieces = {}, video[:, :, :1], [video[:, :, :frames + 1], *video[:, :, frames + 1:].split(frames, 2)]
        return tuple(torch.cat(part, 2) for part in zip(*(self.encode(p, first, cache) for p in pieces)))

    def decode_tiles(self, z, caches, tile=32, overlap=8):
        """`decode` of a large picture (no reference), tile for tile with a linear cross-fade, as Pyramid Flow's own pipeline does:
        GroupNorm and attention see a tile instead of the frame, so it is close to `decode`, not equal to it. caches: a dict,
        empty for the first chunk; it keeps every tile's own cache, so that a video can be decoded latent for latent."""
        h, w, p = *z.shape[3:], self.stride
        spots = lambda n: sorted({*range(0, max(n - tile, 0), tile - overlap), max(n - tile, 0)})
        ramp = ((torch.arange(tile * p, device=z.device) + .5) / (overlap * p)).clamp(max=1)
        fade, total, weights = torch.minimum(ramp, ramp.flip(0)), 0, 0
        for y in spots(h):
            for x in spots(w):
                piece = self.decode(z[:, :, :, y:y + tile, x:x + tile], cache=caches.setdefault((y, x), {}))
                weight = fade[:piece.shape[3], None] * fade[None, :piece.shape[4]]                # (tile p, tile p)
                place = (x * p, w * p - x * p - piece.shape[4], y * p, h * p - y * p - piece.shape[3])
                total, weights = total + F.pad(piece * weight, place), weights + F.pad(weight, place)
        return total / weights

    def normalise(self, z, start=True):
        """Latents to about unit variance, latent 0 (if `start`) by constants of its own. `denormalise` is the inverse."""
        c = self.cfg
        video = (z - c.shift_video) * c.scale_video
        return torch.cat([(z[:, :, :1] - c.shift_image) * c.scale_image, video[:, :, 1:]], 2) if start else video

    def denormalise(self, z, start=True):
        c = self.cfg
        video = z / c.scale_video + c.shift_video
        return torch.cat([z[:, :, :1] / c.scale_image + c.shift_image, video[:, :, 1:]], 2) if start else video


def vae_loss(vae, seen, video, noise, kl=1e-4):
    """Reconstruction plus KL -> loss, mean |error|, nats per latent (of the later ones). noise: (B, C, L, h, w), N(0, 1).

    seen, video (B, 3, F, H, W): the same motion, done by two things of one kind (or twice the same clip). The encoder sees
    the one, the decoder is given the FIRST FRAME of the other and has to paint that one. So the colour, the place or the
    size of a thing in a latent is worth nothing: latents come to say how it moves, looks are taken from the first frame, and
    a small error in a generated latent is an error of motion, not of looks. Latent 0 is a picture by itself and keeps its own.

    |error| of pixels and of their differences to the right and below (edges, in place of a downloaded perceptual net),
    both weighted where the clip has left its first frame: little of a picture moves, and all of the lesson is there.
    The first frame, which latent 0 codes alone, counts as if all of it had moved."""
    mean, logvar = vae.encode(seen)
    first = video[:, :, :1]
    painted = vae.decode(mean + (logvar / 2).exp() * noise, first).float()
    moved = ((video - first).abs().amax(1, keepdim=True) > .04).float()
    moved = F.max_pool3d(moved, (1, 3, 3), 1, (0, 1, 1))                      # with a rim of one pixel
    moved[:, :, 0] = 1
    weight = 1 + 7 * moved
    error = painted - torch.cat([seen[:, :, :1], video[:, :, 1:]], 2)         # (B, 3, F, H, W)
    edges = (error.diff(dim=3).abs() * weight[..., 1:, :]).mean() + (error.diff(dim=4).abs() * weight[..., 1:]).mean()
    divergence = .5 * (mean.square() + logvar.exp() - 1 - logvar).float()
    rate = divergence.detach()[:, :, 1:].sum((1, 3, 4)).mean()
    return (error.abs() * weight).mean() + .5 * edges + kl * divergence.mean(), error.detach().abs().mean(), rate


# ------------------------------------------------------------------------------------------------ the audio VAE

@dataclass
class AudioVAEConfig:
    rate: int = 48000                         # samples per second
    ratios: tuple = (4, 5, 6, 8)              # strides of the encoder's levels; times the patch they are the hop, 960: 50 latents a second
    patch: int = 1                            # beyond 1, the first and the last layer see so many samples at once: 10 times faster to train
    width: int = 32                           # channels of the first level; every level doubles them
    latent: int = 128
    lstm: int = 2                             # recurrent layers at the bottom of either side
    shift: tuple = 0.                         # latents are normalised as (z - shift) * scale, a number per channel
    scale: tuple = 1.


AUDIO_SIZES = {
    "tiny": dict(rate=16000, patch=20, ratios=(4, 4), width=64, latent=16, lstm=0),                    # hop 320: 50 Hz, toybox
    "syncflow": dict(),                                                                                # 15 M, 48 kHz
}


class Residual(nn.Module):
    """EnCodec's residual unit: half the channels see three samples."""

    def __init__(self, c):
        super().__init__()
        self.conv1, self.conv2, self.shortcut = nn.Conv1d(c, c // 2, 3, padding=1), nn.Conv1d(c // 2, c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x):                                                     # (B, C, n)
        return self.shortcut(x) + self.conv2(F.elu(self.conv1(F.elu(x))))


class Recurrent(nn.Module):
    """The LSTM at the bottom, with a way past it."""

    def __init__(self, c, layers):
        super().__init__()
        self.lstm = nn.LSTM(c, c, layers, batch_first=True)

    def forward(self, x):                                                     # (B, C, S)
        return x + self.lstm(x.transpose(1, 2))[0].transpose(1, 2)


class Stride(nn.Module):
    """Every r samples one, or every sample r: kernels of 2r, padded or trimmed by r in all, so lengths divide or multiply exactly."""

    def __init__(self, c_in, c_out, r, up=False):
        super().__init__()
        self.conv, self.r, self.up = (nn.ConvTranspose1d if up else nn.Conv1d)(c_in, c_out, 2 * r, r), r, up

    def forward(self, x):
        left, right = self.r - self.r // 2, self.r // 2
        return self.conv(x)[..., left:-right] if self.up else self.conv(F.pad(x, (left, right)))


@torch.no_grad()
def keep_size(vae):
    """Every layer keeps the size of what it is given. By torch's own start a sound left the encoder 100 times smaller than it came, and
    after 400 steps nothing was coded; now most onsets are."""
    for m in vae.modules():
        if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)):
            seen = m.weight[0].numel() if isinstance(m, nn.Conv1d) else 2 * len(m.weight)          # inputs of an output: kernels are 2r, steps r
            nn.init.normal_(m.weight, std=seen ** -.5), nn.init.zeros_(m.bias)
    for m in vae.modules():
        if isinstance(m, Residual):
            nn.init.zeros_(m.conv2.weight)                                    # its way past is all there is
    logvar = slice(vae.cfg.latent, None)
    vae.encoder.last.weight[logvar] *= .1
    nn.init.constant_(vae.encoder.last.bias[logvar], -6)                      # start with little noise, or nothing is ever coded


class AudioVAE(nn.Module):
    """Waveforms <-> latents at 50 Hz: EnCodec's encoder and decoder (SEANet, non-causal), the quantiser replaced by a Gaussian,
    as SyncFlow section 3.1 does. EnCodec's weight normalisation, a matter of optimisation, is left out; what it also gives, layers
    that keep the size of what passes through, is in how the weights start."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, c = cfg, cfg.width
        self.hop = cfg.patch * math.prod(cfg.ratios)                          # samples per latent
        wave = lambda a, b, up: Stride(a, b, cfg.patch, up) if cfg.patch > 1 else nn.Conv1d(a, b, 7, padding=3)
        first, last, down, up = wave(1, c, False), wave(c, 1, True), [], []
        for r in cfg.ratios:                                                  # the decoder is the mirror image, built from its end
            down += [Residual(c), nn.ELU(), Stride(c, 2 * c, r)]
            up = [nn.ELU(), Stride(2 * c, c, r, up=True), Residual(c)] + up
            c *= 2
        memory = lambda: [Recurrent(c, cfg.lstm)] if cfg.lstm else []
        parts = lambda *named: nn.Sequential(OrderedDict(named))
        self.encoder = parts(("first", first), ("blocks", nn.Sequential(*down, *memory(), nn.ELU())), ("last", nn.Conv1d(c, 2 * cfg.latent, 7, padding=3)))
        self.decoder = parts(("first", nn.Conv1d(cfg.latent, c, 7, padding=3)), ("blocks", nn.Sequential(*memory(), *up, nn.ELU())), ("last", last))
        keep_size(self)
        with torch.no_grad():                                                 # sounds, of about 0.1, come in as 1
            for w, gain in [(w, 10) for w in self.encoder.first.parameters()] + [(w, .1) for w in self.decoder.last.parameters()]:
                w *= gain

    def encode(self, wave):
        """Waveforms (B, n) in [-1, 1] -> mean, logvar (B, A, S), S = ceil(n / hop): the end is filled up with silence."""
        x = F.pad(wave, (0, -wave.shape[1] % self.hop))[:, None]              # (B, 1, S·hop)
        mean, logvar = self.encoder(x).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z, samples=None):                                        # (B, A, S) -> (B, samples), S·hop if not given
        return self.decoder(z)[:, 0, :samples]

    def decode_pieces(self, z, samples=None, piece=500, margin=16):
        """`decode` of a long sound in bounded memory: what lies farther than `margin` latents away is not heard (but for an LSTM)."""
        parts = []
        for a in range(0, z.shape[2], piece):
            before = min(a, margin)
            part = self.decode(z[:, :, a - before:a + piece + margin])[:, before * self.hop:]
            parts.append(part[:, :piece * self.hop])
        return torch.cat(parts, 1)[:, :samples]

    def normalise(self, z):                                                   # (B, A, S), every channel by constants of its own
        return (z - self._constants(z)[0]) * self._constants(z)[1]

    def denormalise(self, z):
        return z / self._constants(z)[1] + self._constants(z)[0]

    def _constants(self, z):
        return z.new_tensor(self.cfg.shift).view(-1, 1), z.new_tensor(self.cfg.scale).view(-1, 1)


def spectral_error(made, true, windows=(64, 256, 1024)):
    """Waveforms (B, n) -> how far their spectra are apart, at several resolutions: short windows tell when, long ones tell what."""
    total = 0.
    for w in windows:
        a, b = (torch.stft(x, w, w // 4, window=torch.hann_window(w, device=x.device), return_complex=True).abs() for x in (made, true))       # (B, bins, frames)
        total = total + ((a + 1e-3).log() - (b + 1e-3).log()).abs().mean() + (a - b).norm() / (b.norm() + 1e-3)
    return total / len(windows)


def audio_vae_loss(vae, wave, noise, kl=1e-4, critic=None, adversarial=0.):
    """Reconstruction plus KL, and if asked for an adversary -> loss, mean |error|, spectral error, nats per latent.

    wave (B, n) in [-1, 1], noise (B, A, S) ~ N(0, 1). A waveform's phase is worth little to the ear and much to |error|, so most of
    the lesson is spectral: log magnitudes (what is heard) and magnitudes by their own norm (where the energy is)."""
    mean, logvar = vae.encode(wave)
    made = vae.decode(mean + (logvar / 2).exp() * noise, wave.shape[1]).float()
    error, spectral = (made - wave).abs().mean(), spectral_error(made, wave)
    divergence = .5 * (mean.square() + logvar.exp() - 1 - logvar).float()
    loss = 10 * error + spectral + kl * divergence.mean()
    if critic is not None and adversarial:
        loss = loss + critic.losses(made, wave, adversarial)
    return loss, torch.stack([error.detach(), spectral.detach(), divergence.detach().sum(1).mean()])


class Critic(nn.Module):
    """EnCodec's multi-scale STFT discriminator, for whom regression sounds too dull: it tells true spectra from made ones."""

    def __init__(self, windows=(256, 512, 1024, 2048), width=32):
        super().__init__()
        conv = lambda c_in, c_out, stride, dilation: nn.Conv2d(c_in, c_out, (9, 3), stride, (4, dilation), (1, dilation))       # (bins, frames)
        self.windows = windows
        self.scales = nn.ModuleList([nn.ModuleList([conv(2, width, 1, 1), *(conv(width, width, (2, 1), d) for d in (1, 2, 4)), nn.Conv2d(width, 1, 3, 1, 1)])
                                     for _ in windows])

    def forward(self, wave):
        """(B, n) -> for every scale its layers' outputs, the verdict last."""
        out = []
        for w, layers in zip(self.windows, self.scales):
            x = torch.view_as_real(torch.stft(wave, w, w // 4, window=torch.hann_window(w, device=wave.device), normalized=True, return_complex=True))
            x, features = x.permute(0, 3, 1, 2), []                           # (B, 2, bins, frames)
            for i, layer in enumerate(layers):
                x = layer(x) if i + 1 == len(layers) else F.leaky_relu(layer(x), .2)
                features.append(x)
            out.append(features)
        return out

    def losses(self, made, true, weight):
        """Hinge losses of both sides and feature matching, in one sum with one backward pass: the critic judges detached sounds, and
        what the decoder is told runs through a copy of the critic whose weights take no gradients."""
        judge = lambda x, frozen: torch.func.functional_call(self, {k: p.detach() for k, p in self.named_parameters()}, (x,)) if frozen else self(x)
        real, fake, asked = judge(true, False), judge(made.detach(), False), judge(made, True)
        total = 0.
        for r, f, a in zip(real, fake, asked):
            total = total + (1 - r[-1]).relu().mean() + (1 + f[-1]).relu().mean() + weight * (1 - a[-1]).relu().mean()
            total = total + weight * sum((x - y.detach()).abs().mean() / (y.detach().abs().mean() + 1e-6) for x, y in zip(a[:-1], r[:-1])) / len(r)
        return total / len(self.windows)


# ------------------------------------------------------------------------------------------------ the audio VAE of spectra

@dataclass
class MelVAEConfig:
    rate: int = 16000
    mels: int = data.MELS                     # bands, at 100 frames a second: `data.log_mel`
    width: int = 256
    depth: int = 2                            # residual units on either side of the halving
    latent: int = 16
    shift: tuple = 0.                         # latents are normalised as (z - shift) * scale, a number per channel
    scale: tuple = 1.


MEL_SIZES = {"tiny": dict()}


class MelVAE(nn.Module):
    """Waveforms <-> latents at 50 Hz, by way of log-mel spectra: MMAudio's idea, whose latents Harmony uses. Two frames of 64 bands are a latent.

    A waveform is mostly phase, which nobody hears: 16 numbers a latent cannot hold the partials of a bell. Of the true sounds of 96 clips
    0.95 are closer to their own material than to another; coded as waveforms 0.62 are, and so 0.90, after half the steps.
    The latents say only what is heard, and phases are found afterwards: MMAudio trains a vocoder, we iterate as Griffin and Lim did (1984)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.hop, c, r = cfg, 2 * cfg.rate // data.MEL_RATE, cfg.width, range(cfg.depth)
        conv = lambda a, b: nn.Conv1d(a, b, 3, padding=1)
        blocks = lambda halve: nn.Sequential(*(Residual(c) for _ in r), nn.ELU(), halve, *(Residual(c) for _ in r), nn.ELU())
        parts = lambda *named: nn.Sequential(OrderedDict(zip(("first", "blocks", "last"), named)))
        self.encoder = parts(conv(cfg.mels, c), blocks(Stride(c, c, 2)), conv(c, 2 * cfg.latent))
        self.decoder = parts(conv(cfg.latent, c), blocks(Stride(c, c, 2, up=True)), conv(c, cfg.mels))
        keep_size(self)

    def mel(self, wave):
        """(B, n) -> log-mels (B, 64, 2S), S = ceil(n / hop): the end is filled up with silence."""
        full = F.pad(wave.float(), (0, -wave.shape[1] % self.hop + self.hop)).cpu().numpy()      # one latent more: librosa wants 512 samples
        return torch.from_numpy(np.stack([data.log_mel(w)[:-2].T for w in full])).to(wave)

    def encode(self, wave):                                                   # (B, n) -> mean, logvar (B, A, S)
        mean, logvar = self.encoder(self.mel(wave)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z, samples=None):
        """(B, A, S) -> (B, samples), S·hop if not given; about a tenth of the sound's length of computing."""
        mels = self.decoder(z).float().cpu().numpy()                          # (B, 64, 2S)
        return torch.from_numpy(np.stack([data.from_log_mel(m.T) for m in mels])).to(z.device)[:, :samples]

    decode_pieces = decode                                                    # ten minutes of spectra are 60 000 frames: no need of pieces

    normalise, denormalise, _constants = AudioVAE.normalise, AudioVAE.denormalise, AudioVAE._constants


def mel_vae_loss(vae, mel, noise, kl=2e-3):
    """|error| of log-mels (B, 64, 2S) plus KL -> loss, mean |error|, nats per latent. noise (B, A, S) ~ N(0, 1)."""
    mean, logvar = vae.encoder(mel).chunk(2, 1)
    error = (vae.decoder(mean + (logvar / 2).exp() * noise).float() - mel).abs().mean()
    divergence = .5 * (mean.square() + logvar.exp() - 1 - logvar).float()
    return error + kl * divergence.mean(), torch.stack([error.detach(), divergence.detach().sum(1).mean()])
