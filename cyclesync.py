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

Real clips score 22 of 100 with the model that the paper used: a score means something only beside that of the ground truth
and that of shuffled sounds. **AV-Align** (TempoTokens) asks for peaks of optical flow at onsets; it exists in two versions
that give different numbers (`av_align`), and depends on resolution and frame rate. `lag` is a plain cross-correlation.

    python cyclesync.py --ckpt weights/a2v-toybox.pt --data toybox --clips 96 --seed 0
    python cyclesync.py --audio claps.wav        # no truth for a recording: its onsets, as librosa hears them, stand in
    python cyclesync.py clip.mp4                 # any video with its own sound: onsets, lag, AV-Align
    python cyclesync.py --pairs true/ remade/    # CycleSync of sounds that any program made from videos

    F frames · n events · S states · video uint8 (F, H, W, 3) · times in seconds
"""
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import FPS, KINDS, RATE, STATES, TIMING, BadInput, Parser, number, read_audio, read_clip, run_cli, toybox_clip, toybox_draw
from sample import A2V_FILE, VAE_FILE, Deaf, animate, load_a2v, pick_device

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


# ------------------------------------------------------------------------------------------------ CycleSync, AV-Align, lag

def onsets(wave, rate):
    """When librosa hears something begin in a waveform (samples,) -> times (n,), multiples of 512 / 22 050 s = 23 ms.

    Always at 22 050 Hz: at 16 kHz the detector's local-maximum test spans no frame and every hit is reported twice."""
    import librosa
    wave = np.asarray(wave, np.float32)
    wave = wave if rate == 22050 else librosa.resample(wave, orig_sr=rate, target_sr=22050)
    return librosa.onset.onset_detect(y=wave, sr=22050, hop_length=512, units="time") if len(wave) >= 2048 else np.zeros(0)


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


# ------------------------------------------------------------------------------------------------ videos to score

def generate_toybox(model, vae, clips, cast=nullcontext, bar=None, seed=0, batch=48, **settings):
    """Generate a video for the first frame, sound and caption of every clip -> list of uint8 (F, H, W, 3)."""
    videos = []
    for i in range(0, len(clips), batch):
        some = clips[i:i + batch]
        pieces = animate(model, vae, np.stack([c["video"][0] for c in some]), [c["audio"] for c in some], [c["caption"] for c in some],
                         len(some[0]["video"]), cast, bar, seeds=[seed + i + j for j in range(len(some))], **settings)
        videos += list(np.concatenate(list(pieces), 1))
    return videos


def reconstruct(vae, clips, cast=nullcontext):
    """What the VAE alone makes of the clips: the ceiling of everything that is generated with it."""
    device, videos = next(vae.parameters()).device, []
    for c in clips:
        x = torch.from_numpy(c["video"]).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad(), cast():
            y = vae.decode(vae.encode(x)[0], x[:, :, :1]).float()
        y = (y[0].clamp(-1, 1) * 127.5 + 128).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
        videos.append(np.concatenate([c["video"][:1], y[1:]]))
    return videos


# ------------------------------------------------------------------------------------------------ the table

def evaluate(args):
    device, cast, words = pick_device(args.device)
    model, vae, ckpt = load_a2v(args.ckpt, args.vae, device)
    clips = [toybox_clip(HELD_OUT + 10 ** 4 * args.seed + i, ckpt["size"]) for i in range(args.clips)]
    n, default = sum(len(c["events"]) for c in clips), ckpt["guidance"]
    print(f"{words}\n{args.ckpt}: step {ckpt['step']}; {len(clips)} held-out clips of {len(clips[0]['video'])} frames at {ckpt['size']} px, {n} events, "
          f"{sum(len(c['events']) == 0 for c in clips)} clips without any; {args.steps} steps")
    rows = [("ground_truth", "ground truth", None), ("vae", "VAE reconstruction", None), ("off_sync", "off-sync (no audio layers)", 0.)]
    weights = sorted({0., 1., 2., 4., float(default["asg"])})
    rows += [(f"asg_{w:g}", f"generated, w_a = {w:g}" + (", w_t = %g: the default" % default["cfg"] if w == default["asg"] else ""), w) for w in weights]
    print(f"{'':38s}{'F1 50':>7s}{'prec.':>7s}{'recall':>7s}{'F1 100':>8s}{'timing':>9s}{'residual':>10s}{'worst kind':>16s}{'false/quiet':>12s}")
    result, total = {}, math.ceil((len(clips[0]["video"]) - 1) / vae.stride_t) * args.steps * math.ceil(len(clips) / 48)
    for key, words, w in rows:
        start = time.perf_counter()
        if key == "ground_truth":
            videos = [c["video"] for c in clips]
        elif key == "vae":
            videos = reconstruct(vae, clips, cast)
        else:
            with tqdm(total=total, desc=words, disable=None, leave=False) as bar:
                videos = generate_toybox(Deaf(model) if key == "off_sync" else model, vae, clips, cast, bar, args.seed, steps=args.steps, asg=w,
                                         cfg=default["cfg"] if w == default["asg"] else 0.)
        scores, kinds, shuffled = score_toybox(videos, clips)
        seen = {k: v["residual"] for k, v in kinds.items() if np.isfinite(v["residual"])}
        worst = max(seen, key=seen.get, default="-")
        result[key] = dict(scores, kinds={k: dict(f1_50=v["f1_50"], residual=v["residual"]) for k, v in kinds.items()}, worst_residual=seen.get(worst))
        print(f"{words:38s}{scores['f1_50']:7.3f}{scores['precision_50']:7.3f}{scores['recall_50']:7.3f}{scores['f1_100']:8.3f}{scores['timing_ms']:6.0f} ms"
              f"{scores['residual']:10.3f}{worst + ' %.2f' % seen.get(worst, np.nan):>16s}{scores['false_per_quiet_clip']:12.2f}   {time.perf_counter() - start:.0f} s", flush=True)
        if key == f"asg_{default['asg']:g}":
            result["generated"], result["shuffled"] = result[key], dict(shuffled, clips=len(clips))
    print(f"{'shuffled audio (chance)':38s}{result['shuffled']['f1_50']:7.3f}{result['shuffled']['precision_50']:7.3f}{result['shuffled']['recall_50']:7.3f}{result['shuffled']['f1_100']:8.3f}")
    clean = lambda v: {k: clean(x) for k, x in v.items()} if isinstance(v, dict) else (None if isinstance(v, float) and not np.isfinite(v) else round(v, 4) if isinstance(v, float) else v)
    print(json.dumps(clean(result)))


