"""Metrics and tables: how well the motion in a video agrees in time with its sound.

    video ------> events in the picture --+
    sound ------> onsets in the sound ----+--> one record per clip --> Table: mean, 95 % interval,
    video -> f -> sound -> its onsets ----+                            CSV line per clip, JSON line

**Toybox, exact truth.** All that moves is drawn from one number per frame, so toybox.py reads the
events of any video of that world back, generated ones too (analysis by synthesis, no training).

    F1 at 50 ms   detected and true events are paired one to one, closest first, within 50 ms;
                  precision = paired / detected, recall = paired / true; sums over all clips
    residual      error of the best matching drawing over the variance that the moving part's
                  states span: 0 = a perfect drawing, 1 = as wrong as the average of all states.
                  F1 does not notice a smear at the right place and time, this does. Moving frames
                  only (|state| > 0.15): frames at rest are copies of frame 0 and would flatter
    shuffled      the same videos against ANOTHER clip's events: the chance level, computed
    agreement     SyncFlow and Harmony generate both streams, so no true events exist. The scene is
                  fitted to frame 0 (`fit_scene`), and the events in the picture are compared with
                  the onsets in the sound (`onsets_in_sound`)

**Any video.** CycleSync (Syncphony section 4, eqs. 3, 4): a video-to-audio model f generates a
sound from the silent video. With A the onsets of the real sound and A' those of the generated one,

    score = (#{a in A near some a' in A'} + #{a' in A' near some a in A}) / (2 |A u A'|)

No public code exists. Where the paper contradicts itself or is silent, this file decides:

    tolerance  5 ms in appendix C.1, 0.05 s in C.2.1. Used: 50 ms. An analysis frame is 23 ms, and
               the detector does not agree with itself to 5 ms (one recording at two sample rates:
               0-7 % of the onsets agree within 5 ms, 97-100 % within 50 ms)
    union      not defined. `set` counts equal times once, the literal reading: identical lists
               score 1, lists one analysis frame apart 0.5. `merged` counts a matched pair once: 1
               for both. The paper's values (22 of 100 for real clips) fit `set`; `merged` can be
               interpreted. Both are printed
    detector   librosa's at 22 050 Hz whatever the file's rate: at 16 kHz it reports every hit twice
    silence    one side without an onset: 0. Both sides: undefined, the clip is left out, counted
    +-         not said of what. Brackets are 95 % intervals over clips (bootstrap)

A score means something only beside the ground truth's and that of shuffled sounds, with the SAME f.
In the toybox f is an `oracle`; elsewhere a program (`--v2a-cmd`) or a checkpoint (`--v2a-ckpt`).
AV-Align (TempoTokens, as of February 2025) matches peaks of optical flow with onsets; it depends on
resolution and frame rate, and needs `pip install opencv-python-headless`.
`lag` is a cross-correlation. Frechet distances compare clouds of features, of this repository's
VAEs or of the networks of FVD, FID and FAD.

    python cyclesync.py --ckpt weights/a2v-toybox.pt --clips 96    # Syncphony's table
    python cyclesync.py --ckpt weights/t2av-toybox.pt              # SyncFlow's and Harmony's
    python cyclesync.py --shift-study            # true clips, their sound up to 0.5 s late
    python cyclesync.py --ablate syncphony       # trains and scores the rows of the paper's tables
    python cyclesync.py --skip-blocks --audio x.wav --image f.png  # videos without one block each
    python cyclesync.py clip.mp4                 # any video: onsets, lag, AV-Align
    python cyclesync.py --pairs true/ remade/    # CycleSync of sounds that any program generated

B clips, F frames, H W pixels, C channels, L h w latents, S audio steps, n m events. Video uint8
(F, H, W, 3), waveforms float32 (samples,), times in seconds.
"""
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
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import (BadInput, Parser, film_strip, frames_to_tensor, number, read_audio, replacing,
                  tensor_to_frames)
from sample import (A2V_FILE, ROOT, encode_sound, encode_video, external_encoders,
                    generate_audio_video, generate_video, load, pick_device,
                    video_to_audio)
from toybox import (
    FPS, FRAMES, HELD_OUT, KINDS, RATE, RISEN, STATES, UNREADABLE, detect_clip_events,
    detect_events, draw_scene, fit_scene, synthesise, toybox_clip, track_states)

TORCHSCRIPT = ("fvd", "fid", "fad")      # distances by networks that the user provides
NAN = float("nan")


# ---------------------------------------------------------------------- records and tables
# A record is a dict about one clip. A figure in it is a number, averaged over clips, or a pair
# (numerator, denominator), whose sums are divided: a clip with six events counts six times.
# Other values (names, times) are for the CSV.

def resample_clips(figures, rounds=1000):
    """Figures of B clips -> (1 + rounds,): their mean or ratio, then that of B clips drawn anew."""
    # A number is a pair with the denominator 1. Clips without a value (nan) are left out.
    pairs = [f if isinstance(f, tuple) else (f, 1.) for f in figures]
    pairs = np.array(pairs, float).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs[:, 0])]
    # Bootstrap: as many clips, drawn with replacement, always the same draws.
    drawn = np.random.default_rng(0).integers(max(1, len(pairs)), size=(rounds, len(pairs)))
    over, under = np.concatenate([pairs.sum(0)[None], pairs[drawn].sum(1)]).T
    return np.divide(over, under, out=np.full(1 + rounds, NAN), where=under > 0)


def bootstrap_ratio(figures, minus=None):
    """Figures of clips -> their mean or ratio of sums, and its 95 % interval over clips: value,
    low, high. minus: figures of the same clips in another row, for the difference of the two."""
    ratios = resample_clips(figures)
    if minus is not None:
        # Intervals of two rows may overlap although every clip gains: which clips were drawn moves
        # both rows alike. The same draws cancel in the difference.
        ratios = ratios - resample_clips(minus)
    if math.isnan(ratios[0]):
        return NAN, NAN, NAN
    return float(ratios[0]), *np.nanquantile(ratios[1:], (.025, .975)).tolist()


def summarise(records):
    """Records -> every figure over the clips that have it, its bounds in `interval`, `clips`."""
    summary, interval = {}, {}
    for key in dict.fromkeys(chain.from_iterable(records)):
        figures = [r[key] for r in records if isinstance(r.get(key), (int, float, tuple))]
        if figures:
            summary[key], *interval[key] = bootstrap_ratio(figures)
            # Without any event, true or detected, these are 0; all else without a value is nan.
            counts = any(name in key for name in ("precision", "recall", "f1_"))
            if counts and math.isnan(summary[key]):
                summary[key] = 0.
    return summary | dict(interval=interval, clips=len(records))


def to_json(value):
    """Pairs as their ratio, numbers with four digits, nan as null."""
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [to_json(v) for v in value]
    if isinstance(value, tuple):
        value = value[0] / value[1] if value[1] else NAN
    if isinstance(value, float):
        return round(float(value), 4) if math.isfinite(value) else None
    return value


class Table:
    """Rows, printed as they are scored; at the end all records as CSV and all rows as JSON.

    columns: (title, figure, format). Without a format the 95 % interval is printed too."""

    def __init__(self, *columns):
        self.result = {}
        self.records = []
        self.head(*columns)

    def head(self, *columns):
        """Begin a table with other columns below; its rows join the same CSV and JSON."""
        self.columns = columns
        self.widths = [max(len(title) + 2, 9 if form else 20) for title, _, form in columns]
        self.start = time.perf_counter()
        print(" " * 28 + "".join(f"{c[0]:>{w}s}" for c, w in zip(columns, self.widths)))

    def add(self, key, title, records=(), figures=None):
        """Print a row: the summary of its records, and `figures` that no single clip has."""
        row = (summarise(records) if records else {}) | (figures or {})
        self.result[key] = row
        self.records += [dict(row=key) | record for record in records]
        # The time is that since the last row, with the sampling before this call.
        cells = [self.cell(row, name, form) for _, name, form in self.columns]
        seconds = time.perf_counter() - self.start
        self.start += seconds
        cells = "".join(f"{cell:>{width}s}" for cell, width in zip(cells, self.widths))
        print(f"{title:28s}{cells}{seconds:7.0f} s", flush=True)

    def cell(self, row, name, form):
        value = row.get(name, NAN)
        if isinstance(value, str):
            return value
        # A list holds one value per training seed.
        if isinstance(value, list):
            spread = f" ± {np.std(value, ddof=1):.3f}" if len(value) > 1 else ""
            return f"{np.mean(value):.3f}" + spread
        if not math.isfinite(value):
            return ""
        if form:
            return format(value, form)
        return "{:.3f} [{:.2f}, {:.2f}]".format(value, *row["interval"][name])

    def finish(self, path=None):
        """Write the CSV to `path`; print the JSON of all rows as the last line."""
        if path:
            # Columns are all keys of all records; a record has nothing in those of the others.
            with replacing(path) as part, open(part, "w", newline="") as f:
                writer = csv.DictWriter(f, dict.fromkeys(chain.from_iterable(self.records)))
                writer.writeheader()
                writer.writerows(map(to_json, self.records))
            print(f"every clip: {path}")
        print(json.dumps(to_json(self.result)))


