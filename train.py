"""Training: one loop for every network here, from a laptop's two cores to several GPUs.

    python train.py --task a2v                     # toybox, minutes on a CPU: renders, encodes, trains, evaluates
    python train.py --task vae                     # the VAE that turns its clips into latents (weights/ has a trained one)
    python train.py --task audio-vae               # the same for sounds
    python train.py --task mel-vae                 # the same for their spectra
    python train.py --task t2av                    # SyncFlow: video tower, audio tower on top of it, both together
    python train.py --task joint                   # Harmony: video tower, audio tower, both with their bridges
    torchrun --nproc_per_node=2 train.py --task a2v --device cpu

What a task is, is written once: `Task` draws batches, computes the loss and evaluates; the loop below knows nothing else.

**Exactness.** Every random number is a function of (seed, step, micro-batch): which clips, which noise, which captions are
dropped. So a checkpoint needs no generator states, the same command goes on where it was stopped (Ctrl-C, SIGTERM or a
power cut) and takes the very steps it would have taken, and 2 processes or --accum 2 see what one process would have.

**What is kept.** `last.pt`: everything, written whole or not at all. `best.pt`: the averaged (EMA) weights alone, in half
precision, from the best evaluation; this is what sample.py plays and what weights/ holds. `log.csv`: one line a report.

Between processes gradients are averaged by hand, ten lines: DistributedDataParallel would insist that every weight takes
part in every step, and when the audio layers are skipped some do not.

**On top of Pyramid Flow** (--pretrained) the same loop trains Syncphony's audio layers and the blocks they sit in; README.md,
"Reproduce Syncphony", has the commands.
"""
import argparse
import csv
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import model as networks
import towers
import vae as autoencoders
from cyclesync import HELD_OUT, event_scores, generate, onsets_in_sound, reconstruct, score_toybox
from data import BadInput, Parser, number, run_cli
from losses import BUCKETS, syncphony_loss, harmony_loss, image_loss, syncflow_loss
import pyramid
from pyramid import load_pyramid_flow, pyramid_loss
from sample import AUDIO_VAE_FILE, MEL_VAE_FILE, VAE_FILE, generate_audio_video, fingerprint, load_audio_vae, load_vae, pick_device
from toybox import detect_clip_events, toybox_clip, vae_training_pair

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "L4": 121e12}     # dense bf16, FLOP/s


# ------------------------------------------------------------------------------------------------ tasks

def rank0_first(world, make):
    """Of several processes the first one makes what all of them read."""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        dist.barrier()
    made = make()
    if rank == 0 and world > 1:
        dist.barrier()
    return made


