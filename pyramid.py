"""Pyramid Flow (Jin et al. 2024), the backbone of Syncphony: staged path, loss, sampler, weights.

A video is generated latent by latent, each latent in three stages from coarse to fine:

    noise level    h/4 x w/4        h/2 x w/2          h x w
       1.00        noise
                     |  stage 0
       0.80          |          .---> o
       0.67          o --jump--'      |  stage 1
       0.50                           |          .---> o
       0.33                           o --jump--'      |  stage 2
       0.00                                         latent

Stage    a straight path with the same noise at both ends. The network predicts its velocity,
         start - end; sigma counts from 1 (start) to 0 (end) within every stage.
Jump     x <- alpha up(x) + beta b. Upsampling copies the noise of a value to 2x2 places; b is noise
         that sums to zero in each such block. The sum is white noise again, of a higher level.
History  the clean latents before: the last one at the stage's resolution, earlier ones coarser.

    weights   load_pyramid_flow -> with_guidance -> sample_pyramid -> latents
    latents   latent_pyramid -> draw_stage_sample -> packed_velocities -> pyramid_loss
    No weights at hand: `little_flux` in test_all.py is a small copy of the network.

Departures from the published training: latent 0, which is always given, is never a target; all
processes train one fine latent in a step, not one each; the loss is weighted by motion (Syncphony).
In sampling latent 0 is the mean of the picture's posterior, not a sample of it, and an empty
caption gets no suffix. Timesteps are not rounded to bfloat16 (386.36 would be 386), so that
bfloat16 runs differ from the original's.

    B batch · C latent channels · L latents · h w latent grid · S audio steps · A audio channels
    T text tokens · D width of the text states · P width of the pooled text vector
"""
import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import BadInput, build, replacing
from losses import (
    add_noise, combine_guidance, motion_weight, rand_each, randn_each, to_device)
from model import (
    Conditioning, CrossAttention, MMDiT, MMDiTConfig, Packing, init_weights, position_ids)
from vae import CausalVideoVAE, VAEConfig

# Name of the files of weights in a folder of the hub, before .safetensors or .bin.
WEIGHTS_NAME = "diffusion_pytorch_model"

# Two values of b in one 2x2 block have the correlation -gamma. 1/3 is the largest gamma that four
# values can have: they sum to zero.
GAMMA = 1 / 3

# Sample number r of a training trains stage STAGE_OF_ROW[r mod 4]: the stages in the ratio
# 1 : 2 : 1, whatever the batch size.
STAGE_OF_ROW = (0, 1, 1, 2)
# The published corruption of the history in training: noise of a level in [0, 1/3].
CONTEXT_NOISE = 1 / 3

# The published inference code appends this to every prompt (here: to every caption that is not
# empty), and steers away from the other one.
QUALITY_SUFFIX = ", hyper quality, Ultra HD, 8K"
NEGATIVE_PROMPT = (
    "cartoon style, worst quality, low quality, blurry, absolute black, absolute white, low res, "
    "extra limbs, extra digits, misplaced objects, mutated anatomy, monochrome, horror")


# ---------------------------------------------------------------------------------- the network

def clip_ids(model, clips):
    """Positions (N, 3) of all tokens of clips, each laid over the grid of the last one. The first
    clip begins at time 0, and each later one ends one latent after the one before it."""
    h, _ = model.token_grid(clips[-1])
    ids = []
    for end, z in enumerate(clips, start=clips[0].shape[2]):
        rows, cols = model.token_grid(z)
        ids.append(position_ids(range(end - z.shape[2], end), rows, cols, h / rows))
    return torch.cat(ids)


def staged_velocity(model, clips, timestep, text, text_mask, pooled, audio=None, n_off_sync=0,
                    latents_dropped=0):
    """Velocity of the last, noisy clip, given clean clips before it -> (B + n_off_sync, C, L, h, w)
    like clips[-1], off-sync rows last.

    clips: list of (B, C, L_i, h_i, w_i), oldest and coarsest first; timestep (B,) in 0..1000;
    text (B, T, D), its mask (B, T); pooled (B, P); audio (B, S, A) of the whole clip, None: no
    audio layers; latents_dropped: how many latents were before clips[0]"""
    ids = clip_ids(model, clips)                                        # (N, 3)
    # causal in time; text stands at 0; padding attends to padding alone, so that no softmax is
    # over nothing
    times = to_device(F.pad(ids[:, 0], (text.shape[1], 0)), text.device)
    causal = times[:, None] >= times[None]                              # (T+N, T+N)
    real = F.pad(text_mask.bool(), (0, len(ids)), value=True)           # (B, T+N)
    mask = (real[:, None] == real[:, :, None]) & causal                 # (B, T+N, T+N)
    # the audio runs on from the start, whatever part of the history was dropped
    audio_start = -latents_dropped * model.cfg.alpha
    return model(clips, ids, mask[:, None], timestep[:, None], text, pooled, audio,
                 n_off_sync=n_off_sync, audio_start=audio_start)