# ---------------------------------------------------------------------- events of the toybox

def match_events(a, b, tolerance):
    """Times a (n,) and b (m,), paired one to one within `tolerance` seconds, closest first
    -> how many pairs, their lags b - a."""
    lags = np.asarray(b)[None] - np.asarray(a)[:, None]                      # (n, m)
    # 1e-9: two times that are exactly `tolerance` apart count, whatever their rounding.
    near = np.argwhere(np.abs(lags) <= tolerance + 1e-9).tolist()
    # Greedy: the closest pair first, then the closest of what is left.
    used_a, used_b, paired = set(), set(), []
    for i, j in sorted(near, key=lambda ij: abs(lags[tuple(ij)])):
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            paired.append(lags[i, j])
    return len(paired), paired


def event_record(truth, found):
    """True times (n,), detected times (m,) -> precision, recall, F1 within 50 and 100 ms; mean
    |lag| and lag in ms of what is paired within 100 ms. All are pairs (numerator, denominator)."""
    record = {}
    for ms in (50, 100):
        matched, lags = match_events(truth, found, ms / 1000)
        record[f"precision_{ms}"] = matched, len(found)
        record[f"recall_{ms}"] = matched, len(truth)
        record[f"f1_{ms}"] = 2 * matched, len(truth) + len(found)
    # |lag|: how imprecise the motion is. The lag is far from 0 only if it is always late or early.
    record["timing_ms"] = 1000 * float(np.abs(lags).sum()), matched
    record["lag_ms"] = 1000 * float(np.sum(lags)), matched
    return record


def event_scores(truth, found):
    """Lists of event times per clip, true and detected -> the summary of their records."""
    return summarise([event_record(t, f) for t, f in zip(truth, found)])


def toybox_records(videos, clips):
    """Videos against the clips they were generated for -> records, and chance: the record of the
    same video against the events of the next clip that has any (empty for clips without)."""
    # Chance: clips with events in a ring, each with the events of the next one.
    eventful = [i for i, c in enumerate(clips) if len(c["events"])]
    partner = dict(zip(eventful, eventful[1:] + eventful[:1]))
    records, chance = [], []
    for i, (video, clip) in enumerate(zip(videos, clips)):
        found, residual, readable = detect_clip_events(video, clip)
        record = event_record(clip["events"], found)
        record |= dict(kind=clip["kind"], true_times=clip["events"], detected_times=found,
                       residual=(float(residual.sum()), len(residual)), readable=readable,
                       false_per_quiet_clip=NAN if i in partner else len(found))
        records.append(record)
        chance.append(event_record(clips[partner[i]]["events"], found) if i in partner else {})
    return records, chance


def score_toybox(videos, clips):
    """-> the summary of `toybox_records`, the summary of each kind, that of chance."""
    records, chance = toybox_records(videos, clips)
    kinds = {k: summarise([r for r in records if r["kind"] == k]) for k in KINDS}
    return summarise(records), kinds, summarise([c for c in chance if c])


# ---------------------------------------------------------------------- any video and sound

def at_22050(wave, rate):
    """The rate at which librosa's onset detector was tuned."""
    import librosa
    wave = np.asarray(wave, np.float32)
    return wave if rate == 22050 else librosa.resample(wave, orig_sr=rate, target_sr=22050)


def onsets(wave, rate):
    """librosa's onsets of a waveform (samples,) -> times (n,), multiples of 512 / 22 050 s = 23 ms.
    """
    import librosa
    # At 16 kHz the detector's local-maximum test spans no frame, and it reports every hit twice.
    wave = at_22050(wave, rate)
    # A sound shorter than one analysis window has no spectrum.
    if len(wave) < 2048:
        return np.zeros(0)
    return librosa.onset.onset_detect(y=wave, sr=22050, hop_length=512, units="time")


def onsets_in_sound(wave):
    """When something begins to sound in the toybox (16 kHz) -> seconds (n,). On 400 true sounds F1
    at 50 ms is .99; librosa's onsets have .55, most of them noise."""
    energy = 1.6 * data.log_mel(wave)                                    # (100 Hz, bands), log10
    # What is 50 dB below the loudest moment is taken as silence.
    energy = np.maximum(energy, energy.max() - 5)
    # The rise over 30 ms in every band, falls not counted, averaged over the bands: noise and hums
    # do not rise in many bands at once.
    rise = np.pad(np.maximum(energy[3:] - energy[:-3], 0).mean(1), (3, 0))
    # An onset is the maximum within 0.1 s: 5 dB at least, and 0.3 of the clip's steepest rise.
    least = max(.5, .3 * rise.max())
    tops = [i for i in range(3, len(rise))
            if rise[i] >= least and rise[i] == rise[max(0, i - 10):i + 11].max()]
    return (np.array(tops) - 1) / 100


def cyclesync(reference, remade, tolerance=.05):
    """Syncphony eqs. 3, 4: onsets (n,) of the true sound, (m,) of the one generated for the video
    -> the score over the literal union, and over the merged union; nan if neither has an onset."""
    reference = np.asarray(reference, float)
    remade = np.asarray(remade, float)
    total = len(reference) + len(remade)
    if total == 0:
        return NAN, NAN
    # An onset counts if ANY onset of the other side is near: no one-to-one pairing.
    near = np.abs(reference[:, None] - remade[None]) <= tolerance + 1e-9     # (n, m)
    matched = int(near.any(1).sum() + near.any(0).sum())
    # Equal times count once in the literal union, a matched pair once in the merged one.
    union = len(np.unique(np.concatenate([reference, remade]).round(6)))
    return matched / (2 * union), matched / (2 * (total - matched / 2))


def av_align(audio_times, video_times, fps):
    """AV-Align (TempoTokens): matched / union of audio and video peaks, nan without any peak."""
    used = set()
    matched = 0
    for t in audio_times:
        # Each audio peak, in order, takes the first unused video peak less than one frame away.
        near = [j for j, v in enumerate(video_times) if abs(v - t) < 1 / fps]
        free = [j for j in near if j not in used]
        used.update(free[:1])
        matched += len(free[:1])
    # Unlike CycleSync's, this union counts a matched pair once.
    union = len(audio_times) + len(video_times) - matched
    return matched / union if union else NAN


def flow_curve(frames):
    """Mean optical flow (Farneback, pixels) from a frame to the next -> (F,), the first twice."""
    try:
        import cv2
    except ImportError:
        raise BadInput("AV-Align needs OpenCV: pip install opencv-python-headless") from None
    # Parameters of the published code: pyramid .5, 3 levels, window 15, 3 rounds, poly 5, 1.2.
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    means = []
    for a, b in zip(grey, grey[1:]):
        flow = cv2.calcOpticalFlowFarneback(a, b, None, .5, 3, 15, 3, 5, 1.2, 0)     # (H, W, 2)
        means.append(np.hypot(flow[..., 0], flow[..., 1]).mean())
    return np.array(means[:1] + means)


def flow_peaks(curve, fps):
    """Strict local maxima of at least 0.1 pixels (of the published code) -> seconds."""
    middle = curve[1:-1]
    peaks = (middle > curve[:-2]) & (middle > curve[2:]) & (middle >= .1)
    return (np.flatnonzero(peaks) + 1) / fps


