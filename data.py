"""Data: a small world that makes sound, real clips as they were downloaded, and media in and out.

    python data.py --data avsync15 --show look.png      # some clips as film strips over their sounds: look before you train

**The toybox.** Real clips that move with their sound are gigabytes, and nobody can log exactly when something in them
happens. The toybox is a world that can: six things that sound, drawn and synthesised from a seed, nothing to download.
Each is one audio-motion relation that the Syncphony paper discusses (appendix A):

    ball     drops onto a floor                   sound at the instant of contact
    hammer   winds up, then strikes               motion that announces the sound
    mouth    stays open while a tone lasts        motion as long as the sound
    lamp     flashes, then fades                  light that outlives the sound
    roller   a slow ball rolls into a pin         long motion before a short, sharp sound
    bell     swings and rings where it turns      the sound sits where motion is slowest

Everything that moves is drawn from ONE number per frame, the state s(t): 0 at rest, 1 at the event (a bell uses -1..1, a
hammer is negative while it winds up). So `draw_scene(scene, s)` is the whole physics of a clip, and cyclesync.py can
read any video of this world back: draw some sixty states, take the closest. Scenes (what, where, which colours, which
material) are drawn before and independently of events, and every clip starts at rest: the first frame never tells WHEN.
Some clips are silent, some have sounds from off screen (a hum, a sweep, distant babble); in both nothing moves.

**Real clips.** `--data` is a name (avsync15, greatesthits, vggsound, landscapes) or any folder of clips. `find_clips` reads
the lists, tables and folder names that come with it; nothing is renamed or unpacked. `read_clip` decodes picture and sound
on ONE clock: the tracks of a file may begin at different times, and a clip whose sound is 40 ms off teaches the wrong thing.
What cannot be trusted is skipped, counted and named, never repaired in silence. `prepare` codes everything once (latents,
log-mels), in shards that can be stopped at any moment, and the toybox goes the same way.

**Media.** `read_audio`, `read_image`, `write_video`, `film_strip`, `log_mel`, and the two functions through which every
checkpoint passes. Whatever is wrong with a file becomes a `BadInput` whose text says what was found, what was expected
and what to do; `run_cli` prints it as one line and exits with code 2.

    F frames · H W height, width · S audio steps · A mel bins · n events
    video uint8 (F, H, W, 3) · waveform float32 (samples,) in [-1, 1], mono, 16 kHz · times in seconds
"""
import argparse
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import zlib
from collections import deque
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from toybox import FPS, FRAMES, RATE, toybox_clip

MEL_RATE, MELS = 100, 64                                     # log-mel frames per second, bins


class BadInput(ValueError):
    """Something a user gave cannot be used; the text says what was found, what was expected and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as help, defaults shown, no abbreviated flags, errors in one line."""

    def __init__(self, doc):
        both = type("Formatter", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {})
        super().__init__(description=doc, formatter_class=both, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def number(kind=float, low=None, high=None):
    """For `type=` of an argument: a finite number in [low, high]."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not np.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            span = f"{'' if low is None else f' of at least {low}'}{'' if high is None else f' and at most {high}'}"
            raise argparse.ArgumentTypeError(f"expected a finite number{span}, got {text}")
        return value
    return read


def picture_size(text):
    """For `type=` of --resolution: '64' -> 64, a square; '384x640' -> (384, 640), height and width. Multiples of 32."""
    try:
        sides_ = [int(t) for t in text.split("x")]
    except ValueError:
        sides_ = []
    if len(sides_) not in (1, 2) or any(v % 32 or not 32 <= v <= 2048 for v in sides_):
        raise argparse.ArgumentTypeError(f"expected a side, such as 64, or height x width, such as 384x640, in multiples of 32, got {text!r}")
    return sides_[0] if len(set(sides_)) == 1 else tuple(sides_)


def sides(size):
    """64 or (384, 640) -> (height, width)"""
    return (size, size) if isinstance(size, int) else tuple(size)


def only_square(size):
    if not isinstance(size, int):
        raise BadInput(f"--resolution {size[0]}x{size[1]}: the toybox is square; give one side")


def run_cli(main):
    """Run a program's `main`: bad input ends in one line on stderr and exit code 2, never in a traceback."""
    sys.stdout.reconfigure(line_buffering=True)                               # a log file grows while the run goes on
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; nothing half-written is left behind", file=sys.stderr)
        sys.exit(130)


# ------------------------------------------------------------------------------------------------ media in

def frames_to_tensor(frames, device="cpu"):
    """Frames uint8 (.., F, H, W, 3), numpy or torch -> float32 (.., 3, F, H, W) in [-1, 1] on `device`."""
    if not isinstance(frames, torch.Tensor):
        frames = torch.tensor(np.asarray(frames))
    return frames.to(device).movedim(-1, -4).float() / 127.5 - 1


def tensor_to_frames(video):
    """Float tensor (.., 3, F, H, W), clamped to [-1, 1] -> numpy uint8 (.., F, H, W, 3). Inverse of `frames_to_tensor`."""
    # + 128, not + 127.5: the conversion to uint8 truncates, so this rounds to the nearest value
    frames = (video.clamp(-1, 1) * 127.5 + 128).to(torch.uint8)
    return frames.movedim(-4, -1).cpu().numpy()


def check_file(path, what):
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such {what} file; check the path")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: the file is empty (0 bytes); give a {what} file with content")
    return path