class HistoryCache:
    """`staged_velocity` for sampling: the same velocity from a fraction of the tokens.

    Every token is modulated with the noise level of the noisy latent. So the keys and values of the
    history change from step to step, and it seems that none can be kept. But all latents pass
    through the same steps: step i of stage s has one timestep, whatever the latent, and attention
    is causal in time. So the keys and values of latents 0 to 3, which latent 6 computed at step i,
    are those that latent 7 needs at step i. One cache for each timestep holds them:

                             coarsest history   finer  noisy      (stage 2)
        latent 6, step i     text 0 1 2 3        4  5    6
        latent 7, step i     text 0 1 2 3 | 4    5  6    7
                             '- cached -'   '---- run ---'        then 4 joins the cache

    In stages 1 and 0, whose history has fewer finer latents, three and two latents are run. Exact
    as long as all latents have the same timesteps, attention is causal and finished latents do not
    change.

    Three more savings, exact as well:

    * Text is cut to the longest one of the batch: nothing that is kept attends to padding.
    * Keys stand in the order of time, so that each latent attends to the first of them, up to its
      own. Taken latent by latent (`groups` of model.attention) this needs no mask over all pairs,
      and the fused kernels are faster without. Only texts of different lengths take one, (B, keys).

                   keys ->  text 0 1 2 3 | 4  5  6  7
               queries  4         x        x
                        5         x        x  x
                        6         x        x  x  x
                        7         x        x  x  x  x

    * The output is that of the noisy tokens: in the last block only they have queries and an MLP.

    The calls of the coarse stages are so short that a GPU waits for the CPU to launch its kernels.
    So what calls have in common is computed once:

        begin_stage    positions, masks, keys and values of the audio: the same at all noise levels
        noise_level    adaLN: the same for all latents

    Text and latent 0 attend to each other, as both stand at time 0. They are run together by the
    first latent that has latent 0 at the coarsest resolution: latent 3 in stage 2. When the window
    slides (`sample_pyramid`), all latents of the history move by one in time, towards latent 0, and
    no longer attend to the one that was dropped. Every key changes, so the caches are emptied, and
    from then on all of the history is run in every call; the other three savings remain.

    Memory: for the published network 184 kB a token in bfloat16 (24 blocks x 2 x 1920). At 384x640
    a coarse latent is 60 tokens, and there are 30 caches: after 16 latents 5 GB for each row of the
    batch, 13 GB with rows for text guidance and Audio Sync Guidance (off-sync: 16 blocks). When
    `cache_limit` is reached, the caches stay as they are, and latents behind them are run.
    """

    def __init__(self, model, text, text_mask, pooled, audio=None, n_off_sync=0, reuse=1):
        """Of B rows that are generated in step, videos of one shape or guidance branches: text
        (B, T, D), its mask (B, T), 1 before 0; pooled (B, P); audio and n_off_sync as in
        `staged_velocity`. reuse: see `with_guidance`. Other videos with the same conditions may
        follow (`velocity`)."""
        self.model = model
        self.pooled = pooled
        self.audio = audio
        self.n_off_sync = n_off_sync
        lengths = text_mask.sum(1).tolist()
        longest = int(max(lengths))
        self.text = text[:, :longest]
        self.text_mask = text_mask[:, :longest].bool() if min(lengths) < longest else None
        self.coarsest = None            # shape of a latent in the coarsest stage
        self.caches = {}                # {timestep: (latents in it, keys and values per block)}
        self.levels = {}                # of `noise_level`
        self.room = cache_limit(pooled.device)
        self.reuse = reuse
        self.stage = None               # latents_dropped and shapes of the last call
        self.calls = 0                  # calls of this stage so far, less one
        self.history = None             # keys and values of its whole history

    def velocity(self, clips, timestep, latents_dropped=0):
        """As `staged_velocity`, for a number as timestep."""
        latents = list(chain.from_iterable(clip.split(1, dim=2) for clip in clips))
        stage = latents_dropped, [z.shape for z in latents]
        self.calls += 1
        if stage != self.stage:
            self.stage = stage
            self.calls = 0
            self.begin_stage(latents, latents_dropped)
        # how many latents are in the cache, and how many are in it after this call
        self.coarsest = self.coarsest or latents[-1].shape              # first call: of stage 0
        n_coarse = sum(z.shape == self.coarsest for z in latents[:-1])
        # the window has moved: no key that is kept will be read again
        if latents_dropped:
            self.caches.clear()
        n_cached, kv = self.caches.get(timestep, (0, None))
        # another video: what is kept for this timestep is of the one before
        if kv and n_cached >= n_coarse:
            self.room += sum(x.nbytes for x in kv)
            del self.caches[timestep]
            n_cached, kv = 0, None
        # with reuse > 1: the noisy latent alone is run, in all calls of a stage but every k-th
        is_reused = self.calls % self.reuse > 0 and len(latents) > 1
        if is_reused:
            n_cached = len(latents) - 1
            kv = self.history

        out, new_kv = self.run(latents, n_cached, kv, timestep)
        if self.reuse > 1 and len(latents) > 1 and not is_reused:
            self.history = first_keys(kv, new_kv, self.n_keys[-2])
        if n_coarse and not latents_dropped and not is_reused and self.room > 0:
            kept = first_keys(kv, new_kv, self.n_keys[n_coarse - 1])
            self.room -= sum(x.nbytes for x in kept) - sum(x.nbytes for x in kv or [])
            self.caches[timestep] = n_coarse, kept
        return out

    def begin_stage(self, latents, latents_dropped):
        """What all calls of a stage of a latent share, as in `MMDiT.forward`: of all tokens."""
        model = self.model
        n_text = self.text.shape[1]
        ids = clip_ids(model, latents)                                  # (N, 3)
        # each latent attends to the keys up to its own
        self.sizes = [math.prod(model.token_grid(z)) for z in latents]
        self.n_keys = (n_text + np.cumsum(self.sizes)).tolist()
        # padding is masked, the same for all queries
        mask = None
        if self.text_mask is not None:
            mask = F.pad(self.text_mask, (0, len(ids)), value=True)[:, None, None]
        # the audio runs on from the start, whatever part of the history was dropped
        audio_start = -latents_dropped * model.cfg.alpha
        self.audio_kv, windows = model.project_audio(self.audio, ids[:, 0], audio_start)
        rope = model.rope(ids, self.pooled.device, n_text)
        self.cond = Conditioning(None, rope, mask=mask, audio_mask=windows)

    def noise_level(self, timestep):
        """temb and adaLN of all blocks, for all latents: 0.4 MB a row of the published network."""
        if timestep not in self.levels:
            timesteps = torch.full((len(self.pooled), 1), timestep, device=self.pooled.device)
            temb = self.model.time_text_embed(timesteps, self.pooled)
            self.levels[timestep] = temb, self.model.all_adaln(temb, self.n_off_sync)
        return self.levels[timestep]

    def run(self, latents, n_cached, cached_kv, timestep):
        """All latents but the first n_cached, whose keys and values there are -> output, new keys
        and values."""
        text = None if n_cached else self.text                          # it goes with latent 0
        n_text = 0 if n_cached else text.shape[1]
        n_queries = self.sizes[n_cached:]
        n_video = sum(n_queries)
        n_queries[0] += n_text
        # the last tokens are those that are run
        temb, adaln = self.noise_level(timestep)
        cond = replace(self.cond, temb=temb, n_text=n_text,
                       rope=[table[-n_text - n_video:] for table in self.cond.rope],
                       groups=list(zip(n_queries, self.n_keys[n_cached:])))
        if self.audio_kv is not None:
            cond.audio_mask = cond.audio_mask[-n_video:]
        return self.model.run_blocks(latents[n_cached:], text, cond, self.audio_kv, cached_kv,
                                     self.n_off_sync, adaln)


