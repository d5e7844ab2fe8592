"""Sampling: a picture and a sound become a video that moves with the sound; a text becomes both; a video gets a sound.

Latent 0 is the given picture. Every later latent starts as noise and takes `steps` Euler steps down the path of losses.py,

    x <- x + (sigma_next - sigma) v                  sigma from 1 to 0

looking back on the finished latents (kept as keys and values, exactly; see model.py) and into the sound around it. When it
is done it joins the context and the next one starts: a minute of sound makes a minute of video in constant memory.
A model of Pyramid Flow's layout goes its three stages instead, from coarse to fine (`sample_pyramid`); its checkpoint says so.

v is guided (Syncphony eq. 6). Three evaluations of the same weights share one batch:

    full        text and audio                                                 v(c)
    null text   the empty caption, audio on                                    v(null)
    off-sync    text on, audio LAYERS left out: what the model would do deaf   v_off(c)

    v = v(c) + w_a [v(c) - v_off(c)] + w_t [v(c) - v(null)]

Full and off-sync are the same up to the first audio layer, so those blocks run once for both. --asg is w_a and --cfg is
w_t; in the form of losses.combine_guidance they are S - 1. A weight of 0 leaves its branch out. Without a prompt there is no text to
guide by, and --cfg rests.

**Both at once** (SyncFlow). Two towers on one clock: picture and sound go from noise to clean together, every step in one call
(`sample_syncflow`). Adding sound to a GIVEN video needs no training: at every step the video's latents are replaced by the true ones at
this step's noise level, (1 - s) z + s eps with one eps, and the audio tower sees what it has always seen.

**Harmony** (`sample_harmony`): the given stream is simply clean. Guidance is against a partner who does nothing (SyncCFG), so it strengthens
not the text and not the partner, but that the two agree.

    python sample.py --audio assets/hammer.wav --image assets/hammer.png
    python sample.py --audio x.wav --image f.png --prompt "a dog barks" --asg 2 --shift-audio 0.3
    python sample.py --prompt "a hammer strikes a block three times"
    python sample.py --video clip.mp4
    python sample.py --ckpt out/joint/joint/best.pt --prompt "a face calls out" --transcript "u i" --ref-audio voice.wav --maps
    python sample.py --bench

    B clips · R rows = guidance branches x clips · L latents · C h w latent channels and grid · F frames
"""
import hashlib
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import (FPS, RATE, BadInput, Parser, add_sound, film_strip, load_checkpoint, load_weights, log_mel, number, read_audio, read_image,
                  read_video, run_cli, write_picture, write_sound, write_video)
from losses import combine_guidance, shift_sigma
from model import MMDiT, MMDiTConfig, text_bytes
import pyramid
from pyramid import QUALITY_SUFFIX, NEGATIVE_PROMPT, block_noise, with_guidance, load_pyramid_flow, load_pyramid_vae, sample_pyramid
from towers import DualTower, DualTowerConfig
from vae import AudioVAE, AudioVAEConfig, CausalVideoVAE, VAEConfig

HERE = Path(__file__).parent
VAE_FILE, A2V_FILE, AUDIO_VAE_FILE, MEL_VAE_FILE, T2AV_FILE, JOINT_FILE = (HERE / f"weights/{name}-toybox.pt" for name in ("vae", "a2v", "audio-vae", "mel-vae", "t2av", "joint"))


def pick_device(name="auto"):
    """'auto' | 'cuda' | 'mps' | 'cpu' -> device, autocast context maker, the choice in words."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise BadInput(f"--device {name}: this machine has none that torch can use; leave --device at auto")
    native = {"cuda": cuda and torch.cuda.is_bf16_supported(), "mps": False, "cpu": torch.ops.mkldnn._is_mkldnn_bf16_supported()}[name]
    words = f"{name} ({torch.cuda.get_device_name() if name == 'cuda' else f'{torch.get_num_threads()} threads'}), " + (
        "bfloat16 autocast: the hardware has it" if native else "float32: no native bfloat16")
    return torch.device(name), (lambda: torch.autocast(name, torch.bfloat16)) if native else nullcontext, words


def load_vae(path=VAE_FILE, device="cpu"):
    """A checkpoint of ours, or the folder of Pyramid Flow's VAE."""
    if Path(path).is_dir():
        return load_pyramid_vae(path, device)
    ckpt = load_checkpoint(path, "vae", "the toybox VAE ships as weights/vae-toybox.pt, or train one: python train.py --task vae")
    return load_weights(CausalVideoVAE(VAEConfig(**ckpt["config"])), ckpt["ema"], path).to(device).eval()


def load_a2v(path=A2V_FILE, vae_path=VAE_FILE, device="cpu", pretrained=None):
    """-> the model with its averaged (EMA) weights, the VAE it was trained with, the checkpoint. What was trained on top of Pyramid
    Flow is the trained part alone: `pretrained`, the folder of all of it, holds the rest."""
    ckpt = load_checkpoint(path, "a2v", "the toybox model ships as weights/a2v-toybox.pt, or train one: python train.py --task a2v")
    config = MMDiTConfig(**ckpt["config"])
    if config.text == "bytes":
        model = load_weights(MMDiT(config), ckpt["ema"], path)
    elif not pretrained:
        raise BadInput(f"{path}: trained on top of Pyramid Flow; give its downloaded folder by --pretrained, and --hubert facebook/hubert-large-ls960-ft")
    else:
        model = load_pyramid_flow(Path(pretrained) / "diffusion_transformer_384p", audio_dim=config.audio_dim, audio_rope=config.audio_rope)
        load_weights(model, {**model.state_dict(), **ckpt["ema"]}, path)
        vae_path = Path(pretrained) / "causal_video_vae"
    vae = load_vae(vae_path, device)
    if ckpt["vae"] != fingerprint(vae):
        raise BadInput(f"{vae_path}: not the VAE that {path} was trained with; give that one by --{'pretrained' if pretrained else 'vae'}")
    return model.to(device).eval(), vae, ckpt


def load_audio_vae(path=AUDIO_VAE_FILE, device="cpu"):
    """Of waveforms, as SyncFlow's towers have it, or of spectra, as Harmony's."""
    ckpt = load_checkpoint(path, "audio-vae or mel-vae", "the toybox's ship as weights/audio-vae-toybox.pt and mel-vae-toybox.pt, or train one: python train.py --task audio-vae, or mel-vae")
    front = "mel" if ckpt["task"] == "mel-vae" else "waveform"
    vae = AudioVAE(AudioVAEConfig(**{**ckpt["config"], "front": front}))
    return load_weights(vae, ckpt["ema"], path).to(device).eval()