def read_audio(path, rate=RATE):
    """Any sound file or clip with sound (wav flac ogg mp3 by soundfile, the rest by ffmpeg) -> float32 (samples,), mono."""
    import librosa
    import soundfile
    path = check_file(path, "audio")
    try:
        wave, found = soundfile.read(path, dtype="float32", always_2d=True)   # (samples, channels)
        wave = wave.mean(1)
    except soundfile.LibsndfileError:
        import imageio_ffmpeg
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path.resolve()), "-vn", "-ac", "1", "-ar", str(rate),
                   "-f", "f32le", "-"]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
        wave, found = np.frombuffer(done.stdout[:len(done.stdout) // 4 * 4], np.float32), rate
        if done.returncode or len(wave) == 0:
            why = (done.stderr.decode(errors="replace").strip().splitlines() or ["it holds no sound"])[-1]
            raise BadInput(f"{path}: no sound can be read from it ({why.split(': ')[-1]}); expected wav, flac, ogg, mp3, m4a or mp4 with sound")
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: {int((~np.isfinite(wave)).sum())} samples are NaN or infinite; repair or re-export the recording")
    if found != rate:
        wave = librosa.resample(wave, orig_sr=found, target_sr=rate)
    if len(wave) < rate // 10:
        raise BadInput(f"{path}: {1000 * len(wave) / rate:.0f} ms of sound; at least 100 ms are needed")
    return np.clip(wave, -1, 1).astype(np.float32)


def read_image(path, size=64):
    """Any picture -> uint8 (H, W, 3) of a `size` (see `sides`): centre crop to its aspect, antialiased resize. Alpha lies on white."""
    from PIL import Image                                                     # comes with imageio
    path = check_file(path, "image")
    Image.MAX_IMAGE_PIXELS = None                                             # large pictures are welcome
    try:
        picture = Image.open(path)
        picture.draft("RGB", (2 * max(sides(size)),) * 2)                     # a large jpeg is decoded small
        picture.load()
        if picture.mode.startswith("I") or picture.mode == "F":               # 16 bits or more a value: by its own range
            values = np.asarray(picture, np.float64)
            picture = Image.fromarray((values / (65535 if values.max() > 255 else 255) * 255).clip(0, 255).astype(np.uint8))
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as why:
        raise BadInput(f"{path}: not a picture that can be read ({str(why).splitlines()[0]}); expected png, jpg, webp or bmp") from why
    (w, h), (height, width) = picture.size, sides(size)
    cw, ch = min(w, h * width / height), min(h, w * height / width)           # the largest piece of that aspect
    box = ((w - cw) / 2, (h - ch) / 2, (w + cw) / 2, (h + ch) / 2)
    return np.asarray(picture.convert("RGB").resize((width, height), Image.LANCZOS, box=box))


def log_mel(wave):
    """Waveform (samples,) at 16 kHz -> float32 (frames at 100 Hz, 64): log energies, about zero mean and unit variance.

    Windows of 25 ms every 10 ms, 64 bands up to 8 kHz, centred. Energies under -80 dB count as silence, and the scale is a
    constant, not the clip's own: loud and soft stay different, and silence stays silence however long it lasts."""
    import librosa
    mel = librosa.feature.melspectrogram(y=wave, sr=RATE, n_fft=512, win_length=400, hop_length=RATE // MEL_RATE, n_mels=MELS, fmin=40)
    frames = len(wave) * MEL_RATE // RATE
    return ((np.log10(mel.T[:frames] + 1e-6) + 3.) / 1.6).astype(np.float32)


# ------------------------------------------------------------------------------------------------ real clips: what lies on disk

DATASETS = {   # where it comes from, and how much it is
    "avsync15": "1500 clips, 109 minutes; the Google Drive folder named in the README of github.com/lzhangbj/ASVA",
    "greatesthits": "977 videos, 9.5 hours, vis-data-256.zip (or vis-data.zip, 50 GB); https://andrewowens.com/vis",
    "vggsound": "200 000 clips of 10 s and vggsound.csv; https://www.robots.ox.ac.uk/~vgg/data/vggsound",
    "landscapes": "about 1000 clips of 10 s; the Google Drive folder of github.com/researchmm/MM-Diffusion",
}
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
_GREATEST_HITS = ("_denoised", "_denoised_thumb", "_mic")                     # in order of preference


def dataset_folder(name, root="data"):
    """--data -> the folder: one that exists, or <root>/<name> in any spelling (AVSync15, avsync15, avsync_15)."""
    plain = lambda s: "".join(c for c in s.lower() if c.isalnum())
    if name in DATASETS:
        found = [p for p in sorted(Path(root).glob("*"), key=lambda p: (len(p.name), p)) if p.is_dir() and plain(p.name).startswith(plain(name))]
        if not found:
            raise BadInput(f"--data {name}: not found in {root}/. It is {DATASETS[name]}. Unpack it as {Path(root) / name}/ (any inner layout) or give --data-root")
        return found[0]
    if not Path(name).is_dir():
        raise BadInput(f"--data {name}: neither a dataset (toybox, {', '.join(DATASETS)}) nor a folder of clips")
    return Path(name)


def find_clips(name, root="data"):
    """Everything that --data names, in whatever layout it was downloaded -> list of clips, and a line on how it was read.

    A clip is a dict: path, name (relative to the folder), split ('train', 'test', 'val'), kind (its class), prompt, sound
    (a wav beside it, for when the video has none) and events (times in seconds and materials, The Greatest Hits) or None."""
    folder = dataset_folder(name, root)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS and p.is_file() and not p.name.startswith("."))
    if not files:
        raise BadInput(f"{folder}: no clips in it; expected {' '.join(VIDEOS)}" + (f". {name} is {DATASETS[name]}" if name in DATASETS else ""))
    lists = [p for p in sorted(folder.rglob("*.txt"), key=lambda p: (len(p.parts), p)) if p.stem in ("train", "test", "val")]
    tables = [p for p in sorted(folder.rglob("*.[ct]sv"))]
    chosen, missing, how = None, [], ""
    mapping = next(folder.rglob("class_mapping.json"), None)
    try:
        texts = json.loads(mapping.read_text()) if mapping else {}
        if lists:
            chosen, missing = _by_lists(lists, files)
            how = "lists " + ", ".join(sorted({p.name for p in lists}))
        elif tables:
            chosen, missing = _by_tables(tables, files)
            how = "table " + ", ".join(p.name for p in tables)
    except ValueError as why:                                                 # not a number, not UTF-8, not JSON
        raise BadInput(f"{folder}: its {', '.join(p.name for p in [*lists, *(tables if not lists else []), *([mapping] if mapping else [])])} "
                       f"cannot be read ({str(why).splitlines()[0]}); download it again") from None
    if not chosen:
        if missing:
            raise BadInput(f"{folder}: none of the {len(missing)} clips that its {how} name is there (for instance {missing[0]}); check that the videos are unpacked in it")
        chosen, how = _by_folders(folder, files)
    clips = [_describe(path, folder, split, label, texts) for path, (split, label) in sorted(chosen.items())]
    count = {s: sum(c["split"] == s for c in clips) for s in ("train", "test", "val")}
    words = f"{folder}: {', '.join(f'{v} {k}' for k, v in count.items() if v)} clips of {len({c['kind'] for c in clips})} classes, by {how}"
    if missing:
        words += f"; {len(missing)} named there are missing, for instance {', '.join(missing[:3])}"
    return clips, words


def _by_lists(lists, files):
    """train.txt, test.txt: lines are paths below the list, below videos/ or videos/<split>/, or bare names, or bare ids."""
    by_name, by_stem = {p.name: p for p in reversed(files)}, {p.stem: p for p in reversed(files)}
    known, chosen, missing = set(files), {}, []
    for listing in lists:
        base, split = listing.parent, listing.stem
        for line in listing.read_text().splitlines():
            line = line.strip()
            if not line:
                continue
            paths = [base / line, base / "videos" / line, base / "videos" / split / line]
            bare = Path(line).name                                            # ids may hold dots: never cut at one
            found = next((p for p in paths if p in known), None) or by_name.get(bare) or by_stem.get(bare) or next(
                (by_stem[bare + s] for s in _GREATEST_HITS if bare + s in by_stem), None)
            if found:
                chosen.setdefault(found, (split, None))
            else:
                missing.append(line)
    return chosen, missing


def youtube_key(stem):
    """'<id>_<start>', seconds padded or not, with or without the end, or both in milliseconds -> (id, start in seconds)."""
    numbers = [int(n) for n in stem[11:].split("_") if n.isdigit()]
    if len(stem) < 12 or not numbers:
        return stem[:11], None
    milliseconds = len(numbers) > 1 and numbers[1] - numbers[0] == 10000
    return stem[:11], numbers[0] // 1000 if milliseconds else numbers[0]


def _by_tables(tables, files):
    """vggsound.csv (no header: id, start, label, split), landscape.csv (ytid, start_time, class, set), or a .tsv (id, label)."""
    rows = {}
    for table in tables:
        with open(table, newline="") as f:
            lines = [r for r in csv.reader(f, delimiter="\t" if table.suffix == ".tsv" else ",") if r]
        head = [h.strip().lower() for h in lines[0]] if lines else []
        column = lambda *names: next((head.index(n) for n in names if n in head), None)
        if len(head) >= 4 and head[3] in ("train", "test"):
            rows.update({(r[0], int(float(r[1]))): (r[3].strip(), r[2]) for r in lines if len(r) >= 4})
        elif column("ytid") is not None and None not in (column("start_time"), column("class", "label")):
            at = [column("ytid"), column("start_time"), column("class", "label"), column("set", "split")]
            rows.update({(r[at[0]], int(float(r[at[1]]))): (r[at[3]] if at[3] is not None else "train", r[at[2]]) for r in lines[1:] if len(r) == len(head)})
        elif column("id") is not None and column("label") is not None:
            split = next((s for s in ("train", "val", "test") if s in table.stem.lower()), "train")
            rows.update({youtube_key(r[column("id")]): (split, r[column("label")]) for r in lines[1:] if len(r) == len(head)})
    there = {youtube_key(p.stem): p for p in files}
    chosen = {there[key]: row for key, row in rows.items() if key in there}
    return chosen, [f"{i}_{s}" for i, s in rows if (i, s) not in there]


def _by_folders(folder, files):
    """Any tree: a folder called train, test or val on the way says the split, or one in ten clips is drawn for testing."""
    told = {p: next((s for s in p.relative_to(folder).parts[:-1] if s in ("train", "test", "val")), None) for p in files}
    if any(told.values()):
        return {p: (s or "train", None) for p, s in told.items()}, "folders train and test"
    draw = {p: zlib.crc32(str(p.relative_to(folder)).encode()) for p in files}
    test = {p for p in files if draw[p] % 10 == 0} or {min(files, key=draw.get)}
    return {p: ("test" if p in test and len(files) > 1 else "train", None) for p in files}, "a split invented here: one clip in ten is for testing, drawn by its name"


def _describe(path, folder, split, label, texts):
    hit = re.search(r"^\d{4}(?:-\d\d){5}.*?(_denoised_thumb|_denoised|_mic)$", path.stem)             # ids of The Greatest Hits are dates
    hit = hit and hit[1]
    parent = path.parent.name if path.parent != folder and path.parent.name not in ("videos", "train", "test", "val") else ""
    clip = dict(path=str(path), name=path.relative_to(folder).as_posix(), split=split, kind=label or parent, sound=None, events=None)
    clip["prompt"] = label or texts.get(parent) or " ".join(parent.replace("_", " ").split())
    times = path.with_name(path.stem.removesuffix(hit) + "_times.txt") if hit else None
    if hit:
        clip.update(prompt="hitting with a stick", kind="hitting")
        clip["sound"] = next((str(p) for p in (path.with_suffix(".wav"), *(path.with_name(path.stem.removesuffix(hit) + s + ".wav") for s in _GREATEST_HITS))
                              if p.is_file()), None)
    if times and times.is_file():                                             # time material action reaction; 'None None None' happens
        rows = [line.split() for line in times.read_text().splitlines()]
        clip["events"] = [(float(r[0]), r[1]) for r in rows if len(r) == 4 and r[2] != "None"]
    return clip


# ------------------------------------------------------------------------------------------------ real clips: decoding

def _ffmpeg(path, most, after):
    """Run the ffmpeg that imageio brings -> its output, and its log with a [level] on every line."""
    import imageio_ffmpeg
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", "-loglevel", "repeat+level+info", "-copyts",
               "-t", str(most + 1), "-i", str(Path(path).resolve()), *after, "-"]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    return done.stdout, done.stderr.decode(errors="replace")


def _stamps(log, name):
    return [float(t) for t in re.findall(rf"Parsed_{name} .*pts_time:\s*(-?[\d.]+)", log)]


def _pictures(path, height, width, fps, most):
    """The picture track of a file -> video uint8 (F, height, width, 3), when its own frames and when these frames lie (seconds)."""
    path = check_file(path, "video")
    crop = f"crop=w='min(iw,ih*{width / height}/if(sar,sar,1))':h='min(ih,iw*if(sar,sar,1)*{height / width})':exact=1"
    picture = f"showinfo=checksum=0,fps={fps},format=rgb24,{crop},scale={width}:{height}:flags=bicubic+accurate_rnd,setsar=1,showinfo=checksum=0"
    raw, log = _ffmpeg(path, most, ["-map", "0:V:0", "-vf", picture, "-f", "rawvideo", "-fps_mode", "passthrough"])
    seen, shown = _stamps(log, "showinfo_0"), _stamps(log, "showinfo_6")
    raise_on_decode_error(path, log, "picture")
    video = np.frombuffer(raw, np.uint8)
    video = video[:len(shown) * height * width * 3].reshape(-1, height, width, 3)
    if len(video) < 2:
        raise BadInput(f"{path}: {len(video)} frames; at least 2 are needed")
    if len(video) > most * fps:
        raise BadInput(f"{path}: longer than {most / 60:g} minutes; cut it into clips")
    if len(seen) - 1 < .5 * fps * (seen[-1] - seen[0]):
        raise BadInput(f"{path}: {(len(seen) - 1) / (seen[-1] - seen[0]):.1f} frames per second; at least {fps / 2:g} are needed")
    return video, seen, shown


def read_video(path, size=64, fps=FPS, most=600):
    """The pictures of a clip, with or without sound -> uint8 (F, H, W, 3), cropped and resized to `size` (see `sides`)."""
    return _pictures(path, *sides(size), fps, most)[0]


def add_sound(path, video, wave, rate=RATE):
    """Write the video file `video`, its pictures untouched, with `wave` (samples,) as its sound to `path` (mp4)."""
    import imageio_ffmpeg
    import soundfile
    part = temp_path(path)
    sound = part.with_suffix(".wav")
    try:
        soundfile.write(sound, wave, rate)
        for codec in (["copy"], ["libx264", "-crf", "12", "-pix_fmt", "yuv420p"]):            # what an mp4 cannot hold is coded anew
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(Path(video).resolve()), "-i", str(sound), "-map", "0:V:0", "-map", "1:a:0",
                       "-c:v", *codec, "-c:a", "aac", "-b:a", "128k", "-movflags", "+faststart", str(part)]
            done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
            if done.returncode == 0:
                return os.replace(part, path)
        raise BadInput(f"{video}: cannot be written as mp4 ({done.stderr.decode(errors='replace').strip().splitlines()[-1]})")
    finally:
        for leftover in (part, sound):
            leftover.unlink(missing_ok=True)