def cache_limit(device):
    """Bytes that a `HistoryCache` may take: half of what is free on a GPU, else 4 GiB."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        # and what torch holds without using it, such as the memory that T5 or the last clip had
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free / 2
    # a clip of 2 s of the published network takes 2 GB a row
    return 2 ** 32


def first_keys(cached_kv, new_kv, n):
    """Keys and values of the first n tokens per block (2, rows, K, n, d): all of cached_kv, in the
    same layout or None, and the first of new_kv, [(keys, values)]."""
    n_new = n - cached_kv[0].shape[3] if cached_kv else n
    kv = [torch.stack((k[:, :, :n_new], v[:, :, :n_new])) for k, v in new_kv]
    return [torch.cat(parts, 3) for parts in zip(cached_kv, kv)] if cached_kv else kv


# ------------------------------------------------------------------------------ the staged path

@dataclass(frozen=True)
class Stage:
    level: int          # 0 = coarsest; the sides are 2^(level - n + 1) of the full ones
    start: float        # noise level at the start
    end: float          # noise level at the end
    times: tuple        # the timestep given to the network at the start and at the end, in 1000..0
    alpha: float        # factors of the jump that leads to this stage, 1 and 0 for the first
    beta: float


def make_stages(n=3):
    """The n stages between noise and latent."""
    # The published scheduler cuts a grid of 1000 noise levels at the indices 0, 333 and 666, so
    # the stages end at 0.667, 0.334 and 0 rather than at exact thirds.
    cuts = np.array([1000 - int(1000 * s / n) for s in range(n)] + [0]) / 1000

    # The jump, from noise level c. In a 2x2 block up(x) has noise of covariance c^2 (all ones),
    # and b has the covariance (1 + gamma) I - gamma (all ones). alpha^2 c^2 = beta^2 gamma cancels
    # the correlation, and white noise remains, of the level start = alpha c sqrt(1 + 1/gamma).
    # The share of signal has to be 1 - start = alpha (1 - c). Both equations give alpha and beta.
    c = cuts[:-1]
    alpha = 1 / ((1 + 1 / GAMMA) ** .5 * c + 1 - c)
    beta = alpha * c / GAMMA ** .5
    start = 1 - alpha * (1 - c)
    alpha[0], beta[0] = 1, 0                                            # no jump to the first stage

    # All stages share one scale of time. Each takes a part of it in proportion to the noise that
    # it removes.
    removed = np.cumsum(start - cuts[1:])
    elapsed = [0., *(removed / removed[-1])]
    times = [1000. - min(int(1000 * part), 999) for part in elapsed]
    return [Stage(s, float(start[s]), float(cuts[s + 1]), (times[s], times[s + 1]),
                  float(alpha[s]), float(beta[s])) for s in range(n)]


def sampling_grid(stage, n):
    """The n network calls of a stage -> timesteps (n,), noise levels (n + 1,), both float64."""
    # Training divides a stage into 1000 times and leaves out its end, so the last time is 0.999 of
    # the way and the last sigma 0.001. The published sampler spreads its n calls over just these
    # and appends 0: its last call moves x by no more than 0.001. It is reproduced as it is.
    first, last = stage.times
    times = torch.linspace(first, first + (last - first) * .999, n, dtype=torch.float64)
    sigmas = torch.linspace(1, .001, n, dtype=torch.float64)
    return times, torch.cat([sigmas, sigmas.new_zeros(1)])


def downsample2(z):
    """Means of 2x2 cells: (B, C, L, h, w) -> (B, C, L, h/2, w/2)."""
    return F.avg_pool3d(z, (1, 2, 2))


def upsample2(z):
    """Every cell copied to 2x2: (B, C, L, h, w) -> (B, C, L, 2h, 2w)."""
    return z.repeat_interleave(2, -1).repeat_interleave(2, -2)


def latent_pyramid(z, n=3):
    """Latents z (B, C, L, h, w) at n resolutions, the coarsest first."""
    levels = [z]
    for _ in range(n - 1):
        levels.insert(0, downsample2(levels[0]))
    return levels


def noise_pyramid(eps, n=3):
    """The same for noise: a mean of four has half the deviation, so each level is doubled again."""
    levels = latent_pyramid(eps, n)
    return [2 ** (n - 1 - k) * level for k, level in enumerate(levels)]


def block_noise(shape, generator=None):
    """b of the jump: unit variance, correlation -1/3 within each 2x2 block. (..., h, w)"""
    # N(0, 1) minus the mean of its block has variance 3/4 and covariance -1/4; scaled, it is b.
    # (The published code draws each block by the Cholesky factor of its covariance.)
    x = torch.randn(shape, generator=generator)
    return (4 / 3) ** .5 * (x - upsample2(downsample2(x)))


def pyramid_history(z_levels, n_past, level, n_targets=1):
    """The clean latents 0 .. n_past-1, as latent n_past attends to them in the stage of `level`.

    The nearest one has the resolution of the stage, each one before it the next coarser. All that
    are left are one clip at the coarsest. For latent 5:

        level 2    [0 1 2] at level 0    [3] at level 1    [4] at level 2
        level 1    [0 1 2 3] at level 0                    [4] at level 1
        level 0    [0 1 2 3] at level 0                    [4] at level 0

    z_levels: of `latent_pyramid` -> list of (B, C, L_k, h_k, w_k), the oldest first. n_targets > 1:
    the union of what the last n_targets latents up to n_past attend to (drawn in
    `pieces_of_sample`).
    """
    # Going back: level, level - 1, ... 1.
    single_levels = range(level, 0, -1)
    # A latent of the coarsest stage has one apart as well, as in the original.
    if level == 0 and n_targets == 1:
        single_levels = [0]
    clips = []
    for back, single_level in enumerate(single_levels, start=1):
        end = n_past - back + 1
        if end > 0:
            clips.insert(0, z_levels[single_level][:, :, max(end - n_targets, 0):end])
    # All older ones, at the coarsest resolution
    n_oldest = n_past - len(single_levels)
    if n_oldest > 0:
        clips.insert(0, z_levels[0][:, :, :n_oldest])
    return clips


def stage_endpoints(z_levels, eps_levels, stage):
    """Start and end of a stage's path, with the SAME noise in both; each like z_levels[level]."""
    z = z_levels[stage.level]
    eps = eps_levels[stage.level]
    start = eps
    if stage.level > 0:
        # The stage before left nothing finer than its own resolution.
        coarse = upsample2(z_levels[stage.level - 1])
        start = stage.start * eps + (1 - stage.start) * coarse
    # Only the last stage ends without noise.
    end = stage.end * eps + (1 - stage.end) * z
    return start, end