def load_t2av(path=T2AV_FILE, vae_path=VAE_FILE, audio_vae_path=None, device="cpu"):
    """-> the two towers (SyncFlow's or Harmony's) with their averaged weights, the VAEs they were trained with, the checkpoint. Without
    audio_vae_path it is the shipped one of their kind."""
    ckpt = load_checkpoint(path, "t2av or joint", "SyncFlow's for the toybox ships as weights/t2av-toybox.pt, or train one: python train.py --task t2av")
    model = load_weights(DualTower(DualTowerConfig(**ckpt["config"])), ckpt["ema"], path)
    audio_vae_path = audio_vae_path or (MEL_VAE_FILE if model.cfg.bridges else AUDIO_VAE_FILE)
    vaes = load_vae(vae_path, device), load_audio_vae(audio_vae_path, device)
    for flag, name, vae in zip(("vae", "audio-vae"), (vae_path, audio_vae_path), vaes):
        if ckpt[flag.replace("-", "_")] != fingerprint(vae):
            raise BadInput(f"{name}: not the {flag} that {path} was trained with; give that one by --{flag}")
    return model.to(device).eval(), *vaes, ckpt


def attach_external_encoders(model, args, captions, device):
    """Give a model on Pyramid Flow the ears and the reader that it was trained with: `model.hubert`, `model.prompts`."""
    if model.cfg.text == "bytes":
        return
    if not args.hubert:
        raise BadInput(f"{args.ckpt}: hears by HuBERT; give --hubert facebook/hubert-large-ls960-ft")
    captions = sorted(set(captions))
    states = pyramid.t5_clip_states(args.pretrained, [*(c + QUALITY_SUFFIX if c else "" for c in captions), NEGATIVE_PROMPT], device)
    model.hubert, model.prompts = pyramid.load_hubert(args.hubert, device), dict(zip([*captions, NEGATIVE_PROMPT], zip(*(torch.from_numpy(a).float() for a in states))))


def fingerprint(vae):
    """A few letters that tell one VAE's latents from another's: they depend on the encoder alone, decoders may be tuned."""
    config = asdict(vae.cfg)
    # The fields of the audio VAE's other front end say nothing about these latents.
    unused = {"waveform": ("front", "mels", "depth"), "mel": ("front", "ratios", "patch", "lstm")}
    for name in unused.get(config.get("front"), ()):
        del config[name]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, w in sorted(vae.state_dict().items()):
        if name.startswith(("encoder", "quant_conv")):
            digest.update((w.half() + 0.).cpu().numpy().tobytes())            # -0 and 0 are one number, but not one byte
    return digest.hexdigest()[:16]


