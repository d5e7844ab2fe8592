"""Everything on disk: sounds, pictures and videos, datasets as they were downloaded, caches of
latents, checkpoints; and the lines that all command-line programs share.

    python data.py --data avsync15 --show sheet.png    # some clips as film strips over their sounds

    a folder of clips -> find_clips -> read_clip -> clip_windows -> prepare -> open_cache -> gather
    a toybox seed     -> toybox_clip ------------------/

`--data` is toybox, the name of a dataset (avsync15, greatesthits, vggsound, landscapes) or any
folder of clips. The lists, tables and folder names that come with it are read as they are; nothing
is renamed or unpacked. Clips that cannot be trusted are skipped, counted and named. `prepare` codes
every clip once; training then reads latents from disk.

Whatever is wrong with a file becomes a `BadInput`, whose text says what was found, what was
expected and what to do; `run_cli` prints it as one line and exits with code 2.

    F frames · H W height, width · n windows of a shard · L latents · C h w latent channels and grid
    S audio steps (50 Hz) · A audio features · video uint8 (F, H, W, 3) · times in seconds
    waveform float32 (samples,) in [-1, 1], mono, 16 kHz · size: a side, or (height, width)
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
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, process
from contextlib import closing, contextmanager, nullcontext
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from toybox import FPS, FRAMES, RATE, toybox_clip

MEL_RATE, MELS = 100, 64        # log-mel frames per second (two per audio step), bands up to 8 kHz

# Limits that are checked before decoding, because a damaged header may claim any length: samples of
# a sound (an hour of stereo at 48 kHz, 1.6 GB), seconds of a clip (180 MB at 64 x 64 pixels).
MAX_SAMPLES = 400_000_000
MAX_SECONDS = 600


# -------------------------------------------------------------------------- command-line programs

class BadInput(ValueError):
    """Something a user gave cannot be used; the text says what to do about it."""


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as help, defaults shown, errors in one line."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Formatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def number(kind=float, low=-math.inf, high=math.inf):
    """For `type=` of an argument: a finite number in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and abs(value) < math.inf:
            return value
        raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text!r}")
    return parse


def picture_size(text):
    """For `type=` of --resolution: '64' -> 64, '384x640' -> (384, 640): height x width."""
    size = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if len(size) > 2 or any(side % 32 or not 32 <= side <= 2048 for side in size):
        raise argparse.ArgumentTypeError("expected a side, such as 64, or height x width, such as "
                                         f"384x640, in multiples of 32 up to 2048, got {text!r}")
    return size[0] if len(set(size)) == 1 else tuple(size)


def sides(size):
    """64 or (384, 640) -> (height, width)"""
    return (size, size) if isinstance(size, int) else tuple(size)


def only_square(size):
    if not isinstance(size, int):
        raise BadInput(f"--resolution {size[0]}x{size[1]}: the toybox is square; give one side")


def run_cli(main):
    """Run a program's `main`: bad input ends in one line on stderr and exit code 2."""
    # A log file grows while the run goes on; names that are not UTF-8 can be printed.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; nothing half-written is left behind", file=sys.stderr)
        sys.exit(130)


# ----------------------------------------------------------------------------------------- media in

def frames_to_tensor(frames, device="cpu"):
    """Frames uint8 (.., F, H, W, 3), numpy or torch -> float32 (.., 3, F, H, W) in [-1, 1]."""
    if not isinstance(frames, torch.Tensor):
        frames = torch.tensor(np.asarray(frames))
    return frames.to(device).movedim(-1, -4).float() / 127.5 - 1


def tensor_to_frames(video):
    """Float tensor (.., 3, F, H, W), clamped to [-1, 1] -> numpy uint8 (.., F, H, W, 3)."""
    # + 128, not + 127.5: the conversion to uint8 truncates, so this rounds to the nearest value.
    frames = (video.clamp(-1, 1) * 127.5 + 128).to(torch.uint8)
    return frames.movedim(-4, -1).cpu().numpy()


def check_file(path, what):
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such {what} file; check the path")
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: the file is empty (0 bytes); give a {what} file with content")
    return path