# --------------------------------------------------------------------------------- the objective

def draw_stage_sample(z_levels, latent, stage, generators, n=1):
    """The n latents of B clips up to number `latent`, noisy, after their history -> clips,
    timestep (B,), velocity (B, C, n, h_k, w_k). z_levels: of `latent_pyramid`; generators: one for
    each clip."""
    device = z_levels[0].device

    def randn_like(z):
        return randn_each(generators, z.shape[1:], device)

    target = [z[:, :, latent - n + 1:latent + 1] for z in z_levels]     # (B, C, n, h_k, w_k)
    eps = noise_pyramid(randn_like(target[-1]), len(target))
    start, end = stage_endpoints(target, eps, stage)

    # Context noise augmentation: one level per clip for its history, not given to the network.
    level = CONTEXT_NOISE * to_device(rand_each(generators), device)
    history = pyramid_history(z_levels, latent, stage.level, n)
    history = [add_noise(clip, randn_like(clip), level) for clip in history]

    # One of 1000 noise levels of the stage, and its timestep.
    i = to_device((1000 * rand_each(generators)).long(), device)
    noisy = add_noise(end, start, 1 - i / 1000)
    first, last = stage.times
    timestep = first + (last - first) * i / 1000
    return [*history, noisy], timestep, start - end


