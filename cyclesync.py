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
    python cyclesync.py --audio claps.wav        # no truth for a recording: its onsets, as librosa hears them, stand in

    F frames · n events · S states · video uint8 (F, H, W, 3) · times in seconds
"""
import json
import math
import time
from contextlib import nullcontext

import numpy as np
import torch
from tqdm import tqdm

from data import FPS, KINDS, RATE, STATES, TIMING, Parser, number, read_audio, run_cli, toybox_clip, toybox_draw
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


def arguments():
    p = Parser(__doc__)
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
    evaluate_recording(args) if args.audio else evaluate(args)


if __name__ == "__main__":
    run_cli(main)
