"""The networks: Pyramid Flow's multimodal diffusion transformer with Syncphony's audio layers in it; SyncFlow's and Harmony's two towers.

**Backbone.** Video arrives as latents (see vae.py), cut into 2x2 patches: tokens. Text tokens stand before them, and
attention is over [text; video] together. The first `n_double` blocks have separate weights for text and video, the
`n_single` blocks after them share one set. Where a token stands in (time, row, column) is told to attention by rotating
pairs of query and key channels (RoPE, three axes); how noisy it is, by scaling and shifting its features (adaLN).

**Autoregression.** Latent l is made given text, audio and the clean latents before it, so attention is causal over
latents. Three calls, one meaning:

    `forward_teacher_forced`          training: [text; all clean latents; all noisy latents] in ONE pass; noisy latent l sees clean
                        latents < l and itself, so every latent of a clip is a target in every step
    `append_latent`, `denoise_step` sampling: keys and values of the clean context are kept; a step runs only the latent being made
    `forward`           Pyramid Flow's own call: a list of clean clips at falling resolutions, then one noisy clip

The cache is exact because the clean context keeps its own clock (`context_clock="own"`): text and clean latents are
modulated as what they are, sigma = 0, so their keys and values do not depend on how far the noisy latent has come. The
published weights were trained with the noisy clip's clock on every token ("shared"), and cannot be cached.

**Audio (Syncphony, section 3.2 and appendix D).** Before the self-attention of every single-stream block, video tokens
look into the audio through `AudioCrossAttention`. Two facts make it synchronous, and neither is learned:

    window     latent l sees the audio steps i with |t_i - l| < 1.5 and no others                             eq. 7
    Audio RoPE queries are rotated at (l, h, w), keys at (t_i, 0, 0), t_i = (i + 0.5)/alpha - 0.5 in latent units, with
               the SAME table: when exactly something sounds becomes an angle between query and key        eqs. 8-10

t_i depends on i alone, so keys are rotated once and the window is a boolean mask. Its output layer starts at zero: a
fresh audio model IS the backbone. Audio Sync Guidance (sample.py) leaves these layers out: `audio=None`.

**Two towers (SyncFlow, section 3.2)** at the end of the file: `DualTower`, a video tower of spatial and temporal attention and an
audio tower beside it, whose layer l looks at what layer l of the video saw. Same attention, same rotation by time. **Harmony** (section 3.3)
lets both look, through the bridges that Syncphony's audio layers are too: at every layer, in a window, at places laid on the
queries' timeline. Text is looked at by the video and stands among the tokens of the audio, after a reference of its timbre.

    B batch · L latent frames · h w latent grid · C latent channels · N = L·(h/p)·(w/p) video tokens, p patch side · T text tokens
    S audio steps at 50 Hz · A audio channels · D width = K heads x d · G groups of tokens that share one sigma
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class MMDiTConfig:
    n_double: int = 8                         # blocks with separate weights for text and video
    n_single: int = 16                        # blocks that share them; audio layers sit in these
    heads: int = 30
    head_dim: int = 64
    axes: tuple = (16, 24, 24)                # channels of a head rotated by time, row, column
    latent: int = 16                          # channels of the video latent
    patch: int = 2                            # a token is a patch x patch piece of it
    text_dim: int = 4096                      # width of the text states (T5-XXL)
    pooled_dim: int = 768                     # width of the pooled text vector (CLIP-L)
    context_clock: str = "shared"             # "own": clean tokens are modulated with sigma = 0, and can be cached
    precondition: bool = False                # the last layer gives what x does not tell yet, see `velocity_from_output`
    text: str = "external"                    # "bytes": a small text encoder of our own, trained along
    audio_dim: int = 0                        # width of the audio features; 0 = no audio layers
    audio: str = "external"                   # "mel": a small convolutional encoder of our own over log-mels
    alpha: float = 50 * 8 / 24                # audio steps per latent: 50 Hz, 8 frames at 24 fps
    window: float = 1.5                       # |t_i - l| < Delta + 0.5 with Delta = 1
    audio_rope: bool = True                   # off: the ablation of Syncphony table 11
    time_scale: float = 1.                    # radians per latent at the highest frequency of the time axis
    context: int = 30                         # clean latents that a latent looks back on, beside the first


SIZES = {
    "tiny": dict(n_double=1, n_single=4, heads=4, axes=(32, 16, 16), text_dim=128, pooled_dim=128,
                 context_clock="own", precondition=True, text="bytes", audio_dim=96, audio="mel", alpha=50 * 4 / 24, time_scale=4., context=12),
    "small": dict(n_double=4, n_single=8, heads=8, axes=(32, 16, 16), text_dim=256, pooled_dim=256,
                  context_clock="own", precondition=True, text="bytes", audio_dim=384, audio="mel", alpha=50 * 4 / 24, time_scale=4., context=12),
    "miniflux": dict(),                       # Pyramid Flow's: 1,972,059,200 parameters; Syncphony adds audio_dim=1024
}


# ------------------------------------------------------------------------------------------------ small parts

def patchify(z, p=2):                                                         # (B, C, L, h, w) -> (B, N, ppC), channel fastest
    z = z.unflatten(4, (-1, p)).unflatten(3, (-1, p))                         # (B, C, L, h/p, p, w/p, p)
    return z.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


def unpatchify(x, L, h, w, p=2):                                              # (B, N, ppC) -> (B, C, L, h, w)
    x = x.unflatten(2, (p, p, -1)).unflatten(1, (L, h // p, w // p))          # (B, L, h/p, w/p, p, p, C)
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def position_ids(times, h, w, fine=None):
    """Ids (time, row, column) of the tokens of some latents -> (len(times)·h·w, 3), h w in patches. A grid coarser than
    `fine` (the grid that is being made) is laid over it: cell i covers r fine cells, its centre is (i + 0.5) r - 0.5."""
    r = 1. if fine is None else fine / h
    rows, cols = (torch.arange(h) + .5) * r - .5, (torch.arange(w) + .5) * r - .5
    return torch.stack(torch.meshgrid(torch.as_tensor(times).float(), rows, cols, indexing="ij"), -1).flatten(0, 2)


def rope_table(ids, axes, time_scale=1.):
    """Rotation table of positions ids (..., 3) -> cos, sin (..., d), fp32, the sine signed for the pairs (2j, 2j+1).
    Id 0 is no rotation; ids may be fractions."""
    angles = []
    for axis, n in enumerate(axes):                                           # 10000^(-2j/n) radians per step
        rate = 10000. ** (-torch.arange(0, n, 2, dtype=torch.float64, device=ids.device) / n)
        angles.append(ids[..., axis, None].double() * (time_scale if axis == 0 else 1.) * rate)
    angles = torch.cat(angles, -1)                                            # (..., d/2)
    cos, sin = angles.cos().float(), angles.sin().float()
    return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def apply_rope(x, table):                                                         # (u, v) -> (u cos - v sin, v cos + u sin)
    cos, sin = table                                                          # x (B, K, N, d), table (N, d)
    return torch.addcmul(x * cos, x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), sin)


def split_heads(x, K):                                                              # (B, N, D) -> (B, K, N, d)
    return x.unflatten(2, (K, -1)).transpose(1, 2)


def attention(q, k, v, mask=None):                                               # (B, K, N, d) -> (B, N, D)
    q, k = q.to(v.dtype), k.to(v.dtype)
    grad = q.requires_grad or k.requires_grad or v.requires_grad              # not in frozen layers
    if v.device.type == "cpu" and grad:                                       # the fused kernel's backward is slow at these sizes
        s = (q * q.shape[-1] ** -.5) @ k.transpose(2, 3)                      # (B, K, N, M)
        o = (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1).to(v.dtype) @ v
    else:
        o = F.scaled_dot_product_attention(q, k, v, mask)
    return o.transpose(1, 2).flatten(2)


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class RMSNorm(nn.Module):                                                     # over the channels of a head
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        return F.rms_norm(x.to(self.weight.dtype), x.shape[-1:], self.weight, 1e-6)      # fp32 under autocast


class Modulation(nn.Module):
    """adaLN: from the conditioning vectors c (B, G, D) to `n` vectors for every token. `rows` says which c a token uses."""

    def __init__(self, D, n):
        super().__init__()
        self.linear, self.n = nn.Linear(D, n * D), n

    def forward(self, c, rows=None):
        m = self.linear(F.silu(c))                                            # (B, G, nD): once per sigma, not per token
        return (m if rows is None else m[:, rows]).chunk(self.n, -1)          # n x (B, N or 1, D)


class MLP(nn.Module):
    """linear, GELU, linear, under the published names ff.net.0.proj and ff.net.2."""

    def __init__(self, D):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(D, 4 * D)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * D, D)])

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


# ------------------------------------------------------------------------------------------------ attention and blocks

@dataclass
class Conditioning:
    """What all blocks of one pass over the network share."""
    c: torch.Tensor                           # (B, G, D) conditioning vectors; row 0 is the text's
    table: tuple                              # rotation of [text; video] tokens
    rows: torch.Tensor = None                 # (T+N,) which of the G vectors a token uses; None: there is only one
    mask: torch.Tensor = None                 # (T+N, keys) or (B, 1, T+N, keys) booleans; None: everybody sees everybody
    audio_table: tuple = None                 # rotation of the video tokens as audio queries
    audio_mask: torch.Tensor = None           # (N, S) windows
    off_sync: int = 0                         # so many rows are repeated after the double blocks, and hear nothing


class JointAttention(nn.Module):
    """Queries, keys and values of [text; video]. With `text` each stream has projections of its own (double blocks)."""

    def __init__(self, cfg, text):
        super().__init__()
        D, d, self.K = cfg.heads * cfg.head_dim, cfg.head_dim, cfg.heads
        self.to_q, self.to_k, self.to_v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.norm_q, self.norm_k = RMSNorm(d), RMSNorm(d)
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
            self.norm_added_q, self.norm_added_k = RMSNorm(d), RMSNorm(d)
            self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(D, D)]), nn.Linear(D, D)

    def forward(self, x, y, p, past=None):
        """x (B, N, D) video (or everything, in single blocks), y (B, T, D) text or None; past: keys and values of a clean context
        -> output (B, T+N, D), keys and values of this pass."""
        K = self.K
        q, k, v = self.norm_q(split_heads(self.to_q(x), K)), self.norm_k(split_heads(self.to_k(x), K)), split_heads(self.to_v(x), K)
        if y is not None:                                                     # text first, then video
            q = torch.cat([self.norm_added_q(split_heads(self.add_q_proj(y), K)), q], 2)
            k = torch.cat([self.norm_added_k(split_heads(self.add_k_proj(y), K)), k], 2)
            v = torch.cat([split_heads(self.add_v_proj(y), K), v], 2)
        q, k = apply_rope(q, p.table), apply_rope(k, p.table).to(v.dtype)
        made = k, v
        if past is not None:                                                  # the clean context, rotated long ago
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return attention(q, k, v, p.mask), made


class Attention(nn.Module):
    """Queries of x, keys and values of a source of its own width. Where things stand is told by rotation, what may be seen by a mask."""

    def __init__(self, D, K, source):
        super().__init__()
        self.K = K
        self.to_q, self.to_k, self.to_v = nn.Linear(D, D), nn.Linear(source, D), nn.Linear(source, D)
        self.norm_q, self.norm_k = RMSNorm(D // K), RMSNorm(D // K)
        self.to_out = nn.Linear(D, D)

    def project_kv(self, a, table=None):
        """Source (B, S, A) -> k, v (B, K, S, d). They depend on the source alone: what is not being made is asked once."""
        k, v = self.norm_k(split_heads(self.to_k(a), self.K)), split_heads(self.to_v(a), self.K)
        k = k if table is None else apply_rope(k, table)                          # eq. 8 and, for the keys, eq. 9
        return k.to(v.dtype), v

    def forward(self, x, kv, table=None, mask=None, maps=None):               # x (B, N, D), mask (N, S) or wider; -> (B, N, D)
        q = self.norm_q(split_heads(self.to_q(x), self.K))
        q = q if table is None else apply_rope(q, table)                          # Syncphony eqs. 8, 9
        if maps is not None:                                                  # somebody wants to see who looks where: (B, K, N, S)
            s = q @ kv[0].to(q.dtype).transpose(2, 3) * q.shape[-1] ** -.5
            maps.append((s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1))
        return self.to_out(attention(q, *kv, mask))                              # eq. 10 (with values W_V a_i)


class AudioCrossAttention(Attention):
    """Video tokens look into the audio around them (Syncphony eqs. 7-10). Adds to x; the output starts at zero."""

    def __init__(self, D, K, source):
        super().__init__(D, K, source)
        self.norm = nn.LayerNorm(D)

    def forward(self, x, kv, table=None, mask=None, maps=None):
        return x + super().forward(self.norm(x), kv, table, mask, maps)


class DoubleBlock(nn.Module):
    """Text and video have weights of their own and meet in attention. y is None when the text sits in the past."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.heads * cfg.head_dim
        self.norm1, self.norm1_context = Modulation(D, 6), Modulation(D, 6)
        self.attn = JointAttention(cfg, text=True)
        self.ff, self.ff_context = MLP(D), MLP(D)

    def forward(self, x, y, p, past=None, heard=None):
        T = 0 if y is None else y.shape[1]
        shift, scale, gate, shift2, scale2, gate2 = self.norm1(p.c, None if p.rows is None else p.rows[T:])
        ny = None
        if T:
            t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = self.norm1_context(p.c[:, :1])
            ny = modulate(y, t_shift, t_scale)
        o, made = self.attn(modulate(x, shift, scale), ny, p, past)           # (B, T+N, D)
        x = x + gate * self.attn.to_out[0](o[:, T:])
        x = x + gate2 * self.ff(modulate(x, shift2, scale2))
        if T:
            y = y + t_gate * self.attn.to_add_out(o[:, :T])
            y = y + t_gate2 * self.ff_context(modulate(y, t_shift2, t_scale2))
        return x, y, made


