"""Metrics and tables: how well the motion in a video agrees in time with its sound.

    video ------> events in the picture --+
    sound ------> onsets in the sound ----+--> one record per clip --> Table: mean, 95 % interval,
    video -> f -> sound -> its onsets ----+                            CSV line per clip, JSON line

**Toybox, exact truth.** All that moves is drawn from one number per frame, so toybox.py reads the
events of any video of that world back, generated ones too (analysis by synthesis, no training).

    F1 at 50 ms   detected and true events are paired one to one, closest first, within 50 ms;
                  precision = paired / detected, recall = paired / true; sums over all clips
    residual      error of the closest drawing over the variance that the drawings span, of frames
                  read as moving in the video itself: 0 = perfect. F1 does not notice a smear at the
                  right time, this does; missed events do not count here
    shuffled      the same with ANOTHER clip's events or sound: the chance level
    agreement     where both streams are generated no true events exist: events in the picture, by
                  a scene fitted to frame 0, against onsets in the sound

**Real clips.** No event is known but The Greatest Hits'. A true clip shows when something moves.

    motion agreement  correlation of two curves, the mean change of the picture from frame to frame,
                      of the generated and the true clip. `shuffled`: the same first frame, with
                      another clip's sound; `off_sync`: without. Their differences are paired
    hit agreement     F1 of onsets in the sound and peaks of motion, within 100 ms. A true hit is
                      not always a peak: of true clips about 0.5, with other clips' sounds 0.3
    true hits         the same F1 with The Greatest Hits' noted hits in place of onsets
    flicker           of pixels that never move, against the VAE's reconstruction, of 255

**Any video.** CycleSync (Syncphony section 4, eqs. 3, 4): a video-to-audio model f generates a
sound from the silent video. With A the onsets of the real sound and A' those of the generated one,

    score = (#{a in A near some a' in A'} + #{a' in A' near some a in A}) / (2 |A u A'|)

No public code exists. Where the paper contradicts itself or is silent, this file decides:

    tolerance  5 ms in appendix C.1, 0.05 s in C.2.1. Used: 50 ms. An analysis frame is 23 ms, and
               the detector does not agree with itself to 5 ms (one recording at two sample rates:
               0-7 % of the onsets agree within 5 ms, 97-100 % within 50 ms)
    union      not defined. `set` counts equal times once, the literal reading: identical lists
               score 1, lists one analysis frame apart 0.5. `merged` counts a matched pair once: 1
               for both. The paper's values (22 of 100 for real clips) fit `set`; `merged`, from 0
               to 1, is the Jaccard index where pairs are one to one. Both are printed
    detector   librosa's at 22 050 Hz whatever the file's rate: at 16 kHz it reports every hit twice
    silence    one side without an onset: 0. Both sides: undefined, the clip is left out
    delay      C.2 delays the video relative to its audio; here the sound is late
    AV-Align   at 24 fps alone; the paper's main column is at 6
    +-         not said of what. Brackets are 95 % intervals over clips (bootstrap); windows of one
               clip are drawn together

A score means something only beside the ground truth's and that of shuffled sounds, with the SAME f.
In the toybox f is an `oracle`; elsewhere a program (`--v2a-cmd`) or a checkpoint (`--v2a-ckpt`).
AV-Align (TempoTokens, as of February 2025) matches peaks of optical flow with onsets; it depends on
resolution and frame rate, and needs `pip install opencv-python-headless`. Frechet distances compare
clouds of features, of this repository's VAEs or of the networks of FVD, FID and FAD (files).

Not here, since they are published networks: RelSync, AlignSync, DeSync, IA, IT (Syncphony), KL,
CLAP, IB (SyncFlow), Sync-C, Sync-D, WER (Harmony). In their place: F1, motion and hit agreement for
a video's timing, agreement of both streams for pairs, Frechet distances of mels for sounds.

    python cyclesync.py --ckpt weights/a2v-toybox.pt --clips 96    # Syncphony's table
    python cyclesync.py --ckpt out/a2v-x/best.pt --data x/         # the same of real clips
    python cyclesync.py --ckpt weights/t2av-toybox.pt              # SyncFlow's and Harmony's
    python cyclesync.py --ckpt weights/vae-real.pt --data FOLDER   # how well a VAE codes clips
    python cyclesync.py --ckpt out/a2v/best.pt --steps-study       # how few Euler steps are enough?
    python cyclesync.py --ckpt weights/joint-toybox.pt --guidance-study    # how strong, and when?
    python cyclesync.py --stress                 # two sounds at once, noise, a minute, ...
    python cyclesync.py --negatives              # guidance away from zeros, silence, no caption
    python cyclesync.py --shift-study            # true clips, their sound up to 0.5 s late
    python cyclesync.py --ablate syncphony       # trains and scores the rows of the paper's tables
    python cyclesync.py --skip-blocks --audio x.wav --image f.png  # videos without one block each
    python cyclesync.py clip.mp4                 # any video: hit and sound agreement, lag, AV-Align
    python cyclesync.py --pairs true/ made/      # CycleSync of sounds that any program generated
    python cyclesync.py --pairs-of-videos a/ b/  # videos with sound, of two models: which is better

B clips, F frames, H W pixels, C channels, L h w latents, S audio steps, n m events. Video uint8
(F, H, W, 3), waveforms float32 (samples,), times in seconds.
"""
import csv
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import nullcontext
from functools import cache, cached_property, partial
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
from sample import (
    A2V_FILE, JOINT_FILE, REAL_A2V_FILE, ROOT, T2AV_FILE, autocast_for, encode_sound, encode_video,
    external_encoders, generate_audio_video, generate_video, load, load_vae, pick_autocast,
    pick_device, recommended, sample_autoregressive, video_to_audio)
from towers import part_of
from toybox import (
    FPS, FRAMES, FREE_END, HELD_OUT, KINDS, RATE, RISEN, STATES, TIMING, UNREADABLE,
    detect_clip_events, detect_events, draw_scene, fit_scene, synthesise, toybox_clip,
    track_states)
from vae import join_positions, principal_components, split_positions

NAN = float("nan")


# ---------------------------------------------------------------------- records and tables
# A record is a dict about one clip. A figure in it is a number, averaged over clips, or a pair
# (numerator, denominator), whose sums are divided: a clip with six events counts six times.
# Other values (names, times) are for the CSV. Records of windows have the name of the clip that
# they were cut from as `source`.

def has(record, key):
    """Has a record a value of a figure, neither nan nor a pair with nan?"""
    figure = record.get(key, NAN)
    return math.isfinite(figure[0] if isinstance(figure, tuple) else figure)


def resample_clips(records, key, rounds=1000):
    """A figure in the records of B clips -> (1 + rounds,): its mean or ratio, then that of B clips
    drawn anew. Windows of one clip are alike, so they are drawn together."""
    # A number is a pair with the denominator 1. Records without a value (nan) are left out.
    sums = {}
    for i, record in enumerate(records):
        if has(record, key):
            figure = record[key]
            source = record.get("source", i)
            pair = figure if isinstance(figure, tuple) else (figure, 1.)
            sums[source] = sums.get(source, 0.) + np.array(pair, float)
    pairs = np.array(list(sums.values())).reshape(-1, 2)
    # Bootstrap: as many clips, drawn with replacement, always the same draws.
    drawn = np.random.default_rng(0).integers(max(1, len(pairs)), size=(rounds, len(pairs)))
    pairs_drawn = pairs[drawn] if len(pairs) > 1 else np.zeros((rounds, 1, 2))
    over, under = np.concatenate([pairs.sum(0)[None], pairs_drawn.sum(1)]).T
    return np.divide(over, under, out=np.full(1 + rounds, NAN), where=under > 0)


def paired(rows, others, key):
    """Records of two rows of the same clips -> (1 + rounds,): what the first has more in `key`. A
    clip that either lacks counts in neither: which clips are drawn moves both rows alike, so the
    difference may be significant although their intervals overlap."""
    both = [pair for pair in zip(rows, others) if all(has(record, key) for record in pair)]
    first, second = zip(*both) if both else ((), ())
    return resample_clips(first, key) - resample_clips(second, key)


def interval(ratios):
    """What `resample_clips` gives, of a row or the difference of two -> value, low, high (95 %). Of
    one clip alone nothing is known about others: nan. Of few clips they are too narrow: of normal
    values they cover the mean in 84 % of cases with 5 clips, 89 % with 9, 94 % with 96."""
    if np.isnan(ratios[1:]).all():
        return [float(ratios[0]), NAN, NAN]
    return [float(ratios[0]), *np.nanquantile(ratios[1:], (.025, .975)).tolist()]


def summarise(records):
    """Records -> every figure over the clips that have it, its bounds in `interval`, `clips`."""
    clips = {record.get("source", i) for i, record in enumerate(records)}
    summary = dict(interval={}, clips=len(clips))
    for key in dict.fromkeys(chain.from_iterable(records)):
        known = [r for r in records if isinstance(r.get(key), (int, float, tuple))]
        if known:
            summary[key], *summary["interval"][key] = interval(resample_clips(known, key))
            # Without any event, true or detected, these are 0; all else without a value is nan.
            counts = any(name in key for name in ("precision", "recall", "f1_"))
            if counts and math.isnan(summary[key]):
                summary[key] = 0.
    return summary


