"""Measuring synchronisation: does what is seen happen when it is heard?

**The reader.** In the toybox everything that moves is drawn from one number per frame. So a video of that world, generated
ones too, can be read back by analysis by synthesis: draw the scene in 61 states, take for every frame the closest, and the
state curve gives the events (a ball's lowest points, the moment a mouth opens, ...), to half a frame. Nothing in it is
trained. Where a frame is as far from every drawing as their mean is, the reader abstains and no event is taken from it.

    F1 at 50 ms    read events and true events are paired one to one, in order of closeness, within 50 ms;
                   precision = paired / read, recall = paired / true, F1 their harmonic mean over all clips
    residual       what F1 cannot see. A smear in the right place and time counts as a strike, because the reader takes
                   the best match. The residual is the squared error to that best match over the variance that the moving
                   part's states span: 0 = a perfect drawing, 1 = as wrong as a picture averaged over all states. It is
                   taken on moving frames (|s| > 0.15) only: still frames are copies of the first and would flatter
    chance         the same videos against ANOTHER clip's events: computed, not assumed

**Pictures and sounds made together** (SyncFlow) have no true events to be held against, and of their scene only the kind is known. The
scene is fitted to the first frame (`fit_scene`), the events that are then SEEN are held against those that are HEARD
(`onsets_in_sound`): the agreement of a clip with itself, beside that of everybody with somebody else's sound.

**CycleSync** (Syncphony section 4) needs no truth: a video-to-audio model f makes a sound from the silent video; the better
that sound's onsets agree with those of the real one, the better the video was synchronised. With A and A' the two sets,

    score = (#{a in A near some a' in A'} + #{a' near some a}) / (2 |A u A'|)                                eqs. 3, 4

Where the paper contradicts itself or is silent, this file does the following, and a test says each in words:

    tolerance   5 ms in appendix C.1, 0.05 s in C.2.1. 50 ms: an analysis frame is 23 ms, and the detector does not even
                agree with itself to 5 ms (the same recording at two sample rates: 0-7 % of onsets, at 50 ms 97-100 %)
    the union   never defined. `set` counts equal times once and is the literal reading: identical lists score 1, lists that
                are one analysis frame apart score 0.5. `merged` counts a matched pair once and scores 1 for both. The paper's
                magnitudes (22 for real clips) fit `set`; `merged` is what one can interpret. Both are printed
    detector    librosa's at 22 050 Hz whatever the file's rate: at 16 kHz it reports every hit twice
    silence     one side without an onset: 0. Both: nothing can be said, the clip is left out and counted
    +-          never said of what. Here brackets are 95 % intervals over clips, by drawing clips anew (bootstrap)

Real clips score 22 of 100 with the model that the paper used (V-AURA): a score means something only beside that of the ground
truth and that of shuffled sounds, made with the SAME f. In the toybox f is an `oracle`; elsewhere it is any program that you
have (`--v2a-cmd`). **AV-Align** (TempoTokens) asks for peaks of optical flow at onsets; it exists in two versions that give
different numbers (`av_align`), and depends on resolution and frame rate. `lag` is a plain cross-correlation. **Frechet
distances** compare clouds of features; which features makes all the difference: our VAE's latents, or the files behind
FVD, FID and FAD if you have them.

    python cyclesync.py --ckpt weights/a2v-toybox.pt --data toybox --clips 96 --seed 0
    python cyclesync.py --shift-study            # true clips, the sound up to 0.5 s late: what does each metric notice?
    python cyclesync.py --ablate syncphony       # trains and scores the rows of the paper's ablation tables
    python cyclesync.py --audio claps.wav        # no truth for a recording: its onsets, as librosa hears them, stand in
    python cyclesync.py clip.mp4                 # any video with its own sound: onsets, lag, AV-Align
    python cyclesync.py --pairs true/ remade/    # CycleSync of sounds that any program made from videos

    python cyclesync.py --ckpt out/t2av/joint/best.pt                # two towers: sounds for true videos, and pairs made from text

    F frames · n events · S states · video uint8 (F, H, W, 3) · times in seconds
"""
import argparse
import csv
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import BadInput, Parser, number, read_audio, read_clip, run_cli, temp_path, write_picture, write_video
from sample import A2V_FILE, HERE, VAE_FILE, WithoutAudio, generate_video, generate_audio_video, video_to_audio, encode_sound, encode_video, attach_external_encoders, load_a2v, load_t2av, pick_device
from toybox import (FPS, FRAMES, KINDS, RATE, STATES, TIMING, fit_scene, detect_clip_events, detect_events, track_states, toybox_clip, draw_scene,
                    synthesise)

HELD_OUT = 10 ** 9                                                            # seeds of evaluation clips start here


def match_events(a, b, tolerance):
    """How many of a and b can be paired one to one within `tolerance` seconds (closest pairs first), and their lags b - a."""
    lags = np.asarray(b)[None] - np.asarray(a)[:, None]                       # (n_a, n_b)
    near = np.argwhere(np.abs(lags) <= tolerance + 1e-9)
    free_a, free_b, paired = set(range(len(a))), set(range(len(b))), []
    for i, j in sorted(near.tolist(), key=lambda ij: abs(lags[tuple(ij)])):
        if i in free_a and j in free_b:
            free_a.remove(i), free_b.remove(j), paired.append(lags[i, j])
    return len(paired), paired


def bootstrap_ratio(over, under=None, rounds=1000):
    """Sum of `over` by sum of `under` (figures per clip; 1 each if not given), and its 95 % interval over clips: the same of
    as many clips drawn with replacement (bootstrap) -> (value, low, high). Clips without a value (nan) are left out."""
    over = np.asarray(over, float)
    under = np.ones(len(over)) if under is None else np.asarray(under, float)
    over, under = over[np.isfinite(over)], under[np.isfinite(over)]
    if under.sum() == 0:
        return (float("nan"),) * 3
    drawn = np.random.default_rng(0).integers(len(over), size=(rounds, len(over)))
    tops, bottoms = over[drawn].sum(1), under[drawn].sum(1)
    return float(over.sum() / under.sum()), *np.quantile(tops[bottoms > 0] / bottoms[bottoms > 0], (.025, .975)).tolist()


def paired_bootstrap(first, second, rounds=1000):
    """How much more the first is than the second, both (over, under) of the same clips as in `ratio` -> (difference, low, high). Two intervals
    may overlap where every clip gains: which clips were drawn moves both alike, and leaves their difference alone."""
    tops, bottoms = np.asarray([first, second], float).transpose(1, 0, 2)     # (2, clips) each
    drawn = np.random.default_rng(0).integers(tops.shape[1], size=(rounds, tops.shape[1]))
    shares = tops[:, drawn].sum(2) / bottoms[:, drawn].sum(2).clip(min=1)     # (2, rounds)
    whole = tops.sum(1) / bottoms.sum(1).clip(min=1)
    return float(whole[0] - whole[1]), *np.quantile(shares[0] - shares[1], (.025, .975)).tolist()


def event_scores(truth, read, residuals=()):
    """Lists of event times per clip -> precision, recall, F1 at 50 and 100 ms, mean |timing error| in ms, residual, and the
    `interval` of each (see `ratio`)."""
    n, m, out = np.array([len(t) for t in truth]), np.array([len(r) for r in read]), {}
    for ms in (50, 100):
        pairs = [match_events(t, r, ms / 1000) for t, r in zip(truth, read)]
        hits = np.array([h for h, _ in pairs])
        out.update({f"precision_{ms}": bootstrap_ratio(hits, m), f"recall_{ms}": bootstrap_ratio(hits, n), f"f1_{ms}": bootstrap_ratio(2 * hits, n + m)})
    out["timing_ms"] = bootstrap_ratio([1000 * np.abs(lags).sum() for _, lags in pairs], hits)
    out["residual"] = bootstrap_ratio([np.sum(r) for r in residuals], [len(r) for r in residuals])
    intervals = {k: v[1:] for k, v in out.items()}
    out = {k: v[0] if np.isfinite(v[0]) or k in ("timing_ms", "residual") else 0. for k, v in out.items()}      # nothing to find: 0
    return dict(out, interval=intervals)


def lag_curve(truth, read):
    """F1 at 50 ms with all read events moved by -0.15 .. 0.15 s -> [(shift, F1), ...]. A model that is late as a rule, and
    not merely unsure, has its summit elsewhere than at 0."""
    curve, total = [], sum(map(len, truth)) + sum(map(len, read))
    for shift in np.arange(-15, 16) / 100:
        hits = sum(match_events(t, np.asarray(r) + shift, .05)[0] for t, r in zip(truth, read))
        curve.append((float(shift), 2 * hits / max(total, 1)))
    return curve


def shuffled_partner(clips):
    """For every clip with events the next one with events: whose sound it is given to find out what chance does."""
    eventful = [i for i, c in enumerate(clips) if len(c["events"])]
    return dict(zip(eventful, eventful[1:] + eventful[:1]))