def read_clip(path, height=64, width=64, fps=FPS, rate=RATE, sound=None, most=600):
    """Both streams of a clip on ONE clock -> video uint8 (F, height, width, 3), waveform float32 (round(F / fps · rate),).

    Each stream is decoded by one call of ffmpeg, and says at which time its first frame and sample lie (tracks of a file
    often begin apart). The clip is the stretch that both cover, from a frame on. Centre crop to the aspect, then an
    antialiased resize; mono; any rotation, pixel shape and rates. `sound`: a wav for a video without one. Raises BadInput
    with the reason for whatever cannot be trusted: damaged, still, silent, 9 fps; or longer than `most` seconds."""
    video, seen, shown = _pictures(path, height, width, fps, most)
    tone = f"aresample={rate}:async=1,aformat=sample_fmts=flt:channel_layouts=mono,ashowinfo"
    raw, log = _ffmpeg(path, most, ["-map", "0:a:0", "-af", tone, "-f", "f32le"])
    if sound and "matches no streams" in log:
        raw, log = _ffmpeg(sound, most, ["-map", "0:a:0", "-af", tone, "-f", "f32le"])
        shown = [t - seen[0] for t in shown]                                  # a wav knows no time but its own: both begin at 0
    raise_on_decode_error(path, log, "sound")
    wave, heard = np.frombuffer(raw, np.float32), _stamps(log, "ashowinfo_2")
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: its sound has NaN samples")
    begin = max(0, math.ceil((heard[0] - shown[0]) * fps - 1e-3)) if heard else 0             # the first frame that has sound
    skip = round((shown[0] + begin / fps - heard[0]) * rate) if heard else 0
    frames = min(len(video) - begin, math.ceil((len(wave) - skip) / rate * fps - 1e-3))
    if frames < 2 or skip < 0:
        raise BadInput(f"{path}: picture and sound have less than 2 frames in common")
    video, wave = video[begin:begin + frames], wave[skip:skip + round(frames / fps * rate)]
    wave = np.pad(wave, (0, round(frames / fps * rate) - len(wave)))
    if np.abs(video[1:].astype(np.int16) - video[0]).mean((1, 2, 3)).max() < .5:
        raise BadInput(f"{path}: a static picture")
    if wave.std() < 1e-4:
        raise BadInput(f"{path}: its sound is silence")
    return video, wave.clip(-1, 1)


