"""Syncphony's network: Pyramid Flow's multimodal diffusion transformer (MMDiT) with audio
cross-attention in its later blocks (Syncphony, sections 3.1, 3.4 and appendix D).

    caption --> T5 and CLIP, or ByteText --> text y (B, T, D) --.
                                                                v
    latents (B, C, L, h, w) --> patchify, linear --> x (B, N, D) --> double blocks: text and video
                                                                |    have their own weights
    sigma, pooled text --> temb (B, G, D), used by every adaLN  v
    audio features (B, S, A) --> audio_kv ----------> single blocks: audio cross-attention, then
      of HuBERT or MelEncoder                                   |    one set of weights for both
                                                                v
                     adaLN, linear, unpatchify --> velocity v = eps - z (B, C, L, h, w)

Rotary embeddings (RoPE) of (time, row, column) say where a token is, adaLN says how noisy it is.
Four callers run these blocks, and agree where they overlap:

    forward_teacher_forced     training: [text; clean latents; noisy latents] in one pass, so that
                               every latent of a clip is a target (see `teacher_forcing_mask`)
    KVCache                    sampling, one latent after another: keys and values of the finished
                               latents are kept, so that a step runs the noisy latent only, and a
                               latent's first step the finished one before it along with it
    pyramid.staged_velocity    Pyramid Flow's own: clean latents at falling resolutions, then the
                               noisy one at the resolution of its stage
    pyramid.HistoryCache       the same for sampling: keys and values of the coarsest ones are kept

Not learned in the audio layers:

    window      latent l attends to the audio steps i with |t_i - l| < 1.5          Syncphony eq. 7
                (three latents of sound, 2 Delta + 1, as in D.2.1; eq. 7's printed bounds are
                2 Delta apart and are read as whole latents, l - Delta to l + Delta)
    Audio RoPE  queries are rotated by (l, row, column), keys by (t_i, 0, 0), with one table for
                both: the attention score depends on t_i - l                              eqs. 8-10

    B batch, in sampling rows = clips x guidance branches    L latent frames, h x w, of C channels
    T text tokens    N video tokens, n = (h/p)(w/p) of them a latent, patch side p    W cfg.context
    S audio steps at 50 Hz, of A channels    D width = K heads x d channels    G noise levels
"""
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass
class MMDiTConfig:
    """The defaults are Pyramid Flow's published miniFLUX."""
    n_double: int = 8               # blocks with separate weights for text and video
    n_single: int = 16              # blocks with shared weights; these have the audio layers
    heads: int = 30
    head_dim: int = 64
    axes: tuple = (16, 24, 24)      # channels of a head that rotate with time, row, column
    latent: int = 16                # channels of the video latent
    patch: int = 2                  # a token is a patch x patch piece of one latent
    text_dim: int = 4096            # width of the text states (T5-XXL)
    pooled_dim: int = 768           # width of the pooled text vector (CLIP-L)
    # "zero": clean tokens are modulated with sigma = 0 (cacheable)
    context_sigma: Literal["shared", "zero"] = "shared"
    precondition: bool = False      # EDM-style output, see `velocity_from_output`
    # "bytes", "mel": ByteText and MelEncoder, trained along with the network
    text_encoder: Literal["external", "bytes"] = "external"
    audio_dim: int = 0              # width of the audio features; 0: no audio layers
    audio_encoder: Literal["external", "mel"] = "external"
    # audio steps per latent, of the VAE (`sample.steps_per_latent`): 50 a second, 8 frames at 24
    alpha: float = 50 * 8 / 24
    window: float = 1.5             # eq. 7 with Syncphony's Delta = 1: |t_i - l| < Delta + 0.5
    audio_rope: bool = True         # off: the ablation of Syncphony table 11
    time_scale: float = 1.          # radians per latent of the fastest pair on the time axis
    # latents that a latent attends to, beside latent 0: 30 are 10 s, Pyramid Flow's longest clip
    context: int = 30


TEXT_BYTES = 96                     # what ByteText reads of a text; longer ones are cut
BYTES_PER_TOKEN = 8                 # so a text is 12 tokens
# For so many latents at a time KVCache projects keys and values of the audio. With 1, each audio
# step would be projected 4 times, as windows overlap, instead of 1.8 times; with more, every video
# token attends to more keys that are masked.
AUDIO_LATENTS = 4
# FlexAttention skips blocks of 128 x 128 tokens in which nothing attends: of four by four several,
# of three by three about one. (Where it begins to pay was not measured.)
FLEX_TOKENS = 512
WITHOUT_FLOAT64 = ("mps",)          # types of devices: the GPU of a Mac

# What the sizes for the toybox have in common
TOYBOX = dict(
    axes=(32, 16, 16),              # 2 x 2 tokens a latent: positions need few channels, time many
    context_sigma="zero",           # trained from scratch, so that the context can be cached
    precondition=True,
    text_encoder="bytes",           # short captions
    audio_encoder="mel",
    time_scale=4.,                  # a step of 20 ms turns the fastest pair of channels by 0.48 rad
    context=12,                     # clips of 49 frames are latent 0 and 12 more
)
SIZES = {
    "tiny": dict(TOYBOX, n_double=1, n_single=4, heads=4, text_dim=128, pooled_dim=128,
                 audio_dim=96),
    "small": dict(TOYBOX, n_double=4, n_single=8, heads=8, text_dim=256, pooled_dim=256,
                  audio_dim=384),
    "miniflux": dict(),             # 1,972,059,200 parameters; Syncphony adds audio_dim=1024
}


# --------------------------------------------------------------------- patches, positions, windows

