"""The training command: one loop for all networks, from two CPU cores to several GPUs.

    python train.py --task a2v          Syncphony: sound and first frame -> video
    python train.py --task t2av         SyncFlow: text -> video and sound, in three stages
    python train.py --task joint        Harmony: video and sound, each also from the other
    python train.py --task vae          the autoencoder of videos that those three train on
    python train.py --task mel-vae      the autoencoder of sounds, as log-mel spectra
    python train.py --task audio-vae    another one, of waveforms, as SyncFlow's paper has it
    python train.py --task a2v --data my_clips              on real clips; so with all tasks
    python train.py --task joint --help                     the settings of one task
    torchrun --nproc_per_node=2 train.py --task a2v         several processes, the same result

**A task** is a class, of which the loop uses

    __init__(args, device, autocast)
    autocast                        replaced by the loop when it has timed the network
    net                             the network; net.cfg, a dataclass, is its configuration
    columns                         names of what is reported beside the loss
    batch(step, rows)               -> the inputs of the loss, a dict
    loss(net, generators, **batch)  -> loss, report (len(columns),)
    held_out(n)                     -> n clips to evaluate on
    evaluate(clips)                 -> Evaluation of the network as it is
    extra                           what a checkpoint says besides: VAEs, guidance, stage, --init
    measure_latent_stats()          autoencoders only: before best.pt is written, shift and scale
                                    of the latents into net.cfg

**Exact resume.** Samples form an endless stream, cut into steps, processes and micro-batches:

    sample id    0   1   2   3   4   5   6   7 | 8   9   ..     id = step * batch_size + row
                 '----------- step 0 ---------' '- step 1 ..
                 '- process 0 -' '- process 1 -'                each takes its rows of a step,
                 '-  0 -''-  1 -''-  0 -''-  1 -'               with --accum 2 in two micro-batches

Everything random about a sample, its window, its caption, its noise, is a function of (seed, id);
what all samples of a step have in common, of (seed, step). So a checkpoint holds no generator
states: a run that was stopped (Ctrl-C, SIGTERM, even SIGKILL) is continued by the same command from
the last saved step, takes the very steps it would have taken, and logs each of them once: bit for
bit on the same CPU with as many threads, processes and micro-batches; on a GPU sums may differ in
their last bits. And the gradient of a step is the same, to rounding, in one process, in several,
and in micro-batches. Two exceptions couple the samples of a micro-batch, whose size is kept: --ot,
and the spectral error of audio-vae.

**Written** to --out, under --stage all in a folder per stage: `last.pt`, what resuming needs beside
the files of the VAEs and of --init, which have to stay; `best.pt`, the averaged (EMA) weights of
the best evaluation in half precision, for sample.py; `log.csv` (losses of process 0's share of each
step); `scores.csv`, strips and an mp4 (not of sounds) of every evaluation.

    B batch · C channels · L latents · h w latent grid · A audio channels · S R audio steps
"""
import argparse
import csv
import math
import multiprocessing
import os
import re
import resource
import shlex
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache, lru_cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import data
import model as networks
import pyramid
import towers
import vae as autoencoders
from cyclesync import (
    event_scores, generate, motion_agreement, motion_energy, onsets_in_sound, picture_record,
    reconstruct, summarise, toybox_records)
from data import BadInput, Parser, frames_to_tensor, number, run_cli
from losses import (
    BUCKETS, harmony_loss, image_loss, randn_each, syncflow_loss, syncphony_loss, to_device)
from sample import (
    AUDIO_VAE_FILE, GUIDANCE, MEL_VAE_FILE, REAL_VAE_FILE, VAE_FILE, fingerprint,
    generate_audio_video, load_vae, pick_autocast, pick_device, steps_per_latent)
from toybox import HELD_OUT, detect_clip_events, toybox_clip, vae_training_pair

COUNT = number(int, 1)
COUNT_OR_NONE = number(int, 0)
NOT_NEGATIVE = number(low=0)
SHARE = number(low=0, high=1)

# ----------------------------------------------------------------------------------------- settings
# name=(default, what it may be, help): a type, the choices, or bool for a switch. The command line
# is built from these tables; batch_size is --batch-size.

COMMON = dict(
    # what and where
    data=("toybox", str, f"toybox, {', '.join(data.DATASETS)}, or a folder of clips"),
    data_root=("data", str, "folder of datasets and of caches of latents"),
    out=(None, str, "folder of checkpoints and logs; else out/TASK, or out/TASK-DATA"),
    seed=(0, COUNT_OR_NONE, "of everything that is random"),
    device=("auto", ("auto", "cuda", "mps", "cpu"), "where to run"),
    dtype=("auto", ("auto", "float32", "bfloat16"), "auto: as measured; on CUDA bfloat16"),
    compile=(False, bool, "torch.compile: a slow start, then faster steps"),
    no_compile=(False, bool, "do not compile on CUDA either, where --compile is the default "
                "(not with --pretrained)"),
    # how long; a step is one update of the weights
    steps=(1500, COUNT, "optimiser steps (of each stage)"),
    batch_size=(16, COUNT, "clips per step, over all processes and micro-batches"),
    accum=(1, COUNT, "micro-batches per step: less memory, the same result"),
    # Muon's updates are scaled to the size of AdamW's, so that one rate serves both. This rate
    # was chosen by short runs.
    lr=(5e-3, number(low=1e-12), "peak learning rate; a cosine ends at 2 %% of it"),
    warmup=(100, COUNT_OR_NONE, "steps of linear warm-up"),
    # .998 averages 500 steps, a third of the default run.
    ema=(.998, SHARE, "decay of the averaged weights"),
    optimizer=("muon", ("muon", "adamw"), "Muon for matrices and AdamW for the rest, or AdamW"),
    # what is printed and kept
    log_every=(50, COUNT, "steps between reports"),
    sample_every=(1000, COUNT, "steps between evaluations, each with strips and an mp4"),
    save_every=(500, COUNT, "steps between checkpoints"),
    eval_clips=(48, COUNT_OR_NONE, "held-out clips of an evaluation; 0 = no evaluation"),
)
PICTURES = dict(resolution=(64, data.picture_size, "side in pixels, or height x width: 384x640"))
LATENTS = dict(   # of the tasks that train on latents, which are coded once and cached
    PICTURES,
    clips=(2000, number(int, 1, 10 ** 6), "toybox clips to render and cache"),
    vae=(str(VAE_FILE), str, "the VAE that makes the latents"),
    # Dropped captions teach the null text, which text guidance subtracts. Audio is never dropped.
    drop_text=(.1, SHARE, "share of captions replaced by the null text"),
    sigma=("uniform", ("uniform", "logit-normal"), "distribution of the noise levels"),
    shift=(1., number(low=.01), "shift of the noise levels towards noise; 1 = none"),
    checkpointing=(False, bool, "recompute activations in the backward pass: less memory"),
)
TOWERS = dict(
    LATENTS,
    drop_text=(.1, SHARE, "share of captions, of Harmony's transcripts, of its references of the "
                          "timbre that are dropped, each on its own"),
    # The one of spectra (mel-vae). No sound is generated better than the VAE codes true ones: onset
    # F1 is .987 after this one, .945 after the one of waveforms (SyncFlow's paper); Frechet
    # distance of log-mels 1.6 and 4.0.
    audio_vae=(str(MEL_VAE_FILE), str, "the VAE that makes the latents of the sound"),
    init=(None, str, "checkpoint to start from; --stage all starts each stage from the one before"),
    # Most of what a video tower learns is appearance, of which a clip shows one example.
    pictures=(8, COUNT_OR_NONE, "still pictures to learn from beside every clip"),
)
TASKS = {   # a task's tables; a plain value replaces the default of a setting above
    "a2v": (COMMON, LATENTS, dict(
        size=("tiny", networks.SIZES, "size of the network"),
        steps=1550,   # 34 minutes on one core: F1 .95; with 1000 steps .90 (RESULTS.md)
        shift=4.,   # losses.shift_sigma has the measurement
        lambda_motion=(1., NOT_NEGATIVE, "weight of the motion term, Syncphony eq. 1; 0 = off"),
        # Audio guidance (eq. 2) evaluates the network without them: it has to know that path.
        skip_audio=(.1, SHARE, "share of steps without the audio layers"),
        no_audio_rope=(False, bool, "ablation: audio without positions, Syncphony table 11"),
        init=(None, str, "checkpoint to start from; with --data such as weights/a2v-real.pt"),
        pretrained=(None, str, "train on top of Pyramid Flow, downloaded to this folder"),
        hubert=(None, str, "with --pretrained: HuBERT for audio features, folder or hub name"),
        layout=("one", ("one", "all"), "with --pretrained: a step trains one latent, or all"),
        fsdp=(False, bool, "with --pretrained: share weights and states among processes"))),
    "t2av": (COMMON, TOWERS, dict(
        # Onset F1 for true videos after stage "audio": 0.57 with 2000 clips (w = 2), 0.72 with 6000
        # (w = 3).
        clips=6000,
        size=("tiny", towers.SYNCFLOW, "of the towers; the paper's is not trained here"),
        stage=("all", ("video", "audio", "joint", "all"), "what is trained"),
        # losses.ot_permutation says why it is off.
        ot=(False, bool, "minibatch optimal transport between noise and data"),
        no_adaptor=(False, bool, "ablation: audio attends to bare video features"),
        no_video=(False, bool, "ablation: text to sound, without any video"))),
    "joint": (COMMON, TOWERS, dict(
        size=("tiny", towers.HARMONY, "of the towers; the paper's is not trained here"),
        stage=("all", ("video", "audio", "timbre", "joint", "all"), "what is trained"),
        shift=5.,   # the paper's, in training and in sampling
        lambda_v=(.1, NOT_NEGATIVE, "weight of the audio-driven loss, of the video (eq. 3)"),
        lambda_a=(.3, NOT_NEGATIVE, "weight of the video-driven loss, of the audio (eq. 3)"),
        lambda_joint=(1., NOT_NEGATIVE, "weight of the joint loss; 0 = the one-way tasks alone"),
        no_rope_align=(False, bool, "ablation: the two time axes are not aligned"),
        no_gldi=(False, bool, "ablation: no temporal window, no style from the reference"))),
    # kl is the price of information in a latent (vae.video_vae_loss), chosen by short runs, as lr.
    "vae": (COMMON, PICTURES, dict(
        steps=6000, lr=2e-3,
        kl=(2e-2, NOT_NEGATIVE, "weight of the KL term"),
        init=(None, str, "with --data: VAE to start from, such as weights/vae-real.pt"))),
    "audio-vae": (COMMON, dict(
        size=("tiny", autoencoders.AUDIO_VAE_SIZES["waveform"], "size of the network"),
        steps=4000, lr=3e-3,
        kl=(2e-2, NOT_NEGATIVE, "weight of the KL term"))),
    "mel-vae": (COMMON, dict(
        size=("tiny", autoencoders.AUDIO_VAE_SIZES["mel"], "size of the network"),
        steps=2000, lr=3e-3,
        kl=(2e-3, NOT_NEGATIVE, "weight of the KL term"))),
}
# Other defaults for --data that is not the toybox.
REAL_LATENTS = dict(vae=str(REAL_VAE_FILE))
REAL = {
    "a2v": REAL_LATENTS, "t2av": REAL_LATENTS, "joint": REAL_LATENTS,
    # This kl hardly limits what is coded: 4700 nats in a latent of 8 x 8 positions. Muon's update
    # of these matrices takes about as long as the gradient of 8 crops, so AdamW is the default.
    "vae": dict(kl=1e-3, batch_size=8, steps=2000, optimizer="adamw", lr=1e-3)}