def pieces_of_sample(b, n_text, lengths, sizes):
    """What attends to what in sample b -> texts, history, noisy latents, each {piece: [(a piece
    that it attends to, how many of its first tokens)]}.

    A latent of the history is the same for every noisy latent after it, in all layers, since all
    tokens have one noise level and none attends to later latents (the reason of `HistoryCache`).
    So it is run once. Noisy latents 1 to 5 of a clip in stage 2, each above its history:

        noisy    (clip 3)    1   2   3   4   5
        level 2  (clip 2)    0   1   2   3   4     the latent before it
        level 1  (clip 1)        0   1   2   3     the one before that
        level 0  (clip 0)            0 - 1 - 2     all earlier ones, which attend to their left, too
        text                 x   x       x

    A latent attends to itself and to all below it: noisy 5 to 4; 3; 2, 1, 0; text. Noisy 2 to 1;
    0; text. Text and latent 0 attend to each other, so the states of the text depend on the
    resolution of latent 0: there is a copy of the text for each.

    With noisy latent 5 alone there are 5, 4, 3, 2 1 0 and one text. Tokens for every noisy latent,
    of clips of 16 latents of 24x40 and a text of 30 tokens:

        stage              0      1      2    mean of 1 : 2 : 1
        one a clip       165    255    657    333
        all 15            32    138    555    216    (in stage 2 each has a fine latent before it)

    n_text: tokens of the text; of every clip, from below: lengths, its latents; sizes, the tokens
    of one. Piece (b, clip, column) is one latent, with columns counted from the right; (b, 0, 0) is
    the whole first clip; (b, "text", clip) is the text under the columns that end in this clip."""
    def latent(clip, column):
        if clip:
            return (b, clip, column), sizes[clip]
        return (b, 0, 0), (lengths[0] - column) * sizes[0]

    texts, latents = {}, {}
    for clip, length in enumerate(lengths):
        for column in reversed(range(length if clip else 1)):
            # the column ends in the first clip that is long enough
            bottom = next(c for c, n in enumerate(lengths) if n > column)
            text = (b, "text", bottom), n_text
            latents[b, clip, column] = [text, *(latent(c, column) for c in range(bottom, clip + 1))]
            # and the oldest latent of that clip is latent 0
            texts[b, "text", bottom] = [text, latent(bottom, lengths[bottom] - 1)]
    latents = list(latents.items())
    n = lengths[-1]
    return texts, dict(latents[:-n]), dict(latents[-n:])


def packed_velocities(model, samples, timestep, text, pooled, audio=None):
    """`staged_velocity` of B samples with histories and texts of their own, each with one noisy
    latent or several, in ONE pass without padding -> list of B velocities (1, C, n_b, h_b, w_b).

    The tokens of all samples stand in one row, so that every layer but the attention runs once:

        texts of 0, of 1, .. | history of 0, of 1, .. | noisy latents of 0, of 1, ..

    In the attention a piece of the row meets pieces of its own sample alone (`model.Packing`).

    samples: of each one its clips (1, C, L_c, h_c, w_c), the noisy latents last: of
    `draw_stage_sample`; timestep (B,); text: of each one (T_b, D), without padding; pooled (B, P);
    audio (B, S, A) or None"""
    parts = {}, {}, {}                  # pieces of texts, of histories, of noisy latents
    history_ids, noisy_ids = [], []
    masks = {}
    for b, clips in enumerate(samples):
        lengths = [clip.shape[2] for clip in clips]
        sizes = [math.prod(model.token_grid(clip)) for clip in clips]
        for part, pieces in zip(parts, pieces_of_sample(b, len(text[b]), lengths, sizes)):
            part.update(pieces)
        ids = clip_ids(model, clips)
        n_noisy = lengths[-1] * sizes[-1]
        history_ids.append(ids[:-n_noisy])
        noisy_ids.append(ids[-n_noisy:])
        # A mask is needed where the first clip has several latents: causal, with text at time 0.
        # (All of this is known to the CPU: no GPU has to be waited for.)
        if lengths[0] > 1:
            times = ids[:lengths[0] * sizes[0], 0]
            causal = times[:, None] >= F.pad(times, (len(text[b]), 0))
            masks[b, 0, 0] = to_device(causal, pooled.device)

    texts, history, noisy = parts
    keys_of = texts | history | noisy
    number = {piece: i for i, piece in enumerate(keys_of)}
    # each piece attends to all of itself
    sizes = [dict(keys)[piece] for piece, keys in keys_of.items()]
    ids = history_ids + noisy_ids
    packing = Packing(
        sizes, sizes, [[(number[piece], n) for piece, n in keys] for keys in keys_of.values()],
        [masks.get(piece) for piece in keys_of], n_targets=len(noisy),
        owners=list(zip(map(len, ids), 2 * [*range(len(samples))])))
    clips = [*chain(*(clips[:-1] for clips in samples)), *(clips[-1] for clips in samples)]
    owner = torch.tensor([b for b, *_ in keys_of]).repeat_interleave(torch.tensor(sizes))
    return model(clips, torch.cat(ids), packing, timestep[:, None],
                 torch.cat([text[b] for b, *_ in texts])[None], pooled, audio,
                 to_device(owner, pooled.device))


