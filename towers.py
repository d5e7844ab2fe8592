"""The two towers of SyncFlow and Harmony."""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (MLP, Attention, AudioCrossAttention, ByteText, Modulation, TimeTextEmbed, init_weights, modulate, velocity_from_output, rope_table,
                   unpatchify)

# ------------------------------------------------------------------------------------------------ two towers (SyncFlow, Harmony)

@dataclass
class DualTowerConfig:
    depth: int = 28                           # layers of either tower
    width: int = 1152                         # of either tower. The paper says 1142, which its 16 heads do not divide: Open-Sora's 1152
    heads: int = 16
    latent: int = 4                           # channels of the video latent (Open-Sora's VAE, 4x8x8)
    audio_latent: int = 128                   # channels of the audio latent: the paper gives the towers' width here too, surely a slip
    patch: int = 2                            # a token is 1 x patch x patch of the video latent
    grid: int = 16                            # tokens in a column or row in training; other sizes are laid over the same square
    alpha: float = 50 * 4 / 16                # audio latents per video latent: 50 Hz, 4 frames at 16 fps
    text_dim: int = 4096                      # width of the text states (T5-XXL)
    text: str = "external"                    # "bytes": a small text encoder of our own, trained along
    adaptor: bool = True                      # off: the ablation of SyncFlow table 4
    xrope: bool = True                        # off: audio looks at the video without knowing when anything is
    blind: bool = False                       # the ablation of table 4: audio reads the text, and there is no video
    precondition: bool = False                # the last layers give what x does not tell yet, see `velocity_from_output`
    time_scale: float = 1.                    # radians per latent at the highest frequency
    axes: tuple = ()                          # full attention, these channels of a head rotated by time, row, column; (): space and time in turns
    bridges: bool = False                     # Harmony: both towers read text, and they talk at every layer
    window: float = 1.5                       # frame-wise attention: how far a query sees, in video latents
    align: bool = True                        # off: the other stream's places in time are not rescaled to the queries'
    local: bool = True                        # off: everything sees everything, and the reference is no style


TOWERS = {
    "tiny": dict(depth=4, width=160, heads=4, latent=16, audio_latent=16, grid=2, alpha=50 * 4 / 24, text_dim=128, text="bytes", precondition=True, time_scale=4.),
    "small": dict(depth=8, width=512, heads=8, latent=16, audio_latent=16, grid=2, alpha=50 * 4 / 24, text_dim=256, text="bytes", precondition=True, time_scale=4.),
    "syncflow": dict(),
}
HARMONY = {
    "tiny": dict(TOWERS["tiny"], axes=(16, 12, 12), bridges=True),
    "small": dict(TOWERS["small"], axes=(32, 16, 16), bridges=True),
    # the size of Wan2.2-5B's tower (whose MLPs are 14336 wide, ours 4 x 3072), its VAE of 4x16x16, MMAudio's latents at 31.25 Hz
    "harmony": dict(depth=30, width=3072, heads=24, latent=48, audio_latent=20, grid=22, alpha=31.25 * 4 / 24, axes=(44, 42, 42), bridges=True),
}


def align_positions(ids, r, center=0.):
    """Places in time on another stream's timeline, r of whose steps are one of ours: Harmony's j' = j T_v / T_a (section 3.3). Counted
    from the first samples' starts; center=0.5: from their middles, as Syncphony's t_i."""
    return (ids + center) * r - center


def temporal_window(queries, keys, window):
    """Which keys are within the window of which queries, all on one timeline: booleans (Q, K). The nearest one always is."""
    away = (queries[:, None] - keys).abs()
    return (away < window) | (away <= away.amin(1, keepdim=True) + 1e-6)