def raise_on_decode_error(path, log, what):
    """Any error in ffmpeg's log means that what came out is not what was recorded."""
    if "matches no streams" in log:
        raise BadInput(f"{path}: no {what} in it")
    wrong = re.findall(r"\[(?:error|fatal|panic)\] (.*)", log)
    if wrong:
        raise BadInput(f"{path}: its {what} is damaged or not of a known kind ({wrong[0].strip().split(': ')[-1]})")


# ------------------------------------------------------------------------------------------------ media out

def temp_path(path):
    """Where to write before renaming to `path`: same folder, same suffix. Half a file never carries the real name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def write_video(path, frames, wave, fps=FPS, rate=RATE):
    """H.264 + AAC. `frames`: uint8 (F, H, W, 3), or an iterator of such pieces (a long roll-out never sits in memory).

    The sound is cut or padded with silence to the length of the pictures; wave=None: no sound. H and W must be even: that is
    H.264's."""
    import imageio_ffmpeg
    import soundfile
    pieces = iter([frames] if isinstance(frames, np.ndarray) else frames)
    piece, part, count = next(pieces), temp_path(path), 0
    if piece.shape[1] % 2 or piece.shape[2] % 2:
        raise BadInput(f"{path}: H.264 needs an even height and width, got {piece.shape[1]}x{piece.shape[2]}")
    silent, sound = part.with_suffix(".silent.mp4"), part.with_suffix(".wav")
    try:
        writer = imageio_ffmpeg.write_frames(str(silent), piece.shape[2:0:-1], fps=fps, codec="libx264", quality=None, macro_block_size=1,
                                             output_params=["-crf", "12"], ffmpeg_log_level="error")
        writer.send(None)
        while piece is not None:
            for frame in piece:
                writer.send(np.ascontiguousarray(frame))
            count += len(piece)
            piece = next(pieces, None)
        writer.close()
        if wave is None:
            os.replace(silent, path)
            return count
        n = round(count / fps * rate)
        soundfile.write(sound, np.pad(wave[:n], (0, max(0, n - len(wave)))), rate)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(silent), "-i", str(sound), "-c:v", "copy",
                   "-c:a", "aac", "-b:a", "128k", "-movflags", "+faststart", str(part)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        os.replace(part, path)
    finally:
        for leftover in (part, silent, sound):
            leftover.unlink(missing_ok=True)
    return count