def pyramid_loss(model, z, text_inputs, audio_inputs, rows, generators, fine_latent,
                 skip_audio=False, lambda_motion=1.):
    """Syncphony's objective in Pyramid Flow's layout: every clip in one stage, at one timestep.

    z (B, C, L, h, w) normalised latents; text_inputs: states without padding, B times (T_b, D),
    None, pooled (B, P); audio_inputs, generators and skip_audio as in `losses.syncphony_loss`;
    rows: numbers (B,) of these samples in the training; fine_latent: the ONE latent of a
    clip that the finest stage trains, 1 .. L-1, the same for the step, or None: every stage trains
    all of them -> loss, report: mean squared error of each stage, nan without a clip."""
    B, _, L = z.shape[:3]
    n = max(STAGE_OF_ROW) + 1
    text, _, pooled = model.encode_text(text_inputs)                    # B x (T_b, D), (B, P)
    audio = None if skip_audio else model.encode_audio(audio_inputs)    # (B, S, A)

    # Draw the sample of every clip, stage by stage.
    samples = [None] * B
    timesteps = [None] * B
    targets = []
    for stage in make_stages(n):
        s = stage.level
        members = [b for b, row in enumerate(rows) if STAGE_OF_ROW[row % len(STAGE_OF_ROW)] == s]
        if not members:
            continue
        # The fine stage costs most, and a late latent has the longest history. So where the fine
        # stage trains late latents the coarse ones train early ones, and the cost varies less.
        if fine_latent is None:
            first, last = 1, L - 1
        else:
            first = last = fine_latent if s == n - 1 else L - fine_latent
        z_levels = latent_pyramid(torch.stack([z[b] for b in members]), n)
        clips, timestep, velocity = draw_stage_sample(
            z_levels, last, stage, [generators[b] for b in members], last - first + 1)
        for k, b in enumerate(members):
            samples[b] = [clip[k:k + 1] for clip in clips]
            timesteps[b] = timestep[k]

        # Syncphony eq. 1, on clean latents at the stage's resolution. skip=2: latent 0 is one
        # frame, later ones t frames, so their difference is not motion (as in losses.py).
        part = z_levels[s][:, :, first - 1:last + 1]
        weight = motion_weight(part, lambda_motion, skip=2 if first == 1 else 1)[:, :, 1:]
        targets.append((s, members, velocity, weight))

    v_hat = packed_velocities(model, samples, torch.stack(timesteps), text, pooled, audio)
    report = torch.full((n,), float("nan"), device=z.device)
    losses = []
    for s, members, velocity, weight in targets:
        of_stage = torch.cat([v_hat[b] for b in members]).float()       # (b, C, n, h_k, w_k)
        error = (of_stage - velocity).square()
        report[s] = error.detach().mean()
        losses.append((error * weight).mean() * len(members))
    # Every clip counts the same, whatever the resolution of its stage.
    return sum(losses) / B, report


# ----------------------------------------------------------------------------------- the sampler

def sample_pyramid(network, z0, n_latents, noise, steps, jump=block_noise, keep=30, bar=None,
                   skip_last=False):
    """Generate latents one after another, each from coarse to fine; yields (B, C, 1, h, w).

    network   of `with_guidance`: (clips, timestep, latents_dropped) -> velocity
    z0        the given latent 0 (B, C, 1, h, w), normalised; None: it is generated as well. (The
              published text-to-video call has steps and a scale of its own for it: two calls.)
    noise     (B, C, >= latents to generate, h, w) from N(0, 1)
    steps     network calls per stage, published: (10, 10, 10)
    jump      a function from a shape to the noise b
    keep      the history is latent 0 (attention sink) and the last `keep` (sliding window). Beyond
              1 + keep latents the sink gets the sound of the time where it then stands, not its own
    skip_last without the last call of each stage, whose step is 0.001. Not exact: on random weights
              latents differ by 0.04 % of their deviation
    """
    n = len(steps)
    past = [] if z0 is None else [z0]
    for latent, eps in zip(range(len(past), n_latents), noise.split(1, dim=2)):
        n_past = len(past)
        past_levels = latent_pyramid(torch.cat(past, 2), n) if past else []
        # Noise of the coarsest stage. The published sampler draws it for the full resolution and
        # averages it down.
        x = noise_pyramid(eps, n)[0]                                    # (B, C, 1, h/4, w/4)
        for stage, n_calls in zip(make_stages(n), steps):
            # From the end of the stage before to twice the sides and the start of this one.
            if stage.level > 0:
                x = upsample2(x)
                b = to_device(jump(x.shape), x.device).to(x)
                x = stage.alpha * x + stage.beta * b
            # From its start to its end by Euler steps. The history stays as it is.
            history = pyramid_history(past_levels, n_past, stage.level)
            times, sigmas = (grid.tolist() for grid in sampling_grid(stage, n_calls))
            if skip_last and n_calls > 1:
                del times[-1], sigmas[-2]
            for time, sigma, sigma_next in zip(times, sigmas[:-1], sigmas[1:]):
                v = network([*history, x], time, latent - n_past).to(x)
                x = x + (sigma_next - sigma) * v
                if bar is not None:
                    bar.update()

        if not x.isfinite().all():
            raise BadInput("the network's output is not finite; lower the guidance, or take "
                           "another copy of the checkpoint")
        past.append(x)
        if len(past) > 1 + keep:
            del past[1]
        yield x


