"""Everything on disk: sounds, pictures and videos, datasets as they were downloaded, caches of
latents, checkpoints; and the lines that all command-line programs share.

    python data.py --data avsync15 --show sheet.png    # some clips as film strips over their sounds

    a folder of clips -> find_clips -> read_clip -> clip_windows -> prepare -> open_cache -> gather
    a toybox seed     -> toybox_clip ------------------/

`--data` is toybox, the name of a dataset (avsync15, greatesthits, vggsound, landscapes) or any
folder of clips. The lists, tables and folder names that come with it are read as they are; nothing
is renamed or unpacked. Clips that cannot be trusted are skipped, counted and named. `prepare` codes
every clip once; training then reads latents from disk, or, to train an autoencoder, frames.

Whatever is wrong with a file becomes a `BadInput`, whose text says what was found, what was
expected and what to do; `run_cli` prints it as one line and exits with code 2.

    F frames · H W height, width · n windows of a shard · L latents · C h w latent channels and grid
    S audio steps (50 Hz) · A audio features · video uint8 (F, H, W, 3) · times in seconds
    waveform float32 (samples,) in [-1, 1], mono, 16 kHz · size: a side, or (height, width)
"""
import argparse
import csv
import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import cache, partial
from itertools import chain, islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from tqdm import tqdm

from toybox import FPS, FRAMES, RATE, toybox_clip
from vae import LogMel

MEL_PIECE = 6000                # log-mel frames made at a time: a minute
MEL_RATE, MELS = 100, 64        # log-mel frames per second (two per audio step), bands up to 8 kHz

# For ffmpeg's aresample: gaps of more than 40 ms, about a frame, are filled (its default is 0.1 s),
# so that the index of a sample says its time; smaller ones are jitter of time stamps. Channels are
# mixed to their mean.
MONO = "async=1:min_hard_comp=0.04:ochl=mono:rematrix_maxval=1"

# Seconds that are decoded at most, because a damaged file may claim any length. Of a sound, 0.7 GB
# at 48 kHz (a longer one is cut), and of a video to add sound to (a longer one is refused):
MAX_SOUND = 3600
PIECE = 2 ** 24                 # bytes of such a video that are in memory at a time
# Of a clip, 180 MB at 64 x 64 pixels and 11 GB at 384 x 640 (for a moment twice that, in every
# process that prepares clips); what is longer is skipped.
MAX_SECONDS = 600

# Of the frames that an autoencoder of real video is trained on
STORE = 2 ** 34                 # bytes on disk at most: 7000 windows of 128 x 128 pixels, 4 hours
STORE_SHARD = 2 ** 28           # bytes of a shard at most: it is in memory until it is written
STORE_WINDOWS = 32              # of a clip at most: a long take shows few different things

# A header may claim any size: looked at before anything is decoded.
# Of a picture or a frame, 0.8 GB. Larger ones, as of phones of 108 megapixels, are refused.
MAX_PIXELS = 10 ** 8
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")        # EPS would run a program

# What a sound or a clip may be for ffmpeg. Playlists (hls, concat, dash) and patterns of file names
# (image2) are none: they name other files, of this machine or of others.
FORMATS = ("mov,mp4,m4a,matroska,webm,avi,mpegts,mpeg,flv,asf,wav,w64,flac,ogg,mp3,aac,ac3,aiff,au,"
           "caf,amr,ape,wv,tta")


# -------------------------------------------------------------------------- command-line programs

class BadInput(ValueError):
    """Something a user gave cannot be used; the text says what to do about it."""

    def __str__(self):
        return one_line(super().__str__())


def one_line(text):
    """Names of files may hold line breaks, terminal codes, and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as help, defaults shown, errors in one line."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            # What has no default says in words what is taken instead.
            return action.help if action.default is None else super()._get_help_string(action)

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Formatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"error: {one_line(message)}; see {self.prog} --help\n")


def number(kind=float, low=-1e18, high=1e18):
    """For `type=` of an argument: a number in [low, high], by default what 64 bits hold."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text!r}")
    return parse


def picture_size(text):
    """For `type=` of --resolution: '64' -> 64, '384x640' -> (384, 640): height x width."""
    size = [int(side) if re.fullmatch(r"\d{1,4}", side) else 0 for side in text.split("x")]
    size = size[0] if len(set(size)) == 1 and len(size) < 3 else tuple(size)
    if not is_size(size):
        raise argparse.ArgumentTypeError("expected a side, such as 64, or height x width, such as "
                                         f"384x640, in multiples of 32 up to 2048, got {text!r}")
    return size


def is_size(size):
    """Is it a side, or (height, width)?"""
    pair = size if isinstance(size, tuple) else (size, size)
    return len(pair) == 2 and all(type(n) is int and n % 32 == 0 and 32 <= n <= 2048 for n in pair)


def sides(size):
    """64 or (384, 640) -> (height, width)"""
    return (size, size) if isinstance(size, int) else tuple(size)


def only_square(size):
    if not isinstance(size, int):
        raise BadInput(f"--resolution {size[0]}x{size[1]}: the toybox is square; give one side")


def on_sigterm(number, frame):
    """As Ctrl-C: blocks of `finally` run, so that temporary files are removed."""
    # Workers may have been sent the signal too: that they end is no error of theirs.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    raise KeyboardInterrupt(number)


def run_cli(main):
    """Run a program's `main`: bad input ends in one line on stderr and exit code 2, Ctrl-C and
    SIGTERM in one line and 130 or 143. Nothing half-written stays (`replacing`): a cache keeps its
    complete shards, --jsonl its finished clips, and the same command goes on. A training has
    handlers of its own (`train.Run.on_signal`)."""
    signal.signal(signal.SIGTERM, on_sigterm)
    # A log file grows while the run goes on; names that are not UTF-8 can be printed.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # `| head` has read enough. Python would write what is left in its buffer once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        # A full disk, a folder in place of a file, no permission: of any file
        where = error.filename2 or error.filename or "a file could not be read or written"
        # (From a worker process it comes with a traceback above its last line.)
        reason = str(error.strerror or error).strip().rpartition("\n")[2]
        print(f"error: {one_line(where)}: {one_line(reason)}; check the path, its permissions and "
              "the space that is left", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the memory of the GPU is too small for this; of these give what --help names:"
              " fewer --seconds or --eval-clips, a smaller --resolution or --batch-size, a larger "
              "--accum, --device cpu", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as why:
        # PyTorch names its allocator where a CPU has too little memory.
        if isinstance(why, RuntimeError) and "DefaultCPUAllocator" not in str(why):
            raise
        print("error: the memory is too small for this; give shorter clips, a smaller --resolution "
              "or --batch-size, or a larger --accum", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as why:
        print("stopped; nothing half-written is left behind", file=sys.stderr)
        # 128 + the number of the signal, as shells do.
        sys.exit(128 + (why.args or [signal.SIGINT])[0])


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


def fit_length(wave, samples):
    """Waveform (n,) -> (samples,): cut, or padded with silence."""
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))


def check_file(path, what, hint="check the path"):
    path = Path(path)
    # os.path takes every name; Path raises for one that is too long.
    if os.path.isdir(path):
        raise BadInput(f"{path}: is a folder; give a file, the {what}")
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such {what}; {hint}")
    if os.path.getsize(path) == 0:
        raise BadInput(f"{path}: the file is empty (0 bytes); the {what} should be in it")
    return path


def ffmpeg_command(*arguments):
    """The command line of the ffmpeg of imageio-ffmpeg."""
    import imageio_ffmpeg
    flags = ["-hide_banner", "-nostdin", "-nostats", "-y"]
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as why:
        raise OSError(errno.ENOENT, str(why), "ffmpeg") from None
    return [program, *flags, *map(str, arguments)]


def run_ffmpeg(*arguments, stdin=b""):
    """Run ffmpeg -> whether it succeeded, its output (bytes), its log."""
    # A session of its own: Ctrl-C does not reach it, and a training takes its step to the end.
    done = subprocess.run(ffmpeg_command(*arguments), capture_output=True, input=stdin,
                          start_new_session=True)
    return done.returncode == 0, done.stdout, done.stderr.decode(errors="replace")