def from_cpu(x, device):
    """x on a device. The CPU goes on at once on CUDA alone, where the copy is safe: other GPUs may
    read memory that was freed in the meantime."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


def patchify(z, p=2):
    """Latents (B, C, L, h, w) -> tokens (B, N, p p C)"""
    # cut columns and rows into patches; inside a token the channel is fastest, then column, row
    z = z.unflatten(4, (-1, p)).unflatten(3, (-1, p))                   # (B, C, L, h/p, p, w/p, p)
    return z.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


def unpatchify(x, L, h, w, p=2):
    """The inverse: tokens (B, N, p p C) -> latents (B, C, L, h, w)"""
    x = x.unflatten(2, (p, p, -1)).unflatten(1, (L, h // p, w // p))    # (B, L, h/p, w/p, p, p, C)
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def position_ids(times, h, w, cell=1.):
    """Ids (time, row, column) of all tokens of latents at `times` -> (len(times) h w, 3).

    h, w: tokens in a column and a row. cell: side of a token, in tokens of the latent that is
    generated; more than 1 for a coarser history, which is laid over the same area."""
    rows = (torch.arange(h) + .5) * cell - .5
    cols = (torch.arange(w) + .5) * cell - .5
    grid = torch.meshgrid(torch.as_tensor(times).float(), rows, cols, indexing="ij")
    return torch.stack(grid, -1).flatten(0, 2)


def audio_positions(n, per_latent, start=0):
    """Times in latents of audio steps start .. start + n - 1 -> (n,): t_i = (i + 0.5)/alpha - 0.5.

    The mean time of the steps that belong to latent l is l (Syncphony appendix D.2.1, step 1).

    A departure: eq. 7's alpha is the ratio of lengths S / L; here it is the nominal one, so that a
    latent has the same window in clips of any length. Latent 0 takes as long a part of this axis as
    the others, but has one frame. So latent l, which is shown from ((l - 1) t + 1)/24 to
    (l t + 1)/24 seconds, with t frames a latent, attends to the sound from (l - 1) t/24 to
    (l + 2) t/24: that of its own frames and of nearly two latents that follow."""
    return (torch.arange(start, start + n) + .5) / per_latent - .5


def temporal_window(t_query, t_key, radius):
    """Which keys a query may attend to, times on one axis -> booleans (queries, keys).

    Those nearer than `radius` (Syncphony eq. 7, Harmony eq. 5), and always the nearest."""
    distance = (t_query[:, None] - t_key).abs()
    # the nearest, so that no softmax is over nothing, for example behind the end of the audio;
    # the tolerance is for two keys at equal distance, which both count
    nearest = distance.amin(1, keepdim=True) + 1e-6
    return (distance < radius) | (distance <= nearest)


def teacher_forcing_mask(n_text, n_clean, n_noisy, tokens_per_latent, context, device="cpu",
                         flex=False):
    """Who attends to whom when many latents of a clip are targets in one pass -> booleans
    (tokens, tokens), tokens = n_text + (n_clean + n_noisy) tokens_per_latent. The noisy latents are
    the last of the clip, of which all but the last are there as clean latents.

                   keys ->  text  clean 0  clean 1 | noisy 1  noisy 2
        text, clean 0        x       x             |
        clean 1              x       x        x    |
        noisy 1              x       x             |    x
        noisy 2              x       x        x    |             x

    Of the clean latents before it, a latent attends to the last `context` ones, and always to
    latent 0. With 12 clean and 12 noisy latents of 4 tokens and a text of 12, 35 % is True.

    flex: the same function as a BlockMask for FlexAttention, which skips blocks of 128 x 128 tokens
    without a pair."""
    # of every token: which latent it belongs to (text: latent 0), and whether it is noisy
    latents = torch.tensor([*range(n_clean), *range(n_clean + 1 - n_noisy, n_clean + 1)])
    latent = F.pad(latents.repeat_interleave(tokens_per_latent), (n_text, 0))
    latent = from_cpu(latent, device)
    is_noisy = torch.arange(len(latent), device=device) >= n_text + n_clean * tokens_per_latent

    def mask_mod(_batch, _head, query, key):
        same_latent = (latent[query] == latent[key]) & (is_noisy[query] == is_noisy[key])
        is_recent = (latent[key] < latent[query]) & (latent[query] <= latent[key] + context)
        return same_latent | ((is_recent | (latent[key] == 0)) & ~is_noisy[key])

    n = len(latent)
    if flex:
        return create_block_mask(mask_mod, None, None, n, n, device)
    token = torch.arange(n, device=device)
    return mask_mod(None, None, token[:, None], token)


@cache
def rope_rates(axes, time_scale, device):
    """Radians per unit of each axis, for every pair of channels -> (number of axes, d/2). A pair
    rotates with one axis, so that these are blocks along a diagonal, and 0 elsewhere."""
    rates = [10000. ** (-torch.arange(0, n, 2, dtype=torch.float64) / n) for n in axes]
    rates[0] *= time_scale
    return torch.block_diag(*rates).to(device)


def rope_table(ids, axes, time_scale=1., device=None):
    """Rotation table of positions ids (..., 3) -> cos, sin (..., d) in float32, on `device`.

    axes[a] channels rotate with axis a, pair j of them by 10000^(-2j / axes[a]) radians per unit,
    on the time axis times `time_scale`. Ids may be fractions; id 0 is no rotation. The sine has the
    signs that `apply_rope` needs: minus for the first channel of each pair."""
    # angles in float64: at latent 100 float32 would be wrong by 1e-5 radians
    device = device or ids.device
    ids = ids.cpu() if ids.device.type in WITHOUT_FLOAT64 else ids
    angles = ids.double() @ rope_rates(tuple(axes), time_scale, ids.device)     # (..., d/2)
    cos = angles.cos().float().repeat_interleave(2, -1)                 # (..., d)
    sin = angles.sin().float()                                          # (..., d/2)
    sin = torch.stack([-sin, sin], -1).flatten(-2)                      # (..., d)
    return from_cpu(cos, device), from_cpu(sin, device)


def check_axes(axes, head_dim):
    """Channels of time, row, column: pairs, and all of a head."""
    assert len(axes) == 3 and sum(axes) == head_dim and not any(n % 2 for n in axes), \
        f"axes {axes} must be three even numbers that add up to the head's {head_dim} channels"


def apply_rope(x, table):
    """Rotate each pair (u, v) of channels of x (B, K, N, d) by its angle in the table (N, d)."""
    cos, sin = table
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)             # (v, u)
    # (u cos - v sin, v cos + u sin)
    return torch.addcmul(x * cos, swapped, sin)


# -------------------------------------------------------------------------------------- small parts

def split_heads(x, K, norm=nn.Identity()):
    """(B, N, D) -> (B, K, N, d), with `norm` over the channels of every head"""
    # The norm comes first: of transposed heads it would make a copy, and so would `attention`,
    # whose fused kernel lays its output out in memory as its queries are.
    return norm(x.unflatten(2, (K, -1))).transpose(1, 2)


def join(parts, dim):
    """torch.cat; without a copy if all parts but one are empty, as the text is in a cached step."""
    parts = [part for part in parts if part.shape[dim]]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def project_qkv(x, K, linears, norms, n_queries=None):
    """x (B, N, D) by three linear layers -> queries (of the last n_queries tokens, None: of all),
    keys, values (B, K, N, d)"""
    to_q, to_k, to_v = linears
    # per head, which keeps the scores bounded
    norm_q, norm_k = norms
    last = x[:, -n_queries:] if n_queries else x
    q = split_heads(to_q(last), K, norm_q)
    k = split_heads(to_k(x), K, norm_k)
    return q, k, split_heads(to_v(x), K)


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class RMSNorm(nn.Module):
    """Over the d channels of a head; in float32 also under autocast, unlike nn.RMSNorm."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return F.rms_norm(x.to(self.weight.dtype), x.shape[-1:], self.weight, 1e-6)