def write_picture(path, picture):
    import imageio.v3 as iio
    part = temp_path(path)
    iio.imwrite(part, picture)
    os.replace(part, path)


def write_sound(path, wave, rate=RATE):
    import soundfile
    part = temp_path(path)
    soundfile.write(part, wave, rate)
    os.replace(part, path)


def film_strip(video, wave, shown=12, fps=FPS, rate=RATE, events=()):
    """Frames over the waveform on one time axis, as a picture uint8 (H + 40, shown·W, 3). The frame above a stretch of
    sound is the one in the middle of that stretch. `events`: seconds, marked by red lines in the waveform."""
    F, H, W = video.shape[:3]
    shown = min(shown, F)
    middle = ((np.arange(shown) + .5) * F / shown).astype(int)
    width, tall = shown * W, 40
    n = max(1, round(F / fps * rate))
    wave = np.pad(wave[:n], (0, max(0, n - len(wave))))
    columns = np.array([np.abs(part).max() if len(part) else 0. for part in np.array_split(wave, width)])
    loud = columns / max(columns.max(), 1e-3) * (tall / 2 - 2)                # height in pixels, to either side of the axis
    y = np.abs(np.arange(tall) - (tall - 1) / 2)[:, None]                     # (40, 1)
    plot = np.where(y <= np.maximum(loud, .5)[None], 60, 245).astype(np.uint8)
    plot = np.repeat(plot[..., None], 3, 2)
    at = (np.array([t for t in events if 0 <= t < F / fps]) / (F / fps) * width).astype(int)
    plot[:, at] = 220, 40, 40
    return np.concatenate([np.concatenate(list(video[middle]), 1), plot], 0)


# ------------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(path, **content):
    """Plain types and tensors only, written whole or not at all."""
    part = temp_path(path)
    torch.save(dict(content, torch=str(torch.__version__)), part)
    os.replace(part, path)


def task_of(path):
    return load_checkpoint(path, None)["task"]