def lag(frames, fps, wave, rate, most=.5):
    """How much later the picture moves than the sound, within +-`most` seconds, for any video
    -> lag, confidence. Under about 3 there is no single answer (a steady rhythm has several)."""
    import librosa
    motion = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean((1, 2, 3))      # (F - 1,)
    strength = librosa.onset.onset_strength(y=at_22050(wave, rate), sr=22050, hop_length=220)
    # Both on one grid of 10 ms. The change from frame k to k + 1 is visible when k + 1 is.
    t = np.arange(0, len(frames) / fps, .01)
    m = np.interp(t, (np.arange(len(motion)) + 1) / fps, motion)
    s = np.interp(t, np.arange(len(strength)) * 220 / 22050, strength)
    if m.std() < 1e-6 or s.std() < 1e-6:
        return NAN, 0.
    m = (m - m.mean()) / m.std()
    s = (s - s.mean()) / s.std()
    # The correlation over the overlap, for every shift of the sound against the picture.
    reach = min(round(most / .01), len(t) // 2)
    shifts = np.arange(-reach, reach + 1)
    match = np.array([np.mean(m[max(0, k):len(t) + min(0, k)] * s[max(0, -k):len(t) - max(0, k)])
                      for k in shifts])
    best = int(match.argmax())
    # Confidence: the height of the peak over shifts more than 0.1 s from it, in their deviations.
    rest = match[np.abs(shifts - shifts[best]) > 10]
    return shifts[best] * .01, float((match[best] - rest.mean()) / (rest.std() + 1e-9))


# ---------------------------------------------------------------------- video-to-audio models
# Each is a function f(frames, fps) -> waveform (samples,), rate.

def oracle(clip):
    """The best possible f for videos of a toybox clip's scene."""
    def f_v2a(frames, fps):
        # The events in the picture ...
        lead = clip.get("audio_lead", 0.)
        states, residual = track_states(frames, clip["scene"])               # (F,) each
        events = detect_events(clip["kind"], states, residual < UNREADABLE)
        # ... with their durations (a mouth sounds until it closes, or until the clip ends) ...
        durations = []
        for t in events:
            first = math.ceil(t * fps)
            closed = np.flatnonzero(states[first:] < RISEN)
            end = first + closed[0] - .5 if len(closed) else len(states)
            durations.append(max(.05, end / fps - t - .04))
        # ... are given the sound of this thing in this room: only the timing can differ.
        wave, _ = synthesise(clip["scene"], events + lead, durations, lead + len(frames) / fps,
                             clip["seed"], clip["off_screen"])
        return wave[round(lead * RATE):], RATE
    return f_v2a


def v2a_from_checkpoint(path, args):
    """A checkpoint of train.py --task t2av or joint as f."""
    device, autocast, _ = pick_device(args.device)
    system = load(path, device, args.vae, args.audio_vae, task="t2av or joint")
    model, vae, audio_vae = system.model, system.vae, system.audio_vae
    # Without text there is no text guidance.
    guidance = system.checkpoint["guidance"] | dict(cfg=1.)

    def f_v2a(frames, fps):
        # To the size that the towers were trained for.
        x = torch.tensor(frames).permute(0, 3, 1, 2).float()                 # (F, 3, H, W)
        x = F.interpolate(x, data.sides(system.checkpoint["size"]), mode="bicubic", antialias=True)
        frames = x.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        wave = video_to_audio(model, vae, audio_vae, frames, "", autocast, steps=25, **guidance)
        return wave, audio_vae.cfg.rate
    return f_v2a


def v2a_from_command(command, least=0.):
    """Any program as f. In `command` {video} becomes the path of an mp4 without sound (H.264),
    {wav} the path at which the program has to leave its sound."""
    if "{video}" not in command or "{wav}" not in command:
        raise BadInput(f"--v2a-cmd {command!r}: must contain {{video}} and {{wav}}, where the "
                       "program finds the video and leaves its sound")
    try:
        parts = shlex.split(command)
    except ValueError as error:
        raise BadInput(f"--v2a-cmd {command!r}: is no command line ({error})") from None

    def f_v2a(frames, fps):
        # Models want a certain length (V-AURA 2.56 s): the last frame is held for so long, and the
        # sound is cut to the length of the video.
        held = np.repeat(frames[-1:], max(0, math.ceil(least * fps) - len(frames)), 0)
        with tempfile.TemporaryDirectory() as folder:
            video = f"{folder}/video.mp4"
            wav = f"{folder}/sound.wav"
            data.write_video(video, np.concatenate([frames, held]), None, fps)
            run = [p.replace("{video}", video).replace("{wav}", wav) for p in parts]
            try:
                done = subprocess.run(run, capture_output=True, text=True, errors="replace",
                                      stdin=subprocess.DEVNULL)
            except OSError as error:
                raise BadInput(f"--v2a-cmd: {run[0]} cannot be run ({error.strerror})") from None
            if done.returncode or not os.path.isfile(wav):
                lost = "" if os.path.isfile(wav) else " and left no {wav}"
                last = (done.stderr.strip().splitlines() or ["it printed no reason"])[-1]
                raise BadInput(f"--v2a-cmd: {run[0]} ended with code {done.returncode}{lost} "
                               f"({last})")
            return read_audio(wav, 22050)[:round(len(frames) / fps * 22050)], 22050
    return f_v2a


def v2a_models(args, clips):
    """-> a video-to-audio model per clip (None without any), and its name."""
    if args.v2a_cmd:
        return [v2a_from_command(args.v2a_cmd, args.v2a_seconds)] * len(clips), args.v2a_cmd
    if args.v2a_ckpt:
        return [v2a_from_checkpoint(args.v2a_ckpt, args)] * len(clips), args.v2a_ckpt
    if args.data == "toybox":
        return [oracle(c) for c in clips], "the oracle"
    return [None] * len(clips), "no model: give one by --v2a-ckpt or --v2a-cmd"


# ---------------------------------------------------------------------- Frechet distances

def frechet(a, b):
    """Distance of two clouds of features (n, d), (m, d), taken as Gaussians with covariances A, B:
    |mean - mean|^2 + tr(A + B - 2 (A B)^1/2)."""
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    A = np.cov(a.T)
    B = np.cov(b.T)
    # A B has the eigenvalues of the symmetric matrix A^1/2 B A^1/2.
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
    return max(0., float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * cross))


def encode_clip(vae, video):
    """uint8 (F, H, W, 3) -> pixels (1, 3, F, H, W), latents (1, C, L, h, w), not normalised."""
    x = frames_to_tensor(video, next(vae.parameters()).device)[None]
    return x, vae.encode_chunks(x)[0]


@torch.no_grad()
def latent_features(vae, videos):
    """Normalised latents averaged to 2x2 -> (videos x latents, 4C), within one VAE comparable."""
    rows = []
    # Latent 0 codes the given first frame alone.
    for video in videos:
        z = vae.normalise(encode_clip(vae, video)[1])[0, :, 1:].transpose(0, 1)  # (L - 1, C, h, w)
        rows.append(F.adaptive_avg_pool2d(z, 2).flatten(1).cpu().numpy())
    return np.concatenate(rows)