# Syncphony: 33000 steps of 32 clips; the paper does not give its learning rate. The published
# backbone knows the path without audio layers, which guidance takes "without additional training"
# (section 3.3).
PRETRAINED = dict(size="miniflux", steps=33000, batch_size=32, lr=5e-5, ema=.9999, skip_audio=0.)
# Its averaged weights lie in the CPU's memory; one copy over the bus in 20 steps is enough.
EMA_EVERY_PRETRAINED = 20

# stage: (share of --lr, multiple of --batch-size, parts that are trained). The first two hold under
# --stage all; a single --stage takes --lr and --batch-size as they are given.
STAGES = {
    # SyncFlow section 3.2. Stage two builds no graph of the video tower, so that twice the batch
    # costs the same; stage three is a fine-tuning. The shares of --lr were chosen by short runs.
    "t2av": {
        "video": (1, 1, ("video",)),
        "audio": (1, 2, ("audio",)),
        "joint": (.6, 1, ("video", "audio"))},
    # Harmony's supplement, section 2: the video tower (the paper has Wan2.2's); the audio tower,
    # with references of the timbre out of the clip itself; with references out of other clips of
    # that voice; both towers and their bridges. The paper has one constant rate, 1e-5, on
    # pretrained towers; these shares are for training from scratch.
    "joint": {
        "video": (1, 1, ("video",)),
        "audio": (1, 1, ("audio",)),
        "timbre": (.3, 1, ("audio",)),
        "joint": (.6, 1, ("video", "audio", "bridge"))},
}
# Settings that only some stages of a task read, and which: still pictures are for stages that train
# the video tower (Harmony's "joint" goes without), the three weights for the loss of eq. 3.
READ_BY_STAGES = {
    "t2av": dict(pictures=("video", "joint", "all")),
    "joint": dict(pictures=("video", "all"), **dict.fromkeys(
        ("lambda_joint", "lambda_v", "lambda_a"), ("joint", "all")))}
# Streams of random numbers: a generator is seeded by [--seed, its stream, step or sample id].
# [--seed, epoch] orders the clips of an epoch: as zeros at the end of a seed do not count, epochs 1
# to 5 have the seeds of step or sample 0 of the streams, which does no harm.
STREAMS = dict(
    sample=1,         # by sample id: the window of a clip, dropped text, posteriors, stills
    step=2,           # by step: whether audio is skipped, which latent Pyramid Flow's loss trains
    reference=3,      # by step: length of the references of the timbre
    sound=4,          # by sample id: which second of which recording
    noise=5,          # by sample id, torch: noise and noise levels of the loss
)
# Clips whose latents give the statistics of an autoencoder.
STATISTICS = 64
# Below so many dB of a VAE on real clips a warning says how to train a better one. vae-real has 29
# on its test clips; at 24, hands and sticks in motion are hard to recognise at 64 px.
ENOUGH_PSNR = 24
EVALUATION_DRAWS = 4        # of noise, in the evaluation of two towers
# Settings that may differ when a run is resumed. All but --steps (a longer run stretches its
# cosine) leave samples and objective as they are; --device, --dtype, --compile and --accum change
# rounding. Wherever they lie, VAEs are compared by content, --init by `weights_id` (the --init of a
# VAE by its path).
MAY_DIFFER = {"steps", "accum", "device", "dtype", "compile", "no_compile", "checkpointing", "out",
              "data_root", "init", "vae", "audio_vae", "pretrained", "log_every", "sample_every",
              "save_every", "eval_clips"}
OTHER_VERSION = "was written by another version of train.py; take that one"


def settings_of(task):
    """-> {name: (default, what it may be, help)}"""
    settings = {}
    for table in TASKS[task]:
        for name, value in table.items():
            # A plain value is a new default of a setting that an earlier table has described.
            settings[name] = value if isinstance(value, tuple) else (value, *settings[name][1:])
    return settings


def parse_args(argv=None):
    """Command line -> Namespace. A setting of another task is an error that names that task."""
    argv = [str(a) for a in (sys.argv[1:] if argv is None else argv)]
    # What is trained decides which settings there are and what their defaults are.
    first = Parser(__doc__)
    first.add_argument("--task", default="a2v", choices=list(TASKS))
    first.add_argument("--pretrained")
    first.add_argument("--data", default="toybox")
    chosen, _ = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    # The parser of these settings.
    parser = Parser(__doc__)
    parser.add_argument("--task", default="a2v", choices=list(TASKS), help="what to train")
    for name, (default, kind, text) in settings_of(chosen.task).items():
        if kind is bool:
            options = dict(action="store_true")
        elif callable(kind):
            options = dict(default=default, type=kind)
        else:
            options = dict(default=default, choices=list(kind))
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **options)
    if chosen.data != "toybox":
        parser.set_defaults(**REAL.get(chosen.task, {}))
    if chosen.pretrained:
        parser.set_defaults(**PRETRAINED)
    args, unknown = parser.parse_known_args(argv)

    # What this task does not know may be known to another.
    for flag in [a.split("=")[0] for a in unknown]:
        owners = [t for t in TASKS if flag[2:].replace("-", "_") in settings_of(t)]
        if flag.startswith("--") and owners:
            raise BadInput(f"{flag}: a setting of --task {' and '.join(owners)}; --task "
                           f"{args.task} has none of that name; leave it out")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    check(args)
    # Trainings on other clips are other runs.
    name = "" if args.data == "toybox" else f"-{Path(args.data).resolve().name}"
    args.out = args.out or f"out/{args.task}{name}"
    if os.path.isfile(args.out):
        raise BadInput(f"--out {args.out}: is a file; give a folder")
    return args


def check(args):
    """Settings that do not go together, which would fail later or train nothing -> BadInput."""
    if args.data == "toybox" and "resolution" in args:
        data.only_square(args.resolution)
    if args.compile and args.no_compile:
        raise BadInput("--compile --no-compile: give one of them")
    for name, stages in READ_BY_STAGES.get(args.task, {}).items():
        if args.stage not in stages and getattr(args, name) != settings_of(args.task)[name][0]:
            raise BadInput(f"--{name.replace('_', '-')} is not read by --stage {args.stage}, but "
                           f"by {', '.join(stages)}; leave it out")
    if args.task == "joint" and not (args.lambda_joint or args.lambda_v or args.lambda_a):
        raise BadInput("--lambda-joint 0 --lambda-v 0 --lambda-a 0: nothing is left to learn; "
                       "leave one of them above 0")
    if args.task == "t2av" and args.no_video and args.stage != "audio":
        raise BadInput("--no-video: an ablation of the audio tower; add --stage audio")
    if args.task == "t2av" and args.stage == "audio" and not (args.init or args.no_video):
        raise BadInput("--stage audio: trains on a frozen video tower; give one by "
                       "--init out/t2av/video/best.pt")
    if args.task in ("t2av", "joint") and args.size in ("syncflow", "harmony"):
        raise BadInput(f"--size {args.size}: the paper's, whose text encoder and autoencoders are "
                       "not part of this repository; train tiny or small")
    clips, *_ = settings_of(args.task).get("clips", (None,))
    if args.data != "toybox" and clips and args.clips != clips:
        raise BadInput("--clips: how many of the toybox are rendered; of --data all clips are "
                       "taken: leave it out")
    if args.task != "a2v":
        return
    # FSDP shares what it trains among processes, and Muon needs whole matrices.
    if args.fsdp and (not args.pretrained or args.optimizer != "adamw" or world_size() == 1):
        raise BadInput("--fsdp: shares a model on Pyramid Flow among the processes of torchrun; "
                       "give --pretrained and --optimizer adamw, and start it by torchrun")
    # Pyramid Flow takes HuBERT's features of real sounds, and latents that can be halved twice.
    if not args.pretrained and (args.size == "miniflux" or args.hubert):
        raise BadInput("--size miniflux and --hubert go with Pyramid Flow's weights; give their "
                       "folder by --pretrained, or train tiny or small")
    if not args.pretrained and args.layout == "all":
        raise BadInput("--layout all: for --pretrained; without it all latents are trained anyway")
    if args.pretrained and (not args.hubert or args.data == "toybox"):
        raise BadInput(f"--pretrained {args.pretrained}: trains on real clips with HuBERT "
                       "features; give --data and --hubert facebook/hubert-large-ls960-ft")
    # Its folder holds the network and the autoencoder, and its stages draw the noise levels.
    theirs = dict(size="miniflux", vae=str(REAL_VAE_FILE), sigma="uniform", shift=4.)
    for name, value in theirs.items():
        if args.pretrained and getattr(args, name) != value:
            raise BadInput(f"--{name}: with --pretrained Pyramid Flow's is taken; leave it out")
    if args.pretrained and args.init:
        raise BadInput("--init: with --pretrained training starts from Pyramid Flow's weights; "
                       "leave out one of them")
    height, width = data.sides(args.resolution)
    if args.pretrained and (height % 64 or width % 64):
        raise BadInput(f"--resolution {height}x{width}: Pyramid Flow halves the latents twice; "
                       "sides must be multiples of 64")


# ---------------------------------------------------------------------------------------- processes

def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes(name):
    """Connect torchrun's processes. --device -> device of this process, the same in words."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name in ("auto", "cuda") and torch.cuda.is_available():
        # Before anything touches CUDA: else every process opens a context on GPU 0, and FSDP, which
        # takes the current device, puts all shares there.
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise BadInput(f"torchrun: more processes than the {gpus} GPUs of this machine; give "
                           f"--nproc_per_node={gpus}, or --device cpu")
        torch.cuda.set_device(local_rank)
        # Products of float32 are in TF32, in all trainings on CUDA.
        torch.set_float32_matmul_precision("high")
    device, text = pick_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
    # The stages of a task are several runs of one group of processes.
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        patient_group()
    return device, text


@cache
def patient_group():
    """Where processes wait for the first one, which prepares a dataset for hours. In a training
    step PyTorch's limit of minutes stays: a process that hangs is an error."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=2))


def same_everywhere(value):
    """The first process's value, in all of them: what decides how they go on must not differ by
    rounding or by a measured time."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, group=patient_group())
    return values[0]


def barrier():
    if world_size() > 1:
        dist.barrier(patient_group())


def log_rank0(text):
    if rank() == 0:
        print(text)


def in_words(name, value):
    """A setting as it is given: with --lr 0.005, with --resolution 384x640, without --ot."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"without {flag}"
    value = "x".join(map(str, value)) if isinstance(value, (tuple, list)) else value
    return f"with {flag}" if value is True else f"with {flag} {value}"


def signal_of_any(number):
    """The signal that any process received, or 0. It arrives in different steps of different
    processes."""
    if world_size() == 1:
        return number
    # A number on the CPU: one on the GPU would be there after all that is queued.
    highest = torch.tensor(number)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=patient_group())
    return highest.item()


def seeded_each(ids, *numbers):
    """One torch generator per id, which depends on the numbers and the id and on nothing else."""
    seeds = [np.random.SeedSequence([*numbers, i]).generate_state(1, np.uint64)[0] for i in ids]
    return [torch.Generator().manual_seed(int(seed >> 1)) for seed in seeds]


# ----------------------------------------------------------------------------------- parts of tasks

