"""Sampling: from noise to a file. The samplers, their guidance, and the sampling command.

    captions, audio, first frame --encoders--> conditions --+
                                                            v
    noise -------------------------------> Euler:  x <- x + (sigma_next - sigma) v
                                                            ^          |  sigma from 1 to 0
    given latents (video, audio, first frame) ---impose-----+          v
                                                 latents --VAEs--> frames, waveform --> .mp4

Three samplers share `losses.combine_guidance`, and all but sample_stages share `euler`:

    sample_autoregressive   Syncphony: one latent after the other, attending to a cache of the
                            first and the last finished ones: memory grows by the audio alone
    sample_stages           the same in Pyramid Flow's layout, three resolutions per latent
    sample_joint            SyncFlow and Harmony: all latents of video and audio together

**Guidance** compares the conditional velocity with those of branches in which ONE condition is
replaced (table in losses.py): "null" has the empty caption (on Pyramid Flow a prompt of flaws),
"off-sync" no audio layers; in "silent" and "static" the other stream is silence or a still. All
branches of a step are rows of one batch.

**Given streams.** A stream may be known in full, or its beginning (the first frame, the audio so
far). `impose` puts it into x before every step, at the noise level that the network expects:
SyncFlow has one level for everything, so known latents are noised to it (section 5); Harmony was
trained with clean partners.

    python sample.py --audio x.wav --image f.png --prompt "a dog barks" --asg 2 --shift-audio 0.3
    python sample.py --prompt "a face calls out" --transcript "u i" --ref-audio voice.wav --maps

    B clips · R guidance branches · L latents · C h w latent channels and grid · S audio latents or
    feature steps · A audio channels · T text tokens · video uint8 (frames, H, W, 3)
"""
import hashlib
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import pyramid
from data import FPS, RATE, BadInput, fit_length, frames_to_tensor, tensor_to_frames
from losses import combine_guidance, randn_each, shift_sigma
from model import TEXT_BYTES, KVCache, MMDiT, MMDiTConfig, text_bytes
from towers import DualTower, DualTowerConfig
from toybox import is_toybox_picture
from vae import AudioVAE, AudioVAEConfig, CausalVideoVAE, VAEConfig

ROOT = Path(__file__).parent
WEIGHTS = ROOT / "weights"
VAE_FILE = WEIGHTS / "vae-toybox.pt"
REAL_VAE_FILE = WEIGHTS / "vae-real.pt"
AUDIO_VAE_FILE = WEIGHTS / "audio-vae-toybox.pt"              # of waveforms, SyncFlow's paper
MEL_VAE_FILE = WEIGHTS / "mel-vae-toybox.pt"                  # of spectra, the default
A2V_FILE = WEIGHTS / "a2v-toybox.pt"
REAL_A2V_FILE = WEIGHTS / "a2v-real.pt"
T2AV_FILE = WEIGHTS / "t2av-toybox.pt"
JOINT_FILE = WEIGHTS / "joint-toybox.pt"
SYSTEMS = {"a2v": "Syncphony", "t2av": "SyncFlow", "joint": "Harmony"}
STEPS = {"a2v": 30, "t2av": 50, "joint": 40}   # the papers' Euler steps; of a2v: per latent
# What train.py writes into checkpoints; a flag of the same name has the last word.
#
# To add a rule of guidance:
#     two towers   a branch in prepare_conditions, a field of JointRequest
#     a2v          rows and a term in sample_autoregressive and in pyramid.with_guidance, and an
#                  argument of cyclesync.AudioToVideo.generate
#     both         its name here, in FLAGS and in data.is_guidance; a row in the table of losses.py
GUIDANCE = {
    # The toybox's videos are all but determined by their sound: its velocity field is nearly
    # straight, and few steps follow it (cyclesync.py --steps-study). After short trainings w_a = 1
    # is best, with which 6 steps are as good as 30; the shipped file, trained for longer,
    # recommends 2 steps without guidance.
    "a2v": dict(asg=1., cfg=0., still=0., steps=6),
    # of a2v from scratch on real clips: with a lower w_a motion follows the sound less, with a
    # lower `still` the background flickers by more than 2 of 255 (RESULTS.md)
    "real": dict(asg=2., cfg=0., still=.2, steps=4),
    # w_a, w_t and steps of Syncphony. Its w_t = 7 of the first latent never acts, since latent 0 is
    # the picture. w_t = 4 is eq. 6 as printed, a scale of 5; Pyramid Flow's own is 4, here --cfg 3
    "pretrained": dict(asg=2., cfg=4., steps=STEPS["a2v"]),
    # w of SyncFlow eq. 3: 3, with which most sounds are in time (RESULTS.md); the paper's is 6.
    # 10 steps put as many sounds in time as 30, but these are less varied: 1.4 times the Frechet
    # distance. shift: as in training
    "t2av": dict(cfg=3., shift=1., guide_below=1., steps=30),
    # s_v and s_a of SyncCFG are the paper's; no text guidance (1). shift: as in training. To
    # generate one stream for the other 3 steps are as good as 30; to generate both, 10 are.
    # guide_below: without guidance at the highest noise levels pairs agree as well and sounds are
    # more varied (Frechet distance 4.0; guided everywhere 6.9, unguided 4.5: --guidance-study)
    "joint": dict(cfg=1., sync_video=3., sync_audio=2., guide_below=.95, shift=5., steps=10),
}
# bfloat16 is taken where it is faster by this factor. Near a tie noise decides, and two runs would
# differ for nothing.
WORTH = 1.1
BATCH = 16                                    # clips sampled by towers at a time
WINDOW = 13                                   # latents of a clip in training
OVERLAP = 3                                   # latents that two windows share, 0.5 s
MINUTE = 60 * FPS                             # frames of a long video that its strip shows
# Frames of a clip that towers generate as a whole: attention takes memory by the square of it
LONGEST = 5 * MINUTE


def pick_device(name="auto"):
    """'auto' | 'cuda' | 'mps' | 'cpu' -> device, the same in words."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available.get(name):
        raise BadInput(f"--device {name}: torch finds no such device; leave --device at auto")
    if name == "cuda":
        # On an H100 torch 2.11 takes cuDNN's attention for bfloat16. Sampling then ended with a
        # "misaligned address" (a mask may be a slice of another), and gradients can be nan (PyTorch
        # issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device(name), f"{name} ({torch.cuda.get_device_name()})"
    return torch.device(name), f"{name} ({torch.get_num_threads()} threads)"


def pick_autocast(dtype, device, step=None):
    """'auto' | 'float32' | 'bfloat16' -> a maker of autocast contexts, and why in words.

    Under autocast, matrix products are in bfloat16. Whether that pays depends on the network: the
    products of a small one save less time than the casts before them take. So "auto" times `step`,
    a pass of the network at hand, in both; without one bfloat16 is taken where it is native."""
    bfloat16 = partial(torch.autocast, device.type, torch.bfloat16)
    contexts = {"float32": nullcontext, "bfloat16": bfloat16}
    if dtype in contexts:
        return contexts[dtype], dtype

    # Where the hardware lacks bfloat16 it is emulated, at a multiple of the time. Nothing is known
    # of other devices, and of builds without mkldnn, such as those for Macs.
    is_native = False
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"):
        is_native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not is_native:
        return nullcontext, "float32: no native bfloat16"
    if step is None:
        return bfloat16, "bfloat16"
    speedup = time_ratio(step, nullcontext, bfloat16, device)
    chosen = "bfloat16" if speedup >= WORTH else "float32"
    return contexts[chosen], f"{chosen}: here bfloat16 is {speedup:.2f} x as fast as float32"


def time_ratio(step, one, other, device):
    """Least time of step() in context `one` over that in `other`, in about a second."""
    times = {one: [], other: []}
    end = time.perf_counter() + 1
    # They take turns. The first round warms up: it makes kernels and fills caches.
    while len(times[other]) < 2 or time.perf_counter() < end:
        for context, measured in times.items():
            start = time.perf_counter()
            with context():
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            measured.append(time.perf_counter() - start)
    return min(times[one][1:]) / min(times[other][1:])


# ------------------------------------------------------------------------------- checkpoints

@dataclass
class System:
    """A checkpoint ready to sample from, with its averaged (EMA) weights."""
    task: str                                 # a2v | t2av | joint
    model: torch.nn.Module
    vae: torch.nn.Module
    audio_vae: torch.nn.Module                # None for a2v
    checkpoint: dict


def load(path, device="cpu", vae=None, audio_vae=None, pretrained=None, task=" or ".join(SYSTEMS)):
    """A checkpoint of train.py -> `System`. Its VAEs are found by their fingerprints (`find_vae`).

    vae, audio_vae: files to take instead. pretrained: Pyramid Flow's folder, for a checkpoint that
    holds only what was trained on top of it. task: what the checkpoint must be of."""
    checkpoint = data.load_checkpoint(path, task)
    config = checkpoint["config"]
    weights = checkpoint["ema"]
    network, config_class = MMDiT, MMDiTConfig
    # The network: two towers, a transformer of this repository, or Pyramid Flow's with the trained
    # blocks and audio layers of the checkpoint put into it
    if checkpoint["task"] != "a2v":
        network, config_class = DualTower, DualTowerConfig
    elif config.get("text_encoder") == "external":
        if not pretrained:
            raise BadInput(f"{path}: trained on top of Pyramid Flow; give its downloaded folder by "
                           "--pretrained, and --hubert facebook/hubert-large-ls960-ft")
        published = pyramid.load_pyramid_flow(Path(pretrained) / "diffusion_transformer_384p")
        weights = {**published.state_dict(), **weights}
        vae = vae or Path(pretrained) / "causal_video_vae"
    model = data.build(network, config_class, config, weights, path).to(device).eval()

    # Its VAEs; Syncphony takes audio as features
    vae = find_vae(checkpoint, "vae", path, vae, device)
    has_audio = checkpoint["task"] != "a2v"
    audio_vae = find_vae(checkpoint, "audio_vae", path, audio_vae, device) if has_audio else None
    # On another clock than that of training, audio and video drift apart without any error.
    alpha = steps_per_latent(vae, audio_vae)
    if abs(model.cfg.alpha - alpha) > 1e-6 * alpha:
        raise BadInput(f"{path}: made for {model.cfg.alpha:g} audio steps in a video latent, but "
                       f"with its VAEs there are {alpha:g}; train it again on these VAEs")
    return System(checkpoint["task"], model, vae, audio_vae, checkpoint)


def recommended(checkpoint, **flags):
    """Guidance and steps: a flag, or else what the checkpoint recommends, or else the system's."""
    settings = GUIDANCE[checkpoint["task"]] | dict(steps=STEPS[checkpoint["task"]])
    settings |= {k: v for k, v in checkpoint["guidance"].items() if k in settings}
    return settings | {k: v for k, v in flags.items() if k in settings and v is not None}