def score_toybox(videos, clips):
    """Videos uint8 (F, H, W, 3) against the clips they were made for -> scores over all, per kind, of shuffled events; and
    what was read of every video, as `detect_clip_events` gives it."""
    reads, truth = [detect_clip_events(v, c) for v, c in zip(videos, clips)], [c["events"] for c in clips]
    read, residuals, readable = (list(part) for part in zip(*reads))
    scores = event_scores(truth, read, residuals)
    quiet = [len(r) for r, t in zip(read, truth) if len(t) == 0]
    scores.update(false_per_quiet_clip=float(np.mean(quiet)) if quiet else float("nan"), readable=float(np.mean(readable)), clips=len(clips))
    kinds = {}
    for kind in KINDS:
        mine = [i for i, c in enumerate(clips) if c["kind"] == kind]
        kinds[kind] = event_scores([truth[i] for i in mine], [read[i] for i in mine], [residuals[i] for i in mine])
    other = shuffled_partner(clips)
    return scores, kinds, event_scores([truth[j] for j in other.values()], [read[i] for i in other]), reads


# ------------------------------------------------------------------------------------------------ CycleSync, AV-Align, lag

def onsets(wave, rate):
    """When librosa hears something begin in a waveform (samples,) -> times (n,), multiples of 512 / 22 050 s = 23 ms.

    Always at 22 050 Hz: at 16 kHz the detector's local-maximum test spans no frame and every hit is reported twice."""
    import librosa
    wave = np.asarray(wave, np.float32)
    wave = wave if rate == 22050 else librosa.resample(wave, orig_sr=rate, target_sr=22050)
    return librosa.onset.onset_detect(y=wave, sr=22050, hop_length=512, units="time") if len(wave) >= 2048 else np.zeros(0)


def onsets_in_sound(wave):
    """When something begins to sound in the toybox (16 kHz) -> seconds (n,). Of every band the rise of log10 energy over 30 ms,
    falls not counted, averaged over the bands: at least 0.5 (5 dB), three tenths of the clip's steepest, and the highest within
    0.1 s. Noise and hums do not rise so in many bands at once. On 400 true sounds F1 at 50 ms is .99; librosa's onsets have .55,
    most of them noise."""
    m = 1.6 * data.log_mel(wave)                                              # (frames at 100 Hz, bands), log10
    m = np.maximum(m, m.max() - 5)                                            # 50 dB below the loudest is nothing
    up = np.pad(np.maximum(m[3:] - m[:-3], 0).mean(1), (3, 0))
    top = [i for i in range(3, len(up)) if up[i] >= max(.5, .3 * up.max()) and up[i] == up[max(0, i - 10):i + 11].max()]
    return (np.array(top) - 1) / 100


def cyclesync(heard, remade, tolerance=.05):
    """Syncphony eqs. 3, 4: onsets (n,) of the true sound against onsets (m,) of the sound made from the video, in seconds
    -> (score over the literal union, score over the merged union), both nan where neither side has an onset.

    An onset counts if ANY onset of the other side lies within the tolerance; pairing is not one to one."""
    heard, remade = np.asarray(heard, float), np.asarray(remade, float)
    near = np.abs(heard[:, None] - remade[None]) <= tolerance + 1e-9          # (n, m)
    matched, total = int(near.any(1).sum() + near.any(0).sum()), len(heard) + len(remade)
    if total == 0:
        return float("nan"), float("nan")
    union = len(np.unique(np.concatenate([heard, remade]).round(6)))          # equal times count once
    return matched / (2 * union), matched / (2 * (total - matched / 2))


def video_cyclesync(frames, fps, wave, rate, f_v2a, tolerance=.05, trim_start=0.):
    """CycleSync of a video uint8 (F, H, W, 3) with its sound (samples,). f_v2a(frames, fps) -> waveform, rate makes a sound
    from the picture alone; onsets before `trim_start` seconds are left out (a sound cut from a longer one begins with one)."""
    kept = [t[t >= trim_start] for t in (onsets(wave, rate), onsets(*f_v2a(frames, fps)))]
    return cyclesync(*kept, tolerance)


def av_align(audio_times, video_times, fps, once=True):
    """AV-Align (TempoTokens): audio peaks in order, each takes the first unused video peak nearer than one frame -> |matched| /
    |union|, nan without any peak. once=False is the rule before February 2025: peaks may be used again and scores pass 1."""
    used, matched = set(), 0
    for t in audio_times:
        near = [j for j, v in enumerate(video_times) if abs(v - t) < 1 / fps and not (once and j in used)]
        if near:
            used.add(near[0])
            matched += 1
    union = len(audio_times) + len(video_times) - matched
    return matched / union if union else float("nan")


def flow_curve(frames):
    """Mean optical flow (Farneback, pixels) between neighbouring frames of uint8 (F, H, W, 3) -> (F,), the first value twice."""
    try:
        import cv2
    except ImportError:
        raise BadInput("AV-Align's video half is OpenCV's optical flow, an extra: pip install opencv-python-headless") from None
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    flow = [np.hypot(*np.moveaxis(cv2.calcOpticalFlowFarneback(a, b, None, .5, 3, 15, 3, 5, 1.2, 0), -1, 0)).mean() for a, b in zip(grey, grey[1:])]
    return np.array(flow[:1] + flow)


def flow_peaks(curve, fps, least=.1):
    """Strict local maxima of at least `least` pixels (least=0: the older rule) -> seconds."""
    inner = np.arange(1, len(curve) - 1)
    return inner[(curve[inner] > curve[inner - 1]) & (curve[inner] > curve[inner + 1]) & (curve[inner] >= least)] / fps