def parallel_map(device):
    """Like the builtin map, beside a GPU in worker processes. It makes the clips of each step: on
    one core 140 ms for 16 pairs of videos, 115 ms for 16 sounds."""
    if device.type != "cuda":
        return map
    workers = min(16, max(1, data.n_cores() // world_size()))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, end_with_parent)
    # All start here, with signals blocked: Ctrl-C before `end_with_parent` would break the pool.
    # (Python's resource tracker unblocks them where it starts, so it is started first.)
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for _ in range(workers):
            pool.submit(int)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool.map


def end_with_parent():
    """A worker leaves signals to its parent, and ends when that does, in whatever way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(0)
    threading.Thread(target=wait, daemon=True).start()


class Evaluation(NamedTuple):
    figures: dict           # name -> number, for the log and a row of scores.csv
    score: float            # higher is better; chooses best.pt
    videos: list = ()       # uint8 (F, H, W, 3), to write
    sounds: list = None     # waveforms to go with them; None: those of the clips


def open_caches(args, vae, autocast, **audio):
    """-> latents of the training clips and, of real clips, of the test clips (toybox: None)."""
    def load(split):
        return data.load_or_prepare(args.data, args.data_root, split, args.resolution, vae,
                                    fingerprint(vae), autocast, args.clips, log=log_rank0,
                                    views=not getattr(args, "pretrained", None),
                                    **audio)
    if args.data == "toybox":
        return load("train"), None
    # Of test clips there are few: what is wrong with clips or VAE is said before the hours that the
    # others may take.
    test = load("test")
    check_vae(args, vae, test, autocast)
    return load("train"), test


def check_vae(args, vae, test, autocast):
    """Print how well a VAE codes real clips, the upper bound of all videos generated with it."""
    # Eight windows take a second at 64 px.
    clips = held_out_clips(test, 8 if max(data.sides(args.resolution)) <= 128 else 2)
    videos = reconstruct(vae, clips, autocast)
    scores = summarise([picture_record(v, c["video"]) for v, c in zip(videos, clips)])
    name = getattr(args, "pretrained", None) or args.vae
    log_rank0(f"VAE         {name}: PSNR {scores['psnr']:.1f} dB on test clips; first frame "
              f"repeated has {scores['psnr_repeated']:.1f}")
    if scores["psnr"] < ENOUGH_PSNR:
        log_rank0(f"warning: below {ENOUGH_PSNR} dB, so the videos may be blurred"
                  + advice(args) * (name == args.vae))


def advice(args):
    """The command that tunes a VAE to --data, and the flag that takes the result."""
    command = ["python", "train.py", "--task", "vae", "--data", args.data, "--data-root",
               args.data_root, "--init", REAL_VAE_FILE]
    result = f"out/vae-{Path(args.data).resolve().name}/best.pt"
    return (f". A better one: {shlex.join(map(str, command))}, then --vae {shlex.quote(result)} "
            "and another --out")


def check_latents(flag, vae, expected, args):
    if vae.cfg.latent != expected:
        raise BadInput(f"--{flag}: makes latents of {vae.cfg.latent} channels, --size {args.size} "
                       f"takes {expected}")


def step_rng(args, stream, number):
    """numpy generator of one stream (see STREAMS) of a step or of a sample."""
    return np.random.default_rng([args.seed, STREAMS[stream], number])


@lru_cache(maxsize=2)   # a step may end one epoch and begin the next
def clip_order(seed, epoch, n):
    """The order of n clips in an epoch, drawn once: for 200,000 clips it takes 7 ms."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(cache, args, step, rows):
    """Samples number `rows` of a step -> window of each in the cache, numpy generator of each.

    Every clip comes once per epoch, in an order drawn from (seed, epoch). Which of its windows, and
    everything else about a sample, is drawn from (seed, id of the sample)."""
    clips = cache["clips"]
    index = []
    rngs = []
    for row in rows:
        sample_id = step * args.batch_size + row
        # The clip: the stream of samples runs through all clips once per epoch.
        epoch, place = divmod(sample_id, len(clips))
        clip = clips[clip_order(args.seed, epoch, len(clips))[place]]
        # One of its windows.
        rng = step_rng(args, "sample", sample_id)
        index.append(rng.choice(clip))
        rngs.append(rng)
    return np.array(index), rngs


def drop_text(captions, rngs, share):
    """Replace a share of the captions by the null text, ''."""
    return ["" if rng.random() < share else c for c, rng in zip(captions, rngs)]


def weights_id(checkpoint):
    """What names its weights in a run that starts from them: stage, step and seconds of the
    training that wrote it. (No two trainings take as long to the microsecond.)"""
    return [checkpoint.get(name) for name in ("stage", "step", "seconds")]


def video_figures(videos, clips):
    """Events of toybox videos against those of their clips -> figures, score.

    The score is F1 at 100 ms, which varies less than at 50 over so few clips, minus the residual
    of the pictures (1 where no event was found in any)."""
    scores = summarise(toybox_records(videos, clips))
    names = ("f1_50", "precision_50", "recall_50", "f1_100", "residual", "false_per_quiet_clip")
    residual = scores["residual"] if np.isfinite(scores["residual"]) else 1
    return {name: scores[name] for name in names}, scores["f1_100"] - residual


def onset_f1(sounds, truth):
    """Onsets of sounds against lists of event times -> F1 at 50 ms."""
    return event_scores(truth, [onsets_in_sound(w) for w in sounds])["f1_50"]


def held_out_clips(test, n, resolution=None):
    """n clips to evaluate on: windows of a cache of test clips, evenly chosen, or (None) toybox
    clips of seeds that no training draws: those of `cyclesync.py --seed 100`."""
    if test is None:
        return [toybox_clip(HELD_OUT + 10 ** 6 + i, resolution, video=resolution is not None)
                for i in range(n)]
    clips = []
    for i in np.unique(np.linspace(0, len(test["at"]) - 1, n).astype(int)):
        row = {name: data.gather(test, name, [i])[0] for name in test["arrays"]}
        # A cache that was prepared without an audio encoder has no features.
        clips.append(dict(
            number=i, video=row["videos"].numpy(), audio=row["sounds"].float().numpy(),
            caption=test["captions"][i], z_v=row["latents"][None, 0].float(),
            z_a=row["features"].float().T[None] if "features" in row else None))
    return clips


# ---------------------------------------------------------------------------------------- Syncphony

class A2V:
    """Latents, sounds and captions -> velocity loss. Every latent of a clip but the first is a
    target (`syncphony_loss`); on top of Pyramid Flow one latent, or all of them at one noise level,
    at one of three resolutions (`pyramid_loss`)."""

    def __init__(self, args, device, autocast):
        self.args = args
        self.device = device
        self.autocast = autocast
        # Latents of all clips, coded by the VAE and cached, and beside them what is needed of sound
        # and text: mels and bytes from scratch, else HuBERT's features and T5's and CLIP's states.
        folder = Path(args.pretrained) / "causal_video_vae" if args.pretrained else args.vae
        self.vae = load_vae(folder, device)
        hubert = pyramid.load_hubert(args.hubert, device) if args.pretrained else None
        # Features of another HuBERT have another cache ("hubert" alone was for waveforms that were
        # divided by another deviation).
        tag = ""
        if args.pretrained:
            name = os.path.normpath(args.hubert)
            tag = f"hubert2-{zlib.crc32(name.encode()):08x}"
        # What is wrong with --vae or --init is said before the hours that the clips may take.
        started_from = None
        if not args.pretrained:
            self.net = self.from_scratch()
            started_from = self.load_init()
        self.cache, self.test = open_caches(args, self.vae, autocast, audio_encoder=hubert,
                                            audio_tag=tag)
        if args.pretrained:
            # Caption -> its T5 and CLIP states, which are kept beside the caches.
            self.prompts = {}
            for split in (self.cache, self.test):
                self.prompts |= pyramid.cached_prompts(
                    split["folder"], split["captions"], args.pretrained, device)
            self.net = self.from_pyramid_flow()
            self.columns = ("stage 0", "stage 1", "stage 2")
            guidance = GUIDANCE["pretrained"]
        else:
            self.columns = tuple(f"s<{(b + 1) / BUCKETS:.2f}" for b in range(BUCKETS))
            guidance = GUIDANCE["a2v" if args.data == "toybox" else "real"]
        L, h, w = data.gather(self.cache, "latents", [0]).shape[3:]
        h, w = h // self.net.cfg.patch, w // self.net.cfg.patch
        log_rank0(f"tokens      {L * h * w} of a clip: {L} latents of {h} x {w}")
        self.extra = dict(size=args.resolution, vae=fingerprint(self.vae), guidance=guidance,
                          started_from=started_from)

    def from_scratch(self):
        config = networks.MMDiTConfig(**networks.SIZES[self.args.size] | dict(
            alpha=steps_per_latent(self.vae), audio_rope=not self.args.no_audio_rope))
        check_latents("vae", self.vae, config.latent, self.args)
        return networks.MMDiT(config)

    def load_init(self):
        """The weights of --init -> what names them (see `weights_id`), None without --init."""
        if not self.args.init:
            return None
        before = data.load_checkpoint(self.args.init, "a2v")
        # Weights that the file lacks, such as audio layers, stay as they were initialised.
        weights = {**self.net.state_dict(), **before["ema"]}
        data.load_weights(self.net, weights, self.args.init)
        log_rank0(f"start       {self.args.init}: {len(before['ema'])} of {len(weights)} tensors")
        if before["vae"] != fingerprint(self.vae):
            log_rank0("warning: --init was trained on latents of another VAE")
        return weights_id(before)

    def from_pyramid_flow(self):
        """Pyramid Flow's network with new audio layers. Blocks 0-7 and all that is not in a block
        stay as published (in bfloat16, where that is native); blocks 8-23 and audio are trained."""
        net = pyramid.load_pyramid_flow(
            Path(self.args.pretrained) / "diffusion_transformer_384p",
            audio_dim=data.gather(self.cache, "features", [0]).shape[-1],
            alpha=steps_per_latent(self.vae), audio_rope=not self.args.no_audio_rope)
        native = not isinstance(self.autocast(), nullcontext)
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith("single_transformer_blocks"))
            # What is trained are master weights in float32, no longer in the mapped file.
            if p.requires_grad:
                p.data = p.data.float()
            elif native and p.dim() > 1:
                p.data = p.data.bfloat16()
            # (Copies of the published weights may be in bfloat16.)
            else:
                p.data = p.data.float()
        # The latents are cached: the GPU's memory is for the network.
        self.vae.to("cpu")
        return net

    def batch(self, step, rows):
        index, rngs = batch_indices(self.cache, self.args, step, rows)
        batch = self.windows(self.cache, index, rngs)
        # Common to all processes: they have to skip the same parameters, and the batch of Pyramid
        # Flow's loss has its fine targets in one latent.
        rng = step_rng(self.args, "step", step)
        skip_audio = rng.random() < self.args.skip_audio
        latent = None                   # all latents
        if self.args.layout == "one":
            latent = int(rng.integers(1, batch["z"].shape[2]))
        numbers = [step * self.args.batch_size + row for row in rows]
        return dict(batch, rows=numbers, skip_audio=skip_audio, latent=latent)

    def windows(self, cache, index, rngs=None):
        """Windows of a cache -> normalised z (B, C, L, h, w), text, audio.

        rngs: one per sample, in training. With them captions are dropped, and z is drawn from the
        VAE's posterior; of a VAE with `reference` (all that this program makes) z is its mean. Most
        of the toybox VAE's posterior is as wide as the prior: samples would be mostly noise. (Not
        compared for real clips.)"""
        z, logvar = data.gather(cache, "latents", index).float().unbind(1)      # (B, C, L, h, w)
        captions = [cache["captions"][i] for i in index]
        if rngs and not self.vae.cfg.reference:
            noise = [rng.standard_normal(z.shape[1:], np.float32) for rng in rngs]
            z = z + (logvar / 2).exp() * torch.from_numpy(np.stack(noise))
        if rngs:
            captions = drop_text(captions, rngs, self.args.drop_text)
        if self.args.pretrained:
            text = pyramid.unpadded_prompts(self.prompts, captions, self.device)
        else:
            text = to_device(networks.text_bytes(captions), self.device)
        audio = data.gather(cache, "features" if self.args.pretrained else "mels", index)
        return dict(z=self.vae.normalise(to_device(z, self.device)), text=text,
                    audio=to_device(audio.float(), self.device))

    def loss(self, net, generators, z, text, audio, rows, skip_audio, latent):
        args = self.args
        if args.pretrained:
            return pyramid.pyramid_loss(net, z, text, audio, rows, generators, latent, skip_audio,
                                        args.lambda_motion)
        return syncphony_loss(net, z, text, audio, generators, skip_audio, args.lambda_motion,
                              args.sigma, args.shift)

    def held_out(self, n):
        return held_out_clips(self.test, n, self.args.resolution)

    def evaluate(self, clips):
        """Toybox: events of generated videos. Real clips: the loss on windows of the test split,
        and how well the motion of generated videos agrees with the true one, which is the score. On
        Pyramid Flow, whose videos would take hours, minus the loss is."""
        if not self.test:
            videos = generate(self.net, self.vae, clips, self.autocast, **self.extra["guidance"])
            return Evaluation(*video_figures(videos, clips), videos)
        losses = []
        sizes = []
        with torch.no_grad(), self.autocast():
            for k in range(0, len(clips), 16):
                batch = self.windows(self.test, np.array([c["number"] for c in clips[k:k + 16]]))
                rows = range(len(batch["z"]))
                # The same noise, and the same target, at every evaluation.
                latent = 1 + k // 16 % (batch["z"].shape[2] - 1)
                loss, _ = self.loss(self.net, seeded_each(rows, k), **batch, rows=rows,
                                    skip_audio=False, latent=latent)
                losses.append(loss.item())
                sizes.append(len(rows))
        loss = float(np.average(losses, weights=sizes))
        if self.args.pretrained:
            return Evaluation(dict(test_loss=loss), -loss)
        videos = generate(self.net, self.vae, clips, self.autocast, **self.extra["guidance"])
        records = [dict(motion=motion_agreement(motion_energy(c["video"]), motion_energy(v)))
                   for v, c in zip(videos, clips)]
        # The loss on test clips is lowest long before their motion follows the sound:
        # 0.61, 0.60, 0.63 after 400, 800, 1200 steps, with an agreement of -.10, .01, .11.
        motion = summarise(records)["motion"]
        score = -loss if math.isnan(motion) else motion
        return Evaluation(dict(test_loss=loss, motion_agreement=motion), score, videos)


# --------------------------------------------------------------------------------- the autoencoders

class VideoVAE:
    """Frames of toybox clips -> their reconstruction. Every sample is a new clip."""

    columns = ("error", "nats per latent")
    extra = {}

    def __init__(self, args, device, autocast):
        if args.init:
            raise BadInput(f"--init {args.init}: tunes a VAE on real clips; give --data")
        self.args = args
        self.device = device
        self.autocast = autocast
        self.map = parallel_map(device)
        self.net = autoencoders.CausalVideoVAE(autoencoders.VAEConfig(**autoencoders.TOYBOX_VAE))

    def batch(self, step, rows):
        # Two things of one kind in the same motion, (B, 2, F, H, W, 3) -> twice (B, 3, F, H, W).
        first = step * self.args.batch_size
        seeds = [[self.args.seed, first + row] for row in rows]
        pairs = self.map(partial(vae_training_pair, size=self.args.resolution), seeds)
        pairs = to_device(torch.from_numpy(np.stack(list(pairs))), self.device)
        source, target = frames_to_tensor(pairs, self.device).unbind(1)
        return dict(source=source, target=target)

    def loss(self, net, generators, source, target):
        # Noise in the shape of the latents (C, L, h, w): frame 0 has one of its own.
        F, H, W = source.shape[2:]
        shape = (net.cfg.latent, (F - 1) // net.stride_t + 1, H // net.stride, W // net.stride)
        noise = randn_each(generators, shape, source.device)
        loss, error, rate = autoencoders.video_vae_loss(net, source, target, noise, self.args.kl)
        return loss, torch.stack([error, rate])

    def held_out(self, n):
        return held_out_clips(None, n, self.args.resolution)

    def evaluate(self, clips):
        videos = reconstruct(self.net, clips, self.autocast)
        return Evaluation(*video_figures(videos, clips), videos)

    def statistics_clips(self):
        """-> videos uint8 (F, H, W, 3) like those of training"""
        # Of seeds far from those of training and evaluation.
        return [toybox_clip(HELD_OUT // 2 + i, self.args.resolution)["video"]
                for i in range(STATISTICS)]

    @torch.no_grad()
    def measure_latent_stats(self):
        """Into net.cfg: shift and scale that give latent 0 and the later latents unit variance."""
        z = torch.cat([self.net.encode(frames_to_tensor(video, self.device)[None])[0]
                       for video in self.statistics_clips()])
        for name, part in (("image", z[:, :, :1]), ("video", z[:, :, 1:])):
            setattr(self.net.cfg, f"shift_{name}", part.mean().item())
            setattr(self.net.cfg, f"scale_{name}", 1 / part.std().item())


def half_size(video):
    """uint8 (F, 2H, 2W, 3) -> (F, H, W, 3), means of 2 x 2 pixels."""
    F, H, W, _ = video.shape
    return video.reshape(F, H // 2, 2, W // 2, 2, 3).mean((2, 4)).round().astype(np.uint8)


class RealVideoVAE(VideoVAE):
    """Crops of real clips -> their reconstruction.

    The store holds windows at twice --resolution. A crop of it is a part of a frame of twice the
    size; of a window that is scaled down before, up to a whole frame of --resolution:

        stored window, 128 px        scaled to 64 .. 128 px        crop, 64 px
        .------------------.         .-------------.
        |                  |         |   .-------. |               .-------.
        |                  |   -->   |   |       | |      -->      |       |
        |                  |         |   '-------' |               '-------'
        '------------------'         '-------------'

    In time a sample is the first frame of the window and any LATENTS of its groups of 4 frames: a
    latent of this VAE depends on its own frames and the first one, at any distance."""

    # Two of the twelve latents of a window: a step of the same cost has four times as many clips.
    LATENTS = 2

    def __init__(self, args, device, autocast):
        if not isinstance(args.resolution, int):
            raise BadInput("--resolution: the VAE is trained on square crops; give one side")
        self.args = args
        self.device = device
        self.autocast = autocast
        if args.init:
            self.net = load_vae(args.init, device).train()
            if not self.net.cfg.reference or self.net.cfg.kernel_t > 1:
                raise BadInput(f"--init {args.init}: its latents depend on their neighbours; give "
                               "weights/vae-real.pt, or a VAE of train.py --task vae")
        else:
            config = autoencoders.VAEConfig(**autoencoders.REAL_VAE)
            self.net = autoencoders.CausalVideoVAE(config)
        # Test clips first: they are few, and what is wrong with them is found before the long part.
        self.test, self.train = (
            data.load_or_store_frames(args.data, args.data_root, split, 2 * args.resolution,
                                      log=log_rank0) for split in ("test", "train"))
        if not args.init:
            autoencoders.start_as_linear(self.net, self.differences())

    def batch(self, step, rows):
        clips = []
        for row in rows:
            rng = step_rng(self.args, "sample", step * self.args.batch_size + row)
            clips.append(self.crop(rng))
        video = to_device(torch.stack(clips), self.device)
        return dict(source=video, target=video)

    def crop(self, rng):
        """A random view of a random window -> float32 (3, 1 + t LATENTS, n, n) in [-1, 1]."""
        n = self.args.resolution
        t = self.net.stride_t
        window = rng.integers(len(self.train["at"]))
        # The first frame, and t frames of every latent that was drawn.
        latents = np.sort(rng.choice((data.FRAMES - 1) // t, self.LATENTS, replace=False))
        frames = (1 + t * latents[:, None] + np.arange(t)).ravel()
        shard, row = self.train["at"][window]
        video = self.train["arrays"]["videos"][shard][row, [0, *frames]]
        video = frames_to_tensor(video).transpose(0, 1)               # (1 + t LATENTS, 3, 2n, 2n)
        # Scaled, cropped, and every second one mirrored.
        side = int(rng.integers(n, 2 * n + 1))
        if side < 2 * n:
            video = nn.functional.interpolate(video, (side, side), mode="bilinear", antialias=True)
        y, x = rng.integers(side - n + 1, size=2)
        video = video[..., y:y + n, x:x + n].transpose(0, 1)
        return video.flip(-1) if rng.random() < .5 else video

    def differences(self):
        """Differences of frames from the first one, position by position, (n, 3, t, P, P)."""
        rows = []
        for clip in self.statistics_clips():
            video = frames_to_tensor(clip)[None]
            x = autoencoders.split_positions(video[:, :, 1:] - video[:, :, :1], self.net.stride_t,
                                             self.net.stride)
            rows.append(x.flatten(0, 3))
        return torch.cat(rows)

    def held_out(self, n):
        """n windows of the test clips, at --resolution, then every fourth at twice that."""
        index = np.unique(np.linspace(0, len(self.test["at"]) - 1, n).astype(int))
        large = data.gather(self.test, "videos", index).numpy()
        return [dict(video=video, audio=np.zeros(1, np.float32))
                for video in (*map(half_size, large), *large[::4])]

    def evaluate(self, clips):
        videos = reconstruct(self.net, clips, self.autocast)
        records = [picture_record(v, c["video"]) for v, c in zip(videos, clips)]
        # Four of five are at --resolution, of which eight are shown.
        n = sum(len(c["video"][0]) == self.args.resolution for c in clips)
        scores, large = summarise(records[:n]), summarise(records[n:])
        names = ("psnr", "psnr_repeated", "psnr_moving", "psnr_moving_repeated", "ssim")
        figures = {name: scores.get(name, math.nan) for name in names}
        figures |= {f"{name}_large": large.get(name, math.nan) for name in names}
        return Evaluation(figures, scores["psnr"], videos[:n])

    def statistics_clips(self):
        index = np.linspace(0, len(self.train["at"]) - 1, STATISTICS).round()
        index = np.unique(index.astype(int))
        return [half_size(video) for video in data.gather(self.train, "videos", index).numpy()]


def first_sound(clips, rate):
    """The waveform of the first clip that has sound."""
    *others, last = [clip["sound"] or clip["path"] for clip in clips]
    for path in others:
        with suppress(BadInput):
            return data.read_audio(path, rate)
    return data.read_audio(last, rate)


def any_second(rate, source):
    """One second from anywhere in a sound -> float32 (rate,). source: clips of `find_clips`, of
    which the first one with sound is taken (none: one of the toybox), and a numpy generator."""
    clips, rng = source
    if clips:
        wave = first_sound(clips, rate)
    else:
        wave = toybox_clip(int(rng.integers(HELD_OUT)), video=False)["audio"]
    # What is shorter is followed by silence.
    start = rng.integers(max(1, len(wave) - rate + 1))
    return data.fit_length(wave[start:], rate)


class AudioVAE:
    """Sounds of one second -> reconstruction of the waveform (audio-vae) or of its log-mel spectrum
    (mel-vae). From the toybox every sound is a new one; recordings are read as they are."""

    # Clips drawn for a sample, some of which may have no sound. Where half of all have none, it
    # fails once in 2^16 samples.
    DRAWN = 16
    extra = {}

    def __init__(self, args, device, autocast):
        self.args = args
        self.device = device
        self.autocast = autocast
        self.map = parallel_map(device)
        front = "mel" if args.task == "mel-vae" else "waveform"
        config = autoencoders.AudioVAEConfig(**autoencoders.AUDIO_VAE_SIZES[front][args.size])
        self.columns = ("error", "nats per latent")
        if front == "waveform":
            self.columns = ("error", "spectral", "nats per latent")
        if args.data == "toybox" and config.rate != data.RATE:
            raise BadInput(f"--size {args.size}: codes sounds of {config.rate} Hz, the toybox has "
                           f"{data.RATE}; give recordings by --data")
        self.net = autoencoders.AudioVAE(config)
        # Recordings by split; none: the toybox's sounds.
        self.files = dict(train=[], test=[])
        if args.data != "toybox":
            self.files = {split: data.clips_of_split(args.data, args.data_root, split)[0]
                          for split in self.files}

    def seconds(self, sample_ids, split="train"):
        """One second of a recording of the split, or of a toybox clip, for each: (n, rate)."""
        files = self.files[split]
        sources = []
        for sample_id in sample_ids:
            rng = step_rng(self.args, "sound", sample_id)
            drawn = rng.integers(len(files), size=self.DRAWN) if files else []
            sources.append(([files[i] for i in drawn], rng))
        waves = self.map(partial(any_second, self.net.cfg.rate), sources)
        return torch.from_numpy(np.stack(list(waves)))

    def batch(self, step, rows):
        first = step * self.args.batch_size
        waves = self.seconds([first + row for row in rows])
        return dict(wave=to_device(waves, self.device))               # (B, rate)

    def loss(self, net, generators, wave):
        shape = (net.cfg.latent, math.ceil(wave.shape[1] / net.hop))
        noise = randn_each(generators, shape, wave.device)
        return autoencoders.audio_vae_loss(net, wave, noise, self.args.kl)

    def held_out(self, n):
        if self.args.data != "toybox":
            # Sample ids that no training reaches.
            waves = self.seconds(range(10 ** 12, 10 ** 12 + n), "test")
            return [dict(audio=wave.numpy()) for wave in waves]
        return held_out_clips(None, n)

    def evaluate(self, clips):
        sounds = []
        errors = []
        with torch.no_grad(), self.autocast():
            # One by one: each error is divided by the norm of its own clip, so all count the same.
            for clip in clips:
                wave = torch.from_numpy(clip["audio"])[None]
                mean, _ = self.net.encode(wave.to(self.device))
                decoded = self.net.decode(mean, wave.shape[1]).float().cpu()
                sounds.append(decoded[0].numpy())
                # Near silence has hardly a norm: one such clip would outweigh all others.
                if wave.abs().max() >= 1e-3:
                    errors.append(autoencoders.spectral_error(decoded, wave).item())
        figures = dict(spectral_error=float(np.mean(errors)) if errors else 0.)
        if self.args.data == "toybox":
            figures["onset_f1_50"] = onset_f1(sounds, [c["events"] for c in clips])
        return Evaluation(figures, -figures["spectral_error"])

    @torch.no_grad()
    def measure_latent_stats(self):
        """Into net.cfg: shift and scale that give every channel unit variance."""
        # Of the training's kind, by sample ids that no training reaches.
        waves = self.seconds(range(10 ** 11, 10 ** 11 + STATISTICS))
        z = torch.cat([self.net.encode(wave[None].to(self.device))[0] for wave in waves])
        self.net.cfg.shift = tuple(z.mean((0, 2)).tolist())           # z (clips, A, S)
        self.net.cfg.scale = tuple((1 / z.std((0, 2))).tolist())


# ----------------------------------------------------------------------------- SyncFlow and Harmony

class TwoTowers:
    """SyncFlow (t2av): text -> video and sound on one noise level; audio attends to the features of
    the video tower. Harmony (joint): either stream may be given as well; the network takes a noise
    level per video latent and one of the audio, the same sigma where both are noisy, 0 for what is
    given."""

    def __init__(self, args, device, autocast):
        self.args = args
        self.device = device
        self.autocast = autocast
        self.harmony = args.task == "joint"
        self.trains = STAGES[args.task][args.stage][2]
        self.vae = load_vae(args.vae, device)
        self.audio_vae = load_vae(args.audio_vae, device, "audio-vae or mel-vae")
        self.hertz = self.audio_vae.cfg.rate / self.audio_vae.hop
        alpha = steps_per_latent(self.vae, self.audio_vae)
        guidance = GUIDANCE[args.task] | dict(shift=args.shift)
        if self.harmony:
            self.columns = ("video", "audio", "audio-driven video", "video-driven audio")
            # Evaluations of a training are without SyncCFG, SyncFlow's (below) with its guidance.
            self.sampling = guidance | dict(sync_video=1., sync_audio=1.)
            config = towers.HARMONY[args.size] | dict(
                rope_align=not args.no_rope_align, use_gldi=not args.no_gldi)
        else:
            self.columns = ("video", "audio")
            self.sampling = guidance
            config = towers.SYNCFLOW[args.size] | dict(
                adaptor=not args.no_adaptor, audio_only=args.no_video)
        config = towers.DualTowerConfig(**config | dict(alpha=alpha))
        check_latents("vae", self.vae, config.latent, args)
        check_latents("audio-vae", self.audio_vae, config.audio_latent, args)
        self.check_frozen_tower()
        # What is wrong with --init is said before the hours that the clips may take.
        self.net = towers.DualTower(config)
        self.start_stage()
        self.cache, self.test = open_caches(
            args, self.vae, autocast, audio_encoder=self.encode_waveform,
            audio_tag=fingerprint(self.audio_vae), variations=2 if self.harmony else 1)
        if self.test and Path(args.audio_vae) in (AUDIO_VAE_FILE, MEL_VAE_FILE):
            task = "mel-vae" if self.audio_vae.cfg.front == "mel" else "audio-vae"
            log_rank0("warning: --audio-vae was trained on the toybox's sounds; one of recordings: "
                      f"train.py --task {task} --data {shlex.quote(args.data)}")
        # Window of the cache -> all windows of its clip, among which references are chosen.
        self.windows_of_clip = {}
        for windows in self.cache["clips"]:
            self.windows_of_clip.update(dict.fromkeys(windows, windows))
        self.extra = dict(size=args.resolution, vae=fingerprint(self.vae), stage=args.stage,
                          audio_vae=fingerprint(self.audio_vae), guidance=guidance,
                          started_from=self.started_from, has_audio=self.has_audio)

    def check_frozen_tower(self):
        """SyncFlow's stage "audio": a tower that is trained on can follow other latents, a frozen
        one cannot."""
        args = self.args
        if args.task != "t2av" or "video" in self.trains or args.no_video:
            return
        before = data.load_checkpoint(args.init, args.task)
        if before["vae"] != fingerprint(self.vae):
            raise BadInput(f"{args.init}: its video tower, which stays frozen, was trained on "
                           f"latents of another VAE ({before['args'].get('vae')}); give that one "
                           "by --vae")

    def start_stage(self):
        """Weights of --init; which parameters are trained."""
        self.started_from = None
        self.has_audio = False
        if self.args.init:
            before = data.load_checkpoint(self.args.init, self.args.task)
            self.started_from = weights_id(before)
            weights = before["ema"]
            # After stage "video" the audio tower is as it was initialised, perhaps in another size,
            # unless that stage had got a trained one by --init.
            self.has_audio = before["stage"] != "video" or before.get("has_audio", False)
            if not self.has_audio:
                weights = {k: v for k, v in weights.items() if towers.part_of(k) != "audio"}
            data.load_weights(self.net, {**self.net.state_dict(), **weights}, self.args.init)
        for name, p in self.net.named_parameters():
            # The encoder of captions is trained with the video; without --init it was not yet.
            is_untrained = name.startswith("text_encoder") and not self.args.init
            p.requires_grad_(towers.part_of(name) in self.trains or is_untrained)

    def encode_waveform(self, wave):
        """Waveform (samples,) -> the mean of its latents, (S, A)."""
        mean, _ = self.audio_vae.encode(torch.from_numpy(wave)[None].to(self.device))
        return mean[0].T.float().cpu().numpy()

    def latents(self, z_v, z_a):
        """-> normalised z_v (B, C, L, h, w), z_a (B, A, S)"""
        return dict(z_v=self.vae.normalise(to_device(z_v, self.device)),
                    z_a=self.audio_vae.normalise(to_device(z_a, self.device)))

    def text(self, name, index, rngs):
        """Captions or transcripts ("speech") of windows, some of them dropped -> text_bytes."""
        texts = drop_text([self.cache[name][i] for i in index], rngs, self.args.drop_text)
        return to_device(networks.text_bytes(texts), self.device)

    def batch(self, step, rows):
        """Latents of the samples (the means of their posteriors), captions, and beside them single
        pictures (SyncFlow; Harmony's first stage) or transcripts and references (Harmony)."""
        index, rngs = batch_indices(self.cache, self.args, step, rows)
        z_v = data.gather(self.cache, "latents", index)[:, 0].float()         # (B, C, L, h, w)
        z_a = data.gather(self.cache, "features", index).float().mT           # (B, A, S)
        batch = dict(self.latents(z_v, z_a), text=self.text("captions", index, rngs))
        if self.args.stage == "video" or not self.harmony:
            # They teach the video tower; stage "audio" does not train it.
            return batch | ({} if self.args.stage == "audio" else self.still_pictures(rngs))
        batch["speech"] = self.text("speech", index, rngs)
        # One length for the step, so that all processes have tensors of one shape. The paper's
        # references have 1 to 3 s; a window here has 2 s, which is the most. In stage "audio" they
        # come from the target itself, which has 3 to 10 s there and 2 s here: of 1 to 3 s, half
        # would be all of it. So they have .3 to 1 s, at most half of the target.
        least, most = (.3, 1) if self.args.stage == "audio" else (1, 3)
        seconds = step_rng(self.args, "reference", step).uniform(least, most)
        return batch | self.references(index, rngs, seconds)

    def still_pictures(self, rngs):
        """First latents of --pictures clips per sample, (B * pictures, C, 1, h, w), and text."""
        n = self.args.pictures
        if n == 0:
            return {}
        # Any windows of the cache, whatever the sample is.
        index = np.concatenate([rng.integers(len(self.cache["at"]), size=n) for rng in rngs])
        text = self.text("captions", index, np.repeat(rngs, n))
        z = data.gather(self.cache, "latents", index)[:, 0, :, :1].float()
        return dict(pictures=self.vae.normalise(to_device(z, self.device)), picture_text=text)

    def references(self, index, rngs, seconds):
        """Clean references of the timbre (B, A, R) and their mask (B, R), False for "none".

        Stage "audio": a piece of the clip itself. Later: of a window of the same recording or thing
        that does not overlap the clip, where there is one."""
        cache = self.cache
        window = data.FRAMES / data.FPS - 1e-6                        # seconds
        chosen = []
        exists = []
        for i, rng in zip(index, rngs):
            # Which window the reference comes from, and whether the sample gets one at all.
            candidates = [i]
            if self.args.stage != "audio":
                candidates = [w for w in self.windows_of_clip[i]
                              if abs(cache["starts"][w] - cache["starts"][i]) >= window]
            exists.append(len(candidates) > 0 and rng.random() >= self.args.drop_text)
            chosen.append(rng.choice(candidates) if candidates else i)
        z_a = data.gather(cache, "features", np.array(chosen)).float().mT         # (B, A, S)
        # Which R latents of it.
        R = min(round(seconds * self.hertz), z_a.shape[2])
        starts = [rng.integers(z_a.shape[2] - R + 1) for rng in rngs]
        ref = torch.stack([z[:, s:s + R] for z, s in zip(z_a, starts)])
        mask = to_device(torch.tensor(exists), self.device)[:, None].expand(-1, R)
        return dict(ref=self.audio_vae.normalise(to_device(ref, self.device)), ref_mask=mask)

    def clip_loss(self, net, generators, z_v, z_a, text, speech=None, ref=None, ref_mask=None):
        """The system's loss."""
        args = self.args
        if not self.harmony:
            # Paired noise is easier: evaluations would not compare with those of other runs.
            ot = args.ot and net.training
            return syncflow_loss(net, z_v, z_a, text, generators, args.stage, ot, args.sigma,
                                 args.shift)
        # Evaluation reports all errors, also those that are not trained.
        lambdas = (args.lambda_joint, args.lambda_v, args.lambda_a) if net.training else (1, 1, 1)
        return harmony_loss(net, z_v, z_a, text, speech, generators, ref, ref_mask, args.stage,
                            *lambdas, args.shift, args.sigma)

    def loss(self, net, generators, pictures=None, picture_text=None, **batch):
        """The system's loss, plus that of the still pictures."""
        args = self.args
        loss, report = self.clip_loss(net, generators, **batch)
        if pictures is not None:
            stills = image_loss(net, pictures, picture_text, generators, args.sigma, args.shift)
            loss = loss + stills
        return loss, report

    def held_out(self, n):
        """Held-out clips and their latents z_v (1, C, L, h, w), z_a (1, A, S), not normalised."""
        clips = held_out_clips(self.test, n, self.args.resolution)
        # Latents of real clips are in the cache.
        if self.test:
            return clips
        with torch.no_grad():
            for clip in clips:
                video = frames_to_tensor(clip["video"], self.device)[None]
                clip["z_v"] = self.vae.encode(video)[0]
                clip["z_a"] = torch.from_numpy(self.encode_waveform(clip["audio"])).T[None]
        return clips

    def evaluate(self, clips):
        """The loss on held-out clips, which scores; then what the stage can generate."""
        # The inputs of the loss: latents and texts of all clips, no references.
        z = self.latents(*(torch.cat([c[name].to(self.device) for c in clips])
                           for name in ("z_v", "z_a")))
        batch = dict(z, text=networks.text_bytes([c["caption"] for c in clips]).to(self.device))
        if self.harmony:
            speech = networks.text_bytes([c.get("speech", "") for c in clips])
            batch["speech"] = speech.to(self.device)
        # The same noise at every evaluation.
        with torch.no_grad(), self.autocast():
            reports = [self.clip_loss(self.net, seeded_each(range(len(clips)), k), **batch)[1]
                       for k in range(EVALUATION_DRAWS)]
        errors = dict(zip(self.columns, torch.stack(reports).mean(0).tolist()))
        score = -sum(errors[s] for s in ("video", "audio") if s in self.trains)
        events, videos, sounds = self.evaluate_events(clips, **z)
        figures = {f"loss {k}": v for k, v in errors.items()} | events
        return Evaluation(figures, score, videos, sounds)

    def generate(self, clips, **given):
        """Captions, and what else is given -> videos, waveforms. In stage "video" the tower of the
        video runs alone."""
        audio_vae = None if self.args.stage == "video" else self.audio_vae
        settings = dict(self.sampling)
        if self.harmony and audio_vae:
            settings["speech"] = [c.get("speech", "") for c in clips]
        return generate_audio_video(
            self.net, self.vae, audio_vae, [c["caption"] for c in clips], len(clips[0]["video"]),
            self.args.resolution, self.autocast, **settings, **given)

    def evaluate_events(self, clips, z_v, z_a):
        """What the stage can generate: figures of the toybox's events, the first videos and sounds.

        Sounds for true videos; of Harmony also videos for true sounds, and both from a picture."""
        stage = self.args.stage
        if stage == "video":
            return {}, self.generate(clips[:8])[0], None
        # Before the last stage Harmony's bridges between the towers are not trained.
        if self.harmony and stage != "joint":
            return {}, (), None
        figures = {}
        if not self.test or stage == "audio":
            _, sounds = self.generate(clips, z_v=None if self.net.cfg.audio_only else z_v)
        if not self.test:
            figures["video_driven"] = onset_f1(sounds, [c["events"] for c in clips])
        if not self.test and self.harmony:
            pictures = np.stack([c["video"][0] for c in clips])
            # Events in videos that were generated for true sounds.
            driven, _ = self.generate(clips, z_a=z_a, pictures=pictures)
            figures["audio_driven"] = video_figures(driven, clips)[0]["f1_50"]
            # Onsets of generated sounds against the events of the videos generated with them.
            videos, waves = self.generate(clips, pictures=pictures)
            detected = [detect_clip_events(v, c)[0] for v, c in zip(videos, clips)]
            figures["pairs"] = onset_f1(waves, detected)
        if stage == "audio":
            return figures, [c["video"] for c in clips[:8]], sounds
        videos, sounds = self.generate(clips[:8])
        return figures, videos, sounds


def task_class(args):
    if args.task == "vae":
        return VideoVAE if args.data == "toybox" else RealVideoVAE
    return {"a2v": A2V, "t2av": TwoTowers, "joint": TwoTowers}.get(args.task, AudioVAE)


# ----------------------------------------------------------------------------- optimisers, averages

# (a, b, c) of the three polynomials a s + b s^3 + c s^5 of `orthogonalise`, applied one after the
# other as in Polar Express (Amsel et al. 2025). Each brings the singular values that the one before
# leaves as near to 1 as possible, with a margin of 1 % for bfloat16:
#     [.01, 1]  ->  [.08, 1.92]  ->  [.28, 1.72]  ->  [.71, 1.29]
# Muon (Jordan et al. 2024) applies one polynomial five times; each time is 6 % of a training step
# on a CPU. Held-out loss (160 steps of 8 clips, width 128, one seed): 3.054 with these three, 3.063
# with those five; 3.086 if a matrix keeps its update for a second step.
NEWTON_SCHULZ = ((8.0211, -22.956, 16.623), (3.6231, -2.6621, .5141), (2.687, -1.9711, .4406))


def orthogonalise(x):
    """Matrices (n, M, N) -> the same singular vectors, with singular values near 1, by
    Newton-Schulz: y <- a y + b (y y^T) y + c (y y^T)^2 y acts on each singular value as a
    polynomial. Those below .01 of the norm, about half of a gradient's, grow by up to 78, the
    product of the three a: .001 to .08, .01 to .73. x is overwritten."""
    # All singular values to [0, 1]
    y = x.div_(x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7))
    # (y y^T) y = y (y^T y): the smaller one of the two squares.
    tall = y.shape[1] > y.shape[2]
    for a, b, c in NEWTON_SCHULZ:
        gram = torch.bmm(y.mT, y) if tall else torch.bmm(y, y.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (y, factor) if tall else (factor, y)
        y = torch.baddbmm(y, left, right, beta=a)
    return y


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps, so that no direction of a matrix is left behind; a kernel
    (C_out, C_in, ...) is a matrix of C_out rows. It keeps one number per weight, AdamW two.

    Momentum, decay and scale are those of torch.optim.Muon, the polynomials are not. That one takes
    no kernels and always multiplies in bfloat16: on a CPU without it a step of a2v's tiny network
    takes 33 s there, .9 s with dtype=float32. `closure` is for torch.distributed.checkpoint, which
    calls step(closure=None)."""

    def __init__(self, params, lr, weight_decay, dtype, momentum=.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            # A GPU would take longer to start the products of single matrices than to compute them:
            # all of one shape are a batch. A CPU has one matrix in its cache, but not a batch: in
            # batches a step takes 1.2 times as long.
            batches = {}
            for p in group["params"]:
                if p.grad is not None:
                    key = p if p.device.type == "cpu" else p.shape
                    batches.setdefault(key, []).append(p)
            for params in batches.values():
                self.step_of_batch(params, group)

    def step_of_batch(self, params, group):
        """The step of parameters of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # Nesterov momentum.
        grads = [p.grad for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
        # Kernels become matrices, and kernels again.
        matrices = orthogonalise(updates.flatten(2).to(self.dtype))
        updates = matrices.to(updates.dtype).view_as(updates)
        # Entries of the size of AdamW's, about 0.2 (Moonlight, 2025).
        size = .2 * math.sqrt(max(matrices.shape[1:]))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates.unbind(), alpha=-group["lr"] * size)


def make_optimisers(net, name, lr, dtype=torch.float32):
    """Muon for the matrices and kernels of the blocks, AdamW for everything else; or AdamW."""
    inside = []
    matrices = []
    vectors = []
    for key, p in net.named_parameters():
        in_block = re.search(r"block|^layers\.", key) and not re.search("norm|table", key)
        if p.requires_grad and name == "muon" and in_block and p.dim() > 1:
            inside.append(p)
        elif p.requires_grad:
            (matrices if p.dim() > 1 else vectors).append(p)
    # Weight decay for matrices only: biases and scales have their size for a reason. torch's
    # default of .01, and a second beta below its .999 because runs are short: averages over 50
    # steps instead of 1000.
    weight_decay = .01
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors)]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(.9, .98), weight_decay=0.,
                              fused=vectors[0].device.type in ("cpu", "cuda"))
    return [adamw, Muon(inside, lr, weight_decay, dtype)] if inside else [adamw]


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (.02 + .98 * .5 * (1 + math.cos(math.pi * min(1, progress))))


def local_shard(p):
    """What this process holds of a tensor: its share under FSDP, else all of it."""
    return p.to_local() if isinstance(p, DTensor) else p


def update_ema(ema, net, step, decay, every=1):
    """ema <- d ema + (1 - d) weights, with d = (1 + step) / (10 + step) until it reaches `decay`.
    With every = n it runs in each n-th step and uses d^n."""
    if step % every == 0:
        # Averages that start at the initial weights have to forget them first.
        d = min(decay, (1 + step) / (10 + step)) ** every
        weights = dict(net.named_parameters())
        now = [local_shard(weights[k].detach()).to(v.device) for k, v in ema.items()]
        torch._foreach_lerp_(list(ema.values()), now, 1 - d)


def swap_ema(net, ema):
    """The network's weights and their averages change places, in place; once more, and back."""
    for k, p in net.named_parameters():
        if k in ema:
            weight = local_shard(p.detach())
            kept = weight.to(ema[k].device, copy=True)
            weight.copy_(ema[k])
            ema[k].copy_(kept)


# ---------------------------------------------------------------------------- the parts of the loop

class Objective(nn.Module):
    """The loss as a module's forward, for DistributedDataParallel and torch.compile."""

    def __init__(self, task):
        super().__init__()
        # As a submodule, so that its parameters are found.
        self.net = task.net
        self.task = task

    def forward(self, batch, generators):
        return self.task.loss(self.net, generators, **batch)


def make_objective(task, args):
    """The task's loss as a module, with what was asked for: --fsdp, --checkpointing, --compile."""
    net = task.net
    objective = Objective(task)
    blocks = list(net.all_blocks()) if hasattr(net, "all_blocks") else []
    fsdp = getattr(args, "fsdp", False)
    if fsdp:
        # FSDP2: every process keeps a share of all weights, gradients and states, and gathers the
        # weights of a block while that block runs.
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        for block in net.single_transformer_blocks:
            # project_kv is called from outside its block.
            register_fsdp_forward_method(fully_shard(block.audio), "project_kv")
        for module in (*blocks, net):
            fully_shard(module)
    if getattr(args, "checkpointing", False):
        # A block keeps its inputs alone; the backward pass runs it once more.
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if args.compile:
        # What earlier stages compiled counts towards the 8 variants that torch makes of a block.
        torch.compiler.reset()
        # Blocks are alike, so that they are compiled once. The autoencoders have none.
        for module in blocks or [objective]:
            module.compile()
    if world_size() > 1 and not fsdp:
        # In steps without audio layers their parameters get no gradient, in all processes alike.
        objective = DistributedDataParallel(objective, find_unused_parameters=len(blocks) > 0)
    return objective


def first_batch(task, rows):
    """Samples of step 0, with the audio layers, as most steps, whatever was drawn for this one."""
    batch = task.batch(0, rows)
    return batch | dict(skip_audio=False) if "skip_audio" in batch else batch


def count_flops(task):
    """FLOPs (2 per multiply-add) per clip of step 0, forward and backward. Counted on the meta
    device, which computes shapes and no numbers. (Pyramid Flow's steps differ by their latent.)"""
    # Four clips: Pyramid Flow's loss trains each at one stage.
    batch = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x,
                     first_batch(task, [0, 1, 2, 3]))
    with torch.device("meta"):
        net = type(task.net)(task.net.cfg).to("meta")       # tables out of numpy as well
    # What is frozen has no backward pass.
    for copy, p in zip(net.parameters(), task.net.parameters()):
        copy.requires_grad_(p.requires_grad)
    with FlopCounterMode(display=False) as counter:
        task.loss(net, seeded_each(range(4)), **batch)[0].backward()
    return counter.get_total_flops() / 4


def peak_memory(device):
    """GB that this process has taken at most: of the GPU, or of the machine, with the pages of
    mapped files."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # bytes on a Mac, else kilobytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def as_text(figures, form):
    """{name: value} -> one line, without what is nan: a stream that is not trained."""
    return "  ".join(f"{k} {v:{form}}" for k, v in figures.items() if not math.isnan(v))


def log_row(path, **row):
    """Append a row to a CSV file, which starts with the names of the columns."""
    if rank() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, row)
        if path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(row)


def trim_log(path, step):
    """Remove the rows of later steps, which will be taken again, and half a row at the end."""
    if rank() > 0 or not path.is_file():
        return

    def is_kept(row):
        number = row.split(b",")[0]
        return row.endswith(b"\n") and number.isdigit() and int(number) <= step

    header, *rows = path.read_bytes().splitlines(keepends=True) or [b""]
    kept = [row for row in rows if is_kept(row)]
    with data.replacing(path) as part:
        # Without rows the header goes too: a new run may have other columns.
        part.write_bytes(b"".join([header, *kept] if kept else []))


def write_samples(path, evaluation, clips):
    """Strips of up to eight clips, the true one above the generated one; the first one as mp4."""
    sounds = evaluation.sounds
    if sounds is None:
        sounds = [c["audio"] for c in clips]
    # Eight clips of frames over sound fit one screen.
    strips = []
    for video, sound, clip in list(zip(evaluation.videos, sounds, clips))[:8]:
        strips.append(data.film_strip(clip["video"], clip["audio"]))
        strips.append(data.film_strip(video, sound))
    data.write_picture(path.with_suffix(".png"), np.concatenate(strips))
    data.write_video(path.with_suffix(".mp4"), evaluation.videos[0], sounds[0])


# ----------------------------------------------------------------------------------------- the loop

class Run:
    """A training run: task and network, averages and optimisers, counters, files."""

    def __init__(self, args):
        self.args = args
        self.out = Path(args.out)
        self.device, place = join_processes(args.device)
        parts = world_size() * args.accum
        if args.batch_size % parts:
            raise BadInput(f"--batch-size {args.batch_size} must be a multiple of processes x "
                           f"--accum = {parts}")
        self.micro_batch = args.batch_size // parts
        # What a run with other settings has left is refused before anything is prepared.
        self.last = self.load_last()
        self.autocast, precision = pick_autocast(args.dtype, self.device)

        # The task prepares its data (dtype auto: in bfloat16 if native, the network is timed below)
        # and builds its network by --seed. Process 0 comes first: it leaves files for the others.
        if rank() > 0:
            barrier()
        torch.manual_seed(args.seed)
        self.task = task_class(args)(args, self.device, self.autocast)
        if rank() == 0:
            barrier()
        self.net = self.task.net.to(self.device)
        self.flops = count_flops(self.task) * args.batch_size             # of a step
        # Of a model on Pyramid Flow only what is trained is saved.
        self.published = bool(getattr(args, "pretrained", None))
        # Compile? In which dtype, if --dtype leaves it open?
        #   --pretrained          not compiled, since shapes change; in bfloat16 if that is native
        #   CUDA                  compiled, in bfloat16 if native: timing both would compile twice
        #   CUDA --no-compile,    both are timed: on CUDA a small network waits for its kernels to
        #   CPU, a Mac's GPU      start, and autocast adds some (a2v's tiny: .62 x as fast, H100)
        if self.device.type == "cuda" and not args.no_compile and not self.published:
            args.compile = True
        elif args.dtype == "auto" and not self.published:
            precision = self.measure_dtype()
        self.describe(f"{place}, {precision}")
        self.sharded = getattr(args, "fsdp", False)
        # FSDP replaces the parameters, of which the lines below take hold.
        self.objective = make_objective(self.task, args)

        # Averages of what is trained, by name; of the published size in the CPU's memory.
        where = "cpu" if self.published else self.device
        self.ema = {k: local_shard(p.detach()).to(where, copy=True)
                    for k, p in self.net.named_parameters() if p.requires_grad}
        # Muon's products are in the dtype of the network's.
        dtype = torch.float32 if self.autocast is nullcontext else torch.bfloat16
        self.optimisers = make_optimisers(self.net, args.optimizer, args.lr, dtype)

        # How states are gathered: complete, in the CPU's memory. The same calls serve one process,
        # several, and the shares of FSDP.
        self.options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False,
                                        ignore_frozen_params=self.published)

        self.step = 0                 # steps taken
        self.best = -math.inf         # score of best.pt
        self.seconds = 0.             # of training, in all sessions
        self.logged = 0.              # seconds at the last line of the log
        self.waited = 0.              # of them for batches, since that line
        self.reports = []             # since that line
        self.norms = []               # of the gradients since the last check
        self.stop = 0                 # number of the signal that was received

    def describe(self, device):
        """What is trained, and where."""
        sizes = [p.numel() / 1e6 for p in self.net.parameters()]
        trained = [p.numel() / 1e6 for p in self.net.parameters() if p.requires_grad]
        log_rank0(f"device      {device}\n"
                  f"parameters  {sum(sizes):.2f} M, {sum(trained):.2f} M trained\n"
                  f"compute     {self.flops / 1e9:.0f} GFLOP per step of {self.args.batch_size} "
                  "clips")

    def measure_dtype(self):
        """`pick_autocast` for passes of a micro-batch, at most four clips of it, forward and
        backward, not compiled -> why in words. Process 0 decides for all."""
        rows = range(min(4, self.micro_batch))
        batch = first_batch(self.task, list(rows))

        def step():
            self.task.loss(self.net, seeded_each(rows), **batch)[0].backward()
            self.net.zero_grad(set_to_none=True)

        _, why = pick_autocast("auto", self.device, step)
        why = same_everywhere(why)
        # The name of the type, which a checkpoint keeps, comes first.
        self.args.dtype = why.split(":")[0]
        self.autocast, _ = pick_autocast(self.args.dtype, self.device)
        self.task.autocast = self.autocast
        return why

    def on_signal(self, number, frame):
        """Ctrl-C or SIGTERM: the first one ends the run after its step or evaluation, with a
        checkpoint; another one, more than a second later, at once. (Schedulers signal every process
        of a job, and torchrun passes its own signal on: these two are one request.)"""
        if not self.stop:
            self.stop = number
            self.stop_time = time.monotonic()
        elif time.monotonic() > self.stop_time + 1:
            raise KeyboardInterrupt(number)

    def micro_batches(self):
        """-> the generators and inputs of every micro-batch from this step on. A thread draws the
        clips or reads the sounds of the next one while the network trains on this one."""
        def make(step, i):
            start = (rank() * self.args.accum + i) * self.micro_batch
            rows = list(range(start, start + self.micro_batch))
            ids = [step * self.args.batch_size + row for row in rows]
            return seeded_each(ids, self.args.seed, STREAMS["noise"]), self.task.batch(step, rows)

        with ThreadPoolExecutor(1) as thread:
            accum = self.args.accum
            places = (divmod(k, accum) for k in range(self.step * accum, self.args.steps * accum))
            coming = thread.submit(make, *next(places))
            for place in places:
                ready = coming
                coming = thread.submit(make, *place)
                yield ready.result()
            yield coming.result()

    def accumulate_gradients(self, micro_batches):
        """Gradients of this step, averaged over micro-batches and processes."""
        accum = self.args.accum
        for i in range(accum):
            start = time.perf_counter()
            generators, batch = next(micro_batches)
            self.waited += time.perf_counter() - start
            # Processes exchange gradients at the last micro-batch.
            exchange = nullcontext()
            if self.sharded:
                self.net.set_requires_gradient_sync(i == accum - 1)
            elif world_size() > 1 and i < accum - 1:
                exchange = self.objective.no_sync()
            with exchange:
                with self.autocast():
                    loss, report = self.objective(batch, generators)
                (loss / accum).backward()
            self.reports.append(torch.cat([loss.detach()[None], report]))

    def update(self):
        """One step of the optimisers."""
        args = self.args
        # Larger gradients are scaled down to a norm of 1.
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), 1.)
        self.norms.append(norm.full_tensor() if self.sharded else norm)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.step, args)
            optimiser.step()
        self.net.zero_grad(set_to_none=True)
        # The averages follow.
        every = EMA_EVERY_PRETRAINED if self.published else 1
        update_ema(self.ema, self.net, self.step, args.ema, every)
        self.step += 1

    def check(self):
        """Before anything is logged or saved: were all gradients since the last check finite? ->
        norm of the last one, before clipping. To check every step would make a GPU idle: instead of
        queueing the next step, the CPU would wait for the norm of this one."""
        norms = torch.stack(self.norms).tolist()
        self.norms = []
        for i, norm in enumerate(norms):
            if not math.isfinite(norm):
                ago = len(norms) - i
                loss = self.reports[-ago * self.args.accum][0].item()
                raise BadInput(f"the loss is {loss} at step {self.step - ago}, the norm of the "
                               f"gradient {norm}; last.pt is from before: lower --lr")
        return norms[-1]

    def due(self, every):
        return self.step % every == 0 or self.step == self.args.steps

    def log(self, norm):
        """Means since the last report, as a line of text and a row of log.csv."""
        # A noise level that no sample had reports nan, which is left out of the mean.
        loss, *report = torch.stack(self.reports).nanmean(0).tolist()
        report = dict(zip(self.task.columns, report))
        lr = learning_rate(self.step - 1, self.args)
        each = (self.seconds - self.logged) / (len(self.reports) / self.args.accum)
        waiting = self.waited / (self.seconds - self.logged)
        left = each * (self.args.steps - self.step) / 60
        log_rank0(f"step {self.step}/{self.args.steps}  loss {loss:.4f}  "
                  f"{as_text(report, '.4g')}  gnorm {norm:.2f}  lr {lr:.1e}  "
                  f"{1000 * each:.0f} ms  {100 * waiting:.0f} % waiting for data  "
                  f"{self.flops / each / 1e9:.0f} GFLOP/s  {peak_memory(self.device):.1f} GB  "
                  f"{left:.0f} min left")
        log_row(self.out / "log.csv", step=self.step, seconds=round(self.seconds, 1), loss=loss,
                **report, lr=lr, ms=1000 * each)
        self.reports = []
        self.waited = 0.
        self.logged = self.seconds

    def evaluate(self, clips):
        """Evaluate the averaged weights; keep them in best.pt if they are the best so far."""
        swap_ema(self.net, self.ema)
        # Without clips there is no score: the newest weights are the best.
        score = self.best
        if clips:
            self.net.eval()
            # Evaluation has other shapes than training: not worth compiling for.
            with torch.compiler.set_stance("force_eager"):
                evaluation = self.task.evaluate(clips)
            self.net.train()
            score = same_everywhere(evaluation.score)
            figures = as_text(evaluation.figures, ".3f")
            log_rank0(f"  evaluation at step {self.step}, {len(clips)} held-out clips: {figures}")
            log_row(self.out / "scores.csv", step=self.step, **evaluation.figures)
            if rank() == 0 and len(evaluation.videos):
                write_samples(self.out / f"{self.step:06d}", evaluation, clips)
        # The averages, in half precision; of an autoencoder with the statistics of its latents.
        if score >= self.best:
            # A plain number: checkpoints hold no numpy types.
            self.best = float(score)
            if hasattr(self.task, "measure_latent_stats"):
                self.task.measure_latent_stats()
            weights = get_model_state_dict(self.net, options=self.options)
            self.save("best.pt", ema={k: v.half() for k, v in weights.items()})
        swap_ema(self.net, self.ema)

    def save(self, name, **content):
        if rank() == 0:
            data.save_checkpoint(
                self.out / name, task=self.args.task, config=asdict(self.net.cfg), step=self.step,
                seconds=self.seconds, args=vars(self.args), **self.task.extra, **content)

    def save_last(self):
        """Everything that resuming needs."""
        # Weights, states of the optimisers; then the averages, which go through the network because
        # that knows how to gather them.
        model, states = get_state_dict(self.net, self.optimisers, options=self.options)
        swap_ema(self.net, self.ema)
        averages = get_model_state_dict(self.net, options=self.options)
        averages = {k: v.clone() for k, v in averages.items() if k in self.ema}
        swap_ema(self.net, self.ema)
        self.save("last.pt", model=model, ema=averages, optimisers=states, best=self.best,
                  micro_batch=self.micro_batch, logged=self.logged, waited=self.waited,
                  reports=[report.cpu() for report in self.reports])
        # A long time for a large file: not that of the next step's exchange, which is limited.
        barrier()

    def load_last(self):
        """last.pt of a run with these settings; None: there is none."""
        # best.pt is written over by the first evaluation: such a run could not be resumed.
        init = getattr(self.args, "init", None)
        if init and Path(init).resolve().parent == self.out.resolve():
            raise BadInput(f"--init {init}: this run would write over it; give another --out")
        path = self.out / "last.pt"
        ckpt = data.load_checkpoint(path, self.args.task) if path.is_file() else None
        self.refuse(ckpt and self.other_settings(ckpt))
        # It goes on in the dtype it had: measured again, the other one might win.
        before = ckpt and ckpt["args"].get("dtype")
        if self.args.dtype == "auto" and before in ("float32", "bfloat16"):
            self.args.dtype = before
        return ckpt

    def resume(self):
        """Continue from last.pt, if a run with these settings has left it."""
        path = self.out / "last.pt"
        ckpt, self.last = self.last, None
        self.refuse(ckpt and self.other_network(ckpt))
        for name in ("log.csv", "scores.csv"):
            trim_log(self.out / name, ckpt["step"] if ckpt else 0)
        if not ckpt:
            return
        # The averages go through the network, which knows how to share them out.
        try:
            set_model_state_dict(self.net, ckpt["ema"], options=self.options)
            swap_ema(self.net, self.ema)
            set_state_dict(self.net, self.optimisers, model_state_dict=ckpt["model"],
                           optim_state_dict=ckpt["optimisers"], options=self.options)
        except Exception as why:
            raise BadInput(f"{path}: damaged ({type(why).__name__}); remove it, or give another "
                           "--out, to start anew") from why
        # That call starts a state for every parameter. Those that had none, because all steps so
        # far have skipped the audio layers, have none again.
        for name, p in self.net.named_parameters():
            if name not in ckpt["optimisers"]["state"]:
                for optimiser in self.optimisers:
                    optimiser.state.pop(p, None)
        self.step = ckpt["step"]
        # Scores of other clips do not compare.
        same_clips = ckpt["args"].get("eval_clips") == self.args.eval_clips
        self.best = ckpt["best"] if same_clips else -math.inf
        self.seconds = self.logged = ckpt["seconds"]
        # Reports are of micro-batches; of others they would count as other steps.
        if ckpt["args"].get("accum") == self.args.accum:
            self.logged = ckpt["logged"]
            self.waited = ckpt.get("waited", 0.)
            self.reports = [report.to(self.device) for report in ckpt["reports"]]
        log_rank0(f"resuming    {path} at step {self.step} (remove it, or give another --out, to "
                  "start anew)")

    def refuse(self, difference):
        if difference:
            raise BadInput(f"{self.out / 'last.pt'}: {difference}, or give another --out to start "
                           "anew")

    def other_settings(self, ckpt):
        """What keeps this run from continuing a checkpoint, and what to do; None: nothing."""
        if not {"args", "model", "ema", "optimisers", "step", "best", "seconds", "logged",
                "reports", "micro_batch"} <= set(ckpt):
            return OTHER_VERSION
        # A VAE has no stages, whose --init changes: its --init says what is tuned.
        may_differ = MAY_DIFFER - ({"init"} if self.args.task == "vae" else set())
        # What the stage does not read may be another: older versions took it, without effect.
        reads = READ_BY_STAGES.get(self.args.task, {}).items()
        may_differ = may_differ | {name for name, stages in reads if self.args.stage not in stages}
        # Of real clips all are taken; older versions took --clips, which had no effect.
        may_differ = may_differ | ({"clips"} if self.args.data != "toybox" else set())
        for name, value in vars(self.args).items():
            before = ckpt["args"].get(name, value)
            if name not in may_differ and before != value:
                return f"was trained {in_words(name, before)}; do so again"
        # VAEs are compared by what they are, wherever they lie.
        pretrained = getattr(self.args, "pretrained", None)
        for name, task in (("vae", "vae"), ("audio_vae", "audio-vae or mel-vae")):
            if name not in ckpt:
                continue
            flag = "pretrained" if pretrained else name
            file = (Path(pretrained) / "causal_video_vae" if pretrained
                    else getattr(self.args, name))
            if fingerprint(load_vae(file, self.device, task)) != ckpt[name]:
                return (f"was trained on latents of another VAE ({ckpt['args'].get(flag)}); give "
                        f"that one by --{flag.replace('_', '-')}")
        # Where samples of a micro-batch depend on each other, its size has to stay.
        is_coupled = self.args.task == "audio-vae" or getattr(self.args, "ot", False)
        if is_coupled and ckpt["micro_batch"] != self.micro_batch:
            return (f"was trained with micro-batches of {ckpt['micro_batch']} clips, now they have "
                    f"{self.micro_batch}; take as many processes x --accum")
        return None

    def other_network(self, ckpt):
        """As `other_settings`, of what the task has prepared."""
        # The configuration of an autoencoder holds what was measured for best.pt.
        autoencoder = hasattr(self.task, "measure_latent_stats")
        same_config = autoencoder or ckpt["config"] == asdict(self.net.cfg)
        if set(ckpt["ema"]) != set(self.ema) or not same_config:
            return OTHER_VERSION
        # (Older files do not say; those of a2v had no --init.)
        now = self.task.extra.get("started_from")
        if ckpt.get("started_from", None if self.args.task == "a2v" else now) != now:
            return ("started from other weights (by another --init, or the stage before was "
                    "trained on); remove it")
        return None


def train(args):
    """Train a task, or a stage of it, from the last checkpoint in --out or from the start."""
    run = Run(args)
    run.resume()
    clips = run.task.held_out(args.eval_clips) if args.eval_clips else []
    # Until the end of this stage: while the next one prepares, a signal ends the program.
    handlers = {s: signal.signal(s, run.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    micro_batches = run.micro_batches()
    stopping = 0
    while run.step < args.steps and not stopping:
        start = time.perf_counter()
        run.accumulate_gradients(micro_batches)
        run.update()
        # If one process was asked to stop, all stop after this step.
        stopping = signal_of_any(run.stop)
        if stopping or any(map(run.due, (args.log_every, args.sample_every, args.save_every))):
            norm = run.check()
        run.seconds += time.perf_counter() - start
        if run.due(args.log_every):
            run.log(norm)
        # All processes evaluate and gather; the first one writes.
        if run.due(args.sample_every):
            run.evaluate(clips)
            # It takes long: a signal has come in it rather than in the step.
            stopping = signal_of_any(run.stop)
        if run.due(args.save_every) or stopping:
            run.save_last()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    # One may have come while the last checkpoint was written.
    stopping = stopping or signal_of_any(run.stop)
    if stopping:
        if rank() == 0:
            print(f"stopped at step {run.step} of {args.steps}; the same command continues from "
                  f"{run.out / 'last.pt'}", file=sys.stderr)
        # As `run_cli`.
        sys.exit(128 + stopping)
    log_rank0(f"done: {run.out / 'best.pt'}, {run.out / 'log.csv'}; {run.seconds:.0f} s of "
              "training")


def train_stages(args):
    """All stages of a task, each from the best checkpoint of the one before."""
    root = Path(args.out)
    init = args.init
    # A stage that has taken all its steps resumes at the last one and ends at once.
    for stage, (share, times, _) in STAGES[args.task].items():
        log_rank0(f"stage {stage}: {root / stage}")
        changes = dict(stage=stage, out=str(root / stage), init=init, lr=share * args.lr,
                       batch_size=times * args.batch_size)
        train(argparse.Namespace(**vars(args) | changes))
        init = str(root / stage / "best.pt")


def main():
    args = parse_args()
    if getattr(args, "stage", None) == "all":
        train_stages(args)
    else:
        train(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