def mel_features(waves):
    """Log-mels averaged over a quarter of a second -> (waves x quarters, bands)."""
    mels = [data.log_mel(w) for w in waves]                                  # (100 Hz, bands) each
    quarters = [m[:len(m) // 25 * 25].reshape(-1, 25, data.MELS) for m in mels]
    return np.concatenate([q.mean(1) for q in quarters])


def torchscript_features(what, path, videos, sounds):
    """Features by the TorchScript files in common use -> (n, d). sounds: (waveform, rate) each.
    'fvd': i3d_torchscript.pt (StyleGAN-V's), a row per clip; 'fid': inception-2015-12-05.pt
    (StyleGAN's), a row per frame; 'fad': a VGGish, waveform (samples,) at 16 kHz -> (n, 128)."""
    def features(net, x):
        if what == "fad":
            import librosa
            wave = librosa.resample(x[0], orig_sr=x[1], target_sr=RATE)
            return net(torch.from_numpy(wave))
        x = torch.from_numpy(x).permute(0, 3, 1, 2)                          # (F, 3, H, W) uint8
        if what == "fid":
            return net(x, return_features=True)
        x = F.interpolate(x.float() / 127.5 - 1, (224, 224), mode="bicubic", antialias=True)
        return net(x.transpose(0, 1)[None], rescale=False, resize=False, return_features=True)

    try:
        net = torch.jit.load(path, map_location="cpu").eval()
        with torch.no_grad():
            rows = [features(net, x) for x in (sounds if what == "fad" else videos)]
    except (RuntimeError, ValueError, OSError) as error:
        last = str(error).strip().splitlines()[-1]
        raise BadInput(f"--{what} {path}: no TorchScript file for these inputs ({last})") from None
    return np.concatenate([y.reshape(-1, y.shape[-1]).float().numpy() for y in rows])


# ---------------------------------------------------------------------- clips and videos

def held_out_clips(args, size, audio_lead=0.):
    """The clips of the protocol: toybox clips that no training draws, or three windows of every
    test clip of a dataset. Each sound begins `audio_lead` seconds before its picture, so that it
    can be delayed without a gap."""
    if args.data == "toybox":
        data.only_square(size)
        clips = [toybox_clip(HELD_OUT + 10 ** 4 * args.seed + i, size) for i in range(args.clips)]
        for c in clips:
            c.update(name=str(c["seed"]), audio_lead=audio_lead)
            # The noise of the room precedes the clip.
            if audio_lead:
                c["audio"], _ = synthesise(c["scene"], c["events"] + audio_lead, c["durations"],
                                           audio_lead + FRAMES / FPS, c["seed"], c["off_screen"])
        return clips

    # Test clips in random order, until their windows are enough.
    found, layout = data.find_clips(args.data, args.data_root)
    tests = [c for c in found if c["split"] == "test"]
    clips, unusable = [], []
    for i in np.random.default_rng(args.seed).permutation(len(tests)):
        if len(clips) >= args.clips:
            break
        try:
            for window in data.clip_windows(tests[i], size, audio_lead=audio_lead):
                name = f"{tests[i]['name']}@{window['start']:.2f}"
                clips.append(dict(window, name=name, kind=tests[i]["kind"]))
        except BadInput as error:
            unusable.append(str(error))
    skipped = f", {len(unusable)} clips cannot be used, such as {unusable[0]}" if unusable else ""
    print(f"{layout}; {len(clips)} windows are scored{skipped}")
    if len(clips) < 2:
        raise BadInput(f"--data {args.data}: {len(clips)} usable windows in its test split; at "
                       "least two are needed")
    return clips[:args.clips]


def generate(model, vae, clips, autocast=nullcontext, seed=0, batch=48, **settings):
    """Videos for the first frame, sound and caption of every clip -> list of uint8 (F, H, W, 3)."""
    videos = []
    for i in range(0, len(clips), batch):
        part = clips[i:i + batch]
        pieces = generate_video(
            model, vae, np.stack([c["video"][0] for c in part]), [c["audio"] for c in part],
            [c["caption"] for c in part], len(part[0]["video"]), autocast,
            seeds=[seed + i + j for j in range(len(part))], **settings)
        videos += list(np.concatenate(list(pieces), 1))
    return videos


@torch.no_grad()
def reconstruct(vae, clips, autocast=nullcontext):
    """The clips through the VAE alone: the ceiling of everything that is generated with it."""
    videos = []
    for clip in clips:
        with autocast():
            x, z = encode_clip(vae, clip["video"])
            cache = {}
            # One latent at a time, as in sampling.
            y = torch.cat([vae.decode(part, x[:, :, :1], cache) for part in z.split(1, 2)], 2)
        videos.append(np.concatenate([clip["video"][:1], tensor_to_frames(y[0].float())[1:]]))
    return videos


def write_strips(path, videos, waves, marks, clips):
    """Up to six clips, one of each kind, as rows of frames over the waveform with `marks` in it."""
    # The first clip of a kind in which something happens; of real clips nothing is known.
    chosen = {}
    for i, clip in enumerate(clips):
        if len(clip.get("events", "any")):
            chosen.setdefault(clip["kind"], i)
    rows = [film_strip(videos[i], waves[i], events=marks[i]) for i in list(chosen.values())[:6]]
    data.write_picture(path, np.concatenate(rows or [videos[0][0]]))


# ---------------------------------------------------------------------- Syncphony's table

# timing: mean |lag| in ms of events paired within 100 ms. false/quiet: events detected in a clip
# that has none.
TOYBOX_COLUMNS = [
    ("F1 50 ms", "f1_50", ""), ("prec.", "precision_50", ".3f"), ("recall", "recall_50", ".3f"),
    ("F1 100", "f1_100", ".3f"), ("timing", "timing_ms", ".0f"), ("lag, ms", "lag_ms", ".0f"),
    ("residual", "residual", ".3f"), ("false/quiet", "false_per_quiet_clip", ".2f")]
UNIONS = [("CycleSync set", "cyclesync_set", ""), ("merged", "cyclesync_merged", "")]
COLUMNS = [*UNIONS, ("AV-Align", "av_align", ""), ("Frechet", "frechet_latent", ".3g")]


def analyse_video(video, f_v2a):
    """What of a silent video is compared with sounds: the sound that f generates for it, the onsets
    of that, the peaks of its optical flow; None where there is no f or no OpenCV."""
    sound = f_v2a(video, FPS) if f_v2a else None
    return dict(sound=sound, onsets=onsets(*sound) if sound else None,
                peaks=flow_peaks(flow_curve(video), FPS) if find_spec("cv2") else None)


def sync_record(audio_onsets, analysis, tolerance=.05):
    """Onsets (n,) of a sound against an `analyse_video` -> CycleSync, both unions, and AV-Align."""
    literal, merged, align = NAN, NAN, NAN
    if analysis["onsets"] is not None:
        literal, merged = cyclesync(audio_onsets, analysis["onsets"], tolerance)
    if analysis["peaks"] is not None:
        align = av_align(audio_onsets, analysis["peaks"], FPS)
    return dict(cyclesync_set=literal, cyclesync_merged=merged, av_align=align)


class AudioToVideo:
    """A checkpoint of Syncphony, its VAE and the held-out clips."""

    def __init__(self, path, args):
        self.device, self.autocast, self.described = pick_device(args.device)
        system = load(path, self.device, args.vae, pretrained=args.pretrained, task="a2v")
        self.model, self.vae, self.ckpt = system.model, system.vae, system.checkpoint
        self.args = args
        self.clips = held_out_clips(args, self.ckpt["size"])
        captions = [c["caption"] for c in self.clips]
        self.encoders = external_encoders(self.model, args, captions, self.device)
        self.v2a, self.v2a_name = v2a_models(args, self.clips)
        self.networks = {what: getattr(args, what) for what in TORCHSCRIPT if getattr(args, what)}
        if args.fad and not self.v2a[0]:
            raise BadInput(f"--fad {args.fad}: measures sounds generated for the videos; give a "
                           "video-to-audio model by --v2a-cmd")
        # What every row is compared with.
        self.sounds = [c["audio"] for c in self.clips]
        self.videos = [c["video"] for c in self.clips]
        self.onsets = [onsets(w, RATE) for w in self.sounds]
        self.truth = self.features(self.videos, [(w, RATE) for w in self.sounds])
        self.chance = []

    def generate(self, asg, cfg=0.):
        """asg, cfg: w_a, w_t of Syncphony eq. 6; asg=None: without the audio layers (off-sync)."""
        return generate(self.model, self.vae, self.clips, self.autocast, self.args.seed,
                        steps=self.args.steps, asg=asg or 0., cfg=cfg, encoders=self.encoders,
                        use_audio=asg is not None)

    def features(self, videos, sounds):
        """-> {distance: features (n, d)}, for the distances between clouds of them."""
        found = dict(frechet_latent=latent_features(self.vae, videos))
        for what, path in self.networks.items():
            found[what] = torchscript_features(what, path, videos, sounds)
        return found

    def score(self, videos):
        """-> records, figures of the row. `self.chance` becomes the records of these videos with
        the sounds and events of other clips."""
        analyses = [analyse_video(v, f) for v, f in zip(videos, self.v2a)]
        # Distances belong to the row, everything else to a clip.
        features = self.features(videos, [a["sound"] for a in analyses])
        figures = {k: frechet(v, self.truth[k]) for k, v in features.items()}
        records = [{} for _ in videos]
        self.chance = [{} for _ in videos]
        if self.args.data == "toybox":
            records, self.chance = toybox_records(videos, self.clips)
            kinds = {k: [r for r in records if r["kind"] == k] for k in KINDS}
            figures["kinds"] = {k: summarise(v) for k, v in kinds.items()}
        for i, (clip, analysis) in enumerate(zip(self.clips, analyses)):
            # Windows of one clip are neighbours, so the other sound is half the list away.
            other = (i + len(videos) // 2) % len(videos)
            for record, j in ((records[i], i), (self.chance[i], other)):
                record |= sync_record(self.onsets[j], analysis, self.args.tolerance)
                record |= dict(clip=clip["name"], kind=clip["kind"])
        return records, figures


def evaluate(args):
    """True, reconstructed and generated videos of held-out clips, without audio, and chance."""
    system = AudioToVideo(args.ckpt, args)
    ckpt, clips = system.ckpt, system.clips
    asg, cfg = (float(ckpt["guidance"][k]) for k in ("asg", "cfg"))
    size = "x".join(map(str, data.sides(ckpt["size"])))
    print(f"{system.described}\n{args.ckpt}: step {ckpt['step']}; {len(clips)} held-out clips of "
          f"{len(clips[0]['video'])} frames at {size} px; {args.steps} steps; w_t = {cfg:g}; "
          f"CycleSync by {system.v2a_name}; in brackets 95 % intervals over clips")
    # The true events are known in the toybox alone.
    columns = TOYBOX_COLUMNS if args.data == "toybox" else []
    extra = [(what.upper(), what, ".4g") for what in system.networks]
    table = Table(*columns, *COLUMNS, *extra)

    # Bounds: the data, the VAE, and the model that ignores the sound.
    table.add("ground_truth", "ground truth", *system.score(system.videos))
    reconstructed = reconstruct(system.vae, clips, system.autocast)
    table.add("vae", "VAE reconstruction", *system.score(reconstructed))
    table.add("off_sync", "off-sync", *system.score(system.generate(None, cfg)))
    # Audio Sync Guidance of several strengths; the checkpoint's is shown, and used for chance.
    for w in sorted({0., 1., 2., 4., asg}):
        videos = system.generate(w, cfg)
        records, figures = system.score(videos)
        star = "*" if w == asg else ""
        table.add(f"asg_{w:g}", f"generated, w_a = {w:g}{star}", records, figures)
        if w == asg:
            table.result["generated"] = table.result[f"asg_{w:g}"]
            shuffled = system.chance
            marks = [r.get("detected_times", ()) for r in records]
            write_strips(Path(args.out, "strips.png"), videos, system.sounds, marks, clips)
    table.add("shuffled", "shuffled sounds (chance)", shuffled)
    print(f"* the checkpoint's guidance, shown in {args.out}/strips.png")
    table.finish(Path(args.out, "clips.csv"))


# ---------------------------------------------------------------------- the table of two towers

# onset F1: the sound against the true events, video F1: the picture against them, agreement F1: the
# two against each other. false: events detected in clips that have none, in the picture of a silent
# scene or beside a sound from off-screen, and in the sound of a silent scene.
PAIR_COLUMNS = [
    ("onset F1", "onsets_f1_50", ""), ("shuffled", "onsets_shuffled", ".3f"),
    ("CycleSync merged", "cyclesync_merged", ""), ("video F1", "seen_f1_50", ".3f"),
    ("agreement F1", "agreement_f1_50", ""), ("shuffled", "agreement_shuffled", ".3f"),
    ("residual", "residual", ".3f"), ("Frechet mels", "frechet_mels", ".3g"),
    ("latents", "frechet_latent", ".3g"), ("false: silent", "false_silent", ".2f"),
    ("off-screen", "false_off_screen", ".2f"), ("sounds", "false_heard", ".2f")]
MODES = dict(v2a="sound for video", a2v="video for sound", i2av="both, from picture",
             t2av="both, from text")


class Towers:
    """Two towers (SyncFlow's or Harmony's), their VAEs and the held-out clips of the toybox."""

    def __init__(self, path, args):
        if args.data != "toybox":
            raise BadInput(f"--data {args.data}: two towers are scored by the toybox's truth; "
                           "leave --data out")
        self.device, self.autocast, self.described = pick_device(args.device)
        system = load(path, self.device, args.vae, args.audio_vae, task="t2av or joint")
        self.model, self.vae = system.model, system.vae
        self.audio_vae, self.ckpt = system.audio_vae, system.checkpoint
        self.args = args
        self.harmony = self.model.cfg.system == "harmony"
        self.size = args.resolution or self.ckpt["size"]
        self.clips = held_out_clips(args, self.size)
        self.sounds = [c["audio"] for c in self.clips]
        self.videos = np.stack([c["video"] for c in self.clips])             # (B, F, H, W, 3)
        # What either stream is when it is given: normalised latents (B, C, L, h, w), (B, A, S).
        self.z_v = torch.cat([encode_video(self.vae, v) for v in self.videos])
        self.z_a = torch.cat([encode_sound(self.audio_vae, w, self.device) for w in self.sounds])
        # What rows are compared with.
        self.mels = mel_features(self.sounds)
        self.latents = latent_features(self.vae, self.videos)
        # Scenes fitted to frame 0, by frame 0: a fit takes about a second.
        self.scenes = {}

    def generate(self, mode, **settings):
        """A mode of MODES -> videos (B, F, H, W, 3), waveforms; what is given comes back."""
        given = dict(v2a=dict(z_v=self.z_v), a2v=dict(z_a=self.z_a), i2av={}, t2av={})[mode]
        if mode in ("a2v", "i2av"):
            given["pictures"] = self.videos[:, 0]
        # SyncFlow's ablation without a video tower knows the text alone.
        if self.model.cfg.audio_only:
            given = {}
        if self.harmony:
            given["speech"] = [c["speech"] for c in self.clips]
            given["shift"] = self.ckpt["guidance"]["shift"]
        videos, waves = generate_audio_video(
            self.model, self.vae, self.audio_vae, [c["caption"] for c in self.clips],
            self.videos.shape[1], self.size, self.autocast, steps=self.args.steps,
            seeds=[self.args.seed + i for i in range(len(self.clips))], **given, **settings)
        if videos is None:
            videos = self.videos
        return videos, self.sounds if waves is None else waves

    @torch.no_grad()
    def reconstruct(self):
        """Videos and waveforms through their VAEs."""
        waves = []
        for z, wave in zip(self.audio_vae.denormalise(self.z_a), self.sounds):       # (A, S) each
            decoded = self.audio_vae.decode(z[None], len(wave))[0]
            waves.append(decoded.clamp(-1, 1).cpu().numpy())
        return reconstruct(self.vae, self.clips, self.autocast), waves

    def detect(self, video, clip):
        """-> events by the scene fitted to frame 0 of a video; the residual as a pair."""
        frame = video[0].tobytes()
        if frame not in self.scenes:
            self.scenes[frame] = fit_scene(video[0], clip["kind"])
        # Of the true scene nothing is used but its kind.
        scene = dict(kind=clip["kind"], scene=self.scenes[frame])
        found, residual, _ = detect_clip_events(video, scene)
        return found, (float(residual.sum()), len(residual))

    def score(self, videos, waves, known=True):
        """-> records, figures of the row. known: generated for these clips' events."""
        def f1(a, b):
            return event_record(a, b)["f1_50"]

        found, residuals = zip(*(self.detect(v, c) for v, c in zip(videos, self.clips)))
        records = []
        for i, (clip, wave) in enumerate(zip(self.clips, waves)):
            other = (i + len(videos) // 2) % len(videos)
            truth = clip["events"]
            sounding = onsets_in_sound(wave)
            # The streams against each other, and the sound against another clip's picture.
            record = {"clip": clip["name"], "kind": clip["kind"], "residual": residuals[i],
                      "false_silent": NAN, "false_off_screen": NAN, "false_heard": NAN,
                      "agreement_f1_50": f1(found[i], sounding),
                      "agreement_shuffled": f1(found[other], sounding)}
            # Either stream against the events that it was generated for.
            if known:
                scores = cyclesync(onsets(clip["audio"], RATE), onsets(wave, RATE))
                record |= {f"onsets_{k}": v for k, v in event_record(truth, sounding).items()}
                record |= {"onsets_shuffled": f1(self.clips[other]["events"], sounding),
                           "seen_f1_50": f1(truth, found[i]), "cyclesync_merged": scores[1]}
            # False events where nothing happens: a scene without sound, or a sound from off-screen.
            if len(truth) == 0 and clip["off_screen"]:
                record["false_off_screen"] = len(found[i])
            elif len(truth) == 0:
                record |= {"false_silent": len(found[i]), "false_heard": len(sounding)}
            records.append(record)
        features = latent_features(self.vae, videos)
        return records, dict(frechet_mels=frechet(mel_features(waves), self.mels),
                             frechet_latent=frechet(features, self.latents))


def evaluate_towers(args):
    """True clips, both VAEs, and every task of two towers, each with and without its guidance."""
    towers = Towers(args.ckpt, args)
    ckpt, clips = towers.ckpt, towers.clips
    print(f"{towers.described}\n{args.ckpt}: step {ckpt['step']} of stage {ckpt['stage']}; "
          f"{len(clips)} held-out clips, {sum(len(c['events']) for c in clips)} events; "
          f"{args.steps} steps; in brackets 95 % intervals over clips")
    table = Table(*PAIR_COLUMNS)
    coded = towers.reconstruct()
    table.add("ground_truth", "ground truth", *towers.score(towers.videos, towers.sounds))
    table.add("vae", "both VAEs", *towers.score(*coded))

    # Variants (suffix of the key, of the title, guidance): the checkpoint's guidance, then none.
    if towers.harmony:
        guided = {k: ckpt["guidance"][k] for k in ("cfg", "sync_video", "sync_audio")}
        plain = guided | dict(sync_video=1., sync_audio=1.)
        rows = product([("", "", guided), ("_plain", ", no SyncCFG", plain)], MODES)
    else:
        w = ckpt["guidance"]["cfg"]
        variants = [("", f", w = {w:g}", dict(cfg=w)), ("_plain", ", w = 1", dict(cfg=1.))]
        # From text alone guidance matters most (SyncFlow figure 5): more values of w.
        sweep = [("" if v == w else f"_{v:g}", f", w = {v:g}", dict(cfg=v))
                 for v in sorted({1., 2., 4., 6., w})]
        rows = chain(product(variants, ("v2a", "i2av")), product(sweep, ("t2av",)))
    for (suffix, text, guidance), mode in rows:
        videos, waves = towers.generate(mode, **guidance)
        scores = towers.score(videos, waves, known=mode in ("v2a", "a2v"))
        table.add(mode + suffix, MODES[mode] + text, *scores)
        if not suffix:
            marks = [onsets_in_sound(wave) for wave in waves]
            write_strips(Path(args.out, f"{mode}.png"), videos, waves, marks, clips)
    print(f"strips, onsets marked: {args.out}/v2a.png and so on")

    # What guidance adds to the agreement of the same clips, with a paired interval.
    for mode in [m for m in MODES if f"{m}_plain" in table.result]:
        first, second = ([r["agreement_f1_50"] for r in table.records if r["row"] == key]
                         for key in (mode, f"{mode}_plain"))
        gain = bootstrap_ratio(first, minus=second)
        table.result[f"{mode}_gain"] = list(gain)
        value, low, high = gain
        print(f"{MODES[mode]}: guidance adds {value:+.3f} [{low:+.2f}, {high:+.2f}] to the "
              "agreement")
    if towers.harmony:
        add_timbre(table, towers, coded[1], guided)
        add_maps(table, towers, guided)
    table.finish(Path(args.out, "clips.csv"))


# ---------------------------------------------------------------------- Harmony: timbre, maps

def timbre(wave):
    """What a sound is like, whenever it sounds -> (64,)"""
    # The maximum of every mel band, less level and tilt, which are the room's.
    most = data.log_mel(wave).max(0)
    band = np.linspace(-1, 1, data.MELS)
    return most - np.polyval(np.polyfit(band, most, 1), band)


def other_variations(clips, n=9):
    """For every toybox clip the sounds of n other takes of its thing in which something happens.
    The picture does not show the material: only a reference can."""
    found = []
    for clip in clips:
        takes = (toybox_clip(clip["seed"], video=False, variation=k) for k in range(1, 100))
        found.append(list(islice((t["audio"] for t in takes if len(t["events"])), n)))
    return found


def timbre_records(waves, takes, clips):
    """-> records of `closer`: the share of the other clips of its kind whose material (the mean of
    that clip's `takes`) is less close in timbre to a sound than its own clip's material is. Chance
    is 0.5; true sounds have 0.95, since some materials of a kind are alike."""
    # One timbre per material.
    voices = [np.mean([timbre(t) for t in some], 0) for some in takes]   # (64,) each
    eventful = [i for i, c in enumerate(clips) if len(c["events"])]
    records = []
    for i, (clip, wave) in enumerate(zip(clips, waves)):
        scores = event_record(clip["events"], onsets_in_sound(wave))
        record = dict(clip=clip["name"], onsets_f1_50=scores["f1_50"])
        others = [j for j in eventful if j != i and clips[j]["kind"] == clip["kind"]]
        if i in eventful and others:
            sound = timbre(wave)
            distance = [np.abs(sound - voice).mean() for voice in voices]
            record["closer"] = float(np.mean([distance[i] < distance[j] for j in others]))
        records.append(record)
    return records


def add_timbre(table, towers, coded, guidance):
    """Voice clone: do sounds generated with a reference have the timbre of its material?"""
    variations = other_variations(towers.clips)
    takes = [v[1:] for v in variations]
    # The first take is the reference, the others say what its material sounds like.
    refs = torch.cat([encode_sound(towers.audio_vae, v[0], towers.device) for v in variations])
    rows = dict(true=towers.sounds, vae=coded, no_reference=towers.generate("v2a", **guidance)[1],
                reference=towers.generate("v2a", refs=refs, **guidance)[1])
    table.head(("closer in timbre", "closer", ""), ("onset F1", "onsets_f1_50", ""))
    for name, waves in rows.items():
        records = timbre_records(waves, takes, towers.clips)
        table.add(f"timbre_{name}", f"timbre, {name.replace('_', ' ')}", records)


def map_records(maps, clips):
    """Harmony's figures 3 and 5 in numbers: how much more than elsewhere (1) the audio attends,
    while something sounds, to the places where the thing can move, and SyncCFG pulls there."""
    attention = torch.cat([m["attention"] for m in maps]).sum(2)             # (B, S, h, w)
    cells = dict(attention=attention)
    if "sync_pull" in maps[0]:
        cells["SyncCFG"] = torch.cat([m["sync_pull"] for m in maps]).mean(1, keepdim=True)
    found = {name: [] for name in cells}
    for name, i in product(cells, range(len(clips))):
        clip, cell = clips[i], cells[name][i]                                # cell (S or 1, h, w)
        events = clip["events"]
        if len(events) == 0 and not clip["off_screen"]:
            continue
        # Where the thing can move: pixels that differ between its states.
        states = np.linspace(*STATES[clip["kind"]], 9)
        drawn = draw_scene(clip["scene"], states, clip["video"].shape[1]).astype(int)
        moves = torch.from_numpy(drawn.max(0) - drawn.min(0)).amax(-1).gt(24).float()[None]
        # When something sounds: 0.1 s from every event on; always if it is off-screen.
        steps = np.arange(attention.shape[1])
        if len(events):
            first = (events * len(steps) / (len(clip["video"]) / FPS)).astype(int)
            steps = (first[:, None] + np.arange(5)).ravel()
        cell = cell[steps.clip(max=len(cell) - 1)].mean(0)                   # (h, w)
        # The share of the map on these places, over the share of the picture that they are.
        inside = (cell / cell.sum() * F.adaptive_avg_pool2d(moves, cell.shape)[0]).sum()
        group = "things that sound" if len(events) else "off-screen sounds"
        found[name].append({group: (inside / moves.mean()).item()})
    return found


def add_maps(table, towers, guidance):
    """Rows of `map_records`, of the videos that are generated for the true sounds."""
    maps = []
    towers.generate("a2v", attention_maps=maps, **guidance)
    found = map_records(maps, towers.clips)
    table.head(*[(group, group, "") for group in ("things that sound", "off-screen sounds")])
    for name, records in found.items():
        table.add(name, f"map of {name}", records)
    table.result["maps"] = {name: table.result.pop(name) for name in found}


# ---------------------------------------------------------------------- the shift study

def draw_curves(path, x, curves, xlabel, ylabel):
    """A line plot where matplotlib is installed. curves: name -> values at x."""
    if not find_spec("matplotlib"):
        print(f"{path} is not drawn: pip install matplotlib")
        return
    from matplotlib.figure import Figure
    axes = Figure(figsize=(7.6, 4.2), layout="constrained").subplots()
    for name, values in curves.items():
        axes.plot(x, values, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.legend()
    with replacing(path) as part:
        axes.figure.savefig(part)


def shift_study(args):
    """Syncphony figure 7, tables 5, 6: what every metric says of true videos whose sound is 0 to
    0.5 s late. The sound is not moved within the clip, which would leave a gap: what precedes the
    clip is known and takes its place."""
    lead, delays = .5, np.arange(6) / 10
    clips = held_out_clips(args, args.resolution or 64, lead)
    models, v2a_name = v2a_models(args, clips)
    n = round(len(clips[0]["video"]) / FPS * RATE)
    # The videos stay as they are, so they are analysed once.
    bar = tqdm(clips, desc="videos", disable=None, leave=False)
    analyses = [analyse_video(c["video"], f) for c, f in zip(bar, models)]
    toybox = args.data == "toybox"
    found = [detect_clip_events(c["video"], c)[0] if toybox else () for c in clips]
    columns = TOYBOX_COLUMNS[:1] * toybox + COLUMNS[:3]
    print(f"{len(clips)} true clips; CycleSync by {v2a_name}; in brackets 95 % intervals")
    table = Table(*columns, ("lag, ms", "lag_ms", ".0f"))
    for delay in [*delays, None]:
        # The last row is chance: every video with the sound of the clip half the list away.
        late, move = (0., len(clips) // 2) if delay is None else (delay, 0)
        key = "shuffled" if delay is None else f"{delay:.1f}"
        records = []
        for i, (clip, analysis) in enumerate(zip(clips, analyses)):
            other = clips[(i + move) % len(clips)]
            wave = other["audio"][round((lead - late) * RATE):][:n]
            record = dict(clip=clip["name"], kind=clip["kind"])
            record |= sync_record(onsets(wave, RATE), analysis, args.tolerance)
            record["lag_s"], record["lag_confidence"] = lag(clip["video"], FPS, wave, RATE)
            # True events are as late as the sound; those after its end do not count.
            if toybox:
                events = other["events"] + late
                record |= event_record(events[events < n / RATE], found[i])
            records.append(record)
        # The median lag of clips with a clear answer.
        lags = [r["lag_s"] for r in records if r["lag_confidence"] > 3]
        table.add(key, "another clip's sound" if move else f"{key} s late", records,
                  dict(lag_ms=1000 * float(np.median(lags)) if lags else NAN))
    # The paper's figure: every metric as a share of its value without delay.
    rows = [table.result[f"{d:.1f}"] for d in delays]
    curves = {title: [r[key] / rows[0][key] for r in rows] for title, key, _ in columns
              if math.isfinite(rows[0][key])}
    path = Path(args.out, "shift.csv")
    draw_curves(path.with_suffix(".png"), delays, curves, "delay of the sound, seconds",
                "score / score at 0")
    table.finish(path)


# ---------------------------------------------------------------------- the ablations

@dataclass
class Row:
    """A row of a paper's ablation table. Rows with the same flags share one training."""
    title: str                   # "": trained for its learning curve, not sampled
    paper: str                   # the figure that the paper reports
    flags: str                   # of train.py; "": the full model
    guidance: dict | None        # of sampling; None: without the audio layers (off-sync)


@dataclass
class Ablation:
    """All rows of a paper and what they have in common."""
    flags: str                   # of train.py, for every training
    towers: tuple                # stages that are trained first, each from the one before
    stage: str                   # of the rows, which start from the last tower
    paper: str                   # what `Row.paper` is
    columns: list                # of the table
    rows: list


# Cross-task synergy off; the audio-driven task alone; SyncCFG off and on.
NO_CTS = "--lambda-v 0 --lambda-a 0"
ALONE = "--lambda-joint 0 --lambda-v 1 --lambda-a 0"
PLAIN = dict(sync_video=1., sync_audio=1.)
SYNCCFG = dict(sync_video=3., sync_audio=2.)
ABLATIONS = dict(
    # CycleSync on AVSync15: tables 3, 4, 11.
    syncphony=Ablation("--task a2v", (), "", "CycleSync", [
        ("F1 at 50 ms", "f1_50", ""), ("F1 at 100 ms", "f1_100", ""), *UNIONS,
        ("residual", "residual", ""), ("Frechet", "frechet_latent", "")], [
            Row("without motion-aware loss", "15.18 ± 1.48", "--lambda-motion 0", dict(asg=0.)),
            Row("without Audio RoPE", "14.41 ± 1.40", "--no-audio-rope", dict(asg=0.)),
            Row("off-sync (audio skipped)", "12.34 ± 1.14", "", None),
            Row("full model", "15.31 ± 1.49", "", dict(asg=0.)),
            Row("with ASG, w_a = 1", "15.94 ± 1.56", "", dict(asg=1.)),
            Row("with ASG, w_a = 2", "16.48 ± 1.28", "", dict(asg=2.)),
            Row("with ASG, w_a = 4", "16.26 ± 1.40", "", dict(asg=4.))]),
    # FAD on Greatest Hits, lower is better: table 4; figure 5 sweeps w.
    syncflow=Ablation("--task t2av", ("video",), "audio", "FAD", [
        ("onset F1 50 ms", "onsets_f1_50", ""), ("100 ms", "onsets_f1_100", ""),
        ("shuffled", "onsets_shuffled", ""), ("CycleSync", "cyclesync_merged", ""),
        ("Frechet mels", "frechet_mels", "")], [
            Row("full, sound for video, w = 1", "0.92", "", dict(cfg=1.)),
            Row("without adaptor", "2.34", "--no-adaptor", dict(cfg=1.)),
            Row("text to sound, no video", "1.01", "--no-video", dict(cfg=1.)),
            Row("with optimal transport", "(its default)", "--ot", dict(cfg=1.)),
            Row("full, w = 2", "", "", dict(cfg=2.)),
            Row("full, w = 4", "", "", dict(cfg=4.)),
            Row("full, w = 6", "(its default)", "", dict(cfg=6.))]),
    # Sync-C on speech: one part after the other (main paper), all but one (supplement, table 4).
    harmony=Ablation("--task joint --batch-size 8", ("video", "audio"), "joint", "Sync-C", [
        ("agreement F1", "agreement_f1_50", ""), ("shuffled", "agreement_shuffled", ""),
        ("audio-driven F1", "a2v_f1_50", ""), ("video-driven F1", "v2a_f1_50", ""),
        ("residual", "residual", "")], [
            Row("none of it", "4.20", f"{NO_CTS} --no-rope-align --no-gldi", PLAIN),
            Row("+ GLDI", "4.29", f"{NO_CTS} --no-rope-align", PLAIN),
            Row("+ RoPE alignment", "4.80", NO_CTS, PLAIN),
            Row("+ CTS", "5.09", "", PLAIN),
            Row("+ SyncCFG: full", "6.51", "", SYNCCFG),
            Row("full but RoPE alignment", "5.60", "--no-rope-align", SYNCCFG),
            Row("full but GLDI", "5.30", "--no-gldi", SYNCCFG),
            Row("full but CTS", "1.13", NO_CTS, SYNCCFG),
            Row("", "", ALONE, PLAIN)]))
# Harmony's figure 3, how soon a training learns which task: its flags, column of its scores.csv.
LEARNING = {
    "audio-driven alone": (ALONE, "audio_driven"), "CTS: audio-driven": ("", "audio_driven"),
    "joint loss: audio-driven": (NO_CTS, "audio_driven"), "CTS: pairs": ("", "pairs"),
    "joint loss: pairs": (NO_CTS, "pairs")}


def folder_name(flags):
    return flags.replace("--", "").replace(" ", "-") or "full"


def ablate(args):
    """Train every variant with every seed, score its rows: mean ± standard deviation over seeds.
    What is done is kept: the same command goes on where it stopped, within a training too."""
    if args.data != "toybox":
        raise BadInput(f"--ablate with --data {args.data}: the ablations are scored by the "
                       "toybox's truth; leave --data out")
    ablation = ABLATIONS[args.ablate]
    seeds, steps, clips = (1, 400, 800) if args.quick else (3, 800, 1500)
    args.clips = 48 if args.quick else args.clips
    root = Path(args.out, f"ablation-{args.ablate}-{steps}")

    # Trainings in order: folder, stage, flags.
    trainings = [(f"{t}-tower", t, "") for t in ablation.towers]
    trainings += [(folder_name(flags), ablation.stage, flags)
                  for flags in dict.fromkeys(row.flags for row in ablation.rows)]
    # A training that has its scores is skipped; one that was stopped goes on from its last.pt.
    scores = {row.title: [] for row in ablation.rows}
    for args.seed in range(seeds):
        init = None
        for name, stage, flags in trainings:
            folder = root / f"{name}-{args.seed}"
            tower = stage in ablation.towers
            scored = folder / f"scores-{args.clips}.json"
            if not scored.is_file():
                # Learning curves need evaluations on the way, four in all.
                curve = args.ablate == "harmony" and any(flags == f for f, _ in LEARNING.values())
                run_training(args, folder, [
                    *ablation.flags.split(), *(["--stage", stage] if stage else []), *flags.split(),
                    *(["--init", init] if init else []), "--steps", steps, "--clips", clips,
                    "--sample-every", steps // 4 if curve and not tower else steps])
                rows = [row for row in ablation.rows if row.flags == flags and row.title]
                result = {} if tower else score_variant(folder / "best.pt", rows, args)
                data.write_text(scored, json.dumps(to_json(result)))
            # The next tower starts from this one, all rows from the last.
            if tower:
                init = folder / "best.pt"
            for title, figures in json.loads(scored.read_text()).items():
                scores[title].append(figures)

    # A list of values, one per seed, is shown as mean ± standard deviation.
    print(f"{steps} steps on {clips} clips, {args.clips} held-out clips, {seeds} training seeds")
    table = Table(*ablation.columns, (f"paper: {ablation.paper}", "paper", "s"))
    for row in ablation.rows:
        if row.title:
            figures = {key: [s[key] for s in scores[row.title]] for _, key, _ in ablation.columns}
            table.add(row.title, row.title, figures=figures | dict(paper=row.paper))
    if args.ablate == "harmony":
        add_learning(table, root, seeds, [steps * k // 4 for k in (1, 2, 3, 4)])
    table.finish()


def run_training(args, folder, flags):
    """Run train.py with these flags, and with those of this command that concern it."""
    print(f"training {folder}", flush=True)
    command = [sys.executable, ROOT / "train.py", "--seed", args.seed, "--eval-clips", 24,
               "--device", args.device, "--data-root", args.data_root, "--out", folder, *flags]
    for flag, path in (("--vae", args.vae), ("--audio-vae", args.audio_vae)):
        command += [flag, path] if path else []
    # 130: Ctrl-C reached the training, which has saved its state.
    code = subprocess.run([str(part) for part in command]).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise BadInput(f"the training above ended with code {code}; the same command tries again")


def score_variant(path, rows, args):
    """Sample and score the rows of one trained model -> title: figures. Every training seed meets
    other held-out clips."""
    def score_a2v(guidance):
        records, figures = system.score(system.generate(**(guidance or dict(asg=None))))
        return summarise(records) | figures

    def score_towers(guidance):
        # SyncFlow: a sound for the true video. Harmony: pairs from the first picture ...
        mode = "i2av" if system.harmony else "v2a"
        pair = system.generate(mode, **guidance)
        records, figures = system.score(*pair, known=not system.harmony)
        figures |= summarise(records)
        if system.harmony:
            # ... and either stream for the other one.
            events = [c["events"] for c in system.clips]
            videos, _ = system.generate("a2v", **guidance)
            _, waves = system.generate("v2a", **guidance)
            onset_scores = event_scores(events, [onsets_in_sound(w) for w in waves])
            figures["a2v_f1_50"] = score_toybox(videos, system.clips)[0]["f1_50"]
            figures["v2a_f1_50"] = onset_scores["f1_50"]
        return figures

    a2v = data.load_checkpoint(path)["task"] == "a2v"
    system = (AudioToVideo if a2v else Towers)(path, args)
    score = score_a2v if a2v else score_towers
    bar = tqdm(rows, desc="scoring", disable=None, leave=False)
    return {row.title: score(row.guidance) for row in bar}


def add_learning(table, root, seeds, quarters):
    """Harmony's figure 3: the scores of the trainings at every quarter, from their scores.csv."""
    table.head(*[(f"step {q}", str(q), ".3f") for q in quarters])
    # Mean over training seeds.
    curves = {}
    for name, (flags, column) in LEARNING.items():
        found = []
        for seed in range(seeds):
            with open(root / f"{folder_name(flags)}-{seed}" / "scores.csv") as f:
                by_step = {int(r["step"]): float(r[column]) for r in csv.DictReader(f)}
            found.append([by_step[q] for q in quarters])
        curves[name] = np.mean(found, 0).tolist()
        table.add(name, name, figures=dict(zip(map(str, quarters), curves[name])))
    draw_curves(root / "learning.png", quarters, curves, "steps", "F1 at 50 ms, without guidance")


# ---------------------------------------------------------------------- files, blocks

def score_pairs(args):
    """Two folders of sound files with the same names: true sounds, and sounds that any program
    generated for the videos."""
    files = []
    for folder in map(Path, args.pairs):
        if not folder.is_dir():
            raise BadInput(f"--pairs {folder}: no such folder; give two folders of sound files "
                           "with the same names")
        files.append({p.stem: p for p in sorted(folder.iterdir())
                      if p.is_file() and not p.name.startswith(".")})
    # The suffix of a file may differ.
    names = [n for n in files[0] if n in files[1]]
    if not names:
        raise BadInput(f"--pairs {' '.join(args.pairs)}: no file name occurs in both (the suffix "
                       f"may differ); they have {len(files[0])} and {len(files[1])} files")
    true, remade = ([onsets(read_audio(side[n]), RATE) for n in names]
                  for side in files)
    print(f"{len(names)} pairs, {len(files[0]) + len(files[1]) - 2 * len(names)} files without a "
          f"partner; tolerance {1000 * args.tolerance:g} ms")
    # Chance is every true sound against its neighbour's remade one.
    table = Table(*UNIONS, ("undefined", "undefined", ".0f"))
    for key, shift in (("cyclesync", 0), ("shuffled", 1)):
        records = []
        for i, name in enumerate(names):
            scores = cyclesync(true[i], remade[(i + shift) % len(names)], args.tolerance)
            records.append(dict(clip=name, cyclesync_set=scores[0], cyclesync_merged=scores[1]))
        undefined = sum(math.isnan(r["cyclesync_set"]) for r in records)
        table.add(key, key, records, dict(undefined=undefined))
    table.finish()


def score_clip(args):
    """One video with its sound: where it sounds, how much later it moves, AV-Align."""
    # Optical flow depends on the size of the picture, so it is always the same.
    frames, wave = data.read_clip(args.clip, 256)
    if len(frames) < FPS // 2:
        raise BadInput(f"{args.clip}: {len(frames) / FPS:.2f} s long; at least 0.5 s are needed")
    found = onsets(wave, RATE)
    late, confidence = lag(frames, FPS, wave, RATE)
    times = " ".join(f"{t:.2f}" for t in found) or "no time"
    note = "" if confidence > 3 else " (under 3: too little to mean anything)"
    print(f"{args.clip}: {len(frames) / FPS:.2f} s, sound begins at {times}")
    print(f"motion is {1000 * late:+.0f} ms after the sound, confidence {confidence:.1f}{note}")
    result = dict(onsets=found, lag_s=late, confidence=confidence, av_align=None)
    # AV-Align needs an extra; the rest of the answer does not.
    try:
        result["av_align"] = av_align(found, flow_peaks(flow_curve(frames), FPS), FPS)
        print(f"AV-Align {result['av_align']:.3f} (at {FPS} fps and 256 px: it depends on both)")
    except BadInput as error:
        print(error)
    print(json.dumps(to_json(result)))


def skip_block_study(args):
    """Syncphony figures 10, 11: videos from the same noise, each without one block of the network.

    In the paper appearance breaks without early blocks and motion changes without late ones, which
    is why the audio layers are in the late ones. Writes one film strip per video, that of the
    complete network first, and prints the mean |difference| from it, of 255."""
    if not (args.audio and args.image):
        raise BadInput("--skip-blocks: give --audio x.wav and --image f.png")
    device, autocast, _ = pick_device(args.device)
    system = load(args.ckpt, device, args.vae, pretrained=args.pretrained, task="a2v")
    model = system.model
    guidance = system.checkpoint["guidance"]
    encoders = external_encoders(model, args, [""], device)
    wave = read_audio(args.audio)
    picture = data.read_image(args.image, system.checkpoint["size"])
    frames = max(2, round(len(wave) / RATE * FPS))
    # Of the video, `generate` uses the first frame and the length.
    clip = dict(video=np.repeat(picture[None], frames, 0), audio=wave, caption="")

    def skip(tokens, *_):
        # Passes its tokens on, and adds no keys and values to the cache.
        empty = tokens.new_zeros(len(tokens), model.cfg.heads, 0, model.cfg.head_dim)
        return tokens, (empty, empty)

    # The complete network first, then one without block 0, without block 1, and so on.
    strips = []
    differences = []
    for i, block in enumerate([None, *model.all_blocks()]):
        if block is not None:
            block.forward = skip
        video = generate(model, system.vae, [clip], autocast, args.seed, steps=args.steps,
                         encoders=encoders, **guidance)[0].astype(float)
        # uint8 again for the picture; the difference needs signed numbers.
        strips.append(film_strip(video.astype(np.uint8), wave))
        if block is None:
            complete = video
            continue
        del block.forward
        differences.append(np.abs(video - complete).mean())
        kind = "double" if i <= model.cfg.n_double else "single"
        print(f"without block {i - 1} ({kind}-stream): {differences[-1]:.2f} of 255", flush=True)
    data.write_picture(Path(args.out) / "skip-blocks.png", np.concatenate(strips))
    print(json.dumps(to_json(dict(skip_blocks=differences))))


def arguments():
    p = Parser(__doc__)
    p.add_argument("clip", nargs="?", help="score this one video with its sound")
    p.add_argument("--pairs", nargs=2, metavar=("TRUE", "REMADE"), help="CycleSync of two folders")
    p.add_argument("--skip-blocks", action="store_true", help="videos without one block of the "
                   "network each (Syncphony figures 10, 11)")
    p.add_argument("--audio", help="--skip-blocks: the sound")
    p.add_argument("--image", help="--skip-blocks: the first frame")
    p.add_argument("--shift-study", action="store_true", help="metrics on sounds that are late")
    p.add_argument("--ablate", choices=tuple(ABLATIONS), help="train and score a paper's ablation "
                   "tables: an hour or two on 2 cores, harmony's a day")
    p.add_argument("--quick", action="store_true", help="--ablate: one seed, short trainings: 20 "
                   "minutes, harmony's an hour")
    p.add_argument("--ckpt", default=str(A2V_FILE), help="of train.py --task a2v, t2av or joint")
    p.add_argument("--vae", help="its VAE, if that is neither in weights/ nor beside it")
    p.add_argument("--audio-vae", help="likewise its audio VAE")
    p.add_argument("--pretrained", help="of a checkpoint on Pyramid Flow: that folder")
    p.add_argument("--hubert", help="of such a checkpoint: its HuBERT, a folder or hub name")
    p.add_argument("--data", default="toybox", help=f"or {', '.join(data.DATASETS)}, or a folder")
    p.add_argument("--data-root", default="data", help="where datasets and caches are")
    p.add_argument("--clips", type=number(int, 2, 10000), default=96, help="held-out clips")
    p.add_argument("--resolution", type=data.picture_size, help="--shift-study, and two towers: "
                   "side in pixels, or height x width (64; what they were trained for)")
    p.add_argument("--steps", type=number(int, 1, 1000), default=30, help="Euler steps per latent")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of held-out clips and noise")
    p.add_argument("--tolerance", type=number(low=0), default=.05, help="CycleSync: how far apart "
                   "two onsets may be, seconds")
    p.add_argument("--v2a-ckpt", metavar="FILE", help="CycleSync: f is this checkpoint of train.py "
                   "--task t2av or joint")
    p.add_argument("--v2a-cmd", help="CycleSync: f is a program, with {video} and {wav} in it")
    p.add_argument("--v2a-seconds", type=number(low=0), default=0., help="its least length")
    for what, file in zip(TORCHSCRIPT, ("i3d_torchscript.pt", "inception-2015-12-05.pt", "VGGish")):
        p.add_argument(f"--{what}", metavar="FILE", help=f"also this distance; TorchScript: {file}")
    p.add_argument("--out", default="out/cyclesync", help="folder for tables, pictures, ablations")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
                   help="where to run")
    return p


def main():
    args = arguments().parse_args()
    # The first flag that is given says what to do; without any, the table of --ckpt.
    commands = dict(clip=score_clip, pairs=score_pairs, skip_blocks=skip_block_study,
                    shift_study=shift_study, ablate=ablate)
    for name, command in commands.items():
        if getattr(args, name):
            return command(args)
    two_towers = data.load_checkpoint(args.ckpt)["task"] in ("t2av", "joint")
    return evaluate_towers(args) if two_towers else evaluate(args)


if __name__ == "__main__":
    data.run_cli(main)