def input_file(path):
    """ffmpeg's arguments for a file that may be hostile. file: means that nothing in its name is
    special; the format is found by its content alone."""
    return ["-protocol_whitelist", "file", "-format_whitelist", FORMATS, "-max_pixels", MAX_PIXELS,
            "-i", f"file:{Path(path).resolve()}"]


def last_reason(log):
    """The last line of ffmpeg's log without the names of its parts."""
    return (log.strip().splitlines() or ["no reason given"])[-1].split(": ")[-1]


def read_audio(path, rate=RATE):
    """Any sound file, or clip with sound -> waveform float32 (samples,) at `rate`."""
    path = check_file(path, "audio")
    # Time 0 is that of the file: a track that begins later is preceded by silence. (So is Opus in
    # webm and mkv, by 7 ms, since ffmpeg counts the samples that a decoder drops at the start.)
    done, raw, log = run_ffmpeg("-v", "error", "-t", MAX_SOUND, *input_file(path), "-map", "0:a:0",
                                "-af", f"aresample={rate}:{MONO}:first_pts=0", "-f", "f32le", "-")
    wave = np.frombuffer(raw, np.float32)
    if not done or len(wave) == 0:
        raise BadInput(f"{path}: no sound can be read from it ({last_reason(log)}); "
                       "expected wav, flac, ogg, mp3, m4a or mp4 with sound")
    if not np.isfinite(wave).all():
        raise BadInput(f"{path}: samples are NaN or infinite; re-export the sound")
    if len(wave) < rate // 10:
        raise BadInput(f"{path}: {1000 * len(wave) / rate:.0f} ms of sound; 100 ms are needed")
    return wave.clip(-1, 1)


def read_image(path, size=64):
    """Any picture, the right way up -> uint8 (H, W, 3): centre crop to the aspect of `size`,
    antialiased resize."""
    from PIL import Image, ImageOps                       # comes with imageio
    path = check_file(path, "image")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS                   # PIL warns of more; that becomes an error
    height, width = sides(size)
    # A damaged file is one of a dozen kinds of exceptions.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path, formats=PICTURES)
            picture.load()
            # Phones store turned pictures, and how they are turned.
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I") or picture.mode == "F":
                values = np.nan_to_num(np.asarray(picture, np.float32))
                # 16 bits reach 65535, however dark the picture; of other kinds the values tell.
                top = 65535 if values.max() > 255 or picture.mode.startswith("I;16") else 255
                if picture.mode == "F" and values.max() <= 1:
                    top = 1
                values *= 255 / top
                picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            picture = ImageOps.fit(picture.convert("RGBA"), (width, height), Image.LANCZOS)
    except Exception as why:
        raise BadInput(f"{path}: not a picture that can be read ({why or type(why).__name__}); "
                       f"expected png, jpg, webp or bmp, of {MAX_PIXELS:,} pixels at most") from why
    # What is transparent becomes white.
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


@cache
def log_mel_front():
    return LogMel(RATE, MELS)


def log_mel(wave):
    """Waveform (samples,) at 16 kHz -> float32 (frames at 100 Hz, 64): log energies of windows of
    25 ms, about zero mean and unit variance."""
    front = log_mel_front()
    frames = len(wave) * MEL_RATE // RATE
    # A minute at a time: the spectrum of a long sound would be large. A window reaches less than
    # two frames to either side.
    pieces = []
    for start in range(0, max(1, frames), MEL_PIECE):
        first = max(0, start - 2)
        piece = wave[first * front.hop:(start + MEL_PIECE + 2) * front.hop]
        mel = front(torch.tensor(np.asarray(piece, np.float32))[None])[0].T
        pieces.append(mel[start - first:][:MEL_PIECE])
    return torch.cat(pieces)[:frames].numpy()


# ----------------------------------------------------------- media in: two streams on one clock

def decode(path, what, times, block, limit, *arguments):
    """Yields one stream of a file in blocks of bytes. When it has ended, times (seconds) holds
    "start", where the file begins, and for each showinfo filter (first time, last time, number of
    frames), such as {"start": 0.0, "showinfo_0": (0.0, 2.0, 49)}."""
    path = check_file(path, "video" if what == "picture" else what)
    # -copyts keeps the times of the file; made to begin at 0, sounds were read up to 23 ms wrong.
    # Every line of the log has a [level].
    command = ffmpeg_command("-loglevel", "repeat+level+info", "-copyts", "-t", limit + 1,
                             *input_file(path), *arguments, "-")
    # The log has a line per frame: it would fill a pipe while nobody reads it.
    bases = {}                  # filter: the unit of its times, in seconds
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log,
                              start_new_session=True) as ffmpeg:
            while raw := ffmpeg.stdout.read(block):
                yield raw
        log.seek(0)
        for line in log:
            # The level stands behind the names of parts. Titles and file names may hold any text.
            error = re.match(r"(?:\[[^]]+ @ \w+\] )*\[(?:error|fatal|panic)\] (.*)", line)
            if error and "matches no streams" in error[1]:
                raise BadInput(f"{path}: no {what} in it")
            # Not the clip's fault, so a cache must not remember it as skipped.
            if error and "Unrecognized option" in error[1]:
                raise OSError(errno.ENOSYS, "ffmpeg is older than 5.1; pip install --upgrade "
                              "imageio-ffmpeg, unset IMAGEIO_FFMPEG_EXE", command[0])
            # ffmpeg goes on after an error, but then what comes out is not what was recorded.
            if error:
                raise BadInput(f"{path}: its {what} is damaged or not of a known kind "
                               f"({last_reason(error[1])})")
            start = re.match(r"\[info\] +Duration: .*, start: (-?\d+\.\d+),", line)
            if start:
                times["start"] = float(start[1])
            part = re.match(r"\[Parsed_(\w+) @ \w+\] \[info\] (.*)", line)
            base = part and re.match(r"config in time_base: (\d+)/(\d+)", part[2])
            if base:
                bases[part[1]] = int(base[1]) / int(base[2])
            # Whole numbers: before 7.1 ffmpeg prints seconds with six digits. ashowinfo does not
            # say its unit: behind aresample it is a sample.
            frame = part and re.match(r"n: *\d+ +pts: *(-?\d+) ", part[2])
            if frame:
                name = part[1]
                unit = 1 / RATE if name.startswith("ashowinfo") else bases.get(name)
                if unit is None:
                    raise BadInput(f"{path}: ffmpeg does not say the unit of its {what}'s times")
                seconds = int(frame[1]) * unit
                first, _, n = times.get(name, (seconds, seconds, 0))
                times[name] = (first, seconds, n + 1)
        # Killed, as for lack of memory, ffmpeg writes no error. That is not the clip's fault
        # either; a crash is. (255: by SIGTERM)
        if ffmpeg.returncode in (-signal.SIGKILL, 255):
            raise OSError(errno.EIO, "ffmpeg was killed; is there memory left?", str(path))
        if ffmpeg.returncode:
            raise BadInput(f"{path}: ffmpeg fails on its {what} (code {ffmpeg.returncode})")


def frame_rate(path):
    """Pictures per second, as they lie in the file."""
    times = {}
    small = ["-vf", "showinfo=checksum=0,scale=2:2,format=gray", "-f", "rawvideo"]
    for _ in decode(path, "picture", times, PIECE, MAX_SECONDS, "-map", "0:V:0", *small,
                    "-fps_mode", "passthrough"):
        pass
    first, last, n = times.get("showinfo_0", (0, 0, 0))
    return (n - 1) / (last - first) if last > first else 0.


def read_video(path, size=64, fps=FPS):
    """The pictures of a clip -> video uint8 (F, H, W, 3); the time of its first frame, a multiple
    of 1 / fps; the time of the first picture in the file. Both in seconds on the file's clock; see
    `stream_video`."""
    times = {}
    video = np.concatenate(list(stream_video(path, size, times, MAX_SECONDS, fps)))
    return video, times["showinfo_6"][0], times["showinfo_0"][0]