def load_checkpoint(path, task, hint=""):
    """A checkpoint of ours as a dict; anything else becomes one clear line. task: what it must be of, names joined by " or "; None: of any.
    Never runs code from the file."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such checkpoint; {hint or 'check the path, or train one with train.py'}")
    check_file(path, "checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as why:                                                  # torch raises half a dozen kinds here
        raise BadInput(f"{path}: not a checkpoint that can be loaded safely ({type(why).__name__}); expected a .pt written by train.py") from why
    if not isinstance(content, dict) or not {"task", "config", "ema"} <= set(content):
        raise BadInput(f"{path}: a torch file, but not a nanosync checkpoint (no task, config and weights in it); train one with train.py")
    if task and content["task"] not in task.split(" or "):
        raise BadInput(f"{path}: a checkpoint of task {content['task']}, but {task} is needed; give one made by train.py --task {task}")
    return content


def towers_names(state):
    """Until the shipped weights are converted: old names of the two towers' weights -> today's."""
    two_video = any(k.startswith("video.space_blocks") for k in state)
    if not any(k.startswith("video.time_blocks") for k in state):
        return state
    rules = [(r"^video\.space_blocks\.(\d+)\.", r"layers.\1.video.0."),
             (r"^video\.time_blocks\.(\d+)\.", rf"layers.\1.video.{int(two_video)}."),
             (r"^audio\.blocks\.(\d+)\.", r"layers.\1.audio."),
             (r"^a2v_blocks\.(\d+)\.", r"layers.\1.audio_to_video."),
             (r"^v2a_blocks\.(\d+)\.", r"layers.\1.video_to_audio."),
             (r"^style_blocks\.(\d+)\.", r"layers.\1.style."),
             (r"^(layers\.\d+\.(?:video\.\d|audio)\.)cross\.", r"\1cross_attn."),
             (r"norm_table", "scale_shift_table"),
             (r"^(video|audio)\.embed\.", r"\1.proj_in."),
             (r"^(video|audio)\.clock\.", r"\1.time_embed."),
             (r"^(video|audio)\.read\.", r"\1.text_proj."),
             (r"^(video|audio)\.adaln\.", r"\1.adaln.linear."),
             (r"^text\.", "text_encoder."),
             (r"^speech\.", "transcript_encoder.")]
    renamed = {}
    for k, v in state.items():
        for pattern, name in rules:
            k = re.sub(pattern, name, k)
        renamed[k] = v
    return renamed


def load_weights(model, state, path):
    """Weights (stored as half precision or not) into a model; every key that does not fit is named in one line."""
    state = towers_names(state)
    own = model.state_dict()
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise BadInput(f"{path}: {len(wrong)} of its tensors do not fit this network (for instance {sorted(wrong)[0]}); it was made for another size")
    model.load_state_dict(state)
    return model


# ------------------------------------------------------------------------------------------------ windows: what is trained on

def clip_windows(clip, size=64, frames=FRAMES, hop=.5, audio_lead=0.):
    """A real clip -> its windows, dicts of video, audio, caption, start (seconds). BadInput if the clip cannot be used.

    For training a window begins every `hop` seconds and the last one ends with the clip. These are the temporal crops, each
    with a first frame of its own: a causal VAE codes a crop otherwise than the same stretch within a clip. For evaluation
    (split 'test') there are three, evenly spaced: 450 for AVSync15, 732 for The Greatest Hits. audio_lead=0.5 is the protocol of
    the CycleSync study (Syncphony C.2): the first begins at 0.5 s, each sound begins so much before its pictures (it can be
    delayed and stays real), and clips too short for that are left out, which leaves AVSync15 with 438."""
    video, wave = read_clip(clip["path"], *sides(size), sound=clip["sound"])
    first, short = round(audio_lead * FPS), 1 if audio_lead else frames // 8
    spare = len(video) - frames
    if spare < first - short:
        raise BadInput(f"{clip['path']}: {len(video) / FPS:.2f} s long; at least {(first + frames - short) / FPS:.2f} s are needed")
    if spare < first:                                                         # a little short: the last frame stays
        video, spare = np.concatenate([video, np.repeat(video[-1:], first - spare, 0)]), first
    starts = np.linspace(first, spare, 3).round() if clip["split"] == "test" else np.union1d(np.arange(first, spare, round(hop * FPS)), spare)
    n, wave = round((audio_lead + frames / FPS) * RATE), np.pad(wave, (0, round(frames / FPS * RATE)))
    cut = lambda s: wave[round((s - first) / FPS * RATE):][:n]                # exactly n samples
    return [dict(video=video[s:s + frames], audio=cut(s), caption=clip["prompt"], start=s / FPS) for s in starts.astype(int)]


# ------------------------------------------------------------------------------------------------ caches

def workers():
    """A pool of fresh processes, one per core, that leave Ctrl-C to their parent and compute on one thread each."""
    return get_context("spawn").Pool(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), _worker)


def _worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _prepared(job):
    """In a worker: an item (a toybox seed, or a real clip) -> its windows with their log-mels, or why there are none."""
    item, size, variations = job
    try:
        windows = [dict(toybox_clip(item, size, variation=k), start=k * FRAMES / FPS) for k in range(variations)] if isinstance(item, int) else clip_windows(item, size)
    except BadInput as why:
        return str(why).removeprefix(f"{item['path']}: ")
    return [{k: w.get(k, "") for k in ("video", "audio", "caption", "start", "speech")} | dict(mel=log_mel(w["audio"])) for w in windows]


def prepare(folder, settings, items, vae, device, autocast, audio_encoder=None, raw=False):
    """Fill a cache with the windows of `items`, or go on filling it; then `open_cache` reads it.

    Shard after shard: latents (n, 2, C, L, h, w) (posterior mean and log-variance), mels (n, 2S, 64), with `audio_encoder` also
    features (n, S, A), with `raw` also videos and sounds; a .json written last makes a shard complete. A shard depends on
    its items alone, so a run that was killed at any moment and started again leaves the same bytes as one that was not.
    settings: what the cache depends on; one made with others is refused."""
    folder, settings = Path(folder), dict(settings, clips=len(items), 
                                              named=zlib.crc32(json.dumps([[_name(i), i if isinstance(i, int) else i["prompt"]] for i in items]).encode()))
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "settings.json").is_file():
        _same_settings(folder, settings)
    else:
        _write(folder / "settings.json", json.dumps(settings, sort_keys=True))
    per = max(32, math.ceil(len(items) / 500))
    shards = {k: items[a:a + per] for k, a in enumerate(range(0, len(items), per))}
    todo = [k for k in shards if not (folder / f"{k:05d}.json").is_file()]
    if not todo and (folder / "manifest.json").is_file():
        return                                                                # several processes may open a finished cache at once
    for leftover in folder.glob(".*"):                                        # of a run that was killed
        leftover.unlink()
    jobs = [(item, settings["resolution"], settings.get("variations", 1)) for k in todo for item in shards[k]]
    with workers() if len(jobs) > 64 else nullcontext() as pool, torch.no_grad(), autocast(), tqdm(
            total=len(items), initial=len(items) - len(jobs), desc=f"preparing {folder.parent.name}", unit="clip", disable=None) as bar:
        results = imap_bounded(pool, jobs, bar)
        for k in todo:
            _write_shard(folder, k, shards[k], results, vae, device, audio_encoder, raw)
    _write(folder / "manifest.json", json.dumps(dict(settings, shards=len(shards)), sort_keys=True))


def imap_bounded(pool, jobs, bar, most=16):
    """What `_prepared` makes of the jobs, in order; workers run at most so many jobs ahead (videos are large)."""
    waiting = deque()
    for job in jobs:
        waiting.append(pool.apply_async(_prepared, (job,)).get if pool else lambda job=job: _prepared(job))
        if len(waiting) > most * bool(pool):
            yield waiting.popleft()()
            bar.update()
    for result in waiting:
        yield result()
        bar.update()


def _name(item):
    return item if isinstance(item, int) else item["name"]


def _write_shard(folder, k, items, results, vae, device, audio_encoder, raw):
    rows, skipped, codes, batch = [], {}, [], []
    arrays = dict(mels=[], **({"features": []} if audio_encoder else {}), **({"videos": [], "sounds": []} if raw else {}))

    def encode():
        video = torch.from_numpy(np.stack(batch)).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1         # (n, 3, F, H, W)
        code = vae.encode(video) if video.shape[3] <= 256 else vae.encode_chunks(video)
        codes.append(torch.stack(code, 1).cpu().to(torch.float16).numpy())                                    # (n, 2, C, L, h, w)
        batch.clear()
    for item, windows in zip(items, results):
        if isinstance(windows, str):
            skipped[_name(item)] = windows
            continue
        for w in windows:
            made = dict(mels=w["mel"], videos=w["video"], sounds=w["audio"], features=audio_encoder(w["audio"]) if audio_encoder else None)
            for name, rows_of in arrays.items():
                rows_of.append(made[name] if name == "videos" else made[name].astype(np.float16))
            rows.append([_name(item), w["caption"], w["start"], w["speech"]]), batch.append(w["video"])
            if len(batch) == (4 if w["video"].shape[1] <= 256 else 1):
                encode()
    if batch:
        encode()
    arrays = {name: np.array(values) for name, values in arrays.items()} | dict(latents=np.concatenate(codes) if codes else np.zeros((0, 2)))
    sums = {}
    for key, array in arrays.items():
        part = temp_path(folder / f"{k:05d}-{key}.npy")
        np.save(part, array)
        sums[key] = zlib.crc32(part.read_bytes())
        os.replace(part, folder / f"{k:05d}-{key}.npy")
    _write(folder / f"{k:05d}.json", json.dumps(dict(rows=rows, skipped=skipped, crc32=sums), sort_keys=True))


def _write(path, text):
    part = temp_path(path)
    part.write_text(text)
    os.replace(part, path)


def _same_settings(folder, settings):
    found = json.loads((folder / "settings.json").read_text())
    other = [f"{k} {found.get(k)} (now {v})" for k, v in settings.items() if found.get(k) != v]
    if other:
        raise BadInput(f"{folder}: this cache was made with {', '.join(other)}; remove that folder, or keep it and give another --data-root")


def open_cache(folder):
    """A prepared folder -> dict: arrays (name -> list of memory-mapped shards), at (n, 2) the shard and row of every window,
    captions, starts in seconds, speech (what is said), clips (for every clip the numbers of its windows), skipped (name -> reason). Every file's sum is checked."""
    folder = Path(folder)
    shards = [json.loads((folder / f"{k:05d}.json").read_text()) for k in range(json.loads((folder / "manifest.json").read_text())["shards"])]
    arrays, at, captions, starts, speech, clips, skipped = {}, [], [], [], [], {}, {}
    for k, shard in enumerate(shards):
        for name, total in shard["crc32"].items():
            path = folder / f"{k:05d}-{name}.npy"
            if not path.is_file() or zlib.crc32(path.read_bytes()) != total:
                raise BadInput(f"{path}: missing or damaged (its sum is not the one noted when it was written); remove {folder / f'{k:05d}.json'} "
                               "and run the same command: that shard is made again")
            arrays.setdefault(name, []).append(np.load(path, mmap_mode="r"))
        for row, (clip, caption, start, *said) in enumerate(shard["rows"]):       # caches of before there was speech have three entries
            clips.setdefault(clip, []).append(len(at))
            at.append((k, row)), captions.append(caption), starts.append(start), speech.append("".join(said))
        skipped.update(shard["skipped"])
    return dict(folder=folder, arrays=arrays, at=np.array(at).reshape(-1, 2), captions=captions, starts=np.array(starts), speech=speech, clips=list(clips.values()), skipped=skipped)