class Modulation(nn.Module):
    """adaLN: n vectors (shifts, scales, gates) for every token from temb (B, G, D)."""

    def __init__(self, D, n):
        super().__init__()
        self.linear = nn.Linear(D, n * D)
        self.n = n

    def forward(self, temb, sigma_index=None):
        """sigma_index (N,): which of the G rows a token takes; None: G is 1."""
        # the linear layer runs once per noise level, not once per token
        m = self.linear(F.silu(temb))                                   # (B, G, n D)
        if sigma_index is not None:
            # (the gradient of index_select takes half the time of that of m[:, sigma_index])
            m = m.index_select(1, sigma_index)                          # (B, N, n D)
        return m.chunk(self.n, -1)                                      # n times (B, N or 1, D)


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, D):
        super().__init__()
        # published weights have the names ff.net.0.proj and ff.net.2
        first = nn.Sequential(OrderedDict(proj=nn.Linear(D, 4 * D)))
        self.net = nn.Sequential(first, nn.GELU("tanh"), nn.Linear(4 * D, D))

    def forward(self, x):
        return self.net(x)


# ---------------------------------------------------------------------------- attention and blocks

@dataclass
class Conditioning:
    """What all blocks share in one pass over T text tokens and N video tokens behind them."""
    temb: torch.Tensor                  # (B, G, D) embedded noise levels and pooled text
    rope: tuple                         # rotation of the tokens: cos, sin (T+N, d)
    n_text: int = 0                     # T; 0: the text is in the cache
    sigma_index: torch.Tensor = None    # (T+N,) row of temb of each token; None: G is 1,
                                        # or all adaLN is given
    # self-attention, None: all to all. Booleans (B or 1, 1, T+N or 1, keys), without gradients also
    # 0 and -inf (`additive`); or a `Packing`, or a BlockMask
    mask: torch.Tensor = None
    audio_mask: torch.Tensor = None     # (N, S) likewise: the window of each video token
    text_levels: int = 1                # how many of the first rows of temb are the text's; packed:
                                        # B, as each text has the noise level of its sample
    n_queries: int = None               # the last tokens alone have queries; None: all of them
    groups: list = None                 # see `attention`; None: all queries attend to all keys
    slots: torch.Tensor = None          # (N,) of `KVCache`: where the new keys and values belong


@dataclass
class Packing:
    """Attention in a packed sequence: samples of any length behind one another, without padding.

    Queries and keys are cut into pieces. Piece i of the queries attends to the pieces sees[i] of
    the keys, or to the first tokens of them, and to nothing else, so that no mask over all pairs is
    needed. Here sample a trains its latent 2 and sample b its latent 1:

        piece    0         1         2      3        4      5          6
                 text a    text b    a 0    a 1      b 0    a noisy    b noisy
        sees     0 2       1 4       0 2    0 2 3    1 4    0 2 3 5    1 4 6
    """
    query_sizes: list                   # tokens of every piece
    key_sizes: list
    sees: list                          # of every piece of queries: [(piece, its first tokens)]
    masks: list                         # of every piece of queries (n, m) booleans; None: all
    n_targets: int = 0                  # so many of the last pieces are noisy latents
    owners: list = None                 # of the video tokens: [(so many, number of their sample)]

    def attend(self, q, k, v):
        k = k.split(self.key_sizes, 2)
        v = v.split(self.key_sizes, 2)
        outputs = []
        for i, queries in enumerate(q.split(self.query_sizes, 2)):
            keys, values = (torch.cat([x[j][:, :, :n] for j, n in self.sees[i]], 2) for x in (k, v))
            outputs.append(attention(queries, keys, values, self.masks[i]))
        return torch.cat(outputs, 1)