def stream_video(path, size=64, times=None, limit=MAX_SOUND, fps=FPS):
    """Yields the pictures of a video at `fps` as uint8 (f, H, W, 3), in pieces, so that
    memory does not grow with its length. Centre crop to the aspect of `size`, antialiased
    resize; rotation and pixel shape are honoured.

    times: see `decode`. limit: in seconds. What is wrong is found at the end at the latest."""
    times = {} if times is None else times
    # sar: width of a pixel over its height, 0 if unknown. ffmpeg numbers the filters of a chain:
    # showinfo_0 logs the pictures as they lie in the file, showinfo_6 those that come out, at
    # multiples of 1 / fps.
    height, width = sides(size)
    crop = (f"crop=w='min(iw,ih*{width / height}/if(sar,sar,1))'"
            f":h='min(ih,iw*if(sar,sar,1)*{height / width})':exact=1")
    filters = (f"showinfo=checksum=0,fps={fps},format=rgb24,{crop},"
               f"scale={width}:{height}:flags=bicubic+accurate_rnd,setsar=1,showinfo=checksum=0")
    arguments = ["-map", "0:V:0", "-vf", filters, "-f", "rawvideo", "-fps_mode", "passthrough"]
    frame_bytes = 3 * height * width
    block = max(1, PIECE // frame_bytes) * frame_bytes
    frames = 0
    with closing(decode(path, "picture", times, block, limit, *arguments)) as blocks:
        for raw in blocks:
            # Of an ffmpeg that was killed, the last frame may be cut.
            raw = raw[:len(raw) // frame_bytes * frame_bytes]
            piece = np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
            frames += len(piece)
            if frames > limit * fps:
                raise BadInput(f"{path}: longer than {limit / 60:g} minutes; cut it into clips")
            yield piece
    if frames < 2:
        raise BadInput(f"{path}: {frames} frames; at least 2 are needed")
    # At a low rate frames repeat, and motion is shown later than it happened.
    first, last, n = times["showinfo_0"]
    if n - 1 < fps / 2 * (last - first):
        raise BadInput(f"{path}: {(n - 1) / (last - first):.1f} frames per second; {fps / 2:g} are "
                       "needed")


def is_static(video):
    """Does no frame of a video uint8 (F, H, W, 3) differ from the first by half a step of 255 on
    average? Frame by frame: all at once would take several times the video's memory."""
    return all(np.abs(frame.astype(np.int16) - video[0]).mean() < .5 for frame in video)


def read_clip(path, size=64, sound=None, fps=FPS, static=False, times=None):
    """Both streams of a clip on ONE clock -> video uint8 (F, H, W, 3), waveform float32
    (round(F / fps * 16 000),).

    sound: a wav for a video without a sound track. times: a dict that gets `begin`, the seconds of
    pictures that were cut because the sound begins later. Raises BadInput for what cannot be
    trusted: damaged, static (unless `static`), silent, below fps / 2, longer than ten minutes.
    """
    video, video_start, file_start = read_video(path, size, fps)
    # aresample, aformat, ashowinfo: the log of the last one is ashowinfo_2.
    filters = f"aresample={RATE}:{MONO},aformat=sample_fmts=flt:channel_layouts=mono,ashowinfo"
    arguments = ["-map", "0:a:0", "-af", filters, "-f", "f32le"]
    logged = {}
    try:
        raw = b"".join(decode(path, "sound", logged, PIECE, MAX_SECONDS, *arguments))
    except BadInput:
        if not sound:
            raise
        # Time 0 of a wav that stands in is that of the first picture in the file.
        logged = {}
        raw = b"".join(decode(sound, "sound", logged, PIECE, MAX_SECONDS, *arguments))
        video_start -= file_start
    wave = np.frombuffer(raw, np.float32)

    # The tracks of a file may begin at different times, and a clip whose sound is 40 ms off teaches
    # the wrong thing. The clip is what both tracks cover, from the first frame with sound on:
    #
    #     pictures    |----|----|----|----|----|----|          frames of 1 / 24 s
    #     sound             ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
    #     clip              skip|----|----|----|----|
    #
    # Times are rounded, so a thousandth of a frame counts as nothing. The last frame may have sound
    # for a part of it: the rest is silence.
    wave_start, _, _ = logged.get("ashowinfo_2", (video_start, 0, 0))
    first = max(0, math.ceil((wave_start - video_start) * fps - 1e-3))
    skip = max(0, round((video_start + first / fps - wave_start) * RATE))
    frames = min(len(video) - first, math.ceil((len(wave) - skip) / RATE * fps - 1e-3))
    if frames < 2:
        raise BadInput(f"{path}: picture and sound have less than 2 frames in common")
    if times is not None:
        times["begin"] = first / fps
    video = video[first:first + frames]
    wave = fit_length(wave[skip:], round(frames / fps * RATE))

    if not static and is_static(video):
        raise BadInput(f"{path}: a static picture")
    # Silence: -80 dB. NaN is not above it either.
    if not wave.std() >= 1e-4:
        raise BadInput(f"{path}: its sound is silence, or has NaN samples")
    return video, wave.clip(-1, 1)


# ---------------------------------------------------------------------------------------- media out

@contextmanager
def replacing(path):
    """Yields a temporary path (same folder and suffix, a hidden name), which becomes `path` when
    the block ends and is removed when it fails: half a file never carries the real name, not even
    after a power failure. What killed processes have left in the folder is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    # Names of files have up to 255 bytes, letters up to 4.
    part = path.with_name(f".{path.stem[:40]}.{socket.gethostname()}-{os.getpid()}{path.suffix}")
    try:
        yield part
        flush(part)
        os.replace(part, path)
        # Some file systems cannot flush a folder.
        with suppress(OSError):
            flush(path.parent)
    except OSError as error:
        # The name that was asked for
        error.filename = str(path) if str(error.filename) == str(part) else error.filename
        raise
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Remove temporary files of processes of this host that no longer live."""
    name = re.compile(rf"\..*\.{re.escape(socket.gethostname())}-(\d{{1,9}})(\.\w+)?")
    for file in folder.glob(".*"):
        owner = name.fullmatch(file.name)
        if owner and not is_alive(int(owner[1])):
            file.unlink(missing_ok=True)


def is_alive(pid):
    try:
        os.kill(pid, 0)                                   # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:                               # a process of another user
        pass
    return True


def flush(path):
    """Wait until a file, or the list of files in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path, text):
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_picture(path, picture):
    import imageio.v3 as iio
    with replacing(path) as part:
        iio.imwrite(part, picture)


def add_sound(path, video, wave, rate=RATE):
    """Write the video file `video` with `wave` (samples,) as its sound to `path` (mp4)."""
    inputs = [*input_file(video), "-f", "f32le", "-ar", rate, "-ac", 1, "-i", "-",
              "-map", "0:V:0", "-map", "1:a:0"]
    outputs = ["-c:a", "aac", "-b:a", "128k", "-movflags", "+faststart"]
    wave = np.ascontiguousarray(wave, np.float32)
    with replacing(path) as part:
        # Pictures are copied as they are. What an mp4 cannot hold is coded again. (file: means that
        # nothing in a name is special.)
        for codec in (["copy"], ["libx264", "-crf", "12", "-pix_fmt", "yuv420p"]):
            done, _, log = run_ffmpeg("-v", "error", *inputs, "-c:v", *codec, *outputs,
                                      f"file:{part}", stdin=memoryview(wave).cast("B"))
            if done:
                return
        raise BadInput(f"{video}: cannot be written as mp4 ({last_reason(log)})")


def write_video(path, frames, wave, fps=FPS, rate=RATE):
    """H.264 + AAC -> the number of frames written. frames: uint8 (F, H, W, 3), or an iterator of
    such pieces, so that a long video is never in memory; wave=None: no sound."""
    import imageio_ffmpeg
    pieces = iter([frames] if isinstance(frames, np.ndarray) else frames)
    piece = next(pieces)
    height, width = piece.shape[1:3]
    if height % 2 or width % 2:
        raise BadInput(f"{path}: H.264 needs an even height and width, got {height}x{width}")
    with replacing(path) as part:
        # Where that cannot be written, Python says why; ffmpeg would do so in many lines.
        part.touch()
        writer = imageio_ffmpeg.write_frames(
            f"file:{part}", (width, height), fps=fps, codec="libx264", quality=None,
            macro_block_size=1, output_params=["-crf", "12"], ffmpeg_log_level="error")
        count = 0
        # Closing the writer waits until ffmpeg has finished the file.
        with closing(writer):
            writer.send(None)
            for piece in chain([piece], pieces):
                for frame in piece:
                    writer.send(np.ascontiguousarray(frame))
                count += len(piece)
        # The sound is cut or padded with silence to the length of the pictures.
        if wave is not None:
            add_sound(part, part, fit_length(wave, round(count / fps * rate)), rate)
    return count


def film_strip(video, wave, rate=RATE, events=(), curves=()):
    """Twelve frames over the waveform on one time axis -> uint8 (H + 40, 12 W, 3). events: in
    seconds, marked by red lines. curves: up to two, of a value per change of frame (F - 1,), drawn
    over the waveform, the first in blue, the second in red, each up to its own maximum."""
    n, H, W = video.shape[:3]
    shown = 12
    seconds = n / FPS
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
    plot = np.full((height, width, 3), 245, np.uint8)
    plot[distance <= np.maximum(loudest, .5)] = 190 if len(curves) else 60
    marks = np.array([t for t in events if 0 <= t < seconds]) / seconds * width
    plot[:, marks.astype(int)] = 220, 40, 40
    for curve, colour in zip(curves, ((30, 80, 200), (220, 40, 40))):
        # What changes from frame k to k + 1 is visible when k + 1 begins.
        share = np.interp(np.arange(width), np.arange(1, n) / n * width, curve / max(1e-9, *curve))
        y = (height - 2) - (height - 4) * share                               # (width,)
        # A line: in every column from its height to that of the next column.
        following = np.append(y[1:], y[-1])
        off = np.abs(np.arange(height)[:, None] - (y + following) / 2)
        plot[off <= np.abs(y - following) / 2 + .6] = colour
    return np.concatenate([frames, plot], 0)


# -------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, **content):
    """content: plain types and tensors only."""
    with replacing(path) as part:
        try:
            torch.save(dict(content, torch=str(torch.__version__)), part)
        except RuntimeError as why:                       # of its C++ part
            raise OSError(errno.EIO, f"cannot be written ({why})", str(path)) from None


def is_number(value, low=0., high=1e9):
    return type(value) in (int, float) and low <= value <= high


def is_guidance(value):
    # Names are those of sample.GUIDANCE; a checkpoint with another one is refused. A shift of 0
    # would divide by 0.
    lowest = dict(asg=0., cfg=0., still=0., sync_video=0., sync_audio=0., guide_below=0., shift=.01,
                  steps=1)
    return type(value) is dict and type(value.get("steps", 1)) is int and all(
        name in lowest and is_number(number, lowest[name]) for name, number in value.items())


def is_fingerprint(value):
    return type(value) is str and re.fullmatch("[0-9a-f]{16}", value) is not None


def is_count(value):
    return type(value) is int and 0 <= value <= 1e9


def is_score(value):
    # -inf: of a run without an evaluation
    return is_number(value, -1e9) or type(value) is float and value == -math.inf


def is_settings(value):
    """{name: a number, a text, None, or a tuple of such}"""
    plain = {type(None), bool, int, float, str}
    return type(value) is dict and all(
        {*map(type, setting)} <= plain if type(setting) in (tuple, list) else type(setting) in plain
        for setting in value.values())


def is_reports(value):
    return type(value) is list and all(type(report) is torch.Tensor for report in value)


def is_weights(value):
    """{name: an ordinary tensor of numbers that are neither infinite nor NaN}"""
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    return type(value) is dict and all(
        type(name) is str and type(w) is torch.Tensor and w.layout is torch.strided
        and w.device.type == "cpu" and w.dtype in kinds
        # A tensor may repeat a few bytes to any size.
        and w.nbytes <= w.untyped_storage().nbytes() and bool(w.isfinite().all())
        for name, w in value.items())


def is_flag(value):
    return type(value) is bool


def is_dict(value):
    return type(value) is dict


def is_text(value):
    return type(value) is str


# What train.py writes and sample.py reads, for every task: name -> check of the value.
ANY_TASK = dict(config=is_settings, ema=is_weights, step=is_count)
SYSTEM = dict(ANY_TASK, size=is_size, vae=is_fingerprint, guidance=is_guidance)
TOWERS = dict(SYSTEM, audio_vae=is_fingerprint, stage=is_text)
CONTENT = {"a2v": SYSTEM, "t2av": TOWERS, "joint": TOWERS,
           "vae": ANY_TASK, "audio-vae": ANY_TASK, "mel-vae": ANY_TASK}
# What may be there: where the VAEs were, and what a run that is resumed needs
MORE_CONTENT = dict(args=is_settings, model=is_weights, optimisers=is_dict, best=is_score,
                    seconds=is_number, logged=is_number, waited=is_number, micro_batch=is_count,
                    reports=is_reports, has_audio=is_flag)


def load_checkpoint(path, task=None, hint="check the path, or train one with train.py"):
    """A checkpoint of train.py as a dict. task: of which it must be, names joined by " or "."""
    path = check_file(path, "checkpoint", hint)
    # weights_only: loading never runs code from the file. mmap: tensors are views of the file, so
    # that none is larger than it or reads beyond it, whatever the file claims. What is wrong with
    # one, torch says by half a dozen kinds of exceptions.
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checks = CONTENT[content["task"]]
    except Exception as why:
        raise BadInput(f"{path}: not a checkpoint that can be loaded safely "
                       f"({type(why).__name__}); expected a .pt written by train.py") from why
    if task and content["task"] not in task.split(" or "):
        raise BadInput(f"{path}: a checkpoint of task {content['task']}, but {task} is needed; "
                       f"give one made by train.py --task {task}")
    content.setdefault("args", {})
    optional = {name: check for name, check in MORE_CONTENT.items() if name in content}
    for name, is_right in {**checks, **optional}.items():
        if name not in content or not is_right(content[name]):
            raise BadInput(f"{path}: its {name} is missing or not as train.py writes it; take "
                           "another copy, or train it again")
    # Many tensors together may repeat a few bytes, too (see is_weights).
    if sum(w.nbytes for w in content["ema"].values()) > path.stat().st_size:
        raise BadInput(f"{path}: claims more weights than it holds; take another copy")
    return content


def fits_number(value, example, most):
    """Is it a number like `example`: whole or not, and above 0 if that is?"""
    if isinstance(example, float):
        return is_number(value, -most, most) and (value > 0 or example <= 0)
    return type(value) is int and int(example > 0) <= value <= most


def fits_field(field, value, most_blocks):
    """Is it in the range of a field of a configuration, by its name, annotation and default?"""
    default = field.default
    if get_args(field.type):                                  # the options of a Literal
        return type(value) is str and value in get_args(field.type)
    if field.type is bool:
        return type(value) is bool
    # Every block has tensors in the file, and there may be no block of a kind.
    blocks = field.name in ("n_double", "n_single", "depth", "layers", "lstm")
    most = most_blocks if blocks else 10 ** 6
    if field.type is not tuple:
        return fits_number(value, 0 if blocks else default, most)
    # A number per level, some of which are switches, or (float) one for every channel.
    if value in (None, ()):
        return value == default
    example = default if isinstance(default, float) else 0
    many = value if type(value) is tuple else (value,)
    return len(many) <= (1000 if isinstance(default, float) else 16) and all(
        fits_number(v, example, most) for v in many)


class ShapesOnly(TorchFunctionMode):
    """On the meta device: networks are built without the arithmetic of their initial values, for
    which torch would import sympy and its compiler, 2 s. What is left out keeps its shape."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.init.normal_:
            return kwargs["tensor"]
        if function in (torch.Tensor.mul, torch.Tensor.div, torch.Tensor.uniform_):
            return args[0]
        function = torch.empty if function is torch.randn else function
        return function(*args, **kwargs)


def build(network, config_class, config, weights, path, assign=False):
    """network(config_class(**config)) with the weights of a file; BadInput if they do not fit.

    Nothing is allocated before names and shapes of all tensors were compared with the file's.
    assign: the tensors become the network's, as they are; else they are copied, in float32."""
    known = {field.name: field for field in fields(config_class)}
    # A field that came after the file was written has its default.
    wrong = [str(name) for name, value in config.items()
             if name not in known or not fits_field(known[name], value, len(weights))]
    if wrong:
        raise BadInput(f"{path}: {min(wrong)} of its configuration is unknown, or not as train.py "
                       "writes it; take another copy")
    config = config_class(**config)
    try:
        with torch.device("meta"), ShapesOnly():
            model = network(config)
    except Exception as why:
        raise BadInput(f"{path}: its configuration makes no network ({why}); "
                       "take another copy") from None
    model = load_weights(model, weights, path, assign=True)
    return model if assign else load_weights(network(config), weights, path)


def load_weights(model, state, path, assign=False):
    """Weights (stored as half precision or not) into a model; BadInput if they do not fit. assign:
    take the tensors themselves, for a model on the meta device."""
    try:
        model.load_state_dict(state, assign=assign)
    except RuntimeError as why:
        # torch lists all of them, below a title.
        reason = " ".join(str(why).splitlines()[1:2]).strip()
        raise BadInput(f"{path}: does not fit this network, it was made for another size "
                       f"({reason[:150]})") from None
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
# A file of The Greatest Hits: the date of a take, then which of its versions it is.
HIT = re.compile(r"(\d{4}(?:-\d\d){5}.*?)(_denoised_thumb|_denoised|_mic)")


def find_clips(name, root="data", toybox_clips=2000):
    """Everything that --data names, in whatever layout it was downloaded -> list of clips, report.

    Lists and tables choose among the files of the folder, so they cannot name any other. What is in
    it may be a link to somewhere else: large datasets often are.

    A clip is a dict: path, name (relative to the folder), split ("train", "test", "val"), kind (its
    class), prompt, sound (a wav beside it, for when the video has none, or None) and events (times
    in seconds, The Greatest Hits). A clip of the toybox has a seed instead of a path.
    """
    if name == "toybox":
        clips = [dict(name=f"seed {seed}", seed=seed, prompt="", split="train")
                 for seed in range(toybox_clips)]
        return clips, f"toybox: {toybox_clips} clips, drawn from their seeds"

    folder = dataset_folder(name, root)
    files = files_below(folder)
    videos = [p for p in files if p.suffix.lower() in VIDEOS and p.is_file()]
    if not videos:
        raise BadInput(f"{folder}: no clips in it; expected {' '.join(VIDEOS)}")
    # The split comes from lists, else from a table, else from folder names.
    rows, source = read_lists(files)
    by_name = {}
    for path in videos if rows else []:
        for key in names_of(path):
            by_name.setdefault(key, []).append(path)
    chosen, missing = {}, []
    for key, split, label in rows:
        # Where several files have a name: one of this split (Landscapes has the same names in
        # both), of these the best version (denoised).
        found = sorted(by_name.get(key, []), key=lambda p: (split not in p.parts, p.stem))
        if found:
            chosen.setdefault(found[0], (split, label))
        else:
            missing.append(key)
    if missing and not chosen:
        raise BadInput(f"{folder}: none of the {len(missing)} clips that its {source} name exists "
                       f"(for instance {missing[0]}); check that the videos are unpacked in it")
    if not chosen:
        chosen, source = split_by_folders(folder, videos)

    # ASVA's datasets may hold a table from class folders to prompts.
    mapping = next((p for p in files if p.name == "class_mapping.json"), None)
    prompts = parse_file(mapping, parse_prompts) if mapping else {}
    clips = [describe_clip(path, folder, *chosen[path], prompts) for path in sorted(chosen)]
    counts = Counter(c["split"] for c in clips)
    counts = ", ".join(f"{counts[split]} {split}" for split in SPLITS if counts[split])
    report = f"{folder}: {counts} clips of {len({c['kind'] for c in clips})} classes, by {source}"
    if missing:
        some = ", ".join(missing[:3])
        report += f"; {len(missing)} named there are missing, for instance {some}"
    return clips, report


def dataset_folder(name, root):
    """--data -> the folder in root that has the name of a dataset, in any spelling (avsync15,
    AVSync15, avsync_15), else a path."""
    folder = Path(root) / name if name in DATASETS else Path(name)
    if name in DATASETS and not folder.is_dir():
        for other in sorted(Path(root).glob("*/")):
            if "".join(filter(str.isalnum, other.name.lower())) == name:
                folder = other
    # os.path takes every name; Path raises for one that is too long.
    if os.path.isdir(folder):
        return folder
    if name in DATASETS:
        raise BadInput(f"--data {name}: not found. It is {DATASETS[name]}. Unpack it as {folder}/ "
                       "(any inner layout), or give its folder")
    raise BadInput(f"--data {name}: neither a dataset (toybox, {', '.join(DATASETS)}) nor a folder "
                   "of clips")


def files_below(folder):
    """All files below a folder, sorted, without hidden ones and what is in hidden folders. Folders
    may be links; each is entered once, as a link may lead in a circle."""
    files = []
    entered = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        # os.walk goes on with what stays in this list.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(at, name) for name in names if not name.startswith(".")]
    return sorted(files)


def parse_file(path, parse):
    """parse(text of a file); BadInput if it is not UTF-8 or not of the expected form."""
    try:
        # "-sig": a byte-order mark, as Windows writes it, is no part of the first name.
        return parse(path.read_text(encoding="utf-8-sig"))
    except Exception as why:                              # of many kinds: lists may hold anything
        raise BadInput(f"{path}: cannot be read ({why}); download it again") from None


def parse_prompts(text):
    prompts = json.loads(text)
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise ValueError("expected an object of texts")
    return prompts


def read_lists(files):
    """Of files, lists (train.txt: a clip per line), else tables (vggsound.csv: id, start, label,
    split, no header) -> rows (name of a clip, split, label or None), the names of these files."""
    def parse_table(text):
        rows = [row for row in csv.reader(text.splitlines()) if len(row) == 4]
        return [(f"{row[0]}_{int(float(row[1]))}", row[3].strip(), row[2])
                for row in rows if row[3].strip() in SPLITS]

    rows = []
    lists = [p for p in files if p.suffix == ".txt" and p.stem in SPLITS]
    tables = [] if lists else [p for p in files if p.name == "vggsound.csv"]
    for path in sorted(lists, key=lambda p: (len(p.parts), p)):
        lines = map(str.strip, parse_file(path, str.splitlines))
        rows += [(line, path.stem, None) for line in lines if line]
    for path in tables:
        rows += parse_file(path, parse_table)
    return rows, ", ".join(sorted({p.name for p in lists + tables}))


def names_of(path):
    """What a list or table may call a file."""
    # Every end of its path, with or without its suffix: class/clip.mp4, clip.mp4, clip.
    names = ["/".join(path.parts[start:]) for start in range(len(path.parts))]
    names += [name.removesuffix(path.suffix) for name in names]
    # The Greatest Hits: a take without its version.
    hit = HIT.fullmatch(path.stem)
    if hit:
        names.append(hit[1])
    # VGGSound's files are called <id>_<start> or <id>_<start>_<end>, in seconds, padded or not, or
    # in milliseconds: then the end is 10000 later. Ids have 11 characters, "_" among them.
    timed = re.match(r"(.{11})_(\d+)(?:_(\d+))?", path.stem)
    if timed:
        start = int(timed[2])
        in_ms = timed[3] is not None and int(timed[3]) - start == 10000
        names.append(f"{timed[1]}_{start // 1000 if in_ms else start}")
    return names


def split_by_folders(folder, files):
    """Any tree -> {path: (split, None)}, how it was split."""
    # By a folder called train, test or val on the way ...
    names = {path: path.relative_to(folder) for path in files}
    splits = {p: next((s for s in name.parts if s in SPLITS), "") for p, name in names.items()}
    source = "folders train and test"
    # ... else one clip in ten is for testing, by a hash of its name, so that clips that are added
    # later change nothing. At least one of several clips, never a single one.
    if not any(splits.values()):
        source = "a split invented here: one clip in ten is for testing, drawn by its name"
        hashes = {path: zlib.crc32(os.fsencode(name)) for path, name in names.items()}
        test = [p for p in files if hashes[p] % 10 == 0] or [min(files, key=hashes.get)]
        splits |= {path: "test" for path in test if len(files) > 1}
    return {path: (split or "train", None) for path, split in splits.items()}, source


def describe_clip(path, folder, split, label, prompts):
    """The dict of a clip, see `find_clips`."""
    # Its class is the label of a table, else the name of its folder.
    parent = path.parent.name
    if path.parent == folder or parent in ("videos", *SPLITS):
        parent = ""
    # playing_violin__fiddle -> playing violin fiddle
    prompt = label or prompts.get(parent) or " ".join(parent.replace("_", " ").split())
    clip = dict(path=str(path), name=path.relative_to(folder).as_posix(), split=split,
                kind=label or parent, prompt=prompt, sound=None, events=[])

    # The Greatest Hits: 2015-02-16-16-49-06_denoised.mp4. The sound may be in a wav of the same or
    # another version, event times in 2015-02-16-16-49-06_times.txt.
    hit = HIT.fullmatch(path.stem)
    if hit:
        clip.update(prompt="hitting with a stick", kind="hitting")
        wavs = [path.with_name(hit[1] + v + ".wav") for v in (hit[2], "_denoised", "_mic")]
        clip["sound"] = next((str(p) for p in wavs if p.is_file()), None)
        times = path.with_name(hit[1] + "_times.txt")
        clip["events"] = parse_file(times, parse_hits) if times.is_file() else []
    return clip


def parse_hits(text):
    """Lines of time, material, action, reaction -> list of times."""
    # 'None None None' happens, and empty lines.
    rows = [line.split() for line in text.splitlines()]
    times = [float(row[0]) for row in rows if len(row) == 4 and row[2] != "None"]
    return [t for t in times if math.isfinite(t)]


# ------------------------------------------------------------------- windows: what is trained on

def clip_windows(clip, size=64, audio_lead=0., most=3):
    """A real clip -> its windows of 49 frames, dicts of video, audio, caption, speech (none),
    start (seconds), events (seconds from start; known of The Greatest Hits alone).

    most: windows of a test clip; more than three do not overlap.
    audio_lead=0.5 is the protocol of the CycleSync study (Syncphony C.2): the first window begins
    at 0.5 s and each sound 0.5 s before its pictures, so that it can be delayed and stays real.
    """
    times = {}
    video, wave = read_clip(clip["path"], size, clip["sound"], times=times)
    # Up to an eighth of the frames may be missing: the shortest clip of AVSync15 has 48. Not in the
    # study, which leaves short clips out: 438 windows of AVSync15.
    first = round(audio_lead * FPS)
    video = hold_last(clip["path"], video, first + FRAMES, 1 if audio_lead else FRAMES // 8)

    # Evaluation: three, evenly spaced, as in Syncphony: 450 of AVSync15, 732 of The Greatest Hits.
    # Equal ones count once, so a clip of 49 frames has one. Four test clips of AVSync15 are shorter
    # than 2.5 s, which leaves 442 windows at least.
    # Training: one every half second, the last ends with the clip. Each has a first frame of its
    # own: a causal VAE codes a crop differently from the same stretch within a clip.
    last = len(video) - FRAMES
    if clip["split"] == "test":
        n = max(3, min(most, (len(video) - first) // FRAMES))
        starts = np.unique(np.linspace(first, last, n).round())
    else:
        starts = np.union1d(np.arange(first, last, FPS // 2), last)

    # The sound is padded, so that every window gets exactly as many samples.
    samples = round((audio_lead + FRAMES / FPS) * RATE)
    windows = []
    for start in starts.astype(int):
        offset = round((start - first) / FPS * RATE)
        events = np.array(clip.get("events", [])) - times["begin"] - start / FPS
        windows.append(dict(video=video[start:start + FRAMES],
                            audio=fit_length(wave[offset:], samples),
                            caption=clip["prompt"], speech="", start=start / FPS,
                            events=events[(events >= 0) & (events < FRAMES / FPS)]))
    return windows


# ------------------------------------------------------------------------------------------- caches

def item_windows(item, size, variations=1, views=False):
    """A clip of `find_clips` -> list of its windows with their log-mels, or the reason (str) why it
    cannot be used. variations: so many windows of every toybox clip. views: see `random_view`."""
    if "seed" in item:
        windows = [dict(toybox_clip(item["seed"], size, variation=k), start=k * FRAMES / FPS)
                   for k in range(variations)]
    else:
        # Larger, so that a crop of 3/4 of its sides has the size that is wanted.
        larger = tuple(side * 4 // 3 for side in sides(size))
        try:
            windows = clip_windows(item, larger if views else size)
        except BadInput as why:
            return reason_of(why, item)
    for k, window in enumerate(windows if views else []):
        rng = np.random.default_rng([zlib.crc32(os.fsencode(item["name"])), k])
        window["video"] = random_view(window["video"], size, rng)
    return [dict(window, mel=log_mel(window["audio"])) for window in windows]


def reason_of(why, item):
    """Why a clip cannot be used, without its path: clips are grouped by their reasons."""
    return str(why).removeprefix(one_line(f"{item['path']}: "))


def random_view(video, size, rng):
    """A crop of 3/4 to all of both sides of a video uint8 (F, H, W, 3), every second one mirrored,
    scaled to `size`. The windows of a clip overlap, and each is coded once: so its scene comes in
    many views without any more work."""
    share = rng.uniform(.75, 1)
    height, width = (round(share * side) for side in video.shape[1:3])
    y = rng.integers(video.shape[1] - height + 1)
    x = rng.integers(video.shape[2] - width + 1)
    crop = torch.tensor(video[:, y:y + height, x:x + width]).movedim(3, 1).float()
    view = interpolate(crop, sides(size), mode="bilinear", antialias=True)
    view = view.flip(3) if rng.random() < .5 else view
    return view.round().to(torch.uint8).movedim(1, 3).numpy()


def hold_last(path, video, frames, lacking=FRAMES // 8):
    """Video (F, H, W, 3) -> at least so many frames, of which up to `lacking` may be missing: then
    the last one is held."""
    if len(video) < frames - lacking:
        raise BadInput(f"{path}: {len(video) / FPS:.2f} s long; "
                       f"at least {(frames - lacking) / FPS:.2f} s are needed")
    missing = max(0, frames - len(video))
    return np.concatenate([video, np.repeat(video[-1:], missing, 0)]) if missing else video


def item_frames(item, size, most):
    """As `item_windows`, for a frame store: up to `most` windows of the pictures that do not
    overlap, evenly spaced. They need no sound."""
    try:
        video = hold_last(item["path"], read_video(item["path"], size)[0], FRAMES)
    except BadInput as why:
        return reason_of(why, item)
    if is_static(video):
        return "a static picture"
    n = min(most, len(video) // FRAMES)
    starts = np.linspace(0, len(video) - FRAMES, n).astype(int)
    return [dict(video=video[start:start + FRAMES], caption=item["prompt"], speech="",
                 start=start / FPS) for start in starts]


def prepare(folder, settings, items, vae, autocast, audio_encoder=None):
    r"""Fill a cache with the windows of `items`, or go on filling it; `open_cache` then reads it.

        folder/settings.json        what the cache depends on; a run with others is refused
               00000-latents.npy    (n, 2, C, L, h, w): posterior mean and log-variance
               00000-mels.npy       (n, 2S, 64)
               00000-features.npy   (n, S, A), if there is an `audio_encoder`
               00000-videos.npy     (n, F, H, W, 3) uint8 \  of the split "test":
               00000-sounds.npy     (n, samples)          /  evaluation compares with them
               00000.json           a row per window, skipped clips, bytes and zlib.crc32 of these
               00001-latents.npy    ...

    With settings["windows"] it is a frame store: videos alone, so many windows of a clip at most.
    All but videos are float16. A shard's .json is written last and says that the shard is complete.
    A shard depends on its items alone, so a run that was killed at any moment and started again
    ends with the same bytes as one that was not. Of two runs that prepare one cache at a time, the
    first to finish a shard writes it.
    """
    folder = Path(folder)
    # The items are settings too: a cache is not filled with some of one list, some of another.
    names = json.dumps([identity(item) for item in items])
    settings = dict(settings, clips=len(items), named=zlib.crc32(names.encode()))
    check_settings(folder / "settings.json", settings)

    read = partial(item_windows, size=settings["resolution"],
                   variations=settings.get("variations", 1), views="views" in settings)
    if "windows" in settings:
        read = partial(item_frames, size=settings["resolution"], most=settings["windows"])
    # Complete shards are left as they are.
    shards = shards_of(items, settings)
    todo = [k for k in range(len(shards)) if not (folder / f"{k:05d}.json").is_file()]
    left = list(chain.from_iterable(shards[k] for k in todo))
    if not left:
        return

    # Processes read ahead, one clip each: videos are large. They take seconds to start (each
    # imports torch, 0.3 GB), so a few clips are read here. A generator of its own: else the loader
    # would draw from torch's.
    workers = min(16, n_cores()) if len(left) > 64 else 0
    if "windows" in settings:
        # Ten minutes of 128 x 128 pixels are 0.7 GB, and for a moment twice that.
        workers = min(4, workers)
    results = DataLoader(left, batch_size=None, collate_fn=read, num_workers=workers,
                         multiprocessing_context="spawn" if workers else None,
                         prefetch_factor=1 if workers else None, generator=torch.Generator())
    try:
        bar = tqdm(start_workers(results), f"preparing {folder.parent.name}", len(left),
                   unit="clip", disable=None)
        results = iter(bar)
        with torch.no_grad(), autocast():
            for k in todo:
                write_shard(folder, k, zip(shards[k], results), settings, vae, audio_encoder)
                if k == 0:                                # it shows what all will take
                    size = sum(path.stat().st_size for path in folder.glob("00000-*"))
                    bar.set_postfix_str(f"about {size * len(shards) / 1e9:.1f} GB in all")
    except RuntimeError as why:
        if not str(why).startswith("DataLoader worker (pid"):     # an error in a worker
            raise
        raise BadInput("a worker process died while it prepared clips, probably for lack of "
                       "memory; free some and run the same command again") from None


def n_cores():
    """Cores that this process may use; a queue of jobs may give it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def shards_of(items, settings):
    """Clips -> lists of them, one for each shard, which is in memory until it is written."""
    if "windows" in settings:
        clip_bytes = settings["windows"] * window_bytes(settings["resolution"])
        n = max(1, STORE_SHARD // clip_bytes)
    else:
        # 32 clips of 10 s at 384 x 640 are 1 GB, in a test split (with pictures) 4 GB. Clips of
        # the toybox are small: at most 500 shards.
        is_real = len(items) > 0 and "path" in items[0]
        n = 32 if is_real else max(32, math.ceil(len(items) / 500))
    return [items[a:a + n] for a in range(0, len(items), n)]


def identity(item):
    """By what a cache knows a clip again. Sizes of its files are a part of it: another folder, or a
    new export, may hold other clips of the same names, and a wav may have been added."""
    files = [item[name] for name in ("path", "sound") if item.get(name)]
    return [item["name"], item["prompt"], *map(os.path.getsize, files)]


def start_workers(loader):
    """-> iterator of a loader. Ctrl-C, which reaches its processes as well, is left to this one."""
    # Processes inherit which signals are blocked. Python's resource tracker, where it starts,
    # unblocks them.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_settings(path, settings):
    """Write the settings of a new cache, compare those of an old one."""
    text = json.dumps(settings, sort_keys=True)
    if not path.is_file():
        write_text(path, text)
    settings = json.loads(text)                           # tuples are lists in a file
    try:
        found = json.loads(path.read_text())
        assert isinstance(found, dict)
    except (ValueError, RecursionError, AssertionError):
        raise BadInput(f"{path}: damaged; remove the folder {path.parent}, and the same command "
                       "makes it again") from None
    other = ["other clips (names, texts or sizes of files)" if k == "named" else
             f"{k} {found.get(k)} (now {v})" for k, v in settings.items() if found.get(k) != v]
    if other:
        raise BadInput(f"{path.parent}: this cache was made with {', '.join(other)}; remove that "
                       "folder, or keep it and give another --data-root")


def stored_type(name):
    return np.uint8 if name == "videos" else np.float16


def write_shard(folder, k, results, settings, vae, audio_encoder):
    """Code and write shard k. results: pairs of a clip and its windows, or why it has none."""
    rows = []
    skipped = {}
    arrays = dict(latents=[], mels=[])
    arrays |= dict(features=[]) if audio_encoder else {}
    arrays |= dict(videos=[], sounds=[]) if settings.get("split") == "test" else {}
    if "windows" in settings:
        arrays = dict(videos=[])

    # A row per window. Skipped clips are remembered with their reasons.
    def usable_windows():
        for item, windows in results:
            if isinstance(windows, str):
                skipped[item["name"]] = windows
                continue
            for window in windows:
                rows.append([item["name"], window["caption"], window["start"], window["speech"]])
                yield window

    # As many windows at once as fit in any memory: 16 of 64 x 64 pixels, 4 of 256 x 256, one that
    # is larger.
    height, width = sides(settings["resolution"])
    at_once = max(1, 1024 // max(height, width)) if max(height, width) <= 256 else 1
    windows = usable_windows()
    while batch := list(islice(windows, at_once)):
        if vae:
            video = torch.from_numpy(np.stack([w["video"] for w in batch])).movedim(-1, 1)
            moments = torch.stack(vae.encode_chunks(video), 1).float().cpu()  # (n, 2, C, L, h, w)
            for window, latent in zip(batch, moments.numpy()):
                window.update(latents=latent)
        for window in batch:
            values = dict(window, videos=window["video"], sounds=window.get("audio"),
                          mels=window.get("mel"))
            if audio_encoder:
                values["features"] = audio_encoder(window["audio"])
            for name, stored in arrays.items():
                stored.append(values[name].astype(stored_type(name)))

    with locked(folder):
        summary = folder / f"{k:05d}.json"
        if summary.is_file():                             # another run was faster
            return
        files = {}
        for name, values in arrays.items():
            path = folder / f"{k:05d}-{name}.npy"
            with replacing(path) as part:
                np.save(part, np.array(values, stored_type(name)))
            files[name] = dict(bytes=path.stat().st_size,
                               crc32=zlib.crc32(np.memmap(path, np.uint8, "r")))
        shard = dict(rows=rows, skipped=skipped, files=files)
        write_text(summary, json.dumps(shard, sort_keys=True))


@contextmanager
def locked(folder, wait=True):
    """One process at a time is in this block. Yields the open folder: processes that inherit it
    hold the lock as well. wait=False: does not wait; yields None if another process has it."""
    import fcntl
    handle = os.open(folder, os.O_RDONLY)
    try:
        # The lock goes with its process. File systems without locks are used without.
        mine = handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = None
        except OSError:
            pass
        yield mine
    finally:
        os.close(handle)


def open_cache(folder):
    """A prepared folder -> dict: folder, arrays (name -> list of memory-mapped shards), at (n, 2)
    the shard and row of every window, captions, starts in seconds, speech, clips (for every clip
    the indices of its windows), skipped (name -> reason)."""
    arrays, skipped, clips, at, rows = {}, {}, {}, [], []
    for k, summary in enumerate(sorted(Path(folder).glob("[0-9]*.json"))):
        path = summary
        try:
            shard = json.loads(summary.read_text())
            for clip, caption, start, speech in shard["rows"]:
                assert {type(clip), type(caption), type(speech)} == {str} and is_number(start)
            for clip, reason in shard["skipped"].items():
                assert type(reason) is str
            for name, written in shard["files"].items():
                path = summary.with_name(f"{summary.stem}-{name}.npy")
                shards = arrays.setdefault(name, [])
                shards.append(open_array(path, written["bytes"], len(shard["rows"])))
                shapes = {array.shape[1:] for array in shards if len(array)}
                assert len(shapes) <= 1 and len(shards) == k + 1
        except Exception as why:                              # of many kinds
            raise BadInput(f"{path}: missing or damaged (not as it was written); remove {summary} "
                           "and run the same command: that shard is made again") from why
        at += [(k, row) for row in range(len(shard["rows"]))]
        rows += shard["rows"]
        skipped |= shard["skipped"]
    # rows: [clip, caption, start, speech] of every window.
    for i, (clip, *_) in enumerate(rows):
        clips.setdefault(clip, []).append(i)
    return dict(folder=folder, arrays=arrays, at=np.array(at).reshape(-1, 2),
                skipped=skipped, clips=list(clips.values()), captions=[row[1] for row in rows],
                starts=np.array([row[2] for row in rows]), speech=[row[3] for row in rows])


def open_array(path, size, rows):
    """An array of a shard, memory-mapped. It must have the size in bytes that was noted when it was
    written: its checksum would take hours for large datasets."""
    assert path.stat().st_size == size
    array = np.load(path, mmap_mode="r")
    assert len(array) == rows and array.dtype in (np.float16, np.uint8)
    # np.memmap keeps its file open, and of a process 256 (macOS) or 1024 may be. torch's map does
    # not: a cache of VGGSound has 6000 shards of several arrays.
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    return np.ndarray(array.shape, array.dtype, content, array.offset)


def gather(cache, name, index):
    """Rows of an array of a cache -> tensor (len(index), ...)."""
    shards = cache["arrays"][name]
    return torch.from_numpy(np.stack([shards[k][row] for k, row in cache["at"][index]]))


def load_or_prepare(name, root, split, size, vae, vae_id, autocast, clips=2000, audio_encoder=None,
                    audio_tag="", variations=1, views=False, log=print):
    """The cache of a dataset's split, prepared first where it is absent or unfinished. vae_id names
    the VAE, audio_tag what `audio_encoder` makes of every sound. clips, variations: of the toybox.
    views: of real clips, training windows in random views. log gets the report: what was found,
    what was skipped and why."""
    items, report = clips_of_split(name, root, split, clips)
    # What the cache depends on is in the settings, and in the folder's name what users vary.
    if name == "toybox":
        label = f"toybox-{clips}" + (f"x{variations}" if variations > 1 else "")
    else:
        label = dataset_folder(name, root).resolve().name
    settings = dict(data=label, split=split, vae=vae_id, fps=FPS, frames=FRAMES, resolution=size)
    # Real clips have no variations: SyncFlow and Harmony share their cache.
    if name == "toybox" and variations > 1:
        settings["variations"] = variations
    if name != "toybox" and split == "train" and views:
        settings["views"] = True
    pixels = "x".join(map(str, sides(size))) if isinstance(size, tuple) else size
    tag = f"{label}-{pixels}px-{vae_id}" + (f"-{audio_tag}" if audio_encoder else "")
    folder = Path(root) / "cache" / tag / split
    prepare(folder, settings, items, vae, autocast, audio_encoder)
    return open_and_report(folder, name, report, log)


def load_or_store_frames(name, root, split, size, log=print):
    """The frame store of a dataset's split: windows of 49 frames of size x size pixels in a cache
    of one array, "videos", prepared first where it is absent or unfinished. Test clips get an
    eighth of the space."""
    items, report = clips_of_split(name, root, split)
    windows = STORE // window_bytes(size)
    windows = max(1, windows // 8 if split == "test" else windows)
    # Of more clips than windows, evenly chosen ones. A clip has to fit into a shard.
    items = items[::math.ceil(len(items) / windows)]
    most = min(STORE_WINDOWS, windows // len(items), STORE_SHARD // window_bytes(size))
    label = dataset_folder(name, root).resolve().name
    settings = dict(data=label, split=split, fps=FPS, frames=FRAMES, resolution=size,
                    windows=max(1, most))
    folder = Path(root) / "cache" / f"{label}-{size}px-frames" / split
    log(f"{folder}: up to {len(items) * max(1, most) * window_bytes(size) / 1e9:.1f} GB of frames")
    prepare(folder, settings, items, None, nullcontext)
    return open_and_report(folder, name, report, log)


def window_bytes(size):
    """Bytes of the pictures of a window."""
    height, width = sides(size)
    return FRAMES * height * width * 3


def clips_of_split(name, root, split, clips=2000):
    """-> the clips of a split, the report on all of them; BadInput if there is none."""
    found, report = find_clips(name, root, clips)
    items = [clip for clip in found if clip["split"] == split]
    if not items:
        purpose = "training" if split == "train" else "testing"
        raise BadInput(f"--data {name}: no clips for {purpose} in it; give at least two clips, or "
                       "lists that name some of both")
    return items, report


def open_and_report(folder, name, report, log):
    """`open_cache`, and what was found and skipped; BadInput if not one clip can be used."""
    cache = open_cache(folder)
    log(f"{report}\n{folder}: {len(cache['clips'])} clips, {len(cache['at'])} windows of "
        f"{FRAMES} frames")
    reasons = {}
    for clip, reason in cache["skipped"].items():
        reasons.setdefault(reason, []).append(clip)
    for reason, names in reasons.items():
        log(f"  skipped {len(names)}, such as {one_line(names[0])}: {reason}")
    if not cache["clips"]:
        clip, reason = next(iter(cache["skipped"].items()))
        # Nothing is in it, and it would refuse the folder of clips once that is repaired.
        shutil.rmtree(folder, ignore_errors=True)
        raise BadInput(f"--data {name}: not one of its {len(cache['skipped'])} {folder.name} clips "
                       f"can be used; {clip}: {reason}. Expected at least 1.8 s of moving "
                       f"pictures at {FPS / 2:g} frames per second or more"
                       + ", with sound" * ("mels" in cache["arrays"])
                       + "; remove or repair these, or put clips into folders train and test")
    return cache


# --------------------------------------------------------------------- the command: a contact sheet

def contact_sheet(name, root, path):
    """Eight clips of a dataset, drawn at random, as film strips over their sounds -> a picture, and
    a printed line for each."""
    found, report = find_clips(name, root)
    strips = []
    for i in np.random.default_rng(0).permutation(len(found)):
        clip = found[i]
        try:
            if "seed" in clip:
                clip |= toybox_clip(clip["seed"])
            else:
                times = {}
                clip["video"], clip["audio"] = read_clip(clip["path"], sound=clip["sound"],
                                                         times=times)
                clip["events"] = np.array(clip["events"]) - times["begin"]
        except BadInput as why:
            print(f"skipped  {why}")
            continue
        strips.append(film_strip(clip["video"], clip["audio"], events=clip["events"]))
        caption = clip.get("caption", clip["prompt"])
        print(f"row {len(strips)}  {one_line(clip['name'])}  '{caption}'  {clip['split']}  "
              f"{len(clip['video']) / FPS:.1f} s")
        if len(strips) == 8:
            break
    if not strips:
        raise BadInput(f"--data {name}: not one of its {len(found)} clips can be read")
    write_picture(path, np.concatenate(strips))
    print(f"{report}\n{path}: {len(strips)} clips, frames over sound on one time axis")


def arguments():
    p = Parser(__doc__)
    p.add_argument("--data", default="toybox",
                   help=f"toybox, {', '.join(DATASETS)}, or a folder of clips")
    p.add_argument("--data-root", default="data", help="the folder of datasets and caches")
    p.add_argument("--show", required=True, help="draw a contact sheet into this .png")
    return p


def main():
    args = arguments().parse_args()
    if Path(args.show).suffix != ".png":
        raise BadInput(f"--show {args.show}: give a file that ends in .png")
    contact_sheet(args.data, args.data_root, args.show)


if __name__ == "__main__":
    run_cli(main)