def gather(cache, name, index):
    """Rows of an array of a cache -> tensor (len(index), ...)."""
    return torch.from_numpy(np.stack([cache["arrays"][name][k][row] for k, row in cache["at"][index]]))


# ------------------------------------------------------------------------------------------------ the command: look and prepare

def list_clips(name, root="data", clips=2000, variations=1):
    """--data -> a label for its cache, its items by split, and a line on what was found."""
    if name == "toybox":
        return f"toybox-{clips}{f'x{variations}' if variations > 1 else ''}", dict(train=list(range(clips)), test=[]), f"toybox: {clips} clips, drawn from their seeds"
    found, words = find_clips(name, root)
    splits = {s: [c for c in found if c["split"] == s] for s in ("train", "test")}
    return dataset_folder(name, root).resolve().name, splits, words


def load_or_prepare(name, root, split, size, vae, vae_id, device, autocast, clips=2000, audio_encoder=None, audio_tag="hubert", variations=1, log=print):
    """The cache of a dataset's split, made first where it is absent or unfinished. `vae_id` names the VAE that codes it, `audio_tag` what
    `audio_encoder` makes of every sound; `variations`: of toybox clips; `log` gets the report: what was found, what was skipped and why."""
    if name == "toybox":
        only_square(size)
    label, splits, words = list_clips(name, root, clips, variations)
    if not splits[split]:
        raise BadInput(f"--data {name}: no clips for {'training' if split == 'train' else 'testing'} in it; give at least two clips, or lists that name some of both")
    shown = "x".join(map(str, sides(size))) if not isinstance(size, int) else size
    folder = Path(root) / "cache" / f"{label}-{shown}px-{vae_id}{f'-{audio_tag}' if audio_encoder else ''}" / split
    settings = dict(data=label, split=split, resolution=size if isinstance(size, int) else list(size), vae=vae_id, fps=FPS, frames=FRAMES, **dict(variations=variations) if variations > 1 else {})
    prepare(folder, settings, splits[split], vae, device, autocast, audio_encoder, raw=name != "toybox" and split == "test")
    cache = open_cache(folder)
    log(f"{words}\n{folder}: {len(cache['clips'])} clips, {len(cache['at'])} windows of {FRAMES} frames")
    reasons = {}
    for clip, why in cache["skipped"].items():
        reasons.setdefault(why, []).append(clip)
    for why, named in sorted(reasons.items(), key=lambda r: -len(r[1])):
        log(f"  skipped {len(named)}: {why}; for instance {', '.join(named[:3])}")
    _write(folder / "skipped.txt", "".join(f"{clip}\t{why}\n" for clip, why in sorted(cache["skipped"].items())))
    if not cache["clips"]:
        raise BadInput(f"--data {name}: not one of its {len(splits[split])} {split} clips can be used; {folder / 'skipped.txt'} says why")
    return cache