def additive(mask, dtype):
    """Booleans -> what is added to the scores, 0 or -inf. scaled_dot_product_attention makes it of
    a boolean mask, three operators; made before, it is made once for all layers and steps. Any
    other mask stays."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def attention_weights(q, k, mask=None):
    """q (B, K, N, d), k (B, K, M, d) -> softmax over the keys that mask allows (B, K, N, M)"""
    scores = (q * q.shape[-1] ** -.5) @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


compiled = cache(torch.compile)


def attention(q, k, v, mask=None, groups=None):
    """q (B, K, N, d), k and v (B, K, M, d), mask broadcast to (B, K, N, M) -> (B, N, D)

    groups: [(n, m)], the next n queries attend to the first m keys. Causality by groups needs no
    mask (N, M), and without one the fused kernels are at their fastest."""
    if isinstance(mask, Packing):
        return mask.attend(q, k, v)
    if isinstance(mask, BlockMask):
        # compiled, on a GPU; uncompiled it would compute all pairs
        eager = v.device.type == "cpu" or torch.compiler.is_compiling()
        flex = flex_attention if eager else compiled(flex_attention)
        return flex(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask).transpose(1, 2).flatten(2)
    if groups:
        outputs = []
        for (_, m), queries in zip(groups, q.split([n for n, _ in groups], 2)):
            group_mask = None if mask is None else mask[..., :m]
            outputs.append(attention(queries, k[:, :, :m], v[:, :, :m], group_mask))
        return torch.cat(outputs, 1)
    q = q.to(v.dtype)
    k = k.to(v.dtype)
    # at the toybox's sizes the fused kernel has the slower backward pass on a CPU; with 240 queries
    # and 300 keys both take the same time, with 611 keys the fused one takes 20 % less
    needs_gradient = q.requires_grad or k.requires_grad or v.requires_grad
    if v.device.type == "cpu" and needs_gradient and k.shape[2] < 300:
        out = attention_weights(q, k, mask).to(v.dtype) @ v             # (B, K, N, d)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask)
    return out.transpose(1, 2).flatten(2)


def queries_of_last(cond, n):
    """Conditioning of a block from which only the last n tokens are read: it makes no others."""
    mask = cond.mask
    # one group is left, the last latent's. (If that is latent 0, its group holds the text, too,
    # whose queries are left out.)
    groups = cond.groups and [(n, cond.groups[-1][1])]
    if isinstance(mask, Packing):
        p = mask.n_targets
        mask = replace(mask, query_sizes=mask.query_sizes[-p:], sees=mask.sees[-p:],
                       masks=mask.masks[-p:])
    elif isinstance(mask, BlockMask):
        # cutting it is not worth it: it would have to be made anew
        return cond
    elif mask is not None:
        mask = mask[:, :, -n:]
    return replace(cond, mask=mask, groups=groups, n_queries=n)


class JointAttention(nn.Module):
    """Self-attention over [text; video]. In double blocks text has projections of its own."""

    def __init__(self, cfg, double):
        super().__init__()
        self.K, d = cfg.heads, cfg.head_dim
        D = self.K * d
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(d) for _ in range(2))
        if double:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(D, D) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (RMSNorm(d) for _ in range(2))
            # output projections for DoubleBlock; a SingleBlock has one for attention and MLP
            self.to_out = nn.ModuleList([nn.Linear(D, D)])
            self.to_add_out = nn.Linear(D, D)

    def forward(self, x, cond, cached_kv, text=None):
        """x (B, N, D), in double blocks text (B, T, D), cached_kv: rotated keys and values
        (B, K, M, d) that go before the new ones; with cond.slots all of a KVCache, into which the
        new ones are written -> (B, T+N, D) before the output projection, new ones. With n_queries:
        of the last tokens alone"""
        q, k, v = project_qkv(x, self.K, (self.to_q, self.to_k, self.to_v),
                              (self.norm_q, self.norm_k), cond.n_queries)  # (B, K, N, d)
        if text is not None:
            linears = self.add_q_proj, self.add_k_proj, self.add_v_proj
            added = project_qkv(text, self.K, linears, (self.norm_added_q, self.norm_added_k))
            q, k, v = (torch.cat(pair, 2) for pair in zip(added, (q, k, v)))    # (B, K, T+N, d)
        # a key is rotated before it is cached: the position of its token does not change
        n = cond.n_queries
        q = apply_rope(q, [table[-n:] for table in cond.rope] if n else cond.rope)
        k = apply_rope(k, cond.rope).to(v.dtype)
        new_kv = k, v
        if cond.slots is not None:
            for cached, new in zip(cached_kv, new_kv):
                cached.index_copy_(2, cond.slots, new.to(cached.dtype))
            k, v = cached_kv                                            # (B, K, n_slots, d)
        elif cached_kv is not None:
            k = torch.cat([cached_kv[0], k], 2)                         # (B, K, M+T+N, d)
            v = torch.cat([cached_kv[1], v], 2)
        return attention(q, k, v, cond.mask, cond.groups), new_kv


class Attention(nn.Module):
    """Queries from x, keys and values from a source of its own width (or from x itself)."""

    def __init__(self, D, K, source_dim):
        super().__init__()
        self.K = K
        self.to_q = nn.Linear(D, D)
        self.to_k, self.to_v = (nn.Linear(source_dim, D) for _ in range(2))
        self.norm_q, self.norm_k = (RMSNorm(D // K) for _ in range(2))
        self.to_out = nn.Linear(D, D)

    def project_kv(self, source, rope=None):
        """Source (B, S, A) -> keys and values (B, K, S, d)"""
        # they do not depend on x: if the source is the same in all steps they are computed once
        k = split_heads(self.to_k(source), self.K, self.norm_k)         # Syncphony eq. 8
        v = split_heads(self.to_v(source), self.K)
        if rope is not None:
            k = apply_rope(k, rope)                                     # eq. 9, keys
        return k.to(v.dtype), v

    def forward(self, x, kv, rope=None, mask=None, attention_maps=None):
        """x (B, N, D), kv of `project_kv`, mask (N, S) or wider -> (B, N, D). A list
        `attention_maps` gets the softmax (B, K, N, S) appended."""
        q = split_heads(self.to_q(x), self.K, self.norm_q)              # eq. 8
        if rope is not None:
            q = apply_rope(q, rope)                                     # eq. 9, queries
        # for pictures of where the model attends: the fused kernel does not return its weights
        if attention_maps is not None:
            attention_maps.append(attention_weights(q, kv[0].to(q.dtype), mask))
        # eq. 10. It prints z_l for the values; its text has W_V a_i.
        return self.to_out(attention(q, *kv, mask))


class CrossAttention(Attention):
    """x + attention of norm(x) to a source, for Syncphony's audio layers (eqs. 7-10) and bridges of
    towers.py. Not in the equations: this norm, those of queries and keys, and that the attention
    starts as zero (`init_weights`)."""

    def __init__(self, D, K, source_dim):
        super().__init__(D, K, source_dim)
        self.norm = nn.LayerNorm(D)

    def forward(self, x, kv, rope=None, mask=None, attention_maps=None):
        return x + super().forward(self.norm(x), kv, rope, mask, attention_maps)


class DoubleBlock(nn.Module):
    """Text and video have weights of their own and meet in one attention."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.heads * cfg.head_dim
        self.norm1, self.norm1_context = (Modulation(D, 6) for _ in range(2))
        self.attn = JointAttention(cfg, double=True)
        self.ff, self.ff_context = MLP(D), MLP(D)

    def forward(self, tokens, cond, cached_kv=None, audio_kv=None, adaln=None):
        """[text; video] (B, T+N, D) -> the same, new keys and values. No audio in these blocks."""
        T = cond.n_text
        text, x = tokens.tensor_split([T], 1)
        # adaLN: shift, scale and gate for attention (1) and MLP (2) of each stream
        index = None if cond.sigma_index is None else cond.sigma_index[T:]
        shift1, scale1, gate1, shift2, scale2, gate2 = adaln or self.norm1(cond.temb, index)
        video_in = modulate(x, shift1, scale1)
        text_in = None
        if T:
            # row 0 of temb: sigma = 0, or with context_sigma="shared" the one sigma of all tokens;
            # in a packed sequence that of the text's sample
            index = None if cond.sigma_index is None else cond.sigma_index[:T]
            text_adaln = self.norm1_context(cond.temb[:, :cond.text_levels], index)
            text_in = modulate(text, *text_adaln[:2])
        # one attention over both, then each stream goes on alone
        attended, new_kv = self.attn(video_in, cond, cached_kv, text_in)         # (B, T+N, D)
        x = x + gate1 * self.attn.to_out[0](attended[:, T:])
        x = x + gate2 * self.ff(modulate(x, shift2, scale2))
        if T:
            _, _, gate1, shift2, scale2, gate2 = text_adaln
            text = text + gate1 * self.attn.to_add_out(attended[:, :T])
            text = text + gate2 * self.ff_context(modulate(text, shift2, scale2))
        return join([text, x], 1), new_kv