def run_ffmpeg(*arguments):
    """Run the ffmpeg of imageio-ffmpeg -> whether it succeeded, its output (bytes), its log."""
    import imageio_ffmpeg
    # Files are the only protocol: a downloaded "clip" may be a playlist of addresses.
    flags = ["-hide_banner", "-nostdin", "-nostats", "-y", "-protocol_whitelist", "file"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *flags, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    return done.returncode == 0, done.stdout, done.stderr.decode(errors="replace")


def last_reason(log):
    """The last line of ffmpeg's log without the names of its parts."""
    return (log.strip().splitlines() or ["no reason given"])[-1].split(": ")[-1]


def read_audio(path, rate=RATE):
    """Any sound file, or clip with sound -> waveform float32 (samples,) at `rate`."""
    import librosa
    import soundfile
    path = check_file(path, "audio")
    try:
        # wav, flac, ogg and mp3. Channels are mixed down to their mean.
        with soundfile.SoundFile(path) as file:
            file_rate = file.samplerate
            if file.frames * file.channels > MAX_SAMPLES:
                raise BadInput(f"{path}: {file.frames} x {file.channels} samples, if its header is "
                               f"right; at most {MAX_SAMPLES} can be read: cut it")
            wave = file.read(dtype="float32", always_2d=True).mean(1)         # (samples,)
    except soundfile.LibsndfileError:
        # All else: ffmpeg decodes, mixes down and resamples.
        file_rate = rate
        done, raw, log = run_ffmpeg("-v", "error", "-i", path.resolve(), "-t", MAX_SAMPLES // rate,
                                    "-vn", "-af", f"aresample={rate}:ochl=mono:rematrix_maxval=1",
                                    "-f", "f32le", "-")
        wave = np.frombuffer(raw[:len(raw) // 4 * 4], np.float32)
        if not done or len(wave) == 0:
            raise BadInput(f"{path}: no sound can be read from it ({last_reason(log)}); "
                           "expected wav, flac, ogg, mp3, m4a or mp4 with sound") from None
    # NaN fails every comparison. Values far above full scale would overflow when resampled.
    bad = np.count_nonzero(~(np.abs(wave) < 1e6))
    if bad:
        raise BadInput(f"{path}: {bad} samples are NaN, infinite or above 1e6; re-export the sound")
    if file_rate != rate:
        wave = librosa.resample(wave, orig_sr=file_rate, target_sr=rate)
    if len(wave) < rate // 10:
        raise BadInput(f"{path}: {1000 * len(wave) / rate:.0f} ms of sound; 100 ms are needed")
    return np.clip(wave, -1, 1).astype(np.float32)


def read_image(path, size=64):
    """Any picture -> uint8 (H, W, 3): centre crop to the aspect of `size`, antialiased resize."""
    from PIL import Image                                 # comes with imageio
    path = check_file(path, "image")
    height, width = sides(size)
    try:
        picture = Image.open(path)
        # A large jpeg is decoded at a fraction of its size.
        picture.draft("RGB", (2 * max(height, width), 2 * max(height, width)))
        picture.load()
        # 16 bits or more per value: scaled by the range that the values use.
        if picture.mode.startswith("I") or picture.mode == "F":
            values = np.asarray(picture, np.float64)
            values = values / (65535 if values.max() > 255 else 255) * 255
            picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        # What is transparent becomes white.
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as why:
        raise BadInput(f"{path}: not a picture that can be read ({str(why).splitlines()[0]}); "
                       "expected png, jpg, webp or bmp") from why
    # The largest centred piece of the wanted aspect.
    w, h = picture.size
    crop_w = min(w, h * width / height)
    crop_h = min(h, w * height / width)
    crop = ((w - crop_w) / 2, (h - crop_h) / 2, (w + crop_w) / 2, (h + crop_h) / 2)
    return np.asarray(picture.convert("RGB").resize((width, height), Image.LANCZOS, box=crop))


def fit_length(wave, samples):
    """Waveform (n,) -> (samples,): cut, or padded with silence."""
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))


def log_mel(wave):
    """Waveform (samples,) at 16 kHz -> float32 (frames at 100 Hz, 64): log energies of windows of
    25 ms, about zero mean and unit variance."""
    import librosa
    mel = librosa.feature.melspectrogram(y=wave, sr=RATE, n_fft=512, win_length=400,
                                         hop_length=RATE // MEL_RATE, n_mels=MELS, fmin=40)
    # The floor (1e-6) and the scale are constants, not the clip's: loud and soft stay different,
    # and silence stays silence however long it lasts.
    frames = len(wave) * MEL_RATE // RATE
    return ((np.log10(mel.T[:frames] + 1e-6) + 3.) / 1.6).astype(np.float32)


# ----------------------------------------------------------- media in: two streams on one clock

def decode(path, max_seconds, *arguments):
    """Decode a stream of a file -> its samples (bytes), ffmpeg's log."""
    # -copyts keeps the times of the file. Filters called showinfo print them to the log, which has
    # a [level] on every line.
    _, raw, log = run_ffmpeg("-loglevel", "repeat+level+info", "-copyts", "-t", max_seconds + 1,
                             "-i", Path(path).resolve(), *arguments, "-")
    return raw, log


def time_stamps(log, name):
    """The times (seconds) that a showinfo filter printed, one per frame."""
    return [float(t) for t in re.findall(rf"Parsed_{name} .*pts_time:\s*(-?[\d.]+)", log)]


def raise_on_decode_error(path, log, what):
    if "matches no streams" in log:
        raise BadInput(f"{path}: no {what} in it")
    # ffmpeg goes on after an error, but then what comes out is not what was recorded.
    errors = re.findall(r"\[(?:error|fatal|panic)\] (.*)", log)
    if errors:
        reason = last_reason(errors[0])
        raise BadInput(f"{path}: its {what} is damaged or not of a known kind ({reason})")


def decode_pictures(path, height, width, fps, max_seconds):
    """-> video uint8 (F, height, width, 3) at `fps`, times of the file's frames, times of these F.
    Centre crop to the aspect, antialiased resize; rotation and pixel shape are honoured."""
    path = check_file(path, "video")
    # sar: width of a pixel over its height, 0 if unknown. One showinfo before and one after the
    # change of the frame rate.
    crop = (f"crop=w='min(iw,ih*{width / height}/if(sar,sar,1))'"
            f":h='min(ih,iw*if(sar,sar,1)*{height / width})':exact=1")
    filters = (f"showinfo=checksum=0,fps={fps},format=rgb24,{crop},"
               f"scale={width}:{height}:flags=bicubic+accurate_rnd,setsar=1,showinfo=checksum=0")
    raw, log = decode(path, max_seconds, "-map", "0:V:0", "-vf", filters,
                      "-f", "rawvideo", "-fps_mode", "passthrough")
    file_times = time_stamps(log, "showinfo_0")
    frame_times = time_stamps(log, "showinfo_6")
    raise_on_decode_error(path, log, "picture")
    video = np.frombuffer(raw, np.uint8)
    video = video[:len(frame_times) * height * width * 3].reshape(-1, height, width, 3)
    if len(video) < 2:
        raise BadInput(f"{path}: {len(video)} frames; at least 2 are needed")
    if len(video) > max_seconds * fps:
        raise BadInput(f"{path}: longer than {max_seconds / 60:g} minutes; cut it into clips")
    # At a low rate frames repeat, and motion is shown later than it happened.
    steps = len(file_times) - 1
    seconds = file_times[-1] - file_times[0]
    if steps < fps / 2 * seconds:
        raise BadInput(f"{path}: {steps / seconds:.1f} frames per second; {fps / 2:g} are needed")
    return video, file_times, frame_times


def read_video(path, size=64, fps=FPS, max_seconds=MAX_SECONDS):
    """The pictures of a clip, with or without sound -> uint8 (F, H, W, 3) of `size`."""
    return decode_pictures(path, *sides(size), fps, max_seconds)[0]


def read_clip(path, height=64, width=64, fps=FPS, rate=RATE, sound=None, max_seconds=MAX_SECONDS):
    """Both streams of a clip on ONE clock -> video uint8 (F, height, width, 3), waveform float32
    (round(F / fps * rate),).

    sound: a wav for a video without a sound track. Raises BadInput for what cannot be trusted:
    damaged, still, silent, under half of `fps`, longer than `max_seconds`.
    """
    video, file_times, frame_times = decode_pictures(path, height, width, fps, max_seconds)
    video_start = frame_times[0]

    # async=1 fills gaps in the track: a sample's index then says its time. If a wav stands in, its
    # time 0 is that of the first picture in the file.
    filters = (f"aresample={rate}:async=1:ochl=mono:rematrix_maxval=1,"
               "aformat=sample_fmts=flt:channel_layouts=mono,ashowinfo")
    arguments = ["-map", "0:a:0", "-af", filters, "-f", "f32le"]
    raw, log = decode(path, max_seconds, *arguments)
    if sound and "matches no streams" in log:
        raw, log = decode(sound, max_seconds, *arguments)
        video_start -= file_times[0]
    raise_on_decode_error(path, log, "sound")
    wave = np.frombuffer(raw, np.float32)
    wave_start = (time_stamps(log, "ashowinfo_2") or [video_start])[0]
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: its sound has NaN samples")

    # The tracks of a file may begin at different times, and a clip whose sound is 40 ms off teaches
    # the wrong thing. The clip is what both tracks cover, from the first frame with sound on:
    #
    #     pictures    |----|----|----|----|----|----|          frames of 1 / fps
    #     sound             ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
    #     clip              skip|----|----|----|----|
    #
    # ffmpeg prints times rounded, so a thousandth of a frame counts as nothing. The last frame may
    # have sound for a part of it: the rest is silence.
    first = max(0, math.ceil((wave_start - video_start) * fps - 1e-3))
    skip = round((video_start + first / fps - wave_start) * rate)
    frames = min(len(video) - first, math.ceil((len(wave) - skip) / rate * fps - 1e-3))
    if frames < 2 or skip < 0:
        raise BadInput(f"{path}: picture and sound have less than 2 frames in common")
    samples = round(frames / fps * rate)
    video = video[first:first + frames]
    wave = wave[skip:skip + samples]
    wave = np.pad(wave, (0, samples - len(wave)))

    # Static: no frame differs from the first by half a step of 255 on average. Silence: -80 dB.
    if np.abs(video[1:].astype(np.int16) - video[0]).mean((1, 2, 3)).max() < .5:
        raise BadInput(f"{path}: a static picture")
    if wave.std() < 1e-4:
        raise BadInput(f"{path}: its sound is silence")
    return video, wave.clip(-1, 1)


# ---------------------------------------------------------------------------------------- media out

def temp_path(path):
    """Where to write before renaming to `path`: the same folder and suffix, a hidden name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


@contextmanager
def replacing(path):
    """Yields a temporary path, which becomes `path` when the block ends and is removed when it
    fails: half a file never carries the real name."""
    part = temp_path(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_picture(path, picture):
    import imageio.v3 as iio
    with replacing(path) as part:
        iio.imwrite(part, picture)


def write_sound(path, wave, rate=RATE):
    import soundfile
    with replacing(path) as part:
        soundfile.write(part, wave, rate)


def add_sound(path, video, wave, rate=RATE):
    """Write the video file `video` with `wave` (samples,) as its sound to `path` (mp4)."""
    import soundfile
    sound = temp_path(path).with_suffix(".wav")
    inputs = ["-i", Path(video).resolve(), "-i", sound, "-map", "0:V:0", "-map", "1:a:0"]
    outputs = ["-c:a", "aac", "-b:a", "128k", "-movflags", "+faststart"]
    try:
        soundfile.write(sound, wave, rate)
        with replacing(path) as part:
            # Pictures are copied as they are. What an mp4 cannot hold is coded again.
            for codec in (["copy"], ["libx264", "-crf", "12", "-pix_fmt", "yuv420p"]):
                done, _, log = run_ffmpeg("-v", "error", *inputs, "-c:v", *codec, *outputs, part)
                if done:
                    break
            else:
                raise BadInput(f"{video}: cannot be written as mp4 ({last_reason(log)})")
    finally:
        sound.unlink(missing_ok=True)


def write_video(path, frames, wave, fps=FPS, rate=RATE):
    """H.264 + AAC -> the number of frames written. frames: uint8 (F, H, W, 3), or an iterator of
    such pieces, so that a long video is never in memory; wave=None: no sound."""
    import imageio_ffmpeg
    pieces = iter([frames] if isinstance(frames, np.ndarray) else frames)
    piece = next(pieces)
    height, width = piece.shape[1:3]
    if height % 2 or width % 2:
        raise BadInput(f"{path}: H.264 needs an even height and width, got {height}x{width}")
    silent = temp_path(path).with_suffix(".silent.mp4")
    writer = imageio_ffmpeg.write_frames(
        str(silent), (width, height), fps=fps, codec="libx264", quality=None, macro_block_size=1,
        output_params=["-crf", "12"], ffmpeg_log_level="error")
    count = 0
    try:
        # Closing the writer waits until ffmpeg has finished the file.
        with closing(writer):
            writer.send(None)
            for piece in chain([piece], pieces):
                for frame in piece:
                    writer.send(np.ascontiguousarray(frame))
                count += len(piece)
        if wave is None:
            os.replace(silent, path)
            return count
        # The sound is cut or padded with silence to the length of the pictures.
        add_sound(path, silent, fit_length(wave, round(count / fps * rate)), rate)
        return count
    finally:
        silent.unlink(missing_ok=True)


def film_strip(video, wave, shown=12, fps=FPS, rate=RATE, events=()):
    """Frames over the waveform on one time axis -> uint8 (H + 40, shown * W, 3). events: seconds,
    marked by red lines."""
    n, H, W = video.shape[:3]
    seconds = n / fps
    shown = min(shown, n)
    width, height = shown * W, 40
    # The frame above a stretch of sound is the one in the middle of that stretch.
    middle = ((np.arange(shown) + .5) * n / shown).astype(int)
    frames = np.concatenate(list(video[middle]), 1)                           # (H, width, 3)

    # The loudest sample of every column, in pixels to either side of the axis.
    wave = fit_length(wave, max(1, round(seconds * rate)))
    loudest = [np.abs(part).max(initial=0) for part in np.array_split(wave, width)]
    loudest = np.array(loudest) / max(*loudest, 1e-3) * (height / 2 - 2)      # (width,)
    # Dark where a pixel is closer to the axis than that.
    distance = np.abs(np.arange(height) - (height - 1) / 2)[:, None]          # (40, 1)
    plot = np.where(distance <= np.maximum(loudest, .5), 60, 245).astype(np.uint8)
    plot = np.repeat(plot[..., None], 3, 2)                                   # (40, width, 3)
    marks = np.array([t for t in events if 0 <= t < seconds]) / seconds * width
    plot[:, marks.astype(int)] = 220, 40, 40
    return np.concatenate([frames, plot], 0)


# -------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, **content):
    """content: plain types and tensors only."""
    with replacing(path) as part:
        torch.save(dict(content, torch=str(torch.__version__)), part)


def load_checkpoint(path, task, hint="check the path, or train one with train.py"):
    """A checkpoint of train.py as a dict. task: of which it must be, names joined by " or "; None:
    of any."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such checkpoint; {hint}")
    check_file(path, "checkpoint")
    # weights_only: loading never runs code from the file.
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as why:                              # torch raises half a dozen kinds
        raise BadInput(f"{path}: not a checkpoint that can be loaded safely "
                       f"({type(why).__name__}); expected a .pt written by train.py") from why
    if not isinstance(content, dict) or not {"task", "config", "ema"} <= set(content):
        raise BadInput(f"{path}: a torch file, but not a nanosync checkpoint (no task, config, "
                       "weights); train one with train.py")
    if task and content["task"] not in task.split(" or "):
        raise BadInput(f"{path}: a checkpoint of task {content['task']}, but {task} is needed; "
                       f"give one made by train.py --task {task}")
    return content


def task_of(path):
    return load_checkpoint(path, None)["task"]


def load_weights(model, state, path):
    """Weights (stored as half precision or not) into a model; BadInput if they do not fit."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    wrong = [k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)]
    if wrong:
        raise BadInput(f"{path}: {len(wrong)} of its tensors do not fit this network (for instance "
                       f"{sorted(wrong)[0]}); it was made for another size")
    model.load_state_dict(state)
    return model


# --------------------------------------------------------------- datasets as they were downloaded

DATASETS = {     # how much it is, and where it comes from
    "avsync15": "1500 clips, 109 minutes; Google Drive, see the README of github.com/lzhangbj/ASVA",
    "greatesthits": "977 videos, 9.5 hours, vis-data-256.zip; andrewowens.com/vis",
    "vggsound": "200 000 clips of 10 s and vggsound.csv; www.robots.ox.ac.uk/~vgg/data/vggsound",
    "landscapes": "1000 clips of 10 s; Google Drive, see github.com/researchmm/MM-Diffusion",
}
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
SPLITS = ("train", "test", "val")
HITS = ("_denoised", "_denoised_thumb", "_mic")    # what follows an id of The Greatest Hits


def dataset_folder(name, root="data"):
    """--data -> the folder: <root>/<name> in any spelling (AVSync15, avsync_15), or a path."""
    def letters(text):
        return "".join(c for c in text.lower() if c.isalnum())

    # The shortest of several names that begin alike: avsync15, not avsync15-old.
    if name in DATASETS:
        found = [p for p in Path(root).glob("*") if letters(p.name).startswith(letters(name))]
        found = [p for p in found if p.is_dir()]
        if found:
            return min(found, key=lambda p: (len(p.name), p))
        raise BadInput(f"--data {name}: not found in {root}/. It is {DATASETS[name]}. Unpack it as "
                       f"{Path(root) / name}/ (any inner layout) or give --data-root")
    if not Path(name).is_dir():
        raise BadInput(f"--data {name}: neither a dataset (toybox, {', '.join(DATASETS)}) nor a "
                       "folder of clips")
    return Path(name)


def find_clips(name, root="data"):
    """Everything that --data names, in whatever layout it was downloaded -> list of clips, report.

    A clip is a dict: path, name (relative to the folder), split ("train", "test", "val"), kind (its
    class), prompt, sound (a wav beside it, for when the video has none) and events (times in
    seconds and materials, The Greatest Hits) or None.
    """
    folder = dataset_folder(name, root)
    files = [p for p in folder.rglob("[!.]*") if p.suffix.lower() in VIDEOS and p.is_file()]
    files.sort()
    if not files:
        raise BadInput(f"{folder}: no clips in it; expected {' '.join(VIDEOS)}")

    # The split comes from lists, else from a table, else from folder names.
    chosen, missing = {}, []
    lists = [p for p in sorted(folder.rglob("*.txt")) if p.stem in SPLITS]
    lists.sort(key=lambda p: len(p.parts))
    tables = [] if lists else sorted(folder.rglob("*.csv"))
    if lists or tables:
        chosen, missing = clips_by_lists(lists, files) if lists else clips_by_tables(tables, files)
        source = ", ".join(sorted({p.name for p in lists + tables}))
    if missing and not chosen:
        raise BadInput(f"{folder}: none of the {len(missing)} clips that its {source} name exists "
                       f"(for instance {missing[0]}); check that the videos are unpacked in it")
    if not chosen:
        chosen, source = clips_by_folders(folder, files)

    # ASVA's datasets may hold a table from class folders to prompts.
    mapping = next(folder.rglob("class_mapping.json"), None)
    prompts = parse_file(mapping, json.loads) if mapping else {}
    clips = [describe_clip(path, folder, *chosen[path], prompts) for path in sorted(chosen)]

    counts = Counter(c["split"] for c in clips)
    counts = ", ".join(f"{counts[split]} {split}" for split in SPLITS if counts[split])
    report = f"{folder}: {counts} clips of {len({c['kind'] for c in clips})} classes, by {source}"
    if missing:
        some = ", ".join(missing[:3])
        report += f"; {len(missing)} named there are missing, for instance {some}"
    return clips, report


def parse_file(path, parse):
    """parse(text of a file); BadInput if it is not UTF-8 or not of the expected form."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, csv.Error) as why:
        reason = str(why).splitlines()[0]
        raise BadInput(f"{path}: cannot be read ({reason}); download it again") from None


def clips_by_lists(lists, files):
    """train.txt, test.txt -> {path: (split, None)}, lines without a file."""
    chosen, missing = {}, []
    for listing in lists:
        # A line is the end of a path, with or without its suffix: class/clip.mp4, clip.mp4 or an
        # id. So every end of every path is entered in a table. Where two files share one, the last
        # counts: one of this split (Landscapes has the same names in both), else the highest up.
        by_end = {}
        for path in sorted(files, key=lambda p: (listing.stem in p.parts, -len(p.parts), p)):
            for start in range(len(path.parts)):
                end = "/".join(path.parts[start:])
                by_end[end] = by_end[end.removesuffix(path.suffix)] = path
        for line in filter(None, map(str.strip, parse_file(listing, str.splitlines))):
            found = [by_end[line + suffix] for suffix in ("", *HITS) if line + suffix in by_end]
            if found:
                chosen.setdefault(found[0], (listing.stem, None))
            else:
                missing.append(line)
    return chosen, missing


def clips_by_tables(tables, files):
    """vggsound.csv, rows of id, start, label, split without a header -> {path: (split, label)},
    rows without a file."""
    def parse(text):
        rows = [row for row in csv.reader(text.splitlines()) if len(row) == 4]
        rows = [row for row in rows if row[3].strip() in SPLITS]
        return {(row[0], int(float(row[1]))): (row[3].strip(), row[2]) for row in rows}

    # Clips are called <id>_<start> or <id>_<start>_<end>, in seconds, padded or not. Ids have 11
    # characters, "_" among them.
    starts = {path: re.match(r"_(\d+)", path.stem[11:]) for path in files}
    by_key = {(path.stem[:11], int(start[1])): path for path, start in starts.items() if start}
    rows = {}
    for table in tables:
        rows |= parse_file(table, parse)
    chosen = {by_key[key]: row for key, row in rows.items() if key in by_key}
    return chosen, [f"{key[0]}_{key[1]}" for key in rows if key not in by_key]


def clips_by_folders(folder, files):
    """Any tree -> {path: (split, None)}, how it was split."""
    # By a folder called train, test or val on the way ...
    names = {path: path.relative_to(folder) for path in files}
    splits = {p: next((s for s in name.parts if s in SPLITS), None) for p, name in names.items()}
    if any(splits.values()):
        chosen = {path: (split or "train", None) for path, split in splits.items()}
        return chosen, "folders train and test"
    # ... else one clip in ten is for testing, by a hash of its name, so that clips that are added
    # later change nothing. At least one of several clips, never a single one.
    hashes = {path: zlib.crc32(str(name).encode()) for path, name in names.items()}
    test = {p for p in files if hashes[p] % 10 == 0} or {min(files, key=hashes.get)}
    test = test if len(files) > 1 else set()
    chosen = {path: ("test" if path in test else "train", None) for path in files}
    return chosen, "a split invented here: one clip in ten is for testing, drawn by its name"


def describe_clip(path, folder, split, label, prompts):
    """The dict of a clip, see `find_clips`."""
    # Its class is the label of a table, else the name of its folder.
    parent = path.parent.name
    if path.parent == folder or parent in ("videos", *SPLITS):
        parent = ""
    # playing_violin__fiddle -> playing violin fiddle
    prompt = label or prompts.get(parent) or " ".join(parent.replace("_", " ").split())
    clip = dict(path=str(path), name=path.relative_to(folder).as_posix(), split=split,
                kind=label or parent, prompt=prompt, sound=None, events=None)

    # Ids of The Greatest Hits are dates: 2015-02-16-16-49-06_denoised.mp4. The sound may be in a
    # wav, event times in 2015-02-16-16-49-06_times.txt.
    hit = re.fullmatch(r"(\d{4}(?:-\d\d){5}.*?)(_denoised_thumb|_denoised|_mic)", path.stem)
    if hit:
        clip.update(prompt="hitting with a stick", kind="hitting")
        wavs = [path.with_name(hit[1] + suffix + ".wav") for suffix in (hit[2], *HITS)]
        clip["sound"] = next((str(p) for p in wavs if p.is_file()), None)
        times = path.with_name(hit[1] + "_times.txt")
        clip["events"] = parse_file(times, parse_hits) if times.is_file() else None
    return clip


def parse_hits(text):
    """Lines of time, material, action, reaction -> [(time, material)]."""
    # 'None None None' happens, and empty lines.
    rows = [line.split() for line in text.splitlines()]
    return [(float(row[0]), row[1]) for row in rows if len(row) == 4 and row[2] != "None"]


# ------------------------------------------------------------------- windows: what is trained on

def clip_windows(clip, size=64, frames=FRAMES, hop=.5, audio_lead=0.):
    """A real clip -> its windows, dicts of video, audio, caption, start (seconds).

    audio_lead=0.5 is the protocol of the CycleSync study (Syncphony C.2): the first window begins
    at 0.5 s and each sound 0.5 s before its pictures, so that it can be delayed and stays real.
    """
    video, wave = read_clip(clip["path"], *sides(size), sound=clip["sound"])
    # Up to an eighth of the frames may be missing, then the last one is held: the shortest clip of
    # AVSync15 has 48. Not in the study, which leaves short clips out: 438 windows of AVSync15.
    first = round(audio_lead * FPS)
    needed = first + frames - (1 if audio_lead else frames // 8)
    if len(video) < needed:
        raise BadInput(f"{clip['path']}: {len(video) / FPS:.2f} s long; "
                       f"at least {needed / FPS:.2f} s are needed")
    lacking = max(0, first + frames - len(video))
    video = np.concatenate([video, np.repeat(video[-1:], lacking, 0)])

    # Evaluation: three, evenly spaced, as in Syncphony: 450 of AVSync15, 732 of The Greatest Hits.
    # Training: one every `hop` seconds, the last ends with the clip. Each has a first frame of its
    # own: a causal VAE codes a crop differently from the same stretch within a clip.
    last = len(video) - frames
    if clip["split"] == "test":
        starts = np.linspace(first, last, 3).round()
    else:
        starts = np.union1d(np.arange(first, last, round(hop * FPS)), last)

    # The sound is padded, so that every window gets exactly as many samples.
    samples = round((audio_lead + frames / FPS) * RATE)
    wave = np.pad(wave, (0, round(frames / FPS * RATE)))
    windows = []
    for start in starts.astype(int):
        offset = round((start - first) / FPS * RATE)
        windows.append(dict(video=video[start:start + frames], audio=wave[offset:offset + samples],
                            caption=clip["prompt"], start=start / FPS))
    return windows


# ------------------------------------------------------------------------------------------- caches

class Skipped(NamedTuple):
    """Stands for the windows of a clip that cannot be used."""
    reason: str


def item_windows(item, size, variations=1):
    """An item of a cache -> list of its windows (dicts) with their log-mels, or Skipped."""
    # Items are the dicts of `find_clips`; those of the toybox have a seed instead of a path.
    if "seed" in item:
        windows = [dict(toybox_clip(item["seed"], size, variation=k), start=k * FRAMES / FPS)
                   for k in range(variations)]
    else:
        try:
            windows = clip_windows(item, size)
        except BadInput as why:
            return Skipped(str(why).removeprefix(f"{item['path']}: "))
    kept = ("video", "audio", "caption", "start", "speech")
    return [{k: w.get(k, "") for k in kept} | dict(mel=log_mel(w["audio"])) for w in windows]


def start_worker():
    # Ctrl-C is for the parent; every core has a worker already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def workers():
    """A pool of fresh processes, one per core, at most 16."""
    # Each imports torch: 0.3 GB. Forked processes would inherit its threads in an unknown state.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ProcessPoolExecutor(min(16, cores), get_context("spawn"), start_worker)


def all_windows(items, size, variations, pool, ahead=16):
    """(item, item_windows(item)) of all items, in order."""
    if pool is None:
        yield from ((item, item_windows(item, size, variations)) for item in items)
        return

    def submit(item):
        return item, pool.submit(item_windows, item, size, variations)

    # Workers run at most `ahead` items ahead of the reader: videos are large.
    items = iter(items)
    waiting = deque(map(submit, islice(items, ahead)))
    while waiting:
        item, future = waiting.popleft()
        try:
            yield item, future.result()
        except process.BrokenProcessPool:
            raise BadInput("a worker process died while it prepared clips, probably for lack of "
                           "memory; free some and run the same command again") from None
        waiting.extend(map(submit, islice(items, 1)))


def prepare(folder, settings, items, vae, device, autocast, audio_encoder=None, raw=False):
    """Fill a cache with the windows of `items`, or go on filling it; `open_cache` then reads it.

        folder/settings.json        what the cache depends on; a run with others is refused
               00000-latents.npy    (n, 2, C, L, h, w): posterior mean and log-variance
               00000-mels.npy       (n, 2S, 64)
               00000-features.npy   (n, S, A), if there is an `audio_encoder`
               00000-videos.npy     (n, F, H, W, 3) uint8, and -sounds.npy (n, samples), if `raw`
               00000.json           a row per window, skipped clips, sizes and sums of these files
               00001-latents.npy    ...
               manifest.json        the number of shards

    All but videos are float16. A shard's .json is written last and says that the shard is complete;
    manifest.json says so of the cache. A shard depends on its items alone, so a run that was killed
    at any moment and started again ends with the same bytes as one that was not.
    """
    folder = Path(folder)
    # The items are settings too: a cache is not filled with some of one list, some of another.
    names = json.dumps([[item["name"], item["prompt"]] for item in items])
    settings = dict(settings, clips=len(items), named=zlib.crc32(names.encode()))
    check_settings(folder / "settings.json", settings)

    # Shards of 32 items or more, at most 500 of them. Complete ones are left as they are.
    per_shard = max(32, math.ceil(len(items) / 500))
    shards = [items[a:a + per_shard] for a in range(0, len(items), per_shard)]
    todo = [k for k in range(len(shards)) if not (folder / f"{k:05d}.json").is_file()]
    if not todo and (folder / "manifest.json").is_file():
        return
    # Temporary files of a run that was killed; those of one that is running are younger.
    for leftover in folder.glob(".*"):
        if time.time() - leftover.stat().st_mtime > 3600:
            leftover.unlink(missing_ok=True)

    # It takes workers seconds to start: a few clips are faster without.
    left = list(chain.from_iterable(shards[k] for k in todo))
    with workers() if len(left) > 64 else nullcontext() as pool, torch.no_grad(), autocast():
        windows = all_windows(left, settings["resolution"], settings.get("variations", 1), pool)
        windows = iter(tqdm(windows, f"preparing {folder.parent.name}", len(items), unit="clip",
                            initial=len(items) - len(left), disable=None))
        for k in todo:
            results = islice(windows, len(shards[k]))
            write_shard(folder, k, results, vae, device, audio_encoder, raw)
    write_text(folder / "manifest.json", json.dumps(dict(settings, shards=len(shards))))


def check_settings(path, settings):
    """Write the settings of a new cache, compare those of an old one."""
    text = json.dumps(settings, sort_keys=True)
    if not path.is_file():
        write_text(path, text)
    settings = json.loads(text)                           # tuples are lists in a file
    found = json.loads(path.read_text())
    other = [f"{k} {found.get(k)} (now {v})" for k, v in settings.items() if found.get(k) != v]
    if other:
        raise BadInput(f"{path.parent}: this cache was made with {', '.join(other)}; remove that "
                       "folder, or keep it and give another --data-root")


def write_shard(folder, k, results, vae, device, audio_encoder, raw):
    """Code and write shard k. results: (item, its windows or Skipped), in order."""
    rows, skipped, batch = [], {}, []
    arrays = dict(latents=[], mels=[])
    arrays |= dict(features=[]) if audio_encoder else {}
    arrays |= dict(videos=[], sounds=[]) if raw else {}

    def encode_batch():
        video = frames_to_tensor(np.stack(batch), device)                     # (n, 3, F, H, W)
        mean, logvar = vae.encode_chunks(video)
        latents = torch.stack([mean, logvar], 1).cpu().to(torch.float16)      # (n, 2, C, L, h, w)
        arrays["latents"].extend(latents.numpy())
        batch.clear()

    # A row per window. Skipped clips are remembered with their reasons.
    for item, windows in results:
        if isinstance(windows, Skipped):
            skipped[item["name"]] = windows.reason
            continue
        for window in windows:
            rows.append([item["name"], window["caption"], window["start"], window["speech"]])
            arrays["mels"].append(window["mel"].astype(np.float16))
            if audio_encoder:
                arrays["features"].append(audio_encoder(window["audio"]).astype(np.float16))
            if raw:
                arrays["videos"].append(window["video"])
                arrays["sounds"].append(window["audio"].astype(np.float16))
            # Four windows of up to 256 pixels fit in any memory; larger ones are coded in chunks.
            batch.append(window["video"])
            if len(batch) == (4 if window["video"].shape[1] <= 256 else 1):
                encode_batch()
    if batch:
        encode_batch()

    # The arrays, then their sizes and sums.
    files = {}
    for name, values in arrays.items():
        path = folder / f"{k:05d}-{name}.npy"
        with replacing(path) as part:
            np.save(part, np.array(values))
        files[name] = dict(bytes=path.stat().st_size, crc32=checksum(path))
    summary = dict(rows=rows, skipped=skipped, files=files)
    write_text(folder / f"{k:05d}.json", json.dumps(summary, sort_keys=True))


def checksum(path):
    return zlib.crc32(np.memmap(path, np.uint8, "r"))


def open_cache(folder, verify=False):
    """A prepared folder -> dict: arrays (name -> list of memory-mapped shards), at (n, 2) the shard
    and row of every window, captions, starts in seconds, speech, clips (for every clip the indices
    of its windows), skipped (name -> reason)."""
    folder = Path(folder)
    arrays, skipped, clips, at, rows = {}, {}, {}, [], []
    for k in range(json.loads((folder / "manifest.json").read_text())["shards"]):
        summary = folder / f"{k:05d}.json"
        shard = json.loads(summary.read_text())
        for name, written in shard["files"].items():
            # Every file must have the size that was noted when it was written. verify: the checksum
            # too, which reads all of it (hours for large datasets).
            path = folder / f"{k:05d}-{name}.npy"
            intact = path.is_file() and path.stat().st_size == written["bytes"]
            if not intact or (verify and checksum(path) != written["crc32"]):
                raise BadInput(f"{path}: missing or damaged (not as it was written); remove "
                               f"{summary} and run the same command: that shard is made again")
            arrays.setdefault(name, []).append(np.load(path, mmap_mode="r"))
        at += [(k, row) for row in range(len(shard["rows"]))]
        rows += shard["rows"]
        skipped |= shard["skipped"]
    # rows: [clip, caption, start, speech] of every window.
    for i, (clip, *_) in enumerate(rows):
        clips.setdefault(clip, []).append(i)
    return dict(folder=folder, arrays=arrays, at=np.array(at).reshape(-1, 2), skipped=skipped,
                clips=list(clips.values()), captions=[row[1] for row in rows],
                starts=np.array([row[2] for row in rows]), speech=[row[3] for row in rows])


def gather(cache, name, index):
    """Rows of an array of a cache -> tensor (len(index), ...)."""
    shards = cache["arrays"][name]
    return torch.from_numpy(np.stack([shards[k][row] for k, row in cache["at"][index]]))


def list_clips(name, root="data", clips=2000, variations=1):
    """--data -> a label for its cache, its items by split, and a report of what was found."""
    if name == "toybox":
        label = f"toybox-{clips}" + (f"x{variations}" if variations > 1 else "")
        report = f"toybox: {clips} clips, drawn from their seeds"
        items = [dict(name=f"seed {seed}", seed=seed, prompt="") for seed in range(clips)]
        return label, dict(train=items, test=[]), report
    found, report = find_clips(name, root)
    splits = {split: [c for c in found if c["split"] == split] for split in ("train", "test")}
    return dataset_folder(name, root).resolve().name, splits, report


def load_or_prepare(name, root, split, size, vae, vae_id, device, autocast, clips=2000,
                    audio_encoder=None, audio_tag="hubert", variations=1, log=print):
    """The cache of a dataset's split, prepared first where it is absent or unfinished. vae_id names
    the VAE, audio_tag what `audio_encoder` makes of every sound. clips, variations: of the toybox.
    log gets the report: what was found, what was skipped and why."""
    if name == "toybox":
        only_square(size)
    label, splits, report = list_clips(name, root, clips, variations)
    items = splits[split]
    if not items:
        purpose = "training" if split == "train" else "testing"
        raise BadInput(f"--data {name}: no clips for {purpose} in it; give at least two clips, or "
                       "lists that name some of both")

    # What the cache depends on is in the settings, and in the folder's name what users vary.
    settings = dict(data=label, split=split, vae=vae_id, fps=FPS, frames=FRAMES, resolution=size)
    if variations > 1:
        settings["variations"] = variations
    pixels = size if isinstance(size, int) else "x".join(map(str, size))
    tag = f"{label}-{pixels}px-{vae_id}" + (f"-{audio_tag}" if audio_encoder else "")
    folder = Path(root) / "cache" / tag / split
    # Evaluation of real clips compares with the pixels and samples themselves.
    raw = name != "toybox" and split == "test"
    prepare(folder, settings, items, vae, device, autocast, audio_encoder, raw)

    # Report what was skipped: how many clips for each reason; skipped.txt names them.
    cache = open_cache(folder)
    skipped = cache["skipped"]
    log(f"{report}\n{folder}: {len(cache['clips'])} clips, {len(cache['at'])} windows of "
        f"{FRAMES} frames")
    for reason, count in Counter(skipped.values()).most_common():
        log(f"  skipped {count}: {reason}")
    lines = [f"{clip}\t{reason}\n" for clip, reason in sorted(skipped.items())]
    write_text(folder / "skipped.txt", "".join(lines))
    if not cache["clips"]:
        raise BadInput(f"--data {name}: not one of its {len(items)} {split} clips can be used; "
                       f"{folder / 'skipped.txt'} says why")
    return cache


# --------------------------------------------------------------------- the command: a contact sheet

def labelled_strip(item, size):
    """An item -> film strip with a line of text above it, events marked, uint8 (H + 54, W, 3)."""
    from PIL import Image, ImageDraw
    if "seed" in item:
        clip = toybox_clip(item["seed"], size)
        video, wave, events, text = (clip[k] for k in ("video", "audio", "events", "caption"))
    else:
        video, wave = read_clip(item["path"], *sides(size), sound=item["sound"])
        events = [t for t, _ in item["events"] or []]
        text = f"{item['name']}  '{item['prompt']}'  {item['split']}"
    strip = Image.fromarray(film_strip(video, wave, events=events))
    picture = Image.new("RGB", (strip.width, strip.height + 14), "white")
    picture.paste(strip, (0, 14))
    ImageDraw.Draw(picture).text((2, 1), f"{text}  {len(video) / FPS:.1f} s", fill="black")
    return np.asarray(picture)


def contact_sheet(name, root, path, size=64, rows=8):
    """Some clips of a dataset, drawn at random, as film strips over their sounds -> a picture."""
    _, splits, report = list_clips(name, root)
    items = splits["train"] + splits["test"]
    strips = []
    for i in np.random.default_rng(0).permutation(len(items)):
        try:
            strips.append(labelled_strip(items[i], size))
        except BadInput as why:
            print(f"skipped  {why}")
        if len(strips) == rows:
            break
    if not strips:
        raise BadInput(f"--data {name}: not one of its {len(items)} clips can be read")
    # A clip of fewer frames than a strip shows has a narrower strip.
    width = max(strip.shape[1] for strip in strips)
    strips = [np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255)
              for strip in strips]
    write_picture(path, np.concatenate(strips))
    print(f"{report}\n{path}: {len(strips)} clips, frames over sound on one time axis")


def arguments():
    p = Parser(__doc__)
    p.add_argument("--data", default="toybox",
                   help=f"toybox, {', '.join(DATASETS)}, or a folder of clips")
    p.add_argument("--data-root", default="data", help="the folder of datasets and caches")
    p.add_argument("--resolution", type=picture_size, default=64,
                   help="side of the pictures in pixels, or height x width: 384x640")
    p.add_argument("--show", required=True, help="draw a contact sheet into this .png")
    return p


def main():
    args = arguments().parse_args()
    contact_sheet(args.data, args.data_root, args.show, args.resolution)


if __name__ == "__main__":
    run_cli(main)