def shuffled(values):
    """The level of chance: every clip gets the value of the clip half the list away. (Windows and
    draws of one clip are neighbours.)"""
    half = len(values) // 2
    return [*values[half:], *values[:half]]


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
    columns: the figures that are printed, and their titles."""

    def __init__(self, columns):
        self.result = {}
        self.records = []
        self.head(columns)

    def head(self, columns):
        """Begin a table with other columns below; its rows join the same CSV and JSON."""
        self.columns = columns
        print(" " * 31 + "".join(f" {title:>20s}" for title in columns.values()))

    def add(self, key, title, records=(), figures=None):
        """Print a row: the summary of its records, and `figures` that no single clip has, with
        their own intervals if they have some."""
        row = figures or {}
        if records:
            summary = summarise(records)
            intervals = summary["interval"] | row.get("interval", {})
            row = summary | row | dict(interval=intervals)
        self.result[key] = row
        self.records += [dict(row=key) | record for record in records]
        cells = [self.cell(row, name) for name in self.columns]
        print(f"{title:31s}" + "".join(f" {cell:>20s}" for cell in cells), flush=True)

    def cell(self, row, name):
        value = row.get(name, NAN)
        if isinstance(value, str):
            return value
        # One value per training seed; nan where one of them is undefined
        if isinstance(value, list):
            values = np.array(value, float)
            deviation = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            return f"{values.mean():.3f}{deviation}"
        if math.isnan(value):
            return ""
        # A figure of the row as a whole has no interval over clips.
        if name not in row.get("interval", {}):
            return f"{value:.3g}"
        low, high = row["interval"][name]
        return f"{value:.3f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")

    def gain(self, figure, key, other):
        """What row `key` has more than row `other`, in `figure` -> value, low, high."""
        rows = [[r for r in self.records if r["row"] == k] for k in (key, other)]
        return interval(paired(*rows, figure))

    def finish(self, path=None):
        """Write the CSV to `path`; print the JSON of all rows as the last line."""
        try:
            if path:
                self.write_records(path)
        finally:
            # Also where the disk is full: the rows may have taken hours.
            print(json.dumps(to_json(self.result)))

    def write_records(self, path):
        # Columns are all keys of all records; a record has nothing in those of the others.
        columns = dict.fromkeys(chain.from_iterable(self.records))
        # Names of files may hold bytes that are not UTF-8, which are written as \udcff.
        with replacing(path) as part, open(part, "w", newline="", encoding="utf-8",
                                           errors="backslashreplace") as f:
            writer = csv.DictWriter(f, columns)
            writer.writeheader()
            writer.writerows(map(to_json, self.records))
        print(f"every clip: {path}")


# ---------------------------------------------------------------------- events of the toybox

def match_events(a, b, tolerance):
    """Times a (n,) and b (m,), paired one to one within `tolerance` seconds, closest first
    -> the lags b - a of the pairs. (Where times are denser than the tolerance this may find fewer
    pairs than a maximum matching, such as mir_eval's. Events of the toybox are not.)"""
    lags = np.asarray(b)[None] - np.asarray(a)[:, None]                      # (n, m)
    distance = np.abs(lags)
    lags_of_pairs = []
    # 1e-9: two times that are exactly `tolerance` apart count, whatever their rounding.
    while distance.min(initial=np.inf) <= tolerance + 1e-9:
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        lags_of_pairs.append(lags[i, j])
        distance[i] = np.inf
        distance[:, j] = np.inf
    return lags_of_pairs


def event_record(truth, found):
    """True times (n,), detected times (m,) -> precision, recall, F1 within 50 and 100 ms; mean
    |lag| in ms of what is paired within 100 ms. All are pairs (numerator, denominator)."""
    record = {}
    for ms in (50, 100):
        lags = match_events(truth, found, ms / 1000)
        record[f"precision_{ms}"] = len(lags), len(found)
        record[f"recall_{ms}"] = len(lags), len(truth)
        record[f"f1_{ms}"] = 2 * len(lags), len(truth) + len(found)
    # `lags` are those within 100 ms now.
    record["timing_ms"] = 1000 * float(np.abs(lags).sum()), len(lags)
    return record


def event_scores(truth, found):
    """Lists of event times per clip, true and detected -> the summary of their records."""
    return summarise([event_record(t, f) for t, f in zip(truth, found)])


def toybox_records(videos, clips, start=0., end=math.inf):
    """Videos against the clips they were generated for, from `start` to `end` seconds -> records.
    """
    records = []
    for video, clip in zip(videos, clips):
        found, residual, readable = detect_clip_events(video, clip, start, end)
        truth = clip["events"]
        truth = truth[(truth >= start) & (truth < end)]
        record = event_record(truth, found)
        matched, _ = record["precision_100"]
        record |= dict(
            kind=clip["kind"], true_times=truth, detected_times=found,
            residual=(float(residual.sum()), len(residual)), readable=readable,
            false_per_quiet_clip=len(found) if len(truth) == 0 else NAN,
            false_per_s=(len(found) - matched, min(end, len(video) / FPS) - start))
        records.append(record)
    return records


# ---------------------------------------------------------------------- any video and sound

def onsets(wave, rate):
    """librosa's onsets of a waveform (samples,) -> times (n,), multiples of 512 / 22 050 s = 23 ms.
    """
    import librosa
    compile_onset_detector()
    # At 16 kHz the detector's local-maximum test spans no frame, and it reports every hit twice.
    wave = librosa.resample(np.asarray(wave, np.float32), orig_sr=rate, target_sr=22050)
    # Its picker: the highest within 30 ms before, and above the mean of 100 ms around by .07.
    return librosa.onset.onset_detect(y=wave, sr=22050, hop_length=512, units="time")


@cache
def compile_onset_detector():
    """numba compiles librosa's peak picker at its first use, and writes it beside librosa. Two
    processes that do so at once can leave files that do not fit each other, and all later ones
    crash (numba issue 10128; of 16 at once, 15 did). So they take turns."""
    import librosa
    click = np.zeros(22050, np.float32)
    click[11025] = 1
    with data.locked(Path(librosa.__file__).parent):
        librosa.onset.onset_detect(y=click, sr=22050)


def onset_rise(wave):
    """How much louder a sound (16 kHz) becomes -> (100 Hz,), in tens of dB."""
    # In tens of dB: a log-mel is log10 of the energy over 1.6, and a constant.
    energy = 1.6 * data.log_mel(wave)                                    # (100 Hz, bands)
    # What is 50 dB below the loudest moment is taken as silence.
    energy = np.maximum(energy, energy.max() - 5)
    # The rise over 30 ms in every band, falls not counted, averaged over the bands: noise and hums
    # do not rise in many bands at once.
    return np.pad(np.maximum(energy[3:] - energy[:-3], 0).mean(1), (3, 0))


def onsets_in_sound(wave, rise=None):
    """When something begins to sound (16 kHz; its `onset_rise`, if that is known) -> seconds (n,).
    On 400 true sounds of the toybox F1 at 50 ms is .99; librosa's onsets have .55, most of them
    noise."""
    rise = onset_rise(wave) if rise is None else rise
    # An onset is the maximum within 0.1 s: 5 dB at least, and 0.3 of the clip's steepest rise.
    least = max(.5, .3 * rise.max())
    tops = [i for i in range(3, len(rise))
            if rise[i] >= least and rise[i] == rise[max(0, i - 10):i + 11].max()]
    return (np.array(tops) - 1) / 100


def cyclesync(reference, generated, tolerance=.05):
    """Syncphony eqs. 3, 4: onsets (n,) of the true sound, (m,) of the one generated for the video
    -> the score over the literal union, and over the merged union; nan if neither has an onset."""
    reference = np.asarray(reference, float)
    generated = np.asarray(generated, float)
    total = len(reference) + len(generated)
    if total == 0:
        return NAN, NAN
    # An onset counts if ANY onset of the other side is near: no one-to-one pairing.
    near = np.abs(reference[:, None] - generated[None]) <= tolerance + 1e-9     # (n, m)
    matched = int(near.any(1).sum() + near.any(0).sum())
    # Equal times count once in the literal union, a matched pair once in the merged one.
    union = len(np.unique(np.concatenate([reference, generated]).round(6)))
    return matched / (2 * union), matched / (2 * (total - matched / 2))


def av_align(audio_times, video_times, fps):
    """AV-Align (TempoTokens): matched / union of audio and video peaks, nan without any peak."""
    used = set()
    for t in audio_times:
        # Each audio peak, in order, takes the first unused video peak less than one frame away.
        near = [j for j, v in enumerate(video_times) if abs(v - t) < 1 / fps]
        used.update([j for j in near if j not in used][:1])
    # Unlike CycleSync's, this union counts a matched pair once.
    union = len(audio_times) + len(video_times) - len(used)
    return len(used) / union if union else NAN


def flow_curve(frames):
    """Mean optical flow (Farneback, pixels) from a frame to the next -> (F,), the first twice."""
    import cv2
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


# ---------------------------------------------------------------------- motion of any video

# Constants were chosen on 402 windows of 49 frames, 251 of them from The Greatest Hits.
#
# Pictures are averaged over 8 x 8 cells before differences are taken: the means leave texture out.
# Agreement of the curve with the own sound minus that with another clip's, over its standard error,
# for windows of The Greatest Hits:
#     64 x 64 cells  6.4        8 x 8  9.6        4 x 4  11.5, but mouths are lost
CELLS = 8
# Of 255, what changes less is noise: coded by H.264 at CRF 23, curves keep a correlation of 0.998
# with themselves, without this 0.983.
DEAD_ZONE = 1.
# A Gaussian of one frame. A causal VAE decodes four frames a latent; 1.4 of the true motion comes
# at the first of them, 0.6 to 0.8 at the others: the reconstruction's curve agrees with the true
# one by 0.68 without this, by 0.94 with it. Hits are found as well as without.
SMOOTHING = np.array([1, 4, 6, 4, 1]) / 16
STILL = 1e-3                    # deviation of a curve in which nothing moves; the median is 0.8
# `sound_agreement` takes the best shift up to this, in steps of 10 ms. Share of 2 s windows of true
# hits that agree better with their own sound than with the same sound shifted by
#                       0.1 s   0.2 s   0.5 s
#     up to  40 ms       62 %    76 %    74 %
#     up to 100 ms       63 %    73 %    73 %
#     up to 150 ms       56 %    66 %    73 %
# With 40 ms the own sound agrees better than another clip's less often than with 100 ms.
SLACK = 10
# Least confidence of a lag with a single answer: a steady rhythm, which has several, is under it.
CLEAR = 3
# Least height of a peak, of the highest within a second to either side: takes of half a minute have
# F1 .49 with their sound, .24 with another's; of the highest of all .33 and .16.
PEAK = .5


def motion_energy(frames, fps=FPS):
    """How much the picture changes from a frame to the next, frames uint8 (F, H, W, 3) -> (F - 1,)
    in steps of 255. Entry k is visible at (k + 1) / fps."""
    # In pieces: a clip may have minutes.
    cells = [F.adaptive_avg_pool2d(torch.tensor(piece).movedim(-1, 1).float(), CELLS)
             for piece in np.array_split(frames, math.ceil(len(frames) / 64))]
    change = torch.cat(cells).diff(dim=0).abs()                              # (F - 1, 3, 8, 8)
    curve = (change - DEAD_ZONE).clamp(min=0).mean((1, 2, 3)).numpy()
    # At 12 fps or less a frame lasts 83 ms or more: smoothing would blur single motions.
    if fps <= FPS / 2:
        return curve
    return np.convolve(np.pad(curve, 2, "edge"), SMOOTHING, "valid")


def motion_agreement(truth, curve):
    """Pearson correlation of two curves (n,). Where nothing moves in the true one, it is undefined
    (nan); where nothing moves in the other alone, 0."""
    if min(truth.std(), curve.std()) < STILL:
        return NAN if truth.std() < STILL else 0.
    return float(np.corrcoef(truth, curve)[0, 1])


def motion_peaks(curve, fps):
    """Local maxima of a curve of `motion_energy` -> seconds."""
    # Neither the first nor the last value, whose neighbours are not known
    middle = curve[1:-1]
    tops = np.flatnonzero((middle > curve[:-2]) & (middle >= curve[2:])) + 1
    high = [i for i in tops if curve[i] >= PEAK * curve[max(0, i - fps):i + fps + 1].max()]
    return (np.array(high) + 1) / fps


def hit_agreement(times, curve, fps, tolerance=.1):
    """Onsets of a sound (n,) and the peaks of a curve of `motion_energy`, paired one to one within
    `tolerance` seconds (a latent lasts 167 ms) -> their F1 as a pair (numerator, denominator)."""
    peaks = motion_peaks(curve, fps)
    return 2 * len(match_events(times, peaks, tolerance)), len(times) + len(peaks)


def analyse_clip(clip):
    """A clip with the curves and onsets that every row of its table is compared with."""
    return dict(clip, curve=motion_energy(clip["video"]), **analyse_sound(clip["audio"]))


def motion_records(videos, clips, reconstructed):
    """Videos generated for real clips, against these (`analyse_clip`), and against these through
    the VAE -> records. The first frame, which is given, counts in none of them."""
    records = []
    for video, clip, decoded in zip(videos, clips, reconstructed):
        truth = clip["video"]
        curve = motion_energy(video)
        late, confidence = lag(curve, FPS, clip["strength"])
        # Where nothing moves nothing should flicker: the error, in steps of 255, of the pixels that
        # never leave the first frame, as a sum and a count. So each such pixel counts the same:
        # before a camera that shakes there are few, and they lie beside edges.
        still = ~has_moved(truth).any(0)                                     # (H, W)
        flicker = np.abs(video[1:].astype(np.int16) - decoded[1:])[:, still]
        records.append(picture_record(video, truth) | dict(
            motion=motion_agreement(clip["curve"], curve),
            hits=hit_agreement(clip["hits"], curve, FPS),
            lag_s=late, lag_confidence=confidence,
            flicker=(float(flicker.sum()), flicker.size)))
        if len(clip.get("events", ())):
            records[-1]["true_hits"] = hit_agreement(clip["events"], curve, FPS)
    return records


def sliding_correlation(curve, fps, times, strength):
    """Cross-correlation of a curve of `motion_energy` with the `strength` of a sound at `times`,
    for every shift within 0.5 s -> how much later the picture is, in steps of 10 ms (n,); the
    correlations (n,), 0 where one of the curves is constant. Both are normalised by mean and
    deviation of the whole curve, so that the mean of their product over the overlap may exceed 1.
    """
    # Both on one grid of 10 ms. The change from frame k to k + 1 is visible when k + 1 is.
    t = np.arange(0, (len(curve) + 1) / fps, .01)
    m = np.interp(t, (np.arange(len(curve)) + 1) / fps, curve)
    s = np.interp(t, times, strength)
    m = (m - m.mean()) / max(m.std(), 1e-6)
    s = (s - s.mean()) / max(s.std(), 1e-6)
    most = min(50, len(t) // 2)
    shifts = np.arange(-most, most + 1)
    # Over the overlap: the picture from k on and the sound from 0 on, or the other way round.
    n = len(t)
    match = [(m[max(0, k):n + min(0, k)] * s[max(0, -k):n - max(0, k)]).mean() for k in shifts]
    return shifts, np.array(match)


def sound_agreement(curve, fps, rise):
    """How well a video moves when it sounds: the highest correlation of its curve of
    `motion_energy` with the `onset_rise` of a sound, one of them up to 0.1 s late."""
    # As in `onsets_in_sound`, a rise over 30 ms is found 10 ms late.
    shifts, match = sliding_correlation(curve, fps, (np.arange(len(rise)) - 1) / 100, rise)
    return float(match[np.abs(shifts) <= SLACK].max())


def onset_strength(wave, rate):
    """librosa's onset strength of a waveform (samples,) -> (n,), of times 220 / 22 050 s apart."""
    import librosa
    wave = librosa.resample(wave, orig_sr=rate, target_sr=22050)
    return librosa.onset.onset_strength(y=wave, sr=22050, hop_length=220)


def lag(curve, fps, strength):
    """How much later the picture (a curve of `motion_energy`) moves than a sound (its
    `onset_strength`), within +-0.5 s, for any video -> lag, confidence (see CLEAR)."""
    times = np.arange(len(strength)) * 220 / 22050
    shifts, match = sliding_correlation(curve, fps, times, strength)
    if not match.any():
        return NAN, 0.
    best = int(match.argmax())
    # Confidence: the height of the peak over shifts more than 0.1 s from it, in their deviations.
    rest = match[np.abs(shifts - shifts[best]) > SLACK]
    return shifts[best] * .01, float((match[best] - rest.mean()) / (rest.std() + 1e-9))


def median_lag(records):
    """The median lag, in ms, of clips with a clear answer."""
    lags = [r["lag_s"] for r in records if r["lag_confidence"] > CLEAR]
    return 1000 * float(np.median(lags)) if lags else NAN


# ---------------------------------------------------------------------- video-to-audio models
# Each is a function f(frames, fps) -> waveform (samples,), rate.

def oracle(clip):
    """The best possible f for videos of a toybox clip's scene.

    Noise and room are those of the true sound, and onsets in the noise agree whatever the video
    shows. So a video in which nothing moves is above chance. Merged CycleSync over 36 clips:

                                true videos   still videos   other clips' sounds
        the true noise and room     .96           .29               .13
        another room                .66           .15
    """
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
        # ... are given the sound of this thing in this room, with the true sound's noise.
        wave, _ = synthesise(clip["scene"], events + lead, durations, lead + len(frames) / fps,
                             clip["seed"], clip["off_screen"])
        return wave[round(lead * RATE):], RATE
    return f_v2a


def v2a_from_checkpoint(path, args, clips):
    """A checkpoint of train.py --task t2av or joint -> an f per clip (None: f knows no text of it).

    f reads the clip's caption and transcript, as in training, where one of ten captions is dropped:
    without them Harmony's sounds for 64 true videos have onset F1 .75 instead of .90, and mouths
    begin 50 ms late. Its noise is the clip's own, and the same for every video of a clip: rows stay
    paired, and --draws averages over it."""
    device, _ = pick_device(args.device)
    try:
        system = load(path, device, args.vae, args.audio_vae, task="t2av or joint")
    except BadInput:
        # --vae may be that of --ckpt alone: this file's is found by its fingerprint.
        if not (args.ckpt and args.vae):
            raise
        system = load(path, device, None, args.audio_vae, task="t2av or joint")
    autocast, _ = autocast_for(system, args.dtype, device)
    settings = recommended(system.checkpoint)

    def f_v2a(seed, clip, frames, fps):
        # Frames are repeated if they come at a lower rate.
        frames = frames[(np.arange(round(len(frames) / fps * FPS)) * fps / FPS).astype(int)]
        # To the size that the towers were trained for.
        x = resize(frames_to_tensor(frames), data.sides(system.checkpoint["size"]))
        known = clip or {}
        wave = video_to_audio(
            system.model, system.vae, system.audio_vae, tensor_to_frames(x),
            known.get("caption", ""), autocast, seed, speech=[known.get("speech", "")], **settings)
        return wave, system.audio_vae.cfg.rate
    return [partial(f_v2a, seed, clip) for seed, clip in enumerate(clips)]


def resize(x, size):
    """(3, F, H, W) -> (3, F, *size)"""
    x = F.interpolate(x.transpose(0, 1), size, mode="bicubic", antialias=True)
    return x.transpose(0, 1)


def v2a_from_command(command, least=0.):
    """Any program as f. In `command` {video} becomes the path of an mp4 without sound (H.264),
    {wav} the path at which the program has to leave its sound."""
    def f_v2a(frames, fps):
        # Models want a certain length (V-AURA 2.56 s): the last frame is held for so long, and the
        # sound is cut to the length of the video.
        held = np.repeat(frames[-1:], max(0, math.ceil(least * fps) - len(frames)), 0)
        with tempfile.TemporaryDirectory() as folder:
            video = f"{folder}/video.mp4"
            wav = f"{folder}/sound.wav"
            data.write_video(video, np.concatenate([frames, held]), None, fps)
            done = subprocess.run(
                command.replace("{video}", video).replace("{wav}", wav), shell=True,
                capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
            if done.returncode or not os.path.isfile(wav):
                last = (done.stderr.strip().splitlines() or ["it printed no reason"])[-1]
                raise BadInput(f"--v2a-cmd {command!r}: ended with code {done.returncode} "
                               f"({last}); it has to turn {{video}} into {{wav}}")
            # As true sounds are read: above 8 kHz only one of the two would have onsets.
            return read_audio(wav)[:round(len(frames) / fps * RATE)], RATE
    return f_v2a


def v2a_models(args, clips):
    """-> a video-to-audio model per clip (None without any), and its name."""
    if args.v2a_cmd:
        return [v2a_from_command(args.v2a_cmd, args.v2a_seconds)] * len(clips), args.v2a_cmd
    if args.v2a_ckpt:
        return v2a_from_checkpoint(args.v2a_ckpt, args, clips), args.v2a_ckpt
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


def latent_features(vae, videos):
    """Normalised latents averaged to 2x2 -> (videos x latents, 4C), within one VAE comparable."""
    rows = []
    for video in videos:
        # Latent 0 codes the given first frame alone.
        z = encode_video(vae, video)[0, :, 1:].transpose(0, 1)               # (L - 1, C, h, w)
        rows.append(F.adaptive_avg_pool2d(z, 2).flatten(1).cpu().numpy())
    return np.concatenate(rows)


def mel_features(waves):
    """Log-mels averaged over a quarter of a second -> (waves x quarters, bands)."""
    mels = [data.log_mel(w) for w in waves]                                  # (100 Hz, bands) each
    quarters = [m[:len(m) // 25 * 25].reshape(-1, 25, data.MELS) for m in mels]
    return np.concatenate([q.mean(1) for q in quarters])


# TorchScript files in common use: StyleGAN-V's I3D, StyleGAN's Inception, a VGGish.
NETWORKS = dict(fvd="i3d_torchscript.pt", fid="inception-2015-12-05.pt", fad="VGGish")


def torchscript_features(what, path, videos, sounds):
    """Features by one of NETWORKS -> (n, d): a row per clip (fvd), per frame (fid), per second
    (fad). sounds: (waveform, rate) each."""
    import librosa

    def features(net, video, sound):
        if what == "fvd":
            x = resize(frames_to_tensor(video), (224, 224))[None]            # (1, 3, F, 224, 224)
            return net(x, rescale=False, resize=False, return_features=True)
        if what == "fid":
            return net(torch.from_numpy(video).permute(0, 3, 1, 2), return_features=True)
        wave, rate = sound
        return net(torch.from_numpy(librosa.resample(wave, orig_sr=rate, target_sr=RATE)))

    try:
        net = torch.jit.load(path, map_location="cpu").eval()
        with torch.no_grad():
            rows = [features(net, *pair) for pair in zip(videos, sounds)]
        return np.concatenate([y.reshape(-1, y.shape[-1]).float().numpy() for y in rows])
    # AttributeError: what it returns is no tensor
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        last = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise BadInput(f"--{what} {path}: no TorchScript file for these inputs ({last})") from None


# ---------------------------------------------------------------------- pictures

def psnr(error):
    """Differences of values 0 .. 255, of any shape -> peak signal-to-noise ratio in dB, at most 60:
    an exact copy counts as one that is wrong by a quarter of a step."""
    return float(-10 * np.log10(max(np.mean(np.square(error, dtype=np.float32)) / 255 ** 2, 1e-6)))


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of videos uint8 (F, H, W, 3), 1 = equal: means over
    colours, frames and Gaussian windows of a deviation of 1.5 pixels."""
    x = torch.arange(11) - 5.
    kernel = torch.exp(-x ** 2 / (2 * 1.5 ** 2))
    kernel = kernel / kernel.sum()

    def blur(y):                                              # (3F, 1, H, W), whole windows alone
        return F.conv2d(F.conv2d(y, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))

    a, b = (torch.from_numpy(v).movedim(3, 1).flatten(0, 1)[:, None].float() for v in (a, b))
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    # the paper's constants for values up to 255
    c1, c2 = (.01 * 255) ** 2, (.03 * 255) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return similarity.mean().item()


def has_moved(video):
    """Pixels that have left the first frame by more than 5 of 255 steps in any colour, in frames
    1 and on: (F, H, W, 3) -> bool (F - 1, H, W)."""
    return np.abs(video[1:].astype(np.int16) - video[0]).max(3) > 5


def picture_record(video, truth):
    """How close the frames of a video are to those of a clip, both uint8 (F, H, W, 3), without
    frame 0, which is given. `repeated`: of the first frame repeated."""
    error = video[1:].astype(np.int16) - truth[1:]
    repeated = truth[:1].astype(np.int16) - truth[1:]
    moved = has_moved(truth)
    record = dict(psnr=psnr(error), psnr_repeated=psnr(repeated), ssim=ssim(video[1:], truth[1:]))
    # Where hardly anything moves these would be means over noise.
    if moved.mean() > .01:
        record |= dict(psnr_moving=psnr(error[moved]),
                       psnr_moving_repeated=psnr(repeated[moved]))
    return record


# ---------------------------------------------------------------------- clips and videos

def held_out_clips(args, size, audio_lead=0.):
    """The clips that are scored. Toybox: seeds that no training draws. Datasets: test clips in
    random order, three windows of each, more where there are few clips.

    Settings are not chosen on the clips of the tables: --steps-study and --guidance-study take
    toybox clips of another seed; of a dataset --steps-study takes training clips, which the network
    knows, so its choice is optimistic. (--guidance-study is for the toybox alone.)
    audio_lead: seconds of sound before the first frame, so that it can be delayed without a gap.
    """
    if args.data == "toybox":
        data.only_square(size)
        seed = args.seed + STUDY_SEED * (args.steps_study or args.guidance_study)
        clips = [toybox_clip(HELD_OUT + 10 ** 4 * seed + i, size) for i in range(args.clips)]
        for c in clips:
            # The source of all its draws (--draws): they are alike, as windows of one clip are.
            c.update(name=str(c["seed"]), source=str(c["seed"]), audio_lead=audio_lead)
            # The noise of the room precedes the clip.
            if audio_lead:
                c["audio"], _ = synthesise(c["scene"], c["events"] + audio_lead, c["durations"],
                                           audio_lead + FRAMES / FPS, c["seed"], c["off_screen"])
        return clips

    # Test clips in random order, until their windows are enough.
    found, layout = data.find_clips(args.data, args.data_root)
    split = "train" if args.steps_study else "test"
    tests = [c for c in found if c["split"] == split]
    clips, unusable = [], []
    most = math.ceil(args.clips / max(1, len(tests)))
    for i in np.random.default_rng(args.seed).permutation(len(tests)):
        if len(clips) >= args.clips:
            break
        try:
            # Windows as of a test clip, of training clips too: else a long take is all of them.
            clip = dict(tests[i], split="test")
            for window in data.clip_windows(clip, size, audio_lead, most):
                name = f"{tests[i]['name']}@{window['start']:.2f}"
                clips.append(dict(window, name=name, source=tests[i]["name"],
                                  kind=tests[i]["kind"]))
        except BadInput as error:
            unusable.append(str(error))
    skipped = f", {len(unusable)} clips cannot be used, such as {unusable[0]}" if unusable else ""
    print(f"{layout}; {len(clips)} windows of the {split} split are scored{skipped}")
    if len(clips) < 2:
        raise BadInput(f"--data {args.data}: {len(clips)} usable windows in its {split} split; at "
                       "least two are needed")
    clips = clips[:args.clips]
    sources = {clip["source"] for clip in clips}
    if len(sources) < 5:
        print(f"only {len(sources)} {split} clips: shuffled sounds may be of the same clip, and "
              "intervals say little about other clips")
    return clips


def generate(model, vae, clips, autocast=nullcontext, seed=0, **settings):
    """Videos for the first frame, sound and caption of every clip -> list of uint8 (F, H, W, 3)."""
    # So many at once as have the pixels of 48 clips of 64x64: of 384x640 one.
    H, W = clips[0]["video"].shape[1:3]
    batch = max(1, 48 * 64 ** 2 // (H * W))
    videos = []
    for i in range(0, len(clips), batch):
        part = clips[i:i + batch]
        pieces = generate_video(
            model, vae, [c["video"][0] for c in part], [c["audio"] for c in part],
            [c["caption"] for c in part], len(part[0]["video"]), autocast,
            seeds=[seed + i + j for j in range(len(part))], **settings)
        videos += list(np.concatenate(list(pieces), 1))
    return videos


@torch.no_grad()
def reconstruct(vae, clips, autocast=nullcontext):
    """The clips through the VAE alone: the ceiling of everything that is generated with it."""
    videos = []
    for clip in clips:
        x = frames_to_tensor(clip["video"], next(vae.parameters()).device)[None]
        with autocast():
            # Decoded one latent at a time, as in sampling.
            cache = {}
            latents = vae.encode_chunks(x)[0].split(1, 2)
            y = torch.cat([vae.decode(z, x[:, :, :1], cache) for z in latents], 2)
        videos.append(np.concatenate([clip["video"][:1], tensor_to_frames(y[0].float())[1:]]))
    return videos


def write_strips(path, videos, waves, marks, clips):
    """Up to six clips of the toybox, one of each kind, as rows of frames over the waveform with
    `marks` in it."""
    # The first clip of a kind in which something happens.
    chosen = {}
    for i, clip in enumerate(clips):
        if len(clip["events"]):
            chosen.setdefault(clip["kind"], i)
    rows = [film_strip(videos[i], waves[i], events=marks[i]) for i in list(chosen.values())[:6]]
    data.write_picture(path, np.concatenate(rows or [videos[0][0]]))


def write_pairs(path, videos, clips):
    """Six real clips: the true frames, those generated, and the motion of both over the sound."""
    rows = []
    for i in np.unique(np.linspace(0, len(clips) - 1, 6).astype(int)):
        truth = clips[i]["video"]
        wave = clips[i]["audio"]
        # Each curve up to its own maximum: when it moves is compared, not how much.
        curves = [motion_energy(truth), motion_energy(videos[i])]
        rows.append(film_strip(truth, wave)[:truth.shape[1]])
        rows.append(film_strip(videos[i], wave, curves=curves))
    data.write_picture(path, np.concatenate(rows))


# ---------------------------------------------------------------------- a checkpoint's table

def analyse_video(video, f_v2a, fps=FPS):
    """What of a silent video is compared with sounds: the sound that f generates for it, the onsets
    of that, the peaks of its optical flow; None where there is no f or OpenCV (an extra)."""
    sound = f_v2a(video, fps) if f_v2a else None
    return dict(sound=sound, onsets=onsets(*sound) if sound else None, fps=fps,
                peaks=flow_peaks(flow_curve(video), fps) if find_spec("cv2") else None)


def labels(clip):
    """What a record says of its clip, in the CSV."""
    return dict(clip=clip["name"]) | {k: clip[k] for k in ("kind", "source") if k in clip}


def analyse_sound(wave):
    """What of a sound (16 kHz) is compared with videos."""
    rise = onset_rise(wave)
    return dict(onsets=onsets(wave, RATE), hits=onsets_in_sound(wave, rise), rise=rise,
                strength=onset_strength(wave, RATE))


def sync_records(times, analyses, clips, tolerance):
    """Onsets (n,) of a sound and `analyse_video` of a video for every clip -> records of CycleSync
    by both unions, and of AV-Align."""
    records = []
    for found, analysis, clip in zip(times, analyses, clips):
        record = labels(clip)
        if analysis["onsets"] is not None:
            literal, merged = cyclesync(found, analysis["onsets"], tolerance)
            record |= dict(cyclesync_set=literal, cyclesync_merged=merged)
        if analysis["peaks"] is not None:
            record["av_align"] = av_align(found, analysis["peaks"], analysis["fps"])
        records.append(record)
    return records


def check_encoders(model, path, args):
    on_pyramid = getattr(model.cfg, "context_sigma", "") == "shared"
    if (args.pretrained or args.hubert) and not on_pyramid:
        raise BadInput(f"--pretrained and --hubert: {path} is not on Pyramid Flow; leave them out")


class Scorer:
    """A checkpoint, its VAEs, and the held-out clips that its samples are compared with."""

    def __init__(self, path, args):
        self.args = args
        # The true events are known in the toybox alone.
        self.toybox = args.data == "toybox"
        self.device, place = pick_device(args.device)
        system = load(path, self.device, args.vae, args.audio_vae, args.pretrained, self.task)
        self.autocast, precision = autocast_for(system, args.dtype, self.device)
        self.described = f"{place}, {precision}"
        self.model, self.vae, self.audio_vae = system.model, system.vae, system.audio_vae
        self.ckpt = system.checkpoint
        check_encoders(self.model, path, args)
        trained_on = self.ckpt["args"].get("data", args.data)
        if (trained_on == "toybox") != self.toybox:
            print(f"note: {path} was trained on {trained_on} and is scored on {args.data}; --data "
                  "says on what", file=sys.stderr)
        if args.audio_vae and not (self.audio_vae or args.v2a_ckpt):
            raise BadInput("--audio-vae is that of two towers, or of --v2a-ckpt; leave it out")
        self.guidance = recommended(self.ckpt, steps=args.steps)
        self.steps = self.guidance.pop("steps")
        self.size = args.resolution or self.ckpt["size"]
        # Several draws of a clip differ in their noise; they stay neighbours, see `shuffled`.
        clips = held_out_clips(args, self.size)
        self.clips = list(chain.from_iterable([clip] * args.draws for clip in clips))
        self.captions = [c["caption"] for c in self.clips]
        self.videos = [c["video"] for c in self.clips]
        self.sounds = [c["audio"] for c in self.clips]

    @cached_property
    def reconstructed(self):
        """The clips through the VAE."""
        return reconstruct(self.vae, self.clips, self.autocast)

    @cached_property
    def analysed(self):
        return [analyse_clip(clip) for clip in self.clips]

    def reconstruct(self):
        """The clips through the VAEs, the bound of what can be generated."""
        return self.reconstructed, self.sounds

    def ablation_row(self, **settings):
        """Generate and score -> records, figures of the row."""
        return self.score(*self.generate(**settings))


def open_scorer(path, args, task=None):
    task = task or data.load_checkpoint(path)["task"]
    return (AudioToVideo if task == "a2v" else Towers)(path, args)


def evaluate(args):
    """The table of a checkpoint: true clips, reconstructed ones, all that it generates."""
    task = data.load_checkpoint(args.ckpt)["task"]
    tables = dict(a2v="a table of a2v", vae="a table of a VAE")
    check_flags(args, tables.get(task, "a table of two towers"))
    if task == "vae":
        return score_vae(args)
    scorer = open_scorer(args.ckpt, args, task)
    size = "x".join(map(str, data.sides(scorer.size)))
    print(f"{scorer.described}\n{args.ckpt}: step {scorer.ckpt['step']}; "
          f"{len(scorer.clips) // args.draws} held-out clips of {len(scorer.videos[0])} frames at "
          f"{size} px; {scorer.steps} steps; {scorer.note}; in brackets 95 % intervals over clips")
    table = Table(scorer.columns)
    table.add("ground_truth", "ground truth", *scorer.score(scorer.videos, scorer.sounds))
    table.add("vae", "VAE reconstruction", *scorer.score(*scorer.reconstruct()))
    for key, title, settings in scorer.rows():
        videos, waves, known = scorer.generate(**settings)
        records, figures = scorer.score(videos, waves, known)
        table.add(key, title, records, figures)
        picture = Path(args.out, f"{key}.png")
        if scorer.toybox:
            # Events in the picture are marked on the sound.
            marks = [r["detected_times"] for r in records]
            write_strips(picture, videos, waves, marks, scorer.clips)
        else:
            write_pairs(picture, videos, scorer.clips)
    scorer.more_rows(table)
    shown = "events in the picture marked"
    if not scorer.toybox:
        shown = "true ones above; over the sound the motion of the true (blue), the generated (red)"
    print(f"film strips, {shown}: {args.out}/")
    table.finish(Path(args.out, "clips.csv"))


# ---------------------------------------------------------------------- a VAE's table

PICTURE_COLUMNS = dict(psnr="PSNR, dB", psnr_moving="where it moves", ssim="SSIM")


def score_vae(args):
    """Table of a VAE of video: beside it the first frame repeated, and the best linear autoencoder
    of the same rate, the principal components of these very clips."""
    device, place = pick_device(args.device)
    vae = load_vae(args.ckpt, device)
    clips = held_out_clips(args, args.resolution or 64)
    autocast, precision = pick_autocast(args.dtype, device, partial(reconstruct, vae, clips[:1]))
    videos = [clip["video"] for clip in clips]
    t, P = vae.stride_t, vae.stride
    size = "x".join(map(str, videos[0].shape[1:3]))
    print(f"{place}, {precision}\n{args.ckpt}: {t} frames x {P} x {P} pixels -> "
          f"{vae.cfg.latent} numbers; {len(clips)} clips of {len(videos[0])} frames at {size} px, "
          "without frame 0; in brackets 95 % intervals over clips")
    table = Table(PICTURE_COLUMNS)
    rows = dict(repeated=[video[:1].repeat(len(video), 0) for video in videos],
                linear=project(videos, t, P, vae.cfg.latent),
                vae=reconstruct(vae, clips, autocast))
    titles = dict(repeated="first frame repeated", linear="linear autoencoder", vae="this VAE")
    for key, coded in rows.items():
        records = [labels(clip) | picture_record(video, clip["video"])
                   for video, clip in zip(coded, clips)]
        table.add(key, titles[key], records)
    write_pairs(Path(args.out, "vae.png"), rows["vae"], clips)
    print(f"film strips, true ones above: {args.out}/vae.png")
    table.finish(Path(args.out, "clips.csv"))


def project(videos, t, P, n):
    """Videos uint8 (F, H, W, 3) as the n principal components of their differences from the first
    frame leave them, of positions of t frames and P x P pixels."""
    def differences(video):
        x = frames_to_tensor(video)[None]                                   # (1, 3, F, H, W)
        first = x[:, :, :1]
        # (1, L, h, w, 3, t, P, P)
        return first, split_positions(x[:, :, 1:] - first, t, P)

    # Clip by clip: as floats all of them would need gigabytes.
    moments, count = 0., 0
    for video in videos:
        rows = differences(video)[1].flatten(4).flatten(0, 3)               # (L h w, 3 t P P)
        moments = moments + rows.T @ rows
        count += len(rows)
    components, _ = principal_components(moments / count, n)
    reconstructed = []
    for video in videos:
        first, x = differences(video)
        projected = (x.flatten(4) @ components.T @ components).view_as(x)
        rest = first + join_positions(projected)
        reconstructed += list(tensor_to_frames(torch.cat([first, rest], 2)))
    return reconstructed


# ---------------------------------------------------------------------- Syncphony's rows

# timing: mean |lag| of events paired within 100 ms. false/quiet: events detected in a clip that has
# none.
TOYBOX_COLUMNS = dict(f1_50="F1 50 ms", f1_100="F1 100 ms", timing_ms="timing, ms",
                      residual="residual", false_per_quiet_clip="false/quiet")
# hits: onsets of the sound against peaks of motion. lag: median of the clips with a clear one.
# flicker: of pixels that do not move in the true clip, in steps of 255.
REAL_COLUMNS = dict(motion="motion agreement", hits="hit agreement", lag_ms="lag, ms",
                    flicker="flicker", psnr="PSNR", ssim="SSIM")
SYNC_COLUMNS = dict(cyclesync_set="CycleSync set", cyclesync_merged="merged", av_align="AV-Align")


class AudioToVideo(Scorer):
    """Syncphony: a video for the first picture and the sound of every clip."""

    task = "a2v"

    def __init__(self, path, args):
        super().__init__(path, args)
        self.encoders = external_encoders(self.model, args, self.captions, self.device)
        self.v2a, v2a_name = v2a_models(args, self.clips)
        self.networks = {what: getattr(args, what) for what in NETWORKS if getattr(args, what)}
        for what, file in self.networks.items():
            data.check_file(file, f"TorchScript file for --{what}")
        if args.fad and not self.v2a[0]:
            raise BadInput(f"--fad {args.fad}: measures sounds generated for the videos; give a "
                           "video-to-audio model by --v2a-cmd or --v2a-ckpt")
        self.note = f"w_t = {self.guidance['cfg']:g}; CycleSync by {v2a_name}"
        sync = {key: title for key, title in SYNC_COLUMNS.items()
                if self.v2a[0] or "cyclesync" not in key}
        self.columns = (TOYBOX_COLUMNS if self.toybox else REAL_COLUMNS) | sync
        if not self.toybox and any(len(c["events"]) for c in self.clips):
            self.columns |= dict(true_hits="true hits")
        self.columns |= dict(frechet_latent="Frechet") | {what: what for what in self.networks}
        # Of toybox videos scored last: records with the sounds and events of other clips.
        self.chance = []

    def rows(self):
        """Off-sync, then Audio Sync Guidance of several strengths, then the checkpoint's; of real
        clips also videos for the sound of another clip."""
        asg, cfg = (float(self.guidance[k]) for k in ("asg", "cfg"))
        yield "off_sync", "off-sync", dict(cfg=cfg, use_audio=False)
        for w in sorted({0., 1., 2., 4.} - {asg}):
            yield f"asg_{w:g}", f"w_a = {w:g}", dict(asg=w, cfg=cfg)
        yield "generated", f"w_a = {asg:g}, the checkpoint's", dict(asg=asg, cfg=cfg)
        if not self.toybox:
            # Noise, first frames and captions stay those of the clip, and so does what it is scored
            # against.
            clips = [dict(c, audio=wave) for c, wave in zip(self.clips, shuffled(self.sounds))]
            yield "shuffled", "... with shuffled sounds", dict(asg=asg, cfg=cfg, clips=clips)

    def study_rows(self):
        # Of a file that recommends no guidance, w_a = 1 is studied beside it.
        guided = dict(asg=self.guidance["asg"] or 1., cfg=self.guidance["cfg"])
        yield "a2v", dict(guided=guided, plain=dict(asg=0., cfg=0.))

    def generate(self, asg=0., cfg=0., use_audio=True, clips=None, **settings):
        """asg, cfg: w_a, w_t of Syncphony eq. 6; use_audio=False: off-sync; clips: others than this
        scorer's, or the same with other sounds; settings: of `generate_video`."""
        clips = clips or self.clips
        videos = generate(
            self.model, self.vae, clips, self.autocast, self.args.seed, asg=asg, cfg=cfg,
            still=self.guidance["still"], steps=self.steps, encoders=self.encoders,
            use_audio=use_audio, **settings)
        return videos, self.sounds, True

    @cached_property
    def stress_clips(self):
        return stress_clips(self.clips)

    def stress_row(self, condition, **settings):
        """Generate and score on a condition of the stress split -> records of its F1 at 50 ms."""
        clips = self.stress_clips[condition]
        videos, _, _ = self.generate(clips=clips, **settings)
        found = toybox_records(videos, clips)
        return [labels(c) | {condition: r["f1_50"]} for c, r in zip(clips, found)]

    def features(self, videos, sounds):
        """-> {distance: features (n, d)}, for the distances between clouds of them."""
        found = dict(frechet_latent=latent_features(self.vae, videos))
        for what, path in self.networks.items():
            found[what] = torchscript_features(what, path, videos, sounds)
        return found

    @cached_property
    def truth(self):
        return self.features(self.videos, [(w, RATE) for w in self.sounds])

    def score(self, videos, waves, known=True):
        """-> records, figures of the row."""
        analyses = [analyse_video(v, f) for v, f in zip(videos, self.v2a)]
        # Distances belong to the row, everything else to a clip.
        features = self.features(videos, [a["sound"] for a in analyses])
        figures = {k: frechet(v, self.truth[k]) for k, v in features.items()}
        # CycleSync and AV-Align
        times = [onsets(w, RATE) for w in waves]
        sync = sync_records(times, analyses, self.clips, self.args.tolerance)
        if not self.toybox:
            motion = motion_records(videos, self.analysed, self.reconstructed)
            figures["lag_ms"] = median_lag(motion)
            return [a | b for a, b in zip(sync, motion)], figures
        # In the toybox also the events in the picture against the true ones.
        records = toybox_records(videos, self.clips)
        chance = sync_records(shuffled(times), analyses, self.clips, self.args.tolerance)
        others = shuffled([r["true_times"] for r in records])
        self.chance = [event_record(other, record["detected_times"]) | sync_chance
                       for other, record, sync_chance in zip(others, records, chance)]
        records = [a | b for a, b in zip(records, sync)]
        figures["kinds"] = {k: summarise([r for r in records if r["kind"] == k]) for k in KINDS}
        return records, figures

    def more_rows(self, table):
        if self.toybox:
            table.add("shuffled", "... with shuffled sounds", self.chance)
        else:
            for other, figure in product(("off_sync", "shuffled"), ("motion", "hits")):
                gain = table.gain(figure, "generated", other)
                table.result["generated"][f"{figure}_minus_{other}"] = gain
                print("{}: the checkpoint's minus {} {:+.3f} [{:+.3f}, {:+.3f}]".format(
                    REAL_COLUMNS[figure], other.replace("_", "-"), *gain))
        table.result[f"asg_{self.guidance['asg']:g}"] = table.result["generated"]


# ---------------------------------------------------------------------- rows of two towers

# onset F1: the sound against the true events, video F1: the picture against them, agreement F1: the
# two against each other; by `onsets_in_sound` and `toybox_records`. onset Jaccard: the row's sound
# against the true one, by librosa's onsets (CycleSync's merged union, but no cycle: without f).
PAIR_COLUMNS = dict(
    onsets_f1_50="onset F1", onsets_shuffled="shuffled", cyclesync_merged="onset Jaccard",
    video_f1_50="video F1", agreement_f1_50="agreement F1", agreement_shuffled="shuffled",
    residual="residual", frechet_mels="Frechet mels", frechet_latent="latents")
MODES = dict(v2a="sound for video", a2v="video for sound", i2av="both, from picture",
             t2av="both, from text")
PLAIN = dict(sync_video=1., sync_audio=1.)             # no SyncCFG


class Towers(Scorer):
    """SyncFlow's or Harmony's two towers, on clips of the toybox."""

    task = "t2av or joint"
    columns = PAIR_COLUMNS

    def __init__(self, path, args):
        if args.data != "toybox":
            raise BadInput(f"--data {args.data}: two towers are scored by the toybox's truth; "
                           "leave --data out")
        super().__init__(path, args)
        self.note = f"stage {self.ckpt['stage']}"
        self.harmony = self.model.cfg.system == "harmony"
        # What either stream is when it is given: normalised latents (B, C, L, h, w), (B, A, S).
        self.z_v = torch.cat([encode_video(self.vae, v) for v in self.videos])
        self.z_a = torch.cat([encode_sound(self.audio_vae, w, self.device) for w in self.sounds])
        # Scenes fitted to frame 0, by frame 0: a fit takes about a second.
        self.scenes = {}

    @cached_property
    def truth(self):
        return dict(mels=mel_features(self.sounds),
                    latents=latent_features(self.vae, self.videos))

    @cached_property
    @torch.no_grad()
    def reconstructed_sounds(self):
        """The sounds through the audio VAE, one by one: they may differ in length."""
        waves = []
        for z, wave in zip(self.audio_vae.denormalise(self.z_a), self.sounds):       # (A, S) each
            decoded = self.audio_vae.decode(z[None], len(wave))[0]
            waves.append(decoded.clamp(-1, 1).cpu().numpy())
        return waves

    def reconstruct(self):
        return self.reconstructed, self.reconstructed_sounds

    def rows(self):
        """Every task, with the checkpoint's guidance and without."""
        for mode, variants in self.study_rows():
            yield mode, MODES[mode], variants["guided"]
            yield f"{mode}_plain", f"{MODES[mode]}, no guidance", variants["plain"]
        # SyncFlow from text, where guidance matters most (its figure 5 sweeps it, too).
        for w in () if self.harmony else sorted({2., 4., 6.} - {self.guidance["cfg"]}):
            settings = dict(mode="t2av", **self.guidance | dict(cfg=w))
            yield f"t2av_{w:g}", f"{MODES['t2av']}, w = {w:g}", settings

    def study_rows(self):
        """Every mode, with the checkpoint's guidance and without: scales of 1."""
        off = dict.fromkeys(("cfg", *PLAIN) if self.harmony else ("cfg",), 1.)
        for mode in MODES if self.harmony else ("v2a", "i2av", "t2av"):
            guided = dict(mode=mode, **self.guidance)
            yield mode, dict(guided=guided, plain=guided | off)

    def guidance_rows(self):
        """Either stream for the other, and both: the scales that act there, below STUDY_BOUNDS."""
        names = tuple(PLAIN) if self.harmony else ("cfg",)
        acting = dict(v2a=names[-1:], i2av=names) | (dict(a2v=names[:1]) if self.harmony else {})
        for mode, keys in acting.items():
            variants = {}
            for values in STUDY_SCALES[self.model.cfg.system]:
                scales = {k: v for k, v in zip(names, values) if k in keys}
                # Scales of 1, of the stream that is missing, are the row without guidance.
                for bound in STUDY_BOUNDS if set(scales.values()) != {1.} else ():
                    name = f"{' '.join(f'{v:g}' for v in scales.values())} below {bound:g}"
                    variants[name] = scales | dict(guide_below=bound)
            variants["plain"] = dict.fromkeys(names, 1.)
            yield mode, {k: dict(mode=mode, **self.guidance | v) for k, v in variants.items()}

    def generate(self, mode, **settings):
        """A mode of MODES -> videos, waveforms, of which a given one comes back; whether they are
        for these clips' events."""
        given = dict(v2a=dict(z_v=self.z_v), a2v=dict(z_a=self.z_a), i2av={}, t2av={})[mode]
        if mode != "t2av":
            # Of a given video it is what SyncCFG's still partner shows (Harmony eq. 10).
            given["pictures"] = np.stack([v[0] for v in self.videos])
        # SyncFlow's ablation without a video tower knows the text alone.
        if self.model.cfg.audio_only:
            given = {}
        if self.harmony:
            given["speech"] = [c["speech"] for c in self.clips]
        given["shift"] = self.guidance["shift"]
        videos, waves = generate_audio_video(
            self.model, self.vae, self.audio_vae, self.captions, len(self.videos[0]), self.size,
            self.autocast, steps=self.steps,
            seeds=[self.args.seed + i for i in range(len(self.clips))], **given | settings)
        videos = self.videos if videos is None else videos
        return videos, self.sounds if waves is None else waves, mode in ("v2a", "a2v")

    def fitted(self, clip, video):
        """The clip with a scene fitted to frame 0 of a video; of the true one only the kind is
        used."""
        frame = video[0].tobytes()
        if frame not in self.scenes:
            self.scenes[frame] = fit_scene(video[0], clip["kind"])
        return dict(clip, scene=self.scenes[frame])

    def score(self, videos, waves, known=True):
        """-> records, figures of the row. known: generated for these clips' events."""
        def f1(a, b):
            return event_record(a, b)["f1_50"]

        drawn = toybox_records(videos, [self.fitted(*pair) for pair in zip(self.clips, videos)])
        found = [r["detected_times"] for r in drawn]
        truth = [c["events"] for c in self.clips]
        # Chance: the sound against another clip's picture, or events.
        other_found, other_truth = shuffled(found), shuffled(truth)
        records = []
        for i, (clip, wave) in enumerate(zip(self.clips, waves)):
            sounding = onsets_in_sound(wave)
            # The streams against each other.
            record = labels(clip) | dict(
                detected_times=found[i], residual=drawn[i]["residual"],
                agreement_f1_50=f1(found[i], sounding),
                agreement_shuffled=f1(other_found[i], sounding))
            # Either stream against the events that it was generated for.
            if known:
                scores = event_record(truth[i], sounding)
                record |= {f"onsets_{k}": v for k, v in scores.items()}
                _, merged = cyclesync(onsets(clip["audio"], RATE), onsets(wave, RATE),
                                      self.args.tolerance)
                record |= dict(onsets_shuffled=f1(other_truth[i], sounding),
                               video_f1_50=drawn[i]["f1_50"], cyclesync_merged=merged)
            # False events where nothing happens: a scene without sound, or a sound from off-screen.
            if len(truth[i]) == 0 and clip["off_screen"]:
                record["false_off_screen"] = len(found[i])
            elif len(truth[i]) == 0:
                record |= dict(false_silent=len(found[i]), false_onsets=len(sounding))
            records.append(record)
        features = latent_features(self.vae, videos)
        return records, dict(frechet_mels=frechet(mel_features(waves), self.truth["mels"]),
                             frechet_latent=frechet(features, self.truth["latents"]))

    def more_rows(self, table):
        for mode in [m for m in MODES if f"{m}_plain" in table.result]:
            value, low, high = gain = table.gain("agreement_f1_50", mode, f"{mode}_plain")
            table.result[f"{mode}_gain"] = gain
            print(f"{MODES[mode]}: guidance adds {value:+.3f} [{low:+.2f}, {high:+.2f}] to the "
                  "agreement")
        if self.harmony:
            add_timbre(table, self)
            add_maps(table, self)

    def ablation_row(self, **guidance):
        """SyncFlow: a sound for the true video. Harmony: pairs from the first picture, and either
        stream for the other one."""
        row = super().ablation_row
        if not self.harmony:
            return row(mode="v2a", **guidance)
        records, figures = row(mode="i2av", **guidance)
        a2v, _ = row(mode="a2v", **guidance)
        v2a, _ = row(mode="v2a", **guidance)
        for record, video, sound in zip(records, a2v, v2a):
            record |= dict(a2v_f1_50=video["video_f1_50"], v2a_f1_50=sound["onsets_f1_50"])
        return records, figures


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
    return [list(islice(other_takes(clip["seed"]), n)) for clip in clips]


def timbre_records(waves, takes, clips):
    """-> records of `closer`: over all other clips of the same kind, how often a sound's timbre is
    nearer to its own clip's material than to that clip's. A material's timbre is the mean of its
    `takes`. Chance is 0.5; true sounds have 0.95, since some materials of a kind are alike."""
    # One timbre per material.
    voices = [np.mean([timbre(t) for t in some], 0) for some in takes]   # (64,) each
    eventful = [i for i, c in enumerate(clips) if len(c["events"])]
    records = []
    for i, (clip, wave) in enumerate(zip(clips, waves)):
        scores = event_record(clip["events"], onsets_in_sound(wave))
        record = labels(clip) | dict(onsets_f1_50=scores["f1_50"])
        others = [j for j in eventful
                  if clips[j]["kind"] == clip["kind"] and clips[j]["name"] != clip["name"]]
        if i in eventful and others:
            sound = timbre(wave)
            distance = [np.abs(sound - voice).mean() for voice in voices]
            record["closer"] = float(np.mean([distance[i] < distance[j] for j in others]))
        records.append(record)
    return records


def add_timbre(table, towers):
    """Voice clone: do sounds generated with a reference have the timbre of its material?"""
    variations = other_variations(towers.clips)
    takes = [v[1:] for v in variations]
    # The first take is the reference, the others say what its material sounds like.
    refs = torch.cat([encode_sound(towers.audio_vae, v[0], towers.device) for v in variations])
    rows = dict(true=towers.sounds, vae=towers.reconstructed_sounds,
                no_reference=towers.generate("v2a", **towers.guidance)[1],
                reference=towers.generate("v2a", refs=refs, **towers.guidance)[1])
    table.head(dict(closer="closer in timbre", onsets_f1_50="onset F1"))
    for name, waves in rows.items():
        records = timbre_records(waves, takes, towers.clips)
        table.add(f"timbre_{name}", f"timbre, {name.replace('_', ' ')}", records)


def map_records(maps, clips):
    """Harmony's figures 3 and 5 in numbers, for two maps: the attention of the audio while
    something sounds, and the difference that SyncCFG adds. -> records: the mean of the map where
    the thing can move, over its mean in the whole picture; 1 = no preference."""
    attention = torch.cat([m["attention"] for m in maps]).sum(2)             # (B, S, h, w)
    # Without a guided step, as in one step from noise, there are none.
    pulls = [m["sync_pull"].mean(1) for m in maps if "sync_pull" in m]       # (B, h, w) each
    S = attention.shape[1]
    found = dict(attention=[])
    if pulls:
        pulls = torch.cat(pulls)
        found["SyncCFG"] = []
    for i, clip in enumerate(clips):
        events = clip["events"]
        if len(events) == 0 and not clip["off_screen"]:
            continue
        # Where the thing can move: pixels that differ between its states, by a tenth of the range.
        states = np.linspace(*STATES[clip["kind"]], 9)
        drawn = draw_scene(clip["scene"], states, clip["video"].shape[1])        # (9, H, W, 3)
        moves = torch.from_numpy(np.ptp(drawn, 0).max(-1) > 24).float()          # (H, W)
        # When something sounds: 0.1 s from every event on; always if it is off-screen.
        steps = np.arange(S)
        if len(events):
            first = (events * S / (len(clip["video"]) / FPS)).astype(int)
            steps = (first[:, None] + np.arange(5)).ravel().clip(max=S - 1)
        group = "things that sound" if len(events) else "off-screen sounds"
        for name in found:
            cell = attention[i, steps].mean(0) if name == "attention" else pulls[i]
            # The share of the map on these places, over the share of the picture that they are.
            inside = cell / cell.sum() * F.adaptive_avg_pool2d(moves[None], cell.shape)[0]
            found[name].append(labels(clip) | {group: (inside.sum() / moves.mean()).item()})
    return found


def add_maps(table, towers):
    """Rows of `map_records`, of the videos that are generated for the true sounds."""
    maps = []
    towers.generate("a2v", attention_maps=maps, **towers.guidance)
    table.head({group: group for group in ("things that sound", "off-screen sounds")})
    found = map_records(maps, towers.clips)
    for name, records in found.items():
        table.add(name, f"map of {name}", records)
    table.result["maps"] = {name: table.result.pop(name) for name in found}


# ---------------------------------------------------------------------- the steps study

# Euler steps that are tried. All are compared with the first, with the checkpoint's guidance.
STUDY_STEPS = (30, 10, 6, 4, 3, 2, 1)
# Scales that --guidance-study tries, the paper's first: s_v, s_a of Harmony, w of SyncFlow.
STUDY_SCALES = dict(
    harmony=((3., 2.), (2., 2.), (3., 1.5), (2., 1.5), (1.5, 1.5), (3., 1.), (1., 2.)),
    syncflow=((6.,), (4.,), (3.,), (2.,)))
# The highest noise levels at which they act: all; .7 as for SiT on ImageNet (REPA, Yu et al. 2024).
# Under Harmony's shift of 5, 68 % of the steps are above .7 and 21 % above .95.
STUDY_BOUNDS = (1., .95, .7)
# Added to --seed: steps are chosen on clips that are in no table of this file.
STUDY_SEED = 1000
# What decides, where a row has it, and whether more of it is better. F1 and agreement do not notice
# a smear at the right time, the residual does.
DECIDING = dict(f1_50=1, onsets_f1_50=1, video_f1_50=1, agreement_f1_50=1, motion=1, residual=-1)
# As good: no figure is worse by more than this, with a probability of 97.5 % (the lower end of the
# paired bootstrap interval). 48 clips have about 75 events; .02 of their F1 is 3 missed ones.
MARGIN = .02
# And no Frechet distance is longer than so many times that with 30 steps: sounds in few steps begin
# at the right time, but are less varied than true ones. 48 clips of SyncFlow, a sound for a video:
# 7.5 with 30 steps, 10.6 with 10, 14.7 with 6, 22 with 3, whose onset F1 is not lower. (Small
# distances are noise: true sounds of other takes, drawn five times, have 1.4 to 2.9. Rows have the
# noise of their clips and seeds in common, which cancels most of it.)
FARTHEST = 1.25


def compare_steps(row, reference, deciding=DECIDING):
    """Records and figures of two rows of the same clips -> is the first as good?

    Of every figure in `deciding` the paired difference (positive = better) is taken; the one whose
    95 % interval reaches lowest decides. `gain`: that difference and its interval, as text.
    `least_gain`: the lower end, -inf where one clip gives no interval. `frechet_ratio`: the largest
    ratio of a Frechet distance of the first row to that of the other."""
    gains = []
    for figure, sign in deciding.items():
        value, low, high = interval(sign * paired(row[0], reference[0], figure))
        # What does not differ at all, such as the figures of a given stream, says nothing.
        if math.isfinite(value) and (value, low, high) != (0, 0, 0):
            # Of one clip nothing is known about others: that may be any loss.
            gains.append((-math.inf if math.isnan(low) else low, value, high))
    low, value, high = min(gains, default=(0., 0., 0.))
    # A stream that is given has the distance 0, up to rounding.
    ratios = [row[1][k] / far for k, far in reference[1].items() if "frechet" in k and far > 1e-6]
    return dict(gain=f"{value:+.3f} [{low:+.2f}, {high:+.2f}]", least_gain=low,
                frechet_ratio=max(ratios, default=1.))


def study(scorer, rows, steps_tried):
    """Every mode with every guidance and number of steps, compared with its first row -> `Table`.
    rows: pairs of a mode and {name: settings}."""
    which = "clips of the two studies alone" if scorer.toybox else "windows of training clips"
    print(f"{scorer.described}\n{scorer.args.ckpt}: step {scorer.ckpt['step']}; "
          f"{len(scorer.clips) // scorer.args.draws} {which}; in brackets "
          "95 % intervals over clips; gain: over the first row, of the figure whose interval "
          "reaches lowest")
    columns = {k: title for k, title in scorer.columns.items() if k in DECIDING or "frechet" in k}
    table = Table(columns | dict(gain="gain", frechet_ratio="Frechet / of first",
                                 seconds="seconds per clip"))
    for mode, variants in rows:
        print(MODES[mode])
        deciding = dict(DECIDING)
        if mode == "t2av":
            # Some pictures made from text fit no scene: residuals of 3 to 30, which decide nothing.
            del deciding["residual"]
        reference = None
        for name, steps in product(variants, steps_tried):
            scorer.steps = steps
            start = time.perf_counter()
            generated = scorer.generate(**variants[name])
            seconds = (time.perf_counter() - start) / len(scorer.clips)
            records, figures = row = scorer.score(*generated)
            reference = reference or row
            figures = figures | compare_steps(row, reference, deciding) | dict(seconds=seconds)
            title = f"  {name}" + f", steps: {steps}" * (len(steps_tried) > 1)
            table.add(f"{mode}_{name}_{steps}", title, records, figures)
    return table


def steps_study(args):
    """How few Euler steps are as good as 30, with the checkpoint's guidance and without any?

    Along a straight path from noise to data one step is exact. Paths bend where noise may become
    several things: the less the conditions leave open, the fewer steps are enough. Guidance bends
    them further, so that without it fewer may do."""
    scorer = open_scorer(args.ckpt, args)
    modes = dict(scorer.study_rows())
    # On Pyramid Flow each of three resolutions takes a step.
    least = 3 if getattr(scorer.model.cfg, "context_sigma", "") == "shared" else 1
    tried = [n for n in STUDY_STEPS if n >= least]
    table = study(scorer, modes.items(), tried)
    # In every mode: the fewest steps down to which all are as good
    enough = dict(guided=[], plain=[])
    for mode, name in product(modes, enough):
        fewest = None
        for n in tried:
            row = table.result[f"{mode}_{name}_{n}"]
            if not (row["least_gain"] >= -MARGIN and row["frechet_ratio"] <= FARTHEST):
                break
            fewest = n
        enough[name].append(fewest)

    # A checkpoint is used in all modes.
    found = {name: None if None in steps else max(steps) for name, steps in enough.items()}
    table.result["recommended_steps"] = found
    print(f"steps that are enough (at most {MARGIN} worse than {STUDY_STEPS[0]} guided ones, "
          f"Frechet distances up to {FARTHEST} times as long): "
          + ", ".join(f"{name} {n or 'none'}" for name, n in found.items()))
    table.finish(Path(args.out, "steps.csv"))


def guidance_study(args):
    """Which scales of guidance, at which noise levels, make two streams agree and still sound like
    true ones? Strong guidance does the first at the cost of the second (the Frechet distances)."""
    scorer = Towers(args.ckpt, args)
    print(f"{scorer.steps} steps; rows: scales (s_v, s_a, or w), and the highest noise level at "
          "which they act")
    table = study(scorer, scorer.guidance_rows(), (scorer.steps,))
    table.finish(Path(args.out, "guidance.csv"))


# ---------------------------------------------------------------------- the stress split

# A sound from off-screen is at most that loud beside events, of the loudest (`toybox.record`).
OFF_SCREEN = .12
# Seconds: the least distance of six events in a clip. In training it is .22 (lamps) to .44; nearer
# ones than .2 cannot be read in all true videos (F1 of mouths .82 at .18).
CLOSE = .2
ROLLOUT = 60                    # seconds: thirty clips of training in a row


def other_takes(seed, kind=None):
    """Sounds of a toybox clip's thing, or of one of another kind, at other times in other rooms."""
    takes = (toybox_clip(seed, kind=kind, video=False, variation=k) for k in range(1, 100))
    return (take["audio"] for take in takes if len(take["events"]))


def mix(sound, other, measure, level=1.):
    """Two sounds (samples,), the second of `level` times the loudness (np.std, np.ptp) of the first
    -> their sum, within [-1, 1]."""
    both = sound + level * measure(sound) / measure(other) * other
    return (both / max(1, np.abs(both).max())).astype(np.float32)


def stress_clips(clips):
    """Toybox clips in which something happens, made harder -> {condition: clips}. What should move
    is the thing in the picture, at its own events, and these can be known:

    plain          as they are
    two sounds     beside another thing, as loud. A mouth sings, all else is struck: beside a mouth
                   it is a ball, else a mouth, and the picture shows which sound is meant
    noise, 0 dB    beside white noise of the same power
    off-screen     beside the same thing in another room. Neither picture nor timbre says which
                   sounds are meant, the level does: events are at most 8 dB below the loudest of
                   them, the other sounds 18. The rule "an onset within 10 dB of the loudest" has
                   F1 1.000, as on plain clips
    six events     closer than in training; without rollers, which need 0.85 s from one pin to the
                   next"""
    conditions = ("plain", "two sounds", "noise, 0 dB", "off-screen", "six events")
    found = {condition: [] for condition in conditions}
    for clip in [clip for clip in clips if len(clip["events"])]:
        seed, kind, sound = (clip[key] for key in ("seed", "kind", "audio"))
        rng = np.random.default_rng([seed, 1732])
        other = next(other_takes(seed, "ball" if kind == "mouth" else "mouth"))
        sounds = {"plain": sound,
                  "two sounds": mix(sound, other, np.std),
                  "noise, 0 dB": mix(sound, rng.standard_normal(len(sound)), np.std),
                  "off-screen": mix(sound, next(other_takes(seed)), np.ptp, OFF_SCREEN)}
        for condition, wave in sounds.items():
            found[condition].append(dict(clip, audio=wave))
        if kind != "roller":
            # What the least distances leave of the clip is shared out at random.
            first, _ = TIMING[kind]
            slack = FRAMES / FPS - FREE_END - first - 5 * CLOSE
            events = first + np.cumsum([0., *(CLOSE + slack * rng.dirichlet(np.ones(6))[:5])])
            dense = toybox_clip(seed, clip["video"].shape[1], events=events)
            found["six events"].append(clip | dense)
    if not all(found.values()):
        raise BadInput(f"--clips {len(clips)}: in too few of them something happens; give more")
    return found


def rollout(clip):
    """A minute of a clip's thing."""
    frames = ROLLOUT * FPS + 1
    # Of the video, `generate` uses the first frame and the length.
    video = np.broadcast_to(clip["video"][0], (frames, *clip["video"][0].shape))
    return clip | toybox_clip(clip["seed"], frames=frames, video=False) | dict(video=video)


def stress(args):
    """The table of a checkpoint on `stress_clips` and on a minute in one piece: models that make no
    error on plain clips can be compared there."""
    if args.data != "toybox":
        raise BadInput(f"--stress with --data {args.data}: the stress split is one of the toybox; "
                       "leave --data out")
    scorer = AudioToVideo(args.ckpt, args)
    conditions = stress_clips(scorer.clips)
    plain = conditions["plain"]
    # So few that they take no more than three times as long as all else.
    conditions["60 s"] = [rollout(clip) for clip in plain[:math.ceil(len(plain) / 6)]]
    windows = {"60 s": {"60 s, the first 10": (0, 10),
                        "60 s, the last 10": (ROLLOUT - 10, ROLLOUT)}}
    print(f"{scorer.described}\n{args.ckpt}: step {scorer.ckpt['step']}; the "
          f"{len(plain) // args.draws} of {args.clips} held-out clips in which something happens, "
          f"{len(conditions['60 s'])} for 60 s; {scorer.steps} steps; w_t = "
          f"{scorer.guidance['cfg']:g}; in brackets 95 % intervals over clips")
    # false: events detected more than 100 ms from any true one; onsets: all of the sound, without
    # the picture. A model that takes every onset for an event scores as much.
    table = Table(dict(f1_50="F1 50 ms", false_per_s="false / second", residual="residual",
                       off_sync="F1 off-sync", onsets="F1 of all onsets"))
    asg, cfg = (scorer.guidance[rule] for rule in ("asg", "cfg"))
    for condition, clips in conditions.items():
        guided, _, _ = scorer.generate(asg, cfg, clips=clips)
        # Without the sound these are the plain clips, and so are their off-sync videos.
        if condition not in ("two sounds", "noise, 0 dB", "off-screen"):
            off_sync, _, _ = scorer.generate(cfg=cfg, use_audio=False, clips=clips)
        for title, span in windows.get(condition, {condition: ()}).items():
            rows = [toybox_records(videos, clips, *span) for videos in (guided, off_sync)]
            records = []
            for clip, record, other in zip(clips, *rows):
                times = onsets_in_sound(clip["audio"])
                start, end = span or (0, math.inf)
                onset = event_record(record["true_times"], times[(times >= start) & (times < end)])
                figures = dict(off_sync=other["f1_50"], onsets=onset["f1_50"])
                records.append(labels(clip) | record | figures)
            table.add(title, title, records)
    table.finish(Path(args.out, "stress.csv"))


# ---------------------------------------------------------------------- negatives of guidance

# What the other prediction lacks; the rows of the network for a clip, in double and single blocks:
# only single blocks have audio layers, so that rows which skip them begin there.
#
#     wave --> log-mel --> MelEncoder, norm --> features --> keys, values --> audio layers --> v
#     silent: 0                               zero: 0                         skipped
#
# Zeros stand where Hallo and LatentSync put them: behind the encoder, before the keys and values,
# of which the biases are left. So the audio layers add a constant.
#
# How much the layers add, as RMS of the values over that for true sounds (weights/a2v-toybox.pt and
# a2v-real.pt): for zeros 0.06-0.15, for silence 0.3-0.9.
#
# Equal w is not equal strength. Training skipped the audio layers in a tenth of the steps and the
# captions in a tenth; silence is 8 % of its clips; zeros never occurred. With a2v-real.pt, whose
# clips share one caption, the last row equals the first.
NEGATIVES = dict(none=("no guidance", "1, 1"),
                 skipped=("audio layers skipped", "1, 2"),      # Syncphony's Audio Sync Guidance
                 zero=("zeros as features", "2, 2"),            # usual in audio-driven models
                 silent=("silence as sound", "2, 2"),           # the idea of Harmony's SyncCFG
                 # (zero and silent could share the double blocks, "1, 2": their seconds are bounds)
                 null=("empty caption", "2, 2"))                # text guidance, as a control


def sample_away_from(negative, w, model, z0, n, audio, text, cfg, **settings):
    """`sample_autoregressive` with guidance of weight w away from rows of the same text whose audio
    features are zero, or those of silence. These rows take the place of those without text, so that
    cfg, which every sampler gets, has to be 0."""
    other = torch.zeros_like(audio)
    if negative == "silent":
        silence = data.log_mel(np.zeros(audio.shape[1] * RATE // 50, np.float32))
        other = other + model.encode_audio(torch.from_numpy(silence)[None].to(audio.device))
    audio = torch.cat([audio, other])
    text = [torch.cat([part, part]) for part in text]
    yield from sample_autoregressive(model, z0, n, audio, text, cfg=w, **settings)


def negatives(args):
    """What should guidance lead away from? One network and one formula, v + w (v - v_negative),
    with every v_negative of NEGATIVES; three seeds of clips and noise. (Of real clips there are so
    few that a seed may have the same ones, with other noise.)"""
    runs = {}                                    # condition, negative, w: records of every seed
    seconds = {name: [] for name in NEGATIVES}
    variants = {("none", 0.): {}}
    for w in (1., 2.):
        variants["skipped", w] = dict(asg=w)
        variants["null", w] = dict(cfg=w)
        for negative in ("zero", "silent"):
            variants[negative, w] = dict(sampler=partial(sample_away_from, negative, w))
    for seed in range(args.seed, args.seed + 3):
        args.seed = seed
        scorer = AudioToVideo(args.ckpt, args)
        if scorer.encoders:
            raise BadInput(f"--negatives: {args.ckpt} was trained on top of Pyramid Flow, whose "
                           "sampler has no such rows; give one that was trained from scratch")
        conditions = {"real clips": scorer.clips}
        if scorer.toybox:
            conditions = stress_clips(scorer.clips)
        # They take turns: what else the machine does slows all of them.
        turns = list(product(conditions, variants))
        for condition, variant in tqdm(turns, desc=f"seed {seed}", disable=None, leave=False):
            clips = conditions[condition]
            start = time.perf_counter()
            videos, _, _ = scorer.generate(clips=clips, **variants[variant])
            seconds[variant[0]].append((time.perf_counter() - start) / len(videos))
            records = (toybox_records(videos, clips) if scorer.toybox
                       else motion_records(videos, scorer.analysed, scorer.reconstructed))
            records = [labels(clip) | dict(seed=f"{seed}") | record
                       for clip, record in zip(clips, records)]
            runs.setdefault((condition, *variant), []).append(records)

    columns = dict(f1_50="F1 50 ms", residual="residual", false_per_s="false / second")
    if not scorer.toybox:
        columns = dict(motion="motion agreement", hits="hit agreement", flicker="flicker")
    print(f"{scorer.described}\n{args.ckpt}: step {scorer.ckpt['step']}; {scorer.steps} steps; "
          "mean ± deviation of three seeds; gain: over no guidance, of the same clips and noise, "
          "with its 95 % interval over clips; cost: rows of the network in double and single "
          "blocks, seconds per clip")
    negatives_table(columns, runs, seconds).finish(Path(args.out, "negatives.csv"))


def negatives_table(columns, runs, seconds):
    """columns: figures and their titles; runs: (condition, negative, w) -> records of every seed;
    seconds: negative -> seconds per clip -> `Table` of the figures, and of their gains."""
    with_gains = {}
    for key, title in columns.items():
        with_gains |= {key: title, f"{key}_gain": "gain"}
    table = Table(with_gains | dict(cost="cost"))
    for (condition, negative, w), of_seeds in runs.items():
        records = list(chain(*of_seeds))
        plain = list(chain(*runs[condition, "none", 0.]))
        name, rows = NEGATIVES[negative]
        cost = float(np.median(seconds[negative]))
        figures = dict(interval={}, rows=rows, seconds=cost, cost=f"{rows}; {cost:.2f} s")
        for key in columns:
            figures[key] = [resample_clips(of_seed, key)[0] for of_seed in of_seeds]
            gain = interval(paired(records, plain, key))
            figures[f"{key}_gain"], *figures["interval"][f"{key}_gain"] = gain
        if negative == "none":
            print(condition)
        title = f"  {name}" + f", {w:g}" * (w > 0)
        table.add(f"{condition}, {negative}, {w:g}", title, records, figures)
    return table


# ---------------------------------------------------------------------- the shift study

def draw_curves(path, x, curves, xlabel, ylabel):
    """A line plot where matplotlib is installed. curves: name -> values at x."""
    if not find_spec("matplotlib"):
        print(f"{path} is not drawn: pip install matplotlib")
        return
    from matplotlib.figure import Figure
    axes = Figure(figsize=(9, 4.2), layout="constrained").subplots()
    for name, values in curves.items():
        axes.plot(x, values, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.figure.legend(loc="outside right upper")             # beside the curves, not on them
    with replacing(path) as part:
        axes.figure.savefig(part)


def shift_study(args):
    """Syncphony figure 7, tables 5, 6: what every metric says of true videos whose sound is 0 to
    0.5 s late. The sound is not moved within the clip, which would leave a gap: what precedes the
    clip is known and takes its place. (Without delay the oracle has the true sound's noise sample
    by sample, so that a part of the first fall of CycleSync is not timing: see `oracle`.)"""
    lead, delays = .5, np.arange(6) / 10
    clips = held_out_clips(args, args.resolution or 64, lead)
    models, v2a_name = v2a_models(args, clips)
    n = round(len(clips[0]["video"]) / FPS * RATE)
    # The videos stay as they are, so they are analysed once.
    bar = tqdm(clips, desc="videos", disable=None, leave=False)
    analyses = [analyse_video(c["video"], f) for c, f in zip(bar, models)]
    curves = [motion_energy(c["video"]) for c in clips]
    toybox = args.data == "toybox"
    found = [detect_clip_events(c["video"], c)[0] if toybox else () for c in clips]
    columns = (dict(f1_50="F1 50 ms") if toybox else {}) | SYNC_COLUMNS
    print(f"{len(clips)} true clips; CycleSync by {v2a_name}; in brackets 95 % intervals over "
          "clips")
    table = Table(columns | dict(lag_ms="lag, ms"))

    def add_row(key, title, late, sources):
        """Every clip with the sound of one of `sources`, `late` seconds late."""
        waves = [c["audio"][round((lead - late) * RATE):][:n] for c in sources]
        times = [onsets(w, RATE) for w in waves]
        records = sync_records(times, analyses, clips, args.tolerance)
        for i, record in enumerate(records):
            strength = onset_strength(waves[i], RATE)
            record["lag_s"], record["lag_confidence"] = lag(curves[i], FPS, strength)
            # True events are as late as the sound; those after its end do not count.
            if toybox:
                events = sources[i]["events"] + late
                record |= event_record(events[events < n / RATE], found[i])
        table.add(key, title, records, dict(lag_ms=median_lag(records)))

    for delay in delays:
        add_row(f"{delay:.1f}", f"{delay:.1f} s late", delay, clips)
    add_row("shuffled", "another clip's sound", 0., shuffled(clips))
    # The paper's figure: every metric as a share of its value without delay.
    rows = [table.result[f"{d:.1f}"] for d in delays]
    shares = {title: [r[key] / rows[0][key] for r in rows] for key, title in columns.items()
              if rows[0].get(key, NAN) > 0}
    path = Path(args.out, "shift.csv")
    draw_curves(path.with_suffix(".png"), delays, shares, "delay of the sound, seconds",
                "score / score at 0")
    table.finish(path)


# ---------------------------------------------------------------------- the ablations

# flags: of train.py, for every training. towers: stages that come first, each from the one before;
# stage: that of the rows, which starts from the last tower. paper: what it reports.
# figures: of the table; stress: conditions of `stress_clips`, whose F1 at 50 ms is in a second one.
# A row: title, the paper's figure, flags of train.py, guidance, the row that it is compared with.
# Equal flags share one training.
# quick: steps of the trainings of --quick. shipped: the file whose weights --quick starts from, and
# the part of it that all rows train anew, since it is what they compare; Syncphony's paper, too,
# adds its audio layers to a trained network. (The rest was trained together with that part, which
# may favour the full system: it is a trial, not a result.)
# euler: steps of sampling, of all rows, with guidance or without: as many as train.py's files
# recommend or more; of SyncFlow 25, since F1 is the same from 10 to 30.
NO_CTS = "--lambda-v 0 --lambda-a 0"                # cross-task synergy off
SYNCCFG = dict(sync_video=3., sync_audio=2.)        # SyncCFG on, with the paper's scales
ABLATIONS = dict(
    # CycleSync on AVSync15: tables 3, 4, 11. Young models miss events of plain clips too, so that
    # no row is at the ceiling.
    syncphony=dict(
        flags="--task a2v", towers=(), stage="", paper="CycleSync",
        quick=200, shipped=(A2V_FILE, "audio"), euler=6,
        figures="f1_50 f1_100 cyclesync_set cyclesync_merged residual frechet_latent".split(),
        stress=("two sounds", "noise, 0 dB", "off-screen", "six events"),
        rows=[("without motion-aware loss", "15.18 ± 1.48", "--lambda-motion 0", dict(asg=0.),
               "full model"),
              ("without Audio RoPE", "14.41 ± 1.40", "--no-audio-rope", dict(asg=0.),
               "full model"),
              ("off-sync (audio skipped)", "12.34 ± 1.14", "", dict(use_audio=False),
               "full model"),
              ("full model", "15.31 ± 1.49", "", dict(asg=0.), ""),
              ("with ASG, w_a = 1", "15.94 ± 1.56", "", dict(asg=1.), "full model"),
              ("with ASG, w_a = 2", "16.48 ± 1.28", "", dict(asg=2.), "full model"),
              ("with ASG, w_a = 4", "16.26 ± 1.40", "", dict(asg=4.), "full model")]),
    # FAD on Greatest Hits, lower is better: table 4; figure 5 sweeps w.
    syncflow=dict(
        flags="--task t2av", towers=("--stage video",), stage="--stage audio", paper="FAD",
        quick=550, shipped=(T2AV_FILE, "audio"), euler=25,
        figures="onsets_f1_50 onsets_f1_100 onsets_shuffled cyclesync_merged frechet_mels".split(),
        stress=(),
        rows=[("full, sound for video", "0.92", "", dict(cfg=1.), ""),
              ("without adaptor", "2.34", "--no-adaptor", dict(cfg=1.), "full, sound for video"),
              # (Its encoder of captions is the video tower's, frozen as in the paper.)
              ("text to sound, no video", "1.01", "--no-video", dict(cfg=1.),
               "full, sound for video"),
              ("with optimal transport", "(its default)", "--ot", dict(cfg=1.),
               "full, sound for video"),
              *[(f"full, w = {w}", "(its default)" * (w == 6), "", dict(cfg=float(w)),
                 "full, sound for video") for w in (2, 3, 4, 6, 8)]]),
    # Sync-C on speech: one part after the other (main paper), all but one (supplement, table 4,
    # where `+ CTS` is the row without SyncCFG and `+ RoPE alignment` that without CTS as well).
    # Equal steps are not equal compute: one with CTS has three forwards. The stage "timbre" is left
    # out, since no row measures it, and the stages have one --lr (in --stage all the last has .6).
    harmony=dict(
        flags="--task joint --batch-size 8", towers=("--stage video", "--stage audio"),
        stage="--stage joint", paper="Sync-C",
        quick=110, shipped=(JOINT_FILE, "bridge"), euler=15,
        figures="agreement_f1_50 agreement_shuffled a2v_f1_50 v2a_f1_50 residual".split(),
        stress=(),
        rows=[("none of it", "4.20", f"{NO_CTS} --no-rope-align --no-gldi", PLAIN, ""),
              ("+ GLDI", "4.29", f"{NO_CTS} --no-rope-align", PLAIN, "none of it"),
              ("+ RoPE alignment", "4.80", NO_CTS, PLAIN, "+ GLDI"),
              ("+ CTS", "5.09", "", PLAIN, "+ RoPE alignment"),
              ("+ SyncCFG: full", "6.51", "", SYNCCFG, "+ CTS"),
              ("full but RoPE alignment", "5.60", "--no-rope-align", SYNCCFG, "+ SyncCFG: full"),
              ("full but GLDI", "5.30", "--no-gldi", SYNCCFG, "+ SyncCFG: full"),
              ("full but CTS", "1.13", NO_CTS, SYNCCFG, "+ SyncCFG: full")]))
# Harmony's figure 3, how soon a training learns its tasks: the flags of the trainings.
LEARNING = {"audio-driven alone": "--lambda-joint 0 --lambda-v 1 --lambda-a 0",
            "joint loss alone": NO_CTS, "CTS": ""}


def ablate(args):
    """Train every variant with every seed, score its rows; then the tables: mean ± standard
    deviation over seeds, and what rows have more than the one they are compared with, with 95 %
    intervals over seeds (of --quick, which has one, over clips).

    What is done is kept: the same command goes on where it stopped, within a training too. Started
    several times at once, on one machine, it shares the trainings:

        process 1   video tower 0 > audio tower 0 > row a, seed 0 > row d, seed 0 > ..
        process 2   video tower 1 > audio tower 1 > row b, seed 0 > row a, seed 1 > ..  > tables
        process 3   video tower 2 > audio tower 2 > row c, seed 0 > row b, seed 1 > ..
    """
    ablation = ABLATIONS[args.ablate]
    towers, stage, rows = (ablation[key] for key in ("towers", "stage", "rows"))
    learning = LEARNING if args.ablate == "harmony" else {}
    seeds = range(args.seed, args.seed + (1 if args.quick else 3))
    steps, training_clips = ablation_settings(ablation, args)
    # --quick starts from shipped weights, so that its minutes go into what the rows compare. (With
    # other autoencoders it trains all: none are shipped for their latents.)
    shipped = ablation["shipped"] if args.quick and not (args.vae or args.audio_vae) else None
    root = ablation_folder(args, steps, training_clips, shipped)
    towers, trained = ((), shipped_weights(*shipped, root)) if shipped else (towers, [])
    # Rows with the same flags share a training.
    variants = dict.fromkeys([*[row[2] for row in rows], *learning.values()])
    parts = [*[(tower, "") for tower in towers], *[(stage, flags) for flags in variants]]
    # Curves need evaluations on the way.
    curves = learning and not args.quick
    every = dict.fromkeys(towers, steps) | {stage: steps // 4 if curves else steps}

    def scored(seed, part, flags):
        return training_folder(root, part, flags, seed) / f"scores-{args.clips}-{args.steps}.json"

    # A training that has its scores is skipped; one that was stopped goes on from its last.pt.
    trainings = missing = list(product(seeds, parts))
    while missing:
        for seed, (part, flags) in missing:
            args.seed = seed                 # of the training, its held-out clips, their noise
            # A tower starts from the one before, all rows from the last.
            before = towers[:towers.index(part)] if part in towers else towers
            start = scored(seed, before[-1], "") if before else None
            file = scored(seed, part, flags)
            file.parent.mkdir(parents=True, exist_ok=True)
            with data.locked(file.parent, wait=False) as lock:
                # Else another process is at work on it, or on the tower.
                if lock and not file.is_file() and (start is None or start.is_file()):
                    init = ["--init", start.parent / "best.pt"] if start else trained
                    run_training(args, file.parent, lock, [
                        *f"{ablation['flags']} {part} {flags}".split(), *init, "--steps", steps,
                        "--clips", training_clips, "--sample-every", every[part]])
                    score_rows(file, curves, part, flags, ablation, args)
        missing = [(seed, part) for seed, part in trainings if not scored(seed, *part).is_file()]
        if missing:
            time.sleep(5)                    # other processes are at work on these
    print(f"training: {steps} steps on {training_clips} clips, seeds {[*seeds]}; scores: of "
          f"{args.clips} held-out clips, {args.steps} Euler steps")
    files = [scored(seed, *part) for seed, part in trainings]
    table = ablation_tables(ablation, read_scores(files), seeds)
    if learning:
        add_learning(table, root, stage, seeds)
    table.finish(root / "clips.csv")


def ablation_settings(ablation, args):
    """-> steps and clips of a training; sets what `args` leaves open: dtype, Euler steps, clips."""
    # Rows differ in what they are about alone: not in which dtype was timed as the faster one.
    args.dtype = "float32" if args.dtype == "auto" else args.dtype
    args.steps = args.steps or ablation["euler"]
    if not args.quick:
        return args.train_steps or 800, 2000
    args.clips = min(32, args.clips)
    return args.train_steps or ablation["quick"], 800


def ablation_folder(args, steps, training_clips, shipped):
    """What changes the figures is in its name: other settings have other files. Autoencoders and
    towers are named by their content, since most files are called best.pt."""
    paths = [args.vae, args.audio_vae, shipped and shipped[0]]
    others = [f"{zlib.crc32(Path(path).read_bytes()):08x}" for path in paths if path]
    others += [args.dtype] if args.dtype != "float32" else []
    name = ["ablation", args.ablate, f"{steps}", f"{training_clips}", *others]
    return Path(args.out, "-".join(name))


def shipped_weights(path, part, root):
    """-> flags that start a training from a shipped file without the weights of `part`, which is
    trained anew."""
    content = data.load_checkpoint(path)

    def is_left_out(name):
        # Syncphony has one network: its "audio" are the encoder of mels and the audio layers.
        if content["task"] == "a2v":
            return name.startswith("mel_encoder") or ".audio." in name
        return part_of(name) == part

    content["ema"] = {name: w for name, w in content["ema"].items() if not is_left_out(name)}
    root.mkdir(parents=True, exist_ok=True)
    data.save_checkpoint(root / "start.pt", **content)
    return ["--init", root / "start.pt"]


def score_rows(file, curves, part, flags, ablation, args):
    """Score the rows of one training and write them: all records, so that any two rows can be
    compared clip by clip later. Every training seed meets other held-out clips."""
    rows = {title: guidance for title, _, row_flags, guidance, _ in ablation["rows"]
            if (part, flags) == (ablation["stage"], row_flags)}
    # Rows are compared after equal steps; with several evaluations best.pt may be of fewer.
    weights = file.parent / ("last.pt" if curves else "best.pt")
    scorer = open_scorer(weights, args) if rows else None
    kept = ("clip", "kind", "source", *ablation["figures"], *ablation["stress"])
    result = {}
    for title, guidance in tqdm(rows.items(), desc="scoring", disable=None, leave=False):
        records, figures = scorer.ablation_row(**guidance)
        for condition in ablation["stress"]:
            records += scorer.stress_row(condition, **guidance)
        # Without nan, which is not equal to itself: what a clip lacks.
        known = [{key: record[key] for key in kept if key in record and record[key] == record[key]}
                 for record in records]
        distances = {key: figures[key] for key in kept if key in figures}
        result[title] = dict(records=known, figures=distances)
    data.write_text(file, json.dumps(result, default=float))


def read_scores(files):
    """What `score_rows` has written -> title -> records and figures for every training seed."""
    scores = {}
    for title, row in chain.from_iterable(json.loads(f.read_text()).items() for f in files):
        # JSON has lists for pairs.
        row["records"] = [{key: tuple(value) if isinstance(value, list) else value
                           for key, value in record.items()} for record in row["records"]]
        scores.setdefault(title, []).append(row)
    return scores


def ablation_tables(ablation, scores, seeds):
    """scores: title -> a row's records and figures for every training seed -> `Table` of the rows,
    and of differences."""
    figures = ablation["figures"]
    summaries = {title: [summarise(row["records"]) | row["figures"] for row in rows]
                 for title, rows in scores.items()}
    # A list of values, one per seed, is shown as mean ± standard deviation.
    values = {title: {key: [summary.get(key, NAN) for summary in of_seeds]
                      for key in (*figures, *ablation["stress"])}
              for title, of_seeds in summaries.items()}
    table = Table({key: key for key in figures} | dict(paper=f"paper: {ablation['paper']}"))
    for title, paper, *_ in ablation["rows"]:
        table.add(title, title, figures=values[title] | dict(paper=paper))
        for seed, row in zip(seeds, scores[title]):
            table.records += [dict(row=title, seed=seed) | record for record in row["records"]]

    # Seed by seed and clip by clip: the same order of training clips, the same noise in training
    # and in sampling (but of the row without video), the same held-out clips. What they do to both
    # rows drops out.
    differences = {}
    for title, *_, reference in ablation["rows"]:
        if not reference:
            continue
        row = differences[title, reference] = dict(interval={}, seeds={})
        for key, of_seeds in values[title].items():
            row["seeds"][key] = np.subtract(of_seeds, values[reference][key]).tolist()
            row[key], *row["interval"][key] = gain_over_seeds(
                scores[title], scores[reference], key)

    def add_differences(columns):
        table.head({key: key for key in columns})
        shown = None
        for (title, reference), row in differences.items():
            if reference != shown:
                over = "seeds" if len(seeds) > 1 else "clips"
                print(f"minus {reference}; in brackets 95 % intervals over {over}")
            shown = reference
            table.add(f"{title} - {reference}", f"  {title}", figures=row)
    add_differences(figures)
    if ablation["stress"]:
        print("F1 at 50 ms on the stress split")
        table.head({key: key for key in ablation["stress"]})
        for title, row in values.items():
            table.add(title, title, figures=table.result[title])
        add_differences(ablation["stress"])
    return table


# 97.5 % quantile of Student's t for three values (two degrees of freedom): 95 % of such means are
# within so many standard errors of the true one.
STUDENT = 4.303


def gain_over_seeds(rows, others, key):
    """Two rows' scores for every training seed -> the mean over seeds of what the first has more in
    `key`, low, high (95 %); nan where a seed has no value. Of one seed the interval is over clips,
    and a distance, which belongs to no clip, has none.

    Every seed has its own training and its own clips, so gains of different seeds are independent
    (but that clip i of a seed is sampled from the noise of clip i + 1 of the one before). A
    bootstrap of three seeds shows 2/3 of their variance: its intervals cover 75 % where seeds
    differ five times as much as the error over clips, these 94 %."""
    if key in rows[0]["figures"]:
        gains = [[row["figures"][key] - other["figures"][key], NAN]
                 for row, other in zip(rows, others)]
    else:
        gains = [paired(row["records"], other["records"], key)
                 for row, other in zip(rows, others)]
    if len(gains) == 1:
        return interval(gains[0])
    of_seeds = np.array([gain[0] for gain in gains])
    half = STUDENT * of_seeds.std(ddof=1) / math.sqrt(len(of_seeds))
    return [of_seeds.mean(), of_seeds.mean() - half, of_seeds.mean() + half]


def training_folder(root, stage, flags, seed):
    name = f"{stage} {flags}".replace("--", "").split() or ["full"]
    return root / "-".join([*name, str(seed)])


def run_training(args, folder, lock, flags):
    """Run train.py with these flags, and with those of this command that concern it. It holds the
    `lock` of its folder too: if this process is killed, no other one trains there beside it."""
    print(f"training {folder}", flush=True)
    command = [sys.executable, ROOT / "train.py", "--seed", args.seed, "--eval-clips", 24,
               "--device", args.device, "--dtype", args.dtype, "--data-root", args.data_root,
               "--out", folder, "--no-compile", *flags]   # too short for compiling to pay
    for flag, path in (("--vae", args.vae), ("--audio-vae", args.audio_vae)):
        command += [flag, path] if path else []
    # In a session of its own: Ctrl-C reaches this process alone, which passes it on once and waits
    # until the training has ended its step and saved its state.
    with subprocess.Popen([str(part) for part in command], start_new_session=True,
                          pass_fds=(lock,)) as training:
        try:
            code = training.wait()
        except KeyboardInterrupt as why:
            training.send_signal((why.args or [signal.SIGINT])[0])
            training.wait()
            raise
    if code in (130, 143):
        raise KeyboardInterrupt(code - 128)
    if code:
        raise BadInput(f"the training above ended with code {code}: correct what it says, then the "
                       "same command goes on")


def add_learning(table, root, stage, seeds):
    """Harmony's figure 3: F1 during the trainings of LEARNING, from their scores.csv: mean ±
    standard deviation over training seeds."""
    curves = {}
    for (name, flags), column in product(LEARNING.items(), ("audio_driven", "pairs")):
        found = []
        for seed in seeds:
            with open(training_folder(root, stage, flags, seed) / "scores.csv") as f:
                rows = list(csv.DictReader(f))
            found.append([float(row[column]) for row in rows])
        steps = [int(row["step"]) for row in rows]
        curves[f"{name}: {column}"] = np.transpose(found)                 # (steps, seeds)
    for column in ("audio_driven", "pairs"):
        gain = curves[f"CTS: {column}"] - curves[f"joint loss alone: {column}"]
        curves[f"CTS - joint: {column}"] = gain
    table.head({step: f"step {step}" for step in steps})
    for name, values in curves.items():
        table.add(name, name, figures=dict(zip(steps, values.tolist())))
    means = {name: values.mean(1) for name, values in curves.items() if " - " not in name}
    draw_curves(root / "learning.png", steps, means, "steps", "F1 at 50 ms, without guidance")


# ---------------------------------------------------------------------- files, blocks

SOUNDS = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".aiff", ".wma")


def find_files(flag, folder, suffixes):
    """-> {path relative to the folder, without suffix: path} of its files with these suffixes."""
    if not os.path.isdir(folder):
        raise BadInput(f"{flag} {folder}: no such folder; give two folders with the same file "
                       "names in them")
    files = [p for p in data.files_below(folder) if p.is_file()]
    found = {}
    for path in files:
        if path.suffix.lower() in suffixes:
            other = found.setdefault(str(path.relative_to(folder).with_suffix("")), path)
            if other != path:
                raise BadInput(f"{flag} {folder}: {other.name} and {path.name} differ in their "
                               "suffix alone; remove one of them")
    if not found:
        raise BadInput(f"{flag} {folder}: {len(files)} files, none of them to be scored; expected "
                       + " ".join(suffixes))
    return found


def find_pairs(flag, folders, suffixes):
    """Two folders -> the names that both have, {name: path} of each (`find_files`), and how many
    files have no partner."""
    files = [find_files(flag, folder, suffixes) for folder in folders]
    names = [n for n in files[0] if n in files[1]]
    counts = [len(found) for found in files]
    if not names:
        raise BadInput(f"{flag} {folders[0]} {folders[1]}: no relative path occurs in both (the "
                       f"suffix may differ); they have {counts[0]} and {counts[1]} files")
    return names, files, sum(counts) - 2 * len(names)


def score_pairs(args):
    """Two folders of sound files with the same names: true sounds, and sounds that any program
    generated for the videos."""
    names, files, single = find_pairs("--pairs", args.pairs, (*SOUNDS, *data.VIDEOS))
    true, generated = ([onsets(read_audio(side[n]), RATE) for n in names] for side in files)
    print(f"{len(names)} pairs, {single} files without a partner; tolerance "
          f"{1000 * args.tolerance:g} ms")
    table = Table(SYNC_COLUMNS)
    clips = [dict(name=n, kind="") for n in names]
    rows = dict(cyclesync=generated)
    # One pair has no other.
    if len(names) > 1:
        rows["shuffled"] = shuffled(generated)
    for key, others in rows.items():
        analyses = [dict(onsets=found, peaks=None) for found in others]
        table.add(key, key, sync_records(true, analyses, clips, args.tolerance))
    table.finish(Path(args.out, "sounds.csv"))


# What `--pairs-of-videos` compares, where a video has it.
MEASURES = dict(sound_agreement="sound agreement", hits="hit agreement",
                lag_confidence="confidence of lag < 0.1 s", av_align="AV-Align",
                cyclesync_set="CycleSync set", cyclesync_merged="CycleSync merged")


def read_videos(paths):
    """-> frames, waveform and frame rate of each video."""
    videos = []
    for path in paths:
        # Below 24 fps at the video's own rate: repeated frames would appear as motion in jerks.
        fps = max(1, min(FPS, round(data.frame_rate(path))))
        # Optical flow depends on the size of the picture, so it is always the same. A picture that
        # freezes counts: it agrees with nothing.
        frames, wave = data.read_clip(path, 256, fps=fps, static=True)
        if len(frames) < max(3, fps / 2):
            raise BadInput(f"{path}: {len(frames) / fps:.2f} s long; at least 0.5 s are needed")
        videos.append((frames, wave, fps))
    return videos


def measure_videos(videos, sounds, clips, tolerance):
    """What is known of videos, and of the sounds to measure them with -> records of MEASURES."""
    records = []
    for video, sound, clip in zip(videos, sounds, clips):
        fps = video["fps"]
        # Another video's sound may be longer or shorter: what both have is compared.
        end = min((len(video["curve"]) + 1) / fps, len(sound["rise"]) / 100)
        curve = video["curve"][:max(3, round(end * fps) - 1)]
        hits, found, *known = (
            times if times is None else np.array(times)[np.array(times) < end]
            for times in (sound["hits"], sound["onsets"], video["onsets"], video["peaks"]))
        both = video | dict(zip(("onsets", "peaks"), known))
        record, = sync_records([found], [both], [clip], tolerance)
        late, confidence = lag(curve, fps, sound["strength"])
        matched, total = hit_agreement(hits, curve, fps)
        record |= dict(sound_agreement=sound_agreement(curve, fps, sound["rise"]),
                       hits=matched / total if total else NAN, lag_s=late,
                       # A video that is always late has one lag, but not this one.
                       lag_confidence=confidence if abs(late) <= .1 else 0.)
        records.append(record)
    return records


def compare(a, b):
    """Two figures of one pair -> a record, empty where one of them is undefined."""
    if math.isnan(a + b):
        return {}
    return dict(a=a, b=b, difference=a - b, wins=float(a > b) + .5 * (a == b))


def compare_measures(own, other):
    """Records of MEASURES of both sides, and [A, B, A, B, ...] with other sounds -> their table."""
    table = Table(dict(a="A", b="B", difference="A - B", wins="A wins", chance="with other sounds",
                       beyond="A - B beyond chance"))
    for key, title in MEASURES.items():
        values = [[r.get(key, NAN) for r in side] for side in own]
        chances = [[r.get(key, NAN) for r in side] for side in other]
        records = [compare(*pair) for pair in zip(*values)]
        for i, record in enumerate(records):
            wrong = [compare(a[i], b[i]) for a, b in zip(chances[::2], chances[1::2])]
            wrong = [w for w in wrong if w]
            if record and wrong:
                by_chance = float(np.mean([w["difference"] for w in wrong]))
                record |= dict(chance=float(np.mean([w["wins"] for w in wrong])),
                               beyond=record["difference"] - by_chance)
        if any(records):
            table.add(key, title, [r for r in records if r])
    return table


def score_videos(args):
    """Two folders of videos with sound, of two models for the same sounds: which one moves when it
    sounds? More frames or more peaks of motion may win with any sound, so every measure is also
    taken with the sounds of other pairs: only what is beyond that is timing."""
    names, files, single = find_pairs("--pairs-of-videos", args.pairs_of_videos, data.VIDEOS)
    f_v2a = v2a_models(args, [None])[0][0] if args.v2a_cmd or args.v2a_ckpt else None
    clips, unusable = [], []
    videos, sounds = ([], []), ([], [])
    for name in tqdm(names, desc="pairs", disable=None, leave=False):
        try:
            pair = read_videos([side[name] for side in files])
        except BadInput as error:
            unusable.append(str(error))
            continue
        clips.append(dict(name=name, kind=os.path.dirname(name)))
        for side, (frames, wave, fps) in enumerate(pair):
            analysis = analyse_video(frames, f_v2a, fps)
            videos[side].append(analysis | dict(curve=motion_energy(frames, fps)))
            sounds[side].append(analyse_sound(wave))
    skipped = f", {len(unusable)} cannot be used, such as {unusable[0]}" if unusable else ""
    if len(clips) < 2:
        raise BadInput(f"--pairs-of-videos: {len(clips)} usable pairs{skipped}; at least two are "
                       "needed")
    rates = [", ".join(f"{r}" for r in sorted({v["fps"] for v in side})) for side in videos]
    print(f"{len(clips)} pairs{skipped}; {single} videos without a partner\n"
          f"A: {args.pairs_of_videos[0]}, {rates[0]} fps; B: {args.pairs_of_videos[1]}, {rates[1]} "
          "fps; in brackets 95 % intervals over pairs")

    # Both sides with their own sounds, and with those of up to five other pairs.
    own = [measure_videos(*side, clips, args.tolerance) for side in zip(videos, sounds)]
    turns = sorted({len(clips) * k // 6 for k in range(1, 6)} - {0})
    other = []
    for k, side in product(turns, (0, 1)):
        turned = sounds[side][k:] + sounds[side][:k]
        other.append(measure_videos(videos[side], turned, clips, args.tolerance))
    table = compare_measures(own, other)
    # The CSV has a line per pair.
    table.records = [dict(pair=clip["name"]) for clip in clips]
    for letter, side in zip("ab", own):
        for line, record in zip(table.records, side):
            line |= {f"{key}_{letter}": v for key, v in record.items() if key in MEASURES}
    table.finish(Path(args.out, "pairs.csv"))


def score_clip(args):
    """One video with its sound: where it sounds, how much later it moves, whether it moves there.
    """
    (frames, wave, fps), = read_videos([args.clip])
    seconds = len(frames) / fps
    sound = analyse_sound(wave)
    found = sound["onsets"]
    hits = sound["hits"]
    peaks = analyse_video(frames, None, fps)["peaks"]
    align = NAN if peaks is None else av_align(found, peaks, fps)
    curve = motion_energy(frames, fps)
    late, confidence = lag(curve, fps, sound["strength"])

    def agreement_with(shifts):
        """With the sound so many seconds later; what passes the end comes back at the beginning."""
        return summarise([dict(
            hits=hit_agreement((hits + shift) % seconds, curve, fps),
            sound=sound_agreement(curve, fps, np.roll(sound["rise"], round(100 * shift))))
            for shift in shifts])

    agreement = agreement_with([0.])
    # Further away than what either agreement takes for equal.
    chance = agreement_with(np.linspace(.2, seconds - .2, 20))
    note = "" if confidence > CLEAR else f" (under {CLEAR}: too little to mean anything)"
    print(f"{args.clip}: {seconds:.2f} s, sound begins at {found.round(2)}\n"
          f"hit agreement {agreement['hits']:.3f}, {chance['hits']:.3f} with the sound at other "
          f"times: F1 of its {len(hits)} onsets and the peaks of motion, within 100 ms\n"
          f"sound agreement {agreement['sound']:.3f}, {chance['sound']:.3f} with the sound at "
          "other times: the highest correlation of its rise and the motion within 100 ms\n"
          f"motion is {1000 * late:+.0f} ms after the sound, confidence {confidence:.1f}{note}\n"
          f"AV-Align {align:.3f} at {fps} fps and 256 px (it depends on both; nan: without OpenCV)")
    result = dict(onsets=found, lag_s=late, confidence=confidence, av_align=align,
                  hits=agreement["hits"], hits_by_chance=chance["hits"],
                  sound_agreement=agreement["sound"], sound_agreement_by_chance=chance["sound"])
    print(json.dumps(to_json(result)))


def skip_block_study(args):
    """Syncphony figures 10, 11: videos from the same noise, each without one block of the network.

    In the paper appearance breaks without early blocks and motion changes without late ones, which
    is why the audio layers are in the late ones. Writes one film strip per video, that of the
    complete network first, and prints the mean |difference| from it, of 255."""
    if not (args.audio and args.image):
        raise BadInput("--skip-blocks: give --audio x.wav and --image f.png")
    device, _ = pick_device(args.device)
    system = load(args.ckpt, device, args.vae, pretrained=args.pretrained, task="a2v")
    check_encoders(system.model, args.ckpt, args)
    autocast, _ = autocast_for(system, args.dtype, device)
    model = system.model
    wave = read_audio(args.audio)
    picture = data.read_image(args.image, system.checkpoint["size"])
    # Of the video, `generate` uses the first frame and the length.
    frames = max(2, round(len(wave) / RATE * FPS))
    clip = dict(video=np.repeat(picture[None], frames, 0), audio=wave, caption="")
    settings = recommended(system.checkpoint, steps=args.steps)
    settings["encoders"] = external_encoders(model, args, [""], device)

    def skip(tokens, *_):
        # Passes its tokens on. Its keys and values, which nothing reads, have the caches' shapes.
        shape = len(tokens), model.cfg.heads, tokens.shape[1], model.cfg.head_dim
        unread = tokens.new_zeros(shape)
        return tokens, (unread, unread)

    complete, = generate(model, system.vae, [clip], autocast, args.seed, **settings)
    strips = [film_strip(complete, wave)]
    differences = []
    for i, block in enumerate(model.all_blocks()):
        block.forward = skip
        video, = generate(model, system.vae, [clip], autocast, args.seed, **settings)
        del block.forward
        strips.append(film_strip(video, wave))
        differences.append(np.abs(video.astype(float) - complete).mean())
        kind = "double" if i < model.cfg.n_double else "single"
        print(f"without block {i} ({kind}-stream): {differences[-1]:.2f} of 255", flush=True)
    data.write_picture(Path(args.out) / "skip-blocks.png", np.concatenate(strips))
    print(json.dumps(to_json(dict(skip_blocks=differences))))


def arguments():
    p = Parser(__doc__)
    # without any of these, the table of --ckpt
    what = p.add_mutually_exclusive_group()
    what.add_argument("clip", nargs="?", help="score this one video with its sound")
    what.add_argument("--pairs", nargs=2, metavar=("TRUE", "MADE"), help="CycleSync of two "
                      "folders of sounds with the same file names")
    what.add_argument("--pairs-of-videos", nargs=2, metavar=("A", "B"), help="of videos: which "
                      "of two folders moves when it sounds?")
    what.add_argument("--steps-study", action="store_true", help="quality of --ckpt over Euler "
                      "steps: how few are enough? (clips of no other table, or of the training)")
    what.add_argument("--guidance-study", action="store_true", help="agreement and Frechet "
                      "distances of a two-tower --ckpt over guidance scales and noise levels")
    what.add_argument("--stress", action="store_true", help="--ckpt on two sounds at once, noise, "
                      "sounds from off-screen, dense events, a minute in one piece")
    what.add_argument("--negatives", action="store_true", help="--ckpt guided away from other "
                      "things than Syncphony: zeros, silence, no caption")
    what.add_argument("--shift-study", action="store_true", help="metrics on sounds that are late")
    what.add_argument("--skip-blocks", action="store_true", help="videos without one block each")
    what.add_argument("--ablate", choices=tuple(ABLATIONS), help="train and score a paper's "
                      "ablation tables, up to 4 hours on 2 cores; several processes share the work")
    for name in ("audio", "image"):
        p.add_argument(f"--{name}", help="--skip-blocks: the sound and the first frame")
    p.add_argument("--quick", action="store_true", help="--ablate: one seed, short trainings (from "
                   "the shipped weights), at most 32 clips, 20 minutes on 2 cores")
    p.add_argument("--train-steps", type=number(int, 4), help="--ablate: default 800, with --quick "
                   "200 (syncphony), 550 (syncflow), 110 (harmony)")
    # checkpoints
    p.add_argument("--ckpt", help="of train.py; default: the shipped one of --task a2v, for "
                   "--data that is not the toybox the one of real clips")
    p.add_argument("--vae", help="its VAE, if that is neither in weights/ nor beside it")
    p.add_argument("--audio-vae", help="likewise its audio VAE")
    p.add_argument("--pretrained", help="of a checkpoint on Pyramid Flow: that folder")
    p.add_argument("--hubert", help="of such a checkpoint: its HuBERT, a folder or hub name")
    # held-out clips and sampling
    p.add_argument("--data", default="toybox", help=f"or {', '.join(data.DATASETS)}, or a folder")
    p.add_argument("--data-root", default="data", help="where datasets and caches are")
    p.add_argument("--clips", type=number(int, 2, 10000), default=96, help="held-out clips")
    p.add_argument("--draws", type=number(int, 1, 100), default=1, help="videos per clip, each "
                   "from noise of its own: figures and intervals are of their means")
    p.add_argument("--resolution", type=data.picture_size, help="side in pixels, or height x width "
                   "(of the checkpoint; --shift-study: 64)")
    p.add_argument("--steps", type=number(int, 1, 1000), help="Euler steps, of a2v per latent; "
                   "default: the checkpoint's, else its paper's")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of held-out clips and noise; "
                   "--ablate and --negatives take this one and the next two")
    # metrics
    p.add_argument("--tolerance", type=number(low=0), default=.05, help="CycleSync: seconds that "
                   "two onsets may be apart")
    p.add_argument("--v2a-ckpt", metavar="FILE", help="CycleSync: f is this t2av or joint file")
    p.add_argument("--v2a-cmd", help="CycleSync: f is a program, with {video} and {wav} in it")
    p.add_argument("--v2a-seconds", type=number(low=0, high=600), default=0., help="its shortest "
                   "video; the last frame is held")
    for what, file in NETWORKS.items():
        p.add_argument(f"--{what}", metavar="FILE", help=f"also this distance; TorchScript: {file}")
    p.add_argument("--out", default="out/cyclesync", help="folder for tables, pictures, ablations")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                   help="auto: the faster one, as measured")
    return p


# The flags that each command reads. Others would have no effect. (An ablation is scored on the
# toybox, and its stored scores are named by their settings.)
LOADS = "device dtype vae out"
CLIPS = "data data_root clips resolution seed"
SAMPLES = f"{LOADS} {CLIPS} ckpt pretrained hubert draws steps"
TOWERS = f"{LOADS} {CLIPS} ckpt audio_vae draws steps"
V2A = f"{LOADS} tolerance v2a_ckpt v2a_cmd v2a_seconds audio_vae"
READ = {
    "a table of a2v": f"{SAMPLES} {V2A} fvd fid fad",
    "a table of two towers": f"{TOWERS} tolerance",
    "a table of a VAE": f"{CLIPS} ckpt device dtype out",
    "clip": "",
    "pairs": "tolerance out",
    "pairs_of_videos": V2A,
    "steps_study": f"{SAMPLES} audio_vae".replace(" steps", ""),
    "guidance_study": TOWERS,
    "stress": SAMPLES,
    "negatives": SAMPLES,
    "shift_study": f"{V2A} {CLIPS}",
    "skip_blocks": f"{LOADS} audio image ckpt pretrained hubert steps seed",
    "ablate": f"{LOADS} quick train_steps audio_vae data_root clips steps seed"}


def check_flags(args, command):
    """Refuse flags that a command of READ does not read."""
    def flag(name):
        if name == "clip":
            return "a single video"
        return name if " " in name else f"--{name}".replace("_", "-")

    read = {command, *READ[command].split()}
    defaults = vars(arguments().parse_args([]))
    for name, value in vars(args).items():
        if value != defaults[name] and name not in read:
            others = [flag(other) for other, names in READ.items() if name in names.split()]
            others = others if len(others) < 6 else ["most other commands"]
            raise BadInput(f"{flag(name)} is not read by {flag(command)}, but by "
                           f"{', '.join(others)}; leave it out")
    if args.v2a_cmd and args.v2a_ckpt:
        raise BadInput("--v2a-cmd and --v2a-ckpt: both are the f of CycleSync; give one of them")
    if args.v2a_seconds and not args.v2a_cmd:
        raise BadInput("--v2a-seconds is the shortest video of --v2a-cmd; give that, too")
    # What these commands load is the file of --v2a-ckpt alone.
    for name in ("vae", "audio_vae", "device", "dtype"):
        if command in ("pairs_of_videos", "shift_study") and not args.v2a_ckpt:
            if getattr(args, name) != defaults[name]:
                raise BadInput(f"{flag(name)} is that of --v2a-ckpt; give that, too")


def main():
    args = arguments().parse_args()
    commands = dict(clip=score_clip, pairs=score_pairs, pairs_of_videos=score_videos,
                    skip_blocks=skip_block_study, steps_study=steps_study,
                    guidance_study=guidance_study, stress=stress,
                    negatives=negatives, shift_study=shift_study, ablate=ablate)
    # One at most, since argparse refuses two; without any the table of --ckpt, whose flags are
    # checked again when its task is known.
    chosen = [name for name in commands if getattr(args, name) not in (None, False)]
    check_flags(args, *chosen or ["a table of a2v"])
    command = commands[chosen[0]] if chosen else evaluate
    if command not in (score_videos, shift_study):
        args.ckpt = args.ckpt or str(A2V_FILE if args.data == "toybox" else REAL_A2V_FILE)
    command(args)


if __name__ == "__main__":
    data.run_cli(main)