def with_guidance(model, text, mask, pooled, audio=None, asg=0., cfg=0., cached=True, reuse=1):
    """The network of `sample_pyramid`: all guidance branches in one batch, Syncphony eq. 6.

    text (R B, T, D), mask (R B, T), pooled (R B, P): the prompts of B clips and, for guidance by
    text (R = 2), as many negative prompts behind them. audio (B, S, A) or None; asg, cfg: w_a, w_t.
    cached: by `HistoryCache`, for one video; else by `staged_velocity`, which gives the same.
    reuse: of the cached, how many calls in turn share the history of the first. Not exact above 1:
    on random weights latents differ by 4 % of their deviation with 2 (6 % with 5).
    """
    off_sync = 0
    if audio is not None:
        off_sync = len(audio) if asg > 0 else 0
        audio = audio.repeat(len(text) // len(audio), 1, 1)             # (R B, S, A)
    cache = HistoryCache(model, text, mask, pooled, audio, off_sync, reuse)

    def network(clips, timestep, latents_dropped=0):
        B = len(clips[-1])
        R = len(text) // B
        clips = [clip.repeat(R, 1, 1, 1, 1) for clip in clips]
        # rows of v: prompts, negative prompts (if R = 2), prompts without audio layers (if asg > 0)
        if cached:
            v = cache.velocity(clips, timestep, latents_dropped)
        else:
            timestep = torch.full((R * B,), timestep, device=text.device)
            v = staged_velocity(model, clips, timestep, text, mask, pooled, audio, off_sync,
                                latents_dropped)
        audio_term = (1 + asg if off_sync else 1, v[-B:])
        text_term = (1 + cfg if R > 1 else 1, v[B:2 * B])
        return combine_guidance(v[:B], audio_term, text_term)           # Syncphony eq. 6
    return network


# ----------------------------------------------------------------------------- published weights

def read_weights(path):
    """A .safetensors or .bin file -> state dict, mapped: what is not used is not read."""
    try:
        if path.suffix == ".bin":
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            from safetensors.torch import load_file
            state = load_file(path)
        assert all(w.is_floating_point() and w.device.type == "cpu" for w in state.values())
        return state
    except ImportError:
        raise BadInput(f"{path}: needs an extra package: pip install safetensors") from None
    except Exception as why:                    # of many kinds, for a damaged file
        raise BadInput(f"{path}: not complete ({type(why).__name__}); download it again") from None


def read_config(folder, make_config):
    """config.json in a folder of a model hub -> make_config of its dict."""
    path = Path(folder) / "config.json"
    try:
        return make_config(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{folder}: no config.json in it; give the folder that holds config.json "
                       f"and {WEIGHTS_NAME}.safetensors") from None
    except KeyError as why:
        raise BadInput(f"{path}: no {why}; expected a PyramidFluxTransformer or a CausalVideoVAE "
                       "(the SD3-based Pyramid Flow is another network)") from None
    # No JSON, nested too deep, a text in place of a number: of many kinds
    except Exception as why:
        raise BadInput(f"{path}: cannot be read ({why}); download it again") from None


def load_published(kind, cfg, folder, device):
    """kind(cfg) with the weights of a folder: one .safetensors, several shards, or one .bin."""
    files = []
    for ending in (".safetensors", "-*-of-*.safetensors", ".bin"):
        files = files or sorted(Path(folder).glob(WEIGHTS_NAME + ending))
    if not files:
        raise BadInput(f"{folder}: {WEIGHTS_NAME}.safetensors is missing; download it again")
    state = {}
    for path in files:
        for key, value in read_weights(path).items():
            # Training checkpoints have the prefixes dit. and vae., and hold the discriminator of
            # the VAE as well, under `loss.`.
            if not key.startswith("loss."):
                state[key.removeprefix("dit.").removeprefix("vae.")] = value
    return build(kind, type(cfg), vars(cfg), state, folder, assign=True).to(device)


def load_pyramid_flow(folder, device="cpu", audio_dim=0, **audio):
    """Published weights (rain1011/pyramid-flow-miniflux, diffusion_transformer_384p) -> MMDiT.

    With audio_dim, the width of the audio features, it has Syncphony's audio layers: until they are
    trained, the result is the published model. audio: further fields of `MMDiTConfig`. On a CPU the
    weights stay in the mapped file."""
    cfg = read_config(folder, lambda config: MMDiTConfig(
        n_double=config["num_layers"], n_single=config["num_single_layers"],
        heads=config["num_attention_heads"], head_dim=config["attention_head_dim"],
        axes=tuple(config["axes_dims_rope"]),
        latent=config["in_channels"] // 4,      # the file counts the channels of a 2x2 patch
        text_dim=config["joint_attention_dim"], pooled_dim=config["pooled_projection_dim"]))
    model = load_published(MMDiT, cfg, folder, device)
    if not audio_dim:
        return model
    state = model.state_dict()
    for i in range(cfg.n_single):
        # Of a zero output (`init_weights`).
        layer = init_weights(CrossAttention(cfg.heads * cfg.head_dim, cfg.heads, audio_dim))
        for key, value in layer.to(device).state_dict().items():
            state[f"single_transformer_blocks.{i}.audio.{key}"] = value
    cfg = replace(cfg, audio_dim=audio_dim, **audio)
    return build(MMDiT, MMDiTConfig, vars(cfg), state, folder, assign=True)


def load_pyramid_vae(folder, device="cpu"):
    """The published VAE (rain1011/pyramid-flow-miniflux, causal_video_vae) -> CausalVideoVAE."""
    halves = (True, True, True, False)          # published: all levels but the last halve the size
    cfg = read_config(folder, lambda config: VAEConfig(
        widths=tuple(config["encoder_block_out_channels"]),
        latent=config["encoder_out_channels"], groups=config["encoder_norm_num_groups"],
        layers=(config["encoder_layers_per_block"][0], config["decoder_layers_per_block"][0]),
        space=tuple(map(int, config.get("encoder_spatial_down_sample", halves))),
        time=tuple(map(int, config.get("encoder_temporal_down_sample", halves)))))
    return load_published(CausalVideoVAE, cfg, folder, device).eval()


# ------------------------------------------------------------------ HuBERT, T5 and CLIP (frozen)

@contextmanager
def import_transformers(flag, name):
    """Yields the package, to load the model `name` that a flag asks for; one clear line if not."""
    try:
        import transformers
        yield transformers
    except ImportError as why:
        raise BadInput(f"{flag} needs packages that are not required otherwise: pip install "
                       f"transformers sentencepiece ({str(why).strip().splitlines()[0]})") from None
    except Exception as why:                    # of many kinds, for an incomplete download
        reason = (str(why).strip().splitlines() or [type(why).__name__])[0]
        raise BadInput(f"{flag} {name}: {reason}") from None


def load_hubert(name, device):
    """HuBERT, a folder or a name on the hub -> function: waveform (samples,) at 16 kHz -> its last
    hidden states (samples / 320, 1024), 50 features a second. (Syncphony takes the audio backbone
    of DenseAV, a tuned HuBERT-large, which is not loaded here: a departure.)"""
    with import_transformers("--hubert", name) as transformers:
        net = transformers.HubertModel.from_pretrained(name).float().to(device).eval()

    @torch.no_grad()
    def hubert_features(wave):
        # Its extractor makes zero mean and unit variance like this, for the large models.
        x = (wave - wave.mean()) / (wave.var() + 1e-7) ** .5
        x = torch.from_numpy(x).to(device)
        # The convolutions have a window of 400 samples every 320: with 40 more on both sides,
        # feature i is centred at (i + 0.5) 20 ms and there is one for every 320 samples.
        x = F.pad(x, (40, 40))
        with torch.autocast(device.type, enabled=False):
            return net(x[None]).last_hidden_state[0].cpu().numpy()      # (S, A)
    return hubert_features


def encode_prompts(folder, prompts, device):
    """Texts by the encoders in Pyramid Flow's folder (11 GB) -> {text: (T5-XXL's states (128, 4096)
    in float16, their mask (128,), CLIP ViT-L/14's pooled vector (768,))}."""
    with import_transformers("--pretrained", folder) as transformers:
        def load(kind, name, **options):
            return getattr(transformers, kind).from_pretrained(folder, subfolder=name, **options)
        half = dict(torch_dtype=torch.bfloat16)
        clip_tokenizer = load("CLIPTokenizer", "tokenizer")
        t5_tokenizer = load("T5TokenizerFast", "tokenizer_2")
        clip = load("CLIPTextModel", "text_encoder", **half).to(device)
        t5 = load("T5EncoderModel", "text_encoder_2", **half).to(device)

    options = dict(padding="max_length", truncation=True, return_tensors="pt")
    table = {}
    with torch.no_grad():
        for prompt in prompts:
            # The lengths of the published pipeline: 77 tokens for CLIP, 128 for T5.
            tokens = clip_tokenizer([prompt], max_length=77, **options).to(device)
            pooled = clip(tokens.input_ids).pooler_output.float()
            tokens = t5_tokenizer([prompt], max_length=128, **options).to(device)
            mask = tokens.attention_mask
            states = t5(tokens.input_ids, attention_mask=mask).last_hidden_state.half()
            table[prompt] = tuple(part[0].cpu() for part in (states, mask, pooled))
    return table


def cached_prompts(folder, captions, pretrained, device):
    """`encode_prompts` of captions, '' (dropped text), the negative prompt, kept in `folder`."""
    path = Path(folder) / "prompts.pt"
    wanted = {"", NEGATIVE_PROMPT, *captions}
    try:
        table = torch.load(path, weights_only=True)
    except Exception:                           # absent or damaged: it is made again
        table = {}
    if not wanted <= table.keys():
        table = encode_prompts(pretrained, sorted(wanted), device)
        with replacing(path) as part:
            torch.save(table, part)
    return table


def stack_prompts(table, captions, device):
    """Rows of `encode_prompts` -> states (B, T, D), mask (B, T), pooled (B, P)."""
    # float32 first: under bfloat16 autocast a CPU refuses to stack float16.
    columns = zip(*([x.float() for x in table[caption]] for caption in captions))
    return tuple(torch.stack(column).to(device) for column in columns)


def unpadded_prompts(table, captions, device):
    """The same for `pyramid_loss`: B states (T_b, D) of the real tokens, None, pooled (B, P)."""
    # The table is on the CPU, so that no GPU has to wait for the lengths.
    rows = [table[caption] for caption in captions]
    states = [to_device(states[:mask.sum()].float(), device) for states, mask, _ in rows]
    pooled = torch.stack([pooled.float() for _, _, pooled in rows])     # (B, P)
    return states, None, to_device(pooled, device)


class ExternalEncoders:
    """HuBERT, T5-XXL and CLIP, for sampling. captions: all that will be asked for. They are encoded
    at once, then T5 (11 GB) is released. audio_dim: width of the features that the model takes."""

    def __init__(self, pretrained, hubert, captions, audio_dim, device):
        if not hubert:
            raise BadInput("--hubert is missing: this model was trained on its features; give "
                           "--hubert facebook/hubert-large-ls960-ft")
        self.hubert = load_hubert(hubert, device)
        width = self.hubert(np.zeros(16000, np.float32)).shape[1]
        if width != audio_dim:
            raise BadInput(f"--hubert {hubert}: makes {width} features a step, this model takes "
                           f"{audio_dim}; give the one that it was trained with")
        prompts = {c: c + QUALITY_SUFFIX if c else "" for c in captions}
        prompts[NEGATIVE_PROMPT] = NEGATIVE_PROMPT
        table = encode_prompts(pretrained, sorted(set(prompts.values())), device)
        self.text = {caption: table[prompt] for caption, prompt in prompts.items()}
        self.device = device

    def encode_audio(self, waves):
        """B waveforms (samples,) of one length, 16 kHz -> features (B, S, A)."""
        features = np.stack([self.hubert(wave) for wave in waves])
        return torch.from_numpy(features).to(self.device)

    def encode_text(self, captions):
        return stack_prompts(self.text, captions, self.device)