class WithoutAudio:
    """A model without its audio layers: what it would do if it had never heard. The off-sync row of every table."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def prefill(self, first, text, pooled, audio, n_off_sync=0):
        return self.model.prefill(first, text, pooled)

    def __call__(self, clips, timestep, text, mask, pooled, audio, off_sync=0, gone=0):
        return self.model(clips, timestep, text, mask, pooled)


def sample_autoregressive(model, z0, latents, sound, words, nothing=None, steps=30, asg=2., cfg=0., seeds=(0,), bar=None):
    """Generate latents 1.. one after another, yielding each as (B, C, 1, h, w), normalised.

    z0 (B, C, 1, h, w): the picture's latent; sound: the whole of it, words, and nothing to say, as `MMDiT.encode_audio` and
    `MMDiT.encode_text` take them (nothing=None: no text guidance). asg, cfg: w_a, w_t >= 0. Clip i draws its noise from seeds[i]
    alone, so it does not depend on the batch around it."""
    B, noise = len(z0), [torch.Generator().manual_seed(int(s)) for s in seeds]
    (text, mask, pooled), audio = model.encode_text(words), model.encode_audio(sound)      # (B, T, ·), (B, T), (B, ·); (B, S, A)
    null = cfg > 0 and nothing is not None
    if null:                                                                  # rows: full, null text (, off-sync)
        text, mask, pooled = (torch.cat(pair) for pair in zip((text, mask, pooled), model.encode_text(nothing)))
    if model.cfg.context_clock == "shared":                                   # Pyramid Flow's way; `steps` in all three stages
        each, draw = lambda f: torch.stack([f(g) for g in noise]), (z0.shape[1], latents - 1, *z0.shape[3:])
        yield from sample_pyramid(with_guidance(model, text, mask, pooled, audio, asg), z0, latents,
                                   each(lambda g: torch.randn(draw, generator=g)).to(z0), [len(p) for p in np.array_split(range(steps), 3)], cfg,
                                   jump=lambda shape: each(lambda g: block_noise(shape[1:], g)), keep=model.cfg.context, bar=bar)
        return
    if null:
        audio, z0 = audio.repeat(2, 1, 1), z0.repeat(2, 1, 1, 1, 1)
    context = model.prefill(z0, text, pooled, audio, n_off_sync=B if asg > 0 else 0)
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for _ in range(1, latents):
        x = torch.stack([torch.randn(z0.shape[1:], generator=g) for g in noise]).to(z0)              # fp32 all the way
        for s, s_next in zip(sigmas[:-1], sigmas[1:]):
            v = model.denoise_step(context, x.repeat(1 + null, 1, 1, 1, 1), s).to(x)
            v = combine_guidance(v[:B], (1 + asg, v[-B:]), (1 + cfg if null else 1, v[B:2 * B]))                # Syncphony eq. 6
            x = x + (s_next - s) * v                                          # Euler
            if bar is not None:
                bar.update()
        model.append_latent(context, x.repeat(1 + null, 1, 1, 1, 1))
        yield x


def conditions(model, waves, captions, samples):
    """Waveforms and captions as the model takes them -> sound, words, and the words of text guidance (None: nobody said anything).
    All sounds are cut, or padded with silence, to `samples`."""
    device, waves = next(model.parameters()).device, [np.pad(w[:samples], (0, max(0, samples - len(w)))) for w in waves]
    said = any(captions)
    if model.cfg.audio == "mel":
        sound = torch.from_numpy(np.stack([log_mel(w) for w in waves]))
        sound = sound[:, :sound.shape[1] // 2 * 2].to(device)                 # (B, 2S, 64)
    else:
        sound = torch.from_numpy(np.stack([model.hubert(w) for w in waves])).to(device)             # (B, S, A)
    if model.cfg.text == "bytes":
        words = text_bytes(captions).to(device)
        return sound, words, torch.zeros_like(words) if said else None
    look_up = lambda keys: tuple(torch.stack(column).to(device) for column in zip(*(model.prompts[k] for k in keys)))
    return sound, look_up(captions), look_up([NEGATIVE_PROMPT] * len(captions))


def generate_video(model, vae, pictures, waves, captions, frames, autocast=nullcontext, bar=None, tiles=False, **settings):
    """Pictures uint8 (B, H, W, 3) and waveforms (samples,) -> yields video uint8 (B, f, H, W, 3), `frames` in all.

    Frame 0 is the picture itself. `settings` go to `sample_autoregressive`; sounds are padded with silence to the video's length. tiles:
    decode large pictures in pieces (`CausalVideoVAE.decode_tiles`)."""
    device = next(model.parameters()).device
    t, left = vae.stride_t, frames
    latents = math.ceil((frames - 1) / t) + 1
    sound, words, nothing = conditions(model, waves, captions, math.ceil(((latents - 1) * t + 1) / FPS * RATE) + RATE // 50)
    first = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1      # (B, 3, 1, H, W)
    with torch.no_grad(), autocast():
        z0, cache = vae.normalise(vae.encode(first)[0].float()), {}
        decode = (lambda z: vae.decode_tiles(z, cache)) if tiles else lambda z: vae.decode(z, first, cache)
        decode(vae.denormalise(z0))
        yield np.stack(pictures)[:, None]
        left -= 1
        for z in sample_autoregressive(model, z0, latents, sound, words, nothing, bar=bar, **settings):
            video = decode(vae.denormalise(z, start=False))[:, :, :left].float()                  # (B, 3, t, H, W)
            left -= video.shape[2]
            yield (video.clamp(-1, 1) * 127.5 + 128).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


# ------------------------------------------------------------------------------------------------ both streams at once

def sample_syncflow(model, shape_v, shape_a, words, nothing=None, steps=50, cfg=6., seeds=(0,), z_v=None, z_a=None, first=None, bar=None):
    """Generate both streams together -> latents of video (B, *shape_v) and audio (B, *shape_a), normalised; None for a shape of None.

    words, nothing: a text and the null text as `DualTower.encode_text` takes them. cfg: w of SyncFlow eq. 3, which is S itself; 1 = no
    guidance. z_v (B, *shape_v): the video is given and only its sound is made. first (B, C, 1, h, w): its first latent is given, the
    picture that both begin with. z_a (B, A, n): so are the first n audio latents, for a sound that goes on. What is given is replaced
    at every step by itself at that step's noise level, always with the same noise, so its path is the straight line and
    ends where it should."""
    B, device, noise = len(words), next(model.parameters()).device, [torch.Generator().manual_seed(int(s)) for s in seeds]
    draw = lambda shape: None if shape is None else torch.stack([torch.randn(shape, generator=g) for g in noise]).to(device)
    eps_v, eps_a = draw(shape_v), draw(shape_a)
    x_v, x_a, null = eps_v, eps_a, cfg != 1 and nothing is not None
    text, mask = model.encode_text(words)
    if null:
        text, mask = (torch.cat(both) for both in zip((text, mask), model.encode_text(nothing)))
    twice = lambda x: x if x is None or not null else torch.cat([x, x])
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        if z_v is not None:
            x_v = (1 - s) * z_v + s * eps_v
        if first is not None:
            x_v = torch.cat([(1 - s) * first + s * eps_v[:, :, :1], x_v[:, :, 1:]], 2)
        if z_a is not None:
            n = z_a.shape[2]
            x_a = torch.cat([(1 - s) * z_a + s * eps_a[:, :, :n], x_a[:, :, n:]], 2)
        sigma = torch.full((B * (1 + null),), s, device=device)
        made = model(twice(x_v), twice(x_a), sigma, sigma, text, mask)
        v_v, v_a = (None if v is None else combine_guidance(v[:B].float(), (cfg if null else 1, v[B:].float())) for v in made)       # SyncFlow eq. 3
        x_v, x_a = (None if x is None else x + (s_next - s) * v for x, v in ((x_v, v_v), (x_a, v_a)))
        if bar is not None:
            bar.update()
    x_v = z_v if z_v is not None else x_v if first is None else torch.cat([first, x_v[:, :, 1:]], 2)
    return x_v, x_a if z_a is None or x_a is None else torch.cat([z_a, x_a[:, :, z_a.shape[2]:]], 2)


def sample_harmony(model, shape_v, shape_a, words, nothing=None, steps=40, sync_video=3., sync_audio=2., cfg=1., shift=5., seeds=(0,),
              z_v=None, z_a=None, first=None, kept=None, ref=None, mute=None, still=None, bar=None, guidance_maps=None):
    """Harmony's sampler -> latents of video (B, *shape_v) and audio (B, *shape_a), normalised.

    SyncCFG: what is to be strengthened is neither the text nor the partner itself but that both AGREE. So the negatives have a
    partner who does nothing, at sigma = 0: silence for the video, a picture that stands still for the sound (eqs. 9, 10)

        v_v = v_v(x_v, mute) + s_v [v_v(x_v, x_a) - v_v(x_v, mute)]          v_a likewise with a still video and s_a

    Joint and negatives of a step run in one batch. words, nothing: (text, mask, told, told_mask), the null text's for text guidance
    (cfg = 1: none). mute (1, A, S), still (1, C, L, h, w): the anchors. z_v or z_a (B, ...): that stream is given, clean, and drives
    the other, guided by the same anchor. first (B, C, 1, h, w): the first latent is given. kept (B, A, n): so are the first n
    audio latents, for a sound that goes on. ref (B, A, R): whose timbre it shall be. guidance_maps: a list that gets every step's
    |joint - mute| (B, L, h, w), where guidance pulls."""
    B, device, noise = len(words[0]), next(model.parameters()).device, [torch.Generator().manual_seed(int(s)) for s in seeds]
    draw = lambda shape: torch.stack([torch.randn(shape, generator=g) for g in noise]).to(device)
    eps_v, eps_a = draw(shape_v), draw(shape_a)
    x_v, x_a = eps_v if z_v is None else z_v, eps_a if z_a is None else z_a
    sigmas = shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        if first is not None:
            x_v = torch.cat([first, x_v[:, :, 1:]], 2)
        if kept is not None:
            n = kept.shape[2]
            x_a = torch.cat([(1 - s) * kept + s * eps_a[:, :, :n], x_a[:, :, n:]], 2)
        s_v, s_a = s * (z_v is None), s * (z_a is None)                       # what is given is clean
        rows = dict(joint=(x_v, s_v, x_a, s_a, words))
        if cfg != 1 and nothing is not None:
            rows["null"] = x_v, s_v, x_a, s_a, nothing
        if sync_video != 1 and z_v is None:
            rows["mute"] = x_v, s_v, mute.expand_as(x_a), 0., words
        if sync_audio != 1 and z_a is None:
            rows["still"] = still.expand_as(x_v), 0., x_a, s_a, words
        videos, clocks_v, sounds, clocks_a, told = zip(*rows.values())
        sigma_v, sigma_a = (torch.tensor(clocks, device=device).repeat_interleave(B) for clocks in (clocks_v, clocks_a))
        sigma_v = sigma_v[:, None].repeat(1, x_v.shape[2])                    # (R·B, L)
        if first is not None:
            sigma_v[:, 0] = 0
        made = model(torch.cat(videos), torch.cat(sounds), sigma_v, sigma_a, *(torch.cat(t) for t in zip(*told)),
                              None if ref is None else ref.repeat(len(rows), 1, 1))
        v_v, v_a = (dict(zip(rows, v.float().unflatten(0, (-1, B)))) for v in made)
        text = cfg if "null" in rows else 1
        if guidance_maps is not None and "mute" in rows:
            guidance_maps.append((v_v["joint"] - v_v["mute"]).abs().mean(1))
        if z_v is None:
            x_v = x_v + (s_next - s) * combine_guidance(v_v["joint"], (sync_video, v_v.get("mute")), (text, v_v.get("null")))                 # eq. 9
        if z_a is None:
            x_a = x_a + (s_next - s) * combine_guidance(v_a["joint"], (sync_audio, v_a.get("still")), (text, v_a.get("null")))                # eq. 10
        if bar is not None:
            bar.update()
    return x_v if first is None else torch.cat([first, x_v[:, :, 1:]], 2), x_a if kept is None else torch.cat([kept, x_a[:, :, kept.shape[2]:]], 2)


def generate_audio_video(model, vae, audio_vae, captions, frames, size, autocast=nullcontext, z_v=None, seeds=None, bar=None, some=16, z_a=None, pictures=None,
            sound_captions=None, speech=None, refs=None, attention_maps=None, **settings):
    """Captions -> videos uint8 (B, F, H, W, 3) (None if they are given, as normalised latents z_v (B, C, L, h, w), or if the model
    makes sound alone), waveforms (B, samples) (None without an audio VAE, or if given, as z_a (B, A, S)). pictures, uint8 (B, H, W, 3):
    what they begin with. `settings` go to `sample_syncflow` or, with a Harmony model, to `sample_harmony`; clip i has seed seeds[i]. Harmony's
    alone: z_a; sound_captions, where the sound has words of its own; speech: what is said; refs (B, A, R): latents of references; attention_maps: a list
    that gets what `write_maps` shows, of every batch."""
    device, (h, w), seeds = next(model.parameters()).device, data.sides(size), range(len(captions)) if seeds is None else seeds
    shape_v = None if model.cfg.blind else (model.cfg.latent, math.ceil((frames - 1) / vae.stride_t) + 1, h // vae.stride, w // vae.stride)
    samples = audio_vae and round(frames / FPS * audio_vae.cfg.rate)
    shape_a, videos, waves = audio_vae and (model.cfg.audio_latent, math.ceil(samples / audio_vae.hop)), [], []
    for i in range(0, len(captions), some):
        part = lambda given: None if given is None else given[i:i + some]
        with torch.no_grad(), autocast():
            picture = None if pictures is None else torch.tensor(pictures[i:i + some]).to(device).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
            given = dict(seeds=part(seeds), z_v=part(z_v), first=None if picture is None else vae.normalise(vae.encode(picture)[0].float()), bar=bar, **settings)
            if not model.cfg.bridges or not audio_vae:                        # a video tower alone knows no bridges
                words = text_bytes(captions[i:i + some]).to(device)
                x_v, x_a = sample_syncflow(model, shape_v, shape_a, words, torch.zeros_like(words) if any(captions) else None, **given)
            else:
                told, nothing = encode_prompts(model, part(captions), part(sound_captions), part(speech))
                mute, still = synccfg_negatives(vae, audio_vae, shape_v[1], samples, size, device, picture)
                guidance_maps = [] if attention_maps is not None else None
                x_v, x_a = sample_harmony(model, shape_v, shape_a, told, nothing, mute=mute, still=still, z_a=part(z_a), ref=part(refs), guidance_maps=guidance_maps, **given)
                if attention_maps is not None:                                         # who attention_maps where in the finished clip
                    maps, clean = [], torch.zeros(len(told[0]), device=device)
                    model(x_v, x_a, clean, clean, *told, part(refs), attention_maps=maps)
                    attention_maps.append(dict(heat=torch.stack(guidance_maps).mean(0).float().cpu() if guidance_maps else None,
                                      attention=torch.stack(maps).mean((0, 2)).float().cpu()       # over layers and heads: (B, S, N), rows sum to 1
                                      .unflatten(2, (x_v.shape[2], *(n // model.cfg.patch for n in x_v.shape[3:])))))
            if audio_vae and z_a is None:
                waves += list(audio_vae.decode(audio_vae.denormalise(x_a), samples).float().clamp(-1, 1).cpu().numpy())
            if z_v is None and shape_v:
                video = vae.decode(vae.denormalise(x_v), picture)[:, :, :frames].float()
                if pictures is not None:
                    video[:, :, :1] = picture                                 # frame 0 is the picture itself
                videos += list((video.clamp(-1, 1) * 127.5 + 128).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy())
    return np.stack(videos) if videos else None, np.stack(waves) if waves else None


def encode_prompts(model, captions, sound_captions=None, speech=None):
    """What Harmony's towers are told, and the same without a word -> two tuples (text, mask, told, told_mask)."""
    device = next(model.parameters()).device
    seen, heard, said = (text_bytes(t).to(device) for t in (captions, sound_captions or captions, speech or [""] * len(captions)))
    return (*model.encode_text(seen), *model.encode_audio_text(heard, said)), (*model.encode_text(0 * seen), *model.encode_audio_text(0 * heard, 0 * said))