def batch_indices(cache, args, step, rows):
    """Samples number `rows` of step `step` -> their windows in the cache, a generator each. Every clip comes once per epoch, in an
    order drawn from (seed, epoch); which of its windows, and all else about it, is drawn from (seed, number of the sample)."""
    clips, spots = cache["clips"], step * args.batch_size + np.asarray(rows)  # positions in the endless stream of samples
    n, draws = len(clips), [np.random.default_rng([args.seed, 1, int(s)]) for s in spots]
    orders = {e: np.random.default_rng([args.seed, int(e)]).permutation(n) for e in np.unique(spots // n)}
    return np.array([r.choice(clips[orders[s // n][s % n]]) for s, r in zip(spots, draws)]), draws


def drop_text(captions, draws, share):
    return ["" if r.random() < share else c for c, r in zip(captions, draws)]  # '' is the null text


class Prefetcher:
    """Draws samples in a thread, a few steps ahead of where they are needed."""

    def __init__(self, draw, last, ahead=4):
        self.draw, self.last, self.ahead, self.pool, self.queue = draw, last, ahead, ThreadPoolExecutor(1), {}

    def __call__(self, step, rows):
        for s in range(step, min(step + self.ahead, max(self.last, step + 1))):
            if (s, *rows) not in self.queue:
                self.queue[s, *rows] = self.pool.submit(lambda s: np.stack([self.draw(s, r) for r in rows]), s)
        return torch.from_numpy(self.queue.pop((step, *rows)).result())


class A2V:
    """Syncphony: cached latents, sounds and captions -> velocity loss, in the parallel layout or in Pyramid Flow's."""

    def __init__(self, args, device, autocast, world):
        self.args, self.device, self.toybox, rank = args, device, args.data == "toybox", int(os.environ.get("RANK", 0))
        self.vae = load_vae(Path(args.pretrained) / "causal_video_vae" if args.pretrained else args.vae, device)
        ears = cache(lambda: pyramid.load_hubert(args.hubert, device))                # made when first needed: a finished cache needs none
        hear = (lambda wave: ears()(wave)) if args.hubert else None
        cached = lambda split: data.load_or_prepare(args.data, args.data_root, split, args.resolution, self.vae, fingerprint(self.vae), device, autocast,
                                                    args.clips, hear, log=print if rank == 0 else lambda _: None)

        def make():
            caches, prompts = [cached(split) for split in (("train",) if self.toybox else ("train", "test"))], {}
            for prepared in caches if args.pretrained else []:
                prompts.update(pyramid.cached_text_states(prepared["folder"], prepared["captions"], args.pretrained, device))
            return caches, prompts
        (self.cache, *self.test), self.prompts = rank0_first(world, make)
        self.test = self.test[0] if self.test else None
        self.net = self.from_pyramid_flow(args, autocast) if args.pretrained else self.from_scratch(args)
        self.config = self.net.cfg

    def from_scratch(self, args):
        """A network of our own, from scratch, on the toybox VAE's latents."""
        pyramid = dict(context_clock="shared", precondition=False, patch=1) if args.layout == "pyramid" else {}
        config = networks.MMDiTConfig(**networks.SIZES[args.size] | dict(audio_rope=not args.no_audio_rope) | pyramid)
        if config.latent != self.vae.cfg.latent:
            raise BadInput(f"--vae {args.vae}: makes latents of {self.vae.cfg.latent} channels, --size {args.size} takes {config.latent}")
        return networks.MMDiT(config)

    def from_pyramid_flow(self, args, autocast):
        """Syncphony: Pyramid Flow's network and new audio layers. Blocks 0-7 and everything outside the blocks stay as they are
        published (and, where bfloat16 is native, lie in memory as that); blocks 8-23 and the audio layers are trained."""
        width = self.cache["arrays"]["features"][0].shape[-1]
        net = load_pyramid_flow(Path(args.pretrained) / "diffusion_transformer_384p", audio_dim=width, audio_rope=not args.no_audio_rope)
        native = not isinstance(autocast(), nullcontext)
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith("single_transformer_blocks"))
            if native and not p.requires_grad and p.dim() > 1:
                p.data = p.data.bfloat16()
            elif p.requires_grad:
                p.data = p.data.float()                                       # master weights, and no longer the mapped file
        self.vae.to("cpu")
        return net

    def batch(self, step, rows):
        index, draws = batch_indices(self.cache, self.args, step, rows)          # which sample of the VAE's posterior is drawn likewise
        deaf = np.random.default_rng([self.args.seed, 2, step]).random() < self.args.skip_audio      # in all processes alike
        return *self.windows(self.cache, index, draws), rows, deaf

    def windows(self, cache, index, draws=None):
        """Windows of a cache -> normalised latents (B, C, L, h, w), text, mels. The tiny VAE's price for information leaves most
        of a posterior as wide as the prior, noise and nothing else, so its means are taken; of another VAE, samples."""
        z, logvar = data.gather(cache, "latents", index).float().unbind(1)
        if draws and not self.vae.cfg.reference:
            z = z + (logvar / 2).exp() * torch.from_numpy(np.stack([r.standard_normal(z.shape[1:], np.float32) for r in draws]))
        captions = [cache["captions"][i] for i in index]
        if draws:
            captions = drop_text(captions, draws, self.args.drop_text)
        if self.args.pretrained:
            words = tuple(torch.stack(column).to(self.device) for column in zip(*(self.prompts[c] for c in captions)))
        else:
            words = networks.text_bytes(captions).to(self.device)
        sound = data.gather(cache, "features" if self.args.pretrained else "mels", index).float().to(self.device)
        return self.vae.normalise(z.to(self.device)), words, sound

    def loss(self, net, batch, g):
        a, (z, words, sound, numbers, deaf) = self.args, batch
        if a.layout == "pyramid":
            return pyramid_loss(net, z, words, sound, numbers, g, deaf, a.lambda_motion)
        return syncphony_loss(net, z, words, sound, g, deaf, a.lambda_motion, a.sigma, a.shift)

    def format_metrics(self, report):
        if self.args.layout == "pyramid":
            return "  ".join(f"stage {s} {v:.3f}" for s, v in enumerate(report))
        return "  ".join(f"s<{(b + 1) / BUCKETS:.2f} {v:.3f}" for b, v in enumerate(report))

    def held_out(self, n):
        """Clips to be looked at: the toybox's own, or windows of the test split, evenly chosen."""
        if self.toybox:
            return toybox_held_out(self.args, n)
        clips = held_out_windows(self.test, n)
        self.chosen = np.array([c["number"] for c in clips])
        return clips

    def evaluate(self, net, clips, autocast, last):
        """-> lines to print, a score to compare checkpoints by, videos. The toybox is read (w_a = 0 and, at the end, the guidance
        that the checkpoint will recommend); elsewhere it is the loss on the windows of the test split, noise always the same."""
        if self.toybox:
            make = lambda steps, asg: generate(net, self.vae, clips, autocast, steps=steps, asg=asg, cfg=0.)
            videos = make(12, 0.)
            lines, score = toybox_line("w_a = 0", videos, clips)
            if last and self.args.asg:
                lines += toybox_line(f"w_a = {self.args.asg:g}", make(30, self.args.asg), clips)[0]
            return lines, score, videos
        with torch.no_grad(), autocast():
            some = [self.chosen[a:a + 16] for a in range(0, len(self.chosen), 16)]
            losses = [self.loss(net, (*self.windows(self.test, i), range(len(i)), False), seeded(k))[0].item() for k, i in enumerate(some)]
        loss = float(np.mean(losses))
        shown = [] if self.args.pretrained else generate(net, self.vae, clips[:8], autocast, steps=12, asg=0., cfg=0.)             # hours, at that size
        return [f"loss on {len(self.chosen)} test windows {loss:.4f}"], -loss, shown

    def extra(self):
        return dict(size=self.args.resolution, vae=fingerprint(self.vae), guidance=dict(asg=self.args.asg, cfg=self.args.cfg))


class VAE:
    """Frames of rendered clips -> reconstruction. Its data are drawn while it trains: no clip is ever seen twice."""

    def __init__(self, args, device, autocast, world):
        if args.size != "tiny":
            raise BadInput(f"--size {args.size}: the VAE is trained from scratch as tiny only; the published one is loaded, never trained")
        if args.data != "toybox":
            raise BadInput(f"--data {args.data}: the VAE is trained on the toybox only; leave --data out")
        self.args, self.device = args, device
        self.config = autoencoders.VAEConfig(**autoencoders.VIDEO_VAE_SIZES[args.size])
        self.net = autoencoders.CausalVideoVAE(self.config)
        if args.tune_decoder:                                                 # latents stay what they are, so what was trained on
            self.net = load_vae(args.tune_decoder).train()                    # them stays valid, and looks can still improve
            for name, p in self.net.named_parameters():
                p.requires_grad_(not name.startswith(("encoder", "quant_conv")))
        self.prefetch = Prefetcher(lambda s, r: vae_training_pair([args.seed, s * args.batch_size + r], args.resolution), args.steps)

    def batch(self, step, rows):
        videos = self.prefetch(step, rows)                                       # (B, 2, F, H, W, 3)
        return (videos.to(self.device).permute(1, 0, 5, 2, 3, 4).float() / 127.5 - 1).unbind(0)

    def loss(self, net, batch, g):
        B, _, F, H, _ = batch[0].shape
        grid = H // net.stride
        noise = torch.randn(B, net.cfg.latent, (F - 1) // net.stride_t + 1, grid, grid, generator=g).to(self.device)
        loss, error, rate = autoencoders.video_vae_loss(net, *batch, noise, self.args.kl)
        return loss, torch.stack([error, rate])

    def format_metrics(self, report):
        return f"|error| {report[0]:.4f}  {report[1]:.0f} nats per latent"

    def held_out(self, n):
        return toybox_held_out(self.args, n)

    def evaluate(self, net, clips, autocast, last):
        videos = reconstruct(net, clips, autocast)
        return *toybox_line("reconstruction", videos, clips), videos

    def measure_latent_stats(self, net):
        """The normalisation, measured: shift and scale that give latent 0 and the later latents unit variance."""
        clips = [toybox_clip(HELD_OUT // 2 + i, self.args.resolution)["video"] for i in range(64)]
        with torch.no_grad():
            z = torch.cat([net.encode(torch.from_numpy(c)[None].to(self.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1)[0] for c in clips])
        for name, part in (("image", z[:, :, :1]), ("video", z[:, :, 1:])):
            setattr(net.cfg, f"shift_{name}", part.mean().item()), setattr(net.cfg, f"scale_{name}", 1 / part.std().item())
        tqdm.write(f"  latents: scale {net.cfg.scale_image:.3f} (first), {net.cfg.scale_video:.3f} (later), kurtosis {kurtosis(z[:, :, 1:]):.1f} (3 = Gaussian)")

    def extra(self):
        return {}


def kurtosis(z):
    return ((z - z.mean()) / z.std()).pow(4).mean().item()


def held_out_windows(cache, n):
    """n windows of a test split, evenly chosen, as clips."""
    get = lambda name, i: data.gather(cache, name, [i])[0]
    return [dict(number=i, video=get("videos", i).numpy(), audio=get("sounds", i).float().numpy(), caption=cache["captions"][i],
                 z=(get("latents", i)[None, 0].float(), get("features", i).float().T[None]) if "features" in cache["arrays"] else None)
            for i in np.unique(np.linspace(0, len(cache["at"]) - 1, max(n, 1)).astype(int))]


def toybox_held_out(args, n):
    return [toybox_clip(HELD_OUT + 10 ** 6 + i, args.resolution) for i in range(n)]


def toybox_line(words, videos, clips):
    """What the reader says of generated clips -> [a line], a score: timing (at 100 ms, which so few clips tell best) and looks."""
    s = score_toybox(videos, clips)[0]
    return [f"{words}: F1 at 50 ms {s['f1_50']:.3f} (precision {s['precision_50']:.2f}, recall {s['recall_50']:.2f}), at 100 ms {s['f1_100']:.3f}, "
            f"residual {s['residual']:.3f}, false events per quiet clip {s['false_per_quiet_clip']:.2f}"], (
                s["f1_100"] - (s["residual"] if np.isfinite(s["residual"]) else 1))


class AudioVAE:
    """Stretches of one second of sound -> reconstruction, of the waveform (audio-vae) or of its spectrum (mel-vae). From the toybox every
    sound is a new one; real ones are read as they are."""

    def __init__(self, args, device, autocast, world):
        self.mel, self.args, self.device, self.net = args.task == "mel-vae", args, device, torch.nn.Module()
        sizes = autoencoders.AUDIO_VAE_SIZES["mel" if self.mel else "waveform"]
        if args.size not in sizes:
            raise BadInput(f"--size {args.size}: the audio VAE is {' or '.join(sizes)}")
        self.config = autoencoders.AudioVAEConfig(**sizes[args.size])
        if args.data == "toybox" and self.config.rate != data.RATE:
            raise BadInput(f"--size {args.size}: codes sounds of {self.config.rate} Hz, the toybox has {data.RATE}; give recordings by --data")
        self.net = autoencoders.AudioVAE(self.config)
        found = [] if args.data == "toybox" else data.find_clips(args.data, args.data_root)[0]
        self.files, self.tests = ([c for c in found if c["split"] == split] for split in ("train", "test"))
        self.prefetch = Prefetcher(lambda s, r: self.sound(s * args.batch_size + r, self.files), args.steps)

    def sound(self, s, files):
        """Sample number s: a second of it, of a toybox clip or of one of the files."""
        rng, n = np.random.default_rng([self.args.seed, 4, s]), self.config.rate
        if not files:
            wave = toybox_clip(int(rng.integers(HELD_OUT)), video=False)["audio"]
        else:
            clip = files[rng.integers(len(files))]
            wave = data.read_audio(clip["sound"] or clip["path"], n)
        a = rng.integers(max(1, len(wave) - n + 1))
        return np.pad(wave[a:a + n], (0, max(0, n - len(wave))))

    def batch(self, step, rows):
        return self.prefetch(step, rows).to(self.device)                         # (B, n)

    def loss(self, net, wave, g):
        noise = torch.randn(len(wave), net.cfg.latent, -(-wave.shape[1] // net.hop), generator=g).to(self.device)
        return autoencoders.audio_vae_loss(net, wave, noise, self.args.kl)

    def format_metrics(self, report):
        return f"|error| {report[0]:.4f}" + (f"  spectral {report[1]:.3f}" if not self.mel else "") + f"  {report[-1]:.0f} nats per latent"

    def held_out(self, n):
        if self.files:
            return [dict(audio=self.sound(10 ** 12 + i, self.tests)) for i in range(n)]
        return [toybox_clip(HELD_OUT + 10 ** 6 + i, video=False) for i in range(n)]

    def evaluate(self, net, clips, autocast, last):
        with torch.no_grad(), autocast():
            made = [net.decode(net.encode(x)[0], x.shape[1])[0].float().cpu() for x in (torch.from_numpy(c["audio"])[None].to(self.device) for c in clips)]
            far = np.mean([autoencoders.spectral_error(m[None], torch.from_numpy(c["audio"])[None]).item() for m, c in zip(made, clips)])
        lines = [f"reconstruction: spectral error {far:.3f}"]
        if not self.files:
            s = event_scores([c["events"] for c in clips], [onsets_in_sound(m.numpy()) for m in made])
            lines[0] += f", onsets against true events: F1 at 50 ms {s['f1_50']:.3f}"
        return lines, -far, []

    def measure_latent_stats(self, net):
        """The normalisation, measured: shift and scale of every channel."""
        with torch.no_grad():
            z = torch.cat([net.encode(torch.from_numpy(self.sound(10 ** 11 + i, self.files))[None].to(self.device))[0] for i in range(64)])
        net.cfg.shift, net.cfg.scale = tuple(z.mean((0, 2)).tolist()), tuple((1 / z.std((0, 2))).tolist())
        tqdm.write(f"  latents: scales {min(net.cfg.scale):.3f} to {max(net.cfg.scale):.3f}, kurtosis {kurtosis(z):.1f} (3 = Gaussian)")

    def extra(self):
        return {}


class T2AV:
    """Two towers: cached latents of picture and sound, and captions -> velocity loss of one stream or both, in stages. SyncFlow (t2av):
    the video tower, the audio tower on top of it, both. Harmony (joint): the video tower (the paper takes Wan's, trained),
    the audio tower, first with references out of the same clip, then with others of the same voice, both with their bridges."""

    def __init__(self, args, device, autocast, world):
        self.harmony = args.task == "joint"
        sizes = towers.HARMONY if self.harmony else towers.TOWERS
        if args.size not in sizes:
            raise BadInput(f"--size {args.size}: two towers are {', '.join(sizes)}")
        self.args, self.device, rank = args, device, int(os.environ.get("RANK", 0))
        self.vae, self.audio_vae = load_vae(args.vae, device), load_audio_vae(args.audio_vae, device)
        switches = dict(align=not args.no_rope_align, local=not args.no_gldi) if self.harmony else dict(adaptor=not args.no_adaptor, blind=args.no_video)
        config = towers.DualTowerConfig(**sizes[args.size] | switches)
        for name, vae, channels in (("vae", self.vae, config.latent), ("audio-vae", self.audio_vae, config.audio_latent)):
            if vae.cfg.latent != channels:
                raise BadInput(f"--{name}: makes latents of {vae.cfg.latent} channels, --size {args.size} takes {channels}")
        cached = lambda split: data.load_or_prepare(args.data, args.data_root, split, args.resolution, self.vae, fingerprint(self.vae), device, autocast, args.clips,
                                                    self.encode_waveform, fingerprint(self.audio_vae), 2 if self.harmony else 1, log=print if rank == 0 else lambda _: None)
        self.cache, *self.test = rank0_first(world, lambda: [cached(split) for split in (("train",) if args.data == "toybox" else ("train", "test"))])
        self.config, self.net = config, towers.DualTower(config)
        if args.init:
            before = data.load_checkpoint(args.init, args.task)               # of stage 1 it knows no audio, whatever its audio tower looked like
            known = {k: v for k, v in before["ema"].items() if before["stage"] != "video" or not k.startswith("audio.")}
            data.load_weights(self.net, {**self.net.state_dict(), **known}, args.init)
        for name, p in self.net.named_parameters():                           # stage 1 knows no audio; then the video stays as it is; bridges come last
            sounds, bridge = name.startswith(("audio.", "speech.")), name.startswith(("a2v_", "v2a_", "style_"))
            p.requires_grad_(args.stage == "joint" or sounds == (args.stage != "video") and not bridge)
        self.windows_of_clip = {w: windows for windows in self.cache["clips"] for w in windows}         # of every window, the windows of its clip

    def encode_waveform(self, wave):
        """Waveform (samples,) -> the mean of its latents, (S, A)."""
        return self.audio_vae.encode(torch.from_numpy(wave)[None].to(self.device))[0][0].T.float().cpu().numpy()

    def batch(self, step, rows):
        a, cache = self.args, self.cache
        index, draws = batch_indices(cache, a, step, rows)
        captions = drop_text([cache["captions"][i] for i in index], draws, a.drop_text)
        latents, words = self.latents(cache, index), networks.text_bytes(captions).to(self.device)
        if a.stage == "video" or a.stage == "joint" and not self.harmony:
            return latents, words, *(self.pictures(draws) if a.pictures else ())
        if not self.harmony:
            return latents, words
        speech = networks.text_bytes(drop_text([cache["speech"][i] for i in index], draws, a.drop_text)).to(self.device)
        return latents, words, speech, *self.references(index, draws, np.random.default_rng([a.seed, 3, step]))

    def pictures(self, draws):
        """The first latents of `--pictures` other clips beside every clip, and their words."""
        rows = [(r, r.integers(len(self.cache["at"]), size=self.args.pictures)) for r in draws]
        z = data.gather(self.cache, "latents", np.concatenate([i for _, i in rows]))[:, 0, :, :1].float().to(self.device)
        captions = [c for r, some in rows for c in drop_text([self.cache["captions"][i] for i in some], [r] * len(some), self.args.drop_text)]
        return self.vae.normalise(z), networks.text_bytes(captions).to(self.device)

    def latents(self, cache, index):
        z_v, z_a = data.gather(cache, "latents", index)[:, 0].float(), data.gather(cache, "features", index).float().transpose(1, 2)
        return self.vae.normalise(z_v.to(self.device)), self.audio_vae.normalise(z_a.to(self.device))

    def references(self, index, draws, whole):
        """Clean references (B, A, R), 1 to 3 s of latents, and which clips have one (B, R). In stage 'audio' a piece of the clip itself;
        later of another window of the same recording or thing, which does not overlap. `whole` draws what all processes share."""
        cache, hertz, apart = self.cache, self.audio_vae.cfg.rate / self.audio_vae.hop, data.FRAMES / data.FPS - 1e-6
        R, places, has = min(round(whole.uniform(1, 3) * hertz), cache["arrays"]["features"][0].shape[1]), [], []
        for i, r in zip(index, draws):
            others = [i] if self.args.stage == "audio" else [w for w in self.windows_of_clip[i] if abs(cache["starts"][w] - cache["starts"][i]) >= apart]
            has.append(len(others) > 0 and r.random() >= self.args.drop_text)
            places.append(r.choice(others) if others else i)
        sounds = data.gather(cache, "features", np.array(places)).float().transpose(1, 2)                          # (B, A, S)
        starts = [r.integers(sounds.shape[2] - R + 1) for r in draws]
        ref = torch.stack([z[:, s:s + R] for z, s in zip(sounds, starts)]).to(self.device)
        return self.audio_vae.normalise(ref), torch.tensor(has, device=self.device)[:, None].expand(-1, R)

    def loss(self, net, batch, g):
        a, (latents, words, *more) = self.args, batch
        if self.harmony and a.stage != "video":
            speech, ref, there = more
            return harmony_loss(net, *latents, (*net.encode_text(words), *net.encode_audio_text(words, speech)), g, ref, there, a.stage, a.lambda_v, a.lambda_a, a.shift, a.sigma, lambda_joint=a.lambda_joint)
        loss, report = (harmony_loss(net, *latents, (*net.encode_text(words), None, None), g, stage="video", shift=a.shift, sigma_dist=a.sigma) if self.harmony else
                        syncflow_loss(net, *latents, words, g, a.stage, a.ot, a.sigma, a.shift))
        return loss + image_loss(net, *more, g, a.sigma, a.shift) if more else loss, report

    def format_metrics(self, report):
        names = ("video", "audio", "driven video", "driven audio") if self.harmony else ("video", "audio")
        return "  ".join(f"{name} {r:.3f}" for name, r in zip(names, report))

    def held_out(self, n):
        if self.test:
            return held_out_windows(self.test[0], n)
        with torch.no_grad():
            video = lambda c: self.vae.encode(torch.from_numpy(c["video"]).to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1)[0]
            return [dict(c, z=(video(c), torch.from_numpy(self.encode_waveform(c["audio"])).T[None])) for c in toybox_held_out(self.args, n)]

    def evaluate(self, net, clips, autocast, last):
        """The loss on held-out clips, noise always the same; with both towers also what each stream becomes when the other is given."""
        args, captions, speech = self.args, [c["caption"] for c in clips], [c.get("speech", "") for c in clips]
        with torch.no_grad(), autocast():
            z_v, z_a = (torch.cat(parts) for parts in zip(*(c["z"] for c in clips)))
            z_v, z_a = self.vae.normalise(z_v), self.audio_vae.normalise(z_a)
            words, said = (networks.text_bytes(t).to(self.device) for t in (captions, speech))
            told = (*net.encode_text(words), *net.encode_audio_text(words, said)) if self.harmony else None
            once = lambda g: (harmony_loss(net, z_v, z_a, told, g, stage=args.stage, shift=args.shift) if self.harmony else
                              syncflow_loss(net, z_v, z_a, words, g, "joint" if args.stage != "video" else "video"))[1]
            reports = torch.stack([once(seeded(k)) for k in range(4)]).mean(0)
        lines, score = [f"loss {self.format_metrics(reports)}"], -(reports[:2].sum() if args.stage == "joint" else reports[int(args.stage != "video")]).item()
        settings = dict(steps=25, cfg=args.cfg, **dict(sync_video=1, sync_audio=1, shift=args.shift) if self.harmony else {})  # the model, not its guidance
        spoken = lambda n: dict(speech=speech[:n]) if self.harmony else {}
        make = lambda n, **given: generate_audio_video(net, self.vae, self.audio_vae, captions[:n], len(clips[0]["video"]), args.resolution, autocast, **spoken(n), **given, **settings)
        if args.stage == "video":
            return lines, score, generate_audio_video(net, self.vae, None, captions[:8], len(clips[0]["video"]), args.resolution, autocast, steps=25, cfg=args.cfg)[0]
        if self.harmony and args.stage != "joint":                            # towers that have not met
            return lines, score, []
        sounds = make(len(clips), z_v=None if args.no_video else z_v)[1]
        if not self.test:
            s = event_scores([c["events"] for c in clips], [onsets_in_sound(w) for w in sounds])
            lines += [f"sounds for true videos, onsets against true events: F1 at 50 ms {s['f1_50']:.3f} (precision {s['precision_50']:.2f}, recall {s['recall_50']:.2f})"]
            if self.harmony:
                begin = np.stack([c["video"][0] for c in clips])
                driven, (videos, heard) = make(len(clips), z_a=z_a, pictures=begin)[0], make(len(clips), pictures=begin)
                both = event_scores([detect_clip_events(v, c)[0] for v, c in zip(videos, clips)], [onsets_in_sound(w) for w in heard])["f1_50"]
                lines += [*toybox_line("videos for true sounds", driven, clips)[0], f"pairs that begin with a picture, events against onsets: F1 at 50 ms {both:.3f}"]
                self.figures = dict(video_driven=s["f1_50"], audio_driven=score_toybox(driven, clips)[0]["f1_50"], pairs=both)
        shown = make(8) if args.stage == "joint" else ([c["video"] for c in clips[:8]], sounds)
        return lines, score, *shown

    def extra(self):
        args = self.args
        guidance = dict(cfg=args.cfg, sync_video=args.sync_video, sync_audio=args.sync_audio, shift=args.shift) if self.harmony else dict(cfg=args.cfg)
        return dict(size=args.resolution, vae=fingerprint(self.vae), audio_vae=fingerprint(self.audio_vae), guidance=guidance, stage=args.stage)


TASKS = {"a2v": A2V, "vae": VAE, "audio-vae": AudioVAE, "mel-vae": AudioVAE, "t2av": T2AV, "joint": T2AV}


# ------------------------------------------------------------------------------------------------ the parts of the loop

def make_optimisers(net, args):
    """Muon for the matrices and kernels inside the blocks (its steps are orthogonalised, so no direction of a matrix is left
    behind), AdamW for everything else. Muon's step is scaled to the size of AdamW's: one --lr serves both. It wants
    matrices: a kernel (C_out, C_in, ...) is one with C_out rows, in the same memory. It keeps one number per weight where AdamW
    keeps two, which is a third of what stands between 2 billion parameters and a 24 GB card."""
    inside = {p: torch.nn.Parameter(p.data.flatten(1)) for name, p in net.named_parameters()
              if p.dim() > 1 and "block" in name and "norm" not in name and p.requires_grad and args.optimizer == "muon"}
    rest = [p for p in net.parameters() if p not in inside and p.requires_grad]
    groups = [dict(params=[p for p in rest if p.dim() > 1], weight_decay=args.weight_decay), dict(params=[p for p in rest if p.dim() < 2])]
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(.9, .98), weight_decay=0., fused=next(net.parameters()).device.type != "mps")
    if not inside:
        return [adamw]
    muon = torch.optim.Muon(inside.values(), lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")

    def flatten_gradients(*_):
        for p, matrix in inside.items():
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
    muon.register_step_pre_hook(flatten_gradients)
    return [adamw, muon]


def learning_rate(step, args):
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (.02 + .98 * .5 * (1 + math.cos(math.pi * min(1, done))))


def update_ema(ema, net, step, decay, every=1):
    """ema <- d ema + (1 - d) weights, with a d that starts small: an average over about the last tenth of the run so far.
    Large networks keep it in the CPU's memory and update it once in a while, by as much as in so many steps."""
    if step % every == 0:
        d, theirs = min(decay, (1 + step) / (10 + step)) ** every, dict(net.named_parameters())
        torch._foreach_lerp_(list(ema.values()), [local_shard(theirs[k].detach()).to(v.device) for k, v in ema.items()], 1 - d)


def shard(net):
    """FSDP2: of every weight, gradient and optimiser state a process keeps its share, and borrows the weights of a block from the
    others while that block runs."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    for block in net.single_transformer_blocks:
        register_fsdp_forward_method(fully_shard(block.audio), "project_kv")                     # called from outside its block
    for block in net.all_blocks():
        fully_shard(block)
    fully_shard(net)


def local_shard(p):
    """What this process holds of a tensor: its share of a sharded one, else all of it."""
    return p.to_local() if isinstance(p, DTensor) else p


def swap_ema(net, ema):
    """The network's weights and their averages change places; once more, and they are back."""
    for k, p in net.named_parameters():
        if k in ema:
            mine = local_shard(p.detach())
            kept = mine.to(ema[k].device, copy=True)
            mine.copy_(ema[k]), ema[k].copy_(kept)


def full_state(net, keys):
    """name -> the whole of those weights, in the CPU's memory. Of a sharded network every process has to take part."""
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).to("cpu", copy=True) for k, v in net.state_dict().items() if k in keys}


def full_optimizer_state(net, optimisers, sharded):
    """The optimisers' states, whole."""
    if not sharded:
        return [o.state_dict() for o in optimisers]
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    return [get_optimizer_state_dict(net, o, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) for o in optimisers]


def sum_gradients(params, most=2 ** 25):
    """Over all processes, in buckets of about `most` numbers. What is skipped in a step is skipped in all of them."""
    buckets, filled = [[]], 0
    for p in params:
        if filled + p.numel() > most and buckets[-1]:
            buckets, filled = [*buckets, []], 0
        buckets[-1].append(p)
        filled += p.numel()
    for bucket in buckets:
        flat = torch.cat([p.grad.flatten() for p in bucket])
        dist.all_reduce(flat)
        for p, piece in zip(bucket, flat.split([p.numel() for p in bucket])):
            p.grad = piece.view_as(p)


def memory_plan(net, args, micro, tokens):
    """What a training step keeps, in bytes, by part. Activations: with --checkpointing the input of every block, and inside one
    block at a time what its backward pass wants, about 40 numbers per token and channel; without, the latter for all."""
    parts, D = list(net.parameters()), net.cfg.heads * net.cfg.head_dim
    moving = [p for p in parts if p.requires_grad]
    adam = sum(p.numel() for p in moving if args.optimizer == "adamw" or p.dim() < 2)
    blocks, row = net.cfg.n_double + net.cfg.n_single, micro * tokens * D * 2
    return dict(weights=sum(p.numel() * p.element_size() for p in parts), gradients=sum(4 * p.numel() for p in moving),
                optimiser=4 * (sum(p.numel() for p in moving) + adam), average=0 if args.pretrained else sum(4 * p.numel() for p in moving),
                activations=row * (blocks + 40 if args.checkpointing else blocks * 40))


def peak_memory(device):
    """The most that this process has held so far: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource                                                           # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report_start(task, args, micro, words, flops):
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in task.net.named_children()}
    total = sum(p.numel() for p in task.net.parameters())
    print(f"device      {words}\nparameters  {total / 1e6:.2f} M: " + ", ".join(f"{k} {v / 1e6:.2f}" for k, v in parts.items() if v > 4000))
    if args.task == "a2v":
        audio = sum(p.numel() for b in task.net.single_transformer_blocks if b.audio for p in b.audio.parameters())
        C, L, h, w = task.cache["arrays"]["latents"][0].shape[2:]
        n, T = h * w // task.config.patch ** 2, 128 if args.pretrained else 12
        clean = L * n if args.layout == "parallel" else n + (L > 2) * n // 4 + max(0, L - 3) * n // 16      # the longest history
        noisy = (L - 1) * n if args.layout == "parallel" else n
        trained = sum(p.numel() for p in task.net.parameters() if p.requires_grad)
        print(f"            of which audio cross-attention {audio / 1e6:.2f}; trained {trained / 1e6:.2f}")
        print(f"tokens      {clean} clean + {noisy} noisy + {T} text {'a clip' if args.layout == 'parallel' else 'at the last stage'} ({L} latents of {C}x{h}x{w}), "
              f"{task.cache['arrays']['mels'][0].shape[1] // 2} audio steps")
        plan = memory_plan(task.net, args, micro, clean + noisy + T)
        if args.fsdp:
            plan = {k: v if k == "activations" else v / dist.get_world_size() for k, v in plan.items()}
        print("memory      " + " + ".join(f"{k} {v / 2 ** 30:.2f}" for k, v in plan.items() if v) + f" = {sum(plan.values()) / 2 ** 30:.1f} GiB a process, estimated")
    if args.task in STAGES:
        C, L, h, w = task.cache["arrays"]["latents"][0].shape[2:]
        S, A = task.cache["arrays"]["features"][0].shape[1:]
        print(f"            stage {args.stage}: {sum(p.numel() for p in task.net.parameters() if p.requires_grad) / 1e6:.2f} M trained\n"
              f"tokens      {L * (h // task.config.patch) * (w // task.config.patch)} video ({L} latents of {C}x{h}x{w}) + {S} audio ({A} numbers each) a clip")
    print(f"compute     {flops / 1e9:.0f} GFLOP per step of {args.batch_size} clips; {args.steps} steps = {args.steps * args.batch_size} clips")


def count_flops(task, args, autocast, g):
    """FLOPs (2 per multiply-add) of one training step, counted on a few clips. Attention counts only as plain matmuls."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    rows = [0, 1, 2, 3] if args.layout == "pyramid" else [0, 1]               # four: every stage
    with autocast() if args.pretrained else nullcontext(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:      # bf16 beside fp32
        task.loss(task.net, task.batch(0, rows), g)[0].backward()
    task.net.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(rows) * args.batch_size


def peak_flops(device):
    """What this device could do: the data sheet's bf16 number for a known GPU, a measured matmul on a CPU, else unknown."""
    if device.type == "cuda":
        return next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name()), float("nan")), "of the data sheet's peak"
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    a, spans = torch.randn(2048, 2048).to(dtype), []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        spans.append(time.perf_counter() - start)
    return 2 * 2048 ** 3 / min(spans), "of a measured matmul"


def seeded(*numbers):
    """A generator that depends on all of the numbers and nothing else."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


# ------------------------------------------------------------------------------------------------ the loop

def train(args):
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device, autocast, words = pick_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))        # preparing data may take long
    micro = args.batch_size // (world * args.accum)
    if micro * world * args.accum != args.batch_size:
        raise BadInput(f"--batch-size {args.batch_size} must be a multiple of processes x --accum = {world * args.accum}")
    out, start_time = Path(args.out or f"out/{args.task}"), time.perf_counter()
    torch.manual_seed(args.seed)
    task = TASKS[args.task](args, device, autocast, world)
    net = task.net.to(device)
    if args.fsdp:
        shard(net)
    ema = {k: local_shard(p.detach()).to("cpu" if args.pretrained else device, copy=True) for k, p in net.named_parameters() if p.requires_grad}
    optimisers = make_optimisers(net, args)
    step, best, seconds = 0, -1e9, 0.
    if (out / "last.pt").is_file():
        step, best, seconds = resume(out / "last.pt", args, net, ema, optimisers)
        if rank == 0:
            print(f"resuming    {out / 'last.pt'} at step {step} (remove it, or give another --out, to start anew)")
    flops = count_flops(task, args, autocast, seeded(args.seed, 0)) if rank == 0 or args.fsdp else 0
    if rank == 0:
        report_start(task, args, micro, words, flops)
    peak, peak_words = peak_flops(device) if rank == 0 else (1, "")
    if args.checkpointing:
        for block in net.all_blocks():
            block.forward = (lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False))(block.forward)
    compute = torch.compile(task.loss) if args.compile and "vae" in args.task else task.loss
    if args.compile and "vae" not in args.task:
        for block in net.all_blocks():
            block.compile()
    if args.bench:
        return bench(task, net, optimisers, compute, autocast, args)
    taking_part = rank == 0 or args.fsdp                                      # what is sharded, all must look at and save together
    clips = task.held_out(args.eval_clips) if taking_part and args.eval_clips else []

    stop = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.append(1))

    def save():
        model, states = full_state(net, ema if args.pretrained else net.state_dict()), full_optimizer_state(net, optimisers, args.fsdp)
        swap_ema(net, ema)
        averages = full_state(net, ema)
        swap_ema(net, ema)
        if rank == 0:
            data.save_checkpoint(out / "last.pt", task=args.task, config=asdict(net.cfg), model=model, ema=averages, step=step, optimisers=states,
                                 best=best, seconds=seconds, args=vars(args), **task.extra())
    bar = tqdm(total=args.steps, initial=step, disable=None if rank == 0 else True, unit="step")
    reports, clock = [], time.perf_counter()
    while step < args.steps:
        lr = learning_rate(step, args)
        for group in (g for o in optimisers for g in o.param_groups):
            group["lr"] = lr
        for i in range(args.accum):
            part = rank * args.accum + i                                      # which micro-batch of the step this is
            batch = task.batch(step, list(range(part * micro, (part + 1) * micro)))
            if args.fsdp:
                net.set_requires_gradient_sync(i == args.accum - 1)
            with autocast():
                loss, buckets = compute(net, batch, seeded(args.seed, step, part))
            (loss / (args.accum * (1 if args.fsdp else world))).backward()    # FSDP averages by itself
            reports.append(torch.cat([loss.detach()[None], buckets]))
        if world > 1 and not args.fsdp:
            sum_gradients([p for p in net.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        norm = norm.full_tensor() if args.fsdp else norm
        if not torch.isfinite(norm):
            raise BadInput(f"the loss is {loss.item()} at step {step} (gradient norm {norm.item()}); last.pt keeps the last good state: lower --lr")
        for optimiser in optimisers:
            optimiser.step()
        net.zero_grad(set_to_none=True)
        update_ema(ema, net, step, args.ema, args.ema_every)
        step += 1
        bar.update()
        if world > 1:                                                         # a signal reaches processes at different steps: all stop at one
            halt = torch.tensor(float(len(stop)), device=device)
            dist.all_reduce(halt)
            stop += [1] * int(halt.item() > 0)
        if rank == 0 and (step % args.log_every == 0 or step == args.steps):
            took = time.perf_counter() - clock
            seconds, mean = seconds + took, torch.stack(reports).nanmean(0).tolist()
            per_step = took / (len(reports) / args.accum)
            tqdm.write(f"step {step}/{args.steps}  loss {mean[0]:.4f}  {task.format_metrics(mean[1:])}  gnorm {norm:.2f}  lr {lr:.1e}  {1000 * per_step:.0f} ms  "
                       f"{flops / per_step / 1e9:.0f} GFLOP/s = {100 * flops / per_step / peak:.0f} % {peak_words}  {seconds:.0f} s")
            log_row(out / "log.csv", step=step, seconds=round(seconds, 1), loss=mean[0], **{f"bucket_{b}": v for b, v in enumerate(mean[1:])},
                    lr=lr, ms=1000 * per_step)
            if seconds == took or step == args.steps:                         # at the first report and the last
                tqdm.write(f"  the most memory held so far: {peak_memory(device) / 2 ** 30:.2f} GiB" + (" of the process" if device.type == "cpu" else " of the GPU"))
            reports, clock = [], time.perf_counter()
        if taking_part and (step % args.sample_every == 0 or step == args.steps):
            swap_ema(net, ema)                                                    # the averaged weights are looked at, and kept
            score = evaluate_and_log(task, net, clips, out, step, autocast, args, rank) if clips else best
            if score >= best:
                best = score
                save_best(out / "best.pt", task, net, ema, step, seconds, args, rank)
            swap_ema(net, ema)
            clock = time.perf_counter()                                       # the clock rests while evaluating and saving
        if taking_part and (step % args.save_every == 0 or step == args.steps or stop):
            save()
            clock = time.perf_counter()
        if stop:
            bar.close()
            print(f"stopped at step {step}; the same command goes on from {out / 'last.pt'}", file=sys.stderr)
            sys.exit(130)
    bar.close()
    if rank == 0:
        print(f"done: {out / 'best.pt'}, {out / 'log.csv'}; {seconds:.0f} s of training, {time.perf_counter() - start_time:.0f} s in all")
    if world > 1:
        dist.barrier()                                                        # what comes next may read what the first one wrote


def evaluate_and_log(task, net, clips, out, step, autocast, args, rank):
    """Evaluate on held-out clips; leave a strip and an mp4; -> a score to compare checkpoints by."""
    net.eval()
    with torch.compiler.set_stance("force_eager"):                            # other shapes than training's: not worth compiling for
        lines, score, videos, *sounds = task.evaluate(net, clips, autocast, step == args.steps)
    net.train()
    if rank == 0 and getattr(task, "figures", None):
        log_row(out / "scores.csv", step=step, **task.figures)
    for line in lines if rank == 0 else []:
        tqdm.write(f"  evaluation at step {step}, {len(clips)} held-out clips, {line}")
    if len(videos):
        sounds, side = sounds[0] if sounds else [c["audio"] for c in clips], data.sides(args.resolution)[0]
        strips = [np.concatenate([data.film_strip(c["video"], c["audio"])[:None if s is not c["audio"] else side], data.film_strip(v, s)])
                  for v, s, c in list(zip(videos, sounds, clips))[:8]]        # above: the truth, below: ours
        data.write_picture(out / f"{step:06d}.png", np.concatenate(strips))
        data.write_video(out / f"{step:06d}.mp4", videos[0], sounds[0])
    return score


def save_best(path, task, net, ema, step, seconds, args, rank):
    if "vae" in args.task and not args.tune_decoder:
        task.measure_latent_stats(net)
    kept = ema if args.pretrained else net.state_dict()                       # what stays as published is not stored again
    weights = full_state(net, list(kept))
    if rank == 0:
        data.save_checkpoint(path, task=args.task, config=asdict(net.cfg), ema={k: v.half() for k, v in weights.items()}, step=step, seconds=seconds,
                             args=vars(args), **task.extra())


def resume(path, args, net, ema, optimisers):
    ckpt = data.load_checkpoint(path, args.task)
    if ckpt["config"] != asdict(net.cfg) and "vae" not in args.task:
        raise BadInput(f"{path}: made with another --size or configuration; give another --out to start anew")
    for flag in ("seed", "batch_size", "lr", "data", "clips", "resolution", "tune_decoder", "optimizer", "fsdp", "stage"):       # --steps may change
        if ckpt["args"].get(flag, getattr(args, flag)) != getattr(args, flag):
            raise BadInput(f"{path}: was trained with --{flag.replace('_', '-')} {ckpt['args'].get(flag)}, now it is {getattr(args, flag)}; repeat that or give another --out")
    if args.fsdp:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(net, ckpt["ema"], options=options)
        swap_ema(net, ema)
        set_model_state_dict(net, ckpt["model"], options=options)
        for optimiser, state in zip(optimisers, ckpt["optimisers"]):
            set_optimizer_state_dict(net, optimiser, state, options=options)
        return ckpt["step"], ckpt["best"], ckpt["seconds"]
    data.load_weights(net, {**net.state_dict(), **ckpt["model"]} if args.pretrained else ckpt["model"], path)
    for k, v in ckpt["ema"].items():
        ema[k].copy_(v)
    for optimiser, state in zip(optimisers, ckpt["optimisers"]):
        optimiser.load_state_dict(state)
    return ckpt["step"], ckpt["best"], ckpt["seconds"]


def bench(task, net, optimisers, compute, autocast, args, rounds=30):
    """What loading costs: medians of forward, backward and update, in turns with one batch kept in memory and with batches from the cache."""
    args.skip_audio = 0.                                                      # or some steps would be cheaper than others
    kept, spans = task.batch(0, list(range(args.batch_size))), {"resident": [], "loading": []}
    for step in tqdm(range(-3, rounds), desc="training steps", disable=None, leave=False):        # three to warm up
        for name, times in spans.items():
            start = time.perf_counter()
            batch = kept if name == "resident" else task.batch(step + 3, list(range(args.batch_size)))
            with autocast():
                loss, _ = compute(net, batch, seeded(args.seed, step + 3))
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            net.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start) if step >= 0 else None
    resident, loading = (float(np.median(v)) for v in spans.values())
    print(f"a step of {args.batch_size} clips: {1000 * resident:.1f} ms with the data in memory, {1000 * loading:.1f} ms loading it from the cache")
    print(json.dumps(dict(resident_s=resident, loading_s=loading, loading_over_resident=loading / resident)))


def log_row(path, **row):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, row)
        writer.writeheader() if new else None
        writer.writerow(row)


def arguments():
    p = Parser(__doc__)
    # what
    p.add_argument("--task", default="a2v", choices=list(TASKS), help="what to train")
    p.add_argument("--data", default="toybox", help=f"a2v: toybox, {', '.join(data.DATASETS)}, or a folder of clips")
    p.add_argument("--data-root", default="data", help="where datasets and caches lie")
    p.add_argument("--size", default="tiny", choices=[*dict.fromkeys([*networks.SIZES, *towers.TOWERS, *towers.HARMONY])], help="size of the network")
    p.add_argument("--stage", default="all", choices=("video", "audio", "timbre", "joint", "all"), help="t2av, joint: one tower, the other, both together (timbre: Harmony's, with references out of other clips); or one after the other")
    p.add_argument("--init", help="t2av, joint: the checkpoint a stage starts from (that of the stage before, in --out)")
    p.add_argument("--resolution", type=data.picture_size, default=64, help="side of the pictures in pixels, or height x width: 384x640")
    p.add_argument("--clips", type=number(int, 1), default=2000, help="a2v: toybox clips to render and cache")
    p.add_argument("--vae", default=str(VAE_FILE), help="a2v: the VAE that makes the latents")
    p.add_argument("--audio-vae", help="the audio VAE that makes the latents (t2av: of waveforms, weights/audio-vae-toybox.pt; joint: of spectra, weights/mel-vae-toybox.pt)")
    p.add_argument("--pretrained", help="a2v: start from Pyramid Flow, downloaded to this folder (its VAE and text encoders too), as Syncphony did")
    p.add_argument("--hubert", help="a2v, with --pretrained: features by this HuBERT, a folder or a name on the hub")
    # how long, how fast
    p.add_argument("--steps", type=number(int, 1), help="optimiser steps (a2v 1550, --pretrained 33000, vae 6000, audio-vae 4000, mel-vae 2000, t2av, joint 1500 a stage)")
    p.add_argument("--batch-size", type=number(int, 1), help="clips per step, over all processes and --accum (16; --pretrained 32)")
    p.add_argument("--accum", type=number(int, 1), default=1, help="micro-batches per step: less memory, the same result")
    p.add_argument("--lr", type=number(low=0), help="peak learning rate (a2v, t2av, joint 0.005, --pretrained 0.00005, vae 0.002, audio-vae, mel-vae 0.003)")
    p.add_argument("--warmup", type=number(int, 0), default=100, help="steps of linear warm-up")
    p.add_argument("--weight-decay", type=number(low=0), default=.01, help="AdamW's, on matrices only")
    p.add_argument("--clip", type=number(low=0), default=1., help="largest gradient norm")
    p.add_argument("--ema", type=number(low=0, high=1), help="decay of the averaged weights (.998; --pretrained .9999)")
    p.add_argument("--ema-every", type=number(int, 1), help="steps between updates of the averaged weights (1; with --pretrained 20)")
    p.add_argument("--optimizer", default="muon", choices=("muon", "adamw"), help="Muon for matrices and AdamW for the rest, or AdamW for all")
    # the a2v objective
    p.add_argument("--lambda-motion", type=number(low=0), default=1., help="motion-aware loss, Syncphony eq. 1; 0 = plain")
    p.add_argument("--skip-audio", type=number(low=0, high=1), default=.1, help="share of steps with the audio layers left out")
    p.add_argument("--drop-text", type=number(low=0, high=1), default=.1, help="share of captions replaced by the null text")
    p.add_argument("--no-audio-rope", action="store_true", help="an ablation: audio without positions, Syncphony table 11")
    p.add_argument("--layout", default="parallel", choices=("parallel", "pyramid"), help="every latent in one pass, or Pyramid Flow's: one latent, three resolutions")
    p.add_argument("--sigma", default="uniform", choices=("uniform", "logit-normal"), help="how noise levels are drawn")
    p.add_argument("--shift", type=number(low=.01), help="shift of the noise levels towards noise; 1 = none (a2v 4, t2av 1, joint 5)")
    p.add_argument("--asg", type=number(low=0), help="w_a that the checkpoint will recommend to sample.py (1; --pretrained 2)")
    p.add_argument("--cfg", type=number(low=0), help="text guidance that the checkpoint will recommend to sample.py (0; --pretrained 4; t2av 2; joint 1, which is off)")
    p.add_argument("--kl", type=number(low=0), help="weight of the KL term, the price of information in the latents (vae, audio-vae .02, mel-vae .002)")
    p.add_argument("--pictures", type=number(int, 0), default=8, help="t2av, joint: single pictures for the video tower to learn from, beside every clip")
    p.add_argument("--ot", action="store_true", help="t2av: minibatch optimal transport between noise and data")
    p.add_argument("--no-adaptor", action="store_true", help="t2av, an ablation: audio looks at bare video features")
    p.add_argument("--no-video", action="store_true", help="t2av, an ablation: the audio tower reads the text and sees no video")
    p.add_argument("--lambda-v", type=number(low=0), default=.1, help="joint: weight of the audio-driven loss, which trains the VIDEO (Harmony eq. 3); 0 = leave that task out")
    p.add_argument("--lambda-a", type=number(low=0), default=.3, help="joint: weight of the video-driven loss, which trains the AUDIO; 0 = leave that task out")
    p.add_argument("--lambda-joint", type=number(low=0), default=1., help="joint: weight of the joint loss; 0 = train the one-way tasks alone")
    p.add_argument("--sync-video", type=number(low=0), default=3., help="joint: s_v of SyncCFG that the checkpoint will recommend to sample.py")
    p.add_argument("--sync-audio", type=number(low=0), default=2., help="joint: s_a likewise")
    p.add_argument("--no-rope-align", action="store_true", help="joint, an ablation: the streams' places in time are not laid on each other")
    p.add_argument("--no-gldi", action="store_true", help="joint, an ablation: everything attends to everything, and the reference is no style")
    p.add_argument("--tune-decoder", help="vae: train only the decoder of this checkpoint; its latents, and models of them, stay valid")
    # where and how
    p.add_argument("--seed", type=number(int, 0), default=0, help="of everything")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    p.add_argument("--compile", action="store_true", help="torch.compile: half a minute to start, then faster")
    p.add_argument("--checkpointing", action="store_true", help="a2v: recompute activations in the backward pass, for memory")
    p.add_argument("--fsdp", action="store_true", help="--pretrained, several processes: share one copy of weights and states among them (with --optimizer adamw)")
    p.add_argument("--bench", action="store_true", help="measure what loading the data costs, and stop")
    p.add_argument("--out", help="folder for checkpoints and logs (out/a2v, out/vae)")
    p.add_argument("--log-every", type=number(int, 1), default=50, help="steps between reports")
    p.add_argument("--sample-every", type=number(int, 1), default=1000, help="steps between evaluations, each with strip and mp4")
    p.add_argument("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    p.add_argument("--eval-clips", type=number(int, 0), default=48, help="held-out clips of an evaluation")
    return p


DEFAULTS = {   # what a flag is that was not given
    "a2v": dict(steps=1550, lr=5e-3, batch_size=16, ema=.998, ema_every=1, asg=1., cfg=0., shift=4., kl=0.),
    "pretrained": dict(steps=33000, lr=5e-5, batch_size=32, ema=.9999, ema_every=20, asg=2., cfg=4., shift=4., kl=0.),
    "vae": dict(steps=6000, lr=2e-3, batch_size=16, ema=.998, ema_every=1, asg=0., cfg=0., shift=1., kl=2e-2),
    "audio-vae": dict(steps=4000, lr=3e-3, batch_size=16, ema=.998, ema_every=1, asg=0., cfg=0., shift=1., kl=2e-2),
    "mel-vae": dict(steps=2000, lr=3e-3, batch_size=16, ema=.998, ema_every=1, asg=0., cfg=0., shift=1., kl=2e-3),
    "t2av": dict(audio_vae=str(AUDIO_VAE_FILE), steps=1500, lr=5e-3, batch_size=16, ema=.998, ema_every=1, asg=0., cfg=2., shift=1., kl=0.),
    "joint": dict(audio_vae=str(MEL_VAE_FILE), steps=1500, lr=5e-3, batch_size=16, ema=.998, ema_every=1, asg=0., cfg=1., shift=5., kl=0.),
}


def main():
    args = arguments().parse_args()
    for flag, value in DEFAULTS["pretrained" if args.pretrained else args.task].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.tune_decoder and args.task != "vae":
        raise BadInput(f"--tune-decoder {args.tune_decoder}: only --task vae has a decoder; add --task vae or leave it out")
    if args.pretrained:
        args.layout, args.size = "pyramid", "miniflux"                        # what it was made with
        if not args.hubert or args.data == "toybox" or args.task != "a2v":
            raise BadInput(f"--pretrained {args.pretrained}: trains --task a2v on real clips with HuBERT features; give --data and --hubert facebook/hubert-large-ls960-ft")
    elif args.size == "miniflux" or args.hubert:
        raise BadInput("--size miniflux and --hubert go with Pyramid Flow's weights; give their folder by --pretrained, or train tiny or small")
    if args.fsdp and (not args.pretrained or args.optimizer != "adamw" or "RANK" not in os.environ):
        raise BadInput("--fsdp: shares a model on Pyramid Flow among the processes of torchrun; give --pretrained and --optimizer adamw, and start it by torchrun")
    height, width = data.sides(args.resolution)
    if args.data == "toybox":
        data.only_square(args.resolution)
    if args.layout == "pyramid" and (height % 64 or width % 64):
        raise BadInput(f"--resolution {height}x{width}: --layout pyramid halves the latents twice; sides must be multiples of 64")
    if args.stage == "timbre" and args.task != "joint":
        raise BadInput(f"--stage timbre: is a stage of --task joint; --task {args.task} has none of that name")
    if args.task == "joint" and not (args.lambda_joint or args.lambda_v or args.lambda_a):
        raise BadInput("--lambda-joint 0 --lambda-v 0 --lambda-a 0: nothing is left to learn; leave one of them above 0")
    (in_stages if args.task in STAGES and args.stage == "all" else train)(args)
    if dist.is_initialized():
        dist.destroy_process_group()


STAGES = {   # name, share of --lr, batches of so many times the size
    # SyncFlow section 3.2: the video tower; the audio tower on top of it (no graph for video, so bigger batches cost the same); both, gently
    "t2av": (("video", 1, 1), ("audio", 1, 2), ("joint", .3, 1)),
    # Harmony section 2, on a video tower of our own in place of Wan2.2: the audio tower, with references; both and their bridges
    "joint": (("video", 1, 1), ("audio", 1, 1), ("timbre", .3, 1), ("joint", .6, 1)),
}


def in_stages(args):
    """All stages of a task, each from the last one's checkpoint."""
    root, before = Path(args.out or f"out/{args.task}"), args.init
    for stage, lr, more in STAGES[args.task]:
        print(f"stage {stage}: {root / stage}")
        train(argparse.Namespace(**dict(vars(args), stage=stage, out=str(root / stage), init=before, lr=lr * args.lr, batch_size=more * args.batch_size)))
        before = str(root / stage / "best.pt")


if __name__ == "__main__":
    run_cli(main)