class SingleBlock(nn.Module):
    """One set of weights over [text; video]; attention and MLP side by side. Audio enters first, for video tokens only."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.heads * cfg.head_dim
        self.audio = AudioCrossAttention(D, cfg.heads, cfg.audio_dim) if cfg.audio_dim else None
        self.norm, self.attn = Modulation(D, 3), JointAttention(cfg, text=False)
        self.proj_mlp, self.proj_out = nn.Linear(D, 4 * D), nn.Linear(5 * D, D)

    def forward(self, x, y, p, past=None, heard=None):
        """heard: keys and values of the audio, for the first rows of x at least; None: the audio layer is skipped."""
        T = 0 if y is None else y.shape[1]
        if heard is not None:
            hear = self.audio(x[:len(heard[0])], heard, p.audio_table, p.audio_mask)
            x = hear if len(hear) == len(x) else torch.cat([hear, x[len(hear):]])      # off-sync rows pass by
        z = x if y is None else torch.cat([y, x], 1)                          # (B, T+N, D)
        shift, scale, gate = self.norm(p.c, p.rows)
        n = modulate(z, shift, scale)
        o, made = self.attn(n, None, p, past)
        z = z + gate * self.proj_out(torch.cat([o, F.gelu(self.proj_mlp(n), approximate="tanh")], 2))     # [attention D, MLP 4D] -> D
        return z[:, T:], (z[:, :T] if T else None), made


# ------------------------------------------------------------------------------------------------ conditions

class TimeTextEmbed(nn.Module):
    """Timestep in 0..1000 and, if it has a width, pooled text -> the conditioning vector."""

    def __init__(self, D, pooled=0):
        super().__init__()
        for name, n in (("timestep_embedder", 256), ("text_embedder", pooled))[:1 + (pooled > 0)]:
            part = nn.Module()
            part.linear_1, part.linear_2 = nn.Linear(n, D), nn.Linear(D, D)
            setattr(self, name, part)

    def forward(self, timestep, pooled=None):                                 # (B, G), (B, P) -> (B, G, D)
        rate = (-math.log(10000) * torch.arange(128, device=timestep.device) / 128).exp()   # cosines first, no shift
        angle, embed = timestep[..., None].float() * rate, lambda part, x: part.linear_2(F.silu(part.linear_1(x)))
        wave = torch.cat([angle.cos(), angle.sin()], -1).to(self.timestep_embedder.linear_1.weight.dtype)           # (B, G, 256)
        c = embed(self.timestep_embedder, wave)
        return c if pooled is None else c + embed(self.text_embedder, pooled)[:, None]


def text_bytes(captions, length=96):
    """Captions -> (B, length) int64: UTF-8 bytes + 1, cut at `length`, 0 where nothing stands. '' is the null text."""
    rows = [[b + 1 for b in c.encode(errors="replace")[:length]] for c in captions]
    return torch.tensor([r + [0] * (length - len(r)) for r in rows])


class ByteText(nn.Module):
    """Text states from bytes, in place of T5 and CLIP: letters, their neighbours, then one token for every 8 letters."""

    def __init__(self, dim, pooled, length=96, width=64):
        super().__init__()
        self.letter, self.place = nn.Embedding(257, width), nn.Parameter(.02 * torch.randn(length, width))
        self.near, self.token = nn.Conv1d(width, width, 5, padding=2), nn.Conv1d(width, dim, 8, 8)
        self.pool = nn.Linear(dim, pooled) if pooled else None

    def forward(self, letters):                                               # (B, length) -> (B, length/8, dim), (B, pooled)
        x = (self.letter(letters) + self.place).transpose(1, 2)
        x = self.token(F.gelu(self.near(x)) + x).transpose(1, 2)
        # a gelu in the end may fall silent at high learning rates, and never speaks again; the towers' texts have a norm instead
        x = F.gelu(x) if self.pool else F.layer_norm(x, x.shape[-1:])
        return x, self.pool(x.mean(1)) if self.pool else None


class MelEncoder(nn.Module):
    """Log-mels at 100 Hz -> features at 50 Hz, in place of HuBERT. Dilated convolutions reach 1.3 s to either side: a ball
    must start to roll 0.8 s before it is heard to hit, and the window of a latent alone sees 0.25 s ahead."""

    def __init__(self, A, mels=64):
        super().__init__()
        self.strided = nn.Conv1d(mels, A, 4, 2, padding=1)
        self.norms = nn.ModuleList([nn.LayerNorm(A) for _ in range(7)])
        self.layers = nn.ModuleList([nn.Conv1d(A, A, 3, padding=g, dilation=g) for g in (1, 2, 4, 8, 16, 32)])

    def forward(self, mel):                                                   # (B, 2S, mels) -> (B, S, A)
        x = self.strided(mel.transpose(1, 2)).transpose(1, 2)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(F.gelu(norm(x)).transpose(1, 2)).transpose(1, 2)
        return self.norms[-1](x)


# ------------------------------------------------------------------------------------------------ the transformer

def init_weights(module):
    """Xavier for every linear layer, but zero for the ones that would be heard at once: adaLN (so that every block starts as
    the identity) and the output of the audio layers. -> module"""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight), nn.init.zeros_(m.bias)
    for m in module.modules():
        if isinstance(m, (Modulation, AudioCrossAttention)):
            nn.init.zeros_((m.linear if isinstance(m, Modulation) else m.to_out).weight)
    return module


def velocity_from_output(out, x, sigma):
    """The last layer's output F as a velocity (EDM's idea, on the straight path): of z with unit variance x already tells
    (1-s) x / d, with d = (1-s)^2 + s^2, and what it does not tell has the size s / sqrt(d). The network gives that rest in units
    of its size, z = ((1-s) x + s sqrt(d) F) / d, hence v = (x - z) / s as below.
    After 400 steps (one seed) the error at sigma > 0.75 was 0.61 so, and 0.84 where the network gave z itself."""
    d = (1 - sigma) ** 2 + sigma ** 2
    return ((2 * sigma - 1) * x - d ** .5 * out.to(x.dtype)) / d


class MMDiT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D, self.cfg = cfg.heads * cfg.head_dim, cfg
        assert sum(cfg.axes) == cfg.head_dim, f"axes {cfg.axes} must add up to the head's {cfg.head_dim} channels"
        self.x_embedder, self.context_embedder = nn.Linear(cfg.patch ** 2 * cfg.latent, D), nn.Linear(cfg.text_dim, D)
        self.time_text_embed = TimeTextEmbed(D, cfg.pooled_dim)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(cfg) for _ in range(cfg.n_double)])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(cfg) for _ in range(cfg.n_single)])
        self.norm_out, self.proj_out = Modulation(D, 2), nn.Linear(D, cfg.patch ** 2 * cfg.latent)
        if cfg.text == "bytes":
            self.text = ByteText(cfg.text_dim, cfg.pooled_dim)
        if cfg.audio == "mel" and cfg.audio_dim:
            self.ears = MelEncoder(cfg.audio_dim)
        init_weights(self)
        nn.init.zeros_(self.proj_out.weight)

    def encode_text(self, words):
        """Text -> states (B, T, text_dim), mask (B, T), pooled (B, pooled_dim): letters (B, 96) by the encoder that is trained
        along, or, of a network that was trained with others, these three themselves (data.t5_clip_states)."""
        if self.cfg.text != "bytes":
            return words
        states, pooled = self.text(words)
        return states, torch.ones_like(states[..., 0]), pooled

    def encode_audio(self, sound):
        """Log-mels (B, 2S, 64), or features that were made elsewhere -> features (B, S, A) at 50 Hz."""
        return self.ears(sound) if self.cfg.audio == "mel" else sound

    def run_blocks(self, x, y, p, past=None, heard=None):
        """Tokens x (B, N, D), text y (B, T, D) or None -> x after all blocks; the keys and values of every block.

        past: per block, keys and values of the clean context. heard: per single block, those of the audio; None: audio layers
        are skipped. Blocks are given their own, not the lists: to torch.compile they are all the same function."""
        n, made = len(self.transformer_blocks), []
        past, heard = past or [None] * (n + len(self.single_transformer_blocks)), heard or [None] * len(self.single_transformer_blocks)
        for block, before in zip(self.transformer_blocks, past):
            x, y, kv = block(x, y, p, before)
            made.append(kv)
        if p.off_sync:                          # up to here full and off-sync are the same: computed once, then repeated
            again = lambda t: torch.cat([t, t[:p.off_sync]])
            x, y, p.c = again(x), None if y is None else again(y), again(p.c)
            p.mask = again(p.mask) if p.mask is not None and p.mask.dim() == 4 else p.mask
        for block, before, sound in zip(self.single_transformer_blocks, past[n:], heard):
            x, y, kv = block(x, y, p, before, sound)
            made.append(kv)
        return x, made

    def all_blocks(self):
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def embed_latents(self, *clips):                   # latents, in the order given -> (B, N, D)
        return self.x_embedder(torch.cat([patchify(z, self.cfg.patch) for z in clips], 1))

    def final_layer(self, x, shape, c, rows=None):     # scale before shift here, unlike in the blocks
        scale, shift = self.norm_out(c, rows)
        return unpatchify(self.proj_out(modulate(x, shift, scale)), *shape, self.cfg.patch)

    def to_velocity(self, out, x, sigma):
        return velocity_from_output(out, x, sigma) if self.cfg.precondition else out

    def token_grid(self, z):                          # patches in a column and a row of latents z
        return z.shape[3] // self.cfg.patch, z.shape[4] // self.cfg.patch

    def rope(self, ids):
        return rope_table(ids, self.cfg.axes, self.cfg.time_scale)

    def audio_times(self, S):
        """t_i of audio steps, in latent units: step i begins at i/alpha latents; the middle of a latent's own steps is l."""
        return (torch.arange(S) + .5) / self.cfg.alpha - .5

    def project_audio_kv(self, a, start=0):
        """Audio features a (B, S, A), the first of which is step `start` -> keys and values for every single block."""
        t = self.audio_times(start + a.shape[1])[start:]
        table = self.rope(F.pad(t[:, None], (0, 2)).to(a.device)) if self.cfg.audio_rope else self.rope(a.new_zeros(a.shape[1], 3))
        return [b.audio.project_kv(a, table) for b in self.single_transformer_blocks]

    def audio_window(self, l, S):
        """Which audio steps latents l (N,) see -> (N, S): |t_i - l| < Delta + 0.5, and always the nearest.     eq. 7"""
        distance = (self.audio_times(S).to(l.device)[None] - l[:, None]).abs()
        return (distance < self.cfg.window) | (distance == distance.min(1, keepdim=True).values)

    def forward(self, clips, timestep, text, text_mask, pooled, audio=None, off_sync=0, gone=0):
        """Pyramid Flow's call: velocity of the last, noisy clip, given clean clips before it, oldest and coarsest first.

        clips: list of (B, C, L, h, w); timestep (B,) in 0..1000; text (B, T, text_dim) with mask (B, T); pooled
        (B, pooled_dim); audio (B, S, A) features of the whole clip or None = audio layers skipped. -> like clips[-1], and
        behind them the first `off_sync` rows once more, unheard. gone: so many latents were before the first of `clips`."""
        x, y, T = self.embed_latents(*clips), self.context_embedder(text), text.shape[1]                   # (B, N, D), (B, T, D)
        starts = [sum(z.shape[2] for z in clips[:i]) for i in range(len(clips))]
        fine, width = self.token_grid(clips[-1])
        ids = torch.cat([position_ids(range(s, s + z.shape[2]), *self.token_grid(z), fine) for s, z in zip(starts, clips)])
        ids = torch.cat([torch.zeros(T, 3), ids]).to(x.device)                # text stands at (0, 0, 0)
        real = F.pad(text_mask.bool(), (0, x.shape[1]), value=True)           # padding sees padding, real sees real ...
        mask = (real[:, None] == real[:, :, None]) & (ids[:, None, 0] >= ids[None, :, 0])        # ... and nobody the future
        p, heard = Conditioning(self.time_text_embed(timestep[:, None], pooled), self.rope(ids), mask=mask[:, None], off_sync=off_sync), None
        if audio is not None:
            at = ids[T:] + torch.tensor([gone, 0, 0], device=x.device)        # the sound runs on, whatever was forgotten
            heard, p.audio_table, p.audio_mask = self.project_audio_kv(audio), self.rope(at), self.audio_window(at[:, 0], audio.shape[1])
        n = clips[-1].shape[2] * fine * width
        x, _ = self.run_blocks(x, y, p, heard=heard)
        return self.final_layer(x[:, -n:], clips[-1].shape[2:], p.c)

    # ---- the same network for a model whose context keeps its own clock

    def forward_teacher_forced(self, clean, noisy, sigma, text, pooled, audio=None, start=1):
        """Velocities of many latents in one pass.

        clean (B, C, L, h, w): latents 0..L-1; noisy (B, C, M, h, w): latents start..start+M-1 at sigma (B, M); text,
        pooled as `self.text` gives them; audio (B, S, A) or None -> like noisy. The same as `denoise_step`, one by one."""
        L, M, T, (h, w) = clean.shape[2], noisy.shape[2], text.shape[1], self.token_grid(noisy)
        x, y, n = self.embed_latents(clean, noisy), self.context_embedder(text), h * w                      # n tokens per latent
        ids = position_ids([*range(L), *range(start, start + M)], h, w).to(x.device)
        t = F.pad(ids[:, 0], (T, 0))                                          # (T+N,) text counts as latent 0
        new = torch.arange(len(t), device=x.device) >= T + L * n              # which tokens are noisy
        past = (t[None] < t[:, None]) & (t[:, None] - t[None] <= self.cfg.context) | (t[None] == 0)
        same = (t[None] == t[:, None]) & (new[None] == new[:, None])
        mask = past & ~new[None] | same                                       # everybody sees text and latent 0
        rows = torch.arange(M).repeat_interleave(n) + 1                       # each noisy latent has its own sigma
        rows = F.pad(rows, (T + L * n, 0)).to(x.device)                       # text and clean latents: row 0, sigma = 0
        c = self.time_text_embed(1000 * F.pad(sigma, (1, 0)), pooled)         # (B, 1+M, D)
        p, heard = Conditioning(c, self.rope(torch.cat([ids.new_zeros(T, 3), ids])), rows, mask), None
        if audio is not None:
            heard, p.audio_table, p.audio_mask = self.project_audio_kv(audio), self.rope(ids), self.audio_window(ids[:, 0], audio.shape[1])
        x, _ = self.run_blocks(x, y, p, heard=heard)
        out = self.final_layer(x[:, L * n:], noisy.shape[2:], c, rows[T + L * n:])
        return self.to_velocity(out, noisy, sigma[:, None, :, None, None])

    def prefill(self, first, text, pooled, audio=None, off_sync=0):
        """Start a roll-out: latent 0 (R, C, 1, h, w), text (R, T, ·), audio features (R, S, A) of the whole sound.

        R rows are the guidance branches of one or more clips; the first `off_sync` of them are repeated after the
        double blocks as rows that hear nothing. -> the context that `append_latent` and `denoise_step` read and grow"""
        context = dict(pooled=pooled, audio=audio, off_sync=off_sync, l=0, at=(-1,), T=text.shape[1], cache=None)
        self.append_latent(context, first, self.context_embedder(text))
        return context

    def _pass(self, context, z, sigma):
        """The Conditioning of latent l = context['l'], and what it hears. What does not depend on the step is made once per latent: its
        rotation, and the keys and values of the audio in its window (of no other steps, so no mask is needed)."""
        l, a = context["l"], context["audio"]
        if context["at"][0] != l:
            ids, kv = position_ids([l], *self.token_grid(z)).to(z.device), None
            if a is not None:
                seen = self.audio_window(ids[:1, 0], a.shape[1])[0].nonzero().flatten()
                kv = self.project_audio_kv(a[:, seen[0]:seen[-1] + 1], int(seen[0]))
            context["at"] = (l, self.rope(ids), kv)
        _, table, kv = context["at"]
        c = self.time_text_embed(torch.full((len(z), 1), 1000. * sigma, device=z.device), context["pooled"])
        return Conditioning(c, table, off_sync=context["off_sync"], audio_table=table), kv

    def append_latent(self, context, z, y=None):
        """Append the finished latent z (R, C, 1, h, w) to the context, and with the first one the text y."""
        (p, heard), n = self._pass(context, z, 0.), math.prod(self.token_grid(z))   # clean: sigma = 0; n tokens per latent
        if y is not None:                       # [text; latent 0]: text has no position, and both see each other
            p.table = tuple(torch.cat([t0, t]) for t0, t in zip(self.rope(torch.zeros(y.shape[1], 3, device=z.device)), p.table))
            context["all"] = None
        _, made = self.run_blocks(self.embed_latents(z), y, p, context["cache"], heard)
        old, sink, W = context["all"], context["T"] + n, self.cfg.context * n
        grown = made if old is None else [tuple(torch.cat(kv, 2) for kv in zip(a, b)) for a, b in zip(old, made)]
        # bounded memory: the text and latent 0 stay for ever, of the rest the last `context` latents
        context["all"] = [tuple(torch.cat([t[:, :, :sink], t[:, :, sink:][:, :, -W:]], 2) for t in kv) for kv in grown]
        context["l"] += 1
        # and never farther away than in training: past that distance their keys turn along (rotations add up)
        away = max(0, context["l"] - self.cfg.context)
        turn = self.rope(torch.tensor([[away, 0., 0.]], device=z.device))
        context["cache"] = context["all"] if not away else [
            (torch.cat([apply_rope(k[:, :, :sink].float(), turn).to(k.dtype), k[:, :, sink:]], 2), v) for k, v in context["all"]]

    def denoise_step(self, context, x, sigma):
        """Velocity of the noisy latent x (R, C, 1, h, w) at sigma (a number) -> (R + off_sync, C, 1, h, w)."""
        p, heard = self._pass(context, x, sigma)
        out, _ = self.run_blocks(self.embed_latents(x), None, p, context["cache"], heard)         # may change p.c: off-sync rows join
        out = self.final_layer(out, x.shape[2:], p.c)
        return self.to_velocity(out, torch.cat([x, x[:len(out) - len(x)]]), sigma)