def synccfg_negatives(vae, audio_vae, L, samples, size, device, picture=None):
    """Partners who do nothing, as normalised latents: a sound that is silent (1, A, S) and a video that stands still (1 or B, C, L, h, w),
    of the picture (B, 3, 1, H, W) that the clip begins with, or grey. They are what the VAEs make of silence and stillness,
    which is not zero."""
    picture = torch.zeros(1, 3, 1, *data.sides(size), device=device) if picture is None else picture
    still = vae.encode(picture.expand(-1, -1, 1 + (L - 1) * vae.stride_t, -1, -1))[0].float()
    return audio_vae.normalise(audio_vae.encode(torch.zeros(1, samples, device=device))[0].float()), vae.normalise(still)


def encode_video(vae, frames, device):
    """uint8 (F, H, W, 3) -> normalised latents (1, C, L, h, w), chunk by chunk; the last frame is held until a latent is full."""
    frames = np.concatenate([frames, np.repeat(frames[-1:], -(len(frames) - 1) % vae.stride_t, 0)])
    with torch.no_grad():
        chunk = lambda a, b: torch.from_numpy(frames[a:b].copy()).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        first, cache, each = chunk(0, 1), {}, 16 * vae.stride_t
        pieces = [vae.encode(chunk(0, each + 1), first, cache)[0]] + [vae.encode(chunk(a, a + each), first, cache)[0] for a in range(each + 1, len(frames), each)]
    return vae.normalise(torch.cat(pieces, 2))