def sincos_embedding(ids, D):
    """Places (N, 2), rows and columns, as D numbers to be added to a token: sines and cosines at D/4 rates each. (N, D)"""
    angle = ids[..., None] * 10000. ** (-torch.arange(D // 4, device=ids.device) / (D // 4))      # (N, 2, D/4)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1)


class TowerBlock(nn.Module):
    """Open-Sora's (STDiT): self-attention along ONE axis ("space", "time") or over everything ("all"), text cross-attention (neither
    normed nor gated; left out where text is among the tokens), MLP. The modulation is computed once for all blocks; a block has
    a table of its own that is added."""

    def __init__(self, D, K, axis, reads=True):
        super().__init__()
        self.axis, self.attn, self.cross, self.mlp = axis, Attention(D, K, D), Attention(D, K, D) if reads else None, MLP(D)
        self.norm_table = nn.Parameter(torch.randn(6, D) / D ** .5)

    def attend(self, x, p):
        """x (B, N, D), p: see `TowerConditioning` -> x after both attentions."""
        shift, scale, gate = (p.t6.unflatten(2, (6, -1)) + self.norm_table).unbind(2)[:3]              # (B, 1 or N, D) each
        h = modulate(x, shift, scale)
        if self.axis != "all":                                                # (B·L, S, D), every frame for itself, or (B·S, L, D), every place
            h = h.unflatten(1, (p.L, -1))
            h = (h if self.axis == "space" else h.transpose(1, 2)).flatten(0, 1)
        table = None if self.axis == "space" else p.table
        h = self.attn(h, self.attn.project_kv(h, table), table, p.here)
        if self.axis != "all":
            h = h.unflatten(0, (len(x), -1))
            h = (h if self.axis == "space" else h.transpose(1, 2)).flatten(1, 2)
        x = x + gate * h
        return x if self.cross is None else x + self.cross(x, self.cross.project_kv(p.text), mask=p.mask)

    def feed_forward(self, x, p):
        shift, scale, gate = (p.t6.unflatten(2, (6, -1)) + self.norm_table).unbind(2)[3:]
        return x + gate * self.mlp(modulate(x, shift, scale))

    def compile(self, **options):                                             # both halves: what is between them differs
        self.attend, self.feed_forward = (torch.compile(half, **options) for half in (self.attend, self.feed_forward))


@dataclass
class TowerConditioning:
    """What the layers of one tower share in one pass."""
    c: torch.Tensor                           # (B, 1 or N, D) the clock of every token
    t6: torch.Tensor                          # (B, 1 or N, 6D) the modulation that blocks begin from
    table: tuple                              # rotation of the tokens
    L: int = 0                                # latents: tokens are (L, S)
    text: torch.Tensor = None                 # (B, T, D) to look at
    mask: torch.Tensor = None                 # (B, 1, 1, T) which of it is there
    here: torch.Tensor = None                 # (B, 1, 1, N) which tokens are there; None: all


class VideoTower(nn.Module):
    """Text to video. SyncFlow: in every layer a block over the places of each frame, then a block over the times of each place. Nothing
    in it has the size of a picture: places are fractions of the training grid, times are angles. Harmony: full attention, and
    places are angles too; every latent may have a noise level of its own."""

    def __init__(self, cfg):
        super().__init__()
        D, p, self.cfg = cfg.width, cfg.patch, cfg
        self.embed = nn.Conv3d(cfg.latent, D, (1, p, p), (1, p, p))
        self.clock, self.adaln, self.read = TimeTextEmbed(D), nn.Linear(D, 6 * D), nn.Linear(cfg.text_dim, D)
        blocks = lambda axis: nn.ModuleList([TowerBlock(D, cfg.heads, axis) for _ in range(cfg.depth)])
        self.space_blocks, self.time_blocks = (None, blocks("all")) if cfg.axes else (blocks("space"), blocks("time"))
        self.norm_out, self.proj_out = Modulation(D, 2), nn.Linear(D, p * p * cfg.latent)

    def embed_tokens(self, z, sigma, text, mask):
        """z (B, C, L, H, W) at sigma (B,) or (B, L), text states (B, T, text_dim) with mask (B, T) -> tokens x (B, L·S, D), TowerConditioning."""
        cfg, (L, H, W) = self.cfg, z.shape[2:]
        x = self.embed(z).flatten(3).permute(0, 2, 3, 1)                      # (B, L, S, D)
        h, w = H // cfg.patch, W // cfg.patch
        rows, cols = (torch.arange(h) + .5) * cfg.grid / h, (torch.arange(w) + .5) * cfg.grid / w
        c = self.clock(1000 * (sigma[:, None] if sigma.dim() == 1 else sigma))                    # (B, 1 or L, D)
        t6 = self.adaln(F.silu(c))
        if sigma.dim() == 2:                                                  # every token has its latent's clock
            c, t6 = c.repeat_interleave(h * w, 1), t6.repeat_interleave(h * w, 1)
        if cfg.axes:
            ids = torch.stack(torch.meshgrid(torch.arange(L).float(), rows, cols, indexing="ij"), -1).flatten(0, 2)
            table = rope_table(ids.to(z.device), cfg.axes, cfg.time_scale)        # N tokens
        else:
            places = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).flatten(0, 1)
            x = x + sincos_embedding(places.to(z.device), cfg.width).to(x.dtype)
            table = rope_table(torch.arange(L, device=z.device)[:, None], (cfg.width // cfg.heads,), cfg.time_scale)       # L times
        return x.flatten(1, 2), TowerConditioning(c, t6, table, L, self.read(text), mask[:, None, None].bool())

    def attend(self, l, x, p):
        """Layer l up to F_l (B, L·S, D): what its last attention gave."""
        if self.space_blocks is not None:
            x = self.space_blocks[l].feed_forward(self.space_blocks[l].attend(x, p), p)
        return self.time_blocks[l].attend(x, p)

    def feed_forward(self, l, x, p):
        return self.time_blocks[l].feed_forward(x, p)

    def unembed(self, x, p, z):
        return unpatchify(self.proj_out(modulate(x, *self.norm_out(p.c))), *z.shape[2:], self.cfg.patch)

    def forward(self, z, sigma, text, mask):
        """-> output like z, and of every layer F_l."""
        (x, p), features = self.embed_tokens(z, sigma, text, mask), []
        for l in range(self.cfg.depth):
            features.append(self.attend(l, x, p))
            x = self.feed_forward(l, features[-1], p)
        return self.unembed(x, p, z), features


class Adaptor(nn.Module):
    """SyncFlow figure 2: self-attention, layer norm, linear. The paper does not say along what it attends: all tokens here, knowing
    when they are; nor whether the features also pass by: they do, or an average over places and times is all the audio would get."""

    def __init__(self, D, K):
        super().__init__()
        self.attn, self.norm, self.linear = Attention(D, K, D), nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x, table):                                              # (B, L·S, D)
        return self.linear(self.norm(x + self.attn(x, self.attn.project_kv(x, table), table)))


class AudioBlock(nn.Module):
    """AudioBox's: self-attention, cross-attention, MLP, a layer norm AFTER each. The noise level comes in as a token to look at."""

    def __init__(self, D, K, adaptor):
        super().__init__()
        self.adaptor = Adaptor(D, K) if adaptor else None
        self.attn, self.cross, self.mlp = Attention(D, K, D), Attention(D, K, D), MLP(D)
        self.norms = nn.ModuleList([nn.LayerNorm(D) for _ in range(3)])

    def forward(self, a, told, mask, times, seen=None, seen_times=None, xrope=True):
        """a (B, S, D), told (B, 1 + T, D): clock and text, with mask (B, 1, 1, keys); seen (B, L·S_v, D): F_l. times, seen_times:
        rotations of audio and video, in one unit -> a"""
        a = self.norms[0](a + self.attn(a, self.attn.project_kv(a, times), times))
        kv = self.cross.project_kv(told)                                     # what has no time is not turned
        if seen is not None:
            seen = seen if self.adaptor is None else self.adaptor(seen, seen_times)
            kv = [torch.cat(pair, 2) for pair in zip(self.cross.project_kv(seen, seen_times if xrope else None), kv)]
        a = self.norms[1](a + self.cross(a, kv, times if xrope else None, mask))
        return self.norms[2](a + self.mlp(a))


class SyncFlowAudioTower(nn.Module):
    """Video features to audio: layer l looks at F_l of the video tower's layer l."""

    def __init__(self, cfg):
        super().__init__()
        D, self.cfg = cfg.width, cfg
        self.embed, self.clock, self.proj_out = nn.Linear(cfg.audio_latent, D), TimeTextEmbed(D), nn.Linear(D, cfg.audio_latent)
        self.read = nn.Linear(cfg.text_dim, D) if cfg.blind else None
        self.blocks = nn.ModuleList([AudioBlock(D, cfg.heads, cfg.adaptor) for _ in range(cfg.depth)])

    def forward(self, z, sigma, text, mask, L=0, features=None):
        """z (B, A, S) at sigma (B,); features: F_l (B, L·S_v, D) of every layer, None: there is no video -> output like z"""
        cfg, S = self.cfg, z.shape[2]
        turn = lambda t: rope_table(t[:, None].to(z.device), (cfg.width // cfg.heads,), cfg.time_scale)
        a, told, times = self.embed(z.transpose(1, 2)), self.clock(1000 * sigma[:, None]), turn((torch.arange(S) + .5) / cfg.alpha - .5)
        here, see = torch.ones_like(told[..., 0]).bool(), None                # (B, 1): the clock's token is always there
        if self.read is not None:
            told, here = torch.cat([told, self.read(text)], 1), torch.cat([here, mask.bool()], 1)
        if features is not None:
            n = features[0].shape[1]
            see, here = turn(torch.arange(L).repeat_interleave(n // L)), F.pad(here, (n, 0), value=True)
        for block, seen in zip(self.blocks, features or [None] * len(self.blocks)):
            a = block(a, told, here[:, None, None], times, seen, see, cfg.xrope)
        return self.proj_out(a).transpose(1, 2)


class HarmonyAudioTower(nn.Module):
    """Harmony's audio tower: the video tower's mirror image, but the words are among the tokens. Attention is joint over [reference;
    target; transcript; caption] (Harmony eq. 2), with one set of weights for all of them. Only the target is noisy; the
    reference stands before it in time, at -R .. -1, and words have no time."""

    def __init__(self, cfg):
        super().__init__()
        D, self.cfg = cfg.width, cfg
        self.embed, self.clock, self.adaln = nn.Linear(cfg.audio_latent, D), TimeTextEmbed(D), nn.Linear(D, 6 * D)
        self.read, self.blocks = nn.Linear(cfg.text_dim, D), nn.ModuleList([TowerBlock(D, cfg.heads, "all", reads=False) for _ in range(cfg.depth)])
        self.norm_out, self.proj_out = Modulation(D, 2), nn.Linear(D, cfg.audio_latent)

    def embed_tokens(self, z, sigma, told, told_mask, ref=None, ref_mask=None):
        """z (B, A, S) at sigma (B,); told (B, T, text_dim): transcript and caption; ref (B, A, R), clean; masks (B, T) and (B, R) say
        what of them is there -> tokens (B, R + S + T, D), TowerConditioning"""
        B, _, S = z.shape
        ref = z[:, :, :0] if ref is None else ref
        R, T, there = ref.shape[2], told.shape[1], lambda n: torch.ones(B, n, dtype=torch.bool, device=z.device)
        a = torch.cat([self.embed(torch.cat([ref, z], 2).transpose(1, 2)), self.read(told)], 1)
        clean, noisy = self.clock(1000 * torch.stack([torch.zeros_like(sigma), sigma], 1)).split(1, 1)                 # (B, 1, D) each
        c = torch.cat([clean.expand(-1, R, -1), noisy.expand(-1, S, -1), clean.expand(-1, T, -1)], 1)
        t6 = torch.cat([m.expand(-1, n, -1) for m, n in zip(self.adaln(F.silu(torch.cat([clean, noisy, clean], 1))).split(1, 1), (R, S, T))], 1)
        ids = torch.cat([torch.arange(-R, S), torch.zeros(T)]).to(z.device)
        here = torch.cat([there(R) if ref_mask is None else ref_mask.bool(), there(S), told_mask.bool()], 1)
        return a, TowerConditioning(c, t6, rope_table(ids[:, None], (self.cfg.width // self.cfg.heads,), self.cfg.time_scale / self.cfg.alpha), here=here[:, None, None])

    def attend(self, l, a, p):
        return self.blocks[l].attend(a, p)

    def feed_forward(self, l, a, p):
        return self.blocks[l].feed_forward(a, p)

    def unembed(self, a, p, R, S):                                                # the target alone: (B, A, S)
        target = slice(R, R + S)
        return self.proj_out(modulate(a[:, target], *self.norm_out(p.c[:, target]))).transpose(1, 2)


class DualTower(nn.Module):
    """SyncFlow: a video tower and an audio tower of equal depth on ONE clock. Video never hears: F_l goes from left to right only,
    so the video tower can be trained first, frozen, and given its sound.

    Harmony (`bridges`): at every layer both hear each other, each on a clock of its own, so either may be given (sigma = 0)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.video, self.audio = cfg, VideoTower(cfg), (HarmonyAudioTower if cfg.bridges else SyncFlowAudioTower)(cfg)
        if cfg.text == "bytes":
            self.text = ByteText(cfg.text_dim, 0)
        if cfg.bridges:
            bridge = lambda: nn.ModuleList([AudioCrossAttention(cfg.width, cfg.heads, cfg.width) for _ in range(cfg.depth)])
            self.a2v_blocks, self.v2a_blocks, self.style_blocks = bridge(), bridge(), bridge()
            if cfg.text == "bytes":
                self.speech = ByteText(cfg.text_dim, 0)                       # what is said is spelled, what is described is meant
        init_weights(self)
        for last in (self.video.adaln, self.video.proj_out, self.audio.proj_out, *([self.audio.adaln] if cfg.bridges else [])):
            nn.init.zeros_(last.weight)

    def encode_text(self, words):
        """Text -> states (B, T, text_dim), mask (B, T), as `MMDiT.encode_text`; the null text is one token."""
        return self._states(self.text if self.cfg.text == "bytes" else None, words)

    def encode_audio_text(self, words, speech):
        """What Harmony's audio tower is told: the transcript, then the caption of the sound -> states, mask, as of `read`."""
        spelled = self._states(self.speech if self.cfg.text == "bytes" else None, speech)
        return tuple(torch.cat(both, 1) for both in zip(spelled, self.encode_text(words)))

    def _states(self, encoder, words):
        if encoder is None:                                                   # made elsewhere
            return words[:2]
        mask = words.unflatten(1, (-1, 8)).any(2)                             # a token is 8 letters
        return encoder(words)[0], torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)

    def all_blocks(self):
        return [*(self.video.space_blocks or []), *self.video.time_blocks, *self.audio.blocks]

    def bridge_times(self, L, S, places, device):
        """Where audio and video stand for each other -> for A2V and V2A: rotations of queries and of keys, window (queries, keys).

        Keys are laid on the queries' timeline by the ratio of the lengths; frame-wise attention (eq. 5) is a window on it."""
        cfg, frames, steps = self.cfg, torch.arange(L, device=device).float(), torch.arange(S, device=device).float()
        turn = lambda t, unit: rope_table(t[:, None], (cfg.width // cfg.heads,), cfg.time_scale / unit)
        wide = lambda t: t.repeat_interleave(places)                          # all places of a frame share its time
        a2v, v2a = temporal_window(frames, align_positions(steps, L / S), cfg.window), temporal_window(steps, align_positions(frames, S / L), cfg.window * S / L)
        a2v, v2a = (a2v.repeat_interleave(places, 0), v2a.repeat_interleave(places, 1)) if cfg.local else (None, None)
        heard, seen = (align_positions(steps, L / S), align_positions(frames, S / L)) if cfg.align else (steps, frames)
        return (turn(wide(frames), 1), turn(heard, 1), a2v), (turn(steps, cfg.alpha), turn(wide(seen), cfg.alpha), v2a)

    def forward_joint(self, x_v, x_a, sigma_v, sigma_a, text, mask, told, told_mask, ref=None, ref_mask=None, maps=None):
        """Harmony. x_v (B, C, L, H, W) at sigma_v (B,) or (B, L), x_a (B, A, S) at sigma_a (B,), either may be None; text from `encode_text`, told
        from `encode_audio_text`; ref (B, A, R): a clean reference of the timbre -> their velocities. maps: a list that gets every layer's V2A
        attention (B, K, S, L·h·w), where each moment of the sound looks in the video."""
        v = a = None
        R = 0 if ref is None else ref.shape[2]
        if x_v is not None:
            v, p = self.video.embed_tokens(x_v, sigma_v, text, mask)
        if x_a is not None:
            a, q = self.audio.embed_tokens(x_a, sigma_a, told, told_mask, ref, ref_mask)
            S = x_a.shape[2]
        if x_v is not None and x_a is not None:
            (q_v, k_a, hear), (q_a, k_v, see) = self.bridge_times(p.L, S, v.shape[1] // p.L, v.device)
        for l in range(self.cfg.depth):
            both = v is not None and a is not None
            if both and R and self.cfg.local:                                 # eq. 7: z_r <- z_r + CrossAttn(z_r, z_v)
                style = self.style_blocks[l]
                a = torch.cat([style(a[:, :R], style.project_kv(v)), a[:, R:]], 1)
            v = v if v is None else self.video.attend(l, v, p)
            a = a if a is None else self.audio.attend(l, a, q)
            if both:                                                          # eqs. 5, 6: both read what the other was before
                a2v, v2a, target = self.a2v_blocks[l], self.v2a_blocks[l], a[:, R:R + S]
                sound = v2a(target, v2a.project_kv(v, k_v), q_a, see, maps)
                v = a2v(v, a2v.project_kv(target, k_a), q_v, hear)
                a = torch.cat([a[:, :R], sound, a[:, R + S:]], 1)
            v = v if v is None else self.video.feed_forward(l, v, p)
            a = a if a is None else self.audio.feed_forward(l, a, q)
        return (None if v is None else self.to_velocity(self.video.unembed(v, p, x_v), x_v, sigma_v),
                None if a is None else self.to_velocity(self.audio.unembed(a, q, R, S), x_a, sigma_a))

    def to_velocity(self, out, x, sigma):
        if sigma.dim() == 1:
            sigma = sigma.view(-1, *[1] * (x.dim() - 1))
        else:
            sigma = sigma[:, None, :, None, None]                             # a clock for every latent
        return velocity_from_output(out, x, sigma) if self.cfg.precondition else out

    def forward(self, x_v, x_a, sigma, text, mask):
        """SyncFlow. Noisy latents x_v (B, C, L, H, W) and x_a (B, A, S), either may be None, at sigma (B,) -> their velocities, None for None."""
        v_v = v_a = features = None
        if x_v is not None:
            # a frozen tower has no graph anyway; knowing that there is none, attention takes its faster kernel
            with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.video.parameters())):
                out, features = self.video(x_v, sigma, text, mask)
                v_v = self.to_velocity(out, x_v, sigma)
        if x_a is not None:
            v_a = self.to_velocity(self.audio(x_a, sigma, text, mask, x_v.shape[2] if x_v is not None else 0, features), x_a, sigma)
        return v_v, v_a