def load_vae(path=VAE_FILE, device="cpu", task="vae"):
    """A VAE of train.py, of one of the tasks named, or the folder of Pyramid Flow's."""
    if task == "vae" and Path(path).is_dir():
        return pyramid.load_pyramid_vae(path, device)
    checkpoint = data.load_checkpoint(path, task)
    config = checkpoint["config"]
    network, config_class = CausalVideoVAE, VAEConfig
    if checkpoint["task"] != "vae":
        network, config_class = AudioVAE, AudioVAEConfig
        # of waveforms or of spectra
        front = "mel" if checkpoint["task"] == "mel-vae" else "waveform"
        config = {**config, "front": front}
    return data.build(network, config_class, config, checkpoint["ema"], path).to(device).eval()


def fingerprint(vae):
    """16 hex digits that identify a VAE's latents: of its encoder alone, decoders may be tuned."""
    config = asdict(vae.cfg)
    # The fields of the audio VAE's other front end say nothing about these latents.
    unused = {"waveform": ("front", "mels", "depth"), "mel": ("front", "ratios", "patch", "lstm")}
    for name in unused.get(config.get("front"), ()):
        del config[name]
    # A field that is newer than some files counts where it is used.
    if config.get("residual") is False:
        del config["residual"]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    # Weights in half precision, as files hold them
    for name, weight in sorted(vae.state_dict().items()):
        if name.startswith(("encoder", "quant_conv")):
            # + 0. turns -0 into 0: one number, but not one byte
            digest.update((weight.half() + 0.).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def find_vae(checkpoint, kind, path, override, device):
    """The VAE (kind "vae" or "audio_vae") whose fingerprint the checkpoint at `path` names.

    It is looked for where it was in training, in weights/ and beside the checkpoint. override: a
    file or folder that has to be it."""
    task = "vae" if kind == "vae" else "audio-vae or mel-vae"
    flag = kind.replace("_", "-")
    # Latents of another VAE of the same size would decode to noise, without any error: so it is
    # the fingerprint that is looked up, never the name.
    trained_with = checkpoint["args"].get(kind)
    files = [str(trained_with)] if trained_with else []
    # Backwards, so that vae-toybox.pt, of most checkpoints, comes before vae-real.pt
    for folder in (WEIGHTS, Path(path).parent):
        files += sorted(folder.glob("*vae*.pt"), reverse=True)
    for file in [override] if override else files:
        try:
            vae = load_vae(file, device, task)
        except BadInput:                                      # not there, or of another task
            if override:
                raise
            continue
        if fingerprint(vae) == checkpoint[kind]:
            return vae
    if override:
        raise BadInput(f"{override}: not the {flag} that {path} was trained with; "
                       "give that one, or leave the flag out")
    raise BadInput(f"{path}: its {flag} (fingerprint {checkpoint[kind]}) is neither in weights/ "
                   f"nor beside it; give it by --{flag}")


def compile_network(model):
    """--compile. No default: a clip of 2 s is ready long before the compiler is."""
    if isinstance(model, MMDiT) and model.cfg.context_sigma == "zero":
        # All steps of all latents are two graphs (see `KVCache`), on a GPU CUDA graphs: the CPU
        # starts them as a whole, not kernel after kernel.
        model.compiled_step = torch.compile(model.cached_step, mode="reduce-overhead",
                                            dynamic=False)
    else:
        for block in model.all_blocks():
            block.compile(dynamic=True)


# ---------------------------------------------------------------------------------- samplers

def euler(velocity, x, sigmas, bar=None):
    """dx/dsigma = velocity(x, sigma), from sigmas[0] to sigmas[-1]; x is {stream: latents}. It is
    the integral of SyncFlow eq. 1 as a sum.

    On a straight path (rectified flow) a single step would be exact."""
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        v = velocity(x, sigma)
        x = {stream: x[stream] + (sigma_next - sigma) * v[stream] for stream in x}
        if bar is not None:
            bar.update()
    if not all(z.isfinite().all() for z in x.values()):
        raise BadInput("the network's output is not finite; lower the guidance, or take another "
                       "copy of the checkpoint")
    return x


def sigma_steps(steps, shift=1.):
    """Noise levels 1 .. 0 of so many steps, as Python floats; shift: see `shift_sigma`."""
    return shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def make_generators(seeds):
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def shrink_to_rest(x, still):
    """Latents x (B, C, L, h, w), normalised, with the RMS over the channels lower by `still` at
    every position, and rest where that would be below 0 (group soft thresholding).

    For VAEs whose latents are differences from those of a still clip (`VAEConfig.reference`). Test
    windows of The Greatest Hits at 64 px, 95 % of positions: RMS below .06 where no pixel leaves
    the first frame, above .17 where most pixels do. A threshold that leaves the latents above it as
    they are gives more flicker at the same agreement of motion (RESULTS.md)."""
    rms = x.square().mean(1, keepdim=True).sqrt()             # (B, 1, L, h, w)
    # The bound is for a latent of zero, which is at rest already.
    return x * (1 - still / rms.clamp(min=1e-6)).clamp(min=0)


def sample_autoregressive(model, z0, n_latents, audio, text, steps=STEPS["a2v"], asg=0., cfg=0.,
                          still=0., seeds=(0,), bar=None):
    """Syncphony: yields latents 1 .. n_latents - 1, each (B, C, 1, h, w), normalised.

    z0 (B, C, 1, h, w): latent of the first frame; audio (B, S, A) features, None: audio layers are
    skipped; text: (states, mask, pooled) of B rows, or of 2 B rows [full; null] for text guidance
    (`encode_conditions`), for which audio may have 2 B rows, too, as in `cyclesync.py --negatives`;
    asg, cfg: w_a, w_t >= 0; still: see `shrink_to_rest`, 0 = off. Clip i draws its noise from
    seeds[i] alone."""
    B = len(z0)
    states, _, pooled = text                                  # (R·B, T, ·), (R·B, ·)
    R = len(states) // B
    # A branch without rows has weight 0: off-sync without audio, null without rows of its text.
    asg = 0. if audio is None else asg
    cfg = 0. if R == 1 else cfg

    def rows(z):                                              # (B, ...) -> (R·B, ...)
        return torch.cat([z] * R)

    # The off-sync branch equals the full one up to the first audio layer, where the model repeats
    # the first B rows: a step runs [full; null] through the double blocks, then + [off-sync].
    audio_rows = audio if audio is None or len(audio) == len(states) else rows(audio)
    n_off_sync = B if asg > 0 else 0
    cache = KVCache(model, rows(z0), states, pooled, audio_rows, n_off_sync)

    def velocity(x, sigma):
        v = cache.denoise_step(rows(x["video"]), sigma).to(z0)
        # Where a branch is missing its slice holds other rows, which a scale of 1 leaves out.
        full, null, off_sync = v[:B], v[B:2 * B], v[-B:]
        # Syncphony eq. 6
        return {"video": combine_guidance(full, (1 + asg, off_sync), (1 + cfg, null))}

    generators = make_generators(seeds)
    for _ in range(1, n_latents):
        # Uniform steps: --shift moves the noise levels of training alone (`shift_sigma`).
        x = {"video": randn_each(generators, z0.shape[1:]).to(z0)}
        x = shrink_to_rest(euler(velocity, x, sigma_steps(steps), bar)["video"], still)
        # The first step of the next latent writes the clean keys of this one, in all branches.
        cache.append(rows(x))
        yield x


def sample_stages(model, z0, n_latents, audio, text, steps=STEPS["a2v"], asg=0., cfg=0.,
                  seeds=(0,), bar=None):
    """`sample_autoregressive` of a model in Pyramid Flow's layout: three resolutions."""
    # Two halvings, then patches
    multiple = 4 * model.cfg.patch
    if z0.shape[3] % multiple or z0.shape[4] % multiple:
        raise BadInput("Pyramid Flow halves the latents twice: sides of pictures must be multiples "
                       "of 64; give another --resolution")
    generators = make_generators(seeds)
    noise = randn_each(generators, (z0.shape[1], n_latents - 1, *z0.shape[3:])).to(z0)

    def jump_noise(shape):
        return torch.stack([pyramid.block_noise(shape[1:], g) for g in generators])

    call = pyramid.with_guidance(model, *text, audio, asg, cfg)
    return pyramid.sample_pyramid(call, z0, n_latents, noise, calls_per_stage(steps),
                                  jump=jump_noise, keep=model.cfg.context, bar=bar)


def calls_per_stage(steps):
    """Network calls per latent -> calls at each of Pyramid Flow's three resolutions."""
    if steps < 3:
        raise BadInput(f"--steps {steps}: this model works at three resolutions; give 3 or more")
    return [len(part) for part in np.array_split(range(steps), 3)]


def impose(x, given, noise, sigma, is_clean):
    """Put what is given in place of the beginning of x -> latents like x, noise levels (B, L).

    x, noise (B, ·, L, ...); given (B or 1, ·, n <= L, ...) or None. The noise is the same in every
    step: what is given and not clean moves straight from it to `given`."""
    levels = x.new_full((len(x), x.shape[2]), sigma)
    if given is None:
        return x, levels
    n = given.shape[2]                                        # time, in both streams
    level = 0. if is_clean else sigma
    levels[:, :n] = level
    given = (1 - level) * given + level * noise[:, :, :n]
    return torch.cat([given, x[:, :, n:]], 2), levels


def sample_joint(model, noise, sigmas, branches, known, reference=None, guide_below=1., bar=None,
                 pulls=None):
    """SyncFlow and Harmony: video and audio from noise to clean together -> {stream: latents}.

    noise      {"video": (B, C, L, h, w), "audio": (B, A, S)}, or one of them; normalised latents
    branches   {name: {"text": encoded text, "video" or "audio": what replaces that stream, clean,
               "scale": {stream: S}, guidance away from the branch}}; "cond" replaces nothing
    known      {stream: latents}: its beginning, or all of it
    reference  (B, A, R) clean audio latents of the timbre that is wanted (Harmony)
    guide_below  the highest noise level at which guidance acts; above it "cond" runs alone, a row
               a clip, and costs less. There guidance makes samples too alike (Kynkaanniemi et al.
               2024, who also leave out the lowest levels, where it changes little)

                   sigma   1 ----- guide_below ----------------------- 0
                   rows       cond      |  cond, null, silent, static

    pulls      a list that gets of every step how strongly SyncCFG pulls, (B, L, h, w)"""
    harmony = model.cfg.system == "harmony"

    def conditions(acting):
        text = [torch.cat(parts) for parts in zip(*(branch["text"] for branch in acting.values()))]
        ref = None if reference is None else torch.cat([reference] * len(acting))
        return acting, text, ref
    guided = conditions(branches)
    unguided = conditions(dict(cond=branches["cond"]))

    def network_input(stream, x, sigma, branch):
        # Harmony's video tower takes a noise level per latent, its audio tower one per clip, so
        # only audio given in full can be clean. SyncFlow has one for all.
        given = branch.get(stream, known.get(stream))
        in_full = given is not None and given.shape[2] == x.shape[2]
        is_clean = harmony and (stream == "video" or in_full)
        return impose(x, given, noise[stream], sigma, is_clean)

    def velocity(x, sigma):
        # All branches are rows of one batch.
        acting, text, ref = guided if sigma <= guide_below else unguided
        rows = dict(video=None, audio=None)
        levels = dict(rows)
        for stream in x:
            inputs = [network_input(stream, x[stream], sigma, b) for b in acting.values()]
            rows[stream], levels[stream] = map(torch.cat, zip(*inputs))       # (R·B, L or S)
            if stream == "audio" or not harmony:
                levels[stream] = levels[stream][:, -1]                        # (R·B,)
        v = model(rows["video"], rows["audio"], levels["video"], levels["audio"], *text, ref=ref)
        result = {}
        for stream, v_rows in zip(rows, v):
            if stream in x:
                v_of = dict(zip(acting, v_rows.float().chunk(len(acting))))
                # SyncFlow eq. 3; Harmony eqs. 9, 10. The scale of "cond" itself is 1: no term.
                terms = [(b["scale"].get(stream, 1), v_of[name]) for name, b in acting.items()]
                result[stream] = combine_guidance(v_of["cond"], *terms)
                if pulls is not None and "silent" in v_of and stream == "video":
                    pulls.append((v_of["cond"] - v_of["silent"]).abs().mean(1))
        return result

    x = euler(velocity, noise, sigmas, bar)
    # At sigma 0 `impose` gives back what was given.
    return {stream: network_input(stream, x[stream], 0., {})[0] for stream in x}


def n_latents(vae, frames):
    """Latents of so many frames: latent 0 is frame 0, the others t frames each."""
    return math.ceil((frames - 1) / vae.stride_t) + 1


def steps_per_latent(vae, audio_vae=None):
    """alpha: latents of an audio VAE, or features at 50 Hz, in the time of a video latent."""
    hertz = audio_vae.cfg.rate / audio_vae.hop if audio_vae else data.MEL_RATE / 2
    return hertz * vae.stride_t / FPS


def audio_length(audio_vae, frames):
    """How long the audio of so many frames is -> samples, latents."""
    samples = round(frames / FPS * audio_vae.cfg.rate)
    return samples, math.ceil(samples / audio_vae.hop)


def complete_frames(vae, frames):
    """Frames of complete latents: what is generated. The alignment of audio and video is that of
    training only for these; then both are cut to `frames`."""
    return (n_latents(vae, frames) - 1) * vae.stride_t + 1


# --------------------------------------------------------------- Syncphony: audio to video

def external_encoders(model, args, captions, device):
    """Encoders for a model on Pyramid Flow; None for one that has trained encoders inside."""
    if model.cfg.text_encoder == "bytes":
        return None
    return pyramid.ExternalEncoders(args.pretrained, args.hubert, captions, model.cfg.audio_dim,
                                    device)


def encode_conditions(model, waves, captions, samples, cfg, encoders=None):
    """Waveforms and captions -> audio features (B, S, A), text (states, mask, pooled) of B rows.

    With text guidance (cfg > 0) the text of the null branch follows as B rows more. Waveforms are
    cut, or padded with silence, to `samples`; encoders: of a model on Pyramid Flow."""
    # Equally long waveforms make a batch of features; of long ones no copies are kept.
    device = next(model.parameters()).device
    waves = (fit_length(wave, samples) for wave in waves)
    if encoders is not None:
        audio = encoders.encode_audio(waves)
        text = encoders.encode_text(captions)
        # Pyramid Flow guides away from a prompt of flaws, also where there is no caption.
        null = encoders.encode_text([pyramid.NEGATIVE_PROMPT] * len(captions))
    else:
        mels = torch.from_numpy(np.stack([data.log_mel(wave) for wave in waves]))
        mels = mels[:, :mels.shape[1] // 2 * 2].to(device)    # (B, 2S, 64)
        audio = model.encode_audio(mels)
        letters = text_bytes(captions).to(device)             # (B, 96)
        text = model.encode_text(letters)
        # Without any caption there is nothing to guide by.
        null = model.encode_text(torch.zeros_like(letters)) if any(captions) else None
    if cfg > 0 and null is not None:
        text = tuple(torch.cat(pair) for pair in zip(text, null))
    return audio, text


def generate_video(model, vae, pictures, waves, captions, frames, autocast=nullcontext, cfg=0.,
                   still=0., use_audio=True, tiles=False, encoders=None, sampler=None, **settings):
    """Pictures uint8 (B, H, W, 3), waveforms (samples,) -> yields uint8 (B, f, H, W, 3) pieces.

    Frame 0 is the picture itself, and there are `frames` in all. use_audio=False: without audio
    layers. tiles: decode large frames in tiles. encoders: `ExternalEncoders` of a model on Pyramid
    Flow. sampler: in place of `sample_autoregressive`, which takes the settings."""
    L = n_latents(vae, frames)
    # Audio for complete latents, and 20 ms more, so that the last frame has full windows of mels
    samples = math.ceil(complete_frames(vae, frames) / FPS * RATE) + RATE // 50
    pictures = np.stack(pictures)
    first = frames_to_tensor(pictures[:, None], next(model.parameters()).device)
    vae_cache = {}

    # The causal decoder keeps what it needs of the latents before in vae_cache.
    def decode(z, start):                                     # (B, C, 1, h, w) -> (B, 3, t, H, W)
        z = vae.denormalise(z, start=start)
        return vae.decode_tiles(z, vae_cache) if tiles else vae.decode(z, first, vae_cache)

    # Latent 0 is the picture. It is decoded only to fill the cache of the causal decoder.
    with torch.no_grad(), autocast():
        audio, text = encode_conditions(model, waves, captions, samples, cfg, encoders)
        z0 = vae.normalise(vae.encode(first)[0].float())      # (B, C, 1, h, w)
        decode(z0, start=True)
    yield pictures[:, None]

    # Later latents are decoded as soon as they are finished.
    if model.cfg.context_sigma == "shared":
        # Pyramid Flow's layout takes neither `still` nor another sampler.
        sampler = sample_stages
    else:
        sampler = partial(sampler or sample_autoregressive, still=still)
    latents = sampler(model, z0, L, audio if use_audio else None, text, cfg=cfg, **settings)
    remaining = frames - 1
    for _ in range(1, L):
        # Both contexts are entered per latent: whoever consumes the frames is not inside of them.
        with torch.no_grad(), autocast():
            video = decode(next(latents), start=False)[:, :, :remaining].float()
        remaining -= video.shape[2]
        yield tensor_to_frames(video)


# ------------------------------------------------------- SyncFlow and Harmony: two streams

@dataclass
class JointRequest:
    """A batch of clips for two towers; lists and tensors have one entry per clip. All guidance is
    off where it is not given."""
    captions: list                            # of the video; and of the audio, if it has no others
    shape_v: tuple                            # (C, L, h, w); None: no video
    shape_a: tuple                            # (A, S); None: no audio
    seeds: list = None                        # of the noise of every clip; None: 0, 1, ...
    z_v: torch.Tensor = None                  # (B, C, L, h, w) given video, normalised latents
    z_a: torch.Tensor = None                  # (B, A, n) given audio, normalised latents
    pictures: np.ndarray = None               # (B, H, W, 3) uint8, first frames
    sound_captions: list = None               # Harmony: captions of the audio
    speech: list = None                       # Harmony: transcripts
    refs: torch.Tensor = None                 # Harmony: (B, A, R) latents of the timbre wanted
    steps: int = STEPS["t2av"]                # Euler steps
    cfg: float = 1.                           # text guidance S
    sync_video: float = 1.                    # Harmony: s_v of SyncCFG
    sync_audio: float = 1.                    # Harmony: s_a of SyncCFG
    shift: float = 1.                         # of the noise levels, as in training
    guide_below: float = 1.                   # the highest noise level at which guidance acts

    def __post_init__(self):
        if self.seeds is None:
            self.seeds = list(range(len(self.captions)))

    def part(self, start, stop):
        """The same request for clips start .. stop - 1."""
        per_clip = {name: value[start:stop] for name, value in vars(self).items()
                    if isinstance(value, (list, np.ndarray, torch.Tensor))}
        return replace(self, **per_clip)


def encode_prompts(model, request):
    """-> (states, mask) of the captions, and of empty ones. For Harmony, states and mask of what
    its audio tower reads, [transcript; caption of the audio], follow in both."""
    device = next(model.parameters()).device
    captions = request.captions
    texts = [captions, request.sound_captions or captions, request.speech or [""] * len(captions)]
    letters = [text_bytes(text).to(device) for text in texts]                 # (B, 96) each

    def encode(caption, sound_caption, transcript):
        text = model.encode_text(caption)
        if model.cfg.system == "harmony":
            text = (*text, *model.encode_audio_text(sound_caption, transcript))
        return text

    # The null text is zero bytes, in both captions and the transcript.
    return encode(*letters), encode(*map(torch.zeros_like, letters))


def silent_audio(audio_vae, S, device):
    """Latents (1, A, S) of silence: what the VAE codes it as, which is not zero."""
    silence = torch.zeros(1, S * audio_vae.hop, device=device)
    return audio_vae.normalise(audio_vae.encode(silence)[0].float())


def static_video(vae, L, picture):
    """Latents (B, C, L, h, w) of a video in which `picture` (B, 3, 1, H, W) does not move."""
    # L latents are t (L - 1) + 1 frames.
    still = picture.expand(-1, -1, 1 + (L - 1) * vae.stride_t, -1, -1)
    return vae.normalise(vae.encode(still)[0].float())


def prepare_conditions(model, vae, audio_vae, request):
    """Request -> arguments of `sample_joint`: noise, given latents, guidance branches."""
    device = next(model.parameters()).device
    generators = make_generators(request.seeds)
    noise = {}
    for stream, shape in (("video", request.shape_v), ("audio", request.shape_a)):
        if shape is not None:
            noise[stream] = randn_each(generators, shape).to(device)

    # What is given: a stream, its beginning, or the first frame. What is missing is generated.
    known = {"video": request.z_v, "audio": request.z_a}
    picture = None
    if request.pictures is not None:
        picture = frames_to_tensor(request.pictures[:, None], device)         # (B, 3, 1, H, W)
        if request.z_v is None:
            known["video"] = vae.normalise(vae.encode(picture)[0].float())    # (B, C, 1, h, w)
    known = {stream: z for stream, z in known.items() if z is not None and stream in noise}
    missing = [s for s in noise if s not in known or known[s].shape[2] < noise[s].shape[2]]

    # SyncCFG (Harmony section 3.4) makes the streams agree more: the video is led away from the one
    # beside silence, the audio from the one beside a still picture. That partner is clean, as in
    # the one-way tasks of training; text, transcript and reference stay. A tower alone has none.
    text, null_text = encode_prompts(model, request)
    both = len(noise) == 2
    branches = {"cond": dict(text=text, scale={})}
    if both and "video" in missing and request.sync_video != 1:
        silence = silent_audio(audio_vae, request.shape_a[1], device)
        scale = {"video": request.sync_video}                 # Harmony eq. 9
        branches["silent"] = dict(text=text, audio=silence, scale=scale)
    if both and "audio" in missing and request.sync_audio != 1:
        if picture is None:
            # no first frame is given: a grey one
            sides = [n * vae.stride for n in request.shape_v[2:]]
            picture = torch.zeros(1, 3, 1, *sides, device=device)
        still = static_video(vae, request.shape_v[1], picture)
        scale = {"audio": request.sync_audio}                 # Harmony eq. 10
        branches["static"] = dict(text=text, video=still, scale=scale)

    # Text guidance, where there is any text
    texts = [*request.captions, *(request.sound_captions or []), *(request.speech or [])]
    if request.cfg != 1 and any(texts):
        scale = dict.fromkeys(noise, request.cfg)             # SyncFlow eq. 3
        branches["null"] = dict(text=null_text, scale=scale)
    # The steps are spread as the noise levels of training: Harmony has more at high noise.
    sigmas = sigma_steps(request.steps, request.shift)
    return dict(noise=noise, sigmas=sigmas, branches=branches, known=known, reference=request.refs,
                guide_below=request.guide_below)


def decode_video(vae, z, frames, pictures):
    """Latents (B, C, L, h, w), first frames uint8 or None -> uint8 (B, frames, H, W, 3)."""
    first = None if pictures is None else frames_to_tensor(pictures[:, None], z.device)
    video = tensor_to_frames(vae.decode(vae.denormalise(z), first)[:, :, :frames].float())
    if pictures is not None:
        # frame 0 is the picture itself
        video[:, 0] = pictures
    return video


def decode_audio(audio_vae, z, frames):
    """Latents (B, A, S) -> waveforms (B, samples) as long as so many frames."""
    wave = audio_vae.decode(audio_vae.denormalise(z), audio_length(audio_vae, frames)[0])
    return wave.float().clamp_(-1, 1).cpu().numpy()


def generate_audio_video(model, vae, audio_vae, captions, frames, size, autocast=nullcontext,
                         bar=None, attention_maps=None, **options):
    """Captions -> video uint8 (B, frames, H, W, 3), waveforms (B, samples); None for a stream that
    was given or is not generated. audio_vae=None: video alone. options: fields of `JointRequest`.

    attention_maps: a list that gets of every batch a dict of `attention` (see `attention_map`) and,
    with SyncCFG, `sync_pull` (B, L, h, w), how strongly it pulls (figure 5 of Harmony's
    supplement)."""
    # Shapes of the latents of one clip
    shape_v = shape_a = None
    if not model.cfg.audio_only:
        sides = [n // vae.stride for n in data.sides(size)]
        shape_v = (model.cfg.latent, n_latents(vae, frames), *sides)
    if audio_vae is not None:
        _, S = audio_length(audio_vae, complete_frames(vae, frames))
        shape_a = (model.cfg.audio_latent, S)
    request = JointRequest(captions, shape_v, shape_a, **options)

    # A batch at a time: conditions, sampling, decoding
    videos, waves = [], []
    for i in range(0, len(captions), BATCH):
        batch = request.part(i, i + BATCH)
        pulls = []
        with torch.no_grad(), autocast():
            conditions = prepare_conditions(model, vae, audio_vae, batch)
            x = sample_joint(model, **conditions, bar=bar, pulls=pulls)
            if shape_v and batch.z_v is None:
                videos.append(decode_video(vae, x["video"], frames, batch.pictures))
            if shape_a and batch.z_a is None:
                waves.append(decode_audio(audio_vae, x["audio"], frames))
            if attention_maps is not None:
                maps = dict(attention=attention_map(model, x, **conditions))
                if pulls:
                    maps["sync_pull"] = torch.stack(pulls).mean(0).cpu()
                attention_maps.append(maps)
    return [np.concatenate(parts) if parts else None for parts in (videos, waves)]


def attention_map(model, x, branches, reference, **_):
    """Like figure 3 of Harmony's supplement: where in a finished clip each audio latent attends ->
    (B, S, L, h, w), h and w in tokens.

    The paper shows the audio-to-video bridge. Its rows are softmaxes over the audio, so here it is
    the other bridge, whose rows are over the picture. Means over layers and heads, which sum to 1
    over (L, h, w)."""
    # One pass over the finished, clean latents; every layer appends (B, heads, S, L·h·w).
    video, maps = x["video"], []
    clean = torch.zeros(len(video), device=video.device)
    text = branches["cond"]["text"]
    model(video, x["audio"], clean, clean, *text, ref=reference, attention_maps=maps)
    grid = (video.shape[2], *(n // model.cfg.patch for n in video.shape[3:]))
    return torch.stack(maps).mean((0, 2)).float().cpu().unflatten(2, grid)


def encode_video(vae, frames):
    """uint8 (frames, H, W, 3), or an iterator of such pieces of a video -> normalised latents
    (1, C, L, h, w)."""
    pieces = [frames] if isinstance(frames, np.ndarray) else frames
    with torch.no_grad():
        z = vae.encode_chunks(torch.tensor(piece).movedim(-1, 0)[None] for piece in pieces)[0]
        return vae.normalise(z)


def encode_sound(audio_vae, wave, device):
    """Waveform (samples,) at the VAE's rate -> normalised latents (1, A, S)."""
    with torch.no_grad():
        z = audio_vae.encode(torch.from_numpy(wave)[None].to(device))[0]
        return audio_vae.normalise(z.float())


def video_to_audio(model, vae, audio_vae, frames, prompt, autocast=nullcontext, seed=0, bar=None,
                   **options):
    """A waveform for a video uint8 (frames, H, W, 3), or an iterator of its pieces, of any length.

    The towers were trained on 13 latents. A longer video goes through windows of latent 0 (the
    first frame) and WINDOW - 1 consecutive ones; audio where two windows overlap is given to the
    later one. options: fields of `JointRequest`.

        with WINDOW = 7, OVERLAP = 2                   audio, from one latent before
        window 0    0 1 2 3 4 5 6                      |============|
        window 1    0         5 6 7 8 9 10                     |gggg|=======|
        window 2    0                 9 10 11 12 ...                   |gggg|=======|

    g: given. The last window ends with the video."""
    device = next(model.parameters()).device
    # Of the frames no more is kept than the first one and how many there are.
    pieces = iter([frames] if isinstance(frames, np.ndarray) else frames)
    piece = next(pieces)
    picture = piece[:1]
    lengths = []

    def counted():
        for part in chain([piece], pieces):
            lengths.append(len(part))
            yield part

    z = encode_video(vae, counted())
    n_frames = sum(lengths)
    _, S = audio_length(audio_vae, complete_frames(vae, n_frames))
    # Where the windows begin; a short video has one of its length
    last_start = max(1, z.shape[2] - WINDOW + 1)
    starts = [*range(1, last_start, WINDOW - 1 - OVERLAP), last_start]
    audio = torch.zeros(1, model.cfg.audio_latent, 0, device=device)
    for k, start in enumerate(starts):
        # The window: latent 0, then latents from `start` on
        z_window = torch.cat([z[:, :, :1], z[:, :, start:start + WINDOW - 1]], 2)
        # Latent `start` is latent 1 of the window, so its audio begins one latent earlier. A window
        # has as many audio latents as a clip of training; the last one reaches to the end, which
        # may be one more, since `offset` is rounded.
        offset = round((start - 1) * model.cfg.alpha)
        _, n_audio = audio_length(audio_vae, (z_window.shape[2] - 1) * vae.stride_t + 1)
        if start == last_start:
            n_audio = max(n_audio, S - offset)
        shape_a = (model.cfg.audio_latent, n_audio)
        # Audio that the windows before have generated is given. Seeds of windows are so far apart
        # that no other clip has them.
        request = JointRequest([prompt], z_window.shape[1:], shape_a, seeds=[seed + 10 ** 6 * k],
                               z_v=z_window, z_a=audio[:, :, offset:] if k else None,
                               pictures=picture, **options)
        with torch.no_grad(), autocast():
            conditions = prepare_conditions(model, vae, audio_vae, request)
            x = sample_joint(model, **conditions, bar=bar)["audio"]
        audio = torch.cat([audio[:, :, :offset], x.to(audio)], 2)
    with torch.no_grad():
        return decode_audio(audio_vae, audio, n_frames)[0]


# ------------------------------------------------------------------------ inputs and outputs

def read_delayed_audio(path, delay, rate=RATE):
    """Sound file -> waveform of the same length, delayed by so many seconds (earlier if < 0)."""
    wave = data.read_audio(path, rate)
    n = max(-len(wave), min(len(wave), round(delay * rate)))
    moved = np.pad(wave, (n, 0)) if n > 0 else wave[-n:]      # n = 0: all of it
    return fit_length(moved, len(wave))


def read_reference(path, audio_vae, device):
    """Recording of a voice or thing -> latents (1, A, R), from where it is audible: of at most
    one window of training, 2 s, since the towers have met no earlier positions (the paper: 3 s)."""
    rate = audio_vae.cfg.rate
    wave = data.read_audio(path, rate)
    # Audible: a fiftieth of the peak, and more than 3 steps of 16-bit audio. From 50 ms before, so
    # that the attack is complete
    audible = np.flatnonzero(np.abs(wave) > max(1e-4, .02 * np.abs(wave).max()))
    start = max(0, audible[0] - rate // 20) if len(audible) else len(wave)
    wave = wave[start:][:data.FRAMES * rate // FPS]
    if len(wave) < rate // 2:
        raise BadInput(f"{path}: {len(wave) / rate:.2f} s of sound; "
                       "a reference needs at least 0.5 s, better 1 to 2")
    return encode_sound(audio_vae, wave, device)


# Texts and files of a job: the flags or fields of --jsonl that give it, names of this repository
# before those of Harmony-Bench.
INPUTS = {"prompt": ("prompt", "video_caption", "audio_caption"),
          "sound_prompt": ("audio_caption", "prompt", "video_caption"),
          "transcript": ("transcript", "spoken_word_en", "spoken_word_zh"),
          "audio": ("audio",), "image": ("image",), "video": ("video",),
          "ref_audio": ("ref_audio",)}


def read_jobs(args):
    """What to generate, a dict each: the flags, or a line of --jsonl in place of the inputs."""
    def make_job(record, stem=None):
        job = {"stem": stem}
        for field, names in INPUTS.items():
            job[field] = next((record[name] for name in names if record.get(name)), "")
        return job

    if not args.jsonl:
        return [make_job(vars(args))]
    for name in INPUTS:
        if getattr(args, name, None):
            raise BadInput(f"--{name.replace('_', '-')} with --jsonl: leave it out, and write it "
                           "into the lines of the list")
    jobs = {}
    text = data.check_file(args.jsonl, "list").read_text("utf-8-sig", errors="replace")
    # Not by `splitlines`: JSON may hold the other characters at which that splits.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            # The id names the file, so it must be a name, and the only one.
            job = make_job(record, record.get("id", f"{number:04d}"))
            fits = all(isinstance(value, str) for value in job.values())
            # 200 bytes leave room for the rest of a file's name, which may have 255.
            fits = fits and 0 < len(os.fsencode(job["stem"])) <= 200 and job["stem"].isprintable()
        except (ValueError, AttributeError, RecursionError):  # no JSON, or no object
            fits = False
        if not fits or Path(job["stem"]).name != job["stem"] or job["stem"] in jobs:
            raise BadInput(f"{args.jsonl} line {number}: expected a JSON object of texts, with the "
                           "fields that --help names at --jsonl and an id of its own, a file name")
        jobs[job["stem"]] = job
    if not jobs:
        raise BadInput(f"{args.jsonl}: no line with a record; write one JSON object a line")
    return list(jobs.values())


# Names of files, not of folders
OTHER_KINDS = (".avi", ".m4v", ".mkv", ".mov", ".webm", ".gif", ".png", ".jpg", ".wav", ".mp3")


def output_file(args, job):
    """--out itself, or a file in it named after the record, the given clip or audio, the text."""
    kind = Path(args.out).suffix.lower()
    if kind in OTHER_KINDS:
        raise BadInput(f"--out {args.out}: only .mp4 is written; give x.mp4, or a folder")
    if kind == ".mp4":
        if args.jsonl:
            raise BadInput(f"--out {args.out}: a list makes many files; give a folder")
        return Path(args.out)
    # The first eight words of the text, without what file systems may not take
    text = "".join(c if c.isalnum() else " " for c in job["prompt"] or job["transcript"])
    name = job["video"] or job["audio"] or "-".join(text.split()[:8])[:50] or "sample"
    return Path(args.out) / f"{job['stem'] or Path(name).stem}.mp4"


def longest_text(jobs):
    """Bytes of the longest caption or transcript"""
    longest = 0
    for job in jobs:
        for name in ("prompt", "sound_prompt", "transcript"):
            longest = max(longest, len(job[name].encode(errors="replace")))
    return longest


def is_finished(path, args):
    """What a list has finished is not written again. The strip is written last."""
    return args.jsonl and os.path.isfile(path) and os.path.isfile(path.with_suffix(".png"))


def check_inputs(jobs, args):
    """BadInput where a line of a list names a file that is not there, and that no line before it
    writes. (Of a single clip they are opened at once.)"""
    written = set()
    for job in jobs if args.jsonl else ():
        path = output_file(args, job)
        for name in ("audio", "image", "video", "ref_audio"):
            file = job[name]
            is_there = not file or os.path.isfile(file) or os.path.realpath(file) in written
            if not is_there and not is_finished(path, args):
                raise BadInput(f"{args.jsonl} record {job['stem']}: {name} {file}: no such file; "
                               "check the path")
        written.add(os.path.realpath(path))


def check_outputs(jobs, args):
    """BadInput where a clip, or the strip beside it, would take the place of an input."""
    inputs = set()
    for job in jobs:
        files = [job[name] for name in ("audio", "image", "video", "ref_audio")]
        inputs |= {os.path.realpath(file) for file in files if os.path.isfile(file)}
    for path in [output_file(args, job) for job in jobs]:
        files = [path, path.with_suffix(".png")]
        if os.path.isfile(path.parent):
            raise BadInput(f"--out {args.out}: {path.parent} is a file; give a folder, or x.mp4")
        if os.path.isdir(path):
            raise BadInput(f"{path}: is a folder; give another --out")
        # What a list has finished may be an input of its other lines.
        for file in files:
            is_input = os.path.isfile(file) and os.path.realpath(file) in inputs
            if is_input and not is_finished(path, args):
                raise BadInput(f"{file}: is an input, and would be written over; "
                               "give another --out")


def draw_maps(video, t, attention, sync_pull=None):
    """Figures 3 and 5 of Harmony's supplement as film strips of video (F, H, W, 3) uint8, t frames
    a latent: where each moment of the audio attends in its frame (S, L, h, w), where SyncCFG pulls
    (L, h, w)."""
    # Per latent: attention as the mean over the audio latents within half a latent of it
    S, L = attention.shape[:2]
    attended = []
    for l in range(L):
        near = slice(max(0, round((l - .5) / L * S)), round((l + .5) / L * S) + 1)
        attended.append(attention[near, l].mean(0))           # (h, w)
    # Latent 0 is frame 0, latent l the t frames up to t l.
    latent_of = np.ceil(np.arange(len(video)) / t).astype(int)
    strips = []
    for cells in [torch.stack(attended)] + ([] if sync_pull is None else [sync_pull]):
        # Every latent scaled to 1, enlarged to pixels, and laid over its frames
        cells = cells / cells.amax((1, 2), keepdim=True).clamp(min=1e-9)
        cells = F.interpolate(cells[:, None], video.shape[1:3])[:, 0]         # (L, H, W)
        glow = cells[latent_of].numpy()[..., None] * [165., 110., 0.]         # orange on dark
        strip = data.film_strip((video * .35 + glow).astype(np.uint8), np.zeros(1))
        strips.append(strip[:video.shape[1]])                 # without its waveform
    return strips


def write_strip(path, video, wave, rate, maps=()):
    """Beside a clip, a .png: its frames over the waveform, below the maps of Harmony."""
    strip = data.film_strip(video, wave, rate=rate)
    data.write_picture(path.with_suffix(".png"), np.concatenate([*maps, strip]))


def keep_minute(pieces, shown):
    """The pieces of a video (f, H, W, 3) as they come; the first minute is added to a list."""
    for piece in pieces:
        left = MINUTE - sum(map(len, shown))
        if left > 0:
            shown.append(piece[:left])
        yield piece


def write_clip(path, pieces, wave, rate=RATE, maps=()):
    """Pieces of a video (f, H, W, 3) -> an .mp4 with its sound, and its strip."""
    shown = []
    data.write_video(path, keep_minute(pieces, shown), wave, rate=rate)
    write_strip(path, np.concatenate(shown), wave, rate, maps)


def shortest_clip(system):
    """One Euler step of each network of a system: what --dtype auto times."""
    model, vae, size = system.model, system.vae, system.checkpoint["size"]
    if system.task != "a2v":
        generate_audio_video(model, vae, system.audio_vae, ["a"], data.FRAMES, size, steps=1)
        return
    picture = np.zeros((*data.sides(size), 3), np.uint8)
    steps = 3 if model.cfg.context_sigma == "shared" else 1
    # One latent after the first
    list(generate_video(model, vae, [picture], [np.zeros(RATE, np.float32)], ["a"],
                        vae.stride_t + 1, steps=steps))


def autocast_for(system, dtype, device):
    """`pick_autocast` of a system. Published networks, of 2 billion parameters, are not timed."""
    is_published = system.model.cfg.text_encoder == "external"
    return pick_autocast(dtype, device, None if is_published else partial(shortest_clip, system))


# --------------------------------------------------------------------------------- benchmark

@torch.no_grad()
def benchmark(system, autocast, steps):
    """What guidance, audio and the cache cost, on 2 s clips of the checkpoint's size.

    Prints ratios of median times (the first run over the second), then the seconds of computing for
    a second of video, without reading and writing files. The last line is all of it as JSON."""
    model, vae = system.model, system.vae
    text = ["a ball drops"]
    size = data.sides(system.checkpoint["size"])
    own = recommended(system.checkpoint, steps=steps)

    def video(steps=steps, **settings):
        picture = np.full((1, *size, 3), 128, np.uint8)
        wave = np.zeros(2 * RATE, np.float32)
        list(generate_video(model, vae, picture, [wave], text, data.FRAMES, autocast, steps=steps,
                            **settings))

    def both(audio_vae=system.audio_vae, steps=steps, **settings):
        generate_audio_video(model, vae, audio_vae, text, data.FRAMES, size, autocast, steps=steps,
                             **settings)

    # Which runs are compared: the first over the second
    if system.task == "a2v" and model.cfg.context_sigma == "shared":
        run = published_sampler(model, vae, size, steps)
        own_clip = partial(run, asg=own["asg"])
        pairs = {"asg_on_off": (partial(run, asg=2.), run),
                 "audio_on_off": (run, partial(run, audio=None)),
                 "plain_cached": (partial(run, cached=False), run)}
    elif system.task == "a2v":
        own_clip = partial(video, **own)
        pairs = {"asg_on_off": (partial(video, asg=2., cfg=4.), partial(video, cfg=4.)),
                 "audio_on_off": (video, partial(video, use_audio=False))}
        for latents in (16, 30):
            with autocast():
                runs = context_runs(model, vae, size, latents, steps)
            pairs[f"context_recomputed_cached_{latents}"] = runs
    else:
        own_clip = partial(both, **own)
        on = dict(sync_video=3., sync_audio=2.) if system.task == "joint" else dict(cfg=2.)
        pairs = {"guidance_on_off": (partial(both, **on), both),
                 "audio_tower_on_off": (both, partial(both, audio_vae=None))}

    ratios = {}
    for name, runs in pairs.items():
        a, b = median_seconds(runs, autocast)
        ratios[name] = round(a / b, 3)
        print(f"{name:28s}{a / b:6.2f}   {a:.3f} s against {b:.3f} s", flush=True)
    seconds, = median_seconds([own_clip], autocast)
    parts = {"second": data.FRAMES / FPS}
    if system.task == "a2v":
        # latent 0 is given; two towers generate all latents at once
        parts["latent"] = n_latents(vae, data.FRAMES) - 1
    for part, n in parts.items():
        ratios[f"seconds_per_{part}"] = round(seconds / n, 3)
        print(f"{f'seconds_per_{part}':28s}{seconds / n:6.2f}   of computing, of video; "
              f"{steps} steps, the checkpoint's guidance")
    print(json.dumps(ratios))


def median_seconds(runs, autocast, rounds=8):
    """Median time of every function; they take turns, so that a machine that slows down slows all
    of them down."""
    times = np.zeros((rounds, len(runs)))
    for i, j in np.ndindex(times.shape):
        start = time.perf_counter()
        with autocast():
            runs[j]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times[i, j] = time.perf_counter() - start
    # The first round warms up.
    return np.median(times[1:], 0)


def published_sampler(model, vae, size, steps):
    """Of a model in Pyramid Flow's layout: a function that samples the latents of a 2 s clip, with
    text guidance. Its conditions are random: the published encoders take longer than the clip."""
    cfg = model.cfg
    device = next(model.parameters()).device
    L = n_latents(vae, data.FRAMES)
    z = torch.randn(1, cfg.latent, L, *[n // vae.stride for n in size], device=device)
    # 58 and 24 of the 128 tokens that T5 pads to: the published quality prompts are about so long
    mask = torch.arange(128, device=device) < torch.tensor([[58], [24]], device=device)
    text = torch.randn(2, 128, cfg.text_dim, device=device)
    pooled = torch.randn(2, cfg.pooled_dim, device=device)
    sound = torch.randn(1, math.ceil(L * cfg.alpha), cfg.audio_dim, device=device)
    stage_steps = calls_per_stage(steps)

    def run(audio=sound, asg=0., cached=True):
        network = pyramid.with_guidance(model, text, mask, pooled, audio, asg, 4., cached)
        for _ in pyramid.sample_pyramid(network, z[:, :, :1], L, z[:, :, 1:], stage_steps,
                                        keep=cfg.context):
            pass

    return run


def context_runs(model, vae, size, latents, steps):
    """Two functions that sample the last of so many latents: with the context recomputed in every
    step, and from the cache, which the latent before it joins in the first step."""
    samples = round((latents * vae.stride_t / FPS + .2) * RATE)
    wave = np.zeros(samples, np.float32)
    audio, (text, _, pooled) = encode_conditions(model, [wave], ["a ball drops"], samples, 0.)
    sides = [n // vae.stride for n in size]
    z = torch.randn(1, model.cfg.latent, latents, *sides, device=text.device)
    x = z[:, :, -1:]
    sigma = torch.full((1, 1), .5, device=text.device)
    cache = KVCache(model, z[:, :, :1], text, pooled, audio)
    for l in range(1, latents - 2):
        cache.append(z[:, :, l:l + 1])

    def recomputed():
        for _ in range(steps):
            model.forward_teacher_forced(z, x, sigma, text, pooled, audio)

    def cached():
        # each time it goes on by a latent
        cache.append(x)
        for _ in range(steps):
            cache.denoise_step(x, .5)

    return recomputed, cached


# ------------------------------------------------------------------------------- the command

ALL = " ".join(SYSTEMS)
NOT_NEGATIVE = data.number(low=0)
FLAGS = {   # the systems that take it; what it may be (bool: a switch, a tuple: one of them); help
    "audio": ("a2v joint", str, "audio that drives the video: any sound file, a clip with sound"),
    "image": (ALL, str, "the first frame: any picture (cropped to the model's aspect)"),
    "prompt": (ALL, str, "a caption; alone it generates video and audio"),
    "video": ("t2av joint", str, "a clip to generate audio for; its frames stay as they are"),
    "transcript": ("joint", str, "Harmony: what is said"),
    "ref_audio": ("joint", str, "Harmony: 1 to 2 s of the voice or thing to sound like"),
    "jsonl": (ALL, str, "many at once: a JSON object a line, with prompt (or video_caption, "
              "audio_caption), transcript (or spoken_word_en, spoken_word_zh), audio, image, "
              "video, ref_audio, id; goes on where it was stopped"),
    "maps": ("joint", bool, "Harmony: draw where the audio attends and where SyncCFG pulls"),
    # Guidance; of what is not given, the checkpoint's is taken
    "asg": ("a2v", NOT_NEGATIVE, "Syncphony: w_a, Audio Sync Guidance; 0 = off"),
    "cfg": (ALL, NOT_NEGATIVE,
            "text guidance: Syncphony's w_t, 0 = off; of two towers S, 1 = off"),
    "still": ("a2v", NOT_NEGATIVE, "takes away so much of all motion, for less flicker; 0 = off"),
    "sync_video": ("joint", NOT_NEGATIVE, "Harmony: s_v of SyncCFG, 1 = off"),
    "sync_audio": ("joint", NOT_NEGATIVE, "Harmony: s_a of SyncCFG, 1 = off"),
    "guide_below": ("t2av joint", data.number(low=0, high=1),
                    "two towers: guidance acts at noise levels up to this, 1 = in every step"),
    "steps": (ALL, data.number(int, 1, 1000),
              "Euler steps, of a2v per latent; default: the checkpoint's, else its paper's"),
    "seconds": (ALL, data.number(low=.1, high=data.MAX_SOUND),
                "length of the video: the audio's, or 2 s"),
    "resolution": ("t2av joint", data.picture_size, "two towers: another than in training"),
    "shift_audio": ("a2v joint", data.number(), "delay the audio by so many seconds"),
    "seed": (ALL, data.number(int, 0), "seed of the noise"),
    "ckpt": (ALL, str, "a checkpoint; default: of weights/ Syncphony's for --audio "
             "and --image, Harmony's for inputs that are its own, else SyncFlow's"),
    "vae": (ALL, str, "its VAE, if that is neither in weights/ nor beside it"),
    "audio_vae": ("t2av joint", str, "likewise the audio VAE of two towers"),
    "pretrained": ("a2v", str, "of a model on Pyramid Flow: that folder"),
    "hubert": ("a2v", str, "of such a model: its HuBERT, a folder or a name on the hub"),
    "tiles": ("a2v", bool, "of such a model: decode in tiles, for memory"),
    "device": (ALL, ("auto", "cuda", "mps", "cpu"), "where to run"),
    "dtype": (ALL, ("auto", "float32", "bfloat16"), "bfloat16: autocast; auto: the faster one, as "
              "measured"),
    "compile": (ALL, bool, "torch.compile: a slow start, then faster steps"),
    "out": (ALL, str, "a folder, or the name of the .mp4"),
    "bench": (ALL, bool,
              "measure what guidance, audio and cache cost (with --prompt: two towers), and stop"),
}


DEFAULTS = dict(device="auto", dtype="auto", out="out/", seed=0, shift_audio=0.)
# What --bench reads; its clip and its guidance are always the same.
BENCH = "prompt ckpt vae audio_vae pretrained device dtype compile steps bench".split()


def arguments():
    p = data.Parser(__doc__)
    for name, (_, kind, text) in FLAGS.items():
        options = dict(type=kind)
        if kind is bool:
            options = dict(action="store_true")
        elif isinstance(kind, tuple):
            options = dict(choices=kind)
        p.add_argument("--" + name.replace("_", "-"), help=text, **options)
    p.set_defaults(**DEFAULTS)
    return p


def is_given(name, value):
    """Is this value of a flag, or of a record, more than the default? 0 is a value."""
    return value is not None and value is not False and value != DEFAULTS.get(name, "")


def default_checkpoint(args):
    """The shipped checkpoint that takes these inputs."""
    own = [name for name in FLAGS if FLAGS[name][0] == "joint"]
    if args.jsonl or any(is_given(name, getattr(args, name)) for name in own):
        return str(JOINT_FILE)
    if args.video or (args.prompt and not args.audio):
        return str(T2AV_FILE)
    if not (args.image and args.audio):
        return str(A2V_FILE)
    # Weights of real clips for what the toybox cannot have drawn
    drawn = is_toybox_picture(data.read_image(args.image, 32))
    weights = A2V_FILE if drawn else REAL_A2V_FILE
    kind = "a" if drawn else "not a"
    print(f"{data.one_line(args.image)}: {kind} toybox picture; weights/{weights.name}")
    return str(weights)


def check_job(system, job, args):
    """BadInput where an input is missing, or is of another system."""
    task = system.task
    record = f"{args.jsonl} record {job['stem']}: " if args.jsonl else ""
    # Inputs of another system: a flag is never ignored.
    given = vars(args) | job
    for name in FLAGS:
        tasks = FLAGS[name][0].split()
        if is_given(name, given[name]) and task not in tasks:
            raise BadInput(f"{record}--{name.replace('_', '-')} is an input of "
                           f"{' and '.join(SYSTEMS[t] for t in tasks)}, but {args.ckpt} is of "
                           f"{SYSTEMS[task]}; leave it out, or give --ckpt of --task {tasks[0]}")
    # What is missing, and what excludes each other
    if task == "a2v":
        if not (job["audio"] and job["image"]):
            raise BadInput(f"{record}{args.ckpt} is of Syncphony, for which --audio and --image "
                           "are both needed; --prompt alone, or --video, is for the other two "
                           "systems: leave --ckpt out; audio alone is for --ckpt "
                           "weights/joint-toybox.pt")
    elif system.model.cfg.audio_only:
        raise BadInput(f"{args.ckpt}: of --no-video, an ablation for cyclesync.py; give another")
    elif not (job["prompt"] or job["video"] or job["audio"] or job["transcript"]):
        raise BadInput(f"{record}--prompt is empty; give a caption or a --video (to Harmony also "
                       "--audio or --transcript)")
    elif job["video"]:
        for name in ("audio", "image", "maps"):
            if given[name]:
                raise BadInput(f"{record}--video: nothing but its audio is generated; "
                               f"leave --{name} out")


def check_flags(system, jobs, args):
    """BadInput where a flag would change nothing in any of the jobs."""
    is_a2v = system.task == "a2v"
    on_pyramid = is_a2v and system.model.cfg.text_encoder == "external"
    texts = [job["prompt"] or job["sound_prompt"] or job["transcript"] for job in jobs]
    # On Pyramid Flow guidance is away from a prompt of flaws, with or without a caption.
    guided = on_pyramid or any(texts) or args.cfg == (0 if is_a2v else 1)
    used = {"seconds": (not all(job["video"] for job in jobs), "the audio is as long as --video"),
            "shift_audio": (any(job["audio"] for job in jobs), "no audio is given"),
            "cfg": (guided, "no text is given"),
            "sync_video": (args.sync_video == 1 or not all(job["video"] for job in jobs),
                           "the video is given"),
            "sync_audio": (args.sync_audio == 1 or not all(job["audio"] for job in jobs),
                           "the audio is given"),
            "still": (not on_pyramid, f"{args.ckpt} is on Pyramid Flow")}
    if not is_a2v:
        settings = recommended(system.checkpoint, **vars(args))
        acts = [settings["cfg"] != 1 and any(texts)]
        acts += [settings.get(f"sync_{part}", 1) != 1 and not all(job[part] for job in jobs)
                 for part in ("video", "audio")]
        used["guide_below"] = any(acts), "there is no guidance"
    used |= {name: (on_pyramid, f"{args.ckpt} is not on Pyramid Flow")
             for name in ("pretrained", "hubert", "tiles")}
    for name, (is_used, reason) in used.items():
        if is_given(name, getattr(args, name)) and not is_used:
            raise BadInput(f"--{name.replace('_', '-')} would change nothing, since {reason}; "
                           "leave it out")


def check_bench(system, args):
    """BadInput where a flag would change nothing of --bench."""
    for name in FLAGS:
        if name not in BENCH and is_given(name, getattr(args, name)):
            raise BadInput(f"--{name.replace('_', '-')} is not read by --bench; leave it out")
    if args.pretrained and system.model.cfg.text_encoder != "external":
        raise BadInput(f"--pretrained would change nothing, since {args.ckpt} is not on Pyramid "
                       "Flow; give --ckpt of a model that is")


def warn_of_training(checkpoint, settings, hubert=None):
    """Say what a checkpoint cannot do well, because of how it was trained. hubert: --hubert."""
    # SyncFlow is complete after stage "audio", Harmony after "joint".
    task = checkpoint["task"]
    stage = checkpoint.get("stage", "joint")
    if stage == "video" or (task == "joint" and stage != "joint"):
        print(f"of --stage {stage}: not all of the network is trained yet; better --ckpt of the "
              "last stage")
    # SyncCFG compares with clean partners, which a model knows from the one-way tasks alone.
    trained = checkpoint["args"]
    joint_alone = 0 in (trained.get("lambda_v"), trained.get("lambda_a"))
    if joint_alone and max(settings["sync_video"], settings["sync_audio"]) > 1:
        print("trained without a one-way task (--lambda-v 0 or --lambda-a 0), it does not know the "
              "partners of SyncCFG: better --sync-video 1 --sync-audio 1")
    # Models of the same width are not told apart in another way.
    if hubert and hubert != trained.get("hubert"):
        print(f"--hubert {hubert}: it was trained with {trained.get('hubert')}; make sure that "
              "this is the same model")


def run_job(system, job, path, args, bar, settings):
    """Generate what a job does not give, and write it -> number of frames."""
    model = system.model
    audio_vae = system.audio_vae
    rate = audio_vae.cfg.rate if audio_vae else RATE
    size = args.resolution or system.checkpoint["size"]
    options = dict(settings, bar=bar)
    # What is given. The video is as long as its audio, or 2 s, unless --seconds says otherwise.
    picture = data.read_image(job["image"], size) if job["image"] else None
    wave = read_delayed_audio(job["audio"], args.shift_audio, rate) if job["audio"] else None
    if wave is not None and not wave.any():
        print("the sound is silent, or --shift-audio moves it out of the clip: nothing will move "
              "at it")
    seconds = data.FRAMES / FPS if wave is None else len(wave) / rate
    frames = max(2, round((args.seconds or seconds) * FPS))
    if frames > LONGEST and system.task != "a2v" and not job["video"]:
        raise BadInput(f"{frames / FPS:.0f} s: two towers generate a clip as a whole, of up to "
                       f"{LONGEST // FPS} s; give --seconds, or another --ckpt")

    # Syncphony writes piece for piece.
    if system.task == "a2v":
        bar.reset((n_latents(system.vae, frames) - 1) * settings["steps"])
        pieces = generate_video(model, system.vae, [picture], [wave], [job["prompt"]], frames,
                                seeds=[args.seed], tiles=args.tiles, **options)
        write_clip(path, (piece[0] for piece in pieces), wave)
        return frames

    device = next(model.parameters()).device
    options |= dict(speech=[job["transcript"]], sound_captions=[job["sound_prompt"]])
    if job["ref_audio"]:
        options["refs"] = read_reference(job["ref_audio"], audio_vae, device)
    # Two towers: audio for a given video, whose file keeps its frames ...
    if job["video"]:
        shown, times = [], {}
        pieces = keep_minute(data.stream_video(job["video"], size, times), shown)
        wave = video_to_audio(model, system.vae, audio_vae, pieces, job["prompt"], seed=args.seed,
                              **options)
        # In the file there may be silence before the first picture.
        first, _, _ = times["showinfo_6"]
        silence = max(0, round((first - times.get("start", first)) * rate))
        data.add_sound(path, job["video"], np.pad(wave, (silence, 0)), rate)
        write_strip(path, np.concatenate(shown), wave, rate)
        return round(len(wave) / rate * FPS)

    # ... or both streams, or a video for given audio, which is cut or padded to its length
    if wave is not None:
        samples, _ = audio_length(audio_vae, complete_frames(system.vae, frames))
        options["z_a"] = encode_sound(audio_vae, fit_length(wave, samples), device)
    maps = [] if args.maps else None
    video, waves = generate_audio_video(
        model, system.vae, audio_vae, [job["prompt"]], frames, size, seeds=[args.seed],
        pictures=None if picture is None else picture[None], attention_maps=maps, **options)
    wave = waves[0] if wave is None else wave
    if maps:
        of_clip = {name: cells[0] for name, cells in maps[0].items()}
        # As much as the strip below them shows
        maps = draw_maps(video[0][:MINUTE], system.vae.stride_t, **of_clip)
    write_clip(path, [video[0]], wave, rate, maps or [])
    return frames


@torch.no_grad()
def main():
    # What to sample from
    args = arguments().parse_args()
    device, place = pick_device(args.device)
    args.ckpt = args.ckpt or default_checkpoint(args)
    system = load(args.ckpt, device, args.vae, args.audio_vae, args.pretrained)
    autocast, precision = autocast_for(system, args.dtype, device)
    task = system.task
    checkpoint = system.checkpoint
    if args.compile:
        compile_network(system.model)
    if args.bench:
        check_bench(system, args)
        return benchmark(system, autocast, recommended(checkpoint, **vars(args))["steps"])

    # What to generate: all of it is checked before the first is begun.
    jobs = read_jobs(args)
    for job in jobs:
        check_job(system, job, args)
    check_flags(system, jobs, args)
    check_outputs(jobs, args)
    check_inputs(jobs, args)

    settings = recommended(checkpoint, **vars(args))
    if task == "a2v" and system.model.cfg.context_sigma == "shared":
        calls_per_stage(settings["steps"])                    # before encoders of 11 GB are loaded
    numbers = ", ".join(f"{name.replace('_', '-')} {v:g}" for name, v in settings.items())
    name = data.one_line(Path(args.ckpt).name)
    print(f"{place}, {precision}\n{name}: {SYSTEMS[task]}, EMA weights after step "
          f"{checkpoint['step']}\n{numbers}")
    warn_of_training(checkpoint, settings, args.hubert)
    settings["autocast"] = autocast

    # Encoders of a model on Pyramid Flow encode all prompts at once: T5 takes 11 GB.
    prompts = [job["prompt"] for job in jobs]
    if task == "a2v":
        settings["encoders"] = external_encoders(system.model, args, prompts, device)
    if settings.get("encoders") is None and longest_text(jobs) > TEXT_BYTES:
        print(f"the text encoders read the first {TEXT_BYTES} bytes of a caption or transcript")

    # inference_mode spares the bookkeeping of views, too, 8 % of a cached step of a small network.
    # But in it autocast casts a weight at every use, and keeps none that it has cast (torch 2.13).
    mode = torch.inference_mode if autocast is nullcontext else torch.no_grad
    # One file after the other
    for job in jobs:
        path = output_file(args, job)
        # A list goes on where it was interrupted.
        if is_finished(path, args):
            print(f"{data.one_line(path)}: exists already")
            continue
        start = time.perf_counter()
        with tqdm(disable=None, leave=False, unit="step") as bar, mode():
            frames = run_job(system, job, path, args, bar, settings)
        seconds = time.perf_counter() - start
        print(f"{data.one_line(path)}: {seconds:.1f} s for {frames / FPS:.2f} s of video, "
              f"seed {args.seed}")


if __name__ == "__main__":
    data.run_cli(main)