def contact_sheet(name, root, path, size=64, rows=8):
    """What one looks at before training: some clips as film strips over their sounds, event times marked where they are known."""
    from PIL import Image, ImageDraw
    _, splits, words = list_clips(name, root)
    items, strips = splits["train"] + splits["test"], []
    for item in [items[i] for i in np.random.default_rng(0).permutation(len(items))]:
        if len(strips) == rows:
            break
        try:
            clip = toybox_clip(item, size) if isinstance(item, int) else dict(zip(("video", "audio"), read_clip(item["path"], *sides(size), sound=item["sound"])))
        except BadInput as why:
            print(f"skipped  {why}")
            continue
        events = clip["events"] if isinstance(item, int) else [t for t, _ in item["events"] or []]
        strip = Image.fromarray(film_strip(clip["video"], clip["audio"], events=events))
        picture = Image.new("RGB", (strip.width, strip.height + 14), "white")
        picture.paste(strip, (0, 14))
        words_of = clip["caption"] if isinstance(item, int) else f"{item['name']}  '{item['prompt']}'  {item['split']}"
        ImageDraw.Draw(picture).text((2, 1), f"{words_of}  {len(clip['video']) / FPS:.1f} s", fill="black")
        strips.append(np.asarray(picture))
    if not strips:
        raise BadInput(f"--data {name}: not one of its {len(items)} clips can be read")
    write_picture(path, np.concatenate(strips))
    print(f"{words}\n{path}: {len(strips)} clips, frames over sound on one time axis")


def arguments():
    p = Parser(__doc__)
    p.add_argument("--data", default="toybox", help=f"toybox, {', '.join(DATASETS)}, or a folder of clips")
    p.add_argument("--data-root", default="data", help="where datasets and caches lie")
    p.add_argument("--resolution", type=picture_size, default=64, help="side of the pictures in pixels, or height x width: 384x640")
    p.add_argument("--show", required=True, help="draw a contact sheet into this .png")
    return p


def main():
    args = arguments().parse_args()
    contact_sheet(args.data, args.data_root, args.show, args.resolution)


if __name__ == "__main__":
    run_cli(main)