def encode_sound(audio_vae, wave, device):
    """Waveform (samples,) at the VAE's rate -> normalised latents (1, A, S)."""
    with torch.no_grad():
        return audio_vae.normalise(audio_vae.encode(torch.from_numpy(wave)[None].to(device))[0].float())


def video_to_audio(model, vae, audio_vae, frames, prompt, autocast=nullcontext, window=13, overlap=3, seed=0, bar=None, sound_captions=None, speech=None, refs=None, **settings):
    """A sound for a video uint8 (F, H, W, 3) of any length -> waveform. The towers see `window` latents at a time, the picture
    and what follows; the next window begins `overlap` latents before the end of the last, and keeps what sounds there. Harmony's are
    told as in `generate_audio_video`; to them the video is simply clean."""
    device = next(model.parameters()).device
    z, samples = encode_video(vae, frames, device), round(len(frames) / FPS * audio_vae.cfg.rate)
    S, made, words, last = math.ceil(samples / audio_vae.hop), None, text_bytes([prompt]).to(device), max(1, z.shape[2] - window + 1)
    for k, l in enumerate([*range(1, last, window - 1 - overlap), last]):     # the last window ends with the video
        seen = torch.cat([z[:, :, :1], z[:, :, l:l + window - 1]], 2)         # latent l of the video is the window's latent 1
        start = round((l - 1) * model.cfg.alpha)                              # the window's first audio latent
        kept = None if made is None else made[:, :, start:]
        length = min(S - start, math.ceil((seen.shape[2] - 1) * model.cfg.alpha) + 3)
        shapes, given = (seen.shape[1:], (model.cfg.audio_latent, length)), dict(seeds=[seed + 10 ** 6 * k], z_v=seen, bar=bar, **settings)
        with torch.no_grad(), autocast():
            if model.cfg.bridges:
                told, nothing = encode_prompts(model, [prompt], sound_captions, speech)
                picture = torch.from_numpy(frames[:1].copy()).to(device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
                still = synccfg_negatives(vae, audio_vae, seen.shape[2], audio_vae.hop, None, device, picture)[1]
                x = sample_harmony(model, *shapes, told, nothing, still=still, kept=kept, ref=refs, **given)[1]
            else:
                x = sample_syncflow(model, *shapes, words, torch.zeros_like(words) if prompt else None, z_a=kept, **given)[1]
        made = x if made is None else torch.cat([made[:, :, :start], x.to(made)], 2)
    with torch.no_grad():
        return audio_vae.decode(audio_vae.denormalise(made), samples)[0].clamp(-1, 1).cpu().numpy()


def skip_probe(model, vae, picture, wave, prompt, frames, autocast, path, **settings):
    """Leave out one block after the other (Syncphony figures 10, 11): what breaks shows what a block is for. The paper saw
    the attention_maps break without early blocks and the motion change without late ones, and so put the audio into the late ones.
    Writes one strip per block, the whole model's first, and prints how far each video is from the whole model's."""
    K, d = model.cfg.heads, model.cfg.head_dim
    nothing = lambda x, y, *_: (x, y, (x.new_zeros(len(x), K, 0, d),) * 2)    # and no keys and values to look back on
    blocks, strips, whole = [*model.transformer_blocks, *model.single_transformer_blocks], [], None
    for i, block in [(None, None), *enumerate(blocks)]:
        if block is not None:
            block.forward = nothing
        video = np.concatenate(list(generate_video(model, vae, picture[None], [wave], [prompt], frames, autocast, **settings)), 1)[0]
        if block is not None:
            del block.forward
        whole = video if whole is None else whole
        strips.append(film_strip(video, wave))
        kind = "double" if i is not None and i < len(model.transformer_blocks) else "single"
        print("whole model" if i is None else f"without block {i:2d} ({kind}-stream): mean |difference| {np.abs(video.astype(float) - whole).mean():6.2f} of 255")
    write_picture(path, np.concatenate(strips))
    print(f"{path}: the whole model, then one strip for every block left out")


def both_or_sound(args, device, autocast, words):
    """The command with two towers: --prompt alone (picture and sound), --video (its sound); with Harmony's also --audio (its picture),
    a picture to begin with, words to say and a voice to say them in, and many at once by --jsonl."""
    model, vae, audio_vae, ckpt = load_t2av(args.ckpt, args.vae, args.audio_vae, device)
    harmony, name = model.cfg.bridges, args.ckpt
    if args.compile:
        for block in model.all_blocks():
            block.compile(dynamic=True)
    size, own = args.resolution or ckpt["size"], ckpt["guidance"]
    if args.bench:
        return bench_towers(model, vae, audio_vae, size, autocast)
    settings = dict(steps=args.steps or (40 if harmony else 50), cfg=own["cfg"] if args.cfg is None else args.cfg)
    if harmony:
        settings.update(shift=own["shift"], **{k: own[k] if getattr(args, k) is None else getattr(args, k) for k in ("sync_video", "sync_audio")})
    print(f"{words}\n{Path(name).name}: step {ckpt['step']} of stage {ckpt['stage']}, {sum(q.numel() for q in model.parameters()) / 1e6:.1f} M parameters, EMA weights")
    if harmony and 0 in (ckpt["args"]["lambda_v"], ckpt["args"]["lambda_a"]) and max(settings["sync_video"], settings["sync_audio"]) > 1:
        print("this checkpoint was trained without the one-way tasks (--lambda-v 0, --lambda-a 0): it does not know the silent and still partners of SyncCFG; better --sync-video 1 --sync-audio 1")
    print(", ".join(f"{k.replace('_', '-')} {v:g}" for k, v in settings.items()) + f", {'x'.join(map(str, data.sides(size)))} at {FPS} fps")
    jobs = list(read_jobs(args))
    for job in jobs:
        for flag in ("audio", "ref_audio", "transcript", "maps"):
            if (args.maps if flag == "maps" else job[flag]) and not harmony:
                raise BadInput(f"--{flag.replace('_', '-')}: {name} is of SyncFlow's kind and knows no such input; give a checkpoint of train.py --task joint by --ckpt")
        if model.cfg.blind and job["video"]:
            raise BadInput(f"--video {job['video']}: {name} makes sounds from text and sees no video; give a checkpoint trained without --no-video")
        if not (job["prompt"] or job["video"] or job["audio"] or job["transcript"]):
            raise BadInput(f"{f'{args.jsonl} record ' + job['stem'] + ': ' if args.jsonl else ''}--prompt is empty; say what is to be seen, or give a --video that gets a sound")
        if args.maps and job["video"]:
            raise BadInput(f"--maps: shows where a clip that is made attention_maps; leave it out with --video {job['video']}")
        if job["audio"] and job["video"]:
            raise BadInput(f"--audio {job['audio']}: with --video there is nothing left to make; leave one of them out")
    for k, job in enumerate(jobs):
        if len(job["prompt"].encode(errors="replace")) > 96:
            print("the text encoder reads the first 96 letters of the prompt")
        for i in range(args.n):
            name = file_name(args, job, i, ".wav" if model.cfg.blind else ".mp4")
            if args.jsonl and name.is_file():                                 # done before an interruption
                print(f"{name}: is there already")
                continue
            start = time.perf_counter()
            with tqdm(disable=None, leave=False, unit="step", desc=f"{k + 1} of {len(jobs)}" if args.jsonl else None) as bar:
                frames = make_one(model, vae, audio_vae, job, name, args, size, autocast, args.seed + i, dict(settings, bar=bar))
            print(f"{name}: {time.perf_counter() - start:.1f} s for {frames / FPS:.2f} s, seed {args.seed + i}")


def read_jobs(args):
    """What is to be made, one dict each: by the flags, or by every line of a .jsonl with fields of the same names, or Harmony-Bench's."""
    bench = dict(prompt=("video_caption", "audio_caption"), sound_prompt=("audio_caption",), transcript=("spoken_word_en", "spoken_word_zh"))
    flags = {k: getattr(args, k) for k in ("prompt", "transcript", "audio", "image", "video", "ref_audio")}
    if not args.jsonl:
        yield dict(flags, sound_prompt=args.prompt, stem=None)
        return
    path, stems = data.check_file(args.jsonl, "list"), set()
    for k, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            given = {key: record.get(key) or next((record[o] for o in others if record.get(o)), "") for key, others in bench.items()}
            given |= {key: record.get(key) for key in ("audio", "image", "video", "ref_audio")}
            if not all(isinstance(v, str) for v in given.values() if v is not None):
                raise ValueError
        except (ValueError, AttributeError) as why:
            raise BadInput(f"{path} line {k}: not a record; expected a JSON object of texts with prompt (or video_caption, audio_caption), and perhaps transcript "
                           "(or spoken_word_en, spoken_word_zh), audio, image, video, ref_audio") from why
        stem = str(record.get("id", f"{k:04d}"))
        if Path(stem).name != stem or stem in stems:
            raise BadInput(f"{path} line {k}: its id {stem!r} cannot be a file's name, or stands there twice; give every record a short name of its own")
        stems.add(stem)
        yield dict(given, sound_prompt=given["sound_prompt"] or given["prompt"], stem=stem)


def file_name(args, job, i, suffix):
    """--out, or a file in it named after the record, the given clip or sound, or the words."""
    said = "-".join("".join(c if c.isalnum() else " " for c in job["prompt"] or job["transcript"]).split()[:8])
    stem = job["stem"] or Path(job["video"] or job["audio"] or said or "sample").stem
    name = Path(args.out) if Path(args.out).suffix == suffix and not args.jsonl else Path(args.out) / f"{stem}{suffix}"
    return name.with_stem(f"{name.stem}-{i}") if args.n > 1 else name


def make_one(model, vae, audio_vae, job, name, args, size, autocast, seed, settings):
    """One clip with two towers, written to `name`, with its film strip. -> its frames"""
    device, rate, more, attention_maps = next(model.parameters()).device, audio_vae.cfg.rate, {}, [] if args.maps else None
    given = read_video(job["video"], size) if job["video"] else None
    wave = read_audio(job["audio"], rate) if job["audio"] else None
    frames = len(given) if given is not None else max(2, round((args.seconds or (data.FRAMES / FPS if wave is None else len(wave) / rate)) * FPS))
    if model.cfg.bridges:
        more = dict(speech=[job["transcript"]], sound_captions=[job["sound_prompt"]], refs=read_reference(job["ref_audio"], audio_vae, device))
    if job["video"]:
        video, sound = given, video_to_audio(model, vae, audio_vae, given, job["prompt"], autocast, seed=seed, **more, **settings)
        add_sound(name, job["video"], sound, rate)
    else:
        if wave is not None:
            sound = np.pad(wave, (0, max(0, round(frames / FPS * rate) - len(wave))))[:round(frames / FPS * rate)]
            more["z_a"] = encode_sound(audio_vae, sound, device)
        pictures = read_image(job["image"], size)[None] if job["image"] else None
        video, made = (None if x is None else x[0] for x in generate_audio_video(model, vae, audio_vae, [job["prompt"]], frames, size, autocast, seeds=[seed], pictures=pictures, attention_maps=attention_maps,
                                                                    **more, **settings))
        sound = made if wave is None else sound
        write_video(name, video, sound, rate=rate) if video is not None else write_sound(name, sound, rate)
    if video is not None:
        strip = film_strip(video[:60 * FPS], sound, rate=rate)
        write_picture(name.with_suffix(".png"), np.concatenate([write_maps(video, attention_maps[0]), strip]) if attention_maps else strip)
    return frames


def write_maps(video, attention_maps):
    """Harmony's figures 3 and 5 as rows to stand above the film strip of video (F, H, W, 3) uint8: where the sound of each moment attention_maps in its
    frame, and where SyncCFG pulls. Prints which share of either lies on what moves."""
    attention, L = attention_maps["attention"][0], attention_maps["attention"].shape[2]         # (S, L, h, w)
    cells = dict(attention=torch.stack([attention[max(0, round((l - .5) / L * len(attention))):round((l + .5) / L * len(attention)) + 1, l].mean(0) for l in range(L)]))
    if attention_maps["heat"] is not None:
        cells["SyncCFG"] = attention_maps["heat"][0]
    moves = torch.from_numpy(np.abs(video - np.median(video, 0)).max((0, 3)) > 24).float()               # (H, W): pixels that ever change
    rows = []
    for name, cell in cells.items():                                          # (L, h, w)
        big = torch.nn.functional.interpolate(cell[:, None] / cell.amax((1, 2), keepdim=True)[:, None].clamp(min=1e-9), video.shape[1:3])[:, 0]  # (L, H, W)
        print(f"{name}: {(big * moves).sum() / big.sum():.2f} of it lies on what moves, which is {moves.mean():.2f} of the picture")
        frame = big[[min(L - 1, -(-f * (L - 1) // max(1, len(video) - 1))) for f in range(len(video))]].numpy()[..., None]
        rows.append(film_strip((video * .35 + frame * [165., 110., 0.]).astype(np.uint8), np.zeros(1))[:video.shape[1]])
    return np.concatenate(rows)


def read_reference(path, audio_vae, device):
    """A recording of the voice or thing that shall sound -> latents (1, A, R) of up to 3 s of it from where it begins to sound; None without."""
    if not path:
        return None
    rate, wave = audio_vae.cfg.rate, read_audio(path, audio_vae.cfg.rate)
    loud = np.flatnonzero(np.abs(wave) > .02 * np.abs(wave).max())
    if not len(loud) or np.abs(wave).max() < 1e-4:
        raise BadInput(f"{path}: silent; a reference must be heard: 1 to 3 s of the voice or thing")
    wave = wave[max(0, loud[0] - rate // 20):][:3 * rate]
    if len(wave) < rate // 2:
        raise BadInput(f"{path}: {len(wave) / rate:.2f} s of sound; a reference needs at least 0.5 s, better 1 to 3")
    return encode_sound(audio_vae, wave, device)


def median_times(runs, rounds):
    """name -> function: medians of seconds. They take turns, so a machine that slows down slows all of them down."""
    spans = {name: [] for name in runs}
    for i in range(rounds + 1):                                               # the first round warms up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spans[name] += [time.perf_counter() - start] * (i > 0)
    return {name: sorted(times)[rounds // 2] for name, times in spans.items()}


def bench(model, vae, autocast):
    """What guidance, audio layers and the cache cost: ratios of whole roll-outs of one 2 s clip."""
    side, seconds = 2 * model.cfg.patch * vae.stride, 49 / FPS
    picture, wave, text = np.full((1, side, side, 3), 128, np.uint8), np.zeros(round(seconds * RATE), np.float32), ["a ball drops"]
    clip = lambda net=model, **settings: lambda: list(generate_video(net, vae, picture, [wave], text, 49, autocast, steps=30, **settings))
    t = median_times(dict(both=clip(asg=2., cfg=4.), no_asg=clip(asg=0., cfg=4.), plain=clip(asg=0., cfg=0.), deaf=clip(WithoutAudio(model), asg=0., cfg=0.)), 7)
    device, C = next(model.parameters()).device, model.cfg.latent
    g = torch.Generator().manual_seed(0)
    z, x = (torch.randn(1, C, k, side // vae.stride, side // vae.stride, generator=g).to(device) for k in (13, 1))
    with torch.no_grad(), autocast():
        y, pooled = model.text(text_bytes(text).to(device))
        a = model.ears(torch.zeros(1, 220, 64, device=device))
        context = model.prefill(z[:, :, :1], y, pooled, a)
        for l in range(1, 13):
            model.append_latent(context, z[:, :, l:l + 1])
        t |= median_times(dict(step=lambda: model.denoise_step(context, x, .5),
                        again=lambda: model.forward_teacher_forced(z, x, torch.full((1, 1), .5, device=device), y, pooled, a, start=13)), 31)
    ratios = dict(asg_on_off=t["both"] / t["no_asg"], audio_on_off=t["plain"] / t["deaf"], context_recomputed_cached=t["again"] / t["step"])
    for name, words in (("asg_on_off", f"ASG + CFG {t['both']:.2f} s, CFG alone {t['no_asg']:.2f} s"),
                        ("audio_on_off", f"audio layers on {t['plain']:.2f} s, off {t['deaf']:.2f} s"),
                        ("context_recomputed_cached", f"a step at latent 13: {1000 * t['again']:.1f} ms recomputed, {1000 * t['step']:.1f} ms cached")):
        print(f"{name:28s}{ratios[name]:6.2f}   {words}")
    print(json.dumps({k: round(r, 3) for k, r in ratios.items()}))


def bench_towers(model, vae, audio_vae, size, autocast):
    """What guidance (SyncFlow's by text, Harmony's SyncCFG) and the audio tower cost: ratios of 2 s clips with 50 steps."""
    make = lambda audio, **guidance: lambda: generate_audio_video(model, vae, audio, ["a ball drops"], data.FRAMES, size, autocast, steps=50, **guidance)
    on, off = (dict(sync_video=3., sync_audio=2.), dict(sync_video=1., sync_audio=1.)) if model.cfg.bridges else (dict(cfg=2.), dict(cfg=1.))
    t = median_times(dict(both=make(audio_vae, **on), plain=make(audio_vae, **off), video=make(None, cfg=1.)), 5)
    ratios = dict(guidance_on_off=t["both"] / t["plain"], audio_tower_on_off=t["plain"] / t["video"])
    print(f"guidance_on_off {ratios['guidance_on_off']:.2f}: {t['both']:.2f} s, {t['plain']:.2f} s\naudio_tower_on_off {ratios['audio_tower_on_off']:.2f}: {t['plain']:.2f} s, {t['video']:.2f} s")
    print(json.dumps({k: round(r, 3) for k, r in ratios.items()}))


def arguments():
    p = Parser(__doc__)
    p.add_argument("--audio", help="the sound: wav, flac, ogg, mp3, m4a or a clip with sound, any rate")
    p.add_argument("--image", help="the first frame: png, jpg, ..., any size (centre crop to a square)")
    p.add_argument("--prompt", default="", help="what is to be seen, in words; alone: makes picture and sound")
    p.add_argument("--video", help="a clip that gets a sound; its pictures stay as they are")
    p.add_argument("--transcript", default="", help="Harmony: what is said")
    p.add_argument("--ref-audio", help="Harmony: whose voice, or what thing, it shall sound like: 1 to 3 s of it")
    p.add_argument("--jsonl", help="two towers: many at once, a JSON object a line: prompt (or video_caption, audio_caption), transcript (spoken_word_en), audio, image, video, ref_audio, id")
    p.add_argument("--maps", action="store_true", help="Harmony: pictures of where each moment of the sound attention_maps in the video, and where SyncCFG pulls")
    p.add_argument("--sync-video", type=number(low=0), help="Harmony: s_v of SyncCFG, 1 = off; the checkpoint's own (3) if not given")
    p.add_argument("--sync-audio", type=number(low=0), help="Harmony: s_a of SyncCFG, 1 = off; the checkpoint's own (2) if not given")
    p.add_argument("--asg", type=number(low=0), help="w_a, Audio Sync Guidance; 0 = off (S = 1 + w_a); the checkpoint's own if not given")
    p.add_argument("--cfg", type=number(low=0), help="text guidance: w_t, 0 = off (S = 1 + w_t); of two towers w, 1 = off (S = w); the checkpoint's own if not given")
    p.add_argument("--steps", type=number(int, 1, 1000), help="Euler steps: 30 per latent, or 50 for two towers")
    p.add_argument("--seconds", type=number(low=.1), help="length of the video; the sound's own, or 2 s, if not given")
    p.add_argument("--resolution", type=data.picture_size, help="of two towers: another size than they were trained for")
    p.add_argument("--shift-audio", type=number(), default=0., help="delay the sound by so many seconds: the motion follows")
    p.add_argument("--seed", type=number(int, 0), default=0, help="seed of the noise; clip i uses seed + i")
    p.add_argument("--n", type=number(int, 1, 256), default=1, help="so many versions")
    p.add_argument("--ckpt", help="a checkpoint of train.py, of task a2v (weights/ has one), t2av or joint")
    p.add_argument("--vae", default=str(VAE_FILE), help="the VAE it was trained with")
    p.add_argument("--audio-vae", help="the audio VAE that two towers were trained with, if it is not the one in weights/")
    p.add_argument("--pretrained", help="of a model on Pyramid Flow: that folder, with its VAE and text encoders")
    p.add_argument("--hubert", help="of such a model: the HuBERT whose features it hears, a folder or a name on the hub")
    p.add_argument("--tiles", action="store_true", help="of such a model: decode in tiles of 256 pixels, for memory")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    p.add_argument("--compile", action="store_true", help="torch.compile every block: slower to start, faster per step")
    p.add_argument("--out", default="out/", help="a folder, or the name of the .mp4")
    p.add_argument("--skip-probe", action="store_true", help="leave out every block in turn: one strip each (Syncphony figures 10, 11)")
    p.add_argument("--bench", action="store_true", help="measure what guidance, audio layers and cache cost (with --prompt: what two towers cost), and stop")
    return p


def main():
    args = arguments().parse_args()
    device, autocast, words = pick_device(args.device)
    task = data.task_of(args.ckpt) if args.ckpt else None
    harmonys = args.jsonl or args.transcript or args.ref_audio or args.maps
    if task in ("t2av", "joint") or args.video or task != "a2v" and (harmonys or args.prompt and not (args.audio or args.skip_probe)):
        args.ckpt = args.ckpt or str(JOINT_FILE if harmonys else T2AV_FILE)
        return both_or_sound(args, device, autocast, words)
    jobs = [] if args.bench else list(read_jobs(args))
    for job in jobs:
        missing = [flag for flag in ("audio", "image") if not job[flag]]
        if missing:
            raise BadInput(f"{args.jsonl} record {job['stem']}: no {missing[0]} in it; this checkpoint wants audio and image" if args.jsonl else
                           f"--{missing[0]} is missing; give both: python sample.py --audio x.wav --image f.png, or --prompt, alone or with --image, or --video")
    args.ckpt, args.steps = args.ckpt or str(A2V_FILE), args.steps or 30
    model, vae, ckpt = load_a2v(args.ckpt, args.vae, device, args.pretrained)
    attach_external_encoders(model, args, [job["prompt"] for job in jobs], device)
    if args.compile and not args.skip_probe:
        for block in model.all_blocks():
            block.compile(dynamic=True)
    if args.bench and model.cfg.context_clock == "shared":
        raise BadInput(f"--bench: measures models of the parallel layout; {args.ckpt} is of Pyramid Flow's, which keeps no context")
    if args.bench:
        return bench(model, vae, autocast)
    asg, cfg = (ckpt["guidance"][k] if getattr(args, k) is None else getattr(args, k) for k in ("asg", "cfg"))
    settings = dict(steps=args.steps, asg=asg, cfg=cfg, tiles=args.tiles)
    print(f"{words}\n{Path(args.ckpt).name}: step {ckpt['step']}, {sum(q.numel() for q in model.parameters()) / 1e6:.1f} M parameters, EMA weights")
    print(f"{'x'.join(map(str, data.sides(ckpt['size'])))} at {FPS} fps, {args.steps} steps per latent, w_a = {asg:g}, w_t = {cfg:g} where there is a prompt")
    for job in jobs:
        wave, picture = read_audio_delayed(job["audio"], args.shift_audio), read_image(job["image"], ckpt["size"])
        frames = max(2, round((args.seconds or len(wave) / RATE) * FPS))
        if args.skip_probe:
            out = Path(args.out)
            return skip_probe(model, vae, picture, wave, job["prompt"], frames, autocast, (out.parent if out.suffix == ".mp4" else out) / "skip-probe.png",
                              seeds=[args.seed], **settings)
        for i in range(args.n):
            name, start, kept = file_name(args, job, i, ".mp4"), time.perf_counter(), []
            if args.jsonl and name.is_file():                                 # done before an interruption
                print(f"{name}: is there already")
                continue
            with tqdm(total=math.ceil((frames - 1) / vae.stride_t) * args.steps, disable=None, leave=False, unit="step") as bar:
                def pieces():
                    for piece in generate_video(model, vae, picture[None], [wave], [job["prompt"]], frames, autocast, bar, seeds=[args.seed + i], **settings):
                        if sum(map(len, kept)) < 60 * FPS:                    # the strip shows the first minute at most
                            kept.append(piece[0])
                        yield piece[0]
                write_video(name, pieces(), wave)
            write_picture(name.with_suffix(".png"), film_strip(np.concatenate(kept), wave))
            print(f"{name} and {name.with_suffix('.png').name}: {time.perf_counter() - start:.1f} s for {frames / FPS:.2f} s of video, seed {args.seed + i}")


def read_audio_delayed(path, delay):
    """A sound file -> waveform, delayed by so many seconds (earlier, if negative)."""
    wave, n = read_audio(path), round(abs(delay) * RATE)
    return wave if not n else np.pad(wave, (n, 0))[:len(wave)] if delay > 0 else np.pad(wave, (0, n))[n:]


if __name__ == "__main__":
    run_cli(main)