class SingleBlock(nn.Module):
    """Audio cross-attention for the video tokens, then one set of weights over [text; video], with
    attention and MLP side by side."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.heads * cfg.head_dim
        self.audio = None
        if cfg.audio_dim:
            self.audio = CrossAttention(D, cfg.heads, cfg.audio_dim)
        self.norm = Modulation(D, 3)
        self.attn = JointAttention(cfg, double=False)
        self.proj_mlp = nn.Linear(D, 4 * D)
        self.proj_out = nn.Linear(5 * D, D)

    def forward(self, tokens, cond, cached_kv=None, audio_kv=None, adaln=None):
        """[text; video] (B, T+N, D), audio_kv: keys and values of the audio for the first rows, or
        None -> the same, new keys and values"""
        if audio_kv is not None:
            # rows beyond those of the audio are the off-sync branch, which skips the layer (eq. 2)
            rows = len(audio_kv[0])
            text, x = tokens.tensor_split([cond.n_text], 1)
            rope = [table[cond.n_text:] for table in cond.rope]
            synced = self.audio(x[:rows], audio_kv, rope, cond.audio_mask)
            tokens = join([text, join([synced, x[rows:]], 0)], 1)
        # attention and MLP side by side, modulated alike, with one output projection
        shift, scale, gate = adaln or self.norm(cond.temb, cond.sigma_index)
        normed = modulate(tokens, shift, scale)
        attended, new_kv = self.attn(normed, cond, cached_kv)                    # (B, T+N, D)
        # keys and values are of all tokens; queries may be of the last ones alone (`run_blocks`)
        if cond.n_queries:
            tokens, normed, gate = (x[:, -cond.n_queries:] for x in (tokens, normed, gate))
        mlp = F.gelu(self.proj_mlp(normed), approximate="tanh")                  # (B, T+N, 4D)
        return tokens + gate * self.proj_out(torch.cat([attended, mlp], 2)), new_kv


# ------------------------------------------------------------------------------ conditioning inputs

class TimeTextEmbed(nn.Module):
    """temb: timesteps (B, G) in 0..1000 and pooled text (B, pooled), where it has a width ->
    (B, G, D)"""

    def __init__(self, D, pooled=0):
        super().__init__()

        def mlp(n):
            layers = dict(linear_1=nn.Linear(n, D), silu=nn.SiLU(), linear_2=nn.Linear(D, D))
            return nn.Sequential(OrderedDict(layers))
        self.timestep_embedder = mlp(256)
        if pooled:
            self.text_embedder = mlp(pooled)

    def forward(self, timestep, pooled=None):
        # 128 frequencies, in the order [cos, sin] of diffusers' flip_sin_to_cos=True
        rate = (-math.log(10000) * torch.arange(128, device=timestep.device) / 128).exp()
        angle = timestep[..., None].float() * rate
        waves = torch.cat([angle.cos(), angle.sin()], -1)                        # (B, G, 256)
        dtype = self.timestep_embedder.linear_1.weight.dtype
        temb = self.timestep_embedder(waves.to(dtype))                           # (B, G, D)
        return temb if pooled is None else temb + self.text_embedder(pooled)[:, None]


def text_bytes(captions):
    """Captions -> (B, TEXT_BYTES) int64: UTF-8 bytes + 1, cut or padded with 0."""
    # the empty caption, all 0, is the null text of guidance
    rows = [[b + 1 for b in caption.encode(errors="replace")[:TEXT_BYTES]] for caption in captions]
    return torch.tensor([row + [0] * (TEXT_BYTES - len(row)) for row in rows])


class ByteText(nn.Module):
    """Small text encoder in place of T5 and CLIP: one token for every BYTES_PER_TOKEN bytes."""

    def __init__(self, dim, pooled):
        super().__init__()
        self.byte_embed = nn.Embedding(257, 64)
        self.pos_embed = nn.Parameter(.02 * torch.randn(TEXT_BYTES, 64))
        self.conv = nn.Conv1d(64, 64, 5, padding=2)
        self.token_conv = nn.Conv1d(64, dim, BYTES_PER_TOKEN, BYTES_PER_TOKEN)
        self.pool = nn.Linear(dim, pooled) if pooled else None

    def forward(self, letters):
        """(B, TEXT_BYTES) -> states (B, T, dim), pooled (B, pooled) or None"""
        # bytes and their positions, a residual convolution over 5 of them, then the tokens
        x = (self.byte_embed(letters) + self.pos_embed).transpose(1, 2)         # (B, 64, bytes)
        x = F.gelu(self.conv(x)) + x
        x = self.token_conv(x).transpose(1, 2)                                  # (B, T, dim)
        if self.pool is None:
            return F.layer_norm(x, x.shape[-1:]), None
        # This GELU can die at high learning rates (outputs near 0, no gradient), which is why the
        # towers' encoders end in a norm. It stays because the shipped a2v weights have it.
        x = F.gelu(x)
        return x, self.pool(x.mean(1))


class MelEncoder(nn.Module):
    """Small audio encoder in place of HuBERT: log-mels (B, 2S, 64), 100 Hz -> (B, S, A), 50 Hz.

    It reaches 1.3 s to either side: a ball must start to roll 0.8 s before the sound of its hit,
    and the window of a latent (eq. 7) alone ends 0.3 s after its last frame."""

    def __init__(self, A):
        super().__init__()
        self.strided = nn.Conv1d(64, A, 4, 2, padding=1)
        self.norms = nn.ModuleList([nn.LayerNorm(A) for _ in range(7)])
        # 1 + 2 + ... + 32 = 63 steps of 20 ms to either side
        dilations = (1, 2, 4, 8, 16, 32)
        self.layers = nn.ModuleList([nn.Conv1d(A, A, 3, padding=g, dilation=g) for g in dilations])

    def forward(self, mel):
        # a strided convolution halves the rate, six residual ones reach ever farther
        x = self.strided(mel.transpose(1, 2)).transpose(1, 2)                    # (B, S, A)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(F.gelu(norm(x)).transpose(1, 2)).transpose(1, 2)
        return self.norms[-1](x)


# ------------------------------------------------------------------------------------------- output

def init_weights(module):
    """Xavier for every linear layer, then zero for those that would act at once -> module"""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    for m in module.modules():
        # adaLN-Zero (DiT): all gates of an MMDiT are 0, so every block starts as the identity; a
        # tower adds a random table per block, as in PixArt, so that its gates are not 0
        if isinstance(m, Modulation):
            nn.init.zeros_(m.linear.weight)
        # a new layer adds 0: a pretrained backbone starts as the model it was
        if isinstance(m, CrossAttention):
            nn.init.zeros_(m.to_out.weight)
    return module


def velocity_from_output(out, x, sigma):
    """The last layer's output as a velocity, preconditioned as in EDM (Karras et al. 2022).

    s = sigma; z and eps of unit variance; x = (1-s) z + s eps; d = Var x = (1-s)^2 + s^2:
        E[z | x] = (1-s) x / d        Var[z | x] = 1 - (1-s)^2 / d = s^2 / d
        z_hat    = ((1-s) x + s sqrt(d) out) / d       out: what x lacks, of unit variance
        v_hat    = (x - z_hat) / s = ((2s - 1) x - sqrt(d) out) / d      as d - (1-s) = s (2s - 1)
    After 400 steps (one seed) the error at sigma > 0.75 was 0.61 so, and 0.84 with out = z_hat."""
    d = (1 - sigma) ** 2 + sigma ** 2
    return ((2 * sigma - 1) * x - d ** .5 * out.to(x.dtype)) / d


# ---------------------------------------------------------------------------------- the transformer

class MMDiT(nn.Module):
    """Syncphony's network, with the names of Pyramid Flow's weights. `forward_teacher_forced`
    trains it, `KVCache` samples from it; `forward` is a pass without a cache, of pyramid.py."""

    def __init__(self, cfg):
        super().__init__()
        check_axes(cfg.axes, cfg.head_dim)
        self.cfg = cfg
        D = cfg.heads * cfg.head_dim
        token = cfg.patch ** 2 * cfg.latent
        # inputs, blocks, output: named as in the published weights
        self.x_embedder = nn.Linear(token, D)
        self.context_embedder = nn.Linear(cfg.text_dim, D)
        self.time_text_embed = TimeTextEmbed(D, cfg.pooled_dim)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(cfg) for _ in range(cfg.n_double)])
        singles = [SingleBlock(cfg) for _ in range(cfg.n_single)]
        self.single_transformer_blocks = nn.ModuleList(singles)
        self.norm_out = Modulation(D, 2)
        self.proj_out = nn.Linear(D, token)
        # encoders that are trained along
        if cfg.text_encoder == "bytes":
            self.text_encoder = ByteText(cfg.text_dim, cfg.pooled_dim)
        if cfg.audio_encoder == "mel" and cfg.audio_dim:
            self.mel_encoder = MelEncoder(cfg.audio_dim)
        # what KVCache calls instead of `cached_step`: see sample.compile_network
        self.compiled_step = None
        init_weights(self)
        # as in DiT, the first output is 0 instead of a random velocity
        nn.init.zeros_(self.proj_out.weight)

    # ---- encoders

    def encode_text(self, text_inputs):
        """Bytes (B, TEXT_BYTES) of `text_bytes`, or for external encoders what
        pyramid.stack_prompts or unpadded_prompts returns, which stays -> states (B, T, text_dim),
        their mask (B, T), pooled"""
        if self.cfg.text_encoder != "bytes":
            return text_inputs
        # no padding mask: the empty letters are learned; the shipped a2v weights were trained so
        states, pooled = self.text_encoder(text_inputs)
        return states, torch.ones_like(states[..., 0]), pooled

    def encode_audio(self, audio_inputs):
        """Log-mels (B, 2S, 64) -> features (B, S, A); those of an external encoder stay"""
        return self.mel_encoder(audio_inputs) if self.cfg.audio_encoder == "mel" else audio_inputs

    # ---- one pass

    def all_blocks(self):
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def token_grid(self, z):
        """Tokens in a column and in a row of latents z."""
        return z.shape[3] // self.cfg.patch, z.shape[4] // self.cfg.patch

    def rope(self, ids, device, n_text=0):
        """Rotation of tokens at ids (N, 3), with text at (0, 0, 0) before them."""
        return rope_table(F.pad(ids, (0, 0, n_text, 0)), self.cfg.axes, self.cfg.time_scale, device)

    def project_audio(self, audio_features, times, start=0, packing=None):
        """Audio features (B, S, A) of steps start .. start + S - 1, times (N,) of the video tokens
        -> keys and values of every single block, mask (N, S). Without audio: None, None. packing:
        that of the self-attention, if the tokens are those of several samples"""
        if audio_features is None:
            return None, None
        device = audio_features.device
        B, S = audio_features.shape[:2]
        t = audio_positions(S, self.cfg.alpha, start)                           # (S,)
        audio_mask = temporal_window(times, t, self.cfg.window)                 # eq. 7
        audio_mask = from_cpu(audio_mask, device)
        if packing is not None:
            # the audio of all samples behind one another; a latent attends to that of its sample
            sizes, owners = zip(*packing.owners)
            audio_mask = Packing(sizes, B * [S], [[(b, S)] for b in owners],
                                 audio_mask.split(sizes))
            audio_features = audio_features.flatten(0, 1)[None]                 # (1, B S, A)
            t = t.repeat(B)
        # keys stand at (t_i, 0, 0); without Audio RoPE all of them at 0
        t = t if self.cfg.audio_rope else torch.zeros_like(t)
        rope = self.rope(F.pad(t[:, None], (0, 2)), device)
        blocks = self.single_transformer_blocks
        return [block.audio.project_kv(audio_features, rope) for block in blocks], audio_mask

    def run_blocks(self, clips, text, cond, audio_kv=None, cached_kv=None, n_off_sync=0,
                   adaln=None):
        """Output for the last of `clips` (B + n_off_sync, C, L, h, w); [(keys, values) per block].
        Of a packed sequence: list of the outputs for the last clips, one for every sample.

        clips: list of latents (B, C, L_i, h_i, w_i); text (B, T, text_dim), None: it is in the
        cache; audio_kv: of `project_audio`; cached_kv: per block, those of the clean context;
        n_off_sync: how many of the first rows run once more, without audio layers (eq. 2);
        adaln: of `all_adaln`, None: computed here"""
        # patches to tokens, after those of the text
        tokens = join([patchify(z, self.cfg.patch) for z in clips], 1)
        tokens = self.x_embedder(tokens)                                        # (B, N, D)
        if text is not None:
            tokens = torch.cat([self.context_embedder(text), tokens], 1)        # (B, T+N, D)
        # (a pass for gradients needs booleans: see `attention`)
        if not torch.is_grad_enabled():
            masks = [additive(mask, tokens.dtype) for mask in (cond.mask, cond.audio_mask)]
            cond = replace(cond, mask=masks[0], audio_mask=masks[1])

        def repeat(t):
            return torch.cat([t, t[:n_off_sync]])

        # packed: temb has one row, and `clips` one noisy clip, for every sample
        packed = isinstance(cond.mask, Packing)
        targets = clips[-cond.temb.shape[1]:] if packed else clips[-1:]
        sizes = [z[0, 0].numel() // self.cfg.patch ** 2 for z in targets]
        n = sum(sizes)                                                          # output tokens
        n_double = len(self.transformer_blocks)
        new_kv = []
        for i, block in enumerate(self.all_blocks()):
            # Full and off-sync branch differ in the audio layers: up to the first of them they are
            # computed once, then the rows are repeated. A mask of one row is broadcast to all.
            if i == n_double and n_off_sync:
                mask = cond.mask if cond.mask is None or len(cond.mask) == 1 else repeat(cond.mask)
                cond = replace(cond, temb=repeat(cond.temb), mask=mask)
                tokens = repeat(tokens)
            # nothing but the output reads the last block, if it is a single-stream one
            is_last = i == len(self.all_blocks()) - 1
            if is_last and i >= n_double and n < tokens.shape[1]:
                cond = queries_of_last(cond, n)
            # a block is given its own ones of the lists: torch.compile compiles it once for all
            past = cached_kv[i] if cached_kv else None
            audio = audio_kv[i - n_double] if audio_kv and i >= n_double else None
            tokens, kv = block(tokens, cond, past, audio, adaln[i] if adaln else None)
            new_kv.append(kv)

        # scale before shift, as in diffusers' AdaLayerNormContinuous
        index = None if cond.sigma_index is None else cond.sigma_index[-n:]
        scale, shift = adaln[-1] if adaln else self.norm_out(cond.temb, index)
        out = self.proj_out(modulate(tokens[:, -n:], shift, scale))             # (B, n, p p C)
        outputs = [unpatchify(part, *z.shape[2:], self.cfg.patch)
                   for part, z in zip(out.split(sizes, 1), targets)]
        return outputs if packed else outputs[0], new_kv

    def to_velocity(self, out, x, sigma):
        return velocity_from_output(out, x, sigma) if self.cfg.precondition else out

    def forward(self, clips, ids, mask, timestep, text, pooled, audio_features=None,
                sigma_index=None, n_off_sync=0, audio_start=0):
        """Output for the last of `clips`, from scratch, that is without a cache.

        ids (N, 3) of the clips' tokens; mask (B or 1, 1, T+N, T+N); timestep (B, G) in 0..1000;
        text (B, T, text_dim); pooled (B, pooled_dim); audio_features (B, S, A) from the step
        `audio_start` on, None: no audio layers; sigma_index: see `Conditioning`; clips,
        n_off_sync: see `run_blocks`.

        With a `Packing` for a mask, clips and text are those of all samples behind one another,
        in one row; timestep (B, 1), and sigma_index is the number of a token's sample"""
        T = text.shape[1]
        packing = mask if isinstance(mask, Packing) else None
        # positions, noise levels and audio, then the blocks
        audio_kv, audio_mask = self.project_audio(audio_features, ids[:, 0], audio_start, packing)
        temb = self.time_text_embed(timestep, pooled)                           # (B, G, D)
        rope = self.rope(ids, text.device, T)
        cond = Conditioning(temb, rope, T, sigma_index, mask, audio_mask)
        if packing:
            cond = replace(cond, temb=temb.transpose(0, 1), text_levels=len(temb))
        return self.run_blocks(clips, text, cond, audio_kv, n_off_sync=n_off_sync)[0]

    def all_adaln(self, temb, n_off_sync=0, sigma_index=None):
        """The adaLN vectors of the video tokens, from temb (B, G, D): per block, of the output."""
        rows = torch.cat([temb, temb[:n_off_sync]])
        return [*(block.norm1(temb, sigma_index) for block in self.transformer_blocks),
                *(block.norm(rows, sigma_index) for block in self.single_transformer_blocks),
                self.norm_out(rows[:, -1:])]

    def cached_step(self, clips, sigma, adaln, cond, audio_kv, cached_kv, n_off_sync):
        """A step of `KVCache`: velocity of the last clip (B, C, 1, h, w), off-sync rows last."""
        out, _ = self.run_blocks(clips, None, cond, audio_kv, cached_kv, n_off_sync, adaln)
        # the precondition needs the input of every row
        x = clips[-1]
        return self.to_velocity(out, join([x, x[:n_off_sync]], 0), sigma)

    # ---- training where clean tokens have sigma = 0 (context_sigma="zero")

    def forward_teacher_forced(self, clean, noisy, sigma, text, pooled, audio_features=None):
        """Velocities of many latents in one pass, as `KVCache` gives them one by one.

        clean (B, C, L, h, w): latents 0 .. L-1, which the network takes for clean; noisy
        (B, C, M, h, w): the last M of them, at sigma (B, M); text, pooled, audio_features as in
        `forward` -> like noisy"""
        L = clean.shape[2]
        M = noisy.shape[2]
        T = text.shape[1]
        h, w = self.token_grid(noisy)
        # no latent comes after the last one, so that nothing attends to it
        clean = clean[:, :, :-1]
        # noisy latents stand at the times of the clean latents that they will become
        ids = position_ids([*range(L - 1), *range(L - M, L)], h, w)             # (N, 3)
        # evaluations are not compiled, and uncompiled FlexAttention holds all scores in float32
        flex = noisy.is_cuda and self.training and T + len(ids) >= FLEX_TOKENS
        mask = teacher_forcing_mask(T, L - 1, M, h * w, self.cfg.context, noisy.device, flex)
        # a noise level for every noisy latent; text and clean latents take row 0, sigma = 0
        timestep = 1000 * F.pad(sigma, (1, 0))                                  # (B, 1+M)
        index = torch.arange(1, M + 1).repeat_interleave(h * w)
        index = F.pad(index, (T + (L - 1) * h * w, 0))                          # (T+N,)
        index = from_cpu(index, noisy.device)
        out = self([clean, noisy], ids, mask if flex else mask[None, None], timestep, text, pooled,
                   audio_features, index)
        return self.to_velocity(out, noisy, sigma[:, None, :, None, None])


