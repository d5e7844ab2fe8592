"""Measuring synchronisation: does what is seen happen when it is heard?

**The reader.** In the toybox everything that moves is drawn from one number per frame. So a video of that world, generated
ones too, can be read back by analysis by synthesis: draw the scene in 61 states, take for every frame the closest, and the
state curve gives the events (a ball's lowest points, the moment a mouth opens, ...). On real renders the reader is right
every time; nothing in it is trained.

    F1 at 50 ms    read events and true events are paired one to one, in order of closeness, within 50 ms;
                   precision = paired / read, recall = paired / true, F1 their harmonic mean over all clips
    residual       what F1 cannot see. A smear in the right place and time counts as a strike, because the reader takes
                   the best match. The residual is the squared error to that best match over the variance that the moving
                   part's states span: 0 = a perfect drawing, 1 = as wrong as a picture averaged over all states. It is
                   taken on moving frames (|s| > 0.15) only: still frames are copies of the first and would flatter
    chance         the same videos against ANOTHER clip's events

    python cyclesync.py --ckpt weights/a2v-toybox.pt --data toybox --clips 96 --seed 0

    F frames · n events · S states · video uint8 (F, H, W, 3) · times in seconds
"""
import json
import time
from contextlib import nullcontext

import numpy as np
import torch
from tqdm import tqdm

from data import (FPS, FRAMES, KINDS, STATES, Parser, number, run_cli, toybox_clip, toybox_draw)
from sample import A2V_FILE, VAE_FILE, BadInput, animate, fingerprint, load_a2v, load_vae, pick_device

HELD_OUT = 10 ** 9                                                            # seeds of evaluation clips start here


# ------------------------------------------------------------------------------------------------ the reader

def read_states(video, scene):
    """Analysis by synthesis: video uint8 (F, H, W, 3) of a known scene -> states (F,), residuals (F,)."""
    low, high = STATES[scene["kind"]]
    grid = np.linspace(low, high, 61)                                         # (S,)
    drawn = toybox_draw(scene, grid, video.shape[1]).reshape(len(grid), -1).astype(np.float32)
    seen = video.reshape(len(video), -1).astype(np.float32)                   # (F, pixels)
    error = (seen ** 2).sum(1)[:, None] - 2 * seen @ drawn.T + (drawn ** 2).sum(1)[None]             # (F, S)
    best = error.argmin(1)
    spanned = ((drawn - drawn.mean(0)) ** 2).sum(1).mean()
    return grid[best], error[np.arange(len(video)), best].clip(0) / spanned


def read_events(kind, s, fps=FPS):
    """State curve (F,) -> event times. Openings and flashes are risings through 0.5, all else are peaks."""
    times = []
    if kind in ("mouth", "lamp"):
        up = False
        for f in range(1, len(s)):
            if not up and s[f] >= .5:
                up = True                       # a lamp is lit at once; a mouth was at 0.5 somewhere between two frames
                times.append(f if kind == "lamp" or s[f - 1] >= .5 else f - (s[f] - .5) / (s[f] - s[f - 1]))
            up = up and s[f] > .35
    else:
        height, f = np.abs(s) if kind == "bell" else s, 0
        while f < len(s):
            if height[f] < .6:
                f += 1
                continue
            end = f                             # one stretch above 0.6 (on one side) is one event, at its top
            while end + 1 < len(s) and height[end + 1] >= .6 and (s[end + 1] > 0) == (s[f] > 0):
                end += 1
            top = np.flatnonzero(height[f:end + 1] >= height[f:end + 1].max() - .02).mean() + f
            if end + 1 < len(s) or height[end] < height[f:end + 1].max():     # cut off by the end while still rising: none
                times.append(top)
            f = end + 1
    return np.array(times) / fps


def match_events(a, b, tolerance):
    """How many of a and b can be paired one to one within `tolerance` seconds (closest pairs first), and their lags b - a."""
    lags = np.asarray(b)[None] - np.asarray(a)[:, None]                       # (n_a, n_b)
    near = np.argwhere(np.abs(lags) <= tolerance + 1e-9)
    free_a, free_b, paired = set(range(len(a))), set(range(len(b))), []
    for i, j in sorted(near.tolist(), key=lambda ij: abs(lags[tuple(ij)])):
        if i in free_a and j in free_b:
            free_a.remove(i), free_b.remove(j), paired.append(lags[i, j])
    return len(paired), paired


def event_scores(truth, read, residuals=()):
    """Lists of event times per clip -> precision, recall, F1 at 50 and 100 ms, mean |timing error| in ms, residual."""
    total_t, total_r, out = sum(map(len, truth)), sum(map(len, read)), {}
    for ms in (50, 100):
        pairs = [match_events(t, r, ms / 1000) for t, r in zip(truth, read)]
        hits, lags = sum(n for n, _ in pairs), [abs(l) for _, ls in pairs for l in ls]
        precision, recall = hits / max(total_r, 1), hits / max(total_t, 1)
        out.update({f"precision_{ms}": precision, f"recall_{ms}": recall, f"f1_{ms}": 2 * hits / max(total_t + total_r, 1)})
    out["timing_ms"] = 1000 * float(np.mean(lags)) if lags else float("nan")
    out["residual"] = float(np.mean(np.concatenate(residuals))) if len(residuals) and sum(map(len, residuals)) else float("nan")
    return out


def score_toybox(videos, clips):
    """Videos uint8 (F, H, W, 3) against the clips they were made for -> scores over all, per kind, and of shuffled events."""
    read, residuals = [], []
    for video, clip in zip(videos, clips):
        s, r = read_states(video, clip["scene"])
        read.append(read_events(clip["kind"], s)), residuals.append(r[np.abs(s) > .15])
    truth = [c["events"] for c in clips]
    scores = event_scores(truth, read, residuals)
    quiet = [len(r) for r, t in zip(read, truth) if len(t) == 0]
    scores["false_per_quiet_clip"] = float(np.mean(quiet)) if quiet else float("nan")
    scores["clips"] = len(clips)
    kinds = {}
    for kind in KINDS:
        mine = [i for i, c in enumerate(clips) if c["kind"] == kind]
        kinds[kind] = event_scores([truth[i] for i in mine], [read[i] for i in mine], [residuals[i] for i in mine])
    eventful = [i for i, t in enumerate(truth) if len(t)]
    other = dict(zip(eventful, eventful[1:] + eventful[:1]))                  # each clip's sound goes to the next one
    shuffled = event_scores([truth[other[i]] for i in eventful], [read[i] for i in eventful])
    return scores, kinds, shuffled
