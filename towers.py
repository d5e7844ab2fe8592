"""The networks of SyncFlow and Harmony: a video tower and an audio tower of equal depth.

SyncFlow (section 3.2), text -> video + audio. Video conditions audio, never the reverse: the video
tower can be trained first, and frozen. One layer:

    video  x -> space block -> time attention --> F_l ---> MLP -> x
                                                   | adaptor
    audio  x -> self-attention -------> cross-attention -> MLP -> x
                                                   ^ [noise level]   (and the text, in the
                                                                      ablation without video)

Harmony (section 3.3; supplement, section 2), each stream conditions the other. The network takes
one noise level per stream: the same sigma where both are noisy, 0 for a stream that is given. One
layer, whose audio tokens are [reference; target; text]:

    video  x --+-----------------> attention --.-> + from audio -> MLP -> x
               | style, Harmony eq. 7           X      eqs. 5, 6: each attends to the other's
    audio  x --+-> to reference -> attention --'-> + from video -> MLP -> x     state before

A layer holds the blocks of both towers and all that is between them, so that compilation,
checkpointing and sharding act on one module. Before and after the layers each tower has a stream
module: embed (latents -> tokens and their conditioning), unembed (tokens -> latents).

    B batch · L latents · H W their grid, h w in patches · N = L h w video tokens · C video channels
    S audio steps · A audio channels · R reference steps · T text tokens · D width · K heads x d
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from losses import expand_sigma, to_device
from model import (BYTES_PER_TOKEN, MLP, Attention, ByteText, CrossAttention, Modulation,
                   TimeTextEmbed, audio_positions, check_axes, init_weights, modulate, rope_table,
                   temporal_window, unpatchify, velocity_from_output)


@dataclass
class DualTowerConfig:
    depth: int = 28               # layers
    width: int = 1152             # the paper's 1142 is no multiple of 16 heads; Open-Sora has 1152
    heads: int = 16
    latent: int = 4               # channels of the video latent (Open-Sora's VAE, 4x8x8)
    audio_latent: int = 128       # Encodec's; the paper gives the towers' width, surely a slip
    patch: int = 2                # a token is 1 x patch x patch of the video latent
    train_grid: int = 16          # tokens per side in training; other sizes span the same range
    # audio steps per video latent, of the VAEs (`sample.steps_per_latent`); in the paper 50 Hz, and
    # 4 frames at 16 fps
    alpha: float = 50 * 4 / 16
    text_dim: int = 4096          # width of the text states (T5-XXL)
    # "bytes": ByteText, trained along with the towers
    text_encoder: Literal["external", "bytes"] = "external"
    adaptor: bool = True          # False: the ablation of SyncFlow table 4
    cross_rope: bool = True       # False: an ablation, the audio loses the order of the video
    audio_only: bool = False      # SyncFlow table 4: no video, the audio tower reads the text
    precondition: bool = False    # the output is a residual, see `velocity_from_output`
    time_scale: float = 1.        # radians per latent at the highest frequency
    axes: tuple = ()              # full attention: channels of time, row, column; (): space, time
    # which layers and which audio stream
    system: Literal["syncflow", "harmony"] = "syncflow"
    window: float = 1.5           # frame-wise attention (Harmony eq. 5): radius in video latents
    rope_align: bool = True       # False: an ablation, positions in time are not rescaled
    use_gldi: bool = True         # False: an ablation, see `HarmonyLayer`


# The toybox: 4 frames at 24 a second in a latent, 2 x 2 tokens. A step of 20 ms is 0.12 latents
# (alpha comes from the VAEs), and turns the fastest pair of channels by 0.48 rad.
TOYBOX = dict(latent=16, audio_latent=16, train_grid=2, text_encoder="bytes", precondition=True,
              time_scale=4.)
SYNCFLOW = {
    "tiny": dict(TOYBOX, depth=4, width=160, heads=4, text_dim=128),
    "small": dict(TOYBOX, depth=8, width=512, heads=8, text_dim=256),
    "syncflow": dict(),           # the paper's
}
HARMONY = {
    "tiny": dict(SYNCFLOW["tiny"], axes=(16, 12, 12), system="harmony"),
    "small": dict(SYNCFLOW["small"], axes=(32, 16, 16), system="harmony"),
    # Depth, width and heads of Wan2.2-5B (its MLPs are 14336 wide, these 4 x 3072), latents of its
    # 4x16x16 VAE, audio latents of MMAudio at 31.25 Hz.
    "harmony": dict(depth=30, width=3072, heads=24, latent=48, audio_latent=20, train_grid=22,
                    axes=(44, 42, 42), system="harmony"),
}


# ----------------------------------------------------------------------- conditioning and positions

@dataclass
class TowerConditioning:
    """What all layers of one tower share in one pass."""
    temb: torch.Tensor                  # (B, G, D) embeddings of G noise levels
    rope: tuple                         # rotation of the tokens in self-attention
    sigma_index: torch.Tensor = None    # (N,) row of temb of each token; None: G is 1
    adaln: tuple = None                 # 6 x (B, 1 or N, D) shifts, scales, gates; None: no adaLN
    context: torch.Tensor = None        # (B, T, D) what cross-attention reads beside the video
    context_mask: torch.Tensor = None   # (B, 1, 1, T) which of it is no padding
    token_mask: torch.Tensor = None     # (B, 1, 1, N) which tokens are no padding; None: all
    grid: tuple = (1, 1, 1)             # L, H, W of the video latents
    n_ref: int = 0                      # R of the audio's tokens [R reference; S target; T text]
    n_target: int = 0                   # S
    # Attention to the other stream: rotation of the queries, of the keys, mask (queries, keys).
    bridge: tuple = (None, None, None)
    attention_maps: list = None         # receives this attention of every layer (Harmony's audio)


def time_rope(times, cfg, steps_per_latent=1.):
    """Rotation of a head's channels by times (N,), of which `steps_per_latent` are one latent."""
    return rope_table(times[:, None], (cfg.width // cfg.heads,), cfg.time_scale / steps_per_latent)


def align_streams(cfg, grid, S, device):
    """How latents (L, H, W) and S audio steps are aligned in time -> `bridge` of video, of audio.

    Harmony section 3.3: keys take the time that they have on the queries' axis. Step j stands at
    latent j L / S, latent l at step l S / L (the paper's T_v / T_a): both clips begin and end
    together. Times of video queries are in latents, those of audio queries in steps, which
    cfg.alpha converts for RoPE: a constant, so that a step is the same angle in all clips.
    SyncFlow: audio times are in latents from the start (`audio_positions`), and the video has no
    bridge."""
    L, H, W = grid
    # All tokens of a latent share its time.
    tokens = torch.arange(L, device=device).float().repeat_interleave(H * W // cfg.patch ** 2)
    if cfg.system == "syncflow":
        # The queries are rotated as in self-attention.
        return None, (None, time_rope(tokens, cfg), None)
    steps = torch.arange(S, device=device).float()
    steps_on_video = steps * (L / S)                                    # j' = j T_v / T_a
    tokens_on_audio = tokens * (S / L)
    # Harmony eq. 5, frame-wise attention: the same window of time in both directions.
    a2v_mask = v2a_mask = None
    if cfg.use_gldi:
        a2v_mask = temporal_window(tokens, steps_on_video, cfg.window)              # (N, S)
        v2a_mask = temporal_window(steps, tokens_on_audio, cfg.window * S / L)      # (S, N)
    # The ablation without alignment rotates by the raw indices.
    if not cfg.rope_align:
        steps_on_video, tokens_on_audio = steps, tokens
    a2v = time_rope(tokens, cfg), time_rope(steps_on_video, cfg), a2v_mask
    v2a = time_rope(steps, cfg, cfg.alpha), time_rope(tokens_on_audio, cfg, cfg.alpha), v2a_mask
    return a2v, v2a


# ------------------------------------------------------------------------------------------- blocks

def attend(attn, x, source, query_rope=None, key_rope=None, mask=None, attention_maps=None):
    """Tokens x (B, N, D) attend to a source (B, M, D), which may be x, by the module `attn`."""
    return attn(x, attn.project_kv(source, key_rope), query_rope, mask, attention_maps)


class TowerBlock(nn.Module):
    """A block of Open-Sora's STDiT: self-attention along an axis ("space": within each latent;
    "time": at each place; "all": both), cross-attention to the text, MLP."""

    def __init__(self, D, K, axis, cross_attention=True):
        super().__init__()
        self.axis = axis
        self.attn = Attention(D, K, D)
        # Left out where the text is among the tokens.
        self.cross_attn = Attention(D, K, D) if cross_attention else None
        self.mlp = MLP(D)
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D ** .5)

    def modulations(self, cond):                                        # 6 x (B, 1 or N, D)
        # adaLN is computed once per tower; every block adds a table of its own.
        return [m + row for m, row in zip(cond.adaln, self.scale_shift_table)]

    def self_attention(self, x, cond):                                  # (B, N, D) -> (B, N, D)
        # Groups of tokens that attend to each other become rows of a batch.
        latents = 1 if self.axis == "all" else cond.grid[0]
        x = x.unflatten(1, (latents, -1))                               # (B, L, hw, D)
        x = x.transpose(1, 2) if self.axis == "time" else x             # (B, hw, L, D)
        rows = x.flatten(0, 1)
        rope = None if self.axis == "space" else cond.rope
        out = attend(self.attn, rows, rows, rope, rope, cond.token_mask)
        # And back to one row of tokens per clip.
        out = out.unflatten(0, x.shape[:2])
        out = out.transpose(1, 2) if self.axis == "time" else out       # (B, L, hw, D)
        return out.flatten(1, 2)

    def attention(self, x, cond):
        """First half of the block: tokens x (B, N, D) after both attentions."""
        shift, scale, gate, _, _, _ = self.modulations(cond)
        x = x + gate * self.self_attention(modulate(x, shift, scale), cond)
        # Neither norm nor gate here, as in Open-Sora.
        if self.cross_attn is not None:
            x = x + attend(self.cross_attn, x, cond.context, mask=cond.context_mask)
        return x

    def feed_forward(self, x, cond):
        # Second half of the block: the MLP.
        _, _, _, shift, scale, gate = self.modulations(cond)
        return x + gate * self.mlp(modulate(x, shift, scale))

    def forward(self, x, cond):
        return self.feed_forward(self.attention(x, cond), cond)


class Adaptor(nn.Module):
    """SyncFlow figure 2: self-attention, layer norm, linear."""

    def __init__(self, D, K):
        super().__init__()
        self.attn = Attention(D, K, D)
        self.norm = nn.LayerNorm(D)
        self.linear = nn.Linear(D, D)

    def forward(self, x, rope):                                         # (B, N, D) -> (B, N, D)
        # Not in the paper: all tokens attend to all, with their times, and there is a residual, or
        # the audio would get averages of the features alone.
        return self.linear(self.norm(x + attend(self.attn, x, x, rope, rope)))


class AudioBlock(nn.Module):
    """SyncFlow's audio block, as in AudioBox: attentions and MLP with a layer norm AFTER each."""

    def __init__(self, cfg):
        super().__init__()
        D, K = cfg.width, cfg.heads
        self.use_rope = cfg.cross_rope
        self.adaptor = Adaptor(D, K) if cfg.adaptor else None
        self.attn = Attention(D, K, D)
        self.cross_attn = Attention(D, K, D)
        self.mlp = MLP(D)
        self.norms = nn.ModuleList([nn.LayerNorm(D) for _ in range(3)])

    def forward(self, a, features, cond):
        """Audio tokens a (B, S, D), video features F_l (B, N, D) or None -> a (B, S, D)."""
        # Self-attention over the steps of the audio.
        a = self.norms[0](a + attend(self.attn, a, a, cond.rope, cond.rope))
        # Keys: [F_l by the adaptor; noise level], in the ablation without video [noise level;
        # text], else T = 0. Only F_l has a time, so only it is rotated. (The paper does not say how
        # the audio knows when a video token is; this is the answer of the other two papers.)
        k, v = self.cross_attn.project_kv(cond.context)                 # (B, K, 1 + T, d)
        mask = cond.context_mask
        if features is not None:
            _, video_rope, _ = cond.bridge
            if self.adaptor is not None:
                features = self.adaptor(features, video_rope)
            key_rope = video_rope if self.use_rope else None
            video_k, video_v = self.cross_attn.project_kv(features, key_rope)
            k = torch.cat([video_k, k], 2)                              # (B, K, N + 1 + T, d)
            v = torch.cat([video_v, v], 2)
            mask = F.pad(mask, (features.shape[1], 0), value=True)
        query_rope = cond.rope if self.use_rope else None
        a = self.norms[1](a + self.cross_attn(a, (k, v), query_rope, mask))
        return self.norms[2](a + self.mlp(a))


# ------------------------------------------------------------------------------------------- layers

def video_blocks(cfg):
    """The video tower's blocks of one depth: [full attention], or [space, time]."""
    axes = ["all"] if cfg.axes else ["space", "time"]
    return nn.ModuleList([TowerBlock(cfg.width, cfg.heads, axis) for axis in axes])


class SyncFlowLayer(nn.Module):
    """One layer of both towers of SyncFlow. Nothing flows from the audio to the video."""

    def __init__(self, cfg):
        super().__init__()
        self.video = video_blocks(cfg)
        self.audio = AudioBlock(cfg)

    def forward(self, video, audio, cond_v, cond_a):
        """video (B, N, D) or None, audio (B, S, D) or None -> the same."""
        features = None
        # Frozen video blocks build no graph: `video` and `features` need no gradient then.
        if video is not None:
            for block in self.video[:-1]:
                video = block(video, cond_v)
            # F_l includes the text (the paper leaves open whether its temporal layer does).
            features = self.video[-1].attention(video, cond_v)
            video = self.video[-1].feed_forward(features, cond_v)
        if audio is not None:
            audio = self.audio(audio, features, cond_a)
        return video, audio


class HarmonyLayer(nn.Module):
    """One layer of both towers of Harmony, and the three bridges between them (figure 2)."""

    def __init__(self, cfg):
        super().__init__()
        D, K = cfg.width, cfg.heads
        # GLDI (global-local decoupled interaction): False removes the window of the bridges (local)
        # and the style update (global).
        self.use_gldi = cfg.use_gldi
        self.video = video_blocks(cfg)
        self.audio = TowerBlock(D, K, "all", cross_attention=False)
        self.audio_to_video = CrossAttention(D, K, D)
        self.video_to_audio = CrossAttention(D, K, D)
        self.style = CrossAttention(D, K, D)

    def forward(self, video, audio, cond_v, cond_a):
        """video (B, N, D) or None, audio (B, R + S + T, D) or None -> the same."""
        # One stream alone (stages "video", "audio", "timbre"): no bridge and no style update, so
        # that the same blocks serve the audio tower's own training (supplement, section 2).
        if video is None:
            return None, self.audio(audio, cond_a)
        if audio is None:
            for block in self.video:
                video = block(video, cond_v)
            return video, None
        # Harmony eq. 7: the reference attends to the whole video, z_r <- z_r + CrossAttn(z_r, z_v).
        n_ref = cond_a.n_ref
        if n_ref and self.use_gldi:
            ref = attend(self.style, audio[:, :n_ref], video)
            audio = torch.cat([ref, audio[:, n_ref:]], 1)
        # Attention within each tower.
        for block in self.video[:-1]:
            video = block(video, cond_v)
        video = self.video[-1].attention(video, cond_v)
        audio = self.audio.attention(audio, cond_a)

        # Harmony eqs. 5, 6: both attend to the other as it was before. Of the audio only the target
        # takes part: reference and text have no time in the video.
        ref, target, text = audio.tensor_split([n_ref, n_ref + cond_a.n_target], 1)
        maps = cond_a.attention_maps
        new_target = attend(self.video_to_audio, target, video, *cond_a.bridge, maps)
        video = attend(self.audio_to_video, video, target, *cond_v.bridge)
        audio = torch.cat([ref, new_target, text], 1)
        video = self.video[-1].feed_forward(video, cond_v)
        return video, self.audio.feed_forward(audio, cond_a)


# ------------------------------------------------------------- streams: before and after the layers

class AdaLNStream(nn.Module):
    """First and last modules of a tower whose tokens are modulated by their noise levels."""

    def __init__(self, cfg, proj_in, out_channels):
        super().__init__()
        D = cfg.width
        self.cfg = cfg
        self.proj_in = proj_in
        self.time_embed = TimeTextEmbed(D)
        self.adaln = Modulation(D, 6)
        self.text_proj = nn.Linear(cfg.text_dim, D)
        self.norm_out = Modulation(D, 2)
        self.proj_out = nn.Linear(D, out_channels)

    def head(self, x, cond):                                            # (B, N, D) -> (B, N, out)
        shift, scale = self.norm_out(cond.temb, cond.sigma_index)
        return self.proj_out(modulate(x, shift, scale))


class VideoStream(AdaLNStream):
    """Video latents -> tokens, and back, of any resolution and length."""

    def __init__(self, cfg):
        size = (1, cfg.patch, cfg.patch)
        proj_in = nn.Conv3d(cfg.latent, cfg.width, size, stride=size)
        super().__init__(cfg, proj_in, cfg.patch ** 2 * cfg.latent)

    def embed(self, z, sigma, text, text_mask):
        """z (B, C, L, H, W) at sigma (B,) or (B, L), states and mask of the text
        -> tokens (B, N, D), TowerConditioning"""
        cfg = self.cfg
        # One strided convolution makes tokens of patches (the paper: a convolution, then patches).
        x = self.proj_in(z)                                             # (B, D, L, h, w)
        _, _, L, h, w = x.shape
        x = x.flatten(3).permute(0, 2, 3, 1)                            # (B, L, hw, D)
        # No weight has the size of a picture: times are in latents, rows and columns in tokens of
        # the training grid, from the middles of the tokens.
        latents = torch.arange(L, device=z.device)
        rows = (torch.arange(h, device=z.device) + .5) * cfg.train_grid / h
        cols = (torch.arange(w, device=z.device) + .5) * cfg.train_grid / w
        ids = torch.stack(torch.meshgrid(latents.float(), rows, cols, indexing="ij"), -1)
        if cfg.axes:
            # Full attention rotates by all three.
            rope = rope_table(ids.flatten(0, 2), cfg.axes, cfg.time_scale)          # N tokens
        else:
            # Attention over time rotates by time; rows and columns are added to the tokens as sines
            # and cosines at D/4 rates each.
            rope = time_rope(latents, cfg)                                          # L times
            rates = 10000. ** (-torch.arange(cfg.width // 4, device=z.device) / (cfg.width // 4))
            angles = ids[0, ..., 1:].flatten(0, 1)[..., None] * rates               # (hw, 2, D/4)
            x = x + torch.cat([angles.sin(), angles.cos()], -1).flatten(1).to(x.dtype)
        # One noise level for the clip, or one per latent for its h w tokens.
        sigma = sigma.view(len(z), -1)                                  # (B, 1 or L)
        index = None if sigma.shape[1] == 1 else latents.repeat_interleave(h * w)
        temb = self.time_embed(1000 * sigma)                            # (B, 1 or L, D)
        return x.flatten(1, 2), TowerConditioning(
            temb=temb, rope=rope, sigma_index=index, adaln=self.adaln(temb, index),
            context=self.text_proj(text), context_mask=text_mask[:, None, None].bool(),
            grid=z.shape[2:])

    def unembed(self, x, cond):                                         # (B, N, D) -> like z
        return unpatchify(self.head(x, cond), *cond.grid, self.cfg.patch)


class SyncFlowAudioStream(nn.Module):
    """Audio latents -> tokens, and back. Times are in video latents, on F_l's timeline."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.proj_in = nn.Linear(cfg.audio_latent, cfg.width)
        self.time_embed = TimeTextEmbed(cfg.width)
        self.proj_out = nn.Linear(cfg.width, cfg.audio_latent)
        # Text reaches the audio through the video, but where there is none (T2A of table 4).
        self.text_proj = nn.Linear(cfg.text_dim, cfg.width) if cfg.audio_only else None

    def embed(self, z, sigma, text, text_mask, ref=None, ref_mask=None):
        """z (B, A, S) at sigma (B,) -> tokens (B, S, D), TowerConditioning"""
        x = self.proj_in(z.transpose(1, 2))                             # (B, S, D)
        temb = self.time_embed(1000 * sigma[:, None])                   # (B, 1, D)
        # Cross-attention has the noise level as a key and, in the ablation, the text.
        context = temb
        mask = torch.ones_like(temb[..., 0]).bool()                     # (B, 1)
        if self.text_proj is not None:
            context = torch.cat([context, self.text_proj(text)], 1)     # (B, 1 + T, D)
            mask = torch.cat([mask, text_mask.bool()], 1)
        times = to_device(audio_positions(z.shape[2], self.cfg.alpha), z.device)
        rope = time_rope(times, self.cfg)
        return x, TowerConditioning(
            temb=temb, rope=rope, context=context, context_mask=mask[:, None, None])

    def unembed(self, x, cond):                                         # (B, S, D) -> (B, A, S)
        return self.proj_out(x).transpose(1, 2)


class HarmonyAudioStream(AdaLNStream):
    """[reference; target; transcript; caption] -> tokens; the target back (Harmony eq. 2)."""

    def __init__(self, cfg):
        super().__init__(cfg, nn.Linear(cfg.audio_latent, cfg.width), cfg.audio_latent)

    def embed(self, z, sigma, text, text_mask, ref=None, ref_mask=None):
        """z (B, A, S) at sigma (B,), states and mask of the text, clean ref (B, A, R), mask (B, R)
        -> tokens (B, R + S + T, D), TowerConditioning"""
        ref = z[:, :, :0] if ref is None else ref
        R = ref.shape[2]
        S = z.shape[2]
        # One set of weights serves all tokens.
        audio = torch.cat([ref, z], 2).transpose(1, 2)                  # (B, R + S, A)
        x = torch.cat([self.proj_in(audio), self.text_proj(text)], 1)   # (B, R + S + T, D)
        # Noise levels: 0 for references and text, sigma for the target.
        index = torch.zeros(x.shape[1], dtype=torch.long, device=z.device)
        index[R:R + S] = 1
        temb = self.time_embed(1000 * F.pad(sigma[:, None], (1, 0)))    # (B, 2, D)
        # Times: the reference stands before the target, at -R .. -1; text stands at 0.
        times = torch.cat([torch.arange(-R, S), torch.zeros(text.shape[1])])
        rope = time_rope(to_device(times, z.device), self.cfg, self.cfg.alpha)
        # Padding of references and text.
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=z.device)
        if ref_mask is not None:
            mask[:, :R] = ref_mask
        mask[:, R + S:] = text_mask
        return x, TowerConditioning(
            temb=temb, rope=rope, sigma_index=index, adaln=self.adaln(temb, index), n_ref=R,
            n_target=S, token_mask=mask[:, None, None])

    def unembed(self, x, cond):                                         # -> (B, A, S)
        out = self.head(x, cond)                                        # (B, R + S + T, A)
        return out[:, cond.n_ref:cond.n_ref + cond.n_target].transpose(1, 2)


# -------------------------------------------------------------------------------------- the network

def part_of(name):
    """Part of a DualTower that a parameter belongs to: "video", "audio" or "bridge"."""
    # Training in stages freezes by it. Captions belong to the video, transcripts to the audio.
    keys = name.split(".")
    key = keys[2] if keys[0] == "layers" else keys[0]                   # layers.<l>.<key>. ...
    return dict(text_encoder="video", video="video", transcript_encoder="audio",
                audio="audio").get(key, "bridge")


class DualTower(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        harmony = cfg.system == "harmony"
        assert cfg.width % cfg.heads == 0, f"{cfg.width} channels are not {cfg.heads} heads"
        if cfg.axes:
            check_axes(cfg.axes, cfg.width // cfg.heads)
        self.video = VideoStream(cfg)
        self.audio = HarmonyAudioStream(cfg) if harmony else SyncFlowAudioStream(cfg)
        layer = HarmonyLayer if harmony else SyncFlowLayer
        self.layers = nn.ModuleList([layer(cfg) for _ in range(cfg.depth)])
        # Harmony eq. 2: what is pronounced and what is meant are encoded separately.
        trained = cfg.text_encoder == "bytes"
        self.text_encoder = ByteText(cfg.text_dim, 0) if trained else None
        self.transcript_encoder = ByteText(cfg.text_dim, 0) if trained and harmony else None
        # A fresh network outputs zero. (Harmony's bridges add nothing then, see `init_weights`.)
        init_weights(self)
        nn.init.zeros_(self.video.proj_out.weight)
        nn.init.zeros_(self.audio.proj_out.weight)

    def encode_text(self, text_inputs, transcripts=False):
        """Text (B, TEXT_BYTES), or states and mask -> states (B, T, text_dim), mask (B, T)"""
        encoder = self.transcript_encoder if transcripts else self.text_encoder
        if encoder is None:
            return text_inputs[:2]
        states, _ = encoder(text_inputs)                                # (B, T, text_dim)
        # Tokens of padding alone are masked, but never the first: no empty softmax row.
        mask = text_inputs.unflatten(1, (-1, BYTES_PER_TOKEN)).any(2)   # (B, T)
        return states, torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)

    def encode_audio_text(self, text_inputs, transcripts):
        """Harmony: what the audio tower reads -> states and mask of [transcript; caption]"""
        pairs = zip(self.encode_text(transcripts, transcripts=True), self.encode_text(text_inputs))
        return tuple(torch.cat(pair, 1) for pair in pairs)

    def all_blocks(self):
        return list(self.layers)

    def to_velocity(self, out, x, sigma):
        sigma = expand_sigma(sigma, x)
        return velocity_from_output(out, x, sigma) if self.cfg.precondition else out

    def forward(self, video, audio, sigma_v, sigma_a, text, text_mask, audio_text=None,
                audio_text_mask=None, ref=None, ref_mask=None, attention_maps=None):
        """Velocities of both streams; a stream may be absent (None), and so is its velocity.
        video (B, C, L, H, W) at sigma_v (B,) or (B, L); audio (B, A, S) at sigma_a (B,); text of
        `encode_text`. Harmony: audio_text of `encode_audio_text`; ref (B, A, R), mask (B, R): clean
        references of the timbre; attention_maps: a list that receives every layer's video-to-audio
        attention (B, K, S, N)."""
        v = a = cond_v = cond_a = None
        if video is not None:
            v, cond_v = self.video.embed(video, sigma_v, text, text_mask)
        if audio is not None:
            # SyncFlow's audio tower reads the caption of the video, in the ablation without video.
            texts = (text, text_mask) if audio_text is None else (audio_text, audio_text_mask)
            a, cond_a = self.audio.embed(audio, sigma_a, *texts, ref, ref_mask)
            cond_a.attention_maps = attention_maps
        # Bridges are where both streams are.
        if video is not None and audio is not None:
            S = audio.shape[2]
            cond_v.bridge, cond_a.bridge = align_streams(self.cfg, cond_v.grid, S, v.device)
        # All layers, then tokens -> latents -> velocities.
        for layer in self.layers:
            v, a = layer(v, a, cond_v, cond_a)
        if video is not None:
            v = self.to_velocity(self.video.unembed(v, cond_v), video, sigma_v)
        if audio is not None:
            a = self.to_velocity(self.audio.unembed(a, cond_a), audio, sigma_a)
        return v, a