# ---------------------------------------------------------------------------- sampling with a cache

class KVCache:
    """One latent after another: the keys and values of the finished ones, text included.

        | text | latent 0 | text | latent 0 | 15 | 16 | 17 | 4 | 5 | 6 |  ...  | 12 | 13 | 14 |
        '- sink of even --'-- of odd ones --'--- ring: latent l in slot (l - 1) mod (W + 2) ---'

    It is exact: the context has sigma = 0 (`context_sigma="zero"`) and never attends to the noisy
    latent, a key keeps the rotation of its own time, and the audio window of a finished latent is
    fixed. (Where sigma is "shared", as published: `pyramid.HistoryCache`.) The order of keys does
    not matter, since their time is in their rotation.

    Every step writes the keys of its one or two latents into their slots of the ring and attends
    to the whole cache, without a copy of it; a mask hides what is empty, or more than W latents
    back. Keys of a noisy latent are overwritten by its next step; those that stay are of the
    finished one, at sigma = 0. They cost no pass of their own: the first step of the next latent
    makes them, a pass over both with a noise level for each.

        keys ->      sink  |  4   5   6  ...  14   15   16   17        W = 12
        clean 16     even  |  x   x   x        x    x    x             sigma = 0
        noisy 17     odd   |      x   x        x    x    x    x        sigma = 1

    So a latent takes as many passes as steps.

    The sink is never dropped: without its first tokens attention degrades (attention sinks,
    StreamingLLM, Xiao et al. 2023). For a latent l > W it is rotated as if it stood at time l - W,
    so that it is never farther away than in training. A pass over latents l - 1 and l needs two
    such rotations, hence two copies, for even and for odd latents. Both are made from the unrotated
    keys (`self.sink`).

    Shapes never change. So torch.compile makes two graphs of a step, `MMDiT.cached_step`, of one
    latent and of two, for clips of any length. What depends on sigma or on the latent is an input
    of the graph and computed once for each: `noise_level`, `begin_latent`."""

    @torch.no_grad()
    def __init__(self, model, first, text, pooled, audio_features=None, n_off_sync=0):
        """Latent 0 (B, C, 1, h, w), text (B, T, text_dim), pooled (B, pooled_dim), audio features
        (B, S, A) of the whole clip. The B rows are guidance branches of one or more clips; the
        first n_off_sync of them get an off-sync row each, which has keys of its own, of a history
        that skipped the audio layers as well."""
        self.model = model
        self.grid = model.token_grid(first)
        self.pooled = pooled
        self.audio_features = audio_features
        self.n_off_sync = n_off_sync
        self.n = self.grid[0] * self.grid[1]
        self.n_sink = text.shape[1] + self.n
        self.n_ring = model.cfg.context + 2                                     # in latents
        self.levels = {}                # of `noise_level`
        self.finished = None            # the latent before this one, if its keys are to be made
        # prefill: text and latent 0, without a context
        _, temb, _ = self.noise_level((0.,), first)
        rope = model.rope(position_ids([0], *self.grid), pooled.device, text.shape[1])
        audio_kv, audio_mask = self.audio_around([0])
        cond = Conditioning(temb, rope, text.shape[1], audio_mask=audio_mask)
        _, self.sink = model.run_blocks([first], text, cond, audio_kv, n_off_sync=n_off_sync)
        # per block: keys and values (rows, K, slots, d), in single blocks with off-sync rows; the
        # ring is 0, not empty memory: masked values have weight 0, and 0 * nan would be nan
        ring = (0, 0, 0, self.n_ring * self.n)
        self.kv = [[F.pad(torch.cat([t, t], 2), ring) for t in sink] for sink in self.sink]
        self.step = model.cached_step
        if model.compiled_step is not None:
            self.step = model.compiled_step
            # a CUDA graph copies its inputs but those that stay where they are; so does the static
            # cache of transformers. No guard: another clip is recorded anew, but not compiled
            for cached in chain(*self.kv):
                torch._dynamo.mark_static_address(cached, guard=False)
        self.begin_latent(1)

    def audio_around(self, latents):
        """Keys and values per block of the audio in the windows of consecutive latents, masks
        (latents, S) of the windows"""
        cfg = self.model.cfg
        audio = self.audio_features
        if audio is None:
            return None, torch.zeros(len(latents), 0, device=self.pooled.device)
        # a slice of constant length: t_i = (i + .5)/alpha - .5 > l - radius gives
        # i > (l + .5 - radius) alpha - .5; 2 radius alpha steps follow, alpha for each other l
        length = math.ceil((2 * cfg.window + AUDIO_LATENTS) * cfg.alpha) + 1
        start = math.floor((latents[0] + .5 - cfg.window) * cfg.alpha)
        start = max(0, min(start, audio.shape[1] - length))
        times = torch.tensor(latents).float()
        kv, mask = self.model.project_audio(audio[:, start:start + length], times, start)
        return kv, additive(mask, kv[0][1].dtype)

    def begin_latent(self, latent):
        """What the steps of a latent share: rotation, keys in use and slots for its own, audio. Of
        the finished latent and this one: `pair`; of this one: `alone`."""
        self.latent = latent
        device = self.pooled.device
        W = self.model.cfg.context
        n = self.n
        latents = torch.tensor([[latent - 1], [latent]])
        cos, sin = self.model.rope(position_ids(latents[:, 0], *self.grid), device)
        # the latents that the ring holds (below 1: none yet), and which of them the two see
        held = latent - (latent - 1 - torch.arange(self.n_ring)) % self.n_ring
        ring = (held >= 1) & (held <= latents) & (held >= latents - W)          # (2, W+2)
        sinks = latents % 2 == torch.arange(2)                                  # (2, 2)
        parts = sinks.repeat_interleave(self.n_sink, 1), ring.repeat_interleave(n, 1)
        mask = additive(torch.cat(parts, 1), self.kv[0][1].dtype)               # (2, slots)
        mask = from_cpu(mask[None, None], device)
        slots = 2 * self.n_sink + (latents - 1) % self.n_ring * n + torch.arange(n)
        slots = from_cpu(slots, device)                                         # (2, n)
        i = (latent - 1) % AUDIO_LATENTS
        if i == 0:
            around = range(latent - 1, latent + AUDIO_LATENTS)
            self.audio_kv, self.windows = self.audio_around(around)
        windows = self.windows[i:i + 2]                                         # (2, S)
        self.pair = Conditioning(None, (cos, sin), mask=mask.repeat_interleave(n, 2),
                                 audio_mask=windows.repeat_interleave(n, 0), slots=slots.flatten())
        # (a mask of one row is that of all tokens)
        self.alone = Conditioning(None, (cos[n:], sin[n:]), mask=mask[:, :, 1:],
                                  audio_mask=windows[1:], slots=slots[1])
        # its sink is moved in time so that it stays W latents before it
        if latent > W:
            table = self.model.rope(torch.tensor([[latent - W, 0., 0.]]), device)
            own = slice(latent % 2 * self.n_sink, (latent % 2 + 1) * self.n_sink)
            for (cached, _), (unrotated, _) in zip(self.kv, self.sink):
                cached[:, :, own] = apply_rope(unrotated.float(), table).to(cached.dtype)

    def noise_level(self, sigmas, like):
        """What depends on the sigmas of one or two latents, numbers, and not on the latents: the
        last one as a tensor, temb, adaLN.

        All latents have the same sigmas, so it is kept: 12 % of a step on a CPU (size tiny)."""
        if sigmas not in self.levels:
            timestep = torch.tensor([1000. * sigma for sigma in sigmas])
            timestep = from_cpu(timestep, like.device).expand(len(like), -1)    # (B, G)
            temb = self.model.time_text_embed(timestep, self.pooled)            # (B, G, D)
            index = torch.arange(len(sigmas), device=like.device).repeat_interleave(self.n)
            adaln = self.model.all_adaln(temb, self.n_off_sync, index if len(sigmas) > 1 else None)
            self.levels[sigmas] = like.new_full((), sigmas[-1]), temb, adaln
        return self.levels[sigmas]

    @torch.no_grad()
    def denoise_step(self, x, sigma):
        """Velocity of the noisy latent x (B, C, 1, h, w) at sigma, a number, off-sync rows last ->
        (B + n_off_sync, C, 1, h, w)"""
        clips = [x]
        cond = self.alone
        if self.finished is not None:
            clips = [self.finished, x]
            cond = self.pair
            self.finished = None
        # another layout in memory would be another graph
        clips = [clip.contiguous() for clip in clips]
        # (0, sigma) of a pair, (sigma,) of one alone
        sigma, temb, adaln = self.noise_level((0., sigma)[-len(clips):], x)
        cond = replace(cond, temb=temb)
        return self.step(clips, sigma, adaln, cond, self.audio_kv, self.kv, self.n_off_sync)

    @torch.no_grad()
    def append(self, z):
        """Go on to the next latent, z (B, C, 1, h, w) being the finished one."""
        if self.finished is None:
            self.finished = z
        else:
            # this latent had no step: the keys of both are made now
            self.denoise_step(z, 0.)
        self.begin_latent(self.latent + 1)