def lag(frames, fps, wave, rate, most=.5):
    """How much later things move than they sound, in seconds, for any video: the shift within ±`most` at which the change
    between frames correlates best with librosa's onset strength -> (lag, confidence). The confidence is the height of that
    peak over all other shifts in standard deviations: under about 3 there is no one answer (a steady rhythm has several)."""
    import librosa
    motion = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean((1, 2, 3))                   # between frames k and k + 1
    wave = wave if rate == 22050 else librosa.resample(np.asarray(wave, np.float32), orig_sr=rate, target_sr=22050)
    strength = librosa.onset.onset_strength(y=wave, sr=22050, hop_length=220)
    t = np.arange(0, len(frames) / fps, .01)                                                      # both on one grid of 10 ms
    m = np.interp(t, (np.arange(len(motion)) + 1) / fps, motion)                                  # a change is seen when frame k + 1 is
    s = np.interp(t, np.arange(len(strength)) * 220 / 22050, strength)
    if m.std() < 1e-6 or s.std() < 1e-6:
        return float("nan"), 0.
    m, s, reach = (m - m.mean()) / m.std(), (s - s.mean()) / s.std(), min(round(most / .01), len(t) // 2)
    shifts = np.arange(-reach, reach + 1)
    match = np.array([np.mean(m[max(0, k):len(t) + min(0, k)] * s[max(0, -k):len(t) - max(0, k)]) for k in shifts])
    best = int(match.argmax())
    rest = match[np.abs(shifts - shifts[best]) > 10]                                              # shifts further than 0.1 s away
    return shifts[best] * .01, float((match[best] - rest.mean()) / (rest.std() + 1e-9))


# ------------------------------------------------------------------------------------------------ models that make a sound for a video

def oracle(clip):
    """The best video-to-audio model there can be, for videos of a toybox clip's scene: `detect_clip_events` tells when something
    happens, and that is given the sound of this thing in this room. So of all that may differ from the true sound, only
    the timing does. -> f_v2a(frames, fps) -> waveform (samples,), rate"""
    def f_v2a(frames, fps):
        audio_lead, (s, residual) = clip.get("audio_lead", 0.), track_states(frames, clip["scene"])
        events = detect_events(clip["kind"], s, residual < 1)
        shut = [np.flatnonzero(s[math.ceil(t * fps):] < .5) for t in events]                     # a mouth sounds until it closes
        durations = [max(.05, (gap[0] + math.ceil(t * fps) - .5 if len(gap) else len(s)) / fps - t - .04) for t, gap in zip(events, shut)]
        wave = synthesise(clip["scene"], events + audio_lead, durations, audio_lead + len(frames) / fps, clip["seed"], clip["off_screen"])
        return wave[round(audio_lead * RATE):], RATE
    return f_v2a


def v2a_from_checkpoint(path, args):
    """A checkpoint of train.py --task t2av or joint as f_v2a."""
    device, autocast, _ = pick_device(args.device)
    model, vae, audio_vae, ckpt = load_t2av(path, args.vae, args.audio_vae, device)

    def f_v2a(frames, fps):
        small = F.interpolate(torch.tensor(frames).permute(0, 3, 1, 2).float(), data.sides(ckpt["size"]), mode="bicubic", antialias=True)
        return video_to_audio(model, vae, audio_vae, small.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy(), "", autocast, steps=25, cfg=1.), audio_vae.cfg.rate
    return f_v2a


def v2a_from_command(command, least=0.):
    """Any program as f_v2a. In `command` {video} becomes the path of an mp4 without sound (H.264), {wav} the path at which the
    program has to leave its sound. Models want a certain length (V-AURA 2.56 s): a video shorter than `least` seconds is
    held at its last frame, and the sound is cut to the video's own length."""
    if "{video}" not in command or "{wav}" not in command:
        raise BadInput(f"--v2a-cmd {command!r}: must contain {{video}} and {{wav}}, where the program finds the video and leaves its sound")

    def f_v2a(frames, fps):
        held = np.repeat(frames[-1:], max(0, math.ceil(least * fps) - len(frames)), 0)
        with tempfile.TemporaryDirectory() as folder:
            video, wav = Path(folder) / "video.mp4", Path(folder) / "sound.wav"
            write_video(video, np.concatenate([frames, held]), None, fps)
            run_command("--v2a-cmd", command, video=video, wav=wav)
            return read_audio(wav, 22050)[:round(len(frames) / fps * 22050)], 22050
    return f_v2a


def run_command(flag, command, **paths):
    """Run a program of the user's, with its paths put in and all of them there afterwards -> what it prints."""
    try:
        words = shlex.split(command)
    except ValueError as why:
        raise BadInput(f"{flag} {command!r}: cannot be read as a command line ({why})") from None
    for name, path in paths.items():
        words = [w.replace(f"{{{name}}}", str(path)) for w in words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as why:
        raise BadInput(f"{flag}: {words[0]} cannot be run ({why.strerror})") from None
    missing = [name for name, path in paths.items() if not path.is_file()]
    if done.returncode or missing:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BadInput(f"{flag}: {words[0]} ended with code {done.returncode}{''.join(f' and left no {{{m}}}' for m in missing)} ({last})")
    return done.stdout


# ------------------------------------------------------------------------------------------------ Frechet distances

def frechet(a, b):
    """Distance of two clouds of features (n, d), (m, d), taken as Gaussians: |mean - mean|^2 + tr(A + B - 2 (A B)^1/2)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    A, B = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T                      # A^1/2; A B has the eigenvalues of A^1/2 B A^1/2
    cross = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
    return max(0., float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * cross))


def latent_features(vae, videos):
    """Normalised latents but the first, averaged to 2x2 places -> (videos x latents, 4C). Only distances within one VAE compare."""
    device, rows = next(vae.parameters()).device, []
    for v in videos:
        x = torch.tensor(v, device=device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            z = vae.encode(x) if x.shape[3] <= 256 else vae.encode_chunks(x)
            z = vae.normalise(z[0])[0, :, 1:].transpose(0, 1)                 # (L - 1, C, h, w)
        rows.append(F.adaptive_avg_pool2d(z, 2).flatten(1).cpu().numpy())
    return np.concatenate(rows)


def torchscript_features(what, path, videos, sounds):
    """Features by the TorchScript files that everybody uses. 'fvd': i3d_torchscript.pt (StyleGAN-V's), 224x224 clips in [-1, 1]
    -> a row per clip; 'fid': inception-2015-12-05.pt (StyleGAN's), uint8 frames -> a row per frame; 'fad': a VGGish that takes
    a waveform (samples,) at 16 kHz and gives (n, 128). sounds: (waveform, rate) each."""
    import librosa
    try:
        net, rows = torch.jit.load(path, map_location="cpu").eval(), []
        with torch.no_grad():
            for x in sounds if what == "fad" else videos:
                if what == "fad":
                    y = net(torch.from_numpy(x[0] if x[1] == RATE else librosa.resample(x[0], orig_sr=x[1], target_sr=RATE)))
                elif what == "fid":
                    y = net(torch.from_numpy(x).permute(0, 3, 1, 2), return_features=True)
                else:
                    x = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1, (224, 224), mode="bicubic", antialias=True)
                    y = net(x.transpose(0, 1)[None], rescale=False, resize=False, return_features=True)
                rows.append(y.reshape(-1, y.shape[-1]).float().numpy())
    except (RuntimeError, ValueError, OSError) as why:
        raise BadInput(f"--{what} {path}: not a TorchScript file that takes these inputs ({str(why).strip().splitlines()[-1]})") from None
    return np.concatenate(rows)


# ------------------------------------------------------------------------------------------------ videos to score

def generate(model, vae, clips, autocast=nullcontext, bar=None, seed=0, batch=48, **settings):
    """Generate a video for the first frame, sound and caption of every clip -> list of uint8 (F, H, W, 3)."""
    videos = []
    for i in range(0, len(clips), batch):
        some = clips[i:i + batch]
        pieces = generate_video(model, vae, np.stack([c["video"][0] for c in some]), [c["audio"] for c in some], [c["caption"] for c in some],
                         len(some[0]["video"]), autocast, bar, seeds=[seed + i + j for j in range(len(some))], **settings)
        videos += list(np.concatenate(list(pieces), 1))
    return videos


def reconstruct(vae, clips, autocast=nullcontext):
    """What the VAE alone makes of the clips: the ceiling of everything that is generated with it."""
    device, videos = next(vae.parameters()).device, []
    for c in clips:
        x = torch.tensor(c["video"], device=device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad(), autocast():
            z, cache = (vae.encode(x) if x.shape[3] <= 256 else vae.encode_chunks(x))[0], {}
            y = torch.cat([vae.decode(part, x[:, :, :1], cache) for part in z.split(1, 2)], 2).float()             # latent for latent
        y = (y[0].clamp(-1, 1) * 127.5 + 128).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
        videos.append(np.concatenate([c["video"][:1], y[1:]]))
    return videos


# ------------------------------------------------------------------------------------------------ what every table is made of

def held_out_clips(args, size, audio_lead=0.):
    """The clips of the protocol: toybox clips that nobody trained on, or three windows of every test clip of a dataset.
    Each sound begins `audio_lead` seconds before its pictures (in the toybox with the noise of the room), so that it can be delayed
    and stays a whole one."""
    if args.data == "toybox":
        data.only_square(size)
        clips = [toybox_clip(HELD_OUT + 10 ** 4 * args.seed + i, size) for i in range(args.clips)]
        earlier = lambda c: synthesise(c["scene"], c["events"] + audio_lead, c["durations"], audio_lead + FRAMES / FPS, c["seed"], c["off_screen"])
        return [dict(c, name=str(c["seed"]), audio=earlier(c), audio_lead=audio_lead) if audio_lead else dict(c, name=str(c["seed"])) for c in clips]
    found, words = data.find_clips(args.data, args.data_root)
    tests, clips, unusable = [c for c in found if c["split"] == "test"], [], []
    for i in np.random.default_rng(args.seed).permutation(len(tests)):
        if len(clips) >= args.clips:
            break
        try:
            clips += [dict(w, name=f"{tests[i]['name']}@{w['start']:.2f}", kind=tests[i]["kind"]) for w in data.clip_windows(tests[i], size, audio_lead=audio_lead)]
        except BadInput as why:
            unusable.append(str(why))
    print(f"{words}; {len(clips)} windows are scored" + (f", {len(unusable)} clips cannot be used, for instance {unusable[0]}" if unusable else ""))
    if len(clips) < 2:
        raise BadInput(f"--data {args.data}: {len(clips)} usable windows in its test split; at least two are needed")
    return clips[:args.clips]


def v2a_models(args, clips):
    """A video-to-audio model per clip, or None where there is none."""
    if args.v2a_cmd:
        return [v2a_from_command(args.v2a_cmd, args.v2a_seconds)] * len(clips)
    if args.v2a_ckpt:
        return [v2a_from_checkpoint(args.v2a_ckpt, args)] * len(clips)
    return [oracle(c) for c in clips] if args.data == "toybox" else [None] * len(clips)


def v2a_name(args):
    return args.v2a_cmd or args.v2a_ckpt or ("the oracle" if args.data == "toybox" else "no model: give one by --v2a-ckpt or --v2a-cmd")


def analyse_video(video, f_v2a, trim=0.):
    """What a silent video tells of its sound: the sound that f_v2a makes of it and its onsets; the peaks of its optical flow."""
    made = (None, None) if f_v2a is None else f_v2a(video, FPS)
    return dict(sound=made, onsets=None if f_v2a is None else drop_before(onsets(*made), trim),
                peaks=flow_peaks(flow_curve(video), FPS) if find_spec("cv2") else None)


def drop_before(times, start):
    return times[times >= start]


def sync_scores(heard, seen, tolerance):
    """Onsets (n,) of a sound and what `analyse_video` saw in a video -> CycleSync, both unions, and AV-Align; nan where not to be had."""
    union = (float("nan"),) * 2 if seen["onsets"] is None else cyclesync(heard, seen["onsets"], tolerance)
    return dict(cyclesync_set=union[0], cyclesync_merged=union[1],
                av_align=float("nan") if seen["peaks"] is None else av_align(heard, seen["peaks"], FPS))


TORCHSCRIPT = ("fvd", "fid", "fad")                                               # measured by networks that the user hands in


def mean_scores(records):
    """Records of clips -> mean of every figure, and `interval`."""
    figures = {k: bootstrap_ratio([r[k] for r in records]) for k in ("cyclesync_set", "cyclesync_merged", "av_align")}
    return {k: v[0] for k, v in figures.items()} | dict(interval={k: v[1:] for k, v in figures.items()})


def to_json(v):
    """For JSON: rounded, nan as null."""
    if isinstance(v, dict):
        return {k: to_json(x) for k, x in v.items()}
    if isinstance(v, (list, tuple)):
        return [to_json(x) for x in v]
    return v if not isinstance(v, float) else round(v, 4) if np.isfinite(v) else None


def write_csv(path, rows):
    part = temp_path(path)
    with open(part, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


# ------------------------------------------------------------------------------------------------ the table of a checkpoint

COLUMNS = [   # title, key, width, format (none: with its interval); the first nine need to know the truth, as only the toybox does
    ("F1 50 ms", "f1_50", 20, ""), ("prec.", "precision_50", 7, ".3f"), ("recall", "recall_50", 7, ".3f"), ("F1 100", "f1_100", 7, ".3f"),
    ("timing", "timing_ms", 7, ".0f"), ("lag, ms", "lag_ms", 8, ".0f"), ("residual", "residual", 9, ".3f"), ("worst kind", "worst", 13, "s"),
    ("false/quiet", "false_per_quiet_clip", 12, ".2f"), ("CycleSync set", "cyclesync_set", 21, ""), ("merged", "cyclesync_merged", 21, ""),
    ("AV-Align", "av_align", 21, ""), ("Frechet", "frechet_latent", 9, ".3g"), ("FVD", "fvd", 9, ".4g"), ("FID", "fid", 9, ".4g"), ("FAD", "fad", 9, ".4g")]


def table_row(words, row, columns):
    """A line of a table; row=None: its head. Figures that a row has not got are left blank."""
    cells = []
    for title, key, width, form in columns:
        value = title if row is None else row.get(key, float("nan"))
        known = row is None or isinstance(value, str) or np.isfinite(value)
        if row is not None and known:
            value = format(value, form or ".3f") + ("" if form else " [%.2f, %.2f]" % tuple(row["interval"][key]))
        cells.append(f"{value if known else '':>{width}s}")
    return f"{words:26s}" + "".join(cells)


def evaluate(args):
    """Generated, true and reconstructed videos of the held-out clips, without audio layers, with other sounds: one table."""
    device, autocast, words = pick_device(args.device)
    model, vae, ckpt = load_a2v(args.ckpt, args.vae, device, args.pretrained)
    clips, default, toybox = held_out_clips(args, ckpt["size"]), ckpt["guidance"], args.data == "toybox"
    attach_external_encoders(model, args, [c["caption"] for c in clips], device)
    print(f"{words}\n{args.ckpt}: step {ckpt['step']}; {len(clips)} held-out clips of {len(clips[0]['video'])} frames at {'x'.join(map(str, data.sides(ckpt['size'])))} px"
          + (f", {sum(len(c['events']) for c in clips)} events, {sum(len(c['events']) == 0 for c in clips)} clips without any" if toybox else "")
          + f"; {args.steps} steps")
    rows = [("ground_truth", "ground truth", None), ("vae", "VAE reconstruction", None), ("off_sync", "off-sync", 0.)]
    rows += [(f"asg_{w:g}", f"generated, w_a = {w:g}" + ("*" if w == default["asg"] else ""), w) for w in sorted({0., 1., 2., 4., float(default["asg"])})]
    evaluator, result, records = Evaluator(clips, vae, args), {}, []
    have = {"cyclesync_set": evaluator.models[0], "cyclesync_merged": evaluator.models[0], "av_align": find_spec("cv2"), **{k: getattr(args, k) for k in TORCHSCRIPT}}
    columns = [c for c in COLUMNS[0 if toybox else 9:] if have.get(c[1], True)]
    print(table_row("", None, columns))
    total = math.ceil((len(clips[0]["video"]) - 1) / vae.stride_t) * args.steps * math.ceil(len(clips) / 48)
    for key, words, w in rows:
        start = time.perf_counter()
        if w is None:
            videos = [c["video"] for c in clips] if key == "ground_truth" else reconstruct(vae, clips, autocast)
        else:
            with tqdm(total=total, desc=words, disable=None, leave=False) as bar:
                videos = generate(WithoutAudio(model) if key == "off_sync" else model, vae, clips, autocast, bar, args.seed, steps=args.steps, asg=w, cfg=default["cfg"])
        result[key], shuffled = evaluator.row(key, videos, records)
        if key == f"asg_{default['asg']:g}":
            result["generated"], result["shuffled"] = result[key], shuffled
            write_picture(Path(args.out) / "strips.png", evaluator.strips(videos))
        print(table_row(words, result[key], columns) + f"  {time.perf_counter() - start:.0f} s")
    print(table_row("shuffled sounds (chance)", result["shuffled"], columns))
    print(f"* the checkpoint's own guidance; w_t = {default['cfg']:g} in all rows. In brackets: 95 % intervals over clips. Frechet: distance of latents. CycleSync by "
          + v2a_name(args)
          + ("" if find_spec("cv2") else ". AV-Align needs OpenCV: pip install opencv-python-headless"))
    write_csv(Path(args.out) / "clips.csv", records)
    print(f"every clip: {Path(args.out) / 'clips.csv'}; strips: {Path(args.out) / 'strips.png'}")
    print(json.dumps(to_json(result)))


class Evaluator:
    """Scores rows of videos, all of the same clips; what only depends on the clips is computed once."""

    def __init__(self, clips, vae, args):
        self.clips, self.vae, self.args, self.models = clips, vae, args, v2a_models(args, clips)
        if args.fad and not self.models[0]:
            raise BadInput(f"--fad {args.fad}: measures sounds made from the videos; give a model that makes them, --v2a-cmd")
        self.heard = [drop_before(onsets(c["audio"], RATE), args.trim_start) for c in clips]
        self.shuffle = [(i + len(clips) // 2) % len(clips) for i in range(len(clips))]           # windows of one clip are neighbours
        self.truth = self.features([c["video"] for c in clips], [(c["audio"], RATE) for c in clips])

    def features(self, videos, sounds):
        paths = {what: getattr(self.args, what) for what in TORCHSCRIPT}
        return dict(frechet_latent=latent_features(self.vae, videos)) | {
            what: torchscript_features(what, path, videos, sounds) for what, path in paths.items() if path}

    def row(self, key, videos, records):
        """-> the scores of this row and of the same videos with shuffled sounds; a record per clip is added to `records`."""
        clips, a = self.clips, self.args
        seen = [analyse_video(v, m, a.trim_start) for v, m in zip(videos, self.models)]
        mine = [sync_scores(h, s, a.tolerance) for h, s in zip(self.heard, seen)]
        result, shuffled = mean_scores(mine), mean_scores([sync_scores(self.heard[j], s, a.tolerance) for j, s in zip(self.shuffle, seen)])
        result.update({k: frechet(v, self.truth[k]) for k, v in self.features(videos, [s["sound"] for s in seen]).items()})
        read = [dict() for _ in clips]
        if a.data == "toybox":
            scores, kinds, chance, reads = score_toybox(videos, clips)
            looks = {k: v["residual"] for k, v in kinds.items() if np.isfinite(v["residual"])}
            worst, curve = max(looks, key=looks.get, default=None), lag_curve([c["events"] for c in clips], [r[0] for r in reads])
            late = -1000 * np.median([t for t, f1 in curve if f1 == max(f1 for _, f1 in curve)])            # of what moves it back
            result.update(scores, interval=result["interval"] | scores["interval"], lag_ms=float(late), lag_curve=curve, worst_residual=looks.get(worst),
                          worst=f"{worst} {looks[worst]:.2f}" if looks else "", kinds={k: dict(f1_50=v["f1_50"], residual=v["residual"]) for k, v in kinds.items()})
            shuffled.update(chance, interval=shuffled["interval"] | chance["interval"], clips=len(clips))
            for i, (c, (events, residual, readable)) in enumerate(zip(clips, reads)):
                hits, lags = match_events(c["events"], events, .05)
                read[i] = dict(events=len(c["events"]), read=len(events), matched_50=hits, timing_ms=1000 * np.mean(np.abs(lags)) if hits else None,
                               residual=float(residual.mean()) if len(residual) else None, readable=readable)
        records += [to_json(dict(row=key, clip=c["name"], kind=c["kind"], **r, **m)) for c, r, m in zip(clips, read, mine)]
        return result, shuffled

    def strips(self, videos):
        """The truth above, ours below, of six clips; marked is what happens: read events, or onsets and what was made of the video."""
        clips, toybox = self.clips, self.args.data == "toybox"
        chosen = [next((i for i, c in enumerate(clips) if c["kind"] == k and len(c["events"])), None) for k in KINDS] if toybox else range(0, len(clips), max(1, len(clips) // 6))
        strips = []
        for i in [i for i in chosen if i is not None][:6]:
            marks = detect_clip_events(videos[i], clips[i])[0] if toybox else analyse_video(videos[i], self.models[i])["onsets"]
            strips += [data.film_strip(clips[i]["video"], clips[i]["audio"], events=clips[i]["events"] if toybox else self.heard[i]),
                       data.film_strip(videos[i], clips[i]["audio"], events=() if marks is None else marks)]
        return np.concatenate(strips)


# ------------------------------------------------------------------------------------------------ the table of two towers

PAIR_COLUMNS = [("onset F1", "onsets_f1_50", 20, ""), ("shuffled", "onsets_shuffled", 10, ".3f"), ("CycleSync merged", "cyclesync_merged", 21, ""),
                ("seen F1", "seen_f1_50", 9, ".3f"), ("agreement F1", "agreement_f1_50", 20, ""), ("shuffled", "agreement_shuffled", 10, ".3f"), ("residual", "residual", 10, ".3f"),
                ("Frechet mels", "frechet_mels", 14, ".3g"), ("latents", "frechet_latent", 10, ".3g"),
                ("false: silent", "false_silent", 15, ".2f"), ("off-screen", "false_off_screen", 12, ".2f"), ("heard", "false_heard", 7, ".2f")]


def mel_features(waves):
    """Log-mels averaged over a quarter of a second -> (waves x quarters, 64)."""
    return np.concatenate([m[:len(m) // 25 * 25].reshape(-1, 25, data.MELS).mean(1) for m in map(data.log_mel, waves)])


def score_both(videos, waves, clips, vae, known=True, scenes=None):
    """Videos with their sounds -> scores. Agreement: events seen in a picture, by a scene fitted to its first frame, against
    those heard in the sound made with it. `known`: they were made for these clips' events, so both are held against those too.
    False: events seen per clip of a silent scene, or of one whose only sound is off-screen; onsets heard per clip of a silent scene.
    scenes: a dict that keeps fitted scenes, for rows of the same pictures. `agreed`: what the agreement of every clip is made of, for `gain`."""
    truth, heard = [c["events"] for c in clips], [onsets_in_sound(w) for w in waves]
    scenes, key = {} if scenes is None else scenes, lambda v: v[0].tobytes()
    scenes.update({key(v): fit_scene(v[0], c["kind"]) for v, c in zip(videos, clips) if key(v) not in scenes})
    reads = [detect_clip_events(v, dict(kind=c["kind"], scene=scenes[key(v)])) for v, c in zip(videos, clips)]
    seen, other = [r[0] for r in reads], [(i + len(clips) // 2) % len(clips) for i in range(len(clips))]
    agree, quiet = event_scores(seen, heard, [r[1] for r in reads]), [(c["off_screen"], s, h) for c, s, h in zip(clips, seen, heard) if len(c["events"]) == 0]
    mean = lambda found: float(np.mean([len(x) for x in found])) if found else float("nan")
    out = dict(agreement_f1_50=agree["f1_50"], agreement_shuffled=event_scores([seen[j] for j in other], heard)["f1_50"], residual=agree["residual"],
               frechet_mels=frechet(mel_features(waves), mel_features([c["audio"] for c in clips])), clips=len(clips),
               frechet_latent=frechet(latent_features(vae, videos), latent_features(vae, [c["video"] for c in clips])),
               interval=dict(agreement_f1_50=agree["interval"]["f1_50"]), false_silent=mean([s for off, s, _ in quiet if not off]),
               false_off_screen=mean([s for off, s, _ in quiet if off]), false_heard=mean([h for off, _, h in quiet if not off]),
               agreed=tuple(zip(*((2 * match_events(s, h, .05)[0], len(s) + len(h)) for s, h in zip(seen, heard)))))
    if known:
        s, shuffled = event_scores(truth, heard), event_scores([truth[j] for j in other], heard)
        cs = bootstrap_ratio([cyclesync(onsets(c["audio"], RATE), onsets(w, RATE))[1] for c, w in zip(clips, waves)])
        out.update(seen_f1_50=event_scores(truth, seen)["f1_50"], onsets_f1_50=s["f1_50"], onsets_f1_100=s["f1_100"], onsets_shuffled=shuffled["f1_50"], cyclesync_merged=cs[0])
        out["interval"].update(onsets_f1_50=s["interval"]["f1_50"], cyclesync_merged=cs[1:])
    return out


def evaluate_towers(args):
    """The table of two towers: true clips, both VAEs, a sound made for the true video, with Harmony a video made for the true sound, and
    pairs made from captions, with and without the clip's first picture. Every row with and without the guidance it depends on."""
    device, autocast, words = pick_device(args.device)
    model, vae, audio_vae, ckpt = load_t2av(args.ckpt, args.vae, args.audio_vae, device)
    if args.data != "toybox":
        raise BadInput(f"--data {args.data}: two towers are scored by the toybox's truth; leave --data out")
    own, size = ckpt["guidance"], args.resolution or ckpt["size"]
    clips = held_out_clips(args, size)
    captions, truth, sounds = [c["caption"] for c in clips], np.stack([c["video"] for c in clips]), [c["audio"] for c in clips]
    print(f"{words}\n{args.ckpt}: step {ckpt['step']} of stage {ckpt['stage']}; {len(clips)} held-out clips, {sum(len(c['events']) for c in clips)} events; {args.steps} steps")
    print(table_row("", None, PAIR_COLUMNS))
    z_v = torch.cat([encode_video(vae, v, device) for v in truth])
    z_a = torch.cat([encode_sound(audio_vae, w, device) for w in sounds])
    with torch.no_grad():
        coded = [audio_vae.decode(audio_vae.denormalise(z[None]), len(w))[0].clamp(-1, 1).cpu().numpy() for z, w in zip(z_a, sounds)]
    said = dict(speech=[c["speech"] for c in clips], shift=own["shift"]) if model.cfg.bridges else {}
    make = lambda **given: generate_audio_video(model, vae, audio_vae, captions, truth.shape[1], size, autocast, seeds=[args.seed + i for i in range(len(clips))], steps=args.steps, **said, **given)
    pictures = dict(pictures=truth[:, 0])
    rows = [("ground_truth", "ground truth", lambda: (truth, sounds), True), ("vae", "both VAEs", lambda: (reconstruct(vae, clips, autocast), coded), True)]
    if model.cfg.bridges:
        guided = {k: own[k] for k in ("cfg", "sync_video", "sync_audio")}
        for key, words, S in (("", "", guided), ("_plain", ", no SyncCFG", dict(guided, sync_video=1., sync_audio=1.))):
            rows += [(f"v2a{key}", f"sound for video{words}", lambda S=S: (truth, make(z_v=z_v, **S)[1]), True),
                     (f"a2v{key}", f"video for sound{words}", lambda S=S: (make(z_a=z_a, **pictures, **S)[0], sounds), True),
                     (f"i2av{key}", f"both, from picture{words}", lambda S=S: make(**pictures, **S), False), (f"t2av{key}", f"both, from text{words}", lambda S=S: make(**S), False)]
    else:
        w = own["cfg"]
        rows += [("v2a", "sound for video", lambda: (truth, make(z_v=z_v, cfg=w)[1]), True), ("v2a_plain", "sound for video, w = 1", lambda: (truth, make(z_v=z_v, cfg=1.)[1]), True),
                 ("i2av", "both, from picture", lambda: make(cfg=w, **pictures), False), ("i2av_plain", "both, from picture, w = 1", lambda: make(cfg=1., **pictures), False)]
        rows += [("t2av" if v == w else f"t2av_{v:g}", f"both, from text, w = {v:g}", lambda v=v: make(cfg=v), False) for v in sorted({1., 2., 4., 6., w})]
    result, scenes, agreed = {}, {}, {}
    for key, title, make_row, known in rows:
        start = time.perf_counter()
        videos, waves = make_row()
        result[key] = score_both(videos, waves, clips, vae, known, scenes)
        agreed[key] = result[key].pop("agreed")
        print(table_row(title, result[key], PAIR_COLUMNS) + f"  {time.perf_counter() - start:.0f} s", flush=True)
        if key in ("v2a", "a2v", "i2av", "t2av"):
            shown = [next((i for i, c in enumerate(clips) if c["kind"] == k and len(c["events"])), 0) for k in KINDS]
            write_picture(Path(args.out) / f"{key}.png", np.concatenate([data.film_strip(videos[i], waves[i], events=onsets_in_sound(waves[i])) for i in shown]))
    print(f"strips, onsets marked: {Path(args.out)}/v2a.png, i2av.png, t2av.png")
    for key, title, *_ in rows:
        if f"{key}_plain" in agreed:
            result[f"{key}_gain"] = paired_bootstrap(agreed[key], agreed[f"{key}_plain"])
            print(f"{title}: guidance adds {result[f'{key}_gain'][0]:+.3f} [%+.2f, %+.2f] to the agreement of the same clips" % result[f"{key}_gain"][1:])
    if model.cfg.bridges:
        refs, takes = zip(*((first, rest) for first, *rest in other_variations(clips)))                    # one to be heard, the rest to be held against
        z_r = torch.cat([encode_sound(audio_vae, r, device) for r in refs])
        for key, words, waves in (("true", "true sounds", sounds), ("vae", "the same through the audio VAE", coded), ("no_reference", "made for the video", make(z_v=z_v, **guided)[1]),
                                  ("reference", "the same with a reference", make(z_v=z_v, refs=z_r, **guided)[1])):
            result[f"timbre_{key}"] = s = score_timbre(waves, takes, clips)
            print(f"{words}: {s['closer']:.2f} [%.2f, %.2f] are closer in timbre to other takes of their thing than to another material; onset F1 {s['onsets_f1_50']:.3f}" % tuple(s["interval"]))
        make(z_a=z_a, **pictures, **guided, attention_maps=(looks := []))
        result["maps"] = score_maps(looks, clips)
        for key, figures in result["maps"].items():
            print(f"{key} on the places where the thing can move, 1 = no more than elsewhere: " + ", ".join(f"{who} {v[0]:.2f} [{v[1]:.2f}, {v[2]:.2f}]" for who, v in figures.items()))
    print(json.dumps(to_json(result)))


def score_maps(looks, clips):
    """Harmony's figures 3 and 5 in numbers: how much more than elsewhere the sound, while something is heard, attends to the places where
    the thing can move, and SyncCFG pulls there; for things that sound, and where the only sound is off-screen."""
    attention = torch.cat([k["attention"] for k in looks]).sum(2)             # (B, S, h, w)
    S, heat, found = attention.shape[1], [k["heat"] for k in looks], {}
    pulls = torch.cat(heat).mean(1, keepdim=True) if heat[0] is not None else attention[:, :0]                # (B, 1, H, W)
    for what, maps in (("attention", attention), ("SyncCFG", pulls)):
        gains = {"things that sound": [], "off-screen sounds": []}
        for c, m in zip(clips, maps):
            drawn = draw_scene(c["scene"], np.linspace(*STATES[c["kind"]], 9), c["video"].shape[1]).astype(int)
            moves = torch.from_numpy(drawn.max(0) - drawn.min(0)).amax(-1).gt(24).float()[None]   # (1, H, W)
            at = [int(e * S / (len(c["video"]) / FPS)) + k for e in c["events"] for k in range(5)] if len(c["events"]) else range(S)
            m = m[[min(i, len(m) - 1) for i in at]].mean(0) if len(m) else torch.full(moves.shape[1:], float("nan"))
            share = (m / m.sum() * F.adaptive_avg_pool2d(moves, m.shape)[0]).sum() / moves.mean()
            if len(c["events"]) or c["off_screen"]:
                gains["things that sound" if len(c["events"]) else "off-screen sounds"].append(share.item())
        found[what] = {who: bootstrap_ratio(g) for who, g in gains.items()}
    return found


def timbre(wave):
    """What a sound sounds like, whenever: the most of every mel band, level and tilt taken out, which are the room's. (64,)"""
    most, band = data.log_mel(wave).max(0), np.linspace(-1, 1, data.MELS)
    return most - np.polyval(np.polyfit(band, most, 1), band)


def other_variations(clips, n=9):
    """For every toybox clip the sounds of n other takes of its thing in which something happens. The picture tells nothing of the material."""
    takes = lambda c: (toybox_clip(c["seed"], video=False, variation=k) for k in range(1, 100))
    return [list(islice((t["audio"] for t in takes(c) if len(t["events"])), n)) for c in clips]


def score_timbre(waves, takes, clips):
    """Voice clone: which share of the sounds is closer in timbre to its own clip's material, the mean of `takes` of it, than to that of another
    clip of the same kind? One half is chance. And when do they sound? True sounds come to 0.95: some materials of a kind are alike."""
    loud, voices, closer = [i for i, c in enumerate(clips) if len(c["events"])], [np.mean([timbre(t) for t in some], 0) for some in takes], []
    for i in loud:
        mine, others = timbre(waves[i]), [j for j in loud if j != i and clips[j]["kind"] == clips[i]["kind"]]
        far = [np.abs(mine - voices[j]).mean() for j in (i, *others)]
        closer += [np.mean([far[0] < f for f in far[1:]])] if others else []  # one figure a clip
    share, *interval = bootstrap_ratio(closer)
    return dict(closer=share, interval=interval, clips=len(closer), onsets_f1_50=event_scores([c["events"] for c in clips], [onsets_in_sound(w) for w in waves])["f1_50"])


# ------------------------------------------------------------------------------------------------ the shift study

def draw_curves(path, x, curves, xlabel, ylabel):
    """A line plot, png, where matplotlib is installed. curves: name -> values at x."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: pip install matplotlib")
        return
    axes = Figure(figsize=(7.6, 4.2), layout="constrained").subplots()
    for name, values in curves.items():
        axes.plot(x, values, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.legend()
    axes.figure.savefig(path)


def shift_study(args):
    """Syncphony figure 7, tables 5 and 6: true videos whose sound comes 0.0-0.5 s late, by every metric. The sound is not moved
    within the clip, which would leave a gap: what precedes the clip is known, and is heard instead."""
    audio_lead, delays = .5, np.arange(6) / 10
    clips = held_out_clips(args, args.resolution or 64, audio_lead)
    models, n, toybox = v2a_models(args, clips), round(len(clips[0]["video"]) / FPS * RATE), args.data == "toybox"
    seen = [analyse_video(c["video"], m, args.trim_start) for c, m in zip(tqdm(clips, desc="videos", disable=None, leave=False), models)]
    read = [detect_clip_events(c["video"], c)[0] for c in clips] if toybox else None
    result, records = {}, []
    for d in [*delays, None]:                                                 # None: everybody with somebody else's sound
        sounds = [c["audio"][round((audio_lead - (d or 0.)) * RATE):][:n] for c in clips]
        events = [c["events"] + (d or 0.) for c in clips] if toybox else None
        if d is None:
            sounds, events = (v[len(v) // 2:] + v[:len(v) // 2] if v else v for v in (sounds, events))
        heard = [drop_before(onsets(s, RATE), args.trim_start) for s in sounds]
        mine = [sync_scores(h, s, args.tolerance) for h, s in zip(heard, seen)]
        late, sure = np.array([lag(c["video"], FPS, s, RATE) for c, s in zip(clips, sounds)]).T
        row = dict(mean_scores(mine), lag_ms=1000 * float(np.nanmedian(late[sure > 3])) if (sure > 3).any() else float("nan"))
        if toybox:
            scores = event_scores([e[e < n / RATE] for e in events], read)
            row = row | {k: scores[k] for k in ("f1_50", "f1_100", "timing_ms")} | dict(interval=row["interval"] | scores["interval"])
        key = "shuffled" if d is None else f"{d:.1f}"
        result[key] = row
        records += [to_json(dict(delay=key, clip=c["name"], kind=c["kind"], **m, lag_s=float(l), lag_confidence=float(s))) for c, m, l, s in zip(clips, mine, late, sure)]
    names = {"f1_50": "F1 at 50 ms", "cyclesync_set": "CycleSync, set", "cyclesync_merged": "CycleSync, merged", "av_align": "AV-Align"}
    curves = {k: [result[f"{d:.1f}"][k] for d in delays] for k in names if np.isfinite(result["0.0"].get(k, np.nan))}
    print(f"{len(clips)} true clips; CycleSync by {v2a_name(args)}; mean, 95 % interval, change from delay 0")
    print(f"{'sound is late by':26s}" + "".join(f"{names[k]:>30s}" for k in curves) + f"{'median lag':>14s}")
    for key, row in result.items():
        cells = [f"{row[k]:.3f} [%.2f, %.2f]{100 * (row[k] / curves[k][0] - 1):+7.1f} %%" % tuple(row["interval"][k]) for k in curves]
        print(f"{key + ' s' if key != 'shuffled' else 'somebody else`s sound':26s}" + "".join(f"{c:>30s}" for c in cells) + f"{row['lag_ms']:11.0f} ms")
    draw_curves(Path(args.out) / "shift.png", delays, {names[k]: np.array(v) / v[0] for k, v in curves.items()}, "delay of the sound, seconds", "score / score at 0")
    write_csv(Path(args.out) / "shift.csv", records)
    print(f"{Path(args.out) / 'shift.png'}, {Path(args.out) / 'shift.csv'}")
    print(json.dumps(to_json(result)))


# ------------------------------------------------------------------------------------------------ the ablations

RUNS = {   # what is trained for every seed: flags of train.py; {video_tower} is what that run gave
    "syncphony": {"full": "--task a2v", "no motion-aware loss": "--task a2v --lambda-motion 0", "no Audio RoPE": "--task a2v --no-audio-rope"},
    "syncflow": {"video tower": "--task t2av --stage video", "full": "--task t2av --stage audio --init {video_tower}",
                 "no adaptor": "--task t2av --stage audio --no-adaptor --init {video_tower}", "no video": "--task t2av --stage audio --no-video --init {video_tower}",
                 "optimal transport": "--task t2av --stage audio --ot --init {video_tower}"},
    "harmony": {"video tower": "--task joint --stage video", "audio tower": "--task joint --stage audio --init {video_tower}",
                "full": "--task joint --stage joint --init {audio_tower}", "no CTS": "--task joint --stage joint --lambda-v 0 --lambda-a 0 --init {audio_tower}",
                "audio-driven alone": "--task joint --stage joint --lambda-joint 0 --lambda-v 1 --lambda-a 0 --init {audio_tower}",
                "no RoPE alignment": "--task joint --stage joint --no-rope-align --init {audio_tower}", "no GLDI": "--task joint --stage joint --no-gldi --init {audio_tower}",
                "GLDI alone": "--task joint --stage joint --lambda-v 0 --lambda-a 0 --no-rope-align --init {audio_tower}",
                "none of it": "--task joint --stage joint --lambda-v 0 --lambda-a 0 --no-rope-align --no-gldi --init {audio_tower}"}}
ROWS = {   # the row, the run it is sampled from, its guidance, the paper's figure
    "syncphony": [   # w_a (None: off-sync); CycleSync on AVSync15 (tables 3, 4, 11)
        ("without motion-aware loss", "no motion-aware loss", 0., "15.18 ± 1.48"), ("without Audio RoPE", "no Audio RoPE", 0., "14.41 ± 1.40"),
        ("off-sync (audio skipped)", "full", None, "12.34 ± 1.14"), ("full model", "full", 0., "15.31 ± 1.49"), ("with ASG, w_a = 1", "full", 1., "15.94 ± 1.56"),
        ("with ASG, w_a = 2", "full", 2., "16.48 ± 1.28"), ("with ASG, w_a = 4", "full", 4., "16.26 ± 1.40")],
    "syncflow": [    # w; FAD on Greatest Hits, lower is better (table 4; figure 5 sweeps w)
        ("full, sound for video, w = 1", "full", 1., "0.92"), ("without adaptor", "no adaptor", 1., "2.34"), ("text to sound, no video", "no video", 1., "1.01"),
        ("with optimal transport", "optimal transport", 1., "(its default)"), ("full, w = 2", "full", 2., ""), ("full, w = 4", "full", 4., ""), ("full, w = 6", "full", 6., "(its default)")],
    "harmony": [     # s_v, s_a; Sync-C on speech: one thing after the other (main paper), then all but one (supplement, table 4)
        ("none of it", "none of it", (1., 1.), "4.20"), ("+ GLDI", "GLDI alone", (1., 1.), "4.29"), ("+ RoPE alignment", "no CTS", (1., 1.), "4.80"),
        ("+ CTS", "full", (1., 1.), "5.09"), ("+ SyncCFG: full", "full", (3., 2.), "6.51"),
        ("full but RoPE alignment", "no RoPE alignment", (3., 2.), "5.60"), ("full but GLDI", "no GLDI", (3., 2.), "5.30"), ("full but CTS", "no CTS", (3., 2.), "1.13")]}
CURVES = {   # Harmony's figure 3: how soon a run learns which task -> run, column of its scores.csv
    "audio-driven alone": ("audio-driven alone", "audio_driven"), "CTS: audio-driven": ("full", "audio_driven"), "joint loss: audio-driven": ("no CTS", "audio_driven"),
    "CTS: pairs": ("full", "pairs"), "joint loss: pairs": ("no CTS", "pairs")}
SHOWN = {
    "syncphony": dict(f1_50="F1 at 50 ms", f1_100="F1 at 100 ms", cyclesync_set="CycleSync set", cyclesync_merged="merged", residual="residual", frechet_latent="Frechet"),
    "syncflow": dict(onsets_f1_50="onset F1 50 ms", onsets_f1_100="100 ms", onsets_shuffled="shuffled", cyclesync_merged="CycleSync", frechet_mels="Frechet mels"),
    "harmony": dict(agreement_f1_50="agreement F1", agreement_shuffled="shuffled", a2v_f1_50="audio-driven F1", v2a_f1_50="video-driven F1", residual="residual")}
PAPER = dict(syncphony="paper: CycleSync", syncflow="paper: FAD", harmony="paper: Sync-C")


def ablate(args):
    """Train every variant with every seed, score it, print mean and standard deviation over seeds. What is done is kept: the
    same command goes on where it was stopped, within a training too."""
    if args.data != "toybox":
        raise BadInput(f"--ablate with --data {args.data}: the ablations are scored by the toybox's truth; leave --data out")
    if args.init and args.ablate != "harmony":
        raise BadInput(f"--init {args.init}: --ablate {args.ablate} trains all that it needs; only --ablate harmony starts from given towers")
    seeds, steps, clips, n = (1, 400, 800, 48) if args.quick else (3, 800, 1500, args.clips)
    system, shown, scores = args.ablate, SHOWN[args.ablate], {}
    root = Path(args.out) / f"ablation-{system}-{steps}"
    for seed in range(seeds):
        named = {run: root / f"{run.replace(' ', '-')}-{seed}" for run in RUNS[system]}
        inits = {run.replace(" ", "_"): folder / "best.pt" for run, folder in named.items()} | ({"audio_tower": args.init} if args.init else {})
        for run, flags in RUNS[system].items():
            if args.init and run.endswith("tower"):
                continue
            folder, scored = named[run], named[run] / f"scores-{n}.json"
            if not scored.is_file():
                print(f"{run}, seed {seed}: {folder}", flush=True)
                flags = [f.format(**inits) for f in flags.split()]
                command = [sys.executable, str(HERE / "train.py"), "--seed", seed, "--steps", steps, "--clips", clips, "--eval-clips", 24,
                           *(("--batch-size", 8) if system == "harmony" else ()),
                           "--sample-every", steps // 4 if system == "harmony" and run in {r for r, _ in CURVES.values()} else steps,
                           "--device", args.device, "--data-root", args.data_root, "--vae", args.vae, *(["--audio-vae", args.audio_vae] if args.audio_vae else []), "--out", folder, *flags]
                code = subprocess.run([str(c) for c in command]).returncode
                if code == 130:
                    raise KeyboardInterrupt
                if code:
                    raise BadInput(f"the training above ended with code {code}; the same command tries again")
                rows = [(row, w) for row, source, w, _ in ROWS[system] if source == run]
                score = dict(syncphony=score_a2v, syncflow=score_towers, harmony=score_harmony)[system]
                part = temp_path(scored)
                part.write_text(json.dumps(to_json(score(folder / "best.pt", rows, argparse.Namespace(**dict(vars(args), clips=n, seed=seed))) if rows else {})))
                os.replace(part, scored)
            for row, values in json.loads(scored.read_text()).items():
                scores.setdefault(row, []).append(values)
    print(f"{steps} steps on {clips} clips, {n} held-out clips, {seeds} training seed{'s' * (seeds > 1)}" + ": mean ± standard deviation over seeds" * (seeds > 1))
    print(f"{'':28s}" + "".join(f"{w:>17s}" for w in shown.values()) + f"{PAPER[system]:>19s}")
    for row, _, _, paper in ROWS[system]:
        figures = {k: np.array([s[k] for s in scores[row]]) for k in shown}
        show = lambda v: f"{v.mean():.3f}" + (f" ± {v.std(ddof=1):.3f}" if seeds > 1 else "")
        print(f"{row:28s}" + "".join(f"{show(v):>17s}" for v in figures.values()) + f"{paper:>19s}")
    if system == "harmony":
        quarters = steps * np.arange(1, 5) // 4
        read = lambda run, column, seed: {int(r["step"]): float(r[column]) for r in csv.DictReader(open(root / f"{run.replace(' ', '-')}-{seed}" / "scores.csv"))}
        learned = {name: np.mean([[read(*curve, seed)[q] for q in quarters] for seed in range(seeds)], 0) for name, curve in CURVES.items()}
        draw_curves(root / "learning.png", quarters, learned, "steps", "F1 at 50 ms, without guidance")
        print(f"{'learned after steps':28s}" + "".join(f"{q:8d}" for q in quarters) + f"   {root / 'learning.png'}")
        print("\n".join(f"{name:28s}" + "".join(f"{x:8.3f}" for x in v) for name, v in learned.items()))
    print(json.dumps(to_json({row: {k: [s[k] for s in v] for k in shown} for row, v in scores.items()})))


def score_a2v(ckpt, rows, args):
    """Sample and score the rows (name, w_a) of one trained variant; every training seed meets other clips."""
    device, autocast, _ = pick_device(args.device)
    model, vae, ckpt = load_a2v(ckpt, args.vae, device)
    clips = held_out_clips(args, ckpt["size"])
    evaluator = Evaluator(clips, vae, args)
    return {row: evaluator.row(row, generate(WithoutAudio(model) if w is None else model, vae, clips, autocast, steps=args.steps, asg=w or 0., cfg=0., seed=args.seed), [])[0]
            for row, w in tqdm(rows, desc="scoring", disable=None, leave=False)}


def score_towers(ckpt, rows, args):
    """The same of two towers, rows (name, w): the sounds they make for true videos, or from the captions alone."""
    device, autocast, _ = pick_device(args.device)
    model, vae, audio_vae, ckpt = load_t2av(ckpt, args.vae, args.audio_vae, device)
    clips = held_out_clips(args, ckpt["size"])
    truth, scores = np.stack([c["video"] for c in clips]), {}
    z = None if model.cfg.blind else torch.cat([encode_video(vae, v, device) for v in truth])
    for row, w in tqdm(rows, desc="scoring", disable=None, leave=False):
        waves = generate_audio_video(model, vae, audio_vae, [c["caption"] for c in clips], truth.shape[1], ckpt["size"], autocast, z_v=z, cfg=w, steps=args.steps)[1]
        scores[row] = score_both(truth, waves, clips, vae)
    return scores


def score_harmony(ckpt, rows, args):
    """The same of Harmony's, rows (name, (s_v, s_a)): pairs made from captions and first pictures, and either stream made for the other."""
    device, autocast, _ = pick_device(args.device)
    model, vae, audio_vae, ckpt = load_t2av(ckpt, args.vae, args.audio_vae, device)
    clips, scores, shift = held_out_clips(args, ckpt["size"]), {}, ckpt["guidance"]["shift"]
    truth, captions, said, scenes = np.stack([c["video"] for c in clips]), [c["caption"] for c in clips], [c["speech"] for c in clips], {}
    z_v = torch.cat([encode_video(vae, v, device) for v in truth])
    z_a = torch.cat([encode_sound(audio_vae, c["audio"], device) for c in clips])
    for row, (s_v, s_a) in tqdm(rows, desc="scoring", disable=None, leave=False):
        make = lambda **given: generate_audio_video(model, vae, audio_vae, captions, truth.shape[1], ckpt["size"], autocast, steps=args.steps, speech=said, shift=shift, sync_video=s_v, sync_audio=s_a, **given)
        pair = score_both(*make(pictures=truth[:, 0]), clips, vae, False, scenes)
        driven = score_toybox(make(pictures=truth[:, 0], z_a=z_a)[0], clips)[0]
        heard = event_scores([c["events"] for c in clips], [onsets_in_sound(w) for w in make(z_v=z_v)[1]])
        scores[row] = dict(pair, a2v_f1_50=driven["f1_50"], v2a_f1_50=heard["f1_50"])
    return scores


# ------------------------------------------------------------------------------------------------ recordings, folders, files

def clear_onsets(wave):
    """Where a listener would tap: librosa's onsets of at least 0.3 of the strongest one. (samples,) at 16 kHz -> seconds."""
    import librosa
    strength = librosa.onset.onset_strength(y=wave, sr=RATE, hop_length=RATE // 100)
    found = librosa.onset.onset_detect(onset_envelope=strength, sr=RATE, hop_length=RATE // 100)
    return found[strength[found] >= .3 * strength.max()] / 100


def evaluate_recording(args):
    """Toybox pictures and a real sound: do things move at its onsets, and later when the sound is 0.3 s later?"""
    device, autocast, words = pick_device(args.device)
    model, vae, ckpt = load_a2v(args.ckpt, args.vae, device)
    wave, delay = read_audio(args.audio), .3
    frames, heard, each = max(2, round(len(wave) / RATE * FPS)), clear_onsets(wave), max(1, args.clips // len(KINDS))
    print(f"{words}\n{args.audio}: {len(wave) / RATE:.2f} s, clear onsets at {' '.join(f'{t:.2f}' for t in heard) or 'no time'}; {each} pictures of every kind, "
          f"w_a = {ckpt['guidance']['asg']:g}, {args.steps} steps")
    print(f"{'':10s}{'onsets':>8s}{'with an event within 100 ms':>30s}{'events per video':>18s}{f'moved by {delay} s with the sound':>30s}")
    result = {}
    for kind in KINDS:
        read = []
        for shift in (0., delay):
            sound = np.pad(wave, (round(shift * RATE), 0))[:len(wave)]
            clips = [toybox_clip(HELD_OUT + 10 ** 4 * args.seed + 500 + i, ckpt["size"], kind=kind) for i in range(each)]
            clips = [dict(c, audio=sound, caption="", video=np.broadcast_to(c["video"][0], (frames, *c["video"].shape[1:]))) for c in clips]
            videos = generate(model, vae, clips, autocast, seed=args.seed, steps=args.steps, asg=ckpt["guidance"]["asg"])
            read.append([detect_clip_events(v, c)[0] for v, c in zip(videos, clips)])
        possible = heard[(heard >= TIMING[kind][0]) & (heard < frames / FPS - .1)]                    # nothing falls in 0.1 s
        met = [np.abs(events[:, None] - possible[None]).min(0, initial=9.) <= .1 for events in read[0] if len(possible)]
        kept = [before[before + delay < frames / FPS - .1] + delay for before in read[0]]             # what should be seen later
        followed = [match_events(before, after, 1 / FPS)[0] for before, after in zip(kept, read[1])]
        result[kind] = dict(onsets=len(possible), met=float(np.mean(met)) if met else None, events=float(np.mean([len(e) for e in read[0]])),
                            followed=sum(followed) / sum(map(len, kept)) if sum(map(len, kept)) else None)
        show = lambda x: "-" if x is None else f"{x:.2f}"
        print(f"{kind:10s}{len(possible):8d}{show(result[kind]['met']):>30s}{result[kind]['events']:18.1f}{show(result[kind]['followed']):>30s}", flush=True)
    print(json.dumps(result))


def score_pairs(args):
    """Two folders of sound files with the same names: true sounds, and sounds that any program made from the videos."""
    folders = [Path(f) for f in args.pairs]
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"--pairs {folder}: no such folder; give two folders of sound files with the same names")
    files = [{p.stem: p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")} for folder in folders]
    names = [n for n in files[0] if n in files[1]]
    if not names:
        raise BadInput(f"--pairs {folders[0]} {folders[1]}: no file name occurs in both (the suffix may differ); there are {len(files[0])} and {len(files[1])} files")
    heard = [[t[t >= args.trim_start] for t in (onsets(read_audio(f[n]), RATE) for f in files)] for n in tqdm(names, disable=None, leave=False)]
    chance = [(a, heard[(i + 1) % len(heard)][1]) for i, (a, _) in enumerate(heard)]              # everybody's sound against his neighbour's
    result = {}
    print(f"{len(names)} pairs ({sum(len(set(f) - set(names)) for f in files)} files without a partner), tolerance {1000 * args.tolerance:g} ms; "
          f"mean and its 95 % interval, literal union and merged union")
    for row, pairs in (("cyclesync", heard), ("shuffled", chance)):
        scores = np.array([cyclesync(a, b, args.tolerance) for a, b in pairs])
        result[row] = {union: dict(zip(("mean", "low", "high"), bootstrap_ratio(scores[:, i])), undefined=int(np.isnan(scores[:, i]).sum()))
                       for i, union in enumerate(("set", "merged"))}
        show = lambda r: f"{r['mean']:.4f} [{r['low']:.4f}, {r['high']:.4f}]"
        print(f"{row:12s}{show(result[row]['set']):>28s}{show(result[row]['merged']):>28s}   {result[row]['set']['undefined']} pairs without any onset left out")
    print(json.dumps(to_json(result)))


def score_clip(args):
    """One video with its own sound: where it sounds, how much later it moves, AV-Align."""
    frames, wave = read_clip(args.clip, 256, 256)
    if len(frames) < FPS // 2:
        raise BadInput(f"{args.clip}: {len(frames) / FPS:.2f} s long; at least 0.5 s are needed")
    heard, (late, sure) = onsets(wave, RATE), lag(frames, FPS, wave, RATE)
    print(f"{args.clip}: {len(frames) / FPS:.2f} s, sound begins at {' '.join(f'{t:.2f}' for t in heard) or 'no time'}")
    print(f"motion is {1000 * late:+.0f} ms after the sound, confidence {sure:.1f}" + (" (too little to mean anything)" if not sure > 3 else ""))
    result = dict(onsets=heard.tolist(), lag_s=late, confidence=sure, av_align=None)
    try:
        curve = flow_curve(frames)
        result["av_align"] = av_align(heard, flow_peaks(curve, FPS), FPS)
        print(f"AV-Align {result['av_align']:.3f} (at {FPS} fps and 256 px: it depends on both), older rule {av_align(heard, flow_peaks(curve, FPS, 0.), FPS, once=False):.3f}")
    except BadInput as why:
        print(why)
    print(json.dumps(to_json(result)))


def arguments():
    p = Parser(__doc__)
    p.add_argument("clip", nargs="?", help="score this one video with its own sound")
    p.add_argument("--pairs", nargs=2, metavar=("REF", "HAT"), help="CycleSync of two folders of sounds: true ones, and ones made from the videos")
    p.add_argument("--shift-study", action="store_true", help="what every metric says of true clips whose sound is up to 0.5 s late (Syncphony figure 7)")
    p.add_argument("--resolution", type=data.picture_size, help="--shift-study, and two towers: side of the pictures in pixels, or height x width (64; what they were trained for)")
    p.add_argument("--ablate", choices=tuple(RUNS), help="train and score the rows of the paper's ablation tables: an hour or two on 2 cores, harmony's a day")
    p.add_argument("--init", metavar="FILE", help="--ablate harmony: towers to start from, of train.py --task joint --stage timbre; without it they are trained first")
    p.add_argument("--quick", action="store_true", help="--ablate: one seed, short trainings; a first impression in 20 minutes, of harmony in an hour")
    p.add_argument("--v2a-ckpt", metavar="FILE", help="CycleSync: make the sounds by this checkpoint of train.py --task t2av or joint, in place of the oracle")
    p.add_argument("--v2a-cmd", help="CycleSync: a program that makes a sound for a video, with {video} and {wav} in it")
    p.add_argument("--v2a-seconds", type=number(low=0), default=0., help="CycleSync: the least length of a video that this program takes")
    for what, file in (("fvd", "i3d_torchscript.pt"), ("fid", "inception-2015-12-05.pt"), ("fad", "a VGGish over waveforms")):
        p.add_argument(f"--{what}", metavar="FILE", help=f"also print {what.upper()}, with features by this TorchScript file ({file})")
    p.add_argument("--tolerance", type=number(low=0), default=.05, help="CycleSync: how far apart two onsets may be, seconds")
    p.add_argument("--trim-start", type=number(low=0), default=0., help="CycleSync: leave out onsets before so many seconds")
    p.add_argument("--ckpt", default=str(A2V_FILE), help="a checkpoint of train.py --task a2v, t2av or joint")
    p.add_argument("--vae", default=str(VAE_FILE), help="the VAE it was trained with")
    p.add_argument("--audio-vae", help="the audio VAE that a checkpoint of task t2av or joint was trained with, if it is not the one in weights/")
    p.add_argument("--pretrained", help="of a checkpoint on Pyramid Flow: that folder")
    p.add_argument("--hubert", help="of such a checkpoint: its HuBERT, a folder or a name on the hub")
    p.add_argument("--data", default="toybox", help=f"on which data: toybox, {', '.join(data.DATASETS)}, or a folder of clips")
    p.add_argument("--data-root", default="data", help="where datasets and caches lie")
    p.add_argument("--clips", type=number(int, 2, 10000), default=96, help="held-out clips (with --audio: pictures, a sixth of them of every kind)")
    p.add_argument("--audio", help="a recording to move toybox pictures by, in place of the toybox's own sounds")
    p.add_argument("--steps", type=number(int, 1, 1000), default=30, help="Euler steps per latent")
    p.add_argument("--seed", type=number(int, 0), default=0, help="chooses the held-out clips and the noise")
    p.add_argument("--out", default="out/cyclesync", help="folder for tables of every clip, pictures and ablation runs")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    return p


def main():
    args = arguments().parse_args()
    if not (args.clip or args.pairs or args.audio or args.shift_study or args.ablate) and data.task_of(args.ckpt) in ("t2av", "joint"):
        return evaluate_towers(args)
    (score_clip if args.clip else score_pairs if args.pairs else evaluate_recording if args.audio else shift_study if args.shift_study
     else ablate if args.ablate else evaluate)(args)


if __name__ == "__main__":
    run_cli(main)