def clear_onsets(wave):
    """Where a listener would tap: librosa's onsets of at least 0.3 of the strongest one. (samples,) at 16 kHz -> seconds."""
    import librosa
    strength = librosa.onset.onset_strength(y=wave, sr=RATE, hop_length=RATE // 100)
    found = librosa.onset.onset_detect(onset_envelope=strength, sr=RATE, hop_length=RATE // 100)
    return found[strength[found] >= .3 * strength.max()] / 100


def evaluate_recording(args):
    """Toybox pictures and a real sound: do things move at its onsets, and later when the sound is 0.3 s later?"""
    device, cast, words = pick_device(args.device)
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
            videos = generate_toybox(model, vae, clips, cast, seed=args.seed, steps=args.steps, asg=ckpt["guidance"]["asg"])
            read.append([read_events(kind, read_states(v, c["scene"])[0]) for v, c in zip(videos, clips)])
        possible = heard[(heard >= TIMING[kind][0]) & (heard < frames / FPS - .1)]                    # nothing falls in 0.1 s
        met = [np.abs(events[:, None] - possible[None]).min(0, initial=9.) <= .1 for events in read[0] if len(possible)]
        kept = [before[before + delay < frames / FPS - .1] + delay for before in read[0]]             # what should be seen later
        followed = [match_events(before, after, 1 / FPS)[0] for before, after in zip(kept, read[1])]
        result[kind] = dict(onsets=len(possible), met=float(np.mean(met)) if met else None, events=float(np.mean([len(e) for e in read[0]])),
                            followed=sum(followed) / sum(map(len, kept)) if sum(map(len, kept)) else None)
        show = lambda x: "-" if x is None else f"{x:.2f}"
        print(f"{kind:10s}{len(possible):8d}{show(result[kind]['met']):>30s}{result[kind]['events']:18.1f}{show(result[kind]['followed']):>30s}", flush=True)
    print(json.dumps(result))


def mean_and_interval(values, rounds=2000):
    """Mean and its 95 % bootstrap interval over clips; nan values (no onset on either side) are left out and counted."""
    values = np.asarray(values, float)
    kept = values[np.isfinite(values)]
    if len(kept) == 0:
        return dict(mean=None, low=None, high=None, clips=0, undefined=len(values))
    means = np.random.default_rng(0).choice(kept, (rounds, len(kept))).mean(1)
    return dict(mean=kept.mean(), low=np.quantile(means, .025), high=np.quantile(means, .975), clips=len(kept), undefined=len(values) - len(kept))


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
        result[row] = {union: mean_and_interval(scores[:, i]) for i, union in enumerate(("set", "merged"))}
        show = lambda r: "undefined" if r["mean"] is None else f"{r['mean']:.4f} [{r['low']:.4f}, {r['high']:.4f}]"
        print(f"{row:12s}{show(result[row]['set']):>28s}{show(result[row]['merged']):>28s}   {result[row]['set']['undefined']} pairs without any onset left out")
    print(json.dumps(result))


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
    print(json.dumps({k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in result.items()}))


def arguments():
    p = Parser(__doc__)
    p.add_argument("clip", nargs="?", help="score this one video with its own sound")
    p.add_argument("--pairs", nargs=2, metavar=("REF", "HAT"), help="CycleSync of two folders of sounds: true ones, and ones made from the videos")
    p.add_argument("--tolerance", type=number(low=0), default=.05, help="CycleSync: how far apart two onsets may be, seconds")
    p.add_argument("--trim-start", type=number(low=0), default=0., help="CycleSync: leave out onsets before so many seconds")
    p.add_argument("--ckpt", default=str(A2V_FILE), help="a checkpoint of train.py --task a2v")
    p.add_argument("--vae", default=str(VAE_FILE), help="the VAE it was trained with")
    p.add_argument("--data", default="toybox", choices=("toybox",), help="on which data")
    p.add_argument("--clips", type=number(int, 2, 10000), default=96, help="held-out clips (with --audio: pictures, a sixth of them of every kind)")
    p.add_argument("--audio", help="a recording to move toybox pictures by, in place of the toybox's own sounds")
    p.add_argument("--steps", type=number(int, 1, 1000), default=30, help="Euler steps per latent")
    p.add_argument("--seed", type=number(int, 0), default=0, help="chooses the held-out clips and the noise")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    return p


def main():
    args = arguments().parse_args()
    (score_clip if args.clip else score_pairs if args.pairs else evaluate_recording if args.audio else evaluate)(args)


if __name__ == "__main__":
    run_cli(main)
